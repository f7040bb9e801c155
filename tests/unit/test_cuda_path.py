"""The CUDA path on a device that is not there (tests/emulated): whole runs, values beside those of
the CPU, what a step costs the host, and faults that a GPU would show.

EXPECTED is today's code: where the hot path changes, so do its numbers. A failing test prints those
found, with the functions that they come from; so does, for one rank or through torchrun for more,

    PYTHONPATH=tests/emulated:.:tests:tests/unit python tests/unit/cuda_worker.py /tmp steps
"""

import json
import os
import shutil

import numpy as np
import pytest
from helpers import (
    ROOT,
    SHRUNK,
    Run,
    launch,
    shared_folder,
)

import prepare
import prepare_text

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="g++ builds the emulated device")

EMULATED = ROOT / "tests/emulated"
WORKER = ROOT / "tests/unit/cuda_worker.py"
PATHS = [EMULATED, ROOT, ROOT / "tests", ROOT / "tests/unit"]
ENVIRONMENT = dict(
    PYTHONPATH=os.pathsep.join(map(str, PATHS)),
    OMP_NUM_THREADS="1",
    PYTHONDONTWRITEBYTECODE="1",
)
SMALL = SHRUNK | dict(  # late QAT begins before the checkpoint from which a run is gone on with
    DEVICE="cuda",
    NUM_LAYERS="3",
    ITERATIONS="6",
    GRAD_ACCUM_STEPS="1",
    LATE_QAT_THRESHOLD="0.75",
    SCORER="documents",
    CODEC_TOKENS="-1",
)

# Events of a step, by kind, and those for which the host waits, by function. launch: operations of
# eager mode, torch.compile being left out, of torch 2.13; other versions may have a few more.
EXPECTED = {
    ("training step", 1): {"launch": 1597, "h2d async": 2, "d2h async": 1, "wait": 1},
    ("training step", 2): {
        **{"launch": 1590, "collective": 14},
        **{"h2d async": 2, "d2h async": 1, "wait": 1},
    },
    ("lane step", 1): {"launch": 1},  # the captured graph
    ("lane step", 2): {"launch": 1},
}
STOPS = {  # what the host waits for
    "training step": {"wait Event.synchronize Reading.get": 1},  # the loss before
    "lane step": {},
}

FAULTS = {  # name -> the error, or "" where log p tell
    "the rotary table on the CPU": "mul on different devices",
    "the lanes' numbers on the CPU": "h2d copy of (4,) in a captured graph",
    "numpy of a CUDA tensor": "can't convert cuda:0 device type tensor to numpy",
    "item in a captured graph": "_local_scalar_dense in a captured graph",
    "a mask as an index in a captured graph": "index by a mask in a captured graph",
    "a constant copied into a captured graph": "h2d copy of (1,) in a captured graph",
    "a counter of Python's in a captured graph": "",
}


@pytest.fixture(scope="session")
def short_dataset(tmp_path_factory):
    """Folder of a dataset of 16 documents, and of eight short ones for validation."""
    train, val = prepare.sample_documents()
    with shared_folder(tmp_path_factory, "short_prose") as (folder, empty):
        if empty:
            words = [text.split(" ")[:100] for text in val[:2]]
            short = [" ".join(part) for text in words for part in np.array_split(text, 4)]
            prepare_text.write_dataset(train[:16], short, folder / "prose", "prose", 512)
    return folder / "prose"


def worked(tmp_path_factory, dataset, ranks):
    """The worker's facts of each rank, and its folder."""
    with shared_folder(tmp_path_factory, f"cuda_{ranks}") as (folder, empty):
        if empty:
            env = ENVIRONMENT | SMALL | dict(DATA_PATH=str(dataset))
            done = launch(WORKER, [folder], env, ranks, folder)
            (folder / "stdout").write_text(done.stdout)
            (folder / "stderr").write_text(done.stderr)
    names = [folder / f"facts_rank{rank}.json" for rank in range(ranks)]
    assert all(name.exists() for name in names), (folder / "stderr").read_text()[-3000:]
    return [json.loads(name.read_text()) for name in names], folder


@pytest.fixture(scope="session")
def one(tmp_path_factory, short_dataset):
    return worked(tmp_path_factory, short_dataset, 1)


@pytest.fixture(scope="session")
def two(tmp_path_factory, short_dataset):
    return worked(tmp_path_factory, short_dataset, 2)


def run_of(folder):
    (path,) = folder.glob("runs/*/stream.bin")
    return Run(path.parent)


@pytest.mark.parametrize("ranks", ["one", "two"])
def test_a_whole_run_proves_its_score(ranks, request):
    """Documents through a captured graph, counts by torch, the mixtures; the decoder is a process
    on the emulated device, too."""
    run = run_of(request.getfixturevalue(ranks)[1])
    line = run.final("codec")
    assert line["decoded"] == "ok" and line["proved_tokens"] == line["total_tokens"]
    assert any("NVIDIA H100" in text for text in run.lines if text.startswith("hardware:"))
    stages = {text.split()[0] for text in run.lines if text.startswith("final_")}
    assert {"final_documents_exact", "final_int6_sliding_window_exact"} <= stages
    assert {"final_ngram_backoff_exact", "final_ngram_exact"} <= stages
    assert any(text.startswith("late_qat:enabled step:2") for text in run.lines)
    keys = [text.split()[0] for text in run.lines]
    for stage in ("int6_roundtrip", "int6_sliding_window", "documents"):
        assert keys.index(f"expect:{stage}") < keys.index(f"final_{stage}_exact")


def test_a_run_goes_on_from_a_checkpoint_to_the_bit(one):
    facts, folder = one
    assert facts[0]["whole"] == dict(artifacts=True, checkpoints=True)
    resumed = Run(folder / "runs/resumed")
    assert "resumed step:3" in resumed.lines
    keys = [text.split()[0] for text in resumed.lines]
    assert keys.index("expect:ttt") < keys.index("final_ttt_exact")
    assert float(resumed.final("ttt_exact")["val_loss"]) > 0


def test_ranks_end_with_the_same_weights(two):
    assert two[0][0]["weights"] == two[0][1]["weights"]


def step_losses(run):
    """The losses of a log, as far as they are printed."""
    found = [line.split("train_loss:")[1].split()[0] for line in run.lines if "train_loss:" in line]
    return np.array(found, float)


def test_two_ranks_train_as_one(one, two):
    alone, together = (step_losses(run_of(folder)) for _, folder in (one, two))
    assert len(alone) == len(together) == 6
    assert np.abs(alone - together).max() < 0.02  # bf16's


# -----------------------------------------------------------------------------
# What a step costs


@pytest.mark.parametrize(("what", "ranks"), EXPECTED, ids=lambda value: str(value))
def test_events_of_a_step(what, ranks, request):
    facts, _ = request.getfixturevalue(("one", "two")[ranks - 1])
    for kinds, stops in (fact[what] for fact in facts):
        assert (kinds, stops) == (EXPECTED[what, ranks], STOPS[what])


def test_counting_needs_no_values(tmp_path):
    """So that large models can be counted, too."""
    env = ENVIRONMENT | dict(EMULATED_CUDA_HOLDS="meta")
    done = launch(WORKER, [tmp_path, "steps"], env, 1, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    facts = json.loads(done.stdout)
    for what, found in facts.items():
        assert found == [EXPECTED[what, 1], STOPS[what]]


# -----------------------------------------------------------------------------
# Beside the CPU

NOISE = dict(
    losses=0.02,
    documents=0.4,
    masked_documents=0.4,
    windows=0.4,
    ttt=0.6,
    ttt_lora=0.4,
    frontier_losses=0.02,
    frontier_documents=0.4,
    frontier_windows=0.4,
)  # nats, of bf16
EXACT = dict(
    enriched=1e-6, cascade=1e-9, blend=1e-6, late_blend=1e-6
)  # the same numbers in the same precision


@pytest.mark.parametrize(("name", "most"), (NOISE | EXACT).items())
def test_values_are_those_of_the_cpu(name, most, one):
    assert one[0][0]["beside"][name] < most


@pytest.mark.parametrize("name", ["counts", "captured", "decoded"])
def test_what_has_no_noise_is_the_same(name, one):
    assert one[0][0]["beside"][name]


# -----------------------------------------------------------------------------
# Faults


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_noticed(name, one):
    found = one[0][0]["faults"][name]
    assert "KeyError" not in found, f"the place for this fault is gone: {found}"
    if FAULTS[name]:
        assert FAULTS[name] in found
        if "numpy" not in name:
            assert "faulty_" in found, "the error names file and line"
    else:
        assert float(found) > 1


# -----------------------------------------------------------------------------
# The device itself

DEVICE = """
import emulated_cuda, torch
from tally import counted
x = torch.zeros(3, device="cuda")
weights = torch.zeros(3, device="cuda")
calls = []

def step():
    calls.append(1)
    weights.add_(1)
    return weights * 2

def captured(function):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        return function(), graph

def errors(*functions):
    for function in functions:
        try:
            function()
        except (RuntimeError, TypeError):
            continue
        raise AssertionError(function)
"""
DEVICE_CHECKS = {
    "tensors say where they are": """
        assert str(x.device) == "cuda:0" and x.is_cuda and str((x + 1).device) == "cuda:0"
        assert (x + torch.tensor(2.0)).tolist() == [2.0] * 3
        y = torch.arange(6, device="cuda:1").view(2, 3)[1]
        assert y.cpu().numpy().tolist() == [3, 4, 5] and str(y.device) == "cuda:1"
    """,
    "devices are not mixed": """
        y = torch.ones(3)
        errors(lambda: x + y, lambda: y + x, lambda: y + x.sum(), lambda: torch.cat([x, y]),
               lambda: y[x.long()], lambda: x + torch.ones(3, device="cuda:1"), lambda: x.numpy(),
               lambda: torch._foreach_add_([x], [y]), lambda: torch.where(x > 0, x, y),
               lambda: x.normal_(generator=torch.Generator()))
    """,
    "a captured graph waits for nothing and copies nothing": """
        for function in (lambda: x.sum().item(), lambda: x[x > 0], lambda: x.cpu(),
                         lambda: torch.tensor([1.0], device="cuda"), torch.cuda.synchronize,
                         lambda: x.nonzero(), lambda: torch.cuda.Event().synchronize(),
                         lambda: bool(x.sum() > 0), lambda: x.copy_(torch.ones(3)),
                         lambda: x[torch.tensor([0])], lambda: x.unique()):
            errors(lambda: captured(function))
        captured(lambda: x.masked_fill(x > 0, 1.0))
    """,
    "a replay repeats operations and nothing of Python": """
        step()
        out, graph = captured(step)
        assert weights.tolist() == [1.0] * 3, "a capture changes nothing"
        assert out.isnan().all().item(), "and computes nothing"
        for times in (2, 3):
            with counted() as tally:
                graph.replay()
            assert weights.tolist() == [times] * 3 and out.tolist() == [2 * times] * 3
            assert tally.kinds() == {"launch": 1}
        assert len(calls) == 2
    """,
    "pinned memory": """
        pageable = torch.ones(3)
        for host in (pageable.pin_memory(), torch.ones(3, pin_memory=True),
                     torch.empty(3, pin_memory=True).fill_(1)[:2]):
            assert host.is_pinned()
            with counted() as tally:
                host.to("cuda", non_blocking=True)
                host.to("cuda")
                torch.zeros(len(host), device="cuda").copy_(host, non_blocking=True)
            assert tally.total("h2d async") == 2 and tally.total("h2d blocking") == 1
        assert not pageable.is_pinned()
        with counted() as tally:
            pageable.to("cuda", non_blocking=True)
        assert tally.kinds() == {"h2d blocking": 1}
    """,
    "what was not waited for is not there": """
        host = torch.zeros(3, pin_memory=True)
        with counted() as tally:
            host.copy_(x, non_blocking=True)
            other = (x + 1).to("cpu", non_blocking=True)
        assert tally.total("d2h async") == 2 and tally.total("d2h blocking", "wait") == 0
        assert host.isnan().all() and other.isnan().all()
        event = torch.cuda.Event()
        event.record()
        late = x.to("cpu", non_blocking=True)
        event.synchronize()
        assert host.tolist() == [0.0] * 3 and other.tolist() == [1.0] * 3 and late.isnan().all()
        torch.cuda.synchronize()
        assert late.tolist() == [0.0] * 3
    """,
    "host memory that is still to be read": """
        host = torch.ones(3, pin_memory=True)
        host.to("cuda", non_blocking=True)
        torch.cuda.synchronize()
        host.fill_(2)
        host.to("cuda", non_blocking=True)
        host.fill_(3)
        errors(torch.cuda.synchronize)
    """,
    "a thread of its own": """
        import threading
        done = []
        def fetch():
            host = torch.arange(4).pin_memory()
            done.append(host.to("cuda", non_blocking=True) + torch.ones(4, device="cuda"))
        with counted() as tally:
            thread = threading.Thread(target=fetch)
            thread.start()
            thread.join()
        assert done[0].tolist() == [1.0, 2.0, 3.0, 4.0] and tally.total("h2d async") == 1
    """,
    "launches and work": """
        with counted(work=True) as tally:
            a = torch.ones(4, 8, device="cuda", dtype=torch.bfloat16)
            b = a.t().view_as(a.t())[:, :2]
            c = a @ b
        assert tally.by_function("launch") == {"launch fill_ <module>": 1, "launch mm <module>": 1}
        assert tally.flops == 2 * 4 * 8 * 2 and tally.bytes == 64 + (64 + 2 * 8 * 2 + 2 * 4 * 2)
        with counted() as tally:
            torch._foreach_add_([torch.zeros(3, device="cuda") for _ in range(120)], 1.0)
        assert tally.by_function("launch")["launch _foreach_add_ <module>"] == 2
        q = torch.ones(1, 4, 8, 16, device="cuda", requires_grad=True)
        with torch.autocast("cuda", torch.bfloat16), counted() as tally:
            y = torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
            torch.nn.functional.rms_norm(y, (16,)).sum().backward()
        assert y.dtype == torch.bfloat16 and q.grad.dtype == torch.float32
        launched = tally.by_function("launch")
        assert launched["launch _scaled_dot_product_flash_attention_backward backward"] == 1
        assert launched["launch _fused_rms_norm_backward backward"] == 1
    """,
    "events say file and line": """
        with counted() as tally:
            x.sum().item()
        (event,) = [event for event in tally.events if event.kind == "wait"]
        assert event.what == "_local_scalar_dense" and event.line.startswith("check.py:")
    """,
}


def test_the_device_keeps_its_word(tmp_path):
    """All at the top of one script; its traceback names what fails."""
    parts = [f"# {name}{text}" for name, text in DEVICE_CHECKS.items()]
    script = "\n".join([DEVICE, *(part.replace("\n        ", "\n") for part in parts)])
    (tmp_path / "check.py").write_text(script)
    done = launch(tmp_path / "check.py", [], ENVIRONMENT, 1, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
