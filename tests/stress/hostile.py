"""What a folder of somebody else can hold in the place of an honest file: no file at all (PLACES,
each put at a path), or content that asks for more than it is (CONTENT, by the kind of file)."""

import functools
import gzip
import io
import json
import lzma
import os
import socket
import struct
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import compress
import mutate
import numpy as np
import zstandard
from helpers import train_gpt
from mutate import NESTED, PLACEHOLDER, Rng, choose

OUTSIDE = Path("outside")  # beside the folders that are read: nothing there may change
BOMB_BYTES = 3 * 10**8
EVIL = ["\x1b[2K\rPROVED val_bpb 0.1", "\x1b]0;title\x07", "\u202e1.0", "a\nPROVED b", "\x9b2J\0"]
INFINITE = ["NaN", "Infinity", "-Infinity", "1e400", "9" * 5000, "-" + "9" * 400]
BALANCED = "[" * 900 + "]" * 900  # parsed, but deeper than what comes after may go
HUGE = dict(
    EVAL_SEQ_LEN=4194304, EVAL_LANES=1 << 20, EVAL_BATCH_SEQS=1 << 20, EVAL_STRIDE=1 << 22,
    MODEL_DIM=1 << 20, NUM_LAYERS=10**6, BIGRAM_VOCAB_SIZE=10**9, VOCAB_SIZE=65536, MLP_MULT=10**6,
    NGRAM_MAX_ORDER=10**6, NGRAM_BUCKETS=1 << 40, TRAIN_SEQ_LEN=1 << 22, NGRAM_CACHES=10**9,
)  # fmt: skip


# -----------------------------------------------------------------------------
# In a file's place


def link(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


def link_outside(name: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to((OUTSIDE / name).resolve())


def sparse(size: int) -> Callable[[Path], None]:
    """A file of zeros that takes no room"""

    def make(path: Path) -> None:
        with open(path, "wb") as file:
            file.truncate(size)

    return make


def listening(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(path))


def full_folder(path: Path) -> None:
    (path / "deep").mkdir(parents=True)
    (path / "deep/file").write_bytes(b"x")


PLACES: dict[str, Callable[[Path], None]] = {
    "link to /dev/zero": link("/dev/zero"),
    "link to a file": link_outside("canary"),
    "dangling link": link_outside("new"),
    "link to a folder": link_outside(""),
    "link to itself": lambda path: path.symlink_to(path.name),
    "pipe": os.mkfifo,
    "socket": listening,
    "folder": full_folder,
    "missing": lambda path: None,
    "empty": Path.touch,
    "sparse, 40 GB": sparse(40 * 10**9),
    "sparse, 2 GB": sparse(2**31 - 1),
    "sparse, 16 MB": sparse(2**24),
}


# -----------------------------------------------------------------------------
# JSON and settings


def with_node(rng: Rng, tree: dict, value: object) -> bytes:
    """JSON in which a value, or sometimes a name, is another one"""
    tree = json.loads(json.dumps(tree))
    found = [place for place in mutate.places(tree) if place]
    place = choose(rng, found)
    parent = tree
    for key in place[:-1]:
        parent = parent[key]
    if isinstance(value, str) and value != PLACEHOLDER and rng.random() < 0.3:
        if isinstance(parent, dict):
            parent[value] = parent.pop(place[-1])
            return json.dumps(tree).encode()
    parent[place[-1]] = value
    return json.dumps(tree).encode()


def raw_node(rng: Rng, data: bytes, text: str) -> bytes:
    """The same, for what json.dumps would not write"""
    return with_node(rng, json.loads(data), PLACEHOLDER).replace(
        f'"{PLACEHOLDER}"'.encode(), text.encode()
    )


def doubled_key(rng: Rng, data: bytes) -> bytes:
    """A name twice, the first time with another value, at the top or below"""
    tree = json.loads(data)
    names = [place[-1] for place in mutate.places(tree) if place and isinstance(place[-1], str)]
    mark = f"{json.dumps(choose(rng, names))}: "
    text = json.dumps(tree)
    return text.replace(mark, f"{mark}{choose(rng, ('0.1', 'null', '{}'))}, {mark}", 1).encode()


JSON = {
    "doubled key": doubled_key,
    "escapes": lambda rng, data: with_node(rng, json.loads(data), choose(rng, EVIL)),
    "surrogate": lambda rng, data: with_node(rng, json.loads(data), choose(rng, "\ud800\udcff")),
    "infinite": lambda rng, data: raw_node(rng, data, choose(rng, INFINITE)),
    "nested": lambda rng, data: raw_node(rng, data, choose(rng, (NESTED, BALANCED))),
}


def in_a_line(change: Callable[[Rng, bytes], bytes]) -> Callable[[Rng, bytes], bytes]:
    def changed(rng: Rng, data: bytes) -> bytes:
        lines = data.splitlines()
        at = int(rng.integers(len(lines)))
        lines[at] = change(rng, lines[at])
        return b"\n".join(lines) + b"\n"

    return changed


def many(unit: bytes, size: int = 2**24 - 2**10) -> Callable[[Rng, bytes], bytes]:
    """The file, and so many bytes more in small units"""
    return lambda rng, data: data + unit * ((size - len(data)) // len(unit))


IN_A_LINE = {name: in_a_line(change) for name, change in JSON.items()}
LINES = IN_A_LINE | {
    "empty lines": many(b"\n"),
    "short lines": many(b'{"key":""}\n'),
    "raw surrogate": lambda rng, data: data + b'{"key":"\xed\xa0\x80"}\n',
}


def huge_setting(rng: Rng, data: bytes) -> bytes:
    """Of one name or two, in the place of the honest value"""
    names = [str(name) for name in rng.choice([*HUGE], int(rng.integers(1, 3)), False)]
    lines = [line for line in data.splitlines() if line.split(b"=")[0].decode() not in names]
    return b"\n".join([*lines, *(f"{name}={HUGE[name]}".encode() for name in names)]) + b"\n"


def evil_setting(rng: Rng, data: bytes) -> bytes:
    lines = data.splitlines()
    at = int(rng.integers(len(lines)))
    name, _, value = lines[at].partition(b"=")
    evil = choose(rng, EVIL).replace("\n", " ").encode()
    lines[at] = choose(rng, (name + b"=" + evil, evil + b"=" + value, evil))
    return b"\n".join(lines) + b"\n"


def doubled_setting(rng: Rng, data: bytes) -> bytes:
    line = choose(rng, data.splitlines())
    return data + line + b"\n" + line.partition(b"=")[0] + b"=7\n"


SETTINGS = {
    "huge setting": huge_setting,
    "escapes": evil_setting,
    "doubled setting": doubled_setting,
    "empty lines": many(b"\n"),
}


# -----------------------------------------------------------------------------
# Archives and packed texts


@functools.cache
def zeros(how: str) -> bytes:
    """BOMB_BYTES of them, packed"""
    piece = bytes(10**6)
    if how == "zst":
        packer = zstandard.ZstdCompressor().compressobj(size=BOMB_BYTES)
    else:
        packer = lzma.LZMACompressor(preset=0)
    parts = [packer.compress(piece) for _ in range(BOMB_BYTES // len(piece))]
    return b"".join([*parts, packer.flush()])


@functools.cache
def zeros_gz() -> bytes:
    buffer = io.BytesIO()
    with gzip.GzipFile(fileobj=buffer, mode="wb", compresslevel=1) as file:
        for _ in range(BOMB_BYTES // 10**6):
            file.write(bytes(10**6))
    return buffer.getvalue()


def members(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        return {name: file.read(name) for name in file.namelist()}


def doubled_member(rng: Rng, data: bytes) -> bytes:
    """The same name twice; the second one is of another number"""
    name, content = choose(rng, [*members(data).items()])
    buffer = io.BytesIO(data)
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "a") as file:
        warnings.simplefilter("ignore")
        file.writestr(name, content[:-8] + bytes(8))
    return buffer.getvalue()


def listed_again(count: int, others: bool) -> Callable[[Rng, bytes], bytes]:
    """A central directory that lists one member so many times, under its name or others"""

    def make(rng: Rng, data: bytes) -> bytes:
        with zipfile.ZipFile(io.BytesIO(data)) as file:
            name = choose(rng, file.namelist())
            start = file.start_dir
        end = data.rfind(b"PK\x05\x06")
        entries = data[start:end]
        at = entries.find(b"PK\x01\x02")
        while at >= 0:
            sizes = struct.unpack("<3H", entries[at + 28 : at + 34])
            size = 46 + sum(sizes)
            if entries[at + 46 : at + 46 + sizes[0]] == name.encode():
                break
            at += size
        entry = entries[at : at + size]
        more = [entry] * count
        if others:
            digits = sizes[0]
            head, tail = entry[:46], entry[46 + digits :]
            more = [head + f"{i:0{digits}}"[-digits:].encode() + tail for i in range(count)]
        listing = entries + b"".join(more)
        number = min(count + 3, 65535)
        tail = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, number, number, len(listing), start, 0)
        return data[:start] + listing + tail

    return make


@functools.cache
def npz_bomb(data: bytes, lies: bool) -> bytes:
    """One column of BOMB_BYTES zeros, deflated; its size is told, or is that of the honest one"""
    found = members(data)
    largest = max(found, key=lambda name: len(found[name]))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        for name, content in found.items():
            with file.open(name, "w") as member:
                member.write(content)
                for _ in range(BOMB_BYTES // 10**6 if name == largest else 0):
                    member.write(bytes(10**6))
    honest = len(found[largest])
    told = struct.pack("<L", BOMB_BYTES + honest)
    return buffer.getvalue().replace(told, struct.pack("<L", honest) if lies else told)


NPZ = {
    "doubled member": doubled_member,
    "member listed 60,000 times": listed_again(60_000, False),
    "60,000 names of a member": listed_again(60_000, True),
    "900,000 names of a member": listed_again(900_000, True),
    "bomb": lambda rng, data: npz_bomb(data, False),
    "bomb that lies": lambda rng, data: npz_bomb(data, True),
}


# -----------------------------------------------------------------------------
# Containers


def giant(rng: Rng, data: bytes) -> bytes:
    """An artifact whose header is consistent and asks for up to 2e9 parameters; its payload is
    short, or as long as it says where that is no more than BOMB_BYTES"""
    header, _ = train_gpt.unseal(train_gpt.ARTIFACT_PREFIX, data)
    cfg = train_gpt.Config(
        **train_gpt.stored_values(header["model"], train_gpt.MODEL_FIELDS), eval_stride=1
    )
    size = choose(rng, (dict(model_dim=8192, num_layers=11), dict(bigram_vocab_size=10**7),
                        dict(bigram_vocab_size=2**31 // 64), dict(num_layers=10**5),
                        dict(bigram_vocab_size=10**6, bigram_dim=280)))  # fmt: skip
    try:
        big = train_gpt.artifact_header(replace(cfg, **size, compressor="zstd"))
    except ValueError:  # more than a payload can have: nothing is consistent then
        big = header | dict(model=header["model"] | {name: str(n) for name, n in size.items()})
    packer = zstandard.ZstdCompressor().compressobj(size=big["size"])
    if big["size"] > BOMB_BYTES * 1.5 or rng.random() < 0.3:
        packed = packer.compress(b"0") + packer.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
    else:
        packed = b"".join(packer.compress(bytes(min(10**6, big["size"] - at)))
                          for at in range(0, big["size"], 10**6)) + packer.flush()  # fmt: skip
    return train_gpt.seal(train_gpt.ARTIFACT_PREFIX, big, packed)


def payload_bomb(rng: Rng, data: bytes) -> bytes:
    """The honest header before BOMB_BYTES of zeros"""
    header, _ = train_gpt.unseal(train_gpt.ARTIFACT_PREFIX, data)
    how = choose(rng, ("zst", "xz"))
    header["model"]["compressor"] = "lzma" if how == "xz" else "zstd"
    return train_gpt.seal(train_gpt.ARTIFACT_PREFIX, header, zeros(how))


def stream_lies(rng: Rng, data: bytes) -> bytes:
    """A plan, threads or device that would take all memory or time"""
    header, words = train_gpt.unseal(train_gpt.STREAM_PREFIX, data)
    at = int(rng.integers(len(header["shape"]) + 3))
    number = int(choose(rng, (0, 7, 1000, 8000, 10**6, 2**22, 2**31, 2**40, 2**63)))
    if at < len(header["shape"]):
        header["shape"][at] = number
        if rng.random() < 0.5:
            header["shape"][int(rng.integers(len(header["shape"])))] = number
    elif at == len(header["shape"]):
        header["cuts"] = [number, int(choose(rng, (0, 1, number)))]
    elif at == len(header["shape"]) + 1:
        header["scoring"]["lane_ttt"] = "1"
        header["scoring"]["lane_ttt_every"] = str(choose(rng, (1, 16, 1024)))
    else:
        header["made"]["threads"] = number
    return train_gpt.seal(train_gpt.STREAM_PREFIX, header, words)


def header_lies(prefix: bytes) -> Callable[[Rng, bytes], bytes]:
    """A hostile value in the signed header"""

    def make(rng: Rng, data: bytes) -> bytes:
        header, payload = train_gpt.unseal(prefix, data)
        change = JSON[choose(rng, [*JSON])]
        return mutate.signed(prefix, change(rng, json.dumps(header).encode()), payload)

    return make


def pgz_bomb(rng: Rng, data: bytes) -> bytes:
    """Zeros in xz as what was kept aside; the size says so, says less or far more"""
    header, payload = compress.open_container(data, "a seed")
    size = int(choose(rng, (len(payload), BOMB_BYTES, BOMB_BYTES // 2, 12 * 10**9)))
    header = header._replace(size=size)
    kept = sum(taken for _, taken in header.blocks)
    if rng.random() < 0.5:
        header = header._replace(tokens=0, blocks=())
        kept = 0
    return compress.seal(header, payload[:kept] + zeros("xz"))


def pgz_lies(rng: Rng, data: bytes) -> bytes:
    """A hostile number in the header, which its check fits"""
    header, payload = compress.open_container(data, "a seed")
    number = int(choose(rng, (0, 1, 2**31, 2**40, 2**62)))
    what = choose(rng, ("threads", "size", "tokens", "lanes", "taken"))
    lanes, taken = header.blocks[0]
    if what == "lanes":
        header = header._replace(blocks=((number, taken), *header.blocks[1:]))
    elif what == "taken":
        header = header._replace(blocks=((lanes, number), *header.blocks[1:]))
    else:
        header = header._replace(**{what: number})
    return compress.seal(header, payload)


def signed_tensors(rng: Rng, data: bytes) -> bytes:
    """A .safetensors whose own header lies; its .json is signed to fit, below"""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    how = rng.random()
    if how < 0.3:
        number = int(choose(rng, (2**63, 2**62, 2**40, 2**31, 0)))
        changed = number.to_bytes(8, "little") + data[8:]
    else:
        entry = header[choose(rng, [name for name in header if name != "__metadata__"])]
        number = int(choose(rng, (2**62, 2**40, 10**9, 0)))
        place = choose(rng, ("shape", "data_offsets"))
        entry[place] = choose(rng, ([number], [0, number], [number, number], [], [number] * 3))
        text = json.dumps(header).encode()
        changed = len(text).to_bytes(8, "little") + text + data[8 + size :]
    return changed


def sign_checkpoint(tensors: bytes) -> None:
    """The .json beside them gets their sha256."""
    path = Path(mutate.CHECKPOINT + ".json")
    state = json.loads(path.read_bytes())["state"]
    digest = train_gpt.sha256(json.dumps(state).encode() + tensors)
    path.write_bytes(json.dumps(dict(state=state, sha256=digest)).encode())


def signed_state(rng: Rng, data: bytes) -> bytes:
    """A hostile value in a checkpoint's state, signed as Python reads it"""
    change = JSON[choose(rng, ("escapes", "surrogate", "infinite"))]
    state = json.loads(change(rng, json.dumps(json.loads(data)["state"]).encode()))
    return mutate.json_text(dict(state=state, sha256=mutate.checkpoint_seal(state)))


def long_shard(rng: Rng, data: bytes) -> bytes:
    """A header that promises as many tokens as it can"""
    fields = np.frombuffer(data[:1024], "<i4").copy()
    fields[2] = choose(rng, (2**31 - 1, 2**30, -1, -(2**31)))
    return fields.tobytes() + data[1024:]


CONTENT: dict[str, dict[str, Callable[[Rng, bytes], bytes]]] = {
    "": {},
    "json": JSON,
    "lines": LINES,
    "text lines": IN_A_LINE,
    "log": {"empty lines": many(b"\n")},
    "settings": SETTINGS,
    "npz": NPZ,
    "artifact": {
        "giant model": giant,
        "bomb": payload_bomb,
        "header": header_lies(train_gpt.ARTIFACT_PREFIX),
    },
    "stream": {"plan": stream_lies, "header": header_lies(train_gpt.STREAM_PREFIX)},
    "pgz": {"bomb": pgz_bomb, "header": pgz_lies},
    "tensors": {"tensors that lie": signed_tensors},
    "state": JSON | {"signed state": signed_state},
    "shard": {"shard that lies": long_shard},
    "gz": {"bomb": lambda rng, data: zeros_gz()},
    "xz": {"bomb": lambda rng, data: zeros("xz")},
}
