"""The script from end to end: every stage on one and two ranks, in processes of its own."""

import hashlib
import itertools
import json
import math
import shutil

import numpy as np
import pytest
from helpers import (
    PROOF,
    SCRIPT,
    SHRUNK,
    SMOKE_RUNS,
    check_scores,
    error_line,
    run_here,
    run_script,
    train_gpt,
    validation,
)

FINAL_LINES = """int6_roundtrip_exact int6_sliding_window_exact documents_exact ttt_exact
 ngram_backoff_exact ngram_exact ngram_pseudo codec artifact_bytes budget""".split()
ALWAYS = """int6_roundtrip_exact int6_sliding_window_exact documents_exact ngram_backoff_exact
 ngram_exact artifact_bytes budget""".split()
FILES = """log.txt metrics.jsonl artifact.bin train_gpt.py tokenizer.model config.env
 submission.json report.png blocks.npz scores.npz""".split()


@pytest.fixture(params=["one", "two_ranks", "eval_1", "eval_2"])
def run(request, runs):
    return runs[request.param]


def proves(run):
    return run.folder.name in ("one", "two_ranks")


def test_final_lines_in_order_and_once(run):
    stages = [line.split()[0] for line in run.lines if line.startswith("final_")]
    places = [FINAL_LINES.index(stage.removeprefix("final_")) for stage in stages]
    assert places == sorted(set(places))
    wanted = {*ALWAYS, *(["codec"] if proves(run) else [])}
    assert {FINAL_LINES[place] for place in places} == wanted


def test_run_folder_is_complete(run):
    names = {path.name for path in run.folder.iterdir()} - {"checkpoint"}
    assert names == {*FILES, *(["stream.bin"] if proves(run) else [])}
    assert (run.folder / "report.png").read_bytes().startswith(b"\x89PNG")
    assert (run.folder / "train_gpt.py").read_bytes() == SCRIPT.read_bytes()


@pytest.mark.parametrize("name", ["one", "two_ranks"])
def test_all_tokens_are_proved(name, runs, dataset):
    """Coded, and decoded in a process that was given the folder alone; at the price claimed."""
    run, tokens = runs[name], validation(dataset)[0]
    line, columns = run.final("codec"), run.arrays("scores.npz")
    assert line["decoded"] == "ok"
    assert int(line["proved_tokens"]) == int(line["total_tokens"]) == len(tokens) - 1
    coded, claimed = int(line["coded_bytes"]), int(line["claimed_bytes"])
    assert claimed == math.ceil(-columns["logp_final"].sum() / math.log(256))
    most = len(tokens) * 2 * 512 / 2**24 / 8 + 16  # rounding to 24 bits, the coder's own end
    assert -1 <= coded - claimed <= most
    header, words = train_gpt.unseal(
        train_gpt.STREAM_PREFIX, (run.folder / "stream.bin").read_bytes()
    )
    assert (
        len(words) == coded and train_gpt.CodingPlan(*header["shape"]).groups == SMOKE_RUNS[name][0]
    )
    assert not (run.folder / "decoded.npy").exists()


@pytest.mark.parametrize("name", ["one", "two_ranks", "eval_2"])
def test_stdout_is_the_log(name, runs):
    run = runs[name]
    output = (run.folder.parents[1] / f"{run.folder.name}.stdout").read_text(encoding="utf-8")
    assert [line for line in output.splitlines() if line in set(run.lines)] == run.lines


def test_metrics_repeat_the_log(run):
    metrics = run.metrics()
    assert len(metrics) == len(run.lines)
    for line, row in zip(run.lines, metrics, strict=True):
        assert line.startswith(row["key"])
        if row["key"].startswith("final_"):
            printed = run.final(row["key"].removeprefix("final_"))
            assert {name: str(row[name]) for name in printed} == printed


def test_scores_cover_every_target_once(run, dataset):
    check_scores(run, dataset)


def test_blocks_sum_1024_targets(run):
    columns, blocks = run.arrays("scores.npz"), run.arrays("blocks.npz")
    starts = range(0, len(columns["token"]), 1024)
    assert blocks.keys() >= {"logp_model", "logp_final", "bytes"}
    for name, sums in blocks.items():
        wanted = [columns[name][start : start + 1024].sum() for start in starts]
        np.testing.assert_allclose(sums, wanted, rtol=1e-12)


def test_submission_carries_the_score(run):
    submission, line = run.submission(), run.final("ngram_exact")
    assert submission["val_bpb"] == float(line["val_bpb"])
    assert submission["val_loss"] == float(line["val_loss"])
    code, weights = (run.folder / name for name in ("train_gpt.py", "artifact.bin"))
    packed = len(train_gpt.pack_script(code.read_bytes()))
    sizes = dict(code=code.stat().st_size, packed=packed, weights=weights.stat().st_size)
    total = packed + sizes["weights"]
    assert [submission["bytes_code"], submission["bytes_total"]] == [packed, total]
    printed = run.final("artifact_bytes")
    assert {name: int(printed[name]) for name in (*sizes, "total")} == sizes | dict(total=total)
    for name in ("train_gpt.py", "artifact.bin", "tokenizer.model"):
        digest = hashlib.sha256((run.folder / name).read_bytes()).hexdigest()
        assert digest in json.dumps(submission), name


def test_config_file_repeats_the_run(runs):
    lines = (runs["one"].folder / "config.env").read_text(encoding="utf-8").splitlines()
    settings = dict(line.split("=", 1) for line in lines)
    assert not settings.keys() & {"DATA_PATH", "TOKENIZER_PATH", "RUN_ID", "RECORD", "EVAL_ONLY"}
    wanted = SHRUNK | PROOF | dict(VAL_LOSS_EVERY="5", SEED="1337")
    assert {name: settings.get(name) for name in wanted.keys() - {"RECORD"}} == {
        name: text for name, text in wanted.items() if name != "RECORD"
    }


def test_stages_are_not_idle(runs):
    """Validation, late QAT and SWA happen in the shrunk run too, else it would prove little."""
    text = "\n".join(runs["one"].lines)
    assert "late_qat:enabled" in text
    assert "step:5/8 val_loss:" in text and "step:8/8 val_loss:" in text
    assert "swa_snapshots:0" not in text and "swa_snapshots:" in text
    averaged = [line for line in runs["one"].lines if line.startswith("averaged ")]
    assert len(averaged) == 1 and " val_bpb:" in averaged[0]
    assert not any(line.startswith("averaged ") for line in runs["again"].lines)
    stages = ["int6_roundtrip_exact", "int6_sliding_window_exact", "documents_exact"]
    roundtrip, sliding, documents = (runs["one"].val_bpb(stage) for stage in stages)
    assert sliding < roundtrip and documents < roundtrip


def test_a_seed_is_an_artifact(runs):
    """Validation on the way does not matter; the seed does."""
    names = "one", "again", "other_seed"
    digests = {n: hashlib.sha256(runs[n].artifact).hexdigest() for n in names}
    assert digests["one"] == digests["again"] != digests["other_seed"]
    sliding = {n: runs[n].val_bpb("int6_sliding_window_exact") for n in names}
    assert sliding["one"] == sliding["again"] != sliding["other_seed"]


def matched_orders(run):
    """[(longest order that knew the context, targets)]"""
    gains = [row for row in run.metrics() if row["key"] == "ngram_gain"]
    return [(row["value"], row["positions"]) for row in gains]


def test_ranks_do_not_change_the_score(runs):
    """One artifact scored on one and two ranks, and by the run that made it."""
    assert len({run.artifact for run in map(runs.get, ("one", "eval_1", "eval_2"))}) == 1
    for a, b in itertools.combinations(map(runs.get, ("one", "eval_1", "eval_2")), 2):
        for name in ("logp_model", "logp_final"):
            gap = abs(a.arrays("scores.npz")[name] - b.arrays("scores.npz")[name]).max()
            assert gap <= 1e-5, name
        assert a.val_bpb() == pytest.approx(b.val_bpb(), abs=1e-6)
        assert a.final("int6_sliding_window_exact") == b.final("int6_sliding_window_exact")
        assert matched_orders(a) == matched_orders(b) != []
    assert runs["one"].val_bpb() == runs["eval_1"].val_bpb()  # lanes of one shape: no digit moves


def test_training_on_two_ranks_is_the_same_training(runs):
    """Sums in another order flip a few of the integers, no more."""
    assert runs["two_ranks"].val_bpb() == pytest.approx(runs["one"].val_bpb(), rel=2e-3)


def test_finished_folder_is_refused(runs, dataset):
    folder = runs["one"].folder
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    env = SHRUNK | dict(DATA_PATH=str(dataset), RUN_ID="one")
    line = error_line(run_script(env, cwd=folder.parents[1]))
    assert "OVERWRITE=1" in line and "one" in line
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


@pytest.mark.usefixtures("no_picture")
def test_overwrite_runs_again(runs, dataset, tmp_path):
    first = runs["again"]
    shutil.copytree(first.folder, tmp_path / "runs/again")
    env = SHRUNK | dict(DATA_PATH=str(dataset), ITERATIONS="1", OVERWRITE="1")
    assert run_here(tmp_path, "again", **env).artifact != first.artifact
