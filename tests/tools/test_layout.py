"""What lies where: results in records/, programs in records/tools/, each thing there once."""

import ast
import re
import signal
import subprocess
import sys
from collections import Counter

import pytest
from helpers import ROOT, clean_environment

TOOLS = sorted((ROOT / "records/tools").glob("*.py"))
PROGRAMS = [*TOOLS, ROOT / "data/download_fineweb.py", ROOT / "data/prepare_text.py"]
PROGRAMS += sorted((ROOT / "data/sample").glob("*.py"))
COMMANDS = [path for path in PROGRAMS if path.name != "checkout.py"]
NAMES = {path.stem for path in PROGRAMS} | {"train_gpt"}
TESTS = sorted((ROOT / "tests").rglob("test_*.py"))
LONGEST = 60  # lines of a function


def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path):
    """Modules that a file imports, at its top or anywhere else"""
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
    return found


def test_every_top_level_entry_has_its_room():
    programs = {path.relative_to(ROOT).parts for path in ROOT.glob("records/**/*.py")}
    assert {parts[:2] for parts in programs if parts[-1] != "train_gpt.py"} == {
        ("records", "tools")
    }
    assert [path.name for path in ROOT.glob("*.py")] == ["train_gpt.py"]
    assert [path.name for path in ROOT.glob("tests/test_*.py")] == ["test_smoke.py"]


def test_a_record_holds_one_script():
    folders = Counter(
        path.relative_to(ROOT).parts[:3] for path in ROOT.glob("records/track_*/**/train_gpt.py")
    )
    assert set(folders.values()) <= {1}


def test_the_path_of_imports_is_edited_once():
    """Tools reach the script by checkout.py, so no file is loaded under two names."""
    edits = {path.name for path in PROGRAMS if "sys.path" in path.read_text(encoding="utf-8")}
    assert edits == {"checkout.py", "prepare.py"}
    by_string = re.compile(r"^(?:from|import) (?:runpy|records)\b|^\s+import_module", re.MULTILINE)
    for path in [*PROGRAMS, *TESTS]:
        assert not by_string.search(path.read_text(encoding="utf-8")), path.name


@pytest.mark.parametrize(
    "name", ["table", "markdown", "write_atomically", "read_pairs", "RunError"]
)
def test_defined_once(name):
    """Table writer, atomic placing, NAME=value, errors"""
    kinds = ast.FunctionDef, ast.ClassDef
    found = [
        path.name
        for path in [ROOT / "train_gpt.py", *PROGRAMS]
        for node in tree(path).body
        if isinstance(node, kinds) and node.name == name
    ]
    assert len(found) <= 1, found


@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.stem)
def test_tests_do_not_import_each_other(path):
    assert not {module for module in imports(path) if module.startswith("test_")}


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
def test_rules_of_the_programs(path):
    """Short functions, all annotated, none of them public without a word; no assert for input."""
    for node in ast.walk(tree(path)):
        assert not isinstance(node, ast.Assert), f"{path.name}:{node.lineno}"
        if isinstance(node, ast.FunctionDef):
            place = f"{path.name}:{node.lineno} {node.name}"
            assert node.end_lineno - node.lineno < LONGEST, f"{place}: too long"
            given = [
                a for a in node.args.args + node.args.kwonlyargs if a.arg not in ("self", "cls")
            ]
            assert node.returns or node.name == "__init__", f"{place}: no type of its result"
            assert all(argument.annotation for argument in given), f"{place}: no types"


def test_signals_are_heard_in_one_way():
    """That of endings.py, which keeps to what the caller ignores; experiments.py must end runs."""
    own = {path.name for path in PROGRAMS if "signal.signal(" in path.read_text(encoding="utf-8")}
    assert own == {"experiments.py"}


@pytest.mark.parametrize(("number", "ignored"), [(signal.SIGHUP, False), (signal.SIGINT, True)])
@pytest.mark.parametrize("name", ["as_written", "compress", "plot", "sample"])
def test_a_signal_while_it_loads(name, number, ignored):
    """One line; none where the caller ignores it, as nohup and a shell's background do."""
    command = [sys.executable, "-v", ROOT / f"records/tools/{name}.py", "--help"]
    how = signal.SIG_IGN if ignored else signal.SIG_DFL
    running = subprocess.Popen(
        command,
        env=clean_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(number, how),
    )
    next(line for line in running.stderr if "import 'torch" in line)
    running.send_signal(number)
    out, err = running.communicate(timeout=60)
    assert running.returncode == (0 if ignored else 128 + number)
    assert out.startswith("usage: ") == ignored and "Traceback" not in err
    assert (err.splitlines()[-1] == "interrupted") != ignored


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: path.stem)
def test_help_from_anywhere(path, tmp_path):
    """As a process of its own: what the tests put on the path of imports does not help it."""
    command = [sys.executable, path, "--help"]
    env = clean_environment() | {"PYTHONPATH": ""}
    done = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("usage: ")
