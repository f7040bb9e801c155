"""Names of train_gpt.py's variables: the siblings' names, misspellings, RECORDs, the --help table
(what help.env says of them, else the script's comments); the repository's data folders.

train_gpt.py runs without this file, on the variables' own names, its defaults and a DATA_PATH with
a tokenizer; beside it a published run command resolves as it stands, RECORD=<name> finds its
config.env, and a name that is nearly right stops the run with a suggestion.
"""

import inspect
import itertools
import os
import platform
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import get_args

import torch

ALIASES = Path(__file__).parent / "aliases.env"
MEANINGS = Path(__file__).parent / "help.env"
DATA = Path(__file__).resolve().parents[1] / "data"
SAMPLE_DATA = DATA / "datasets/sample_en"
FINEWEB_DATA = DATA / "datasets/fineweb10B_sp1024"
FINEWEB_TOKENIZER = DATA / "tokenizers/fineweb_1024_bpe.model"
FAMILIES = ("NGRAM_", "MUON_", "EMA_", "SWA_", "BIGRAM_", "TTT_", "XSA_", "QAT_", "CLIP_", "VE_")
BACKENDS = ("sentencepiece", "zstandard", "numba", "constriction", "matplotlib")  # optional
NO_SETTINGS = (  # of a configuration
    *("DATA_PATH", "TOKENIZER_PATH", "EVAL_ONLY", "DECODE", "RECORD", "RUN_ID"),
    *("DRY_RUN", "OVERWRITE", "RESUME", "CHECKPOINT_EVERY"),
)
WIDTHS, GAP = (26, 13, 13), "  "  # of --help's columns but the last, in a page of 100
HELP_HEAD = """Environment variables: name, type, default, meaning. 0|1: off or on. Numbers are
at least 0 where nothing else is said. Lists are 1,2,3; DRY_RUN=1 shows what a run would use."""
HELP_EXAMPLES = """
Examples
  RUN_ID=short ITERATIONS=200 WARMDOWN_ITERS=120 python train_gpt.py
  RECORD=pr864 SEED=7 torchrun --standalone --nproc_per_node=8 train_gpt.py
  DATA_PATH=data/datasets/mine RUN_ID=mine python train_gpt.py
  EVAL_ONLY=runs/mine/artifact.bin RUN_ID=again python train_gpt.py"""


def resolve(environ: Mapping[str, str], script: ModuleType):
    """-> ({name: (text, origin)}, notes) of train_gpt.py's variables that are given, by the
    environment or by RECORD's config.env; ConfigError for what cannot be meant."""
    given, notes = canonical_names(environ, script)
    for name in script.VARIABLES.keys() & given.keys():
        if re.search("[\ud800-\udfff]", given[name]):  # how Python reads other bytes
            raise script.ConfigError(f"{name}={given[name]!r}: must be UTF-8, as the log is")
    refuse_misspelt(given, script)
    record, why = choose_record(given, script)
    texts = {name: (text, f"RECORD={record}") for name, text in read_record(record, script).items()}
    texts |= {name: (text, "env") for name, text in given.items() if name in script.VARIABLES}
    texts["RECORD"] = record, texts.get("RECORD", ("", "default"))[1]
    texts |= {name: (str(path), "default") for name, path in default_paths(given, record).items()}
    return texts, notes + why


def read_pairs(path: Path, error: type[Exception] = ValueError) -> dict[str, str]:
    """The NAME=value lines of a file, without comments."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as wrong:
        raise error(f"{path}: not UTF-8 ({wrong}); fix: get it again") from None
    lines = [line for line in lines if line.strip() and not line.startswith("#")]
    if wrong := [line for line in lines if "=" not in line]:
        raise error(f"{path}: {wrong[0]!r} is not NAME=value")
    return {name: value.strip() for name, _, value in (line.partition("=") for line in lines)}


def canonical_names(environ, script):
    """Replace what the five scripts call the same thing by our names (aliases.env), unless they
    contradict; accept what this script always or never does only at that value."""
    aliases, notes, error = read_pairs(ALIASES), [], script.ConfigError
    given = {name: text for name, text in environ.items() if name not in aliases}
    for alias in sorted(aliases.keys() & environ.keys()):
        text, meaning = environ[alias], aliases[alias]
        if found := re.fullmatch(r"(\w*)\[(.*)\]", meaning):  # OURS[theirs:ours,...]
            name, values = found[1], dict(v.split(":") for v in found[2].split(","))
            if text not in values:
                known = " or ".join(values)
                raise error(f"{alias}={text!r}: only {known} can be had; fix: leave it out")
            text = values[text]
        elif found := re.fullmatch(r"(\w+)\+(\w+)=(.+)", meaning):  # OURS+theirs=default of theirs
            name = found[1]
            other = environ.get(found[2], found[3])
            try:
                text = str(round(float(text) + float(other), 9))
            except ValueError:
                raise error(f"{alias}={text!r} + {found[2]}={other!r}: must be numbers") from None
        else:
            name = meaning
        if not name:
            notes.append(f"{alias}={environ[alias]} is what this script does anyway")
            continue
        ours = given.setdefault(name, text)
        if ours != text and script.parse(name, ours) != script.parse(name, text):
            raise error(f"{alias}={environ[alias]!r} contradicts {name}={given[name]!r}")
        notes.append(f"{alias} is read as {name}={text}")
    return given, notes


def refuse_misspelt(names, script):
    """Stop on names near ours or of one of our families; ignore the rest."""
    for name in sorted(names.keys() - script.VARIABLES.keys()):
        family = next((prefix for prefix in FAMILIES if name.startswith(prefix)), "")
        known = [ours for ours in script.VARIABLES if ours.startswith(family)]
        distance, near = min((edit_distance(name, ours), ours) for ours in known)
        if family or 2 * distance <= min(4, len(name)):  # CI is no misspelt CLIP
            message = f"{name}={names[name]!r} is not a variable; did you mean {near}?"
            raise script.ConfigError(message)


def edit_distance(a: str, b: str) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def choose_record(given, script):
    """-> (record, "" for the defaults; why, where nobody asked)."""
    if given.get("RECORD"):
        return given["RECORD"], []
    cuda = given.get("DEVICE") != "cpu" and torch.cuda.is_available()
    if cuda and (given.get("DATA_PATH") or has_fineweb()):
        return "", ["no RECORD: own configuration, since CUDA and data are here"]
    missing = f"no FineWeb data in {FINEWEB_DATA}" if cuda else "no CUDA device"
    if cuda and int(given.get("WORLD_SIZE", 1)) > 1 and given.get("DRY_RUN", "0") == "0":
        fix = "python data/download_fineweb.py, or set DATA_PATH"
        raise script.ConfigError(f"{missing}; fix: {fix}")
    return "tiny", [f"no RECORD: tiny, since there is {missing}"]


def has_fineweb() -> bool:
    """A download that was cut off leaves a partial file or no validation shard."""
    found = {pattern: any(FINEWEB_DATA.glob(pattern)) for pattern in ("*_val_*.bin", ".*.partial")}
    return found["*_val_*.bin"] and not found[".*.partial"]


def default_paths(given, record):
    """The data folder, its tokenizer or else upstream's, where none is given."""
    real = has_fineweb() and record != "tiny"
    data = Path(given.get("DATA_PATH") or (FINEWEB_DATA if real else SAMPLE_DATA))
    tokenizer = data / "tokenizer.model"
    if data != SAMPLE_DATA and not tokenizer.exists():  # the sample's is made at its first use
        tokenizer = FINEWEB_TOKENIZER
    paths = dict(DATA_PATH=data, TOKENIZER_PATH=tokenizer)
    return {name: path for name, path in paths.items() if not given.get(name)}


def read_record(name, script):
    """The NAME=value lines of records/**/<name>*/config.env; {} for no record."""
    if not name:
        return {}
    known = known_records(script)
    found = [name] if name in known else [folder for folder in known if folder.startswith(name)]
    if len(found) != 1:
        message = f"RECORD={name!r}: {len(found)} fit; fix: one of {sorted(known)}"
        raise script.ConfigError(message)
    pairs = read_pairs(known[found[0]], script.ConfigError)
    for setting, text in pairs.items():
        if setting not in script.VARIABLES or setting in NO_SETTINGS:
            raise script.ConfigError(f"{known[found[0]]}: {setting}={text} is not a setting")
    return pairs


def known_records(script):
    """Name -> path of its config.env; a seed of a submission is none"""
    paths = (script.ROOT / "records").glob("**/config.env")
    return {path.parent.name: path for path in paths if not path.parent.name.startswith("seed_")}


def prepare_sample(folder: str | Path, script: ModuleType) -> None:
    """Tokenise the embedded text, if that is the folder, on its first use."""
    if Path(folder) == SAMPLE_DATA and not (SAMPLE_DATA / "tokenizer.model").exists():
        command = [sys.executable, script.ROOT / "data/prepare_sample.py", "--out", SAMPLE_DATA]
        if subprocess.run(command).returncode:
            raise script.UserError("data/prepare_sample.py failed, see above")


def keep_sources(rt, cfg, script: ModuleType) -> None:
    """config.env, every setting, and tokenizer.model, into the run folder."""
    names = [name for name in script.VARIABLES if name not in NO_SETTINGS]
    lines = [f"{name}={script.show(getattr(cfg, name.lower()))}\n" for name in names]
    (rt.folder / "config.env").write_text("".join(lines), encoding="utf-8")
    shutil.copyfile(cfg.tokenizer_path, rt.folder / "tokenizer.model")


def announce(rt, cfg, script: ModuleType) -> None:
    """Log where, with what, and every value with its origin; tokenise the embedded text."""
    for note in cfg.notes:
        rt.log("note", note)
    show, origin = script.show, cfg.origin
    values = {name: getattr(cfg, name.lower()) for name in script.VARIABLES}
    rt.log("config", **{n: f"{show(v)}({origin.get(n, 'default')})" for n, v in values.items()})
    found = {name: int(script.has_backend(name)) for name in BACKENDS}
    versions = dict(python=platform.python_version(), torch=torch.__version__)
    kind = torch.cuda.get_device_name() if rt.cuda else f"cpu {platform.machine()}"
    threads = torch.get_num_threads()
    rt.log("hardware", f"{rt.world_size} x {kind}", threads=threads, **versions, **found)
    if not cfg.dry_run:
        prepare_sample(cfg.data_path, script)


def print_help(script: ModuleType) -> None:
    """A row for each variable, then the RECORDs and examples, in at most 100 columns."""
    lines = [HELP_HEAD]
    for group, names in help_groups(script).items():
        lines += [
            "",
            group,
            *(line for name in names for line in help_row(name, names[name], script)),
        ]
    lines += ["", "Values of RECORD, their beginning is enough"]
    for name, path in sorted(known_records(script).items()):
        comment = " ".join(re.findall(r"^# (.+)", path.read_text(encoding="utf-8"), re.MULTILINE))
        first = re.match(r".+?\.(?= |$)", comment)[0].removeprefix(f"{name}: ")
        lines += textwrap.wrap(f"  {name:<8}{first}", 100, subsequent_indent=" " * 10)
    try:
        print(*lines, HELP_EXAMPLES, sep="\n", flush=True)
    except BrokenPipeError:  # the reader, head or less, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def help_groups(script):
    """Group -> {name: meaning}, as in the source of Config and published.py."""
    published = (Path(__file__).parent / "published.py").read_text(encoding="utf-8")
    groups, fuller = {}, read_pairs(MEANINGS)
    for line in (inspect.getsource(script.Config) + published).splitlines():
        if found := re.fullmatch(r" +# (.+)", line):
            names = groups.setdefault(found[1], {})
        elif found := re.match(r" +(\w+): .* = .+?(?:  # (.+))?$", line):
            if (name := found[1].upper()) in script.VARIABLES:
                names[name] = fuller.get(name, found[2])
    return groups


def help_row(name, meaning, script):
    """The lines of a variable; what is too long for its column goes on below, in the same
    column."""
    field = script.VARIABLES[name]
    default = script.show(field.default).replace(",", ", ") or "-"
    choices = get_args(field.type) if isinstance(field.default, str) else ()
    meaning = "|".join(filter(None, choices)) + ": " * bool(choices) + meaning
    widths = *WIDTHS, 100 - sum(WIDTHS) - len(GAP) * len(WIDTHS)
    columns = zip((name, kind_of(field), default, meaning), widths, strict=True)
    cells = [textwrap.wrap(text, width) for text, width in columns]
    cells[2] = [cell.replace(", ", ",") for cell in cells[2]]  # as it would be given
    for row in itertools.zip_longest(*cells, fillvalue=""):
        yield GAP.join(map(str.ljust, row, widths)).rstrip()


def kind_of(field):
    """Type of a variable in a word or two, with its bounds if they are not the usual ones."""
    kind, default = field.type, field.default
    if isinstance(default, str):
        return "choice" if get_args(kind) else "text"
    if isinstance(default, bool | tuple):
        return "0|1" if kind is bool else f"{get_args(kind)[0].__name__}s"
    word, (least, most) = type(default).__name__, getattr(kind, "__metadata__", (0, 2**62))
    if most < 2**62:
        return f"{least} to {most}"
    if least < -1:
        return f"any {word}"
    return f"{word} > 0" if 0 < least < 1 else f"{word} >= {least}" if least else word


def dry_run(rt, cfg, script: ModuleType) -> None:
    """What would run, without data or tokenizer: configuration, parameters, optimizers, bytes."""
    cfg = replace(cfg, vocab_size=cfg.vocab_size or 1024)
    announce(rt, cfg, script)
    script.micro_batches(cfg, rt)
    rt.log("model_params", script.count_parameters(cfg))
    for group, (names, rate, decay) in script.optimizer_groups(cfg).items():
        rt.log("optimizer_group", group, rate=rate, decay=decay, parameters=",".join(names))
    payload = script.payload_type(script.parameter_specs(cfg)).itemsize
    sizes = dict(code=script.CODE.stat().st_size, uncompressed_weights=payload)
    rt.log("byte_budget", **sizes, cap=script.CAP_BYTES)
