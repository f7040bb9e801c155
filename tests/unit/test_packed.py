"""The packed script: it runs the very bytes of the readable one, by its sha256."""

import shutil
import subprocess
import sys

import pytest
from helpers import SCRIPT, SHRUNK, Run, launch, opened, train_gpt

SOURCE = SCRIPT.read_bytes()


@pytest.fixture
def packed(tmp_path):
    path = tmp_path / train_gpt.PACKED_NAME
    path.write_bytes(train_gpt.pack_script(SOURCE))
    return path


def test_it_is_small_and_says_what_it_holds(packed):
    content = packed.read_bytes()
    assert len(content) < 0.4 * len(SOURCE)
    assert train_gpt.sha256(SOURCE).encode() in content.splitlines()[0]
    assert train_gpt.pack_script(SOURCE) == content
    assert all(32 <= byte < 127 or byte == 10 for byte in content)


def test_help_is_the_same(packed, tmp_path):
    plain = tmp_path / "train_gpt.py"
    plain.write_bytes(SOURCE)
    outputs = [launch(path, ["--help"], {}, 1, tmp_path).stdout for path in (plain, packed)]
    assert outputs[0] == outputs[1] and "NUM_LAYERS" in outputs[0]


@pytest.mark.parametrize("place", [0.3, 0.7])
def test_damage_runs_nothing(packed, tmp_path, place):
    content = bytearray(packed.read_bytes())
    at = int(place * len(content))
    content[at] = ord("A") if content[at] != ord("A") else ord("B")
    packed.write_bytes(content)
    done = subprocess.run([sys.executable, packed, "--help"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "damaged\n")


def test_another_text_in_its_place_does_not_run(packed, tmp_path):
    """Well packed, of another sha256."""
    other = train_gpt.pack_script(b"print('ran')").decode().splitlines()
    lines = packed.read_text().splitlines()
    for interpreter in ([sys.executable], [sys.executable, "-O"]):
        packed.write_text("\n".join([*lines[:3], other[3], *lines[4:]]))
        done = subprocess.run([*interpreter, packed], capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr) == (1, "", "damaged\n")


def test_a_run_is_the_same_run(packed, dataset, tmp_path):
    """Its folder holds the readable script, whose sha256 is the stream's; ranks start as usual."""
    shutil.copy(train_gpt.ROOT / "records/track_cpu/tiny/config.env", tmp_path)  # as submit.py does
    env = SHRUNK | dict(DATA_PATH=str(dataset), RUN_ID="x", SCORER="documents", CODEC_TOKENS="-1")
    env.pop("RECORD")
    done = launch(packed, [], env, 2, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    run = Run(tmp_path / "runs/x")
    assert (run.folder / "train_gpt.py").read_bytes() == SOURCE
    assert run.final("codec")["decoded"] == "ok"
    header, _ = train_gpt.unseal(train_gpt.STREAM_PREFIX, (run.folder / "stream.bin").read_bytes())
    assert header["made"]["code"] == train_gpt.sha256(SOURCE)
    sizes = run.final("artifact_bytes")
    assert int(sizes["packed"]) == packed.stat().st_size and int(sizes["code"]) == len(SOURCE)
    assert int(sizes["total"]) == packed.stat().st_size + len(run.artifact)
    assert opened(run.artifact)[0]["model"]["compressor"] == "range"
