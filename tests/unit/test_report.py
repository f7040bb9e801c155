"""The report and main: bad input ends in one line; the score is that of the artifact on disk."""

import contextlib
import json
import math
import shutil

import numpy as np
import pytest
import run_folder
import torch
from helpers import (
    CHINESE,
    SCRIPTS,
    SHRUNK,
    SOURCE_CODE,
    check_scores,
    cores,
    error_line,
    model_of,
    pack_artifact,
    random_stream,
    run_here,
    run_script,
    tiny,
    train_gpt,
    write_shard,
)

import prepare_text

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
    "no number": (dict(ITERATIONS="many"), ["ITERATIONS='many'", "int"]),
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
    (tmp_path / "a.bin").write_bytes(pack_artifact(weights, cfg))
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


@pytest.mark.usefixtures("no_picture")
def test_one_token_is_enough(data, tmp_path):
    """Short is not wrong: the loader goes round and round."""
    folder = data(train=dict(tokens=[7]), val=dict(tokens=[9]))
    env = variables(folder, ITERATIONS=1, WARMUP_STEPS=0, TRAIN_BATCH_TOKENS=64, RUN_ID=None)
    run = run_here(tmp_path, "one", **env)
    assert len(run.arrays("scores.npz")["token"]) == 1


def test_a_process_ends_in_one_line_too(data, tmp_path):
    env = variables(data(val=dict(magic=1)))
    assert "magic" in error_line(run_script(env, cwd=tmp_path))


# -----------------------------------------------------------------------------
# What the score is of

SHORT = SHRUNK | dict(ITERATIONS="4", WARMUP_STEPS="0", TRAIN_BATCH_TOKENS="256")


@pytest.fixture(scope="module")
def base(dataset, tmp_path_factory):
    """A finished short run on the small dataset."""
    return run_here(tmp_path_factory.mktemp("base"), "base", **SHORT, DATA_PATH=str(dataset))


def test_score_is_that_of_the_artifact_on_disk(base, dataset):
    """Some targets again, from artifact.bin alone, one at a time."""
    model, columns = (
        train_gpt.load_artifact(base.folder / "artifact.bin"),
        base.arrays("scores.npz"),
    )
    stream = np.concatenate([[train_gpt.BOS], columns["token"]])
    for t in (0, 1, 15, 16, 63, 64, 65, 500, len(columns["token"]) - 1):
        start = max(0, t // 16 * 16 + 16 - 64)  # EVAL_STRIDE 16, windows of 64
        ids = torch.from_numpy(stream[start : t + 1]).long().unsqueeze(0)
        logits = model.logits(model.hidden(ids))[0, -1].double()
        wanted = logits.log_softmax(-1)[stream[t + 1]].item()
        assert columns["logp_model"][t] == pytest.approx(wanted, abs=2e-5)


@pytest.mark.usefixtures("no_picture")
def test_averaged_line_is_of_the_weights_before_quantisation(base, dataset, tmp_path):
    """Windows side by side; scores_ema.npz holds the scores of the same weights."""
    env = SHORT | dict(VAL_LOSS_EVERY="4", EVAL_STRIDE="64", DATA_PATH=str(dataset))
    run = run_here(tmp_path, "x", **env, NGRAM_SCHEME="pr864", PSEUDO_WEIGHTS="ema")
    (line,) = [row for row in run.metrics() if row["key"] == "averaged"]
    columns = run.arrays("scores_ema.npz")
    assert line["val_loss"] == pytest.approx(-columns["logp_model"].mean(), rel=1e-9)
    wanted = train_gpt.bits_per_byte(columns["logp_model"], columns["bytes"])
    assert line["val_bpb"] == pytest.approx(wanted, rel=1e-9)
    quantised = run.val_bpb("int6_roundtrip_exact")
    assert run.artifact == base.artifact and abs(line["val_bpb"] - quantised) > 1e-7
    assert not any(row["key"] == "averaged" for row in base.metrics())


@pytest.mark.usefixtures("no_picture")
def test_pruned_artifact_of_a_run(dataset, tmp_path):
    """Code and artifact keep to TARGET_MB, and the scores are those of what is left."""
    env = SHORT | dict(DATA_PATH=str(dataset), COMPRESSOR="zstd", QUANT="lite", CLIP_SIGMAS="0")
    free = run_here(tmp_path, "free", **env)
    total = int(free.final("artifact_bytes")["total"]) - 800
    env |= dict(TARGET_MB=str(total / 2**20))
    run = run_here(tmp_path, "small", **env)
    (line,) = [line for line in run.lines if line.startswith("prune ")]
    figures = dict(pair.split(":") for pair in line.split()[1:])
    assert list(figures) == ["candidates", "pruned", "bytes", "seconds"]
    assert 0 < int(figures["pruned"]) < int(figures["candidates"])
    assert total - 800 < int(run.final("artifact_bytes")["total"]) <= total
    assert len(run.artifact) > int(figures["bytes"]) > len(run.artifact) - 5000
    assert run.val_bpb("int6_roundtrip_exact") != free.val_bpb("int6_roundtrip_exact")
    assert not any(line.startswith("prune") for line in free.lines)


SQUEEZED = SHORT | dict(QUANT="gptq", CLIP_SIGMAS="8", COMPRESSOR="range", CALIBRATION_ROWS="4")


@pytest.mark.usefixtures("no_picture")
@pytest.mark.parametrize("given", ["0", "0.5", "50"])
def test_a_capped_run_leaves_time_for_gptq(given, dataset, tmp_path, monkeypatch):
    """What was measured, or is given, half of the cap at most: logged, and left by training."""
    free = run_here(tmp_path, "free", **SQUEEZED, TARGET_BYTES="0", DATA_PATH=str(dataset))
    target = int(free.final("artifact_bytes")["total"]) - 500
    used = []
    train = train_gpt.Trainer.run
    monkeypatch.setattr(
        train_gpt.Trainer, "run", lambda *args: [used.append(args[2]), train(*args)][1]
    )
    monkeypatch.setattr(train_gpt, "quantising_seconds", lambda *_: 1.25)
    env = SQUEEZED | dict(MAX_WALLCLOCK_SECONDS="4", ITERATIONS="100000", TARGET_BYTES=str(target))
    run = run_here(tmp_path, "x", **env, GPTQ_RESERVE_SECONDS=given, DATA_PATH=str(dataset))
    (line,) = [line for line in run.lines if line.startswith("gptq_reserve ")]
    figures = dict(pair.split(":") for pair in line.split()[1:])
    wanted = {"0": 1.25, "0.5": 0.5, "50": 2.0}[given]
    assert float(figures["seconds"]) == used[0] == wanted and float(figures["measured"]) == 1.25
    assert any(line.startswith("stopping_early: wallclock_cap") for line in run.lines)
    assert int(run.final("artifact_bytes")["total"]) <= target


@pytest.mark.usefixtures("no_picture")
def test_rehearsal_is_as_long_as_what_follows(dataset, tmp_path, monkeypatch):
    """It packs what the run packs, as often, and leaves the run's weights and chance as they are;
    a target that nothing reaches ends before the first step."""
    packed = []
    pack = train_gpt.pack_payload
    monkeypatch.setattr(
        train_gpt, "pack_payload", lambda *args: [packed.append(pack(*args)), packed[-1]][1]
    )
    env = SQUEEZED | dict(DATA_PATH=str(dataset))
    free = run_here(tmp_path, "free", **env, TARGET_BYTES="0")
    assert len(packed) == 1
    total = int(free.final("artifact_bytes")["total"])
    run = run_here(tmp_path, "x", **env, TARGET_BYTES=str(total))
    rehearsed, last = packed[1][0], packed[-1][0]
    assert len(packed) in (3, 4, 5) and last == run.artifact == free.artifact
    assert len(rehearsed) == pytest.approx(len(last), rel=0.2)
    steps = [[row["train_loss"] for row in r.metrics() if "train_loss" in row] for r in (free, run)]
    assert steps[0] == steps[1] and len(steps[0]) == 4
    script = len(train_gpt.pack_script(train_gpt.SCRIPT))
    hardly = len(last) // 5  # at the widest clips alone, where trained weights may take more
    for target, fix in ((1000, "more bytes"), (script + hardly, "a smaller model or more bytes")):
        with pytest.raises(train_gpt.UserError, match=f"^TARGET_BYTES={target}: .* fix: {fix}$"):
            run_here(tmp_path, "y", **env, TARGET_BYTES=str(target), OVERWRITE="1")
        assert not any(line.startswith("step:") for line in (tmp_path / "runs/y/log.txt").open())


@pytest.mark.usefixtures("no_picture")
def test_validation_text_does_not_steer_the_artifact(base, dataset, tmp_path):
    """No choice of weights by validation: another text, the same artifact."""
    data = tmp_path / "set"
    shutil.copytree(dataset, data)
    (path,) = data.glob("*_val_*.bin")
    write_shard(path, random_stream(700, 512))
    for beside in [*data.glob("*_val.jsonl"), *data.glob("dataset.json")]:
        beside.unlink()
    other = run_here(tmp_path, "other", **SHORT | dict(VAL_LOSS_EVERY="2"), DATA_PATH=str(data))
    assert other.artifact == base.artifact and other.val_bpb() != base.val_bpb()


def test_artifact_over_the_cap_is_loud(base, dataset, tmp_path, monkeypatch):
    """Known once it is packed, and the last word of the log."""
    monkeypatch.setattr(train_gpt, "CAP_BYTES", 1000)
    run = run_here(tmp_path, "large", **SHORT, DATA_PATH=str(dataset))
    (line,) = [line for line in run.lines if "OVER THE CAP" in line]
    total = int(run.final("artifact_bytes")["total"])
    assert f"{total:,}" in line and run.submission()["bytes_total"] == total
    assert line == run.lines[-1] and run.submission()["over"] == ["bytes"]
    early = f"note:over the cap of the 10-minute track: bytes {total:,}, the cap is 1,000"
    keys = [line.partition(" ")[0] for line in run.lines]
    assert run.lines.index(early) < keys.index("final_int6_roundtrip_exact")
    assert run.submission()["over_cap"] is True
    assert not any("over the cap" in line.lower() for line in base.lines)
    assert base.submission()["over"] == [] and base.submission()["over_cap"] is False


def test_seconds_over_the_cap_are_said_as_loudly(dataset, tmp_path, monkeypatch):
    """Of training before the evaluation, of that before the proof, in submission.json and last."""
    clock = train_gpt.Runtime.clock

    @contextlib.contextmanager
    def slow(rt, stage):
        with clock(rt, stage):
            yield
        rt.seconds[stage] += 250  # in two parts of evaluation

    monkeypatch.setattr(train_gpt.Runtime, "clock", slow)
    run = run_here(tmp_path, "slow", **SHORT | dict(EVAL_STRIDE="64"), DATA_PATH=str(dataset))
    keys = [line.partition(" ")[0] for line in run.lines]
    (train,) = [i for i, line in enumerate(run.lines) if line.startswith("note:over the cap")]
    assert keys.index("averages") < train < keys.index("final_int6_roundtrip_exact")
    assert ", the cap is 600" in run.lines[train]
    assert run.lines[-1].startswith("OVER THE CAP of the 10-minute track:")
    assert run.submission()["over"] == ["train_seconds"]
    assert run.submission()["over_cap"] is False


@pytest.mark.parametrize(
    ("spent", "over"),
    [
        (dict(bytes=16_000_000, train_seconds=600.9, eval_seconds=600.0), []),
        (dict(bytes=16_000_001), ["bytes"]),
        (dict(train_seconds=601.1), ["train_seconds"]),  # not the step that the cap fell into
        (dict(eval_seconds=600.1, train_seconds=0), ["eval_seconds"]),
    ],
)
def test_what_is_over_a_cap(spent, over):
    assert [*train_gpt.over_caps(**spent)] == over


@pytest.mark.usefixtures("no_picture")
@pytest.mark.parametrize("error", [1.1e-9, 0.95, math.nan, math.inf])
@pytest.mark.parametrize("scorer", ["sliding", "documents"])
def test_no_score_without_a_distribution(scorer, error, dataset, tmp_path, monkeypatch):
    """Where the mass is off 1 there is no val_bpb; the artifact stays."""
    monkeypatch.setattr(train_gpt, "window_mass", lambda *_: error)
    prove = train_gpt.prove

    def proved(*arguments):
        coded, codec = prove(*arguments)
        return coded._replace(mass_error=error), codec

    monkeypatch.setattr(train_gpt, "prove", proved)
    changes = dict(SCORER=scorer, ITERATIONS="1", WARMUP_STEPS="0")
    with pytest.raises(train_gpt.UserError, match="mass_error .* no val_bpb; fix: ") as caught:
        run_here(tmp_path, "mass", **SHRUNK | changes, DATA_PATH=str(dataset))
    folder = tmp_path / "runs/mass"
    text = (folder / "log.txt").read_text()
    assert "runs/mass/artifact.bin" in str(caught.value) and (folder / "artifact.bin").exists()
    assert "final_int6_roundtrip_exact" in text and "final_ngram_exact" not in text
    assert not (folder / "submission.json").exists()


@pytest.mark.usefixtures("no_picture")
def test_eval_only_into_its_own_folder_keeps_the_artifact(base, dataset, tmp_path):
    """An unfinished folder is cleared, and a finished one, but never of the artifact that is to be
    scored; a batch that fits no training is not asked about."""
    folder = tmp_path / "runs" / "mine"
    folder.mkdir(parents=True)
    (folder / "artifact.bin").write_bytes(base.artifact)
    env = SHORT | dict(EVAL_ONLY=str(folder / "artifact.bin"), DATA_PATH=str(dataset))
    run = run_here(tmp_path, "mine", **env)
    assert run.artifact == base.artifact and run.val_bpb() == base.val_bpb()
    (folder / "submission.json").write_text("{}")
    env |= dict(TRAIN_BATCH_TOKENS="7", OVERWRITE="1")
    again = run_here(tmp_path, "mine", **env)
    assert again.artifact == base.artifact


def test_eval_only_checks_the_stored_window(base, dataset, tmp_path):
    """The stride fits the variables' window, but not the artifact's 64 tokens."""
    env = SHORT | dict(EVAL_ONLY=str(base.folder / "artifact.bin"), DATA_PATH=str(dataset))
    with pytest.raises(train_gpt.ConfigError, match="EVAL_STRIDE=128"):
        run_here(tmp_path, "wide", **env | dict(TRAIN_SEQ_LEN="128", EVAL_STRIDE="128"))


# -----------------------------------------------------------------------------
# Other texts


TEXTS = {
    "chinese": CHINESE,
    "ten_scripts_and_emoji": SCRIPTS,
    "source_code": SOURCE_CODE,
    "crlf": "first line\r\nsecond line\r\n\r\n" * 60,
    "shorter_than_a_window": "A text of a few words, no more.",
}


BRIEF = SHORT | dict(ITERATIONS="2", SCORER="documents")


def often(name):
    """The kinds that each release is tried on; the others are slow."""
    fast = name in ("ten_scripts_and_emoji", "shorter_than_a_window")
    return pytest.param(name, marks=[] if fast else pytest.mark.slow)


@pytest.mark.parametrize("name", [often(name) for name in TEXTS])
@pytest.mark.usefixtures("no_picture")
def test_main_job_on_other_texts(name, tmp_path, capsys):
    (tmp_path / "in.txt").write_bytes(TEXTS[name].encode())
    data = tmp_path / "set"
    arguments = ["--input", str(tmp_path / "in.txt"), "--out", str(data), "--val-fraction", "0.3"]
    assert prepare_text.main(arguments) == 0
    run = run_here(tmp_path, "text", **BRIEF, DATA_PATH=str(data))
    check_scores(run, data)
    assert TEXTS[name].encode().endswith(validation_text(data).encode())


def validation_text(data):
    (source,) = data.glob("*_val.jsonl")
    lines = source.read_text(encoding="utf-8").split("\n")
    return "".join(json.loads(line)["text"] for line in lines if line)


@pytest.mark.usefixtures("no_picture")
def test_random_tokens_cost_ten_bits(vocab_1024, tmp_path):
    """No distribution is short on uniform tokens; the bound is the expected least code length
    minus four standard errors. Caches that add up to more than one go far below. What begins a
    document, each 40th token, is no matter of chance and does not count."""
    data = tmp_path / "noise"
    data.mkdir()
    (data / "tokenizer.model").write_bytes(vocab_1024.read_bytes())
    write_shard(data / "noise_train_000000.bin", random_stream(6000, 1024, seed=1))
    tokens = random_stream(6000, 1024, seed=2)
    tokens[::40] = train_gpt.BOS
    stream = write_shard(data / "noise_val_000000.bin", tokens)
    env = BRIEF | dict(ITERATIONS="8")
    run = run_here(tmp_path, "noise", **env, DATA_PATH=str(data))
    columns = run.arrays("scores.npz")
    assert len(columns["token"]) == len(train_gpt.read_shard(stream, 1024)) - 1
    for name in ("logp_model", "logp_final"):
        bits = -columns[name][columns["token"] != train_gpt.BOS] / math.log(2)
        assert bits.mean() > math.log2(1022) - 4 * bits.std() / math.sqrt(len(bits)), name


# -----------------------------------------------------------------------------
# The bytes under val_bpb, and what training has seen of the text


def prepared(folder, documents, model, val=None):
    """A data folder of these documents, by hand: their tokens as SentencePiece makes them."""
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(model)
    processor = prepare_text.load_tokenizer(folder / "tokenizer.model")
    for split, texts in (("train", documents * 9), ("val", val or documents)):
        stream = [token for text in texts for token in (1, *processor.encode(text))]
        write_shard(folder / f"x_{split}_000000.bin", stream)
    lines = [json.dumps({"text": text}) + "\n" for text in val or documents]
    (folder / "x_val.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def line_of(run, key):
    """The values of the last line of this key."""
    return [row for row in run.metrics() if row["key"] == key][-1]


LIGATURES = ["\u337f \ufdfa \xbd \u3314 in the plain text " * 20, "nothing to alter here " * 20]


@pytest.mark.parametrize("known", [True, False])
def test_altered_text_is_said_wherever_the_score_is(known, tmp_path):
    model = model_of("nothing to alter here in the plain text\n" * 9, byte_fallback=True)
    data = prepared(tmp_path / "set", LIGATURES, model)
    processor = prepare_text.load_tokenizer(data / "tokenizer.model")
    spelt = sum(len(processor.decode(processor.encode(text)).encode()) for text in LIGATURES)
    text = sum(len(text.encode()) for text in LIGATURES) if known else spelt
    if not known:
        (data / "x_val.jsonl").unlink()
    run = run_here(tmp_path, "x", **BRIEF, DATA_PATH=str(data))
    line = line_of(run, "val_text")
    assert (line["bytes"], line["lossy"], line["spelt_bytes"]) == (text, 1, spelt)
    assert any(line.startswith("note:LOSSY") for line in run.lines)
    columns = run.arrays("scores.npz")
    assert columns["bytes"].sum() == run.arrays("blocks.npz")["bytes"].sum() == spelt
    bits = -columns["logp_final"].sum() / math.log(2)
    assert run.val_bpb() == pytest.approx(bits / text, rel=1e-12)
    found = run_folder.submission(run_folder.RunFolder(run.folder))
    assert found["bytes"] == text and found["lossy"] is True and found["spelt_bytes"] == spelt
    assert run.submission() == json.loads(json.dumps(found))
    assert found["overlap_documents"] == 2


def test_spaces_spelt_in_bytes_count_one(tmp_path):
    """#897: each was three bytes, and the score three quarters of the true one."""
    documents = ["Hello world the cat sat on the mat " * 20, "the mat sat " * 20]
    words = "\n".join(" ".join(documents).split())
    how = dict(normalization_rule_name="identity", remove_extra_whitespaces=False)
    model = model_of(words, byte_fallback=True, add_dummy_prefix=False, **how)
    data = prepared(tmp_path / "set", documents, model)
    run = run_here(tmp_path, "x", **BRIEF, DATA_PATH=str(data))
    line = line_of(run, "val_text")
    assert line["bytes"] == sum(map(len, documents)) and "lossy" not in line
    assert run.arrays("scores.npz")["bytes"].sum() == line["bytes"]


def test_shared_documents_stand_in_log_and_submission(base, tmp_path, dataset):
    """In each log; what an artifact was trained on is not known."""
    assert line_of(base, "overlap")["documents"] == base.submission()["overlap_documents"] == 0
    assert line_of(base, "bytes_check")["tokens"] == line_of(base, "val_text")["tokens"]
    env = BRIEF | dict(DATA_PATH=str(dataset), EVAL_ONLY=str(base.folder / "artifact.bin"))
    again = run_here(tmp_path, "again", **env)
    assert "overlap documents:unknown" in again.lines
    assert again.submission()["overlap_documents"] is None


REFUSED = {  # what is wrong with the data -> (how it is made so, words of the message)
    "another tokenizer": (
        lambda data: (data / "dataset.json").write_text(
            json.dumps(dict(tokenizer_sha256="0" * 64))
        ),
        ["TOKENIZER_PATH", "tokenizer.model", "dataset.json", "fix"],
    ),
    "other shards": (
        lambda data: (data / "dataset.json").write_text(json.dumps(dict(val_tokens_sha256="00"))),
        ["DATA_PATH", "dataset.json", "fix"],
    ),
    "damaged": (lambda data: (data / "dataset.json").write_text("[]"), ["dataset.json", "fix"]),
    "other text": (
        lambda data: (data / "x_val.jsonl").write_text('{"text": "no such text"}\n'),
        ["x_val.jsonl", "TOKENIZER_PATH", "fix"],
    ),
    "unknown tokens": (
        lambda data: write_shard(data / "x_val_000000.bin", [1, 300, 3]),
        ["DATA_PATH", "1 of 3", "unknown", "fix"],
    ),
    "BOS id 2": (
        lambda data: (data / "tokenizer.model").write_bytes(model_of(CHINESE, bos_id=2, eos_id=1)),
        ["TOKENIZER_PATH", "BOS id 2", "fix"],
    ),
}


@pytest.mark.parametrize("overwrite", ["0", "1"])
@pytest.mark.parametrize("name", REFUSED)
def test_wrong_bytes_stop_a_run_before_training(name, overwrite, data, refusal, tmp_path):
    damage, words = REFUSED[name]
    folder = data(val=dict(tokens=[1, 300, 301]))
    damage(folder)
    line = refusal(variables(folder, OVERWRITE=overwrite))
    assert all(word in line for word in words), line
    log = tmp_path / "runs/bad/log.txt"
    assert not log.exists() or "step:" not in log.read_text(encoding="utf-8")
