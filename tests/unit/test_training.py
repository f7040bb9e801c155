"""The training loop: every setting counts, the clock stops it, validation does not steer it."""

import time

import numpy as np
import pytest
import torch
from helpers import (
    new_trainer,
    no_validation,
    opened,
    pack_artifact,
    random_stream,
    tiny,
    train_gpt,
    trained,
    write_shard,
)

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
    return pack_artifact(weights, cfg)


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
        wanted = run.model(*run.batches.take()).item()
        run.batches.restore((0, 0))
    lines = logged(run, monkeypatch)
    run.run(no_validation)
    (loss,) = [line[2]["train_loss"] for line in lines if "train_loss" in line[2]]
    assert loss == pytest.approx(wanted, rel=1e-5)
