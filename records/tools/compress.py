"""Compress any file with a trained artifact, and restore it.

    python records/tools/compress.py FILE --artifact runs/tiny_seed1337/artifact.bin
    python records/tools/compress.py --restore FILE.pgz --artifact runs/tiny_seed1337/artifact.bin

The file is cut into tokens, and these are coded by the distribution that val_bpb is the code length
of: the artifact's model and the n-grams of the file so far (train_gpt.py, section 12). Both sides
need the artifact, its tokenizer and the same train_gpt.py; neither is in the .pgz. Text like that
which the artifact was trained on becomes small; for other files a general compressor is better.

Every byte is carried: what is no UTF-8, or what the tokenizer alters, is spelt in its byte tokens;
where it has none, those bytes are kept aside. A block that the model makes larger is stored as it
is. The file is restored once from what will be written before that is put in place.

The tokens are dealt out to lanes, one contiguous piece each, that are coded side by side: more
lanes are faster, fewer let a piece see more of what came before. A .pgz is a container of
train_gpt.seal: JSON header (bytes, sha256 of file and tokenizer, fingerprint of code, artifact,
libraries and machine, settings of the scorer, plan and size of each block), the blocks, the bytes
kept aside. It restores on machines whose floating point is the same, and says so where it is not.
"""

import argparse
import contextlib
import lzma
import os
import re
import secrets
import signal
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":  # long spins of idle threads slow a shared CPU
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # libgomp reads it at load
    for number in (signal.SIGINT, signal.SIGTERM):  # while the imports take their seconds
        signal.signal(number, lambda n, _: os._exit(os.write(2, b"interrupted\n") and 128 + n))

import numpy as np
import torch
import zstandard
from run_folder import blame  # puts train_gpt and data/ on the path
from tqdm import tqdm

import endings
import train_gpt
from prepare_text import DataError, encode_documents, free_memory, load_tokenizer
from train_gpt import BOS, CodingPlan, Config, UserError, printable

SUFFIX, PREFIX = ".pgz", b"PGZ\x01"
LANES, LANE_TOKENS = 32, 512  # lanes at most; tokens in each at least
MOST_LANES, THREADS = 4096, 1024  # that can be asked for, by --lanes or by a container
BLOCK_TOKENS = 1 << 19  # coded on their own: counts take about 3 KB of memory a token
CODING_MEMORY = 64  # bytes that a byte of a file takes at most while it is cut into tokens
RESTORE_MEMORY = 8  # and while it is put together
ASIDE_MEMORY = 1 << 28  # of the decoder of what is kept aside; xz -6, as written, takes 9 MB
CONTAINER_MEMORY = 4  # a byte of a container: as read, without its seal, in parts
SAY_AFTER = 2.0  # seconds of coding after which the rest can be told
SETTINGS = "eval_seq_len ngram_enabled ngram_mixer ngram_min_order ngram_max_order".split()
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
    header: dict[str, Any]
    tokens: int
    seconds: float  # of coding


class Progress(train_gpt.Runtime):
    """A Runtime with one bar for all blocks, where a person waits; elsewhere a line, once it can
    be told how long all will take."""

    def bar_of(self, what: str, tokens: int) -> Any:
        """A bar on standard error if that is a terminal; a context manager."""
        self.whole = tqdm(total=tokens, desc=what, unit="tok", disable=None)
        self.what = what
        self.done = 0  # tokens of the block
        self.all_done = 0
        self.first: tuple[float, int] | None = None  # time and tokens where the measure begins
        self.said = not self.whole.disable
        return self.whole

    def tick(self, stage: str, done: int, total: int) -> None:
        """Of a block, whose lanes also end with a token each."""
        more = min(done - self.done, self.whole.total - self.all_done)
        self.whole.update(more)
        self.all_done += more
        self.done = done if done < total else 0
        now = time.perf_counter()
        if not self.first:  # behind us: what only the first step waits for
            self.first = now, self.all_done
        spent, coded = now - self.first[0], self.all_done - self.first[1]
        if not self.said and coded and spent >= SAY_AFTER:
            self.said = True
            rest = spent * (self.whole.total - self.all_done) / coded
            line = f"{self.what}: {self.whole.total:,} tokens, about {duration(rest)} to go"
            endings.say(line, sys.stderr)


def duration(seconds: float) -> str:
    """In the largest unit of which it is two at least."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


# -----------------------------------------------------------------------------
# Bytes and tokens


def spelling(path: Path, vocab_size: int) -> Spelling:
    """The tokenizer of a file; UserError or DataError unless it fits a model of vocab_size
    tokens."""
    tokenizer = load_tokenizer(path)
    ids = [*range(tokenizer.vocab_size())]
    if len(ids) != vocab_size:
        fix = "give the one the artifact was trained with"
        raise UserError(f"{path}: {len(ids)} pieces, the artifact has {vocab_size}; fix: {fix}")
    pieces, letters = [], {}
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


def deal(tokens: np.ndarray, lanes: int) -> np.ndarray:
    """The stream of a block: a BOS before each of `lanes` even pieces, fewer if tokens are;
    uint16"""
    pieces = np.array_split(tokens, max(1, min(lanes, len(tokens))))
    return np.concatenate([np.append(np.uint16(BOS), piece) for piece in pieces])


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


class Compressor:
    """An artifact and its tokenizer, ready to code files."""

    def __init__(self, artifact: Path, tokenizer: Path | None = None, device: str = "cpu"):
        """tokenizer: else tokenizer.model beside the artifact. UserError, DataError, OSError"""
        self.artifact = artifact
        self.tokenizer = tokenizer or artifact.with_name("tokenizer.model")
        self.rt = Progress(Config(device=device))
        self.rt.start()
        content = read_regular(artifact, CONTAINER_MEMORY)
        self.model = train_gpt.load_artifact(artifact, self.rt.device, content)
        read_regular(self.tokenizer, CONTAINER_MEMORY)  # else it could wait for ever
        self.spelt = spelling(self.tokenizer, self.model.cfg.vocab_size)
        self.known = artifact.stat().st_size + self.tokenizer.stat().st_size  # bytes, to both sides

    def config(self, scoring: dict[str, str], lanes: int) -> Config:
        """What train_gpt codes by: the artifact's model, these settings, lanes at most."""
        model = {name: getattr(self.model.cfg, name) for name in train_gpt.MODEL_FIELDS}
        values = {name: train_gpt.parse(name.upper(), text) for name, text in scoring.items()}
        return Config(**model | values, eval_lanes=lanes)

    def made(self) -> dict[str, Any]:
        """Whatever the code depends on, by name."""
        digest = train_gpt.sha256(self.tokenizer.read_bytes())
        return dict(tokenizer=digest) | train_gpt.fingerprint(
            self.rt, train_gpt.CODE.read_bytes(), self.artifact.read_bytes()
        )

    def compress(self, data: bytes, lanes: int = 0) -> Packed:
        """Any bytes -> Packed. lanes: 0 chooses by the number of tokens."""
        began = time.perf_counter()
        tokens, held = tokenise(self.spelt, data)
        lanes = lanes or min(LANES, max(1, len(tokens) // LANE_TOKENS))
        scoring = defaults()
        cfg = self.config(scoring, lanes)
        blocks = []
        parts = []
        with self.rt.bar_of("compressing", len(tokens)):
            for a in range(0, len(tokens), BLOCK_TOKENS):
                block = tokens[a : a + BLOCK_TOKENS]
                stream = deal(block, lanes)
                raw = self.text(block)
                plan = CodingPlan.of(stream, cfg, 1)
                words, _ = train_gpt.encode(self.model, self.rt, cfg, stream, plan)
                smaller = len(words) < len(raw)
                blocks.append([plan if smaller else None, len(words if smaller else raw)])
                parts.append(words if smaller else raw)
        parts.append(b"" if held.all() else keep_aside(data, held))
        header = dict(bytes=len(data), sha256=train_gpt.sha256(data), made=self.made())
        header |= dict(scoring=scoring, blocks=blocks)
        packed = train_gpt.seal(PREFIX, header, b"".join(parts))
        return Packed(packed, header, len(tokens), time.perf_counter() - began)

    def text(self, tokens: np.ndarray) -> bytes:
        """What tokens stand for."""
        return b"".join([self.spelt.pieces[i] for i in tokens.tolist()])

    def restore(self, packed: bytes, name: str = "the container") -> bytes:
        """The file; UserError if `packed`, called `name`, is damaged or of other making."""
        header, payload = open_container(packed, name)
        with blame(name):
            torch.set_num_threads(min(header["made"]["threads"], THREADS))
            fits(header, self.made(), name)
            data = self.unpack(header, payload)
        if train_gpt.sha256(data) != header["sha256"]:
            raise UserError(f"{name}: restores to other bytes; fix: use the machine it was made on")
        return data

    def unpack(self, header: dict[str, Any], payload: bytes) -> bytes:
        """What the blocks hold and what was kept aside, together; any exception for a lie"""
        blocks = [(plan and read_plan(plan), size) for plan, size in header["blocks"]]
        plans = [plan for plan, _ in blocks if plan]
        for plan in plans:
            check_plan(plan, self.config(header["scoring"], plan.lanes), header)
        check_sizes(header, [size for _, size in blocks], plans, payload)
        parts = []
        with self.rt.bar_of("restoring", sum(plan.targets for plan in plans)):
            for plan, size in blocks:
                part = payload[:size]
                payload = payload[size:]
                if plan:
                    cfg = self.config(header["scoring"], plan.lanes)
                    with contextlib.suppress(ValueError):  # words that no coder can have made
                        text = train_gpt.decode(self.model, self.rt, cfg, part, plan).text
                        part = self.text(text[text != BOS])
                parts.append(part)
        data = b"".join(parts)
        return put_back(data, payload, header["bytes"]) if payload else data


def check_sizes(
    header: dict[str, Any], sizes: list[int], plans: list[CodingPlan], payload: bytes
) -> None:
    """ValueError for sizes that no file can have: memory and time are taken according to them."""
    if not all(type(size) is int and size >= 0 for size in [header["bytes"], *sizes]):
        raise ValueError("its sizes are no numbers")
    if sum(sizes) > len(payload):
        raise ValueError("its blocks are more than it holds")
    tokens = sum(plan.targets - plan.lanes for plan in plans)
    if tokens > header["bytes"]:  # a token is a byte at least; each lane ends with one more
        raise ValueError(f"its blocks have {tokens} tokens for {header['bytes']} bytes")
    if header["bytes"] * RESTORE_MEMORY > free_memory():
        raise ValueError(f"it claims {header['bytes']:,} bytes, more than the memory free here")


def read_plan(numbers: list[Any]) -> CodingPlan:
    """Of a header, where a tuple is a list."""
    plan = CodingPlan(*numbers)
    return plan._replace(ahead=tuple(plan.ahead))


def check_plan(plan: CodingPlan, cfg: Config, header: dict[str, Any]) -> None:
    """ValueError for a plan that `compress` makes of no file: memory is taken according to it."""
    wanted = plan._replace(documents=plan.lanes, groups=1, window=cfg.window, ahead=())
    sizes = 1 <= plan.lanes <= min(MOST_LANES, plan.targets, BLOCK_TOKENS + 1)
    sizes = sizes and plan.targets < BLOCK_TOKENS + plan.lanes  # a BOS between the pieces
    if plan != wanted or not sizes or header["scoring"] != defaults():
        raise ValueError(f"its plan is {[*plan]}")


def defaults() -> dict[str, str]:
    """The settings of the scorer, as text"""
    return {name: train_gpt.show(getattr(Config(), name)) for name in SETTINGS}


def open_container(packed: bytes, name: str) -> tuple[dict[str, Any], bytes]:
    """-> header, payload; UserError for anything damaged"""
    with blame(name):
        return train_gpt.unseal(PREFIX, packed)


def device_of(packed: bytes, name: str) -> str:
    """Where a container was made: cpu or cuda"""
    with blame(name):
        return open_container(packed, name)[0]["made"]["device"].split()[0]


def fits(header: dict[str, Any], here: dict[str, Any], name: str) -> None:
    """UserError, by name, for what a container was made with and is another here."""
    for what, value in here.items():
        if header["made"][what] != value:
            made = ascii(header["made"][what]).strip("'")[:100]  # anybody's: no escapes
            raise UserError(
                f"{name}: made with {what} {made}, here it is {value}; fix: use that one"
            )


# -----------------------------------------------------------------------------
# Command line


def check_target(path: Path) -> None:
    """UserError, before hours of work, for a path where no new file can be made: it is made."""
    if os.path.lexists(path):
        raise exists(path)
    try:
        with endings.held():
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            os.unlink(path)
    except FileExistsError:
        raise exists(path) from None
    except OSError as error:
        fix = "--output a name in a folder that can be written"
        raise UserError(f"{path}: {error.strerror}; fix: {fix}") from None


def place(path: Path, data: bytes) -> None:
    """Write a new file, whole or not at all; UserError if there is one."""
    partial = path.with_name(f".{secrets.token_hex(8)}.partial")
    try:
        with open(partial, "xb") as file:
            file.write(data)
        with endings.held():
            give_name(partial, path)
    except FileExistsError:
        raise exists(path) from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; fix: make room there") from None
    finally:
        partial.unlink(missing_ok=True)


def give_name(partial: Path, path: Path) -> None:
    """Never replaces a file, unlike a rename; OSError."""
    try:
        os.link(partial, path)
    except FileExistsError:
        raise
    except OSError:  # a disk without hard links
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        os.replace(partial, path)


def read_regular(path: Path, memory: int) -> bytes:
    """A regular file; UserError for anything else, which may have no end, and for one with more
    than a `memory`th of the bytes free here."""
    with open(path, "rb", opener=lambda name, how: os.open(name, how | os.O_NONBLOCK)) as file:
        status = os.fstat(file.fileno())  # of a FIFO, too: it was opened without waiting
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{path}: not a regular file; fix: copy what it holds to one")
        most = free_memory() // memory
        if status.st_size > most:
            size = f"{status.st_size:,} bytes, {most:,} fit the memory free here"
            raise UserError(f"{path}: {size}; fix: in parts, or a machine with more")
        return file.read(status.st_size + 1)


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
    target = options.output or Path(f"{options.file}{SUFFIX}")
    data = read_regular(options.file, CODING_MEMORY)
    check_target(target)
    compressor = Compressor(options.artifact, options.tokenizer, options.device)
    packed = compressor.compress(data, options.lanes)
    began = time.perf_counter()
    if options.check and compressor.restore(packed.data, str(target)) != data:
        raise UserError(f"{target}: does not restore to {options.file}; nothing is written")
    speed = f"{packed.tokens / packed.seconds:,.0f} tokens/s"
    speed += (
        f", restored in {time.perf_counter() - began:.1f} s" if options.check else ", unchecked"
    )
    place(target, packed.data)
    endings.say(f"{options.file} -> {target}: {len(data):,} bytes in {packed.tokens:,} tokens")
    endings.say(figures("pgz", len(packed.data), len(data), speed))
    for name, size in endings.in_thread(lambda: others(data)).items():
        endings.say(figures(name, size, len(data)))
    endings.say(f"apart, known to both sides: artifact and tokenizer, {compressor.known:,} bytes")


def restore_file(options: argparse.Namespace) -> None:
    """FILE.pgz -> FILE."""
    path, target = options.file, options.output or options.file.with_suffix("")
    if path.suffix != SUFFIX and not options.output:
        raise UserError(f"{path}: its name does not end with {SUFFIX}; fix: give --output")
    packed = read_regular(path, CONTAINER_MEMORY)
    check_target(target)
    device = device_of(packed, str(path))
    data = Compressor(options.artifact, options.tokenizer, device).restore(packed, str(path))
    place(target, data)
    endings.say(f"{path} -> {target}: {len(data):,} bytes")


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
    add("--check", action=argparse.BooleanOptionalAction, default=True, help="restore it first")
    add("--lanes", type=int, default=0, help="pieces coded side by side; default: by the length")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="to compress on; a restore's too")
    options = parser.parse_args(arguments)
    if not 0 <= options.lanes <= MOST_LANES:
        parser.error(
            f"--lanes {options.lanes}: give 1 to {MOST_LANES}, or 0 to choose by the length"
        )
    return options


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0, or 2 after one line on what is wrong; nothing is written then."""
    options = parse_arguments(arguments)
    try:
        (restore_file if options.restore else compress_file)(options)
    except (UserError, DataError, OSError, MemoryError) as error:
        what = str(error) or "not enough memory; fix: in parts, or a machine with more"
        endings.say(f"error: {printable(what)}", sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(endings.run(main, "no file is left half-written"))
