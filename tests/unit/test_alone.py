"""The script alone in an empty folder, with data and nothing else: all a run does, to the bit as in
the repository. Whatever a run needs of records/ or data/ would be missed here."""

import contextlib
import importlib.util
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers import (
    ROOT,
    SCRIPT,
    SHRUNK,
    SMOKE_RUNS,
    Run,
    clean_environment,
    cores,
    error_line,
    launch,
    run_here,
    train_gpt,
)

# RECORD=tiny, given as values: a script alone knows no RECORDs.
TINY = train_gpt.read_record(ROOT / "records/track_cpu/tiny/config.env")
VALUES = TINY | {name: text for name, text in SHRUNK.items() if name != "RECORD"}
VALUES |= dict(SAVE_SCORES="1")
TTT = dict(TTT_ENABLED="1", TTT_CHUNK_TOKENS="512")
SCRIPT_BYTES = len(train_gpt.pack_script(train_gpt.SCRIPT))
PRUNED = dict(  # some weights must go
    TARGET_MB=str((SCRIPT_BYTES + 130 * 1024) / 2**20),
    COMPRESSOR="zstd",
    QUANT="lite",
    CLIP_SIGMAS="0",
    EMBED_CLIP_SIGMAS="0",
    QUANT_FLOOR="0",
)
OTHERS = {  # name -> variables beside VALUES
    "all": TTT | PRUNED | dict(TTT_USE_LORA="1", NGRAM_MIXER="cascade", PRE_ENRICH_DIM="16"),
    "cascade_ttt": TTT | dict(NGRAM_MIXER="cascade", PRE_ENRICH_DIM="16", OVERTONE_INIT="1"),
    "pruned_lora": TTT | PRUNED | dict(TTT_USE_LORA="1"),
}
SECONDS = re.compile(r"seconds$|tokens_per_s$|_ms$|^eta$")
NEVER_ALIKE = ("config", "setting", "hardware", "note", "peak_memory_mb")


def alone_in(folder):
    """The script in a folder of its own; its path."""
    folder.mkdir(exist_ok=True)
    return shutil.copy(SCRIPT, folder / "train_gpt.py")


def start(script, env, ranks=1):
    """To its end, without the repository on the path."""
    variables = {name: str(text) for name, text in env.items()}
    return launch(script, [], variables | {"PYTHONPATH": ""}, ranks, script.parent)


def lines(run):
    """The log without what differs from run to run."""
    found = []
    for line in run.metrics():
        if line["key"] not in NEVER_ALIKE:
            found.append({n: x for n, x in line.items() if not SECONDS.search(n)})
    return found


@pytest.fixture(scope="module")
def env(dataset):
    return VALUES | dict(DATA_PATH=str(dataset))


def check_same(alone, inside):
    """The same artifact, log, scores and stream; all files but the picture."""
    assert alone.artifact == inside.artifact
    assert lines(alone) == lines(inside)
    files = {path.name for path in alone.folder.iterdir()}
    assert files | {"report.png"} == {path.name for path in inside.folder.iterdir()}
    assert {"log.txt", "metrics.jsonl", "submission.json", "scores.npz", "blocks.npz"} <= files
    for columns in ("scores.npz", "blocks.npz"):
        ours, theirs = alone.arrays(columns), inside.arrays(columns)
        assert ours.keys() == theirs.keys()
        assert all(np.array_equal(ours[key], theirs[key]) for key in ours)
    assert alone.submission()["val_bpb"] == inside.submission()["val_bpb"] == alone.val_bpb()
    assert any(line.startswith("final_ngram_backoff_exact") for line in alone.lines)
    assert "ngram_gain:9" in "\n".join(alone.lines)
    no_picture = "records/tools/plot.py is not beside the script: no picture"
    assert any(no_picture in line for line in alone.lines)


@pytest.mark.parametrize("name", ["one", pytest.param("two_ranks", marks=pytest.mark.slow)])
def test_a_run_is_that_of_the_repository(name, smoke_run, env, tmp_path):
    """With a stream that is proved by a process of its own."""
    (ranks, changes), script = SMOKE_RUNS[name], alone_in(tmp_path)
    done = start(script, env | changes | dict(RUN_ID="x"), ranks)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    alone, inside = Run(tmp_path / "runs/x"), smoke_run(name)
    check_same(alone, inside)
    streams = [(run.folder / "stream.bin").read_bytes() for run in (alone, inside)]
    assert streams[0] == streams[1] and alone.final("codec")["decoded"] == "ok"


@pytest.mark.parametrize(
    "name", ["all", *(pytest.param(n, marks=pytest.mark.slow) for n in OTHERS if n != "all")]
)
def test_other_switches_are_those_of_the_repository(name, env, tmp_path):
    """Test-time training, the published backoff, pruning."""
    changes, script = OTHERS[name], alone_in(tmp_path / "alone")
    done = start(script, env | changes | dict(RUN_ID="x"))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    (tmp_path / "inside").mkdir()
    alone = Run(script.parent / "runs/x")
    check_same(alone, run_here(tmp_path / "inside", "x", **env | changes))
    if "TARGET_MB" in changes:
        assert any(line.startswith("prune ") and "pruned:0 " not in line for line in alone.lines)
    assert alone.val_bpb("ttt_exact") != alone.val_bpb("int6_sliding_window_exact")


def test_killed_and_resumed_it_ends_the_same(smoke_run, env, tmp_path):
    """SIGKILL after a checkpoint; RESUME=auto; then a second run of its name, and EVAL_ONLY."""
    plain = env | dict(SCORER="documents", CHECKPOINT_EVERY="1", RUN_ID="x")
    script = alone_in(tmp_path / "killed")
    with started(script, plain, "step:3/") as process:
        process.send_signal(signal.SIGKILL)
        process.wait(30)
    again = start(script, plain | dict(RESUME="auto"))
    assert again.returncode == 0 and "\nresumed step:" in again.stdout, again.stderr
    ended, wanted = Run(script.parent / "runs/x"), smoke_run("one")
    assert ended.artifact == wanted.artifact and ended.val_bpb() == wanted.val_bpb()

    refused = error_line(start(script, plain))
    assert "RUN_ID='x'" in refused and "finished" in refused and "OVERWRITE=1" in refused

    scored = plain | dict(
        EVAL_ONLY=str(ended.folder / "artifact.bin"), NGRAM_ENABLED="0", RUN_ID="y"
    )
    assert start(script, scored).returncode == 0
    stage = "documents_exact"
    assert Run(script.parent / "runs/y").val_bpb(stage) == ended.val_bpb(stage)


@contextlib.contextmanager
def started(script, env, until, cwd=None):
    """The script as a process that has written a line that begins so."""
    clean = clean_environment() | env | dict(OMP_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1")
    streams = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    with cores(1):
        command = [sys.executable, script]
        process = subprocess.Popen(command, cwd=cwd or script.parent, env=clean, **streams)
    try:
        for line in process.stdout:
            if line.startswith(until):
                break
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_signal_leaves_a_checkpoint(env, tmp_path):
    script = alone_in(tmp_path)
    long = env | dict(ITERATIONS="2000", CHECKPOINT_EVERY="0", RUN_ID="x")
    with started(script, long, "step:2/") as process:
        process.send_signal(signal.SIGTERM)
        output = process.communicate(timeout=60)[0]
    assert process.returncode == 143 and "checkpoint written, RESUME=auto goes on" in output
    (path,) = (tmp_path / "runs/x/checkpoint").glob("*.json")
    assert train_gpt.read_checkpoint(path)[0].step >= 2


def test_help_and_dry_run_are_those_of_the_repository(tmp_path, capsys):
    script = alone_in(tmp_path)
    done = launch(script, ["--help"], {}, 1, tmp_path)
    assert done.returncode == 0 and done.stderr == "" and [*tmp_path.iterdir()] == [Path(script)]
    here = done.stdout
    train_gpt.print_help()
    there = capsys.readouterr().out
    table = here[here.index("Run\n") : here.index("Values of RECORD")]
    assert table == there[there.index("Run\n") : there.index("Values of RECORD")]
    values = VALUES | dict(DRY_RUN="1", DEVICE="cpu")
    here = launch(script, [], values, 1, tmp_path).stdout
    train_gpt.run(train_gpt.Config.from_env(values))
    there = capsys.readouterr().out
    for key in ("model_params", "optimizer_group", "byte_budget"):
        wanted = [line for line in there.splitlines() if line.startswith(key)]
        assert wanted and [x for x in here.splitlines() if x.startswith(key)] == wanted
    rows = [line.split() for line in here.splitlines()]
    assert ["*", "ITERATIONS", "8", "env"] in rows


def test_without_data_the_fix_is_named(tmp_path):
    line = error_line(start(alone_in(tmp_path), VALUES))
    assert "no data" in line and "set DATA_PATH" in line


# -----------------------------------------------------------------------------
# With the user's four packages: torch, numpy, sentencepiece, zstandard

ABSENT = [*train_gpt.OPTIONAL_PACKAGES, "huggingface_hub"]


@pytest.fixture
def four(tmp_path):
    """PYTHONPATH of a Python that has no others."""
    (tmp_path / "four").mkdir()
    lines = ["import sys", *(f"sys.modules[{name!r}] = None" for name in ABSENT)]
    (tmp_path / "four/sitecustomize.py").write_text("\n".join(lines))
    return {"PYTHONPATH": str(tmp_path / "four")}


def test_four_packages_train_score_and_print_val_bpb(smoke_run, env, four, tmp_path):
    """What is left out is a line each before step 0; the score is that of all packages."""
    asked = env | SMOKE_RUNS["one"][1] | dict(RUN_ID="x", CHECKPOINT_EVERY="2")
    done = launch(SCRIPT, [], {k: str(v) for k, v in asked.items()} | four, 1, tmp_path)
    assert done.returncode == 0 and done.stderr == "", done.stderr[-3000:]
    run = Run(tmp_path / "runs/x")
    notes = done.stdout[: done.stdout.index("\nstep:1/")]
    for name, effect in train_gpt.OPTIONAL_PACKAGES.items():
        assert f"note:package {name} is missing: {effect}" in notes
    whole = smoke_run("one")
    assert run.val_bpb() == whole.val_bpb()
    assert b'"compressor":"zstd"' in run.artifact and b'"compressor":"range"' in whole.artifact
    models = [train_gpt.load_artifact("a", content=x.artifact) for x in (run, whole)]
    for ours, theirs in zip(*(model.parameters() for model in models), strict=True):
        assert ours.equal(theirs)
    left_out = {"stream.bin", "report.png"}
    files = {path.name for path in run.folder.iterdir()}
    assert files | left_out == {path.name for path in whole.folder.iterdir()}
    assert run.submission()["val_bpb"] == run.val_bpb()
    done = launch(SCRIPT, [], dict(DECODE=str(whole.folder)) | four, 1, tmp_path)
    assert "package constriction is missing; fix: pip install" in error_line(done)


def test_a_broken_package_is_done_without(smoke_run, env, tmp_path):
    """Such as a numba that is installed beside another numpy than its own: with the reason."""
    (tmp_path / "broken/numba").mkdir(parents=True)
    broken = "raise ImportError('Numba needs NumPy 2.2 or less')"
    (tmp_path / "broken/numba/__init__.py").write_text(broken)
    asked = env | SMOKE_RUNS["one"][1] | dict(RUN_ID="x", PYTHONPATH=str(tmp_path / "broken"))
    done = launch(SCRIPT, [], {k: str(v) for k, v in asked.items()}, 1, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    effect = train_gpt.OPTIONAL_PACKAGES["numba"]
    why = "package numba cannot be imported (Numba needs NumPy 2.2 or less)"
    assert f"note:{why}: {effect}" in done.stdout[: done.stdout.index("\nstep:1/")]
    assert Run(tmp_path / "runs/x").val_bpb() == smoke_run("one").val_bpb()


def test_four_packages_prepare_a_text(four, tmp_path):
    """As the first run does with the embedded one."""
    (tmp_path / "text.txt").write_text(
        "It was the best of times, it was the worst of times.\n" * 99
    )
    options = ["--input", "text.txt", "--out", "set", "--vocab-size", "300"]
    done = launch(ROOT / "data/prepare_text.py", options, four, 1, tmp_path)
    assert done.returncode == 0, done.stderr
    assert train_gpt.find_shards(tmp_path / "set", "train")


def test_four_packages_stop_on_a_signal(env, four, tmp_path):
    with started(SCRIPT, env | four | dict(ITERATIONS="2000"), "step:2/", tmp_path) as process:
        process.send_signal(signal.SIGTERM)
        output = process.communicate(timeout=60)[0]
    assert process.returncode == 143 and "Traceback" not in output
    assert "no checkpoint, package safetensors is missing" in output


@pytest.mark.parametrize("name", ["sentencepiece", "zstandard"])
def test_a_package_that_nothing_replaces_is_missed_at_once(name, env, four, tmp_path):
    with open(tmp_path / "four/sitecustomize.py", "a") as file:
        file.write(f"\nsys.modules[{name!r}] = None")
    done = launch(SCRIPT, [], {k: str(v) for k, v in env.items()} | four, 1, tmp_path)
    assert f"package {name} is missing; fix: pip install {name}" in error_line(done)
    assert not (tmp_path / "runs").exists()


# -----------------------------------------------------------------------------
# Settings, as a module beside nothing


@pytest.fixture
def script_alone(tmp_path, monkeypatch):
    """That script as a module."""
    spec = importlib.util.spec_from_file_location("script_alone", alone_in(tmp_path))
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
    assert script_alone.count_parameters(replace(cfg, vocab_size=1024)) == 32_276_176


@pytest.mark.parametrize("given", [dict(ITERATOINS="9"), dict(TIE_EMBEDDINGS="0")])
def test_script_alone_refuses_as_beside_its_records(given, script_alone):
    with pytest.raises(script_alone.ConfigError) as caught:
        script_alone.Config.from_env(given | dict(DEVICE="cpu"))
    with pytest.raises(train_gpt.ConfigError) as beside:
        train_gpt.Config.from_env(given | dict(DEVICE="cpu", RECORD="tiny"))
    assert str(caught.value) == str(beside.value)


def test_script_alone_knows_no_record(script_alone):
    with pytest.raises(script_alone.ConfigError, match="no records/ beside train_gpt.py.*fix"):
        script_alone.Config.from_env(dict(RECORD="tiny", DEVICE="cpu"))
