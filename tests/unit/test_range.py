"""COMPRESSOR=range and TARGET_BYTES: what comes back, at what size, and what is refused."""

import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import opened, pack_artifact, perturbed, tiny, train_gpt
from hypothesis import given, settings
from hypothesis import strategies as st

RANGE = dict(compressor="range", clip_sigmas=12.85, embed_clip_sigmas=20.0, control_coding="int8")
CFG = tiny(**RANGE)
SPECS = train_gpt.parameter_specs(CFG)
WEIGHTS = dict(perturbed(CFG).named_parameters())
HEAVY = {name: weight.detach() ** 3 for name, weight in WEIGHTS.items()}  # tails
SCRIPT_BYTES = len(train_gpt.pack_script(train_gpt.SCRIPT))


def payload_of(fill, specs=SPECS):
    """fill(array of integers, largest) and random floats."""
    payload = np.zeros((), train_gpt.payload_type(specs))
    rng = np.random.default_rng(0)
    for name, spec in specs.items():
        field = payload[name]
        if field.dtype.names:
            fill(field["integers"], train_gpt.LARGEST[spec.coding])
            field = field["scale"]
        field[...] = rng.normal(size=field.shape)
    return payload


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 999), spread=st.sampled_from([0.0, 0.3, 3.0, 1e3]))
def test_payloads_come_back(seed, spread):
    """Of zeros, of few and of all values, of columns of very different sizes."""
    rng = np.random.default_rng(seed)

    def fill(integers, largest):
        sizes = spread * np.exp(rng.normal(size=integers.shape[-1:]))
        integers[...] = (rng.normal(size=integers.shape) * sizes).round().clip(-largest, largest)

    payload = payload_of(fill)
    before = payload.tobytes()
    words = train_gpt.range_encode(payload, SPECS)
    assert payload.tobytes() == before
    assert train_gpt.range_decode(words, SPECS).tobytes() == before
    assert train_gpt.range_encode(payload, SPECS) == words


def test_ends_of_the_grid_come_back():
    for end in (lambda q, largest: q.fill(largest), lambda q, largest: q.fill(-largest)):
        payload = payload_of(end)
        words = train_gpt.range_encode(payload, SPECS)
        assert train_gpt.range_decode(words, SPECS).tobytes() == payload.tobytes()


def bits_of(walk):
    """What the coding model itself gives what `walk` codes, without a coder."""
    bits = 0.0

    def code(symbols, shares):
        nonlocal bits
        assert shares.min() > 0 and math.isclose(shares.sum(), 1)
        bits -= np.log2(shares[symbols]).sum()
        return symbols

    walk(code)
    return bits


def bits_of_integers(matrices):
    return bits_of(lambda code: train_gpt.code_integers(code, matrices.copy(), 31))


def gaussian(cfg, spread=2.4):
    """A payload as grids by deviation leave it."""
    specs = train_gpt.parameter_specs(cfg)
    rng = np.random.default_rng(1)

    def fill(integers, largest):
        numbers = rng.normal(size=integers.shape) * spread * largest / 31
        integers[...] = numbers.round().clip(-largest, largest)

    return payload_of(fill, specs), specs


def test_size_is_the_model_s_entropy():
    payload, specs = gaussian(tiny(**RANGE, model_dim=64, num_layers=4))
    size = len(train_gpt.range_encode(payload, specs))
    bits = bits_of(lambda code: train_gpt.code_payload(code, payload.copy(), specs))
    assert size <= 1.001 * bits / 8 + 8


def test_matrices_take_their_entropy():
    """Independent integers: nothing is to be won, and little may be lost on learning counts."""
    rng = np.random.default_rng(2)
    matrices = (rng.normal(size=(4, 512, 512)) * 2.4).round().clip(-31, 31).astype(np.int8)
    bits = bits_of_integers(matrices)
    counts = np.bincount(matrices.ravel().astype(int) + 31)
    shares = counts[counts > 0] / counts.sum()
    entropy = -(counts[counts > 0] * np.log2(shares)).sum()
    assert entropy < bits < 1.004 * entropy


def test_columns_of_other_sizes_gain():
    rng = np.random.default_rng(3)
    sizes = np.exp(rng.normal(size=256))
    matrix = (rng.normal(size=(1, 300, 256)) * 2 * sizes).round().clip(-31, 31).astype(np.int8)
    shuffled = rng.permuted(matrix, axis=2)

    assert bits_of_integers(matrix) < 0.93 * bits_of_integers(shuffled)


def test_an_artifact_comes_back_and_is_smaller():
    packed = pack_artifact(WEIGHTS, CFG)
    model = train_gpt.load_artifact("a", content=packed)
    payload, _ = train_gpt.quantise(WEIGHTS, CFG)
    for name, weight in model.named_parameters():
        assert torch.equal(weight, train_gpt.unpack_tensor(payload[name])), name
    zstd = pack_artifact(WEIGHTS, tiny(**RANGE | dict(compressor="zstd")))
    assert len(packed) < 0.97 * len(zstd)


def test_flipped_bits_are_refused_before_anything_is_loaded(monkeypatch):
    packed = pack_artifact(WEIGHTS, CFG)
    monkeypatch.setattr(train_gpt, "range_decode", lambda *_: pytest.fail("decoded"))
    for place in np.linspace(0, 8 * len(packed) - 1, 60).astype(int).tolist():
        bad = bytearray(packed)
        bad[place // 8] ^= 1 << place % 8
        with pytest.raises(train_gpt.ArtifactError):
            train_gpt.load_artifact("a", content=bytes(bad))


@pytest.mark.parametrize("change", ["shorter", "longer", "odd", "none", "random"])
def test_signed_words_of_no_weights(change):
    """Signed anew: refused, or weights on their grids; never a crash."""
    header, words = opened(pack_artifact(WEIGHTS, CFG))
    random = np.random.default_rng(0).bytes(len(words))
    words = dict(
        shorter=words[:-400], longer=words + bytes(400), odd=words[:-1], none=b"", random=random
    )[change]
    content = train_gpt.seal(train_gpt.ARTIFACT_PREFIX, header, words)
    if change in ("longer", "odd"):
        with pytest.raises(train_gpt.ArtifactError):
            train_gpt.load_artifact("a", content=content)
        return
    try:
        payload = train_gpt.read_artifact("a", content).payload
    except train_gpt.ArtifactError:
        return
    for name, spec in SPECS.items():
        if payload[name].dtype.names:
            assert (
                abs(payload[name]["integers"].astype(int)).max() <= train_gpt.LARGEST[spec.coding]
            )


@pytest.mark.parametrize("value", [np.inf, np.nan])
@pytest.mark.parametrize("compressor", ["range", "zstd"])
@pytest.mark.filterwarnings("error")
def test_scales_that_are_no_numbers(value, compressor):
    cfg = tiny(**RANGE | dict(compressor=compressor))
    payload, _ = train_gpt.quantise(WEIGHTS, cfg)
    payload["kv_bank"]["scale"][1, 2] = value
    content, _ = train_gpt.pack_payload(payload, cfg)
    with pytest.raises(train_gpt.ArtifactError, match="kv_bank holds what is no number; fix"):
        train_gpt.load_artifact("a", content=content)


@pytest.mark.parametrize(("compressor", "name"), [("range", "constriction"), ("zstd", "zstandard")])
def test_a_missing_package_is_no_damage(compressor, name, monkeypatch):
    packed = pack_artifact(WEIGHTS, tiny(**RANGE | dict(compressor=compressor)))
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(train_gpt.MissingPackage, match=f"^package {name} is missing; fix: pip"):
        train_gpt.load_artifact("a", content=packed)


def test_artifacts_of_earlier_versions_are_refused_by_name():
    packed = pack_artifact(WEIGHTS, CFG)
    header, words = opened(packed)
    earlier = train_gpt.seal(packed[:8] + (1).to_bytes(4, "little"), header, words)
    with pytest.raises(train_gpt.ArtifactError, match="of version 1, made by an earlier or later"):
        train_gpt.load_artifact("a", content=earlier)
    with pytest.raises(train_gpt.ArtifactError, match="sha256"):  # a flipped bit is no version
        train_gpt.load_artifact("a", content=packed[:8] + b"\1" + packed[9:])


# -----------------------------------------------------------------------------
# TARGET_BYTES


def made(target, hessians=None, weights=WEIGHTS, **changes):
    """-> Packing of weights, where `target` bytes are left beside the script; 0: any number"""
    cfg = tiny(**RANGE | changes, target_bytes=target and SCRIPT_BYTES + target)
    return train_gpt.make_artifact(weights, cfg, train_gpt.Runtime(cfg), hessians or {})


def logged(packing, cfg):
    lines = []
    log = lambda *words, **values: lines.append((words, values))  # noqa: E731
    packing.log(SimpleNamespace(log=log), cfg)
    return lines


SHARES = [0.99, 0.95, 0.9, 0.8, 0.7, 0.65, 0.6, 0.55, 0.5]


@pytest.mark.parametrize("weights", ["normal", "heavy tails"])
@pytest.mark.parametrize("how", ["range", "zstd", "gptq"])
@pytest.mark.parametrize("share", SHARES)
def test_clips_rise_until_the_bytes_fit(share, how, weights):
    """And no further than they have to: GPTQ's sizes are not those of rounding to nearest."""
    changes = dict(compressor="zstd") if how == "zstd" else {}
    changes |= dict(weights=WEIGHTS if weights == "normal" else HEAVY)
    if how == "gptq":
        changes |= dict(quant="gptq", hessians=correlated_hessians())
    free = made(0, **changes)
    target = int(share * free.size)
    packing = made(target, **changes)
    assert packing.widening > 1 and packing.room == target
    left = (target - len(packing.packed)) / target
    near = share >= 0.65 and how != "zstd"  # whose size wavers with the clip
    assert packing.room == target and 0 <= left < (0.002 if near else 0.07)
    assert packing.size == len(packing.packed)
    assert packing.tries <= train_gpt.FIT_TRIES + 2 * (share < 0.7)


def correlated_hessians():
    """Of inputs that go together, for every matrix of CFG's model."""
    generator = torch.Generator().manual_seed(0)
    hessians = {}
    for name, inputs in train_gpt.GPTQ_INPUTS.items():
        for source in inputs if name in SPECS else ():
            columns = SPECS[name].shape[-1]
            layers = CFG.num_layers if name in train_gpt.BANKS else 1
            x = torch.randn(layers, 2 * columns, columns, generator=generator)
            x = x @ torch.randn(layers, columns, columns, generator=generator)
            hessians[source] = x.mT @ x / len(x)
    return hessians


def test_what_fits_is_left_alone():
    free = made(0)
    packing = made(free.size)
    assert packing.packed == free.packed and packing.tries == 1
    cfg = tiny(**RANGE, target_bytes=10**6)
    found = dict(weights=free.size, left=0, clip_sigmas=12.85, tries=1)
    assert logged(packing, cfg) == [(("target_bytes", 10**6), found)]


def test_wider_is_not_always_smaller():
    """Weights that are all alike round to zero and back as the clips widen: of what was tried the
    smallest is kept."""
    alike = {name: torch.full_like(weight, 0.5) for name, weight in WEIGHTS.items()}
    how = dict(weights=alike, quant="lite", matrix_coding="int4")
    free = made(0, **how)
    packing = made(int(0.5 * free.size), **how)
    assert packing.size <= free.size and packing.room < packing.size


def test_what_cannot_fit_is_as_small_as_can_be_and_said():
    """A training is not lost by it; test_report.py has the refusal before."""
    packing = made(500)
    assert packing.widening > 32 and packing.tries <= 5
    assert train_gpt.load_artifact("a", content=packing.packed)
    lines = logged(packing, tiny(**RANGE, target_bytes=1234))
    missed = f"TARGET_BYTES=1234: missed by {packing.size - 500:,} bytes"
    assert lines[1:] == [(("note", missed), {})]


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        (dict(target_mb=1.0, compressor="zstd"), "TARGET_BYTES"),
        (dict(clip_sigmas=0.0), "TARGET_BYTES"),
        (dict(target_bytes=0, target_mb=1.0), "TARGET_MB"),
    ],
)
def test_targets_that_contradict_each_other(changes, name):
    with pytest.raises(train_gpt.ConfigError, match=f"^{name}="):
        tiny(**RANGE | dict(target_bytes=10**6) | changes)
