"""run_folder.py: a finished run folder becomes submission.json; others are refused."""

import hashlib
import io
import json
import math
import subprocess
import sys
import warnings
import zipfile

import numpy as np
import pytest
import run_folder
from helpers import ROOT, train_gpt
from run_folders import (
    ARTIFACT,
    BLOCKS,
    CODE,
    TOKENIZER,
    all_lines,
    exact,
    make_run,
    write_log,
)

NUMBER = (int, float)
MAYBE_INT = (int, type(None))
SCHEMA = {
    "author": str,
    "github_id": str,
    "name": str,
    "blurb": str,
    "date": str,
    "track": str,
    "val_loss": float,
    "val_bpb": float,
    "bytes_total": int,
    "bytes_code": int,
    "over_cap": bool,
    "over": list,
    "seeds": list,
    "seed_results": dict,
    "hardware": str,
    "pytorch_version": str,
    "step_stop": MAYBE_INT,
    "wallclock_seconds": NUMBER,
    "eval_time_seconds": NUMBER,
    "tokens": MAYBE_INT,
    "bytes": int,
    "sha256": dict,
    "stages": dict,
}
SEED_SCHEMA = {
    "val_loss": float,
    "val_bpb": float,
    "artifact_bytes": int,
    "steps": MAYBE_INT,
    "step_avg_ms": (float, type(None)),
}


def submit(folder):
    assert run_folder.main([str(folder)]) == 0
    return json.loads((folder / "submission.json").read_text(encoding="utf-8"))


@pytest.fixture
def run_dir(tmp_path):
    return make_run(tmp_path / "given")


def test_schema(run_dir):
    found = submit(run_dir)
    for name, kind in SCHEMA.items():
        assert isinstance(found[name], kind), name
    assert found.keys() - SCHEMA.keys() == {"codec", "pseudo", "ngram_gain"}
    assert found["seeds"] == [7] and found["seed_results"].keys() == {"7"}
    for name, kind in SEED_SCHEMA.items():
        assert isinstance(found["seed_results"]["7"][name], kind), name


def test_values_are_those_of_the_log(run_dir, monkeypatch):
    monkeypatch.setenv("AUTHOR", "Ada Lovelace")
    monkeypatch.setenv("GITHUB_ID", "ada")
    found = submit(run_dir)
    assert (found["author"], found["github_id"], found["name"]) == ("Ada Lovelace", "ada", "given")
    assert found["val_bpb"] == found["stages"]["ngram"]["val_bpb"] == 1.7123456789012345
    assert found["seed_results"]["7"]["val_bpb"] == found["val_bpb"]
    assert found["step_stop"] == found["seed_results"]["7"]["steps"] == 600
    assert found["seed_results"]["7"]["step_avg_ms"] == 270.5
    assert (found["wallclock_seconds"], found["eval_time_seconds"]) == (162.3, 21.5)
    assert found["bytes_total"] == len(CODE) // 3 + len(ARTIFACT) and not found["over_cap"]
    assert (found["tokens"], found["bytes"]) == (BLOCKS * 1024, BLOCKS * 2500)
    assert found["hardware"] == "1 x cpu x86_64" and found["pytorch_version"] == "2.13.0"


def test_stages_and_optional_lines_are_carried(run_dir):
    found = submit(run_dir)
    names = ["int6_roundtrip", "int6_sliding_window", "ngram_backoff", "ngram"]
    assert list(found["stages"]) == names
    assert found["stages"]["int6_sliding_window"]["stride"] == 64
    assert found["pseudo"]["pseudo_bpb"] == 0.28 and found["codec"]["decoded"] == "ok"
    assert [gain["order"] for gain in found["ngram_gain"]] == [1, 2, 3, 4]


def test_hashes_are_those_of_the_files(run_dir):
    names = {"code": CODE, "artifact": ARTIFACT, "tokenizer": TOKENIZER}
    expected = {name: hashlib.sha256(data).hexdigest() for name, data in names.items()}
    assert submit(run_dir)["sha256"] == expected


def test_writing_again_gives_the_same_bytes(run_dir):
    submit(run_dir)
    first = (run_dir / "submission.json").read_bytes()
    submit(run_dir)
    assert (run_dir / "submission.json").read_bytes() == first
    assert not list(run_dir.glob("*partial*")) and not list(run_dir.glob(".*partial*"))


def test_eval_only_run_has_no_steps(tmp_path):
    found = submit(make_run(tmp_path / "eval", all_lines(training=False)))
    result = found["seed_results"]["7"]
    assert found["step_stop"] is result["steps"] is result["step_avg_ms"] is None


def test_track_is_the_folder_of_the_record(tmp_path, monkeypatch):
    monkeypatch.setattr(train_gpt, "ROOT", tmp_path)
    for place in ("track_cpu/tinyer", "track_small/tiny", "track_10min_16mb/2026_pr"):
        (tmp_path / "records" / place).mkdir(parents=True)
        (tmp_path / "records" / place / "config.env").touch()
    assert train_gpt.find_track("tiny") == "small"
    assert train_gpt.find_track("tinye") == "cpu"
    assert train_gpt.find_track("") == train_gpt.find_track("other") == "10min_16mb"


def test_the_tiny_record_is_on_the_cpu_track(run_dir):
    assert submit(run_dir)["track"] == "cpu"


def test_over_the_cap_is_carried(run_dir, monkeypatch):
    monkeypatch.setattr(train_gpt, "CAP_BYTES", len(CODE) // 3 + len(ARTIFACT) - 1)
    assert submit(run_dir)["over_cap"] is True


def test_a_line_cut_off_by_a_kill_and_a_resume(run_dir):
    lines = [json.dumps(item) for item in all_lines()]
    torn = lines[:12] + [lines[12][:20]] + lines[8:]
    (run_dir / "metrics.jsonl").write_text("\n".join(torn) + "\n")
    assert submit(run_dir)["step_stop"] == 600


@pytest.mark.parametrize("missing", run_folder.FINAL_LINES)
def test_unfinished_run_is_refused(run_dir, capsys, missing):
    write_log(run_dir, (item for item in all_lines() if item["key"] != missing))
    assert run_folder.main([str(run_dir)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "unfinished" in error and missing in error
    assert not (run_dir / "submission.json").exists()


@pytest.mark.parametrize(
    "name", "metrics.jsonl config.env blocks.npz artifact.bin train_gpt.py tokenizer.model".split()
)
def test_missing_file_is_named(run_dir, capsys, name):
    (run_dir / name).unlink()
    assert run_folder.main([str(run_dir)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and name in error
    assert not (run_dir / "submission.json").exists()


def test_a_score_that_is_no_number_is_refused(run_dir, capsys):
    write_log(run_dir, [*all_lines(), exact("ngram", math.nan)])
    assert run_folder.main([str(run_dir)]) == 2
    assert "val_loss:nan" in capsys.readouterr().err


def test_a_stage_that_is_no_number_is_refused(run_dir, capsys):
    write_log(run_dir, [*all_lines(), exact("ttt", math.inf)])
    assert run_folder.main([str(run_dir)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_files_other_than_the_scored_ones_are_refused(run_dir, capsys):
    (run_dir / "artifact.bin").write_bytes(ARTIFACT + b"x")
    assert run_folder.main([str(run_dir)]) == 2
    assert "artifact.bin has 1025 bytes, its log says 1024" in capsys.readouterr().err


def test_one_refused_folder_does_not_stop_the_others(run_dir, tmp_path):
    assert run_folder.main([str(tmp_path / "nowhere"), str(run_dir)]) == 2
    assert (run_dir / "submission.json").exists()


def test_command_line_from_another_directory(run_dir, tmp_path):
    command = [sys.executable, ROOT / "records/tools/run_folder.py", run_dir.name]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert (run_dir / "submission.json").exists()


def test_a_table_of_equal_columns():
    rows = [["one", "1", "-"], ["twenty", "1,000,000", "µ"]]
    assert run_folder.markdown(["name", "bytes", "x"], rows).splitlines() == [
        "| name   |     bytes |   x |",
        "| ------ | --------: | --: |",
        "| one    |         1 |   - |",
        "| twenty | 1,000,000 |   µ |",
    ]
    assert run_folder.markdown(["a", "b"], [], left=2) == "| a   | b   |\n| --- | --- |"


# -----------------------------------------------------------------------------
# What a folder can do to its reader


@pytest.mark.parametrize("evil", ["\x1b[2K", "\r", "\n", "\u202e", "\ud800", "\x9b1A", "\u2028"])
def test_nothing_moves_the_cursor(evil):
    shown = train_gpt.printable(f"a{evil}b é 中")
    assert shown.isprintable() and shown.startswith("a\\") and shown.endswith("b é 中")
    shown.encode()


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "1", '{"a": 1, "a": 1}', '{"a": {"b": 1, "b": 2}}', "[" * 10**5, "\xff"]
)
def test_what_is_no_object_of_ours_is_refused(text):
    with pytest.raises(run_folder.RunError, match="x: damaged"):
        run_folder.parse_object(text.encode("latin-1"), "x")


def archive(members, how=zipfile.ZIP_DEFLATED):
    packed = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(packed, "w", how) as file:
        warnings.simplefilter("ignore")
        for name, content in members:
            file.writestr(name, content)
    return packed.getvalue()


def test_archives_that_claim_more_than_they_hold():
    """A member that stands twice, or many times; one that unpacks to a thousand times itself."""
    column = io.BytesIO()
    np.save(column, np.zeros(10))
    twice = archive([("a.npy", column.getvalue())] * 2, zipfile.ZIP_STORED)
    with pytest.raises(ValueError, match="twice"):
        run_folder.read_columns(twice)
    one = archive([("a.npy", column.getvalue())])
    with pytest.raises(ValueError, match="compressed"):
        run_folder.read_columns(one + bytes(2000))
    with pytest.raises(ValueError, match="claim 1000000"):
        run_folder.read_columns(archive([("a.npy", bytes(10**6))]))
