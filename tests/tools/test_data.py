"""data/: any text becomes a lossless tokenizer and shards whose bytes add up to the text."""

import bz2
import contextlib
import gzip
import hashlib
import io
import json
import lzma
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import zstandard
from helpers import CHINESE, ROOT, SCRIPTS, SOURCE_CODE, model_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import prepare
import prepare_text
import rebuild

DATA = ROOT / "data"

TRAPS = "<s></s><pad><unk><0x0A><0xE2>\0\0 ⁇ \u2585 \x1f\x7f \t\r\n\r\n  two  spaces  \u3000\xa0"
TEXTS = {
    "chinese": CHINESE,
    "ten_scripts": SCRIPTS,
    "source_code": SOURCE_CODE,
    "crlf": "first line\r\nsecond line\r\n\r\n" * 60,
    "shorter_than_a_window": "A text of a few words, no more.",
    "two_characters": "世界",
    "traps": TRAPS * 30,
    "space_mark": "a literal \u2581 and two \u2581\u2581\n\u2581" * 40,
    "only_space_marks": "\u2581" * 50,
    "spaces_only_in_validation": "世界" * 200 + "世 界 " * 30,
    "only_nul": "\0" * 50,
    "only_newlines": "\n" * 50,
    "one_long_word": "ab" * 5_000,
}


def run(*arguments):
    """Call the command line in this process; return its exit status."""
    return prepare_text.main([str(argument) for argument in arguments])


def prepared(folder, text, *more, name="text"):
    """Write `text` to a file and make a dataset of it; return the dataset's folder."""
    (folder / "in.txt").write_bytes(text.encode())
    out = folder / name
    assert run("--input", folder / "in.txt", "--out", out, *more) == 0
    return out


def read_shards(paths):
    """The tokens of shards, each checked against the published format."""
    parts = []
    for path in sorted(paths):
        header = np.fromfile(path, "<i4", 256)
        tokens = np.fromfile(path, "<u2", offset=1024)
        assert header.tolist() == [20240520, 1, len(tokens)] + [0] * 253
        assert path.stat().st_size == 1024 + 2 * len(tokens)
        parts.append(tokens)
    return np.concatenate(parts)


def read_val(out):
    """(tokens, source documents, tokenizer) of a dataset's validation side."""
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(out / "tokenizer.model"))
    (source,) = out.glob("*_val.jsonl")
    documents = [json.loads(line)["text"] for line in source.read_bytes().split(b"\n") if line]
    return read_shards(out.glob("*_val_*.bin")), documents, tokenizer


def split_at_bos(tokens):
    """The documents of a token stream, without their BOS."""
    assert tokens[0] == prepare_text.BOS
    starts = np.flatnonzero(tokens == prepare_text.BOS)
    return [part[1:].tolist() for part in np.split(tokens, starts[1:])]


def rule_bytes(tokenizer, tokens):
    """Bytes by the rule: specials none, byte pieces one, others UTF-8 with a space for U+2581."""
    total = 0
    for token in map(int, tokens):
        special = tokenizer.is_control(token) or tokenizer.is_unknown(token)
        if tokenizer.is_byte(token):
            total += 1
        elif not special and not tokenizer.is_unused(token):
            total += len(tokenizer.id_to_piece(token).replace("\u2581", " ").encode())
    return total


def check_lossless(out):
    """Validation tokens decode to the source, and their bytes add up to its bytes."""
    tokens, documents, tokenizer = read_val(out)
    assert tokenizer.decode(split_at_bos(tokens)) == documents
    assert rule_bytes(tokenizer, tokens) == sum(len(text.encode()) for text in documents)
    assert tokens.max() < tokenizer.vocab_size()
    return documents


@pytest.mark.parametrize("name", TEXTS)
def test_round_trip_and_byte_sums(name, tmp_path):
    text = TEXTS[name]
    out = prepared(tmp_path, text, "--val-fraction", "0.3")
    val = check_lossless(out)
    train = read_shards(out.glob("*_train_*.bin"))
    _, _, tokenizer = read_val(out)
    assert "".join(tokenizer.decode(split_at_bos(train)) + val) == text


def test_tokenizer_is_as_published(tmp_path):
    _, _, tokenizer = read_val(prepared(tmp_path, SCRIPTS + "2026 " * 99, "--vocab-size", 512))
    specials = [tokenizer.id_to_piece(index) for index in range(4)]
    assert specials == ["<pad>", "<s>", "</s>", "<unk>"]
    assert tokenizer.vocab_size() <= 512
    assert all(tokenizer.is_byte(index) for index in range(4, 260))
    assert tokenizer.encode("2026", out_type=str)[-4:] == list("2026")
    assert not tokenizer.id_to_piece(tokenizer.encode("Hello")[0]).startswith("\u2581")


@pytest.mark.parametrize("vocab_size", [prepare_text.MIN_VOCAB, 300, 1024, 65_536])
def test_vocabulary_fits_any_script(vocab_size, tmp_path):
    source = random.Random(0)
    han = "".join(chr(0x4E00 + int(source.paretovariate(0.6)) % 9_000) for _ in range(20_000))
    out = prepared(tmp_path, han, "--vocab-size", vocab_size)
    check_lossless(out)
    _, _, tokenizer = read_val(out)
    assert tokenizer.vocab_size() <= vocab_size


def test_literal_space_mark_is_three_byte_tokens(tmp_path, capsys):
    out = prepared(tmp_path, "x\u2581y " * 100)
    tokens, _, tokenizer = read_val(out)
    assert "<0xE2> <0x96> <0x81>" in " ".join(map(tokenizer.id_to_piece, tokens.tolist()))
    assert "literal U+2581" in capsys.readouterr().out


@pytest.fixture(scope="module")
def english_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("english")
    text = "The quick brown fox jumps over the lazy dog, and it did so 1,024 times.\n" * 50
    return prepared(folder, text + TRAPS) / "tokenizer.model"


any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
trap_text = st.lists(st.sampled_from(["\u2581", " ", "\0", "\n", "<s>", "a", "é", "\u2585", "中"]))


@settings(deadline=None, max_examples=150, suppress_health_check=list(HealthCheck))
@given(texts=st.lists(any_text | trap_text.map("".join), max_size=4))
def test_any_text_is_encoded_without_loss(english_model, texts):
    tokenizer = prepare_text.load_tokenizer(english_model)
    tokens = prepare_text.encode_documents(tokenizer, texts)
    assert tokenizer.decode(tokens) == texts if texts else tokens == []
    for text, ids in zip(texts, tokens, strict=True):
        assert rule_bytes(tokenizer, ids) == len(text.encode())


@settings(deadline=None, max_examples=40, suppress_health_check=list(HealthCheck))
@given(text=(any_text | trap_text.map("".join)).filter(bool), vocab_size=st.integers(261, 400))
def test_any_text_trains_a_lossless_tokenizer(text, vocab_size):
    model = prepare_text.train_tokenizer([text], vocab_size)
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model)
    assert tokenizer.vocab_size() <= vocab_size
    assert tokenizer.decode(prepare_text.encode_documents(tokenizer, [text])) == [text]


@given(texts=st.lists(any_text.filter(bool), max_size=6), fraction=st.floats(0.001, 0.999))
def test_few_documents_are_split_by_bytes(texts, fraction):
    whole = "".join(texts)
    if len(whole) < 2:
        with pytest.raises(prepare_text.DataError, match="one each"):
            prepare_text.split_tail(texts, fraction)
        return
    train, val = prepare_text.split_tail(texts, fraction)
    assert train and val and "" not in train + val
    assert "".join(train + val) == whole
    cut, wanted = len("".join(train).encode()), len(whole.encode()) * (1 - fraction)
    assert abs(cut - wanted) <= 4 + 0.5 or len("".join(train)) in (1, len(whole) - 1)


@given(count=st.integers(20, 90), fraction=st.floats(0.001, 0.999), seed=st.integers())
def test_many_documents_are_split_by_number(count, fraction, seed):
    documents = [str(number) for number in range(count)]
    train, val = prepare_text.split_documents(documents, fraction, seed)
    assert sorted(train + val) == sorted(documents)
    assert len(val) == min(max(round(count * fraction), 1), count - 1)


@given(text=any_text, limit=st.integers(1, 9))
def test_spans_lose_nothing(text, limit):
    spans = prepare_text.spans(text, limit)
    assert "".join(spans) == text
    assert all(len(span) <= limit for span in spans)


def test_cutting_a_huge_document_changes_no_token(english_model, monkeypatch):
    tokenizer = prepare_text.load_tokenizer(english_model)
    text = "The quick  brown fox, \n jumps 42 times. " * 20
    whole = prepare_text.encode_documents(tokenizer, [text])
    monkeypatch.setattr(prepare_text, "ENCODER_CHARS", 30)
    assert prepare_text.encode_documents(tokenizer, [text]) == whole


def test_tokenizer_sees_only_the_training_part(tmp_path):
    documents = [f"plain words of document {number}. " * 5 for number in range(40)]
    train, val = documents[:20], [text + "zzzzzzzzqqqqqqqq" * 50 for text in documents[20:]]
    prepare_text.write_dataset(train, val, tmp_path / "a", "a", 512)
    prepare_text.write_dataset(train, documents[20:], tmp_path / "b", "b", 512)
    models = [(tmp_path / name / "tokenizer.model").read_bytes() for name in "ab"]
    assert models[0] == models[1]


def digests(folder):
    """sha256 of every file of a folder."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_same_input_and_seed_give_the_same_bytes(tmp_path, monkeypatch):
    folders = []
    for place, seed in (("one", 1), ("two", 1), ("three", 2)):
        home = tmp_path / place
        for number in range(30):
            path = home / "in" / f"{number % 3}" / f"{number}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"Document {number} says {number * number}.\n" * 9)
        monkeypatch.chdir(home)
        assert run("--input", "in", "--out", home / "set", "--seed", seed) == 0
        folders.append(digests(home / "set"))
    assert folders[0] == folders[1]
    assert folders[0] != folders[2]
    assert len(folders[0]) == 5
    assert str(tmp_path).encode() not in (tmp_path / "one/set/tokenizer.model").read_bytes()


def test_shards_roll_over(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_text, "SHARD_TOKENS", 100)
    out = prepared(tmp_path, SOURCE_CODE)
    paths = sorted(out.glob("text_train_*.bin"))
    assert [path.name for path in paths[:2]] == ["text_train_000000.bin", "text_train_000001.bin"]
    assert [path.stat().st_size for path in paths[:-1]] == [1224] * (len(paths) - 1)
    check_lossless(out)
    monkeypatch.undo()
    prepared(tmp_path, SOURCE_CODE)  # a second run leaves no shard of the first
    assert len(list(out.glob("*_train_*.bin"))) == 1
    check_lossless(out)


def test_inputs_separator_jsonl_and_compressed(tmp_path):
    lines = "".join(json.dumps({"text": f"line {n}\u2028", "id": n}) + "\n" for n in range(9))
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "b.jsonl.xz").write_bytes(lzma.compress(lines.encode()))
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "d.txt").write_bytes("\ufeffone\r\n===\ntwo===\n".encode())
    (tmp_path / ".hidden").write_bytes(b"\xff")
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old.txt").write_text("an output is no input")
    files = prepare_text.input_files([tmp_path], tmp_path / "out")
    documents = prepare_text.read_documents(files, "===\n")
    assert documents[:27] == [f"line {n}\u2028" for n in range(9)] * 3
    assert documents[27:] == ["one\r\n", "two"]  # a byte order mark is no text


# -----------------------------------------------------------------------------
# Formats

RECORDS = [f"text {n}: caf\u00e9\u2028" for n in range(60)]
PACKERS = {
    "": bytes,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
    ".zst": zstandard.compress,
    ".lzma": lambda data: lzma.compress(data, format=lzma.FORMAT_ALONE),
}


def json_lines(texts=RECORDS):
    return "".join(json.dumps({"id": 1, "text": text}) + "\n" for text in texts)


def documents_in(folder, *named, separator=""):
    files = prepare_text.input_files(named or [folder], folder / "out")
    return prepare_text.read_documents(files, separator, named)


JSON = {
    "lines.json": json_lines(),
    "lines.JSON": json_lines(),
    "lines.ndjson": json_lines(),
    "lines.JSONL": json_lines(),
    "lines.jsonlines": json_lines(),
    "marked.jsonl": "\ufeff" + json_lines(),
    "crlf.jsonl": json_lines().replace("\n", "\r\n"),
    "objects.json": json.dumps([{"text": text} for text in RECORDS], indent=2),
    "strings.json": json.dumps(RECORDS),
    "mixed.json": json.dumps([RECORDS[0], *({"text": text} for text in RECORDS[1:])]),
}


@pytest.mark.parametrize("packer", PACKERS)
@pytest.mark.parametrize("name", JSON)
def test_json_by_any_name_is_documents(name, packer, tmp_path):
    for suffix in {packer, packer.upper()}:
        path = tmp_path / (name + suffix)
        path.write_bytes(PACKERS[packer](JSON[name].encode()))
        assert documents_in(tmp_path, path) == RECORDS
        path.unlink()


def test_one_json_object_is_one_document(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"title": "x", "text": "one\ntwo"}, indent=1))
    assert documents_in(tmp_path) == ["one\ntwo"]


@pytest.mark.parametrize("name", ["a.txt", "a", "a.jsonl.bak", "a.md.gz"])
@pytest.mark.parametrize("text", [json_lines(), JSON["objects.json"], '\n {"text": "one"}\n'])
def test_json_by_a_plain_name_is_refused(name, text, tmp_path):
    packed = gzip.compress(text.encode()) if name.endswith("gz") else text.encode()
    (tmp_path / name).write_bytes(packed)
    with pytest.raises(prepare_text.DataError, match="rename it to .*.jsonl"):
        documents_in(tmp_path, tmp_path / name)


@pytest.mark.parametrize(
    "text",
    [
        '{"text": "one"}\nand no JSON\n',
        '{"title": "one"}\n',
        "{braces} and [brackets]\n",
        "[Chorus]\nLa la\n",
        '["a", "b"]',
        "{" * 100_000,
    ],
)
def test_text_that_looks_a_little_like_json_is_text(text, tmp_path):
    (tmp_path / "a.txt").write_text(text)
    assert documents_in(tmp_path) == [text]


OTHER_KEY = [json.dumps({"id": n, "content": text}) for n, text in enumerate(RECORDS)]
ALMOST_JSON = {  # text, and what is said of it
    "bad last": (json_lines() + "oops", "line 61 is none; correct or remove it, then rename"),
    "cut last": (json_lines()[:-9], "line 60 is none"),
    "cut, few": (json_lines(RECORDS[:4])[:-9], "line 4 is none"),
    "comment": ("# a comment\n" + json_lines(), "line 1 is none"),
    "blank lines, bad inside": (json_lines(["a"] * 9) + "\n\n{'text'}\n" + json_lines(), "line 12"),
    "one without text": (json_lines() + '{"id": 7}\n', "line 61 is none"),
    "lone surrogate": (json_lines() + '{"text": "\\ud800"}\n', "line 61 is none"),
    "crlf": (json_lines().replace("\n", "\r\n") + "oops\r\n", "line 61 is none"),
    "cut array": ("[" + ",\n".join(json_lines().splitlines())[:-9], "rename the file to a.json$"),
    "pretty": ("".join(json.dumps({"text": t}, indent=1) + "\n" for t in RECORDS), "jq -c ."),
    "one line": (json_lines().replace("\n", " "), "60 JSON objects .* not one a line"),
    "other key": ("\n".join(OTHER_KEY), 'keys: "content", "id"; name that'),
    "other key, bad": ("\n".join(OTHER_KEY)[:-5], 'keys: "content", "id"; name that'),
    "other key, array": (f"[{','.join(OTHER_KEY)}]", """jq -c '{text: .\\["content"]}' """),
    "no text at all": ('{"a": 1}\n{"a": 2}\n', 'keys: "a"; .* jq -c .{text: tostring}'),
}


@pytest.mark.parametrize("name", ["a.txt", "a.log", "a", "a.jsonl.xz.bak"])
@pytest.mark.parametrize("case", ALMOST_JSON)
def test_nearly_json_by_a_plain_name_is_refused(case, name, tmp_path):
    """In a folder, too: one bad line would make text of all the syntax."""
    text, said = ALMOST_JSON[case]
    said = said.replace("a.json$", f"{Path(name).stem}.json$")
    (tmp_path / name).write_bytes(text.encode())
    with pytest.raises(prepare_text.DataError, match=f"{name}: .*{said}") as refused:
        documents_in(tmp_path, separator="\n")
    assert "\n" not in str(refused.value)


def test_nearly_json_of_a_pipe_is_refused(tmp_path):
    (tmp_path / "in").write_text(json_lines() + "oops")
    done = shell(f"{PREPARE} --out out --input <(cat in)", tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "line 61 is none; correct or remove it\n" in done.stderr


@pytest.mark.parametrize("key", ["content", 'it\'s "a" key'])
def test_other_keys_are_renamed_by_what_is_said(key, tmp_path):
    if not shutil.which("jq"):
        pytest.skip("jq is not installed")
    lines = [json.dumps({"id": n, key: text}) for n, text in enumerate(RECORDS)]
    (tmp_path / "a.txt").write_text("\n".join(lines))
    with pytest.raises(prepare_text.DataError) as refused:
        documents_in(tmp_path)
    shell(str(refused.value).partition('"text": ')[2], tmp_path)
    assert documents_in(tmp_path, tmp_path / "a.jsonl") == RECORDS


@pytest.mark.parametrize(
    "text",
    [
        "Two examples:\n" + '{"a": 1}\n' * 2,
        "words\n" * 2 + '{"text": "one"}\n' * 12,
        "if (x) {\n  y = [];\n}\n" * 50,
        "{}\n[]\n",
        "[\n" * 50,
        '{"a": 1}',
    ],
)
def test_text_with_some_json_in_it_is_text(text, tmp_path):
    (tmp_path / "a.md").write_text(text)
    assert documents_in(tmp_path) == [text]


CONFIGURATION = '{"name": "x", "version": [1]}'


@pytest.mark.parametrize("text", [CONFIGURATION, "// a comment\n{}\n", "[1, 2]", '[{"body": 1}]'])
def test_other_json_is_text_in_a_folder_and_refused_by_name(text, tmp_path, capsys):
    """A folder of source code has such files; who names one means its documents."""
    (tmp_path / "package.json").write_text(text)
    assert documents_in(tmp_path) == [text]
    note = capsys.readouterr().err
    assert note.startswith('note: 1 .json without "text"') and note.count("\n") == 1
    with pytest.raises(prepare_text.DataError, match="package.json: .*text"):
        documents_in(tmp_path, tmp_path / "package.json")


def test_a_wrong_line_of_a_json_is_refused_in_a_folder_too(tmp_path):
    (tmp_path / "a.json").write_text(json_lines(["one"]) + '{"content": 1}\n')
    with pytest.raises(prepare_text.DataError, match="line 2"):
        documents_in(tmp_path)
    (tmp_path / "a.json").write_text('["one", 2]')
    with pytest.raises(prepare_text.DataError, match="element 2"):
        documents_in(tmp_path)


@pytest.mark.parametrize("packer", list(PACKERS)[1:5])
@pytest.mark.parametrize("name", ["a{}", "a.txt{}", "a.TXT", "A.TXT{}"])
def test_packed_text_is_known_by_its_bytes(name, packer, tmp_path):
    """And by each part of it, as cat a.gz b.gz makes."""
    pack = PACKERS[packer]
    path = tmp_path / name.format(packer.upper())
    path.write_bytes(pack(b"\xef\xbb\xbfone\r\n") + pack("zwölf".encode()))
    assert documents_in(tmp_path) == ["one\r\nzwölf"]
    path.write_bytes(pack("zwölf".encode() * 50)[:-5])
    with pytest.raises(prepare_text.DataError, match="cannot be read"):
        documents_in(tmp_path)


STREAMS = {"gz": b"\0" * 3, "xz": b"\0" * 8, "bz2": b"", "zst": b"\x50\x2a\x4d\x18\4\0\0\0abcd"}


@pytest.mark.parametrize("kind", STREAMS)
def test_every_stream_of_a_file_is_read(kind, tmp_path):
    """Also after padding (zstd: a skippable frame), and what is no stream is not passed over."""
    pack, between = PACKERS[f".{kind}"], STREAMS[kind]
    texts = ["eins " * 9, "zwei" * 300_000, "drei"]
    streams = [pack(text.encode()) for text in texts]
    path = tmp_path / f"a.txt.{kind}"
    for padding in (b"", between, between * 50_000):
        path.write_bytes(padding.join(streams) + padding)
        assert documents_in(tmp_path) == ["".join(texts)]
        path.write_bytes(padding.join(streams)[:-3])
        with pytest.raises(prepare_text.DataError, match="cannot be read"):
            documents_in(tmp_path)
        path.write_bytes(padding.join(streams) + padding + b"other bytes")
        with pytest.raises(prepare_text.DataError, match="cannot be read"):
            documents_in(tmp_path)


def test_zstd_that_begins_with_a_skippable_frame(tmp_path):
    (tmp_path / "a").write_bytes(STREAMS["zst"] + zstandard.compress(b"text"))
    assert documents_in(tmp_path) == ["text"]


def parquet_like():
    return b"PAR1\x15\x04" + bytes(range(256))


FOREIGN = {
    "PNG": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
    "JPEG": b"\xff\xd8\xff\xe0\0\x10JFIF",
    "GIF": b"GIF89a\x01\0\x01\0\xf0",
    "WebP": b"RIFF\x24\0\0\0WEBPVP8 ",
    "PDF": b"%PDF-1.4\nplain text all of it\n",
    "RTF": b"{\\rtf1 plain text}",
    "zip": b"PK\x03\x04\x14\0\0\0\x08\0\xff",
    "tar": b"a.txt" + bytes(252) + b"ustar\x0000" + bytes(248),
    "7z": b"7z\xbc\xaf\x27\x1c",
    "Parquet": parquet_like(),
    "SQLite": b"SQLite format 3\0\x10",
    "NumPy": b"\x93NUMPY\x01\0",
    "shard": np.array([20240520, 1, 3] + [0] * 253, "<i4").tobytes() + b"abcdef",
    "program": b"\x7fELF\x02\x01\x01\0",
    "lz4": b"\x04\x22\x4d\x18\xff",
    "gzip within": gzip.compress(gzip.compress(b"x" * 99)),
    "UTF-16": "text\n".encode("utf-16"),
    "UTF-16LE": "text and more\n".encode("utf-16-le"),
    "UTF-16BE": "text and more\n".encode("utf-16-be"),
    "UTF-32": "text\n".encode("utf-32"),
}


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("packed", [False, True])
def test_the_format_of_what_is_no_text_is_named(name, packed, tmp_path):
    data = FOREIGN[name]
    (tmp_path / "a file.txt").write_bytes(zstandard.compress(data) if packed else data)
    with pytest.raises(prepare_text.DataError, match=name) as refused:
        documents_in(tmp_path)
    assert name[:3] != "UTF" or f"iconv -f {name} -t UTF-8 '" in str(refused.value)


WIDE = {
    "english": "A line of text.\r\n" * 40,
    "quotes": "\u2018It was a word\u2019, he said \u2014 \U0001f600 caf\xe9\t" * 40,
    "russian": "Широкая электрификация южных губерний.\n" * 40,
    "late": "中文" * 200 + "and then English text, much of it\n" * 90,
    "one long line": "word " * 50_000,
    "short": "some text",
}


@pytest.mark.parametrize("bom", ["", "\ufeff"])
@pytest.mark.parametrize("encoding", ["UTF-16LE", "UTF-16BE", "UTF-32LE", "UTF-32BE"])
@pytest.mark.parametrize("name", WIDE)
def test_wide_encodings_are_named(name, encoding, bom, tmp_path):
    """And the command that is given makes the text of it."""
    path = tmp_path / "a.txt"
    path.write_bytes((bom + WIDE[name]).encode(encoding))
    known = encoding[:6] if bom else encoding
    with pytest.raises(prepare_text.DataError, match=f"{known}, not UTF-8") as refused:
        documents_in(tmp_path)
    command = str(refused.value).partition("convert it: ")[2]
    assert command == f"iconv -f {known} -t UTF-8 {path} > NEW_FILE"
    if name == "late" and not bom:
        return
    shell(command, tmp_path)
    assert (tmp_path / "NEW_FILE").read_bytes().decode() == WIDE[name]


@pytest.mark.parametrize(
    "text",
    ["hello\0 world, so", "abc\0" * 90, "a\0" * 3, "\0" * 800, "\n" * 800 + "\0", TRAPS * 9],
)
def test_utf8_with_nul_is_text(text, tmp_path):
    (tmp_path / "a.txt").write_bytes(text.encode())
    assert documents_in(tmp_path) == [text]


@pytest.mark.parametrize(
    "text", ["BM is a word", "PAR1", "MZ", "Rar!", "ID3 tags", "\0" * 50, "B\0"]
)
def test_text_that_begins_like_another_format_is_text(text, tmp_path):
    (tmp_path / "a.txt").write_text(text)
    assert documents_in(tmp_path) == [text]


def test_bombs_and_endless_files_are_refused(tmp_path, monkeypatch):
    """Before they are more than is allowed; all files together count."""
    monkeypatch.setattr(prepare_text, "ALWAYS_UNPACKED", 10**6)
    monkeypatch.setattr(prepare_text, "free_memory", lambda: 6 * 2 * 10**6)
    zeros = bytes(1_500_000)
    for suffix, pack in list(PACKERS.items())[1:]:
        bomb = tmp_path / f"bomb{suffix}"
        bomb.write_bytes(pack(zeros))
        assert len(bomb.read_bytes()) < 5000
        with pytest.raises(
            prepare_text.DataError, match=f"bomb{suffix}: more than 1,000,000 bytes, 200 times"
        ):
            documents_in(tmp_path, bomb)
        bomb.unlink()
    with pytest.raises(prepare_text.DataError, match="/dev/zero: more than 2,000,000 bytes"):
        documents_in(tmp_path, "/dev/zero")
    with open(tmp_path / "sparse", "wb") as file:
        file.truncate(10**11)
    with pytest.raises(
        prepare_text.DataError, match="sparse: 100,000,000,000 bytes, over 2,000,000, what"
    ):
        documents_in(tmp_path)
    (tmp_path / "sparse").unlink()
    for name in "abc":
        (tmp_path / name).write_text("x" * 900_000)
    with pytest.raises(prepare_text.DataError, match="c: 900,000 bytes, over 200,000, what"):
        documents_in(tmp_path)
    (tmp_path / "c").unlink()
    assert len(documents_in(tmp_path)) == 2


def test_honest_text_may_pack_well(tmp_path):
    text = "the same line again and again\n" * 200_000
    (tmp_path / "a.xz").write_bytes(lzma.compress(text.encode()))
    assert documents_in(tmp_path) == [text]
    assert 10**8 < prepare_text.free_memory() < 10**14


# -----------------------------------------------------------------------------
# Folders as they are

MESSY = {
    "readme.md": b"# Notes\nsome words on this and that\n" * 90,
    "src/main.py": b"def main():\n    return 1\n" * 90,
    "src/deep/deeper/lib.rs": b"fn main() {}\n" * 90,
    "packed.txt.gz": gzip.compress(b"packed words\n" * 90),
    "some.jsonl": json_lines().encode(),
    "settings.json": b'{"a": 1}',
    "long.txt": b"x" + "\u4e2d".encode() * 50_000,  # 65,536 falls within a character
}
LEFT_OUT = {  # by reason; None: made by messy_folder
    "hidden": {".git/": None, ".DS_Store": b"\0\0", "src/.env": b"a=1"},
    "archive": {"a.zip": b"PK\x03\x04\x14\0", "b.tar.gz": gzip.compress(FOREIGN["tar"])},
    "binary": {
        "logo.png": FOREIGN["PNG"],
        "model.bin": bytes(range(256)) * 999,
        "nul.txt": b"a\0b\n",
        "paper.pdf": FOREIGN["PDF"],
        "src/z.xz": lzma.compress(FOREIGN["SQLite"]),
        "src/z2": FOREIGN["program"],
    },
    "not UTF-8": {"latin1.txt": b"caf\xe9", "late.txt": b"x" * 99_999 + b"\xe9"},
    "UTF-16": {"wide.txt": "some text\n".encode("utf-16"), "wide2": "more\n".encode("utf-16-le")},
    "empty": {"empty.txt": b"", "src/__init__.py": b"", "mark.txt": b"\xef\xbb\xbf"},
    "broken link": {"gone": None, "itself": None},
    "link to a folder": {"src/loop/": None},
    "no regular file": {"fifo": None, "zero": None},
    "cannot be read (Input/output error)": {"unreadable.txt": None},
    "cannot be read (damaged)": {"cut.xz": lzma.compress(b"words " * 99)[:-9]},
    "cannot be read (no .gz)": {"fake.gz": b"no gzip"},
}
COUNTS = {reason: len(names) for reason, names in LEFT_OUT.items()}


def fill(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


@pytest.fixture
def messy(tmp_path, monkeypatch):
    """A working folder with a folder "in" of all that there is."""
    monkeypatch.chdir(tmp_path)
    fill(Path("in"), MESSY | {".git/config": b"[core]", ".git/objects/ab": b"x\0y"})
    for files in LEFT_OUT.values():
        fill(Path("in"), {name: data for name, data in files.items() if data is not None})
    os.mkfifo("in/fifo")
    links = {"gone": "nowhere", "itself": "itself", "src/loop": "..", "zero": "/dev/zero"}
    for name, target in (links | {"unreadable.txt": "/proc/self/mem"}).items():
        Path("in", name).symlink_to(target)
    return Path("in")


def test_of_a_messy_folder_the_text_is_taken(messy, capsys):
    """The same dataset as of a folder with nothing else in it, up to the counts."""
    assert run("--input", "in", "--out", "set", "--vocab-size", 300) == 0
    said, *lines = capsys.readouterr().err.splitlines()[1:]  # after the note on settings.json
    assert said.startswith(f"note: 7 files taken, {sum(COUNTS.values())} files or folders left out")
    for reason, files in LEFT_OUT.items():
        names = [f"in/{name}" for name in sorted(files)]
        shown = ", ".join(names if len(names) <= 4 else [*names[:4], "..."])
        assert f"  {reason}: {len(names)} ({shown})" in lines
    assert len(lines) == len(LEFT_OUT)
    fill(Path("clean"), MESSY)
    assert run("--input", "clean", "--out", "other/set", "--vocab-size", 300) == 0
    assert "left out" not in capsys.readouterr().err
    facts = facts_of(Path("set"))
    assert facts.pop("left_out") == COUNTS
    assert facts == facts_of(Path("other/set"))
    ours, theirs = digests(Path("set")), digests(Path("other/set"))
    assert ours.pop("dataset.json") != theirs.pop("dataset.json") and ours == theirs


@pytest.mark.parametrize("name", ["logo.png", "latin1.txt", "a.zip", "cut.xz", "unreadable.txt"])
def test_what_is_named_itself_is_refused(messy, name, capsys):
    """Beside its folder, too."""
    assert run("--input", "in", f"in/{name}", "--out", "set") == 2
    err = capsys.readouterr().err
    assert f"prepare_text.py: in/{name}: " in err and "--exclude" not in err


def test_an_unreadable_folder_and_file_are_named(tmp_path, monkeypatch, capsys):
    fill(tmp_path, {"in/a.txt": b"some text", "in/b.txt": b"x", "in/sub/c.txt": b"x"})
    monkeypatch.chdir(tmp_path)
    scan = os.scandir

    def forbidden(path, *more):
        if str(path) in ("in/b.txt", "in/sub"):
            raise PermissionError(13, "Permission denied", path)
        return (scan if not more else open)(path, *more)

    monkeypatch.setattr(os, "scandir", forbidden)
    monkeypatch.setattr(prepare_text, "open", forbidden, raising=False)
    assert run("--input", "in", "--out", "out", "--tokenizer", "nowhere") == 2
    assert "cannot be read (Permission denied): 2 (in/sub/, in/b.txt)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "taken"),
    [
        ("--glob *.md", "readme.md"),
        ("--glob *.md --glob *.rs", "readme.md src/deep/deeper/lib.rs"),
        ("--glob **/*.md", "readme.md"),
        ("--glob src/*", "src/deep/deeper/lib.rs src/main.py"),
        ("--glob in/src/*.py", "src/main.py"),
        ("--glob ./src/**/*.rs", "src/deep/deeper/lib.rs"),
        ("--glob *.py --exclude src", ""),
        ("--glob *.MD", ""),
        ("--glob [rm]*.[mp]* --exclude readme.md", "src/main.py"),
        ("--glob *.?? --exclude deeper/", "readme.md src/main.py"),
        ("--glob *.?? --exclude in/src/deep", "readme.md src/main.py"),
        ("--glob *.?? --exclude deep/deeper", "readme.md src/deep/deeper/lib.rs src/main.py"),
        ("--glob *.?? --exclude **/deeper", "readme.md src/main.py"),
        ("--glob *.?? --exclude /src", "readme.md"),
        ("--exclude *", ""),
        ("--exclude in", ""),
    ],
)
def test_globs_and_excludes(tmp_path, monkeypatch, options, taken):
    monkeypatch.chdir(tmp_path)
    fill(Path("in"), dict.fromkeys(["readme.md", "src/main.py", "src/deep/deeper/lib.rs"], b"x"))
    selection = prepare_text.Selection()
    names = options.split()
    for option, patterns in (("--glob", "globs"), ("--exclude", "excludes")):
        given = [names[i + 1] for i, name in enumerate(names) if name == option]
        setattr(selection, patterns, given)
    files = prepare_text.input_files(["in"], Path("set"), selection)
    assert [path.as_posix() for path in files] == [f"in/{name}" for name in taken.split()]


def test_patterns_hold_for_what_is_named_too(messy):
    """As a shell gives it: --input in/* --exclude src"""
    named = [Path("in", name) for name in ("long.txt", "readme.md", "src")]
    selection = prepare_text.Selection(["*.md", "*.py"], ["deep"])
    files = prepare_text.input_files(named, Path("set"), selection)
    assert [path.name for path in files] == ["readme.md", "__init__.py", "main.py"]
    assert selection.left_out["--exclude"] == 1


@pytest.mark.parametrize("pattern", ["", ".", "/", "./"])
def test_a_pattern_names_something(messy, pattern, capsys):
    assert run("--input", "in", "--out", "set", "--exclude", pattern) == 2
    assert "a pattern names nothing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--glob", "*.tex"], ["no text, ", "not --glob: ", "hidden: ", "or other patterns"]),
        (["--exclude", "in"], ["no text, 1 files or folders looked at; --exclude: 1 (in/)"]),
        (["--glob", "*.png"], ["binary: 1 (in/logo.png)", "itself says more"]),
    ],
)
def test_nothing_taken_is_one_line(messy, options, said, capsys):
    assert run("--input", "in", "--out", "set", *options) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and not Path("set").exists()
    assert all(part in err for part in said), err


def test_many_that_are_left_out_are_a_line(tmp_path, capsys):
    fill(tmp_path / "in", {f"{n:04}.png": FOREIGN["PNG"] for n in range(1_200)})
    fill(tmp_path / "in", {"a\nb.txt": b"some text", "e\nf.txt": b""})
    assert run("--input", tmp_path / "in", "--out", tmp_path / "set") == 0
    _, pictures, empty = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"  binary: 1,200 \((\S+/000[0-3].png, ){4}\.\.\.\)", pictures)
    assert empty.startswith("  empty: 1 (") and "e\\nf.txt" in empty


def test_the_output_within_the_input_is_no_input(messy):
    """Not even of the second time, nor by a link."""
    Path("in/link.md").symlink_to("set/set_val.jsonl")
    digest = []
    for _ in range(2):
        assert run("--input", "in", "--out", "in/set") == 0
        Path("in/link.md").unlink(missing_ok=True)
        digest.append(digests(Path("in/set")).pop("tokenizer.model"))
    assert digest[0] == digest[1]


def test_bad_json_in_a_folder_says_how_to_leave_it_out(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    broken = b'{"text": "fine"}\n{"content": 1}\n'
    fill(Path("in"), {"a.txt": b"some text", "b/[1] x.jsonl": broken, "log.jsonl": b'{"a": 1}\n'})
    assert run("--input", "in", "--out", "set") == 2
    option = capsys.readouterr().err.partition("or leave it out: ")[2]
    assert option == "--exclude 'in/b/[[]1] x.jsonl'\n"
    done = shell(f"{PREPARE} --input in --out set {option}", tmp_path)
    assert done.returncode == 0 and 'JSON lines without "text": 1 (in/log.jsonl)' in done.stderr


def test_a_bomb_in_a_folder_is_left_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prepare_text, "ALWAYS_UNPACKED", 10**6)
    fill(tmp_path / "in", {"a.txt": b"some text", "bomb.gz": gzip.compress(b"x" * 1_500_000)})
    assert run("--input", tmp_path / "in", "--out", tmp_path / "set") == 0
    assert "unpacks to too much: 1 (" in capsys.readouterr().err


def test_a_large_binary_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_text, "free_memory", lambda: 10**6)
    fill(tmp_path / "in", {"a.txt": b"some text", "b.gz": gzip.compress(bytes(9_000_000))})
    with open(tmp_path / "in/model", "wb") as file:
        file.truncate(10**11)
    assert run("--input", tmp_path / "in", "--out", tmp_path / "set") == 0
    assert facts_of(tmp_path / "set")["left_out"] == {"binary": 2}


# -----------------------------------------------------------------------------
# Small texts, long runs


def test_small_is_by_the_settings_of_tiny():
    lines = (ROOT / "records/track_cpu/tiny/config.env").read_text().splitlines()
    tiny = dict(line.split("=", 1) for line in lines if "=" in line)
    names = "ITERATIONS", "TRAIN_BATCH_TOKENS", "TRAIN_SEQ_LEN"
    numbers = [prepare_text.TINY_STEPS, prepare_text.TINY_STEP_TOKENS, prepare_text.TINY_WINDOW]
    assert [int(tiny[name]) for name in names] == numbers


@pytest.mark.parametrize(
    ("train", "val", "said"),
    [
        (409_600, 256, []),
        (409_599 // 2, 256, ["204,799 train tokens: the 800 steps of 2,048 .* them 8 times"]),
        (2_048, 255, ["2,048 train tokens: .* 800 times", "255 val tokens, not one window"]),
        (2_047, 300, ["too small to train on: 2,047 train tokens, not one step .* 800 times"]),
    ],
)
def test_a_small_text_is_said(train, val, said):
    notes = list(prepare_text.size_notes(train, val))
    assert len(notes) == len(said)
    assert all(map(re.search, said, notes))


def test_a_long_run_says_where_it_is(messy, monkeypatch, capsys):
    """A line now and then; where there is a terminal, a bar."""
    monkeypatch.setattr(prepare_text, "LINE_SECONDS", 0)
    assert run("--input", "in", "--out", "set") == 0
    err = capsys.readouterr().err
    for line in (
        "searching: 4 folders",
        "reading: 25 of 25 files",
        "set_train: 63 of 63 documents",
    ):
        assert f"{line}\n" in err
    with prepare_text.Progress("training a tokenizer", "seconds") as progress:
        prepare_text.endings.in_thread(lambda: time.sleep(1.5), progress.update)
    assert capsys.readouterr().err == "training a tokenizer: 1 seconds\n"


@pytest.mark.parametrize(("delay", "shown"), [(0, True), (60, False)])
def test_a_terminal_gets_a_bar(delay, shown, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(prepare_text, "BAR_SECONDS", delay)
    for total in (3, None):
        with prepare_text.Progress("reading", "files", total) as progress:
            progress.update(3)
    text = terminal.getvalue()
    assert ("reading: 100%" in text and "reading: 3 files" in text) == shown
    assert shown or text == ""


PREPARE = f"{sys.executable} {DATA / 'prepare_text.py'}"


def shell(command, folder):
    return subprocess.run(
        ["bash", "-c", command], cwd=folder, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize(
    "how",
    [
        "--input <(cat in)",
        "--input /dev/stdin < in",
        "--input - < in",
        "--input - < <(cat in)",
        "--input <(sleep 0.3; head -c 3 in; sleep 0.3; tail -c +4 in)",
        "--input <(gzip -c in)",
        "--input <(head -c 99 in) <(tail -c +100 in)",
    ],
)
def test_pipes_are_read(how, tmp_path):
    (tmp_path / "in").write_text(SOURCE_CODE)
    done = shell(f"{PREPARE} --out out {how}", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    _, val, _ = read_val(tmp_path / "out")
    assert "".join(val) and SOURCE_CODE.endswith("".join(val))


def test_a_pipe_of_json_lines_is_documents(tmp_path):
    (tmp_path / "in").write_text(json_lines())
    done = shell(f"{PREPARE} --out out --input <(cat in) --vocab-size 300", tmp_path)
    assert done.returncode == 0 and done.stderr.startswith("note: /dev/fd/")
    assert "train documents:57 " in done.stdout


def test_a_tokenizer_may_come_by_a_pipe(english_model, tmp_path):
    (tmp_path / "in").write_text("some text to read")
    (tmp_path / "model").write_bytes(english_model.read_bytes())
    done = shell(f"{PREPARE} --out out --input in --tokenizer <(cat model)", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "out/tokenizer.model").read_bytes() == english_model.read_bytes()
    done = shell(f"{PREPARE} --out out --input in --tokenizer /dev/zero", tmp_path)
    assert done.returncode == 2 and "/dev/zero: not a SentencePiece model (more" in done.stderr


# -----------------------------------------------------------------------------
# Copies, dataset.json


def facts_of(out):
    return json.loads((out / "dataset.json").read_text())


@pytest.mark.parametrize("copies", [0, 1, 7])
def test_copies_are_dropped_from_training(tmp_path, capsys, copies):
    """Word for word; the number is printed and kept."""
    val = [f"held out text number {n}" for n in range(9)]
    own = [f"plain words of document {n}" for n in range(40)]
    train = [*own, *(val * 3)[:copies], "Held out text number 0", val[1] + " "]
    out = tmp_path / "set"
    split, _ = prepare_text.write_dataset(train, val, out, "set", 300)
    assert facts_of(out)["dropped_copies"] == copies
    assert (facts_of(out)["train_documents"], facts_of(out)["val_documents"]) == (42, 9)
    assert split.documents == (read_shards(out.glob("*_train_*")) == 1).sum() == 42
    tokenizer = prepare_text.load_tokenizer(out / "tokenizer.model")
    written = tokenizer.decode(split_at_bos(read_shards(out.glob("*_train_*"))))
    assert written == [*own, "Held out text number 0", val[1] + " "]
    note = f"note: {copies} training documents are in validation word for word; dropped"
    assert (note in capsys.readouterr().out) == (copies > 0)


def test_a_copy_does_not_reach_the_tokenizer(tmp_path):
    own = [f"plain words of document {n}" for n in range(40)]
    val = ["zzzzqqqqzzzz" * 20]
    prepare_text.write_dataset(own + val * 50, val, tmp_path / "a", "a", 400)
    prepare_text.write_dataset(own, val, tmp_path / "b", "b", 400)
    assert (
        facts_of(tmp_path / "a")["tokenizer_sha256"] == facts_of(tmp_path / "b")["tokenizer_sha256"]
    )


@pytest.mark.parametrize("count", [2, 30])
def test_nothing_but_copies_is_refused(tmp_path, capsys, count):
    (tmp_path / "in.jsonl").write_text(json_lines(["the same"] * count))
    out = tmp_path / "out"
    arguments = ["--input", tmp_path / "in.jsonl", "--out", out, "--val-fraction", "0.5"]
    assert run(*arguments) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "is in validation too" in err and not out.exists()


def test_dataset_json(tmp_path, english_model):
    out = prepared(tmp_path, SOURCE_CODE, "--vocab-size", 300)
    tokens, _, _ = read_val(out)
    assert facts_of(out) == dict(
        tokenizer_sha256=hashlib.sha256((out / "tokenizer.model").read_bytes()).hexdigest(),
        val_tokens_sha256=hashlib.sha256(tokens.astype("<u2").tobytes()).hexdigest(),
        val_text_sha256=hashlib.sha256(next(out.glob("*_val.jsonl")).read_bytes()).hexdigest(),
        lossy=False,
        train_documents=1,
        val_documents=1,
        dropped_copies=0,
    )
    (tmp_path / "lossy.model").write_bytes(model_of(SOURCE_CODE, 290, byte_fallback=True))
    out = prepared(tmp_path, "ｆｕｌｌ  width\n" * 30, "--tokenizer", tmp_path / "lossy.model")
    assert facts_of(out)["lossy"] is True


def test_tokens_are_hashed_over_all_shards(tmp_path, monkeypatch):
    whole = facts_of(prepared(tmp_path, SOURCE_CODE, "--vocab-size", 300))
    monkeypatch.setattr(prepare_text, "SHARD_TOKENS", 20)
    out = prepared(tmp_path, SOURCE_CODE, "--vocab-size", 300)
    assert len(list(out.glob("*_val_*.bin"))) > 2 and facts_of(out) == whole


def test_files_move_in_the_right_order(tmp_path, monkeypatch):
    """What tells of a dataset is gone before another's shards come, and comes after them."""
    out = prepared(tmp_path, SOURCE_CODE)
    moved = []

    def replace(source, target):
        name = Path(target).name
        moved.append((name, *[(out / n).exists() for n in ("dataset.json", "tokenizer.model")]))
        source.rename(target)

    monkeypatch.setattr(prepare_text.os, "replace", replace)
    prepared(tmp_path, CHINESE)
    assert moved == [
        ("text_train_000000.bin", False, False),
        ("text_val.jsonl", False, False),
        ("text_val_000000.bin", False, False),
        ("dataset.json", False, False),
        ("tokenizer.model", True, False),
    ]


# -----------------------------------------------------------------------------
# Ends


@pytest.mark.parametrize(
    ("number", "again"), [(signal.SIGINT, True), (signal.SIGTERM, False), (signal.SIGHUP, False)]
)
def test_a_signal_leaves_what_was_there(tmp_path, number, again):
    """Also in the trainer, which is no Python."""
    han = 0x4E00 + np.random.default_rng(0).zipf(1.5, 9_000_000) % 9_000
    (tmp_path / "long.txt").write_text(han.astype("<u2").tobytes().decode("utf-16-le"))
    out = tmp_path / "set"
    if again:
        prepared(tmp_path, SOURCE_CODE, name="set")
    before = digests(out) if again else None
    command = [sys.executable, DATA / "prepare_text.py", "--input", "long.txt", "--out", "set"]
    command += ["--vocab-size", "60000"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    running = subprocess.Popen(command, cwd=tmp_path, **pipes)
    time.sleep(3)  # reading takes a fifth of a second, training many seconds
    assert running.poll() is None
    running.send_signal(number)
    stdout, stderr = running.communicate(timeout=5)
    assert (running.returncode, stdout) == (128 + number, "")
    assert stderr == "interrupted; nothing half-written is left\n"
    assert digests(out) == before if again else not out.exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_shards_are_written(tmp_path, number):
    out = prepared(tmp_path, CHINESE, name="set")
    before = digests(out)
    code = """
import os, sys, endings, prepare_text
write = prepare_text.write_shards
def slow(tokens, stem):
    write(tokens, stem)
    os.kill(os.getpid(), number)
    return len(tokens)
number = int(sys.argv.pop())
prepare_text.write_shards = slow
sys.exit(endings.run(prepare_text.main))
"""
    command = [sys.executable, "-c", code, "--input", "in.txt", "--out", "set", str(int(number))]
    environment = os.environ | {"PYTHONPATH": str(DATA)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 128 + number and done.stdout == ""
    assert done.stderr == "interrupted; nothing half-written is left\n"
    assert digests(out) == before


def test_a_signal_while_files_are_moved_waits(tmp_path):
    code = """
import os, signal, sys, endings, prepare_text
move = os.replace
def slow(source, target):
    os.kill(os.getpid(), signal.SIGTERM)
    move(source, target)
prepare_text.os.replace = slow
sys.exit(endings.run(prepare_text.main))
"""
    (tmp_path / "in.txt").write_text(CHINESE)
    command = [sys.executable, "-c", code, "--input", "in.txt", "--out", "set"]
    environment = os.environ | {"PYTHONPATH": str(DATA)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 143
    check_lossless(tmp_path / "set")
    assert len(digests(tmp_path / "set")) == 5


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("output", ["| true", "| head -1", "> /dev/full", ">&-", "2>&- | true"])
def test_an_output_that_nobody_reads(tmp_path, output, unbuffered):
    """The work is done all the same."""
    (tmp_path / "in.txt").write_text(SOURCE_CODE)
    program = f"PYTHONUNBUFFERED={unbuffered} {PREPARE} --input in.txt --out out"
    done = shell(f"set -o pipefail; {program} {output}", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    check_lossless(tmp_path / "out")
    assert shell(f"set -o pipefail; {PREPARE} --help | true", tmp_path).stderr == ""


def test_names_in_another_encoding(tmp_path):
    (tmp_path / "café.txt").write_text(SOURCE_CODE)
    done = shell(f"PYTHONIOENCODING=ascii {PREPARE} --input café.txt --out é", tmp_path)
    assert (done.returncode, done.stderr) == (0, "") and r"wrote \xe9 in" in done.stdout
    done = shell(f"PYTHONIOENCODING=ascii {PREPARE} --input nö --out é", tmp_path)
    assert done.returncode == 2 and r"--input n\xf6: no such file" in done.stderr


def test_nohup_stays_in_force(tmp_path):
    (tmp_path / "in.txt").write_text(SOURCE_CODE)
    code = "import endings, os; endings.run(lambda: os.kill(os.getpid(), 1) or print('lives'))"
    done = shell(f"trap '' HUP; PYTHONPATH={DATA} {sys.executable} -c \"{code}\"", tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "lives\n", "")


def test_memory_that_is_not_there_is_one_line(tmp_path, capsys, monkeypatch):
    def full(*_):
        raise MemoryError

    (tmp_path / "in.txt").write_text("text")
    monkeypatch.setattr(prepare_text, "decode_text", full)
    assert run("--input", tmp_path / "in.txt", "--out", tmp_path / "out") == 2
    assert "not enough memory" in capsys.readouterr().err


# -----------------------------------------------------------------------------
# Bad input


def test_separator_escapes(tmp_path):
    out = prepared(
        tmp_path, "\n\n".join(f"document {n}" for n in range(40)), "--separator", r"\n\n"
    )
    tokens, documents, _ = read_val(out)
    assert len(documents) == 2 == (tokens == prepare_text.BOS).sum()
    assert all("\n" not in document for document in documents)


@pytest.mark.parametrize(
    ("files", "separator", "said"),
    [
        ({"a.txt": "one\r\n\r\ntwo"}, r"\n\n", r"in 0 of 1 files .*give '\\r\\n\\r\\n'$"),
        ({"a.txt": "a\r\n\r\nb", "b.txt": "a\n\nb"}, r"\n\n", "in 1 of 2 .* lines of 1 end"),
        ({"a.txt": "one two"}, "===", "'===': in 0 of 1 files that are no JSON; the others stay"),
        ({"a.jsonl": json_lines()}, r"\n", "in 0 of 0 files"),
        ({"a.txt": "one===two", "b.txt": "three"}, "===", ""),
        ({"a.txt": "one\r\n\r\ntwo"}, r"\r\n\r\n", ""),
    ],
)
def test_a_separator_that_cuts_nothing_is_said(files, separator, said, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for name, text in files.items():
        (tmp_path / "in" / name).write_bytes(text.encode())
    arguments = ["--input", tmp_path / "in", "--out", tmp_path / "out", "--separator", separator]
    assert run(*arguments) == 0
    err = capsys.readouterr().err
    assert err.count("\n") == (said != "")
    assert re.search(said, err)


@pytest.mark.parametrize("strips", [True, False])
def test_no_space_is_invented_within_a_text(strips):
    """By a tokenizer that puts one before each text."""
    options = dict(byte_fallback=True, remove_extra_whitespaces=strips)
    model = model_of("the cat sat on the mat\n" * 50, 290, **options)
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model)
    texts = ["cat\u2581the\u2581\u2581mat sat", "\u2581cat", "the\u2581 cat", "the cat", "\u2581"]
    tokens = prepare_text.encode_documents(tokenizer, texts)
    assert tokenizer.decode(tokens) == texts
    for text, ids in zip(texts, tokens, strict=True):
        invented = text[0] != "\u2581"  # before the text, where decoding takes it away
        assert rule_bytes(tokenizer, ids) == len(text.encode()) + invented
    assert tokens[3] == tokenizer.encode(texts[3])


def test_reused_tokenizer(tmp_path, english_model, capsys):
    out = prepared(tmp_path, CHINESE, "--tokenizer", english_model)
    assert (out / "tokenizer.model").read_bytes() == english_model.read_bytes()
    assert "round_trip ok" in capsys.readouterr().out
    check_lossless(out)


def test_lossy_tokenizer_is_reported(tmp_path, capsys):
    text = "the cat sat on the mat with full width letters\n" * 9
    (tmp_path / "lossy.model").write_bytes(model_of(text, 290, byte_fallback=True))
    out = prepared(tmp_path, "ｆｕｌｌ  width\n" * 30, "--tokenizer", tmp_path / "lossy.model")
    assert "round_trip LOSSY: 2 of 2 documents change" in capsys.readouterr().out
    tokens, documents, tokenizer = read_val(out)
    assert "".join(documents) in "ｆｕｌｌ  width\n" * 30
    assert "full" in tokenizer.decode(split_at_bos(tokens))[0]


def test_figures_are_printed(tmp_path, capsys):
    prepared(tmp_path, "word " * 400)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("train documents:1 bytes:1900 tokens:")
    assert lines[1].startswith("val documents:1 bytes:100 tokens:")
    words = [line.split()[0] for line in lines[2:]]
    assert words == ["note:", "note:", "tokenizer", "round_trip", "wrote"]


BAD_INPUTS = {
    "missing input": (["--input", "nowhere.txt"], ["nowhere.txt", "no such file"]),
    "empty file": (["--input", "empty.txt"], ["no text, 1 file", "empty: 1 (empty.txt)"]),
    "one character": (["--input", "one.txt"], ["1 character"]),
    "not UTF-8": (["--input", "latin1.txt"], ["latin1.txt", "offset 1,003", "0xe9", "iconv"]),
    "not UTF-8 in a folder": (["--input", "folder"], ["no text, 1 file", "not UTF-8: 1", "latin1"]),
    "no text field": (["--input", "no_text.jsonl"], ["no_text.jsonl", "line 2", "text"]),
    "text is no string": (["--input", "number.jsonl"], ["number.jsonl", "line 1"]),
    "broken JSON": (["--input", "broken.jsonl"], ["broken.jsonl", "line 1", "JSON"]),
    "lone surrogate": (["--input", "surrogate.jsonl"], ["surrogate.jsonl", "line 1", "surrogate"]),
    "cut archive": (["--input", "cut.jsonl.xz"], ["cut.jsonl.xz", "cannot be read"]),
    "no archive": (["--input", "fake.gz"], ["fake.gz", "cannot be read"]),
    "small vocabulary": (["--vocab-size", "260"], ["--vocab-size 260", "256 bytes"]),
    "large vocabulary": (["--vocab-size", "65537"], ["--vocab-size 65537", "16 bits"]),
    "vocabulary no number": (["--vocab-size", "many"], ["--vocab-size", "many"]),
    "fraction 0": (["--val-fraction", "0"], ["--val-fraction 0", "between 0 and 1"]),
    "fraction 1": (["--val-fraction", "1"], ["--val-fraction 1", "between 0 and 1"]),
    "fraction nan": (["--val-fraction", "nan"], ["--val-fraction nan"]),
    "empty separator": (["--separator", ""], ["--separator"]),
    "unknown argument": (["--vocab", "9", "--nonsense"], ["--nonsense"]),
    "no tokenizer": (["--tokenizer", "none.model"], ["--tokenizer none.model", "No such file"]),
    "wrong tokenizer": (["--tokenizer", "good.txt"], ["--tokenizer good.txt", "SentencePiece"]),
    "empty tokenizer": (["--tokenizer", "empty.txt"], ["--tokenizer empty.txt", "SentencePiece"]),
    "folder as tokenizer": (["--tokenizer", "folder"], ["--tokenizer folder"]),
    "out is a file": (["--out", "good.txt"], ["--out good.txt", "good.txt is no writable folder"]),
    "out in a file": (["--out", "good.txt/x"], ["--out good.txt/x", "no writable folder"]),
    "out is taken": (["--out", "taken"], ["--out taken", "fineweb_train_000000.bin"]),
    "out is a dead link": (["--out", "dead"], ["--out dead", "a link to nothing"]),
    "out is a FIFO": (["--out", "fifo"], ["--out fifo", "fifo is no writable folder"]),
    "out holds the input": (["--out", "."], ["--out .", "--input good.txt lies there"]),
    "out is the input": (["--input", "folder", "--out", "folder"], ["--input folder lies there"]),
    "confusing name": (["--name", "my_val"], ["--name 'my_val'"]),
}


@pytest.fixture
def bad_folder(tmp_path, monkeypatch):
    """A working folder with one of each bad file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "taken").mkdir()
    contents = {
        "good.txt": b"a good text of some length, twice; " * 2,
        "empty.txt": b"",
        "one.txt": "世".encode(),
        "latin1.txt": b"x" * 1_000 + "caf\xe9".encode("latin-1"),
        "folder/latin1.txt": b"x" * 1_000 + "caf\xe9".encode("latin-1"),
        "no_text.jsonl": b'{"text": "fine"}\n{"content": "not"}\n',
        "number.jsonl": b'{"text": 7}\n',
        "broken.jsonl": b'{"text": "fi\n',
        "surrogate.jsonl": b'{"text": "\\ud800"}\n',
        "cut.jsonl.xz": lzma.compress(b'{"text": "fine"}\n' * 99)[:-20],
        "fake.gz": b"not gzip",
        "taken/fineweb_train_000000.bin": b"",
    }
    (tmp_path / "dead").symlink_to("nowhere")
    os.mkfifo(tmp_path / "fifo")
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_input_is_one_line(case, bad_folder, capfd):
    arguments, expected = BAD_INPUTS[case]
    before = sorted(path.as_posix() for path in bad_folder.rglob("*"))
    defaults = [] if "--input" in arguments else ["--input", "good.txt"]
    defaults += [] if "--out" in arguments else ["--out", "out"]
    assert run(*defaults, *arguments) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("prepare_text.py: ")
    assert all(part in err for part in expected), err
    assert sorted(path.as_posix() for path in bad_folder.rglob("*")) == before


def test_vocabulary_must_fit_a_reused_tokenizer(tmp_path, english_model, capsys):
    (tmp_path / "in.txt").write_text("some text")
    options = ["--tokenizer", english_model, "--vocab-size", 999, "--out", tmp_path / "out"]
    assert run("--input", tmp_path / "in.txt", *options) == 2
    assert "--vocab-size 999" in capsys.readouterr().err


def test_failure_leaves_no_half_dataset(tmp_path, monkeypatch):
    out = prepared(tmp_path, SOURCE_CODE)
    before = digests(out)
    monkeypatch.setattr(prepare_text, "write_shards", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepared(tmp_path, CHINESE)
    assert digests(out) == before


def test_command_line_exits_with_2_and_no_traceback(tmp_path):
    command = [sys.executable, DATA / "prepare_text.py", "--input", "nowhere", "--out", "x"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1


# -----------------------------------------------------------------------------
# The embedded sample


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    out = tmp_path_factory.mktemp("sample") / "sample_en"
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        assert prepare.main(["--out", str(out)]) == 0
    assert said.getvalue() == ""  # verify.py --json prints JSON and nothing else
    return out


def test_sample_is_as_published(sample):
    """By what was written, not by what is said to be."""
    tokens, _, _ = read_val(sample)
    assert hashlib.sha256(tokens.astype("<u2").tobytes()).hexdigest() == prepare.VAL_TOKENS_SHA256
    (train,) = sample.glob("*_train_*.bin")
    found = hashlib.sha256(train.read_bytes()[1024:]).hexdigest()
    assert found == prepare.TRAIN_TOKENS_SHA256
    model = (sample / "tokenizer.model").read_bytes()
    assert hashlib.sha256(model).hexdigest() == prepare.TOKENIZER_SHA256
    facts = facts_of(sample)
    assert prepare.differences(facts) == [] and facts["dropped_copies"] == 0
    assert sentencepiece.__version__ == prepare.MADE_WITH


def test_another_sample_is_said(tmp_path, monkeypatch, capsys):
    """As another version of SentencePiece may make it."""
    monkeypatch.setattr(prepare, "sample_documents", lambda: (["some words"] * 9, ["others"]))
    assert prepare.main(["--out", str(tmp_path / "x")]) == 0
    out, err = capsys.readouterr()
    note = "tokenizer_sha256 and val_tokens_sha256 not as published"
    assert out == "" and note in err.splitlines()[-1] and sentencepiece.__version__ in err


@pytest.mark.parametrize("place", ["file", "/proc/x", "/sys/x"])
def test_sample_that_cannot_be_written_is_one_line(tmp_path, capsys, monkeypatch, place):
    """As in a checkout that is mounted read-only."""
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    assert prepare.main(["--out", place]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith("prepare.py: ") and place in err
    assert err.endswith("fix: --out DIR, then DATA_PATH=DIR\n")


def test_sample_is_the_published_file():
    packed = prepare.SAMPLE.read_bytes()
    assert hashlib.sha256(packed).hexdigest() == rebuild.FILE_SHA256
    assert hashlib.sha256(lzma.decompress(packed)).hexdigest() == rebuild.LINES_SHA256


def test_sample_split_figures(sample):
    documents = check_lossless(sample)
    tokens, _, tokenizer = read_val(sample)
    train = read_shards(sample.glob("*_train_*.bin"))
    assert tokenizer.vocab_size() == 1024
    assert sum(len(text.encode()) for text in documents) == 203_285
    assert 75_000 < len(tokens) < 85_000
    assert len(documents) == 85
    assert (train == prepare_text.BOS).sum() == 3_300
    assert 3.0e6 < len(train) < 3.2e6


def test_sample_documents_lose_only_white_space_at_cuts():
    train, val = prepare.sample_documents()
    with lzma.open(prepare.SAMPLE, "rt", encoding="utf-8", newline="\n") as lines:
        texts = [json.loads(line)["text"] for line in lines]

    def letters(documents):
        return sorted("".join(document.split()) for document in documents)

    assert sum(map(len, letters(train + val))) == sum(map(len, letters(texts)))
    whole = "\0".join(texts)
    assert all(document in whole for document in random.Random(0).sample(train + val, 200))
    sizes = [len(document.encode()) for document in train + val]
    assert max(sizes) <= 4_096
    short = [text for text in train + val if len(text.encode()) < 1_000]
    assert set(short) <= set(texts)  # whole articles that are shorter than 1 KB


def test_cuts_fall_on_sentence_ends():
    text = 'He said "Stop." Then he left. ' * 400
    documents = prepare.cut_documents(text, prepare.SENTENCE_END, random.Random(0))
    assert len(documents) > 2
    assert all(document.endswith(('"', ".")) for document in documents)
    assert " ".join(documents) == text.strip()


def test_rebuild_reads_markup_as_described():
    node = {"a": {"text": "<p>one</p>two<br>three &amp;amp; <b>four</b>"}, "b": [{"note": "n"}]}
    assert list(map(rebuild.plain_text, rebuild.prose(node))) == [
        "one\ntwo\nthree & four",
        "n",
    ]
