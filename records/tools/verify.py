"""Check the score of a run folder, without trusting anything in it.

    python records/tools/verify.py runs/tiny_seed1337 [--minutes 60] [--json]

The proof is the decode: a fresh process is given this checkout's train_gpt.py, the folder's
artifact.bin and stream.bin, and no text. It must turn them back into the validation text, and adds
up what each token cost it: -log p of a distribution that it had before it knew the token. val_bpb
is that sum over the bytes of the text, to 1e-6.

Text and tokenizer are the verifier's, never the folder's: those of DATA_PATH and TOKENIZER_PATH,
else the embedded text or FineWeb of this checkout. The verdict names the text. The folder's files
are copied once, and only that copy is looked at. Its train_gpt.py must be byte for byte this
checkout's; nothing of the folder is executed. scores.npz and blocks.npz are for statistics and
pictures and not read here. Training text that the artifact holds (its known text) must be the end
of the verifier's: of the embedded one, or of the shards in DATA_PATH. Where it is not, that is no
proof, and it fails where half of the scored text stands in it.

Where the stream cannot be decoded (there is none, it holds a stretch of the text only, or another
kind of machine made it) the artifact is scored again by this checkout, and the figure is printed.

Exit status: 0 PROVED: every check held; 1 FAILED: one failed; 3 CONSISTENT, NOT PROVED: none
failed, but one could not be made; 2 RUN_DIR is no folder of a run. Nobody can prove who trained how
long on what: such claims are named as such. A model that has seen the text gets a true code length,
too.
"""

import argparse
import contextlib
import errno
import json
import lzma
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import run_folder
from run_folder import ROOT, RunError, tokens_sha256

import endings
import train_gpt
from prepare import TOKENIZER_SHA256, TRAIN_TOKENS_SHA256, VAL_TOKENS_SHA256
from train_gpt import CAP_BYTES, printable, read_regular, sha256

OUR_CODE = sha256(train_gpt.SCRIPT)
SAME_SUM = 1e-6  # bits per byte between the claim and what the decode adds up
MOST_WEIGHTS = 2**28  # that are unpacked, 3 GB
SAME_DEVICE = 1e-4  # nats a token of two scorings in fp32, in other shapes
OTHER_DEVICE = 0.02  # bf16 on one side
EMBEDDED = "the embedded text"
STRETCH = 16  # tokens that are looked for in a known text
MOST_SHARED = 0.5  # of the text's stretches, that may lie in one that is not the verifier's
UNSIGNED = {"author", "github_id", "name", "date", "sha256"}  # of submission.json: not in the log
UNPROVABLE = "seed, steps, seconds, hardware, names, dates, the training text, other stages' scores"
UNPROVABLE += ", each order's gain"
PATHS = ("DATA_PATH", "TOKENIZER_PATH")
STATUSES = ("ok", "FAILED", "not checked")
MOST = {  # what is looked at -> bytes at most
    "submission.json": train_gpt.MOST_TEXT_BYTES,
    "metrics.jsonl": train_gpt.MOST_BYTES,
    "log.txt": train_gpt.MOST_BYTES,
    "config.env": train_gpt.MOST_TEXT_BYTES,
    "train_gpt.py": CAP_BYTES,
    "artifact.bin": CAP_BYTES,
    "tokenizer.model": train_gpt.MOST_TOKENIZER_BYTES,
    "stream.bin": train_gpt.MOST_STREAM_BYTES,
}
# What a folder can do to its reader; other errors are of this machine.
FOLDERS_FAULT = {errno.ENOENT, errno.ELOOP, errno.EINVAL, errno.EFBIG, errno.EISDIR}
CHECKS: dict[str, tuple[Callable, tuple[str, ...]]] = {}  # name -> function, needs


class Failed(Exception):
    """The folder's claim does not hold; the message says where, with figures."""


class NotChecked(Exception):
    """This could not be looked at here; the message says why."""


def require(holds: Any, reason: str) -> None:
    if not holds:
        raise Failed(reason)


# -----------------------------------------------------------------------------
# What is checked: a private copy of the folder, and the text it is held against


class Decoded(NamedTuple):
    """What a fresh process made of the stream."""

    tokens: np.ndarray  # uint16, a BOS before each document
    targets: int  # decoded
    nats: float  # -log p of these, by mixture
    model_nats: float  # and by network alone
    mass_error: float  # largest of any of the distributions
    seconds: float


def as_read(content: bytes) -> bytes:
    """This checkout's script where the content is, byte for byte, its packed form, so that none of
    that need be believed or run; else the content."""
    packed = content == train_gpt.pack_script(train_gpt.SCRIPT)
    return train_gpt.SCRIPT if packed else content


class Case:
    """A run folder, copied once; nothing in it is trusted."""

    def __init__(self, folder: str | Path, minutes: float = 60):
        """RunError for no folder of a run."""
        self.origin = Path(folder)
        self.minutes = minutes
        self.rescored_bpb: float | None = None
        self.notes: list[str] = []
        self.exit = contextlib.ExitStack()
        self.errors: dict[str, OSError] = {}
        temporary = tempfile.TemporaryDirectory(prefix="verify_")
        self.temporary = Path(self.exit.enter_context(temporary))
        self.folder = self.temporary / "copy"
        self.folder.mkdir()
        try:
            for name, most in MOST.items():
                self.copy(name, most)
            if error := self.errors.get("metrics.jsonl"):
                raise RunError(f"{folder}: no metrics.jsonl ({error.strerror})")
            self.run = run_folder.RunFolder(self.folder)
        except BaseException:
            self.exit.close()
            raise

    def copy(self, name: str, most: int) -> None:
        """A file is read here and never again, whoever changes it meanwhile."""
        try:
            content = read_regular(run_folder.locate(self.origin, name), most)
        except OSError as error:
            self.errors[name] = error
        else:
            (self.folder / name).write_bytes(as_read(content))

    def file(self, name: str) -> bytes:
        """Failed where the folder lacks it, NotChecked where this machine cannot read it"""
        if error := self.errors.get(name):
            fault = Failed if error.errno in FOLDERS_FAULT else NotChecked
            missing = error.errno == errno.ENOENT
            raise fault(f"no {name}" if missing else f"{name} {error.strerror}")
        return (self.folder / name).read_bytes()

    @cached_property
    def claims(self) -> dict[str, Any]:
        return run_folder.parse_object(self.file("submission.json"), "submission.json")

    def claim(self, *names: str) -> Any:
        """The value below these keys of submission.json; None where there is none"""
        found: Any = self.claims
        for name in names:
            found = found.get(name) if isinstance(found, dict) else None
        return found

    @cached_property
    def own_text(self) -> str:
        """The text that the run names, where it is another one than the verifier's and that was
        not asked for by DATA_PATH: it is not known here; else ''"""
        logged, _, origin = str(self.run.last("config").get("DATA_PATH", "")).rpartition("(")
        other = origin == "env)" or Path(logged).name != Path(self.cfg.data_path).name
        return logged if other and not os.environ.get("DATA_PATH") else ""

    @cached_property
    def cfg(self) -> train_gpt.Config:
        """The run's settings, with the verifier's text and tokenizer"""
        self.file("config.env")
        pairs = self.run.config
        for name in pairs:
            if name not in train_gpt.VARIABLES or name in train_gpt.PER_RUN:
                raise Failed(f"config.env: {name} is no setting of this train_gpt.py")
        given = {name: os.environ[name] for name in PATHS if os.environ.get(name)}
        record = self.run.settings.get("RECORD", "")
        paths = given | train_gpt.default_paths(given, record)
        values = {name.lower(): train_gpt.parse(name, text) for name, text in pairs.items()}
        values |= {name.lower(): str(path) for name, path in paths.items()}
        return train_gpt.Config(**values | dict(device="auto")).check()

    @cached_property
    def rt(self) -> train_gpt.Runtime:
        return train_gpt.Runtime(self.cfg)

    @cached_property
    def model(self) -> train_gpt.GPT:
        return train_gpt.load_artifact("artifact.bin", "cpu", self.file("artifact.bin"))

    @cached_property
    def tokenizer(self) -> bytes:
        """The verifier's"""
        try:
            train_gpt.prepare_sample(self.cfg.data_path)
            return train_gpt.read_tokenizer(self.cfg.tokenizer_path)
        except (train_gpt.UserError, OSError) as error:
            raise NotChecked(f"no tokenizer: {error}; or set DATA_PATH") from None

    @cached_property
    def text(self) -> train_gpt.ValidationText:
        try:
            text = train_gpt.ValidationText(self.cfg)
            text.check(rest=True)
            return text
        except (train_gpt.UserError, OSError) as error:
            raise NotChecked(f"no validation text: {error}; or set DATA_PATH") from None

    @cached_property
    def known_is_ours(self) -> bool:
        """Whether the artifact's known text is the end of the verifier's training text; NotChecked
        without one"""
        known = self.model.known.tokens
        return len(known) <= len(self.training) and np.array_equal(
            self.training[len(self.training) - len(known) :], known
        )

    @cached_property
    def training(self) -> np.ndarray:
        """The tokens of the verifier's training text; NotChecked without one"""
        try:
            return run_folder.read_split(self.cfg.data_path, "train")
        except (train_gpt.UserError, OSError) as error:
            raise NotChecked(f"no training text for the known text: {error}") from None

    @cached_property
    def shared(self) -> float:
        """Of the text's stretches, the share that the artifact's known text has, too"""
        return shared_stretches(self.text.stream, self.model.known.tokens, STRETCH)

    @cached_property
    def text_name(self) -> str:
        """Which text that is: by its tokens and tokenizer, not by its place"""
        size = f"{self.text.text_bytes:,} bytes"
        altered = f", {size} that its tokenizer alters" if self.text.lossy else ""
        implied = 1 - int(self.text.positions[0])  # a first BOS that is in no shard
        tokens = tokens_sha256(self.text.stream[implied:])
        known = VAL_TOKENS_SHA256, TOKENIZER_SHA256
        if (tokens, sha256(self.tokenizer)) == known and not altered:
            return EMBEDDED
        if Path(self.cfg.data_path) == train_gpt.FINEWEB_DATA:
            return f"FineWeb's validation text as downloaded here (sha256 {tokens[:12]}){altered}"
        return f"another text (sha256 {tokens[:12]}){altered}"

    @cached_property
    def val_bpb(self) -> float:
        """What the decode proves"""
        return self.decoded.nats / math.log(2) / self.text.text_bytes

    @cached_property
    def stream(self) -> tuple[train_gpt.StreamHeader, bytes]:
        """Header and coder's words"""
        if "stream.bin" in self.errors and self.errors["stream.bin"].errno == errno.ENOENT:
            how = f"SCORER={self.cfg.scorer}, CODEC_TOKENS={self.cfg.codec_tokens}"
            raise NotChecked(f"no stream.bin ({how}), so no proof")
        self.file("stream.bin")
        try:
            return train_gpt.read_stream(self.folder / "stream.bin")
        except train_gpt.StreamError as error:
            raise Failed(str(error).replace(f"{self.folder}/", "")) from None

    @cached_property
    def decoded(self) -> Decoded:
        """By a fresh process in a folder of its own"""
        alone = self.temporary / "alone"
        alone.mkdir()
        for name in ("artifact.bin", "stream.bin"):
            (alone / name).write_bytes(self.file(name))
        began = time.perf_counter()
        line = self.run_script(alone, DECODE=str(alone)).splitlines()[-1]
        seconds = time.perf_counter() - began
        values = dict(word.split(":", 1) for word in line.split())
        tokens = np.load(alone / "decoded.npy", allow_pickle=False)
        sums = [float(values[name]) for name in ("nats", "model_nats", "mass_error")]
        return Decoded(tokens, int(values["decoded"]), *sums, seconds)

    def run_script(self, folder: Path, **given: str) -> str:
        """This checkout's train_gpt.py in a folder, with these variables alone. -> what it prints;
        Failed where it blames artifact or stream, NotChecked where anything else stopped it"""
        environ = {name: text for name, text in os.environ.items() if foreign(name, text)}
        command = [sys.executable, train_gpt.CODE]
        how = dict(stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
        try:
            done = subprocess.run(
                command, cwd=folder, env=environ | given, timeout=60 * self.minutes, **how
            )
        except subprocess.TimeoutExpired:
            raise NotChecked(f"not done in {self.minutes:g} minutes; fix: --minutes") from None
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1].removeprefix("error: ")
        if reason.startswith((f"{folder}/stream.bin", f"{folder}/artifact.bin")):
            raise Failed(reason.replace(f"{folder}/", ""))
        if done.returncode:
            raise NotChecked(f"a fresh process ended with status {done.returncode}: {reason}")
        return done.stdout


def shared_stretches(text: np.ndarray, known: np.ndarray, length: int) -> float:
    """Of the stretches of so many tokens of a text, one from each token on, the share that lies in
    `known` too, uint16 (N,) each; 0 where the text is shorter. By 64-bit hashes."""

    def hashes(tokens: np.ndarray) -> np.ndarray:
        count = max(0, len(tokens) - length + 1)
        found = np.zeros(count, np.uint64)
        for place in range(length):
            part = tokens[place : place + count].astype(np.uint64) + np.uint64(1)
            found = (found ^ part) * np.uint64(0x9E3779B97F4A7C15)
            found ^= found >> np.uint64(32)
        return found

    wanted = hashes(text)
    return float(np.isin(wanted, hashes(known)).mean()) if len(wanted) and len(known) else 0.0


def foreign(name: str, text: str) -> bool:
    """Has train_gpt.py nothing to do with this variable?"""
    ours = {*train_gpt.VARIABLES, *train_gpt.LAUNCH, *train_gpt.ALIASES, *train_gpt.ANYWAY}
    try:
        train_gpt.refuse_misspelt({name: text})
    except train_gpt.ConfigError:
        return False
    return name not in ours


# -----------------------------------------------------------------------------
# The checks, in their order


class Row(NamedTuple):
    """A line of the table."""

    check: str
    status: str  # one of STATUSES
    reason: str


def check(*needs: str) -> Callable:
    """Register a check, a function of a Case that returns its reason, empty where there is nothing
    to check, or raises Failed or NotChecked. needs: checks that must have held before."""

    def register(function: Callable[[Case], str]) -> Callable[[Case], str]:
        CHECKS[function.__name__] = function, needs
        return function

    return register


@check()
def code(case: Case) -> str:
    found = sha256(case.file("train_gpt.py"))
    reason = f"train_gpt.py has sha256 {found[:12]}, this checkout's has {OUR_CODE[:12]}"
    require(found == OUR_CODE, f"{reason}; fix: read it, or check out the commit that it is from")
    with contextlib.suppress(OSError):
        if not case.origin.resolve().name.startswith("seed_"):  # of a submission: they share it
            raise FileNotFoundError
        for name in ("train_gpt.py", train_gpt.PACKED_NAME):
            path = case.origin.resolve().parent / name
            above = sha256(as_read(read_regular(path, CAP_BYTES)))
            require(above == found, f"another {name} lies above the folder, sha256 {above[:12]}")
    return f"train_gpt.py is this checkout's, sha256 {found[:12]}"


@check()
def files(case: Case) -> str:
    for what, name in run_folder.FILES.items():
        found = sha256(case.file(name))
        claimed = str(case.claim("sha256", what))
        reason = f"{name} has sha256 {found[:12]}, submission.json says {claimed[:12]}"
        require(found == claimed, reason)
    return "code, artifact and tokenizer have the sha256 that submission.json names"


@check()
def artifact(case: Case) -> str:
    content = case.file("artifact.bin")
    try:
        header, _ = train_gpt.unseal(train_gpt.ARTIFACT_PREFIX, content)
        stored = train_gpt.stored_values(header["model"], train_gpt.MODEL_FIELDS)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise Failed(f"artifact.bin: unreadable ({error})") from None
    for name, there in stored.items():
        here = getattr(case.cfg, name)
        require(there == here, f"its {name.upper()} is {there!r}, config.env says {here!r}")
    weights = train_gpt.count_parameters(case.cfg)
    if weights > MOST_WEIGHTS:
        raise NotChecked(f"{weights:,} weights in {len(content):,} bytes are not unpacked here")
    model = case.model.cfg
    total = len(train_gpt.pack_script(train_gpt.SCRIPT)) + len(content)
    require(total <= CAP_BYTES, f"{total:,} bytes with the script, the cap is {CAP_BYTES:,}")
    return f"whole, {model.num_layers} layers x {model.model_dim}, {total:,} bytes with the script"


@check("artifact")
def text(case: Case) -> str:
    """Failed for another text only where the run claims to have scored this one."""
    where = case.cfg.data_path.removeprefix(f"{ROOT}/")
    differs = Failed
    fix = "; fix: DATA_PATH=the text that was scored"
    if case.own_text:
        differs = NotChecked
        fix = f" of its own, {case.own_text}{fix}"
    theirs = sha256(case.file("tokenizer.model"))
    ours = sha256(case.tokenizer)
    if theirs == TOKENIZER_SHA256 != ours:  # the run's is right, this machine's is not
        differs = NotChecked
    if theirs != ours:
        reason = f"tokenizer.model ({theirs[:12]}) is not {case.cfg.tokenizer_path} ({ours[:12]})"
        raise differs(f"{reason}: another text{fix}")
    here = len(case.text.targets), case.text.text_bytes
    there = case.claim("tokens"), case.claim("bytes")
    if here != there:
        reason = f"{where} has {here} tokens and bytes, submission.json says {there}"
        raise differs(f"{reason}: another text{fix}")
    return f"{here[0]:,} tokens, {here[1]:,} bytes in {where}: {case.text_name}"


@check("artifact")
def known(case: Case) -> str:
    """Training text that the artifact holds is the verifier's; empty where it holds none."""
    count = len(case.model.known)
    if not count:
        return ""
    share = f"{case.shared:.1%} of the scored text's stretches of {STRETCH} tokens are in it"
    embedded = case.text_name == EMBEDDED
    if embedded and tokens_sha256(case.training) != TRAIN_TOKENS_SHA256:
        where = case.cfg.data_path
        raise NotChecked(f"{where} has not the embedded training text; fix: move it away")
    if case.known_is_ours:
        return f"{count:,} training tokens in the artifact, the end of those here; {share}"
    other = f"the artifact's {count:,} training tokens are not the end of those here; {share}"
    require(not embedded and case.shared <= MOST_SHARED, other)
    raise NotChecked(other)


@check()
def log(case: Case) -> str:
    """submission.json is what the log gives, log.txt what metrics.jsonl gives."""
    run_folder.require_finished(case.run)
    ours = json.loads(json.dumps(train_gpt.submission(case.run, case.folder)))
    theirs = case.claims
    for name in sorted((ours.keys() | theirs.keys()) - UNSIGNED):
        here = json.dumps(ours.get(name))[:60]
        there = json.dumps(theirs.get(name))[:60]
        same = ours.get(name) == theirs.get(name)
        require(same, f"{name} is {there} in submission.json, {here} by metrics.jsonl")
    lines = [
        train_gpt.log_line(x["key"], x["value"], train_gpt.line_fields(x)) for x in case.run.lines
    ]
    same = case.file("log.txt").decode(errors="replace") == "".join(f"{x}\n" for x in lines)
    require(same, "log.txt and metrics.jsonl differ")
    logged_settings(case)
    return f"submission.json and log.txt repeat the {len(lines)} lines of metrics.jsonl"


def logged_settings(case: Case) -> None:
    """Failed where the log's last start says other settings than config.env, by which the score is
    made again."""
    settings = case.run.config
    said: list[tuple[str, str]] = []
    for line in case.run.lines:
        if line["key"] == "config":
            fields = train_gpt.line_fields(line).items()
            said = [(name, str(value).rpartition("(")[0]) for name, value in fields]
        elif line["key"] == "setting":
            name, _, value = str(line["value"]).partition("=")
            said.append((name, value))
    for name, there in said:
        here = settings.get(name, there)  # a path or a name of the run is in no config.env
        if name == "VOCAB_SIZE" and there == "0":  # the tokenizer's
            there = here
        require(here == there, f"{name} is {there[:60]} in the log, {here[:60]} in config.env")


@check("code", "artifact", "text")
def stream(case: Case) -> str:
    header, words = case.stream
    for name, path in dict(code="train_gpt.py", artifact="artifact.bin").items():
        there = str(header.made[name])
        here = sha256(case.file(path))
        require(there == here, f"stream.bin was made with {name} {there[:12]}, not {here[:12]}")
    plan = header.plan
    wanted = train_gpt.CodingPlan.of(case.text.stream, case.cfg, plan.groups)
    wanted = wanted._replace(targets=min(plan.targets, wanted.targets))
    require(plan == wanted, f"stream.bin has shape {[*plan]}, not {[*wanted]}")
    settings = {name: getattr(case.cfg, name) for name in train_gpt.SCORING}
    require(settings == header.scoring, "stream.bin's settings are not those of config.env")
    measured = dict(coded_bytes=len(words), total_tokens=len(case.text.targets))
    for name, here in measured.items():
        there = case.claim("codec", name)
        require(there == here, f"{name} is {here}, submission.json says {there}")
    return f"whole, {len(words):,} bytes coded, made with this code and artifact"


@check("stream")
def decode(case: Case) -> str:
    """The stream gives the verifier's text, and no token of it is missing."""
    header, _ = case.stream
    here_or_not_checked(case, header)
    found = case.decoded
    text = case.text.stream
    size = min(len(found.tokens), len(text))
    whole = found.targets == len(text) - 1
    if whole:
        differ = np.flatnonzero(found.tokens[:size] != text[:size])
        require(not len(differ), f"decoded token {differ.min(initial=size)} is not the text's")
        both = f"{len(found.tokens):,} tokens decoded, not {len(text):,}"
        require(len(found.tokens) == len(text), both)
    claimed = case.claim("codec", "proved_tokens")
    reason = f"{found.targets:,} tokens decode, submission.json says {claimed}"
    require(claimed == found.targets, reason)
    if not whole:
        same = np.array_equal(found.tokens, coded_stretch(text, header.plan, found.targets))
        require(same, "the decoded stretch is not the text's")
        reason = f"{found.targets:,} of {len(text) - 1:,} tokens decode, as in the text"
        raise NotChecked(f"{reason}; no others are in stream.bin (CODEC_TOKENS)")
    return f"{found.targets:,} tokens in {found.seconds:.0f} s, all as in the text"


def here_or_not_checked(case: Case, header: train_gpt.StreamHeader) -> None:
    """NotChecked for a stream that another kind of machine made, or that needs more memory."""
    try:
        train_gpt.range_coder()
    except train_gpt.UserError as error:
        raise NotChecked(str(error)) from None
    made = header.made
    kind = str(made["device"])
    try:
        rt = train_gpt.Runtime(replace(case.cfg, device=kind.split()[0]))
    except train_gpt.ConfigError:
        raise NotChecked(f"made on {kind}, which is not here; fix: a machine like that") from None
    for name, here in train_gpt.fingerprint(rt, b"", b"").items():
        there = made.get(name)
        if name not in ("threads", "code", "artifact") and there != here:
            raise NotChecked(f"made with {name} {there}, here is {here}: bits may differ")
    needed = train_gpt.lane_bytes(case.cfg, header.plan.lanes, header.plan.window, rt.cuda)
    train_gpt.require_memory(needed, f"{header.plan.lanes} lanes", rt.device)


def coded_stretch(text: np.ndarray, plan: train_gpt.CodingPlan, targets: int) -> np.ndarray:
    """What lanes have read of a text, uint16 from a BOS on, when so many targets are coded."""
    order = train_gpt.LaneSchedule(text, plan).order(text).targets[:targets]
    starts = train_gpt.Pieces.of(text, plan.length).starts
    pieces = np.searchsorted(starts, order, "right") - 1
    return train_gpt.joined_text(plan, pieces, text[order + 1])


@check("decode")
def score(case: Case) -> str:
    """What the decode added up is what is claimed, of probabilities that add up to 1."""
    found = case.decoded
    require(
        found.mass_error <= train_gpt.MASS_LIMIT, f"masses are up to {found.mass_error:.3g} off 1"
    )
    size = case.text.text_bytes * math.log(2)
    sums = [(case.val_bpb, ("val_bpb",)), (found.nats / found.targets, ("val_loss",))]
    if case.cfg.codec_device == "same":  # else the network alone was scored on another device
        sums.append((found.model_nats / size, ("stages", "documents", "val_bpb")))
    for here, names in sums:
        there = case.claim(*names)
        number = isinstance(there, int | float) and abs(here - there) <= SAME_SUM
        reason = f"{' '.join(names)} is {there} in submission.json, {here:.9g} by the decode"
        require(number, reason)
    orders = train_gpt.show_orders(train_gpt.weighed_orders(case.cfg.mixer, case.cfg))
    said = dict(mixer=case.cfg.mixer, orders=orders, mass_error=f"{found.mass_error:.1e}")
    for name, here in said.items():
        there = case.claim("stages", "ngram", name)
        there = f"{there:.1e}" if isinstance(there, float) else there
        require(there == here, f"{name} is {there} in submission.json, {here} by the decode")
    coded = len(case.stream[1])
    claimed = case.claim("codec", "claimed_bytes")
    bytes_here = math.ceil(found.nats / math.log(256))
    near = isinstance(claimed, int) and abs(claimed - bytes_here) <= 1
    require(near, f"claimed_bytes is {claimed}, {bytes_here} by the decode")
    slack = train_gpt.coder_slack(found.targets, case.cfg)
    reason = f"{coded:,} bytes are coded, {bytes_here:,} claimed: more than {slack:.0f} apart"
    require(abs(coded - bytes_here) <= slack, reason)
    return (
        f"val_bpb {case.val_bpb:.6f} is what the decoded tokens cost, {coded:,} bytes coded of "
        f"{bytes_here:,}; masses {found.mass_error:.1g} off 1"
    )


# Where the decode could not be made.


def rescored(case: Case) -> str:
    """The artifact again, by this checkout's scorer and mixture on the verifier's text."""
    given = dict(case.run.config)
    given |= dict(DEVICE="auto", CODEC_TOKENS="0", SAVE_SCORES="0", NGRAM_SCHEME="")
    given |= dict(EVAL_ONLY=str(case.folder / "artifact.bin"), RUN_ID="again")
    given |= {name: str(Path(getattr(case.cfg, name.lower())).resolve()) for name in PATHS}
    try:
        case.run_script(case.temporary, **given)
    except Failed as why:
        raise NotChecked(str(why)) from None
    found = run_folder.RunFolder(case.temporary / "runs/again").last("final_ngram_exact")
    case.rescored_bpb = found["val_bpb"]
    device = train_gpt.fingerprint(case.rt, b"", b"")["device"]
    made = "unknown"
    with contextlib.suppress(NotChecked, Failed):
        made = case.stream[0].made["device"]
    limit = SAME_DEVICE if made == device else OTHER_DEVICE
    there = case.claim("val_loss")
    number = isinstance(there, int | float)
    gap = abs(found["val_loss"] - there) if number else math.inf
    reason = f"val_bpb is {found['val_bpb']:.6f} by this checkout on {device}"
    require(gap <= limit, f"{reason}, submission.json says {case.claim('val_bpb')}")
    return f"{reason}, {gap:.1g} nats a token off the claim, limit {limit:g}"


def notes(case: Case) -> Iterator[str]:
    """What a reader of the verdict should know, and no check can tell."""
    yield f"nobody can prove, so these are claims: {UNPROVABLE}"
    overlap = case.run.last("overlap").get("documents")
    if overlap:
        yield f"by its log, training and validation share documents: {overlap}"
    weights = len(case.file("artifact.bin"))
    if case.text.text_bytes < 20 * weights:  # nothing packs a text much better
        packed = len(lzma.compress(case.text.decoder.spell(case.text.stream[1:])))
        if packed <= weights:
            yield (
                f"the artifact ({weights:,} bytes) is larger than xz makes of the text "
                f"({packed:,}): a model that was trained on it could hold it"
            )


# -----------------------------------------------------------------------------
# Command line


def outcome(function: Callable[[Case], str], case: Case) -> tuple[str, str]:
    """-> status, reason of one check"""
    try:
        return "ok", function(case)
    except (NotChecked, OSError, MemoryError, train_gpt.LackOfMemory) as why:
        return "not checked", str(why) or type(why).__name__  # this machine's fault
    except Exception as error:  # files of others: whatever goes wrong is theirs
        kind = "" if isinstance(error, Failed | ValueError) else f"{type(error).__name__}: "
        return "FAILED", kind + str(error)


def examine(case: Case) -> Iterator[Row]:
    """Every check in order; one whose needs did not hold is not made. What cannot be proved, and
    did not fail, is scored again."""
    held = set()
    failed = False
    with case.exit:
        for name, (function, needs) in CHECKS.items():
            if missing := [need for need in needs if need not in held]:
                status = "not checked"
                reason = f"needs {' and '.join(missing)}, above"
            else:
                status, reason = outcome(function, case)
            held |= {name} if status == "ok" else set()
            failed |= status == "FAILED"
            if reason:
                yield Row(name, status, shortened(reason))
        if not failed and "score" not in held and {"code", "artifact", "text"} <= held:
            status, reason = outcome(rescored, case)
            yield Row("rescored", status, shortened(reason))
        if "text" in held:
            case.notes = [shortened(note) for note in notes(case)]


def shortened(text: str) -> str:
    """In one line of characters that move no cursor."""
    line = printable(" ".join(text.split()))
    return line if len(line) <= 400 else f"{line[:400]}..."


def verdict(rows: list[Row]) -> tuple[int, str, str]:
    """-> exit status, its word, which checks failed or could not be made"""
    by = {status: [row.check for row in rows if row.status == status] for status in STATUSES}
    why = f"not checked: {', '.join(by['not checked']) or 'nothing'}"
    if by["FAILED"]:
        return 1, "FAILED", f"failed: {', '.join(by['FAILED'])}; {why}"
    return (3, "CONSISTENT, NOT PROVED", why) if by["not checked"] else (0, "PROVED", why)


def last_line(case: Case, status: int) -> str:
    """What the verdict is about: the proved number and its text, else the claim and our own."""
    if not status:
        return f"val_bpb {case.val_bpb!r} on {case.text_name}"
    again = f", {case.rescored_bpb!r} scored again here" if case.rescored_bpb else ""
    claim = case.run.last("final_ngram_exact").get("val_bpb")
    return f"val_bpb {shortened(str(claim))} claimed{again}"


def natural(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 0 on")
    return int(text)


def minutes(text: str) -> float:
    number = float(text)
    if not 0 < number <= 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of minutes")
    return number


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=(__doc__ or "\n").splitlines()[0])
    made.add_argument("folder", type=Path, metavar="RUN_DIR")
    limit = "for the decode, and again for scoring; default 60"
    made.add_argument("--minutes", type=minutes, default=60, help=limit)
    made.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    # Positions were drawn while a decode proved less; old command lines go on to work.
    made.add_argument("--positions-seed", type=natural, help=argparse.SUPPRESS)
    return made


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    began = time.perf_counter()
    try:
        case = Case(options.folder, options.minutes)
    except (RunError, OSError) as error:
        fix = "give the folder of a run" if isinstance(error, RunError) else "make room in TMPDIR"
        endings.say(f"error: {shortened(str(error))}; fix: {fix}", sys.stderr)
        return 2
    rows = []
    with contextlib.closing(examine(case)) as examined:
        for row in examined:
            rows.append(row)
            if not options.json:
                endings.say(f"{row.check:<9} {row.status:<12} {row.reason}")
    status, word, why = verdict(rows)
    seconds = time.perf_counter() - began
    if options.json:
        proved = case.val_bpb if not status else None
        claimed = case.run.last("final_ngram_exact").get("val_bpb")
        result = dict(run=str(options.folder), status=status, verdict=word, why=why)
        result |= dict(val_bpb=proved, claimed_val_bpb=claimed, rescored_val_bpb=case.rescored_bpb)
        result |= dict(text=case.text_name if not status else None, notes=case.notes)
        result |= dict(seconds=seconds, checks=[row._asdict() for row in rows])
        endings.say(json.dumps(result, indent=2))
    else:
        for note in case.notes:
            endings.say(f"note: {note}")
        endings.say(f"{word} {last_line(case, status)}; {why} ({seconds:.0f} s)")
    return status


if __name__ == "__main__":
    sys.exit(endings.run(main))
