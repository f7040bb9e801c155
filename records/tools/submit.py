"""Build a submission folder in upstream's layout from the finished runs of several seeds.

    python records/tools/submit.py runs/own_seed1337 runs/own_seed42 runs/own_seed2024 \\
      --name "Exact n-grams" --author "Ada Lovelace" --github-id ada --blurb "..."

It writes records/track_<track>/<date>_<name>/ (--out: another folder than records/), whole or not
at all: README.md, submission.json, train_gpt.py, train_gpt_packed.py, config.env,
train_seed<N>.log, requirements.txt, and for each seed a folder seed_<N>/ with what verify.py reads.
val_bpb is the mean over all seeds, never the best. The packed script, which runs the very bytes of
train_gpt.py, and an artifact are the bytes that count; both run the config.env beside them, and of
seed_<N>/ they read nothing but the tokenizer.

verify.py is run on each folder: it must be PROVED here, or, where its stream holds a stretch of the
text only, its artifact must score the same here. Runs that are not, are unfinished or over a cap
are refused by name; --force builds all the same, without the unfinished ones, and the README says
what is wrong. Runs that are not seeds of one configuration are always refused. Exit status: 0; 2.
"""

import argparse
import json
import os
import re
import statistics
import sys
import tempfile
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import stats
from run_folder import FILES, RECORDS, ROOT, RunError, blame, parse_object
from stats import MEASURES, Result

import endings
from train_gpt import (
    CAP_BYTES,
    PACKED_NAME,
    VARIABLES,
    UserError,
    line_fields,
    pack_script,
    printable,
    read_regular,
)

PROOF = [*stats.CHECKED, "blocks.npz"]
UPSTREAM_SEEDS = 3
MOST_COPIED_BYTES = 2**32
GITHUB_FILE_BYTES = 100_000_000  # larger files cannot be pushed
WIDTH = 96
ABOUT = ("author", "github_id", "name", "blurb", "date", "track")  # told, or of the newest run
OF_TEXT = ("lossy", "spelt_bytes", "overlap_documents")  # where a run has them
WORST = ("bytes_total", "over_cap", "wallclock_seconds", "eval_time_seconds")  # of all seeds


# -----------------------------------------------------------------------------
# What train_gpt.py needs to be told


def config_env(about: argparse.Namespace, run: Result) -> str:
    """The run's settings that are not train_gpt.py's defaults, seeds and the like left out. The
    file also makes the folder a RECORD of a checkout."""
    given = set()
    for line in run.folder.all("config"):
        logged = line_fields(line).items()
        given |= {name for name, text in logged if not str(text).endswith("(default)")}
    names = given & VARIABLES.keys() - stats.NO_RESULT
    title = " ".join(f"{about.date} {about.name}, seeds of one configuration.".split())
    lines = [f"{name}={text}" for name, text in run.folder.config.items() if name in names]
    return "\n".join([f"# {title}", *lines]) + "\n"


def ranks(run: Result) -> int:
    """Processes of the run, from its line "8 x NVIDIA H100" """
    found = re.match(r"(\d+) x ", str(run.claims["hardware"]))
    return int(found[1]) if found else 1


# -----------------------------------------------------------------------------
# What is missing


def load_runs(paths: Sequence[str]) -> tuple[list[Result], list[str]]:
    """-> the finished runs by seed, what is wrong with the others"""
    runs = []
    wrong = []
    for path in paths:
        try:
            runs.append(stats.load(path))
        except UserError as error:
            wrong.append(str(error))
    if not runs:
        raise RunError("; ".join(wrong))
    return stats.seeds_of_one(runs), [f"{error} (left out)" for error in wrong]


def problems(run: Result, files: Sequence[Path]) -> list[str]:
    """Whatever keeps one finished run, and these files of it, out of a submission"""
    found = stats.over_budget(run)
    missing = [name for name in PROOF if not run.folder.file(name).exists()]
    found += [f"no {name}" for name in missing]
    if "submission.json" not in missing:
        content = run.folder.read("submission.json").encode()
        named = parse_object(content, run.name).get("sha256")
        if not isinstance(named, dict):
            raise RunError(f"{run.name}: damaged (no sha256 in submission.json); fix: get it again")
        for what, digest in run.claims["sha256"].items():
            if named.get(what) != digest:
                found.append(f"submission.json is of another {FILES[what]}")
    if run.claims["step_stop"] is None:
        found.append("no training (EVAL_ONLY)")
    codec = run.folder.last("final_codec")
    if codec.get("decoded") != "ok":
        found.append(f"no proof: final_codec has decoded:{codec.get('decoded')}")
    if not stats.holds(run.verification):
        found.append(f"verify.py says {run.verification}")
    large = [path.name for path in files if path.stat().st_size > GITHUB_FILE_BYTES]
    found += [f"{name}: over {GITHUB_FILE_BYTES:,} bytes, too large to be pushed" for name in large]
    return [f"{run.name}: {what}" for what in found]


def carried(run: Result, scores: bool) -> list[Path]:
    """Files of a run folder that go into seed_<N>/; the seeds share the script above them"""
    names = set(PROOF) - {FILES["code"]} | ({"scores.npz"} if scores else set())
    return [path for name in sorted(names) if (path := run.folder.path / name).exists()]


def remarks(runs: Sequence[Result]) -> list[str]:
    """What does not keep a submission from being one, but should be known"""
    few = [f"{len(runs)} seeds, upstream's rule usually takes three"] * (len(runs) < UPSTREAM_SEEDS)
    unproved = [run for run in runs if not run.verification.startswith("PROVED")]
    return few + [f"{run.name}: {run.verification}" for run in unproved]


# -----------------------------------------------------------------------------
# submission.json


def combined(about: argparse.Namespace, runs: Sequence[Result]) -> dict[str, Any]:
    """Upstream's keys over all seeds: scores are means, bytes and seconds those of the worst seed,
    steps the median; deviations have n - 1, null for one seed."""
    claims = [run.claims for run in runs]
    worst = {name: max(each[name] for each in claims) for name in WORST}
    steps = [each["step_stop"] for each in claims if each["step_stop"] is not None]
    stages = {}
    for stage, found in stats.by_stage(runs).items():
        stages[stage] = {name: found[name].mean for name in MEASURES}
        stages[stage] |= {f"{name}_std": found[name].deviation for name in MEASURES}
    digests = claims[0]["sha256"]
    artifacts = {str(run.seed): run.claims["sha256"]["artifact"] for run in runs}
    return {
        **{name: getattr(about, name) for name in ABOUT},
        **stages["ngram"],
        "bytes_total": worst["bytes_total"],
        "bytes_code": claims[0]["bytes_code"],
        "over_cap": worst["over_cap"],
        "seeds": [run.seed for run in runs],
        "seed_results": dict(pair for each in claims for pair in each["seed_results"].items()),
        "hardware": claims[0]["hardware"],
        "pytorch_version": claims[0]["pytorch_version"],
        "step_stop": statistics.median_low(steps) if steps else None,
        "wallclock_seconds": worst["wallclock_seconds"],
        "eval_time_seconds": worst["eval_time_seconds"],
        "tokens": claims[0]["tokens"],
        "bytes": claims[0]["bytes"],
        **{name: claims[0][name] for name in OF_TEXT if name in claims[0]},
        "sha256": digests | {"artifact": artifacts},
        "stages": stages,
    }


# -----------------------------------------------------------------------------
# README.md

README = """# {name}

{problems}{blurb}

val_bpb {score}, val_loss {loss} ({seeds}).

{runs}

{stages}

Bytes: {packed} {code:,}, artifact at most {weights:,}, together at most
{total:,} of {cap:,}. Everything else here is log and proof, and train_gpt.py, the same script as it
is read: {packed} holds it, compressed, and runs these very bytes.

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
DECODE=seed_{seed} python train_gpt.py
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


def readme(whole: dict[str, Any], runs: Sequence[Result]) -> str:
    """README.md, from the contents of submission.json"""
    scores = stats.by_stage(runs)["ngram"]
    wrong = whole.get("problems")
    return README.format(
        name=whole["name"],
        problems=f"**Not a valid submission:** {'; '.join(wrong)}.\n\n" if wrong else "",
        blurb=textwrap.fill(whole["blurb"], WIDTH),
        score=scores["val_bpb"].spread(5),
        loss=scores["val_loss"].spread(5),
        seeds=f"mean of {len(runs)} seeds, ± standard deviation" if len(runs) > 1 else "one seed",
        runs=stats.run_table(runs),
        stages=stats.stage_table(runs),
        packed=PACKED_NAME,
        code=whole["bytes_code"],
        weights=whole["bytes_total"] - whole["bytes_code"],
        total=whole["bytes_total"],
        cap=CAP_BYTES,
        hardware=whole["hardware"],
        torch=whole["pytorch_version"],
        command=command(runs),
        sha=whole["sha256"]["code"],
        proof=proof_note(runs),
        seed=runs[0].seed,
    )


# -----------------------------------------------------------------------------
# The folder


def copy(path: Path, target: Path) -> None:
    """A regular file, and none that a link leads to"""
    target.write_bytes(read_regular(path, MOST_COPIED_BYTES))


def build(
    about: argparse.Namespace, runs: Sequence[Result], wrong: Sequence[str], folder: Path
) -> None:
    """Fill an empty folder."""
    for run in runs:
        (folder / f"seed_{run.seed}").mkdir()
        for path in carried(run, about.scores):
            copy(path, folder / f"seed_{run.seed}" / path.name)
        if (log := run.folder.path / "log.txt").exists():
            copy(log, folder / f"train_seed{run.seed}.log")
    copy(runs[0].folder.file(FILES["code"]), folder / FILES["code"])
    (folder / PACKED_NAME).write_bytes(pack_script((folder / FILES["code"]).read_bytes()))
    copy(ROOT / "requirements.txt", folder / "requirements.txt")
    whole = combined(about, runs) | ({"problems": list(wrong)} if wrong else {})
    texts = {
        "config.env": config_env(about, runs[0]),
        "submission.json": json.dumps(whole, indent=2, ensure_ascii=False, allow_nan=False) + "\n",
        "README.md": readme(whole, runs),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")


def place(about: argparse.Namespace) -> Path:
    """The folder to be made; RunError where it is there already"""
    name = re.sub(r"\W+", "_", about.name).strip("_")
    if not name or not re.fullmatch(r"\d{4}-\d\d-\d\d", about.date):
        raise RunError(f"--name {about.name!r} --date {about.date}: must be a name, a YYYY-MM-DD")
    path = about.out / f"track_{about.track}" / f"{about.date}_{name}"
    if path.exists() and not about.overwrite:
        raise RunError(f"{path}: is there already; fix: --overwrite or another --name")
    return path


def make(options: argparse.Namespace) -> tuple[Path, list[str]]:
    """-> the new folder, what is wrong with it; RunError where that is not forced"""
    runs, wrong = load_runs(options.runs)
    runs = stats.with_verification(runs, make=True)
    newest = max((run.claims for run in runs), key=lambda claims: claims["date"])
    told = {name: getattr(options, name) or newest[name] for name in ABOUT}
    about = argparse.Namespace(**vars(options) | told | dict(date=told["date"][:10]))
    path = place(about)
    for run in runs:
        wrong += problems(run, carried(run, about.scores))
    wrong += [f"no --{n.replace('_', '-')}" for n in ("author", "github_id") if not told[n]]
    if wrong and not about.force:
        raise RunError(f"no submission: {'; '.join(wrong)}; fix: mend it, or --force")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial_", dir=path.parent) as partial:
        whole = Path(partial, "new")
        old = Path(partial, "old")
        whole.mkdir()
        build(about, runs, wrong, whole)
        for run in runs:
            if stats.marks(whole / f"seed_{run.seed}") != run.marks:
                raise RunError(f"{run.name}: changed since it was verified; fix: start again")
        if path.exists():
            os.replace(path, old)
        try:
            os.replace(whole, path)
        except OSError:
            if old.exists():
                os.replace(old, path)
            raise
    return path, wrong + remarks(runs)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=(__doc__ or "\n").splitlines()[0])
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
    made.add_argument("--force", action="store_true", help="build though something is wrong")
    made.add_argument("--overwrite", action="store_true", help="replace a folder of this name")
    return made


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        with blame(", ".join(options.runs)):
            path, notes = make(options)
    except (UserError, OSError) as error:
        endings.say(f"error: {printable(str(error))}", sys.stderr)
        return 2
    endings.say(f"wrote {path}")
    for note in notes:
        endings.say(f"note: {printable(note)}")
    return 0


if __name__ == "__main__":
    sys.exit(endings.run(main))
