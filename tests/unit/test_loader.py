"""Shards, the loader's rows, the bytes of tokens and the validation stream."""

import io
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import sentencepiece
from helpers import random_stream, tiny, train_gpt, write_shard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

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
        (tmp_path / name).touch()
    found = [path.name for path in train_gpt.find_shards(str(tmp_path), "train")]
    assert found == ["b_train_000000.bin", "b_train_000001.bin"]
    assert len(train_gpt.find_shards(str(tmp_path), "val")) == 1
    with pytest.raises(UserError, match="DATA_PATH='nowhere'"):
        train_gpt.find_shards("nowhere", "train")


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
    cfg = SimpleNamespace(train_batch_tokens=batch, train_seq_len=length)
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
    cfg = SimpleNamespace(train_batch_tokens=16, train_seq_len=8)
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
    for name in ("junk.model", "empty.model", "none.model", "."):
        with pytest.raises(UserError, match="TOKENIZER_PATH"):
            train_gpt.token_bytes(str(tmp_path / name), 0)


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
