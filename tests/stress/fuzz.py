"""Mutations of every file the programs read: each is refused by name, or read correctly.

    python tests/stress/fuzz.py                                  # 10,000 on two processes, minutes
    python tests/stress/fuzz.py --mutations 500 --kinds artifact,stream --seed 7
    python tests/stress/fuzz.py --again stream:123 --seed 7      # one of them, with its traceback

Two in three are changed bytes (mutate.py); the others are what only an enemy makes (hostile.py):
links, pipes, folders, sparse files, bombs, lies about size, escapes. Commands are run in this
process, with 1 GB of memory said to be free; verify.py's decode is made without a process of its
own, and that of the honest stream once.

A mutation is explained if the file is refused in one line that names it, or if what is read equals
the original's meaning, or is what the changed file says by another way of reading it. Not explained
are: any other exception, a line that names nothing, a death of the process, more than LIMIT_S
seconds, more than 4 times the memory that the original takes + 64 MB, of hostile files 300 MB (an
allocation beyond 2 GiB fails, and counts), a program started or a connection opened, output that
moves a cursor, anything written beside a command's own outputs, and a wrong reading. PROVED with
another number or text than the honest folder's is never explained. Each case is drawn from (seed,
kind, number) alone; those not explained are kept in --failures.
"""

import argparse
import contextlib
import gzip
import hashlib
import io
import json
import lzma
import math
import multiprocessing
import multiprocessing.connection
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
import zstandard

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from helpers import (  # noqa: E402  (it puts the others' folders on the path)
    SHRUNK,
    clean_environment,
    new_trainer,
    pack_artifact,
    random_stream,
    run_here,
    tiny,
    train_gpt,
)

# isort: split
import as_written  # noqa: E402
import compress  # noqa: E402
import hostile  # noqa: E402
import mutate  # noqa: E402
import plot  # noqa: E402
import run_folder  # noqa: E402
import stats  # noqa: E402
import submit  # noqa: E402
import verify  # noqa: E402

import prepare  # noqa: E402
import prepare_text  # noqa: E402

LIMIT_S, GRACE_S = 60, 20  # of a case; of a worker that does not even hear the alarm
FREE_MB, TIMES, CEILING = 64, 4, 2**31
HOSTILE_MB = 300  # of a file that may have 16 MB, in lines or as JSON; of a text to prepare
VOCAB = 512
LANES = dict(model_dim=16, num_heads=2, num_kv_heads=1, eval_lanes=4, ngram_max_order=4)
MEMORY = 10**9  # bytes that are free, as readers are told
HOSTILE_SHARE = 1 / 3
FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen")
FORBIDDEN += ("pickle.find_class", "socket.connect", "ctypes.dlopen")
OUTCOMES = ("refused", "equal", "legal")


class Refused(Exception):
    """What a command answered with status 2: its line."""


class Hang(BaseException):
    """LIMIT_S seconds are over; no handler of Exception takes it for its own."""


REFUSALS = (
    train_gpt.UserError,
    prepare_text.DataError,
    run_folder.RunError,
    verify.Failed,
    verify.NotChecked,
    Refused,
    OSError,  # main prints it in a line; it must name its file as all do
)


class Kind(NamedTuple):
    """A file, how it is broken and read."""

    file: str  # below the folder that `build` makes
    share: int  # of all mutations, in parts of their sum
    change: Callable[[np.random.Generator, bytes], bytes]
    read: Callable[[Path], Any]  # -> its meaning, comparable; or one of REFUSALS
    honest: Callable[[Path, Any], bool]  # whether another meaning is what the file says
    content: str | None = ""  # of hostile.CONTENT; None: not even another thing in its place


def digest(*parts: Any) -> str:
    """Of arrays and of whatever has a faithful repr."""
    found = hashlib.sha256()
    for part in parts:
        array = isinstance(part, np.ndarray)
        found.update(f"{part.dtype}{part.shape}".encode() if array else repr(part).encode())
        found.update(np.ascontiguousarray(part).tobytes() if array else b"")
    return found.hexdigest()


def any_meaning(path: Path, meaning: Any) -> bool:
    """Where every value that can be read is legal."""
    return True


def no_meaning(path: Path, meaning: Any) -> bool:
    """Where nothing but the original's may be read."""
    return False


# -----------------------------------------------------------------------------
# Readers, and other ways of reading the same


def read_shard(path: Path) -> str:
    text = train_gpt.ValidationText(
        SimpleNamespace(
            data_path=path.parent, tokenizer_path="set/tokenizer.model", vocab_size=VOCAB
        )
    )
    return digest(text.stream[text.stream[0] == 1 and int(text.positions[0]) == 0 :])


def shard_is(path: Path, meaning: str) -> bool:
    data = path.read_bytes()
    tokens = np.frombuffer(data[1024:], "<u2")
    fits = np.frombuffer(data[:12], "<i4").tolist() == [20240520, 1, len(tokens)]
    return fits and tokens.max() < VOCAB and meaning == digest(tokens.astype(np.uint16))


def read_artifact(path: Path) -> str:
    state = train_gpt.load_artifact(path).state_dict()
    return digest(*[part for name in sorted(state) for part in (name, state[name].numpy())])


def artifact_is(path: Path, meaning: str) -> bool:
    """Seal, names, places and values of all tensors, by hand."""
    data, found = path.read_bytes(), {}
    size = int.from_bytes(data[12:16], "little")
    header, packed = json.loads(data[16 : 16 + size]), data[16 + size : -32]
    raw = zstandard.ZstdDecompressor().decompress(packed, allow_extra_data=False)
    for entry in header["tensors"]:
        shape, at, count = entry["shape"], entry["offset"], int(np.prod(entry["shape"]))
        if entry["coding"] in ("fp16", "fp32"):
            kind = "<f2" if entry["coding"] == "fp16" else "<f4"
            found[entry["name"]] = np.frombuffer(raw, kind, count, at).reshape(shape)
        else:
            rows = count // shape[-1]
            scale = np.frombuffer(raw, "<f2", rows, at).reshape(*shape[:-1], 1).astype(np.float32)
            whole = np.frombuffer(raw, "i1", count, at + 2 * rows).reshape(shape)
            found[entry["name"]] = whole * scale
    parts = [p for name in sorted(found) for p in (name, found[name].astype(np.float32))]
    return hashlib.sha256(data[:-32]).digest() == data[-32:] and meaning == digest(*parts)


def read_stream(path: Path) -> str:
    decoded = path.with_name("decoded.npy")
    decoded.unlink(missing_ok=True)
    train_gpt.decode_folder(train_gpt.Config(decode=str(path.parent), device="cpu"))
    return train_gpt.sha256(np.load(decoded, allow_pickle=False))


def stream_is(path: Path, meaning: str) -> bool:
    header, _ = train_gpt.unseal(train_gpt.STREAM_PREFIX, path.read_bytes())
    return meaning == header["text"]


def read_pgz(path: Path) -> str:
    """As the command restores it."""
    artifact = path.with_name("artifact.bin")
    packed = path.with_name("notes.pgz")
    command(compress.main, "--restore", packed, "--artifact", artifact, "--output", "restored")
    restored = Path("restored").read_bytes()
    Path("restored").unlink()
    return train_gpt.sha256(restored)


def pgz_is(path: Path, meaning: str) -> bool:
    header, _ = compress.open_container(path.read_bytes(), path.name)
    return meaning.startswith(header.digest.hex())


def mutated_pgz(rng: mutate.Rng, data: bytes) -> bytes:
    """Damaged as it is, or behind its check, which fits then."""
    start = len(compress.PREFIX) + compress.CHECK_BYTES
    if rng.random() < 0.2:
        return mutate.any_bytes(rng, data)
    body = mutate.any_bytes(rng, data[start:])
    return compress.PREFIX + compress.digest_of(body, compress.CHECK_BYTES) + body


def columns(path: Path) -> str:
    with np.load(path, allow_pickle=False) as file:
        return digest(*[part for name in sorted(file) for part in (name, file[name])])


def signed_claims(folder: Path) -> dict[str, Any]:
    claims = json.loads((folder / "submission.json").read_text(encoding="utf-8"))
    return {name: value for name, value in claims.items() if name not in verify.UNSIGNED}


def decode_here(case: verify.Case, folder: Path, **given: str) -> str:
    """verify.Case.run_script without a process; the first stream, the honest one, once for all."""
    if "DECODE" not in given:
        raise verify.NotChecked("not scored again while files are fuzzed")
    files = folder / "artifact.bin", folder / "stream.bin"
    key = digest(*(train_gpt.sha256(path.read_bytes()) for path in files))
    if key in DECODED:
        line, tokens = DECODED[key]
        (folder / "decoded.npy").write_bytes(tokens)
        return line
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        try:
            train_gpt.decode_folder(train_gpt.Config(decode=str(folder), device="cpu"))
        except train_gpt.UserError as error:
            raise verify.Failed(str(error)) from None
    if not DECODED:
        DECODED[key] = printed.getvalue(), (folder / "decoded.npy").read_bytes()
    return printed.getvalue()


DECODED: dict[str, tuple[str, bytes]] = {}  # what the honest stream gives
PROVED: list[str] = []  # what verify.py says of the honest folder


def read_run(path: Path) -> tuple:
    """What a folder that verify.py calls PROVED stands for; refused for any other verdict."""
    case = verify.Case(path.parent, 0)
    rows = [*verify.examine(case)]
    reasons = [row.reason for row in rows if row.status != "ok"]
    require_printable("\n".join([*(row.reason for row in rows), *case.notes]))
    status, word, why = verify.verdict(rows)
    if status:
        kind = MemoryError if any(map(out_of_memory, map(Exception, reasons))) else verify.Failed
        raise kind(f"{path} {word} {why} {reasons}")
    line = verify.last_line(case, status)
    PROVED.append(line)
    if line != PROVED[0]:
        raise AssertionError(f"PROVED {PROVED.pop()}, which is not {PROVED[0]}")
    lines = case.run.lines  # as text: 1 and "1" are one
    text = [train_gpt.log_line(x["key"], x["value"], train_gpt.line_fields(x)) for x in lines]
    return text, signed_claims(path.parent), path.name in UNPROVED and path.read_bytes()


UNPROVED = ("config.env", "stream.bin")  # their rest may say anything, once the decode is right


def rest_is_unproved(path: Path, meaning: tuple) -> bool:
    """The same number by other settings of training, or a header with other words."""
    return path.name in UNPROVED


def require_printable(text: str) -> None:
    """What goes to a terminal holds nothing that it would obey."""
    if train_gpt.printable(text) != text.replace("\n", "\\n"):
        raise AssertionError(f"output moves the cursor: {ascii(text)[:500]}")


PROGRESS = "verifying ", "restoring: "  # begin lines that are no errors


def command(main: Callable[[list[str]], int], *arguments: Any) -> str:
    """What it prints; refused with its one line, if its status is 2."""
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()) as printed:
        status = main([str(argument) for argument in arguments])
    lines = errors.getvalue().splitlines()
    line = "\n".join(line for line in lines if not line.startswith(PROGRESS))
    require_printable(printed.getvalue() + errors.getvalue())
    if status:
        raise Refused(line if status == 2 else f"\nstatus {status}")
    return printed.getvalue()


def read_submission(path: Path) -> str:
    command(run_folder.main, path.parent)
    return digest(signed_claims(path.parent))


def claims_are_finite(path: Path, meaning: str) -> bool:
    """Whatever the log says may be submitted, if json can say it."""
    return True


def read_statistics(path: Path) -> str:
    """With a verify.json that somebody left there, or none."""
    return digest(command(stats.main, path.parent), command(stats.main, path.parent, "--json"))


def verified(command: list, **_: Any) -> SimpleNamespace:
    """stats.py's process of verify.py, which is fuzzed by itself."""
    said = json.dumps(dict(verdict="PROVED", text="a text"))
    return SimpleNamespace(stdout=said, stderr="", returncode=0)


def write_verdict(path: Path) -> str:
    return digest(command(stats.main, path.parent, "--verify"))


def read_seeds(path: Path) -> str:
    """A submission made of the run; nothing but regular files is in it."""
    about = ["--name", "fuzzed", "--author", "a", "--github-id", "a", "--date", "2026-01-01"]
    command(submit.main, path.parent, *about, "--out", "made", "--force")
    try:
        files = [found for found in sorted(Path("made").rglob("*")) if not found.is_dir()]
        if not all(found.is_file() and not found.is_symlink() for found in files):
            raise AssertionError("a submission with links")
        return digest(*[part for found in files for part in (str(found), found.read_bytes())])
    finally:
        shutil.rmtree("made")


def read_pseudo(path: Path) -> str:
    """A published scorer on the columns of the run."""
    given, sys.argv = sys.argv, ["as_written.py", str(path.parent)]
    try:
        return command(lambda _: as_written.main())
    finally:
        sys.argv = given


def score_again(path: Path, artifact: Path, given: dict[str, str]) -> str:
    """EVAL_ONLY, as verify.py asks for it -> the score"""
    given = given | dict(DEVICE="cpu", CODEC_TOKENS="0", SAVE_SCORES="0", NGRAM_SCHEME="")
    given |= dict(EVAL_ONLY=str(artifact), RUN_ID="again", DATA_PATH="set")
    with contextlib.redirect_stdout(io.StringIO()):
        train_gpt.run(train_gpt.Config.from_env(given | dict(TOKENIZER_PATH="set/tokenizer.model")))
    score = run_folder.RunFolder("runs/again").last("final_ngram_exact")["val_bpb"]
    shutil.rmtree("runs")
    return repr(score)


def score_artifact(path: Path) -> str:
    return score_again(path, path, train_gpt.read_pairs(Path("run/config.env")))


def score_by_config(path: Path) -> str:
    pairs = train_gpt.read_pairs(path)
    return score_again(path, path.with_name("artifact.bin"), pairs)


def read_picture(path: Path) -> str:
    command(plot.main, path.parent)
    return digest((path.parent / "report.png").read_bytes())


def read_config(environ: dict[str, str]) -> str:
    """The configuration, printed as a dry run does, to a strict stream."""
    cfg = train_gpt.Config.from_env(environ)
    if Path("runs", cfg.run_id).resolve().parent != Path("runs").resolve():
        raise AssertionError(f"RUN_ID={cfg.run_id} leaves runs/")
    with contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO(), "utf-8")):
        train_gpt.run(train_gpt.replace(cfg, dry_run=True, decode=""))
    return digest(cfg)


def read_record(path: Path) -> str:
    """A RECORD in a checkout that holds it."""
    checkout, train_gpt.ROOT = train_gpt.ROOT, Path("checkout").resolve()
    try:
        return read_config(dict(RECORD="fuzzed", DEVICE="cpu"))
    finally:
        train_gpt.ROOT = checkout


def read_environment(path: Path) -> str:
    lines = path.read_bytes().replace(b"\0", b"").splitlines()
    pairs = (line.decode("utf-8", "surrogateescape").partition("=") for line in lines)
    return read_config({name: text for name, _, text in pairs if name} | dict(DEVICE="cpu"))


def read_tokenizer(path: Path) -> str:
    return digest(*train_gpt.token_bytes(str(path), 0))


def tables_are_sound(path: Path, meaning: str) -> bool:
    tables = train_gpt.token_bytes(str(path), 0)
    return len({*map(len, tables)}) == 1 and (tables.base_bytes >= 0).all()


def load_tokenizer(path: Path) -> str:
    tokenizer = prepare_text.load_tokenizer(path)
    return digest([tokenizer.id_to_piece(i) for i in range(tokenizer.vocab_size())])


def read_text(path: Path) -> str:
    return digest(prepare_text.read_documents([path], "\n\n"))


def text_is(path: Path, meaning: str) -> bool:
    """By the standard library's own readers."""
    if not path.stat().st_size:
        return meaning == digest([])
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    with opener(path, "rt", encoding="utf-8", newline="") as file:
        text = file.read()
    if ".jsonl" in path.suffixes:
        found = [json.loads(line)["text"] for line in text.split("\n") if line.strip()]
    else:
        found = text.split("\n\n")
    return meaning == digest([document for document in found if document])


def checkpoint(path: Path, change: Callable[[Any], Any] = lambda trainer: None) -> Any:
    """A trainer whose checkpoints lie beside `path`."""
    cfg = tiny(vocab_size=VOCAB, num_layers=2, xsa_last_n=1, model_dim=16)
    rt = train_gpt.Runtime(cfg)
    rt.folder = path.parent.parent
    trainer = new_trainer(cfg, rt, Path("set/x_train_000000.bin").absolute())
    change(trainer)
    return trainer


def read_checkpoint(path: Path) -> str:
    """The newest that is whole; a training goes on from it for a step."""
    trainer = checkpoint(path, train_gpt.resume_training)
    if not 0 <= trainer.step <= trainer.cfg.iterations:
        raise AssertionError(f"step {trainer.step}")
    weights = [weight.detach().numpy().copy() for weight in trainer.model.parameters()]
    trainer.update(1.0)
    return digest(trainer.step - 1, *weights)


def checkpoint_is(path: Path, meaning: str) -> bool:
    """The one before; or other numbers, if they were signed."""
    moved, entry = path.with_suffix(".away"), {}
    with contextlib.suppress(ValueError, RecursionError, OSError):
        kept = train_gpt.read_regular(path)
        entry = json.loads(kept) if path.suffix == ".json" else {}
    if not os.path.lexists(path):
        return meaning == read_checkpoint(path)
    if entry and entry.get("sha256") == mutate.checkpoint_seal(entry.get("state")):
        return True
    path.rename(moved)
    try:
        return meaning == read_checkpoint(path)
    finally:
        moved.rename(path)


# Pipes are waited for where they are an honest way to give a text.
ENDLESS = {("pipe", read_text), ("pipe", load_tokenizer)}
# What commands write beside the file of a case.
OUTPUTS = {Path("run/submission.json"), Path("run/report.png"), Path("run/verify.json")}
OUTPUTS |= {Path("coded/decoded.npy"), Path(mutate.CHECKPOINT + ".json")}
XZ = mutate.packed_text(lzma.compress, lzma.decompress, mutate.json_lines)
GZ = mutate.packed_text(gzip.compress, gzip.decompress)
ARTIFACT = mutate.container(train_gpt.ARTIFACT_PREFIX, mutate.weights)
STREAM = mutate.container(train_gpt.STREAM_PREFIX)
KINDS = {
    "shard": Kind("set/x_val_000000.bin", 14, mutate.shard, read_shard, shard_is, "shard"),
    "artifact": Kind("coded/artifact.bin", 16, ARTIFACT, read_artifact, artifact_is, "artifact"),
    "stream": Kind("coded/stream.bin", 12, STREAM, read_stream, stream_is, "stream"),
    "stream_artifact": Kind("coded/artifact.bin", 2, ARTIFACT, read_stream, no_meaning, "artifact"),
    "pgz": Kind("pgz/notes.pgz", 8, mutated_pgz, read_pgz, pgz_is, "pgz"),
    "pgz_artifact": Kind("pgz/artifact.bin", 2, ARTIFACT, read_pgz, no_meaning, "artifact"),
    "pgz_tokenizer": Kind("pgz/tokenizer.model", 2, mutate.tokenizer, read_pgz, no_meaning),
    "claims": Kind("run/submission.json", 6, mutate.json_file, read_run, no_meaning, "json"),
    "metrics": Kind("run/metrics.jsonl", 6, mutate.json_lines, read_run, no_meaning, "lines"),
    "log": Kind("run/log.txt", 2, mutate.any_bytes, read_run, no_meaning, "log"),
    "config": Kind("run/config.env", 5, mutate.settings, read_run, rest_is_unproved, "settings"),
    "weights": Kind("run/artifact.bin", 6, ARTIFACT, read_run, no_meaning, "artifact"),
    "proof": Kind("run/stream.bin", 6, STREAM, read_run, rest_is_unproved, "stream"),
    "script": Kind("run/train_gpt.py", 1, mutate.any_bytes, read_run, no_meaning),
    "own_tokenizer": Kind("run/tokenizer.model", 1, mutate.tokenizer, read_run, no_meaning),
    "submit_metrics": Kind(
        "run/metrics.jsonl", 6, mutate.json_lines, read_submission, claims_are_finite, "lines"
    ),
    "submit_blocks": Kind("run/blocks.npz", 4, mutate.archive, read_submission, any_meaning, "npz"),
    "submit_config": Kind(
        "run/config.env", 2, mutate.settings, read_submission, any_meaning, "settings"
    ),
    "submit_claims": Kind("run/submission.json", 1, mutate.json_file, read_submission, no_meaning),
    "stats_metrics": Kind(
        "run/metrics.jsonl", 5, mutate.json_lines, read_statistics, any_meaning, "lines"
    ),
    "stats_blocks": Kind("run/blocks.npz", 5, mutate.archive, read_statistics, any_meaning, "npz"),
    "stats_config": Kind(
        "run/config.env", 2, mutate.settings, read_statistics, any_meaning, "settings"
    ),
    "stats_kept": Kind(
        "run/verify.json", 4, mutate.json_file, read_statistics, any_meaning, "json"
    ),
    "stats_verify": Kind("run/verify.json", 1, mutate.json_file, write_verdict, no_meaning, "json"),
    "seeds_metrics": Kind(
        "run/metrics.jsonl", 4, mutate.json_lines, read_seeds, any_meaning, "lines"
    ),
    "seeds_claims": Kind(
        "run/submission.json", 3, mutate.json_file, read_seeds, any_meaning, "json"
    ),
    "seeds_config": Kind("run/config.env", 3, mutate.settings, read_seeds, any_meaning, "settings"),
    "seeds_log": Kind("run/log.txt", 1, mutate.any_bytes, read_seeds, any_meaning, "log"),
    "seeds_stream": Kind("run/stream.bin", 1, STREAM, read_seeds, any_meaning, "stream"),
    "plot_metrics": Kind(
        "run/metrics.jsonl", 2, mutate.json_lines, read_picture, any_meaning, "lines"
    ),
    "plot_blocks": Kind("run/blocks.npz", 1, mutate.archive, read_picture, any_meaning, "npz"),
    "plot_output": Kind("run/report.png", 1, mutate.any_bytes, read_picture, no_meaning),
    "pseudo_scores": Kind("run/scores.npz", 5, mutate.archive, read_pseudo, any_meaning, "npz"),
    "pseudo_config": Kind(
        "run/config.env", 2, mutate.settings, read_pseudo, any_meaning, "settings"
    ),
    "score_artifact": Kind(
        "coded/artifact.bin", 1, ARTIFACT, score_artifact, any_meaning, "artifact"
    ),
    "score_config": Kind(
        "run/config.env", 1, mutate.settings, score_by_config, any_meaning, "settings"
    ),
    "dataset": Kind("set/dataset.json", 4, mutate.json_file, read_shard, no_meaning, "json"),
    "val_text": Kind("set/x_val.jsonl", 3, mutate.json_lines, read_shard, no_meaning, "lines"),
    "record": Kind(
        "checkout/records/fuzzed/config.env",
        6,
        mutate.settings,
        read_record,
        any_meaning,
        "settings",
    ),
    "environment": Kind("environment", 8, mutate.settings, read_environment, any_meaning, None),
    "tokenizer": Kind(
        "coded/tokenizer.model", 7, mutate.tokenizer, read_tokenizer, tables_are_sound
    ),
    "load_tokenizer": Kind(
        "coded/tokenizer.model", 3, mutate.tokenizer, load_tokenizer, any_meaning
    ),
    "checkpoint": Kind(
        mutate.CHECKPOINT + ".json", 7, mutate.checkpoint, read_checkpoint, checkpoint_is, "state"
    ),
    "checkpoint_tensors": Kind(
        mutate.CHECKPOINT + ".safetensors",
        5,
        mutate.any_bytes,
        read_checkpoint,
        checkpoint_is,
        "tensors",
    ),
    "text": Kind("text/a.txt", 3, mutate.any_bytes, read_text, text_is),
    "text_gz": Kind("text/a.txt.gz", 3, GZ, read_text, text_is, "gz"),
    "jsonl": Kind("text/a.jsonl", 5, mutate.json_lines, read_text, text_is, "text lines"),
    "jsonl_xz": Kind("text/a.jsonl.xz", 4, XZ, read_text, text_is, "xz"),
}


# -----------------------------------------------------------------------------
# Originals


def build(folder: Path) -> None:
    """Small whole files of every kind."""
    train, val = prepare.sample_documents()
    val = [text[:300] for text in val[:8]]
    with contextlib.redirect_stdout(io.StringIO()):
        prepare_text.write_dataset(train[:40], val, folder / "set", "x", VOCAB)
        env = SHRUNK | dict(DATA_PATH=str(folder / "set"), ITERATIONS="2")
        env |= dict(SCORER="documents", CODEC_TOKENS="-1", SAVE_SCORES="1", OMP_NUM_THREADS="1")
        train_gpt.close_run = lambda rt: None
        run_here(folder, "run", **env)
        (folder / "runs/run").rename(folder / "run")
        (folder / "runs").rmdir()
        run_folder.main([str(folder / "run")])
    said = dict(verdict="PROVED", text="a text", sha256=stats.marks(folder / "run"))
    (folder / "run/verify.json").write_text(json.dumps(said), encoding="utf-8")
    (folder / "run/report.png").write_bytes(b"an old picture")
    (folder / "outside").mkdir()
    (folder / "outside/canary").write_bytes(b"a canary")
    build_text(folder / "text", val)
    build_coded(folder)
    with contextlib.chdir(folder):
        trainer = checkpoint(Path(mutate.CHECKPOINT))
        for _ in range(2):
            trainer.update(1.0)
            train_gpt.save_checkpoint(trainer)
    checkout = folder / "checkout/records"
    (checkout / "fuzzed").mkdir(parents=True)
    shutil.copy(folder / "run/config.env", checkout / "fuzzed")
    settings = (folder / "run/config.env").read_text(encoding="utf-8").splitlines(keepends=True)
    extra = ["RECORD=tiny\n", "RUN_ID=x\n", "NGRAM_EVAL_ORDER=9\n", "USE_EMA=1\n", "HOME=/root\n"]
    known = [line for line in settings if not line.startswith(("NGRAM_MAX_ORDER", "EMA_ENABLED"))]
    (folder / "environment").write_text("".join(extra + known), encoding="utf-8")


def build_text(folder: Path, documents: list[str]) -> None:
    folder.mkdir()
    lines = "".join(
        json.dumps(dict(text=text, id=i)) + "\n" for i, text in enumerate(documents[:4])
    )
    text = "\n\n".join(documents[:4])
    (folder / "a.txt").write_text(text, encoding="utf-8")
    (folder / "a.txt.gz").write_bytes(gzip.compress(text.encode()))
    (folder / "a.jsonl").write_text(lines, encoding="utf-8")
    (folder / "a.jsonl.xz").write_bytes(lzma.compress(lines.encode()))


def build_coded(folder: Path) -> None:
    """An artifact of two layers, a stream of 150 targets and a .pgz, coded on one thread."""
    torch.set_num_threads(1)
    (folder / "coded").mkdir()
    shutil.copy(folder / "set/tokenizer.model", folder / "coded")
    cfg = tiny(**LANES, vocab_size=VOCAB, num_layers=2, xsa_last_n=1, codec_tokens=-1)
    torch.manual_seed(1)
    weights = dict(train_gpt.GPT(cfg).initialise().named_parameters())
    artifact = folder / "coded/artifact.bin"
    artifact.write_bytes(pack_artifact(weights, cfg))
    stream, rt = random_stream(150, VOCAB), train_gpt.Runtime(cfg)
    stream[[30, 60, 100, 120]] = train_gpt.BOS
    plan = train_gpt.CodingPlan.of(stream, cfg, 1)
    words, coded = train_gpt.encode(train_gpt.load_artifact(artifact), rt, cfg, stream, plan)
    scoring = {name: getattr(cfg, name) for name in train_gpt.SCORING}
    made = train_gpt.fingerprint(rt, train_gpt.SCRIPT, artifact.read_bytes())
    header = train_gpt.StreamHeader(plan, made, train_gpt.sha256(coded.text), scoring)
    sealed = train_gpt.seal(train_gpt.STREAM_PREFIX, header.pack(), words)
    (folder / "coded/stream.bin").write_bytes(sealed)
    shutil.copytree(folder / "coded", folder / "pgz")
    packed = compress.Compressor(folder / "pgz/artifact.bin")
    torch.set_num_threads(1)
    data = b"A note of a few words, \xff\x00 and bytes.\n" * 3
    (folder / "pgz/notes.pgz").write_bytes(packed.compress(data).data)


# -----------------------------------------------------------------------------
# A case, in a worker


class Result(NamedTuple):
    """What became of a case; outcome: one of OUTCOMES, or what is not explained."""

    kind: str
    number: int
    outcome: str
    message: str = ""
    seconds: float = 0.0
    memory_mb: float = 0.0
    how: str = "bytes"  # or a name of hostile.PLACES or hostile.CONTENT


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error, and those that it was raised from or during."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or "can't allocate memory" in str(error)


def status_mb(name: str) -> float:
    """A line of /proc/self/status in MB."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1000 for line in file if line.startswith(name))


def remove(path: Path) -> None:
    """Whatever it is."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


class Worker:
    """A folder of its own with the originals, and what they mean."""

    def __init__(self, base: Path, folder: Path, seed: int):
        shutil.copytree(base, folder, symlinks=True)
        os.chdir(folder)
        self.base, self.before = base, self.looks()
        mine = sorted(os.sched_getaffinity(0))  # threads of a process that forked wait for ever
        os.sched_setaffinity(0, {mine[os.getpid() % len(mine)]})
        self.seed, self.known, self.watching, self.seen = seed, {}, False, ""
        self.original = {name: Path(kind.file).read_bytes() for name, kind in KINDS.items()}
        os.environ["DATA_PATH"] = str(folder / "set")
        train_gpt.available_memory = lambda: MEMORY
        prepare_text.free_memory = lambda: MEMORY // 5  # which it may fill with text
        train_gpt.close_run = lambda rt: None  # draws a picture, in a process
        os.fsync = lambda file: None  # no power is cut here
        verify.Case.run_script, stats.subprocess = decode_here, SimpleNamespace(run=verified)
        sys.addaudithook(self.audit)
        signal.signal(signal.SIGALRM, self.alarm)

    def audit(self, event: str, arguments: tuple) -> None:
        if self.watching and event in FORBIDDEN:
            self.seen = f"{event} {arguments!r}"[:200]

    def alarm(self, *_: Any) -> None:
        raise Hang

    def mutated(self, name: str, number: int) -> tuple[str, bytes | None]:
        """-> how, what is written (None: something of hostile.PLACES); drawn from seed, kind and
        number alone, never the original."""
        rng = np.random.default_rng([self.seed, zlib.crc32(name.encode()), number])
        kind, original = KINDS[name], self.original[name]
        if kind.content is not None and rng.random() < HOSTILE_SHARE:
            content = hostile.CONTENT[kind.content]
            places = [place for place in hostile.PLACES if (place, kind.read) not in ENDLESS]
            how = mutate.choose(rng, [*places, *[*content] * 4])
            return how, content[how](rng, original) if how in content else None
        data = original
        while data == original:
            data = kind.change(rng, original)
        return "bytes", data

    def put(self, name: str, number: int) -> str:
        """The changed file in the original's place -> how"""
        path = Path(KINDS[name].file)
        how, data = self.mutated(name, number)
        path.unlink()
        if data is None:
            hostile.PLACES[how](path)
        else:
            path.write_bytes(data)
        if how == "tensors that lie":
            hostile.sign_checkpoint(data)
        return how

    def looks(self) -> dict[Path, tuple]:
        """Every file of the worker's folder: kind, size, time; without outputs."""
        found = {}
        for path in Path().rglob("*"):
            status = path.lstat()
            if not path.is_dir() or path.is_symlink():
                found[path] = status.st_mode, status.st_size, status.st_mtime_ns
        return found

    def tidy(self, name: str) -> list[str]:
        """Put back what the case changed. -> what it should not have changed"""
        before, now = self.before, self.looks()
        differ = [path for path in before.keys() | now.keys() if before.get(path) != now.get(path)]
        own = Path(KINDS[name].file)
        differ = [path for path in differ if own not in path.parents]
        remove(own)
        for path in {*differ, own}:
            remove(path)
            if path in before:
                shutil.copyfile(self.base / path, path)
                self.before[path] = (
                    (status := path.lstat()).st_mode,
                    status.st_size,
                    status.st_mtime_ns,
                )
        return [str(path) for path in differ if path != own and path not in OUTPUTS]

    def reference(self, name: str) -> tuple[Any, float]:
        """Meaning of the original, and MB that reading it takes once everything is imported."""
        if name not in self.known:
            for _ in range(2):
                meaning, memory = self.measured(KINDS[name].read, Path(KINDS[name].file))
                self.tidy(name)
            self.known[name] = meaning, memory
        return self.known[name]

    def measured(
        self, read: Callable[[Path], Any], path: Path, limit: int = 0
    ) -> tuple[Any, float]:
        """-> what read returns or raises, MB that it took at most; limit: seconds"""
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # VmHWM begins anew
        before, limits = status_mb("VmHWM"), resource.getrlimit(resource.RLIMIT_AS)
        most = int(1000 * 1000 * status_mb("VmSize")) + CEILING
        resource.setrlimit(resource.RLIMIT_AS, (most, limits[1]))
        signal.alarm(limit)
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                found = read(path)
        except (Exception, Hang, SystemExit) as error:
            found = error
        finally:
            signal.alarm(0)
            resource.setrlimit(resource.RLIMIT_AS, limits)
        return found, status_mb("VmHWM") - before

    def run(self, name: str, number: int) -> Result:
        kind, (meaning, honest_mb) = KINDS[name], self.reference(name)
        path, how = Path(kind.file), self.put(name, number)
        began = time.perf_counter()
        self.seen, self.watching = "", True
        found, memory_mb = self.measured(kind.read, path, LIMIT_S)
        self.watching, seconds = False, time.perf_counter() - began
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                outcome, message = self.explain(kind, path, found, meaning)
        except Exception as error:  # the other way of reading fails: this file is no such file
            outcome, message = "misread", f"read, but {type(error).__name__}: {error}"
        if wrong := self.tidy(name):
            outcome, message = "litter", f"{' '.join(wrong)} changed; {message}"
        torch.set_num_threads(1)
        if self.seen:
            outcome, message = "code", self.seen
        free = FREE_MB if how == "bytes" else HOSTILE_MB
        if memory_mb > free + TIMES * max(0, honest_mb):
            outcome, message = "memory", f"{memory_mb:.0f} MB, {honest_mb:.0f} as a rule; {message}"
        return Result(name, number, outcome, message, seconds, memory_mb, how)

    def explain(self, kind: Kind, path: Path, found: Any, meaning: Any) -> tuple[str, str]:
        """-> outcome, message"""
        if isinstance(found, Hang):
            return "hang", f"more than {LIMIT_S} s"
        if isinstance(found, BaseException):
            return self.explain_error(kind, path, found)
        if found == meaning:
            return "equal", ""
        return ("legal" if kind.honest(path, found) else "misread"), "reads as something else"

    def explain_error(self, kind: Kind, path: Path, error: BaseException) -> tuple[str, str]:
        """A refusal is one line that names its file; running out of memory is none."""
        message = f"{type(error).__name__}: {error}"
        if any(out_of_memory(cause) for cause in causes(error)):
            return "memory", message
        if not isinstance(error, REFUSALS):
            return "exception", "".join(traceback.format_exception(error))
        words = [path.name, path.parent.name, *train_gpt.VARIABLES]
        words += [*train_gpt.ALIASES, *train_gpt.ANYWAY]
        if len(str(error)) > 20_000 or "\n" in str(error) and isinstance(error, Refused):
            return "many lines", message
        return (
            ("refused", message) if any(w in str(error) for w in words) else ("nameless", message)
        )


def serve(base: Path, seed: int, pipe: Any) -> None:
    """A worker process: (kind, number) in, Result out, until None."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)  # what C++ libraries say on their own
    with tempfile.TemporaryDirectory(prefix="fuzz_") as folder:
        worker = Worker(base, Path(folder, "w"), seed)
        while (case := pipe.recv()) is not None:
            worker.reference(case[0])  # the first imports and compiles, in its own time
            pipe.send(None)
            pipe.send(worker.run(*case))


# -----------------------------------------------------------------------------
# The parent: cases to workers; a dead or silent one is replaced


class Pool:
    """Processes, each with the case it works on."""

    def __init__(self, base: Path, seed: int, jobs: int):
        self.context, self.base, self.seed = multiprocessing.get_context("fork"), base, seed
        self.workers = [self.start() for _ in range(jobs)]

    def start(self) -> SimpleNamespace:
        ours, theirs = self.context.Pipe()
        process = self.context.Process(target=serve, args=(self.base, self.seed, theirs))
        process.start()
        theirs.close()
        return SimpleNamespace(process=process, pipe=ours, case=None, since=0.0)

    def results(self, cases: Iterator[tuple[str, int]]) -> Iterator[Result]:
        """Of all cases, as they come."""
        while True:
            for worker in self.workers:
                if worker.case is None and (case := next(cases, None)) is not None:
                    worker.case, worker.since = case, math.inf
                    worker.pipe.send(case)
            busy = [worker for worker in self.workers if worker.case]
            if not busy:
                return
            ready = multiprocessing.connection.wait([worker.pipe for worker in busy], 1.0)
            for worker in busy:
                if worker.pipe in ready:
                    if result := self.received(worker):
                        yield result
                elif time.perf_counter() - worker.since > LIMIT_S + GRACE_S:
                    yield self.replaced(worker, "hang", "does not even hear the alarm")

    def received(self, worker: SimpleNamespace) -> Result | None:
        """None: the case begins now"""
        try:
            result = worker.pipe.recv()
            if result is None:
                worker.since = time.perf_counter()
            else:
                worker.case = None
            return result
        except (EOFError, ConnectionError):
            worker.process.join()
            return self.replaced(worker, "crash", f"exit status {worker.process.exitcode}")

    def replaced(self, worker: SimpleNamespace, outcome: str, message: str) -> Result:
        case = worker.case
        worker.process.kill()
        worker.process.join()
        vars(worker).update(vars(self.start()))
        return Result(*case, outcome, message)

    def stop(self) -> None:
        for worker in self.workers:
            with contextlib.suppress(OSError):
                worker.pipe.send(None)
            worker.process.join(10)
            worker.process.kill()


def spread(mutations: int, kinds: list[str]) -> list[tuple[str, int]]:
    """Cases by kind according to their shares, at least one each, mixed."""
    whole = sum(KINDS[name].share for name in kinds)
    sizes = {name: max(1, round(mutations * KINDS[name].share / whole)) for name in kinds}
    cases = [(i / size, name, i) for name, size in sizes.items() for i in range(size)]
    return [(name, number) for _, name, number in sorted(cases)]


def table(results: list[Result]) -> str:
    head = f"{'kind':<16}{'mutations':>10}{'refused':>9}{'equal':>8}{'legal':>8}{'unexplained':>13}"
    lines, everything = [head + f"{'slowest':>10}{'most MB':>9}"], Counter()
    for name in [*KINDS, "together"]:
        mine = [r for r in results if name in (r.kind, "together")]
        found = Counter(r.outcome for r in mine)
        known = [found[outcome] for outcome in OUTCOMES]
        if mine:
            slowest, most = max(r.seconds for r in mine), max(r.memory_mb for r in mine)
            line = f"{name:<16}{len(mine):>10,}" + "{:>9,}{:>8,}{:>8,}".format(*known)
            lines.append(f"{line}{len(mine) - sum(known):>13,}{slowest:>9.2f}s{most:>9.0f}")
        everything += found if name != "together" else Counter()
    others = {outcome: n for outcome, n in everything.items() if outcome not in OUTCOMES}
    return "\n".join(lines) + (f"\nnot explained: {others}" if others else "")


def table_of_classes(results: list[Result]) -> str:
    """How often each way of hostile.py was tried, and what was not explained of it."""
    lines = [f"{'class':<28}{'cases':>8}{'unexplained':>13}{'slowest':>10}{'most MB':>9}"]
    for how in sorted({result.how for result in results}):
        mine = [result for result in results if result.how == how]
        wrong = sum(result.outcome not in OUTCOMES for result in mine)
        slowest, most = max(r.seconds for r in mine), max(r.memory_mb for r in mine)
        lines.append(f"{how:<28}{len(mine):>8,}{wrong:>13,}{slowest:>9.2f}s{most:>9.0f}")
    return "\n".join(lines)


def fuzz(options: argparse.Namespace, base: Path) -> list[Result]:
    """All results; those not explained are printed and kept as they come."""
    cases, results = spread(options.mutations, options.kinds), []
    pool = Pool(base, options.seed, options.jobs)
    keeper = None
    try:
        for result in pool.results(iter(cases)):
            results.append(result)
            if result.outcome not in OUTCOMES:
                keeper = keeper or Keeper(base, options)
                keeper.keep(result)
    finally:
        pool.stop()
    return results


class Keeper:
    """Saves the files of cases that are not explained, with what was said about them."""

    def __init__(self, base: Path, options: argparse.Namespace):
        self.base, self.options = base, options
        options.failures.mkdir(parents=True, exist_ok=True)

    def keep(self, result: Result) -> None:
        kind = KINDS[result.kind]
        worker = SimpleNamespace(seed=self.options.seed)
        worker.original = {result.kind: (self.base / kind.file).read_bytes()}
        with contextlib.chdir(self.base):
            how, data = Worker.mutated(worker, result.kind, result.number)
        stem = f"{result.kind}_{result.number}_{self.options.seed}"
        if data is not None:
            (self.options.failures / f"{stem}_{Path(kind.file).name}").write_bytes(data)
        (self.options.failures / f"{stem}.txt").write_text(result.message, errors="replace")
        last = result.message.strip().splitlines()[-1:] or [""]
        name = f"--again {result.kind}:{result.number} --seed {self.options.seed}"
        print(f"{result.outcome}: {name}: {how}: {ascii(last[0])[:160]}", flush=True)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mutations", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--kinds", default=",".join(KINDS), help="separated by commas")
    parser.add_argument("--again", help="KIND:NUMBER, one case with all that is said about it")
    failures = Path(tempfile.gettempdir(), "fuzz_failures")
    parser.add_argument("--failures", type=Path, default=failures)
    options = parser.parse_args(arguments)
    options.kinds = options.kinds.split(",")
    if unknown := {*options.kinds} - {*KINDS}:
        parser.error(f"--kinds {','.join(unknown)}: known are {','.join(KINDS)}")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0, or 1 if a case is not explained."""
    options, began = parse(arguments), time.perf_counter()
    for name in os.environ.keys() - clean_environment().keys():
        del os.environ[name]
    with tempfile.TemporaryDirectory(prefix="fuzz_") as folder:
        base = Path(folder, "base")
        base.mkdir()
        made = multiprocessing.get_context("fork").Process(target=build, args=(base,))
        made.start()  # apart: threads of this process could not be used by those it forks
        made.join()
        if options.again:
            name, _, number = options.again.partition(":")
            result = Worker(base, Path(folder, "w"), options.seed).run(name, int(number))
            os.chdir("/")
            print(*result, sep="\n")
            return int(result.outcome not in OUTCOMES)
        results = fuzz(options, base)
    print(table(results), table_of_classes(results), sep="\n\n")
    print(f"seed {options.seed}, {time.perf_counter() - began:.0f} s")
    return int(any(result.outcome not in OUTCOMES for result in results))


if __name__ == "__main__":
    sys.exit(main())
