"""The codec: what is coded is decoded, at the price of the score; what was changed is refused."""

import itertools
import json
import math
import os
import shutil
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import (
    FRONTIER,
    ROOT,
    SCRIPT,
    launch,
    pack_artifact,
    perturbed,
    shared_folder,
    tiny,
    train_gpt,
    validation,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import coding_order, scored_documents

from train_gpt import (
    BOS,
    CodingPlan,
    LaneStep,
    StreamError,
    coder_integers,
    decode,
    encode,
    score_documents,
)

# Two layers of width 16; still every switch of the TINY configuration.
SMALL = dict(
  num_layers=2, model_dim=16, num_heads=2, num_kv_heads=1, bigram_dim=4, ve_dim=4, eval_lanes=3
)  # fmt: skip
WINDOW = 16
MIXERS = ("blend", "cascade", "none")
SWITCHES = {  # of the five systems: name -> changes to TINY
    "all": {},
    "pre_enrichment": dict(pre_enrich_dim=24),
    "recurrence": dict(depth_recurrence=(1, 2)),
    "linear_bigram": dict(bigram_kind="linear"),
    "linear_bigram_unreset": dict(bigram_kind="linear", bos_reset=False, pre_enrich_dim=24),
    "no_bigram": dict(bigram_vocab_size=0),
    "no_smear": dict(smear_gate=False),
    "unreset": dict(bos_reset=False),
    "no_value_residual": dict(value_residual=False),
    "no_gates": dict(gated_attention=False),
    "no_value_embedding": dict(ve_enabled=False),
    "polyglu": dict(polyglu_enabled=True),
    "relu": dict(leaky_slope=0.0, ln_scale=False),
    "xsa_nowhere": dict(xsa_last_n=0),
    "xsa_everywhere": dict(xsa_last_n=4),
    "full_rotation": dict(rope_dims=0, rope_train_seq_len=1024),
    "ungrouped": dict(num_kv_heads=4),
    "quantised": dict(qat_enabled=True, late_qat=False),
    "frontier": FRONTIER,
}


def frozen(cfg, seed=0):
    return perturbed(cfg, seed).eval().requires_grad_(False)


MODELS = {}


def model_of(cfg):
    """One a configuration of the model."""
    key = tuple(getattr(cfg, name) for name in train_gpt.MODEL_FIELDS)
    if key not in MODELS:
        MODELS[key] = frozen(cfg)
    return MODELS[key]


def documents(*sizes, seed=0, vocab_size=64):
    """A stream of documents of so many tokens, without their BOS"""
    rng = np.random.default_rng(seed)
    parts = [np.append(BOS, rng.integers(2, vocab_size, size)) for size in sizes]
    return np.concatenate(parts).astype(np.uint16)


def stream_of(*tokens):
    return np.array([BOS, *tokens], np.uint16)


def coded(cfg, stream, groups=1, targets=None):
    """Encode and decode -> words; what both return must be the same."""
    rt, model, shape = train_gpt.Runtime(cfg), model_of(cfg), CodingPlan.of(stream, cfg, groups)
    shape = shape._replace(targets=shape.targets if targets is None else targets)
    words, (text, count, mass_error, *sums) = encode(model, rt, cfg, stream, shape)
    again, counted, mass, *summed = decode(model, rt, cfg, words, shape)
    assert again.dtype == np.uint16 and again.tobytes() == text.tobytes()
    assert (counted, mass) == (count, mass_error) and mass_error < 1e-12
    assert summed == sums and abs(len(words) - sums[0] / np.log(256)) < 16 + 1e-3 * count
    return words, text, count


def round_trip(stream, groups=1, **changes):
    """-> bytes that all of a stream takes; it comes back."""
    words, text, count = coded(tiny(**SMALL | changes), stream, groups)
    assert text.tobytes() == stream.tobytes() and count == len(stream) - 1
    return len(words)


@settings(max_examples=200, deadline=None)
@given(numbers=st.sets(st.integers(0, 70_000), max_size=40), tail=st.binary(max_size=6))
def test_documents_ahead_come_back(numbers, tail):
    plan = CodingPlan(70_001, 3, 2, 1, 99, 16, tuple(sorted(numbers)))
    body = plan.side_bytes() + tail
    bare = plan._replace(ahead=())
    assert train_gpt.read_side_bytes(bare, len(numbers), 0, body) == plan
    queue = [*plan.queue()]
    assert sorted(queue) == [*range(70_001)] and queue[: len(numbers)] == [*plan.ahead]
    assert plan.side_nats() == pytest.approx(len(plan.side_bytes()) * 8 * math.log(2))


@pytest.mark.parametrize(
    ("count", "body"),
    [
        (1, b""),
        (2, b"\x01\x80"),  # cut
        (1, b"\x80\x00"),  # a longer way to say 0, which is no gap
        (1, b"\x81\x00"),  # a longer way to say 1
        (2, b"\x03\x00"),  # twice the same
        (2, b"\x03\x08"),  # the eleventh of ten
        (1, b"\xff" * 99),
    ],
)
def test_side_bytes_that_nobody_wrote(count, body):
    with pytest.raises(ValueError, match="numbers of"):
        train_gpt.read_side_bytes(CodingPlan(10, 3, 2, 1, 99, 16), count, 0, body)


def test_the_longest_are_ahead():
    """Of 12, 3, 40, 7 and 41 tokens; ties go to the first. Where all begin at once it is no use."""
    stream = documents(11, 2, 39, 6, 41)
    for count, ahead in ((0, ()), (1, (4,)), (2, (2, 4)), (3, (0, 2, 4)), (9, ())):
        cfg = tiny(**SMALL | dict(eval_lanes=2, eval_longest_first=count))
        assert CodingPlan.of(stream, cfg, 1).ahead == ahead
    cfg = tiny(**SMALL | dict(eval_lanes=5, eval_longest_first=2))
    assert CodingPlan.of(stream, cfg, 1).ahead == ()
    assert CodingPlan.of(documents(3, 2, 5), replace(cfg, eval_lanes=1), 1).ahead == (0, 2)
    assert CodingPlan.of(documents(3, 3, 3), replace(cfg, eval_lanes=1), 1).ahead == ()  # as it is


def test_a_forged_number_of_documents_asks_for_no_memory():
    plan = CodingPlan(10**12, 3, 2, 1, 99, 16, (5, 7))
    assert [*itertools.islice(plan.queue(), 6)] == [5, 7, 0, 1, 2, 3]
    header = dict(shape=[10**30, 3, 2, 1, 99, 16], made=dict(device="cpu x", threads=1))
    with pytest.raises(ValueError, match="a plan of"):
        train_gpt.StreamHeader.parse(header, b"")


@pytest.mark.parametrize("groups", [1, 2])
def test_longest_first_round_trip(groups):
    """Its side bytes are part of what is coded; the text comes back in its own order."""
    stream = documents(5, 40, 3, 9, 33, 2, 8, 8)
    plain = round_trip(stream, groups)
    ahead = round_trip(stream, groups, eval_longest_first=2)
    assert ahead > 0 and abs(ahead - plain) < 40


# -----------------------------------------------------------------------------
# Round trips

EDGES = {
    "empty": stream_of(),
    "one_token": stream_of(5),
    "one_zero": stream_of(0),
    "one_bos": stream_of(BOS),
    "all_equal": stream_of(*[7] * 300),
    "random": documents(300, seed=1),
    "never_seen": stream_of(*range(2, 64), 0),
    "ends_in_bos": np.append(documents(9, 30, 4), np.uint16(BOS)),
    "two_bos_in_a_row": stream_of(5, 6, BOS, BOS, 7, 8, BOS, BOS, BOS, 9),
    "nothing_but_bos": stream_of(*[BOS] * 8),
    "starts_with_two_bos": stream_of(BOS, 4, 5, BOS, 6),
    "fewer_documents_than_lanes": documents(20, 11),
    "one_document": documents(40),
    "many_documents": documents(*range(17)),
    "longer_than_the_window": documents(3 * WINDOW + 5, WINDOW, WINDOW + 1, 5 * WINDOW),
    "last_is_the_longest": documents(3, 2, 5, 70),
    "last_is_the_shortest": documents(30, 30, 30, 1),
}


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("name", EDGES)
def test_round_trip(name, groups):
    """One group of lanes and two, as of two ranks: three lanes become four."""
    round_trip(EDGES[name], groups)


def test_round_trip_of_every_prefix():
    stream = stream_of(5, 6, 7, BOS, 5, 6, 7, 8, BOS, BOS, 5, 5, 5, 5, BOS, 9, 5, 6, BOS)
    for size in range(1, len(stream) + 1):
        round_trip(stream[:size])


@pytest.mark.parametrize("mixer", ["blend", "none"])
def test_round_trip_of_4_000_repeats(mixer):
    """In 40 documents. Counts make them cheap; the model alone does not."""
    stream = np.tile(stream_of(*[5, 9] * 50), 40)[:4_001]
    size = round_trip(stream, ngram_mixer=mixer, eval_lanes=40)
    assert (size > 1000) == (mixer == "none")


@pytest.mark.slow
def test_round_trip_of_10_000_repeats_in_one_document():
    assert round_trip(stream_of(*[5] * 10_000)) < 500


@pytest.mark.parametrize("lanes", [1, 2, 5, 64])
def test_lanes_need_not_fit_the_documents(lanes):
    round_trip(documents(20, 3, 0, 31, 17, 8, 1), eval_lanes=lanes)


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("changes", [{}, dict(pre_enrich_dim=8), dict(depth_recurrence=(0, 1))])
def test_round_trip_by_every_mixer(mixer, changes):
    stream = np.tile(documents(20, 31, 9), 3)
    round_trip(stream, ngram_mixer=mixer, **changes)


@pytest.mark.parametrize("name", SWITCHES)
def test_round_trip_with_every_switch(name):
    cfg, stream = tiny(**SWITCHES[name], eval_lanes=3), documents(20, 9, 14, 30, seed=2)
    _, text, count = coded(cfg, stream)
    assert text.tobytes() == stream.tobytes() and count == len(stream) - 1


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.lists(st.sampled_from([0, BOS, BOS, 2, 3, 63]), max_size=60),
    lanes=st.integers(1, 5),
    groups=st.integers(1, 3),
)
def test_round_trip_of_any_text(tokens, lanes, groups):
    round_trip(stream_of(*tokens), groups, eval_lanes=lanes)


def schedule(stream, lanes):
    """(step, place of the target, lane) of the targets in the order of coding."""
    steps = enumerate(coding_order(stream, lanes))
    return [(step, target, lane) for step, pairs in steps for lane, target in pairs]


@pytest.mark.parametrize("targets", [0, 1, 2, 3, 4, 50, 51, 52, 121, 10_000])
def test_a_stretch_is_the_first_steps(targets):
    """Whole steps until so many targets are coded; the text is what these are of each document that
    was begun."""
    cfg = tiny(**SMALL)
    stream = documents(20, 31, 9, 0, 44, 16)
    _, text, count = coded(cfg, stream, targets=targets)
    order, expected = schedule(stream, 3), 0
    for step in range(order[-1][0] + 1):
        expected += sum(s == step for s, *_ in order) if expected < targets else 0
    done = {target + 1 for _, target, _ in order[:expected]}
    begun = {place - 1 for place in done if stream[place - 1] == BOS}
    kept = [t for i, t in enumerate(stream) if i in begun or (i in done and t != BOS)]
    assert count == expected and text.tolist() == (kept or [BOS])


# -----------------------------------------------------------------------------
# The schedule


@settings(max_examples=150, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=12),
    lanes=st.integers(1, 6),
    groups=st.integers(1, 3),
    last=st.sampled_from(["text", "BOS"]),
    ahead=st.integers(0, 13),
    piece=st.integers(0, 9),
)
def test_the_schedule_is_what_lanes_come_to_as_they_go(sizes, lanes, groups, last, ahead, piece):
    """run_lanes, along the text, without a network."""
    stream = documents(*sizes)
    if last == "BOS" or len(stream) < 2:
        stream = np.append(stream, np.uint16(BOS))
    room = dict(eval_lanes=lanes, eval_longest_first=ahead, eval_piece_tokens=piece)
    plan = CodingPlan.of(stream, tiny(**SMALL | room), groups)
    with pytest.MonkeyPatch.context() as patch:
        nothing = torch.zeros(plan.lanes // groups, 1), torch.zeros(plan.lanes // groups)
        patch.setattr(train_gpt, "require_lanes", lambda *_: None)
        patch.setattr(train_gpt, "LaneCache", lambda *_: None)
        patch.setattr(train_gpt, "lane_pass", lambda *_: lambda *_: nothing)
        runtime = train_gpt.Runtime(tiny())
        read = train_gpt.tokens_of_text(stream, plan)
        steps = []
        train_gpt.run_lanes(None, runtime, plan, lambda _, s: steps.append(s) or read(_, s))
    schedule = train_gpt.LaneSchedule(stream, plan)
    inputs, places = schedule.steps(0, len(steps) + 3, slice(None))
    assert (inputs[len(steps) :] < 0).all() and schedule.lengths.max() == len(steps)
    starts, sizes, goes_on = train_gpt.Pieces.of(stream, plan.length)
    assert plan.goes_on(np.arange(len(starts))).tolist() == goes_on.tolist()
    assert not piece or sizes.max() <= piece
    order, times, who = [], [0] * len(steps[0].lanes), [*steps[0].lanes]
    threads, read_before = {lane: lane for lane in who}, {}
    for t, step in enumerate(steps):
        for lane, number in zip(step.lanes, step.pieces, strict=True):
            if read_before.get(lane, number) != number and goes_on[read_before[lane]]:
                threads[lane] = 1000 * t + lane  # nothing of what the lane read before is seen
            read_before[lane] = number
        assert np.flatnonzero(inputs[t] >= 0).tolist() == step.lanes.tolist()
        assert places[t, step.lanes].tolist() == step.places.tolist()
        order += (starts[step.pieces] + step.places).tolist()
        assert inputs[t, step.lanes].tolist() == order[-len(step.lanes) :]
        times += [t + 1] * len(step.lanes)
        who += [threads[lane] for lane in step.lanes]
    coding = schedule.order(stream)
    assert coding.targets.tolist() == order
    assert coding.tokens.tolist() == [BOS] * len(steps[0].lanes) + stream[1:][order].tolist()
    assert coding.schedule[0].tolist() == times
    pairs = {*zip(coding.schedule[1].tolist(), who, strict=True)}  # the same threads, by any number
    assert len(pairs) == len({*who}) == len({*coding.schedule[1].tolist()})


# -----------------------------------------------------------------------------
# The order of coding, and the cost


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("name", ["many_documents", "two_bos_in_a_row", "ends_in_bos", "one_bos"])
def test_order_is_that_of_the_lanes(name, groups):
    stream = EDGES[name]
    cfg = tiny(**SMALL)
    _, order = score_documents(model_of(cfg), train_gpt.Runtime(cfg), cfg, stream)
    wanted, begun = schedule(stream, 3), min(3, len(np.flatnonzero(stream[:-1] == BOS)))
    assert order.targets.tolist() == [target for _, target, _ in wanted]
    assert order.tokens.tolist() == [BOS] * begun + [stream[t + 1] for _, t, _ in wanted]
    times, lanes = order.schedule
    assert times.tolist() == [0] * begun + [1 + step for step, *_ in wanted]
    assert lanes.tolist() == [*range(begun), *(lane for *_, lane in wanted)]


@pytest.mark.parametrize("mixer", MIXERS)
def test_coded_size_is_the_score(mixer):
    """Within the rounding to 24 bits and the coder's last words."""
    cfg = tiny(**SMALL | dict(ngram_mixer=mixer, eval_lanes=12))
    stream = np.tile(documents(40, 90, 3, 61), 6)
    words, *_ = coded(cfg, stream)
    _, final, _ = scored_documents(model_of(cfg), cfg, stream)
    bits = -final.sum() / math.log(2)
    assert -1 <= 8 * len(words) - bits <= 2 * 64 / 2**24 * len(final) + 64


# -----------------------------------------------------------------------------
# Lanes against whole rows


def whole_rows(model, stream, shared=None):
    """log p and entropy of all targets, each document in a forward pass of its own."""
    starts = [*np.flatnonzero(stream[:-1] == BOS), len(stream) - 1]
    columns = []
    for a, b in zip(starts[:-1], starts[1:], strict=True):
        ids = torch.from_numpy(stream[a:b].astype(np.int64))[None]
        with torch.no_grad():
            hidden = model.hidden(ids, shared(model, ids) if shared else None)
            log_probs = model.logits(hidden)[0].double().log_softmax(-1)
        goal = torch.from_numpy(stream[a + 1 : b + 1].astype(np.int64))[:, None]
        entropy = -(log_probs.exp() * log_probs).sum(-1)
        columns.append(torch.stack([log_probs.gather(1, goal)[:, 0], entropy]))
    return torch.cat(columns, 1).numpy()


@pytest.mark.parametrize("name", SWITCHES)
def test_lanes_are_the_ordinary_forward(name):
    """Documents of at most a window, in lanes that others had before."""
    cfg = tiny(**SWITCHES[name], eval_lanes=3)
    stream = documents(WINDOW - 1, 4, 0, 9, WINDOW - 1, 1, 12, WINDOW - 1, seed=4)
    scores, _ = score_documents(model_of(cfg), train_gpt.Runtime(cfg), cfg, stream)
    wanted = whole_rows(model_of(cfg), stream)
    np.testing.assert_allclose(scores[:2], wanted, rtol=0, atol=1e-4)


class Banded(train_gpt.Context):
    """A row in which each position sees itself and the WINDOW - 1 before it."""

    def attend(self, q, k, v):
        place = torch.arange(q.shape[2])
        back = place[:, None] - place
        mask = (back >= 0) & (back < WINDOW)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)


@pytest.mark.parametrize("name", ["all", "recurrence", "pre_enrichment"])
def test_longer_documents_see_the_last_window(name):
    cfg, stream = tiny(**SWITCHES[name], eval_lanes=3), documents(70, 33, 50, 16, 17, seed=5)
    scores, _ = score_documents(model_of(cfg), train_gpt.Runtime(cfg), cfg, stream)
    wanted, whole = (whole_rows(model_of(cfg), stream, how)[0] for how in (Banded, None))
    np.testing.assert_allclose(scores.log_prob, wanted, rtol=0, atol=1e-4)
    assert abs(scores.log_prob - whole)[WINDOW + 1 : 70].max() > 1e-2  # so the bound says something


def test_documents_alone_are_documents_among_others():
    cfg = tiny(eval_lanes=4)
    sizes = (20, 9, 33, 0, 16, 25)
    stream = documents(*sizes)
    among, _ = score_documents(model_of(cfg), train_gpt.Runtime(cfg), cfg, stream)
    a = 0
    for size in sizes:
        alone = stream[a : a + size + 2]  # with the BOS that ends it
        scores, _ = score_documents(model_of(cfg), train_gpt.Runtime(cfg), cfg, alone)
        part = among.log_prob[a : a + len(alone) - 1]
        np.testing.assert_allclose(scores.log_prob, part, rtol=0, atol=2e-5)
        a += size + 1


@settings(max_examples=8, deadline=None)
@given(document=st.integers(0, 4), place=st.integers(0, 19), seed=st.integers(1, 99))
def test_later_tokens_change_no_bit_before_them(document, place, seed):
    """Other tokens in one document from `place` on: what the model says before, and of the other
    documents, keeps every bit; the mixture's every bit of what was coded before."""
    cfg = tiny(**SMALL, pre_enrich_dim=24)
    stream, first = np.tile(documents(20, seed=3), 5), 21 * document + 1 + place
    other, end = stream.copy(), 21 * document + 21
    other[first:end] = documents(20, seed=seed)[1 + place :]
    other[first] = stream[first] % 60 + 2
    both = [scored_documents(model_of(cfg), cfg, s) for s in (stream, other)]
    (a, final, order), (b, changed, same) = both
    targets = np.arange(len(stream) - 1)
    outside = (targets < first - 1) | (targets >= end)  # target t is token t + 1
    assert a.log_prob[outside].tobytes() == b.log_prob[outside].tobytes()
    outside |= targets == first - 1  # before the token is known
    assert a.entropy[outside].tobytes() == b.entropy[outside].tobytes()
    assert order.targets.tolist() == same.targets.tolist()
    times = order.schedule[0][-len(targets) :]
    (place,) = np.flatnonzero(order.targets == first - 1)
    before = order.targets[: np.searchsorted(times, times[place])]  # earlier steps
    assert final[before].tobytes() == changed[before].tobytes()
    assert final[first - 1] != changed[first - 1]


# -----------------------------------------------------------------------------
# Integers and the coder


def golden_integers(rows=40, vocab_size=50):
    """Fixed distributions by integer arithmetic alone, and their tokens."""
    weights = (np.arange(rows)[:, None] * 7919 + np.arange(vocab_size) * 104_729) % 997 + 1
    weights = weights**3
    free = 2**24 - vocab_size
    integers = weights * free // weights.sum(1, keepdims=True)
    integers[:, 0] += free - integers.sum(1)
    return integers.astype(np.float64), (np.arange(rows) * 31 % vocab_size).astype(np.uint16)


GOLDEN = bytes.fromhex(
    "2c0f000089f3b9ce7b7b2ed42e4c6d6a79fc2da704c9ab2c427b20ae1102662e647d6f397c382f786bc5f7dd"
)


class Cuts(list):
    """In the place of a plan"""

    length = 0

    def side_bytes(self):
        return b""


def test_golden_stream(monkeypatch):
    """Fixed integers give fixed bytes, row by row or all at once; a change of the coder is noticed:
    streams made before could no longer be read."""
    integers, tokens = golden_integers()
    stream = np.append(np.uint16(BOS), tokens)

    def run_codec(model, rt, cfg, plan, pick_tokens, most_bits=0):
        steps = [(a, b, LaneStep(0, np.zeros(b - a, int), np.arange(a, b))) for a, b in plan]
        found = [pick_tokens(integers[a:b], step) for a, b, step in steps]
        return np.concatenate(found), len(integers), 0.0

    monkeypatch.setattr(train_gpt, "run_codec", run_codec)
    monkeypatch.setattr(np, "flatnonzero", lambda _: np.zeros(1, int))  # one document
    for cuts in ([(0, 40)], [(i, i + 1) for i in range(40)], [(0, 7), (7, 40)]):
        plan = Cuts(cuts)
        words, (text, *_) = encode(None, None, None, stream, plan)
        assert words == GOLDEN, words.hex()
        again = decode(None, None, None, GOLDEN, plan)[0]
        assert text.tolist() == tokens.tolist() == again.tolist()


@st.composite
def distributions(draw):
    """float64 (rows, V): flat, sharp, with zeros, with nearly all in one place"""
    vocab_size = draw(st.sampled_from([2, 3, 64, 1024, 65_536]))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    power = draw(st.sampled_from([0.0, 1.0, 30.0]))
    p = rng.random((3, vocab_size)) ** power
    p[rng.random(p.shape) < draw(st.sampled_from([0.0, 0.5, 0.99]))] = 0.0
    p[:, rng.integers(vocab_size)] += draw(st.sampled_from([1e-9, 1.0, 1e12]))
    return p / p.sum(1, keepdims=True)


@settings(max_examples=60, deadline=None)
@given(p=distributions())
def test_integers_are_a_distribution_that_costs_next_to_nothing(p):
    before, vocab_size = p.copy(), p.shape[1]
    integers = coder_integers(p)
    assert integers.dtype == np.float64 and (integers == np.floor(integers)).all()
    assert (integers >= 0).all() and (integers.sum(1) == 2**24 - vocab_size).all()
    assert p.tobytes() == before.tobytes()
    used = (integers + 1) / 2**24  # what the coder spends
    assert np.abs(used.sum(1) - 1).max() < 1e-12
    cost = np.log2(np.maximum(p, 1e-300)) - np.log2(used)
    assert cost.max() <= 2 * vocab_size / 2**24


def test_integers_by_hand():
    """floor(p (2^24 - V)); what is left goes to the likeliest: a stream's bytes depend on it."""
    got = coder_integers(np.array([[0.5, 0.3, 0.2], [0.0, 1 / 3, 2 / 3]]))
    assert got.tolist() == [[8_388_608, 5_033_163, 3_355_442], [0, 5_592_404, 11_184_809]]


@pytest.mark.parametrize(
    "row",
    [
        [math.nan, 0.5, 0.5],
        [math.inf, 0.0, 0.0],
        [0.51, 0.25, 0.25],
        [0.49, 0.25, 0.25],
        [0.0, 0.0, 0.0],
        [0.5, 0.25, 0.25 + 1e-5],
        [1.5, -0.25, -0.25],
        [0.6, 0.5, -0.1],
    ],
)
def test_rows_that_are_no_distribution_are_refused(row):
    good = [0.2, 0.3, 0.5]
    coder_integers(np.array([good]))
    with pytest.raises(ValueError, match="not a distribution"):
        coder_integers(np.array([good, row, good]))


# -----------------------------------------------------------------------------
# Mixtures that are no score


def test_a_mixture_that_peeks_cannot_be_decoded(monkeypatch):
    """It spends next to nothing, on a text that nobody gets back."""
    cfg, stream = tiny(**SMALL), documents(40, 30, 50)
    honest, *_ = coded(cfg, stream)
    truth = [int(stream[target + 1]) for _, target, _ in schedule(stream, 3)]

    class Leaky(train_gpt.Mixture):
        def distributions(self, outputs, lanes):
            p = super().distributions(outputs, lanes)
            for row in p:
                peeked = truth.pop(0) if truth else int(row.argmax())
                row *= 0.01
                row[peeked] += 0.99
            return p

    rt, shape = train_gpt.Runtime(cfg), CodingPlan.of(stream, cfg, 1)
    monkeypatch.setattr(train_gpt, "Mixture", Leaky)
    words, (text, _, mass_error, *_) = encode(model_of(cfg), rt, cfg, stream, shape)
    assert len(words) < len(honest) / 10 and text.tobytes() == stream.tobytes()
    assert mass_error < 1e-9 and not truth  # normalised: the mass alone does not show it
    decoded, *_ = decode(model_of(cfg), rt, cfg, words, shape)
    assert decoded.tobytes() != stream.tobytes()


@pytest.mark.parametrize("factor", [1.01, 0.99, 1 + 1e-5])
def test_an_unnormalised_mixture_cannot_be_coded(factor, monkeypatch):
    weights = train_gpt.Blend.weights
    monkeypatch.setattr(train_gpt.Blend, "weights", lambda self, *a: factor * weights(self, *a))
    cfg, stream = tiny(**SMALL), documents(40, 30)
    with pytest.raises(ValueError, match="not a distribution"):
        encode(model_of(cfg), train_gpt.Runtime(cfg), cfg, stream, CodingPlan.of(stream, cfg, 1))


# -----------------------------------------------------------------------------
# The stream of a run folder


def honest_claim(folder, cfg, stream):
    """log p of each target by the artifact of a folder, in the order of coding."""
    model = train_gpt.load_artifact(folder / "artifact.bin")
    _, final, order = scored_documents(model, cfg, stream)
    return final[order.targets]


@pytest.fixture(scope="session")
def proved(tmp_path_factory):
    """A folder with code, artifact and stream.bin, made by prove(): (folder, stream, its values)"""
    stream = documents(40, 30, 55, 8, seed=6)
    with shared_folder(tmp_path_factory, "proved") as (folder, empty):
        if empty:
            cfg = tiny(**SMALL, codec_tokens=-1)
            shutil.copy(SCRIPT, folder)
            weights = dict(frozen(cfg).named_parameters())
            artifact = pack_artifact(weights, cfg)
            (folder / "artifact.bin").write_bytes(artifact)
            rt = train_gpt.Runtime(cfg)
            rt.folder = folder
            report = SimpleNamespace(cfg=cfg, rt=rt, text=SimpleNamespace(stream=stream))
            coded, line = train_gpt.prove(report, honest_claim(folder, cfg, stream))
            (folder / "values.json").write_text(json.dumps([coded.mass_error, line]))
    return folder, stream, json.loads((folder / "values.json").read_text())


@pytest.fixture
def copied(proved, tmp_path):
    """-> folder of its own with the three files; function that changes header and words"""
    for name in ("train_gpt.py", "artifact.bin", "stream.bin"):
        shutil.copy(proved[0] / name, tmp_path)
    path = tmp_path / "stream.bin"

    def reseal(change):
        header, words = train_gpt.unseal(train_gpt.STREAM_PREFIX, path.read_bytes())
        header, words = change(header, words)
        path.write_bytes(train_gpt.seal(train_gpt.STREAM_PREFIX, header, words))

    return tmp_path, reseal


def decode_here(folder):
    """decode_folder in this process -> tokens"""
    train_gpt.decode_folder(train_gpt.Config(decode=str(folder), device="cpu"))
    return np.load(folder / "decoded.npy")


def refusal(folder):
    with pytest.raises(StreamError) as caught:
        decode_here(folder)
    assert not (folder / "decoded.npy").exists()
    message = str(caught.value)
    assert "stream.bin" in message and "fix" in message and "\n" not in message
    return message


def test_what_another_process_decoded(proved):
    folder, stream, (mass_error, line) = proved
    assert line["decoded"] == "ok" and mass_error < 1e-12
    assert line["proved_tokens"] == line["total_tokens"] == len(stream) - 1
    _, words = train_gpt.unseal(train_gpt.STREAM_PREFIX, (folder / "stream.bin").read_bytes())
    assert line["coded_bytes"] == len(words)
    claim = honest_claim(folder, tiny(**SMALL), stream)
    assert line["claimed_bytes"] == math.ceil(-claim.sum() / math.log(256))
    assert not (folder / "decoded.npy").exists()


@pytest.mark.parametrize(
    ("tokens", "minutes", "pace", "wanted"),
    [
        (-1, 0.0, 1.0, 5000),
        (2500, 0.0, 1e-6, 2500),
        (2500, 1.1, 0.005, 5000),  # there and back, more as counts grow: 65 seconds
        (2500, 1.0, 0.005, 2500),
        (10, 0.0, 1.0, train_gpt.WITNESSES),
        (9000, 0.0, 1.0, 5000),
    ],
)
def test_how_much_is_proved(tokens, minutes, pace, wanted, monkeypatch, tmp_path):
    """All of it where that takes no longer than CODEC_MINUTES; else a command proves the rest."""
    cfg = tiny(**SMALL, codec_tokens=tokens, codec_minutes=minutes, data_path=str(tmp_path))
    stream, rt, lines = documents(5000), train_gpt.Runtime(cfg), []
    monkeypatch.setattr(rt, "log", lambda *words, **values: lines.append((words, values)))
    monkeypatch.setattr(train_gpt, "coding_pace", lambda *_: pace)
    plan = CodingPlan.of(stream, cfg, 1)
    assert train_gpt.plan_proof(model_of(cfg), rt, cfg, stream, plan) == plan._replace(
        targets=wanted
    )
    assert lines[0][0] == ("expect", "proof")
    assert lines[0][1].items() >= dict(tokens=wanted, of=5000).items()
    assert lines[0][1]["seconds"] == pytest.approx(2.6 * pace * wanted, abs=0.06)
    assert lines[0][1]["memory_mb"] >= 0
    assert len(lines) == 1 + (wanted < 5000)
    if wanted < 5000:
        (_, note), _ = lines[1]
        assert "CODEC_TOKENS=-1 python" in note and f"DATA_PATH={tmp_path}" in note
        assert f"about {5000 * 2.6 * pace / 60:.0f} minutes" in note


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=20),
    lanes=st.integers(1, 6),
    piece=st.sampled_from([0, 7, 13]),
    ahead=st.integers(0, 4),
    share=st.floats(0, 1),
)
def test_steps_are_those_of_the_schedule(sizes, lanes, piece, ahead, share):
    """Of all targets and of the first ones."""
    stream = np.append(documents(*sizes), np.uint16(5))
    cfg = tiny(eval_lanes=lanes, eval_piece_tokens=piece, eval_longest_first=ahead)
    plan = CodingPlan.of(stream, cfg, 1)
    times = train_gpt.LaneSchedule(stream, plan).order(stream).schedule[0][-plan.targets :]
    first = max(1, round(share * plan.targets))
    for targets in (plan.targets, first):
        steps = train_gpt.count_steps(stream, plan._replace(targets=targets))
        assert steps == times[targets - 1]


def test_the_pace_of_coding_is_measured():
    """Of steps behind the warm-up; a text of fewer takes no time worth telling."""
    cfg = tiny(**SMALL)
    stream, rt = documents(200, 200, 200), train_gpt.Runtime(cfg)
    plan = CodingPlan.of(stream, cfg, 1)
    pace = train_gpt.coding_pace(model_of(cfg), rt, cfg, stream, plan)
    began = time.perf_counter()
    encode(model_of(cfg), rt, cfg, stream, plan)
    spent = (time.perf_counter() - began) / train_gpt.count_steps(stream, plan)
    assert 0.1 * spent < pace < 10 * spent
    short = documents(9, 9, 9)
    plan = CodingPlan.of(short, cfg, 1)
    assert train_gpt.coding_pace(model_of(cfg), rt, cfg, short, plan) == 0.0


def swap_artifact(folder, _):
    """By one that no pickier reader would miss: a byte more."""
    with open(folder / "artifact.bin", "ab") as file:
        file.write(b"x")


def swap_stream(folder, _):
    data = (folder / "stream.bin").read_bytes()
    (folder / "stream.bin").write_bytes(data[::-1])


def other_text(_, decoded):
    decoded[7] += 1


@pytest.mark.parametrize(
    ("status", "claim", "meanwhile", "wanted"),
    [
        (0, 1.0, None, "ok"),
        (0, 1.0, other_text, "FAILED"),
        (2, 1.0, None, "FAILED"),
        (0, 0.5, None, "FAILED"),  # of what is coded: a score that this stream does not prove
        (0, 2.0, None, "FAILED"),  # the artifact of a worse run
        (0, 1.0, swap_artifact, "FAILED"),
        (0, 1.0, swap_stream, "FAILED"),
    ],
)
def test_a_proof_compares_what_was_decoded(status, claim, meanwhile, wanted, tmp_path, monkeypatch):
    """In place of the fresh process: one that ends with this status and leaves this text, while
    something happens to the folder. claim: as a multiple of the honest one."""
    cfg, stream = tiny(**SMALL, ngram_enabled=False, codec_tokens=-1), documents(9, 50)
    shutil.copy(SCRIPT, tmp_path)
    artifact = pack_artifact(dict(frozen(cfg).named_parameters()), cfg)
    (tmp_path / "artifact.bin").write_bytes(artifact)
    rt = train_gpt.Runtime(cfg)
    rt.folder = tmp_path

    def run(command, env, **_):
        assert env["DECODE"] == str(tmp_path)
        decoded = stream.copy()
        if meanwhile:
            meanwhile(tmp_path, decoded)
        np.save(tmp_path / "decoded.npy", decoded)
        return SimpleNamespace(returncode=status, stdout=b"")

    honest = honest_claim(tmp_path, cfg, stream)
    monkeypatch.setattr(train_gpt.subprocess, "run", run)
    report = SimpleNamespace(cfg=cfg, rt=rt, text=SimpleNamespace(stream=stream))
    _, line = train_gpt.prove(report, claim * honest)
    assert line["decoded"] == wanted and not (tmp_path / "decoded.npy").exists()


def test_decoding_here_gives_the_text(copied, proved):
    assert decode_here(copied[0]).tobytes() == proved[1].tobytes()


def test_run_folder_is_decoded_from_three_files(smoke_run, dataset, tmp_path):
    """A shrunk run's, in a process of its own, without data or tokenizer."""
    for name in ("train_gpt.py", "artifact.bin", "stream.bin"):
        shutil.copy(smoke_run("one").folder / name, tmp_path)
    done = launch(tmp_path / "train_gpt.py", [], dict(DECODE=str(tmp_path)), 1, tmp_path)
    assert done.returncode == 0, done.stderr
    tokens = np.load(tmp_path / "decoded.npy")
    assert tokens.tolist() == validation(dataset)[0].tolist()
    names = {"train_gpt.py", "artifact.bin", "stream.bin", "decoded.npy"}
    assert {path.name for path in tmp_path.iterdir()} == names


@pytest.mark.parametrize("name", ["torch", "numpy", "constriction", "code", "artifact", "device"])
def test_what_the_stream_was_made_with_is_checked(name, copied):
    """Another version, code, artifact or processor: named, with both values."""
    folder, reseal = copied
    seen = {}

    def change(header, words):
        seen.update(header["made"])
        value = "cpu OTHER" if name == "device" else "0.0.1"
        return header | dict(made=header["made"] | {name: value}), words

    reseal(change)
    message = refusal(folder)
    assert f"made with {name} " in message and str(seen[name]) in message


def test_made_with_is_all_of_these(copied):
    made = {}
    copied[1](lambda header, words: (made.update(header["made"]) or header, words))
    wanted = {"torch", "numpy", "constriction", "code", "artifact", "device", "threads"}
    assert set(made) == wanted


def test_threads_are_those_of_the_stream(copied, proved):
    """The decoder takes the number that the encoder had, whatever its own is."""
    folder, reseal = copied
    threads = []
    reseal(lambda header, words: (threads.append(header["made"]["threads"]) or header, words))
    torch.set_num_threads(threads[0] + 1)
    decode_here(folder)
    assert torch.get_num_threads() == threads[0]
    (folder / "decoded.npy").unlink()
    reseal(lambda header, words: (header | dict(made=header["made"] | dict(threads=0)), words))
    assert "unreadable" in refusal(folder) and "threads" in refusal(folder)


def test_a_gpu_s_stream_is_refused_without_one(copied):
    if torch.cuda.is_available():
        pytest.skip("here is one")
    folder, reseal = copied
    made = dict(device="cuda NVIDIA H100")
    reseal(lambda header, words: (header | dict(made=header["made"] | made), words))
    with pytest.raises(train_gpt.UserError, match="CUDA"):
        decode_here(folder)


def test_settings_that_contradict_each_other_are_refused(copied):
    """Each may be what its own type allows: the stream's reader has only looked at that."""
    forged = dict(ngram_min_order="9", ngram_max_order="2")
    copied[1](lambda header, words: (header | dict(scoring=header["scoring"] | forged), words))
    assert "its settings: NGRAM_MIN_ORDER=9: must be" in refusal(copied[0])


def test_another_artifact_or_code_is_refused(copied, monkeypatch):
    folder, _ = copied
    path = folder / "artifact.bin"
    good = path.read_bytes()
    cfg = tiny(**SMALL)
    other = pack_artifact(dict(frozen(cfg, 1).named_parameters()), cfg)
    for data in (other, good[:-1], bytes([good[0] ^ 1]) + good[1:]):
        path.write_bytes(data)
        assert "made with artifact " in refusal(folder)
    path.write_bytes(good)
    made = train_gpt.fingerprint
    changed = SCRIPT.read_bytes() + b"\n"
    monkeypatch.setattr(train_gpt, "fingerprint", lambda rt, code, a: made(rt, changed, a))
    assert "made with code " in refusal(folder)


def test_every_flipped_bit_is_noticed(copied):
    folder, _ = copied
    path = folder / "stream.bin"
    good = path.read_bytes()
    for place in np.linspace(0, 8 * len(good) - 1, 60).astype(int).tolist():
        bad = bytearray(good)
        bad[place // 8] ^= 1 << place % 8
        path.write_bytes(bad)
        assert "unreadable" in refusal(folder)


@pytest.mark.parametrize("left", [0, 1, 8, 20, 100, -1, -4, -32])
def test_truncated_streams_are_refused(left, copied):
    path = copied[0] / "stream.bin"
    path.write_bytes(path.read_bytes()[:left])
    assert "unreadable" in refusal(copied[0])


def test_missing_files_are_named(copied):
    folder, _ = copied
    for name in ("artifact.bin", "stream.bin"):
        data = (folder / name).read_bytes()
        (folder / name).unlink()
        assert name in refusal(folder)
        (folder / name).write_bytes(data)


def flip(words, place):
    words = bytearray(words)
    words[place] ^= 1
    return bytes(words)


FORGERIES = {  # header and words, signed anew
    "first_word": lambda h, w: (h, flip(w, 3)),
    "middle": lambda h, w: (h, flip(w, len(w) // 2)),
    "truncated": lambda h, w: (h, w[:-8]),
    "no_words": lambda h, w: (h, b""),
    "other_text": lambda h, w: (h | dict(text="0" * 64), w),
    "fewer_lanes": lambda h, w: (h | dict(shape=[4, 8, 2, 1, 136, 16]), w),
    "scored_otherwise": lambda h, w: (
        h | dict(scoring=h["scoring"] | dict(ngram_max_order="3")),
        w,
    ),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_forged_streams_are_refused(name, copied):
    """What decodes at all decodes to another text."""
    folder, reseal = copied
    reseal(FORGERIES[name])
    assert "another text" in refusal(folder)


@pytest.mark.parametrize("lost", ["shape", "made", "text", "scoring"])
def test_headers_without_a_field_are_refused(lost, copied):
    folder, reseal = copied
    reseal(lambda header, words: ({k: v for k, v in header.items() if k != lost}, words))
    assert lost in refusal(folder)


@pytest.mark.parametrize(
    "shape",
    [
        [4, 8, 3, 2, 136, 16],  # lanes that do not fill their groups
        [4, 8, 3, 4, 136, 16],
        [4, 8, 0, 0, 136, 16],
        [4, 8, 3, True, 136, 16],
        [4, 8, 3, 1, -1, 16],
        [4, 8, 3, 1, 136, 17],
        [4, 8, 10**9, 1, 136, 16],
        [4, 8, 3.0, 1, 136, 16],
        [4, 8, 3, 1, 136],
        "lanes!",
        {},
    ],
)
def test_plans_that_no_encoder_makes_are_refused(shape, copied):
    folder, reseal = copied
    reseal(lambda header, words: (header | dict(shape=shape), words))
    assert refusal(folder)


def test_an_artifact_that_is_not_finite_is_refused(copied, proved):
    """Its sha256 fits, and the stream names it."""
    folder, reseal = copied
    model = train_gpt.load_artifact(folder / "artifact.bin")
    model.q_gain.fill_(math.nan)
    packed = pack_artifact(dict(model.named_parameters()), model.cfg)
    (folder / "artifact.bin").write_bytes(packed)
    made = dict(artifact=train_gpt.sha256(packed))
    reseal(lambda header, words: (header | dict(made=header["made"] | made), words))
    with pytest.raises(train_gpt.ArtifactError, match="q_gain holds what is no number; fix"):
        decode_here(folder)


@pytest.mark.parametrize("made", [[], {}, dict(device=3), dict(device="tpu x"), dict(threads=0)])
def test_machines_that_no_encoder_names_are_refused(made, copied):
    folder, reseal = copied
    reseal(lambda header, words: (header | dict(made=made and header["made"] | made), words))
    assert refusal(folder)


def test_nothing_of_a_path_or_host_is_in_the_stream(proved):
    header, _ = train_gpt.unseal(train_gpt.STREAM_PREFIX, (proved[0] / "stream.bin").read_bytes())
    text = json.dumps(header)
    assert str(ROOT) not in text and os.uname().nodename not in text
