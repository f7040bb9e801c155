"""Train, compress, re-read and honestly score a small GPT for Parameter Golf, in one file.

The task: least bits per byte (bpb) on FineWeb validation; code + weights <= 16,000,000 bytes; 10
minutes of training and 10 of evaluation on 8xH100. The final val_bpb is a code length, of the
artifact re-read from disk; section 12 spends it and decodes the text.

  python train_gpt.py                                     # laptop: `tiny` on the embedded text
  RECORD=pr864 python train_gpt.py                        # one GPU, a published system
  torchrun --standalone --nproc_per_node=8 train_gpt.py   # 8 GPUs, the defaults: `own`
  torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 \\
    train_gpt.py                                          # on two hosts

Variables configure it (--help, DRY_RUN=1); results go to runs/<RUN_ID>/. The sections:

  1 imports, 2 configuration, 3 runtime, 4 data, 5 model, 6 optimizers and schedules,
  7 weight averaging and QAT grids, 8 checkpoint and resume, 9 quantisation and artifact,
  10 neural scoring, 11 n-gram scoring, 12 codec, 13 training loop, 14 report and main

`run_stages` in section 14 tells the story. What lies in more than one section:

  learning   LaneChunk (5) reads the cache again with gradients, LaneLearner (10) steps; called by
             LaneScorer and run_lanes (10)
  late QAT   fake_quantize (5), update_qat_grids (7), search_grid (9); on from Trainer.update (13)
  documents  attention stops at a BOS where DOC_ATTENTION says so: Context.attend (5), for training,
             windows and GPTQ alike; a lane reads one piece at a time anyway
  loops      layers_passed and GPT.set_looped (5), share_done (6); on from Trainer.update (13)
  GPTQ       Context.linear (5) shows inputs, collect_hessians and gptq (9) use them; called by
             quantise_model (14), in the training's clock
  a signal   Runtime.signals (3); Trainer.save_if_due (13) saves (8), run (14) says what is kept
  a file     is written whole or not at all by write_atomically (3)
  the caps   TARGET_BYTES widens clips, TARGET_MB prunes (9); what no clip can reach is refused
             before training (quantising_seconds, 14), later over_caps (14) says what is over
  the bytes  pack_script (14) is what a submission ships; SCRIPT (1) is what it holds and runs

Everything that a run does is in here. A repository around it adds the embedded text
(data/sample/prepare.py), RECORDs by name (records/**/config.env), and of records/tools/ the picture
(plot.py) and the hashed scorers of the published pull requests (as_written.py); its programs are
started as processes of their own.

Words with one meaning each:

  upstream      github.com/openai/parameter-golf; PR #n is a pull request there
  the five      the published systems #864, #810, #1026, #993 and #808; siblings of one another
  as published  what their code does, where this script would do otherwise
  stream        the validation tokens in their order, a BOS first
  stream.bin    what the codec makes of them: a header, a plan's side_bytes, the range coder's words
  target        a token that is predicted: every token of a stream but its first
  document      the tokens from one BOS up to the next
  piece         a document, or a part of a long one: what a lane reads with nothing before it
  row           one training or scoring sequence of a batch; of a matrix, what makes one output
  window        the past that is kept: of sliding windows the inputs of a pass, which overlap,
                `stride` targets apart; of lanes the keys and values of each attention
  lane          one of many places where pieces are read, one after another, a token a step
  thread        what a lane reads up to a cut: counts and the gate do not look back across it
  learning      of all weights, in lanes (LANE_TTT); not the gate's
  bank          one tensor that stacks a kind of matrix of all layers
  scale, grid   the step of a matrix's row, stored beside its integers; the values integer * scale
                it may take
  RECORD        a named set of settings, records/**/<name>*/config.env
  order         of an n-gram: its length in tokens, the predicted one included
  coding        the order in which lanes, step by step, take the targets of a stream; of a
                parameter, how the artifact stores it
  backoff       the published mixture of model and counts, with fixed weights: NGRAM_MIXER=cascade
  blend         the learned mixture of model and counts, what val_bpb is by default
  expert        one of the 1 + K + R distributions that its gate weighs: the model, the counts of K
                orders, and of R of these the token that followed last time
  mass          the sum of a distribution over the vocabulary: 1, or it is no distribution
  known text    training tokens that an artifact holds, where bytes are to spare: counts begin
                with it (KNOWN_TOKENS)
  plan          what a decoder must know before its first token: pieces, lanes, targets
  C1            no probability may depend on its target or on later tokens (upstream issue #1017)
"""

# -----------------------------------------------------------------------------
# 1. Imports and optional packages
# torch, numpy, sentencepiece and zstandard suffice; what a missing one of the others takes away is
# said before the first step.

import os
import signal

if __name__ == "__main__":  # before the imports, which take seconds
    # Long spins of idle threads slow a shared CPU; libgomp reads it at load.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    # No file of ours may get the number of a standard stream that the caller closed (2>&-).
    while (hole := os.open(os.devnull, os.O_RDWR)) < 3:
        os.set_inheritable(hole, True)
    os.close(hole)

    def stop_at_once(number: int, _: object) -> None:
        """Ctrl-C while there is nothing to keep: one line."""
        try:
            os.write(2, b"signal %d: nothing to keep\n" % number * (os.getenv("RANK", "0") == "0"))
        finally:
            os._exit(128 + number)

    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # scripts' background jobs ignore it
        signal.signal(signal.SIGINT, stop_at_once)

import base64
import bisect
import contextlib
import copy
import ctypes
import errno
import functools
import gc
import hashlib
import heapq
import importlib.metadata
import importlib.util
import inspect
import io
import itertools
import json
import lzma
import math
import platform
import re
import select
import shlex
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn  # noqa: F401  (imported later, it keeps gloo alive)
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

CODE = Path(__file__).resolve()
# Of this script as it is read, whether it runs as it is or out of its packed form (pack_script).
SCRIPT: bytes = globals().get("SCRIPT") or CODE.read_bytes()
ROOT = CODE.parent


class UserError(ValueError):
    """What the user can mend: main prints one line and exits with status 2."""


class MissingPackage(UserError):
    """Its name, and how to get it."""


class Missing(UserError):
    """What a run lacks, a line each."""


class Interrupted(SystemExit):
    """A signal that ends the process, with status 128 + its number."""


def has_package(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def package(name: str) -> ModuleType:
    """Import an optional package; UserError names it and the fix."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingPackage(f"package {name} is missing; fix: pip install {name}") from error


# -----------------------------------------------------------------------------
# 2. Configuration
# Environment > RECORD's config.env > defaults; each setting is one line of one table.

CAP_BYTES = 16_000_000  # of artifact.bin and this file, packed; decimal
CAP_SECONDS = 600  # of training, and of evaluation


class ConfigError(UserError):
    """A wrong variable: its name, its value and the fix."""


class Alias(NamedTuple):
    """A sibling script's name of a setting whose value needs translating."""

    name: str
    values: Mapping[str, str] | None = None  # theirs -> ours, and no others
    plus: tuple[str, str] | None = None  # a second variable to add, and its default


class Setting(NamedTuple):
    """What the table says of a variable, beside its type and default."""

    group: str
    meaning: str
    least: float  # bounds of numbers
    most: float
    aliases: tuple[str | Alias, ...]
    stored_in: tuple[str, ...]  # "artifact", "checkpoint", "stream": files that bind it


def group(title: str, stored_in: tuple[str, ...] = ()) -> Callable[..., Any]:
    """-> function that makes a dataclass field of a setting of this group.

    A setting that is stored in an artifact describes its model; in a checkpoint, a run that goes
    on must have the same; in a stream's header, the decoder reads it from there.
    """

    def setting(
        default: Any,
        meaning: str,
        *,
        least: float = 0,
        most: float = 2**62,
        aliases: tuple[str | Alias, ...] = (),
        stored_in: tuple[str, ...] = stored_in,
    ) -> Any:
        entry = Setting(title, meaning, least, most, aliases, stored_in)
        return field(default=default, metadata={"setting": entry})

    return setting


POSITIVE = dict(least=1e-30, most=1e30)  # bounds of what must not be 0
MOST_KNOWN = 2**27  # tokens of a known text: more than any artifact of the cap could hold


@dataclass(frozen=True)
class Config:
    """Everything a run depends on; field `x_y` is environment variable `X_Y`."""

    # fmt: off
    # A table: one line a setting, its sentence on the next where both are too long.

    run = group("Run")
    record: str = run("",
        "folder of records/ whose config.env sets what the environment does not, or its "
        "beginning; without it tiny, or own where CUDA and FineWeb data are")
    run_id: str = run("", "results go to runs/<RUN_ID>/; without it <RECORD>_seed<SEED>")
    seed: int = run(1337,
        "seed of initial weights, of SHUFFLE and of the sample", stored_in=("checkpoint",))
    device: Literal["auto", "cuda", "cpu"] = run("auto",
        "where to run; auto: on CUDA where there is a device")
    attn_impl: Literal["auto", "sdpa", "fa3", "fa4"] = run("auto",
        "attention kernel, torch's choice or FlashAttention-3 or -4 on Hopper and newer")
    dry_run: bool = run(False,
        "print the resolved settings, parameters, optimizer groups and bytes, and end; needs no "
        "data")
    eval_only: str = run("", "artifact.bin to score without training")
    init_from: str = run("",
        "artifact.bin, run folder or checkpoint whose weights training begins with")
    decode: str = run("", "run folder whose stream.bin is decoded to decoded.npy")
    overwrite: bool = run(False,
        "run again in a folder with a finished run or with checkpoints, which are removed")
    resume: Literal["0", "auto"] = run("0",
        "go on from the last checkpoint of this RUN_ID, or start where there is none")
    checkpoint_every: str = run("0",
        "steps (10) or minutes (10m) between checkpoints; 0: only on a signal")
    sample_tokens: int = run(80,
        "tokens that the model writes at the end, for the log, by SEED; 0: none", most=100_000)

    data = group("Data")
    data_path: str = data("",
        "folder of token shards, *_train_*.bin and *_val_*.bin; without it FineWeb where it was "
        "downloaded, else the embedded text")
    tokenizer_path: str = data("",
        "SentencePiece model; without it tokenizer.model beside the shards")
    train_batch_tokens: int = data(786_432,
        "tokens in an optimizer step, all ranks together", least=1, stored_in=("checkpoint",))
    grad_accum_steps: int = data(0,
        "passes that share an optimizer step; 0: 8 // ranks on CUDA, 1 on a CPU",
        stored_in=("checkpoint",))
    shuffle: bool = data(True,
        "read training sequences in a random order, by SEED, each once an epoch; 0: the shards "
        "from end to end", stored_in=("checkpoint",))

    model = group("Model", stored_in=("artifact", "checkpoint"))
    vocab_size: int = model(0,
        "tokens that the model knows; 0: as many as the tokenizer", most=65_536)
    train_seq_len: int = model(2048, "tokens in a training sequence", least=1, most=2**20)
    num_layers: int = model(11,
        "blocks; the first half's outputs go into the second half's inputs, last to first",
        least=2, most=999)
    model_dim: int = model(512, "width of the residual stream", least=1)
    num_heads: int = model(8, "query heads", least=1)
    num_kv_heads: int = model(4,
        "key and value heads of a layer, each shared by NUM_HEADS / NUM_KV_HEADS queries", least=1)
    mlp_mult: float = model(4.0, "hidden units of an MLP, as a multiple of MODEL_DIM", **POSITIVE)
    leaky_slope: float = model(0.5,
        "activation is leaky_relu(x)^2 with this slope below 0; 0: relu^2",
        aliases=(Alias("LEAKY_RELU", values={"0": "0", "1": "0.5"}),))
    polyglu_enabled: bool = model(False, "learn the slope of each neuron below 0 (#1026)")
    depth_recurrence: tuple[int, ...] = model((), "layers, from 0, that are applied twice")
    loop_layers: str = model("3-5",
        "first and last layer, from 0, of a part that runs LOOP_TIMES times in all, "
        "3 4 5 3 4 5 3 4 5; empty: none does")
    loop_times: int = model(3, "how often LOOP_LAYERS run, in all", least=2, most=99)
    parallel_from: int = model(7,
        "from this layer on, from 0, attention and MLP read the same input; -1: in none",
        least=-1)
    skip_gates: bool = model(True,
        "blend the first half's outputs into the second half's inputs, by gates that are learned; "
        "0: add them")
    tied_embed_init_std: float = model(0.005,
        "standard deviation of the token embedding at the start; it is the output layer too")
    overtone_init: bool = model(False,
        "start the token embedding with singular values that fall as 1 / sqrt(k)")
    ortho_init: bool = model(True, "matrices start orthogonal; 0: uniform")
    logit_softcap: float = model(30.0, "logits z become c tanh(z / c) with this c", **POSITIVE)
    qk_gain_init: float = model(5.0, "gain of each query head at the start")
    rope_base: float = model(10_000.0, "base of the rotary frequencies", **POSITIVE)
    rope_dims: int = model(16, "dimensions rotated in a head; 0: all")
    rope_train_seq_len: int = model(1024,
        "a longer TRAIN_SEQ_LEN stretches the rotary base by the NTK rule", least=1)
    ln_scale: bool = model(True, "divide what block i is given, normed, by sqrt(i + 1)")
    xsa_last_n: int = model(11,
        "so many last layers drop from attention what lies along the position's own value")
    value_residual: bool = model(False,
        "mix the first layer's values into those of every other layer",
        aliases=("USE_VALUE_RESIDUAL",))
    gated_attention: bool = model(True,
        "gate each head by its layer's input", aliases=("USE_GATED_ATTENTION", "GATED_ATTN"))
    gate_inputs: int = model(12,
        "GATED_ATTENTION reads the first so many of a layer's inputs; 0: all")
    smear_gate: bool = model(True,
        "blend the token before into each token's embedding", aliases=("USE_SMEARGATE",))
    smear_init: float = model(0.0,
        "start of that blend, the logit of the other token's share", least=-1e30, most=1e30)
    bos_reset: bool = model(True,
        "smear and bigrams do not look back across the start of a document")
    doc_attention: bool = model(True,
        "attention does not look back across the start of a document, in training and in the "
        "score")
    bigram_vocab_size: int = model(0, "rows of the hashed embedding of token pairs; 0: none")
    bigram_dim: int = model(128, "width of that embedding, before its projection", least=1)
    bigram_kind: Literal["xor", "linear"] = model("xor",
        "how a pair is hashed to a row, #549's way or #810's")
    pre_enrich_dim: int = model(0,
        "hidden units of a GELU MLP between embedding and blocks; 0: none")
    ve_enabled: bool = model(False,
        "add a second token embedding to the attention values of VE_LAYERS")
    ve_dim: int = model(128, "width of that embedding, before its projection", least=1)
    ve_layers: tuple[int, ...] = model((-2, -1), "its layers, from 0; -1 is the last")

    coding = group("Artifact", stored_in=("artifact", "checkpoint"))
    matrix_coding: Literal["int4", "int5", "int6", "int7", "int8"] = coding("int6",
        "how the artifact stores the matrices")
    embed_coding: Literal["int4", "int5", "int6", "int7", "int8", "fp16"] = coding("int8",
        "how it stores the token embedding")
    table_coding: Literal["int4", "int5", "int6", "int7", "int8", "fp16"] = coding("int8",
        "how it stores the bigram and value embeddings")
    control_coding: Literal["int8", "fp16", "fp32"] = coding("int8",
        "how it stores gains, gates and other small parameters")
    compressor: Literal["range", "zstd", "lzma"] = coding("range",
        "what packs the integers of the artifact; range: a range coder that counts as it goes")
    quantiser = group("Artifact", stored_in=("checkpoint",))
    quant: Literal["lite", "gptq"] = quantiser("gptq",
        "lite: each weight to the nearest integer; gptq: later columns of a matrix make up for the "
        "rounding of earlier ones, by what training text gives it as inputs")
    clip_sigmas: float = quantiser(12.85,
        "a matrix row's grid ends at so many standard deviations: a step is that over the largest "
        "integer; 0: by CLIP_QUANTILES", most=1e4)
    embed_clip_sigmas: float = quantiser(20.0, "the same of embeddings", most=1e4)
    calibration: Literal["train", "random"] = quantiser("train",
        "what gptq takes inputs from, the training text or random tokens")
    calibration_rows: int = quantiser(64,
        "training sequences that it takes", least=1, most=65_536)
    gptq_reserve_seconds: float = quantiser(0.0,
        "of the capped training time that is left to gptq; 0: as it takes in a rehearsal before")
    target_bytes: int = quantiser(16_000_000,
        "of weights and packed script together: where they are more the clips rise until they are "
        "not; 0: as they come")
    known_tokens: int = quantiser(0,
        "training tokens, the shards' last, that the artifact holds for counts to begin with, half "
        "a byte or more each; 0: none, -1: all", least=-1, most=MOST_KNOWN)
    quant_per: Literal["row", "matrix"] = quantiser("row",
        "what chooses its clip among CLIP_QUANTILES together, a row, or all rows of a matrix")
    clip_quantiles: tuple[float, ...] = quantiser((0.999, 0.9995, 0.9999, 0.99999, 1.0),
        "with CLIP_SIGMAS=0 a row's grid ends at one of these quantiles of its |w|, that of least "
        "squared error; at 0.9999984 in int8")
    quant_floor: bool = quantiser(True,
        "scales found by quantile are at least 1 over the largest integer, as published")
    target_mb: float = quantiser(0.0,
        "MiB of artifact and code, reached by zeroing the smallest integers; 0: no pruning")

    training = group("Training", stored_in=("checkpoint",))
    iterations: int = training(20_000, "steps of training at most", least=1)
    max_wallclock_seconds: float = training(600.0,
        "seconds of training after which it ends; 0: no cap, schedules follow ITERATIONS")
    warmup_steps: int = training(20,
        "steps that compile the model before the clock starts, as many again with loops; they "
        "change no weight")
    warmdown_iters: int = training(3500,
        "last steps, over which the learning rates fall linearly to 0; under a cap, as many "
        "seconds as they take")
    warmdown_share: float = training(0.72,
        "share of the run over which they fall instead; 0: over WARMDOWN_ITERS, as also where "
        "that is given and this is not", most=1)
    min_lr: float = training(0.1,
        "least factor of the learning rates, which fall towards 0 but stop there", most=1)
    loop_from: float = training(0.35,
        "share of the run, by steps or seconds, after which LOOP_LAYERS run more than once",
        most=0.99)
    matrix_lr: float = training(0.022, "learning rate of Muon: the matrices")
    scalar_lr: float = training(0.025, "learning rate of AdamW: gains, gates, projections")
    tied_embed_lr: float = training(0.035, "learning rate of AdamW: embeddings")
    muon_momentum: float = training(0.97, "Muon's momentum after its warm-up", most=1)
    muon_momentum_warmup_start: float = training(0.92, "Muon's momentum at step 0", most=1)
    muon_momentum_warmup_steps: int = training(1500, "steps between the two momenta")
    muon_backend_steps: int = training(5, "Newton-Schulz steps of Muon", least=1)
    muon_row_norm: bool = training(True,
        "divide each row of a matrix's momentum by its norm before Newton-Schulz")
    muon_wd: float = training(0.095, "weight decay of the matrices")
    adam_wd: float = training(0.04, "weight decay of what AdamW trains")
    beta1: float = training(0.9, "AdamW's, mean of gradients", most=0.999999)
    beta2: float = training(0.95, "AdamW's, mean of squared gradients", most=0.999999)
    adam_eps: float = training(1e-8, "AdamW's epsilon", **POSITIVE)
    grad_clip_norm: float = training(0.3, "largest norm of the gradients; 0: they are not clipped")
    clip: Literal["global", "local"] = training("global",
        "clip the average over ranks, or each rank's own gradients (as published)")
    val_loss_every: int = training(4000, "steps between validations; 0: none before the end")
    val_loss_tokens: int = training(0,
        "targets of a validation before the end, the text's first; 0: all of them")
    train_log_every: int = training(500,
        "steps between log lines; the first ten have one each", least=1)

    averaging = group("Averaging and QAT", stored_in=("checkpoint",))
    ema_enabled: bool = averaging(True,
        "export the exponential mean of the weights", aliases=("USE_EMA",))
    ema_decay: float = averaging(0.9965, "what the mean keeps of itself at a step", most=1)
    ema_warmup: bool = averaging(True,
        "EMA_DECAY at most (1 + step) / (10 + step), to forget the random start")
    swa_enabled: bool = averaging(True,
        "average snapshots of the weights too, while the rate factor is below 0.2")
    swa_every: int = averaging(50, "steps between snapshots", least=1)
    swa_source: Literal["raw", "ema"] = averaging("raw",
        "what a snapshot is of, the weights or their EMA")
    swa_weight: float = averaging(0.5,
        "share of the snapshots' mean in the export, the rest is the EMA", most=1)
    qat_enabled: bool = averaging(False,
        "train every linear layer through rounding by MATRIX_CODING from step 0, each row's grid "
        "as wide as its largest weight")
    late_qat: bool = averaging(False,
        "train through the export's grid at the end, before TARGET_BYTES widens it",
        aliases=("USE_LATE_QAT",))
    late_qat_threshold: float = averaging(0.15, "rate factor (1 to 0) below which late QAT begins")
    qat_every: int = averaging(50, "steps between choices of that grid", least=1)

    scoring = group("Scoring", stored_in=("stream",))
    eval_seq_len: int = scoring(0,
        "window: inputs of a pass, or keys that a lane keeps; 0: TRAIN_SEQ_LEN")
    eval_stride: int = scoring(64, "new targets of each sliding window", least=1)
    eval_batch_seqs: int = scoring(32, "windows in a pass, on each rank", least=1)
    eval_sliding: bool = scoring(True,
        "score sliding windows where documents are scored, too; SCORER=sliding always does",
        stored_in=())
    scorer: Literal["sliding", "documents"] = scoring("documents",
        "what feeds the n-gram mixture, sliding windows, or documents token by token, whose "
        "score a stream of bytes can prove")
    eval_lanes: int = scoring(1024,
        "documents, or pieces of long ones, read side by side, all ranks together", least=1)
    eval_piece_tokens: int = scoring(8192,
        "targets after which a document is cut, so that lanes read its pieces side by side, each "
        "with nothing before it; 0: never", stored_in=())
    eval_longest_first: int = scoring(0,
        "so many of the longest pieces are read before the others, or many lanes would wait for "
        "one at the end; the bytes that name them count in the score", stored_in=())
    save_scores: bool = scoring(False, "write scores.npz, a row for each target")
    codec_tokens: int = scoring(1_000_000,
        "targets, the first in the order of coding, that are coded and decoded again; 0: none, "
        "-1: all", least=-1)
    codec_minutes: float = scoring(10.0,
        "all targets are coded where that and decoding take fewer minutes", stored_in=())
    codec_device: Literal["same", "cpu"] = scoring("same",
        "where to code, decode and take the mass; cpu: for CPUs of this kind")

    ngram = group("N-gram", stored_in=("stream",))
    ngram_enabled: bool = ngram(True,
        "mix the model with counts of the text scored so far",
        aliases=("NGRAM_EVAL", "NGRAM_CACHE"))
    ngram_mixer: Literal["blend", "cascade", "none"] = ngram("blend",
        "what val_bpb is, a learned mixture, the published backoff, or the model alone")
    ngram_min_order: int = ngram(2, "shortest n-gram", aliases=("NGRAM_EVAL_MIN_ORDER",))
    ngram_max_order: int = ngram(9,
        "longest n-gram", least=2, most=32, aliases=("NGRAM_ORDER", "NGRAM_EVAL_ORDER"))

    test_time = group("Test-time training, score first")
    ttt_enabled: bool = test_time(False,
        "train the model on each chunk once it is scored; SCORER=sliding", aliases=("USE_TTT",))
    ttt_use_lora: bool = test_time(False,
        "by Adam on low-rank additions to queries and values; 0: SGD on all weights")
    ttt_lora_rank: int = test_time(8, "rank of these additions", least=1)
    ttt_lora_lr: float = test_time(0.01, "Adam's learning rate, falling to 0 as a cosine")
    ttt_lr: float = test_time(0.002, "SGD's learning rate, falling to 0 as a cosine")
    ttt_momentum: float = test_time(0.9, "SGD's momentum", most=1)
    ttt_epochs: int = test_time(3, "passes over each chunk", least=1)
    ttt_chunk_tokens: int = test_time(32768,
        "targets of a chunk, a multiple of EVAL_SEQ_LEN", least=1)
    ttt_batch_seqs: int = test_time(32, "sequences of EVAL_SEQ_LEN in a step", least=1)
    ttt_grad_clip: float = test_time(1.0, "largest norm of the gradients", **POSITIVE)
    lane_ttt: bool = test_time(True,
        "train the model on what all lanes have coded, as they go; SCORER=documents",
        stored_in=("stream",))
    lane_ttt_every: int = test_time(16, "steps of lanes between two of Adam",
        least=1, most=1024, stored_in=("stream",))
    lane_ttt_lr: float = test_time(3e-4, "Adam's learning rate in lanes", stored_in=("stream",))

    backoff = group("Published n-gram mixture, on exact counts")
    ngram_min_count: int = backoff(2,
        "least count of a context for its order to be used",
        least=1, aliases=("NGRAM_EVAL_MIN_COUNT",))
    ngram_alpha_min: float = backoff(0.05,
        "least weight of the counts", most=1, aliases=("NGRAM_EVAL_ALPHA_MIN", "NGRAM_ENT_BASE"))
    ngram_alpha_max: float = backoff(0.6,
        "largest weight of the counts, before NGRAM_MULTIPLIERS",
        most=1,
        aliases=("NGRAM_EVAL_ALPHA_MAX", Alias("NGRAM_ENT_RANGE", plus=("NGRAM_ENT_BASE", "0.05"))))
    ngram_entropy_center: tuple[float, ...] = backoff((3.0,),
        "the model's entropy, nats, at which the weight is halfway; for orders 2, 3, ..., the "
        "last for all longer ones", aliases=("NGRAM_EVAL_ENTROPY_CENTER", "NGRAM_ENT_THRESH"))
    ngram_center_slope: float = backoff(0.25, "how far that entropy falls with each order")
    ngram_entropy_scale: float = backoff(2.0,
        "steepness of the weight there, per nat",
        aliases=("NGRAM_EVAL_ENTROPY_SCALE", "NGRAM_ENT_SCALE"))
    ngram_multipliers: tuple[float, ...] = backoff((0.3, 0.3, 0.97, 2.0),
        "of that weight, for orders 2, 3, ..., the last for all longer ones")
    ngram_alpha: float = backoff(0.0,
        "weight of the counts at NGRAM_NLL_THRESHOLD, linear in the entropy (#1026); 0: by the "
        "sigmoid", most=1)
    ngram_nll_threshold: float = backoff(2.5,
        "entropy, nats, at which the weight is NGRAM_ALPHA", **POSITIVE)

    as_written = group("Published n-gram scorers as written")
    ngram_scheme: Literal["", "pr864", "pr810", "pr1026", "pr993", "pr808"] = as_written("",
        "print this pull request's hashed scorer too, as final_ngram_pseudo; it is no score")
    ngram_buckets: int = as_written(4_194_304,
        "counters of each of its hashed tables", least=1, aliases=("NGRAM_EVAL_BUCKETS",))
    ngram_chunk_tokens: int = as_written(65536,
        "targets between two updates of its tables", least=1)
    ngram_caches: int = as_written(1,
        "separate caches, one for each rank of the published run", least=1)
    pseudo_weights: Literal["artifact", "ema"] = as_written("artifact",
        "the weights that it is run on")

    # fmt: on
    del run, data, model, coding, quantiser, training, averaging, scoring, ngram
    del test_time, backoff, as_written

    origin: dict = field(default_factory=dict, compare=False)  # variable -> where it was set
    notes: tuple = field(default=(), compare=False)  # what resolving has to say

    @staticmethod
    def from_env(environ: Mapping[str, str]) -> "Config":
        """Resolve the variables of a process; ConfigError names variable, value and fix."""
        texts, notes = resolve(environ)
        values = {name.lower(): parse(name, text) for name, (text, _) in texts.items()}
        origin = {name: source for name, (_, source) in texts.items()}
        cfg = Config(**values, origin=origin, notes=tuple(notes))
        prefix = "eval_" if cfg.eval_only else ""
        run_id = cfg.run_id or f"{prefix}{cfg.record or 'own'}_seed{cfg.seed}"
        return replace(cfg, run_id=run_id).check()

    def check(self) -> "Config":
        """Refuse values that contradict each other (ConfigError); -> itself."""
        orders = range(2, self.ngram_max_order + 1)
        every = self.checkpoint_every
        proof = self.scorer == "documents"
        # the decoder has no pre-enrichment's change to boost alpha by, and the five prove nothing
        unproved = proof and self.codec_tokens and self.mixer == "cascade"
        chunk = self.ttt_enabled and self.ttt_chunk_tokens % self.window
        packs = not self.eval_only
        unclipped = not self.clip_sigmas
        ranged = self.compressor == "range"
        for name, broken, wanted in (
            *self.model_rules(),
            (
                "MIN_LR",
                packs and self.swa_enabled and self.min_lr >= SWA_BELOW,
                f"below {SWA_BELOW}, or SWA, which waits for less, never begins; or SWA_ENABLED=0",
            ),
            (
                "MIN_LR",
                packs and self.late_qat and 0 < self.late_qat_threshold <= self.min_lr,
                "below LATE_QAT_THRESHOLD, or late QAT never begins; or LATE_QAT=0",
            ),
            (
                "ATTN_IMPL",
                self.attn_impl in FLASH and self.doc_attention,
                "auto or sdpa with DOC_ATTENTION=1, which these kernels cannot",
            ),
            ("CLIP_QUANTILES", not all(0 < q <= 1 for q in self.clip_quantiles), "in (0, 1]"),
            ("EVAL_STRIDE", self.window % self.eval_stride, "a divisor of EVAL_SEQ_LEN"),
            ("NGRAM_MIN_ORDER", self.ngram_min_order not in orders, f"2 to {orders[-1]}"),
            ("CHECKPOINT_EVERY", not re.fullmatch("[0-9]{1,9}m?", every), "10 or 10m"),
            ("RUN_ID", not Path(self.run_id).name == self.run_id != "..", "a plain folder name"),
            ("RUN_ID", len(os.fsencode(self.run_id)) > 255, "a name of at most 255 bytes"),
            ("TTT_CHUNK_TOKENS", chunk, "a multiple of EVAL_SEQ_LEN"),
            ("INIT_FROM", self.init_from and self.eval_only, "left out with EVAL_ONLY"),
            ("SCORER", self.ttt_enabled and proof, "sliding with TTT_ENABLED=1"),
            ("NGRAM_MIXER", unproved, "blend, or CODEC_TOKENS=0"),
            ("TARGET_BYTES", packs and self.target_bytes and self.target_mb, "0 with TARGET_MB"),
            ("TARGET_BYTES", packs and self.target_bytes and unclipped, "0 with CLIP_SIGMAS=0"),
            ("TARGET_MB", packs and self.target_mb and ranged, "0 with COMPRESSOR=range"),
        ):
            if broken:
                raise ConfigError(f"{name}={show(getattr(self, name.lower()))}: must be {wanted}")
        return self

    def model_rules(self) -> Iterator[tuple[str, Any, str]]:
        """Of the model's shape: a variable, whether its value cannot be, what must be."""
        layers = self.num_layers
        head = self.model_dim // self.num_heads
        within = f"{-layers} to {layers - 1}"
        looped = self.looped_layers
        bad_loop = self.loop_layers and (not looped or looped[-1] >= layers)
        twice = self.depth_recurrence and self.loop_layers
        gates = self.gate_inputs if self.gated_attention else 0
        odd = self.model_dim % (2 * self.num_heads)
        yield "NUM_HEADS", odd, "so that MODEL_DIM / NUM_HEADS is even"
        yield "NUM_KV_HEADS", self.num_heads % self.num_kv_heads, "a divisor of NUM_HEADS"
        yield "ROPE_DIMS", self.rope_dims > head or self.rope_dims % 2, "even, <= a head"
        yield "MLP_MULT", self.mlp_mult * self.model_dim < 1, ">= 1 / MODEL_DIM"
        yield "BIGRAM_VOCAB_SIZE", self.bigram_vocab_size == 1, "0 or at least 2"
        yield "VE_LAYERS", not all(-layers <= i < layers for i in self.ve_layers), within
        yield "DEPTH_RECURRENCE", {*self.depth_recurrence} - {*range(layers)}, f"< {layers}"
        yield "LOOP_LAYERS", bad_loop, f"empty, or first-last, each 0 to {layers - 1}"
        yield "DEPTH_RECURRENCE", twice, "empty with LOOP_LAYERS, or LOOP_LAYERS empty"
        yield "GATE_INPUTS", gates > self.model_dim, "at most MODEL_DIM"
        yield "MODEL_DIM", count_parameters(self) >= 2**31, "smaller"

    @property
    def looped_layers(self) -> list[int]:
        """Those of LOOP_LAYERS, each from 0; [] where it names none."""
        found = re.fullmatch("(0|[1-9][0-9]{0,2})-(0|[1-9][0-9]{0,2})", self.loop_layers)
        return [*range(int(found[1]), int(found[2]) + 1)] if found else []

    @property
    def window(self) -> int:
        """Inputs of a scoring pass, or keys and values that each attention of a lane keeps."""
        return self.eval_seq_len or self.train_seq_len

    @property
    def learns_every(self) -> int:
        """Steps of lanes between two of Adam; 1 without LANE_TTT."""
        return self.lane_ttt_every if self.lane_ttt else 1

    @property
    def warm_up_steps(self) -> int:
        """Of lanes: WARM_UP_STEPS and more, up to a step of Adam."""
        return -(-WARM_UP_STEPS // self.learns_every) * self.learns_every

    @property
    def mixer(self) -> str:
        return self.ngram_mixer if self.ngram_enabled else "none"

    @property
    def value_layers(self) -> list[int]:
        """Layers with a value embedding, each from 0."""
        return [i % self.num_layers for i in self.ve_layers] if self.ve_enabled else []


VARIABLES = {f.name.upper(): f for f in fields(Config) if "setting" in f.metadata}
SETTINGS = {name: f.metadata["setting"] for name, f in VARIABLES.items()}


def stored_names(file: str) -> list[str]:
    """Field names of the settings that a kind of file holds: "artifact", "checkpoint", "stream"."""
    return [name.lower() for name, setting in SETTINGS.items() if file in setting.stored_in]


MODEL_FIELDS = stored_names("artifact")
PER_RUN = (  # of a configuration: where things lie and what to do with them
    *("DATA_PATH", "TOKENIZER_PATH", "EVAL_ONLY", "INIT_FROM", "DECODE", "RECORD", "RUN_ID"),
    *("DRY_RUN", "OVERWRITE", "RESUME", "CHECKPOINT_EVERY", "SAMPLE_TOKENS"),
)


def choices_of(name: str) -> list[str]:
    """The values that a variable is limited to, as texts; [] for any."""
    variable = VARIABLES[name]
    if variable.type is bool:
        return ["0", "1"]
    return list(get_args(variable.type)) if isinstance(variable.default, str) else []


def parse(name: str, text: str) -> Any:
    """Text of a variable -> value of its type, within its bounds; ConfigError."""
    default = VARIABLES[name].default
    setting = SETTINGS[name]
    choices = choices_of(name)
    if choices or isinstance(default, str):
        if choices and text not in choices:
            raise ConfigError(f"{name}={text!r}: must be {' or '.join(map(repr, choices))}")
        return text == "1" if isinstance(default, bool) else text
    try:
        if isinstance(default, tuple):
            element = get_args(VARIABLES[name].type)[0]
            values = tuple(map(element, text.split(",") if text or default else ()))
            if all(map(math.isfinite, values)):
                return values
            raise ValueError
        value = type(default)(text)
        if setting.least <= value <= setting.most:
            return value
    except ValueError:
        pass
    wanted = f"{type(default).__name__}, {setting.least} to {setting.most:g}"
    if isinstance(default, tuple):
        wanted = f"{kind_of(name)} with commas between them"
    raise ConfigError(f"{name}={text!r}: must be {wanted}, such as {show(default) or '1,2'}")


def is_legal(name: str, text: str) -> bool:
    """Can parse read it?"""
    with contextlib.suppress(ConfigError):
        parse(name, text)
        return True
    return False


def show(value: Any) -> str:
    """Value of a variable -> text that parse reads."""
    parts = value if isinstance(value, tuple) else (value,)
    return ",".join(str(int(x) if isinstance(x, bool) else x) for x in parts)


# Names: siblings' names, misspelt ones.

ANYWAY = {  # names whose one value is what this script always does
    "USE_BIGRAMHASH": "1",
    "TIE_EMBEDDINGS": "1",
    "NGRAM_ENTROPY": "1",
    "NGRAM_EVAL_ADAPTIVE_ALPHA": "1",
    "NGRAM_EVAL_ADAPTIVE_MODE": "sigmoid_raw_entropy",
    "NGRAM_TWO_PASS": "0",
    "TTT_FREEZE_BLOCKS": "0",
    "LAWA_ENABLED": "0",
    "MTP_NUM_HEADS": "0",
    "DTG_ENABLED": "0",
    "GATED_MLP": "0",
    "TRIGRAM": "0",
}
ALIASES = {  # name in a sibling script -> (our name, how its value is read)
    alias.name: (name, alias)
    for name, setting in SETTINGS.items()
    for alias in (Alias(a) if isinstance(a, str) else a for a in setting.aliases)
}
FOREIGN = {  # what other scripts call something like it -> our name
    **dict.fromkeys(("LR", "LEARNING_RATE"), "MATRIX_LR, SCALAR_LR and TIED_EMBED_LR"),
    **dict.fromkeys(("BATCH_SIZE", "TRAIN_BATCH_SIZE"), "TRAIN_BATCH_TOKENS, in tokens"),
    **dict.fromkeys(("MAX_STEPS", "MAX_ITERS", "NUM_STEPS", "NUM_ITERATIONS"), "ITERATIONS"),
    **dict.fromkeys(("EPOCHS", "NUM_EPOCHS", "NUM_TRAIN_EPOCHS"), "ITERATIONS, in steps"),
    **dict.fromkeys(("N_LAYER", "N_LAYERS"), "NUM_LAYERS"),
    **dict.fromkeys(("N_HEAD", "N_HEADS"), "NUM_HEADS"),
    **dict.fromkeys(("N_EMBD", "D_MODEL", "HIDDEN_SIZE"), "MODEL_DIM"),
    **dict.fromkeys(("BLOCK_SIZE", "SEQ_LEN", "CONTEXT_LENGTH", "MAX_SEQ_LEN"), "TRAIN_SEQ_LEN"),
    "WEIGHT_DECAY": "MUON_WD and ADAM_WD",
    "WARMDOWN_STEPS": "WARMDOWN_ITERS",
    "WARMDOWN_FRAC": "WARMDOWN_SHARE",
    **dict.fromkeys(("LOOP_START", "LOOP_END"), "LOOP_LAYERS, first-last"),
    "NUM_LOOPS": "LOOP_TIMES, which counts all passes",
    "ENABLE_LOOPING_AT": "LOOP_FROM",
    "PARALLEL_RESIDUAL_START": "PARALLEL_FROM",
    "EVAL_INTERVAL": "VAL_LOSS_EVERY",
    "LOG_INTERVAL": "TRAIN_LOG_EVERY",
    "SAVE_EVERY": "CHECKPOINT_EVERY",
    "OUT_DIR": "RUN_ID",
    "OUTPUT_DIR": "RUN_ID",
    "DATA_DIR": "DATA_PATH",
    "INIT_CHECKPOINT": "INIT_FROM",
}
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")  # what may end a line, and its like
OTHERS = {"NUM_THREADS", "OVERRIDE"}  # well-known names of others, near ours
FAMILIES = ("NGRAM_", "MUON_", "EMA_", "SWA_", "BIGRAM_", "TTT_", "XSA_", "QAT_", "CLIP_", "VE_")


def resolve(environ: Mapping[str, str]) -> tuple[dict[str, tuple[str, str]], list[str]]:
    """-> ({name: (text, origin)}, notes) of the variables that are given, by the environment or by
    a RECORD's config.env; ConfigError for what cannot be meant."""
    given, notes = canonical_names(environ)
    for name in VARIABLES.keys() & given.keys():
        if re.search("[\ud800-\udfff]", given[name]):  # how Python reads other bytes
            raise ConfigError(f"{name}={given[name]!r}: must be UTF-8, as the log is")
    notes += refuse_misspelt(given)
    record, path, why = choose_record(given)
    settings = read_record(path) if path else {}
    texts = {name: (text, f"RECORD={record}") for name, text in settings.items()}
    texts |= {name: (text, "env") for name, text in given.items() if name in VARIABLES}
    chosen = given if "WARMDOWN_ITERS" in given else settings
    if "WARMDOWN_ITERS" in chosen and "WARMDOWN_SHARE" not in chosen | given:
        texts["WARMDOWN_SHARE"] = ("0", "WARMDOWN_ITERS")  # who sets steps wants these
    texts["RECORD"] = (record, "env" if "RECORD" in given else "default")
    for name, folder in default_paths(given, record).items():
        texts[name] = (str(folder), "default")
    for name, (text, _) in texts.items():
        if CONTROL.search(text):
            raise ConfigError(f"{name}={text!r}: must be text without control characters")
    return texts, notes + why


def canonical_names(environ: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """Our names in the place of what the five scripts call the same thing, unless the two
    contradict each other (ConfigError); -> variables, a note for each alias."""
    known = ALIASES.keys() | ANYWAY.keys()
    given = {name: text for name, text in environ.items() if name not in known}
    notes = []
    for name in sorted(known & environ.keys()):
        if name in ANYWAY:
            if environ[name] != ANYWAY[name]:
                raise only_value(name, environ[name], [ANYWAY[name]])
            notes.append(f"{name}={environ[name]} is what this script does anyway")
            continue
        ours, alias = ALIASES[name]
        text = alias_value(alias, environ)
        before = given.setdefault(ours, text)
        if before != text and parse(ours, before) != parse(ours, text):
            both = f"{name}={environ[name]!r} contradicts {ours}={before!r}"
            raise ConfigError(f"{both}; fix: leave one out")
        notes.append(f"{name} is read as {ours}={text}")
    return given, notes


def alias_value(alias: Alias, environ: Mapping[str, str]) -> str:
    """What an alias that is set means as our variable's text; ConfigError."""
    text = environ[alias.name]
    if alias.values:
        if text not in alias.values:
            raise only_value(alias.name, text, list(alias.values))
        return alias.values[text]
    if alias.plus:
        other = environ.get(*alias.plus)
        try:
            return str(round(float(text) + float(other), 9))
        except ValueError:
            both = f"{alias.name}={text!r} + {alias.plus[0]}={other!r}"
            raise ConfigError(f"{both}: must be numbers") from None
    return text


def only_value(name: str, text: str, known: list[str]) -> ConfigError:
    return ConfigError(f"{name}={text!r}: only {' or '.join(known)} can be had; fix: leave it out")


def refuse_misspelt(names: Mapping[str, str]) -> list[str]:
    """ConfigError for what is nearly certainly a slip of a name of ours, by its value as well: two
    letters where both have 8; of our families one letter; the beginning of a name, of two words or
    of a family. -> notes on what is near, or of a family, but has a value that ours cannot have: it
    may be somebody else's, such as MODEL_ID=gpt2, and a password; and on what other scripts call
    something of ours, which containers set for these."""
    notes = [
        f"{name} is no variable of this script; what it may be meant for is {FOREIGN[name]}"
        for name in sorted(names.keys() & FOREIGN.keys())
    ]
    for name in sorted(names.keys() - VARIABLES.keys() - OTHERS - FOREIGN.keys()):
        family = name.startswith(FAMILIES)
        words = family or "_" in name
        begun = [ours for ours in VARIABLES if words and ours.startswith(f"{name}_")]
        distances = sorted((edit_distance(name, ours), ours) for ours in VARIABLES)
        near = begun + [
            ours
            for distance, ours in distances
            if distance <= (2 if min(len(name), len(ours)) >= 8 else int(family))
        ]
        if meant := [ours for ours in near if is_legal(ours, names[name])]:
            reason = f"{name}={names[name]!r} is not a variable"
            raise ConfigError(f"{reason}; did you mean {meant[0]}?")
        if family or near:
            hint = f"; did you mean {near[0]}?" if near else ""
            notes.append(f"{name} is no variable of this script, see --help{hint}")
    return notes


def refuse_arguments(arguments: Sequence[str]) -> None:
    """ConfigError that shows how variables say the same: --iterations 5, --iterations=5 and
    iterations=5 are all meant as ITERATIONS=5."""
    words = [part for argument in arguments for part in argument.split("=", 1)]
    pairs = []
    foreign = []
    for word, value in zip(words, [*words, "--"][1:], strict=True):
        name = word.lstrip("-").replace("-", "_").upper()
        if name in VARIABLES or name in ALIASES:
            value = "1" if value.startswith("--") else value  # --dry-run
            pairs.append(f"{name}={shlex.quote(value)}")
        elif name in FOREIGN:
            foreign.append(f"{word} is {FOREIGN[name]} here, ")
    if arguments:
        given = shlex.join(arguments)
        fix = f"{' '.join(pairs)} python {CODE.name}, or " if pairs else ""
        fix = "".join(foreign) + fix
        raise ConfigError(f"argument {given}: variables configure a run; fix: {fix}see --help")


def edit_distance(a: str, b: str) -> int:
    """Least number of insertions, deletions and replacements (Levenshtein)."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal = row[0]
        row[0] = i
        for j, y in enumerate(b, 1):
            replaced = diagonal + (x != y)
            diagonal = row[j]
            row[j] = min(row[j] + 1, row[j - 1] + 1, replaced)
    return row[-1]


# RECORDs and default data.

SAMPLE_DATA = ROOT / "data/datasets/sample_en"
FINEWEB_DATA = ROOT / "data/datasets/fineweb10B_sp1024"
FINEWEB_TOKENIZER = ROOT / "data/tokenizers/fineweb_1024_bpe.model"


def read_pairs(path: Path) -> dict[str, str]:
    """The NAME=value lines of a file, without comments; ConfigError."""
    try:
        lines = read_regular(path, MOST_TEXT_BYTES).decode().splitlines()
    except UnicodeDecodeError as wrong:
        raise ConfigError(f"{path}: not UTF-8 ({wrong}); fix: get it again") from None
    return parse_pairs(lines, str(path))


def parse_pairs(lines: Iterable[str], source: str) -> dict[str, str]:
    """NAME=value lines -> values by name; empty lines and comments say nothing. ConfigError names
    `source`, where they are from."""
    pairs = {}
    for line in lines:
        name, equals, value = line.partition("=")
        if not line.strip() or line.startswith("#"):
            continue
        if not equals:
            raise ConfigError(f"{source}: {line!r} is not NAME=value; fix: write it so, or # it")
        if name in pairs:
            raise ConfigError(f"{source}: {name} stands twice; fix: leave one out")
        pairs[name] = value.strip()
    return pairs


def known_records() -> dict[str, Path]:
    """Name -> path of its config.env; a seed of a submission is none."""
    paths = (ROOT / "records").glob("**/config.env")
    return {path.parent.name: path for path in paths if not path.parent.name.startswith("seed_")}


def find_record(name: str) -> tuple[str, Path]:
    """The RECORD of this name, or the one whose name begins so; ConfigError."""
    known = known_records()
    if not (ROOT / "records").is_dir():
        fix = "give its settings as variables, or run the script in its repository"
        raise ConfigError(f"RECORD={name!r}: no records/ beside {CODE.name}; fix: {fix}")
    found = [name] if name in known else [folder for folder in known if folder.startswith(name)]
    if len(found) != 1:
        raise ConfigError(f"RECORD={name!r}: {len(found)} fit; fix: one of {sorted(known)}")
    return found[0], known[found[0]]


def read_record(path: Path) -> dict[str, str]:
    """The settings of a config.env; ConfigError for what is none."""
    pairs = read_pairs(path)
    for name, text in pairs.items():
        if name not in VARIABLES or name in PER_RUN:
            raise ConfigError(f"{path}: {name}={text} is not a setting; fix: leave it out there")
    return pairs


def choose_record(given: Mapping[str, str]) -> tuple[str, Path | None, list[str]]:
    """-> (name, "" for the defaults; its config.env; why, where nobody asked for it).

    RECORD, else the config.env that lies beside the script (a submission runs itself), else tiny
    where CUDA or data are missing and the repository is there.
    """
    if given.get("RECORD"):
        return (*find_record(given["RECORD"]), [])
    beside = ROOT / "config.env"
    if beside.is_file():
        name = ROOT.name.encode("utf-8", "replace").decode()
        return name, beside, ["no RECORD: config.env beside the script"]
    cuda = given.get("DEVICE") != "cpu" and torch.cuda.is_available()
    if cuda and (given.get("DATA_PATH") or has_fineweb()):
        return "", None, ["no RECORD: own configuration, since CUDA and data are here"]
    missing = f"no FineWeb data in {FINEWEB_DATA}" if cuda else "no CUDA device"
    ranks = launch_numbers(given)["WORLD_SIZE"]
    if cuda and ranks > 1 and given.get("DRY_RUN", "0") == "0":
        fix = "python data/download_fineweb.py, or set DATA_PATH"
        raise ConfigError(f"{missing}; fix: {fix}")
    if "tiny" not in known_records():
        return "", None, ["no RECORD: the defaults, since no records/tiny is beside the script"]
    return (*find_record("tiny"), [f"no RECORD: tiny, since there is {missing}"])


def has_fineweb() -> bool:
    """A download that was cut off leaves a partial file or no validation shard."""
    found = {pattern: any(FINEWEB_DATA.glob(pattern)) for pattern in ("*_val_*.bin", ".*.partial")}
    return found["*_val_*.bin"] and not found[".*.partial"]


def default_paths(given: Mapping[str, str], record: str) -> dict[str, Path]:
    """The data folder and its tokenizer, where none is given. Upstream's lies elsewhere, and is
    that of no other data."""
    fineweb = has_fineweb() and record != "tiny"
    folder = Path(given.get("DATA_PATH") or (FINEWEB_DATA if fineweb else SAMPLE_DATA))
    tokenizer = folder / "tokenizer.model"
    if folder.resolve().name == FINEWEB_DATA.name and not tokenizer.exists():
        tokenizer = FINEWEB_TOKENIZER
    paths = dict(DATA_PATH=folder, TOKENIZER_PATH=tokenizer)
    return {name: path for name, path in paths.items() if not given.get(name)}


def prepare_sample(folder: str | Path) -> None:
    """Tokenise the embedded text, if that is the folder, on its first use; UserError."""
    if Path(folder) == SAMPLE_DATA and not (SAMPLE_DATA / "tokenizer.model").exists():
        program = ROOT / "data/sample/prepare.py"
        if not program.exists():
            raise UserError(f"no data: {program} is not here; fix: set DATA_PATH to your shards")
        command = [sys.executable, program, "--out", SAMPLE_DATA]
        if run_program(command):
            fix = "python data/sample/prepare.py --out DIR, then DATA_PATH=DIR"
            raise UserError(f"DATA_PATH={str(folder)!r}: not prepared, see above; fix: {fix}")


OPTIONAL_PACKAGES = {  # what a run lacks without them
    "constriction": "no proof and no stream.bin, CODEC_TOKENS=0; zstd packs for COMPRESSOR=range",
    "safetensors": "no checkpoints, CHECKPOINT_EVERY=0; a signal ends the run without one",
    "numba": "n-gram counts by torch, slower, and no known text",
    "matplotlib": "no picture",
    "tqdm": "no progress bar",
}
OPTIONAL_PROGRAMS = {  # of the repository
    "records/tools/plot.py": "no picture",
    "records/tools/as_written.py": "no pseudo score",
}


def without_missing_parts(cfg: Config) -> Config:
    """The configuration that can run here: what a missing package or file takes away is off, each
    said in a note before step 0; preflight refuses what nothing can replace."""
    lost = [name for name in OPTIONAL_PACKAGES if not has_package(name)]
    notes = [f"package {name} is missing: {OPTIONAL_PACKAGES[name]}" for name in lost]
    for program, effect in OPTIONAL_PROGRAMS.items():
        wanted = cfg.ngram_scheme or program != "records/tools/as_written.py"
        if wanted and not (ROOT / program).exists():
            notes.append(f"{program} is not beside the script: {effect}")
    changes: dict[str, Any] = {}
    origin = dict(cfg.origin)
    if "constriction" in lost:
        changes["codec_tokens"] = 0
        origin["CODEC_TOKENS"] = "no constriction"
        if cfg.compressor == "range" and not cfg.eval_only:
            changes["compressor"] = "zstd"
            origin["COMPRESSOR"] = "no constriction"
    if "numba" in lost and not cfg.eval_only:  # a dictionary of it would take 3 KB a token
        changes["known_tokens"] = 0
        origin["KNOWN_TOKENS"] = "no numba"
    if "safetensors" in lost:
        changes["checkpoint_every"] = "0"
        origin["CHECKPOINT_EVERY"] = "no safetensors"
    return replace(cfg, **changes, origin=origin, notes=cfg.notes + tuple(notes))


# --help, DRY_RUN.

HELP_WIDTHS = (26, 13, 13)  # of the table's columns but the last, in a page of 100
HELP_GAP = "  "
HELP_HEAD = """Environment variables: name, type, default, meaning. 0|1: off or on. Numbers are
at least 0 where nothing else is said. Lists are 1,2,3; DRY_RUN=1 shows what a run would use."""
HELP_EXAMPLES = """
Examples
  RUN_ID=short ITERATIONS=200 WARMDOWN_ITERS=120 python train_gpt.py
  RECORD=pr864 SEED=7 torchrun --standalone --nproc_per_node=8 train_gpt.py
  DATA_PATH=data/datasets/mine RUN_ID=mine python train_gpt.py
  EVAL_ONLY=runs/mine/artifact.bin RUN_ID=again python train_gpt.py"""


def print_help() -> None:
    """A row for each variable, then the RECORDs and examples, in at most 100 columns."""
    lines = [HELP_HEAD]
    for title, rows in itertools.groupby(SETTINGS, lambda name: SETTINGS[name].group):
        lines += ["", title]
        for name in rows:
            lines += help_row(name)
    lines += ["", "Values of RECORD, their beginning is enough"]
    for name, path in sorted(known_records().items()):
        text = path.read_text(encoding="utf-8", errors="replace")
        comment = " ".join(re.findall(r"^# (.+)", text, re.MULTILINE))
        sentence = re.match(r".+?\.(?= |$)", comment)
        first = sentence[0].removeprefix(f"{name}: ") if sentence else str(path.parent)
        lines += textwrap.wrap(f"  {name:<8}{first}", 100, subsequent_indent=" " * 10)
    try:
        print(*lines, HELP_EXAMPLES, sep="\n", flush=True)
    except BrokenPipeError:  # the reader, head or less, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def help_row(name: str) -> Iterator[str]:
    """The lines of a variable; what is too long for its column goes on below, in the same one."""
    default = show(VARIABLES[name].default).replace(",", ", ") or "-"
    meaning = SETTINGS[name].meaning
    choices = [choice for choice in choices_of(name) if choice]
    if choices and VARIABLES[name].type is not bool:
        meaning = f"{'|'.join(choices)}: {meaning}"
    widths = (*HELP_WIDTHS, 100 - sum(HELP_WIDTHS) - len(HELP_GAP) * len(HELP_WIDTHS))
    columns = zip((name, kind_of(name), default, meaning), widths, strict=True)
    cells = [textwrap.wrap(text, width) for text, width in columns]
    cells[2] = [cell.replace(", ", ",") for cell in cells[2]]  # as it would be given
    for row in itertools.zip_longest(*cells, fillvalue=""):
        yield HELP_GAP.join(map(str.ljust, row, widths)).rstrip()


def kind_of(name: str) -> str:
    """Type of a variable in a word or two, with its bounds if they are not the usual ones."""
    variable = VARIABLES[name]
    least = SETTINGS[name].least
    most = SETTINGS[name].most
    if isinstance(variable.default, str):
        return "choice" if choices_of(name) else "text"
    if isinstance(variable.default, bool):
        return "0|1"
    if isinstance(variable.default, tuple):
        return f"{get_args(variable.type)[0].__name__}s"
    word = type(variable.default).__name__
    if least < -1:
        return f"any {word}"
    if 0 < least < 1:
        return f"{word} > 0"
    if most < 2**62:
        return f"{least} to {most}"
    return f"{word} >= {least}" if least else word


LOGGED_PACKAGES = ("sentencepiece", "zstandard", "numba", "constriction", "matplotlib")


def announce(rt: "Runtime", cfg: Config) -> None:
    """Log where, with what, and every value with its origin: those that differ from the defaults a
    line each, the environment's first."""
    for note in cfg.notes:
        rt.log("note", note)
    values = values_with_origin(cfg)
    rt.log("config", **{name: f"{text}({origin})" for name, (text, origin) in values.items()})
    for name, (text, origin) in sorted(values.items(), key=lambda item: item[1][1] != "env"):
        if origin == "env" or text != show(VARIABLES[name].default):
            rt.log("setting", f"{name}={text}", origin=origin)
    log_hardware(rt)


def log_hardware(rt: "Runtime") -> None:
    found = {name: int(has_package(name)) for name in LOGGED_PACKAGES}
    versions = dict(python=platform.python_version(), torch=torch.__version__)
    kind = torch.cuda.get_device_name() if rt.cuda else f"cpu {platform.machine()}"
    threads = dict(threads=torch.get_num_threads(), threads_by=rt.threads_by)
    rt.log("hardware", f"{rt.world_size} x {kind}", **threads, **versions, **found)


def values_with_origin(cfg: Config) -> dict[str, tuple[str, str]]:
    """Variable -> its value as text, where that was set."""
    return {
        name: (show(getattr(cfg, name.lower())), cfg.origin.get(name, "default"))
        for name in VARIABLES
    }


def print_settings(rt: "Runtime", cfg: Config) -> None:
    """All of them in columns: value, origin; an asterisk where one is not the default."""
    values = values_with_origin(cfg)
    for title, names in itertools.groupby(SETTINGS, lambda name: SETTINGS[name].group):
        rt.show(f"\n{title}")
        for name in names:
            text, origin = values[name]
            mark = " " if text == show(VARIABLES[name].default) else "*"
            rt.show(f"{mark} {name:<27} {text or '-':<24} {origin}")
    rt.show("")


def techniques(cfg: Config) -> dict[str, bool]:
    """What has a part in the weights that are scored: a switch that is on does not where another
    setting leaves it none."""
    swa = cfg.swa_enabled and (cfg.swa_weight > 0 or not cfg.ema_enabled)
    all_swa = swa and cfg.swa_weight == 1 and cfg.swa_source == "raw"  # once there are snapshots
    return dict(
        qat=cfg.qat_enabled,
        late_qat=cfg.late_qat and cfg.late_qat_threshold > 0 and not cfg.qat_enabled,
        ema=cfg.ema_enabled and not all_swa,
        swa=swa,
        pruning=cfg.target_mb > 0,
        ttt=cfg.ttt_enabled,
        lane_ttt=cfg.lane_ttt and cfg.scorer == "documents",
    )


def print_dry_run(rt: "Runtime", cfg: Config) -> None:
    """What would run, without data or tokenizer: configuration, parameters, optimizers, techniques,
    bytes."""
    beginning = Beginning.read(cfg) if cfg.init_from else None
    known = int(beginning.settings["VOCAB_SIZE"]) if beginning else 1024
    cfg = replace(cfg, vocab_size=cfg.vocab_size or known)
    if beginning:
        beginning.check_shapes(cfg)
    for note in cfg.notes:
        rt.log("note", note)
    print_settings(rt, cfg)
    log_hardware(rt)
    micro_batches(cfg, rt)
    rt.log("model_params", count_parameters(cfg))
    for name, members in optimizer_groups(cfg).items():
        parameters = ",".join(members.names)
        rt.log(
            "optimizer_group", name, rate=members.rate, decay=members.decay, parameters=parameters
        )
    rt.log("techniques", **{name: "on" if on else "off" for name, on in techniques(cfg).items()})
    payload = payload_type(parameter_specs(cfg)).itemsize
    packed = len(pack_script(SCRIPT))
    sizes = dict(code=len(SCRIPT), packed=packed, uncompressed_weights=payload)
    rt.log("byte_budget", **sizes, cap=CAP_BYTES)


# -----------------------------------------------------------------------------
# 3. Runtime
# Ranks, device, clocks, signals, run folder and log: one object, handed down.

LAUNCH = dict(RANK=0, LOCAL_RANK=0, WORLD_SIZE=1, LOCAL_WORLD_SIZE=1)  # torchrun's variables
RENDEZVOUS = (*LAUNCH, "MASTER_ADDR", "MASTER_PORT")  # what ranks need to find each other
# What warns of an end: of a session, by Slurm's --signal, by `ulimit -t` (every second).
WARNING_NAMES = ("SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")  # none on Windows
WARNINGS = [getattr(signal, name) for name in WARNING_NAMES if hasattr(signal, name)]
SIGNALS = [signal.SIGINT, signal.SIGTERM, *WARNINGS]
CGROUPS = Path("/sys/fs/cgroup")
LOGS = ("log.txt", "metrics.jsonl")
OUTPUTS = (  # of a run, the mark of a finished one first
    *("submission.json", *LOGS, "artifact.bin", "train_gpt.py", "tokenizer.model", "config.env"),
    *("blocks.npz", "scores.npz", "scores_ema.npz", "stream.bin", "report.png"),
)


def log_line(key: str, value: Any, values: Mapping[str, Any]) -> str:
    """`key:value name:x`, one line whatever is in it; floats in full in final lines only."""
    words = [key if value is None else f"{key}:{value}"]
    if key == "config":  # those that matter have a line each, and all are in config.env
        values = dict(settings=len(values))
    for name, x in values.items():
        unit = "ms" if name.endswith("_ms") else ""
        if isinstance(x, float) and not key.startswith("final_"):
            x = f"{x:.2f}" if unit else f"{x:.4f}"
        words.append(f"{name.removesuffix('_ms')}:{x}{unit}")
    return CONTROL.sub(lambda found: ascii(found[0])[1:-1], " ".join(words))


class Runtime:
    """A process among its ranks: device, run folder, log, clocks."""

    def __init__(self, cfg: Config):
        """ConfigError where DEVICE is not here. Starts nothing, see `start`."""
        self.cfg = cfg
        self.folder = Path("runs") / cfg.run_id
        launched = launch_numbers(os.environ)
        self.rank = launched["RANK"]
        self.world_size = launched["WORLD_SIZE"]
        self.local_ranks = launched["LOCAL_WORLD_SIZE"]
        self.cuda = cfg.device != "cpu" and torch.cuda.is_available()
        if cfg.device == "cuda" and not self.cuda:
            raise ConfigError("DEVICE=cuda: torch sees no CUDA device; fix: DEVICE=cpu")
        if self.cuda and launched["LOCAL_RANK"] >= torch.cuda.device_count():
            most = torch.cuda.device_count()
            reason = f"LOCAL_RANK={launched['LOCAL_RANK']}: torch sees {most} CUDA devices"
            raise ConfigError(f"{reason}; fix: --nproc_per_node={most}, or DEVICE=cpu")
        self.device = torch.device(f"cuda:{launched['LOCAL_RANK']}" if self.cuda else "cpu")
        self.finished = (self.folder / "submission.json").exists()
        self.began = time.perf_counter()
        self.seconds = dict(data=0.0, train=0.0, eval=0.0, proof=0.0)
        self.flash_alone = cfg.attn_impl in FLASH
        self.pace: dict[str, float] = {}  # of passes that the warm-up has measured, seconds each
        self.logs: list[LogFile] = []
        self.told_of_loss = False
        self.received: list[int] = []  # signals
        self.unsaved = False  # trained weights lie in no file yet
        self.lock: Any = None
        self.essential: dict[str, bytes] = {}  # files of the folder, see `write`
        self.threads_by = "cores"  # what limits them
        self.bar = ProgressBar(self)

    def start(self) -> None:
        """Threads, memory, seed, kernels, process group; ConfigError."""
        threads, self.threads_by = choose_threads(self.local_ranks)
        torch.set_num_threads(threads)
        torch.manual_seed(self.cfg.seed)
        self.use_device()
        if not self.cuda:
            keep_freed_memory()
        if self.cuda:
            torch.set_float32_matmul_precision("high")
        if self.cfg.attn_impl in FLASH:
            use_attention(self.cfg.attn_impl, self.cuda)
        if self.world_size > 1:
            absent = ", ".join(name for name in RENDEZVOUS if name not in os.environ)
            if absent:
                fix = f"torchrun --nproc_per_node={self.world_size}, or unset WORLD_SIZE"
                raise ConfigError(f"WORLD_SIZE={self.world_size} without {absent}; fix: {fix}")
            require_address(os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"])
            backends = "cpu:gloo,cuda:nccl" if self.cuda else "gloo"
            try:
                dist.init_process_group(backends, timeout=timedelta(minutes=15))
            except (dist.DistError, ValueError) as error:
                where = f"MASTER_ADDR={os.environ['MASTER_ADDR']!r}: {error}".splitlines()[0]
                raise ConfigError(f"{where}; fix: start it by torchrun") from error
            self.patient = dist.new_group(backend="gloo", timeout=timedelta(days=1))

    def use_device(self) -> None:
        """Make it this thread's."""
        if self.cuda:
            torch.cuda.set_device(self.device)

    def log(self, key: str, value: Any = None, **values: Any) -> None:
        """A line on rank 0: to standard output, log.txt and, as an object, metrics.jsonl."""
        if self.rank == 0:
            line = log_line(key, value, values)
            entry = json.dumps(dict(key=key, value=value) | values)
            self.bar.print(line)
            for file, text in zip(self.logs, (line, entry), strict=False):
                file.add(text)
            if self.logs and Screen.lost and not self.told_of_loss:
                self.told_of_loss = True
                where = self.logs[0].path
                self.log("note", f"{Screen.lost[0]}; the run goes on, its log is {where}")

    def show(self, text: str) -> None:
        """Lines on rank 0 that are for who looks on, and in no log."""
        if self.rank == 0:
            self.bar.print(text)

    def stage(self, name: str) -> None:
        """What begins now, for lines that say so where it takes long; "": others tell."""
        self.bar.heartbeat.begin(name)

    def open_logs(self) -> None:
        """From here on lines go to the run folder, too."""
        self.logs = [LogFile(self.folder / name) for name in LOGS]

    def tick(self, stage: str, done: int, total: int) -> None:
        """`done` of `total` steps, windows or tokens of a stage are behind us."""
        self.bar.tick(stage, done, total)

    def sum(self, array: np.ndarray, how: Any = dist.ReduceOp.SUM) -> np.ndarray:
        """Over ranks, in place, through gloo, without waiting for the device."""
        if self.world_size > 1:
            dist.all_reduce(torch.from_numpy(array), how)
        return array

    def largest(self, *values: float) -> np.ndarray:
        """Of each value the largest of all ranks, float64 (len(values),)."""
        return self.start_largest(*values)()

    def start_largest(self, *values: float) -> Callable[[], np.ndarray]:
        """-> function that waits for what `largest` gives."""
        found = np.array(values, float)
        if self.world_size == 1:
            return lambda: found
        work = dist.all_reduce(torch.from_numpy(found), dist.ReduceOp.MAX, async_op=True)

        def finish() -> np.ndarray:
            work.wait()
            return found

        return finish

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """Every rank's, in their order, on every rank."""
        found = [torch.empty_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(found, tensor)
        return found

    def barrier(self) -> None:
        """Wait for all ranks, however long rank 0 takes."""
        if self.world_size > 1:
            dist.barrier(self.patient)

    def share(self, path: Path) -> bytes:
        """Rank 0's file, on every rank: hosts share no disk."""
        mine = np.fromfile(path, np.uint8) if self.rank == 0 else np.zeros(0, np.uint8)
        size = int(self.largest(len(mine)).item())
        return self.sum(np.pad(mine, (0, size - len(mine)))).tobytes()

    @contextlib.contextmanager
    def signals(self) -> Iterator[list[int]]:
        """-> the first of SIGNALS that came. It raises Interrupted, where work is unsaved only once
        that lies in a file. A later one kills, but no warning does, and no SIGTERM after a
        warning: when a session ends, shell and kernel both send SIGHUP, and torchrun, hit twice,
        adds SIGTERM. One that is ignored from the start (nohup, trap '' INT) stays so."""
        previous = {}
        together: list[int] = []  # the first one, while its handler runs

        def handle(number: int, _: Any) -> None:
            if together:
                return
            warned = (self.received or [number])[0] in WARNINGS
            spared = WARNINGS + [signal.SIGTERM] * warned
            if not self.received:
                self.received.append(number)
                # What came with this one, in an order that nobody knows, is handed over while it is
                # raised once more; after the handlers have changed Python would stumble over it.
                together.append(number)
                signal.raise_signal(number)
                for each in previous:
                    signal.signal(each, signal.SIG_IGN if each in spared else signal.SIG_DFL)
                together.clear()
                if not self.unsaved:
                    self.release_signals()
            elif number not in spared:
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)

        for each in SIGNALS:
            if signal.getsignal(each) not in (signal.SIG_IGN, None):
                previous[each] = signal.signal(each, handle)
        try:
            yield self.received
        finally:
            for each, handler in previous.items():
                signal.signal(each, handler)

    def hold_signals(self) -> None:
        """From here on a signal waits: what it would end lies in no file."""
        self.unsaved = True

    def release_signals(self) -> None:
        """It does; Interrupted where a signal has waited."""
        self.unsaved = False
        if self.received:
            raise Interrupted(128 + self.received[0])

    def kept(self) -> str:
        """How to go on from what an interrupted run leaves."""
        if (self.folder / "submission.json").exists():
            return f"{self.folder} is finished, but perhaps for its picture"
        if saved := sorted(self.folder.glob("checkpoint/step_*.json")):
            return f"{saved[-1].stem} is kept, RESUME=auto goes on"
        artifact = self.folder / "artifact.bin"
        return f"EVAL_ONLY={artifact} scores it" if artifact.exists() else "nothing to keep"

    def take_folder(self) -> None:
        """The run folder, this process's alone until `close` or its end; ConfigError."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = self.lock or lock_folder(self)

    def write(self, name: str, content: bytes) -> None:
        """A file without which the run folder is worth nothing."""
        self.essential[name] = content
        write_atomically(self.folder / name, content)

    def mend_folder(self) -> None:
        """On rank 0: what somebody has deleted is written again, logs included; in another folder
        where another run has taken this one."""
        lock = self.folder / ".lock"
        names = [*self.essential, *(log.path.name for log in self.logs)]
        gone = [name for name in names if not (self.folder / name).exists()]
        if self.lock and not is_open_as(self.lock, lock):
            if lock.exists() or (self.folder / "submission.json").exists():
                self.folder = self.folder.with_name(f"{self.folder.name}_{os.getpid()}")
            self.lock.close()
            self.lock = None
            self.take_folder()
            gone = names
        for name, content in self.essential.items():
            if name in gone:
                write_atomically(self.folder / name, content)
        for log in self.logs:
            if log.path.name in gone:
                log.restore(self.folder)
        if gone:
            self.log("note", f"deleted meanwhile, written again in {self.folder}: {' '.join(gone)}")

    def close(self) -> None:
        """The bar, and the lock on the run folder."""
        self.bar.close()
        if self.lock:
            path = self.folder / ".lock"
            with contextlib.suppress(OSError):
                if is_open_as(self.lock, path):
                    path.unlink()
            self.lock.close()
            self.lock = None

    @contextlib.contextmanager
    def clock(self, stage: str) -> Iterator[None]:
        """Add the block's seconds to a budget, "train" or "eval"."""
        began = time.perf_counter()
        yield
        self.seconds[stage] += time.perf_counter() - began

    def measure(self, name: str, passes: int, run: Callable[[], Any]) -> None:
        """Keep how long one of so many passes takes, which `run` makes and waits for."""
        began = time.perf_counter()
        run()
        self.pace[name] = (time.perf_counter() - began) / passes

    def expect(self, stage: str, name: str, passes: int) -> None:
        """Before a stage of the evaluation: how long it will take, where that was measured."""
        if name in self.pace:
            seconds = passes * self.pace[name]
            self.log("expect", stage, seconds=seconds, cap=CAP_SECONDS)

    def autocast(self) -> torch.autocast:
        """bf16 on CUDA; fp32 on the CPU, where bf16 is slower."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.cuda)

    def attention(self) -> contextlib.AbstractContextManager:
        """Around passes over rows: the kernels of ATTN_IMPL=fa3|fa4 alone, which torch would try
        only after cuDNN's; else torch's choice."""
        if self.flash_alone:
            return sdpa_kernel(SDPBackend.FLASH_ATTENTION)
        return contextlib.nullcontext()

    def graph(self, function: Callable, *inputs: Tensor) -> Callable:
        """On CUDA one launch, captured here with these inputs, after the function has run once,
        which its caller may have to undo; the next call overwrites inputs and outputs. Elsewhere
        the function itself."""
        if not self.cuda:
            return function
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with self.torch_attention():
            with torch.cuda.stream(torch.cuda.Stream()):
                function(*inputs)  # what a first use makes is not captured
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # not NCCL's threads
                outputs = function(*inputs)

        def replay(*values: Tensor) -> Any:
            if values:
                torch._foreach_copy_(inputs, values)
            graph.replay()
            return outputs

        return replay

    def compile(self, function: Callable, repeatable: bool = False) -> Callable:
        """On CUDA compiled, with no break; elsewhere the function itself. `repeatable`: to the same
        kernels in every process, none chosen by its speed there, where this torch can."""
        return compile_for_cuda(function, repeatable) if self.cuda else function

    @contextlib.contextmanager
    def torch_attention(self) -> Iterator[None]:
        """Lanes are captured with torch's own flash kernels, under ATTN_IMPL=fa3|fa4 as well: the
        decoder, a process that is not told of it, must run the same."""
        restore = getattr(torch.nn.attention, "restore_flash_attention_impl", None)
        replaced = self.flash_alone and restore is not None
        if replaced:
            restore()
        try:
            yield
        finally:
            if replaced:
                use_attention(self.cfg.attn_impl, self.cuda)

    def release_memory(self) -> None:
        """Give the device what nobody holds any more, for another process."""
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
        else:
            malloc_trim(0)

    def peak_memory(self) -> int:
        """MB (10^6 bytes) that this rank held at most: allocated on its GPU, else resident."""
        if self.cuda:
            return torch.cuda.max_memory_allocated(self.device) // 10**6
        import resource  # no module of Windows

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB, on macOS bytes
        return most * (1 if sys.platform == "darwin" else 1024) // 10**6


def compile_for_cuda(function: Callable, repeatable: bool) -> Callable:
    import torch._dynamo.config as dynamo  # take seconds
    import torch._inductor.config as inductor

    dynamo.recompile_limit = 64  # of shapes of one function, instead of 8
    options = (
        dict(deterministic=True) if repeatable and hasattr(inductor, "deterministic") else None
    )
    return torch.compile(function, dynamic=False, fullgraph=True, options=options)


class Reading:
    """A number on its way from the device to the host, which need not wait for it yet."""

    def __init__(self, value: Tensor):
        self.host = torch.empty((), dtype=value.dtype, pin_memory=value.is_cuda)
        self.host.copy_(value, non_blocking=True)
        self.arrival = torch.cuda.Event() if value.is_cuda else None
        if self.arrival:
            self.arrival.record()

    def get(self) -> float:
        """Wait for it."""
        if self.arrival:
            self.arrival.synchronize()
        return self.host.item()


def launch_numbers(environ: Mapping[str, str]) -> dict[str, int]:
    """torchrun's variables, those of a process alone where it did not set them; ConfigError."""
    numbers = dict(LAUNCH)
    for name, alone in LAUNCH.items():
        text = environ.get(name, str(alone))
        if not re.fullmatch("[0-9]{1,6}", text) or int(text) < alone:
            fix = f"unset {name}, or start it by torchrun"
            raise ConfigError(f"{name}={text!r}: must be int, {alone} or more; fix: {fix}")
        numbers[name] = int(text)
    for rank, ranks in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        if numbers[rank] >= numbers[ranks]:
            both = f"{rank}={numbers[rank]}: must be below {ranks}={numbers[ranks]}"
            raise ConfigError(f"{both}; fix: unset them, or start it by torchrun")
    return numbers


def require_address(host: str, port: str) -> None:
    """ConfigError for what no rank can listen at: torch would wait for it, silently."""
    fix = "start it by torchrun"
    if not re.fullmatch("[0-9]{1,5}", port) or not 0 < int(port) < 2**16:
        raise ConfigError(f"MASTER_PORT={port!r}: must be int, 1 to 65535; fix: {fix}")
    try:
        socket.getaddrinfo(host or ".", port)
    except (OSError, UnicodeError) as error:
        fix = f"the name or address of rank 0's host, or {fix}"
        raise ConfigError(f"MASTER_ADDR={host!r}: no such host ({error}); fix: {fix}") from error


FLASH = ("fa3", "fa4")  # ATTN_IMPL: FlashAttention-3 or -4, in packages of their own


def use_attention(name: str, cuda: bool) -> None:
    """FlashAttention-3 or -4 behind torch's attention; ConfigError where it cannot be had."""
    try:
        if not cuda:
            raise RuntimeError("needs a CUDA device")
        torch.nn.attention.activate_flash_attention_impl(name.upper())
    except (ImportError, AttributeError, RuntimeError, ValueError) as error:
        fix = "ATTN_IMPL=auto, or see requirements.txt"
        raise ConfigError(f"ATTN_IMPL={name}: {error}; fix: {fix}") from error


def choose_threads(local_ranks: int) -> tuple[int, str]:
    """-> threads of this process, what limits them. Cores, affinity and the quota of the control
    group are this host's, shared by its ranks; OMP_NUM_THREADS is of each process."""
    limits: dict[str, float] = dict(cores=os.cpu_count() or 1)
    if hasattr(os, "sched_getaffinity"):  # Linux
        limits["affinity"] = len(os.sched_getaffinity(0))
    quotas = [*cgroup_numbers("cpu.max"), *cgroup_numbers("cpu.cfs_quota_us", "cpu.cfs_period_us")]
    limits["cpu_quota"] = min((a / b for a, b in quotas if a > 0), default=math.inf)
    limits["OMP_NUM_THREADS"] = (given_threads() or math.inf) * local_ranks
    by = min(limits, key=lambda name: limits[name])
    return max(1, int(limits[by] // local_ranks)), by


def keep_freed_memory() -> None:
    """Let the next tensor have the memory of the last one. glibc gives large blocks back to the
    system as they are freed, and each new one then comes page by page, cleared: 9,000 pages in a
    step of `tiny`. One arena, as the thread of the backward pass frees what the forward's took."""
    for option, value in MALLOC.items():
        mallopt(option, value)


# glibc's M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD and M_ARENA_MAX.
MALLOC = {-1: 2**31 - 1, -2: 2**26, -3: 2**25, -8: 1}


def from_glibc(name: str) -> Callable[..., Any]:
    """A function of glibc; elsewhere one that does nothing."""
    if platform.libc_ver()[0] != "glibc":
        return lambda *_: None
    return getattr(ctypes.CDLL(None), name)


mallopt = from_glibc("mallopt")
malloc_trim = from_glibc("malloc_trim")


def given_threads() -> int:
    """What the user wants by OMP_NUM_THREADS; 0: nothing. torchrun sets 1 for several workers where
    it is unset: then it is not among the variables that torchrun, our parent, was started with.
    Where these cannot be read (no Linux), a 1 under torchrun is taken for its own."""
    text = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    if text == "1" and "TORCHELASTIC_RUN_ID" in os.environ:
        parent = Path(f"/proc/{os.getppid()}/environ")
        with contextlib.suppress(OSError):
            return int(b"\0OMP_NUM_THREADS=" in b"\0" + parent.read_bytes())
        return 0
    return int(text) if re.fullmatch("[0-9]{1,6}", text) else 0


def cgroup_numbers(*names: str) -> Iterator[list[int]]:
    """The numbers in these files of each control group that this process is in and of those above
    it, where they set a limit (Linux; the two versions name their files differently)."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            controllers, place = line.split(":", 2)[1:]
            for group_path in (Path(place), *Path(place).parents):
                folder = CGROUPS / controllers / str(group_path).lstrip("/")
                if all((folder / name).is_file() for name in names):
                    text = " ".join((folder / name).read_text() for name in names)
                    if not text.startswith("max"):
                        yield [int(number) for number in re.findall(r"(?<!\S)-?\d+", text)]


def available_memory() -> int | None:
    """Bytes that this host's processes can still have, by the kernel and by the limits of the
    control group without what cannot be reclaimed; None where nobody says (no Linux)."""
    found = [limit - anon for limit, anon, *_ in cgroup_numbers("memory.max", "memory.stat")]
    version_1 = cgroup_numbers("memory.limit_in_bytes", "memory.stat")
    found += [limit - resident for limit, _, resident, *_ in version_1]
    with contextlib.suppress(OSError):
        text = Path("/proc/meminfo").read_text()
        found += [1024 * int(kib) for kib in re.findall(r"MemAvailable: +(\d+)", text)]
    return max(0, min(found)) if found else None


STALLED_SECONDS = 60  # that a run waits for a reader who takes nothing, a frozen terminal
ATOMIC_BYTES = 512  # that a pipe or terminal which can be written takes at once (POSIX)


class Screen:
    """sys.stdout or sys.stderr, whose terminal, reader or disk may be lost, or stand still: from
    then on what is written goes nowhere, and Runtime.log notes the first reason in log.txt."""

    lost: list[str] = []  # which, and why

    def __init__(self, name: str, stream: Any):
        self.name = name
        self.stream = stream or open(os.devnull, "w")
        self.stream.reconfigure(errors="backslashreplace")  # a narrow encoding stops no run
        if stream is None:
            self.lose("closed")

    def write(self, text: str) -> int:
        try:
            self.stream.flush()
            for begin in range(0, len(text), ATOMIC_BYTES // 4):  # a character has four at most
                self.wait_for_reader()
                self.stream.write(text[begin : begin + ATOMIC_BYTES // 4])
                self.stream.flush()
        except OSError as error:
            self.lose(error)
        return len(text)

    def wait_for_reader(self) -> None:
        """TimeoutError where nobody takes what is written."""
        if hasattr(select, "poll"):  # not on Windows
            poll = select.poll()
            poll.register(self.stream.fileno(), select.POLLOUT)
            if not poll.poll(1000 * STALLED_SECONDS):
                raise TimeoutError(f"nobody has read it for {STALLED_SECONDS} s")

    def flush(self) -> None:
        """Nothing to do: `write` flushes."""

    def lose(self, reason: Any) -> None:
        """The descriptor leads nowhere from now on, for the processes that we start, too."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.stream.fileno())
        os.close(nowhere)
        self.lost.append(f"{self.name} is lost: {reason}")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def run_program(command: Sequence[str | Path], **how: Any) -> int:
    """-> status. What it prints goes by our own stream, which may be lost, and it may not."""
    environ = {**how.pop("env", os.environ), "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(command, stdout=subprocess.PIPE, env=environ, **how)
    if done.stdout:
        print(done.stdout.decode(errors="replace"), end="", flush=True)
    return done.returncode


class ProgressBar:
    """Where a long stage stands, by tqdm on a terminal; one bar after the other, each gone when its
    stage is done or the next one begins. Elsewhere, on other ranks and without tqdm: nothing."""

    def __init__(self, rt: Runtime):
        self.rt = rt
        self.stage = ""
        self.bar: Any = None
        self.shown = rt.rank == 0 and sys.stderr.isatty() and has_package("tqdm")
        self.tqdm: Any = None
        self.heartbeat = Heartbeat(self)

    def tick(self, stage: str, done: int, total: int) -> None:
        if stage == "train":
            total = self.expected_steps(done, total)
        self.heartbeat.tick(stage, done, total)
        if not self.shown:
            return
        if self.bar is None or stage != self.stage or done < self.bar.n:
            self.begin(stage, done, total)
        self.bar.total = total
        self.bar.update(done - self.bar.n)
        if done >= total:
            self.close()

    def begin(self, stage: str, done: int, total: int) -> None:
        """Replace the bar by another stage's."""
        self.close()
        self.tqdm = self.tqdm or load_tqdm()
        look = dict(leave=False, dynamic_ncols=True, mininterval=0.2, miniters=1)
        look |= dict(unit="step" if stage == "train" else "it", unit_scale=total >= 10**6)
        self.stage = stage
        self.bar = self.tqdm(None, stage, total, initial=done, **look)

    def print(self, line: str) -> None:
        """A line of standard output, above the bar."""
        self.heartbeat.hush()
        if self.bar is None:
            print(line, flush=True)
        else:
            self.tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()

    def expected_steps(self, done: int, total: int) -> int:
        """As many as the cap leaves time for, at the mean speed so far."""
        cap = self.rt.cfg.max_wallclock_seconds
        spent = self.rt.seconds["train"]
        if not cap or not spent:
            return total
        return min(total, done if spent >= cap else max(done + 1, math.ceil(done * cap / spent)))

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


class Heartbeat:
    """Says on standard error, where no bar shows it, what a stage does and how long it will: a line
    after 10 s in which nothing was said, then after 20, 40 and each 60."""

    FIRST = 10.0  # seconds
    MOST = 60.0

    def __init__(self, bar: ProgressBar):
        self.bar = bar
        self.name = ""
        self.begun = time.perf_counter()
        self.said = self.begun
        self.first = 0  # done when it began, or was first heard of
        self.done = 0
        self.total = 0  # 0: unknown
        self.patience = self.FIRST

    def begin(self, name: str, done: int = 0, total: int = 0) -> None:
        self.name = name
        self.begun = time.perf_counter()
        self.first = done
        self.done = done
        self.total = total
        self.hush()

    def tick(self, name: str, done: int, total: int) -> None:
        if name != self.name or done < self.done:
            self.begin(name, done, total)
        self.done = done
        self.total = total

    def hush(self) -> None:
        """Something was said."""
        self.said = time.perf_counter()
        self.patience = self.FIRST

    @contextlib.contextmanager
    def beating(self) -> Iterator[None]:
        """On rank 0, while the block lasts."""
        ended = threading.Event()
        thread = threading.Thread(target=self.watch, args=[ended], daemon=True)
        if self.bar.rt.rank == 0:
            thread.start()
        try:
            yield
        finally:
            ended.set()

    def watch(self, ended: threading.Event) -> None:
        while not ended.wait(0.5):
            now = time.perf_counter()
            if self.name and self.bar.bar is None and now - self.said >= self.patience:
                print(self.line(now - self.begun), file=sys.stderr, flush=True)
                self.said = now
                self.patience = min(2 * self.patience, self.MOST)

    def line(self, spent: float) -> str:
        done = self.done - self.first
        if not 0 < done < self.total - self.first:
            return f"... {self.name}: {spent:.0f} s"
        left = spent * (self.total - self.done) / done
        return f"... {self.name}: {self.done / self.total:.0%}, about {left:.0f} s left"


def load_tqdm() -> Any:
    """tqdm's class, without the thread that it would start beside the run."""
    tqdm = package("tqdm").tqdm
    tqdm.monitor_interval = 0
    return tqdm


# Memory.


class LackOfMemory(UserError):
    """What was asked for does not fit into this machine."""


def require_memory(needed: int, what: str, device: Any = "cpu") -> None:
    """LackOfMemory, before anything is allocated, where `needed` bytes are not there."""
    free = available_memory()
    if torch.device(device).type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free = torch.cuda.mem_get_info(device)[0] + cached
    if free is not None and needed > free:
        fix = "smaller ones, or a larger machine"
        raise LackOfMemory(f"{what}: {needed:,} bytes of memory, {free:,} are free; fix: {fix}")


# Files.

MOST_BYTES = 2**24  # of a file that is read whole, where nothing else is said
MOST_TEXT_BYTES = 2**20  # of settings or claims
MOST_LOG_LINES = 2**18
MOST_LINE_BYTES = 2**27  # of a document
MOST_ARTIFACT_BYTES = 2**31  # of weights that numpy can hold; caps are told, not enforced
MOST_STREAM_BYTES = 2**28  # twice what FineWeb's 62 million validation tokens take as they are
MOST_CHECKPOINT_BYTES = 2**40
COPIES = 3  # of a file that is read: whole, its body, its payload
PARTIAL = ".partial_"  # how files begin that are not whole yet
USER_MASK = os.umask(0o077)  # of rights that new files do not get; it can only be set
os.umask(USER_MASK)


def open_no_link(name: str, flags: int) -> int:
    """An `opener` of files that follows no link and waits for nobody at the end of a pipe."""
    careful = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)  # none on Windows
    return os.open(name, flags | careful, 0o666)


def printable(text: str) -> str:
    """Without what a terminal would obey: controls, line ends, directions, halves of characters."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def read_regular(path: str | Path, most: int = MOST_BYTES, first: int = 0) -> bytes:
    """The bytes of a file that anybody may have put there, read once, or its `first` ones. OSError
    for a link, for a pipe or device, which might never end, and for more than `most` bytes or the
    memory that is free."""
    try:
        file = open(path, "rb", opener=open_no_link)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise OSError(errno.ELOOP, "is a link", str(path)) from None
    with file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "is no regular file", str(path))
        if status.st_size > most and not first:
            reason = f"has {status.st_size:,} bytes, at most {most:,} are read"
            raise OSError(errno.EFBIG, reason, str(path))
        size = first or status.st_size
        free = available_memory()
        if free is not None and COPIES * size > free:
            reason = f"has {size:,} bytes, too many for {free:,} of free memory"
            raise OSError(errno.ENOMEM, reason, str(path))
        return file.read(size)


def write_atomically(path: Path, content: bytes | Callable[[Path], Any]) -> None:
    """The bytes, or what content(path) writes, appear whole or not at all, whatever dies: they are
    written beside it, into a new file, never through a link, flushed to the disk and renamed.
    UserError where that fails."""
    partial = None
    try:
        file, name = tempfile.mkstemp(f"_{path.name}", PARTIAL, path.parent)
        os.close(file)
        partial = Path(name)
        if callable(content):
            content(partial)
        else:
            partial.write_bytes(content)
        partial.chmod(0o666 & ~USER_MASK)
        flush_to_disk(partial)
        os.replace(partial, path)
        flush_to_disk(path.parent)
    except OSError as error:
        fix = "make room there" if path.parent.is_dir() else f"mkdir {path.parent}"
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            fix = "run in a folder that can be written"
        raise UserError(f"{path}: {error}; fix: {fix}") from error
    finally:
        if partial:
            partial.unlink(missing_ok=True)


def remove_partial_files(folder: Path) -> None:
    """What writers that were killed left."""
    for path in folder.glob(f"{PARTIAL}*"):
        path.unlink(missing_ok=True)


def is_open_as(file: Any, path: Path) -> bool:
    """Is that still the file which is open?"""
    return path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())


def flush_to_disk(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    os.fsync(file)
    os.close(file)


def sha256(content: bytes | np.ndarray) -> str:
    return hashlib.sha256(content).hexdigest()


class LogFile:
    """A text file that lines are added to. Where that fails, a full disk, the run goes on without:
    each line is on standard output as well."""

    def __init__(self, path: Path):
        self.open(path)

    def open(self, path: Path) -> None:
        self.path = path
        how = dict(encoding="utf-8", errors="backslashreplace", opener=open_no_link)
        self.file: Any = open(path, "a+", **how)

    def add(self, line: str) -> None:
        try:
            print(line, file=self.file, flush=True)
        except OSError as error:
            reason = f"{self.path}: {error}; the log ends here; fix: make room there"
            print(f"note: {reason}", file=sys.stderr)
            with contextlib.suppress(OSError):
                self.file.close()  # tries once more
            self.file = io.StringIO()

    def restore(self, folder: Path) -> None:
        """All its lines in a new file there: what was deleted can be read while it is open."""
        self.file.seek(0)
        text = self.file.read()
        self.file.close()
        self.open(folder / self.path.name)
        self.add(text.rstrip("\n"))

    def size(self) -> int:
        """Bytes on the disk, for a checkpoint."""
        return self.path.stat().st_size if self.path.exists() else 0


def checkpoints_to_go_on(rt: Runtime) -> list[Path]:
    """Those of the run folder, if the run goes on from them; ConfigError where it would lose what
    a finished run, a checkpoint or an artifact without its score holds, unasked."""
    cfg = rt.cfg
    finished = (rt.folder / "submission.json").exists()
    saved = sorted(rt.folder.glob("checkpoint/step_*.json"))
    artifact = rt.folder / "artifact.bin"
    scored_now = cfg.eval_only and Path(cfg.eval_only).resolve() == artifact.resolve()
    scorable = artifact.exists() and cfg.resume != "auto" and not scored_now
    if cfg.overwrite or not (finished or saved or scorable):
        return []
    if saved and cfg.resume == "auto" and not cfg.eval_only:
        return saved
    left = saved[-1].stem if saved else "artifact.bin, which EVAL_ONLY scores"
    state = "finished" if finished else f"unfinished, with {left}"
    resumable = saved and not finished and not cfg.eval_only
    fix = "OVERWRITE=1" + (" or RESUME=auto" if resumable else "")
    reason = f"{rt.folder} is {state}; fix: {fix}, or another RUN_ID"
    raise ConfigError(f"RUN_ID={cfg.run_id!r}: {reason}")


def open_run(rt: Runtime) -> None:
    """runs/<RUN_ID>/ with its logs open on rank 0: as the last checkpoint saw it, where the run
    goes on, else cleared. What another process uses or holds is not lost (ConfigError)."""
    try:
        if rt.rank == 0:
            rt.take_folder()
        saved = checkpoints_to_go_on(rt)
        if rt.rank == 0:
            if saved:
                cut_logs(rt.folder, saved)
            else:
                clear_run(rt.folder)
            rt.open_logs()
    except OSError as error:
        fix = "a run must be able to write and clear that; move it away or give another RUN_ID"
        reason = f"{error.filename or rt.folder}: {error.strerror or error}"
        raise ConfigError(f"{reason}; fix: {fix}") from error


def lock_folder(rt: Runtime) -> Any:
    """The open file .lock of the run folder, locked until it is closed or the process dies, and
    closed in the programs that it starts; ConfigError where another process has it. Where the file
    system knows no locks, a note."""
    path = rt.folder / ".lock"
    number = open_no_link(str(path), os.O_RDWR | os.O_CREAT)
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise OSError(errno.EINVAL, "is no regular file", str(path))
    file = open(number, "r+", encoding="utf-8")
    try:
        import fcntl  # no module of Windows

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        user = f"{rt.folder} is in use by process {file.read(99).strip() or '?'}"
        fix = "let it end, or another RUN_ID"
        raise ConfigError(f"RUN_ID={rt.cfg.run_id!r}: {user}; fix: {fix}") from error
    except (ImportError, OSError) as error:
        rt.log("note", f"{path}: no lock ({error}): start no other run with this RUN_ID")
    if not is_open_as(file, path):
        return lock_folder(rt)  # its last user removed it before we had it
    file.truncate(0)
    print(f"{os.getpid()} on {platform.node()}", file=file, flush=True)
    return file


# What a run needs, looked at before it begins.


def preflight(rt: Runtime, cfg: Config) -> list[str]:
    """On rank 0, before the folder is touched -> notes on what merely costs something. Missing with
    a line each for what would stop the run: packages, data, room on the disk, memory."""
    notes: list[str] = []
    packages = ["sentencepiece"] + ["zstandard"] * (cfg.compressor == "zstd")
    faults = lacking(*((package, name) for name in packages), (prepare_sample, cfg.data_path))
    if not faults:
        data: list[tuple] = [(find_shards, cfg.data_path, "val")]
        if Path(cfg.data_path).is_dir():
            data += [(find_shards, cfg.data_path, "train")] * (not cfg.eval_only)
            data += [(token_bytes, cfg.tokenizer_path, cfg.vocab_size)]
        faults = lacking(*data)
    cfg = replace(cfg, vocab_size=cfg.vocab_size or 1024)
    faults += lacking((check_disk, rt, cfg, notes), (check_memory, rt, cfg))
    if faults:
        raise Missing("\n".join(faults))
    return notes


def lacking(*checks: tuple) -> list[str]:
    """The complaints of calls, each (function, *arguments), a line each."""
    faults = []
    for function, *arguments in checks:
        try:
            function(*arguments)
        except UserError as error:
            faults.append(" ".join(str(error).split()))
    return faults


LOG_BYTES = 10**6  # of logs, config.env, submission.json and picture, about


def state_bytes(cfg: Config) -> int:
    """Of a checkpoint at least: weights, a moment of each, averages."""
    return 4 * count_parameters(cfg) * (2 + cfg.ema_enabled + cfg.swa_enabled)


def check_disk(rt: Runtime, cfg: Config, notes: list[str]) -> None:
    """The right to write, room for results and checkpoints; UserError, or a note where only a
    checkpoint on a signal would not fit."""
    place = next(path for path in (rt.folder, *rt.folder.absolute().parents) if path.exists())
    if not os.access(place, os.W_OK):
        raise UserError(f"{place}: not writable; fix: run in a folder that is")
    old = sum(path.stat().st_size for path in rt.folder.rglob("*") if path.is_file())
    free = shutil.disk_usage(place).free + old
    shards = Path(cfg.data_path).glob("*_val_*.bin")
    val = sum(path.stat().st_size for path in shards if path.is_file())
    sources = [CODE, Path(cfg.tokenizer_path)]
    need = sum(path.stat().st_size for path in sources if path.is_file()) + LOG_BYTES
    # stream.bin, decoded.npy and sums, and a file or two of 56 bytes a token
    columns = 28 * (cfg.save_scores or cfg.ngram_scheme != "") + 28 * (cfg.ngram_scheme != "")
    need += payload_type(parameter_specs(cfg)).itemsize + val * (3 + columns)
    if cfg.checkpoint_every.strip("0m") and not cfg.eval_only:
        need += (KEPT_CHECKPOINTS + 1) * state_bytes(cfg)
    if need > free:
        reason = f"{free / 1e6:,.1f} MB are free, results and checkpoints need {need / 1e6:,.1f}"
        raise UserError(f"{place}: {reason}; fix: make room there")
    if need + state_bytes(cfg) > free and not cfg.eval_only:
        notes.append(f"{place}: no room for a checkpoint, a signal would end the run without one")


def check_memory(rt: Runtime, cfg: Config) -> None:
    """Training and lanes, by lower bounds, against what is there; UserError."""
    free = torch.cuda.mem_get_info(rt.device)[0] if rt.cuda else available_memory()
    number = 2 if rt.cuda else 4  # bytes of an activation, a key, a value
    needs = {}
    if not cfg.eval_only:
        tokens = cfg.train_batch_tokens // rt.world_size // micro_batches(cfg, rt)
        kept = tokens * (cfg.vocab_size + 4 * count_blocks(cfg) * cfg.model_dim)  # for backward
        if cfg.doc_attention and not rt.cuda:
            kept += tokens * cfg.train_seq_len  # document_mask
        needs["TRAIN_BATCH_TOKENS"] = state_bytes(cfg) + kept * number
    if cfg.scorer == "documents":
        documents = 0
        targets = 0
        for path in Path(cfg.data_path).glob("*_val_*.bin"):
            with contextlib.suppress(BadShard):  # find_shards tells
                tokens = read_shard(path, MOST_PIECES)
                documents += int((tokens == BOS).sum())
                targets += len(tokens)
        pieces = max(documents, targets // (cfg.eval_piece_tokens or targets or 1))  # at least
        lanes = -(-min(cfg.eval_lanes, pieces) // rt.world_size)
        needs["EVAL_LANES"] = lane_bytes(cfg, lanes, cfg.window, rt.cuda)
    for name, need in needs.items():
        need *= 1 if rt.cuda else rt.local_ranks
        if free is not None and need > free:
            setting = f"{name}={show(getattr(cfg, name.lower()))}"
            reason = f"needs {need / 1e9:,.1f} GB at least, {rt.device} has {free / 1e9:,.1f} free"
            raise UserError(f"{setting}: {reason}; fix: less of that, or a smaller model")


def clear_run(folder: Path) -> None:
    """Remove what an earlier run wrote; checkpoints first, or a run that died meanwhile could go
    on from them."""
    shutil.rmtree(folder / "checkpoint", ignore_errors=True)
    remove_partial_files(folder)
    for name in OUTPUTS:
        (folder / name).unlink(missing_ok=True)


def cut_logs(folder: Path, saved: list[Path]) -> None:
    """Without the lines after the newest whole checkpoint, which the run will write again. Where
    none is whole, find_checkpoint refuses the run."""
    for path in reversed(saved):
        try:
            state = read_checkpoint(path)[0]
        except DamagedCheckpoint:
            continue  # as find_checkpoint passes it over
        for name, size in zip(LOGS, state.logs, strict=False):
            log = folder / name
            if log.is_file() and not log.is_symlink() and 0 <= size < log.stat().st_size:
                os.truncate(log, size)
        break


def keep_sources(rt: Runtime, cfg: Config) -> None:
    """What the run was made with, into its folder: the script, every setting, the tokenizer."""
    rt.write("train_gpt.py", SCRIPT)
    names = [name for name in VARIABLES if name not in PER_RUN]
    lines = [f"{name}={show(getattr(cfg, name.lower()))}\n" for name in names]
    rt.write("config.env", "".join(lines).encode())
    rt.write("tokenizer.model", read_tokenizer(cfg.tokenizer_path))


# -----------------------------------------------------------------------------
# 4. Data
# Shards become training batches and a validation stream with the bytes of each token.

SHARD_MAGIC = 20240520
SHARD_VERSION = 1
SHARD_HEADER_BYTES = 1024  # 256 int32: magic, version, number of tokens, then zeros
BOS = 1  # begins a document
MOST_PIECES = 65_536  # tokens are uint16
SPACE = "▁".encode()  # how SentencePiece writes a space, U+2581
DIGESTS = ("tokenizer_sha256", "val_tokens_sha256", "val_text_sha256")
DATASET_FACTS = dict.fromkeys(DIGESTS, str) | {"lossy": bool}
PIECE_TOKENS = 1 << 16  # decoded at once
FIRST_CHECKED = 1 << 24  # tokens whose bytes are checked before training, in seconds
FIRST_DOCUMENTS = 200_000  # and in how many documents
MOST_TOKENIZER_BYTES = 2**28
ENCODER_CHARS = 1_000_000  # data/prepare_text.py encodes at most so many at once
BYTE_SPACE = ("<0xE2>", "<0x96>", "<0x81>")  # U+2581 in byte tokens
LOSSY_SAMPLES = (  # of what many tokenizers alter; a: a word that they know
    *(" a", "a ", "a  a", "a\ta", "a\r\na", "a\u3000a", "a\u200ba"),
    *("aﬁ", "½", "㍿", "e\u0301"),
)
SCAN_TOKENS = 1 << 22
SCAN_DOCUMENTS = 1 << 16
OVERLAP_SECONDS = 5.0  # that the first step waits at most


class BadShard(UserError):
    """A shard that cannot be read, on every rank alike."""


def shard_tokens(path: Path) -> int:
    """Their number, by header and size; BadShard where these or the kind of file are no shard's."""
    fix = "fix: write or download it again"
    try:
        head = read_regular(os.path.realpath(path), first=SHARD_HEADER_BYTES)
        size = path.stat().st_size
    except OSError as error:
        raise BadShard(f"{path}: {error.strerror}; {fix}") from error
    whole = len(head) == SHARD_HEADER_BYTES
    magic, version, count = np.frombuffer(head, "<i4", 3).tolist() if whole else (0, 0, 0)
    wanted = SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_BYTES + 2 * count
    if (magic, version, size) != wanted or count < 1:
        found = f"magic {magic}, version {version}, length {size} for {count} tokens"
        raise BadShard(f"{path}: {found} instead of {wanted}; {fix}")
    return count


def map_shard(path: Path) -> np.ndarray:
    """The uint16 tokens of a shard, as they are; BadShard."""
    return np.memmap(path, "<u2", "r", SHARD_HEADER_BYTES, shard_tokens(path))


def check_tokens(path: Path, tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    """-> tokens, some of a shard; BadShard for one that cannot be."""
    if tokens.max() >= vocab_size:
        highest = f"token {tokens.max()} >= vocabulary {vocab_size}"
        raise BadShard(f"{path}: {highest}; fix: its tokenizer, or write it again")
    return tokens


def read_shard(path: Path, vocab_size: int) -> np.ndarray:
    """The uint16 tokens of a shard, mapped; BadShard, for a token that cannot be, too."""
    return check_tokens(path, map_shard(path), vocab_size)


def find_shards(folder: str | Path, split: str) -> list[Path]:
    """The shards of a split, "train" or "val", by dataset and number; UserError for none, and for
    any that cannot be one: training would meet it in its middle."""
    shards = sorted(Path(folder).glob(f"*_{split}_*.bin"), key=numeric_order)
    if not shards:
        raise UserError(f"DATA_PATH={folder!r}: no *_{split}_*.bin; fix: see data/prepare_text.py")
    for path in shards:
        shard_tokens(path)
    return shards


def numeric_order(path: Path) -> tuple[list[str | int], str]:
    """A sort key: x_val_2 before x_val_10, and of x_val_1 and x_val_01 always the same first."""
    parts = re.split("([0-9]+)", path.name)
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], path.name


def training_loader(
    cfg: Config, shards: list[Path], begins: Callable[[int], Any] = lambda shard: None
) -> "TokenLoader | ShuffledLoader":
    """What SHUFFLE asks for (UserError). begins: of TokenLoader; of a ring all shards are near."""
    if cfg.shuffle:
        return ShuffledLoader(shards, cfg)
    return TokenLoader(shards, cfg.vocab_size, begins)


class TokenLoader:
    """Training tokens, around and around. Every rank reads a step's TRAIN_BATCH_TOKENS + 1 and
    takes its rows; the last token is the next step's first."""

    def __init__(
        self,
        shards: list[Path],
        vocab_size: int,
        begins: Callable[[int], Any] = lambda shard: None,
    ):
        """begins: is told the number of each shard when its first token is near."""
        self.shards = shards
        self.vocab_size = vocab_size
        self.begins = begins
        self.ends = np.cumsum([shard_tokens(path) for path in shards])
        self.total = int(self.ends[-1])
        self.opened: dict[int, np.ndarray] = {}
        self.restore((0, 0))

    def state(self) -> tuple[int, int]:
        """Shard and offset of the next token."""
        return self.shard, self.offset

    def restore(self, state: tuple[int, int]) -> None:
        shard, offset = state
        if shard not in self.opened:  # each is looked through once
            tokens = read_shard(self.shards[shard], self.vocab_size)
            self.opened[shard] = np.asarray(tokens)  # no memmap: slices of it are slow
            self.begins(shard)
        self.shard = shard
        self.offset = offset
        self.tokens = self.opened[shard]

    def can_restore(self, state: tuple[int, int]) -> bool:
        """Is there such a place? BadShard"""
        shard, offset = state
        return shard < len(self.shards) and offset <= shard_tokens(self.shards[shard])

    def read(self, count: int) -> np.ndarray:
        """The next tokens, uint16 (count,)."""
        parts = []
        while count > 0:
            if self.offset == len(self.tokens):
                self.restore(((self.shard + 1) % len(self.shards), 0))
            part = self.tokens[self.offset :][:count]
            parts.append(part)
            self.offset += len(part)
            count -= len(part)
        return np.concatenate(parts) if parts else self.tokens[:0]

    def rows(self, cfg: Config, rt: Runtime) -> tuple[Tensor, Tensor]:
        """This rank's inputs and targets of the next step, int64 (rows, TRAIN_SEQ_LEN) each."""
        size = cfg.train_batch_tokens + 1
        place = self.state()
        try:
            batch = self.read(min(size, self.total))
        except BadShard:
            self.restore(place)  # a checkpoint goes on from here
            raise
        if size > self.total:  # a lap ends where it began: the others are the same
            self.read(size % self.total)
            batch = np.resize(batch, size)
        self.offset -= 1
        share = cfg.train_batch_tokens // rt.world_size
        mine = torch.from_numpy(batch[rt.rank * share :][: share + 1].astype(np.int64))
        inputs = mine[:-1].view(-1, cfg.train_seq_len)
        targets = mine[1:].view(-1, cfg.train_seq_len)
        return inputs, targets


class ShuffledLoader:
    """Training sequences in a random order (SHUFFLE). The shards' tokens, put end to end, make a
    ring; each epoch it is parted from a random place on into sequences, which are drawn without
    putting back: every token is an input once, but for fewer than TRAIN_SEQ_LEN, other ones each
    time; what is shorter than a sequence goes round in it. The target of a sequence's last token
    is the one after it in the ring. All that is random follows from SEED and the epoch. Every rank
    reads all sequences of a step, so that a bad token stops all ranks at one step, and takes its
    own."""

    def __init__(self, shards: list[Path], cfg: Config):
        self.shards = shards
        self.vocab_size = cfg.vocab_size
        self.length = cfg.train_seq_len
        self.seed = cfg.seed
        self.mapped = [map_shard(path) for path in shards]  # no byte of them is read yet
        self.ends = np.cumsum([len(tokens) for tokens in self.mapped])
        self.total = int(self.ends[-1])
        self.epoch = -1  # of `drawn`
        self.restore((0, 0))

    def state(self) -> tuple[int, int]:
        """Epoch, and how many of its sequences were read."""
        return self.epoch, self.done

    def restore(self, state: tuple[int, int]) -> None:
        epoch, done = state
        if epoch != self.epoch:
            random = np.random.default_rng((self.seed, epoch))
            self.shift = int(random.integers(self.total))
            self.drawn = random.permutation(max(1, self.total // self.length))
        self.epoch = epoch
        self.done = done

    def can_restore(self, state: tuple[int, int]) -> bool:
        """Is there such a place?"""
        return state[1] <= len(self.drawn)

    def read(self, begin: int, count: int) -> np.ndarray:
        """Tokens of the ring from a place on, uint16 (count,); BadShard."""
        parts = []
        while count > 0:
            begin %= self.total
            shard = int(np.searchsorted(self.ends, begin, "right"))
            tokens = self.mapped[shard]
            offset = begin - int(self.ends[shard]) + len(tokens)
            part = check_tokens(self.shards[shard], tokens[offset:][:count], self.vocab_size)
            parts.append(part)
            begin += len(part)
            count -= len(part)
        return np.concatenate(parts)

    def rows(self, cfg: Config, rt: Runtime) -> tuple[Tensor, Tensor]:
        """This rank's inputs and targets of the next step, int64 (rows, TRAIN_SEQ_LEN) each."""
        place = self.state()
        batch = []
        try:
            for _ in range(cfg.train_batch_tokens // self.length):
                if self.done == len(self.drawn):
                    self.restore((self.epoch + 1, 0))
                begin = self.shift + int(self.drawn[self.done]) * self.length
                batch.append(self.read(begin, self.length + 1))
                self.done += 1
        except BadShard:
            self.restore(place)  # a checkpoint goes on from here
            raise
        share = len(batch) // rt.world_size
        mine = torch.from_numpy(np.stack(batch[rt.rank * share :][:share]).astype(np.int64))
        # As the warm-up's: a view of longer rows would be another graph to the compiler.
        return mine[:, :-1].contiguous(), mine[:, 1:].contiguous()


class Prefetch:
    """A loader's batches, one ahead: while the device works on a step, a thread reads the next
    one's rows into pinned memory, from where they travel without a wait."""

    def __init__(self, loader: TokenLoader | ShuffledLoader, rt: Runtime, cfg: Config):
        self.loader = loader
        self.rt = rt
        self.cfg = cfg
        # Pinned memory belongs to a device, which each thread chooses for itself.
        self.pool = ThreadPoolExecutor(1, initializer=rt.use_device)
        self.coming: Future | None = None
        self.place = loader.state()  # of the batch that `take` gives next

    def read(self) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        inputs, targets = self.loader.rows(self.cfg, self.rt)
        if self.rt.cuda:
            inputs = inputs.pin_memory()
            targets = targets.pin_memory()
        return (inputs, targets), self.loader.state()

    def take(self) -> tuple[Tensor, Tensor]:
        """This rank's inputs and targets of the next step, on its device; BadShard."""
        coming = self.coming or self.pool.submit(self.read)
        self.coming = None
        sides, self.place = coming.result()
        self.coming = self.pool.submit(self.read)
        inputs, targets = (side.to(self.rt.device, non_blocking=True) for side in sides)
        return inputs, targets

    def restore(self, place: tuple[int, int]) -> None:
        self.close()
        self.loader.restore(place)
        self.place = place

    def close(self) -> None:
        """Forget what was read ahead: the loader stands where `take` does, and may go on."""
        if self.coming:
            wait([self.coming])
            self.coming = None
            self.loader.restore(self.place)


def last_shard(ends: np.ndarray, steps: int, cfg: Config) -> int:
    """The furthest one that so many steps read of, where they are not shuffled; ends (shards,): in
    tokens from the first on."""
    if cfg.shuffle:
        return len(ends) - 1
    read = steps * cfg.train_batch_tokens + 1
    return min(int(np.searchsorted(ends, read)), len(ends) - 1)


# Bytes of tokens.


class TokenBytes(NamedTuple):
    """Byte tables of a tokenizer, each (vocab_size,)."""

    base_bytes: np.ndarray  # int64, UTF-8, without one leading space
    leading_space: np.ndarray  # bool
    swallows_space: np.ndarray  # bool: after this token a leading space is no byte

    def count(self, targets: np.ndarray, previous: np.ndarray) -> np.ndarray:
        """UTF-8 bytes of each target, int64 (N,); previous: the token before each."""
        space = self.leading_space[targets] & ~self.swallows_space[previous]
        return self.base_bytes[targets] + space


def read_tokenizer(path: str | Path) -> bytes:
    """The bytes of the tokenizer's file; UserError."""
    try:
        return read_regular(os.path.realpath(path), MOST_TOKENIZER_BYTES)
    except OSError as error:
        reason = "no such file" if error.errno == errno.ENOENT else error.strerror
        fix = "the tokenizer of these shards as tokenizer.model in DATA_PATH, or set TOKENIZER_PATH"
        raise UserError(f"TOKENIZER_PATH={str(path)!r}: {reason}; fix: {fix}") from error


def load_tokenizer(path: str | Path, vocab_size: int) -> Any:
    """The SentencePiece model in a file, of this size (0: any); UserError."""
    sentencepiece = package("sentencepiece")
    model = read_tokenizer(path) or b"empty"  # no bytes would load
    try:
        tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model)
        pieces = tokenizer.vocab_size()
        tokenizer.id_to_piece([*range(pieces)])  # all of them text
    except (RuntimeError, OSError, UnicodeError) as error:
        fix = "fix: the tokenizer.model that these shards were made with"
        raise UserError(f"TOKENIZER_PATH={path!r}: must be SentencePiece's; {fix}") from error
    bos = tokenizer.bos_id()
    if bos != BOS or pieces > MOST_PIECES:
        found = f"BOS id {bos}, {pieces} pieces; must be BOS id {BOS}, at most {MOST_PIECES} pieces"
        raise UserError(f"TOKENIZER_PATH={path!r}: {found}; fix: see data/prepare_text.py")
    if vocab_size not in (0, pieces):
        raise UserError(f"VOCAB_SIZE={vocab_size}: must be that of {path}, {pieces}")
    return tokenizer


def token_bytes(tokenizer_path: str, vocab_size: int) -> TokenBytes:
    """Byte accounting of a SentencePiece model of this size (0: any); UserError.

    Every U+2581 is one byte, a space; control and unknown ids are none, and after them a leading
    space is free where the tokenizer strips or invents one (upstream's rule on its own models).
    """
    tokenizer = load_tokenizer(tokenizer_path, vocab_size)
    ids = [*range(tokenizer.vocab_size())]
    kinds = [tokenizer.is_control(ids), tokenizer.is_unknown(ids), tokenizer.is_unused(ids)]
    silent = np.any(kinds, axis=0)
    pieces = ["" if silent[i] else tokenizer.id_to_piece(i) for i in ids]
    leading = np.array([piece.startswith("▁") for piece in pieces])
    sizes = [len(piece.replace("▁", " ").encode()) for piece in pieces]
    base = np.where(tokenizer.is_byte(ids), 1, sizes - leading)
    invents_space = pieces_of(tokenizer, "a")[:1] == "▁"
    keeps_space = pieces_of(tokenizer, " a")[:1] == "▁"
    return TokenBytes(base, leading, silent & (invents_space or not keeps_space))


def pieces_of(tokenizer: Any, text: str) -> str:
    """The pieces that it is encoded to, spaces as ▁ also where byte tokens spell them."""
    spelt = "".join(f"<0x{byte:02X}>" for byte in SPACE)
    return "".join(tokenizer.encode(text, out_type=str)).replace(spelt, "▁")


class Decoder:
    """What tokens spell, by SentencePiece's own decoder but for two things.

    Byte tokens that are no UTF-8, as where a text is cut in a character, spell themselves: it makes
    three bytes of each, U+FFFD. And a tokenizer that has no piece for a space spells it in the byte
    tokens of U+2581 and does not turn them back: here they are a space, unless the text has spaces
    of its own (byte 0x20), in tokens that SentencePiece did not make.
    """

    def __init__(self, tokenizer: Any, tables: TokenBytes, stream: np.ndarray):
        """stream: tokens of the text."""
        ids = [*range(tokenizer.vocab_size())]
        names = tokenizer.id_to_piece(ids)
        self.tokenizer = tokenizer
        self.strips = bool(tables.swallows_space.any())
        self.control = np.array(tokenizer.is_control(ids))
        self.byte = np.full(len(ids), -1)  # its value, of a byte token
        spelling = np.flatnonzero(tokenizer.is_byte(ids)).tolist()
        self.byte[spelling] = [int(names[i][1:-1], 16) for i in spelling]
        others = np.flatnonzero((self.byte < 0) & ~self.control).tolist()
        visible = (i for i in others if not tokenizer.is_unknown(i) and tokenizer.decode([i]))
        self.anchor = [*itertools.islice(visible, 1)]  # something to follow
        spells_mark = {*BYTE_SPACE} <= {names[i] for i in spelling}
        self.mark = [names.index(name) for name in BYTE_SPACE if spells_mark]  # a literal U+2581
        in_bytes = "<0xE2>" in "".join(tokenizer.encode("a \ue000  b", out_type=str))
        own_spaces = (self.byte[stream] == ord(" ")).any()
        marks = [names.index(name) for name in BYTE_SPACE] if in_bytes and not own_spaces else []
        self.space = np.array(marks, int)  # the tokens that spell a space, (3,) or (0,)

    def spaces(self, tokens: np.ndarray) -> np.ndarray:
        """Where in tokens (N,) byte tokens that spell a space begin."""
        if not len(self.space) or len(tokens) < 3:
            return np.zeros(0, int)
        triples = np.lib.stride_tricks.sliding_window_view(tokens, 3)
        return np.flatnonzero((triples == self.space).all(1))

    def spell(self, tokens: np.ndarray) -> bytes:
        """UTF-8 of a document's tokens, without its BOS. Control tokens part it, as they begin a
        text where a leading space is free."""
        cuts = np.flatnonzero(self.control[tokens]).tolist()
        edges = itertools.pairwise([-1, *cuts, len(tokens)])
        return b"".join(self.spell_part(tokens[begin + 1 : end]) for begin, end in edges)

    def spell_part(self, tokens: np.ndarray) -> bytes:
        places = [0]
        for place in range(PIECE_TOKENS, len(tokens), PIECE_TOKENS):  # but in no character
            inside = (self.byte[tokens[place - 3 : place + 1]] & 0xC0) == 0x80
            places.append(place - int(np.argmin(inside[::-1])))
        parts = []
        for begin, end in itertools.pairwise([*places, len(tokens)]):
            parts.append(self.decode(tokens[begin:end].tolist(), begin > 0))
        text = b"".join(parts)
        if len(self.space):
            text = text.replace(SPACE, b" ")
            return text[1:] if self.strips and 0 in self.spaces(tokens[:3]) else text
        return text

    def decode(self, ids: list[int], follows: bool) -> bytes:
        """follows: there is text before, so a leading space stays."""
        text = self.tokenizer.decode(self.anchor * follows + ids)
        text = text[len(self.tokenizer.decode(self.anchor * follows)) :]
        if "\ufffd" not in text:
            return text.encode()
        parts: list[bytes] = []
        for is_byte, run in itertools.groupby(ids, lambda i: self.byte[i] >= 0):
            if is_byte:
                parts.append(bytes(self.byte[[*run]].tolist()))
            elif len(same := [*run]) < len(ids):
                parts.append(self.decode(same, follows or any(parts)))
            else:
                return text.encode()  # it has a piece for U+FFFD
        return b"".join(parts)

    def again(self, text: str) -> bytes:
        """What the text becomes in the tokens that data/prepare_text.py makes of it: U+2581 is that
        of the text in byte tokens, if there are any, and the rest is cut as there."""
        mark = SPACE.decode()
        most = rf".{{1,{ENCODER_CHARS}}}"
        runs = re.split(f"({mark})", text) if self.mark else [text]
        parts = [p for run in runs for p in re.findall(rf"(?s){most}(?= |\Z)|{most}", run)]
        ids: list[int] = []
        for number, part in enumerate(parts):
            encoder = self.within if number else self.tokenizer
            ids += self.mark if self.mark and part == mark else encoder.encode(part)
        return self.spell(np.array(ids, int))

    @functools.cached_property
    def within(self) -> Any:
        """Of a text's later parts, before which no space is put or taken away. Protocol buffers
        merge what is appended, here normalizer_spec without these two."""
        model = self.tokenizer.serialized_model_proto() + b"\x1a\x04\x18\0\x20\0"
        return package("sentencepiece").SentencePieceProcessor(model_proto=model)

    def alters(self) -> bool:
        """Does it make another text of what many texts have? Unknown tokens are no change."""
        word = self.tokenizer.decode(self.anchor).strip() or "a"
        for sample in LOSSY_SAMPLES:
            text = sample.replace("a", word)
            unknown = self.tokenizer.unk_id() in self.tokenizer.encode(text)
            if not unknown and self.again(text).replace(SPACE, b" ") != text.encode():
                return True
        return False


# The validation text.


def read_dataset(cfg: Config) -> dict[str, Any]:
    """What dataset.json says of the shards beside it, {} where there is none. UserError where it is
    damaged, or where they were made with another tokenizer."""
    path = Path(cfg.data_path, "dataset.json")
    if not path.exists():
        return {}
    try:
        if not path.is_file() or path.stat().st_size > MOST_TEXT_BYTES:
            raise ValueError("no file of at most 1 MiB")
        facts = json.loads(path.read_bytes())
        if not isinstance(facts, dict):
            raise ValueError("no JSON object")
        for name, kind in DATASET_FACTS.items():
            if not isinstance(facts.get(name, kind()), kind):
                raise ValueError(f"{name} is {str(facts[name])[:80]!r}")
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: {reason}; fix: prepare or download the data again") from error
    ours = sha256(read_tokenizer(cfg.tokenizer_path))
    theirs = facts.get("tokenizer_sha256", ours)
    if theirs != ours:
        reason = f"its sha256 {ours[:12]} is not {theirs[:12]}, that of the shards' by {path}"
        fix = "the tokenizer of these shards, or prepare them again"
        raise UserError(f"TOKENIZER_PATH={cfg.tokenizer_path!r}: {reason}; fix: {fix}")
    return facts


def read_texts(paths: Iterable[Path]) -> Iterator[bytes]:
    """UTF-8 of the "text" of each line of *_val.jsonl files; UserError."""
    for path in paths:
        with open(path, "rb") as file:
            lines = iter(lambda: file.readline(MOST_LINE_BYTES), b"")
            for number, line in enumerate(lines, 1):
                if len(line) == MOST_LINE_BYTES:
                    reason = f"line {number} has {len(line):,} bytes or more"
                    raise UserError(f"{path}: {reason}; fix: prepare the data again")
                try:
                    text = json.loads(line)["text"].encode() if line.strip() else None
                except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                    reason = f'line {number} is no JSON object with a string "text"'
                    raise UserError(f"{path}: {reason}; fix: prepare the data again") from error
                if text is not None:
                    yield text


class ValidationText:
    """The validation stream from a BOS on, its targets, their bytes, and the text where known."""

    def __init__(self, cfg: Config):
        """UserError for shards without text or of another tokenizer."""
        paths = find_shards(cfg.data_path, "val")
        shards = [read_shard(path, cfg.vocab_size) for path in paths]
        implied = int(shards[0][0] != BOS)  # 1: the first token is a target, too
        self.cfg = cfg
        self.stream = np.concatenate([np.full(implied, BOS, np.uint16), *shards])
        self.targets = self.stream[1:]  # (N,)
        self.positions = np.arange(len(self.targets)) + 1 - implied  # in the shards
        self.edges = [*np.flatnonzero(self.stream == BOS).tolist(), len(self.stream)]
        self.facts = read_dataset(cfg)
        tokenizer = load_tokenizer(cfg.tokenizer_path, cfg.vocab_size)
        self.unknown = tokenizer.unk_id()
        self.refuse_foreign(self.stream[implied:])
        tables = token_bytes(cfg.tokenizer_path, cfg.vocab_size)
        self.decoder = Decoder(tokenizer, tables, self.stream)
        self.bytes = tables.count(self.targets, self.stream[:-1])
        spaces = self.decoder.spaces(self.targets)
        self.bytes[spaces[:, None] + np.arange(3)] = 0
        self.bytes[spaces] = ~tables.swallows_space[self.stream[spaces]]
        self.spelt_bytes = int(self.bytes.sum())
        names = dict.fromkeys(path.name.rpartition("_val_")[0] for path in paths)
        sources = [Path(cfg.data_path, f"{name}_val.jsonl") for name in names]
        self.sources = sources if all(path.is_file() for path in sources) else []
        self.text_bytes = self.measure_text() if self.sources else self.spelt_bytes
        if not self.spelt_bytes or not self.text_bytes:
            raise UserError(f"DATA_PATH={cfg.data_path!r}: no text to validate on; fix: more text")
        self.changed = 0  # documents that are not the text as it was, as far as checked
        self.checked = self.check()

    @property
    def lossy(self) -> bool:
        """Did the tokenizer alter the text, or, where that cannot be known, does it alter texts?"""
        if self.sources:
            return self.changed > 0 or self.text_bytes != self.spelt_bytes
        return self.facts["lossy"] if "lossy" in self.facts else self.decoder.alters()

    def refuse_foreign(self, tokens: np.ndarray) -> None:
        """UserError for tokens that cannot be decoded, or that dataset.json does not know."""
        where = f"DATA_PATH={self.cfg.data_path!r}"
        if count := int((tokens == self.unknown).sum()):
            found = f"{count:,} of {len(tokens):,} validation tokens are unknown to the tokenizer"
            fix = "one with byte fallback, or trained on such text"
            raise UserError(f"{where}: {found} and cannot be decoded; fix: {fix}")
        known = self.facts.get("val_tokens_sha256")
        if known is not None and known != sha256(tokens.astype("<u2")):
            fix = "prepare or download it again"
            raise UserError(f"{where}: its val shards are not dataset.json's; fix: {fix}")

    def measure_text(self) -> int:
        """UTF-8 bytes of the text beside the shards; UserError where it cannot be theirs."""
        sizes = [len(text) for text in read_texts(self.sources)]
        documents = len(self.edges) - 1
        if len(sizes) != documents:
            found = f"{len(sizes):,} documents, the validation shards have {documents:,}"
            fix = "prepare the data again, or move it away"
            raise UserError(f"{self.sources[0]}: {found}; fix: {fix}")
        ours = sha256(b"".join(path.read_bytes() for path in self.sources))
        known = self.facts.get("val_text_sha256", ours)
        if known != ours:
            found = f"its sha256 {ours[:12]} is not {known[:12]}, that in dataset.json"
            raise UserError(f"{self.sources[0]}: {found}; fix: prepare the data again")
        return sum(sizes)

    def check(self, rest: bool = False) -> dict[str, int]:
        """Compare the bytes of each document with what it spells, and this with the text where that
        is known: of all documents, or of every n-th where all would take more than seconds; `rest`:
        of the others. -> what was compared; UserError where they differ."""
        every = max(len(self.targets) // FIRST_CHECKED, len(self.edges) // FIRST_DOCUMENTS) + 1
        texts = read_texts(self.sources) if self.sources else itertools.repeat(None)
        found = dict(tokens=0, bytes=0, documents=0)
        for number, text in zip(range(len(self.edges) - 1), texts, strict=False):
            if rest == (number % every == 0):
                continue
            begin = self.edges[number]
            end = self.edges[number + 1]
            spelt = self.decoder.spell(self.stream[begin + 1 : end])
            counted = int(self.bytes[begin : end - 1].sum())
            if len(spelt) != counted:
                reason = f"its byte table counts {counted:,} bytes in validation document {number}"
                spells = f"which spells {len(spelt):,}; fix: another tokenizer, and its shards"
                raise UserError(f"TOKENIZER_PATH={self.cfg.tokenizer_path!r}: {reason}, {spells}")
            if text is not None and text != spelt:
                self.require_ours(number, text, spelt)
            found["tokens"] += end - max(begin, 1)
            found["bytes"] += counted
            found["documents"] += 1
        return found

    def require_ours(self, number: int, text: bytes, spelt: bytes) -> None:
        """A document that the tokenizer altered is to the byte what it makes of the text, or these
        are not its tokens (UserError). By dataset.json none may be altered where it says so."""
        if self.facts.get("lossy") is False or self.decoder.again(text.decode()) != spelt:
            reason = f"validation document {number} spells {len(spelt):,} bytes, not what it makes"
            known = f"of the {len(text):,} of {' and '.join(map(str, self.sources))}"
            fix = "fix: the tokenizer and text that these shards were made with"
            raise UserError(f"TOKENIZER_PATH={self.cfg.tokenizer_path!r}: {reason} {known}; {fix}")
        self.changed += 1


# Documents that training and validation share.


class Overlap:
    """How many validation documents stand in the training shards, too: by exact fingerprints, made
    on rank 0 in a thread beside the training. A document belongs to the shard that it begins in."""

    def __init__(self, text: ValidationText, shards: list[Path], rt: Runtime):
        self.cfg = text.cfg
        self.rt = rt
        self.shards = shards
        self.unknown = text.unknown
        self.pool = ThreadPoolExecutor(1)
        self.scans: list[Future] = []  # of each shard, in their order
        edges = np.array(text.edges)
        full = np.diff(edges) > 1
        begins = edges[:-1][full] + 1
        ends = edges[1:][full]
        keys = document_keys(text.stream, begins, ends).tolist()
        prints = [fingerprint_of(text.stream[b:e]) for b, e in zip(begins, ends, strict=True)]
        self.missing = dict(zip(prints, keys, strict=True))  # those not found so far
        self.times = Counter(prints)  # of the same
        self.keys = np.unique([*self.missing.values()])  # only documents with one are fingerprinted
        self.longest = int((ends - begins).max(initial=0))
        self.ends = np.cumsum([shard_tokens(path) for path in shards])
        self.shared = 0  # documents of validation, also those that stand there more than once
        self.documents = 0  # of training, empty ones aside
        self.logged = -1  # the last shard of the last line
        self.unknown_tokens = 0

    def ask(self, shard: int) -> None:
        """Have the shards up to this one looked through."""
        while self.rt.rank == 0 and len(self.scans) <= shard:
            self.scans.append(self.pool.submit(self.scan, len(self.scans)))

    def scan(self, number: int) -> tuple[dict[str, Any], int]:
        """Look through the next shard. -> values of the line, unknown tokens, up to here."""
        tokens = np.asarray(read_shard(self.shards[number], self.cfg.vocab_size))
        places = [np.array([-1] if number == 0 and tokens[0] != BOS else [], int)]
        for begin in range(0, len(tokens), SCAN_TOKENS):
            block = tokens[begin : begin + SCAN_TOKENS]
            places.append(np.flatnonzero(block == BOS) + begin)
            self.unknown_tokens += int((block == self.unknown).sum())
        begins = np.concatenate(places) + 1
        for first in range(0, len(begins) - 1, SCAN_DOCUMENTS):
            some = begins[first : first + SCAN_DOCUMENTS + 1]
            self.strike_out(tokens, some[:-1], some[1:] - 1)
        if len(begins):  # the last one may reach over the end
            last = [tokens[begins[-1] :][: self.longest + 1]]
            last += self.heads(number + 1, self.longest + 1 - len(last[0]))
            whole = np.concatenate(last)
            self.strike_out(whole, np.array([0]), np.array([len(whole)]))
        of = f"{number + 1}/{len(self.shards)}"
        counts = dict(documents=self.shared, train_documents=self.documents, shards=of)
        return counts, self.unknown_tokens

    def heads(self, number: int, room: int) -> Iterator[np.ndarray]:
        """The tokens from shard `number` on up to a BOS, at most `room`."""
        while room > 0 and number < len(self.shards):
            tokens = np.asarray(read_shard(self.shards[number], self.cfg.vocab_size))[:room]
            ends = np.flatnonzero(tokens == BOS)
            yield tokens[: ends[0]] if len(ends) else tokens
            room = 0 if len(ends) else room - len(tokens)
            number += 1

    def strike_out(self, tokens: np.ndarray, begins: np.ndarray, ends: np.ndarray) -> None:
        """The documents tokens[begin:end] are of training; empty ones do not count."""
        full = np.flatnonzero(ends > begins)
        self.documents += len(full)
        keys = document_keys(tokens, begins[full], ends[full])
        for i in full[np.isin(keys, self.keys)].tolist():
            found = fingerprint_of(tokens[begins[i] : ends[i]])
            self.shared += self.times.pop(found, 0)
            self.missing.pop(found, None)
        self.keys = np.unique([*self.missing.values()])

    def log(self, steps: int, seconds: float | None = None) -> None:
        """A line on the shards that so many steps read, unless it stands in the log; none where it
        would take more than so many seconds to wait for."""
        shard = last_shard(self.ends, steps, self.cfg)
        self.ask(shard)
        scans = self.scans[: shard + 1]  # none on other ranks
        if not scans or shard == self.logged or wait(scans, seconds).not_done:
            return
        self.logged = shard
        try:
            counts, unknown = [scan.result() for scan in scans][-1]
        except (UserError, OSError) as error:
            self.rt.log("note", f"training documents were not compared: {error}")
            return self.rt.log("overlap", documents="unknown")
        self.rt.log("overlap", **counts)
        if unknown:
            self.rt.log("note", f"{unknown} training tokens are unknown to the tokenizer")


def document_keys(tokens: np.ndarray, begins: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Length, first and last token of each tokens[begin:end], int64; equal for equal ones."""
    first = tokens[np.minimum(begins, len(tokens) - 1)].astype(np.int64)
    return (ends - begins) << 32 | first << 16 | tokens[ends - 1]


def fingerprint_of(tokens: np.ndarray) -> bytes:
    return hashlib.blake2b(tokens.astype("<u2"), digest_size=16).digest()


# -----------------------------------------------------------------------------
# 5. Model
# Tokens in, logits out. The matrices of all layers lie in four banks (PR #399), for batched
# Newton-Schulz; gains and gates in stacks, one row a layer.
#
# Shapes: B rows or lanes, T positions, D width, H query heads, G key/value heads, d width of a
# head, V vocabulary, L layers.

BANKS = ("qo_bank", "kv_bank", "mlp_up_bank", "mlp_down_bank")
MATRICES = ("query", "key", "value", "output", "up", "down")  # of a layer, as Context lists them
ENRICHMENT = ("enrich_up", "enrich_down")


class Spec(NamedTuple):
    """Who initialises, trains and packs a parameter."""

    shape: tuple[int, ...]
    init: float | Callable[[Tensor], Any]
    group: str  # "muon", "embed", "scalar" or "routing"
    coding: str  # "int4" to "int8", "fp16" or "fp32"


def normal(std: float) -> Callable[[Tensor], Tensor]:
    return lambda weight: weight.normal_(std=std)


def uniform(weight: Tensor) -> Tensor:
    return weight.uniform_(-1, 1).mul_(weight.shape[-1] ** -0.5)


def orthogonal(weight: Tensor) -> None:
    """Each matrix of a bank by itself."""
    for matrix in weight.view(-1, *weight.shape[-2:]):
        nn.init.orthogonal_(matrix)


def overtone(std: float) -> Callable[[Tensor], Tensor]:
    """OVERTONE_INIT: normal, then singular values proportional to 1 / sqrt(k) (PR #810)."""

    def start(weight: Tensor) -> Tensor:
        u, values, v = torch.linalg.svd(weight.normal_(std=std), full_matrices=False)
        falling = torch.arange(1, len(values) + 1) ** -0.5
        return weight.copy_(u * (values[0] * falling) @ v)

    return start


def parameter_specs(cfg: Config) -> dict[str, Spec]:
    """Name -> Spec of every parameter, in the order of the artifact."""
    layers = cfg.num_layers
    dim = cfg.model_dim
    heads = cfg.num_heads
    kv_dim = dim // heads * cfg.num_kv_heads
    hidden = int(cfg.mlp_mult * dim)
    vocab = cfg.vocab_size
    std = cfg.tied_embed_init_std
    matrix = orthogonal if cfg.ortho_init else uniform
    coding = cfg.matrix_coding
    table = cfg.table_coding
    small = "int8" if cfg.control_coding == "int8" else "fp16"
    number = "fp32" if cfg.control_coding == "fp32" else "fp16"  # has no row

    def gain(init: float | Callable[[Tensor], Any], *shape: int) -> Spec:
        return Spec(shape, init, "scalar", cfg.control_coding if shape else number)

    def queries_only(weight: Tensor) -> None:
        """The first half of the bank; the output projections start at zero."""
        matrix(weight.zero_()[:layers])

    def all_of_x(weight: Tensor) -> None:
        """A block starts from its input, with nothing of the embedding mixed in."""
        weight.copy_(torch.tensor([[1.0], [0.0]]))

    pairs = cfg.bigram_vocab_size
    linear = cfg.bigram_kind == "linear"  # PR #810: one of the matrices, from a random start
    pair_start = normal(0.01) if linear else 0.0
    pair_group = "muon" if linear else "embed"
    projection_group = "muon" if linear else "scalar"
    enrich = cfg.pre_enrich_dim
    values = cfg.value_layers
    gated = cfg.gated_attention
    skips = len(layers_passed(cfg)) // 2
    specs = {
        "tok_emb": Spec(
            (vocab, dim),
            overtone(std) if cfg.overtone_init else normal(std),
            "embed",
            cfg.embed_coding,
        ),
        "qo_bank": Spec(
            (2 * layers, dim, dim), queries_only, "muon", coding
        ),  # L queries, L outputs
        "kv_bank": Spec((2 * layers, kv_dim, dim), matrix, "muon", coding),  # L keys, L values
        "mlp_up_bank": Spec((layers, hidden, dim), matrix, "muon", coding),
        "mlp_down_bank": Spec((layers, dim, hidden), 0.0, "muon", coding),
        "q_gain": gain(cfg.qk_gain_init, layers, heads),
        "attn_scale": gain(1.0, layers, dim),
        "mlp_scale": gain(1.0, layers, dim),
        "resid_mix": gain(all_of_x, layers, 2, dim),
        "skip_weights": gain(1.0, skips, dim),
        "skip_gates": cfg.skip_gates and gain(0.0, skips, dim),
        "smear": cfg.smear_gate and gain(cfg.smear_init, dim),
        "bigram_embed": pairs and Spec((pairs, cfg.bigram_dim), pair_start, pair_group, table),
        "bigram_proj": pairs and Spec((dim, cfg.bigram_dim), matrix, projection_group, small),
        "bigram_scale": pairs and not linear and gain(0.05),
        "enrich_up": enrich and Spec((enrich, dim), uniform, "muon", coding),
        "enrich_down": enrich and Spec((dim, enrich), uniform, "muon", coding),
        "ve_embed": values and Spec((vocab, cfg.ve_dim), normal(0.01), "embed", table),
        "ve_proj": values and Spec((kv_dim, cfg.ve_dim), matrix, "scalar", small),
        "ve_scale": values and gain(0.1),
        "ve_layer_scales": values and gain(1.0, len(values)),
        "vr_lambda": cfg.value_residual and gain(0.5, layers, 2),
        "attn_gate_weight": gated and gain(0.0, layers, heads, cfg.gate_inputs or dim),
        "attn_gate_bias": gated and gain(4.0, layers, heads),
        "routing_alpha": cfg.polyglu_enabled and Spec((layers, hidden), 0.0, "routing", small),
    }
    return {name: spec for name, spec in specs.items() if spec}


def layers_passed(cfg: Config, looped: bool = True) -> list[int]:
    """Layers in the order in which a token passes them. Those of LOOP_LAYERS stand there LOOP_TIMES
    times where it is `looped`: with 3-5 of 7 layers, twice, 0 1 2 3 4 5 3 4 5 6. The first half of
    this list hands its outputs to the second half, last to first."""
    layers = [*range(cfg.num_layers)]
    part = cfg.looped_layers
    if not looped or not part:
        return layers
    return layers[: part[0]] + part * cfg.loop_times + layers[part[-1] + 1 :]


def count_blocks(cfg: Config, looped: bool = True) -> int:
    """Blocks that a token passes, which is also how many attentions have keys and values."""
    return len(layers_passed(cfg, looped)) + len({*cfg.depth_recurrence})


def count_parameters(cfg: Config) -> int:
    return sum(math.prod(spec.shape) for spec in parameter_specs(cfg).values())


def rms_norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:])


def stream_dtype(x: Tensor) -> Tensor:
    """x as the residual stream carries it: in bf16 under autocast, as PR #549's does; embeddings
    and gains are fp32, and a sum with one of them would make all of the stream so."""
    kind = x.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return x
    return x.to(torch.get_autocast_dtype(kind))


def rotary_table(cfg: Config, positions: Tensor) -> Tensor:
    """positions (n,) -> cos and sin, float32 (2, n, ROPE_DIMS / 2). Training longer than
    ROPE_TRAIN_SEQ_LEN stretches the base (NTK rule)."""
    dims = cfg.rope_dims or cfg.model_dim // cfg.num_heads
    stretch = max(1.0, cfg.train_seq_len / cfg.rope_train_seq_len)
    base = cfg.rope_base * stretch ** (dims / max(1, dims - 2))
    exponents = torch.arange(0, dims, 2, dtype=torch.float64, device=positions.device) / dims
    angles = torch.outer(positions.double(), base**-exponents)
    return torch.stack([angles.cos(), angles.sin()]).float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The first 2 * cos.shape[-1] dimensions of each head, half-split. (B, H, T, d)"""
    half = cos.shape[-1]
    a, b, rest = x.split((half, half, x.shape[-1] - 2 * half), dim=-1)
    return torch.cat([a * cos + b * sin, b * cos - a * sin, rest], dim=-1)


def exclude_self(y: Tensor, v: Tensor) -> Tensor:
    """XSA: attention's output y (B, H, T, d) without the part along the position's own value
    v (B, G, T, d), which the residual stream has anyway."""
    own = F.normalize(v, dim=-1).unsqueeze(2)  # (B, G, 1, T, d)
    grouped = y.unflatten(1, (v.shape[1], -1))  # (B, G, H / G, T, d)
    return (grouped - (grouped * own).sum(-1, keepdim=True) * own).flatten(1, 2)


def fake_quantize(weight: Tensor, scale: Tensor, largest: int) -> Tensor:
    """The weight on its grid, with a straight-through gradient; unchanged where scale is 0.

    Late QAT hangs on this 0. The published scripts switched it by a Python flag, which
    torch.compile had frozen into the graph as False, so it never ran. Here the switch is data: a
    buffer of scales, zero until late QAT fills it, which the same graph reads each step.
    """
    on_grid = round_to_grid(weight, scale.clamp_min(1e-12), largest) * scale
    return weight + torch.where(scale > 0, on_grid - weight, 0.0).detach()


def layer_weights(model: "GPT", adapters: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, ...]]:
    """Of MATRICES one a layer, from the banks; of ENRICHMENT one where there is any. adapters: what
    is added to a bank."""
    banks = {name: model.bank(name) for name in BANKS}
    for name, added in adapters.items():
        banks[name] = banks[name] + added
    queries, outputs = banks["qo_bank"].chunk(2)
    keys, values = banks["kv_bank"].chunk(2)
    # attn_scale and mlp_scale multiply the rows of a sublayer's last matrix, not its output: the
    # same product, but the backward pass need not be given the output.
    outputs = outputs * model.attn_scale.unsqueeze(2)
    down = banks["mlp_down_bank"] * model.mlp_scale.unsqueeze(2)
    matrices = queries, keys, values, outputs, banks["mlp_up_bank"], down
    weights = {name: bank.unbind() for name, bank in zip(MATRICES, matrices, strict=True)}
    enrichment = ENRICHMENT if model.cfg.pre_enrich_dim else ()
    return weights | {name: (model.bank(name),) for name in enrichment}


class Context:
    """What the blocks of a forward pass share, and how a position sees the past. This one is of
    rows: B sequences of T tokens, each from its own position 0 on."""

    def __init__(
        self,
        model: "GPT",
        ids: Tensor,
        adapters: Mapping[str, Tensor] | None = None,
        observe: Callable[[str, int, Tensor], None] | None = None,
    ):
        """ids (B, T); adapters: bank name -> what is added to that bank; observe: see linear."""
        positions = torch.arange(ids.shape[1], device=ids.device)
        self.first = positions == 0
        self.ids = ids
        self.inside_documents = model.cfg.doc_attention
        self.mask: Any = None  # document_mask or flex_mask, made by the first attention
        self.rope = rotary_table(model.cfg, positions)
        self.weights = layer_weights(model, adapters or {})
        self.first_values: Tensor | None = None
        self.observe = observe

    def linear(self, name: str, x: Tensor, layer: int = 0) -> Tensor:
        """x (..., columns) times a matrix of MATRICES or ENRICHMENT -> (..., rows). Every one of
        them is applied here, and `observe` is shown its inputs."""
        if self.observe:
            self.observe(name, layer, x)
        return F.linear(x, self.weights[name][layer])

    def start(self, x0: Tensor, value_embedding: Tensor | None) -> None:
        """Keep what every block mixes in: the embedding (B, T, D), value embedding (B, T, G d)."""
        self.x0 = x0
        self.value_embedding = value_embedding

    def keep_first_values(self, v: Tensor) -> Tensor:
        """-> the values of the first layer that asks, itself included. (B, G, T, d)"""
        if self.first_values is None:
            self.first_values = v
        return self.first_values

    def previous(self, _: str, x: Tensor) -> Tensor:
        """x_{t-1} at t, zeros first. (B, T, ...)"""
        return torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (B, H, T, d), k and v (B, G, T, d) of this pass -> (B, H, T, d), causal; with
        DOC_ATTENTION inside documents."""
        if not self.inside_documents:
            return attend(q, k, v)
        compiled = q.is_cuda and torch.compiler.is_compiling()
        if self.mask is None:
            self.mask = flex_mask(self.ids) if compiled else document_mask(self.ids, q.dtype)
        if compiled:
            return attend_flex(q, k, v, self.mask)
        return attend(q, k, v, self.mask)


def varlen_attention(device: torch.device) -> Callable | None:
    """torch's attention over sequences of their own lengths, where the number of filled keys may be
    a tensor on the device (CUDA, torch 2.13); None elsewhere."""
    if device.type != "cuda":
        return None
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn if "seqused_k" in inspect.signature(varlen_attn).parameters else None


def attend_seen(varlen: Callable, q: Tensor, keys: Tensor, values: Tensor, seen: Tensor) -> Tensor:
    """One query a lane: q (B, H, 1, d), keys and values (B, S, G, d), of which the first `seen`,
    int32 (B,), are read -> (B, H, 1, d). varlen: of varlen_attention."""
    lanes, slots = keys.shape[:2]
    edges = torch.arange(lanes + 1, dtype=torch.int32, device=q.device)
    rows = q[:, :, 0].type_as(keys)
    flat = keys.flatten(0, 1), values.flatten(0, 1)
    how = dict(seqused_k=seen, enable_gqa=q.shape[1] != keys.shape[2])
    return varlen(rows, *flat, edges, edges * slots, 1, slots, **how).unsqueeze(2)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Grouped attention: q (B, H, T, d), k and v (B, G, T, d) -> (B, H, T, d). Causal, or by a
    mask of document_mask."""
    grouped = q.shape[1] != k.shape[1]
    how = dict(is_causal=mask is None, enable_gqa=grouped)
    return F.scaled_dot_product_attention(q, k, v, mask, **how)


# A row holds parts of several documents. With DOC_ATTENTION a position sees those of its own that
# are not after it, as it will when the document is scored alone. In a graph compiled for CUDA
# FlexAttention leaves out the tiles of which nothing is seen; elsewhere it is a mask of all pairs.


def document_mask(ids: Tensor, dtype: torch.dtype) -> Tensor:
    """ids (B, T) -> (B, 1, T, T): 0 where a position (third) sees another (fourth), else -inf. Of a
    bool each attention would make and keep such numbers of its own."""
    document = (ids == BOS).cumsum(1)
    same = document.unsqueeze(2) == document.unsqueeze(1)
    unseen = ~same.tril().unsqueeze(1)
    return torch.zeros_like(unseen, dtype=dtype).masked_fill_(unseen, -math.inf)


def flex_mask(ids: Tensor) -> Any:
    """The same as FlexAttention's BlockMask, whose shape does not depend on the documents."""
    from torch.nn.attention.flex_attention import create_block_mask  # takes seconds

    document = (ids == BOS).cumsum(1)

    def sees(row: Tensor, _: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (document[row, query] == document[row, key])

    rows, length = ids.shape
    return create_block_mask(sees, rows, None, length, length, device=ids.device)


def attend_flex(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
    """attend, by a mask of flex_mask."""
    from torch.nn.attention.flex_attention import flex_attention

    sides = (stream_dtype(side) for side in (q, k, v))  # as autocast does for torch's own
    return flex_attention(*sides, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])


def attend_masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """One query a lane: q (B, H, 1, d), k and v (B, G, S, d), which are seen where the mask, bool
    (B, S), is True -> (B, H, 1, d). The queries that share a key are rows of one head: no kernel
    need copy keys for them, as some do and others refuse to."""
    rows = q.unflatten(1, (k.shape[1], -1)).squeeze(3)  # (B, G, H / G, d)
    return (
        F.scaled_dot_product_attention(rows, k, v, mask[:, None, None]).flatten(1, 2).unsqueeze(2)
    )


class LaneCache(Context):
    """The past of pieces that are read side by side, one token a lane a step.

    Each lane holds the last `window` keys and values of every attention (a layer that a token
    passes twice has two) and, by name, what smear and bigram hash saw a token ago. Position p of a
    piece lies in slot p % window; slots that this piece has not filled yet are not seen, so a new
    piece needs nothing cleared. Their order does not matter: keys carry their position (rotary),
    and whatever is seen is of the past. With a window of 4, at position 5:

        slot       0  1  2  3
        position   4  5  2  3     all seen: the last four
        at p = 1   0  1  .  .     slots 2 and 3 hold another piece and are masked
    """

    def __init__(self, model: "GPT", count: int, window: int):
        cfg = model.cfg
        device = model.tok_emb.device
        super().__init__(model, torch.zeros(count, 1, device=device))
        self.cfg = cfg
        self.lane = torch.arange(count, device=device)
        self.past: dict[str, Tensor] = {}
        self.marked: dict[str, Tensor] = {}
        head = cfg.model_dim // cfg.num_heads
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        shape = count, window, cfg.num_kv_heads, head
        blocks = range(count_blocks(cfg))
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in blocks]
        self.values = [torch.zeros_like(keys) for keys in self.keys]
        self.slots = torch.arange(window, device=device)
        self.varlen = varlen_attention(device)
        if device.type == "cuda":  # once, not in each step, as autocast would
            for name, layers in self.weights.items():
                self.weights[name] = tuple(weight.to(dtype) for weight in layers)

    def refresh(self, model: "GPT") -> None:
        """After a change of the model's weights; keys and values of the past stay as they are."""
        for name, layers in layer_weights(model, {}).items():
            torch._foreach_copy_(self.weights[name], layers)

    def mark(self) -> None:
        """Keep `past` as it is now: a LaneChunk begins here."""
        for name, kept in self.past.items():
            self.marked.setdefault(name, torch.empty_like(kept)).copy_(kept)

    def begin(self, positions: Tensor) -> None:
        """A step. positions (B,): in the lanes' pieces; 0 forgets the one before."""
        self.first = positions.unsqueeze(1) == 0
        self.call = 0
        self.first_values = None
        self.rope = rotary_table(self.cfg, positions)[:, :, None, None]
        self.slot = positions % len(self.slots)
        if self.varlen:
            self.seen = (positions + 1).clamp(max=len(self.slots)).int()
        else:
            self.seen = self.slots <= positions.unsqueeze(1)

    def previous(self, name: str, x: Tensor) -> Tensor:
        kept = self.past.setdefault(name, torch.zeros_like(x))
        previous = kept.masked_fill(self.first.view(-1, *[1] * (x.dim() - 1)), 0)
        kept.copy_(x)
        return previous

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys = self.keys[self.call]  # (B, window, G, d)
        values = self.values[self.call]
        self.call += 1
        keys[self.lane, self.slot] = k[:, :, 0].type_as(keys)
        values[self.lane, self.slot] = v[:, :, 0].type_as(values)
        if self.varlen:
            return attend_seen(self.varlen, q, keys, values, self.seen)
        return attend_masked(q, keys.transpose(1, 2), values.transpose(1, 2), self.seen)


class LaneChunk(Context):
    """The last M tokens of every lane once more, all at once and with gradients. They see
    themselves anew, and of what was before them the cached keys and values that are still there, as
    constants; LaneCache.mark was called where they begin. With a window of 8, at positions 6, 7 of
    a document and 0 of the next one, whose keys then lie in slots 6, 7 and 0:

        6 and 7 see the cache's 1 to 5, and each other as in a row; the new 0 sees itself alone

    The old key of slot 0 is gone, though 6 and 7 saw it when they were scored: up to M - 1 keys
    fewer are seen here.
    """

    def __init__(self, model: "GPT", cache: LaneCache, ids: Tensor, places: Tensor):
        """ids, places in their pieces: int64 (B, M)."""
        super().__init__(model, ids)
        self.cache = cache
        self.call = 0
        self.first = places == 0
        rope = rotary_table(model.cfg, places.flatten())
        self.rope = rope.unflatten(1, places.shape).unsqueeze(2)  # (2, B, 1, M, r / 2)
        slots = cache.slots
        document = self.first.cumsum(1)  # 0: the one that a lane was reading
        overwritten = (places.unsqueeze(2) % len(slots) == slots).any(1)  # (B, S)
        old = (slots < places[:, :1]) & ~overwritten
        old = old.unsqueeze(1) & (document == 0).unsqueeze(2)  # (B, M, S)
        order = torch.arange(ids.shape[1], device=ids.device)
        back = order.unsqueeze(1) - order
        new = (document.unsqueeze(2) == document.unsqueeze(1)) & (back >= 0) & (back < len(slots))
        self.seen = torch.cat([old, new], 2)  # (B, M, S + M)

    def previous(self, name: str, x: Tensor) -> Tensor:
        before = self.cache.marked.get(name)
        before = torch.zeros_like(x[:, :1]) if before is None else before.type_as(x)
        previous = torch.cat([before, x[:, :-1]], 1)
        return previous.masked_fill(self.first.view(*x.shape[:2], *[1] * (x.dim() - 2)), 0)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """By plain matrix products: the backward pass of CUDA's fused attention differs from call
        to call."""
        keys = self.cache.keys[self.call].transpose(1, 2)  # (B, G, S, d)
        values = self.cache.values[self.call].transpose(1, 2)
        self.call += 1
        keys = torch.cat([keys, k.type_as(keys)], 2).unsqueeze(2)
        values = torch.cat([values, v.type_as(values)], 2).unsqueeze(2)
        rows = q.type_as(keys).unflatten(1, (k.shape[1], -1))  # (B, G, H / G, M, d)
        scores = rows @ keys.transpose(-1, -2) / math.sqrt(q.shape[-1])
        scores = scores.float().masked_fill(~self.seen[:, None, None], -math.inf)
        return (scores.softmax(-1).type_as(values) @ values).flatten(1, 2)


class GPT(nn.Module):
    """The stack of PR #549 with its siblings' switches: a U-Net of blocks, whose first half's
    outputs are handed to the second half, last to first (add_skip). With LOOP_LAYERS some blocks
    stand in it several times (PR #1493) from its making on; Trainer turns that off until
    LOOP_FROM."""

    def __init__(self, cfg: Config, known: "KnownText | None" = None):
        """known: what an artifact holds beside the weights."""
        super().__init__()
        self.cfg = cfg
        self.known = known or NOTHING_KNOWN
        self.set_looped(True)
        for name, spec in parameter_specs(cfg).items():
            self.register_parameter(name, nn.Parameter(torch.full(spec.shape, math.nan)))
            if spec.group == "muon" and "bigram" not in name:
                grid = torch.zeros(*spec.shape[:-1], 1)  # 0: late QAT is off, see fake_quantize
                self.register_buffer(f"{name}_grid", grid, persistent=False)

    def set_looped(self, looped: bool) -> None:
        """Which blocks a token passes from now on. To the compiler each is a graph of its own."""
        self.looped = looped
        self.layers = layers_passed(self.cfg, looped)

    @torch.no_grad()
    def initialise(self) -> "GPT":
        for name, spec in parameter_specs(self.cfg).items():
            weight = getattr(self, name)
            if callable(spec.init):
                spec.init(weight)
            else:
                weight.fill_(spec.init)
            assert weight.isfinite().all(), f"nobody initialised {name}"
        return self

    def bank(self, name: str) -> Tensor:
        """The matrices of a linear layer; while training, on their grid if they have one."""
        weight = getattr(self, name)
        if not self.training:
            return weight
        largest = LARGEST[self.cfg.matrix_coding]
        if self.cfg.qat_enabled:  # PR #810: of every linear layer, a matrix of the artifact or not
            widest = weight.detach().abs().amax(-1, keepdim=True)
            return fake_quantize(weight, widest / largest, largest)
        grid = getattr(self, f"{name}_grid", None)
        return weight if grid is None else fake_quantize(weight, grid, largest)

    def forward(
        self, ids: Tensor, targets: Tensor, adapters: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Mean cross-entropy in nats of targets given ids, both int64 (B, T)."""
        logits = self.logits(self.hidden(ids, adapters=adapters))
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    def hidden(
        self,
        ids: Tensor,
        context: Context | None = None,
        adapters: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """ids (B, T) -> normed output of the last block (B, T, D). Without a context: rows, seen
        through banks with their adapters."""
        cfg = self.cfg
        half = len(self.layers) // 2
        context = context or Context(self, ids, adapters)
        skips = []
        x = self.embed(ids, context)
        if cfg.pre_enrich_dim:
            x = rms_norm(self.enrich(x, context))
        x = stream_dtype(x)
        context.start(x, self.value_embedding(ids))
        for place, i in enumerate(self.layers):
            if place >= half and skips:
                x = self.add_skip(place - half, x, skips.pop())
            for _ in range(1 + (i in cfg.depth_recurrence)):
                x = self.block(i, x, context)
            if place < half:
                skips.append(x)
        return rms_norm(x)

    def add_skip(self, number: int, x: Tensor, skip: Tensor) -> Tensor:
        """What a block of the second half is given: x and, weighted, the output of its block of the
        first half, added or blended. number: of the pair, from the inside out; once loops begin it
        is another pair's. (B, T, D)"""
        skip = self.skip_weights[number].type_as(x) * skip
        if not self.cfg.skip_gates:
            return x + skip
        return torch.lerp(skip, x, torch.sigmoid(self.skip_gates[number]).type_as(x))  # PR #1218

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> softcapped (..., V), at any selection of positions."""
        cap = self.cfg.logit_softcap
        return cap * torch.tanh(F.linear(hidden / cap, self.tok_emb))

    def embed(self, ids: Tensor, context: Context) -> Tensor:
        """Token + bigram embedding, norm (after pre-enrichment, where there is one), smear.
        (B, T) -> (B, T, D)"""
        cfg = self.cfg
        x = F.embedding(ids, self.tok_emb)
        starts = (ids == BOS) & cfg.bos_reset  # a document does not see the one before
        if cfg.bigram_vocab_size:
            pairs = F.embedding(self.bigram_index(ids, starts, context), self.bigram_embed)
            scale = 1.0 if cfg.bigram_kind == "linear" else self.bigram_scale
            x = x + scale * F.linear(pairs, self.bank("bigram_proj"))
        x = x if cfg.pre_enrich_dim else rms_norm(x)
        if cfg.smear_gate:
            previous = context.previous("x", x).masked_fill(starts.unsqueeze(-1), 0.0)
            x = torch.lerp(x, previous, torch.sigmoid(self.smear).type_as(x))
        return x

    def enrich(self, x: Tensor, context: Context) -> Tensor:
        """Pre-enrichment: a GELU MLP in the place of the embedding (PR #810). (B, T, D)"""
        return context.linear("enrich_down", F.gelu(context.linear("enrich_up", x)))

    def value_embedding(self, ids: Tensor) -> Tensor | None:
        """A second embedding, for the attention values of VE_LAYERS. (B, T, G d)"""
        if not self.cfg.value_layers:
            return None
        return self.ve_scale * F.linear(F.embedding(ids, self.ve_embed), self.bank("ve_proj"))

    def bigram_index(self, ids: Tensor, starts: Tensor, context: Context) -> Tensor:
        """Hash of (previous, current) id: a place in the bigram embedding, (B, T). Nothing precedes
        the start of a row, nor a BOS where BOS_RESET is on: "xor", which wraps as int32 upstream,
        then takes the last place, "linear" (PR #810) that of a previous id 0."""
        size = self.cfg.bigram_vocab_size
        previous = context.previous("ids", ids).masked_fill(starts, 0)
        if self.cfg.bigram_kind == "linear":
            return (92821 * previous + ids) % size
        index = ((36313 * ids.int()) ^ (27191 * previous.int())) % (size - 1)
        return index.masked_fill(starts | context.first, size - 1)

    def block(self, i: int, x: Tensor, context: Context) -> Tensor:
        """Layer i: attention, then MLP, each on a normed input, which from PARALLEL_FROM on is the
        same (PR #1420). (B, T, D) -> (B, T, D)"""
        scale = 1 / math.sqrt(i + 1) if self.cfg.ln_scale else 1.0
        mix = self.resid_mix[i].type_as(x)
        x = mix[0] * x + mix[1] * context.x0
        h = rms_norm(x) * scale
        x = x + self.attention(i, h, context)
        if not 0 <= self.cfg.parallel_from <= i:
            h = rms_norm(x) * scale
        return x + self.mlp(i, h, context)

    def mlp(self, i: int, h: Tensor, context: Context) -> Tensor:
        """A squared leaky ReLU between two matrices. (B, T, D) -> (B, T, D)"""
        up = context.linear("up", h, i)
        if self.cfg.polyglu_enabled:  # PR #1026
            slope = torch.sigmoid(self.routing_alpha[i]).type_as(up)
            up = torch.where(up > 0, up, slope * up)
        else:
            up = F.leaky_relu(up, self.cfg.leaky_slope)
        return context.linear("down", up.square(), i)

    def attention(self, i: int, h: Tensor, context: Context) -> Tensor:
        """Grouped queries and keys, normed and partly rotated. (B, T, D) -> (B, T, D)"""
        cfg = self.cfg
        v = self.values(i, h, context)
        q = rms_norm(self.heads(context.linear("query", h, i))) * self.q_gain[i].view(-1, 1, 1)
        q = rotate(q, *context.rope)  # gain first: for its gradient the rotated q would be kept
        k = rotate(rms_norm(self.heads(context.linear("key", h, i))), *context.rope)
        y = context.attend(q, k, v)
        if i >= cfg.num_layers - cfg.xsa_last_n:
            y = exclude_self(y, v)  # (B, H, T, d)
        if cfg.gated_attention:
            inputs = h[..., : self.attn_gate_weight.shape[-1]]  # PR #1787: a few of them suffice
            gate = F.linear(inputs, self.attn_gate_weight[i], self.attn_gate_bias[i])  # (B, T, H)
            y = y * torch.sigmoid(gate).transpose(1, 2).unsqueeze(-1)
        return context.linear("output", y.transpose(1, 2).flatten(2), i)

    def heads(self, x: Tensor) -> Tensor:
        """(B, T, H d) -> (B, H, T, d)"""
        return x.unflatten(-1, (-1, self.cfg.model_dim // self.cfg.num_heads)).transpose(1, 2)

    def values(self, i: int, h: Tensor, context: Context) -> Tensor:
        """Projection + value embedding, mixed with the first layer's values. (B, G, T, d)"""
        v = context.linear("value", h, i)
        if i in self.cfg.value_layers:
            place = self.cfg.value_layers.index(i)
            v = v + self.ve_layer_scales[place] * context.value_embedding
        v = self.heads(v)
        first = context.keep_first_values(v)
        if self.cfg.value_residual and i:
            v = self.vr_lambda[i, 0] * first + self.vr_lambda[i, 1] * v
        return v


# -----------------------------------------------------------------------------
# 6. Optimizers and schedules
# Parallel Muon for the banks, AdamW for the rest; every schedule is a pure function.

# names since torch 2.13, or before
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def lr_factor(step: int, elapsed_seconds: float, cfg: Config, reserve: float = 0.0) -> float:
    """1, then linear towards 0, held at MIN_LR. The fall takes WARMDOWN_SHARE of the run; where
    that is 0, the last WARMDOWN_ITERS steps or, under a cap, the seconds that they take on average.
    reserve: of the cap's seconds, for what comes after."""
    if cfg.warmdown_share:
        length = cfg.warmdown_share
        left = 1 - share_done(step, elapsed_seconds, cfg, reserve)
    elif cfg.max_wallclock_seconds:
        length = cfg.warmdown_iters * elapsed_seconds / max(1, step)
        left = max(0, cfg.max_wallclock_seconds - reserve - elapsed_seconds)
    else:
        length = max(1, min(cfg.warmdown_iters, cfg.iterations))
        left = max(0, cfg.iterations - step)
    return 1.0 if left >= length else max(cfg.min_lr, left / length)


def share_done(step: int, elapsed_seconds: float, cfg: Config, reserve: float = 0.0) -> float:
    """Of the run, 0 to 1, by steps or by seconds, of which either ends it. reserve: see
    lr_factor."""
    cap = cfg.max_wallclock_seconds
    by_seconds = elapsed_seconds / max(1e-9, cap - reserve) if cap else 0.0
    return min(1.0, max(step / cfg.iterations, by_seconds))


def muon_momentum(step: int, cfg: Config) -> float:
    """Linear from its start to MUON_MOMENTUM over the warm-up's steps."""
    done = min(1.0, step / max(1, cfg.muon_momentum_warmup_steps))
    return (1 - done) * cfg.muon_momentum_warmup_start + done * cfg.muon_momentum


def newton_schulz(matrices: Tensor, steps: int, row_norm: bool = False) -> Tensor:
    """Singular values to about 1, zero stays zero. (n, r, c), any dtype. row_norm: each row is
    scaled to length 1 before (MuonEq-R, PR #1260).
    Jordan 2024, https://kellerjordan.github.io/posts/muon"""
    a, b, c = 3.4445, -4.7750, 2.0315
    if row_norm:
        matrices = matrices / (matrices.norm(dim=-1, keepdim=True) + 1e-7)
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices  # the smaller Gram matrix
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class MuonBank:
    """One bank's buffers on this rank, which owns `share` of its matrices: their averaged gradient
    and their momentum. With 22 matrices on 8 ranks a share is 3, the bank is padded to 24, and two
    of the last rank's three are padding: zero in, zero out."""

    def __init__(self, weight: nn.Parameter, rt: Runtime):
        count, rows, columns = weight.view(-1, *weight.shape[-2:]).shape
        share = -(-count // rt.world_size)
        kind = torch.bfloat16 if rt.cuda else torch.float32
        self.weight = weight
        self.scale = max(1.0, rows / columns) ** 0.5
        self.pending: Any = None
        # all ranks' matrices: gradients out, updates back in
        self.padded = weight.new_zeros(share * rt.world_size, rows, columns, dtype=kind)
        self.whole = self.padded[:count].view_as(weight)
        self.gradient = torch.zeros_like(self.padded[:share])
        self.momentum = torch.zeros_like(self.padded[:share])

    def start(self, collective: Callable, output: Tensor, source: Tensor) -> None:
        """Between all ranks' matrices and this rank's share, which on one rank is all of them."""
        if output.shape == source.shape:
            output.copy_(source)
        else:
            self.pending = collective(output, source.contiguous(), async_op=True)

    def wait(self) -> None:
        if self.pending:
            self.pending.wait()


class ParallelMuon:
    """Muon sharded over ranks (PR #399): each rank receives the averaged gradients of its share by
    a reduce-scatter, orthogonalises them, and gives the update to all by an all-gather. A bank's
    update travels while the next one is computed."""

    def __init__(self, weights: list[nn.Parameter], rt: Runtime, cfg: Config):
        weights = sorted(weights, key=Tensor.numel, reverse=True)  # the longest transfer first
        self.banks = [MuonBank(weight, rt) for weight in weights]
        self.orthogonalise = rt.compile(newton_schulz)
        self.rt = rt
        self.cfg = cfg

    def start_reduce(self) -> None:
        """Send the gradients off; `shares` waits for them."""
        for bank in self.banks:
            torch.div(bank.weight.grad, self.rt.world_size, out=bank.whole)
            bank.start(reduce_scatter, bank.gradient, bank.padded)

    def shares(self) -> list[Tensor]:
        """-> averaged gradients of this rank's shares."""
        for bank in self.banks:
            bank.wait()
        return [bank.gradient for bank in self.banks]

    @torch.no_grad()
    def step(self, rate: float, momentum: float, nonfinite: Tensor) -> None:
        """Nesterov momentum, orthogonalised; where nonfinite, a bool, no weight changes."""
        gradients = [bank.gradient for bank in self.banks]
        momenta = [bank.momentum for bank in self.banks]
        torch._foreach_mul_(momenta, momentum)
        torch._foreach_add_(momenta, gradients)
        nesterov = torch._foreach_add(gradients, momenta, alpha=momentum)
        for bank, ahead in zip(self.banks, nesterov, strict=True):
            steps = self.cfg.muon_backend_steps
            update = self.orthogonalise(ahead, steps, self.cfg.muon_row_norm)
            bank.start(all_gather, bank.padded, update)
        weights = [bank.weight for bank in self.banks]
        torch._foreach_mul_(weights, 1 - rate * self.cfg.muon_wd * ~nonfinite)
        for bank in self.banks:
            bank.wait()
            bank.weight.add_(bank.whole.masked_fill_(nonfinite, 0), alpha=-rate * bank.scale)

    def gather_momenta(self) -> list[Tensor]:
        """-> of each bank the momenta of all ranks, for a checkpoint. Called on every rank."""
        for bank in self.banks:
            bank.start(all_gather, bank.padded, bank.momentum)
            bank.wait()
        return [bank.padded.clone() for bank in self.banks]

    def restore_momenta(self, momenta: list[Tensor]) -> None:
        """This rank's shares of what gather_momenta gave."""
        for bank, whole in zip(self.banks, momenta, strict=True):
            share = whole.view(bank.padded.shape).chunk(self.rt.world_size)[self.rt.rank]
            bank.momentum.copy_(share)


class OptimizerGroup(NamedTuple):
    """Parameters that are trained alike."""

    names: list[str]
    rate: float
    decay: float


def optimizer_groups(cfg: Config) -> dict[str, OptimizerGroup]:
    """Spec.group -> its parameters, rate and weight decay."""
    groups = {
        "muon": OptimizerGroup([], cfg.matrix_lr, cfg.muon_wd),
        "embed": OptimizerGroup([], cfg.tied_embed_lr, cfg.adam_wd),
        "scalar": OptimizerGroup([], cfg.scalar_lr, cfg.adam_wd),
        "routing": OptimizerGroup([], cfg.scalar_lr, 0.0),
    }
    for name, spec in parameter_specs(cfg).items():
        groups[spec.group].names.append(name)
    return {name: members for name, members in groups.items() if members.names}


def average_gradients(weights: Sequence[Tensor], rt: Runtime, more: Sequence[Tensor] = ()) -> None:
    """Over ranks, by one all-reduce; of `more`, tensors as well, the sum."""
    if rt.world_size > 1:
        gradients = [weight.grad for weight in weights]
        flat = nn.utils.parameters_to_vector([*gradients, *more])
        dist.all_reduce(flat)
        flat[: len(flat) - sum(x.numel() for x in more)] /= rt.world_size
        nn.utils.vector_to_parameters(flat, [*gradients, *more])


class Optimizers:
    """From each rank's gradients to new weights.

    A loss or gradient that is not finite must change no weight on any rank, and without a wait for
    the device, so the veto is data, too: `nonfinite` is 1 on every rank if it is on one. AdamW
    skips its step by it (found_inf), Muon multiplies decay and update away; the host learns of it
    from the loss, a step or two later (Trainer.agree), and ends the run.
    """

    def __init__(self, model: GPT, rt: Runtime, cfg: Config):
        self.model = model
        self.rt = rt
        self.cfg = cfg
        groups = optimizer_groups(cfg)
        matrices = [model.get_parameter(name) for name in groups.pop("muon").names]
        self.muon = ParallelMuon(matrices, rt, cfg)
        adam_groups = [
            dict(
                params=[model.get_parameter(name) for name in members.names],
                base_lr=members.rate,
                weight_decay=members.decay,
            )
            for members in groups.values()
        ]
        betas = cfg.beta1, cfg.beta2
        self.adam = torch.optim.AdamW(adam_groups, 0.0, betas, cfg.adam_eps, fused=True)
        self.small = [weight for adam_group in adam_groups for weight in adam_group["params"]]
        self.weights = self.small + matrices
        for weight in self.small:  # as its first step would, for a checkpoint to fill
            empty = {name: torch.zeros_like(weight) for name in ("exp_avg", "exp_avg_sq")}
            self.adam.state[weight] = dict(step=weight.new_zeros(())) | empty

    @torch.no_grad()
    def step(self, step: int, factor: float, loss: Tensor) -> Tensor:
        """Average over ranks, clip, update, clear. -> loss, not finite where a gradient is not; if
        that is so on any rank, no weight changes."""
        gradients = [weight.grad for weight in self.weights]
        loss = loss + 0 * torch.stack(torch._foreach_norm(gradients)).sum()
        bad_ranks = (~loss.isfinite()).float()  # 1: this one; summed up below
        if self.cfg.clip == "local":  # as published
            self.clip(gradients, [])
        self.muon.start_reduce()  # the long transfers first
        average_gradients(self.small, self.rt, [bad_ranks])
        nonfinite = bad_ranks > 0
        shares = self.muon.shares()
        if self.cfg.clip == "global":
            self.clip([weight.grad for weight in self.small], shares)
        for adam_group in self.adam.param_groups:
            adam_group["lr"] = adam_group["base_lr"] * factor
        self.adam.found_inf = nonfinite.float()  # skips, without a wait
        self.adam.step()
        rate = self.cfg.matrix_lr * factor
        self.muon.step(rate, muon_momentum(step, self.cfg), nonfinite)
        self.model.zero_grad()
        return loss

    def clip(self, gradients: list[Tensor], shards: list[Tensor]) -> None:
        """To a norm of at most GRAD_CLIP_NORM, shards of all ranks included."""
        if not self.cfg.grad_clip_norm:
            return
        square = sum((shard.float() ** 2).sum() for shard in shards)
        if shards and self.rt.world_size > 1:
            dist.all_reduce(square)
        norm = sum(((g**2).sum() for g in gradients), square).sqrt()
        factor = (self.cfg.grad_clip_norm / (norm + 1e-6)).clamp(max=1.0)
        for kind in filter(None, (gradients, shards)):  # a dtype each: together, one by one
            torch._foreach_mul_(kind, factor)


# -----------------------------------------------------------------------------
# 7. Weight averaging and QAT grids
# Exported are an exponential mean of the weights, the mean of late snapshots, or both; near the
# end training sees the grid that the export will choose.

SWA_BELOW = 0.2  # rate factor under which snapshots are taken


class Averages:
    """fp32 averages of every parameter, on its device."""

    def __init__(self, model: GPT, cfg: Config):
        state = model.state_dict()
        self.cfg = cfg
        self.names = [*state]
        self.weights = [*state.values()]
        self.ema = [w.clone() for w in self.weights] if cfg.ema_enabled else self.weights
        self.swa = [torch.zeros_like(w) for w in self.weights]
        self.snapshots = 0

    def update(self, step: int, factor: float) -> None:
        """After optimizer step `step` (from 0), made at a rate factor."""
        cfg = self.cfg
        if cfg.ema_enabled:
            warm = (1 + step) / (10 + step) if cfg.ema_warmup else 1.0  # forget the random start
            torch._foreach_lerp_(self.ema, self.weights, 1 - min(cfg.ema_decay, warm))
        if cfg.swa_enabled and factor < SWA_BELOW and (step + 1) % cfg.swa_every == 0:
            source = self.ema if cfg.swa_source == "ema" else self.weights
            self.snapshots += 1
            torch._foreach_lerp_(self.swa, source, 1 / self.snapshots)

    def resume(self, snapshots: int) -> None:
        """The tensors are filled by restore_checkpoint."""
        self.snapshots = snapshots

    def final(self) -> dict[str, Tensor]:
        """Name -> (1 - SWA_WEIGHT) EMA + SWA_WEIGHT SWA, or the one there is."""
        share = self.cfg.swa_weight if self.cfg.ema_enabled else 1.0
        mixed = torch._foreach_lerp(self.ema, self.swa, share) if self.snapshots else self.ema
        return dict(zip(self.names, mixed, strict=True))


@torch.no_grad()
def update_qat_grids(model: GPT, cfg: Config) -> None:
    """Late QAT: fill the buffers that fake_quantize reads with the scales that the export would
    choose now. No graph is compiled anew: to it they are data."""
    specs = parameter_specs(cfg)
    for grid_name, grid in model.named_buffers():
        name = grid_name.removesuffix("_grid")
        grid.copy_(choose_scales(getattr(model, name), specs[name], cfg))


# -----------------------------------------------------------------------------
# 8. Checkpoint and resume
# A run that died goes on from its last good checkpoint, on the same ranks and threads bit for bit.
#
# checkpoint/step_<n>.safetensors holds every tensor that a step changes, step_<n>.json the rest and
# a sha256 over both. Rank 0 writes the tensors first, each file whole or not at all, so a .json
# makes a checkpoint; the last two stay.

KEPT_CHECKPOINTS = 2


class DamagedCheckpoint(UserError):
    """Files that are not whole, or that hold what no run writes."""


class CheckpointState(NamedTuple):
    """What is no tensor, in the .json."""

    step: int  # of training that are done
    qat_since: int | None  # step at which late QAT began
    loops_since: int | None  # at which LOOP_LAYERS began to run several times
    seconds: float  # of training
    snapshots: int  # of SWA
    loader: tuple[int, int]  # where it stands: shard and offset, or epoch and sequences read
    settings: dict[str, Any]  # that must be the same where the run goes on
    logs: list[int]  # bytes of LOGS at that time


def save_checkpoint(trainer: "Trainer") -> None:
    """Called on every rank; the others wait until the files are on rank 0's disk."""
    momenta = trainer.optimizers.muon.gather_momenta()
    if trainer.rt.rank == 0:
        trainer.rt.mend_folder()
        tensors = {name: x.clone() for name, x in changing_tensors(trainer, momenta).items()}
        write_checkpoint(trainer.folder, checkpoint_state(trainer), tensors)
    trainer.rt.barrier()


def resume_training(trainer: "Trainer") -> None:
    """Put the newest whole checkpoint into the trainer; leave it as it is where there is none.
    UserError where all are damaged, or for other settings, ranks or data."""
    find_checkpoint(trainer)
    furthest, least = trainer.rt.largest(trainer.step, -trainer.step).tolist()
    if furthest != -least:
        found = f"of step {furthest:.0f} on one host, {-least:.0f} on another"
        fix = "run in one folder that all hosts share, or copy it"
        raise UserError(f"{trainer.folder}: {found}; fix: {fix}")


def find_checkpoint(trainer: "Trainer") -> None:
    """The newest whole checkpoint into this rank's trainer; UserError where all are damaged."""
    paths = sorted(trainer.folder.glob("step_*.json"), reverse=True)
    for path in paths:
        try:
            return restore_checkpoint(trainer, *read_checkpoint(path))
        except DamagedCheckpoint as error:
            trainer.rt.log("note", f"{path} is passed over, damaged: {error}")
    if paths:
        fix = "put one back, or OVERWRITE=1"
        raise UserError(f"{trainer.folder}: no whole checkpoint; fix: {fix}")


def changing_tensors(trainer: "Trainer", momenta: list[Tensor]) -> dict[str, Tensor]:
    """Name -> each tensor that a step changes, and Muon's momenta of all ranks."""
    averages = trainer.averages
    adam = trainer.optimizers.adam.state.values()
    groups = dict(
        weight=averages.weights,
        ema=averages.ema,
        swa=averages.swa,
        grid=trainer.model.buffers(),
        rng=[torch.get_rng_state()],
        muon=momenta,
        adam=[tensor for state in adam for tensor in state.values()],
    )
    return {f"{name}.{i}": x for name, tensors in groups.items() for i, x in enumerate(tensors)}


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(name.encode())
        digest.update(tensor.detach().flatten().view(torch.uint8).cpu().numpy())
    return digest.hexdigest()


def checkpoint_state(trainer: "Trainer") -> CheckpointState:
    return CheckpointState(
        step=trainer.step,
        qat_since=trainer.qat_since,
        loops_since=trainer.loops_since,
        seconds=trainer.elapsed,
        snapshots=trainer.averages.snapshots,
        loader=trainer.batches.place,
        settings=bound_settings(trainer, trainer.step),
        logs=[log.size() for log in trainer.rt.logs],
    )


def bound_settings(trainer: "Trainer", step: int) -> dict[str, Any]:
    """What must be the same where a run goes on from a step. Shards that it has not read yet may be
    mended, with SHUFFLE any of them: their number and bytes count."""
    loader = trainer.batches.loader
    count = len(loader.shards)
    size = count * SHARD_HEADER_BYTES + 2 * loader.total
    read = loader.shards[: last_shard(loader.ends, step, trainer.cfg) + 1]
    heads = b"".join(np.fromfile(path, np.uint8, 4096).tobytes() for path in read)
    names = stored_names("checkpoint")
    settings = {name.upper(): show(getattr(trainer.cfg, name)) for name in names}
    settings["RANKS"] = trainer.rt.world_size
    settings["INIT_FROM"] = trainer.started_from
    settings["SHARDS"] = f"{count} of {size} bytes"
    if not trainer.cfg.shuffle:
        settings["SHARDS"] += f", {sha256(heads)[:12]}"
    return settings


def restore_checkpoint(
    trainer: "Trainer", state: CheckpointState, tensors: dict[str, Tensor]
) -> None:
    """State and tensors into the trainer. DamagedCheckpoint for what cannot be of this run,
    UserError for a run with other settings; then nothing has changed."""
    for name, now in bound_settings(trainer, state.step).items():
        was = state.settings.get(name)
        if was is None:
            raise DamagedCheckpoint(f"{name} is missing")
        if now is None and was:  # INIT_FROM need not be there any more
            continue
        if was != now:
            fix = "set it back, or OVERWRITE=1 to begin again"
            raise UserError(f"{trainer.folder}: made with {name}={was}, not {now}; fix: {fix}")
    if state.step > trainer.cfg.iterations:
        raise DamagedCheckpoint(f"at step {state.step}")
    if not trainer.batches.loader.can_restore(state.loader):
        raise DamagedCheckpoint(f"its loader stands at {state.loader}")
    muon = trainer.optimizers.muon
    own = changing_tensors(trainer, [bank.padded for bank in muon.banks])
    for name, tensor in own.items():
        if name not in tensors or tensors[name].numel() != tensor.numel():
            raise DamagedCheckpoint(f"tensor {name} is missing or of another size")
    try:
        torch.set_rng_state(tensors["rng.0"])
    except (RuntimeError, TypeError) as error:
        raise DamagedCheckpoint(f"no state of a random generator: {error}") from error
    for name, tensor in own.items():
        tensor.copy_(tensors[name].view(tensor.shape))
    muon.restore_momenta([tensors[f"muon.{i}"] for i in range(len(muon.banks))])
    trainer.restore(state)
    trainer.rt.log("resumed", step=trainer.step)


def write_checkpoint(folder: Path, state: CheckpointState, tensors: dict[str, Tensor]) -> None:
    """The two files, and nothing else but those of the checkpoint before."""
    path = folder / f"step_{state.step:08}.json"
    data = checkpoint_format().save(tensors)
    values = state._asdict()
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(path.with_suffix(".safetensors"), data)
    entry = dict(state=values, sha256=sha256(json.dumps(values).encode() + data))
    write_atomically(path, json.dumps(entry).encode())
    earlier = [other for other in folder.glob("step_*.json") if other <= path]  # later: damaged
    kept = {other.stem for other in sorted(earlier)[-KEPT_CHECKPOINTS:]}
    for path in sorted(folder.glob("*step_*")):
        if path.stem not in kept:
            path.unlink()


def read_checkpoint(path: Path) -> tuple[CheckpointState, dict[str, Tensor]]:
    """path: of the .json. DamagedCheckpoint where the two files are not whole."""
    files = checkpoint_format()
    try:
        data = read_regular(path.with_suffix(".safetensors"), MOST_CHECKPOINT_BYTES)
        entry = json.loads(read_regular(path))
        if sha256(json.dumps(entry["state"]).encode() + data) != entry["sha256"]:
            raise ValueError("its sha256 does not fit")
        return parse_state(entry["state"]), files.load(data)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedCheckpoint(str(error)) from error
    except package("safetensors").SafetensorError as error:
        raise DamagedCheckpoint(str(error)) from error


def parse_state(values: Any) -> CheckpointState:
    """Of a .json; ValueError, KeyError or TypeError for what no run writes."""
    if values.keys() != {*CheckpointState._fields}:
        raise ValueError("of an earlier or later train_gpt.py: its entries are others")
    state = CheckpointState(**values)
    begun = [since for since in (state.qat_since, state.loops_since) if since is not None]
    numbers = [state.step, state.snapshots, *begun, *state.loader, *state.logs]
    if any(type(number) is not int or number < 0 for number in numbers):
        raise ValueError(f"its counters are {numbers}")
    if not isinstance(state.seconds, int | float) or not 0 <= state.seconds < 1e9:
        raise ValueError(f"its seconds are {state.seconds!r}")
    if len(state.loader) != 2 or not isinstance(state.settings, dict):
        raise ValueError("its loader or settings are none")
    return state


class Beginning(NamedTuple):
    """What INIT_FROM names."""

    weights: dict[str, Tensor]
    settings: dict[str, str]  # of its model, by variable
    sha256: str  # of the file
    tokenizer: str = ""  # sha256 of the one beside it; "": there is none

    @staticmethod
    def read(cfg: Config) -> "Beginning":
        """Of an artifact, a run folder's or a checkpoint's; ConfigError."""
        path = Path(cfg.init_from)
        path = path / "artifact.bin" if path.is_dir() else path
        of_checkpoint = path.suffix in (".json", ".safetensors")
        beside = (path.parent.parent if of_checkpoint else path.parent) / "tokenizer.model"
        try:
            tokenizer = sha256(read_regular(beside)) if beside.is_file() else ""
            if of_checkpoint:
                return Beginning.of_checkpoint(path)._replace(tokenizer=tokenizer)
            content = read_regular(os.path.realpath(path), MOST_ARTIFACT_BYTES)
            model = load_artifact(path, content=content)
        except (OSError, UserError, KeyError, TypeError) as error:
            reason = f"INIT_FROM={cfg.init_from!r}: {error}"
            fix = "" if "fix:" in reason else "; fix: the path of an artifact.bin or a checkpoint"
            raise ConfigError(reason + fix) from error
        settings = {name.upper(): show(getattr(model.cfg, name)) for name in MODEL_FIELDS}
        return Beginning(dict(model.named_parameters()), settings, sha256(content), tokenizer)

    @staticmethod
    def of_checkpoint(path: Path) -> "Beginning":
        """The weights that its next step would have changed. DamagedCheckpoint, OSError"""
        state, tensors = read_checkpoint(path.with_suffix(".json"))
        stored = {name: state.settings[name.upper()] for name in MODEL_FIELDS}
        names = parameter_specs(Config(**stored_values(stored, MODEL_FIELDS)))
        settings = {name.upper(): text for name, text in stored.items()}
        weights = {name: tensors[f"weight.{i}"] for i, name in enumerate(names)}
        return Beginning(weights, settings, sha256(path.with_suffix(".safetensors").read_bytes()))

    def differences(self, cfg: Config) -> str:
        here = {name.upper(): show(getattr(cfg, name)) for name in MODEL_FIELDS}
        return ", ".join(
            f"{name}={text} there, {here[name]} here"
            for name, text in self.settings.items()
            if text != here[name]
        )

    def check(self, cfg: Config, folder: Path) -> None:
        """ConfigError where the weights do not fit this model, or lie where the run will."""
        if Path(cfg.init_from).resolve().is_relative_to(folder.resolve()):
            reason = f"INIT_FROM={cfg.init_from!r}: lies in {folder}, which the run clears"
            raise ConfigError(f"{reason}; fix: another RUN_ID")
        self.check_shapes(cfg)
        if self.tokenizer and self.tokenizer != sha256(read_regular(cfg.tokenizer_path)):
            reason = f"INIT_FROM={cfg.init_from!r}: its tokenizer is not {cfg.tokenizer_path}"
            fix = "prepare the text with --tokenizer and its tokenizer.model, or begin with nothing"
            raise ConfigError(f"{reason}; fix: {fix}")

    def check_shapes(self, cfg: Config) -> None:
        """ConfigError that names the settings by which they differ."""
        shapes = {name: spec.shape for name, spec in parameter_specs(cfg).items()}
        if shapes != {name: tuple(weight.shape) for name, weight in self.weights.items()}:
            differences = self.differences(cfg) or "though its settings are these"
            reason = f"INIT_FROM={cfg.init_from!r}: of another shape: {differences}"
            raise ConfigError(f"{reason}; fix: set these as there, or begin with nothing")


def checkpoint_format() -> ModuleType:
    """safetensors.torch; UserError where the package is missing."""
    package("safetensors")
    return package("safetensors.torch")


# -----------------------------------------------------------------------------
# 9. Quantisation and artifact
# Weights become integers on a searched grid, a compressed container, and weights again.

LARGEST = {f"int{bits}": 2 ** (bits - 1) - 1 for bits in range(4, 9)}  # -largest .. largest
FLOATS = {"fp16": "<f2", "fp32": "<f4"}
INT8_QUANTILE = 0.9999984  # of int8 rows, as published
LEAST_FP16 = 2.0**-24
MOST_FP16 = 65504.0
MOST_SHORT_FP16 = 64512.0  # with 5 bits of fraction
MOST_RATIO = 256  # of a payload to what it is packed in; no weights come near, zeros do
ARTIFACT_PREFIX = b"PGOLFGPT" + (3).to_bytes(4, "little")  # magic, version
SHA_BYTES = 32
MOST_HEADER_BYTES = 2**20  # JSON takes some thirty times its size when it is read


class ArtifactError(UserError):
    """Missing, damaged or foreign; nothing was loaded."""


def round_to_grid(weight: Tensor, scale: Tensor, largest: int) -> Tensor:
    return (weight / scale).round().clamp(-largest, largest)


def search_grid(weight: Tensor, coding: str, cfg: Config) -> Tensor:
    """GPTQ-lite (PR #414): a row's grid ends at a quantile of its |w|, that of least squared error
    in the row or in the matrix. fp32 (..., r, c) -> scales (..., r, 1), rounded as stored."""
    largest = LARGEST[coding]
    ordered = weight.abs().sort(dim=-1).values
    smallest = 1 / largest if cfg.quant_floor else LEAST_FP16
    scales = []
    errors = []
    for quantile in [INT8_QUANTILE] if coding == "int8" else cfg.clip_quantiles:
        place = quantile * (weight.shape[-1] - 1)
        below = ordered[..., math.floor(place) : math.floor(place) + 1]
        above = ordered[..., math.ceil(place) : math.ceil(place) + 1]
        scale = torch.lerp(below, above, place % 1) / largest
        scale = scale.clamp_min(smallest).half().float()
        residual = round_to_grid(weight, scale, largest) * scale - weight
        scales.append(scale)
        errors.append(residual.square().sum(-1, keepdim=True))
    errors = torch.stack(errors)  # (quantiles, ..., r, 1)
    if cfg.quant_per == "matrix":
        errors = errors.sum(-2, keepdim=True).expand_as(errors)
    return torch.stack(scales).gather(0, errors.argmin(0, keepdim=True))[0]


def clip_of(spec: Spec, cfg: Config) -> float | None:
    """CLIP_SIGMAS or EMBED_CLIP_SIGMAS; None: neither has a say."""
    return dict(muon=cfg.clip_sigmas, embed=cfg.embed_clip_sigmas).get(spec.group)


def choose_scales(weight: Tensor, spec: Spec, cfg: Config) -> Tensor:
    """Of a tensor's rows, fp32 (..., r, c) -> (..., r, 1), rounded as stored. Muon's matrices and
    embeddings: so many standard deviations (about 0: a row may be constant) lie on the grid
    (CLIP_SIGMAS), whose step then fixes the bits that an integer takes; or by search_grid. All
    else: the row's largest."""
    sigmas = clip_of(spec, cfg)
    if sigmas == 0:
        return search_grid(weight, spec.coding, cfg)
    if sigmas:
        end = sigmas * weight.square().mean(-1, keepdim=True).sqrt()
    else:
        end = weight.abs().amax(-1, keepdim=True)
    scale = (end / LARGEST[spec.coding]).clamp(LEAST_FP16, MOST_FP16).half()
    if sigmas:  # to 5 bits of fraction, 2 to 3 %: a coder saves the others, and integers follow
        scale = (scale.view(torch.int16) + 16 & ~31).view(torch.float16)
        scale = scale.clamp(32 * LEAST_FP16, MOST_SHORT_FP16)
    return scale.float()


# GPTQ (Frantar et al. 2022, arXiv 2210.17323). Rounding a matrix W to Q changes what it makes of an
# input x by (W - Q) x: over many inputs by tr(E H E^T) with E = W - Q and H = mean of x x^T. Rows
# have nothing to do with each other. Columns are rounded one after the other, those of the largest
# inputs first, and the columns that are still free make up for what each was rounded by.

GPTQ_INPUTS = {  # of a tensor's matrices, in their order: the names of their inputs
    "tok_emb": ("logits",),  # as the output layer; what reads tokens is not asked
    "qo_bank": ("query", "output"),
    "kv_bank": ("query", "query"),  # a layer's keys and values have its queries' inputs
    "mlp_up_bank": ("up",),
    "mlp_down_bank": ("down",),
    "enrich_up": ("enrich_up",),
    "enrich_down": ("enrich_down",),
}
DAMPING = 0.01  # of the mean of H's diagonal, added to it; ten times as much until H has a root
MOST_DAMPING = 1e6  # more than that: rounded to nearest
MOST_DOUBLINGS = 6.0  # of clips, for TARGET_BYTES
FIT_ROOM = 0.001  # share of the bytes for weights: less than this may be left
FIT_TRIES = 6  # clips that are tried to leave no more
GPTQ_BLOCK = 128  # columns that are rounded before the ones behind them hear of it
CALIBRATION_TOKENS = 16_384  # in a pass


def calibration_rows(cfg: Config, rt: Runtime, shards: list[Path]) -> Tensor:
    """This rank's of the first CALIBRATION_ROWS training sequences, or of as many random ones:
    int64 (n, T)."""
    shape = cfg.calibration_rows, cfg.train_seq_len
    require_memory(10 * math.prod(shape), f"CALIBRATION_ROWS={cfg.calibration_rows}")
    if cfg.calibration == "random":
        generator = torch.Generator().manual_seed(cfg.seed)
        rows = torch.randint(cfg.vocab_size, shape, generator=generator)
    else:
        tokens = TokenLoader(shards, cfg.vocab_size).read(math.prod(shape))
        rows = torch.from_numpy(tokens.astype(np.int64)).view(shape)
    return rows[rt.rank :: rt.world_size]


@torch.no_grad()
def collect_hessians(model: GPT, rt: Runtime, cfg: Config, rows: Tensor) -> dict[str, Tensor]:
    """By the names of GPTQ_INPUTS, of each layer, H of what the model's matrices are given for
    rows, int64 (n, T), of all ranks: fp32 (layers, c, c). Called on every rank."""
    specs = parameter_specs(cfg)
    sums: dict[str, Tensor] = {}
    for tensor, names in GPTQ_INPUTS.items():
        if tensor in specs:
            columns = specs[tensor].shape[-1]
            layers = cfg.num_layers if tensor in BANKS else 1
            for name in names:
                sums[name] = torch.zeros(layers, columns, columns, device=rt.device)

    def add(name: str, layer: int, x: Tensor) -> None:
        if name in sums:
            x = x.flatten(0, -2).float()
            with torch.autocast(x.device.type, enabled=False), full_precision():
                sums[name][layer].addmm_(x.mT, x)

    batch = max(1, CALIBRATION_TOKENS // cfg.train_seq_len)
    for ids in rows.split(batch) if len(rows) else ():
        ids = ids.to(rt.device)
        context = Context(model, ids, observe=add)
        with rt.autocast(), rt.attention():
            add("logits", 0, model.hidden(ids, context))
    for total in sums.values():
        if rt.world_size > 1:
            dist.all_reduce(total)
        total /= cfg.calibration_rows * cfg.train_seq_len
    return sums


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Products of fp32 in fp32, without CUDA's TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def inverse_root(hessian: Tensor) -> tuple[Tensor, Tensor]:
    """H (n, c, c) -> upper triangular U with U^T U = (H + damping)^-1, the identity where that has
    none; how often, int (n,), the damping had to grow."""
    unit = torch.diag_embed(torch.ones_like(hessian[0, 0]))
    mean = hessian.diagonal(dim1=-2, dim2=-1).mean(-1).view(-1, 1, 1)
    mean = mean.clamp_min(torch.finfo(torch.float32).tiny / DAMPING)
    root = unit.expand_as(hessian).clone()
    todo = torch.ones(len(hessian), dtype=torch.bool, device=hessian.device)
    grown = torch.zeros(len(hessian), dtype=torch.int64, device=hessian.device)
    damping = DAMPING
    while damping <= MOST_DAMPING and todo.any():
        lower, failed = torch.linalg.cholesky_ex(hessian[todo] + damping * mean[todo] * unit)
        inverse = torch.cholesky_inverse(torch.where((failed == 0).view(-1, 1, 1), lower, unit))
        upper, failed_again = torch.linalg.cholesky_ex(inverse, upper=True)
        good = (failed == 0) & (failed_again == 0) & upper.isfinite().all(-1).all(-1)
        places = todo.nonzero()[:, 0]
        root[places[good]] = upper[good]
        grown[places[~good]] += 1
        todo[places[good]] = False
        damping *= 10
    return root, grown


def layer_error(weight: Tensor, rounded: Tensor, hessian: Tensor) -> Tensor:
    """Of each row the mean square of what rounding adds to its output: (n, r, c) twice, H (n, c, c)
    -> (n, r, 1)."""
    error = rounded - weight
    return ((error @ hessian) * error).sum(-1, keepdim=True)


@full_precision()
def gptq(
    weight: Tensor, scale: Tensor, largest: int, hessian: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Matrices (n, r, c) on their rows' grids (n, r, 1), given H (n, c, c) -> integers; bool
    (n, r, 1), rows that stay rounded to nearest, as that makes less of an error; inverse_root's
    second."""
    nearest = round_to_grid(weight, scale, largest)
    largest_first = hessian.diagonal(dim1=-2, dim2=-1).argsort(dim=-1, descending=True, stable=True)
    places = largest_first.unsqueeze(1).expand_as(weight)
    sorted_rows = hessian.gather(1, largest_first.unsqueeze(2).expand_as(hessian))
    root, grown = inverse_root(sorted_rows.gather(2, largest_first.unsqueeze(1).expand_as(hessian)))
    free = weight.gather(2, places)
    integers = torch.empty_like(free)
    width = weight.shape[2]
    for begin in range(0, width, GPTQ_BLOCK):
        end = min(begin + GPTQ_BLOCK, width)
        errors = []
        for j in range(begin, end):
            column = free[:, :, j : j + 1]
            rounded = round_to_grid(column, scale, largest)
            integers[:, :, j : j + 1] = rounded
            errors.append((column - rounded * scale) / root[:, j, j].view(-1, 1, 1))
            free[:, :, j + 1 : end] -= errors[-1] * root[:, j : j + 1, j + 1 : end]
        free[:, :, end:] -= torch.cat(errors, 2) @ root[:, begin:end, end:]
    integers = torch.empty_like(integers).scatter_(2, places, integers)
    error = layer_error(weight, integers * scale, hessian)
    worse = ~(error <= layer_error(weight, nearest * scale, hessian))
    return torch.where(worse, nearest, integers), worse, grown


def payload_type(specs: Mapping[str, Spec]) -> np.dtype:
    """numpy type of the payload: of each tensor its rows' scales and integers, or fp16 or fp32;
    ArtifactError for 2 GiB or more."""
    kinds = {}
    for name, spec in specs.items():
        if spec.coding in FLOATS:
            kinds[name] = np.dtype((FLOATS[spec.coding], spec.shape))
        else:
            scales = ("scale", "<f2", (*spec.shape[:-1], 1))
            kinds[name] = np.dtype([scales, ("integers", "i1", spec.shape)])
    if sum(kind.itemsize for kind in kinds.values()) >= 2**31:  # numpy would count on from -2^31
        raise ArtifactError("weights of 2 GiB or more")
    return np.dtype([*kinds.items()])


def quantise(
    weights: Mapping[str, Tensor],
    cfg: Config,
    hessians: Mapping[str, Tensor] | None = None,
    rt: Runtime | None = None,
) -> tuple[np.ndarray, dict[str, Any]]:
    """-> the payload, of payload_type; values of the log's line `gptq`. With hessians, of
    collect_hessians, matrices are rounded by gptq, each by one rank (rt), and all ranks get all."""
    specs = parameter_specs(cfg)
    payload = np.zeros((), payload_type(specs))
    rows = 0
    kept = 0
    grown = 0
    for name, spec in specs.items():
        weight = weights[name].detach()
        if spec.coding in FLOATS:
            payload[name] = weight.cpu().numpy()
            continue
        scale = choose_scales(weight, spec, cfg)
        if hessians and name in GPTQ_INPUTS:
            hessian = torch.cat([hessians[inputs] for inputs in GPTQ_INPUTS[name]])
            stacked = weight.view(-1, *weight.shape[-2:]), scale.view(-1, scale.shape[-2], 1)
            integers, counts = gptq_shared(*stacked, LARGEST[spec.coding], hessian, rt)
            integers = integers.view(weight.shape)
            rows += math.prod(weight.shape[:-1])
            kept += counts[0]
            grown += counts[1]
        else:
            integers = round_to_grid(weight, scale, LARGEST[spec.coding])
        payload[name] = scale.cpu().numpy(), integers.cpu().numpy()
    return payload, dict(rows=rows, nearest=kept, damped=grown) if hessians else {}


def gptq_shared(
    weight: Tensor, scale: Tensor, largest: int, hessian: Tensor, rt: Runtime | None
) -> tuple[Tensor, list[int]]:
    """gptq, of every world_size-th matrix on each rank -> integers of all; how many rows stay
    rounded to nearest, in how many matrices the damping grew, of all."""
    rank, ranks = (rt.rank, rt.world_size) if rt else (0, 1)
    integers = torch.zeros_like(weight)
    counts = torch.zeros(2, device=weight.device)
    mine = slice(rank, None, ranks)
    if len(weight[mine]):
        found, worse, grown = gptq(weight[mine], scale[mine], largest, hessian[mine])
        integers[mine] = found
        counts += torch.stack([worse.sum(), (grown > 0).sum()])
    if ranks > 1:
        dist.all_reduce(integers)
        dist.all_reduce(counts)
    return integers, counts.long().tolist()


def unpack_tensor(packed: np.ndarray) -> Tensor:
    """A field of the payload -> float32."""
    if packed.dtype.names:
        packed = packed["integers"] * packed["scale"].astype(np.float32)
    return torch.from_numpy(packed.astype(np.float32))


# COMPRESSOR=range: a range coder gives each integer the share that its kind had of those before it,
# apart for columns whose integers were small or large in the rows above: some inputs of a matrix
# matter less. All that counts is whole numbers, so every machine decodes the same.

COLUMN_EDGES = 128, 181, 256, 362, 512, 724, 1024  # mean magnitudes of a column, in 256ths at int6
COLUMN_MEMORY = 64  # rows that make the mean, about
COUNT_STEP = 16  # what a symbol adds to its count
BLOCK_SYMBOLS = 128, 2048  # coded by the same counts: an eighth of those seen, within these

# (symbols from 0, their shares) -> the symbols, or in their place those that were decoded
CodeSymbols = Callable[[np.ndarray, np.ndarray], np.ndarray]


class SymbolCounts:
    """How often each symbol came, in each class."""

    def __init__(self, begin: np.ndarray, classes: int = 1):
        """begin: int64 (symbols,), what every class begins with."""
        self.counts = np.tile(begin, (classes, 1))
        self.seen = 0

    @property
    def block(self) -> int:
        least, most = BLOCK_SYMBOLS
        return min(most, max(least, self.seen // 8))

    def code(self, code: CodeSymbols, symbols: np.ndarray, kind: int = 0) -> np.ndarray:
        """int32 (n,), of one class -> the same."""
        counts = self.counts[kind]
        symbols = code(symbols, counts / counts.sum())
        counts += COUNT_STEP * np.bincount(symbols, minlength=len(counts))
        self.seen += len(symbols)
        return symbols


def code_integers(code: CodeSymbols, matrices: np.ndarray, largest: int) -> None:
    """int8 (n, r, c), in place."""
    distance = abs(np.arange(-largest, largest + 1))
    table = SymbolCounts(1 + (128 >> 12 * distance // largest), len(COLUMN_EDGES) + 1)
    edges = np.array(COLUMN_EDGES) * largest // LARGEST["int6"]
    for matrix in matrices:
        rows, columns = matrix.shape
        weight = 8
        sums = np.full(columns, weight * edges[4])
        begin = 0
        while begin < rows:
            block = matrix[begin : begin + max(1, table.block // columns)]
            classes = edges.searchsorted(sums // weight)
            for kind in np.unique(classes):
                chosen = classes == kind
                symbols = block[:, chosen].astype(np.int32) + largest
                found = table.code(code, symbols.ravel(), kind)
                block[:, chosen] = (found - largest).reshape(symbols.shape)
            begin += len(block)
            weight += len(block)
            sums += 256 * abs(block.astype(np.int64)).sum(0)
            if weight > COLUMN_MEMORY:
                sums = sums * COLUMN_MEMORY // weight
                weight = COLUMN_MEMORY


def code_floats(code: CodeSymbols, numbers: np.ndarray) -> None:
    """fp16 or fp32, in place: the bytes of each significance by themselves."""
    planes = np.ascontiguousarray(numbers).reshape(-1, 1).view("u1").T.copy()  # little-endian
    for plane in planes:
        table = SymbolCounts(np.ones(256, np.int64))
        begin = 0
        while begin < len(plane):
            part = plane[begin : begin + table.block]
            part[:] = table.code(code, part.astype(np.int32))
            begin += len(part)
    numbers[...] = planes.T.copy().view(numbers.dtype).reshape(numbers.shape)


def code_payload(code: CodeSymbols, payload: np.ndarray, specs: Mapping[str, Spec]) -> None:
    """Everything in it, tensor by tensor, in place."""
    for name, spec in specs.items():
        if spec.coding in FLOATS:
            code_floats(code, payload[name])
        else:
            code_floats(code, payload[name]["scale"])
            integers = payload[name]["integers"]
            matrices = integers.reshape(-1, *(1, *spec.shape)[-2:])
            code_integers(code, matrices, LARGEST[spec.coding])


def range_encode(payload: np.ndarray, specs: Mapping[str, Spec]) -> bytes:
    """-> words, little-endian uint32."""
    coders = package("constriction").stream
    coder = coders.queue.RangeEncoder()

    def code(symbols: np.ndarray, shares: np.ndarray) -> np.ndarray:
        coder.encode(symbols, coders.model.Categorical(shares, perfect=False))
        return symbols

    code_payload(code, payload.copy(), specs)
    return coder.get_compressed().astype("<u4").tobytes()


def range_decode(content: bytes, specs: Mapping[str, Spec]) -> np.ndarray:
    """The payload of range_encode's bytes; of others some payload, or ArtifactError."""
    coders = package("constriction").stream
    payload = np.zeros((), payload_type(specs))
    try:
        coder = coders.queue.RangeDecoder(np.frombuffer(content, "<u4").astype(np.uint32))
    except ValueError as error:
        raise ArtifactError(f"no words of a range coder: {error}") from error

    def code(symbols: np.ndarray, shares: np.ndarray) -> np.ndarray:
        family = coders.model.Categorical(shares, perfect=False)
        try:
            found = coder.decode(family, len(symbols))
        except Exception as error:  # constriction's own, for words that fit no distribution
            raise ArtifactError(f"words of no weights: {error}") from error
        return found

    code_payload(code, payload, specs)
    if not coder.maybe_exhausted():
        raise ArtifactError("more or fewer words than its weights take")
    return payload


def compress(payload: bytes | np.ndarray, how: str) -> bytes:
    """how: "zstd" or "lzma"."""
    return lzma.compress(payload) if how == "lzma" else package("zstandard").compress(payload, 22)


def decompress(content: bytes, how: str, size: int) -> bytes:
    """One whole stream of exactly `size` bytes; ArtifactError before it grows further."""
    payload = decompress_lzma(content, size) if how == "lzma" else decompress_zstd(content, size)
    if len(payload) != size:
        raise ArtifactError("the payload is not as long as the header says")
    return payload


def decompress_lzma(content: bytes, size: int) -> bytes:
    stream = lzma.LZMADecompressor(memlimit=2**27)
    try:
        payload = stream.decompress(content, size + 1)
    except (lzma.LZMAError, EOFError) as error:
        raise ArtifactError(f"the payload is no lzma stream: {error}") from error
    return payload if stream.eof and not stream.unused_data else b""


def decompress_zstd(content: bytes, size: int) -> bytes:
    zstd = package("zstandard")
    try:
        if zstd.frame_content_size(content) != size:
            return b""
        unpacker = zstd.ZstdDecompressor(max_window_size=2**27)
        return unpacker.decompress(content, allow_extra_data=False)
    except (zstd.ZstdError, MemoryError) as error:
        raise ArtifactError(f"the payload is no zstd frame: {error}") from error


class KnownText:
    """Training tokens, uint16 (N,), that an artifact holds beside the weights: what the counts of
    the evaluation begin with, in its own thread. They are paid for as the weights are, byte by
    byte, and where training text is plentiful and bytes are not, weights are the better use."""

    def __init__(self, tokens: np.ndarray):
        self.tokens = tokens
        self.counted: tuple[Any, Any] = (None, None)

    def __len__(self) -> int:
        return len(self.tokens)

    def __deepcopy__(self, _: Any) -> "KnownText":
        return self  # nobody changes it

    def counts(self, key: Any, count: Callable[[], Any]) -> Any:
        """A copy of what `count` makes, which is called for another key than the last one's."""
        if self.counted[0] != key:
            self.counted = key, count()
        return copy.deepcopy(self.counted[1])

    @staticmethod
    def of(cfg: Config, shards: list[Path]) -> "KnownText":
        """The last KNOWN_TOKENS tokens of the training shards; UserError."""
        parts: list[np.ndarray] = []
        wanted = cfg.known_tokens if cfg.known_tokens >= 0 else MOST_KNOWN + 1
        for path in reversed(shards):
            if wanted <= 0:
                break
            mapped = map_shard(path)
            part = mapped[max(0, len(mapped) - wanted) :]
            parts.append(check_tokens(path, part, cfg.vocab_size))
            wanted -= len(part)
        if cfg.known_tokens > 0 < wanted:
            found = f"the training shards hold {cfg.known_tokens - wanted:,} tokens"
            raise UserError(f"KNOWN_TOKENS={cfg.known_tokens}: {found}; fix: fewer, or -1")
        if cfg.known_tokens < 0 and wanted == 0:
            fix = f"fix: at most {MOST_KNOWN}"
            raise UserError(f"KNOWN_TOKENS=-1: the training shards hold too many tokens; {fix}")
        return KnownText(np.concatenate([*reversed(parts), np.zeros(0, np.uint16)]))

    def pack(self) -> bytes:
        """By lzma, whatever packs the weights: text repeats itself, weights do not."""
        words = self.tokens.astype("<u2").tobytes()
        return lzma.compress(words, filters=LZMA_WORDS) if words else b""

    @staticmethod
    def unpack(content: bytes, count: int, vocab_size: int) -> "KnownText":
        """ArtifactError for what pack would not have made."""
        require_memory(2 * count, f"a known text of {count:,} tokens")
        words = decompress(content, "lzma", 2 * count) if count else b""
        tokens = np.frombuffer(words, "<u2").astype(np.uint16)
        if count and tokens.max() >= vocab_size:
            raise ArtifactError(f"a known text with token {tokens.max()} of {vocab_size}")
        return KnownText(tokens)


NOTHING_KNOWN = KnownText(np.zeros(0, np.uint16))
LZMA_WORDS = [dict(id=lzma.FILTER_LZMA2, preset=9, lc=0, lp=1, pb=1)]  # of 16 bits


def artifact_header(cfg: Config) -> dict[str, Any]:
    """Model configuration and tensors; nothing of the run."""
    specs = parameter_specs(cfg)
    kind = payload_type(specs)
    tensors = []
    for name, spec in specs.items():
        offset = kind.fields[name][1]
        tensors.append(dict(name=name, shape=[*spec.shape], coding=spec.coding, offset=offset))
    stored = {name: show(getattr(cfg, name)) for name in MODEL_FIELDS}
    return dict(model=stored, tensors=tensors, size=kind.itemsize)


class Packing(NamedTuple):
    """An artifact and how it came to be."""

    packed: bytes  # artifact.bin, on rank 0
    size: int
    room: int  # what it may be
    widening: float  # of all clips
    rounding: dict[str, int]  # values of gptq's line
    pruning: dict[str, int]  # of prune's
    tries: int = 0
    seconds: float = 0.0  # of all of them, the Hessians included
    known: int = 0  # bytes of the size that are known text

    def log(self, rt: Runtime, cfg: Config) -> None:
        if self.rounding:
            rt.log("gptq", **self.rounding, seconds=self.seconds)
        if self.pruning:
            rt.log("prune", **self.pruning, seconds=self.seconds)
        left = self.room - self.size
        if cfg.target_bytes:
            clip = self.widening * cfg.clip_sigmas
            found = dict(weights=self.size, left=left, clip_sigmas=clip, tries=self.tries)
            rt.log("target_bytes", cfg.target_bytes, **found)
        if left < 0:
            target = "TARGET_BYTES" if cfg.target_bytes else "TARGET_MB"
            missed = f"{target}={show(getattr(cfg, target.lower()))}: missed by {-left:,} bytes"
            rt.log("note", missed + self.known_words)

    @property
    def known_words(self) -> str:
        """For messages on its size."""
        return f", {self.known:,} bytes are known text (KNOWN_TOKENS)" if self.known else ""


def make_artifact(
    weights: Mapping[str, Tensor],
    cfg: Config,
    rt: Runtime,
    hessians: Mapping[str, Tensor],
    known: KnownText = NOTHING_KNOWN,
) -> Packing:
    """Called on every rank. With TARGET_BYTES all clips rise alike until weights and packed script
    fit. Twice the step is a bit less for each integer, about: the first guess; then the line
    through two sizes, around the room where they are, or the middle, where it leads out of what is
    known. Where nothing fits, the smallest."""
    beside = PackedText(len(known), known.pack() if rt.rank == 0 else b"")
    room = weights_room(cfg)
    least = bytes_a_doubling(cfg)
    slope = least
    low = 0.0  # doublings of the clips that are too few, as it turns out
    place = 0.0  # that are tried
    high = MOST_DOUBLINGS  # that suffice
    sizes = {}
    best = None
    for tries in itertools.count(1):
        payload, rounding = quantise(weights, widen_clips(cfg, 2**place), hessians, rt)
        packed, pruning = pack_payload(payload, cfg, room, beside) if rt.rank == 0 else (b"", {})
        size = int(rt.largest(len(packed)).item())
        found = Packing(packed, size, room, 2**place, rounding, pruning)
        if not sizes or size < min(sizes.values()):
            smallest = found
        sizes[place] = size
        if size <= room:
            best = found
            high = place
        elif place == MOST_DOUBLINGS or not cfg.target_bytes:
            best = smallest
            break
        else:
            low = place
        if best and (place == 0.0 or room - best.size < FIT_ROOM * room or tries >= FIT_TRIES):
            break
        if tries > 1:
            ends = (low, high) if best else [*sizes][-2:]
            fall = (sizes[ends[0]] - sizes[ends[1]]) / (ends[1] - ends[0])
            slope = max(fall, least / 16)
        spare = FIT_ROOM / 4 * 2 ** max(0, tries - FIT_TRIES)  # more, where nothing has fitted yet
        place += (size - (1 - min(spare, 0.5)) * room) / slope
        if not best and place >= high:
            place = high
        elif not low < place < high:
            place = (low + high) / 2
    return best._replace(tries=tries, known=len(beside.content))


def weights_room(cfg: Config) -> int:
    """Bytes that weights may take beside the packed script."""
    if not cfg.target_bytes and not cfg.target_mb:
        return sys.maxsize
    target = cfg.target_bytes or int(cfg.target_mb * 2**20)
    return target - len(pack_script(SCRIPT))


def widen_clips(cfg: Config, factor: float) -> Config:
    clips = dict(clip_sigmas=cfg.clip_sigmas, embed_clip_sigmas=cfg.embed_clip_sigmas)
    return replace(cfg, **{name: factor * sigmas for name, sigmas in clips.items()})


def bytes_a_doubling(cfg: Config) -> float:
    """By which weights shrink where the clips are twice as wide: a bit of each integer."""
    specs = parameter_specs(cfg).values()
    widened = [spec for spec in specs if clip_of(spec, cfg) and spec.coding not in FLOATS]
    return max(1.0, sum(math.prod(spec.shape) for spec in widened) / 8)


class PackedText(NamedTuple):
    """A KnownText as an artifact holds it, behind the weights."""

    tokens: int
    content: bytes

    def header(self) -> dict[str, list[int]]:
        """What an artifact's header says of it: nothing, where there is none."""
        return dict(known=[self.tokens, len(self.content)]) if self.tokens else {}


def pack_payload(
    payload: np.ndarray,
    cfg: Config,
    room: int = sys.maxsize,
    known: PackedText = PackedText(0, b""),  # noqa: B008  (it is a constant)
) -> tuple[bytes, dict[str, int]]:
    """-> the bytes of artifact.bin, the same ones of the same payload; values of prune's line.
    room: for TARGET_MB."""
    header = artifact_header(cfg) | known.header()
    pruning = {}
    if cfg.target_mb:
        room -= len(seal(ARTIFACT_PREFIX, header, known.content))
        body, pruning = prune(payload, room, cfg)
    elif cfg.compressor == "range":
        body = range_encode(payload, parameter_specs(cfg))
    else:
        body = compress(payload.tobytes(), cfg.compressor)
    return seal(ARTIFACT_PREFIX, header, body + known.content), pruning


def prune(payload: np.ndarray, room: int, cfg: Config) -> tuple[bytes, dict[str, int]]:
    """Selective pruning (PR #993): zero the fewest 256ths of the +-1 among int4 to int7, smallest
    scales first, with which the payload fits into `room` bytes, or all. Of equal scales, as under
    QUANT_FLOOR, the first goes first: bank by bank, layer by layer (query 0, output 0, query 1,
    ...), place by place. -> the payload, compressed; values of prune's line."""
    places = [np.zeros(0, np.int64)]
    scales = [np.zeros(0, np.float16)]
    for name, spec in parameter_specs(cfg).items():
        if spec.coding in LARGEST and spec.coding != "int8":
            kind, start = payload.dtype.fields[name]
            ones = np.flatnonzero(abs(payload[name]["integers"]) == 1)
            if name in BANKS:
                layers = ones // math.prod(spec.shape[1:]) % cfg.num_layers
                ones = ones[layers.argsort(kind="stable")]
            places.append(start + kind.fields["integers"][1] + ones)
            scales.append(payload[name]["scale"].ravel()[ones // spec.shape[-1]])
    candidates = np.concatenate(places)[np.concatenate(scales).argsort(kind="stable")]

    @functools.cache
    def pruned(part: int) -> bytes:
        trial = payload.reshape(1).view("u1").copy()
        trial[candidates[: len(candidates) * part // 256]] = 0
        return compress(trial, cfg.compressor)

    part = 0
    if len(pruned(0)) > room:
        part = bisect.bisect_left(range(256), True, key=lambda part: len(pruned(part)) <= room)
    zeroed = len(candidates) * part // 256
    return pruned(part), dict(candidates=len(candidates), pruned=zeroed, bytes=len(pruned(part)))


def seal(prefix: bytes, header: dict[str, Any], payload: bytes) -> bytes:
    """prefix, length of the JSON header, header, payload, sha256 of all that."""
    text = json.dumps(header, separators=(",", ":")).encode()
    body = prefix + len(text).to_bytes(4, "little") + text + payload
    return body + hashlib.sha256(body).digest()


def unseal(prefix: bytes, content: bytes) -> tuple[Any, bytes]:
    """-> header, payload; ValueError for one byte more, less or different."""
    body = content[:-SHA_BYTES]
    if hashlib.sha256(body).digest() != content[-SHA_BYTES:]:
        raise ValueError("damaged, its sha256 does not fit")
    if not body.startswith(prefix):
        raise ValueError(f"not of this program, it does not begin with {prefix}")
    start = len(prefix) + 4
    end = start + int.from_bytes(body[len(prefix) : start], "little")
    if end > MOST_HEADER_BYTES:
        raise ValueError(f"a header of {end:,} bytes")
    return json.loads(body[start:end]), body[end:]


def stored_values(header: Any, field_names: Iterable[str]) -> dict[str, Any]:
    """Settings out of a header's texts, by field name; ConfigError, KeyError or TypeError for what
    no program here writes."""
    texts = {name: header[name] for name in field_names}
    for name, text in texts.items():
        if not isinstance(text, str):
            raise TypeError(f"{name} is no text")
    return {name: parse(name.upper(), text) for name, text in texts.items()}


class Artifact(NamedTuple):
    """What a file of pack_payload holds."""

    cfg: Config  # of the model
    payload: np.ndarray  # of payload_type
    known: KnownText


def read_artifact(path: str | Path, content: bytes) -> Artifact:
    """ArtifactError for a file that pack_payload would not have made."""
    try:
        content = content or read_regular(path, MOST_ARTIFACT_BYTES)
        begins = content[: len(ARTIFACT_PREFIX)]
        if begins != ARTIFACT_PREFIX and begins.startswith(ARTIFACT_PREFIX[:-4]):
            unseal(begins, content)  # ValueError where it is but damaged
            version = int.from_bytes(begins[-4:], "little")
            raise ArtifactError(f"of version {version}, made by an earlier or later train_gpt.py")
        header, packed = unseal(ARTIFACT_PREFIX, content)
        cfg = Config(**stored_values(header["model"], MODEL_FIELDS), eval_stride=1).check()
        count, size = known_size(header, packed)
        text = packed[len(packed) - size :]
        packed = packed[: len(packed) - size]
        if not cfg.vocab_size or header != artifact_header(cfg):  # what would be written
            raise ArtifactError("its header does not describe its model")
        if header["size"] > max(MOST_BYTES, MOST_RATIO * len(packed)):
            raise ArtifactError(f"{header['size']:,} bytes in {len(packed):,} packed ones")
        require_memory(header["size"] + 8 * count_parameters(cfg), "its weights")
        known = KnownText.unpack(text, count, cfg.vocab_size)
        specs = parameter_specs(cfg)
        if cfg.compressor == "range":
            return Artifact(cfg, range_decode(packed, specs), known)
        payload = decompress(packed, cfg.compressor, header["size"])
    except (LackOfMemory, MissingPackage):
        raise
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise ArtifactError(
            f"{path}: unreadable ({error}); fix: train or download it anew"
        ) from error
    return Artifact(cfg, np.frombuffer(payload, payload_type(specs)).reshape(()), known)


def known_size(header: Any, packed: bytes) -> tuple[int, int]:
    """Tokens of the known text and bytes that they take at the end of `packed`, taken out of the
    header; ArtifactError for what PackedText.header would not have said."""
    if "known" not in header:
        return 0, 0
    count, size = header.pop("known")
    if type(count) is not int or type(size) is not int:
        raise ArtifactError(f"a known text of {count!r} tokens in {size!r} bytes")
    if not 0 < count <= MOST_KNOWN or not 0 < size <= len(packed):
        raise ArtifactError(f"a known text of {count:,} tokens in {size:,} bytes")
    return count, size


def load_artifact(path: str | Path, device: Any = "cpu", content: bytes = b"") -> GPT:
    """The model of an artifact (content: the file's bytes, where they are at hand) in eval mode,
    fp32, for sequences of any length; ArtifactError for anything wrong."""
    cfg, payload, known = read_artifact(path, content)
    model = GPT(cfg, known)
    with np.errstate(all="ignore"):
        weights = {name: unpack_tensor(payload[name]) for name in payload.dtype.names}
    for name, weight in weights.items():
        if not weight.isfinite().all():
            fix = "train or download it anew"
            raise ArtifactError(f"{path}: {name} holds what is no number; fix: {fix}")
    model.load_state_dict(weights)
    return model.to(device).eval().requires_grad_(False)


# -----------------------------------------------------------------------------
# 10. Neural scoring
# Every target exactly once: its log-probability, and the entropy of the distribution it came from.


class Scores(NamedTuple):
    """Per target, float64 (N,), nats."""

    log_prob: np.ndarray
    entropy: np.ndarray
    pe_delta: np.ndarray | None = None  # norm of the change by pre-enrichment (PR #810)

    def take(self, places: Any) -> "Scores":
        """Those of some targets, by index or slice."""
        return Scores(*(column if column is None else column[places] for column in self))


def predict(model: GPT, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """hidden (..., D) -> log-probabilities, float64 (..., V), also under autocast; their entropy
    (...,), nats."""
    log_probs = model.logits(hidden).double().log_softmax(-1)
    return log_probs, -(log_probs.exp() * log_probs).sum(-1)


def bits_per_byte(log_prob: np.ndarray, target_bytes: np.ndarray) -> float:
    """Code length of the targets, log_prob in nats, over their UTF-8 bytes."""
    return float(-log_prob.sum() / math.log(2) / target_bytes.sum())


def for_scores(model: GPT) -> GPT:
    """The same weights, as a model read from an artifact has them: in eval mode, without gradients.
    To the compiler both are one, so what validation compiles serves the evaluation, too."""
    other = GPT(model.cfg)
    other.load_state_dict(model.state_dict(), assign=True)
    other.set_looped(model.looped)
    return other.to(model.tok_emb.device).eval().requires_grad_(False)


class WindowScorer:
    """Windows of cfg.window inputs, each scoring the `stride` targets at its end; the first ones
    begin at position 0. All passes have one shape and go to ranks by index: neither the future nor
    the number of ranks changes a value. With a window of 8 and a stride of 4:

        inputs 0..7  score the targets of 0..3, then of 4..7
        inputs 4..11 score the targets of 8..11, inputs 8..15 those of 12..15, ...
    """

    def __init__(self, model: GPT, rt: Runtime, cfg: Config, adapters: Callable | None = None):
        """adapters: -> bank name -> what is added to that bank, see Context."""
        self.model = model
        self.rt = rt
        self.batch = cfg.eval_batch_seqs
        self.length = cfg.window
        self.adapters = adapters or dict
        self.hidden = rt.compile(self.rows)  # one graph for every stride
        self.forward = rt.compile(self.score_rows)
        # Roundtrip windows keep this of every input: activations, distributions in float64.
        hidden = int(cfg.mlp_mult * cfg.model_dim)
        each = 24 * cfg.vocab_size + 16 * cfg.model_dim + 8 * hidden
        what = f"EVAL_BATCH_SEQS={self.batch} windows of {self.length} tokens (EVAL_SEQ_LEN)"
        require_memory(self.batch * self.length * each, what, rt.device)

    def rows(self, ids: Tensor) -> Tensor:
        """inputs (B, T) -> the network's output (B, T, D)."""
        with self.rt.autocast(), self.rt.attention():
            return self.model.hidden(ids, adapters=self.adapters())

    def predict(self, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """rows' output, positions to score (B, S) -> predict's (B, S, V) and (B, S)."""
        with self.rt.autocast():
            return predict(self.model, hidden.take_along_dim(positions.unsqueeze(-1), 1))

    def score_rows(self, hidden: Tensor, positions: Tensor, targets: Tensor) -> Tensor:
        """-> log p of targets (B, S), and entropy; float64 (2, B, S)."""
        log_probs, entropy = self.predict(hidden, positions)
        return torch.stack([log_probs.gather(-1, targets.unsqueeze(-1)).squeeze(-1), entropy])

    def warm_up(self, stride: int) -> None:
        """What scoring with this stride will run, on nothing: compiled, then timed."""
        nothing = np.zeros(2, np.uint16)
        ends = np.full(self.batch * self.rt.world_size, stride)
        for _ in range(2):  # the second time replaces the first, which compiles
            self.rt.measure(
                f"stride {stride}", 1, lambda: self.score_windows(nothing, ends, stride)
            )

    def passes(self, targets: int, stride: int) -> int:
        """Of each rank."""
        return -(-targets // (stride * self.batch * self.rt.world_size))

    def windows(self, stream: np.ndarray, ends: np.ndarray, stride: int) -> list[Tensor]:
        """Inputs (B, T), scored positions and targets (B, S) of the windows that end before target
        `ends`; beyond the stream's end lies a constant."""
        starts = np.maximum(ends - self.length, 0)[:, None]
        inputs = starts + np.arange(self.length)
        scored = ends[:, None] - stride + np.arange(stride)
        ids = stream.take(inputs, mode="clip").astype(np.int64)
        ids[inputs >= len(stream) - 1] = 0
        targets = stream.take(scored + 1, mode="clip").astype(np.int64)
        columns = (ids, scored - starts, targets)
        return [torch.as_tensor(column, device=self.rt.device) for column in columns]

    def score(self, stream: np.ndarray, stride: int) -> Scores:
        """stream: N + 1 tokens -> Scores of the last N."""
        total = len(stream) - 1
        columns = self.score_windows(stream, np.arange(0, total, stride) + stride, stride)
        return Scores(*columns.reshape(2, -1)[:, :total])

    @torch.no_grad()
    def score_windows(self, stream: np.ndarray, ends: np.ndarray, stride: int) -> np.ndarray:
        """float64 (2, windows, S): log p and entropy, the same on every rank."""
        result = np.zeros((2, len(ends), stride))
        step = self.rt.world_size * self.batch
        for begin in range(self.rt.rank * self.batch, len(ends), step):
            real = range(begin, min(begin + self.batch, len(ends)))
            self.rt.tick("score", real.stop, len(ends))
            batch = np.resize(real, self.batch)  # the last one keeps its shape
            ids, positions, targets = self.windows(stream, ends[batch], stride)
            scored = self.forward(self.hidden(ids), positions, targets)
            result[:, real] = scored[:, : len(real)].cpu().numpy()
        return self.rt.sum(result)


# Documents and their pieces in lanes.


SCHEDULED_STEPS = 1024  # of lanes, that are laid out at a time
WARM_UP_STEPS = 32  # of lanes, that are timed beforehand


class Pieces(NamedTuple):
    """A stream in what lanes take one by one: documents, the long ones in parts. The first input of
    a piece is a BOS, also amid a document: keys, smear and bigrams begin anew."""

    starts: np.ndarray  # places of their first inputs, (P,)
    sizes: np.ndarray  # targets, (P,)
    goes_on: np.ndarray  # bool (P,): the document, in the next piece

    @staticmethod
    def of(stream: np.ndarray, length: int) -> "Pieces":
        """stream: a BOS and N targets; length: targets of a part; 0: no document is cut."""
        starts = np.flatnonzero(stream[:-1] == BOS)
        sizes = np.diff(starts, append=len(stream) - 1)
        if not length or sizes.max(initial=0) <= length:
            return Pieces(starts, sizes, np.zeros(len(starts), bool))
        parts = -(-sizes // length)
        ends = np.cumsum(parts)
        number = np.arange(ends[-1]) - np.repeat(ends - parts, parts)  # in the document
        rest = np.repeat(sizes, parts) - length * number
        starts = np.repeat(starts, parts) + length * number
        return Pieces(starts, np.minimum(rest, length), rest > length)


class CodingPlan(NamedTuple):
    """What a decoder must know beforehand."""

    pieces: int
    last: int  # targets of the last one; 0: it ends with a BOS, as documents do
    lanes: int  # pieces side by side
    groups: int  # of lanes, one a rank
    targets: int  # to code
    window: int  # keys and values a lane keeps
    ahead: tuple[int, ...] = ()  # pieces that are read first, ascending
    length: int = 0  # targets of a piece whose document goes on in the next one
    # Of each such document, ascending: its first piece, and how many end with a cut.
    cuts: tuple[tuple[int, int], ...] = ()

    @staticmethod
    def of(stream: np.ndarray, cfg: Config, groups: int) -> "CodingPlan":
        """For the N targets of a stream of N + 1 tokens."""
        pieces = Pieces.of(stream, cfg.eval_piece_tokens)
        count = len(pieces.starts)
        last = 0 if stream[-1] == BOS else int(pieces.sizes[-1])
        lanes = -(-min(cfg.eval_lanes, count) // groups) * groups
        plan = CodingPlan(count, last, lanes, groups, len(stream) - 1, cfg.window)
        if pieces.goes_on.any():
            edges = np.flatnonzero(np.diff(pieces.goes_on, prepend=False, append=False))
            cuts = tuple((a, b - a) for a, b in edges.reshape(-1, 2).tolist())
            plan = plan._replace(length=cfg.eval_piece_tokens, cuts=cuts)
        if count <= lanes:  # all begin at once
            return plan
        longest = np.argsort(-pieces.sizes, kind="stable")
        ahead = sorted(longest[: cfg.eval_longest_first].tolist())
        natural = ahead == [*range(len(ahead))]  # the first ones anyway: not worth a byte
        return plan._replace(ahead=() if natural else tuple(ahead))

    def queue(self) -> Iterator[int]:
        """The pieces in the order in which they are begun, one by one: a forged number of them
        must not ask for the memory."""
        yield from self.ahead
        ahead = {*self.ahead}
        yield from (piece for piece in range(self.pieces) if piece not in ahead)

    def goes_on(self, pieces: np.ndarray) -> np.ndarray:
        """Which of these pieces end with a cut, at the plan's length; bool."""
        if not self.cuts:
            return np.zeros(len(pieces), bool)
        firsts, counts = np.array(self.cuts).T
        document = np.searchsorted(firsts, pieces, "right") - 1
        return (document >= 0) & (pieces < (firsts + counts)[document])

    def side_bytes(self) -> bytes:
        """What the body of stream.bin begins with: which pieces are ahead, as the gaps between
        them, the first counted from -1; of each document that is cut the gap from the last piece of
        the one before, at first from -1, to its first, and how many end with a cut. Seven bits a
        byte, the low ones first, with the eighth where more follow (LEB128)."""
        numbers = np.diff(self.ahead, prepend=-1).tolist()
        end = -1
        for first, count in self.cuts:
            numbers += [first - end, count]
            end = first + count
        packed = bytearray()
        for number in numbers:
            while number > 127:
                packed.append(number & 127 | 128)
                number >>= 7
            packed.append(number)
        return bytes(packed)

    def side_nats(self) -> float:
        """What they cost."""
        return len(self.side_bytes()) * math.log(256)


def read_side_bytes(plan: CodingPlan, ahead: int, cut: int, body: bytes) -> CodingPlan:
    """The plan with the pieces ahead and the cuts, so many each, from the beginning of a stream's
    body; ValueError for what side_bytes would not have written."""
    numbers: list[int] = []
    number = 0
    shift = 0
    for byte in body:
        if len(numbers) == ahead + 2 * cut or shift > 28:  # five bytes at most
            break
        number |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            numbers.append(number)
            number = 0
            shift = 0
    numbers_ahead = (np.cumsum(numbers[:ahead], dtype=int) - 1).tolist()
    edges = (np.cumsum(numbers[ahead:], dtype=int) - 1).tolist()  # first, last piece of documents
    cuts = zip(edges[::2], numbers[ahead + 1 :: 2], strict=False)
    plan = plan._replace(ahead=tuple(numbers_ahead), cuts=tuple(cuts))
    whole = len(numbers) == ahead + 2 * cut and all(number > 0 for number in numbers)
    within = all(piece < plan.pieces for piece in numbers_ahead[-1:] + edges[-1:])
    if not (whole and within and body.startswith(plan.side_bytes())):
        raise ValueError(f"it does not begin with the numbers of {ahead} pieces and {cut} cuts")
    return plan


class LaneStep(NamedTuple):
    """What the lanes at work did in one step, each (lanes at work,)."""

    lanes: np.ndarray
    pieces: np.ndarray  # that they read
    places: np.ndarray  # of their inputs there, from 0


def take_pieces(sizes: np.ndarray, lanes: int) -> np.ndarray:
    """Of each piece the lane that reads it: the one that is free first. int64 (pieces,)."""
    free = [(0, lane) for lane in range(lanes)]  # from which step on
    taken = []
    for size in sizes.tolist():
        step, lane = free[0]
        heapq.heapreplace(free, (step + size, lane))
        taken.append(lane)
    return np.array(taken, int)


def count_steps(stream: np.ndarray, plan: CodingPlan) -> int:
    """Steps of lanes until plan.targets are coded. A step takes as long when few lanes are left."""
    sizes = Pieces.of(stream, plan.length).sizes[[*plan.queue()]]
    lengths = np.bincount(take_pieces(sizes, plan.lanes), sizes, plan.lanes)
    busy = plan.lanes - np.searchsorted(np.sort(lengths), np.arange(lengths.max()), "right")
    return int(np.searchsorted(np.cumsum(busy), plan.targets)) + 1


class LaneSchedule:
    """Which lane reads what when, known beforehand: it depends on the pieces' lengths alone.
    Encoder and decoder come to the same as they go (run_lanes)."""

    def __init__(self, stream: np.ndarray, plan: CodingPlan):
        """stream: a BOS and N targets."""
        queue = [*plan.queue()]
        starts, sizes, goes_on = (column[queue] for column in Pieces.of(stream, plan.length))
        taken = take_pieces(sizes, plan.lanes)
        by_lane = np.argsort(taken, kind="stable")  # each lane's pieces, in its order
        lengths = np.bincount(taken, sizes, plan.lanes).astype(int)  # of the lanes
        sizes = sizes[by_lane]
        within = np.arange(len(stream) - 1, dtype=np.int32)
        within -= np.repeat(np.cumsum(sizes) - sizes, sizes).astype(np.int32)
        # Lane after lane: the places of its inputs in their pieces, and in the stream.
        self.places = within
        self.inputs = within + np.repeat(starts[by_lane].astype(np.int32), sizes)
        # A context ends with its lane, and where a cut ends a piece: threads of text.
        lane = taken[by_lane]
        begins = (np.diff(lane, prepend=-1) != 0) | np.roll(goes_on[by_lane], 1)
        self.threads = np.repeat(np.cumsum(begins, dtype=np.int32) - 1, sizes)
        self.firsts = np.cumsum(lengths) - lengths
        self.lengths = lengths

    def steps(self, begin: int, end: int, lanes: slice) -> tuple[np.ndarray, np.ndarray]:
        """Of these steps, int32 (steps, lanes): places of the inputs in the stream, -1 where a lane
        has nothing to do, and in their pieces, whose first input is a BOS."""
        step = np.arange(begin, end)[:, None]
        busy = step < self.lengths[lanes]
        index = np.where(busy, step + self.firsts[lanes], 0)
        return np.where(busy, self.inputs[index], -1), np.where(busy, self.places[index], 0)

    def order(self, stream: np.ndarray) -> "CodingOrder":
        """Of the stream's targets."""
        begun = np.flatnonzero(self.lengths)
        targets = []
        times = [np.zeros(len(begun), np.int32)]
        threads = [self.threads[self.firsts[begun]]]
        for begin in range(0, int(self.lengths.max()), SCHEDULED_STEPS):
            inputs, _ = self.steps(begin, begin + SCHEDULED_STEPS, slice(None))
            step, lane = np.nonzero(inputs >= 0)
            targets.append(inputs[step, lane])
            times.append((step + begin + 1).astype(np.int32))
            threads.append(self.threads[step + begin + self.firsts[lane]])
        places = np.concatenate(targets)
        tokens = np.append(np.full(len(begun), BOS, stream.dtype), stream[places + 1])
        return CodingOrder(tokens, places, (np.concatenate(times), np.concatenate(threads)))


class CodingOrder(NamedTuple):
    """In which targets are coded."""

    tokens: np.ndarray  # the lanes' first BOS, then the targets
    targets: np.ndarray | slice  # (N,) their places in the text
    schedule: tuple[np.ndarray, np.ndarray] | None = None  # lane step, thread of each token; None:
    # one by one


TokenChooser = Callable[[list[Tensor], LaneStep], np.ndarray]


def tokens_of_text(stream: np.ndarray, plan: CodingPlan) -> TokenChooser:
    """-> run_lanes' choose_tokens along a text."""
    starts = Pieces.of(stream, plan.length).starts + 1

    def choose_tokens(_: Any, step: LaneStep) -> np.ndarray:
        return stream[starts[step.pieces] + step.places].astype(np.int64)

    return choose_tokens


@torch.no_grad()
def run_lanes(
    model: GPT,
    rt: Runtime,
    plan: CodingPlan,
    choose_tokens: TokenChooser,
    cfg: Config | None = None,
) -> int:
    """The one loop of encoding and decoding: a token a lane a step. -> targets that were coded.
    cfg: LANE_TTT's settings; None: the weights stay.

    Lanes begin with the first pieces of the queue, which is the text's order but for those that
    the plan has ahead. A piece ends with the BOS that ends its document; one that is cut, and the
    text's last, at its known length. Its lane then takes the next piece that waits. The network
    runs each group of lanes in its own cache; choose_tokens(their outputs, joined; who is at work
    where) says which token follows in each lane: read from a text, or from a range decoder. Since
    nothing else differs, encoder and decoder call the network with the same numbers in the same
    shapes.
    Three documents a b c | d e | f g h in two lanes:

        step     1     2     3     4     5     6
        lane 0   a     b     c     BOS   -     -     its BOS ends the first; nothing waits
        lane 1   d     e     BOS   f     g     h     its BOS ends the second; it takes the third
    """
    group_size = plan.lanes // plan.groups
    require_lanes(model, rt, plan.lanes, plan.window)
    model = own_copy(model, cfg)
    caches = [LaneCache(model, group_size, plan.window) for _ in range(plan.groups)]
    passes = [lane_pass(model, rt, cache) for cache in caches]
    learner = LaneLearner(model, rt, cfg, caches) if cfg and cfg.lane_ttt else None
    ids = np.full(plan.lanes, BOS)
    places = np.zeros(plan.lanes, int)
    queue = plan.queue()
    none = plan.pieces
    pieces = np.array([next(queue, none) for _ in range(plan.lanes)])
    coded = 0
    while len(lanes := np.flatnonzero(pieces < none)) and coded < plan.targets:
        inputs = torch.as_tensor(np.stack([ids, places]), device=rt.device).split(group_size, 1)
        outputs = [forward(*group) for forward, group in zip(passes, inputs, strict=True)]
        joined = [*outputs[0]]  # large: not copied where it is one group
        if len(outputs) > 1:
            joined = [torch.cat(columns) for columns in zip(*outputs, strict=True)]
        step = LaneStep(lanes, pieces[lanes], places[lanes])
        tokens = choose_tokens(joined, step)
        if learner:
            learner.add(ids, places, lanes, tokens)
        ids[lanes] = tokens
        places[lanes] += 1
        coded += len(lanes)
        rt.tick("documents", coded, plan.targets)
        over = (step.pieces == none - 1) & (places[lanes] == plan.last)
        if plan.cuts and plan.length in places:
            over |= (places[lanes] == plan.length) & plan.goes_on(step.pieces)
        for lane in lanes[over | (tokens == BOS)]:
            ids[lane] = BOS
            places[lane] = 0
            pieces[lane] = next(queue, none)
    return coded


def lane_bytes(cfg: Config, lanes: int, window: int, cuda: bool) -> int:
    """What lanes hold at least: keys, values, float64 distributions, the codec's text."""
    kept = 2 * count_blocks(cfg) * cfg.model_dim // cfg.num_heads * cfg.num_kv_heads * window
    number = 2 if cuda else 4
    return lanes * (number * kept + 24 * cfg.vocab_size + 2 * LANE_BLOCK)


def require_lanes(model: GPT, rt: Runtime, lanes: int, window: int) -> None:
    """LackOfMemory where these lanes do not fit."""
    what = f"{lanes} lanes (EVAL_LANES) of {window} tokens (EVAL_SEQ_LEN)"
    require_memory(lane_bytes(model.cfg, lanes, window, rt.cuda), what, rt.device)


def lane_forward(model: GPT, rt: Runtime, cache: LaneCache) -> Callable:
    """-> forward(ids, places), int64 (count,) each, that predicts the next tokens: predict's
    (count, V) and (count,)."""

    def forward(ids: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        cache.begin(places)
        with rt.autocast():
            return predict(model, model.hidden(ids.unsqueeze(1), cache)[:, 0])

    if rt.cuda:  # makes what the compiler is to find, the tensors in `past`
        forward(*torch.zeros(2, len(cache.lane), dtype=torch.int64, device=rt.device))
    return rt.compile(forward, repeatable=True)


def lane_pass(model: GPT, rt: Runtime, cache: LaneCache) -> Callable:
    """The codec's: lane_forward, in one launch."""
    forward = lane_forward(model, rt, cache)
    return rt.graph(forward, *torch.zeros_like(cache.lane.expand(2, -1)))


def own_copy(model: GPT, cfg: Config | None) -> GPT:
    """A copy where LANE_TTT will change it; else the model itself."""
    return copy.deepcopy(model) if cfg and cfg.lane_ttt else model


def learning_bytes(cfg: Config, caches: int, lanes: int, window: int, every: int) -> int:
    """What LANE_TTT holds at least: weights of its own, a gradient, the sum of all, Adam's state;
    each cache's copies of weights; of a group's step attention's scores, twice, activations and
    logits."""
    calls = count_blocks(cfg)
    hidden = int(cfg.mlp_mult * cfg.model_dim)
    each = 8 * calls * cfg.num_heads * (window + every)
    each += 4 * calls * (8 * cfg.model_dim + 2 * hidden) + 12 * cfg.vocab_size
    return (20 + 2 * caches) * count_parameters(cfg) + lanes * every * each


class LaneLearner:
    """Score-first learning in lanes (LANE_TTT): every LANE_TTT_EVERY steps the tokens that all
    lanes have just coded make one step of Adam on all weights, which all lanes share. What the
    caches hold stays as it is. A decoder knows these tokens by then and takes the same step, to
    the bit: gradients are added up in the order of the groups, wherever they are made.

    Adam without momentum (it did harm): a step is the gradient over the root of the mean of its
    last squares. The loss is divided by all lanes' tokens, also where few lanes are at work: those
    at the end of a text move the weights less.
    """

    BETAS = 0.0, 0.99
    CLIP = 1.0  # largest norm of the gradients

    def __init__(self, model: GPT, rt: Runtime, cfg: Config, caches: Sequence[LaneCache]):
        """model: changed as it learns. caches: one for each group that this process runs: the
        codec all of them, in scoring each rank its own."""
        lanes = len(caches[0].lane)
        window = len(caches[0].slots)
        what = f"LANE_TTT_EVERY={cfg.lane_ttt_every} steps of {lanes} lanes"
        needed = learning_bytes(model.cfg, len(caches), lanes, window, cfg.lane_ttt_every)
        require_memory(needed, what, rt.device)
        self.model = model
        self.rt = rt
        self.every = cfg.lane_ttt_every
        self.caches = caches
        self.coded: list[np.ndarray] = []
        self.ranks = rt.world_size if len(caches) == 1 else 1
        self.weights = [*model.parameters()]
        sizes = [weight.numel() for weight in self.weights]
        self.gradient = torch.zeros(sum(sizes), device=rt.device)
        self.total = torch.zeros_like(self.gradient)  # of all groups
        for weight, part in zip(self.weights, self.gradient.split(sizes), strict=True):
            weight.grad = part.view_as(weight)
        how = dict(fused=True, capturable=rt.cuda)
        self.optimizer = torch.optim.Adam(self.weights, cfg.lane_ttt_lr, self.BETAS, **how)
        self.tokens_a_step = self.every * lanes * len(caches) * self.ranks
        for cache in caches:
            cache.mark()
        nothing = torch.zeros(4, self.every, lanes, dtype=torch.int64, device=rt.device)
        self.passes = [
            rt.graph(functools.partial(self.back_propagate, cache), nothing.clone())  # kept by it
            for cache in caches
        ]

    def add(
        self, ids: np.ndarray, places: np.ndarray, lanes: np.ndarray, tokens: np.ndarray
    ) -> None:
        """A step: inputs of all lanes, their places, and what the lanes at work coded."""
        step = np.stack([ids, places, np.full_like(ids, BOS), np.zeros_like(ids)])
        step[2, lanes] = tokens
        step[3, lanes] = 1
        self.coded.append(step)
        if len(self.coded) == self.every:
            self.learn(torch.as_tensor(np.stack(self.coded, 1), device=self.rt.device))
            self.coded = []

    def learn(self, chunk: Tensor) -> None:
        """chunk: int64 (4, LANE_TTT_EVERY, lanes of all groups here): inputs, their places,
        targets, and 1 where a lane was at work."""
        self.total.zero_()
        groups = chunk.chunk(len(self.caches), 2)
        for back_propagate, group in zip(self.passes, groups, strict=True):
            back_propagate(group)
            for part in self.rt.gather(self.gradient) if self.ranks > 1 else [self.gradient]:
                self.total += part
        # No step by what is no number: it would spoil all that follows.
        self.gradient.copy_(self.total.nan_to_num_(0.0, 0.0, 0.0))
        nn.utils.clip_grad_norm_(self.weights, self.CLIP)
        self.optimizer.step()
        for cache in self.caches:
            cache.refresh(self.model)
            cache.mark()

    @torch.enable_grad()
    def back_propagate(self, cache: LaneCache, chunk: Tensor) -> None:
        """The gradient of a group's share of the loss. chunk: int64 (4, LANE_TTT_EVERY, lanes)."""
        ids, places, targets, busy = chunk.transpose(1, 2)
        self.gradient.zero_()
        self.model.requires_grad_()  # not for longer: the compiler would see another model
        with self.rt.autocast():
            hidden = self.model.hidden(ids, LaneChunk(self.model, cache, ids, places))
            logits = self.model.logits(hidden).float()
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        ((losses * busy.flatten()).sum() / self.tokens_a_step).backward()
        self.model.requires_grad_(False)


class LaneScorer:
    """Scores lanes along a schedule that lies on the device beforehand: no step waits for the host,
    and results are fetched once in SCHEDULED_STEPS."""

    def __init__(self, model: GPT, rt: Runtime, cfg: Config, count: int):
        """cfg: of LANE_TTT."""
        shape = SCHEDULED_STEPS, count
        require_lanes(model, rt, count, cfg.window)
        self.rt = rt
        self.window = cfg.window
        model = own_copy(model, cfg)
        cache = LaneCache(model, count, cfg.window)
        self.forward = lane_forward(model, rt, cache)
        # inputs, their places in the pieces, targets, 1 where a lane is at work
        self.schedule = torch.zeros(4, *shape, dtype=torch.int64, device=rt.device)
        self.found = torch.zeros(2, *shape, dtype=torch.float64, device=rt.device)
        self.at = torch.zeros(1, dtype=torch.int64, device=rt.device)  # the next of these steps
        self.step = rt.graph(self.score_step)
        self.learner = LaneLearner(model, rt, cfg, [cache]) if cfg.lane_ttt else None
        self.warm_up_steps = cfg.warm_up_steps
        self.steps = SCHEDULED_STEPS // cfg.learns_every * cfg.learns_every  # of `score` at a time

    def score_step(self) -> None:
        """Log p of the targets, and entropy."""
        ids, places, targets, _ = self.schedule.index_select(1, self.at)[:, 0]
        log_probs, entropy = self.forward(ids, places)
        log_prob = log_probs.gather(1, targets.unsqueeze(1))[:, 0]
        self.found.index_copy_(1, self.at, torch.stack([log_prob, entropy]).unsqueeze(1))
        self.at += 1

    def warm_up(self) -> None:
        """As it will run, with half the window full, and timed."""
        columns = np.zeros((4, self.warm_up_steps, self.schedule.shape[2]), np.int64)
        columns[1] = self.window // 2
        for _ in range(2):  # the second time replaces the first, which compiles
            self.rt.measure("lane step", self.warm_up_steps, lambda: self.score(columns))

    @torch.no_grad()
    def score(self, columns: np.ndarray, tick: Callable = lambda _: None) -> np.ndarray:
        """columns: int64 (4, steps, count) as `schedule`, of a multiple of LANE_TTT_EVERY but at a
        text's end -> log p, entropy, float64 (2, steps, count)."""
        steps = columns.shape[1]
        self.schedule[:, :steps] = torch.as_tensor(columns)
        self.at.zero_()
        for step in range(steps):
            self.step()
            if self.learner and not (step + 1) % self.learner.every:
                self.learner.learn(self.schedule[:, step + 1 - self.learner.every : step + 1])
            tick(step + 1)
        return self.found[:, :steps].cpu().numpy()


@torch.no_grad()
def score_documents(
    model: GPT, rt: Runtime, cfg: Config, stream: np.ndarray
) -> tuple[Scores, CodingOrder]:
    """stream: a BOS and N targets -> (Scores of these, in the text's order; how lanes took them).
    Each rank runs one group of lanes and scores its targets."""
    plan = CodingPlan.of(stream, cfg, rt.world_size)
    schedule = LaneSchedule(stream, plan)
    group_size = plan.lanes // plan.groups
    mine = slice(rt.rank * group_size, (rt.rank + 1) * group_size)
    scorer = LaneScorer(model, rt, cfg, group_size)
    columns = np.zeros((2, plan.targets))
    aside = ThreadPoolExecutor(1)
    order = aside.submit(schedule.order, stream)  # takes seconds, while the device works
    total = int(schedule.lengths.max())  # on every rank: all learn together
    rt.expect("documents", "lane step", total)
    for begin in range(0, total, scorer.steps):
        end = min(begin + scorer.steps, total)
        inputs, places = schedule.steps(begin, end, mine)
        busy = inputs >= 0
        ids = np.where(busy & (places > 0), stream[inputs], BOS)  # as in run_lanes
        found = scorer.score(
            np.stack([ids, places, stream[inputs + 1], busy]).astype(np.int64),
            lambda step, begin=begin: rt.tick("documents", begin + step, total),
        )
        columns[:, inputs[busy]] = found[:, busy]
    return Scores(*rt.sum(columns)), order.result()


# Text from the model.


class Continuation(NamedTuple):
    """What followed a prompt."""

    tokens: np.ndarray  # uint16, without the prompt and the BOS that may have ended them
    log_prob: np.ndarray  # of the prompt's tokens and of these, by the model; float64, nats


def generate(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    *,
    temperature: float = 0.8,
    top_k: int = 50,
    seed: int = 0,
    lanes: int = 1,
) -> list[Continuation]:
    """Continue documents that begin with these ids, each by `tokens` tokens or until it ends.

    The model alone writes, without the counts of the mixture, in the lanes that score and decode
    (run_lanes). A token is drawn from the top_k likeliest (0: from all) at a temperature (0: the
    likeliest); of each prompt by its own generator, so the number of lanes changes nothing.
    """
    cfg = replace(model.cfg, device=model.tok_emb.device.type)
    longest = tokens + max(map(len, prompts))
    texts: list[list[int]] = [[] for _ in prompts]
    costs: list[list[float]] = [[] for _ in prompts]
    draws = [np.random.default_rng([seed, number]) for number in range(len(prompts))]

    def choose_tokens(outputs: list[Tensor], step: LaneStep) -> np.ndarray:
        log_probs = outputs[0].cpu().numpy()[step.lanes]
        for row, document in zip(log_probs, step.pieces, strict=True):
            text = texts[document]
            prompt = prompts[document]
            if len(text) < len(prompt):
                token = prompt[len(text)]
            elif len(text) < len(prompt) + tokens:
                token = draw_token(row, temperature, top_k, draws[document])
            else:
                token = BOS
            text.append(token)
            costs[document].append(row[token])
        return np.array([texts[document][-1] for document in step.pieces])

    plan = CodingPlan(len(prompts), 0, lanes, 1, len(prompts) * (longest + 1), cfg.window)
    run_lanes(model, Runtime(cfg), plan, choose_tokens)
    return [
        Continuation(np.array(text[len(prompt) : -1], np.uint16), np.array(cost[:-1]))
        for prompt, text, cost in zip(prompts, texts, costs, strict=True)
    ]


def draw_token(log_prob: np.ndarray, temperature: float, top_k: int, draw: Any) -> int:
    """Of a row (V,), nats. draw: NumPy's generator."""
    if not temperature:
        return int(log_prob.argmax())
    ranked = np.argsort(-log_prob, kind="stable")[: top_k or None]
    p = np.exp((log_prob[ranked] - log_prob[ranked[0]]) / temperature)
    return int(ranked[np.searchsorted(p.cumsum(), draw.random() * p.sum(), "right")])


# What only published systems add.


class LowRankAdapters:
    """W becomes W + A B for the query and value matrices: A random, B zero (PR #808)."""

    def __init__(self, model: GPT, rank: int):
        self.layers = model.cfg.num_layers
        self.factors = {name: self.start(getattr(model, name), rank) for name in BANKS[:2]}

    def start(self, bank: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """A (L, r, rank), B (L, rank, c) of a bank (2 L, r, c)."""
        _, rows, columns = bank.shape
        generator = torch.Generator().manual_seed(0)
        a = torch.randn(self.layers, rows, rank, generator=generator) / 100
        b = torch.zeros(self.layers, rank, columns)
        return a.to(bank.device).requires_grad_(), b.to(bank.device).requires_grad_()

    def parameters(self) -> list[Tensor]:
        return [factor for pair in self.factors.values() for factor in pair]

    def __call__(self) -> dict[str, Tensor]:
        """Bank name -> A B, zero for the outputs and keys that share the banks."""
        halves = {"qo_bank": (0, self.layers), "kv_bank": (self.layers, 0)}
        return {
            name: F.pad(a @ b, (0, 0, 0, 0, *halves[name])) for name, (a, b) in self.factors.items()
        }


class TestTimeTraining:
    """Learns from scored chunks only: SGD on all weights (PR #549), or Adam on low-rank adapters
    (PR #808). Every rank takes the same steps. The codec does not, so SCORER=documents, whose score
    is proved, refuses it; what it learns by is a LaneLearner."""

    def __init__(self, model: GPT, rt: Runtime, cfg: Config):
        self.model = copy.deepcopy(model)
        self.rt = rt
        self.cfg = cfg
        self.chunk = cfg.ttt_chunk_tokens
        if cfg.ttt_use_lora:
            self.adapters = LowRankAdapters(self.model, cfg.ttt_lora_rank)
            self.weights = self.adapters.parameters()
            self.optimizer = torch.optim.Adam(self.weights, cfg.ttt_lora_lr)
        else:
            self.adapters = dict
            self.weights = [*self.model.requires_grad_().parameters()]
            self.optimizer = torch.optim.SGD(self.weights, cfg.ttt_lr, cfg.ttt_momentum)
        self.compiled_loss = rt.compile(self.model)

    def warm_up(self) -> None:
        """Chunks of nothing are scored, all but the last learnt; compiled, then timed."""
        for chunks in (2, 6):  # what the second adds replaces the first, which compiles
            nothing = np.zeros(chunks * self.chunk + 1, np.uint16)
            self.rt.measure("chunk", chunks, lambda nothing=nothing: self.score(nothing))

    def score(self, stream: np.ndarray) -> Scores:
        """stream: N + 1 tokens -> Scores of the last N, each chunk by what the ones before it
        taught."""
        scorer = WindowScorer(self.model, self.rt, self.cfg, self.adapters)
        stride = self.cfg.eval_stride
        total = len(stream) - 1
        last_chunk = (total - 1) // self.chunk
        parts = []
        for begin in range(0, total, self.chunk):
            end = min(begin + self.chunk, total)
            ends = np.arange(begin, end, stride) + stride
            parts.append(scorer.score_windows(stream, ends, stride))
            if end < total:
                self.learn(stream[begin : end + 1], begin / self.chunk / last_chunk)
        return Scores(*np.concatenate(parts, 1).reshape(2, -1)[:, :total])

    @torch.enable_grad()
    def learn(self, chunk: np.ndarray, progress: float) -> None:
        """chunk: scored targets and the token before them; progress 0..1 lowers the rate."""
        cfg = self.cfg
        rt = self.rt
        length = cfg.window
        tokens = torch.from_numpy(chunk.astype(np.int64)).to(rt.device)
        rate = self.optimizer.defaults["lr"] * (1 + math.cos(math.pi * progress)) / 2
        for settings in self.optimizer.param_groups:
            settings["lr"] = rate
        sequences = tokens.unfold(0, length + 1, length)  # (sequences, window + 1)
        for batch in sequences.split(cfg.ttt_batch_seqs) * cfg.ttt_epochs:
            for weight in self.weights:
                weight.grad = torch.zeros_like(weight)
            if len(mine := batch[rt.rank :: rt.world_size]):
                with rt.autocast(), rt.attention():
                    loss = self.compiled_loss(mine[:, :-1], mine[:, 1:], self.adapters())
                (loss * len(mine) * rt.world_size / len(batch)).backward()
            average_gradients(self.weights, rt)
            nn.utils.clip_grad_norm_(self.weights, cfg.ttt_grad_clip)
            self.optimizer.step()


ENRICHED_AT_ONCE = 1 << 14  # tokens


def with_enrichment_change(scores: Scores, model: GPT, stream: np.ndarray) -> Scores:
    """Scores with their column pe_delta, where the model has pre-enrichment."""
    if not model.cfg.pre_enrich_dim:
        return scores
    return scores._replace(pe_delta=enrichment_change(model, stream))


@torch.no_grad()
def enrichment_change(model: GPT, stream: np.ndarray, piece: int = ENRICHED_AT_ONCE) -> np.ndarray:
    """Norm of the change by pre-enrichment (PR #810's confidence) at each input of a stream of
    N + 1 tokens, float64 (N,): of the token and the two before (smear over bigrams), so in pieces
    that overlap by two."""
    parts = []
    for begin in range(0, len(stream) - 1, piece):
        first = max(begin - 2, 0)
        tokens = stream[first : min(begin + piece, len(stream) - 1)].astype(np.int64)
        ids = torch.from_numpy(tokens)[None].to(model.tok_emb.device)
        context = Context(model, ids)
        plain = model.embed(ids, context)
        change = (model.enrich(plain, context) - plain).double().norm(dim=-1)
        parts.append(change[0, begin - first :].cpu().numpy())
    return np.concatenate(parts)


# -----------------------------------------------------------------------------
# 11. n-gram scoring
# Exact causal counts by sorting; over them the published backoff and a learned mixture, the blend.
#
# Counts by sorting. What is wanted at position t: how often its context (order - 1 tokens) came
# before, how often context and token t did, how many distinct tokens had followed the context
# (types), and how many of them once (singletons). Sort the keys (context, token, position): equal
# n-grams lie side by side in the order of time, so the count of an n-gram at t is its rank among
# its equals. For order 2 and the text a b a b a c, as context-token at position:
#
#     a-b 1   a-b 3   a-c 5   b-a 2   b-a 4
#       0       1       0       0       1      target_count
#
# The next order's contexts are these n-grams: the groups are numbered, and the group's number with
# the token after it is the next key, so no context is ever hashed or compared token by token. An
# n-gram that occurs once is dropped: as a context it would never recur. Within a context's keys,
# a second scan in the order of time adds up what came before (context_count 0, 1, 2 for a-b 1,
# a-b 3, a-c 5), types and singletons, and sees whether a token follows as the last time (a-b 3
# does, a-c 5 does not). Every count is of the past alone, and an integer: the same on every
# machine.

KEY_BITS = 63  # of a sort key: context group, token, position
LONG_ORDERS = (12, 16, 24)  # of the blend, beside 1 and the range of settings: long repeats
LAST_ORDERS = (2, 3, 5, 8)  # whose last follower the blend weighs, too


def ngram_counts(
    tokens: np.ndarray, vocab_size: int, max_order: int, *more: Any, **how: Any
) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """Yields (order, context_count, target_count, types, singletons), orders 1..max_order, or the
    wanted ones of them.

    Four int32 (N,): at t, how often the context (order - 1 tokens) and context + token t came
    before, its distinct continuations, and those seen once. more, how: count_ngrams'.
    """
    for order, stats in count_ngrams(tokens, vocab_size, max_order, *more, **how):
        yield order, *stats[:, :4].T


def count_ngrams(
    tokens: np.ndarray,
    vocab_size: int,
    max_order: int,
    device: Any = "cpu",
    schedule: tuple[np.ndarray, np.ndarray] | None = None,
    *,
    wanted: Iterable[int] | None = None,
) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (order, statistics) of orders 1..max_order, or the wanted ones of them.

    Statistics int32 (N, 5): ngram_counts' four, and 1 where t is what followed the context when it
    was last seen. tokens (N,): integers below vocab_size, else ValueError; left as they are.
    schedule: lane step and thread, int32 (N,) each, of tokens in the order of coding: those of one
    step do not see each other; a context stays in its thread, from the last BOS on.
    """
    tokens = np.asarray(tokens)
    valid = not len(tokens) or 0 <= tokens.min() <= tokens.max() < vocab_size
    if tokens.dtype.kind not in "iu" or not valid:
        found = f"{tokens.dtype}" + (f" {tokens.min()}..{tokens.max()}" if len(tokens) else "")
        raise ValueError(f"tokens must be integers in 0..{vocab_size - 1}, not {found}")
    nothing = np.zeros(0, np.int32)
    times = nothing if schedule is None else schedule[0]
    following = nothing if schedule is None else next_in_thread(schedule[1])
    text = TokenLinks(tokens.astype(np.int32), times, following)
    every = range(1, max_order + 1)
    orders = every if wanted is None else sorted({*wanted} & {*every})
    if has_package("numba") and torch.device(device).type == "cpu":
        counted = numba_orders(text, vocab_size, orders)
    else:
        counted = torch_orders(text, vocab_size, orders, device)
    yield from zip(orders, counted, strict=False)


class TokenLinks(NamedTuple):
    """Tokens with their lane steps and the places of their lanes' next tokens, int32 (N,) each; the
    last two empty: one text, a token a step."""

    tokens: np.ndarray
    times: np.ndarray
    following: np.ndarray  # -1: none


def next_in_thread(lanes: np.ndarray) -> np.ndarray:
    """Place of the lane's next token, -1 at its end; int32 (N,)."""
    order = np.argsort(lanes, kind="stable")
    following = np.full(len(lanes), -1, np.int32)
    following[order[:-1]] = np.where(np.diff(lanes[order]), -1, order[1:])
    return following


def torch_orders(
    text: TokenLinks, vocab_size: int, wanted: Sequence[int], device: Any
) -> Iterator[np.ndarray]:
    """Statistics of each wanted order by torch's stable sort, cumsum and scatter: on CUDA, or on a
    CPU without numba. May modify text.following."""
    tokens, times, following = (torch.from_numpy(column).to(device) for column in text)
    index = torch.arange(len(tokens), device=device)
    in_lanes = len(times) > 0
    if not in_lanes:
        times = index
        following = (index + 1).masked_fill(index + 1 == len(tokens), -1)
    context = torch.zeros_like(index)  # its number; -1: never seen before
    for order in range(1, max(wanted, default=0) + 1):
        live = index[context >= 0]
        ngrams = SortedGroups(context[live] * vocab_size + tokens[live], live, times)
        if order in wanted:
            contexts = SortedGroups(context[live], live, times)
            yield torch_statistics(ngrams, contexts, tokens, index).cpu().numpy()
        recurs = ~ngrams.new
        recurs[:-1] |= recurs[1:].clone()
        kept = recurs & (following[ngrams.places] >= 0)
        context = torch.full_like(index, -1)
        context[following[ngrams.places[kept]].long()] = ngrams.new.cumsum(0)[kept]
        if in_lanes:
            following[tokens == BOS] = -1  # from order 2 on, a document ends there


def torch_statistics(
    ngrams: "SortedGroups", contexts: "SortedGroups", tokens: Tensor, index: Tensor
) -> Tensor:
    """int32 (N, 5) of an order; index: 0..N - 1."""
    stats = torch.zeros((len(index), 5), dtype=torch.int32, device=index.device)
    stats[ngrams.places, 1] = (ngrams.step - ngrams.first).int()
    rank = torch.zeros_like(index)  # of an n-gram among its equals
    rank[ngrams.places] = index[: len(ngrams.places)] - ngrams.first
    stats[contexts.places, 0] = (contexts.step - contexts.first).int()
    fresh = 1 * (rank[contexts.places] == 0)
    again = 1 * (rank[contexts.places] == 1)
    for column, change in ((2, fresh), (3, fresh - again)):
        before = change.cumsum(0) - change
        stats[contexts.places, column] = (before[contexts.step] - before[contexts.first]).int()
    followers = tokens[contexts.places]
    same = followers == followers[(contexts.step - 1).clamp(min=0)]
    stats[contexts.places, 4] = (same & (contexts.step > contexts.first)).int()
    return stats


class SortedGroups:
    """Places (M,) sorted by key; of each whether its group begins there, and the indices at which
    its group and, in it, its lane step began."""

    def __init__(self, keys: Tensor, places: Tensor, times: Tensor):
        keys, order = keys.sort(stable=True)
        self.places = places[order]
        self.new = torch.ones_like(self.places, dtype=torch.bool)
        self.new[1:] = keys[1:] != keys[:-1]
        new_step = self.new.clone()
        new_step[1:] |= times[self.places[1:]] != times[self.places[:-1]]
        self.first = self.start(self.new)
        self.step = self.start(new_step)

    def start(self, begins: Tensor) -> Tensor:
        """Of each place the last one, up to it, that begins something; the first does."""
        return begins.nonzero()[:, 0][begins.cumsum(0) - 1]


@functools.cache
def jit(function: Callable) -> Callable:
    """Compiled by numba, and with it the functions of this file that it calls by name."""
    used = {name: globals()[name] for name in function.__code__.co_names if name in globals()}
    used = {name: jit(x) if isinstance(x, FunctionType) else x for name, x in used.items()}
    alike = FunctionType(function.__code__, used, function.__name__)
    return package("numba").njit(alike, nogil=True)


def sort_pieces(keys: np.ndarray, cuts: Sequence[int]) -> np.ndarray:
    """A copy, sorted between the cuts."""
    keys = keys.copy()
    for piece in np.split(keys, cuts):
        piece.sort()
    return keys


def numba_orders(text: TokenLinks, vocab_size: int, wanted: Sequence[int]) -> Iterator[np.ndarray]:
    """Statistics of each wanted order: a sort, a scan, a second scan beside the next sort. Modifies
    text.following."""
    size = len(text.tokens)
    cuts: Sequence[int] = [0]
    bits = max(1, (size - 1).bit_length())
    # Where 63 bits do not suffice, group numbers wrap at `capacity`; the keys come in order of
    # group, so the pieces between wraps are sorted one by one.
    layout = bits, vocab_size, max(2, (1 << KEY_BITS - bits) // vocab_size)
    keys = text.tokens.astype(np.int64) << bits
    keys |= np.arange(size)

    packed = sort_pieces(keys, cuts)
    with ThreadPoolExecutor(1) as other_core:
        for order in range(1, max(wanted, default=0) + 1):
            stats = np.zeros((size, 5), np.int32)
            longer, cuts = jit(scan_ngrams)(packed, layout, tuple(text), stats)
            packed = other_core.submit(sort_pieces, longer, cuts)
            if order in wanted:
                jit(scan_contexts)(keys, layout, text.tokens, text.times, stats)
                yield stats
            # From order 2 on a document ends at a BOS.
            text.following[text.tokens[: len(text.following)] == BOS] = -1
            keys = longer
            packed = packed.result()
            del stats, longer


def scan_ngrams(
    packed: np.ndarray, layout: tuple, text: tuple, stats: np.ndarray
) -> tuple[np.ndarray, list[int]]:
    """Compiled by numba. Target counts (column 1), rank among equals (column 2) and the next
    order's keys, with the cuts between which they are to be sorted. packed: sorted keys."""
    bits, vocab_size, capacity = layout
    tokens, times, following = text
    mask = (1 << bits) - 1
    cuts = [0]
    out = np.empty_like(packed)
    size = 0
    group = -1
    base = 0  # group * vocab_size, wrapped
    first = 0  # of the equal n-grams
    same = 0  # of those of this lane step
    fresh = True
    alone = True
    for i in range(packed.size):
        t = packed[i] & mask
        key = packed[i] >> bits
        if i == 0 or key != packed[i - 1] >> bits:
            first = i
            fresh = True
            same = i
            alone = i + 1 == packed.size or key != packed[i + 1] >> bits
        if times.size == 0 or times[t] != times[packed[i - 1] & mask]:
            same = i
        stats[t, 1] = same - first
        stats[t, 2] = i - first
        after = following[t] if following.size else t + 1
        if alone or after < 0 or after == tokens.size:  # as a context it never recurs
            continue
        if fresh:
            group += 1
            base += vocab_size
            fresh = False
            if group % capacity == 0:
                base = 0
                if size:
                    cuts.append(size)
        out[size] = (base + np.int64(tokens[after])) << bits | after
        size += 1
    return out[:size], cuts


def scan_contexts(
    keys: np.ndarray, layout: tuple, tokens: np.ndarray, times: np.ndarray, stats: np.ndarray
) -> None:
    """Compiled by numba. The other columns; keys lie grouped by context and in the order of
    time."""
    bits, vocab_size, _ = layout
    mask = (1 << bits) - 1
    base = -1
    first = 0
    types = 0
    singles = 0
    before = 0  # context, types, singletons and last follower as of the lane step's start
    old_types = 0
    old_singles = 0
    follower = -1
    for i in range(keys.size):
        t = keys[i] & mask
        key = keys[i] >> bits
        new = base < 0 or not base <= key < base + vocab_size
        if new:
            base = key // vocab_size * vocab_size
            first = i
            types = 0
            singles = 0
        if new or times.size == 0 or times[t] != times[keys[i - 1] & mask]:
            before = i - first
            old_types = types
            old_singles = singles
            follower = -1 if new else tokens[keys[i - 1] & mask]
        rank = stats[t, 2]
        stats[t, 0] = before
        stats[t, 2] = old_types
        stats[t, 3] = old_singles
        stats[t, 4] = tokens[t] == follower
        types += rank == 0
        singles += (rank == 0) - (rank == 1)


class CountStore:
    """Counts at the targets, kept where the context was seen; `skip`: tokens before the first."""

    def __init__(self, orders: Sequence[int], skip: int = 1):
        self.orders = orders
        self.skip = skip
        self.columns: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self.matched: Any = 0  # longest order seen before at each target, int8 (N,)

    def collect(self, counts: Iterator) -> "CountStore":
        """From count_ngrams; -> itself."""
        for order, stats in counts:
            stats = stats[self.skip :]
            n = stats[:, 0]
            if order in self.orders:  # others cost memory, where all were counted
                seen = np.flatnonzero(n).astype(np.int32)
                few = stats[seen, 2:]
                if few.max(initial=0) < 2**16:  # half the memory; a context may have 65,536 types
                    few = few.astype(np.uint16)
                self.columns.append((seen, stats[seen, :2], few))
                self.matched = np.where(n > 0, np.int8(order), self.matched)
            del n, stats  # before the next order is counted
        return self

    def read(self, begin: int, end: int) -> np.ndarray:
        """Targets begin..end - 1: statistics int32 (K, targets, 5)."""
        dense = np.zeros((len(self.orders), end - begin, 5), np.int32)
        ends = np.array([begin, end], np.int32)  # of another type, searchsorted would copy `seen`
        for row, (seen, many, few) in zip(dense, self.columns, strict=True):
            part = slice(*np.searchsorted(seen, ends))
            row[seen[part] - begin] = np.concatenate([many[part], few[part]], 1)
        return dense


class Backoff:
    """The published mixture: the counts of the longest context seen NGRAM_MIN_COUNT times, of
    NGRAM_MIN_ORDER to NGRAM_MAX_ORDER, with a weight, alpha, from its order and the model's entropy
    (PR #864)."""

    def __init__(self, orders: Sequence[int], cfg: Config):
        self.orders = orders
        self.last_orders: tuple[int, ...] = ()
        self.cfg = cfg
        self.chunk = 1 << 16  # targets at a time

    def inputs(
        self, stats: np.ndarray, entropy: np.ndarray, _: Any = None, *, boost: Any = 1.0
    ) -> tuple[np.ndarray, np.ndarray]:
        """Matched order, 0: none, and the weight of its counts, (rows,) each. stats: (K, rows, 5)
        of count_ngrams; entropy: (rows,), nats; boost: of the weight."""
        cfg = self.cfg
        orders = np.array(self.orders)[:, None]
        known = stats[..., 0] >= cfg.ngram_min_count
        known &= (cfg.ngram_min_order <= orders) & (orders <= cfg.ngram_max_order)
        order = (orders * known).max(0)
        return order, backoff_alpha(order, entropy, cfg, boost)

    def weights(self, order: np.ndarray, alpha: np.ndarray) -> np.ndarray:
        """Of the model and of each order's counts: float64 (rows, K + 1)."""
        return np.vstack([1 - alpha, alpha * (np.array(self.orders)[:, None] == order)]).T


def confidence(change: np.ndarray) -> np.ndarray:
    """0.5 to 1.5 (N,), from the change by pre-enrichment: PR #810's, over the largest change so far
    instead of a chunk's, which later tokens enter."""
    return 0.5 + change / np.maximum.accumulate(np.maximum(change, 1e-8))


def backoff_alpha(
    order: np.ndarray, entropy: np.ndarray, cfg: Config, boost: Any = 1.0
) -> np.ndarray:
    """Weight (N,) of the counts, from matched order (0: none) and the model's entropy in nats.
    Multipliers and boost act on it: on the probability they would create mass."""
    place = np.maximum(order - 2, 0)
    centre = np.take(cfg.ngram_entropy_center, place, mode="clip")
    centre = centre - cfg.ngram_center_slope * place
    low = cfg.ngram_alpha_min
    span = cfg.ngram_alpha_max - low
    alpha = low + span / (1 + np.exp(-cfg.ngram_entropy_scale * (entropy - centre)))
    if cfg.ngram_alpha:  # PR #1026, entropy in the place of the target's own loss
        alpha = cfg.ngram_alpha * (entropy / cfg.ngram_nll_threshold).clip(0.1, 2.0)
    alpha = alpha * boost * np.take(cfg.ngram_multipliers, place, mode="clip")
    return np.where(order > 0, alpha.clip(0, 0.95), 0.0)


class Blend:
    """The learned mixture: the model, each order's plain c / n and, of LAST_ORDERS, the token
    that followed the context last time; weighed by a gate (one hidden layer) that learns from each
    chunk once it is scored; then gate against model alone, as a Bayesian pair whose odds are their
    likelihoods so far, so that a useless gate costs a bit. The gate sees the counts, how uncertain
    the model is, and how it and the counts fared at the last targets of the lane (outcomes).

    Its schedule. Chunks grow from 32 targets to 4,096, doubling: early the gate learns often, and
    later a chunk costs one pass; in lanes a chunk has at least the targets of one step, which is
    never divided, so that encoder and decoder see the same chunks. `passes` over a chunk fall from
    four to one by 2^19 targets, as there is more and more to learn from; batches are of 256, at
    the last stage 512, each then a captured graph on CUDA: three copies and a launch in the place
    of some thirty.
    """

    HIDDEN = 32
    RATE = 5e-3
    FIRST_CHUNK = 32
    LARGEST_CHUNK = 4096
    LAST_BATCH = 512
    LATEST = 3  # outcomes that the gate sees one by one, beside the mean of REMEMBERED

    def __init__(self, orders: Sequence[int], rt: Runtime):
        self.device = rt.device
        self.orders = orders
        self.last_orders = tuple(order for order in orders if order in LAST_ORDERS)
        rows = [orders.index(order) for order in self.last_orders]
        self.last_rows = torch.tensor(rows, dtype=torch.int64, device=self.device)
        inputs = 5 * len(orders) + 3 + 2 * (self.LATEST + 1)
        experts = 1 + len(orders) + len(self.last_orders)
        first = torch.randn(inputs, self.HIDDEN, generator=torch.Generator().manual_seed(0))
        bias = torch.full((experts,), -1.0)
        bias[0] = 1.0  # the model starts favoured
        hidden_bias = torch.zeros(self.HIDDEN)
        layers = first / inputs**0.5, hidden_bias, torch.zeros(self.HIDDEN, experts), bias
        self.layers = [layer.to(self.device).requires_grad_() for layer in layers]
        how = dict(fused=True, capturable=rt.cuda)
        self.optimizer = torch.optim.Adam(self.layers, self.RATE, **how)
        # Of the gate against the model alone, log; on the device: `learn` waits for nothing.
        self.odds = torch.zeros((), dtype=torch.float64, device=self.device)
        self.chunk = self.FIRST_CHUNK
        self.learned = 0  # targets
        self.train_last_batch = self.capture_training(rt, inputs, experts)

    def capture_training(self, rt: Runtime, inputs: int, experts: int) -> Callable:
        """`train` of a batch of the last stage. rt.graph trains once, which is undone."""
        shapes = (inputs, torch.float32), (experts, torch.bool), (experts, torch.float32)
        batch = [
            torch.ones(self.LAST_BATCH, columns, dtype=dtype, device=self.device)
            for columns, dtype in shapes
        ]
        before = [layer.detach().clone() for layer in self.layers]
        train = rt.graph(self.train, *batch)
        with torch.no_grad():
            torch._foreach_copy_(self.layers, before)
            for state in self.optimizer.state.values():
                torch._foreach_zero_([*state.values()])
        return train

    def inputs(
        self, stats: np.ndarray, entropy: np.ndarray, past: Tensor | np.ndarray
    ) -> tuple[Tensor, Tensor]:
        """Inputs of the gate (rows, 5 K + 11), scaled by constants, not by the stream (C1), and the
        experts' mask (rows, 1 + K + R). stats: (K, rows, 5) of count_ngrams; entropy: (rows,)
        float64, nats; past: outcomes before each row, newest first, (rows, REMEMBERED, 2)."""
        stats = torch.as_tensor(stats, device=self.device)
        past = torch.as_tensor(past, device=self.device)
        h = torch.as_tensor(entropy, device=self.device).float()[None]
        n, _, types, singles, _ = stats.float().unbind(-1)
        known = n > 0
        total = n.clamp(min=1)
        inputs = n.log1p() / 4, types.log1p() / 4, types / total, singles / total, known
        latest = past[:, : self.LATEST].flatten(1).T
        inputs = torch.cat([*inputs, h / 4, h * h / 16, (-h).exp(), latest, past.mean(1).T])
        model = torch.ones_like(h, dtype=torch.bool)
        return inputs.T, torch.cat([model, known, known[self.last_rows]]).T

    def logits(self, inputs: Tensor, known: Tensor) -> Tensor:
        hidden = F.gelu(inputs @ self.layers[0] + self.layers[1])
        return (hidden @ self.layers[2] + self.layers[3]).masked_fill(~known, -torch.inf)

    @torch.no_grad()
    def weights(self, inputs: Tensor, known: Tensor) -> np.ndarray:
        """Of the model, each order's counts and last followers: float64 (rows, 1 + K + R)."""
        share = self.odds.sigmoid()
        weights = share * self.logits(inputs, known).double().softmax(1)
        weights[:, 0] += 1 - share
        return weights.cpu().numpy()

    @torch.enable_grad()
    def learn(self, inputs: Tensor, known: Tensor, p: np.ndarray) -> None:
        """Train on a scored chunk. p: of the targets, by expert_probabilities."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # faster for so small a gate
        p = torch.as_tensor(p, device=self.device)
        with torch.no_grad():
            gate = (self.logits(inputs, known).double().softmax(1) * p).sum(1)
        self.odds += (gate.log() - p[:, 0].log()).sum()
        self.learned += len(p)
        self.chunk = min(2 * self.chunk, self.LARGEST_CHUNK)
        ratio = (p / p.amax(1, keepdim=True)).float()
        passes = min(4, max(1, (1 << 20) // self.learned))
        size = 256 if passes > 1 else self.LAST_BATCH
        batches = [[*zip(*(a.split(size) for a in (inputs, known, ratio)), strict=True)]] * passes
        for batch in itertools.chain(*batches):
            whole = len(batch[0]) == self.LAST_BATCH
            (self.train_last_batch if whole else self.train)(*batch)
        torch.set_num_threads(threads)

    @torch.enable_grad()
    def train(self, inputs: Tensor, known: Tensor, ratio: Tensor) -> None:
        """A step of Adam on a batch. ratio: of p to the best expert's, (rows, 1 + K + R)."""
        p = (self.logits(inputs, known).softmax(1) * ratio).sum(1)
        loss = -p.clamp(1e-30).log().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


def expert_probabilities(
    mixer: Blend | Backoff, stats: np.ndarray, log_prob: np.ndarray
) -> np.ndarray:
    """Of the targets, by model, counts and last followers: float64 (rows, 1 + K + R)."""
    n = stats[..., 0]
    c = stats[..., 1]
    last = [stats[mixer.orders.index(order), :, 4] for order in mixer.last_orders]
    return np.vstack([np.exp(log_prob).clip(1e-300), c / np.maximum(n, 1), *last]).T


REMEMBERED = 16  # of a lane's last targets, how they went


def outcomes(stats: np.ndarray, log_prob: np.ndarray) -> np.ndarray:
    """How targets went, float32 (rows, 2): the model's loss in units of 4 nats, and the probability
    c / n by the longest context that was known, 0 without one."""
    rows = np.arange(len(log_prob))
    p = np.zeros(len(rows))
    if len(stats):
        known = (stats[..., 0] > 0).sum(0)  # where a context is, all shorter ones are
        n, c = stats[np.maximum(known - 1, 0), rows, :2].T
        p = c / np.maximum(n, 1)
    return np.stack([-log_prob / 4, p], 1).astype(np.float32)


class PastOutcomes:
    """Outcomes of a text's targets, filled in as they are scored, and for each target those of the
    REMEMBERED before it in its thread. They lie thread after thread, each behind as many zeros."""

    def __init__(self, threads: np.ndarray, device: torch.device):
        """threads: of the targets, in the order of coding, (N,)."""
        order = np.argsort(threads, kind="stable")
        gaps = REMEMBERED * (threads[order].astype(np.int64) + 1)
        places = np.empty(len(threads), np.int64)
        places[order] = np.arange(len(threads)) + gaps
        self.places = places.astype(np.int32)
        size = len(threads) + int(gaps.max(initial=0))
        self.values = torch.zeros(size, 2, device=device)
        self.before = torch.arange(1, REMEMBERED + 1, device=device)

    def add(self, begin: int, found: np.ndarray) -> Tensor:
        """outcomes of the targets from `begin` on -> before each of them, newest first, (rows,
        REMEMBERED, 2)."""
        places = torch.as_tensor(self.places[begin : begin + len(found)], device=self.before.device)
        self.values[places.long()] = torch.as_tensor(found, device=self.before.device)
        return self.values[places.unsqueeze(1) - self.before]


def weighed_orders(name: str, cfg: Config) -> tuple[int, ...]:
    """Of the n-grams that a mixer, of make_mixer's names, gives weight to."""
    if name == "none":
        return ()
    orders = range(cfg.ngram_min_order, cfg.ngram_max_order + 1)
    return tuple(orders if name == "cascade" else sorted({1, *orders, *LONG_ORDERS}))


def show_orders(orders: Sequence[int]) -> str:
    """Ascending orders as 1-9,12,16,24; "none" for none."""
    spans: list[list[int]] = []
    for order in orders:
        if spans and order == spans[-1][-1] + 1:
            spans[-1] = [spans[-1][0], order]
        else:
            spans.append([order])
    return ",".join("-".join(map(str, span)) for span in spans) or "none"


def make_mixer(name: str, cfg: Config, rt: Runtime) -> Blend | Backoff:
    """name: "blend", "cascade" (the published backoff) or "none"."""
    if name == "cascade":  # on the counts of the blend
        return Backoff(weighed_orders("blend", cfg), cfg)
    return Blend(weighed_orders(name, cfg), rt)


def mix(
    mixer: Blend | Backoff,
    store: CountStore,
    scores: Scores,
    schedule: tuple[np.ndarray, np.ndarray] | None,
    tick: Callable = lambda *_: None,
) -> np.ndarray:
    """Score each target, then learn from it (a Backoff does not learn). -> log-probability (N,),
    nats. schedule: lane steps of the targets, which a chunk does not divide, and threads; None:
    one by one."""
    if isinstance(mixer, Backoff):
        return mix_fixed(mixer, store, scores, tick)
    size = len(scores.log_prob)
    times, threads = schedule or (None, np.zeros(size, np.int32))
    past = PastOutcomes(threads, mixer.device)
    mixed = np.empty(size)
    begin = 0
    while begin < size:
        end = min(begin + mixer.chunk, size)
        if times is not None:
            end = np.searchsorted(times, times[end - 1], "right")
        log_prob = scores.log_prob[begin:end]
        stats = store.read(begin, end)
        before = past.add(begin, outcomes(stats, log_prob))
        inputs = mixer.inputs(stats, scores.entropy[begin:end], before)
        p = expert_probabilities(mixer, stats, log_prob)
        mixed[begin:end] = np.log((mixer.weights(*inputs) * p).sum(1))
        mixer.learn(*inputs, p)
        tick("ngram", end, size)
        begin = end
    return mixed


def mix_fixed(
    mixer: Backoff, store: CountStore, scores: Scores, tick: Callable = lambda *_: None
) -> np.ndarray:
    """By weights that nothing teaches, so by all threads. -> log-probability (N,), nats."""
    size = len(scores.log_prob)
    change = scores.pe_delta
    boost = np.ones(size) if change is None else confidence(change)

    def mix_chunk(begin: int) -> np.ndarray:
        part = slice(begin, min(begin + mixer.chunk, size))
        stats = store.read(part.start, part.stop)
        p = expert_probabilities(mixer, stats, scores.log_prob[part])
        weights = mixer.weights(*mixer.inputs(stats, scores.entropy[part], boost=boost[part]))
        return np.log((weights * p).sum(1))

    mixed = np.empty(size)
    begins = range(0, size, mixer.chunk)
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for begin, part in zip(begins, pool.map(mix_chunk, begins), strict=True):
            mixed[begin : begin + len(part)] = part
            tick("ngram", begin + len(part), size)
    return mixed


def mix_ngrams(
    scores: Scores, coding: CodingOrder, report: "Report", known: KnownText = NOTHING_KNOWN
) -> np.ndarray:
    """By the published backoff, for its line, and by NGRAM_MIXER. -> log p (N,), nats."""
    cfg = report.cfg
    rt = report.rt
    final = scores.log_prob.copy()
    mixers = {name: make_mixer(name, cfg, rt) for name in ("cascade", cfg.mixer)}
    orders = mixers[cfg.mixer].orders
    tokens, schedule = after_known(known, coding)
    store = CountStore(orders, len(tokens) - len(final))
    how = dict(device=rt.device, schedule=schedule, wanted=orders)
    rt.stage("counting n-grams")
    store.collect(count_ngrams(tokens, cfg.vocab_size, max(orders), **how))
    scores = scores.take(coding.targets)
    if schedule:  # of the targets
        schedule = schedule[0][store.skip :], schedule[1][store.skip :]
    for name, mixer in mixers.items():
        mixed = mix(mixer, store, scores, schedule, rt.tick)
        final[coding.targets] = mixed
        if name == "cascade":
            report.score_in_order(
                "ngram_backoff", final, orders=show_orders(weighed_orders(name, cfg))
            )
    log_gains(rt, store.matched, mixed - scores.log_prob)
    return final


def after_known(
    known: KnownText, coding: CodingOrder
) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray] | None]:
    """Tokens to count, those of the known text first, and their schedule: it was there before the
    first step, in a thread of its own; without lanes it is the beginning of the one text."""
    if not len(known):
        return coding.tokens, coding.schedule
    tokens = np.concatenate([known.tokens, coding.tokens])
    if coding.schedule is None:
        return tokens, None
    steps, threads = coding.schedule
    before = np.full(len(known), -1, np.int32)
    aside = np.full(len(known), threads.max(initial=-1) + 1, np.int32)
    return tokens, (np.concatenate([before, steps]), np.concatenate([aside, threads]))


def log_gains(rt: Runtime, matched: np.ndarray, saved: np.ndarray) -> None:
    """What the counts are worth, by the longest context seen before (0: none). matched, saved: of
    each target, (N,), nats."""
    for longest in np.unique(matched).tolist():
        here = matched == longest
        bits = float(saved[here].sum() / np.log(2))
        counts = dict(positions=int(here.sum()), share=float(here.mean()))
        rt.log("ngram_gain", longest, **counts, bits_saved=bits)


# -----------------------------------------------------------------------------
# 12. Codec
# The score as a file: a range coder spends the mixture's bits, a decoder gets the text back.

STREAM_PREFIX = b"PGSTREAM\x01"  # magic, version
PRECISION = 24  # bits of a probability
SCORING = stored_names("stream")  # in a stream's header
LATER_PACE = 1.3  # of the first steps' seconds: counts have grown (1.2 to 1.5 in runs measured)
WITNESSES = 2048  # targets whose mass is taken: at least by the codec, at most of windows


class StreamError(UserError):
    """Damaged, or of another code, artifact or machine."""


# Counts that grow with the text. count_ngrams needs the whole text; a decoder has what it decoded
# so far. For every context it must know how often which token followed, and each new token is
# counted in a context of every order. Most contexts of natural text occur once, so they are kept as
# a suffix tree would: a context that was seen once is a place in the text, kept at the shortest
# order at which it is the only one; what it was followed by, and its longer contexts, are read in
# the text itself. Only a context that is seen again becomes a node, with a list of its followers.
# Of order 3 and the text a b c, a b d, once c and d are counted:
#
#     b    node: followers c 1, d 1        seen twice
#     a b  node: followers c 1, d 1
#     c    the place of a (say): followed once, by it; contexts that end with c need no entry
#
# All contexts lie in one hash table; an entry counts only if all its tokens are those of the text
# at its place, so that a collision of hashes costs time and never a count.

NO_TOKEN = 0xFFFF  # in a lane's text: its context does not reach beyond
LANE_BLOCK = 4096  # tokens of text that a lane takes at a time
CONTEXT_TOKENS = 32  # which begin with so many of the block before: more than any context has
LOW_BITS = 0xFFFFFFFF
LEVEL_BITS = 5  # of a key's 32; the others are of a hash
NODE = np.dtype(
    [
        ("place", np.int32),  # where in the text the context was last seen: of what followed
        ("total", np.int32),
        ("list", np.int32),  # where its followers begin
        ("types", np.uint16),
        ("singles", np.uint16),
    ]
)
NODES, LISTS, ENTRIES, TEXT, FREE = range(5)  # of ContextArrays.used
CACHED_NUMBERS = 1 << 16  # of distributions, half a MB: what a core's cache holds
FEW_TARGETS = 20_000  # are counted in a dictionary before a table's kernels would be compiled


class ContextArrays(NamedTuple):
    """What a ContextTable's kernels work on."""

    table: np.ndarray  # int64, a power of two of them: node, or ~place, << 32 | key; 0: free
    nodes: np.ndarray  # NODE; the first one is of the context without tokens
    lists: np.ndarray  # int64: token << 32 | count, in parts of 1, 2, 4, ... of them
    text: np.ndarray  # uint16, blocks of lanes
    used: np.ndarray  # int64: of nodes, lists, table, text; from FREE on, free lists of each size
    first_order: np.ndarray  # int32 (V,): how often each token was seen
    sizes: np.ndarray  # int64 (K,): tokens of each order's context
    places: np.ndarray  # int64 (lanes,): where their next tokens go


def lengthen(text: np.ndarray, place: int, hashed: int, length: int, size: int) -> tuple[int, int]:
    """The hash of `length` tokens before a place -> of `size` tokens, or as many as there are; how
    many these are. The newest comes first, so that the orders share what is done."""
    while length < size:
        token = text[place - 1 - length]
        if token == NO_TOKEN:
            break
        hashed = (hashed + np.uint64(token) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        hashed ^= hashed >> np.uint64(32)
        length += 1
    return hashed, length


def same_tokens(text: np.ndarray, one: int, other: int, begin: int, end: int) -> bool:
    """Do the places agree in the tokens before them, from the begin'th to the end'th?"""
    for back in range(begin + 1, end + 1):
        if text[one - back] != text[other - back]:
            return False
    return True


def find_context(arrays: ContextArrays, place: int, hashed: int, level: int) -> tuple[int, int]:
    """-> slot of the context before a place, or the free one that it would take; its key. level:
    its size's index; so many tokens precede the place, as lengthen has found."""
    table = arrays.table
    key = np.int64(hashed >> np.uint64(32 + LEVEL_BITS)) << LEVEL_BITS | level
    slot = key * len(table) >> 32
    while table[slot] != 0:
        if table[slot] & LOW_BITS == key:
            other = table[slot] >> 32
            other = np.int64(arrays.nodes[other].place) if other >= 0 else ~other
            if same_tokens(arrays.text, place, other, 0, arrays.sizes[level]):
                break
        slot = slot + 1 & len(table) - 1
    return slot, key


def read_contexts(
    arrays: ContextArrays, lanes: np.ndarray, stats: np.ndarray, found: np.ndarray
) -> None:
    """Statistics of the lanes' contexts, without their targets: stats (K, lanes, 5), zeros; found
    (K, lanes): node, or ~place; nothing where a context is unknown."""
    for i in range(len(lanes)):
        place = arrays.places[lanes[i]]
        hashed = np.uint64(0)
        length = 0
        entry = np.int64(0)
        for k in range(len(arrays.sizes)):
            size = arrays.sizes[k]
            shorter = length
            hashed, length = lengthen(arrays.text, place, hashed, length, size)
            if length < size:
                break
            if entry < 0:  # the shorter one was seen once, so this one was, there, or never
                if not same_tokens(arrays.text, place, ~entry, shorter, size):
                    break
            elif size:
                slot, _ = find_context(arrays, place, hashed, k)
                if arrays.table[slot] == 0:
                    break
                entry = arrays.table[slot] >> 32
            found[k, i] = entry
            if entry < 0:
                stats[k, i, 0] = 1
                stats[k, i, 2] = 1
                stats[k, i, 3] = 1
            else:
                node = arrays.nodes[entry]
                stats[k, i, 0] = node.total
                stats[k, i, 2] = node.types
                stats[k, i, 3] = node.singles


def last_follower(arrays: ContextArrays, entry: int) -> int:
    """What came after a context, when it was last seen."""
    return arrays.text[arrays.nodes[entry].place if entry >= 0 else ~entry]


def add_followers(
    arrays: ContextArrays,
    read: tuple[np.ndarray, np.ndarray, int],
    last_rows: np.ndarray,
    weights: np.ndarray,
    p: np.ndarray,
) -> None:
    """Add to p (rows, V) the weighed shares of all counts and, of the orders with these indices
    (last_rows), of the last followers. read: stats and found of all lanes, and which of them p
    begins with; weights: (lanes, 1 + K + R), the model's first."""
    stats, found, first = read
    levels = len(arrays.sizes)
    for i in range(first, first + len(p)):
        row = p[i - first]
        for k in range(levels):
            if stats[k, i, 0] == 0:
                break
            entry = np.int64(found[k, i])
            weight = weights[i, 1 + k] / stats[k, i, 0]
            if entry < 0:
                row[arrays.text[~entry]] += weight
            elif arrays.sizes[k] == 0:
                for token in range(len(row)):
                    row[token] += weight * arrays.first_order[token]
            else:
                begin = arrays.nodes[entry].list
                for follower in arrays.lists[begin : begin + stats[k, i, 2]]:
                    row[follower >> 32] += weight * (follower & LOW_BITS)
        for r in range(len(last_rows)):
            k = last_rows[r]
            if stats[k, i, 0]:
                row[last_follower(arrays, np.int64(found[k, i]))] += weights[i, 1 + levels + r]


def count_targets(
    arrays: ContextArrays, stats: np.ndarray, found: np.ndarray, tokens: np.ndarray
) -> None:
    """The rest of stats: how often each lane's token had followed, and whether it did last."""
    for i in range(len(tokens)):
        for k in range(len(arrays.sizes)):
            if stats[k, i, 0] == 0:
                break
            entry = np.int64(found[k, i])
            stats[k, i, 4] = last_follower(arrays, entry) == tokens[i]
            if entry < 0:
                stats[k, i, 1] = stats[k, i, 4]
            elif arrays.sizes[k] == 0:
                stats[k, i, 1] = arrays.first_order[tokens[i]]
            else:
                begin = arrays.nodes[entry].list
                for follower in arrays.lists[begin : begin + stats[k, i, 2]]:
                    if follower >> 32 == tokens[i]:
                        stats[k, i, 1] = follower & LOW_BITS
                        break


def take_list(arrays: ContextArrays, size: int) -> int:
    """-> a part of `lists` for 2^size followers."""
    used = arrays.used
    begin = used[FREE + size]
    if begin:
        used[FREE + size] = arrays.lists[begin]  # the next free one
    else:
        begin = used[LISTS]
        used[LISTS] += 1 << size
    return begin


def count_follower(arrays: ContextArrays, entry: int, token: int) -> None:
    """A token follows a node's context once more."""
    lists = arrays.lists
    node = arrays.nodes[entry]
    begin = np.int64(node.list)
    types = np.int64(node.types)
    end = begin + types
    at = begin
    while at < end and lists[at] >> 32 != token:
        at += 1
    if at == end:
        if types & types - 1 == 0:  # full: one twice as large, and this one is free
            size = 0
            while 1 << size < types:
                size += 1
            larger = take_list(arrays, size + (types > 0))
            for i in range(types):
                lists[larger + i] = lists[begin + i]
            if types:
                lists[begin] = arrays.used[FREE + size]
                arrays.used[FREE + size] = begin
            node.list = larger
            begin = larger
            at = larger + types
        lists[at] = np.int64(token) << 32
        node.types += 1
    lists[at] += 1
    count = lists[at] & LOW_BITS
    node.total += 1
    node.singles += (count == 1) - (count == 2)
    if at > begin and count > lists[at - 1] & LOW_BITS:  # what is frequent is found early
        other = lists[at - 1]
        lists[at - 1] = lists[at]
        lists[at] = other


def count_first_order(arrays: ContextArrays, token: int) -> None:
    """A token follows the context without tokens."""
    arrays.first_order[token] += 1
    count = arrays.first_order[token]
    node = arrays.nodes[0]
    node.total += 1
    node.types += count == 1
    node.singles += (count == 1) - (count == 2)


def make_node(arrays: ContextArrays, slot: int, key: int, hashed: int, level: int) -> int:
    """The context of a slot, seen once so far, is seen again -> its node. The place where it was
    seen is from now on an entry of the next order, if it has a context that long."""
    place = ~(arrays.table[slot] >> 32)
    entry = arrays.used[NODES]
    arrays.used[NODES] += 1
    arrays.table[slot] = entry << 32 | key
    arrays.nodes[entry].place = place
    count_follower(arrays, entry, arrays.text[place])
    if level + 1 < len(arrays.sizes):
        size = arrays.sizes[level + 1]
        hashed, length = lengthen(arrays.text, place, hashed, arrays.sizes[level], size)
        if length == size:
            slot, key = find_context(arrays, place, hashed, level + 1)
            arrays.table[slot] = ~place << 32 | key
            arrays.used[ENTRIES] += 1
    return entry


def lacks_room(arrays: ContextArrays) -> bool:
    """For a token in the worst case: a node and a full list of every order, a block of text."""
    used = arrays.used
    levels = len(arrays.sizes)
    return (
        used[NODES] + levels > len(arrays.nodes)
        or used[LISTS] + 2 * levels * len(arrays.first_order) > len(arrays.lists)
        or 4 * (used[ENTRIES] + levels + 1) > 3 * len(arrays.table)
        or used[TEXT] + LANE_BLOCK > len(arrays.text)
    )


def insert_tokens(
    arrays: ContextArrays, lanes: np.ndarray, tokens: np.ndarray, begin: int, isolated: bool
) -> int:
    """The next tokens of the lanes, from the begin'th of them on -> how many are done: fewer than
    all where the arrays must grow first. isolated: a context begins at a BOS."""
    text = arrays.text
    for i in range(begin, len(lanes)):
        if lacks_room(arrays):
            return i
        token = tokens[i]
        place = arrays.places[lanes[i]]
        text[place] = token  # first: a later lane may make a node of this place
        hashed = np.uint64(0)
        length = 0
        for k in range(len(arrays.sizes)):
            size = arrays.sizes[k]
            hashed, length = lengthen(text, place, hashed, length, size)
            if length < size:
                break
            entry = np.int64(0)
            if size:
                slot, key = find_context(arrays, place, hashed, k)
                if arrays.table[slot] == 0:  # never seen; nor are the longer ones
                    arrays.table[slot] = ~place << 32 | key
                    arrays.used[ENTRIES] += 1
                    break
                entry = arrays.table[slot] >> 32
                if entry < 0:
                    entry = make_node(arrays, slot, key, hashed, k)
                count_follower(arrays, entry, token)
            else:
                count_first_order(arrays, token)
            arrays.nodes[entry].place = place
        place += 1
        if token == BOS and isolated:
            text[place] = NO_TOKEN
            text[place + 1] = BOS
            place += 2
        # A step takes up to four places: a token, its end and BOS, and another end (forget). The
        # next block begins with this one's end.
        if place % LANE_BLOCK >= LANE_BLOCK - 4:
            block = arrays.used[TEXT]
            arrays.used[TEXT] += LANE_BLOCK
            text[block : block + CONTEXT_TOKENS] = text[place - CONTEXT_TOKENS : place]
            place = block + CONTEXT_TOKENS
        arrays.places[lanes[i]] = place
    return len(lanes)


def doubled(table: np.ndarray) -> np.ndarray:
    """With the same entries; a slot is the key's leading bits."""
    larger = np.zeros(2 * len(table), np.int64)
    for word in table:
        if word != 0:
            slot = (word & LOW_BITS) * len(larger) >> 32
            while larger[slot] != 0:
                slot = slot + 1 & len(larger) - 1
            larger[slot] = word
    return larger


class ContextTable:
    """What follows each context: count_ngrams of a text that is not there yet. About 60 bytes and
    some microseconds a token. Compiled by numba; for vocabularies of at most NO_TOKEN tokens."""

    SLOTS = 1 << 16  # at first
    TOKEN_BYTES = 60  # that a token of natural text takes, about

    def __init__(self, mixer: "Blend | Backoff", vocab_size: int, lanes: int, isolated: bool):
        """isolated: a context begins at a BOS."""
        orders = mixer.orders
        self.last_rows = np.array([orders.index(order) for order in mixer.last_orders], np.int64)
        self.isolated = isolated
        places = LANE_BLOCK * np.arange(lanes) + CONTEXT_TOKENS + 1
        text = np.zeros((lanes + 1) * LANE_BLOCK, np.uint16)
        text[places - 1] = NO_TOKEN
        used = np.zeros(FREE + 17, np.int64)
        used[[NODES, LISTS, TEXT]] = 1, 1, lanes * LANE_BLOCK  # no node or list is 0
        self.arrays = ContextArrays(
            table=np.zeros(self.SLOTS, np.int64),
            nodes=np.zeros(self.SLOTS // 4, NODE),
            lists=np.zeros(self.SLOTS // 4, np.int64),
            text=text,
            used=used,
            first_order=np.zeros(vocab_size, np.int32),
            sizes=np.array(orders, np.int64) - 1,
            places=places,
        )

    def read(self, lanes: np.ndarray) -> np.ndarray:
        """Of the lanes' next tokens: statistics int32 (K, lanes, 5), without those of targets."""
        self.stats = np.zeros((len(self.arrays.sizes), len(lanes), 5), np.int32)
        self.found = np.zeros(self.stats.shape[:2], np.int32)
        jit(read_contexts)(self.arrays, lanes, self.stats, self.found)
        return self.stats

    def add(self, weights: np.ndarray, p: np.ndarray, first: int = 0) -> None:
        """To p, the distributions of the lanes from the `first` on: the weighed counts of their
        contexts. weights: of all lanes."""
        read = self.stats, self.found, first
        jit(add_followers)(self.arrays, read, self.last_rows, weights, p)

    def count(self, lanes: np.ndarray, tokens: np.ndarray) -> None:
        """The tokens that came, int64: into the statistics that were read, then counted."""
        jit(count_targets)(self.arrays, self.stats, self.found, tokens)
        self.insert(lanes, tokens)

    def insert(self, lanes: np.ndarray, tokens: np.ndarray) -> None:
        """Count tokens that are no targets."""
        done = 0
        while done < len(lanes):
            self.grow()
            done = jit(insert_tokens)(self.arrays, lanes, tokens, done, self.isolated)

    def forget(self, lanes: np.ndarray) -> None:
        """No context of these lanes reaches back beyond here."""
        self.arrays.text[self.arrays.places[lanes]] = NO_TOKEN
        self.arrays.places[lanes] += 1

    def grow(self) -> None:
        """Room for a token at least: the table twice as large, by a copy; the others by a quarter,
        in their place."""
        arrays = self.arrays
        levels = len(arrays.sizes)
        for array, used, more in (
            (arrays.nodes, NODES, levels),
            (arrays.lists, LISTS, 2 * levels * len(arrays.first_order)),
            (arrays.text, TEXT, LANE_BLOCK),
        ):
            if (needed := int(arrays.used[used]) + more) > len(array):
                array.resize(needed + len(array) // 4, refcheck=False)
        if 4 * (arrays.used[ENTRIES] + levels + 1) > 3 * len(arrays.table):
            self.arrays = arrays._replace(table=jit(doubled)(arrays.table))


class ContextDictionary:
    """The same in Python's own terms, {context: {token: count}}: for short texts, and without
    numba. Its distributions are those of a ContextTable to the bit."""

    TOKEN_BYTES = 3000

    def __init__(self, mixer: "Blend | Backoff", vocab_size: int, lanes: int, isolated: bool):
        """isolated: a context begins at a BOS."""
        self.sizes = [2 * order - 2 for order in mixer.orders]  # of their contexts, in bytes
        self.last_rows = [mixer.orders.index(order) for order in mixer.last_orders]
        self.isolated = isolated
        self.followers: dict[bytes, dict[int, int]] = {}
        self.last: dict[bytes, int] = {}
        self.past = [b""] * lanes

    def contexts(self, lane: int) -> list[bytes]:
        """By order, those within the lane's text."""
        past = self.past[lane]
        return [past[len(past) - size :] for size in self.sizes if size <= len(past)]

    def read(self, lanes: np.ndarray) -> np.ndarray:
        """As a ContextTable's."""
        self.stats = np.zeros((len(self.sizes), len(lanes), 5), np.int32)
        self.found = []  # row, order's index, followers, their counts, the last one
        for i, lane in enumerate(lanes):
            for k, context in enumerate(self.contexts(lane)):
                if after := self.followers.get(context):
                    tokens = np.fromiter(after, np.int64, len(after))
                    counts = np.fromiter(after.values(), np.int32, len(after))
                    self.stats[k, i] = counts.sum(), 0, len(counts), (counts == 1).sum(), 0
                    self.found.append((i, k, tokens, counts, self.last[context]))
        return self.stats

    def add(self, weights: np.ndarray, p: np.ndarray, first: int = 0) -> None:
        found = [row for row in self.found if first <= row[0] < first + len(p)]
        for i, k, tokens, counts, _ in found:
            p[i - first, tokens] += weights[i, 1 + k] / self.stats[k, i, 0] * counts
        for r, k in enumerate(self.last_rows, 1 + len(self.sizes)):
            for i, here, *_, last in found:
                if here == k:
                    p[i - first, last] += weights[i, r]

    def count(self, lanes: np.ndarray, tokens: np.ndarray) -> None:
        for i, k, after, counts, last in self.found:
            self.stats[k, i, 1] = counts[after == tokens[i]].sum()
            self.stats[k, i, 4] = last == tokens[i]
        self.insert(lanes, tokens)

    def insert(self, lanes: np.ndarray, tokens: np.ndarray) -> None:
        for lane, token in zip(lanes.tolist(), tokens.tolist(), strict=True):
            for context in self.contexts(lane):
                after = self.followers.setdefault(context, {})
                after[token] = after.get(token, 0) + 1
                self.last[context] = token
            past = b"" if token == BOS and self.isolated else self.past[lane]
            self.past[lane] = (past + token.to_bytes(2, "little"))[-2 * CONTEXT_TOKENS :]

    def forget(self, lanes: np.ndarray) -> None:
        for lane in lanes:
            self.past[lane] = b""


def context_counts(targets: int, vocab_size: int) -> type[ContextTable] | type[ContextDictionary]:
    """What counts the contexts of a text of so many targets."""
    compiled = targets >= FEW_TARGETS and vocab_size <= NO_TOKEN and has_package("numba")
    return ContextTable if compiled else ContextDictionary


def begin_counts(
    known: KnownText, kind: type[ContextTable] | type[ContextDictionary], *of: Any
) -> ContextTable | ContextDictionary:
    """Of a known text, and of nothing else yet. of: what a `kind` is made from. Isolated, the text
    has a lane of its own, the last; else lane 0 goes on with it."""
    mixer, vocab_size, lanes, isolated = of

    def count() -> ContextTable | ContextDictionary:
        counts = kind(mixer, vocab_size, lanes + isolated, isolated)
        for part in np.array_split(known.tokens.astype(np.int64), -(-len(known) // KNOWN_PART)):
            counts.insert(np.full(len(part), lanes * isolated), part)
        return counts

    return known.counts((kind, mixer.orders, mixer.last_orders, *of[1:]), count)


KNOWN_PART = 2**16  # tokens, between which a signal is heard


def announce_known(known: KnownText, rt: Runtime, cfg: Config) -> None:
    """Say that an artifact holds a known text; LackOfMemory where its counts do not fit, twice, as
    one is a copy."""
    if not len(known):
        return
    rt.log("known_text", len(known))
    rt.log("note", "the artifact holds this training text as it is; KNOWN_TOKENS=0: none")
    if cfg.mixer != "none":
        kind = context_counts(len(known), cfg.vocab_size)
        without = " without package numba" * (kind is ContextDictionary)
        what = f"counts of the artifact's {len(known):,} known tokens (KNOWN_TOKENS){without}"
        require_memory(2 * kind.TOKEN_BYTES * len(known), what)


def cached_rows(count: int, vocab_size: int) -> Iterator[slice]:
    """Of so many distributions those that are best worked on together."""
    most = max(1, CACHED_NUMBERS // vocab_size)
    for begin in range(0, count, most):
        yield slice(begin, min(begin + most, count))


class Mixture:
    """The distribution whose code length is the score, for every token, step by step."""

    def __init__(
        self,
        rt: Runtime,
        cfg: Config,
        begun: int,
        targets: int,
        *,
        isolated: bool = True,
        known: KnownText = NOTHING_KNOWN,
    ):
        """begun: lanes that start with a BOS; targets: about how many will come. isolated: no
        context reaches back beyond a BOS; False: of sliding windows."""
        self.mixer = make_mixer(cfg.mixer, cfg, rt)
        self.pending: list[tuple[np.ndarray, ...]] = []
        self.waiting = 0  # targets in `pending`
        self.mass_error = 0.0
        table = context_counts(targets + len(known), cfg.vocab_size)
        of = self.mixer, cfg.vocab_size, begun, isolated
        self.counts = begin_counts(known, table, *of) if known else table(*of)
        self.counts.insert(np.arange(begun), np.full(begun, BOS))
        self.past = np.zeros((begun, REMEMBERED, 2), np.float32)  # newest first, see outcomes
        self.p = np.empty((begun, cfg.vocab_size))

    def distributions(self, outputs: Sequence[Tensor], lanes: np.ndarray) -> np.ndarray:
        """predict's outputs of all lanes, (rows, V) and (rows,) -> p of these lanes, float64
        (lanes, V), in an array that the next call uses again."""
        self.lanes = lanes
        self.log_probs, self.entropy = (column.cpu().numpy() for column in outputs)
        if len(lanes) < len(self.log_probs):
            self.log_probs = self.log_probs[lanes]
            self.entropy = self.entropy[lanes]
        stats = self.counts.read(lanes)
        self.inputs = self.mixer.inputs(stats, self.entropy, self.past[lanes])
        weights = self.mixer.weights(*self.inputs)
        for rows in cached_rows(len(lanes), self.p.shape[1]):
            p = np.exp(self.log_probs[rows], out=self.p[rows])
            p *= weights[rows, :1]
            self.counts.add(weights, p, rows.start)
            self.mass_error = max(self.mass_error, float(np.abs(p.sum(1) - 1).max()))
        return self.p[: len(lanes)]

    def forget(self, lanes: np.ndarray) -> None:
        """What came before in these lanes: they go on elsewhere."""
        self.counts.forget(lanes)
        self.past[lanes] = 0

    def learn(self, tokens: np.ndarray) -> None:
        """Count the tokens of the step; when the mixer's chunk is full, train on it."""
        self.counts.count(self.lanes, tokens)
        if isinstance(self.mixer, Backoff):
            return
        log_prob = self.log_probs[np.arange(len(tokens)), tokens]
        stats = self.counts.stats
        self.past[self.lanes, 1:] = self.past[self.lanes, :-1]
        self.past[self.lanes, 0] = outcomes(stats, log_prob)
        p = expert_probabilities(self.mixer, stats, log_prob)
        self.pending.append((*self.inputs, p))
        self.waiting += len(tokens)
        if self.waiting >= self.mixer.chunk:
            inputs, known, p = zip(*self.pending, strict=True)
            self.mixer.learn(torch.cat(inputs), torch.cat(known), np.concatenate(p))
            self.pending = []
            self.waiting = 0


def window_mass(model: GPT, rt: Runtime, cfg: Config, stream: np.ndarray) -> float:
    """Largest error of the mixture's mass among the first targets that windows score; documents are
    added up by the codec. stream: N + 1 tokens."""
    scorer = WindowScorer(model, rt, cfg)
    mixture = Mixture(rt, cfg, 1, WITNESSES, isolated=False, known=model.known)
    ends = np.arange(1, scorer.batch + 1) * cfg.eval_stride
    ids, scored, _ = scorer.windows(stream, ends, cfg.eval_stride)
    outputs = scorer.predict(scorer.rows(ids), scored)
    columns = [column.flatten(0, 1)[:WITNESSES].split(1) for column in outputs]
    for row, token in zip(zip(*columns, strict=True), stream[1:, None], strict=False):
        mixture.distributions(row, np.array([0]))
        mixture.learn(token)
    return mixture.mass_error


def coder_integers(p: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """p, float64 (lanes, V) -> integers, their sum 2^24 - V: constriction's coder adds 1 to each,
    so that every token can be coded. StreamError for what is no distribution. out: where to."""
    free = (1 << PRECISION) - p.shape[1]
    integers = np.multiply(p, free, out=out)
    np.floor(integers, out=integers)
    rest = free - integers.sum(1)
    if not ((np.abs(rest) <= p.shape[1]) & (p.min(1) >= 0)).all():
        mass = p.sum(1)[np.abs(rest).argmax()]
        raise StreamError(
            f"not a distribution: its mass is {mass}; fix: an artifact of finite weights"
        )
    integers[np.arange(len(p)), p.argmax(1)] += rest
    return integers


def coder_slack(targets: int, cfg: Config) -> float:
    """Bytes that a stream of so many targets may be off its probabilities' code length: the coder
    rounds by 2 V / 2^24 bits a target and ends in whole words."""
    return 16 + targets * 2 * cfg.vocab_size / 2**PRECISION / 8


class Coded(NamedTuple):
    """What came out of an encoder or decoder."""

    text: np.ndarray  # uint16, a BOS before each document
    targets: int  # coded
    mass_error: float  # largest of any distribution
    nats: float  # what they cost: -log p of each, summed up
    model_nats: float  # the same by the network alone


# (integers of some of the lanes at work (rows, V), who they are) -> their tokens (rows,)
TokenPicker = Callable[[np.ndarray, LaneStep], np.ndarray]


def run_codec(
    model: GPT,
    rt: Runtime,
    cfg: Config,
    plan: CodingPlan,
    pick_tokens: TokenPicker,
    *,
    most_bits: float = math.inf,
    expected: int = 0,
    after_step: Callable = lambda: None,
) -> Coded:
    """Encoder and decoder: they differ in where the tokens come from. StreamError where these take
    more bits than there are. expected: targets of the whole, where the plan is of a part;
    after_step: called after each step of lanes."""
    require_lanes(model, rt, plan.lanes, plan.window)  # before what a forged plan would allocate
    begun = min(plan.lanes, plan.pieces)
    mixture = Mixture(rt, cfg, begun, expected or plan.targets, known=model.known)
    before = np.full(begun, -1)  # the piece that each lane has read from last
    buffer = np.empty((max(1, CACHED_NUMBERS // cfg.vocab_size), cfg.vocab_size))
    # Of each coded token its piece, uint32, and itself, uint16: an array a step would be mostly
    # overhead where lanes are few.
    pieces = bytearray()
    text = bytearray()
    spent = 0.0
    nats = np.zeros(2)

    def choose_tokens(outputs: list[Tensor], step: LaneStep) -> np.ndarray:
        nonlocal spent
        if plan.cuts:
            mixture.forget(step.lanes[(step.places == 0) & plan.goes_on(before[step.lanes])])
            before[step.lanes] = step.pieces
        p = mixture.distributions(outputs, step.lanes)
        tokens = np.empty(len(p), np.int64)
        chosen = np.empty(len(p))
        for rows in cached_rows(*p.shape):
            integers = coder_integers(p[rows], buffer[: rows.stop - rows.start])
            part = LaneStep(step.lanes[rows], step.pieces[rows], step.places[rows])
            tokens[rows] = pick_tokens(integers, part)
            chosen[rows] = integers[range(len(integers)), tokens[rows]]
        mixture.learn(tokens)
        pieces.extend(step.pieces.astype(np.uint32).tobytes())
        text.extend(tokens.astype(np.uint16).tobytes())
        places = range(len(tokens)), tokens
        spent -= np.log2((chosen + 1) / (1 << PRECISION)).sum()
        nats[:] -= np.log(p[places]).sum(), mixture.log_probs[places].sum()
        if spent > most_bits:
            raise StreamError("words of another text")
        after_step()
        return tokens

    coded = run_lanes(model, rt, plan, choose_tokens, cfg)
    tokens = joined_text(plan, np.frombuffer(pieces, np.uint32), np.frombuffer(text, np.uint16))
    return Coded(tokens, coded, mixture.mass_error, *nats.tolist())


def joined_text(plan: CodingPlan, pieces: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """The text, uint16, of tokens (N,) in the order in which lanes coded them, and the numbers of
    their pieces: a BOS before each document, in the place of that which was coded at the end of the
    one before; the text's own last one stays. Of a part of the text: what was coded of each piece,
    joined."""
    if not len(tokens):
        return np.array([BOS], np.uint16)
    order = np.argsort(pieces, kind="stable")
    pieces = pieces[order].astype(np.int64)
    tokens = tokens[order]
    firsts = np.flatnonzero(np.diff(pieces, prepend=-1))
    firsts = firsts[~plan.goes_on(pieces[firsts] - 1)]  # of documents
    kept = (tokens != BOS) | (pieces == plan.pieces - 1)
    return np.insert(tokens, firsts, BOS)[np.insert(kept, firsts, True)]


def range_coder() -> tuple[Any, Any]:
    """constriction's queue and the family of distributions that both sides use."""
    coders = package("constriction").stream
    return coders.queue, coders.model.Categorical(perfect=False)


def encode(
    model: GPT, rt: Runtime, cfg: Config, stream: np.ndarray, plan: CodingPlan, **how: Any
) -> tuple[bytes, Coded]:
    """-> the plan's side_bytes and words of the range coder, little-endian uint32, and what was
    coded. how: run_codec's."""
    queue, family = range_coder()
    coder = queue.RangeEncoder()
    read = tokens_of_text(stream, plan)

    def pick_tokens(integers: np.ndarray, step: LaneStep) -> np.ndarray:
        tokens = read(None, step)
        coder.encode(tokens.astype(np.int32), family, integers)
        return tokens

    coded = run_codec(model, rt, cfg, plan, pick_tokens, **how)
    return plan.side_bytes() + coder.get_compressed().astype("<u4").tobytes(), coded


def decode(model: GPT, rt: Runtime, cfg: Config, body: bytes, plan: CodingPlan) -> Coded:
    """The text of encode's bytes; StreamError for those of another one."""
    queue, family = range_coder()
    try:
        words = body[len(plan.side_bytes()) :]
        numbers = np.frombuffer(words, "<u4").astype(np.uint32)
    except ValueError as error:
        raise StreamError(f"no words of a range coder: {error}") from error
    coder = queue.RangeDecoder(numbers)

    def pick_tokens(integers: np.ndarray, _: LaneStep) -> np.ndarray:
        try:
            tokens = coder.decode(family, integers)
        except Exception as error:  # constriction's own, for words that fit no distribution
            raise StreamError(f"words of another text: {error}") from error
        return tokens.astype(np.int64)

    return run_codec(model, rt, cfg, plan, pick_tokens, most_bits=32 * len(numbers) + 64)


def fingerprint(rt: Runtime, code: bytes, artifact: bytes) -> dict[str, Any]:
    """Whatever a bit of a probability can depend on: versions, device, threads, code, artifact."""
    kind = torch.cuda.get_device_name() if rt.cuda else torch.backends.cpu.get_cpu_capability()
    versions = ("torch", "numpy", "constriction")
    found: dict[str, Any] = {name: importlib.metadata.version(name) for name in versions}
    found["device"] = f"{rt.device.type} {kind}"
    found["threads"] = torch.get_num_threads()
    found["code"] = sha256(code)
    found["artifact"] = sha256(artifact)
    return found


class StreamHeader(NamedTuple):
    """What a decoder needs beside the artifact and this file."""

    plan: CodingPlan
    made: dict[str, Any]  # fingerprint of the encoder
    text: str  # sha256 of the decoded tokens
    scoring: dict[str, Any]  # settings by field name

    def pack(self) -> dict[str, Any]:
        scoring = {name: show(value) for name, value in self.scoring.items()}
        *shape, ahead, length, cuts = self.plan
        facts = dict(shape=shape, made=self.made, text=self.text, scoring=scoring)
        facts |= dict(ahead=len(ahead)) if ahead else {}
        return facts | (dict(cuts=[length, len(cuts)]) if cuts else {})

    @staticmethod
    def parse(header: Any, body: bytes) -> "StreamHeader":
        """ValueError, KeyError, TypeError or AttributeError for what no encoder writes."""
        *shape, window = header["shape"]
        length, cut = header.get("cuts", (0, 0))
        plan = CodingPlan(*shape, window=window, length=length)
        made = header["made"]
        numbers = *shape, window, length, cut
        if not all(type(n) is int and 0 <= n < 2**53 for n in numbers) or plan.lanes < 1:
            raise ValueError(f"a plan of {plan}")
        if made["device"].split()[:1] not in (["cpu"], ["cuda"]):
            raise ValueError(f"a device of {made['device']!r}")
        if type(made["threads"]) is not int or not 1 <= made["threads"] <= 999:
            raise ValueError(f"{made['threads']!r} threads")
        if not 0 < plan.groups <= plan.lanes or plan.lanes % plan.groups:
            raise ValueError(f"{plan.groups} groups of {plan.lanes} lanes")
        count = header.get("ahead", 0)
        if type(count) is not int or not 0 <= count <= plan.pieces or cut > plan.pieces:
            raise ValueError(f"{count!r} pieces ahead, {cut} documents cut")
        plan = read_side_bytes(plan, count, cut, body)
        return StreamHeader(plan, made, header["text"], stored_values(header["scoring"], SCORING))


def read_stream(path: Path) -> tuple[StreamHeader, bytes]:
    """-> header, what `encode` gave; StreamError."""
    try:
        header, words = unseal(STREAM_PREFIX, read_regular(path, MOST_STREAM_BYTES))
        parsed = StreamHeader.parse(header, words)
        # each lane codes a token at least: a forged number must not ask for the memory
        if parsed.plan.lanes > 1024 + 8 * len(words):
            raise ValueError("more lanes than its words could fill")
        return parsed, words
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise StreamError(f"{path}: unreadable ({error}); fix: get it again") from error


def decode_folder(cfg: Config) -> None:
    """DECODE: artifact.bin and stream.bin of a folder -> decoded.npy there, uint16 tokens, and what
    they cost in nats. Refused (StreamError) where code, artifact, libraries or machine are not
    those of the encoder."""
    range_coder()  # a missing package is missed now
    path = Path(cfg.decode, "stream.bin")
    artifact = Path(cfg.decode, "artifact.bin")
    header, words = read_stream(path)
    rt = Runtime(replace(cfg, device=header.made["device"].split()[0]))
    rt.start()
    torch.set_num_threads(header.made["threads"])
    try:
        packed = read_regular(artifact, MOST_ARTIFACT_BYTES)
    except OSError as error:
        raise StreamError(f"{path}: unreadable ({error}); fix: get it again") from error
    made_here = fingerprint(rt, SCRIPT, packed)
    for name, here in made_here.items():
        there = header.made.get(name)
        if there != here:
            raise StreamError(f"{path}: made with {name} {there}, not {here}; fix: use that")
    model = load_artifact(artifact, rt.device, packed)
    stored = {name: getattr(model.cfg, name) for name in MODEL_FIELDS}
    try:
        cfg = replace(cfg, **header.scoring, **stored).check()
    except ConfigError as error:
        raise StreamError(f"{path}: its settings: {error}; fix: get it again") from error
    if header.plan.window != cfg.window:
        window = f"a window of {header.plan.window}, not {cfg.window}"
        raise StreamError(f"{path}: {window}; fix: get it again")
    try:
        with rt.bar.heartbeat.beating():
            decoded = decode(model, rt, cfg, words, header.plan)
    except StreamError as error:
        raise StreamError(f"{path}: {error}; fix: get it again") from error
    if sha256(decoded.text) != header.text:
        raise StreamError(f"{path}: decodes to another text than was coded; fix: use its machine")
    output = Path(cfg.decode, "decoded.npy")
    write_atomically(output, lambda partial: np.save(partial, decoded.text))
    sums = dict(
        nats=repr(decoded.nats + header.plan.side_nats()), model_nats=repr(decoded.model_nats)
    )
    rt.log("decoded", decoded.targets, mass_error=f"{decoded.mass_error:.1e}", **sums)


def prove(report: "Report", log_prob: np.ndarray) -> tuple[Coded, dict[str, Any]]:
    """Write stream.bin, let a fresh process decode it. log_prob: the claim, in coding order, nats.
    -> what was coded, values of the codec's line ({} where CODEC_TOKENS is 0)."""
    cfg = report.cfg
    rt = report.rt if cfg.codec_device == "same" else Runtime(replace(cfg, device="cpu"))
    stream = report.text.stream
    folder = report.rt.folder.resolve()
    artifact = folder / "artifact.bin"
    plan = CodingPlan.of(stream, cfg, rt.world_size)
    model = load_artifact(artifact, rt.device)
    if not cfg.codec_tokens:
        read = tokens_of_text(stream, plan)
        plan = plan._replace(targets=min(WITNESSES, plan.targets))
        return run_codec(model, rt, cfg, plan, lambda _, step: read(None, step)), {}
    plan = plan_proof(model, rt, cfg, stream, plan)
    body, coded = encode(model, rt, cfg, stream, plan)
    scoring = {name: getattr(cfg, name) for name in SCORING}
    code = (folder / "train_gpt.py").read_bytes()
    made = fingerprint(rt, code, artifact.read_bytes())
    header = StreamHeader(plan, made, sha256(coded.text), scoring)
    sealed = seal(STREAM_PREFIX, header.pack(), body)
    write_atomically(folder / "stream.bin", sealed)
    del model
    rt.release_memory()  # the decoder needs as much
    rt.stage("")  # the decoder tells how far it is
    right = decoded_again(folder, coded.text)
    side = len(plan.side_bytes())
    claimed = -log_prob[: coded.targets].sum() / math.log(256) + side
    # Nobody changed the files meanwhile, and the score is that of these; a GPU and a CPU differ by
    # less than a thousandth.
    slack = coder_slack(coded.targets, cfg) + claimed / 1000 * (rt is not report.rt)
    right &= (folder / "stream.bin").read_bytes() == sealed
    right &= sha256(artifact.read_bytes()) == made["artifact"]
    right &= abs(len(body) - claimed) <= slack
    if cfg.codec_device != "same":  # the decoder's arithmetic is what can be checked
        claimed = coded.nats / math.log(256) + side
    return coded, dict(
        coded_bytes=len(body),
        claimed_bytes=math.ceil(claimed),
        proved_tokens=coded.targets,
        total_tokens=len(log_prob),
        decoded="ok" if right else "FAILED",
    )


def plan_proof(
    model: GPT, rt: Runtime, cfg: Config, stream: np.ndarray, plan: CodingPlan
) -> CodingPlan:
    """The plan of what will be coded and decoded: all targets, or CODEC_TOKENS where all would take
    CODEC_MINUTES or more. What it will take is said, and how to prove them all."""
    pace = 2 * LATER_PACE * coding_pace(model, rt, cfg, stream, plan)  # encoder, then decoder
    least = min(max(cfg.codec_tokens, WITNESSES), plan.targets)
    whole_seconds = pace * count_steps(stream, plan)
    whole = cfg.codec_tokens < 0 or whole_seconds < 60 * cfg.codec_minutes
    targets = plan.targets if whole else least
    memory = proof_bytes(cfg, plan, targets, rt.cuda, model.known) / 1e6
    seconds = pace * count_steps(stream, plan._replace(targets=targets))
    how = dict(seconds=round(seconds, 1), memory_mb=round(memory))
    rt.log("expect", "proof", tokens=targets, of=plan.targets, **how)
    if targets < plan.targets:
        environ = dict(DATA_PATH=cfg.data_path, TOKENIZER_PATH=cfg.tokenizer_path)
        environ |= dict(EVAL_ONLY=rt.folder / "artifact.bin", RUN_ID=f"{cfg.run_id}_proved")
        given = " ".join(f"{name}={shlex.quote(str(value))}" for name, value in environ.items())
        command = f"{given} CODEC_TOKENS=-1 python {shlex.quote(str(rt.folder / 'train_gpt.py'))}"
        memory = proof_bytes(cfg, plan, plan.targets, rt.cuda, model.known) / 1e9
        needs = (
            f"about {whole_seconds / 60:.0f} minutes and {memory:.1f} GB on one machine like this"
        )
        rt.log("note", f"to prove all tokens, {needs}: {command}")
    return plan._replace(targets=targets)


def coding_pace(
    model: GPT, rt: Runtime, cfg: Config, stream: np.ndarray, plan: CodingPlan
) -> float:
    """Seconds that encoding takes a step of lanes: of the first ones, those behind the warm-up; 0
    where the text has no more."""
    times: list[float] = []
    warm = cfg.warm_up_steps
    some = plan._replace(targets=min(plan.targets, (2 * warm + 1) * plan.lanes))
    how = dict(expected=plan.targets, after_step=lambda: times.append(time.perf_counter()))
    encode(model, rt, cfg, stream, some, **how)
    measured = len(times) - 1 - warm
    return (times[-1] - times[warm]) / measured if measured > 0 else 0.0


def proof_bytes(
    cfg: Config, plan: CodingPlan, targets: int, cuda: bool, known: KnownText = NOTHING_KNOWN
) -> int:
    """What an encoder or decoder holds, about: lanes, distributions, counts, weights that learn."""
    lanes = lane_bytes(cfg, plan.lanes, plan.window, cuda) + 16 * plan.lanes * cfg.vocab_size
    weights = 4 * count_parameters(cfg)
    if cfg.lane_ttt:
        each = plan.lanes // plan.groups
        weights += learning_bytes(cfg, plan.groups, each, plan.window, cfg.lane_ttt_every)
    counted = targets + 2 * len(known)
    return lanes + weights + context_counts(counted, cfg.vocab_size).TOKEN_BYTES * counted


def decoded_again(folder: Path, text: np.ndarray) -> bool:
    """Does a fresh process, which is told the folder alone, get the text back?"""
    ours = VARIABLES.keys() | LAUNCH.keys()
    environ = {name: value for name, value in os.environ.items() if name not in ours}
    command = [sys.executable, folder / "train_gpt.py"]
    environ["DECODE"] = str(folder)
    # In a session of its own no Ctrl-C reaches it: an interrupted run ends it.
    status = run_program(command, env=environ, start_new_session=True)
    decoded = folder / "decoded.npy"
    right = status == 0 and np.array_equal(np.load(decoded), text)
    decoded.unlink(missing_ok=True)
    return right


# -----------------------------------------------------------------------------
# 13. Training loop
# Batches, schedules, optimizers, averages and QAT until the steps or the clock run out.


def micro_batches(cfg: Config, rt: Runtime) -> int:
    """Passes in a step on each rank, of whole sequences; ConfigError where that cannot be."""
    count = cfg.grad_accum_steps or (max(1, 8 // rt.world_size) if rt.cuda else 1)
    unit = cfg.train_seq_len * rt.world_size * count
    if cfg.train_batch_tokens % unit:
        raise ConfigError(
            f"TRAIN_BATCH_TOKENS={cfg.train_batch_tokens}: must be a multiple of {unit}"
        )
    return count


class Trainer:
    """A training run's state and steps."""

    def __init__(
        self,
        model: GPT,
        loader: TokenLoader | ShuffledLoader,
        rt: Runtime,
        cfg: Config,
        started_from: str | None = "",
    ):
        """started_from: sha256 of the file whose weights the model has; "": they are fresh; None:
        a checkpoint will tell."""
        self.model = model
        self.started_from = started_from
        self.batches = Prefetch(loader, rt, cfg)
        self.rt = rt
        self.cfg = cfg
        self.passes = micro_batches(cfg, rt)
        self.optimizers = Optimizers(model, rt, cfg)
        self.averages = Averages(model, cfg)
        self.compiled_loss = rt.compile(model)
        self.step = 0  # steps that are done
        self.qat_since: int | None = None  # step at which late QAT began
        self.set_loops_since(None)
        self.factor = 0.0  # of the learning rates, in the last step
        self.elapsed = 0.0  # seconds of training, the slowest rank's
        self.reserve = 0.0  # of the cap's seconds, see run
        self.signal = 0  # on any rank, as of the last agreement
        self.agreement: Callable[[], np.ndarray] | None = None  # that is under way

    @property
    def folder(self) -> Path:
        return self.rt.folder / "checkpoint"

    def set_loops_since(self, since: int | None) -> None:
        """LOOP_LAYERS run several times, as of this step; None: not yet."""
        self.loops_since = since
        self.model.set_looped(since is not None)

    def gradients(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Of this rank's rows. -> mean loss."""
        total = 0.0
        batches = zip(ids.chunk(self.passes), targets.chunk(self.passes), strict=True)
        for batch_ids, batch_targets in batches:
            with self.rt.autocast(), self.rt.attention():
                loss = self.compiled_loss(batch_ids, batch_targets) / self.passes
            loss.backward()
            total += loss.detach()
        return total

    def optimize(self, ids: Tensor, targets: Tensor, factor: float) -> Tensor:
        """From this rank's rows to new weights and averages. -> mean loss."""
        loss = self.optimizers.step(self.step, factor, self.gradients(ids, targets))
        self.averages.update(self.step, factor)
        return loss

    def warm_up(self) -> None:
        """Whole steps on random tokens before the clock starts, for what a first use compiles,
        connects and allocates, without loops and with them; then everything is as it was, by its
        sha256."""
        cfg = self.cfg
        if not cfg.warmup_steps:
            return
        momenta = [bank.momentum for bank in self.optimizers.muon.banks]
        tensors = changing_tensors(self, momenta)
        kept = {name: tensor.clone() for name, tensor in tensors.items()}
        before = tensors_sha256(kept)
        random = torch.Generator().manual_seed(self.rt.rank)
        rows = cfg.train_batch_tokens // self.rt.world_size // cfg.train_seq_len
        since = self.loops_since
        looped_already = since is not None
        for looped in sorted({looped_already, bool(cfg.loop_layers)}):
            self.model.set_looped(looped)
            for _ in range(cfg.warmup_steps):
                shape = 2, rows, cfg.train_seq_len
                sides = torch.randint(cfg.vocab_size, shape, generator=random)
                self.optimize(*sides.to(self.rt.device), factor=1.0)
        self.set_loops_since(since)
        with torch.no_grad():
            for name, tensor in tensors.items():
                tensor.copy_(kept[name])
        if tensors_sha256(changing_tensors(self, momenta)) != before:
            fix = "WARMUP_STEPS=0, and tell us"
            raise UserError(f"WARMUP_STEPS={cfg.warmup_steps}: left a trace; fix: {fix}")

    def update(self, factor: float) -> Tensor:
        """One optimizer step at a rate factor. -> training loss."""
        cfg = self.cfg
        done = share_done(self.step, self.elapsed, cfg, self.reserve)
        if cfg.loop_layers and self.loops_since is None and done >= cfg.loop_from:
            self.set_loops_since(self.step)
            layers = ",".join(map(str, self.model.layers))
            self.rt.log("loops:enabled", step=self.step, share=done, layers=layers)
        if cfg.late_qat and self.qat_since is None and factor < cfg.late_qat_threshold:
            self.qat_since = self.step
            self.rt.log("late_qat:enabled", step=self.step, scale=factor)
        if self.qat_since is not None and (self.step - self.qat_since) % cfg.qat_every == 0:
            update_qat_grids(self.model, cfg)
        self.factor = factor
        loss = self.optimize(*self.batches.take(), factor)
        self.step += 1
        return loss

    def agree(self, loss: Reading, soon: bool = False) -> None:
        """Wait for this loss; one clock and signal for all ranks; UserError, on all of them, for a
        loss that is not finite. `soon`: what is said now is sent off, and what was said by the call
        before holds, so the host waits for nobody; not near the cap, nor on one rank."""
        with self.rt.clock("train"):
            nonfinite = 0 if math.isfinite(loss.get()) else self.rt.rank + 1
        signal_here = max(self.rt.received, default=0)
        said = self.rt.start_largest(self.rt.seconds["train"], signal_here, nonfinite)
        said_before = self.agreement
        self.agreement = said
        if said_before:
            self.apply(said_before())
        if not soon or self.rt.world_size == 1 or self.near_cap:
            self.agreement = None
            self.apply(said())

    def apply(self, found: np.ndarray) -> None:
        """An agreement; UserError where it says that a loss is not finite."""
        self.elapsed, self.signal, nonfinite = found.tolist()
        if nonfinite:
            last = max(self.folder.glob("step_*.json"), default="none")
            where = f"by step {self.step} loss or gradient not finite on rank {nonfinite - 1:.0f}"
            fix = "lower rates, another RUN_ID"
            raise UserError(f"{where}; last good checkpoint: {last}; fix: {fix}")

    @property
    def near_cap(self) -> bool:
        """Could it be reached before what is said now is agreed? `elapsed` lags by up to two steps,
        and one more is margin."""
        later = self.elapsed * (1 + 3 / max(1, self.step))
        return 0 < self.cap <= later

    @property
    def capped(self) -> bool:
        return 0 < self.cap <= self.elapsed

    @property
    def cap(self) -> float:
        """Seconds after which no step begins; 0: none."""
        return self.cfg.max_wallclock_seconds - self.reserve

    @property
    def done(self) -> bool:
        return self.capped or self.step >= self.cfg.iterations

    def run(
        self, validate: Callable[[], dict[str, float]], reserve: float = 0.0
    ) -> dict[str, Tensor]:
        """Train to the last step or the cap. -> averaged weights by name. A signal ends the
        process once the step is done and the checkpoint written, with status 128 + its number.
        reserve: seconds of the cap for what comes after the last step.

        The host launches a step while the device works on the one before: it waits for the
        previous loss, not for this one's, and for what the ranks said a step before that, unless
        something is to be logged, validated or saved.
        """
        cfg = self.cfg
        rt = self.rt
        loss = Reading(torch.zeros(()))
        self.reserve = reserve
        self.warm_up()
        with contextlib.closing(self.batches), rt.signals():
            rt.hold_signals()
            self.agree(loss)  # of nothing yet: on the seconds that were spent before a resume
            due = self.checkpoints_due()
            while not self.done:
                previous = loss
                try:
                    with rt.clock("train"):
                        loss = Reading(
                            self.update(lr_factor(self.step, self.elapsed, cfg, self.reserve))
                        )
                except BadShard as error:
                    self.agree(previous)
                    if self.step == 0:
                        raise
                    then = f"once it is mended: step {self.step}, {self.save()}"
                    raise UserError(f"{error}; {then}") from error
                self.agree(previous, soon=True)
                rt.tick("train", self.step, cfg.iterations)
                logs = self.step <= 10 or self.every(cfg.train_log_every)
                validates = self.every(cfg.val_loss_every)
                if logs or validates or self.signal or self.checkpoints_due() > due:
                    self.agree(loss)
                if logs or self.done:
                    mean = rt.sum(np.array([loss.get()])).item() / rt.world_size
                    self.log_step(train_loss=mean, lr=self.factor)
                if self.every(cfg.val_loss_every):
                    self.log_step(**validate())
                if self.done:
                    self.agree(loss)
                due = self.save_if_due(due)
        if self.capped:
            rt.log("stopping_early: wallclock_cap", step=f"{self.step}/{cfg.iterations}")
        rt.log("averages", ema=int(cfg.ema_enabled), swa_snapshots=self.averages.snapshots)
        return self.averages.final()

    def every(self, steps: int) -> bool:
        """Is it time for what happens every so many steps (0: never) and at the end?"""
        return bool(steps) and (self.done or self.step % steps == 0)

    def checkpoints_due(self) -> float:
        """Checkpoints that CHECKPOINT_EVERY asks for by now, the one at the end included."""
        every = self.cfg.checkpoint_every
        count = self.elapsed / 60 if every.endswith("m") else self.step
        size = int(every.removesuffix("m"))
        return count // size + self.done if size else 0

    def save_if_due(self, due: float) -> float:
        """A checkpoint where one more is due than before, or a signal came; then the process ends.
        -> checkpoints due by now."""
        now = self.checkpoints_due()
        if now > due or self.signal:
            saved = self.save()
            if self.signal:
                number = int(self.signal)
                self.rt.log("note", f"signal {number} at step {self.step}: {saved}")
                sys.exit(128 + number)
        return now

    def save(self) -> str:
        """A checkpoint, if that can be. -> what became of it."""
        if not has_package("safetensors"):
            return "no checkpoint, package safetensors is missing"
        save_checkpoint(self)
        return "checkpoint written, RESUME=auto goes on"

    def restore(self, state: CheckpointState) -> None:
        """The counters of a checkpoint; restore_checkpoint fills the tensors."""
        self.step = state.step
        self.qat_since = state.qat_since
        self.set_loops_since(state.loops_since)
        self.started_from = state.settings["INIT_FROM"]
        self.rt.seconds["train"] = state.seconds
        self.averages.resume(state.snapshots)
        self.batches.restore(tuple(state.loader))

    def log_step(self, **values: Any) -> None:
        self.rt.log("step", f"{self.step}/{self.cfg.iterations}", **values, **self.speed())

    def speed(self) -> dict[str, Any]:
        """Of a step line: seconds of training, training tokens/s, on a CUDA device that is known
        the share of its peak (mfu), and h:mm:ss of training left (eta); validation and the scores
        after it come on top."""
        cfg = self.cfg
        rt = self.rt
        spent = rt.seconds["train"]
        speed = cfg.train_batch_tokens * self.step / spent
        left = (cfg.iterations - self.step) * spent / self.step
        if self.cap:
            left = min(left, max(0.0, self.cap - spent))
        values = dict(
            train_time_ms=int(1000 * spent),
            step_avg_ms=1000 * spent / self.step,
            tokens_per_s=int(speed),
        )
        peak = peak_flops(torch.cuda.get_device_name(rt.device)) if rt.cuda else None
        if peak:
            values["mfu"] = speed * self.mean_flops() / (peak * rt.world_size)
        return values | dict(eta=str(timedelta(seconds=round(left))))

    def mean_flops(self) -> float:
        """token_flops of the tokens so far."""
        plain = self.step if self.loops_since is None else self.loops_since
        looped = self.step - plain
        flops = plain * token_flops(self.cfg, False) + looped * token_flops(self.cfg)
        return flops / self.step


# Dense bf16 FLOP/s by the name that CUDA gives a device; the first that is found in it.
PEAKS = {
    "B200": 2250e12,
    "H[12]00 NVL": 835e12,
    "H100 PCIe": 756e12,
    r"H[128]00\b": 989e12,
    r"A[18]00\b": 312e12,
    "L40S": 362e12,
    r"L4\b": 121e12,
    r"A10G?\b": 125e12,
    r"RTX 4090$": 165e12,
    r"RTX 3090$": 71e12,
}
# Matrices that every token is multiplied with; those of a layer that it passes twice, twice.
ONCE = ("tok_emb", "bigram_proj", "enrich_up", "enrich_down", "ve_proj")
EACH_LAYER = (*BANKS, "attn_gate_weight")


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of a device by its name; None where it is unknown."""
    return next((peak for name, peak in PEAKS.items() if re.search(name, device_name)), None)


def token_flops(cfg: Config, looped: bool = True) -> int:
    """FLOPs of a training token, forward and backward: 6 a weight, 12 * layers * width * length for
    attention, as PaLM counts (arXiv 2204.02311, appendix B): the causal half is not taken off, nor
    what DOC_ATTENTION saves."""
    sizes = {name: math.prod(spec.shape) for name, spec in parameter_specs(cfg).items()}
    applied = count_blocks(cfg, looped)
    layer = sum(sizes.get(name, 0) for name in EACH_LAYER) // cfg.num_layers
    weights = sum(sizes.get(name, 0) for name in ONCE) + applied * layer
    return 6 * weights + 12 * applied * cfg.model_dim * cfg.train_seq_len


# -----------------------------------------------------------------------------
# 14. Report and main
# Final lines, submission.json, and the story: configure, train, quantise, reload, score, prove.

MASS_LIMIT = 1e-9  # of sums in float64 over the vocabulary, which stay below 1e-12
BLOCK = 1024  # targets of a row of blocks.npz
UPSTREAM_TRACK = "10min_16mb"


class Report:
    """The final lines and the run folder's results."""

    def __init__(self, rt: Runtime, cfg: Config):
        self.rt = rt
        self.cfg = cfg
        self.text = ValidationText(cfg)
        self.stages: dict[str, dict[str, float]] = {}  # final lines: loss and bpb

    def log_text(self) -> None:
        """How long the text is, and how much of it was checked."""
        text = self.text
        spelt = dict(lossy=1, spelt_bytes=text.spelt_bytes) if text.lossy else {}
        self.rt.log("val_text", tokens=len(text.targets), bytes=text.text_bytes, **spelt)
        self.log_check(text.checked)

    def log_check(self, checked: Mapping[str, int]) -> None:
        """How much of the text spells as many bytes as are counted, and was its text if known."""
        text = self.text
        known = " ".join(path.name for path in text.sources) or "unknown"
        more = dict(changed=text.changed) if text.changed else {}
        self.rt.log("bytes_check", **checked, of=len(text.targets), text=known, **more)
        if not text.sources and "tokenizer_sha256" not in text.facts:
            note = "no dataset.json and no text beside the shards: that they are of this tokenizer,"
            self.rt.log("note", f"{note} and with it val_bpb, is the word of who gave DATA_PATH")
        if len(text.edges) == 2 and text.positions[0] == 0:
            self.rt.log("note", "no BOS in the validation shards: all of it is one document")
        if text.lossy:
            under = "those of the text" if text.sources else "those that the tokens spell"
            note = f"LOSSY: the tokenizer alters text; the bytes under val_bpb are {under}"
            self.rt.log("note", note)

    def check_rest(self) -> None:
        """Of a long text, before anything is claimed: what Report's start left out (UserError)."""
        if self.rt.rank == 0 and self.text.checked["tokens"] < len(self.text.targets):
            self.log_check(self.text.check(rest=True))

    def score(self, stage: str, log_prob: np.ndarray, **more: Any) -> None:
        """A final line; log_prob (N,), nats."""
        self.stages[stage] = self.losses(log_prob)
        self.rt.log(f"final_{stage}_exact", **self.stages[stage], **more)

    def score_in_order(self, stage: str, log_prob: np.ndarray, **more: Any) -> None:
        """A final line of what depends on the order of coding: with the bytes that name it."""
        share = self.side_nats / len(log_prob)
        self.score(stage, log_prob - share if share else log_prob, **more)

    def losses(self, log_prob: np.ndarray, first: int = 0) -> dict[str, float]:
        """Mean loss in nats a token, and bits per byte; of the text's first targets, or all."""
        size = self.text.bytes[:first].sum() if first else self.text.text_bytes
        bpb = bits_per_byte(log_prob, np.array(size))
        return dict(val_loss=float(-log_prob.mean()), val_bpb=bpb)

    @functools.cached_property
    def side_nats(self) -> float:
        """What a decoder must be told beside the text."""
        if self.cfg.scorer != "documents":
            return 0.0
        return CodingPlan.of(self.text.stream, self.cfg, self.rt.world_size).side_nats()

    def finish(self, model: GPT, scores: Scores, final: np.ndarray, coding: CodingOrder) -> None:
        """Proof, columns, bytes and seconds against the caps, submission.json, picture."""
        rt = self.rt
        cfg = self.cfg
        claim = final
        codec: dict[str, Any] = {}
        rt.mend_folder()
        if cfg.scorer == "documents":
            with rt.clock("proof"):
                coded, codec = prove(self, final[coding.targets])
            mass_error = coded.mass_error
            if codec and cfg.codec_device != "same" and coded.targets == len(final):
                claim = final * (coded.nats / -final.sum())  # as the decoder there adds up
        else:
            mass_error = window_mass(model, rt, cfg, self.text.stream)
        if not mass_error <= MASS_LIMIT:
            reason = f"mass_error {mass_error:.3g}: NGRAM_MIXER={cfg.mixer} is no distribution here"
            fix = f"other NGRAM_ settings; EVAL_ONLY={rt.folder / 'artifact.bin'} scores it"
            raise UserError(f"{reason}, so there is no val_bpb; fix: {fix}")
        orders = show_orders(weighed_orders(cfg.mixer, cfg))
        self.score_in_order("ngram", claim, mixer=cfg.mixer, orders=orders, mass_error=mass_error)
        save_columns(self, scores, final)
        log_pseudo_score(rt, cfg)
        if codec:
            rt.log("final_codec", **codec)
        rt.mend_folder()
        packed = len(pack_script(SCRIPT))
        weights = len(rt.essential["artifact.bin"])
        total = packed + weights
        sizes = dict(code=len(SCRIPT), packed=packed, weights=weights, total=total)
        rt.log("final_artifact_bytes", **sizes, cap=CAP_BYTES)
        spent = {f"{stage}_seconds": rt.seconds[stage] for stage in ("train", "eval")}
        rt.log("final_budget", **spent, cap=f"{CAP_SECONDS}/{CAP_SECONDS}")
        rt.log("peak_memory_mb", rt.peak_memory())
        if cfg.sample_tokens:
            self.log_sample(model)
        if over := over_caps(bytes=total, **spent):
            rt.log("OVER THE CAP of the 10-minute track", "; ".join(over.values()))
        close_run(rt)
        rt.show("\n".join(self.summary(codec, packed, weights)))

    def summary(self, codec: Mapping[str, Any], packed: int, weights: int) -> Iterator[str]:
        """What a person wants to know at the end, in columns."""
        rt = self.rt
        yield f"\n{'':<22}{'bits per byte':>14}{'nats a token':>14}"
        for stage, losses in self.stages.items():
            name = "val_bpb, the mixture" if stage == "ngram" else stage
            yield f"{name:<22}{losses['val_bpb']:>14.4f}{losses['val_loss']:>14.4f}"
        if codec:
            proved = f"{codec['proved_tokens']:,} of {codec['total_tokens']:,} tokens"
            yield f"proof     decoded {codec['decoded']}, {proved}, {codec['coded_bytes']:,} bytes"
        else:
            yield "proof     none was asked for (SCORER=documents, CODEC_TOKENS)"
        sizes = f"{packed + weights:,} of {CAP_BYTES:,}: script {packed:,}, weights {weights:,}"
        yield f"bytes     {sizes}"
        caps = dict(train=f" of {CAP_SECONDS}", eval=f" of {CAP_SECONDS}")
        seconds = rt.seconds if codec else {name: rt.seconds[name] for name in ("data", *caps)}
        parts = [f"{name} {spent:.0f}{caps.get(name, '')}" for name, spent in seconds.items()]
        total = time.perf_counter() - rt.began
        yield f"seconds   {', '.join(parts)}, in all {total:.0f}"
        picture = ", picture report.png" if (rt.folder / "report.png").exists() else ""
        yield f"folder    {rt.folder}{picture}"

    def log_sample(self, model: GPT) -> None:
        """A document that the model writes, in the shape of lanes that the evaluation compiled."""
        cfg = self.cfg
        lanes = 1
        if self.rt.cuda and cfg.scorer == "documents":
            plan = CodingPlan.of(self.text.stream, cfg, self.rt.world_size)
            lanes = plan.lanes // plan.groups
        (found,) = generate(model, [[]], cfg.sample_tokens, seed=cfg.seed, lanes=lanes)
        tokenizer = package("sentencepiece").SentencePieceProcessor(model_file=cfg.tokenizer_path)
        words = tokenizer.decode(found.tokens.tolist()).split()
        for line in textwrap.wrap(printable(" ".join(words)), 90) or ["(nothing)"]:
            self.rt.log("sample", line)


PACKED_NAME = "train_gpt_packed.py"  # of a submission: what counts beside the artifact


@functools.cache
def pack_script(script: bytes) -> bytes:
    """A script that runs these very bytes, by their sha256: what a submission ships (submit.py)."""
    packed = base64.b85encode(lzma.compress(script, preset=9 | lzma.PRESET_EXTREME)).decode()
    return f"""\
# train_gpt.py, sha256 {sha256(script)}, packed; its text is below as SCRIPT.
import base64, hashlib, lzma
try:
    SCRIPT = lzma.decompress(base64.b85decode("{packed}"))
except (ValueError, lzma.LZMAError):
    SCRIPT = b""
if hashlib.sha256(SCRIPT).hexdigest() != "{sha256(script)}":
    raise SystemExit("damaged")
exec(compile(SCRIPT, __file__, "exec"))
""".encode()


def over_caps(**spent: float) -> dict[str, str]:
    """Of bytes, train_seconds, eval_seconds: what is over the 10-minute track's cap, in words.
    Training may end a second late: the step that the cap falls into is finished."""
    caps = dict(bytes=CAP_BYTES, train_seconds=CAP_SECONDS, eval_seconds=CAP_SECONDS)
    late = dict(train_seconds=1)
    over = [name for name in spent if spent[name] > caps[name] + late.get(name, 0)]
    return {name: f"{name} {round(spent[name], 1):,}, the cap is {caps[name]:,}" for name in over}


def note_caps(rt: Runtime, **spent: float) -> None:
    """Said as soon as it is known."""
    if over := over_caps(**spent):
        rt.log("note", f"over the cap of the 10-minute track: {'; '.join(over.values())}")


def save_columns(report: Report, scores: Scores, final: np.ndarray) -> None:
    """blocks.npz, sums over BLOCK targets of log p by model and mixture and of bytes; scores.npz
    where it was asked for. No target pays for a plan's side_bytes. final: log p (N,), nats."""
    columns = dict(logp_model=scores.log_prob, logp_final=final, bytes=report.text.bytes)
    edges = range(0, len(final), BLOCK)
    sums = {name: np.add.reduceat(column, edges) for name, column in columns.items()}
    save_arrays(report.rt, "blocks.npz", sums)
    if report.cfg.save_scores or report.cfg.ngram_scheme:
        save_scores(report, "scores.npz", scores, final)


def save_scores(report: Report, name: str, scores: Scores, final: np.ndarray) -> None:
    """Of each target its place, token, bytes, the model's log p and entropy, and the final log
    p."""
    text = report.text
    columns = dict(logp_final=final, logp_model=scores.log_prob, entropy=scores.entropy)
    columns |= dict(position=text.positions, token=text.targets, bytes=text.bytes)
    if scores.pe_delta is not None:
        columns["pe_delta"] = scores.pe_delta
    save_arrays(report.rt, name, columns)


def save_arrays(rt: Runtime, name: str, arrays: Mapping[str, np.ndarray]) -> None:
    """For statistics and pictures alone: a failure is noted and does not fail the run."""
    if rt.rank == 0:
        try:
            write_atomically(rt.folder / name, functools.partial(np.savez, **arrays))
        except UserError as error:
            rt.log("note", f"no {name}: {error}")


def log_pseudo_score(rt: Runtime, cfg: Config) -> None:
    """NGRAM_SCHEME's line: a published scorer as written, no code length, as its mass shows. It
    is no part of the run: as_written.py is a program of its own, which reads scores.npz."""
    program = ROOT / "records/tools/as_written.py"
    if not cfg.ngram_scheme or not program.exists():
        return
    weights = "ema" if (rt.folder / "scores_ema.npz").exists() else "artifact"
    command = [sys.executable, program, rt.folder, "--scheme", cfg.ngram_scheme, "--json"]
    done = subprocess.run([*command, "--weights", weights], capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        rt.log("note", f"no pseudo score: {lines[-1].removeprefix('error: ')}")
    else:
        rt.log("final_ngram_pseudo", **json.loads(done.stdout))


def close_run(rt: Runtime) -> None:
    """submission.json, the mark of a finished run, and report.png. The scores are in the log by
    now: a failure of these two is noted and does not fail the run."""
    try:
        write_submission(rt.folder)
    except (UserError, OSError, ValueError) as error:
        again = f"python records/tools/run_folder.py {rt.folder}"
        rt.log("note", f"no submission.json: {error}; then run {again}")
    program = ROOT / "records/tools/plot.py"
    if program.exists() and has_package("matplotlib"):
        command = [sys.executable, program, rt.folder]
        if run_program(command, start_new_session=True):  # a Ctrl-C is ours to answer
            rt.log("note", f"records/tools/plot.py failed; run it again on {rt.folder}")


# submission.json: from the lines of a run's log and its files alone.


FINAL_LINES = ("final_ngram_exact", "final_artifact_bytes", "final_budget")  # of a finished run


class RunLog:
    """The lines of a metrics.jsonl, and the settings of a run."""

    def __init__(self, lines: list[dict[str, Any]], settings: Mapping[str, str]):
        self.lines = lines
        self.settings = settings

    @functools.cached_property
    def by_key(self) -> dict[str, list[dict[str, Any]]]:
        found: dict[str, list[dict[str, Any]]] = {}
        for line in self.lines:
            found.setdefault(line["key"], []).append(line)
        return found

    def all(self, key: str) -> list[dict[str, Any]]:
        return self.by_key.get(key, [])

    def last(self, key: str) -> dict[str, Any]:
        """The newest line of this key; {} for none."""
        return (self.all(key) or [{}])[-1]

    def steps(self, name: str) -> dict[int, dict[str, Any]]:
        """Step -> its "step" line with field `name`; after a resume the newest line holds."""
        lines = [line for line in self.all("step") if name in line]
        return {int(line["value"].partition("/")[0]): line for line in lines}

    def stages(self) -> dict[str, dict[str, Any]]:
        """final_<stage>_exact lines -> their fields by stage, in the order of the run."""
        keys = {line["key"]: None for line in self.lines}
        exact = [key for key in keys if key.startswith("final_") and key.endswith("_exact")]
        return {key[len("final_") : -len("_exact")]: line_fields(self.last(key)) for key in exact}


def line_fields(line: Mapping[str, Any]) -> dict[str, Any]:
    """A line without its key and value."""
    return {name: value for name, value in line.items() if name not in ("key", "value")}


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """JSON's object; ValueError for a name that stands twice, since readers differ in which they
    believe."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands twice in an object")
    return found


def parse_line(text: str) -> dict[str, Any] | None:
    """A line of metrics.jsonl; None for what is none, such as one that a kill cut off."""
    try:
        line = json.loads(text, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError):
        return None
    return line if isinstance(line, dict) and isinstance(line.get("key"), str) else None


def write_submission(folder: Path, code: Path | None = None) -> Path:
    """submission.json of a finished run folder, whole or not at all: the same folder gives the same
    bytes. -> its path; UserError for what cannot be written, ValueError for a score that is no
    number."""
    text = read_regular(folder / "metrics.jsonl").decode()
    lines = [line for line in map(parse_line, text.splitlines()) if line]
    run = RunLog(lines, read_pairs(folder / "config.env"))
    for key in FINAL_LINES:
        if not run.last(key):
            unfinished = f"{folder}/metrics.jsonl: no line {key}"
            raise UserError(f"{unfinished}; fix: let the run end, RESUME=auto goes on")
    entries = submission(run, folder, code)
    content = json.dumps(entries, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    path = folder / "submission.json"
    write_atomically(path, content.encode(errors="backslashreplace"))
    return path


def submission(run: RunLog, folder: Path, code: Path | None = None) -> dict[str, Any]:
    """The contents of submission.json, upstream's keys first; code: where not in the folder."""
    logged = run.last("config")  # NAME: value(origin)
    record = logged.get("RECORD", "").rpartition("(")[0]
    run_id = logged.get("RUN_ID", "").rpartition("(")[0]
    score = score_entries(run)
    # The log is closed by the last stage, and a second call must give the same date.
    finished = datetime.fromtimestamp((folder / "metrics.jsonl").stat().st_mtime, UTC)
    files = dict(code=code or folder / "train_gpt.py", artifact=folder / "artifact.bin")
    files["tokenizer"] = folder / "tokenizer.model"
    return {
        "author": os.environ.get("AUTHOR", ""),
        "github_id": os.environ.get("GITHUB_ID", ""),
        "name": run_id or folder.resolve().name,
        "blurb": describe(run, score["step_stop"]),
        "date": finished.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "track": find_track(record),
        **score,
        "tokens": run.last("val_text").get("tokens"),
        "bytes": run.last("val_text").get("bytes"),
        **text_entries(run),
        "sha256": {
            what: sha256(read_regular(path, MOST_ARTIFACT_BYTES)) for what, path in files.items()
        },
        "stages": run.stages(),
        **other_entries(run),
    }


def score_entries(run: RunLog) -> dict[str, Any]:
    """Score, bytes, steps and seconds, in upstream's names."""
    final = run.last("final_ngram_exact")
    size = run.last("final_artifact_bytes")
    budget = run.last("final_budget")
    steps = run.steps("train_loss")
    step = max(steps, default=None)
    seed = run.settings["SEED"]
    spent = {name: budget[name] for name in ("train_seconds", "eval_seconds")}
    score = {name: final[name] for name in ("val_loss", "val_bpb")}
    seed_result = score | dict(artifact_bytes=size["weights"], steps=step)
    seed_result["step_avg_ms"] = steps[step]["step_avg_ms"] if steps else None
    return score | {
        "bytes_total": size["packed"] + size["weights"],
        "bytes_code": size["packed"],
        "over_cap": size["packed"] + size["weights"] > CAP_BYTES,
        "over": [*over_caps(bytes=size["packed"] + size["weights"], **spent)],
        "seeds": [int(seed)],
        "seed_results": {seed: seed_result},
        "hardware": run.last("hardware").get("value"),
        "pytorch_version": run.last("hardware").get("torch"),
        "step_stop": step,
        "wallclock_seconds": budget["train_seconds"],
        "eval_time_seconds": budget["eval_seconds"],
    }


def text_entries(run: RunLog) -> dict[str, Any]:
    """Validation documents that training has, too (None: unknown); the file of INIT_FROM, whose
    own training text is unknown; that the tokenizer altered the text, where it did, and the bytes
    that its tokens spell."""
    text = run.last("val_text")
    entries = {}
    if overlap := run.last("overlap"):
        shared = overlap.get("documents")
        entries["overlap_documents"] = shared if isinstance(shared, int) else None
    if started := run.last("init_from"):
        entries["init_sha256"] = started.get("sha256")
    if text.get("lossy") or run.last("bytes_check").get("changed"):
        entries |= dict(lossy=True, spelt_bytes=text.get("spelt_bytes", text.get("bytes")))
    return entries


def other_entries(run: RunLog) -> dict[str, Any]:
    """Every other final line (codec, pseudo, ...) and each n-gram order's gain, where present."""
    known = ("final_artifact_bytes", "final_budget")
    keys = {line["key"] for line in run.lines if line["key"].startswith("final_")}
    entries = {}
    for key in sorted(keys.difference(known)):
        if not key.endswith("_exact"):
            name = "pseudo" if key == "final_ngram_pseudo" else key[len("final_") :]
            entries[name] = line_fields(run.last(key))
    gains = {
        line["value"]: {"order": line["value"]} | line_fields(line)
        for line in run.all("ngram_gain")
    }
    if gains:
        entries["ngram_gain"] = list(gains.values())
    return entries


def find_track(record: str) -> str:
    """The track folder that holds the record: of this name, else of one that begins so."""
    records = ROOT / "records"
    paths = [p for p in records.glob("track_*/**/config.env") if p.parent.name.startswith(record)]
    if not record or not paths:
        return UPSTREAM_TRACK
    path = min(paths, key=lambda p: (p.parent.name != record, p))
    return path.relative_to(records).parts[0].removeprefix("track_")


def describe(run: RunLog, step: int | None) -> str:
    """The blurb: model, training and scorer in one sentence."""
    settings = run.settings
    parts = [f"{settings.get('NUM_LAYERS')} layers x {settings.get('MODEL_DIM')}"]
    if run.last("model_params"):
        parts.append(f"{run.last('model_params')['value']:,} parameters")
    parts.append(f"{step:,} steps" if step else "scored from a stored artifact")
    parts.append(f"{settings.get('SCORER')} scorer")
    final = run.last("final_ngram_exact")
    if final.get("mixer") == "none":
        parts.append("no n-gram mixture")
    elif "orders" in final:
        parts.append(f"n-gram mixture {final.get('mixer')} of orders {final['orders']}")
    return ", ".join(parts)


# The story.


def load_beginning(beginning: Beginning, model: GPT, rt: Runtime, cfg: Config) -> None:
    """The weights of INIT_FROM into the model, and what is to say of them."""
    model.load_state_dict(beginning.weights, strict=False)
    rt.log("init_from", sha256=beginning.sha256)
    if differs := beginning.differences(cfg):
        rt.log("note", f"INIT_FROM={cfg.init_from}: {differs}")
    if cfg.loop_layers and cfg.loop_from and beginning.settings["LOOP_LAYERS"]:
        found = "its weights were trained with loops, which begin here at LOOP_FROM"
        rt.log("note", f"INIT_FROM={cfg.init_from}: {found}; LOOP_FROM=0 begins with them")


def train_model(report: Report, beginning: Beginning | None) -> tuple[dict[str, Tensor], bytes]:
    """Train from fresh weights, or INIT_FROM's, and quantise. -> averaged weights by name,
    artifact.bin on rank 0."""
    rt = report.rt
    cfg = report.cfg
    stream = report.text.stream
    model = GPT(cfg).initialise()
    rt.log("model_params", count_parameters(cfg))
    if beginning:
        load_beginning(beginning, model, rt, cfg)
    model.to(rt.device)
    shards = find_shards(cfg.data_path, "train")
    known = KnownText.of(cfg, shards)
    overlap = Overlap(report.text, shards, rt)
    loader = training_loader(cfg, shards, overlap.ask)
    scorer = WindowScorer(for_scores(model), rt, cfg)

    def validate(targets: int = cfg.val_loss_tokens) -> dict[str, float]:
        """By the text's first ones; 0: by all."""
        targets = targets if targets < len(stream) - 1 else 0
        part = stream[: targets + 1] if targets else stream
        scorer.model.set_looped(model.looped)
        log_prob = scorer.score(part, scorer.length).log_prob
        return report.losses(log_prob, targets) | (dict(val_tokens=targets) if targets else {})

    fresh = None if cfg.init_from else ""
    trainer = Trainer(model, loader, rt, cfg, beginning.sha256 if beginning else fresh)
    rt.stage("warming up")
    warm_up_scoring(model, rt, cfg, stream)
    if cfg.resume == "auto":
        resume_training(trainer)
    overlap.log(max(1, trainer.step), OVERLAP_SECONDS)
    reserve = 0.0
    capped = cfg.quant == "gptq" and cfg.max_wallclock_seconds
    if capped or cfg.target_bytes:
        needed = quantising_seconds(rt, cfg, shards, known)
    if capped:
        reserve = min(cfg.gptq_reserve_seconds or needed, cfg.max_wallclock_seconds / 2)
        rt.log("gptq_reserve", seconds=reserve, measured=needed)
        if reserve < needed:
            rt.log("note", f"gptq may take {needed - reserve:.1f} s more than it is left")
    try:
        weights = trainer.run(validate, reserve)
        overlap.log(max(1, trainer.step))
    finally:  # a signal does not wait for what is left
        overlap.pool.shutdown(wait=False, cancel_futures=True)
    model.load_state_dict(weights)
    model.set_looped(True)  # as the artifact's will
    if cfg.loop_layers and trainer.loops_since is None:
        note = "the run ended before LOOP_FROM: LOOP_LAYERS were trained once each, the artifact's"
        rt.log("note", f"{note} run {cfg.loop_times} times; fix: a longer run, or LOOP_LAYERS=")
    if cfg.val_loss_every:  # what quantisation starts from
        rt.log("averaged", **validate(0))
    rt.stage("quantising and compressing")
    with rt.clock("train" if cfg.quant == "gptq" else "eval"):  # it reads training text
        packing = quantise_model(model, rt, cfg, shards, known)
    packing.log(rt, cfg)
    return weights, packing.packed


def quantise_model(
    model: GPT, rt: Runtime, cfg: Config, shards: list[Path], known: KnownText
) -> Packing:
    """make_artifact, with what QUANT asks for; its seconds, too."""
    began = time.perf_counter()
    hessians = {}
    if cfg.quant == "gptq":
        rows = calibration_rows(cfg, rt, shards)
        hessians = collect_hessians(for_scores(model), rt, cfg, rows)
    packing = make_artifact(model.state_dict(), cfg, rt, hessians, known)
    return packing._replace(seconds=time.perf_counter() - began)


def quantising_seconds(rt: Runtime, cfg: Config, shards: list[Path], known: KnownText) -> float:
    """What quantise_model will take, on the slowest rank and a fifth more: rehearsed before
    training, on random weights, for a zero is rounded and packed in no time. UserError where
    TARGET_BYTES is not reached."""
    script = len(pack_script(SCRIPT))
    if cfg.target_bytes and weights_room(cfg) <= 0:
        fix = "fix: more bytes"
        raise UserError(
            f"TARGET_BYTES={cfg.target_bytes}: the packed script takes {script:,}; {fix}"
        )
    other = GPT(cfg).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(cfg.seed)
    for weight in other.parameters():
        weight.normal_(std=0.1, generator=generator)
    other.to(rt.device)
    packing = quantise_model(other, rt, cfg, shards, known)
    # Trained weights may take some percent more: what fits at the very end does not count.
    if cfg.target_bytes and packing.widening > 2 ** (MOST_DOUBLINGS - 1):
        found = f"weights on the widest grids take {packing.size:,} bytes, the packed script"
        fix = "fix: a smaller model or more bytes" + ", or fewer KNOWN_TOKENS" * (packing.known > 0)
        found = f"{found} {script:,}{packing.known_words}"
        raise UserError(f"TARGET_BYTES={cfg.target_bytes}: {found}; {fix}")
    times = FIT_TRIES / packing.tries if packing.size > 0.9 * packing.room else 1.0
    return 1.2 * rt.largest(packing.seconds * max(1.0, times)).item()


@torch.no_grad()
def warm_up_scoring(model: GPT, rt: Runtime, cfg: Config, stream: np.ndarray) -> None:
    """On CUDA, before the clock starts: windows and lanes in every shape that the evaluation will
    run. The scorers are dropped; what was compiled stays, and so does how long a pass takes
    (rt.pace)."""
    if not rt.cuda:
        return
    model = for_scores(model)
    model.set_looped(True)
    scorer = WindowScorer(model, rt, cfg)
    scorer.warm_up(scorer.length)
    if scores_sliding(cfg):
        scorer.warm_up(cfg.eval_stride)
    if cfg.scorer == "documents":
        plan = CodingPlan.of(stream, cfg, rt.world_size)
        LaneScorer(model, rt, cfg, plan.lanes // plan.groups).warm_up()
    if cfg.ttt_enabled:
        TestTimeTraining(model, rt, cfg).warm_up()


def scores_sliding(cfg: Config) -> bool:
    return cfg.eval_sliding or cfg.scorer == "sliding"


def evaluate(
    model: GPT, weights: Mapping[str, Tensor], report: Report
) -> tuple[Scores, CodingOrder]:
    """Score the re-read artifact. -> Scores that feed the mixture, the order of coding."""
    cfg = report.cfg
    rt = report.rt
    stream = report.text.stream
    announce_known(model.known, rt, cfg)
    scorer = WindowScorer(model, rt, cfg)
    coding = CodingOrder(stream, slice(None))
    targets = len(stream) - 1
    length = scorer.length
    rt.expect("int6_roundtrip", f"stride {length}", scorer.passes(targets, length))
    report.score("int6_roundtrip", scorer.score(stream, length).log_prob)
    speed = {}
    if scores_sliding(cfg):
        stride = cfg.eval_stride
        rt.expect("int6_sliding_window", f"stride {stride}", scorer.passes(targets, stride))
        began = time.perf_counter()
        scores = scorer.score(stream, stride)
        report.score("int6_sliding_window", scores.log_prob, stride=cfg.eval_stride)
        speed["sliding_tokens_per_s"] = tokens_per_second(stream, began)
    if cfg.scorer == "documents":
        began = time.perf_counter()
        scores, coding = score_documents(model, rt, cfg, stream)
        speed = dict(tokens_per_s=tokens_per_second(stream, began)) | speed
        report.score("documents", scores.log_prob, **speed)
    if cfg.ttt_enabled:
        student = TestTimeTraining(model, rt, cfg)
        rt.expect("ttt", "chunk", -(-targets // student.chunk))
        scores = student.score(stream)
        report.score("ttt", scores.log_prob)
    scores = with_enrichment_change(scores, model, stream)
    if weights and cfg.ngram_scheme and cfg.pseudo_weights == "ema":
        score_unquantised(model, weights, report)
    return scores, coding


def tokens_per_second(stream: np.ndarray, began: float) -> int:
    return int((len(stream) - 1) / (time.perf_counter() - began))


def score_unquantised(model: GPT, weights: Mapping[str, Tensor], report: Report) -> None:
    """scores_ema.npz: of the weights that #864's scorer was measured on, for as_written.py."""
    model = copy.deepcopy(model)
    model.load_state_dict(weights)
    stream = report.text.stream
    scores = WindowScorer(model, report.rt, report.cfg).score(stream, report.cfg.eval_stride)
    scores = with_enrichment_change(scores, model, stream)
    save_scores(report, "scores_ema.npz", scores, scores.log_prob)


def begin_run(rt: Runtime, cfg: Config, beginning: Beginning | None = None) -> Report:
    """All that a run needs, then its folder and what stands at the top of its log: nothing of an
    earlier one is touched before it is known that this one can be."""
    rt.stage("preparing the data")
    checkpoints_to_go_on(rt)  # seconds before it is done, and again once the folder is ours
    notes = preflight(rt, cfg) if rt.rank == 0 else []
    rt.barrier()
    for split in ["val"] + ["train"] * (not cfg.eval_only):
        find_shards(cfg.data_path, split)
    vocab_size = len(token_bytes(cfg.tokenizer_path, cfg.vocab_size).base_bytes)
    report = Report(rt, replace(cfg, vocab_size=vocab_size))
    if beginning:
        beginning.check(report.cfg, rt.folder)
    open_run(rt)
    if rt.rank == 0:
        announce(rt, replace(cfg, notes=cfg.notes + tuple(notes)))
        report.log_text()
        keep_sources(rt, report.cfg)
    rt.barrier()
    return report


def read_eval_only(cfg: Config) -> bytes:
    """The artifact to score; ConfigError where there is none."""
    try:
        return read_regular(os.path.realpath(cfg.eval_only), MOST_ARTIFACT_BYTES)
    except OSError as error:
        fix = "the path of an artifact.bin"
        raise ConfigError(f"EVAL_ONLY={cfg.eval_only!r}: {error.strerror}; fix: {fix}") from error


def run_stages(rt: Runtime, cfg: Config) -> None:
    """The life of a token, once through."""
    packed = b""
    if cfg.eval_only:
        packed = read_eval_only(cfg)
        stored = read_artifact(cfg.eval_only, packed).cfg
        cfg = replace(cfg, **{name: getattr(stored, name) for name in MODEL_FIELDS}).check()
    else:
        micro_batches(cfg, rt)
    beginning = None
    if cfg.init_from and not checkpoints_to_go_on(rt):  # whose weights are later ones
        beginning = Beginning.read(cfg)
    with rt.clock("data"):
        report = begin_run(rt, cfg, beginning)
    cfg = report.cfg
    if cfg.eval_only:
        rt.log("overlap", documents="unknown")  # of what it was trained on
        warm_up_scoring(GPT(cfg).to(rt.device), rt, cfg, report.text.stream)
    weights = {}
    if not cfg.eval_only:
        weights, packed = train_model(report, beginning)
    note_caps(rt, train_seconds=rt.seconds["train"])
    with rt.clock("eval"):
        if rt.rank == 0:
            rt.mend_folder()
            rt.write("artifact.bin", packed)
            note_caps(rt, bytes=len(pack_script(SCRIPT)) + len(packed))
        rt.release_signals()
    report.check_rest()
    path = rt.folder / "artifact.bin"
    with rt.clock("eval"):
        model = load_artifact(path, rt.device, rt.share(path))
        scores, coding = evaluate(model, weights, report)
        final = scores.log_prob
        if rt.rank == 0 and cfg.mixer != "none":
            final = mix_ngrams(scores, coding, report, model.known)
    note_caps(rt, eval_seconds=rt.seconds["eval"])
    if rt.rank == 0:
        report.finish(model, scores, final, coding)
    rt.barrier()  # a rank that ends earlier could take rank 0 with it


def run(cfg: Config) -> None:
    """What the variables ask for: decode a folder, show what would run, or run it."""
    if cfg.decode:
        return decode_folder(cfg)
    cfg = without_missing_parts(cfg)
    if cfg.dry_run:
        return print_dry_run(Runtime(cfg), cfg)
    rt = Runtime(cfg)
    try:
        rt.start()
        with rt.signals(), rt.bar.heartbeat.beating():
            if cfg.resume == "auto" and rt.largest(rt.finished) and not cfg.overwrite:
                return rt.log("note", f"{rt.folder} is finished")
            run_stages(rt, cfg)
    except Interrupted as end:
        rt.log("note", f"signal {end.code - 128}: {rt.kept()}")
        raise
    finally:
        rt.close()


def main() -> None:
    """Status 0, 2 after a line a fault, or 128 + the number of a signal."""
    try:
        if {"--help", "-h"} & set(sys.argv[1:]):
            print(__doc__ or "python -OO leaves the introduction out")
            return print_help()
        refuse_arguments(sys.argv[1:])
        run(Config.from_env(os.environ))
    except (UserError, OSError) as error:
        lines = str(error).splitlines() if isinstance(error, Missing) else [str(error)]
        for line in lines:
            print("error:", printable(" ".join(line.split())), file=sys.stderr)
        sys.exit(2)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    for stream_name in ("stdout", "stderr"):
        setattr(sys, stream_name, Screen(stream_name, getattr(sys, stream_name)))
    main()
