"""records/tools/compress.py: every byte comes back, from what was written and from nothing else."""

import hashlib
import io
import json
import lzma
import math
import os
import signal
import subprocess
import sys

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
    (folder / "artifact.bin").write_bytes(train_gpt.pack_artifact(weights, cfg))
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


# -----------------------------------------------------------------------------
# Bytes come back


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("name", FILES)
def test_every_file_comes_back(compressors, tokenizer, name):
    compressor, data = compressors[tokenizer], FILES[name]
    packed = compressor.compress(data, 12)
    assert compressor.restore(packed.data) == data


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
    ((shape, _),) = packed.header["blocks"]
    assert shape is None or shape.lanes == shape.documents == min(lanes, packed.tokens)
    assert shape or lanes == 4096  # a lane for each token costs more than it saves
    assert compressor.restore(packed.data) == data


def test_longer_files_get_more_lanes(compressor, monkeypatch):
    monkeypatch.setattr(compress, "LANE_TOKENS", 10)
    lanes = [compressor.compress(b"\xff" * size).header["blocks"][0] for size in (9, 45, 700)]
    assert [shape and shape.lanes for shape, _ in lanes] == [1, 4, 32]


def test_blocks_follow_each_other(compressor, monkeypatch):
    """Those that the model makes larger are stored, the others not."""
    monkeypatch.setattr(compress, "BLOCK_TOKENS", 200)
    data = b"\xfe" * 400 + RANDOM.bytes(2000).translate(None, bytes(range(128))) + b"\xfe" * 300
    packed = compressor.compress(data)
    stored = [shape is None for shape, _ in packed.header["blocks"]]
    assert len(stored) == -(-packed.tokens // 200)
    assert not stored[0] and all(stored[3:-2]) and compressor.restore(packed.data) == data


def test_random_bytes_do_not_grow(compressors):
    data = RANDOM.bytes(1000)
    for name, compressor in compressors.items():
        packed = compressor.compress(data, 9)
        aside = 220 if name == "without bytes" else 0  # a mark for each byte, xz's container
        assert len(packed.data) <= len(data) + len(json.dumps(packed.header)) + 64 + aside


def test_header_says_what_a_restore_needs(compressor):
    data = SCRIPTS.encode()[:300]
    packed = compressor.compress(data)
    header, payload = train_gpt.unseal(compress.PREFIX, packed.data)
    assert header["bytes"] == len(data) and header["sha256"] == hashlib.sha256(data).hexdigest()
    digests = {
        what: hashlib.sha256(path.read_bytes()).hexdigest()
        for what, path in dict(
            tokenizer=compressor.tokenizer, artifact=compressor.artifact, code=ROOT / "train_gpt.py"
        ).items()
    }
    assert header["made"].items() >= digests.items()
    assert {"torch", "numpy", "constriction", "device", "threads"} <= header["made"].keys()
    assert header["scoring"]["ngram_mixer"] == "blend"
    assert sum(size for _, size in header["blocks"]) == len(payload)
    assert str(ROOT) not in json.dumps(header)


def test_the_same_bytes_twice(compressor):
    data = SOURCE_CODE.encode()[:500]
    assert compressor.compress(data).data == compressor.compress(data).data


# -----------------------------------------------------------------------------
# Refusals


@pytest.mark.parametrize("place", [0, 9, 40, -40, -1])
def test_one_flipped_bit_is_refused(compressor, place):
    packed = bytearray(compressor.compress(b"some text").data)
    packed[place] ^= 4
    with pytest.raises(compress.UserError, match="x.pgz: damaged"):
        compressor.restore(bytes(packed), "x.pgz")


@pytest.mark.parametrize("change", [lambda p: p[:-1], lambda p: p + b"\0", lambda p: b""])
def test_another_length_is_refused(compressor, change):
    with pytest.raises(compress.UserError, match="damaged"):
        compressor.restore(change(compressor.compress(b"some text").data))


def test_another_container_is_refused(compressor):
    with pytest.raises(compress.UserError, match="not of this program"):
        compressor.restore(train_gpt.seal(train_gpt.STREAM_PREFIX, {}, b""))


@pytest.mark.parametrize("what", ["artifact", "tokenizer"])
def test_another_model_is_refused_by_name(compressor, artifacts, tmp_path, what):
    tokenizer = (artifacts["lossless"].parent / "tokenizer.model").read_bytes()
    other = artifact_of(tmp_path / "other", tokenizer, seed=int(what == "artifact"))
    if what == "tokenizer":  # of as many pieces
        tokenizer = prepare_text.train_tokenizer([SCRIPTS, SOURCE_CODE, CHINESE], 512)
        other.with_name("tokenizer.model").write_bytes(tokenizer)
    packed = compressor.compress(b"some text").data
    with pytest.raises(compress.UserError, match=f"made with {what} [0-9a-f]{{64}}, here"):
        compress.Compressor(other).restore(packed)


@pytest.mark.parametrize("what", ["torch", "numpy", "constriction", "code", "device"])
def test_another_machine_is_refused_by_name(compressor, monkeypatch, what):
    packed, made = compressor.compress(b"some text").data, compressor.made()
    monkeypatch.setattr(compressor, "made", lambda: made | {what: "another"})
    with pytest.raises(compress.UserError, match=f"made with {what} .*, here it is another"):
        compressor.restore(packed)


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


def test_words_that_no_coder_makes_are_noticed(compressor, monkeypatch):
    """On a machine of other arithmetic the decoder itself may give up."""

    def decode(*_):
        raise train_gpt.StreamError("words of another text")

    packed = compressor.compress(b"\xfe" * 300)
    monkeypatch.setattr(train_gpt, "decode", decode)
    with pytest.raises(compress.UserError, match="restores to other bytes"):
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


def test_failed_check_writes_nothing(command, tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"text")
    monkeypatch.setattr(compress.Compressor, "restore", lambda *_: b"test")
    status, out, err = command("a")
    assert (status, out) == (2, "") and "does not restore to a" in err
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["none"], "none"),
        (["."], "directory"),
        (["--restore", "a"], "does not end with .pgz; fix: give --output"),
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
        (["sparse"], "sparse: 1,000,000,000,000 bytes, "),
        (["--restore", "sparse", "--output", "x"], "sparse: 1,000,000,000,000 bytes, "),
        (["a", "--tokenizer", "fifo"], "fifo: not a regular file"),
    ],
)
def test_one_line_for_what_is_wrong(command, tmp_path, arguments, message):
    (tmp_path / "a").write_bytes(b"text")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("nowhere")
    with open(tmp_path / "sparse", "wb") as file:
        file.truncate(10**12) if "sparse" in arguments else None
    if "a.pgz" in arguments:
        (tmp_path / "a.pgz").write_bytes(b"text")
        (tmp_path / "a").unlink()
    before = names(tmp_path)
    status, out, err = command(*arguments)
    assert status == 2 and out == "" and err.count("\n") == 1
    assert err.startswith("error: ") and message in err.replace("Is a d", "d")
    assert names(tmp_path) == before


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
        f"restoring: {packed.header['blocks'][0][0].targets:,}",
    ]
    assert all(line.endswith(" s to go") for line in lines)


def test_duration():
    given = [0, 1.4, 119, 120, 7199, 7200, 1e6]
    wanted = ["0 s", "1 s", "119 s", "2 min", "120 min", "2 h", "278 h"]
    assert [*map(compress.duration, given)] == wanted


def hostile(compressor, data=b"", payload=b"", **changes):
    """A container for this machine that claims what it likes."""
    header = compressor.compress(data).header
    return train_gpt.seal(compress.PREFIX, header | changes, payload)


ZEROS = dict(bytes=1000, blocks=[])


@pytest.mark.parametrize(
    ("changes", "payload", "told"),
    [
        (dict(bytes=10**13), b"", "more than the memory free"),
        (dict(bytes=-1), b"", "no numbers"),
        (dict(bytes=1e9), b"", "no numbers"),
        (dict(bytes=True), b"", "no numbers"),
        (dict(blocks=[[None, -5]]), b"12345678", "no numbers"),
        (dict(blocks=[[None, 10**15]]), b"", "more than it holds"),
        (dict(blocks=[[[1, 0, 10**9, 1, 2**19, 1024], 0]]), b"", "its plan is"),
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


def test_a_container_without_end_is_refused(compressor):
    """A thousand blocks of half a million tokens each, of which none has a byte."""
    window = compressor.config(compress.defaults(), 9).window
    blocks = [[[9, 0, 9, 1, 1 << 19, window], 0]] * 1000
    packed = hostile(compressor, bytes=10**6, blocks=blocks)
    with pytest.raises(compress.UserError, match="524279000 tokens for 1000000 bytes"):
        compressor.restore(packed, "x.pgz")


def test_a_header_brings_no_escapes_to_the_terminal(compressor):
    header = compressor.compress(b"x").header
    made = header["made"] | {"torch": "\x1b]0;owned\x07" + "x" * 999}
    with pytest.raises(compress.UserError) as refused:
        compressor.restore(train_gpt.seal(compress.PREFIX, header | dict(made=made), b""))
    assert "\x1b" not in str(refused.value) and len(str(refused.value)) < 300


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
    assert [bar.total for _, bar in bars] == [300, 306]  # with the ends of six lanes


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
