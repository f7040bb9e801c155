"""Write submission.json into finished run folders, from what lies in each folder alone.

    python records/tools/run_folder.py runs/tiny_seed1337 [...]

train_gpt.py makes the file at the end of a run; this does it again, and refuses more. The file
marks a run as finished, so a folder without its final lines or files, or one that contradicts
itself, is refused: one line on stderr, exit status 2. Written whole or not at all; writing it again
gives the same bytes.
"""

import argparse
import contextlib
import io
import json
import math
import sys
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from checkout import ROOT

import endings
import train_gpt

RECORDS = ROOT / "records"
MOST_BLOCKS_BYTES = 2**26  # 64 bytes for 1,024 targets each
MOST_MEMBERS = 64
DIRECTORY_ENTRY = b"PK\x01\x02"  # begins each of a zip's list of members
FILES = {"code": "train_gpt.py", "artifact": "artifact.bin", "tokenizer": "tokenizer.model"}
# The lines that a finished run has, and their numbers that a submission rests on.
FINAL_LINES = {
    "final_ngram_exact": ("val_loss", "val_bpb"),
    "final_artifact_bytes": ("code", "packed", "weights", "total"),
    "final_budget": ("train_seconds", "eval_seconds"),
}


class RunError(train_gpt.UserError):
    """A file or folder that is damaged, unfinished, incomplete or contradicts itself."""


@contextlib.contextmanager
def blame(path: str | Path) -> Iterator[None]:
    """RunError, in one line, for whatever goes wrong with a file or folder: it may be anybody's,
    and no list of exceptions holds all that a wrong one can cause."""
    try:
        yield
    except (train_gpt.UserError, OSError):
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise RunError(f"{path}: damaged ({reason}); fix: get it again") from error


def parse_object(content: bytes, source: str) -> dict[str, Any]:
    """A JSON object of somebody else's; RunError for what is none, or names a key twice."""
    try:
        found = json.loads(content, object_pairs_hook=train_gpt.unique_keys)
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise RunError(f"{source}: damaged ({reason}); fix: get it again") from None
    if not isinstance(found, dict):
        raise RunError(f"{source}: damaged (no JSON object); fix: get it again")
    return found


def read_columns(data: bytes) -> dict[str, np.ndarray]:
    """The arrays of an .npz, not to be written to. Unlike by np.load, each has the bytes that are
    there: a header that lies about its shape allocates nothing. ValueError and others"""
    columns = {}
    if data.count(DIRECTORY_ENTRY) > MOST_MEMBERS:  # which zipfile would make objects of first
        raise ValueError(f"more than {MOST_MEMBERS} members")
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = archive.infolist()
        claimed = sum(member.file_size for member in members)
        packed = any(member.compress_type != zipfile.ZIP_STORED for member in members)
        if packed or claimed > len(data):  # np.savez does not compress
            raise ValueError(f"its members are compressed or claim {claimed} bytes of {len(data)}")
        if len({member.filename for member in members}) < len(members):
            raise ValueError("a member stands twice")
        for member in members:
            stored = archive.read(member)
            stream = io.BytesIO(stored)
            np.lib.format.read_magic(stream)
            shape, _, kind = np.lib.format.read_array_header_1_0(stream)
            column = np.frombuffer(stored, kind, offset=stream.tell()).reshape(shape)
            columns[member.filename.removesuffix(".npy")] = column
    return columns


def locate(folder: Path, name: str) -> Path:
    """Where a file of a run lies: the seeds of a record share the train_gpt.py above them, which
    may be there in its packed form alone."""
    if name == FILES["code"]:
        for place in (folder, folder.resolve().parent):
            for path in (place / name, place / train_gpt.PACKED_NAME):
                if path.exists():
                    return path
    return folder / name


class RunFolder(train_gpt.RunLog):
    """A run's log lines and settings, the latter once they are asked for: while a run starts, its
    folder has none. A line cut off by a kill is passed over."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        text = self.read("metrics.jsonl")
        if (count := text.count("\n")) > train_gpt.MOST_LOG_LINES:
            most = f"at most {train_gpt.MOST_LOG_LINES:,} are read"
            raise RunError(f"{self.path}: metrics.jsonl has {count:,} lines, {most}")
        lines = map(train_gpt.parse_line, text.splitlines())
        self.lines = [line for line in lines if line]

    def read(self, name: str, most: int = train_gpt.MOST_BYTES) -> str:
        try:
            return train_gpt.read_regular(self.path / name, most).decode()
        except OSError as error:
            raise RunError(f"{self.path}: no {name} ({error.strerror})") from None
        except UnicodeDecodeError as error:
            raise RunError(f"{self.path}: {name} is damaged ({error})") from None

    @cached_property
    def config(self) -> dict[str, str]:
        """config.env."""
        source = str(self.path / "config.env")
        try:
            text = self.read("config.env", train_gpt.MOST_TEXT_BYTES)
            return train_gpt.parse_pairs(text.splitlines(), source)
        except train_gpt.ConfigError as error:
            raise RunError(str(error)) from None

    @cached_property
    def settings(self) -> dict[str, str]:
        """config.env's values, and those that only the log has, without their origin."""
        settings = {}
        for line in self.all("config"):
            for name, value in train_gpt.line_fields(line).items():
                settings[name] = value.rpartition("(")[0]
        return settings | self.config

    def name(self) -> str:
        return self.path.resolve().name

    def file(self, name: str) -> Path:
        return locate(self.path, name)

    def blocks(self) -> dict[str, np.ndarray]:
        """blocks.npz: sums of logp_model, logp_final (nats) and bytes per 1,024 targets."""
        try:
            data = train_gpt.read_regular(self.path / "blocks.npz", MOST_BLOCKS_BYTES)
            arrays = read_columns(data)
            blocks = {name: arrays[name] for name in ("logp_model", "logp_final", "bytes")}
            kinds = {(column.dtype.kind, column.ndim) for column in blocks.values()}
            if kinds - {("f", 1), ("i", 1)}:
                raise ValueError("its columns are no numbers")
            if len({len(column) for column in blocks.values()}) > 1:
                raise ValueError("its columns are not equally long")
            return blocks
        except Exception as error:  # zipfile, zlib and numpy have their own
            reason = " ".join(str(error).split())
            raise RunError(f"{self.path}: no usable blocks.npz ({reason})") from None


def file_bytes(run: RunFolder, name: str) -> bytes:
    try:
        return train_gpt.read_regular(run.file(name), train_gpt.MOST_ARTIFACT_BYTES)
    except OSError as error:
        raise RunError(f"{run.path}: no {name} ({error.strerror})") from None


def read_split(folder: str | Path, split: str) -> np.ndarray:
    """All tokens of a dataset's split, uint16 (N,); UserError without shards, or for a bad one."""
    shards = train_gpt.find_shards(folder, split)
    return np.concatenate([train_gpt.map_shard(path) for path in shards])


def tokens_sha256(tokens: np.ndarray) -> str:
    """Of tokens as shards hold them, without headers."""
    return train_gpt.sha256(tokens.astype("<u2").tobytes())


def scored_text(run: RunFolder) -> dict[str, str]:
    """What tells one validation text from another, as far as a run got: "length" is in the log
    once training begins; "blocks", a digest of their bytes, once the text is scored."""
    found = {}
    if line := run.last("val_text"):
        found["length"] = f"{line.get('tokens')} tokens of {line.get('bytes')} bytes"
    if (run.path / "blocks.npz").exists():
        found["blocks"] = train_gpt.sha256(run.blocks()["bytes"].astype("<i8").tobytes())[:12]
    return found


def name_text(text: dict[str, str]) -> str:
    """A validation text in words: 78791 tokens of 203285 bytes (0123456789ab)"""
    return " ".join([text.get("length", "unknown length"), f"({text.get('blocks', 'not scored')})"])


def who_has_what(having: dict[str, list[str]]) -> str:
    """Of value -> names of the runs that have it: 1 in runs/a and runs/b, 2 in runs/c"""
    return ", ".join(f"{value} in {' and '.join(names)}" for value, names in having.items())


def over_budget(run: RunFolder) -> list[str]:
    """What is over a cap of the 10-minute track, by the script's rule, in words; of an unfinished
    run, as far as its log tells."""
    spent = {}
    if size := run.last("final_artifact_bytes"):
        spent["bytes"] = size["packed"] + size["weights"]
    if budget := run.last("final_budget"):
        spent |= {name: budget[name] for name in ("train_seconds", "eval_seconds")}
    return [*train_gpt.over_caps(**spent).values()]


def require_finished(run: RunFolder) -> None:
    """Refuse a run without its final lines, with numbers that are none, or with other files."""
    for key, names in FINAL_LINES.items():
        line = run.last(key)
        if not line:
            raise RunError(f"{run.path}: unfinished, no {key} line in metrics.jsonl")
        for name in names:
            value = line.get(name)
            if not isinstance(value, int | float) or not math.isfinite(value):
                raise RunError(f"{run.path}: {key} has {name}:{value}, not a finite number")
    line = run.last("final_artifact_bytes")
    logged = {"train_gpt.py": line["code"], "artifact.bin": line["weights"]}
    for name in FILES.values():
        size = len(file_bytes(run, name))
        if size != logged.get(name, size):
            raise RunError(f"{run.path}: {name} has {size} bytes, its log says {logged[name]}")


def submission(run: RunFolder) -> dict[str, Any]:
    """The contents of submission.json; RunError for a run that cannot be one."""
    require_finished(run)
    if not run.config.get("SEED", "").lstrip("-").isdigit():
        raise RunError(f"{run.path}: config.env has no SEED")
    scored = int(run.blocks()["bytes"].sum())
    text = run.last("val_text")
    logged = text.get("spelt_bytes", text.get("bytes"))  # the text's, where a tokenizer altered it
    if scored != logged:
        raise RunError(f"{run.path}: blocks.npz is of {scored} bytes, its log says {logged}")
    return train_gpt.submission(run, run.path, run.file(FILES["code"]))


def write(run: RunFolder) -> Path:
    """submission.json, whole or not at all -> its path; UserError"""
    with blame(run.path):
        submission(run)
        return train_gpt.write_submission(run.path, run.file(FILES["code"]))


def cell_text(text: str) -> str:
    return train_gpt.printable(text).replace("|", "\\|")


def markdown(headings: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """A table in columns as wide as their widest cell; all but the first `left` to the right."""
    table = [[cell_text(cell) for cell in row] for row in (headings, *rows)]
    widths = [max(3, *map(len, column)) for column in zip(*table, strict=True)]
    rule = ["-" * w if i < left else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    lines = []
    for row in (headings, rule, *table[1:]):
        cells = [
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "\n").splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR")
    status = 0
    for folder in parser.parse_args(arguments).runs:
        try:
            endings.say(f"wrote {train_gpt.printable(str(write(RunFolder(folder))))}")
        except (train_gpt.UserError, OSError) as error:
            endings.say(f"error: {train_gpt.printable(str(error))}", sys.stderr)
            status = 2
    return status


if __name__ == "__main__":
    sys.exit(endings.run(main))
