"""INIT_FROM: training that begins with the weights of an artifact, a run or a checkpoint."""

import json
import shutil

import pytest
import torch
from helpers import SHRUNK, pack_artifact, perturbed, run_here, tiny, train_gpt

from train_gpt import Beginning, Config, ConfigError

SHORT = SHRUNK | dict(
    ITERATIONS="6", WARMUP_STEPS="0", TRAIN_BATCH_TOKENS="256", TRAIN_LOG_EVERY="1"
)
SHORT |= dict(VAL_LOSS_EVERY="0", CODEC_TOKENS="0", SAMPLE_TOKENS="0", EVAL_SLIDING="0")


@pytest.fixture(scope="module")
def first(dataset, tmp_path_factory):
    """A run with a checkpoint after its last step."""
    folder = tmp_path_factory.mktemp("first")
    env = SHORT | dict(DATA_PATH=str(dataset), CHECKPOINT_EVERY="6")
    return run_here(folder, "first", **env)


def losses(run):
    return [row["train_loss"] for row in run.metrics() if "train_loss" in row]


@pytest.mark.parametrize("kind", ["artifact", "folder", "checkpoint"])
def test_it_goes_on_better_than_from_nothing(kind, first, dataset, tmp_path):
    path = {
        "artifact": first.folder / "artifact.bin",
        "folder": first.folder,
        "checkpoint": first.folder / "checkpoint/step_00000006.safetensors",
    }[kind]
    run = run_here(tmp_path, "next", **SHORT, DATA_PATH=str(dataset), INIT_FROM=str(path))
    assert losses(run)[0] < losses(first)[0] - 0.3
    assert run.val_bpb("ngram_exact") < first.val_bpb("ngram_exact")
    file = path / "artifact.bin" if kind == "folder" else path
    digest = train_gpt.sha256(file.read_bytes())
    assert json.loads((run.folder / "submission.json").read_text())["init_sha256"] == digest
    assert "init_sha256" not in json.loads((first.folder / "submission.json").read_text())


def test_its_own_folder_is_refused(dataset, tmp_path):
    """A run that is killed could not be gone on with, and the weights would be nowhere."""
    env = SHORT | dict(DATA_PATH=str(dataset), OVERWRITE="1", CHECKPOINT_EVERY="3")
    once = run_here(tmp_path, "again", **env)
    for path in ("artifact.bin", "checkpoint/step_00000006.json"):
        with pytest.raises(ConfigError, match="lies in runs/again, which the run clears; fix: "):
            run_here(tmp_path, "again", **env, INIT_FROM=str(once.folder / path))
    assert once.val_bpb("ngram_exact") > 0 and (once.folder / "artifact.bin").exists()


def test_other_shapes_are_refused_by_name(first, dataset, tmp_path):
    """Before anything of an earlier run is touched."""
    env = SHORT | dict(DATA_PATH=str(dataset), OVERWRITE="1")
    kept = run_here(tmp_path, "kept", **env)
    before = kept.artifact
    with pytest.raises(ConfigError, match=r"NUM_LAYERS=4 there, 3 here.*fix: set these"):
        run_here(tmp_path, "kept", **env | dict(NUM_LAYERS="3"), INIT_FROM=str(first.folder))
    assert kept.artifact == before


def test_another_tokenizer_of_the_same_size_is_refused(first, dataset, tmp_path):
    """The ids would mean other words: worse than nothing to begin with."""
    data = tmp_path / "set"
    shutil.copytree(dataset, data)
    model = (data / "tokenizer.model").read_bytes()
    for path in data.glob("dataset.json"):
        path.unlink()
    (data / "tokenizer.model").write_bytes(model + b"\x1a\x00")  # loads, and is another file
    env = SHORT | dict(DATA_PATH=str(data))
    with pytest.raises(ConfigError, match="its tokenizer is not .*fix: prepare"):
        run_here(tmp_path, "other", **env, INIT_FROM=str(first.folder))
    alone = shutil.copy(first.folder / "artifact.bin", tmp_path / "alone.bin")
    run_here(tmp_path, "alone", **env, INIT_FROM=str(alone))  # nobody knows its tokenizer


def test_another_setting_of_the_same_shape_is_a_note(first, dataset, tmp_path):
    env = SHORT | dict(DATA_PATH=str(dataset), LOGIT_SOFTCAP="20.0", ITERATIONS="1")
    run = run_here(tmp_path, "other", **env, INIT_FROM=str(first.folder))
    assert any("LOGIT_SOFTCAP=30.0 there, 20.0 here" in line for line in run.lines)


@pytest.mark.parametrize("kind", ["missing", "damaged", "no_artifact", "json", "empty"])
def test_what_is_no_beginning_is_one_error(kind, first, tmp_path):
    path = tmp_path / dict(json="step_1.json").get(kind, "x.bin")
    if kind == "damaged":
        path.write_bytes((first.folder / "artifact.bin").read_bytes()[:-1])
    elif kind == "no_artifact":
        path.mkdir()
    elif kind == "json":
        path.write_text("{}")
    elif kind == "empty":
        path.touch()
    with pytest.raises(ConfigError, match="INIT_FROM=.*fix: "):
        Beginning.read(tiny(init_from=str(path)))


def test_weights_are_those_of_the_file(tmp_path):
    cfg = tiny(init_from=str(tmp_path / "a.bin"))
    weights = {name: w.detach() for name, w in perturbed(cfg).named_parameters()}
    (tmp_path / "a.bin").write_bytes(pack_artifact(weights, cfg))
    found = Beginning.read(cfg)
    stored = dict(train_gpt.load_artifact(tmp_path / "a.bin").named_parameters())
    assert found.weights.keys() == stored.keys() and found.differences(cfg) == ""
    assert all(torch.equal(found.weights[name], stored[name]) for name in stored)
    found.check(cfg, tmp_path / "runs/x")


def test_a_checkpoint_binds_its_beginning(first, dataset, tmp_path):
    """RESUME takes the checkpoint's weights, wherever the first ones are by now; a run of another
    beginning is refused."""
    source = shutil.copytree(first.folder, tmp_path / "source")
    env = SHORT | dict(DATA_PATH=str(dataset), CHECKPOINT_EVERY="3", INIT_FROM=str(source))
    whole = run_here(tmp_path, "bound", **env)
    (whole.folder / "submission.json").unlink()
    shutil.rmtree(source)
    other = env | dict(RESUME="auto", INIT_FROM="")
    with pytest.raises(train_gpt.UserError, match="made with INIT_FROM="):
        run_here(tmp_path, "bound", **other)
    again = run_here(tmp_path, "bound", **env | dict(RESUME="auto"))
    assert "resumed step:6" in again.lines and again.artifact == whole.artifact
    entries = json.loads((again.folder / "submission.json").read_text())
    assert entries["init_sha256"] == train_gpt.sha256(first.artifact)


def test_dry_run_looks_at_it(first, capsys):
    env = SHORT | dict(DRY_RUN="1", INIT_FROM=str(first.folder))
    train_gpt.run(Config.from_env(env))
    assert "model_params" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="NUM_LAYERS=4 there, 3 here"):
        train_gpt.run(Config.from_env(env | dict(NUM_LAYERS="3")))


def test_a_fresh_checkpoint_has_no_beginning(first, dataset, tmp_path):
    env = SHORT | dict(DATA_PATH=str(dataset), CHECKPOINT_EVERY="3")
    whole = run_here(tmp_path, "fresh", **env)
    (whole.folder / "submission.json").unlink()
    other = env | dict(RESUME="auto", INIT_FROM=str(first.folder))
    with pytest.raises(train_gpt.UserError, match="made with INIT_FROM="):
        run_here(tmp_path, "fresh", **other)


def test_not_with_an_artifact_to_score():
    with pytest.raises(ConfigError, match="INIT_FROM=x: must be left out with EVAL_ONLY"):
        Config.from_env(dict(RECORD="tiny", INIT_FROM="x", EVAL_ONLY="y", DEVICE="cpu"))
