"""Documents side by side in lanes: their scores, the speed of a step, a whole proof by the codec;
and the windows beside them."""

import contextlib
import functools
import json
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import kernels
import numpy as np
import torch
from common import (
    RANKS,
    VALIDATION_TARGETS,
    Eager,
    Skip,
    all_switches,
    configuration,
    gb,
    scoring_model,
    short_documents,
    synthetic_stream,
)
from helpers import pack_artifact, perturbed, random_stream, train_gpt
from ngrams import as_on_cuda

FP32_TOLERANCE, BF16_TOLERANCE = 1e-4, 1e-2  # of ||log p - true|| / ||true - its mean||
SPREAD = 1.0  # of the logarithm of a document's length, as records/tools/estimate.py assumes
LENGTH = VALIDATION_TARGETS / 50_000  # of a document of FineWeb, on average
SLACK_BYTES = 64  # of a coded text beside its claim, and 0.1 %
# The decoder's process, which writes what it held of the device when it ends.
DECODER = """
import json, runpy, sys, torch
script, report = sys.argv.pop(1), sys.argv.pop(1)
try:
    runpy.run_path(script, run_name="__main__")
finally:
    with open(report, "w") as file:
        cuda = torch.cuda.is_available()
        json.dump(torch.cuda.max_memory_reserved() / 1e9 if cuda else None, file)
"""


def lanes(job):
    """Scores beside whole rows, then own's lane step in three ways, and what learning adds."""
    cfg = configuration("own", job, lane_ttt=False)
    count = cfg.eval_lanes // RANKS
    model = scoring_model(cfg, job.device)
    with torch.no_grad():
        made = job.seconds(lambda: lane_scorer(model, train_gpt.Runtime(cfg), count, cfg))
        made[1].warm_up()
        whole_rows(job)
        yield
        columns = steady_columns(count, cfg, job.sizes.lane_steps)
        step = timed(job, "compiled, varlen", *made, columns)
        project(job, step, count)
        apart(job, "split", made[1], columns, step)
        del made
        columns = columns[:, : max(4, job.sizes.lane_steps // 8)]
        for name, how in (("compiled, masked", train_gpt.Runtime), ("eager, masked", Eager)):
            with mock.patch.object(train_gpt, "varlen_attention", lambda device: None):
                other = job.seconds(lambda h=how: lane_scorer(model, h(cfg), count, cfg))
            masked = timed(job, name, *other, columns)
            if how is train_gpt.Runtime:
                apart(job, "split, masked", other[1], columns, masked)
            del other
        learning(job, model, replace(cfg, lane_ttt=True), count, step)


def learning(job, model, cfg, count, before):
    """Steps of which every 16th teaches; before: seconds of one that does not."""
    made = job.seconds(lambda: lane_scorer(model, train_gpt.Runtime(cfg), count, cfg))
    every = cfg.lane_ttt_every
    columns = steady_columns(count, cfg, 2 * every)
    step = timed(job, "learning in lanes", *made, columns)
    teaching = every * max(0.0, step - before)
    text = f"{1e3 * teaching:.1f} ms for each step of Adam, besides what is gathered from others"
    job.row("a step of Adam", text, seconds=teaching)
    twice = [lane_scorer(model, train_gpt.Runtime(cfg), count, cfg) for _ in range(2)]
    found = [scorer.score(columns) for scorer in twice]
    same = bool((found[0] == found[1]).all())
    text = f"two scorers learn the same, to the bit: {same}"
    job.check("learning repeats", same, text)


def apart(job, item, scorer, columns, step):
    """What the step is made of."""
    columns = columns[:, : job.sizes.profiled]
    kernels.split(job, item, lambda: scorer.score(columns), columns.shape[1], step)


def lane_scorer(model, runtime, count, cfg):
    return train_gpt.LaneScorer(model, runtime, cfg, count)


def steady_columns(count, cfg, steps):
    """What LaneScorer.score takes, of lanes in the midst of documents as long as FineWeb's: int64
    (4, steps, count)."""
    rng = np.random.default_rng(0)
    lengths = np.exp(rng.normal(0, SPREAD, 200_000))
    lengths = np.maximum(1, lengths * (LENGTH / lengths.mean())).astype(int)
    lengths = rng.choice(lengths, count, p=lengths / lengths.sum())  # a long one is met more often
    places = (rng.integers(0, 1 << 30, count) + np.arange(steps)[:, None]) % lengths
    ids, targets = rng.integers(2, cfg.vocab_size, (2, steps, count))
    return np.stack([ids, places, targets, np.ones_like(ids)])


def timed(job, name, capture, scorer, columns):
    """A row -> seconds of a step, of the last of two times"""
    if scorer.schedule.shape[1] < columns.shape[1]:
        columns = columns[:, : scorer.schedule.shape[1]]
    seconds = [job.seconds(lambda: scorer.score(columns))[0] for _ in range(2)]
    _, steps, count = columns.shape
    step = min(seconds) / steps
    seen = np.minimum(columns[1] + 1, scorer.window).mean()
    varlen = train_gpt.varlen_attention(torch.device(job.device)) is not None
    text = f"{1e3 * step:.3f} ms a step, {count / step:,.0f} targets/s of {count} lanes, "
    text += f"{seen:,.0f} of {scorer.window} keys seen; compiled and captured in {capture:.1f} s"
    text += f", peak {gb(job.reserved_gb())} reserved"
    if name.endswith("varlen") and not varlen:
        text += "; torch has no varlen_attn(seqused_k) here, so this is masked"
    job.row(name, text, step_ms=1e3 * step, capture=capture, varlen=varlen, keys_seen=float(seen))
    return step


def project(job, step, count):
    """All targets on RANKS GPUs, every lane busy to the end."""
    steps = VALIDATION_TARGETS / (count * RANKS)
    text = f"{VALIDATION_TARGETS:,} targets on {RANKS} GPUs: {steps:,.0f} steps, {steps * step:.0f}"
    text += " s, if no lane waits at the end"
    job.row("all targets", text, seconds=steps * step, steps=steps)


def whole_rows(job):
    """On every switch: lanes, each with many documents, against one row a document. Without
    BOS_RESET a lane itself must forget the document before."""
    cfg = all_switches(job, eval_lanes=16, bos_reset=False)
    model = perturbed(cfg, spread=0.05).to(job.device).eval().requires_grad_(False)
    size = job.sizes.rows
    stream, starts = random_stream(size, cfg.vocab_size), np.arange(0, size + 1, 50)
    starts += np.random.default_rng(0).integers(-20, 20, len(starts))
    stream[starts[(starts > 0) & (starts < len(stream))]] = train_gpt.BOS
    runtime = train_gpt.Runtime(cfg)
    here, _ = train_gpt.score_documents(model, runtime, cfg, stream)
    true = rows_of_documents(model, runtime, stream)
    tolerance = BF16_TOLERANCE if job.cuda else FP32_TOLERANCE
    for name, a, b in zip(("log p", "entropy"), here, true, strict=False):
        error = float(np.linalg.norm(a - b) / np.linalg.norm(b - b.mean()))
        text = f"relative error {error:.2g}, {tolerance:g} allowed; largest "
        text += f"{np.abs(a - b).max():.2g} nats, {len(b):,} targets in {cfg.eval_lanes} lanes"
        job.check(f"rows: {name}", error <= tolerance, text, error=error)


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


# -----------------------------------------------------------------------------
# The proof


def proof(job):
    """Score as 8 ranks do, mix, encode by rank 0 with 8 groups of lanes, decode in a fresh process:
    the same text, as many bytes as claimed. Without learning, for which ranks must run side by
    side. All while others prepare: its seconds are rough."""
    if not train_gpt.has_package("constriction"):
        raise Skip("constriction is not installed")
    cfg = configuration("own", job, codec_tokens=job.sizes.coded, lane_ttt=False)
    runtime = train_gpt.Runtime(cfg)
    runtime.folder = job.options.folder / "proof"
    runtime.folder.mkdir()
    (runtime.folder / "train_gpt.py").write_bytes(train_gpt.SCRIPT)
    path, weights = runtime.folder / "artifact.bin", perturbed(cfg, spread=0.02).named_parameters()
    path.write_bytes(pack_artifact(dict(weights), cfg))
    model = train_gpt.load_artifact(path, job.device)
    stream = short_documents(job.sizes.documents, cfg)
    scoring, scored = job.seconds(functools.partial(scored_by_ranks, model, runtime, stream))
    report = SimpleNamespace(
        cfg=cfg, rt=runtime, score_in_order=lambda *_, **__: None, text=SimpleNamespace()
    )
    report.text.stream = stream
    with as_on_cuda(job):
        final = train_gpt.mix_ngrams(*scored, report)
    del model
    seconds, said = dict(score=scoring), []
    with mock.patch.object(runtime, "world_size", RANKS), clocks(job, seconds, said) as memory:
        coded, codec = train_gpt.prove(report, final[scored[1].targets])
    tell(job, coded, codec, seconds, memory, said)
    yield from ()


def scored_by_ranks(model, runtime, stream):
    """score_documents of RANKS ranks, one after another -> what each of them would have"""
    parts = []
    for rank in range(RANKS):
        one = dict(rank=rank, world_size=RANKS, sum=lambda columns, *_: columns, tick=no_tick)
        with mock.patch.multiple(runtime, **one):
            parts.append(train_gpt.score_documents(model, runtime, runtime.cfg, stream))
    columns = np.sum([scores[:2] for scores, _ in parts], 0)
    return train_gpt.Scores(*columns), parts[0][1]


def no_tick(*_):
    pass


@contextlib.contextmanager
def clocks(job, seconds, said):
    """-> GB that encoder and decoder held; notes the seconds of both, the decoder's complaint."""
    encode, run, memory = train_gpt.encode, subprocess.run, {}
    report = job.options.folder / "decoder.json"

    def encoder(*arguments, **how):
        if job.cuda:
            torch.cuda.reset_peak_memory_stats()
        seconds["encode"], coded = job.seconds(lambda: encode(*arguments, **how))
        memory["encoder"] = job.reserved_gb()
        return coded

    def decoder(command, **how):
        memory["left to it"] = torch.cuda.memory_reserved() / 1e9 if job.cuda else None
        began = time.perf_counter()
        how |= dict(stderr=subprocess.PIPE, timeout=job.timeout())
        done = run([sys.executable, "-c", DECODER, command[1], report], **how)
        seconds["decode"] = time.perf_counter() - began
        memory["decoder"] = json.loads(report.read_text(encoding="utf-8"))
        complaint = done.stderr.decode(errors="replace").splitlines()[-1:]
        said.extend(complaint if done.returncode else [])
        return done

    with (
        mock.patch.object(train_gpt, "encode", encoder),
        mock.patch.object(train_gpt.subprocess, "run", decoder),
    ):
        yield memory


def tell(job, coded, codec, seconds, memory, said):
    names = "proved_tokens", "coded_bytes", "claimed_bytes"
    tokens, size, claimed = (codec[name] for name in names)
    text = f"decoded {codec['decoded']}, {tokens:,} tokens in {RANKS} groups of lanes, {size:,} "
    text += f"bytes, {claimed:,} claimed, mass error {coded.mass_error:.1g}; scoring "
    text += f"{seconds['score']:.0f} s, encoding {seconds['encode']:.0f} s, decoding "
    text += f"{seconds.get('decode', 0):.0f} s, compilation in each"
    held = ", ".join(f"{name} {gb(held)}" for name, held in memory.items())
    right = codec["decoded"] == "ok" and coded.mass_error < train_gpt.MASS_LIMIT
    right &= abs(size - claimed) <= SLACK_BYTES + claimed / 1000
    values = dict(codec, mass_error=coded.mass_error, clock=seconds, memory=memory)
    job.check("proof", right, " ".join([f"{text}; reserved: {held}", *said]), **values)


# -----------------------------------------------------------------------------
# Windows


def windows(job):
    """Causality of the compiled scorer at both strides, the speed of roundtrip windows."""
    cfg = configuration("own", job)
    scorer = train_gpt.WindowScorer(scoring_model(cfg, job.device), train_gpt.Runtime(cfg), cfg)
    stream = synthetic_stream(job.sizes.windows, cfg.vocab_size)
    for stride in (scorer.length, cfg.eval_stride):
        future(job, scorer, stream[: 8 * scorer.length + 1], stride)
    yield
    seconds, _ = job.seconds(lambda: scorer.score(stream, scorer.length))
    full = VALIDATION_TARGETS / len(stream) * seconds / RANKS
    text = f"{len(stream) / seconds:,.0f} targets/s; {VALIDATION_TARGETS:,} on {RANKS} GPUs: "
    text += f"{full:.0f} s, peak {gb(job.peak_gb())}"
    job.row("roundtrip", text, seconds=full)


def future(job, scorer, stream, stride):
    """Scores before a change of all later tokens stay the same, bit by bit."""
    before, size, wrong = scorer.score(stream, stride=stride), len(stream) - 1, []
    for t in (1, size // 3, size // 2 // scorer.length * scorer.length, size - 2):
        changed = stream.copy()
        changed[t:] = (stream[t:] + 1) % scorer.model.cfg.vocab_size
        after = scorer.score(changed, stride=stride)
        columns = [(a, b) for a, b in zip(before, after, strict=True) if a is not None]
        same = all(np.array_equal(a[: t - 1], b[: t - 1]) for a, b in columns)
        moved = not np.array_equal(before.log_prob[t - 1 :], after.log_prob[t - 1 :])
        wrong += [] if same and moved else [t]
    text = f"{size:,} targets, tokens changed from 4 positions on; wrong at: {wrong or 'none'}"
    job.check(f"future, stride {stride}", not wrong, text, wrong=wrong)
