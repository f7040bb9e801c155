"""What a run folder holds, and what can be computed again from it: the evidence of verify.py.

Nothing in the folder is trusted or executed here; `Case.decoder` starts the folder's train_gpt.py,
after it was compared with this checkout's.
"""

import contextlib
import io
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as train_gpt.py does: the decode runs beside
import numpy as np
import run_folder
import torch

import train_gpt
from train_gpt import BLOCK, BOS

OUR_CODE = train_gpt.sha256(train_gpt.CODE.read_bytes())
BLOCKS, POSITIONS = 4, 16  # computed again, and in each of them the whole distribution
SAME_DEVICE = 1e-3, 1e-5  # nats at a target, a target of a block: fp32, other shapes
OTHER_DEVICE = 1.0, 0.02  # bf16 on one side


class Failed(Exception):
    """The folder's claim does not hold; the message says where, with figures."""


class NotChecked(Exception):
    """This could not be looked at here; the message says why."""


def require(holds: Any, reason: str) -> None:
    if not holds:
        raise Failed(reason)


class Case:
    """A run folder, the text it is held against, and what was computed again."""

    def __init__(self, folder: str | Path, seed: int):
        self.folder = Path(folder)
        self.seed = seed
        self.run = run_folder.RunFolder(folder)
        self.exit = contextlib.ExitStack()

    def file(self, name: str) -> bytes:
        return run_folder.file_bytes(self.run, name)

    def arrays(self, name: str) -> dict[str, np.ndarray]:
        data = self.file(name)
        try:
            found = run_folder.read_columns(data)
        except Exception as error:  # zipfile, zlib and numpy have their own
            raise Failed(f"{name} is unreadable: {str(error)[:200]!r}") from None
        if self.run.last("hardware").get("python") == platform.python_version():
            np.savez(frame := io.BytesIO(), **found)  # another version may write it otherwise
            require(frame.getbuffer() == data, f"{name} is damaged beside its columns")
        return found

    @cached_property
    def claims(self) -> dict[str, Any]:
        return json.loads(self.run.read("submission.json"))

    @cached_property
    def blocks(self) -> dict[str, np.ndarray]:
        return self.arrays("blocks.npz")

    @cached_property
    def scores(self) -> dict[str, np.ndarray]:
        if not (self.folder / "scores.npz").exists():
            raise NotChecked("no scores.npz (SAVE_SCORES=0)")
        return self.arrays("scores.npz")

    @cached_property
    def cfg(self) -> Any:
        """The run's settings; where its text and tokenizer lie here."""
        pairs = self.run.config
        given = {}
        if unknown := pairs.keys() - train_gpt.VARIABLES.keys():
            raise Failed(f"config.env: {sorted(unknown)[0]} is no variable of this train_gpt.py")
        for name in ("DATA_PATH", "TOKENIZER_PATH"):
            logged = self.run.last("config").get(name, "")
            logged = logged.removesuffix("(env)") if logged.endswith("(env)") else ""
            if path := os.environ.get(name) or (Path(logged).exists() and logged):
                given[name] = path
        paths = given | train_gpt.default_paths(given, self.run.settings.get("RECORD", ""))
        values = {name.lower(): train_gpt.parse(name, text) for name, text in pairs.items()}
        values |= {name.lower(): str(path) for name, path in paths.items()}
        return train_gpt.Config(**values | dict(device="auto")).check()

    @cached_property
    def rt(self) -> Any:
        return train_gpt.Runtime(self.cfg)

    @cached_property
    def model(self) -> Any:
        return train_gpt.load_artifact(self.folder / "artifact.bin", self.rt.device)

    @cached_property
    def text(self) -> Any:
        try:
            train_gpt.prepare_sample(self.cfg.data_path)
            return train_gpt.ValidationText(self.cfg)
        except (train_gpt.UserError, OSError) as error:
            raise NotChecked(f"no validation text: {error}; or set DATA_PATH") from None

    @cached_property
    def stream(self) -> tuple[train_gpt.StreamHeader, bytes]:
        """Header and coder's words"""
        path = self.folder / "stream.bin"
        if not path.exists():
            raise NotChecked(f"no stream.bin (SCORER={self.cfg.scorer}), so no proof")
        try:
            return train_gpt.read_stream(path)
        except train_gpt.StreamError as error:
            data = self.file("stream.bin")
            start = len(train_gpt.STREAM_PREFIX) + 4
            size = start + int.from_bytes(data[start - 4 : start], "little") + train_gpt.SHA_BYTES
            size += self.claims.get("codec", {}).get("coded_bytes", 0)
            cut = f"has {len(data):,} bytes of {size:,}, it is cut off"
            raise Failed(f"stream.bin {cut}" if len(data) < size else str(error)) from None

    @cached_property
    def plan(self) -> train_gpt.CodingPlan:
        """Of the whole text in the run's lanes"""
        ranks = int(str(self.run.last("hardware").get("value", "1 x")).split(" x")[0])
        return train_gpt.CodingPlan.of(self.text.stream, self.cfg, ranks)

    @cached_property
    def order(self) -> train_gpt.CodingOrder:
        """In which the run coded, from the text alone"""
        if self.cfg.scorer == "sliding":
            return train_gpt.CodingOrder(self.text.stream, slice(None))
        return coding_order(self.text.stream, self.rt, self.plan)

    @cached_property
    def begun(self) -> int:
        """Tokens before the first target: the lanes' first BOS"""
        return len(self.order.tokens) - len(self.text.targets)

    @cached_property
    def times(self) -> np.ndarray:
        """Step of each target, in coding order"""
        if self.order.schedule is None:
            return np.arange(len(self.text.targets))
        return self.order.schedule[0][self.begun :]

    @cached_property
    def at(self) -> np.ndarray:
        """Place in coding order of each target, in the text's order"""
        at = np.empty(len(self.text.targets), np.int64)
        at[self.order.targets] = np.arange(len(at))
        return at

    @cached_property
    def coded(self) -> int:
        """Targets in stream.bin: whole steps, until the header's number is reached"""
        last = self.times[self.stream[0].plan.targets - 1]
        return int(np.searchsorted(self.times, last, "right"))

    @cached_property
    def limits(self) -> tuple[float, float]:
        there = "cpu" if " x cpu" in str(self.run.last("hardware").get("value")) else "cuda"
        return SAME_DEVICE if there == self.rt.device.type else OTHER_DEVICE

    @cached_property
    def picked(self) -> tuple[np.ndarray, np.ndarray]:
        """Blocks, and positions in them, that the seed draws"""
        rng, size = np.random.default_rng(self.seed), len(self.text.targets)
        if self.cfg.ttt_enabled and self.cfg.ttt_chunk_tokens < size:
            size = (
                self.cfg.ttt_chunk_tokens // BLOCK * BLOCK
            )  # the artifact itself scores the first
            if not size:
                raise NotChecked("TTT_CHUNK_TOKENS: weights change within the first block")
        blocks = np.sort(rng.permutation(-(-size // BLOCK))[:BLOCKS])
        spans = [np.arange(b * BLOCK, min((b + 1) * BLOCK, size)) for b in blocks]
        return blocks, np.concatenate(
            [np.sort(rng.permutation(span)[:POSITIONS]) for span in spans]
        )

    @cached_property
    def again(self) -> "Blocks":
        """The picked blocks"""
        return score_blocks(self, self.text.stream)

    @cached_property
    def columns(self) -> Any:
        """scores.npz's model columns in coding order, as Scores"""
        names = ("logp_model", "entropy", "pe_delta")
        return train_gpt.Scores(*map(self.scores.get, names)).take(self.order.targets)

    @cached_property
    def mixed(self) -> tuple[np.ndarray, dict[int, np.ndarray]]:
        """log p in coding order from those; weights at the picked positions"""
        return mix_again(self, self.order, self.columns, self.at[self.picked[1]])

    @cached_property
    def decoder(self) -> tuple[subprocess.Popen, Path, float]:
        """A fresh process in a folder of its own, begun now; it runs beside the other checks."""
        made = self.stream[0].made
        artifact = self.folder / "artifact.bin"
        try:
            rt = train_gpt.Runtime(replace(self.cfg, device=made["device"].split()[0]))
        except train_gpt.ConfigError:
            reason = (
                f"made on {made['device']}, which is not here; CODEC_DEVICE=cpu codes for any CPU"
            )
            raise NotChecked(reason) from None
        for name, here in train_gpt.fingerprint(rt, artifact).items():
            there = made.get(name)
            if name not in ("threads", "code", "artifact") and there != here:
                raise NotChecked(f"made with {name} {there}, here is {here}: bits may differ")
        alone = Path(self.exit.enter_context(tempfile.TemporaryDirectory(prefix="verify_")))
        for name in ("train_gpt.py", "artifact.bin", "tokenizer.model", "stream.bin"):
            shutil.copyfile(self.folder / name, alone / name)
        require(
            train_gpt.sha256((alone / "train_gpt.py").read_bytes()) == OUR_CODE,
            "train_gpt.py has changed",
        )
        ours = {"PYTHONPATH", *train_gpt.VARIABLES, *train_gpt.LAUNCH}
        environ = {name: text for name, text in os.environ.items() if name not in ours}
        process = subprocess.Popen(
            [sys.executable, "train_gpt.py"],
            cwd=alone,
            env=environ | {"DECODE": str(alone)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.exit.callback(process.kill)
        return process, alone, time.perf_counter()


# -----------------------------------------------------------------------------
# Computed again


def coding_order(stream: np.ndarray, rt: Any, plan: Any) -> train_gpt.CodingOrder:
    """In which lanes take the targets of a stream (N + 1,), without a network."""
    steps = train_gpt.run_lanes(None, rt, plan, [], train_gpt.tokens_of_text(stream))
    return train_gpt.coding_order(stream, steps)


def mix_again(
    case: Case, order: Any, scores: Any, keep: Any = ()
) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """Scores in coding order -> log p (N,), nats; the mixing weights (K + 1,) of targets `keep`"""
    cfg = case.cfg
    device = case.rt.device
    mixer = train_gpt.make_mixer(cfg.mixer, cfg, device)
    weights = mixer.weights
    wanted = np.asarray(keep, np.int64)
    kept = {}
    begun = 0
    longest = max(mixer.orders, default=1)
    schedule = order.schedule
    counts = train_gpt.ngram_counts(order.tokens, cfg.vocab_size, longest, device, schedule)
    store = train_gpt.CountStore(mixer.orders, case.begun).collect(counts)

    def watched(*rows: Any) -> np.ndarray:
        nonlocal begun
        found = weights(*rows)
        a = begun
        begun += len(found)
        kept.update({t: found[t - a] for t in wanted[(a <= wanted) & (wanted < begun)].tolist()})
        return found

    mixer.weights = watched
    times = schedule and schedule[0][case.begun :]
    return train_gpt.mix(mixer, store, scores, times), kept


class Blocks(NamedTuple):
    """Targets of the picked blocks, and others on the way, by the artifact; nats."""

    places: np.ndarray  # (n,) in the text
    log_prob: np.ndarray  # (n,)
    entropy: np.ndarray  # (n,)
    rows: dict[int, np.ndarray]  # picked position -> log-probabilities (V,)


@torch.no_grad()
def score_blocks(case: Case, stream: np.ndarray) -> Blocks:
    """stream: the text's, or one with the same BOS in the same places"""
    size = len(stream) - 1
    spans = [(b * BLOCK, min((b + 1) * BLOCK, size)) for b in case.picked[0]]
    how = score_lanes if case.cfg.scorer == "documents" else score_windows
    return how(case, stream, spans, case.picked[1].tolist())


def score_lanes(case: Case, stream: np.ndarray, spans: list, picked: list[int]) -> Blocks:
    """Documents that reach into the spans, side by side, from their starts to the spans' ends."""
    starts, pieces, rows = np.append(np.flatnonzero(stream[:-1] == BOS), len(stream) - 1), {}, {}
    for a, b in spans:
        first, last = np.searchsorted(starts, [a, b - 1], "right") - 1
        pieces |= {d: np.arange(starts[d], min(b, starts[d + 1])) for d in range(first, last + 1)}
    places, sizes = np.concatenate([*pieces.values()]), np.array([*map(len, pieces.values())])
    goals, log_prob, entropy = stream[places + 1].astype(np.int64), *np.zeros((2, len(places)))
    begins = np.cumsum(sizes) - sizes

    def choose(outputs: Any, step: train_gpt.LaneStep) -> np.ndarray:
        here = begins[step.documents] + step.places
        log_probs, spread = (column.cpu().numpy()[step.lanes] for column in outputs)
        log_prob[here] = log_probs[np.arange(len(here)), goals[here]]
        entropy[here] = spread
        found = zip(places[here].tolist(), log_probs, strict=True)
        rows.update({place: row for place, row in found if place in picked})
        goes_on = step.places + 1 < sizes[step.documents]
        return np.where(goes_on, goals[here], BOS)  # a piece that is over ends so

    count = len(pieces)
    plan = train_gpt.CodingPlan(count, 0, count, 1, len(places), case.cfg.window)
    train_gpt.run_lanes(case.model, case.rt, plan, [0], choose)
    return Blocks(places, log_prob, entropy, rows)


def score_windows(case: Case, stream: np.ndarray, spans: list, picked: list[int]) -> Blocks:
    """The windows of the spans' targets, with the run's shapes."""
    stride, scorer = case.cfg.eval_stride, train_gpt.WindowScorer(case.model, case.rt, case.cfg)
    windows = [np.arange(a // stride, -(-b // stride)) for a, b in spans]
    ends, rows = (np.unique(np.concatenate(windows)) + 1) * stride, {}
    for place in picked:
        ids, scored, _ = scorer.windows(stream, np.array([place // stride + 1]) * stride, stride)
        rows[place] = scorer.predict(ids, scored)[0][0, place % stride].cpu().numpy()
    places = (ends[:, None] - stride + np.arange(stride)).ravel()
    columns = scorer.score_windows(stream, ends, stride).reshape(2, -1)
    inside = places < len(stream) - 1
    return Blocks(places[inside], *columns[:, inside], rows)


def distributions(case: Case) -> Iterator[tuple[int, np.ndarray]]:
    """(place, p (V,)) at the picked positions: the artifact's distribution, the mixture's weights,
    and counts by looking through the text, without train_gpt.py's tables."""
    orders = train_gpt.make_mixer(case.cfg.mixer, case.cfg, case.rt.device).orders
    stream, size, times = case.text.stream, len(case.text.targets), case.times[case.at]
    for place in case.picked[1].tolist():
        weights, seen, reach = case.mixed[1][int(case.at[place])], times < times[place], 0
        p = weights[0] * np.exp(case.again.rows[place])
        for longest, weight in zip(orders, weights[1:], strict=True):
            for k in range(reach, longest - 1):  # the context grows by the token before it
                ends = k and case.order.schedule is not None and stream[place - k + 1] == BOS
                fits = np.zeros(size, bool)
                if place >= k and not ends:
                    fits[k:] = stream[: size - k] == stream[place - k]
                seen &= fits
            counts, reach = (
                np.bincount(stream[1:][seen], minlength=case.cfg.vocab_size),
                longest - 1,
            )
            counts[BOS] += case.begun * (longest == 1)  # the lanes' first tokens count, too
            p = p + weight * counts / max(1, counts.sum())
        yield place, p
