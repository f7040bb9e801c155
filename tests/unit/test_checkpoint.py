"""A run that died goes on: to the same bits, with one log, and never from something damaged."""

import contextlib
import functools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_worker import (
    STEPS,
    Killed,
    bad_token,
    configuration,
    died,
    finite,
    new_trainer,
    shards,
    spoiled,
    state,
    train,
)
from helpers import (
    FRONTIER,
    ROOT,
    SCRIPT,
    SHRUNK,
    Run,
    clean_environment,
    cores,
    launch,
    no_validation,
    random_stream,
    run_here,
    train_gpt,
    write_shard,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

# -----------------------------------------------------------------------------
# The Trainer

SWITCHES = (
    dict(),
    dict(ema_enabled=False),
    dict(swa_enabled=False),
    dict(ema_enabled=False, swa_enabled=False),
    dict(swa_source="ema", swa_every=2),
    dict(late_qat=False),
    dict(qat_enabled=True, late_qat=False),
    dict(polyglu_enabled=True, qat_every=1),
    dict(bigram_kind="linear", pre_enrich_dim=8),
    dict(warmup_steps=2, grad_accum_steps=2),
    dict(depth_recurrence=(1,), clip="local", val_loss_every=3),
    FRONTIER | dict(shuffle=True, muon_row_norm=True, warmdown_share=0.7, min_lr=0.1),
    FRONTIER | dict(loop_from=0.0, warmup_steps=1),
)


@functools.cache
def uninterrupted(number):
    """-> losses and random numbers by step, final state"""
    with tempfile.TemporaryDirectory() as folder:
        trainer = train(configuration(**SWITCHES[number]), Path(folder))
        return trainer.losses, trainer.drawn, state(trainer)


@pytest.mark.parametrize("number", range(len(SWITCHES)))
@settings(max_examples=2, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    every=st.integers(1, 6),
    stops=st.lists(st.integers(0, STEPS - 1), min_size=1, max_size=3),
)
def test_interrupted_training_ends_bit_equal(number, every, stops):
    cfg = configuration(**SWITCHES[number], checkpoint_every=str(every))
    losses, drawn, wanted = uninterrupted(number)
    with tempfile.TemporaryDirectory() as name:
        folder, last = Path(name), 0
        for stop in sorted(stops):
            _, trainer = died(cfg, folder, stop=stop)
            assert trainer.losses == {step: losses[step] for step in range(last, stop)}
            last = stop - stop % every
        trainer = train(cfg, folder)
    assert trainer.losses == {step: losses[step] for step in range(last, STEPS)}
    assert trainer.drawn == {step: drawn[step] for step in range(last, STEPS)}
    found = state(trainer)
    assert [name for name in wanted if found[name] != wanted[name]] == []


def test_checkpoint_holds_what_the_next_step_needs(tmp_path):
    """Everything at the moment of restoring, where training on could hide a difference; the loader
    stands in the third shard."""
    cfg = configuration(checkpoint_every="11")
    _, before = died(cfg, tmp_path, stop=11)
    wanted = state(before)
    torch.manual_seed(99)
    found = state(new_trainer(cfg, tmp_path))
    assert wanted["loader"][0] == 2 and wanted["qat_since"] == 5 and wanted["snapshots"] == 1
    assert [name for name in wanted if found[name] != wanted[name]] == []


@pytest.fixture
def clock(monkeypatch):
    """Time passes in Watched alone, by its `seconds` a step."""
    still = types.SimpleNamespace(perf_counter=lambda: 0.0)
    monkeypatch.setattr(train_gpt, "time", still)


@pytest.fixture
def saved(monkeypatch):
    """Steps of the checkpoints that were written."""
    steps, save = [], train_gpt.save_checkpoint

    def record(trainer):
        steps.append(trainer.step)
        return save(trainer)

    monkeypatch.setattr(train_gpt, "save_checkpoint", record)
    return steps


@pytest.mark.usefixtures("clock")
def test_checkpoints_by_the_minute(saved, tmp_path):
    """Steps of 45 s: 2, 4, 6, 8 minutes are over after steps 3, 6, 8, 11; the end is one as
    well."""
    cfg = configuration(checkpoint_every="2m")
    died(cfg, tmp_path, stop=9, seconds=45.0)
    assert saved == [3, 6, 8]
    trainer = train(cfg, tmp_path, seconds=45.0)
    assert saved == [3, 6, 8, 11, STEPS] and trainer.rt.seconds["train"] == 45 * STEPS


def test_no_checkpoints_unless_asked_for(saved, tmp_path):
    train(configuration(checkpoint_every="0"), tmp_path)
    assert saved == []


def test_checkpoints_by_the_step(saved, tmp_path):
    train(configuration(checkpoint_every="4"), tmp_path)
    assert saved == [4, 8, STEPS]


@pytest.mark.usefixtures("clock")
def test_the_cap_counts_the_seconds_before(tmp_path):
    """300 s are over after step 7 of 45 s; the rate depends on the clock."""
    cfg = configuration(max_wallclock_seconds=300.0)
    whole = train(cfg, tmp_path, seconds=45.0)
    cfg = configuration(max_wallclock_seconds=300.0, checkpoint_every="2")
    died(cfg, tmp_path, stop=5, seconds=45.0)
    trainer = train(cfg, tmp_path, seconds=45.0)
    assert whole.step == trainer.step == 7 and state(trainer) == state(whole)
    again = train(cfg, tmp_path, stop=7)  # would die at another step
    assert again.step == 7 and again.rt.seconds["train"] == 315
    assert all(torch.equal(w, whole.weights[n]) for n, w in again.weights.items())


# -----------------------------------------------------------------------------
# A shard that turns out to be bad in the middle


@pytest.mark.parametrize("every", ["0", "1"])
@pytest.mark.parametrize(("number", "place", "step"), [(1, 0, 2), (1, -1, 2), (2, 0, 3), (2, 9, 3)])
def test_what_was_trained_before_a_bad_shard_is_kept(number, place, step, every, tmp_path):
    """And goes on to the same bits once the shard is mended, wherever it was bad."""
    path = shards(tmp_path)[number]
    content = bad_token(path, place % train_gpt.shard_tokens(path))
    cfg = configuration(checkpoint_every=every)
    for _ in range(2):  # not mended yet: the same again
        error, trainer = died(cfg, tmp_path, train_gpt.UserError)
        text = f"; once it is mended: step {step}, checkpoint written, RESUME=auto goes on"
        assert str(error).startswith(f"{path}: token 65535 >= vocabulary 64; fix: ")
        assert str(error).endswith(text) and trainer.step == step
    path.write_bytes(content)
    trainer, (losses, _, wanted) = train(cfg, tmp_path), uninterrupted(0)
    assert trainer.losses == {index: losses[index] for index in range(step, STEPS)}
    assert state(trainer) == wanted


def lost(path):
    path.unlink()


def cut(path):
    path.write_bytes(path.read_bytes()[:-2])


@pytest.mark.parametrize("lose", [lost, cut])
def test_a_shard_that_goes_in_the_middle(lose, tmp_path):
    path = shards(tmp_path)[2]
    content = path.read_bytes()
    cfg = configuration(late_qat_threshold=0.99)
    trainer = new_trainer(cfg, tmp_path)
    lose(path)
    with pytest.raises(train_gpt.UserError, match=re.escape(f"{path}: ") + ".*RESUME=auto"):
        trainer.run(no_validation)
    path.write_bytes(content)
    assert train(cfg, tmp_path).losses.keys() == {*range(3, STEPS)}


def test_a_bad_shard_before_the_first_step_leaves_no_checkpoint(tmp_path):
    path = shards(tmp_path)[1]
    bad_token(path, 5)
    for warmup in (0, 1):
        cfg = configuration(warmup_steps=warmup, train_batch_tokens=256, checkpoint_every="1")
        error, trainer = died(cfg, tmp_path, train_gpt.UserError)
        assert str(path) in str(error) and "RESUME" not in str(error)
        assert not trainer.folder.exists() and trainer.batches.place == (0, 0)


def test_shards_that_were_read_bind(tmp_path):
    """Others of the same size are other data."""
    cfg = configuration(checkpoint_every="4")
    died(cfg, tmp_path, stop=4)
    for path in shards(tmp_path):
        content = path.read_bytes()
        path.write_bytes(content[:1026] + bytes([content[1026] ^ 1]) + content[1027:])
        with pytest.raises(train_gpt.UserError, match="SHARDS="):
            new_trainer(cfg, tmp_path)
        path.write_bytes(content)


# -----------------------------------------------------------------------------
# Signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("every", ["0", "2"])
def test_signal_writes_a_checkpoint_and_ends(number, every, tmp_path):
    cfg = configuration(checkpoint_every=every)
    end, _ = died(cfg, tmp_path, SystemExit, signals=[(4, number)])
    assert end.code == 128 + number
    trainer, (losses, _, wanted) = train(cfg, tmp_path), uninterrupted(0)
    assert trainer.losses == {step: losses[step] for step in range(5, STEPS)}
    assert state(trainer) == wanted


def test_a_signal_in_the_last_validation_counts(tmp_path):
    trainer = new_trainer(configuration(val_loss_every=STEPS), tmp_path)

    def validate():
        os.kill(os.getpid(), signal.SIGTERM)
        return {}

    with pytest.raises(SystemExit) as end:
        trainer.run(validate)
    assert end.value.code == 143
    assert (trainer.folder / f"step_{STEPS:08}.json").exists()


def test_ranks_wait_until_the_checkpoint_is_written(tmp_path, monkeypatch):
    """Where one rank ends, torchrun ends the others: rank 0 would still be writing."""
    events, cfg = [], configuration(checkpoint_every="4")
    trainer = new_trainer(cfg, tmp_path)
    monkeypatch.setattr(trainer.rt, "barrier", lambda: events.append("barrier"))
    monkeypatch.setattr(train_gpt, "write_checkpoint", lambda *_: events.append("saved"))
    for rank, number in ((0, signal.SIGTERM), (1, signal.SIGTERM)):
        trainer.rt.rank, trainer.signal = rank, number
        with pytest.raises(SystemExit):
            trainer.save_if_due(0)
    assert events == ["saved", "barrier", "barrier"]


# -----------------------------------------------------------------------------
# Losses and gradients that are not finite


@pytest.mark.parametrize("name", ["q_gain", "qo_bank", "tok_emb"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_gradient_that_is_not_finite_ends_training(name, value, tmp_path):
    cfg = configuration(checkpoint_every="3")
    trainer = new_trainer(cfg, tmp_path, spoil=spoiled(5, value=value, name=name))
    weights = {n: w.detach().clone() for n, w in trainer.model.named_parameters()}

    def keep(trainer):
        for n, w in trainer.model.named_parameters():
            weights[n].copy_(w.detach())

    spoil, update = trainer.spoil, trainer.update
    trainer.spoil = lambda t: (keep(t) if t.step == 5 else None, spoil(t))
    steps, changed = [], []

    def watched(factor):
        loss = update(factor)
        steps.append(trainer.step)
        if trainer.step == 6:
            now = dict(trainer.model.named_parameters())
            changed.extend(n for n, w in weights.items() if not torch.equal(w, now[n]))
        return loss

    trainer.update = watched
    with pytest.raises(train_gpt.UserError, match="not finite on rank 0") as caught:
        trainer.run(lambda: {})
    assert "by step 6 " in str(caught.value) and "step_00000003.json" in str(caught.value)
    assert changed == [] and steps[-1] == 6 and finite(trainer.rt.folder)


def test_no_checkpoint_after_the_last_step_where_it_is_not_finite(tmp_path):
    cfg = configuration(checkpoint_every="0")
    with pytest.raises(train_gpt.UserError, match="checkpoint: none"):
        train(cfg, tmp_path, spoil=spoiled(STEPS - 1))


# -----------------------------------------------------------------------------
# Files of a checkpoint


def of_step(step):
    """A state that no training made."""
    return train_gpt.CheckpointState(step, None, None, 1.5, 0, [0, 0], {}, [0, 0])


def files(folder):
    return {
        path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def test_the_last_two_stay_and_leftovers_go(tmp_path):
    folder, tensors = tmp_path / "checkpoint", dict(x=torch.arange(5.0))
    for step in (3, 10, 200):
        train_gpt.write_checkpoint(folder, of_step(step), tensors)
        (folder / f".partial_step_{step + 1:08}.json").write_bytes(b"{")
        (folder / f"step_{step + 1:08}.safetensors").write_bytes(b"orphan")
    train_gpt.write_checkpoint(folder, of_step(3000), tensors)
    names = {f"step_{step:08}.{kind}" for step in (200, 3000) for kind in ("json", "safetensors")}
    assert {path.name for path in folder.iterdir()} == names
    for step in (200, 3000):
        state, found = train_gpt.read_checkpoint(folder / f"step_{step:08}.json")
        assert state == of_step(step) and torch.equal(found["x"], tensors["x"])


def test_a_checkpoint_outlives_damaged_later_ones(tmp_path):
    """Gone on from one that was put back, a run keeps what it writes."""
    for step in (35, 40, 12):
        train_gpt.write_checkpoint(tmp_path, of_step(step), dict(x=torch.ones(2)))
    assert sorted(path.stem for path in tmp_path.iterdir()) == ["step_00000012"] * 2


def test_order_on_the_disk(tmp_path, monkeypatch):
    """Tensors before the json that makes them a checkpoint; each flushed before it gets its name,
    and the name after; old ones go last, the json first."""
    events, folder = [], tmp_path / "checkpoint"
    fsync, replace, unlink = os.fsync, os.replace, Path.unlink
    for step in (1, 2):
        train_gpt.write_checkpoint(folder, of_step(step), dict(x=torch.ones(2)))

    def flushed(file):
        name = Path(os.readlink(f"/proc/self/fd/{file}")).name
        kind, _, rest = name.rpartition("step_")
        events.append(f"flush {'partial ' * kind.startswith(train_gpt.PARTIAL)}step_{rest}")
        fsync(file)

    def named(old, new):
        events.append(f"name {Path(new).name}")
        replace(old, new)

    def gone(path, missing_ok=False):
        if path.exists():
            events.append(f"unlink {path.name}")
        unlink(path, missing_ok)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "replace", named)
    monkeypatch.setattr(Path, "unlink", gone)
    train_gpt.write_checkpoint(folder, of_step(3), dict(x=torch.ones(2)))
    names, wanted = ("step_00000003.safetensors", "step_00000003.json"), []
    for name in names:
        wanted += [f"flush partial {name}", f"name {name}", "flush step_checkpoint"]
    assert events == [*wanted, "unlink step_00000001.json", "unlink step_00000001.safetensors"]


# -----------------------------------------------------------------------------
# The script

FAST = SHRUNK | dict(
    MAX_WALLCLOCK_SECONDS="0",
    CHECKPOINT_EVERY="2",
    NUM_LAYERS="2",
    VE_LAYERS="1",
    TRAIN_SEQ_LEN="32",
    TRAIN_BATCH_TOKENS="128",
    NGRAM_ENABLED="0",
    EVAL_STRIDE="32",
)


@pytest.fixture(scope="module")
def fast(dataset):
    return FAST | dict(DATA_PATH=str(dataset))


@pytest.fixture(scope="module")
def ended(fast, tmp_path_factory):
    """A run that nobody interrupted."""
    with pytest.MonkeyPatch.context() as patch:
        without_picture(patch)
        return run_here(tmp_path_factory.mktemp("ended"), "x", **fast, RUN_ID="x")


def without_picture(patch):
    patch.setattr(train_gpt, "close_run", lambda rt: None)


def dies(patch, step=None):
    """A run in this process is killed before this step, None: when training is over."""
    update = train_gpt.Trainer.update

    def watched(trainer, factor):
        if trainer.step == step:
            raise Killed
        return update(trainer, factor)

    def evaluate(model, weights, report):
        report.score("int6_roundtrip", np.zeros(len(report.text.targets)))
        raise Killed

    patch.setattr(train_gpt.Trainer, "update", watched)
    if step is None:
        patch.setattr(train_gpt, "evaluate", evaluate)


@pytest.fixture(scope="module")
def dead(fast, tmp_path_factory):
    """step -> folder with runs/x, killed before that step (None: in the evaluation)"""

    @functools.cache
    def make(step):
        cwd = tmp_path_factory.mktemp("dead")
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
            dies(patch, step)
            run_here(cwd, "x", **fast)
        return cwd

    return make


@pytest.fixture
def killed(dead, tmp_path):
    """-> function: a copy of such a folder"""

    def copy(step=5):
        shutil.copytree(dead(step), tmp_path, dirs_exist_ok=True)
        return tmp_path / "runs/x"

    return copy


@pytest.fixture
def go_on(fast, tmp_path, monkeypatch):
    """-> function: start the run again in this process -> Run"""
    without_picture(monkeypatch)
    return lambda **env: run_here(tmp_path, "x", **fast | dict(RESUME="auto") | env)


def told(run):
    """The log without seconds, and without what every start writes."""
    rows = [row for row in run.metrics() if row["key"] not in ("note", "resumed", "peak_memory_mb")]
    first = next(i for i, row in enumerate(rows) if row["key"] == "step")
    header = {row["key"] for row in rows[:first]}
    timed = ("seconds", "_ms", "per_s", "eta")
    return [
        {k: v for k, v in row.items() if not any(word in k for word in timed)}
        for row in rows
        if row["key"] not in header
    ]


def assert_equal(run, ended):
    assert run.artifact == ended.artifact
    assert told(run) == told(ended)
    keys = [line.split()[0] for line in run.lines]
    wanted = [line.split()[0] for line in ended.lines]
    for word in ("step:", "final_", "averages"):
        assert [k for k in keys if k.startswith(word)] == [k for k in wanted if k.startswith(word)]
    ours, theirs = run.arrays("blocks.npz"), ended.arrays("blocks.npz")
    assert all(ours[name].tobytes() == theirs[name].tobytes() for name in theirs)


@pytest.mark.parametrize("step", [1, 5, 7])
def test_a_killed_run_goes_on(step, killed, go_on, ended):
    folder = killed(step)
    assert sorted(folder.glob("checkpoint/*")) or step == 1
    run = go_on()
    assert_equal(run, ended)
    assert [row["step"] for row in run.metrics() if row["key"] == "resumed"] == [step // 2 * 2][
        : step > 1
    ]


def test_killed_in_the_evaluation(killed, go_on, ended, monkeypatch):
    killed(None)
    monkeypatch.setattr(train_gpt.Trainer, "update", None)  # nothing is left to train
    assert_equal(go_on(), ended)


def refusal(go_on, **env):
    with pytest.raises(train_gpt.UserError) as caught:
        go_on(**env)
    return str(caught.value)


def test_an_unfinished_folder_is_not_overwritten_unasked(killed, go_on, ended, monkeypatch):
    folder = killed()
    before = files(folder)
    text = refusal(go_on, RESUME="0")
    assert "unfinished" in text and "RESUME=auto" in text and "OVERWRITE=1" in text
    assert files(folder) == before
    with monkeypatch.context() as patch, pytest.raises(Killed):
        dies(patch, 0)
        go_on(RESUME="0", OVERWRITE="1")
    assert not (folder / "checkpoint").exists()
    assert (folder / "log.txt").read_text().count("val_text") == 1


def test_overwrite_clears_nothing_before_the_new_data_are_found(killed, go_on, tmp_path):
    folder = killed()
    before = files(folder)
    assert "no *_val_*.bin" in refusal(go_on, OVERWRITE="1", DATA_PATH=str(tmp_path / "nowhere"))
    assert files(folder) == before


def test_scoring_an_artifact_goes_on_with_no_run(killed, ended, go_on):
    folder = killed()
    before = files(folder)
    text = refusal(go_on, EVAL_ONLY=str(ended.folder / "artifact.bin"))
    assert "unfinished" in text and "RESUME" not in text
    assert files(folder) == before


def test_a_finished_run_is_left_alone(ended, killed, go_on, capsys, monkeypatch):
    folder = killed()
    shutil.copytree(ended.folder, folder, dirs_exist_ok=True)
    (folder / "submission.json").write_text("{}")
    before = files(folder), {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with monkeypatch.context() as patch, contextlib.suppress(OSError):  # run_here reads a Run
        patch.setattr(train_gpt, "Report", None)
        go_on()
    assert "finished" in capsys.readouterr().out
    assert (files(folder), {path: path.stat().st_mtime_ns for path in folder.rglob("*")}) == before
    assert "finished" in refusal(go_on, RESUME="0")


def edit(path, change):
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)


def signed_again(path, change):
    """The checkpoint with other tensors, and a sha256 that fits."""
    state, tensors = train_gpt.read_checkpoint(path)
    state = state._asdict()
    change(tensors)
    data = train_gpt.checkpoint_format().save(tensors)
    path.with_suffix(".safetensors").write_bytes(data)
    seen = dict(state=state, sha256=train_gpt.sha256(json.dumps(state).encode() + data))
    path.write_text(json.dumps(seen))


def other_state(path, **changes):
    """A state that the sha256 is not of."""
    seen = json.loads(path.read_bytes())
    seen["state"] |= changes
    path.write_text(json.dumps(seen))


def signed_state(path, **changes):
    """A state that no run writes, with a sha256 that fits."""
    state = json.loads(path.read_bytes())["state"] | changes
    digest = train_gpt.sha256(json.dumps(state).encode() + tensors_of(path).read_bytes())
    path.write_text(json.dumps(dict(state=state, sha256=digest)))


def tensors_of(path):
    return path.with_suffix(".safetensors")


DAMAGE = {
    "tensors cut": lambda p: edit(tensors_of(p), lambda d: d.__delitem__(slice(-9, None))),
    "tensors empty": lambda p: tensors_of(p).write_bytes(b""),
    "no tensors": lambda p: tensors_of(p).unlink(),
    "a bit": lambda p: edit(tensors_of(p), lambda d: d.__setitem__(-5, d[-5] ^ 1)),
    "json cut": lambda p: edit(p, lambda d: d.__delitem__(slice(-9, None))),
    "json empty": lambda p: p.write_bytes(b""),
    "json of something else": lambda p: p.write_text("[]"),
    "another step": lambda p: other_state(p, step=3),
    "another place": lambda p: other_state(p, loader=[0, 0]),
    "no time": lambda p: signed_state(p, seconds=math.inf),
    "no loader": lambda p: signed_state(p, loader=[0]),
    "no logs": lambda p: signed_state(p, logs=["x"]),
    "no settings": lambda p: signed_state(p, settings={}),
    "a key is missing": lambda p: signed_again(p, lambda t: t.pop("muon.0")),
    "another shape": lambda p: signed_again(p, lambda t: t.update({"muon.0": torch.zeros(3)})),
    "one number": lambda p: signed_again(p, lambda t: t.update({"adam.1": torch.zeros(1)})),
}


PASSED = ("tensors cut", "no tensors", "a bit", "json cut", "another shape", "a key is missing")


@pytest.mark.parametrize("name", PASSED)  # about a second each; all of them below
def test_a_damaged_checkpoint_is_passed_over(name, killed, go_on, ended, capsys):
    DAMAGE[name](killed() / "checkpoint/step_00000004.json")
    run = go_on()
    assert "step_00000004.json is passed over, damaged" in capsys.readouterr().out
    assert [row["step"] for row in run.metrics() if row["key"] == "resumed"] == [2]
    if "missing" not in name and "shape" not in name:  # whose log was not cut so far back
        assert_equal(run, ended)
    assert run.artifact == ended.artifact and run.val_bpb() == ended.val_bpb()


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_checkpoints_alone_are_refused(name, killed, go_on, monkeypatch):
    folder = killed()
    for path in folder.glob("checkpoint/*.json"):
        DAMAGE[name](path)
    before = files(folder / "checkpoint")
    monkeypatch.setattr(train_gpt.Trainer, "run", None)
    text = refusal(go_on)
    assert "runs/x/checkpoint: no whole checkpoint" in text and "OVERWRITE=1" in text
    assert files(folder / "checkpoint") == before


OTHERS = dict(
    SEED=("1337", "7"),
    MATRIX_LR=("0.025", "0.02"),
    TRAIN_BATCH_TOKENS=("128", "256"),
    MODEL_DIM=("64", "128"),
    EMA_ENABLED=("1", "0"),
    ITERATIONS=("8", "9"),
)


@pytest.mark.parametrize("name", OTHERS)
def test_another_setting_is_refused(name, killed, go_on):
    folder, (was, now) = killed(), OTHERS[name]
    before = files(folder / "checkpoint")
    text = refusal(go_on, **{name: now})
    assert f"{name}={was}, not {now}" in text and "fix:" in text
    assert files(folder / "checkpoint") == before


def test_scoring_may_change(killed, go_on, ended):
    killed()
    assert go_on(EVAL_STRIDE="16").artifact == ended.artifact


def test_other_shards_are_refused(killed, go_on, fast, tmp_path):
    killed()
    folder = tmp_path / "other"
    shutil.copytree(fast["DATA_PATH"], folder)
    size = sum(path.stat().st_size for path in folder.glob("*_train_*.bin"))
    path = write_shard(folder / "z_train_000001.bin", random_stream(300, 512))
    text, more = refusal(go_on, DATA_PATH=str(folder)), size + path.stat().st_size
    assert f"SHARDS=1 of {size} bytes, " in text and f"not 2 of {more} bytes; fix" in text


def test_checkpoint_without_a_run_begins(fast, tmp_path, go_on, monkeypatch):
    """Nothing there, and a run that died before its first checkpoint."""
    for _ in range(2):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            dies(patch, 1)
            go_on()
        log = (tmp_path / "runs/x/log.txt").read_text()
        assert log.count("step:1/8") == 1 and "resumed" not in log


# -----------------------------------------------------------------------------
# The script as a process


@contextlib.contextmanager
def started(env, cwd, ranks=1, until="step:2/"):
    """The script as a process that has written a line that begins so -> Popen, its lines so far"""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command = [sys.executable, *(torchrun if ranks > 1 else []), str(SCRIPT)]
    streams = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    with cores(ranks):
        quiet = dict(OMP_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1", RUN_ID="x", RESUME="auto")
        process = subprocess.Popen(
            command, cwd=cwd, env=clean_environment() | env | quiet, **streams
        )
    try:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith(until):
                break
        yield process, lines
    finally:
        process.kill()
        process.communicate()


LONG = dict(ITERATIONS="400", TRAIN_LOG_EVERY="1", CHECKPOINT_EVERY="0")


# -----------------------------------------------------------------------------
# Two ranks


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Results of checkpoint_worker.py's two ranks, and their folder."""
    folder = tmp_path_factory.mktemp("ranks")
    done = launch(ROOT / "tests/unit/checkpoint_worker.py", [folder], {}, 2, folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"results_rank{r}.json").read_text()) for r in (0, 1)], folder


def test_two_ranks_go_on_bit_equal(ranks):
    for results in ranks[0]:
        assert results["interrupted"]["different"] == results["signalled"]["different"] == []


def test_a_bad_shard_ends_all_ranks_with_a_checkpoint(ranks):
    names = ["step_00000003.json", "step_00000003.safetensors"]
    for results in ranks[0]:
        found = results["mended"]
        assert found["names"] == names and found["different"] == []
        assert found["error"].endswith("step 3, checkpoint written, RESUME=auto goes on")


def test_a_signal_to_one_rank_ends_all_at_the_same_step(ranks):
    names = ["step_00000005.json", "step_00000005.safetensors"]
    for results in ranks[0]:
        assert results["signalled"]["code"] == 143 and results["signalled"]["names"] == names


@pytest.mark.parametrize("name", ["bank", "small"])
def test_one_rank_s_gradient_stops_all(name, ranks):
    one, two = (results[name] for results in ranks[0])
    assert one == two and one["changed"] == [] and one["finite"]
    assert one["error"].startswith("by step 6 loss or gradient not finite on rank 1; last good")
    assert one["last"] == "step_00000005.json" and one["last"] in one["error"]


def test_another_number_of_ranks_is_refused(ranks):
    cfg = configuration(run_id="signalled", checkpoint_every="0")
    with pytest.raises(train_gpt.UserError, match="RANKS=2, not 1"):
        new_trainer(cfg, ranks[1])


@pytest.mark.slow
def test_torchrun_passes_a_signal_on(fast, tmp_path):
    """SIGTERM to torchrun; then to the end, as without it."""
    env = fast | dict(ITERATIONS="60", TRAIN_LOG_EVERY="1", CHECKPOINT_EVERY="0")
    with started(env, tmp_path, ranks=2) as (process, _):
        process.send_signal(signal.SIGTERM)
        output = process.communicate(timeout=60)[0]
    assert process.returncode and "checkpoint written, RESUME=auto goes on" in output
    (tmp_path / "whole").mkdir()
    runs = []
    for cwd in (tmp_path, tmp_path / "whole"):
        done = launch(SCRIPT, [], env | dict(RUN_ID="x", RESUME="auto"), 2, cwd)
        assert done.returncode == 0, done.stderr[-3000:]
        runs.append(Run(cwd / "runs/x"))
    assert any(line.startswith("resumed") for line in runs[0].lines)
    assert_equal(*runs)


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_job(fast, tmp_path):
    with started(fast | LONG | dict(ITERATIONS="100000"), tmp_path, ranks=2) as (process, _):
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)
        began = time.monotonic()
        output = process.communicate(timeout=120)[0]
        assert time.monotonic() - began < 60
    assert process.returncode == 1 and "SIGKILL" in output
