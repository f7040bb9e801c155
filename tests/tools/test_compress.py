"""records/tools/compress.py: every byte comes back, from what was written and from nothing else."""

import errno
import hashlib
import io
import json
import lzma
import math
import os
import signal
import stat
import subprocess
import sys
import tempfile
from dataclasses import replace

import compress  # noqa: E402
import numpy as np
import pytest
import torch
import tqdm
from helpers import (
    CHINESE,
    ROOT,
    SCRIPTS,
    SOURCE_CODE,
    clean_environment,
    cores,
    model_of,
    pack_artifact,
    perturbed,
    tiny,
    train_gpt,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import prepare_text

RANDOM = np.random.default_rng(0)
EMOJI = "👩\u200d👩\u200d👧 é e\u0301 ﬁ Ａ \u2581\u2581 \u2028 <s></s><unk><0x41> \ufeff"
FILES = {
    "empty": b"",
    "one byte": b"x",
    "one byte that is no text": b"\x80",
    "source code": SOURCE_CODE.encode()[:1500],
    "scripts": SCRIPTS.encode()[:1500],
    "chinese": CHINESE.encode()[:600],
    "emoji": EMOJI.encode() * 3,
    "crlf": b"first line\r\n\tsecond  line \r\n\r\n" * 8,
    "nul": b"\0\0text\0" * 20,
    "every byte": bytes(range(256)) + bytes(range(255, -1, -1)),
    "random": RANDOM.bytes(700),
    "latin-1": "déjà vu, naïve ".encode("latin-1") * 9,
    "cut within a character": "日本語".encode()[1:-1],
    "surrogates": "\ud83d\ude00".encode("utf-8", "surrogatepass") + b" and \xed\xb2\x80",
    "spaces": b"  a    b\n\n\n   " * 9,
}


TOKENIZERS = {  # the first is ours; the others invent and drop spaces and join characters
    "lossless": lambda: prepare_text.train_tokenizer([SOURCE_CODE, SCRIPTS], 512),
    "normalising": lambda: model_of(SOURCE_CODE, byte_fallback=True),
    "without bytes": lambda: model_of(SOURCE_CODE),
}


def artifact_of(folder, tokenizer, seed=0):
    """A folder with tokenizer.model and an artifact of random weights for it."""
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.model").write_bytes(tokenizer)
    pieces = prepare_text.load_tokenizer(folder / "tokenizer.model").vocab_size()
    cfg = tiny(vocab_size=pieces, num_layers=2)
    weights = dict(perturbed(cfg, seed, 0.1).named_parameters())
    weights = {name: weight.detach() for name, weight in weights.items()}
    (folder / "artifact.bin").write_bytes(pack_artifact(weights, cfg))
    return folder / "artifact.bin"


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("artifacts")
    return {name: artifact_of(folder / name, make()) for name, make in TOKENIZERS.items()}


@pytest.fixture(scope="module")
def compressors(artifacts):
    with cores(1):
        return {name: compress.Compressor(path) for name, path in artifacts.items()}


@pytest.fixture
def compressor(compressors):
    torch.set_num_threads(1)
    return compressors["lossless"]


def parts_of(packed):
    """-> header, its bytes with everything before them, blocks, what was kept aside"""
    header, payload = compress.open_container(packed, "x")
    size = sum(size for _, size in header.blocks)
    return header, packed[: len(packed) - len(payload)], payload[:size], payload[size:]


# -----------------------------------------------------------------------------
# Bytes come back


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("name", FILES)
def test_every_file_comes_back(compressors, tokenizer, name):
    compressor, data = compressors[tokenizer], FILES[name]
    packed = compressor.compress(data, 12)
    assert compressor.restore(packed.data) == data
    header, begin, blocks, aside = parts_of(packed.data)
    assert header == packed.header and len(begin) <= 64
    assert begin + blocks + aside == packed.data and (aside == b"" or tokenizer == "without bytes")


@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
@settings(max_examples=200, deadline=None)
def test_tokens_hold_the_bytes_in_order(compressors, data):
    for name, compressor in compressors.items():
        tokens, held = compress.tokenise(compressor.spelt, data)
        kept = np.frombuffer(data, np.uint8)[held].tobytes()
        assert compressor.text(tokens) == kept
        assert name == "without bytes" or kept == data
        assert held.shape == (len(data),) and train_gpt.BOS not in tokens


def test_text_is_not_spelt_in_bytes(compressors):
    """Else a tokenizer would be of no use; a normalising one loses line starts at most."""
    data = b"def main(arguments):\n  return arguments\n" * 10
    sizes = {n: len(compress.tokenise(c.spelt, data)[0]) for n, c in compressors.items()}
    assert sizes["lossless"] < len(data) * 0.85
    assert sizes["normalising"] < len(data) * 0.9
    _, held = compress.tokenise(compressors["without bytes"].spelt, data)
    assert held.any() and not held.all()


@pytest.mark.parametrize("lanes", [1, 3, 4096])
def test_any_number_of_lanes(compressor, lanes):
    data = SOURCE_CODE.encode()[:400]
    packed = compressor.compress(data, lanes)
    ((used, _),) = packed.header.blocks
    assert used in (0, min(lanes, packed.tokens))
    assert used or lanes == 4096  # a lane for each token costs more than it saves
    assert compressor.restore(packed.data) == data


@given(st.integers(1, 1 << 18), st.integers(1, 4096))
@settings(deadline=None)
def test_a_plan_follows_from_tokens_and_lanes(tokens, lanes):
    """It is that which train_gpt makes of the text, and its own lanes give it again."""
    lanes = min(lanes, tokens)
    plan = compress.plan_of(tokens, lanes, 256)
    cfg = train_gpt.Config(
        eval_lanes=lanes, eval_piece_tokens=-(-tokens // lanes), eval_seq_len=256
    )
    stream = np.full(tokens + 1, 5, np.uint16)
    stream[0] = train_gpt.BOS
    assert plan == train_gpt.CodingPlan.of(stream, cfg, 1)
    assert plan == compress.plan_of(tokens, plan.lanes, 256) and plan.lanes <= lanes


@given(st.integers(0, 1 << 24))
def test_longer_files_get_more_lanes(tokens):
    lanes = compress.lanes_for(tokens)
    assert 1 <= compress.lanes_for(tokens // 2) <= lanes <= compress.LANES
    assert lanes == 1 or tokens >= lanes * compress.FEW_TOKENS
    assert lanes >= min(tokens // 512, 32) and (lanes >= compress.FEW_LANES or tokens < 800)


@pytest.fixture
def encoded(monkeypatch):
    """Of each block that is coded: stream, plan, what train_gpt.encode told."""
    seen = []
    encode = train_gpt.encode

    def spy(model, rt, cfg, stream, plan):
        body, coded = encode(model, rt, cfg, stream, plan)
        seen.append((stream, plan, coded))
        return body, coded

    monkeypatch.setattr(train_gpt, "encode", spy)
    return seen


def test_both_sides_learn_from_what_was_coded(compressor, encoded, monkeypatch):
    data = (SOURCE_CODE.encode()[:150] + SCRIPTS.encode()[:150]) * 4
    assert compressor.restore(compressor.compress(data, 4).data) == data
    with monkeypatch.context() as patch:
        patch.setattr(compressor, "cfg", replace(compressor.cfg, lane_ttt=False))
        still = compressor.compress(data, 4).data
    (*_, learnt), (*_, not_learnt) = encoded
    assert learnt.model_nats < 0.99 * not_learnt.model_nats  # random weights have much to learn
    with pytest.raises(compress.UserError, match="restores to other bytes"):
        compressor.restore(still)


def test_a_block_is_one_document(compressor, encoded):
    """Cut into a piece for each lane: no end of a piece is coded, and counts are of all lanes."""
    packed = compressor.compress(SOURCE_CODE.encode()[:300] * 4, 4)
    ((stream, plan, coded),) = encoded
    assert np.flatnonzero(stream == train_gpt.BOS).tolist() == [0]
    assert (plan.lanes, plan.pieces) == (4, 4) and coded.targets == packed.tokens
    assert coded.nats < 0.7 * coded.model_nats  # the other lanes have it already


def test_blocks_follow_each_other(compressor, monkeypatch):
    """Those that the model makes larger are stored, the others not."""
    monkeypatch.setattr(compress, "BLOCK_TOKENS", 200)
    data = b"\xfe" * 400 + RANDOM.bytes(2000).translate(None, bytes(range(128))) + b"\xfe" * 300
    packed = compressor.compress(data)
    stored = [lanes == 0 for lanes, _ in packed.header.blocks]
    assert len(stored) == -(-packed.tokens // 200)
    assert not stored[0] and all(stored[3:-2]) and compressor.restore(packed.data) == data
    assert len(parts_of(packed.data)[1]) <= 64 + 3 * len(stored)


def test_random_bytes_do_not_grow(compressors):
    data = RANDOM.bytes(1000)
    for name, compressor in compressors.items():
        packed = compressor.compress(data, 9)
        aside = 220 if name == "without bytes" else 0  # a mark for each byte, xz's container
        assert len(packed.data) <= len(data) + 64 + aside


HEADERS = st.builds(
    compress.Header,
    st.binary(min_size=16, max_size=16),
    st.binary(min_size=16, max_size=16),
    st.integers(1, 1024),
    st.sampled_from(compress.DEVICES),
    st.integers(1 << 24, 1 << 35),
    st.integers(1, 1 << 35),
    st.lists(
        st.tuples(st.just(0) | st.integers(1, 4096), st.integers(0, 1 << 32)),
        min_size=1,
        max_size=9,
    ).map(tuple),
)


@given(HEADERS)
def test_a_header_is_small_whatever_the_file(header):
    assert len(compress.seal(header, b"")) <= 64 + 7 * (len(header.blocks) - 1)


@given(HEADERS, st.binary(max_size=40), st.integers(0, 50), st.integers(0, 40))
def test_a_header_is_read_as_it_was_written(header, payload, tokens, lanes):
    blocks = ((min(lanes, tokens), len(payload) // 2),) if tokens else ()
    header = header._replace(size=tokens + lanes, tokens=tokens, blocks=blocks)
    assert compress.open_container(compress.seal(header, payload), "x") == (header, payload)


@given(st.integers(0, 2**63 - 1))
def test_numbers(number):
    packed = compress.varint(number)
    assert compress.Reader(packed).number() == number
    assert len(packed) == max(1, -(-number.bit_length() // 7))


def test_header_says_what_a_restore_needs(compressor):
    data = SCRIPTS.encode()[:300]
    packed = compressor.compress(data)
    header, begin, blocks, _ = parts_of(packed.data)
    assert (header.size, header.tokens) == (len(data), packed.tokens)
    assert header.digest == hashlib.sha256(data).digest()[:16]
    assert (header.threads, header.device) == (1, "cpu")
    for i, path in enumerate((compressor.artifact, compressor.tokenizer)):
        digest = hashlib.sha256(path.read_bytes()).digest()
        assert header.made[4 * i : 4 * i + 4] == digest[:4]
    made = compressor.made()
    assert made.keys() == {"threads"}.union(*compress.MADE.values())
    assert made["code"] == hashlib.sha256((ROOT / "train_gpt.py").read_bytes()).hexdigest()
    assert '"lane_ttt_lr"' in made["settings"]
    assert sum(size for _, size in header.blocks) == len(blocks)


def test_what_coded_is_what_was_read(artifacts, tmp_path, monkeypatch):
    """The header names the bytes that are at work, whatever lies in their place meanwhile."""
    folder = tmp_path / "own"
    tokenizer = artifacts["lossless"].with_name("tokenizer.model")
    with cores(1):
        compressor = compress.Compressor(artifact_of(folder, tokenizer.read_bytes()))
    before = compressor.made()
    for path in (compressor.artifact, compressor.tokenizer):
        path.write_bytes(b"another")
    monkeypatch.setattr(train_gpt, "CODE", compressor.artifact)
    assert compressor.made() == before and compressor.apart > 1000
    packed = compressor.compress(b"some text")
    assert packed.header.made == compress.fingerprint_of(before)
    assert compressor.restore(packed.data) == b"some text"


@pytest.mark.parametrize("what", ["artifact.bin", "tokenizer.model"])
def test_each_file_is_read_once(artifacts, tmp_path, monkeypatch, what):
    """What is loaded and what is hashed cannot differ."""
    folder = tmp_path / "own"
    artifact = artifact_of(folder, artifacts["lossless"].with_name("tokenizer.model").read_bytes())
    whole = hashlib.sha256((folder / what).read_bytes()).hexdigest()
    read = compress.read_source

    def read_and_replace(path, memory):
        source = read(path, memory)
        if path == folder / what:
            path.write_bytes(b"another")
        return source

    monkeypatch.setattr(compress, "read_source", read_and_replace)
    with cores(1):
        compressor = compress.Compressor(artifact)
    assert compressor.made()[what.partition(".")[0]] == whole


@pytest.mark.parametrize("what", ["artifact.bin", "tokenizer.model"])
@pytest.mark.parametrize("how", ["changed", "removed"])
def test_nothing_is_packed_for_files_that_are_gone(
    command, artifacts, tmp_path, monkeypatch, what, how
):
    """A restore would look for them where they were."""
    folder = tmp_path / "own"
    artifact = artifact_of(folder, artifacts["lossless"].with_name("tokenizer.model").read_bytes())
    (tmp_path / "a").write_bytes(b"text")
    code = compress.Compressor.code

    def slowly(self, *arguments):
        (folder / what).write_bytes(b"x") if how == "changed" else (folder / what).unlink()
        return code(self, *arguments)

    monkeypatch.setattr(compress.Compressor, "code", slowly)
    status, out, err = command("a", artifact=artifact)
    told = f"{folder / what}: changed since it was read; nothing is written; fix: "
    assert (status, out) == (2, "") and err.startswith(f"error: {told}")
    assert names(tmp_path) == ["a", "own"]


def test_a_header_that_cannot_be_read_is_not_written(compressor, monkeypatch):
    """As of more threads than a restore would believe: it is found while the file is there."""
    monkeypatch.setattr(compress, "THREADS", 1)
    torch.set_num_threads(2)
    with pytest.raises(compress.UserError, match="2 threads.*nothing is written; fix: ") as refused:
        compressor.compress(b"text")
    assert "damaged" not in str(refused.value)


def test_no_more_threads_than_a_header_tells(artifacts, monkeypatch):
    monkeypatch.setattr(compress, "THREADS", 1)
    monkeypatch.setattr(train_gpt, "choose_threads", lambda _: (2, "cores"))
    compress.Compressor(artifacts["lossless"])
    assert torch.get_num_threads() == 1


def test_a_tokenizer_is_built_once_for_all_fragments(compressor, monkeypatch):
    built = []
    kind = prepare_text.sentencepiece.SentencePieceProcessor

    def build(**how):
        built.append(how)
        return kind(**how)

    monkeypatch.setattr(prepare_text.sentencepiece, "SentencePieceProcessor", build)
    data = b"text \xff" * 50
    tokens, held = compress.tokenise(compressor.spelt, data)
    assert compressor.text(tokens) == data and held.all() and len(built) <= 1


def test_the_same_bytes_twice(compressor):
    data = SOURCE_CODE.encode()[:500]
    assert compressor.compress(data).data == compressor.compress(data).data


# -----------------------------------------------------------------------------
# Refusals


def test_one_flipped_bit_is_refused(compressor, monkeypatch):
    """Any one, before anything is decoded."""
    packed = compressor.compress(b"some text").data
    monkeypatch.setattr(compressor, "unpack", lambda *_: pytest.fail("decoded"))
    for place in range(8 * len(packed)):
        damaged = bytearray(packed)
        damaged[place // 8] ^= 1 << place % 8
        wanted = "version" if place // 8 == 3 else "damaged"
        with pytest.raises(compress.UserError, match=f"x.pgz: .*{wanted}"):
            compressor.restore(bytes(damaged), "x.pgz")


def test_another_length_is_refused(compressor):
    packed = compressor.compress(b"some text").data
    for wrong in (*(packed[:size] for size in range(len(packed))), packed + b"\0"):
        with pytest.raises(compress.UserError, match="x: damaged"):
            compressor.restore(wrong, "x")


@given(st.binary(max_size=80))
def test_sealed_containers_that_say_anything(body):
    """No other exception, whatever is behind a check that fits."""
    check = hashlib.sha256(body).digest()[:8]
    packed = compress.PREFIX + check + body
    try:
        header, payload = compress.open_container(packed, "x")
    except compress.UserError as error:
        assert str(error).startswith(("x: damaged (", "x: a file of "))
        return
    assert body.endswith(payload) and header.tokens <= header.size


def test_a_container_cut_within_its_beginning(compressor):
    for packed in (b"PGZ", b"PGZ\x02abc", b"PGZ\x02abcdefg"):
        with pytest.raises(compress.UserError, match=f"cut off after {len(packed)} bytes"):
            compressor.restore(packed, "x")


@pytest.mark.parametrize("packed", [b"", b"P", b"text", b"pgz\x02abcdefghijk"])
def test_another_beginning_is_none_of_ours(compressor, packed):
    with pytest.raises(compress.UserError, match="no .pgz, it does not begin with PGZ"):
        compressor.restore(packed, "x")


def test_another_container_is_refused(compressor):
    with pytest.raises(compress.UserError, match="no .pgz, it does not begin with PGZ"):
        compressor.restore(train_gpt.seal(train_gpt.STREAM_PREFIX, {}, b""))


def test_an_older_version_is_refused(compressor):
    old = train_gpt.seal(b"PGZ\x01", dict(bytes=0, blocks=[]), b"")
    told = "x: a .pgz of version 1, this program reads version 2; fix: restore it with the compress"
    with pytest.raises(compress.UserError, match=told):
        compressor.restore(old, "x")


@pytest.mark.parametrize("what", ["artifact", "tokenizer"])
def test_another_model_is_refused_by_name(compressor, artifacts, tmp_path, what):
    tokenizer = (artifacts["lossless"].parent / "tokenizer.model").read_bytes()
    other = artifact_of(tmp_path / "other", tokenizer, seed=int(what == "artifact"))
    if what == "tokenizer":  # of as many pieces
        tokenizer = prepare_text.train_tokenizer([SCRIPTS, SOURCE_CODE, CHINESE], 512)
        other.with_name("tokenizer.model").write_bytes(tokenizer)
    packed = compressor.compress(b"some text").data
    there, here = (
        compress.fingerprint_of(c.made()) for c in (compressor, compress.Compressor(other))
    )
    part = slice(4, 8) if what == "tokenizer" else slice(4)
    told = f"made with another {what} .{there[part].hex()}, here {here[part].hex()}: {what} "
    with pytest.raises(compress.UserError, match=told + "[0-9a-f]{64}.; fix: use"):
        compress.Compressor(other).restore(packed)
    table = {there.hex(): compressor.made()}
    compress.table_of(other).write_text(json.dumps(table))
    whole = compressor.made()[what]
    with pytest.raises(compress.UserError, match=f"another {what} .{what} {whole}, here [0-9a-f]"):
        compress.Compressor(other).restore(packed)


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("what", ["torch", "numpy", "constriction", "code", "device", "settings"])
def test_another_machine_is_refused_by_name(compressor, monkeypatch, what, known):
    packed, made = compressor.compress(b"some text").data, compressor.made()
    table = {compress.fingerprint_of(made).hex(): made} if known else {}
    monkeypatch.setattr(compressor, "made", lambda: made | {what: "another"})
    monkeypatch.setattr(compressor, "table", lambda: table)
    part = "code" if what in ("code", "settings") else "machine"
    with pytest.raises(compress.UserError) as refused:
        compressor.restore(packed, "x")
    told = f"({what} {made[what]}, here another); fix: " if known else f"{what} another"
    assert str(refused.value).startswith(f"x: made with another {part} (")
    assert told in str(refused.value) and "\n" not in str(refused.value)


def test_all_that_differs_is_named(compressor, monkeypatch):
    packed, made = compressor.compress(b"some text").data, compressor.made()
    other = made | dict(tokenizer="0" * 64, torch="another", numpy="another")
    monkeypatch.setattr(compressor, "made", lambda: other)
    with pytest.raises(compress.UserError, match="another tokenizer .* and another machine"):
        compressor.restore(packed)


# What fingerprints stand for


def test_a_table_beside_the_artifact_is_kept(compressor, artifacts, monkeypatch, tmp_path):
    monkeypatch.setattr(compressor, "artifact", tmp_path / "artifact.bin")
    (tmp_path / "artifact.bin").write_bytes(artifacts["lossless"].read_bytes())
    compressor.remember()
    first = compressor.made()
    table = tmp_path / "artifact.bin.made.json"
    assert json.loads(table.read_bytes()) == {compress.fingerprint_of(first).hex(): first}
    before = table.read_bytes()
    compressor.remember()  # nothing new
    assert table.read_bytes() == before and names(tmp_path) == ["artifact.bin", table.name]
    for number in range(compress.TABLE_ENTRIES + 5):
        monkeypatch.setattr(compressor, "made", lambda n=number: first | dict(torch=str(n)))
        if number in (0, compress.TABLE_ENTRIES + 4):
            compressor.remember()
            continue
        entries = json.loads(table.read_bytes())
        entries[compress.fingerprint_of(compressor.made()).hex()] = compressor.made()
        table.write_text(json.dumps(entries))
    versions = [entry["torch"] for entry in json.loads(table.read_bytes()).values()]
    assert versions == [str(n) for n in range(5, compress.TABLE_ENTRIES + 5)]


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"\xff", b"[" * 10_000, b'{"a": 1}', b'{"KEY": [1]}', b'{"KEY": {}}']
)
def test_a_table_of_nonsense_does_no_harm(artifacts, tmp_path, content):
    with cores(1):
        folder = tmp_path / "copy"
        artifact_of(folder, artifacts["lossless"].with_name("tokenizer.model").read_bytes())
        compressor = compress.Compressor(folder / "artifact.bin")
    made = compressor.made()
    packed = compressor.compress(b"some text")
    header, payload = compress.open_container(packed.data, "x")
    other = compress.seal(header._replace(made=bytes(16)), payload)
    content = content.replace(b"KEY", bytes(16).hex().encode())
    compress.table_of(compressor.artifact).write_bytes(content)
    assert compressor.restore(packed.data) == b"some text"
    with pytest.raises(compress.UserError, match="another artifact .00000000, here"):
        compressor.restore(other)
    compressor.remember()
    assert compressor.table()[compress.fingerprint_of(made).hex()] == made


def test_a_table_that_cannot_be_written_is_no_failure(command, artifacts, tmp_path, monkeypatch):
    """Nor is one that cannot be read; the one that was there stays whole."""
    (tmp_path / "a").write_bytes(b"text")
    table = compress.table_of(artifacts["lossless"])
    table.unlink(missing_ok=True)
    table.write_text('{"old": 1}')

    def refuse(*_, **__):
        raise OSError(30, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "mkstemp", refuse)
        assert command("a")[0] == 0
    assert table.read_text() == '{"old": 1}'
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refuse)  # as on a full disk, at the end
        assert command("a", "--output", "b")[0] == 0
    assert table.read_text() == '{"old": 1}'
    table.unlink()
    table.mkdir()
    before = names(table.parent)
    assert command("a", "--output", "c")[0] == 0
    assert command("--restore", "c", "--output", "d") == (0, "c -> d: 4 bytes\n", "")
    assert names(table.parent) == before
    table.rmdir()


def test_a_command_keeps_the_table(command, artifacts, compressor, tmp_path):
    (tmp_path / "a").write_bytes(b"text")
    table = compress.table_of(artifacts["lossless"])
    table.unlink(missing_ok=True)
    assert command("a")[0] == 0
    ((key, entry),) = json.loads(table.read_bytes()).items()
    header, _ = compress.open_container((tmp_path / "a.pgz").read_bytes(), "x")
    assert key == header.made.hex() and entry == compressor.made()
    table.unlink()
    (tmp_path / "a").unlink()
    assert command("--restore", "a.pgz")[0] == 0 and not table.exists()


def test_a_table_that_lies_is_not_believed(compressor, monkeypatch):
    """Its words must have the fingerprint that they stand at."""
    packed, made = compressor.compress(b"some text").data, compressor.made()
    lie = made | dict(torch="9.9")
    monkeypatch.setattr(compressor, "made", lambda: made | dict(torch="8.8"))
    monkeypatch.setattr(compressor, "table", lambda: {compress.fingerprint_of(made).hex(): lie})
    with pytest.raises(compress.UserError, match="another machine") as refused:
        compressor.restore(packed)
    assert "9.9" not in str(refused.value)


def test_threads_are_those_of_the_maker(compressor):
    torch.set_num_threads(2)
    packed = compressor.compress(b"some text").data
    torch.set_num_threads(1)
    assert compressor.restore(packed) == b"some text"
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("data", [b"\xfe" * 400, SOURCE_CODE.encode()[:400]])
def test_other_arithmetic_is_noticed(artifacts, data):
    """As on a machine that the fingerprint does not tell apart."""
    with cores(1):
        compressor = compress.Compressor(artifacts["lossless"])
    packed = compressor.compress(data, 6).data
    with torch.no_grad():
        compressor.model.tok_emb.mul_(1.1)
    with pytest.raises(compress.UserError, match="restores to other bytes"):
        compressor.restore(packed)


@pytest.mark.parametrize("how", ["no words", "too long"])
def test_words_that_no_coder_makes_are_noticed(compressor, monkeypatch, how):
    """On a machine of other arithmetic the decoder itself may give up: no block after that is
    decoded."""
    decoded = []

    def decode(*arguments):
        decoded.append(arguments)
        if how == "no words":
            raise train_gpt.StreamError("words of another text")
        return train_gpt.Coded(np.full(700, 5, np.uint16), 700, 0.0, 0.0, 0.0)

    monkeypatch.setattr(compress, "BLOCK_TOKENS", 200)
    packed = compressor.compress(b"\xfe" * 600)
    assert [lanes > 0 for lanes, _ in packed.header.blocks] == [True] * 3
    monkeypatch.setattr(train_gpt, "decode", decode)
    with pytest.raises(compress.UserError, match="restores to other bytes"):
        compressor.restore(packed.data)
    assert len(decoded) == 1


# What is no fault of the file

LACKS = {
    "Python's": lambda: MemoryError(),
    "numpy's": lambda: MemoryError("Unable to allocate 8.00 EiB for an array"),
    "torch's, on a CPU": lambda: RuntimeError(
        "[enforce fail at alloc_cpu.cpp:125] DefaultCPUAllocator: can't allocate memory: you tried"
        " to allocate 8 bytes. Error code 12 (Cannot allocate memory)"
    ),
    "torch's, on a GPU": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"),
}


@pytest.mark.parametrize("restore", [False, True])
@pytest.mark.parametrize("name", LACKS)
def test_lack_of_memory_is_said_as_such(command, tmp_path, monkeypatch, name, restore):
    (tmp_path / "a").write_bytes(b"\xfe" * 300)
    assert command("a")[0] == 0
    (tmp_path / "a" if restore else tmp_path / "a.pgz").unlink()
    before = names(tmp_path)

    def lack(*_, **__):
        raise LACKS[name]()

    monkeypatch.setattr(train_gpt, "decode", lack)  # of the check, too
    status, out, err = command(*(["--restore", "a.pgz"] if restore else ["a"]))
    told = f"error: {'a.pgz' if restore else 'a'}: not enough memory; fix: in parts, or"
    busy = [line for line in err.splitlines() if line.startswith("compressing: ")]  # a slow machine
    lines = [line for line in err.splitlines() if line not in busy]
    assert (status, out) == (2, "") and len(lines) == 1 and lines[0].startswith(told)
    assert names(tmp_path) == before


def test_memory_that_torch_has_not_is_known_by_its_words():
    """And by those that it has today."""
    with pytest.raises(RuntimeError) as failed:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert compress.lacks_memory(failed.value)
    assert not compress.lacks_memory(RuntimeError("shapes do not match"))


@pytest.mark.parametrize("where", ["decode", "put_back", "fits", "open_container"])
def test_a_fault_of_the_program_blames_no_file(compressors, monkeypatch, where):
    packed = compressors["without bytes"].compress(SOURCE_CODE.encode()[:600] + b"\xff").data

    def fault(*_, **__):
        raise TypeError("a mistake")

    target = train_gpt if where == "decode" else compress
    monkeypatch.setattr(target, where, fault)
    with pytest.raises(TypeError, match="a mistake"):
        compressors["without bytes"].restore(packed)


def test_a_file_that_does_not_fit_here_is_not_called_damaged(compressor, monkeypatch):
    data = b"\xfe" * 800
    packed = compressor.compress(data).data
    monkeypatch.setattr(train_gpt, "available_memory", lambda: 8 * len(data) - 1)
    with pytest.raises(compress.LackOfMemory, match="x: a file of 800 bytes: .* are free; fix: "):
        compressor.restore(packed, "x")
    monkeypatch.setattr(train_gpt, "available_memory", lambda: 8 * len(data))
    with pytest.raises(compress.LackOfMemory, match="x: [0-9]+ tokens in [0-9]+ lanes: "):
        compressor.restore(packed, "x")
    monkeypatch.setattr(train_gpt, "available_memory", lambda: None)  # nobody says how much
    assert compressor.restore(packed, "x") == data


def test_all_blocks_must_fit_before_one_is_decoded(compressor, monkeypatch):
    monkeypatch.setattr(compress, "BLOCK_TOKENS", 300)
    packed = compressor.compress(b"\xfe" * 390)
    assert all(lanes for lanes, _ in packed.header.blocks)

    def require(plan, name):
        if plan.targets < 100:
            raise compress.LackOfMemory(name)

    monkeypatch.setattr(compressor, "require_room", require)
    monkeypatch.setattr(train_gpt, "decode", lambda *_: pytest.fail("decoded"))
    with pytest.raises(compress.LackOfMemory):
        compressor.restore(packed.data)


def test_tokenizer_of_another_size_is_refused(artifacts):
    tokenizer = artifacts["without bytes"].with_name("tokenizer.model")
    with pytest.raises(compress.UserError, match="tokenizer.model: .* pieces, the artifact has"):
        compress.Compressor(artifacts["lossless"], tokenizer)


# -----------------------------------------------------------------------------
# Command line


@pytest.fixture
def command(artifacts, tmp_path, capsys, monkeypatch):
    """command(*arguments) -> exit status, standard output, standard error; in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments, artifact=artifacts["lossless"]):
        with cores(1):
            status = compress.main([*map(str, arguments), "--artifact", str(artifact)])
        return status, *capsys.readouterr()

    return run


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_there_and_back(command, tmp_path, monkeypatch):
    data = SOURCE_CODE.encode()[:200] * 3
    (tmp_path / "a.txt").write_bytes(data)
    monkeypatch.setattr(compress, "SAY_AFTER", math.inf)  # whatever the machine's load
    status, out, err = command("a.txt")
    assert (status, err) == (0, "")
    size = (tmp_path / "a.txt.pgz").stat().st_size
    assert f"{size:,} bytes" in out and "tokens/s" in out and "restored in" in out
    assert f"{8 * size / 600:.4f} bits per byte" in out
    for name, figure in compress.others(data).items():
        assert f"{name} " in out and f" {figure:,} bytes" in out
    (tmp_path / "a.txt").unlink()
    assert command("--restore", "a.txt.pgz")[0] == 0
    assert (tmp_path / "a.txt").read_bytes() == data
    assert names(tmp_path) == ["a.txt", "a.txt.pgz"]


def test_output_and_no_check(command, tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(FILES["crlf"])
    with monkeypatch.context() as patch:
        patch.setattr(compress.Compressor, "restore", lambda *_: pytest.fail("restored"))
        status, out, _ = command("a", "--no-check", "--output", "b", "--lanes", "2")
    assert status == 0 and "unchecked" in out
    assert command("--restore", "b", "--output", "c")[0] == 0
    assert (tmp_path / "c").read_bytes() == FILES["crlf"]
    assert names(tmp_path) == ["a", "b", "c"]


def test_empty_file_there_and_back(command, tmp_path):
    (tmp_path / "a").touch()
    assert command("a")[0] == 0
    (tmp_path / "a").unlink()
    assert command("--restore", "a.pgz")[0] == 0 and (tmp_path / "a").read_bytes() == b""


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("restore", [False, True])
def test_existing_files_stay(command, tmp_path, monkeypatch, restore, late):
    """Also one that appears while the other is coded."""
    (tmp_path / "a").write_bytes(b"text")
    command("a")
    old = tmp_path / ("a" if restore else "a.pgz")
    before = old.read_bytes()
    if late:
        monkeypatch.setattr(compress, "check_target", lambda _: None)
    status, out, err = command(*(["--restore", "a.pgz"] if restore else ["a"]))
    assert status == 2 and out == "" and err.count("\n") == 1
    assert err.startswith(f"error: {old.name}: exists already") and "--output" in err
    assert old.read_bytes() == before and names(tmp_path) == ["a", "a.pgz"]


@pytest.mark.parametrize("fault", ["arithmetic", "no words", "other bytes"])
def test_failed_check_writes_nothing(command, tmp_path, monkeypatch, fault):
    """It says that here and now the file does not come back, not that it is damaged."""
    (tmp_path / "a").write_bytes(FILES["source code"])
    decode = train_gpt.decode

    def other_weights(model, *arguments):
        with torch.no_grad():
            model.tok_emb.mul_(1.1)
        return decode(model, *arguments)

    def no_words(*_):
        raise train_gpt.StreamError("words of another text")

    if fault == "other bytes":  # and a digest that does not tell
        monkeypatch.setattr(compress, "digest_of", lambda data, size: bytes(size))
        monkeypatch.setattr(compress.Compressor, "text", lambda self, tokens: b"x" * 1500)
    else:
        monkeypatch.setattr(train_gpt, "decode", no_words if fault == "no words" else other_weights)
    status, out, err = command("a")
    assert (status, out) == (2, "") and err.count("\n") == 1
    assert err.startswith("error: a: does not restore here (") and "damaged" not in err
    assert "; nothing is written; fix: " in err and "machine it was made on" not in err
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("what", ["remember", "others"])
def test_what_fails_behind_success_is_a_note(command, tmp_path, monkeypatch, what):
    """The file is in place by then: no status may say otherwise."""

    def fail(*_):
        assert (tmp_path / "a.pgz").exists()
        raise MemoryError("none left")

    (tmp_path / "a").write_bytes(b"text")
    monkeypatch.setattr(compress.Compressor if what == "remember" else compress, what, fail)
    status, out, err = command("a")
    assert status == 0 and out.startswith("a -> a.pgz: 4 bytes in ") and "\npgz " in out
    assert err == "note: a.pgz is written; then MemoryError: none left\n"
    (tmp_path / "a").unlink()
    assert command("--restore", "a.pgz")[0] == 0 and (tmp_path / "a").read_bytes() == b"text"


def test_large_files_are_not_shown_to_others(command, tmp_path, monkeypatch):
    """xz -9 alone takes 700 MB and minutes."""
    monkeypatch.setattr(compress, "MOST_COMPARED", 4)
    (tmp_path / "a").write_bytes(b"text")
    assert "xz -9" in command("a")[1]
    monkeypatch.setattr(compress, "others", lambda _: pytest.fail("compared"))
    (tmp_path / "b").write_bytes(b"texts")
    status, out, err = command("b")
    assert (status, err) == (0, "") and "apart" in out and "xz -9" not in out


# On the disk


@pytest.fixture
def flushed(monkeypatch):
    """Names of what os.fsync was given, and for each whether the target was there by then; set
    `fail`: the number of the call that fails, by what errno."""
    seen, fail = [], {}
    fsync = os.fsync

    def watch(file):
        name = os.path.basename(os.readlink(f"/proc/self/fd/{file}"))
        seen.append((name, os.fstat(file).st_size, os.path.exists("a.pgz")))
        if len(seen) - 1 in fail:
            raise OSError(fail[len(seen) - 1], os.strerror(fail[len(seen) - 1]))
        fsync(file)

    monkeypatch.setattr(os, "fsync", watch)
    monkeypatch.setattr(compress.Compressor, "remember", lambda _: None)
    return seen, fail


def test_a_power_cut_loses_nothing_that_was_said_to_be_written(command, tmp_path, flushed):
    """Content first, then name, then folder."""
    seen, _ = flushed
    (tmp_path / "a").write_bytes(b"text")
    assert command("a")[0] == 0
    (partial, size, there), (folder, _, named) = seen
    assert partial.endswith(".partial") and size == (tmp_path / "a.pgz").stat().st_size
    assert (there, folder, named) == (False, tmp_path.name, True)
    seen.clear()
    (tmp_path / "a").unlink()
    assert command("--restore", "a.pgz")[0] == 0
    assert [name for name, *_ in seen][1:] == [tmp_path.name] and seen[0][1] == 4


@pytest.mark.parametrize(
    ("call", "number", "status"),
    [(0, errno.EIO, 2), (0, errno.ENOSPC, 2), (1, errno.EIO, 2), (1, errno.EINVAL, 0)],
)
def test_a_disk_that_fails_leaves_no_file(command, tmp_path, flushed, call, number, status):
    """A folder that cannot be flushed at all, as on some disks, is no failure."""
    flushed[1][call] = number
    (tmp_path / "a").write_bytes(b"text")
    found, _, err = command("a")
    assert found == status and names(tmp_path) == (["a"] if status else ["a", "a.pgz"])
    if status:
        fix = "make room there" if number == errno.ENOSPC else "--output a name"
        assert err.startswith(f"error: a.pgz: {os.strerror(number)}; fix: {fix}")


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444, 0o4755])
def test_rights_are_those_of_the_file(command, tmp_path, monkeypatch, mode):
    """Of both; nobody else can read it before."""
    before = []
    written = os.fchmod

    def fchmod(file, how):
        before.append(stat.S_IMODE(os.fstat(file).st_mode))
        written(file, how)

    monkeypatch.setattr(os, "fchmod", fchmod)
    old = os.umask(0)
    try:
        (tmp_path / "a").write_bytes(b"text")
        (tmp_path / "a").chmod(mode)
        assert command("a")[0] == 0 and command("--restore", "a.pgz", "--output", "b")[0] == 0
    finally:
        os.umask(old)
    for name in ("a.pgz", "b"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == mode & 0o777
    assert before == [0o600] * 2


def test_what_a_kill_left_is_removed(command, tmp_path):
    """Of the same target, once nobody can be writing it."""
    (tmp_path / "a").write_bytes(b"text")
    left = [tmp_path / f".{compress.mark_of(tmp_path / name)}0.partial" for name in ("a.pgz", "b")]
    young = left[0].with_name(left[0].name.replace("0.partial", "1.partial"))
    for path in (*left, young):
        path.write_bytes(b"half")
    for path in left:
        os.utime(path, (0, 0))
    assert command("a")[0] == 0
    assert names(tmp_path) == sorted(["a", "a.pgz", left[1].name, young.name])


# A file that changes


@pytest.mark.parametrize("change", [b"te", b"text and more", b"TEXT"])
@pytest.mark.parametrize("what", ["a", "a.pgz"])
def test_a_file_that_changes_while_it_is_read(command, tmp_path, monkeypatch, change, what):
    (tmp_path / "a").write_bytes(b"text")
    if what == "a.pgz":
        assert command("a")[0] == 0
        (tmp_path / "a").unlink()
    os.utime(tmp_path / what, ns=(0, 0))
    before = names(tmp_path)
    fstat = os.fstat

    def looked_at(file):
        status = fstat(file)
        if os.readlink(f"/proc/self/fd/{file}") == str(tmp_path / what):
            (tmp_path / what).write_bytes(change)
        return status

    monkeypatch.setattr(os, "fstat", looked_at)
    status, out, err = command(*(["--restore", "a.pgz"] if what == "a.pgz" else ["a"]))
    assert (status, out) == (2, "") and names(tmp_path) == before
    assert err.startswith(f"error: {what}: changes while it is read") and "fix: " in err


def test_a_file_that_claims_no_size(command, tmp_path):
    """As all of /proc: its first bytes are not taken for the whole."""
    assert os.stat("/proc/self/status").st_size == 0
    status, out, err = command("/proc/self/status", "--output", "b")
    assert (status, out) == (2, "") and names(tmp_path) == []
    assert err.startswith("error: /proc/self/status: changes while it is read, or its size is not")


@pytest.mark.parametrize("how", ["appended", "same length", "replaced", "removed"])
def test_a_file_that_changes_while_it_is_coded(command, tmp_path, monkeypatch, how):
    """It would be deleted in the belief that it is packed. One that is gone is packed: nothing
    else is left of it."""
    file = tmp_path / "a"
    file.write_bytes(b"text")
    os.utime(file, ns=(0, 0))
    code = compress.Compressor.code

    def slowly(self, *arguments):
        if how == "removed":
            file.unlink()
        elif how == "replaced":
            (tmp_path / "b").write_bytes(b"text")
            os.utime(tmp_path / "b", ns=(0, 0))
            (tmp_path / "b").replace(file)
        else:
            file.write_bytes(b"text, longer" if how == "appended" else b"TEXT")
        return code(self, *arguments)

    monkeypatch.setattr(compress.Compressor, "code", slowly)
    status, out, err = command("a")
    if how == "removed":
        assert status == 0 and command("--restore", "a.pgz")[0] == 0
        assert file.read_bytes() == b"text"
        return
    assert (status, out) == (2, "") and names(tmp_path) == ["a"]
    assert err.startswith("error: a: changed since it was read; nothing is written; fix: run it")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["none"], "none"),
        (["."], "directory"),
        (["--restore", "a"], "does not end with .pgz; fix: give --output"),
        (["--restore", "."], ".: its name does not end with .pgz; fix: give --output"),
        (["--restore", "/"], "/: its name does not end with .pgz; fix: give --output"),
        (["--restore", "..", "--output", "x"], "directory"),
        (["a", "--device", "cuda"], "--device cuda: torch sees no CUDA device; fix: --device cpu"),
        (["--restore", "a.pgz"], "a.pgz: damaged"),
        (["a", "--tokenizer", "none"], "No such file or directory: 'none'"),
        (["a", "--tokenizer", "a"], "--tokenizer a: not a SentencePiece model"),
        (["a", "--output", "none/x"], "none/x: No such file or directory; fix: --output"),
        (["a", "--output", "a/x"], "a/x: Not a directory; fix: --output"),
        (["a", "--output", "x" * 300], "File name too long; fix: --output"),
        (["a", "--output", "."], ".: exists already"),
        (["a", "--output", "link"], "link: exists already"),
        (["fifo"], "fifo: not a regular file"),
        (["/dev/zero"], "/dev/zero: not a regular file"),
        (["--restore", "fifo", "--output", "x"], "fifo: not a regular file"),
        (["sparse"], "sparse: a file of 1,000,000,000,000 bytes: 64,000,000,000,000 bytes of mem"),
        (["--restore", "sparse", "--output", "x"], "sparse: a file of 1,000,000,000,000 bytes: "),
        (["a", "--tokenizer", "fifo"], "fifo: not a regular file"),
    ],
)
def test_one_line_for_what_is_wrong(command, tmp_path, monkeypatch, arguments, message):
    (tmp_path / "a").write_bytes(b"text")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("nowhere")
    with open(tmp_path / "sparse", "wb") as file:
        file.truncate(10**12) if "sparse" in arguments else None
    if "a.pgz" in arguments:
        (tmp_path / "a.pgz").write_bytes(b"text")
        (tmp_path / "a").unlink()
    before = names(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, out, err = command(*arguments)
    assert status == 2 and out == "" and err.count("\n") == 1
    assert err.startswith("error: ") and message in err.replace("Is a d", "d")
    assert names(tmp_path) == before


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--device", "cpu"], "--device: of no use to --restore"),
        (["--lanes", "0"], "--lanes: of"),
        (["--check"], "--[no-]check: of"),
        (["--no-check", "--lanes", "2"], "--[no-]check, --lanes: of"),
    ],
)
def test_a_restore_passes_over_no_option(command, tmp_path, capsys, given, told):
    (tmp_path / "a").write_bytes(b"text")
    assert command("a")[0] == 0
    (tmp_path / "a").unlink()
    with pytest.raises(SystemExit) as left:
        command("--restore", "a.pgz", *given)
    err = capsys.readouterr().err
    assert left.value.code == 2 and f"error: {told}" in err and "fix: leave it out" in err
    assert names(tmp_path) == ["a.pgz"]


def test_a_container_of_another_device(command, compressor, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "a.pgz").write_bytes(hostile(compressor, device="cuda"))
    status, out, err = command("--restore", "a.pgz")
    assert (status, out) == (2, "")
    assert err.startswith("error: a.pgz: made on cuda: torch sees no CUDA device; fix: restore it")


def test_lanes_that_do_not_fit_are_told_by_their_option(command, tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"\xfe" * 21)
    monkeypatch.setattr(train_gpt, "lane_bytes", lambda *_: 1 << 60)
    status, _, err = command("a", "--lanes", "7")
    assert status == 2 and err.startswith("error: --lanes 7: 21 tokens in 7 lanes: 1,152,9")
    assert "EVAL_LANES" not in err and "; fix: " in err


def test_names_move_no_cursor(command, tmp_path):
    name = "a\x1b[2Kb\n.txt"
    (tmp_path / name).write_bytes(b"text")
    _, out, err = command(name)
    (tmp_path / name).unlink()
    _, more, worse = command("--restore", f"{name}.pgz")
    assert out.startswith("a\\x1b[2Kb\\n.txt -> a\\x1b[2Kb\\n.txt.pgz: 4 bytes")
    assert more == "a\\x1b[2Kb\\n.txt.pgz -> a\\x1b[2Kb\\n.txt: 4 bytes\n"
    assert err + worse == "" and (tmp_path / name).read_bytes() == b"text"


def test_an_unwritable_output_is_found_before_any_work(command, tmp_path, monkeypatch):
    """As on a disk that is mounted read-only, where even root cannot write."""
    (tmp_path / "a").write_bytes(b"text")
    monkeypatch.setattr(compress, "Compressor", lambda *_: pytest.fail("too late"))
    opened = os.open

    def read_only(path, flags, *more, **named):
        if flags & os.O_CREAT:
            raise OSError(30, "Read-only file system", str(path))
        return opened(path, flags, *more, **named)

    monkeypatch.setattr(os, "open", read_only)
    status, out, err = command("a")
    assert (status, out) == (2, "")
    assert err.startswith("error: a.pgz: Read-only file system; fix: --output")


def test_a_disk_without_hard_links(command, tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    (tmp_path / "a").write_bytes(b"text")
    assert command("a")[0] == 0 and command("--restore", "a.pgz", "--output", "b")[0] == 0
    assert (tmp_path / "b").read_bytes() == b"text" and names(tmp_path) == ["a", "a.pgz", "b"]
    monkeypatch.setattr(compress, "check_target", lambda _: None)
    assert command("--restore", "a.pgz", "--output", "a")[0] == 2
    assert (tmp_path / "a").read_bytes() == b"text"
    monkeypatch.setattr(os, "replace", refuse)  # behind the empty file that holds the name
    status, _, err = command("--restore", "a.pgz", "--output", "c")
    assert status == 2 and err.startswith("error: c: Operation not permitted; fix: --output")
    assert names(tmp_path) == ["a", "a.pgz", "b"]


def test_the_second_measured_stretch_tells_the_time(compressor, monkeypatch, capfd):
    """Off a terminal; once for each way, and not for what is done in no time."""
    text = SOURCE_CODE.encode()[:600]
    monkeypatch.setattr(compress, "SAY_AFTER", math.inf)
    packed = compressor.compress(text, 1)
    assert capfd.readouterr().err == ""
    monkeypatch.setattr(compress, "SAY_AFTER", 0.0)
    compressor.compress(text, 1)
    compressor.restore(packed.data)
    lines = capfd.readouterr().err.splitlines()
    assert [line.split(" tokens, about ")[0] for line in lines] == [
        f"compressing: {packed.tokens:,}",
        f"restoring: {packed.tokens:,}",
    ]
    assert all(line.endswith(" s to go") for line in lines)
    compressor.compress(text, 1, ", then more")
    assert capfd.readouterr().err.endswith(" s to go, then more\n")


def test_the_end_is_not_worth_a_line(compressor, monkeypatch, capfd):
    """Told once it is known, where it is as long as the measure took."""
    clock = iter(range(10_000))
    monkeypatch.setattr(compress.time, "perf_counter", lambda: next(clock))
    for after, lines in ((100, 0), (5, 1)):
        monkeypatch.setattr(compress, "SAY_AFTER", after)
        with compressor.rt.bar_of("compressing", 150):
            for done in range(1, 151):
                compressor.rt.tick("documents", done, 150)
        assert capfd.readouterr().err.count("compressing: 150 tokens, about") == lines


def test_duration():
    given = [0, 1.4, 119, 120, 7199, 7200, 1e6]
    wanted = ["0 s", "1 s", "119 s", "2 min", "120 min", "2 h", "278 h"]
    assert [*map(compress.duration, given)] == wanted


def hostile(compressor, payload=b"", **changes):
    """A container for this machine that claims what it likes."""
    header = compressor.compress(b"").header
    return compress.seal(header._replace(**changes), payload)


ZEROS = dict(size=1000)
ONE = dict(size=9, tokens=9)


@pytest.mark.parametrize(
    ("changes", "payload", "told"),
    [
        (dict(size=10**12, tokens=10**12), b"", "cut off"),
        (dict(size=2**62, tokens=2**62), b"\0" * 999, "cut off"),
        (dict(tokens=5), b"", "5 tokens for 0 bytes"),
        (dict(threads=0), b"", "0 threads"),
        (dict(threads=10**6), b"", "1000000 threads"),
        (ONE | dict(blocks=((0, 10**15),)), b"", "more than it holds"),
        (ONE | dict(blocks=((10**9, 0),)), b"", "1000000000 lanes for 9 tokens"),
        (ONE, b"", "cut off"),
        (ONE, b"\xff" * 20, "a number without end"),
        (ZEROS, "bomb", "kept aside is cut off, or more than 1125 bytes"),
        (ZEROS, "window", "Memory usage limit"),
        (ZEROS, "cut", "kept aside is cut off"),
        (ZEROS, b"no xz", "LZMAError"),
    ],
)
def test_a_container_that_lies_about_sizes(compressor, changes, payload, told):
    """Before memory is taken or tokens are decoded."""
    made = {
        "bomb": lambda: lzma.compress(bytes(10**8)),
        "window": lambda: lzma.compress(
            b"x" * 1125, filters=[dict(id=lzma.FILTER_LZMA2, dict_size=1 << 30)]
        ),
        "cut": lambda: lzma.compress(bytes(1125))[:-8],
    }
    payload = made[payload]() if isinstance(payload, str) else payload
    packed = hostile(compressor, payload=payload, **changes)
    with pytest.raises(compress.UserError, match="x.pgz: damaged") as refused:
        compressor.restore(packed, "x.pgz")
    assert told in str(refused.value)


def test_a_container_that_claims_more_than_the_memory(compressor):
    with pytest.raises(compress.LackOfMemory, match="x.pgz: a file of 10,000,000,000,000 bytes: "):
        compressor.restore(hostile(compressor, size=10**13), "x.pgz")


def test_a_container_without_end_is_refused(compressor):
    """A thousand blocks of which none has a byte; and one that would go on, for want of words."""
    tokens = 1000 * compress.BLOCK_TOKENS
    packed = hostile(compressor, size=10**6, tokens=tokens, blocks=((9, 0),) * 1000)
    with pytest.raises(compress.UserError, match="16777216000 tokens for 1000000 bytes"):
        compressor.restore(packed, "x.pgz")
    packed = hostile(compressor, size=19_000, tokens=19_000, blocks=((2, 0),))
    with pytest.raises(compress.UserError, match="restores to other bytes"):
        compressor.restore(packed, "x.pgz")
    assert compressor.rt.all_done < 100


def test_an_unknown_device_is_refused(compressor):
    header = compressor.compress(b"").header
    packed = header.digest + header.made + bytes([1, 7, 0, 0])
    packed = compress.PREFIX + hashlib.sha256(packed).digest()[:8] + packed
    with pytest.raises(compress.UserError, match="x: damaged .*1 threads, device 7"):
        compress.device_of(packed, "x")


def test_too_little_memory_for_the_counts_is_said(compressor, monkeypatch):
    monkeypatch.setattr(train_gpt, "available_memory", lambda: 99)
    told = "--lanes 1: 1 tokens in 1 lanes: .* bytes of memory, 99 are free; fix: smaller ones"
    with pytest.raises(compress.LackOfMemory, match=told):
        compressor.compress(b"\xfe")


def test_memory_for_counts_is_that_of_their_kind(compressor, monkeypatch):
    asked = []
    monkeypatch.setattr(train_gpt, "require_memory", lambda needed, *_: asked.append(needed))
    plan = compress.plan_of(30_000, 9, compressor.cfg.window)
    rest = train_gpt.proof_bytes(compressor.cfg, plan, 0, False)
    for kind in (train_gpt.ContextTable, train_gpt.ContextDictionary):
        monkeypatch.setattr(train_gpt, "context_counts", lambda *_, kind=kind: kind)
        compressor.require_room(plan, "x")
        assert asked.pop() == kind.TOKEN_BYTES * 30_000 + rest and not asked


def test_no_escapes_reach_the_terminal(compressor, monkeypatch):
    """Neither by a header, which has no text, nor by a table that has its fingerprint."""
    made = compressor.made() | {"torch": "\x1b]0;owned\x07" + "x" * 999}
    packed = hostile(compressor, made=compress.fingerprint_of(made))
    table = {compress.fingerprint_of(made).hex(): made}
    monkeypatch.setattr(compressor, "table", lambda: table)
    with pytest.raises(compress.UserError, match="another machine .torch .*owned") as refused:
        compressor.restore(packed)
    assert "\x1b" not in str(refused.value) and len(str(refused.value)) < 300
    with pytest.raises(compress.UserError) as refused:
        compressor.restore(b"PGZ\x1b]0;owned\x07")
    assert str(refused.value).isprintable()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_nothing_but_a_line(artifacts, tmp_path, number):
    (tmp_path / "a").write_bytes(SCRIPTS.encode() * 20)
    command = [sys.executable, ROOT / "records/tools/compress.py", "a", "--lanes", "1"]
    command += ["--artifact", artifacts["lossless"]]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    running = subprocess.Popen(command, cwd=tmp_path, env=clean_environment(), **pipes)
    assert "compressing: " in running.stderr.readline()  # on its way
    running.send_signal(number)
    out, err = running.communicate(timeout=30)
    assert (running.returncode, out) == (128 + number, "")
    assert err == "interrupted; no file is left half-written\n" and names(tmp_path) == ["a"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_it_loads(artifacts, tmp_path, number):
    command = [sys.executable, "-X", "importtime", ROOT / "records/tools/compress.py", "a"]
    command += ["--artifact", artifacts["lossless"]]
    running = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    for line in running.stderr:
        if line.endswith("| torch.version\n") or " torch._utils" in line:
            break
    running.send_signal(number)
    _, err = running.communicate(timeout=30)
    assert running.returncode == 128 + number and "Traceback" not in err
    assert err.endswith("interrupted\n")


def test_damaged_artifact(command, tmp_path):
    (tmp_path / "a").write_bytes(b"text")
    (tmp_path / "artifact.bin").write_bytes(b"no artifact")
    status, _, err = command("a", artifact="artifact.bin")
    assert status == 2 and err.startswith("error: artifact.bin: unreadable")


def test_progress_reaches_the_end(compressor, monkeypatch):
    """On a terminal; elsewhere standard error stays empty, as the other tests see."""
    bars = []

    def bar_of(total, desc, disable, **_):
        assert disable is None  # tqdm: hidden unless on a terminal
        bars.append((desc, bar := tqdm.tqdm(total=total, file=io.StringIO())))
        return bar

    monkeypatch.setattr(compress, "tqdm", bar_of)
    packed = compressor.compress(b"\xfe" * 300, 7)
    compressor.restore(packed.data)
    assert [what for what, _ in bars] == ["compressing", "restoring"]
    assert [bar.n for _, bar in bars] == [bar.total for _, bar in bars]
    assert [bar.total for _, bar in bars] == [300, 300]


def test_fresh_processes(artifacts, tmp_path):
    """One process compresses, another restores, neither in the repository."""
    (tmp_path / "a").write_bytes(SCRIPTS.encode()[:800])
    script, artifact = str(ROOT / "records/tools/compress.py"), str(artifacts["lossless"])
    environ = clean_environment() | {"PYTHONDONTWRITEBYTECODE": "1"}
    for arguments in (["a"], ["--restore", "a.pgz", "--output", "b"]):
        command = [sys.executable, script, *arguments, "--artifact", artifact]
        with cores(1):
            done = subprocess.run(
                command, cwd=tmp_path, env=environ, capture_output=True, text=True
            )
        assert done.returncode == 0 and done.stderr == "", done.stderr
    assert (tmp_path / "b").read_bytes() == (tmp_path / "a").read_bytes()
