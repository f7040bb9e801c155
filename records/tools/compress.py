"""Compress any file with a trained artifact, and restore it.

    python records/tools/compress.py FILE --artifact runs/tiny_seed1337/artifact.bin
    python records/tools/compress.py --restore FILE.pgz --artifact runs/tiny_seed1337/artifact.bin

The file is cut into tokens, these into blocks of 16.8 million, coded by the distribution that
val_bpb is the code length of: the artifact's model and the n-grams of the block so far
(train_gpt.py, section 12). Both sides need the artifact, its tokenizer, the same train_gpt.py, the
same versions of torch, numpy and constriction, and the same kind of processor; none of them is in
the .pgz. Text like that which the artifact was trained on becomes small; for other files a general
compressor is better.

Every byte is carried: what is no UTF-8, or what the tokenizer alters, is spelt in its byte tokens;
where it has none, those bytes are kept aside. A block that the model makes larger is stored as it
is. The file is restored once from what will be written before that is put in place; --no-check
leaves that out. What is put in place is on the disk, has the rights of the file it was made from,
and replaces nothing.

The tokens of a block are dealt out to lanes, one contiguous piece each, that are coded side by
side: more lanes are faster, fewer let a piece see more of what came before. Counts and model learn
from what all lanes have coded, in each block anew. A .pgz is a header (class Header; 64 bytes at
most, 7 more for each block after the first), the coded blocks, the bytes kept aside. It restores on
machines whose floating point is the same, and says so where it is not. What the short fingerprints
in a header stand for is kept beside the artifact, in artifact.bin.made.json, for messages alone: a
restore works without it.
"""

import argparse
import contextlib
import errno
import hashlib
import json
import lzma
import os
import re
import secrets
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import checkout  # noqa: F401  (puts train_gpt and data/ on the path)

import endings

if __name__ == "__main__":  # long spins of idle threads slow a shared CPU
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # libgomp reads it at load
    endings.begin()  # the imports take seconds

import numpy as np
import torch
import zstandard
from run_folder import parse_object
from tqdm import tqdm

import train_gpt
from prepare_text import DataError, encode_documents, load_tokenizer
from train_gpt import BOS, CodingPlan, Config, LackOfMemory, StreamError, UserError, printable

SUFFIX = ".pgz"
MAGIC, VERSION = b"PGZ", 2  # the version is one more with each change of what a .pgz means
PREFIX = MAGIC + bytes([VERSION])
LANES, LANE_TOKENS = 32, 512  # lanes at most; tokens in each at least, but for
FEW_LANES, FEW_TOKENS = 10, 80  # so many anyway, of so many tokens each: 1,000 tokens/s on a core
MOST_LANES, THREADS = 4096, 1024  # that can be asked for, by --lanes or by a container
BLOCK_TOKENS = 1 << 24  # coded on their own, for counts take memory
# The highest rate at which no prose like the training text grew by more than 0.3 %, as 200 KB did;
# smaller prose took 0 to 0.9 % fewer bytes than without learning, Python and READMEs 1.1 to 3.4 %
# (files of 2.5 to 60 KB, two artifacts, 8 to 32 lanes). At 3e-4 those gain a third of that; at 2e-3
# they gain 2 to 3.7 %, and prose of 10 KB grows by 1.6 %.
LEARNING = dict(lane_ttt=True, lane_ttt_every=16, lane_ttt_lr=1e-3)
CODING_MEMORY = 64  # bytes that a byte of a file takes at most while it is cut into tokens
RESTORE_MEMORY = 8  # and while it is put together
ASIDE_MEMORY = 1 << 28  # of the decoder of what is kept aside; xz -6, as written, takes 9 MB
CONTAINER_MEMORY = 4  # a byte of a container: as read, without its header, in parts
SAY_AFTER = 1.0  # seconds of coding after which the rest can be told, if it is as long
MOST_COMPARED = 1 << 20  # bytes of a file that general compressors are shown, too
STALE_SECONDS = 86_400  # after which nobody writes a partial file any more: it was left by a kill
NEVER_FLUSHED = errno.EINVAL, errno.ENOTSUP, errno.EACCES  # folders of some disks, or unreadable
IDENTITY = "st_dev", "st_ino", "st_size", "st_mtime_ns"  # other ones: another file, or changed
CHECK_BYTES, DIGEST_BYTES, PART_BYTES = 8, 16, 4  # of sha256: of a container, file, part
MADE = {  # the four parts of a fingerprint, of what Compressor.made tells
    "artifact": ("artifact",),
    "tokenizer": ("tokenizer",),
    "code": ("code", "settings"),
    "machine": ("torch", "numpy", "constriction", "device"),
}
EMPTY = b"empty"  # stands for no bytes, which loaders take for none given
CODE = train_gpt.CODE.read_bytes()  # that runs here, whatever becomes of the file
DEVICES = "cpu", "cuda"  # by number
TABLE_ENTRIES, TABLE_BYTES = 100, 1 << 20  # of the table beside an artifact, at most
INVALID = re.compile("([\udc80-\udcff]+)")  # bytes that are no UTF-8, by surrogateescape
SMALLER = tuple(map(re.compile, (r"(?s)[^\r\n]+|[\r\n]+", r"(?s) ?\S+|\s", r"(?s).")))


class Spelling(NamedTuple):
    """A tokenizer, and what its tokens stand for."""

    tokenizer: Any
    pieces: list[bytes]  # of each id; b"" for control and unknown ids
    letters: list[int]  # the id of each byte, 256 of them, or none


class Packed(NamedTuple):
    """A container, and how it came about."""

    data: bytes
    header: "Header"
    tokens: int
    seconds: float  # of coding


class Progress(train_gpt.Runtime):
    """A Runtime with one bar for all blocks, where a person waits; elsewhere a line, once it can
    be told how long all will take."""

    def bar_of(self, what: str, tokens: int, after: str = "") -> Any:
        """A bar on standard error if that is a terminal; a context manager. after: what the line
        ends with."""
        self.whole = tqdm(total=tokens, desc=what, unit="tok", disable=None)
        self.what = what
        self.after = after
        self.done = 0  # tokens of the block
        self.all_done = 0
        self.first: tuple[float, int] | None = None  # time and tokens where the measure begins
        self.said = not self.whole.disable
        return self.whole

    def tick(self, stage: str, done: int, total: int) -> None:
        """Of a block."""
        more = done - self.done if done > self.done else done  # or of the next block
        self.whole.update(more)
        self.all_done += more
        self.done = done
        now = time.perf_counter()
        if not self.first:  # behind us: what only the first step waits for
            self.first = now, self.all_done
        spent, coded = now - self.first[0], self.all_done - self.first[1]
        if not self.said and coded and spent >= SAY_AFTER:
            self.said = True
            rest = spent * (self.whole.total - self.all_done) / coded
            line = f"{self.what}: {self.whole.total:,} tokens, about {duration(rest)} to go"
            if rest >= SAY_AFTER:
                endings.say(line + self.after, sys.stderr)


def duration(seconds: float) -> str:
    """In the largest unit of which it is two at least."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


# -----------------------------------------------------------------------------
# Bytes and tokens


def spelling(path: Path, model: bytes, vocab_size: int) -> Spelling:
    """The tokenizer of a file that has these bytes; UserError or DataError unless it fits a model
    of vocab_size tokens."""
    tokenizer = load_tokenizer(path, model=model)
    ids = [*range(tokenizer.vocab_size())]
    if len(ids) != vocab_size:
        fix = "give the one the artifact was trained with"
        raise UserError(f"{path}: {len(ids)} pieces, the artifact has {vocab_size}; fix: {fix}")
    pieces, letters = [], {}
    with parsing(str(path)):
        for i, name in enumerate(map(tokenizer.id_to_piece, ids)):
            silent = tokenizer.is_control(i) or tokenizer.is_unknown(i) or tokenizer.is_unused(i)
            pieces.append(b"" if silent else name.replace("\u2581", " ").encode())
            if tokenizer.is_byte(i):  # <0x00> to <0xFF>
                pieces[i] = bytes([int(name[3:5], 16)])
                letters[pieces[i]] = i
    all_bytes = [bytes([n]) for n in range(256)]
    whole = all(byte in letters for byte in all_bytes)
    return Spelling(tokenizer, pieces, [letters[byte] for byte in all_bytes] if whole else [])


def spell(spelt: Spelling, data: bytes) -> list[int] | None:
    """Byte tokens; None without them."""
    return [spelt.letters[byte] for byte in data] if spelt.letters else None


def runs(spelt: Spelling, text: str, finer: int = 0) -> Iterator[tuple[bytes, list[int] | None]]:
    """Yields (bytes, ids) along a text without lone surrogates: ids stand for exactly these bytes;
    None if no tokens do. What the tokenizer alters is tried again in smaller parts."""
    data, (ids,) = text.encode(), encode_documents(spelt.tokenizer, [text])
    if b"".join([spelt.pieces[i] for i in ids]) == data:
        yield data, ids
    elif finer == len(SMALLER):
        yield data, spell(spelt, data)
    else:
        for part in SMALLER[finer].findall(text):
            yield from runs(spelt, part, finer + 1)


def tokenise(spelt: Spelling, data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """-> tokens, uint16; of each byte, whether they hold it, bool (len(data),)"""
    tokens, sizes, held = [], [], []
    for i, part in enumerate(INVALID.split(data.decode("utf-8", "surrogateescape"))):
        raw = part.encode("utf-8", "surrogateescape")
        for known, ids in [(raw, spell(spelt, raw))] if i % 2 else runs(spelt, part):
            tokens += ids or []
            sizes.append(len(known))
            held.append(ids is not None)
    return np.array(tokens, np.uint16), np.repeat(np.array(held, bool), sizes)


def lanes_for(tokens: int) -> int:
    """How many lanes a block of so many tokens gets."""
    return max(1, min(FEW_LANES, tokens // FEW_TOKENS), min(LANES, tokens // LANE_TOKENS))


def plan_of(tokens: int, lanes: int, window: int) -> CodingPlan:
    """What CodingPlan.of makes of one document of so many tokens, which is cut into a piece for
    each lane; fewer lanes, where even pieces are fewer."""
    length = -(-tokens // lanes)
    pieces = -(-tokens // length)
    plan = CodingPlan(pieces, tokens - (pieces - 1) * length, pieces, 1, tokens, window)
    return plan._replace(length=length, cuts=((0, pieces - 1),)) if pieces > 1 else plan


def keep_aside(data: bytes, held: np.ndarray) -> bytes:
    """A mark for each byte, 1: tokens hold it; then the others. Together as small as xz makes
    it."""
    rest = np.frombuffer(data, np.uint8)[~held]
    return lzma.compress(np.packbits(held).tobytes() + rest.tobytes())


def unpack_aside(aside: bytes, most: int) -> bytes:
    """What keep_aside packed; ValueError or others before it grows beyond `most` bytes."""
    stream = lzma.LZMADecompressor(memlimit=ASIDE_MEMORY)
    both = stream.decompress(aside, most + 1)
    if not stream.eof or len(both) > most:
        raise ValueError(f"what is kept aside is cut off, or more than {most} bytes")
    return both


def put_back(text: bytes, aside: bytes, size: int) -> bytes:
    """What tokens hold and what was kept aside -> the file, of `size` bytes"""
    marked = -(-size // 8)
    both = np.frombuffer(unpack_aside(aside, marked + size), np.uint8)
    file = np.zeros(size, np.uint8)
    marks, rest = np.split(both, [marked])
    held = np.unpackbits(marks, count=size).astype(bool)
    file[~held] = rest
    file[held] = np.frombuffer(text.ljust(size)[: held.sum()], np.uint8)  # any length, if wrong
    return file.tobytes()


# -----------------------------------------------------------------------------
# Containers


@contextlib.contextmanager
def parsing(name: str) -> Iterator[None]:
    """UserError for bytes that no program of ours wrote: ValueErrors and lzma's errors are theirs,
    others are not."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, lzma.LZMAError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"{name}: damaged ({reason}); fix: get it again") from error


class Reader:
    """Takes bytes apart, front to back; ValueError where they end too soon."""

    def __init__(self, data: bytes):
        self.data = data
        self.place = 0

    def take(self, count: int) -> bytes:
        self.place += count
        if self.place > len(self.data):
            raise ValueError(f"cut off after {len(self.data)} bytes")
        return self.data[self.place - count : self.place]

    def number(self) -> int:
        """As `varint` wrote it, below 2^63."""
        number = 0
        for shift in range(0, 63, 7):
            byte = self.take(1)[0]
            number |= (byte & 127) << shift
            if byte < 128:
                return number
        raise ValueError("a number without end")


def varint(number: int) -> bytes:
    """Seven bits a byte, the low ones first, with the eighth where more follow (LEB128)."""
    packed = bytearray()
    while number > 127:
        packed.append(number & 127 | 128)
        number >>= 7
    return bytes(packed) + bytes([number])


class Header(NamedTuple):
    """What a restore needs beside artifact, tokenizer and code. Plans follow from the numbers of
    tokens and lanes; settings are those of the code, which the fingerprint has."""

    digest: bytes  # of the file's sha256, the first DIGEST_BYTES
    made: bytes  # fingerprint_of what it was made with
    threads: int
    device: str  # of DEVICES
    size: int  # bytes of the file
    tokens: int
    blocks: tuple[tuple[int, int], ...]  # of each its lanes, 0: stored as it is, and its bytes

    def pack(self) -> bytes:
        """digest, fingerprint and numbers, the blocks' last."""
        numbers = [self.threads, DEVICES.index(self.device), self.size, self.tokens]
        for block in self.blocks:
            numbers += block
        return self.digest + self.made + b"".join(map(varint, numbers))

    @staticmethod
    def parse(body: bytes) -> tuple["Header", bytes]:
        """-> header, the blocks and what was kept aside; ValueError for what no file can have."""
        reader = Reader(body)
        digest = reader.take(DIGEST_BYTES)
        made = reader.take(PART_BYTES * len(MADE))
        threads, device, size, tokens = (reader.number() for _ in range(4))
        if not 1 <= threads <= THREADS or device >= len(DEVICES):
            raise ValueError(f"{threads} threads, device {device}")
        if tokens > size:  # a token is a byte at least
            raise ValueError(f"its blocks have {tokens} tokens for {size} bytes")
        blocks = []
        for count in block_sizes(tokens):
            lanes, taken = reader.number(), reader.number()
            if lanes > min(MOST_LANES, count):
                raise ValueError(f"{lanes} lanes for {count} tokens")
            blocks.append((lanes, taken))
        payload = body[reader.place :]
        if sum(taken for _, taken in blocks) > len(payload):
            raise ValueError("its blocks are more than it holds")
        found = Header(digest, made, threads, DEVICES[device], size, tokens, tuple(blocks))
        return found, payload


def block_sizes(tokens: int) -> Iterator[int]:
    """Tokens of each block of a file, one by one: a forged number of them asks for no memory."""
    for a in range(0, tokens, BLOCK_TOKENS):
        yield min(BLOCK_TOKENS, tokens - a)


def digest_of(data: bytes, size: int) -> bytes:
    """The first bytes of its sha256."""
    return hashlib.sha256(data).digest()[:size]


def seal(header: Header, payload: bytes) -> bytes:
    """PREFIX, check of all that follows it, header, payload."""
    body = header.pack() + payload
    return PREFIX + digest_of(body, CHECK_BYTES) + body


def open_container(packed: bytes, name: str) -> tuple[Header, bytes]:
    """-> header, payload; UserError for what is damaged, of another version or none of ours,
    LackOfMemory for what does not fit here."""
    start = len(PREFIX) + CHECK_BYTES
    with parsing(name):
        if not packed.startswith(MAGIC):
            raise ValueError(f"no {SUFFIX}, it does not begin with {MAGIC.decode()}")
        version = packed[len(MAGIC) : len(PREFIX)]
        if version and version[0] != VERSION:
            what = f"a {SUFFIX} of version {version[0]}, this program reads version {VERSION}"
            raise UserError(f"{name}: {what}; fix: restore it with the compress.py that made it")
        if len(packed) < start:
            raise ValueError(f"cut off after {len(packed)} bytes")
        body = packed[start:]
        if digest_of(body, CHECK_BYTES) != packed[len(PREFIX) : start]:
            raise ValueError("its check does not fit")
        header, payload = Header.parse(body)
    needed = header.size * RESTORE_MEMORY
    train_gpt.require_memory(needed, f"{name}: a file of {header.size:,} bytes")
    return header, payload


def device_of(packed: bytes, name: str) -> str:
    """Where a container was made: cpu or cuda"""
    return open_container(packed, name)[0].device


def require_device(device: str, what: str, fix: str) -> None:
    """UserError where it is not here."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(f"{what}: torch sees no CUDA device; fix: {fix}")


class Compressor:
    """An artifact and its tokenizer, each read once, ready to code files."""

    def __init__(self, artifact: Path, tokenizer: Path | None = None, device: str = "cpu"):
        """tokenizer: else tokenizer.model beside the artifact. UserError, DataError, OSError"""
        self.artifact = artifact
        self.tokenizer = tokenizer or artifact.with_name("tokenizer.model")
        self.rt = Progress(Config(device=device))
        self.rt.start()
        torch.set_num_threads(min(torch.get_num_threads(), THREADS))
        weights = read_source(artifact, CONTAINER_MEMORY).data or EMPTY
        self.model = train_gpt.load_artifact(artifact, self.rt.device, weights)
        pieces = read_source(self.tokenizer, CONTAINER_MEMORY).data or EMPTY
        self.spelt = spelling(self.tokenizer, pieces, self.model.cfg.vocab_size)
        self.apart = len(weights) + len(pieces)  # bytes that both sides have
        self.read = train_gpt.fingerprint(self.rt, CODE, weights)
        self.read["tokenizer"] = train_gpt.sha256(pieces)
        model = {name: getattr(self.model.cfg, name) for name in train_gpt.MODEL_FIELDS}
        self.cfg = Config(**model | LEARNING)

    def made(self) -> dict[str, Any]:
        """Whatever the code depends on, by name; of files as they were read."""
        settings = json.dumps(LEARNING | dict(block_tokens=BLOCK_TOKENS))
        return self.read | dict(threads=torch.get_num_threads(), settings=settings)

    def require_unchanged(self) -> None:
        """UserError unless a restore will find the files that coded here where they were."""
        files = dict(artifact=self.artifact, tokenizer=self.tokenizer, code=train_gpt.CODE)
        for name, path in files.items():
            with contextlib.suppress(OSError, UserError):
                found = read_source(path, CONTAINER_MEMORY).data
                if train_gpt.sha256(found) == self.read[name]:
                    continue
            raise changed(path)

    def compress(self, data: bytes, lanes: int = 0, after: str = "") -> Packed:
        """Any bytes -> Packed. lanes: 0 chooses by the number of tokens; after: see bar_of."""
        began = time.perf_counter()
        tokens, held = tokenise(self.spelt, data)
        blocks = []
        parts = []
        with self.rt.bar_of("compressing", len(tokens), after):
            for a in range(0, len(tokens), BLOCK_TOKENS):
                used, part = self.code(tokens[a : a + BLOCK_TOKENS], lanes)
                blocks.append((used, len(part)))
                parts.append(part)
        parts.append(b"" if held.all() else keep_aside(data, held))
        made = self.made()
        header = Header(
            digest=digest_of(data, DIGEST_BYTES),
            made=fingerprint_of(made),
            threads=made["threads"],
            device=self.rt.device.type,
            size=len(data),
            tokens=len(tokens),
            blocks=tuple(blocks),
        )
        payload = b"".join(parts)
        require_readable(header, payload)
        packed = seal(header, payload)
        return Packed(packed, header, len(tokens), time.perf_counter() - began)

    def code(self, tokens: np.ndarray, lanes: int) -> tuple[int, bytes]:
        """A block -> its lanes, 0: it is stored, and its bytes"""
        count = len(tokens)
        plan = plan_of(count, min(lanes or lanes_for(count), count), self.cfg.window)
        self.require_room(plan, f"--lanes {plan.lanes}")
        stream = np.append(np.uint16(BOS), tokens)
        body, _ = train_gpt.encode(self.model, self.rt, self.cfg, stream, plan)
        words = body[len(plan.side_bytes()) :]  # the others follow from the plan
        text = self.text(tokens)
        return (plan.lanes, words) if len(words) < len(text) else (0, text)

    def require_room(self, plan: CodingPlan, name: str) -> None:
        """LackOfMemory, before hours of work, for a block that cannot be coded here."""
        what = f"{name}: {plan.targets:,} tokens in {plan.lanes} lanes"
        known = self.model.known
        counts = train_gpt.count_bytes(plan.targets, known, self.cfg.vocab_size)
        rest = train_gpt.proof_bytes(self.cfg, plan, plan.targets, self.rt.cuda, known) - counts
        if self.rt.cuda:
            train_gpt.require_memory(rest, what, self.rt.device)
            rest = 0
        train_gpt.require_memory(counts + rest, what)

    def text(self, tokens: np.ndarray) -> bytes:
        """What tokens stand for."""
        return b"".join([self.spelt.pieces[i] for i in tokens.tolist()])

    def restore(self, packed: bytes, name: str = "the container") -> bytes:
        """The file; UserError if `packed`, called `name`, is damaged or of other making."""
        header, payload = open_container(packed, name)
        torch.set_num_threads(header.threads)
        fits(header, self.made(), name, self.table())
        with contextlib.suppress(StreamError):  # what comes after it would be wrong, too
            data = self.unpack(header, payload, name)
            if (len(data), digest_of(data, DIGEST_BYTES)) == (header.size, header.digest):
                return data
        raise UserError(f"{name}: restores to other bytes; fix: use the machine it was made on")

    def unpack(self, header: Header, payload: bytes, name: str) -> bytes:
        """What the blocks hold and what was kept aside, together; StreamError, UserError"""
        plans = []
        for count, (lanes, _) in zip(block_sizes(header.tokens), header.blocks, strict=True):
            plans.append(plan_of(count, lanes, self.cfg.window) if lanes else None)
        coded = [plan for plan in plans if plan]
        for plan in coded:
            self.require_room(plan, name)
        reader = Reader(payload)
        parts = []
        left = header.size
        with self.rt.bar_of("restoring", sum(plan.targets for plan in coded)):
            for plan, (_, size) in zip(plans, header.blocks, strict=True):
                part = reader.take(size)
                parts.append(self.decode(part, plan) if plan else part)
                left -= len(parts[-1])
                if left < 0:
                    raise StreamError("more bytes than the file has")
        data = b"".join(parts)
        if aside := payload[reader.place :]:
            with parsing(name):
                data = put_back(data, aside, header.size)
        return data

    def decode(self, words: bytes, plan: CodingPlan) -> bytes:
        """The text of a block; StreamError where no coder can have made the words"""
        body = plan.side_bytes() + words
        text = train_gpt.decode(self.model, self.rt, self.cfg, body, plan).text
        return self.text(text[text != BOS])

    def check(self, packed: bytes, data: bytes, name: str) -> None:
        """UserError unless it restores here to the bytes of the file of that name."""
        reason = "other bytes"
        try:
            if self.restore(packed) == data:
                return
        except LackOfMemory:
            raise
        except UserError as error:
            reason = str(error).partition("; fix: ")[0]
        fix = "OMP_NUM_THREADS=1, or another machine"
        raise UserError(f"{name}: does not restore here ({reason}); nothing is written; fix: {fix}")

    def table(self) -> dict[str, Any]:
        """Fingerprint -> what it stands for, as kept beside the artifact; empty where nothing that
        can be read is there."""
        with contextlib.suppress(UserError, OSError):
            path = table_of(self.artifact)
            return parse_object(train_gpt.read_regular(path, TABLE_BYTES), str(path))
        return {}

    def remember(self) -> None:
        """Enter into the table what is made here, for the messages of later restores: it is no
        failure if that cannot be."""
        made = self.made()
        table = self.table()
        key = fingerprint_of(made).hex()
        if key in table:
            return
        entries = [*table.items()][1 - TABLE_ENTRIES :]
        text = json.dumps(dict(entries) | {key: made}, indent=1) + "\n"
        with contextlib.suppress(UserError, OSError):
            train_gpt.write_atomically(table_of(self.artifact), text.encode())


def table_of(artifact: Path) -> Path:
    return artifact.with_name(f"{artifact.name}.made.json")


def require_readable(header: Header, payload: bytes) -> None:
    """UserError for a header that a restore would refuse."""
    try:
        if Header.parse(header.pack() + payload) == (header, payload):
            return
        reason = "it says something else"
    except ValueError as error:
        reason = str(error)
    fix = "report it, with the command"
    raise UserError(f"its header cannot be read again ({reason}); nothing is written; fix: {fix}")


# -----------------------------------------------------------------------------
# What a container was made with


def fingerprint_of(made: dict[str, Any]) -> bytes:
    """PART_BYTES for each of MADE's parts: of a file alone its sha256's first ones."""
    parts = []
    for names in MADE.values():
        joined = "\n".join([str(made[name]) for name in names])
        digest = joined if len(names) == 1 else train_gpt.sha256(joined.encode())
        parts.append(bytes.fromhex(digest)[:PART_BYTES])
    return b"".join(parts)


def fits(header: Header, here: dict[str, Any], name: str, table: dict[str, Any]) -> None:
    """UserError for what a container was made with and is another here; in words where the table
    has them."""
    there = entry_of(table, header.made)
    mine = fingerprint_of(here)
    told = []
    for i, (part, names) in enumerate(MADE.items()):
        bytes_of = slice(i * PART_BYTES, (i + 1) * PART_BYTES)
        if header.made[bytes_of] == mine[bytes_of]:
            continue
        if there:
            pairs = [f"{n} {safe(there[n])}, here {here[n]}" for n in names if there[n] != here[n]]
        else:
            ours = ", ".join(f"{n} {here[n]}" for n in names)
            pairs = [f"{header.made[bytes_of].hex()}, here {mine[bytes_of].hex()}: {ours}"]
        told.append(f"another {part} ({'; '.join(pairs)})")
    if told:
        raise UserError(f"{name}: made with {' and '.join(told)}; fix: use what it was made with")


def entry_of(table: dict[str, Any], made: bytes) -> dict[str, Any]:
    """Of a fingerprint; empty unless there is one that it is the fingerprint of."""
    entry = table.get(made.hex())
    with contextlib.suppress(ValueError, KeyError, TypeError):
        if fingerprint_of(entry) == made:
            return entry
    return {}


def safe(text: Any) -> str:
    """Anybody's text, without escapes that a terminal would obey."""
    return ascii(text).strip("'")[:100]


# -----------------------------------------------------------------------------
# Command line


def check_target(path: Path) -> None:
    """UserError, before hours of work, for a path where no new file can be made: it is made."""
    if os.path.lexists(path):
        raise exists(path)
    try:
        with endings.held():
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
            os.unlink(path)
    except FileExistsError:
        raise exists(path) from None
    except OSError as error:
        raise unwritable(path, error) from None


def place(path: Path, data: bytes, mode: int) -> None:
    """Write a new file with these rights, to the disk, whole or not at all; UserError if there is
    one."""
    remove_stale(path)
    partial = path.with_name(f".{mark_of(path)}{secrets.token_hex(8)}.partial")
    try:
        with open(partial, "xb", opener=lambda name, how: os.open(name, how, 0o600)) as file:
            file.write(data)
            file.flush()
            with contextlib.suppress(OSError):  # a disk without rights
                os.fchmod(file.fileno(), mode & 0o777)
            os.fsync(file.fileno())
        with endings.held():
            give_name(partial, path)
        flush_folder(path)
    except FileExistsError:
        raise exists(path) from None
    except OSError as error:
        raise unwritable(path, error) from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def mark_of(path: Path) -> str:
    """Of a file's partial ones, by which a later run knows them."""
    return f"{train_gpt.sha256(os.fsencode(path.name))[:16]}_"


def remove_stale(path: Path) -> None:
    """What kills and power cuts left of earlier runs that were to write this file."""
    for old in path.parent.glob(f".{mark_of(path)}*.partial"):
        with contextlib.suppress(OSError):
            if time.time() - old.lstat().st_mtime > STALE_SECONDS:
                old.unlink()


def give_name(partial: Path, path: Path) -> None:
    """Never replaces a file, unlike a rename; OSError."""
    try:
        os.link(partial, path)
    except FileExistsError:
        raise
    except OSError:  # a disk without hard links
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        try:
            os.replace(partial, path)
        except OSError:
            os.unlink(path)
            raise


def flush_folder(path: Path) -> None:
    """A power cut leaves the new file its name. OSError where the disk fails, and no file then."""
    try:
        train_gpt.flush_to_disk(path.parent)
    except OSError as error:
        if error.errno not in NEVER_FLUSHED:
            path.unlink(missing_ok=True)
            raise


class Source(NamedTuple):
    """A file as it was read."""

    data: bytes
    status: os.stat_result


def same_file(one: os.stat_result, other: os.stat_result) -> bool:
    """The same, and not written to in between."""
    return all(getattr(one, name) == getattr(other, name) for name in IDENTITY)


def read_source(path: Path, memory: int) -> Source:
    """A regular file; UserError for anything else, which may have no end, for one that changes
    meanwhile, and where `memory` bytes for each of its bytes are not free."""
    with open(path, "rb", opener=lambda name, how: os.open(name, how | os.O_NONBLOCK)) as file:
        status = os.fstat(file.fileno())  # of a FIFO, too: it was opened without waiting
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{path}: not a regular file; fix: copy what it holds to one")
        size = status.st_size
        train_gpt.require_memory(size * memory, f"{path}: a file of {size:,} bytes")
        data = file.read(size + 1)
        if len(data) != size or not same_file(status, os.fstat(file.fileno())):
            reason = "changes while it is read, or its size is not what it holds"
            raise UserError(f"{path}: {reason}; fix: give a copy of it")
    return Source(data, status)


def require_same(path: Path, status: os.stat_result) -> None:
    """UserError for a file that was written to or replaced since it was read. One that is gone is
    no fault: what was made of it is all that is left."""
    with contextlib.suppress(FileNotFoundError):
        if not same_file(status, os.stat(path)):
            raise changed(path)


def changed(path: Path) -> UserError:
    reason = "changed since it was read; nothing is written"
    return UserError(f"{path}: {reason}; fix: run it again, and let nobody write to it")


def unwritable(path: Path, error: OSError) -> UserError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    fix = "make room there" if full else "--output a name in a folder that can be written"
    return UserError(f"{path}: {error.strerror}; fix: {fix}")


def exists(path: Path) -> UserError:
    return UserError(f"{path}: exists already; fix: move it away, or --output another name")


def figures(what: str, size: int, total: int, more: str = "") -> str:
    """A line: bytes, ratio and bits per byte of a file of `total` bytes."""
    rates = f"ratio {total / size:.3f}  {8 * size / total:.4f} bits per byte" if total else ""
    return f"{what:<12} {size:>12,} bytes  {rates}  {more}".rstrip()


def others(data: bytes) -> dict[str, int]:
    """Bytes of a file by general compressors."""
    zstd = zstandard.ZstdCompressor(level=19).compress(data)
    return {"zstd -19": len(zstd), "xz -9": len(lzma.compress(data, preset=9))}


def compress_file(options: argparse.Namespace) -> None:
    """FILE -> FILE.pgz, and the figures."""
    path = options.file
    target = options.output or Path(f"{path}{SUFFIX}")
    data, status = read_source(path, CODING_MEMORY)
    check_target(target)
    require_device(options.device, f"--device {options.device}", "--device cpu")
    compressor = Compressor(options.artifact, options.tokenizer, options.device)
    after = ", then as long to check it" if options.check else ""
    packed = compressor.compress(data, options.lanes, after)
    speed = f"{packed.tokens / packed.seconds:,.0f} tokens/s"
    began = time.perf_counter()
    if options.check:
        compressor.check(packed.data, data, str(path))
    took = time.perf_counter() - began
    speed += f", restored in {took:.1f} s" if options.check else ", unchecked"
    compressor.require_unchanged()
    require_same(path, status)
    place(target, packed.data, status.st_mode)
    tokens = f"{packed.tokens:,} tokens"
    endings.say(printable(f"{path} -> {target}: {len(data):,} bytes in {tokens}"))
    endings.say(figures("pgz", len(packed.data), len(data), speed))
    try:
        finish(compressor, data)
    except Exception as error:  # the file is in place, whatever comes of the rest
        reason = f"{type(error).__name__}: {error}"
        endings.say(printable(f"note: {target} is written; then {reason}"), sys.stderr)


def finish(compressor: Compressor, data: bytes) -> None:
    """What is of use once a file is in place: words for later restores, others' figures."""
    compressor.remember()
    if len(data) <= MOST_COMPARED:
        for name, size in endings.in_thread(lambda: others(data)).items():
            endings.say(figures(name, size, len(data)))
    endings.say(f"apart, known to both sides: artifact and tokenizer, {compressor.apart:,} bytes")


def restore_file(options: argparse.Namespace) -> None:
    """FILE.pgz -> FILE."""
    path = options.file
    if path.suffix != SUFFIX and not options.output:
        raise UserError(f"{path}: its name does not end with {SUFFIX}; fix: give --output")
    target = options.output or path.with_suffix("")
    packed, status = read_source(path, CONTAINER_MEMORY)
    check_target(target)
    device = device_of(packed, str(path))
    require_device(device, f"{path}: made on {device}", "restore it where there is one")
    data = Compressor(options.artifact, options.tokenizer, device).restore(packed, str(path))
    place(target, data, status.st_mode)
    endings.say(printable(f"{path} -> {target}: {len(data):,} bytes"))


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The command line; exits with status 2 where it is wrong."""
    summary, _, details = (__doc__ or "\n").partition("\n")
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=summary, epilog=details, formatter_class=layout)
    add = parser.add_argument
    add("file", type=Path, metavar="FILE", help="to compress; with --restore a .pgz")
    add("--artifact", type=Path, required=True, help="artifact.bin of a run")
    add("--tokenizer", type=Path, help="default: tokenizer.model beside the artifact")
    add("--restore", action="store_true", help="write the file that a .pgz was made from")
    add("--output", type=Path, help="default: FILE.pgz, or FILE without it; never overwritten")
    add("--check", action=argparse.BooleanOptionalAction, help="restore it first; default: it is")
    add("--lanes", type=int, help="pieces coded side by side; default: by the length")
    add("--device", choices=DEVICES, help="to compress and restore on; default: cpu")
    options = parser.parse_args(arguments)
    own = {"--[no-]check": options.check, "--lanes": options.lanes, "--device": options.device}
    given = ", ".join(name for name, value in own.items() if value is not None)
    if options.restore and given:
        parser.error(f"{given}: of no use to --restore, which follows FILE; fix: leave it out")
    options.check = options.check is not False
    options.lanes = options.lanes or 0
    options.device = options.device or DEVICES[0]
    if not 0 <= options.lanes <= MOST_LANES:
        parser.error(
            f"--lanes {options.lanes}: give 1 to {MOST_LANES}, or 0 to choose by the length"
        )
    return options


def lacks_memory(error: Exception) -> bool:
    """Python and numpy say it by MemoryError, torch by its own or in words."""
    kinds = MemoryError, torch.OutOfMemoryError
    return isinstance(error, kinds) or bool(re.search("allocate memory|out of memory", str(error)))


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0, or 2 after one line on what is wrong; nothing is written then."""
    options = parse_arguments(arguments)
    try:
        (restore_file if options.restore else compress_file)(options)
    except (UserError, DataError, OSError) as error:
        what = str(error)
    except (MemoryError, RuntimeError) as error:
        if not lacks_memory(error):
            raise
        what = f"{options.file}: not enough memory; fix: in parts, or a machine with more"
    else:
        return 0
    endings.say(f"error: {printable(what)}", sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(endings.run(main, "no file is left half-written"))
