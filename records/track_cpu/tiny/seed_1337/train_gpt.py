"""Train, compress, re-read and honestly score a small GPT for Parameter Golf, in one file.

The task: least bits per byte (bpb) on FineWeb validation; code + weights <= 16,000,000 bytes; 10
minutes of training and 10 of evaluation on 8xH100. Each val_bpb is a code length, of the artifact
re-read from disk; section 12 spends it and decodes the text.

  python train_gpt.py  # laptop: `tiny` on embedded text
  RECORD=pr864 python train_gpt.py  # one GPU, a published system
  torchrun --standalone --nproc_per_node=8 train_gpt.py  # 8 GPUs, the record configuration
  torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 \\
    train_gpt.py  # on two hosts

Variables configure it (--help, DRY_RUN=1); results go to runs/<RUN_ID>/. The life of a token:
1 imports, 2 configuration, 3 runtime, 4 data, 5 model, 6 optimizers and schedules, 7 weight
averaging, 9 quantisation and artifact, 10 neural scoring, 11 n-gram scoring, 12 codec,
13 training loop, 14 report and main. What no proof needs is in records/: 8 is checkpoint.py.
"""

# -----------------------------------------------------------------------------
# 1. Imports and optional back-ends
# torch and numpy suffice to import this file; a stage asks for more when it runs.

import os

if __name__ == "__main__":  # long spins of idle threads slow a shared CPU
  os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # libgomp reads it at load

import contextlib
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import lzma
import math
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn  # noqa: F401  (imported later, it keeps gloo alive)
import torch.nn.functional as F
from torch import Tensor, nn

CODE = Path(__file__).resolve()
ROOT = CODE.parent


class UserError(ValueError):
  """What the user can mend: main prints one line and exits with status 2."""


def has_backend(name):
  return importlib.util.find_spec(name) is not None


def backend(name):
  """Import an optional package."""
  try:
    return importlib.import_module(name)
  except ImportError as error:
    raise UserError(f"package {name} is missing; fix: pip install {name}") from error


# -----------------------------------------------------------------------------
# 2. Configuration
# Environment > RECORD's config.env > defaults; each value typed and checked.

CAP_BYTES = 16_000_000  # of artifact.bin and this file, decimal
RECORDS = (ROOT / "records/variables.py").exists()  # the file works alone, too
LAUNCH = dict(RANK=0, LOCAL_RANK=0, WORLD_SIZE=1, LOCAL_WORLD_SIZE=1)  # torchrun's variables

Count = Annotated[int, 1, 2**62]  # bounds; a plain number is at least 0
Positive = Annotated[float, 1e-30, 1e30]
Fraction = Annotated[float, 0, 1]
Beta = Annotated[float, 0, 0.999999]


class ConfigError(UserError):
  """A wrong variable."""


def beside(name, *arguments):
  """Call a function of records/, file.function; it is handed this module last."""
  file, _, function = name.partition(".")
  path = ROOT / f"records/{file}.py"
  if not path.exists():
    raise ConfigError(f"{path}: missing, and needed for this; fix: put it back")
  return runpy.run_path(str(path))[function](*arguments, sys.modules[__name__])


@dataclass(frozen=True)
class Config(beside("published.variables") if RECORDS else object):
  """Everything a run depends on; field `x_y` is environment variable `X_Y`, --help says more."""

  # Run
  record: str = ""  # folder in records/
  run_id: str = ""  # else <config>_seed<SEED>
  seed: int = 1337  # of the initial weights
  device: Literal["auto", "cuda", "cpu"] = "auto"
  attn_impl: Literal["auto", "sdpa", "fa3", "fa4"] = "auto"
  dry_run: bool = False
  eval_only: str = ""
  decode: str = ""
  overwrite: bool = False  # a finished run folder
  resume: Literal["0", "auto"] = "0"  # auto: go on with a run
  checkpoint_every: str = "0"  # 10 steps, 10m minutes; 0: on a signal

  # Data
  data_path: str = ""
  tokenizer_path: str = ""
  train_batch_tokens: Count = 786_432  # in a step, all ranks
  grad_accum_steps: int = 0  # 0: 8 // ranks, 1 on CPU

  # Model
  vocab_size: Annotated[int, 0, 65_536] = 0  # 0: the tokenizer's
  train_seq_len: Annotated[int, 1, 2**20] = 2048  # tokens in a sequence
  num_layers: Annotated[int, 2, 999] = 11  # as a U-Net
  model_dim: Count = 512  # residual width
  num_heads: Count = 8  # query heads
  num_kv_heads: Count = 4  # key/value heads
  mlp_mult: Positive = 3.0
  leaky_slope: float = 0.5  # leaky_relu(x)^2; 0: relu^2
  polyglu_enabled: bool = False  # learn each neuron's slope
  depth_recurrence: tuple[int, ...] = ()  # layers applied twice
  tied_embed_init_std: float = 0.005
  overtone_init: bool = False  # its spectrum is 1/sqrt(k)
  ortho_init: bool = True  # orthogonal; 0: uniform
  logit_softcap: Positive = 30.0  # c tanh(z / c)
  qk_gain_init: float = 1.5  # of each query head
  rope_base: Positive = 10_000.0  # rotary base
  rope_dims: int = 16  # rotated in a head; 0: all
  rope_train_seq_len: Count = 1024  # longer: a larger base
  ln_scale: bool = True  # times 1/sqrt(layer + 1)
  xsa_last_n: int = 11  # last layers without self
  value_residual: bool = False
  gated_attention: bool = False  # gate each head
  smear_gate: bool = True  # blend in the token before
  smear_init: Annotated[float, -1e30, 1e30] = 0.0  # logit of its share
  bos_reset: bool = True
  bigram_vocab_size: int = 2048  # rows; 0: none
  bigram_dim: Count = 128
  bigram_kind: Literal["xor", "linear"] = "xor"
  pre_enrich_dim: int = 0  # GELU before the blocks; 0: none
  ve_enabled: bool = True
  ve_dim: Count = 128
  ve_layers: tuple[int, ...] = (-2, -1)  # its layers; -1: the last

  # Artifact
  embed_coding: Literal["int6", "int8", "fp16"] = "int8"
  table_coding: Literal["int6", "int8", "fp16"] = "int8"
  control_coding: Literal["fp16", "fp32"] = "fp16"
  compressor: Literal["zstd", "lzma"] = "zstd"
  quant_per: Literal["row", "matrix"] = "row"
  clip_quantiles: tuple[float, ...] = (0.999, 0.9995, 0.9999, 0.99999, 1.0)
  quant_floor: bool = True  # scale >= 1 / largest
  target_mb: float = 0.0  # MiB, by pruning; 0: any

  # Training
  iterations: Count = 20_000  # steps at most
  max_wallclock_seconds: float = 600.0  # of training; 0: no cap
  warmup_steps: int = 20
  warmdown_iters: int = 3500
  matrix_lr: float = 0.025  # Muon: the banks
  scalar_lr: float = 0.025  # AdamW: gains
  tied_embed_lr: float = 0.035  # AdamW: embeddings
  muon_momentum: Fraction = 0.99
  muon_momentum_warmup_start: Fraction = 0.92  # at step 0
  muon_momentum_warmup_steps: int = 1500
  muon_backend_steps: Count = 5  # Newton-Schulz steps
  muon_wd: float = 0.04
  adam_wd: float = 0.04
  beta1: Beta = 0.9
  beta2: Beta = 0.95
  adam_eps: Positive = 1e-8  # AdamW
  grad_clip_norm: float = 0.3  # 0: any
  clip: Literal["global", "local"] = "global"
  val_loss_every: int = 4000  # steps; 0: never
  train_log_every: Count = 500

  # Averaging and QAT
  ema_enabled: bool = True
  ema_decay: Fraction = 0.997
  ema_warmup: bool = True  # <= (1 + s) / (10 + s)
  swa_enabled: bool = True
  swa_every: Count = 50
  swa_source: Literal["raw", "ema"] = "raw"
  swa_weight: Fraction = 0.5
  qat_enabled: bool = False  # on row grids, from step 0
  late_qat: bool = True
  late_qat_threshold: float = 0.15
  qat_every: Count = 50

  # Scoring
  eval_seq_len: int = 0  # window; 0: TRAIN_SEQ_LEN
  eval_stride: Count = 64
  eval_batch_seqs: Count = 32
  scorer: Literal["sliding", "documents"] = "documents"  # feeds the mixture
  eval_lanes: Count = 1024  # documents side by side
  save_scores: bool = False  # write scores.npz
  codec_tokens: Annotated[int, -1, 2**62] = 1_000_000  # to prove; -1: all
  codec_device: Literal["same", "cpu"] = "same"  # where to prove

  # N-gram
  ngram_enabled: bool = True
  ngram_mixer: Literal["blend", "cascade", "none"] = "blend"  # what val_bpb is
  ngram_min_order: int = 2  # shortest n-gram
  ngram_max_order: Annotated[int, 2, 32] = 9  # longest n-gram

  origin: dict = field(default_factory=dict, compare=False)
  notes: tuple = field(default=(), compare=False)

  @staticmethod
  def from_env(environ):
    """ConfigError names variable, value and fix. Only beside records/ are there RECORDs (`tiny`
    where CUDA or data lack), other names, default data."""
    texts, notes = {name: (environ[name], "env") for name in VARIABLES if name in environ}, ()
    if RECORDS or environ.get("RECORD"):
      texts, notes = beside("variables.resolve", environ)
    values = {name.lower(): parse(name, text) for name, (text, _) in texts.items()}
    origin = {name: source for name, (_, source) in texts.items()}
    cfg = Config(**values, origin=origin, notes=tuple(notes))
    run_id = f"{'eval_' if cfg.eval_only else ''}{cfg.record or 'own'}_seed{cfg.seed}"
    tokenizer = cfg.tokenizer_path or str(Path(cfg.data_path, "tokenizer.model"))
    return replace(cfg, tokenizer_path=tokenizer, run_id=cfg.run_id or run_id).check()

  def check(self):
    layers, longest = self.num_layers, self.ngram_max_order
    head, more = self.model_dim // self.num_heads, getattr(self, "problems", tuple)()
    for name, broken, wanted in (
      ("NUM_HEADS", self.model_dim % (2 * self.num_heads), "MODEL_DIM / NUM_HEADS even"),
      ("NUM_KV_HEADS", self.num_heads % self.num_kv_heads, "a divisor of NUM_HEADS"),
      ("ROPE_DIMS", self.rope_dims > head or self.rope_dims % 2, "even, <= a head"),
      ("BIGRAM_VOCAB_SIZE", self.bigram_vocab_size == 1, "0 or at least 2"),
      ("VE_LAYERS", not all(-layers <= i < layers for i in self.ve_layers), f"< {layers}"),
      ("DEPTH_RECURRENCE", not {*self.depth_recurrence} <= {*range(layers)}, f"< {layers}"),
      ("CLIP_QUANTILES", not all(0 < q <= 1 for q in self.clip_quantiles), "in (0, 1]"),
      ("EVAL_STRIDE", self.window % self.eval_stride, "a divisor of EVAL_SEQ_LEN"),
      ("NGRAM_MIN_ORDER", not 2 <= self.ngram_min_order <= longest, f"2 to {longest}"),
      ("CHECKPOINT_EVERY", not self.checkpoint_every.removesuffix("m").isdecimal(), "10 or 10m"),
      ("SCORER", not RECORDS and self.scorer == "sliding", "documents without records/"),
      ("MODEL_DIM", count_parameters(self) >= 2**31, "smaller"),
      ("RUN_ID", not Path(self.run_id).name == self.run_id != "..", "a plain folder name"),
      *more,
    ):
      if broken:
        raise ConfigError(f"{name}={show(getattr(self, name.lower()))}: must be {wanted}")
    return self

  @property
  def window(self):
    return self.eval_seq_len or self.train_seq_len

  @property
  def mixer(self):
    return self.ngram_mixer if self.ngram_enabled else "none"

  @property
  def orders(self):
    return f"{self.ngram_min_order}-{self.ngram_max_order}"

  @property
  def value_layers(self):
    return [i % self.num_layers for i in self.ve_layers] if self.ve_enabled else []


VARIABLES = {f.name.upper(): f for f in fields(Config) if f.compare}
NAMES = [f.name for f in fields(Config)]
MODEL_FIELDS = NAMES[NAMES.index("vocab_size") : NAMES.index("quant_per")]  # in the artifact


def parse(name, text):
  """Text of a variable -> value of its type, within its bounds."""
  kind, default = VARIABLES[name].type, VARIABLES[name].default
  least, most = getattr(kind, "__metadata__", (0, 2**62))
  wanted = f"{type(default).__name__}, {least} to {most:g}, such as {show(default)}"
  with contextlib.suppress(KeyError, ValueError):
    if isinstance(default, tuple):
      return tuple(map(get_args(kind)[0], text.split(",") if text or default else ()))
    if isinstance(default, bool | str):
      known = {"0": False, "1": True} if kind is bool else {x: x for x in get_args(kind) or [text]}
      wanted = " or ".join(map(repr, known))
      return known[text]
    value = type(default)(text)
    if least <= value <= most:
      return value
  raise ConfigError(f"{name}={text!r}: must be {wanted}")


def show(value):
  parts = value if isinstance(value, tuple) else (value,)
  return ",".join(str(int(x) if isinstance(x, bool) else x) for x in parts)


# -----------------------------------------------------------------------------
# 3. Runtime
# Ranks, device, clock, log and seeds: one object, handed down.


def line_text(key, value, values):
  """`key:value name:x`; floats in full in final lines only."""
  words = [key if value is None else f"{key}:{value}"]
  for name, x in values.items():
    unit = "ms" if name.endswith("_ms") else ""
    if isinstance(x, float) and not key.startswith("final_"):
      x = f"{x:.2f}" if unit else f"{x:.4f}"
    words.append(f"{name.removesuffix('_ms')}:{x}{unit}")
  return " ".join(words)


class Runtime:
  """A process among its ranks: device, run folder, log, clocks."""

  def __init__(self, cfg):
    self.cfg, self.folder = cfg, Path("runs") / cfg.run_id
    ranks = (int(os.environ.get(name, alone)) for name, alone in LAUNCH.items())
    self.rank, local, self.world_size, self.local_ranks = ranks
    self.cuda = cfg.device != "cpu" and torch.cuda.is_available()
    if cfg.device == "cuda" and not self.cuda:
      raise ConfigError("DEVICE=cuda: torch sees no CUDA device; fix: DEVICE=cpu")
    self.device = torch.device(f"cuda:{local}" if self.cuda else "cpu")
    self.finished = (self.folder / "submission.json").exists()
    self.seconds, self.files = {"train": 0.0, "eval": 0.0}, [sys.stdout]

  def start(self):
    """Threads, seed, kernels, process group, log."""
    affinity = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))  # Linux
    torch.set_num_threads(max(1, len(affinity(0)) // self.local_ranks))
    torch.manual_seed(self.cfg.seed)
    if self.cuda:
      torch.cuda.set_device(self.device)
      torch.set_float32_matmul_precision("high")
    if self.cfg.attn_impl in ("fa3", "fa4"):
      torch.nn.attention.activate_flash_attention_impl(self.cfg.attn_impl.upper())
    if self.world_size > 1:
      backends = "cpu:gloo,cuda:nccl" if self.cuda else "gloo"
      dist.init_process_group(backends, timeout=timedelta(minutes=15))
      self.patient = dist.new_group(backend="gloo", timeout=timedelta(days=1))

  def log(self, key, value=None, **values):
    """On rank 0, to standard output, log.txt and metrics.jsonl."""
    if self.rank == 0:
      text, entry = line_text(key, value, values), json.dumps(dict(key=key, value=value) | values)
      for file, line in zip(self.files, (text, text, entry), strict=False):
        print(line, file=file, flush=True)

  def sum(self, array, how=dist.ReduceOp.SUM):
    """Over ranks, in place, through gloo, without waiting for the device"""
    if self.world_size > 1:
      dist.all_reduce(torch.from_numpy(array), how)
    return array

  def largest(self, *values):
    return self.sum(np.array(values, float), dist.ReduceOp.MAX)

  def barrier(self):
    """However long rank 0 takes"""
    if self.world_size > 1:
      dist.barrier(self.patient)

  def share(self, path):
    """Rank 0's file, to every rank: hosts share no disk"""
    data = np.fromfile(path, np.uint8) if self.rank == 0 else np.zeros(0, np.uint8)
    return self.sum(np.pad(data, (0, int(self.largest(len(data)).item()) - len(data)))).tobytes()

  def tick(self, stage, done, total):
    """Of a long loop; on a terminal records/progress.py draws it."""

  @contextlib.contextmanager
  def signals(self):
    """-> SIGINT, SIGTERM that came; a second one ends the process at once."""
    came, before = [], {}

    def handle(number, _):
      came.append(number)
      for each in before:
        signal.signal(each, signal.SIG_DFL)

    for each in (signal.SIGINT, signal.SIGTERM):
      before[each] = signal.signal(each, handle)
    try:
      yield came
    finally:
      for handler in before.items():
        signal.signal(*handler)

  @contextlib.contextmanager
  def clock(self, stage):
    """Add the block's seconds to a budget."""
    began = time.perf_counter()
    yield
    self.seconds[stage] += time.perf_counter() - began

  def autocast(self):
    """bf16 on CUDA; fp32 on the CPU, where bf16 is slower."""
    return torch.autocast(self.device.type, torch.bfloat16, enabled=self.cuda)

  def graph(self, function, *inputs):
    """On CUDA one launch, captured here; outputs are overwritten"""
    if not self.cuda:
      return function
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
      function(*inputs)  # what a first use makes is not captured
    with torch.cuda.graph(graph := torch.cuda.CUDAGraph()):
      outputs = function(*inputs)

    def replay(*values):
      torch._foreach_copy_(inputs, values)
      graph.replay()
      return outputs

    return replay

  def compile(self, function, **how):
    return torch.compile(function, dynamic=False, **how) if self.cuda else function


def write_atomically(path, write):
  """The bytes, or what write(path) writes, appear whole or not at all, whatever dies."""
  partial = path.with_name(f".partial_{path.name}")
  try:
    write(partial) if callable(write) else partial.write_bytes(write)
    flush(partial)
    os.replace(partial, path)
    flush(path.parent)
  except OSError as error:
    partial.unlink(missing_ok=True)
    raise UserError(f"{path}: {error}; fix: make room there") from error


def flush(path):
  """To the disk."""
  file = os.open(path, os.O_RDONLY)
  os.fsync(file)
  os.close(file)


# -----------------------------------------------------------------------------
# 4. Data
# Shards become training batches and a validation stream with the bytes of each token.

SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_BYTES = 20240520, 1, 1024
BOS = 1


def read_shard(path, vocab_size):
  """A header of 256 int32 (magic, version, count), then uint16 tokens, mapped"""
  size = path.stat().st_size
  header = np.fromfile(path, "<i4", 3) if size >= SHARD_HEADER_BYTES else (0, 0, 0)
  magic, version, count = map(int, header)
  wanted = SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_BYTES + 2 * count
  if (magic, version, size) != wanted or count < 1:
    found = f"magic {magic}, version {version}, length {size} for {count} tokens"
    raise UserError(f"{path}: {found} instead of {wanted}; fix: write or download it again")
  tokens = np.memmap(path, "<u2", "r", SHARD_HEADER_BYTES)
  if tokens.max() >= vocab_size:
    raise UserError(f"{path}: token {tokens.max()} >= vocabulary {vocab_size}; fix: its tokenizer")
  return tokens


def find_shards(folder, split):
  shards = sorted(Path(folder).glob(f"*_{split}_*.bin"))
  if not shards:
    raise UserError(f"DATA_PATH={folder!r}: no *_{split}_*.bin; fix: see data/prepare_text.py")
  return shards


class TokenLoader:
  """Training tokens, around and around. Every rank reads a step's TRAIN_BATCH_TOKENS + 1 and takes
  its rows; the last token is the next step's first."""

  def __init__(self, shards, vocab_size):
    self.shards, self.vocab_size, self.shard = shards, vocab_size, None
    self.restore((0, 0))

  def state(self):
    return self.shard, self.offset

  def restore(self, state):
    shard, self.offset = state
    if shard != self.shard:
      self.shard, self.tokens = shard, read_shard(self.shards[shard], self.vocab_size)

  def rows(self, cfg, rt):
    """This rank's inputs and targets of the next step, int64 (rows, TRAIN_SEQ_LEN)."""
    tokens, size = self.tokens[:0], cfg.train_batch_tokens
    while len(tokens) <= size:
      if self.offset == len(self.tokens):
        self.restore(((self.shard + 1) % len(self.shards), 0))
      part = self.tokens[self.offset :][: size + 1 - len(tokens)]
      tokens, self.offset = np.append(tokens, part), self.offset + len(part)
    self.offset -= 1
    tokens = torch.from_numpy(tokens.astype(np.int64))
    rows = (t.view(-1, cfg.train_seq_len) for t in (tokens[:-1], tokens[1:]))
    return [t.chunk(rt.world_size)[rt.rank] for t in rows]


class TokenBytes(NamedTuple):
  """Byte tables of a tokenizer, each (vocab_size,)."""

  base_bytes: np.ndarray  # int64, UTF-8, without one leading space
  leading_space: np.ndarray  # bool
  swallows_space: np.ndarray  # bool: after this token a leading space is no byte

  def count(self, targets, previous):
    """UTF-8 bytes of each target, int64."""
    space = self.leading_space[targets] & ~self.swallows_space[previous]
    return self.base_bytes[targets] + space


def token_bytes(tokenizer_path: str, vocab_size: int) -> TokenBytes:
  """Byte accounting of a SentencePiece model of this size (0: any). Every U+2581 is one byte, a
  space; control and unknown ids are none, and after them a leading space is free where the
  tokenizer strips or invents one (upstream's rule on its own models)."""
  try:
    model = backend("sentencepiece").SentencePieceProcessor(model_file=str(tokenizer_path))
    ids = [*range(model.vocab_size())]
    model.id_to_piece(ids)  # all of them text
  except (RuntimeError, OSError, UnicodeError) as error:
    raise UserError(f"TOKENIZER_PATH={tokenizer_path!r}: must be SentencePiece's") from error
  if vocab_size not in (0, len(ids)):
    raise UserError(f"VOCAB_SIZE={vocab_size}: must be that of {tokenizer_path}, {len(ids)}")
  silent = np.any([model.is_control(ids), model.is_unknown(ids), model.is_unused(ids)], axis=0)
  pieces = ["" if silent[i] else model.id_to_piece(i) for i in ids]
  leading = np.array([piece.startswith("▁") for piece in pieces])
  sizes = [len(piece.replace("▁", " ").encode()) for piece in pieces]
  base = np.where(model.is_byte(ids), 1, sizes - leading)
  invents, keeps = ("".join(model.encode(t, out_type=str))[:1] == "▁" for t in ("a", " a"))
  return TokenBytes(base, leading, silent & (invents or not keeps))


class ValidationText:
  """The validation stream from a BOS on, its targets and their bytes."""

  def __init__(self, cfg):
    shards = [read_shard(path, cfg.vocab_size) for path in find_shards(cfg.data_path, "val")]
    implied = int(shards[0][0] != BOS)  # 1: the first token is a target too
    self.stream = np.concatenate([np.full(implied, BOS, np.uint16), *shards])
    self.targets = self.stream[1:]  # (N,)
    tables = token_bytes(cfg.tokenizer_path, cfg.vocab_size)
    self.bytes = tables.count(self.targets, self.stream[:-1])
    self.positions = np.arange(len(self.targets)) + 1 - implied  # in the shards
    if not self.bytes.sum():
      raise UserError(f"DATA_PATH={cfg.data_path!r}: no text to validate on; fix: more text")


# -----------------------------------------------------------------------------
# 5. Model
# Tokens in, logits out. The matrices of all layers lie in four banks (PR #399), for batched
# Newton-Schulz; gains and gates in stacks, one row a layer.

BANKS = ("qo_bank", "kv_bank", "mlp_up_bank", "mlp_down_bank")


class Spec(NamedTuple):
  """Who initialises, trains and packs a parameter."""

  shape: tuple[int, ...]
  init: float | Callable[[Tensor], Any]
  group: str  # "muon", "embed", "scalar" or "routing"
  coding: str  # "int6", "int8", "fp16" or "fp32"


def normal(std):
  return lambda weight: weight.normal_(std=std)


def uniform(weight):
  return weight.uniform_(-1, 1).mul_(weight.shape[-1] ** -0.5)


def orthogonal(weight):
  for matrix in weight.view(-1, *weight.shape[-2:]):
    nn.init.orthogonal_(matrix)


def parameter_specs(cfg):
  """Name -> Spec of every parameter."""
  L, D, H, V, B = cfg.num_layers, cfg.model_dim, cfg.num_heads, cfg.vocab_size, cfg.bigram_dim
  KV, F_ = D // H * cfg.num_kv_heads, int(cfg.mlp_mult * D)
  std, matrix = cfg.tied_embed_init_std, orthogonal if cfg.ortho_init else uniform

  def gain(init, *shape):
    return Spec(shape, init, "scalar", cfg.control_coding)

  bigram, linear = cfg.bigram_vocab_size, cfg.bigram_kind == "linear"
  start, *group = (normal(0.01), "muon", "muon") if linear else (0.0, "embed", "scalar")
  ve, enrich, gate = cfg.value_layers, cfg.pre_enrich_dim, cfg.gated_attention
  table, first = cfg.table_coding, lambda w: w.copy_(torch.tensor([[1.0], [0.0]]))
  token = functools.partial(beside, "published.overtone", std) if cfg.overtone_init else normal(std)
  specs = {
    "tok_emb": Spec((V, D), token, "embed", cfg.embed_coding),
    # L queries; L outputs, from zero
    "qo_bank": Spec((2 * L, D, D), lambda w: matrix(w.zero_()[:L]), "muon", "int6"),
    "kv_bank": Spec((2 * L, KV, D), matrix, "muon", "int6"),  # L keys, L values
    "mlp_up_bank": Spec((L, F_, D), matrix, "muon", "int6"),
    "mlp_down_bank": Spec((L, D, F_), 0.0, "muon", "int6"),
    "q_gain": gain(cfg.qk_gain_init, L, H),
    "attn_scale": gain(1.0, L, D),
    "mlp_scale": gain(1.0, L, D),
    "resid_mix": gain(first, L, 2, D),
    "skip_weights": gain(1.0, L // 2, D),
    "smear": cfg.smear_gate and gain(cfg.smear_init, D),
    "bigram_embed": bigram and Spec((bigram, B), start, group[0], table),
    "bigram_proj": bigram and Spec((D, B), matrix, group[1], "fp16"),
    "bigram_scale": bigram and not linear and gain(0.05),
    "enrich_up": enrich and Spec((enrich, D), uniform, "muon", "int6"),
    "enrich_down": enrich and Spec((D, enrich), uniform, "muon", "int6"),
    "ve_embed": ve and Spec((V, cfg.ve_dim), normal(0.01), "embed", table),
    "ve_proj": ve and Spec((KV, cfg.ve_dim), matrix, "scalar", "fp16"),
    "ve_scale": ve and gain(0.1),
    "ve_layer_scales": ve and gain(1.0, len(ve)),
    "vr_lambda": cfg.value_residual and gain(0.5, L, 2),
    "attn_gate_weight": gate and gain(0.0, L, H, D),
    "attn_gate_bias": gate and gain(4.0, L, H),
    "routing_alpha": cfg.polyglu_enabled and Spec((L, F_), 0.0, "routing", "fp16"),
  }
  return {name: spec for name, spec in specs.items() if spec}


def count_parameters(cfg):
  return sum(math.prod(spec.shape) for spec in parameter_specs(cfg).values())


def rms_norm(x):
  return F.rms_norm(x, x.shape[-1:])


def rotary(cfg, positions):
  """(n,) -> cos, sin: (2, n, rope_dims / 2); longer training stretches the base (NTK rule)"""
  dims = cfg.rope_dims or cfg.model_dim // cfg.num_heads
  stretch = max(1.0, cfg.train_seq_len / cfg.rope_train_seq_len)
  base = cfg.rope_base * stretch ** (dims / max(1, dims - 2))
  exponents = torch.arange(0, dims, 2, dtype=torch.float64, device=positions.device) / dims
  angles = torch.outer(positions.double(), base**-exponents)
  return torch.stack([angles.cos(), angles.sin()]).float()


def rotate(x, cos, sin):
  """The first 2 * cos.shape[-1] dimensions of each head, half-split. (B, H, T, d)"""
  half = cos.shape[-1]
  a, b, rest = x.split((half, half, x.shape[-1] - 2 * half), dim=-1)
  return torch.cat([a * cos + b * sin, b * cos - a * sin, rest], dim=-1)


def exclude_self(y, v):
  """Without the part along the position's own value. y (B, H, T, d), v (B, H_kv, T, d)"""
  own = F.normalize(v, dim=-1).unsqueeze(2)  # (B, H_kv, 1, T, d)
  grouped = y.unflatten(1, (v.shape[1], -1))
  return (grouped - (grouped * own).sum(-1, keepdim=True) * own).flatten(1, 2)


def fake_quantize(weight, scale):
  """On the int6 grid, with a straight-through gradient; unchanged where scale is 0: a switch that
  no compiled graph freezes (the published ones did)."""
  on_grid = round_to_grid(weight, scale.clamp_min(1e-12), LARGEST["int6"]) * scale
  return weight + torch.where(scale > 0, on_grid - weight, 0.0).detach()


class Pass:
  """What the blocks of a forward pass share, and how they see the past: rows of tokens."""

  def __init__(self, model, ids):
    positions = torch.arange(ids.shape[1], device=ids.device)
    self.first, self.rope = positions == 0, rotary(model.cfg, positions)
    self.qo, self.kv, self.up, self.down = (model.bank(name).unbind() for name in BANKS)
    self.first_values = None

  def before(self, _, x):
    """x_{t-1} at t, zeros first. (B, T, ...)"""
    return torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1)

  def attend(self, q, k, v, mask=None):
    """(B, H, T, d), (B, H_kv, T, d) twice -> (B, H, T, d)"""
    how = dict(is_causal=mask is None, enable_gqa=q.shape[1] != k.shape[1])
    return F.scaled_dot_product_attention(q, k, v, mask, **how)


class Lanes(Pass):
  """A token a lane a step, each lane in a document of its own, with the last `window` keys and
  values of each attention (a layer applied twice has two)."""

  def __init__(self, model, count, window):
    cfg, device = model.cfg, model.tok_emb.device
    super().__init__(model, torch.zeros(count, 1, device=device))
    self.cfg, self.lane, self.past = cfg, torch.arange(count, device=device), {}
    calls = cfg.num_layers + len({*cfg.depth_recurrence})
    shape = calls, 2, count, cfg.num_kv_heads, window, cfg.model_dim // cfg.num_heads
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    self.caches = torch.zeros(shape, dtype=dtype, device=device)
    self.slots = torch.arange(window, device=device)

  def begin(self, positions):
    """positions (B,): in the lanes' documents; 0 forgets the one before."""
    self.first, self.call, self.first_values = positions.unsqueeze(1) == 0, 0, None
    self.rope = rotary(self.cfg, positions)[:, :, None, None]
    self.slot, self.seen = positions % len(self.slots), self.slots <= positions.unsqueeze(1)

  def before(self, name, x):
    old = self.past.setdefault(name, torch.zeros_like(x))
    before = old.masked_fill(self.first.view(-1, *[1] * (x.dim() - 1)), 0)
    old.copy_(x)
    return before

  def attend(self, q, k, v):
    past = self.caches[self.call]  # keys and values
    past[:, self.lane, :, self.slot] = torch.cat([k, v], 2).transpose(1, 2).type_as(past)
    self.call += 1
    return super().attend(q, *past, self.seen[:, None, None])


class GPT(nn.Module):
  """The stack of PR #549 with its siblings' switches."""

  def __init__(self, cfg):
    super().__init__()
    self.cfg = cfg
    for name, spec in parameter_specs(cfg).items():
      self.register_parameter(name, nn.Parameter(torch.full(spec.shape, math.nan)))
      if spec.group == "muon" and "bigram" not in name:
        grid = torch.zeros(*spec.shape[:-1], 1)  # 0: quantisation is off
        self.register_buffer(f"{name}_grid", grid, persistent=False)

  @torch.no_grad()
  def initialise(self):
    for name, spec in parameter_specs(self.cfg).items():
      weight = getattr(self, name)
      spec.init(weight) if callable(spec.init) else weight.fill_(spec.init)
      assert weight.isfinite().all(), f"nobody initialised {name}"
    return self

  def bank(self, name):
    """A Muon parameter; while training, on its grid if it has one."""
    weight = getattr(self, name)
    if not self.training:
      return weight
    if self.cfg.qat_enabled:  # PR #810
      return fake_quantize(weight, weight.detach().abs().amax(-1, keepdim=True) / LARGEST["int6"])
    return fake_quantize(weight, getattr(self, f"{name}_grid"))

  def forward(self, ids, targets):
    """Mean cross-entropy in nats of targets given ids, both int64 (B, T)."""
    logits = self.logits(self.hidden(ids))
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

  def hidden(self, ids, shared=None):
    """(B, T) -> normed output of the last block (B, T, D)"""
    shared, skips, half = shared or Pass(self, ids), [], self.cfg.num_layers // 2
    x = self.embed(ids, shared)
    for i in range(self.cfg.num_layers):
      if i >= half and skips:
        x = x + self.skip_weights[i - half] * skips.pop()
      for _ in range(1 + (i in self.cfg.depth_recurrence)):
        x = self.block(i, x, shared)
      if i < half:
        skips.append(x)
    return rms_norm(x)

  def logits(self, hidden):
    """(..., D) -> softcapped (..., V), at any selection of positions"""
    cap = self.cfg.logit_softcap
    return cap * torch.tanh(F.linear(hidden / cap, self.tok_emb))

  def embed(self, ids, shared):
    """Token + bigram embedding, norm, smear; with pre-enrichment the norm comes last.
    (B, T) -> (B, T, D)"""
    cfg, x = self.cfg, F.embedding(ids, self.tok_emb)
    starts = (ids == BOS) & cfg.bos_reset  # a document does not see the one before
    if cfg.bigram_vocab_size:
      pairs = F.embedding(self.bigram_index(ids, starts, shared), self.bigram_embed)
      scale = 1.0 if cfg.bigram_kind == "linear" else self.bigram_scale
      x = x + scale * F.linear(pairs, self.bigram_proj)
    x = x if cfg.pre_enrich_dim else rms_norm(x)
    if cfg.smear_gate:
      before = shared.before("x", x).masked_fill(starts.unsqueeze(-1), 0.0)
      x = torch.lerp(x, before, torch.sigmoid(self.smear).type_as(x))
    if cfg.pre_enrich_dim:
      up, down = self.bank("enrich_up"), self.bank("enrich_down")
      shared.plain, x = x, F.linear(F.gelu(F.linear(x, up)), down)
      shared.enriched, x = x, rms_norm(x)
    shared.x0 = x
    if cfg.value_layers:
      values = F.linear(F.embedding(ids, self.ve_embed), self.ve_proj)
      shared.value_embedding = self.ve_scale * values  # (B, T, KV)
    return x

  def bigram_index(self, ids, starts, shared):
    """Hash of (previous, current) id; at a start the last row ("xor", wraps as int32 upstream) or
    previous id 0 ("linear", PR #810)."""
    rows, before = self.cfg.bigram_vocab_size, shared.before("ids", ids).masked_fill(starts, 0)
    if self.cfg.bigram_kind == "linear":
      return (92821 * before + ids) % rows
    index = ((36313 * ids.int()) ^ (27191 * before.int())) % (rows - 1)
    return index.masked_fill(starts | shared.first, rows - 1)

  def block(self, i, x, shared):
    """(B, T, D) -> (B, T, D)"""
    scale = 1 / math.sqrt(i + 1) if self.cfg.ln_scale else 1.0
    x = self.resid_mix[i, 0] * x + self.resid_mix[i, 1] * shared.x0
    x = x + self.attn_scale[i] * self.attention(i, rms_norm(x) * scale, shared)
    up = F.linear(rms_norm(x) * scale, shared.up[i])
    if self.cfg.polyglu_enabled:  # PR #1026
      slope = torch.sigmoid(self.routing_alpha[i]).type_as(up)
      up = torch.where(up > 0, up, slope * up)
    else:
      up = F.leaky_relu(up, self.cfg.leaky_slope)
    return x + self.mlp_scale[i] * F.linear(up.square(), shared.down[i])

  def attention(self, i, h, shared):
    """Normed queries and keys, partly rotated"""
    cfg = self.cfg
    v = self.values(i, h, shared)
    q, k = (self.heads(F.linear(h, bank[i])) for bank in (shared.qo, shared.kv))
    q, k = (rotate(rms_norm(t), *shared.rope) for t in (q, k))
    q = q * self.q_gain[i].view(-1, 1, 1)
    y = shared.attend(q, k, v)
    if i >= cfg.num_layers - cfg.xsa_last_n:
      y = exclude_self(y, v)  # (B, H, T, d)
    if cfg.gated_attention:
      gate = F.linear(h, self.attn_gate_weight[i], self.attn_gate_bias[i])  # (B, T, H)
      y = y * torch.sigmoid(gate).transpose(1, 2).unsqueeze(-1)
    return F.linear(y.transpose(1, 2).flatten(2), shared.qo[cfg.num_layers + i])

  def heads(self, x):
    """(B, T, H * d) -> (B, H, T, d)"""
    return x.unflatten(-1, (-1, self.cfg.model_dim // self.cfg.num_heads)).transpose(1, 2)

  def values(self, i, h, shared):
    """Projection + value embedding, mixed with the first layer's values. (B, H_kv, T, d)"""
    v = F.linear(h, shared.kv[self.cfg.num_layers + i])
    if i in self.cfg.value_layers:
      v = v + self.ve_layer_scales[self.cfg.value_layers.index(i)] * shared.value_embedding
    v = self.heads(v)
    if shared.first_values is None:
      shared.first_values = v
    elif self.cfg.value_residual and i:
      v = self.vr_lambda[i, 0] * shared.first_values + self.vr_lambda[i, 1] * v
    return v


# -----------------------------------------------------------------------------
# 6. Optimizers and schedules
# Parallel Muon for the banks, AdamW for the rest; every schedule is a pure function.

# names since torch 2.13, or before
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def lr_factor(step, elapsed_seconds, cfg):
  """1, then linear to 0 over the last WARMDOWN_ITERS steps or, under a cap, over the seconds
  that so many take on average."""
  length, left = max(1, min(cfg.warmdown_iters, cfg.iterations)), cfg.iterations - step
  if cfg.max_wallclock_seconds:
    length = cfg.warmdown_iters * elapsed_seconds / max(1, step)
    left = cfg.max_wallclock_seconds - elapsed_seconds
  left = max(0, left)
  return 1.0 if left >= length else left / length


def muon_momentum(step, cfg):
  done = min(1.0, step / max(1, cfg.muon_momentum_warmup_steps))
  return (1 - done) * cfg.muon_momentum_warmup_start + done * cfg.muon_momentum


def newton_schulz(matrices, steps):
  """Singular values to about 1, zero stays zero. (n, r, c), any dtype.
  Jordan 2024, https://kellerjordan.github.io/posts/muon"""
  a, b, c = 3.4445, -4.7750, 2.0315
  tall = matrices.shape[-2] > matrices.shape[-1]
  x = matrices.mT if tall else matrices  # the smaller Gram matrix
  x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
  for _ in range(steps):
    gram = x @ x.mT
    x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
  return x.mT if tall else x


class Bank:
  """Buffers of a bank; each rank owns `share` of its matrices."""

  def __init__(self, weight, rt):
    count, rows, columns = weight.view(-1, *weight.shape[-2:]).shape
    share, kind = -(-count // rt.world_size), torch.bfloat16 if rt.cuda else torch.float32
    self.weight, self.scale, self.pending = weight, max(1.0, rows / columns) ** 0.5, None
    # gradients out, updates back in; the padding's are zero
    self.padded = weight.new_zeros(share * rt.world_size, rows, columns, dtype=kind)
    self.own = self.padded[:count].view_as(weight)
    self.gradient = torch.zeros_like(self.padded[:share])
    self.momenta = torch.zeros_like(self.padded)  # of all ranks, once gathered
    self.momentum = self.momenta.chunk(rt.world_size)[rt.rank]

  def start(self, collective, output, source):
    """Between `padded` and this rank's share, which on one rank is all of it."""
    if output.shape == source.shape:
      output.copy_(source)
    else:
      self.pending = collective(output, source.contiguous(), async_op=True)

  def wait(self):
    if self.pending:
      self.pending.wait()


class ParallelMuon:
  """Muon sharded over ranks (PR #399); a bank's update travels while the next one is computed."""

  def __init__(self, weights, rt, cfg):
    weights = sorted(weights, key=Tensor.numel, reverse=True)  # the longest transfer first
    self.banks, self.rt, self.cfg = [Bank(w, rt) for w in weights], rt, cfg

  def reduce(self):
    """-> averaged gradients of this rank's shares"""
    for bank in self.banks:
      torch.div(bank.weight.grad, self.rt.world_size, out=bank.own)
      bank.start(reduce_scatter, bank.gradient, bank.padded)
    for bank in self.banks:
      bank.wait()
    return [bank.gradient for bank in self.banks]

  def gather(self):
    """Everybody's momenta, for a checkpoint"""
    for bank in self.banks:
      bank.start(all_gather, bank.momenta, bank.momentum.clone())
      bank.wait()

  @torch.no_grad()
  def step(self, rate, momentum, sick):
    decay = 1 - rate * self.cfg.muon_wd * ~sick
    for bank in self.banks:
      bank.momentum.mul_(momentum).add_(bank.gradient)
      nesterov = bank.gradient.add(bank.momentum, alpha=momentum)
      update = newton_schulz(nesterov, self.cfg.muon_backend_steps)
      bank.start(all_gather, bank.padded, update)
    for bank in self.banks:
      bank.wait()
      bank.weight.mul_(decay)
      bank.weight.add_(bank.own.masked_fill_(sick, 0), alpha=-rate * bank.scale)


def optimizer_groups(cfg):
  """group -> (parameter names, rate, weight decay)"""
  groups = {
    "muon": ([], cfg.matrix_lr, cfg.muon_wd),
    "embed": ([], cfg.tied_embed_lr, cfg.adam_wd),
    "scalar": ([], cfg.scalar_lr, cfg.adam_wd),
    "routing": ([], cfg.scalar_lr, 0.0),
  }
  for name, spec in parameter_specs(cfg).items():
    groups[spec.group][0].append(name)
  return {group: rest for group, rest in groups.items() if rest[0]}


def average_gradients(weights, rt):
  """Over ranks, by one all-reduce."""
  if rt.world_size > 1:
    gradients = [w.grad for w in weights]
    flat = nn.utils.parameters_to_vector(gradients)
    dist.all_reduce(flat)
    nn.utils.vector_to_parameters(flat / rt.world_size, gradients)


class Optimizers:
  """From each rank's gradients to new weights."""

  def __init__(self, model, rt, cfg):
    self.model, self.rt, self.cfg, groups = model, rt, cfg, optimizer_groups(cfg)
    banks = [*map(model.get_parameter, groups.pop("muon")[0])]
    self.muon = ParallelMuon(banks, rt, cfg)
    adam = [
      dict(params=[*map(model.get_parameter, names)], base_lr=rate, weight_decay=decay)
      for names, rate, decay in groups.values()
    ]
    self.adam = torch.optim.AdamW(adam, 0.0, (cfg.beta1, cfg.beta2), cfg.adam_eps, fused=True)
    self.small = [weight for group in adam for weight in group["params"]]
    self.weights = self.small + banks
    for weight in self.small:  # as its first step would, for a checkpoint to fill
      empty = {name: torch.zeros_like(weight) for name in ("exp_avg", "exp_avg_sq")}
      self.adam.state[weight] = dict(step=weight.new_zeros(())) | empty

  @torch.no_grad()
  def step(self, step, factor, loss):
    """Average over ranks, clip, update, clear -> loss, not finite where a gradient is not; if that
    is so on any rank, no weight changes."""
    gradients = [w.grad for w in self.weights]
    loss = loss + 0 * torch.stack(torch._foreach_norm(gradients)).sum()
    sick = (~loss.isfinite()).float()
    if self.rt.world_size > 1:
      dist.all_reduce(sick, dist.ReduceOp.MAX)
    if self.cfg.clip == "local":  # as published
      self.clip(gradients, [])
    average_gradients(self.small, self.rt)
    shards = self.muon.reduce()
    if self.cfg.clip == "global":
      self.clip([w.grad for w in self.small], shards)
    for group in self.adam.param_groups:
      group["lr"] = group["base_lr"] * factor
    self.adam.found_inf = sick  # skips, without a wait
    self.adam.step()
    self.muon.step(self.cfg.matrix_lr * factor, muon_momentum(step, self.cfg), sick > 0)
    self.model.zero_grad()
    return loss

  def clip(self, gradients, shards):
    """To a norm of at most GRAD_CLIP_NORM, shards of all ranks included"""
    if not self.cfg.grad_clip_norm:
      return
    square = sum((shard.float() ** 2).sum() for shard in shards)
    if shards and self.rt.world_size > 1:
      dist.all_reduce(square)
    norm = sum(((g**2).sum() for g in gradients), square).sqrt()
    factor = (self.cfg.grad_clip_norm / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_([*gradients, *shards], factor)


# -----------------------------------------------------------------------------
# 7. Weight averaging
# Exported are an exponential mean of the weights, the mean of late snapshots, or both.


class Averages:
  """fp32 averages of every parameter, on its device."""

  def __init__(self, model, cfg):
    self.cfg, state = cfg, model.state_dict()
    self.names, self.weights = [*state], [*state.values()]
    self.ema = [w.clone() for w in self.weights] if cfg.ema_enabled else self.weights
    self.swa, self.snapshots = [torch.zeros_like(w) for w in self.weights], 0

  def update(self, step, factor):
    """After optimizer step `step` (from 0)."""
    cfg = self.cfg
    if cfg.ema_enabled:
      warm = (1 + step) / (10 + step) if cfg.ema_warmup else 1.0  # forget the random start
      torch._foreach_lerp_(self.ema, self.weights, 1 - min(cfg.ema_decay, warm))
    if cfg.swa_enabled and factor < 0.2 and (step + 1) % cfg.swa_every == 0:  # a late rate
      source = self.ema if cfg.swa_source == "ema" else self.weights
      self.snapshots += 1
      torch._foreach_lerp_(self.swa, source, 1 / self.snapshots)

  def final(self):
    """Name -> (1 - SWA_WEIGHT) EMA + SWA_WEIGHT SWA, or the one there is."""
    share = self.cfg.swa_weight if self.cfg.ema_enabled else 1.0
    mixed = torch._foreach_lerp(self.ema, self.swa, share) if self.snapshots else self.ema
    return dict(zip(self.names, mixed, strict=True))


# -----------------------------------------------------------------------------
# 9. Quantisation and artifact
# Weights become integers on a searched grid, a compressed container, and weights again.

LARGEST = {"int6": 31, "int8": 127}  # integers -largest .. largest
FLOATS = {"fp16": "<f2", "fp32": "<f4"}
MAGIC, ARTIFACT_VERSION, SHA_BYTES = b"PGOLFGPT", 1, 32
PREFIX = MAGIC + ARTIFACT_VERSION.to_bytes(4, "little")


class ArtifactError(UserError):
  """Missing, damaged or foreign; nothing was loaded."""


def round_to_grid(weight, scale, largest):
  return (weight / scale).round().clamp(-largest, largest)


def search_grid(weight, coding, cfg):
  """GPTQ-lite: a row's grid ends at a quantile of its |w|, that of least squared error in the
  row or matrix. fp32 (..., r, c) -> steps (..., r, 1), rounded as stored"""
  largest, ordered = LARGEST[coding], weight.abs().sort(dim=-1).values
  smallest = 1 / largest if cfg.quant_floor else 2.0**-24  # the least fp16 above 0
  scales, errors = [], []
  for quantile in cfg.clip_quantiles if coding == "int6" else [0.9999984]:
    place = quantile * (weight.shape[-1] - 1)
    below, above = (ordered[..., i : i + 1] for i in (math.floor(place), math.ceil(place)))
    scale = torch.lerp(below, above, place % 1) / largest
    scales.append(scale.clamp_min(smallest).half().float())
    residual = round_to_grid(weight, scales[-1], largest) * scales[-1] - weight
    errors.append(residual.square().sum(-1, keepdim=True))
  errors = torch.stack(errors)
  if cfg.quant_per == "matrix":
    errors = errors.sum(-2, keepdim=True).expand_as(errors)
  return torch.stack(scales).gather(0, errors.argmin(0, keepdim=True))[0]


@torch.no_grad()
def update_qat_grids(model, cfg):
  """The grid that the export would choose now."""
  for name, grid in model.named_buffers():
    grid.copy_(search_grid(getattr(model, name.removesuffix("_grid")), "int6", cfg))


def payload_type(specs):
  """numpy type: of each tensor scales of the rows and integers, or fp16 or fp32"""
  kinds = {}
  for name, (shape, _, _, coding) in specs.items():
    integers = [("scale", "<f2", (*shape[:-1], 1)), ("integers", "i1", shape)]
    kinds[name] = np.dtype((FLOATS[coding], shape) if coding in FLOATS else integers)
  if sum(kind.itemsize for kind in kinds.values()) >= 2**31:  # numpy would count on from -2^31
    raise ArtifactError("weights of 2 GiB or more")
  return np.dtype([*kinds.items()])


def pack_tensor(weight, coding, cfg):
  if coding in FLOATS:
    return weight.cpu().numpy()
  scale = search_grid(weight, coding, cfg)
  return scale.cpu().numpy(), round_to_grid(weight, scale, LARGEST[coding]).cpu().numpy()


def unpack_tensor(packed):
  if packed.dtype.names:
    packed = packed["integers"] * packed["scale"].astype(np.float32)
  return torch.from_numpy(packed.astype(np.float32))


def compress(payload, how):
  return lzma.compress(payload) if how == "lzma" else backend("zstandard").compress(payload, 22)


def decompress(data, how, size):
  """One whole stream of exactly `size` bytes, or an exception before it grows further"""
  if how == "zstd":
    zstd = backend("zstandard")
    if zstd.frame_content_size(data) == size:
      return zstd.ZstdDecompressor().decompress(data, allow_extra_data=False)
  else:
    stream = lzma.LZMADecompressor()
    payload = stream.decompress(data, size + 1)
    if len(payload) == size and stream.eof and not stream.unused_data:
      return payload
  raise ArtifactError("the payload is not as long as the header says")


def artifact_header(cfg):
  """Model configuration and tensors; nothing of the run."""
  specs = parameter_specs(cfg)
  kind = payload_type(specs)
  tensors = [
    dict(name=n, shape=[*s.shape], coding=s.coding, offset=kind.fields[n][1])
    for n, s in specs.items()
  ]
  model = {name: show(getattr(cfg, name)) for name in MODEL_FIELDS}
  return dict(model=model, tensors=tensors, size=kind.itemsize)


def pack_artifact(weights, cfg, log=None):
  """The same weights give the same bytes."""
  specs = parameter_specs(cfg)
  payload = np.zeros((), payload_type(specs))
  for name, spec in specs.items():
    payload[name] = pack_tensor(weights[name].detach(), spec.coding, cfg)
  header = artifact_header(cfg)
  if not cfg.target_mb:
    return seal(PREFIX, header, compress(payload.tobytes(), cfg.compressor))
  most = int(cfg.target_mb * 2**20) - CODE.stat().st_size - len(seal(PREFIX, header, b""))
  return seal(PREFIX, header, beside("prune.prune", payload, most, cfg, log))


def sha(data):
  return hashlib.sha256(data).hexdigest()


def seal(prefix, header, payload):
  """prefix, length of the JSON header, header, payload, sha256 of all that"""
  header = json.dumps(header, separators=(",", ":")).encode()
  body = prefix + len(header).to_bytes(4, "little") + header + payload
  return body + hashlib.sha256(body).digest()


def unseal(prefix, data):
  """-> header, payload; ValueError for one byte more, less or different"""
  body, start = data[:-SHA_BYTES], len(prefix) + 4
  if hashlib.sha256(body).digest() != data[-SHA_BYTES:]:
    raise ValueError("damaged, its sha256 does not fit")
  if not body.startswith(prefix):
    raise ValueError(f"not of this program, it does not begin with {prefix}")
  end = start + int.from_bytes(body[len(prefix) : start], "little")
  return json.loads(body[start:end]), body[end:]


def load_artifact(path: str | Path, device: Any = "cpu", data: bytes = b"") -> GPT:
  """-> model in eval mode, fp32, for sequences of any length; ArtifactError for anything wrong."""
  try:
    header, payload = unseal(PREFIX, data or Path(path).read_bytes())
    values = {name: parse(name.upper(), header["model"][name]) for name in MODEL_FIELDS}
    cfg = Config(**values, eval_stride=1).check()
    if not cfg.vocab_size or header != artifact_header(cfg):  # what would be written
      raise ArtifactError("its header does not describe its model")
    payload = decompress(payload, cfg.compressor, header["size"])
    payload = np.frombuffer(payload, payload_type(parameter_specs(cfg))).reshape(())
  except Exception as error:  # json and each decompressor have their own
    raise ArtifactError(f"{path}: unreadable ({error}); fix: train or download it anew") from error
  model = GPT(cfg)
  model.load_state_dict({name: unpack_tensor(payload[name]) for name in payload.dtype.names})
  return model.to(device).eval().requires_grad_(False)


# -----------------------------------------------------------------------------
# 10. Neural scoring
# Every target exactly once: its log-probability and the entropy it was drawn from.


class Scores(NamedTuple):
  """Per target, float64 (N,), nats."""

  log_prob: np.ndarray
  entropy: np.ndarray
  pe_delta: np.ndarray | None = None  # norm of the change by pre-enrichment (PR #810)

  def take(self, places):
    return Scores(*(c if c is None else c[places] for c in self))


def predict(model, hidden):
  """(..., D) -> log-probabilities, float64 (..., V), also under autocast, and their entropy"""
  log_probs = model.logits(hidden).double().log_softmax(-1)
  return log_probs, -(log_probs.exp() * log_probs).sum(-1)


def bits_per_byte(log_prob, token_bytes):
  return float(-log_prob.sum() / math.log(2) / token_bytes.sum())


class WindowScorer:
  """Windows of cfg.window inputs, each scoring the `stride` targets at its end; the first ones
  begin at position 0. All passes have one shape and go to ranks by index: neither the future nor
  the number of ranks changes a value."""

  def __init__(self, model, rt, cfg):
    self.model, self.rt, self.cfg = model, rt, cfg
    self.batch, self.length = cfg.eval_batch_seqs, cfg.window
    self.forward = rt.compile(self.score_rows)

  def predict(self, ids, rows):
    """Of inputs (B, T) at rows (B, S)"""
    with self.rt.autocast():
      return predict(self.model, self.model.hidden(ids).take_along_dim(rows.unsqueeze(-1), 1))

  def score_rows(self, ids, rows, targets):
    """-> log p of targets (B, S), entropy; float64 (2, B, S)"""
    log_probs, entropy = self.predict(ids, rows)
    return torch.stack([log_probs.gather(-1, targets.unsqueeze(-1)).squeeze(-1), entropy])

  def windows(self, stream, ends, stride):
    """Inputs (B, T), scored rows and targets (B, S) of the windows that end before target `ends`;
    beyond the stream's end lies a constant."""
    starts = np.maximum(ends - self.length, 0)[:, None]
    inputs = starts + np.arange(self.length)
    scored = ends[:, None] - stride + np.arange(stride)
    ids, targets = (stream.take(i, mode="clip").astype(np.int64) for i in (inputs, scored + 1))
    ids[inputs >= len(stream) - 1] = 0
    return [torch.as_tensor(a, device=self.rt.device) for a in (ids, scored - starts, targets)]

  def score(self, stream, stride):
    """stream: N + 1 tokens -> Scores of the last N"""
    total = len(stream) - 1
    columns = self.score_windows(stream, np.arange(0, total, stride) + stride, stride)
    return Scores(*columns.reshape(2, -1)[:, :total])

  @torch.no_grad()
  def score_windows(self, stream, ends, stride):
    """float64 (2, windows, S), the same on every rank"""
    result = np.zeros((2, len(ends), stride))
    for b in range(self.rt.rank * self.batch, len(ends), self.rt.world_size * self.batch):
      real = range(b, min(b + self.batch, len(ends)))
      self.rt.tick("score", real.stop, len(ends))
      window = np.resize(real, self.batch)  # the last batch keeps its shape
      scored = self.forward(*self.windows(stream, ends[window], stride))
      result[:, real] = scored[:, : len(real)].cpu().numpy()
    return self.rt.sum(result)


class Shape(NamedTuple):
  """What a decoder must know beforehand."""

  documents: int
  last: int  # targets of the last one; 0: it ends with a BOS, as the others do
  lanes: int  # documents side by side
  groups: int  # of lanes, one a rank
  targets: int  # to code
  window: int  # keys and values a lane keeps

  @staticmethod
  def of(stream, cfg, groups):
    size, starts = len(stream) - 1, np.flatnonzero(stream[:-1] == BOS)
    last = 0 if stream[-1] == BOS else size - int(starts[-1])
    lanes = -(-min(cfg.eval_lanes, len(starts)) // groups) * groups
    return Shape(len(starts), last, lanes, groups, size, cfg.window)


class Order(NamedTuple):
  """In which targets are coded."""

  tokens: np.ndarray  # starts of lanes, then targets
  targets: np.ndarray  # (N,) their places in the text
  steps: Any = None  # times, lanes of tokens; None: one by one


def coding_order(stream, steps):
  """Order of a BOS and N targets from drive's steps"""
  lanes, documents, places = map(np.concatenate, zip(*steps, strict=True))
  targets, begun = np.flatnonzero(stream == BOS)[documents] + places, steps[0][0]
  sizes = [len(step[0]) for step in (steps[0], *steps)]
  times = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
  tokens = np.append(np.full_like(begun, BOS), stream[targets + 1])
  return Order(tokens, targets, (times, np.append(begun, lanes)))


def reader(stream):
  """-> drive's choose along a text"""
  starts = np.flatnonzero(stream == BOS) + 1
  return lambda _, lanes, documents, places: stream[starts[documents] + places].astype(np.int32)


@torch.no_grad()
def drive(model, rt, shape, groups, choose):
  """The loop of scoring, encoding and decoding: a token a lane a step; BOS ends a document, a free
  lane takes the next. choose(outputs of the groups' lanes, lanes at work, their documents, their
  places there) -> their tokens. Returns these three of each step."""
  rows = shape.lanes // shape.groups
  passes = [lane_pass(model, rt, rows, shape.window) for _ in groups if rows]
  ids, places = np.full(shape.lanes, BOS), np.zeros(shape.lanes, int)
  documents, waiting, coded, steps = np.arange(shape.lanes), shape.lanes, 0, []
  while len(lanes := np.flatnonzero(documents < shape.documents)) and coded < shape.targets:
    inputs = torch.as_tensor(np.stack([ids, places]), device=rt.device).split(rows, 1)
    outputs = [forward(*inputs[i]) for i, forward in zip(groups, passes, strict=True)]
    joined = [torch.cat(columns) for columns in zip(*outputs, strict=True)]
    steps.append((lanes, documents[lanes], places[lanes]))
    tokens = choose(joined, *steps[-1])
    ids[lanes], places[lanes], coded = tokens, places[lanes] + 1, coded + len(lanes)
    end = (documents[lanes] == shape.documents - 1) & (places[lanes] == shape.last)
    rt.tick("documents", coded, shape.targets)
    for lane in lanes[end | (tokens == BOS)]:
      ids[lane], places[lane], documents[lane], waiting = BOS, 0, waiting, waiting + 1
  return steps


def lane_pass(model, rt, rows, window):
  """-> forward(ids, places), int64 (rows,) each, that predicts the next tokens"""
  lanes = Lanes(model, rows, window)

  def forward(ids, places):
    lanes.begin(places)
    with rt.autocast():
      return predict(model, model.hidden(ids.unsqueeze(1), lanes)[:, 0])

  return rt.graph(forward, *torch.zeros(2, rows, dtype=torch.int64, device=rt.device))


def score_documents(model, rt, cfg, stream):
  """stream: a BOS and N targets -> Scores of these in the text's order, Order of coding"""
  shape, read, parts = Shape.of(stream, cfg, rt.world_size), reader(stream), []
  rows, columns = shape.lanes // shape.groups, np.zeros((2, shape.targets))

  def choose(outputs, lanes, *where):
    tokens, mine = read(outputs, lanes, *where), lanes // rows == rt.rank
    at, goal = (torch.as_tensor(a[mine], device=rt.device) for a in (lanes % rows, tokens))
    log_probs, entropy = outputs
    parts.append(torch.stack([log_probs[at, goal], entropy[at]]))
    return tokens

  order = coding_order(stream, drive(model, rt, shape, [rt.rank], choose))
  mine = order.steps[1][-shape.targets :] // rows == rt.rank
  columns[:, order.targets[mine]] = torch.cat(parts, 1).cpu()
  return Scores(*rt.sum(columns)), order


# -----------------------------------------------------------------------------
# 11. n-gram scoring
# Exact causal counts by sorting, and over them a learned mixture.

KEY_BITS = 63  # of a sort key: context group, token, position
LONG_ORDERS = (12, 16, 24)  # repeats beyond the model's window


def ngram_counts(
  tokens: np.ndarray, vocab_size: int, max_order: int, device: Any = "cpu", steps: Any = None
) -> Iterator[tuple[Any, ...]]:
  """Yields (order, context_count, target_count, types, singletons), orders 1..max_order.

  Four int32 (N,): at t, how often the context (order - 1 tokens) and context + token t came
  before, its distinct continuations, and those seen once. tokens (N,) below vocab_size, else
  ValueError. steps: times and lanes, int32 (N,) each, of tokens in the order of coding: those of
  equal time do not see each other; a context stays in its lane, from the last BOS on.
  """
  tokens, size = np.asarray(tokens), len(tokens)
  valid = not size or 0 <= tokens.min() <= tokens.max() < vocab_size
  if tokens.dtype.kind not in "iu" or not valid:
    raise ValueError(f"tokens must be integers in 0..{vocab_size - 1}, not {tokens.dtype}")
  times = following = np.zeros(0, np.int32)
  if steps is not None:
    times, following = steps[0], next_in_lane(steps[1])
  text = tokens.astype(np.int32), times, following
  if has_backend("numba") and (torch.device(device).type == "cpu" or not RECORDS):
    orders = numba_orders(text, vocab_size)
  else:  # by torch's sort, cumsum and scatter
    orders = beside("counts.torch_orders", text, vocab_size, device)
  for order in range(1, max_order + 1):
    yield order, *next(orders).T


def next_in_lane(lanes):
  """Place of the lane's next token, -1 at its end; int32 (N,)"""
  order, following = np.argsort(lanes, kind="stable"), np.full(len(lanes), -1, np.int32)
  following[order[:-1]] = np.where(np.diff(lanes[order]), -1, order[1:])
  return following


@functools.cache
def jit(function):
  return backend("numba").njit(function, nogil=True)


def sort_pieces(keys, cuts):
  keys = keys.copy()
  for piece in np.split(keys, cuts):
    piece.sort()
  return keys


def numba_orders(text, vocab_size):
  """int32 (N, 4) of each order: a sort, a scan, a second scan beside the next sort"""
  size, cuts = len(text[0]), [0]
  bits = max(1, (size - 1).bit_length())
  # Where 63 bits do not suffice, group numbers wrap at `capacity`; the keys come in order of
  # group, so the pieces between wraps are sorted one by one.
  code = bits, vocab_size, max(2, (1 << KEY_BITS - bits) // vocab_size)
  keys = text[0].astype(np.int64) << bits
  keys |= np.arange(size)

  packed = sort_pieces(keys, cuts)
  with ThreadPoolExecutor(1) as other_core:
    while True:
      stats = np.zeros((size, 4), np.int32)
      longer, cuts = jit(scan_ngrams)(packed, code, text, stats)
      packed = other_core.submit(sort_pieces, longer, cuts)
      jit(scan_contexts)(keys, code, text[1], stats)
      yield stats
      text[2][text[0][: len(text[2])] == BOS] = -1  # from order 2 on, a document ends there
      keys, packed = longer, packed.result()
      del stats, longer


def scan_ngrams(packed, code, text, stats):
  """Target counts (column 1), rank among equals (column 2) and the next order's keys."""
  (bits, vocab_size, capacity), mask, cuts = code, (1 << code[0]) - 1, [0]
  (tokens, times, following), out = text, np.empty_like(packed)
  size, group, base, first, same = 0, -1, 0, 0, 0
  fresh = alone = True
  for i in range(packed.size):
    t, key = packed[i] & mask, packed[i] >> bits
    if i == 0 or key != packed[i - 1] >> bits:
      first, fresh, same = i, True, i
      alone = i + 1 == packed.size or key != packed[i + 1] >> bits
    if times.size == 0 or times[t] != times[packed[i - 1] & mask]:
      same = i
    stats[t, 1], stats[t, 2] = same - first, i - first
    after = following[t] if following.size else t + 1
    if alone or after < 0 or after == tokens.size:  # a context that never recurs counts nothing
      continue
    if fresh:
      group, base, fresh = group + 1, base + vocab_size, False
      if group % capacity == 0:
        base = 0
        if size:
          cuts.append(size)
    out[size] = (base + np.int64(tokens[after])) << bits | after
    size += 1
  return out[:size], cuts


def scan_contexts(keys, code, times, stats):
  """The other columns; keys lie grouped by context and in the order of time."""
  (bits, vocab_size, _), mask, base = code, (1 << code[0]) - 1, -1
  first = types = singles = before = old_types = old_singles = 0
  for i in range(keys.size):
    t, key = keys[i] & mask, keys[i] >> bits
    new = base < 0 or not base <= key < base + vocab_size
    if new:
      base, first, types, singles = key // vocab_size * vocab_size, i, 0, 0
    if new or times.size == 0 or times[t] != times[keys[i - 1] & mask]:
      before, old_types, old_singles = i - first, types, singles
    rank = stats[t, 2]
    stats[t, 0], stats[t, 2], stats[t, 3] = before, old_types, old_singles
    types += rank == 0
    singles += (rank == 0) - (rank == 1)


class CountStore:
  """Counts at the targets, kept where the context was seen; `skip`: tokens before the first."""

  def __init__(self, orders, skip=1):
    self.orders, self.skip, self.columns, self.matched = orders, skip, [], 0

  def collect(self, counts):
    for order, *stats in counts:
      n, c, types, singles = (column[self.skip :] for column in stats)
      if order in self.orders:
        seen = np.flatnonzero(n).astype(np.int32)
        few = np.stack([types[seen], singles[seen]], 1).astype(np.uint16)
        self.columns.append((seen, np.stack([n[seen], c[seen]], 1), few))
        self.matched = np.where(n > 0, np.int8(order), self.matched)
      del n, c, types, singles, stats  # before the next order is counted
    return self

  def read(self, a, b):
    """Targets a..b: int32 (K, b - a, 4): context, target, types, singletons."""
    dense = np.zeros((len(self.orders), b - a, 4), np.int32)
    ends = np.array([a, b], np.int32)  # of another type, searchsorted would copy `seen`
    for row, (seen, many, few) in zip(dense, self.columns, strict=True):
      part = slice(*np.searchsorted(seen, ends))
      row[seen[part] - a] = np.concatenate([many[part], few[part]], 1)
    return dense


class Blend:
  """The model and each order's plain c / n, mixed by a gate (one hidden layer) that learns from
  each scored chunk; then gate against model alone, as a Bayesian pair, for safety."""

  def __init__(self, orders, device):
    self.device, self.orders, hidden = device, orders, 32
    inputs, experts = 5 * len(orders) + 3, len(orders) + 1
    first = torch.randn(inputs, hidden, generator=torch.Generator().manual_seed(0))
    bias = torch.full((experts,), -1.0)
    bias[0] = 1.0  # the model starts favoured
    layers = first / inputs**0.5, torch.zeros(hidden), torch.zeros(hidden, experts), bias
    self.layers = [layer.to(device).requires_grad_() for layer in layers]
    self.optimizer = torch.optim.Adam(self.layers, 5e-3, fused=True)
    self.odds, self.chunk, self.seen = 0.0, 32, 0

  def rows(self, stats, entropy, _=None):
    """Inputs of the gate (rows, 5K + 3), scaled by constants, not by the stream (C1), and the
    experts' mask (rows, K + 1). stats: (K, rows, 4) int32; entropy: (rows,) float64, nats."""
    stats, entropy = (torch.as_tensor(a, device=self.device) for a in (stats, entropy))
    (n, _, types, singles), h = stats.float().unbind(-1), entropy.float()[None]
    known, total = n > 0, n.clamp(min=1)
    inputs = n.log1p() / 4, types.log1p() / 4, types / total, singles / total, known
    inputs = torch.cat([*inputs, h / 4, h * h / 16, (-h).exp()])
    return inputs.T, torch.cat([torch.ones_like(h, dtype=torch.bool), known]).T

  def logits(self, inputs, known):
    hidden = F.gelu(inputs @ self.layers[0] + self.layers[1])
    return (hidden @ self.layers[2] + self.layers[3]).masked_fill(~known, -torch.inf)

  @torch.no_grad()
  def weights(self, inputs, known):
    """Of model and counts: float64 (rows, K + 1)"""
    share = torch.tensor(self.odds, dtype=torch.float64).sigmoid()
    weights = share * self.logits(inputs, known).double().softmax(1).cpu()
    weights[:, 0] += 1 - share
    return weights.numpy()

  @torch.enable_grad()
  def learn(self, inputs, known, p):
    """Train on a scored chunk: four passes early in the stream, one from 2^19 targets on. p: by
    expert_p"""
    threads, p = torch.get_num_threads(), torch.as_tensor(p, device=self.device)
    torch.set_num_threads(1)  # faster for so small a gate
    with torch.no_grad():
      gate = (self.logits(inputs, known).double().softmax(1) * p).sum(1)
    self.odds += (gate.log() - p[:, 0].log()).sum().item()
    self.seen, self.chunk = self.seen + len(p), min(2 * self.chunk, 4096)
    ratio = (p / p.amax(1, keepdim=True)).float()
    passes = min(4, max(1, (1 << 20) // self.seen))
    batches = [a.split(256 if passes > 1 else 512) for a in (inputs, known, ratio)]
    for _ in range(passes):
      for x, mask, q in zip(*batches, strict=True):
        loss = -(self.logits(x, mask).softmax(1) * q).sum(1).clamp(1e-30).log().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
    torch.set_num_threads(threads)


def expert_p(stats, log_prob):
  """Of the targets by model and orders: float64 (rows, K + 1)"""
  n, c = stats[..., 0], stats[..., 1]
  return np.vstack([np.exp(log_prob).clip(1e-300), c / np.maximum(n, 1)]).T


def mix(mixer, store, scores, times, tick=lambda *_: None):
  """Score each target, then learn from it -> log-probability (N,). times: steps of the targets,
  which a chunk does not divide; None: one by one"""
  out, a = np.empty(len(scores.log_prob)), 0
  while a < len(out):
    b = min(a + mixer.chunk, len(out))
    b = b if times is None else np.searchsorted(times, times[b - 1], "right")
    stats, (log_prob, *inputs) = store.read(a, b), scores.take(slice(a, b))
    rows, p = mixer.rows(stats, *inputs), expert_p(stats, log_prob)
    out[a:b] = np.log((mixer.weights(*rows) * p).sum(1))
    mixer.learn(*rows, p)
    tick("ngram", b, len(out))
    a = b
  return out


def make_mixer(name, cfg, device):
  orders = range(cfg.ngram_min_order, cfg.ngram_max_order + 1)
  orders = tuple(sorted({1, *orders, *LONG_ORDERS}))
  if name == "cascade":
    return beside("cascade.Cascade", orders, cfg)
  return Blend(orders if name == "blend" else (), device)


def mix_ngrams(scores, order, report):
  """By the published backoff and by NGRAM_MIXER -> log p (N,)"""
  cfg, rt, final = report.cfg, report.rt, scores.log_prob.copy()
  names = ["cascade"] * RECORDS + [cfg.mixer]
  mixers = {name: make_mixer(name, cfg, rt.device) for name in names}
  orders = mixers[cfg.mixer].orders
  store, steps = CountStore(orders, len(order.tokens) - len(final)), order.steps
  store.collect(ngram_counts(order.tokens, cfg.vocab_size, max(orders), rt.device, steps))
  scores, times = scores.take(order.targets), steps and steps[0][store.skip :]
  for name, mixer in mixers.items():
    mixed = mix(mixer, store, scores, times, rt.tick)
    final[order.targets] = mixed
    if name == "cascade":
      report.score("ngram_backoff", final, orders=cfg.orders)
  if RECORDS:
    beside("folder.log_gains", rt, store.matched, mixed - scores.log_prob)
  return final


# -----------------------------------------------------------------------------
# 12. Codec
# The score as a file: a range coder spends the mixture's bits, a decoder gets the text back.

STREAM_PREFIX, PRECISION = b"PGSTREAM\x01", 24  # bits of a probability
SCORING = NAMES[NAMES.index("eval_seq_len") : NAMES.index("origin")]  # in a stream's header
WITNESSES = 2048  # targets at least whose whole distribution is added up


class StreamError(UserError):
  """Damaged, or of another code, artifact or machine."""


class Dictionary:
  """What follows each context, {token: count}: ngram_counts of a text that is not there yet.
  isolated: a context begins at a BOS."""

  def __init__(self, orders, lanes, isolated):
    self.sizes, self.isolated = [2 * order - 2 for order in orders], isolated
    self.table, self.texts = {}, [b""] * lanes  # two bytes a token

  def contexts(self, lane):
    """By order, those within the text."""
    text = self.texts[lane]
    return [text[len(text) - size :] for size in self.sizes if size <= len(text)]

  def read(self, lanes):
    """CountStore.read's rows, without target counts; (lane, k, tokens, counts) of known contexts"""
    stats, found = np.zeros((len(self.sizes), len(lanes), 4), np.int32), []
    for i, lane in enumerate(lanes):
      for k, context in enumerate(self.contexts(lane)):
        if after := self.table.get(context):
          counts = np.fromiter(after.values(), np.int32, len(after))
          stats[k, i] = counts.sum(), 0, len(counts), (counts == 1).sum()
          found.append((i, k, np.fromiter(after, np.int64, len(after)), counts))
    return stats, found

  def insert(self, lanes, tokens):
    for lane, token in zip(lanes, tokens.tolist(), strict=True):
      for context in self.contexts(lane):
        after = self.table.setdefault(context, {})
        after[token] = after.get(token, 0) + 1
      text = b"" if token == BOS and self.isolated else self.texts[lane]
      self.texts[lane] = (text + token.to_bytes(2, "little"))[-64:]


class Mixture:
  """The distribution whose code length is the score, for every token, step by step."""

  def __init__(self, rt, cfg, begun, isolated=True):
    self.mixer, self.chunk, self.mass_error = make_mixer(cfg.mixer, cfg, rt.device), [], 0.0
    self.counts = Dictionary(self.mixer.orders, begun, isolated)
    self.counts.insert(range(begun), np.full(begun, BOS))

  def distributions(self, outputs, lanes):
    """log-probabilities (rows, V), entropy -> p of the lanes, float64 (lanes, V)"""
    self.log_probs, entropy = (column.cpu().numpy()[lanes] for column in outputs)
    self.lanes, (stats, self.found) = lanes, self.counts.read(lanes)
    weights = self.mixer.weights(*self.mixer.rows(stats, entropy))
    p, self.now = weights[:, :1] * np.exp(self.log_probs), (stats, entropy)
    for i, k, tokens, counts in self.found:
      p[i, tokens] += weights[i, k + 1] / stats[k, i, 0] * counts
    self.mass_error = max(self.mass_error, float(np.abs(p.sum(1) - 1).max()))
    return p

  def learn(self, tokens):
    """Count the tokens of the step; when the mixer's chunk is full, train on it."""
    stats, entropy = self.now
    for i, k, after, counts in self.found:
      stats[k, i, 1] = counts[after == tokens[i]].sum()
    self.counts.insert(self.lanes, tokens)
    self.chunk.append((stats, entropy, self.log_probs[np.arange(len(tokens)), tokens]))
    if sum(len(entropy) for _, entropy, _ in self.chunk) >= self.mixer.chunk:
      stats, *rest = zip(*self.chunk, strict=True)
      stats, (entropy, log_prob) = np.concatenate(stats, 1), map(np.concatenate, rest)
      self.mixer.learn(*self.mixer.rows(stats, entropy), expert_p(stats, log_prob))
      self.chunk = []


def coder_integers(p):
  """p, float64 (rows, V) -> integers, their sum 2^24 - V; the coder adds 1 to each"""
  free = (1 << PRECISION) - p.shape[1]
  integers = np.floor(p * free)
  rest = free - integers.sum(1)
  if not ((np.abs(rest) <= p.shape[1]) & (p.min(1) >= 0)).all():
    raise ValueError(f"not a distribution: its mass is {p.sum(1)}")
  integers[np.arange(len(p)), p.argmax(1)] += rest
  return integers


def code(model, rt, cfg, shape, pick, *, bits=math.inf):
  """Encoder and decoder; pick(integers (lanes, V), lanes, documents, places) -> tokens (lanes,), in
  so many bits. Returns the text, a BOS before each document; how many targets; largest error of a
  mass"""
  mixture, text = Mixture(rt, cfg, min(shape.lanes, shape.documents)), {}

  def choose(outputs, lanes, documents, places):
    nonlocal bits
    integers = coder_integers(mixture.distributions(outputs, lanes))
    mixture.learn(tokens := pick(integers, lanes, documents, places))
    bits += np.log2((integers[range(len(tokens)), tokens] + 1) / (1 << PRECISION)).sum()
    if bits < 0:
      raise ValueError("words of another text")
    for document, token in zip(documents, tokens.tolist(), strict=True):
      text.setdefault(document, [BOS]).append(token)
    return tokens

  steps, last = drive(model, rt, shape, range(shape.groups), choose), shape.documents - 1
  parts = [t[:-1] if d < last and t[-1] == BOS else t for d, t in text.items()]
  text = np.array([token for part in parts for token in part] or [BOS], np.uint16)
  return text, sum(len(step[0]) for step in steps), mixture.mass_error


def encode(model, rt, cfg, stream, shape):
  """-> words of the range coder, and what `code` returns"""
  coders, read = backend("constriction").stream, reader(stream)
  coder, family = coders.queue.RangeEncoder(), coders.model.Categorical(perfect=False)

  def pick(integers, *where):
    coder.encode(tokens := read(integers, *where), family, integers)
    return tokens

  coded = code(model, rt, cfg, shape, pick)
  return coder.get_compressed().astype("<u4").tobytes(), *coded


def decode(model, rt, cfg, words, shape):
  coders, words = backend("constriction").stream, np.frombuffer(words, "<u4").astype(np.uint32)
  coder, family = coders.queue.RangeDecoder(words), coders.model.Categorical(perfect=False)
  bits = 32 * len(words) + 64
  return code(model, rt, cfg, shape, lambda integers, *_: coder.decode(family, integers), bits=bits)


def fingerprint(rt, artifact, code=CODE):
  """Whatever a bit of a probability can depend on."""
  kind = torch.cuda.get_device_name() if rt.cuda else torch.backends.cpu.get_cpu_capability()
  made = {name: importlib.metadata.version(name) for name in ("torch", "numpy", "constriction")}
  made |= dict(device=f"{rt.device.type} {kind}", threads=torch.get_num_threads())
  return made | dict(code=sha(code.read_bytes()), artifact=sha(artifact.read_bytes()))


def decode_folder(cfg):
  """DECODE: artifact.bin and stream.bin of a folder -> decoded.npy there, uint16 tokens"""
  path, artifact = (Path(cfg.decode, name) for name in ("stream.bin", "artifact.bin"))
  try:
    header, words = unseal(STREAM_PREFIX, path.read_bytes())
    made, values = header["made"], {n: parse(n.upper(), header["scoring"][n]) for n in SCORING}
    rt = Runtime(replace(cfg, device=made["device"].split()[0]))
    rt.start()
    torch.set_num_threads(min(made["threads"], 999))
    here, shape, goal = fingerprint(rt, artifact), Shape(*header["shape"]), header["text"]
    for name in here:
      if made[name] != here[name]:
        raise StreamError(f"{path}: made with {name} {made[name]}, not {here[name]}; fix: use that")
    model = load_artifact(artifact, rt.device)
    values |= {name: getattr(model.cfg, name) for name in MODEL_FIELDS}
    cfg = replace(cfg, **values)
    if not 0 < shape.groups <= shape.lanes <= 1024 + 8 * len(words) or shape.window != cfg.window:
      raise ValueError("shape of another text")
    text, coded, mass_error = decode(model, rt, cfg, words, shape)
  except UserError:
    raise
  except Exception as error:  # json, constriction and others have their own
    raise StreamError(f"{path}: unreadable ({error}); fix: get it again") from error
  if sha(text) != goal:
    raise StreamError(f"{path}: decodes to another text than was coded; fix: use its machine")
  write_atomically(Path(cfg.decode, "decoded.npy"), lambda partial: np.save(partial, text))
  rt.log("decoded", coded, mass_error=f"{mass_error:.1e}")


def prove(report, log_prob):
  """Write stream.bin, let a fresh process decode it. log_prob: the claim, in coding order ->
  largest error of a mass, values of the codec's line"""
  cfg, rt, stream, folder = report.cfg, report.rt, report.text.stream, report.rt.folder.resolve()
  shape, artifact = Shape.of(stream, cfg, rt.world_size), folder / "artifact.bin"
  rt = rt if cfg.codec_device == "same" else Runtime(replace(cfg, device="cpu"))
  most = shape.targets if cfg.codec_tokens < 0 else cfg.codec_tokens
  shape = shape._replace(targets=min(max(most, WITNESSES), shape.targets))
  model = load_artifact(artifact, rt.device)
  if not most:
    return code(model, rt, cfg, shape, reader(stream))[2], {}
  words, text, coded, mass_error = encode(model, rt, cfg, stream, shape)
  made = fingerprint(rt, artifact, folder / "train_gpt.py")
  scoring = {name: show(getattr(cfg, name)) for name in SCORING}
  header = dict(shape=shape, made=made, text=sha(text), scoring=scoring)
  write_atomically(folder / "stream.bin", seal(STREAM_PREFIX, header, words))
  environ = {n: text for n, text in os.environ.items() if n not in VARIABLES | LAUNCH}
  command, decoded = [sys.executable, folder / "train_gpt.py"], folder / "decoded.npy"
  done = subprocess.run(command, env=environ | {"DECODE": str(folder)})
  right = done.returncode == 0 and np.array_equal(np.load(decoded), text)
  decoded.unlink(missing_ok=True)
  claimed = math.ceil(-log_prob[:coded].sum() / math.log(256))
  sizes = dict(coded_bytes=len(words), claimed_bytes=claimed, proved_tokens=coded)
  return mass_error, sizes | dict(total_tokens=len(log_prob), decoded="ok" if right else "FAILED")


# -----------------------------------------------------------------------------
# 13. Training loop
# Batches, schedules, optimizers, averages and QAT until the steps or the clock run out.


def micro_batches(cfg, rt):
  """In a step on each rank; each is of whole sequences."""
  count = cfg.grad_accum_steps or (max(1, 8 // rt.world_size) if rt.cuda else 1)
  unit = cfg.train_seq_len * rt.world_size * count
  if cfg.train_batch_tokens % unit:
    raise ConfigError(f"TRAIN_BATCH_TOKENS={cfg.train_batch_tokens}: must be a multiple of {unit}")
  return count


class Trainer:
  """A training run's state and steps."""

  def __init__(self, model, loader, rt, cfg):
    self.model, self.loader, self.rt, self.cfg = model, loader, rt, cfg
    self.micro, self.step, self.qat_since = micro_batches(cfg, rt), 0, None
    self.optimizers, self.averages = Optimizers(model, rt, cfg), Averages(model, cfg)
    self.loss = rt.compile(model, fullgraph=True)
    self.folder, self.elapsed, self.signal = rt.folder / "checkpoint", 0.0, 0

  def gradients(self):
    """Of this rank's rows -> mean loss"""
    rows, total = self.loader.rows(self.cfg, self.rt), 0.0
    parts = (side.to(self.rt.device).chunk(self.micro) for side in rows)
    for ids, goal in zip(*parts, strict=True):
      with self.rt.autocast():
        loss = self.loss(ids, goal) / self.micro
      loss.backward()
      total += loss.detach()
    return total

  def warm_up(self):
    """Compile on real data, then rewind"""
    state = self.loader.state()
    for _ in range(self.cfg.warmup_steps):
      self.gradients()
    self.model.zero_grad()
    self.loader.restore(state)

  def update(self, factor):
    """One optimizer step at a rate factor -> training loss"""
    cfg = self.cfg
    if cfg.late_qat and self.qat_since is None and factor < cfg.late_qat_threshold:
      self.qat_since = self.step
      self.rt.log("late_qat:enabled", step=self.step, scale=factor)
    if self.qat_since is not None and (self.step - self.qat_since) % cfg.qat_every == 0:
      update_qat_grids(self.model, cfg)
    loss = self.optimizers.step(self.step, factor, self.gradients())
    self.averages.update(self.step, factor)
    self.step += 1
    return loss

  def agree(self, loss):
    """Wait; one clock and signal for all; a loss that is not finite ends the run."""
    with self.rt.clock("train"):
      sick = 0 if math.isfinite(loss.item()) else self.rt.rank + 1
    found = self.rt.largest(self.rt.seconds["train"], max(self.came, default=0), sick)
    self.elapsed, self.signal, sick = found.tolist()
    if sick:
      last = max(self.folder.glob("step_*.json"), default="none")
      where = f"by step {self.step} loss or gradient not finite on rank {sick - 1:.0f}"
      raise UserError(f"{where}; last good checkpoint: {last}; fix: lower rates, another RUN_ID")

  @property
  def capped(self):
    return 0 < self.cfg.max_wallclock_seconds <= self.elapsed

  @property
  def done(self):
    return self.capped or self.step >= self.cfg.iterations

  def run(self, validate):
    """Train to the last step or the cap -> averaged weights by name"""
    cfg, rt, loss = self.cfg, self.rt, torch.zeros(())
    self.warm_up()

    def every(steps):
      return steps and (self.done or self.step % steps == 0)

    with rt.signals() as self.came:
      self.agree(loss)
      mark = self.mark()
      while not self.done:
        with rt.clock("train"):
          previous, loss = loss, self.update(lr_factor(self.step, self.elapsed, cfg))
        self.agree(previous)  # the host stays a step ahead at most
        rt.tick("train", self.step, cfg.iterations)
        logs = self.step <= 10 or every(cfg.train_log_every)
        if logs or every(cfg.val_loss_every) or self.signal or self.mark() > mark:
          self.agree(loss)
        if logs or self.done:
          self.log_step(train_loss=rt.sum(np.array([loss.item()])).item() / rt.world_size)
        if every(cfg.val_loss_every):
          self.log_step(**validate())
        if self.done:
          self.agree(loss)
        before, mark = mark, self.mark()
        if self.signal or mark > before:
          beside("checkpoint.save", self)
    if self.capped:
      rt.log("stopping_early: wallclock_cap", step=f"{self.step}/{cfg.iterations}")
    rt.log("averages", ema=int(cfg.ema_enabled), swa_snapshots=self.averages.snapshots)
    return self.averages.final()

  def mark(self):
    """Grows when CHECKPOINT_EVERY says so, and at the end."""
    every = self.cfg.checkpoint_every
    count = self.elapsed / 60 if every.endswith("m") else self.step
    every = int(every.removesuffix("m"))
    return count // every + self.done if every else 0

  def log_step(self, **values):
    values |= beside("progress.facts", self) if RECORDS else {}
    self.rt.log("step", f"{self.step}/{self.cfg.iterations}", **values)


# -----------------------------------------------------------------------------
# 14. Report and main
# The story: configure, train, average, quantise, reload, score, report.


class Report:
  """The final lines and the run folder's results."""

  def __init__(self, rt, cfg):
    self.rt, self.cfg, self.text = rt, cfg, ValidationText(cfg)
    if cfg.scorer == "documents" and cfg.codec_tokens:
      backend("constriction")  # rather missed now than at the end
    rt.log("val_text", tokens=len(self.text.targets), bytes=int(self.text.bytes.sum()))

  def score(self, stage, log_prob, **more):
    """A final line; log_prob (N,), nats"""
    self.rt.log(f"final_{stage}_exact", **self.losses(log_prob), **more)

  def losses(self, log_prob):
    bpb = bits_per_byte(log_prob, self.text.bytes)
    return dict(val_loss=float(-log_prob.mean()), val_bpb=bpb)

  def finish(self, model, scores, final, order):
    """Proof, scores, bytes and seconds against the caps"""
    rt, cfg, text = self.rt, self.cfg, self.text
    if cfg.scorer == "documents":
      mass_error, codec = prove(self, final[order.targets])
    else:
      mass_error, codec = beside("published.window_mass", model, rt, cfg, text.stream), {}
    self.score("ngram", final, mixer=cfg.mixer, orders=cfg.orders, mass_error=mass_error)
    if RECORDS:
      beside("folder.save_columns", self, scores, final)
      beside("published.pseudo_score", self)
    if codec:
      rt.log("final_codec", **codec)
    code, weights = ((rt.folder / n).stat().st_size for n in ("train_gpt.py", "artifact.bin"))
    sizes = dict(code=code, weights=weights, total=code + weights)
    rt.log("final_artifact_bytes", **sizes, cap=CAP_BYTES)
    rt.log("final_budget", **{f"{k}_seconds": v for k, v in rt.seconds.items()}, cap="600/600")
    if code + weights > CAP_BYTES:
      rt.log("OVER THE CAP", f"{code + weights} > {CAP_BYTES} bytes, not a valid submission")
    if RECORDS:
      beside("folder.close_run", rt)


def train_model(report):
  """Train from fresh weights -> averaged weights by name"""
  rt, cfg, text = report.rt, report.cfg, report.text
  model = GPT(cfg).initialise().to(rt.device)
  rt.log("model_params", count_parameters(cfg))
  loader = TokenLoader(find_shards(cfg.data_path, "train"), cfg.vocab_size)
  scorer = WindowScorer(model, rt, cfg)

  def validate():
    model.eval()
    log_prob = scorer.score(text.stream, scorer.length).log_prob
    model.train()
    return report.losses(log_prob)

  trainer = Trainer(model, loader, rt, cfg)
  if cfg.resume == "auto":
    beside("checkpoint.resume", trainer)
  weights = trainer.run(validate)
  if cfg.val_loss_every:  # what quantisation starts from
    model.load_state_dict(weights)
    rt.log("averaged", **validate())
  return weights


def evaluate(model, weights, report):
  """Score the re-read artifact -> Scores that feed the mixture, Order of coding"""
  cfg, rt, stream = report.cfg, report.rt, report.text.stream
  scorer, stride, order = WindowScorer(model, rt, cfg), cfg.eval_stride, Order(stream, slice(None))
  report.score("int6_roundtrip", scorer.score(stream, scorer.length).log_prob)
  began = time.perf_counter()
  scores = scorer.score(stream, stride)
  report.score("int6_sliding_window", scores.log_prob, stride=stride)
  if cfg.scorer == "documents":
    middle = time.perf_counter()
    scores, order = score_documents(model, rt, cfg, stream)
    seconds = dict(tokens_per_s=time.perf_counter() - middle, sliding_tokens_per_s=middle - began)
    speed = {name: int((len(stream) - 1) / spent) for name, spent in seconds.items()}
    report.score("documents", scores.log_prob, **speed)
  if RECORDS:
    scores = beside("published.evaluate", model, weights, scores, report)
  return scores, order


def run(cfg):
  """The life of a token, once through."""
  rt = Runtime(cfg)
  if cfg.decode:
    return decode_folder(cfg)
  if cfg.dry_run:
    return beside("variables.dry_run", rt, cfg)
  rt.start()
  if cfg.resume == "auto" and rt.largest(rt.finished) and not cfg.overwrite:
    return rt.log("note", f"{rt.folder} is finished")
  if cfg.eval_only:
    stored, packed = load_artifact(cfg.eval_only).cfg, Path(cfg.eval_only).read_bytes()
    model = {name: getattr(stored, name) for name in MODEL_FIELDS}
    cfg = replace(cfg, **model).check()
  else:
    micro_batches(cfg, rt)
  beside("folder.open_run", rt) if RECORDS else rt.folder.mkdir(parents=True, exist_ok=True)
  if rt.rank == 0 and RECORDS:
    beside("variables.announce", rt, cfg)
  rt.barrier()
  find_shards(cfg.data_path, "val")
  cfg = replace(cfg, vocab_size=len(token_bytes(cfg.tokenizer_path, cfg.vocab_size).base_bytes))
  report, path = Report(rt, cfg), rt.folder / "artifact.bin"
  if rt.rank == 0:
    write_atomically(rt.folder / "train_gpt.py", CODE.read_bytes())
    if RECORDS:
      beside("variables.keep_sources", rt, cfg)
  weights = {} if cfg.eval_only else train_model(report)
  with rt.clock("eval"):  # quantisation is in its budget
    if rt.rank == 0:
      write_atomically(path, pack_artifact(weights, cfg, rt.log) if weights else packed)
    model = load_artifact(path, rt.device, rt.share(path))
    scores, order = evaluate(model, weights, report)
    final = scores.log_prob
    if rt.rank == 0 and cfg.mixer != "none":
      final = mix_ngrams(scores, order, report)
  if rt.rank == 0:
    report.finish(model, scores, final, order)
  rt.barrier()  # a rank that ends earlier could take rank 0 with it


def main():
  try:
    if {"--help", "-h"} & set(sys.argv[1:]):
      print(__doc__)
      return beside("variables.print_help")
    run(Config.from_env(os.environ))
  except (UserError, OSError) as error:
    print("error:", *str(error).split(), file=sys.stderr)
    sys.exit(2)
  finally:
    if dist.is_initialized():
      dist.destroy_process_group()


if __name__ == "__main__":
  main()
