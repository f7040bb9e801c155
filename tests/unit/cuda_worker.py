"""What test_cuda_path.py starts with tests/emulated on PYTHONPATH: the script on the emulated
device, whole runs in runs/ of the working folder.

cuda_worker.py FOLDER        # leaves facts_rank<r>.json there; a rank among others, or the only one
cuda_worker.py FOLDER steps  # only what a step costs, which it prints
"""

import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from helpers import (
    FRONTIER,
    SCRIPT,
    no_validation,
    pack_artifact,
    perturbed,
    random_stream,
    run_here,
    tiny,
    train_gpt,
    write_shard,
)
from main_worker import leave, whole_run
from tally import STOPS, counted

from train_gpt import Runtime

# Every switch that the tiny configuration leaves off.
MORE = dict(num_layers=3, depth_recurrence=(1, 2), polyglu_enabled=True, pre_enrich_dim=16,
            bos_reset=False)  # fmt: skip
CUDA = dict(device="cuda", **MORE)
TTT = dict(scorer="sliding", ttt_enabled=True, ttt_chunk_tokens=64, ttt_batch_seqs=3, ttt_epochs=2)
ALL_KINDS = ("launch", "collective", "h2d async", "d2h async", *STOPS)


def quiet(runtime):
    runtime.log = lambda *_, **__: None
    return runtime


def documents(length, count, vocab_size=64):
    """A stream of `count` documents of `length` tokens, the BOS included."""
    stream = random_stream(length * count, vocab_size)
    stream[:-1:length] = train_gpt.BOS
    return stream


def furthest(a, b):
    """Largest difference of two arrays."""
    return float(np.abs(np.asarray(a) - np.asarray(b)).max())


# -----------------------------------------------------------------------------
# What a step costs


def difference(longer, shorter, steps):
    """Events of one of the steps that two tallies differ by -> (by kind, of stops by function)"""
    kinds = {kind: longer.total(kind) - shorter.total(kind) for kind in ALL_KINDS}
    stops = {
        name: times - shorter.by_function(*STOPS).get(name, 0)
        for name, times in longer.by_function(*STOPS).items()
    }
    return [{k: n / steps for k, n in found.items() if n} for found in (kinds, stops)]


def training_step(folder, rt):
    """Events of one step of Trainer.run: what a step more costs. Not one of the first ten, which
    are logged; without grids, snapshots and lines, and with one pass."""
    shard = folder / f"stream_{rt.rank}_train_000000.bin"
    write_shard(shard, random_stream(5000, 64))

    def whole(steps):
        cfg = tiny(**CUDA, iterations=steps, train_log_every=10**6, swa_enabled=False,
                   late_qat=False, run_id="counted")  # fmt: skip
        torch.manual_seed(0)
        model = train_gpt.GPT(cfg).initialise().to(rt.device)
        loader = train_gpt.TokenLoader([shard], cfg.vocab_size)
        runtime = quiet(Runtime(cfg))
        runtime.patient = getattr(rt, "patient", None)
        trainer = train_gpt.Trainer(model, loader, runtime, cfg)
        trainer.step = 10
        with counted() as tally:
            trainer.run(no_validation)
        return tally

    return difference(whole(14), whole(12), 2)


def lane_step(rt):
    """Events of one step of score_documents, of eight."""
    cfg = tiny(**CUDA)
    model = perturbed(cfg).eval().to(rt.device)

    def whole(length):
        with counted() as tally:
            train_gpt.score_documents(model, rt, cfg, documents(length, 2 * rt.world_size))
        return tally

    return difference(whole(24), whole(16), 8)


# -----------------------------------------------------------------------------
# Beside the CPU


def losses(cfg, rt, folder):
    """Of five steps; late QAT begins with the fourth."""
    shard = folder / "beside_train_000000.bin"
    write_shard(shard, random_stream(5000, 64))
    torch.manual_seed(1)
    model = train_gpt.GPT(cfg).initialise().to(rt.device)
    trainer = train_gpt.Trainer(model, train_gpt.training_loader(cfg, [shard]), rt, cfg)
    return [float(trainer.update(factor)) for factor in (1.0, 1.0, 1.0, 0.4, 0.3)]


def scored(model, rt, cfg, stream):
    """name -> log p by each scorer, and the order of coding"""
    scores, order = train_gpt.score_documents(model, rt, cfg, stream)
    found = dict(documents=scores.log_prob)
    with patch.object(train_gpt, "varlen_attention", lambda _: None):  # torch below 2.13
        masked, _ = train_gpt.score_documents(model, rt, cfg, stream)
    found["masked_documents"] = masked.log_prob
    found["windows"] = train_gpt.WindowScorer(model, rt, cfg).score(stream, 4).log_prob
    for lora in (False, True):
        learns = tiny(device=cfg.device, **MORE, **TTT, ttt_use_lora=lora)
        student = train_gpt.TestTimeTraining(model, rt, learns)
        found["ttt_lora" if lora else "ttt"] = student.score(stream).log_prob
    found["enriched"] = train_gpt.enrichment_change(model, stream)
    return found, order


def mixtures(rt, cfg, order, scores):
    """name -> log p of the same model by each mixture"""
    found = {}
    for name in ("cascade", "blend"):
        mixer = train_gpt.make_mixer(name, cfg, rt)
        store = train_gpt.CountStore(mixer.orders, len(order.tokens) - len(scores.log_prob))
        store.collect(counts(rt, order, max(mixer.orders)))
        schedule = [column[store.skip :] for column in order.schedule]
        found[name] = train_gpt.mix(mixer, store, scores, schedule)
    return found


def late_weights(rt, eager=False):
    """Of the learned mixture after three chunks of its last stage, which are captured"""
    blend = train_gpt.Blend((1, 2, 3), rt)
    if eager:
        blend.train_last_batch = blend.train
    blend.learned = 1 << 20
    rng = np.random.default_rng(0)
    rows = blend.LARGEST_CHUNK + 77
    for _ in range(3):
        entropy = rng.gamma(4.0, 0.7, rows)
        stats = np.sort(rng.integers(0, 9, (3, rows, 5), np.int32))[..., ::-1].copy()
        stats[..., 4] %= 2
        recent = rng.random((rows, train_gpt.REMEMBERED, 2), np.float32)
        given = blend.inputs(stats, entropy, recent)
        weights = blend.weights(*given)
        blend.learn(*given, train_gpt.expert_probabilities(blend, stats, -entropy))
    return weights


def counts(rt, order, most):
    return train_gpt.count_ngrams(order.tokens, 64, most, rt.device, order.schedule)


def frontier(folder):
    """Losses, documents and windows of a model with own's switches, loops from the third step."""
    found = []
    for device in ("cuda", "cpu"):
        cfg = tiny(device=device, **FRONTIER, iterations=5, loop_from=0.4, shuffle=True)
        rt = quiet(Runtime(cfg))
        model = perturbed(cfg, spread=0.2).eval().requires_grad_(False).to(rt.device)
        stream = documents(20, 10)
        columns = dict(
            frontier_losses=losses(cfg, rt, folder),
            frontier_documents=train_gpt.score_documents(model, rt, cfg, stream)[0].log_prob,
            frontier_windows=train_gpt.WindowScorer(model, rt, cfg).score(stream, 4).log_prob,
        )
        found.append(columns)
    return {name: furthest(found[0][name], found[1][name]) for name in found[0]}


def beside_the_cpu(folder):
    cfgs = tiny(**CUDA), tiny(device="cpu", **MORE)
    runtimes = [quiet(Runtime(cfg)) for cfg in cfgs]
    pairs = list(zip(cfgs, runtimes, strict=True))
    facts = dict(losses=furthest(*[losses(cfg, rt, folder) for cfg, rt in pairs]))
    facts |= frontier(folder)
    weights = dict(perturbed(cfgs[1], spread=0.4).named_parameters())
    (folder / "artifact.bin").write_bytes(pack_artifact(weights, cfgs[1]))
    models = [train_gpt.load_artifact(folder / "artifact.bin", rt.device) for rt in runtimes]
    stream = documents(20, 10)
    here, there = (
        scored(model, rt, cfg, stream) for model, (cfg, rt) in zip(models, pairs, strict=True)
    )
    facts |= {name: furthest(here[0][name], there[0][name]) for name in here[0]}
    order = here[1]
    scores = train_gpt.Scores(here[0]["documents"], -here[0]["documents"]).take(order.targets)
    by = [mixtures(rt, cfg, order, scores) for cfg, rt in pairs]
    facts |= {name: furthest(by[0][name], by[1][name]) for name in by[0]}
    late = late_weights(runtimes[0])
    facts["late_blend"] = furthest(late, late_weights(runtimes[1]))
    facts["captured"] = np.array_equal(late, late_weights(runtimes[0], eager=True))
    tables = [counts(rt, order, 12) for rt in runtimes]
    rows = [zip(*pair, strict=True) for pair in zip(*tables, strict=True)]
    facts["counts"] = all(np.array_equal(a, b) for row in rows for a, b in row)
    plan = train_gpt.CodingPlan.of(stream, cfgs[0], 1)
    words, coded = train_gpt.encode(models[0], runtimes[0], cfgs[0], stream, plan)
    decoded = train_gpt.decode(models[0], runtimes[0], cfgs[0], words, plan)
    facts["decoded"] = decoded.text.tolist() == coded.text.tolist() == stream.tolist()
    return facts


# -----------------------------------------------------------------------------
# Whole runs


def whole_runs(data):
    """One from start to end, and its second half once more from the checkpoint, scored by test-time
    training -> whether both weigh the same"""
    cwd = Path.cwd()
    whole = run_here(cwd, "whole", **data, CHECKPOINT_EVERY="3")
    for path in Path("runs/whole/checkpoint").glob("step_00000003.*"):
        Path("runs/resumed/checkpoint").mkdir(parents=True, exist_ok=True)
        shutil.copy(path, "runs/resumed/checkpoint")
    ttt = dict(SCORER="sliding", TTT_ENABLED="1", TTT_CHUNK_TOKENS="256", CODEC_TOKENS="0")
    resumed = run_here(cwd, "resumed", **data | ttt, CHECKPOINT_EVERY="3", RESUME="auto")
    same = [
        (run.folder / "checkpoint/step_00000006.safetensors").read_bytes()
        for run in (whole, resumed)
    ]
    return dict(artifacts=whole.artifact == resumed.artifact, checkpoints=same[0] == same[1])


# -----------------------------------------------------------------------------
# Faults

FAULTS = {  # name -> (a line of the script, or its end; what stands there instead)
    "the rotary table on the CPU": (
        "dtype=torch.float64, device=positions.device) / dims",
        "dtype=torch.float64) / dims",
    ),
    "the lanes' numbers on the CPU": (
        "self.lane = torch.arange(count, device=device)",
        "self.lane = torch.arange(count)",
    ),
    "numpy of a CUDA tensor": (
        "scored[:, : len(real)].cpu().numpy()",
        "scored[:, : len(real)].numpy()",
    ),
    "item in a captured graph": (
        "cache.begin(places)",
        "cache.begin(places + 0 * places.sum().item())",
    ),
    "a mask as an index in a captured graph": (
        "cache.begin(places)",
        "cache.begin(places + 0 * len(places[places > 0]))",
    ),
    "a constant copied into a captured graph": (
        "cache.begin(places)",
        "cache.begin(places + torch.tensor([0], device=places.device))",
    ),
    "a counter of Python's in a captured graph": (
        "cache.begin(places)",
        "cache.steps = getattr(cache, 'steps', -1) + 1; cache.begin(0 * places + cache.steps)",
    ),
}


def with_fault(folder, number, place, instead):
    """The script with a fault, as a module; KeyError where the place is not there, or twice."""
    text = SCRIPT.read_text(encoding="utf-8")
    if text.count(place) != 1:
        raise KeyError(f"{place!r} stands {text.count(place)} times in {SCRIPT.name}")
    path = folder / f"faulty_{number}.py"
    path.write_text(text.replace(place, instead), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def tried(module):
    """log p of windows and documents by a module's code -> two arrays"""
    cfg = module.Config(**vars(tiny(**CUDA)))
    rt = quiet(module.Runtime(cfg))
    model = module.GPT(cfg)
    model.load_state_dict(perturbed(tiny(**MORE), spread=0.4).state_dict())
    model = model.eval().to(rt.device)
    stream = documents(15, 4)
    windows = module.WindowScorer(model, rt, cfg).score(stream, 4).log_prob
    return windows, module.score_documents(model, rt, cfg, stream)[0].log_prob


def noticed(folder):
    """fault -> how it shows: the error, or the largest difference of a log p"""
    right = tried(train_gpt)
    found = {"none": "0.0"}
    for number, (name, (place, instead)) in enumerate(FAULTS.items()):
        try:
            wrong = tried(with_fault(folder, number, place, instead))
            found[name] = str(max(map(furthest, wrong, right)))
        except (RuntimeError, TypeError, KeyError) as error:
            found[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    return found


def alone(folder):
    """Everything that one process tells."""
    data = {name: os.environ[name] for name in os.environ if name in train_gpt.VARIABLES}
    train_gpt.close_run = lambda rt: None  # no picture
    facts = dict(whole=whole_runs(data))
    rt = quiet(Runtime(tiny(**CUDA)))
    facts |= steps(folder, rt)
    return facts | dict(beside=beside_the_cpu(folder), faults=noticed(folder))


def steps(folder, rt):
    return {"training step": training_step(folder, rt), "lane step": lane_step(quiet(rt))}


def main():
    folder = Path(sys.argv[1])
    ranks = "WORLD_SIZE" in os.environ
    if sys.argv[2:] == ["steps"]:
        if ranks:
            torch.distributed.init_process_group("cpu:gloo,cuda:nccl")
        facts = steps(folder, Runtime(tiny(**CUDA)))
        print(json.dumps(facts, indent=1))
    elif ranks:
        facts = {}
        whole_run(facts, lambda rt: facts.update(steps(folder, rt)))
    else:
        facts = alone(folder)
    leave(facts, folder)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
