"""Checkpoint and resume: a run that died goes on from its last good checkpoint, on the same ranks
and threads bit for bit.

runs/<RUN_ID>/checkpoint/step_<n>.safetensors holds every tensor that a step changes, step_<n>.json
the rest and a sha256 over both. Rank 0 writes the tensors first, each file whole or not at all, so
a .json makes a checkpoint; the last two stay. train_gpt.py calls `save` and `resume`.
"""

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch


def save(trainer: Any, script: ModuleType) -> None:
    """Called on every rank; the others wait until the files are on rank 0's disk. If a signal was
    the reason, the process ends with status 128 + its number."""
    trainer.optimizers.muon.gather()
    if trainer.rt.rank == 0:
        tensors = {name: tensor.clone() for name, tensor in changing(trainer).items()}
        write(trainer.folder, state_of(trainer, script), tensors, script)
    trainer.rt.barrier()
    if trainer.signal:
        number = int(trainer.signal)
        trainer.rt.log(
            "note",
            f"signal {number} at step {trainer.step}: checkpoint written, RESUME=auto goes on",
        )
        sys.exit(128 + number)


def resume(trainer: Any, script: ModuleType) -> None:
    """Put the newest whole checkpoint into the trainer; leave it as it is where there is none.
    UserError where all are damaged, or for other settings, ranks or data."""
    find(trainer, script)
    furthest, least = trainer.rt.largest(trainer.step, -trainer.step).tolist()
    if furthest != -least:
        fix = "run in one folder that all hosts share, or copy it"
        message = f"of step {furthest:.0f} on one host, {-least:.0f} on another; fix: {fix}"
        raise script.UserError(f"{trainer.folder}: {message}")


def find(trainer: Any, script: ModuleType) -> None:
    """The newest whole checkpoint into this rank's trainer."""
    paths = sorted(trainer.folder.glob("step_*.json"), reverse=True)
    for path in paths:
        try:
            return restore(trainer, *read(path, script), script)
        except script.UserError:
            raise
        except Exception as error:  # json and safetensors have their own
            trainer.rt.log("note", f"{path} is passed over, damaged: {error}")
    if paths:
        fix = "put one back, or OVERWRITE=1"
        raise script.UserError(f"{trainer.folder}: no whole checkpoint; fix: {fix}")


def changing(trainer: Any) -> dict[str, torch.Tensor]:
    """Name -> each tensor that a step changes. Muon's momenta are those of all ranks."""
    averages, optimizers = trainer.averages, trainer.optimizers
    groups = dict(weight=averages.weights, ema=averages.ema, swa=averages.swa)
    groups |= dict(grid=trainer.model.buffers(), rng=[torch.get_rng_state()])
    groups["muon"] = [bank.momenta for bank in optimizers.muon.banks]
    groups["adam"] = [x for state in optimizers.adam.state.values() for x in state.values()]
    return {f"{name}.{i}": x for name, group in groups.items() for i, x in enumerate(group)}


def state_of(trainer: Any, script: ModuleType) -> dict[str, Any]:
    """The rest: counters, the loader's place, and how long the logs were."""
    state = dict(step=trainer.step, qat_since=trainer.qat_since, seconds=trainer.elapsed)
    state |= dict(snapshots=trainer.averages.snapshots, loader=trainer.loader.state())
    return state | dict(
        settings=settings(trainer, script), logs=[f.tell() for f in trainer.rt.files[1:]]
    )


def settings(trainer: Any, script: ModuleType) -> dict[str, Any]:
    """What must be the same where a run goes on."""
    first, after = map(script.NAMES.index, ("train_batch_tokens", "eval_seq_len"))
    names = ["seed", *script.NAMES[first:after]]
    sizes = [path.stat().st_size for path in trainer.loader.shards]
    heads = [np.fromfile(path, np.uint8, 4096) for path in trainer.loader.shards]
    found = {name.upper(): script.show(getattr(trainer.cfg, name)) for name in names}
    shards = f"{len(sizes)} of {sum(sizes)} bytes, {script.sha(np.concatenate(heads))[:12]}"
    return found | dict(RANKS=trainer.rt.world_size, SHARDS=shards)


def restore(trainer: Any, state: dict, tensors: dict, script: ModuleType) -> None:
    """State and tensors into the trainer; some exception where they do not fit."""
    for name, now in settings(trainer, script).items():
        if (was := state["settings"][name]) != now:
            fix = "set it back, or OVERWRITE=1 to begin again"
            raise script.UserError(
                f"{trainer.folder}: made with {name}={was}, not {now}; fix: {fix}"
            )
    counters = [state[name] for name in ("step", "seconds", "snapshots")]
    loader, (shard, offset) = trainer.loader, state["loader"]
    loader.restore((shard, offset))
    since = 0 if state["qat_since"] is None else state["qat_since"]
    whole = [counters[0], counters[2], since, shard, offset]
    if {*map(type, whole)} != {int} or counters[0] > trainer.cfg.iterations:
        raise ValueError(f"at {counters}, late QAT since {since}")
    if min(*counters, *whole) < 0 or offset > len(loader.tokens):
        raise ValueError(f"at {counters}, {offset} of shard {shard}")
    own = changing(trainer)
    for name, tensor in own.items():
        tensor.copy_(tensors[name].view(tensor.shape))
    torch.set_rng_state(own["rng.0"])
    trainer.step, trainer.rt.seconds["train"], trainer.averages.snapshots = counters
    trainer.qat_since = state["qat_since"]
    trainer.rt.log("resumed", step=trainer.step)


def write(folder: Path, state: dict, tensors: dict, script: ModuleType) -> None:
    """The two files, and nothing else but those of the checkpoint before."""
    path = folder / f"step_{state['step']:08}.json"
    data = formats(script).save(tensors)
    folder.mkdir(parents=True, exist_ok=True)
    script.write_atomically(path.with_suffix(".safetensors"), data)
    entry = dict(state=state, sha256=script.sha(json.dumps(state).encode() + data))
    script.write_atomically(path, json.dumps(entry).encode())
    earlier = [other for other in folder.glob("step_*.json") if other <= path]  # later: damaged
    kept = {other.stem for other in sorted(earlier)[-2:]}
    for path in sorted(folder.glob("*step_*")):
        if path.stem not in kept:
            path.unlink()


def read(path: Path, script: ModuleType) -> tuple[dict, dict]:
    """-> state, tensors; some exception where the files are not whole"""
    data, entry = path.with_suffix(".safetensors").read_bytes(), json.loads(path.read_bytes())
    if script.sha(json.dumps(entry["state"]).encode() + data) != entry["sha256"]:
        raise ValueError("its sha256 does not fit")
    return entry["state"], formats(script).load(data)


def formats(script: ModuleType) -> ModuleType:
    """safetensors.torch; UserError where the package is missing"""
    script.backend("safetensors")
    import safetensors.torch

    return safetensors.torch
