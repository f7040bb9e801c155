"""The window scorer: every target once, from the past alone, whatever the batches and ranks; and
the whole honest score of documents by an oracle."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import enrichment_change, perturbed, random_stream, tiny, train_gpt
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import LONG, honest_score, scored_documents
from torch import nn

BOS = train_gpt.BOS
VOCAB = 37


ENRICHED = tiny(pre_enrich_dim=24)


class Bigram(nn.Module):
    """A stub whose distribution after a token is a row of a table."""

    def __init__(self):
        super().__init__()
        table = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(0))
        self.register_buffer("table", table)

    def hidden(self, ids, adapters):
        return self.table[ids]

    def logits(self, hidden):
        return hidden


class Clock(nn.Module):
    """A stub whose probability of token 0 at place i of a window is (i + 1) / (i + 2)."""

    def hidden(self, ids, adapters):
        place = torch.arange(1.0, ids.shape[1] + 1, dtype=torch.float64)
        return place.expand(ids.shape).unsqueeze(-1)

    def logits(self, hidden):
        return torch.cat([hidden.log(), torch.zeros_like(hidden)], -1)


class Uniform(nn.Module):
    def hidden(self, ids, adapters):
        return torch.zeros(*ids.shape, VOCAB)

    def logits(self, hidden):
        return hidden


class OneOf(train_gpt.Runtime):
    """Rank `rank` of `world_size` in one process: sums over ranks are left to the test."""

    def __init__(self, rank, world_size):
        super().__init__(tiny())
        self.rank, self.world_size = rank, world_size

    def sum(self, array):
        return array


def scorer(model, cfg, rank=0, world_size=1):
    return train_gpt.WindowScorer(model, OneOf(rank, world_size), cfg)


def scored(model, cfg, stream, stride, *ranks):
    """-> Scores, of one rank of some if asked for"""
    return scorer(model, cfg, *ranks).score(stream, stride)


def distribution(model, cfg, stream, stride, target):
    """p of one target over the vocabulary, as its window predicts it"""
    one, end = scorer(model, cfg), target // stride * stride + stride
    ids, rows, _ = one.windows(stream, np.full(one.batch, end), stride)
    with torch.no_grad():
        return one.predict(one.rows(ids), rows)[0][0, target - end + stride].exp().numpy()


shapes = st.tuples(
    st.integers(1, 90),  # targets
    st.sampled_from([(1, 1), (4, 1), (4, 2), (4, 4), (12, 3), (16, 4), (16, 16), (24, 8)]),
    st.integers(1, 7),  # windows in a batch
    st.integers(1, 4),  # ranks
)


@settings(deadline=None, max_examples=120)
@given(shape=shapes)
def test_every_target_once_and_from_its_own_past(shape):
    count, (window, stride), batch, ranks = shape
    cfg = tiny(eval_seq_len=window, eval_stride=stride, eval_batch_seqs=batch)
    stream = random_stream(count, VOCAB, seed=count)
    parts = [scored(Bigram(), cfg, stream, stride, r, ranks)[:2] for r in range(ranks)]
    log_prob, entropy = (np.stack(columns) for columns in zip(*parts, strict=True))
    assert ((log_prob != 0).sum(0) == 1).all()  # on one rank, and there once
    assert ((entropy != 0).sum(0) == 1).all()
    table = Bigram().table.double().log_softmax(-1).numpy()
    np.testing.assert_array_equal(log_prob.sum(0), table[stream[:-1], stream[1:]])
    wanted = -(np.exp(table) * table).sum(-1)[stream[:-1]]
    np.testing.assert_allclose(entropy.sum(0), wanted, rtol=1e-12)
    assert log_prob.dtype == entropy.dtype == np.float64 and log_prob.shape[1] == count


@settings(deadline=None, max_examples=60)
@given(shape=shapes)
def test_context_of_every_target(shape):
    """Target t sees all t + 1 tokens before it in the first window, and later at least
    window - stride + 1 and at most window, rising within a stride."""
    count, (window, stride), batch, _ = shape
    cfg = tiny(eval_seq_len=window, eval_stride=stride, eval_batch_seqs=batch)
    stream = np.zeros(count + 1, np.uint16)
    share = np.exp(scored(Clock(), cfg, stream, stride).log_prob)
    context = np.round(share / (1 - share)).astype(int)
    places = np.arange(count)
    ends = places // stride * stride + stride
    assert context.tolist() == (places - np.maximum(ends - window, 0) + 1).tolist()
    assert (context[:window] == places[:window] + 1).all()
    assert (context[window:] > window - stride).all() and context.max() <= window


def test_uniform_model_costs_log_v():
    cfg = tiny(eval_batch_seqs=3)
    for stride in (1, 4, 16):
        scores = scored(Uniform(), cfg, random_stream(50, VOCAB), stride)
        np.testing.assert_allclose(scores.log_prob, -math.log(VOCAB), rtol=1e-14)
        np.testing.assert_allclose(scores.entropy, math.log(VOCAB), rtol=1e-14)


def naive(model, cfg, stream, stride):
    """One target at a time: the window's tokens up to it, float64 log-softmax of the last."""
    scores = []
    for t in range(len(stream) - 1):
        end = t // stride * stride + stride
        ids = torch.from_numpy(stream[max(0, end - cfg.window) : t + 1].astype(np.int64))
        logits = model.logits(model.hidden(ids.unsqueeze(0)))[0, -1].double()
        log_probs = logits - logits.logsumexp(0)
        chosen, entropy = log_probs[int(stream[t + 1])], -(log_probs.exp() @ log_probs)
        scores.append((chosen, entropy))
    return np.array(scores).T


@pytest.mark.parametrize(("stride", "count"), [(4, 53), (16, 50), (1, 20), (4, 3), (8, 1)])
def test_scorer_against_a_plain_loop(stride, count):
    """Log-probability and entropy."""
    cfg = ENRICHED
    model, stream = perturbed(cfg), random_stream(count, cfg.vocab_size)
    stream[count // 2] = train_gpt.BOS
    with torch.no_grad():
        wanted = naive(model, cfg, stream, stride)
    np.testing.assert_allclose(scored(model, cfg, stream, stride)[:2], wanted, rtol=0, atol=2e-5)


def test_distributions_add_up_to_one():
    """Score every possible last token after one past: the probabilities are a distribution."""
    cfg = tiny()
    model, stream = perturbed(cfg), random_stream(22, cfg.vocab_size)
    total, entropies = 0.0, set()
    for token in range(cfg.vocab_size):
        stream[-1] = token
        scores = scored(model, cfg, stream, cfg.eval_stride)
        total += math.exp(scores.log_prob[-1])
        entropies.add(scores.entropy[-1])
    assert total == pytest.approx(1, abs=1e-12) and len(entropies) == 1


@settings(deadline=None, max_examples=25)
@given(place=st.integers(0, 49), stride=st.sampled_from([1, 4, 16]), seed=st.integers(1, 99))
def test_distribution_of_one_target_is_the_score_s(place, stride, seed):
    """Sums to one, gives what was scored, and does not know the target or what follows."""
    cfg = tiny()
    model, stream = perturbed(cfg), random_stream(50, cfg.vocab_size)
    scores = scored(model, cfg, stream, stride)
    p = distribution(model, cfg, stream, stride, place)
    assert p.shape == (cfg.vocab_size,) and p.sum() == pytest.approx(1, abs=1e-12)
    assert math.log(p[stream[place + 1]]) == pytest.approx(scores.log_prob[place], abs=2e-5)
    assert -(p * np.log(p)).sum() == pytest.approx(scores.entropy[place], abs=2e-5)
    other = stream.copy()
    other[place + 1 :] = random_stream(50, cfg.vocab_size, seed)[place + 1 :]
    again = distribution(model, cfg, other, stride, place)
    assert again.tobytes() == p.tobytes()


@settings(deadline=None, max_examples=25)
@given(place=st.integers(0, 49), stride=st.sampled_from([1, 4, 8, 16]), seed=st.integers(1, 99))
def test_the_future_changes_nothing(place, stride, seed):
    """Other tokens from index `place` + 1 on: the targets before that index keep every bit."""
    cfg = ENRICHED
    model, stream = perturbed(cfg), random_stream(50, cfg.vocab_size)
    other = stream.copy()
    other[place + 1 :] = random_stream(50, cfg.vocab_size, seed)[place + 1 :]
    before, after = (scored(model, cfg, s, stride) for s in (stream, other))
    assert before.log_prob[:place].tobytes() == after.log_prob[:place].tobytes()
    changes = [enrichment_change(model, s) for s in (stream, other)]
    for a, b in ((before.entropy, after.entropy), changes):
        assert a[: place + 1].tobytes() == b[: place + 1].tobytes()


def test_a_longer_text_does_not_change_the_scores_before():
    """Nothing of later tokens, be it a mean or a maximum, enters; only the last window differs."""
    cfg = ENRICHED
    model, stream = perturbed(cfg), random_stream(96, cfg.vocab_size)
    whole = scored(model, cfg, stream, 4)
    part = scored(model, cfg, stream[:65], 4)
    for a, b in zip(whole[:2], part[:2], strict=True):
        np.testing.assert_allclose(a[:64], b, rtol=0, atol=2e-5)


def test_past_matters():
    cfg = tiny()
    model, stream = perturbed(cfg), random_stream(50, cfg.vocab_size)
    other = stream.copy()
    other[20] = stream[20] % 60 + 2
    before, after = (scored(model, cfg, s, 4) for s in (stream, other))
    changed = np.flatnonzero(before.log_prob != after.log_prob)
    assert changed[0] == 19 and 20 in changed and 25 in changed


@pytest.mark.parametrize("batch", [1, 3, 4, 7, 64])
def test_batch_size_does_not_matter(batch):
    cfg = tiny(eval_batch_seqs=5, pre_enrich_dim=24)
    model, stream = perturbed(cfg), random_stream(83, cfg.vocab_size)
    reference = scored(model, cfg, stream, 4)
    scores = scored(model, tiny(eval_batch_seqs=batch, pre_enrich_dim=24), stream, 4)
    np.testing.assert_allclose(reference[:2], scores[:2], rtol=0, atol=2e-5)


def test_all_forward_passes_have_one_shape():
    cfg, seen = tiny(eval_batch_seqs=5), set()
    model = Bigram()
    hidden = model.hidden
    model.hidden = lambda ids, adapters: seen.add(tuple(ids.shape)) or hidden(ids, adapters)
    for count in (1, 3, 16, 17, 83):
        scored(model, cfg, random_stream(count, VOCAB), 4)
    assert seen == {(5, cfg.window)}


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_ranks_do_not_change_a_bit(ranks):
    cfg = ENRICHED
    model, stream = perturbed(cfg), random_stream(83, cfg.vocab_size)
    alone = scored(model, cfg, stream, 4)
    parts = [scored(model, cfg, stream, 4, r, ranks) for r in range(ranks)]
    for got, columns in zip(alone[:2], zip(*parts, strict=True), strict=False):
        assert got.tobytes() == sum(columns).tobytes()


def test_change_in_pieces_is_that_of_the_whole(monkeypatch):
    """Whatever the pieces, a token sees the one before it and no other."""
    model, stream = perturbed(ENRICHED), random_stream(50, 64)
    whole = enrichment_change(model, stream)
    assert whole.shape == (50,) and (whole > 0).all()
    for piece in (1, 7, 49, 50):
        np.testing.assert_allclose(enrichment_change(model, stream, piece), whole, rtol=1e-5)


def test_sliding_sees_more_than_non_overlapping():
    """A model that copies what it saw eight tokens ago gains from context at a window's start."""

    class Echo(nn.Module):
        def hidden(self, ids, adapters):
            shifted = torch.cat([torch.full_like(ids[:, :7], VOCAB - 1), ids[:, :-7]], 1)
            return 5.0 * nn.functional.one_hot(shifted, VOCAB).float()

        def logits(self, hidden):
            return hidden

    stream = np.tile(random_stream(7, VOCAB), 20)
    scores = [scored(Echo(), tiny(), stream, stride).log_prob.mean() for stride in (4, 16)]
    assert scores[0] > scores[1] + 0.5


def test_bits_per_byte_by_hand():
    log_prob, sizes = np.log([0.5, 0.25, 0.125]), np.array([0, 1, 3])
    assert train_gpt.bits_per_byte(log_prob, sizes) == pytest.approx(6 / 4)


def test_random_tokens_cost_ten_bits_under_any_model():
    """1,024 symbols drawn evenly: a confident, a fresh and a trained-to-noise model all pay."""
    cfg = tiny(vocab_size=1024, model_dim=16, rope_dims=2)
    stream = random_stream(6000, 1024, seed=3)
    for spread in (0.0, 0.3, 1.0):
        log_prob = scored(perturbed(cfg, spread=spread), cfg, stream, 16).log_prob
        bits = -log_prob / math.log(2)
        assert bits.mean() > math.log2(1022) - 4 * bits.std() / math.sqrt(len(bits))


def test_validation_score_is_the_scorer_s(dataset, rt):
    """A stage's line is -sum / ln 2 / bytes over the whole stream, by hand."""
    cfg = tiny(vocab_size=512, data_path=str(dataset), tokenizer_path=f"{dataset}/tokenizer.model")
    text, lines = train_gpt.ValidationText(cfg), []
    fake = SimpleNamespace(log=lambda key, *_, **values: lines.append((key, values)))
    log_prob = np.linspace(-9, -1, len(text.targets))
    report = train_gpt.Report(fake, cfg)
    report.log_text()
    report.score("stage", log_prob, stride=4)
    (first, sizes), (second, _), (key, values) = lines
    assert (first, second) == ("val_text", "bytes_check")
    assert sizes == dict(tokens=len(text.targets), bytes=int(text.bytes.sum()))
    assert key == "final_stage_exact" and values["stride"] == 4
    assert values["val_loss"] == pytest.approx(-log_prob.mean(), rel=1e-14)
    bits = -log_prob.sum() / math.log(2)
    assert values["val_bpb"] == pytest.approx(bits / text.bytes.sum(), rel=1e-14)


# -----------------------------------------------------------------------------
# The whole honest score once more, by oracles.py


def text_with_repeats(seed):
    """Documents that quote each other, some empty, some longer than the window"""
    rng, parts = np.random.default_rng(seed), []
    phrases = [rng.integers(2, 64, rng.integers(3, 30)) for _ in range(6)]
    for _ in range(14):
        parts.append([BOS])
        parts += [phrases[i] for i in rng.integers(0, 6, rng.integers(0, 6))]
        parts.append(rng.integers(2, 64, rng.integers(0, 8)))
    return np.concatenate(parts).astype(np.uint16)


def furthest(cfg, stream, orders):
    model = perturbed(cfg).eval().requires_grad_(False)
    scores, final, _ = scored_documents(model, cfg, stream)
    arguments = scores.log_prob.tolist(), scores.entropy.tolist(), cfg.eval_lanes, orders
    wanted = honest_score(stream.tolist(), *arguments)
    assert abs(wanted - scores.log_prob).mean() > 0.05  # the counts say something
    return abs(final - wanted).max()


@pytest.mark.parametrize("lanes", [1, 3, 5, 32])
def test_score_of_a_short_text_is_the_oracle_s(lanes):
    cfg, orders = tiny(eval_lanes=lanes), (*range(1, 10), *LONG)
    assert furthest(cfg, text_with_repeats(seed=lanes), orders) <= 1e-6


def test_configured_orders_are_the_oracle_s():
    cfg = tiny(ngram_min_order=3, ngram_max_order=5)
    stream = np.append(text_with_repeats(seed=9), np.uint16(BOS))  # ends in a BOS
    assert furthest(cfg, stream, (1, 3, 4, 5, *LONG)) <= 1e-6


def test_a_run_s_score_is_the_oracle_s(smoke_run):
    """Of scores.npz alone: the text, what the model said, and the printed val_bpb."""
    for name in ("one", "two_ranks"):
        run, columns = smoke_run(name), smoke_run(name).arrays("scores.npz")
        stream = [BOS, *columns["token"].tolist()]
        said = columns["logp_model"].tolist(), columns["entropy"].tolist()
        wanted = honest_score(stream, *said, 32, (*range(1, 10), *LONG))
        assert abs(columns["logp_final"] - wanted).max() <= 1e-6, name
        bpb = -wanted.sum() / math.log(2) / columns["bytes"].sum()
        assert run.val_bpb() == pytest.approx(bpb, abs=1e-6)
