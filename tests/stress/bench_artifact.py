"""Full-size artifacts: bytes, seconds, and how many parameters fit under the cap.

    pip install brotli
    python tests/stress/bench_artifact.py [--vocab 1024,8192] [--mlp 3,4,5] [--out FILE.json]

Weights of RECORD=own with other vocabularies and MLP_MULTs, drawn with the spread that #993's log
implies (its share of +-1): Gaussian, 0.16 in matrices, 0.1 in embeddings, 0.3 elsewhere. Packed as
the first round did (a clip quantile a row with the floor, zstd-22), and by deviations and range
coder; then with TARGET_BYTES. The second table has the coders alone on the integers of RECORD=own's
model and the first vocabulary.
"""

import argparse
import itertools
import json
import lzma
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from helpers import (
    pack_artifact,
    train_gpt,  # noqa: E402
)

SPREAD = {"muon": 0.16, "embed": 0.1}
BEFORE = dict(quant="lite", clip_sigmas=0.0, embed_clip_sigmas=0.0, target_bytes=0)
BEFORE |= dict(compressor="zstd", control_coding="fp16", quant_floor=True)
NOW = dict(quant="lite", target_bytes=0)


def configuration(vocab_size, **changes):
    environ = dict(RECORD="own", DEVICE="cpu", VOCAB_SIZE=str(vocab_size))
    return replace(train_gpt.Config.from_env(environ), **changes)


def drawn(cfg):
    torch.manual_seed(0)
    return {
        name: torch.randn(spec.shape) * SPREAD.get(spec.group, 0.3)
        for name, spec in train_gpt.parameter_specs(cfg).items()
    }


def timed(run, *arguments):
    began = time.perf_counter()
    return run(*arguments), time.perf_counter() - began


def model(vocab_size, multiple):
    """A row of the table of models."""
    cfg = configuration(vocab_size, mlp_mult=multiple)
    weights = drawn(cfg)
    row = dict(vocab_size=vocab_size, mlp_mult=multiple)
    row["parameters"] = train_gpt.count_parameters(cfg)
    row["script"] = len(train_gpt.pack_script(train_gpt.SCRIPT))
    for name, changes in dict(before=BEFORE, now=NOW).items():
        packed, seconds = timed(pack_artifact, weights, replace(cfg, **changes))
        row |= {name: len(packed), f"{name}_seconds": seconds}
    fit = replace(cfg, quant="lite")
    made, seconds = timed(train_gpt.make_artifact, weights, fit, train_gpt.Runtime(fit), {})
    clip = made.widening * fit.clip_sigmas
    found = dict(target=made.size, target_seconds=seconds, clip_sigmas=clip)
    return row | found | dict(left=made.room - made.size, tries=made.tries)


def coders(cfg):
    """name -> bytes, seconds to code and to decode, of all integers of a model."""
    specs = {
        name: spec
        for name, spec in train_gpt.parameter_specs(cfg).items()
        if spec.coding not in train_gpt.FLOATS
    }
    whole, _ = train_gpt.quantise(drawn(cfg), cfg)
    payload = np.zeros((), train_gpt.payload_type(specs))
    entropy = 0.0
    for name in specs:
        integers = whole[name]["integers"]
        payload[name]["integers"][...] = integers
        counts = np.bincount(integers.ravel().astype(int) + 128)
        counts = counts[counts > 0]
        entropy -= (counts * np.log2(counts / counts.sum())).sum() / 8
    content = b"".join(payload[name]["integers"].tobytes() for name in specs)
    zstandard = train_gpt.package("zstandard")
    ways = {
        "range": (
            lambda: train_gpt.range_encode(payload, specs),
            lambda packed: train_gpt.range_decode(packed, specs),
        ),
        "zstd-22": (lambda: zstandard.compress(content, 22), zstandard.decompress),
        "lzma-9e": (
            lambda: lzma.compress(content, preset=9 | lzma.PRESET_EXTREME),
            lzma.decompress,
        ),
    }
    if train_gpt.has_package("brotli"):
        brotli = train_gpt.package("brotli")
        ways["brotli-11"] = (lambda: brotli.compress(content, quality=11), brotli.decompress)
    found = {"order-0 entropy": (entropy, 0.0, 0.0)}
    for name, (code, decode) in ways.items():
        packed, there = timed(code)
        _, back = timed(decode, packed)
        found[name] = len(packed), there, back
    return len(content), found


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--vocab", default="1024,8192", help="vocabularies, comma between them")
    parser.add_argument("--mlp", default="3,4,5", help="MLP_MULTs, comma between them")
    parser.add_argument("--out", type=Path, help="JSON file")
    args = parser.parse_args()
    sizes = [int(text) for text in args.vocab.split(",")]
    rows = [model(size, float(text)) for size in sizes for text in args.mlp.split(",")]
    cap = train_gpt.CAP_BYTES
    print(f"packed script: {rows[0]['script']:,} bytes; cap {cap:,}\n")
    heads = "vocabulary", "MLP_MULT", "parameters", "first round, bytes", "now, bytes", "s"
    print(f"| {' | '.join(heads)} | with `TARGET_BYTES`, bytes | s | clip |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        cells = [row["vocab_size"], row["mlp_mult"], row["parameters"], row["before"], row["now"]]
        cells += [round(row["now_seconds"]), row["target"], round(row["target_seconds"])]
        shown = [f"{cell:,}" for cell in cells]
        print(f"| {' | '.join(shown)} | {row['clip_sigmas']:.2f} |")
    for size, name in itertools.product(sizes, ("before", "now") if "," in args.mlp else ()):
        alike = [row for row in rows if row["vocab_size"] == size]
        totals = [row[name] + row["script"] for row in alike]
        each = np.polyfit([row["parameters"] for row in alike], totals, 1)
        found = f"{8 * each[0]:.3f} bits a parameter, {(cap - each[1]) / each[0]:,.0f} fit"
        print(f"\nvocabulary {size:,}, {name}: {found}")
    count, found = coders(configuration(sizes[0], **NOW))
    print(f"\n| {count:,} integers | bytes | over the entropy | code, s | decode, s |")
    print("|---|---|---|---|---|")
    entropy = found["order-0 entropy"][0]
    for name, (size, there, back) in found.items():
        print(
            f"| {name} | {size:,.0f} | {100 * (size / entropy - 1):+.2f} % "
            f"| {there:.1f} | {back:.1f} |"
        )
    if args.out:
        found = dict(models=rows, integers=count, coders=found)
        args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
