"""Bits per byte against bytes: one checkpoint's averaged weights, quantised in many ways.

    python tests/stress/sizes.py --checkpoints runs/*/checkpoint/step_00000800.json
        [--out FILE.json] [--picture FILE.png] [--grids 6:6.2:9.7,8:12.85:5]

Of each checkpoint the weights are rounded and packed by each way, grid and clip, and the artifact
that comes of it scores the validation text by the model alone, in windows without overlap. Prints
the mean over checkpoints: bytes of artifact.bin, bits per byte, its excess over the unrounded
weights; and for each way the least bits per byte for a number of bytes, by linear interpolation.
"""

import argparse
import functools
import itertools
import json
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from helpers import train_gpt  # noqa: E402

BITS = (4, 5, 6, 8)
STEPS = (0.05, 0.1, 0.14, 0.2, 0.3, 0.414, 0.55, 0.75, 1.0)  # of the grid, in standard deviations
WAYS = {  # name -> settings
    "lite, zstd": dict(quant="lite", compressor="zstd", control_coding="fp16"),
    "lite, range": dict(quant="lite", compressor="range"),
    "deviations, range": dict(quant="lite", compressor="range"),
    "deviations, GPTQ, range": dict(quant="gptq", compressor="range"),
}
SIZES = (300_000, 350_000, 400_000, 450_000, 500_000, 550_000, 600_000, 700_000)  # compared


def variants(grids):
    """(way, settings) of every point; grids: BITS:CLIP:EMBED, those of GPTQ instead."""
    for text in grids:
        bits, clip, embed = text.split(":")
        sigmas = dict(clip_sigmas=float(clip), embed_clip_sigmas=float(embed))
        way = "deviations, GPTQ, range"
        yield way, WAYS[way] | dict(matrix_coding=f"int{bits}") | sigmas
    for way, settings in () if grids else WAYS.items():
        for bits in BITS:
            grid = settings | dict(matrix_coding=f"int{bits}")
            if way.startswith("lite"):
                yield way, grid | dict(clip_sigmas=0.0, embed_clip_sigmas=0.0)
                continue
            for step in STEPS:
                largest = 2 ** (bits - 1) - 1
                clip = step * largest
                if clip >= 2.5:  # a grid that ends earlier is no candidate
                    embed = 20.0 * step / 0.414
                    yield way, grid | dict(clip_sigmas=clip, embed_clip_sigmas=embed)


def averaged_weights(path):
    """A checkpoint's configuration and what its run would have exported."""
    state, tensors = train_gpt.read_checkpoint(path)
    names = train_gpt.stored_names("checkpoint")
    values = {name: state.settings[name.upper()] for name in names}
    cfg = train_gpt.Config(**train_gpt.stored_values(values, names))
    model = train_gpt.GPT(cfg)
    averages = train_gpt.Averages(model, cfg)
    averages.resume(state.snapshots)
    for name in ("weights", "ema", "swa"):
        kind = name.removesuffix("s")
        for i, tensor in enumerate(getattr(averages, name)):
            tensor.data.copy_(tensors[f"{kind}.{i}"])
    return cfg, averages.final(), state.settings


def measure(path, grids=()):
    """-> of each variant a row."""
    torch.set_num_threads(1)
    cfg, weights, settings = averaged_weights(path)
    cfg = replace(cfg, target_bytes=0, device="cpu", eval_stride=cfg.train_seq_len)
    rt = train_gpt.Runtime(cfg)
    data = train_gpt.SAMPLE_DATA
    (shard,) = train_gpt.find_shards(str(data), "val")
    stream = np.array(train_gpt.read_shard(shard, cfg.vocab_size))
    tokens = train_gpt.token_bytes(str(data / "tokenizer.model"), cfg.vocab_size)
    text_bytes = tokens.count(stream[1:], stream[:-1]).sum()

    def bits_per_byte(model):
        log_prob = train_gpt.WindowScorer(model, rt, cfg).score(stream, cfg.window).log_prob
        return -log_prob.sum() / np.log(2) / text_bytes

    model = train_gpt.GPT(cfg)
    model.load_state_dict(weights)
    model.eval().requires_grad_(False)
    exact = bits_per_byte(model)
    rows = train_gpt.calibration_rows(cfg, rt, train_gpt.find_shards(str(data), "train"))
    hessians = train_gpt.collect_hessians(model, rt, cfg, rows)
    found = []
    for way, changes in variants(grids):
        changed = replace(cfg, **dict(control_coding="int8") | changes)
        known = hessians if changed.quant == "gptq" else {}
        payload, _ = train_gpt.quantise(weights, changed, known)
        packed, _ = train_gpt.pack_payload(payload, changed)
        score = bits_per_byte(train_gpt.load_artifact("artifact.bin", content=packed))
        point = dict(checkpoint=str(path), way=way, bits=changed.matrix_coding)
        point |= dict(clip_sigmas=round(changed.clip_sigmas, 2), bytes=len(packed))
        point |= dict(embed_clip_sigmas=round(changed.embed_clip_sigmas, 2))
        found.append(point | dict(val_bpb=score, exact=exact))
        print(point, f"{score:.4f} {score - exact:+.4f}", file=sys.stderr, flush=True)
    return found


def means(rows):
    """way -> [(bytes, bpb, bits, clips)] over checkpoints, by bytes."""
    table = {}
    clips = ("clip_sigmas", "embed_clip_sigmas")
    key = lambda row: (row["way"], row["bits"], *(row[name] for name in clips))  # noqa: E731
    for (way, bits, *sigmas), group in itertools.groupby(sorted(rows, key=key), key):
        group = list(group)
        size, score = (np.mean([row[name] for row in group]) for name in ("bytes", "val_bpb"))
        shown = "{:g}, {:g}".format(*sigmas) if any(sigmas) else "quantile"
        table.setdefault(way, []).append((size, score, bits, shown))
    return {way: sorted(table[way]) for way in WAYS if way in table}


def frontier(points):
    """Those that no other one beats in both."""
    kept = []
    for point in points:
        if not kept or point[1] < kept[-1][1]:
            kept.append(point)
    return kept


def show(rows, grids):
    exact = np.mean([row["exact"] for row in rows])
    print(f"Unrounded: {exact:.4f} bits per byte.\n")
    heads = ("way", "grid", "deviations, embeddings'", "bytes", "bpb", "over unrounded")
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    table = means(rows)
    for way, points in table.items():
        for size, score, bits, clips in points if grids else frontier(points):
            row = (way, bits, clips, f"{size:,.0f}", f"{score:.4f}")
            print(f"| {' | '.join(row)} | {score - exact:+.4f} |")
    if grids:
        return
    print(f"\n| bytes | {' | '.join(WAYS)} |\n|{'---|' * (1 + len(WAYS))}")
    for size in SIZES:
        cells = [least(frontier(points), size) for points in table.values()]
        print(f"| {size:,} | {' | '.join(cells)} |")


def least(points, size):
    """Bits per byte at a size, between two points of a frontier; nothing outside of it."""
    sizes, scores = (np.array(column) for column in list(zip(*points, strict=True))[:2])
    if not sizes[0] <= size <= sizes[-1]:
        return "-"
    return f"{np.interp(size, sizes, scores):.4f}"


def picture(rows, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5))
    exact = np.mean([row["exact"] for row in rows])
    for way, points in means(rows).items():
        sizes, scores = zip(*(point[:2] for point in frontier(points)), strict=True)
        axes.plot(np.array(sizes) / 1e3, np.array(scores) - exact, marker="o", label=way)
    axes.set(xlabel="artifact.bin, KB", ylabel="bits per byte over the unrounded weights'")
    axes.set_yscale("log")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120, bbox_inches="tight")


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--checkpoints", type=Path, nargs="+", required=True, help=".json files")
    parser.add_argument("--grids", default="", help="BITS:CLIP:EMBED,..., these alone, by GPTQ")
    parser.add_argument("--out", type=Path, help="JSON file of all points")
    parser.add_argument("--picture", type=Path, help="PNG file")
    args = parser.parse_args()
    grids = [*filter(None, args.grids.split(","))]
    with ProcessPoolExecutor(2) as pool:
        found = pool.map(functools.partial(measure, grids=grids), args.checkpoints)
        rows = [row for rows in found for row in rows]
    show(rows, grids)
    if args.out:
        args.out.write_text(json.dumps(rows, indent=0) + "\n", encoding="utf-8")
    if args.picture:
        picture(rows, args.picture)


if __name__ == "__main__":
    main()
