"""records/: a finished run folder becomes submission.json and a picture; others are refused."""

import hashlib
import json
import math
import os
import subprocess
import sys

import numpy as np
import plot
import pytest
import run_folder
from helpers import ROOT, train_gpt

NUMBER, MAYBE_INT = (int, float), (int, type(None))
SCHEMA = {
    "author": str,
    "github_id": str,
    "name": str,
    "blurb": str,
    "date": str,
    "track": str,
    "val_loss": float,
    "val_bpb": float,
    "bytes_total": int,
    "bytes_code": int,
    "over_cap": bool,
    "seeds": list,
    "seed_results": dict,
    "hardware": str,
    "pytorch_version": str,
    "step_stop": MAYBE_INT,
    "wallclock_seconds": NUMBER,
    "eval_time_seconds": NUMBER,
    "tokens": MAYBE_INT,
    "bytes": int,
    "sha256": dict,
    "stages": dict,
}
SEED_SCHEMA = {
    "val_loss": float,
    "val_bpb": float,
    "artifact_bytes": int,
    "steps": MAYBE_INT,
    "step_avg_ms": (float, type(None)),
}
CODE, ARTIFACT, TOKENIZER = b"print()\n", bytes(range(256)) * 4, b"a tokenizer"
CONFIG = """SEED=7
NUM_LAYERS=4
MODEL_DIM=128
SCORER=documents
"""
BLOCKS = 40


def line(key, value=None, **values):
    return {"key": key, "value": value} | values


def step_lines(last=600):
    """Training from 6.9 down, with a validation on the way and late QAT near the end."""
    steps = [*range(1, 11), *range(50, last + 1, 50)]
    for n in steps:
        times = dict(train_time_ms=270 * n, step_avg_ms=270.5, tokens_per_s=15000)
        yield line("step", f"{n}/{last}", train_loss=3 + 4 * n**-0.4, **times)
    yield line("step", f"300/{last}", val_loss=3.5, val_bpb=1.9, step_avg_ms=270.5)
    yield line("late_qat:enabled", step=550, scale=0.15)


def exact(stage, bpb, **more):
    return line(f"final_{stage}_exact", val_loss=2 * bpb, val_bpb=bpb, **more)


def final_lines():
    yield exact("int6_roundtrip", 1.85)
    yield exact("int6_sliding_window", 1.83, stride=64)
    yield exact("ngram_backoff", 1.76, orders="2-7")
    yield exact("ngram", 1.7123456789012345, mixer="blend", orders="2-9", mass_error=1e-15)
    sizes = dict(code=len(CODE), weights=len(ARTIFACT), total=len(CODE) + len(ARTIFACT))
    yield line("final_artifact_bytes", **sizes, cap=16_000_000)
    yield line("final_budget", train_seconds=162.3, eval_seconds=21.5, cap="600/600")


def optional_lines():
    for order, saved in ((1, -50.5), (2, 900.0), (3, 1500.0), (4, 700.0)):
        yield line("ngram_gain", order, positions=1000, share=0.25, bits_saved=saved)
    masses = dict(scheme="pr864", mass_mean=37.2, mass_max=512.0, weights="artifact")
    yield line("final_ngram_pseudo", pseudo_bpb=0.28, **masses)
    proof = dict(coded_bytes=99, claimed_bytes=98.5, proved_tokens=500, total_tokens=9000)
    yield line("final_codec", **proof, decoded="ok")


def all_lines(training=True):
    settings = dict(RECORD="tiny(default)", RUN_ID="given(env)", SEED="7(env)")
    yield line("config", "Run", **settings)
    yield line("hardware", "1 x cpu x86_64", python="3.11.7", torch="2.13.0")
    yield line("val_text", tokens=BLOCKS * 1024, bytes=BLOCKS * 2500)
    if training:
        yield line("model_params", 829_868)
        yield from step_lines()
    yield from optional_lines()
    yield from final_lines()


def write_log(folder, lines):
    text = "".join(json.dumps(item) + "\n" for item in lines)
    (folder / "metrics.jsonl").write_text(text)


def write_blocks(folder, gain=0.1, count=BLOCKS):
    """Blocks of 2,500 bytes that save `gain` bits a byte, more and more of it."""
    sizes = np.full(count, 2500)
    model = -1.83 * math.log(2) * sizes
    saved = gain * np.linspace(-0.2, 1, count) * sizes * math.log(2)
    np.savez(folder / "blocks.npz", bytes=sizes, logp_model=model, logp_final=model + saved)


def make_run(folder, lines=None, **blocks):
    """A small run folder as train_gpt.py leaves it."""
    folder.mkdir(parents=True)
    write_log(folder, all_lines() if lines is None else lines)
    write_blocks(folder, **blocks)
    files = {"train_gpt.py": CODE, "artifact.bin": ARTIFACT, "tokenizer.model": TOKENIZER}
    for name, data in files.items():
        (folder / name).write_bytes(data)
    (folder / "config.env").write_text(CONFIG)
    return folder


def submit(folder):
    assert run_folder.main([str(folder)]) == 0
    return json.loads((folder / "submission.json").read_text(encoding="utf-8"))


def draw(*arguments):
    return plot.main([str(argument) for argument in arguments])


def png_size(path):
    """(width, height) of a PNG in pixels."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and len(data) > 20_000
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


@pytest.fixture
def run_dir(tmp_path):
    return make_run(tmp_path / "given")


# -----------------------------------------------------------------------------
# submission.json


def test_schema(run_dir):
    found = submit(run_dir)
    for name, kind in SCHEMA.items():
        assert isinstance(found[name], kind), name
    assert found.keys() - SCHEMA.keys() == {"codec", "pseudo", "ngram_gain"}
    assert found["seeds"] == [7] and found["seed_results"].keys() == {"7"}
    for name, kind in SEED_SCHEMA.items():
        assert isinstance(found["seed_results"]["7"][name], kind), name


def test_values_are_those_of_the_log(run_dir, monkeypatch):
    monkeypatch.setenv("AUTHOR", "Ada Lovelace")
    monkeypatch.setenv("GITHUB_ID", "ada")
    found = submit(run_dir)
    assert (found["author"], found["github_id"], found["name"]) == ("Ada Lovelace", "ada", "given")
    assert found["val_bpb"] == found["stages"]["ngram"]["val_bpb"] == 1.7123456789012345
    assert found["seed_results"]["7"]["val_bpb"] == found["val_bpb"]
    assert found["step_stop"] == found["seed_results"]["7"]["steps"] == 600
    assert found["seed_results"]["7"]["step_avg_ms"] == 270.5
    assert (found["wallclock_seconds"], found["eval_time_seconds"]) == (162.3, 21.5)
    assert found["bytes_total"] == len(CODE) + len(ARTIFACT) and not found["over_cap"]
    assert (found["tokens"], found["bytes"]) == (BLOCKS * 1024, BLOCKS * 2500)
    assert found["hardware"] == "1 x cpu x86_64" and found["pytorch_version"] == "2.13.0"


def test_stages_and_optional_lines_are_carried(run_dir):
    found = submit(run_dir)
    names = ["int6_roundtrip", "int6_sliding_window", "ngram_backoff", "ngram"]
    assert list(found["stages"]) == names
    assert found["stages"]["int6_sliding_window"]["stride"] == 64
    assert found["pseudo"]["pseudo_bpb"] == 0.28 and found["codec"]["decoded"] == "ok"
    assert [gain["order"] for gain in found["ngram_gain"]] == [1, 2, 3, 4]


def test_hashes_are_those_of_the_files(run_dir):
    names = {"code": CODE, "artifact": ARTIFACT, "tokenizer": TOKENIZER}
    expected = {name: hashlib.sha256(data).hexdigest() for name, data in names.items()}
    assert submit(run_dir)["sha256"] == expected


def test_writing_again_gives_the_same_bytes(run_dir):
    submit(run_dir)
    first = (run_dir / "submission.json").read_bytes()
    submit(run_dir)
    assert (run_dir / "submission.json").read_bytes() == first
    assert not list(run_dir.glob("*partial*")) and not list(run_dir.glob(".*partial*"))


def test_eval_only_run_has_no_steps(tmp_path):
    found = submit(make_run(tmp_path / "eval", all_lines(training=False)))
    result = found["seed_results"]["7"]
    assert found["step_stop"] is result["steps"] is result["step_avg_ms"] is None


def test_track_is_the_folder_of_the_record(tmp_path, monkeypatch):
    monkeypatch.setattr(train_gpt, "ROOT", tmp_path)
    for place in ("track_cpu/tinyer", "track_small/tiny", "track_10min_16mb/2026_pr"):
        (tmp_path / "records" / place).mkdir(parents=True)
        (tmp_path / "records" / place / "config.env").touch()
    assert train_gpt.find_track("tiny") == "small"
    assert train_gpt.find_track("tinye") == "cpu"
    assert train_gpt.find_track("") == train_gpt.find_track("other") == "10min_16mb"


def test_the_tiny_record_is_on_the_cpu_track(run_dir):
    assert submit(run_dir)["track"] == "cpu"


def test_over_the_cap_is_carried(run_dir, monkeypatch):
    monkeypatch.setattr(train_gpt, "CAP_BYTES", len(CODE) + len(ARTIFACT) - 1)
    assert submit(run_dir)["over_cap"] is True


def test_a_line_cut_off_by_a_kill_and_a_resume(run_dir):
    lines = [json.dumps(item) for item in all_lines()]
    torn = lines[:12] + [lines[12][:20]] + lines[8:]
    (run_dir / "metrics.jsonl").write_text("\n".join(torn) + "\n")
    assert submit(run_dir)["step_stop"] == 600


@pytest.mark.parametrize("missing", run_folder.FINAL_LINES)
def test_unfinished_run_is_refused(run_dir, capsys, missing):
    write_log(run_dir, (item for item in all_lines() if item["key"] != missing))
    assert run_folder.main([str(run_dir)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "unfinished" in error and missing in error
    assert not (run_dir / "submission.json").exists()


@pytest.mark.parametrize(
    "name", "metrics.jsonl config.env blocks.npz artifact.bin train_gpt.py tokenizer.model".split()
)
def test_missing_file_is_named(run_dir, capsys, name):
    (run_dir / name).unlink()
    assert run_folder.main([str(run_dir)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and name in error
    assert not (run_dir / "submission.json").exists()


def test_a_score_that_is_no_number_is_refused(run_dir, capsys):
    write_log(run_dir, [*all_lines(), exact("ngram", math.nan)])
    assert run_folder.main([str(run_dir)]) == 2
    assert "val_loss:nan" in capsys.readouterr().err


def test_a_stage_that_is_no_number_is_refused(run_dir, capsys):
    write_log(run_dir, [*all_lines(), exact("ttt", math.inf)])
    assert run_folder.main([str(run_dir)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_files_other_than_the_scored_ones_are_refused(run_dir, capsys):
    (run_dir / "artifact.bin").write_bytes(ARTIFACT + b"x")
    assert run_folder.main([str(run_dir)]) == 2
    assert "artifact.bin has 1025 bytes, its log says 1024" in capsys.readouterr().err


def test_one_refused_folder_does_not_stop_the_others(run_dir, tmp_path):
    assert run_folder.main([str(tmp_path / "nowhere"), str(run_dir)]) == 2
    assert (run_dir / "submission.json").exists()


# -----------------------------------------------------------------------------
# report.png


def test_plot_of_a_whole_run(run_dir):
    before = {path.name for path in run_dir.iterdir()}
    assert draw(run_dir) == 0
    width, height = png_size(run_dir / "report.png")
    assert width == 1875 and height > 1200
    assert {path.name for path in run_dir.iterdir()} - before == {"report.png"}


def test_the_same_run_gives_the_same_picture(run_dir):
    draw(run_dir)
    first = (run_dir / "report.png").read_bytes()
    draw(run_dir)
    assert (run_dir / "report.png").read_bytes() == first


def shown(*folders):
    """Titles of the panels that a picture of these folders has."""
    from matplotlib.figure import Figure

    runs = plot.load_all([*map(str, folders)])
    page, *panels = plot.draw(runs, Figure).axes
    titles = {panel.title for row in plot.ROWS + plot.OVERLAY for panel in row}
    found = [text.get_text() for text in page.texts if text.get_text() in titles]
    assert len(found) == len(panels)
    return found, [text.get_text() for text in page.texts]


def test_panels_without_data_are_left_out(tmp_path):
    training = make_run(tmp_path / "training", list(step_lines()), gain=0)
    scored = make_run(tmp_path / "scored", list(final_lines()), gain=0)
    whole = make_run(tmp_path / "whole")
    evaluated = make_run(tmp_path / "evaluated", all_lines(training=False))
    loss, ladder, gains, strip = (panel.title for row in plot.ROWS for panel in row)
    assert shown(training)[0] == [loss]
    assert shown(scored)[0] == [ladder]
    assert shown(evaluated)[0] == [ladder, gains, strip]
    assert shown(whole)[0] == [loss, ladder, gains, strip]
    by_time = plot.BY_TIME.title
    assert shown(training, evaluated)[0] == [loss, by_time, ladder, gains, strip]


def test_score_and_bytes_stand_above_and_pseudo_scores_below(run_dir):
    _, texts = shown(run_dir)
    assert "1.7123 bits per byte" in texts
    assert any(f"{len(CODE) + len(ARTIFACT):,} of 16,000,000 bytes" in text for text in texts)
    assert any("Pseudo score 0.2800 of scheme pr864" in text for text in texts)


def test_plot_of_an_eval_only_run(tmp_path):
    folder = make_run(tmp_path / "eval", all_lines(training=False))
    assert draw(folder) == 0
    png_size(folder / "report.png")


def test_plot_of_two_runs(run_dir, tmp_path):
    other = make_run(
        tmp_path / "a name with $ and $ and more than forty-four characters", gain=-0.1
    )
    assert draw(run_dir, other) == 0
    png_size(tmp_path / "compare.png")
    assert not (run_dir / "report.png").exists()
    assert draw(run_dir, other, "--out", tmp_path / "both.png") == 0
    assert png_size(tmp_path / "both.png") == png_size(tmp_path / "compare.png")


def test_plot_of_a_long_and_diverged_run_and_much_text(tmp_path):
    lines = [*step_lines(9000), line("step", "9000/9000", train_loss=math.nan), *final_lines()]
    folder = make_run(tmp_path / "long", lines, count=70_000)
    assert draw(folder) == 0
    assert "without the first 89 steps" in " ".join(shown(folder)[1])


def test_bits_along_the_text_add_up(run_dir):
    run = plot.load(str(run_dir), 0)
    for points in (1, 7, 1000):
        edges, saved = plot.saved_along(run, points)
        total = (saved * np.diff(edges)).sum() / run.bytes
        assert len(saved) == min(points, BLOCKS) and edges[-1] == run.bytes
        assert total == pytest.approx(plot.average(run), rel=1e-12)


def test_nothing_to_draw(tmp_path, capsys):
    folder = make_run(tmp_path / "empty", [], gain=0)
    assert draw(folder) == draw(tmp_path / "nowhere") == 2
    assert capsys.readouterr().err.count("\n") == 2


def seeded(folder, seed, bpb, layers=4):
    """A run of a configuration with another seed and score."""
    lines = [*step_lines(), exact("ngram", bpb, mixer="none")]
    make_run(folder, lines)
    (folder / "config.env").write_text(f"SEED={seed}\nNUM_LAYERS={layers}\n")
    return folder


def test_seeds_of_a_configuration_share_a_colour(tmp_path):
    """The legend has their mean and standard deviation; other settings, and the same seed again,
    have entries of their own."""
    three = [seeded(tmp_path / f"net_{n}", n, bpb) for n, bpb in enumerate((1.5, 1.6, 1.7))]
    deep, again = seeded(tmp_path / "deep", 0, 1.4, layers=6), seeded(tmp_path / "again", 0, 1.8)
    runs = plot.load_all([*map(str, [*three, deep, again])])
    assert [run.colour for run in runs] == [plot.COLOURS[n] for n in (0, 0, 0, 1, 2)]
    assert [run.marker for run in runs] == [plot.MARKERS[n] for n in (0, 0, 0, 1, 2)]
    _, texts = shown(*three, deep, again)
    legend = ["● net_, 3 seeds  1.6000 ± 0.1000", "■ deep  1.4000", "◆ again  1.8000"]
    assert [text for text in texts if text[0] in plot.GLYPHS] == legend


def test_loss_by_step_and_by_time(tmp_path):
    """Each run's curve at its steps and at its seconds."""
    from matplotlib.figure import Figure

    paths = [str(seeded(tmp_path / name, 0, 1.5)) for name in "ab"]
    runs = plot.load_all(paths)
    _, by_step, by_time, *_ = plot.draw(runs, Figure).axes
    for run, line, timed in zip(runs, by_step.lines[::2], by_time.lines[::2], strict=False):
        steps = sorted(run.losses)
        assert line.get_xdata().tolist() == steps
        assert timed.get_xdata().tolist() == [270 * n / 1000 for n in steps]
        assert timed.get_ydata().tolist() == [run.losses[n]["train_loss"] for n in steps]
    assert by_time.get_xlabel() == "seconds of training"


def test_more_configurations_than_colours(run_dir, capsys):
    assert draw(*[run_dir] * 7) == 2
    assert capsys.readouterr().err.startswith("error: 7 configurations: at most 6")


def test_without_matplotlib(run_dir, tmp_path):
    (tmp_path / "matplotlib.py").write_text("raise ModuleNotFoundError('No module matplotlib')")
    command = [sys.executable, ROOT / "records/tools/plot.py", run_dir]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "pip install matplotlib" in done.stderr
    assert not (run_dir / "report.png").exists()


def test_command_line_from_another_directory(run_dir, tmp_path):
    for script, name in (("submission.py", "submission.json"), ("plot.py", "report.png")):
        command = [sys.executable, ROOT / "records/tools" / script, run_dir.name]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, "")
        assert (run_dir / name).exists()
