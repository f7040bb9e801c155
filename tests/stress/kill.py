"""Kill a training run again and again, start it again with RESUME=auto, and compare its end, bit
for bit, with that of a run that nobody interrupted.

  python tests/stress/kill.py  # 100 kills of one rank
  python tests/stress/kill.py --kills 20 --ranks 2  # torchrun, gloo

SIGKILL goes to every process of a launch: while it starts, trains, writes a checkpoint or scores;
in place of some of them SIGHUP to its first process, twice, as when an SSH session ends.
After some of the kills the newest checkpoint is cut or altered as well, as a loss of power can
leave it; the one before must do then. Exit status 1: something differs. One rank is a fork of this
process, which has imported torch; several are torchrun's, from scratch.
"""

import os
import re

if __name__ == "__main__":  # a process with threads must not be forked
    os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1")

import argparse
import collections
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import numpy as np
from helpers import SCRIPT, SHRUNK, Run, clean_environment, train_gpt

STEPS = 40
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")
SETTINGS = SHRUNK | dict(
    ITERATIONS=f"{STEPS}",
    WARMDOWN_ITERS="30",
    MAX_WALLCLOCK_SECONDS="0",
    VAL_LOSS_EVERY="16",
    NUM_LAYERS="2",
    VE_LAYERS="1",
    RESUME="auto",
)
TIMINGS = ("seconds", "_ms", "per_s", "eta", "mfu", "memory")
AGAIN = {"resumed", "note", "peak_memory_mb"}  # of an interrupted run alone, or of the process
PLACES = ("start", "training", "writing", "evaluation")


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument(
        "--damage", type=float, default=0.1, help="share of kills that damage a file"
    )
    parser.add_argument("--hangups", type=float, default=0.1, help="share of SIGHUPs")
    parser.add_argument("--folder", type=Path, help="to keep the runs in; else a temporary one")
    return parser.parse_args()


# -----------------------------------------------------------------------------
# A launch of the script


class Launch:
    """One start of a run, in a session of its own, with its output in a file."""

    def __init__(self, cwd, run_id, env, ranks):
        self.cwd, self.folder, self.ranks, self.began = (
            cwd,
            cwd / "runs" / run_id,
            ranks,
            time.time(),
        )
        self.mark = f"{run_id}_{self.began}"
        self.path, self.status = cwd / f"{run_id}.out", None
        self.path.unlink(missing_ok=True)  # of the launch before
        env = (
            SETTINGS | dict.fromkeys(THREADS, "1") | env | dict(RUN_ID=run_id, KILL_MARK=self.mark)
        )
        self.pid = self.torchrun(env) if ranks > 1 else self.fork(env)

    def fork(self, env):
        if pid := os.fork():
            return pid
        status = 1
        try:
            os.setsid()
            signal.signal(signal.SIGHUP, signal.SIG_DFL)
            os.chdir(self.cwd)
            os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
            out = os.open(self.path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
            os.dup2(out, 1)
            os.dup2(out, 2)
            os.environ.clear()
            os.environ.update(clean_environment() | env)
            sys.argv = [str(SCRIPT)]
            train_gpt.main()
            status = 0
        except SystemExit as end:
            status = end.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def torchrun(self, env):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc_per_node={self.ranks}", str(SCRIPT)]
        with open(self.path, "wb") as out:
            env = clean_environment() | env
            streams = dict(stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
            self.process = subprocess.Popen(command, cwd=self.cwd, env=env, **streams)
        return self.process.pid

    def text(self):
        return self.path.read_text(errors="replace") if self.path.exists() else ""

    def alive(self):
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = os.waitstatus_to_exitcode(status) if pid else None
        return self.status is None

    def wait(self, sees):
        """Until sees(), unless it ends before -> whether it is alive."""
        while self.alive() and not sees():
            time.sleep(0.0003)
        return self.alive()

    def kill(self):
        """Every process of it -> whether there was one to kill."""
        if not self.alive():
            return False
        kill_one(self.pid)
        kill_one(-self.pid)  # its session, if it has come to have one
        while self.ranks > 1 and (
            pids := self.marked()
        ):  # torchrun's ranks have their own sessions
            for pid in pids:
                kill_one(pid)
        while self.alive():
            time.sleep(0.001)
        return True

    def hang_up(self):
        """SIGHUP, twice, and wait for its end -> whether there was one to end."""
        if not self.alive():
            return False
        for _ in range(2):
            kill_one(self.pid, signal.SIGHUP)
        while self.alive() or (self.ranks > 1 and self.marked()):
            time.sleep(0.001)
        return True

    def marked(self):
        """Processes that inherited this launch's environment."""
        found, mark = [], f"KILL_MARK={self.mark}".encode()
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                if mark in path.read_bytes():
                    found.append(int(path.parent.name))
            except OSError:  # gone, or another user's
                continue
        return found


def kill_one(pid, number=signal.SIGKILL):
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


# -----------------------------------------------------------------------------
# A kill


def planned(rng, count):
    """Of one run: (place, step from which on), those in the evaluation last."""
    places = rng.choice(PLACES, count, p=[0.1, 0.4, 0.3, 0.2])
    steps = [STEPS if place == "evaluation" else int(rng.integers(1, STEPS)) for place in places]
    return sorted(zip(places.tolist(), steps, strict=True), key=lambda kill: kill[1])


def wait_for(launch, place, step, lasts, rng):
    """The moment to kill it; lasts: place -> seconds of it in an uninterrupted run."""
    if place == "evaluation":
        launch.wait(lambda: "\naverages" in launch.text())
    elif place != "start":
        launch.wait(lambda: last_step(launch.text()) >= step)
        if place == "writing":
            launch.wait(lambda: any((launch.folder / "checkpoint").glob(".partial_*")))
    until = time.time() + rng.uniform(0, lasts[place])
    launch.wait(lambda: time.time() >= until)


def last_step(text):
    found = re.findall(r"^(?:resumed )?step:(\d+)", text, re.MULTILINE)
    return int(found[-1]) if found else 0


def where(launch):
    """The place that a killed launch had come to, by what it left."""
    files = [*(launch.folder / "checkpoint").glob("*")]
    kept = {path.stem for path in files if path.suffix == ".json" and path.name[0] != "."}
    new = [path for path in files if path.stat().st_mtime >= launch.began]
    if any(path.stem not in kept for path in new):
        return "writing"
    text = launch.text()
    return "evaluation" if "\naverages" in text else "training" if "\nstep:" in text else "start"


def whole(path):
    try:
        train_gpt.read_checkpoint(path)
    except Exception:
        return False
    return True


def damage(folder, rng):
    """Cut or alter the newest checkpoint where the one before is whole -> what was done, or ''"""
    paths = sorted(folder.glob("checkpoint/step_*.json"))
    if len(paths) < 2 or not all(map(whole, paths)):
        return ""
    path = paths[-1].with_suffix(str(rng.choice([".json", ".safetensors"])))
    data, place = bytearray(path.read_bytes()), int(rng.integers(path.stat().st_size))
    cut = bool(rng.integers(2))
    if cut:
        del data[place:]
    else:
        data[place] ^= 1 << int(rng.integers(8))
    path.write_bytes(data)
    return f"{path.name} {'cut at' if cut else 'altered at'} byte {place}"


# -----------------------------------------------------------------------------
# A run, and its end


def without_timings(row):
    return {k: v for k, v in row.items() if not any(word in k for word in TIMINGS)}


def outcome(folder):
    """What must be equal: the artifact, the sums of the scores, and each line from the first step
    on, in order, in full precision, without seconds."""
    run = Run(folder)
    rows = [without_timings(row) for row in run.metrics() if row["key"] not in AGAIN]
    first = next(i for i, row in enumerate(rows) if row["key"] == "step")
    header = {row["key"] for row in rows[:first]}  # each start writes it
    words = [line.split()[0] for line in run.lines]
    return dict(
        artifact=train_gpt.sha256(run.artifact),
        blocks={name: column.tobytes() for name, column in run.arrays("blocks.npz").items()},
        rows=[row for row in rows if row["key"] not in header],
        lines=[word for word in words if word.startswith(("step:", "final_", "averages"))],
        val_bpb=run.submission()["val_bpb"],
    )


def reference(cwd, data, ranks):
    """An uninterrupted run -> its outcome, seconds of each place"""
    launch = Launch(cwd, "whole", dict(DATA_PATH=data), ranks)
    marks = [time.time()]
    for word in ("\nstep:", "\naverages", "\0never"):
        launch.wait(lambda word=word: word in launch.text())
        marks.append(time.time())
    if launch.status:
        sys.exit(f"the uninterrupted run failed:\n{launch.text()}")
    start, training, evaluation = np.diff(marks)
    lasts = dict(start=start, training=2 * training / STEPS, writing=0.01, evaluation=evaluation)
    return outcome(launch.folder), lasts


def interrupted(cwd, run_id, env, plan, task):
    """Kill a run as planned, then let it end -> its Launch; prints a line a kill."""
    ranks, lasts, rng, counts, options = task
    for place, step in plan:
        launch = Launch(cwd, run_id, env, ranks)
        wait_for(launch, place, step, lasts, rng)
        hangs_up = rng.random() < options.hangups
        if not (launch.hang_up() if hangs_up else launch.kill()):
            break
        counts["hangups"] += hangs_up
        text = launch.text()
        count_notes(text, counts)
        counts["kills"] += 1
        counts[(found := where(launch))] += 1
        hurt = damage(launch.folder, rng) if rng.random() < options.damage else ""
        counts["damaged"] += bool(hurt)
        paths = [*filter(whole, sorted(launch.folder.glob("checkpoint/step_*.json")))]
        line = f"kill {counts['kills']}: {run_id} in {found} "
        line += f"after {time.time() - launch.began:.2f} s, "
        line += f"step {last_step(text)}, checkpoint {paths[-1].stem if paths else 'none'}"
        print(line + (f"; {hurt}" if hurt else ""), flush=True)
    else:
        launch = Launch(cwd, run_id, env, ranks)
        launch.wait(lambda: False)
    count_notes(launch.text(), counts)
    return launch


def count_notes(text, counts):
    counts["resumed"] += "\nresumed " in text
    counts["over"] += text.count("is passed over")


def differences(launch, wanted):
    """Names of what is not as in the uninterrupted run."""
    if launch.status:
        return [f"exit status {launch.status}: {launch.text()[-2000:]}"]
    try:
        found = outcome(launch.folder)
    except Exception as error:  # a run that claims to have ended, without its files
        return [f"{type(error).__name__}: {error}"]
    for name in ("rows", "lines"):
        for ours, theirs in zip(found[name], wanted[name], strict=False):
            if ours != theirs:
                print(f"  {name}: {ours} instead of {theirs}")
                break
    return [name for name in wanted if found[name] != wanted[name]]


def make_data(folder):
    """A small dataset of real prose, by a process of its own: it starts threads."""
    code = """import sys, helpers, numpy as np, prepare, prepare_text
from pathlib import Path
train, val = prepare.sample_documents()
short = [" ".join(part) for text in val[:1] for part in np.array_split(text.split(" "), 6)]
prepare_text.write_dataset(train[:40], short, Path(sys.argv[1]), "prose", 512)"""
    command = [sys.executable, "-c", code, str(folder)]
    env = os.environ | dict(PYTHONPATH=str(Path(__file__).parents[1]))
    subprocess.run(command, env=env, check=True, stdout=subprocess.DEVNULL)


def summary(options, counts, bad):
    told = dict(
        kills="processes killed",
        hangups="of them by SIGHUP",
        start="while it started or read a checkpoint",
        training="in training",
        writing="while a checkpoint was written",
        evaluation="in the evaluation",
        damaged="newest checkpoint damaged as well",
        over="damaged checkpoints passed over",
        resumed="starts that went on from a checkpoint",
        runs="runs that came to their end",
    )
    print(f"\n| {options.ranks} rank(s), torch {train_gpt.torch.__version__} | count |\n|---|---|")
    for name, text in told.items():
        print(f"| {text} | {counts[name]} |")
    print(f"| of them different from the uninterrupted run | {bad} |")


def main():
    options = arguments()
    signal.signal(signal.SIGHUP, lambda *_: None)  # nohup would hide it from what we start
    rng, counts, bad = np.random.default_rng(options.seed), collections.Counter(), 0
    with tempfile.TemporaryDirectory() as temporary:
        cwd = (options.folder or Path(temporary)).resolve()
        cwd.mkdir(parents=True, exist_ok=True)
        data = str(cwd / "prose")
        make_data(data)
        for name in ("numba", "zstandard", "safetensors.torch"):  # once, not in each fork
            train_gpt.package(name)
        if options.ranks == 1 and len(os.listdir("/proc/self/task")) > 1:
            sys.exit("this process has threads; fix: nothing may start one before the forks")
        wanted, lasts = reference(cwd, data, options.ranks)
        print(f"uninterrupted: artifact {wanted['artifact'][:16]}, val_bpb {wanted['val_bpb']}")
        task = options.ranks, lasts, rng, counts, options
        while counts["kills"] < options.kills and not bad:
            every = str(rng.integers(1, 4))
            left = options.kills - counts["kills"]
            plan = planned(rng, min(left, int(rng.integers(5, 16))))
            env = dict(DATA_PATH=data, CHECKPOINT_EVERY=every)
            launch = interrupted(cwd, f"run{counts['runs']}_every{every}", env, plan, task)
            counts["runs"] += 1
            different = differences(launch, wanted)
            bad += bool(different)
            verdict = f"DIFFERENT: {', '.join(different)}" if different else "equal"
            print(f"{launch.folder.name}: {verdict}", flush=True)
    summary(options, counts, bad)
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
