"""Ways to break a file, drawn from a numpy Generator: bytes, JSON, signed containers, archives."""

import contextlib
import hashlib
import io
import json
import lzma
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import zstandard
from helpers import train_gpt

NUMBERS = [0, 1, 2, 3, 5, 255, 256, 1000, 2**15, 2**16 - 1, 2**16, 10**6, 2**31 - 1, 2**31, 2**32]
NUMBERS += [2**40, 2**53, 2**62, 2**63 - 1, 2**63, 2**64, 10**30, 10**400]
NUMBERS += [-1, -2, -(2**31), -(2**63), 0.5, 1e-300, 1e300, float("inf"), float("nan"), -0.0]
WORDS = [
    "",
    "0",
    "x",
    "..",
    "../x",
    "\0",
    "\ud800",
    "1e9",
    "true",
    "9" * 5000,
    "%s%n",
    "🎲",
    "a\nb",
]
VALUES = [*NUMBERS, *WORDS, None, True, False, [], {}, [[]], [1, 2, 3], {"key": 1}]
NESTED = "[" * 100_000  # deeper than any parser's stack
PLACEHOLDER = "nested-here"
SHAPES = ("(9223372036854775807,)", "(1099511627776,)", "(4294967296, 4294967296)", "(-1,)")
SHAPES += ("(1.5,)", "()", "((),)", "(10000000,)", "(0, 18446744073709551616)", "(2, 1)")
Rng = np.random.Generator


def choose(rng: Rng, options: Any) -> Any:
    return options[int(rng.integers(len(options)))]


def span(rng: Rng, data: bytes, most: int = 64) -> tuple[int, int]:
    """A stretch of the data, as a rule short, sometimes of any length."""
    start = int(rng.integers(len(data) + 1))
    limit = most if rng.random() < 0.8 else max(1, len(data))
    return start, min(len(data), start + int(rng.integers(1, limit + 1)))


# -----------------------------------------------------------------------------
# Bytes


def flip(rng: Rng, data: bytes) -> bytes:
    """Up to eight bits, anywhere or near the start, where the headers are."""
    changed = bytearray(data)
    reach = len(data) if rng.random() < 0.7 else min(len(data), 64)
    for place in rng.integers(reach, size=rng.integers(1, 9)) if reach else []:
        changed[place] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def truncate(rng: Rng, data: bytes) -> bytes:
    return data[: int(rng.integers(len(data) + 1))]


def insert(rng: Rng, data: bytes) -> bytes:
    place, _ = span(rng, data)
    return data[:place] + rng.bytes(int(rng.integers(1, 64))) + data[place:]


def delete(rng: Rng, data: bytes) -> bytes:
    start, end = span(rng, data)
    return data[:start] + data[end:]


def swap(rng: Rng, data: bytes) -> bytes:
    """Two stretches that follow each other change places."""
    (a, b), (_, c) = span(rng, data), span(rng, data)
    a, b, c = sorted((a, b, c))
    return data[:a] + data[b:c] + data[a:b] + data[c:]


def blank(rng: Rng, data: bytes) -> bytes:
    start, end = span(rng, data)
    return data[:start] + choose(rng, (b"\0", b"\xff", b" ")) * (end - start) + data[end:]


def append(rng: Rng, data: bytes) -> bytes:
    more = choose(rng, (b"\0", b"\n", rng.bytes(40), data[:200], data))
    return data + more


def repeat(rng: Rng, data: bytes) -> bytes:
    start, end = span(rng, data)
    return data[:end] + data[start:end] + data[end:]


def binary_number(rng: Rng, data: bytes) -> bytes:
    """Four or eight bytes become another number, often at an even place near the start."""
    number, size = int(choose(rng, NUMBERS[:19])), choose(rng, (2, 4, 8))
    place = int(rng.integers(max(1, len(data)))) if rng.random() < 0.5 else int(rng.integers(8)) * 4
    written = (number % 2 ** (8 * size)).to_bytes(size, choose(rng, ("little", "little", "big")))
    return data[:place] + written + data[place + size :]


def text_number(rng: Rng, data: bytes) -> bytes:
    """A run of digits becomes another number or a word."""
    digits = [i for i, byte in enumerate(data[:100_000]) if 48 <= byte <= 57]
    if not digits:
        return binary_number(rng, data)
    end = start = choose(rng, digits)
    while end < len(data) and 48 <= data[end] <= 57:
        end += 1
    written = str(choose(rng, [*NUMBERS, *WORDS])).encode("utf-8", "surrogatepass")
    return data[:start] + written + data[end:]


BYTES = [flip, flip, truncate, insert, delete, swap, blank, append, repeat, binary_number]


def any_bytes(rng: Rng, data: bytes) -> bytes:
    return choose(rng, [*BYTES, text_number])(rng, data)


# -----------------------------------------------------------------------------
# JSON and lines


def places(tree: Any, path: tuple = ()) -> list[tuple]:
    """Paths to all nodes of a JSON tree."""
    items = (
        tree.items() if isinstance(tree, dict) else enumerate(tree) if list is type(tree) else ()
    )
    return [path] + [place for key, node in items for place in places(node, (*path, key))]


def twisted(rng: Rng, value: Any) -> Any:
    """Another value in the place of this one: of its type, of another, or a neighbour."""
    if isinstance(value, int | float) and rng.random() < 0.4:
        return choose(rng, (value + 1, value - 1, -value, value * 2, float(value), str(value)))
    if isinstance(value, str) and rng.random() < 0.5:
        return str(choose(rng, NUMBERS)) if rng.random() < 0.5 else value[::-1]
    return PLACEHOLDER if rng.random() < 0.05 else choose(rng, VALUES)


def json_tree(rng: Rng, tree: Any) -> Any:
    """A copy with one to three nodes changed, lost, doubled or renamed."""
    tree = json.loads(json.dumps(tree))
    for _ in range(int(rng.integers(1, 4))):
        place = choose(rng, places(tree))
        if not place:
            tree = twisted(rng, tree) if rng.random() < 0.05 else tree
            continue
        parent = tree
        for key in place[:-1]:
            parent = parent[key]
        how = rng.random()
        if how < 0.75:
            parent[place[-1]] = twisted(rng, parent[place[-1]])
        elif how < 0.9:
            parent.pop(place[-1])
        elif isinstance(parent, dict):
            parent[str(choose(rng, WORDS))] = parent[place[-1]]
        else:
            parent.append(parent[place[-1]])
    return tree


def json_text(tree: Any, **how: Any) -> bytes:
    text = json.dumps(tree, **how).replace(f'"{PLACEHOLDER}"', NESTED)
    return text.encode("utf-8", "surrogatepass")


def json_file(rng: Rng, data: bytes) -> bytes:
    if rng.random() < 0.3:
        return any_bytes(rng, data)
    return json_text(json_tree(rng, json.loads(data)), indent=2)


def json_lines(rng: Rng, data: bytes) -> bytes:
    """One to three lines of JSON twisted; lines lost, doubled or out of order."""
    if rng.random() < 0.25:
        return any_bytes(rng, data)
    lines = data.splitlines()
    for _ in range(int(rng.integers(1, 4))):
        at = int(rng.integers(len(lines)))
        how = rng.random()
        if how < 0.8:
            with contextlib.suppress(ValueError, RecursionError):  # broken already
                lines[at] = json_text(json_tree(rng, json.loads(lines[at])))
        elif how < 0.9:
            lines.insert(int(rng.integers(len(lines))), lines[at])
        elif len(lines) > 1:
            lines.pop(at)
    return b"\n".join(lines) + b"\n"


def settings(rng: Rng, data: bytes) -> bytes:
    """NAME=value lines: values and names replaced, lines broken."""
    if rng.random() < 0.3:
        return any_bytes(rng, data)
    lines = data.decode().splitlines()
    for _ in range(int(rng.integers(1, 4))):
        at = int(rng.integers(len(lines)))
        name, _, value = lines[at].partition("=")
        written = str(choose(rng, VALUES)).replace("\n", " ")
        options = (f"{name}={written}", f"{name}={written}", f"{name},{value}", f"X{name}={value}")
        lines[at] = choose(rng, options)
    return "\n".join(lines).encode("utf-8", "surrogatepass")


# -----------------------------------------------------------------------------
# Signed containers and archives


def signed(prefix: bytes, header: bytes, payload: bytes, length: int | None = None) -> bytes:
    """What train_gpt.seal writes, with any bytes as the header and any length before it."""
    length = len(header) if length is None else length % 2**32
    return resigned(prefix + length.to_bytes(4, "little") + header + payload)


def container(prefix: bytes, payloads: Callable[[Rng, bytes], bytes] = any_bytes):
    """A mutation of sealed files; most are signed anew, so that what is behind the seal is read."""

    def mutate(rng: Rng, data: bytes) -> bytes:
        header, payload = train_gpt.unseal(prefix, data)
        text, how = json.dumps(header, separators=(",", ":")).encode(), rng.random()
        if how < 0.2:
            return any_bytes(rng, data)
        if how < 0.3:
            return resigned(any_bytes(rng, data[:-32]))
        if how < 0.75:
            return signed(prefix, json_text(json_tree(rng, header), separators=(",", ":")), payload)
        if how < 0.8:
            return signed(prefix, any_bytes(rng, text), payload)
        if how < 0.85:
            return signed(
                prefix, text, payload, choose(rng, (0, 1, len(text) - 1, len(text) + 1, -1))
            )
        return signed(prefix, text, payloads(rng, payload))

    return mutate


def resigned(body: bytes) -> bytes:
    return body + hashlib.sha256(body).digest()


def weights(rng: Rng, payload: bytes) -> bytes:
    """An artifact's payload: damaged as it is, or unpacked, damaged and packed again."""
    if rng.random() < 0.4:
        return any_bytes(rng, payload)
    raw = any_bytes(rng, zstandard.ZstdDecompressor().decompress(payload))
    if rng.random() < 0.3:
        frame = zstandard.ZstdCompressor().compressobj(
            size=choose(rng, (2**62, 2**31, len(raw) + 1))
        )
        return frame.compress(raw) + frame.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
    return zstandard.ZstdCompressor().compress(raw) if rng.random() < 0.9 else lzma.compress(raw)


def array_header(rng: Rng, data: bytes) -> bytes:
    """An .npy whose text header lies about type, order or shape, with its own length right."""
    (size,) = struct.unpack("<H", data[8:10])
    text, body = data[10 : 10 + size].rstrip(), data[10 + size :]
    shape = choose(rng, SHAPES)
    kind = choose(rng, ("'|O'", "'<f2'", "'>f8'", "'<U99'", "'|V8'", "[('a','<f8')]", "'<m8'", "1"))
    changed = {
        0: lambda: text[: text.find(b"(")] + shape.encode() + text[text.find(b")") + 1 :],
        1: lambda: text.replace(b"'<f8'", kind.encode()).replace(b"'<i8'", kind.encode()),
        2: lambda: text.replace(b"False", choose(rng, (b"True", b"None", b"7"))),
        3: lambda: any_bytes(rng, text),
        4: lambda: b"(" * 5000,
    }[int(rng.integers(5))]()
    return data[:8] + struct.pack("<H", len(changed) % 2**16) + changed + body


def archive(rng: Rng, data: bytes) -> bytes:
    """An .npz: its bytes, or a member's, packed again with right checksums."""
    if rng.random() < 0.4:
        return any_bytes(rng, data)
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        members = {name: file.read(name) for name in file.namelist()}
    name = choose(rng, list(members))
    how = rng.random()
    if how < 0.7:
        members[name] = choose(rng, (array_header, any_bytes))(rng, members[name])
    elif how < 0.8:
        members.pop(name)
    elif how < 0.9:
        members[choose(rng, ("../x.npy", "x", "x.npy", "bytes.npy"))] = members.pop(name)
    packing = choose(rng, (zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    with zipfile.ZipFile(buffer := io.BytesIO(), "w", packing) as file:
        for member, content in members.items():
            file.writestr(member, content)
    return buffer.getvalue()


def shard(rng: Rng, data: bytes) -> bytes:
    """Header fields that lie, alone or with the length that fits them; tokens beyond."""
    how = rng.random()
    if how < 0.5:
        return any_bytes(rng, data)
    fields, tokens = np.frombuffer(data[:1024], "<i4").copy(), np.frombuffer(data[1024:], "<u2")
    tokens = tokens.copy()
    if how < 0.75:
        number = int(choose(rng, NUMBERS[:19])) * choose(rng, (1, -1))
        fields[int(rng.integers(4))] = (number + 2**31) % 2**32 - 2**31
    elif how < 0.9:
        tokens = tokens[: int(rng.integers(len(tokens) + 1))]
        fields[2] = len(tokens)
    else:
        tokens[rng.integers(len(tokens), size=3)] = rng.integers(0, 2**16, 3)
    return fields.tobytes() + tokens.tobytes()


def packed_text(pack: Callable, unpack: Callable, inner: Callable = any_bytes):
    """A compressed file: its bytes, or its text packed again."""

    def mutate(rng: Rng, data: bytes) -> bytes:
        return any_bytes(rng, data) if rng.random() < 0.5 else pack(inner(rng, unpack(data)))

    return mutate


# -----------------------------------------------------------------------------
# SentencePiece models: protobuf, a sequence of (tag, length, content)


def varint(data: bytes, at: int) -> tuple[int, int]:
    """-> number, place after it"""
    number = shift = 0
    while True:
        number |= (data[at] & 127) << shift
        at, shift = at + 1, shift + 7
        if data[at - 1] < 128:
            return number, at


def written_varint(number: int) -> bytes:
    parts = [number >> shift & 127 | 128 for shift in range(0, max(1, number.bit_length()), 7)]
    return bytes([*parts[:-1], parts[-1] & 127])


def messages(data: bytes) -> list[tuple[int, bytes]]:
    """(tag, content) of the fields of a model, all of which have a length."""
    found, at = [], 0
    while at < len(data):
        tag, at = varint(data, at)
        size, at = varint(data, at)
        found.append((tag, data[at : at + size]))
        at += size
    return found


def piece(rng: Rng, content: bytes) -> bytes:
    """A piece with other text, score or type: string 1, float 2, enum 3."""
    size, at = varint(content, 1)
    text, rest = content[at : at + size], content[at + size :]
    how = int(rng.integers(4))
    if how == 0:
        text = choose(
            rng, (any_bytes(rng, text), b"<0x41>", b"<0xZZ>", "▁".encode(), b"\xff\xfe", b"")
        )
    elif how == 1:
        score = choose(rng, (float("nan"), float("inf"), -1e38, 0.0, 5.0))
        rest = b"\x15" + struct.pack("<f", score) + rest[5:]
    elif how == 2:
        rest = (
            rest[:5] + b"\x18" + written_varint(choose(rng, (0, 1, 2, 3, 4, 5, 6, 7, 2**31, 2**63)))
        )
    else:
        return any_bytes(rng, content)
    return b"\x0a" + written_varint(len(text)) + text + rest


def tokenizer(rng: Rng, data: bytes) -> bytes:
    """A model: its bytes, or pieces and settings changed, lost, doubled or moved."""
    if rng.random() < 0.3:
        return any_bytes(rng, data)
    fields = messages(data)
    for _ in range(int(rng.integers(1, 4))):
        at, how = int(rng.integers(len(fields))), rng.random()
        at = at if rng.random() < 0.8 else len(fields) - 1 - int(rng.integers(3))
        tag, content = fields[at]
        if how < 0.7:
            fields[at] = tag, (piece if tag == 10 else any_bytes)(rng, content)
        elif how < 0.8:
            fields.pop(at)
        elif how < 0.9:
            fields.insert(int(rng.integers(len(fields))), fields[at])
        else:
            fields = fields[:at] + fields[:5]
    return b"".join(written_varint(t) + written_varint(len(c)) + c for t, c in fields)


# -----------------------------------------------------------------------------
# Checkpoints: a JSON file signed together with the tensors beside it

CHECKPOINT = "resumed/checkpoint/step_00000002"  # below the worker's folder


def checkpoint_seal(state: Any) -> str:
    tensors = Path(CHECKPOINT + ".safetensors").read_bytes()
    return hashlib.sha256(json.dumps(state).encode() + tensors).hexdigest()


def checkpoint(rng: Rng, data: bytes) -> bytes:
    if rng.random() < 0.3:
        return json_file(rng, data)
    state = json_tree(rng, json.loads(data)["state"])
    return json_text(dict(state=state, sha256=checkpoint_seal(state)))
