"""The rules of style that a program can check, on the script and on the repository."""

import ast
import re
import shutil
import statistics
import subprocess
import sys

import pytest
from helpers import ROOT, SCRIPT, launch, train_gpt

TEXT = SCRIPT.read_text(encoding="utf-8")
LINES = TEXT.splitlines()
TREE = ast.parse(TEXT)
FUNCTIONS = [
    node for node in ast.walk(TREE) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
]
VARIABLES = train_gpt.VARIABLES


# What may be longer than 60 lines, and why.
LONG = {"parameter_specs": "a table: a row a parameter"}
MOST_LINES = 8600


def length(function):
    return function.end_lineno - function.lineno + 1


def parameters(function):
    """Its positional ones, without self."""
    names = [argument.arg for argument in function.args.posonlyargs + function.args.args]
    return [name for name in names if name not in ("self", "cls")]


def test_script_is_within_its_bounds():
    assert len(LINES) <= MOST_LINES
    assert max(map(len, LINES)) <= 100


def test_functions_are_short():
    lengths = [(node.name, length(node)) for node in FUNCTIONS]  # of one name there are several
    assert statistics.median(map(length, FUNCTIONS)) <= 12
    assert {name for name, lines in lengths if lines > 60} == LONG.keys()


def test_main_is_a_story():
    for node in TREE.body:
        if getattr(node, "name", "") in ("main", "run", "run_stages"):
            assert length(node) <= 40, node.name


def test_functions_take_few_positional_parameters():
    assert [node.name for node in FUNCTIONS if len(parameters(node)) > 5] == []


def test_one_value_is_assigned_at_a_time():
    """a, b = ... is for swaps, coordinates and taking one value apart."""
    plain = [node for node in ast.walk(TREE) if isinstance(node, ast.Assign)]
    apart = [node for node in plain if isinstance(node.targets[0], ast.Tuple)]
    paired = [node.lineno for node in apart if isinstance(node.value, ast.Tuple)]
    assert len(apart) <= 0.08 * len(plain)
    assert len(paired) <= 1, paired  # Newton-Schulz's three coefficients
    assert not [node.lineno for node in plain if len(node.targets) > 1]


def test_one_statement_a_line():
    lines = [
        node.lineno
        for node in ast.walk(TREE)
        if isinstance(node, ast.stmt) and not is_docstring(node)
    ]
    assert [line for line in {*lines} if lines.count(line) > 1] == []


def is_docstring(node):
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def test_public_functions_are_annotated():
    """Every parameter and what comes back; __init__ returns nothing."""
    open_ended = []
    for node in FUNCTIONS:
        arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
        arguments += [extra for extra in (node.args.vararg, node.args.kwarg) if extra]
        bare = [x.arg for x in arguments if not x.annotation and x.arg not in ("self", "cls")]
        returns = node.returns is not None or node.name == "__init__"
        if bare or not returns:
            open_ended.append((node.name, bare))
    assert open_ended == []


def test_methods_write_their_own_attributes():
    """torch's protocol (found_inf, grad) and settings, tqdm's bar, and the fields of an array's
    records excepted."""
    allowed = {"self.adam.found_inf", "weight.grad", "self.bar.total"}
    allowed |= {"arrays.nodes[entry].place"}
    allowed |= {f"node.{name}" for name in ("list", "total", "types", "singles")}
    allowed |= {"tqdm.monitor_interval", "dynamo.recompile_limit"}
    found = set()
    for node in ast.walk(TREE):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if not (isinstance(node.value, ast.Name) and node.value.id == "self"):
                found.add(ast.unparse(node))
    assert found == allowed


def test_nothing_of_a_run_lies_elsewhere():
    """No runpy; importlib for optional packages and their versions alone; of the repository only
    programs that are started as processes."""
    assert "runpy" not in TEXT
    uses = {ast.unparse(node) for node in ast.walk(TREE) if isinstance(node, ast.Attribute)}
    assert {use for use in uses if re.fullmatch(r"importlib\.\w+(\.\w+)?", use)} == {
        "importlib.import_module",
        "importlib.metadata",
        "importlib.metadata.version",
    }
    local = {path.stem for path in [*ROOT.glob("records/tools/*.py"), *ROOT.glob("data/**/*.py")]}
    modules = {name.split(".")[0] for name in imported(TREE).values()}
    assert not modules & (local | {"records", "data", "tests"})


def test_no_exception_is_caught_wholesale_around_our_own_code():
    """`except Exception` covers a library's call and nothing else."""
    wholesale = []
    for node in ast.walk(TREE):
        if isinstance(node, ast.Try):
            for handler in node.handlers:
                name = getattr(handler.type, "id", "")
                if handler.type is None or name in ("Exception", "BaseException"):
                    wholesale.append([ast.unparse(statement) for statement in node.body])
    assert wholesale == [
        ["found = coder.decode(family, len(symbols))"],
        ["tokens = coder.decode(family, integers)"],
    ]


def test_each_setting_stands_once():
    """One row of the table, with its sentence; nothing about it in a list or a file elsewhere."""
    (config,) = [node for node in TREE.body if getattr(node, "name", "") == "Config"]
    rows = [node.target.id for node in config.body if isinstance(node, ast.AnnAssign)]
    assert sorted(rows) == sorted({*rows})
    assert sorted(n.upper() for n in rows if n not in ("origin", "notes")) == sorted(VARIABLES)


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
    for path in [SCRIPT, *ROOT.glob("data/**/*.py"), *ROOT.glob("records/tools/*.py")]:
        assert not re.search(r"\b(TODO|FIXME|XXX|HACK)\b", path.read_text(encoding="utf-8")), path


def test_programs_start_without_docstrings():
    """python -OO: `__doc__` is None then."""
    paths = [*ROOT.glob("*.py"), *ROOT.glob("data/**/*.py"), *ROOT.glob("records/tools/*.py")]
    assert [p.name for p in paths if re.search(r"\b__doc__\.", p.read_text("utf-8"))] == []
    for path in ("records/tools/verify.py", "data/prepare_text.py"):
        command = [sys.executable, "-OO", ROOT / path, "--help"]
        assert subprocess.run(command, capture_output=True).returncode == 0, path


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

UNSAFE_MODULES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal"}
UNSAFE_MODULES |= {"shelve"}
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
import cloudpickle
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
