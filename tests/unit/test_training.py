"""The training loop: every setting counts, the clock stops it, validation does not steer it."""

import hashlib
import json
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    SHRUNK,
    Run,
    new_trainer,
    no_validation,
    random_stream,
    run_here,
    tiny,
    train_gpt,
    trained,
    write_shard,
)
from test_artifact import opened

from train_gpt import OUTPUTS

STREAM = np.tile(random_stream(400, 64), 10)
SETTINGS = {  # field -> another value; each must change the packed weights
    "seed": 7,
    "train_batch_tokens": 128,
    "iterations": 9,
    "warmdown_iters": 3,
    "matrix_lr": 0.01,
    "scalar_lr": 0.01,
    "tied_embed_lr": 0.01,
    "tied_embed_init_std": 0.02,
    "qk_gain_init": 1.0,
    "muon_momentum": 0.8,
    "muon_momentum_warmup_start": 0.5,
    "muon_momentum_warmup_steps": 40,
    "muon_backend_steps": 3,
    "muon_wd": 0.5,
    "adam_wd": 0.5,
    "beta1": 0.5,
    "beta2": 0.5,
    "adam_eps": 1e-2,
    "grad_clip_norm": 0.05,
    "ema_enabled": False,
    "ema_decay": 0.3,
    "ema_warmup": False,
    "swa_enabled": False,
    "swa_every": 2,
    "swa_source": "ema",
    "swa_weight": 0.1,
    "late_qat": False,
    "late_qat_threshold": 0.9,
    "qat_every": 1,
    "quant_per": "matrix",
    "clip_quantiles": (0.9,),
    "quant_floor": True,
    "qat_enabled": True,
    "target_mb": 0.11,
    "leaky_slope": 0.0,
    "smear_init": -3.0,
    "overtone_init": True,
    "ortho_init": False,
    "polyglu_enabled": True,
    "depth_recurrence": (1, 2),
    "pre_enrich_dim": 24,
    "bigram_kind": "linear",
    "embed_coding": "int6",
    "table_coding": "fp16",
    "control_coding": "fp32",
    "compressor": "lzma",
}
# With 12 steps and a fall over all of them each average, snapshot and grid has room to differ.
ROOM = dict(iterations=12, warmdown_iters=12, late_qat_threshold=0.6)


def artifact(folder, **changes):
    cfg = tiny(**ROOM | changes)
    _, weights = trained(cfg, STREAM, folder)
    return train_gpt.pack_artifact(weights, cfg, lambda *_, **__: None)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return artifact(tmp_path_factory.mktemp("reference"))


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_changes_the_weights(name, reference, tmp_path):
    """The payload: a header with another configuration would prove nothing."""
    changed = artifact(tmp_path, **{name: SETTINGS[name]})
    assert opened(changed)[1] != opened(reference)[1]


def test_same_settings_same_artifact(reference, tmp_path):
    assert artifact(tmp_path) == reference


@pytest.mark.parametrize(
    "changes",
    [dict(train_log_every=1), dict(warmup_steps=2), dict(val_loss_every=3), dict(run_id="x")],
)
def test_what_is_only_told_changes_nothing(changes, reference, tmp_path):
    assert artifact(tmp_path, **changes) == reference


def logged(trainer, monkeypatch):
    """The (key, value, values) of every log line of a training run."""
    lines = []
    log = lambda key, value=None, **values: lines.append((key, value, values))  # noqa: E731
    monkeypatch.setattr(trainer.rt, "log", log)
    return lines


@pytest.fixture
def trainer(tmp_path):
    """-> function: a Trainer of a configuration on STREAM."""
    path = write_shard(tmp_path / "stream_train_000000.bin", STREAM)
    return lambda **changes: new_trainer(cfg := tiny(**changes), train_gpt.Runtime(cfg), path)


def test_late_qat_starts_at_its_threshold_and_searches_every_so_often(trainer, monkeypatch):
    run, searched = trainer(iterations=10, warmdown_iters=10, qat_every=2), []
    lines = logged(run, monkeypatch)
    search = train_gpt.update_qat_grids
    monkeypatch.setattr(
        train_gpt,
        "update_qat_grids",
        lambda model, cfg: searched.append(run.step) or search(model, cfg),
    )
    run.run(no_validation)
    # factors are 1, .9, ... .1: below 0.5 from step 6 on
    assert [line[2]["step"] for line in lines if line[0] == "late_qat:enabled"] == [6]
    assert searched == [6, 8]
    assert (run.model.qo_bank_grid > 0).all()


def test_qat_is_on_from_the_first_step(trainer, monkeypatch):
    """#810's: without late QAT, at the full rate. What it rounds starts at zero, so the first loss
    is the same."""
    losses = {}
    for on in (False, True):
        run = trainer(qat_enabled=on, late_qat=False, iterations=8, warmdown_iters=0)
        lines = logged(run, monkeypatch)
        run.run(no_validation)
        assert not any("late_qat" in line[0] for line in lines)
        assert all((grid == 0).all() for grid in run.model.buffers())
        losses[on] = [line[2]["train_loss"] for line in lines if "train_loss" in line[2]]
    assert losses[True][0] == losses[False][0]
    assert all(a != b for a, b in zip(losses[True][1:], losses[False][1:], strict=True))


def test_clock_stops_training_and_validation_does_not_count(trainer, monkeypatch):
    """A cap of 1 s with validations that take 0.2 s each: they stop the watch, not the run."""
    run = trainer(max_wallclock_seconds=1.0, iterations=10**6, val_loss_every=15, warmdown_iters=50)
    lines, calls, began = logged(run, monkeypatch), [], time.perf_counter()

    def validate():
        calls.append(time.sleep(0.2))
        return dict(val_loss=1.0, val_bpb=2.0)

    run.run(validate)
    took = time.perf_counter() - began
    assert 1.0 <= run.rt.seconds["train"] < 2.0
    assert took > 1.0 + 0.2 * len(calls) and len(calls) >= 2
    assert any("stopping_early" in line[0] for line in lines)
    last = [line for line in lines if line[0] == "step"][-1]
    assert last[1] == f"{run.step}/1000000" and last[2]["val_bpb"] == 2.0


def test_validation_at_its_steps_and_at_the_end(trainer, monkeypatch):
    run, steps = trainer(iterations=8, val_loss_every=3), []
    run.run(lambda: steps.append(run.step) or no_validation())
    assert steps == [3, 6, 8]
    run, steps = trainer(iterations=8, val_loss_every=0), []
    run.run(lambda: steps.append(run.step) or no_validation())
    assert steps == []


def test_logged_loss_is_that_of_the_batch(trainer, monkeypatch):
    run = trainer(iterations=1, grad_accum_steps=2)
    with torch.no_grad():
        state = run.loader.state()
        wanted = run.model(*run.loader.rows(run.cfg, run.rt)).item()
        run.loader.restore(state)
    lines = logged(run, monkeypatch)
    run.run(no_validation)
    (loss,) = [line[2]["train_loss"] for line in lines if "train_loss" in line[2]]
    assert loss == pytest.approx(wanted, rel=1e-5)


def test_averages_are_exported_and_not_the_last_weights(tmp_path):
    model, weights = trained(tiny(**ROOM), STREAM, tmp_path)
    for name, last in model.named_parameters():
        assert not torch.equal(weights[name], last), name


# -----------------------------------------------------------------------------
# What the score is of

SHORT = SHRUNK | dict(ITERATIONS="4", WARMUP_STEPS="0", TRAIN_BATCH_TOKENS="256")


@pytest.fixture(scope="module")
def base(dataset, tmp_path_factory):
    """A finished short run on the small dataset."""
    return run_here(tmp_path_factory.mktemp("base"), "base", **SHORT, DATA_PATH=str(dataset))


def test_score_is_that_of_the_artifact_on_disk(base, dataset):
    """Some targets again, from artifact.bin alone, one at a time."""
    model, columns = (
        train_gpt.load_artifact(base.folder / "artifact.bin"),
        base.arrays("scores.npz"),
    )
    stream = np.concatenate([[train_gpt.BOS], columns["token"]])
    for t in (0, 1, 15, 16, 63, 64, 65, 500, len(columns["token"]) - 1):
        start = max(0, t // 16 * 16 + 16 - 64)  # EVAL_STRIDE 16, windows of 64
        ids = torch.from_numpy(stream[start : t + 1]).long().unsqueeze(0)
        logits = model.logits(model.hidden(ids))[0, -1].double()
        wanted = logits.log_softmax(-1)[stream[t + 1]].item()
        assert columns["logp_model"][t] == pytest.approx(wanted, abs=2e-5)


@pytest.mark.usefixtures("no_picture")
def test_averaged_line_is_of_the_weights_before_quantisation(base, dataset, tmp_path):
    """Windows side by side; scores_ema.npz holds the scores of the same weights."""
    env = SHORT | dict(VAL_LOSS_EVERY="4", EVAL_STRIDE="64", DATA_PATH=str(dataset))
    run = run_here(tmp_path, "x", **env, NGRAM_SCHEME="pr864", PSEUDO_WEIGHTS="ema")
    (line,) = [row for row in run.metrics() if row["key"] == "averaged"]
    columns = run.arrays("scores_ema.npz")
    assert line["val_loss"] == pytest.approx(-columns["logp_model"].mean(), rel=1e-9)
    wanted = train_gpt.bits_per_byte(columns["logp_model"], columns["bytes"])
    assert line["val_bpb"] == pytest.approx(wanted, rel=1e-9)
    quantised = run.val_bpb("int6_roundtrip_exact")
    assert run.artifact == base.artifact and abs(line["val_bpb"] - quantised) > 1e-7
    assert not any(row["key"] == "averaged" for row in base.metrics())


@pytest.mark.usefixtures("no_picture")
def test_pruned_artifact_of_a_run(base, dataset, tmp_path):
    """Code and artifact keep to TARGET_MB, and the scores are those of what is left."""
    total = int(base.final("artifact_bytes")["total"]) - 800
    env = SHORT | dict(TARGET_MB=str(total / 2**20), DATA_PATH=str(dataset))
    run = run_here(tmp_path, "small", **env)
    (line,) = [line for line in run.lines if line.startswith("prune ")]
    figures = dict(pair.split(":") for pair in line.split()[1:])
    assert list(figures) == ["candidates", "pruned", "bytes", "seconds"]
    assert 0 < int(figures["pruned"]) < int(figures["candidates"])
    assert total - 800 < int(run.final("artifact_bytes")["total"]) <= total
    assert len(run.artifact) > int(figures["bytes"]) > len(run.artifact) - 5000
    assert run.val_bpb("int6_roundtrip_exact") != base.val_bpb("int6_roundtrip_exact")
    assert not any(line.startswith("prune") for line in base.lines)


@pytest.mark.usefixtures("no_picture")
def test_validation_text_does_not_steer_the_artifact(base, dataset, tmp_path):
    """No choice of weights by validation: another text, the same artifact."""
    data = tmp_path / "set"
    shutil.copytree(dataset, data)
    (path,) = data.glob("*_val_*.bin")
    write_shard(path, random_stream(700, 512))
    other = run_here(tmp_path, "other", **SHORT, DATA_PATH=str(data), VAL_LOSS_EVERY="2")
    assert other.artifact == base.artifact and other.val_bpb() != base.val_bpb()


def test_artifact_over_the_cap_is_loud(base, dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(train_gpt, "CAP_BYTES", 1000)
    run = run_here(tmp_path, "large", **SHORT, DATA_PATH=str(dataset))
    (line,) = [line for line in run.lines if "OVER THE CAP" in line]
    total = int(run.final("artifact_bytes")["total"])
    assert str(total) in line and run.submission()["bytes_total"] == total
    assert not any("OVER THE CAP" in line for line in base.lines)


def test_eval_only_into_its_own_folder_keeps_the_artifact(base, dataset, tmp_path):
    """An unfinished folder is cleared, but never of the artifact that is to be scored."""
    folder = tmp_path / "runs" / "mine"
    folder.mkdir(parents=True)
    (folder / "artifact.bin").write_bytes(base.artifact)
    env = SHORT | dict(EVAL_ONLY=str(folder / "artifact.bin"), DATA_PATH=str(dataset))
    run = run_here(tmp_path, "mine", **env)
    assert run.artifact == base.artifact and run.val_bpb() == base.val_bpb()
    again = run_here(tmp_path, "mine", **env, OVERWRITE="1")
    assert again.artifact == base.artifact


@pytest.mark.usefixtures("no_picture")
def test_eval_only_does_not_ask_for_a_training_batch(base, dataset, tmp_path):
    env = SHORT | dict(EVAL_ONLY=str(base.folder / "artifact.bin"), DATA_PATH=str(dataset))
    assert (
        run_here(tmp_path, "odd", **env | dict(TRAIN_BATCH_TOKENS="7")).val_bpb() == base.val_bpb()
    )


def test_eval_only_checks_the_stored_window(base, dataset, tmp_path):
    """The stride fits the variables' window, but not the artifact's 64 tokens."""
    env = SHORT | dict(EVAL_ONLY=str(base.folder / "artifact.bin"), DATA_PATH=str(dataset))
    with pytest.raises(train_gpt.ConfigError, match="EVAL_STRIDE=128"):
        run_here(tmp_path, "wide", **env | dict(TRAIN_SEQ_LEN="128", EVAL_STRIDE="128"))


def test_half_cleared_folder_is_not_taken_for_finished(dataset, tmp_path, monkeypatch):
    """Killed while OVERWRITE clears a finished folder: its mark has gone first, and all goes."""
    folder = tmp_path / "runs" / "old"
    folder.mkdir(parents=True)
    for name in OUTPUTS:
        (folder / name).write_text("old")
    paths = dict(data_path=str(dataset), tokenizer_path=str(dataset / "tokenizer.model"))
    rt = train_gpt.Runtime(tiny(run_id="old", overwrite=True, vocab_size=0, **paths))
    rt.folder, rt.finished, unlink, gone = folder, True, Path.unlink, []

    def die_after_one(path, missing_ok=False):
        if gone:
            raise KeyboardInterrupt
        gone.append(path.name)
        unlink(path, missing_ok)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "unlink", die_after_one)
        train_gpt.open_run(rt)
    assert not (folder / "submission.json").exists()
    train_gpt.open_run(rt)
    assert {path.name for path in folder.iterdir()} == {"log.txt", "metrics.jsonl"}
    assert not any(path.read_bytes() for path in folder.iterdir())


def test_unfinished_folder_is_cleared(dataset, tmp_path):
    folder = tmp_path / "runs" / "half"
    folder.mkdir(parents=True)
    for name in ("log.txt", "scores.npz", "artifact.bin", "blocks.npz"):
        (folder / name).write_text("of a run that was killed")
    (folder / "notes.txt").write_text("mine")
    run = run_here(tmp_path, "half", **SHORT, DATA_PATH=str(dataset), SAVE_SCORES="0")
    assert not (folder / "scores.npz").exists() and "killed" not in "\n".join(run.lines)
    assert (folder / "notes.txt").read_text() == "mine"


# -----------------------------------------------------------------------------
# Runtime


def test_a_log_line_is_text_and_json(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    runtime = train_gpt.Runtime(tiny(run_id="r"))
    train_gpt.open_run(runtime)
    runtime.start()
    runtime.log("step", "3/9", train_loss=1.23456, train_time_ms=1500, step_avg_ms=500.126)
    runtime.log("final_thing_exact", val_loss=1 / 3, stride=64)
    runtime.log("note", "a word")
    lines = (tmp_path / "runs/r/log.txt").read_text().splitlines()
    assert lines == capsys.readouterr().out.splitlines()
    assert lines == [
        "step:3/9 train_loss:1.2346 train_time:1500ms step_avg:500.13ms",
        "final_thing_exact val_loss:0.3333333333333333 stride:64",
        "note:a word",
    ]
    rows = [json.loads(s) for s in (tmp_path / "runs/r/metrics.jsonl").read_text().splitlines()]
    assert rows[0] == dict(
        key="step", value="3/9", train_loss=1.23456, train_time_ms=1500, step_avg_ms=500.126
    )
    assert rows[1]["val_loss"] == 1 / 3 and rows[2]["value"] == "a word"


def test_files_appear_whole_or_not_at_all(tmp_path):
    path = tmp_path / "x.npz"
    path.write_bytes(b"old")

    def fail(partial):
        partial.write_bytes(b"half")
        raise OSError("disk full")

    with pytest.raises(train_gpt.UserError, match="x.npz: disk full; fix"):
        train_gpt.write_atomically(path, fail)
    assert path.read_bytes() == b"old" and len([*tmp_path.iterdir()]) == 1
    train_gpt.write_atomically(path, lambda partial: partial.write_bytes(b"new"))
    assert path.read_bytes() == b"new"


def test_optional_packages_are_asked_for_by_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(train_gpt.UserError, match="pip install zstandard"):
        train_gpt.compress(b"x", "zstd")


@pytest.mark.usefixtures("no_picture")
def test_base_run_is_reproducible(base, dataset, tmp_path):
    again = run_here(tmp_path, "again", **SHORT, DATA_PATH=str(dataset))
    digests = [hashlib.sha256(run.artifact).hexdigest() for run in (base, again)]
    assert digests[0] == digests[1] and isinstance(again, Run)
