"""Mean and spread of several seeds of one configuration, and whether they beat a record.

    python records/tools/stats.py runs/own_seed1337 runs/own_seed42 --against 2.7345
    python records/tools/stats.py --table                 rewrites the table in records/README.md

--against is a record's val_loss in nats a token, or its submission.json, record folder or run
folders. Upstream's rule: at least 0.005 nats better at p < 0.01. One-sided: a one-sample t-test
against a number or a single seed, Welch's test against several seeds. Runs that differ in more than
the seed are refused by name of what differs (--mixed averages them all the same).

--verify runs verify.py on each folder and keeps its result there as verify.json, with the
sha256 of the files it is about: it is read again while these are the same. Such a file is the word
of whoever wrote it; somebody else's folder needs --verify. Pseudo scores are never averaged in.

Exit status: 0 the statistics were made, whatever they say; 2 they could not be.
"""

import argparse
import hashlib
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from run_folder import (
    FILES,
    RECORDS,
    RunError,
    RunFolder,
    file_bytes,
    require_finished,
)

from train_gpt import CAP_BYTES, UserError, sha256, write_atomically

IMPROVEMENT_NATS, ALPHA = 0.005, 0.01  # upstream's rule for a new record
CAP_SECONDS = 600  # of training, and of evaluation
# Settings that may differ between seeds: none of them changes a result.
NO_RESULT = {"SEED", "RESUME", "OVERWRITE", "CHECKPOINT_EVERY"}
CHECKED = (  # what verify.py reads of a folder
    *FILES.values(),
    *("stream.bin", "blocks.npz", "scores.npz", "metrics.jsonl", "log.txt", "config.env"),
    "submission.json",
)
MEASURES = ("val_loss", "val_bpb")
MOST_SEEDS = 100  # looked at for how many would decide
BEGIN, END = "<!-- records: python records/tools/stats.py --table -->", "<!-- end of records -->"


# -----------------------------------------------------------------------------
# One run


class Result(NamedTuple):
    """A finished run folder, as far as statistics need it."""

    folder: RunFolder
    seed: int
    stages: dict[str, dict[str, Any]]  # final_<stage>_exact lines
    settings: dict[str, str]  # config.env
    digests: dict[str, str]  # sha256 of FILES
    text: tuple[int, int, str]  # targets, bytes, sha256 of the bytes per block
    verification: str = "not verified"

    @property
    def name(self) -> str:
        return str(self.folder.path)

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of code, weights, total"""
        return self.folder.last("final_artifact_bytes")

    @property
    def budget(self) -> dict[str, float]:
        """train_seconds, eval_seconds"""
        return self.folder.last("final_budget")

    @property
    def steps(self) -> int | None:
        return max(self.folder.steps("train_loss"), default=None)


def load(path: str | Path) -> Result:
    """RunError for a run that is not finished or whose lines hold no numbers."""
    folder = RunFolder(path)
    require_finished(folder)
    for stage, values in (stages := folder.stages()).items():
        for name in MEASURES:
            if not math.isfinite(values.get(name, math.nan)):
                raise RunError(
                    f"{path}: final_{stage}_exact has {name}:{values.get(name)}, not a number"
                )
    settings = folder.config
    if not settings.get("SEED", "").isdecimal():
        raise RunError(f"{path}: config.env has no SEED")
    blocks = folder.blocks()["bytes"].astype("<i8")
    text = folder.last("val_text").get("tokens", 0), int(blocks.sum()), sha256(blocks.tobytes())
    digests = {name: sha256(file_bytes(folder, name)) for name in FILES.values()}
    return Result(folder, int(settings["SEED"]), stages, settings, digests, text)


def over_budget(run: Result) -> list[str]:
    """What is over a cap. The clock is looked at after each step, so a run that it ended is a
    fraction of a step late; upstream's are, too."""
    found, total, spent = [], run.sizes["total"], run.budget
    if total > CAP_BYTES:
        found.append(f"{total:,} bytes, the cap is {CAP_BYTES:,}")
    stopped = any(line["key"].startswith("stopping_early") for line in run.folder.lines)
    step = run.folder.steps("train_loss").get(run.steps, {}).get("step_avg_ms", 0) / 1000
    for name, slack in dict(train_seconds=2 * step if stopped else 0, eval_seconds=0).items():
        if spent[name] > CAP_SECONDS + slack:
            found.append(f"{name} {spent[name]:.1f}, the cap is {CAP_SECONDS}")
    return found


# -----------------------------------------------------------------------------
# Do they belong together?


def differences(runs: Sequence[Result]) -> list[str]:
    """What keeps these runs from being seeds of one configuration; [] for nothing."""
    found, first = [], runs[0]
    for run in runs[1:]:
        for name in ("train_gpt.py", "tokenizer.model"):
            marks = [other.digests[name][:12] for other in (first, run)]
            found += difference(f"sha256 of {name}", marks, first, run)
        for name in sorted((first.settings.keys() | run.settings.keys()) - NO_RESULT):
            found += difference(
                name, [r.settings.get(name, "none") for r in (first, run)], first, run
            )
        texts = [
            f"{r.text[0]:,} tokens of {r.text[1]:,} bytes ({r.text[2][:12]})" for r in (first, run)
        ]
        found += difference("the validation text", texts, first, run)
    return found + repeated(runs)


def difference(what: str, values: Sequence[Any], first: Result, other: Result) -> list[str]:
    if values[0] == values[1]:
        return []
    return [f"{what} is {values[0]} in {first.name}, {values[1]} in {other.name}"]


def repeated(runs: Sequence[Result]) -> list[str]:
    """A run given twice, or copied under another seed."""
    found, seeds, artifacts = [], {}, {}
    for run in runs:
        other = seeds.setdefault(run.seed, run)
        twin = artifacts.setdefault(run.digests["artifact.bin"], run)
        if other is not run:
            found.append(f"SEED is {run.seed} both in {other.name} and in {run.name}")
        elif twin is not run:
            found.append(f"artifact.bin is the same in {twin.name} and in {run.name}")
    return found


def load_seeds(paths: Iterable[str | Path], mixed: bool = False) -> list[Result]:
    """The runs, by seed; RunError, unless mixed, where they are not of one configuration."""
    runs = sorted(map(load, paths), key=lambda run: run.seed)
    if (wrong := differences(runs)) and not mixed:
        raise RunError(f"not seeds of one configuration: {'; '.join(wrong)}; fix: leave one out")
    return runs


# -----------------------------------------------------------------------------
# Is each of them real?


def misfits(folder: RunFolder) -> list[str]:
    """Files that submission.json names with another sha256, or that it does not name."""
    try:
        claims = dict(json.loads(folder.read("submission.json"))["sha256"])
    except RunError:
        raise
    except (ValueError, KeyError, TypeError):
        raise RunError(f"{folder.path}: submission.json is unreadable") from None
    return [
        name for what, name in FILES.items() if claims.get(what) != sha256(file_bytes(folder, name))
    ]


def marks(folder: Path) -> dict[str, str]:
    """sha256 of whatever verify.py reads there"""
    found = {}
    for name in CHECKED:
        if (folder / name).exists():
            with open(folder / name, "rb") as file:  # scores.npz can be gigabytes
                found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def verify(folder: Path) -> None:
    """Run verify.py on a folder and keep what it says as verify.json."""
    before = marks(folder)
    command = [sys.executable, RECORDS / "tools/verify.py", folder, "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    try:
        result = json.loads(done.stdout)
    except ValueError:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise RunError(f"{folder}: verify.py: {last.removeprefix('error: ')}") from None
    date = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    text = json.dumps(result | dict(date=date, sha256=before), indent=2)
    write_atomically(folder / "verify.json", f"{text}\n".encode())


def verification(folder: RunFolder) -> str:
    """The verdict that is kept, or why there is none."""
    try:
        wrong = misfits(folder)
    except RunError as error:
        return f"not verified: {str(error).removeprefix(f'{folder.path}: ')}"
    if wrong:
        return f"not verified: submission.json is of another {' and '.join(wrong)}"
    path = folder.path / "verify.json"
    if not path.exists():
        return "not verified"
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        verdict, why, of = kept["verdict"], kept["why"], kept["sha256"]
    except (ValueError, KeyError, TypeError):
        return "not verified: verify.json is unreadable"
    if of != marks(folder.path):
        return "not verified: verify.json is of other files"
    return verdict if verdict == "PROVED" else f"{verdict} ({why})"


def with_verification(runs: Iterable[Result], make: bool) -> list[Result]:
    """make: run verify.py first"""
    runs = list(runs)
    for run in runs if make else ():
        print(f"verifying {run.name}", file=sys.stderr, flush=True)
        verify(run.folder.path)
    return [run._replace(verification=verification(run.folder)) for run in runs]


# -----------------------------------------------------------------------------
# Statistics


class Summary(NamedTuple):
    """deviation: of a sample, n - 1; None for one value"""

    count: int
    mean: float
    deviation: float | None
    least: float
    most: float


def summarise(values: Sequence[float]) -> Summary:
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return Summary(len(values), statistics.fmean(values), deviation, min(values), max(values))


def by_stage(runs: Iterable[Result]) -> dict[str, dict[str, Summary]]:
    """stage -> measure -> Summary, over the runs that have the stage, in the order of the runs"""
    runs = list(runs)
    names = dict.fromkeys(stage for run in runs for stage in run.stages)
    of = {stage: [run.stages[stage] for run in runs if stage in run.stages] for stage in names}
    return {
        stage: {name: summarise([values[name] for values in found]) for name in MEASURES}
        for stage, found in of.items()
    }


def upper_tail(t: float, degrees: float) -> float:
    """P(T > t) of Student's distribution; degrees > 0 need not be whole (Welch)."""
    import mpmath  # torch brings it along

    if math.isinf(t):
        return float(t < 0)
    half = float(mpmath.betainc(degrees / 2, 0.5, 0, degrees / (degrees + t * t), True)) / 2
    return half if t >= 0 else 1 - half


class Baseline(NamedTuple):
    """What is to be beaten. losses: val_loss of each seed, nats; a single one is taken as exact"""

    name: str
    losses: list[float]


class Decision(NamedTuple):
    """better: True, False, or None where the runs cannot decide"""

    better: bool | None
    test: str
    gap: float  # baseline's mean minus ours, nats
    t: float | None
    degrees: float | None
    p: float | None
    reason: str


def t_test(ours: Summary, theirs: Summary, margin: float) -> tuple[float, float]:
    """-> t, degrees of freedom, of theirs - ours > margin; theirs may be one exact number. At least
    one deviation must be above 0."""
    parts = [
        (s.deviation**2 / s.count, s.count - 1) for s in (ours, theirs) if s.deviation is not None
    ]
    error = sum(variance for variance, _ in parts)
    degrees = error**2 / sum(variance**2 / count for variance, count in parts)
    return (theirs.mean - ours.mean - margin) / math.sqrt(error), degrees


def decide(ours: Summary, base: Baseline, margin: float, alpha: float) -> Decision:
    """Are ours better than the baseline by `margin` nats, at p < alpha?"""
    theirs = summarise(base.losses)
    test = "one-sample t-test" if theirs.deviation is None else "Welch's t-test"
    gap = theirs.mean - ours.mean
    undecided = Decision(None, test, gap, None, None, None, "")
    if ours.count < 2:
        reason = "one run cannot decide: it has no standard deviation; fix: at least three seeds"
        return undecided._replace(reason=reason)
    if ours.deviation == 0 and not theirs.deviation:
        return undecided._replace(reason="the runs cannot decide: their standard deviation is 0")
    t, degrees = t_test(ours, theirs, margin)
    p = upper_tail(t, degrees)
    reason = "" if p < alpha else shortage(ours, theirs, margin, alpha)
    better = None if p >= alpha and ours.count == 2 and gap > margin else p < alpha
    return Decision(better, test, gap, t, degrees, p, reason)


def shortage(ours: Summary, theirs: Summary, margin: float, alpha: float) -> str:
    """Why p is not low enough, and how many seeds as these would make it so."""
    if theirs.mean - ours.mean <= margin:
        return f"the mean itself is not {margin:g} lower, so no more seeds of its kind help"
    few = f"{('one run', 'two runs')[ours.count - 1]} cannot decide; " if ours.count < 3 else ""
    for count in range(ours.count + 1, MOST_SEEDS + 1):
        if upper_tail(*t_test(ours._replace(count=count), theirs, margin)) < alpha:
            return f"{few}with the same mean and deviation {count} seeds would be enough"
    return f"{few}with the same mean and deviation {MOST_SEEDS} seeds would not be enough"


def read_baseline(given: Sequence[str], runs: Sequence[Result], mixed: bool) -> Baseline:
    """A number of nats, or the seeds of submission.json files or of the folders that hold one."""
    try:
        number = float(given[0])
    except ValueError:
        number = None
    if number is not None and (len(given) > 1 or not 0 < number < math.inf):
        raise RunError(
            f"--against {' '.join(given)}: must be one number of nats above 0, or folders"
        )
    if number is not None:
        return Baseline(f"{number:g}", [number])
    losses = {}
    for path in map(Path, given):
        claims = read_submission(path)
        if (wrong := other_text(claims, runs[0])) and not mixed:
            raise RunError(f"--against {path}: {wrong}, so nats do not compare; fix: the same text")
        for seed, loss in seed_losses(path, claims).items():
            if losses.setdefault(seed, loss) != loss:
                raise RunError(f"--against {path}: seed {seed} is there twice; fix: leave one out")
    return Baseline(" ".join(given), list(losses.values()))


def read_submission(path: Path) -> dict[str, Any]:
    path = path / "submission.json" if path.is_dir() else path
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise RunError(
            f"--against {path}: {why}; fix: a number of nats, or a folder with it"
        ) from None
    if not isinstance(found, dict):
        raise RunError(f"--against {path}: not a JSON object; fix: a submission.json")
    return found


def seed_losses(path: Path, claims: dict[str, Any]) -> dict[str, float]:
    """Seed -> val_loss; "" for a single value without seeds"""
    seeds = claims.get("seed_results") or {"": claims}
    losses = {seed: values.get("val_loss") for seed, values in seeds.items()}
    for seed, loss in losses.items():
        if not isinstance(loss, int | float) or not 0 < loss < math.inf:
            where = f"seed {seed}: " * bool(seed)
            raise RunError(
                f"--against {path}: {where}val_loss is {loss}; fix: give it in nats a token"
            )
    return losses


def other_text(claims: dict[str, Any], run: Result) -> str:
    """How a submission's text differs from the run's; "" where it is the same or not said"""
    there = claims.get("tokens"), claims.get("bytes")
    if None not in there and there != run.text[:2]:
        here = f"{run.text[0]:,}, {run.text[1]:,}"
        return f"it is of {there[0]:,} tokens, {there[1]:,} bytes, not {here}"
    tokenizer = claims.get("sha256", {}).get("tokenizer", run.digests["tokenizer.model"])
    return "its tokenizer is another" if tokenizer != run.digests["tokenizer.model"] else ""


# -----------------------------------------------------------------------------
# Report


def table(head: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> str:
    """Markdown in columns as wide as their widest cell; numbers to the right"""
    widths = [max(3, *(len(row[i]) for row in (head, *rows))) for i in range(len(head))]
    rule = ["-" * w if i in left else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    lines = []
    for row in (head, rule, *rows):
        cells = [
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def stage_table(runs: Sequence[Result]) -> str:
    def cells(s: Summary, style: str) -> list[str]:
        deviation = "-" if s.deviation is None else f"{s.deviation:{style}}"
        return [f"{s.mean:{style}}", deviation, f"{s.least:{style}}", f"{s.most:{style}}"]

    head = ["stage", "runs", "val_loss", "sd", "min", "max", "val_bpb", "sd", "min", "max"]
    rows = [
        [stage, str(found["val_loss"].count)]
        + cells(found["val_loss"], ".5f")
        + cells(found["val_bpb"], ".5f")
        for stage, found in by_stage(runs).items()
    ]
    return table(head, rows)


def run_table(runs: Sequence[Result]) -> str:
    head = ["seed", "val_loss", "val_bpb", "bytes", "steps", "training s", "evaluation s", "check"]
    rows = []
    for run in runs:
        final, spent = run.stages["ngram"], run.budget
        scores = [f"{final['val_loss']:.5f}", f"{final['val_bpb']:.5f}", f"{run.sizes['total']:,}"]
        steps = "-" if run.steps is None else f"{run.steps:,}"
        seconds = [f"{spent[name]:.1f}" for name in ("train_seconds", "eval_seconds")]
        rows.append([str(run.seed), *scores, steps, *seconds, run.verification])
    return table(head, rows, left=(0, len(head) - 1))


def remarks(runs: Sequence[Result]) -> list[str]:
    """What must not be overlooked: caps, hardware, runs without a check, pseudo scores."""
    found = [f"OVER A CAP: {run.name}: {what}." for run in runs for what in over_budget(run)]
    found = found or [
        f"All within {CAP_BYTES:,} bytes, {CAP_SECONDS} s of training and of scoring."
    ]
    found += [f"Mixed: {what}." for what in differences(runs)]
    kinds = dict.fromkeys(str(run.folder.last("hardware").get("value")) for run in runs)
    if len(kinds) > 1:
        found.append(f"Different hardware: {', '.join(kinds)}.")
    if unproved := [run.name for run in runs if run.verification != "PROVED"]:
        found.append(f"NOT PROVED: {', '.join(unproved)}; --verify runs records/tools/verify.py.")
    for run in runs:
        if pseudo := run.folder.last("final_ngram_pseudo"):
            text = f"pseudo score {pseudo['pseudo_bpb']:.4f} of scheme {pseudo.get('scheme')}"
            found.append(f"{run.name}: {text} is no code length and in no mean.")
    return found


def describe(decision: Decision, base: Baseline, margin: float, alpha: float) -> str:
    """The decision in words"""
    seeds = len(base.losses)
    exact = "taken as exact" if seeds == 1 else f"mean of {seeds} seeds"
    mean = statistics.fmean(base.losses)
    word = {True: "yes", False: "no", None: "CANNOT BE DECIDED"}[decision.better]
    claim = (
        f"At least {margin:g} nats better than {base.name} (val_loss {mean:.5f}, {exact}): {word}"
    )
    lower = "lower" if decision.gap >= 0 else "higher"
    facts = [f"the mean is {abs(decision.gap):.5f} {lower}"]
    if decision.p is not None:
        sign = "<" if decision.p < alpha else "not <"
        facts.append(
            f"{decision.test}: t = {decision.t:.3f}, {decision.degrees:.4g} degrees of freedom, "
            f"one-sided p = {decision.p:.3g} {sign} {alpha:g}"
        )
    return f"{claim}; {'; '.join(facts + [decision.reason] * bool(decision.reason))}."


def as_json(runs: Sequence[Result]) -> dict[str, Any]:
    return dict(
        seeds=[run.seed for run in runs],
        stages={
            stage: {name: summary._asdict() for name, summary in found.items()}
            for stage, found in by_stage(runs).items()
        },
        runs=[
            dict(
                folder=run.name,
                seed=run.seed,
                **{name: run.stages["ngram"][name] for name in MEASURES},
                bytes_total=run.sizes["total"],
                steps=run.steps,
                **{name: run.budget[name] for name in ("train_seconds", "eval_seconds")},
                over_budget=over_budget(run),
                verification=run.verification,
                sha256=run.digests,
            )
            for run in runs
        ],
        differences=differences(runs),
    )


# -----------------------------------------------------------------------------
# The table of records/README.md


def record_row(folder: Path, root: Path) -> list[str]:
    """What its README's title says, and the score where it was run with this script"""
    title = (folder / "README.md").read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
    what = title.removeprefix(f"{folder.name}: ")
    link = f"[{folder.name}]({folder.relative_to(root).as_posix()})"
    path = folder / "submission.json"
    if not path.exists():
        return [link, what, "", "not yet run" if (folder / "config.env").exists() else "", ""]
    found = json.loads(path.read_text(encoding="utf-8"))
    losses = [values["val_bpb"] for values in found["seed_results"].values()]
    score = f"{found['val_bpb']:.4f}"
    score += f" ± {statistics.stdev(losses):.4f}" if len(losses) > 1 else ""
    return [link, what, str(len(losses)), score, f"{found['bytes_total']:,}"]


def record_table(root: Path = RECORDS) -> str:
    """Every folder of every track, from what lies in it"""
    folders = sorted(path.parent for path in root.glob("track_*/*/README.md"))
    head = ["folder", "what", "seeds", "val_bpb", "bytes"]
    return table(head, [record_row(folder, root) for folder in folders], left=(0, 1))


def with_table(text: str, root: Path = RECORDS) -> str:
    """The README's text with today's table between its two markers"""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise RunError(f"{root / 'README.md'}: no markers {BEGIN} and {END}; fix: put them back")
    return f"{before}{BEGIN}\n\n{record_table(root)}\n\n{END}{after}"


def write_table(root: Path = RECORDS) -> Path:
    path = root / "README.md"
    write_atomically(path, with_table(path.read_text(encoding="utf-8"), root).encode())
    return path


# -----------------------------------------------------------------------------
# Command line


def report(options: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """-> Markdown, the same for JSON"""
    runs = load_seeds(options.runs, options.mixed)
    base = options.against and read_baseline(options.against, runs, options.mixed)
    runs = with_verification(runs, options.verify)
    seeds = f"{len(runs)} seed{'s' * (len(runs) > 1)}: {', '.join(str(run.seed) for run in runs)}"
    parts, result = [seeds, stage_table(runs), run_table(runs)], as_json(runs)
    lines = remarks(runs)
    if base:
        rule = options.improvement, options.alpha
        decision = decide(by_stage(runs)["ngram"]["val_loss"], base, *rule)
        lines.insert(0, describe(decision, base, *rule))
        result["against"] = base._asdict() | decision._asdict()
    return "\n\n".join([*parts, "\n".join(f"- {line}" for line in lines)]), result


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("runs", nargs="*", metavar="RUN_DIR")
    help_text = "val_loss in nats, or a submission.json or folders of the record to beat"
    made.add_argument("--against", nargs="+", metavar="RECORD", help=help_text)
    made.add_argument("--improvement", type=float, default=IMPROVEMENT_NATS, metavar="NATS")
    made.add_argument("--alpha", type=float, default=ALPHA, help="p must be below it")
    made.add_argument("--verify", action="store_true", help="run verify.py on each folder")
    made.add_argument("--mixed", action="store_true", help="average runs that differ, and say it")
    made.add_argument("--json", action="store_true", help="one JSON object instead of the tables")
    made.add_argument("--write", type=Path, metavar="FILE", help="the output into a file, as well")
    made.add_argument("--table", action="store_true", help="rewrite the table in records/README.md")
    return made


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    if bool(options.runs) == options.table:
        parser().error("give run folders, or --table")
    try:
        if options.table:
            print("wrote", write_table())
            return 0
        text, result = report(options)
        text = json.dumps(result, indent=2, allow_nan=False) if options.json else text
        print(text)
        if options.write:
            write_atomically(options.write, f"{text}\n".encode())
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
