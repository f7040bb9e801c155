"""Parts that are right or wrong: CPU against CUDA, compilation, causality."""

import copy
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from common import Plain, Traced, all_switches, new_trainer, synthetic_stream
from helpers import perturbed, random_ids, train_gpt
from torch._dynamo.utils import counters

FP32_TOLERANCE, BF16_TOLERANCE = 1e-4, 3e-2  # of ||logits - true|| / ||true||
STEP_TOLERANCE, COMPILED_TOLERANCE = 2e-3, 1e-2  # of a loss; Muon works in bf16 on CUDA
STEPS = 6


def logits(model, ids, bf16=False):
  """(B, T) -> float64 (B, T, V) on the CPU"""
  device = model.tok_emb.device
  with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
    hidden, _ = model.hidden(ids.to(device))
    return model.logits(hidden).double().cpu()


def float32_norm(x):
  """rms_norm with the epsilon of float32 in every dtype: F.rms_norm takes float64's own."""
  return F.rms_norm(x, x.shape[-1:], eps=torch.finfo(torch.float32).eps)


def step_losses(trainer, factors):
  return np.array([trainer.update(factor).item() for factor in factors])


def parity(job):
  """Forward pass against float64 on the CPU, causality, optimizer steps against the CPU's."""
  cfg, shard = all_switches(job), job.options.folder / "small_train_000000.bin"
  model, ids = perturbed(cfg, spread=0.05), random_ids(cfg, rows=4)
  with mock.patch.object(train_gpt, "rms_norm", float32_norm):
    truth = logits(copy.deepcopy(model).double(), ids)
  model = model.to(job.device)
  for name, bf16, most in (("fp32", 0, FP32_TOLERANCE), ("bf16", 1, BF16_TOLERANCE)):
    error = float((logits(model, ids, bool(bf16)) - truth).norm() / truth.norm())
    text = f"relative error {error:.2g} of the logits, {most:g} allowed"
    job.check(f"forward {name}", error <= most, text, error=error)
  scorer = train_gpt.WindowScorer(model, Plain(cfg), cfg)
  future(job, scorer, synthetic_stream(1025, cfg.vocab_size), 16)
  factors = [1.0] * STEPS
  here = step_losses(new_trainer(cfg, Plain(cfg), shard), factors)
  cfg = all_switches(job, device="cpu")
  error = float(np.abs(here / step_losses(new_trainer(cfg, Plain(cfg), shard), factors) - 1).max())
  text = f"losses of {STEPS} steps differ by {error:.2g}, {STEP_TOLERANCE:g} allowed"
  job.check("steps fp32", error <= STEP_TOLERANCE, text, error=error, losses=here.tolist())
  yield from ()


def recompile(job):
  """One graph without a break for the training loss, none more when late QAT starts."""
  changes = dict(warmup_steps=1, late_qat_threshold=0.5, qat_every=2)
  cfg, shard = all_switches(job, **changes), job.options.folder / "small_train_000000.bin"
  trainer = new_trainer(cfg, Traced(cfg), shard)
  counters.clear()
  trainer.warm_up()
  graphs = counters["stats"]["unique_graphs"]
  torch._dynamo.config.error_on_recompile = True
  factors = [1.0] * 3 + [0.4, 0.3, 0.2]
  losses = step_losses(trainer, factors)
  more = counters["stats"]["unique_graphs"] - graphs
  breaks = sum(counters["graph_break"].values())
  job.check("one graph", (graphs, breaks) == (1, 0), f"{graphs} graphs, {breaks} breaks")
  alive = trainer.qat_since == 3 and bool((trainer.model.qo_bank_grid > 0).all())
  job.check("late QAT", alive and not more, f"started: {alive}, recompilations: {more}")
  cpu = all_switches(job, **changes, device="cpu")
  error = np.abs(losses / step_losses(new_trainer(cpu, Plain(cpu), shard), factors) - 1).max()
  text = f"losses differ by {error:.2g} from the CPU's, {COMPILED_TOLERANCE:g} allowed"
  job.check("steps compiled", error <= COMPILED_TOLERANCE, text, error=float(error))
  yield from ()


def future(job, scorer, stream, stride):
  """Scores before a change of all later tokens stay the same, bit by bit."""
  before, size, wrong = scorer.score(stream, stride=stride), len(stream) - 1, []
  for t in (1, size // 3, size // 2 // scorer.length * scorer.length, size - 2):
    changed = stream.copy()
    changed[t:] = (stream[t:] + 1) % scorer.model.cfg.vocab_size
    after = scorer.score(changed, stride=stride)
    columns = [(a, b) for a, b in zip(before, after, strict=True) if a is not None]
    same = all(np.array_equal(a[: t - 1], b[: t - 1]) for a, b in columns)
    moved = not np.array_equal(before.log_prob[t - 1 :], after.log_prob[t - 1 :])
    wrong += [] if same and moved else [t]
  text = f"{size:,} targets, tokens changed from 4 positions on; wrong at: {wrong or 'none'}"
  job.check(f"future, stride {stride}", not wrong, text, wrong=wrong)


def same_counts(job, tokens, vocab_size, max_order):
  """The device's n-gram counts are the CPU's."""
  here, there = (
    train_gpt.ngram_counts(tokens, vocab_size, max_order, device=device)
    for device in (job.device, "cpu")
  )
  pairs = list(zip(here, there, strict=True))
  equal = all(np.array_equal(a, b) for x, y in pairs for a, b in zip(x, y, strict=True))
  text = f"orders 1 to {max_order} of {len(tokens):,} tokens equal the CPU's: {equal}"
  job.check("parity", equal, text)
