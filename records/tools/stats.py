"""Mean and spread of several seeds of one configuration, and whether they beat a record.

    python records/tools/stats.py runs/own_seed1337 runs/own_seed42 --against 1.8
    python records/tools/stats.py --table                 rewrites the table in records/README.md

--against is a record's val_loss in nats a token, or its submission.json, record folder or run
folders. Upstream's rule: at least 0.005 nats better at p < 0.01. One-sided: a one-sample t-test
against a number or a single seed, Welch's test against several seeds. Runs that differ in more than
the seed are refused by name of what differs (--mixed averages them all the same).

--verify runs verify.py on each folder and keeps its result there as verify.json, with the
sha256 of the files it is about: it is read again while these are the same, and named as the word of
whoever wrote it; somebody else's folder needs --verify. Pseudo scores are never averaged in.

Exit status: 0 the statistics were made, whatever they say; 2 they could not be.
"""

import argparse
import contextlib
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import mpmath  # comes along with torch
import run_folder
from run_folder import FILES, RECORDS, RunError, RunFolder, blame, markdown, parse_object

import endings
import train_gpt
from train_gpt import (
    CAP_BYTES,
    CAP_SECONDS,
    MOST_STREAM_BYTES,
    MOST_TEXT_BYTES,
    UserError,
    printable,
    read_regular,
    sha256,
    write_atomically,
)

SAME_SCORE = 2e-6  # bits per byte, between a claim and what verify.py found to be it
IMPROVEMENT_NATS = 0.005  # upstream's rule for a new record,
ALPHA = 0.01  # at p below this
# Settings that may differ between seeds: none of them changes a result.
NO_RESULT = {"SEED", "RESUME", "OVERWRITE", "CHECKPOINT_EVERY"}
STREAM = "sha256 of stream.bin's words"
OWN = {"SEED", "sha256 of artifact.bin", STREAM}  # no two seeds have the same
CHECKED = (  # what verify.py reads of a folder
    *FILES.values(),
    *("stream.bin", "metrics.jsonl", "log.txt", "config.env", "submission.json"),
)
SCORED_AGAIN = "the artifact scores the same here"
VERDICTS = ("PROVED", "FAILED", "CONSISTENT, NOT PROVED")
MEASURES = ("val_loss", "val_bpb")
BEGIN = "<!-- records: python records/tools/stats.py --table -->"
END = "<!-- end of records -->"


# -----------------------------------------------------------------------------
# One run


class Result(NamedTuple):
    """A finished run folder, as far as statistics need it."""

    folder: RunFolder
    claims: dict[str, Any]  # submission.json, made again from the other files
    traits: dict[str, str]  # the same in all seeds of one configuration, but for OWN
    marks: dict[str, str]  # sha256 of its files before they were read
    verification: str = "not verified"  # begins with PROVED where that was proved now

    @property
    def name(self) -> str:
        return str(self.folder.path)

    @property
    def seed(self) -> int:
        return self.claims["seeds"][0]

    @property
    def stages(self) -> dict[str, dict[str, Any]]:
        """Stage -> the fields of its final_<stage>_exact line"""
        return self.claims["stages"]


def load(path: str | Path) -> Result:
    """RunError for a run that is not finished or whose lines hold no numbers."""
    with blame(path):
        before = marks(Path(path))
    folder = RunFolder(path)
    with blame(path):
        claims = run_folder.submission(folder)
        for stage, values in claims["stages"].items():
            for name in MEASURES:
                value = values.get(name)
                if value is None or not math.isfinite(value):
                    raise RunError(f"{path}: final_{stage}_exact has {name}:{value}, not a number")
        words = coded_words(folder)
        text = run_folder.name_text(run_folder.scored_text(folder))
    digests = claims["sha256"]
    traits = {
        "SEED": folder.config["SEED"],
        "sha256 of artifact.bin": digests["artifact"][:12],
        STREAM: words,
        "sha256 of train_gpt.py": digests["code"][:12],
        "sha256 of tokenizer.model": digests["tokenizer"][:12],
        **{name: text for name, text in folder.config.items() if name not in NO_RESULT},
        "the validation text": text,
        "sha256 of INIT_FROM": folder.last("init_from").get("sha256", "none"),
    }
    return Result(folder, claims, traits, before)


def coded_words(folder: RunFolder) -> str:
    """sha256 of what the range coder made of the text: no two runs have the same"""
    path = folder.path / "stream.bin"
    try:
        return sha256(train_gpt.read_stream(path)[1])[:12]
    except train_gpt.StreamError:
        return f"none of {folder.path}"


def over_budget(run: Result) -> list[str]:
    """What is over a cap of the 10-minute track, by the script's rule, in words."""
    return run_folder.over_budget(run.folder)


# -----------------------------------------------------------------------------
# Do they belong together?


def differences(runs: Sequence[Result]) -> list[str]:
    """What keeps these runs from being seeds of one configuration; [] for nothing."""
    found = []
    for name in dict.fromkeys(name for run in runs for name in run.traits):
        having = {}  # value -> names of the runs that have it
        for run in runs:
            having.setdefault(run.traits.get(name, "none"), []).append(run.name)
        if name in OWN:  # else a run is given twice, or copied under another seed
            having = {value: names for value, names in having.items() if len(names) > 1}
        if having and (name in OWN or len(having) > 1):
            found.append(f"{name} is {run_folder.who_has_what(having)}")
    return found


def seeds_of_one(runs: Iterable[Result], mixed: bool = False) -> list[Result]:
    """The runs, by seed; RunError, unless mixed, where they are not of one configuration."""
    runs = sorted(runs, key=lambda run: run.seed)
    if (wrong := differences(runs)) and not mixed:
        raise RunError(f"not seeds of one configuration: {'; '.join(wrong)}; fix: leave one out")
    return runs


# -----------------------------------------------------------------------------
# Is each of them real?


def marks(folder: Path) -> dict[str, str]:
    """sha256 of whatever verify.py reads there"""
    found = {}
    for name in CHECKED:
        with contextlib.suppress(FileNotFoundError):
            path = run_folder.locate(folder, name)
            found[name] = sha256(read_regular(path, MOST_STREAM_BYTES))
    return found


def verify(run: Result) -> str:
    """Run verify.py on a folder and keep what it says as verify.json. -> its verdict; RunError
    where that is of other files than were read"""
    folder = run.folder.path
    command = [sys.executable, RECORDS / "tools/verify.py", folder.resolve(), "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    try:
        result = json.loads(done.stdout)
        said = verdict(result)
        proved = result.get("val_bpb")
        same = proved is None or abs(proved - run.claims["val_bpb"]) < SAME_SCORE
    except (ValueError, KeyError, TypeError):
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise RunError(f"{folder}: verify.py: {last.removeprefix('error: ')}") from None
    if not same or marks(folder) != run.marks:
        raise RunError(f"{folder}: changed since it was read; fix: start again")
    date = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    text = json.dumps(result | dict(date=date, sha256=run.marks), indent=2)
    write_atomically(folder / "verify.json", f"{text}\n".encode())
    return said


def verdict(result: dict[str, Any]) -> str:
    """verify.py's, in a few words: of which text, or why not; ValueError, KeyError or TypeError"""
    word = VERDICTS[VERDICTS.index(result["verdict"])]
    if word == "PROVED":
        return f"{word} on {result['text']}"
    again = f"; {SCORED_AGAIN}" if result.get("rescored_val_bpb") and word != "FAILED" else ""
    return f"{word} ({result['why']}{again})"


def holds(verification: str) -> bool:
    """Was it made now, and is the score this checkout's own: proved, or scored again here?"""
    word, _, why = verification.partition(" (")
    again = word == "CONSISTENT, NOT PROVED" and why.endswith(f"{SCORED_AGAIN})")
    return word.startswith("PROVED") or again


def kept_verdict(folder: Path) -> str:
    """What a verify.json of the folder says of these files, whoever wrote it; or why nothing"""
    try:
        kept = parse_object(read_regular(folder / "verify.json", MOST_TEXT_BYTES), "verify.json")
        said = printable(verdict(kept))
        same = kept["sha256"] == marks(folder)
    except FileNotFoundError:
        return "not verified"
    except (OSError, ValueError, KeyError, TypeError):
        return "not verified: verify.json is unreadable"
    return f"verify.json: {said}" if same else "not verified: verify.json is of other files"


def with_verification(runs: Sequence[Result], make: bool) -> list[Result]:
    """make: by verify.py, now; else what is kept"""
    found = []
    for run in runs:
        if make:
            endings.say(f"verifying {printable(run.name)}", sys.stderr)
        said = verify(run) if make else kept_verdict(run.folder.path)
        found.append(run._replace(verification=said))
    return found


# -----------------------------------------------------------------------------
# Statistics


class Summary(NamedTuple):
    """deviation: of a sample, n - 1; None for one value"""

    count: int
    mean: float
    deviation: float | None
    least: float
    most: float

    def spread(self, digits: int) -> str:
        """1.2345 ± 0.0012"""
        deviation = "" if self.deviation is None else f" ± {self.deviation:.{digits}f}"
        return f"{self.mean:.{digits}f}{deviation}"


def summarise(values: Sequence[float]) -> Summary:
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return Summary(len(values), statistics.fmean(values), deviation, min(values), max(values))


def by_stage(runs: Sequence[Result]) -> dict[str, dict[str, Summary]]:
    """stage -> measure -> Summary, over the runs that have the stage, in the order of the runs"""
    found = {}
    for stage in dict.fromkeys(stage for run in runs for stage in run.stages):
        lines = [run.stages[stage] for run in runs if stage in run.stages]
        found[stage] = {name: summarise([line[name] for line in lines]) for name in MEASURES}
    return found


def upper_tail(t: float, degrees: float) -> float:
    """P(T > t) of Student's distribution; degrees > 0 need not be whole (Welch)."""
    if math.isinf(t):
        return float(t < 0)
    half = float(mpmath.betainc(degrees / 2, 0.5, 0, degrees / (degrees + t * t), True)) / 2
    return half if t >= 0 else 1 - half


def t_test(ours: Summary, theirs: Summary, margin: float) -> tuple[float, float]:
    """-> t, degrees of freedom, of theirs - ours > margin; theirs may be one exact number. At least
    one deviation must be above 0."""
    parts = [
        (s.deviation**2 / s.count, s.count - 1) for s in (ours, theirs) if s.deviation is not None
    ]
    error = sum(variance for variance, _ in parts)
    degrees = error**2 / sum(variance**2 / count for variance, count in parts)
    return (theirs.mean - ours.mean - margin) / math.sqrt(error), degrees


class Decision(NamedTuple):
    """better: True, False, or None where the runs cannot decide"""

    better: bool | None
    test: str
    gap: float  # baseline's mean minus ours, nats
    t: float | None
    degrees: float | None
    p: float | None
    reason: str


def decide(ours: Summary, theirs: Summary) -> Decision:
    """Are ours better than theirs, by upstream's rule?"""
    test = "one-sample t-test" if theirs.deviation is None else "Welch's t-test"
    gap = theirs.mean - ours.mean
    undecided = Decision(None, test, gap, None, None, None, "")
    if ours.count < 2:
        reason = "one run cannot decide: it has no standard deviation; fix: at least three seeds"
        return undecided._replace(reason=reason)
    if ours.deviation == 0 and not theirs.deviation:
        return undecided._replace(reason="the runs cannot decide: their standard deviation is 0")
    t, degrees = t_test(ours, theirs, IMPROVEMENT_NATS)
    p = upper_tail(t, degrees)
    tested = Decision(p < ALPHA, test, gap, t, degrees, p, "")
    if gap <= IMPROVEMENT_NATS:
        return tested._replace(reason=f"the mean itself is not {IMPROVEMENT_NATS:g} lower")
    if not tested.better and ours.count == 2:
        return tested._replace(better=None, reason="two runs cannot decide; fix: a third seed")
    return tested


# -----------------------------------------------------------------------------
# The record to beat


def read_baseline(given: Sequence[str], run: Result, mixed: bool) -> list[float]:
    """val_loss of each seed of submission.json files or of the folders that hold one; or a number
    of nats."""
    try:
        number = float(given[0])
    except ValueError:
        number = None
    if number is not None:
        if len(given) > 1 or not 0 < number < math.inf:
            raise RunError(
                f"--against {' '.join(given)}: must be one number of nats above 0, or folders"
            )
        return [number]
    losses = {}
    for path in map(Path, given):
        with blame(f"--against {path}"):
            seeds = read_losses(path, run, mixed)
        for seed, loss in seeds.items():
            if losses.setdefault(seed, loss) != loss:
                raise RunError(f"--against {path}: seed {seed} is there twice; fix: leave one out")
    return list(losses.values())


def read_losses(path: Path, run: Result, mixed: bool) -> dict[str, float]:
    """Seed -> val_loss, "" for a single value without seeds; nats of another text than the run's
    do not compare, unless mixed."""
    file = path / "submission.json" if path.is_dir() else path
    if not file.is_file():
        raise RunError(f"--against {path}: no submission.json; fix: a number of nats, or a folder")
    claims = parse_object(read_regular(file.resolve()), str(file))
    ours = run.claims["tokens"], run.claims["bytes"], run.claims["sha256"]["tokenizer"]
    theirs = claims.get("tokens"), claims.get("bytes"), claims.get("sha256", {}).get("tokenizer")
    kinds = "tokens", "bytes", "as the tokenizer's sha256"
    for kind, here, there in zip(kinds, ours, theirs, strict=True):
        if there not in (None, here) and not mixed:
            raise RunError(
                f"--against {path}: its text has {there} {kind}, not {here}; fix: the same text"
            )
    losses = {}
    for seed, values in (claims.get("seed_results") or {"": claims}).items():
        losses[seed] = loss = values.get("val_loss")
        if not isinstance(loss, int | float) or not 0 < loss < math.inf:
            where = f"seed {seed}: " * bool(seed)
            raise RunError(
                f"--against {path}: {where}val_loss is {loss}; fix: give it in nats a token"
            )
    return losses


# -----------------------------------------------------------------------------
# Report


def stage_table(runs: Sequence[Result]) -> str:
    rows = []
    for stage, found in by_stage(runs).items():
        row = [stage, str(found["val_loss"].count)]
        for name in MEASURES:
            values = found[name][1:]
            row += ["-" if value is None else f"{value:.5f}" for value in values]
        rows.append(row)
    spread = ["sd", "min", "max"]
    return markdown(["stage", "runs", "val_loss", *spread, "val_bpb", *spread], rows)


def run_table(runs: Sequence[Result]) -> str:
    rows = []
    for run in runs:
        claims = run.claims
        steps = claims["step_stop"]
        row = [str(run.seed), *(f"{claims[name]:.5f}" for name in MEASURES)]
        row += [f"{claims['bytes_total']:,}", "-" if steps is None else f"{steps:,}"]
        row += [f"{claims[name]:.1f}" for name in ("wallclock_seconds", "eval_time_seconds")]
        rows.append([*row, run.verification])
    head = ["seed", *MEASURES, "bytes", "steps", "training s", "evaluation s", "check"]
    return markdown(head, rows)


def remarks(runs: Sequence[Result]) -> list[str]:
    """What must not be overlooked: caps, hardware, runs without a check, pseudo scores."""
    found = [f"OVER A CAP: {run.name}: {what}." for run in runs for what in over_budget(run)]
    found = found or [
        f"All within {CAP_BYTES:,} bytes, {CAP_SECONDS} s of training and of scoring."
    ]
    found += [f"Mixed: {what}." for what in differences(runs)]
    found.append("Proved is val_bpb alone: other stages, steps and seconds are what the runs say.")
    kinds = dict.fromkeys(str(run.claims["hardware"]) for run in runs)
    if len(kinds) > 1:
        found.append(f"Different hardware: {', '.join(kinds)}.")
    if unproved := [run.name for run in runs if not run.verification.startswith("PROVED")]:
        found.append(
            f"NOT PROVED here: {', '.join(unproved)}; --verify runs records/tools/verify.py."
        )
    for run in runs:
        if run.claims.get("lossy"):
            spelt = f"its tokens spell {run.claims['spelt_bytes']:,} bytes"
            text = f"{spelt}, val_bpb is over {run.claims['bytes']:,}"
            found.append(f"LOSSY TOKENIZER: {run.name}: it alters text; {text}.")
        if shared := run.claims.get("overlap_documents"):
            found.append(f"{run.name}: {shared:,} validation documents are in its training shards.")
        if pseudo := run.folder.last("final_ngram_pseudo"):
            text = f"pseudo score {pseudo['pseudo_bpb']:.4f} of scheme {pseudo.get('scheme')}"
            found.append(f"{run.name}: {text} is no code length and in no mean.")
    return found


def describe(decision: Decision, name: str, theirs: Summary) -> str:
    """The decision in words"""
    exact = "taken as exact" if theirs.count == 1 else f"mean of {theirs.count} seeds"
    word = {True: "yes", False: "no", None: "CANNOT BE DECIDED"}[decision.better]
    lower = "lower" if decision.gap >= 0 else "higher"
    facts = [
        f"At least {IMPROVEMENT_NATS:g} nats better than {name} (val_loss {theirs.mean:.5f}, "
        f"{exact}): {word}",
        f"the mean is {abs(decision.gap):.5f} {lower}",
    ]
    if decision.p is not None:
        sign = "<" if decision.p < ALPHA else "not <"
        facts.append(
            f"{decision.test}: t = {decision.t:.3f}, {decision.degrees:.4g} degrees of freedom, "
            f"one-sided p = {decision.p:.3g} {sign} {ALPHA:g}"
        )
    return "; ".join(facts + [decision.reason] * bool(decision.reason)) + "."


def as_json(runs: Sequence[Result]) -> dict[str, Any]:
    stages = by_stage(runs)
    copied = (*MEASURES, "bytes_total", "wallclock_seconds", "eval_time_seconds", "sha256")
    return dict(
        seeds=[run.seed for run in runs],
        stages={
            stage: {name: summary._asdict() for name, summary in found.items()}
            for stage, found in stages.items()
        },
        runs=[
            dict(
                folder=run.name,
                seed=run.seed,
                steps=run.claims["step_stop"],
                **{name: run.claims[name] for name in copied},
                over_budget=over_budget(run),
                lossy=bool(run.claims.get("lossy")),
                overlap_documents=run.claims.get("overlap_documents"),
                verification=run.verification,
            )
            for run in runs
        ],
        differences=differences(runs),
    )


def report(options: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """-> Markdown, the same for JSON"""
    runs = seeds_of_one(map(load, options.runs), options.mixed)
    losses = options.against and read_baseline(options.against, runs[0], options.mixed)
    runs = with_verification(runs, options.verify)
    result = as_json(runs)
    lines = remarks(runs)
    if losses:
        name = " ".join(options.against)
        theirs = summarise(losses)
        decision = decide(by_stage(runs)["ngram"]["val_loss"], theirs)
        lines.insert(0, describe(decision, name, theirs))
        result["against"] = dict(name=name, losses=losses) | decision._asdict()
    seeds = f"{len(runs)} seed{'s' * (len(runs) > 1)}: {', '.join(str(run.seed) for run in runs)}"
    remarked = "\n".join(f"- {printable(line)}" for line in lines)
    parts = [seeds, stage_table(runs), run_table(runs), remarked]
    return "\n\n".join(parts), result


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
    scores = summarise([values["val_bpb"] for values in found["seed_results"].values()])
    forced = " (forced, see its README)" * bool(found.get("problems"))
    score = f"{scores.spread(4)}{forced}"
    return [link, what, str(scores.count), score, f"{found['bytes_total']:,}"]


def with_table(text: str, root: Path = RECORDS) -> str:
    """The README's text with today's table, a row a folder of a track, between its two markers"""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise RunError(f"{root / 'README.md'}: no markers {BEGIN} and {END}; fix: put them back")
    folders = sorted(path.parent for path in root.glob("track_*/*/README.md"))
    rows = [record_row(folder, root) for folder in folders]
    table = markdown(["folder", "what", "seeds", "val_bpb", "bytes"], rows, left=2)
    return f"{before}{BEGIN}\n\n{table}\n\n{END}{after}"


def write_table(root: Path = RECORDS) -> Path:
    path = root / "README.md"
    write_atomically(path, with_table(path.read_text(encoding="utf-8"), root).encode())
    return path


# -----------------------------------------------------------------------------
# Command line


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=(__doc__ or "\n").splitlines()[0])
    made.add_argument("runs", nargs="*", metavar="RUN_DIR")
    help_text = "val_loss in nats, or a submission.json or folders of the record to beat"
    made.add_argument("--against", nargs="+", metavar="RECORD", help=help_text)
    made.add_argument("--verify", action="store_true", help="run verify.py on each folder")
    made.add_argument("--mixed", action="store_true", help="average runs that differ, and say it")
    made.add_argument("--json", action="store_true", help="one JSON object instead of the tables")
    made.add_argument("--table", action="store_true", help="rewrite the table in records/README.md")
    return made


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    if bool(options.runs) == options.table:
        parser().error("give run folders, or --table")
    try:
        if options.table:
            with blame("records/README.md"):
                endings.say(f"wrote {write_table()}")
        else:
            with blame(", ".join(options.runs)):
                text, result = report(options)
            endings.say(json.dumps(result, indent=2, allow_nan=False) if options.json else text)
    except (UserError, OSError) as error:
        endings.say(f"error: {printable(str(error))}", sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(endings.run(main))
