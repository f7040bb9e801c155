"""Speed and memory of exact n-gram counts, and of the mixture, at FineWeb's validation size.

    python tests/stress/bench_ngram.py --tokens 62000000 [--vocab 1024] [--blend] [--out bench.json]

Stream: the embedded text's tokens (data/sample/prepare.py) tiled, 15 % replaced at random, seed 0.
Prints a table: counts of orders 1 to 9 (2 to 9 start from 1) with all four statistics; #864's
hashed tables in vectorised NumPy, in the same process, extrapolated from a prefix; V = 8,192
against V = 1,024. --blend adds the counts that a run keeps and the mixture over them.
"""

import argparse
import json
import math
import os
import platform
import re
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from helpers import train_gpt  # noqa: E402  (it puts the others' folders on the path)

# isort: split
from as_written import PRIMES  # noqa: E402

from prepare import sample_documents  # noqa: E402
from prepare_text import write_dataset  # noqa: E402

BUCKETS, CHUNK, PREFIX = 1 << 22, 65_536, 2_000_000
OTHER_VOCAB = {1024: 8192}  # the second size to time; of any other, 1,024


class Table:
    """Rows of figures, printed as they come."""

    def __init__(self):
        self.rows = []
        print("| what | seconds | peak GB | remark |\n|---|---|---|---|")

    def add(self, what, seconds, peak_gb=None, remark=""):
        self.rows.append(dict(what=what, seconds=seconds, peak_gb=peak_gb, remark=remark))
        memory = "" if peak_gb is None else f"{peak_gb:.2f}"
        print(f"| {what} | {seconds:.1f} | {memory} | {remark} |", flush=True)


def reset_peak():
    """Linux: the peak of resident memory starts anew."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_gb():
    kib = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]
    return int(kib) * 1024 / 1e9


def sample_tokens(vocab_size):
    """Of the embedded text's training side, uint16; tokenised where it is not yet."""
    folder = train_gpt.SAMPLE_DATA
    if vocab_size != 1024:
        folder = folder.with_name(f"{folder.name}_{vocab_size}")
    if not (folder / "tokenizer.model").exists():
        write_dataset(*sample_documents(), folder, folder.name, vocab_size)
    return train_gpt.read_shard(train_gpt.find_shards(folder, "train")[0], vocab_size)


def benchmark_stream(size, vocab_size):
    rng = np.random.default_rng(0)
    tokens = np.resize(sample_tokens(vocab_size), size)
    replaced = rng.random(size, np.float32) < 0.15
    tokens[replaced] = rng.integers(0, vocab_size, replaced.sum(), np.uint16)
    return tokens


def timed_counts(tokens, vocab_size):
    """-> seconds, peak GB; every order's statistics are made and dropped."""
    reset_peak()
    began = time.perf_counter()
    for _, *columns in train_gpt.ngram_counts(tokens, vocab_size, 9):
        del columns
    return time.perf_counter() - began, peak_gb()


def numpy_keys(tokens, order):
    """as_written.hashed_keys, in NumPy."""
    size, context = len(tokens) - order + 1, 0
    for k in range(order - 1):
        context = context ^ tokens[k : k + size] * PRIMES[k]
    return context & BUCKETS - 1, (context ^ tokens[order - 1 :] * PRIMES[order - 1]) & BUCKETS - 1


def add_bincount(table, key):
    table += np.bincount(key, minlength=BUCKETS).astype(table.dtype)


def add_at(table, key):
    np.add.at(table, key, 1)


def hashed_numpy(tokens, update, dtype):
    """Seconds of #864's counting, orders 9 to 2: per chunk all lookups, then all updates."""
    tokens, tables = tokens.astype(np.int64), np.zeros((8, 2, BUCKETS), dtype)
    began = time.perf_counter()
    for first in range(1, len(tokens), CHUNK):
        last = min(first + CHUNK, len(tokens))
        p, matched = np.zeros(last - first), np.zeros(last - first, np.int8)
        for order in range(9, 1, -1):
            a, pair = max(first, order - 1), tables[order - 2]
            keys = numpy_keys(tokens[a - order + 1 : last], order)
            n, c = (table[key] for table, key in zip(pair, keys, strict=True))
            usable = (n >= 2) & (matched[a - first :] == 0)
            p[a - first :][usable] = (np.minimum(n, c) / np.maximum(n, 1))[usable]
            matched[a - first :][usable] = order
            for table, key in zip(pair, keys, strict=True):
                update(table, key)
    return time.perf_counter() - began


HASHED = {
    "int32, np.bincount over all buckets a chunk (as #864)": (add_bincount, np.int32),
    "int32, np.add.at": (add_at, np.int32),
    "int64, np.add.at": (add_at, np.int64),
}


def bench_counts(table, size, vocab_size):
    """Exact counts, then the hashed tables on a prefix of the same stream."""
    tokens, name = benchmark_stream(size, vocab_size), f"exact counts, V = {vocab_size:,}"
    began = time.perf_counter()
    timed_counts(tokens[:1000], vocab_size)
    compiling = time.perf_counter() - began
    seconds, memory = timed_counts(tokens, vocab_size)
    remark = f"orders 1 to 9, four statistics; {compiling:.1f} s of compiling included"
    table.add(name, compiling + seconds, memory, remark)
    prefix = tokens[:PREFIX]
    for variant, how in HASHED.items():
        reset_peak()
        hashed, peak = hashed_numpy(prefix, *how) * len(tokens) / len(prefix), peak_gb()
        remark = f"{hashed / (compiling + seconds):.1f} times the exact counts"
        remark += f"; extrapolated from {len(prefix):,} tokens"
        table.add(f"hashed tables, NumPy, {variant}", hashed, peak, remark)
    other = OTHER_VOCAB.get(vocab_size, 1024)
    again, memory = timed_counts(benchmark_stream(size, other), other)
    remark = f"{again / seconds:.2f} times V = {vocab_size:,}, both without compiling"
    table.add(f"exact counts, V = {other:,}", again, memory, remark)


def bench_blend(table, size, vocab_size):
    """All counts that a run keeps, then the mixture over a model of varying entropy."""
    tokens, rng = benchmark_stream(size, vocab_size), np.random.default_rng(1)
    entropy = rng.gamma(4.0, 0.7, size - 1)
    scores, cfg = train_gpt.Scores(-entropy, entropy), train_gpt.Config(vocab_size=vocab_size)
    cfg = replace(cfg, device="cpu")
    rt = train_gpt.Runtime(cfg)
    mixers = {name: train_gpt.make_mixer(name, cfg, rt) for name in ("cascade", "blend")}
    store = train_gpt.CountStore(mixers["blend"].orders)
    reset_peak()
    began = time.perf_counter()
    store.collect(train_gpt.count_ngrams(tokens, vocab_size, max(store.orders)))
    seconds = time.perf_counter() - began
    table.add("counts to order 24, twelve orders kept", seconds, peak_gb())
    bits = dict(model=float(entropy.mean()) / math.log(2))
    for name, mixer in mixers.items():
        reset_peak()
        began = time.perf_counter()
        final = train_gpt.mix(mixer, store, scores, None)
        spent, memory = time.perf_counter() - began, peak_gb()
        bits[name] = float(-final.mean()) / math.log(2)
        remark = "bits a token: " + ", ".join(f"{who} {value:.4f}" for who, value in bits.items())
        table.add(name, spent, memory, remark)
    table.add("full blend: counts and blend", seconds + spent)


def machine():
    found = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    return dict(
        processor=found[1] if found else platform.machine(),
        cores=len(os.sched_getaffinity(0)),
        load_before=os.getloadavg()[0],
        python=platform.python_version(),
        numpy=np.__version__,
        torch=torch.__version__,
        numba=train_gpt.package("numba").__version__,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=62_000_000)
    parser.add_argument("--vocab", type=int, default=1024)
    parser.add_argument("--blend", action="store_true")
    parser.add_argument("--out", type=Path, help="JSON file for the same figures")
    args = parser.parse_args()
    torch.set_num_threads(1)
    where = machine()  # with its load before we add to it
    for vocab_size in {args.vocab, OTHER_VOCAB.get(args.vocab, 1024)}:
        sample_tokens(vocab_size)
    table = Table()
    bench_counts(table, args.tokens, args.vocab)
    if args.blend:
        bench_blend(table, args.tokens, args.vocab)
    print("\n" + ", ".join(f"{name} {value}" for name, value in where.items()))
    if args.out:
        results = dict(tokens=args.tokens, machine=where, rows=table.rows)
        args.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
