"""Shards, the loader's rows, the bytes of tokens and the validation stream."""

import io
import itertools
import json
import os
import re
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import sentencepiece
from helpers import model_of, random_stream, tiny, train_gpt, write_shard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import prepare
import prepare_text

UserError = train_gpt.UserError

# -----------------------------------------------------------------------------
# Shards


def test_shard_is_read_as_written(tmp_path):
    tokens = random_stream(999, 65_536)
    path = write_shard(tmp_path / "x_train_000000.bin", tokens)
    read = train_gpt.read_shard(path, 65_536)
    assert read.tolist() == tokens.tolist()


BROKEN = {  # what is wrong -> (arguments of write_shard, words of the message)
    "magic": (dict(magic=20240521), ["magic", "20240521", "20240520"]),
    "version": (dict(version=2), ["version 2"]),
    "count too large": (dict(count=101), ["length 1224", "101"]),
    "count too small": (dict(count=99), ["length 1224", "99"]),
    "count is huge": (dict(count=2**31 - 1), ["length"]),
    "count is negative": (dict(count=-1), ["-1 tokens"]),
    "no tokens": (dict(tokens=[]), ["0 tokens"]),
    "token too large": (dict(tokens=[1, 64, 5]), ["token 64", "vocabulary 64"]),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_shards_are_refused(name, tmp_path):
    how, words = BROKEN[name]
    path = write_shard(tmp_path / "x_val_000000.bin", **dict(tokens=range(2, 52)) | how)
    if "tokens" not in how:
        write_shard(path, list(range(2, 52)) * 2, **how)
    with pytest.raises(UserError) as caught:
        train_gpt.read_shard(path, 64)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    assert all(word in message.replace(",", "") for word in words), message


@pytest.mark.parametrize("size", [0, 1, 12, 1023])
def test_short_files_are_refused(size, tmp_path):
    path = write_shard(tmp_path / "x_val_000000.bin", [1, 2])
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UserError, match=re.escape(str(path))):
        train_gpt.read_shard(path, 64)


def test_odd_byte_is_refused(tmp_path):
    path = write_shard(tmp_path / "x_val_000000.bin", [1, 2])
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(UserError, match="length"):
        train_gpt.read_shard(path, 64)


def test_shards_are_found_in_order_and_by_split(tmp_path):
    names = ["b_train_000001.bin", "b_train_000000.bin", "b_val_000000.bin", "b_train.txt"]
    for name in names:
        write_shard(tmp_path / name, [1, 2])
    found = [path.name for path in train_gpt.find_shards(str(tmp_path), "train")]
    assert found == ["b_train_000000.bin", "b_train_000001.bin"]
    assert len(train_gpt.find_shards(str(tmp_path), "val")) == 1
    with pytest.raises(UserError, match="DATA_PATH='nowhere'"):
        train_gpt.find_shards("nowhere", "train")


NO_SHARDS = {  # what stands where a shard should
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "empty": lambda path: path.write_bytes(b""),
    "a FIFO": lambda path: path.unlink() or os.mkfifo(path),
    "a folder": lambda path: path.unlink() or path.mkdir(),
    "a dangling link": lambda path: path.unlink() or path.symlink_to("nowhere"),
    "a link in a circle": lambda path: path.unlink() or path.symlink_to(path),
    "a device": lambda path: path.unlink() or path.symlink_to("/dev/zero"),
    "a link to a FIFO": lambda path: (
        path.unlink() or os.mkfifo(path.with_suffix(".fifo")),
        path.symlink_to(path.with_suffix(".fifo")),
    ),
}


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("kind", NO_SHARDS)
def test_every_shard_is_looked_at_before_the_first_step(kind, split, dataset, tmp_path):
    """By all who look for shards, and by preflight, whose other checks read them, too."""
    for side, number in itertools.product(("train", "val"), range(3)):
        write_shard(tmp_path / f"x_{side}_{number}.bin", [1, 300, 301])
    NO_SHARDS[kind](bad := tmp_path / f"x_{split}_1.bin")
    match = rf"{re.escape(str(bad))}: .*fix: "
    with pytest.raises(UserError, match=match):
        train_gpt.find_shards(tmp_path, split)
    paths = dict(data_path=str(tmp_path), tokenizer_path=str(dataset / "tokenizer.model"))
    cfg = tiny(vocab_size=512, scorer="documents", **paths)
    with pytest.raises(train_gpt.Missing, match=match) as caught:
        train_gpt.preflight(train_gpt.Runtime(cfg), cfg)
    assert "\n" not in str(caught.value)


def test_links_to_shards_are_shards(tmp_path):
    write_shard(tmp_path / "kept", [1, 2])
    (tmp_path / "b_val_0.bin").symlink_to(tmp_path / "kept")
    assert train_gpt.read_shard(*train_gpt.find_shards(tmp_path, "val"), 3).tolist() == [1, 2]


# -----------------------------------------------------------------------------
# Rows


def write_shards(folder, sizes):
    """Shards of these sizes over a stream of distinct tokens -> (paths, the stream)"""
    stream = np.arange(sum(sizes))
    cuts = np.cumsum([0, *sizes])
    names = [folder / f"x_train_{i:06d}.bin" for i in range(len(sizes))]
    pairs = zip(names, cuts[:-1], cuts[1:], strict=True)
    return [write_shard(path, stream[a:b]) for path, a, b in pairs], stream


def rank(number, world_size):
    return SimpleNamespace(rank=number, world_size=world_size)


@settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
@given(
    sizes=st.lists(st.integers(1, 70), min_size=1, max_size=4),
    length=st.sampled_from([1, 4, 8]),
    rows=st.integers(1, 4),
    ranks=st.integers(1, 3),
    steps=st.integers(1, 6),
)
def test_rows_are_plain_slices_of_the_stream(tmp_path, sizes, length, rows, ranks, steps):
    """Every batch against slices of the stream laid end to end, for every rank."""
    paths, stream = write_shards(tmp_path, sizes)
    batch = length * rows * ranks
    around = np.tile(stream, 2 + (batch * steps + 1) // len(stream))
    cfg = SimpleNamespace(shuffle=False, train_batch_tokens=batch, train_seq_len=length)
    loaders = [train_gpt.TokenLoader(paths, 65_536) for _ in range(ranks)]
    for step in range(steps):
        body = around[step * batch : (step + 1) * batch + 1]
        parts = [loader.rows(cfg, rank(r, ranks)) for r, loader in enumerate(loaders)]
        inputs, targets = (np.concatenate(side) for side in zip(*parts, strict=True))
        assert inputs.tolist() == body[:-1].reshape(-1, length).tolist()
        assert targets.tolist() == body[1:].reshape(-1, length).tolist()
        assert {len(x) for x, _ in parts} == {rows}
        assert inputs.dtype == targets.dtype == np.int64


@settings(deadline=None, max_examples=30, suppress_health_check=list(HealthCheck))
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    before=st.integers(0, 6),
    after=st.integers(1, 4),
)
def test_restored_loader_goes_on_where_it_was(tmp_path, sizes, before, after):
    paths, _ = write_shards(tmp_path, sizes)
    cfg = SimpleNamespace(shuffle=False, train_batch_tokens=16, train_seq_len=8)
    loader, other = (train_gpt.TokenLoader(paths, 65_536) for _ in range(2))
    for _ in range(before):
        loader.rows(cfg, rank(0, 1))
    state = json.loads(json.dumps(loader.state()))  # as a checkpoint keeps it
    wanted = [loader.rows(cfg, rank(0, 1))[0].tolist() for _ in range(after)]
    other.restore(state)
    assert [other.rows(cfg, rank(0, 1))[0].tolist() for _ in range(after)] == wanted
    loader.restore(state)
    assert [loader.rows(cfg, rank(0, 1))[0].tolist() for _ in range(after)] == wanted


def test_batch_must_divide():
    cfg = tiny(train_batch_tokens=48, train_seq_len=16)
    assert train_gpt.micro_batches(cfg, SimpleNamespace(world_size=3, cuda=False)) == 1
    for ranks, micro in ((2, 1), (1, 2), (4, 1)):
        with pytest.raises(train_gpt.ConfigError, match="TRAIN_BATCH_TOKENS=48"):
            changed = tiny(train_batch_tokens=48, train_seq_len=16, grad_accum_steps=micro)
            train_gpt.micro_batches(changed, SimpleNamespace(world_size=ranks, cuda=False))
    default = tiny(grad_accum_steps=0, train_batch_tokens=16 * 8)
    assert [
        train_gpt.micro_batches(default, SimpleNamespace(world_size=ranks, cuda=True))
        for ranks in (1, 2, 4, 8)
    ] == [8, 4, 2, 1]


# -----------------------------------------------------------------------------
# Bytes

MIXED = "Hello world, 1984 and  two spaces.\n\tA tab; Привет, мир! 世界 👋🏽 naïve café ½ ﬁ\n" * 8


def trained(folder, **options):
    """Path of a SentencePiece model with these options over the published ones."""
    model = io.BytesIO()
    published = dict(
        vocab_size=420,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        character_coverage=0.999,
        hard_vocab_limit=False,
        add_dummy_prefix=False,
        normalization_rule_name="nmt_nfkc",
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        minloglevel=2,
    )
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(MIXED.splitlines()), model_writer=model, **published | options
    )
    path = folder / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return path


MODELS = {
    "official FineWeb": {},
    "dummy prefix": dict(add_dummy_prefix=True),
    "dummy prefix, spaces kept": dict(
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
    ),
    "lossless": dict(remove_extra_whitespaces=False, normalization_rule_name="identity"),
    "pieces over spaces": dict(
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        split_by_whitespace=False,
        allow_whitespace_only_pieces=True,
    ),
}


@pytest.fixture(scope="module", params=MODELS)
def model(request, tmp_path_factory):
    """(name, path, processor) of each kind of tokenizer"""
    path = trained(tmp_path_factory.mktemp("model"), **MODELS[request.param])
    return request.param, path, sentencepiece.SentencePieceProcessor(model_file=str(path))


def test_byte_tables_by_the_rule(model):
    """BOS 0 bytes, byte pieces 1, each space mark 1, other characters their UTF-8 length."""
    _, path, processor = model
    tables = train_gpt.token_bytes(str(path), 0)
    size = processor.vocab_size()
    assert [len(table) for table in tables] == [size] * 3
    for token in range(size):
        piece = processor.id_to_piece(token)
        if processor.is_control(token) or processor.is_unknown(token):
            total = 0
        elif processor.is_byte(token):
            total = 1
        else:
            total = sum(1 if c == "\u2581" else len(c.encode()) for c in piece)
        after_a = tables.count(np.array([token]), np.array([processor.piece_to_id("a")]))
        assert after_a.tolist() == [total], piece


def test_upstream_s_rule_on_the_official_models(tmp_path):
    """base_bytes[y] + (leading_space[y] and not boundary[x]), one leading mark removed."""
    path = trained(tmp_path, **MODELS["official FineWeb"])
    processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    tables = train_gpt.token_bytes(str(path), processor.vocab_size())
    for previous in (1, 0, 3, 77, processor.piece_to_id("a")):
        boundary = processor.is_control(previous) or processor.is_unknown(previous)
        for token in range(4, processor.vocab_size()):
            piece = processor.id_to_piece(token)
            leading = piece.startswith("\u2581")
            base = 1 if processor.is_byte(token) else len(piece.removeprefix("\u2581").encode())
            wanted = base + (leading and not boundary)
            assert tables.count(np.array([token]), np.array([previous])).tolist() == [wanted]


texts = st.text("ab 1é世👋.\t\n", max_size=40) | st.text(max_size=20)


@settings(deadline=None, max_examples=80, suppress_health_check=list(HealthCheck))
@given(documents=st.lists(texts, min_size=1, max_size=3))
def test_bytes_add_up_to_the_decoded_text(model, documents):
    """Over documents with a BOS before each, against SentencePiece's own decoder."""
    _, path, processor = model
    documents = [text.replace("\u2581", " ") for text in documents]
    tables = train_gpt.token_bytes(str(path), 0)
    encoded = [processor.encode(text) for text in documents]
    stream = np.array([1, *(token for ids in encoded for token in (*ids, 1))])
    total = tables.count(stream[1:], stream[:-1]).sum()
    decoded = [processor.decode(ids) for ids in encoded]
    if any("\ufffd" in text or "⁇" in text for text in decoded):
        return
    assert total == sum(len(text.encode()) for text in decoded)


def test_prepared_text_counts_every_byte(dataset):
    """The lossless tokenizer: a leading space after BOS is a byte of the text."""
    path = dataset / "tokenizer.model"
    processor, tables = prepare_text.load_tokenizer(path), train_gpt.token_bytes(str(path), 512)
    for text in (" a", "a", "  ", "\u2581x", " \u2581 ", "\n", "é"):
        (ids,) = prepare_text.encode_documents(processor, [text])
        stream = np.array([1, *ids])
        assert tables.count(stream[1:], stream[:-1]).sum() == len(text.encode()), repr(text)
    assert tables.count(np.array([1]), np.array([5])).tolist() == [0]


def test_wrong_tokenizers_are_refused(dataset, tmp_path):
    path = dataset / "tokenizer.model"
    with pytest.raises(UserError, match="VOCAB_SIZE=1024.* 512"):
        train_gpt.token_bytes(str(path), 1024)
    (tmp_path / "junk.model").write_bytes(b"junk")
    (tmp_path / "empty.model").touch()
    os.mkfifo(tmp_path / "fifo.model")
    (tmp_path / "link.model").symlink_to("none.model")
    missing = "no such file; fix: the tokenizer of these shards as tokenizer.model in DATA_PATH"
    reasons = {"junk": "must be SentencePiece's", "empty": "must be SentencePiece's"}
    reasons |= {"none": missing, "link": missing, "fifo": "is no regular file; fix"}
    for name, reason in reasons.items():
        place = f"TOKENIZER_PATH='{tmp_path}/{name}.model'"
        with pytest.raises(UserError, match=re.escape(f"{place}: {reason}")):
            train_gpt.token_bytes(f"{tmp_path}/{name}.model", 0)
    with pytest.raises(UserError, match="TOKENIZER_PATH.*irectory; fix"):
        train_gpt.token_bytes(str(tmp_path), 0)
    (tmp_path / "good.model").symlink_to(path)
    assert len(train_gpt.token_bytes(str(tmp_path / "good.model"), 512).base_bytes) == 512


# -----------------------------------------------------------------------------
# The validation stream


def stream_of(dataset, folder, *shards):
    """ValidationText over these shards with the dataset's tokenizer."""
    for number, tokens in enumerate(shards):
        write_shard(folder / f"x_val_{number:06d}.bin", tokens)
    tokenizer = str(dataset / "tokenizer.model")
    cfg = tiny(vocab_size=512, data_path=str(folder), tokenizer_path=tokenizer)
    return train_gpt.ValidationText(cfg)


def test_every_target_but_the_first_bos(dataset, tmp_path):
    tokens = [1, 300, 301, 1, 302]
    text = stream_of(dataset, tmp_path, tokens)
    assert text.stream.tolist() == tokens and text.targets.tolist() == tokens[1:]
    assert text.positions.tolist() == [1, 2, 3, 4]
    assert text.bytes.tolist()[2] == 0 and (text.bytes[[0, 1, 3]] > 0).all()


def test_a_bos_is_implied_where_there_is_none(dataset, tmp_path):
    text = stream_of(dataset, tmp_path, [300, 301, 302])
    assert text.stream.tolist() == [1, 300, 301, 302]
    assert text.targets.tolist() == [300, 301, 302] and text.positions.tolist() == [0, 1, 2]


@pytest.mark.parametrize("token", [300, 7])
def test_one_token_is_a_stream(token, dataset, tmp_path):
    text = stream_of(dataset, tmp_path, [token])
    assert text.stream.tolist() == [1, token] and text.positions.tolist() == [0]


def test_a_lone_bos_is_refused(dataset, tmp_path):
    with pytest.raises(UserError, match="DATA_PATH"):
        stream_of(dataset, tmp_path, [1])


def test_text_without_bytes_is_refused(dataset, tmp_path):
    """Bits per byte of no bytes is no number."""
    with pytest.raises(UserError, match="DATA_PATH"):
        stream_of(dataset, tmp_path, [1, 1, 1])


def test_shards_are_one_stream(dataset, tmp_path):
    whole = random_stream(60, 512)
    text = stream_of(dataset, tmp_path, whole[:17], whole[17:18], whole[18:])
    assert text.stream.tolist() == whole.tolist()
    assert text.positions.tolist() == list(range(1, 61))


def test_bytes_of_the_validation_text(dataset):
    """Sum of token bytes = UTF-8 bytes of the documents as they were."""
    tokenizer = str(dataset / "tokenizer.model")
    text = train_gpt.ValidationText(
        tiny(vocab_size=512, data_path=str(dataset), tokenizer_path=tokenizer)
    )
    (source,) = dataset.glob("*_val.jsonl")
    lines = source.read_text(encoding="utf-8").split("\n")
    documents = [json.loads(line)["text"] for line in lines if line]
    assert text.bytes.sum() == sum(len(document.encode()) for document in documents)


# -----------------------------------------------------------------------------
# Order and laps of shards


def test_shards_are_in_the_order_of_their_numbers(tmp_path):
    """x_val_10 after x_val_2, as upstream's six digits, by dataset first; ties by name."""
    names = [
        *("a_val_000009.bin", "a_val_000010.bin", "x_val_0.bin", "x_val_01.bin", "x_val_1.bin"),
        *("x_val_2.bin", "x_val_10.bin", "x_val_11.bin", "x_val_000012.bin", "x2_val_0.bin"),
        *("x10_val_0.bin",),
    ]
    for name in reversed(names):
        write_shard(tmp_path / name, [1, 2])
    found = [path.name for path in train_gpt.find_shards(tmp_path, "val")]
    by_dataset = ["a", "x", "x2", "x10"]
    wanted = [name for key in by_dataset for name in names if name.startswith(f"{key}_")]
    assert sorted(found) == sorted(names)
    assert [n for n in found if n[:2] in ("a_", "x_")] == wanted[:9]
    assert found.index("x2_val_0.bin") < found.index("x10_val_0.bin")


def test_twelve_unpadded_shards_are_one_stream(dataset, tmp_path):
    whole = random_stream(59, 512)
    for number in range(12):
        write_shard(tmp_path / f"x_val_{number}.bin", whole[5 * number : 5 * number + 5])
    assert text_of(tmp_path, dataset / "tokenizer.model").stream.tolist() == whole.tolist()


@settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
@given(
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    before=st.integers(0, 7),
    steps=st.integers(1, 4),
)
def test_state_after_laps_is_where_plain_reading_ends(tmp_path, sizes, before, steps):
    """Batches of many laps: rows and the place after them, token by token."""
    paths, stream = write_shards(tmp_path, sizes)
    places = [(s, i) for s, size in enumerate(sizes) for i in range(size)]
    loader = train_gpt.TokenLoader(paths, 65_536)
    at = before % len(stream)
    loader.restore(places[at])
    cfg = SimpleNamespace(shuffle=False, train_batch_tokens=16, train_seq_len=8)
    for _ in range(steps):
        inputs, _ = loader.rows(cfg, rank(0, 1))
        assert inputs.flatten().tolist() == [stream[(at + i) % len(stream)] for i in range(16)]
        at = (at + 16) % len(stream)
        assert loader.state() == places[at]


def test_each_shard_is_looked_through_once_however_many_laps(tmp_path, monkeypatch):
    paths, _ = write_shards(tmp_path, [2, 1])
    opened = []
    read = train_gpt.read_shard
    monkeypatch.setattr(
        train_gpt, "read_shard", lambda path, size: opened.append(path) or read(path, size)
    )
    joined = []
    concatenate = np.concatenate
    monkeypatch.setattr(
        np, "concatenate", lambda parts: joined.append(len(parts)) or concatenate(parts)
    )
    loader = train_gpt.TokenLoader(paths, 65_536)
    cfg = SimpleNamespace(shuffle=False, train_batch_tokens=786_432, train_seq_len=1024)
    for _ in range(3):
        inputs, targets = loader.rows(cfg, rank(0, 1))
    assert opened == paths and max(joined) <= 4  # parts of a batch: not one a lap
    assert inputs.shape == targets.shape == (768, 1024)
    assert len(np.unique((targets - inputs) % 3)) == 1


# -----------------------------------------------------------------------------
# Bytes against the decoded text

WORDS = "Hello\nworld\nthe\ncat\nsat\nПривет\n" * 20  # no line has a space
DOCUMENTS = [
    *("", "Hello world", " Hello", " ", "  ", "two  spaces ", " \u2581 ", "a\u2581b"),
    *("\r\nthe cat\r\nsat\r\n", "世界 👋🏽 Привет", "㍿ ﷺ ½ ㌔", "\ufffd", "a\ufffdb", "\u200b"),
    *("\t", "e\u0301", "the cat sat on Привет " * 20, "--\u2580\u2581\u2582 \u2013\u2014\u201c"),
]
KINDS = [
    (kind, fallback, source)
    for kind in ("bpe", "unigram", "char", "word")
    for fallback in (True, False)
    for source in ("prose", "words")
]


def text_of(folder, model):
    """ValidationText of the val shards in a folder."""
    size = sentencepiece.SentencePieceProcessor(model_file=str(model)).vocab_size()
    cfg = tiny(vocab_size=size, data_path=str(folder), tokenizer_path=str(model))
    return train_gpt.ValidationText(cfg)


def write_text(folder, documents):
    lines = [json.dumps({"text": text}) + "\n" for text in documents]
    (folder / "x_val.jsonl").write_text("".join(lines), encoding="utf-8")


def write_val(folder, encoded):
    stream = [token for ids in encoded for token in (1, *ids)]
    write_shard(folder / "x_val_000000.bin", stream)


def spelt_by_hand(processor, ids, leading_is_free):
    """What SentencePiece decodes; where it has no piece for a space, U+2581 is one."""
    text = processor.decode(ids)
    mark = ["<0xE2>", "<0x96>", "<0x81>"]
    pieces = "".join(processor.encode("a \ue000  b", out_type=str))
    if "".join(mark) in pieces:
        text = text.replace("\u2581", " ")
        if leading_is_free and processor.id_to_piece(ids[:3]) == mark:
            text = text[1:]
    return text


@pytest.mark.parametrize(("kind", "fallback", "source"), KINDS)
def test_counted_bytes_are_those_of_the_decoded_text(kind, fallback, source, tmp_path):
    """Every way that SentencePiece is trained, against its own decoder and the text."""
    text = MIXED if source == "prose" else WORDS
    random = np.random.default_rng(0)
    refused = 0
    for prefix, rule, strip in itertools.product(
        (False, True), ("identity", "nmt_nfkc"), (False, True)
    ):
        size = 420 if fallback else 60 if kind != "word" else 40
        options = dict(vocab_size=size, model_type=kind, byte_fallback=fallback)
        options |= dict(add_dummy_prefix=prefix, normalization_rule_name=rule)
        options |= dict(remove_extra_whitespaces=strip, character_coverage=0.98)
        path = tmp_path / "tokenizer.model"
        path.write_bytes(model_of(text, **options))
        processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        for known in (False, True):
            documents = [DOCUMENTS[i] for i in random.permutation(len(DOCUMENTS))[:5]]
            documents.append("Hello")
            encoded = [processor.encode(document) for document in documents]
            if known:
                encoded = prepare_text.encode_documents(processor, documents)
            write_val(tmp_path, encoded)
            (tmp_path / "x_val.jsonl").unlink(missing_ok=True)
            if known:
                write_text(tmp_path, documents)
            if any(3 in ids for ids in encoded):
                refused += 1
                with pytest.raises(UserError, match="unknown"):
                    text_of(tmp_path, path)
                continue
            found = text_of(tmp_path, path)
            spelt = [spelt_by_hand(processor, ids, prefix or strip) for ids in encoded]
            assert found.spelt_bytes == found.bytes.sum() == len("".join(spelt).encode())
            if known:
                assert found.text_bytes == len("".join(documents).encode())
                assert found.lossy == (spelt != documents)
    assert bool(refused) <= (not fallback)


def test_spaces_in_byte_tokens_are_one_byte(tmp_path):
    """#897: a tokenizer without a piece for a space, whose dummy prefix is spelt so, too."""
    for prefix in (False, True):
        path = tmp_path / "tokenizer.model"
        how = dict(normalization_rule_name="identity", remove_extra_whitespaces=False)
        path.write_bytes(model_of(WORDS, byte_fallback=True, add_dummy_prefix=prefix, **how))
        processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        document = " Hello  world the cat "
        write_val(tmp_path, [processor.encode(document)] * 2)
        found = text_of(tmp_path, path)
        assert found.spelt_bytes == 2 * len(document)
        assert found.checked["bytes"] == 2 * len(document)
        write_text(tmp_path, [document] * 2)
        assert not text_of(tmp_path, path).lossy
        (tmp_path / "x_val.jsonl").unlink()


def test_prepared_literal_space_marks_are_three_bytes(dataset, tmp_path):
    model = dataset / "tokenizer.model"
    documents = ["a\u2581b \u2581", "\u2581", " c"]
    processor = prepare_text.load_tokenizer(model)
    write_val(tmp_path, prepare_text.encode_documents(processor, documents))
    write_text(tmp_path, documents)
    found = text_of(tmp_path, model)
    assert found.spelt_bytes == found.text_bytes == len("".join(documents).encode())
    assert not found.lossy


def test_bytes_with_spaces_of_their_own(tmp_path):
    """Published byte tokens: a space is byte 0x20, and U+2581 is itself."""
    path = tmp_path / "tokenizer.model"
    how = dict(normalization_rule_name="identity", remove_extra_whitespaces=False)
    path.write_bytes(model_of(WORDS, byte_fallback=True, add_dummy_prefix=False, **how))
    processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    document = "a \u2581 b".encode()
    write_val(tmp_path, [[processor.piece_to_id(f"<0x{byte:02X}>") for byte in document]])
    assert text_of(tmp_path, path).spelt_bytes == len(document)


@pytest.mark.parametrize("piece", [5, 8, 64])
def test_long_documents_are_decoded_in_pieces(dataset, tmp_path, monkeypatch, piece):
    """No cut falls into a character; what is no UTF-8 spells the bytes themselves."""
    monkeypatch.setattr(train_gpt, "PIECE_TOKENS", piece)
    model = dataset / "tokenizer.model"
    documents = ["世界 👋🏽 Привет the cat, sat\u2581 " * 9, " " * 40, "é\ufffd" * 30]
    processor = prepare_text.load_tokenizer(model)
    encoded = prepare_text.encode_documents(processor, documents)
    write_val(tmp_path, encoded)
    write_text(tmp_path, documents)
    found = text_of(tmp_path, model)
    assert found.spelt_bytes == len("".join(documents).encode()) and not found.lossy
    (tmp_path / "x_val.jsonl").unlink()
    whole = [token for ids in encoded for token in (1, *ids)]
    for cut in range(2, 30):  # shards that begin or end in a character
        write_shard(tmp_path / "x_val_000000.bin", whole[cut:-cut])
        found = text_of(tmp_path, model)
        assert found.checked["bytes"] == found.bytes.sum()


def test_a_wrong_table_is_found(dataset, tmp_path, monkeypatch):
    """The check is of the table: one byte more for a piece, and the run stops."""
    tables = train_gpt.token_bytes(str(dataset / "tokenizer.model"), 0)
    wrong = tables._replace(base_bytes=tables.base_bytes + (np.arange(512) == 300))
    write_shard(tmp_path / "x_val_000000.bin", [1, 301, 302, 1, 300, 301])
    monkeypatch.setattr(train_gpt, "token_bytes", lambda *_: wrong)
    with pytest.raises(UserError, match=r"TOKENIZER_PATH=.* counts [0-9]+ bytes in .* 1, .*fix:"):
        text_of(tmp_path, dataset / "tokenizer.model")


def test_the_rest_of_a_long_text_is_checked_later(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(train_gpt, "FIRST_CHECKED", 30)
    model = dataset / "tokenizer.model"
    stream = np.concatenate([random_stream(9, 512, seed) for seed in range(10)])
    write_shard(tmp_path / "x_val_000000.bin", stream)
    found = text_of(tmp_path, model)
    later = found.check(rest=True)
    assert 0 < found.checked["tokens"] < later["tokens"]
    for name, total in dict(tokens=99, bytes=found.bytes.sum(), documents=10).items():
        assert found.checked[name] + later[name] == total
    found.bytes[15] += 1  # in a document that was left out
    with pytest.raises(UserError, match="TOKENIZER_PATH"):
        found.check(rest=True)


# -----------------------------------------------------------------------------
# Text and tokenizer beside the shards


def test_altered_text_is_known_by_the_text_itself(tmp_path):
    """nmt_nfkc on ligatures: the bytes are the text's where it lies there, else what is spelt."""
    path = tmp_path / "tokenizer.model"
    path.write_bytes(model_of(MIXED, byte_fallback=True))
    processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    documents = ["㍿ ﷺ ½ ㌔ abc", "plain text"]
    encoded = [processor.encode(document) for document in documents]
    write_val(tmp_path, encoded)
    spelt = len("".join(processor.decode(encoded)).encode())
    found = text_of(tmp_path, path)
    assert found.lossy and found.text_bytes == found.spelt_bytes == spelt
    for lossy in (False, True):
        (tmp_path / "dataset.json").write_text(json.dumps(dict(lossy=lossy, more=1)))
        assert text_of(tmp_path, path).lossy == lossy
    write_text(tmp_path, documents)
    found = text_of(tmp_path, path)
    size = len("".join(documents).encode())
    assert found.lossy and (found.text_bytes, found.spelt_bytes) == (size, spelt) and size < spelt
    write_val(tmp_path, encoded[1:])  # this one survives
    write_text(tmp_path, documents[1:])
    assert not text_of(tmp_path, path).lossy


def test_a_lossless_tokenizer_is_not_called_lossy(dataset, tmp_path):
    write_shard(tmp_path / "x_val_000000.bin", [1, 300])
    assert not text_of(tmp_path, dataset / "tokenizer.model").lossy


def test_text_of_other_tokens_is_refused(dataset, tmp_path):
    model = dataset / "tokenizer.model"
    processor = prepare_text.load_tokenizer(model)
    write_val(tmp_path, [processor.encode("one text"), processor.encode("and another")])
    for documents in (["one text"], ["one text", "and another", ""], ["one text", "and a third"]):
        write_text(tmp_path, documents)
        with pytest.raises(UserError, match=r"x_val\.jsonl.*fix:"):
            text_of(tmp_path, model)
    for line in ("[]", '{"text": 1}', '{"text": "\\ud800"}', "[" * 99_999, '{"text"', "\xff"):
        (tmp_path / "x_val.jsonl").write_bytes(line.encode("latin-1") + b"\n")
        with pytest.raises(UserError, match=r"x_val\.jsonl: line 1.*fix:"):
            text_of(tmp_path, model)


def test_shards_of_another_tokenizer_are_refused(dataset, tmp_path):
    """With the tokenizer's sha256 beside them, or with the text."""
    model = dataset / "tokenizer.model"
    other = tmp_path / "other.model"
    train, _ = prepare.sample_documents()
    other.write_bytes(prepare_text.train_tokenizer(train[200:240], 512))
    (shard,) = dataset.glob("*_val_*.bin")
    (source,) = dataset.glob("*_val.jsonl")
    (tmp_path / "x_val_000000.bin").write_bytes(shard.read_bytes())
    text_of(tmp_path, other)  # nobody can know
    tokens = train_gpt.read_shard(shard, 512)
    facts = dict(tokenizer_sha256=train_gpt.sha256(model.read_bytes()))
    facts["val_tokens_sha256"] = train_gpt.sha256(tokens.tobytes())
    (tmp_path / "dataset.json").write_text(json.dumps(facts))
    text_of(tmp_path, model)
    with pytest.raises(UserError, match=r"TOKENIZER_PATH=.*other\.model.*dataset\.json.*fix:"):
        text_of(tmp_path, other)
    write_shard(tmp_path / "x_val_000000.bin", tokens[:-1])
    with pytest.raises(UserError, match=r"DATA_PATH.*dataset\.json.*fix:"):
        text_of(tmp_path, model)
    (tmp_path / "dataset.json").unlink()
    (tmp_path / "x_val_000000.bin").write_bytes(shard.read_bytes())
    (tmp_path / "x_val.jsonl").write_bytes(source.read_bytes())
    with pytest.raises(UserError, match=r"TOKENIZER_PATH=.*other\.model.*x_val\.jsonl.*fix:"):
        text_of(tmp_path, other)


ALTERED = {  # texts of which no tokenizer makes these tokens -> of the one that was there
    "doubled spaces": lambda text: text.replace(" ", "  "),
    "no spaces": lambda text: text.replace(" ", ""),
    "tabs": lambda text: text.replace(" ", "\t"),
    "a last line": lambda text: text + "\n",
    "a space before": lambda text: " " + text,
    "space marks": lambda text: text.replace(" ", "\u2581"),
    "wide spaces": lambda text: text.replace(" ", "\u3000"),
    "nothing": lambda text: "",
}


@pytest.mark.parametrize("kind", ALTERED)
def test_white_space_is_text(kind, dataset, tmp_path):
    """The divisor was 618 for 498 bytes, and proved."""
    model = dataset / "tokenizer.model"
    documents = ["the cat sat on the mat", "and on it sat"]
    processor = prepare_text.load_tokenizer(model)
    write_val(tmp_path, prepare_text.encode_documents(processor, documents))
    write_text(tmp_path, documents)
    assert text_of(tmp_path, model).text_bytes == len("".join(documents))
    for number in range(2):
        changed = documents.copy()
        changed[number] = ALTERED[kind](documents[number])
        write_text(tmp_path, changed)
        with pytest.raises(UserError, match=rf"document {number} spells .*x_val\.jsonl; fix"):
            text_of(tmp_path, model)


def altering(tmp_path):
    """The path of a tokenizer that makes one space of two, and its processor."""
    path = trained(tmp_path, **MODELS["official FineWeb"])
    return path, prepare_text.load_tokenizer(path)


@settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
@given(text=st.text("ab \u2581 1\n\u3000\ufb01\U0001f44b", max_size=30), cut=st.integers(1, 9))
def test_altered_text_is_compared_as_it_is_prepared(model, text, cut):
    """Documents of prepare_text.py, wherever it cuts them, against what a Decoder says of it."""
    _, path, processor = model
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_gpt, "ENCODER_CHARS", cut)
        patch.setattr(prepare_text, "ENCODER_CHARS", cut)
        (ids,) = prepare_text.encode_documents(processor, [text])
        tokens = np.array(ids, int)
        decoder = train_gpt.Decoder(processor, train_gpt.token_bytes(path, 0), tokens)
        assert decoder.again(text) == decoder.spell(tokens)


def test_no_document_may_be_altered_where_dataset_json_says_so(tmp_path):
    path, processor = altering(tmp_path)
    write_val(tmp_path, [processor.encode("the  cat sat")])
    write_text(tmp_path, ["the  cat sat"])
    assert text_of(tmp_path, path).changed == 1
    (tmp_path / "dataset.json").write_text('{"lossy": true}')
    assert text_of(tmp_path, path).lossy
    (tmp_path / "dataset.json").write_text('{"lossy": false}')
    with pytest.raises(UserError, match=r"document 0 spells 11 bytes.* 12 .*x_val\.jsonl; fix"):
        text_of(tmp_path, path)


def test_every_altered_document_is_compared(tmp_path):
    """The 102nd was not."""
    path, processor = altering(tmp_path)
    documents = ["the  cat"] * 150
    write_val(tmp_path, [processor.encode(text) for text in documents])
    write_text(tmp_path, documents)
    assert text_of(tmp_path, path).changed == 150
    for number in (101, 149):
        write_text(tmp_path, documents[:number] + ["anything else "] + documents[number + 1 :])
        with pytest.raises(UserError, match=rf"document {number} spells"):
            text_of(tmp_path, path)


def test_dataset_json_binds_the_text(dataset, tmp_path):
    model = dataset / "tokenizer.model"
    write_shard(tmp_path / "x_val_000000.bin", [1, 300, 301])
    text = sentencepiece.SentencePieceProcessor(model_file=str(model)).decode([300, 301])
    write_text(tmp_path, [text])
    content = (tmp_path / "x_val.jsonl").read_bytes()
    facts = dict(val_text_sha256=train_gpt.sha256(content))
    (tmp_path / "dataset.json").write_text(json.dumps(facts))
    assert text_of(tmp_path, model).sources
    (tmp_path / "x_val.jsonl").write_bytes(content + b"\n")  # the same documents
    with pytest.raises(UserError, match=r"x_val\.jsonl: its sha256 .*dataset\.json; fix: "):
        text_of(tmp_path, model)
    (tmp_path / "x_val.jsonl").unlink()
    assert not text_of(tmp_path, model).sources


def test_prepared_text_is_bound(tmp_path):
    out = tmp_path / "set"
    prepare_text.write_dataset(["the cat sat on the mat"] * 9, ["a cat", "a mat"], out, "x", 300)
    assert text_of(out, out / "tokenizer.model").sources
    write_text(out, ["a cat", "a  mat"])
    with pytest.raises(UserError, match=r"x_val\.jsonl: its sha256"):
        text_of(out, out / "tokenizer.model")


DAMAGED = [
    "",
    "[]",
    "{",
    "nan",
    "\xff",
    "[" * 99_999,
    '{"lossy": 1}',
    '{"val_text_sha256": 1}',
    '{"tokenizer_sha256": null}',
]


@pytest.mark.parametrize("content", [*DAMAGED, " " * (1 << 20) + "{}", "folder", "fifo"])
def test_damaged_dataset_json_is_refused_in_a_line(content, dataset, tmp_path):
    path = tmp_path / "dataset.json"
    if content == "folder":
        path.mkdir()
    elif content == "fifo":
        os.mkfifo(path)
    else:
        path.write_bytes(content.encode("latin-1"))
    write_shard(tmp_path / "x_val_000000.bin", [1, 300])
    with pytest.raises(UserError, match=r"dataset\.json: .*fix:") as caught:
        text_of(tmp_path, dataset / "tokenizer.model")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("ids", [(0, 1), (2, 1), (-1, 1)])
def test_foreign_bos_ids_are_refused(ids, tmp_path):
    bos, eos = ids
    path = tmp_path / "tokenizer.model"
    path.write_bytes(model_of(MIXED, bos_id=bos, eos_id=eos, pad_id=-1, unk_id=3))
    with pytest.raises(UserError, match=rf"TOKENIZER_PATH=.*BOS id {bos}.*fix:"):
        train_gpt.token_bytes(str(path), 0)


def test_unknown_tokens_are_refused_with_their_number(tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(model_of(WORDS, 40, model_type="word"))
    processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    write_val(tmp_path, [processor.encode("Hello unheard of world")])
    with pytest.raises(UserError, match=r"DATA_PATH=.*: 1 of 4 validation tokens.*fix:"):
        text_of(tmp_path, path)


# -----------------------------------------------------------------------------
# Documents that training and validation share


class Lines(SimpleNamespace):
    """A Runtime that keeps its lines."""

    def __init__(self, number=0):
        super().__init__(rank=number, lines=[])

    def log(self, key, value=None, **values):
        self.lines.append((key, value, values))


def documents_of(stream):
    """Tuples of tokens, the one before the first BOS included, the empty ones left out."""
    found = [[]]
    for token in stream:
        if token == 1:
            found.append([])
        else:
            found[-1].append(token)
    return [tuple(document) for document in found if document]


def compare(folder, val, shards, steps, number=0):
    """The lines of Overlap over these shards after so many steps of 16 tokens."""
    for path in folder.glob("*_train_*.bin"):
        path.unlink()
    paths = [write_shard(folder / f"x_train_{i}.bin", part) for i, part in enumerate(shards)]
    stream = np.array(val if val[0] == 1 else [1, *val], np.uint16)
    edges = [*np.flatnonzero(stream == 1).tolist(), len(stream)]
    cfg = SimpleNamespace(shuffle=False, train_batch_tokens=16, vocab_size=64)
    text = SimpleNamespace(stream=stream, edges=edges, cfg=cfg, unknown=3)
    rt = Lines(number)
    overlap = train_gpt.Overlap(text, paths, rt)
    overlap.log(steps)
    overlap.log(steps)  # the same shards: no second line
    overlap.pool.shutdown()
    return rt.lines


few_tokens = st.lists(st.sampled_from([1, 1, 4, 5, 6]), min_size=1, max_size=25)


@settings(deadline=None, max_examples=300, suppress_health_check=list(HealthCheck))
@given(
    val=few_tokens,
    shards=st.lists(few_tokens, min_size=1, max_size=4),
    steps=st.integers(1, 7),
    block=st.integers(1, 4),
)
def test_shared_documents_are_those_of_two_sets(tmp_path, val, shards, steps, block):
    """Each one of validation against a set of tuples, also over one or more ends of shards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_gpt, "SCAN_TOKENS", 3)
        patch.setattr(train_gpt, "SCAN_DOCUMENTS", block)
        lines = compare(tmp_path, val, shards, steps)
    ends = np.cumsum([len(shard) for shard in shards])
    read = next((i for i, end in enumerate(ends) if end >= 16 * steps + 1), len(shards) - 1) + 1
    whole = [token for shard in shards for token in shard]
    after = whole[ends[read - 1] :]
    last = after[: after.index(1)] if 1 in after else after
    begun = whole[: ends[read - 1]]
    wanted = documents_of(begun + last)
    values = dict(
        documents=sum(document in set(wanted) for document in documents_of(val)),
        train_documents=len(wanted),
        shards=f"{read}/{len(shards)}",
    )
    assert lines == [("overlap", None, values)]


def test_documents_of_validation_count_each_time(tmp_path):
    lines = compare(tmp_path, [1, 4, 1, 4, 1, 5, 1, 4], [[1, 4, 1, 4]], 1)
    assert lines[0][2] == dict(documents=3, train_documents=2, shards="1/1")


def test_unknown_tokens_of_training_are_noted(tmp_path):
    lines = compare(tmp_path, [1, 4], [[1, 3, 3, 5]], 1)
    assert [line[0] for line in lines] == ["overlap", "note"] and lines[1][1].startswith("2 ")


def test_a_broken_shard_makes_the_number_unknown(tmp_path):
    shards = [[1, 4, 5], [1, 64]]
    lines = compare(tmp_path, [1, 4, 5], shards, 1)
    assert lines[-1] == ("overlap", None, dict(documents="unknown"))
    assert "x_train_1.bin" in lines[0][1]


def test_other_ranks_compare_nothing(tmp_path):
    assert compare(tmp_path, [1, 4], [[1, 4]], 1, number=1) == []


def test_the_first_step_does_not_wait_for_long(tmp_path):
    path = write_shard(tmp_path / "x_train_0.bin", [1, 4])
    cfg = SimpleNamespace(shuffle=False, train_batch_tokens=16, vocab_size=64)
    text = SimpleNamespace(stream=np.array([1, 4]), edges=[0, 2], cfg=cfg, unknown=3)
    rt = Lines()
    overlap = train_gpt.Overlap(text, [path], rt)
    go_on = threading.Event()
    scan = overlap.scan
    overlap.scan = lambda number: (go_on.wait(20), scan(number))[1]  # else it never ends
    overlap.log(1, 0.01)
    assert rt.lines == []
    go_on.set()
    overlap.log(1)
    assert rt.lines == [("overlap", None, dict(documents=1, train_documents=1, shards="1/1"))]
    overlap.pool.shutdown()
