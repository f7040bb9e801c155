"""Test-time training: scored first, learned from then, on all weights or on low-rank additions."""

import copy
import math

import numpy as np
import pytest
import torch
from helpers import (
    adapted,
    perturbed,
    random_stream,
    student_of,
    tiny,
    train_gpt,
    trained,
)
from oracles import cascade, mixture
from ranks_worker import STREAM, TTT

KINDS = [dict(ttt_lr=0.05), dict(ttt_use_lora=True, ttt_lora_rank=4)]
CHUNK, WINDOW, STRIDE = 32, 16, 4


def learning(**changes):
    """A configuration with test-time training in chunks of two windows."""
    base = dict(ttt_enabled=True, scorer="sliding", ttt_chunk_tokens=CHUNK, ttt_batch_seqs=2)
    return tiny(**base | changes)


@pytest.fixture(scope="module", params=KINDS, ids=["sgd", "lora"])
def case(request):
    """-> configuration, model, stream of five chunks and a bit, its Scores"""
    cfg = learning(**request.param)
    model, stream = perturbed(cfg), random_stream(170, cfg.vocab_size)
    scores = adapted(copy.deepcopy(model), train_gpt.Runtime(cfg), cfg, stream)
    return cfg, model, stream, scores


def scored(cfg, model, stream):
    return adapted(copy.deepcopy(model), train_gpt.Runtime(cfg), cfg, stream)


def plain_scores(cfg, model, stream):
    """The same windows, nothing learned."""
    scorer = train_gpt.WindowScorer(model.eval(), train_gpt.Runtime(cfg), cfg)
    return scorer.score(stream, STRIDE)


# -----------------------------------------------------------------------------
# Score first


def test_first_chunk_is_scored_by_the_artifact_s_weights(case):
    cfg, model, stream, scores = case
    plain = plain_scores(cfg, model, stream)
    assert scores.log_prob.shape == (170,) and scores.log_prob.dtype == np.float64
    np.testing.assert_allclose(scores.log_prob[:CHUNK], plain.log_prob[:CHUNK], rtol=0, atol=2e-5)
    for first in range(CHUNK, 170, CHUNK):
        late = slice(first, first + CHUNK)
        assert abs(scores.log_prob[late] - plain.log_prob[late]).max() > 1e-3


@pytest.mark.parametrize("place", [1, 20, 32, 33, 34, 63, 64, 65, 96, 101, 160, 170])
def test_later_tokens_change_no_bit_of_what_was_scored(case, place):
    """Other tokens from index `place` on; target t is the token at t + 1."""
    cfg, model, stream, scores = case
    other = stream.copy()
    other[place:] = random_stream(170, cfg.vocab_size, seed=place)[place:]
    other[place] = stream[place] % 60 + 2  # another one in any case
    changed = scored(cfg, model, other)
    assert changed.log_prob[: place - 1].tobytes() == scores.log_prob[: place - 1].tobytes()
    assert changed.entropy[:place].tobytes() == scores.entropy[:place].tobytes()
    assert changed.log_prob[place - 1] != scores.log_prob[place - 1]


def test_an_early_token_is_learned_from(case):
    """It changes scores that no window of its own reaches, as it never does without learning."""
    cfg, model, stream, scores = case
    other = stream.copy()
    other[5] = stream[5] % 60 + 2
    changed = scored(cfg, model, other)
    far = slice(CHUNK + WINDOW, None)
    assert (changed.log_prob[far] != scores.log_prob[far]).mean() > 0.99
    plain = [plain_scores(cfg, model, s).log_prob for s in (stream, other)]
    assert (plain[0][far] == plain[1][far]).all()


# -----------------------------------------------------------------------------
# What is learned


def oracle_step(model, cfg, optimizer, chunk):
    """Three epochs over a chunk, by the plain rules of PR #549."""
    tokens = torch.from_numpy(chunk.astype(np.int64))
    rows = tokens[:-1].view(-1, WINDOW), tokens[1:].view(-1, WINDOW)
    for _ in range(cfg.ttt_epochs):
        for inputs, targets in zip(*(r.split(cfg.ttt_batch_seqs) for r in rows), strict=True):
            optimizer.zero_grad()
            model(inputs, targets).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.ttt_grad_clip)
            optimizer.step()


def test_sgd_is_torch_s_on_all_weights(rt):
    """Momentum across chunks, the cosine over them, clipped to a norm of 1."""
    cfg, stream = learning(ttt_lr=0.05, ttt_batch_seqs=1), random_stream(4 * CHUNK, 64)
    model = perturbed(cfg).eval()
    plain = copy.deepcopy(model)
    training = student_of(model, rt, cfg)
    optimizer = torch.optim.SGD(plain.parameters(), cfg.ttt_lr, momentum=0.9)
    for number in range(3):
        chunk = stream[number * CHUNK : (number + 1) * CHUNK + 1]
        optimizer.param_groups[0]["lr"] = cfg.ttt_lr * (1 + math.cos(math.pi * number / 3)) / 2
        oracle_step(plain, cfg, optimizer, chunk)
        training.learn(chunk, number / 3)
    for (name, weight), wanted in zip(
        training.model.named_parameters(), plain.parameters(), strict=True
    ):
        torch.testing.assert_close(weight, wanted, rtol=1e-4, atol=1e-5, msg=name)
        assert not torch.equal(weight, getattr(model, name)), name


@pytest.mark.parametrize("size", [5 * CHUNK, 4 * CHUNK + 7])
@pytest.mark.parametrize("changes", KINDS)
def test_rate_is_a_cosine_over_the_chunks(changes, size, rt):
    """(1 + cos(pi c / (C - 1))) / 2 at chunk c of C; the last one is not learned from."""
    cfg, count, rates, chunks = learning(**changes, ttt_epochs=1), 5, [], []
    stream, model = random_stream(size, 64), perturbed(cfg)
    training = student_of(model, rt, cfg)

    def spy(chunk, progress, learn=training.learn):
        learn(chunk, progress)
        rates.extend(group["lr"] for group in training.optimizer.param_groups)
        chunks.append(chunk)

    training.learn = spy
    training.score(stream)
    first = cfg.ttt_lora_lr if cfg.ttt_use_lora else cfg.ttt_lr
    wanted = [first * (1 + math.cos(math.pi * c / (count - 1))) / 2 for c in range(count - 1)]
    assert rates == pytest.approx(wanted)
    for c, chunk in enumerate(chunks):
        assert chunk.tolist() == stream[c * CHUNK : (c + 1) * CHUNK + 1].tolist()


TTT_SETTINGS = {  # field -> another value; each must change the scores of the kinds it is of
    "ttt_lr": (0.01, "sgd"),
    "ttt_momentum": (0.5, "sgd"),
    "ttt_lora_lr": (0.003, "lora"),
    "ttt_lora_rank": (2, "lora"),
    "ttt_epochs": (1, "both"),
    "ttt_chunk_tokens": (48, "both"),
    "ttt_batch_seqs": (1, "both"),
    "ttt_grad_clip": (0.01, "sgd"),  # Adam does not see the scale of a gradient
}


@pytest.mark.parametrize("name", TTT_SETTINGS)
def test_every_setting_changes_the_scores(name):
    value, kind = TTT_SETTINGS[name]
    for number, changes in enumerate(KINDS):
        cfg, other = learning(**changes), learning(**changes | {name: value})
        model, stream = perturbed(cfg), random_stream(120, 64)
        a, b = (scored(c, model, stream).log_prob for c in (cfg, other))
        if kind in ("both", ("sgd", "lora")[number]):
            assert abs(a - b).max() > 1e-4, changes
        elif name != "ttt_grad_clip":
            assert a.tobytes() == b.tobytes(), changes


def test_model_passed_in_is_not_modified(case):
    cfg, model, stream, _ = case
    given = copy.deepcopy(model).eval().requires_grad_(False)
    adapted(given, train_gpt.Runtime(cfg), cfg, stream)
    assert "bank" not in vars(given) and not any(w.requires_grad for w in given.parameters())
    for (name, weight), before in zip(given.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(weight, before), name


# -----------------------------------------------------------------------------
# Low-rank additions (PR #808)


@pytest.fixture
def lora(rt):
    """-> model, its training after three chunks, the gradients of each step's A and B"""
    cfg, stream, gradients = learning(ttt_use_lora=True, ttt_lora_rank=4), random_stream(96, 64), []
    model = perturbed(cfg).eval().requires_grad_(False)
    training = student_of(model, rt, cfg)
    step = training.optimizer.step
    training.optimizer.step = lambda: (
        gradients.append([w.grad.clone() for w in training.weights]) or step()
    )
    for number in range(3):
        training.learn(stream[number * CHUNK : (number + 1) * CHUNK + 1], number / 3)
    return model, training, gradients


def test_gradients_reach_both_factors_and_the_base_stays(lora):
    model, training, gradients = lora
    assert len(training.weights) == 4
    for a in gradients[0][0], gradients[0][2]:
        assert (a == 0).all()  # where B is still zero
    for a in gradients[0][1], gradients[0][3], *gradients[-1]:
        assert (a.flatten(1).abs().sum(1) > 0).all()  # in every layer
    for name, weight in training.model.named_parameters():
        assert torch.equal(weight, getattr(model, name)), name


def test_additions_are_a_b_on_queries_and_values_alone(lora):
    model, training, _ = lora
    a, b, a_v, b_v = training.weights
    layers, size = 4, 32
    assert a.shape == (layers, size, 4) and b.shape == b_v.shape == (layers, 4, size)
    assert a_v.shape == (layers, 16, 4)
    with torch.no_grad():
        added = training.adapters()
    assert (added["qo_bank"][layers:] == 0).all() and (added["kv_bank"][:layers] == 0).all()
    for got, wanted in (
        (added["qo_bank"][:layers], torch.einsum("lir,lrj->lij", a, b)),
        (added["kv_bank"][layers:], torch.einsum("lir,lrj->lij", a_v, b_v)),
    ):
        torch.testing.assert_close(got, wanted.detach(), rtol=0, atol=1e-6)
        assert (got.abs().amax((1, 2)) > 1e-4).all()
    assert added.keys() == {"qo_bank", "kv_bank"}
    merged, ids = copy.deepcopy(model), torch.from_numpy(random_stream(15, 64)).long()[None]
    with torch.no_grad():
        merged.qo_bank.add_(added["qo_bank"])
        merged.kv_bank.add_(added["kv_bank"])
        adapted = training.model.hidden(ids, adapters=added)
        torch.testing.assert_close(adapted, merged.hidden(ids))
        assert not torch.allclose(model.hidden(ids), merged.hidden(ids))


def test_additions_start_at_nothing_and_small(rt):
    cfg = tiny(model_dim=128, ttt_use_lora=True)
    model = perturbed(cfg).eval()
    training = student_of(model, rt, cfg)
    for a, b in (training.weights[:2], training.weights[2:]):
        assert (b == 0).all() and a.shape[-1] == b.shape[-2] == 8
        assert a.std().item() == pytest.approx(0.01, rel=0.1)
    assert torch.equal(training.model.bank("qo_bank"), model.qo_bank)
    again = student_of(model, rt, cfg)  # on every rank the same
    assert torch.equal(again.weights[0], training.weights[0])


# -----------------------------------------------------------------------------
# What it is worth


STYLE = dict(vocab_size=512, iterations=60, train_batch_tokens=512, ttt_chunk_tokens=128)


@pytest.fixture(scope="module")
def reader(train_tokens, tmp_path_factory):
    """A model of a little prose."""
    cfg = learning(**STYLE)
    _, weights = trained(cfg, train_tokens, tmp_path_factory.mktemp("reader"))
    model = train_gpt.GPT(cfg)
    model.load_state_dict(weights)
    return model


@pytest.mark.parametrize("changes", [dict(ttt_lr=0.05), dict(ttt_use_lora=True)])
def test_learning_helps_on_another_style(changes, reader):
    """It reads a text that goes on counting up, in a way of its own."""
    cfg, model = learning(**STYLE | changes), reader
    rng = np.random.default_rng(0)
    stream = (rng.integers(0, 20, 900).cumsum() % 400 + 2).astype(np.uint16)
    before = plain_scores(cfg, model, stream).log_prob[256:]
    after = scored(cfg, model, stream).log_prob[256:]
    assert after.mean() > before.mean() + 0.5 and after.mean() > -math.log(cfg.vocab_size)


# -----------------------------------------------------------------------------
# Ranks, and the command line


@pytest.mark.parametrize("lora", ["0", "1"])
@pytest.mark.usefixtures("no_picture")
def test_lines_of_a_run(lora, smoke_run, again):
    """Its own line after the sliding one, whose scores it replaces in the mixture and the files."""
    plain = smoke_run("one")
    run = again(
        SCORER="sliding", TTT_ENABLED="1", TTT_USE_LORA=lora, TTT_CHUNK_TOKENS="512", TTT_EPOCHS="1"
    )
    stages = [line.split()[0] for line in run.lines if line.startswith("final_")]
    place = stages.index("final_ttt_exact")
    assert stages[place - 1 : place + 2 : 2] == [
    "final_int6_sliding_window_exact", "final_ngram_backoff_exact"
  ]  # fmt: skip
    for stage in ("int6_roundtrip_exact", "int6_sliding_window_exact"):
        assert run.final(stage) == plain.final(stage)
    columns, line = run.arrays("scores.npz"), run.final("ttt_exact")
    assert float(line["val_loss"]) == pytest.approx(-columns["logp_model"].mean(), rel=1e-12)
    bits = -columns["logp_model"].sum() / math.log(2)
    assert run.val_bpb("ttt_exact") == pytest.approx(bits / columns["bytes"].sum(), rel=1e-12)
    assert run.val_bpb("ttt_exact") != run.val_bpb("int6_sliding_window_exact")
    tokens = np.append(train_gpt.BOS, columns["token"])
    scores = train_gpt.Scores(columns["logp_model"], columns["entropy"])
    for stage, mix in (("ngram_backoff_exact", cascade), ("ngram_exact", mixture)):
        wanted = train_gpt.bits_per_byte(mix(tokens, scores, 512), columns["bytes"])
        assert run.val_bpb(stage) == pytest.approx(wanted, rel=1e-12)
    assert (
        run.val_bpb() != run.val_bpb("ttt_exact")
        and float(run.final("ngram_exact")["mass_error"]) < 1e-9
    )
    assert not any(line.startswith("final_ttt") for line in plain.lines)


@pytest.mark.parametrize("kind", ["sgd", "lora"])
def test_two_ranks_score_as_one(kind, two_ranks, rt):
    cfg = tiny(**TTT, ttt_use_lora=kind == "lora")
    scores = adapted(perturbed(cfg), rt, cfg, np.array(STREAM[:401]))
    first, second = two_ranks[f"ttt_{kind}"]
    assert first["log_prob"].tobytes() == second["log_prob"].tobytes()
    assert first["entropy"].tobytes() == second["entropy"].tobytes()
    assert abs(first["log_prob"] - scores.log_prob).max() < 1e-4
    plain = plain_scores(cfg, perturbed(cfg), np.array(STREAM[:401]))
    assert abs(plain.log_prob - scores.log_prob).max() > 1e-2  # so the bound says something
