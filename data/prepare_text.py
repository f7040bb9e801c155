"""Turn any UTF-8 text into what train_gpt.py reads: a tokenizer and token shards.

    python data/prepare_text.py --input notes/ --out data/datasets/notes
    python data/prepare_text.py --input crawl.jsonl.xz --out data/datasets/crawl --vocab-size 4096
    zcat *.gz | python data/prepare_text.py --input - --out data/datasets/piped --separator '\\n\\n'
    python data/prepare_text.py --input ~/work --out data/datasets/work --glob '*.md' --exclude old

A document is a file, a part of a file between two separators, or the "text" of a JSON object: of
each line of .jsonl and .ndjson; of .json also one object, or an array of objects or strings. gzip,
xz, bzip2 and zstd are unpacked, whatever the file's name; "-" is standard input. A document of the
training side that is in validation too, word for word, is dropped.

Of a folder all text is taken, in the order of the paths. Left out, counted and named: what is
hidden, links to folders, what is no regular file, cannot be read or is empty, archives, other
binaries, and text that is not UTF-8. A file that --input names is taken or refused.
--glob and --exclude hold for names ('*.md', node_modules) or, with a /, for paths, from the folder
on or as --input gives it ('docs/*', where * stands for any / too); a folder that is excluded is
not looked into.

The output folder gets <name>_train_000000.bin, <name>_val_000000.bin, <name>_val.jsonl (the
validation text as it was, for whoever checks a score), dataset.json and tokenizer.model, which is
moved in last. dataset.json: sha256 of tokenizer.model, of the validation tokens (uint16, without
the headers of shards) and of <name>_val.jsonl, whether any document changes on the way back,
counts of documents and, where something was left out, of that by reason.

The tokenizer is lossless: decode(encode(text)) == text is checked for every document, and the
UTF-8 bytes of the tokens add up to the bytes of the text. One character needs help: SentencePiece
writes a space as U+2581 and so would decode a literal U+2581 to a space. It is written as its
three byte tokens instead, which decode to itself and count three bytes.

The same input and seed give the same bytes on every machine. The text is held in memory, and what
would not fit there is refused.
"""

import argparse
import bz2
import contextlib
import glob
import gzip
import hashlib
import io
import json
import lzma
import os
import random
import re
import shlex
import stat
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NoReturn

import endings
from folders import Selection, files_in

if __name__ == "__main__":
    endings.begin()

import numpy as np
import sentencepiece
import zstandard

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
# Protocol buffers merge what is appended: field 3, normalizer_spec, with add_dummy_prefix (3) and
# remove_extra_whitespaces (4) false.
WITHIN_TEXT = b"\x1a\x04\x18\0\x20\0"
DATASET_FILE = "dataset.json"  # train_gpt.py reads it
TEXT_MEMORY = 6  # bytes that a byte of text takes at most: as read, decoded, cut into documents
USUAL_RATIO, ALWAYS_UNPACKED = 200, 1 << 28  # a bomb unpacks to more than both
MODEL_BYTES = 1 << 28  # of a tokenizer at most
ENCODING_BYTES = 1 << 16  # by which an encoding is known
READ_BYTES, ZSTD_BYTES = 1 << 20, 1 << 10  # at a time; a kilobyte of zstd can hold 32 megabytes
STREAM_BYTES = 1 << 16  # of xz and bzip2 at a time
PADDING = re.compile(rb"\0*")
CUT_CHARACTER = re.compile(rb"[\xc0-\xff][\x80-\xbf]{0,2}\Z")  # or a whole one
BAR_SECONDS, LINE_SECONDS = 2, 10  # before a bar, and from line to line where there is none
TINY_STEPS, TINY_STEP_TOKENS, TINY_WINDOW = 800, 2_048, 256  # of records/track_cpu/tiny
USEFUL_LAPS = 4  # read so often a text is worth nearly what as much new text is: arXiv 2305.16264
JSON_LINES = (".jsonl", ".ndjson", ".jsonlines")
PACKED_SUFFIXES = (".gz", ".xz", ".lzma", ".bz2", ".zst", ".zstd")
FORMATS = [  # offset and bytes by which files that are no text are known
    (0, b"%PDF-", "a PDF document"),
    (0, b"{\\rtf", "an RTF document"),
    (0, b"\x89PNG", "a PNG picture"),
    (0, b"\xff\xd8\xff", "a JPEG picture"),
    (0, b"GIF8", "a GIF picture"),
    (0, b"BM", "a BMP picture"),
    (0, b"II*\0", "a TIFF picture"),
    (0, b"MM\0*", "a TIFF picture"),
    (8, b"WEBP", "a WebP picture"),
    (8, b"WAVE", "a WAV recording"),
    (8, b"AVI ", "an AVI film"),
    (4, b"ftyp", "an MP4, MOV or HEIC file"),
    (0, b"ID3", "an MP3 recording"),
    (0, b"OggS", "an Ogg file"),
    (0, b"fLaC", "a FLAC recording"),
    (0, b"\x1aE\xdf\xa3", "a Matroska or WebM film"),
    (0, b"PK\x03\x04", "a zip archive (also .docx, .xlsx, .epub, .npz, .pt)"),
    (257, b"ustar", "a tar archive"),
    (0, b"7z\xbc\xaf", "a 7z archive"),
    (0, b"Rar!", "a RAR archive"),
    (0, b"\x04\x22\x4d\x18", "lz4-compressed"),
    (0, b"\x1f\x9d", "compress-ed (.Z)"),
    (0, b"\x1f\x8b", "gzip within a packed file"),
    (0, b"\xfd7zXZ", "xz within a packed file"),
    (0, b"\x28\xb5\x2f\xfd", "zstd within a packed file"),
    (0, b"PAR1", "a Parquet table"),
    (0, b"ARROW1", "an Arrow table"),
    (0, b"Obj\x01", "an Avro file"),
    (0, b"SQLite format 3", "an SQLite database"),
    (0, b"\x89HDF", "an HDF5 file"),
    (0, b"\x93NUMPY", "a NumPy array"),
    (0, b"GGUF", "a GGUF model"),
    (0, SHARD_MAGIC.to_bytes(4, "little"), "a token shard, which is a dataset's already"),
    (0, b"\xd0\xcf\x11\xe0", "an old Office document"),
    (0, b"\x7fELF", "a program"),
    (0, b"MZ", "a Windows program"),
]
ARCHIVE = re.compile("archive|compress|packed")  # of these names
PLAIN_BINARY = (b"%PDF-", b"{\\rtf")  # that may be UTF-8 by chance


class DataError(ValueError):
    """Input that cannot be used; the message names it, its value and the fix."""


class NotRecords(DataError):
    """JSON whose very first object has no text."""


class NoText(DataError):
    """A file that is no text; reason: in a few words, by which such files are counted."""

    def __init__(self, message: str, reason: str):
        super().__init__(message)
        self.reason = reason


class Progress:
    """Where a stage stands: a bar on a terminal, where tqdm is installed; elsewhere a line now and
    then. Nothing of a stage that is soon done."""

    def __init__(self, what: str, unit: str, total: int | None = None):
        self.what, self.unit, self.total = what, unit, total
        self.done, self.said = 0, time.monotonic()
        self.bar = None
        if tqdm and sys.stderr.isatty():
            look = None if total else "{desc}: {n_fmt}{unit}"
            unit = f" {unit}"
            self.bar = tqdm(total=total, desc=what, unit=unit, delay=BAR_SECONDS, bar_format=look)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def update(self, count: int = 1) -> None:
        self.done += count
        if self.bar is not None:
            self.bar.update(count)
        elif time.monotonic() >= self.said + LINE_SECONDS:
            self.said = time.monotonic()
            of = f" of {self.total:,}" if self.total else ""
            endings.say(f"{self.what}: {self.done:,}{of} {self.unit}", sys.stderr)


# -----------------------------------------------------------------------------
# Reading: files -> documents


def named_path(given: str | Path) -> Path:
    """What --input names: a file, a folder, or standard input."""
    return Path("/dev/stdin" if str(given) == "-" else given)


def input_files(
    inputs: Iterable[str | Path], out: Path, selection: Selection | None = None
) -> Iterator[Path]:
    """The files of `inputs` that are to be taken, folders searched in sorted order: of those no
    more than regular files, none of them hidden or in `out`; what is named itself may be a pipe.
    DataError."""
    selection = selection or Selection()
    for path in map(named_path, inputs):
        if not path.exists():
            raise DataError(f"--input {path}: no such file or folder; check the path")
        if out.resolve() in (path.resolve(), *path.resolve().parents):
            raise DataError(f"--out {out}: --input {path} lies there; choose another folder")
        is_folder = path.is_dir()
        if reason := selection.unwanted(path, path if is_folder else path.parent, is_folder):
            selection.leave_out(reason, f"{path}{'/' * is_folder}")
        elif is_folder:
            with Progress("searching", "folders") as progress:
                found = files_in(path, out, selection, progress.update)
            yield from found
        else:
            yield path


def free_memory() -> int:
    """Bytes that this process may still take: of the machine, and of a container's limit."""
    found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    with contextlib.suppress(OSError, TypeError):
        meminfo = Path("/proc/meminfo").read_text()
        found.append(int(re.search(r"MemAvailable: +(\d+)", meminfo)[1]) * 1024)
    with contextlib.suppress(OSError, TypeError, ValueError):
        limits = Path("/sys/fs/cgroup")
        used = re.search(r"^anon (\d+)", (limits / "memory.stat").read_text(), re.MULTILINE)[1]
        found.append(int((limits / "memory.max").read_text()) - int(used))
    return max(0, min(found))


def zstd_parts(packed: bytes) -> Iterator[bytes]:
    """The content of one zstd frame after the other; EOFError where the last one is cut."""
    start = 0
    while start < len(packed):
        frame = zstandard.ZstdDecompressor().decompressobj()
        while not frame.eof:
            if start >= len(packed):
                raise EOFError("it ends within a frame")
            part = packed[start : start + ZSTD_BYTES]
            yield frame.decompress(part)
            start += len(part)
        start -= len(frame.unused_data)


def stream_parts(begin: Callable[[], Any], packed: bytes) -> Iterator[bytes]:
    """The content of one xz or bzip2 stream after the other, the zeros between them skipped;
    EOFError where one is cut, the decompressor's own error for what is no stream. (lzma.open and
    bz2.open pass over all that follows a zero.)"""
    start = 0
    while start < len(packed):
        stream = begin()
        while not stream.eof:
            part = packed[start : start + STREAM_BYTES] if stream.needs_input else b""
            if stream.needs_input and not part:
                raise EOFError("it ends within a stream")
            yield stream.decompress(part, READ_BYTES)
            start += len(part)
        start = PADDING.match(packed, start - len(stream.unused_data)).end()


def parts_of(stream: Any) -> Iterator[bytes]:
    """What a file object gives, piece by piece."""
    return iter(lambda: stream.read(READ_BYTES), b"")


def unpacker(packed: bytes, path: Path) -> Callable[[bytes], Iterator[bytes]] | None:
    """What unpacks a file that begins so, None for nothing; DataError if its name promises more."""
    suffix = path.suffix.lower()
    if packed.startswith(b"\x1f\x8b"):
        return lambda packed: parts_of(gzip.open(io.BytesIO(packed)))
    if packed.startswith(b"\xfd7zXZ\0") or suffix == ".lzma":
        return partial(stream_parts, lzma.LZMADecompressor)
    if re.match(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)", packed):
        return partial(stream_parts, bz2.BZ2Decompressor)
    if re.match(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18", packed):  # or a skippable frame
        return zstd_parts
    if packed and suffix in PACKED_SUFFIXES:
        raise NoText(
            f"{path}: cannot be read (it does not begin as a {suffix} file does); is it whole? If"
            " it is plain text, rename it",
            f"cannot be read (no {suffix})",
        )
    return None


NO_ROOM = "what the memory free here has room for; give less, or use a machine with more"
NO_TEXT = f"{USUAL_RATIO} times its size, as no text does; if it is one, unpack it yourself"


def gather(parts: Iterable[bytes], most: int, path: Path, why: str = NO_ROOM) -> bytearray:
    """The parts put together; DataError, because of `why`, before they are more than `most`
    bytes."""
    data = bytearray()
    for part in parts:
        if len(data) + len(part) > most:
            message = f"{path}: more than {most:,} bytes, {why}"
            raise NoText(message, "unpacks to too much") if why == NO_TEXT else DataError(message)
        data += part
    return data


def read_file(path: Path, room: int, found: bool = False) -> bytes | bytearray:
    """The bytes of a file, unpacked, at most `room` of them; DataError, before they are read if a
    regular file has more. found: in a folder, where what begins like no text is read no further."""
    try:
        with open(path, "rb") as file:
            if found:
                head = file.read(ENCODING_BYTES)
                file.seek(0)
                if not unpacker(head, path):
                    refuse_binary(head, path)
            status = os.fstat(file.fileno())
            if stat.S_ISREG(status.st_mode) and status.st_size > room:
                raise DataError(f"{path}: {status.st_size:,} bytes, over {room:,}, {NO_ROOM}")
            data = gather(parts_of(file), room, path)
        if unpack := unpacker(data, path):
            usual = max(ALWAYS_UNPACKED, USUAL_RATIO * len(data))
            why = NO_TEXT if usual < room else NO_ROOM
            parts = text_parts(unpack(data), path) if found else unpack(data)
            data = gather(parts, min(room, usual), path, why)
    except (OSError, EOFError, lzma.LZMAError, zlib.error, zstandard.ZstdError) as error:
        why = getattr(error, "strerror", None) or "damaged"
        raise NoText(
            f"{path}: cannot be read ({error}); is it whole and readable?",
            f"cannot be read ({why})",
        ) from None
    return data


def text_parts(parts: Iterator[bytes], path: Path) -> Iterator[bytes]:
    """The same parts; NoText at the first, where it is no text."""
    for first in filter(None, parts):
        refuse_binary(first[:ENCODING_BYTES], path)
        yield first
        break
    yield from parts


def refuse_binary(head: bytes, path: Path) -> None:
    """NoText for a file in a folder that begins so, if with a NUL in it or as no text does."""
    decode_text(CUT_CHARACTER.sub(b"", head), path)
    if b"\0" in head:
        raise NoText(f"{path}: has bytes 0, as text hardly does; leave it out", "binary")


def encoding_of(data: bytes | bytearray) -> str:
    """UTF-16 or UTF-32, as iconv calls it, of a text that is not UTF-8; "" for none known."""
    if data.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")):
        return "UTF-32"
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "UTF-16"
    head = data[:ENCODING_BYTES]
    wide = "UTF-32LE", "UTF-32BE", f"UTF-16{byte_order(head)}"
    if len(head) >= 8 and head.count(0) >= 0.01 * len(head):
        return next((name for name in wide if reads_as(head, name)), "")
    return ""


def byte_order(data: bytes | bytearray) -> str:
    """LE or BE, if it is UTF-16: where the high bytes lie, which are small in most scripts."""
    small = [sum(byte < 32 for byte in data[lane::2]) for lane in (0, 1)]
    return "LE" if small[1] > small[0] else "BE"


def reads_as(data: bytes | bytearray, encoding: str) -> bool:
    """Whether UTF-8 that has NULs is text in an encoding of 2 or 4 bytes: nearly all of it is
    readable then, and nearly all highest bytes are below 32 (up to U+1FFF), which those of two
    bytes of UTF-8 text are not."""
    width = int(encoding[4:6]) // 8
    text = data[: len(data) // width * width].decode(encoding, "replace")
    readable = sum((c.isprintable() or c.isspace()) and c != "\ufffd" for c in text)
    lane = data[width - 1 if encoding.endswith("LE") else 0 :: width]
    return readable >= 0.9 * len(text) and sum(byte < 32 for byte in lane) >= 0.7 * len(lane)


def decode_text(data: bytes | bytearray, path: Path) -> str:
    """The text of UTF-8 bytes, line ends as they are, without a byte order mark; NoText names what
    else they are."""
    binary = b"\0" in data[:512] or data.startswith(PLAIN_BINARY)
    try:
        text, byte = data.decode("utf-8"), None
    except UnicodeDecodeError as error:
        byte = f"byte 0x{data[error.start]:02x} at offset {error.start:,}"
    if (byte or b"\0" in data[:ENCODING_BYTES]) and (encoding := encoding_of(data)):
        fix = f"iconv -f {encoding} -t UTF-8 {shlex.quote(str(path))} > NEW_FILE"
        raise NoText(f"{path}: {encoding}, not UTF-8; convert it: {fix}", encoding[:6])
    if binary or byte:
        for offset, magic, name in FORMATS:
            if data.startswith(magic, offset):
                reason = "archive" if ARCHIVE.search(name) else "binary"
                what = f"{path}: {name}, no text; leave it out or extract its text"
                raise NoText(what, reason)
    if byte:
        raise NoText(
            f"{path}: not UTF-8: {byte}; convert the file (iconv -f LATIN1 -t UTF-8, or from"
            " whatever it is) or leave it out",
            "binary" if b"\0" in data[:ENCODING_BYTES] else "not UTF-8",
        )
    return text.removeprefix("\ufeff")


def text_of(record: Any) -> str:
    """The "text" of a JSON object; ValueError, KeyError or others for what has none."""
    text = record["text"]
    text.encode()  # a lone surrogate escape is valid JSON but no text
    return text


JSON_START = re.compile(r"[^\s,\[\]]")  # what is neither white space nor an array's
LINE = re.compile(r"[^\n]*")
OBJECT_CHARS = 1 << 16  # of an object over several lines at most
BAD_RECORD = ValueError, KeyError, TypeError, AttributeError, RecursionError


def read_jsonl(text: str, path: Path) -> list[str]:
    """The "text" of every line; lines end at \\n only, as U+2028 and the like are text."""
    documents = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            documents.append(text_of(json.loads(line)))
        except BAD_RECORD as error:
            raise (DataError if documents else NotRecords)(
                f'{path}: line {number:,} is no JSON object with a string "text"'
                f" ({type(error).__name__}: {error}); correct or remove the line"
            ) from None
    return documents


def read_json(text: str, path: Path) -> list[str]:
    """Of one object its "text"; of an array each string or "text"; else as JSON lines."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return read_jsonl(text, path)
    documents = []
    for number, record in enumerate(value if isinstance(value, list) else [value], 1):
        try:
            documents.append(text_of({"text": record} if isinstance(record, str) else record))
        except BAD_RECORD as error:
            raise (DataError if documents else NotRecords)(
                f'{path}: element {number:,} is no string and no JSON object with a string "text"'
                f" ({type(error).__name__}: {error}); correct it, or rename the file to .txt to"
                " take it as it stands"
            ) from None
    return documents


def object_at(text: str, start: int) -> tuple[Any, int]:
    """The JSON object that begins there, and its end; (None, end of the line) for none. Pieces are
    parsed, as an error counts all lines before it."""
    end = LINE.match(text, start).end()
    for piece in (text[start:end], text[start : start + OBJECT_CHARS]):
        if piece.startswith("{"):
            with contextlib.suppress(ValueError, RecursionError):
                record, length = json.JSONDecoder().raw_decode(piece)
                return record, start + length
    return None, end


def json_objects(text: str) -> list[tuple[int, Any]]:
    """(offset, object) of all JSON objects of a text that is little else, and (offset, None) of
    each line that is none; [] for any other text. One object a line or over many, with commas and
    the brackets of an array or without: nine lines of ten must be such, or all but one."""
    found, wrong, position = [], 0, 0
    most = max(1, (text.count("\n") + 1) // 10)
    while start := JSON_START.search(text, position):
        record, position = object_at(text, start.start())
        found.append((start.start(), record))
        wrong += record is None
        if wrong > min(most, 100 + len(found) // 2):
            return []
    return found if len(found) - wrong >= 2 + (wrong > 0) else []


def has_text(record: Any) -> bool:
    with contextlib.suppress(*BAD_RECORD):
        text_of(record)
        return True
    return False


def refuse_objects(text: str, path: Path) -> None:
    """DataError for a file of JSON objects that cannot be read as documents as it is."""
    found = json_objects(text)
    objects = [record for _, record in found if record is not None]
    if not objects:
        return
    good = sum(map(has_text, objects))
    target = "FILE > NEW_FILE.jsonl"
    if path.is_file():
        target = f"{shlex.quote(str(path))} > {shlex.quote(path.stem + '.jsonl')}"
    if good < len(objects) / 2:
        named, program = keys_of(objects)
        raise DataError(
            f'{path}: {len(objects):,} JSON objects without a "text", keys: {named}; name that of'
            f' the text "text": jq -c {shlex.quote(program)} {target}'
        )
    what = f'{path}: {good:,} JSON objects with a "text", but'
    wrong = [start for start, record in found if not has_text(record)]
    if not wrong:
        raise DataError(f"{what} not one a line: jq -c . {target}")
    line = text.count("\n", 0, wrong[0]) + 1
    kind = ".json" if text.lstrip().startswith("[") else ".jsonl"
    rename = f", then rename the file to {path.stem}{kind}" if path.is_file() else ""
    raise DataError(f"{what} line {line:,} is none; correct or remove it{rename}")


def keys_of(objects: Iterable[dict[str, Any]]) -> tuple[str, str]:
    """The five keys with the most text, as JSON, and the jq program that makes documents of the
    first."""
    sizes = Counter()
    for record in objects:
        sizes.update({k: len(v) if isinstance(v, str) else 0 for k, v in record.items()})
    keys = {json.dumps(key, ensure_ascii=False): size for key, size in sizes.most_common(5)}
    first, size = next(iter(keys.items()), ("", 0))
    return ", ".join(keys) or "none", f"{{text: .[{first}]}}" if size else "{text: tostring}"


def read_plain(text: str, path: Path, separator: str) -> list[str]:
    """The parts of a text. DataError for JSON lines under another name, one of them bad or not:
    their syntax would become text; of a pipe, which has no name, they are read."""
    documents = []
    if re.match(r"\s*(\[\s*)?\{", text):
        with contextlib.suppress(DataError):
            documents = read_json(text, path)
    if not documents:
        refuse_objects(text, path)
        return text.split(separator) if separator else [text]
    if path.is_file():
        raise DataError(
            f'{path}: JSON objects with a "text"; rename it to {path.stem}.jsonl, so that each'
            " text is a document and the syntax around it none"
        )
    endings.say(f"note: {path}: JSON, a document an object", sys.stderr)
    return documents


def kind_of(path: Path) -> str:
    """The suffix of a file's name in small letters, without those of packed files."""
    kinds = [suffix for suffix in map(str.lower, path.suffixes) if suffix not in PACKED_SUFFIXES]
    return kinds[-1] if kinds else ""


def documents_of(text: str, path: Path, separator: str) -> list[str]:
    """The documents of a file's text; DataError."""
    if kind_of(path) in JSON_LINES:
        return read_jsonl(text, path)
    if kind_of(path) == ".json":
        return read_json(text, path)
    return read_plain(text, path, separator)


def read_documents(
    files: Iterable[Path],
    separator: str,
    named: Iterable[str | Path] = (),
    selection: Selection | None = None,
) -> list[str]:
    """All documents of `files` that are not empty, in order; `separator` may be empty. Unless the
    user `named` it, a .json of anything else than texts is taken as it stands, and what is no text
    is left out, if there is a `selection` to count it. DataError."""
    documents, others, cuts, files = [], [], [], list(files)
    room, named = free_memory() // TEXT_MEMORY, {*map(named_path, named)}
    leaves_out, selection = selection is not None, selection or Selection()
    with Progress("reading", "files", len(files)) as progress:
        for path in files:
            progress.update()
            found = leaves_out and path not in named
            try:
                data = read_file(path, room, found)
                text = decode_text(data, path)
                room -= len(data)
                if not text:
                    selection.leave_out("empty", path)
                    continue
                documents += documents_of(text, path, separator)
            except DataError as error:
                if found and isinstance(error, NoText):
                    selection.leave_out(error.reason, path)
                    continue
                if found and isinstance(error, NotRecords) and kind_of(path) in JSON_LINES:
                    selection.leave_out('JSON lines without "text"', path)
                    continue
                plain = isinstance(error, NotRecords) and kind_of(path) == ".json"
                if path in named or not plain:
                    raise with_way_out(error, path) if found else error from None
                others.append(path)
                documents.append(text)
            selection.taken += 1
            if kind_of(path) not in (*JSON_LINES, ".json"):
                cuts.append((separator in text, separator.replace("\n", "\r\n") in text))
    if others:
        what = f'{len(others)} .json without "text", {others[0]} the first'
        endings.say(f"note: {what}: taken as plain text", sys.stderr)
    if separator:
        note_separator(separator, cuts)
    return [document for document in documents if document]


def with_way_out(error: DataError, path: Path) -> DataError:
    """The error of a file that was found in a folder, where it may be left out."""
    pattern = shlex.quote(glob.escape(path.as_posix()))
    return DataError(f"{error}; or leave it out: --exclude {pattern}")


def note_separator(separator: str, cuts: Sequence[tuple[bool, bool]]) -> None:
    """Say where a separator cuts nothing. cuts: of each file, whether it has it, and whether it
    has it with \\r\\n for \\n."""
    found = sum(as_given for as_given, _ in cuts)
    crlf = sum(with_crlf and not as_given for as_given, with_crlf in cuts)
    if found and not crlf:
        return
    windows = separator.replace("\n", "\r\n")
    hint = f"; lines of {crlf} end in \\r\\n: give {windows!r}"
    what = f"note: --separator {separator!r}: in {found} of {len(cuts)} files that are no JSON"
    endings.say(f"{what}; the others stay whole{hint * (crlf > 0)}", sys.stderr)


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


def without_copies(train: Sequence[str], val: Iterable[str]) -> list[str]:
    """The training documents that are not in validation, word for word; DataError for none."""
    held_out = set(val)
    kept = [document for document in train if document not in held_out]
    if train and not kept:
        raise DataError(
            f"--input: each of the {len(train):,} training documents is in validation too; give"
            " other text, or another --seed or --val-fraction"
        )
    return kept


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
    train = partial(
        sentencepiece.SentencePieceTrainer.train,
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
    with Progress("training a tokenizer", "seconds") as progress:
        endings.in_thread(train, progress.update)
    return model.getvalue()


def read_model(path: str | Path) -> bytes:
    """The bytes of a tokenizer's file, read once, as it may be a pipe; DataError."""
    try:
        with open(path, "rb") as file:
            model = file.read(MODEL_BYTES + 1)
    except OSError as error:
        raise DataError(
            f"--tokenizer {path}: not a SentencePiece model ({error}); give a .model file"
        ) from None
    if len(model) > MODEL_BYTES:
        raise DataError(
            f"--tokenizer {path}: not a SentencePiece model (more than {MODEL_BYTES:,} bytes); give"
            " a .model file"
        )
    return model


def load_tokenizer(path: str | Path, vocab_size: int | None = None, model: bytes = b"") -> Any:
    """The SentencePiece model in a file (`model`: its bytes, where they are at hand), if
    train_gpt.py can use it."""
    model = model or read_model(path) or b"empty"  # an empty model would load
    try:
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


@lru_cache(maxsize=1)  # a caller may give a text in a million fragments
def within_text(tokenizer: Any) -> Any:
    """The same model for what does not begin a text."""
    return sentencepiece.SentencePieceProcessor(
        model_proto=tokenizer.serialized_model_proto() + WITHIN_TEXT
    )


def encode_documents(tokenizer: Any, documents: Sequence[str]) -> list[list[int]]:
    """Token ids (list of int, no BOS) of each document; a literal U+2581 becomes byte tokens.

    What follows one is encoded as it stands: a tokenizer that puts a space before each text, or
    takes spaces away, does so with the first part of a document only.
    """
    escaped = [tokenizer.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]
    byte_fallback = all(map(tokenizer.is_byte, escaped))
    split_at = re.compile(f"({SPACE_MARK})" if byte_fallback else r"(?!)")
    parts = [  # no piece reaches over a space, so no token changes
        [cut for run in split_at.split(document) for cut in spans(run, ENCODER_CHARS)]
        for document in documents
    ]
    begun = tokenizer.encode([cut[0] if cut else "" for cut in parts])
    rest = iter(within_text(tokenizer).encode([part for cut in parts for part in cut[1:]]))
    tokens = []
    for cut, first in zip(parts, begun, strict=True):
        ids = []
        for number, part in enumerate(cut):
            encoded = next(rest) if number else first
            ids += escaped if byte_fallback and part == SPACE_MARK else encoded
        tokens.append(ids)
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
    sha256: str = ""  # of the tokens as uint16, little-endian


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
    with Progress(stem.name, "documents", len(documents)) as progress:
        for batch in batches(documents):
            tokens = encode_documents(tokenizer, batch)
            for document, decoded in zip(batch, tokenizer.decode(tokens), strict=True):
                split.bytes += len(document.encode())
                split.changed += decoded != document
                split.escaped += SPACE_MARK in document
            stream += [np.array([BOS, *ids], np.uint16) for ids in tokens]
            progress.update(len(batch))
    tokens = np.concatenate(stream)
    split.sha256 = hashlib.sha256(tokens.astype("<u2")).hexdigest()
    split.tokens = write_shards(tokens, stem)
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
    left_out: Mapping[str, int] | None = None,
) -> tuple[Split, Split]:
    """Write shards, validation text, dataset.json and tokenizer.model to the folder `out`; print
    the figures.

    tokenizer: the path of a model to reuse; else one of at most `vocab_size` pieces (default 1,024)
    is trained on train_docs, without those that are in val_docs. left_out: how many files, by
    reason, for dataset.json. Raises DataError; `out` is then as it was, or new and empty.
    """
    started, out = time.perf_counter(), Path(out)
    check_target(out, name)
    given = len(train_docs)
    train_docs = without_copies(train_docs, val_docs)
    if tokenizer is not None:
        model = read_model(tokenizer)
        load_tokenizer(tokenizer, vocab_size, model)
    else:
        model = train_tokenizer(train_docs, vocab_size or DEFAULT_VOCAB)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=out) as work:
        Path(work, "tokenizer.model").write_bytes(model)
        processor = load_tokenizer(Path(work, "tokenizer.model"))
        train = write_split(processor, train_docs, Path(work, f"{name}_train"))
        val = write_split(processor, val_docs, Path(work, f"{name}_val"))
        text = hashlib.sha256()
        with open(Path(work, f"{name}_val.jsonl"), "wb") as file:
            for document in val_docs:
                line = json.dumps({"text": document}, ensure_ascii=False).encode() + b"\n"
                text.update(line)
                file.write(line)
        changed = train.changed + val.changed
        if tokenizer is None and changed:
            raise DataError(f"{changed} documents do not decode to themselves; please report this")
        facts = dict(
            tokenizer_sha256=hashlib.sha256(model).hexdigest(),
            val_tokens_sha256=val.sha256,
            val_text_sha256=text.hexdigest(),
            lossy=changed > 0,
            train_documents=train.documents,
            val_documents=val.documents,
            dropped_copies=given - train.documents,
        )
        if left_out:
            facts["left_out"] = dict(sorted(left_out.items()))
        Path(work, DATASET_FILE).write_text(json.dumps(facts, indent=1) + "\n")
        with endings.held():
            move_into_place(Path(work), out, name)
    print_figures(train, val, processor, given - train.documents)
    endings.say(f"wrote {out} in {time.perf_counter() - started:.1f} s")
    return train, val


def check_target(out: Path, name: str) -> None:
    """Refuse a confusing name and a folder that cannot be written or holds other data."""
    if not name or "/" in name or "_train_" in f"{name}_" or "_val_" in f"{name}_":
        raise DataError(f"--name {name!r}: give a word without / and without _train or _val")
    for path in sorted([*out.glob("*_train_*.bin"), *out.glob("*_val_*.bin")]):
        if not path.name.startswith((f"{name}_train_", f"{name}_val_")):
            raise DataError(f"--out {out}: holds another dataset ({path.name}); choose another")
    if out.is_symlink() and not out.exists():
        raise DataError(f"--out {out}: a link to nothing; choose another")
    nearest = next(path for path in [out, *out.absolute().parents] if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise DataError(f"--out {out}: {nearest} is no writable folder; choose another")


def move_into_place(work: Path, out: Path, name: str) -> None:
    """Move a finished dataset from `work` to `out`, replacing an earlier one; tokenizer last."""
    last = DATASET_FILE, "tokenizer.model"
    for old in (out / file_name for file_name in last):
        if old.is_symlink() or old.exists() and old.read_bytes() != (work / old.name).read_bytes():
            old.unlink()  # shards must never stand beside what belongs to another dataset's
    fresh = {path.name for path in work.iterdir()}
    stem = glob.escape(name)
    for old in [*out.glob(f"{stem}_train_*.bin"), *out.glob(f"{stem}_val_*.bin")]:
        if old.name not in fresh:
            old.unlink()
    for file_name in [*sorted(fresh - {*last}), *last]:
        os.replace(work / file_name, out / file_name)


def print_figures(train: Split, val: Split, tokenizer: Any, dropped: int) -> None:
    """The lines a run ends with: sizes, tokenizer, and whether the text survives the way back."""
    for side, split in (("train", train), ("val", val)):
        endings.say(
            f"{side} documents:{split.documents} bytes:{split.bytes} tokens:{split.tokens}"
            f" bytes_per_token:{split.bytes / split.tokens:.4f}"
        )
    if dropped:
        endings.say(f"note: {dropped} training documents are in validation word for word; dropped")
    for note in size_notes(train.tokens, val.tokens):
        endings.say(f"note: {note}")
    digest = hashlib.sha256(tokenizer.serialized_model_proto()).hexdigest()
    endings.say(f"tokenizer pieces:{tokenizer.vocab_size()} sha256:{digest}")
    documents, changed = train.documents + val.documents, train.changed + val.changed
    if train.escaped + val.escaped:
        endings.say(
            f"note: {train.escaped + val.escaped} of {documents} documents hold a literal U+2581,"
            " which SentencePiece decodes to a space; written as byte tokens where there are any"
        )
    if changed:
        endings.say(
            f"round_trip LOSSY: {changed} of {documents} documents change; this tokenizer alters"
            " text or lacks characters, so a score will be one of the altered text"
        )
    else:
        endings.say(f"round_trip ok: decode(encode(text)) == text for {documents} documents")


def size_notes(train_tokens: int, val_tokens: int) -> Iterator[str]:
    """What there is to say of a text that is small for RECORD=tiny, the default on a CPU."""
    laps = TINY_STEPS * TINY_STEP_TOKENS / train_tokens
    steps = f"{TINY_STEPS} steps of {TINY_STEP_TOKENS:,} tokens"
    if train_tokens < TINY_STEP_TOKENS:
        found = f"too small to train on: {train_tokens:,} train tokens, not one step of RECORD=tiny"
        yield f"{found}, whose {steps} read them {laps:,.0f} times; give more text"
    elif laps > USEFUL_LAPS:
        found = f"{train_tokens:,} train tokens: the {steps} of RECORD=tiny read them"
        yield f"{found} {laps:,.0f} times, past {USEFUL_LAPS} to little use; give more text"
    if val_tokens < TINY_WINDOW:
        found = f"{val_tokens:,} val tokens, not one window of RECORD=tiny ({TINY_WINDOW})"
        yield f"{found}: a score on them says little; give more text or a larger --val-fraction"


# -----------------------------------------------------------------------------
# Command line


class OneLineParser(argparse.ArgumentParser):
    """Reports a bad argument the way every other bad input is reported."""

    def error(self, message: str) -> None:
        raise DataError(message)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The checked command line."""
    summary, _, details = (__doc__ or "\n").partition("\n")
    layout = argparse.RawDescriptionHelpFormatter
    parser = OneLineParser(description=summary, epilog=details, formatter_class=layout)
    add = parser.add_argument
    add("--input", nargs="+", required=True, help="files, folders, - for standard input")
    pattern = dict(action="append", default=[], metavar="PATTERN")
    add("--glob", **pattern, help="take only files like '*.md'; repeatable")
    add(
        "--exclude", **pattern, help="not files or folders like node_modules, 'tests/*'; repeatable"
    )
    add("--out", required=True, type=Path, help="folder of the dataset")
    add("--name", help="how the shards' names begin; default: as the folder's")
    add("--vocab-size", type=int, help=f"{MIN_VOCAB} to {MAX_VOCAB}; default {DEFAULT_VOCAB}")
    add("--tokenizer", help="a SentencePiece model to use instead of training one")
    add("--separator", help=r"cuts files other than JSON; \n, \r, \t understood")
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
    if not all(pattern.strip("./") for pattern in options.glob + options.exclude):
        raise DataError("--glob, --exclude: a pattern names nothing; give one, such as '*.md'")
    if options.separator == "":
        raise DataError("--separator '': give at least one character, or leave it out")
    return options


def prepare(options: argparse.Namespace) -> None:
    """The whole way from files to a dataset."""
    name = options.out.resolve().name if options.name is None else options.name
    check_target(options.out, name)
    separator = options.separator or ""
    for written, character in ((r"\n", "\n"), (r"\r", "\r"), (r"\t", "\t")):
        separator = separator.replace(written, character)
    selection = Selection(options.glob, options.exclude)
    files = input_files(options.input, options.out, selection)
    documents = read_documents(files, separator, options.input, selection)
    if not documents:
        refuse_nothing(options.input, selection)
    selection.report()
    train, val = split_documents(documents, options.val_fraction, options.seed)
    more = dict(tokenizer=options.tokenizer, left_out=selection.left_out)
    write_dataset(train, val, options.out, name, options.vocab_size, **more)


def refuse_nothing(inputs: Sequence[str], selection: Selection) -> NoReturn:
    """DataError for input without a text, which says what was looked at."""
    what = f"--input {' '.join(inputs)}: "
    if not selection.left_out:
        raise DataError(f"{what}empty; give files with text in them")
    looked_at = f"{selection.taken + selection.left_out.total():,} files or folders looked at"
    fix = "give UTF-8 text, or other patterns; a file that --input names itself says more"
    raise DataError(f"{what}no text, {looked_at}; {'; '.join(selection.reasons())}; {fix}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 2 after one line on what is wrong with the input."""
    try:
        prepare(parse_arguments(arguments))
    except (DataError, OSError, MemoryError) as error:
        fix = "; see that --out can be written and has room" * isinstance(error, OSError)
        what = str(error) or "not enough memory; give less text, or use a machine with more"
        endings.say(f"prepare_text.py: {' '.join(what.split())}{fix}", sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(endings.run(main))
