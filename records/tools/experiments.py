"""Tables of many runs of train_gpt.py: what each technique is worth, which configuration is best.

    python records/tools/experiments.py ablation         # `tiny` with one thing changed at a time
    python records/tools/experiments.py tournament       # ours against the five published ones
    python records/tools/experiments.py race             # this checkout against the CPU record
    python records/tools/experiments.py ablation --help

A run is a process with cores of its own, in a temporary folder. What it measured is a line of
results.jsonl in --out as soon as it ends, so a killed table goes on where it stopped: a line counts
while the code, the settings and the data that it was measured with are the same. README.md and
results.json beside it hold the table. Of a race there are no lines: its run folders stay, and count
while scripts, settings and data are the same. A table ends where the code is edited under it;
`git worktree add` gives it a copy of its own.

Exit status: 0 all runs ended well; 1 some failed, and the table is of the others; 2 there is none.
"""

import argparse
import bisect
import contextlib
import functools
import hashlib
import inspect
import itertools
import json
import math
import os
import platform
import queue
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, as_completed, wait
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from run_folder import (
    RECORDS,
    ROOT,
    RunError,
    RunFolder,
    blame,
    markdown,
    read_split,
    tokens_sha256,
)
from stats import ALPHA, summarise, upper_tail

import prepare_text
import train_gpt
from prepare import TRAIN_TOKENS_SHA256, VAL_TOKENS_SHA256
from train_gpt import (
    CAP_BYTES,
    Config,
    ConfigError,
    UserError,
    parse_pairs,
    sha256,
    write_atomically,
)

SCRIPT = ROOT / "train_gpt.py"
CODE = {path: path.read_bytes() for path in (SCRIPT, ROOT / "records/tools/as_written.py")}
PATHS = ("DATA_PATH", "TOKENIZER_PATH")
Row = dict[str, Any]  # a line of results.jsonl


class Measure(NamedTuple):
    """A field of a line of metrics.jsonl, and how tables show it; no title: they do not."""

    key: str
    field: str
    title: str
    style: str = ".4f"


MEASURES = {
    "steps": Measure("step", "number", "steps", ".0f"),
    "step_ms": Measure("step", "step_avg_ms", "ms a step", ".0f"),
    "averaged_bpb": Measure("averaged", "val_bpb", "averaged"),
    "int6_bpb": Measure("final_int6_roundtrip_exact", "val_bpb", "int6"),
    "sliding_bpb": Measure("final_int6_sliding_window_exact", "val_bpb", "sliding"),
    "ttt_bpb": Measure("final_ttt_exact", "val_bpb", "after TTT"),
    "cascade_bpb": Measure("final_ngram_backoff_exact", "val_bpb", "own cascade, honest"),
    "val_bpb": Measure("final_ngram_exact", "val_bpb", "**val_bpb**"),
    "pseudo_bpb": Measure("final_ngram_pseudo", "pseudo_bpb", "as-written pseudo-score"),
    "mass_mean": Measure("final_ngram_pseudo", "mass_mean", "its mass", ".2f"),
    "artifact_bytes": Measure("final_artifact_bytes", "weights", "artifact bytes", ",.0f"),
    "total_bytes": Measure("final_artifact_bytes", "total", ""),
}


# -----------------------------------------------------------------------------
# Runs


class Task(NamedTuple):
    """A run to make: what the table calls it, and the variables that it is given."""

    labels: dict[str, Any]
    env: dict[str, str]

    def title(self) -> str:
        return " ".join(f"{name} {value}" for name, value in self.labels.items())


PAGE = """# {title}

    {command}

{date}; {hardware};
{versions}, train_gpt.py {code} (sha256) on {commit}. {runs} runs of
{run_minutes} min together; the command's last call took {wall_minutes} min.

{text}
"""


class Runner:
    """Makes the runs of a table, several side by side, and publishes what they measured."""

    def __init__(self, out: Path, jobs: int, arguments: Sequence[str]) -> None:
        self.out = out
        self.jobs = jobs
        self.command = shlex.join(["python", "records/tools/experiments.py", *arguments])
        self.began = time.perf_counter()
        self.failed = 0
        self.processes: set[subprocess.Popen] = set()

    def make(self, tasks: Sequence[Task], measure: str) -> list[Row]:
        """Make the runs that results.jsonl lacks, a line each as they end -> finished(tasks)."""
        self.out.mkdir(parents=True, exist_ok=True)
        done = read_rows(self.out)
        missing = [task for task in tasks if digest(task) not in done]
        print(f"{len(tasks)} runs, {len(tasks) - len(missing)} of them done before", flush=True)
        began = time.perf_counter()
        with self.workers() as pool:
            futures = {pool.submit(self.execute, task): task for task in missing}
            for number, future in enumerate(as_completed(futures), 1):
                try:
                    row = future.result()
                except RunError as error:
                    self.failed += 1
                    print(f"failed: {error}", flush=True)
                    continue
                with open(self.out / "results.jsonl", "a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
                minutes = (time.perf_counter() - began) / 60 * (len(missing) / number - 1)
                value = f"{measure} {row['measures'].get(measure, math.nan):.4f}"
                what = f"{number}/{len(missing)} {futures[future].title()}: {value}"
                print(f"{what}, {row['seconds']:.0f} s, about {minutes:.0f} min left", flush=True)
        return self.finished(tasks)

    def finished(self, tasks: Iterable[Task]) -> list[Row]:
        """The lines of those tasks that are done, in their order."""
        done = read_rows(self.out)
        return [done[mark] for mark in map(digest, tasks) if mark in done]

    @contextlib.contextmanager
    def workers(self) -> Iterator[ThreadPoolExecutor]:
        """A pool of threads with equal shares of this process's cores; no run outlives it."""
        cores = my_cores()
        if not 1 <= self.jobs <= len(cores):
            known = f"this process has {len(cores)} cores"
            raise UserError(f"--jobs {self.jobs}: {known}; fix: 1 to that many")
        shares: queue.SimpleQueue[list[int]] = queue.SimpleQueue()
        for first in range(self.jobs):
            shares.put(cores[first : len(cores) // self.jobs * self.jobs : self.jobs])
        pool = ThreadPoolExecutor(self.jobs, initializer=pin, initargs=(shares,))
        try:
            yield pool
        finally:  # also after Ctrl-C and SIGTERM
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(self.processes):
                process.kill()
            pool.shutdown()

    def execute(self, task: Task) -> Row:
        """Run train_gpt.py once, in a folder that is deleted; RunError where it fails."""
        began = time.perf_counter()
        with tempfile.TemporaryDirectory(prefix="train_gpt_") as cwd:
            found = measures(self.start(task, SCRIPT, Path(cwd)))
        settings = {name: text for name, text in task.env.items() if name not in PATHS}
        row = dict(labels=task.labels, digest=digest(task), date=now(), env=settings)
        return row | dict(seconds=time.perf_counter() - began, measures=found)

    def start(self, task: Task, script: Path, cwd: Path) -> Path:
        """Run a script to its end -> its run folder, in cwd; RunError where it fails."""
        ours = {*train_gpt.VARIABLES, *train_gpt.ALIASES, *train_gpt.ANYWAY}  # of the table alone
        env = {name: text for name, text in os.environ.items() if name not in ours}
        env |= task.env | {"RUN_ID": "run"}
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        with subprocess.Popen([sys.executable, script], cwd=cwd, env=env, **pipes) as process:
            self.processes.add(process)
            output, _ = process.communicate()
            self.processes.discard(process)
        check_code()
        if process.returncode:
            last = (output.strip().splitlines() or ["no output"])[-1]
            raise RunError(f"{task.title()}: exit status {process.returncode}: {last}")
        return cwd / "runs/run"

    def publish(self, title: str, rows: Sequence[Row], text: str, **results: Any) -> None:
        """README.md, with the exact command at its top, and results.json."""
        about = dict(
            command=self.command,
            date=now(),
            hardware=f"{len(my_cores())} cores of {cpu_name()}, {self.jobs} runs at a time",
            versions=f"Python {platform.python_version()}, torch {version('torch')}",
            code=sha256(CODE[SCRIPT])[:16],
            commit=commit(),
            runs=len(rows),
            run_minutes=round(sum(row["seconds"] for row in rows) / 60, 1),
            wall_minutes=round((time.perf_counter() - self.began) / 60, 1),
        )
        page = PAGE.format(**about, title=title, text=text.rstrip())
        write_atomically(self.out / "README.md", page.encode())
        whole = json.dumps(about | results, indent=1, ensure_ascii=False)
        write_atomically(self.out / "results.json", f"{whole}\n".encode())
        print(f"wrote {self.out / 'README.md'} and {self.out / 'results.json'}")


def digest(task: Task) -> str:
    """Changes with the labels, the code, every resolved setting and the data."""
    cfg = Config.from_env(task.env)
    names = [name for name in train_gpt.VARIABLES if name not in ("RUN_ID", *PATHS)]
    settings = {name: train_gpt.show(getattr(cfg, name.lower())) for name in names}
    data = data_digest(Path(cfg.data_path))
    text = json.dumps([task.labels, settings, data], sort_keys=True).encode()
    code = CODE.values() if cfg.ngram_scheme else [CODE[SCRIPT]]
    return sha256(b"".join([*code, text]))[:16]


def data_digest(folder: Path) -> str:
    """Changes with a dataset's shards and tokenizer."""
    paths = [*sorted(folder.glob("*.bin")), *folder.glob("tokenizer.model")]
    found = [f"{path.name} {file_digest(path, path.stat().st_mtime_ns)}" for path in paths]
    return sha256(" ".join(found).encode())


@functools.cache
def file_digest(path: Path, changed: int) -> str:
    """changed: when, so that it is read again where it was since."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def measures(folder: Path) -> dict[str, float]:
    """What a finished run folder measured, of MEASURES; what it lacks is left out."""
    run = RunFolder(folder)
    last = {key: run.last(key) for key in {measure.key for measure in MEASURES.values()}}
    last["step"] |= {"number": max(run.steps("step_avg_ms"), default=0)}
    found = {name: last[key].get(field) for name, (key, field, *_) in MEASURES.items()}
    return {name: value for name, value in found.items() if value is not None}


def check_code() -> None:
    """One table, one code."""
    for path, code in CODE.items():
        if path.read_bytes() != code:
            fix = "start again, finished runs are kept"
            raise UserError(f"{path} was edited meanwhile; fix: {fix}")


def read_rows(out: Path) -> dict[str, Row]:
    """The lines of results.jsonl by digest; one that a kill cut short is cut off the file."""
    path = out / "results.jsonl"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        write_atomically(path, whole.encode())
    with blame(path):
        return {row["digest"]: row for row in map(json.loads, whole.splitlines())}


def commit() -> str:
    """The commit checked out here, so that a table says of which it is"""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=9"]
    try:
        found = subprocess.run(command, capture_output=True, text=True)
    except OSError:  # no git
        return "no commit"
    return f"commit {found.stdout.strip()}" if found.returncode == 0 else "no commit"


def my_cores() -> list[int]:
    affinity = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))  # Linux
    return sorted(affinity(0))


def pin(shares: queue.SimpleQueue[list[int]]) -> None:
    """Keep this thread, and the processes that it starts, on its share of the cores (Linux)."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, shares.get())


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


# -----------------------------------------------------------------------------
# What both tables are made of


class Estimate(NamedTuple):
    """Mean of a measure over seeds and its standard error, None for a single seed."""

    mean: float
    error: float | None


def estimate(rows: Sequence[Row], measure: str, base: Sequence[Row] = ()) -> Estimate | None:
    """Of `measure`, or of its difference from `base`, paired by seed; None where there is none."""
    values = by_seed(rows, measure)
    if base:
        before = by_seed(base, measure)
        values = {seed: values[seed] - before[seed] for seed in values.keys() & before.keys()}
    if not values:
        return None
    found = summarise([*values.values()])
    return Estimate(found.mean, found.deviation and found.deviation / math.sqrt(found.count))


def by_seed(rows: Iterable[Row], measure: str) -> dict[int, float]:
    return {r["labels"]["seed"]: r["measures"][measure] for r in rows if measure in r["measures"]}


def estimates(rows: Sequence[Row], base: Sequence[Row] = ()) -> dict[str, Estimate]:
    """Of all measures that there are."""
    found = {measure: estimate(rows, measure, base) for measure in MEASURES}
    return {measure: value for measure, value in found.items() if value}


def cell(found: Estimate | None, style: str = ".4f", error: bool = True) -> str:
    """An estimate for a table: 1.2345 ± 0.0012."""
    if found is None:
        return "-"
    known = error and found.error is not None
    spread = f" ± {found.error:{style.lstrip('+')}}" if known else ""
    return f"{found.mean:{style}}{spread}"


def grouped(rows: Iterable[Row], label: str) -> dict[Any, list[Row]]:
    """Label's value -> its rows."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["labels"][label], []).append(row)
    return groups


def pairs(text: str) -> dict[str, str]:
    """NAME=VALUE, separated by spaces."""
    return parse_pairs(text.split(), text)


def as_env(**values: Any) -> dict[str, str]:
    return {name: str(value) for name, value in values.items()}


# -----------------------------------------------------------------------------
# Ablation


class Switch(NamedTuple):
    """One change to `tiny`: `how` is off, on, or other where it puts another value."""

    name: str
    how: str
    words: str
    variables: str  # pairs; ? stands for the size to prune to

    def env(self, total_bytes: float) -> dict[str, str]:
        """Its variables; ? becomes MiB, a little below the unpruned code and artifact."""
        return pairs(self.variables.replace("?", str(PRUNED * total_bytes / 2**20)))

    def task(self, base: dict[str, str], seed: int, total_bytes: float = 0) -> Task:
        env = base | self.env(total_bytes) | as_env(SEED=seed)
        return Task(dict(name=self.name, seed=seed), env)

    def changes(self, base: dict[str, str]) -> bool:
        """Whether the resolved configuration is another; ConfigError where it does not fit."""
        return Config.from_env(base | self.env(2**20)) != Config.from_env(base)

    def fits(self, base: dict[str, str]) -> bool:
        try:
            return self.changes(base)
        except ConfigError:
            return False


PRUNED = 0.97  # of the unpruned code and artifact
SMALLEST = 0.00005  # bpb; less shows as 0.0000
# What differs is the model, and there is nothing to prove.
FIXED = pairs("RECORD=tiny DEVICE=cpu NGRAM_ENABLED=0 EVAL_STRIDE=256 SAVE_SCORES=0")
FIXED |= pairs("SCORER=sliding CODEC_TOKENS=0 KNOWN_TOKENS=0")
# With --held-out: what val_bpb is made of, but for lanes and learning in them.
MIXED = pairs("NGRAM_ENABLED=1 KNOWN_TOKENS=-1 SCORER=sliding EVAL_STRIDE=128")
HELD_OUT = 85  # documents of the training text, as many as the embedded text validates on
BY_QUANTILE = "MATRIX_CODING=int6 QUANT=lite CLIP_SIGMAS=0 EMBED_CLIP_SIGMAS=0 COMPRESSOR=zstd"
PUBLISHED_810 = "CLIP_QUANTILES=0.999,0.9999,0.99999,0.999999,0.9999999"
BASELINE = Switch("baseline", "", "**baseline**", "")
SWITCHES = [
    Switch("relu2", "off", "slope of 0.5 below zero in the squared ReLU", "LEAKY_SLOPE=0"),
    Switch("polyglu", "on", "PolyGLU: a learned slope for each neuron", "POLYGLU_ENABLED=1"),
    Switch("value_residual", "on", "first layer's values in all layers", "VALUE_RESIDUAL=1"),
    Switch(
        "gated_attention",
        "on",
        "gate on each attention head",
        "GATED_ATTENTION=1 GATE_INPUTS=0",
    ),
    Switch("gate_inputs", "on", "such gates by 12 inputs", "GATED_ATTENTION=1 GATE_INPUTS=12"),
    Switch("xsa_off", "off", "attention without the own value (XSA)", "XSA_LAST_N=0"),
    Switch("xsa_half", "other", "XSA in the last two layers", "XSA_LAST_N=2"),
    Switch("smear", "off", "SmearGate: the previous token blended in", "SMEAR_GATE=0"),
    Switch("smear_810", "other", "SmearGate starts nearly closed, as in #810", "SMEAR_INIT=-3"),
    Switch("bigram", "off", "bigram embedding", "BIGRAM_VOCAB_SIZE=0"),
    Switch("bigram_810", "other", "bigram embedding of #810", "BIGRAM_KIND=linear"),
    Switch("bigram_2048", "other", "bigram embedding of 2,048 rows", "BIGRAM_VOCAB_SIZE=2048"),
    Switch("bigram_wide", "other", "bigram embedding twice as wide", "BIGRAM_DIM=64"),
    Switch("value_embedding", "on", "embedding added to late values", "VE_ENABLED=1 VE_DIM=32"),
    Switch("pre_enrich", "on", "GELU pre-enrichment of #810", "PRE_ENRICH_DIM=192"),
    Switch("ortho", "on", "matrices that start orthogonal", "ORTHO_INIT=1"),
    Switch("overtone", "on", "overtone spectrum of the first embedding", "OVERTONE_INIT=1"),
    Switch("rope_16", "other", "rotary positions on half of a head", "ROPE_DIMS=16"),
    Switch("ln_scale", "on", "inputs of layers times 1/sqrt(layer)", "LN_SCALE=1"),
    Switch("deeper", "other", "five layers, their MLPs narrower", "NUM_LAYERS=5 MLP_MULT=2"),
    Switch(
        "wider",
        "other",
        "three layers of width 160",
        "NUM_LAYERS=3 MODEL_DIM=160 NUM_HEADS=5 NUM_KV_HEADS=5",
    ),
    Switch("recurrence", "on", "middle layers applied twice", "DEPTH_RECURRENCE=1,2"),
    Switch("loops", "on", "middle layers three times, later on", "LOOP_LAYERS=1-2"),
    Switch("parallel", "other", "attention and MLP side by side in half", "PARALLEL_FROM=2"),
    Switch("skip_gates", "off", "gates on the U-Net's skips", "SKIP_GATES=0"),
    Switch("qk_gain", "other", "queries start five times as sharp", "QK_GAIN_INIT=5"),
    Switch("mlp_4", "other", "an MLP four times as wide, not three", "MLP_MULT=4"),
    Switch("bos_reset", "off", "smear and bigram stop at a document's start", "BOS_RESET=0"),
    Switch("doc_attention", "off", "attention inside documents", "DOC_ATTENTION=0"),
    Switch("shuffle", "off", "training sequences in a random order", "SHUFFLE=0"),
    Switch("shorter", "other", "sequences of 128 tokens", "TRAIN_SEQ_LEN=128 EVAL_SEQ_LEN=256"),
    Switch("min_lr", "on", "rates that fall to a tenth, not to 0", "MIN_LR=0.1"),
    Switch("warmdown", "other", "rates that fall over 72 %, not 60", "WARMDOWN_SHARE=0.72"),
    Switch("row_norm", "off", "rows of equal length before Newton-Schulz", "MUON_ROW_NORM=0"),
    Switch("muon_wd_own", "other", "own's weight decay of the matrices", "MUON_WD=0.095"),
    Switch("matrix_lr_2", "other", "twice the rate of the matrices", "MATRIX_LR=0.05"),
    Switch("matrix_lr_06", "other", "0.6 of it", "MATRIX_LR=0.015"),
    Switch("embed_lr", "other", "the rate of the embeddings as published", "TIED_EMBED_LR=0.035"),
    Switch("adam_wd", "off", "weight decay of what AdamW trains", "ADAM_WD=0"),
    Switch("ema_099", "other", "exponential mean over 100 steps", "EMA_DECAY=0.99"),
    Switch("late_qat", "on", "training on the export's grid at the end", "LATE_QAT=1"),
    Switch("qat_all", "on", "training on such a grid throughout", "QAT_ENABLED=1"),
    Switch("ema", "off", "exponential mean of the weights", "EMA_ENABLED=0"),
    Switch("swa", "off", "mean of late snapshots", "SWA_ENABLED=0"),
    Switch("ema_warmup", "off", "exponential mean that starts short", "EMA_WARMUP=0"),
    Switch("swa_of_ema", "other", "late snapshots of the exponential mean", "SWA_SOURCE=ema"),
    Switch("floor", "on", "published floor of the int6 scales", f"QUANT_FLOOR=1 {BY_QUANTILE}"),
    Switch(
        "per_matrix",
        "other",
        "one clip for a matrix, not for a row",
        f"QUANT_PER=matrix {BY_QUANTILE}",
    ),
    Switch(
        "clips_810", "other", "clips of #810", f"QUANT_PER=matrix {PUBLISHED_810} {BY_QUANTILE}"
    ),
    Switch("embed_fp16", "other", "token embedding in 16 bits", "EMBED_CODING=fp16"),
    Switch("embed_int6", "other", "token embedding in 6 bits", "EMBED_CODING=int6"),
    Switch("lzma", "other", "artifact compressed by lzma", "COMPRESSOR=lzma"),
    Switch(
        "prune", "on", "selective pruning, aimed at 3 % fewer bytes", f"TARGET_MB=? {BY_QUANTILE}"
    ),
    Switch("muon_wd", "off", "weight decay of the matrices", "MUON_WD=0"),
    Switch("grad_clip", "off", "clip of the gradient", "GRAD_CLIP_NORM=0"),
    Switch("clip_local", "other", "clip on each rank (here there is one)", "CLIP=local"),
]
MIXTURE_SWITCHES = [  # of --held-out
    Switch("known", "off", "training text in the artifact, for the counts", "KNOWN_TOKENS=0"),
    Switch("known_half", "other", "1,500,000 tokens of it", "KNOWN_TOKENS=1500000"),
]
HEADINGS = ("technique", "change", "variables", "averaged", "{judged}", "{judged} difference")
HEADINGS += ("artifact bytes", "ms a step", "")
ABLATION_NOTES = """`tiny` with one thing changed: {steps} steps, seeds 1 to {seeds}, scored on
{text}.
Averaged: bits per byte of the averaged weights before quantisation; {judged}: {meant}.
Differences are from the baseline of the same seed, mean ± standard error over seeds; sorted by that
of {judged}, worst first. "off" takes a technique out of `tiny`, "on" adds one, "other" puts another
value.

{table}

A technique **hurts** or helps here where the {judged} difference is more than two standard errors;
with three seeds chance alone does so in one row of eleven, in each direction. All of them stay
switchable: {steps} steps of a small model say little about 7,000 of a large one. Of two probes of
published switches on small GPUs both changed sign at 8xH100 (PR #2143), and a gain of 18 % at width
192 was a loss of 2.7 % at width 512 (PR #1227): nothing of own's training is chosen by this table.
A difference of
exactly 0 means that the runs made the same integers. Milliseconds a step are those of the least
disturbed seed, each run on its share of the cores.
"""
JUDGED_BY = {  # measure: its name in the table, what it is
    "int6_bpb": ("int6", "of the artifact re-read"),
    "val_bpb": ("val_bpb", "of the mixture with the known text, over sliding windows"),
}


def ablate(options: argparse.Namespace, runner: Runner) -> None:
    """What each technique is worth on two CPU cores: `tiny` with one thing changed at a time.

    All of it takes about 40 minutes on two idle cores; a few switches take a few minutes:

        python records/tools/experiments.py ablation --only relu2,xsa_off --seeds 2 --steps 60

    Every run has the same number of steps, the same training text and the same first part of the
    validation text. Switches of earlier calls stay in the table. What is to be chosen by a table
    must not see the validation text: --held-out scores documents held out of the training text, by
    the mixture with the known text as val_bpb does, but over sliding windows: no lanes, no
    learning in them.
    """
    judged = MIXED if options.held_out else {}
    changes = overrides(options.set)
    if names := judged.keys() & changes.keys() - {"EVAL_STRIDE"}:
        name = min(names)
        raise UserError(f"--set {name}={changes[name]}: --held-out sets it; fix: leave one out")
    given = FIXED | judged | schedule_of_steps(options.steps) | changes
    measure = judging(options)
    source = Path(Config.from_env(given).data_path)
    train_gpt.prepare_sample(source)  # before several runs would at the same time
    with tempfile.TemporaryDirectory(prefix="ablation_") as data:
        if options.held_out:
            base = given | {"DATA_PATH": hold_out(source, Path(data))}
        else:
            base = given | {"DATA_PATH": cut_validation(source, Path(data), options.val_tokens)}
        chosen = choose_switches(options, base)
        plain = [BASELINE.task(base, seed) for seed in range(1, options.seeds + 1)]
        baseline = runner.make(plain, measure)  # first, as pruning needs its sizes
        if not baseline:
            raise UserError("no run of the baseline ended well, see above")
        sizes = by_seed(baseline, "total_bytes")
        runner.make([s.task(base, *run) for run in sizes.items() for s in chosen], measure)
        known = [switch for switch in switches(options) if switch.fits(base)]  # of earlier calls
        rows = runner.finished(s.task(base, *run) for s in known for run in sizes.items())
    write_ablation(options, runner, baseline + rows)


def judging(options: argparse.Namespace) -> str:
    """The measure by which a table judges."""
    return "val_bpb" if options.held_out else "int6_bpb"


def switches(options: argparse.Namespace) -> list[Switch]:
    return [*MIXTURE_SWITCHES, *SWITCHES] if options.held_out else SWITCHES


def schedule_of_steps(steps: int) -> dict[str, str]:
    """Every schedule of `tiny` as the same share of `steps`; one validation, at the end."""
    return as_env(
        ITERATIONS=steps,
        WARMDOWN_ITERS=round(0.6 * steps),
        VAL_LOSS_EVERY=steps,
        MUON_MOMENTUM_WARMUP_STEPS=round(0.25 * steps),
        SWA_EVERY=max(1, steps // 40),
        QAT_EVERY=max(1, steps // 40),
    )


def cut_validation(source: Path, folder: Path, tokens: int) -> str:
    """A dataset in `folder` with links to that of `source`, but the first `tokens` validation
    tokens alone -> its path; four passes over all of it would take longer than the training."""
    val = train_gpt.find_shards(source, "val")
    for path in source.iterdir():
        if path not in val and path.suffix not in (".json", ".jsonl"):  # of the whole text
            (folder / path.name).symlink_to(path.resolve())
    stream = train_gpt.read_shard(val[0], vocab_size=2**16)
    prepare_text.write_shards(stream[:tokens], folder / val[0].name.removesuffix("_000000.bin"))
    return str(folder)


def hold_out(source: Path, folder: Path) -> str:
    """A dataset in `folder` of the training documents of `source` alone, HELD_OUT of them to
    validate on, drawn by a fixed seed -> its path; UserError where there are too few."""
    tokens = read_split(source, "train")
    documents = np.split(tokens, np.flatnonzero(tokens == train_gpt.BOS)[1:])
    if len(documents) < 2 * HELD_OUT:
        found = f"{source}: {len(documents)} training documents"
        raise UserError(f"--held-out: {found}; fix: a text of {2 * HELD_OUT} or more")
    drawn = {*np.random.default_rng(7).choice(len(documents), HELD_OUT, replace=False).tolist()}
    for split in ("train", "val"):
        part = [d for i, d in enumerate(documents) if (i in drawn) == (split == "val")]
        end = [np.array([train_gpt.BOS], tokens.dtype)] * (split == "val")
        prepare_text.write_shards(np.concatenate(part + end), folder / f"held_{split}")
    (folder / "tokenizer.model").symlink_to((source / "tokenizer.model").resolve())
    return str(folder)


def choose_switches(options: argparse.Namespace, base: dict[str, str]) -> list[Switch]:
    """Those of --only, or all; UserError for what is none or changes nothing."""
    names = options.only
    known = {switch.name: switch for switch in switches(options)}
    if unknown := set(names or ()) - known.keys():
        raise UserError(f"--only {','.join(unknown)}: not a switch; fix: one of {', '.join(known)}")
    chosen = [switch for switch in known.values() if names is None or switch.name in names]
    if idle := ", ".join(switch.name for switch in chosen if not switch.changes(base)):
        raise UserError(f"{idle}: changes nothing in this configuration; fix: see --only")
    return chosen


def write_ablation(options: argparse.Namespace, runner: Runner, rows: Sequence[Row]) -> None:
    """The table, sorted by effect, and everything behind it."""
    groups = grouped(rows, "name")
    baseline = groups["baseline"]
    measure = judging(options)
    changes = {name: estimates(group, baseline) for name, group in groups.items()}
    shown = [switch for switch in switches(options) if switch.name in groups]
    shown.sort(key=lambda switch: -changes[switch.name][measure].mean)
    lines = [
        table_row(switch, groups[switch.name], baseline, measure) for switch in (BASELINE, *shown)
    ]
    judged, meant = JUDGED_BY[measure]
    text = f"the first {options.val_tokens:,} tokens of the validation text"
    if options.held_out:
        text = f"{HELD_OUT} documents held out of the training text"
    text = ABLATION_NOTES.format(
        steps=options.steps,
        seeds=options.seeds,
        text=text,
        judged=judged,
        meant=meant,
        table=markdown([heading.format(judged=judged) for heading in HEADINGS], lines, left=3),
    )
    results = {
        name: estimates(group) | {f"{key}_difference": e for key, e in changes[name].items()}
        for name, group in groups.items()
    }
    variables = {switch.name: switch.variables for switch in shown}
    title = "Ablation on held-out documents" if options.held_out else "Ablation"
    runner.publish(title, rows, text, variables=variables, results=results)


def table_row(
    switch: Switch, rows: Sequence[Row], baseline: Sequence[Row], measure: str
) -> list[str]:
    """What was measured; for a switch, size and time as differences from the baseline."""
    scores = [cell(estimate(rows, name)) for name in ("averaged_bpb", measure)]
    if switch is BASELINE:
        size = cell(estimate(rows, "artifact_bytes"), ",.0f")
        return [switch.words, "", "", *scores, "", size, f"{least_ms(rows):.0f}", ""]
    change = estimate(rows, measure, baseline)
    return [
        switch.words,
        switch.how,
        f"`{switch.variables.replace('?', f'{PRUNED}*size')}`",
        *scores,
        cell(change, "+.4f"),
        cell(estimate(rows, "artifact_bytes", baseline), "+,.0f", error=False),
        f"{least_ms(rows) - least_ms(baseline):+.0f}",
        remark(switch, change),
    ]


def least_ms(rows: Sequence[Row]) -> float:
    """Milliseconds a step of the run that was disturbed least."""
    return min(by_seed(rows, "step_ms").values())


def remark(switch: Switch, change: Estimate) -> str:
    """Whether the technique helps or hurts by more than two standard errors."""
    if change.error is None or abs(change.mean) <= max(2 * change.error, SMALLEST):
        return ""
    helps = change.mean > 0 if switch.how == "off" else change.mean < 0
    return "helps" if helps else "**hurts** at this scale; stays switchable"


# -----------------------------------------------------------------------------
# Tournament

CONFIGS = ["own", "tiny", "pr864", "pr810", "pr1026", "pr993", "pr808"]
TEXTS = ["sample", "python"]
NEVER = 1_000_000  # steps
# Sizes and rates of `tiny`, the same for all, and the five's scorer. The steps of the warm-up are
# untimed: the first ones are slow and would bend the rate's fall.
SHRINK = pairs("DEVICE=cpu NUM_LAYERS=4 MODEL_DIM=128 NUM_HEADS=4 NUM_KV_HEADS=2 BIGRAM_DIM=32")
SHRINK |= pairs("VE_DIM=32 TRAIN_SEQ_LEN=256 TRAIN_BATCH_TOKENS=2048 MUON_MOMENTUM=0.95")
SHRINK |= pairs("MUON_MOMENTUM_WARMUP_START=0.85 WARMUP_STEPS=2 EVAL_STRIDE=128")
SHRINK |= pairs("TRAIN_LOG_EVERY=10 SCORER=sliding CODEC_TOKENS=0")
TOKENS_SHRINK = 1024  # of the 62 M validation tokens, about: loads of hashed tables stay
# A short run for the time of a step, which the schedules need.
CALIBRATION = pairs("ITERATIONS=12 MAX_WALLCLOCK_SECONDS=0 VAL_LOSS_EVERY=0 NGRAM_ENABLED=0")
CALIBRATION |= pairs("NGRAM_SCHEME= TTT_ENABLED=0")
SPREAD = ("step_ms", "val_bpb")  # shown with their standard errors; the first tells a busy machine
PYTHON = ROOT / f"data/datasets/python_{platform.python_version()}"
PYTHON_BYTES = 4_000_000
LEFT_OUT = {"site-packages", "test", "tests", "idle_test", "__pycache__"}
TOURNAMENT_NOTES = """Each configuration trains for {seconds} s on an equal share of the cores, with
seeds 1 to {seeds}, and is scored as in a real run: all but the pseudo-score is of the artifact
re-read, and normalised; ± is the standard error over seeds. "Own cascade" is the configuration's
published backoff on exact counts, val_bpb the learned mixture. The pseudo-score is what the PR's
own scorer prints, and the mass beside it what its "probabilities" add up to: no code length.

{ranks}

{tables}

## Shrunk alike

{shrink}

Layer numbers are scaled to the depth, the pre-enrichment to the width; hashed n-gram tables have
1/{cut:,} of their buckets, about as the text is shorter, and take up at most 64 targets at a
time. Schedules are shares of the steps, those of the published runs: the rate falls over the last
half, the EMA reaches over a 20th (0.997 as published would keep most of the first weights of so
short a run). Rates are each configuration's own. #993's pruning to 15.149 MiB has nothing to do
at this size. Times and so the number of steps depend on what else the machine does: the scores
are not the same twice. The order of models so small tells little about the order at full size.

`tiny` is made for this size, the others are not: its artifact holds the training text, which
counts begin with (KNOWN_TOKENS). Packing that text and GPTQ, which `own` has, too, are part of its
seconds: it makes fewer steps than the five. At full size the cap holds some thousandths of the
training text.
"""


def play(options: argparse.Namespace, runner: Runner) -> None:
    """Our configurations against the five published ones, shrunk alike, on two texts.

    All of it takes about 30 minutes on two idle cores; the five alone, on one text, take five:

        python records/tools/experiments.py tournament --texts sample --seeds 1 --seconds 15 \\
            --configs pr864,pr810,pr1026,pr993,pr808 --out /tmp/five

    All get the same seconds of training on as many cores each. A text is `sample` (the embedded
    one), `python` (sources of the standard library, prepared on first use) or a dataset folder.
    """
    folders = {text: str(text_folder(text)) for text in options.texts}
    changes = overrides(options.set)
    sizes = {config: shrunk(config, changes) for config in options.configs}
    short = []
    for config, size in sizes.items():
        env = size | CALIBRATION | {"EVAL_STRIDE": size["TRAIN_SEQ_LEN"]}
        env |= {"DATA_PATH": folders[options.texts[0]]}
        short.append(Task(dict(name=f"step of {config}", seed=0), env))
    timed = grouped(runner.make(short, "step_ms"), "name")
    tasks = []
    for seed in range(1, options.seeds + 1):
        for text, folder in folders.items():
            for config, size in sizes.items():
                for row in timed.get(f"step of {config}", []):
                    plan = schedule_of_seconds(options.seconds, row["measures"]["step_ms"])
                    env = plan | size | as_env(DATA_PATH=folder, SEED=seed)
                    tasks.append(Task(dict(name=config, text=text, seed=seed), env))
    write_tournament(options, runner, runner.make(tasks, "val_bpb"))


def text_folder(name: str, option: str = "--texts") -> Path:
    """The dataset of a text, prepared where that is still to do; UserError names the option."""
    folder = {"sample": train_gpt.SAMPLE_DATA, "python": PYTHON}.get(name, Path(name).resolve())
    train_gpt.prepare_sample(folder)  # before several runs would at the same time
    if folder == PYTHON and not (folder / "tokenizer.model").exists():
        prepare_python(folder)
    if not list(folder.glob("*_val_*.bin")):
        raise UserError(f"{option} {name}: no dataset; fix: sample, python or a dataset folder")
    return folder


def prepare_python(folder: Path) -> None:
    """A dataset of PYTHON_BYTES of the standard library, a document for each file, in the order of
    the hashes of their paths."""
    library = Path(sysconfig.get_paths()["stdlib"])
    paths = [path.relative_to(library) for path in library.rglob("*.py")]
    kept = [p for p in paths if not LEFT_OUT & {*p.parts} and "sysconfig" not in p.name]
    kept.sort(key=lambda path: sha256(path.as_posix().encode()))
    contents = [(library / path).read_bytes() for path in kept]
    ends = [*itertools.accumulate(map(len, contents))]
    chosen = contents[: bisect.bisect(ends, PYTHON_BYTES)]
    documents = [*filter(None, (content.decode("utf-8", errors="ignore") for content in chosen))]
    train, val = prepare_text.split_documents(documents, val_fraction=0.06, seed=1337)
    prepare_text.write_dataset(train, val, folder, folder.name)


def shrunk(config: str, changes: dict[str, str]) -> dict[str, str]:
    """Variables of a RECORD at small size: what names layers or follows a size is scaled."""
    base = {"RECORD": config} | SHRINK | changes
    full = Config.from_env({"RECORD": config, "DEVICE": "cpu"})
    layers = train_gpt.parse("NUM_LAYERS", base["NUM_LAYERS"])
    width = train_gpt.parse("MODEL_DIM", base["MODEL_DIM"])
    ratio = layers / full.num_layers
    last = sorted(i % full.num_layers - full.num_layers for i in full.ve_layers)
    middle = sorted({round(i % full.num_layers * ratio) for i in full.depth_recurrence})
    looped = [round(i * ratio) for i in full.looped_layers]
    parallel = full.parallel_from
    scaled = as_env(
        LOOP_LAYERS=f"{looped[0]}-{looped[-1]}" if looped else "",
        PARALLEL_FROM=parallel if parallel < 0 else round(parallel * ratio),
        WARMDOWN_SHARE=full.warmdown_share,
        VE_LAYERS=",".join(str(max(-layers, i)) for i in last),
        DEPTH_RECURRENCE=",".join(map(str, middle)),
        XSA_LAST_N=round(full.xsa_last_n * ratio) or min(1, full.xsa_last_n),
        PRE_ENRICH_DIM=round(full.pre_enrich_dim * width / full.model_dim),
        NGRAM_BUCKETS=max(1, full.ngram_buckets // TOKENS_SHRINK),
        NGRAM_CHUNK_TOKENS=min(full.ngram_chunk_tokens, 64),
    )
    return {name: text for name, text in scaled.items() if text} | base


def schedule_of_seconds(seconds: int, step_ms: float) -> dict[str, str]:
    """Schedules as shares of the steps that `seconds` will hold, those of the published runs:
    half of the steps for the fall of the rate, a fifth for Muon's momentum, EMA over a 20th (333 of
    6,800; unscaled 0.997 would keep most of the first weights), 136 intervals of SWA."""
    steps = 1000 * seconds / step_ms
    return as_env(
        ITERATIONS=NEVER,
        VAL_LOSS_EVERY=NEVER,
        MAX_WALLCLOCK_SECONDS=seconds,
        WARMDOWN_ITERS=round(steps / 2),
        MUON_MOMENTUM_WARMUP_STEPS=round(steps / 5),
        EMA_DECAY=round(max(0.5, 1 - 20 / steps), 4),
        SWA_EVERY=max(1, round(steps / 136)),
        QAT_EVERY=max(1, round(steps / 40)),
    )


def write_tournament(options: argparse.Namespace, runner: Runner, rows: Sequence[Row]) -> None:
    """Ranks over all texts, a table for each text, and everything behind them."""
    groups = {text: grouped(here, "name") for text, here in grouped(rows, "text").items()}
    sizes = " ".join(f"{name}={text}" for name, text in (SHRINK | overrides(options.set)).items())
    text = TOURNAMENT_NOTES.format(
        seconds=options.seconds,
        seeds=options.seeds,
        cut=TOKENS_SHRINK,
        shrink=textwrap.indent(textwrap.fill(sizes, 90), "    "),
        ranks=rank_table(ranks(rows), groups),
        tables="\n\n".join(f"## {text}\n\n{text_table(found)}" for text, found in groups.items()),
    )
    results = {
        text: {config: estimates(found[config]) for config in options.configs if config in found}
        for text, found in groups.items()
    }
    title = f"Tournament of {', '.join(options.configs)}"
    runner.publish(title, rows, text, ranks=ranks(rows), results=results)


def ranks(rows: Sequence[Row]) -> dict[str, list[int]]:
    """config -> its rank by val_bpb for each text and seed, 1 for the best."""
    found: dict[str, list[int]] = {}
    for _, here in sorted(grouped(rows, "text").items()):
        for _, rivals in sorted(grouped(here, "seed").items()):
            rivals.sort(key=lambda row: row["measures"]["val_bpb"])
            for rank, row in enumerate(rivals, 1):
                found.setdefault(row["labels"]["name"], []).append(rank)
    return found


def rank_table(places: dict[str, list[int]], groups: dict[str, dict[str, list[Row]]]) -> str:
    """Mean rank and val_bpb by text, the best configuration first."""
    means = {config: statistics.fmean(ranks) for config, ranks in places.items()}
    lines = []
    for config in sorted(means, key=means.get):
        scores = [estimate(found.get(config, []), "val_bpb") for found in groups.values()]
        lines.append([config, f"{means[config]:.2f}", *map(cell, scores)])
    return markdown(["configuration", "mean rank", *(f"val_bpb, {t}" for t in groups)], lines)


def text_table(groups: dict[str, list[Row]]) -> str:
    """All measures on one text, the best val_bpb first; columns without any value left out."""
    found = {config: estimates(rows) for config, rows in groups.items()}
    shown = {
        name: measure
        for name, measure in MEASURES.items()
        if measure.title and any(name in values for values in found.values())
    }
    lines = []
    for config, values in sorted(found.items(), key=lambda item: item[1]["val_bpb"].mean):
        cells = [cell(values.get(n), m.style, error=n in SPREAD) for n, m in shown.items()]
        lines.append([config, *cells])
    return markdown(["configuration", *(measure.title for measure in shown.values())], lines)


# -----------------------------------------------------------------------------
# Race

HISTORY = RECORDS / "track_cpu/README.md"
HISTORY_ROW = re.compile(r"^\| *\d+ *\| *`([0-9a-f]{7,40})` *\|", re.MULTILINE)
RACERS = ("record", "candidate")
MOST_TIME = 1.01  # of the record's training seconds, mean over the pairs: the clock's own spread
LEAST_SEEDS = 3
MARK = "race.json"  # in a kept run folder: of which run it is, and the seconds of all of it
RACE_NOTES = """`RECORD=tiny` of this checkout ({candidate}) against that of the record
({record}): for each seed both at once, a core each, which they swap from seed to seed.

{table}

{verdict}

A record is broken where all of this holds (records/track_cpu/README.md):

{criteria}
"""


def race(options: argparse.Namespace, runner: Runner) -> None:
    """This checkout's `tiny` against the present record of the CPU track, side by side.

    A seed takes about ten minutes on two cores, three of them half an hour. The record is the last
    commit of the history in records/track_cpu/README.md. Run folders stay in --out, which a
    killed race goes on from; --set is of the candidate alone.

        python records/tools/experiments.py race --set MATRIX_LR=0.03 --seeds 1
    """
    cores = my_cores()
    if len(cores) < 2:
        raise UserError("a race needs two cores, this process has one; fix: another machine")
    given = overrides(options.set)
    if paths := given.keys() & {*PATHS}:
        name = paths.pop()
        fix = "fix: --data, which is of both"
        raise UserError(f"--set {name}={given[name]}: would be the candidate's alone; {fix}")
    text = {"DATA_PATH": str(text_folder(options.data, "--data"))} if options.data else {}
    Config.from_env({"RECORD": "tiny"} | given | text)  # refused before half an hour
    data = data_digest(Path(text["DATA_PATH"]) if text else embedded_text())
    revision = last_record() if options.record is None else options.record
    with tempfile.TemporaryDirectory(prefix="race_") as folder:
        scripts = dict(record=checked_out(revision, Path(folder)), candidate=SCRIPT)
        before = {name: race_code(script) for name, script in scripts.items()}

        def racers(seed: int) -> dict[str, Racer]:
            env = {"RECORD": "tiny"} | text | as_env(SEED=seed)
            both = dict(record=env, candidate=env | given)
            return {
                name: Racer.of(Task(dict(name=name, seed=seed), both[name]), scripts[name], data)
                for name in RACERS
            }

        require_own_folder(runner.out, racers)
        entries = []
        for number, seed in enumerate(itertools.islice(race_seeds(), options.seeds)):
            pair = run_pair(runner, racers(seed), cores[:: -1 if number % 2 else 1])
            if {name: race_code(script) for name, script in scripts.items()} != before:
                fix = "start again, with another --out"
                raise UserError(f"{SCRIPT.parent}: edited during the race; fix: {fix}")
            entries += pair
            shown = "; ".join(f"{e['labels']['name']} {e['val_bpb']:.4f}" for e in pair)
            print(f"seed {seed}: {shown}", flush=True)
    others = {"--data": options.data, "--set": given, "edits": commit().endswith("-dirty")}
    others["--record"] = options.record not in (None, last_record())
    publish_race(runner, entries, revision, [name for name, there in others.items() if there])


class Racer(NamedTuple):
    """One side of a pair: its run, its script, and what both follow from."""

    task: Task
    script: Path
    digest: str

    @classmethod
    def of(cls, task: Task, script: Path, data: str) -> "Racer":
        """digest: changes with seed, settings, the script, its RECORD=tiny, and the data."""
        text = json.dumps([task.labels, task.env, data], sort_keys=True).encode()
        return cls(task, script, sha256(race_code(script) + text)[:16])

    def folder(self, out: Path) -> Path:
        return out / self.task.labels["name"] / f"seed_{self.task.labels['seed']}"


def embedded_text() -> Path:
    """The embedded text's dataset; UserError where it is not as published."""
    folder = train_gpt.SAMPLE_DATA
    train_gpt.prepare_sample(folder)
    for split, known in dict(train=TRAIN_TOKENS_SHA256, val=VAL_TOKENS_SHA256).items():
        if tokens_sha256(read_split(folder, split)) != known:
            fix = "fix: move it away, it is made anew"
            raise UserError(f"{folder}: its {split} tokens are not those of the rules; {fix}")
    return folder


def require_own_folder(out: Path, racers: Callable[[int], dict[str, Racer]]) -> None:
    """UserError where nothing can be written to, or what is there is of another race, which this
    one would replace in part."""
    for name in RACERS:
        try:
            (out / name).mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryDirectory(dir=out / name).cleanup()
        except OSError as error:
            fix = "fix: a folder that can be written to"
            raise UserError(f"--out {out}: {error.strerror}; {fix}") from None
        for folder in (out / name).glob("seed_*"):
            seed = folder.name.removeprefix("seed_")
            digest = racers(int(seed))[name].digest if seed.isdecimal() else ""
            if read_mark(folder).get("digest", digest) != digest:
                raise UserError(f"{folder}: of another race; fix: --out ELSEWHERE, or remove it")


def race_seeds() -> Iterator[int]:
    """Those of README's loop, then others."""
    first = (1337, 42, 2024)
    yield from first
    yield from (seed for seed in itertools.count(1) if seed not in first)


def last_record() -> str:
    """The commit of the history's last row; UserError."""
    rows = HISTORY_ROW.findall(HISTORY.read_text(encoding="utf-8"))
    if not rows:
        raise UserError(f"{HISTORY}: no row with a commit; fix: --record COMMIT")
    return rows[-1]


def checked_out(revision: str, folder: Path) -> Path:
    """train_gpt.py in a copy of the repository as of a commit; UserError."""
    fix = "fix: a commit of this clone (git fetch --unshallow)"
    if not revision or revision.startswith("-"):
        raise UserError(f"--record {revision!r}: is no commit; {fix}")
    git = ["git", "-C", str(ROOT), "archive", "--format=tar", f"{revision}^{{commit}}"]
    try:
        with open(folder / "tree.tar", "wb") as tree:
            done = subprocess.run(git, stdout=tree, stderr=subprocess.PIPE, text=True)
    except FileNotFoundError:
        raise UserError("git is missing; fix: install it") from None
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["git failed"])[-1]
        raise UserError(f"--record {revision}: {said}; {fix}")
    shutil.unpack_archive(folder / "tree.tar", folder / "tree", filter="data")
    script = folder / "tree/train_gpt.py"
    if not script.exists():
        raise UserError(f"--record {revision}: it has no train_gpt.py; fix: another commit")
    return script


def run_pair(runner: Runner, racers: dict[str, Racer], cores: Sequence[int]) -> list[Row]:
    """Both racers of a seed, begun together, each on its core -> what they came to. Where one's
    folder is missing both run: a time without the other's says nothing."""
    folders = {name: racer.folder(runner.out) for name, racer in racers.items()}
    if any(read_mark(folders[name]).get("digest") != racers[name].digest for name in RACERS):
        with (
            tempfile.TemporaryDirectory(prefix="train_gpt_") as home,
            ThreadPoolExecutor(2) as pool,
            killing(runner),
        ):

            def run(name: str, core: int) -> tuple[Path, float]:
                if hasattr(os, "sched_setaffinity"):
                    os.sched_setaffinity(0, [core])
                cwd = Path(home) / name
                cwd.mkdir()
                began = time.perf_counter()
                folder = runner.start(racers[name].task, racers[name].script, cwd)
                return folder, time.perf_counter() - began

            each = zip(RACERS, cores, strict=False)
            futures = {name: pool.submit(run, name, core) for name, core in each}
            wait(futures.values(), return_when=FIRST_EXCEPTION)
            if failed := [f for f in futures.values() if f.done() and f.exception()]:
                raise failed[0].exception()
            made = {name: future.result() for name, future in futures.items()}
            for name, (folder, seconds) in made.items():
                shutil.rmtree(folders[name], ignore_errors=True)
                shutil.copytree(folder, folders[name])
                mark = json.dumps(dict(digest=racers[name].digest, seconds=seconds))
                write_atomically(folders[name] / MARK, f"{mark}\n".encode())
    return [race_entry(racers[name].task, folders[name]) for name in RACERS]


@contextlib.contextmanager
def killing(runner: Runner) -> Iterator[None]:
    """No run outlives an error or a signal."""
    try:
        yield
    finally:
        for process in list(runner.processes):
            process.kill()


def race_code(script: Path) -> bytes:
    """What a racer's run depends on, beside its variables."""
    config = script.parent / "records/track_cpu/tiny/config.env"
    return script.read_bytes() + config.read_bytes()


def read_mark(folder: Path) -> dict[str, Any]:
    path = folder / MARK
    with blame(path):
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        return found if isinstance(found, dict) else {}


def race_entry(task: Task, folder: Path) -> Row:
    """Of a finished run what the rules ask for; RunError where it does not say it."""
    run = RunFolder(folder)
    codec = run.last("final_codec")
    with blame(folder):
        proved = codec.get("proved_tokens", 0) == codec.get("total_tokens")
        return dict(
            labels=task.labels,
            val_bpb=run.last("final_ngram_exact")["val_bpb"],
            train_seconds=run.last("final_budget")["train_seconds"],
            all_seconds=read_mark(folder)["seconds"],
            bytes=run.last("final_artifact_bytes")["total"],
            memory_mb=run.last("peak_memory_mb")["value"],
            steps=max(run.steps("step_avg_ms"), default=0),
            capped=float(run.settings["MAX_WALLCLOCK_SECONDS"]) > 0,
            text=[run.last("val_text").get(name) for name in ("tokens", "bytes")],
            proved=proved and codec.get("decoded") == "ok",
        )


class Judged(NamedTuple):
    """Of a race: p of the paired test, what each rule found, whether it held."""

    p: float
    rules: list[tuple[str, bool]]

    @property
    def broken(self) -> bool:
        return all(holds for _, holds in self.rules)


def judge(entries: Sequence[Row], others: Sequence[str] = ()) -> Judged:
    """By the rules of the CPU track, from the entries of both racers. others: what makes it another
    race than that for the record."""
    groups = grouped(entries, "name")
    by = {name: {row["labels"]["seed"]: row for row in groups.get(name, [])} for name in RACERS}
    pairs = [(row, by["candidate"][seed]) for seed, row in by["record"].items()]
    gains = summarise([before["val_bpb"] - after["val_bpb"] for before, after in pairs])
    p = math.nan  # one seed is no test
    if gains.deviation == 0:
        p = float(gains.mean <= 0)
    elif gains.deviation:
        error = gains.deviation / math.sqrt(gains.count)
        p = upper_tail(gains.mean / error, gains.count - 1)
    ratio = statistics.fmean(b["train_seconds"] / max(1e-9, a["train_seconds"]) for a, b in pairs)
    most = max(after["bytes"] for _, after in pairs)
    texts = {tuple(row["text"]) for pair in pairs for row in pair}
    scored = " and ".join(f"{tokens} tokens, {size} bytes" for tokens, size in sorted(texts))
    proved = [after["labels"]["seed"] for _, after in pairs if after["proved"]]
    better = gains.count >= LEAST_SEEDS and gains.mean > 0 and p < ALPHA
    seeds = f"{gains.count} seed{'s' * (gains.count > 1)}"
    test = "no test" if math.isnan(p) else f"paired t-test p = {p:.2g}"
    steps = {after["steps"] for _, after in pairs}
    capped = any(after["capped"] for _, after in pairs)
    shown = " and ".join(map(str, sorted(steps))) + ", under a cap" * capped
    apart = f"another race: {', '.join(others)}" if others else "this commit against the last row's"
    return Judged(
        p,
        [
            (apart, not others),
            (f"val_bpb {-gains.mean:+.4f} over {seeds}, {test}", better),
            (f"a fixed number of steps: {shown}", len(steps) == 1 and not capped),
            (f"training takes {ratio:.3f} of the record's time", ratio <= MOST_TIME),
            (f"{most:,} bytes of {CAP_BYTES:,}", most <= CAP_BYTES),
            (f"all score the same text: {scored}", len(texts) == 1),
            (f"proved: {len(proved)} of {seeds}, every token decoded", len(proved) == len(pairs)),
        ],
    )


def publish_race(
    runner: Runner, entries: Sequence[Row], revision: str, others: Sequence[str]
) -> None:
    """The table and the verdict, printed and written. others: of judge."""
    judged = judge(entries, others)
    head = ["racer", "seed", "val_bpb", "training s", "whole run s", "bytes", "MB", "proved"]
    lines = []
    for entry in sorted(entries, key=lambda entry: RACERS.index(entry["labels"]["name"])):
        lines.append(
            [
                *map(str, entry["labels"].values()),
                f"{entry['val_bpb']:.4f}",
                *(f"{entry[name]:.0f}" for name in ("train_seconds", "all_seconds")),
                *(f"{entry[name]:,}" for name in ("bytes", "memory_mb")),
                "yes" if entry["proved"] else "no",
            ]
        )
    verdict = "**The record is broken.**" if judged.broken else "**The record stands.**"
    ours = summarise([e["val_bpb"] for e in entries if e["labels"]["name"] == "candidate"])
    text = RACE_NOTES.format(
        record=f"commit {revision}",
        candidate=commit(),
        table=markdown(head, lines),
        verdict=f"{verdict} val_bpb {ours.spread(4)}",
        criteria="\n".join(f"- {'yes' if ok else 'NO'}: {what}" for what, ok in judged.rules),
    )
    for what, holds in judged.rules:
        print(f"{'yes' if holds else 'NO'}: {what}")
    print(verdict.strip("*"))
    rows = [dict(entry, seconds=entry["all_seconds"]) for entry in entries]
    rules = [dict(found=what, held=holds) for what, holds in judged.rules]
    p = None if math.isnan(judged.p) else judged.p  # JSON has no NaN
    runner.publish("Race", rows, text, record=revision, p=p, rules=rules, entries=entries)


# -----------------------------------------------------------------------------
# Command line

EXPERIMENTS = {"ablation": ablate, "tournament": play, "race": race}


def overrides(given: Sequence[str]) -> dict[str, str]:
    """--set's NAME=VALUE pairs; a path is meant from here, but runs start elsewhere."""
    found = parse_pairs(given, "--set")
    for name in ("RECORD", "SEED", "RUN_ID", "DECODE", "DRY_RUN", "EVAL_ONLY"):
        if name in found:
            raise UserError(f"--set {name}={found[name]}: each run has its own; fix: leave it out")
    paths = [name for name in (*PATHS, "INIT_FROM") if name in found]
    return found | {name: str(Path(found[name]).resolve()) for name in paths}


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be a whole number from 1 on")
    return int(text)


def listed(text: str) -> list[str]:
    if "" in (names := text.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r}: has an empty name")
    return names


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    both = argparse.ArgumentParser(add_help=False)
    text = "how many; SEED=1 to this, of a race 1337, 42, 2024, 1, 2, ...; default 3"
    both.add_argument("--seeds", type=positive, default=3, help=text)
    text = "runs side by side; default one a core; of a race always two"
    both.add_argument("--jobs", type=int, default=len(my_cores()), help=text)
    text = "folder of the table; default the experiment's in records/track_cpu, with --held-out "
    text += "search, of a race runs/race"
    both.add_argument("--out", type=Path, help=text)
    text = "variables of every run, such as MODEL_DIM=64 DATA_PATH=data/datasets/notes; of a race "
    text += "the candidate's alone"
    several = dict(nargs="*", action="extend", default=[])
    both.add_argument("--set", metavar="NAME=VALUE", help=text, **several)

    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    commands = parser.add_subparsers(dest="experiment", required=True, metavar="EXPERIMENT")
    add = {}
    for name, experiment in EXPERIMENTS.items():
        text = inspect.getdoc(experiment)
        about = dict(help=text.partition("\n")[0], description=text, formatter_class=layout)
        add[name] = commands.add_parser(name, parents=[both], **about).add_argument
    text = "score documents held out of the training text by the mixture, to choose by"
    add["ablation"]("--held-out", action="store_true", help=text)
    names = ", ".join(switch.name for switch in [*SWITCHES, *MIXTURE_SWITCHES])
    text = f"of {names}; default all; the last two with --held-out"
    add["ablation"]("--only", type=listed, metavar="NAME,...", help=text)
    add["ablation"]("--steps", type=positive, default=130, help="of a run; default 130")
    text = "of the validation text; default 20000"
    add["ablation"]("--val-tokens", type=positive, default=20_000, help=text)
    text = f"RECORDs; default {','.join(CONFIGS)}"
    add["tournament"]("--configs", type=listed, default=CONFIGS, metavar="NAME,...", help=text)
    text = f"default {','.join(TEXTS)}"
    add["tournament"]("--texts", type=listed, default=TEXTS, metavar="TEXT,...", help=text)
    add["tournament"]("--seconds", type=positive, default=20, help="of training; default 20")
    text = "another text for both: sample, python or a dataset folder; no record is broken on it"
    add["race"]("--data", metavar="TEXT", help=text)
    text = "commit to run beside; default that of the history's last row, which alone is a record"
    add["race"]("--record", metavar="COMMIT", help=text)
    options = parser.parse_args(arguments)
    held_out = options.experiment == "ablation" and options.held_out
    kept = RECORDS / "track_cpu" / ("search" if held_out else options.experiment)
    options.out = options.out or (ROOT / "runs/race" if options.experiment == "race" else kept)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    runner = Runner(options.out, options.jobs, arguments)
    ends = signal.SIGTERM, signal.SIGHUP  # the runs, too
    before = {each: signal.signal(each, lambda number, _: sys.exit(128 + number)) for each in ends}
    try:
        EXPERIMENTS[options.experiment](options, runner)
    except (UserError, prepare_text.DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; what was done is kept", file=sys.stderr)
        return 130
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    return int(runner.failed > 0)


if __name__ == "__main__":
    sys.exit(main())
