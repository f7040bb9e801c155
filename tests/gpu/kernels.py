"""What a profiler sees of the device: time by kind, launches, and the kernels of attention."""

import json
import re
import tempfile
from collections import Counter
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, supported_activities

# In the order in which they are tried; what fits none is elementwise work and reductions.
KINDS = {
    "attention": r"flash|fmha|sdpa|attention|attn",
    "matmul": r"gemm|gemv|nvjet|cutlass|cublas|xmma|splitk",
    "nccl": r"nccl",
    "copy": r"^mem(cpy|set)",
}
REST = "elementwise"
DEVICE_EVENTS = ("kernel", "gpu_memcpy", "gpu_memset")


def kind_of(name):
    if name.startswith("triton_"):  # which are named after what they fuse, attention included
        template = name.startswith("triton_tem")
        flex = re.match("triton_(tem_fused_)?flex_attention", name)  # both ways
        return "attention" if flex else "matmul" if template else REST
    return next((k for k, like in KINDS.items() if re.search(like, name, re.IGNORECASE)), REST)


def events(job, run):
    """Of a call of run(): {name, ts, dur}, ts and dur in us; of the device, on a CPU of the host"""
    if job.cuda and ProfilerActivity.CUDA not in supported_activities():
        return []
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * job.cuda
    job.wait_for_device()
    with profile(activities=activities, acc_events=True) as seen:
        run()
        job.wait_for_device()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        seen.export_chrome_trace(str(path))
        trace = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    wanted = DEVICE_EVENTS if job.cuda else ("cpu_op",)
    return [event for event in trace if event.get("cat") in wanted]


def busy_us(found):
    """For how long at least one of the events was under way."""
    spent, until = 0.0, 0.0
    for event in sorted(found, key=lambda event: event["ts"]):
        end = event["ts"] + event["dur"]
        spent += max(0.0, end - max(event["ts"], until))
        until = max(until, end)
    return spent


def split(job, item, run, steps, wall):
    """A row of where the time of so many steps goes, which run() makes; wall: seconds of one of
    them without a profiler, since a profiler makes the host slow. Another of the kernels that
    attend: none is a FAIL, for then attention is spelt out (SDPA's "math"), and slow."""
    found = events(job, run)
    if not found:
        reason = "torch.profiler saw no kernel here (CUPTI), or there is no GPU"
        return job.row(item, reason, "SKIP")
    times, names = Counter(), Counter()
    for event in found:
        times[kind_of(event["name"])] += event["dur"] / steps
        names[event["name"]] += event["dur"] / steps
    busy = busy_us(found) / steps
    spent = {kind: times[kind] / 1e3 for kind in (*KINDS, REST)}
    spent["idle"] = max(0.0, 1e3 * wall - busy / 1e3)
    launches = sum(event["cat"] != "gpu_memset" for event in found) / steps
    text = ", ".join(f"{kind} {ms:.2f}" for kind, ms in spent.items() if ms)
    text = f"{text} ms of {1e3 * wall:.2f}; {launches:,.0f} kernels and copies a step"
    attention = short({name: t for name, t in names.items() if kind_of(name) == "attention"})
    top = short(dict(names.most_common(12)))
    values = dict(ms=spent, launches=launches, attention=attention, top=top)
    if not job.cuda:
        return job.row(item, f"no kernels on a CPU, operations: {text}", "SKIP", **values)
    job.row(item, text, **values)
    named = "; ".join(f"{name} {us:,.0f} us" for name, us in attention.items())
    return job.check(f"{item}: kernels", bool(attention), named or f"none found among {top}")


def short(names, width=90):
    """Kernels' names without what all templates have, by time."""
    found = Counter()
    for name, us in names.items():
        name = re.sub(
            r"\b(void|pytorch_flash::|cutlass::|at::native::|\(anonymous.*?\)::)", "", name
        )
        found[" ".join(name.split())[:width]] += us
    return dict(found.most_common())


def versions():
    """What chooses kernels."""
    cudnn = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    return dict(torch=torch.__version__, cuda=torch.version.cuda, cudnn=cudnn)
