"""GPTQ and grids by deviation: against closed forms, brute force and torch's own hooks."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import FRONTIER, gptq_payload, perturbed, random_ids, tiny, train_gpt
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks_worker import GPTQ as GPTQ_OF_RANKS

GPTQ = dict(quant="gptq", clip_sigmas=12.85, embed_clip_sigmas=20.0, compressor="range")
SWITCHES = {
    "plain": {},
    "recurrence": dict(depth_recurrence=(1, 2)),
    "frontier": FRONTIER,
    "pre_enrichment": dict(pre_enrich_dim=24),
    "linear": dict(bigram_kind="linear"),
}


def problem(rows, columns, seed, correlated=1.0):
    """-> W (1, r, c), scales (1, r, 1), H (1, c, c) of inputs that go together."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(1, rows, columns, generator=generator)
    mix = torch.eye(columns) + correlated * torch.randn(columns, columns, generator=generator)
    x = torch.randn(4 * columns, columns, generator=generator) @ mix
    scale = weight.std(-1, correction=0, keepdim=True) * 0.4 + 1e-3
    return weight, scale, (x.mT @ x / len(x)).unsqueeze(0)


sizes = st.tuples(st.integers(1, 5), st.integers(1, 40), st.integers(0, 99))


@settings(deadline=None, max_examples=40)
@given(size=sizes, factor=st.floats(1e-6, 1e6))
def test_without_correlation_it_is_rounding_to_nearest(size, factor):
    weight, scale, hessian = problem(*size)
    diagonal = torch.diag_embed(hessian.diagonal(dim1=-2, dim2=-1)) * factor
    for flat in (torch.eye(size[1])[None] * factor, diagonal):
        integers, worse, grown = train_gpt.gptq(weight, scale, 31, flat)
        assert torch.equal(integers, train_gpt.round_to_grid(weight, scale, 31))
        assert not worse.any() and not grown.any()


def test_two_columns_in_closed_form():
    """The second makes up for the first's rounding by b / c of it; damping is in c."""
    weight, scale, _ = problem(50, 2, 0)
    a, b, c = 2.0, 0.9, 1.0
    hessian = torch.tensor([[[a, b], [b, c]]])
    one = (weight[0, :, 0] / scale[0, :, 0]).round()
    error = weight[0, :, 0] - one * scale[0, :, 0]
    other = ((weight[0, :, 1] + error * b / (c + 0.01 * (a + c) / 2)) / scale[0, :, 0]).round()
    wanted = torch.stack([one, other], -1)
    integers, worse, _ = train_gpt.gptq(weight, scale, 10**6, hessian)
    kept = worse[0, :, 0]
    assert torch.equal(integers[0][~kept], wanted[~kept])
    assert (integers[0] != train_gpt.round_to_grid(weight, scale, 10**6)[0]).any()


def least_error(error, hessian, fixed, free):
    """min over the errors of free columns of e H e^T, those of fixed ones given."""
    h = hessian.double().numpy()
    e = np.array(error, float)
    inner = h[np.ix_(free, free)]
    cross = h[np.ix_(free, fixed)] @ e
    best = e @ h[np.ix_(fixed, fixed)] @ e
    return best - (cross @ np.linalg.solve(inner, cross) if free else 0.0)


@pytest.mark.parametrize("columns", [3, 5, 9])
def test_each_integer_is_the_best_while_later_ones_are_free(columns, monkeypatch):
    """By brute force over the column's integers."""
    monkeypatch.setattr(train_gpt, "GPTQ_BLOCK", 4)
    weight, scale, hessian = problem(6, columns, columns)
    damped = hessian[0] + 0.01 * hessian[0].diagonal().mean() * torch.eye(columns)
    order = hessian[0].diagonal().argsort(descending=True).tolist()
    integers, worse, _ = train_gpt.gptq(weight, scale, 7, hessian)
    checked = 0
    for r in itertools.compress(range(6), ~worse[0, :, 0]):
        row, step = weight[0, r].double(), scale[0, r].item()
        errors = []
        for place, column in enumerate(order):
            fixed, free = order[: place + 1], order[place + 1 :]
            costs = []
            for integer in range(-7, 8):
                error = [*errors, (row[column] - integer * step).item()]
                costs.append(least_error(error, damped, fixed, free))
            found = int(integers[0, r, column])
            assert costs[found + 7] <= min(costs) * (1 + 1e-4) + 1e-9
            errors.append((row[column] - found * step).item())
            checked += 1
    assert checked >= columns


@settings(deadline=None, max_examples=40)
@given(size=sizes, bits=st.integers(2, 8), spread=st.sampled_from([0.02, 0.4, 2.0]))
def test_no_row_is_worse_than_rounded_to_nearest(size, bits, spread):
    """Also where a coarse grid ends early, which GPTQ makes more of than it is worth."""
    weight, scale, hessian = problem(*size)
    largest = 2 ** (bits - 1) - 1
    scale = scale * spread
    integers, worse, _ = train_gpt.gptq(weight, scale, largest, hessian)
    nearest = train_gpt.round_to_grid(weight, scale, largest)
    ours = train_gpt.layer_error(weight, integers * scale, hessian)
    theirs = train_gpt.layer_error(weight, nearest * scale, hessian)
    assert (ours <= theirs).all()
    assert (integers.abs() <= largest).all() and (integers == integers.round()).all()
    assert torch.equal(integers[worse[..., 0]], nearest[worse[..., 0]])
    again = train_gpt.gptq(weight, scale, largest, hessian)[0]
    assert torch.equal(integers, again)


def test_some_rows_stay_rounded_to_nearest():
    found = [
        train_gpt.gptq(*problem(40, 12, seed)[:2], 1, problem(40, 12, seed)[2])[1].sum()
        for seed in range(5)
    ]
    assert 0 < sum(found) < 200


def test_held_out_inputs_gain():
    """Not only those that H was made of: the error of fresh ones is smaller, too."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(64, 64, generator=generator)
    x, fresh = (torch.randn(400, 64, generator=generator) @ mix for _ in range(2))
    weight = torch.randn(1, 32, 64, generator=generator)
    scale = weight.std(-1, keepdim=True) * 0.4
    integers = train_gpt.gptq(weight, scale, 31, (x.mT @ x / 400)[None])[0]
    nearest = train_gpt.round_to_grid(weight, scale, 31)
    ours, theirs = (
        ((q * scale - weight)[0] @ fresh.mT).square().mean() for q in (integers, nearest)
    )
    assert ours < 0.7 * theirs


@pytest.mark.parametrize("spoiled", ["indefinite", "zero", "nan"])
def test_what_has_no_root_is_damped_or_rounded_to_nearest(spoiled):
    weight, scale, hessian = problem(4, 6, 0)
    if spoiled == "indefinite":
        hessian = hessian - 3 * torch.eye(6)
    hessian = dict(indefinite=hessian, zero=0 * hessian, nan=hessian * torch.nan)[spoiled]
    both = torch.cat([hessian, problem(4, 6, 1)[2]])  # of two: the other is rounded as by itself
    weights, scales = torch.cat([weight] * 2), torch.cat([scale] * 2)
    integers, worse, grown = train_gpt.gptq(weights, scales, 31, both)
    assert grown.tolist()[1] == 0 and (grown[0] > 0) == (spoiled != "zero")
    assert torch.equal(integers[1], train_gpt.gptq(weight, scale, 31, both[1:])[0][0])
    if spoiled != "indefinite":
        assert torch.equal(integers[0], train_gpt.round_to_grid(weight, scale, 31)[0])


# -----------------------------------------------------------------------------
# Hessians


def applied(model, ids):
    """Inputs and weights of every matrix product of a pass, as torch is asked for them."""
    calls = []

    def linear(x, weight, bias=None):
        calls.append((x.detach().flatten(0, -2), weight.detach()))
        return plain(x, weight, bias)

    plain = F.linear
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(F, "linear", linear)
        hidden = model.hidden(ids)
    return calls, hidden


@pytest.mark.parametrize("name", SWITCHES)
def test_hessians_are_of_what_torch_multiplies(name):
    cfg = tiny(**GPTQ | SWITCHES[name])
    model, rt = perturbed(cfg, spread=0.1).eval(), train_gpt.Runtime(cfg)
    ids = random_ids(cfg, rows=6)
    cfg = tiny(**GPTQ | SWITCHES[name] | dict(calibration_rows=6, train_seq_len=ids.shape[1]))
    found = train_gpt.collect_hessians(model, rt, cfg, ids)
    calls, hidden = applied(model, ids)
    seen = dict(logits=[hidden.flatten(0, 1)])
    weights = train_gpt.layer_weights(model, {})
    for name_of, layers in weights.items():
        for layer, weight in enumerate(layers):
            inputs = [
                x for x, used in calls if used.shape == weight.shape and (used == weight).all()
            ]
            again = layer in cfg.depth_recurrence and name_of in train_gpt.MATRICES
            assert len(inputs) == model.layers.count(layer) + again
            seen.setdefault(name_of, []).append(torch.cat(inputs))
    assert found.keys() == seen.keys() - {"key", "value"}
    for name_of, hessian in found.items():
        wanted = torch.stack([x.mT @ x / ids.numel() for x in seen[name_of]])
        torch.testing.assert_close(hessian, wanted, rtol=1e-4, atol=1e-5)
    specs = train_gpt.parameter_specs(cfg)
    for tensor in SIDES.keys() & specs.keys():  # each matrix is given that of its inputs
        given = torch.cat([found[inputs] for inputs in train_gpt.GPTQ_INPUTS[tensor]])
        inputs = [x for side in SIDES[tensor] for x in seen[side]]
        wanted = torch.stack([x.mT @ x / ids.numel() for x in inputs])
        torch.testing.assert_close(given, wanted, rtol=1e-4, atol=1e-5)
        assert len(given) == math.prod(specs[tensor].shape[:-2])


# Halves of the banks, in the order of layer_weights.
SIDES = dict(
    qo_bank=("query", "output"),
    kv_bank=("key", "value"),
    mlp_up_bank=("up",),
    mlp_down_bank=("down",),
    enrich_up=("enrich_up",),
    enrich_down=("enrich_down",),
    tok_emb=("logits",),
)


def test_every_matrix_of_the_artifact_has_its_hessian():
    """What Context applies is what GPTQ_INPUTS lists, and all of a bank."""
    for changes in SWITCHES.values():
        cfg = tiny(**changes)
        specs = train_gpt.parameter_specs(cfg)
        matrices = {n for n, s in specs.items() if s.group == "muon" and "bigram" not in n}
        assert matrices | {"tok_emb"} == specs.keys() & train_gpt.GPTQ_INPUTS.keys()


def test_a_rank_without_rows_adds_nothing():
    """Where CALIBRATION_ROWS are fewer than ranks."""
    cfg = tiny(**GPTQ)
    model, rt = perturbed(cfg).eval(), train_gpt.Runtime(cfg)
    rows = random_ids(cfg)
    found = train_gpt.collect_hessians(model, rt, cfg, rows[:0])
    assert found.keys() == train_gpt.collect_hessians(model, rt, cfg, rows).keys()
    assert not any(hessian.any() for hessian in found.values())


def test_calibration_rows_are_shared_by_ranks(tmp_path):
    cfg = tiny(**GPTQ | dict(calibration_rows=5, calibration="random"))
    ranks = [SimpleNamespace(rank=rank, world_size=2) for rank in range(2)]
    parts = [train_gpt.calibration_rows(cfg, rank, []) for rank in ranks]
    alone = train_gpt.calibration_rows(cfg, SimpleNamespace(rank=0, world_size=1), [])
    assert torch.equal(torch.cat(parts), torch.cat([alone[::2], alone[1::2]]))
    assert alone.shape == (5, cfg.train_seq_len) and 0 <= alone.min() < alone.max() < cfg.vocab_size


def test_two_ranks_round_as_one(two_ranks):
    """Each takes every other matrix; all integers end on both."""
    first, second = two_ranks["gptq"]
    cfg = tiny(**GPTQ_OF_RANKS)
    alone = gptq_payload(cfg, train_gpt.Runtime(cfg))
    assert first.keys() == second.keys() == alone.keys() and first["rows"] == alone["rows"] > 0
    for name, array in first.items():
        assert (array == second[name]).all(), name
        if name != "payload":
            np.testing.assert_allclose(array, alone[name], rtol=1e-4, atol=1e-5)
    assert (first["payload"] == alone["payload"]).mean() > 0.999


# -----------------------------------------------------------------------------
# Grids by deviation


@settings(deadline=None, max_examples=40)
@given(size=sizes, sigmas=st.floats(0.5, 40.0), bits=st.integers(4, 8))
def test_a_step_is_so_many_deviations(size, sigmas, bits):
    weight = problem(*size)[0]
    cfg = tiny(clip_sigmas=sigmas, embed_clip_sigmas=2 * sigmas, matrix_coding=f"int{bits}")
    for group, factor in (("muon", 1), ("embed", 2)):
        spec = train_gpt.Spec(weight.shape, 0.0, group, f"int{bits}")
        scale = train_gpt.choose_scales(weight, spec, cfg)
        end = factor * sigmas * weight.double().square().mean(-1, keepdim=True).sqrt()
        wanted = end / (2 ** (bits - 1) - 1)
        assert scale.shape == (1, size[0], 1) and torch.equal(scale, scale.half().float())
        large = wanted > 1e-4
        assert ((scale / wanted - 1).abs()[large] <= 1 / 64 + 1e-3).all()
        assert (scale > 0).all()


@pytest.mark.parametrize("sigmas", [1.0, 12.85, 1e4])
@pytest.mark.parametrize("value", [0.0, 1e-7, 0.37, -2.0, 3e4])
def test_constant_rows_and_single_columns_come_back(sigmas, value):
    """A deviation about 0: about the mean it is 0 where a row is constant. To half a step, and with
    scales that half precision holds."""
    cfg = tiny(clip_sigmas=sigmas)
    for shape in ((2, 3, 8), (2, 5, 1)):
        weight = torch.full(shape, value)
        scale = train_gpt.choose_scales(weight, train_gpt.Spec(shape, 0.0, "muon", "int6"), cfg)
        assert scale.isfinite().all() and (scale > 0).all()
        assert (scale.half().view(torch.int16) % 32 == 0).all()  # 5 bits of fraction
        rounded = train_gpt.round_to_grid(weight, scale, 31) * scale
        assert ((rounded - weight).abs() <= scale / 2 * 1.001).all()


def test_other_tensors_reach_to_their_largest():
    spec = train_gpt.Spec((3, 8), 0.0, "scalar", "int8")
    weight = torch.randn(3, 8)
    scale = train_gpt.choose_scales(weight, spec, tiny(clip_sigmas=1.0))
    torch.testing.assert_close(scale[:, 0] * 127, weight.abs().amax(-1), rtol=1e-3, atol=0)


def test_zero_clips_are_the_published_search():
    weight = torch.randn(4, 30) ** 3
    for group, coding in (("muon", "int6"), ("embed", "int8")):
        spec = train_gpt.Spec(weight.shape, 0.0, group, coding)
        wanted = train_gpt.search_grid(weight, coding, tiny())
        assert torch.equal(train_gpt.choose_scales(weight, spec, tiny()), wanted)
