"""The script as it is run, and what its warm-up leaves to be compiled."""

import contextlib
import importlib
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from unittest import mock

import numpy as np
import torch
import torch._inductor.config as inductor
from common import RANKS, Skip, Traced, new_trainer, share_of, short_documents
from helpers import ROOT, SHRUNK, clean_environment, train_gpt
from torch._dynamo.utils import counters

FACTORS = (1.0, 1.0, 0.1, 0.1)  # rate factors of steps: late QAT and loops begin with the third


def script(job):
    """RECORD=tiny for 40 steps from data to proof: validation, late QAT, checkpoints, documents, a
    blend, and a fresh process that decodes."""
    if not train_gpt.has_package("sentencepiece"):
        raise Skip("sentencepiece is not installed")
    env = clean_environment() | (SHRUNK if job.quick else dict(RECORD="tiny", ITERATIONS="40"))
    how = "zstd" if train_gpt.has_package("zstandard") else "lzma"
    env |= dict(DEVICE=job.device, COMPRESSOR=how, RUN_ID="gpu", DATA_PATH=str(prose(job)))
    env |= dict(SCORER="documents", CODEC_TOKENS="-1", EVAL_SLIDING="0", WARMUP_STEPS="2")
    env |= dict(WARMDOWN_ITERS="6", LATE_QAT_THRESHOLD="0.5", QAT_EVERY="2", GRAD_ACCUM_STEPS="1")
    env |= dict(LATE_QAT="1")
    if not job.quick:
        env |= dict(VAL_LOSS_EVERY="20")
    if train_gpt.has_package("safetensors"):
        env["CHECKPOINT_EVERY"] = "20"
    command = [sys.executable, str(ROOT / "train_gpt.py")]
    path, began, status = job.options.folder / "output", time.perf_counter(), "out of time"
    with open(path, "wb") as output, contextlib.suppress(subprocess.TimeoutExpired):
        how = dict(cwd=job.options.folder, env=env, stdout=output, stderr=subprocess.STDOUT)
        status = subprocess.run(command, timeout=job.timeout(), **how).returncode
    seconds = time.perf_counter() - began
    tell(job, status, path.read_text(encoding="utf-8", errors="replace"), seconds)
    yield from ()


def prose(job):
    """-> folder of a dataset of a few documents of the embedded text, in seconds"""
    prepare, prepare_text = (importlib.import_module(n) for n in ("prepare", "prepare_text"))
    if not prepare.SAMPLE.exists():
        raise Skip("data/sample has no text")
    train, val = prepare.sample_documents()
    if job.quick:
        val = [" ".join(text.split(" ")[:40]) for text in val]
    folder = job.options.folder / "prose"
    prepare_text.write_dataset(train[:16], val[:8] if job.quick else val[:40], folder, "prose", 512)
    return folder


def tell(job, status, output, seconds):
    """Of the script's output: what must be in it, and its last lines where something is not."""
    lines = output.splitlines()
    wanted = {
        "late QAT": "late_qat:enabled",
        "artifact": "final_int6_roundtrip_exact",
        "documents": "final_documents_exact",
        "backoff": "final_ngram_backoff_exact",
        "score": "final_ngram_exact",
    }
    if train_gpt.has_package("constriction"):
        wanted["proof"] = "decoded:ok"
    lacks = [what for what, words in wanted.items() if words not in output]
    final = [line for line in lines if line.startswith("final_ngram_exact")]
    expected = " ".join(line for line in lines if line.startswith("expect"))
    ok = status == 0 and not lacks
    text = f"{seconds:.0f} s, exit {status}, "
    if ok:
        text += f"{', '.join(wanted)}: all there; {final[0]} {expected}"
    else:
        text += f"lacks {', '.join(lacks) or 'nothing'}: {'; '.join(lines[-6:])[-700:]}"
    job.check("RECORD=tiny", ok, text, seconds=seconds, output=lines[-60:])


# -----------------------------------------------------------------------------
# What is compiled when


class Compiled:
    """Graphs that torch.compile makes, by stage."""

    def __init__(self, job):
        self.job = job
        counters.clear()

    def stage(self, function):
        """-> (seconds, graphs that were new, result)"""
        before = counters["stats"]["unique_graphs"]
        seconds, result = self.job.seconds(function)
        return seconds, counters["stats"]["unique_graphs"] - before, result


def warmup(job):
    """Of `own` with a GPU's share of lanes: what each part of the warm-up compiles and in how many
    seconds, that training starts as if there had been none, and that nothing is compiled after it.
    All while others prepare, as 8 ranks do on one host."""
    if torch.compile.__module__ != "torch":  # on the emulated device
        raise Skip("nothing is compiled here")
    inductor.force_disable_caches = True  # others compile the same here
    torch._logging.set_logs(recompiles=True)
    later = dict(late_qat=True, qat_every=2, iterations=len(FACTORS), loop_from=0.5)
    cfg = share_of("own", job, warmup_steps=2, **later)
    cfg = replace(cfg, eval_lanes=cfg.eval_lanes // RANKS)
    runtime = Traced(replace(cfg))  # of another object, as in the script
    stream = short_documents(job.sizes.documents // 2, cfg)
    shard = job.options.folder / "stream_train_000000.bin"
    compiled = Compiled(job)
    with contextlib.closing(Log(job.options.folder / "recompiles")) as log:
        trainer = new_trainer(cfg, runtime, shard)
        with contextlib.closing(trainer.batches):
            at_first(job, compiled, trainer, stream)
            log.forget()
            afterwards(job, compiled, trainer, (stream, shard, log))
    yield from ()


class Log:
    """What torch says of recompilations goes to its standard error: kept, to be shown if it is
    needed."""

    def __init__(self, path):
        self.file = open(path, "w+b")
        self.stderr = os.dup(2)
        os.dup2(self.file.fileno(), 2)

    def close(self):
        os.dup2(self.stderr, 2)
        os.close(self.stderr)
        self.file.close()

    def forget(self):
        """What was said so far: Newton-Schulz is compiled for the shape of each bank."""
        self.begin = os.lseek(self.file.fileno(), 0, os.SEEK_END)

    def reasons(self):
        """Of recompilations, a few."""
        self.file.seek(self.begin)
        text = self.file.read().decode(errors="replace")
        found = re.findall(r"Recompiling function (\S+)|- \d+/\d+: (.*)", text)
        return list(dict.fromkeys(" ".join(each).strip()[:160] for each in found))[-8:]


def on_cuda(runtime):
    """For what the script does on CUDA alone; elsewhere its guards and graphs are the same."""
    return mock.patch.object(runtime, "cuda", True)


def at_first(job, compiled, trainer, stream):
    """The warm-up, in the script's order."""
    cfg, runtime = trainer.cfg, trainer.rt
    with on_cuda(runtime):
        seconds, graphs, _ = compiled.stage(
            lambda: train_gpt.warm_up_scoring(trainer.model, runtime, cfg, stream)
        )
    pace = ", ".join(f"{name} {1e3 * each:.1f} ms" for name, each in runtime.pace.items())
    text = f"{seconds:.0f} s, {graphs} graphs: windows and lanes; measured by it: {pace}"
    job.check("scoring", graphs > 0, text, seconds=seconds, graphs=graphs, pace=runtime.pace)
    seconds, graphs, _ = compiled.stage(trainer.warm_up)
    breaks = sum(counters["graph_break"].values())
    text = f"{seconds:.0f} s, {graphs} graphs: loss and Newton-Schulz; {breaks} breaks; weights, "
    text += f"states and random numbers as before, by sha256; {cfg.warmup_steps} steps"
    job.check("training", graphs > 0 and not breaks, text, seconds=seconds, graphs=graphs)


def afterwards(job, compiled, trainer, more):
    """A short run's stages: each must find everything compiled."""
    cfg, runtime, model = trainer.cfg, trainer.rt, trainer.model
    stream, shard, log = more
    path = job.options.folder / "warmup.bin"
    new, spent = {}, {}

    def stage(name, function):
        spent[name], new[name], result = compiled.stage(function)
        return result

    stage("steps, late QAT, loops", lambda: [trainer.update(factor).item() for factor in FACTORS])
    windows = train_gpt.WindowScorer(train_gpt.for_scores(model), runtime, cfg)
    stage("validation", lambda: windows.score(stream, windows.length))
    model.load_state_dict(trainer.averages.final())
    packing = stage("packing", lambda: train_gpt.quantise_model(model, runtime, cfg, [shard]))
    packed = packing.packed
    path.write_bytes(packed)
    loaded = stage("reading", lambda: train_gpt.load_artifact(path, runtime.device))
    again = train_gpt.WindowScorer(loaded, runtime, cfg)
    stage("roundtrip", lambda: again.score(stream, again.length))
    with on_cuda(runtime):
        how = loaded, runtime, cfg, stream
        scores, _ = stage("documents", lambda: train_gpt.score_documents(*how))
        plan = train_gpt.CodingPlan.of(stream, cfg, 1)._replace(targets=4 * cfg.eval_lanes)
        read = train_gpt.tokens_of_text(stream, plan)
        stage("codec", lambda: train_gpt.run_lanes(loaded, runtime, plan, read, cfg))
    late = trainer.qat_since == 2 and all((grid > 0).any() for grid in model.buffers())
    ok = not sum(new.values()) and late and bool(np.isfinite(scores.log_prob).all())
    text = ", ".join(f"{name} {spent[name]:.1f} s {new[name]} graphs" for name in new)
    text = f"{text}; late QAT {'on' if late else 'OFF'}; quantised to {len(packed):,} bytes"
    reasons = log.reasons() if sum(new.values()) else []
    text += f"; {' | '.join(reasons)}" if reasons else ""
    job.check("nothing after it", ok, text, graphs=new, clock=spent, reasons=reasons)
    row = dict(seconds=spent["packing"], read_seconds=spent["reading"], bytes=len(packed))
    text = f"{spent['packing']:.1f} s to quantise and compress ({cfg.quant}, {cfg.compressor})"
    text += "".join(f", {value:,} {name}" for name, value in packing.rounding.items())
    row |= packing.rounding
    job.row("packing", f"{text}, {spent['reading']:.1f} s to read", **row)
