"""plot.py: a picture of one run or of several, of whatever they have."""

import math
import os
import signal
import subprocess
import sys

import numpy as np
import plot
import pytest
from helpers import ROOT
from run_folders import (
    ARTIFACT,
    BLOCKS,
    CODE,
    all_lines,
    exact,
    final_lines,
    line,
    make_run,
    step_lines,
)


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
    runs = plot.load_all([*map(str, folders)])
    page, *panels = plot.draw(runs).axes
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
    assert any(f"{len(CODE) // 3 + len(ARTIFACT):,} of 16,000,000 bytes" in text for text in texts)
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
    run = plot.load(str(run_dir))
    for points in (1, 7, 1000):
        edges, saved = plot.saved_along(run, points)
        total = (saved * np.diff(edges)).sum() / run.bytes
        assert len(saved) == min(points, BLOCKS) and edges[-1] == run.bytes
        assert total == pytest.approx(run.saved.sum() / run.bytes, rel=1e-12)


PICTURES = {"png": b"\x89PNG\r\n", "pdf": b"%PDF-", "svg": b"<?xml"}


@pytest.mark.parametrize("name", ["x.png", "x.PNG", "x.pdf", "x.svg", "a.b.Svg"])
def test_the_suffix_decides(run_dir, tmp_path, name):
    """And again the same bytes."""
    pictures = []
    for _ in range(2):
        assert draw(run_dir, "--out", tmp_path / name) == 0
        pictures.append((tmp_path / name).read_bytes())
    assert pictures[0] == pictures[1]
    assert pictures[0].startswith(PICTURES[name.rpartition(".")[2].lower()])


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("x.jpg", "x.jpg: no picture's name; fix: .png, .pdf, .svg"),
        ("x", "x: no picture's name"),
        (".png", ".png: no picture's name"),
        ("", "no picture's name"),
        ("none/x.png", "there is no folder none; fix: mkdir -p none"),
        ("given/config.env/x.png", "there is no folder given/config.env"),
        ("folder.png", "folder.png: is there and no file"),
        ("fifo.png", "fifo.png: is there and no file"),
    ],
)
def test_out_that_cannot_be(run_dir, tmp_path, name, told, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "fifo.png")
    before = sorted(tmp_path.rglob("*"))
    assert draw(run_dir, "--out", name) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("error: --out ") and told in err
    assert sorted(tmp_path.rglob("*")) == before


def test_out_that_is_a_link_is_replaced_not_followed(run_dir, tmp_path):
    (tmp_path / "mine").write_bytes(b"mine")
    (tmp_path / "x.png").symlink_to("mine")
    assert draw(run_dir, "--out", tmp_path / "x.png") == 0
    png_size(tmp_path / "x.png")
    assert (tmp_path / "mine").read_bytes() == b"mine"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("late", [False, True])
def test_a_signal_is_one_line_and_keeps_the_old_picture(run_dir, number, late, monkeypatch):
    """While it loads torch; and while it draws."""
    (run_dir / "report.png").write_bytes(b"old")
    if late:
        (run_dir.parent / "late.py").write_text(DRAWS_FOR_EVER)
        monkeypatch.setenv("PYTHONPATH", str(ROOT / "records/tools"))
        command = [sys.executable, "late.py", run_dir]
    else:
        command = [sys.executable, "-v", ROOT / "records/tools/plot.py", run_dir]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    running = subprocess.Popen(command, cwd=run_dir.parent, **pipes)
    next(line for line in running.stderr if "drawing" in line or "import 'torch" in line)
    running.send_signal(number)
    out, err = running.communicate(timeout=60)
    assert (running.returncode, out) == (128 + number, "") and "Traceback" not in err
    last = "interrupted; no picture is written" if late else "interrupted"
    assert err.splitlines()[-1] == last
    assert (run_dir / "report.png").read_bytes() == b"old" and not [*run_dir.glob(".*")]


DRAWS_FOR_EVER = """
import sys, time, plot, endings
def draw(runs):
    print("drawing", file=sys.stderr, flush=True)
    time.sleep(60)
plot.draw = draw
sys.exit(endings.run(plot.main, "no picture is written"))
"""


def test_nobody_reads_what_it_says(run_dir):
    command = [sys.executable, ROOT / "records/tools/plot.py", run_dir]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    running = subprocess.Popen(command, **pipes)
    running.stdout.close()
    running.stdout = None
    assert running.communicate(timeout=60)[1] == "" and running.returncode == 0
    png_size(run_dir / "report.png")


def test_names_in_another_encoding(tmp_path):
    make_run(tmp_path / "é")
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    command = [sys.executable, ROOT / "records/tools/plot.py", "é"]
    how = dict(cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    done = subprocess.run(command, **how)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "wrote \\xe9/report.png\n"


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
    deep = seeded(tmp_path / "deep", 0, 1.4, layers=6)
    again = seeded(tmp_path / "again", 0, 1.8)
    runs = plot.load_all([*map(str, [*three, deep, again])])
    assert [run.colour for run in runs] == [plot.COLOURS[n] for n in (0, 0, 0, 1, 2)]
    assert [run.marker for run in runs] == [plot.MARKERS[n] for n in (0, 0, 0, 1, 2)]
    _, texts = shown(*three, deep, again)
    assert [text for text in texts if text in {*plot.GLYPHS}] == ["●", "■", "◆"]
    legend = {"net_, 3 seeds  1.6000 ± 0.1000", "deep  1.4000", "again  1.8000"}
    assert legend < {*texts} and "3 of 3 unfinished" in texts


def test_loss_by_step_and_by_time(tmp_path):
    """Each run's curve at its steps and at its seconds."""
    paths = [str(seeded(tmp_path / name, 0, 1.5)) for name in "ab"]
    runs = plot.load_all(paths)
    _, by_step, by_time, *_ = plot.draw(runs).axes
    for run, curve, timed in zip(runs, by_step.lines[::3], by_time.lines[::3], strict=False):
        steps = sorted(run.losses)
        assert curve.get_xdata().tolist() == steps
        assert timed.get_xdata().tolist() == [270 * n / 1000 for n in steps]
        assert timed.get_ydata().tolist() == [run.losses[n]["train_loss"] for n in steps]
        assert curve.get_alpha() == timed.get_alpha() < 0.5  # as logged: faint behind the trend
    for run, trend in zip(runs, by_time.lines[1::3], strict=True):
        indices, smoothed = plot.smooth(
            [*run.losses], [x["train_loss"] for x in run.losses.values()]
        )
        times = [line["train_time_ms"] / 1000 for line in run.losses.values()]
        assert trend.get_xdata().tolist() == [times[index] for index in indices]
        assert trend.get_ydata().tolist() == smoothed.tolist()
    assert by_time.get_xlabel() == "seconds of training"


def test_a_line_is_its_own_trend_and_noise_is_not():
    """At any spacing of the steps, to the first and last of them; at most so many points."""
    steps = np.array([*range(1, 11), *range(20, 5000, 10)])
    line = 5 - steps / 4000
    indices, trend = plot.smooth(steps, line)
    assert indices.tolist() == [*range(len(steps))]
    assert trend == pytest.approx(line, abs=1e-12)
    noise = np.random.default_rng(1).normal(0, 0.1, len(steps))
    _, trend = plot.smooth(steps, line + noise)
    assert np.abs(trend - line)[100:].mean() < 0.2 * np.abs(noise)[100:].mean()
    many = np.arange(1, 30_001)
    indices, trend = plot.smooth(many, 1 / many)
    assert len(indices) == len(trend) == plot.TREND_POINTS
    assert indices[0] == 0 and indices[-1] == len(many) - 1
    assert plot.smooth([7], [2.5])[1].tolist() == [2.5]


def validated_lines(rate=True):
    """Training with a validation each 100 steps, a diverged one last, and a warm-up of rates."""
    for item in step_lines():
        if "train_loss" in item and rate:
            item["lr"] = min(1, int(item["value"].partition("/")[0]) / 100)
        if "val_loss" not in item:
            yield item
    for step in (200, 100, 400):
        yield line("step", f"{step}/600", val_loss=4 - step / 400, val_bpb=1.9)
    yield line("step", "600/600", val_loss=math.nan, val_bpb=math.nan)


def loss_panel(*folders):
    _, panel, *_ = plot.draw(plot.load_all([*map(str, folders)])).axes
    return panel


def test_validation_curve(tmp_path):
    """In the order of the steps, within the panel, its last value beside it."""
    folder = make_run(tmp_path / "run", list(validated_lines()), gain=0)
    panel = loss_panel(folder)
    (curve,) = [
        found for found in panel.lines if found.get_marker() == "o" and len(found.get_xdata()) > 1
    ]
    assert list(curve.get_xdata()) == [100, 200, 400]
    assert list(curve.get_ydata()) == [3.75, 3.5, 3.0]
    low, high = panel.get_ylim()
    assert low < 3.0 and high > 3.75
    texts = [text.get_text() for text in panel.texts]
    assert "3.000" in texts and "late QAT from step 550" in texts
    page = shown(folder)[1]
    assert any("circles: validation" in text for text in page)


def test_learning_rate_lies_below_the_losses(tmp_path):
    """Where the log has it, and without axes of its own."""
    folder = make_run(tmp_path / "run", list(validated_lines()), gain=0)
    panel = loss_panel(folder)
    assert "learning rate" in [text.get_text() for text in panel.texts]
    (curve,) = [
        found
        for found in panel.lines
        if found.get_transform() != panel.transData and len(found.get_xdata()) > 2
    ]
    heights = curve.get_ydata()  # of 1
    assert heights.max() < 0.2
    assert heights[0] == pytest.approx(heights.max() / 100)
    low, high = panel.get_ylim()
    least = min(n["train_loss"] for n in plot.load(str(folder)).losses.values())
    assert low + heights.max() * (high - low) < least
    without = make_run(tmp_path / "without", list(validated_lines(rate=False)), gain=0)
    assert "learning rate" not in [text.get_text() for text in loss_panel(without).texts]


def overlapping(panel):
    """Pairs of a panel's texts that lie on each other."""
    boxes = [(text.get_text(), text.get_window_extent()) for text in panel.texts if text.get_text()]
    pairs = [(a, b) for n, a in enumerate(boxes) for b in boxes[:n]]
    return [(a[0], b[0]) for a, b in pairs if a[1].overlaps(b[1])]


def test_last_values_do_not_lie_on_each_other(tmp_path):
    """Though training and validation end at the same loss"""
    lines = [*step_lines(), line("step", "600/600", val_loss=3 + 4 * 600**-0.4, val_bpb=1.9)]
    panel = loss_panel(make_run(tmp_path / "run", lines, gain=0))
    assert len(panel.texts) == 3 and not overlapping(panel)


LONG_NAME = "a_name_of_a_run_that_is_much_longer_than_what_the_page_has_room_for_{}"


def described(folder, settings, last=300, lines=()):
    """A run of which a line `config` tells, and its parameters; unfinished without more lines"""
    text = line("config", RECORD="tiny(default)", RUN_ID="x(env)", OVERWRITE="1(env)", **settings)
    steps = [
        item for item in step_lines() if int(str(item["value"] or 1).partition("/")[0]) <= last
    ]
    text = [text, line("model_params", 829_868), *steps, *lines]
    return make_run(folder, text, gain=0)


def test_settings_parameters_and_date(tmp_path):
    """Those that the environment gave, but where the run lies; its date is submission.json's."""
    settings = dict(SEED="7(env)", NUM_LAYERS="4(RECORD=tiny)", MODEL_DIM="64(env)", EMA="(env)")
    folder = described(tmp_path / "run", settings, 600, final_lines())
    (folder / "submission.json").write_text('{"date": "2026-11-23T00:07:04Z"}')
    texts = shown(folder)[1]
    assert "829,868 parameters   ·   2026-11-23   ·   SEED=7  MODEL_DIM=64  EMA=" in texts
    (folder / "submission.json").unlink()
    os.utime(folder / "metrics.jsonl", (10**9, 10**9))
    assert any("2001-09-09" in text for text in shown(folder)[1])
    assert "No submission.json: nothing marks this run as finished." in shown(folder)[1]
    (folder / "submission.json").write_text('{"date": "soon"}')
    assert any("2001-09-09" in text for text in shown(folder)[1])


def on_page(*folders):
    """The page of a picture; all of its texts lie within it, and none on another."""
    page = plot.draw(plot.load_all([*map(str, folders)])).axes[0]
    for text in page.texts:
        box = text.get_window_extent()
        assert box.x0 > 0 and box.x1 < page.bbox.x1 and box.y0 > 0 and box.y1 < page.bbox.y1, text
    assert not overlapping(page)
    return [text.get_text() for text in page.texts]


def test_many_settings_and_a_long_name_have_room(tmp_path):
    settings = {f"A_LONG_NAME_OF_A_SETTING_{n}": "0.123456789," * 9 + "(env)" for n in range(40)}
    over = line("final_budget", train_seconds=1e5, eval_seconds=1e5)
    folder = described(tmp_path / LONG_NAME, settings, 600, [exact("ngram", 1.7), over])
    texts = on_page(folder)
    assert any("A_LONG_NAME_OF_A_SETTING_0=" in text and "more settings" in text for text in texts)
    assert "unfinished, step 600 of 600, over a cap" in texts
    folders = [folder]
    for number in range(5):
        own = {**settings, "SEED": f"{number}(env)"}
        folders.append(described(tmp_path / LONG_NAME.format(number), own, 300))
    texts = on_page(*folders)
    assert "unfinished, step 300 of 600" in texts and "SEED=3" in texts
    assert "unfinished, step 600 of 600, over a cap" in texts


def test_unfinished_runs_say_so(tmp_path, run_dir):
    """Whatever final line is missing; not a whole one."""
    assert not any("unfinished" in text for text in on_page(run_dir))
    folder = described(tmp_path / "begun", {}, last=250)
    assert "unfinished, step 250 of 600" in on_page(folder)
    assert "unfinished, step 250 of 600" in on_page(folder, run_dir)
    scored = [*step_lines(), *(item for item in final_lines() if item["key"] != "final_budget")]
    assert "unfinished, step 600 of 600" in on_page(make_run(tmp_path / "scored", scored))
    evaluated = [item for item in final_lines() if item["key"] != "final_budget"]
    assert "unfinished" in on_page(make_run(tmp_path / "evaluated", evaluated))


@pytest.mark.parametrize(
    ("key", "values", "told"),
    [
        ("final_artifact_bytes", dict(packed=90_000, weights=15_910_001), "bytes 16,000,001, the"),
        ("final_budget", dict(train_seconds=602.5, eval_seconds=9), "train_seconds 602.5, the"),
        ("final_budget", dict(train_seconds=600.5, eval_seconds=601), "eval_seconds 601, the"),
    ],
)
def test_runs_over_a_cap_say_so(run_dir, tmp_path, key, values, told):
    before = on_page(run_dir)
    assert "over a cap" not in before and not any("OVER A CAP" in text for text in before)
    values = dict(values, total=values.get("packed", 0) + values.get("weights", 0))
    other = make_run(tmp_path / "other", [*all_lines(), line(key, **values)])
    for prefix, folders in (("", [other]), ("other: ", [run_dir, other])):
        texts = on_page(*folders)
        assert "over a cap" in texts
        notes = [text for text in texts if "OVER A CAP" in text]
        assert len(notes) == 1 and notes[0].startswith(f"{prefix}OVER A CAP") and told in notes[0]


def test_runs_on_different_texts_are_refused(run_dir, tmp_path, capsys):
    """By the length that the log says, and by the bytes of the blocks; nothing is written."""
    longer = [dict(x, bytes=9) if x["key"] == "val_text" else x for x in all_lines()]
    begun = longer[: longer.index(next(x for x in longer if x["key"] == "step")) + 5]
    others = [make_run(tmp_path / "longer", longer), make_run(tmp_path / "begun", begun)]
    (others[1] / "blocks.npz").unlink()
    others.append(make_run(tmp_path / "shifted"))
    columns = dict(np.load(others[2] / "blocks.npz"))
    columns["bytes"] = columns["bytes"] + np.resize([1, -1], BLOCKS)
    np.savez(others[2] / "blocks.npz", **columns)
    for other in others:
        assert draw(run_dir, other) == 2
        out, err = capsys.readouterr()
        assert (
            out == "" and err.count("\n") == 1 and err.startswith("error: the validation text is ")
        )
        assert f" in {run_dir}, " in err and f" in {other}; fix: leave one out" in err
    assert not (tmp_path / "compare.png").exists()


def test_an_unfinished_run_lies_over_a_scored_one_of_its_text(run_dir, tmp_path):
    lines = [x for x in all_lines() if not x["key"].startswith(("final_", "ngram_"))]
    begun = make_run(tmp_path / "begun", lines)
    (begun / "blocks.npz").unlink()
    assert draw(run_dir, begun) == 0


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
    command = [sys.executable, ROOT / "records/tools/plot.py", run_dir.name]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert (run_dir / "report.png").exists()
