"""Configuration: environment > RECORD > defaults, checked, named, and nothing else read."""

import dataclasses
import importlib.util
import re
import shutil
import sys
from dataclasses import replace

import pytest
from helpers import (
    ALIASES,
    ROOT,
    SCRIPT,
    TINY,
    error_line,
    launch,
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
    assert re.search(r"^  mine    .*track/mine$", capsys.readouterr().out, re.M)


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
# The script without its neighbours


@pytest.fixture
def alone(tmp_path):
    """The script in a folder of its own."""
    shutil.copy(SCRIPT, tmp_path)
    return tmp_path / "train_gpt.py"


@pytest.fixture
def script_alone(alone, monkeypatch):
    """That script as a module."""
    spec = importlib.util.spec_from_file_location("script_alone", alone)
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "script_alone", script)
    spec.loader.exec_module(script)
    return script


def test_script_alone_resolves(script_alone):
    """No records/: the defaults, what the environment says, siblings' names, and why."""
    given = dict(SEED="7", VE_LAYERS="1,2", DEVICE="cpu", USE_EMA="0")
    cfg = script_alone.Config.from_env(given)
    kept = {name: "env" for name in ("SEED", "VE_LAYERS", "DEVICE", "EMA_ENABLED")}
    paths = dict(RECORD="default", DATA_PATH="default", TOKENIZER_PATH="default")
    assert cfg.origin == kept | paths
    assert (cfg.record, cfg.run_id) == ("", "own_seed7")
    assert cfg.notes[0] == "USE_EMA is read as EMA_ENABLED=0" and "defaults" in cfg.notes[1]
    places = dict(data_path=cfg.data_path, tokenizer_path=cfg.tokenizer_path, run_id=cfg.run_id)
    given = dict(seed=7, ve_layers=(1, 2), device="cpu", ema_enabled=False)
    assert cfg == script_alone.Config(**given, **places)
    assert script_alone.count_parameters(replace(cfg, vocab_size=1024)) == 26_993_756


@pytest.mark.parametrize("given", [dict(ITERATOINS="9"), dict(TIE_EMBEDDINGS="0")])
def test_script_alone_refuses_as_beside_its_records(given, script_alone):
    with pytest.raises(script_alone.ConfigError) as caught:
        script_alone.Config.from_env(given | dict(DEVICE="cpu"))
    assert str(caught.value) == refused(**given)


def test_script_alone_knows_no_record(alone):
    done = launch(alone, [], dict(RECORD="tiny", DEVICE="cpu"), 1, alone.parent)
    line = error_line(done)
    assert "no records/ beside train_gpt.py" in line and "fix" in line
    assert not (alone.parent / "runs").exists()


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
    with pytest.raises(ConfigError, match=r"config\.env: DATA_PATH=/x is not a setting"):
        Config.from_env(dict(DEVICE="cpu"))


# -----------------------------------------------------------------------------
# Misspelt names and impossible values


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("ITERATION", "ITERATIONS"),
        ("ITERATOINS", "ITERATIONS"),
        ("SEEED", "SEED"),
        ("MATRIXLR", "MATRIX_LR"),
        ("NUM_LAYER", "NUM_LAYERS"),
        ("num_layers".upper() + "X", "NUM_LAYERS"),
        ("MUON_MOMENTM", "MUON_MOMENTUM"),
        ("BIGRAM_VOCAB", "BIGRAM_"),
        ("NGRAM_SOMETHING_ELSE", "NGRAM_"),
        ("EMA_START_STEP_LATE", "EMA_"),
        ("SWA_UNHEARD_OF", "SWA_"),
        ("MUON_LEARNING_RATE", "MUON_"),
        ("TTT_WHATEVER", "TTT_"),
        ("XSA_FIRST", "XSA_"),
    ],
)
def test_misspelt_names_stop_with_a_suggestion(name, near):
    message = refused(**{name: "1"})
    suggestion = message.split("did you mean")[1]
    assert name in message and near in suggestion


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
    if name in {*train_gpt.VARIABLES, *train_gpt.ALIASES, *train_gpt.ANYWAY}:
        return
    near = min(distance(name, ours) for ours in train_gpt.VARIABLES)
    if name.startswith(train_gpt.FAMILIES) or (near <= 2 and len(name) > 5):
        assert name in refused(**{name: "1"})
    elif near > 2:
        resolve(**{name: "1"})


NO_NUMBERS = {
    "SEED": ["", "x", "1.5", "1e3", "0x10", "nan", "½"],
    "MATRIX_LR": ["", "fast", "nan", "inf", "-inf", "1e999", "1,2"],
    "LN_SCALE": ["", "yes", "true", "2", "on"],
    "VE_LAYERS": ["", "9;10", "a", "1,,2", "1.5"],
    "CLIP_QUANTILES": ["", "0.9,x", "nan", "0.99,inf", "0", "1.1"],
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
# DRY_RUN and --help

PR864 = dict(NUM_LAYERS=11, VALUE_RESIDUAL=1, GATED_ATTENTION=1, VE_ENABLED=0)


def dry_run(**variables):
    """Standard output of a dry run in an empty folder of nothing."""
    done = run_script(dict(DRY_RUN=1, DEVICE="cpu") | variables, cwd="/")
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def defaults_record(add_record):
    """-> function that resolves variables over the defaults instead of `tiny`."""
    add_record("defaults", "# nothing\n")
    return lambda **v: Config.from_env(
        dict(DEVICE="cpu", RECORD="defaults") | {name: str(value) for name, value in v.items()}
    )


@pytest.mark.parametrize(
    ("count", "variables"),
    [
        (26_744_007, PR864 | dict(BIGRAM_VOCAB_SIZE=1024)),
        (26_809_543, PR864 | dict(BIGRAM_VOCAB_SIZE=1536)),
        (26_928_220, dict(BIGRAM_VOCAB_SIZE=1536)),  # #1026
        (26_993_756, {}),  # #993 = the defaults
    ],
)
def test_parameter_counts_are_the_published_ones(count, variables, defaults_record):
    cfg = defaults_record(**variables, VOCAB_SIZE=1024)
    assert train_gpt.count_parameters(cfg) == count


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
    assert "SEED:3(env)" in done.stdout and "MODEL_DIM:128(RECORD=tiny)" in done.stdout
    assert "NUM_KV_HEADS:2" in done.stdout and "(default)" in done.stdout
    (line,) = re.findall(r"\bmodel_params:(\d+)", done.stdout)
    cfg = Config.from_env(dict(DEVICE="cpu", RECORD="tiny", VOCAB_SIZE="1024"))
    assert int(line) == train_gpt.count_parameters(cfg)
    assert "optimizer_group" in done.stdout and "byte_budget" in done.stdout
    assert "cap:16000000" in done.stdout


def test_dry_run_of_a_published_system(tmp_path):
    """The counts again as a user sees them, with a RECORD that does not exist yet spelt out."""
    text = "MLP_MULT=3.0 TRAIN_SEQ_LEN=2048 MODEL_DIM=512 NUM_HEADS=8 NUM_KV_HEADS=4 BIGRAM_DIM=128"
    variables = dict(pair.split("=") for pair in text.split()) | PR864
    variables |= dict(BIGRAM_VOCAB_SIZE=1024, TRAIN_BATCH_TOKENS=786432, RECORD="tiny")
    done = run_script(variables | dict(DRY_RUN=1, DEVICE="cpu"), cwd=tmp_path)
    assert "model_params:26744007" in done.stdout.split()


def test_help_lists_every_variable(tmp_path):
    done = run_script({}, cwd=tmp_path, arguments=["--help"])
    assert done.returncode == 0 and list(tmp_path.iterdir()) == []
    first_words = {line.split()[0] for line in done.stdout.splitlines() if line.strip()}
    assert first_words >= set(train_gpt.VARIABLES)
    assert "torchrun" in done.stdout and "TRAIN_BATCH_TOKENS" in done.stdout


def test_misspelt_name_stops_the_process_first(tmp_path):
    line = error_line(run_script(dict(ITERATION=5), cwd=tmp_path))
    assert "ITERATION" in line and "ITERATIONS" in line
    assert list(tmp_path.iterdir()) == []
