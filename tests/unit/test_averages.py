"""Averages of the weights, and the grids on which quantisation-aware training rounds."""

import numpy as np
import pytest
import torch
from helpers import pack_artifact, perturbed, random_ids, random_stream, tiny, train_gpt, trained

# -----------------------------------------------------------------------------
# EMA and SWA

STREAM = np.tile(random_stream(400, 64), 10)
# With 12 steps and a fall over all of them each average, snapshot and grid has room to differ.
ROOM = dict(iterations=12, warmdown_iters=12, late_qat_threshold=0.6)


def averaged(cfg, steps=12):
    """Averages over a walk of weights -> (result, walk from before the first step on, factors)"""
    model = perturbed(cfg)
    averages = train_gpt.Averages(model, cfg)
    walk = [{n: w.detach().clone().double() for n, w in model.named_parameters()}]
    factors = [1 - step / steps for step in range(steps)]
    for step, factor in enumerate(factors):
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(torch.randn_like(weight))
        averages.update(step, factor)
        walk.append({n: w.detach().clone().double() for n, w in model.named_parameters()})
    return averages.final(), walk, factors


def plain_ema(cfg, walk, name):
    """[e_0, e_1, ...]: the mean before the first step and after each."""
    means = [walk[0][name]]
    for step, weights in enumerate(walk[1:]):
        decay = min(cfg.ema_decay, (1 + step) / (10 + step)) if cfg.ema_warmup else cfg.ema_decay
        means.append(decay * means[-1] + (1 - decay) * weights[name])
    return means


def plain_swa(cfg, walk, factors, name, means):
    """Mean of the snapshots, None where there are none."""
    source = means if cfg.swa_source == "ema" else [weights[name] for weights in walk]
    taken = [
        source[step + 1]
        for step, factor in enumerate(factors)
        if factor < 0.2 and (step + 1) % cfg.swa_every == 0
    ]
    return torch.stack(taken).mean(0) if taken else None


@pytest.mark.parametrize("warmup", [True, False])
@pytest.mark.parametrize("every", [1, 2, 50])
@pytest.mark.parametrize("source", ["raw", "ema"])
@pytest.mark.parametrize("on", ["both", "ema", "swa", "none"])
def test_averages_are_plain_loops(on, source, every, warmup):
    cfg = tiny(
        ema_enabled=on in ("both", "ema"),
        swa_enabled=on in ("both", "swa"),
        swa_source=source,
        swa_every=every,
        swa_weight=0.3,
        ema_warmup=warmup,
        ema_decay=0.8,
    )
    final, walk, factors = averaged(cfg)
    for name in ("tok_emb", "kv_bank", "ve_scale"):
        means = plain_ema(cfg, walk, name)
        ema = means[-1] if cfg.ema_enabled else None
        mean = means if cfg.ema_enabled else [weights[name] for weights in walk]
        swa = plain_swa(cfg, walk, factors, name, mean) if cfg.swa_enabled else None
        if ema is not None and swa is not None:
            wanted = 0.7 * ema + 0.3 * swa
        else:
            wanted = next((w for w in (ema, swa) if w is not None), walk[-1][name])
        assert final[name].dtype == torch.float32
        torch.testing.assert_close(final[name].double(), wanted, rtol=1e-5, atol=1e-5)


def test_averages_are_exported_and_not_the_last_weights(tmp_path):
    model, weights = trained(tiny(**ROOM), STREAM, tmp_path)
    for name, last in model.named_parameters():
        assert not torch.equal(weights[name], last), name


# -----------------------------------------------------------------------------
# QAT grids


def quantisation_on(model, cfg):
    train_gpt.update_qat_grids(model, cfg)
    return model


def test_qat_trains_on_the_export_s_grid(tmp_path):
    cfg = tiny()
    model = quantisation_on(perturbed(cfg), cfg)
    path = tmp_path / "artifact.bin"
    path.write_bytes(pack_artifact(dict(model.named_parameters()), cfg))
    exported = train_gpt.load_artifact(path)
    for name in train_gpt.BANKS:
        torch.testing.assert_close(model.bank(name), getattr(exported, name), rtol=0, atol=1e-6)
        assert not torch.equal(model.bank(name), getattr(model, name))


def test_fake_quantize_is_straight_through_and_off_at_zero():
    weight = torch.randn(5, 7, requires_grad=True)
    scale = torch.full((5, 1), 0.3)
    scale[2] = 0
    out, direction = train_gpt.fake_quantize(weight, scale, 31), torch.randn(5, 7)
    (gradient,) = torch.autograd.grad((out * direction).sum(), weight)
    assert torch.equal(gradient, direction)
    rounded = (weight.detach() / 0.3).round().clamp(-31, 31) * 0.3
    rounded[2] = weight.detach()[2]
    torch.testing.assert_close(out.detach(), rounded, rtol=0, atol=1e-6)
    off = train_gpt.fake_quantize(weight, torch.zeros(5, 1), 31)
    assert torch.equal(off, weight)


def test_qat_is_alive_in_a_compiled_model_without_recompilation():
    """The published scripts' switch was frozen by torch.compile; this one is a buffer's value."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    cfg = tiny(num_layers=2, ve_layers=(1,))
    model, counter = perturbed(cfg), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend=counter)
    ids = random_ids(cfg)
    losses = {}
    with torch._dynamo.config.patch(error_on_recompile=True):
        for state in ("off", "on", "other"):
            if state != "off":
                quantisation_on(model, cfg)
            loss = compiled(ids, ids.roll(-1, 1))
            loss.backward()
            losses[state] = loss.item()
            assert loss.item() == pytest.approx(model(ids, ids.roll(-1, 1)).item(), rel=1e-5)
            with torch.no_grad():
                model.qo_bank.mul_(1.1)
    assert len(set(losses.values())) == 3
    assert counter.frame_count == 1
    torch._dynamo.reset()


def gap(model, cfg, rows):
    """Loss on the export's grid minus loss off it."""
    with torch.no_grad():
        for name in train_gpt.BANKS:
            getattr(model, f"{name}_grid").zero_()
        off = model(*rows).item()
        return quantisation_on(model, cfg)(*rows).item() - off


def test_late_qat_narrows_the_quantisation_gap(train_tokens, tmp_path, monkeypatch):
    """Same seed, with and without, on a grid of 7 levels, where a small model's gap is large."""
    monkeypatch.setitem(train_gpt.LARGEST, "int6", 3)
    gaps, rows = {}, torch.from_numpy(train_tokens[:8193].astype(np.int64))
    rows = rows[:-1].view(-1, 32), rows[1:].view(-1, 32)
    for late_qat in (True, False):
        cfg = tiny(
            vocab_size=512,
            iterations=100,
            warmdown_iters=50,
            late_qat=late_qat,
            late_qat_threshold=0.7,
            train_batch_tokens=512,
            train_seq_len=32,
        )
        model, _ = trained(cfg, train_tokens, tmp_path)
        gaps[late_qat] = gap(model, cfg, rows)
    assert 0 < gaps[False]
    assert gaps[True] < 0.6 * gaps[False]
