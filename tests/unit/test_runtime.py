"""The bar on a terminal, no byte of it elsewhere; figures of the step lines."""

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
import types

import pytest
import torch
from helpers import ROOT, clean_environment, perturbed, random_ids, tiny, train_gpt
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

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
