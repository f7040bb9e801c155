"""estimate.py: FLOPs, bytes and launches from shapes, beside a hand computation, torch's own count
and the emulated device; what is printed for every RECORD."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import estimate
import numpy as np
import pytest
import torch
from helpers import ROOT, clean_environment, train_gpt
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

SMALL = dict(  # of the emulated device
    NUM_LAYERS="3",
    MODEL_DIM="128",
    NUM_HEADS="4",
    NUM_KV_HEADS="2",
    TRAIN_SEQ_LEN="256",
    TRAIN_BATCH_TOKENS="1024",
    VOCAB_SIZE="512",
    EVAL_LANES="16",
    LOOP_LAYERS="1-1",
    LOOP_FROM="0",
    PARALLEL_FROM="2",
)
RECORDS = ["own", *estimate.PUBLISHED]


def shape_of(record, **changes):
    return estimate.configuration({"RECORD": record}, **changes)


def printed(capsys, *arguments):
    """What the program says in this process."""
    assert estimate.main([*arguments]) == 0
    return capsys.readouterr().out


# -----------------------------------------------------------------------------
# FLOPs, bytes, launches


def test_flops_of_a_small_model_by_hand():
    cfg = shape_of(
        "own",
        num_layers=2,
        model_dim=8,
        num_heads=2,
        num_kv_heads=1,
        mlp_mult=2.0,
        loop_layers="",
        gated_attention=False,
        gate_inputs=0,
        rope_dims=2,
        xsa_last_n=2,
        vocab_size=16,
        bigram_vocab_size=0,
        ve_enabled=False,
        train_seq_len=4,
        eval_stride=4,
    )
    layer = 8 * 8 + 4 * 8 + 4 * 8 + 8 * 8 + 8 * 16 + 16 * 8  # q, k, v, output, up, down
    assert estimate.weights(cfg) == 2 * layer + 16 * 8
    # q k and p v: 2 products of 2 * 8 a key in each of 2 layers
    assert estimate.attention_flops(cfg, keys=4) == 2 * 2 * 2 * 8 * 4
    assert estimate.products(cfg) == 2 * 6 + 1
    per_token = train_gpt.token_flops(cfg)
    assert per_token == 6 * (2 * layer + 128) + 3 * 2 * 2 * 2 * 8 * 4


@pytest.mark.parametrize("record", ["own", "pr864", "pr810", "pr808"])
def test_flops_are_those_that_torch_counts(record):
    cfg = shape_of(record, train_seq_len=16, eval_stride=16)
    ids = torch.zeros(1, 16, dtype=torch.long)
    model = train_gpt.GPT(cfg)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(ids, ids)
    flops = {str(name): n for name, n in counter.get_flop_counts()["Global"].items()}
    matrix = sum(flops.pop(name, 0) for name in ("aten.mm", "aten.addmm"))
    assert matrix == 2 * 16 * estimate.weights(cfg)
    assert sum(flops.values()) == 16 * estimate.attention_flops(cfg, 16)


EMULATED = """
import functools, json, os, sys
import emulated_cuda
from helpers import random_stream, write_shard
from tally import counted
from train_gpt import *

MUON = "Muon", "newton", "Optimizers", "Averages", "average_grad"
PRODUCTS = "mm", "addmm"

def sums(tally):
    works = [(name, place, work) for (name, place), work in tally.work.items()]
    rows = [(n, w) for n, place, w in works if not any(mark in place for mark in MUON)]
    rest = [(place, w) for n, place, w in works if any(mark in place for mark in MUON)]
    products = [w for name, w in rows if name in PRODUCTS]
    attention = [w for name, w in rows if "attention" in name or "attn" in name]
    return dict(
        products=sum(w.kernels for w in products),
        product_flops=sum(w.flops for w in products),
        attentions=sum(w.kernels for w in attention),
        attention_flops=sum(w.flops for w in attention),
        optimizer=sum(w.kernels for place, w in rest),
        newton_flops=sum(w.flops for place, w in rest),
        optimizer_bytes=sum(
            w.bytes for place, w in rest if "newton" not in place and "MuonBank" not in place
        ),
    )

cfg = Config.from_env({name: os.environ[name] for name in VARIABLES if name in os.environ})
shard = write_shard(Path("x_train_000000.bin"), random_stream(9000, cfg.vocab_size))
rt = Runtime(cfg)
rt.log = lambda *_, **__: None
model = GPT(cfg).to(rt.device)
trainer = Trainer(model, TokenLoader([shard], cfg.vocab_size), rt, cfg)
trainer.update(1.0)
with counted(work=True) as step:
    trainer.update(1.0)
with torch.no_grad():
    cache = LaneCache(model.eval(), cfg.eval_lanes, cfg.window)
    forward = lane_forward(model, rt, cache)
ids = torch.zeros(2, cfg.eval_lanes, dtype=torch.int64, device=rt.device)
with counted(work=True) as lanes, torch.no_grad():
    forward(*ids)
learner = LaneLearner(model.requires_grad_(False), rt, cfg, [cache])
learner.passes = [functools.partial(learner.back_propagate, cache)]  # not replayed: counted
learnt = torch.zeros(4, cfg.lane_ttt_every, cfg.eval_lanes, dtype=torch.int64, device=rt.device)
with counted(work=True) as learning:
    learner.learn(learnt)
works = learning.work.values()
learning = dict(kernels=sum(w.kernels for w in works), bytes=sum(w.bytes for w in works))
blend = Blend(weighed_orders("blend", cfg), rt)
blend.learned = 1 << 20
entropy = np.ones(blend.LARGEST_CHUNK)
recent = np.ones((len(entropy), REMEMBERED, 2), np.float32)
inputs = np.ones((len(blend.orders), len(entropy), 5), np.int32), entropy, recent
captured, chunk = blend.train_last_batch, []
for blend.train_last_batch in (blend.train, captured):
    with counted() as tally:
        given = blend.inputs(*inputs)
        blend.weights(*given)
        blend.learn(*given, expert_probabilities(blend, inputs[0], -entropy))
    chunk.append(tally.total("launch"))
found = dict(step=sums(step), lanes=sums(lanes), chunk=chunk, learning=learning)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """What a step, a step of lanes and a chunk of the blend ask of the emulated device."""
    if not shutil.which("g++"):
        pytest.skip("g++ builds the emulated device")
    folder = tmp_path_factory.mktemp("emulated")
    paths = [ROOT / "tests/emulated", ROOT, ROOT / "tests"]
    env = clean_environment() | SMALL | dict(RECORD="own", DEVICE="cuda", GRAD_ACCUM_STEPS="1")
    env |= dict(EMULATED_CUDA_HOLDS="meta", OMP_NUM_THREADS="1")
    env |= dict(PYTHONPATH=os.pathsep.join(map(str, paths)))
    command = [sys.executable, "-c", EMULATED]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def small(**changes):
    return estimate.configuration({"RECORD": "own"} | SMALL, **changes)


def test_a_step_is_that_of_the_emulated_device(emulated):
    """It counts all of attention, not the causal half, and what the backward pass makes again:
    4 + 10 times keys where the estimate has 4 + 8, halved."""
    cfg = small()
    step = emulated["step"]
    tokens = cfg.train_batch_tokens
    assert step["products"] == 3 * estimate.products(cfg)
    assert step["attentions"] == 2 * len(estimate.Shape.of(cfg).calls) == 10
    assert step["product_flops"] == pytest.approx(6 * tokens * estimate.weights(cfg), rel=0.01)
    attention = tokens * estimate.attention_flops(cfg, cfg.train_seq_len)
    assert step["attention_flops"] == pytest.approx(3.5 * attention)
    newton = estimate.newton_flops(estimate.Sizes.of(cfg).matrices, cfg.muon_backend_steps)
    assert step["newton_flops"] == pytest.approx(newton)


def test_the_optimizer_is_that_of_the_emulated_device(emulated):
    cfg = small()
    assert emulated["step"]["optimizer"] == pytest.approx(sum_of_launches(cfg), rel=0.1)
    moved = estimate.optimizer_bytes(cfg, 1)
    assert emulated["step"]["optimizer_bytes"] == pytest.approx(moved, rel=0.05)


def sum_of_launches(cfg):
    least, clipping, each = estimate.OPTIMIZER_LAUNCHES
    return least + clipping + each * len(estimate.Sizes.of(cfg).matrices)


def test_lanes_and_blend_are_those_of_the_emulated_device(emulated):
    cfg = small()
    lanes = emulated["lanes"]
    assert lanes["products"] == estimate.products(cfg)
    flops = 2 * cfg.eval_lanes * estimate.weights(cfg)
    assert lanes["product_flops"] == pytest.approx(flops, rel=0.01)
    attention = cfg.eval_lanes * estimate.attention_flops(cfg, cfg.window)
    assert lanes["attention_flops"] == pytest.approx(attention)
    assert emulated["chunk"] == list(estimate.CHUNK_LAUNCHES)


def test_learning_is_that_of_the_emulated_device(emulated):
    """Of one rank: nothing is gathered."""
    kernels, moved, _ = estimate.learning_work(small(), 1)
    assert emulated["learning"]["kernels"] == pytest.approx(kernels, rel=0.15)
    assert emulated["learning"]["bytes"] == pytest.approx(moved, rel=0.25)


KEPT = """
import sys
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table
from train_gpt import *

cfg = dict(RECORD="pr993", DEVICE="cpu", VOCAB_SIZE="1024", NUM_LAYERS="3", VE_LAYERS="1,2")
cfg = Config.from_env(cfg | dict(CLIP="global"))
graphs = []

def keep(graph, _):
    graphs.append(graph)
    return graph.forward

backend = aot_autograd(
    fw_compiler=keep, bw_compiler=keep, partition_fn=min_cut_rematerialization_partition,
    decompositions=select_decomp_table(),
)
ids = torch.randint(0, 1024, (2, 2048))
with torch.autocast("cpu", torch.bfloat16):
    torch.compile(GPT(cfg).initialise(), backend=backend, fullgraph=True, dynamic=False)(ids, ids)
(output,) = [node for node in graphs[0].graph.nodes if node.op == "output"]
values = [node.meta["val"] for node in output.args[0][1:] if hasattr(node, "meta")]
values = [value for value in values if isinstance(value, torch.Tensor) and len(value.shape) > 1]
large = [value for value in values if value.numel() >= ids.numel() and value.numel() % 4096 == 0]
weights = {tuple(weight.shape[-2:]) for weight in GPT(cfg).parameters() if weight.dim() > 1}
weights |= {shape[::-1] for shape in weights}
stacked = {(6, 512, 512), (3, 512, 1536)}  # scaled rows
large = [x for x in large if tuple(x.shape) not in weights and tuple(x.shape) not in stacked]
print(sum(value.numel() * value.element_size() for value in large) / 4096)
"""


@pytest.mark.slow
def test_what_is_kept_is_what_the_partitioner_keeps(tmp_path):
    """torch's own, on the graph of the model, all of whose layers exclude the own value."""
    env = clean_environment() | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    command = [sys.executable, "-c", KEPT]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    cfg = shape_of("pr993", num_layers=3, ve_layers=(1, 2))
    kept = estimate.forward(cfg, estimate.NOW, True).kept
    assert float(done.stdout) == pytest.approx(kept, rel=0.05)


# -----------------------------------------------------------------------------
# Properties


def test_it_is_calibrated_by_one_constant():
    assert estimate.pr549_seconds() * 1e3 == pytest.approx(estimate.PR549_MS, abs=0.1)
    calibrated = [name for name, r in estimate.RATES.items() if "calibrated" in r.source]
    assert calibrated == ["fused"]
    text = (ROOT / "records/tools/estimate.py").read_text(encoding="utf-8")
    used = set(re.findall(r'rate\("(\w+)"', text)) | {"launch", "eager", "zstd", "lzma", "range"}
    assert used == estimate.RATES.keys()


def test_published_runs_are_near(capsys):
    """None of them entered the model. #1026's machine and #810's optimizer are others."""
    for record in ("pr864", "pr993", "pr808"):
        ms, mib = estimate.PUBLISHED[record]
        cfg = shape_of(record)
        step = estimate.step_seconds(cfg, 8, estimate.PR549) * 1e3
        assert step == pytest.approx(ms, rel=0.03)
        held = estimate.training_memory(cfg, 8, estimate.PR549) / 2**20
        assert held == pytest.approx(mib, rel=0.02)


def test_loops_cost_from_the_moment_on():
    """17 blocks instead of 11, in 65 % of the time; the mean is of steps."""
    cfg = shape_of("own")
    plain, looped = (estimate.step_seconds(c, 8) for c in (estimate.before_loops(cfg), cfg))
    assert 1.3 < looped / plain < 17 / 11
    steps = 600 * 0.35 / plain + 600 * 0.65 / looped
    assert estimate.mean_step_seconds(cfg, 8) == pytest.approx(600 / steps)
    assert estimate.mean_step_seconds(shape_of("pr993"), 8) == estimate.step_seconds(
        shape_of("pr993"), 8
    )


def test_keys_of_a_row_by_counting():
    """Rows cut anywhere out of the documents end to end; FlexAttention's tiles aside."""
    cfg = shape_of("own")
    sizes = estimate.document_lengths()[:3000] + 1
    ids = np.zeros(sizes.sum(), int)
    ids[np.cumsum(sizes) - sizes] = 1
    rows = ids[: len(ids) // 2048 * 2048].reshape(-1, 2048)
    place = np.arange(2048)
    start = np.maximum.accumulate(np.where(rows == 1, place, 0), 1)
    seen = (place - start + 1).mean()
    assert estimate.row_keys(cfg) - estimate.FLEX_TILE == pytest.approx(seen, rel=0.05)
    assert estimate.row_keys(shape_of("pr993")) == 1024


@pytest.mark.parametrize("record", RECORDS)
def test_more_gpus_take_less_time(record):
    cfg = shape_of(record)
    whole = [ranks for ranks in range(1, 9) if not refused(cfg, ranks)]
    assert {1, 2, 4, 8} <= {*whole}
    steps = [estimate.step_seconds(cfg, ranks) for ranks in whole]
    assert steps == sorted(steps, reverse=True) and steps[0] > 7 * steps[-1]
    spent = [sum(estimate.evaluation_parts(cfg, ranks).values()) for ranks in whole]
    assert spent == sorted(spent, reverse=True)


def refused(cfg, ranks):
    try:
        estimate.passes_of(cfg, ranks)
    except train_gpt.ConfigError:
        return True
    return False


def test_what_is_added_costs():
    """Bytes grow with every technique and width; so does the step."""
    plain = shape_of("pr993", xsa_last_n=4, ve_enabled=False)
    moved = step_bytes(plain)
    for changes in (
        dict(xsa_last_n=11),
        dict(ve_enabled=True),
        dict(value_residual=True),
        dict(gated_attention=True),
        dict(polyglu_enabled=True),
        dict(pre_enrich_dim=768),
        dict(depth_recurrence=(4, 5)),
        dict(mlp_mult=4.0),
        dict(num_kv_heads=8),
        dict(vocab_size=4096),
    ):
        more = replace(plain, **changes)
        assert step_bytes(more) > moved, changes
        assert estimate.step_seconds(more, 8) > estimate.step_seconds(plain, 8), changes
        kept = estimate.training_memory(more, 8)
        assert kept > estimate.training_memory(plain, 8) or changes == dict(polyglu_enabled=True)
    for script in (estimate.BEFORE, replace(estimate.NOW, stream=4)):
        assert step_bytes(plain, script) > moved


def step_bytes(cfg, script=estimate.NOW):
    there = estimate.forward(cfg, script, True)
    assert there.moved > estimate.forward(cfg, script, False).moved
    assert there.kept <= there.moved + 2 * 14 * cfg.num_layers * cfg.model_dim * cfg.mlp_mult
    return there.moved + estimate.backward(cfg, script).moved


def test_each_cure_helps():
    rows = [*estimate.cures(8)]
    gains = [float(gain) for _, _, gain, _ in rows[1:]]
    assert min(gains) > 0 and gains[0] == max(gains)  # the stream
    now = estimate.step_seconds(shape_of("pr993", clip="global"), 8)
    assert rows[len(estimate.CURES)][1] == f"{now * 1e3:.1f}"


@pytest.mark.parametrize(
    "changes", [{}, dict(mlp_mult=4.0, clip_sigmas=20.0), dict(vocab_size=4096)]
)
def test_bytes_of_gaussian_weights(changes):
    """Beside the entropy of weights that are drawn, at two layers."""
    cfg = shape_of("own", num_layers=2, loop_layers="", **changes)
    drawn = {name: torch.randn(spec.shape) for name, spec in train_gpt.parameter_specs(cfg).items()}
    payload, _ = train_gpt.quantise(drawn, cfg)
    wanted = 0.0
    for name in [name for name in drawn if payload[name].dtype.names]:
        counts = np.unique(payload[name]["integers"], return_counts=True)[1]
        wanted -= (counts * np.log2(counts / counts.sum())).sum() / 8
    assert estimate.gaussian_bytes(cfg) == pytest.approx(wanted, rel=0.01)


def test_gptq_takes_of_the_training_time():
    """More, where weights do not fit at once; nothing of it where it is off."""
    cfg = shape_of("own")
    steps, reserve = estimate.steps_within(cfg, 8)
    assert 0 < reserve < 30 and estimate.gaussian_bytes(cfg) < cfg.target_bytes
    squeezed, more = estimate.steps_within(replace(cfg, target_bytes=8_000_000), 8)
    assert more > 2 * reserve and squeezed < steps
    assert estimate.steps_within(replace(cfg, gptq_reserve_seconds=60.0), 8)[1] == 60.0
    free, nothing = estimate.steps_within(replace(cfg, quant="lite"), 8)
    assert nothing == 0 and free >= steps
    assert "quantise, compress" in estimate.evaluation_parts(replace(cfg, quant="lite"), 8)
    assert "quantise, compress" not in estimate.evaluation_parts(cfg, 8)


def test_lanes_take_the_longest_document_or_their_share():
    lengths = estimate.document_lengths()
    assert len(lengths) == estimate.DOCUMENTS
    assert lengths.sum() == pytest.approx(estimate.TARGETS, rel=1e-3)
    for lanes in (64, 1024, 8192):
        bound = max(lengths.sum() / lanes, lengths.max())
        first = estimate.lane_steps(lanes, 1024)
        assert bound <= first < 1.1 * bound
        assert first <= estimate.lane_steps(lanes, 0) < bound + lengths.max()
    assert estimate.keys_seen(1) == 1
    seen = [estimate.keys_seen(window) for window in (16, 2048, 10**6)]
    assert seen == sorted(seen) and seen[0] < 16 and seen[1] < 2048


def test_lanes_are_laid_out_as_the_script_does(monkeypatch, tmp_path):
    """From the shards of FineWeb's validation, where they are."""
    lengths = np.array([30, 2, 7, 90, 4, 4, 25, 1, 60, 11])
    stream = np.full(lengths.sum() + 1, 5, np.uint16)
    stream[np.cumsum(lengths) - lengths] = train_gpt.BOS
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(stream)
    (tmp_path / "fineweb_val_000000.bin").write_bytes(header.tobytes() + stream.tobytes())
    monkeypatch.setattr(train_gpt, "FINEWEB_DATA", tmp_path)
    caches = estimate.document_lengths, estimate.lane_steps
    for function in caches:
        function.cache_clear()
    try:
        assert estimate.document_lengths().tolist() == lengths.tolist()
        plan = train_gpt.CodingPlan(len(lengths), 0, 3, 1, int(lengths.sum()), 16)
        schedule = train_gpt.LaneSchedule(stream, plan)
        assert estimate.lane_steps(3, 0) == schedule.lengths.max()
        ahead = plan._replace(ahead=(3, 8))
        assert estimate.lane_steps(3, 2) == train_gpt.LaneSchedule(stream, ahead).lengths.max()
    finally:
        for function in caches:
            function.cache_clear()


# -----------------------------------------------------------------------------
# What is printed


@pytest.mark.parametrize("record", [*RECORDS, "tiny"])
def test_every_record_is_estimated(record, capsys, monkeypatch):
    monkeypatch.setenv("RECORD", record)
    out = printed(capsys, "--gpus", "8" if record != "tiny" else "1")
    assert out.startswith(f"{record} on ") and "matrix products" in out and "backoff" in out
    assert "a first run on GPUs replaces" in out
    numbers = [float(x) for x in re.findall(r"(\d+\.\d) (?:ms|s)$", out, re.MULTILINE)]
    assert len(numbers) >= 12 and all(map(math.isfinite, numbers))
    assert ("sliding windows" in out) == (record != "own")
    assert ("proof" in out) == (train_gpt.Config.from_env({"RECORD": record}).codec_tokens != 0)


def test_settings_are_those_of_the_script(capsys, monkeypatch):
    monkeypatch.setenv("EVAL_SLIDING", "1")
    out = printed(capsys)
    assert out.startswith("own on 8 ") and "sliding windows" in out
    monkeypatch.setenv("NUM_LAYERS", "22")
    assert printed(capsys) != out


def test_table_and_rates(capsys):
    out = printed(capsys, "--table", "--rates")
    for name in ("#549's shape, XSA in 11", *RECORDS, *estimate.RATES, "EVAL_SLIDING=0"):
        assert f"| {name} " in out


@pytest.mark.parametrize(
    ("env", "arguments", "reason"),
    [
        (dict(RECORD="nix"), [], "RECORD='nix'"),
        (dict(NUM_LAYERS="none"), [], "NUM_LAYERS='none'"),
        (dict(), ["--gpus", "7"], "TRAIN_BATCH_TOKENS=786432: must be a multiple of"),
    ],
)
def test_wrong_settings_are_one_line(env, arguments, reason, capsys, monkeypatch):
    for name, text in env.items():
        monkeypatch.setenv(name, text)
    assert estimate.main(arguments) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and f"error: {reason}" in said.err


@pytest.mark.parametrize("arguments", [["--gpus", "9"], ["--gpus", "0"], ["--gpus", "x"], ["more"]])
def test_wrong_arguments_are_usage(arguments, capsys):
    with pytest.raises(SystemExit) as leaving:
        estimate.main(arguments)
    assert leaving.value.code == 2 and "usage: " in capsys.readouterr().err
