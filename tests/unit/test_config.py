"""Configuration: environment > RECORD > defaults, checked, named, and nothing else read."""

import contextlib
import dataclasses
import io
import re
import subprocess
import sys
from typing import get_args

import pytest
from helpers import (
    ALIASES,
    ROOT,
    SCRIPT,
    TINY,
    error_line,
    run_script,
    tiny,
    train_gpt,
)
from hypothesis import given
from hypothesis import strategies as st

Config, ConfigError = train_gpt.Config, train_gpt.ConfigError
PLAIN = dict(DEVICE="cpu", RECORD="tiny")  # of what machine this is, independent
# The variables that spec and design promise from the first issue on.
CONTRACT = """RUN_ID SEED DEVICE ATTN_IMPL DRY_RUN EVAL_ONLY OVERWRITE RESUME CHECKPOINT_EVERY
 RECORD DATA_PATH TOKENIZER_PATH VOCAB_SIZE TRAIN_BATCH_TOKENS TRAIN_SEQ_LEN EVAL_SEQ_LEN
 EVAL_STRIDE NUM_LAYERS MODEL_DIM NUM_HEADS NUM_KV_HEADS MLP_MULT TIED_EMBED_INIT_STD
 LOGIT_SOFTCAP QK_GAIN_INIT ROPE_BASE ROPE_DIMS LN_SCALE XSA_LAST_N VALUE_RESIDUAL GATED_ATTENTION
 BOS_RESET BIGRAM_VOCAB_SIZE BIGRAM_DIM VE_ENABLED VE_DIM VE_LAYERS ITERATIONS
 MAX_WALLCLOCK_SECONDS WARMUP_STEPS WARMDOWN_ITERS MATRIX_LR SCALAR_LR TIED_EMBED_LR MUON_MOMENTUM
 MUON_MOMENTUM_WARMUP_START MUON_MOMENTUM_WARMUP_STEPS MUON_BACKEND_STEPS MUON_WD ADAM_WD BETA1
 BETA2 ADAM_EPS GRAD_CLIP_NORM CLIP VAL_LOSS_EVERY TRAIN_LOG_EVERY EMA_ENABLED EMA_DECAY
 SWA_ENABLED SWA_EVERY LATE_QAT LATE_QAT_THRESHOLD SCORER SAVE_SCORES TTT_ENABLED CODEC_TOKENS
 NGRAM_ENABLED NGRAM_MIN_ORDER NGRAM_MAX_ORDER NGRAM_BUCKETS NGRAM_MIN_COUNT NGRAM_CHUNK_TOKENS
 NGRAM_SCHEME DEPTH_RECURRENCE PRE_ENRICH_DIM BIGRAM_KIND SMEAR_INIT OVERTONE_INIT ORTHO_INIT
 POLYGLU_ENABLED LEAKY_SLOPE QAT_ENABLED COMPRESSOR TARGET_MB TTT_USE_LORA TTT_LORA_RANK
 TTT_LORA_LR TTT_LR TTT_EPOCHS TTT_CHUNK_TOKENS TTT_MOMENTUM TTT_BATCH_SEQS TTT_GRAD_CLIP
 NGRAM_ALPHA NGRAM_NLL_THRESHOLD NGRAM_ALPHA_MIN NGRAM_ALPHA_MAX NGRAM_ENTROPY_CENTER
 NGRAM_ENTROPY_SCALE""".split()
# What the five scripts call the same thing (spec/systems.md 1.0b).
SIBLINGS = """USE_EMA USE_LATE_QAT USE_VALUE_RESIDUAL USE_GATED_ATTENTION GATED_ATTN USE_TTT
 NGRAM_EVAL NGRAM_CACHE NGRAM_ORDER NGRAM_EVAL_ORDER NGRAM_EVAL_MIN_ORDER NGRAM_EVAL_BUCKETS
 NGRAM_EVAL_MIN_COUNT""".split()
# What a shell, a container, a CI runner and torchrun leave in an environment.
FOREIGN = dict(
    PATH="/usr/bin:/bin",
    HOME="/root",
    LANG="C.UTF-8",
    TERM="xterm-256color",
    SHLVL="2",
    PWD="/work",
    OLDPWD="/",
    USER="root",
    HOSTNAME="9f86d081884c",
    RANK="0",
    LOCAL_RANK="0",
    WORLD_SIZE="1",
    LOCAL_WORLD_SIZE="1",
    GROUP_RANK="0",
    ROLE_RANK="0",
    ROLE_NAME="default",
    MASTER_ADDR="127.0.0.1",
    MASTER_PORT="29500",
    TORCHELASTIC_RUN_ID="none",
    TORCHELASTIC_MAX_RESTARTS="0",
    OMP_NUM_THREADS="1",
    MKL_NUM_THREADS="1",
    CUDA_VISIBLE_DEVICES="0,1",
    NVIDIA_VISIBLE_DEVICES="all",
    NCCL_DEBUG="WARN",
    PYTHONPATH="/x",
    PYTHONUNBUFFERED="1",
    PYTEST_CURRENT_TEST="a test",
    PYTEST_XDIST_WORKER="gw0",
    VIRTUAL_ENV="/venv",
    CONDA_DEFAULT_ENV="base",
    SLURM_JOB_ID="17",
    SLURM_NTASKS="8",
    CI="true",
    GITHUB_ACTIONS="true",
    GITHUB_SHA="deadbeef",
    HF_TOKEN="hf_x",
    WANDB_MODE="offline",
    SSH_TTY="/dev/pts/0",
    LS_COLORS="rs=0",
    XDG_SESSION_ID="3",
    DISPLAY=":0",
    EDITOR="vi",
    HTTP_PROXY="http://proxy",
    TMPDIR="/tmp",
    DEBUG="1",
    VERSION="3",
    MODEL="x",
    LAYERS="9",
    EPOCHS="3",
    BATCH_SIZE="8",
    NAME="box",
    _="/usr/bin/env",
)


def resolve(**variables):
    return Config.from_env(PLAIN | variables)


def refused(**variables):
    """The message with which these variables are refused: one line."""
    with pytest.raises(ConfigError) as caught:
        resolve(**variables)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400
    return message


def test_values_have_their_types():
    cfg = resolve(SEED="7", MATRIX_LR="1e-3", LN_SCALE="0", VE_LAYERS="1,3", CLIP="local")
    assert (cfg.seed, cfg.matrix_lr, cfg.ln_scale, cfg.ve_layers) == (7, 0.001, False, (1, 3))
    assert cfg.clip == "local" and cfg.clip_quantiles[-1] == 1.0
    for name, spec in train_gpt.VARIABLES.items():
        assert type(getattr(cfg, name.lower())) is type(spec.default), name


def test_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        resolve().seed = 3


@pytest.fixture
def add_record(tmp_path, monkeypatch):
    """-> function that writes a config.env into a records/ of its own."""
    records = tmp_path / "records"
    records.mkdir()
    monkeypatch.setattr(train_gpt, "ROOT", tmp_path)

    def add(folder, text):
        (records / folder).mkdir(parents=True)
        (records / folder / "config.env").write_text(text)

    return add


def test_precedence_and_origins(add_record):
    add_record("track/mine_long", "# a comment\n\nITERATIONS=11\nSEED=5\n")
    cfg = Config.from_env(dict(DEVICE="cpu", RECORD="mine", SEED="6"))
    assert (cfg.seed, cfg.iterations, cfg.num_layers) == (6, 11, Config.num_layers)
    assert cfg.origin["SEED"] == "env" and "mine" in cfg.origin["ITERATIONS"]
    assert "NUM_LAYERS" not in cfg.origin  # default


def test_the_beginning_of_a_record_is_that_record(add_record):
    """In everything that follows from its name, too."""
    add_record("track/tiny", "ITERATIONS=11\n")
    cfg = Config.from_env(dict(DEVICE="cpu", RECORD="ti"))
    assert (cfg.record, cfg.run_id, cfg.iterations) == ("tiny", "tiny_seed1337", 11)


def test_help_names_a_record_without_a_comment(add_record, capsys):
    add_record("track/mine", "SEED=5\n")
    add_record("track/damaged", "")
    (train_gpt.ROOT / "records/track/damaged/config.env").write_bytes(b"# \xff. \n")
    train_gpt.print_help()
    folder = train_gpt.ROOT / "records/track/mine"
    assert f"mine{folder}" in "".join(capsys.readouterr().out.split())  # a long path is wrapped


@pytest.mark.parametrize(
    "line", ["DATA_PATH=/x", "TOKENIZER_PATH=x", "RUN_ID=x", "NO_SUCH=1", "words", "RECORD=x"]
)
def test_record_file_sets_settings_only(line, add_record):
    add_record("mine", f"SEED=5\n{line}\n")
    assert line in refused(RECORD="mine")


@pytest.mark.parametrize("name", ["..", "a/b", "/tmp/x"])
def test_run_id_does_not_leave_the_runs(name):
    assert "RUN_ID" in refused(**PLAIN, RUN_ID=name)


def test_half_a_download_is_no_data(tmp_path, monkeypatch):
    monkeypatch.setitem(vars(train_gpt), "FINEWEB_DATA", tmp_path)
    assert not train_gpt.has_fineweb()
    (tmp_path / "fineweb_val_000000.bin").touch()
    assert train_gpt.has_fineweb()
    (tmp_path / ".fineweb_train_000000.bin.0123456789ab.partial").touch()
    assert not train_gpt.has_fineweb()


def test_a_seed_of_a_submission_is_no_record(add_record):
    add_record("track/2026-01-01_Mine/seed_7", "SEED=7\n")
    assert "0 fit" in refused(RECORD="seed_7")


def test_unknown_record_lists_the_known():
    message = refused(RECORD="pr99999")
    assert "RECORD='pr99999'" in message and "tiny" in message


def test_every_record_file_resolves():
    files = sorted((ROOT / "records").glob("**/config.env"))
    files = [path for path in files if not path.parent.name.startswith("seed_")]
    assert len(files) >= 7
    for path in files:
        cfg = Config.from_env(dict(DEVICE="cpu", RECORD=path.parent.name))
        assert cfg.record == path.parent.name


def test_without_record_the_note_says_why():
    cfg = Config.from_env(dict(DEVICE="cpu"))
    assert cfg.record == "tiny" and any("tiny" in note for note in cfg.notes)
    assert cfg.run_id == "tiny_seed1337"


@pytest.mark.parametrize("name", CONTRACT)
def test_contract_variables_are_known(name):
    assert name in train_gpt.VARIABLES


@pytest.mark.parametrize("alias", [*SIBLINGS, *ALIASES])
def test_sibling_names_are_read_with_a_note(alias):
    name = ALIASES[alias]
    default = train_gpt.VARIABLES[name].default
    text = "0" if default is True else "1" if default is False else "5"
    text = "0.5" if isinstance(default, float) else text
    given = dict(SCORER="sliding") | {alias: text}  # which TTT asks for
    cfg = resolve(**given)
    wanted = (float(text),) if isinstance(default, tuple) else type(default)(float(text))
    assert getattr(cfg, name.lower()) == wanted
    assert any(alias in note and name in note for note in cfg.notes)
    assert cfg.origin[name] == "env"
    same = f"{text}0" if "." in text else text
    resolve(**given | {name: same})  # saying the same twice is no conflict
    other = {"0": "1", "1": "0", "5": "6", "0.5": "0.25"}[text]
    message = refused(**{alias: text, name: other})
    assert alias in message and name in message


TRANSLATED = [  # what is pasted -> what it means
    (dict(LEAKY_RELU="0"), dict(leaky_slope=0.0)),
    (dict(LEAKY_RELU="1"), dict(leaky_slope=0.5)),
    (dict(NGRAM_ENT_BASE="0.1"), dict(ngram_alpha_min=0.1)),
    (dict(NGRAM_ENT_RANGE="0.55"), dict(ngram_alpha_max=0.6)),
    (dict(NGRAM_ENT_RANGE="0.4"), dict(ngram_alpha_max=0.45)),
    (
        dict(NGRAM_ENT_RANGE="0.4", NGRAM_ENT_BASE="0.1"),
        dict(ngram_alpha_min=0.1, ngram_alpha_max=0.5),
    ),
    (
        dict(NGRAM_ENT_THRESH="4", NGRAM_ENT_SCALE="3"),
        dict(ngram_entropy_center=(4.0,), ngram_entropy_scale=3.0),
    ),
]
ANYWAY = dict(  # name -> what this script does anyway, something that it cannot do
    USE_BIGRAMHASH=("1", "0"),
    TIE_EMBEDDINGS=("1", "0"),
    NGRAM_ENTROPY=("1", "0"),
    NGRAM_EVAL_ADAPTIVE_ALPHA=("1", "0"),
    NGRAM_EVAL_ADAPTIVE_MODE=("sigmoid_raw_entropy", "linear"),
    NGRAM_TWO_PASS=("0", "1"),
    TTT_FREEZE_BLOCKS=("0", "2"),
    LAWA_ENABLED=("0", "1"),
    MTP_NUM_HEADS=("0", "1"),
    DTG_ENABLED=("0", "1"),
    GATED_MLP=("0", "1"),
    TRIGRAM=("0", "1"),
)


@pytest.mark.parametrize(("given", "meant"), TRANSLATED)
def test_values_of_sibling_names_are_translated(given, meant):
    cfg = resolve(**given)
    assert cfg == dataclasses.replace(resolve(), **meant)
    assert all(cfg.origin[field.upper()] == "env" for field in meant)
    for alias in given:
        assert any(note.startswith(f"{alias} is read as ") for note in cfg.notes)


@pytest.mark.parametrize("alias", ANYWAY)
def test_what_is_done_anyway_is_accepted_and_the_contrary_refused(alias):
    done, contrary = ANYWAY[alias]
    cfg = resolve(**{alias: done})
    assert cfg == resolve() and any(f"{alias}={done}" in note for note in cfg.notes)
    message = refused(**{alias: contrary})
    assert f"{alias}={contrary!r}" in message and done in message and "fix" in message


def test_every_sibling_name_is_tested():
    translated = {alias for given, _ in TRANSLATED for alias in given}
    assert {*train_gpt.ALIASES} == {*ALIASES, *translated}
    assert {name: done for name, (done, _) in ANYWAY.items()} == train_gpt.ANYWAY


@pytest.mark.parametrize(
    "given",
    [
        dict(LEAKY_RELU="2"),
        dict(LEAKY_RELU="1", LEAKY_SLOPE="0.25"),
        dict(NGRAM_ENT_RANGE="wide"),
        dict(NGRAM_ENT_RANGE="0.4", NGRAM_ENT_BASE="low"),
        dict(NGRAM_ENT_RANGE="0.4", NGRAM_ALPHA_MAX="0.5"),
        dict(TIE_EMBEDDINGS=""),
        dict(NGRAM_ENT_RANGE="1.4"),
    ],
)
def test_translations_that_cannot_be_are_named(given):
    message = refused(**given)
    assert any(name in message for name in [*given, "NGRAM_ALPHA_MAX"])


# -----------------------------------------------------------------------------
# A config.env beside the script


def test_a_config_beside_the_script_is_its_default(add_record, tmp_path):
    """A submission's folder runs itself; RECORD and the environment go before."""
    add_record("track/mine", "ITERATIONS=11\n")
    add_record("track/tiny", "ITERATIONS=12\n")
    (tmp_path / "config.env").write_text("# mine\nITERATIONS=13\nSEED=5\n")
    cfg = Config.from_env(dict(DEVICE="cpu", SEED="6"))
    assert (cfg.iterations, cfg.seed, cfg.record) == (13, 6, tmp_path.name)
    assert cfg.origin["ITERATIONS"] == f"RECORD={tmp_path.name}" and cfg.origin["SEED"] == "env"
    assert any("config.env beside the script" in note for note in cfg.notes)
    assert Config.from_env(dict(DEVICE="cpu", RECORD="mine")).iterations == 11


def test_a_script_in_a_folder_whose_name_is_no_text(tmp_path, monkeypatch):
    """The name becomes RECORD's and the run's, which stand in the log."""
    folder = tmp_path / "x\udcff"
    folder.mkdir()
    (folder / "config.env").write_text("SEED=5\n")
    monkeypatch.setattr(train_gpt, "ROOT", folder)
    cfg = Config.from_env(dict(DEVICE="cpu"))
    assert (cfg.record, cfg.run_id, cfg.seed) == ("x?", "x?_seed5", 5)


def test_a_wrong_config_beside_the_script_is_named(add_record, tmp_path):
    (tmp_path / "config.env").write_text("DATA_PATH=/x\n")
    with pytest.raises(ConfigError, match=r"config\.env: DATA_PATH=/x is not a setting; fix: "):
        Config.from_env(dict(DEVICE="cpu"))


# -----------------------------------------------------------------------------
# Misspelt names and impossible values


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("ITERATION", "ITERATIONS"),
        ("ITERATOINS", "ITERATIONS"),
        ("MODEL_DIMS", "MODEL_DIM"),
        ("COMPRESSER", "COMPRESSOR"),
        ("OVERWRIT", "OVERWRITE"),
        ("MATRIXLR", "MATRIX_LR"),
        ("NUM_LAYER", "NUM_LAYERS"),
        ("num_layers".upper() + "X", "NUM_LAYERS"),
        ("MUON_MOMENTM", "MUON_MOMENTUM"),
        ("BIGRAM_VOCAB", "BIGRAM_VOCAB_SIZE"),
        ("NGRAM_MAX", "NGRAM_MAX_ORDER"),
        ("VE_DIMS", "VE_DIM"),
        ("TTT_LRR", "TTT_LR"),
        ("DATA_PATHS", "DATA_PATH"),
        ("EMBED_CODIN", "EMBED_CODING"),
    ],
)
def test_misspelt_names_stop_with_a_suggestion(name, near):
    """Where the value could be meant for that; else it is a note, which does not show it."""
    message = refused(**{name: train_gpt.show(train_gpt.VARIABLES[near].default)})
    suggestion = message.split("did you mean")[1]
    assert name in message and near in suggestion
    if isinstance(train_gpt.VARIABLES[near].default, str) and not train_gpt.choices_of(near):
        return
    cfg = resolve(**{name: "hunter-2"})
    (note,) = [note for note in cfg.notes if note.startswith(f"{name} is no variable")]
    assert cfg == resolve() and f"did you mean {near}" in note and "hunter" not in note


@pytest.mark.parametrize(
    ("name", "text", "noted"),
    [
        ("MODEL_ID", "gpt2", True),
        ("MODEL_DIR", "models", True),
        ("COMPRESS", "1", True),
        ("TARGET_OS", "linux", True),
        ("TARGET_ID", "..", True),
        ("VOCAB_FILE", "v", True),
        ("QUANTIZER", "1", True),
        ("NUM_LAYER", "1", True),  # NUM_LAYERS is at least 2
        ("NUM_THREADS", "8", False),
        ("OVERRIDE", "1", False),
    ],
)
def test_what_cannot_be_meant_stops_no_run(name, text, noted):
    cfg = resolve(**{name: text})
    assert cfg == resolve() and len([note for note in cfg.notes if name in note]) == noted


# What containers and other programs leave there, near as some of it is: name -> is it noted?
OTHERS = dict(
    SERVICE=False,
    CODE=False,
    CLI=False,
    CI=False,
    SEEED=False,
    DEVICES=False,
    SLURM_DEVICE=False,
    RUN_UUID=False,
    MODEL_DIR=True,
    DECODER=False,
    CLIP_PORT=True,
    NGRAM_SERVER_URL=True,
    XSA_TOKEN=True,
    TTT_WHATEVER=True,
    MUON_LEARNING_RATE=True,
    EMA_HOST=True,
)


@pytest.mark.parametrize("name", OTHERS)
def test_names_of_others_stop_no_run(name):
    """A family's name is noted, without its value: it may be a password."""
    cfg = resolve(**{name: "/models/x"})
    assert cfg == resolve()
    notes = [note for note in cfg.notes if name in note]
    assert len(notes) == OTHERS[name] and not any("/models/x" in note for note in notes)


def test_foreign_environment_is_ignored():
    assert resolve(**FOREIGN) == resolve()
    assert resolve(**FOREIGN).origin == resolve().origin


letters = st.text("ABCDEFGHIJKLMNOPQRSTUVWXYZ_", min_size=1, max_size=14)


def distance(a, b):
    """Levenshtein distance by its recursive definition, on the whole table."""
    table = {(i, 0): i for i in range(len(a) + 1)} | {(0, j): j for j in range(len(b) + 1)}
    for i in range(1, len(a) + 1):
        for j in range(1, len(b) + 1):
            swap = table[i - 1, j - 1] + (a[i - 1] != b[j - 1])
            table[i, j] = min(swap, table[i - 1, j] + 1, table[i, j - 1] + 1)
    return table[len(a), len(b)]


@given(a=letters, b=letters)
def test_edit_distance(a, b):
    assert train_gpt.edit_distance(a, b) == distance(a, b)


@given(name=letters)
def test_other_names_are_judged_by_distance_and_family(name):
    known = {*train_gpt.VARIABLES, *train_gpt.ALIASES, *train_gpt.ANYWAY, *train_gpt.FOREIGN}
    if name in known or any(ours.startswith(f"{name}_") for ours in train_gpt.VARIABLES):
        return  # test_progress.py
    distances = {ours: distance(name, ours) for ours in train_gpt.VARIABLES}
    near = [ours for ours, far in distances.items() if far <= 2 and min(len(name), len(ours)) >= 8]
    family = name.startswith(train_gpt.FAMILIES)
    if near and name not in train_gpt.OTHERS:
        assert name in refused(**{name: train_gpt.show(train_gpt.VARIABLES[near[0]].default)})
    elif not family:
        assert not any(name in note for note in resolve(**{name: "1"}).notes)


@given(
    ours=st.sampled_from([name for name in train_gpt.VARIABLES if len(name) >= 9]),
    place=st.integers(0, 8),
    letter=st.sampled_from("ABCXYZ_"),
)
def test_a_slip_in_a_long_name_stops(ours, place, letter):
    """One letter left out, one too many, one wrong."""
    known = {*train_gpt.VARIABLES, *train_gpt.ALIASES, *train_gpt.ANYWAY, *train_gpt.FOREIGN}
    for name in (
        ours[:place] + ours[place + 1 :],
        ours[:place] + letter + ours[place:],
        ours[:place] + letter + ours[place + 1 :],
    ):
        if name not in known:
            value = train_gpt.show(train_gpt.VARIABLES[ours].default)
            assert name in refused(**{name: value})


NO_NUMBERS = {
    "SEED": ["", "x", "1.5", "1e3", "0x10", "nan", "½"],
    "MATRIX_LR": ["", "fast", "nan", "inf", "-inf", "1e999", "1,2"],
    "LN_SCALE": ["", "yes", "true", "2", "on"],
    "VE_LAYERS": ["", "9;10", "a", "1,,2", "1.5"],
    "CLIP_QUANTILES": ["", "0.9,x", "nan", "0.99,inf", "0", "1.1"],
    "NGRAM_MULTIPLIERS": ["nan", "0.3,inf", "-inf,1", "1e999"],
    "NGRAM_ENTROPY_CENTER": ["nan", "3,-inf"],
    "NGRAM_ALPHA_MIN": ["nan", "inf"],
    "DEPTH_RECURRENCE": ["nan", "inf"],
    "CLIP": ["", "both", "GLOBAL"],
    "DEVICE": ["", "gpu", "cuda:0"],
}


@pytest.mark.parametrize(("name", "text"), [(n, t) for n, ts in NO_NUMBERS.items() for t in ts])
def test_wrong_values_are_named(name, text):
    message = refused(**{name: text})
    assert name in message and (text in message or "must be" in message)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("ITERATIONS", "0"),
        ("ITERATIONS", "-1"),
        ("TRAIN_SEQ_LEN", "0"),
        ("TRAIN_BATCH_TOKENS", "-4096"),
        ("NUM_LAYERS", "1"),
        ("NUM_HEADS", "3"),
        ("NUM_HEADS", "0"),
        ("NUM_KV_HEADS", "3"),
        ("MODEL_DIM", "-128"),
        ("MLP_MULT", "0"),
        ("MLP_MULT", "0.001"),
        ("CLIP_SIGMAS", "10001"),
        ("EMBED_CLIP_SIGMAS", "inf"),
        ("CALIBRATION_ROWS", "0"),
        ("CALIBRATION_ROWS", "65537"),
        ("ROPE_DIMS", "15"),
        ("ROPE_DIMS", "64"),
        ("ROPE_BASE", "0"),
        ("BIGRAM_VOCAB_SIZE", "1"),
        ("BIGRAM_VOCAB_SIZE", "-5"),
        ("VOCAB_SIZE", "-1"),
        ("VE_LAYERS", "4"),
        ("EVAL_STRIDE", "0"),
        ("EVAL_STRIDE", "100"),
        ("EVAL_SEQ_LEN", "-256"),
        ("EVAL_BATCH_SEQS", "0"),
        ("GRAD_ACCUM_STEPS", "-1"),
        ("SWA_EVERY", "0"),
        ("QAT_EVERY", "0"),
        ("WARMUP_STEPS", "-1"),
        ("WARMDOWN_ITERS", "-1"),
        ("VAL_LOSS_EVERY", "-1"),
        ("EMA_DECAY", "1.5"),
        ("EMA_DECAY", "-0.1"),
        ("SWA_WEIGHT", "2"),
        ("MUON_MOMENTUM", "1.5"),
        ("BETA1", "1"),
        ("BETA2", "-1"),
        ("ADAM_EPS", "-1"),
        ("MATRIX_LR", "-0.1"),
        ("MAX_WALLCLOCK_SECONDS", "-1"),
        ("GRAD_CLIP_NORM", "-1"),
        ("CHECKPOINT_EVERY", "often"),
        ("CHECKPOINT_EVERY", "m"),
        ("CHECKPOINT_EVERY", "10mm"),
        ("CHECKPOINT_EVERY", "\u0663"),
        ("CHECKPOINT_EVERY", "9" * 20),
        ("RUN_ID", "x" * 256),
        ("RUN_ID", "\u00e9" * 128),
        ("NGRAM_MIN_COUNT", "0"),
        ("NGRAM_MAX_ORDER", "1"),
        ("NGRAM_MIN_ORDER", "10"),
        ("DEPTH_RECURRENCE", "4"),
        ("DEPTH_RECURRENCE", "-1"),
        ("TARGET_MB", "-1"),
        ("TTT_MOMENTUM", "2"),
        ("TTT_EPOCHS", "0"),
        ("TTT_CHUNK_TOKENS", "0"),
        ("TTT_LORA_RANK", "0"),
        ("TTT_GRAD_CLIP", "0"),
        ("NGRAM_ALPHA", "1.5"),
        ("NGRAM_ALPHA_MIN", "-1"),
        ("NGRAM_NLL_THRESHOLD", "0"),
        ("RUN_ID", "../elsewhere"),
        ("RUN_ID", "."),
        ("RUN_ID", "/tmp/x"),
        ("SEED", "99999999999999999999999"),
    ],
)
def test_impossible_values_are_named(name, text):
    message = refused(**{name: text})
    assert name.removeprefix("NGRAM_MIN_").removeprefix("NGRAM_MAX_") in message


@pytest.mark.parametrize("code", [1, 7, 10, 13, 27, 31, 127, 133, 0x9B, 0x2028, 0x2029])
@pytest.mark.parametrize("name", ["RUN_ID", "DATA_PATH", "EVAL_ONLY", "ITERATIONS", "RECORD"])
def test_control_characters_are_refused_by_name(name, code):
    """One in RUN_ID split a line of log.txt: an honest run, verified, was FAILED."""
    message = refused(**{name: f"1{chr(code)}"})
    assert f"{name}='1\\" in message and not train_gpt.CONTROL.search(message)
    resolve(RUN_ID="a \u00e9\u4e2d\u200b")


def test_a_folder_s_name_may_end_no_line_either(tmp_path, monkeypatch):
    """Where it becomes RECORD's."""
    folder = tmp_path / "a\nb"
    folder.mkdir()
    (folder / "config.env").write_text("SEED=5\n")
    monkeypatch.setattr(train_gpt, "ROOT", folder)
    with pytest.raises(ConfigError, match="control characters"):
        Config.from_env(dict(DEVICE="cpu"))


def test_chunks_of_test_time_training_are_whole_windows():
    message = refused(TTT_ENABLED="1", TTT_CHUNK_TOKENS="1000", SCORER="sliding")
    assert "TTT_CHUNK_TOKENS=1000" in message and "EVAL_SEQ_LEN" in message
    resolve(TTT_ENABLED="1", TTT_CHUNK_TOKENS="1024", SCORER="sliding")
    message = refused(TTT_ENABLED="1", TTT_CHUNK_TOKENS="1024")
    assert "SCORER=documents" in message and "sliding" in message
    resolve(TTT_ENABLED="0", TTT_CHUNK_TOKENS="1000")


def test_defaults_are_checked_too():
    tiny()
    with pytest.raises(ConfigError, match="NUM_KV_HEADS"):
        tiny(num_kv_heads=3)
    assert TINY["vocab_size"] == tiny().vocab_size


# -----------------------------------------------------------------------------
# DRY_RUN


def test_counted_parameters_are_the_model_s():
    cfg = tiny()
    assert train_gpt.count_parameters(cfg) == sum(
        w.numel() for w in train_gpt.GPT(cfg).parameters()
    )


def test_dry_run_needs_no_data_and_no_tokenizer(tmp_path):
    before = sorted(ROOT.glob("data/datasets/*"))
    done = run_script(dict(DRY_RUN=1, DEVICE="cpu", RECORD="tiny", SEED=3), cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    assert list(tmp_path.iterdir()) == [] and sorted(ROOT.glob("data/datasets/*")) == before
    rows = {row[1]: row for row in map(str.split, done.stdout.splitlines()) if row[:1] == ["*"]}
    assert rows["SEED"] == ["*", "SEED", "3", "env"]
    assert rows["MODEL_DIM"] == ["*", "MODEL_DIM", "128", "RECORD=tiny"]
    assert "MODEL_DIM" in rows and "XSA_LAST_N" in rows
    assert "LEAKY_SLOPE" not in rows, "an asterisk marks what is not the default"
    listed = [line.split() for line in done.stdout.splitlines() if line[:2] in ("* ", "  ")]
    assert {row[row[0] == "*"] for row in listed} == train_gpt.VARIABLES.keys()
    (line,) = re.findall(r"\bmodel_params:(\d+)", done.stdout)
    cfg = Config.from_env(dict(DEVICE="cpu", RECORD="tiny", VOCAB_SIZE="1024"))
    assert int(line) == train_gpt.count_parameters(cfg)
    assert "optimizer_group" in done.stdout and "byte_budget" in done.stdout
    assert "cap:16000000" in done.stdout


def test_misspelt_name_stops_the_process_first(tmp_path):
    line = error_line(run_script(dict(ITERATION=5), cwd=tmp_path))
    assert "ITERATION" in line and "ITERATIONS" in line
    assert list(tmp_path.iterdir()) == []


# -----------------------------------------------------------------------------
# Arguments, and what launchers leave in the environment


@pytest.mark.parametrize(
    ("arguments", "fix"),
    [
        (["--iterations", "5"], "fix: ITERATIONS=5 python train_gpt.py"),
        (["--iterations=5"], "fix: ITERATIONS=5 python train_gpt.py"),
        (["iterations=5"], "fix: ITERATIONS=5 python train_gpt.py"),
        (["ITERATIONS=5"], "fix: ITERATIONS=5 python train_gpt.py"),
        (["-iterations", "5"], "fix: ITERATIONS=5 python train_gpt.py"),
        (["--matrix-lr", "1e-3", "--dry-run", "--seed=-1"], "MATRIX_LR=1e-3 DRY_RUN=1 SEED=-1 "),
        (["--dry-run"], "DRY_RUN=1 "),
        (["--use-ema", "0"], "USE_EMA=0 "),
        (["--data-path", "a b"], "DATA_PATH='a b' "),
        (["--run-id=a=b"], "RUN_ID=a=b "),
        (["--no-such", "5"], "fix: see --help"),
        (["config.env"], "fix: see --help"),
        (["--local-rank=0"], "fix: see --help"),
        ([""], "fix: see --help"),
    ],
)
def test_arguments_are_refused_with_the_right_spelling(arguments, fix):
    with pytest.raises(ConfigError) as caught:
        train_gpt.refuse_arguments(arguments)
    assert fix in str(caught.value) and "see --help" in str(caught.value)


def test_no_argument_is_fine_and_one_ends_the_process(tmp_path):
    train_gpt.refuse_arguments([])
    done = run_script(PLAIN, cwd=tmp_path, arguments=["--iterations", "5"])
    assert "fix: ITERATIONS=5 python train_gpt.py" in error_line(done) and done.returncode == 2
    assert list(tmp_path.iterdir()) == []


ALONE = dict(RANK=0, LOCAL_RANK=0, WORLD_SIZE=1, LOCAL_WORLD_SIZE=1)


def test_launch_numbers():
    assert train_gpt.launch_numbers({}) == ALONE
    given = dict(RANK="3", LOCAL_RANK="1", WORLD_SIZE="4", LOCAL_WORLD_SIZE="2")
    assert train_gpt.launch_numbers(given) == {name: int(text) for name, text in given.items()}
    assert train_gpt.launch_numbers(dict(RANK="0", WORLD_SIZE="1")) == ALONE


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (dict(WORLD_SIZE="abc"), "WORLD_SIZE='abc': must be int, 1 or more"),
        (dict(WORLD_SIZE=""), "WORLD_SIZE=''"),
        (dict(WORLD_SIZE="0"), "WORLD_SIZE='0'"),
        (dict(WORLD_SIZE="2.0"), "WORLD_SIZE='2.0'"),
        (dict(WORLD_SIZE="٢"), "WORLD_SIZE="),
        (dict(WORLD_SIZE="9" * 5000), "WORLD_SIZE="),
        (dict(LOCAL_WORLD_SIZE="0"), "LOCAL_WORLD_SIZE='0'"),
        (dict(RANK="-1"), "RANK='-1': must be int, 0 or more"),
        (dict(RANK="1"), "RANK=1: must be below WORLD_SIZE=1"),
        (dict(RANK="2", WORLD_SIZE="2"), "RANK=2: must be below WORLD_SIZE=2"),
        (dict(LOCAL_RANK="1"), "LOCAL_RANK=1: must be below LOCAL_WORLD_SIZE=1"),
    ],
)
def test_wrong_launch_variables_are_a_line(given, words):
    with pytest.raises(ConfigError) as caught:
        train_gpt.launch_numbers(given)
    assert words in str(caught.value) and "fix: unset" in str(caught.value)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (dict(WORLD_SIZE="abc"), "WORLD_SIZE='abc'"),
        (dict(WORLD_SIZE="2"), "WORLD_SIZE=2 without RANK, LOCAL_RANK, "),
        (dict(RANK="1"), "RANK=1"),
        (
            dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_PORT="1"),
            "WORLD_SIZE=2 without MASTER_ADDR;",
        ),
        (
            dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
            | dict(MASTER_ADDR="127.0.0.1", MASTER_PORT="abc"),
            "MASTER_PORT='abc': ",
        ),
        (
            dict(RANK="1", LOCAL_RANK="1", WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
            | dict(MASTER_ADDR="nohost.invalid", MASTER_PORT="29500"),
            "MASTER_ADDR='nohost.invalid': no such host",
        ),
    ],
)
def test_a_process_says_what_its_launcher_forgot(given, words, tmp_path):
    line = error_line(run_script(PLAIN | given, cwd=tmp_path))
    assert words in line and "torchrun" in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("port", ["", "0", "65536", "-1", "1e3", "\u0663", "9" * 5000])
def test_a_port_is_named(port):
    with pytest.raises(ConfigError, match="MASTER_PORT=.*; fix: start it by torchrun"):
        train_gpt.require_address("127.0.0.1", port)


@pytest.mark.parametrize("host", ["", "nohost.invalid", "a b", "x" * 300, "\udcff"])
def test_a_host_that_nobody_knows_is_named(host):
    with pytest.raises(ConfigError, match="MASTER_ADDR=.*; fix: the name or address"):
        train_gpt.require_address(host, "29500")
    train_gpt.require_address("localhost", "29500")
    train_gpt.require_address("127.0.0.1", "1")


def test_help_without_docstrings(tmp_path):
    """python -OO"""
    done = subprocess.run(
        [sys.executable, "-OO", SCRIPT, "--help"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0 and "None" not in done.stdout.splitlines()
    assert "Environment variables: name, type" in done.stdout


# -----------------------------------------------------------------------------
# --help: every variable once, in columns that a pager and grep can use


VARIABLES = train_gpt.VARIABLES
WIDTHS = train_gpt.HELP_WIDTHS
STARTS = [sum(WIDTHS[:n]) + n * len(train_gpt.HELP_GAP) for n in range(4)]


@pytest.fixture(scope="module")
def page():
    """As lines; the process that prints it is in test_alone.py."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        train_gpt.print_help()
    return printed.getvalue().splitlines()


def columns(line):
    """name, type, default and meaning of a line of the table"""
    ends = [*STARTS[1:], None]
    return [line[start:end].strip() for start, end in zip(STARTS, ends, strict=True)]


def rows(page):
    """Variable -> its four columns, lines that go on below joined; in the order of the page."""
    table, name = {}, None
    for line in page[page.index("Run") : page.index("Values of RECORD, their beginning is enough")]:
        if re.match(r"[A-Z][A-Z0-9_]+(?=  |$)", line):
            name = line.split()[0]
            assert name not in table
            table[name] = columns(line)
        elif line.startswith(" "):
            below = columns(line)
            table[name] = [f"{a} {b}".strip() for a, b in zip(table[name], below, strict=True)]
    return table


def test_every_variable_has_one_row(page):
    table = rows(page)
    assert sorted(table) == sorted(VARIABLES)
    assert all(name == cells[0] and all(cells) for name, cells in table.items())
    words = [line.split()[0] for line in page if line[:1].strip()]
    assert [words.count(name) for name in VARIABLES] == [1] * len(VARIABLES)


def test_columns_are_aligned_within_100(page):
    assert max(map(len, page)) <= 100
    start, end = page.index("Run"), page.index("Values of RECORD, their beginning is enough")
    titles = {"Run", "Data", "Model", "Artifact", "Training", "Scoring", "N-gram"}
    lines = [line for line in page[start:end] if line]
    assert titles <= {*lines} and all(line == line.rstrip() for line in lines)
    for line in lines:
        if line.startswith(" ") or line.split()[0] in VARIABLES:
            cells, padded = columns(line), line.ljust(100)
            for cell, start in zip(cells[1:], STARTS[1:], strict=True):
                assert padded[start - 2 : start] == "  ", line
                assert not cell or not padded[start].isspace(), line


def test_defaults_and_choices_are_the_scripts(page):
    """A default pasted into the environment gives that default; each choice is named."""
    for name, (_, _, default, meaning) in rows(page).items():
        field = VARIABLES[name]
        if field.default not in ("", ()):
            assert ", " not in default or len(default) > WIDTHS[2]
            assert train_gpt.parse(name, default.replace(" ", "")) == field.default
        if isinstance(field.default, str) and get_args(field.type):
            choices = [choice for choice in get_args(field.type) if choice]
            assert meaning.startswith("|".join(choices) + ": ")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("SEED", "int"),
        ("DRY_RUN", "0|1"),
        ("RUN_ID", "text"),
        ("DEVICE", "choice"),
        ("MODEL_DIM", "int >= 1"),
        ("CODEC_TOKENS", "int >= -1"),
        ("NUM_LAYERS", "2 to 999"),
        ("TRAIN_SEQ_LEN", "1 to 1048576"),
        ("MLP_MULT", "float > 0"),
        ("SMEAR_INIT", "any float"),
        ("MATRIX_LR", "float"),
        ("BETA1", "0 to 0.999999"),
        ("SWA_WEIGHT", "0 to 1"),
        ("VE_LAYERS", "ints"),
        ("CLIP_QUANTILES", "floats"),
    ],
)
def test_type_and_bounds(name, kind, page):
    assert rows(page)[name][1] == kind


def test_bounds_are_those_that_are_enforced(page):
    """The numbers named are accepted, the next ones beyond are not."""
    for name, (_, kind, _, _) in rows(page).items():
        found = re.fullmatch(r"(?:(\w+) )?(?:>= (-?\d+)|(\S+) to (\S+))", kind)
        if found:
            least, most = found[2] or found[3], found[4]
            train_gpt.parse(name, least)
            beyond = [str(int(least) - 1)] + (
                [str(float(most) + 1).removesuffix(".0")] if most else []
            )
            for text in beyond:
                with pytest.raises(train_gpt.ConfigError):
                    train_gpt.parse(name, text)


def test_meanings_are_the_table_s_and_stand_alone(page):
    """No sentence but that of the setting's own line; none is a mere word."""
    for name, (_, _, _, meaning) in rows(page).items():
        assert meaning.endswith(train_gpt.SETTINGS[name].meaning), name
        assert len(train_gpt.SETTINGS[name].meaning.split()) >= 2, name


def test_groups_are_together_and_in_the_table_s_order(page):
    titles = list(dict.fromkeys(setting.group for setting in train_gpt.SETTINGS.values()))
    assert [line for line in page if line in titles] == titles


def test_every_record_is_named(page):
    start = page.index("Values of RECORD, their beginning is enough")
    named = [
        line.split()[0] for line in page[start:] if re.match(r"  \S+ ", line) and "=" not in line
    ]
    folders = {path.parent.name for path in ROOT.glob("records/*/*/config.env")}
    assert sorted(named) == sorted(folders) == named


def test_examples_are_valid(page, dataset):
    """Each example's variables make a Config."""
    lines = [line.split() for line in page[page.index("Examples") + 1 :]]
    assert len(lines) >= 3 and all(words[-1] == "train_gpt.py" for words in lines)
    for words in lines:
        pairs = dict(word.split("=") for word in words if "=" in word and not word.startswith("--"))
        assert pairs and train_gpt.Config.from_env(pairs | dict(DEVICE="cpu"))


def test_a_reader_may_stop_early(tmp_path):
    """As `| head` does: no complaint, status 0."""
    code = "import train_gpt; train_gpt.print_help()"
    command = [sys.executable, "-c", code]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with subprocess.Popen(command, cwd=ROOT, **pipes) as process:
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait(60) == 0


# -----------------------------------------------------------------------------
# Data


def test_upstreams_tokenizer_belongs_to_its_data_alone(tmp_path, monkeypatch):
    """Elsewhere a tokenizer that is missing is looked for where it should be."""
    upstream = tmp_path / "tokenizers/fineweb_1024_bpe.model"
    fineweb = tmp_path / "datasets" / train_gpt.FINEWEB_DATA.name
    monkeypatch.setattr(train_gpt, "FINEWEB_TOKENIZER", upstream)
    monkeypatch.setattr(train_gpt, "FINEWEB_DATA", fineweb)
    fineweb.mkdir(parents=True)
    (fineweb / "fineweb_val_000000.bin").touch()

    def tokenizer(folder="", **given):
        given |= dict(DATA_PATH=str(folder)) if folder else {}
        return train_gpt.default_paths(given, "own")["TOKENIZER_PATH"]

    assert tokenizer() == tokenizer(fineweb) == tokenizer(f"{fineweb}/") == upstream
    monkeypatch.chdir(fineweb)
    assert tokenizer(".") == upstream
    assert tokenizer(tmp_path / "mine") == tmp_path / "mine/tokenizer.model"
    (fineweb / "tokenizer.model").touch()
    assert tokenizer() == fineweb / "tokenizer.model"
    assert "TOKENIZER_PATH" not in train_gpt.default_paths(dict(TOKENIZER_PATH="x"), "own")


def test_a_sample_that_cannot_be_prepared_here(tmp_path, monkeypatch, capfd):
    """As in a checkout that is mounted read-only: what failed, and what to do instead."""
    place = tmp_path / "file" / "sample_en"
    place.parent.touch()
    monkeypatch.setattr(train_gpt, "SAMPLE_DATA", place)
    with pytest.raises(train_gpt.UserError, match="prepare.py --out DIR, then DATA_PATH=DIR"):
        train_gpt.prepare_sample(str(place))
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1 and str(place) in err
