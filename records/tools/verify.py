"""Check the score of a run folder, without trusting anything in it.

    python records/tools/verify.py runs/tiny_seed1337 [--positions-seed 7] [--json]

The proof is the decode: code, artifact, tokenizer and stream.bin alone go into an empty folder,
and a fresh process without DATA_PATH turns them back into the validation text. The stream's size
is then the score. Everything else in the folder is compared with that text, with the artifact
and with each other. The folder's own train_gpt.py runs only if it is byte for byte the one of this
checkout; all other checks are computed by this checkout. Blocks and positions that are computed
again are drawn by the seed, which the folder's author cannot know; without one a fresh seed.

The text is that of DATA_PATH and TOKENIZER_PATH, else of the DATA_PATH that the run was given if
that folder is here, else the embedded text or FineWeb, as RECORD says. The table names it.

Exit status: 0 PROVED: no check failed, and every check marked * held, the decode of the whole text
among them; 1 FAILED: a check failed; 3 CONSISTENT, NOT PROVED: none failed, but one marked * could
not be made (no stream, only a stretch of the text in it, another machine's stream, no text here);
2 RUN_DIR is no folder. What could not be checked is named, marked or not.
"""

import argparse
import contextlib
import json
import math
import secrets
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import evidence
import numpy as np
import run_folder
import torch
from evidence import (
    BLOCK,
    BOS,
    OUR_CODE,
    Case,
    Failed,
    NotChecked,
    require,
    train_gpt,
)

STRETCH = 2048  # targets whose distributions are added up from the start
CHANGED = 8192  # targets coded first, whose later half is changed
MASS_LIMIT = 1e-9  # float64 sums over the vocabulary stay below 1e-12
MIXTURE_LIMIT = 1e-6  # nats at a target; 0 on one machine
SLACK_BYTES = 16  # of the coder's last words
UNSIGNED = {"author", "github_id", "name", "date", "sha256"}  # of submission.json: not in the log
STATUSES = ("ok", "FAILED", "not checked")
LOSSY_PROBE = " a  \ufb01\tb\r\n\n \uff21"  # what a normalising tokenizer changes
CHECKS: dict[str, tuple[Callable, tuple[str, ...], bool]] = {}  # function, needs, essential


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


# -----------------------------------------------------------------------------
# The checks, in their order; the decode begins with `stream` and is waited for at the end


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
    found, where = case.text, case.cfg.data_path.removeprefix(f"{evidence.ROOT}/")
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
    for place, p in evidence.distributions(case):
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
    changed = evidence.score_blocks(case, stream)
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
    mixed, _ = evidence.mix_again(case, order, scores)
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
