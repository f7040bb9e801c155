"""Training steps as Trainer.run makes them, and what the host costs.

MFU = tokens per second x training FLOP per token / peak dense bf16 FLOP/s of the device, with

    training FLOP per token = 6 x matmul parameters + 12 x layers x T x D x 0.5

as PaLM counts (train_gpt.token_flops), but of attention the causal half alone, since the other half
is not computed. Newton-Schulz, AdamW, averaging and recomputation count nothing.
"""

import contextlib
import time
import warnings
from unittest import mock

import kernels
import numpy as np
import torch
from common import STEP_MS, Skip, gb, new_trainer, share_of
from helpers import train_gpt

from train_gpt import Reading, peak_flops, token_flops

WARM_UP = 4  # steps, of which the last finds everything compiled


def step(job, record="own", name="", fp32_stream=False, profiled=False, **changes):
    """One GPU's share of a step: compiled, timed, taken apart. name: of the row, the RECORD's where
    there is none."""
    name = name or record
    cfg = share_of(record, job, **changes)
    runtime = train_gpt.Runtime(cfg)
    if cfg.attn_impl in train_gpt.FLASH:
        try:
            train_gpt.use_attention(cfg.attn_impl, job.cuda)
        except train_gpt.ConfigError as error:
            raise Skip(str(error)) from error
    shard = job.options.folder / "stream_train_000000.bin"
    with residual_stream(fp32_stream), contextlib.ExitStack() as closing:
        trainer = new_trainer(cfg, runtime, shard)
        closing.callback(trainer.batches.close)
        first, _ = job.seconds(lambda: trainer.update(1.0))
        job.seconds(lambda: [trainer.update(1.0) for _ in range(WARM_UP - 1)])
        yield
        wall = timed(job, name, trainer, first)
        if not profiled:
            return
        waits(job, name, trainer)

        def run():
            for _ in range(job.sizes.profiled):
                trainer.update(1.0)

        kernels.split(job, f"{name}: split", run, job.sizes.profiled, wall)


def residual_stream(fp32):
    """The model as it is, or with the stream as fp32 embeddings and gains leave it."""
    if fp32:
        return mock.patch.object(train_gpt, "stream_dtype", lambda x: x)
    return contextlib.nullcontext()


def timed(job, name, trainer, first):
    """The row of a step -> seconds of one"""
    cfg = trainer.cfg
    job.reset_peak()
    ahead, launched, loss = run_ahead(trainer, job.sizes.steps)
    peak, forced = job.peak_gb(), forced_wait(job, trainer, job.sizes.steps)
    wall, held = float(np.median(ahead)), float(np.median(forced))
    tokens = cfg.train_batch_tokens
    looped = trainer.model.looped
    blocks = train_gpt.count_blocks(cfg, looped)
    flops = token_flops(cfg, looped) - 6 * blocks * cfg.model_dim * cfg.train_seq_len
    limit = job.cuda and peak_flops(torch.cuda.get_device_name())
    mfu = tokens * flops / wall / limit if limit else None
    low, high = np.percentile(ahead, [10, 90]) * 1e3
    host = 1e3 * float(np.median(launched))
    text = f"{1e3 * wall:.1f} ms a step ({low:.1f} to {high:.1f}), {1e3 * held:.1f} with a wait in "
    text += f"each, host {host:.1f}; {tokens / wall:,.0f} tokens/s, MFU "
    text += f"{f'{mfu:.1%}' if mfu else '-'}, peak {gb(peak)}; {tokens:,} tokens, T "
    text += f"{cfg.train_seq_len}, first step {first:.0f} s, loss {loss:.3f}"
    text += f"; at most {STEP_MS} wanted on 8" if name == "pr993" else ""
    values = dict(step_ms=1e3 * wall, forced_ms=1e3 * held, bubble_ms=1e3 * (held - wall))
    values |= dict(host_ms=host, tokens_per_s=tokens / wall, mfu=mfu, peak_gb=peak, loss=loss)
    values |= dict(compile_seconds=first, batch_tokens=tokens, **kernels.versions())
    job.check(name, bool(np.isfinite(loss)), text, **values)
    return wall


def run_ahead(trainer, count):
    """As Trainer.run: the loss is read a step later. -> seconds of each step, those in which the
    host launched it, last loss"""
    ends, launched = [], []
    loss = Reading(trainer.update(1.0))
    for _ in range(count + 2):
        previous, began = loss, time.perf_counter()
        loss = Reading(trainer.update(1.0))
        launched.append(time.perf_counter() - began)
        trainer.agree(previous, soon=True)
        ends.append(time.perf_counter())
    trainer.agree(loss)
    return np.diff(ends)[1:], launched[2:], loss.get()


def forced_wait(job, trainer, count):
    """Seconds of steps after each of which the host waits."""
    return [job.seconds(lambda: trainer.update(1.0))[0] for _ in range(count)]


def waits(job, name, trainer):
    """A row: how often the host waits for the device while it launches a step."""
    if not job.cuda:
        return job.row(f"{name}: waits", "needs CUDA", "SKIP")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        Reading(trainer.update(1.0))
        torch.cuda.set_sync_debug_mode("default")
    found = [w for w in said if "synchronizing CUDA operation" in str(w.message)]
    where = sorted({f"{w.filename.rpartition('/')[2]}:{w.lineno}" for w in found})
    text = f"the host waits {len(found)} times while it launches a step {' '.join(where)}"
    return job.check(f"{name}: waits", not found, text, waits=len(found))
