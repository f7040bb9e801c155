"""experiments.py race: who runs beside whom, what is judged how, what is kept."""

import json
import math
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import experiments
import pytest
from experiments import Judged, judge
from helpers import ROOT, train_gpt

# Stands in for both scripts: what train_gpt.py would write, by its own numbers.
FAKE = """
import json, os, sys, time
from pathlib import Path

began = time.time()
seed = int(os.environ["SEED"])
time.sleep(0.3)
lines = [
    dict(key="val_text", tokens=TOKENS, bytes=203285),
    dict(key="step", value=f"{STEPS + seed % VARYING}/9999", step_avg_ms=100.0),
    dict(key="final_ngram_exact", val_bpb=BPB + seed / 1e6 * BPB),
    dict(key="final_codec", decoded="ok", proved_tokens=99, total_tokens=99),
    dict(key="final_artifact_bytes", weights=1, total=BYTES),
    dict(key="final_budget", train_seconds=SECONDS, eval_seconds=9),
    dict(key="peak_memory_mb", value=800),
]
if seed == int(os.environ.get("FAKE_FAILS", 0)):
    sys.exit("error: as it was told")
folder = Path("runs") / os.environ["RUN_ID"]
folder.mkdir(parents=True)
(folder / "config.env").write_text("MAX_WALLCLOCK_SECONDS=CAP\\n")
(folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in lines))
call = dict(script=__file__, seed=seed, cores=sorted(os.sched_getaffinity(0)))
call |= dict(began=began, ended=time.time(), record=os.environ["RECORD"])
call |= dict(extra=os.environ.get("MATRIX_LR"))
with open(os.environ["FAKE_LOG"], "ab", buffering=0) as log:
    log.write(json.dumps(call).encode() + b"\\n")
"""


def fake_script(folder, **numbers):
    """A checkout with a script that comes to these numbers."""
    code = FAKE
    usual = dict(BPB=1.6, SECONDS=100.0, BYTES=7, TOKENS=9, STEPS=800, VARYING=1, CAP=0)
    for name, value in (usual | numbers).items():
        code = re.sub(rf"\b{name}\b", repr(value), code)
    config = folder / "records/track_cpu/tiny/config.env"
    config.parent.mkdir(parents=True)
    config.write_text("ITERATIONS=800\n")
    (folder / "train_gpt.py").write_text(code)
    return folder / "train_gpt.py"


@pytest.fixture
def racers(tmp_path, monkeypatch):
    """-> function that puts both in their places; function that lists the calls so far."""
    if len(experiments.my_cores()) < 2:
        pytest.skip("a race needs two cores")
    log = tmp_path / "calls.jsonl"
    monkeypatch.setenv("FAKE_LOG", str(log))
    record = fake_script(tmp_path / "old")
    monkeypatch.setattr(experiments, "checked_out", lambda *_: record)
    monkeypatch.setattr(experiments, "last_record", lambda: "0123abc")
    monkeypatch.setattr(experiments, "embedded_text", lambda: tmp_path / "text")
    monkeypatch.setattr(experiments, "commit", lambda: "commit 4567def")

    def place(**numbers):
        script = fake_script(tmp_path / f"new_{time.time_ns()}", **numbers)
        monkeypatch.setattr(experiments, "SCRIPT", script)
        monkeypatch.setattr(experiments, "CODE", {script: script.read_bytes()})

    def calls():
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    return place, calls


def raced(tmp_path, *arguments):
    return experiments.main(["race", "--out", str(tmp_path / "race"), *arguments])


def results(tmp_path):
    return json.loads((tmp_path / "race/results.json").read_text())


def test_pairs_run_side_by_side_on_cores_that_they_swap(racers, tmp_path, capsys):
    place, calls = racers
    place(BPB=1.5, SECONDS=99.0)
    assert raced(tmp_path, "--set", "MATRIX_LR=0.03") == 0
    made = calls()
    assert len(made) == 6
    cores = {}
    for seed in (1337, 42, 2024):
        one, other = (call for call in made if call["seed"] == seed)
        assert max(one["began"], other["began"]) < min(one["ended"], other["ended"])
        assert len(one["cores"]) == len(other["cores"]) == 1 and one["cores"] != other["cores"]
        assert {one["extra"], other["extra"]} == {None, "0.03"}
        (mine,) = (call for call in (one, other) if call["extra"])
        cores[seed] = mine["cores"]
        assert one["record"] == other["record"] == "tiny"
    assert cores[1337] == cores[2024] != cores[42]
    out = capsys.readouterr().out
    assert "seed 42: record 1.6001; candidate 1.5001" in out
    assert "val_bpb -0.1001 over 3 seeds" in out and "0.990 of the record's time" in out
    text = " ".join((tmp_path / "race/README.md").read_text().split())
    assert "| candidate | 1337 | 1.5020 |" in text and "commit 0123abc" in text
    assert (tmp_path / "race/candidate/seed_42/metrics.jsonl").exists()


def test_a_race_goes_on_where_it_stopped(racers, tmp_path, monkeypatch):
    place, calls = racers
    place(BPB=1.5)
    monkeypatch.setenv("FAKE_FAILS", "2024")
    assert raced(tmp_path) == 2
    before = len(calls())
    assert before == 4
    monkeypatch.delenv("FAKE_FAILS")
    assert raced(tmp_path) == 0
    assert [call["seed"] for call in calls()[before:]] == [2024, 2024]
    assert raced(tmp_path) == 0 and len(calls()) == 6
    (tmp_path / "race/candidate/seed_1337/race.json").write_text("[]")
    assert raced(tmp_path, "--seeds", "1") == 0 and len(calls()) == 8


def test_the_runs_of_another_race_stay(racers, tmp_path, monkeypatch, capsys):
    """Another script, another setting, another text: none replaces a part of what is there."""
    place, calls = racers
    place(BPB=1.5)
    assert raced(tmp_path, "--seeds", "1") == 0
    here = results(tmp_path)["entries"]

    def refused(*arguments):
        assert raced(tmp_path, *arguments) == 2
        assert "seed_1337: of another race; fix: --out ELSEWHERE" in capsys.readouterr().err
        assert results(tmp_path)["entries"] == here and len(calls()) == 2

    refused("--seeds", "1", "--set", "MATRIX_LR=0.03")
    (tmp_path / "text").mkdir()
    (tmp_path / "text/x_train_000000.bin").write_bytes(b"x")  # of the same name and size before
    refused()
    (tmp_path / "text/x_train_000000.bin").unlink()
    assert raced(tmp_path, "--seeds", "1") == 0 and len(calls()) == 2
    place(BPB=1.4)
    refused("--seeds", "1")


@pytest.mark.parametrize("what", ["a file", "below a file", "a file in it", "read-only"])
def test_a_folder_that_takes_nothing_is_refused_first(what, racers, tmp_path, capsys):
    place, calls = racers
    place(BPB=1.5)
    out = tmp_path / "out"
    if what in ("a file", "below a file"):
        out.write_text("")
    elif what == "a file in it":
        out.mkdir()
        (out / "candidate").write_text("")
    else:
        out = Path("/proc/none")
    out = out / "x" if what == "below a file" else out
    assert experiments.main(["race", "--out", str(out), "--seeds", "1"]) == 2
    assert f"error: --out {out}: " in capsys.readouterr().err and not calls()


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_race_is_on_the_embedded_text_as_published(split, tmp_path, monkeypatch):
    """Not on training shards that hold some of the validation text."""
    folder = tmp_path / "sample_en"
    train_gpt.prepare_sample(train_gpt.SAMPLE_DATA)
    shutil.copytree(train_gpt.SAMPLE_DATA, folder)
    monkeypatch.setattr(train_gpt, "SAMPLE_DATA", folder)
    assert experiments.embedded_text() == folder
    (shard,) = train_gpt.find_shards(folder, split)
    content = bytearray(shard.read_bytes())
    content[-2] ^= 1
    shard.write_bytes(content)
    words = f"its {split} tokens are not those of the rules; fix: move it away"
    with pytest.raises(train_gpt.UserError, match=words):
        experiments.embedded_text()


def test_what_data_it_was_is_known_by_content(tmp_path):
    first = experiments.data_digest(tmp_path)
    for name in ("x_train_000000.bin", "tokenizer.model"):
        (tmp_path / name).write_bytes(b"one")
        second = experiments.data_digest(tmp_path)
        (tmp_path / name).write_bytes(b"two")
        os.utime(tmp_path / name, ns=(1, 1))  # the file system's clock may be coarse
        assert len({first, second, experiments.data_digest(tmp_path)}) == 3
        first = second


def test_settings_edited_meanwhile_end_it(racers, tmp_path, monkeypatch, capsys):
    place, _ = racers
    place(BPB=1.5)
    entry = experiments.race_entry

    def edit(*arguments):
        config = experiments.SCRIPT.parent / "records/track_cpu/tiny/config.env"
        config.write_text("ITERATIONS=900\n")
        return entry(*arguments)

    monkeypatch.setattr(experiments, "race_entry", edit)
    assert raced(tmp_path) == 2
    assert "edited during the race; fix: start again" in capsys.readouterr().err


def test_where_one_fails_the_other_is_not_waited_for(racers, tmp_path, monkeypatch, capsys):
    place, calls = racers
    place(BPB=1.5)
    experiments.SCRIPT.write_text("import sys; sys.exit('error: at once')")
    monkeypatch.setattr(experiments, "CODE", {experiments.SCRIPT: experiments.SCRIPT.read_bytes()})
    assert raced(tmp_path) == 2
    assert "candidate seed 1337: exit status 1: error: at once" in " ".join(
        capsys.readouterr().err.replace("name ", "").split()
    )
    assert calls() == []  # the record's would have come after 0.3 s


@pytest.mark.parametrize(
    ("numbers", "lost"),
    [
        (dict(BPB=1.6), "val_bpb"),
        (dict(BPB=1.7), "val_bpb"),
        (dict(BPB=1.5, SECONDS=102.0), "training takes"),
        (dict(BPB=1.5, BYTES=16_000_001), "16,000,001 bytes"),
        (dict(BPB=1.5, TOKENS=8), "8 tokens, 203285 bytes and 9 tokens, 203285 bytes"),
        (dict(BPB=1.5, CAP=600), "800, under a cap"),
        (dict(BPB=1.5, VARYING=1000), "824 and 842 and 1137"),
    ],
)
def test_a_rule_that_does_not_hold_leaves_the_record(numbers, lost, racers, tmp_path, capsys):
    place, _ = racers
    place(**numbers)
    assert raced(tmp_path) == 0
    broken = [rule["found"] for rule in results(tmp_path)["rules"] if not rule["held"]]
    assert len(broken) == 1 and lost in broken[0]
    assert "The record stands." in capsys.readouterr().out
    assert "**The record stands.**" in (tmp_path / "race/README.md").read_text()


@pytest.mark.parametrize("other", ["--set", "--record", "--data", "edits"])
def test_another_race_breaks_no_record(other, racers, tmp_path, monkeypatch, capsys):
    """Settings of no commit, another opponent, another text, edited code: who wins has won that."""
    place, _ = racers
    place(BPB=1.5)
    monkeypatch.setattr(experiments, "text_folder", lambda *_: tmp_path)
    given = {"--set": ["MATRIX_LR=0.03"], "--record": ["89abcde"], "--data": ["python"]}
    if other == "edits":
        monkeypatch.setattr(experiments, "commit", lambda: "commit 4567def-dirty")
    assert raced(tmp_path, *([other, *given[other]] if other in given else [])) == 0
    out = capsys.readouterr().out
    assert f"NO: another race: {other}" in out and "The record stands." in out
    assert [rule["held"] for rule in results(tmp_path)["rules"]].count(False) == 1


def test_the_record_s_own_name_is_no_other_race(racers, tmp_path, capsys):
    place, _ = racers
    place(BPB=1.5)
    assert raced(tmp_path, "--record", "0123abc") == 0
    assert "The record is broken." in capsys.readouterr().out


def test_one_seed_is_no_test(racers, tmp_path, capsys):
    place, _ = racers
    place(BPB=1.5)
    assert raced(tmp_path, "--seeds", "1") == 0
    assert "over 1 seed, no test" in capsys.readouterr().out
    assert results(tmp_path)["p"] is None


def entries(before, after, seconds=(100, 100), **changes):
    """Of a race by seed."""
    found = []
    for name, scores, took in zip(experiments.RACERS, (before, after), seconds, strict=True):
        rows = [*enumerate(scores, 1)]
        for seed, bpb in rows if name == "record" else rows[::-1]:  # in whatever order
            row = dict(labels=dict(name=name, seed=seed), val_bpb=bpb, train_seconds=took)
            row |= dict(bytes=9, proved=True, text=[9, 9], steps=8, capped=False)
            found.append(row | changes)
    return found


def test_the_test_is_paired_by_seed():
    """Gains of 0.010, 0.011 and 0.012 among seeds that lie further apart: t = 0.011 / (0.001 /
    sqrt(3)) = 19.05 with two degrees of freedom, whose tail is known in closed form."""
    before = [1.60, 1.70, 1.80]
    after = [1.590, 1.689, 1.788]
    t = 0.011 / (0.001 / math.sqrt(3))
    tail = 0.5 * (1 - t / math.sqrt(2 + t * t))
    judged = judge(entries(before, after))
    assert judged.p == pytest.approx(tail, rel=1e-6) and judged.broken
    crossed = judge(entries(before, [after[2], after[0], after[1]]))
    assert crossed.p > 0.1 and not crossed.broken
    assert not judge(entries(before[:2], after[:2])).broken  # two seeds are too few
    assert not judge(entries(after, before)).broken
    assert judge(entries([1.5] * 3, [1.25] * 3)).p == 0
    assert judge(entries([1.5] * 3, [1.5] * 3)).p == 1
    assert not judge(entries(before, after, proved=False)).broken
    assert judge(entries(before, after, seconds=(100, 101))).broken
    assert not judge(entries(before, after, seconds=(100, 101.1))).broken


def test_all_rules_make_the_verdict():
    rules = [("a", True), ("b", True)]
    assert Judged(0.001, rules).broken
    assert not Judged(0.001, [*rules, ("c", False)]).broken


def test_the_record_is_the_history_s_last_row(tmp_path, monkeypatch):
    path = tmp_path / "README.md"
    monkeypatch.setattr(experiments, "HISTORY", path)
    path.write_text("| # | commit |\n|--|--|\n| 1 | `72edfbf` | x |\n| 2 | `03a7ec5` | y |\n")
    assert experiments.last_record() == "03a7ec5"
    path.write_text("nothing")
    with pytest.raises(train_gpt.UserError, match="no row with a commit; fix: --record COMMIT"):
        experiments.last_record()


def test_the_history_names_commits():
    """Of this repository, unless it was cloned without its history."""
    name = experiments.last_record()
    shallow = ["git", "-C", ROOT, "rev-parse", "--is-shallow-repository"]
    if subprocess.run(shallow, capture_output=True, text=True).stdout.strip() == "false":
        subprocess.run(["git", "-C", ROOT, "cat-file", "-e", f"{name}^{{commit}}"], check=True)


def test_a_commit_is_checked_out(tmp_path):
    if not (ROOT / ".git").exists():
        pytest.skip("no repository")
    script = experiments.checked_out("HEAD", tmp_path)
    show = ["git", "-C", ROOT, "show", "HEAD:train_gpt.py"]
    assert script.read_bytes() == subprocess.run(show, capture_output=True).stdout
    assert (script.parent / "data/sample/prepare.py").exists()


def test_what_cannot_be_raced_is_refused(tmp_path, capsys, monkeypatch):
    if len(experiments.my_cores()) > 1:
        for revision in ("nosuch", "--output=x", ""):
            assert experiments.main(["race", f"--record={revision}", "--out", str(tmp_path)]) == 2
            error = capsys.readouterr().err
            assert "--record " in error and "fix: a commit of this clone" in error
        assert experiments.main(["race", "--set", "DATA_PATH=/x", "--out", str(tmp_path)]) == 2
        assert "fix: --data, which is of both" in capsys.readouterr().err
        assert experiments.main(["race", "--data", "nosuch", "--out", str(tmp_path)]) == 2
        assert "error: --data nosuch: no dataset" in capsys.readouterr().err
    assert experiments.main(["race", "--set", "SEED=1", "--out", str(tmp_path)]) == 2
    assert "--set SEED=1" in capsys.readouterr().err
    monkeypatch.setattr(experiments, "my_cores", lambda: [0])
    assert experiments.main(["race", "--out", str(tmp_path)]) == 2
    assert "a race needs two cores" in capsys.readouterr().err
