"""Trainings that are cut off and go on, for test_checkpoint.py; on two ranks as torchrun's script:

checkpoint_worker.py FOLDER  # leaves results_rank<r>.json there
"""

import contextlib
import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from helpers import no_validation, random_stream, tiny, train_gpt, write_shard

STEPS = 12
LENGTHS = (150, 70, 230)  # of the shards: a step of 64 tokens crosses from one into the next
ROOM = dict(iterations=STEPS, warmdown_iters=12, late_qat_threshold=0.6)  # snapshots: 11, 12


class Killed(BaseException):
    """What a test's death of a process looks like from inside: nothing catches it."""


class Watched(train_gpt.Trainer):
    """A Trainer that dies before the step with index `stop`, keeps losses and draws a random number
    a step, and lets a test spoil its gradients or send it a signal."""

    stop, spoil, signals = -1, staticmethod(lambda trainer: None), ()

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.losses, self.drawn, self.seconds = {}, {}, 0.0

    def update(self, factor):
        if self.step == self.stop:
            raise Killed
        for step, number in self.signals:
            if step == self.step:
                os.kill(os.getpid(), number)
        index = self.step
        loss = super().update(factor)
        self.losses[index], self.drawn[index] = loss.item(), torch.rand(()).item()
        self.rt.seconds["train"] += self.seconds
        return loss

    def gradients(self, *sides):
        loss = super().gradients(*sides)
        self.spoil(self)
        return loss


def configuration(**changes):
    return tiny(**ROOM | changes)


def shards(folder):
    paths = [folder / f"stream_train_{i:06}.bin" for i in range(len(LENGTHS))]
    if not paths[-1].exists():
        for i, (path, length) in enumerate(zip(paths, LENGTHS, strict=True)):
            write_shard(path, random_stream(length - 1, 64, seed=i))
    return paths


def new_trainer(cfg, folder, **watch):
    """Of fresh weights, gone on from its last checkpoint; not run yet."""
    runtime = train_gpt.Runtime(cfg)
    runtime.folder, runtime.patient = folder / cfg.run_id, None  # start() was not called
    torch.manual_seed(cfg.seed)
    model = train_gpt.GPT(cfg).initialise()
    loader = train_gpt.training_loader(cfg, shards(folder))
    trainer = Watched(model, loader, runtime, cfg)
    for name, value in watch.items():
        setattr(trainer, name, value)
    train_gpt.resume_training(
        trainer,
    )
    return trainer


def train(cfg, folder, **watch):
    trainer = new_trainer(cfg, folder, **watch)
    trainer.weights = trainer.run(no_validation)
    return trainer


def died(cfg, folder, how=Killed, **watch):
    """A training that ends with this exception -> it, the Trainer"""
    trainer = new_trainer(cfg, folder, **watch)
    try:
        trainer.run(no_validation)
    except how as error:
        return error, trainer
    raise AssertionError(f"no {how.__name__}")


def state(trainer):
    """name -> bytes or plain value of everything that the next step depends on. Written out here,
    not taken from section 8, which may forget something."""
    model, averages, adam = trainer.model, trainer.averages, trainer.optimizers.adam
    found = {f"weight {n}": w for n, w in model.named_parameters()}
    found |= {f"grid {n}": b for n, b in model.named_buffers()}
    found |= {f"ema {i}": w for i, w in enumerate(averages.ema)}
    found |= {f"swa {i}": w for i, w in enumerate(averages.swa)}
    found |= {f"final {n}": w for n, w in averages.final().items()}
    for i, weight in enumerate(trainer.optimizers.small):
        found |= {f"adam {i} {n}": x for n, x in adam.state[weight].items()}
    for i, bank in enumerate(trainer.optimizers.muon.banks):
        found[f"momentum {i}"] = bank.momentum
    found["rng"] = torch.get_rng_state()
    values = {n: x.detach().numpy().tobytes() for n, x in found.items()}
    return values | dict(
        step=trainer.step,
        qat_since=trainer.qat_since,
        loops_since=trainer.loops_since,
        layers=tuple(trainer.model.layers),
        snapshots=averages.snapshots,
        loader=tuple(trainer.batches.place),
    )


def finite(folder):
    """Whether every number of every checkpoint is."""
    return all(
        torch.isfinite(tensor.float()).all()
        for path in folder.glob("checkpoint/step_*.json")
        for tensor in train_gpt.read_checkpoint(path)[1].values()
    )


def spoiled(step, rank=0, value=float("nan"), name="q_gain"):
    """-> what puts `value` into one number of a gradient, on one rank at one step"""

    def spoil(trainer):
        if (trainer.step, trainer.rt.rank) == (step, rank):
            trainer.model.get_parameter(name).grad.view(-1)[0] = value

    return spoil


def bad_token(path, place):
    """Put a token that no vocabulary has into a shard. -> the bytes that it had"""
    content = path.read_bytes()
    begin = 1024 + 2 * place
    path.write_bytes(content[:begin] + b"\xff\xff" + content[begin + 2 :])
    return content


# -----------------------------------------------------------------------------
# On two ranks


def same(trainer, whole, begin):
    """Names of what is different from the uninterrupted training."""
    found, wanted = state(trainer), state(whole)
    names = [name for name in wanted if found[name] != wanted[name]]
    losses = {step: loss for step, loss in whole.losses.items() if step >= begin}
    return names + ([] if trainer.losses == losses else ["losses"])


def interrupted(whole, cfg, folder):
    """All ranks die before step 7; the checkpoint of step 6 is the last."""
    cfg = replace(cfg, run_id="killed", checkpoint_every="3")
    died(cfg, folder, stop=7)
    return dict(different=same(train(cfg, folder), whole, 6))


def signalled(whole, cfg, folder):
    """The signal comes to rank 1 alone."""
    cfg = replace(cfg, run_id="signalled", checkpoint_every="0")
    rank = train_gpt.Runtime(cfg).rank
    watch = dict(signals=[(4, signal.SIGTERM)]) if rank else {}
    end, _ = died(cfg, folder, SystemExit, **watch)
    names = sorted(path.name for path in (folder / "signalled/checkpoint").iterdir())
    dist.barrier()
    return dict(code=end.code, names=names, different=same(train(cfg, folder), whole, 5))


def mended(whole, cfg, folder):
    """The last shard, which step 4 begins to read, is bad at first."""
    cfg = replace(cfg, run_id="mended", checkpoint_every="0")
    path = shards(folder)[-1]
    content = bad_token(path, 0) if dist.get_rank() == 0 else b""
    dist.barrier()
    error, _ = died(cfg, folder, train_gpt.UserError)
    names = sorted(path.name for path in (folder / "mended/checkpoint").iterdir())
    dist.barrier()
    if content:
        path.write_bytes(content)
    dist.barrier()
    return dict(error=str(error), names=names, different=same(train(cfg, folder), whole, 3))


def poisoned(whole, cfg, folder, name):
    """Rank 1's gradient of one step is not finite."""
    cfg = replace(cfg, run_id=f"poisoned_{name}", checkpoint_every="1")
    before = new_trainer(replace(cfg, run_id="unused"), folder)
    for _ in range(5):
        before.update(train_gpt.lr_factor(before.step, 0.0, cfg))
    wanted = {n: w.detach().clone() for n, w in before.model.named_parameters()}
    error, trainer = died(cfg, folder, train_gpt.UserError, spoil=spoiled(5, rank=1, name=name))
    weights = dict(trainer.model.named_parameters())
    changed = [n for n, w in weights.items() if not torch.equal(w, wanted[n])]
    last = max(path.name for path in trainer.folder.glob("step_*.json"))
    return dict(
        error=str(error),
        step=trainer.step,
        changed=changed,
        finite=finite(trainer.rt.folder),
        last=last,
    )


def main():
    folder = Path(sys.argv[1])
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    cfg = configuration(run_id="whole")
    if rank == 0:
        shards(folder)
    dist.barrier()
    with open(os.devnull, "w") as quiet, contextlib.redirect_stdout(quiet):
        whole = train(cfg, folder)
        results = dict(
            interrupted=interrupted(whole, cfg, folder),
            signalled=signalled(whole, cfg, folder),
            mended=mended(whole, cfg, folder),
            bank=poisoned(whole, cfg, folder, "qo_bank"),
            small=poisoned(whole, cfg, folder, "tok_emb"),
        )
    (folder / f"results_rank{rank}.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
