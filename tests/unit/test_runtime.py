"""The runtime: the bar on a terminal, no byte of it elsewhere, the figures of the step lines; log,
run folder, signals; disks that are full; several hosts.

The slow ones, of hosts that are lost: python -m pytest -m slow tests/unit/test_runtime.py
"""

import contextlib
import fcntl
import json
import os
import pty
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
import types
from pathlib import Path

import compress
import numpy as np
import plot
import pytest
import run_folder
import torch
from helpers import (
    ROOT,
    SCRIPT,
    SHRUNK,
    Run,
    clean_environment,
    finished_run,
    launch,
    perturbed,
    random_ids,
    run_here,
    shared_folder,
    tiny,
    train_gpt,
)
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import prepare_text
from train_gpt import OUTPUTS

COLUMNS = 70
# Two stages with log lines between their ticks, the second one left before its end; an error.
WORKER = """
import sys, time
import train_gpt
from helpers import tiny
if "missing" in sys.argv:
  sys.modules["tqdm"] = None
before = {*sys.modules}, sys.stdout, sys.stderr
rt = train_gpt.Runtime(tiny())
for done in range(1, 31):
  rt.tick("train", done, 30)
  time.sleep(0.03)
  if done % 10 == 0:
    rt.log("step", f"{done}/30", train_loss=2.5)
for done in range(5):
  rt.tick("score", done, 9)
  time.sleep(0.06)
  if done == 3:
    rt.log("final_x", val_bpb=1.5)
assert "bar" in sys.argv or before[0] == {*sys.modules}
assert before[1:] == (sys.stdout, sys.stderr)
rt.bar.close()
print("error: it ended", file=sys.stderr)
"""
LOGGED = [*(f"step:{n}/30 train_loss:2.5000" for n in (10, 20, 30)), "final_x val_bpb:1.5"]


def terminal():
    """A pseudo-terminal's two ends, COLUMNS wide."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, COLUMNS, 0, 0))
    return ours, theirs


def read_all(end):
    """What was written to a terminal until its last writer closed it."""
    data = b""
    try:
        while part := os.read(end, 65536):
            data += part
    except OSError:  # how Linux says so
        pass
    os.close(end)
    return data.decode()


def work(out, err, *arguments, **env):
    """Run WORKER; "terminal" or "pipe" each -> what it wrote to (stdout, stderr); one text for a
    terminal that both share."""
    ours, theirs = terminal()
    ends = dict(terminal=theirs, pipe=subprocess.PIPE)
    env = clean_environment() | {"PYTHONPATH": f"{ROOT}:{ROOT}/tests"} | env
    command = [sys.executable, "-c", WORKER, *arguments]
    with subprocess.Popen(command, stdout=ends[out], stderr=ends[err], env=env) as process:
        os.close(theirs)
        shown = read_all(ours)
        texts = [
            shown if part is None else part.decode() for part in process.communicate(timeout=60)
        ]
        assert process.returncode == 0, texts
    return texts


def screen(text):
    """Lines that a person sees in the end: a return overwrites."""
    lines, at = [""], 0
    for character in text.replace("\x1b[A", ""):
        if character == "\n":
            lines.append("")
        at = 0 if character in "\r\n" else at + 1
        if character not in "\r\n":
            lines[-1] = lines[-1][: at - 1].ljust(at - 1) + character + lines[-1][at:]
    return [line.rstrip() for line in lines if line.strip()]


def drawn(text):
    """Stages whose bar was seen."""
    return {line.split(":")[0] for line in text.replace("\n", "\r").split("\r") if "%|" in line}


def test_a_bar_on_a_terminal():
    """Both stages are drawn, and gone in the end; log and error lines are whole."""
    text, _ = work("terminal", "terminal", "bar")
    assert drawn(text) == {"train", "score"}
    assert "\x1b[A" not in text and screen(text) == [*LOGGED, "error: it ended"]
    assert max(map(len, text.replace("\n", "\r").split("\r"))) <= COLUMNS
    assert text.count("\n") == len(LOGGED) + 1


def test_a_bar_while_the_log_goes_to_a_file():
    out, text = work("pipe", "terminal", "bar")
    assert out.splitlines() == LOGGED
    assert drawn(text) == {"train", "score"} and screen(text) == ["error: it ended"]


@pytest.mark.parametrize("out", ["pipe", "terminal"])
def test_no_byte_of_it_in_a_pipe(out):
    shown, err = work(out, "pipe")
    assert err == "error: it ended\n"
    assert shown.replace("\r\n", "\n") == "".join(f"{line}\n" for line in LOGGED)


def test_none_on_other_ranks_and_without_tqdm():
    ranks = dict(RANK="1", LOCAL_RANK="1", WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    text, _ = work("terminal", "terminal", **ranks)
    assert text == "error: it ended\r\n"
    text, _ = work("terminal", "terminal", "missing")
    assert text.split("\r\n") == [*LOGGED, "error: it ended", ""]


# -----------------------------------------------------------------------------
# Bars, by a recorder in tqdm's place


class Bar:
    """Remembers what tqdm would draw."""

    made = []

    def __init__(self, _, desc, total, initial, **look):
        self.desc, self.n, self.total, self.open = desc, initial, total, True
        self.made.append(self)

    def update(self, more):
        assert self.open
        self.n += more

    def close(self):
        self.open = False


@pytest.fixture
def bars(rt, monkeypatch):
    monkeypatch.setattr(Bar, "made", [])
    monkeypatch.setattr(train_gpt, "load_tqdm", lambda: Bar)
    bar = train_gpt.ProgressBar(rt)
    bar.shown = True
    return bar


def test_stages_follow_one_another(bars):
    for stage, done, total in [("train", 3, 9), ("train", 9, 9), ("score", 1, 5), ("score", 4, 5)]:
        bars.tick(stage, done, total)
    assert [(bar.desc, bar.n, bar.total, bar.open) for bar in Bar.made] == [
        ("train", 9, 9, False),
        ("score", 4, 5, True),
    ]
    bars.tick("score", 1, 7)  # another pass over the text
    assert [bar.open for bar in Bar.made] == [False, False, True]
    assert (Bar.made[-1].n, Bar.made[-1].total) == (1, 7)
    bars.tick("score", 7, 7)
    assert not any(bar.open for bar in Bar.made)


def test_under_a_cap_the_bar_ends_with_the_seconds(rt, bars):
    """Its total is what the mean speed allows; the stage is done when the cap is."""
    rt.cfg = tiny(max_wallclock_seconds=60.0)
    for done, spent, total in [(1, 0.0, 900), (10, 6.0, 100), (20, 15.0, 80), (59, 59.99, 60)]:
        rt.seconds["train"] = spent
        bars.tick("train", done, 900)
        assert (Bar.made[-1].n, Bar.made[-1].total, Bar.made[-1].open) == (done, total, True)
    rt.seconds["train"] = 60.5
    bars.tick("train", 60, 900)
    assert [(bar.n, bar.total, bar.open) for bar in Bar.made] == [(60, 60, False)]


# -----------------------------------------------------------------------------
# Figures


def trainer(rt, step, spent, **changes):
    """What Trainer.speed reads."""
    rt.seconds["train"] = spent
    return types.SimpleNamespace(cfg=tiny(**changes), rt=rt, step=step)


@pytest.mark.parametrize(
    ("step", "spent", "cap", "eta"),
    [
        (10, 20.0, 0.0, "0:03:00"),  # 90 steps of 2 s
        (100, 200.0, 0.0, "0:00:00"),
        (10, 20.0, 50.0, "0:00:30"),  # the cap comes first
        (10, 20.0, 3600.0, "0:03:00"),  # the steps do
        (30, 61.0, 60.0, "0:00:00"),
        (1, 72.0, 0.0, "1:58:48"),
    ],
)
def test_eta_is_of_steps_or_cap(step, spent, cap, eta, rt):
    made = trainer(rt, step, spent, iterations=100, max_wallclock_seconds=cap)
    values = train_gpt.Trainer.speed(made)
    times = dict(train_time_ms=int(1000 * spent), step_avg_ms=1000 * spent / step)
    assert values == times | dict(tokens_per_s=int(64 * step / spent), eta=eta)


@pytest.mark.parametrize(
    "changes",
    [
        dict(),
        dict(depth_recurrence=(1, 2)),
        dict(pre_enrich_dim=24, bigram_kind="linear"),
        dict(ve_enabled=False, gated_attention=False, bigram_vocab_size=0, num_kv_heads=4),
    ],
)
def test_flops_are_those_that_torch_counts(changes):
    cfg = tiny(**changes)
    model, ids = perturbed(cfg).train(), random_ids(cfg)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(ids, ids).backward()
    assert counter.get_total_flops() == train_gpt.token_flops(cfg) * ids.numel()


def test_mfu_is_the_share_of_all_ranks_peaks(rt, monkeypatch):
    rt.cuda, rt.world_size = True, 8
    made = trainer(rt, 50, 10.0, iterations=100, train_batch_tokens=2**20)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
    flops = 5 * 2**20 * train_gpt.token_flops(made.cfg)
    assert train_gpt.Trainer.speed(made)["mfu"] == pytest.approx(flops / (8 * 989e12), rel=1e-12)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Some Other Device")
    assert train_gpt.Trainer.speed(made).keys().isdisjoint({"mfu"})


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA A10G", 125),
        ("NVIDIA B200", 2250),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA RTX A1000", None),
        ("Tesla T4", None),
    ],
)
def test_peaks_by_name(name, tera):
    assert train_gpt.peak_flops(name) == (tera and tera * 1e12)


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="Linux")
def test_peak_memory_is_what_the_kernel_says(rt):
    (line,) = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
    resident = int(line.split()[1]) * 1024 / 10**6
    assert 0.95 * resident <= rt.peak_memory() < 1.5 * resident


# -----------------------------------------------------------------------------
# The log and the run folder


def test_a_log_line_is_text_and_json(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    runtime = train_gpt.Runtime(tiny(run_id="r"))
    train_gpt.open_run(runtime)
    runtime.start()
    runtime.log("step", "3/9", train_loss=1.23456, train_time_ms=1500, step_avg_ms=500.126)
    runtime.log("final_thing_exact", val_loss=1 / 3, stride=64)
    runtime.log("note", "a word")
    lines = (tmp_path / "runs/r/log.txt").read_text().splitlines()
    assert lines == capsys.readouterr().out.splitlines()
    assert lines == [
        "step:3/9 train_loss:1.2346 train_time:1500ms step_avg:500.13ms",
        "final_thing_exact val_loss:0.3333333333333333 stride:64",
        "note:a word",
    ]
    rows = [json.loads(s) for s in (tmp_path / "runs/r/metrics.jsonl").read_text().splitlines()]
    assert rows[0] == dict(
        key="step", value="3/9", train_loss=1.23456, train_time_ms=1500, step_avg_ms=500.126
    )
    assert rows[1]["val_loss"] == 1 / 3 and rows[2]["value"] == "a word"


def test_optional_packages_are_asked_for_by_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(train_gpt.UserError, match="pip install zstandard"):
        train_gpt.compress(b"x", "zstd")


def test_half_cleared_folder_is_not_taken_for_finished(dataset, tmp_path, monkeypatch):
    """Killed while OVERWRITE clears a finished folder: its mark has gone first, and all goes but
    what is not ours."""
    folder = tmp_path / "runs" / "old"
    folder.mkdir(parents=True)
    for name in (*OUTPUTS, "notes.txt"):
        (folder / name).write_text("old")
    paths = dict(data_path=str(dataset), tokenizer_path=str(dataset / "tokenizer.model"))
    rt = train_gpt.Runtime(tiny(run_id="old", overwrite=True, vocab_size=0, **paths))
    rt.folder, rt.finished, unlink, gone = folder, True, Path.unlink, []

    def die_after_one(path, missing_ok=False):
        if gone:
            raise KeyboardInterrupt
        gone.append(path.name)
        unlink(path, missing_ok)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "unlink", die_after_one)
        train_gpt.open_run(rt)
    assert not (folder / "submission.json").exists()
    train_gpt.open_run(rt)
    assert content(folder) == {"log.txt": b"", "metrics.jsonl": b"", "notes.txt": b"old"}


# -----------------------------------------------------------------------------
# Signals


@pytest.fixture
def handlers():
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in numbers}
    yield lambda: {number: signal.getsignal(number) for number in numbers}
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_second_signal_ends_at_once_and_handlers_come_back(rt, handlers):
    signal.signal(signal.SIGTERM, mine := lambda *_: None)
    before = handlers()
    with contextlib.suppress(KeyError), rt.signals() as came:
        assert came == []
        os.kill(os.getpid(), signal.SIGTERM)
        assert came == [signal.SIGTERM]
        assert set(handlers().values()) == {signal.SIG_DFL}
        raise KeyError  # an end by an exception counts, too
    assert handlers() == before and before[signal.SIGTERM] is mine


# -----------------------------------------------------------------------------
# Disks that are full or cannot be written
#
# Nothing half-written passes for whole, the message says what to do, and what was computed is not
# lost. Root may write anywhere, so permissions prove nothing here: a folder stands where a file
# should go, a file where a folder should, or there is no room left, by a limit on the size of files
# (EFBIG) or by the error itself (ENOSPC).


@pytest.fixture(scope="session")
def finished(tmp_path_factory, dataset):
    """Folder of a short run with its end"""
    with shared_folder(tmp_path_factory, "disk") as (cwd, empty):
        if empty:
            run_here(cwd, "run", **SHRUNK | dict(ITERATIONS="2"), DATA_PATH=str(dataset))
    return cwd / "runs/run"


@pytest.fixture
def folder(finished, tmp_path):
    """A copy without its mark"""
    copy = shutil.copytree(finished, tmp_path / "copy")
    (copy / "submission.json").unlink()
    return copy


@contextlib.contextmanager
def room(size):
    """No file of this process grows beyond so many bytes, as on a full disk"""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # an OSError, and no death
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


# -----------------------------------------------------------------------------
# Writing whole or not at all


@pytest.mark.parametrize("before", [None, b"the one before"])
@pytest.mark.parametrize(
    "write",
    [
        bytes(50_000),
        lambda path: np.savez(path.open("wb"), a=np.zeros(9000)),
        lambda path: (path.write_bytes(bytes(10)), 1 / 0),
    ],
    ids=["bytes", "arrays", "exception"],
)
def test_a_failed_write_leaves_what_was_there(write, before, tmp_path):
    path = tmp_path / "artifact.bin"
    if before:
        path.write_bytes(before)
    with room(20_000), pytest.raises((train_gpt.UserError, ZeroDivisionError)) as caught:
        train_gpt.write_atomically(path, write)
    assert caught.type is ZeroDivisionError or "artifact.bin: " in str(caught.value)
    assert (path.read_bytes() if path.exists() else None) == before


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_failed_writing_leaves_nothing_behind(name, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    (path := tmp_path / "file").write_bytes(b"old")
    with monkeypatch.context() as patch, pytest.raises(train_gpt.UserError, match="disk full; fix"):
        patch.setattr(os, name, fail)
        train_gpt.write_atomically(path, b"new")
    assert content(tmp_path) == {"file": b"old"}
    train_gpt.write_atomically(path, b"new")
    assert content(tmp_path) == {"file": b"new"}


def test_submission_on_a_full_disk(folder, capsys):
    before = content(folder)
    with room(300):
        assert run_folder.main([str(folder)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error:") and "too large" in line and "fix: make room" in line
    assert content(folder) == before
    assert run_folder.main([str(folder)]) == 0


def test_picture_on_a_full_disk(folder, capsys):
    before = content(folder)
    with room(300):
        assert plot.main([str(folder), "--out", str(folder / "new.png")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error:") and "too large" in line and "fix: make room" in line
    assert content(folder) == before


@pytest.mark.parametrize("name", ["submission.json", "report.png"])
def test_a_folder_in_the_place_of_a_result(name, folder, capsys):
    (folder / name).unlink(missing_ok=True)
    (folder / name).mkdir()
    before = content(folder)
    main = run_folder.main if name == "submission.json" else plot.main
    assert main([str(folder)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error:") and name in line
    assert content(folder) == before


def test_dataset_on_a_full_disk(tmp_path, capsys):
    """The earlier dataset stays; the folder for the new one is gone"""
    (tmp_path / "a.txt").write_text("some words of text, again and again. " * 400)
    arguments = ["--input", str(tmp_path / "a.txt"), "--out", str(tmp_path / "set")]
    arguments += ["--vocab-size", "280"]
    assert prepare_text.main(arguments) == 0
    before = content(tmp_path / "set")
    (tmp_path / "a.txt").write_text("other words of a text, over and over. " * 4000)
    with room(8_000):
        assert prepare_text.main(arguments) == 2
    assert "too large" in capsys.readouterr().err
    assert content(tmp_path / "set") == before and len(os.listdir(tmp_path / "set")) == len(before)


def test_container_on_a_full_disk(tmp_path):
    with room(100), pytest.raises(OSError, match="too large"):
        compress.place(tmp_path / "a.pgz", bytes(500))
    assert os.listdir(tmp_path) == []


# -----------------------------------------------------------------------------
# The script


def variables(dataset, **more):
    return SHRUNK | dict(ITERATIONS="2", WARMUP_STEPS="0", DATA_PATH=str(dataset)) | more


def small_disk(env, cwd, size):
    """The script as a process whose files cannot grow beyond `size` bytes"""
    code = "import resource, runpy, signal, sys\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    code += f"resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))\n"
    code += (
        f"sys.argv = ['train_gpt.py']\nrunpy.run_path({str(train_gpt.CODE)!r}, None, '__main__')"
    )
    (cwd / "small_disk.py").write_text(code)
    return launch(cwd / "small_disk.py", [], env, 1, cwd)


@pytest.mark.parametrize(
    ("size", "missing"),
    [(300_000, "artifact.bin"), (1_000, "train_gpt.py")],  # beyond the script, see test_style
    ids=["artifact", "all"],
)
def test_full_disk(size, missing, dataset, tmp_path):
    """One line, status 2; what could not be written whole is not there"""
    done = small_disk(variables(dataset, RUN_ID="full", MODEL_DIM="128"), tmp_path, size)
    *notes, line = done.stderr.splitlines()
    assert done.returncode == 2 and "too large" in line
    assert f"{missing}: " in line and "fix" in line
    left = {path.name for path in (tmp_path / "runs/full").iterdir()}
    assert not {"artifact.bin", "submission.json", "blocks.npz", "report.png", missing} & left
    if missing == "artifact.bin":
        assert notes == [] and "step:2/2" in (tmp_path / "runs/full/log.txt").read_text()
    else:
        assert ["log.txt: " in notes[0], "metrics.jsonl: " in notes[1]] == [True] * len(notes)


def test_a_log_on_a_full_disk_ends_alone(capsys):
    """Said once; whoever writes to it goes on"""
    log = train_gpt.LogFile(Path("/dev/full"))
    for line in ("one", "two"):
        log.add(line)
    (note,) = capsys.readouterr().err.splitlines()
    assert "/dev/full: [Errno 28]" in note and "fix: make room" in note


def test_a_log_that_was_deleted_is_empty(tmp_path):
    """A checkpoint asks how long it is"""
    log = train_gpt.LogFile(tmp_path / "log.txt")
    log.add("a line")
    assert log.size() == 7
    (tmp_path / "log.txt").unlink()
    assert log.size() == 0


@pytest.mark.parametrize("place", ["log.txt", "metrics.jsonl", "artifact.bin", "submission.json"])
def test_folder_in_the_place_of_a_file(place, dataset, tmp_path, monkeypatch, capsys):
    """Noticed before any training"""
    (tmp_path / "runs/odd" / place).mkdir(parents=True)
    for name, text in variables(dataset, RUN_ID="odd").items():
        monkeypatch.setenv(name, text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["train_gpt.py"])
    with pytest.raises(SystemExit) as caught:
        train_gpt.main()
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert caught.value.code == 2 and "odd" in line and "fix" in line
    assert "step:" not in captured.out
    assert (tmp_path / "runs/odd" / place).is_dir()


@pytest.mark.parametrize("make", [Path.touch, lambda path: path.symlink_to("nowhere")])
def test_runs_is_no_folder(make, dataset, tmp_path, monkeypatch, capsys):
    make(tmp_path / "runs")
    for name, text in variables(dataset, RUN_ID="odd").items():
        monkeypatch.setenv(name, text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["train_gpt.py"])
    with pytest.raises(SystemExit) as caught:
        train_gpt.main()
    (line,) = capsys.readouterr().err.splitlines()
    assert caught.value.code == 2 and "runs" in line and "fix" in line


def test_results_outlive_the_picture_and_the_submission(dataset, tmp_path, monkeypatch, capsys):
    """The disk is full when they are drawn: every final line stands, and what to do about it"""
    write = train_gpt.write_atomically

    def full(path, content):
        if path.name == "submission.json":
            with room(300):
                return write(path, content)
        return write(path, content)

    monkeypatch.setattr(train_gpt, "write_atomically", full)
    monkeypatch.setattr(
        "subprocess.run", lambda command, **how: subprocess.CompletedProcess(command, 2)
    )
    run = run_here(tmp_path, "late", **variables(dataset))
    monkeypatch.undo()
    out = capsys.readouterr().out.splitlines()
    assert run.lines == out and run.final("ngram_exact") and run.final("budget")
    for words in (
        (
            "note:no submission.json: ",
            "too large",
            "; then run python records/tools/run_folder.py ",
        ),
        ("note:records/tools/plot.py failed; run it again on runs/late",),
    ):
        assert any(all(word in line for word in words) for line in run.lines)
    assert not (run.folder / "submission.json").exists()
    assert run_folder.main([str(run.folder)]) == 0
    claimed = json.loads((run.folder / "submission.json").read_text())["val_bpb"]
    assert claimed == run.val_bpb()


# -----------------------------------------------------------------------------
# Several hosts: torchrun's agents on loopback, each with a folder and a core of its own


QUICK = dict(ITERATIONS="2", WARMUP_STEPS="0", NGRAM_ENABLED="0", EVAL_STRIDE="64")
ENV = SHRUNK | QUICK | dict(RUN_ID="nodes")
LONG = ENV | dict(ITERATIONS="100000", WARMDOWN_ITERS="6")
PATIENCE = 60  # seconds in which a host must notice that another one is gone; it takes about 2


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Host:
    """The README's command on one host: its working folder, its agent, what both print."""

    def __init__(self, folder, core, endpoint, env):
        folder.mkdir(exist_ok=True)
        self.folder, self.output = folder, folder / f"host_{core}.out"
        torchrun = "-m torch.distributed.run --nnodes=2 --nproc_per_node=1 --rdzv_backend=c10d"
        command = [sys.executable, *torchrun.split(), f"--rdzv_endpoint={endpoint}", SCRIPT]
        quiet = dict(OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo", PYTHONDONTWRITEBYTECODE="1")
        with open(self.output, "w") as out:
            pipes = dict(stdout=out, stderr=subprocess.STDOUT)
            env = clean_environment() | quiet | env
            self.agent = subprocess.Popen(command, cwd=folder, env=env, **pipes)
        os.sched_setaffinity(self.agent.pid, {core})

    def text(self):
        return self.output.read_text(encoding="utf-8")

    def ranks(self):
        """Process ids of its ranks"""
        listed = subprocess.run(["ps", "-eo", "pid,ppid"], capture_output=True, text=True).stdout
        pairs = [line.split() for line in listed.splitlines()[1:]]
        return [int(pid) for pid, parent in pairs if int(parent) == self.agent.pid]

    def kill(self, processes):
        for pid in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def hosts(folders, env, dataset):
    """Two of them; neither outlives the test."""
    endpoint, cores = f"127.0.0.1:{free_port()}", sorted(os.sched_getaffinity(0))
    variables = env | dict(DATA_PATH=str(dataset))
    both = [
        Host(folder, cores[i % len(cores)], endpoint, variables) for i, folder in enumerate(folders)
    ]
    try:
        yield both
    finally:
        for host in both:
            host.kill([*host.ranks(), host.agent.pid])
            host.agent.wait()


def finish(both):
    """Exit statuses, and what was printed"""
    return [host.agent.wait(120) for host in both], "\n".join(host.text() for host in both)


@pytest.fixture(scope="module")
def one_host(dataset, tmp_path_factory):
    """The same run on one host's two ranks."""
    return finished_run(tmp_path_factory.mktemp("one"), "nodes", 2, **ENV, DATA_PATH=str(dataset))


def check_same_scores(run, other):
    """To the last bit: weights, and log p of every target"""
    assert run.artifact == other.artifact
    columns, wanted = run.arrays("scores.npz"), other.arrays("scores.npz")
    assert columns.keys() == wanted.keys()
    assert all((columns[name] == wanted[name]).all() for name in columns)
    assert [line for line in run.lines if line.startswith("val_text")] != []
    assert "hardware:2 x" in "\n".join(run.lines)


def test_two_hosts_that_share_a_folder(one_host, dataset, tmp_path):
    with hosts([tmp_path] * 2, ENV, dataset) as both:
        statuses, text = finish(both)
    assert statuses == [0, 0], text[-3000:]
    run = Run(tmp_path / "runs/nodes")
    check_same_scores(run, one_host)
    assert text.count("final_ngram_exact") == 1


@pytest.mark.slow
def test_two_hosts_with_their_own_disks(one_host, dataset, tmp_path):
    """The run folder is rank 0's alone, but for what lay there before: an artifact of the same name
    from another run must not be scored."""
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        (folder / "runs/nodes").mkdir(parents=True)
        shutil.copyfile(one_host.folder / "artifact.bin", folder / "runs/nodes/artifact.bin")
    with hosts(folders, ENV | dict(SEED="7"), dataset) as both:
        statuses, text = finish(both)
    assert statuses == [0, 0], text[-3000:]
    (log,) = tmp_path.glob("*/runs/nodes/log.txt")
    run = Run(log.parent)
    assert run.artifact != one_host.artifact
    alone = finished_run(tmp_path, "alone", 2, **ENV | dict(SEED="7"), DATA_PATH=str(dataset))
    check_same_scores(run, alone)


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["rank_0", "rank_1", "host_0", "host_1"])
def test_a_lost_host_ends_the_other_with_a_reason(victim, dataset, tmp_path):
    """A rank that is killed, or its whole host with the agent; 0 is where the log is."""
    with hosts([tmp_path / "a", tmp_path / "b"], LONG, dataset) as both:
        deadline = time.monotonic() + 120
        while not any("step:3/" in host.text() for host in both):
            assert time.monotonic() < deadline and all(host.agent.poll() is None for host in both)
            time.sleep(0.2)
        both.sort(key=lambda host: "step:3/" not in host.text())
        what, place = victim.split("_")
        lost, other = both[int(place)], both[1 - int(place)]
        ranks = lost.ranks()
        assert ranks
        lost.kill(([lost.agent.pid] if what == "host" else []) + ranks)
        assert other.agent.wait(PATIENCE) != 0
        reasons = (
            "closed by peer",
            "Connection reset",
            "Broken pipe",
            "SIGTERM",
            "connection to the C10d",
        )
        assert any(reason in other.text() for reason in reasons), other.text()[-3000:]
        assert not other.ranks()


@pytest.mark.slow
def test_a_host_without_the_data_ends_both(dataset, tmp_path):
    """In the first seconds; the host that lacks it says so."""
    folders = [tmp_path / "a", tmp_path / "b"]
    shutil.copytree(dataset, tmp_path / "a" / "here")
    shutil.copytree(dataset, tmp_path / "b" / "here")
    for shard in (tmp_path / "b" / "here").glob("*_val_*.bin"):
        shard.unlink()
    with hosts(folders, LONG, "here") as both:
        assert all(host.agent.wait(PATIENCE) != 0 for host in both)
        assert "error: DATA_PATH='here': no *_val_*.bin" in both[1].text()
        assert not any("step:1/" in host.text() for host in both)
