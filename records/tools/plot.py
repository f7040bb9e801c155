"""Draw a run folder as one picture, report.png; several folders are laid over each other.

    python records/tools/plot.py runs/tiny_seed1337
    python records/tools/plot.py runs/a runs/b --out both.pdf  default: compare.png beside the first

Panels: training and validation loss (of several runs by step and by time), the score stage by
stage, the n-gram gain by matched order, and the bits saved along the text. A panel for which no run
has data is left out. By its name a run says that it is unfinished or over a cap. Runs that differ
in nothing but SEED share a colour and an entry of the legend; runs on different texts do not
compare and are refused. The suffix of --out decides: .png, .pdf or .svg.
"""

import argparse
import contextlib
import io
import math
import os
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import checkout  # noqa: F401  (puts train_gpt and data/ on the path)

import endings

if __name__ == "__main__":
    endings.begin()  # the imports take seconds

import numpy as np
from run_folder import (
    FINAL_LINES,
    RunError,
    RunFolder,
    blame,
    name_text,
    over_budget,
    parse_object,
    scored_text,
    who_has_what,
)

from train_gpt import (
    CAP_BYTES,
    PER_RUN,
    UserError,
    line_fields,
    package,
    printable,
    write_atomically,
)

# Okabe and Ito's palette, safe for colour-blind readers; each run also has its own marker.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]
MARKERS = "osD^vP"
GLYPHS = "●■◆▲▼✚"
ACCENT = "#0072B2"
WORSE = "#D55E00"
VALIDATION = "#00805E"  # beside the training loss of a single run
INK = "#222222"
GREY = "#6B6B6B"
LINE = "#B0B0B0"
DASHES = (0, (4, 3))
BLANK = dict(facecolor="white", edgecolor="none", pad=1.5)
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "text.parse_math": False,
    "svg.hashsalt": "plot.py",
    "axes.formatter.useoffset": False,
    "axes.formatter.limits": (-6, 9),
    "text.color": INK,
    "axes.edgecolor": LINE,
    "axes.labelcolor": GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#ECECEC",
    "xtick.color": GREY,
    "ytick.color": GREY,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
}
STAGES = {
    "int6_roundtrip": "int6 weights, re-read",
    "int6_sliding_window": "sliding window",
    "documents": "documents in lanes",
    "ttt": "test-time training",
    "ngram_backoff": "n-gram backoff",
    "ngram": "n-gram mixture",
}
# What would tell the library's version and the time: without it a run gives the same bytes.
METADATA = {
    "png": {"Software": None},
    "pdf": {"Creator": None, "Producer": None, "CreationDate": None},
    "svg": {"Creator": None, "Date": None},
}
STRIP_POINTS = 160
LONG_RUN_STEPS = 1000
POINT = "   \N{MIDDLE DOT}   "
MOST_SETTINGS = 8
SMOOTHED = 14  # a loss is smoothed over a 14th of its points to either side
TREND_POINTS = 1000
RATE_BAND = 0.2  # of the height of the losses: what the learning rate has below them


class Run(NamedTuple):
    """What is drawn of one run."""

    folder: RunFolder
    stages: dict[str, dict[str, Any]]
    losses: dict[int, dict[str, Any]]  # step -> log line
    validated: dict[int, float]  # step -> val_loss
    rates: dict[int, float]  # step -> factor of the learning rates
    gains: dict[int, dict[str, Any]]  # matched order -> log line
    blocks: dict[str, np.ndarray]  # {} for none
    colour: str = COLOURS[0]
    marker: str = MARKERS[0]

    @property
    def bpb(self) -> float | None:
        return self.stages.get("ngram", {}).get("val_bpb")

    @property
    def bytes(self) -> int:
        return round(self.blocks["bytes"].sum()) if self.blocks else 0

    @property
    def saved(self) -> np.ndarray:
        """Bits that the final score saves of the model's, in each block"""
        return (self.blocks["logp_final"] - self.blocks["logp_model"]) / math.log(2)


def load(path: str) -> Run:
    folder = RunFolder(path)
    blocks = folder.blocks() if (folder.path / "blocks.npz").exists() else {}
    text = folder.last("val_text")
    if blocks and "spelt_bytes" in text:  # of a lossy tokenizer: in all, as many as the text has
        blocks["bytes"] = blocks["bytes"] * (text["bytes"] / text["spelt_bytes"])
    stages = {k: v for k, v in folder.stages().items() if math.isfinite(v.get("val_bpb", math.nan))}
    gains = {int(line["value"]): line for line in folder.all("ngram_gain")}
    losses = finite_steps(folder, "train_loss")
    validated = {step: line["val_loss"] for step, line in finite_steps(folder, "val_loss").items()}
    rates = {step: line["lr"] for step, line in finite_steps(folder, "lr").items()}
    return Run(folder, stages, losses, validated, rates, gains, blocks)


def finite_steps(folder: RunFolder, name: str) -> dict[int, dict[str, Any]]:
    """Step -> its log line with such a field, in the order of the steps; without what diverged"""
    lines = sorted(folder.steps(name).items(), key=lambda pair: pair[0])
    return {step: line for step, line in lines if math.isfinite(line[name])}


def load_all(paths: Sequence[str]) -> list[Run]:
    """A colour for each configuration, whatever its seeds; the same run twice, or a changed script,
    has two."""
    runs = []
    numbers = {}  # configuration -> number of its colour
    seen = Counter()
    for run in map(load, paths):
        named = (run.folder.path / "config.env").exists()  # else unfinished
        settings = dict(run.folder.settings) if named else {"": str(run.folder.path)}
        seed = settings.pop("SEED", "")
        settings.pop("RUN_ID", None)
        same = frozenset(settings.items())
        number = numbers.setdefault((same, seen[same, seed]), len(numbers))
        seen[same, seed] += 1
        if number < len(COLOURS):
            runs.append(run._replace(colour=COLOURS[number], marker=MARKERS[number]))
    if len(numbers) > len(COLOURS):
        raise RunError(f"{len(numbers)} configurations: at most {len(COLOURS)} can be told apart")
    return runs


def require_one_text(runs: Sequence[Run]) -> None:
    """RunError for runs on different texts, told apart as by stats.py. A run that is not scored
    yet is known by the length of its text alone."""
    texts = [scored_text(run.folder) for run in runs]
    for kind in ("length", "blocks"):
        having = {}  # value -> {text in words: names of the runs that have it}
        for run, text in zip(runs, texts, strict=True):
            if kind in text:
                named = having.setdefault(text[kind], {})
                named.setdefault(name_text(text), []).append(str(run.folder.path))
        if len(having) > 1:
            parts = ", ".join(map(who_has_what, having.values()))
            raise RunError(f"the validation text is {parts}; fix: leave one out")


# -----------------------------------------------------------------------------
# Panels: each draws all runs that have its data, and returns the line under its title.


def draw_loss(ax: Any, runs: list[Run]) -> str:
    """Loss by step, from the log's step lines; below it the learning rate's schedule."""
    note = draw_curves(ax, runs, lambda step, _: step)
    circles = ", circles: validation" if any(run.validated for run in runs) else ""
    for run in runs:
        if run.validated:
            colour = VALIDATION if len(runs) == 1 else run.colour
            look = dict(mfc="white", ms=4.5, lw=1.2, zorder=2.5)
            ax.plot([*run.validated], [*run.validated.values()], "o-", color=colour, **look)
    if any(run.rates for run in runs):
        draw_rates(ax, runs)
    ax.set_xlabel("step")
    if len(runs) == 1:
        annotate_loss(ax, runs[0])
    return f"nats per token, bold: smoothed{circles}{note}"


def draw_rates(ax: Any, runs: list[Run]) -> None:
    """The learning rate, as a share of its peak, in a band of its own below the losses."""
    low, high = ax.get_ylim()
    ticks = [tick for tick in ax.get_yticks() if low <= tick <= high]
    ax.set_ylim(low - RATE_BAND * (high - low), high)
    ax.set_yticks(ticks)
    top = 0.8 * RATE_BAND / (1 + RATE_BAND)  # in heights of the axes
    place = dict(transform=ax.get_xaxis_transform(), zorder=1)
    for run in runs:
        factors = np.array([*run.rates.values()])
        heights = top * factors / max(1, factors.max(initial=0))
        colour = GREY if len(runs) == 1 else run.colour
        ax.plot([*run.rates], heights, color=colour, lw=0.9, **place)
        if len(runs) == 1:
            ax.fill_between([*run.rates], 0, heights, color=GREY, alpha=0.12, lw=0, **place)
    look = dict(color=GREY, size=8, ha="right", va="top", textcoords="offset points")
    ax.annotate("learning rate", (1, top), (0, 0), xycoords="axes fraction", **look)


def draw_loss_by_time(ax: Any, runs: list[Run]) -> str:
    """The same over the seconds of training: runs whose steps cost differently."""
    longest = max(line["train_time_ms"] for run in runs for line in run.losses.values())
    unit, ms = ("minutes", 60_000) if longest >= 300_000 else ("seconds", 1000)
    ax.set_xlabel(f"{unit} of training")
    note = draw_curves(ax, runs, lambda _, line: line["train_time_ms"] / ms)
    return f"nats per token, bold: smoothed{note}"


def draw_curves(ax: Any, runs: list[Run], place: Callable[[int, dict[str, Any]], float]) -> str:
    """Training losses, x = place(step, log line): faint as logged, and smoothed; thinner from
    colour to colour, so that none hides another one. -> what is left out: in a long run the first
    percent of the steps would flatten the rest of the curve."""
    colours = list(dict.fromkeys(run.colour for run in runs))
    last = max(max(run.losses) for run in runs)
    start = last // 100 if last > LONG_RUN_STEPS else 0
    end = 0
    later = []
    for run in runs:
        x = np.array([place(*line) for line in run.losses.items()])
        losses = [line["train_loss"] for line in run.losses.values()]
        at, trend = smooth([*run.losses], losses)
        width = 1.8 + 1.2 * (len(colours) - 1 - 2 * colours.index(run.colour)) / len(colours)
        ax.plot(x, losses, color=run.colour, lw=0.8, alpha=0.35)
        ax.plot(x[at], trend, color=run.colour, lw=width)
        ax.plot(x[-1], trend[-1], run.marker, color=run.colour, ms=6)
        end = max(end, *x)
        later += [line["train_loss"] for step, line in run.losses.items() if step >= start]
        later += [loss for step, loss in run.validated.items() if step >= start]
    ax.set_xlim(0, end * 1.12)
    ax.grid(axis="y")
    height = max(later) - min(later) or 0.1
    ax.set_ylim(min(later) - 0.08 * height, max(later) + 0.04 * height)
    return f", without the first {start:,} steps" if start else ""


def smooth(steps: Sequence[int], losses: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """-> (indices, trend there) of a noisy curve, at most TREND_POINTS. Each value is on the line
    that fits its neighbours best, the nearer the more they count (local regression, Cleveland
    1979): a running mean would lag where the curve falls, and at its ends. The neighbours grow from
    none with the steps, so the steep beginning stays as it is."""
    x = np.asarray(steps, dtype=float)
    y = np.asarray(losses, dtype=float)
    indices = np.unique(np.linspace(0, len(y) - 1, min(len(y), TREND_POINTS), dtype=int))
    trend = y[indices]
    for number, index in enumerate(indices):
        reach = min(len(y) // SMOOTHED, index // 3)
        if not reach:
            continue
        near = np.arange(index - reach, min(index + reach + 1, len(y)))
        weights = (1 - np.abs((near - index) / (reach + 1)) ** 3) ** 3
        centre = np.average(x[near], weights=weights)
        from_centre = weights * (x[near] - centre)
        slope = from_centre @ y[near] / (from_centre @ (x[near] - centre))
        trend[number] = np.average(y[near], weights=weights) + slope * (x[index] - centre)
    return indices, trend


def annotate_loss(ax: Any, run: Run) -> None:
    """Last values, where quantisation-aware training begins, and the time it took."""
    step, line = max(run.losses.items())
    _, trend = smooth([*run.losses], [line["train_loss"] for line in run.losses.values()])
    ends = [(trend[-1], step, run.colour)]
    if run.validated:
        ends.append((list(run.validated.values())[-1], max(run.validated), VALIDATION))
    place = dict(textcoords="offset points")
    heights = apart([loss for loss, *_ in ends], 0.075 * np.ptp(ax.get_ylim()))
    for (loss, at, colour), height in zip(ends, heights, strict=True):
        look = dict(va="center", weight="bold", color=colour)
        ax.annotate(f"{loss:.3f}", (at, height), (8, 0), **look, **place)
    qat = run.folder.last("late_qat:enabled").get("step")
    if qat is not None:
        ax.axvline(qat, color=GREY, lw=0.9, ls=DASHES)
        before = qat > 0.4 * ax.get_xlim()[1]  # there is room left of it
        look = dict(color=GREY, size=8.5, va="center", ha="right" if before else "left", bbox=BLANK)
        top = (qat, 0.94), (-5 if before else 5, 0)
        look |= dict(xycoords=ax.get_xaxis_transform(), **place)
        ax.annotate(f"late QAT from step {qat:,}", *top, **look)
    seconds = line["train_time_ms"] / 1000
    ax.set_xlabel(f"step  ({duration(seconds)}, {line['step_avg_ms']:,.0f} ms a step)")


def apart(heights: list[float], least: float) -> list[float]:
    """One height or two, the two moved to be at least so far from each other."""
    if len(heights) < 2 or abs(heights[0] - heights[1]) >= least:
        return heights
    middle = sum(heights) / 2
    up = least / 2 if heights[0] >= heights[1] else -least / 2
    return [middle + up, middle - up]


def draw_ladder(ax: Any, runs: list[Run]) -> str:
    """Bits per byte after each stage; the path from dot to dot descends the rows."""
    names = list(dict.fromkeys(stage for run in runs for stage in run.stages))
    names.sort(key=lambda name: list(STAGES).index(name) if name in STAGES else -1)
    single = len(runs) == 1
    for run in runs:
        rows = [(names.index(stage), score["val_bpb"]) for stage, score in run.stages.items()]
        draw_steps(ax, sorted(rows), run, single)
    ax.set_yticks(range(len(names)), [stage_label(name, runs) for name in names], color=INK)
    ax.tick_params(axis="y", length=0)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.spines["left"].set_visible(False)
    ax.grid(axis="x")
    values = [score["val_bpb"] for run in runs for score in run.stages.values()]
    pad = max(0.12 * (max(values) - min(values)), 0.005 * max(values))
    ax.set_xlim(min(values) - pad, max(values) + pad)
    ax.locator_params(axis="x", nbins=5)
    ax.set_xlabel(f"zoomed in: the axis begins at {min(values) - pad:.2f}, not at 0")
    if single:
        ladder_columns(ax, {name: runs[0].stages[name]["val_bpb"] for name in names})
    return "bits per byte, lower is better"


def draw_steps(ax: Any, rows: list[tuple[int, float]], run: Run, single: bool) -> None:
    """One run's dots; a single run's changes are coloured, several runs have plain paths."""
    for (row, before), (below, after) in pairwise(rows):
        colour = (ACCENT if after <= before else WORSE) if single else run.colour
        ax.plot([before, before], [row, below], color="#C8C8C8" if single else colour, lw=1.2)
        ax.plot([before, after], [below, below], color=colour, lw=3.5 if single else 1.2)
    for row, bpb in rows:
        last = (row, bpb) == rows[-1]
        ax.plot(bpb, row, run.marker, color=run.colour, ms=9 if last else 6, zorder=3)


def stage_label(stage: str, runs: list[Run]) -> str:
    name = STAGES.get(stage, stage.replace("_", " "))
    kinds = {run.stages[stage].get("mixer") for run in runs if stage in run.stages}
    if stage == "ngram" and kinds == {"none"}:
        return "final, no n-grams"
    return f"{name}, {kinds.pop()}" if stage == "ngram" and len(kinds) == 1 else name


def ladder_columns(ax: Any, scores: dict[str, float]) -> None:
    """Value and change of each row, in two columns right of the axes."""
    look = dict(textcoords="offset points", ha="right", annotation_clip=False)
    for x, heading in ((52, "bpb"), (108, "change")):
        ax.annotate(heading, (1, 1), (x, 12), xycoords="axes fraction", color=GREY, size=9, **look)
    look |= dict(xycoords=("axes fraction", "data"), va="center_baseline")
    changes = ["", *(signed(after - before) for before, after in pairwise(scores.values()))]
    for row, (name, change) in enumerate(zip(scores, changes, strict=True)):
        weight = "bold" if name == "ngram" else "normal"
        ax.annotate(f"{scores[name]:.4f}", (1, row), (52, 0), weight=weight, **look)
        colour = WORSE if change.startswith("+") else GREY
        ax.annotate(change, (1, row), (108, 0), color=colour, **look)


def draw_gains(ax: Any, runs: list[Run]) -> str:
    """Bits saved by the n-grams, by the longest order whose context had been seen."""
    orders = sorted({order for run in runs for order in run.gains})
    width = 0.74 / len(runs)
    known = all(run.bytes for run in runs)
    for i, run in enumerate(runs):
        at = [orders.index(n) + (i - (len(runs) - 1) / 2) * width for n in run.gains]
        saved = [line["bits_saved"] / (run.bytes if known else 1) for line in run.gains.values()]
        bars = ax.bar(at, saved, width * 0.94, color=run.colour)
        if len(runs) == 1:
            shares = [100 * line["share"] for line in run.gains.values()]
            texts = [f"{share:.0f} %" if share >= 1 else "< 1 %" for share in shares]
            ax.bar_label(bars, texts, padding=3, color=GREY, size=8.5)
    ax.axhline(0, color=LINE, lw=0.8)
    ax.margins(y=0.14)
    ax.set_xticks(range(len(orders)), [str(n) if n > 1 else "none" for n in orders])
    ax.tick_params(axis="x", length=0)
    ax.grid(axis="y")
    ax.set_xlabel("longest order matched" + (", and its share of the tokens" * (len(runs) == 1)))
    total = f", together {sum(saved):,.4g}" if len(runs) == 1 else ""
    return ("bits per byte of the whole text" if known else "bits") + total


def draw_strip(ax: Any, runs: list[Run]) -> str:
    """Bits saved per byte along the text, from the sums per 1,024 targets."""
    longest = max(run.bytes for run in runs)
    units = ("MB", 10**6), ("kB", 10**3), ("bytes", 1)
    unit, scale = next(pair for pair in units if longest >= 2 * pair[1] or pair[1] == 1)
    for run in runs:
        edges, saved = saved_along(run, STRIP_POINTS // len(runs))
        edges = edges / scale
        mean = run.saved.sum() / run.bytes
        if len(runs) == 1:
            ax.stairs(saved, edges, fill=True, color=run.colour, alpha=0.3, lw=0)
        ax.stairs(saved, edges, baseline=None, color=run.colour, lw=1.3)
        ax.plot([0, edges[-1]], [mean, mean], color=run.colour, lw=1, ls=DASHES)
    ax.axhline(0, color=LINE, lw=0.8)
    ax.set_xlim(0, longest / scale)
    ax.set_xlabel(f"{unit} of text read")
    ax.grid(axis="y")
    return "bits per byte" + (f", average {mean:.4f}" if len(runs) == 1 else "")


def saved_along(run: Run, points: int) -> tuple[np.ndarray, np.ndarray]:
    """-> (edges in bytes, bits saved per byte between them), in at most so many intervals"""
    bits = run.saved
    starts = np.unique(np.linspace(0, len(bits), min(len(bits), points), False, dtype=int))
    sizes = np.add.reduceat(run.blocks["bytes"], starts)
    edges = np.concatenate([[0], np.cumsum(sizes)])
    return edges, np.add.reduceat(bits, starts) / np.maximum(sizes, 1)


# -----------------------------------------------------------------------------
# Words and numbers.


def signed(change: float) -> str:
    sign = "+" if change > 0 else "\N{MINUS SIGN}"
    return sign * (round(change, 4) != 0) + f"{abs(change):.4f}"


def shorten(name: str, most: int) -> str:
    """A name of at most so many characters; both ends are kept, since they tell runs apart."""
    half = (most - 1) // 2
    return name if len(name) <= most else f"{name[:half]}\N{HORIZONTAL ELLIPSIS}{name[-half:]}"


def duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s"


def facts(run: Run) -> str:
    """The line under the title: bytes, steps, machine."""
    parts = []
    if size := run.folder.last("final_artifact_bytes"):
        parts.append(f"{size['total']:,} of {CAP_BYTES:,} bytes (artifact {size['weights']:,})")
    if budget := run.folder.last("final_budget"):
        parts.append(f"evaluated in {duration(budget['eval_seconds'])}")
    return POINT.join(parts + [str(run.folder.last("hardware").get("value", ""))])


def finished(run: Run) -> bool:
    return all(run.folder.last(key) for key in FINAL_LINES)


def cautions(run: Run) -> list[str]:
    """What stands beside a run's name, so that its curves are not taken for more than they are."""
    found = []
    if not finished(run):
        lines = [line for line in run.folder.all("step") if "train_loss" in line]
        step, _, last = str(lines[-1]["value"]).partition("/") if lines else ("", "", "")
        found.append(f"unfinished, step {step} of {last}" if last else "unfinished")
    return found + ["over a cap"] * bool(over_budget(run.folder))


def cautions_of_seeds(runs: list[Run]) -> str:
    """Of one run as they are, of several how many have each"""
    if len(runs) == 1:
        return ", ".join(cautions(runs[0]))
    counts = Counter(caution.partition(",")[0] for run in runs for caution in cautions(run))
    return ", ".join(f"{count} of {len(runs)} {caution}" for caution, count in counts.items())


def date_of(run: Run) -> str:
    """Day of a run's end, UTC: submission.json keeps it; else when its log was written last."""
    path = run.folder.path / "submission.json"
    if finished(run) and path.exists():
        date = str(parse_object(run.folder.read(path.name).encode(), str(path)).get("date"))
        with contextlib.suppress(ValueError):
            return datetime.fromisoformat(date).date().isoformat()
    written = (run.folder.path / "metrics.jsonl").stat().st_mtime
    return datetime.fromtimestamp(written, UTC).date().isoformat()


def chosen_settings(run: Run) -> dict[str, str]:
    """What the environment set, whatever RECORD and the defaults say; not where a run lies."""
    found = {}
    for name, logged in line_fields(run.folder.last("config")).items():
        text, _, origin = logged.rpartition("(")
        if origin == "env)" and name not in PER_RUN:
            found[name] = text
    return found


def model_facts(run: Run) -> list[str]:
    """Parameters and date."""
    count = run.folder.last("model_params").get("value")
    known = [f"{count:,} parameters"] if count else []
    return [*known, date_of(run)]


def settings_text(settings: dict[str, str]) -> Iterator[str]:
    """NAME=value, and again with fewer and fewer of them, for a place that is too narrow."""
    pairs = [f"{name}={shorten(printable(text), 20)}" for name, text in settings.items()]
    for number in range(min(len(pairs), MOST_SETTINGS), 0, -1):
        left = len(pairs) - number
        yield "  ".join(pairs[:number] + [f"and {left} more settings"] * bool(left))
    yield ""


def footnotes(runs: list[Run]) -> list[str]:
    """What a score must not be taken without: a cap, what was done to the text, a pseudo score."""
    notes = []
    for run in runs:
        name = f"{shorten(run.folder.name(), 40)}: " if len(runs) > 1 else ""
        for what in over_budget(run.folder):
            notes.append(f"{name}OVER A CAP of the 10-minute track: {what}.")
        if finished(run) and not (run.folder.path / "submission.json").exists():
            notes.append(f"{name}No submission.json: nothing marks this run as finished.")
        if run.folder.last("val_text").get("lossy"):
            notes.append(
                f"{name}Lossy tokenizer: it alters text, the score is of the altered text."
            )
        shared = run.folder.last("overlap").get("documents")
        if shared not in (None, 0, "unknown"):
            notes.append(f"{name}{shared} validation documents are in its training shards.")
        if pseudo := run.folder.last("final_ngram_pseudo"):
            notes.append(
                f"{name}Pseudo score {pseudo['pseudo_bpb']:.4f} of scheme {pseudo.get('scheme')}: "
                f"its probabilities sum to {pseudo.get('mass_mean', math.nan):.3g} on average, "
                "so it is no code length and stands in no panel."
            )
    return notes


# -----------------------------------------------------------------------------
# The page, in inches from its top left; all panels of a row share its width.


class Panel(NamedTuple):
    title: str
    draw: Callable[[Any, list[Run]], str]
    has_data: Callable[[Run], Any]
    names: float = 0.0  # room left of the axes
    columns: float = 0.0  # room right of the axes, where one run is drawn


LOSS = Panel("Training loss", draw_loss, lambda run: run.losses)
BY_TIME = Panel("Training loss by time", draw_loss_by_time, lambda run: run.losses)
LADDER = Panel("Score, stage by stage", draw_ladder, lambda run: run.stages, 1.6, 1.55)
GAINS = Panel("Saved by n-grams, by order", draw_gains, lambda run: run.gains)
STRIP = Panel("Saved along the text", draw_strip, lambda run: run.bytes and run.saved.any())
ROWS = [[LOSS, LADDER], [GAINS, STRIP]]  # of a single run
OVERLAY = [[LOSS, BY_TIME], [LADDER, GAINS], [STRIP]]
WIDTH = 12.5
LEFT = 0.65
RIGHT = 0.35
GAP = 0.85  # between panels of a row
HEADER = 1.82
HEADER_OVERLAY = 1.98
LEGEND = 0.62  # a row of it: a name, and two lines of details under it
COLUMNS = 3  # of the legend
PANEL = 2.75
BETWEEN = 1.35  # the rows
FOOTER = 0.72


def draw(runs: list[Run]) -> Any:
    """-> matplotlib's figure"""
    rows = ROWS if len(runs) == 1 else OVERLAY
    rows = [[panel for panel in row if any(map(panel.has_data, runs))] for row in rows]
    rows = [row for row in rows if row]
    if not rows:
        raise RunError(f"{runs[0].folder.path}: no step and no score to draw yet")
    require_one_text(runs)
    notes = footnotes(runs)
    header = HEADER if len(runs) == 1 else HEADER_OVERLAY
    header += LEGEND * ((len({run.colour for run in runs}) - 1) // COLUMNS)
    height = header + len(rows) * (PANEL + BETWEEN) - BETWEEN + FOOTER + 0.22 * len(notes)
    figure = package("matplotlib.figure").Figure(figsize=(WIDTH, height), facecolor="white")
    page = figure.add_axes([0, 0, 1, 1], xlim=(0, WIDTH), ylim=(height, 0))
    page.axis("off")
    for number, row in enumerate(rows):
        draw_row(page, row, header + number * (PANEL + BETWEEN), runs)
    if len(runs) == 1:
        write_title(page, runs[0])
    else:
        write_legend(page, runs)
    for number, note in enumerate(reversed(notes)):
        page.text(LEFT, height - 0.18 - 0.22 * number, note, size=8.5, color=WORSE)
    return figure


def draw_row(page: Any, row: list[Panel], top: float, runs: list[Run]) -> None:
    """Panels side by side, each with a title and a line that says what it measures."""
    height = page.get_ylim()[0]
    width = (WIDTH - LEFT - RIGHT - GAP * (len(row) - 1)) / len(row)
    for number, panel in enumerate(row):
        those = list(filter(panel.has_data, runs))
        left = LEFT + number * (width + GAP)
        inner = width - panel.names - (panel.columns if len(those) == 1 else 0)
        corner = (left + panel.names) / WIDTH, (height - top - PANEL) / height
        axes = page.figure.add_axes([*corner, inner / WIDTH, PANEL / height])
        unit = panel.draw(axes, those)
        page.text(left, top - 0.38, panel.title, size=12, weight="bold")
        page.text(left, top - 0.17, unit, size=9, color=GREY)


def write_title(page: Any, run: Run) -> None:
    """Name, score and what is wrong with it; bytes; what is special about it."""
    room = WIDTH - LEFT - RIGHT
    name = page.text(LEFT, 0.48, "", size=18, weight="bold")
    score = f"{run.bpb:.4f} bits per byte" if run.bpb else ""
    beside = name
    for words, size, colour in ((score, 18, ACCENT), (", ".join(cautions(run)), 13, WORSE)):
        if words:
            look = dict(size=size, weight="bold", color=colour, textcoords="offset points")
            lift = 0.24 * (18 - size)  # to the same base line
            beside = page.annotate(words, (1, 0), (16, lift), xycoords=beside, va="bottom", **look)
            room -= width(beside) + 16 / 72
    fit(name, room, (shorten(run.folder.name(), most) for most in range(44, 4, -1)))
    page.text(LEFT, 0.8, facts(run), size=9.5, color=GREY)
    chosen = settings_text(chosen_settings(run))
    lines = (POINT.join([*model_facts(run), *filter(None, [text])]) for text in chosen)
    fit(page.text(LEFT, 1.02, "", size=9.5, color=GREY), WIDTH - LEFT - RIGHT, lines)


def write_legend(page: Any, runs: list[Run]) -> None:
    """In place of a title: an entry for each colour, with the settings that not all runs share."""
    page.text(LEFT, 0.48, f"{len(runs)} runs", size=18, weight="bold")
    shared = set.intersection(*(set(chosen_settings(run).items()) for run in runs))
    for number, colour in enumerate(dict.fromkeys(run.colour for run in runs)):
        those = [run for run in runs if run.colour == colour]
        settings = chosen_settings(those[0])
        own = {name: text for name, text in settings.items() if (name, text) not in shared}
        if len(those) > 1:
            own.pop("SEED", None)
        write_entry(page, number, those, own)


def write_entry(page: Any, number: int, runs: list[Run], settings: dict[str, str]) -> None:
    """An entry of the legend: a configuration's name and score, what is wrong with its runs, and
    below it the settings that only it has."""
    room = (WIDTH - LEFT - RIGHT) / COLUMNS
    left = LEFT + number % COLUMNS * room
    top = 0.8 + number // COLUMNS * LEGEND
    page.text(left, top, GLYPHS[number], size=9.5, color=runs[0].colour, weight="bold")
    left += 0.17
    room -= 0.17 + 0.2
    name = page.text(left, top, "", size=9.5, weight="bold")
    fit(name, room, (legend(runs, most) for most in range(34, 4, -1)))
    below = left
    if words := cautions_of_seeds(runs):
        caution = page.text(left, top + 0.19, words, size=8, color=WORSE, weight="bold")
        below += width(caution) + 0.12
    look = dict(size=8, color=GREY)
    parts = model_facts(runs[0])
    shorter = (POINT.join(parts[:most]) for most in range(len(parts), 0, -1))
    fit(page.text(below, top + 0.19, "", **look), left + room - below, shorter)
    fit(page.text(left, top + 0.36, "", **look), room, settings_text(settings))


def width(text: Any) -> float:
    """Inches that a text takes on the page."""
    return text.get_window_extent().width / text.figure.dpi


def fit(text: Any, room: float, versions: Iterator[str]) -> None:
    """Of a text's versions, ever shorter ones, the first that so many inches hold, else none."""
    for version in versions:
        text.set_text(version)
        if width(text) <= room:
            return
    text.set_text("")


def legend(runs: list[Run], most: int) -> str:
    """Name, of at most so many characters, and score of a configuration; of several seeds their
    mean and standard deviation."""
    scores = [run.bpb for run in runs if run.bpb]
    names = [run.folder.name() for run in runs]
    if len(runs) == 1:
        return shorten(names[0], most) + (f"  {scores[0]:.4f}" if scores else "")
    name = f"{shorten(os.path.commonprefix(names) or names[0], most)}, {len(runs)} seeds"
    spread = f" \N{PLUS-MINUS SIGN} {statistics.stdev(scores):.4f}" if len(scores) > 1 else ""
    return name + (f"  {statistics.fmean(scores):.4f}{spread}" if scores else "")


def check_output(out: Path) -> str:
    """-> the format of a picture that can be written there; RunError."""
    kind = out.suffix.lower().removeprefix(".")
    if kind not in METADATA:
        raise RunError(f"--out {out}: no picture's name; fix: .{', .'.join(METADATA)}")
    if not out.parent.is_dir():
        fix = f"mkdir -p {out.parent}"
        raise RunError(f"--out {out}: there is no folder {out.parent}; fix: {fix}")
    if os.path.lexists(out) and not (out.is_file() or out.is_symlink()):
        raise RunError(f"--out {out}: is there and no file; fix: another name")
    return kind


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "\n").splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR")
    parser.add_argument("--out", type=Path, help="default: RUN_DIR/report.png; or .pdf, .svg")
    given = parser.parse_args(arguments)
    first = Path(given.runs[0])
    beside = first.resolve().parent / "compare.png"
    out = given.out or (beside if len(given.runs) > 1 else first / "report.png")
    try:
        with package("matplotlib").rc_context(STYLE), blame(", ".join(given.runs)):
            kind = check_output(out) if given.out else "png"
            figure = draw(load_all(given.runs))
            picture = io.BytesIO()
            figure.savefig(picture, dpi=150, format=kind, metadata=METADATA[kind])
            with endings.held():
                write_atomically(out, picture.getvalue())
    except (UserError, OSError) as error:
        endings.say(f"error: {printable(str(error))}", sys.stderr)
        return 2
    endings.say(f"wrote {out}")
    return 0


if __name__ == "__main__":
    sys.exit(endings.run(main, "no picture is written"))
