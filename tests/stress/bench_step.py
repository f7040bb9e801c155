"""Tokens per second and memory of training steps, one switch of own's training at a time.

    python tests/stress/bench_step.py [--record tiny] [--steps 20] [--rounds 3] [NAME=VALUE ...]

Each row is the RECORD, without own's training, with one thing of it on, in a process of its own on
random tokens with a document every 300 or so. Rounds go over all rows, so that a busy minute of the
machine falls on all alike; a row's speed is that of its fastest round, its ratio that to the first
row's. Memory is the process's largest resident size. NAME=VALUE: settings of all rows.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from helpers import PLAIN, clean_environment, train_gpt, write_shard  # noqa: E402

OFF = {name.upper(): train_gpt.show(value) for name, value in PLAIN.items()}
ROWS = {
    "none of it": {},
    "DOC_ATTENTION=1": dict(DOC_ATTENTION="1"),
    "loops, before they begin": dict(LOOP_LAYERS="1-2", LOOP_FROM="0.99"),
    "loops": dict(LOOP_LAYERS="1-2", LOOP_FROM="0"),
    "PARALLEL_FROM=2": dict(PARALLEL_FROM="2"),
    "SKIP_GATES=1": dict(SKIP_GATES="1"),
    "MLP_MULT=4": dict(MLP_MULT="4"),
    "SHUFFLE=1": dict(SHUFFLE="1"),
    "MUON_ROW_NORM=1": dict(MUON_ROW_NORM="1"),
}
WARM_UP = 3  # steps


def shard(path, vocab_size, count=1_000_000):
    tokens = np.random.default_rng(0).integers(2, vocab_size, count)
    tokens[np.random.default_rng(1).random(count) < 1 / 300] = train_gpt.BOS
    return write_shard(path, tokens)


def measure(steps):
    """Of this process's variables -> ms a step, MB."""
    cfg = train_gpt.Config.from_env(os.environ)
    rt = train_gpt.Runtime(cfg)
    rt.log = lambda *_, **__: None
    rt.start()
    with tempfile.TemporaryDirectory() as folder:
        path = shard(Path(folder, "x_train_000000.bin"), cfg.vocab_size)
        model = train_gpt.GPT(cfg).initialise().to(rt.device)
        trainer = train_gpt.Trainer(model, train_gpt.training_loader(cfg, [path]), rt, cfg)
        times = []
        for _ in range(WARM_UP + steps):
            began = time.perf_counter()
            trainer.update(1.0).item()
            times.append(time.perf_counter() - began)
        trainer.batches.close()
    torch.set_num_threads(1)
    return dict(seconds=float(np.median(times[WARM_UP:])), mb=rt.peak_memory())


def run(env, steps):
    command = [sys.executable, __file__, "--measure", "--steps", str(steps)]
    done = subprocess.run(command, env=clean_environment() | env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("settings", nargs="*", metavar="NAME=VALUE")
    parser.add_argument("--record", default="tiny")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        return print(json.dumps(measure(args.steps)))
    base = dict(RECORD=args.record, DEVICE="cpu", VOCAB_SIZE="1024") | OFF
    base |= dict(setting.split("=", 1) for setting in args.settings)
    found = {name: [] for name in ROWS}
    for _ in range(args.rounds):
        for name, changes in ROWS.items():
            found[name].append(run(base | changes, args.steps))
    tokens = train_gpt.Config.from_env(base).train_batch_tokens
    first = min(each["seconds"] for each in found["none of it"])
    print("| row | ms a step | tokens/s | time, ratio | MB |\n|---|---|---|---|---|")
    for name, runs in found.items():
        seconds = min(each["seconds"] for each in runs)
        mb = max(each["mb"] for each in runs)
        cells = f"{1e3 * seconds:.0f}", f"{tokens / seconds:,.0f}", f"{seconds / first:.2f}"
        print(f"| {name} | {' | '.join(cells)} | {mb:,} |")


if __name__ == "__main__":
    main()
