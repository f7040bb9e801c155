"""Checks and measurements of this program on one CUDA machine: a table, and the same as JSON.

    tests/gpu/run.sh [--out FILE] [--parts script,step] [--limit SECONDS] [--device cpu --quick]

Every part runs in a process of its own, which ends with its time box: what one part breaks, the
next does not see. Parts that fit into the device's memory together prepare (compile) at the same
time; then each measures alone.
"""

import argparse
import contextlib
import functools
import gc
import io
import json
import multiprocessing
import os
import platform
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing import connection
from pathlib import Path
from typing import NamedTuple

import checks
import lanes
import ngrams
import steps
import torch
import whole
from common import VOCAB_SIZE, Job, Options, Skip, record_names, synthetic_stream
from helpers import write_shard
from projection import projection

from train_gpt import peak_flops

TOGETHER = 5  # parts that prepare at the same time, at most


class Part(NamedTuple):
    """A generator function: it prepares, yields once if it wants the device alone, measures."""

    function: Callable
    box: int  # seconds for each of the two
    memory: int  # GB of the device, at most


def all_parts():
    """Name -> Part, in the order in which they run: first what we most need to know."""

    def step(memory, **how):
        return Part(functools.partial(steps.step, **how), 170, memory)

    records = {f"step:{name}": step(36, record=name) for name in record_names() if name != "own"}
    return {
        "script": Part(whole.script, 190, 8),
        "step:own": step(44, profiled=True, loop_from=0.0),
        "lanes": Part(lanes.lanes, 170, 10),
        "step:unlooped": step(30, name="unlooped", loop_layers=""),
        "step:across": step(30, name="across", loop_layers="", doc_attention=False),
        "step:fp32": step(36, record="pr993", name="fp32", fp32_stream=True),
        "warmup": Part(whole.warmup, 170, 30),
        "proof": Part(lanes.proof, 150, 54),
        "counts": Part(ngrams.counts, 120, 14),
        "step:xsa4": step(26, record="pr993", name="xsa4", xsa_last_n=4),
        "step:fa3": step(26, record="pr993", name="fa3", attn_impl="fa3", profiled=True),
        "ranks": Part(checks.ranks, 60, 4),
        "step:fa4": step(26, record="pr993", name="fa4", attn_impl="fa4", profiled=True),
        "resume": Part(checks.resume, 60, 3),
        "parity": Part(checks.parity, 60, 3),
        "windows": Part(lanes.windows, 90, 10),
        **records,
    }


# -----------------------------------------------------------------------------
# A part's process


def work(name, options, pipe):
    """Run one part; its rows, its wish for the device and its end go through the pipe."""
    part, said = all_parts()[name], io.StringIO()
    box = part.box * options.patience
    job = Job(name.partition(":")[0], options, lambda row: pipe.send(("row", row)), box)
    warnings.filterwarnings("ignore", message=".*TensorFloat32.*")
    try:
        with contextlib.redirect_stdout(said):
            set_up(job)
            for _ in part.function(job):
                give_memory_back(job)
                pipe.send(("ready", None))
                pipe.recv()
    except Skip as reason:
        job.row(name.partition(":")[2] or name, str(reason), "SKIP")
    except Exception as error:
        text = f"{type(error).__name__}: {error}".strip().splitlines()[0][:300]
        trace = traceback.format_exc() + said.getvalue()[-2000:]
        job.row(name.partition(":")[2] or name, text, "FAIL", traceback=trace)
    pipe.send(("end", None))


def set_up(job):
    """What Runtime.start does, without a run folder."""
    torch.manual_seed(0)
    if job.cuda:
        torch.cuda.set_device(0)
        if job.part != "parity":  # whose fp32 is a reference
            torch.set_float32_matmul_precision("high")
    else:
        torch.set_num_threads(1)


def give_memory_back(job):
    if job.cuda:
        torch.cuda.synchronize()
        gc.collect()
        torch.cuda.empty_cache()


# -----------------------------------------------------------------------------
# The parent: time boxes and the table


class Table:
    """Rows, printed as they come and kept in a JSON file."""

    def __init__(self, path, machine):
        self.path, self.machine, self.rows, self.began = path, machine, [], time.monotonic()
        path.parent.mkdir(parents=True, exist_ok=True)
        print(f"{'s':>4}  {'part':<8} {'item':<22} {'':<5} result", flush=True)

    def add(self, row):
        row = dict(row, at=round(time.monotonic() - self.began, 1))
        self.rows.append(row)
        place = f"{row['at']:>4.0f}  {row['part']:<8} {row['item']:<22} {row['status']:<5}"
        print(place, row["text"], flush=True)
        text = json.dumps(dict(machine=self.machine, rows=self.rows), indent=1, default=str)
        partial = self.path.with_name(f".{self.path.name}.partial")
        partial.write_text(text + "\n", encoding="utf-8")
        os.replace(partial, self.path)

    def note(self, name, status, text):
        part, _, item = name.partition(":")
        self.add(dict(part=part, item=item or part, status=status, text=text, values={}))

    def value(self, part, key, item=None):
        """A value of the first row of a part, and of this item, that has it; None without one."""
        for row in self.rows:
            if row["part"] == part and key in row["values"] and item in (None, row["item"]):
                return row["values"][key]
        return None

    def count(self, status):
        return sum(row["status"] == status for row in self.rows)


class Worker:
    """A part in its process, seen from the parent."""

    def __init__(self, name, options, table, start):
        context = multiprocessing.get_context(start)
        self.table, self.name, self.overall = table, name, options.deadline
        self.box = all_parts()[name].box * options.patience
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(name, options, theirs))
        self.process.start()
        theirs.close()  # so that a dead process is an end of file
        self.open_box()

    def open_box(self):
        self.deadline = min(time.monotonic() + self.box, self.overall)

    def hear(self):
        """Take what the part says next -> "row", "ready" or "end"."""
        try:
            kind, row = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join(5)
            self.stop("FAIL", f"its process died, exit code {self.process.exitcode}")
            return "end"
        if kind == "row":
            self.table.add(row)
        elif kind == "end":
            self.stop()
        return kind

    def give_up(self):
        over = self.deadline == self.overall
        which = "limit" if over else f"{self.box:.0f} s box"
        self.stop("SKIP" if over else "FAIL", f"time is over ({which})")

    def stop(self, status="", why=""):
        """End the process; with a status, say why it had to."""
        if status:
            self.table.note(self.name, status, why)
            self.process.kill()
        self.process.join(30)
        self.pipe.close()

    def measure(self):
        """The device is this part's alone."""
        self.open_box()
        with contextlib.suppress(OSError):  # hear() tells of a dead process
            self.pipe.send("go")
        listen([self])


def listen(workers):
    """Until each has ended, or is ready for the device -> those that are."""
    busy, ready = list(workers), []
    while busy:
        spare = min(worker.deadline for worker in busy) - time.monotonic()
        spoken = connection.wait([worker.pipe for worker in busy], max(0.0, spare))
        for worker in list(busy):
            if worker.pipe in spoken:
                kind = worker.hear()
                ready += [worker] if kind == "ready" else []
                if kind == "row":
                    continue
            elif time.monotonic() < worker.deadline:
                continue
            else:
                worker.give_up()
            busy.remove(worker)
    return [worker for worker in workers if worker in ready]


def groups(names, memory):
    """Split names, in order, into lists of parts that may prepare together."""
    parts, group = all_parts(), []
    for name in names:
        together = sum(parts[n].memory for n in [*group, name])
        if group and (together > memory or len(group) == TOGETHER):
            yield group
            group = []
        group.append(name)
    if group:
        yield group


def run_parts(names, options, table, memory):
    cores = len(os.sched_getaffinity(0))
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(max(2, cores // TOGETHER)))
    start = "spawn" if options.device == "cuda" else "fork"  # CUDA does not survive a fork
    for group in groups(names, memory):
        if time.monotonic() > options.deadline - 15:
            for name in group:
                table.note(name, "SKIP", f"no time left; run --parts {name}")
            continue
        for worker in listen([Worker(name, options, table, start) for name in group]):
            worker.measure()


# -----------------------------------------------------------------------------
# The command


def machine(device):
    where = dict(device=device, python=platform.python_version(), torch=torch.__version__)
    where |= dict(cores=len(os.sched_getaffinity(0)), load_before=os.getloadavg()[0])
    if device == "cuda":
        found = torch.cuda.get_device_properties(0)
        where |= dict(name=found.name, memory_gb=found.total_memory / 1e9, cuda=torch.version.cuda)
        where |= dict(capability=f"{found.major}.{found.minor}", peak_flops=peak_flops(found.name))
    return where


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--quick", action="store_true", help="small shapes, for a look on a CPU")
    parser.add_argument("--parts", help="names, or their beginnings, with commas")
    parser.add_argument("--limit", type=float, default=350.0, help="seconds for everything")
    parser.add_argument("--patience", type=float, default=1.0, help="times the boxes of parts")
    default = Path(os.environ.get("OUT", ".")) / "gpu.json"
    parser.add_argument("--out", type=Path, default=default, help="JSON file")
    args = parser.parse_args()
    if args.device != "cpu" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; fix: --device cpu --quick")
    if args.device == "cpu" and not args.quick:
        parser.error("--device cpu: the sizes are a GPU's; fix: --device cpu --quick")
    args.device = "cpu" if args.device == "cpu" else "cuda"
    args.names = list(all_parts())
    if args.parts:
        wanted = tuple(args.parts.split(","))
        args.names = [name for name in args.names if name.startswith(wanted)]
    if not args.names:
        parser.error(f"--parts {args.parts!r}: fix: some of {', '.join(all_parts())}")
    return args


def prepare(options):
    """The streams to train on, as shards."""
    tokens = synthetic_stream(options.sizes.shard, VOCAB_SIZE)
    write_shard(options.folder / "stream_train_000000.bin", tokens)
    write_shard(options.folder / "small_train_000000.bin", synthetic_stream(20_000, 256))


def main():
    args, began = arguments(), time.monotonic()
    where = machine(args.device)
    print(" ".join(f"{name}:{value}" for name, value in where.items()))
    table = Table(args.out, where)
    with tempfile.TemporaryDirectory() as folder:
        deadline = began + args.limit
        options = Options(args.device, args.quick, Path(folder), deadline, args.patience)
        prepare(options)
        run_parts(args.names, options, table, where.get("memory_gb", 1e9) - 6)
    projection(table, None if args.quick else where.get("peak_flops"))
    for row in table.rows:
        if trace := row["values"].get("traceback"):
            print(f"\n{row['part']} {row['item']}:\n{trace}")
    failed, spent = table.count("FAIL"), time.monotonic() - began
    counted = f"{table.count('PASS')} PASS, {failed} FAIL, {table.count('SKIP')} SKIP"
    print(f"\n{counted} in {spent:.0f} s; {args.out}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
