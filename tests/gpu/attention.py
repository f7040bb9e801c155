"""The kernels behind scaled_dot_product_attention at the shapes of the RECORDs."""

import contextlib
import warnings

import torch
import torch.nn.functional as F
from common import RANKS, configuration, record_names
from torch.nn import attention as sdpa
from torch.nn.attention import SDPBackend, sdpa_kernel

BACKENDS = {
    "auto": None,
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
TOLERANCE = 2e-2  # of the output and of each gradient, in bf16, against math in fp32
NO_KERNEL = (
    "No available kernel",
    "No viable backend",
    "No valid execution plans",
    "not support",
)
CHECKED_ROWS, MATH_ROWS = 2, 4  # math holds all T x T weights


def shapes(job):
    """(rows, heads, kv heads, T, head width) -> the RECORDs that have it"""
    found = {}
    for record in record_names():
        cfg = configuration(record, job)
        rows = cfg.train_batch_tokens // RANKS // cfg.train_seq_len
        shape = rows, cfg.num_heads, cfg.num_kv_heads
        shape += cfg.train_seq_len, cfg.model_dim // cfg.num_heads
        found.setdefault(shape, []).append(record)
    return found


def inputs(shape, rows, device):
    """q, k, v and the output's gradient, bf16 (rows, heads, T, d), laid out as in the model."""
    _, heads, few, length, width = shape
    source = torch.Generator(device).manual_seed(0)
    return [
        torch.randn(rows, length, h, width, device=device, generator=source)
        .to(torch.bfloat16)
        .transpose(1, 2)
        .requires_grad_(i < 3)
        for i, h in enumerate((heads, few, few, heads))
    ]


def attend(q, k, v, grouped):
    """Causal; without `grouped`, keys and values are repeated for kernels that cannot group."""
    if not grouped:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    gqa = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)


def with_gradients(q, k, v, upstream, grouped):
    y = attend(q, k, v, grouped)
    return y, *torch.autograd.grad(y, (q, k, v), upstream)


def kernel(backend):
    return contextlib.nullcontext() if backend is None else sdpa_kernel(backend)


def largest_error(shape, backend, grouped, device):
    """Of output and gradients, relative, against math in fp32 from the same bf16 inputs."""
    given = inputs(shape, CHECKED_ROWS, device)
    with kernel(backend):
        here = with_gradients(*given, grouped)
    exact = [x.detach().float().requires_grad_(x.requires_grad) for x in given]
    with sdpa_kernel(SDPBackend.MATH):
        true = with_gradients(*exact, grouped)
    return max(float((a.float() - b).norm() / b.norm()) for a, b in zip(here, true, strict=True))


def timed(job, shape, backend, grouped):
    """-> ms forward, ms forward and backward, for all rows"""
    rows = min(shape[0], MATH_ROWS) if backend is SDPBackend.MATH else shape[0]
    *qkv, upstream = inputs(shape, rows, job.device)
    with kernel(backend):
        with torch.no_grad():
            forward = job.median_seconds(lambda: attend(*qkv, grouped), job.sizes.repeats)
        both = job.median_seconds(
            lambda: with_gradients(*qkv, upstream, grouped), job.sizes.repeats
        )
    return [1e3 * seconds * shape[0] / rows for seconds in (forward, both)]


def measure(job, name, shape, backend, grouped):
    """One row of the table; SKIP where no kernel takes the shape, with torch's reason."""
    rows, heads, few, length, width = shape
    item = f"{name} {'grouped' if grouped else 'repeated'} {heads}/{few}x{width}"
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            error = largest_error(shape, backend, grouped, job.device)
            forward, both = timed(job, shape, backend, grouped)
        except Exception as problem:  # of any of several libraries
            return refused(job, item, problem, said)
    flops = 3.5 * 2 * rows * heads * length**2 * width  # of both passes, half of it masked
    text = f"{forward:.2f} ms forward, {both:.2f} with backward, {flops / both / 1e9:.0f} TFLOP/s, "
    text += f"relative error {error:.2g}; {rows} rows, T {length}"
    values = dict(forward_ms=forward, both_ms=both, error=error, shape=shape)
    return job.check(item, error <= TOLERANCE, text, **values)


def refused(job, item, problem, said):
    """A row for a kernel that did not run: SKIP for "not made for this shape", else FAIL."""
    no_kernel = any(phrase in str(problem) for phrase in NO_KERNEL)
    reasons = [str(w.message).split("(Triggered")[0] for w in said] if no_kernel else []
    reasons = [reason for reason in reasons if "not used because" not in reason]
    text = " | ".join(reasons) or f"{type(problem).__name__}: {problem}"
    status = "SKIP" if no_kernel and not item.startswith("auto") else "FAIL"
    return job.row(item, " ".join(text.split())[:300], status)


def attention(job):
    """Every kernel on every shape, grouped and with repeated keys, then FlashAttention-3 and 4."""
    yield
    found = shapes(job)
    for shape, records in found.items():
        job.row("shape", f"{shape} (rows, heads, kv heads, T, width) of {', '.join(records)}")
        for name, backend in BACKENDS.items():
            for grouped in (True, False):
                measure(job, name, shape, backend, grouped)
    for name in ("FA3", "FA4"):
        activated(job, name, found)


def activated(job, name, found):
    """Measure with another flash kernel behind SDPA, if it can be had."""
    activate = getattr(sdpa, "activate_flash_attention_impl", None)
    if activate is None:
        return job.row(name, "torch has no activate_flash_attention_impl", "SKIP")
    try:
        if not job.cuda:
            raise RuntimeError("needs CUDA")
        activate(name)
    except Exception as error:  # a missing or foreign package can raise anything
        return job.row(name, f"{type(error).__name__}: {error}"[:240].replace("\n", " "), "SKIP")
    for shape in found:
        measure(job, name, shape, SDPBackend.FLASH_ATTENTION, True)
    restore = getattr(sdpa, "restore_flash_attention_impl", None)
    return restore() if restore else None
