"""Several hosts: torchrun's agents on loopback, each with a folder and a core of its own.

The slow ones: python -m pytest -m slow tests/unit/test_nodes.py
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
from helpers import SCRIPT, SHRUNK, Run, clean_environment, finished_run

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
