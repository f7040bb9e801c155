"""Broken input: properties of every reader, and a short run of fuzz.py, which must notice whatever
a reader can do wrong."""

import errno
import io
import json
import re
import tempfile
from types import SimpleNamespace

import as_written
import compress
import hostile
import numpy as np
import plot
import pytest
import run_folder
import stats
import submit
import zstandard
from helpers import ROOT, launch, model_of, tiny, train_gpt
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from run_folders import make_run, write_log

import prepare_text

FUZZ = ROOT / "tests/stress/fuzz.py"
KINDS = re.findall(r'^ {4}"(\w+)": Kind\(', FUZZ.read_text(), re.MULTILINE)
PREFIX = b"PREFIX\x01"
FEW = settings(
    deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
numbers = st.integers(-(2**63), 2**63) | st.floats() | st.sampled_from([2**31, 2**62, -1, 0, 1])
json_values = st.recursive(
    st.none() | st.booleans() | numbers | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=12,
)


def plain(tree):
    """As JSON gives it back, with NaN as text, which is equal to itself."""
    return json.loads(json.dumps(tree), parse_constant=str)


# -----------------------------------------------------------------------------
# Readers of train_gpt.py


@FEW
@given(header=json_values, payload=st.binary(max_size=60), data=st.data())
def test_sealed_bytes_are_read_or_refused(header, payload, data):
    sealed = train_gpt.seal(PREFIX, header, payload)
    found, rest = train_gpt.unseal(PREFIX, sealed)
    assert (plain(found), rest) == (plain(header), payload)
    place = data.draw(st.integers(0, len(sealed) - 1))
    change = data.draw(st.binary(max_size=4))
    damaged = sealed[:place] + change + sealed[place + data.draw(st.integers(0, 4)) :]
    if damaged != sealed:
        with pytest.raises(ValueError, match="damaged|begin"):
            train_gpt.unseal(PREFIX, damaged)


@FEW
@given(
    fields=st.tuples(st.just(20240520) | st.integers(-(2**31), 2**31 - 1), st.integers(0, 2)),
    more=st.sampled_from([0, 0, 0, 1, -1, 2**30]),
    tokens=st.lists(st.integers(0, 600), max_size=30),
    odd=st.booleans(),
)
def test_shards_are_read_or_refused(fields, more, tokens, odd, tmp_path):
    header = np.zeros(256, "<i4")
    header[:3] = *fields, len(tokens) + more
    path = tmp_path / "x_val_000000.bin"
    path.write_bytes(header.tobytes() + np.array(tokens, "<u2").tobytes() + b"\0" * odd)
    right = fields == (20240520, 1) and tokens and not more and not odd and max(tokens) < 512
    if right:
        assert train_gpt.read_shard(path, 512).tolist() == tokens
    else:
        with pytest.raises(train_gpt.UserError, match=path.name):
            train_gpt.read_shard(path, 512)


@FEW
@given(
    name=st.sampled_from([*train_gpt.VARIABLES]),
    text=st.text(max_size=12) | numbers.map(str) | st.just("9" * 5000),
)
def test_every_text_of_a_variable_is_a_value_in_bounds_or_refused_by_name(name, text):
    default = train_gpt.VARIABLES[name].default
    try:
        value = train_gpt.parse(name, text)
    except train_gpt.ConfigError as error:
        assert str(error).startswith(f"{name}=")
        return
    assert type(value) is type(default)
    if type(value) in (int, float):
        assert train_gpt.SETTINGS[name].least <= value <= train_gpt.SETTINGS[name].most


# -----------------------------------------------------------------------------
# Readers of records/ and data/


@FEW
@given(lines=st.lists(json_values.map(json.dumps) | st.text(max_size=30), max_size=6))
def test_log_lines_have_a_key_or_are_passed_over(lines, tmp_path):
    text = "\n".join(lines)
    (tmp_path / "metrics.jsonl").write_text(text, encoding="utf-8", errors="replace")
    run = run_folder.RunFolder(tmp_path)
    assert all(isinstance(line["key"], str) for line in run.lines)
    with pytest.raises(run_folder.RunError, match=tmp_path.name):
        run_folder.write(run)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_nested_lines_and_bytes_that_are_no_text(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("[" * 100_000 + '\n{"key":"a"}')
    assert [line["key"] for line in run_folder.RunFolder(tmp_path).lines] == ["a"]
    path.write_bytes(b'{"key":"\xff"}')
    with pytest.raises(run_folder.RunError, match="metrics.jsonl is damaged"):
        run_folder.RunFolder(tmp_path)


@FEW
@given(
    columns=st.dictionaries(
        st.sampled_from(["logp_model", "bytes", "x"]),
        st.lists(st.floats(allow_nan=False) | st.integers(-(2**40), 2**40), min_size=1, max_size=9),
        min_size=1,
    )
)
def test_columns_are_those_of_numpy(columns):
    np.savez(buffer := io.BytesIO(), **{name: np.array(column) for name, column in columns.items()})
    found = run_folder.read_columns(buffer.getvalue())
    with np.load(io.BytesIO(buffer.getvalue()), allow_pickle=False) as file:
        assert {name: column.dtype for name, column in found.items()} == {
            name: file[name].dtype for name in file
        }
        assert all(np.array_equal(found[name], file[name]) for name in file)


@FEW
@given(data=st.binary(max_size=80) | json_values.map(lambda x: json.dumps(dict(text=x)).encode()))
def test_json_lines_are_documents_or_refused_by_name(data, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(data)
    try:
        documents = prepare_text.read_documents([path], "")
    except prepare_text.DataError as error:
        assert path.name in str(error) and "\n" not in str(error)
        return
    lines = data.decode("utf-8-sig").split("\n")
    lines = [json.loads(line) for line in lines if line.strip()]
    assert documents == [line["text"] for line in lines if line["text"]]


def test_nested_json_line_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text("[" * 100_000)
    with pytest.raises(prepare_text.DataError, match="line 1"):
        prepare_text.read_documents([tmp_path / "a.jsonl"], "")


@FEW
@given(header=json_values | st.just({"made": {"device": 3}}), payload=st.binary(max_size=20))
def test_signed_containers_that_say_anything(header, payload):
    packed = train_gpt.seal(compress.PREFIX, header, payload)
    with pytest.raises(compress.UserError, match="a.pgz"):
        compress.device_of(packed, "a.pgz")


@FEW
@given(data=st.binary(max_size=60))
def test_settings_are_pairs_or_refused_by_name(data, tmp_path):
    path = tmp_path / "config.env"
    path.write_bytes(data)
    try:
        pairs = train_gpt.read_pairs(path)
    except train_gpt.ConfigError as error:
        assert str(path) in str(error)
        return
    text = "\n".join(data.decode().splitlines())
    assert all(name in text and value in text for name, value in pairs.items())


def test_variables_that_are_no_utf_8_are_refused():
    with pytest.raises(train_gpt.ConfigError, match="RUN_ID=.*UTF-8"):
        train_gpt.Config.from_env(dict(RUN_ID="a\udcff", DEVICE="cpu"))


# -----------------------------------------------------------------------------
# What is no file, asks for too much, or leads elsewhere

TOKENIZER = model_of("one two three four five six seven eight nine ten " * 20, 40)
NO_FILES = {  # none of these has an end, or bytes to give
    name: hostile.PLACES[name]
    for name in ("pipe", "socket", "folder", "link to /dev/zero", "link to itself", "dangling link")
} | {"sparse, 40 GB": hostile.PLACES["sparse, 40 GB"], "empty": hostile.PLACES["empty"]}


@pytest.fixture(autouse=True)
def one_gigabyte(monkeypatch):
    """Is free on every machine."""
    monkeypatch.setattr(train_gpt, "available_memory", lambda: 10**9)


no_files = pytest.mark.parametrize("make", NO_FILES.values(), ids=NO_FILES)


def line_of(capsys):
    """What a tool said: one line, and nothing that moves a cursor"""
    (line,) = capsys.readouterr().err.splitlines()
    assert train_gpt.printable(line) == line
    return line


@no_files
def test_a_tokenizer_is_a_file(make, tmp_path):
    path = tmp_path / "tokenizer.model"
    make(path)
    with pytest.raises(train_gpt.UserError, match="TOKENIZER_PATH.*tokenizer.model"):
        train_gpt.load_tokenizer(path, 0)


def test_a_tokenizer_may_be_a_link_of_the_user(tmp_path):
    (tmp_path / "kept").write_bytes(TOKENIZER)
    (tmp_path / "tokenizer.model").symlink_to(tmp_path / "kept")
    assert train_gpt.load_tokenizer(tmp_path / "tokenizer.model", 0).vocab_size() > 9


@no_files
def test_an_artifact_to_score_is_a_file(make, tmp_path):
    path = tmp_path / "artifact.bin"
    make(path)
    with pytest.raises(train_gpt.UserError, match="artifact.bin"):
        train_gpt.load_artifact(path, "cpu", train_gpt.read_eval_only(tiny(eval_only=str(path))))


@no_files
@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
def test_a_checkpoint_is_two_files(make, suffix, tmp_path):
    for other in (".json", ".safetensors"):
        (tmp_path / f"step_00000001{other}").write_bytes(b"{}")
    path = tmp_path / f"step_00000001{suffix}"
    path.unlink()
    make(path)
    with pytest.raises(train_gpt.DamagedCheckpoint):
        train_gpt.read_checkpoint(path.with_suffix(".json"))


@no_files
def test_settings_are_a_file(make, tmp_path):
    path = tmp_path / "config.env"
    make(path)
    if path.is_file():
        path.write_bytes(b"\n" * (train_gpt.MOST_TEXT_BYTES + 1))
    with pytest.raises(OSError, match="config.env"):
        train_gpt.read_pairs(path)


@pytest.mark.parametrize("how", sorted(NO_FILES.keys() - {"empty"}))  # a log may still be empty
def test_statistics_and_pictures_are_of_files(how, tmp_path, capsys):
    """Whatever lies there in the place of one; a picture needs no blocks, which may be missing."""
    for name in ("metrics.jsonl", "blocks.npz"):
        folder = make_run(tmp_path / name.partition(".")[0])
        (folder / name).unlink()
        NO_FILES[how](folder / name)
        for main in (stats.main, plot.main):
            if main is stats.main or name == "metrics.jsonl" or (folder / name).exists():
                assert main([str(folder)]) == 2
                assert str(folder) in line_of(capsys)


def test_more_than_the_memory_is_not_read(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(bytes(1000))
    monkeypatch.setattr(train_gpt, "available_memory", lambda: 1000 * train_gpt.COPIES)
    assert train_gpt.read_regular(path) == bytes(1000)
    monkeypatch.setattr(train_gpt, "available_memory", lambda: 1000 * train_gpt.COPIES - 1)
    with pytest.raises(OSError, match="memory.*file") as raised:
        train_gpt.read_regular(path)
    assert raised.value.errno == errno.ENOMEM


def test_zeros_are_no_weights():
    """A consistent artifact of a few kilobytes that unpacks to 40 MB."""
    header = train_gpt.artifact_header(tiny(bigram_vocab_size=10**6, bigram_dim=32))
    assert header["size"] > train_gpt.MOST_BYTES
    packed = zstandard.ZstdCompressor().compress(bytes(header["size"]))
    sealed = train_gpt.seal(train_gpt.ARTIFACT_PREFIX, header, packed)
    with pytest.raises(train_gpt.ArtifactError, match="bytes in .* packed ones"):
        train_gpt.load_artifact("artifact.bin", "cpu", sealed)


@pytest.mark.parametrize("how", hostile.NPZ)
def test_hostile_archives_are_no_columns(how, monkeypatch):
    monkeypatch.setattr(hostile, "BOMB_BYTES", 10**7)
    np.savez(buffer := io.BytesIO(), bytes=np.arange(9), logp_model=np.ones(9))
    data = hostile.NPZ[how](np.random.default_rng(0), buffer.getvalue())
    with pytest.raises(ValueError, match="twice|members|claim"):
        run_folder.read_columns(data)


def test_a_log_has_so_many_lines(tmp_path, capsys):
    """16 MB of empty ones would be 900 MB of strings."""
    folder = make_run(tmp_path / "run")
    with open(folder / "metrics.jsonl", "ab") as file:
        file.write(b"\n" * (train_gpt.MOST_LOG_LINES + 1))
    for main in (run_folder.main, stats.main, plot.main):
        assert main([str(folder)]) == 2
        assert "lines, at most" in line_of(capsys)


@pytest.mark.parametrize("main", [stats.main, submit.main])
@pytest.mark.parametrize("key", ["final_codec", "final_ngram_pseudo"])
def test_a_line_may_lack_its_numbers(key, main, tmp_path, capsys, monkeypatch):
    """Of a log that is somebody else's: one line, and nothing is made."""
    folder = make_run(tmp_path / "run")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = [line for line in lines if line["key"] != key]
    write_log(folder, [*kept, dict(key=key, value=None, decoded="ok")])
    for name in ("stream.bin", "log.txt"):
        (folder / name).write_bytes(b"x")
    run_folder.main([str(folder)])
    monkeypatch.setattr(stats, "verify", lambda folder: "PROVED on a text")
    about = ["--name", "x", "--author", "a", "--github-id", "a", "--out", str(tmp_path / "out")]
    status = main([str(folder), *(about if main is submit.main else ())])
    assert status == (0 if (main is stats.main) == (key == "final_codec") else 2)
    errors = [x for x in capsys.readouterr().err.splitlines() if not x.startswith("verifying")]
    assert len(errors) == (status == 2) and all(str(folder) in error for error in errors)
    assert status == 0 or not [*tmp_path.rglob("*_x")]


def test_a_text_without_lines_is_not_read_whole(tmp_path, monkeypatch):
    path = tmp_path / "x_val.jsonl"
    path.write_bytes(b'{"text": "a"}\n' + b" " * 50)
    monkeypatch.setattr(train_gpt, "MOST_LINE_BYTES", 60)
    assert [*train_gpt.read_texts([path])] == [b"a"]
    monkeypatch.setattr(train_gpt, "MOST_LINE_BYTES", 40)
    with pytest.raises(train_gpt.UserError, match="x_val.jsonl: line 2 .*fix:"):
        [*train_gpt.read_texts([path])]


def test_errors_move_no_cursor(tmp_path, capsys, monkeypatch):
    """A folder's name is somebody else's."""
    folder = tmp_path / "a\x1b[2K\rPROVED"
    folder.mkdir()
    monkeypatch.setattr("sys.argv", ["as_written.py", str(folder)])
    container = folder / "a.pgz"
    container.write_bytes(b"x")
    restore = ["--restore", str(container), "--artifact", str(folder / "artifact.bin")]
    for status in (as_written.main(), plot.main([str(folder)]), compress.main(restore)):
        assert status == 2
    for line in capsys.readouterr().err.split("\n"):
        assert train_gpt.printable(line) == line


def test_no_partial_name_is_followed(tmp_path, monkeypatch, capsys):
    """Of stats.py --verify, not even where a link waits under the names that are drawn first."""
    folder, canary = make_run(tmp_path / "run"), tmp_path / "canary"
    canary.write_text("mine")
    drawn = [f"{number:08}" for number in range(5)]
    monkeypatch.setattr(tempfile, "_get_candidate_names", lambda: iter(drawn))
    names = [f"{train_gpt.PARTIAL}{name}_verify.json" for name in drawn[:4]]
    for name in (".verify.json.partial", "verify.json", *names):
        (folder / name).symlink_to(canary)
    said = SimpleNamespace(stdout='{"verdict": "PROVED", "text": "a"}', stderr="", returncode=0)
    monkeypatch.setattr(stats.subprocess, "run", lambda *_, **__: said)
    assert stats.main([str(folder), "--verify"]) == 0
    assert canary.read_text() == "mine"
    assert json.loads((folder / "verify.json").read_text())["verdict"] == "PROVED"
    assert not (folder / "verify.json").is_symlink()


# -----------------------------------------------------------------------------
# The script


def test_mutations_are_explained(tmp_path):
    """The tool itself, without pictures and scoring, which are slow; 10,000 are fuzz.py."""
    kinds = [name for name in KINDS if not name.startswith(("plot", "score"))]
    arguments = ["--mutations", "220", "--jobs", "1", "--failures", tmp_path / "failures"]
    arguments += ["--kinds", ",".join(kinds)]
    done = launch(FUZZ, arguments, {}, 1, tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    together = next(line for line in done.stdout.splitlines() if line.startswith("together"))
    total, refused, equal, legal, unexplained = map(int, together.split()[1:6])
    assert total >= 200 and refused > 100 and equal and legal and not unexplained


SABOTAGE = """
import argparse, os, pathlib, subprocess, sys, time
import numpy as np
import helpers, fuzz

def hang(path):
  while True:
    time.sleep(0.1)

def deaf(path):
  try:
    hang(path)
  except fuzz.Hang:
    hang(path)

def memory(path):
  return np.ones(2**24).sum()

def hidden(path):
  try:
    return np.ones(2**40)
  except MemoryError as error:
    raise fuzz.run_folder.RunError("file: unreadable") from error

def litter(path):
  path.with_name("beside").write_bytes(b"x")
  return "original"

def cursor(path):
  return fuzz.command(lambda _: print("\x1b[2K") or 0)

def refuse(words):
  def read(path):
    raise fuzz.run_folder.RunError(words)
  return read

def once_changed(read):
  return lambda path: read(path) if path.read_bytes() != b"original" else "original"

READERS = dict(exception=lambda path: {}[0], leaves=sys.exit, crash=lambda path: os._exit(0),
  abort=lambda path: os.abort(), hang=hang, deaf=deaf, memory=memory, hidden=hidden,
  code=lambda path: str(subprocess.run(["true"])), nameless=refuse("wrong"),
  misread=lambda path: "other", refused=refuse("file: wrong"),
  equal=lambda path: "original", litter=litter, cursor=cursor)
fuzz.LIMIT_S, fuzz.GRACE_S = 1, 1

fuzz.KINDS = {name: fuzz.Kind("folder/file", 1, fuzz.mutate.flip, once_changed(read),
  fuzz.no_meaning, None) for name, read in READERS.items()}
base = pathlib.Path("base")
(base / "folder").mkdir(parents=True)
(base / "folder/file").write_bytes(b"original")
options = argparse.Namespace(mutations=1, kinds=[*READERS], seed=0, jobs=2,
  failures=pathlib.Path("failures"))
results = fuzz.fuzz(options, base.resolve())
print("found", sorted((result.kind, result.outcome) for result in results))
"""


def test_whatever_a_reader_does_wrong_is_noticed(tmp_path):
    (tmp_path / "sabotage.py").write_text(SABOTAGE)
    done = launch(tmp_path / "sabotage.py", [], {}, 1, tmp_path)
    assert done.returncode == 0, done.stderr
    wanted = dict(abort="crash", code="code", crash="crash", deaf="hang", equal="equal")
    wanted |= dict(exception="exception", hang="hang", hidden="memory", leaves="exception")
    wanted |= dict(
        cursor="exception",
        litter="litter",
        memory="memory",
        misread="misread",
        nameless="nameless",
        refused="refused",
    )
    assert done.stdout.splitlines()[-1] == f"found {sorted(wanted.items())}"
    kept = {path.name.split("_")[0] for path in (tmp_path / "failures").glob("*.txt")}
    assert kept == wanted.keys() - {"equal", "refused"}
