"""Runs of train_gpt.py side by side, for ablate.py and tournament.py.

A run is a process with cores of its own, in a temporary folder. What it measured is a line of
results.jsonl as soon as it ends, so a killed table goes on where it stopped: a line counts while
the code, the settings and the data that it was measured with are the same. A table ends where the
code is edited under it; `git worktree add` gives it a copy of its own.
"""

import argparse
import contextlib
import json
import math
import os
import platform
import queue
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from run_folder import ROOT

from train_gpt import ALIASES, ANYWAY, VARIABLES, Config, UserError, sha256, show

SCRIPT = ROOT / "train_gpt.py"

CODE = {path: path.read_bytes() for path in (SCRIPT, ROOT / "records/tools/as_written.py")}
NOT_SETTINGS = ("RUN_ID", "DATA_PATH", "TOKENIZER_PATH")
MEASURES = {  # measure -> line of metrics.jsonl, its field
    "step_ms": ("step", "step_avg_ms"),
    "averaged_bpb": ("averaged", "val_bpb"),
    "int6_bpb": ("final_int6_roundtrip_exact", "val_bpb"),
    "sliding_bpb": ("final_int6_sliding_window_exact", "val_bpb"),
    "ttt_bpb": ("final_ttt_exact", "val_bpb"),
    "cascade_bpb": ("final_ngram_backoff_exact", "val_bpb"),
    "val_bpb": ("final_ngram_exact", "val_bpb"),
    "pseudo_bpb": ("final_ngram_pseudo", "pseudo_bpb"),
    "mass_mean": ("final_ngram_pseudo", "mass_mean"),
    "artifact_bytes": ("final_artifact_bytes", "weights"),
    "total_bytes": ("final_artifact_bytes", "total"),
}
Row = dict[str, Any]  # a line of results.jsonl
RUNNING: set[subprocess.Popen] = set()


class RunError(UserError):
    """A run that ended badly, with its last words."""


class Task(NamedTuple):
    """A run to make: what the table calls it, and the variables that it is given."""

    labels: dict[str, Any]
    env: dict[str, str]

    def title(self) -> str:
        return " ".join(f"{name} {value}" for name, value in self.labels.items())


class Estimate(NamedTuple):
    """Mean of a measure over seeds and its standard error, None for a single seed."""

    mean: float
    error: float | None


# -----------------------------------------------------------------------------
# One run


def environment() -> dict[str, str]:
    """This process's variables without train_gpt.py's, which a table sets itself."""
    ours = {*VARIABLES, *ALIASES, *ANYWAY}
    return {name: text for name, text in os.environ.items() if name not in ours}


def digest(task: Task) -> str:
    """Changes with the labels, the code, every resolved setting and the size of each shard."""
    cfg = Config.from_env(task.env)
    settings = {n: show(getattr(cfg, n.lower())) for n in VARIABLES if n not in NOT_SETTINGS}
    data = sorted((path.name, path.stat().st_size) for path in Path(cfg.data_path).glob("*.bin"))
    text = json.dumps([task.labels, settings, data], sort_keys=True).encode()
    code = CODE.values() if cfg.ngram_scheme else [CODE[SCRIPT]]
    return sha256(b"".join([*code, text]))[:16]


def measures(folder: Path) -> dict[str, float]:
    """What a finished run folder measured, of MEASURES and "steps"; what it lacks is left out."""
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    last = {line["key"]: line for line in map(json.loads, text.splitlines())}
    places = {name: (last.get(key, {}), field) for name, (key, field) in MEASURES.items()}
    found = {name: line[field] for name, (line, field) in places.items() if field in line}
    return {"steps": int(last["step"]["value"].partition("/")[0])} | found


def execute(task: Task) -> Row:
    """Run train_gpt.py once, in a folder that is deleted; RunError where it fails."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="train_gpt_") as cwd:
        env = environment() | task.env | {"RUN_ID": "run"}
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        with subprocess.Popen([sys.executable, SCRIPT], cwd=cwd, env=env, **pipes) as process:
            RUNNING.add(process)
            output, _ = process.communicate()
            RUNNING.discard(process)
        check_code()
        if process.returncode:
            last = (output.strip().splitlines() or ["no output"])[-1]
            raise RunError(f"{task.title()}: exit status {process.returncode}: {last}")
        found = measures(Path(cwd) / "runs/run")
    settings = {name: text for name, text in task.env.items() if name not in NOT_SETTINGS}
    row = dict(labels=task.labels, digest=digest(task), date=now(), env=settings)
    return row | dict(seconds=time.perf_counter() - began, measures=found)


def check_code() -> None:
    """One table, one code."""
    for path, code in CODE.items():
        if path.read_bytes() != code:
            raise UserError(
                f"{path} was edited meanwhile; fix: start again, finished runs are kept"
            )


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


# -----------------------------------------------------------------------------
# Many runs


def read_rows(out: Path) -> dict[str, Row]:
    """The lines of results.jsonl by digest; one that a kill cut short is cut off the file."""
    path = out / "results.jsonl"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole, encoding="utf-8")
    return {row["digest"]: row for row in map(json.loads, whole.splitlines())}


def finished(tasks: Iterable[Task], out: Path) -> list[Row]:
    """The lines of those tasks that are done, in their order."""
    done = read_rows(out)
    return [done[mark] for mark in map(digest, tasks) if mark in done]


def run_tasks(tasks: Sequence[Task], jobs: int, out: Path, measure: str) -> int:
    """Make the runs that results.jsonl lacks, a line each as they end -> how many failed."""
    out.mkdir(parents=True, exist_ok=True)
    done, failed, began = read_rows(out), 0, time.perf_counter()
    missing = [task for task in tasks if digest(task) not in done]
    print(f"{len(tasks)} runs, {len(tasks) - len(missing)} of them done before", flush=True)
    with workers(jobs) as pool:
        futures = {pool.submit(execute, task): task for task in missing}
        for number, future in enumerate(as_completed(futures), 1):
            try:
                row = future.result()
            except RunError as error:
                failed += 1
                print(f"failed: {error}", flush=True)
                continue
            with open(out / "results.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            minutes = (time.perf_counter() - began) / 60 * (len(missing) / number - 1)
            value = f"{measure} {row['measures'].get(measure, math.nan):.4f}"
            what = f"{number}/{len(missing)} {futures[future].title()}: {value}"
            print(f"{what}, {row['seconds']:.0f} s, about {minutes:.0f} min left", flush=True)
    return failed


@contextlib.contextmanager
def workers(jobs: int) -> Iterator[ThreadPoolExecutor]:
    """A pool of threads with equal shares of this process's cores; no run outlives it."""
    cores, shares = my_cores(), queue.SimpleQueue()
    if not 1 <= jobs <= len(cores):
        raise UserError(f"--jobs {jobs}: this process has {len(cores)} cores; fix: 1 to that many")
    for first in range(jobs):
        shares.put(cores[first : len(cores) // jobs * jobs : jobs])
    pool = ThreadPoolExecutor(jobs, initializer=pin, initargs=(shares,))
    try:
        yield pool
    finally:  # also after Ctrl-C and SIGTERM
        pool.shutdown(wait=False, cancel_futures=True)
        for process in list(RUNNING):
            process.kill()
        pool.shutdown()


def my_cores() -> list[int]:
    affinity = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))  # Linux
    return sorted(affinity(0))


def pin(shares: queue.SimpleQueue) -> None:
    """Keep this thread, and the processes that it starts, on its share of the cores (Linux)."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, shares.get())


# -----------------------------------------------------------------------------
# Statistics and tables


def estimate(values: Iterable[float | None]) -> Estimate | None:
    """Mean and standard error, sd / sqrt(n) with n - 1 degrees of freedom."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    error = statistics.stdev(known) / math.sqrt(len(known)) if len(known) > 1 else None
    return Estimate(statistics.fmean(known), error)


def over_seeds(rows: Iterable[Row], measure: str) -> Estimate | None:
    return estimate(row["measures"].get(measure) for row in rows)


def difference(rows: Iterable[Row], base: Iterable[Row], measure: str) -> Estimate | None:
    """Of `measure` from `base`, paired by seed."""
    before = {row["labels"]["seed"]: row["measures"].get(measure) for row in base}
    pairs = [(row["measures"].get(measure), before.get(row["labels"]["seed"])) for row in rows]
    return estimate(a - b for a, b in pairs if a is not None and b is not None)


def cell(found: Estimate | None, style: str = ".4f", error: bool = True) -> str:
    """An estimate for a table: 1.2345 ± 0.0012."""
    if found is None:
        return "-"
    plain = style.lstrip("+")
    known = error and found.error is not None
    return f"{found.mean:{style}} ± {found.error:{plain}}" if known else f"{found.mean:{style}}"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# -----------------------------------------------------------------------------
# The two scripts


def parser(summary: str, out: str) -> argparse.ArgumentParser:
    """The options that both scripts have."""
    made = argparse.ArgumentParser(description=summary.partition("\n")[0])
    made.add_argument("--seeds", type=positive, default=3, help="SEED=1 to this; default 3")
    made.add_argument("--jobs", type=int, default=len(my_cores()), help="runs side by side")
    made.add_argument("--out", type=Path, default=ROOT / "records/track_cpu" / out, help="folder")
    help_text = "variables of every run, such as MODEL_DIM=64 DATA_PATH=data/datasets/notes"
    made.add_argument(
        "--set", nargs="*", action="extend", default=[], metavar="N=V", help=help_text
    )
    return made


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be a whole number from 1 on")
    return int(text)


def overrides(pairs: Sequence[str]) -> dict[str, str]:
    """--set's NAME=VALUE pairs; a path is meant from here, but runs start elsewhere."""
    if wrong := [pair for pair in pairs if "=" not in pair]:
        raise UserError(f"--set {wrong[0]}: must be NAME=VALUE")
    given = dict(pair.split("=", 1) for pair in pairs)
    return given | {n: str(Path(given[n]).resolve()) for n in NOT_SETTINGS[1:] if n in given}


def facts(command: Sequence[str], rows: Sequence[Row], jobs: int, began: float) -> Row:
    """Command, date, machine and times of a table."""
    cpu, info = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if info.exists() and "model name" in (text := info.read_text()):
        cpu = text.partition("model name")[2].partition(": ")[2].partition("\n")[0]
    return dict(
        command=shlex.join(["python", *command]),
        date=now(),
        hardware=f"{len(my_cores())} cores of {cpu}, {jobs} runs at a time",
        versions=f"Python {platform.python_version()}, torch {version('torch')}",
        code=sha256(CODE[SCRIPT])[:16],
        runs=len(rows),
        run_minutes=round(sum(row["seconds"] for row in rows) / 60, 1),
        wall_minutes=round((time.perf_counter() - began) / 60, 1),
    )


def write_table(out: Path, name: str, about: Row, text: str, **results: Any) -> None:
    """README.md, the exact command at its top, and results.json; an estimate is [mean, error]."""
    top = (
        f"# {name}\n\n    {about['command']}\n\n{about['date']}; {about['hardware']};\n"
        f"{about['versions']}, train_gpt.py {about['code']} (sha256). {about['runs']} runs of\n"
        f"{about['run_minutes']} min together; the command's last call took"
        f" {about['wall_minutes']} min.\n\n"
    )
    (out / "README.md").write_text(top + text.rstrip() + "\n", encoding="utf-8")
    whole = json.dumps(about | results, indent=1, ensure_ascii=False)
    (out / "results.json").write_text(whole + "\n", encoding="utf-8")
    print(f"wrote {out / 'README.md'} and {out / 'results.json'}")


def script_main(work: Callable[[], int]) -> int:
    """The exit status of `work`; SIGTERM ends its runs too, a UserError is one line."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        return work()
    except (UserError, OSError, subprocess.CalledProcessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        signal.signal(signal.SIGTERM, before)
