"""Parts that measure: training steps, scoring, counts and mixture, artifact, the script itself.

MFU = tokens per second x training FLOP per token / peak dense bf16 FLOP/s of the device, with

    training FLOP per token = 6 x matmul parameters + 12 x layers x T x D x 0.5

2 FLOP for each multiply-add, 1 forward pass and 2 backward. Matmul parameters are those that
multiply an activation (banks, tied head, projections, gates), once per application, so that a
recurrent layer counts twice; embedding look-ups count nothing. Attention makes Q K^T and A V of
2 x T x D FLOP each per token and layer, three times with the backward pass, half of it masked.
Both are counted by torch's FlopCounterMode on a model without memory, and the second compared
with the formula. Newton-Schulz, AdamW, averaging and recomputation count nothing.
"""

import contextlib
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from unittest import mock

import numpy as np
import torch
from checks import future, same_counts
from common import (
    RANKS,
    VALIDATION_TARGETS,
    Skip,
    configuration,
    gb,
    host_gb,
    new_trainer,
    synthetic_stream,
)
from helpers import ROOT, SHRUNK, clean_environment, perturbed, train_gpt
from torch.utils.flop_counter import FlopCounterMode

from train_gpt import peak_flops, token_flops

MIXED = (*range(1, 10), *train_gpt.LONG_ORDERS)
BUCKETS, CHUNK = 1 << 22, 1 << 16  # of #864


def flops_per_token(job, record, cfg):
    """-> (training FLOP per token, or None, and how that comes about)"""
    length, layers = cfg.train_seq_len, cfg.num_layers + len(getattr(cfg, "depth_recurrence", ()))
    ids = torch.zeros(1, length, dtype=torch.long, device="meta")
    try:
        with FlopCounterMode(display=False) as counter:
            train_gpt.GPT(cfg).to("meta")(ids, ids)
    except Exception as error:  # the step is worth measuring all the same
        job.row(f"{record} FLOP", f"{type(error).__name__}: {error}", "FAIL")
        return None, "matmul parameters not counted"
    flops = {str(name): n / length for name, n in counter.get_flop_counts()["Global"].items()}
    linear = sum(n for name, n in flops.items() if name in ("aten.mm", "aten.addmm"))
    attention = 4 * layers * length * cfg.model_dim
    if round(sum(flops.values()) - linear) != attention:
        job.row(f"{record} FLOP", f"attention is {attention} FLOP, counted {flops}", "FAIL")
    logged = token_flops(cfg)
    if round(3 * (linear + attention)) != logged:  # PaLM's count, for mfu in log.txt
        job.row(
            f"{record} FLOP", f"train_gpt.token_flops counts {logged:,}, not these {flops}", "FAIL"
        )
    text = f"{linear / 2e6:.2f} M matmul parameters, {layers} layers"
    return 3 * linear + 3 * attention / 2, text


def steps(job, record):
    """Step time at one GPU's share of the true batch, the micro-batch of 8 ranks."""
    cfg = configuration(record, job, grad_accum_steps=1)
    cfg = replace(cfg, train_batch_tokens=cfg.train_batch_tokens // RANKS)
    flops, formula = flops_per_token(job, record, cfg)
    shard = job.options.folder / "stream_train_000000.bin"
    trainer = new_trainer(cfg, train_gpt.Runtime(cfg), shard)
    compiling, _ = job.seconds(lambda: [trainer.update(1.0) for _ in range(3)])
    yield
    job.reset_peak()
    times, loss = step_times(trainer, job.sizes.steps)
    peak, step = job.peak_gb(), float(np.median(times))
    gradient = job.median_seconds(trainer.gradients, 5)
    rate, limit = cfg.train_batch_tokens / step, job.cuda and peak_flops(device_name())
    mfu = rate * flops / limit if flops and limit else None
    low, high = np.percentile(times, [10, 90]) * 1e3
    text = f"{1e3 * step:.1f} ms a step ({low:.1f} to {high:.1f}; gradients {1e3 * gradient:.1f})"
    text += f", {rate:,.0f} tokens/s, MFU {f'{mfu:.1%}' if mfu else '-'}, peak {gb(peak)}; "
    text += f"{cfg.train_batch_tokens:,} tokens, T {cfg.train_seq_len}, {formula}, "
    text += f"compiled in {compiling:.0f} s, loss {loss:.3f}, the host waits {waits(trainer)} times"
    values = dict(step_ms=1e3 * step, gradient_ms=1e3 * gradient, tokens_per_s=rate, mfu=mfu)
    values |= dict(peak_gb=peak, flops_per_token=flops, compile_seconds=compiling, loss=loss)
    job.check(record, bool(np.isfinite(loss)), text, batch_tokens=cfg.train_batch_tokens, **values)


def step_times(trainer, count):
    """-> (seconds of each step, last loss), the host one step ahead as in Trainer.run"""
    ends, loss = [], trainer.update(1.0)
    for _ in range(count + 1):
        previous, loss = loss, trainer.update(1.0)
        previous.item()
        ends.append(time.perf_counter())
    return np.diff(ends), loss.item()


def waits(trainer):
    """How often the host waits for the device in a step, "-" on a CPU."""
    if not trainer.rt.cuda:
        return "-"
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        trainer.update(1.0)
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(w.message) for w in said)


def device_name():
    return torch.cuda.get_device_name()


def scoring(job):
    """Causality of the compiled scorer, then its speed."""
    cfg = configuration("own", job)
    model = perturbed(cfg, spread=0.02).to(job.device).eval().requires_grad_(False)
    scorer = train_gpt.WindowScorer(model, train_gpt.Runtime(cfg), cfg)
    stream = synthetic_stream(job.sizes.sliding, cfg.vocab_size)
    for stride in (scorer.length, cfg.eval_stride):
        future(job, scorer, stream[: job.sizes.future], stride)
    yield
    for stride in (scorer.length, cfg.eval_stride):
        job.reset_peak()
        seconds, _ = job.seconds(lambda stride=stride: scorer.score(stream, stride=stride))
        rate = (len(stream) - 1) / seconds
        full = VALIDATION_TARGETS / rate / RANKS
        text = f"{rate:,.0f} targets/s, peak {gb(job.peak_gb())}; {VALIDATION_TARGETS:,} targets "
        text += f"on {RANKS} GPUs: {full:.0f} s, extrapolated from {len(stream) - 1:,}"
        kind = "windows" if stride == scorer.length else "sliding"
        values = dict(targets_per_s=rate, peak_gb=job.peak_gb(), seconds=full)
        job.row(f"{kind}, stride {stride}", text, kind=kind, **values)


@contextlib.contextmanager
def as_on_cuda(job):
    """On a CPU, count with the code that CUDA runs, not with numba's."""
    other = (
        contextlib.nullcontext()
        if job.cuda
        else mock.patch.object(train_gpt, "has_package", lambda name: False)
    )
    with other:
        yield


def counts(job):
    """Exact counts of a whole validation text, #864's tables on it, the mixture over it."""
    tokens, store = synthetic_stream(job.sizes.counts), train_gpt.CountStore(MIXED)
    vocab_size = int(tokens.max()) + 1
    with as_on_cuda(job):
        same_counts(job, tokens[: job.sizes.check], vocab_size, 9)
        yield
        job.reset_peak()
        began, at = time.perf_counter(), {}
        found = train_gpt.ngram_counts(tokens, vocab_size, max(MIXED), device=job.device)

        def timed():
            for order, *stats in found:
                at[order] = time.perf_counter() - began
                yield order, *stats
                del stats

        store.collect(timed())
    text = f"{at[9]:.1f} s to order 9, {at[max(MIXED)]:.1f} s to {max(MIXED)}, {len(MIXED)} orders "
    text += f"kept; {len(tokens):,} tokens, peak {gb(job.peak_gb())}, host {gb(host_gb())}"
    peaks = dict(peak_gb=job.peak_gb(), host_gb=host_gb())
    job.row("exact", text, seconds=at[max(MIXED)], seconds_9=at[9], tokens=len(tokens), **peaks)
    blend(job, store, len(tokens) - 1)
    del store
    hashed(job, tokens, at[9])


def hashed(job, tokens, exact):
    """#864's tables, orders 2 to 9, its way: in each chunk all look-ups, then all updates."""
    try:
        from as_written import SCHEMES
    except ImportError as error:
        return job.row("hashed #864", f"records/tools/as_written.py: {error}", "SKIP")
    job.reset_peak()
    seconds, _ = job.seconds(lambda: hashed_tables(job, tokens, SCHEMES["pr864"]))
    text = f"{seconds:.1f} s, {seconds / exact:.2f} times the exact counts to order 9, "
    text += f"peak {gb(job.peak_gb())}; {BUCKETS:,} buckets, {CHUNK:,} tokens a chunk"
    return job.row("hashed #864", text, seconds=seconds, peak_gb=job.peak_gb())


def hashed_tables(job, tokens, scheme):
    """Counts of context and of context with target, int32 (2, N), of each order, dropped again."""
    tokens = torch.from_numpy(tokens.astype(np.int64)).to(job.device)
    one = torch.ones((2, CHUNK), dtype=torch.int32, device=job.device)
    for order in range(2, 10):
        keys = torch.stack(scheme.keys(tokens, order, BUCKETS))
        found = torch.zeros(keys.shape, dtype=torch.int32, device=job.device)
        tables = torch.zeros((2, BUCKETS), dtype=torch.int32, device=job.device)
        for a in range(0, keys.shape[1], CHUNK):
            key = keys[:, a : a + CHUNK]
            found[:, a : a + CHUNK] = tables.gather(1, key)
            tables.scatter_add_(1, key, one[:, : key.shape[1]])
        found.cpu()


def blend(job, store, size):
    """The mixture over a model of random entropies: two prefixes, and all of it if time allows."""
    entropy = np.random.default_rng(1).gamma(4.0, 0.7, size)

    def mixed(part):
        cut = train_gpt.Scores(log_prob=-entropy[:part], entropy=entropy[:part])
        mixer = train_gpt.Blend(store.orders, job.device)
        return job.seconds(lambda: train_gpt.mix(mixer, store, cut, None))

    mixed(600)  # loads kernels
    job.reset_peak()
    (few, many), began = job.sizes.blend, time.perf_counter()
    (first, _), (last, final) = mixed(few), mixed(many)
    seconds = last + max(0.0, last - first) / (many - few) * (size - many)
    how = f"extrapolated from {few:,} and {many:,} ({first:.1f} and {last:.1f} s)"
    spare = min(job.left() - 300, job.box / 2 - (time.perf_counter() - began))
    if many < size and seconds < spare:  # 300 s for the parts that follow
        how = f"measured; {many:,} would have said {seconds:.0f} s"
        seconds, final = mixed(size)
    bits = float(-final.mean() / np.log(2))
    text = f"{seconds:.0f} s for {size:,} targets, {how}, peak {gb(job.peak_gb())}, "
    text += f"{bits:.3f} bits a target"
    values = dict(seconds=seconds, peak_gb=job.peak_gb(), bits=bits)
    job.check("blend", bool(np.isfinite(final).all()), text, **values)


def pack(job):
    """Quantise, compress, write, read back."""
    how = "zstd" if train_gpt.has_package("zstandard") else "lzma"
    cfg = configuration("own", job, compressor=how)
    model = perturbed(cfg, spread=0.02).to(job.device)
    weights, path = dict(model.named_parameters()), job.options.folder / "artifact.bin"
    packing, data = job.seconds(lambda: train_gpt.pack_artifact(weights, cfg))
    path.write_bytes(data)
    reading, loaded = job.seconds(lambda: train_gpt.load_artifact(path, job.device))
    bank, again = model.qo_bank.detach(), loaded.qo_bank
    error = float((again - bank).norm() / bank.norm())
    text = f"{packing:.1f} s to quantise and compress ({how}), {reading:.1f} s to read; "
    text += f"{len(data):,} bytes of random weights, error {error:.3f} of a bank"
    # the floor under the scales costs most at small width
    job.check("artifact", error < 0.25, text, seconds=packing, read_seconds=reading, how=how)
    yield from ()


def script(job):
    """The program itself on the embedded text, for a few steps."""
    if not train_gpt.has_package("sentencepiece"):
        raise Skip("sentencepiece is not installed")
    if not any((ROOT / "data/sample").glob("*.jsonl.xz")):
        raise Skip("data/sample has no text")
    how = "zstd" if train_gpt.has_package("zstandard") else "lzma"
    env = clean_environment() | (SHRUNK if job.quick else dict(RECORD="tiny", ITERATIONS="40"))
    env |= dict(DEVICE=job.device, COMPRESSOR=how, RUN_ID="gpu")
    if not job.quick:
        env["CODEC_TOKENS"] = "20000" if train_gpt.has_package("constriction") else "0"
    command = [sys.executable, str(ROOT / "train_gpt.py")]
    began, timeout = time.perf_counter(), max(10, min(job.box, job.left()) - 5)
    how = dict(cwd=job.options.folder, env=env, text=True, timeout=timeout)
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **how)
    seconds = time.perf_counter() - began
    last = [line for line in done.stdout.splitlines() if line.startswith("final_ngram_exact")]
    ok = done.returncode == 0 and len(last) == 1
    tail = last[0] if ok else "; ".join(done.stdout.splitlines()[-5:])[-600:]
    job.check(
        "RECORD=tiny", ok, f"{seconds:.0f} s, exit {done.returncode}, {tail}", seconds=seconds
    )
    yield from ()
