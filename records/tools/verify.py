"""Check the score of a run folder, without trusting anything in it.

    python records/tools/verify.py runs/tiny_seed1337 [--positions-seed 7] [--json]

The proof is the decode: code, artifact, tokenizer and stream.bin alone go into an empty folder,
and a fresh process without DATA_PATH turns them back into the validation text. The stream's size
is then the score. Everything else in the folder is compared with that text, with the artifact
and with each other. The folder's own train_gpt.py runs only if it is byte for byte the one of this
checkout; all other checks are computed by this checkout. Blocks and positions that are computed
again are drawn by the seed, which the folder's author cannot know; without one a fresh seed.

The text is that of DATA_PATH and TOKENIZER_PATH, else of the DATA_PATH that the run was given if
that folder is here and not beside the run's, else the embedded text or FineWeb, as RECORD says; the
tokenizer is never the one that the run names. The table names the text.

Exit status: 0 PROVED: no check failed, and every check marked * held, the decode of the whole text
among them; 1 FAILED: a check failed; 3 CONSISTENT, NOT PROVED: none failed, but one marked * could
not be made (no stream, only a stretch of the text in it, another machine's stream, no text here);
2 RUN_DIR is no folder. What could not be checked is named, marked or not.
"""

import argparse
import contextlib
import io
import json
import math
import os
import platform
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as train_gpt.py does: the decode runs beside
import numpy as np
import run_folder
import torch
from run_folder import ROOT

import train_gpt
from train_gpt import BLOCK, BOS

OUR_CODE = train_gpt.sha256(train_gpt.CODE.read_bytes())
BLOCKS, POSITIONS = 4, 16  # computed again, and in each of them the whole distribution
SAME_DEVICE = 1e-3, 1e-5  # nats at a target, a target of a block: fp32, other shapes
OTHER_DEVICE = 1.0, 0.02  # bf16 on one side
STRETCH = 2048  # targets whose distributions are added up from the start
CHANGED = 8192  # targets coded first, whose later half is changed
MASS_LIMIT = 1e-9  # float64 sums over the vocabulary stay below 1e-12
MIXTURE_LIMIT = 1e-6  # nats at a target; 0 on one machine
SLACK_BYTES = 16  # of the coder's last words
UNSIGNED = {"author", "github_id", "name", "date", "sha256"}  # of submission.json: not in the log
PATHS = ("DATA_PATH", "TOKENIZER_PATH")
STATUSES = ("ok", "FAILED", "not checked")
LOSSY_PROBE = " a  \ufb01\tb\r\n\n \uff21"  # what a normalising tokenizer changes
CHECKS: dict[str, tuple[Callable, tuple[str, ...], bool]] = {}  # function, needs, essential


class Failed(Exception):
    """The folder's claim does not hold; the message says where, with figures."""


class NotChecked(Exception):
    """This could not be looked at here; the message says why."""


def require(holds: Any, reason: str) -> None:
    if not holds:
        raise Failed(reason)


# -----------------------------------------------------------------------------
# What the folder holds, and what can be computed again from it. None of it is trusted, and none
# executed but by Case.decoder: the folder's train_gpt.py, if it is this checkout's


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

    def holds(self, path: Path) -> bool:
        """Whether a path lies in the folder or beside it: what its author may have put there"""
        return self.folder.resolve().parent in [path.resolve(), *path.resolve().parents]

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
        logged = self.run.last("config").get("DATA_PATH", "")
        logged = Path(logged.removesuffix("(env)")) if logged.endswith("(env)") else None
        if logged and logged.is_dir() and not self.holds(logged):
            given["DATA_PATH"] = str(logged)
        # Never a logged tokenizer: bytes, and so every score, would be its author's choice.
        given |= {name: os.environ[name] for name in PATHS if os.environ.get(name)}
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
            shutil.copyfile(self.run.file(name), alone / name)
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


# -----------------------------------------------------------------------------
# The checks, in their order; the decode begins with `stream` and is waited for at the end


class Row(NamedTuple):
    """A line of the table."""

    check: str
    status: str  # one of STATUSES
    reason: str
    essential: bool


def check(*needs: str, essential: bool = False) -> Callable:
    """Register a check, a function of a Case that returns its reason, or raises Failed or
    NotChecked. needs: checks that must have held before."""

    def register(function: Callable[[Case], str]) -> Callable[[Case], str]:
        CHECKS[function.__name__] = function, needs, essential
        return function

    return register


@check(essential=True)
def code(case: Case) -> str:
    """Nothing of the folder is executed before this held."""
    found = train_gpt.sha256(case.file("train_gpt.py"))
    reason = f"train_gpt.py has sha256 {found[:12]}, this checkout's has {OUR_CODE[:12]}"
    require(found == OUR_CODE, f"{reason}; fix: read it, or check out the commit that it is from")
    return f"train_gpt.py is this checkout's, sha256 {found[:12]}"


@check(essential=True)
def files(case: Case) -> str:
    for what, name in run_folder.FILES.items():
        found, claimed = (
            train_gpt.sha256(case.file(name)),
            str(case.claims.get("sha256", {}).get(what)),
        )
        reason = f"{name} has sha256 {found[:12]}, submission.json says {claimed[:12]}"
        require(found == claimed, reason)
    return "code, artifact and tokenizer have the sha256 that submission.json names"


@check(essential=True)
def artifact(case: Case) -> str:
    model = case.model.cfg
    for name in train_gpt.MODEL_FIELDS:
        there, here = getattr(model, name), getattr(case.cfg, name)
        require(there == here, f"its {name.upper()} is {there!r}, config.env says {here!r}")
    total, cap = (
        sum(len(case.file(name)) for name in ("train_gpt.py", "artifact.bin")),
        train_gpt.CAP_BYTES,
    )
    require(total <= cap, f"{total:,} bytes with the code, the cap is {cap:,}")
    return f"whole, {model.num_layers} layers x {model.model_dim}, {total:,} bytes with the code"


@check("artifact", essential=True)
def text(case: Case) -> str:
    found, where = case.text, case.cfg.data_path.removeprefix(f"{ROOT}/")
    theirs, ours = case.file("tokenizer.model"), Path(case.cfg.tokenizer_path).read_bytes()
    digests = f"({train_gpt.sha256(theirs)[:12]}) is not {case.cfg.tokenizer_path} "
    digests += f"({train_gpt.sha256(ours)[:12]})"
    require(theirs == ours, f"tokenizer.model {digests}")
    here = len(found.targets), int(found.bytes.sum())
    there = case.claims.get("tokens"), case.claims.get("bytes")
    reason = f"{where} has {here} tokens and bytes, submission.json says {there}"
    require(here == there, f"{reason}; fix: DATA_PATH=the text that was scored")
    return f"{here[0]:,} tokens, {here[1]:,} bytes in {where}"


@check("code", "artifact", "text", essential=True)
def stream(case: Case) -> str:
    header, words = case.stream
    for name, path in dict(code="train_gpt.py", artifact="artifact.bin").items():
        there = header.made[name]
        here = train_gpt.sha256(case.file(path))
        require(there == here, f"stream.bin was made with {name} {there[:12]}, not {here[:12]}")
    wanted = case.plan._replace(targets=header.plan.targets)
    require(header.plan == wanted, f"stream.bin has shape {[*header.plan]}, not {[*wanted]}")
    settings = {name: getattr(case.cfg, name) for name in train_gpt.SCORING}
    require(settings == header.scoring, "stream.bin's settings are not those of config.env")
    with contextlib.suppress(NotChecked):
        _ = case.decoder
    return f"whole, {len(words):,} bytes coded, made with this code and artifact"


@check("text")
def source(case: Case) -> str:
    """The text that the tokens spell, its bytes, and the file that they were made from."""
    sentencepiece = train_gpt.package("sentencepiece")
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=case.cfg.tokenizer_path)
    if tokenizer.decode(tokenizer.encode(LOSSY_PROBE)) != LOSSY_PROBE:
        raise NotChecked("the tokenizer alters text, so tokens do not give its bytes back")
    documents = np.split(case.text.stream, np.flatnonzero(case.text.stream == BOS))[1:]
    spelt = "".join(tokenizer.decode([document[1:].tolist() for document in documents]))
    found, counted = len(spelt.encode()), int(case.text.bytes.sum())
    require(found == counted, f"the tokens spell {found:,} bytes, counted are {counted:,}")
    sources = sorted(Path(case.cfg.data_path).glob("*_val.jsonl"))
    if len(sources) != 1:
        raise NotChecked(
            f"no *_val.jsonl beside the tokens; they spell {found:,} bytes, as counted"
        )
    lines = sources[0].read_text(encoding="utf-8").split("\n")
    same = spelt == "".join(json.loads(line)["text"] for line in lines if line)
    require(same, f"the tokens spell another text than {sources[0]}")
    return f"the tokens spell {sources[0].name} to the byte, {found:,} bytes as counted"


@check("text", essential=True)
def coverage(case: Case) -> str:
    """Every target once, with its bytes, in scores.npz; their sums in blocks.npz."""
    ours, edges = case.text, np.arange(0, len(case.text.targets), BLOCK)
    same = np.array_equal(case.blocks["bytes"], np.add.reduceat(ours.bytes, edges))
    require(same, "blocks.npz: bytes are not the text's")
    if not (case.folder / "scores.npz").exists():
        return f"{len(edges)} blocks have the bytes of the text (no scores.npz)"
    for name, column in dict(position=ours.positions, token=ours.targets, bytes=ours.bytes).items():
        require(np.array_equal(case.scores[name], column), f"scores.npz: {name} is not the text's")
    for name in ("logp_model", "logp_final"):
        column = case.scores[name]
        valid = column.shape == ours.targets.shape and (column <= 0).all()
        require(valid, f"scores.npz: {name} is not a log-probability for each target")
        gap = np.abs(np.add.reduceat(column, edges) - case.blocks[name]).max()
        require(gap < 1e-6, f"blocks.npz: {name} is {gap:.3g} nats off scores.npz's in a block")
    return f"each target once, its bytes the text's; {len(edges)} blocks are their sums"


@check("text", essential=True)
def val_bpb(case: Case) -> str:
    claims, nbytes = case.claims, case.text.bytes.sum()
    stage = "documents" if case.cfg.scorer == "documents" else "int6_sliding_window"
    stage = "ttt" if case.cfg.ttt_enabled else stage
    final, model = (case.blocks[name] for name in ("logp_final", "logp_model"))
    found = train_gpt.bits_per_byte(final, nbytes), train_gpt.bits_per_byte(model, nbytes)
    for name, here, there in (
        ("val_bpb", found[0], claims["val_bpb"]),
        ("val_loss", -final.sum() / len(case.text.targets), claims["val_loss"]),
        (f"val_bpb of {stage}", found[1], claims["stages"][stage]["val_bpb"]),
    ):
        reason = f"{name} is {there:.9g} in submission.json, {here:.9g} by blocks.npz"
        require(math.isclose(here, there, rel_tol=1e-9), reason)
    return f"{found[0]:.6f} by blocks.npz and in submission.json; {stage} {found[1]:.6f}"


@check(essential=True)
def log(case: Case) -> str:
    """submission.json is what the log gives, log.txt what metrics.jsonl gives."""
    ours, theirs = json.loads(json.dumps(run_folder.submission(case.run))), case.claims
    for name in sorted((ours.keys() | theirs.keys()) - UNSIGNED):
        here, there = (json.dumps(part.get(name))[:60] for part in (ours, theirs))
        same = ours.get(name) == theirs.get(name)
        require(same, f"{name} is {there} in submission.json, {here} by metrics.jsonl")
    lines = [
        train_gpt.log_line(x["key"], x["value"], train_gpt.line_fields(x)) for x in case.run.lines
    ]
    require(case.run.read("log.txt").splitlines() == lines, "log.txt and metrics.jsonl differ")
    return f"submission.json and log.txt repeat the {len(lines)} lines of metrics.jsonl"


@check("coverage")
def rescored(case: Case) -> str:
    again, (one, mean), worst = case.again, case.limits, 0.0
    for block in case.picked[0].tolist():
        mine = again.places // BLOCK == block
        gap = abs(again.log_prob[mine].sum() - case.blocks["logp_model"][block]) / mine.sum()
        require(
            gap <= mean, f"block {block}: logp_model is {gap:.3g} nats a target off the artifact's"
        )
        worst = max(worst, gap)
    with contextlib.suppress(NotChecked):
        for name, column in dict(logp_model=again.log_prob, entropy=again.entropy).items():
            gap = np.abs(case.scores[name][again.places] - column).max()
            require(
                gap <= one, f"scores.npz: {name} is {gap:.3g} nats off the artifact's at a target"
            )
    return f"blocks {case.picked[0].tolist()}: {worst:.1g} nats a target off, limit {mean:g}"


@check("coverage")
def mixture(case: Case) -> str:
    gap = np.abs(case.mixed[0] - case.scores["logp_final"][case.order.targets]).max()
    reason = f"scores.npz: logp_final is {gap:.3g} nats off the {case.cfg.mixer} mixture"
    require(gap <= MIXTURE_LIMIT, f"{reason} of logp_model and the text's counts")
    return f"logp_final of all targets again from logp_model and counts: {gap:.1g} nats off"


@check("text")
def mass(case: Case) -> str:
    cfg = case.cfg
    rt = case.rt
    stream = case.text.stream
    if cfg.scorer == "documents":
        plan = case.plan._replace(targets=min(STRETCH, case.plan.targets))
        _, coded = train_gpt.encode(case.model, rt, cfg, stream, plan)
        worst = coded.mass_error
    else:
        worst = train_gpt.window_mass(case.model, rt, cfg, stream)
    require(worst <= MASS_LIMIT, f"the probabilities of all tokens add up to 1 +- {worst:.3g}")
    if not (case.folder / "scores.npz").exists():
        return f"{worst:.1g} off 1 from the start on (no scores.npz for later positions)"
    for place, p in distributions(case):
        error, claimed = abs(p.sum() - 1), case.scores["logp_final"][place]
        require(error <= MASS_LIMIT, f"target {place}: all tokens add up to 1 +- {error:.3g}")
        gap, worst = abs(np.log(p[case.text.targets[place]]) - claimed), max(worst, error)
        reason = f"target {place}: log p is {gap:.3g} nats off scores.npz's logp_final"
        require(gap <= case.limits[0], reason)
    return (
        f"{worst:.1g} off 1 at most, from the start on and at {len(case.picked[1])} drawn targets"
    )


@check("text")
def causality(case: Case) -> str:
    """With all later tokens changed: the network's distributions, then the mixture over them."""
    rng, stream, order = np.random.default_rng(case.seed), case.text.stream.copy(), case.order
    again, vocab = case.again, case.cfg.vocab_size
    cut = int(np.median(again.places))
    future = (np.arange(len(stream)) > cut) & (stream != BOS)
    stream[future] = rng.integers(2, vocab, future.sum())
    changed = score_blocks(case, stream)
    same = changed.entropy == again.entropy  # sums over all tokens, float64
    past = again.places <= cut
    require(same[past].all(), "the network's distributions change with later tokens")
    require(not same[~past].all(), "the network's distributions do not change with earlier tokens")
    size = min(CHANGED, len(case.text.targets))
    now = int(np.searchsorted(case.times, case.times[size // 2]))  # steps stay whole
    tokens, scores = order.tokens[: case.begun + size].copy(), case.columns.take(slice(size))
    future = (np.arange(len(tokens)) >= case.begun + now) & (tokens != BOS)
    tokens[future] = rng.integers(2, vocab, future.sum())
    scores = train_gpt.Scores(*(c if c is None else c.copy() for c in scores))
    scores.log_prob[now:], scores.entropy[now:] = rng.uniform(-9, -1), rng.uniform(0, 5)
    schedule = order.schedule and tuple(part[: len(tokens)] for part in order.schedule)
    order = train_gpt.CodingOrder(tokens, slice(None), schedule)
    mixed, _ = mix_again(case, order, scores)
    require(np.array_equal(mixed[:now], case.mixed[0][:now]), "the mixture uses later tokens")
    return f"{past.sum():,} distributions, {now:,} mixtures bit-equal if all later tokens change"


@check("stream", "coverage", essential=True)
def coded_size(case: Case) -> str:
    """The stream is as long as the score claims."""
    coded, total, size = case.coded, len(case.text.targets), len(case.stream[1])
    final = case.blocks["logp_final"]
    if coded < total:
        final = case.scores["logp_final"][case.order.targets[:coded]]
    claimed = -final.sum() / math.log(256)
    slack = coded * 2 * case.cfg.vocab_size / 2**24 / 8 + SLACK_BYTES
    of = "val_bpb" if coded == total else f"{coded:,} tokens"
    reason = f"{size:,} bytes, {claimed:,.0f} are claimed ({of})"
    require(abs(size - claimed) <= slack, f"{reason}: more than {slack:.0f} apart")
    return f"{reason}, limit {slack:.0f} apart"


@check("stream", essential=True)
def decode(case: Case) -> str:
    process, alone, began = case.decoder
    error = process.communicate()[1].strip().splitlines() or [f"status {process.returncode}"]
    seconds, ours, total = time.perf_counter() - began, case.text.stream, len(case.text.targets)
    reason = error[-1].removeprefix("error: ")
    require(process.returncode == 0, f"a fresh process could not decode: {reason}")
    found, reached = np.load(alone / "decoded.npy", allow_pickle=False), np.zeros(total, bool)
    reached[case.order.targets[: case.coded]] = True
    starts = ours == BOS
    starts[-1] = False  # that document would be empty
    wanted = ours[np.append(True, reached) | starts]  # of each document what was coded of it
    size = min(len(found), len(wanted))
    differ = np.flatnonzero(found[:size] != wanted[:size])
    require(not len(differ), f"decoded token {differ.min(initial=size)} is not the text's")
    begun = len(found) == size and (wanted[size:] == BOS).all()  # the others were not begun
    require(begun, f"{len(found):,} tokens decoded, not {len(wanted):,}")
    claimed = case.claims.get("codec", {}).get("proved_tokens")
    require(claimed == case.coded, f"{case.coded:,} tokens decode, submission.json says {claimed}")
    if case.coded < total:
        raise NotChecked(f"{case.coded:,} of {total:,} tokens decode, no others are in stream.bin")
    return f"{case.coded:,} tokens in {seconds:.0f} s, all as in the text"


# -----------------------------------------------------------------------------
# Command line


def examine(case: Case, names: Iterable[str] = tuple(CHECKS)) -> Iterator[Row]:
    """Make these checks, in order; one whose needs, if among them, did not hold is not made."""
    names, held = tuple(names), set()
    with case.exit:
        for name in names:
            function, needs, essential = CHECKS[name]
            missing = [need for need in needs if need in names and need not in held]
            try:
                if missing:
                    raise NotChecked(f"needs {' and '.join(missing)}, above")
                status, reason = "ok", function(case)
                held.add(name)
            except NotChecked as why:
                status, reason = "not checked", str(why)
            except Exception as error:  # files of others: whatever goes wrong is theirs
                kind = "" if isinstance(error, Failed | ValueError) else f"{type(error).__name__}: "
                status, reason = "FAILED", kind + " ".join(str(error).split())
            yield Row(name, status, reason, essential)


def verdict(rows: list[Row]) -> tuple[int, str, str]:
    """-> exit status, its word, which checks failed or could not be made"""
    by = {status: [r.check for r in rows if r.status == status] for status in STATUSES}
    why = f"not checked: {', '.join(by['not checked']) or 'nothing'}"
    if by["FAILED"]:
        return 1, "FAILED", f"failed: {', '.join(by['FAILED'])}; {why}"
    proved = all(row.status == "ok" for row in rows if row.essential)
    return (0, "PROVED", why) if proved else (3, "CONSISTENT, NOT PROVED", why)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="RUN_DIR")
    parser.add_argument(
        "--positions-seed", type=int, help="draws blocks and positions; else random"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    options = parser.parse_args(arguments)
    seed, began, rows = options.positions_seed, time.perf_counter(), []
    seed = secrets.randbelow(10**6) if seed is None else seed
    try:
        case = Case(options.folder, seed)
    except run_folder.RunError as error:
        print(f"error: {error}; fix: RUN_DIR is the folder of a run", file=sys.stderr)
        return 2
    torch.set_num_threads(max(1, torch.get_num_threads() // 2))  # the decode has the others
    for row in examine(case):
        rows.append(row)
        if not options.json:
            mark = "*" if row.essential else " "
            print(f"{mark} {row.check:<11}{row.status:<13}{row.reason}", flush=True)
    (status, word, why), seconds = verdict(rows), time.perf_counter() - began
    score = case.run.last("final_ngram_exact").get("val_bpb")
    if options.json:
        result = dict(
            run=str(options.folder), status=status, verdict=word.rstrip(":"), why=why, val_bpb=score
        )
        result |= dict(
            val_bpb=score,
            positions_seed=seed,
            seconds=seconds,
            checks=[row._asdict() for row in rows],
        )
        print(json.dumps(result, indent=2))
    else:
        print(f"{word} val_bpb {score}; {why} ({seconds:.0f} s, positions-seed {seed})")
    return status


if __name__ == "__main__":
    sys.exit(main())
