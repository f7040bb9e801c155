"""stats.py: means over seeds, the test against a record, what may be averaged, the table of all
records."""

import json
import math
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import run_folder
import stats
from helpers import ROOT, train_gpt
from run_folders import ARTIFACT, CONFIG, all_lines, edit, exact, make_run, write_log

LOSSES = {7: 2.70, 42: 2.71, 1337: 2.72}
WIKIPEDIA = (  # Welch's t-test, example 1: t = -2.46, 25.0 degrees of freedom, two-sided p = 0.021
    [27.5, 21.0, 19.0, 23.6, 17.0, 17.9, 16.9, 20.1, 21.9, 22.6, 23.1, 19.6, 19.0, 21.7, 21.4],
    [27.1, 22.0, 20.8, 23.4, 23.4, 23.5, 25.8, 22.0, 24.8, 20.2, 21.9, 22.1, 22.9, 20.5, 24.4],
)


def seed_run(folder, seed, loss, config=CONFIG):
    """A finished run of this seed; its val_bpb is half its val_loss, stage by stage."""
    other = [item for item in all_lines() if item["key"] != "final_ngram_exact"]
    lines = [*other, exact("ngram", loss / 2, mixer="blend"), exact("documents", loss / 2 + 0.1)]
    make_run(folder, lines)
    (folder / "config.env").write_text(config.replace("SEED=7", f"SEED={seed}"))
    (folder / "artifact.bin").write_bytes(ARTIFACT[:-4] + seed.to_bytes(4, "little"))
    run_folder.write(run_folder.RunFolder(folder))
    return folder


@pytest.fixture
def runs(tmp_path):
    return [seed_run(tmp_path / f"seed{seed}", seed, loss) for seed, loss in LOSSES.items()]


def call(capsys, *arguments):
    """-> exit status, standard output, standard error"""
    status = stats.main([str(argument) for argument in arguments])
    return status, *capsys.readouterr()


def report(capsys, *arguments):
    status, out, error = call(capsys, *arguments)
    assert (status, error) == (0, "")
    return out


def refused(capsys, *arguments):
    status, out, error = call(capsys, *arguments)
    assert (status, out) == (2, "") and error.startswith("error: ") and error.count("\n") == 1
    return error


# -----------------------------------------------------------------------------
# Student's distribution and the two tests


@pytest.mark.parametrize(
    "degrees, t", [(1, 31.821), (2, 6.965), (3, 4.541), (5, 3.365), (10, 2.764), (120, 2.358)]
)
def test_printed_table_of_t(degrees, t):
    """The 99 % points of any statistics textbook, to their three decimals"""
    assert stats.upper_tail(t - 5e-4, degrees) >= 0.01 >= stats.upper_tail(t + 5e-4, degrees)


@pytest.mark.parametrize("t", [-40.0, -1.5, 0.0, 0.3, 2.0, 31.8, 1e6])
def test_closed_forms_of_one_and_two_degrees(t):
    tails = math.atan2(1, t) / math.pi, 1 / (2 + t * t + t * math.sqrt(2 + t * t))
    assert stats.upper_tail(t, 1) == pytest.approx(tails[0], rel=1e-9)
    assert stats.upper_tail(t, 2) == pytest.approx(tails[1], rel=1e-9)


@pytest.mark.parametrize("degrees, t", [(1.7, -2.5), (3.9, 0.7), (24.9, 4.0)])
def test_density_integrated(degrees, t):
    """The density (1 + x^2 / n)^(-(n + 1) / 2), summed with x = sqrt(n) tan(a)"""
    edges = np.linspace(-math.pi / 2, math.pi / 2, 2_000_001)
    middles = (edges[1:] + edges[:-1]) / 2
    density = np.cos(middles) ** (degrees - 1)
    expected = density[middles > math.atan(t / math.sqrt(degrees))].sum() / density.sum()
    assert stats.upper_tail(t, degrees) == pytest.approx(expected, rel=1e-4)


def test_no_limit():
    assert (stats.upper_tail(math.inf, 2), stats.upper_tail(-math.inf, 2)) == (0, 1)


def decision(ours, theirs):
    return stats.decide(stats.summarise(ours), stats.summarise(theirs))


def test_one_sample_by_hand():
    """sd 0.01 of 3: t = (0.03 - 0.005) / (0.01 / sqrt 3); two degrees have a closed form"""
    found = decision([2.70, 2.71, 2.72], [2.74])
    t = 0.025 / (0.01 / math.sqrt(3))
    assert found.t == pytest.approx(t) and found.degrees == pytest.approx(2)
    assert found.p == pytest.approx(0.5 - t / 2 / math.sqrt(2 + t * t))
    assert found.gap == pytest.approx(0.03) and found.better is False and "one-sample" in found.test


def test_welch_example():
    t, degrees = stats.t_test(*map(stats.summarise, WIKIPEDIA), 0)
    assert t == pytest.approx(2.46, abs=5e-3)
    assert degrees == pytest.approx(25.0, abs=0.05)
    assert 2 * stats.upper_tail(t, degrees) == pytest.approx(0.021, abs=5e-4)
    assert "Welch" in decision(*WIKIPEDIA).test


@pytest.mark.parametrize("seeds, spreads", [((3, 1), (1, 0)), ((10, 10), (1, 3))])
def test_wrong_one_time_in_a_hundred(seeds, spreads):
    """Where the truth is exactly the margin, 1 % of all sets of seeds pass."""
    rng = np.random.default_rng(5)
    passed = 0
    draws = 3000
    for _ in range(draws):
        ours, theirs = (s * rng.standard_normal(n) for n, s in zip(seeds, spreads, strict=True))
        pair = stats.summarise((ours - 0.005).tolist()), stats.summarise(theirs.tolist())
        passed += stats.upper_tail(*stats.t_test(*pair, 0.005)) < 0.01
    assert 0.007 * draws < passed < 0.014 * draws


def test_one_run_cannot_decide():
    found = decision([2.0], [2.7, 2.71, 2.72])
    assert found.better is None and found.p is None and "one run cannot decide" in found.reason


def test_two_runs_cannot_decide_unless_they_are_very_close():
    found = decision([2.70, 2.71], [2.75])
    assert found.better is None and "two runs cannot decide" in found.reason
    assert decision([2.7000, 2.7001], [2.75]).better is True


def test_runs_without_a_spread_cannot_decide():
    found = decision([2.7, 2.7, 2.7], [2.8])
    assert found.better is None and "standard deviation is 0" in found.reason


def test_a_mean_within_the_margin_is_no_record():
    found = decision([2.70, 2.7001, 2.7002], [2.704])
    assert found.better is False and "0.005 lower" in found.reason
    assert decision([2.70, 2.7001, 2.7002], [2.706]).better is True
    assert decision([2.70, 2.71, 2.72], [2.74]).better is False  # p = 0.025
    assert decision([2.70, 2.71], [2.6]).better is False


# -----------------------------------------------------------------------------
# Runs


def test_statistics_of_each_stage(runs, capsys):
    found = json.loads(report(capsys, *reversed(runs), "--json"))
    losses = [*LOSSES.values()]
    assert found["seeds"] == [*LOSSES] == [run["seed"] for run in found["runs"]]
    assert [run["val_loss"] for run in found["runs"]] == losses
    names = ["int6_roundtrip", "int6_sliding_window", "ngram_backoff", "ngram", "documents"]
    assert [*found["stages"]] == names
    for stage, shift in dict(ngram=0, documents=0.1).items():
        for name, values in dict(val_loss=np.array(losses), val_bpb=np.array(losses) / 2).items():
            values = values + shift * (2 if name == "val_loss" else 1)
            got = found["stages"][stage][name]
            assert got["count"] == 3 and got["mean"] == pytest.approx(values.mean())
            assert got["deviation"] == pytest.approx(values.std(ddof=1))
            assert (got["least"], got["most"]) == pytest.approx((values.min(), values.max()))
    assert "0.28" not in json.dumps(found["stages"])


def test_the_report(runs, capsys):
    text = report(capsys, *runs, "--against", 2.74)
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert len({len(line) for line in tables if " ngram " in line or " stage " in line}) == 1
    (ngram,) = [line.split("|") for line in tables if "| ngram " in line]
    expected = "ngram 3 2.71000 0.01000 2.70000 2.72000 1.35500 0.00500 1.35000 1.36000"
    assert [cell.strip() for cell in ngram[1:-1]] == expected.split()
    assert "3 seeds: 7, 42, 1337" in text and "NOT PROVED" in text and "All within" in text
    assert "pseudo score 0.2800 of scheme pr864 is no code length" in text
    (line,) = [line for line in text.splitlines() if "nats better than 2.74" in line]
    assert (
        ": no;" in line and "t = 4.330, 2 degrees of freedom" in line and "p = 0.0247 not <" in line
    )


def test_one_run_has_no_deviation(runs, capsys):
    text = report(capsys, runs[0], "--against", "2.9")
    assert "CANNOT BE DECIDED" in text and "one run cannot decide" in text and "nan" not in text
    assert json.loads(report(capsys, runs[0], "--json"))["stages"]["ngram"]["val_loss"] == dict(
        count=1, mean=2.70, deviation=None, least=2.70, most=2.70
    )


def other_blocks(folder):
    arrays = dict(np.load(folder / "blocks.npz"))
    arrays["bytes"][:2] += [1, -1]  # as many bytes in all
    np.savez(folder / "blocks.npz", **arrays)


MIXES = {  # what is done to one of three runs -> what the refusal names
  "code": (lambda f: (f / "train_gpt.py").write_bytes(b"print(1)"), "train_gpt.py"),
  "setting": (lambda f: edit(f / "config.env", "MODEL_DIM=128", "MODEL_DIM=64"), "MODEL_DIM is"),
  "dropped": (lambda f: edit(f / "config.env", "MODEL_DIM=128\n", ""), "MODEL_DIM is 128 in"),
  "seed": (lambda f: edit(f / "config.env", "SEED=42", "SEED=7"), "SEED is 7 in"),
  "copy": (lambda f: (f / "artifact.bin").write_bytes(
    (f.parent / "seed7/artifact.bin").read_bytes()), "sha256 of artifact.bin is"),
  "tokenizer": (lambda f: (f / "tokenizer.model").write_bytes(b"b"), "tokenizer.model is"),
  "tokens": (lambda f: edit(f / "metrics.jsonl", '"tokens": 40960', '"tokens": 9'), "9 tokens of"),
  "blocks": (other_blocks, "validation text"),
}  # fmt: skip


@pytest.mark.parametrize("name", MIXES)
def test_runs_that_differ_are_not_averaged(name, runs, capsys):
    change, words = MIXES[name]
    change(runs[1])
    error = refused(capsys, *runs)
    assert words in error and str(runs[0]) in error and str(runs[1]) in error
    text = report(capsys, *runs, "--mixed")
    assert words in text and "Mixed: " in text


def test_what_differs_is_said_once(runs, capsys):
    edit(runs[1] / "config.env", "MODEL_DIM=128", "MODEL_DIM=64")
    there = f"MODEL_DIM is 128 in {runs[0]} and {runs[2]}, 64 in {runs[1]};"
    assert there in refused(capsys, *runs)


def test_settings_without_a_result_may_differ(runs, capsys):
    with open(runs[0] / "config.env", "a") as file:
        file.write("RESUME=auto\nCHECKPOINT_EVERY=10m\nOVERWRITE=1\n")
    assert "Mixed" not in report(capsys, *runs)


def test_other_hardware_is_said(runs, capsys):
    assert "Different" not in report(capsys, *runs)
    edit(runs[2] / "metrics.jsonl", "1 x cpu x86_64", "8 x NVIDIA H100")
    assert "Different hardware: 1 x cpu x86_64, 8 x NVIDIA H100." in report(capsys, *runs)


@pytest.mark.parametrize("name", ["metrics.jsonl", "blocks.npz", "artifact.bin", "config.env"])
def test_incomplete_runs_are_refused(name, runs, capsys):
    (runs[1] / name).unlink()
    error = refused(capsys, *runs)
    assert str(runs[1]) in error and name in error


def test_a_stage_without_a_number_is_refused(runs, capsys):
    write_log(runs[0], [*all_lines(), exact("int6_roundtrip", math.nan)])
    assert "final_int6_roundtrip_exact has val_loss:nan" in refused(capsys, *runs)


# -----------------------------------------------------------------------------
# Caps


def budget(runs, capsys, **seconds):
    """The report where the first run took so long"""
    for name, value in seconds.items():
        before = dict(train_seconds=162.3, eval_seconds=21.5)[name]
        edit(runs[0] / "metrics.jsonl", f'"{name}": {before}', f'"{name}": {value}')
    return report(capsys, *runs)


def test_over_the_cap_of_bytes(runs, capsys, monkeypatch):
    total = stats.load(runs[0]).claims["bytes_total"]
    monkeypatch.setattr(train_gpt, "CAP_BYTES", total)
    assert "OVER" not in report(capsys, *runs)
    monkeypatch.setattr(train_gpt, "CAP_BYTES", total - 1)
    assert report(capsys, *runs).count("OVER A CAP") == 3


@pytest.mark.parametrize("name", ["train_seconds", "eval_seconds"])
def test_over_the_cap_of_seconds(name, runs, capsys):
    text = budget(runs, capsys, **{name: 601.1})
    assert f"OVER A CAP: {runs[0]}: {name} 601.1, the cap is 600." in text


def test_the_last_step_ends_after_the_clock(runs, capsys):
    """A step of 270.5 ms began before 600 s."""
    assert "OVER" not in budget(runs, capsys, train_seconds=600.2)


# -----------------------------------------------------------------------------
# Verification


def kept(folder, verdict="PROVED", why="not checked: nothing"):
    result = dict(verdict=verdict, why=why, text="a text", sha256=stats.marks(folder))
    text = json.dumps(result)
    (folder / "verify.json").write_text(text)


def state(folder):
    (run,) = stats.with_verification([stats.load(folder)], make=False)
    return run.verification


def test_kept_results_are_of_these_files(runs, capsys):
    assert state(runs[0]) == "not verified"
    for run in runs:
        kept(run)
    assert state(runs[0]) == "verify.json: PROVED on a text"
    assert f"NOT PROVED here: {runs[0]}, {runs[1]}" in report(capsys, *runs)
    kept(runs[1], "FAILED", "failed: \x1b[2Kdecode")
    assert state(runs[1]) == "verify.json: FAILED (failed: \\x1b[2Kdecode)"
    (runs[0] / "stream.bin").write_bytes(b"new")
    assert state(runs[0]) == "not verified: verify.json is of other files"
    (runs[0] / "verify.json").write_text("{")
    assert state(runs[0]) == "not verified: verify.json is unreadable"
    for text in (
        "[" * 100_000,
        '{"verdict": "PROVED", "verdict": "FAILED"}',
        '{"verdict": "Fine"}',
    ):
        (runs[0] / "verify.json").write_text(text)
        assert state(runs[0]) == "not verified: verify.json is unreadable"
    (runs[0] / "verify.json").unlink()
    os.mkfifo(runs[0] / "verify.json")
    assert state(runs[0]) == "not verified: verify.json is unreadable"


def test_a_partial_file_is_no_link_to_follow(runs, tmp_path, capsys, monkeypatch):
    """Every name that a writer could take for its unfinished file leads elsewhere."""
    other = tmp_path / "other"
    other.write_text("mine")
    for name in (".verify.json.partial", ".partial_verify.json", "verify.json"):
        (runs[0] / name).symlink_to(other)
    train_gpt.write_atomically(runs[0] / "verify.json", b"{}")
    assert other.read_text() == "mine" and not (runs[0] / "verify.json").is_symlink()


def test_verify_keeps_what_verify_says(runs, capsys, tmp_path, monkeypatch):
    """An invented verify.py; test_submit.py has the real one."""
    monkeypatch.setattr(stats, "RECORDS", tmp_path)
    script = "import json, sys; print(json.dumps(dict(verdict='FAILED', why='failed: code')))"
    program = tmp_path / "tools/verify.py"
    program.parent.mkdir()
    program.write_text(script + "; sys.exit(1)")
    status, text, error = call(capsys, *runs, "--verify")
    assert (status, error.count("verifying")) == (0, 3)
    assert text.count("FAILED (failed: code)") == 3 and "verify.json:" not in text
    assert "verify.json: FAILED (failed: code)" in report(capsys, *runs)
    program.write_text("import sys; sys.exit('error: no such thing')")
    status, _, error = call(capsys, *runs, "--verify")
    assert status == 2 and "no such thing" in error and "Traceback" not in error


def says(tmp_path, monkeypatch, **result):
    """An invented verify.py, which says this of every folder"""
    monkeypatch.setattr(stats, "RECORDS", tmp_path)
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools/verify.py").write_text(f"import json; print(json.dumps({result!r}))")


def test_what_was_verified_is_what_was_read(runs, capsys, tmp_path, monkeypatch):
    """A folder that is swapped for an honest one while the first is verified (once PROVED)."""
    score = stats.load(runs[0]).claims["val_bpb"]
    said = dict(verdict="PROVED", text="a text", why="", val_bpb=score)
    says(tmp_path, monkeypatch, **said)
    assert "PROVED on a text" in call(capsys, runs[0], "--verify")[1]
    (tmp_path / "tools/verify.py").write_text(f"print({json.dumps(said | dict(val_bpb=1.0))!r})")
    status, _, error = call(capsys, runs[0], "--verify")
    assert status == 2 and "changed since it was read" in error
    program = f"open({str(runs[0] / 'log.txt')!r}, 'a').write('more'); print({json.dumps(said)!r})"
    (tmp_path / "tools/verify.py").write_text(program)
    status, _, error = call(capsys, runs[0], "--verify")
    assert status == 2 and "changed since it was read" in error


def test_a_run_is_no_second_seed_of_itself(runs, capsys):
    """Its artifact packed otherwise, its stream signed anew: the coder's words are the same."""
    words = b"0123" * 9
    names = train_gpt.SCORING
    for run in runs[:2]:
        header = dict(shape=[1, 5, 1, 1, 5, 8], made=dict(device="cpu", threads=1), text="")
        scoring = {n: train_gpt.show(train_gpt.VARIABLES[n.upper()].default) for n in names}
        sealed = train_gpt.seal(train_gpt.STREAM_PREFIX, header | dict(scoring=scoring), words)
        (run / "stream.bin").write_bytes(sealed)
    status, _, error = call(capsys, *runs[:2])
    assert status == 2 and "stream.bin's words" in error


def test_a_claim_does_not_excuse_itself(runs, capsys):
    """A mean step of a million seconds once made room for any time of training."""
    edit(runs[0] / "metrics.jsonl", '"step_avg_ms": 270.5', '"step_avg_ms": 1e12')
    with open(runs[0] / "metrics.jsonl", "a") as file:
        file.write('{"key": "stopping_early: wallclock_cap", "value": null}\n')
    assert "OVER" in budget(runs, capsys, train_seconds=1000.0)


@pytest.mark.parametrize("value", ['"x"', "1e999", "[1]"])
@pytest.mark.parametrize("name", ["pseudo_bpb", "step_avg_ms", "eval_seconds"])
def test_numbers_that_are_none_end_in_a_line(name, value, runs, capsys):
    path = runs[0] / "metrics.jsonl"
    path.write_text(re.sub(rf'"{name}": [\d.]+', f'"{name}": {value}', path.read_text()))
    status, _, error = call(capsys, runs[0])
    assert status == 0 or (status == 2 and error.count("\n") == 1)


# -----------------------------------------------------------------------------
# The record to beat


def test_records_with_seeds(runs, capsys, tmp_path):
    """A record's submission.json, and the run folders that it is of, are the same baseline."""
    better = [seed_run(tmp_path / f"b{s}", s, loss - 0.1) for s, loss in LOSSES.items()]
    seeds = {str(s): dict(val_loss=loss) for s, loss in LOSSES.items()}
    (tmp_path / "record").mkdir()
    (tmp_path / "record/submission.json").write_text(json.dumps(dict(seed_results=seeds)))
    file = report(capsys, *better, "--json", "--against", tmp_path / "record/submission.json")
    found = json.loads(file)["against"]
    assert found["losses"] == [*LOSSES.values()] and found["better"] is True
    assert "Welch" in found["test"] and found["gap"] == pytest.approx(0.1)
    assert found["degrees"] == pytest.approx(4)  # equal spreads, 3 and 3
    for given in ([tmp_path / "record"], runs):
        again = json.loads(report(capsys, *better, "--json", "--against", *given))["against"]
        assert {**again, "name": ""} == {**found, "name": ""}


def test_a_record_of_one_seed_is_taken_as_exact(runs, capsys):
    text = report(capsys, *runs[1:], "--against", runs[0])
    assert "taken as exact" in text and "higher" in text and ": no;" in text


@pytest.mark.parametrize(
    "claims, words",
    [
        ("{", "damaged"),
        ("[]", "damaged"),
        ('{"val_bpb": 1.1}', "val_loss is None"),
        ('{"seed_results": {"5": {"val_bpb": 1.1}}}', "seed 5: val_loss is None"),
        ('{"val_loss": 2.7, "tokens": 5, "bytes": 6}', "its text has 5 tokens, not 40960"),
        (
            '{"val_loss": 2.7, "sha256": {"tokenizer": "x"}}',
            "its text has x as the tokenizer's sha256, not",
        ),
    ],
)
def test_what_is_no_record_is_refused(claims, words, runs, capsys, tmp_path):
    (tmp_path / "submission.json").write_text(claims)
    error = refused(capsys, *runs, "--against", tmp_path)
    assert words in error and str(tmp_path) in error
    if "not" in words and "5 tokens" in words:
        assert "2.7" in report(capsys, *runs, "--against", tmp_path, "--mixed")


@pytest.mark.parametrize("given", [["nan"], ["0"], ["2.7", "2.8"], ["nowhere"]])
def test_what_is_no_number_is_refused(given, runs, capsys):
    assert f"--against {given[0]}" in refused(capsys, *runs, "--against", *given)


def test_a_seed_twice_in_the_record(runs, capsys, tmp_path):
    other = seed_run(tmp_path / "other", 7, 2.5)
    assert "seed 7 is there twice" in refused(capsys, runs[0], "--against", runs[0], other)


# -----------------------------------------------------------------------------
# The table of all records


def test_the_committed_table_is_what_the_command_makes():
    text = (stats.RECORDS / "README.md").read_text(encoding="utf-8")
    assert stats.with_table(text) == text, "fix: python records/tools/stats.py --table"


def test_the_table(tmp_path, capsys, monkeypatch):
    def add(folder, title, **files):
        (tmp_path / folder).mkdir(parents=True)
        for name, text in ({"README.md": f"# {title}\n\nmore"} | files).items():
            (tmp_path / folder / name).write_text(text)

    seeds = {str(s): dict(val_bpb=loss / 2) for s, loss in LOSSES.items()}
    claims = dict(val_bpb=1.355, seed_results=seeds, bytes_total=15_900_000)
    add("track_a/three", "Three", **{"submission.json": json.dumps(claims)})
    claims = dict(val_bpb=1.35, seed_results={"7": seeds["7"]}, bytes_total=7)
    add("track_b/one", "one: a run", **{"submission.json": json.dumps(claims), "config.env": ""})
    add("track_b/one/seed_7", "no record")
    add("track_b/planned", "Planned", **{"config.env": ""})
    add("track_b/bench", "Bench")
    (tmp_path / "README.md").write_text(f"before\n{stats.BEGIN}\nold\n{stats.END}\nafter\n")
    monkeypatch.setattr(stats, "RECORDS", tmp_path)
    assert stats.write_table(tmp_path) == tmp_path / "README.md"
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert text.startswith(f"before\n{stats.BEGIN}\n\n| ") and text.endswith(
        f"|\n\n{stats.END}\nafter\n"
    )
    rows = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("| [")]
    assert [[cell.strip() for cell in row] for row in rows] == [
        ["[three](track_a/three)", "Three", "3", "1.3550 ± 0.0050", "15,900,000"],
        ["[bench](track_b/bench)", "Bench", "", "", ""],
        ["[one](track_b/one)", "a run", "1", "1.3500", "7"],
        ["[planned](track_b/planned)", "Planned", "", "not yet run", ""],
    ]
    assert stats.with_table(text, tmp_path) == text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "track_a", "track_b"]


def test_a_readme_without_markers_is_left(tmp_path):
    (tmp_path / "README.md").write_text(f"{stats.END} {stats.BEGIN}")
    with pytest.raises(stats.RunError, match="markers"):
        stats.write_table(tmp_path)
    assert (tmp_path / "README.md").read_text() == f"{stats.END} {stats.BEGIN}"


def test_command_line_from_another_directory(runs, tmp_path):
    command = [sys.executable, ROOT / "records/tools/stats.py", *(run.name for run in runs)]
    how = dict(cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
    done = subprocess.run(command, **how)
    assert (done.returncode, done.stderr) == (0, "") and "| ngram" in done.stdout
    shutil.rmtree(runs[1])
    done = subprocess.run(command, **how)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and runs[1].name in done.stderr


@pytest.mark.parametrize("given", [[], ["--table", "somewhere"]])
def test_runs_or_the_table(given):
    with pytest.raises(SystemExit) as stopped:
        stats.main(given)
    assert stopped.value.code == 2


def test_altered_text_and_shared_documents_are_remarked(runs, capsys):
    assert "LOSSY" not in report(capsys, *runs) and "training shards" not in report(capsys, *runs)
    for run in runs:
        spelt = json.loads((run / "submission.json").read_text())["bytes"]
        edit(run / "metrics.jsonl", f'"bytes": {spelt}', f'"bytes": 900, "spelt_bytes": {spelt}')
        edit(run / "metrics.jsonl", '"spelt_bytes"', '"lossy": 1, "spelt_bytes"')
        with open(run / "metrics.jsonl", "a") as file:
            file.write('{"key": "overlap", "value": null, "documents": 3}\n')
    text = report(capsys, *runs)
    words = f"it alters text; its tokens spell {spelt:,} bytes, val_bpb is over 900."
    assert text.count(f"LOSSY TOKENIZER: {runs[0]}: {words}") == 1
    assert text.count("3 validation documents are in its training shards.") == 3
    status, out, _ = call(capsys, *runs, "--json")
    assert status == 0
    assert [run["lossy"] for run in json.loads(out)["runs"]] == [True] * 3
    assert [run["overlap_documents"] for run in json.loads(out)["runs"]] == [3] * 3
