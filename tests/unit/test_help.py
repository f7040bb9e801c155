"""--help: every variable once, in columns that a pager and grep can use."""

import re
import subprocess
import sys
from typing import get_args

import pytest
from helpers import ROOT, run_script, train_gpt

VARIABLES = train_gpt.VARIABLES
WIDTHS = train_gpt.HELP_WIDTHS
STARTS = [sum(WIDTHS[:n]) + n * len(train_gpt.HELP_GAP) for n in range(4)]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("help")
    done = run_script({}, cwd=folder, arguments=["--help"])
    assert done.returncode == 0 and done.stderr == "" and list(folder.iterdir()) == []
    return done.stdout.splitlines()


def columns(line):
    """name, type, default and meaning of a line of the table"""
    ends = [*STARTS[1:], None]
    return [line[start:end].strip() for start, end in zip(STARTS, ends, strict=True)]


def rows(page):
    """Variable -> its four columns, lines that go on below joined; in the order of the page."""
    table, name = {}, None
    for line in page[page.index("Run") : page.index("Values of RECORD, their beginning is enough")]:
        if re.match(r"[A-Z][A-Z0-9_]+(?=  |$)", line):
            name = line.split()[0]
            assert name not in table
            table[name] = columns(line)
        elif line.startswith(" "):
            below = columns(line)
            table[name] = [f"{a} {b}".strip() for a, b in zip(table[name], below, strict=True)]
    return table


def test_every_variable_has_one_row(page):
    table = rows(page)
    assert sorted(table) == sorted(VARIABLES)
    assert all(name == cells[0] and all(cells) for name, cells in table.items())
    words = [line.split()[0] for line in page if line[:1].strip()]
    assert [words.count(name) for name in VARIABLES] == [1] * len(VARIABLES)


def test_columns_are_aligned_within_100(page):
    assert max(map(len, page)) <= 100
    start, end = page.index("Run"), page.index("Values of RECORD, their beginning is enough")
    titles = {"Run", "Data", "Model", "Artifact", "Training", "Scoring", "N-gram"}
    lines = [line for line in page[start:end] if line]
    assert titles <= {*lines} and all(line == line.rstrip() for line in lines)
    for line in lines:
        if line.startswith(" ") or line.split()[0] in VARIABLES:
            cells, padded = columns(line), line.ljust(100)
            for cell, start in zip(cells[1:], STARTS[1:], strict=True):
                assert padded[start - 2 : start] == "  ", line
                assert not cell or not padded[start].isspace(), line


def test_defaults_and_choices_are_the_scripts(page):
    """A default pasted into the environment gives that default; each choice is named."""
    for name, (_, _, default, meaning) in rows(page).items():
        field = VARIABLES[name]
        if field.default not in ("", ()):
            assert ", " not in default or len(default) > WIDTHS[2]
            assert train_gpt.parse(name, default.replace(" ", "")) == field.default
        if isinstance(field.default, str) and get_args(field.type):
            choices = [choice for choice in get_args(field.type) if choice]
            assert meaning.startswith("|".join(choices) + ": ")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("SEED", "int"),
        ("DRY_RUN", "0|1"),
        ("RUN_ID", "text"),
        ("DEVICE", "choice"),
        ("MODEL_DIM", "int >= 1"),
        ("CODEC_TOKENS", "int >= -1"),
        ("NUM_LAYERS", "2 to 999"),
        ("TRAIN_SEQ_LEN", "1 to 1048576"),
        ("MLP_MULT", "float > 0"),
        ("SMEAR_INIT", "any float"),
        ("MATRIX_LR", "float"),
        ("BETA1", "0 to 0.999999"),
        ("SWA_WEIGHT", "0 to 1"),
        ("VE_LAYERS", "ints"),
        ("CLIP_QUANTILES", "floats"),
    ],
)
def test_type_and_bounds(name, kind, page):
    assert rows(page)[name][1] == kind


def test_bounds_are_those_that_are_enforced(page):
    """The numbers named are accepted, the next ones beyond are not."""
    for name, (_, kind, _, _) in rows(page).items():
        found = re.fullmatch(r"(?:(\w+) )?(?:>= (-?\d+)|(\S+) to (\S+))", kind)
        if found:
            least, most = found[2] or found[3], found[4]
            train_gpt.parse(name, least)
            beyond = [str(int(least) - 1)] + (
                [str(float(most) + 1).removesuffix(".0")] if most else []
            )
            for text in beyond:
                with pytest.raises(train_gpt.ConfigError):
                    train_gpt.parse(name, text)


def test_meanings_are_the_table_s_and_stand_alone(page):
    """No sentence but that of the setting's own line; none is a mere word."""
    for name, (_, _, _, meaning) in rows(page).items():
        assert meaning.endswith(train_gpt.SETTINGS[name].meaning), name
        assert len(train_gpt.SETTINGS[name].meaning.split()) >= 2, name


def test_groups_are_together_and_in_the_table_s_order(page):
    titles = list(dict.fromkeys(setting.group for setting in train_gpt.SETTINGS.values()))
    assert [line for line in page if line in titles] == titles


def test_every_record_is_named(page):
    start = page.index("Values of RECORD, their beginning is enough")
    named = [
        line.split()[0] for line in page[start:] if re.match(r"  \S+ ", line) and "=" not in line
    ]
    folders = {path.parent.name for path in ROOT.glob("records/*/*/config.env")}
    assert sorted(named) == sorted(folders) == named


def test_examples_are_valid(page, dataset):
    """Each example's variables make a Config."""
    lines = [line.split() for line in page[page.index("Examples") + 1 :]]
    assert len(lines) >= 3 and all(words[-1] == "train_gpt.py" for words in lines)
    for words in lines:
        pairs = dict(word.split("=") for word in words if "=" in word and not word.startswith("--"))
        assert pairs and train_gpt.Config.from_env(pairs | dict(DEVICE="cpu"))


def test_a_reader_may_stop_early(tmp_path):
    """As `| head` does: no complaint, status 0."""
    code = "import train_gpt; train_gpt.print_help()"
    command = [sys.executable, "-c", code]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with subprocess.Popen(command, cwd=ROOT, **pipes) as process:
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait(60) == 0
