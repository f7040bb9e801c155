"""Oracles: what several unit tests compare the script with.

honest_score is the whole score of a short text once more, by plain loops over dictionaries: from
the text and the model's log-probabilities it recomputes the order of coding, the counts, how past
targets went, the gate and its learning, and with them log p of each target, without any function
of train_gpt.py. What it follows is written in spec/validity.md (documents as lanes) and in the
docstrings of Blend. `oracle` counts by the definition. The rest is the script's own mixtures, on
any tokens and Scores.
"""

import math
from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import torch
from helpers import SilentRuntime, tiny, train_gpt

from train_gpt import CodingOrder, CountStore, Scores, count_ngrams, make_mixer, mix, mix_ngrams

BOS = 1
HIDDEN, RATE, FIRST_CHUNK, LARGEST_CHUNK = 32, 5e-3, 32, 4096
LONG = (12, 16, 24)
RECENT = (2, 3, 5, 8)  # orders whose last follower is an expert, too
REMEMBERED, LATEST = 16, 3  # targets of a lane: in the mean of how they went, one by one

# -----------------------------------------------------------------------------
# The honest score


def coding_order(stream, lanes):
    """Steps of (lane, place of the target in the text): each lane takes a document, and the next
    one where it ends, with a BOS or the text."""
    starts = [i for i in range(len(stream) - 1) if stream[i] == BOS]
    at, steps = {}, []
    for lane in range(min(lanes, len(starts))):
        at[lane] = starts.pop(0)
    while at:
        steps.append([(lane, at[lane]) for lane in sorted(at)])
        for lane, target in steps[-1]:
            at[lane] = target + 1
            if stream[target + 1] == BOS or target == len(stream) - 2:
                del at[lane]
                if starts:
                    at[lane] = starts.pop(0)
    return steps


class Counts:
    """Of each context of each order: token -> how often it followed; which one did last."""

    def __init__(self, orders, lanes):
        self.orders, self.after = orders, defaultdict(lambda: defaultdict(int))
        self.last = {}
        self.past = [[] for _ in range(lanes)]
        self.add([(lane, BOS) for lane in range(lanes)])  # documents of the first step begin

    def contexts(self, lane):
        past = self.past[lane]
        return [
            tuple(past[len(past) - k + 1 :]) if len(past) >= k - 1 else None for k in self.orders
        ]

    def look_up(self, lane, token):
        """(count of the context, of the token after it, distinct tokens after it, those seen once,
        did the token follow last time) of each order"""
        found = []
        for order, context in zip(self.orders, self.contexts(lane), strict=True):
            seen = self.after.get((order, context), {}) if context is not None else {}
            once = sum(1 for count in seen.values() if count == 1)
            same = self.last.get((order, context)) == token
            found.append((sum(seen.values()), seen.get(token, 0), len(seen), once, same))
        return found

    def add(self, tokens):
        """The tokens of a step: (lane, token)"""
        for lane, token in tokens:
            for order, context in zip(self.orders, self.contexts(lane), strict=True):
                if context is not None:
                    self.after[order, context][token] += 1
                    self.last[order, context] = token
        for lane, token in tokens:
            self.past[lane] = [BOS] if token == BOS else [*self.past[lane], token]


def features(found, entropy, past):
    """What the gate sees of a target: of the counts by kind, of the model's entropy, and how the
    lane's last targets went. past: (loss / 4, p of the longest context) of each, newest first"""
    n, types, once = ([row[i] for row in found] for i in (0, 2, 3))
    parts = [math.log1p(x) / 4 for x in n] + [math.log1p(x) / 4 for x in types]
    parts += [t / max(x, 1) for t, x in zip(types, n, strict=True)]
    parts += [s / max(x, 1) for s, x in zip(once, n, strict=True)]
    parts += [float(x > 0) for x in n]
    parts += [entropy / 4, entropy**2 / 16, math.exp(-entropy)]
    past = [*past[:REMEMBERED], *[(0.0, 0.0)] * REMEMBERED]
    parts += [x for pair in past[:LATEST] for x in pair]
    return parts + [sum(x) / REMEMBERED for x in zip(*past[:REMEMBERED], strict=True)]


class Gate:
    """inputs -> 32 hidden GELUs -> a softmax over the model and the orders that know the context,
    by their counts and by what came last; Adam, written out."""

    def __init__(self, orders):
        inputs = 5 * len(orders) + 3 + 2 * (LATEST + 1)
        experts = 1 + len(orders) + len({*orders} & {*RECENT})
        generator = torch.Generator().manual_seed(0)
        a = torch.randn(inputs, HIDDEN, generator=generator) / inputs**0.5
        b = torch.full((experts,), -1.0)
        b[0] = 1.0
        self.w = [a, torch.zeros(HIDDEN), torch.zeros(HIDDEN, experts), b]
        self.mean = [torch.zeros_like(w) for w in self.w]
        self.square = [torch.zeros_like(w) for w in self.w]
        self.steps, self.seen, self.odds, self.chunk = 0, 0, 0.0, FIRST_CHUNK

    def shares(self, x, known, w):
        a, b, c, d = w
        z = x @ a + b
        z = z * (1 + torch.erf(z / math.sqrt(2))) / 2
        return (z @ c + d).masked_fill(~known, -math.inf)

    def mixed(self, x, known, p):
        """p of the targets by the gate, and by the pair of gate and model."""
        gate = (self.shares(x, known, self.w).double().softmax(1) * p).sum(1)
        trust = 1 / (1 + math.exp(-self.odds)) if self.odds > -700 else 0.0
        return gate, trust * gate + (1 - trust) * p[:, 0]

    def learn(self, x, known, p, gate):
        """From a chunk of scored targets, and not before."""
        self.odds += float(gate.log().sum() - p[:, 0].log().sum())
        self.seen += len(p)
        passes = min(4, max(1, 2**20 // self.seen))
        size = 256 if passes > 1 else 512
        scaled = (p / p.max(1, keepdim=True).values).float()
        for _ in range(passes):
            for a in range(0, len(p), size):
                part = slice(a, a + size)
                w = [v.clone().requires_grad_() for v in self.w]
                p_mixed = (self.shares(x[part], known[part], w).softmax(1) * scaled[part]).sum(1)
                loss = -p_mixed.clamp(min=1e-30).log().mean()
                self.descend(torch.autograd.grad(loss, w))
        self.chunk = min(2 * self.chunk, LARGEST_CHUNK)

    def descend(self, gradients):
        self.steps += 1
        for i, g in enumerate(gradients):
            self.mean[i] = 0.9 * self.mean[i] + 0.1 * g
            self.square[i] = 0.999 * self.square[i] + 0.001 * g * g
            mean = self.mean[i] / (1 - 0.9**self.steps)
            square = self.square[i] / (1 - 0.999**self.steps)
            self.w[i] = self.w[i] - RATE * mean / (square.sqrt() + 1e-8)


def honest_score(stream, log_prob, entropy, lanes, orders):
    """log p of each target by the mixture. stream: tokens from a BOS on; log_prob, entropy: of the
    targets by the model, in the text's order, nats; orders: of the counts"""
    steps = coding_order(stream, lanes)
    counts, gate = Counts(orders, len(steps[0]) if steps else 0), Gate(orders)
    final, chunk, past = np.zeros(len(stream) - 1), [], defaultdict(list)
    for number, step in enumerate(steps):
        for lane, target in step:
            found = counts.look_up(lane, stream[target + 1])
            recent = [row for k, row in zip(orders, found, strict=True) if k in RECENT]
            p = [math.exp(log_prob[target])] + [c / max(n, 1) for n, c, *_ in found]
            p += [float(same) for *_, same in recent]
            known = [True] + [n > 0 for n, *_ in found + recent]
            chunk.append((target, features(found, entropy[target], past[lane]), known, p))
            longest = max((k for k, (n, *_) in enumerate(found) if n), default=None)
            hit = 0.0 if longest is None else found[longest][1] / found[longest][0]
            past[lane].insert(0, (-log_prob[target] / 4, hit))
        counts.add([(lane, stream[target + 1]) for lane, target in step])
        if len(chunk) >= gate.chunk or number == len(steps) - 1:
            targets, x, known, p = zip(*chunk, strict=True)
            x, known = torch.tensor(x, dtype=torch.float32), torch.tensor(known)
            p = torch.tensor(p, dtype=torch.float64)
            of_gate, of_pair = gate.mixed(x, known, p)
            final[list(targets)] = of_pair.log().numpy()
            gate.learn(x, known, p, of_gate)
            chunk = []
    return final


# -----------------------------------------------------------------------------
# Counts, and the script's mixtures

ORDERS = (*range(1, 10), *train_gpt.LONG_ORDERS)
CFG = tiny()  # with #864's cascade


def oracle(tokens, max_order):
    """Context tuple -> {token: count}, updated after every token, so that the last key is what
    followed last: the definition itself."""
    tokens, tables = [int(x) for x in tokens], defaultdict(dict)
    out = np.zeros((max_order, 5, len(tokens)), np.int64)
    for t, token in enumerate(tokens):
        for order in range(1, min(max_order, t + 1) + 1):
            table = tables[tuple(tokens[t - order + 1 : t])]
            n, c = sum(table.values()), table.get(token, 0)
            singles = sum(count == 1 for count in table.values())
            out[order - 1, :, t] = n, c, len(table), singles, [*table][-1:] == [token]
            table.pop(token, None)
            table[token] = c + 1
    return out


def scored_by(rows, state, targets):
    entropy = -(rows * np.log(rows)).sum(1)
    return Scores(np.log(rows[state, targets]), entropy[state])


def uniform(size, vocab_size):
    """Scores of a model that knows nothing."""
    nats = np.full(size, math.log(vocab_size))
    return Scores(-nats, nats)


def filled_store(tokens, vocab_size, orders=ORDERS):
    return CountStore(orders).collect(count_ngrams(tokens, vocab_size, max(orders)))


def mixed_by(name, tokens, scores, vocab_size, cfg=CFG):
    mixer = make_mixer(name, cfg, SilentRuntime())
    return mix(mixer, filled_store(tokens, vocab_size, mixer.orders), scores, None)


def cascade(tokens, scores, vocab_size, cfg=CFG):
    """log p of the published backoff."""
    return mixed_by("cascade", tokens, scores, vocab_size, cfg)


def mixture(tokens, scores, vocab_size):
    """log p of the learned mixture."""
    return mixed_by("blend", tokens, scores, vocab_size)


def mixed(tokens, scores, **changes):
    """log p by mix_ngrams, and what it logs of each stage: name -> values"""
    cfg, stages = tiny(**dict(vocab_size=256) | changes), {}
    report = SimpleNamespace(
        cfg=cfg,
        rt=SilentRuntime(),
        score_in_order=lambda stage, log_prob, **more: stages.update(
            {stage: more | dict(log_prob=log_prob.copy())}
        ),
    )
    return mix_ngrams(scores, CodingOrder(tokens, slice(None)), report), stages


def bits(log_prob):
    return -log_prob.mean() / math.log(2)


def scored_documents(model, cfg, stream):
    """-> Scores of the documents, log p by the configured mixture, CodingOrder"""
    scores, order = train_gpt.score_documents(model, train_gpt.Runtime(cfg), cfg, stream)
    if cfg.mixer == "none":
        return scores, scores.log_prob, order
    report = SimpleNamespace(cfg=cfg, rt=SilentRuntime(), score_in_order=lambda *_, **__: None)
    return scores, mix_ngrams(scores, order, report), order
