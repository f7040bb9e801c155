"""What the parts share: configurations, a synthetic stream, clocks, rows of the table."""

import contextlib
import resource
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from helpers import ROOT, perturbed, tiny, train_gpt  # noqa: E402

RANKS = 8  # of the machine that the projections are for
VALIDATION_TARGETS = 62_021_632  # of FineWeb's validation text, sp1024
STEP_MS = 84  # what a step of #549's stack with XSA in all layers, pr993, is to take on 8 at most
ORDER = ("own", "pr864", "pr810", "pr1026", "pr993", "pr808")  # others follow
VOCAB_SIZE = 1024

# The most that --quick leaves of a configuration; a smaller value, such as 0 for "off", stays.
QUICK = dict(
    model_dim=64,
    num_heads=4,
    num_kv_heads=2,
    rope_dims=16,
    bigram_vocab_size=64,
    bigram_dim=16,
    ve_dim=16,
    pre_enrich_dim=48,
    train_seq_len=64,
    train_batch_tokens=RANKS * 256,
    eval_seq_len=64,
    eval_stride=16,
    eval_batch_seqs=4,
    eval_lanes=RANKS * 4,
    eval_longest_first=8,
)


@dataclass(frozen=True)
class Sizes:
    """How much each part does: for a GPU of a data centre, or for a look on a CPU."""

    shard: int = 4_000_001  # tokens to train on
    steps: int = 30  # timed
    profiled: int = 3  # steps under the profiler
    rows: int = 6_000  # tokens scored in lanes and in rows of their own
    lane_steps: int = 512  # timed, of each way
    windows: int = 2_097_153  # tokens scored in windows
    documents: int = 65_537  # tokens scored in lanes, by all groups of them
    coded: int = 32_768  # of them, there and back
    counts: int = VALIDATION_TARGETS + 1  # tokens
    blend: tuple[int, int] = (1_000_000, 4_000_000)  # targets; the rest is extrapolated
    check: int = 200_000  # tokens counted on both devices


SMALL = Sizes(20_001, 3, 1, 1_500, 8, 1_025, 2_561, 2_048, 30_001, (3_000, 8_000), 3_000)


class Skip(Exception):
    """A part that cannot run here; says why."""


@dataclass
class Options:
    """What a part in its own process is told."""

    device: str
    quick: bool
    folder: Path  # for files that do not stay
    deadline: float  # of the whole, time.monotonic()
    patience: float = 1.0  # times the boxes
    sizes: Sizes = field(init=False)

    def __post_init__(self):
        self.sizes = SMALL if self.quick else Sizes()


class Job:
    """A part's way to its options, the device and the table."""

    def __init__(self, part, options, send, box):
        self.part, self.options, self.send, self.box = part, options, send, box
        self.device, self.sizes, self.quick = options.device, options.sizes, options.quick
        self.cuda = self.device == "cuda"

    def row(self, item, text, status="PASS", **values):
        self.send(dict(part=self.part, item=item, status=status, text=text, values=values))

    def check(self, item, ok, text, **values):
        self.row(item, text, "PASS" if ok else "FAIL", **values)

    def wait_for_device(self):
        if self.cuda:
            torch.cuda.synchronize()

    def reset_peak(self):
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()

    def peak_gb(self):
        """Largest allocated device memory since reset_peak, None on a CPU."""
        return torch.cuda.max_memory_allocated() / 1e9 if self.cuda else None

    def reserved_gb(self):
        """The same of what the allocator took from the device."""
        return torch.cuda.max_memory_reserved() / 1e9 if self.cuda else None

    def seconds(self, function):
        """-> (wall seconds until the device is done, result)"""
        self.wait_for_device()
        began = time.perf_counter()
        result = function()
        self.wait_for_device()
        return time.perf_counter() - began, result

    def left(self):
        return self.options.deadline - time.monotonic()

    def timeout(self):
        """Of a process that this part starts."""
        return max(10, min(self.box, self.left()) - 5)


def gb(value):
    return "-" if value is None else f"{value:.1f} GB"


def host_gb():
    """Largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


# -----------------------------------------------------------------------------
# Configurations, models and runtimes


def record_names():
    """ "own" and the folders of the 10-minute track that hold a config.env, in ORDER."""
    found = {path.parent.name for path in (ROOT / "records").glob("track_10min*/*/config.env")}
    return sorted(found | {"own"}, key=lambda n: (ORDER.index(n) if n in ORDER else 99, n))


def configuration(record, job, **changes):
    """A RECORD's configuration on this device; small if --quick."""
    cfg = train_gpt.Config.from_env({"RECORD": record, "DEVICE": job.device})
    cfg = replace(cfg, vocab_size=cfg.vocab_size or VOCAB_SIZE, max_wallclock_seconds=0.0)
    if job.quick:
        cfg = replace(cfg, **{name: min(getattr(cfg, name), most) for name, most in QUICK.items()})
    how = "zstd" if train_gpt.has_package("zstandard") else "lzma"
    return replace(cfg, **dict(compressor=how, val_loss_every=0) | changes).check()


def share_of(record, job, **changes):
    """The same at one GPU's share of the batch: the micro-batch of 8 ranks."""
    cfg = configuration(record, job, grad_accum_steps=1, **changes)
    return replace(cfg, train_batch_tokens=cfg.train_batch_tokens // RANKS)


def all_switches(job, **changes):
    """The tests' model with every switch on, wide enough for the device's kernels."""
    shape = dict(vocab_size=256, model_dim=128, rope_dims=16, train_seq_len=128)
    shape |= dict(train_batch_tokens=1024, rope_train_seq_len=64, bigram_dim=16, ve_dim=16)
    shape |= dict(depth_recurrence=(1, 2), polyglu_enabled=True, pre_enrich_dim=64)
    return tiny(**shape | dict(device=job.device) | changes)


class Eager(train_gpt.Runtime):
    """Nothing compiled."""

    def compile(self, function, repeatable=False, **how):
        return function


class Plain(Eager):
    """In fp32, too: what remains to differ is the device."""

    def autocast(self):
        return contextlib.nullcontext()


class Traced(train_gpt.Runtime):
    """Compiles on a CPU too: the same tracing and guards, no code made."""

    def compile(self, function, repeatable=False, **how):
        if self.device.type == "cuda":
            return super().compile(function, repeatable, **how)
        return torch.compile(function, dynamic=False, fullgraph=True, backend="aot_eager", **how)

    def graph(self, function, *inputs):
        if self.device.type == "cuda":
            return super().graph(function, *inputs)
        function(*inputs)
        captured = torch.is_grad_enabled()  # as a graph: what it was made under does not change

        def replay(*values):
            with torch.set_grad_enabled(captured):
                return function(*values)

        return replay

    def autocast(self):
        kind = self.device.type
        return torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda")


def fresh_model(cfg, device):
    torch.manual_seed(cfg.seed)
    return train_gpt.GPT(cfg).initialise().to(device)


def new_trainer(cfg, runtime, shard):
    """A Trainer with fresh weights, the same on every device."""
    loader = train_gpt.training_loader(cfg, [shard])
    return train_gpt.Trainer(fresh_model(cfg, runtime.device), loader, runtime, cfg)


def scoring_model(cfg, device):
    """Of random weights, as load_artifact leaves one."""
    return perturbed(cfg, spread=0.02).to(device).eval().requires_grad_(False)


def step_losses(trainer, factors):
    return np.array([trainer.update(factor).item() for factor in factors])


# -----------------------------------------------------------------------------
# Text without a text


def synthetic_stream(size, vocab_size=VOCAB_SIZE, seed=0):
    """Documents of about 800 Zipf-distributed tokens, a third of them copied from anywhere
    earlier in stretches of about 32. uint16 (size,), BOS first."""
    rng = np.random.default_rng(seed)
    share = np.cumsum(1 / (np.arange(vocab_size - 2) + 3.0))
    quantiles = (np.arange(1 << 16) + 0.5) / (1 << 16)
    table = (2 + np.searchsorted(share / share[-1], quantiles)).astype(np.uint16)
    tokens = table[rng.integers(0, 1 << 16, size, np.uint16)]
    count = size // 96 + 1
    copied, starts = rng.geometric(1 / 32, count), rng.geometric(1 / 96, count).cumsum() + 32
    keep = starts + copied < size
    places = (rng.random(count) * (starts - 31)).astype(np.int64)
    for at, source, length in zip(starts[keep], places[keep], copied[keep], strict=True):
        tokens[at : at + length] = tokens[source : source + length].copy()
    bos = rng.geometric(1 / 800, size // 800 + 1).cumsum()
    tokens[bos[bos < size]] = tokens[0] = train_gpt.BOS
    return tokens


def short_documents(size, cfg):
    """A stream of a few more documents than lanes, so that all lanes are busy and some wait."""
    stream = synthetic_stream(size, cfg.vocab_size)
    stream[stream == train_gpt.BOS] = train_gpt.BOS + 1
    starts = np.linspace(0, size - 2, cfg.eval_lanes + cfg.eval_lanes // 4).astype(int)
    stream[starts] = train_gpt.BOS
    return stream
