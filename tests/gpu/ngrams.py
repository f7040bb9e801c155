"""Counts of a whole validation text, the published backoff and the learned mixture over them."""

import contextlib
import time
from unittest import mock

import numpy as np
import torch
from common import configuration, gb, host_gb, synthetic_stream
from helpers import train_gpt


@contextlib.contextmanager
def as_on_cuda(job):
    """On a CPU, count with the code that CUDA runs, not with numba's."""
    with contextlib.ExitStack() as stack:
        if not job.cuda:
            stack.enter_context(mock.patch.object(train_gpt, "has_package", lambda name: False))
        yield


def counts(job):
    """Of the orders that `own` wants, as mix_ngrams asks for them; documents in lanes."""
    cfg = configuration("own", job)
    mixer = train_gpt.make_mixer("blend", cfg, train_gpt.Runtime(cfg))
    tokens = synthetic_stream(job.sizes.counts, cfg.vocab_size)
    with as_on_cuda(job):
        same_counts(job, tokens[: job.sizes.check], cfg.vocab_size, mixer.orders)
        plan = train_gpt.CodingPlan.of(tokens, cfg, 1)
        began = time.perf_counter()
        coding = train_gpt.LaneSchedule(tokens, plan).order(tokens)
        laying_out = time.perf_counter() - began
        yield
        job.reset_peak()
        store = train_gpt.CountStore(mixer.orders, len(coding.tokens) - len(tokens) + 1)
        device = counted(job, store, coding, cfg)
        scan(job, len(tokens))
    tell(job, store, (laying_out, *device), len(tokens))
    size = len(tokens) - 1
    entropy = np.random.default_rng(1).gamma(4.0, 0.7, size)
    schedule = [column[store.skip :] for column in coding.schedule]
    for name in ("cascade", "blend"):
        mixed(job, cfg, name, store, (entropy, *schedule))
    captured(job, cfg)


def captured(job, cfg):
    """Three chunks of the blend's last stage, its batches replayed and by themselves."""
    weights = [late_weights(job, cfg, eager) for eager in (False, True)]
    gap = float(np.abs(weights[0] - weights[1]).max())
    text = f"captured batches of the blend differ from eager ones by {gap:.1e} in the weights"
    job.check("captured", gap < 1e-3, text, gap=gap)


def late_weights(job, cfg, eager):
    blend = train_gpt.make_mixer("blend", cfg, train_gpt.Runtime(cfg))
    if eager:
        blend.train_last_batch = blend.train
    blend.learned = 1 << 20
    draw = np.random.default_rng(0)
    for _ in range(3):
        entropy = draw.gamma(4.0, 0.7, blend.LARGEST_CHUNK)
        counts = draw.integers(0, 9, (len(blend.orders), len(entropy), 5), np.int32)
        stats = np.minimum(np.sort(counts)[..., ::-1], [9, 9, 9, 9, 1]).astype(np.int32)
        recent = draw.random((len(entropy), train_gpt.REMEMBERED, 2), np.float32)
        given = blend.inputs(stats, entropy, recent)
        found = blend.weights(*given)
        blend.learn(*given, train_gpt.expert_probabilities(blend, stats, -entropy))
    return found


def counted(job, store, coding, cfg):
    """Fill the store -> (seconds of it all, of them waiting for counts)"""
    orders, waited = store.orders, 0.0
    how = dict(device=job.device, schedule=coding.schedule, wanted=orders)
    found = train_gpt.count_ngrams(coding.tokens, cfg.vocab_size, max(orders), **how)

    def timed():
        nonlocal waited
        while True:
            began = time.perf_counter()
            each = next(found, None)
            waited += time.perf_counter() - began
            if each is None:
                return
            yield each
            del each

    seconds, _ = job.seconds(lambda: store.collect(timed()))
    return seconds, waited


def tell(job, store, seconds, size):
    laying_out, both, waited = seconds
    orders = train_gpt.show_orders(store.orders)
    text = f"{both:.1f} s for orders {orders}, of them {waited:.1f} s on the device and back, the "
    text += f"rest is kept by the host; lanes' schedule and order {laying_out:.1f} s; {size:,} "
    text += f"tokens, peak {gb(job.peak_gb())}, host {gb(host_gb())}"
    values = dict(seconds=both, waited=waited, schedule=laying_out, tokens=size)
    job.row("counts", text, **values, peak_gb=job.peak_gb(), host_gb=host_gb())


def scan(job, size):
    """Where the groups of SortedGroups begin, of which every order has four, by a running sum, and
    by the running maximum of before: one block on CUDA."""
    begins = torch.arange(size, device=job.device) % 3 == 0
    index = torch.arange(size, device=job.device)
    start, seconds = train_gpt.SortedGroups.start, []
    maximum = lambda: torch.where(begins, index, 0).cummax(0).values  # noqa: E731
    for function in (lambda: start(None, begins), maximum):
        seconds.append(min(job.seconds(function)[0] for _ in range(2)))
    text = f"{1e3 * seconds[0]:.1f} ms for {size:,}, a running maximum {1e3 * seconds[1]:.1f}"
    job.row("scan", text, sum=seconds[0], maximum=seconds[1])


def same_counts(job, tokens, vocab_size, orders):
    """The device's n-gram counts are the CPU's."""
    devices = job.device, "cpu"
    here, there = (
        train_gpt.count_ngrams(tokens, vocab_size, max(orders), each, wanted=orders)
        for each in devices
    )
    pairs = list(zip(here, there, strict=True))
    equal = all(np.array_equal(a, b) for x, y in pairs for a, b in zip(x, y, strict=True))
    equal &= [int(x[0]) for x, _ in pairs] == list(orders)
    text = f"orders {train_gpt.show_orders(orders)} of {len(tokens):,} tokens equal the CPU's"
    job.check("parity", equal, f"{text}: {equal}")


def mixed(job, cfg, name, store, columns):
    """A mixer over a model of random entropies: two prefixes, extrapolated to all of it."""
    threads, size = torch.get_num_threads(), len(columns[0])
    torch.set_num_threads(train_gpt.choose_threads(1)[0])

    def seconds(part):
        entropy, *schedule = (column[:part] for column in columns)
        cut = train_gpt.Scores(log_prob=-entropy, entropy=entropy)
        mixer = train_gpt.make_mixer(name, cfg, train_gpt.Runtime(cfg))
        return job.seconds(lambda: train_gpt.mix(mixer, store, cut, schedule))

    seconds(600)  # loads kernels
    job.reset_peak()
    (few, many), (first, _), (last, final) = job.sizes.blend, *map(seconds, job.sizes.blend)
    full = last + max(0.0, last - first) / (many - few) * (size - many)
    text = f"{full:.0f} s for {size:,} targets, extrapolated from {few:,} and {many:,} "
    text += f"({first:.2f} and {last:.2f} s), {torch.get_num_threads()} threads, peak "
    text += gb(job.peak_gb())
    item = "backoff" if name == "cascade" else name
    values = dict(seconds=full, threads=torch.get_num_threads(), peak_gb=job.peak_gb())
    job.check(item, bool(np.isfinite(final).all()), text, **values)
    torch.set_num_threads(threads)
