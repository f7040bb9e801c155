"""Speed and memory of the codec without its network, to the size of FineWeb's validation text.

    python tests/stress/bench_codec.py --tokens 20000000 [--vocab 1024] [--lanes 1024] [--out FILE]

A text is coded and decoded from end to end by train_gpt's own encoder and decoder, on one core. The
network is replaced by a table: log-probabilities of the next token by the last one, counted in the
embedded text, so that gate, counts, exp, integers and range coder have the work of a real run.
Stream: the embedded text's tokens tiled, 15 % replaced at random (bench_ngram.py), in documents of
1,240 tokens. Prints tokens per second and bytes per token as the text grows, that the text came
back, and what FineWeb's 62,021,632 tokens would take at the last rate. --profile prints where the
encoder's time goes instead.
"""

import argparse
import cProfile
import json
import pstats
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
from bench_ngram import benchmark_stream, machine, sample_tokens  # noqa: E402
from helpers import train_gpt  # noqa: E402

FINEWEB = 62_021_632
DOCUMENT = 1240  # tokens, FineWeb's mean
SHOWN = 10  # lines while it goes


class StandIn:
    """A network's place: what follows a token in the embedded text, and never nothing."""

    def __init__(self, vocab_size):
        tokens = sample_tokens(vocab_size).astype(np.int64)
        counts = np.full((vocab_size, vocab_size), 0.02)
        np.add.at(counts, (tokens[:-1], tokens[1:]), 1)
        log_probs = np.log(counts / counts.sum(1, keepdims=True))
        self.log_probs = torch.from_numpy(log_probs)
        self.entropy = -(self.log_probs.exp() * self.log_probs).sum(1)
        self.output = torch.empty(0, vocab_size, dtype=torch.float64)

    def __call__(self, ids, places):
        if len(ids) != len(self.output):  # once: a network keeps its memory, too
            self.output = self.output.new_empty(len(ids), self.output.shape[1])
        torch.index_select(self.log_probs, 0, ids, out=self.output)
        return self.output, self.entropy[ids]


def documents(size, vocab_size):
    """uint16, each from a BOS on."""
    stream = benchmark_stream(size + 1, vocab_size)
    stream[stream == train_gpt.BOS] = 5
    stream[::DOCUMENT] = train_gpt.BOS
    return stream


def resident_bytes():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


class Watch(train_gpt.Runtime):
    """Prints how fast it goes."""

    def begin(self, what):
        self.what, self.last = what, (time.perf_counter(), time.process_time(), 0)
        self.held, self.rows = resident_bytes(), []

    def tick(self, _, done, total):
        if done * SHOWN // total == self.last[2] * SHOWN // total and done < total:
            return
        now = time.perf_counter(), time.process_time(), done
        wall, busy, more = (new - old for new, old in zip(now, self.last, strict=True))
        held = (resident_bytes() - self.held) / done
        row = dict(what=self.what, tokens=done, rate=more / wall, of_cpu=more / busy)
        self.rows.append(row | dict(bytes_a_token=held))
        rates = f"{more / wall:,.0f} | {more / busy:,.0f}"
        print(f"| {self.what} | {done:,} | {rates} | {held:.0f} |", flush=True)
        self.last = now


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=20_000_000)
    parser.add_argument("--vocab", type=int, default=1024)
    parser.add_argument("--lanes", type=int, default=1024)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--out", type=Path, help="JSON file for the same figures")
    args = parser.parse_args()
    torch.set_num_threads(1)
    where = machine()
    network = StandIn(args.vocab)
    train_gpt.LaneCache = lambda *_: None
    train_gpt.lane_pass = lambda *_: network
    train_gpt.require_lanes = lambda *_: None
    cfg = train_gpt.Config(device="cpu", vocab_size=args.vocab)
    cfg = replace(cfg, eval_lanes=args.lanes, lane_ttt=False)
    rt = Watch(cfg)
    stream = documents(args.tokens, args.vocab)
    plan = train_gpt.CodingPlan.of(stream, cfg, 1)
    small = plan._replace(targets=3 * plan.lanes)  # kernels are compiled
    rt.begin("")
    rt.tick = lambda *_: None
    some = (
        train_gpt.run_codec(
            None, rt, cfg, small, lambda _, step: reader(None, step), expected=plan.targets
        )
        if (reader := train_gpt.tokens_of_text(stream, plan))
        else None
    )
    del rt.tick, some
    if args.profile:
        profile = cProfile.Profile()
        rt.tick = lambda *_: None
        profile.runcall(train_gpt.encode, None, rt, cfg, stream, plan)
        return pstats.Stats(profile).sort_stats("tottime").print_stats(25)
    print("| what | tokens | tokens/s since the line before | of CPU time | bytes a token |")
    print("|---|---|---|---|---|")
    rt.begin("encoded")
    body, coded = train_gpt.encode(None, rt, cfg, stream, plan)
    rows = rt.rows
    rt.begin("decoded")
    decoded = train_gpt.decode(None, rt, cfg, body, plan)
    rows += rt.rows
    same = bool(np.array_equal(decoded.text, stream))
    bits = 8 * len(body) / len(stream)
    print(f"\n{len(body):,} bytes, {bits:.3f} bits a token; the text came back: {same}")
    seconds = [FINEWEB / row["of_cpu"] for row in (rows[SHOWN - 1], rows[-1])]
    memory = max(row["bytes_a_token"] for row in rows[SHOWN // 2 :]) * FINEWEB / 1e9
    print(f"{FINEWEB:,} tokens at the last rates: {seconds[0] / 60:.0f} + {seconds[1] / 60:.0f}")
    print(f"minutes of a core and {memory:.1f} GB, the network aside")
    print(", ".join(f"{name} {value}" for name, value in where.items()))
    if args.out:
        found = dict(tokens=args.tokens, vocab=args.vocab, lanes=args.lanes, same=same)
        found |= dict(machine=where, rows=rows, bytes=len(body))
        args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return None if same else sys.exit(1)


if __name__ == "__main__":
    main()
