"""Newton-Schulz, Muon, AdamW, schedules, clipping, averages; and two ranks against one."""

import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import (
    PLAIN,
    fixed_steps,
    new_trainer,
    perturbed,
    random_ids,
    random_stream,
    tiny,
    train_gpt,
    write_shard,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks_worker import ODD, SIBLINGS, STREAM

PUBLISHED = train_gpt.Config(**PLAIN)

# -----------------------------------------------------------------------------
# Newton-Schulz


def quintic(s, steps=5):
    """What the iteration does to a singular value, in double precision."""
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return s


def with_singular_values(values, rows, columns, seed=0):
    """float64 matrix, its left and its right singular vectors."""
    generator = torch.Generator().manual_seed(seed)
    kind = dict(dtype=torch.float64, generator=generator)
    u = torch.linalg.qr(torch.randn(rows, len(values), **kind))[0]
    v = torch.linalg.qr(torch.randn(columns, len(values), **kind))[0]
    return u @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ v.T, u, v


def test_newton_schulz_maps_singular_values_as_published():
    published = {0.001: 0.4705, 0.01: 0.6989, 0.05: 0.7581, 0.1: 0.7121, 0.3: 1.0796}
    published |= {0.5: 0.7654, 0.8: 1.1192}  # systems.md 2
    values = list(published)
    values.append(math.sqrt(1 - sum(v * v for v in values)))  # Frobenius norm 1
    matrix, u, v = with_singular_values(values, 12, 20)
    out = train_gpt.newton_schulz(matrix.unsqueeze(0), 5)[0]
    diagonal = (u.T @ out @ v).diagonal()[:-1]
    assert diagonal.tolist() == pytest.approx(list(published.values()), abs=6e-5)
    one = with_singular_values([1.0], 5, 3)[0]
    assert train_gpt.newton_schulz(one.unsqueeze(0), 5)[0].norm() == pytest.approx(0.6964, abs=6e-5)


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(1, 24),
    columns=st.integers(1, 24),
    seed=st.integers(0, 99),
    spread=st.sampled_from([1e-3, 1.0, 1e4]),
)
def test_newton_schulz_against_svd(rows, columns, seed, spread):
    """Same singular vectors, singular values by the quintic of s / (Frobenius norm + 1e-7)."""
    generator = torch.Generator().manual_seed(seed)
    batch = spread * torch.randn(3, rows, columns, generator=generator, dtype=torch.float64)
    out = train_gpt.newton_schulz(batch, 5)
    u, s, vh = torch.linalg.svd(batch, full_matrices=False)
    wanted = u @ torch.diag_embed(quintic(s / (s.norm(dim=-1, keepdim=True) + 1e-7))) @ vh
    torch.testing.assert_close(out, wanted, rtol=0, atol=1e-6)


def test_newton_schulz_orthogonalises_well_conditioned_matrices():
    for shape in ((4, 32, 64), (4, 64, 32), (2, 128, 512)):
        out = train_gpt.newton_schulz(torch.randn(shape), 5)
        values = torch.linalg.svdvals(out)
        assert 0.6 < values.min() and values.max() < 1.25


def test_newton_schulz_keeps_zeros_dtype_and_input():
    batch = torch.randn(2, 6, 4)
    batch[1] = 0
    before = batch.clone()
    for dtype in (torch.float32, torch.bfloat16):
        out = train_gpt.newton_schulz(batch.to(dtype), 5)
        assert out.dtype == dtype and (out[1] == 0).all() and out.shape == batch.shape
    assert torch.equal(batch, before)


# -----------------------------------------------------------------------------
# Muon and AdamW


def bank_gradients(banks, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(bank.shape, generator=generator) for bank in banks]


def matrices(bank):
    """A stack of matrices, or one alone: (n, r, c)"""
    return bank.view(-1, *bank.shape[-2:])


def test_banked_muon_is_torch_s_slice_by_slice(rt, monkeypatch):
    """fp32 Newton-Schulz on both sides (torch's casts to bf16, which is switched off), constant
    momentum; torch scales momentum by 1 - mu, which the normalisation removes. Tolerance 1e-5."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda self: self.clone())
    cfg = tiny(muon_wd=0.1, mlp_mult=2.0)
    torch.manual_seed(0)
    shapes = ((3, 8, 8), (4, 4, 8), (3, 16, 8), (3, 8, 16), (24, 6), (6, 24))  # PR #810's are 2-D
    banks = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    slices = [[torch.nn.Parameter(m.detach().clone()) for m in matrices(bank)] for bank in banks]
    flat = [matrix for bank in slices for matrix in bank]
    oracle = torch.optim.Muon(flat, lr=0.02, weight_decay=0.1, momentum=0.9)
    muon = train_gpt.ParallelMuon(banks, rt, cfg)
    for step in range(4):
        for bank, parts, gradient in zip(banks, slices, bank_gradients(banks, step), strict=True):
            bank.grad = gradient
            for part, own in zip(parts, matrices(gradient), strict=True):
                part.grad = own.clone()
        muon.start_reduce()
        muon.shares()
        muon.step(0.02, 0.9, torch.tensor(False))
        oracle.step()
        for bank, parts in zip(banks, slices, strict=True):
            wanted = torch.stack(parts).detach().view_as(bank)
            torch.testing.assert_close(bank.detach(), wanted, rtol=0, atol=1e-5)


def test_muon_momentum_and_nesterov_by_hand(rt):
    """m <- mu m + g, update NS(g + mu m), at a momentum that changes."""
    cfg, torch_seed = tiny(muon_wd=0.04), torch.manual_seed(0)
    assert torch_seed is not None
    bank = torch.nn.Parameter(torch.randn(3, 6, 10))
    muon, weight = train_gpt.ParallelMuon([bank], rt, cfg), bank.detach().clone()
    buffer = torch.zeros_like(weight)
    for step, momentum in enumerate((0.5, 0.7, 0.9)):
        (gradient,) = bank_gradients([bank], step)
        bank.grad = gradient.clone()
        muon.start_reduce()
        muon.shares()
        muon.step(0.1, momentum, torch.tensor(False))
        buffer = momentum * buffer + gradient
        update = train_gpt.newton_schulz(gradient + momentum * buffer, cfg.muon_backend_steps)
        weight = weight * (1 - 0.1 * 0.04) - 0.1 * update
        torch.testing.assert_close(bank.detach(), weight, rtol=0, atol=1e-5)


def test_zero_matrices_stay_zero(rt):
    bank = torch.nn.Parameter(torch.randn(3, 6, 10))
    with torch.no_grad():
        bank[1] = 0
    muon = train_gpt.ParallelMuon([bank], rt, tiny())
    for step in range(2):
        (bank.grad,) = bank_gradients([bank], step)
        bank.grad[1] = 0
        muon.start_reduce()
        muon.shares()
        muon.step(0.1, 0.9, torch.tensor(False))
    assert (bank[1] == 0).all() and bank[0].norm() > 0


def test_small_parameters_follow_adamw(rt):
    """Each group with its own rate and decay, times the factor; against one AdamW a tensor."""
    cfg = tiny(tied_embed_lr=0.03, scalar_lr=0.02, adam_wd=0.2, beta2=0.9, grad_clip_norm=0.0)
    model = perturbed(cfg)
    optimizers, factors = train_gpt.Optimizers(model, rt, cfg), (1.0, 0.5, 0.1)
    copies = {n: torch.nn.Parameter(w.detach().clone()) for n, w in model.named_parameters()}
    embeds = {"tok_emb", "bigram_embed", "ve_embed"}
    oracles = {
        name: torch.optim.AdamW(
            [copy], 0.03 if name in embeds else 0.02, (0.9, 0.9), cfg.adam_eps, weight_decay=0.2
        )
        for name, copy in copies.items()
        if name not in train_gpt.BANKS
    }
    for step, factor in enumerate(factors):
        gradients = bank_gradients(model.parameters(), step)
        for (name, weight), gradient in zip(model.named_parameters(), gradients, strict=True):
            weight.grad, copies[name].grad = gradient, gradient.clone()
        optimizers.step(step, factor, torch.zeros(()))
        assert all(weight.grad is None for weight in model.parameters())
        for name, oracle in oracles.items():
            oracle.param_groups[0]["lr"] = (0.03 if name in embeds else 0.02) * factor
            oracle.step()
    for name in oracles:
        torch.testing.assert_close(getattr(model, name), copies[name], rtol=1e-5, atol=1e-6)


def test_routing_has_no_decay_and_the_scalars_rate(rt):
    """PolyGLU's slopes follow an AdamW of their own."""
    cfg = tiny(polyglu_enabled=True, scalar_lr=0.02, adam_wd=0.5, grad_clip_norm=0.0)
    model = perturbed(cfg)
    optimizers = train_gpt.Optimizers(model, rt, cfg)
    copy = torch.nn.Parameter(model.routing_alpha.detach().clone())
    oracle = torch.optim.AdamW([copy], 0.02, (0.9, 0.95), cfg.adam_eps, weight_decay=0.0)
    for step in range(3):
        for weight, gradient in zip(
            model.parameters(), bank_gradients(model.parameters(), step), strict=True
        ):
            weight.grad = gradient
        copy.grad = model.routing_alpha.grad.clone()
        optimizers.step(step, 1.0, torch.zeros(()))
        oracle.step()
    torch.testing.assert_close(model.routing_alpha, copy, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("changes", [{}, SIBLINGS])
def test_optimizers_hold_every_parameter_once(rt, changes):
    cfg = tiny(**changes)
    model = perturbed(cfg)
    optimizers = train_gpt.Optimizers(model, rt, cfg)
    held = [id(bank.weight) for bank in optimizers.muon.banks]
    held += [id(w) for group in optimizers.adam.param_groups for w in group["params"]]
    assert sorted(held) == sorted(map(id, model.parameters()))


def test_muon_scales_tall_matrices(rt):
    """max(1, rows / columns)^1/2: the up-projection's is sqrt 3."""
    cfg = tiny()
    optimizers = train_gpt.Optimizers(perturbed(cfg), rt, cfg)
    scales = {tuple(bank.weight.shape): bank.scale for bank in optimizers.muon.banks}
    assert scales[4, 96, 32] == pytest.approx(math.sqrt(3)) and scales[4, 32, 96] == 1


# -----------------------------------------------------------------------------
# Schedules


@given(
    step=st.integers(0, 400),
    iterations=st.integers(1, 400),
    warmdown=st.integers(0, 500),
)
def test_rate_without_a_cap_is_linear_in_steps(step, iterations, warmdown):
    cfg = replace(
        PUBLISHED, iterations=iterations, warmdown_iters=warmdown, max_wallclock_seconds=0.0
    )
    factor = train_gpt.lr_factor(step, 123.0, cfg)
    length = min(warmdown, iterations)
    left = max(iterations - step, 0)
    wanted = 1.0 if left >= length and left else left / max(length, 1)
    assert factor == pytest.approx(min(1.0, wanted)) and 0 <= factor <= 1
    assert factor >= train_gpt.lr_factor(step + 1, 0.0, cfg)


@given(
    step=st.integers(0, 20_000),
    elapsed=st.floats(0, 700),
    warmdown=st.integers(0, 5000),
    cap=st.floats(1, 600),
)
def test_rate_under_a_cap_is_linear_in_time(step, elapsed, warmdown, cap):
    cfg = replace(PUBLISHED, warmdown_iters=warmdown, max_wallclock_seconds=cap)
    factor = train_gpt.lr_factor(step, elapsed, cfg)
    length = warmdown * elapsed / max(step, 1)
    left = max(cap - elapsed, 0.0)
    assert factor == pytest.approx(1.0 if length <= left else left / length)
    assert 0 <= factor <= 1
    if elapsed >= cap and warmdown:
        assert factor == 0


def test_published_warmdown():
    """88.6 ms a step and 3,500 steps: the fall begins about 310 s before the cap."""
    cfg = PUBLISHED
    seconds = [lr for lr in range(1, 600) if train_gpt.lr_factor(int(lr / 0.0886), lr, cfg) < 1]
    assert seconds[0] == pytest.approx(600 - 310, abs=2)
    factors = [train_gpt.lr_factor(int(t / 0.0886), t, cfg) for t in range(1, 601)]
    assert factors == sorted(factors, reverse=True) and factors[-1] == 0


@given(step=st.integers(0, 4000), steps=st.integers(0, 2000))
def test_muon_momentum_rises_linearly(step, steps):
    cfg = tiny(muon_momentum_warmup_steps=steps)
    f = min(step / steps, 1) if steps else min(step, 1)
    wanted = (1 - f) * cfg.muon_momentum_warmup_start + f * cfg.muon_momentum
    assert train_gpt.muon_momentum(step, cfg) == pytest.approx(wanted)


# -----------------------------------------------------------------------------
# Clipping


@pytest.mark.parametrize("limit", [0.0, 0.3, 1e6])
def test_clip_is_torch_s(rt, limit):
    cfg = tiny(grad_clip_norm=limit)
    model, ids = perturbed(cfg), random_ids(cfg)
    model(ids, ids.roll(-1, 1)).backward()
    optimizers = train_gpt.Optimizers(model, rt, cfg)
    copies = [w.grad.clone() for w in optimizers.weights]
    oracle = [torch.nn.Parameter(torch.zeros_like(copy)) for copy in copies]
    for weight, copy in zip(oracle, copies, strict=True):
        weight.grad = copy
    torch.nn.utils.clip_grad_norm_(oracle, limit or math.inf)
    ours = [w.grad for w in optimizers.weights]
    optimizers.clip(ours[:5], ours[5:])  # shards count like the rest
    for gradient, weight in zip(ours, oracle, strict=True):
        torch.testing.assert_close(gradient, weight.grad, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("clip", ["global", "local"])
@pytest.mark.parametrize("where", ["loss", "bank", "gain"])
def test_what_is_not_finite_changes_no_weight(rt, clip, where):
    """Nor Adam's state; the loss says so. One step before, with the same gradients, all change."""
    cfg = tiny(clip=clip)
    model, ids = perturbed(cfg), random_ids(cfg)
    optimizers, loss = train_gpt.Optimizers(model, rt, cfg), torch.ones(())
    for sick in (False, True):
        before = {name: w.detach().clone() for name, w in model.named_parameters()}
        state = [x.clone() for s in optimizers.adam.state.values() for x in s.values()]
        model(ids, ids.roll(-1, 1)).backward()
        if sick and where == "loss":
            loss = loss * math.nan
        elif sick:
            weight = model.qo_bank if where == "bank" else model.q_gain
            weight.grad.view(-1)[3] = math.inf
        assert optimizers.step(0, 1.0, loss).isfinite() != sick
        for name, weight in model.named_parameters():
            assert torch.equal(weight, before[name]) == sick, name
    after = [x for s in optimizers.adam.state.values() for x in s.values()]
    assert all(torch.equal(a, b) for a, b in zip(state, after, strict=True))


# -----------------------------------------------------------------------------
# Averages


# -----------------------------------------------------------------------------
# Ranks and micro-batches


@pytest.fixture
def alone(tmp_path):
    """-> function: weights after some steps of a configuration in this process."""

    def train(steps, **changes):
        cfg = tiny(**changes)
        path = write_shard(tmp_path / "stream_train_000000.bin", STREAM)
        return fixed_steps(cfg, train_gpt.Runtime(cfg), path, steps)

    return train


# Of summing in another order, 3 steps on. The largest is attn_gate_weight's, which starts at 0:
# Adam's first steps are as long for a rounding error as for a gradient.
ROUNDING = 3e-4


def furthest(a, b):
    """Largest difference of a tensor, relative to its largest value; over all tensors."""
    gaps = {name: abs(a[name] - b[name]).max() / abs(a[name]).max() for name in a}
    return max(gaps.values())


def same_bits(a, b):
    return all(a[name].tobytes() == b[name].tobytes() for name in a)


def test_two_ranks_train_as_one(two_ranks, alone):
    first, second = two_ranks["odd"]
    assert same_bits(first, second)
    assert furthest(alone(3, **ODD), first) < ROUNDING
    assert furthest(alone(3, **ODD), alone(2, **ODD)) > 1e-2  # so the bound says something


def test_two_ranks_with_micro_batches_train_as_one(two_ranks, alone):
    first, second = two_ranks["micro"]
    assert same_bits(first, second)
    assert furthest(alone(3, train_batch_tokens=128), first) < ROUNDING


def test_two_ranks_train_the_siblings_switches_as_one(two_ranks, alone):
    first, second = two_ranks["siblings"]
    assert same_bits(first, second)
    assert {"enrich_up", "bigram_proj", "routing_alpha"} <= first.keys()
    assert furthest(alone(3, **SIBLINGS), first) < ROUNDING


@pytest.mark.parametrize("count", [2, 4])
def test_micro_batches_do_not_matter(count, alone):
    assert furthest(alone(3), alone(3, grad_accum_steps=count)) < ROUNDING


def test_local_clipping_is_another_step(two_ranks, alone):
    """Each rank's own norm differs from that of the mean; on one rank they are one."""
    assert same_bits(*two_ranks["local"])
    assert furthest(alone(2, grad_clip_norm=0.05), two_ranks["local"][0]) > 1e-4
    assert furthest(alone(2, clip="local"), alone(2)) < 1e-6


def test_ranks_stay_together_under_a_cap(two_ranks):
    """The clock drives the rate, late QAT and SWA: all ranks must go by one clock."""
    assert same_bits(*two_ranks["capped"])


def test_clock_of_all_is_the_largest(two_ranks):
    """Of 1 and 2, of 0 and -1: no sum, and on both ranks."""
    assert two_ranks["largest"] == [[2, 0], [2, 0]]


def test_logged_loss_is_the_mean_over_ranks(two_ranks, tmp_path):
    """Before the first step, where it is that of the whole batch under fresh weights."""
    cfg, path = tiny(), write_shard(tmp_path / "stream_train_000000.bin", STREAM)
    trainer = new_trainer(cfg, train_gpt.Runtime(cfg), path)
    wanted = trainer.model(*trainer.batches.loader.rows(cfg, trainer.rt)).item()
    (logged,) = re.findall(r"step:1/1000000 train_loss:(\S+)", two_ranks["stdout"])
    assert float(logged) == pytest.approx(wanted, abs=1e-3)


def test_destroyed_process_group_leaves_no_thread(two_ranks):
    """A gloo thread that outlives the group aborts the interpreter at exit, now and then."""
    for names in two_ranks["threads"]:
        assert not [name for name in names if "gloo" in name]


def test_warm_up_leaves_no_trace(tmp_path):
    path = write_shard(tmp_path / "stream_train_000000.bin", random_stream(5000, 64))
    losses = []
    for steps in (0, 3):
        cfg = tiny(warmup_steps=steps)
        trainer = new_trainer(cfg, train_gpt.Runtime(cfg), path)
        trainer.warm_up()
        losses.append([trainer.update(1.0).item() for _ in range(3)])
    assert losses[0] == losses[1]


def test_loss_falls(tmp_path):
    """A text that repeats every 40 tokens is learnt."""
    stream = np.tile(random_stream(39, 64), 100)
    path = write_shard(tmp_path / "stream_train_000000.bin", stream)
    cfg = tiny(iterations=40, train_batch_tokens=256)
    trainer = new_trainer(cfg, train_gpt.Runtime(cfg), path)
    losses = [trainer.update(1.0).item() for _ in range(40)]
    assert losses[-1] < 0.5 * losses[0]
