"""How long a step, a run and its evaluation would take on 1 to 8 H100s, before any is rented.

    python records/tools/estimate.py                          # own, on 8
    RECORD=pr993 python records/tools/estimate.py --gpus 1    # any setting, as for train_gpt.py
    python records/tools/estimate.py --table                  # own, the five and PR #549

Nothing is run and no GPU is needed: FLOPs, bytes and launches follow from the shapes, and become
seconds by the rates in the table at the top. Two things are modelled, the rest is added up.

Fusion. What torch.compile makes of a pass is its matrix products, its attentions, and chains of
everything else, each one kernel that reads its inputs and writes what a later kernel, or the
backward pass, is given. A norm may be in a chain; a sum over tokens, as of the gradient of a gain,
is a kernel of its own and reads its inputs again. What the backward pass is given is what the
partitioner of torch 2.13 keeps of this model.

Calibration. One constant, `fused`: the share of the memory's bandwidth that such chains reach. It
is what gives PR #549, with its own properties, its published 83.4 ms, and is the same for all. So
what counts is the ratio to #549, not the milliseconds.

Exit status: 0 an estimate was printed; 2 a setting is wrong.
"""

import argparse
import heapq
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from statistics import NormalDist
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
from run_folder import markdown

import endings
import train_gpt
from train_gpt import Config, UserError, parameter_specs


class Rate(NamedTuple):
    """A speed or a time, and why it is believed."""

    value: float
    unit: str
    source: str


HERE = "measured on a shared CPU core"
RATES = {
    "products": Rate(550e12, "FLOP/s", "assumed: dense bf16 at width 512, of 989e12"),
    "attention": Rate(300e12, "FLOP/s", "assumed: causal half, forward and backward"),
    "blocks": Rate(225e12, "FLOP/s", "assumed: the same by FlexAttention, inside documents"),
    "newton": Rate(200e12, "FLOP/s", "assumed: batches of two or three matrices"),
    "single": Rate(30e12, "FLOP/s", "assumed: products in fp32, of 67e12"),
    "memory": Rate(3.35e12, "bytes/s", "H100 SXM data sheet"),
    "fused": Rate(0.787, "of memory", "calibrated: PR #549 makes a step in 83.4 ms"),
    "launch": Rate(2.5e-6, "s", "assumed: a kernel's start, in a stream or a graph"),
    "nvlink": Rate(300e9, "bytes/s", "assumed: NCCL's bus bandwidth at tens of MB, 8 GPUs"),
    "collective": Rate(25e-6, "s", "assumed: latency of an NCCL collective"),
    "pageable": Rate(6e9, "bytes/s", "assumed: copy from or to memory that is not pinned"),
    "gloo": Rate(1e9, "bytes/s", "assumed: all-reduce between processes of a host"),
    "eager": Rate(6e-6, "s", "assumed: host's time for an operation that is not compiled"),
    "loop": Rate(
        0.5e-3, "s", "assumed: host's time from a step's end to the next one's first kernel"
    ),
    "tokens": Rate(3e9, "tokens/s", f"{HERE}: tokens to int64, 0.13 ms for 786,432 and a copy"),
    "window": Rate(1e-3, "s", "assumed: host's time for a pass of windows, copies apart"),
    "sort": Rate(1.5e9, "keys/s", "assumed: stable radix sort of 64-bit keys with places"),
    "collect": Rate(0.020e-6, "s", f"{HERE}: keeping an order's counts of a target"),
    "schedule": Rate(0.19e-6, "s", f"{HERE}: laying a target out in lanes, and its coding order"),
    "backoff": Rate(0.28e-6, "s", f"{HERE}: the backoff of a target, a thread"),
    "threads": Rate(12, "threads", "assumed: of a rank, 96 cores among 8"),
    "mixing": Rate(0.8e-3, "s", f"{HERE}: NumPy's part of a chunk of the blend, 4,096 targets"),
    "codec": Rate(25e-6, "s", f"{HERE}: mixing and coding a target, 1,024 lanes"),
    "start": Rate(60.0, "s", "assumed: the decoder's process, until its first step"),
    "range": Rate(1.2e7, "bytes/s", f"{HERE}: 6-bit integers"),
    "zstd": Rate(1.35e6, "bytes/s", f"{HERE}: level 22 on 6-bit integers"),
    "lzma": Rate(1.23e6, "bytes/s", f"{HERE}: 6-bit integers"),
}


def rate(name: str) -> float:
    return RATES[name].value


# FineWeb's validation side.
TARGETS = 62_021_632
DOCUMENTS = 50_000
SPREAD = 1.0  # assumed: lengths are lognormal, their logarithms spread so far
FLEX_TILE = 128  # keys, and queries
# What the script does today.
SEEN_KEYS_ONLY = True  # attention of a lane, by torch 2.13's varlen; else every slot
LEARNING = 9, 14  # times the kernels of a compiled pass, and its bytes: what learns is not
# compiled; on the emulated device
PLAIN_ATTENTION = 12  # times the scores are read or written, forward and backward
CHUNK_LAUNCHES = 309, 85  # of a chunk of the blend: eager, and where its batches are replayed
GRAPH_KERNELS = 256  # in these
OPTIMIZER_LAUNCHES = 50, 60, 20  # at least, for clipping, for each bank: on the emulated device
MATH_FALLBACK = 17  # times the bytes of keys and values: SDPA's last resort expands them in fp32
PRUNINGS = 9  # compressions of a payload that has to be pruned, at most
COLUMN_CALLS = 9  # of GPTQ for a column, on the host

PR549_MS = 83.4
# Milliseconds and MiB that their logs give, on 8xH100; not used for calibration.
PUBLISHED = {
    "pr864": (88.6, 22_669),
    "pr993": (87.1, 22_860),
    "pr808": (97.2, 25_197),
    "pr1026": (97.7, 21_874),
    "pr810": (64.7, 13_058),
}
# What a first run on GPUs replaces, by what of tests/gpu/run.sh or of a log.
REPLACED = """a first run on GPUs replaces:
  products, attention, fused, launch: the parts step:NAME of tests/gpu/run.sh, own's split
  the kernel of a lane's attention and its ms a step: its part lanes
  sort, collect, schedule, backoff, mixing, eager: its part counts
  single, range, zstd: its part warmup
  nvlink, collective, gloo, loop, threads: step_avg_ms and eval_seconds of a run on 8
  codec, start: the seconds between final_ngram_backoff_exact and final_codec
no GPU is needed for: lengths of the documents, once data/download_fineweb.py has fetched them"""


@dataclass(frozen=True)
class Script:
    """Properties of a training script, beside its model's shape."""

    stream: int = 2  # bytes of a number of the residual stream
    rotary: int = 0  # and of the rotated queries that are kept beside what attention is given
    scaled: bool = False  # outputs of attention and MLP are scaled, not the rows of their matrices
    waits: bool = False  # the host waits for each step before it prepares the next one
    pinned: bool = True  # tokens are prefetched
    all_rows: bool = False  # each rank reads the tokens of all
    each_gradient: bool = False  # an all-reduce for each small gradient
    veto_first: bool = False  # an all-reduce before all others


NOW = Script()
BEFORE = Script(  # of commit 72edfbf
    stream=4,
    rotary=4,
    scaled=True,
    waits=True,
    pinned=False,
    all_rows=True,
    veto_first=True,
)
# It waits for the flag of the clock, all-reduced after each step; its rotary table is bf16.
PR549 = Script(rotary=2, scaled=True, waits=True, pinned=False, each_gradient=True)
CURES = (  # of BEFORE, one after the other
    ("bf16 residual stream", dict(stream=2)),
    ("queries' gain before the rotation", dict(rotary=0)),
    ("scales in the rows of matrices", dict(scaled=False)),
    ("the host runs ahead, tokens prefetched", dict(waits=False, pinned=True, all_rows=False)),
    ("one all-reduce less, the long transfers first", dict(veto_first=False)),
)


# -----------------------------------------------------------------------------
# Passes


class Chain(NamedTuple):
    """Operations that are one kernel, or a few."""

    moved: float  # bytes read and written, a token
    kept: float = 0  # of them for the backward pass, those of the products before included
    kernels: int = 1


class Shape(NamedTuple):
    """Widths of a model, and its blocks as a token passes them."""

    dim: int
    keys: int
    hidden: int
    vocab: int
    calls: list[tuple[int, int]]  # place in the U-Net, layer

    @staticmethod
    def of(cfg: Config) -> "Shape":
        order = [*enumerate(train_gpt.layers_passed(cfg))]
        calls = [(at, i) for at, i in order for _ in range(1 + (i in cfg.depth_recurrence))]
        keys = cfg.model_dim // cfg.num_heads * cfg.num_kv_heads
        hidden = int(cfg.mlp_mult * cfg.model_dim)
        return Shape(cfg.model_dim, keys, hidden, cfg.vocab_size, calls)


def weights(cfg: Config) -> int:
    """Weights that a token is multiplied with."""
    return (train_gpt.token_flops(cfg) - 3 * attention_flops(cfg, cfg.train_seq_len)) // 6


def before_loops(cfg: Config) -> Config:
    """The model as training begins."""
    return replace(cfg, loop_layers="")


@cache
def row_keys(cfg: Config) -> float:
    """Keys that a position attends to, on average over a row: half the row or, inside documents,
    those before it in row and document, and half a tile of FlexAttention at each end of these."""
    length = cfg.train_seq_len
    if not cfg.doc_attention:
        return length / 2
    sizes = document_lengths() + 1
    positions = np.arange(length)
    further = [np.maximum(0, sizes - x).sum() for x in positions.tolist()]  # tokens, in documents
    return float((further / sizes.sum() * (1 - positions / length)).sum()) + FLEX_TILE


def attention_seconds(cfg: Config, tokens: float) -> float:
    """Of so many tokens in rows, forward."""
    flops = tokens * attention_flops(cfg, row_keys(cfg))
    return flops / (rate("blocks") if cfg.doc_attention else rate("attention"))


def attention_flops(cfg: Config, keys: float) -> float:
    """Of a token that sees so many keys, forward; backward are twice as many."""
    return 4 * len(Shape.of(cfg).calls) * cfg.model_dim * keys


def products(cfg: Config) -> int:
    """Matrix products of a forward pass; the backward pass has two for each."""
    sizes = parameter_specs(cfg)
    once = sum(name in sizes for name in train_gpt.ONCE)
    return len(Shape.of(cfg).calls) * (6 + cfg.gated_attention) + once


def forward_layer(cfg: Config, at: int, i: int, script: Script, keeps: bool) -> Iterator[Chain]:
    """at: its place; keeps: for a backward pass."""
    d, k, m, _, _ = Shape.of(cfg)
    s = script.stream
    half = len(train_gpt.layers_passed(cfg)) // 2
    skip = half <= at < 2 * half  # an earlier output is added
    kept = keeps or at < half  # the layer's input, else made and used in one
    yield Chain(d * ((3 + kept + skip) * s + 4), d * (2 * s + 2))  # residual, skip, mix, norm
    yield Chain(d * (4 + keeps * script.rotary), d * (4 + script.rotary))  # queries: norm, rotary
    yield Chain(k * 4, k * 6)  # keys, and the values that are kept
    if i in cfg.value_layers:
        yield Chain(k * 6)
    if cfg.value_residual and i:
        yield Chain(k * 6)
    excludes = i >= cfg.num_layers - cfg.xsa_last_n
    if excludes:
        yield Chain(d * 4 + k * (2 + 2 * keeps), d * 2 + k * 2, 2)
    if cfg.gated_attention:
        yield Chain(d * 4 * (1 - excludes) + d * 2 * (excludes and keeps), d * 2, 1 - excludes)
    scaled = d * 2 * script.scaled  # an output, for the gradient of its scale
    if 0 <= cfg.parallel_from <= i:
        yield Chain(d * s, d * 2 + scaled, 0)  # attention, added with the MLP
    else:
        yield Chain(d * (2 * s + 4), d * (s + 2) + d * 2 + scaled)  # residual, norm; attention
    yield Chain(m * 4, m * 4 + scaled)  # activation


def backward_layer(cfg: Config, at: int, i: int, script: Script) -> Iterator[Chain]:
    d, k, m, _, _ = Shape.of(cfg)
    s = script.stream
    half = len(train_gpt.layers_passed(cfg)) // 2
    scaled = script.scaled
    yield Chain(d * (s + 4) * scaled, kernels=2 * scaled)  # of the MLP's output, of its scale
    yield Chain(m * 6)
    if cfg.polyglu_enabled:
        yield Chain(m * 4, kernels=2)
    if 0 <= cfg.parallel_from <= i:
        yield Chain(d * 2, kernels=0)  # in the sum of four products below
    else:
        yield Chain(d * (3 * s + 2 + 2 * scaled))  # norm, residual
    yield Chain(d * (s + 2) * scaled, kernels=2 * scaled)  # of attention's scale
    if i >= cfg.num_layers - cfg.xsa_last_n:
        yield Chain(d * 6 + k * 8, kernels=3)
    if cfg.gated_attention:
        yield Chain(d * 6, kernels=2)
    yield Chain(d * (8 + max(2, script.rotary)), kernels=3)  # queries and their gain
    yield Chain(k * 6)
    if i in cfg.value_layers:
        yield Chain(k * 12, kernels=3)
    if cfg.value_residual and i:
        yield Chain(k * 14, kernels=3)
    yield Chain(d * (6 + 5 * s))  # norm, mix, sums of three products and over layers
    yield Chain(d * 3 * s, kernels=2)  # gradient of the mix
    if half <= at < 2 * half:
        yield Chain(d * 4 * s, kernels=2)
        if cfg.skip_gates:
            yield Chain(d * 3 * s, kernels=2)


def forward_ends(cfg: Config, script: Script, keeps: bool) -> Iterator[Chain]:
    """Embedding and loss."""
    d, _, _, v, _ = Shape.of(cfg)
    s = script.stream
    yield Chain(d * (22 + s), d * (8 + s), 5)  # in fp32: look-ups, norm, smear
    if cfg.pre_enrich_dim:
        yield Chain(cfg.pre_enrich_dim * 4 + d * 6, cfg.pre_enrich_dim * 4 + d * 4, 2)
    yield Chain(d * ((1 + keeps) * s + 4), d * (s + 2))
    yield Chain(v * 2, v * 2, 2)


def backward_ends(cfg: Config, script: Script) -> Iterator[Chain]:
    d, _, _, v, _ = Shape.of(cfg)
    s = script.stream
    yield Chain(v * 4)
    yield Chain(d * (2 + 3 * s))
    yield Chain(d * (30 + s), kernels=12)
    if cfg.pre_enrich_dim:
        yield Chain(cfg.pre_enrich_dim * 6 + d * 6, kernels=3)


def total(chains: list[Chain]) -> Chain:
    return Chain(*(sum(column) for column in zip(*chains, strict=True))) if chains else Chain(0)


@cache
def forward(cfg: Config, script: Script, keeps: bool) -> Chain:
    chains = [*forward_ends(cfg, script, keeps)]
    for at, i in Shape.of(cfg).calls:
        chains += forward_layer(cfg, at, i, script, keeps)
    return total(chains)


@cache
def backward(cfg: Config, script: Script) -> Chain:
    chains = [*backward_ends(cfg, script)]
    for at, i in Shape.of(cfg).calls:
        chains += backward_layer(cfg, at, i, script)
    return total(chains)


def fused_seconds(moved: float) -> float:
    return moved / (rate("memory") * rate("fused"))


# -----------------------------------------------------------------------------
# A training step


class Sizes(NamedTuple):
    """Numbers of a model, by who trains them."""

    matrices: list[tuple[int, int, int]]  # Muon's: how many of which rows and columns
    small: int  # AdamW's
    small_tensors: int

    @staticmethod
    def of(cfg: Config) -> "Sizes":
        specs = parameter_specs(cfg).values()
        shapes = [(1, *spec.shape)[-3:] for spec in specs if spec.group == "muon"]
        small = [math.prod(spec.shape) for spec in specs if spec.group != "muon"]
        return Sizes(shapes, sum(small), len(small))

    @property
    def large(self) -> int:
        return sum(math.prod(shape) for shape in self.matrices)

    def share(self, ranks: int) -> list[tuple[int, int, int]]:
        """A rank's matrices of each bank, padding included."""
        return [(-(-count // ranks), rows, columns) for count, rows, columns in self.matrices]


def newton_flops(matrices: list[tuple[int, int, int]], steps: int) -> float:
    done = 0
    for count, rows, columns in matrices:
        short = min(rows, columns)
        done += count * (4 * short**2 * max(rows, columns) + 2 * short**3)
    return steps * done


def optimizer_bytes(cfg: Config, ranks: int) -> float:
    """Read and written after the gradients are there; Newton-Schulz's products left out."""
    sizes = Sizes.of(cfg)
    share = sum(math.prod(shape) for shape in sizes.share(ranks))
    every = sizes.large + sizes.small
    moved = 4 * every  # norms
    if cfg.grad_clip_norm and cfg.clip == "local":
        moved += 20 * every
    elif cfg.grad_clip_norm:
        moved += 20 * sizes.small + 22 * share
    moved += 6 * sizes.large + 28 * sizes.small  # to bf16; AdamW
    moved += 16 * share + 22 * sizes.large  # momentum; decay and update
    return moved + 12 * every * cfg.ema_enabled


def transfer_seconds(cfg: Config, ranks: int, script: Script) -> float:
    """Between GPUs, as far as nothing hides it: of the updates' gathering, all but a bank's is
    beside the Newton-Schulz of the next."""
    if ranks == 1:
        return 0.0
    sizes = Sizes.of(cfg)
    banks = [2 * ranks * math.prod(shape) for shape in sizes.share(ranks)]
    part = (ranks - 1) / ranks
    scattered = part * sum(banks) / rate("nvlink") + len(banks) * rate("collective")
    hidden = newton_flops(sizes.share(ranks), cfg.muon_backend_steps) / rate("newton")
    gathered = max(scattered - hidden, part * min(banks) / rate("nvlink") + rate("collective"))
    reduces = sizes.small_tensors if script.each_gradient else 1
    reduces += script.veto_first + (cfg.clip == "global" and cfg.grad_clip_norm > 0)
    reduces += script.waits  # the flag of the clock
    reduced = 2 * part * 4 * sizes.small / rate("nvlink") + reduces * rate("collective")
    return scattered + gathered + reduced


def host_seconds(tokens: int, ranks: int, script: Script) -> float:
    """For which the device has nothing to do."""
    if not script.waits:
        return 0.0
    read = tokens * (ranks if script.all_rows else 1)
    copied = 0.0 if script.pinned else 2 * 8 * tokens / rate("pageable")
    return rate("loop") + read / rate("tokens") + copied


def passes_of(cfg: Config, ranks: int) -> int:
    """Passes of a step on each rank; ConfigError where the batch cannot be parted so."""
    return train_gpt.micro_batches(cfg, SimpleNamespace(world_size=ranks, cuda=True))


def step_parts(cfg: Config, ranks: int, script: Script = NOW) -> dict[str, float]:
    """Part of a step -> seconds; of one with loops, where there are."""
    passes = passes_of(cfg, ranks)
    tokens = cfg.train_batch_tokens // ranks
    sizes = Sizes.of(cfg)
    there = forward(cfg, script, True)
    back = backward(cfg, script)
    calls = len(Shape.of(cfg).calls)
    # Weights to bf16, gradients of layers into banks; a further pass adds to gradients.
    every = passes * (12 + 4 * cfg.qat_enabled) * sizes.large
    every += (passes - 1) * 12 * (sizes.large + sizes.small)
    if not script.scaled:  # the gradients of scales, from gradients and weights of their rows
        rows = cfg.num_layers * cfg.model_dim * (cfg.model_dim + Shape.of(cfg).hidden)
        every += passes * 6 * rows
    launches = (
        there.kernels + back.kernels + 3 * products(cfg) + 4 * calls + 2 * len(sizes.matrices)
    )
    least, clipping, each = OPTIMIZER_LAUNCHES
    updating = least + clipping * (cfg.grad_clip_norm > 0) + each * len(sizes.matrices)
    newton = newton_flops(sizes.share(ranks), cfg.muon_backend_steps) / rate("newton")
    return {
        "matrix products": tokens * 6 * weights(cfg) / rate("products"),
        "attention": 3 * attention_seconds(cfg, tokens),
        "fused kernels": fused_seconds(tokens * (there.moved + back.moved) + every),
        "launches": passes * launches * rate("launch"),
        "optimizer": fused_seconds(optimizer_bytes(cfg, ranks))
        + newton
        + updating * rate("launch"),
        "between GPUs": transfer_seconds(cfg, ranks, script),
        "waiting for the host": host_seconds(tokens, ranks, script),
    }


def step_seconds(cfg: Config, ranks: int, script: Script = NOW) -> float:
    return sum(step_parts(cfg, ranks, script).values())


def mean_step_seconds(cfg: Config, ranks: int) -> float:
    """Of a run whose loops begin when LOOP_FROM of its time is over."""
    looped = step_seconds(cfg, ranks)
    if not cfg.loop_layers:
        return looped
    plain = step_seconds(before_loops(cfg), ranks)
    return 1 / (cfg.loop_from / plain + (1 - cfg.loop_from) / looped)


def training_memory(cfg: Config, ranks: int, script: Script = NOW) -> float:
    """Bytes of a rank at the start of a backward pass: weights, gradients, states, averages, bf16
    weights, and what the forward pass kept."""
    sizes = Sizes.of(cfg)
    share = sum(math.prod(shape) for shape in sizes.share(ranks))
    every = sizes.large + sizes.small
    held = every * (4 + 4 + 8) + sizes.small * 8 + 2 * (ranks + 2) * share + 2 * sizes.large
    rows = cfg.train_batch_tokens // ranks // passes_of(cfg, ranks)
    return held + rows * (forward(cfg, script, True).kept + 2 * cfg.vocab_size)


# -----------------------------------------------------------------------------
# Evaluation


@cache
def document_lengths() -> np.ndarray:
    """Of FineWeb's validation, in targets: where it was downloaded its own, in the text's order,
    else as assumed, in an order without meaning."""
    if train_gpt.has_fineweb():
        shards = train_gpt.find_shards(train_gpt.FINEWEB_DATA, "val")
        stream = np.concatenate([train_gpt.read_shard(path, 1 << 16) for path in shards])
        return np.diff(np.flatnonzero(stream == train_gpt.BOS), append=len(stream) - 1)
    places = (np.arange(DOCUMENTS) + 0.5) / DOCUMENTS
    normal = NormalDist(0, SPREAD)
    lengths = np.exp([normal.inv_cdf(place) for place in places.tolist()])
    lengths = np.maximum(1, np.round(lengths * (TARGETS / lengths.sum()))).astype(int)
    return np.random.default_rng(0).permutation(lengths)


def longest_documents(count: int) -> np.ndarray:
    """Their numbers, ascending."""
    return np.sort(np.argsort(-document_lengths(), kind="stable")[:count])


@cache
def lane_steps(lanes: int, ahead: int) -> int:
    """Until all documents are read, `ahead` of the longest before the others, each by the lane that
    is free first; never less than targets / lanes, nor than the longest document."""
    lengths = document_lengths()
    longest = longest_documents(ahead)
    free = [0] * lanes
    for size in [*lengths[longest].tolist(), *np.delete(lengths, longest).tolist()]:
        heapq.heapreplace(free, free[0] + size)
    return max(free)


def keys_seen(window: int) -> float:
    """By a target, on average."""
    lengths = document_lengths().astype(float)
    inside = np.minimum(lengths, window)
    return float((inside * (inside + 1) / 2 + (lengths - inside) * window).sum() / lengths.sum())


def lane_kernels(cfg: Config) -> int:
    """Of a captured step: products, attentions, chains; the scores' and schedule's."""
    calls = len(Shape.of(cfg).calls)
    chains = forward(cfg, NOW, False).kernels
    return products(cfg) + calls + chains + 2 * calls + 8  # keys and values are put in their slots


def lane_step_seconds(cfg: Config, lanes: int, keys: float) -> float:
    """Of so many lanes of a GPU, each reading so many keys and values in each attention."""
    shape = Shape.of(cfg)
    read = 2 * weights(cfg) + 4 * cfg.vocab_size * cfg.model_dim  # bf16; the head is cast anew
    read += lanes * len(shape.calls) * keys * shape.keys * 4
    read += lanes * (forward(cfg, NOW, False).moved + 24 * cfg.vocab_size)
    flops = lanes * (2 * weights(cfg) + attention_flops(cfg, keys))
    return lane_kernels(cfg) * rate("launch") + max(fused_seconds(read), flops / rate("products"))


def lanes_of(cfg: Config, ranks: int) -> int:
    """A GPU's."""
    return -(-min(cfg.eval_lanes, DOCUMENTS) // ranks)


def documents_seconds(cfg: Config, ranks: int, *, seen: bool = SEEN_KEYS_ONLY) -> float:
    lanes = lanes_of(cfg, ranks)
    keys = keys_seen(cfg.window) if seen else cfg.window
    steps = lane_steps(lanes * ranks, cfg.eval_longest_first)
    return steps * lane_step_seconds(cfg, lanes, keys)


def learning_work(cfg: Config, ranks: int) -> tuple[float, float, float]:
    """Kernels, bytes moved and FLOP of a step of LANE_TTT: a pass there and back over the lanes'
    last tokens, not compiled, whose attention goes by plain products over all slots; gradients of
    all ranks, in float32, added up, clipped; Adam, and copies of the weights."""
    lanes = lanes_of(cfg, ranks)
    rows = lanes * cfg.lane_ttt_every
    keys = cfg.window + cfg.lane_ttt_every
    shape = Shape.of(cfg)
    there = forward(cfg, NOW, True)
    back = backward(cfg, NOW)
    apart, again = LEARNING
    moved = again * rows * (there.moved + back.moved)
    moved += PLAIN_ATTENTION * 4 * rows * cfg.num_heads * keys * len(shape.calls)
    moved += 3 * 8 * lanes * keys * shape.keys * len(shape.calls)  # keys and values, joined
    size = 4 * train_gpt.count_parameters(cfg)
    moved += size * (2 * ranks + 4 + 7 + 3)
    flops = rows * (6 * weights(cfg) + 3 * attention_flops(cfg, keys))
    kernels = apart * (there.kernels + back.kernels) + 3 * products(cfg)
    return kernels, moved, flops


def learning_seconds(cfg: Config, ranks: int) -> float:
    """Of LANE_TTT: its steps, and every rank's gradients to every rank."""
    if not cfg.lane_ttt:
        return 0.0
    kernels, moved, flops = learning_work(cfg, ranks)
    step = fused_seconds(moved) + flops / rate("products") + kernels * rate("launch")
    step += 4 * train_gpt.count_parameters(cfg) * (ranks - 1) / rate("nvlink")
    step += 100 * rate("eager")
    steps = lane_steps(lanes_of(cfg, ranks) * ranks, cfg.eval_longest_first)
    return steps / cfg.lane_ttt_every * step


def gathering_seconds(ranks: int) -> float:
    """Log p and entropy of all targets, in float64, between ranks."""
    return 2 * (ranks - 1) / ranks * 16 * TARGETS / rate("gloo")


def windows_seconds(cfg: Config, ranks: int, stride: int) -> float:
    """All targets by windows of which each scores so many."""
    rows = cfg.eval_batch_seqs * cfg.window
    scored = cfg.eval_batch_seqs * stride
    chain = forward(cfg, NOW, False)
    head = cfg.vocab_size * cfg.model_dim
    flops = rows * (weights(cfg) - head) + scored * head
    device = 2 * flops / rate("products")
    device += attention_seconds(replace(cfg, train_seq_len=cfg.window), rows)
    device += fused_seconds(rows * (chain.moved - 2 * cfg.vocab_size) + 2 * scored * cfg.vocab_size)
    launches = chain.kernels + products(cfg) + len(Shape.of(cfg).calls)
    host = rate("window") + 8 * (rows + 4 * scored) / rate("pageable")
    passes = math.ceil(TARGETS / scored / ranks)
    return passes * (device + launches * rate("launch") + host) + gathering_seconds(ranks)


def chunk_seconds(captured: bool) -> float:
    """Of the blend."""
    eager, calls = CHUNK_LAUNCHES
    if not captured:
        return rate("mixing") + eager * rate("eager")
    return rate("mixing") + calls * rate("eager") + GRAPH_KERNELS * rate("launch")


def blend_seconds(cfg: Config, captured: bool = True) -> float:
    """On rank 0's GPU, chunk after chunk: of 4,096 targets, or of a step of all lanes."""
    chunk = train_gpt.Blend.LARGEST_CHUNK
    if cfg.scorer == "documents":
        chunk = math.ceil(chunk / cfg.eval_lanes) * cfg.eval_lanes
    return TARGETS / chunk * chunk_seconds(captured)


def counts_seconds(cfg: Config) -> float:
    """By sorting on rank 0's GPU; every context taken for one that recurs, which few long ones
    do."""
    orders = train_gpt.weighed_orders("blend" if cfg.mixer == "cascade" else cfg.mixer, cfg)
    sorts = max(orders, default=0) + len(orders)
    copied = 16 * len(orders) / rate("pageable")
    laid_out = rate("schedule") if cfg.scorer == "documents" else 0.0
    return TARGETS * (sorts / rate("sort") + copied + len(orders) * rate("collect") + laid_out)


def quantise_seconds(cfg: Config, ranks: int) -> float:
    """Where weights may not fit, of as many tries as there are at most."""
    specs = parameter_specs(cfg)
    payload = train_gpt.payload_type(specs).itemsize
    tries = PRUNINGS if cfg.target_mb else 1
    if cfg.target_bytes and gaussian_bytes(cfg) > train_gpt.artifact_room(cfg):
        tries = train_gpt.FIT_TRIES
    rounding = collecting = 0.0
    if cfg.quant == "gptq":
        rows = cfg.calibration_rows * cfg.train_seq_len / ranks
        shapes = [(1, *specs[name].shape)[-3:] for name in train_gpt.GPTQ_INPUTS if name in specs]
        gathered = sum(2 * count * columns**2 for count, _, columns in shapes)
        collecting = rows * (gathered / rate("single") + 2 * weights(cfg) / rate("products"))
        for count, height, width in shapes:
            mine = -(-count // ranks)
            done = mine * (4 * width**3 + 2 * height * width**2)  # roots, then rows made up for
            rounding += done / rate("single") + COLUMN_CALLS * width * rate("eager")
    return collecting + tries * (rounding + payload / rate(cfg.compressor))


def gaussian_bytes(cfg: Config) -> float:
    """Entropy of Gaussian weights on the grids that CLIP_SIGMAS asks for."""
    bits = 0.0
    for spec in parameter_specs(cfg).values():
        largest = train_gpt.LARGEST.get(spec.coding)
        each = 8.0 if largest else 16.0
        if largest and (clip := train_gpt.clip_of(spec, cfg)):
            each = math.log2(math.sqrt(2 * math.pi * math.e) * largest / clip)
        bits += max(0.0, each) * math.prod(spec.shape)
    return bits / 8


def evaluation_parts(cfg: Config, ranks: int) -> dict[str, float]:
    """Part of the evaluation's clock -> seconds."""
    parts = {}
    if cfg.quant != "gptq":
        parts["quantise, compress"] = quantise_seconds(cfg, ranks)
    parts["roundtrip windows"] = windows_seconds(cfg, ranks, cfg.window)
    sliding = train_gpt.scores_sliding(cfg)
    again = bool(cfg.ngram_scheme) and cfg.pseudo_weights == "ema"  # of the unquantised weights
    if sliding or again:
        parts["sliding windows"] = (sliding + again) * windows_seconds(cfg, ranks, cfg.eval_stride)
    if cfg.scorer == "documents":
        parts["documents"] = documents_seconds(cfg, ranks) + gathering_seconds(ranks)
        if cfg.lane_ttt:
            parts["learning in lanes"] = learning_seconds(cfg, ranks)
    if cfg.mixer != "none":
        parts["counts"] = counts_seconds(cfg)
        parts["backoff"] = TARGETS * rate("backoff") / rate("threads")
    if cfg.mixer == "blend":
        parts["blend"] = blend_seconds(cfg)
    return parts


def proof_seconds(cfg: Config, ranks: int) -> float:
    """Rank 0 runs the lanes of all, encodes, and a process decodes: outside the clock."""
    if cfg.scorer != "documents" or not cfg.codec_tokens:
        return 0.0
    targets = TARGETS if cfg.codec_tokens < 0 else min(TARGETS, cfg.codec_tokens)
    lanes = lanes_of(cfg, ranks)
    keys = keys_seen(cfg.window) if SEEN_KEYS_ONLY else cfg.window
    device = targets / lanes * lane_step_seconds(cfg, lanes, keys)
    device += targets / TARGETS * ranks * learning_seconds(cfg, ranks)
    return 2 * (device + targets * rate("codec")) + rate("start")


# -----------------------------------------------------------------------------
# What is printed


def configuration(environ: dict[str, str], **changes: object) -> Config:
    """As train_gpt.py would resolve it where CUDA and FineWeb are; ConfigError."""
    cfg = Config.from_env({"RECORD": "own", "DEVICE": "cuda"} | environ)
    known = dict(vocab_size=cfg.vocab_size or 1024)
    return replace(cfg, **known | changes).check()


def pr549_shape(**changes: object) -> Config:
    """#1026's with PolyGLU off: 11 layers of 512, XSA in 4, BigramHash 1536, value embeddings."""
    return configuration({"RECORD": "pr1026"}, **changes)


def listed(parts: dict[str, float], scale: float, unit: str) -> Iterator[str]:
    for name, seconds in parts.items():
        yield f"  {name:<24}{seconds * scale:9.1f} {unit}"


def report(cfg: Config, ranks: int) -> Iterator[str]:
    parts = step_parts(cfg, ranks)
    step = sum(parts.values())
    theirs = pr549_seconds()
    steps, reserve = steps_within(cfg, ranks)
    memory = training_memory(cfg, ranks) / 1e9
    yield f"{cfg.record or 'own'} on {ranks} H100: estimated, nothing of it was run"
    yield f"step {step * 1e3:.1f} ms, {step / theirs:.3f} of PR #549's on 8 ({theirs * 1e3:.1f} ms)"
    yield from listed(parts, 1e3, "ms")
    if cfg.loop_layers:
        plain = step_seconds(before_loops(cfg), ranks)
        mean = mean_step_seconds(cfg, ranks)
        ratios = f"{plain / theirs:.3f} and {mean / theirs:.3f}"
        yield f"before the loops {plain * 1e3:.1f} ms, on average {mean * 1e3:.1f} ms: {ratios}"
    budget = cfg.max_wallclock_seconds or train_gpt.CAP_SECONDS
    left = f", {reserve:.0f} of them for GPTQ" if reserve else ""
    yield f"{steps:,} steps in {budget:.0f} s{left}; memory of a rank about {memory:.1f} GB"
    evaluation = evaluation_parts(cfg, ranks)
    seconds = sum(evaluation.values())
    over = ", OVER THE CAP" if seconds > train_gpt.CAP_SECONDS else ""
    yield f"evaluation {seconds:.0f} s of {train_gpt.CAP_SECONDS}{over}, {TARGETS:,} targets"
    yield from listed(evaluation, 1, "s")
    if cfg.ttt_enabled:
        yield "  test-time training is not estimated"
    if cfg.scorer == "documents":
        yield from lanes_report(cfg, ranks)
    if proof := proof_seconds(cfg, ranks):
        yield f"proof, outside the clock {proof:.0f} s"
    yield REPLACED


def steps_within(cfg: Config, ranks: int) -> tuple[int, float]:
    """Of the training's clock: steps, and the seconds that are left to GPTQ, a fifth more than it
    takes, as train_gpt.quantising_seconds has it."""
    budget = cfg.max_wallclock_seconds or train_gpt.CAP_SECONDS
    reserve = 0.0
    if cfg.quant == "gptq":
        measured = 1.2 * quantise_seconds(cfg, ranks)
        reserve = min(cfg.gptq_reserve_seconds or measured, budget / 2)
    return min(cfg.iterations, int((budget - reserve) / mean_step_seconds(cfg, ranks))), reserve


def lanes_report(cfg: Config, ranks: int) -> Iterator[str]:
    """What the documents depend on."""
    lanes = lanes_of(cfg, ranks)
    held = train_gpt.lane_bytes(cfg, lanes, cfg.window, True) / 1e9
    text = lane_steps(lanes * ranks, 0)
    first = lane_steps(lanes * ranks, 1024)
    known = "FineWeb's" if train_gpt.has_fineweb() else "assumed"
    longest = f"the longest of {document_lengths().max():,}, {known}"
    ahead = tuple(longest_documents(1024).tolist())
    plan = train_gpt.CodingPlan(DOCUMENTS, 0, lanes * ranks, ranks, TARGETS, cfg.window, ahead)
    named = len(plan.side_bytes())
    ways = {"all slots": cfg.window, "seen keys alone": keys_seen(cfg.window)}
    ways["SDPA's math fallback"] = MATH_FALLBACK * cfg.window
    yield f"documents: {lanes} lanes a GPU, {held:.0f} GB, {lane_kernels(cfg)} kernels a step;"
    yield f"  {text:,} steps in the text's order, {first:,} with 1,024 longest first ({longest})"
    yield f"  {named:,} bytes of the stream name these"
    for name, keys in ways.items():
        one = lane_step_seconds(cfg, lanes, keys)
        both = f"{text * one:6.0f} s in the text's order, {first * one:6.0f} s longest first"
        yield f"  {name:<24}{one * 1e3:9.2f} ms a step: {both}"


def table(ranks: int) -> Iterator[str]:
    """Every system beside #549, the published runs, the cures of the step and of the evaluation,
    the targets."""
    ours = {"#549's shape": pr549_shape(), "#549's shape, XSA in 11": pr549_shape(xsa_last_n=11)}
    own = configuration({"RECORD": "own"})
    ours |= {"own": own, "own, no loops": before_loops(own)}
    ours |= {"own, across documents": replace(own, doc_attention=False)}
    ours |= {record: configuration({"RECORD": record}) for record in PUBLISHED}
    heads = ("system", "mean step ms", "of #549", "steps", "GB a rank", "evaluation s", "proof s")
    yield markdown(heads, [row(name, cfg, ranks) for name, cfg in ours.items()])
    yield ""
    heads = ("published runs, 8 GPUs", "step ms", "published", "MiB", "published")
    yield markdown(heads, [*published()])
    yield ""
    yield markdown(
        ("step of pr993's shape, cure by cure", "ms", "gain", "of #549"), [*cures(ranks)]
    )
    yield ""
    yield markdown(("evaluation of own", "s", "gain"), [*evaluation_cures(ranks)])
    yield ""
    yield markdown(("target, 8 GPUs", "at most", "estimated", "reached"), [*targets()], left=1)


def pr549_seconds() -> float:
    """Of its step on 8 GPUs, which `fused` was chosen for."""
    return step_seconds(pr549_shape(), 8, PR549)


def row(name: str, cfg: Config, ranks: int) -> tuple[str, ...]:
    step = mean_step_seconds(cfg, ranks)
    return (
        name,
        f"{step * 1e3:.1f}",
        f"{step / pr549_seconds():.3f}",
        f"{steps_within(cfg, ranks)[0]:,}",
        f"{training_memory(cfg, ranks) / 1e9:.1f}",
        f"{sum(evaluation_parts(cfg, ranks).values()):.0f}",
        f"{proof_seconds(cfg, ranks):.0f}" if cfg.scorer == "documents" else "",
    )


def published() -> Iterator[tuple[str, ...]]:
    """Their shapes in #549's script, as all of them but #810 were run, beside their logs."""
    step = f"{pr549_seconds() * 1e3:.1f}"
    yield "pr549, calibrated by it", step, f"{PR549_MS}", "", ""
    for record, (ms, mib) in PUBLISHED.items():
        cfg = configuration({"RECORD": record})
        step = f"{step_seconds(cfg, 8, PR549) * 1e3:.1f}"
        held = f"{training_memory(cfg, 8, PR549) / 2**20:,.0f}"
        yield record, step, f"{ms}", held, f"{mib:,}"


def targets() -> Iterator[tuple[str, ...]]:
    """What was asked for."""
    own = configuration({"RECORD": "own"})
    found = {
        "step ms, #549's shape, XSA in 11": (84, step_seconds(pr549_shape(xsa_last_n=11), 8) * 1e3),
        "step ms, #549's shape": (80, step_seconds(pr549_shape(), 8) * 1e3),
        "evaluation s of own": (200, sum(evaluation_parts(own, 8).values())),
    }
    for name, (most, value) in found.items():
        yield name, f"{most}", f"{value:.1f}", "yes" if value <= most else "NO"


def cures(ranks: int) -> Iterator[tuple[str, ...]]:
    """From the script as it was to it as it is, and what is left."""
    cfg = configuration({"RECORD": "pr993"}, clip="global")
    stages = [("before (commit 72edfbf)", cfg, BEFORE)]
    for name, properties in CURES:
        stages.append((name, cfg, replace(stages[-1][2], **properties)))
    stages.append(("left: XSA in 4 layers", replace(cfg, xsa_last_n=4), NOW))
    before = 0.0
    for name, shape, script in stages:
        step = step_seconds(shape, ranks, script)
        gain = f"{(before - step) * 1e3:.2f}" if before else ""
        yield name, f"{step * 1e3:.1f}", gain, f"{step / pr549_seconds():.3f}"
        before = step


def evaluation_cures(ranks: int) -> Iterator[tuple[str, ...]]:
    """From that of before, without what was compiled on the clock, to what is left."""
    cfg = configuration({"RECORD": "own"})
    wide = replace(cfg, eval_lanes=2048)
    rest = sum(evaluation_parts(cfg, ranks).values()) - documents_seconds(cfg, ranks)
    sliding = windows_seconds(cfg, ranks, cfg.eval_stride)
    eager = blend_seconds(cfg, captured=False) - blend_seconds(cfg)
    ordered = replace(cfg, eval_longest_first=0)
    plain = rest + documents_seconds(ordered, ranks, seen=False) + eager
    stages = {
        "sliding windows, the text's order, all slots": plain + sliding,
        "EVAL_SLIDING=0": plain,
        "longest documents first": rest + documents_seconds(cfg, ranks, seen=False) + eager,
        "seen keys alone": rest + documents_seconds(cfg, ranks) + eager,
        "batches of the blend captured: today": rest + documents_seconds(cfg, ranks),
        "left: EVAL_LANES=2048": rest + documents_seconds(wide, ranks),
    }
    before = 0.0
    for name, seconds in stages.items():
        yield name, f"{seconds:.0f}", f"{before - seconds:.0f}" if before else ""
        before = seconds


def rates() -> str:
    lines = [(name, f"{r.value:g}", r.unit, r.source) for name, r in RATES.items()]
    return markdown(("rate", "value", "unit", "source"), lines, left=4)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "\n").splitlines()[0])
    parser.add_argument("--gpus", type=int, default=8, choices=range(1, 9), metavar="1..8")
    parser.add_argument("--table", action="store_true", help="own, the five and PR #549")
    parser.add_argument("--rates", action="store_true", help="what it rests on")
    given = parser.parse_args(arguments)
    try:
        lines = [rates()] if given.rates else []
        if given.table:
            lines += table(given.gpus)
        elif not given.rates:
            lines += report(configuration(dict(os.environ)), given.gpus)
        endings.say("\n".join(lines))
    except (UserError, OSError) as error:
        endings.say(f"error: {train_gpt.printable(str(error))}", sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(endings.run(main))
