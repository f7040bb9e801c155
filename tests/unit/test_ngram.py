"""Exact counts against a dictionary, the published backoff and the learned mixture on top."""

import functools
import math
import sysconfig
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from as_written import backoff_match
from helpers import SilentRuntime, perturbed, random_stream, tiny, train_gpt
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import (
    CFG,
    ORDERS,
    bits,
    cascade,
    filled_store,
    mixed,
    mixed_by,
    mixture,
    oracle,
    scored_by,
    uniform,
)

import prepare
from train_gpt import (
    Blend,
    ContextDictionary,
    ContextTable,
    CountStore,
    Mixture,
    Scores,
    backoff_alpha,
    confidence,
    count_ngrams,
    make_mixer,
    ngram_counts,
)

VOCABULARIES = (2, 256, 1024, 8192, 65535, 65536)
IMPLEMENTATIONS = ["numba", "torch", *(["cuda"] if torch.cuda.is_available() else [])]
PAIR_BITS = 5  # what the pair of gate and model lost at most was 3 bits, on all of these texts


def counted(tokens, vocab_size, max_order, implementation="numba", key_bits=63):
    """(orders, 5, N) from one implementation with `key_bits` of sort key."""
    device = "cuda" if implementation == "cuda" else "cpu"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_gpt, "KEY_BITS", key_bits)
        patch.setattr(train_gpt, "has_package", lambda name: implementation == name == "numba")
        rows = list(count_ngrams(tokens, vocab_size, max_order, device))
    assert [order for order, _ in rows] == list(range(1, max_order + 1))
    assert {stats.dtype for _, stats in rows} == {np.dtype(np.int32)}
    return np.array([stats.T for _, stats in rows])


@st.composite
def streams(draw):
    vocab_size = draw(st.sampled_from(VOCABULARIES))
    alphabet = draw(st.lists(st.integers(0, vocab_size - 1), min_size=1, max_size=6))
    block = draw(st.lists(st.sampled_from(alphabet), max_size=40))
    return vocab_size, np.array(block * draw(st.integers(1, 3)), dtype=np.int64)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("key_bits", [63, 9])  # 9: sorted in pieces of two groups
@settings(max_examples=60, deadline=None)
@given(stream=streams())
def test_counts_equal_a_dictionary(implementation, key_bits, stream):
    vocab_size, tokens = stream
    before = tokens.copy()
    got = counted(tokens, vocab_size, 12, implementation, key_bits)
    assert np.array_equal(got, oracle(tokens, 12))
    assert np.array_equal(tokens, before)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("vocab_size", VOCABULARIES)
def test_counts_of_longer_streams(implementation, vocab_size):
    """Random, then what repeats; 24 bits force the sort in pieces."""
    random = np.random.default_rng(vocab_size).integers(0, vocab_size, 1500)
    random[7] = vocab_size - 1
    tokens = np.concatenate([random, np.tile(random[:50], 12), np.zeros(200, int), random[:500]])
    expected = oracle(tokens, 12)
    for key_bits in (63, 24):
        got = counted(tokens.astype(np.uint16), vocab_size, 12, implementation, key_bits)
        assert np.array_equal(got, expected)


@pytest.mark.parametrize("key_bits", [24, 17, 9])
def test_few_bits_are_sorted_in_pieces(key_bits, monkeypatch):
    """A key keeps to its bits, as long as they hold two groups; nine bits and one token do not."""
    pieces, sort_pieces, tokens = [], train_gpt.sort_pieces, np.arange(120) % 60
    capacity = max(2, (1 << key_bits - 7) // 64)  # groups; 61 - k contexts of length k recur

    def spy(keys, cuts, *how):
        pieces.append(len(cuts))
        assert not len(keys) or int(keys.max()) < capacity * 64 << 7
        return sort_pieces(keys, cuts, *how)

    monkeypatch.setattr(train_gpt, "sort_pieces", spy)
    got = counted(tokens, 64, 5, "numba", key_bits)
    assert np.array_equal(got, oracle(tokens, 5))
    wanted = [1, *(math.ceil((61 - k) / capacity) for k in range(1, 5))]
    assert pieces[:5] == wanted  # an order ahead may have been sorted


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_counts_of_real_text(implementation, train_tokens):
    tokens = train_tokens[:5000]
    assert np.array_equal(counted(tokens, 512, 12, implementation), oracle(tokens, 12))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("size", range(5))
def test_counts_of_the_shortest_streams(implementation, size):
    tokens = np.zeros(size, np.int32)
    assert np.array_equal(counted(tokens, 2, 4, implementation), oracle(tokens, 4))


def test_the_contract_s_counts_are_four_columns_of_all():
    tokens = np.random.default_rng(1).integers(0, 4, 300)
    rows = list(ngram_counts(tokens, 4, 5))
    assert [order for order, *_ in rows] == [1, 2, 3, 4, 5]
    assert {column.dtype for _, *row in rows for column in row} == {np.dtype(np.int32)}
    assert np.array_equal([row for _, *row in rows], oracle(tokens, 5)[:, :4])


def test_counts_refuse_other_tokens():
    for bad in ([0, 7], [-1, 0], [0.0, 1.0]):
        with pytest.raises(ValueError, match="tokens"):
            next(ngram_counts(np.array(bad), 7, 2))


# -----------------------------------------------------------------------------
# Counts in the order of coding: steps of lanes that do not see each other


@settings(max_examples=40, deadline=None)
@given(wanted=st.lists(st.integers(1, 12), max_size=5), numba=st.booleans())
def test_only_the_wanted_orders(wanted, numba):
    """In any order, however often named: as among all of them."""
    tokens = np.random.default_rng(0).integers(2, 5, 300)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_gpt, "has_package", lambda name: numba)
        every = {order: rows for order, *rows in ngram_counts(tokens, 5, 12)}
        some = {order: rows for order, *rows in ngram_counts(tokens, 5, 12, wanted=wanted)}
    assert [*some] == sorted({*wanted})
    assert all(np.array_equal(some[order], every[order]) for order in some)


def lanes_oracle(tokens, times, lanes, max_order):
    """The definition: context tuple -> {token: count}, read by all tokens of a step, then updated;
    a lane's history begins anew with a BOS."""
    tables, history = defaultdict(dict), defaultdict(list)
    out, first = np.zeros((max_order, 5, len(tokens)), np.int64), 0
    while first < len(tokens):
        last = first
        while last < len(tokens) and times[last] == times[first]:
            last += 1
        keys = {}
        for t in range(first, last):
            past = history[lanes[t]]
            for order in range(1, min(max_order, len(past) + 1) + 1):
                keys[t, order] = tuple(past[len(past) - order + 1 :])
                table = tables[keys[t, order]]
                singles = sum(count == 1 for count in table.values())
                n, c = sum(table.values()), table.get(tokens[t], 0)
                out[order - 1, :, t] = n, c, len(table), singles, [*table][-1:] == [tokens[t]]
        for (t, _), key in keys.items():
            tables[key][tokens[t]] = tables[key].pop(tokens[t], 0) + 1
        for t in range(first, last):
            history[lanes[t]] = [
                *([] if tokens[t] == train_gpt.BOS else history[lanes[t]]),
                tokens[t],
            ]
        first = last
    return out


def orders_of(max_order):
    """A mixer that asks for every order and each one's last follower."""
    orders = tuple(range(1, max_order + 1))
    return SimpleNamespace(orders=orders, last_orders=orders)


def decoder_counts(table, tokens, times, lanes, max_order, vocab_size=65_535):
    """The decoder's: (orders, 5, N), as the text grows."""
    counts = table(orders_of(max_order), vocab_size, int(max(lanes, default=0)) + 1, True)
    columns = [np.zeros((max_order, 0, 5), np.int32)]
    for time in sorted({*times.tolist()}):
        now = np.flatnonzero(times == time)
        stats = counts.read(lanes[now].astype(np.int64))
        assert not stats[..., [1, 4]].any()
        counts.count(lanes[now].astype(np.int64), tokens[now].astype(np.int64))
        columns.append(stats)
    return np.concatenate(columns, 1).transpose(0, 2, 1)


def counted_in_steps(tokens, vocab_size, max_order, implementation, steps, key_bits=63):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_gpt, "KEY_BITS", key_bits)
        patch.setattr(train_gpt, "has_package", lambda name: implementation == name == "numba")
        device = "cuda" if implementation == "cuda" else "cpu"
        rows = list(count_ngrams(tokens, vocab_size, max_order, device, steps))
    assert {stats.dtype for _, stats in rows} == {np.dtype(np.int32)}
    return np.array([stats.T for _, stats in rows])


@st.composite
def laned(draw):
    """-> vocabulary, tokens with many a BOS, times, lanes; each lane from the first step on"""
    vocab_size = draw(st.sampled_from([3, 256, 65_535]))
    others = st.lists(st.integers(0, vocab_size - 1), min_size=1, max_size=3)
    token = st.sampled_from([train_gpt.BOS, *draw(others)])
    texts = draw(st.lists(st.lists(token, max_size=30), min_size=1, max_size=4))
    return vocab_size, *side_by_side(texts)


def side_by_side(texts):
    """Texts, one a lane -> tokens, times and lanes in the order of coding, int32 each"""
    rows = [(time, lane, x) for lane, text in enumerate(texts) for time, x in enumerate(text)]
    times, lanes, tokens = np.array(sorted(rows), np.int32).reshape(-1, 3).T.copy()
    return tokens, times, lanes


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("key_bits", [63, 12])
@settings(max_examples=50, deadline=None)
@given(case=laned())
def test_counts_in_steps_equal_a_dictionary(implementation, key_bits, case):
    vocab_size, tokens, *steps = case
    wanted = lanes_oracle(tokens.tolist(), *(s.tolist() for s in steps), 8)
    got = counted_in_steps(tokens, vocab_size, 8, implementation, steps, key_bits)
    assert np.array_equal(got, wanted)


@pytest.mark.parametrize("table", [ContextTable, ContextDictionary])
@settings(max_examples=50, deadline=None)
@given(case=laned())
def test_the_decoder_counts_the_same(table, case):
    _, tokens, *steps = case
    wanted = lanes_oracle(tokens.tolist(), *(s.tolist() for s in steps), 8)
    assert np.array_equal(decoder_counts(table, tokens, *steps, 8), wanted)


def repeating_lanes(size, vocab_size, seed=0):
    """Three lanes of phrases that come again -> tokens, times, lanes"""
    rng = np.random.default_rng(seed)
    phrases = rng.integers(2, vocab_size, (6, 7))
    texts = [np.concatenate(phrases[rng.integers(0, 6, size)]) for _ in range(3)]
    for text in texts:
        text[rng.random(len(text)) < 0.1] = rng.integers(1, vocab_size)
    return side_by_side(texts)


def test_a_collision_of_hashes_costs_no_count(monkeypatch):
    """Four bits of hash: nearly all entries collide."""
    monkeypatch.setattr(train_gpt, "LEVEL_BITS", 28)
    monkeypatch.setattr(train_gpt, "jit", functools.cache(train_gpt.jit.__wrapped__))
    tokens, *steps = repeating_lanes(20, 40)
    found = decoder_counts(ContextTable, tokens, *steps, 8, 40)
    assert np.array_equal(found, decoder_counts(ContextDictionary, tokens, *steps, 8, 40))


def test_a_table_that_grows_forgets_nothing(monkeypatch):
    """From sixteen slots, eleven doublings; its nodes, lists and text grow, too."""
    monkeypatch.setattr(ContextTable, "SLOTS", 16)
    tokens, *steps = repeating_lanes(250, 40, seed=1)
    found = decoder_counts(ContextTable, tokens, *steps, 8, 40)
    assert np.array_equal(found, decoder_counts(ContextDictionary, tokens, *steps, 8, 40))


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, ContextTable, ContextDictionary])
def test_counts_in_steps_of_a_longer_text(implementation):
    """Twelve lanes of documents that repeat each other, to order 24."""
    rng, texts = np.random.default_rng(5), []
    block = rng.integers(2, 9, 60)
    for _ in range(12):
        parts = [np.append(train_gpt.BOS, block[: rng.integers(5, 60)]) for _ in range(4)]
        text = np.concatenate(parts)
        text[rng.random(len(text)) < 0.03] = 5
        texts.append(text)
    tokens, times, where = side_by_side(texts)
    wanted = lanes_oracle(tokens.tolist(), times.tolist(), where.tolist(), 24)
    assert (wanted[23, 0] > 1).any()
    if implementation in (ContextTable, ContextDictionary):
        got = decoder_counts(implementation, tokens, times, where, 24)
    else:
        got = counted_in_steps(tokens, 9, 24, implementation, (times, where))
    assert np.array_equal(got, wanted)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_one_lane_without_bos_is_the_plain_text(implementation):
    tokens = np.tile(np.random.default_rng(2).integers(2, 7, 60), 4)
    steps = np.arange(240, dtype=np.int32), np.zeros(240, np.int32)
    got = counted_in_steps(tokens, 7, 12, implementation, steps)
    assert np.array_equal(got, oracle(tokens, 12))
    plain = counted(tokens, 7, 12, implementation)
    assert np.array_equal(got, plain)


# -----------------------------------------------------------------------------
# Texts, and a model of them: bytes given the byte before, from the text before


@functools.cache
def prose():
    """The embedded text, 600,000 bytes of it."""
    return "\n\n".join(prepare.sample_documents()[0][:250]).encode()[:600_000]


def source_code():
    """Of Python's own library, which repeats itself."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return b"\n\n".join(file.read_bytes() for file in files[:60])


def shuffled_words():
    """Nothing longer than a word repeats."""
    words = np.array(prose().split(), object)
    return b" ".join(np.random.default_rng(2).permutation(words))


TEXTS = {"prose": prose, "source_code": source_code, "shuffled_words": shuffled_words}


def scored_text(name, size):
    """-> tokens (size + 1,), Scores of the last `size`, the model's rows (256, 256)"""
    text = np.frombuffer(TEXTS[name](), np.uint8)
    past, tokens = text[:150_000], text[150_000 : 150_001 + size].astype(np.int64)
    rows = np.full((256, 256), 0.05)
    np.add.at(rows, (past[:-1], past[1:]), 1)
    rows /= rows.sum(1, keepdims=True)
    return tokens, scored_by(rows, tokens[:-1], tokens[1:]), rows


def draws(size, vocab_size=64, seed=0):
    """-> tokens drawn from rows of known, varying entropy, and their Scores: nothing is better."""
    rng = np.random.default_rng(seed)
    rows = np.concatenate([rng.dirichlet(np.full(vocab_size, a), 40) for a in (0.02, 0.1, 0.5, 5)])
    rows = np.maximum(rows, 1e-9) / np.maximum(rows, 1e-9).sum(1, keepdims=True)
    state = rng.integers(0, len(rows), size)
    drawn = (rng.random((size, 1)) > rows.cumsum(1)[state]).sum(1).clip(0, vocab_size - 1)
    return np.append(0, drawn), scored_by(rows, state, drawn)


def lost_bits(log_prob, scores):
    """Against the model alone, up to each target."""
    return np.cumsum(scores.log_prob - log_prob) / math.log(2)


# -----------------------------------------------------------------------------
# Backoff and mixture


def test_alpha_as_published():
    """#864's, and that of #993 and #808 (systems.md, 7.1)."""
    order, entropy = np.array([2, 2, 4, 5, 9, 9, 9]), np.array([2, 4, 2.5, 1, 0.5, 1.25, 2])
    expected = [0.034668, 0.160332, 0.315250, 0.183444, 0.300668, 0.650000, 0.95]
    assert np.allclose(backoff_alpha(order, entropy, tiny()), expected, rtol=0, atol=6e-7)
    flat = dict(ngram_entropy_center=4.0, ngram_center_slope=0.0, ngram_multipliers=(1.0,))
    got = backoff_alpha(np.array([3, 9, 2, 5]), np.array([0.5, 2, 4, 5]), tiny(**flat))
    assert np.allclose(got, [0.050501, 0.059892, 0.325, 0.534438], rtol=0, atol=6e-7)
    assert backoff_alpha(np.array([0]), np.array([9.0]), tiny()) == 0


def test_alpha_with_a_centre_for_each_order():
    """#810's (systems.md, 7.1): centres of orders 2, 3, ..., the last one for all beyond, times
    0.5 + confidence; and at most 0.95."""
    cfg = tiny(
        ngram_alpha_min=0.2,
        ngram_alpha_max=0.75,
        ngram_entropy_center=(4.5, 4.2, 3.8, 3.5, 3.2, 3.0, 3.0, 3.0, 2.7, 2.5),
        ngram_center_slope=0.0,
        ngram_multipliers=(1.0,),
    )
    order, entropy = np.array([11, 7, 2, 11, 20]), np.array([2.0, 3.0, 4.0, 4.0, 2.0])
    boost = 0.5 + np.array([0.5, 0.5, 0.9, 1.0, 0.5])
    got = backoff_alpha(order, entropy, cfg, boost)
    assert np.allclose(got, [0.347918, 0.475, 0.487085, 0.95, 0.347918], rtol=0, atol=6e-7)
    halved = backoff_alpha(order, entropy, replace(cfg, ngram_multipliers=(0.5, 1.0)), boost)
    assert halved[2] == got[2] / 2 and (np.delete(halved, 2) == np.delete(got, 2)).all()


def test_linear_alpha():
    """#1026's line (systems.md, 7.1) with entropy in the place of the target's loss, below 0.95."""
    cfg = tiny(ngram_alpha=0.5, ngram_nll_threshold=2.5, ngram_multipliers=(1.0,))
    entropy = np.array([0.1, 1, 2.5, 4.5, 5, 8])
    order = np.array([2, 3, 7, 7, 2, 9])
    assert np.allclose(backoff_alpha(order, entropy, cfg), [0.05, 0.2, 0.5, 0.9, 0.95, 0.95])
    halved = tiny(ngram_alpha=0.5, ngram_nll_threshold=2.5, ngram_multipliers=(1.0, 0.5))
    assert np.allclose(backoff_alpha(order, entropy, halved), [0.05, 0.1, 0.25, 0.45, 0.95, 0.5])


@settings(max_examples=60, deadline=None)
@given(delta=st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=30), place=st.integers(0, 29))
def test_confidence_is_causal_and_bounded(delta, place):
    """Over the largest change so far: 1.5 there, more than 0.5 everywhere, and nothing that comes
    later, be it larger than all before, changes a bit."""

    delta = np.array(delta)
    boost = confidence(delta)
    assert (boost > 0.5).all() and (boost <= 1.5).all() and boost[0] == 1.5
    assert boost.tolist() == [0.5 + d / delta[: t + 1].max() for t, d in enumerate(delta)]
    other = confidence(np.append(delta[:place], 1e9))
    assert other[:-1].tobytes() == boost[:place].tobytes() and other[-1] == 1.5


def test_confidence_enters_the_backoff_of_a_run():
    tokens, scores, _ = scored_text("source_code", 3000)
    changed = scores._replace(pe_delta=np.random.default_rng(0).gamma(2, 2, 3000))
    a, b = (mixed(tokens, s)[1]["ngram_backoff"]["log_prob"] for s in (scores, changed))
    assert a.tobytes() == cascade(tokens, scores, 256).tobytes()
    assert b.tobytes() == cascade(tokens, changed, 256).tobytes()
    assert (a != b).mean() > 0.3


@pytest.mark.parametrize(("min_count", "longest"), [(1, 5), (2, 5), (3, 4)])
def test_backoff_by_hand(min_count, longest):
    cfg = tiny(ngram_min_count=min_count, ngram_max_order=longest, ngram_min_order=3)
    tokens = np.random.default_rng(3).integers(0, 3, 400)
    scores, table = uniform(399, 3), oracle(tokens, 6)[:, :, 1:]
    match = backoff_match(ngram_counts(tokens, 3, 6), cfg)[:, 1:]
    got = np.exp(cascade(tokens, scores, 3, cfg))
    for t in range(399):
        usable = [k for k in range(3, longest + 1) if table[k - 1, 0, t] >= min_count]
        order, p = max(usable, default=0), 1 / 3
        if order:
            alpha = float(backoff_alpha(np.array([order]), scores.entropy[t], cfg)[0])
            p = (1 - alpha) / 3 + alpha * table[order - 1, 1, t] / table[order - 1, 0, t]
        assert match[0, t] == order and got[t] == pytest.approx(p, rel=1e-12)


@pytest.mark.parametrize("name", TEXTS)
def test_mixture_beats_backoff_and_model(name):
    tokens, scores, _ = scored_text(name, 100_000)
    final = mixture(tokens, scores, 256)
    best = min(bits(cascade(tokens, scores, 256)), bits(scores.log_prob))
    assert bits(final) < best - 0.01
    assert lost_bits(final, scores).max() <= PAIR_BITS


@pytest.mark.parametrize("size", [30_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_regret_on_draws_from_the_model(size):
    tokens, scores = draws(size)
    assert lost_bits(mixture(tokens, scores, 64), scores).max() <= PAIR_BITS


def test_uniform_tokens_cost_ten_bits():
    tokens, scores = np.random.default_rng(4).integers(0, 1024, 60_001), uniform(60_000, 1024)
    final = mixture(tokens, scores, 1024)
    assert bits(final) >= 10 - 1e-3 and lost_bits(final, scores).max() <= PAIR_BITS
    assert bits(cascade(tokens, scores, 1024)) > 10


@settings(max_examples=25, deadline=None)
@given(stream=streams(), seed=st.integers(0, 99))
def test_regret_on_any_stream(stream, seed):
    """Good counts that turn bad, a model that is right, wrong or at odds with its own entropy."""
    (vocab_size, tokens), rng = stream, np.random.default_rng(seed)
    tokens = np.concatenate([[0], np.tile(tokens, 8), rng.integers(0, vocab_size, 300)])
    scores = Scores(-rng.gamma(0.5, 4, len(tokens) - 1), rng.gamma(2, 2, len(tokens) - 1))
    assert lost_bits(mixture(tokens, scores, vocab_size), scores).max() <= 100


@pytest.mark.parametrize("good", [400, 4064, 8160])
def test_regret_where_counts_turn_bad_within_a_chunk(good):
    """The odds of the pair are those before the chunk of up to 4,096: 378 and 80 bits measured."""
    rng = np.random.default_rng(0)
    rng.permutation(300), rng.permutation(300)
    first, second = np.resize(rng.permutation(300), good), np.resize(rng.permutation(300), 4096)
    tokens = np.concatenate([[0], first, second])
    scores = Scores(np.full(good + 4096, -0.05), np.full(good + 4096, 0.1))
    assert lost_bits(mixture(tokens, scores, 300), scores).max() <= 1000


def test_mixture_recovers_when_the_model_turns_bad():
    """First draws from the model, then a repeated block it knows nothing of."""
    tokens, scores = draws(20_000)
    block = np.tile(np.random.default_rng(5).integers(0, 64, 300), 30)
    columns = zip(scores[:2], uniform(len(block), 64)[:2], strict=True)
    scores = Scores(*map(np.concatenate, columns))
    assert bits(mixture(np.append(tokens, block), scores, 64)[-6000:]) < 3


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@settings(max_examples=30, deadline=None)
@given(place=st.integers(0, 299), seed=st.integers(0, 99))
def test_future_tokens_change_no_count(implementation, place, seed):
    tokens = np.tile(np.random.default_rng(seed).integers(0, 5, 60), 5)
    other = np.append(tokens[:place], np.random.default_rng(seed + 1).integers(0, 5, 300 - place))
    a, b = (counted(stream, 5, 8, implementation) for stream in (tokens, other))
    assert np.array_equal(a[..., :place], b[..., :place])
    assert np.array_equal(a[:, [0, 2, 3], place], b[:, [0, 2, 3], place])  # all but the target's


@pytest.mark.parametrize("score", [cascade, mixture])
@pytest.mark.parametrize("place", [1, 257, 7001])
def test_future_changes_no_bit_of_a_score(score, place):
    tokens, scores, _ = scored_text("source_code", 8_000)
    other, changed = tokens.copy(), Scores(*map(np.copy, scores[:2]))
    other[place:] = np.random.default_rng(6).integers(0, 256, len(tokens) - place)
    changed.log_prob[place - 1 :] -= 1.0  # the target's own probability; entropy is known before
    changed.entropy[place:] += 1.0
    a, b = score(tokens, scores, 256), score(other, changed, 256)
    assert a[: place - 1].tobytes() == b[: place - 1].tobytes()
    assert (a[place - 1 :] != b[place - 1 :]).any()


@pytest.mark.parametrize("score", [cascade, mixture])
@pytest.mark.parametrize("place", [1, 2, 31, 32, 33, 95, 96, 97, 300, 1000])
def test_probabilities_of_all_tokens_add_up_to_one(score, place):
    """Each token in turn is the target, and scored."""
    tokens, state = np.tile(np.random.default_rng(place).integers(0, 9, 250), 5), place % 9
    rows, total = np.random.default_rng(8).dirichlet(np.ones(9), 9), 0.0
    for token in range(9):
        stream = np.append(tokens[:place], token)
        scores = scored_by(rows, np.append(stream[:-2] % 9, state), stream[1:])
        total += math.exp(score(stream, scores, 9)[-1])
    assert total == pytest.approx(1, abs=1e-9)


def spelt_out(tokens, rows, rt, table=ContextDictionary, **changes):
    """What a decoder would do: each distribution before its token -> p (N, V), the Mixture"""
    cfg = tiny(vocab_size=256, **changes)
    mixture, out = Mixture(rt, cfg, 1, len(tokens), isolated=False), []
    assert isinstance(mixture.counts, table)
    mixture.counts = table(mixture.mixer, 256, 1, False)  # the text begins with no BOS
    mixture.counts.insert(np.array([0]), tokens[:1])
    for before, token in zip(tokens[:-1], tokens[1:], strict=True):
        log_probs = torch.from_numpy(np.log(rows[before][None]))
        outputs = log_probs, -(log_probs.exp() * log_probs).sum(-1)
        out.append(mixture.distributions(outputs, np.array([0]))[0].copy())
        mixture.learn(np.array([token]))
    return np.array(out), mixture


@pytest.mark.parametrize("mixer", ["blend", "cascade", "none"])
def test_distributions_spelt_out_are_what_was_scored(mixer, rt, monkeypatch):
    """Target by target, over the whole vocabulary, from a dictionary: the score's own numbers; and
    bit for bit the same from a table."""
    tokens, scores, rows = scored_text("source_code", 1200)
    p, spelt = spelt_out(tokens, rows, rt, ngram_mixer=mixer)
    with monkeypatch.context() as patch:
        patch.setattr(train_gpt, "FEW_TARGETS", 0)
        by_table, _ = spelt_out(tokens, rows, rt, ContextTable, ngram_mixer=mixer)
    assert by_table.tobytes() == p.tobytes()
    assert spelt.mass_error == np.abs(p.sum(1) - 1).max() < 1e-12
    wanted = scores.log_prob if mixer == "none" else mixed_by(mixer, tokens, scores, 256)
    assert np.allclose(np.log(p[range(1200), tokens[1:]]), wanted, rtol=0, atol=1e-6)
    _, wrong = spelt_out(tokens[:300], 1.01 * rows, rt, ngram_mixer=mixer)
    assert 0.005 < wrong.mass_error < 0.0101  # a measure that could not fail would be worth nothing


def mass_of_a_run(rt, mixer="blend"):
    """What a run with sliding windows reports."""
    cfg = tiny(scorer="sliding", ngram_mixer=mixer, eval_batch_seqs=64)
    stream = np.tile(random_stream(99, cfg.vocab_size), 4)
    model = perturbed(cfg).eval().requires_grad_(False)
    return train_gpt.window_mass(model, rt, cfg, stream)


@pytest.mark.parametrize("mixer", ["blend", "cascade", "none"])
def test_mass_error_of_a_run_is_measured(mixer, rt, monkeypatch):
    """None, and at once some where the model's distributions are 1 % too large."""
    assert mass_of_a_run(rt, mixer) < 1e-9
    predict = train_gpt.predict

    def larger(*arguments):
        log_probs, entropy = predict(*arguments)
        return log_probs + math.log(1.01), entropy

    monkeypatch.setattr(train_gpt, "predict", larger)
    assert 1e-3 < mass_of_a_run(rt, mixer) <= 0.0101


def test_mass_is_of_the_weights_that_are_used(monkeypatch, rt):
    """A gate whose weights add up to 1.01 raises the scores, and the measured mass with them."""
    tokens, scores, _ = scored_text("source_code", 3000)
    before, weights = mixture(tokens, scores, 256), Blend.weights
    monkeypatch.setattr(Blend, "weights", lambda self, *rows: 1.01 * weights(self, *rows))
    assert mixture(tokens, scores, 256).sum() > before.sum()
    assert 0.005 < mass_of_a_run(rt) <= 0.0101


def test_mass_of_the_cascade_is_of_its_counts(monkeypatch, rt):
    add = ContextDictionary.add
    monkeypatch.setattr(ContextDictionary, "add", lambda self, w, *p: add(self, 2 * w, *p))
    assert mass_of_a_run(rt, "cascade") > 0.01


def test_store_reads_back_what_it_kept():
    tokens = scored_text("prose", 3000)[0]
    store, kept = CountStore((1, 2, 5)), counted(tokens, 256, 5)[[0, 1, 4], :, 1:]
    assert store.collect(count_ngrams(tokens, 256, 5)) is store
    for a, b in ((0, 0), (0, 3000), (17, 1234)):
        wanted = (kept * (kept[:, :1] > 0))[:, :, a:b]
        assert np.array_equal(store.read(a, b), wanted.transpose(0, 2, 1))
    longest = (kept[:, 0] > 0) * np.array([[1], [2], [5]])
    assert np.array_equal(store.matched, longest.max(0))


def running_counts(tokens, order):
    """(5, N) of one order, from a dictionary, with running totals."""
    tables, totals, out = defaultdict(lambda: defaultdict(int)), {}, []
    last = {}
    for t in range(len(tokens)):
        context = tuple(tokens[max(0, t - order + 1) : t])
        table, (n, types, singles) = tables[context], totals.get(context, (0, 0, 0))
        count = table[tokens[t]]
        known = t >= order - 1
        same = last.get(context) == tokens[t]
        out.append((n, count, types, singles, same) if known else (0, 0, 0, 0, 0))
        if known:
            last[context] = tokens[t]
            table[tokens[t]] += 1
            totals[context] = n + 1, types + (count == 0), singles + (count == 0) - (count == 1)
    return np.array(out).T


def every_token_once(order, vocab_size):
    """A text in which each token comes once, of order 2 once after a 7; then some again."""
    tokens = np.random.default_rng(5).permutation(vocab_size)
    if order == 2:
        others = tokens[tokens != 7]
        pairs = np.stack([np.full_like(others, 7), others], 1).ravel()
        tokens = np.concatenate([pairs[:-2], [7], pairs[-2:]])  # one 7 follows a 7
    return np.concatenate([tokens, tokens[:60]])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("order", [1, 2])
def test_store_holds_65536_kinds_of_tokens(order, implementation):
    """Of so many ids, which 16 bits tell apart, types and singletons reach one more than they
    hold."""
    vocab_size = 65_536
    tokens = every_token_once(order, vocab_size)
    wanted = running_counts(tokens.tolist(), order)
    assert wanted[2].max() == wanted[3].max() == vocab_size
    counts = counted(tokens, vocab_size, order, implementation)[order - 1]
    assert np.array_equal(counts, wanted)
    kept = CountStore((order,)).collect([(order, counts.T)]).read(0, len(tokens) - 1)
    assert np.array_equal(kept[0].T, (wanted * (wanted[0] > 0))[:, 1:])


def test_target_by_target_gives_the_same_weights():
    """What a decoder does, which knows no target before it is coded."""
    tokens, scores, _ = scored_text("source_code", 2000)
    mixer, held, out = make_mixer("blend", CFG, SilentRuntime()), [], []
    store = filled_store(tokens, 256, mixer.orders)
    recent = np.zeros((1, train_gpt.REMEMBERED, 2), np.float32)
    for t in range(2000):
        log_prob, entropy = (column[t : t + 1] for column in scores[:2])
        stats = store.read(t, t + 1)
        inputs, known = mixer.inputs(stats, entropy, recent)
        p = train_gpt.expert_probabilities(mixer, stats, log_prob)
        outcome = train_gpt.outcomes(stats, log_prob)
        recent = np.concatenate([outcome[None], recent[:, :-1]], 1)
        out.append(math.log((mixer.weights(inputs, known) * p).sum()))
        held.append((inputs, known, torch.from_numpy(p)))
        if len(held) == mixer.chunk:
            inputs, known, p = map(torch.cat, zip(*held, strict=True))
            mixer.learn(inputs, known, p.numpy())
            held = []
    assert np.allclose(out, mixture(tokens, scores, 256), rtol=0, atol=1e-6)


# -----------------------------------------------------------------------------
# The lines of a run


def gain_lines(run):
    return [row for row in run.metrics() if row["key"] == "ngram_gain"]


def test_lines_of_the_mixture(smoke_run):
    run = smoke_run("one")
    line, backoff = run.final("ngram_exact"), run.final("ngram_backoff_exact")
    assert run.val_bpb() < run.val_bpb("documents_exact")
    assert line["mixer"] == "blend" and backoff["orders"] == "2-9"
    assert line["orders"] == "1-9,12,16,24"
    assert "n-gram mixture blend of orders 1-9,12,16,24" in run.submission()["blurb"]
    assert float(line["mass_error"]) < 1e-9
    assert run.val_bpb() < run.val_bpb("ngram_backoff_exact")
    assert run.val_bpb() < run.val_bpb("int6_sliding_window_exact")


def test_gain_lines_add_up(smoke_run):
    gains, columns = gain_lines(smoke_run("again")), smoke_run("again").arrays("scores.npz")
    targets = len(columns["token"])
    assert sum(row["positions"] for row in gains) == targets
    assert sum(row["share"] for row in gains) == pytest.approx(1, abs=1e-9)
    saved = (columns["logp_final"] - columns["logp_model"]).sum() / math.log(2)
    assert sum(row["bits_saved"] for row in gains) == pytest.approx(saved, abs=1e-6)
    orders = [row["value"] for row in gains]
    assert orders == sorted(orders) and set(orders) <= {0, *ORDERS}
    tokens = np.append(train_gpt.BOS, columns["token"])
    matched = filled_store(tokens, 512).matched
    assert [row["positions"] for row in gains] == [(matched == k).sum() for k in orders]


def test_backoff_line_is_the_backoff(smoke_run):
    run = smoke_run("again")  # by sliding windows
    columns = run.arrays("scores.npz")
    tokens = np.append(train_gpt.BOS, columns["token"])
    scores = Scores(columns["logp_model"], columns["entropy"])
    wanted = train_gpt.bits_per_byte(cascade(tokens, scores, 512), columns["bytes"])
    assert run.val_bpb("ngram_backoff_exact") == pytest.approx(wanted, rel=1e-12)
    wanted = train_gpt.bits_per_byte(mixture(tokens, scores, 512), columns["bytes"])
    assert run.val_bpb() == pytest.approx(wanted, rel=1e-12)


def orders_in(text):
    """What "1-9,12,16,24" says."""
    spans = [[int(end) for end in span.split("-")] for span in text.split(",") if text != "none"]
    return [order for span in spans for order in range(span[0], span[-1] + 1)]


@given(orders=st.sets(st.integers(1, 32)))
def test_orders_are_printed_as_spans(orders):
    text = train_gpt.show_orders(sorted(orders))
    assert orders_in(text) == sorted(orders)
    gaps = sum(order + 1 not in orders for order in orders)
    assert text.count(",") == max(0, gaps - 1) and " " not in text


@pytest.mark.parametrize(
    ("name", "least", "most", "text"),
    [
        ("blend", 2, 9, "1-9,12,16,24"),
        ("blend", 5, 5, "1,5,12,16,24"),
        ("blend", 2, 32, "1-32"),
        ("cascade", 2, 9, "2-9"),
        ("cascade", 5, 5, "5"),
        ("cascade", 3, 12, "3-12"),
        ("none", 2, 9, "none"),
    ],
)
def test_printed_orders_are_those_that_get_weight(name, least, most, text):
    """A text of one token, whose contexts of every order are known: what the mixer's weights are
    of. The cascade prefers its longest."""
    cfg = tiny(ngram_min_order=least, ngram_max_order=most, vocab_size=4)
    assert train_gpt.show_orders(train_gpt.weighed_orders(name, cfg)) == text
    mixer, found = make_mixer(name, cfg, SilentRuntime()), set()
    for known in range(len(mixer.orders) + 1):  # contexts of the shortest so many were seen
        stats = np.zeros((len(mixer.orders), 1, 5), np.int32)
        stats[:known] = 9, 3, 2, 1, 0
        recent = np.zeros((1, train_gpt.REMEMBERED, 2), np.float32)
        weights = mixer.weights(*mixer.inputs(stats, np.full(1, 3.0), recent))[0, 1:]
        weighed = mixer.orders + mixer.last_orders
        found |= {order for order, w in zip(weighed, weights, strict=True) if w > 0}
    assert sorted(found) == orders_in(text)


@pytest.mark.usefixtures("no_picture")
def test_backoff_alone(smoke_run, again):
    run = again(NGRAM_MIXER="cascade", NGRAM_MAX_ORDER="4", NGRAM_MIN_COUNT="1")
    line = run.final("ngram_exact")
    assert line["mixer"] == "cascade" and line["orders"] == "2-4"
    assert run.final("ngram_backoff_exact")["orders"] == "2-4"
    assert float(line["mass_error"]) < 1e-9
    assert run.val_bpb() == run.val_bpb("ngram_backoff_exact")
    assert run.val_bpb() != smoke_run("one").val_bpb("ngram_backoff_exact")
    assert gain_lines(run)


@pytest.mark.parametrize("env", [{"NGRAM_MIXER": "none"}, {"NGRAM_ENABLED": "0"}])
@pytest.mark.usefixtures("no_picture")
def test_model_alone(smoke_run, again, env):
    run = again(**env)
    assert not gain_lines(run) and not any("backoff" in line.split()[0] for line in run.lines)
    line = run.final("ngram_exact")
    assert line["mixer"] == line["orders"] == "none"
    log = train_gpt.RunLog(run.metrics(), {})
    assert train_gpt.describe(log, None).endswith("no n-gram mixture")
    stage = "int6_sliding_window_exact"
    assert run.val_bpb() == run.val_bpb(stage) == smoke_run("one").val_bpb(stage)
    assert float(run.final("ngram_exact")["mass_error"]) < 1e-9
