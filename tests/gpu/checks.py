"""Parts that are right or wrong: CPU against CUDA, compilation, causality."""

import contextlib
import copy
import math
import signal
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from common import Eager, Plain, Skip, Traced, all_switches, new_trainer, synthetic_stream
from helpers import no_validation, perturbed, random_ids, train_gpt
from torch._dynamo.utils import counters

FP32_TOLERANCE, BF16_TOLERANCE = 1e-4, 3e-2  # of ||logits - true|| / ||true||
STEP_TOLERANCE, COMPILED_TOLERANCE = 2e-3, 1e-2  # of a loss; Muon works in bf16 on CUDA
STEPS = 6
STOP, RESUMED_TOLERANCE = 4, 1e-3  # of a loss, where the device does not repeat itself


def logits(model, ids, bf16=False):
    """(B, T) -> float64 (B, T, V) on the CPU"""
    device = model.tok_emb.device
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        return model.logits(model.hidden(ids.to(device))).double().cpu()


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
    error = float(
        np.abs(here / step_losses(new_trainer(cfg, Plain(cfg), shard), factors) - 1).max()
    )
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


# -----------------------------------------------------------------------------
# Checkpoint and resume


def resume(job):
    """A training that a signal stops and another process's Trainer takes up is the one that nobody
    stopped, bit for bit where the device gives the same run twice: atomic additions in backward
    passes (attention, embeddings) do not, and no checkpoint can."""
    if not train_gpt.has_package("safetensors"):
        raise Skip("safetensors is not installed")
    cfg = all_switches(job, checkpoint_every="2", late_qat_threshold=0.9)  # from step 3 on
    (_, *whole), (_, *twin) = (followed(job, cfg, name) for name in ("whole", "twin"))
    stopped, first, _ = followed(job, cfg, "stopped", STOP)
    kept = {name: tensor.clone() for name, tensor in tensors_of(stopped).items()}
    taken = trainer_in(job, cfg, "stopped")
    train_gpt.resume_training(taken)
    same = all(torch.equal(kept[name], tensor) for name, tensor in tensors_of(taken).items())
    same &= facts(taken) == facts(stopped) and taken.step == STOP
    job.check("state", same, f"{len(kept)} tensors and the loader's place after step {taken.step}")
    _, last, weights = followed(job, cfg, "stopped")
    noise, error = difference(whole, twin), difference(whole, (first + last, weights))
    most = 0.0 if noise == (0.0, 0.0) else RESUMED_TOLERANCE
    text = f"{len(first)} + {len(last)} steps, losses differ by {error[0]:.2g}, {most:g} allowed, "
    text += f"weights by {error[1]:.2g}; the same run twice: {noise[0]:.2g} and {noise[1]:.2g}"
    right = error[0] <= most and (most > 0 or error[1] == 0)
    job.check("resumed", right, text, losses=error[0], weights=error[1], noise=noise)
    poisoned(job, cfg)
    yield from ()


def trainer_in(job, cfg, name):
    """A fresh Trainer whose checkpoints lie in a folder of this name."""
    runtime = Eager(cfg)
    runtime.folder = job.options.folder / name
    return new_trainer(cfg, runtime, job.options.folder / "small_train_000000.bin")


def tensors_of(trainer):
    """What a checkpoint of this moment would hold, by name."""
    return train_gpt.changing_tensors(trainer, trainer.optimizers.muon.gather_momenta())


def followed(job, cfg, name, stop=0):
    """Train to the end, or until a signal in step `stop` -> Trainer, losses, averaged weights;
    goes on from a checkpoint that it finds."""
    trainer, losses, weights = trainer_in(job, cfg, name), [], None
    train_gpt.resume_training(trainer)
    update = trainer.update

    def watched(factor):
        losses.append(update(factor).item())
        return torch.tensor(losses[-1])

    def tick(stage, done, _):
        if stage == "train" and done == stop:
            signal.raise_signal(signal.SIGTERM)

    trainer.update, trainer.rt.tick = watched, tick
    with contextlib.suppress(SystemExit):
        weights = trainer.run(no_validation)
    return trainer, losses, weights


def facts(trainer):
    return trainer.step, trainer.qat_since, trainer.averages.snapshots, trainer.loader.state()


def difference(one, other):
    """Of (losses, weights): the largest of each, inf where there are more of one."""
    if len(one[0]) != len(other[0]):
        return math.inf, math.inf
    weights = (float((w - other[1][name]).abs().max()) for name, w in one[1].items())
    return float(np.abs(np.subtract(one[0], other[0])).max()), max(weights)


def poisoned(job, cfg):
    """A gradient that is not finite changes nothing that a step changes but Muon's momenta; the
    step before changes every weight."""
    trainer = trainer_in(job, cfg, "poisoned")
    model, optimizers = trainer.model, trainer.optimizers
    for weight in model.parameters():  # what starts at zero has no gradient behind it
        torch.nn.init.normal_(weight, std=0.05)
    moved, loss = [], None
    for sick in (False, True):
        before = {name: tensor.clone() for name, tensor in tensors_of(trainer).items()}
        loss = trainer.gradients()
        if sick:
            model.kv_bank.grad.view(-1)[3] = math.inf
        loss = optimizers.step(0, 1.0, loss)
        after = tensors_of(trainer).items()
        moved.append({name for name, tensor in after if not torch.equal(tensor, before[name])})
    healthy = sum(name.startswith(("weight", "adam")) for name in moved[0])
    poison = sorted(name for name in moved[1] if not name.startswith("muon"))
    wanted = len(trainer.averages.weights) + 3 * len(optimizers.small)
    text = f"{healthy} of {wanted} tensors moved before, {len(poison)} with it; loss {loss.item()}"
    right = healthy == wanted and not poison and not math.isfinite(loss.item())
    job.check("poisoned gradient", right, text, moved=poison)
