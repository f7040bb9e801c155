"""Invented run folders, small and finished, for the tests of the tools that read them."""

import json
import math

import numpy as np

CODE = b"print()\n"
ARTIFACT = bytes(range(256)) * 4
TOKENIZER = b"a tokenizer"
CONFIG = """SEED=7
NUM_LAYERS=4
MODEL_DIM=128
SCORER=documents
"""
BLOCKS = 40


def line(key, value=None, **values):
    return {"key": key, "value": value} | values


def step_lines(last=600):
    """Training from 6.9 down, with a validation on the way and late QAT near the end."""
    steps = [*range(1, 11), *range(50, last + 1, 50)]
    for n in steps:
        times = dict(train_time_ms=270 * n, step_avg_ms=270.5, tokens_per_s=15000)
        yield line("step", f"{n}/{last}", train_loss=3 + 4 * n**-0.4, **times)
    yield line("step", f"300/{last}", val_loss=3.5, val_bpb=1.9, step_avg_ms=270.5)
    yield line("late_qat:enabled", step=550, scale=0.15)


def exact(stage, bpb, **more):
    return line(f"final_{stage}_exact", val_loss=2 * bpb, val_bpb=bpb, **more)


def final_lines():
    yield exact("int6_roundtrip", 1.85)
    yield exact("int6_sliding_window", 1.83, stride=64)
    yield exact("ngram_backoff", 1.76, orders="2-7")
    yield exact("ngram", 1.7123456789012345, mixer="blend", orders="2-9", mass_error=1e-15)
    sizes = dict(code=len(CODE), packed=len(CODE) // 3, weights=len(ARTIFACT))
    sizes["total"] = sizes["packed"] + sizes["weights"]
    yield line("final_artifact_bytes", **sizes, cap=16_000_000)
    yield line("final_budget", train_seconds=162.3, eval_seconds=21.5, cap="600/600")


def optional_lines():
    for order, saved in ((1, -50.5), (2, 900.0), (3, 1500.0), (4, 700.0)):
        yield line("ngram_gain", order, positions=1000, share=0.25, bits_saved=saved)
    masses = dict(scheme="pr864", mass_mean=37.2, mass_max=512.0, weights="artifact")
    yield line("final_ngram_pseudo", pseudo_bpb=0.28, **masses)
    proof = dict(coded_bytes=99, claimed_bytes=98.5, proved_tokens=500, total_tokens=9000)
    yield line("final_codec", **proof, decoded="ok")


def all_lines(training=True):
    settings = dict(RECORD="tiny(default)", RUN_ID="given(env)", SEED="7(env)")
    yield line("config", "Run", **settings)
    yield line("hardware", "1 x cpu x86_64", python="3.11.7", torch="2.13.0")
    yield line("val_text", tokens=BLOCKS * 1024, bytes=BLOCKS * 2500)
    if training:
        yield line("model_params", 829_868)
        yield from step_lines()
    yield from optional_lines()
    yield from final_lines()


def write_log(folder, lines):
    text = "".join(json.dumps(item) + "\n" for item in lines)
    (folder / "metrics.jsonl").write_text(text)


def write_blocks(folder, gain=0.1, count=BLOCKS):
    """Blocks of 2,500 bytes that save `gain` bits a byte, more and more of it."""
    sizes = np.full(count, 2500)
    model = -1.83 * math.log(2) * sizes
    saved = gain * np.linspace(-0.2, 1, count) * sizes * math.log(2)
    np.savez(folder / "blocks.npz", bytes=sizes, logp_model=model, logp_final=model + saved)


def make_run(folder, lines=None, **blocks):
    """A small run folder as train_gpt.py leaves it."""
    folder.mkdir(parents=True)
    write_log(folder, all_lines() if lines is None else lines)
    write_blocks(folder, **blocks)
    files = {"train_gpt.py": CODE, "artifact.bin": ARTIFACT, "tokenizer.model": TOKENIZER}
    for name, data in files.items():
        (folder / name).write_bytes(data)
    (folder / "config.env").write_text(CONFIG)
    return folder


def edit(path, before, after):
    text = path.read_text(encoding="utf-8")
    assert before in text
    path.write_text(text.replace(before, after), encoding="utf-8")
