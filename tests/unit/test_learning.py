"""Learning in lanes: the gradient is that of what was coded, nothing later enters, and encoder,
decoder and scorer come to the same weights."""

import copy
import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import FRONTIER, perturbed, tiny, train_gpt
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import scored_documents

from train_gpt import BOS, CodingPlan, Context, LaneCache, LaneChunk, LaneLearner, decode, encode

SMALL = dict(
    num_layers=2, model_dim=16, num_heads=2, num_kv_heads=1, bigram_dim=4, ve_dim=4, eval_lanes=3
)
SWITCHES = {
    "all": {},
    "recurrence": dict(depth_recurrence=(1, 2)),
    "frontier": FRONTIER,
    "pre_enrichment": dict(pre_enrich_dim=24),
    "unreset": dict(bos_reset=False, bigram_kind="linear"),
    "plain": dict(smear_gate=False, bigram_vocab_size=0, ve_enabled=False, value_residual=False),
    "ungrouped": dict(num_kv_heads=4, polyglu_enabled=True, rope_dims=0),
}
RATE = dict(lane_ttt=True, lane_ttt_lr=1e-2, lane_ttt_every=4)  # large enough to be seen


def frozen(cfg, seed=0):
    return perturbed(cfg, seed, 0.1).eval().requires_grad_(False)


def documents(*sizes, seed=0, vocab_size=64):
    rng = np.random.default_rng(seed)
    parts = [np.append(BOS, rng.integers(2, vocab_size, size)) for size in sizes]
    return np.concatenate(parts).astype(np.uint16)


def repeats(seed=0, copies=12):
    """Three documents of the same few phrases."""
    phrases = np.random.default_rng(seed).integers(2, 64, (4, 9))
    rng = np.random.default_rng(seed + 1)
    parts = [
        np.append(BOS, np.concatenate([phrases[rng.integers(4)] for _ in range(copies)]))
        for _ in range(3)
    ]
    return np.concatenate(parts).astype(np.uint16)


# -----------------------------------------------------------------------------
# The gradient


def learner_of(model, cfg, steps, targets, count=None, windows=None):
    """A LaneLearner whose caches have read all steps but the last `every`, and has these to learn
    from. steps: ids and places, (T, lanes) each; -> it, and the chunk of the last ones."""
    rt, every = train_gpt.Runtime(cfg), cfg.lane_ttt_every
    lanes = steps[0].shape[1]
    cache = LaneCache(model, lanes, windows or cfg.window)
    forward = train_gpt.lane_forward(model, rt, cache)
    ids, places = (torch.from_numpy(column) for column in steps)
    before = len(ids) - every
    still, learner = replace(cfg, lane_ttt_lr=0.0), None
    columns = torch.stack([ids, places, targets, torch.ones_like(ids)])
    with torch.no_grad():
        for t in range(len(ids)):
            if t == before:
                learner = learner or LaneLearner(model, rt, cfg, [cache])
                for group in learner.optimizer.param_groups:
                    group["lr"] = cfg.lane_ttt_lr
            elif t == before % every:
                learner = LaneLearner(model, rt, still, [cache])
            forward(ids[t], places[t])
            if learner and t < before and not (t + 1 - before) % every:
                learner.learn(columns[:, t + 1 - every : t + 1])
    return learner, columns[:, before:].clone()


class Detached(Context):
    """A row, of which nothing before `past` has a gradient."""

    def __init__(self, model, ids, past):
        super().__init__(model, ids)
        self.past = past

    def cut(self, x, dim):
        old, new = x.split([self.past, x.shape[dim] - self.past], dim)
        return torch.cat([old.detach(), new], dim)

    def previous(self, name, x):
        return super().previous(name, self.cut(x, 1))

    def attend(self, q, k, v):
        return super().attend(q, self.cut(k, 2), self.cut(v, 2))


@pytest.mark.parametrize("past", [0, 1, 7])
@pytest.mark.parametrize("name", SWITCHES)
def test_gradient_is_that_of_a_row_whose_past_is_fixed(name, past):
    """Documents as long as the window holds: over the cache, and by a plain forward pass."""
    cfg = tiny(**SWITCHES[name], **RATE)
    model, size = frozen(cfg), past + cfg.lane_ttt_every
    rng = np.random.default_rng(past)
    ids = np.concatenate([np.full((1, 3), BOS), rng.integers(2, 64, (size - 1, 3))])
    targets = torch.from_numpy(rng.integers(2, 64, (size, 3)))
    places = np.repeat(np.arange(size)[:, None], 3, 1)
    learner, chunk = learner_of(copy.deepcopy(model), cfg, (ids, places), targets)
    learner.back_propagate(learner.caches[0], chunk)

    model.requires_grad_()
    rows = torch.from_numpy(ids).T
    logits = model.logits(model.hidden(rows, Detached(model, rows, past)))[:, past:]
    wanted = F.cross_entropy(logits.flatten(0, 1), targets.T[:, past:].flatten())
    wanted = torch.autograd.grad(wanted, [*model.parameters()], allow_unused=True)
    pairs = zip(wanted, model.parameters(), strict=True)
    flat = torch.cat([torch.zeros(w.numel()) if g is None else g.flatten() for g, w in pairs])
    assert flat.abs().max() > 1e-4
    assert torch.allclose(learner.gradient, flat, rtol=1e-3, atol=1e-6)


@settings(max_examples=150, deadline=None)
@given(
    window=st.integers(1, 9),
    every=st.integers(1, 12),
    ends=st.lists(st.integers(1, 14), min_size=1, max_size=12),
    first=st.integers(0, 25),
)
def test_a_chunk_sees_what_the_cache_still_holds(window, every, ends, first):
    """By hand: the ring after the chunk, slot by slot; documents end wherever they like."""
    cfg = tiny(**SMALL, eval_seq_len=window, eval_stride=1)
    places = [place for size in ends for place in range(size)] + [*range(first + every)]
    places = places[first:][:every] if len(places) >= first + every else places[-every:]
    model = frozen(cfg)
    cache = LaneCache(model, 1, window)
    held = {}  # slot -> (index in the chunk or before it, place)
    for place in range(places[0]):
        held[place % window] = (-1, place)
    for index, place in enumerate(places):
        held[place % window] = (index, place)
    at = torch.tensor([places])
    seen = LaneChunk(model, cache, torch.zeros_like(at), at).seen[0]
    starts = [j for j, place in enumerate(places) if place == 0]
    for j in range(every):
        begun = max([start for start in starts if start <= j], default=-1)
        old = {slot for slot, (index, _) in held.items() if index < 0 and begun < 0}
        assert {*np.flatnonzero(seen[j, :window]).tolist()} == old
        assert all(places[j] - window < held[slot][1] < places[j] for slot in old)
        new = {i for i in range(max(begun, 0), j + 1) if j - i < window}
        assert {*np.flatnonzero(seen[j, window:]).tolist()} == new


def test_idle_lanes_teach_nothing():
    cfg = tiny(**SMALL, **RATE)
    model = frozen(cfg)
    rng = np.random.default_rng(0)
    ids, targets = rng.integers(2, 64, (4, 3)), torch.from_numpy(rng.integers(2, 64, (4, 3)))
    places = np.repeat(np.arange(4)[:, None], 3, 1)
    learner, chunk = learner_of(model, cfg, (ids, places), targets)
    chunk[3, 2:, 1] = 0
    learner.back_propagate(learner.caches[0], chunk)
    found = learner.gradient.clone()
    chunk[2, 2:, 1] = 5  # targets that nobody coded
    learner.back_propagate(learner.caches[0], chunk)
    assert torch.equal(learner.gradient, found) and found.abs().max() > 0
    chunk[3] = 0
    learner.back_propagate(learner.caches[0], chunk)
    assert not learner.gradient.any()


def test_a_step_is_adam_s_of_the_clipped_gradient():
    """Against torch's, on a copy; its first step moves each weight by the rate."""
    cfg = tiny(**SMALL, **RATE)
    model = frozen(cfg)
    before = copy.deepcopy(model)
    rng = np.random.default_rng(1)
    ids, targets = rng.integers(2, 64, (4, 3)), torch.from_numpy(rng.integers(2, 64, (4, 3)))
    places = np.repeat(np.arange(4)[:, None], 3, 1)
    learner, chunk = learner_of(model, cfg, (ids, places), targets)
    other = torch.optim.Adam([*before.parameters()], 1e-2, (0.0, 0.99))
    for _ in range(3):
        learner.back_propagate(learner.caches[0], chunk)
        parts = learner.gradient.split([weight.numel() for weight in before.parameters()])
        for weight, part in zip(before.parameters(), parts, strict=True):
            weight.grad = part.clone().view_as(weight)
        torch.nn.utils.clip_grad_norm_(before.parameters(), 1.0)
        other.step()
        learner.learn(chunk)
        for name, weight in model.named_parameters():
            assert torch.allclose(weight, before.get_parameter(name), rtol=0, atol=1e-6), name
        for name, layers in train_gpt.layer_weights(model, {}).items():  # lanes go on with these
            assert all(map(torch.equal, layers, learner.caches[0].weights[name])), name
    assert not any(weight.requires_grad for weight in model.parameters())


def test_groups_add_up_to_a_gradient(monkeypatch):
    """In their order, whoever has made them."""
    monkeypatch.setattr(LaneLearner, "CLIP", 1e9)
    cfg = tiny(**SMALL | RATE | dict(lane_ttt_lr=0.0))
    model, rt, rng = frozen(cfg), train_gpt.Runtime(cfg), np.random.default_rng(1)
    caches = [LaneCache(model, 2, cfg.window) for _ in range(3)]
    learner = LaneLearner(model, rt, cfg, caches)
    chunk = torch.from_numpy(rng.integers(2, 64, (4, 4, 6)))
    chunk[1] = torch.arange(4)[:, None]
    chunk[3] = 1
    parts = []
    for cache, group in zip(caches, chunk.chunk(3, 2), strict=True):
        learner.back_propagate(cache, group)
        parts.append(learner.gradient.clone())
    learner.learn(chunk)
    assert torch.equal(learner.gradient, parts[0] + parts[1] + parts[2])
    whole = LaneLearner(model, rt, cfg, [LaneCache(model, 6, cfg.window)])
    whole.learn(chunk)
    assert torch.allclose(learner.gradient, whole.gradient, rtol=1e-3, atol=1e-6)


def test_a_gradient_that_is_no_number_changes_nothing(monkeypatch):
    cfg = tiny(**SMALL, **RATE)
    model = frozen(cfg)
    rng = np.random.default_rng(1)
    ids, targets = rng.integers(2, 64, (4, 3)), torch.from_numpy(rng.integers(2, 64, (4, 3)))
    places = np.repeat(np.arange(4)[:, None], 3, 1)
    learner, chunk = learner_of(model, cfg, (ids, places), targets)
    learner.passes = [lambda _: learner.gradient.fill_(math.nan)]
    before = copy.deepcopy(model.state_dict())
    learner.learn(chunk)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


# -----------------------------------------------------------------------------
# Streams


def coded(cfg, stream, groups=1, model=None):
    """Encode and decode -> bytes, Coded; it comes back."""
    rt, model = train_gpt.Runtime(cfg), model or frozen(cfg)
    plan = CodingPlan.of(stream, cfg, groups)
    before = copy.deepcopy(model.state_dict())
    body, found = encode(model, rt, cfg, stream, plan)
    again = decode(model, rt, cfg, body, plan)
    assert again.text.tobytes() == found.text.tobytes() == stream.tobytes()
    assert again[1:] == found[1:] and found.mass_error < 1e-12
    assert all(torch.equal(w, before[name]) for name, w in model.state_dict().items())
    return body, found


@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize("name", SWITCHES)
def test_what_learnt_is_decoded(name, groups):
    cfg = tiny(**SWITCHES[name], **RATE, eval_lanes=3)
    coded(cfg, documents(20, 9, 14, 30, 2, 3, seed=2), groups)


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.lists(st.sampled_from([0, BOS, 2, 3, 4, 63]), max_size=70),
    lanes=st.integers(1, 5),
    groups=st.integers(1, 3),
    every=st.integers(1, 20),
    piece=st.integers(0, 12),
)
def test_what_learnt_of_any_text_is_decoded(tokens, lanes, groups, every, piece):
    shape = dict(eval_lanes=lanes, lane_ttt_every=every, eval_piece_tokens=piece)
    cfg = tiny(**SMALL | RATE | shape)
    coded(cfg, np.array([BOS, *tokens], np.uint16), groups)


def test_rate_zero_is_no_learning():
    stream = repeats()
    plain, without = coded(tiny(**SMALL, lane_ttt=False), stream)
    still, found = coded(tiny(**SMALL | RATE | dict(lane_ttt_lr=0.0)), stream)
    assert still == plain and found.nats == without.nats
    assert coded(tiny(**SMALL | RATE), stream)[0] != plain


def test_it_learns():
    """Phrases that come again and again; what the network alone spends."""
    stream = repeats(copies=40)
    nats = [coded(tiny(**SMALL | RATE | dict(lane_ttt=on)), stream)[1].model_nats for on in (0, 1)]
    assert nats[1] < 0.8 * nats[0]


@pytest.mark.parametrize("piece", [0, 11])
@pytest.mark.parametrize("every", [1, 4, 7, 300])
def test_scores_are_what_the_codec_spends(every, piece, monkeypatch):
    """Also where a chunk ends between two schedules."""
    monkeypatch.setattr(train_gpt, "SCHEDULED_STEPS", max(16, every))
    cfg = tiny(**SMALL | RATE | dict(lane_ttt_every=every, eval_piece_tokens=piece))
    stream, model = repeats(copies=6), frozen(cfg)
    scores, _ = train_gpt.score_documents(model, train_gpt.Runtime(cfg), cfg, stream)
    _, found = coded(cfg, stream, model=model)
    assert -scores.log_prob.sum() == pytest.approx(found.model_nats, rel=1e-9)


def test_a_token_changes_nothing_before_it():
    """Bit for bit, in every lane; and something after it."""
    cfg = tiny(**SMALL | RATE)
    model, rt = frozen(cfg), train_gpt.Runtime(cfg)
    stream = documents(40, 40, 40)
    first, order = train_gpt.score_documents(model, rt, cfg, stream)
    times = order.schedule[0][3:]
    step = np.empty(len(times), int)
    step[order.targets] = times
    for target in (17, 70, 100):
        other = stream.copy()
        other[target + 1] = stream[target + 1] % 60 + 3
        second, _ = train_gpt.score_documents(model, rt, cfg, other)
        same = first.log_prob == second.log_prob
        own = np.arange(len(step)) == target
        assert same[(step <= step[target]) & ~own].all()
        later = -(-step[target] // 4) * 4 + 1  # once its chunk is learnt, all lanes know
        assert not same[step >= later].any()


def test_ranks_learn_the_same(monkeypatch):
    """Each rank's group in a process of its own would gather these gradients: here by hand."""
    cfg = tiny(**SMALL | RATE | dict(eval_lanes=4))
    stream, model = documents(30, 25, 28, 31), frozen(cfg)
    plan = CodingPlan.of(stream, cfg, 2)
    rt = train_gpt.Runtime(cfg)
    _, together = encode(model, rt, cfg, stream, plan)
    schedule = train_gpt.LaneSchedule(stream, plan)
    scorers, shared = [], []

    class Rank(train_gpt.Runtime):
        def gather(self, tensor):
            return shared

    for rank in range(2):
        one = Rank(cfg)
        one.rank, one.world_size = rank, 2
        scorers.append(train_gpt.LaneScorer(model, one, cfg, 2))
    total, steps = 0.0, int(schedule.lengths.max())
    every = cfg.lane_ttt_every
    for begin in range(0, steps, every):
        chunks = []
        for rank, scorer in enumerate(scorers):
            inputs, places = schedule.steps(begin, min(begin + every, steps), slice(2 * rank, None))
            inputs, places = inputs[:, :2], places[:, :2]
            busy = inputs >= 0
            ids = np.where(busy & (places > 0), stream[inputs], BOS)
            columns = np.stack([ids, places, stream[inputs + 1], busy]).astype(np.int64)
            learner, scorer.learner = scorer.learner, None
            total -= scorer.score(columns)[0][busy].sum()
            scorer.learner = learner
            chunks.append(scorer.schedule[:, : len(inputs)])
        if len(chunks[0][0]) == every:
            for scorer, chunk in zip(scorers, chunks, strict=True):
                scorer.learner.back_propagate(scorer.learner.caches[0], chunk)
            shared[:] = [scorer.learner.gradient.clone() for scorer in scorers]
            for scorer, chunk in zip(scorers, chunks, strict=True):
                scorer.learner.learn(chunk)
    assert total == pytest.approx(together.model_nats, rel=1e-9)


def test_uniform_tokens_are_not_made_dearer():
    """By at most 0.01 bits, at the rate of the default."""
    cfg = tiny(**SMALL | dict(eval_lanes=8), vocab_size=64)
    assert train_gpt.Config().lane_ttt and cfg.lane_ttt_lr == train_gpt.Config().lane_ttt_lr
    stream = documents(*[400] * 8, seed=4)
    model, rt = train_gpt.GPT(cfg).initialise().eval().requires_grad_(False), train_gpt.Runtime(cfg)
    bits = []
    for on in (False, True):
        scores, _ = train_gpt.score_documents(model, rt, replace(cfg, lane_ttt=on), stream)
        bits.append(-scores.log_prob.mean() / math.log(2))
    assert bits[1] < bits[0] + 0.01


# -----------------------------------------------------------------------------
# Pieces


@settings(max_examples=100, deadline=None)
@given(sizes=st.lists(st.integers(0, 30), min_size=1, max_size=9), length=st.integers(0, 12))
def test_pieces_are_the_documents(sizes, length):
    stream = documents(*sizes)
    if len(stream) < 2:
        return
    starts, lengths, goes_on = train_gpt.Pieces.of(stream, length)
    assert starts.tolist() == np.cumsum([0, *lengths[:-1]]).tolist()
    assert lengths.sum() == len(stream) - 1 and (lengths > 0).all()
    assert (lengths[goes_on] == length).all() and not (length and (lengths > length).any())
    begun = [0, *(np.flatnonzero(~goes_on[:-1]) + 1)]
    assert starts[begun].tolist() == np.flatnonzero(stream[:-1] == BOS).tolist()


@settings(max_examples=150, deadline=None)
@given(
    ahead=st.sets(st.integers(0, 400), max_size=9),
    runs=st.lists(st.tuples(st.integers(0, 300), st.integers(1, 300)), max_size=6),
    tail=st.binary(max_size=6),
)
def test_side_bytes_come_back(ahead, runs, tail):
    cuts, end = [], -1
    for gap, count in runs:
        cuts.append((end + 1 + gap, count))
        end = sum(cuts[-1])
    plan = CodingPlan(max(end + 1, 401), 3, 2, 1, 99, 16, tuple(sorted(ahead)), 8, tuple(cuts))
    bare = plan._replace(ahead=(), cuts=())
    body = plan.side_bytes() + tail
    assert train_gpt.read_side_bytes(bare, len(ahead), len(cuts), body) == plan
    header = train_gpt.StreamHeader(plan, dict(device="cpu x", threads=2), "", {}).pack()
    if cuts:
        assert header["cuts"] == [8, len(cuts)]
    cut = {n for first, count in cuts for n in range(first, first + count)}
    asked = np.arange(-1, plan.pieces)
    assert {*asked[plan.goes_on(asked)].tolist()} == cut


@pytest.mark.parametrize(
    "numbers", [[0, 1], [1, 0], [1, 10], [5, 1, 0, 1], [9, 1, 1, 1], [1, 1 << 33]]
)
def test_cuts_that_nobody_wrote(numbers):
    """Of ten pieces: the last one cannot be cut, nor is one document right behind another's cut."""
    body = bytearray()
    for number in numbers:
        while number > 127:
            body.append(number & 127 | 128)
            number >>= 7
        body.append(number)
    with pytest.raises(ValueError, match="numbers of"):
        plan = CodingPlan(10, 3, 2, 1, 99, 16)
        train_gpt.read_side_bytes(plan, 0, len(numbers) // 2, bytes(body))


@pytest.mark.parametrize("lanes", [1, 3, 8])
@pytest.mark.parametrize("mixer", ["blend", "cascade", "none"])
def test_pieces_come_back_at_the_score_s_price(mixer, lanes, monkeypatch):
    """By table and by dictionary."""
    cfg = tiny(**SMALL | dict(eval_lanes=lanes, eval_piece_tokens=13, ngram_mixer=mixer))
    stream, model = np.concatenate([repeats(), documents(5, 70)]), frozen(cfg)
    words, found = coded(cfg, stream, model=model)
    monkeypatch.setattr(train_gpt, "FEW_TARGETS", 0)
    again, spent = coded(cfg, stream, model=model)
    assert again == words and spent[1:] == found[1:]
    if mixer == "blend":
        _, final, _ = scored_documents(model, cfg, stream)
        assert -final.sum() == pytest.approx(found.nats, rel=1e-5)


@pytest.mark.parametrize("on", [False, True])
def test_a_lane_goes_on_after_the_text_s_last_piece(on):
    """Which no BOS ends, and which is ahead of others, beside a document that is cut."""
    shape = dict(eval_lanes=2, eval_longest_first=5, eval_piece_tokens=8, lane_ttt=on)
    cfg, phrase = tiny(**SMALL | shape), np.random.default_rng(0).integers(2, 64, 8)
    texts = [np.tile(phrase, 4), phrase[:3], phrase[:2], phrase[:4], phrase[:5], phrase]
    stream = np.concatenate([np.append(BOS, text) for text in texts]).astype(np.uint16)
    plan = CodingPlan.of(stream, cfg, 1)
    assert plan.cuts and plan.last and plan.ahead[-1] == plan.pieces - 1 < len(plan.ahead) + 6
    model = frozen(cfg)
    _, found = coded(cfg, stream, model=model)
    _, final, _ = scored_documents(model, cfg, stream)
    assert -final.sum() == pytest.approx(found.nats, rel=1e-6)


def test_a_forged_number_of_lanes_asks_for_no_memory():
    """Before anything is made for them."""
    cfg, stream = tiny(**SMALL), documents(9, 9)
    plan = CodingPlan.of(stream, cfg, 1)._replace(pieces=2 * 10**9, lanes=2 * 10**9, last=1)
    with pytest.raises(train_gpt.LackOfMemory, match="lanes"):
        decode(frozen(cfg), train_gpt.Runtime(cfg), cfg, bytes(64), plan)


def test_learning_asks_for_its_memory_first():
    """A step of Adam on all that many steps of lanes have coded."""
    cfg = tiny(**SMALL | RATE | dict(lane_ttt_every=10**9))
    rt, model = train_gpt.Runtime(cfg), frozen(cfg)
    with pytest.raises(train_gpt.LackOfMemory, match="LANE_TTT_EVERY=1000000000 steps of 3 lanes"):
        LaneLearner(model, rt, cfg, [LaneCache(model, 3, cfg.window)])


def test_a_piece_knows_nothing_of_what_its_lane_read_before():
    """Network and contexts: the first target of a piece is predicted as a document's."""
    cfg = tiny(**SMALL | dict(eval_lanes=1, eval_piece_tokens=8, lane_ttt=False))
    model, rt = frozen(cfg), train_gpt.Runtime(cfg)
    one, other = documents(30, seed=1), documents(30, seed=2)
    other[17:25] = one[17:25]  # the third piece
    found = [train_gpt.score_documents(model, rt, cfg, text)[0].log_prob for text in (one, other)]
    assert (found[0][16:24] == found[1][16:24]).all() and (found[0] != found[1]).any()
    times, threads = train_gpt.LaneSchedule(one, CodingPlan.of(one, cfg, 1)).order(one).schedule
    assert [len([*group]) for _, group in itertools.groupby(threads)] == [9, 8, 8, 6]
    assert times.tolist() == [*range(31)]
