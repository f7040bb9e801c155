"""data/: any text becomes a lossless tokenizer and shards whose bytes add up to the text."""

import gzip
import hashlib
import json
import lzma
import random
import subprocess
import sys

import numpy as np
import pytest
import sentencepiece
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
    assert len(folders[0]) == 4
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
    assert documents[27:] == ["\ufeffone\r\n", "two"]


def test_separator_escapes(tmp_path):
    out = prepared(
        tmp_path, "\n\n".join(f"document {n}" for n in range(40)), "--separator", r"\n\n"
    )
    tokens, documents, _ = read_val(out)
    assert len(documents) == 2 == (tokens == prepare_text.BOS).sum()
    assert all("\n" not in document for document in documents)


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
    assert [line.split()[0] for line in lines[2:]] == ["tokenizer", "round_trip", "wrote"]


BAD_INPUTS = {
    "missing input": (["--input", "nowhere.txt"], ["nowhere.txt", "no such file"]),
    "empty file": (["--input", "empty.txt"], ["empty.txt", "empty"]),
    "one character": (["--input", "one.txt"], ["1 character"]),
    "not UTF-8": (["--input", "latin1.txt"], ["latin1.txt", "offset 1,003", "0xe9", "iconv"]),
    "not UTF-8 in a folder": (["--input", "folder"], ["latin1.txt", "offset 1,003"]),
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
    assert prepare.main(["--out", str(out)]) == 0
    return out


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
