"""Compare everything that small runs of the working tree compute with the same runs of a commit.

    python tests/stress/golden.py --against REV                     # exit status 1: it differs
    python tests/stress/golden.py --against REV --only tiny_1337,pr993
    python tests/stress/golden.py --against REV --save values.json  # keep the expected values
    python tests/stress/golden.py --expected values.json            # and use them later

For changes that promise to change no result: each row starts scripts as processes and reads only
what they print and the files of their run folders. The expected values are those of REV on this
machine, from a temporary worktree; they are kept in the user's cache for the next time (--fresh:
not used). The working tree is copied first, so it may be edited meanwhile. Every run has one thread
on one core, two runs go side by side. All rows take about three minutes on two idle cores.
"""

import argparse
import concurrent.futures
import contextlib
import difflib
import hashlib
import importlib.metadata
import json
import lzma
import os
import platform
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent

# -----------------------------------------------------------------------------
# What is not compared, by name, wherever it stands; that it is there is compared all the same.

CLOCK = "seconds, or a rate"
CODE = "size or sha256 of the code, which is what changes"
PLACE = "a path of this machine"
PACKAGE = "whether an optional package is installed"
IGNORED = {
    "train_time_ms": CLOCK,
    "step_avg_ms": CLOCK,
    "tokens_per_s": CLOCK,
    "sliding_tokens_per_s": CLOCK,
    "eta": CLOCK,
    "mfu": CLOCK,
    "seconds": CLOCK,
    "train_seconds": CLOCK,
    "eval_seconds": CLOCK,
    "wallclock_seconds": CLOCK,
    "eval_time_seconds": CLOCK,
    "date": CLOCK,
    "peak_memory_mb": "depends on the machine's load",
    "code": CODE,
    "packed": CODE,
    "total": CODE,
    "bytes_code": CODE,
    "bytes_total": CODE,
    "DATA_PATH": PLACE,
    "TOKENIZER_PATH": PLACE,
    "sentencepiece": PACKAGE,
    "zstandard": PACKAGE,
    "numba": PACKAGE,
    "constriction": PACKAGE,
    "matplotlib": PACKAGE,
}
# Sets of settings: the order of their names means nothing. Everywhere else it is compared.
UNORDERED = {"config", "scoring", "printed"}  # "config": the log's line, and config.env

# -----------------------------------------------------------------------------
# The rows

Settings = dict[str, str]
Values = dict[str, Any]  # what a row found, as JSON


@dataclass(frozen=True)
class Row:
    """What is run and what is special about it."""

    name: str
    settings: Settings = field(default_factory=dict)
    kind: str = "run"
    ranks: int = 1
    needs: str = ""  # a row that must have ended
    alive: tuple[str, ...] = ()  # line.field that must not be 0, or the row tests nothing
    same_as: str = ""  # a row of the same tree whose values must be equal
    unlike: tuple[str, ...] = ()  # more names that are not compared


DATASET = "../data/prose"  # from a row's folder
DOCUMENT_CHARACTERS = 800
DOCUMENTS = 500
PREPARE = ("--vocab-size", "1024", "--val-fraction", "0.08", "--name", "prose")
TINY = {
    "RECORD": "tiny",
    "ITERATIONS": "40",
    "WARMDOWN_ITERS": "30",
    "TRAIN_BATCH_TOKENS": "1024",
    "TRAIN_SEQ_LEN": "128",
    "MUON_MOMENTUM_WARMUP_STEPS": "30",
    "TRAIN_LOG_EVERY": "1",
    "SWA_EVERY": "2",
    "LATE_QAT": "1",
    "QAT_EVERY": "2",
    "SCORER": "documents",
    "EVAL_LANES": "32",
    "CODEC_TOKENS": "10000",
    "CODEC_MINUTES": "0",
    "SAVE_SCORES": "1",
}
# A RECORD, four layers deep and narrow, at rates that make 40 steps change every matrix.
SHRUNK = {
    "ITERATIONS": "40",
    "MAX_WALLCLOCK_SECONDS": "0",
    "WARMUP_STEPS": "1",
    "WARMDOWN_ITERS": "30",
    "TRAIN_BATCH_TOKENS": "1024",
    "TRAIN_SEQ_LEN": "64",
    "ROPE_TRAIN_SEQ_LEN": "32",
    "NUM_LAYERS": "4",
    "MODEL_DIM": "64",
    "NUM_HEADS": "4",
    "NUM_KV_HEADS": "2",
    "BIGRAM_VOCAB_SIZE": "256",
    "BIGRAM_DIM": "16",
    "MATRIX_LR": "0.1",
    "MUON_MOMENTUM_WARMUP_STEPS": "30",
    "EMA_DECAY": "0.9",
    "SWA_EVERY": "2",
    "QAT_EVERY": "2",
    "VAL_LOSS_EVERY": "25",
    "TRAIN_LOG_EVERY": "1",
    "EVAL_STRIDE": "16",
    "SAVE_SCORES": "1",
}
PSEUDO = {"NGRAM_BUCKETS": "65536", "NGRAM_CHUNK_TOKENS": "256"}  # of 1,500 targets a cache
VALUE_EMBEDDING = {"VE_DIM": "16", "VE_LAYERS": "2,3"}
LATE = ("late_qat:enabled.scale", "averages.swa_snapshots")
FIVE = (*LATE, "final_ngram_pseudo.pseudo_bpb", "averaged.val_loss")
PRUNED_BYTES = 147_000  # of an artifact of 149,000; TARGET_MB counts the code as well


def shrunk(name: str, *parts: Settings, alive: tuple[str, ...] = FIVE, **more: str) -> Row:
    """The row of a RECORD."""
    settings = SHRUNK | {"RECORD": name}
    for part in parts:
        settings |= part
    return Row(name, settings | more, needs="data", alive=alive)


def dry(record: str) -> Row:
    """What a RECORD resolves to, in full size."""
    settings = {"DRY_RUN": "1"} | ({"RECORD": record} if record else {})
    return Row(f"dry_{record or 'default'}", settings, kind="dry")


# A row stands behind the one that it needs.
ROWS = (
    Row("data", kind="data"),
    *map(dry, ("tiny", "own", "pr864", "pr810", "pr1026", "pr993", "pr808", "")),
    Row("tiny_1337", TINY, needs="data", alive=(*LATE, "final_codec.coded_bytes")),
    Row("sample", kind="sample"),
    Row("tiny_two_ranks", TINY, ranks=2, needs="data", alive=LATE),
    Row("tiny_42", TINY | {"SEED": "42"}, needs="data", alive=LATE),
    Row(
        "tiny_resumed",
        TINY | {"CHECKPOINT_EVERY": "8", "RESUME": "auto"},
        kind="resumed",
        needs="tiny_1337",
        alive=LATE,
        same_as="tiny_1337",
        unlike=("CHECKPOINT_EVERY", "RESUME", "files"),
    ),
    shrunk(
        "own",
        XSA_LAST_N="4",
        LOOP_LAYERS="1-2",
        PARALLEL_FROM="2",
        WARMDOWN_SHARE="0.72",
        BIGRAM_VOCAB_SIZE="0",
        EVAL_LANES="24",
        CODEC_TOKENS="4000",
        CODEC_MINUTES="0",
        alive=("loops:enabled.step", "averages.swa_snapshots", "final_codec.coded_bytes"),
    ),
    shrunk("pr864", PSEUDO, XSA_LAST_N="2", GRAD_ACCUM_STEPS="2"),
    shrunk(
        "pr810",
        PSEUDO,
        XSA_LAST_N="2",
        PRE_ENRICH_DIM="96",
        ROPE_TRAIN_SEQ_LEN="64",
        alive=("averages.swa_snapshots", "final_ngram_pseudo.pseudo_bpb"),
    ),
    shrunk(
        "pr1026",
        PSEUDO,
        VALUE_EMBEDDING,
        XSA_LAST_N="2",
        POLYGLU_ENABLED="1",
        TTT_ENABLED="1",
        TTT_CHUNK_TOKENS="4096",
        TTT_EPOCHS="1",
        TTT_BATCH_SEQS="8",
        alive=(*FIVE, "final_ttt_exact.val_loss"),
    ),
    Row(
        "pr993",
        SHRUNK | PSEUDO | VALUE_EMBEDDING | {"RECORD": "pr993", "XSA_LAST_N": "4"},
        kind="pruned",
        needs="data",
        alive=(*FIVE, "prune.pruned"),
        unlike=("TARGET_MB",),
    ),
    shrunk(
        "pr808",
        PSEUDO,
        VALUE_EMBEDDING,
        XSA_LAST_N="2",
        DEPTH_RECURRENCE="1,2",
        TTT_ENABLED="1",
        TTT_CHUNK_TOKENS="4096",
        TTT_EPOCHS="1",
        TTT_BATCH_SEQS="8",
        TTT_LORA_RANK="2",
        alive=(*FIVE, "final_ttt_exact.val_loss"),
    ),
    Row(
        "eval_only",
        {
            "RECORD": "tiny",
            "EVAL_ONLY": "../tiny_1337/runs/golden/artifact.bin",
            "SCORER": "sliding",
            "CODEC_TOKENS": "0",
            "NGRAM_MIXER": "cascade",
        },
        needs="tiny_1337",
    ),
    Row("decode", {"DECODE": "../tiny_1337/runs/golden"}, kind="decode", needs="tiny_1337"),
)
BY_NAME = {row.name: row for row in ROWS}
RUN_ID = "golden"

# -----------------------------------------------------------------------------
# Processes

KEPT = "PATH HOME LANG LC_ALL TMPDIR VIRTUAL_ENV LD_LIBRARY_PATH SYSTEMROOT".split()
ONE_THREAD = "OMP_NUM_THREADS OPENBLAS_NUM_THREADS MKL_NUM_THREADS NUMBA_NUM_THREADS".split()
TIMEOUT = 600  # seconds of a process
GRACE = 10  # seconds between SIGTERM and SIGKILL
STOP_AT = "\nstep:20/"  # where a run is interrupted
POLL = 0.01  # seconds
TAIL = 2500  # characters of a failed process's output


class RowError(Exception):
    """A row that could not be run."""


class Processes:
    """Those that are alive, and the cores that they may use."""

    def __init__(self) -> None:
        affinity = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
        self.cores: queue.Queue[int] = queue.Queue()
        for core in sorted(affinity(0))[:2]:
            self.cores.put(core)
        self.count = self.cores.qsize()
        self.turn = threading.Lock()
        self.alive: set[subprocess.Popen] = set()
        self.ended = False

    @contextlib.contextmanager
    def pinned(self, ranks: int) -> Iterator[None]:
        """A core for each rank, as far as there are any; processes that this thread starts inherit
        them."""
        with self.turn:
            mine = [self.cores.get() for _ in range(min(ranks, self.count))]
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, mine)
        try:
            yield
        finally:
            for core in mine:
                self.cores.put(core)

    def start(self, command: list[str], env: Settings, cwd: Path, out: Path) -> subprocess.Popen:
        """A process in a session of its own, with its output in a file."""
        if self.ended:
            raise RowError("interrupted")
        kept = {name: os.environ[name] for name in KEPT if name in os.environ}
        threads = dict.fromkeys(ONE_THREAD, "1")
        fixed = {"PYTHONDONTWRITEBYTECODE": "1", "CUDA_VISIBLE_DEVICES": ""}
        with open(out, "wb") as file:
            process = subprocess.Popen(
                command,
                cwd=cwd,
                env=kept | threads | fixed | env,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.alive.add(process)
        if self.ended:  # meanwhile
            stop(process)
        return process

    def wait(self, process: subprocess.Popen, out: Path, status: int = 0) -> str:
        """-> its output; RowError if it does not end with this status."""
        try:
            process.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            stop(process)
            raise RowError(f"not ended after {TIMEOUT} s\n{tail(out)}") from None
        finally:
            self.alive.discard(process)
        if process.returncode != status:
            raise RowError(f"exit status {process.returncode}, not {status}\n{tail(out)}")
        return out.read_text(encoding="utf-8", errors="replace")

    def stop_all(self) -> None:
        """No process outlives this one."""
        self.ended = True
        for process in tuple(self.alive):
            stop(process)


def stop(process: subprocess.Popen) -> None:
    """End it and what it started: torchrun ends its ranks on SIGTERM."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)


def tail(out: Path) -> str:
    """The end of an output."""
    return out.read_text(encoding="utf-8", errors="replace")[-TAIL:]


# -----------------------------------------------------------------------------
# What a run left behind, as JSON

ARTIFACT_PREFIX = 12  # bytes: magic, version
STREAM_PREFIX = 9
DIGEST_BYTES = 32
COLUMNS = ("blocks.npz", "scores.npz", "scores_ema.npz")


def sha(data: bytes) -> str:
    """-> hexadecimal digest"""
    return hashlib.sha256(data).hexdigest()


def unseal(data: bytes, prefix: int) -> tuple[Values, bytes]:
    """Prefix, length of the JSON header, header, payload, sha256 of all that -> header, payload"""
    if hashlib.sha256(data[:-DIGEST_BYTES]).digest() != data[-DIGEST_BYTES:]:
        raise RowError("a container's own sha256 does not fit")
    start = prefix + 4
    end = start + int.from_bytes(data[prefix:start], "little")
    return json.loads(data[start:end]), data[end:-DIGEST_BYTES]


def artifact_values(data: bytes) -> Values:
    """Of artifact.bin"""
    header, payload = unseal(data, ARTIFACT_PREFIX)
    return {
        "prefix": data[:ARTIFACT_PREFIX].hex(),
        "header": header,
        "payload": sha(payload),
        "payload_bytes": len(payload),
    }


def stream_values(data: bytes) -> Values:
    """Of stream.bin, without what depends on the code"""
    header, words = unseal(data, STREAM_PREFIX)
    kept = {name: header[name] for name in ("shape", "text", "scoring")}
    return kept | {
        "prefix": data[:STREAM_PREFIX].hex(),
        "words": sha(words),
        "words_bytes": len(words),
    }


def array_values(array: np.ndarray) -> str:
    """Type, shape and contents"""
    return f"{array.dtype.str}{list(array.shape)} {sha(array.tobytes())}"


def column_values(path: Path) -> Values:
    """Of the arrays of an .npz"""
    with np.load(path) as columns:
        return {name: array_values(columns[name]) for name in columns.files}


def metric_lines(path: Path) -> list[Values]:
    """Of metrics.jsonl"""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def environment(path: Path) -> Settings:
    """Of config.env"""
    lines = path.read_text(encoding="utf-8").splitlines()
    pairs = (line.partition("=") for line in lines if line and not line.startswith("#"))
    return {name: value for name, _, value in pairs}


def folder_values(folder: Path) -> Values:
    """Of a finished run folder"""
    values: Values = {
        "metrics": metric_lines(folder / "metrics.jsonl"),
        "artifact": artifact_values((folder / "artifact.bin").read_bytes()),
        "config": environment(folder / "config.env"),
        "submission": json.loads((folder / "submission.json").read_text(encoding="utf-8")),
        "files": sorted(path.name for path in folder.iterdir()),
    }
    if (folder / "stream.bin").exists():
        values["stream"] = stream_values((folder / "stream.bin").read_bytes())
    for name in COLUMNS:
        if (folder / name).exists():
            values[name] = column_values(folder / name)
    return values


def printed_values(text: str) -> dict[str, list[Values]]:
    """Lines `key:value name:x name:x` -> {key: [{name: x}, ...]}, the key's value by name ''"""
    found: dict[str, list[Values]] = {}
    for line in filter(None, text.splitlines()):
        first, *words = line.split(" ")
        key, _, value = first.partition(":")
        values = {"": value}
        name = ""
        for word in words:
            if ":" in word:
                name, _, value = word.partition(":")
                values[name] = value
            else:
                values[name] += f" {word}"
        found.setdefault(key, []).append(values)
    return found


def without_second_start(lines: list[Values]) -> list[Values]:
    """The lines of a resumed run without those that only its second start wrote."""
    keys = [line["key"] for line in lines]
    if keys.count("resumed") != 1 or keys.count("config") != 2:
        raise RowError("the run was not stopped and resumed once")
    resumed = keys.index("resumed")
    if not 0 < lines[resumed]["step"] < max(step_numbers(lines)):
        raise RowError(f"the run was resumed at step {lines[resumed]['step']}")
    again = resumed + 1 + (keys[resumed + 1] == "overlap")
    return lines[: keys.index("config", 1)] + lines[again:]


def step_numbers(lines: list[Values]) -> list[int]:
    """Of the step lines"""
    return [int(line["value"].partition("/")[0]) for line in lines if line["key"] == "step"]


def require_alive(row: Row, values: Values) -> None:
    """RowError where a technique that the row is there for did nothing."""
    for name in row.alive:
        key, _, part = name.rpartition(".")
        if not any(line.get(part) for line in values["metrics"] if line["key"] == key):
            raise RowError(f"{name} is 0 or missing: the row does not test it any more")


# -----------------------------------------------------------------------------
# The kinds of rows


@dataclass
class Side:
    """A source tree, and the folder in which its runs lie, one folder a row."""

    label: str
    tree: Path
    work: Path
    processes: Processes

    def script(self, row: Row, more: Settings | None = None, status: int = 0) -> str:
        """Run train_gpt.py -> its output"""
        process, out = self.launch(row, more or {})
        return self.processes.wait(process, out, status)

    def launch(self, row: Row, more: Settings) -> tuple[subprocess.Popen, Path]:
        """Start train_gpt.py -> the process, the file with its output"""
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={row.ranks}"]
        command = [sys.executable, *(torchrun if row.ranks > 1 else [])]
        env = {"DEVICE": "cpu"} | row.settings | more
        return self.start(row, [*command, str(self.tree / "train_gpt.py")], env)

    def start(self, row: Row, command: list[str], env: Settings) -> tuple[subprocess.Popen, Path]:
        """In the row's folder"""
        cwd = self.work / row.name
        cwd.mkdir(parents=True, exist_ok=True)
        out = cwd / "output.txt"
        return self.processes.start(command, env, cwd, out), out

    def tool(self, row: Row, names: str, arguments: list[str]) -> str:
        """Run the program of data/ that has one of these names -> its output"""
        found = [self.tree / "data" / name for name in names.split()]
        found = [path for path in found if path.exists()]
        if len(found) != 1:
            raise RowError(f"{len(found)} of data/: {names}")
        command = [sys.executable, str(found[0]), *arguments]
        return self.processes.wait(*self.start(row, command, {}))

    def folder(self, row: Row) -> Path:
        """Of the row's run"""
        return self.work / row.name / "runs" / RUN_ID


def run_whole(side: Side, row: Row, more: Settings | None = None) -> Values:
    """A run from its first step to its last line"""
    side.script(row, {"DATA_PATH": DATASET, "RUN_ID": RUN_ID} | (more or {}))
    return folder_values(side.folder(row))


def run_pruned(side: Side, row: Row) -> Values:
    """The same with a TARGET_MB that leaves these bytes, whatever the size of the code: packed,
    where that is what counts."""
    how = "len(t.pack_script(t.SCRIPT)) if hasattr(t, 'pack_script') else t.CODE.stat().st_size"
    command = [sys.executable, "-c", f"import train_gpt as t; print({how})"]
    code = int(subprocess.run(command, cwd=side.tree, capture_output=True, check=True).stdout)
    return run_whole(side, row, {"TARGET_MB": repr((code + PRUNED_BYTES) / 2**20)})


def run_resumed(side: Side, row: Row) -> Values:
    """Stopped by a signal in the midst of training, then started again"""
    process, out = side.launch(row, {"DATA_PATH": DATASET, "RUN_ID": RUN_ID})
    until = time.monotonic() + TIMEOUT
    while process.poll() is None and time.monotonic() < until:
        if STOP_AT in out.read_text(encoding="utf-8", errors="replace"):
            process.send_signal(signal.SIGTERM)
            break
        time.sleep(POLL)
    side.processes.wait(process, out, 128 + signal.SIGTERM)
    values = run_whole(side, row)
    return values | {"metrics": without_second_start(values["metrics"])}


def run_dry(side: Side, row: Row) -> Values:
    """DRY_RUN=1"""
    return {"printed": printed_values(side.script(row).replace(str(side.tree), "TREE"))}


def run_decode(side: Side, row: Row) -> Values:
    """DECODE of a run folder"""
    text = side.script(row)
    path = side.work / row.name / row.settings["DECODE"] / "decoded.npy"
    return {"printed": printed_values(text), "decoded": array_values(np.load(path))}


def run_data(side: Side, row: Row) -> Values:
    """The other rows' dataset, of the embedded text, by prepare_text.py"""
    source = side.work / row.name / "prose.jsonl"
    source.parent.mkdir(parents=True, exist_ok=True)
    write_documents(side.tree, source)
    out = source.with_name("prose")
    side.tool(row, "prepare_text.py", ["--input", str(source), "--out", str(out), *PREPARE])
    return file_values(out)


def run_sample(side: Side, row: Row) -> Values:
    """The dataset of the first run, by sample/prepare.py, once prepare_sample.py"""
    out = side.work / row.name / "sample_en"
    side.tool(row, "sample/prepare.py prepare_sample.py", ["--out", str(out)])
    return file_values(out)


def write_documents(tree: Path, path: Path) -> None:
    """Short documents, in equal shares of long ones of the embedded text"""
    (sample,) = sorted((tree / "data").rglob("sample_en.jsonl.xz"))
    with lzma.open(sample, "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    size = DOCUMENT_CHARACTERS
    long = [text for text in texts if len(text) >= 2 * size][:DOCUMENTS]
    starts = range(0, len(max(long, key=len)), size)
    pieces = [text[a : a + size].strip() for a in starts for text in long if len(text) >= a + size]
    documents = (json.dumps({"text": piece}) + "\n" for piece in pieces[:DOCUMENTS])
    path.write_text("".join(documents), encoding="utf-8")


def file_values(folder: Path) -> Values:
    """sha256 of each file"""
    return {path.name: sha(path.read_bytes()) for path in sorted(folder.iterdir())}


KINDS: dict[str, Callable[[Side, Row], Values]] = {
    "run": run_whole,
    "pruned": run_pruned,
    "resumed": run_resumed,
    "dry": run_dry,
    "decode": run_decode,
    "data": run_data,
    "sample": run_sample,
}


def run_row(side: Side, row: Row, needed: concurrent.futures.Future | None) -> Values:
    """-> what it found, or {"failed": why}; prints a line"""
    began = time.monotonic()
    try:
        if needed and "failed" in needed.result():
            raise RowError(f"{row.needs} failed")
        with side.processes.pinned(row.ranks):
            began = time.monotonic()
            values = KINDS[row.kind](side, row)
        require_alive(row, values)
    except Exception as error:  # a changed script may leave anything behind
        values = {"failed": f"{type(error).__name__}: {error}"}
    state = "FAILED" if "failed" in values else "done"
    print(f"{side.label} {row.name}: {state} in {time.monotonic() - began:.1f} s", flush=True)
    return values


def run_rows(side: Side, names: list[str]) -> dict[str, Values]:
    """Two at a time -> values by row, those of rows that these need included"""
    pool = concurrent.futures.ThreadPoolExecutor(side.processes.count)
    futures: dict[str, concurrent.futures.Future] = {}
    try:
        for row in ROWS:
            if row.name in names:
                needed = futures.get(row.needs)
                futures[row.name] = pool.submit(run_row, side, row, needed)
        return {name: future.result() for name, future in futures.items()}
    finally:
        side.processes.stop_all()
        pool.shutdown(cancel_futures=True)


def with_needed(names: list[str]) -> list[str]:
    """Those, and what they need, in the order of the table"""
    wanted = set(names)
    for row in reversed(ROWS):
        if row.name in wanted:
            wanted |= {row.needs, row.same_as} - {""}
    return [row.name for row in ROWS if row.name in wanted]


# -----------------------------------------------------------------------------
# Comparing

MISSING = "(missing)"
ADDED = "(not expected)"


@dataclass(frozen=True)
class Difference:
    """A place where two rows differ."""

    where: str
    expected: Any
    found: Any


def differences(expected: Values, found: Values, unlike: tuple[str, ...] = ()) -> list[Difference]:
    """Of what a row gave and what it should give"""
    if "failed" in found or "failed" in expected:
        state = [values.get("failed", "ran") for values in (expected, found)]
        return [Difference("the run", *state)]
    return list(compare("", expected, found, frozenset(IGNORED) | frozenset(unlike)))


def compare(where: str, expected: Any, found: Any, ignored: frozenset[str]) -> Iterator[Difference]:
    """Values that came from JSON; 1 and 1.0 and True are different"""
    if type(expected) is not type(found):
        yield Difference(where, expected, found)
    elif isinstance(expected, dict):
        yield from compare_names(where, expected, found, ignored)
    elif isinstance(expected, list) and are_lines(expected) and are_lines(found):
        yield from compare_lines(where, expected, found, ignored)
    elif isinstance(expected, list) and len(expected) == len(found):
        for i, pair in enumerate(zip(expected, found, strict=True)):
            yield from compare(f"{where}[{i}]", *pair, ignored)
    elif not equal(expected, found):
        yield Difference(where, expected, found)


def equal(expected: Any, found: Any) -> bool:
    """To the last bit; NaN equals NaN"""
    return repr(expected) == repr(found)


def compare_names(
    where: str, expected: Values, found: Values, ignored: frozenset[str]
) -> Iterator[Difference]:
    """Two dicts, of which `ignored` names have any value"""
    key = expected.get("key", "")
    for name in [*expected, *(name for name in found if name not in expected)]:
        place = f"{where}.{name}" if where else name
        if name not in found:
            yield Difference(place, expected[name], MISSING)
        elif name not in expected:
            yield Difference(place, ADDED, found[name])
        elif name not in ignored and not (name == "value" and key in ignored):
            yield from compare(place, expected[name], found[name], ignored)
    unordered = key in UNORDERED or not UNORDERED.isdisjoint(where.split("."))
    if not unordered and expected.keys() == found.keys() and [*expected] != [*found]:
        yield Difference(f"{where} (order)", [*expected], [*found])


def are_lines(values: list[Any]) -> bool:
    """Whether these are log lines"""
    return bool(values) and all(isinstance(line, dict) and "key" in line for line in values)


def compare_lines(
    where: str, expected: list[Values], found: list[Values], ignored: frozenset[str]
) -> Iterator[Difference]:
    """Log lines, matched by key and value, so that one that is missing is one difference"""
    names = tuple(f"setting:{name}=" for name in ignored)
    expected = [line for line in expected if not label(line).startswith(names)]
    found = [line for line in found if not label(line).startswith(names)]
    labels = [[label(line) for line in lines] for lines in (expected, found)]
    matcher = difflib.SequenceMatcher(None, *labels, autojunk=False)
    for kind, a, b, c, d in matcher.get_opcodes():
        keys = [[line["key"] for line in lines] for lines in (expected[a:b], found[c:d])]
        if kind == "equal" or keys[0] == keys[1]:
            for i, pair in enumerate(zip(expected[a:b], found[c:d], strict=True), a):
                yield from compare(f"{where}[{labels[0][i]}]", *pair, ignored)
            continue
        for line in expected[a:b]:
            yield Difference(f"{where}[{label(line)}]", line, MISSING)
        for line in found[c:d]:
            yield Difference(f"{where}[{label(line)}]", ADDED, line)


def label(line: Values) -> str:
    """key or key:value"""
    value = line.get("value")
    return line["key"] if value is None else f"{line['key']}:{value}"


def compare_rows(
    names: list[str], expected: dict[str, Values], found: dict[str, Values]
) -> dict[str, list[Difference]]:
    """Row -> its differences, also from the row whose values it must have"""
    result = {}
    for name in names:
        row = BY_NAME[name]
        result[name] = differences(expected[name], found[name], row.unlike)
        if row.same_as:
            for each in differences(found[row.same_as], found[name], row.unlike):
                where = f"{each.where} (expected: as in {row.same_as})"
                result[name].append(Difference(where, each.expected, each.found))
    return result


# -----------------------------------------------------------------------------
# The table

SHOWN = 12  # differences of a row
WIDTH = 70  # characters of a value


def shorten(value: Any) -> str:
    """In one line"""
    text = value if isinstance(value, str) else json.dumps(value)
    text = " ".join(text.split())
    return text if len(text) <= WIDTH else f"{text[: WIDTH - 3]}..."


def print_table(result: dict[str, list[Difference]]) -> None:
    """A line a difference; the output of what failed in full"""
    for name, found in result.items():
        for each in found[:SHOWN]:
            print(f"{name:<15} {each.where}")
            if each.where == "the run":
                print(f"  expected: {each.expected}\n  found:    {each.found}")
            else:
                print(f"  expected: {shorten(each.expected)}\n  found:    {shorten(each.found)}")
        if len(found) > SHOWN:
            print(f"{name:<15} and {len(found) - SHOWN} more")
    bad = {name: len(found) for name, found in result.items() if found}
    print(f"\n{sum(bad.values())} differences in {len(result)} rows", end="")
    print(f": {', '.join(f'{name} {count}' for name, count in bad.items())}" if bad else "")


# -----------------------------------------------------------------------------
# Trees


def git(*arguments: str) -> str:
    """-> its output; exits where git refuses"""
    done = subprocess.run(["git", "-C", str(HERE), *arguments], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"git {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def copy_working_tree(to: Path) -> Path:
    """What git knows or would add, as it is now"""
    root = Path(git("rev-parse", "--show-toplevel").strip())
    listed = git("-C", str(root), "ls-files", "-coz", "--exclude-standard").split("\0")
    for name in filter(None, listed):
        if (root / name).is_file():  # not removed
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, to / name)
    return to


@contextlib.contextmanager
def worktree(revision: str, at: Path) -> Iterator[Path]:
    """The commit's files, for as long as the block runs"""
    try:
        git("worktree", "add", "--quiet", "--detach", str(at), revision)
        yield at
    finally:
        shutil.rmtree(at, ignore_errors=True)
        git("worktree", "prune")


def run_side(label: str, tree: Path, work: Path, names: list[str]) -> dict[str, Values]:
    """All rows of a tree; says how long they took"""
    began = time.monotonic()
    values = run_rows(Side(label, tree, work, Processes()), names)
    print(f"{label}: {len(values)} rows in {time.monotonic() - began:.0f} s\n", flush=True)
    return values


# -----------------------------------------------------------------------------
# Expected values

PACKAGES = ("torch", "numpy", "sentencepiece", "zstandard", "numba", "constriction", "safetensors")


def cpu_model() -> str:
    """Name and instruction sets of this processor"""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        known = dict(line.split("\t: ", 1) for line in lines if "\t: " in line)
        flags = sha(known.get("flags", "").encode())[:8]
        return f"{known.get('model name', platform.machine())} flags {flags}"
    return f"{platform.machine()} {platform.processor()}"


def identity(revision: str) -> Settings:
    """Whatever the expected values can depend on"""
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    text = Path(__file__).read_text(encoding="utf-8")
    rows = text[text.index("# The rows") : text.index("# Comparing")]
    fixed = {"python": platform.python_version(), "cpu": cpu_model(), "rows": sha(rows.encode())}
    return {"revision": revision} | versions | fixed


def cache_path(known: Settings) -> Path:
    """The file for these values, in a folder that can be written to"""
    name = f"{sha(json.dumps(known).encode())[:24]}.json"
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    for folder in (Path(home), Path(tempfile.gettempdir())):
        with contextlib.suppress(OSError):
            (folder / "golden").mkdir(parents=True, exist_ok=True)
            return folder / "golden" / name
    sys.exit("neither the cache folder nor the temporary one can be written to")


def read_values(path: Path) -> tuple[Settings, dict[str, Values]]:
    """-> identity, values by row"""
    stored = json.loads(path.read_text(encoding="utf-8"))
    return stored["identity"], stored["rows"]


def write_values(path: Path, known: Settings, rows: dict[str, Values]) -> None:
    """Whole or not at all"""
    whole = {name: values for name, values in rows.items() if "failed" not in values}
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps({"identity": known, "rows": whole}, indent=1), encoding="utf-8")
    partial.replace(path)


def expected_values(
    options: argparse.Namespace, names: list[str], folder: Path
) -> tuple[Settings, dict[str, Values]]:
    """From a file, the cache, or runs of the commit -> identity, values by row"""
    if options.expected:
        known, rows = read_values(options.expected)
        here = identity(known["revision"])
        if other := [name for name in here if here[name] != known.get(name)]:
            print(f"note: {options.expected} is of another {', '.join(other)}", flush=True)
        if lacking := [name for name in names if name not in rows]:
            sys.exit(f"{options.expected}: no {', '.join(lacking)}")
        return known, rows
    revision = git("rev-parse", "--verify", f"{options.against}^{{commit}}").strip()
    known = identity(revision)
    path = cache_path(known)
    rows = read_values(path)[1] if path.exists() and not options.fresh else {}
    if lacking := with_needed([name for name in names if name not in rows]):
        with worktree(revision, folder / "commit") as tree:
            rows |= run_side("expected", tree, folder / "expected", lacking)
        write_values(path, known, rows)
    return known, rows


def arguments() -> argparse.Namespace:
    """The command line"""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--against", metavar="REV", help="the commit whose values are expected")
    source.add_argument("--expected", metavar="FILE", type=Path, help="or the values, from --save")
    parser.add_argument("--save", metavar="FILE", type=Path, help="write the expected values")
    parser.add_argument("--only", metavar="ROW,...", help=f"of {', '.join(BY_NAME)}")
    parser.add_argument("--fresh", action="store_true", help="run REV although its values are kept")
    options = parser.parse_args()
    options.names = options.only.split(",") if options.only else [*BY_NAME]
    if unknown := set(options.names) - BY_NAME.keys():
        parser.error(f"--only: no row {', '.join(sorted(unknown))}")
    return options


def main() -> int:
    """Exit status: 1 where anything differs"""
    options = arguments()
    for number in (signal.SIGINT, signal.SIGTERM):  # what was started ends, too
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    names = with_needed(options.names)
    with tempfile.TemporaryDirectory(prefix="golden_") as temporary:
        folder = Path(temporary)
        tree = copy_working_tree(folder / "tree")
        known, expected = expected_values(options, names, folder)
        if options.save:
            write_values(options.save, known, expected)
        found = run_side("found", tree, folder / "found", names)
    result = compare_rows(names, expected, found)
    print_table(result)
    return int(any(result.values()))


if __name__ == "__main__":
    sys.exit(main())
