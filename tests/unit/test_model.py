"""The model against a plain one, its switches, its causality and its start."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import FRONTIER, PLAIN, enrichment_change, perturbed, random_ids, tiny, train_gpt
from hypothesis import given, settings
from hypothesis import strategies as st

BOS = train_gpt.BOS
# Every linear layer, which #810's training rounds; the artifact holds the projections in 16 bits.
QUANTISED = (*train_gpt.BANKS, "enrich_up", "enrich_down", "bigram_proj", "ve_proj")

# -----------------------------------------------------------------------------
# A plain model: one matrix a name, one layer after the other, attention by its definition


def on_row_grid(weight):
    """Each row in 63 steps of its largest value / 31 (PR #810's training)."""
    step = weight.abs().amax(-1, keepdim=True) / 31
    return (weight / step).round() * step


def unbank(model):
    """The matrices of each layer under their classic names."""
    w = {name: value.detach().double() for name, value in model.named_parameters()}
    if model.cfg.qat_enabled and model.training:
        w |= {name: on_row_grid(w[name]) for name in QUANTISED if name in w}
    count = model.cfg.num_layers
    for i in range(count):
        w[f"q{i}"], w[f"o{i}"] = w["qo_bank"][i], w["qo_bank"][count + i]
        w[f"k{i}"], w[f"v{i}"] = w["kv_bank"][i], w["kv_bank"][count + i]
        w[f"up{i}"], w[f"down{i}"] = w["mlp_up_bank"][i], w["mlp_down_bank"][i]
    return w


def norm(x):
    return x / (x.pow(2).mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).sqrt()


def plain_bigram(cfg, w, token, before):
    """What a pair adds to the embedding; before: the token before, None at a document's start."""
    if cfg.bigram_kind == "linear":
        index = (92821 * (before or 0) + token) % cfg.bigram_vocab_size
        return w["bigram_proj"] @ w["bigram_embed"][index]
    index = last = cfg.bigram_vocab_size - 1
    if before is not None:
        index = ((36313 * token) ^ (27191 * before)) % last
    return w["bigram_scale"] * (w["bigram_proj"] @ w["bigram_embed"][index])


def plain_enrichment(cfg, w, x):
    """Token + bigram -> smear -> enrichment -> norm (PR #810), in place of norm -> smear."""
    if not cfg.pre_enrich_dim:
        return x
    up = w["enrich_up"] @ x
    return norm(w["enrich_down"] @ (up * (1 + torch.erf(up / math.sqrt(2))) / 2))


def plain_embed(cfg, w, ids):
    """(T,) -> (T, D)"""
    rows, smeared, tokens = [], [], ids.tolist()
    gate = w["smear"].sigmoid() if cfg.smear_gate else 0.0
    for t, token in enumerate(tokens):
        alone = t == 0 or (cfg.bos_reset and token == BOS)
        row = w["tok_emb"][token].clone()
        if cfg.bigram_vocab_size:
            row += plain_bigram(cfg, w, token, None if alone else tokens[t - 1])
        rows.append(row if cfg.pre_enrich_dim else norm(row))
        before = torch.zeros_like(row) if alone else rows[t - 1]
        smeared.append((1 - gate) * rows[t] + gate * before)
    return torch.stack([plain_enrichment(cfg, w, x) for x in smeared])


def embed(model, ids):
    return model.embed(ids, train_gpt.Context(model, ids))


def bigram_index(model, ids, starts):
    with torch.no_grad():
        return model.bigram_index(ids, starts, train_gpt.Context(model, ids))


def turned(cfg, vector, position):
    """One head's vector, its first rope_dims dimensions rotated by their position."""
    dims = cfg.rope_dims or len(vector)
    stretch = max(1.0, cfg.train_seq_len / cfg.rope_train_seq_len)
    base = cfg.rope_base * stretch ** (dims / (dims - 2))
    out = vector.clone()
    for i in range(dims // 2):
        angle = position * base ** (-2 * i / dims)
        a, b = vector[i].item(), vector[i + dims // 2].item()
        out[i] = a * math.cos(angle) + b * math.sin(angle)
        out[i + dims // 2] = -a * math.sin(angle) + b * math.cos(angle)
    return out


def plain_attention(cfg, w, i, h, ids, first_values):
    """(T, D) -> (T, D), this layer's values (T, H_kv, d)"""
    size, group = cfg.model_dim // cfg.num_heads, cfg.num_heads // cfg.num_kv_heads
    v = h @ w[f"v{i}"].T
    if cfg.ve_enabled and i in [n % cfg.num_layers for n in cfg.ve_layers]:
        row = [n % cfg.num_layers for n in cfg.ve_layers].index(i)
        extra = w["ve_embed"][ids] @ w["ve_proj"].T
        v = v + w["ve_layer_scales"][row] * w["ve_scale"] * extra
    v = v.view(len(h), cfg.num_kv_heads, size)
    if cfg.value_residual and i:
        v = w["vr_lambda"][i, 0] * first_values + w["vr_lambda"][i, 1] * v
    heads = []
    for head in range(cfg.num_heads):
        kv = head // group
        q = norm((h @ w[f"q{i}"].T).view(len(h), cfg.num_heads, size)[:, head])
        k = norm((h @ w[f"k{i}"].T).view(len(h), cfg.num_kv_heads, size)[:, kv])
        q = torch.stack([turned(cfg, row, t) for t, row in enumerate(q)]) * w["q_gain"][i, head]
        k = torch.stack([turned(cfg, row, t) for t, row in enumerate(k)])
        scores = q @ k.T / math.sqrt(size)
        unseen = torch.ones(len(h), len(h)).triu(1).bool()
        if cfg.doc_attention:
            document = (ids == BOS).cumsum(0).tolist()
            unseen |= torch.tensor([[a != b for a in document] for b in document])
        y = scores.masked_fill(unseen, -math.inf).softmax(-1) @ v[:, kv]
        if i >= cfg.num_layers - cfg.xsa_last_n:
            own = v[:, kv] / v[:, kv].norm(dim=-1, keepdim=True)
            y = y - (y * own).sum(-1, keepdim=True) * own
        if cfg.gated_attention:
            some = h[:, : cfg.gate_inputs] if cfg.gate_inputs else h
            gate = some @ w["attn_gate_weight"][i, head] + w["attn_gate_bias"][i, head]
            y = y * gate.sigmoid().unsqueeze(-1)
        heads.append(y)
    return torch.cat(heads, -1) @ w[f"o{i}"].T, v


def plain_block(cfg, w, i, x, x0, ids, first_values):
    scale = 1 / math.sqrt(i + 1) if cfg.ln_scale else 1.0
    x = w["resid_mix"][i, 0] * x + w["resid_mix"][i, 1] * x0
    out, v = plain_attention(cfg, w, i, norm(x) * scale, ids, first_values)
    before, x = x, x + w["attn_scale"][i] * out
    parallel = cfg.parallel_from >= 0 and i >= cfg.parallel_from
    up = (norm(before if parallel else x) * scale) @ w[f"up{i}"].T
    slope = w["routing_alpha"][i].sigmoid() if cfg.polyglu_enabled else cfg.leaky_slope
    activation = (up.relu() + slope * (up - up.relu())) ** 2
    return x + w["mlp_scale"][i] * (activation @ w[f"down{i}"].T), v


def plain_logits(cfg, w, ids, looped=True):
    """(T,) -> (T, V)"""
    x = x0 = plain_embed(cfg, w, ids)
    layers = [*range(cfg.num_layers)]
    if cfg.loop_layers and looped:
        first, last = map(int, cfg.loop_layers.split("-"))
        layers[first : last + 1] = layers[first : last + 1] * cfg.loop_times
    half, skips, first_values = len(layers) // 2, [], None
    for place, i in enumerate(layers):
        if place >= half and skips:
            skip = w["skip_weights"][place - half] * skips.pop()
            gate = w["skip_gates"][place - half].sigmoid() if cfg.skip_gates else None
            x = x + skip if gate is None else (1 - gate) * skip + gate * x
        x, v = plain_block(cfg, w, i, x, x0, ids, first_values)
        first_values = v if first_values is None else first_values
        if i in cfg.depth_recurrence:  # after the skip is added, before the output is pushed
            x, _ = plain_block(cfg, w, i, x, x0, ids, first_values)
        if place < half:
            skips.append(x)
    cap = cfg.logit_softcap
    return cap * torch.tanh(norm(x) @ w["tok_emb"].T / cap)


SWITCHES = {
    "ln_scale": dict(ln_scale=False),
    "xsa_last_n": dict(xsa_last_n=0),
    "xsa_everywhere": dict(xsa_last_n=4),
    "value_residual": dict(value_residual=False),
    "gated_attention": dict(gated_attention=False),
    "smear_gate": dict(smear_gate=False),
    "bos_reset": dict(bos_reset=False),
    "bigram_vocab_size": dict(bigram_vocab_size=0),
    "bigram_rows": dict(bigram_vocab_size=47),
    "ve_enabled": dict(ve_enabled=False),
    "ve_layers": dict(ve_layers=(1, -1)),
    "num_heads": dict(num_heads=2, num_kv_heads=1),
    "num_kv_heads": dict(num_kv_heads=4),
    "rope_dims": dict(rope_dims=0),
    "rope_base": dict(rope_base=100.0),
    "rope_train_seq_len": dict(rope_train_seq_len=16),
    "leaky_slope": dict(leaky_slope=0.0),
    "logit_softcap": dict(logit_softcap=2.0),
    "mlp_mult": dict(mlp_mult=2.0),
    "five_layers": dict(num_layers=5),
    "three_layers": dict(num_layers=3),
    "depth_recurrence": dict(depth_recurrence=(1, 2)),  # the last encoder, the first decoder layer
    "recurrent_ends": dict(num_layers=5, depth_recurrence=(0, 4)),
    "polyglu_enabled": dict(polyglu_enabled=True),
    "pre_enrich_dim": dict(pre_enrich_dim=24),
    "pre_enrich_across": dict(pre_enrich_dim=24, bos_reset=False),
    "bigram_kind": dict(bigram_kind="linear"),
    "linear_across": dict(bigram_kind="linear", bos_reset=False),
    "qat_enabled": dict(qat_enabled=True),
    "qat_enriched": dict(qat_enabled=True, pre_enrich_dim=24),
    "qat_linear": dict(qat_enabled=True, bigram_kind="linear"),
    "doc_attention": dict(doc_attention=True),
    "loop_layers": dict(loop_layers="1-2"),
    "loops_of_one": dict(loop_layers="0-0", loop_times=2, num_layers=5),
    "loops_of_all": dict(loop_layers="0-3", loop_times=2),
    "parallel_from": dict(parallel_from=2),
    "parallel_everywhere": dict(parallel_from=0),
    "skip_gates": dict(skip_gates=True),
    "gate_inputs": dict(gate_inputs=6),
    "frontier": FRONTIER,
}


@pytest.mark.parametrize("name", ["all_on", *SWITCHES])
def test_model_is_the_plain_model(name):
    cfg = tiny(**SWITCHES.get(name, {}))
    model = perturbed(cfg).double()
    ids = random_ids(cfg, rows=2)
    ids[1, 5:7] = BOS  # two documents, one of them empty
    with torch.no_grad():
        logits = model.logits(model.hidden(ids))
        wanted = torch.stack([plain_logits(cfg, unbank(model), row) for row in ids])
    torch.testing.assert_close(logits, wanted, rtol=0, atol=2e-5)


def test_before_the_switch_it_is_the_plain_u_net():
    cfg = tiny(**FRONTIER)
    model = perturbed(cfg).double()
    ids = random_ids(cfg, rows=1)
    outputs = {}
    for looped in (False, True):
        model.set_looped(looped)
        with torch.no_grad():
            outputs[looped] = model.logits(model.hidden(ids))[0]
            wanted = plain_logits(cfg, unbank(model), ids[0], looped)
        torch.testing.assert_close(outputs[looped], wanted, rtol=0, atol=2e-5)
    assert (outputs[True] - outputs[False]).abs().max() > 1e-2


def test_loss_is_the_mean_cross_entropy():
    cfg = tiny()
    model, ids = perturbed(cfg).double(), random_ids(cfg, rows=2)
    targets = ids.roll(-1, 1)
    with torch.no_grad():
        logits = torch.stack([plain_logits(cfg, unbank(model), row) for row in ids])
        loss = model(ids, targets).item()
    picked = logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1))
    assert loss == pytest.approx(-picked.mean().item(), abs=1e-5)


# -----------------------------------------------------------------------------
# Switches


@pytest.mark.parametrize("name", SWITCHES)
def test_every_switch_changes_the_output(name):
    """The same weights where both have them, the switch aside."""
    with_it, without = tiny(), tiny(**SWITCHES[name])
    model, other, ids = perturbed(with_it), perturbed(without), random_ids(with_it)
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for key, weight in other.named_parameters():
            if key in weights and weight.shape == weights[key].shape:
                weight.copy_(weights[key])
        a, b = (m.logits(m.hidden(ids)) for m in (model, other))
    assert (a - b).abs().max() > 1e-3


def gradients(cfg):
    """name -> gradient of the loss, at random weights."""
    model, ids = perturbed(cfg), random_ids(cfg)
    model(ids, ids.roll(-1, 1)).backward()
    return {name: weight.grad for name, weight in model.named_parameters()}


@pytest.mark.parametrize("name", ["all_on", *SWITCHES])
def test_every_parameter_gets_gradients(name):
    cfg = tiny(**SWITCHES.get(name, {}))
    for key, gradient in gradients(cfg).items():
        assert gradient is not None and gradient.isfinite().all(), key
        if key == "vr_lambda":
            assert (gradient[0] == 0).all()  # the first layer keeps its own values
            gradient = gradient[1:]
        rows = gradient.flatten(1) if gradient.dim() > 1 else gradient.view(-1, 1)
        dead = (rows == 0).all(1)
        tables = ("tok_emb", "bigram_embed", "ve_embed")  # rows that the batch does not name
        assert not dead.any() or (key in tables and not dead.all()), key


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("value_residual", {"vr_lambda"}),
        ("gated_attention", {"attn_gate_weight", "attn_gate_bias"}),
        ("smear_gate", {"smear"}),
        ("bigram_vocab_size", {"bigram_embed", "bigram_proj", "bigram_scale"}),
        ("ve_enabled", {"ve_embed", "ve_proj", "ve_scale", "ve_layer_scales"}),
    ],
)
def test_switched_off_leaves_no_parameters(name, parameters):
    specs = (set(train_gpt.parameter_specs(cfg)) for cfg in (tiny(), tiny(**SWITCHES[name])))
    on, off = specs
    assert on - off == parameters and off < on


def test_siblings_parameters_are_absent_unless_asked_for():
    specs = {name: set(train_gpt.parameter_specs(tiny(**SWITCHES[name]))) for name in SWITCHES}
    plain = set(train_gpt.parameter_specs(tiny()))
    assert specs["polyglu_enabled"] - plain == {"routing_alpha"}
    assert specs["pre_enrich_dim"] - plain == {"enrich_up", "enrich_down"}
    assert plain - specs["bigram_kind"] == {"bigram_scale"} and specs["bigram_kind"] < plain
    assert specs["depth_recurrence"] == specs["qat_enabled"] == plain
    same = "doc_attention", "loop_layers", "parallel_from", "gate_inputs"
    assert all(specs[name] == plain for name in same)
    assert specs["skip_gates"] - plain == {"skip_gates"}


# -----------------------------------------------------------------------------
# The siblings' switches by their own definitions


def shared_weights(cfg, source):
    """A model of `cfg` with the weights of `source` that it has too."""
    model = perturbed(cfg)
    model.load_state_dict(dict(source.named_parameters()), strict=False)
    return model


def output(model, ids):
    with torch.no_grad():
        return model.logits(model.hidden(ids))


def test_polyglu_at_zero_is_the_leaky_square():
    """sigmoid(0) = 0.5, to the last bit; at other values it is another slope for each neuron."""
    cfg, ids = tiny(polyglu_enabled=True), random_ids(tiny())
    model = perturbed(tiny())
    routed = shared_weights(cfg, model)
    assert not torch.equal(output(routed, ids), output(model, ids))
    with torch.no_grad():
        routed.routing_alpha.zero_()
    assert torch.equal(output(routed, ids), output(model, ids))
    assert train_gpt.parameter_specs(cfg)["routing_alpha"].shape == (4, 96)
    assert train_gpt.optimizer_groups(cfg)["routing"] == (["routing_alpha"], cfg.scalar_lr, 0.0)


def test_slope_zero_is_the_square_of_relu(monkeypatch):
    """One block, with W_up = W_down = 1 and what it adds to a negative and a positive input."""
    square = dict(model_dim=8, mlp_mult=1.0, num_layers=2, ve_layers=(1,), rope_dims=2)
    cfg, up = tiny(**square, leaky_slope=0.0), torch.tensor([-2.0, -0.5, 0.0, 0.5, 2.0, 1, 1, -1])
    model, shared = perturbed(cfg), SimpleNamespace(x0=torch.zeros(1, 1, 8))
    weights = dict(up=up.diag(), down=torch.eye(8))
    shared.linear = lambda name, x, _: torch.nn.functional.linear(x, weights[name])
    monkeypatch.setattr(train_gpt.GPT, "attention", lambda *_: torch.zeros(1, 1, 8))
    with torch.no_grad():
        for name, value in (("resid_mix", 1.0), ("attn_scale", 1.0), ("mlp_scale", 1.0)):
            getattr(model, name).fill_(value)
        ones = torch.ones(1, 1, 8)
        added = model.block(0, ones, shared) - ones
    torch.testing.assert_close(added[0, 0], up.clamp(min=0) ** 2, rtol=1e-5, atol=0)


def test_recurrence_costs_nothing_and_repeats_the_layer():
    """Twice the same layer is what two layers of the same weights are, where the place between
    them is that of no skip: layer 2 of 3 of a model whose layer 3 is a copy."""
    base = dict(ve_enabled=False, ln_scale=False, xsa_last_n=9, value_residual=False)
    once, twice = tiny(**base, num_layers=4), tiny(**base, num_layers=3, depth_recurrence=(2,))
    model, other = perturbed(twice), perturbed(once)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            target = getattr(other, name)
            if weight.shape == target.shape:
                target.copy_(weight)
            elif name in ("qo_bank", "kv_bank"):
                target.copy_(weight[[0, 1, 2, 2, 3, 4, 5, 5]])
            elif name != "skip_weights":
                target.copy_(weight[[0, 1, 2, 2]])
        other.skip_weights.zero_()
        model.skip_weights.zero_()
    ids = random_ids(once)
    torch.testing.assert_close(output(model, ids), output(other, ids), rtol=0, atol=1e-5)
    assert train_gpt.count_parameters(tiny(depth_recurrence=(1, 2))) == train_gpt.count_parameters(
        tiny()
    )


def test_change_is_the_distance_that_enrichment_moves():
    """Before the norm, at each position."""
    cfg = tiny(pre_enrich_dim=24)
    model, ids = perturbed(cfg).double(), random_ids(cfg, rows=2)
    w = unbank(model)
    for row in ids:
        moved = enrichment_change(model, np.append(row.numpy(), 0))
        assert moved.shape == row.shape and moved.dtype == np.float64
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(globals(), "plain_enrichment", lambda cfg, w, x: x)
            plain = plain_embed(cfg, w, row)
        up = plain @ w["enrich_up"].T
        enriched = torch.nn.functional.gelu(up) @ w["enrich_down"].T
        wanted = (enriched - plain).norm(dim=-1).detach().numpy()
        np.testing.assert_allclose(moved, wanted, rtol=1e-5)


def test_smear_start_is_the_sibling_s_convention():
    """#810 keeps sigmoid(3) of the token and takes the rest from the one before."""
    cfg = tiny(smear_init=-3.0, bigram_vocab_size=0)
    torch.manual_seed(0)
    model, ids = train_gpt.GPT(cfg).initialise(), random_ids(cfg)
    keep = 1 / (1 + math.exp(-3))
    with torch.no_grad():
        x, got = norm(model.tok_emb[ids]), embed(model, ids)
    before = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)
    before[ids == BOS] = 0
    torch.testing.assert_close(got, keep * x + (1 - keep) * before, rtol=0, atol=1e-5)


# -----------------------------------------------------------------------------
# Quantisation from step 0 (PR #810)

QAT = dict(qat_enabled=True, late_qat=False, pre_enrich_dim=24)


def test_qat_weights_lie_on_their_rows_grid_while_training():
    model = perturbed(tiny(**QAT))
    for name in QUANTISED:
        weight, seen = getattr(model, name), model.bank(name)
        steps = (seen / (weight.abs().amax(-1, keepdim=True) / 31)).detach()
        assert (steps - steps.round()).abs().max() < 1e-4 and steps.abs().max() < 31.001, name
        assert not torch.equal(seen, weight)
        assert (seen - weight).abs().max() <= weight.abs().max() / 62 * 1.001
    model.eval()
    for name in QUANTISED:
        assert torch.equal(model.bank(name), getattr(model, name)), name


@pytest.mark.parametrize("kind", ["xor", "linear"])
def test_qat_gradient_goes_straight_through(kind):
    """The gradients are those of a model without QAT whose weights lie on the grid."""
    cfg = tiny(**QAT | dict(bigram_kind=kind))
    without = tiny(pre_enrich_dim=24, bigram_kind=kind)
    model, plain, ids = perturbed(cfg), perturbed(without), random_ids(cfg)
    with torch.no_grad():
        for name in QUANTISED:
            getattr(plain, name).copy_(on_row_grid(getattr(plain, name)))
    losses = [m(ids, ids.roll(-1, 1)) for m in (model, plain)]
    for loss in losses:
        loss.backward()
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
    for (name, a), b in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("qat", [True, False])
def test_qat_reaches_the_weights_of_every_linear_layer(qat, monkeypatch):
    """All that F.linear is given, but the tied embedding and the gates, which #810 has not; late
    QAT, which is on here, leaves the projections alone."""
    cfg = tiny(**QAT | dict(qat_enabled=qat, late_qat=not qat))
    model, ids, seen = perturbed(cfg), random_ids(cfg), []
    train_gpt.update_qat_grids(model, cfg)
    linear = train_gpt.F.linear

    def watched(x, weight, *bias):
        seen.append(weight.detach().clone())
        return linear(x, weight, *bias)

    monkeypatch.setattr(train_gpt.F, "linear", watched)
    model(ids, ids.roll(-1, 1))
    gates = [w.detach() for w in (model.tok_emb, *model.attn_gate_weight)]
    used = [w for w in seen if not any(w.equal(gate) for gate in gates)]
    assert len(used) == 6 * cfg.num_layers + 4 and len(seen) == len(used) + len(gates)
    raw = [model.bigram_proj.detach(), model.ve_proj.detach()]
    untouched = [w for w in used if any(w.equal(weight) for weight in raw)]
    assert len(untouched) == (0 if qat else 2)
    if qat:
        for weight in used:
            torch.testing.assert_close(on_row_grid(weight), weight, rtol=0, atol=1e-5)


# -----------------------------------------------------------------------------
# Causality and documents


@settings(deadline=None, max_examples=20)
@given(place=st.integers(0, 15), seed=st.integers(1, 99))
def test_later_tokens_leave_every_bit_before_them(place, seed):
    cfg = tiny(pre_enrich_dim=24, depth_recurrence=(1,), polyglu_enabled=True)
    model, ids = perturbed(cfg), random_ids(cfg)
    other = ids.clone()
    other[:, place:] = random_ids(cfg, seed=seed)[:, place:]
    with torch.no_grad():
        a, b = model.hidden(ids), model.hidden(other)
    assert torch.equal(a[:, :place], b[:, :place])


def test_rows_of_a_batch_do_not_mix():
    cfg = tiny()
    model, ids = perturbed(cfg), random_ids(cfg)
    other = ids.clone()
    other[1] = random_ids(cfg, seed=5)[1]
    with torch.no_grad():
        a, b = model.hidden(ids), model.hidden(other)
    assert torch.equal(a[[0, 2]], b[[0, 2]]) and not torch.equal(a[1], b[1])


@pytest.mark.parametrize("kind", ["xor", "linear"])
@pytest.mark.parametrize("reset", [True, False])
def test_bos_reset_stops_smear_and_bigram(reset, kind):
    """The embedding at a document's start, and that alone, depends on the token before or not."""
    cfg = tiny(bos_reset=reset, bigram_kind=kind)
    model, ids = perturbed(cfg), random_ids(cfg)
    start = cfg.train_seq_len // 2
    assert (ids[:, start] == BOS).all()
    other = ids.clone()
    other[:, start - 1] = ids[:, start - 1] % 60 + 2
    with torch.no_grad():
        a, b = embed(model, ids), embed(model, other)
    assert torch.equal(a[:, start], b[:, start]) == reset
    after = start + (1 if reset else 2)  # the smear takes what the bigram did one token further
    assert torch.equal(a[:, after:], b[:, after:])
    middle = ids.clone()
    middle[:, 3] = ids[:, 3] % 60 + 2
    with torch.no_grad():
        assert not torch.equal(embed(model, middle)[:, 4], a[:, 4])


@pytest.mark.parametrize("changes", [{}, dict(bigram_kind="linear", pre_enrich_dim=24)])
def test_a_document_starts_like_the_text(changes):
    """After a BOS in the middle the embedding is that of the same tokens at the beginning."""
    cfg = tiny(**changes)
    model, ids = perturbed(cfg), random_ids(cfg)
    start = cfg.train_seq_len // 2
    with torch.no_grad():
        whole, part = embed(model, ids), embed(model, ids[:, start:])
    torch.testing.assert_close(whole[:, start:], part, rtol=0, atol=1e-6)


# -----------------------------------------------------------------------------
# Parts

PAIRS = [(5, 7), (1023, 1), (1, 1023), (512, 300)]  # systems.md 7.1


@pytest.mark.parametrize(
    ("rows", "wanted"),
    [
        (1024, [121, 617, 482, 232]),
        (1536, [591, 752, 660, 349]),
        (2048, [1082, 310, 752, 664]),
    ],
)
def test_bigram_hash_vectors(rows, wanted):
    model = train_gpt.GPT(tiny(vocab_size=1024, bigram_vocab_size=rows))
    ids = torch.tensor(PAIRS)
    index = bigram_index(model, ids, torch.zeros_like(ids, dtype=torch.bool))
    assert index[:, 1].tolist() == wanted and index[:, 0].tolist() == [rows - 1] * 4
    assert bigram_index(model, ids, ids >= 0).tolist() == [[rows - 1] * 2] * 4


def test_linear_bigram_vectors():
    """#810's; the token before the first is 0."""
    model = train_gpt.GPT(tiny(vocab_size=1024, bigram_vocab_size=2048, bigram_kind="linear"))
    ids = torch.tensor(PAIRS)
    index = bigram_index(model, ids, torch.zeros_like(ids, dtype=torch.bool))
    assert index[:, 1].tolist() == [1264, 364, 1684, 812]
    assert index[:, 0].tolist() == ids[:, 0].tolist()
    assert torch.equal(bigram_index(model, ids, ids >= 0), ids)


def test_bigram_hash_stays_in_its_table_when_int32_wraps():
    model = train_gpt.GPT(tiny(vocab_size=65_536, bigram_vocab_size=48))
    ids = torch.randint(0, 65_536, (8, 400), generator=torch.Generator().manual_seed(0))
    index = bigram_index(model, ids, ids < 0)
    assert index.min() >= 0 and index.max() == 47
    assert (index[:, 1:] < 47).all() and len(index.unique()) == 48


def test_ntk_base_is_the_published_one():
    cfg = train_gpt.Config(train_seq_len=2048, rope_dims=16)
    cos, sin = (table.double() for table in train_gpt.rotary_table(cfg, torch.arange(4096)))
    assert cos.shape == sin.shape == (4096, 8)
    angle = torch.atan2(sin[1, 4], cos[1, 4]).item()  # base^(-8/16)
    assert angle**-2 == pytest.approx(22_081.79, abs=0.01)
    unstretched = train_gpt.rotary_table(train_gpt.Config(train_seq_len=1024), torch.arange(8))[1]
    assert math.asin(unstretched[1, 4]) ** -2 == pytest.approx(10_000, abs=0.01)
    places = torch.arange(4096).double()
    torch.testing.assert_close(cos[:, 0], places.cos(), rtol=0, atol=1e-6)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 99), dims=st.sampled_from([2, 4, 8]))
def test_rotation_keeps_lengths_and_sees_only_distance(seed, dims):
    generator = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, 1, 1, 1, 8, generator=generator).double()
    cfg = tiny(num_heads=4, rope_dims=dims)
    cos, sin = (table.double() for table in train_gpt.rotary_table(cfg, torch.arange(40)))
    places = torch.arange(40)
    qs, ks = (train_gpt.rotate(x.expand(1, 1, 40, 8), cos, sin)[0, 0] for x in (q, k))
    torch.testing.assert_close(qs.norm(dim=-1), q.norm().expand(40))
    assert torch.equal(qs[:, dims:], q[0, 0].expand(40, 8)[:, dims:])
    products = qs @ ks.T
    torch.testing.assert_close(
        products[places[5:], places[:-5]], products[5, 0].expand(35), rtol=0, atol=1e-5
    )


def test_rotation_turns_the_published_way():
    cos, sin = torch.tensor([[0.6]]), torch.tensor([[0.8]])
    x = torch.tensor([1.0, 2.0, 3.0]).view(1, 1, 1, 3)
    wanted = [0.6 + 1.6, -0.8 + 1.2, 3.0]  # x1 cos + x2 sin, -x1 sin + x2 cos, untouched
    assert train_gpt.rotate(x, cos, sin).flatten().tolist() == pytest.approx(wanted)


def test_exclusive_attention_leaves_nothing_along_the_own_value():
    generator = torch.Generator().manual_seed(0)
    y, v = torch.randn(2, 6, 5, 8, generator=generator), torch.randn(2, 3, 5, 8)
    own = v.repeat_interleave(2, dim=1)
    out = train_gpt.exclude_self(y, v)
    assert ((out * own).sum(-1) / own.norm(dim=-1)).abs().max() < 1e-5
    unit = own / own.norm(dim=-1, keepdim=True)
    taken = y - out
    along = (taken * unit).sum(-1, keepdim=True) * unit
    torch.testing.assert_close(taken, along, rtol=0, atol=1e-5)
    again = train_gpt.exclude_self(out, v)
    torch.testing.assert_close(again, out, rtol=0, atol=1e-5)


# -----------------------------------------------------------------------------
# Start and groups


def fresh(**changes):
    torch.manual_seed(0)
    model = train_gpt.GPT(tiny(model_dim=64, **changes)).initialise()
    return {name: weight.detach() for name, weight in model.named_parameters()}


def is_orthogonal(matrix):
    gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    return torch.allclose(gram, torch.eye(len(gram)), atol=1e-4)


def test_banks_start_as_published():
    weights, layers = fresh(), 4
    assert all(map(is_orthogonal, weights["qo_bank"][:layers]))
    assert (weights["qo_bank"][layers:] == 0).all() and (weights["mlp_down_bank"] == 0).all()
    assert all(map(is_orthogonal, weights["kv_bank"]))
    assert all(map(is_orthogonal, weights["mlp_up_bank"]))
    assert is_orthogonal(weights["bigram_proj"]) and is_orthogonal(weights["ve_proj"])
    assert not torch.equal(weights["qo_bank"][0], weights["qo_bank"][1])


def test_uniform_start_is_torch_s_own():
    """Within 1 / sqrt(inputs), as nn.Linear; what starts at zero still does."""
    weights, layers = fresh(ortho_init=False, pre_enrich_dim=96), 4
    assert (weights["qo_bank"][layers:] == 0).all() and (weights["mlp_down_bank"] == 0).all()
    for name in ("kv_bank", "mlp_up_bank", "bigram_proj", "ve_proj", "enrich_up", "enrich_down"):
        bound = weights[name].shape[-1] ** -0.5
        assert 0.98 * bound < weights[name].abs().max() <= bound, name
        assert weights[name].std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05), name
    bound = 64**-0.5
    assert 0.98 * bound < weights["qo_bank"][:layers].abs().max() <= bound
    assert not is_orthogonal(weights["kv_bank"][0]) and not is_orthogonal(weights["ve_proj"])


@pytest.mark.parametrize("rows", [64, 200, 20])
def test_overtone_start(rows):
    """Singular values S0 / sqrt(k) on the singular vectors of the usual start."""
    plain, shaped = (fresh(overtone_init=on, vocab_size=rows)["tok_emb"] for on in (False, True))
    values = torch.linalg.svdvals(shaped)
    k = torch.arange(1, len(values) + 1)
    wanted = torch.linalg.svdvals(plain)[0] * k**-0.5
    torch.testing.assert_close(values, wanted, rtol=1e-4, atol=0)
    u, _, v = torch.linalg.svd(plain.double(), full_matrices=False)
    product = u.T @ shaped.double() @ v.T  # diagonal where the singular vectors are kept
    torch.testing.assert_close(product, wanted.double().diag(), rtol=0, atol=1e-5)


def test_linear_bigram_starts_random():
    weights = fresh(bigram_kind="linear", bigram_vocab_size=600)
    assert weights["bigram_embed"].std().item() == pytest.approx(0.01, rel=0.1)
    assert is_orthogonal(weights["bigram_proj"]) and "bigram_scale" not in weights


def test_small_parameters_start_as_published():
    weights = fresh()
    constants = dict(
        q_gain=1.5, attn_scale=1, mlp_scale=1, skip_weights=1, smear=0, bigram_embed=0,
        bigram_scale=0.05, ve_scale=0.1, ve_layer_scales=1, vr_lambda=0.5, attn_gate_weight=0,
        attn_gate_bias=4,
    )  # fmt: skip
    for name, value in constants.items():
        assert weights[name].unique().tolist() == pytest.approx([value]), name
    assert (weights["resid_mix"][:, 0] == 1).all() and (weights["resid_mix"][:, 1] == 0).all()
    assert weights["tok_emb"].std().item() == pytest.approx(0.005, rel=0.1)
    assert weights["ve_embed"].std().item() == pytest.approx(0.01, rel=0.1)
    assert set(weights) == {*constants, *train_gpt.BANKS} | {
        "resid_mix", "tok_emb", "ve_embed", "bigram_proj", "ve_proj",
    }  # fmt: skip


def test_fresh_model_is_nearly_uniform():
    torch.manual_seed(0)
    cfg = tiny()
    ids = random_ids(cfg)
    loss = train_gpt.GPT(cfg).initialise()(ids, ids.roll(-1, 1)).item()
    assert loss == pytest.approx(math.log(cfg.vocab_size), abs=0.02)


def test_seed_decides_the_start():
    models = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        models.append(train_gpt.GPT(tiny()).initialise().tok_emb)
    assert torch.equal(models[0], models[1]) and not torch.equal(models[0], models[2])


@pytest.mark.parametrize("changes", [{}, *SWITCHES.values()])
def test_every_parameter_is_in_one_group(changes):
    cfg = tiny(**changes)
    names = [n for group, *_ in train_gpt.optimizer_groups(cfg).values() for n in group]
    assert sorted(names) == sorted(name for name, _ in train_gpt.GPT(cfg).named_parameters())


def test_groups_are_the_published_ones():
    groups = train_gpt.optimizer_groups(
        train_gpt.Config(**PLAIN, vocab_size=1024, bigram_vocab_size=9)
    )
    assert groups["muon"] == (list(train_gpt.BANKS), 0.025, 0.04)
    assert groups["embed"] == (["tok_emb", "bigram_embed", "ve_embed"], 0.035, 0.04)
    assert groups["scalar"][1:] == (0.025, 0.04) and len(groups) == 3
    assert {"bigram_proj", "ve_proj", "skip_weights", "smear"} <= set(groups["scalar"][0])
