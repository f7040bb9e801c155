"""Parts that are right or wrong: CPU against CUDA, a process group, stopping and going on."""

import contextlib
import copy
import math
import signal
import tempfile
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from common import Eager, Plain, Skip, all_switches, new_trainer, step_losses
from helpers import no_validation, perturbed, random_ids, train_gpt

FP32_TOLERANCE, BF16_TOLERANCE = 1e-4, 3e-2  # of ||logits - true|| / ||true||
STEP_TOLERANCE = 2e-3  # of a loss; Muon works in bf16 on CUDA
STEPS = 6
STOP, RESUMED_TOLERANCE = 4, 1e-3  # of a loss, where the device does not repeat itself


def shard_of(job):
    return job.options.folder / "small_train_000000.bin"


def logits(model, ids, bf16=False):
    """(B, T) -> float64 (B, T, V) on the CPU"""
    device = model.tok_emb.device
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        return model.logits(model.hidden(ids.to(device))).double().cpu()


def float32_norm(x):
    """rms_norm with the epsilon of float32 in every dtype: F.rms_norm takes float64's own."""
    return F.rms_norm(x, x.shape[-1:], eps=torch.finfo(torch.float32).eps)


def parity(job):
    """Forward pass against float64 on the CPU, optimizer steps against the CPU's."""
    cfg = all_switches(job)
    model, ids = perturbed(cfg, spread=0.05), random_ids(cfg, rows=4)
    with mock.patch.object(train_gpt, "rms_norm", float32_norm):
        truth = logits(copy.deepcopy(model).double(), ids)
    model = model.to(job.device)
    for name, bf16, most in (("fp32", False, FP32_TOLERANCE), ("bf16", True, BF16_TOLERANCE)):
        error = float((logits(model, ids, bf16) - truth).norm() / truth.norm())
        text = f"relative error {error:.2g} of the logits, {most:g} allowed"
        job.check(f"forward {name}", error <= most, text, error=error)
    losses = []
    for each in (cfg, all_switches(job, device="cpu")):
        trainer = new_trainer(each, Plain(each), shard_of(job))
        with contextlib.closing(trainer.batches):
            losses.append(step_losses(trainer, [1.0] * STEPS))
    error = float(np.abs(losses[0] / losses[1] - 1).max())
    text = f"losses of {STEPS} steps differ by {error:.2g}, {STEP_TOLERANCE:g} allowed"
    job.check("steps fp32", error <= STEP_TOLERANCE, text, error=error)
    yield from ()


# -----------------------------------------------------------------------------
# A process group of one


class One(int):
    """A number of ranks for which the script talks to the others, although there are none."""

    def __gt__(self, _):
        return True


def ranks(job):
    """Steps in which every collective of the optimizer goes through a process group (NCCL on CUDA)
    of one rank, beside steps without: the same weights."""
    cfg = all_switches(job)
    backends = "cpu:gloo,cuda:nccl" if job.cuda else "gloo"
    again, alone = steps_of(job, cfg), steps_of(job, cfg)  # whether the device repeats itself
    with tempfile.TemporaryDirectory() as folder:
        store = f"file://{folder}/store"
        how = dict(init_method=store, rank=0, world_size=1)
        first, _ = job.seconds(lambda: dist.init_process_group(backends, **how))
        try:
            together = steps_of(job, cfg, grouped=True)
        finally:
            dist.destroy_process_group()
    noise, error = (difference(alone, other) for other in (again, together))
    exact = noise == (0.0, 0.0)
    ok = error == (0.0, 0.0) if exact else error[0] <= STEP_TOLERANCE
    text = f"{backends}: {STEPS} steps, losses differ by {error[0]:.2g} and weights by "
    text += f"{error[1]:.2g} from those without a group, which differ by {noise[0]:.2g} and "
    text += f"{noise[1]:.2g} among themselves; {together[2]:.2f} s beside {again[2]:.2f}"
    text += f"; group in {first:.1f} s"
    job.check("process group", ok, text, losses=error[0], weights=error[1], noise=noise)
    yield from ()


def steps_of(job, cfg, grouped=False):
    """-> losses, weights by name, seconds; grouped: through a process group's collectives"""
    runtime = Eager(cfg)
    with contextlib.ExitStack() as stack:
        if grouped:
            runtime.world_size = One(1)
            stack.enter_context(mock.patch.object(train_gpt.MuonBank, "start", collectively))
        trainer = new_trainer(cfg, runtime, shard_of(job))
        stack.callback(trainer.batches.close)
        for weight in trainer.model.parameters():  # what starts at zero has no gradient behind it
            torch.nn.init.normal_(weight, std=0.05)
        losses = []

        def run():
            loss = train_gpt.Reading(torch.zeros(()))
            for _ in range(STEPS):
                previous, loss = loss, train_gpt.Reading(trainer.update(1.0))
                trainer.agree(previous, soon=True)
                losses.append(previous.get())
            trainer.agree(loss)
            losses.append(loss.get())
            trainer.optimizers.muon.gather_momenta()

        torch.manual_seed(0)
        seconds, _ = job.seconds(run)
        weights = {name: x.detach().cpu() for name, x in trainer.model.named_parameters()}
        return losses, weights, seconds


def collectively(bank, collective, output, source):
    """MuonBank.start, but for its way around a group of one."""
    bank.pending = collective(output, source.contiguous(), async_op=True)


# -----------------------------------------------------------------------------
# Checkpoint and resume


def resume(job):
    """A training that a signal stops and another process's Trainer takes up is the one that nobody
    stopped, bit for bit where the device gives the same run twice: atomic additions in backward
    passes (attention, embeddings) do not, and no checkpoint can."""
    poisoned(job, all_switches(job))
    if not train_gpt.has_package("safetensors"):
        raise Skip("safetensors is not installed")
    cfg = all_switches(job, checkpoint_every="2", late_qat_threshold=0.9, warmup_steps=1)
    (_, *whole), (_, *twin) = (followed(job, cfg, name) for name in ("whole", "twin"))
    stopped, first, _ = followed(job, cfg, "stopped", STOP)
    kept = {name: tensor.clone() for name, tensor in tensors_of(stopped).items()}
    taken = trainer_in(job, cfg, "stopped")
    train_gpt.resume_training(taken)
    same = all(torch.equal(kept[name], tensor) for name, tensor in tensors_of(taken).items())
    same &= facts(taken) == facts(stopped) and taken.step == STOP
    job.check("state", same, f"{len(kept)} tensors and the loader's place after step {taken.step}")
    taken.batches.close()
    _, last, weights = followed(job, cfg, "stopped")
    noise, error = difference(whole, twin), difference(whole, (first + last, weights))
    most = 0.0 if noise == (0.0, 0.0) else RESUMED_TOLERANCE
    text = f"{len(first)} + {len(last)} steps, losses differ by {error[0]:.2g}, {most:g} allowed, "
    text += f"weights by {error[1]:.2g}; the same run twice: {noise[0]:.2g} and {noise[1]:.2g}"
    right = error[0] <= most and (most > 0 or error[1] == 0)
    job.check("resumed", right, text, losses=error[0], weights=error[1], noise=noise)
    yield from ()


def trainer_in(job, cfg, name):
    """A fresh Trainer whose checkpoints lie in a folder of this name."""
    runtime = Eager(cfg)
    runtime.folder = job.options.folder / name
    return new_trainer(cfg, runtime, shard_of(job))


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
        loss = update(factor)
        losses.append(loss.item())
        return loss

    def tick(stage, done, _):
        if stage == "train" and done == stop:
            signal.raise_signal(signal.SIGTERM)

    trainer.update, trainer.rt.tick = watched, tick
    with contextlib.suppress(SystemExit):
        weights = trainer.run(no_validation)
    return trainer, losses, weights


def facts(trainer):
    return trainer.step, trainer.qat_since, trainer.averages.snapshots, trainer.batches.place


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
        loss = trainer.gradients(*trainer.batches.take())
        if sick:
            model.kv_bank.grad.view(-1)[3] = math.inf
        loss = optimizers.step(0, 1.0, loss)
        after = tensors_of(trainer).items()
        moved.append({name for name, tensor in after if not torch.equal(tensor, before[name])})
    trainer.batches.close()
    healthy = sum(name.startswith(("weight", "adam")) for name in moved[0])
    poison = sorted(name for name in moved[1] if not name.startswith("muon"))
    wanted = len(trainer.averages.weights) + 3 * len(optimizers.small)
    text = f"{healthy} of {wanted} tensors moved before, {len(poison)} with it; loss {loss.item()}"
    right = healthy == wanted and not poison and not math.isfinite(loss.item())
    job.check("poisoned gradient", right, text, moved=poison)
