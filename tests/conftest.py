"""Fixtures: one tiny dataset a session, one thread a process."""

import os

import helpers
import numpy as np
import pytest
import torch
from helpers import clean_environment, tiny, train_gpt

import prepare
import prepare_text

for name in os.environ.keys() - clean_environment().keys():
    del os.environ[name]
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def one_thread():
    """Worker processes share the cores; some tests start a Runtime, which sets the number."""
    torch.set_num_threads(1)


@pytest.fixture
def rt():
    """This process alone, on the CPU."""
    return train_gpt.Runtime(tiny())


@pytest.fixture
def no_picture(monkeypatch):
    """Runs in this process end without submission.json and report.png, which take seconds."""
    monkeypatch.setattr(train_gpt, "close_run", lambda rt: None)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    """Folder of a small dataset of real prose: 40 documents, 12 short ones for validation, 512
    pieces."""
    train, val = prepare.sample_documents()
    folder = tmp_path_factory.mktemp("data") / "prose"
    short = [" ".join(part) for text in val[:2] for part in np.array_split(text.split(" "), 6)]
    prepare_text.write_dataset(train[:40], short, folder, "prose", 512)
    return folder


@pytest.fixture(scope="session")
def train_tokens(dataset):
    (path,) = dataset.glob("*_train_*.bin")
    return train_gpt.read_shard(path, 512)


@pytest.fixture(scope="session")
def vocab_1024(tmp_path_factory):
    """Path of a tokenizer with exactly 1,024 pieces."""
    train, _ = prepare.sample_documents()
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(prepare_text.train_tokenizer(train[:200], 1024))
    return path


__all__ = ["helpers"]
