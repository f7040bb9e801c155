"""Our configuration against the five published ones, shrunk alike, on two texts.

    python records/tools/tournament.py                 # about 25 minutes on two cores
    python records/tools/tournament.py --configs pr864,pr810,pr1026,pr993,pr808 --texts sample \\
        --seeds 1 --out records/track_cpu/five

All get the same seconds of training on as many cores each. A text is `sample` (the embedded one),
`python` (sources of the standard library, prepared on first use) or a dataset folder. README.md
and results.json in --out hold the tables; results.jsonl one line a run, so a killed tournament
goes on where it stopped.
"""

import argparse
import hashlib
import json
import platform
import subprocess
import sys
import sysconfig
import tempfile
import textwrap
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import runs
from runs import ROOT, Row, Task, UserError, cell, over_seeds

from train_gpt import SAMPLE_DATA, Config, prepare_sample

CONFIGS = ("own", "pr864", "pr810", "pr1026", "pr993", "pr808")
PYTHON = ROOT / f"data/datasets/python_{platform.python_version()}"
PYTHON_BYTES = 4_000_000
LEFT_OUT = {"site-packages", "test", "tests", "idle_test", "__pycache__"}
NEVER = "1000000"  # steps

SHRINK = {  # sizes and rates of `tiny`, the same for all
    "DEVICE": "cpu",
    "NUM_LAYERS": "4",
    "MODEL_DIM": "128",
    "NUM_HEADS": "4",
    "NUM_KV_HEADS": "2",
    "BIGRAM_DIM": "32",
    "VE_DIM": "32",
    "TRAIN_SEQ_LEN": "256",
    "TRAIN_BATCH_TOKENS": "2048",
    "MUON_MOMENTUM": "0.95",
    "MUON_MOMENTUM_WARMUP_START": "0.85",
    "WARMUP_STEPS": "2",  # untimed; the first steps are slow and would bend the rate's fall
    "EVAL_STRIDE": "128",
    "TRAIN_LOG_EVERY": "10",
    "SCORER": "sliding",  # all by the five's scorer
    "CODEC_TOKENS": "0",
}
TOKENS_SHRINK = 1024  # of the 62 M validation tokens, about: loads of hashed tables stay
CALIBRATION = {  # a short run for the time of a step, which the schedules need
    "ITERATIONS": "12",
    "MAX_WALLCLOCK_SECONDS": "0",
    "VAL_LOSS_EVERY": "0",
    "NGRAM_ENABLED": "0",
    "NGRAM_SCHEME": "",
    "TTT_ENABLED": "0",
}


# -----------------------------------------------------------------------------
# Shrinking


def shrunk(config: str, changes: dict[str, str]) -> dict[str, str]:
    """Variables of a RECORD at small size: what names layers or follows a size is scaled."""
    base = {"RECORD": config} | SHRINK | changes
    full = Config.from_env({"RECORD": config, "DEVICE": "cpu"})
    layers, width = int(base["NUM_LAYERS"]), int(base["MODEL_DIM"]) / full.model_dim
    ratio = layers / full.num_layers
    last = sorted(i % full.num_layers - full.num_layers for i in full.ve_layers)
    middle = sorted({round(i % full.num_layers * ratio) for i in full.depth_recurrence})
    scaled = {
        "VE_LAYERS": ",".join(str(max(-layers, i)) for i in last),
        "DEPTH_RECURRENCE": ",".join(map(str, middle)),
        "XSA_LAST_N": round(full.xsa_last_n * ratio) or min(1, full.xsa_last_n),
        "PRE_ENRICH_DIM": round(full.pre_enrich_dim * width),
        "NGRAM_BUCKETS": max(1, full.ngram_buckets // TOKENS_SHRINK),
        "NGRAM_CHUNK_TOKENS": min(full.ngram_chunk_tokens, 64),
    }
    return {name: str(value) for name, value in scaled.items() if value != ""} | base


def schedule(seconds: int, step_ms: float) -> dict[str, str]:
    """Schedules as shares of the steps that `seconds` will hold, those of the published runs:
    half of the steps for the fall of the rate, a fifth for Muon's momentum, EMA over a 20th (333 of
    6,800; unscaled 0.997 would keep most of the first weights), 136 intervals of SWA."""
    steps = 1000 * seconds / step_ms
    values = dict(
        ITERATIONS=NEVER,
        VAL_LOSS_EVERY=NEVER,
        MAX_WALLCLOCK_SECONDS=seconds,
        WARMDOWN_ITERS=round(steps / 2),
        MUON_MOMENTUM_WARMUP_STEPS=round(steps / 5),
        EMA_DECAY=round(max(0.5, 1 - 20 / steps), 4),
        SWA_EVERY=max(1, round(steps / 136)),
        QAT_EVERY=max(1, round(steps / 40)),
    )
    return {name: str(value) for name, value in values.items()}


# -----------------------------------------------------------------------------
# Texts


def text_folder(name: str) -> Path:
    """The dataset of a text, prepared where that is still to do."""
    folder = {"sample": SAMPLE_DATA, "python": PYTHON}.get(name, Path(name).resolve())
    prepare_sample(folder)  # before several runs would at the same time
    if folder == PYTHON and not (folder / "tokenizer.model").exists():
        prepare_python(folder)
    if not list(folder.glob("*_val_*.bin")):
        raise UserError(f"--texts {name}: no dataset; fix: sample, python or a dataset folder")
    return folder


def standard_library(root: Path) -> Iterator[str]:
    """Python sources, in the order of their paths' hashes, until PYTHON_BYTES are full."""
    paths = [path.relative_to(root) for path in root.rglob("*.py")]
    paths = [
        p.as_posix() for p in paths if not LEFT_OUT & set(p.parts) and "sysconfig" not in p.name
    ]
    left = PYTHON_BYTES
    for path in sorted(paths, key=lambda path: hashlib.sha256(path.encode()).digest()):
        content = (root / path).read_bytes()
        left -= len(content)
        if left < 0:
            return
        if text := content.decode("utf-8", errors="ignore"):
            yield text


def prepare_python(folder: Path) -> None:
    """A dataset of a few MB of the standard library, a document for each file."""
    with tempfile.TemporaryDirectory(prefix="python_") as made:
        source = Path(made) / "python.jsonl"
        documents = standard_library(Path(sysconfig.get_paths()["stdlib"]))
        lines = [json.dumps({"text": text}) + "\n" for text in documents]
        source.write_text("".join(lines), encoding="utf-8")
        script = ROOT / "data/prepare_text.py"
        command = [sys.executable, script, "--input", source, "--out", folder]
        subprocess.run([*command, "--val-fraction", "0.06"], check=True)


# -----------------------------------------------------------------------------
# Tables

COLUMNS = (  # title, measure, style
    ("steps", "steps", ".0f"),
    ("ms a step", "step_ms", ".0f"),
    ("averaged", "averaged_bpb", ".4f"),
    ("int6", "int6_bpb", ".4f"),
    ("sliding", "sliding_bpb", ".4f"),
    ("after TTT", "ttt_bpb", ".4f"),
    ("own cascade, honest", "cascade_bpb", ".4f"),
    ("**val_bpb**", "val_bpb", ".4f"),
    ("as-written pseudo-score", "pseudo_bpb", ".4f"),
    ("its mass", "mass_mean", ".2f"),
    ("artifact bytes", "artifact_bytes", ",.0f"),
)
SPREAD = ("step_ms", "val_bpb")  # shown with their standard errors; the first tells a busy machine
NOTES = """Each configuration trains for {seconds} s on an equal share of the cores, with seeds 1 to
{seeds}, and is scored as in a real run: all but the pseudo-score is of the artifact re-read, and
normalised; ± is the standard error over seeds. "Own cascade" is the configuration's published
backoff on exact counts, val_bpb the learned mixture. The pseudo-score is what the PR's own scorer
prints, and the mass beside it what its "probabilities" add up to: no code length.

{ranks}

{tables}

## Shrunk alike

{shrink}

Layer numbers are scaled to the depth, the pre-enrichment to the width; hashed tables have 1/{cut}
of their buckets, about as the text is shorter, and take up at most 64 targets at a time. Schedules
are shares of the steps, those of the published runs: the rate falls over the last half, the EMA
reaches over a 20th (0.997 as published would keep most of the first weights of so short a run).
Rates are each configuration's own. #993's pruning to 15.149 MiB has nothing to do at this size.
Times and so the number of steps depend on what else the machine does: the scores are not the same
twice. The order of models so small tells little about the order at full size.
"""


def ranks(rows: Sequence[Row]) -> dict[str, list[int]]:
    """config -> its rank by val_bpb for each text and seed, 1 for the best."""
    found: dict[str, list[int]] = {}
    for place in sorted({(row["labels"]["text"], row["labels"]["seed"]) for row in rows}):
        here = [r for r in rows if (r["labels"]["text"], r["labels"]["seed"]) == place]
        here.sort(key=lambda row: row["measures"]["val_bpb"])
        for rank, row in enumerate(here, 1):
            found.setdefault(row["labels"]["name"], []).append(rank)
    return found


def rank_table(rows: Sequence[Row], texts: Sequence[str]) -> str:
    found = {name: sum(values) / len(values) for name, values in ranks(rows).items()}
    lines = [
        [name, f"{found[name]:.2f}"]
        + [cell(over_seeds(select(rows, name, text), "val_bpb")) for text in texts]
        for name in sorted(found, key=found.get)
    ]
    return runs.markdown(["configuration", "mean rank", *(f"val_bpb, {t}" for t in texts)], lines)


def select(rows: Sequence[Row], name: str, text: str) -> list[Row]:
    return [r for r in rows if r["labels"]["name"] == name and r["labels"]["text"] == text]


def text_table(rows: Sequence[Row], text: str) -> str:
    """All measures on a text, the best val_bpb first; columns without any value left out."""
    names = dict.fromkeys(r["labels"]["name"] for r in rows if r["labels"]["text"] == text)
    groups = {name: select(rows, name, text) for name in names}
    score = {name: over_seeds(group, "val_bpb").mean for name, group in groups.items()}
    shown = [c for c in COLUMNS if any(c[1] in r["measures"] for g in groups.values() for r in g)]
    lines = [
        [name] + [cell(over_seeds(groups[name], m), s, m in SPREAD) for _, m, s in shown]
        for name in sorted(groups, key=score.get)
    ]
    return f"## {text}\n\n" + runs.markdown(["configuration", *(c[0] for c in shown)], lines)


def write(options: argparse.Namespace, rows: Sequence[Row], about: Row) -> None:
    texts = [text for text in options.texts if any(r["labels"]["text"] == text for r in rows)]
    tables = "\n\n".join(text_table(rows, text) for text in texts)
    shrink = [f"{n}={v}" for n, v in (SHRINK | runs.overrides(options.set)).items()]
    given = dict(seconds=options.seconds, seeds=options.seeds, cut=f"{TOKENS_SHRINK:,}")
    given |= dict(shrink=textwrap.indent(textwrap.fill(" ".join(shrink), 90), "    "))
    text = NOTES.format(**given, tables=tables, ranks=rank_table(rows, texts))
    results = {
        text: {
            name: {m: over_seeds(group, m) for _, m, _ in COLUMNS}
            for name in options.configs
            if (group := select(rows, name, text))
        }
        for text in texts
    }
    name = f"Tournament of {', '.join(options.configs)}"
    runs.write_table(options.out, name, about, text, ranks=ranks(rows), results=results)


# -----------------------------------------------------------------------------
# The tournament


def play(arguments: Sequence[str]) -> int:
    """Time a step of each configuration, then all runs -> exit status, 1 where a run failed."""
    options, began = parse(arguments), time.perf_counter()
    folders = {text: str(text_folder(text)) for text in options.texts}
    changes = runs.overrides(options.set)
    sizes = {name: shrunk(name, changes) for name in options.configs}
    first = {"DATA_PATH": next(iter(folders.values()))}
    timed = {
        name: Task(
            dict(name=f"step of {name}", seed=0),
            size | CALIBRATION | first | {"EVAL_STRIDE": size["TRAIN_SEQ_LEN"]},
        )
        for name, size in sizes.items()
    }
    failed = runs.run_tasks(list(timed.values()), options.jobs, options.out, "step_ms")
    tasks = []
    for seed in range(1, options.seeds + 1):
        for text, folder in folders.items():
            for name, size in sizes.items():
                for row in runs.finished([timed[name]], options.out):
                    plan = schedule(options.seconds, row["measures"]["step_ms"])
                    env = plan | size | {"DATA_PATH": folder, "SEED": str(seed)}
                    tasks.append(Task(dict(name=name, text=text, seed=seed), env))
    failed += runs.run_tasks(tasks, options.jobs, options.out, "val_bpb")
    rows = runs.finished(tasks, options.out)
    about = runs.facts(["records/tools/tournament.py", *arguments], rows, options.jobs, began)
    write(options, rows, about)
    return int(failed > 0)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = runs.parser(__doc__, "tournament")
    parser.add_argument("--configs", type=lambda text: text.split(","), default=list(CONFIGS))
    parser.add_argument("--texts", type=lambda text: text.split(","), default=["sample", "python"])
    parser.add_argument("--seconds", type=runs.positive, default=20, help="of training; default 20")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    return runs.script_main(lambda: play(sys.argv[1:] if arguments is None else arguments))


if __name__ == "__main__":
    sys.exit(main())
