"""Disks that are full or cannot be written: nothing half-written passes for whole, the message says
what to do, and what was computed is not lost. Root may write anywhere, so permissions prove
nothing here: a folder stands where a file should go, a file where a folder should, or there is no
room left, by a limit on the size of files (EFBIG) or by the error itself (ENOSPC)."""

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
from pathlib import Path

import compress
import numpy as np
import plot  # noqa: E402
import pytest
import run_folder  # noqa: E402
from helpers import (
    SHRUNK,
    launch,
    run_here,
    shared_folder,
    train_gpt,
)

import prepare_text


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
