"""What each technique is worth on two CPU cores: `tiny` with one thing changed at a time.

    python records/tools/ablate.py        # the whole table, about 40 minutes on two cores
    python records/tools/ablate.py --only relu2,xsa_off --seeds 2 --steps 60

Every run has the same number of steps, the same training text and the same first part of the
validation text. README.md and results.json in --out hold the table; results.jsonl one line a run,
so a killed ablation goes on where it stopped.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import runs
from runs import (
    Estimate,
    Row,
    Task,
    UserError,
    cell,
    difference,
    over_seeds,
)

from train_gpt import Config, ConfigError, find_shards, prepare_sample

PUBLISHED_810 = "CLIP_QUANTILES=0.999,0.9999,0.99999,0.999999,0.9999999"
PRUNED = 0.97  # of the unpruned code and artifact
FIXED = dict(RECORD="tiny", DEVICE="cpu", NGRAM_ENABLED="0", EVAL_STRIDE="256", SAVE_SCORES="0")
FIXED |= dict(SCORER="sliding", CODEC_TOKENS="0")  # what differs is the model; nothing to prove
SMALLEST = 0.00005  # bpb; less shows as 0.0000
MEASURES = ("averaged_bpb", "int6_bpb", "artifact_bytes", "step_ms")


class Switch(NamedTuple):
    """One change to `tiny`: `how` is off, on, or other where it puts another value."""

    name: str
    how: str
    words: str
    variables: str  # NAME=VALUE, separated by spaces

    def env(self) -> dict[str, str]:
        return dict(pair.split("=", 1) for pair in self.variables.split())


SWITCHES = [
    Switch("relu2", "off", "slope of 0.5 below zero in the squared ReLU", "LEAKY_SLOPE=0"),
    Switch("polyglu", "on", "PolyGLU: a learned slope for each neuron", "POLYGLU_ENABLED=1"),
    Switch("value_residual", "off", "first layer's values in all layers", "VALUE_RESIDUAL=0"),
    Switch("gated_attention", "off", "gate on each attention head", "GATED_ATTENTION=0"),
    Switch("xsa_off", "off", "attention without the own value (XSA)", "XSA_LAST_N=0"),
    Switch("xsa_all", "other", "XSA in all layers", "XSA_LAST_N=4"),
    Switch("smear", "off", "SmearGate: the previous token blended in", "SMEAR_GATE=0"),
    Switch("smear_810", "other", "SmearGate starts nearly closed, as in #810", "SMEAR_INIT=-3"),
    Switch("bigram", "off", "bigram embedding", "BIGRAM_VOCAB_SIZE=0"),
    Switch("bigram_810", "other", "bigram embedding of #810", "BIGRAM_KIND=linear"),
    Switch("value_embedding", "off", "embedding added to late values", "VE_ENABLED=0"),
    Switch("pre_enrich", "on", "GELU pre-enrichment of #810", "PRE_ENRICH_DIM=192"),
    Switch("ortho", "off", "matrices that start orthogonal", "ORTHO_INIT=0"),
    Switch("overtone", "on", "overtone spectrum of the first embedding", "OVERTONE_INIT=1"),
    Switch("rope_full", "other", "rotary positions on whole heads", "ROPE_DIMS=0"),
    Switch("ln_scale", "off", "inputs of layers times 1/sqrt(layer)", "LN_SCALE=0"),
    Switch("recurrence", "on", "middle layers applied twice", "DEPTH_RECURRENCE=1,2"),
    Switch("bos_reset", "off", "smear and bigram stop at a document's start", "BOS_RESET=0"),
    Switch("late_qat", "off", "training on the int6 grid at the end", "LATE_QAT=0"),
    Switch("qat_all", "other", "training on an int6 grid throughout", "QAT_ENABLED=1 LATE_QAT=0"),
    Switch("ema", "off", "exponential mean of the weights", "EMA_ENABLED=0"),
    Switch("swa", "off", "mean of late snapshots", "SWA_ENABLED=0"),
    Switch("ema_warmup", "off", "exponential mean that starts short", "EMA_WARMUP=0"),
    Switch("swa_of_ema", "other", "late snapshots of the exponential mean", "SWA_SOURCE=ema"),
    Switch("floor", "on", "published floor of the int6 scales", "QUANT_FLOOR=1"),
    Switch("per_matrix", "other", "one clip for a matrix, not for a row", "QUANT_PER=matrix"),
    Switch("clips_810", "other", "clips of #810", f"QUANT_PER=matrix {PUBLISHED_810}"),
    Switch("embed_fp16", "other", "token embedding in 16 bits", "EMBED_CODING=fp16"),
    Switch("embed_int6", "other", "token embedding in 6 bits", "EMBED_CODING=int6"),
    Switch("lzma", "other", "artifact compressed by lzma", "COMPRESSOR=lzma"),
    Switch("prune", "on", "selective pruning, aimed at 3 % fewer bytes", "TARGET_MB=?"),
    Switch("muon_wd", "off", "weight decay of the matrices", "MUON_WD=0"),
    Switch("grad_clip", "off", "clip of the gradient", "GRAD_CLIP_NORM=0"),
    Switch("clip_local", "other", "clip on each rank (here there is one)", "CLIP=local"),
]


def schedule(steps: int) -> dict[str, str]:
    """Every schedule of `tiny` as the same share of `steps`; one validation, at the end."""
    often = max(1, steps // 40)
    values = dict(ITERATIONS=steps, WARMDOWN_ITERS=round(0.6 * steps), VAL_LOSS_EVERY=steps)
    values |= dict(MUON_MOMENTUM_WARMUP_STEPS=round(0.25 * steps), SWA_EVERY=often, QAT_EVERY=often)
    return {name: str(value) for name, value in values.items()}


def cut_validation(source: Path, folder: Path, tokens: int) -> str:
    """A dataset in `folder` with links to that of `source`, but the first `tokens` validation
    tokens alone -> its path; four passes over all of it would take longer than the training."""
    val = find_shards(source, "val")
    for path in source.iterdir():
        if path not in val and not path.name.endswith(".jsonl"):
            (folder / path.name).symlink_to(path.resolve())
    header = np.fromfile(val[0], "<i4", 256)
    header[2] = min(header[2], tokens)
    stream = np.fromfile(val[0], "<u2", header[2], offset=header.nbytes)
    (folder / val[0].name).write_bytes(header.tobytes() + stream.tobytes())
    return str(folder)


def pruning(env: dict[str, str], total_bytes: float) -> dict[str, str]:
    """TARGET_MB=? becomes MiB of code and artifact, a little below the unpruned size."""
    return {n: str(PRUNED * total_bytes / 2**20) if v == "?" else v for n, v in env.items()}


def changed(switch: Switch, base: dict[str, str]) -> bool:
    """Whether it changes the resolved configuration; ConfigError where it does not fit it."""
    env = base | pruning(switch.env(), 2**20)
    return Config.from_env(env) != Config.from_env(base)


def fits(switch: Switch, base: dict[str, str]) -> bool:
    try:
        return changed(switch, base)
    except ConfigError:
        return False


def tasks_of(switch: Switch, base: dict[str, str], baseline: Sequence[Row]) -> list[Task]:
    """One run of `switch` for each seed that has a baseline."""
    tasks = []
    for row in baseline:
        seed, size = row["labels"]["seed"], row["measures"]["total_bytes"]
        env = base | pruning(switch.env(), size) | {"SEED": str(seed)}
        tasks.append(Task(dict(name=switch.name, seed=seed), env))
    return tasks


def remark(switch: Switch, delta: Estimate | None) -> str:
    """Whether the technique helps or hurts by more than two standard errors."""
    if delta is None or delta.error is None or abs(delta.mean) <= max(2 * delta.error, SMALLEST):
        return ""
    helps = delta.mean > 0 if switch.how == "off" else delta.mean < 0
    return "helps" if helps else "**hurts** at this scale; stays switchable"


def least_ms(rows: Sequence[Row]) -> float:
    """Milliseconds a step of the run that was disturbed least."""
    return min(row["measures"]["step_ms"] for row in rows)


def table_row(switch: Switch, rows: Sequence[Row], baseline: Sequence[Row]) -> list[str]:
    delta = {measure: difference(rows, baseline, measure) for measure in MEASURES}
    return [
        switch.words,
        switch.how,
        f"`{switch.variables.replace('?', f'{PRUNED}*size')}`",
        *(cell(over_seeds(rows, measure)) for measure in MEASURES[:2]),
        cell(delta["int6_bpb"], "+.4f"),
        cell(delta["artifact_bytes"], "+,.0f", error=False),
        f"{least_ms(rows) - least_ms(baseline):+.0f}",
        remark(switch, delta["int6_bpb"]),
    ]


HEAD = ["technique", "change", "variables", "averaged", "int6", "int6 difference"]
HEAD += ["artifact bytes", "ms a step", ""]
STYLES = (".4f", ".4f", ",.0f")  # of MEASURES
NOTES = """`tiny` with one thing changed: {steps} steps, seeds 1 to {seeds}, scored on {tokens}.
Averaged: bits per byte of the averaged weights before quantisation; int6: of the artifact re-read.
Differences are from the baseline of the same seed, mean ± standard error over seeds; sorted by that
of int6, worst first. "off" takes a technique out of `tiny`, "on" adds one, "other" puts another
value.

{table}

A technique **hurts** or helps here where the int6 difference is more than two standard errors; with
three seeds chance alone does so in one row of eleven, in each direction. All of them stay
switchable: {steps} steps of a small model say little about 7,000 of a large one. A difference of
exactly 0 means that the runs made the same integers. Milliseconds a step are those of the least
disturbed seed, each run on its share of the cores.
"""


def write(options: argparse.Namespace, found: dict[str, list[Row]], about: Row) -> None:
    """The table, sorted by effect, and everything behind it."""
    baseline = found["baseline"]
    effect = {name: difference(rows, baseline, "int6_bpb") for name, rows in found.items()}
    shown = sorted((s for s in SWITCHES if effect.get(s.name)), key=lambda s: -effect[s.name].mean)
    mine = [cell(over_seeds(baseline, m), s) for m, s in zip(MEASURES, STYLES, strict=False)]
    mine.append(f"{least_ms(baseline):.0f}")
    first = ["**baseline**", "", "", *mine[:2], "", *mine[2:], ""]
    rows = [table_row(switch, found[switch.name], baseline) for switch in shown]
    tokens = f"the first {options.val_tokens:,} tokens of the validation text"
    given = dict(steps=options.steps, seeds=options.seeds, tokens=tokens)
    text = NOTES.format(**given, table=runs.markdown(HEAD, [first, *rows]))
    results = {
        name: {m: over_seeds(rows, m) for m in MEASURES}
        | {f"{m}_difference": difference(rows, baseline, m) for m in MEASURES}
        for name, rows in found.items()
        if rows
    }
    variables = {s.name: s.variables for s in shown}
    runs.write_table(options.out, "Ablation", about, text, variables=variables, results=results)


def ablate(arguments: Sequence[str], data: Path) -> int:
    """Baselines first, as pruning needs their sizes -> exit status, 1 where a run failed."""
    options, began = parse(arguments), time.perf_counter()
    given = FIXED | schedule(options.steps) | runs.overrides(options.set)
    source = Path(Config.from_env(given).data_path)
    prepare_sample(source)  # before several runs would at the same time
    base = given | {"DATA_PATH": cut_validation(source, data, options.val_tokens)}
    chosen = [s for s in SWITCHES if s.name in (options.only or s.name).split(",")]
    if idle := [switch.name for switch in chosen if not changed(switch, base)]:
        raise UserError(
            f"{', '.join(idle)}: changes nothing in this configuration; fix: see --only"
        )
    seeds = range(1, options.seeds + 1)
    plain = [Task(dict(name="baseline", seed=n), base | {"SEED": str(n)}) for n in seeds]
    failed = runs.run_tasks(plain, options.jobs, options.out, "int6_bpb")
    found = {"baseline": runs.finished(plain, options.out)}
    if not found["baseline"]:
        raise UserError("no run of the baseline ended well, see above")
    fitting = [switch for switch in SWITCHES if fits(switch, base)]  # of the table so far
    tasks = {switch.name: tasks_of(switch, base, found["baseline"]) for switch in fitting}
    by_seed = zip(*(tasks[switch.name] for switch in chosen), strict=True)
    wanted = [task for group in by_seed for task in group]
    failed += runs.run_tasks(wanted, options.jobs, options.out, "int6_bpb")
    found |= {name: runs.finished(group, options.out) for name, group in tasks.items()}
    rows = [row for group in found.values() for row in group]
    about = runs.facts(["records/tools/ablate.py", *arguments], rows, options.jobs, began)
    write(options, found, about)
    return int(failed > 0)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser, names = runs.parser(__doc__, "ablation"), [switch.name for switch in SWITCHES]
    parser.add_argument("--only", metavar="NAME,...", help=", ".join(names))
    parser.add_argument("--steps", type=runs.positive, default=130, help="of a run; default 130")
    help_text = "of the validation text; default 20000"
    parser.add_argument("--val-tokens", type=runs.positive, default=20_000, help=help_text)
    options = parser.parse_args(arguments)
    if options.only and (unknown := set(options.only.split(",")) - set(names)):
        raise UserError(f"--only {','.join(unknown)}: not a switch; fix: one of {', '.join(names)}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    with tempfile.TemporaryDirectory(prefix="ablate_") as data:
        return runs.script_main(lambda: ablate(arguments, Path(data)))


if __name__ == "__main__":
    sys.exit(main())
