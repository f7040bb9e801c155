"""Fixtures: one tiny dataset, one set of whole runs, one pair of ranks a session; one thread a
process."""

import functools
import json
import os
import signal

import numpy as np
import pytest
import torch
from helpers import (
    ROOT,
    SHRUNK,
    SMOKE_RUNS,
    Run,
    clean_environment,
    finished_run,
    launch,
    run_here,
    shared_folder,
    tiny,
    train_gpt,
    worker_number,
    write_shard,
)
from ranks_worker import JOBS, STREAM

import prepare
import prepare_text

for name in os.environ.keys() - clean_environment().keys():
    del os.environ[name]
torch.set_num_threads(1)
for number in (signal.SIGHUP, signal.SIGINT):  # under nohup or in a shell's background, which
    if signal.getsignal(number) == signal.SIG_IGN:  # we keep to, but what we start is to hear them
        signal.signal(number, lambda *_: None)


@pytest.fixture(autouse=True)
def one_thread():
    """Worker processes share the cores; some tests start a Runtime, which sets the number."""
    torch.set_num_threads(1)


@pytest.fixture
def rt():
    """This process alone, on the CPU."""
    return train_gpt.Runtime(tiny())


@pytest.fixture
def no_picture(monkeypatch):
    """Runs in this process end without submission.json and report.png, which take seconds."""
    monkeypatch.setattr(train_gpt, "close_run", lambda rt: None)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    """Folder of a small dataset of real prose: 40 documents, 12 short ones for validation, 512
    pieces."""
    train, val = prepare.sample_documents()
    folder = tmp_path_factory.mktemp("data") / "prose"
    short = [" ".join(part) for text in val[:2] for part in np.array_split(text.split(" "), 6)]
    prepare_text.write_dataset(train[:40], short, folder, "prose", 512)
    return folder


@pytest.fixture(scope="session")
def train_tokens(dataset):
    (path,) = dataset.glob("*_train_*.bin")
    return train_gpt.read_shard(path, 512)


@pytest.fixture(scope="session")
def vocab_1024(tmp_path_factory):
    """Path of a tokenizer with exactly 1,024 pieces."""
    train, _ = prepare.sample_documents()
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(prepare_text.train_tokenizer(train[:200], 1024))
    return path


# -----------------------------------------------------------------------------
# What several files read of one run


ORDERS = (  # in which xdist's even and odd workers set out, so that they meet halfway
    ["one", "again", "eval_1", "other_seed", "two_ranks", "eval_2"],
    ["two_ranks", "other_seed", "again", "one", "eval_2", "eval_1"],
)


@pytest.fixture(scope="session")
def smoke_run(tmp_path_factory, dataset):
    """-> function: the Run of a name of SMOKE_RUNS, made when first asked for"""

    @functools.cache
    def make(name):
        ranks, env = SMOKE_RUNS[name]
        env = SHRUNK | env | dict(DATA_PATH=str(dataset))
        if name.startswith("eval"):
            env["EVAL_ONLY"] = str(make("one").folder / "artifact.bin")
        with shared_folder(tmp_path_factory, f"smoke_{name}") as (cwd, empty):
            if empty and ranks:
                finished_run(cwd, name, ranks, **env)
            elif empty:
                run_here(cwd, name, **env)
        return Run(cwd / "runs" / name)

    return make


@pytest.fixture(scope="session")
def runs(smoke_run):
    """name -> Run, all of them."""
    return {name: smoke_run(name) for name in ORDERS[worker_number() % 2]}


@pytest.fixture
def again(smoke_run, dataset, tmp_path):
    """-> function: the artifact of "one" scored again, under other settings -> Run"""
    known = dict(DATA_PATH=str(dataset), EVAL_ONLY=str(smoke_run("one").folder / "artifact.bin"))
    return functools.partial(run_here, tmp_path, "again", **SHRUNK, **known)


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory):
    """job -> [weights of rank 0, of rank 1]; what rank 0 printed; one launch for all."""
    with shared_folder(tmp_path_factory, "two_ranks") as (folder, empty):
        if empty:
            write_shard(folder / "stream_train_000000.bin", STREAM)
            worker = ROOT / "tests/unit/ranks_worker.py"
            done = launch(worker, [folder], {}, 2, folder)
            assert done.returncode == 0, done.stdout + done.stderr[-3000:]
            (folder / "stdout").write_text(done.stdout)
    found = {
        name: [dict(np.load(folder / f"{name}_rank{rank}.npz")) for rank in range(2)]
        for name in JOBS
    }
    left = [json.loads((folder / f"threads_rank{rank}.json").read_text()) for rank in range(2)]
    largest = [json.loads((folder / f"largest_rank{rank}.json").read_text()) for rank in range(2)]
    return found | dict(threads=left, largest=largest, stdout=(folder / "stdout").read_text())
