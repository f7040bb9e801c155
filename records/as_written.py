"""Published n-gram scorers exactly as written, on the scores of a finished or running run folder.

    python records/as_written.py runs/tiny_seed1337 --scheme pr864

What they print is not a code length: the probabilities of all tokens add up to far more than 1.
So it is called pseudo_bpb and stands beside its mass, the sum over the whole vocabulary at sampled
positions (mean, least, largest; 1 for a distribution). train_gpt.py calls this where NGRAM_SCHEME
asks for it. Needs scores.npz (SAVE_SCORES=1), or scores_ema.npz with --weights ema.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from train_gpt import (  # noqa: E402
    Config,
    Scores,
    UserError,
    backoff_alpha,
    backoff_log_prob,
    backoff_match,
    bits_per_byte,
)

BOS = 1
PROBES = 64  # positions at which the mass is measured
FLOOR = 1e-10  # of p_model and of the mixture, PR #864
PRIMES = (36313, 27191, 51647, 81929, 131071, 174763, 233017, 283721, 347237, 409891, 479909,
          557927, 631553, 716279, 811207)  # fmt: skip


def hashed_keys(tokens: Tensor, order: int, buckets: int) -> Tensor:
    """#864's buckets of context, and of context and target, at positions order - 1..N - 1.

    tokens int64 (N,) -> int64 (2, N - order + 1). The first prime goes to the oldest token.
    """
    size, context = max(0, len(tokens) - order + 1), torch.zeros_like(tokens[order - 1 :])
    for k in range(order - 1):
        context = context ^ tokens[k : k + size] * PRIMES[k % len(PRIMES)]
    target = tokens[order - 1 :] * PRIMES[(order - 1) % len(PRIMES)]
    return torch.stack([context, context ^ target]) & buckets - 1


def hashed_counts(
    tokens: np.ndarray,
    vocab_size: int,
    cfg: Config,
    *,
    probes: np.ndarray = (),
    device: str = "cpu",
) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
    """#864's counts: no key is ever checked, lookups see earlier chunks only.

    Yields (order, n, min(n, c), ratio) from NGRAM_MIN_ORDER to NGRAM_MAX_ORDER: int32 (N,) over
    positions and, at each probed position, the sum of min(n, c) / n over the vocabulary. Tables of
    NGRAM_BUCKETS; updates every NGRAM_CHUNK_TOKENS targets; NGRAM_CACHES contiguous shares of the
    targets start with empty tables, as on so many ranks.
    """
    tokens = torch.from_numpy(np.asarray(tokens).astype(np.int64)).to(device)
    bounds = [1 + i * (len(tokens) - 1) // cfg.ngram_caches for i in range(cfg.ngram_caches + 1)]
    for order in range(cfg.ngram_min_order, cfg.ngram_max_order + 1):
        skip, ratio = order - 1, np.ones(len(probes))
        keys = hashed_keys(tokens, order, cfg.ngram_buckets)
        counts = torch.zeros((2, len(tokens)), dtype=torch.int32, device=device)
        others = torch.arange(vocab_size, device=device) * PRIMES[skip % len(PRIMES)]
        for first, last in itertools.pairwise(bounds):
            tables = torch.zeros((2, cfg.ngram_buckets), dtype=torch.int32, device=device)
            for a in range(first, last, cfg.ngram_chunk_tokens):
                b, a = min(a + cfg.ngram_chunk_tokens, last), max(a, skip)
                for i in (i for i, t in enumerate(probes) if a <= t < b):
                    key = keys[0, probes[i] - skip]
                    n = tables[0, key].clamp(min=1)
                    seen = tables[1, (key ^ others) & cfg.ngram_buckets - 1]
                    ratio[i] = torch.minimum(seen, n).sum().item() / n.item()
                key = keys[:, a - skip : max(b - skip, 0)]
                counts[:, a:b] = tables.gather(1, key)
                tables.scatter_add_(1, key, torch.ones_like(key, dtype=torch.int32))
        yield order, *torch.stack([counts[0], counts.amin(0)]).cpu().numpy(), ratio


def pr864(
    tokens: np.ndarray, scores: Scores, vocab_size: int, cfg: Config, *, device: str = "cpu"
) -> tuple[np.ndarray, np.ndarray]:
    """#864's scorer (spec 4.4.1): tokens (N + 1,), the first one no target; scores of the N
    targets -> (pseudo log p (N,) in nats, mass at PROBES positions)."""
    probes = np.linspace(1, len(tokens) - 1, PROBES).astype(int)
    ratios = {0: np.ones(PROBES)}

    def targets() -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        counts = hashed_counts(tokens, vocab_size, cfg, probes=probes, device=device)
        for order, n, c, ratio in counts:
            ratios[order] = ratio
            yield order, n[1:], c[1:]

    match = backoff_match(targets(), cfg)
    order = match[0][probes - 1]
    alpha = backoff_alpha(order, scores.entropy[probes - 1], cfg)
    mass = 1 - alpha + alpha * [ratios[k][i] for i, k in enumerate(order)]
    return backoff_log_prob(scores, match, cfg, FLOOR), mass


def score_folder(folder: Path, scheme: str, weights: str) -> dict[str, float | str]:
    """The fields of a final_ngram_pseudo line; UserError where the folder lacks something."""
    path = folder / ("scores.npz" if weights == "artifact" else "scores_ema.npz")
    if not path.exists():
        raise UserError(f"{path}: missing; fix: run with SAVE_SCORES=1 and NGRAM_SCHEME={scheme}")
    settings = (folder / "config.env").read_text(encoding="utf-8").splitlines()
    cfg = Config.from_env(dict(line.split("=", 1) for line in settings) | {"RECORD": "tiny"})
    columns = np.load(path)
    tokens = np.concatenate([[BOS], columns["token"]])
    scores = Scores(columns["logp_model"], columns["entropy"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    log_prob, mass = SCHEMES[scheme](tokens, scores, cfg.vocab_size, cfg, device=device)
    fields = {"pseudo_bpb": bits_per_byte(log_prob, columns["bytes"]), "scheme": scheme}
    fields |= {f"mass_{f.__name__}": float(f(mass)) for f in (np.mean, np.min, np.max)}
    return fields | {"weights": weights}


SCHEMES = {"pr864": pr864}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="run folder")
    parser.add_argument("--scheme", choices=SCHEMES, default="pr864")
    parser.add_argument("--weights", choices=("artifact", "ema"), default="artifact")
    parser.add_argument("--json", action="store_true", help="print the fields as JSON")
    args = parser.parse_args()
    try:
        fields = score_folder(args.folder, args.scheme, args.weights)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    line = " ".join(f"{name}:{value}" for name, value in fields.items())
    print(json.dumps(fields) if args.json else f"final_ngram_pseudo {line}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
