"""Train, compress, re-read and honestly score a small GPT for the Parameter Golf task, in one file.

The task: least bits per byte (bpb) on FineWeb validation; code + weights <= 16,000,000 bytes; 10
minutes of training and 10 of evaluation on 8xH100. Every number printed as val_bpb is the code
length of a normalised, causal distribution of the artifact re-read from disk.

    python train_gpt.py                                          # laptop: `tiny` on embedded text
    RECORD=pr864 python train_gpt.py                             # one GPU, a published system
    torchrun --standalone --nproc_per_node=8 train_gpt.py        # 8 GPUs, the record configuration
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d \\
        --rdzv_endpoint=HOST:29500 train_gpt.py                  # two hosts, the same on each
    DRY_RUN=1 RECORD=pr864 python train_gpt.py                   # what would run, no data needed
    EVAL_ONLY=runs/tiny_seed1337/artifact.bin python train_gpt.py

Configuration is environment variables (`python train_gpt.py --help`). Results go to runs/<RUN_ID>/.
The file follows the life of a token:

    1 imports and back-ends     5 model                          10 neural scoring
    2 configuration             6 optimizers and schedules       11 n-gram scoring
    3 runtime                   7 weight averaging               13 training loop
    4 data                      9 quantisation and artifact      14 report and main
"""

# -----------------------------------------------------------------------------
# 1. Imports and optional back-ends
# torch and numpy are enough to import this file; a stage asks for the rest when it runs.

import contextlib
import hashlib
import importlib
import importlib.util
import inspect
import io
import json
import lzma
import math
import os
import platform
import re
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent
BACKENDS = {  # optional package -> what needs it
    "sentencepiece": "byte accounting",
    "zstandard": "COMPRESSOR=zstd",
    "numba": "n-gram counts on the CPU",
    "matplotlib": "report.png",
}


class UserError(ValueError):
    """Something the user can mend; main prints it as one line and exits with status 2."""


def backend(name: str) -> Any:
    """Import an optional package, or say what needs it and how to get it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"{BACKENDS[name]} needs {name}; fix: pip install {name}") from error


# -----------------------------------------------------------------------------
# 2. Configuration
# Environment > RECORD's config.env > defaults; each value typed, checked, printed with its origin.

CAP_BYTES = 16_000_000  # of artifact.bin and this file, decimal
SAMPLE_DATA = ROOT / "data/datasets/sample_en"
FINEWEB_DATA = ROOT / "data/datasets/fineweb10B_sp1024"
FINEWEB_TOKENIZER = ROOT / "data/tokenizers/fineweb_1024_bpe.model"
# What the sibling scripts call the same thing -> our name; accepted, with a note.
ALIASES = dict(
    pair.split("=")
    for pair in """USE_EMA=EMA_ENABLED USE_LATE_QAT=LATE_QAT USE_VALUE_RESIDUAL=VALUE_RESIDUAL
    USE_GATED_ATTENTION=GATED_ATTENTION GATED_ATTN=GATED_ATTENTION USE_SMEARGATE=SMEAR_GATE
    USE_TTT=TTT_ENABLED NGRAM_EVAL=NGRAM_ENABLED NGRAM_CACHE=NGRAM_ENABLED
    NGRAM_ORDER=NGRAM_MAX_ORDER NGRAM_EVAL_ORDER=NGRAM_MAX_ORDER
    NGRAM_EVAL_MIN_ORDER=NGRAM_MIN_ORDER NGRAM_EVAL_BUCKETS=NGRAM_BUCKETS
    NGRAM_EVAL_MIN_COUNT=NGRAM_MIN_COUNT NGRAM_EVAL_ALPHA_MIN=NGRAM_ALPHA_MIN
    NGRAM_EVAL_ALPHA_MAX=NGRAM_ALPHA_MAX NGRAM_EVAL_ENTROPY_CENTER=NGRAM_ENTROPY_CENTER
    NGRAM_EVAL_ENTROPY_SCALE=NGRAM_ENTROPY_SCALE""".split()
)
FAMILIES = ("NGRAM_", "MUON_", "EMA_", "SWA_", "BIGRAM_", "TTT_", "XSA_", "QAT_", "CLIP_", "VE_")
PLANNED = ("CHECKPOINT_EVERY", "CODEC_TOKENS", "TTT_ENABLED")  # known, and said to have no effect
PATHS = ("DATA_PATH", "TOKENIZER_PATH", "EVAL_ONLY", "RECORD", "RUN_ID")  # not in a config.env


class ConfigError(UserError):
    """A variable with a wrong name or value."""


@dataclass(frozen=True)
class Config:
    """Everything a run depends on; field `x_y` is environment variable `X_Y`."""

    # Run
    record: str = ""  # folder under records/ with a config.env
    run_id: str = ""  # folder under runs/; default <config>_seed<SEED>
    seed: int = 1337  # of the initial weights
    device: Literal["auto", "cuda", "cpu"] = "auto"  # where to run
    attn_impl: Literal["auto", "sdpa", "fa3", "fa4"] = "auto"  # attention kernel
    dry_run: bool = False  # print configuration and byte budget, then stop
    eval_only: str = ""  # score this artifact instead of training
    overwrite: bool = False  # run again into a finished run folder
    resume: Literal["0", "auto"] = "0"  # auto: go on with the run folder
    checkpoint_every: str = "0"  # steps (10) or minutes (10m); 0: never
    author: str = ""  # for submission.json
    github_id: str = ""  # for submission.json

    # Data
    data_path: str = ""  # folder of *_train_*.bin and *_val_*.bin shards
    tokenizer_path: str = ""  # default tokenizer.model beside the shards
    vocab_size: int = 0  # 0: the tokenizer's
    train_batch_tokens: int = 786_432  # in one step, all ranks together
    train_seq_len: int = 2048  # tokens in a training sequence
    grad_accum_steps: int = 0  # micro-batches; 0: 8 // ranks on CUDA, 1 on CPU

    # Model
    num_layers: int = 11  # the first half feeds U-Net skips to the second
    model_dim: int = 512  # width of the residual stream
    num_heads: int = 8  # query heads
    num_kv_heads: int = 4  # key/value heads
    mlp_mult: float = 3.0  # MLP width over MODEL_DIM
    leaky_slope: float = 0.5  # MLP is leaky_relu(x, slope)^2; 0: relu^2
    tied_embed_init_std: float = 0.005  # of the token embedding, also the head
    logit_softcap: float = 30.0  # logits are c tanh(z / c)
    qk_gain_init: float = 1.5  # gain of each query head
    rope_base: float = 10_000.0  # rotary base
    rope_dims: int = 16  # rotated dimensions of a head; 0: all
    rope_train_seq_len: int = 1024  # longer sequences stretch the base (NTK)
    ln_scale: bool = True  # normed inputs times 1/sqrt(layer + 1)
    xsa_last_n: int = 11  # last layers with exclusive self-attention
    value_residual: bool = False  # mix the first layer's values into the others'
    gated_attention: bool = False  # sigmoid gate on each head's output
    smear_gate: bool = True  # blend in the previous token's embedding
    bos_reset: bool = True  # smear and bigram stop at a document's start
    bigram_vocab_size: int = 2048  # rows of the hashed bigram embedding; 0: none
    bigram_dim: int = 128  # its width
    ve_enabled: bool = True  # second token embedding, added to values
    ve_dim: int = 128  # its width
    ve_layers: tuple[int, ...] = (-2, -1)  # layers that have it; negative: from the end

    # Training
    iterations: int = 20_000  # steps, unless the clock ends them
    max_wallclock_seconds: float = 600.0  # of training; 0: no cap
    warmup_steps: int = 20  # untimed compile warm-up, leaves no trace
    warmdown_iters: int = 3500  # last steps, in which the rate falls to 0
    matrix_lr: float = 0.025  # Muon: the banks
    scalar_lr: float = 0.025  # AdamW: gains, gates, small projections
    tied_embed_lr: float = 0.035  # AdamW: embeddings
    muon_momentum: float = 0.99  # after its warm-up
    muon_momentum_warmup_start: float = 0.92  # at step 0
    muon_momentum_warmup_steps: int = 1500  # steps from one to the other
    muon_backend_steps: int = 5  # Newton-Schulz iterations
    muon_wd: float = 0.04  # decoupled weight decay of the banks
    adam_wd: float = 0.04  # decoupled weight decay of the rest
    beta1: float = 0.9  # AdamW
    beta2: float = 0.95  # AdamW
    adam_eps: float = 1e-8  # AdamW
    grad_clip_norm: float = 0.3  # largest gradient norm; 0: any
    clip: Literal["global", "local"] = "global"  # norm of the averaged or each rank's gradient
    val_loss_every: int = 4000  # steps between validations; 0: never
    train_log_every: int = 500  # steps between log lines

    # Averaging and QAT
    ema_enabled: bool = True  # exponential mean of the weights
    ema_decay: float = 0.997  # weight of the past in a step
    ema_warmup: bool = True  # decay min(EMA_DECAY, (1 + s) / (10 + s))
    swa_enabled: bool = True  # mean of snapshots at rate factors below 0.2
    swa_every: int = 50  # steps between snapshots
    swa_source: Literal["raw", "ema"] = "raw"  # what a snapshot is of
    swa_weight: float = 0.5  # share of SWA beside EMA
    late_qat: bool = True  # train on the export's grid near the end
    late_qat_threshold: float = 0.15  # from this rate factor down
    qat_every: int = 50  # steps between searches of that grid

    # Artifact
    quant_per: Literal["row", "matrix"] = "row"  # unit of a clip
    clip_quantiles: tuple[float, ...] = (0.999, 0.9995, 0.9999, 0.99999, 1.0)  # clips to try
    quant_floor: bool = False  # no scale below 1/31 (int6), 1/127 (int8), as published
    embed_coding: Literal["int6", "int8", "fp16"] = "int8"  # token embedding
    table_coding: Literal["int6", "int8", "fp16"] = "int8"  # bigram and value embedding
    control_coding: Literal["fp16", "fp32"] = "fp16"  # gains, gates and scalars
    compressor: Literal["zstd", "lzma"] = "zstd"  # of the integers

    # Scoring
    eval_seq_len: int = 0  # window in tokens; 0: TRAIN_SEQ_LEN
    eval_stride: int = 64  # new targets in a sliding window
    eval_batch_seqs: int = 32  # windows in a forward pass
    scorer: Literal["sliding", "documents"] = "sliding"  # feeds the mixture
    save_scores: bool = False  # write scores.npz
    ttt_enabled: bool = False  # score-first test-time training
    codec_tokens: int = 0  # targets coded and decoded as proof; -1: all

    # N-gram
    ngram_enabled: bool = True  # score-first n-gram evaluator
    ngram_mixer: Literal["blend", "cascade", "none"] = "blend"  # what val_bpb is
    ngram_min_order: int = 2  # shortest n-gram
    ngram_max_order: int = 9  # longest n-gram
    ngram_min_count: int = 2  # cascade: least count of a context
    ngram_alpha_min: float = 0.05  # cascade: least weight of the counts
    ngram_alpha_max: float = 0.60  # cascade: largest weight of the counts
    ngram_entropy_center: float = 3.0  # cascade: centre of the sigmoid in nats
    ngram_entropy_scale: float = 2.0  # cascade: its steepness
    ngram_scheme: Literal["", "pr864"] = ""  # published pseudo-score to print too
    ngram_buckets: int = 4_194_304  # hashed: counters in a table
    ngram_chunk_tokens: int = 65_536  # hashed: targets between updates
    ngram_caches: int = 1  # hashed: independent caches, as of so many ranks
    pseudo_weights: Literal["artifact", "ema"] = "artifact"  # hashed: model it runs on

    origin: dict = field(default_factory=dict, compare=False, repr=False)
    notes: tuple = field(default=(), compare=False, repr=False)

    @staticmethod
    def from_env(environ: Mapping[str, str]) -> "Config":
        """Resolve a configuration; raises ConfigError naming variable, value and fix.

        Without RECORD: `tiny` where there is no CUDA device or no FineWeb data, else the defaults.
        """
        given, notes = canonical_names(environ)
        refuse_misspelt(given)
        record, why = choose_record(given)
        texts = {name: (text, f"RECORD={record}") for name, text in read_record(record).items()}
        texts |= {name: (text, "env") for name, text in given.items() if name in VARIABLES}
        values = {name: parse(name, text) for name, (text, _) in texts.items()}
        notes += why + [
            f"{n} has no effect yet" for n in PLANNED if values.get(n, "0") not in (0, "0")
        ]
        cfg = Config(**{name.lower(): value for name, value in values.items()})
        origin = {name: source for name, (_, source) in texts.items()}
        return resolve_paths(replace(cfg, record=record, origin=origin, notes=tuple(notes))).check()

    def check(self) -> "Config":
        """Refuse values that cannot work together."""
        for name in VARIABLES:
            value = getattr(self, name.lower())
            most = 1 if name in FRACTIONS else 2**62
            if not isinstance(value, (int, float)) or name == "CODEC_TOKENS":
                continue
            if not 0 <= value <= most or (not value and name in POSITIVE):
                least = "above 0" if name in POSITIVE else "at least 0"
                raise ConfigError(f"{name}={value}: must be {least} and at most {most}")
        layers, head = self.num_layers, self.model_dim // self.num_heads
        for name, broken, wanted in (
            ("NUM_LAYERS", layers < 2, "at least 2"),
            ("NUM_HEADS", self.model_dim % (2 * self.num_heads), "MODEL_DIM / NUM_HEADS even"),
            ("NUM_KV_HEADS", self.num_heads % self.num_kv_heads, "a divisor of NUM_HEADS"),
            ("ROPE_DIMS", not 0 <= self.rope_dims <= head or self.rope_dims % 2, "even, <= a head"),
            ("TRAIN_SEQ_LEN", self.train_seq_len > 2**20, "at most 1,048,576"),
            ("BIGRAM_VOCAB_SIZE", self.bigram_vocab_size == 1, "0 or at least 2"),
            ("VE_LAYERS", not all(-layers <= i < layers for i in self.ve_layers), "layer numbers"),
            ("CLIP_QUANTILES", not all(0 < q <= 1 for q in self.clip_quantiles), "in (0, 1]"),
            ("EVAL_STRIDE", self.window % self.eval_stride, "a divisor of EVAL_SEQ_LEN"),
            (
                "NGRAM_MAX_ORDER",
                not 2 <= self.ngram_min_order <= self.ngram_max_order,
                ">= minimum",
            ),
            ("BETA1", self.beta1 == 1, "below 1"),
            ("BETA2", self.beta2 == 1, "below 1"),
            ("CHECKPOINT_EVERY", not re.fullmatch(r"\d+m?", self.checkpoint_every), "10 or 10m"),
            ("SCORER", self.scorer == "documents", "sliding (documents comes later)"),
        ):
            if broken:
                raise ConfigError(f"{name}={show(getattr(self, name.lower()))}: must be {wanted}")
        return self

    @property
    def window(self) -> int:
        """Tokens in a scoring window."""
        return self.eval_seq_len or self.train_seq_len

    @property
    def value_layers(self) -> list[int]:
        """Layers with a value embedding, from 0."""
        return [i % self.num_layers for i in self.ve_layers] if self.ve_enabled else []


VARIABLES = {f.name.upper(): f for f in fields(Config) if f.compare}
POSITIVE = """MODEL_DIM NUM_HEADS NUM_KV_HEADS MLP_MULT TRAIN_BATCH_TOKENS TRAIN_SEQ_LEN EVAL_STRIDE
 EVAL_BATCH_SEQS SWA_EVERY QAT_EVERY TRAIN_LOG_EVERY LOGIT_SOFTCAP BIGRAM_DIM VE_DIM ITERATIONS
 MUON_BACKEND_STEPS ROPE_BASE ROPE_TRAIN_SEQ_LEN NGRAM_BUCKETS NGRAM_CHUNK_TOKENS NGRAM_CACHES
 ADAM_EPS""".split()
FRACTIONS = """BETA1 BETA2 EMA_DECAY SWA_WEIGHT MUON_MOMENTUM MUON_MOMENTUM_WARMUP_START
 NGRAM_ALPHA_MIN NGRAM_ALPHA_MAX""".split()
MODEL_FIELDS = """vocab_size train_seq_len num_layers model_dim num_heads num_kv_heads mlp_mult
 leaky_slope tied_embed_init_std logit_softcap qk_gain_init rope_base rope_dims rope_train_seq_len
 ln_scale xsa_last_n value_residual gated_attention smear_gate bos_reset bigram_vocab_size
 bigram_dim ve_enabled ve_dim ve_layers embed_coding table_coding control_coding
 compressor""".split()


def parse(name: str, text: str) -> Any:
    """Text of a variable -> value of its type."""
    kind, choices = VARIABLES[name].type, get_args(VARIABLES[name].type)
    if kind is bool or get_origin(kind) is Literal:
        choices = choices or ("0", "1")
        if text not in choices:
            raise ConfigError(f"{name}={text!r}: must be one of {', '.join(map(repr, choices))}")
        return text == "1" if kind is bool else text
    try:
        value = tuple(map(choices[0], text.split(","))) if choices else kind(text)
        if value in (math.inf, -math.inf) or value != value:
            raise ValueError
    except ValueError:
        wanted = f"{kind.__name__}, such as {show(VARIABLES[name].default)}"
        raise ConfigError(f"{name}={text!r}: must be {wanted}") from None
    return value


def show(value: Any) -> str:
    """A value as a config.env writes it."""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(int(value) if isinstance(value, bool) else value)


def canonical_names(environ: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """Replace sibling names by ours; two names of one thing with different values are an error."""
    given, notes = {k: v for k, v in environ.items() if k not in ALIASES}, []
    for alias in sorted(ALIASES.keys() & environ.keys()):
        name = ALIASES[alias]
        if given.setdefault(name, environ[alias]) != environ[alias]:
            raise ConfigError(f"{alias}={environ[alias]!r} contradicts {name}={given[name]!r}")
        notes.append(f"{alias} is read as {name}")
    return given, notes


def refuse_misspelt(names: Mapping[str, str]) -> None:
    """Stop on names near ours or of one of our families; leave the rest of the environment be."""
    for name in sorted(names.keys() - VARIABLES.keys()):
        family = next((prefix for prefix in FAMILIES if name.startswith(prefix)), "")
        known = [ours for ours in VARIABLES.keys() | ALIASES if ours.startswith(family)]
        distance, near = min((edit_distance(name, ours), ours) for ours in known)
        if family or 2 * distance <= min(4, len(name)):  # CI is no misspelt CLIP
            raise ConfigError(f"{name}={names[name]!r} is not a variable; did you mean {near}?")


def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance, in single-character edits."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def choose_record(given: Mapping[str, str]) -> tuple[str, list[str]]:
    """-> (record, or "" for the defaults; why it was chosen where nobody asked)."""
    if given.get("RECORD"):
        return given["RECORD"], []
    cuda = given.get("DEVICE") != "cpu" and torch.cuda.is_available()
    if cuda and (given.get("DATA_PATH") or FINEWEB_DATA.is_dir()):
        return "", ["no RECORD: the project's own configuration, since CUDA and data are here"]
    missing = f"no FineWeb data in {FINEWEB_DATA}" if cuda else "no CUDA device"
    if cuda and int(given.get("WORLD_SIZE", 1)) > 1 and given.get("DRY_RUN", "0") == "0":
        raise ConfigError(f"{missing}; fix: python data/download_fineweb.py, or set DATA_PATH")
    return "tiny", [f"no RECORD: tiny, since there is {missing}"]


def read_record(name: str) -> dict[str, str]:
    """The NAME=value lines of records/**/<name>*/config.env; {} for no record."""
    if not name:
        return {}
    known = {path.parent.name: path for path in (ROOT / "records").glob("**/config.env")}
    found = [name] if name in known else [folder for folder in known if folder.startswith(name)]
    if len(found) != 1:
        raise ConfigError(f"RECORD={name!r}: {len(found)} fit; fix: one of {sorted(known)}")
    pairs = {}
    for line in known[found[0]].read_text(encoding="utf-8").splitlines():
        key, equals, value = line.partition("=")
        if not line.strip() or line.startswith("#"):
            continue
        if not equals or key not in VARIABLES or key in PATHS:
            raise ConfigError(f"{known[found[0]]}: {line!r} is not NAME=value of a setting")
        pairs[key] = value.strip()
    return pairs


def resolve_paths(cfg: Config) -> Config:
    """Fill in the data folder, the tokenizer and the run's name."""
    real = FINEWEB_DATA.is_dir() and cfg.record != "tiny"
    data = Path(cfg.data_path or (FINEWEB_DATA if real else SAMPLE_DATA))
    own = data == SAMPLE_DATA or (data / "tokenizer.model").exists()
    tokenizer = cfg.tokenizer_path or str(data / "tokenizer.model" if own else FINEWEB_TOKENIZER)
    prefix = "eval_" if cfg.eval_only else ""
    run_id = cfg.run_id or f"{prefix}{cfg.record or 'own'}_seed{cfg.seed}"
    if Path(run_id).name != run_id:
        raise ConfigError(f"RUN_ID={run_id!r}: must be a plain folder name")
    return replace(cfg, data_path=str(data), tokenizer_path=tokenizer, run_id=run_id)


def describe_variables() -> dict[str, dict[str, str]]:
    """group -> {name -> meaning}, as the comments of Config say."""
    groups: dict[str, dict[str, str]] = {}
    for line in inspect.getsource(Config).splitlines():
        if line.startswith("    # "):
            groups[line[6:]] = group = {}
        elif found := re.match(r"    (\w+): .* = .*  # (.+)", line):
            group[found[1].upper()] = found[2]
    return groups


def print_help() -> None:
    print(__doc__)
    for group, meanings in describe_variables().items():
        print(f"\n{group}")
        for name, meaning in meanings.items():
            kind, default = VARIABLES[name].type, show(VARIABLES[name].default) or "-"
            choices = "|".join(get_args(kind)) if get_origin(kind) is Literal else ""
            kind = "str" if choices else getattr(kind, "__name__", kind)
            print(f"{name:<28}{kind:<8}{default:<34}{meaning}", f"[{choices}]" if choices else "")


# -----------------------------------------------------------------------------
# 3. Runtime
# Ranks, device, clock, log and seeds: one object, handed down.


@dataclass(frozen=True)
class Line:
    """A log line: `key:value name:x` as text, an object as JSON; names in _ms print as x ms."""

    key: str
    value: Any
    values: dict[str, Any]

    def text(self) -> str:
        head = self.key if self.value is None else f"{self.key}:{self.value}"
        return " ".join([head, *(self.render(*item) for item in self.values.items())])

    def render(self, name: str, value: Any) -> str:
        short, unit = name.removesuffix("_ms"), "ms" if name.endswith("_ms") else ""
        if isinstance(value, float) and not self.key.startswith("final_"):
            value = f"{value:.2f}" if unit else f"{value:.4f}"
        return f"{short}:{value}{unit}"

    def json(self) -> str:
        return json.dumps({"key": self.key, "value": self.value} | self.values)


class Runtime:
    """This process among its ranks: rank, world_size, device, run folder, log, stage clocks."""

    def __init__(self, cfg: Config) -> None:
        self.cfg, self.folder = cfg, Path("runs") / cfg.run_id
        self.rank, self.world_size, local = (
            int(os.environ.get(n, d))
            for n, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
        )
        self.cuda = cfg.device != "cpu" and torch.cuda.is_available()
        if cfg.device == "cuda" and not self.cuda:
            raise ConfigError("DEVICE=cuda: torch sees no CUDA device; fix: DEVICE=cpu")
        self.device = torch.device("cuda", local) if self.cuda else torch.device("cpu")
        self.seconds, self.files = {"train": 0.0, "eval": 0.0}, []

    def start(self) -> None:
        """Threads, seed, kernels, process group; rank 0 opens the run folder's log."""
        local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_ranks))
        torch.manual_seed(self.cfg.seed)
        if self.cuda:
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")
        if self.cfg.attn_impl in ("fa3", "fa4"):
            torch.nn.attention.activate_flash_attention_impl(self.cfg.attn_impl.upper())
        if self.world_size > 1:
            backends = "cpu:gloo,cuda:nccl" if self.cuda else "gloo"
            dist.init_process_group(backends, timeout=timedelta(minutes=15))
        if self.rank == 0:
            paths = [self.folder / name for name in ("log.txt", "metrics.jsonl")]
            self.files = [open(path, "w", encoding="utf-8") for path in paths]

    def log(self, key: str, value: Any = None, **values: Any) -> None:
        """Rank 0 prints the line and appends it to log.txt and metrics.jsonl."""
        if self.rank == 0:
            line = Line(key, value, values)
            print(line.text(), flush=True)
            for file, text in zip(self.files, (line.text(), line.json()), strict=False):
                print(text, file=file, flush=True)

    def any(self, flag: bool) -> bool:
        """True on every rank if true on one; through gloo, without waiting for the device."""
        return bool(self.sum(np.array([int(flag)]))[0])

    def sum(self, array: np.ndarray) -> np.ndarray:
        """Elementwise sum over ranks, in place. Exact where one rank holds each element."""
        if self.world_size > 1:
            dist.all_reduce(torch.from_numpy(array))
        return array

    def barrier(self) -> None:
        self.any(False)

    @contextlib.contextmanager
    def clock(self, stage: str) -> Iterator[None]:
        """Add the block's wall seconds to a budget, "train" or "eval"."""
        began = time.perf_counter()
        yield
        if self.cuda:
            torch.cuda.synchronize()
        self.seconds[stage] += time.perf_counter() - began

    def autocast(self) -> torch.autocast:
        """bf16 on CUDA; fp32 on the CPU, where bf16 is slower."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.cuda)

    def compile(self, function: Any, **how: Any) -> Any:
        return torch.compile(function, dynamic=False, **how) if self.cuda else function


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """What `write(path)` writes appears under its name whole or not at all."""
    partial = path.with_name(f".{path.name}.partial{path.suffix}")
    write(partial)
    os.replace(partial, path)


# -----------------------------------------------------------------------------
# 4. Data
# Shards become training batches and one validation stream with the bytes of each token.

SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_BYTES = 20240520, 1, 1024
BOS = 1


class DataError(UserError):
    """A missing or broken shard or tokenizer."""


def read_shard(path: Path, vocab_size: int) -> np.ndarray:
    """Map one shard: a header of 256 int32 (magic, version, count), then uint16 tokens."""
    size = path.stat().st_size
    header = np.fromfile(path, "<i4", 3) if size >= SHARD_HEADER_BYTES else np.zeros(3, "<i4")
    magic, version, count = map(int, header)
    expected = SHARD_HEADER_BYTES + 2 * count
    for broken, problem in (
        (size < SHARD_HEADER_BYTES, "shorter than its 1,024-byte header"),
        (magic != SHARD_MAGIC, f"magic {magic} instead of {SHARD_MAGIC}, not a token shard"),
        (version != SHARD_VERSION, f"version {version} instead of {SHARD_VERSION}"),
        (count <= 0, f"the header counts {count} tokens"),
        (size != expected, f"length {size} bytes instead of {expected}"),
    ):
        if broken:
            raise DataError(f"{path}: {problem}; fix: write or download it again")
    tokens = np.memmap(path, "<u2", "r", SHARD_HEADER_BYTES)
    if tokens.max() >= vocab_size:
        fix = "use the tokenizer it was written with"
        raise DataError(f"{path}: token {tokens.max()} >= vocabulary {vocab_size}; fix: {fix}")
    return tokens


def find_shards(folder: str, split: str) -> list[Path]:
    """The shards of "train" or "val", in their order."""
    shards = sorted(Path(folder).glob(f"*_{split}_*.bin"))
    if not shards:
        fix = f"python data/prepare_text.py --input TEXT --out {folder}"
        raise DataError(f"DATA_PATH={folder!r}: no *_{split}_*.bin shards there; fix: {fix}")
    return shards


class TokenLoader:
    """Consecutive tokens of the training shards, around and around.

    In each step every rank reads the same TRAIN_BATCH_TOKENS + 1 tokens and takes its own rows, so
    a batch does not depend on the number of ranks. The last target is the next first input.
    """

    def __init__(self, shards: list[Path], vocab_size: int) -> None:
        self.shards, self.vocab_size, self.shard = shards, vocab_size, None
        self.restore({"shard": 0, "offset": 0})

    def state(self) -> dict[str, int]:
        return {"shard": self.shard, "offset": self.offset}

    def restore(self, state: Mapping[str, int]) -> None:
        if self.shard != state["shard"]:
            self.tokens = read_shard(self.shards[state["shard"]], self.vocab_size)
        self.shard, self.offset = state["shard"], state["offset"]

    def take(self, count: int) -> np.ndarray:
        """The next `count` tokens, int64."""
        parts = []
        while count:
            if self.offset == len(self.tokens):
                self.restore({"shard": (self.shard + 1) % len(self.shards), "offset": 0})
            parts.append(self.tokens[self.offset : self.offset + count])
            self.offset += len(parts[-1])
            count -= len(parts[-1])
        return np.concatenate(parts).astype(np.int64)

    def rows(self, cfg: Config, rt: Runtime) -> tuple[Tensor, Tensor]:
        """This rank's inputs and targets of the next step, int64 (rows, TRAIN_SEQ_LEN) each."""
        body = self.take(cfg.train_batch_tokens)
        after = self.state()
        tokens = torch.from_numpy(np.concatenate([body, self.take(1)]))
        self.restore(after)
        inputs, targets = (t.view(-1, cfg.train_seq_len) for t in (tokens[:-1], tokens[1:]))
        share = len(inputs) // rt.world_size
        mine = slice(rt.rank * share, (rt.rank + 1) * share)
        return inputs[mine], targets[mine]


class TokenBytes(NamedTuple):
    """Byte tables of a tokenizer, each (vocab_size,)."""

    base_bytes: np.ndarray  # int64, UTF-8 bytes without one leading space
    leading_space: np.ndarray  # bool
    swallows_space: np.ndarray  # bool: after this token a leading space stands for no byte

    def count(self, targets: np.ndarray, previous: np.ndarray) -> np.ndarray:
        """UTF-8 bytes each target adds to the text, int64."""
        space = self.leading_space[targets] & ~self.swallows_space[previous]
        return self.base_bytes[targets] + space


def token_bytes(tokenizer_path: str, vocab_size: int) -> TokenBytes:
    """Byte accounting of a SentencePiece model; DataError if it is missing or of another size
    (vocab_size 0: any).

    Every U+2581 is one byte, a space; control and unknown ids are none. After them a leading space
    is not charged where the tokenizer strips or invents one; on the official FineWeb models this
    is upstream's rule.
    """
    try:
        model = backend("sentencepiece").SentencePieceProcessor(model_file=str(tokenizer_path))
    except (RuntimeError, OSError) as error:
        fix = "set TOKENIZER_PATH to a SentencePiece model"
        raise DataError(f"TOKENIZER_PATH={tokenizer_path!r}: cannot be read; fix: {fix}") from error
    ids = range(model.vocab_size())
    if vocab_size not in (0, len(ids)):
        fix = "leave VOCAB_SIZE out"
        raise DataError(f"VOCAB_SIZE={vocab_size}: {tokenizer_path} has {len(ids)}; fix: {fix}")
    silent = [model.is_control(i) or model.is_unknown(i) or model.is_unused(i) for i in ids]
    pieces = ["" if none else model.id_to_piece(i) for i, none in zip(ids, silent, strict=True)]
    base = [len(p.removeprefix("▁").replace("▁", " ").encode()) for p in pieces]
    base = np.where([model.is_byte(i) for i in ids], 1, base)
    leading = np.array([p.startswith("▁") for p in pieces])
    invents, keeps = ("".join(model.encode(t, out_type=str))[:1] == "▁" for t in ("a", " a"))
    return TokenBytes(base, leading, np.array(silent) & (invents or not keeps))


class ValidationText:
    """The validation stream: an implied BOS where it lacks one, then targets and their bytes."""

    def __init__(self, cfg: Config) -> None:
        shards = find_shards(cfg.data_path, "val")
        tokens = np.concatenate([read_shard(path, cfg.vocab_size) for path in shards])
        implied = int(tokens[0] != BOS)  # 1: the first token is a target too, predicted from BOS
        self.stream = np.concatenate([np.full(implied, BOS, tokens.dtype), tokens])
        self.targets = self.stream[1:]  # (N,)
        if not len(self.targets):
            raise DataError(f"DATA_PATH={cfg.data_path!r}: validation is one BOS; fix: longer text")
        tables = token_bytes(cfg.tokenizer_path, cfg.vocab_size)
        self.bytes = tables.count(self.targets, self.stream[:-1])
        self.positions = np.arange(len(self.targets)) + 1 - implied  # in the shards


def prepare_sample(rt: Runtime, cfg: Config) -> None:
    """Tokenise the embedded text on its first use; rank 0 works, the others wait."""
    if Path(cfg.data_path) == SAMPLE_DATA and not (SAMPLE_DATA / "tokenizer.model").exists():
        if rt.rank == 0:
            command = [sys.executable, ROOT / "data/prepare_sample.py", "--out", SAMPLE_DATA]
            if subprocess.run(command).returncode:
                raise DataError("data/prepare_sample.py failed, see above")
        rt.barrier()


# -----------------------------------------------------------------------------
# 5. Model
# Tokens in, logits out. The matrices of all layers lie in four banks, for batched Newton-Schulz
# (PR #399); gains and gates lie in stacks, one row a layer.

BANKS = ("qo_bank", "kv_bank", "mlp_up_bank", "mlp_down_bank")
Initialiser = Callable[[Tensor], Any]


class Spec(NamedTuple):
    """All there is to know of a parameter: who initialises, trains and packs it."""

    shape: tuple[int, ...]
    init: Initialiser
    group: str  # "muon", "embed" or "scalar"
    coding: str  # "int6", "int8", "fp16" or "fp32"


def constant(value: float) -> Initialiser:
    return lambda weight: weight.fill_(value)


def normal(std: float) -> Initialiser:
    return lambda weight: weight.normal_(std=std)


def orthogonal(count: int | None = None) -> Initialiser:
    """The first `count` matrices of a bank orthogonal, the rest (output projections) zero."""

    def fill(weight: Tensor) -> None:
        weight.zero_()
        for matrix in weight.view(-1, *weight.shape[-2:])[:count]:
            nn.init.orthogonal_(matrix)

    return fill


def parameter_specs(cfg: Config) -> dict[str, Spec]:
    """Name -> Spec of every parameter that this configuration has."""
    L, D, H, V = cfg.num_layers, cfg.model_dim, cfg.num_heads, cfg.vocab_size
    KV, F_ = D // H * cfg.num_kv_heads, int(cfg.mlp_mult * D)

    def control(init: float | Initialiser, *shape: int) -> Spec:
        fill = init if callable(init) else constant(init)
        return Spec(shape, fill, "scalar", cfg.control_coding)

    specs = {
        "tok_emb": Spec((V, D), normal(cfg.tied_embed_init_std), "embed", cfg.embed_coding),
        "qo_bank": Spec((2 * L, D, D), orthogonal(L), "muon", "int6"),  # L queries, L outputs
        "kv_bank": Spec((2 * L, KV, D), orthogonal(), "muon", "int6"),  # L keys, L values
        "mlp_up_bank": Spec((L, F_, D), orthogonal(), "muon", "int6"),
        "mlp_down_bank": Spec((L, D, F_), constant(0.0), "muon", "int6"),
        "q_gain": control(cfg.qk_gain_init, L, H),
        "attn_scale": control(1.0, L, D),
        "mlp_scale": control(1.0, L, D),
        "resid_mix": control(lambda w: w.copy_(torch.tensor([[1.0], [0.0]])), L, 2, D),
        "skip_weights": control(1.0, L // 2, D),
    }
    if cfg.smear_gate:
        specs["smear"] = control(0.0, D)
    if cfg.bigram_vocab_size:
        rows, width = cfg.bigram_vocab_size, cfg.bigram_dim
        specs["bigram_embed"] = Spec((rows, width), constant(0.0), "embed", cfg.table_coding)
        specs["bigram_proj"] = Spec((D, width), orthogonal(), "scalar", "fp16")
        specs["bigram_scale"] = control(0.05)
    if cfg.value_layers:
        specs["ve_embed"] = Spec((V, cfg.ve_dim), normal(0.01), "embed", cfg.table_coding)
        specs["ve_proj"] = Spec((KV, cfg.ve_dim), orthogonal(), "scalar", "fp16")
        specs["ve_scale"] = control(0.1)
        specs["ve_layer_scales"] = control(1.0, len(cfg.value_layers))
    if cfg.value_residual:
        specs["vr_lambda"] = control(0.5, L, 2)
    if cfg.gated_attention:
        specs["attn_gate_weight"] = control(0.0, L, H, D)
        specs["attn_gate_bias"] = control(4.0, L, H)
    return specs


def count_parameters(cfg: Config) -> int:
    return sum(math.prod(spec.shape) for spec in parameter_specs(cfg).values())


def rms_norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:])


def shift_right(x: Tensor) -> Tensor:
    """x_{t-1} at t, zeros first. (B, T, ...)"""
    return torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1)


def rotary_tables(cfg: Config, length: int) -> tuple[Tensor, Tensor]:
    """cos, sin (length, rope_dims / 2). Training sequences longer than rope_train_seq_len stretch
    the base (NTK rule), for scoring as for training."""
    dims = cfg.rope_dims or cfg.model_dim // cfg.num_heads
    stretch = max(1.0, cfg.train_seq_len / cfg.rope_train_seq_len)
    base = cfg.rope_base * stretch ** (dims / max(1, dims - 2))
    frequencies = base ** -(torch.arange(0, dims, 2, dtype=torch.float64) / dims)
    angles = torch.outer(torch.arange(length, dtype=torch.float64), frequencies)
    return angles.cos().float(), angles.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first 2 * cos.shape[-1] dimensions of each head, half-split. (B, H, T, d)"""
    half = cos.shape[-1]
    a, b, rest = x.split((half, half, x.shape[-1] - 2 * half), dim=-1)
    return torch.cat([a * cos + b * sin, b * cos - a * sin, rest], dim=-1)


def exclude_self(y: Tensor, v: Tensor) -> Tensor:
    """Exclusive self-attention: take from each head's output its part along the position's own
    value. y (B, H, T, d), v (B, H_kv, T, d)"""
    own = F.normalize(v, dim=-1).unsqueeze(2)  # (B, H_kv, 1, T, d)
    grouped = y.unflatten(1, (v.shape[1], -1))
    return (grouped - (grouped * own).sum(-1, keepdim=True) * own).flatten(1, 2)


def fake_quantize(weight: Tensor, scale: Tensor) -> Tensor:
    """Weights on the int6 grid with a straight-through gradient; unchanged where scale is 0.

    The switch is a tensor's value: a compiled graph can neither freeze it, as the published
    scripts did, nor need compiling again in the middle of a run.
    """
    on_grid = round_to_grid(weight, scale.clamp_min(1e-12), INT6_MAX) * scale
    return weight + torch.where(scale > 0, on_grid - weight, 0.0).detach()


class Pass:
    """What the blocks of one forward pass share."""

    def __init__(self, model: "GPT", ids: Tensor, x: Tensor) -> None:
        self.x0, T = x, ids.shape[1]
        self.qo, self.kv, self.up, self.down = (model.bank(name).unbind() for name in BANKS)
        self.rope = model.rope_cos[:T], model.rope_sin[:T]
        self.first_values = self.value_embedding = None
        if model.cfg.value_layers:
            table = F.embedding(ids, model.ve_embed)
            self.value_embedding = model.ve_scale * F.linear(table, model.ve_proj)  # (B, T, KV)


class GPT(nn.Module):
    """The stack of PR #549 with its siblings' switches."""

    def __init__(self, cfg: Config, max_length: int = 0) -> None:
        super().__init__()
        self.cfg = cfg
        for name, spec in parameter_specs(cfg).items():
            self.register_parameter(name, nn.Parameter(torch.full(spec.shape, math.nan)))
        for name in BANKS:
            grid = torch.zeros(*getattr(self, name).shape[:2], 1)  # 0: quantisation is off
            self.register_buffer(f"{name}_grid", grid, persistent=False)
        tables = rotary_tables(cfg, max(max_length, cfg.window))
        for name, table in zip(("rope_cos", "rope_sin"), tables, strict=True):
            self.register_buffer(name, table, persistent=False)

    @torch.no_grad()
    def initialise(self) -> "GPT":
        for name, spec in parameter_specs(self.cfg).items():
            spec.init(getattr(self, name))
            assert getattr(self, name).isfinite().all(), f"nobody initialised {name}"
        return self

    def bank(self, name: str) -> Tensor:
        return fake_quantize(getattr(self, name), getattr(self, f"{name}_grid"))

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats of targets given ids, both int64 (B, T)."""
        logits = self.logits(self.hidden(ids))
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    def hidden(self, ids: Tensor) -> Tensor:
        """(B, T) -> normed output of the last block (B, T, D)"""
        x = self.embed(ids)
        shared, skips, half = Pass(self, ids, x), [], self.cfg.num_layers // 2
        for i in range(self.cfg.num_layers):
            if i >= half and skips:
                x = x + self.skip_weights[i - half] * skips.pop()
            x = self.block(i, x, shared)
            if i < half:
                skips.append(x)
        return rms_norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> softcapped (..., V), at any selection of positions"""
        cap = self.cfg.logit_softcap
        return cap * torch.tanh(F.linear(hidden / cap, self.tok_emb))

    def embed(self, ids: Tensor) -> Tensor:
        """Token + bigram embedding, norm, smear. (B, T) -> (B, T, D)"""
        x = F.embedding(ids, self.tok_emb)
        starts = (ids == BOS) & self.cfg.bos_reset  # a document does not see the one before
        if self.cfg.bigram_vocab_size:
            pairs = F.embedding(self.bigram_index(ids, starts), self.bigram_embed)
            x = x + self.bigram_scale * F.linear(pairs, self.bigram_proj)
        x = rms_norm(x)
        if self.cfg.smear_gate:
            before = shift_right(x).masked_fill(starts.unsqueeze(-1), 0.0)
            x = torch.lerp(x, before, torch.sigmoid(self.smear).type_as(x))
        return x

    def bigram_index(self, ids: Tensor, starts: Tensor) -> Tensor:
        """Hash of (previous, current) id, the last row at a start; wraps as int32 upstream."""
        last, ids = self.cfg.bigram_vocab_size - 1, ids.int()
        index = ((36313 * ids) ^ (27191 * shift_right(ids))) % last
        first = torch.arange(ids.shape[1], device=ids.device) == 0
        return index.masked_fill(starts | first, last)

    def block(self, i: int, x: Tensor, shared: Pass) -> Tensor:
        """(B, T, D) -> (B, T, D)"""
        scale = 1 / math.sqrt(i + 1) if self.cfg.ln_scale else 1.0
        x = self.resid_mix[i, 0] * x + self.resid_mix[i, 1] * shared.x0
        x = x + self.attn_scale[i] * self.attention(i, rms_norm(x) * scale, shared)
        up = F.linear(rms_norm(x) * scale, shared.up[i])
        activation = F.leaky_relu(up, self.cfg.leaky_slope).square()
        return x + self.mlp_scale[i] * F.linear(activation, shared.down[i])

    def attention(self, i: int, h: Tensor, shared: Pass) -> Tensor:
        """Causal grouped-query attention; normed queries and keys, partly rotated."""
        cfg, L = self.cfg, self.cfg.num_layers
        v = self.values(i, h, shared)
        q, k = (self.heads(F.linear(h, bank[i])) for bank in (shared.qo, shared.kv))
        q, k = (rotate(rms_norm(t), *shared.rope) for t in (q, k))
        q = q * self.q_gain[i].view(-1, 1, 1)
        grouped = cfg.num_heads != cfg.num_kv_heads
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        if i >= L - cfg.xsa_last_n:
            y = exclude_self(y, v)  # (B, H, T, d)
        if cfg.gated_attention:
            gate = F.linear(h, self.attn_gate_weight[i], self.attn_gate_bias[i])  # (B, T, H)
            y = y * torch.sigmoid(gate).transpose(1, 2).unsqueeze(-1)
        return F.linear(y.transpose(1, 2).flatten(2), shared.qo[L + i])

    def heads(self, x: Tensor) -> Tensor:
        """(B, T, H * d) -> (B, H, T, d)"""
        return x.unflatten(-1, (-1, self.cfg.model_dim // self.cfg.num_heads)).transpose(1, 2)

    def values(self, i: int, h: Tensor, shared: Pass) -> Tensor:
        """Projection + value embedding, mixed with the first layer's values. (B, H_kv, T, d)"""
        v = F.linear(h, shared.kv[self.cfg.num_layers + i])
        if i in self.cfg.value_layers:
            v = v + self.ve_layer_scales[self.cfg.value_layers.index(i)] * shared.value_embedding
        v = self.heads(v)
        if shared.first_values is None:
            shared.first_values = v
        elif self.cfg.value_residual:
            v = self.vr_lambda[i, 0] * shared.first_values + self.vr_lambda[i, 1] * v
        return v


# -----------------------------------------------------------------------------
# 6. Optimizers and schedules
# Parallel Muon for the banks, AdamW for the rest; every schedule is a pure function.

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # quintic that drives singular values towards 1


def lr_factor(step: int, elapsed_seconds: float, cfg: Config) -> float:
    """Rate factor in [0, 1]: 1, then linear to 0 over the last WARMDOWN_ITERS steps. Under a
    wall-clock cap the steps left are those that fit at the mean step time so far."""
    if cfg.max_wallclock_seconds <= 0:
        left = cfg.iterations - step
        return min(1.0, max(0.0, left / max(1, min(cfg.warmdown_iters, cfg.iterations))))
    warmdown_seconds = cfg.warmdown_iters * elapsed_seconds / max(1, step)
    left_seconds = max(0.0, cfg.max_wallclock_seconds - elapsed_seconds)
    return 1.0 if left_seconds >= warmdown_seconds else left_seconds / warmdown_seconds


def muon_momentum(step: int, cfg: Config) -> float:
    done = min(1.0, step / max(1, cfg.muon_momentum_warmup_steps))
    return (1 - done) * cfg.muon_momentum_warmup_start + done * cfg.muon_momentum


def newton_schulz(matrices: Tensor, steps: int) -> Tensor:
    """Orthogonalise a batch: singular values to about 1, zero matrices stay zero. (n, r, c), the
    dtype of the input. Jordan 2024, https://kellerjordan.github.io/posts/muon"""
    a, b, c = NEWTON_SCHULZ
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices  # the smaller Gram matrix
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Bank:
    """A bank's buffers on this rank, which owns `share` of its matrices (padding at the end)."""

    def __init__(self, weight: nn.Parameter, rt: Runtime) -> None:
        n, *matrix = weight.shape
        share = -(-n // rt.world_size)
        dtype = torch.bfloat16 if rt.cuda else torch.float32
        self.weight, self.scale = weight, max(1.0, matrix[0] / matrix[1]) ** 0.5
        self.padded, self.gradient, self.momentum = (  # gradients out, updates back in `padded`
            torch.zeros(rows, *matrix, dtype=dtype, device=rt.device)
            for rows in (share * rt.world_size, share, share)
        )


class ParallelMuon:
    """Muon with momentum and Newton-Schulz sharded over ranks (PR #399): `reduce` starts the
    reduce-scatters, `step` overlaps each bank's all-gather with the next bank's arithmetic."""

    def __init__(self, weights: list[nn.Parameter], rt: Runtime, cfg: Config) -> None:
        weights = sorted(weights, key=Tensor.numel, reverse=True)  # the longest transfer first
        self.banks, self.rt, self.cfg = [Bank(w, rt) for w in weights], rt, cfg

    def reduce(self) -> None:
        """Start averaging the gradients: each rank gets its share of every bank."""
        # 2.13 renamed the collectives; 2.11 has the old names only
        scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        for bank in self.banks:
            torch.div(bank.weight.grad, self.rt.world_size, out=bank.padded[: len(bank.weight)])
            bank.padded[len(bank.weight) :].zero_()
            if self.rt.world_size == 1:
                bank.gradient, bank.pending = bank.padded, None
            else:
                bank.pending = scatter(bank.gradient, bank.padded, async_op=True)

    def wait(self) -> list[Tensor]:
        """The averaged gradients of this rank's share of every bank."""
        for bank in self.banks:
            if bank.pending:
                bank.pending.wait()
        return [bank.gradient for bank in self.banks]

    @torch.no_grad()
    def step(self, rate: float, momentum: float) -> None:
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        last = None
        for bank in self.banks:
            bank.momentum.mul_(momentum).add_(bank.gradient)
            nesterov = bank.gradient.add(bank.momentum, alpha=momentum)
            update = newton_schulz(nesterov, self.cfg.muon_backend_steps)
            if self.rt.world_size == 1:
                bank.padded, bank.pending = update, None
            else:
                bank.pending = gather(bank.padded, update.contiguous(), async_op=True)
            self.apply(last, rate)
            last = bank
        self.apply(last, rate)

    def apply(self, bank: Bank | None, rate: float) -> None:
        if bank is None:
            return
        if bank.pending:
            bank.pending.wait()
        bank.weight.mul_(1 - rate * self.cfg.muon_wd)
        bank.weight.add_(bank.padded[: len(bank.weight)], alpha=-rate * bank.scale)


def optimizer_groups(cfg: Config) -> dict[str, tuple[list[str], float, float]]:
    """group -> (parameter names, rate, weight decay); every parameter is in exactly one."""
    groups = {
        "muon": ([], cfg.matrix_lr, cfg.muon_wd),
        "embed": ([], cfg.tied_embed_lr, cfg.adam_wd),
        "scalar": ([], cfg.scalar_lr, cfg.adam_wd),
    }
    for name, spec in parameter_specs(cfg).items():
        groups[spec.group][0].append(name)
    return groups


class Optimizers:
    """Averaging over ranks, clipping and update: Muon for the banks, AdamW for the rest."""

    def __init__(self, model: GPT, rt: Runtime, cfg: Config) -> None:
        self.rt, self.cfg, groups = rt, cfg, optimizer_groups(cfg)
        banks = [getattr(model, name) for name in groups.pop("muon")[0]]
        self.muon = ParallelMuon(banks, rt, cfg)
        adam = [
            dict(params=[getattr(model, n) for n in names], base_lr=rate, weight_decay=decay)
            for names, rate, decay in groups.values()
        ]
        betas = (cfg.beta1, cfg.beta2)
        self.adam = torch.optim.AdamW(adam, 0.0, betas, cfg.adam_eps, fused=True)
        self.small = [weight for group in adam for weight in group["params"]]
        self.weights = self.small + banks

    @torch.no_grad()
    def step(self, step: int, factor: float) -> Tensor:
        """Average the gradients over ranks, clip, update, clear. -> gradient norm (scalar)"""
        if self.cfg.clip == "local":  # before averaging, as the published scripts do
            norm = self.clip([w.grad for w in self.weights], [])
        self.muon.reduce()
        self.average_small()
        if self.cfg.clip == "global":
            norm = self.clip([w.grad for w in self.small], self.muon.wait())
        else:
            self.muon.wait()
        for group in self.adam.param_groups:
            group["lr"] = group["base_lr"] * factor
        self.adam.step()
        self.muon.step(self.cfg.matrix_lr * factor, muon_momentum(step, self.cfg))
        for weight in self.weights:
            weight.grad = None
        return norm

    def average_small(self) -> None:
        """One all-reduce for the gradients of everything that is not a bank."""
        if self.rt.world_size > 1:
            flat = torch.cat([w.grad.flatten() for w in self.small])
            dist.all_reduce(flat)
            parts = flat.div_(self.rt.world_size).split([w.numel() for w in self.small])
            for weight, part in zip(self.small, parts, strict=True):
                weight.grad = part.view_as(weight)

    def clip(self, gradients: list[Tensor], shards: list[Tensor]) -> Tensor:
        """Scale to a norm of at most GRAD_CLIP_NORM -> norm before. Shards add up over ranks."""
        square = sum(
            ((s.float() ** 2).sum() for s in shards), torch.zeros((), device=self.rt.device)
        )
        if shards and self.rt.world_size > 1:
            dist.all_reduce(square)
        norm = sum(((g**2).sum() for g in gradients), square).sqrt()
        if self.cfg.grad_clip_norm > 0:
            factor = (self.cfg.grad_clip_norm / (norm + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_([*gradients, *shards], factor)
        return norm


# -----------------------------------------------------------------------------
# 7. Weight averaging
# What is exported: an exponential mean of the weights, the mean of late snapshots, or both.

SWA_FACTOR = 0.2  # snapshots are taken while the rate factor is below this


class Averages:
    """fp32 averages of every parameter, on its device."""

    def __init__(self, model: GPT, cfg: Config) -> None:
        self.cfg, self.names = cfg, [name for name, _ in model.named_parameters()]
        self.weights = [p.data for p in model.parameters()]
        self.ema = [w.clone() for w in self.weights] if cfg.ema_enabled else None
        self.swa, self.snapshots = None, 0

    def update(self, step: int, factor: float) -> None:
        """After optimizer step `step` (from 0)."""
        cfg = self.cfg
        if self.ema:
            warm = (1 + step) / (10 + step) if cfg.ema_warmup else 1.0  # forget the random start
            decay = min(cfg.ema_decay, warm)
            torch._foreach_lerp_(self.ema, self.weights, 1 - decay)
        if cfg.swa_enabled and factor < SWA_FACTOR and (step + 1) % cfg.swa_every == 0:
            source = self.ema if cfg.swa_source == "ema" and self.ema else self.weights
            self.snapshots += 1
            self.swa = self.swa or [torch.zeros_like(w) for w in self.weights]
            torch._foreach_lerp_(self.swa, source, 1 / self.snapshots)

    def final(self) -> dict[str, Tensor]:
        """Name -> weights to export: (1 - SWA_WEIGHT) EMA + SWA_WEIGHT SWA, or the one there is."""
        if self.ema and self.swa:
            mixed = torch._foreach_lerp(self.ema, self.swa, self.cfg.swa_weight)
        else:
            mixed = self.ema or self.swa or self.weights
        return dict(zip(self.names, mixed, strict=True))


# -----------------------------------------------------------------------------
# 9. Quantisation and artifact
# Averaged weights become integers on a searched grid, a compressed container, and weights again.

LARGEST = {"int6": 31, "int8": 127}  # integers -largest .. largest
FLOATS = {"fp16": "<f2", "fp32": "<f4"}
INT6_MAX, INT8_QUANTILE = LARGEST["int6"], 0.9999984
MAGIC, ARTIFACT_VERSION, SHA_BYTES = b"PGOLFGPT", 1, 32
MAX_PAYLOAD = 2**31  # bytes; a header that claims more is refused before anything is unpacked


class ArtifactError(UserError):
    """An artifact that is damaged, foreign or of another configuration; nothing was loaded."""


def candidate_scale(sorted_abs: Tensor, quantile: float, largest: int, floor: bool) -> Tensor:
    """Step of the grid whose end is a quantile of |w| in each row, rounded as it is stored (fp16).
    (..., r, c) ascending -> (..., r, 1)"""
    place = quantile * (sorted_abs.shape[-1] - 1)
    below, above = (sorted_abs[..., i : i + 1] for i in (math.floor(place), math.ceil(place)))
    scale = torch.lerp(below, above, place - math.floor(place)) / largest
    smallest = 1 / largest if floor else 2.0**-24  # 2^-24: the least fp16 above 0
    return scale.clamp_min(smallest).half().float()


def round_to_grid(weight: Tensor, scale: Tensor, largest: int) -> Tensor:
    return (weight / scale).round().clamp(-largest, largest)


def search_grid(weight: Tensor, coding: str, cfg: Config) -> Tensor:
    """GPTQ-lite: of the candidate clips the one with the least squared error, per row or per
    matrix. fp32 (..., r, c) -> scales (..., r, 1)"""
    largest = LARGEST[coding]
    quantiles = cfg.clip_quantiles if coding == "int6" else [INT8_QUANTILE]
    ordered = weight.abs().sort(dim=-1).values
    best_error = torch.full((*weight.shape[:-1], 1), math.inf, device=weight.device)
    best_scale = torch.ones_like(best_error)
    for quantile in quantiles:
        scale = candidate_scale(ordered, quantile, largest, cfg.quant_floor)
        residual = round_to_grid(weight, scale, largest) * scale - weight
        error = residual.square().sum(-1, keepdim=True)
        if cfg.quant_per == "matrix":
            error = error.sum(-2, keepdim=True).expand_as(scale)
        best_scale = torch.where(error < best_error, scale, best_scale)
        best_error = torch.minimum(error, best_error)
    return best_scale


@torch.no_grad()
def update_qat_grids(model: GPT, cfg: Config) -> None:
    """Late QAT trains on the grid that the export would choose for the present weights."""
    for name in BANKS:
        getattr(model, f"{name}_grid").copy_(search_grid(getattr(model, name), "int6", cfg))


def pack_tensor(weight: Tensor, coding: str, cfg: Config) -> bytes:
    """fp16 scales of the rows, then int8 integers; or fp16 / fp32 values. Little-endian."""
    if coding in FLOATS:
        return weight.cpu().numpy().astype(FLOATS[coding]).tobytes()
    scale = search_grid(weight, coding, cfg)
    integers = round_to_grid(weight, scale, LARGEST[coding]).cpu().numpy().astype("i1")
    return scale.cpu().numpy().astype("<f2").tobytes() + integers.tobytes()


def packed_bytes(spec: Spec) -> int:
    """Length of pack_tensor's result."""
    if spec.coding in FLOATS:
        return math.prod(spec.shape) * np.dtype(FLOATS[spec.coding]).itemsize
    return math.prod(spec.shape) + 2 * math.prod(spec.shape[:-1])


def unpack_tensor(packed: bytes, spec: Spec) -> Tensor:
    def floats(part: bytes, kind: str) -> Tensor:
        return torch.from_numpy(np.frombuffer(part, kind).astype(np.float32))

    if spec.coding in FLOATS:
        return floats(packed, FLOATS[spec.coding]).view(spec.shape)
    split = 2 * math.prod(spec.shape[:-1])
    scale = floats(packed[:split], "<f2").view(*spec.shape[:-1], 1)
    return floats(packed[split:], "i1").view(spec.shape) * scale


def compress(payload: bytes, how: str) -> bytes:
    if how == "lzma":
        return lzma.compress(payload, preset=6)
    return backend("zstandard").ZstdCompressor(level=22).compress(payload)


def decompress(data: bytes, how: str, size: int) -> bytes:
    """Raises ArtifactError unless exactly `size` bytes come out; never holds more."""
    opener = lzma.open if how == "lzma" else backend("zstandard").open
    try:
        with opener(io.BytesIO(data)) as file:
            payload = file.read(size + 1)
    except Exception as error:  # each library has its own
        raise ArtifactError(f"the payload does not decompress ({error})") from error
    if len(payload) != size:
        raise ArtifactError("the payload's length is not what the header says")
    return payload


def artifact_header(cfg: Config) -> dict[str, Any]:
    """Model configuration and each tensor's name, shape, coding and offset; nothing of the run."""
    tensors, offset = [], 0
    for name, spec in parameter_specs(cfg).items():
        entry = dict(name=name, shape=list(spec.shape), coding=spec.coding, offset=offset)
        tensors.append(entry)
        offset += packed_bytes(spec)
    model = {name: show(getattr(cfg, name)) for name in MODEL_FIELDS}
    return dict(model=model, tensors=tensors, size=offset)


def pack_artifact(weights: Mapping[str, Tensor], cfg: Config) -> bytes:
    """Quantise and pack: magic, version, header length, JSON header, payload, sha256 of all that.
    The same weights give the same bytes; no pickle."""
    specs = parameter_specs(cfg)
    parts = [pack_tensor(weights[n].detach().float(), s.coding, cfg) for n, s in specs.items()]
    header = json.dumps(artifact_header(cfg), separators=(",", ":")).encode()
    body = MAGIC + struct.pack("<II", ARTIFACT_VERSION, len(header)) + header
    body += compress(b"".join(parts), cfg.compressor)
    return body + hashlib.sha256(body).digest()


def open_container(data: bytes) -> tuple[Config, bytes]:
    """Check magic, digest and version, then the header against what this program would write for
    its model -> (configuration, compressed payload)"""
    start, body = len(MAGIC) + 8, data[:-SHA_BYTES]
    if len(body) < start or not data.startswith(MAGIC):
        raise ArtifactError("not an artifact of this program")
    if hashlib.sha256(body).digest() != data[-SHA_BYTES:]:
        raise ArtifactError("damaged, its sha256 does not fit its bytes")
    version, length = struct.unpack("<II", body[len(MAGIC) : start])
    if version != ARTIFACT_VERSION:
        raise ArtifactError(f"version {version}, this program reads {ARTIFACT_VERSION}")
    try:
        header = json.loads(body[start : start + length])
        values = {name: parse(name.upper(), header["model"][name]) for name in MODEL_FIELDS}
        cfg = Config(**values, eval_stride=1).check()
        if not 4 <= cfg.vocab_size <= 65_536 or header["size"] > MAX_PAYLOAD:
            raise ValueError("vocabulary or size out of range")
        if header != artifact_header(cfg):
            raise ValueError("it does not describe its model")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ArtifactError(f"broken header: {error}") from error
    return cfg, body[start + length :]


def load_artifact(path: str | Path, device: Any = "cpu", max_length: int = 0) -> GPT:
    """Read an artifact back: path -> model in eval mode on `device`, fp32, ready to score
    sequences of TRAIN_SEQ_LEN or `max_length` tokens, whichever is more.

    Raises ArtifactError for anything wrong: missing, damaged, or not what its header says.
    """
    try:
        cfg, compressed = open_container(Path(path).read_bytes())
        specs = parameter_specs(cfg)
        payload = io.BytesIO(
            decompress(compressed, cfg.compressor, sum(map(packed_bytes, specs.values())))
        )
    except OSError as error:
        raise ArtifactError(f"{path}: {error.strerror}; fix: name an artifact.bin") from error
    except ArtifactError as error:
        raise ArtifactError(f"{path}: {error}; fix: train or download it again") from error
    model = GPT(cfg, max_length)
    weights = {n: unpack_tensor(payload.read(packed_bytes(s)), s) for n, s in specs.items()}
    model.load_state_dict(weights)
    return model.to(device).eval().requires_grad_(False)


# -----------------------------------------------------------------------------
# 10. Neural scoring
# Every target of the stream exactly once: its log-probability and the entropy it was drawn from.


class Scores(NamedTuple):
    """Per target, float64 (N,), nats; final for all ranks."""

    log_prob: np.ndarray
    entropy: np.ndarray


def bits_per_byte(log_prob: np.ndarray, token_bytes: np.ndarray) -> float:
    return float(-log_prob.sum() / math.log(2) / token_bytes.sum())


class WindowScorer:
    """Windows of cfg.window inputs, each scoring the `stride` targets at its end; the first ones,
    all from position 0, the targets at theirs. stride = window: no overlap.

    All forward passes have one shape, and batches go to ranks by index: neither the future nor the
    number of ranks changes a value.
    """

    def __init__(self, model: GPT, rt: Runtime, cfg: Config) -> None:
        self.model, self.rt = model, rt
        self.batch, self.length = cfg.eval_batch_seqs, cfg.window
        self.forward = rt.compile(self.score_rows)

    def score_rows(self, ids: Tensor, targets: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
        """ids (B, T), targets (B, S) at rows first (B,).. -> log p, entropy, float64 (B, S)"""
        with self.rt.autocast():
            index = first.unsqueeze(1) + torch.arange(targets.shape[1], device=first.device)
            hidden = self.model.hidden(ids)
            hidden = hidden.gather(1, index.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))
            logits = self.model.logits(hidden)
        log_probs = logits.double().log_softmax(-1)
        entropy = -(log_probs.exp() * log_probs).sum(-1)
        return log_probs.gather(-1, targets.unsqueeze(-1)).squeeze(-1), entropy

    @torch.no_grad()
    def score(self, stream: np.ndarray, stride: int) -> Scores:
        """stream: N + 1 tokens -> Scores of the last N."""
        count, length = len(stream) - 1, self.length
        padded = np.concatenate([stream, np.zeros(length + stride, stream.dtype)]).astype(np.int64)
        ends = np.arange(0, count, stride) + stride  # one window scores targets end - stride .. end
        starts = np.maximum(ends - length, 0)
        batches = -(-len(ends) // self.batch)
        result = np.zeros((2, len(ends) * stride))
        for b in range(self.rt.rank, batches, self.rt.world_size):
            real = np.arange(b * self.batch, min((b + 1) * self.batch, len(ends)))
            window = np.resize(real, self.batch)  # the last batch repeats windows to keep its shape
            ids = padded[starts[window, None] + np.arange(length)]
            span = ends[window, None] - stride + np.arange(stride)
            arrays = ids, padded[span + 1], ends[window] - stride - starts[window]
            scored = self.forward(*(torch.from_numpy(a).to(self.rt.device) for a in arrays))
            for row, values in zip(result, scored, strict=True):
                row[span[: len(real)]] = values[: len(real)].cpu().numpy()
        return Scores(*self.rt.sum(result)[:, :count])


# -----------------------------------------------------------------------------
# 13. Training loop
# Batches, schedules, optimizers, averages and QAT until the steps or the clock run out.


def micro_batches(cfg: Config, rt: Runtime) -> int:
    """Micro-batches of a step on each rank; ConfigError where the batch does not divide."""
    count = cfg.grad_accum_steps or (max(1, 8 // rt.world_size) if rt.cuda else 1)
    unit = cfg.train_seq_len * rt.world_size * count
    if cfg.train_batch_tokens % unit:
        parts = f"TRAIN_SEQ_LEN {cfg.train_seq_len} x {rt.world_size} ranks x {count} micro-batches"
        fix = f"a multiple of {unit} ({parts})"
        raise ConfigError(f"TRAIN_BATCH_TOKENS={cfg.train_batch_tokens}: must be {fix}")
    return count


class Stopwatch:
    """Training time: seconds since the start, without what ran inside `paused`."""

    def __init__(self) -> None:
        self.began = time.perf_counter()

    def seconds(self) -> float:
        return time.perf_counter() - self.began

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.began += time.perf_counter() - began


class Trainer:
    """The state of a training run and its steps."""

    def __init__(self, model: GPT, loader: TokenLoader, rt: Runtime, cfg: Config) -> None:
        self.model, self.loader, self.rt, self.cfg = model, loader, rt, cfg
        self.micro, self.step, self.qat_since = micro_batches(cfg, rt), 0, None
        self.optimizers, self.averages = Optimizers(model, rt, cfg), Averages(model, cfg)
        self.loss = rt.compile(model, fullgraph=True)

    def gradients(self) -> Tensor:
        """Forward and backward over this rank's share of the next batch -> mean loss, detached."""
        rows = self.loader.rows(self.cfg, self.rt)
        inputs, targets = (part.to(self.rt.device).chunk(self.micro) for part in rows)
        total = torch.zeros((), device=self.rt.device)
        for ids, goal in zip(inputs, targets, strict=True):
            with self.rt.autocast():
                loss = self.loss(ids, goal) / self.micro
            loss.backward()
            total += loss.detach()
        return total

    def warm_up(self) -> None:
        """Compile on real data, then rewind: no weight, state or token position is changed."""
        state = self.loader.state()
        for i in range(self.cfg.warmup_steps):
            self.gradients()
            self.rt.log("warmup_step", f"{i + 1}/{self.cfg.warmup_steps}")
        for weight in self.optimizers.weights:
            weight.grad = None
        self.loader.restore(state)

    def update(self, factor: float) -> Tensor:
        """One optimizer step at rate factor `factor` -> training loss."""
        cfg = self.cfg
        if cfg.late_qat and self.qat_since is None and factor < cfg.late_qat_threshold:
            self.qat_since = self.step
            self.rt.log("late_qat:enabled", step=self.step, scale=factor)
        if self.qat_since is not None and (self.step - self.qat_since) % cfg.qat_every == 0:
            update_qat_grids(self.model, cfg)
        loss = self.gradients()
        self.optimizers.step(self.step, factor)
        self.averages.update(self.step, factor)
        self.step += 1
        return loss

    def run(self, validate: Callable[[], tuple[float, float]]) -> dict[str, Tensor]:
        """Train to the last step or the cap -> averaged weights, fp32 by name."""
        cfg, rt, stop = self.cfg, self.rt, False
        self.model.train()
        self.warm_up()
        rt.barrier()
        watch, cap = Stopwatch(), cfg.max_wallclock_seconds
        previous = torch.zeros(())
        while self.step < cfg.iterations and not stop:
            loss = self.update(lr_factor(self.step, watch.seconds(), cfg))
            previous.item()  # keeps the host at most one step ahead of the device
            previous, seconds = loss, watch.seconds()
            stop = cap > 0 and rt.any(seconds >= cap)
            last = stop or self.step == cfg.iterations
            if last or self.step <= 10 or self.step % cfg.train_log_every == 0:
                self.log_step(seconds, train_loss=loss.item())
            if cfg.val_loss_every and (last or self.step % cfg.val_loss_every == 0):
                with watch.paused():
                    val_loss, val_bpb = validate()
                self.log_step(seconds, val_loss=val_loss, val_bpb=val_bpb)
        rt.seconds["train"] = watch.seconds()
        if stop:
            rt.log("stopping_early: wallclock_cap", step=f"{self.step}/{cfg.iterations}")
        rt.log("averages", ema=int(cfg.ema_enabled), swa_snapshots=self.averages.snapshots)
        return self.averages.final()

    def log_step(self, seconds: float, **values: float) -> None:
        values |= {"train_time_ms": int(1000 * seconds), "step_avg_ms": 1000 * seconds / self.step}
        values["tokens_per_s"] = int(self.cfg.train_batch_tokens * self.step / seconds)
        self.rt.log("step", f"{self.step}/{self.cfg.iterations}", **values)


# -----------------------------------------------------------------------------
# 14. Report and main
# The story: configure, train, average, quantise, reload, score, report.

OUTPUTS = """log.txt metrics.jsonl artifact.bin train_gpt.py tokenizer.model config.env blocks.npz
 scores.npz stream.bin report.png submission.json""".split()
BLOCK_TARGETS = 1024


def finished(rt: Runtime) -> bool:
    return (rt.folder / "submission.json").exists()


def open_run_folder(rt: Runtime) -> None:
    """runs/<RUN_ID>/, cleared of an unfinished run; a finished one is not touched unasked."""
    if finished(rt) and not rt.cfg.overwrite:
        fix = "OVERWRITE=1 or another RUN_ID"
        raise ConfigError(f"RUN_ID={rt.cfg.run_id!r}: {rt.folder} is finished; fix: {fix}")
    if rt.rank == 0:
        rt.folder.mkdir(parents=True, exist_ok=True)
        for name in OUTPUTS:
            (rt.folder / name).unlink(missing_ok=True)


def keep_sources(rt: Runtime, cfg: Config) -> None:
    """What the score depends on beside the artifact: code, tokenizer, settings."""
    values = {name: show(getattr(cfg, name.lower())) for name in VARIABLES if name not in PATHS}
    text = "".join(f"{name}={value}\n" for name, value in values.items())
    (rt.folder / "config.env").write_text(text, encoding="utf-8")
    shutil.copyfile(__file__, rt.folder / "train_gpt.py")
    shutil.copyfile(cfg.tokenizer_path, rt.folder / "tokenizer.model")


def announce(rt: Runtime, cfg: Config) -> None:
    """Where, with what, and every value with its origin."""
    for note in cfg.notes:
        rt.log("note", note)
    for group, names in describe_variables().items():
        pairs = ((n, show(getattr(cfg, n.lower())), cfg.origin.get(n, "default")) for n in names)
        rt.log("config", group, **{name: f"{value}({origin})" for name, value, origin in pairs})
    found = {name: int(importlib.util.find_spec(name) is not None) for name in BACKENDS}
    rt.log("backends", threads=torch.get_num_threads(), **found)
    versions = dict(python=platform.python_version(), torch=torch.__version__)
    kind = torch.cuda.get_device_name() if rt.cuda else f"cpu {platform.machine()}"
    rt.log("hardware", f"{rt.world_size} x {kind}", **versions)


def dry_run(rt: Runtime, cfg: Config) -> None:
    """Configuration, parameters, optimizer groups and byte budget, without data or tokenizer."""
    cfg = replace(cfg, vocab_size=cfg.vocab_size or 1024)
    announce(rt, cfg)
    rt.log("batch", micro_batches=micro_batches(cfg, rt), tokens=cfg.train_batch_tokens)
    rt.log("model_params", count_parameters(cfg))
    for group, (names, rate, decay) in optimizer_groups(cfg).items():
        rt.log("optimizer_group", group, rate=rate, decay=decay, parameters=",".join(names))
    specs, code = parameter_specs(cfg).values(), Path(__file__).stat().st_size
    payload = sum(map(packed_bytes, specs))
    spare = sum(math.prod(spec.shape) for spec in specs if spec.coding == "int6") // 4
    rt.log(
        "byte_budget", code=code, payload=payload, at_6_bits=code + payload - spare, cap=CAP_BYTES
    )


class Report:
    """Prints the final lines and writes the run folder's results."""

    def __init__(self, rt: Runtime, cfg: Config, text: ValidationText) -> None:
        self.rt, self.cfg, self.text = rt, cfg, text

    def score(self, stage: str, log_prob: np.ndarray, **more: Any) -> None:
        """A stage's final line, from per-target log-probabilities in nats."""
        bpb = bits_per_byte(log_prob, self.text.bytes)
        self.rt.log(f"final_{stage}_exact", val_loss=float(-log_prob.mean()), val_bpb=bpb, **more)

    def budget(self) -> None:
        """Bytes and seconds against the caps; loud where the artifact is too large."""
        code, weights = (
            (self.rt.folder / name).stat().st_size for name in ("train_gpt.py", "artifact.bin")
        )
        total, seconds = code + weights, self.rt.seconds
        self.rt.log("final_artifact_bytes", code=code, weights=weights, total=total, cap=CAP_BYTES)
        times = dict(train_seconds=seconds["train"], eval_seconds=seconds["eval"])
        self.rt.log("final_budget", **times, cap="600/600")
        if total > CAP_BYTES:
            self.rt.log("OVER THE CAP", f"{total} > {CAP_BYTES} bytes, not a valid submission")

    def write(self, base: Scores, final: np.ndarray) -> None:
        """blocks.npz always, scores.npz with SAVE_SCORES."""
        text, edges = self.text, np.arange(0, len(final), BLOCK_TARGETS)
        sums = dict(logp_model=base.log_prob, logp_final=final, bytes=text.bytes)
        sums = {name: np.add.reduceat(column, edges) for name, column in sums.items()}
        self.save("blocks.npz", sums)
        if self.cfg.save_scores:
            columns = dict(position=text.positions, token=text.targets, bytes=text.bytes)
            columns |= dict(logp_model=base.log_prob, entropy=base.entropy, logp_final=final)
            self.save("scores.npz", columns)

    def save(self, name: str, arrays: dict[str, np.ndarray]) -> None:
        write_atomically(self.rt.folder / name, lambda partial: np.savez(partial, **arrays))

    def finish(self) -> None:
        """submission.json, which marks the run as finished, and report.png."""
        for script in ("submission.py", "plot.py"):
            command = [sys.executable, ROOT / "records" / script, self.rt.folder]
            if subprocess.run(command).returncode:
                self.rt.log("note", f"records/{script} failed; run it again on {self.rt.folder}")


def train_model(rt: Runtime, cfg: Config, text: ValidationText) -> bytes:
    """Train from fresh weights, average, quantise -> the artifact's bytes"""
    model = GPT(cfg).initialise().to(rt.device)
    rt.log("model_params", count_parameters(cfg))
    loader = TokenLoader(find_shards(cfg.data_path, "train"), cfg.vocab_size)
    scorer = WindowScorer(model, rt, cfg)

    def validate() -> tuple[float, float]:
        log_prob = scorer.score(text.stream, scorer.length).log_prob
        return float(-log_prob.mean()), bits_per_byte(log_prob, text.bytes)

    return pack_artifact(Trainer(model, loader, rt, cfg).run(validate), cfg)


def evaluate(model: GPT, rt: Runtime, cfg: Config, report: Report) -> tuple[Scores, np.ndarray]:
    """Score the re-read artifact -> (what feeds the mixture, final log p of each target)"""
    scorer, stream = WindowScorer(model, rt, cfg), report.text.stream
    report.score("int6_roundtrip", scorer.score(stream, scorer.length).log_prob)
    scores = scorer.score(stream, cfg.eval_stride)
    report.score("int6_sliding_window", scores.log_prob, stride=cfg.eval_stride)
    report.score("ngram", scores.log_prob, mixer="none")
    return scores, scores.log_prob


def run(cfg: Config) -> None:
    """The life of a token, once through."""
    rt = Runtime(cfg)
    if cfg.dry_run:
        return dry_run(rt, cfg)
    if cfg.resume == "auto" and finished(rt):
        return rt.log("note", f"{rt.folder} is finished")
    micro_batches(cfg, rt)
    open_run_folder(rt)
    rt.start()
    announce(rt, cfg)
    prepare_sample(rt, cfg)
    if cfg.eval_only:
        stored = load_artifact(cfg.eval_only).cfg
        cfg = replace(cfg, **{name: getattr(stored, name) for name in MODEL_FIELDS})
    cfg = replace(cfg, vocab_size=len(token_bytes(cfg.tokenizer_path, cfg.vocab_size).base_bytes))
    text, path = ValidationText(cfg), rt.folder / "artifact.bin"
    rt.log("val_text", tokens=len(text.targets), bytes=int(text.bytes.sum()))
    packed = Path(cfg.eval_only).read_bytes() if cfg.eval_only else train_model(rt, cfg, text)
    if rt.rank == 0:
        keep_sources(rt, cfg)
        write_atomically(path, lambda partial: partial.write_bytes(packed))
    rt.barrier()
    with rt.clock("eval"):
        model = load_artifact(path, rt.device, cfg.window)
        report = Report(rt, cfg, text)
        scores, final = evaluate(model, rt, cfg, report)
    if rt.rank == 0:
        report.budget()
        report.write(scores, final)
        report.finish()


def main() -> None:
    if {"--help", "-h"} & set(sys.argv[1:]):
        return print_help()
    try:
        run(Config.from_env(os.environ))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
