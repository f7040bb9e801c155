"""What somebody who looks on is told: settings at the start, silence broken, a table at the end."""

import re
import time

import pytest
from helpers import SHRUNK, run_here, tiny, train_gpt

from train_gpt import Config, Heartbeat, Runtime

SHORT = SHRUNK | dict(ITERATIONS="2", WARMUP_STEPS="0", TRAIN_BATCH_TOKENS="256")


@pytest.fixture
def heartbeat(monkeypatch):
    monkeypatch.setattr(Heartbeat, "FIRST", 0.6)
    monkeypatch.setattr(Heartbeat, "MOST", 1.2)
    return Runtime(tiny()).bar.heartbeat


def silent(heartbeat, seconds):
    with heartbeat.beating():
        time.sleep(seconds)


def test_silence_is_broken_less_and_less_often(heartbeat, capsys):
    heartbeat.begin("quantising")
    silent(heartbeat, 4.6)
    said = capsys.readouterr()
    lines = said.err.splitlines()
    assert said.out == "" and 2 <= len(lines) <= 4  # after 0.6, 1.2, 1.2, ... s and a bit
    assert all(re.fullmatch(r"\.\.\. quantising: \d+ s", line) for line in lines)
    time.sleep(1.5)
    assert capsys.readouterr().err == "", "it ends with its block"


def test_how_long_it_takes_is_said_where_that_is_known(heartbeat):
    heartbeat.tick("documents", 100, 900)  # where it was first heard of
    heartbeat.tick("documents", 300, 900)
    assert heartbeat.line(4.0) == "... documents: 33%, about 12 s left"
    heartbeat.tick("documents", 900, 900)
    assert heartbeat.line(16.0) == "... documents: 16 s"
    heartbeat.tick("documents", 10, 50)  # the next part begins
    assert heartbeat.line(1.0) == "... documents: 1 s"


def test_nothing_is_said_where_something_else_is(heartbeat, capsys):
    heartbeat.begin("training")
    with heartbeat.beating():
        for _ in range(8):
            time.sleep(0.3)
            heartbeat.bar.print("step")
    said = capsys.readouterr()
    assert said.err == "" and said.out == "step\n" * 8
    heartbeat.bar.bar = object()  # a bar is shown
    silent(heartbeat, 1.5)
    assert capsys.readouterr().err == ""


def test_other_ranks_say_nothing(monkeypatch, capsys):
    monkeypatch.setattr(Heartbeat, "FIRST", 0.3)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    heartbeat = Runtime(tiny()).bar.heartbeat
    heartbeat.begin("quantising")
    silent(heartbeat, 1.5)
    assert capsys.readouterr().err == ""


@pytest.fixture(scope="module")
def run(dataset, tmp_path_factory):
    """A short run -> its folder, standard output"""
    folder = tmp_path_factory.mktemp("run")
    env = SHORT | dict(DATA_PATH=str(dataset), MUON_WD="0.1", NGRAM_MIN_ORDER="2")
    said = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_gpt.ProgressBar, "print", lambda self, line: said.append(line))
        return run_here(folder, "x", **env), "\n".join(said)


def test_what_differs_from_the_defaults_is_a_line_each(run):
    """The environment's first, with their origin; what is given is told, default or not."""
    found = re.findall(r"^setting:(\w+)=(.*) origin:(.*)$", "\n".join(run[0].lines), re.MULTILINE)
    names = [name for name, _, _ in found]
    given = [origin == "env" for _, _, origin in found]
    assert given == sorted(given, reverse=True) and len(names) == len({*names})
    assert ("MUON_WD", "0.1", "env") in found and ("NGRAM_MIN_ORDER", "2", "env") in found
    (config,) = [row for row in run[0].metrics() if row["key"] == "config"]
    for name in train_gpt.VARIABLES:
        text, _, origin = config[name].rpartition("(")
        told = origin == "env)" or text != train_gpt.show(train_gpt.VARIABLES[name].default)
        assert (name in names) == told, name
        assert not told or (name, text, origin[:-1]) in found
    assert f"config settings:{len(train_gpt.VARIABLES)}" in run[0].lines


def test_the_last_lines_are_a_table(run):
    folder, said = run
    table = said.rpartition("bits per byte")[2]
    for stage in ("int6_roundtrip", "int6_sliding_window", "ngram_backoff"):
        bpb = folder.val_bpb(f"{stage}_exact")
        assert re.search(rf"^{stage} +{bpb:.4f} ", table, re.MULTILINE)
    assert re.search(rf"^val_bpb, .* {folder.val_bpb('ngram_exact'):.4f} ", table, re.MULTILINE)
    sizes = folder.final("artifact_bytes")
    assert f"{int(sizes['total']):,} of 16,000,000" in table
    assert re.search(r"data \d+, train \d+ of 600, eval \d+ of 600, in all \d+", table)
    assert "proof     none" in table and "runs/x" in table


def test_the_model_writes_a_few_lines(run, dataset, tmp_path):
    lines = [line for line in run[0].lines if line.startswith("sample:")]
    assert 1 <= len(lines) <= 8 and all(len(line) <= 97 for line in lines)
    env = SHORT | dict(DATA_PATH=str(dataset), SAMPLE_TOKENS="0")
    assert not any(line.startswith("sample:") for line in run_here(tmp_path, "y", **env).lines)


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("LEARNING_RATE", "MATRIX_LR"),
        ("BATCH_SIZE", "TRAIN_BATCH_TOKENS"),
        ("N_LAYER", "NUM_LAYERS"),
    ],
)
def test_names_of_other_scripts_are_told_ours(name, ours):
    cfg = Config.from_env(dict(RECORD="tiny", DEVICE="cpu") | {name: "8"})
    assert any(note.startswith(name) and ours in note for note in cfg.notes)
    with pytest.raises(train_gpt.ConfigError, match=ours):
        train_gpt.refuse_arguments([f"--{name.lower()}", "8"])


def test_foreign_names_are_none_of_ours():
    for name, text in train_gpt.FOREIGN.items():
        assert name not in train_gpt.VARIABLES and name not in train_gpt.ALIASES
        ours = re.findall(r"[A-Z]+(?:_[A-Z]+)+|ITERATIONS", text)
        assert ours and {*ours} <= train_gpt.VARIABLES.keys()


@pytest.mark.parametrize("name", ["MAX_WALLCLOCK", "TRAIN_BATCH", "GRAD_CLIP"])
def test_an_incomplete_name_is_refused(name):
    with pytest.raises(train_gpt.ConfigError, match=f"did you mean {name}_"):
        Config.from_env({"RECORD": "tiny", "DEVICE": "cpu", name: "8"})


def test_a_validation_may_be_of_the_first_targets(dataset, tmp_path):
    env = SHORT | dict(DATA_PATH=str(dataset), VAL_LOSS_EVERY="1", ITERATIONS="1")
    run = run_here(tmp_path, "x", **env | dict(VAL_LOSS_TOKENS="100"))
    (row,) = [row for row in run.metrics() if row["key"] == "step" and "val_loss" in row]
    other = run_here(tmp_path, "y", **env)
    (whole,) = [row for row in other.metrics() if row["key"] == "step" and "val_loss" in row]
    assert row["val_tokens"] == 100 and "val_tokens" not in whole
    assert row["val_loss"] != whole["val_loss"] and run.artifact == other.artifact
    bytes_of = run.arrays("scores.npz")["bytes"]
    ratio = row["val_bpb"] / row["val_loss"] * bytes_of[:100].sum() / 100
    assert ratio == pytest.approx(1 / 0.6931471805599453, rel=1e-9)
