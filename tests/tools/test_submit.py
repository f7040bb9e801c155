"""submit.py: a folder in upstream's layout that runs, decodes and is proved on its own."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import run_folder
import submit
import verify
from helpers import ROOT, SHRUNK, clean_environment, cores, run_here, shared_folder, train_gpt
from run_folders import edit
from submit import stats

import prepare
import prepare_text

SMALL = SHRUNK | dict(SCORER="documents", EVAL_LANES="8", CODEC_TOKENS="-1", ITERATIONS="4")
SMALL |= dict(SAVE_SCORES="1", NGRAM_MIN_COUNT="3")
SEEDS = 7, 31
GIVEN = ["--name", "Exact n-grams!", "--author", "Ada Lovelace", "--github-id", "ada"]
FOLDER = "Exact_n_grams"


def without_picture(rt):
    """close_run, but for report.png, which takes seconds"""
    run_folder.write(run_folder.RunFolder(rt.folder))


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """-> (data, two finished runs that differ in the seed), once for all workers"""
    train, val = prepare.sample_documents()
    with shared_folder(tmp_path_factory, "submit_runs") as (cwd, empty):
        if empty:
            parts = [text[: 90 + 20 * i] for i, text in enumerate(val[:6])]  # a few hundred tokens
            prepare_text.write_dataset(train[:40], parts, cwd / "data", "prose", 512)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(train_gpt, "close_run", without_picture)
                for seed in SEEDS:
                    run_here(
                        cwd, f"seed{seed}", **SMALL, SEED=str(seed), DATA_PATH=str(cwd / "data")
                    )
    return cwd / "data", [cwd / "runs" / f"seed{seed}" for seed in SEEDS]


@pytest.fixture(autouse=True)
def verdicts(monkeypatch, request):
    """What verify.py says of every folder, unless a test wants the real one"""
    if "real_verdicts" not in request.fixturenames:
        monkeypatch.setattr(stats, "verify", lambda folder: "PROVED on a text")


@pytest.fixture
def runs(made, tmp_path):
    """Copies, to be spoilt"""
    return [shutil.copytree(path, tmp_path / "runs" / path.name) for path in made[1]]


def call(out, runs, *arguments, given=GIVEN):
    return submit.main([*map(str, runs), "--out", str(out), *given, *arguments])


@pytest.fixture
def refused(capsys, tmp_path):
    """-> the error of runs that are no submission; nothing is made of them"""

    def refuse(runs, *arguments, given=GIVEN):
        out = tmp_path / "refused"
        before = sorted(out.rglob("*")) if out.exists() else []
        assert call(out, runs, *arguments, given=given) == 2
        lines = capsys.readouterr().err.splitlines()
        error, *more = [line for line in lines if not line.startswith("verifying ")]
        assert error.startswith("error: ") and not more
        assert (sorted(out.rglob("*")) if out.exists() else []) == before
        return error

    return refuse


@pytest.fixture
def built(capsys, tmp_path):
    """-> function that makes the folder, -> (folder, what was printed)"""

    def build(runs, *arguments, given=GIVEN):
        assert call(tmp_path / "out", runs, *arguments, given=given) == 0
        (folder,) = (tmp_path / "out").glob("track_*/*")
        return folder, capsys.readouterr().out

    return build


def read(folder):
    return json.loads((folder / "submission.json").read_text(encoding="utf-8"))


# -----------------------------------------------------------------------------
# The folder, on its own


def shell(folder, text, **env):
    """Lines of the README, as they stand, in a folder that is not the checkout's, on one core."""
    programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environ = clean_environment() | {"PATH": programs, "PYTHONDONTWRITEBYTECODE": "1"} | env
    environ.pop("PYTHONPATH", None)
    with cores(1):
        how = dict(cwd=folder, env=environ, capture_output=True, text=True, timeout=240)
        done = subprocess.run(["bash", "-euo", "pipefail", "-c", text], **how)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]


def test_the_folder_runs_and_decodes_on_its_own(made, built, tmp_path):
    """Its README's lines as they stand: the same artifact and scores; the text. One seed:
    seconds."""
    data, runs = made
    folder = shutil.move(built(runs[1:])[0], tmp_path / "alone")
    seed = SEEDS[1]
    run, decode = re.findall(r"```bash\n(.*?)```", (folder / "README.md").read_text(), re.S)
    before = {path.name for path in folder.iterdir()}
    shell(folder, run, DATA_PATH=str(data))
    new = {path.name for path in folder.iterdir()} - before
    assert new == {f"rerun_seed{seed}.log", "runs"}
    for name, there in {"artifact.bin": f"seed_{seed}", "train_gpt.py": ""}.items():
        again = (folder / f"runs/seed_{seed}" / name).read_bytes()
        assert again == (folder / there / name).read_bytes(), name
    lines = [
        [line for line in path.read_text().splitlines() if re.match("final_(ngram_ex|codec)", line)]
        for path in (folder / f"rerun_seed{seed}.log", folder / f"train_seed{seed}.log")
    ]
    assert lines[0] == lines[1] and len(lines[0]) == 2
    shell(folder, decode)
    (shard,) = data.glob("*_val_*.bin")
    decoded = np.load(folder / f"seed_{seed}/decoded.npy")
    assert np.array_equal(decoded, train_gpt.read_shard(shard, 512))


def test_its_seeds_are_proved(made, built, monkeypatch):
    """By the checks that a proof consists of"""
    folder, _ = built(made[1])
    monkeypatch.setenv("DATA_PATH", str(made[0]))
    rows = list(verify.examine(verify.Case(folder / f"seed_{SEEDS[0]}")))
    assert verify.verdict(rows)[1] == "PROVED", rows


def test_layout_and_claims(made, built):
    folder, text = built(made[1])
    parts = [read(path) for path in made[1]]
    date = max(part["date"] for part in parts)[:10]
    assert folder.parent.name == "track_cpu" and folder.name == f"{date}_{FOLDER}"
    assert len(list(folder.rglob("train_gpt.py"))) == 1
    names = {path.name for path in folder.iterdir()}
    assert names == {
        *("README.md", "submission.json", "train_gpt.py", "config.env", "requirements.txt"),
        train_gpt.PACKED_NAME,
        *(
            f"{kind}{seed}{end}"
            for seed in SEEDS
            for kind, end in (("seed_", ""), ("train_seed", ".log"))
        ),
    }
    assert "note: 2 seeds" in text and "PROVED on a text" in (folder / "README.md").read_text()
    found = read(folder)
    for name in ("val_loss", "val_bpb"):
        values = [part[name] for part in parts]
        assert found[name] == pytest.approx(np.mean(values), rel=1e-12)
        assert found[f"{name}_std"] == pytest.approx(np.std(values, ddof=1), rel=1e-9)
        assert found["stages"]["ngram"][name] == found[name]
    assert found["seeds"] == [*SEEDS]
    assert [found["author"], found["github_id"]] == GIVEN[3::2]
    for part, path in zip(parts, made[1], strict=True):
        (seed,) = part["seeds"]
        assert found["seed_results"][str(seed)] == part["seed_results"][str(seed)]
        assert found["sha256"]["artifact"][str(seed)] == part["sha256"]["artifact"]
        for kept in (folder / f"seed_{seed}").iterdir():
            assert kept.read_bytes() == (path / kept.name).read_bytes()
        log = (folder / f"train_seed{seed}.log").read_bytes()
        assert log == (path / "log.txt").read_bytes()
    assert found["bytes_total"] == max(part["bytes_total"] for part in parts)
    packed = (folder / train_gpt.PACKED_NAME).read_bytes()
    assert packed == train_gpt.pack_script((folder / "train_gpt.py").read_bytes())
    assert found["bytes_code"] == len(packed) and found["over_cap"] is False
    assert found["wallclock_seconds"] == max(part["wallclock_seconds"] for part in parts)
    assert "problems" not in found and "Not a valid" not in (folder / "README.md").read_text()


def test_settings_of_the_command(made, built):
    """In config.env what is not a default, each once; in the command seed and tokenizer."""
    folder, _ = built(made[1])
    lines = (folder / "config.env").read_text(encoding="utf-8").splitlines()[1:]
    given = train_gpt.read_record(folder / "config.env")
    assert len(given) == len(lines)
    names = ("MODEL_DIM", "ITERATIONS", "EVAL_LANES", "SCORER", "CODEC_TOKENS", "NGRAM_MIN_COUNT")
    for name in (*names, "TARGET_BYTES"):
        assert given[name] == (SMALL | dict(TARGET_BYTES="0"))[name]
    assert not {"SEED", "RECORD", "DATA_PATH", "LEAKY_SLOPE"} & given.keys()
    for name, text in given.items():
        assert train_gpt.parse(name, text) is not None
    command = dict(re.findall(r"([A-Z_0-9]+)=(\S+)", (folder / "README.md").read_text()))
    assert command["TOKENIZER_PATH"] == f"seed_{SEEDS[0]}/tokenizer.model"
    assert not {"RECORD", "DATA_PATH"} & command.keys()


def test_the_folder_is_a_record(made, built, tmp_path, monkeypatch, capsys):
    """In a checkout: by its name, and in the table of --help."""
    folder, _ = built(made[1])
    shutil.copytree(folder.parent, tmp_path / "records" / folder.parent.name)
    monkeypatch.setattr(train_gpt, "ROOT", tmp_path)
    cfg = train_gpt.Config.from_env(dict(RECORD=folder.name))
    assert (cfg.model_dim, cfg.ngram_min_count) == (64, 3)
    train_gpt.print_help()
    assert "Exact n-grams!, seeds of one configuration." in capsys.readouterr().out


def test_the_same_runs_give_the_same_folder(made, built):
    def contents(folder):
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        return {str(path.relative_to(folder)): path.read_bytes() for path in files}

    first = contents(built(made[1])[0])
    assert contents(built(made[1][::-1], "--overwrite")[0]) == first


def test_one_seed(made, built):
    folder, text = built(made[1][:1])
    found = read(folder)
    assert found["val_bpb_std"] is None and found["seeds"] == [SEEDS[0]]
    assert "one seed" in (folder / "README.md").read_text() and "note: 1 seeds" in text


def test_options(made, built):
    folder, _ = built(
        made[1],
        "--scores",
        "--blurb",
        "Two words.",
        "--date",
        "2026-01-02",
        "--track",
        "non_record_16mb",
    )
    assert folder.parent.name == "track_non_record_16mb" and folder.name.startswith("2026-01-02_")
    assert (
        read(folder)["blurb"] == "Two words." and "Two words." in (folder / "README.md").read_text()
    )
    assert (folder / f"seed_{SEEDS[1]}/scores.npz").exists()


# -----------------------------------------------------------------------------
# Refusals


def unfinished(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    kept = [line for line in lines if "final_budget" not in line]
    (folder / "metrics.jsonl").write_text("\n".join(kept) + "\n")


def slow(folder):
    path = folder / "metrics.jsonl"
    path.write_text(re.sub(r'"eval_seconds": [\d.]+', '"eval_seconds": 700.5', path.read_text()))


def untrained(folder):
    path = folder / "metrics.jsonl"
    kept = [line for line in path.read_text().splitlines() if '"train_loss"' not in line]
    path.write_text("\n".join(kept) + "\n")


def append(folder, **line):
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")


SPOILT = {  # what is done to the second run -> words of the refusal, does --force leave it out
  "unfinished": (unfinished, "no final_budget", True),
  "slow": (slow, "eval_seconds 700.5, the cap is 600", False),
  "untrained": (untrained, "no training (EVAL_ONLY)", False),
  "unproved": (lambda f: (f / "stream.bin").unlink(), "no stream.bin", False),
  "undecoded": (lambda f: append(f, key="final_codec", decoded="FAILED"), "decoded:FAILED", False),
  "unmarked": (lambda f: (f / "submission.json").unlink(), "no submission.json", False),
  "unlogged": (lambda f: (f / "log.txt").unlink(), "no log.txt", False),
  "tampered": (lambda f: edit(f / "submission.json", read(f)["sha256"]["code"], "0" * 64),
    "submission.json is of another train_gpt.py", False),
}  # fmt: skip


@pytest.mark.parametrize("name", SPOILT)
def test_what_is_no_submission(name, runs, refused, built):
    spoil, words, left_out = SPOILT[name]
    spoil(runs[1])
    error = refused(runs)
    assert words in error and str(runs[1]) in error and str(runs[0]) not in error
    folder, _ = built(runs, "--force")
    page = (folder / "README.md").read_text()
    assert "**Not a valid submission:**" in page and words in page
    assert any(words in what for what in read(folder)["problems"])
    assert (folder / f"seed_{SEEDS[1]}").exists() != left_out


def test_over_the_cap(made, refused, built, monkeypatch):
    total = min(read(path)["bytes_total"] for path in made[1])
    for module in (stats, submit, train_gpt):
        monkeypatch.setattr(module, "CAP_BYTES", total - 1)
    assert "the cap is" in refused(made[1])
    assert read(built(made[1], "--force")[0])["over_cap"] is True


@pytest.mark.parametrize("text", ["{", "[]", '{"sha256": 5}'])
def test_a_damaged_submission_is_named(text, runs, refused):
    (runs[1] / "submission.json").write_text(text)
    error = refused(runs, "--force")
    assert f"{runs[1]}: damaged" in error


def test_an_author_is_needed(made, refused, built, monkeypatch):
    error = refused(made[1], given=GIVEN[:2])
    assert "no --author" in error and "no --github-id" in error
    monkeypatch.setenv("AUTHOR", "Grace")
    monkeypatch.setenv("GITHUB_ID", "grace")
    assert read(built(made[1], given=GIVEN[:2])[0])["author"] == "Grace"


@pytest.mark.parametrize("verdict", ["FAILED (failed: decode)", "CONSISTENT, NOT PROVED (x)"])
def test_what_is_not_proved_is_no_submission(verdict, made, refused, built, monkeypatch):
    monkeypatch.setattr(stats, "verify", lambda folder: verdict)
    assert refused(made[1]).count(f"verify.py says {verdict}") == 2
    again = "CONSISTENT, NOT PROVED (not checked: decode; the artifact scores the same here)"
    assert stats.holds(again) and not stats.holds(f"verify.json: {again}")
    forged = dict(verdict="FAILED", why="x; the artifact scores the same here", rescored_val_bpb=1)
    assert not stats.holds(stats.verdict(forged))
    folder, _ = built(made[1], "--force")
    assert verdict in (folder / "README.md").read_text()


@pytest.fixture
def real_verdicts(made, monkeypatch):
    """Those of verify.py"""
    monkeypatch.setenv("DATA_PATH", str(made[0]))


def test_a_forged_verdict_is_not_believed(runs, refused, real_verdicts):
    """A better score in all of the folder's files, and a verify.json that fits them."""
    for run in runs:
        path = run / "metrics.jsonl"
        path.write_text(re.sub(r'"val_bpb": [\d.]+', '"val_bpb": 0.5', path.read_text()))
        train_gpt.write_submission(run)
        result = dict(verdict="PROVED", why="", text="the embedded text", sha256=stats.marks(run))
        (run / "verify.json").write_text(json.dumps(result))
    error = refused(runs)
    assert error.count("verify.py says FAILED") == 2


def test_a_run_that_changes_meanwhile_is_refused(runs, tmp_path, monkeypatch, capsys):
    def swap(run):
        (run.folder.path / "stream.bin").write_bytes(b"another")
        return "PROVED on a text"

    monkeypatch.setattr(stats, "verify", swap)
    assert call(tmp_path / "out", runs) == 2
    assert "changed since it was verified" in capsys.readouterr().err
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


def test_files_that_cannot_be_pushed(made, refused, monkeypatch):
    monkeypatch.setattr(submit, "GITHUB_FILE_BYTES", 100_000)
    error = refused(made[1])
    assert error.count("artifact.bin: over 100,000 bytes, too large to be pushed") == 2


@pytest.mark.parametrize("force", [[], ["--force"]])
def test_two_configurations_are_never_one_submission(force, runs, refused):
    edit(runs[1] / "config.env", "MATRIX_LR=0.025", "MATRIX_LR=0.03")
    assert "MATRIX_LR is 0.025 in" in refused(runs, *force)
    assert "SEED is 7 in" in refused([runs[0], runs[0]], *force)
    assert "no metrics.jsonl" in refused([ROOT], *force)


def test_a_folder_that_is_there_is_kept(made, built, refused, tmp_path):
    folder, _ = built(made[1], "--blurb", "old")
    out = ["--out", str(tmp_path / "out")]
    assert f"{folder}: is there already" in refused(made[1], *out, "--blurb", "new")
    assert read(folder)["blurb"] == "old"
    assert read(built(made[1], "--blurb", "new", "--overwrite")[0])["blurb"] == "new"
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_what_cannot_be_built_leaves_the_old(made, built, refused, tmp_path, monkeypatch):
    folder, _ = built(made[1], "--blurb", "old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(submit, "readme", full)
    out = ["--out", str(tmp_path / "out"), "--overwrite"]
    assert "No space" in refused(made[1], *out, "--blurb", "new")
    assert read(folder)["blurb"] == "old" and len([*folder.parent.iterdir()]) == 1


@pytest.mark.parametrize("name, date", [("!!", "2026-01-02"), ("fine", "yesterday")])
def test_names_that_are_no_folder(name, date, made, refused):
    assert "must be a name" in refused(made[1], given=["--name", name, *GIVEN[2:], "--date", date])


# -----------------------------------------------------------------------------
# Several ranks


def test_the_command_of_eight_ranks(runs):
    for run in runs:
        edit(run / "metrics.jsonl", '"1 x cpu x86_64"', '"8 x NVIDIA H100 80GB HBM3"')
    text = submit.command([stats.load(run) for run in runs])
    assert "torchrun --standalone --nproc_per_node=8 train_gpt.py |" in " ".join(
        line.strip(" \\") for line in text.splitlines()
    )
    assert max(map(len, text.splitlines())) <= 100


def test_part_of_the_text_is_said(runs):
    for run in runs:
        edit(run / "metrics.jsonl", '"proved_tokens": ', '"proved_tokens": 9, "before": ')
    loaded = [stats.load(run) for run in runs]
    assert submit.proof_note(loaded).startswith("9 of the text's ")
