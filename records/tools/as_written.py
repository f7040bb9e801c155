"""Published n-gram scorers exactly as written, on the scores of a finished or running run folder.

    python records/tools/as_written.py runs/tiny_seed1337 --scheme pr864

What they print is not a code length: the probabilities of all tokens do not add up to 1, but mostly
to far more. So it is called pseudo_bpb and stands beside its mass, the sum over the whole
vocabulary at sampled positions (mean, least, largest; 1 for a distribution). train_gpt.py calls
this where NGRAM_SCHEME asks for it. Needs scores.npz (SAVE_SCORES=1), or scores_ema.npz with
--weights ema.

Orders, least count, buckets, targets between updates and number of caches are those of the run's
configuration; hashes, weights and floors are the PR's. All targets are scored, whichever the PR
left out: #864 some 2,000 at the start, #1026 all but the first of eight ranks.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import checkout  # noqa: F401  (puts train_gpt and data/ on the path)

import endings

if __name__ == "__main__":
    endings.begin()  # the imports take seconds

import numpy as np
import torch
from run_folder import RunFolder, blame, read_columns
from torch import Tensor

from train_gpt import (
    BOS,
    Config,
    Scores,
    UserError,
    bits_per_byte,
    ngram_counts,
    printable,
    read_pairs,
    read_regular,
)

PROBES = 64  # positions at which the mass is measured
PE_CONFIDENCE = 0.5  # #810's, of a model without pre-enrichment: alpha stays what it is
MOST_SCORES_BYTES = 1 << 32  # 64 bytes for each of FineWeb's 62 million tokens
BLOCK = 1 << 18  # sorted keys counted at a time: fits a cache
PRIMES = (36313, 27191, 51647, 81929, 131071, 174763, 233017, 283721, 347237, 409891, 479909,
          557927, 631553, 716279, 811207)  # fmt: skip


def shares(size: int, caches: int) -> list[int]:
    """Bounds of contiguous shares of the targets 1..size - 1, one for each cache."""
    return [1 + i * (size - 1) // caches for i in range(caches + 1)]


# -----------------------------------------------------------------------------
# Hashed counts: #864, #810, #993, #808


class SortedKeys:
    """Counts a key in any stretch of positions, by binary search over sorted (key, position)."""

    def __init__(self, keys: Tensor, first: int):
        """keys: int64 (M,), those of positions first..first + M - 1; not modified."""
        end = first + len(keys)
        self.bits = end.bit_length()
        self.packed = keys << self.bits
        self.packed |= torch.arange(first, end, device=keys.device)
        if keys.is_cuda:
            self.packed = self.packed.sort().values
        else:  # in place, and on a CPU far faster than torch's
            self.packed.numpy().sort()

    def place(self, packed: Tensor) -> Tensor:
        """How many of ours are smaller."""
        return torch.searchsorted(self.packed, packed)

    def count(self, keys: Tensor, begin: Tensor, end: Tensor) -> Tensor:
        """How often each key lies in begin..end - 1."""
        return self.place(keys << self.bits | end) - self.place(keys << self.bits | begin)

    def count_each(self, bounds: Tensor, chunk: int, prefill: bool, size: int) -> Tensor:
        """The same for each position's own key, in what is known there: int32 (size,)"""
        counts = torch.zeros(size, dtype=torch.int32, device=self.packed.device)
        for offset in range(0, len(self.packed), BLOCK):
            part = self.packed[offset : offset + BLOCK]
            position = part & (1 << self.bits) - 1
            begin, end = (
                self.run_starts(part - position + place, offset)
                for place in known_stretch(position, bounds, chunk, prefill)
            )
            counts[position] = (end - begin).int()
        return counts

    def run_starts(self, packed: Tensor, offset: int) -> Tensor:
        """place(packed), for our keys from `offset` on with positions moved back to a border: where
        their run of equal values begins."""
        start = torch.arange(offset, offset + len(packed), device=packed.device)
        start[1:] *= packed[1:] != packed[:-1]
        start[:1] = self.place(packed[:1])
        return start.cummax(0).values


def known_stretch(
    position: Tensor, bounds: Tensor, chunk: int, prefill: bool
) -> tuple[Tensor, Tensor]:
    """First position that the cache may know and first that it may not: its share's start (the
    text's, where caches are prefilled) and that of its chunk of the share."""
    share = bounds[torch.bucketize(position, bounds, right=True) - 1]
    return share * (not prefill), position - (position - share) % chunk


@dataclass(frozen=True)
class Hashed:
    """A scorer over two tables an order: buckets of contexts, and of contexts with their target.

    No key is ever checked, lookups see earlier chunks only. Tuples go by order from 2 on; their
    last value repeats. Shares are equal and chunks start with them; #993 and #808 cut both at
    windows, so that the first chunk has one window more.
    """

    name: str
    primes: tuple[int, ...]  # of the XOR hash; none: #810's, a polynomial
    centres: tuple[float, ...]  # entropy at which alpha is halfway, nats
    low: float = 0.05  # alpha far below
    high: float = 0.60  # and far above
    multipliers: tuple[float, ...] = (1.0,)  # of alpha
    highest: float = 1.0  # alpha at most
    weights: tuple[float, ...] = (1.0,)  # of the probability
    edge: float = 0.0  # distance it keeps from 0 and 1 before
    confident: bool = False  # alpha times 0.5 + the pre-enrichment's confidence
    model_floor: float = 0.0  # least p_model
    floor: float = 1e-12  # least mixture
    late: int = 0  # first target with a key, after order - 1
    wraps: bool = False  # contexts before the text continue at its end
    prefill: bool = False  # caches start with all n-grams before their share
    off_by_one: bool = False  # keys of the token before the target, in the target's place

    def first(self, order: int) -> int:
        """Position of the first target with a key."""
        return 1 if self.wraps else order - 1 + self.late + self.off_by_one

    def keys(self, tokens: Tensor, order: int, buckets: int) -> tuple[Tensor, Tensor]:
        """Buckets of context, and of context and target, of positions first(order)..N - 1.

        tokens int64 (N,) -> two int64 (N - first(order),). The oldest token comes first.
        """
        start = self.first(order) - order + 1
        if start < 0:  # as negative indices of an array
            before = tokens[torch.arange(start, 0, device=tokens.device) % len(tokens)]
            tokens, start = torch.cat([before, tokens]), 0
        size = max(0, len(tokens) - start - order + 1)
        context = torch.zeros(size, dtype=torch.int64, device=tokens.device)
        for k in range(order - 1):
            token = tokens[start + k : start + k + size]
            if self.primes:
                context ^= token * self.primes[k % len(self.primes)]
            else:  # a multiple of 8: after 8 tokens nothing is left of the first
                context.mul_(265443576).add_(token)
        context &= buckets - 1
        return context, self.pairs(context, tokens[start + order - 1 :], order, buckets)

    def pairs(self, context: Tensor, target: Tensor, order: int, buckets: int) -> Tensor:
        """Buckets of contexts' buckets and targets."""
        if self.primes:
            return (context ^ target * self.primes[(order - 1) % len(self.primes)]) & buckets - 1
        return (context * 1000003 + target) & buckets - 1

    def counts(
        self,
        tokens: np.ndarray,
        vocab_size: int,
        cfg: Config,
        *,
        probes: np.ndarray = (),
        device: Any = "cpu",
    ) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
        """Yields (order, n, min(n, c), total) from NGRAM_MIN_ORDER to NGRAM_MAX_ORDER: int32 (N,)
        over positions and, at each probed position, what all tokens as its target are credited.

        Tables of NGRAM_BUCKETS; updates every NGRAM_CHUNK_TOKENS targets; NGRAM_CACHES contiguous
        shares of the targets have tables of their own, as on so many ranks.
        """
        tokens = torch.from_numpy(np.asarray(tokens).astype(np.int64)).to(device)
        bounds = torch.tensor(shares(len(tokens), cfg.ngram_caches), device=device)
        known = bounds, cfg.ngram_chunk_tokens, self.prefill
        vocabulary = torch.arange(vocab_size, device=device)
        for order in range(cfg.ngram_min_order, cfg.ngram_max_order + 1):
            first, total = self.first(order), np.ones(len(probes))
            contexts, pairs = self.keys(tokens, order, cfg.ngram_buckets)
            n = SortedKeys(contexts, first).count_each(*known, len(tokens))
            found = SortedKeys(pairs, first)
            del pairs
            c = torch.minimum(n, found.count_each(*known, len(tokens)))
            for i, t in enumerate(probes):
                if t >= first and n[t] > 0:
                    target = tokens[t].expand(vocab_size) if self.off_by_one else vocabulary
                    keys = self.pairs(contexts[t - first], target, order, cfg.ngram_buckets)
                    every = found.count(keys, *known_stretch(torch.full_like(keys, t), *known))
                    every = torch.minimum(every, n[t]).cpu().numpy()
                    total[i] = self.probability(order, n[t].item(), every).sum()
            del contexts, found
            yield order, n.cpu().numpy(), c.cpu().numpy(), total

    def probability(self, order: Any, n: Any, c: np.ndarray) -> np.ndarray:
        """What a target is credited for its counts; a weight here creates mass."""
        p = np.clip(c / np.maximum(n, 1), self.edge, 1 - self.edge)
        return np.clip(p * by_order(self.weights, order), 0, 1)

    def alpha(self, order: np.ndarray, entropy: np.ndarray, confidence: Any = 0.5) -> np.ndarray:
        """Weight of that, from matched order (0: none) and the model's entropy in nats."""
        distance = 2 * (entropy - by_order(self.centres, order))
        alpha = self.low + (self.high - self.low) / (1 + np.exp(-distance))
        alpha = np.minimum(alpha * by_order(self.multipliers, order), self.highest)
        return np.where(np.greater(order, 0), alpha * (0.5 + confidence), 0.0)

    def __call__(
        self,
        tokens: np.ndarray,
        scores: Scores,
        vocab_size: int,
        cfg: Config,
        device: Any = "cpu",
    ) -> tuple[np.ndarray, np.ndarray]:
        """tokens (N + 1,), the first one no target; scores of the N targets -> (pseudo log p (N,)
        in nats, mass at PROBES positions; there the floors are left out)."""
        probes, totals = probed(len(tokens)), {0: np.ones(PROBES)}
        stream = np.roll(tokens, 1) if self.off_by_one else tokens

        def targets() -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
            counts = self.counts(stream, vocab_size, cfg, probes=probes, device=device)
            for order, n, c, total in counts:
                totals[order] = total
                yield order, n[1:], c[1:]

        order, n, c = backoff_match(targets(), cfg)
        confidence = chunk_confidence(scores.pe_delta, cfg) if self.confident else 0.5
        alpha = self.alpha(order, scores.entropy, confidence)
        p = (1 - alpha) * np.maximum(np.exp(scores.log_prob), self.model_floor)
        p += alpha * self.probability(order, n, c)
        alpha = alpha[probes - 1]
        mass = 1 - alpha + alpha * [totals[k][i] for i, k in enumerate(order[probes - 1])]
        return np.log(np.maximum(p, self.floor)), mass


def backoff_match(counts: Iterator, cfg: Any) -> np.ndarray:
    """Order (0: none), n and c of the longest context seen NGRAM_MIN_COUNT times: int32 (3, N)"""
    best = None
    for order, *stats in counts:
        best = np.zeros((3, len(stats[0])), np.int32) if best is None else best
        if cfg.ngram_min_order <= order <= cfg.ngram_max_order:
            usable = stats[0] >= cfg.ngram_min_count
            for row, value in zip(best, (order, *stats[:2]), strict=True):
                np.copyto(row, value, where=usable)
        value = stats = None  # frees them before the next order is counted
    return best


def by_order(values: tuple[float, ...], order: Any) -> np.ndarray:
    return np.take(values, np.maximum(order - 2, 0), mode="clip")


def probed(size: int) -> np.ndarray:
    return np.linspace(1, size - 1, PROBES).astype(int)


def chunk_confidence(pe_delta: np.ndarray | None, cfg: Config) -> np.ndarray | float:
    """#810's: the change over the largest of its chunk, which later targets enter."""
    if pe_delta is None:
        return PE_CONFIDENCE
    bounds, chunk = shares(len(pe_delta) + 1, cfg.ngram_caches), cfg.ngram_chunk_tokens
    starts = [np.arange(a - 1, b - 1, chunk) for a, b in itertools.pairwise(bounds)]
    starts = np.concatenate(starts)
    largest = np.maximum.reduceat(pe_delta, starts)
    return pe_delta / np.maximum(largest, 1e-8).repeat(np.diff(starts, append=len(pe_delta)))


pr864 = Hashed(
    "pr864",
    PRIMES,
    centres=(3.0, 2.75, 2.5, 2.25, 2.0, 1.75, 1.5, 1.25),
    multipliers=(0.3, 0.3, 0.97, 2.0),
    highest=0.95,
    model_floor=1e-10,
    floor=1e-10,
)
pr810 = Hashed(
    "pr810",
    (),
    centres=(4.5, 4.2, 3.8, 3.5, 3.2, 3.0, 3.0, 3.0, 2.7, 2.5),
    low=0.20,
    high=0.75,
    weights=(0.30, 0.45, 1.0, 1.88, 1.88, 2.0),
    edge=1e-8,
    confident=True,
    floor=1e-20,
    late=1,
)
pr993 = Hashed("pr993", (*PRIMES[:5], 196613, 262147), centres=(4.0,), wraps=True)
pr808 = Hashed(
    "pr808", (*PRIMES[:5], 175447, 209591), centres=(4.0,), prefill=True, off_by_one=True
)


# -----------------------------------------------------------------------------
# Exact counts: #1026


def pr1026(
    tokens: np.ndarray,
    scores: Scores,
    vocab_size: int,
    cfg: Config,
    device: Any = "cpu",
) -> tuple[np.ndarray, np.ndarray]:
    """#1026's scorer: as Hashed's, but exact, updated after each target, from the longest context
    seen at all. Alpha comes from the target's own loss, and only a target that was seen is mixed.

    So the mass hangs on p_model of every token, which a run folder does not hold. It is given for a
    model that spreads itself evenly over exp(H) tokens, H its entropy there, and over all that were
    seen in this context: exact where p_model is uniform, elsewhere an estimate.
    """
    tokens, match = np.asarray(tokens), np.zeros((3, len(tokens)), np.int32)
    least, probes = replace(cfg, ngram_min_count=1), probed(len(tokens))
    kinds = np.zeros(PROBES)
    for first, last in itertools.pairwise(shares(len(tokens), cfg.ngram_caches)):
        start = max(0, first - cfg.ngram_max_order + 1)
        part = tokens[start:last]
        counts = ngram_counts(part, vocab_size, cfg.ngram_max_order, device)
        counts = share_counts(counts, part, first - start, start)
        match[:, first:last] = backoff_match(counts, least)[:, first - start :]
        for i in np.flatnonzero((first <= probes) & (probes < last) & (match[0, probes] > 0)):
            order = match[0, probes[i]]
            seen = same_context(tokens, probes[i], order, max(first, order), probes[i])
            kinds[i] = len(np.unique(tokens[seen]))
    _, n, c = match[:, 1:]
    alpha, p_ngram = nll_alpha(-scores.log_prob), c / np.maximum(n, 1)
    p = np.maximum((1 - alpha) * np.exp(scores.log_prob) + alpha * p_ngram, 1e-30)
    entropy = scores.entropy[probes - 1]
    mass = 1 + nll_alpha(entropy) * (1 - np.minimum(kinds * np.exp(-entropy), 1))
    return np.where(c > 0, np.log(p), scores.log_prob), np.where(kinds > 0, mass, 1.0)


def nll_alpha(nll: np.ndarray) -> np.ndarray:
    return 0.50 * np.clip(nll / 2.5, 0.1, 2.0)


def share_counts(
    counts: Iterator, tokens: np.ndarray, first: int, start: int
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """(order, n, c) of ngram_counts over a share that begins at `first` and the context before it,
    without n-grams that end in that context or begin the text; `start` tokens precede `tokens`."""
    for order, n, c, *_ in itertools.islice(counts, 1, None):
        for t in range(order - 1, min(max(first, order - start), len(tokens))):
            again = same_context(tokens, t, order, t + 1, len(tokens))
            n[again] -= 1
            c[again[tokens[again] == tokens[t]]] -= 1
        yield order, n, c


def same_context(tokens: np.ndarray, t: int, order: int, begin: int, end: int) -> np.ndarray:
    """Positions begin..end - 1 with the order - 1 tokens before them that t has; order >= 2."""
    places = begin + np.flatnonzero(tokens[begin - 1 : end - 1] == tokens[t - 1])
    for k in range(2, order):
        places = places[tokens[places - k] == tokens[t - k]]
    return places


# -----------------------------------------------------------------------------
# Command line

SCHEMES = {scheme.name: scheme for scheme in (pr864, pr810, pr993, pr808)} | {"pr1026": pr1026}


def find_scheme(name: str, aligned: bool, prefill: bool) -> tuple[str, Any]:
    """-> its name with the switches used, the scorer."""
    scheme = SCHEMES[name]
    if name != "pr808" and (aligned or not prefill):
        switch = "--aligned" if aligned else "--no-prefill"
        raise UserError(f"{switch} is a switch of #808's; fix: --scheme pr808, not {name}")
    if aligned:
        name, scheme = name + "-aligned", replace(scheme, off_by_one=False)
    if not prefill:
        name, scheme = name + "-noprefill", replace(scheme, prefill=False)
    return name, scheme


def score_folder(
    folder: Path, scheme: str, weights: str, *, aligned: bool = False, prefill: bool = True
) -> dict[str, float | str]:
    """The fields of a final_ngram_pseudo line; UserError where the folder lacks something."""
    name, scorer = find_scheme(scheme, aligned, prefill)
    path = folder / ("scores.npz" if weights == "artifact" else "scores_ema.npz")
    if not path.is_file():  # a FIFO has no end
        raise UserError(f"{path}: missing; fix: run with SAVE_SCORES=1 and NGRAM_SCHEME={scheme}")
    cfg = Config.from_env(read_pairs(folder / "config.env") | {"RECORD": "tiny"})
    if cfg.ngram_buckets & cfg.ngram_buckets - 1:
        raise UserError(f"NGRAM_BUCKETS={cfg.ngram_buckets}: must be a power of 2, as 4194304")
    columns = read_columns(read_regular(path, MOST_SCORES_BYTES))
    tokens = np.concatenate([[BOS], columns["token"]])
    pe_delta = columns["pe_delta"] if "pe_delta" in columns else None
    scores = Scores(columns["logp_model"], columns["entropy"], pe_delta=pe_delta)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    log_prob, mass = scorer(tokens, scores, cfg.vocab_size, cfg, device)
    text = RunFolder(folder).last("val_text") if (folder / "metrics.jsonl").exists() else {}
    lossy = "spelt_bytes" in text  # then the divisor is not what the tokens spell
    sizes = np.array(text["bytes"]) if lossy else columns["bytes"]
    fields = {"pseudo_bpb": bits_per_byte(log_prob, sizes), "scheme": name}
    fields |= {f"mass_{f.__name__}": float(f(mass)) for f in (np.mean, np.min, np.max)}
    return fields | {"weights": weights}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "\n").split("\n")[0])
    parser.add_argument("folder", type=Path, help="run folder")
    parser.add_argument("--scheme", choices=SCHEMES, default="pr864")
    parser.add_argument("--weights", choices=("artifact", "ema"), default="artifact")
    parser.add_argument("--aligned", action="store_true", help="pr808 without its off-by-one")
    parser.add_argument(
        "--no-prefill", action="store_true", help="pr808 with caches empty at first"
    )
    parser.add_argument("--json", action="store_true", help="print the fields as JSON")
    args = parser.parse_args()
    switches = dict(aligned=args.aligned, prefill=not args.no_prefill)
    try:
        with blame(args.folder):
            fields = score_folder(args.folder, args.scheme, args.weights, **switches)
    except (UserError, OSError) as error:
        endings.say(f"error: {printable(str(error))}", sys.stderr)
        return 2
    line = " ".join(f"{name}:{value}" for name, value in fields.items())
    endings.say(json.dumps(fields) if args.json else f"final_ngram_pseudo {line}")
    return 0


if __name__ == "__main__":
    sys.exit(endings.run(main, "nothing was written"))
