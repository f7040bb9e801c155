"""Build a submission folder in upstream's layout from the finished runs of several seeds.

    python records/tools/submit.py runs/own_seed1337 runs/own_seed42 runs/own_seed2024 \\
      --name "Exact n-grams" --author "Ada Lovelace" --github-id ada --blurb "..."

It writes records/track_<track>/<date>_<name>/ (--out: another folder than records/), whole or not
at all: README.md, submission.json, train_gpt.py, config.env, train_seed<N>.log, requirements.txt,
and for each seed a folder seed_<N>/ with what verify.py reads. val_bpb is the mean over all
seeds, never the best. train_gpt.py and an artifact are the bytes that count; train_gpt.py runs the
config.env beside it, and of seed_<N>/ it reads nothing but the tokenizer.

Runs that are unfinished, over a cap or without proof are refused by name; --force builds all the
same, without the unfinished ones, and the README says what is wrong. Runs that are not seeds of one
configuration are always refused. Exit status: 0, or 2.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import sys
import tempfile
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import run_folder
import stats
from run_folder import RECORDS, ROOT, RunError
from stats import MEASURES, Result

from train_gpt import CAP_BYTES, VARIABLES, UserError, line_fields

PROOF = [name for name in stats.CHECKED if name != "scores.npz"]
UPSTREAM_SEEDS = 3
GITHUB_FILE_BYTES = 100_000_000  # larger files cannot be pushed
WIDTH = 96


# -----------------------------------------------------------------------------
# What train_gpt.py needs to be told


def own_settings(run: Result) -> dict[str, str]:
    """Settings of the run that are not train_gpt.py's defaults, seeds and the like left out."""
    given = set()
    for line in run.folder.all("config"):
        logged = line_fields(line).items()
        given |= {name for name, text in logged if not str(text).endswith("(default)")}
    names = given & VARIABLES.keys() - stats.NO_RESULT
    return {name: text for name, text in run.settings.items() if name in names}


def record(options: argparse.Namespace, run: Result) -> str:
    """config.env, which also makes the folder a RECORD of a checkout."""
    about = " ".join(f"{options.date} {options.name}, seeds of one configuration.".split())
    lines = [f"# {about}", *(f"{name}={text}" for name, text in own_settings(run).items())]
    return "\n".join(lines) + "\n"


def ranks(run: Result) -> int:
    """Processes of the run, from its line "8 x NVIDIA H100" """
    found = re.match(r"(\d+) x ", str(run.folder.last("hardware").get("value")))
    return int(found[1]) if found else 1


# -----------------------------------------------------------------------------
# What is missing


def problems(run: Result) -> list[str]:
    """Whatever keeps one finished run out of a submission"""
    found = stats.over_budget(run)
    missing = [name for name in PROOF if not (run.folder.path / name).exists()]
    found += [f"no {name}" for name in missing]
    if "submission.json" not in missing:
        found += [f"submission.json is of another {name}" for name in stats.misfits(run.folder)]
    if 'ROOT / "config.env"' not in run.folder.read("train_gpt.py"):
        found.append("its train_gpt.py is too old to run the config.env beside it")
    if run.steps is None:
        found.append("no training (EVAL_ONLY)")
    codec = run.folder.last("final_codec")
    if codec.get("decoded") != "ok":
        found.append(f"no proof: final_codec has decoded:{codec.get('decoded')}")
    if run.verification.startswith("FAILED"):
        found.append(f"verify.py says {run.verification}")
    return found


def load_runs(paths: Sequence[str]) -> tuple[list[Result], list[str]]:
    """-> the finished runs by seed, what is wrong with them and with the others"""
    runs, wrong = [], []
    for path in paths:
        try:
            runs.append(stats.load(path))
        except UserError as error:
            wrong.append(f"{error} (left out)")
    if not runs:
        raise RunError("; ".join(wrong).replace(" (left out)", ""))
    runs.sort(key=lambda run: run.seed)
    if different := stats.differences(runs):
        raise RunError(
            f"not seeds of one configuration: {'; '.join(different)}; fix: leave one out"
        )
    return runs, wrong


def complaints(options: argparse.Namespace, runs: Sequence[Result], wrong: list[str]) -> list[str]:
    """Everything that is missing or over a cap, each with its run"""
    found = wrong + [f"{run.name}: {what}" for run in runs for what in problems(run)]
    for run in runs:
        large = [p for p in carried(run, options.scores) if p.stat().st_size > GITHUB_FILE_BYTES]
        found += [
            f"{path}: over {GITHUB_FILE_BYTES:,} bytes, too large to be pushed" for path in large
        ]
    for name in ("author", "github_id"):
        if not getattr(options, name):
            found.append(f"no --{name.replace('_', '-')}")
    return found


def carried(run: Result, scores: bool) -> list[Path]:
    """Files of a run folder that go into seed_<N>/"""
    names = PROOF + ["scores.npz"] * scores
    return [path for name in names if (path := run.folder.path / name).exists()]


# -----------------------------------------------------------------------------
# submission.json


def combined(options: argparse.Namespace, runs: Sequence[Result]) -> dict[str, Any]:
    """Upstream's keys over all seeds: scores are means, bytes and seconds those of the worst seed,
    steps the median; deviations have n - 1, null for one seed."""
    parts, stages = [run_folder.submission(run.folder) for run in runs], stats.by_stage(runs)
    seeds = {
        str(run.seed): part["seed_results"][str(run.seed)]
        for run, part in zip(runs, parts, strict=True)
    }
    score = {name: stages["ngram"][name].mean for name in MEASURES}
    score |= {f"{name}_std": stages["ngram"][name].deviation for name in MEASURES}
    total = max(run.sizes["total"] for run in runs)
    steps = [run.steps for run in runs if run.steps is not None]
    return {
        "author": options.author,
        "github_id": options.github_id,
        "name": options.name,
        "blurb": options.blurb or parts[0]["blurb"],
        "date": options.date,
        "track": options.track,
        **score,
        "bytes_total": total,
        "bytes_code": runs[0].sizes["code"],
        "over_cap": total > CAP_BYTES,
        "seeds": [run.seed for run in runs],
        "seed_results": seeds,
        "hardware": parts[0]["hardware"],
        "pytorch_version": parts[0]["pytorch_version"],
        "step_stop": statistics.median_low(steps) if steps else None,
        "wallclock_seconds": max(part["wallclock_seconds"] for part in parts),
        "eval_time_seconds": max(part["eval_time_seconds"] for part in parts),
        "tokens": parts[0]["tokens"],
        "bytes": parts[0]["bytes"],
        "sha256": {
            "code": runs[0].digests["train_gpt.py"],
            "artifact": {str(run.seed): run.digests["artifact.bin"] for run in runs},
            "tokenizer": runs[0].digests["tokenizer.model"],
        },
        "stages": {
            stage: {name: found[name].mean for name in MEASURES}
            | {f"{name}_std": found[name].deviation for name in MEASURES}
            for stage, found in stages.items()
        },
    }


# -----------------------------------------------------------------------------
# README.md

README = """# {name}

{problems}{blurb}

val_bpb {score}, val_loss {loss} ({seeds}).

{runs}

{stages}

Bytes: train_gpt.py {code:,}, artifact at most {weights:,}, together at most {total:,} of
{cap:,}. Everything else here is log and proof.

## Run

From this folder, with DATA_PATH set to the folder of the token shards, on {hardware}
(torch {torch}; `pip install -r requirements.txt`); the settings are in config.env:

```bash
{command}
```

train_gpt.py alone is what trains, scores, proves and decodes (sha256
{sha}).

## Check

seed_<N>/ is the run folder of that seed. {proof}

```bash
{check}
```

turns stream.bin back into the validation tokens, seed_{seed}/decoded.npy, with nothing but
train_gpt.py and artifact.bin, on the kind of machine that the stream was made on (another one is
refused by name). In a checkout of the project with this train_gpt.py,
`python records/tools/verify.py <this folder>/seed_{seed}` makes every other check, too.
"""


def command(runs: Sequence[Result]) -> str:
    """The shell lines that make these runs again from the submission folder"""
    seeds = " ".join(str(run.seed) for run in runs)
    # The embedded tokenizer is the runs' own, wherever the shards lie.
    tokenizer = f"seed_{runs[0].seed}/tokenizer.model"
    count = ranks(runs[0])
    launcher = f"torchrun --standalone --nproc_per_node={count}" if count > 1 else "python"
    return f"""for seed in {seeds}; do
  SEED=$seed RUN_ID=seed_$seed TOKENIZER_PATH={tokenizer} \\
    {launcher} train_gpt.py | tee rerun_seed$seed.log
done"""


def proof_note(runs: Sequence[Result]) -> str:
    """How much of the text stream.bin holds"""
    codec = [run.folder.last("final_codec") for run in runs]
    if any(line.get("decoded") != "ok" for line in codec):
        return "Not every seed has a proof."
    least = min(line["proved_tokens"] for line in codec)
    total = codec[0]["total_tokens"]
    if least == total:
        return f"All {total:,} tokens of the text are in its stream.bin:"
    return f"{least:,} of the text's {total:,} tokens are in its stream.bin:"


def spread(summary: stats.Summary) -> str:
    deviation = "" if summary.deviation is None else f" ± {summary.deviation:.5f}"
    return f"{summary.mean:.5f}{deviation}"


def readme(options: argparse.Namespace, runs: Sequence[Result], wrong: Sequence[str]) -> str:
    whole, final = combined(options, runs), stats.by_stage(runs)["ngram"]
    seed = runs[0].seed
    note = f"**Not a valid submission:** {'; '.join(wrong)}.\n\n" if wrong else ""
    return README.format(
        name=whole["name"],
        problems=note,
        blurb=textwrap.fill(whole["blurb"], WIDTH),
        score=spread(final["val_bpb"]),
        loss=spread(final["val_loss"]),
        seeds=f"mean of {len(runs)} seeds, ± standard deviation" if len(runs) > 1 else "one seed",
        runs=stats.run_table(runs),
        stages=stats.stage_table(runs),
        code=whole["bytes_code"],
        weights=max(run.sizes["weights"] for run in runs),
        total=whole["bytes_total"],
        cap=CAP_BYTES,
        hardware=whole["hardware"],
        torch=whole["pytorch_version"],
        command=command(runs),
        sha=whole["sha256"]["code"],
        proof=proof_note(runs),
        check=f"DECODE=seed_{seed} python train_gpt.py",
        seed=seed,
    )


# -----------------------------------------------------------------------------
# The folder


def build(
    options: argparse.Namespace, runs: Sequence[Result], wrong: Sequence[str], folder: Path
) -> None:
    """Fill an empty folder."""
    for run in runs:
        (folder / f"seed_{run.seed}").mkdir()
        for path in carried(run, options.scores):
            shutil.copyfile(path, folder / f"seed_{run.seed}" / path.name)
        if (log := run.folder.path / "log.txt").exists():
            shutil.copyfile(log, folder / f"train_seed{run.seed}.log")
    shutil.copyfile(runs[0].folder.path / "train_gpt.py", folder / "train_gpt.py")
    shutil.copyfile(ROOT / "requirements.txt", folder / "requirements.txt")
    (folder / "config.env").write_text(record(options, runs[0]), encoding="utf-8")
    found = combined(options, runs) | ({"problems": list(wrong)} if wrong else {})
    text = json.dumps(found, indent=2, ensure_ascii=False, allow_nan=False)
    (folder / "submission.json").write_text(text + "\n", encoding="utf-8")
    (folder / "README.md").write_text(readme(options, runs, wrong), encoding="utf-8")


def place(options: argparse.Namespace) -> Path:
    """The folder to be made; RunError where it is there already"""
    name = re.sub(r"\W+", "_", options.name).strip("_")
    if not name or not re.fullmatch(r"\d{4}-\d\d-\d\d", options.date):
        raise RunError(
            f"--name {options.name!r} --date {options.date}: must be a name, a YYYY-MM-DD"
        )
    path = options.out / f"track_{options.track}" / f"{options.date}_{name}"
    if path.exists() and not options.overwrite:
        raise RunError(f"{path}: is there already; fix: --overwrite or another --name")
    return path


def make(options: argparse.Namespace) -> tuple[Path, list[str]]:
    """-> the new folder, what is wrong with it; RunError where that is not forced"""
    runs, wrong = load_runs(options.runs)
    runs = stats.with_verification(runs, options.verify)
    newest = max((run_folder.submission(run.folder) for run in runs), key=lambda part: part["date"])
    options.date = options.date or newest["date"][:10]
    options.track = options.track or newest["track"]
    for name in ("author", "github_id"):
        setattr(options, name, getattr(options, name) or newest[name])
    wrong, path = complaints(options, runs, wrong), place(options)
    if wrong and not options.force:
        raise RunError(f"no submission: {'; '.join(wrong)}; fix: mend it, or --force")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial_", dir=path.parent) as partial:
        whole, old = Path(partial, "new"), Path(partial, "old")
        whole.mkdir()
        build(options, runs, wrong, whole)
        if path.exists():
            os.replace(path, old)
        try:
            os.replace(whole, path)
        except OSError:
            if old.exists():
                os.replace(old, path)
            raise
    return path, wrong + remarks(runs)


def remarks(runs: Sequence[Result]) -> list[str]:
    """What does not keep a submission from being one, but should be known"""
    few = [f"{len(runs)} seeds, upstream's rule usually takes three"] * (len(runs) < UPSTREAM_SEEDS)
    return few + [f"{run.name}: {run.verification}" for run in runs if run.verification != "PROVED"]


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("runs", nargs="+", metavar="RUN_DIR")
    made.add_argument(
        "--name", required=True, help="of the submission; the folder is <date>_<name>"
    )
    made.add_argument("--author", default="", help="default: AUTHOR of the environment")
    made.add_argument("--github-id", default="", help="default: GITHUB_ID of the environment")
    made.add_argument("--blurb", default="", help="one or two sentences; default: the run's own")
    made.add_argument("--date", default="", help="YYYY-MM-DD; default: that of the last run")
    made.add_argument("--track", default="", help="default: the runs', such as 10min_16mb")
    made.add_argument("--out", type=Path, default=RECORDS, help="folder of the tracks")
    made.add_argument("--scores", action="store_true", help="scores.npz, too (48 bytes a token)")
    made.add_argument("--verify", action="store_true", help="run verify.py on each folder")
    made.add_argument("--force", action="store_true", help="build though something is wrong")
    made.add_argument("--overwrite", action="store_true", help="replace a folder of this name")
    return made


def main(arguments: list[str] | None = None) -> int:
    try:
        path, notes = make(parser().parse_args(arguments))
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("wrote", path)
    for note in notes:
        print("note:", note)
    return 0


if __name__ == "__main__":
    sys.exit(main())
