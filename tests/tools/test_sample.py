"""records/tools/sample.py: what a user types, and random bits as draws from the mixture."""

import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import ROOT, SOURCE_CODE, clean_environment, pack_artifact, perturbed, tiny, train_gpt

import prepare_text
import sample


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of a run, as far as it is read."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "tokenizer.model").write_bytes(prepare_text.train_tokenizer([SOURCE_CODE], 300))
    cfg = tiny(vocab_size=300, num_layers=2)
    (folder / "artifact.bin").write_bytes(
        pack_artifact(dict(perturbed(cfg, spread=0.1).named_parameters()), cfg)
    )
    (folder / "config.env").write_text("NGRAM_MIN_ORDER=2\nEVAL_SEQ_LEN=8\nSEED=1\n")
    return folder


def said(capsys, *arguments):
    """status, standard output, standard error of the program in this process"""
    status = sample.main([*map(str, arguments)])
    return status, *capsys.readouterr()


def test_the_same_command_writes_the_same_text(folder, capsys):
    command = folder, "--prompt", "def main", "--tokens", 20, "--seed", 3
    status, text, facts = said(capsys, *command)
    assert status == 0 and text.startswith("def main") and "tokens/s" in facts
    assert said(capsys, *command)[1] == text
    assert said(capsys, folder / "artifact.bin", *command[1:])[1] == text
    assert said(capsys, *command[:-1], 4)[1] != text


def test_several_texts_stand_apart(folder, capsys):
    _, text, facts = said(capsys, folder, "--count", 3, "--tokens", 5, "--top-k", 0)
    assert text.count("-" * 40) == 2 and "bits a token" in facts


def test_a_document_that_ends_early_is_told(folder, capsys, monkeypatch):
    ended = train_gpt.Continuation(np.array([5], np.uint16), np.array([-1.0]))
    monkeypatch.setattr(train_gpt, "generate", lambda *_, **__: [ended])
    status, _, facts = said(capsys, folder, "--tokens", 9)
    assert status == 0 and "1 of 1 ended before" in facts and facts.startswith("1 tokens written")


def test_what_a_terminal_would_obey_is_escaped(folder, capsys, monkeypatch):
    monkeypatch.setattr(sample.Writer, "text", lambda *_: "a\x1b[2K\nb\u202e")
    assert said(capsys, folder, "--tokens", 1)[1] == "a\\x1b[2K\nb\\u202e\n"


@pytest.mark.parametrize("prompt", ["", "if x"])
def test_random_bits_are_draws_from_the_mixture(prompt, folder):
    """The first token of 3,000 texts, beside what the mixture says of it; the prompt takes no
    bits."""
    pytest.importorskip("constriction")
    writer = sample.Writer(folder, None, "cpu")
    assert writer.config().window == 8
    ids = writer.encode(prompt)
    found = [writer.from_bits(ids, 1, seed) for seed in range(3000)]
    tokens = [each.tokens[0] if len(each.tokens) else train_gpt.BOS for each in found]
    p = mixture_after(writer, ids)
    counts = np.bincount(tokens, minlength=len(p))
    assert (np.abs(counts - 3000 * p) <= 5 * np.sqrt(3000 * p) + 3).all()
    assert abs(counts - 3000 * p).sum() / 3000 < 3 * np.sqrt(2 * len(p) / np.pi / 3000)


def mixture_after(writer, ids):
    """The coder's distribution of the token after these"""
    cfg = writer.config()
    rows = []

    def pick(integers, step):
        rows.append((integers[0] + 1) / (1 << train_gpt.PRECISION))
        return np.array([[*ids, 5][step.places[0]]])

    plan = train_gpt.CodingPlan(1, len(ids) + 1, 1, 1, len(ids) + 1, cfg.window)
    train_gpt.run_codec(writer.model, writer.rt, cfg, plan, pick)
    return rows[-1]


def test_bits_that_stand_for_no_token_are_drawn_again(folder, monkeypatch):
    """A range coder's ranges have a gap at their end."""
    queue, family = train_gpt.range_coder()

    class Gap:
        made = 0

        def __init__(self, words):
            self.coder = queue.RangeDecoder(words)
            Gap.made += 1
            self.left = 3

        def decode(self, *given):
            self.left -= 1
            if not self.left:
                raise AssertionError("invalid for the employed entropy model")
            return self.coder.decode(*given)

    coder = SimpleNamespace(RangeDecoder=Gap)
    monkeypatch.setattr(train_gpt, "range_coder", lambda: (coder, family))
    writer = sample.Writer(folder, None, "cpu")
    found = [len(writer.from_bits([5], 9, seed).tokens) for seed in range(9)]
    assert max(found) == 9 and Gap.made > 18


def test_from_the_command_line(folder, tmp_path):
    program = ROOT / "records/tools/sample.py"
    command = [sys.executable, program, folder, "--from-bits", "--tokens", "30"]
    how = dict(cwd=tmp_path, capture_output=True, text=True, env=clean_environment())
    done = subprocess.run([*map(str, command)], **how)
    assert done.returncode == 0 and done.stdout.strip()
    assert "decoded from random bits" in done.stderr and not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    "damage", ["nowhere", "no_artifact", "no_tokenizer", "pipe", "other", "cut"]
)
def test_one_line_for_what_is_wrong(damage, folder, tmp_path, capsys):
    if damage != "nowhere":
        tmp_path.joinpath("run").mkdir()
        for name in ("artifact.bin", "tokenizer.model", "config.env"):
            (tmp_path / "run" / name).write_bytes((folder / name).read_bytes())
    run = tmp_path / "run"
    if damage == "no_artifact":
        (run / "artifact.bin").unlink()
    elif damage == "no_tokenizer":
        (run / "tokenizer.model").unlink()
    elif damage == "pipe":
        (run / "tokenizer.model").unlink()
        os.mkfifo(run / "tokenizer.model")
    elif damage == "other":
        (run / "tokenizer.model").write_bytes(prepare_text.train_tokenizer([SOURCE_CODE], 290))
    elif damage == "cut":
        (run / "artifact.bin").write_bytes((folder / "artifact.bin").read_bytes()[:-1])
    status, text, reason = said(capsys, run)
    assert (status, text) == (2, "") and reason.startswith("error: ") and reason.count("\n") == 1
    assert str(run) in reason or "pieces" in reason


@pytest.mark.parametrize(
    "wrong",
    [
        ["--prompt", "\udcff"],
        ["--tokens", "0"],
        ["--top-k", "-1"],
        ["--temperature", "nan"],
        ["--seed", "-1"],
        [],
    ],
)
def test_wrong_arguments_are_usage(wrong, folder, capsys):
    arguments = [str(folder), *wrong] if wrong else []
    with pytest.raises(SystemExit) as leaving:
        sample.main(arguments)
    assert leaving.value.code == 2 and "usage: " in capsys.readouterr().err
