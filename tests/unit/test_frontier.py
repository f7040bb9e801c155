"""own's training: inside documents, loops, a shuffled loader, and what is cheap."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from checkpoint_worker import configuration, died, new_trainer, train
from helpers import (
    FRONTIER,
    perturbed,
    random_ids,
    random_stream,
    tiny,
    train_gpt,
    write_shard,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from train_gpt import BOS, GPT, ConfigError, LaneCache, layers_passed

# -----------------------------------------------------------------------------
# Inside documents

INSIDE = {
    "alone": dict(doc_attention=True),
    "frontier": FRONTIER,
    "plain": dict(
        doc_attention=True,
        value_residual=False,
        smear_gate=False,
        bigram_vocab_size=0,
        ve_layers=(),
    ),
    "ungrouped": dict(doc_attention=True, num_kv_heads=4, rope_dims=0),
}


def packed(sizes, seed=0, vocab_size=64):
    """(1, T): documents of so many tokens, a BOS before each, in one row."""
    rng = np.random.default_rng(seed)
    parts = [np.append(BOS, rng.integers(2, vocab_size, size)) for size in sizes]
    return torch.from_numpy(np.concatenate(parts).astype(np.int64)).unsqueeze(0)


@pytest.mark.parametrize("name", INSIDE)
@settings(deadline=None, max_examples=20)
@given(sizes=st.lists(st.integers(0, 9), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_a_packed_row_is_each_document_alone(name, sizes, seed):
    """Positions run on over the row, which the rotation does not see."""
    cfg = tiny(**INSIDE[name])
    model = perturbed(cfg, seed % 3).eval()
    ids = packed(sizes, seed)
    with torch.no_grad():
        row = model.logits(model.hidden(ids))[0]
        edges = np.cumsum([0] + [size + 1 for size in sizes])
        for begin, end in zip(edges[:-1], edges[1:], strict=True):
            alone = model.logits(model.hidden(ids[:, begin:end]))[0]
            torch.testing.assert_close(row[begin:end], alone, rtol=0, atol=1e-5)


def test_across_documents_it_is_not():
    """The same with the switch off: the test above can fail."""
    model = perturbed(tiny()).eval()
    ids = packed([5, 5])
    with torch.no_grad():
        row = model.logits(model.hidden(ids))[0, 6:]
        alone = model.logits(model.hidden(ids[:, 6:]))[0]
    assert (row - alone).abs().max() > 1e-2


@pytest.mark.parametrize("inside", [True, False])
def test_no_gradient_crosses_a_document(inside):
    """Of the second document's loss with respect to the first one's embeddings."""
    cfg = tiny(doc_attention=inside)
    model = perturbed(cfg)
    ids = packed([5, 7])
    found = []
    embed = model.embed

    def watched(*arguments):
        x = embed(*arguments)
        x.retain_grad()
        found.append(x)
        return x

    model.embed = watched
    model.logits(model.hidden(ids))[0, 6:].square().sum().backward()
    (x,) = found
    crosses = bool((x.grad[0, :6] != 0).any())
    assert crosses == (not inside)
    assert (x.grad[0, 6:] != 0).any(-1).all()


@pytest.mark.parametrize("name", INSIDE)
def test_rows_are_lanes(name):
    """What a lane computes token by token, over caches, is what rows compute at once."""
    cfg = tiny(**INSIDE[name])
    model = perturbed(cfg).eval().requires_grad_(False)
    ids = packed([6, 0, 7], seed=4)
    with torch.no_grad():
        rows = model.logits(model.hidden(ids))[0]
        cache = LaneCache(model, 1, cfg.window)
        place = 0
        for t, token in enumerate(ids[0].tolist()):
            place = 0 if token == BOS else place + 1
            cache.begin(torch.tensor([place]))
            lane = model.logits(model.hidden(torch.tensor([[token]]), cache))[0, 0]
            torch.testing.assert_close(lane, rows[t], rtol=0, atol=2e-5)


def test_windows_score_documents_as_if_alone():
    """Sliding windows that hold whole documents, against lanes."""
    cfg = tiny(**FRONTIER, eval_seq_len=16, eval_stride=16)
    model = perturbed(cfg).eval().requires_grad_(False)
    stream = packed([7, 7, 15, 7, 7], seed=2)[0].numpy().astype(np.uint16)
    rt = train_gpt.Runtime(cfg)
    scores = train_gpt.WindowScorer(model, rt, cfg).score(stream, 16)
    wanted, _ = train_gpt.score_documents(model, rt, cfg, stream)
    np.testing.assert_allclose(scores.log_prob, wanted.log_prob, atol=1e-4)
    np.testing.assert_allclose(scores.entropy, wanted.entropy, atol=1e-4)


def masks(ids):
    """(B, T, T) by a loop."""
    document = (ids == BOS).cumsum(1).tolist()
    return torch.tensor(
        [[[j <= i and a == b for j, b in enumerate(d)] for i, a in enumerate(d)] for d in document]
    )


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 999), length=st.integers(1, 40))
def test_the_mask_by_definition(seed, length):
    ids = torch.from_numpy(np.random.default_rng(seed).integers(0, 4, (2, length)))
    assert torch.equal(train_gpt.document_mask(ids, torch.float32)[:, 0] == 0, masks(ids))


@pytest.mark.parametrize(("heads", "groups"), [(4, 2), (4, 4), (4, 1)])
def test_flex_attention_is_the_mask(heads, groups):
    """FlexAttention as it is defined, in fp32; lengths that fill no block, and several blocks."""
    generator = torch.Generator().manual_seed(1)
    for length in (7, 128, 300):
        ids = torch.randint(0, 30, (2, length), generator=generator)
        q = torch.randn(2, heads, length, 16, generator=generator)
        k, v = torch.randn(2, 2, groups, length, 16, generator=generator)
        blocks = train_gpt.flex_mask(ids)
        wanted = train_gpt.attend(q, k, v, train_gpt.document_mask(ids, q.dtype))
        torch.testing.assert_close(train_gpt.attend_flex(q, k, v, blocks), wanted)


def test_attention_impl_is_refused():
    for name in ("fa3", "fa4"):
        with pytest.raises(ConfigError, match=f"ATTN_IMPL={name}: .*DOC_ATTENTION"):
            tiny(doc_attention=True, attn_impl=name)
        assert tiny(attn_impl=name).attn_impl == name


# -----------------------------------------------------------------------------
# Loops


def test_order_of_layers():
    """The published one, and its halves."""
    cfg = train_gpt.Config(num_layers=11, loop_layers="3-5", loop_times=3)
    order = layers_passed(cfg)
    assert order == [0, 1, 2, 3, 4, 5, 3, 4, 5, 3, 4, 5, 6, 7, 8, 9, 10]
    assert layers_passed(cfg, False) == [*range(11)]
    assert train_gpt.count_blocks(cfg) == 17 and train_gpt.count_blocks(cfg, False) == 11
    assert train_gpt.parameter_specs(cfg)["skip_weights"].shape[0] == 8
    once = train_gpt.Config(num_layers=11, loop_layers="3-5", loop_times=1)
    assert layers_passed(once) == [*range(11)]


def unrolled(model):
    """A model with a layer of its own for each place in the order, weights copied."""
    order = model.layers
    plain = dict(loop_layers="", num_layers=len(order), ve_layers=(), xsa_last_n=0)
    cfg = tiny(**FRONTIER | plain | dict(ln_scale=False, parallel_from=-1, value_residual=False))
    other = GPT(cfg).initialise()
    with torch.no_grad():
        for name, weight in other.named_parameters():
            source = model.get_parameter(name)
            if name in ("qo_bank", "kv_bank"):
                halves = source.chunk(2)
                weight.copy_(torch.cat([half[order] for half in halves]))
            elif weight.dim() and len(weight) == len(order):
                weight.copy_(source[order])
            else:
                weight.copy_(source)
    return other


def test_loops_are_a_model_that_is_unrolled_by_hand():
    """Outputs, and each copy's gradients add up to the shared ones; without what depends on a
    layer's number."""
    changes = dict(ve_layers=(), xsa_last_n=0, ln_scale=False, parallel_from=-1)
    cfg = tiny(**FRONTIER | changes | dict(value_residual=False))
    model = perturbed(cfg)
    other = unrolled(model)
    ids = random_ids(cfg)
    losses = [each(ids, ids.roll(-1, 1)) for each in (model, other)]
    assert losses[0].item() == pytest.approx(losses[1].item(), abs=1e-6)
    for loss in losses:
        loss.backward()
    shared = model.mlp_up_bank.grad
    summed = torch.zeros_like(shared)
    summed.index_add_(0, torch.tensor(model.layers), other.mlp_up_bank.grad)
    torch.testing.assert_close(shared, summed, rtol=1e-4, atol=1e-6)


LOOPS = FRONTIER | dict(loop_from=0.5)  # step 6 of 12


def test_training_switches_once_and_says_so(tmp_path, capsys):
    trainer = train(configuration(**LOOPS), tmp_path)
    said = [line for line in capsys.readouterr().out.splitlines() if "loops:enabled" in line]
    assert said == ["loops:enabled step:6 share:0.5000 layers:0,1,2,1,2,1,2,3"]
    assert trainer.loops_since == 6 and trainer.model.layers == [0, 1, 2, 1, 2, 1, 2, 3]
    plain = train(configuration(**LOOPS | dict(loop_layers="", run_id="plain")), tmp_path)
    steps = range(12)
    differs = [trainer.losses[i] != plain.losses[i] for i in steps]
    # The same parameters but for three more rows of skips, which nothing reads before.
    assert differs == [i >= 6 for i in steps]


def test_under_a_cap_the_clock_decides():
    cfg = SimpleNamespace(iterations=1000, max_wallclock_seconds=100.0)
    assert train_gpt.share_done(10, 40.0, cfg) == pytest.approx(0.4)
    assert train_gpt.share_done(10, 40.0, cfg, reserve=20.0) == pytest.approx(0.5)
    assert train_gpt.share_done(900, 40.0, cfg) == pytest.approx(0.9)  # steps end it, too
    assert train_gpt.share_done(10, 400.0, cfg) == 1.0
    cfg.max_wallclock_seconds = 0.0
    assert train_gpt.share_done(10, 400.0, cfg) == pytest.approx(0.01)


def test_a_resume_keeps_the_switch(tmp_path):
    """Before it, after it: the restored trainer runs the blocks that the dead one did."""
    for stop in (4, 8):
        cfg = configuration(**LOOPS, checkpoint_every="4", run_id=f"stop{stop}")
        died(cfg, tmp_path, stop=stop)
        again = new_trainer(cfg, tmp_path)
        assert again.step == stop and again.loops_since == (6 if stop == 8 else None)
        assert again.model.looped == (stop == 8)


def test_a_shard_may_be_mended_for_a_resume(tmp_path):
    """The whole shard is written again, its first bytes too; one of another size is refused."""
    cfg = configuration(**LOOPS, shuffle=True, checkpoint_every="4")
    died(cfg, tmp_path, stop=5)
    path = tmp_path / "stream_train_000001.bin"
    count = train_gpt.shard_tokens(path)
    write_shard(path, random_stream(count - 1, 64, seed=9))
    assert new_trainer(cfg, tmp_path).step == 4
    write_shard(path, random_stream(count, 64, seed=9))
    with pytest.raises(train_gpt.UserError, match="made with SHARDS="):
        new_trainer(cfg, tmp_path)


def test_checkpoints_of_other_versions_say_so(tmp_path, capsys):
    cfg = configuration(**LOOPS, checkpoint_every="4")
    died(cfg, tmp_path, stop=5)
    path = tmp_path / cfg.run_id / "checkpoint/step_00000004.json"
    entry = json.loads(path.read_text())
    del entry["state"]["loops_since"]
    data = path.with_suffix(".safetensors").read_bytes()
    entry["sha256"] = train_gpt.sha256(json.dumps(entry["state"]).encode() + data)
    path.write_text(json.dumps(entry))
    with pytest.raises(train_gpt.UserError, match="no whole checkpoint"):
        new_trainer(cfg, tmp_path)
    assert "of an earlier or later train_gpt.py" in capsys.readouterr().out


def test_all_blocks_share_one_mask():
    """Or each attention would keep its own for the backward pass."""
    cfg = tiny(**FRONTIER)
    model = perturbed(cfg)
    seen = []
    attend = train_gpt.attend

    def watched(q, k, v, mask=None):
        seen.append(mask)
        return attend(q, k, v, mask)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_gpt, "attend", watched)
        model(random_ids(cfg), random_ids(cfg))
    assert len(seen) == 8 and all(mask is seen[0] for mask in seen)
    assert seen[0].dtype == torch.float32


def test_the_warm_up_runs_both_and_leaves_no_trace(tmp_path):
    cfg = configuration(**LOOPS, warmup_steps=1)
    trainer = new_trainer(cfg, tmp_path)
    seen = []
    loss = trainer.compiled_loss
    trainer.compiled_loss = lambda *sides: seen.append(trainer.model.looped) or loss(*sides)
    before = {name: w.clone() for name, w in trainer.model.named_parameters()}
    trainer.warm_up()
    assert seen == [False, True] and not trainer.model.looped and trainer.loops_since is None
    assert all(torch.equal(before[name], w) for name, w in trainer.model.named_parameters())


def test_a_new_model_loops_and_copies_follow():
    cfg = tiny(**FRONTIER)
    assert GPT(cfg).looped and GPT(cfg).layers == layers_passed(cfg)
    model = perturbed(cfg)
    model.set_looped(False)
    assert train_gpt.for_scores(model).layers == model.layers == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "text", ["3", "3-", "2-1", "1-4", "-1-2", "1,2", "a-b", "1-2-3", " 1-2", "01-2"]
)
def test_wrong_loops(text):
    with pytest.raises(ConfigError, match="LOOP_LAYERS="):
        tiny(loop_layers=text)


def test_loops_and_recurrence_are_one_thing_twice():
    with pytest.raises(ConfigError, match="DEPTH_RECURRENCE=1: .*LOOP_LAYERS"):
        tiny(loop_layers="1-2", depth_recurrence=(1,))


# -----------------------------------------------------------------------------
# The shuffled loader


def shuffled(folder, sizes, seed=1, length=8, batch=16):
    """-> (loader, its configuration, the shards' tokens end to end), each token another one."""
    stream = np.arange(2, 2 + sum(sizes))
    cuts = np.cumsum([0, *sizes])
    paths = [
        write_shard(folder / f"x_train_{i:06d}.bin", stream[cuts[i] : cuts[i + 1]])
        for i in range(len(sizes))
    ]
    cfg = SimpleNamespace(
        vocab_size=65_536, train_seq_len=length, train_batch_tokens=batch, seed=seed
    )
    return train_gpt.ShuffledLoader(paths, cfg), cfg, stream


def rank(number, world_size):
    return SimpleNamespace(rank=number, world_size=world_size)


shard_sizes = st.lists(st.integers(1, 70), min_size=1, max_size=4).filter(
    lambda sizes: sum(sizes) >= 8
)


@settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
@given(sizes=shard_sizes, seed=st.integers(0, 99))
def test_every_token_is_an_input_once_an_epoch(tmp_path, sizes, seed):
    loader, cfg, stream = shuffled(tmp_path, sizes, seed, batch=8)
    following = dict(zip(stream.tolist(), np.roll(stream, -1).tolist(), strict=True))
    epochs = []
    for _ in range(2):
        seen = []
        for _ in range(sum(sizes) // 8):
            inputs, targets = loader.rows(cfg, rank(0, 1))
            assert inputs.dtype == targets.dtype == torch.int64 and inputs.shape == (1, 8)
            assert inputs.is_contiguous() and targets.is_contiguous()  # or it compiles on the clock
            seen += inputs[0].tolist()
            assert targets[0].tolist() == [following[token] for token in inputs[0].tolist()]
        assert len({*seen}) == len(seen) > sum(sizes) - 8
        epochs.append(seen)
        loader.restore(json.loads(json.dumps(loader.state())))
    if sum(sizes) >= 100:
        assert epochs[0] != epochs[1] and epochs[0] != sorted(epochs[0])


@settings(deadline=None, max_examples=30, suppress_health_check=list(HealthCheck))
@given(sizes=shard_sizes, ranks=st.integers(1, 3), before=st.integers(0, 9))
def test_ranks_are_disjoint_and_state_is_restored(tmp_path, sizes, ranks, before):
    """Together the ranks read what one alone would; a loader that is put back goes on there."""
    alone, cfg, _ = shuffled(tmp_path, sizes, batch=48)
    loaders = [shuffled(tmp_path, sizes)[0] for _ in range(ranks)]
    for _ in range(before):
        wanted = alone.rows(cfg, rank(0, 1))
        parts = [loader.rows(cfg, rank(r, ranks)) for r, loader in enumerate(loaders)]
        for side, whole in zip(zip(*parts, strict=True), wanted, strict=True):
            assert torch.equal(torch.cat(side), whole)
            assert all(part.stride() == (8, 1) for part in (*side, whole))
    other = shuffled(tmp_path, sizes)[0]
    state = json.loads(json.dumps(alone.state()))
    assert other.can_restore(tuple(state))
    other.restore(state)
    for _ in range(3):
        assert torch.equal(other.rows(cfg, rank(0, 1))[0], alone.rows(cfg, rank(0, 1))[0])


def test_seeds_differ_and_repeat(tmp_path):
    rows = [shuffled(tmp_path, [400], seed)[0].drawn.tolist() for seed in (1, 1, 2)]
    assert rows[0] == rows[1] != rows[2]


def test_a_bad_token_is_refused_where_it_is_read(tmp_path):
    """With the shard's name; the loader stays where it was, for a checkpoint."""
    loader, cfg, stream = shuffled(tmp_path, [40, 40])
    loader.vocab_size = int(stream[41])  # the second shard's tokens are too high
    before = loader.state()
    with pytest.raises(train_gpt.BadShard, match=r"x_train_000001\.bin: token \d+ >= vocabulary"):
        for _ in range(5):
            before = loader.state()
            loader.rows(cfg, rank(0, 1))
    assert loader.state() == before


@pytest.mark.parametrize("sizes", [[7], [1], [2, 3]])
def test_less_than_a_sequence_goes_round(sizes, tmp_path):
    """As unshuffled shards do: each sequence is the ring from some place on."""
    loader, cfg, stream = shuffled(tmp_path, sizes)
    ring = np.tile(stream, 20)
    inputs, targets = loader.rows(cfg, rank(0, 1))
    for row, target in zip(inputs.tolist(), targets.tolist(), strict=True):
        found = [ring[i : i + 9].tolist() for i in range(len(stream))]
        assert [*row, target[-1]] in found and target[:-1] == row[1:]


def test_the_switch_chooses_the_loader(tmp_path):
    path = write_shard(tmp_path / "x_train_000000.bin", random_stream(99, 64))
    kinds = {
        shuffle: train_gpt.training_loader(tiny(shuffle=shuffle), [path])
        for shuffle in (True, False)
    }
    assert isinstance(kinds[True], train_gpt.ShuffledLoader)
    assert isinstance(kinds[False], train_gpt.TokenLoader)
    ends = np.array([10, 20, 30])
    assert train_gpt.last_shard(ends, 0, tiny(shuffle=True)) == 2
    assert train_gpt.last_shard(ends, 0, tiny()) == 0


# -----------------------------------------------------------------------------
# Schedules and Muon


@settings(deadline=None, max_examples=60)
@given(
    step=st.integers(0, 1000),
    elapsed=st.floats(0, 500),
    share=st.floats(0.01, 1),
    least=st.floats(0, 1),
    cap=st.sampled_from([0.0, 500.0]),
    reserve=st.floats(0, 100),
)
def test_rate_over_a_share_of_the_run(step, elapsed, share, least, cap, reserve):
    """By steps or by seconds, of which either ends it."""
    cfg = SimpleNamespace(
        iterations=1000, warmdown_iters=7, warmdown_share=share, min_lr=least,
        max_wallclock_seconds=cap,
    )  # fmt: skip
    done = min(1.0, max(step / 1000, elapsed / (cap - reserve) if cap else 0.0))
    wanted = max(least, min(1.0, (1 - done) / share))
    found = train_gpt.lr_factor(step, elapsed, cfg, reserve if cap else 0.0)
    assert found == pytest.approx(wanted, abs=1e-9)


def test_a_floor_under_which_nothing_would_begin():
    """Snapshots below a rate factor of 0.2, late QAT below its threshold."""
    with pytest.raises(ConfigError, match="MIN_LR=0.2: must be below 0.2, .* SWA_ENABLED=0"):
        tiny(min_lr=0.2)
    late = dict(swa_enabled=False, late_qat_threshold=0.5)
    with pytest.raises(ConfigError, match="MIN_LR=0.5: must be below LATE_QAT_THRESHOLD"):
        tiny(min_lr=0.5, **late)
    assert tiny(min_lr=0.5, **late | dict(late_qat=False)).min_lr == 0.5


def test_given_warmdown_iters_win_over_a_share_nobody_gave():
    resolve = train_gpt.Config.from_env
    assert resolve(dict(RECORD="own")).warmdown_share == 0.72
    given = resolve(dict(RECORD="own", WARMDOWN_ITERS="9"))
    assert given.warmdown_share == 0.0 and given.origin["WARMDOWN_SHARE"] == "WARMDOWN_ITERS"
    both = resolve(dict(RECORD="own", WARMDOWN_ITERS="9", WARMDOWN_SHARE="0.5"))
    assert both.warmdown_share == 0.5
    assert resolve(dict(RECORD="tiny", WARMDOWN_SHARE="0.5")).warmdown_share == 0.5


def test_rows_of_momentum_are_normed_before_newton_schulz():
    """MuonEq-R by its formula; a row of zeros stays one."""
    torch.manual_seed(0)
    matrices = torch.randn(3, 6, 4) * torch.tensor([1.0, 100.0, 1e-3, 5.0, 1.0, 1.0])[:, None]
    matrices[1, 2] = 0
    rows = torch.stack([torch.stack([F.normalize(row, dim=0) for row in m]) for m in matrices])
    found = train_gpt.newton_schulz(matrices, 5, True)
    torch.testing.assert_close(found, train_gpt.newton_schulz(rows, 5), rtol=1e-4, atol=1e-4)
    assert (found[1, 2] == 0).all()
    assert not torch.allclose(found, train_gpt.newton_schulz(matrices, 5), atol=0.05)


def test_row_norm_changes_training():
    weights = {}
    for on in (False, True):
        cfg = tiny(muon_row_norm=on)
        torch.manual_seed(0)
        model = GPT(cfg).initialise()
        optimizers = train_gpt.Optimizers(model, train_gpt.Runtime(cfg), cfg)
        ids = random_ids(cfg)
        loss = model(ids, ids.roll(-1, 1))
        loss.backward()
        optimizers.step(0, 1.0, loss.detach())
        weights[on] = model.mlp_down_bank.detach()
    assert (weights[True] - weights[False]).abs().max() > 1e-4


# -----------------------------------------------------------------------------
# Cheap switches


def test_skip_gates_begin_halfway_and_blend():
    cfg = tiny(skip_gates=True)
    model = perturbed(cfg)
    x, skip = torch.randn(2, 1, 3, cfg.model_dim)
    with torch.no_grad():
        model.skip_weights[1].fill_(2.0)
        model.skip_gates[1].fill_(math.log(3))
        found = model.add_skip(1, x, skip)
    torch.testing.assert_close(found, 0.75 * x + 0.25 * 2 * skip)
    assert (GPT(cfg).initialise().skip_gates == 0).all()


def gates_of(cfg, changed=None):
    """What gates see of a layer's input, some of whose numbers are others."""
    model = perturbed(cfg)
    h = torch.randn(1, 3, cfg.model_dim, generator=torch.Generator().manual_seed(0))
    if changed:
        h[..., changed] += 1.0
    seen = []
    linear = F.linear

    def watched(x, weight, bias=None):
        if weight.shape == model.attn_gate_weight[0].shape:
            seen.append(linear(x, weight, bias).tolist())
        return linear(x, weight, bias)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(F, "linear", watched)
        context = train_gpt.Context(model, torch.ones(1, 3, dtype=torch.int64))
        context.start(h, torch.zeros(1, 3, 16))
        model.attention(1, h, context)
    (gates,) = seen
    return gates


def test_gate_inputs_are_the_first_ones():
    cfg = tiny(gate_inputs=6)
    assert train_gpt.parameter_specs(cfg)["attn_gate_weight"].shape == (4, 4, 6)
    assert gates_of(cfg, changed=slice(6, None)) == gates_of(cfg)
    assert gates_of(cfg, changed=slice(0, 6)) != gates_of(cfg)
    with pytest.raises(ConfigError, match="GATE_INPUTS=33: must be at most MODEL_DIM"):
        tiny(gate_inputs=33)


def test_flops_count_what_a_token_passes():
    plain, looped = tiny(), tiny(loop_layers="1-2", loop_times=3)
    cfg = tiny(num_layers=8)
    a, b = train_gpt.token_flops(plain), train_gpt.token_flops(looped)
    assert train_gpt.token_flops(looped, False) == a
    assert b == train_gpt.token_flops(cfg)  # four blocks more, as in a model of eight layers


def test_own_is_the_defaults_and_the_five_have_none_of_it():
    known = train_gpt.known_records()
    own = train_gpt.read_record(known["own"])
    for name in own.keys() - {"EVAL_LONGEST_FIRST", "EVAL_SLIDING"}:  # for FineWeb alone
        text = own[name]
        assert train_gpt.parse(name, text) == train_gpt.VARIABLES[name].default, name
    new = ("SHUFFLE", "LOOP_LAYERS", "PARALLEL_FROM", "SKIP_GATES", "GATE_INPUTS")
    new += ("DOC_ATTENTION", "WARMDOWN_SHARE", "MIN_LR", "MUON_ROW_NORM")
    assert {*new} <= own.keys()
    off = dict.fromkeys(new, "0") | dict(LOOP_LAYERS="", PARALLEL_FROM="-1")
    for record in ("pr864", "pr810", "pr1026", "pr993", "pr808"):
        values = train_gpt.read_record(known[record])
        assert {name: values[name] for name in new} == off, record
