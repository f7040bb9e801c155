"""Turn any UTF-8 text into what train_gpt.py reads: a tokenizer and token shards.

    python data/prepare_text.py --input notes/ --out data/datasets/notes
    python data/prepare_text.py --input crawl.jsonl.xz --out data/datasets/crawl --vocab-size 4096

A document is a file, a part of a file between two separators, or the "text" of a JSON line. The
output folder gets <name>_train_000000.bin, <name>_val_000000.bin, <name>_val.jsonl (the validation
text as it was, for whoever checks a score) and tokenizer.model, which is moved in last.

The tokenizer is lossless: decode(encode(text)) == text is checked for every document, and the
UTF-8 bytes of the tokens add up to the bytes of the text. One character needs help: SentencePiece
writes a space as U+2581 and so would decode a literal U+2581 to a space. It is written as its
three byte tokens instead, which decode to itself and count three bytes.

The same input and seed give the same bytes on every machine. The text is held in memory.
"""

import argparse
import contextlib
import gzip
import hashlib
import io
import json
import lzma
import os
import random
import re
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

try:
    from tqdm import tqdm
except ImportError:  # its bar is all that is missing then
    tqdm = None

SHARD_MAGIC, SHARD_VERSION, SHARD_TOKENS = 20240520, 1, 100_000_000
BOS = 1
SPECIAL_PIECES, BYTE_PIECES = 4, 256
MIN_VOCAB, MAX_VOCAB = SPECIAL_PIECES + BYTE_PIECES + 1, 65_536  # tokens are uint16
DEFAULT_VOCAB = 1024
FEW_DOCUMENTS = 20  # below this, validation is the tail of the text
CHARACTER_COVERAGE = 0.999  # rarer characters are spelt in bytes; the published tokenizer's value
CHARACTER_SHARE = 0.75  # of the free pieces at most, so that merges find room in any script
SPACE_MARK = "\u2581"
UNTRAINABLE = SPACE_MARK + "\u2585\0"  # the trainer takes these for space, unknown and padding
TRAINER_TEXT_BYTES = 100_000_000
TRAINER_LINE_CHARS = 1_000  # at most 4,000 bytes; the trainer drops lines over 4,192
ENCODER_CHARS = 1_000_000


class DataError(ValueError):
    """Input that cannot be used; the message names it, its value and the fix."""


# -----------------------------------------------------------------------------
# Reading: files -> documents


def input_files(inputs: Iterable[str | Path], out: Path) -> Iterator[Path]:
    """The files of `inputs`, folders searched in sorted order; hidden ones and `out` left out."""
    for path in map(Path, inputs):
        if not path.exists():
            raise DataError(f"--input {path}: no such file or folder; check the path")
        found = sorted(path.rglob("*"), key=Path.as_posix) if path.is_dir() else [path]
        for file in found:
            hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
            if file.is_file() and not hidden and out.resolve() not in file.resolve().parents:
                yield file


def read_utf8(path: Path) -> str:
    """The text of a file, its line ends and byte order mark as they are; .gz and .xz unpacked."""
    unpack = {".gz": gzip.decompress, ".xz": lzma.decompress}.get(path.suffix, bytes)
    try:
        return unpack(path.read_bytes()).decode("utf-8")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise DataError(
            f"{path}: not UTF-8: byte 0x{byte:02x} at offset {error.start:,}; convert the file"
            " (iconv -t UTF-8) or leave it out"
        ) from None
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error}); is it whole and readable?") from None


def read_jsonl(path: Path) -> list[str]:
    """The "text" of every line; lines end at \\n only, as U+2028 and the like are text."""
    documents = []
    for number, line in enumerate(read_utf8(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
            text.encode()  # a lone surrogate escape is valid JSON but no text
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DataError(
                f'{path}: line {number:,} is no JSON object with a string "text"'
                f" ({type(error).__name__}: {error}); correct or remove the line"
            ) from None
        documents.append(text)
    return documents


class NoBar(contextlib.nullcontext):
    """What stands in for tqdm."""

    def __enter__(self) -> "NoBar":
        return self

    def update(self, count: int) -> None:
        pass


def progress_bar(total: int, what: str, unit: str) -> Any:
    """On a terminal, where tqdm is installed"""
    return tqdm(total=total, desc=what, unit=unit, disable=None) if tqdm else NoBar()


def read_documents(files: Iterable[Path], separator: str) -> list[str]:
    """All documents of `files` that are not empty, in order; `separator` may be empty."""
    documents, files = [], list(files)
    with progress_bar(len(files), "reading", "file") as progress:
        for path in files:
            if ".jsonl" in path.suffixes[-2:]:
                documents += read_jsonl(path)
            else:
                text = read_utf8(path)
                documents += text.split(separator) if separator else [text]
            progress.update(1)
    return [document for document in documents if document]


# -----------------------------------------------------------------------------
# Splitting: documents -> train, validation


def split_documents(
    documents: Sequence[str], val_fraction: float, seed: int
) -> tuple[list[str], list[str]]:
    """Shuffled documents as (train, validation); of a few documents the tail is validation."""
    if len(documents) < FEW_DOCUMENTS:
        return split_tail(documents, val_fraction)
    shuffled = random.Random(seed).sample(documents, len(documents))
    count = min(max(1, round(len(documents) * val_fraction)), len(documents) - 1)
    return shuffled[count:], shuffled[:count]


def split_tail(documents: Sequence[str], val_fraction: float) -> tuple[list[str], list[str]]:
    """Cut the concatenation at a character: the last `val_fraction` of its bytes is validation."""
    text = "".join(documents)
    if len(text) < 2:
        raise DataError(
            f"--input: {len(text)} character of text; training and validation need one each"
        )
    encoded = text.encode()
    head = encoded[: round(len(encoded) * (1 - val_fraction))]
    cut = min(max(len(head.decode(errors="ignore")), 1), len(text) - 1)
    train, val = [], []
    for document in documents:
        train.append(document[:cut])
        val.append(document[cut:])
        cut = max(cut - len(document), 0)
    return [part for part in train if part], [part for part in val if part]


# -----------------------------------------------------------------------------
# Tokenizer: documents -> SentencePiece model -> token ids


def spans(text: str, limit: int) -> list[str]:
    """Cut text into spans of at most `limit` characters, before a space where there is one."""
    return re.findall(rf"(?s).{{1,{limit}}}(?= |\Z)|.{{1,{limit}}}", text)


def frequent_characters(documents: Iterable[str], vocab_size: int) -> str:
    """The characters that get a piece of their own; the trainer's own coverage stops at 0.98.

    The space is always one: spelt in bytes it would be those of U+2581 and decode to that.
    """
    counts = Counter()
    for document in documents:
        counts.update(document)
    for character in UNTRAINABLE:
        counts.pop(character, None)
    needed, kept = CHARACTER_COVERAGE * counts.total() - counts.pop(" ", 0), " "
    room = int((vocab_size - SPECIAL_PIECES - BYTE_PIECES) * CHARACTER_SHARE)
    for character, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        if needed <= 0 or len(kept) >= room:
            break
        kept += character
        needed -= count
    return kept


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> bytes:
    """A lossless SentencePiece BPE model (its file's bytes) of at most `vocab_size` pieces."""
    sample, room = [], TRAINER_TEXT_BYTES
    for document in documents:
        if room <= 0:
            break
        sample.append(document[:room])
        room -= len(document.encode())
    kept = frequent_characters(sample, vocab_size)
    rare = re.compile(f"[^{re.escape(kept)}]+")
    runs = (run for document in sample for run in rare.split(document))
    lines = [line for run in runs for line in spans(run, TRAINER_LINE_CHARS)]
    lines.append(" ")  # so that a text without spaces has a piece for them too
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        vocab_size=vocab_size,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        add_dummy_prefix=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        character_coverage=1.0,
        hard_vocab_limit=False,
        pad_id=0,
        bos_id=BOS,
        eos_id=2,
        unk_id=3,
        minloglevel=2,
    )
    return model.getvalue()


def load_tokenizer(path: str | Path, vocab_size: int | None = None) -> Any:
    """The SentencePiece model in a file, if train_gpt.py can use it."""
    try:
        model = Path(path).read_bytes() or b"empty"  # an empty model would load
        tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model)
        pieces, bos = tokenizer.vocab_size(), tokenizer.bos_id()
        tokenizer.id_to_piece([*range(pieces)])  # of some damaged models these are no text
    except (OSError, RuntimeError, UnicodeDecodeError) as error:
        raise DataError(
            f"--tokenizer {path}: not a SentencePiece model ({error}); give a .model file"
        ) from None
    if bos != BOS or pieces > MAX_VOCAB:
        raise DataError(
            f"--tokenizer {path}: BOS id {bos}, {pieces} pieces; train_gpt.py needs BOS id {BOS}"
            f" and at most {MAX_VOCAB} pieces"
        )
    if vocab_size not in (None, pieces):
        raise DataError(
            f"--vocab-size {vocab_size}: --tokenizer {path} has {pieces} pieces; leave the size out"
        )
    return tokenizer


def encode_documents(tokenizer: Any, documents: Sequence[str]) -> list[list[int]]:
    """Token ids (list of int, no BOS) of each document; a literal U+2581 becomes byte tokens."""
    escaped = [tokenizer.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]
    byte_fallback = all(map(tokenizer.is_byte, escaped))
    split_at = re.compile(f"({SPACE_MARK})" if byte_fallback else r"(?!)")
    parts, owners = [], []
    for owner, document in enumerate(documents):
        for run in split_at.split(document):
            cut = spans(run, ENCODER_CHARS)  # no piece reaches over a space, so no token changes
            parts += cut
            owners += [owner] * len(cut)
    tokens = [[] for _ in documents]
    for owner, part, ids in zip(owners, parts, tokenizer.encode(parts), strict=True):
        tokens[owner] += escaped if byte_fallback and part == SPACE_MARK else ids
    return tokens


# -----------------------------------------------------------------------------
# Writing: documents -> a folder that is whole or has no tokenizer.model


@dataclass
class Split:
    """What one side of the split came to; `changed` documents decode to another text."""

    documents: int
    bytes: int = 0
    tokens: int = 0
    changed: int = 0
    escaped: int = 0  # documents with a literal U+2581


def batches(documents: Iterable[str], limit: int = 4_000_000) -> Iterator[list[str]]:
    """Runs of documents of about `limit` characters, as lists of token ids are large."""
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document)
        if size >= limit:
            yield batch
            batch, size = [], 0
    yield batch


def write_split(tokenizer: Any, documents: Sequence[str], stem: Path) -> Split:
    """Write one side's shards and return its Split; every document is decoded again."""
    split, stream = Split(len(documents)), [np.empty(0, np.uint16)]
    with progress_bar(len(documents), stem.name, "doc") as progress:
        for batch in batches(documents):
            tokens = encode_documents(tokenizer, batch)
            for document, decoded in zip(batch, tokenizer.decode(tokens), strict=True):
                split.bytes += len(document.encode())
                split.changed += decoded != document
                split.escaped += SPACE_MARK in document
            stream += [np.array([BOS, *ids], np.uint16) for ids in tokens]
            progress.update(len(batch))
    split.tokens = write_shards(np.concatenate(stream), stem)
    return split


def write_shards(tokens: np.ndarray, stem: Path) -> int:
    """<stem>_000000.bin and so on: 256 int32 (magic, version, count, 0 ...), then uint16."""
    for number, start in enumerate(range(0, len(tokens), SHARD_TOKENS)):
        shard = tokens[start : start + SHARD_TOKENS]
        header = np.zeros(256, "<i4")
        header[:3] = SHARD_MAGIC, SHARD_VERSION, len(shard)
        with open(f"{stem}_{number:06d}.bin", "wb") as file:
            file.write(header.tobytes())
            file.write(shard.astype("<u2").tobytes())
    return len(tokens)


def write_dataset(
    train_docs: Sequence[str],
    val_docs: Sequence[str],
    out: str | Path,
    name: str,
    vocab_size: int | None = None,
    *,
    tokenizer: str | Path | None = None,
) -> tuple[Split, Split]:
    """Write shards, validation text and tokenizer.model to the folder `out`; print the figures.

    tokenizer: the path of a model to reuse; else one of at most `vocab_size` pieces (default 1,024)
    is trained on train_docs. Raises DataError; `out` is then as it was, or new and empty.
    """
    started, out = time.perf_counter(), Path(out)
    check_target(out, name)
    if tokenizer is not None:
        load_tokenizer(tokenizer, vocab_size)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=out) as work:
        model = Path(work, "tokenizer.model")
        if tokenizer is None:
            model.write_bytes(train_tokenizer(train_docs, vocab_size or DEFAULT_VOCAB))
        else:
            model.write_bytes(Path(tokenizer).read_bytes())
        processor = load_tokenizer(model)
        train = write_split(processor, train_docs, Path(work, f"{name}_train"))
        val = write_split(processor, val_docs, Path(work, f"{name}_val"))
        with open(Path(work, f"{name}_val.jsonl"), "w", encoding="utf-8", newline="\n") as file:
            for document in val_docs:
                file.write(json.dumps({"text": document}, ensure_ascii=False) + "\n")
        changed = train.changed + val.changed
        if tokenizer is None and changed:
            raise DataError(f"{changed} documents do not decode to themselves; please report this")
        move_into_place(Path(work), out, name)
    print_figures(train, val, processor)
    print(f"wrote {out} in {time.perf_counter() - started:.1f} s")
    return train, val


def check_target(out: Path, name: str) -> None:
    """Refuse a confusing name and a folder that cannot be written or holds other data."""
    if not name or "/" in name or "_train_" in f"{name}_" or "_val_" in f"{name}_":
        raise DataError(f"--name {name!r}: give a word without / and without _train or _val")
    for path in sorted([*out.glob("*_train_*.bin"), *out.glob("*_val_*.bin")]):
        if not path.name.startswith((f"{name}_train_", f"{name}_val_")):
            raise DataError(f"--out {out}: holds another dataset ({path.name}); choose another")
    nearest = next(path for path in [out, *out.absolute().parents] if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise DataError(f"--out {out}: {nearest} is no writable folder; choose another")


def move_into_place(work: Path, out: Path, name: str) -> None:
    """Move a finished dataset from `work` to `out`, replacing an earlier one; tokenizer last."""
    model, old_model = work / "tokenizer.model", out / "tokenizer.model"
    if old_model.exists() and old_model.read_bytes() != model.read_bytes():
        old_model.unlink()  # shards must never stand beside another dataset's tokenizer
    fresh = {path.name for path in work.iterdir()}
    for old in [*out.glob(f"{name}_train_*.bin"), *out.glob(f"{name}_val_*.bin")]:
        if old.name not in fresh:
            old.unlink()
    for file_name in [*sorted(fresh - {model.name}), model.name]:
        os.replace(work / file_name, out / file_name)


def print_figures(train: Split, val: Split, tokenizer: Any) -> None:
    """The lines a run ends with: sizes, tokenizer, and whether the text survives the way back."""
    for side, split in (("train", train), ("val", val)):
        print(
            f"{side} documents:{split.documents} bytes:{split.bytes} tokens:{split.tokens}"
            f" bytes_per_token:{split.bytes / split.tokens:.4f}"
        )
    digest = hashlib.sha256(tokenizer.serialized_model_proto()).hexdigest()
    print(f"tokenizer pieces:{tokenizer.vocab_size()} sha256:{digest}")
    documents, changed = train.documents + val.documents, train.changed + val.changed
    if train.escaped + val.escaped:
        print(
            f"note: {train.escaped + val.escaped} of {documents} documents hold a literal U+2581,"
            " which SentencePiece decodes to a space; written as byte tokens where there are any"
        )
    if changed:
        print(
            f"round_trip LOSSY: {changed} of {documents} documents change; this tokenizer alters"
            " text or lacks characters, so a score will be one of the altered text"
        )
    else:
        print(f"round_trip ok: decode(encode(text)) == text for {documents} documents")


# -----------------------------------------------------------------------------
# Command line


class OneLineParser(argparse.ArgumentParser):
    """Reports a bad argument the way every other bad input is reported."""

    def error(self, message: str) -> None:
        raise DataError(message)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The checked command line."""
    summary, _, details = __doc__.partition("\n")
    layout = argparse.RawDescriptionHelpFormatter
    parser = OneLineParser(description=summary, epilog=details, formatter_class=layout)
    add = parser.add_argument
    add("--input", nargs="+", required=True, help="files or folders; also .jsonl, .gz, .xz")
    add("--out", required=True, type=Path, help="folder of the dataset")
    add("--name", help="how the shards' names begin; default: as the folder's")
    add("--vocab-size", type=int, help=f"{MIN_VOCAB} to {MAX_VOCAB}; default {DEFAULT_VOCAB}")
    add("--tokenizer", help="a SentencePiece model to use instead of training one")
    add("--separator", help=r"cuts files other than .jsonl; \n and \t are understood")
    add("--val-fraction", type=float, default=0.05, help="between 0 and 1; default 0.05")
    add("--seed", type=int, default=1337, help="of the shuffle; default 1337")
    options = parser.parse_args(arguments)
    if options.vocab_size is not None and not MIN_VOCAB <= options.vocab_size <= MAX_VOCAB:
        raise DataError(
            f"--vocab-size {options.vocab_size}: give {MIN_VOCAB} (4 specials, 256 bytes, a"
            f" space) to {MAX_VOCAB} (tokens are 16 bits)"
        )
    if not 0 < options.val_fraction < 1:
        raise DataError(f"--val-fraction {options.val_fraction}: give a number between 0 and 1")
    if options.separator == "":
        raise DataError("--separator '': give at least one character, or leave it out")
    return options


def prepare(options: argparse.Namespace) -> None:
    """The whole way from files to a dataset."""
    name = options.out.resolve().name if options.name is None else options.name
    check_target(options.out, name)
    separator = (options.separator or "").replace(r"\n", "\n").replace(r"\t", "\t")
    documents = read_documents(input_files(options.input, options.out), separator)
    if not documents:
        raise DataError(f"--input {' '.join(options.input)}: empty; give files with text in them")
    train, val = split_documents(documents, options.val_fraction, options.seed)
    write_dataset(train, val, options.out, name, options.vocab_size, tokenizer=options.tokenizer)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 2 after one line on what is wrong with the input."""
    try:
        prepare(parse_arguments(arguments))
    except (DataError, OSError) as error:
        fix = "; see that --out can be written and has room" * isinstance(error, OSError)
        print(f"prepare_text.py: {' '.join(str(error).split())}{fix}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
