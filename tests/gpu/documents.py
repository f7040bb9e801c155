"""Documents side by side in lanes: scored as in one row each, then a whole proof by the codec."""

import subprocess
import time
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from common import (
    RANKS,
    VALIDATION_TARGETS,
    all_switches,
    configuration,
    gb,
    synthetic_stream,
)
from helpers import perturbed, random_stream, train_gpt
from speed import as_on_cuda

FP32_TOLERANCE, BF16_TOLERANCE = 1e-4, 1e-2  # of ||log p - true|| / ||true - its mean||
DOCUMENT = 256  # tokens at most, so that few steps fill every lane evenly
SLACK_BYTES = 64  # of a coded text beside its claim, and 0.1 %


def documents(job):
    """Scores against whole rows, the speed of a step, encode and decode in a fresh process."""
    whole_rows(job)
    how = "zstd" if train_gpt.has_package("zstandard") else "lzma"
    lanes, coded = job.sizes.lanes, job.sizes.coded
    cfg = configuration("own", job, eval_lanes=lanes, codec_tokens=coded, compressor=how)
    runtime = train_gpt.Runtime(cfg)
    runtime.folder = job.options.folder / "proof"
    runtime.folder.mkdir()
    path, weights = runtime.folder / "artifact.bin", perturbed(cfg, spread=0.02).named_parameters()
    path.write_bytes(train_gpt.pack_artifact(dict(weights), cfg))
    model = train_gpt.load_artifact(path, job.device)
    stream = synthetic_stream(job.sizes.documents, cfg.vocab_size)
    stream[::DOCUMENT] = train_gpt.BOS
    yield
    lane_step(job, model, runtime, cfg)
    lane_attention(job, cfg)
    scores, order = speed(job, model, runtime, stream)
    if train_gpt.has_package("constriction"):
        proof(job, runtime, stream, (scores, order))
    else:
        job.row("proof", "constriction is not installed", "SKIP")


def whole_rows(job):
    """On every switch: lanes, each with many documents, against one row a document. Without
    BOS_RESET a lane itself must forget the document before."""
    cfg = all_switches(job, eval_lanes=16, bos_reset=False)
    model = perturbed(cfg, spread=0.05).to(job.device).eval().requires_grad_(False)
    stream, starts = random_stream(6_000, cfg.vocab_size), np.arange(0, 6_001, 50)
    starts += np.random.default_rng(0).integers(-20, 20, len(starts))
    stream[starts[(starts > 0) & (starts < len(stream))]] = train_gpt.BOS
    runtime = train_gpt.Runtime(cfg)
    here, _ = train_gpt.score_documents(model, runtime, cfg, stream)
    true = rows_of_documents(model, runtime, stream)
    tolerance = BF16_TOLERANCE if job.cuda else FP32_TOLERANCE
    for name, a, b in zip(("log p", "entropy"), here, true, strict=False):
        error = float(np.linalg.norm(a - b) / np.linalg.norm(b - b.mean()))
        text = (
            f"relative error {error:.2g}, {tolerance:g} allowed; largest {np.abs(a - b).max():.2g} "
        )
        text += f"nats, {len(b):,} targets of documents in {cfg.eval_lanes} lanes"
        job.check(f"lanes, {name}", error <= tolerance, text, error=error)


@torch.no_grad()
def rows_of_documents(model, runtime, stream):
    """log p of the targets and entropy, float64 (2, N), each document a row by itself."""
    columns, starts = [], [*np.flatnonzero(stream[:-1] == train_gpt.BOS), len(stream) - 1]
    for a, b in zip(starts, starts[1:], strict=False):
        ids, targets = (
            torch.from_numpy(stream[part].astype(np.int64)).to(runtime.device)
            for part in (slice(a, b), slice(a + 1, b + 1))
        )
        with runtime.autocast():
            log_probs, entropy = train_gpt.predict(model, model.hidden(ids[None])[0])
        columns.append(torch.stack([log_probs.gather(-1, targets[:, None])[:, 0], entropy]).cpu())
    return torch.cat(columns, 1).numpy()


@torch.no_grad()
def lane_step(job, model, runtime, cfg):
    """A step of all lanes of one of RANKS GPUs, half the window behind them."""
    lanes, steps = cfg.eval_lanes, VALIDATION_TARGETS / (cfg.eval_lanes * RANKS)
    job.reset_peak()
    capture, forward = job.seconds(lambda: train_gpt.lane_pass(model, runtime, lanes, cfg.window))
    ids = torch.full((lanes,), 2, device=job.device)
    places = torch.full((lanes,), cfg.window // 2, device=job.device)
    step = job.median_seconds(lambda: forward(ids, places), job.sizes.steps)
    text = (
        f"{1e3 * step:.2f} ms, {lanes / step:,.0f} targets/s; {lanes} lanes, window {cfg.window}, "
    )
    text += f"captured in {capture:.1f} s, peak {gb(job.peak_gb())}; {steps:,.0f} steps score all"
    job.row("lane step", text, step_ms=1e3 * step, capture=capture, peak_gb=job.peak_gb())


@torch.no_grad()
def lane_attention(job, cfg):
    """The one query of a lane against its keys: grouped by SDPA as the model does it, and with the
    heads of a group as the queries of one head, which more kernels take."""
    lanes, heads, few, width = cfg.eval_lanes, cfg.num_heads, cfg.num_kv_heads, cfg.model_dim
    how = dict(device=job.device, dtype=torch.bfloat16)
    q = torch.randn(lanes, heads, 1, width // heads, **how)
    k, v = torch.randn(2, lanes, few, cfg.window, width // heads, **how)
    mask = torch.arange(cfg.window, device=job.device) < cfg.window // 2
    mask, rows = mask.expand(lanes, 1, 1, -1), q.view(lanes, few, -1, width // heads)
    ways = {
        "grouped": lambda: F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=few != heads),
        "as rows": lambda: F.scaled_dot_product_attention(rows, k, v, mask),
    }
    true = F.scaled_dot_product_attention(rows.float(), k.float(), v.float(), mask).flatten()
    for name, attend in ways.items():
        job.reset_peak()
        seconds = job.median_seconds(attend, job.sizes.repeats)
        error = float((attend().flatten() - true).norm() / true.norm())
        text = f"{1e3 * seconds:.3f} ms a call, relative error {error:.2g}, "
        text += f"{BF16_TOLERANCE:g} allowed, "
        text += f"peak {gb(job.peak_gb())}; {lanes} lanes, window {cfg.window}"
        values = dict(call_ms=1e3 * seconds, error=error, peak_gb=job.peak_gb())
        job.check(f"lane attention {name}", error <= BF16_TOLERANCE, text, **values)


def speed(job, model, runtime, stream):
    """-> what score_documents returns; a step costs the same however many lanes are at work"""
    job.reset_peak()
    how = model, runtime, runtime.cfg, stream
    seconds, (scores, order) = job.seconds(lambda: train_gpt.score_documents(*how))
    size = len(stream) - 1
    steps = int(order.schedule[0][-1])
    full = VALIDATION_TARGETS / (job.sizes.lanes * RANKS) * seconds / steps
    text = (
        f"{size / seconds:,.0f} targets/s, {1e3 * seconds / steps:.2f} ms each of {steps:,} steps, "
    )
    text += (
        f"peak {gb(job.peak_gb())}; {VALIDATION_TARGETS:,} targets on {RANKS} GPUs: {full:.0f} s, "
    )
    text += f"extrapolated from {size:,}"
    values = dict(seconds=full, targets_per_s=size / seconds, peak_gb=job.peak_gb())
    job.check("speed", bool(np.isfinite(scores.log_prob).all()), text, **values)
    return scores, order


def proof(job, runtime, stream, scored):
    """Encode here, decode in a fresh process; the coded bytes are those that the scores claim."""
    scores, order = scored
    how = dict(cfg=runtime.cfg, rt=runtime, score=lambda *_, **__: None)
    report = SimpleNamespace(**how, text=SimpleNamespace(stream=stream))
    (runtime.folder / "train_gpt.py").write_bytes(train_gpt.CODE.read_bytes())
    with as_on_cuda(job):
        final = train_gpt.mix_ngrams(scores, order, report)
    seconds, said = {}, []
    coded, codec = clocked_proof(job, report, final[order.targets], (seconds, said))
    mass_error = coded.mass_error
    tokens, coded, claimed = (codec[f] for f in ("proved_tokens", "coded_bytes", "claimed_bytes"))
    text = f"decoded {codec['decoded']}, {tokens:,} tokens, {coded:,} bytes, {claimed:,} claimed, "
    text += f"mass error {mass_error:.1g}; encoding {tokens / seconds['encode']:,.0f} tokens/s, "
    text += f"decoding {tokens / seconds['decode']:,.0f} with the start of its process"
    right = codec["decoded"] == "ok" and mass_error < 1e-9
    right &= abs(coded - claimed) <= SLACK_BYTES + claimed / 1000
    speeds = {f"{name}_tokens_per_s": tokens / spent for name, spent in seconds.items()}
    job.check("proof", right, " ".join([text, *said]), **speeds, **codec, mass_error=mass_error)


def clocked_proof(job, report, log_prob, noted):
    """train_gpt.prove; notes the seconds of both directions, and what the decoder complains of."""
    (seconds, said), encode, run = noted, train_gpt.encode, subprocess.run

    def encoder(*arguments):
        seconds["encode"], coded = job.seconds(lambda: encode(*arguments))
        return coded

    def decoder(command, **how):
        how |= dict(stderr=subprocess.PIPE, timeout=max(10, min(job.box, job.left()) - 5))
        began = time.perf_counter()
        done = run(command, **how)
        seconds["decode"] = time.perf_counter() - began
        complaint = done.stderr.decode(errors="replace").splitlines()[-1:]
        said.extend(complaint if done.returncode else [])
        return done

    with (
        mock.patch.object(train_gpt, "encode", encoder),
        mock.patch.object(train_gpt.subprocess, "run", decoder),
    ):
        return train_gpt.prove(report, log_prob)
