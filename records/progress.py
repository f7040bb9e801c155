"""Where a run stands: a bar on a terminal; time, speed and memory for the lines of its log.

train_gpt.py runs without this file. A bar is drawn only where a person can see it: nothing is
imported, printed or changed where standard error is no terminal.
"""

import math
import re
import sys
from datetime import timedelta
from types import ModuleType
from typing import Any

# Dense bf16 FLOP/s by the name that CUDA gives a device; the first that is found in it.
PEAKS = {
    "B200": 2250e12,
    "H[12]00 NVL": 835e12,
    "H100 PCIe": 756e12,
    r"H[128]00\b": 989e12,
    r"A[18]00\b": 312e12,
    "L40S": 362e12,
    r"L4\b": 121e12,
    r"A10G?\b": 125e12,
    r"RTX 4090$": 165e12,
    r"RTX 3090$": 71e12,
}
# Matrices that every token is multiplied with; those of a layer applied twice, twice.
ONCE = ("tok_emb", "bigram_proj", "enrich_up", "enrich_down", "ve_proj")
LAYERS = ("qo_bank", "kv_bank", "mlp_up_bank", "mlp_down_bank", "attn_gate_weight")


def attach(rt: Any, script: ModuleType) -> None:
    """Let rt.tick(stage, done, total) draw a bar, on rank 0 of a run that a terminal shows. Lines
    that are logged or go to standard error meanwhile appear above it."""
    if rt.rank or not sys.stderr.isatty() or not script.has_backend("tqdm"):
        return
    import atexit

    from tqdm import tqdm
    from tqdm.contrib import DummyTqdmFile

    tqdm.monitor_interval = 0  # no thread beside the run
    bars = Bars(rt, tqdm, sys.stderr)
    rt.tick, rt.files[0], sys.stderr = (
        bars.tick,
        DummyTqdmFile(rt.files[0]),
        DummyTqdmFile(sys.stderr),
    )
    atexit.register(bars.close)


class Bars:
    """One bar after the other; each disappears when its stage is done or the next one begins."""

    def __init__(self, rt: Any, tqdm: Any, file: Any):
        self.rt, self.tqdm, self.file, self.stage, self.bar = rt, tqdm, file, "", None

    def tick(self, stage: str, done: int, total: int) -> None:
        """`done` of `total` steps, windows or tokens of a stage are behind us."""
        if stage == "train":
            total = self.expected_steps(done, total)
        if self.bar is None or stage != self.stage or done < self.bar.n:
            self.close()
            look = dict(unit="step" if stage == "train" else "it", unit_scale=total >= 10**6)
            look |= dict(
                file=self.file, leave=False, dynamic_ncols=True, mininterval=0.2, miniters=1
            )
            self.stage, self.bar = stage, self.tqdm(None, stage, total, initial=done, **look)
        self.bar.total = total
        self.bar.update(done - self.bar.n)
        if done >= total:
            self.close()

    def expected_steps(self, done: int, total: int) -> int:
        """As many as the cap leaves time for, at the mean speed so far."""
        cap, spent = self.rt.cfg.max_wallclock_seconds, self.rt.seconds["train"]
        if not cap or not spent:
            return total
        return min(total, done if spent >= cap else max(done + 1, math.ceil(done * cap / spent)))

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def facts(trainer: Any, script: ModuleType) -> dict[str, Any]:
    """Of a step line: the seconds of training, training tokens/s, on a CUDA device that is known
    the
    share of its peak (mfu), and h:mm:ss of training left (eta); validation and the scores after it
    come on top."""
    cfg, rt, step = trainer.cfg, trainer.rt, trainer.step
    spent = rt.seconds["train"]
    speed, left = cfg.train_batch_tokens * step / spent, (cfg.iterations - step) * spent / step
    if cfg.max_wallclock_seconds:
        left = min(left, max(0.0, cfg.max_wallclock_seconds - spent))
    values = dict(train_time_ms=int(1000 * spent), step_avg_ms=1000 * spent / step)
    values["tokens_per_s"] = int(speed)
    peak = peak_flops(script.torch.cuda.get_device_name(rt.device)) if rt.cuda else None
    if peak:
        values["mfu"] = speed * token_flops(cfg, script) / (peak * rt.world_size)
    return values | dict(eta=str(timedelta(seconds=round(left))))


def peak_flops(device: str) -> float | None:
    """Dense bf16 FLOP/s of a device by its name; None where it is unknown."""
    return next((peak for name, peak in PEAKS.items() if re.search(name, device)), None)


def token_flops(cfg: Any, script: ModuleType) -> int:
    """FLOPs of a training token, forward and backward: 6 a weight, 12 * layers * width * length for
    attention, as PaLM counts (arXiv 2204.02311, appendix B): the causal half is not taken off."""
    sizes = {name: math.prod(spec.shape) for name, spec in script.parameter_specs(cfg).items()}
    applied = cfg.num_layers + len({*cfg.depth_recurrence})
    layers = sum(sizes.get(name, 0) for name in LAYERS) // cfg.num_layers
    weights = sum(sizes.get(name, 0) for name in ONCE) + applied * layers
    return 6 * weights + 12 * applied * cfg.model_dim * cfg.train_seq_len


def peak_memory(rt: Any, script: ModuleType) -> int:
    """MB (10^6 bytes) that this rank held at most: allocated on its CUDA device, else resident."""
    if rt.cuda:
        return script.torch.cuda.max_memory_allocated(rt.device) // 10**6
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB, on macOS bytes
    return most * (1 if sys.platform == "darwin" else 1024) // 10**6
