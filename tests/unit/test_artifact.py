"""Quantiser, container and QAT: the grid is the best one, and only whole artifacts load."""

import copy
import dataclasses
import hashlib
import json
import lzma
import resource
import struct
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import zstandard
from helpers import START, opened, pack_artifact, perturbed, random_ids, tiny, train_gpt
from hypothesis import given, settings
from hypothesis import strategies as st

ArtifactError = train_gpt.ArtifactError
LARGEST = {"int6": 31, "int8": 127}
INT8_QUANTILE = 0.9999984
PACKED = len(train_gpt.pack_script(train_gpt.SCRIPT))

# -----------------------------------------------------------------------------
# The grid


def candidate_errors(row, quantiles, largest, floor):
    """[(scale, squared error)] of one row, by torch.quantile and the published formulas."""
    found = []
    for quantile in quantiles:
        clip = torch.quantile(row.abs().double(), quantile)
        scale = clip / largest
        scale = max(scale.item(), 1 / largest) if floor else scale.item()
        scale = torch.tensor(scale).half().double().item() or 2.0**-24
        integers = (row.double() / scale).round().clamp(-largest, largest)
        found.append((scale, ((integers * scale - row.double()) ** 2).sum().item()))
    return found


def chosen_error(weight, scale, largest):
    """Squared error of each row on the grid of these scales."""
    weight, scale = weight.double(), scale.double()
    integers = (weight / scale).round().clamp(-largest, largest)
    return ((integers * scale - weight) ** 2).sum(-1)


matrices = st.tuples(
    st.integers(1, 5), st.integers(1, 70), st.integers(0, 99), st.sampled_from([1e-4, 0.05, 3.0])
)


def heavy_tailed(rows, columns, seed, spread):
    """fp32 (rows, columns); the cube of a normal, so that clips differ."""
    generator = torch.Generator().manual_seed(seed)
    return spread * torch.randn(rows, columns, generator=generator) ** 3


@settings(deadline=None, max_examples=60)
@given(size=matrices, floor=st.booleans(), coding=st.sampled_from(["int6", "int8"]))
def test_grid_of_a_row_is_the_best_candidate(size, floor, coding):
    weight, cfg = heavy_tailed(*size), tiny(quant_floor=floor, quant_per="row")
    largest = LARGEST[coding]
    quantiles = cfg.clip_quantiles if coding == "int6" else (INT8_QUANTILE,)
    scale = train_gpt.search_grid(weight, coding, cfg)
    assert scale.shape == (*weight.shape[:-1], 1)
    for row, one, error in zip(weight, scale, chosen_error(weight, scale, largest), strict=True):
        candidates = candidate_errors(row, quantiles, largest, floor)
        assert any(one.item() == pytest.approx(s, rel=1.1e-3, abs=2**-24) for s, _ in candidates)
        assert error.item() <= min(e for _, e in candidates) * 1.01 + 1e-12


@settings(deadline=None, max_examples=40)
@given(size=matrices, floor=st.booleans())
def test_grid_of_a_matrix_is_the_best_quantile_for_all_rows(size, floor):
    weight, cfg = heavy_tailed(*size), tiny(quant_floor=floor, quant_per="matrix")
    scale = train_gpt.search_grid(weight, "int6", cfg)
    rows = [candidate_errors(row, cfg.clip_quantiles, 31, floor) for row in weight]
    totals = [sum(row[i][1] for row in rows) for i in range(len(cfg.clip_quantiles))]
    assert chosen_error(weight, scale, 31).sum().item() <= min(totals) * 1.01 + 1e-12
    choices = [[row[i][0] for row in rows] for i in range(len(cfg.clip_quantiles))]
    ours = scale.flatten().tolist()
    assert any(ours == pytest.approx(choice, rel=1.1e-3, abs=2**-24) for choice in choices)


def test_a_bank_is_searched_matrix_by_matrix():
    bank = torch.stack([heavy_tailed(6, 40, seed, 0.1 * 10**seed) for seed in range(3)])
    for per in ("row", "matrix"):
        cfg = tiny(quant_per=per)
        together = train_gpt.search_grid(bank, "int6", cfg)
        alone = [train_gpt.search_grid(matrix, "int6", cfg) for matrix in bank]
        assert torch.equal(together, torch.stack(alone))


def test_rows_and_matrices_may_choose_differently():
    weight = torch.cat([heavy_tailed(8, 300, 1, 1.0), torch.rand(8, 300)])
    errors = {
        per: chosen_error(
            weight, train_gpt.search_grid(weight, "int6", tiny(quant_per=per)), 31
        ).sum()
        for per in ("row", "matrix")
    }
    assert errors["row"] < errors["matrix"]


def test_floor_is_the_published_one():
    weight = torch.randn(4, 50) * 0.01  # clip far below 1: the floor decides
    floored = train_gpt.search_grid(weight, "int6", tiny(quant_floor=True))
    assert floored.flatten().tolist() == [torch.tensor(1 / 31).half().item()] * 4
    assert (train_gpt.search_grid(weight, "int6", tiny(quant_floor=False)) < 0.01).all()
    floored = train_gpt.search_grid(weight, "int8", tiny(quant_floor=True))
    assert floored.flatten().tolist() == [torch.tensor(1 / 127).half().item()] * 4


def test_zero_rows_stay_zero(reload):
    scale = train_gpt.search_grid(torch.zeros(3, 8), "int6", tiny())
    assert scale.isfinite().all() and (scale > 0).all()
    weights = dict(perturbed(tiny()).named_parameters())
    weights["mlp_down_bank"] = torch.zeros_like(weights["mlp_down_bank"])
    assert (reload(weights, tiny())["mlp_down_bank"] == 0).all()


# -----------------------------------------------------------------------------
# The container

CFG = tiny()
WEIGHTS = {name: weight.detach() for name, weight in perturbed(CFG).named_parameters()}
MAGIC = train_gpt.ARTIFACT_PREFIX[:-4]
(VERSION,) = struct.unpack("<I", train_gpt.ARTIFACT_PREFIX[-4:])


@pytest.fixture
def load_bytes(tmp_path):
    """-> function that writes bytes to a file and loads them."""

    def load(data):
        (tmp_path / "artifact.bin").write_bytes(data)
        return train_gpt.load_artifact(tmp_path / "artifact.bin")

    return load


@pytest.fixture
def reload(load_bytes):
    """-> function that packs weights and reads them back: name -> tensor"""
    return lambda weights, cfg: dict(load_bytes(pack_artifact(weights, cfg)).named_parameters())


@pytest.fixture(scope="module")
def good():
    return pack_artifact(WEIGHTS, CFG)


def signed(header, payload, magic=MAGIC, version=VERSION, more=0):
    """A container around any header, with a digest that fits."""
    text = header
    if not isinstance(header, bytes):
        text = json.dumps(header, separators=(",", ":")).encode()
    body = magic + struct.pack("<II", version, len(text) + more) + text + payload
    return body + hashlib.sha256(body).digest()


def expected(name, weight, cfg):
    """What a tensor becomes: its values on the grid, or in 16 bits, by plain formulas."""
    coding = train_gpt.parameter_specs(cfg)[name].coding
    if coding == "fp32":
        return weight
    if coding == "fp16":
        return weight.half().float()
    scale = train_gpt.search_grid(weight, coding, cfg)
    return (weight / scale).round().clamp(-LARGEST[coding], LARGEST[coding]) * scale


CODINGS = [
    {},
    dict(embed_coding="fp16", table_coding="int6", control_coding="fp32", compressor="lzma"),
    dict(embed_coding="int6", table_coding="fp16", quant_per="matrix", quant_floor=True),
]


@pytest.mark.parametrize("changes", CODINGS)
def test_round_trip_gives_the_quantised_weights(changes, reload):
    cfg = tiny(**changes)
    loaded = reload(WEIGHTS, cfg)
    assert list(loaded) == list(WEIGHTS)
    for name, weight in WEIGHTS.items():
        assert loaded[name].dtype == torch.float32
        torch.testing.assert_close(loaded[name], expected(name, weight, cfg), rtol=0, atol=0)


def test_loaded_model_is_ready_to_score(load_bytes, good):
    model = load_bytes(good)
    assert not model.training and not any(w.requires_grad for w in model.parameters())
    reference = train_gpt.GPT(CFG)
    reference.load_state_dict({n: expected(n, w, CFG) for n, w in WEIGHTS.items()}, strict=True)
    ids = random_ids(CFG)
    torch.testing.assert_close(model.hidden(ids), reference.hidden(ids), rtol=0, atol=0)


def test_longer_sequences_can_be_asked_for(load_bytes, good):
    model = load_bytes(good)
    ids = random_ids(tiny(train_seq_len=64, train_batch_tokens=64))
    assert model.hidden(ids).shape[1] == 64 > model.cfg.train_seq_len


def test_same_weights_same_bytes_whatever_the_run(good):
    other = tiny(run_id="x", seed=9, iterations=3, matrix_lr=0.5, data_path="/somewhere")
    assert pack_artifact(WEIGHTS, other) == good
    assert hashlib.sha256(good[:-32]).digest() == good[-32:]
    changed = WEIGHTS | dict(tok_emb=WEIGHTS["tok_emb"] * 1.5)
    assert pack_artifact(changed, CFG) != good


def test_header_says_model_and_tensors_and_nothing_else(good):
    header, _ = opened(good)
    assert set(header) <= {"model", "tensors", "size", "compressor"}
    assert {name.upper() for name in header["model"]} <= set(train_gpt.VARIABLES)
    assert not {"seed", "run_id", "data_path", "tokenizer_path"} & header["model"].keys()
    assert [entry["name"] for entry in header["tensors"]] == list(WEIGHTS)
    for entry in header["tensors"]:
        assert set(entry) == {"name", "shape", "coding", "offset"}
        assert tuple(entry["shape"]) == WEIGHTS[entry["name"]].shape


def refused(load, data):
    """The message with which bytes are refused, quickly and without much memory."""
    began, limits = time.perf_counter(), resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        mapped = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + 2**29, limits[1]))
    try:
        with pytest.raises(ArtifactError) as caught:
            load(data)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert isinstance(caught.value, ValueError) and "\n" not in str(caught.value)
    assert "artifact.bin" in str(caught.value) and time.perf_counter() - began < 20
    return str(caught.value)


def test_every_damaged_byte_is_refused(good, load_bytes):
    places = {*range(START + 60), *range(len(good) - 40, len(good)), *range(0, len(good), 97)}
    for place in places:
        damaged = bytearray(good)
        damaged[place] ^= 1 << place % 8
        refused(load_bytes, bytes(damaged))


def test_every_length_but_its_own_is_refused(good, load_bytes):
    for length in [*range(60), *range(60, len(good), 211), len(good) - 1]:
        refused(load_bytes, good[:length])
    for more in (b"\0", b"x" * 100, good):
        refused(load_bytes, good + more)


def test_missing_file_and_folder(tmp_path):
    for path in (tmp_path / "none.bin", tmp_path):
        with pytest.raises(ArtifactError, match=path.name):
            train_gpt.load_artifact(path)


def test_helper_signs_as_the_script_does(good):
    """The lies below are refused for the lie and not for their clothes."""
    assert signed(*opened(good)) == good


def lie(change):
    """A lie: change(header) alters a deep copy of the header in place."""

    def tell(header):
        header = copy.deepcopy(header)
        result = change(header)
        return header if result is None else result

    return tell


def set_model(**values):
    return lie(lambda header: header["model"].update(values))


def set_entry(index, **values):
    return lie(lambda header: header["tensors"][index].update(values))


LIES = {
    "no model": lie(lambda h: h.pop("model") and None),
    "no tensors": lie(lambda h: h.pop("tensors") and None),
    "no size": lie(lambda h: h.pop("size") and None),
    "another key": lie(lambda h: h.update(host="x")),
    "model is a list": lie(lambda h: h.update(model=[])),
    "model is null": lie(lambda h: h.update(model=None)),
    "tensors is an object": lie(lambda h: h.update(tensors={})),
    "tensors is a number": lie(lambda h: h.update(tensors=3)),
    "header is a list": lie(lambda h: [h]),
    "header is null": lie(lambda h: b"null"),
    "header is empty": lie(lambda h: b""),
    "header is not UTF-8": lie(lambda h: b"\xff\xfe{}"),
    "header is nested": lie(lambda h: b"[" * 200_000),
    "header holds a huge number": lie(lambda h: h.update(size=10**300)),
    "size is text": lie(lambda h: h.update(size="1")),
    "size is null": lie(lambda h: h.update(size=None)),
    "size is negative": lie(lambda h: h.update(size=-1)),
    "size is one more": lie(lambda h: h.update(size=h["size"] + 1)),
    "size is one less": lie(lambda h: h.update(size=h["size"] - 1)),
    "size is 10 TB": lie(lambda h: h.update(size=10**13)),
    "missing tensor": lie(lambda h: h["tensors"].pop() and None),
    "missing first tensor": lie(lambda h: h["tensors"].pop(0) and None),
    "tensor twice": lie(lambda h: h["tensors"].append(h["tensors"][0])),
    "tensors swapped": lie(lambda h: h["tensors"].reverse()),
    "entry is a number": lie(lambda h: h["tensors"].__setitem__(0, 1)),
    "entry has another key": set_entry(0, host="x"),
    "other name": set_entry(0, name="embedding"),
    "name is a number": set_entry(0, name=3),
    "other shape": set_entry(0, shape=[32, 64]),
    "huge shape": set_entry(0, shape=[10**9, 10**9]),
    "negative shape": set_entry(0, shape=[-64, -32]),
    "shape is text": set_entry(0, shape="64,32"),
    "other coding": set_entry(0, coding="fp32"),
    "unknown coding": set_entry(0, coding="int4"),
    "coding is a list": set_entry(0, coding=["int8"]),
    "other offset": set_entry(1, offset=0),
    "huge offset": set_entry(1, offset=2**62),
    "negative offset": set_entry(1, offset=-1),
    "model field missing": lie(lambda h: h["model"].pop("num_heads") and None),
    "model field unknown": set_model(seed="1"),
    "larger vocabulary": set_model(vocab_size="65536"),
    "huge vocabulary": set_model(vocab_size="1" + "0" * 30),
    "vocabulary of thousands of digits": set_model(vocab_size="9" * 5000),
    "negative vocabulary": set_model(vocab_size="-64"),
    "no vocabulary": set_model(vocab_size="0"),
    "a billion layers": set_model(num_layers="1000000000"),
    "huge width": set_model(model_dim="1073741824"),
    "huge MLP": set_model(mlp_mult="1e308"),
    "MLP is nan": set_model(mlp_mult="nan"),
    "negative MLP": set_model(mlp_mult="-3.0"),
    "no heads": set_model(num_heads="0"),
    "more heads": set_model(num_heads="5"),
    "negative bigram": set_model(bigram_vocab_size="-48"),
    "other bigram": set_model(bigram_vocab_size="49"),
    "layer out of range": set_model(ve_layers="-9,-1"),
    "no layer list": set_model(ve_layers=""),
    "base is infinite": set_model(rope_base="inf"),
    "base is zero": set_model(rope_base="0.0"),
    "softcap is zero": set_model(logit_softcap="0.0"),
    "switch is a word": set_model(smear_gate="maybe"),
    "switch off": set_model(smear_gate="0"),
    "switch is null": set_model(smear_gate=None),
    "field is a list": set_model(num_layers=["4"]),
    "field is an object": set_model(num_layers={}),
    "sequence beyond all": set_model(train_seq_len="1073741824"),
}


@pytest.mark.parametrize("name", LIES)
def test_signed_lies_are_refused(name, good, load_bytes):
    header, payload = opened(good)
    refused(load_bytes, signed(LIES[name](header), payload))


def test_signed_magic_version_and_length(good, load_bytes):
    header, payload = opened(good)
    for changes in (
        dict(magic=b"PGOLFGPX"),
        dict(version=0),
        dict(version=1),
        dict(version=2),
        dict(version=4),
        dict(version=2**32 - 1),
        dict(more=1),
        dict(more=2**31),
        dict(more=-1),
    ):
        refused(load_bytes, signed(header, payload, **changes))


PACKERS = {
    "zstd": (zstandard.ZstdCompressor().compress, zstandard.ZstdDecompressor().decompress),
    "lzma": (lzma.compress, lzma.decompress),
}
PAYLOADS = {  # name -> what becomes of (raw payload, compressed payload, its compressor)
    "nothing": lambda raw, payload, pack: b"",
    "junk": lambda raw, payload, pack: b"junk",
    "one byte less": lambda raw, payload, pack: payload[:-1],
    "half": lambda raw, payload, pack: payload[: len(payload) // 2],
    "junk after": lambda raw, payload, pack: payload + b"junk",
    "twice": lambda raw, payload, pack: payload + payload,
    "shorter inside": lambda raw, payload, pack: pack(raw[:-1]),
    "longer inside": lambda raw, payload, pack: pack(raw + b"\0"),
    "empty inside": lambda raw, payload, pack: pack(b""),
    "uncompressed": lambda raw, payload, pack: raw,
    "bomb": lambda raw, payload, pack: pack(bytes(2**27)),  # one of 4 GB takes long to make
}


@pytest.mark.parametrize("compressor", PACKERS)
@pytest.mark.parametrize("name", PAYLOADS)
def test_signed_payloads_of_another_length(name, compressor, load_bytes):
    pack, unpack = PACKERS[compressor]
    header, payload = opened(pack_artifact(WEIGHTS, tiny(compressor=compressor)))
    load_bytes(signed(header, pack(unpack(payload))))
    refused(load_bytes, signed(header, PAYLOADS[name](unpack(payload), payload, pack)))


def test_payload_of_the_other_compressor(load_bytes):
    (header, _), (_, payload) = (
        opened(pack_artifact(WEIGHTS, tiny(compressor=name))) for name in PACKERS
    )
    refused(load_bytes, signed(header, payload))


def test_signed_bomb_with_a_consistent_header(good, load_bytes):
    """Nearly 2 GiB by its header and zstd's own length field, and a few bytes in truth."""
    _, payload = opened(good)
    cfg = tiny(num_layers=64, model_dim=1024, vocab_size=65_536)
    header = train_gpt.artifact_header(cfg)
    assert 2**29 < header["size"] < 2**31
    refused(load_bytes, signed(header, payload))
    frame = zstandard.ZstdCompressor().compressobj(size=header["size"])
    refused(load_bytes, signed(header, frame.compress(bytes(10**6)) + frame.flush(1)))


# -----------------------------------------------------------------------------
# Selective pruning of what is 1 or -1 on its grid (PR #993)


def raw(artifact):
    """An artifact's bytes -> its payload, decompressed: uint8"""
    header, payload = opened(artifact)
    return np.frombuffer(PACKERS[header["model"]["compressor"]][1](payload), np.uint8)


def matrices_of(entry, layers):
    """Numbers of a tensor's matrices in the order of #993's names, which count layer by layer:
    c_q 0, proj 0, c_q 1, ...; c_k 0, c_v 0, ...; fc 0, ...; mlp.proj 0, ... (systems.md, 3.4)"""
    if len(entry["shape"]) == 2:
        return [0]
    halves = entry["shape"][0] // layers
    return [half * layers + i for i in range(layers) for half in range(halves)]


def candidates(artifact):
    """Places in the payload of the int6 entries +-1, those of the smallest squared steps first."""
    (header, _), payload, found = opened(artifact), raw(artifact), []
    for entry in header["tensors"]:
        if entry["coding"] == "int6":
            *_, height, width = entry["shape"]
            rows, first = int(np.prod(entry["shape"][:-1])), entry["offset"]
            steps = payload[first : first + 2 * rows].view("<f2").astype(np.float32)
            first += 2 * rows
            for matrix in matrices_of(entry, int(header["model"]["num_layers"])):
                for row in range(matrix * height, (matrix + 1) * height):
                    begin = first + row * width
                    values = payload[begin : begin + width].view("i1")
                    ones = np.flatnonzero(abs(values) == 1)
                    found += [(steps[row] ** 2, begin + i) for i in ones]
    return [place for _, place in sorted(found, key=lambda pair: pair[0])]  # stable


def zeroed(payload, places, compressor):
    """Size of a payload whose bytes at these places are 0, compressed."""
    payload = payload.copy()
    payload[places] = 0
    return len(train_gpt.compress(payload.tobytes(), compressor))


def pruned(cfg, total, weights=WEIGHTS):
    """Pack for a code + artifact of so many bytes -> artifact, what is logged, with a note where
    they are more."""
    cfg = dataclasses.replace(cfg, target_mb=(total + 0.5) / 2**20)
    packing = train_gpt.make_artifact(weights, cfg, train_gpt.Runtime(cfg), {})
    lines = {}
    log = lambda key, *value, **figures: lines.update({key: figures or value})  # noqa: E731
    packing.log(SimpleNamespace(log=log), cfg)
    missed = len(packing.packed) + PACKED - total
    assert lines.pop("note", ("",))[0] == (
        f"TARGET_MB={cfg.target_mb}: missed by {missed:,} bytes" if missed > 0 else ""
    )
    assert [*lines] == ["prune"] and packing.tries == 1
    return packing.packed, lines["prune"]


@pytest.mark.parametrize("share", [0.02, 0.5, 0.97])
@pytest.mark.parametrize(
    "changes", [{}, dict(compressor="lzma", quant_floor=True, quant_per="matrix")]
)
def test_pruning_zeroes_the_smallest_ones_until_it_fits(changes, share, load_bytes):
    """One 256th of the candidates less would not fit. With a floor all steps are alike: by
    layer and place."""
    cfg, code = tiny(**changes), PACKED
    free = pack_artifact(WEIGHTS, cfg)
    places, before = candidates(free), raw(free)
    size = len(opened(free)[1])
    goal = size - int(share * (size - zeroed(before, places, cfg.compressor)))
    artifact, line = pruned(cfg, code + len(free) - size + goal)
    after, count = raw(artifact), line["pruned"]
    assert len(opened(artifact)[1]) == line["bytes"] <= goal
    assert line["candidates"] == len(places) and 0 < count < len(places)
    assert np.flatnonzero(before != after).tolist() == sorted(places[:count])
    assert (after[places[:count]] == 0).all()
    assert zeroed(before, places[: count - len(places) // 256 - 1], cfg.compressor) > goal
    assert opened(artifact)[0] == opened(free)[0]  # the header knows nothing of it
    weights, others = dict(load_bytes(artifact).named_parameters()), load_bytes(free)
    for name, weight in others.named_parameters():
        gone = weights[name] != weight
        assert (weights[name][gone] == 0).all(), name


def published_matrices(model):
    """Its int6 matrices by #993's names, in the order of its quantised state."""
    layers, matrices = model.cfg.num_layers, {}
    for i in range(layers):
        matrices[f"blocks.{i}.attn.c_q.weight"] = model.qo_bank[i]
        matrices[f"blocks.{i}.attn.proj.weight"] = model.qo_bank[layers + i]
    for i in range(layers):
        matrices[f"blocks.{i}.attn.c_k.weight"] = model.kv_bank[i]
        matrices[f"blocks.{i}.attn.c_v.weight"] = model.kv_bank[layers + i]
    for i in range(layers):
        matrices[f"blocks.{i}.mlp.fc.weight"] = model.mlp_up_bank[i]
    for i in range(layers):
        matrices[f"blocks.{i}.mlp.proj.weight"] = model.mlp_down_bank[i]
    return matrices


@pytest.mark.parametrize("share", [0.1, 0.4, 0.8])
def test_pruning_breaks_ties_as_published(share, load_bytes):
    """Brute force over names, with nearly all rows on the floor as in #993: a list of (name, place,
    squared step), sorted by the last."""
    cfg = tiny(quant_floor=True, quant_per="matrix", compressor="lzma", num_layers=5)
    weights = {name: 0.2 * weight.detach() for name, weight in perturbed(cfg).named_parameters()}
    weights["mlp_up_bank"][3, :5] *= 40  # some rows lie above it
    grids = {name: train_gpt.search_grid(weights[name], "int6", cfg) for name in train_gpt.BANKS}
    steps = published_matrices(SimpleNamespace(cfg=cfg, **grids))
    free = pack_artifact(weights, cfg)
    matrices, found = published_matrices(load_bytes(free)), []
    for name, matrix in matrices.items():
        ones = (matrix.abs() == steps[name]).flatten().nonzero().flatten().tolist()
        squares = (steps[name] ** 2).expand_as(matrix).flatten()
        found += [(name, place, squares[place].item()) for place in ones]
    found.sort(key=lambda candidate: candidate[2])
    assert len({square for *_, square in found}) > 2
    total = PACKED + len(free) - int(share * 0.16 * len(free))
    artifact, line = pruned(cfg, total, weights)
    assert line["candidates"] == len(found) and 256 < line["pruned"] < len(found)
    for name, place, _ in found[: line["pruned"]]:
        matrices[name].view(-1)[place] = 0
    for name, matrix in published_matrices(load_bytes(artifact)).items():
        assert torch.equal(matrix, matrices[name]), name


def test_pruning_leaves_alone_what_fits():
    free = pack_artifact(WEIGHTS, CFG)
    artifact, line = pruned(CFG, PACKED + len(free))
    assert artifact == free and line["pruned"] == 0 and line["seconds"] >= 0


@pytest.mark.parametrize("total", [0, 100_000])
def test_pruning_zeroes_all_where_nothing_suffices(total):
    free = pack_artifact(WEIGHTS, CFG)
    artifact, line = pruned(CFG, total)
    assert line["pruned"] == line["candidates"] == len(candidates(free))
    assert not candidates(artifact)
    assert (raw(free) != raw(artifact)).sum() == line["candidates"]


def test_pruning_is_of_int4_to_int7():
    """Of int8 there is nothing that it may zero."""
    for coding in ("int4", "int5", "int7", "int8"):
        cfg = tiny(matrix_coding=coding, table_coding="fp16")
        artifact, line = pruned(cfg, 0)
        assert line["candidates"] == line["pruned"]
        assert (line["pruned"] == 0) == (coding == "int8")
        assert (artifact == pack_artifact(WEIGHTS, cfg)) == (coding == "int8")


# -----------------------------------------------------------------------------
# Late QAT and averages
