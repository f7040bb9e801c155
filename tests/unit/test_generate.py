"""Text from the model: in the lanes that score, drawn from its distribution."""

import numpy as np
import pytest
import torch
from helpers import perturbed, tiny, train_gpt
from hypothesis import given, settings
from hypothesis import strategies as st

BOS = train_gpt.BOS
CFG = tiny(eval_lanes=2)
MODEL = perturbed(CFG).eval().requires_grad_(False)
TEXT = [int(token) for token in np.random.default_rng(0).integers(2, 64, 40)]


def test_forced_text_costs_what_the_scorer_says():
    """Longer than the window, a lane a document; in other shapes but for rounding."""
    stream = np.array([BOS, *TEXT, BOS, *TEXT[:9]], np.uint16)
    scores, _ = train_gpt.score_documents(MODEL, train_gpt.Runtime(CFG), CFG, stream)
    for lanes, most in ((2, 1e-9), (1, 1e-5)):
        found = train_gpt.generate(MODEL, [TEXT, TEXT[:9]], 0, lanes=lanes)
        for each, part in zip(found, (slice(0, 40), slice(41, 50)), strict=True):
            assert len(each.tokens) == 0
            np.testing.assert_allclose(each.log_prob, scores.log_prob[part], rtol=0, atol=most)


def next_log_probs(ids):
    """After a BOS and these, by one ordinary pass over all of them."""
    with torch.no_grad():
        hidden = MODEL.hidden(torch.tensor([[BOS, *ids]]))
        return MODEL.logits(hidden)[0, -1].double().log_softmax(0).numpy()


def test_at_temperature_0_it_is_the_likeliest_token_each_time():
    (found,) = train_gpt.generate(MODEL, [TEXT[:3]], 8, temperature=0)
    ids = TEXT[:3]
    for token in found.tokens:
        log_prob = next_log_probs(ids)
        assert token == log_prob.argmax()
        assert found.log_prob[len(ids)] == pytest.approx(log_prob[token], abs=1e-5)
        ids = [*ids, int(token)]
    assert len(found.tokens) == 8 or next_log_probs(ids).argmax() == BOS
    (one,) = train_gpt.generate(MODEL, [TEXT[:3]], 8, top_k=1, seed=5)
    assert one.tokens.tolist() == found.tokens.tolist()


def test_a_seed_writes_one_text_in_any_number_of_lanes():
    prompts = [[], TEXT[:5], [7], []]
    texts = [
        [each.tokens.tolist() for each in train_gpt.generate(MODEL, prompts, 12, seed=3, lanes=n)]
        for n in (1, 3, 4)
    ]
    assert texts[0] == texts[1] == texts[2]
    assert texts[0][0] != texts[0][3]  # each prompt draws for itself
    other = train_gpt.generate(MODEL, prompts, 12, seed=4)
    assert [each.tokens.tolist() for each in other] != texts[0]


def test_a_document_ends_at_a_bos(monkeypatch):
    monkeypatch.setattr(
        train_gpt, "draw_token", lambda row, *_: BOS if row[5] == row.max() else int(row.argmax())
    )
    monkeypatch.setattr(train_gpt, "predict", after(9, 8, 5))
    (found,) = train_gpt.generate(MODEL, [[]], 10)
    assert found.tokens.tolist() == [9, 8] and len(found.log_prob) == 2


def after(*likeliest):
    """predict that finds these the likeliest tokens, one a step"""
    rows = iter(likeliest)

    def predict(model, hidden):
        log_prob = torch.full((len(hidden), CFG.vocab_size), -9.0, dtype=torch.float64)
        log_prob[:, next(rows)] = -0.1
        return log_prob, torch.zeros(len(hidden), dtype=torch.float64)

    return predict


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 99),
    temperature=st.sampled_from([0.5, 1.0, 1.7]),
    top_k=st.sampled_from([0, 1, 3, 6]),
)
def test_tokens_are_drawn_as_often_as_likely(seed, temperature, top_k):
    """Within five standard deviations of 4,000 draws."""
    log_prob = np.log(np.random.default_rng(seed).dirichlet(np.ones(6)))
    p = np.exp(log_prob / temperature)
    p[np.argsort(-p)[top_k or 6 :]] = 0
    p /= p.sum()
    draw = np.random.default_rng(seed + 1)
    tokens = [train_gpt.draw_token(log_prob, temperature, top_k, draw) for _ in range(4000)]
    counts = np.bincount(tokens, minlength=6)
    assert (np.abs(counts - 4000 * p) <= 5 * np.sqrt(4000 * p * (1 - p)) + 1e-9).all()
