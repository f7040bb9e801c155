"""Bad input through the command line: one clear line, a non-zero exit, no traceback."""

import shutil

import numpy as np
import pytest
import torch
from helpers import (
    SHRUNK,
    cores,
    error_line,
    random_stream,
    run_here,
    run_script,
    tiny,
    train_gpt,
    write_shard,
)

GOOD = random_stream(3000, 512)


@pytest.fixture
def data(dataset, tmp_path):
    """-> function that makes a dataset folder whose shards are wrong as asked for."""

    def make(train=None, val=None):
        folder = tmp_path / "set"
        folder.mkdir()
        shutil.copy(dataset / "tokenizer.model", folder)
        for split, wrong in (("train", train), ("val", val)):
            path = folder / f"x_{split}_000000.bin"
            write_shard(path, **dict(tokens=GOOD) | (wrong or {}))
        return folder

    return make


def variables(folder, **more):
    """The shrunk run on a folder, with these changes; a change to None takes a variable out."""
    env = SHRUNK | dict(DATA_PATH=str(folder), RUN_ID="bad") | more
    return {name: str(value) for name, value in env.items() if value is not None}


def message(env, folder, monkeypatch, capsys):
    """The error line of main() in this process, for the many cases."""
    for name, text in env.items():
        monkeypatch.setenv(name, text)
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.argv", ["train_gpt.py"])
    with cores(1), pytest.raises(SystemExit) as caught:
        train_gpt.main()
    lines = capsys.readouterr().err.splitlines()
    assert caught.value.code == 2 and len(lines) == 1
    return lines[0]


@pytest.fixture
def refusal(tmp_path, monkeypatch, capsys):
    """-> function: the line with which main() refuses variables."""
    return lambda env: message(env, tmp_path, monkeypatch, capsys)


SHARDS = {  # what is wrong with a shard -> (how, words of the message)
    "magic": (dict(magic=1), ["magic 1"]),
    "version": (dict(version=7), ["version 7"]),
    "length": (dict(count=2999), ["length"]),
    "token": (dict(tokens=np.append(GOOD, 512)), ["token 512", "vocabulary 512"]),
    "no tokens": (dict(tokens=[]), ["0 tokens"]),
}


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("name", SHARDS)
def test_broken_shard(name, split, data, tmp_path, refusal):
    how, words = SHARDS[name]
    line = refusal(variables(data(**{split: how})))
    assert f"x_{split}_000000.bin" in line and all(word in line for word in words)
    assert not (tmp_path / "runs/bad/submission.json").exists()


WRONG = {  # what is wrong with the variables -> (changes, words of the message)
    "missing data folder": (dict(DATA_PATH="nowhere"), ["DATA_PATH", "nowhere"]),
    "tokenizer of another size": (dict(VOCAB_SIZE=1024), ["VOCAB_SIZE=1024", "512"]),
    "missing tokenizer": (dict(TOKENIZER_PATH="none.model"), ["TOKENIZER_PATH", "none.model"]),
    "batch not divisible": (dict(TRAIN_BATCH_TOKENS=500), ["TRAIN_BATCH_TOKENS=500", "64"]),
    "misspelt variable": (dict(ITERATOINS=5), ["ITERATOINS", "ITERATIONS"]),
    "variable of a family": (dict(NGRAM_MAGIC=5), ["NGRAM_MAGIC", "NGRAM_"]),
    "no number": (dict(ITERATIONS="many"), ["ITERATIONS='many'", "int"]),
    "no finite number": (dict(MATRIX_LR="nan"), ["MATRIX_LR='nan'"]),
    "unknown record": (dict(RECORD="pr0"), ["RECORD='pr0'", "tiny"]),
    "missing artifact": (dict(EVAL_ONLY="none.bin"), ["none.bin"]),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_variable(name, dataset, refusal):
    changes, words = WRONG[name]
    line = refusal(variables(dataset, **changes))
    assert all(word in line for word in words), line
    assert "fix" in line or "must be" in line or "did you mean" in line


def test_no_cuda_device(dataset, refusal):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    assert "DEVICE=cuda" in refusal(variables(dataset, DEVICE="cuda"))


def test_damaged_artifact(dataset, tmp_path, refusal):
    (tmp_path / "a.bin").write_bytes(b"PGOLFGPT" + bytes(500))
    line = refusal(variables(dataset, EVAL_ONLY=tmp_path / "a.bin"))
    assert "a.bin" in line and "sha256" in line


def test_artifact_of_another_tokenizer(dataset, tmp_path, refusal):
    cfg = tiny(vocab_size=64)
    weights = dict(train_gpt.GPT(cfg).initialise().named_parameters())
    (tmp_path / "a.bin").write_bytes(train_gpt.pack_artifact(weights, cfg))
    line = refusal(variables(dataset, EVAL_ONLY=tmp_path / "a.bin"))
    assert "64" in line and "512" in line


def test_folder_without_validation(data, refusal):
    folder = data()
    (folder / "x_val_000000.bin").unlink()
    line = refusal(variables(folder))
    assert "DATA_PATH" in line and "_val_" in line


def test_folder_without_training(data, refusal):
    folder = data()
    (folder / "x_train_000000.bin").unlink()
    line = refusal(variables(folder))
    assert "DATA_PATH" in line and "_train_" in line


def test_data_path_is_a_file(data, refusal):
    assert "DATA_PATH" in refusal(variables(data() / "x_val_000000.bin"))


def test_one_token_is_enough(data, tmp_path):
    """Short is not wrong: the loader goes round and round."""
    folder = data(train=dict(tokens=[7]), val=dict(tokens=[9]))
    env = variables(folder, ITERATIONS=1, WARMUP_STEPS=0, TRAIN_BATCH_TOKENS=64, RUN_ID=None)
    run = run_here(tmp_path, "one", **env)
    assert len(run.arrays("scores.npz")["token"]) == 1


@pytest.mark.parametrize(
    ("name", "wrong"),
    [("DATA_PATH=", {}), ("magic", dict(magic=1)), ("TRAIN_BATCH_TOKENS=500", {})],
)
def test_a_process_ends_in_one_line_too(name, wrong, data, tmp_path):
    changes = dict([name.split("=")] if "=" in name else [])
    folder = data(val=wrong)
    env = variables(folder, **{key: text or "nowhere" for key, text in changes.items()})
    assert name.split("=")[0] in error_line(run_script(env, cwd=tmp_path))


def test_unwritable_place(dataset, tmp_path, refusal):
    (tmp_path / "runs").write_text("a file where the run folders go")
    assert "runs" in refusal(variables(dataset))
