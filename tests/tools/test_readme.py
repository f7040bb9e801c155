"""README's commands, pasted into a shell in a copy of the repository, and what the READMEs name."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, clean_environment

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in ("", "data/sample", "records", "tests/gpu")
    for path in (ROOT / folder).glob("**/README.md" if folder == "records" else "README.md")
)
INSTALLS = (
    r"python3 -m venv \.venv && \. \.venv/bin/activate && pip install -q -r requirements\.txt\n"
)
SMALL = {  # variables of every command, unless it sets them itself
    "DEVICE": "cpu",
    "ITERATIONS": "20",
    "WARMDOWN_ITERS": "10",
    "TRAIN_BATCH_TOKENS": "1024",
    "NUM_LAYERS": "2",
    "XSA_LAST_N": "1",
    "TRAIN_SEQ_LEN": "128",
}
HERE = {  # what README's reader has or fills in, and the test has not
    "FILE_OR_FOLDER": "README.md",
    "--vocab-size 1024 ": "--vocab-size 300 ",
    "python data/download_fineweb.py --train-shards 80\n": "",
    "--nproc_per_node=8": "--nproc_per_node=2",
    "runs/own_seed": "runs/tiny_seed",
    "--vocab-size 1024\n": "--vocab-size 300\n",
}


def blocks(heading: str, language: str = "bash") -> list[str]:
    """The ```bash blocks of a section; of the title: of the first screen."""
    section = re.split(rf"^#+ {re.escape(heading)}\n", README, flags=re.MULTILINE)[1]
    section = re.split(r"^#+ [A-Z]", section, flags=re.MULTILINE)[0]
    return re.findall(rf"^```{language}\n(.*?)^```", section, re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """The files that git knows or would add, with this environment as .venv."""
    folder = tmp_path_factory.mktemp("readme") / "checkout"
    command = ["git", "ls-files", "-co", "--exclude-standard", "-z"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.decode()
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():  # not one that was deleted
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    (folder / ".venv").symlink_to(sys.prefix)
    return folder


def paste(checkout: Path, shell: str) -> str:
    """What the lines print, standard error with it; each of them must succeed."""
    shell = re.sub(INSTALLS, "", shell)
    for name, here in HERE.items():
        shell = shell.replace(name, here)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", shell],
        cwd=checkout,
        env=clean_environment() | SMALL | {"PATH": path, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, f"{shell}\n{done.stdout[-3000:]}"
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_commands_as_they_are_pasted(checkout):
    """In README's order of use: each needs what those before it left behind."""
    out = paste(checkout, blocks("Parameter Golf, with scores that decode")[0])
    assert "val_bpb, the mixture" in out and "proof     none" in out
    out = paste(checkout, blocks("The main job")[0])
    assert "decoded:ok" in out and (checkout / "runs/tiny_seed1337/report.png").exists()
    out = paste(checkout, blocks("Check someone's score")[0])
    assert out.splitlines()[-1].startswith("PROVED val_bpb")
    out = paste(checkout, blocks("Check someone's score")[1])
    assert "final_ngram_exact" in out and (checkout / "runs/check/submission.json").exists()
    sample, compress = blocks("Text from the model")
    out = paste(checkout, sample)
    assert out.startswith("It was the") and "tokens/s" in out
    (program,) = blocks("Text from the model", "python")
    (checkout / "ten_lines.py").write_text(program, encoding="utf-8")
    written, nats = paste(checkout, "python ten_lines.py").rsplit("\n", 2)[:2]
    assert out.startswith(written) and float(nats.split()[0]) > 0
    out = paste(checkout, compress)
    assert "prose.txt.pgz -> prose.txt: 203,453 bytes" in out
    out = paste(checkout, blocks("Your own text")[0])
    assert "decoded:ok" in out and (checkout / "runs/mine/report.png").exists()
    out = paste(checkout, blocks("Published systems")[0])
    assert "final_ngram_pseudo pseudo_bpb:0." in out and "scheme:pr864" in out
    out = paste(checkout, blocks("I have 8 H100s")[0])
    (made,) = (checkout / "records").glob("track_cpu/*_Exact_n_grams")
    assert out.count("PROVED") >= 3 and (made / "train_gpt.py").exists()


def test_it_is_short():
    """Words of what one reads, commands and outputs included."""
    assert len(README.split()) <= 2000 and not re.search("@[A-Z]+@", README)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    """Relative ones, of text and pictures."""
    text = (ROOT / page).read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", text)
    links = [link for link in links if not re.match(r"https?:", link)]
    assert [link for link in links if not ((ROOT / page).parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES)
def test_programs_are_where_they_are_said_to_be(page):
    """Every path of a program, in commands and in sentences."""
    text = (ROOT / page).read_text(encoding="utf-8")
    named = set(re.findall(r"\b(?:records|tests|data)/[\w/]+\.(?:py|sh)\b", text))
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
