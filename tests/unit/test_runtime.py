"""The runtime: the bar on a terminal, no byte of it elsewhere, the figures of the step lines; log,
run folder, signals; disks that are full; several hosts.

The slow ones, of hosts that are lost: python -m pytest -m slow tests/unit/test_runtime.py
"""

import contextlib
import fcntl
import functools
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


def trainer(rt, step, spent, since=None, **changes):
    """What Trainer.speed reads."""
    rt.seconds["train"] = spent
    cfg = tiny(**changes)
    made = types.SimpleNamespace(cfg=cfg, rt=rt, step=step, cap=cfg.max_wallclock_seconds)
    made.loops_since = since
    made.mean_flops = functools.partial(train_gpt.Trainer.mean_flops, made)
    return made


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
    loops = dict(iterations=100, train_batch_tokens=2**20, loop_layers="1-2")
    half = trainer(rt, 50, 10.0, since=25, **loops)
    flops += 2.5 * 2**20 * (train_gpt.token_flops(half.cfg) - train_gpt.token_flops(made.cfg))
    assert train_gpt.Trainer.speed(half)["mfu"] == pytest.approx(flops / (8 * 989e12), rel=1e-12)
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
    found = content(folder)
    assert found.pop(".lock")
    assert found == {"log.txt": b"", "metrics.jsonl": b"", "notes.txt": b"old"}


# -----------------------------------------------------------------------------
# Signals


@pytest.fixture
def handlers():
    numbers = train_gpt.SIGNALS
    before = {number: signal.getsignal(number) for number in numbers}
    yield lambda: {number: signal.getsignal(number) for number in numbers}
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number):
    os.kill(os.getpid(), number)


def test_a_second_signal_ends_at_once_and_handlers_come_back(rt, handlers):
    signal.signal(signal.SIGTERM, mine := lambda *_: None)
    before = handlers()
    with contextlib.suppress(KeyError), rt.signals() as came:
        rt.hold_signals()
        assert came == []
        send(signal.SIGTERM)
        assert came == [signal.SIGTERM]
        second = dict.fromkeys([signal.SIGINT, signal.SIGTERM], signal.SIG_DFL)
        assert handlers() == second | dict.fromkeys(train_gpt.WARNINGS, signal.SIG_IGN)
        raise KeyError  # an end by an exception counts, too
    assert handlers() == before and before[signal.SIGTERM] is mine


WARNINGS = [signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU]


@pytest.mark.parametrize("warning", WARNINGS)
def test_after_a_warning_only_ctrl_c_ends_at_once(warning, rt, handlers):
    """bash and the kernel both send SIGHUP, torchrun that is hit twice adds SIGTERM; the kernel
    sends SIGXCPU each second."""
    with rt.signals() as came:
        assert callable(signal.getsignal(signal.SIGHUP))  # or it ends us here
        rt.hold_signals()
        for number in (warning, warning, signal.SIGTERM, signal.SIGXCPU, warning):
            send(number)
        assert came == [warning]
        assert handlers()[signal.SIGINT] == signal.SIG_DFL


TOGETHER = """
import os, signal, sys, train_gpt
from helpers import tiny
rt = train_gpt.Runtime(tiny())
with rt.signals() as came:
  rt.hold_signals()
  signal.pthread_sigmask(signal.SIG_BLOCK, numbers := [*map(int, sys.argv[1:])])
  for number in numbers:
    os.kill(os.getpid(), number)
  signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
  print([*map(int, came)], flush=True)
  os.kill(os.getpid(), signal.SIGINT)
  print("alive")
"""


@pytest.mark.parametrize(
    ("numbers", "first"),
    [
        ([signal.SIGHUP, signal.SIGINT], signal.SIGHUP),
        ([signal.SIGINT, signal.SIGHUP], signal.SIGHUP),  # lowest first, as Python hands them over
        ([signal.SIGINT, signal.SIGTERM], signal.SIGINT),
        ([signal.SIGHUP, signal.SIGUSR1, signal.SIGXCPU, signal.SIGTERM], signal.SIGHUP),
    ],
)
def test_signals_that_come_together_are_one(numbers, first, tmp_path):
    """While the process is in one long call: they lose no work, and print no traceback (`Signal 2
    ignored due to race condition`). A Ctrl-C after that ends at once."""
    (tmp_path / "together.py").write_text(TOGETHER)
    done = launch(tmp_path / "together.py", [int(n) for n in numbers], {}, 1, tmp_path)
    assert done.stdout == f"[{first:d}]\n" and done.stderr == ""
    assert done.returncode == -signal.SIGINT


def test_a_signal_waits_for_what_lies_in_no_file(rt):
    reached = False
    with pytest.raises(train_gpt.Interrupted) as caught, rt.signals():
        rt.hold_signals()
        send(signal.SIGHUP)
        reached = True
        rt.release_signals()
        reached = False
    assert reached and caught.value.code == 129


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, *WARNINGS])
def test_a_signal_with_nothing_unsaved_ends_here(number, rt):
    with pytest.raises(SystemExit) as caught, rt.signals():
        send(number)
        time.sleep(5)
    assert caught.value.code == 128 + number


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, *WARNINGS])
def test_an_ignored_signal_stays_ignored(number, rt, handlers):
    """As nohup starts us, and a script its background jobs."""
    signal.signal(number, signal.SIG_IGN)
    with rt.signals() as came:
        send(number)
    assert came == [] and handlers()[number] == signal.SIG_IGN


def test_a_ctrl_c_that_is_ignored_does_not_end_the_imports(tmp_path):
    command = ["bash", "-c", f"trap '' INT; exec {sys.executable} {SCRIPT}"]
    env = clean_environment() | dict(DRY_RUN="1", DEVICE="cpu")
    streams = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen(command, cwd=tmp_path, env=env, **streams) as started:
        deadline = time.monotonic() + 60
        while "numpy" not in Path(f"/proc/{started.pid}/maps").read_text():
            assert started.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
        started.send_signal(signal.SIGINT)
        out, err = started.communicate(timeout=60)
    assert started.returncode == 0 and err == "" and "byte_budget" in out


def test_how_to_go_on_is_said(rt, tmp_path):
    rt.folder = tmp_path
    assert rt.kept() == "nothing to keep"
    (tmp_path / "artifact.bin").touch()
    assert rt.kept() == f"EVAL_ONLY={tmp_path}/artifact.bin scores it"
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint/step_00000007.json").touch()
    assert rt.kept() == "step_00000007 is kept, RESUME=auto goes on"
    (tmp_path / "submission.json").touch()
    assert rt.kept() == f"{tmp_path} is finished, but perhaps for its picture"


@contextlib.contextmanager
def process(cwd, until, ranks=1, wrapper=(), **env):
    """The script as a process that has printed this text -> (process, function that reads what it
    printed); it is killed in the end. Output goes to a file, as in a batch job."""
    torchrun = "-m torch.distributed.run --standalone --nproc_per_node=2".split()
    command = [*wrapper, sys.executable, *(torchrun if ranks == 2 else []), SCRIPT]
    env = clean_environment() | dict(PYTHONDONTWRITEBYTECODE="1") | env
    path = cwd / "out"
    with open(path, "wb") as out:
        streams = dict(stdout=out, stderr=subprocess.STDOUT)
        started = subprocess.Popen(command, cwd=cwd, env=env, **streams)
    try:
        deadline = time.monotonic() + 100
        while until not in path.read_text():
            assert started.poll() is None and time.monotonic() < deadline, path.read_text()[-2000:]
            time.sleep(0.01)
        yield started, path.read_text
    finally:
        started.kill()
        started.wait()


ENDLESS = dict(ITERATIONS="100000", WARMUP_STEPS="0", RUN_ID="x")


@pytest.mark.slow
@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_hangup_leaves_a_checkpoint(ranks, times, dataset, tmp_path):
    """Once, and as an SSH session sends it: twice; to torchrun, which passes it on."""
    env = SHRUNK | ENDLESS | dict(DATA_PATH=str(dataset))
    with process(tmp_path, "step:3/", ranks, **env) as (started, text):
        for _ in range(times):
            started.send_signal(signal.SIGHUP)
            time.sleep(0.02)
        status = started.wait(60)
        note = "note:signal 1 at step "
        deadline = time.monotonic() + 30  # torchrun that is hit twice ends before its ranks
        while note not in text() and time.monotonic() < deadline:
            time.sleep(0.1)
    assert status == (129 if ranks == 1 else 1) and note in text()
    assert "checkpoint written, RESUME=auto goes on" in text()
    (path,) = (tmp_path / "runs/x/checkpoint").glob("*.json")
    assert train_gpt.read_checkpoint(path)[0].step >= 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("numbers", "status"),
    [
        ([signal.SIGUSR1, signal.SIGTERM], 138),  # Slurm: a warning, later the end
        ([signal.SIGXCPU, signal.SIGXCPU], 152),
        ([signal.SIGUSR2], 140),
    ],
)
def test_a_warning_leaves_a_checkpoint(numbers, status, dataset, tmp_path):
    env = SHRUNK | ENDLESS | dict(DATA_PATH=str(dataset))
    with process(tmp_path, "step:3/", **env) as (started, text):
        for number in numbers:
            started.send_signal(number)
            time.sleep(0.02)
        assert started.wait(60) == status
        printed = text()
    assert f"note:signal {status - 128} at step " in printed and "Traceback" not in printed
    assert len([*(tmp_path / "runs/x/checkpoint").glob("*.json")]) == 1


@pytest.mark.slow
def test_a_ctrl_c_that_is_ignored_stops_no_training(dataset, tmp_path):
    env = SHRUNK | dict(DATA_PATH=str(dataset), RUN_ID="x", WARMUP_STEPS="0")
    wrapper = ["bash", "-c", "trap '' INT; exec \"$@\"", "x"]
    with process(tmp_path, "step:3/", wrapper=wrapper, **env) as (started, text):
        started.send_signal(signal.SIGINT)
        assert started.wait(100) == 0
        assert "signal" not in text()


@pytest.mark.slow
def test_a_signal_while_the_picture_is_drawn(dataset, tmp_path):
    env = SHRUNK | dict(DATA_PATH=str(dataset), RUN_ID="x", WARMUP_STEPS="0")
    with process(tmp_path, "peak_memory", **env) as (started, text):
        while not (tmp_path / "runs/x/submission.json").exists():
            time.sleep(0.01)
        started.send_signal(signal.SIGINT)
        assert started.wait(60) == 130
        assert text().splitlines()[-1].startswith("note:signal 2: runs/x is finished")


@pytest.mark.slow
def test_a_run_under_nohup_goes_on(dataset, tmp_path):
    env = SHRUNK | ENDLESS | dict(DATA_PATH=str(dataset))
    with process(tmp_path, "step:3/", wrapper=["nohup"], **env) as (started, text):
        started.send_signal(signal.SIGHUP)
        before = text().count("step:")
        time.sleep(2)
        assert started.poll() is None and "signal" not in text()
    assert before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("until", "kept"),
    [
        ("config", "nothing to keep"),
        ("final_int6_roundtrip_exact", "EVAL_ONLY=runs/x/artifact.bin scores it"),
        ("ngram_gain:9", "EVAL_ONLY=runs/x/artifact.bin scores it"),  # encodes, decodes
    ],
)
def test_ctrl_c_is_one_line(until, kept, dataset, tmp_path):
    env = SHRUNK | dict(DATA_PATH=str(dataset), RUN_ID="x", EVAL_STRIDE="1")
    env |= dict(SCORER="documents", CODEC_TOKENS="-1", EVAL_LANES="1")
    with process(tmp_path, until, **env) as (started, text):
        started.send_signal(signal.SIGINT)
        assert started.wait(60) == 130
        printed = text()
    assert "Traceback" not in printed and printed.splitlines()[-1] == f"note:signal 2: {kept}"
    assert not list((tmp_path / "runs/x").glob("submission.json"))


def test_ctrl_c_during_the_imports_is_one_line(tmp_path):
    command = [sys.executable, SCRIPT]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as started:
        deadline = time.monotonic() + 60
        while "numpy" not in Path(f"/proc/{started.pid}/maps").read_text():
            assert started.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
        started.send_signal(signal.SIGINT)
        assert started.wait(60) == 130
        assert started.stderr.read() == "signal 2: nothing to keep\n"
    assert not list(tmp_path.iterdir())


# -----------------------------------------------------------------------------
# Standard streams that are lost


def lost_stream(path, monkeypatch, buffering):
    """A Screen over a file that cannot be written; what is lost is told to this test alone."""
    monkeypatch.setattr(train_gpt.Screen, "lost", [])
    return train_gpt.Screen("stdout", open(path, "w", buffering))


def test_a_reader_who_reads_no_more_stops_no_run(monkeypatch):
    """A frozen terminal, `less`: the pipe is full, and stays so."""
    monkeypatch.setattr(train_gpt.Screen, "lost", [])
    monkeypatch.setattr(train_gpt, "STALLED_SECONDS", 0.2)
    reader, writer = os.pipe()
    screen = train_gpt.Screen("stdout", open(writer, "w"))
    began = time.monotonic()
    while not train_gpt.Screen.lost and time.monotonic() < began + 30:
        print("x" * 5000, file=screen, flush=True)
    print("and on", file=screen, flush=True)
    assert train_gpt.Screen.lost == ["stdout is lost: nobody has read it for 0.2 s"]
    os.set_blocking(reader, False)
    assert os.read(reader, 1 << 20).strip(b"x\n") == b""
    os.close(reader)
    screen.stream.close()


@pytest.mark.parametrize("buffering", [-1, 1], ids=["file", "terminal"])
def test_a_lost_stream_goes_nowhere_and_is_noted_once(buffering, rt, tmp_path, monkeypatch):
    """A file fails when it is flushed, a terminal, whose buffer is a line, when it is written."""
    screen = lost_stream("/dev/full", monkeypatch, buffering)
    monkeypatch.setattr(sys, "stdout", screen)
    rt.folder = tmp_path
    rt.open_logs()
    for step in range(3):
        rt.log("step", step)
    assert os.readlink(f"/proc/self/fd/{screen.fileno()}") == os.devnull
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert [line for line in lines if not line.startswith("note:")] == [
        "step:0",
        "step:1",
        "step:2",
    ]
    (note,) = [line for line in lines if line.startswith("note:")]
    assert "stdout is lost: [Errno 28]" in note and str(tmp_path / "log.txt") in note
    keys = [json.loads(line)["key"] for line in (tmp_path / "metrics.jsonl").open()]
    assert keys == ["step", "note", "step", "step"]


def test_text_too_foreign_for_a_stream_is_escaped(tmp_path, monkeypatch):
    monkeypatch.setattr(train_gpt.Screen, "lost", [])
    with open(tmp_path / "out", "w", encoding="ascii") as file:
        print("a\u00e9\udcff", file=train_gpt.Screen("stdout", file))
    assert (tmp_path / "out").read_text() == "a\\xe9\\udcff\n"
    assert train_gpt.Screen.lost == []


def test_a_log_holds_any_text(tmp_path):
    train_gpt.LogFile(tmp_path / "log.txt").add("path \udcff")
    assert (tmp_path / "log.txt").read_text() == "path \\udcff\n"


def shell(command, cwd, **env):
    """A command line of bash in which $RUN is the script -> what it printed, its status."""
    env = clean_environment() | dict(RUN=f"{sys.executable} {SCRIPT}", RUN_ID="x") | env
    done = subprocess.run(["bash", "-c", command], cwd=cwd, env=env, capture_output=True, text=True)
    return done.stdout, done.stderr, done.returncode


@pytest.mark.parametrize(
    ("command", "status"),
    [
        ("$RUN --no-such 2>&-", 2),
        ("$RUN --no-such >&- 2>&-", 2),
        ("$RUN --no-such 2>/dev/full", 2),
        ("$RUN --help >&-", 0),
        ("$RUN --help >/dev/full", 0),
        ("$RUN --help | head -1 >&2; exit ${PIPESTATUS[0]}", 0),
    ],
)
def test_a_short_answer_that_nobody_reads(command, status, tmp_path):
    out, err, found = shell(command, tmp_path)
    assert found == status and "Traceback" not in err and "Broken pipe" not in err
    assert out == "" and not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("redirection", "reason"),
    [
        ("2>&1 | head -1", "stdout is lost: [Errno 32] Broken pipe"),
        (">&-", "stdout is lost: closed"),
        ("<&- >&- 2>&-", "stdout is lost: closed"),
        (">/dev/full 2>&1", "stdout is lost: [Errno 28] No space left on device"),
    ],
)
def test_a_run_outlives_its_streams(redirection, reason, dataset, tmp_path):
    """Proof and picture included, which inherit them; no file of the run is written by mistake."""
    env = SHRUNK | dict(DATA_PATH=str(dataset), SCORER="documents", CODEC_TOKENS="-1")
    _, _, status = shell(f"$RUN {redirection}; exit ${{PIPESTATUS[0]}}", tmp_path, **env)
    assert status == 0
    run = Run(tmp_path / "runs/x")
    (note,) = [line for line in run.lines if line.startswith("note:")]
    assert note.startswith(f"note:{reason}; the run goes on, its log is ")
    assert run.final("codec")["decoded"] == "ok" and (run.folder / "report.png").exists()
    assert run.submission()["val_bpb"] == run.val_bpb()
    assert len(run.metrics()) == len(run.lines)


@pytest.mark.slow
def test_a_terminal_that_vanishes(dataset, tmp_path):
    """Without a SIGHUP, as after setsid or disown: EIO, on a bar as well."""
    env = clean_environment() | SHRUNK | dict(DATA_PATH=str(dataset), RUN_ID="x")
    ours, theirs = terminal()
    ends = dict(stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
    with subprocess.Popen([sys.executable, SCRIPT], cwd=tmp_path, env=env, **ends) as started:
        os.close(theirs)
        text = b""
        while b"step:1/" not in text:
            text += os.read(ours, 4096)
        os.close(ours)
        assert started.wait(100) == 0
    lines = Run(tmp_path / "runs/x").lines
    (note,) = [line for line in lines if line.startswith("note:")]
    assert "[Errno 5]" in note


@pytest.mark.slow
@pytest.mark.parametrize("env", [dict(PYTHONIOENCODING="ascii"), dict(LC_ALL="C")])
def test_a_narrow_encoding_and_a_path_with_accents(env, dataset, tmp_path):
    (tmp_path / "é").mkdir()
    data = shutil.copytree(dataset, tmp_path / "é" / "données")
    env |= SHRUNK | dict(DATA_PATH=str(data), RUN_ID="né")
    out, err, status = shell("$RUN", tmp_path / "é", **env)
    assert status == 0 and err == "" and "final_budget" in out
    run = Run(tmp_path / "é/runs/né")
    assert (run.folder / "report.png").exists() and run.submission()["name"] == "né"


# -----------------------------------------------------------------------------
# One run, one folder


def locked_runtime(run_id="x"):
    return train_gpt.Runtime(tiny(run_id=run_id))


def test_a_folder_in_use_is_not_touched(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, second = locked_runtime(), locked_runtime()
    train_gpt.open_run(first)
    first.log("a", "line")
    before = content(first.folder)
    with pytest.raises(train_gpt.ConfigError) as caught:
        train_gpt.open_run(second)
    user = f"RUN_ID='x': runs/x is in use by process {os.getpid()} on "
    assert user in str(caught.value) and "; fix: " in str(caught.value)
    assert content(first.folder) == before
    train_gpt.open_run(locked_runtime("y"))  # another one is free
    first.close()
    train_gpt.open_run(second)  # cleared
    found = content(first.folder)
    assert found.pop(".lock") and found == {"log.txt": b"", "metrics.jsonl": b""}
    second.close()
    assert content(first.folder).keys() == found.keys()  # no trace of the lock


def test_a_lock_that_its_last_user_removed_is_none(tmp_path, monkeypatch):
    """Opened before the other run ended, taken after: the file that others see is taken."""
    monkeypatch.chdir(tmp_path)
    first, second, third = (locked_runtime() for _ in range(3))
    train_gpt.open_run(first)
    flock = fcntl.flock

    def late(file, how):
        if first.lock:
            first.close()
        return flock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    train_gpt.open_run(second)
    with pytest.raises(train_gpt.ConfigError, match="in use by process"):
        train_gpt.open_run(third)


def test_what_was_finished_while_we_started_is_seen(tmp_path, monkeypatch):
    """The mark of a finished run is looked at once the folder is ours."""
    monkeypatch.chdir(tmp_path)
    late = locked_runtime()
    late.folder.mkdir(parents=True)
    (late.folder / "submission.json").write_text("{}")
    with pytest.raises(train_gpt.ConfigError, match="runs/x is finished; fix: OVERWRITE=1"):
        train_gpt.open_run(late)
    assert (late.folder / "submission.json").exists()


def test_a_lock_is_no_link_and_no_heirloom(tmp_path, monkeypatch):
    """It does not write through a link; a program that we start does not hold it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/x").mkdir(parents=True)
    (tmp_path / "mine").write_text("kept")
    (tmp_path / "runs/x/.lock").symlink_to(tmp_path / "mine")
    with pytest.raises(train_gpt.ConfigError, match="fix"):
        train_gpt.open_run(locked_runtime())
    assert (tmp_path / "mine").read_text() == "kept"
    (tmp_path / "runs/x/.lock").unlink()
    first = locked_runtime()
    train_gpt.open_run(first)
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    first.close()
    train_gpt.open_run(second := locked_runtime())
    second.close()
    child.communicate(b"\n")


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
@pytest.mark.parametrize("name", [".lock", "log.txt"])
def test_a_pipe_in_the_place_of_a_file_of_ours(name, make, tmp_path, monkeypatch):
    """log.txt is cleared, unless it is a folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/x").mkdir(parents=True)
    make(tmp_path / "runs/x" / name)
    if name == "log.txt" and make is os.mkfifo:
        return train_gpt.open_run(locked_runtime())
    with pytest.raises(train_gpt.ConfigError, match=f"runs/x/{name}: .*fix: ") as caught:
        train_gpt.open_run(locked_runtime())
    assert "None" not in str(caught.value)


# -----------------------------------------------------------------------------
# A run folder that somebody deletes


def delete(folder):
    shutil.rmtree(folder)


def rename(folder):
    folder.rename(folder.with_name("moved"))


def empty(folder):
    """rm -rf runs/x/*: the lock stays"""
    for path in folder.iterdir():
        if path.name != ".lock":
            path.unlink()


def without_lock(folder):
    (folder / ".lock").unlink()


@pytest.mark.parametrize(
    ("vanish", "place"),
    [
        (delete, "Averages.final"),
        (delete, "evaluate"),
        (delete, "log_pseudo_score"),
        (rename, "Averages.final"),
        (empty, "Averages.final"),
        (without_lock, "evaluate"),
    ],
)
def test_a_deleted_folder_costs_nothing(vanish, place, dataset, tmp_path, monkeypatch):
    """Before the artifact is written, while it is scored, once it is: with all earlier lines."""
    *owner, name = place.split(".")
    owner = getattr(train_gpt, owner[0]) if owner else train_gpt
    before = getattr(owner, name)

    def lose(*arguments):
        vanish(tmp_path / "runs/gone")
        return before(*arguments)

    monkeypatch.setattr(owner, name, lose)
    run = run_here(tmp_path, "gone", **variables(dataset))
    (note,) = [line for line in run.lines if "written again in runs/gone" in line]
    assert len(run.metrics()) == len(run.lines) and run.lines[0].startswith(("note", "config"))
    assert run.submission()["val_bpb"] == run.val_bpb() and "step:2/2" in "".join(run.lines)
    assert {*OUTPUTS} - {"scores.npz", "scores_ema.npz", "stream.bin", "blocks.npz"} <= {
        *os.listdir(run.folder)
    }
    assert ".lock" not in os.listdir(run.folder)


def test_a_folder_that_another_run_has_taken_is_left_alone(tmp_path, monkeypatch):
    """The first run goes on in one of its own."""
    monkeypatch.chdir(tmp_path)
    train_gpt.open_run(first := locked_runtime())
    first.write("artifact.bin", b"first")
    first.log("a", "line")
    delete(first.folder)
    train_gpt.open_run(second := locked_runtime())
    second.write("artifact.bin", b"second")
    before = content(second.folder)
    first.mend_folder()
    first.mend_folder()  # nothing is left to do
    first.log("another", "line")
    found = content(tmp_path / f"runs/x_{os.getpid()}")
    assert found["artifact.bin"] == b"first" and content(second.folder) == before
    note, *more = [line for line in found["log.txt"].decode().splitlines() if "note" in line]
    assert found["log.txt"].startswith(b"a:line\n") and found["log.txt"].endswith(b"another:line\n")
    assert more == [] and len(found["metrics.jsonl"].splitlines()) == 3
    first.close()
    assert content(second.folder) == before  # and its lock
    second.mend_folder()
    assert content(second.folder) == before


def test_a_checkpoint_after_a_deletion(dataset, tmp_path, monkeypatch):
    """RESUME=auto finds it, and the logs as it knows them."""
    save = train_gpt.save_checkpoint

    def lose(trainer):
        delete(trainer.rt.folder)
        save(trainer)
        raise train_gpt.UserError("killed")

    monkeypatch.setattr(train_gpt, "save_checkpoint", lose)
    env = variables(dataset, CHECKPOINT_EVERY="1")
    with pytest.raises(train_gpt.UserError, match="killed"):
        run_here(tmp_path, "gone", **env)
    monkeypatch.undo()
    run = run_here(tmp_path, "gone", **env, RESUME="auto")
    steps = [line.split()[0] for line in run.lines if line.startswith("step:")]
    assert steps == ["step:1/2", "step:2/2"] and len(run.metrics()) == len(run.lines)


def test_the_script_may_vanish_meanwhile(dataset, tmp_path, monkeypatch):
    """As by a checkout of another branch: what was kept counts."""
    make = train_gpt.make_artifact
    code = []

    def lose(*arguments):
        code.append(tmp_path / "gone.py")
        monkeypatch.setattr(train_gpt, "CODE", code[0])
        return make(*arguments)

    monkeypatch.setattr(train_gpt, "make_artifact", lose)
    run = run_here(tmp_path, "code", **variables(dataset))
    assert code and int(run.final("artifact_bytes")["code"]) == len(train_gpt.SCRIPT)


def test_a_log_line_is_one_line(rt, tmp_path, monkeypatch):
    """Whatever it tells of, such as a file's name; verify.py makes the same of metrics.jsonl."""
    rt.folder = tmp_path
    rt.open_logs()
    rt.log("note", "a\nb\u2028c\x1b[1m", text="d\r\x85 \u00e9")
    assert (tmp_path / "log.txt").read_text() == (
        "note:a\\nb\\u2028c\\x1b[1m text:d\\r\\x85 \u00e9\n"
    )
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1


def test_a_file_system_without_locks_is_a_note(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fcntl, "flock", refuse)
    train_gpt.open_run(locked_runtime())
    assert "note:runs/x/.lock: no lock ([Errno 95]" in capsys.readouterr().out


def test_ranks_but_the_first_take_no_lock(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    other = locked_runtime()
    other.rank = 1
    train_gpt.open_run(other)
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_lock_ends_with_its_process(dataset, tmp_path):
    """OVERWRITE, RESUME and EVAL_ONLY ask for it, too; after SIGKILL the folder is free."""
    env = SHRUNK | ENDLESS | dict(DATA_PATH=str(dataset))
    with process(tmp_path, "step:3/", **env) as (started, _):
        for more in (dict(OVERWRITE="1"), dict(RESUME="auto"), {}):
            _, err, status = shell("$RUN", tmp_path, **env | more)
            assert status == 2 and f"is in use by process {started.pid} on " in err
        started.kill()
        started.wait()
        _, err, status = shell("$RUN", tmp_path, **env | dict(ITERATIONS="2"))
        assert status == 0, err
    assert Run(tmp_path / "runs/x").val_bpb() > 0


# -----------------------------------------------------------------------------
# Threads and memory


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """-> function that makes one of so many cores, with these cgroup files; this process's group
    is /a/b, as version 2 or 1 names it."""

    def make(cores=8, affinity=None, version=2, meminfo="MemAvailable: 1000 kB\n", **files):
        controllers = "" if version == 2 else "cpu,cpuacct"
        for name, text in files.items():
            folder, _, file = name.rpartition("/")
            path = tmp_path / "cgroup" / controllers / folder / file.replace("__", ".")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        texts = {"/proc/self/cgroup": f"3:{controllers}:/a/b\n", "/proc/meminfo": meminfo}
        read_text = Path.read_text

        def read(path, *arguments, **options):
            return texts.get(str(path)) or read_text(path, *arguments, **options)

        monkeypatch.setattr(Path, "read_text", read)
        monkeypatch.setattr(train_gpt, "CGROUPS", tmp_path / "cgroup")
        monkeypatch.setattr(os, "cpu_count", lambda: cores)
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(affinity or cores))
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)

    return make


@pytest.mark.parametrize(
    ("files", "threads"),
    [
        (dict(), (8, "cores")),
        ({"a/b/cpu__max": "300000 100000\n"}, (3, "cpu_quota")),
        ({"a/b/cpu__max": "max 100000\n"}, (8, "cores")),
        ({"a/b/cpu__max": "400000 100000", "a/cpu__max": "250000 100000"}, (2, "cpu_quota")),
        ({"a/b/cpu__max": "max 100000", "cpu__max": "150000 100000"}, (1, "cpu_quota")),
        ({"a/b/cpu__max": "20000 100000"}, (1, "cpu_quota")),
        ({"c/cpu__max": "100000 100000"}, (8, "cores")),  # another group's
    ],
)
def test_threads_keep_to_a_quota(files, threads, machine):
    machine(**files)
    assert train_gpt.choose_threads(1) == threads


@pytest.mark.parametrize(("quota", "threads"), [("300000", 3), ("-1", 8)])
def test_a_quota_of_version_1(quota, threads, machine):
    files = {"a/cpu__cfs_quota_us": quota, "a/cpu__cfs_period_us": "100000"}
    machine(version=1, **files)
    assert train_gpt.choose_threads(1)[0] == threads


def test_threads_are_shared_by_the_ranks_of_a_host(machine, monkeypatch):
    machine(cores=16, affinity=12, **{"cpu__max": "1000000 100000"})
    assert [train_gpt.choose_threads(ranks)[0] for ranks in (1, 2, 3, 16)] == [10, 5, 3, 1]
    monkeypatch.setenv("OMP_NUM_THREADS", "4")  # each process's, as OpenMP means it
    found = [train_gpt.choose_threads(ranks) for ranks in (1, 2, 3)]
    assert found == [(4, "OMP_NUM_THREADS"), (4, "OMP_NUM_THREADS"), (3, "cpu_quota")]
    machine(cores=16, affinity=2)
    assert train_gpt.choose_threads(1) == (2, "affinity")


@pytest.mark.parametrize(
    ("text", "given"), [("3", 3), ("4,2", 4), ("", 0), ("0", 0), ("-1", 0), ("x", 0), ("1", 1)]
)
def test_threads_that_the_user_gives(text, given, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", text)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert train_gpt.given_threads() == given


@pytest.mark.parametrize(("outside", "given"), [({}, 0), (dict(OMP_NUM_THREADS="1"), 1)])
def test_torchruns_own_thread_is_no_wish(outside, given):
    """In a process whose parent sets the two variables, as torchrun does, or was given one."""
    code = "import os, subprocess, sys\n"
    code += "os.environ |= dict(OMP_NUM_THREADS='1', TORCHELASTIC_RUN_ID='x')\n"
    code += "child = 'import train_gpt; print(train_gpt.given_threads())'\n"
    code += "subprocess.run([sys.executable, '-c', child])\n"
    env = {n: text for n, text in clean_environment().items() if n != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env | outside, capture_output=True, text=True
    )
    assert done.stdout == f"{given}\n", done.stderr


@pytest.mark.parametrize(
    ("version", "files", "bytes_left"),
    [
        (2, {}, 1_024_000),
        (2, {"a/memory__max": "500000", "a/memory__stat": "anon 200000\nfile 9\n"}, 300_000),
        (2, {"a/memory__max": "100", "a/memory__stat": "anon 200\nfile 9\n"}, 0),
        (2, {"a/memory__max": "max", "a/memory__stat": "anon 200\nfile 9\n"}, 1_024_000),
        (
            1,
            {"memory__limit_in_bytes": "500000", "memory__stat": "cache 7\nrss 100000\n"},
            400_000,
        ),
    ],
)
def test_available_memory(version, files, bytes_left, machine):
    machine(version=version, **files)
    assert train_gpt.available_memory() == bytes_left


def test_available_memory_of_an_unknown_system(monkeypatch):
    def unknown(path, *_, **__):
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_text", unknown)
    assert train_gpt.available_memory() is None
    assert train_gpt.choose_threads(1)[0] >= 1


# -----------------------------------------------------------------------------
# What a run needs, before it begins


@pytest.fixture
def checked(dataset, tmp_path, monkeypatch):
    """-> function: preflight of a run on the small dataset, with these settings -> its notes"""

    def check(**changes):
        paths = dict(data_path=str(dataset), tokenizer_path=str(dataset / "tokenizer.model"))
        cfg = tiny(**dict(vocab_size=0, **paths) | changes)
        return train_gpt.preflight(train_gpt.Runtime(cfg), cfg)

    monkeypatch.chdir(tmp_path)
    return check


def faults(check, **changes):
    with pytest.raises(train_gpt.Missing) as caught:
        check(**changes)
    return str(caught.value).splitlines()


def test_nothing_is_missing(checked, tmp_path):
    assert checked() == [] and not list(tmp_path.iterdir())


def test_all_that_is_missing_is_named_a_line_each(checked, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(train_gpt, "available_memory", lambda: 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=1000))
    lines = faults(checked, data_path="empty", tokenizer_path="none.model", checkpoint_every="1")
    begins = ["DATA_PATH='empty': no *_val_", "DATA_PATH='empty': no *_train_"]
    begins += ["TOKENIZER_PATH='none.model'", "/", "TRAIN_BATCH_TOKENS=64: needs 0.0 GB"]
    assert len(lines) == len(begins) and not list((tmp_path / "empty").iterdir())
    assert all(line.startswith(begin) for line, begin in zip(lines, begins, strict=True))
    assert sum("fix" in line for line in lines) >= 4
    monkeypatch.setitem(sys.modules, "zstandard", None)
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    assert ["package sentencepiece" in lines[0] for lines in [faults(checked)]] == [True]
    assert "package zstandard" in faults(checked)[1]
    assert not any("zstandard" in line for line in faults(checked, compressor="lzma"))


def test_main_prints_a_line_each(tmp_path):
    """As a process, with the folder of an earlier run left alone; DRY_RUN asks for none of it."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "runs/x").mkdir(parents=True)
    (tmp_path / "runs/x/log.txt").write_text("old")
    env = SHRUNK | dict(DATA_PATH="empty", TOKENIZER_PATH="none.model", OVERWRITE="1")
    _, err, status = shell("$RUN", tmp_path, **env)
    lines = err.splitlines()
    assert status == 2 and len(lines) == 3 and all(line.startswith("error: ") for line in lines)
    assert (tmp_path / "runs/x/log.txt").read_text() == "old"
    out, err, status = shell("$RUN", tmp_path, DRY_RUN="1", **env)
    assert status == 0 and err == "" and "byte_budget" in out


def test_room_for_checkpoints(checked, monkeypatch):
    """The second checkpoint is written while two are kept; one on a signal alone is a note."""
    state = train_gpt.state_bytes(tiny(vocab_size=1024))

    def leave(count):
        """So many checkpoints beside 2 MB, which results and logs need."""
        free = int(2e6 + count * state)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=free))

    monkeypatch.setattr(train_gpt, "state_bytes", lambda _: state)
    state *= 9
    for count, every, noted in ((5, "1", 0), (0, "0", 1), (2, "0", 0), (2, "0m", 0), (2, "00", 0)):
        leave(count)
        assert len(checked(checkpoint_every=every)) == noted
    leave(2)
    (line,) = faults(checked, checkpoint_every="1")
    assert "MB are free, results and checkpoints need" in line
    checked(checkpoint_every="1", eval_only="x")  # writes none


def test_room_for_all_that_a_run_writes(checked, dataset, monkeypatch):
    """To the byte: weights, script, tokenizer, logs, proof, columns; nothing is begun without."""
    cfg = tiny(vocab_size=1024)
    (shard,) = dataset.glob("*_val_*.bin")
    val = shard.stat().st_size
    need = train_gpt.payload_type(train_gpt.parameter_specs(cfg)).itemsize + 10**6
    need += SCRIPT.stat().st_size + (dataset / "tokenizer.model").stat().st_size
    for changes, each in (
        ({}, 3),
        (dict(save_scores=True), 31),
        (dict(ngram_scheme="pr864"), 59),
        (dict(eval_only="x"), 3),
    ):
        for free, enough in ((need + each * val, True), (need + each * val - 1, False)):
            usage = types.SimpleNamespace(free=free)
            monkeypatch.setattr(shutil, "disk_usage", lambda _, usage=usage: usage)
            if enough:
                checked(**changes)
            else:
                (line,) = faults(checked, **changes)
                assert "MB are free, results and checkpoints need" in line


def test_memory_for_lanes(checked, monkeypatch):
    """Lanes that wait for documents are none: twelve documents; keys and values of two heads of 8
    in four layers, three float64 distributions over 1,024 tokens, a block of the codec's text."""
    need = 12 * (4 * 2 * 2048 * 16 * 4 + 3 * 8 * 1024 + 2 * train_gpt.LANE_BLOCK)
    lanes = dict(scorer="documents", eval_lanes=4096, eval_seq_len=2048, eval_stride=2048)
    for free, enough in ((need, True), (need - 1, False)):
        monkeypatch.setattr(train_gpt, "available_memory", lambda free=free: free)
        if enough:
            checked(**lanes)
        else:
            (line,) = faults(checked, **lanes)
            assert line.startswith("EVAL_LANES=4096: needs 0.0 GB at least, cpu has ")
    monkeypatch.setattr(train_gpt, "available_memory", lambda: None)
    checked(**lanes)


@pytest.mark.parametrize("name", ["fa3", "fa4"])
def test_flash_attention_that_is_not_here(name, monkeypatch):
    with pytest.raises(train_gpt.ConfigError, match=f"ATTN_IMPL={name}: .*CUDA.*; fix: ATTN_IMPL="):
        train_gpt.use_attention(name, False)

    def absent(_):
        raise ImportError("No module named 'flash'")

    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", absent)
    with pytest.raises(train_gpt.ConfigError, match="No module named 'flash'; fix: ATTN_IMPL=auto"):
        train_gpt.use_attention(name, True)


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
    with room(100), pytest.raises(train_gpt.UserError, match="too large"):
        compress.place(tmp_path / "a.pgz", bytes(500), 0o600)
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
    [(len(train_gpt.CODE.read_bytes()) + 1000, "artifact.bin"), (1_000, "train_gpt.py")],
    ids=["artifact", "all"],
)
def test_full_disk(size, missing, dataset, tmp_path):
    """One line, status 2; what could not be written whole is not there"""
    done = small_disk(variables(dataset, RUN_ID="full", MODEL_DIM="192"), tmp_path, size)
    *notes, line = done.stderr.splitlines()
    assert done.returncode == 2 and "too large" in line
    assert f"{missing}: " in line and "fix" in line
    left = {path.name for path in (tmp_path / "runs/full").iterdir()}
    assert not {"artifact.bin", "submission.json", "blocks.npz", "report.png", missing} & left
    if missing == "artifact.bin":
        assert notes == [] and "step:2/2" in (tmp_path / "runs/full/log.txt").read_text()
    else:
        assert all("log.txt: " in note or "metrics.jsonl: " in note for note in notes)
        assert len(notes) == 2


@pytest.mark.slow
def test_a_small_disk_is_seen_before_training(dataset, tmp_path):
    """300 KB, in a tmpfs, where one can be mounted."""
    mount = f"mount -t tmpfs -o size=300k none {tmp_path} && cd {tmp_path} && $RUN"
    out, err, status = shell(f"unshare -m bash -c '{mount}'", tmp_path, **variables(dataset))
    if "mount" in err or "unshare" in err:
        pytest.skip(err)
    (line,) = err.splitlines()
    assert status == 2 and "0.3 MB are free, results and checkpoints need" in line
    assert "step:" not in out


def test_columns_on_a_full_disk_are_a_note(dataset, tmp_path, monkeypatch):
    """They serve statistics alone: every final line and submission.json stand."""
    write = train_gpt.write_atomically

    def full(path, content):
        if path.suffix == ".npz":
            with room(100):
                return write(path, content)
        return write(path, content)

    monkeypatch.setattr(train_gpt, "write_atomically", full)
    run = run_here(tmp_path, "full", **variables(dataset, SAVE_SCORES="1"))
    for name in ("blocks.npz", "scores.npz"):
        (note,) = [line for line in run.lines if line.startswith(f"note:no {name}: ")]
        assert "too large" in note and not (run.folder / name).exists()
    assert run.submission()["val_bpb"] == run.val_bpb() and run.final("budget")


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
    table = out[len(run.lines) :]
    assert run.lines == out[: len(run.lines)] and table[0] == "" and "bits per byte" in table[1]
    assert run.final("ngram_exact") and run.final("budget")
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
    with hosts(folders, ENV | dict(SEED="7", OVERWRITE="1"), dataset) as both:
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


# -----------------------------------------------------------------------------
# Files that anybody may have put there

HOSTILE = {
    "a link": (lambda path: path.symlink_to(__file__), "is a link"),
    "a link to a device": (lambda path: path.symlink_to("/dev/zero"), "is a link"),
    "a dangling link": (lambda path: path.symlink_to("nowhere"), "is a link"),
    "a link to itself": (lambda path: path.symlink_to(path), "is a link"),
    "a pipe": (os.mkfifo, "is no regular file"),
    "a folder": (Path.mkdir, "directory"),
    "too much": (lambda path: path.write_bytes(bytes(101)), "has 101 bytes, at most 100"),
    "a sparse file": (lambda path: (path.touch(), os.truncate(path, 2**40)), "at most 100"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_only_regular_files_are_read(name, tmp_path):
    """At once, without memory, and with a reason that can be shown."""
    make, reason = HOSTILE[name]
    make(tmp_path / "file")
    with pytest.raises(OSError) as caught:
        train_gpt.read_regular(tmp_path / "file", 100)
    assert reason in caught.value.strerror and str(tmp_path / "file") in str(caught.value)


def test_a_regular_file_is_read_whole(tmp_path):
    (tmp_path / "file").write_bytes(bytes(100))
    assert train_gpt.read_regular(tmp_path / "file", 100) == bytes(100)
    with pytest.raises(FileNotFoundError):
        train_gpt.read_regular(tmp_path / "none")


@pytest.mark.parametrize("way", [b"new", lambda path: path.write_bytes(b"new")])
def test_a_file_is_never_written_through_a_link(way, tmp_path):
    """Neither where it goes nor where it is made; its rights are those of any new file."""
    other = tmp_path / "other"
    other.write_text("mine")
    for name in (".partial_file", ".file.partial", "file"):
        (tmp_path / name).symlink_to(other)
    train_gpt.write_atomically(tmp_path / "file", way)
    assert other.read_text() == "mine" and not (tmp_path / "file").is_symlink()
    assert (tmp_path / "file").read_bytes() == b"new"
    (tmp_path / "plain").write_bytes(b"")
    modes = {(tmp_path / name).stat().st_mode for name in ("file", "plain")}
    assert len(modes) == 1


def test_a_failed_write_leaves_nothing(tmp_path):
    def fail(path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(train_gpt.UserError, match="make room"):
        train_gpt.write_atomically(tmp_path / "file", fail)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"old"
    with pytest.raises(train_gpt.UserError, match="mkdir"):
        train_gpt.write_atomically(tmp_path / "none/file", b"")


def test_a_killed_writer_s_file_goes_with_the_next_run(tmp_path):
    (tmp_path / f"{train_gpt.PARTIAL}x_stream.bin").write_bytes(b"half")
    train_gpt.clear_run(tmp_path)
    assert not list(tmp_path.iterdir())


def test_logs_are_no_links(tmp_path):
    """Of a folder that came from elsewhere: lines are added to no other file, and none is cut."""
    other = tmp_path / "other"
    other.write_text("mine, and long")
    (tmp_path / "log.txt").symlink_to(other)
    with pytest.raises(OSError):
        train_gpt.LogFile(tmp_path / "log.txt")
    assert other.read_text() == "mine, and long"


def test_memory_is_asked_for_before_it_is_taken(monkeypatch):
    monkeypatch.setattr(train_gpt, "available_memory", lambda: 1000)
    train_gpt.require_memory(1000, "a thing")
    with pytest.raises(train_gpt.LackOfMemory, match="a thing: 1,001 bytes of memory, 1,000 are"):
        train_gpt.require_memory(1001, "a thing")
    monkeypatch.setattr(train_gpt, "available_memory", lambda: None)
    train_gpt.require_memory(2**60, "nobody knows")
