"""The rules of style that a program can check, on the script and on the repository."""

import ast
import io
import re
import shutil
import statistics
import subprocess
import sys
import tokenize

import pytest
from helpers import ROOT, SCRIPT, launch

TEXT = SCRIPT.read_text(encoding="utf-8")
LINES = TEXT.splitlines()
TREE = ast.parse(TEXT)
FUNCTIONS = [
    node for node in ast.walk(TREE) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
]
DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def comment_lines():
    """Numbers of the lines that hold a comment and nothing else, and of those that hold one."""
    tokens = tokenize.generate_tokens(io.StringIO(TEXT).readline)
    found = [token.start for token in tokens if token.type == tokenize.COMMENT]
    return {line for line, column in found if not LINES[line - 1][:column].strip()}, {
        line for line, _ in found
    }


def docstring_lines():
    """Numbers of the lines of docstrings."""
    lines = set()
    for node in ast.walk(TREE):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            lines |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return lines


def code_lines():
    blank = {number for number, line in enumerate(LINES, 1) if not line.strip()}
    return set(range(1, len(LINES) + 1)) - blank - comment_lines()[0] - docstring_lines()


def length(function):
    return function.end_lineno - function.lineno + 1


def test_script_is_within_its_ceilings():
    assert len(code_lines()) <= 4500
    assert len(TEXT.encode()) <= 250_000
    assert max(map(len, LINES)) <= 100


def test_functions_are_short():
    lengths = sorted(map(length, FUNCTIONS))
    long = {node.name: length(node) for node in FUNCTIONS if length(node) > 40}
    assert statistics.median(lengths) <= 12
    assert len(long) <= len(lengths) / 10, long
    assert lengths[-1] <= 70, long


def test_main_is_a_story():
    (run,) = [node for node in TREE.body if getattr(node, "name", "") == "run"]
    assert length(run) <= 40


def test_functions_take_few_positional_parameters():
    for node in FUNCTIONS:
        names = [argument.arg for argument in node.args.posonlyargs + node.args.args]
        assert len([name for name in names if name not in ("self", "cls")]) <= 5, node.name


def test_comments_are_frequent_enough_and_not_too_frequent():
    """Lines with a comment or docstring, of all lines that are not blank."""
    filled = sum(bool(line.strip()) for line in LINES)
    share = len(comment_lines()[1] | docstring_lines()) / filled
    assert 0.10 <= share <= 0.30
    assert 0.03 <= len(comment_lines()[1]) / filled


def test_sections_are_in_order():
    """Banner, "# N. Title", one sentence; numbers rise, and the docstring lists them all."""
    banner = "# " + "-" * 77
    places = [number for number, line in enumerate(LINES) if line == banner]
    titles = [re.fullmatch(r"# (\d+)\. (.+)", LINES[place + 1]) for place in places]
    assert all(titles) and all(LINES[place + 2].startswith("# ") for place in places)
    numbers = [int(title[1]) for title in titles]
    assert numbers == sorted(set(numbers)) and len(numbers) >= 10
    docstring = " ".join(ast.get_docstring(TREE).split()).lower()
    for title in titles:
        assert f"{title[1]} {title[2].lower().split()[0]}" in docstring, title[0]


def test_public_functions_say_what_they_do():
    silent = [
        node.name
        for node in TREE.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        and length(node) > 12
        and not ast.get_docstring(node)
    ]
    assert not silent


def test_input_is_never_checked_by_assert():
    """Asserts say what cannot be; there are few."""
    assert sum(isinstance(node, ast.Assert) for node in ast.walk(TREE)) <= 10


def test_no_unfinished_notes():
    for path in [SCRIPT, *ROOT.glob("data/*.py"), *ROOT.glob("records/*.py")]:
        assert not re.search(r"\b(TODO|FIXME|XXX|HACK)\b", path.read_text(encoding="utf-8")), path


def test_import_has_no_side_effects(tmp_path):
    """No output, no file, no thread count, no optional package, no process group."""
    script = tmp_path / "check.py"
    script.write_text(
        "import sys, torch\n"
        "before = torch.get_num_threads(), torch.get_rng_state().tolist()\n"
        "import train_gpt\n"
        "assert before == (torch.get_num_threads(), torch.get_rng_state().tolist())\n"
        "assert not torch.distributed.is_initialized()\n"
        "loaded = {'sentencepiece', 'matplotlib', 'zstandard', 'numba', 'constriction',\n"
        "    'huggingface_hub', 'safetensors'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
    )
    done = launch(script, [], {}, 1, tmp_path)
    assert done.returncode == 0 and done.stdout == done.stderr == "", done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["check.py"]


def ruff(*arguments):
    """Run the environment's ruff on the repository."""
    beside = shutil.which("ruff", path=str(sys.executable).rpartition("/")[0]) or "ruff"
    return subprocess.run([beside, *arguments], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("arguments", [["check", "."], ["format", "--check", "."]])
def test_ruff_is_content(arguments):
    done = ruff(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr


# -----------------------------------------------------------------------------
# Nothing that is read is ever executed

UNSAFE_MODULES = {"pickle", "cPickle", "dill", "joblib", "marshal", "shelve"}
UNSAFE_CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.load"}
UNSAFE_CALLS |= {"yaml.load", "yaml.unsafe_load", "torch.jit.load", "torch.hub.load"}
UNSAFE_KEYWORDS = {"allow_pickle", "shell"}  # anything but False


def dotted(node, names):
    """a.b.c of an expression, with the imported names put in; "" for what is no such chain"""
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute) and (base := dotted(node.value, names)):
        return f"{base}.{node.attr}"
    return ""


def imported(tree):
    """Local name -> what it stands for"""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {a.asname or a.name.split(".")[0]: a.name for a in node.names if a.asname}
            names |= {
                a.name.split(".")[0]: a.name.split(".")[0] for a in node.names if not a.asname
            }
        elif isinstance(node, ast.ImportFrom):
            names |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    return names


def unsafe(text):
    """What could run code out of data: line numbers and names"""
    tree, found = ast.parse(text), []
    names = imported(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [getattr(node, "module", None) or alias.name for alias in node.names]
            found += [(node.lineno, m) for m in modules if m.split(".")[0] in UNSAFE_MODULES]
        elif isinstance(node, ast.Call):
            name = dotted(node.func, names).removeprefix("builtins.")
            found += [(node.lineno, name)] * (name in UNSAFE_CALLS)
            for keyword in node.keywords:
                no = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                if keyword.arg in UNSAFE_KEYWORDS and not no:
                    found.append((node.lineno, f"{name}({keyword.arg}=)"))
    return found


def our_files():
    """Every .py of the repository; not what lies in .venv or runs/"""
    tops = [path for path in ROOT.iterdir() if path.name[0] != "." and path.name != "runs"]
    files = {file for top in tops for file in (top.rglob("*.py") if top.is_dir() else [top])}
    return sorted(str(file.relative_to(ROOT)) for file in files if file.suffix == ".py")


@pytest.mark.parametrize("name", our_files())
def test_nothing_runs_code_out_of_data(name):
    assert unsafe((ROOT / name).read_text(encoding="utf-8")) == []


UNSAFE = """import pickle
from pickle import loads
import pickle as p
import marshal
import shelve
import torch; torch.load("x")
import torch as t; t.load("x", weights_only=True)
from torch import load; load("x")
from torch import load as read; read("x")
import numpy as np; np.load("x", allow_pickle=True)
import numpy as np; np.load("x", allow_pickle=flag)
eval("1")
exec("1")
compile("1", "", "eval")
import builtins; builtins.eval("1")
__import__("os")
import yaml; yaml.load("x")
from yaml import load; load("x")
import os; os.system("ls")
from os import system; system("ls")
import os; os.popen("ls")
import subprocess; subprocess.run("ls", shell=True)
from subprocess import Popen; Popen("ls", shell=1)""".splitlines()
SAFE = """import re; re.compile("x")
import torch; torch.compile(f)
import numpy as np; np.load("x", allow_pickle=False)
import numpy as np; np.load("x")
import json; json.load(file)
import subprocess; subprocess.run(["ls"], shell=False)
model.eval()
from safetensors.torch import load_file; load_file("x")
tokenizer.load("x")""".splitlines()


@pytest.mark.parametrize("line", UNSAFE)
def test_unsafe_lines_are_found(line):
    assert unsafe(line)
    assert unsafe(f"def f():\n  class A:\n    if 1:\n      {line}")


@pytest.mark.parametrize("line", SAFE)
def test_safe_lines_are_not(line):
    assert unsafe(line) == []
