"""Write submission.json into finished run folders, from what lies in each folder alone.

    python records/submission.py runs/tiny_seed1337 [...]

The file marks a run as finished, so a folder without its final lines or files is refused: one line
on stderr, exit status 2. Written whole or not at all; writing it again gives the same bytes.
"""

import argparse
import contextlib
import hashlib
import io
import json
import math
import os
import sys
import zipfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

RECORDS = Path(__file__).resolve().parent
CAP_BYTES = 16_000_000
UPSTREAM_TRACK = "10min_16mb"
FILES = {"code": "train_gpt.py", "artifact": "artifact.bin", "tokenizer": "tokenizer.model"}
OWN_KEYS = {"final_ngram_pseudo": "pseudo"}
# The lines that a finished run has, and their numbers that a submission rests on.
FINAL_LINES = {
    "final_ngram_exact": ("val_loss", "val_bpb"),
    "final_artifact_bytes": ("code", "weights", "total"),
    "final_budget": ("train_seconds", "eval_seconds"),
}


class RunError(ValueError):
    """A run folder that is unfinished, incomplete or contradicts itself."""


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@contextlib.contextmanager
def blame(path: str | Path) -> Iterator[None]:
    """RunError, in one line, for whatever goes wrong with the files of a run: they may be
    anybody's, and no list of exceptions holds all that a wrong one can cause."""
    try:
        yield
    except (RunError, OSError):
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise RunError(
            f"{path}: a file in it is damaged ({reason}); fix: get the run again"
        ) from error


@contextlib.contextmanager
def placing(path: Path, partial: Path) -> Iterator[Path]:
    """What the block writes to `partial` appears as `path`, or nothing does: RunError, with the
    name that a full disk does not give."""
    try:
        yield partial
        os.replace(partial, path)
    except OSError as error:
        fix = f"make room or move away what is there, then run this again on {path.parent}"
        raise RunError(f"{path}: {error.strerror or error}; fix: {fix}") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def read_columns(data: bytes) -> dict[str, np.ndarray]:
    """The arrays of an .npz, not to be written to. Unlike by np.load, each has the bytes that are
    there: a header that lies about its shape allocates nothing. ValueError and others"""
    columns = {}
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        for member in archive.infolist():
            if member.file_size > len(data):  # np.savez does not compress
                raise ValueError(
                    f"{member.filename} claims {member.file_size} bytes of {len(data)}"
                )
            stored = archive.read(member)
            stream = io.BytesIO(stored)
            np.lib.format.read_magic(stream)
            shape, _, kind = np.lib.format.read_array_header_1_0(stream)
            column = np.frombuffer(stored, kind, offset=stream.tell()).reshape(shape)
            columns[member.filename.removesuffix(".npy")] = column
    return columns


class RunFolder:
    """A run's log lines and settings. A line cut off by a kill is passed over."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.lines = list(filter(None, map(parse_line, self.read("metrics.jsonl").splitlines())))

    def read(self, name: str) -> str:
        try:
            return (self.path / name).read_text(encoding="utf-8")
        except OSError as error:
            raise RunError(f"{self.path}: no {name} ({error.strerror})") from None
        except UnicodeDecodeError as error:
            raise RunError(f"{self.path}: {name} is damaged ({error})") from None

    def all(self, key: str) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["key"] == key]

    def last(self, key: str) -> dict[str, Any]:
        """The newest line of this key; {} for none."""
        return (self.all(key) or [{}])[-1]

    def steps(self, name: str) -> dict[int, dict[str, Any]]:
        """Step -> its "step" line with field `name`; after a resume the newest line holds."""
        lines = [line for line in self.all("step") if name in line]
        return {int(line["value"].partition("/")[0]): line for line in lines}

    def stages(self) -> dict[str, dict[str, Any]]:
        """final_<stage>_exact lines -> their fields by stage, in the order of the run."""
        names = {line["key"]: None for line in self.lines}
        exact = [name for name in names if name.startswith("final_") and name.endswith("_exact")]
        return {name[len("final_") : -len("_exact")]: fields(self.last(name)) for name in exact}

    def settings(self) -> dict[str, str]:
        """config.env's values, and those that only the log has, without their origin."""
        logged = {k: v for line in self.all("config") for k, v in fields(line).items()}
        settings = {name: value.rpartition("(")[0] for name, value in logged.items()}
        pairs = (line.partition("=") for line in self.read("config.env").splitlines())
        return settings | {name: value.strip() for name, equals, value in pairs if equals}

    def name(self) -> str:
        return self.path.resolve().name

    def blocks(self) -> dict[str, np.ndarray]:
        """blocks.npz: sums of logp_model, logp_final (nats) and bytes per 1,024 targets."""
        try:
            arrays = read_columns((self.path / "blocks.npz").read_bytes())
            blocks = {name: arrays[name] for name in ("logp_model", "logp_final", "bytes")}
            if {(column.dtype.kind, column.ndim) for column in blocks.values()} - {
                ("f", 1),
                ("i", 1),
            }:
                raise ValueError("its columns are no numbers")
            if len({len(column) for column in blocks.values()}) > 1:
                raise ValueError("its columns are not equally long")
            return blocks
        except Exception as error:  # zipfile, zlib and numpy have their own
            reason = " ".join(str(error).split())
            raise RunError(f"{self.path}: no usable blocks.npz ({reason})") from None


def parse_line(text: str) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return line if isinstance(line, dict) and isinstance(line.get("key"), str) else None


def fields(line: dict[str, Any]) -> dict[str, Any]:
    """A line without its key and value."""
    return {name: value for name, value in line.items() if name not in ("key", "value")}


def require_finished(run: RunFolder) -> None:
    """Refuse a run without its final lines, with numbers that are none, or with other files."""
    for key, names in FINAL_LINES.items():
        line = run.last(key)
        if not line:
            raise RunError(f"{run.path}: unfinished, no {key} line in metrics.jsonl")
        for name in names:
            value = line.get(name)
            if not isinstance(value, int | float) or not math.isfinite(value):
                raise RunError(f"{run.path}: {key} has {name}:{value}, not a finite number")
    logged = run.last("final_artifact_bytes")
    for field, name in (("code", "train_gpt.py"), ("weights", "artifact.bin")):
        size = len(file_bytes(run, name))
        if size != logged[field]:
            raise RunError(f"{run.path}: {name} has {size} bytes, its log says {logged[field]}")


def file_bytes(run: RunFolder, name: str) -> bytes:
    try:
        return (run.path / name).read_bytes()
    except OSError as error:
        raise RunError(f"{run.path}: no {name} ({error.strerror})") from None


def find_track(record: str) -> str:
    """The track folder that holds the record: of this name, else of one that begins so."""
    paths = [p for p in RECORDS.glob("track_*/**/config.env") if p.parent.name.startswith(record)]
    if not record or not paths:
        return UPSTREAM_TRACK
    path = min(paths, key=lambda p: (p.parent.name != record, p))
    return path.relative_to(RECORDS).parts[0].removeprefix("track_")


def describe(run: RunFolder, settings: dict[str, str], step: int | None) -> str:
    """The blurb: model, training and scorer in one sentence."""
    parts = [f"{settings.get('NUM_LAYERS')} layers x {settings.get('MODEL_DIM')}"]
    if run.last("model_params"):
        parts.append(f"{run.last('model_params')['value']:,} parameters")
    parts.append(f"{step:,} steps" if step else "scored from a stored artifact")
    final = run.last("final_ngram_exact")
    mixture = f"n-gram mixture {final.get('mixer')} of orders {final.get('orders')}"
    parts.append(f"{settings.get('SCORER')} scorer")
    return ", ".join(parts + ([mixture] if "orders" in final else []))


def extras(run: RunFolder) -> dict[str, Any]:
    """Every other final line (codec, pseudo, ...) and each n-gram order's gain, where present."""
    names = {ln["key"] for ln in run.lines if ln["key"].startswith("final_")} - FINAL_LINES.keys()
    others = sorted(name for name in names if not name.endswith("_exact"))
    more = {OWN_KEYS.get(name, name[len("final_") :]): fields(run.last(name)) for name in others}
    gains = {
        line["value"]: {"order": line["value"]} | fields(line) for line in run.all("ngram_gain")
    }
    return more | ({"ngram_gain": list(gains.values())} if gains else {})


def score_keys(run: RunFolder, settings: dict[str, str]) -> dict[str, Any]:
    """Score, bytes, steps and seconds, in upstream's names."""
    final, size = run.last("final_ngram_exact"), run.last("final_artifact_bytes")
    budget, steps = run.last("final_budget"), run.steps("train_loss")
    step = max(steps, default=None)
    score = {name: final[name] for name in ("val_loss", "val_bpb")}
    seed_result = score | {"artifact_bytes": size["weights"], "steps": step}
    seed_result["step_avg_ms"] = steps[step]["step_avg_ms"] if steps else None
    return score | {
        "bytes_total": size["code"] + size["weights"],
        "bytes_code": size["code"],
        "over_cap": size["code"] + size["weights"] > CAP_BYTES,
        "seeds": [int(settings["SEED"])],
        "seed_results": {settings["SEED"]: seed_result},
        "hardware": run.last("hardware").get("value"),
        "pytorch_version": run.last("hardware").get("torch"),
        "step_stop": step,
        "wallclock_seconds": budget["train_seconds"],
        "eval_time_seconds": budget["eval_seconds"],
    }


def submission(run: RunFolder) -> dict[str, Any]:
    """The contents of submission.json; RunError for a run that cannot be one."""
    require_finished(run)
    settings = run.settings()
    if not settings.get("SEED", "").lstrip("-").isdigit():
        raise RunError(f"{run.path}: config.env has no SEED")
    # The log is closed by the last stage, and a second call must give the same date.
    finished = datetime.fromtimestamp((run.path / "metrics.jsonl").stat().st_mtime, UTC)
    score = score_keys(run, settings)
    return {
        "author": os.environ.get("AUTHOR") or settings.get("AUTHOR", ""),
        "github_id": os.environ.get("GITHUB_ID") or settings.get("GITHUB_ID", ""),
        "name": settings.get("RUN_ID") or run.name(),
        "blurb": describe(run, settings, score["step_stop"]),
        "date": finished.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "track": find_track(settings.get("RECORD", "")),
        **score,
        "tokens": run.last("val_text").get("tokens"),
        "bytes": int(run.blocks()["bytes"].sum()),
        "sha256": {what: sha(file_bytes(run, name)) for what, name in FILES.items()},
        "stages": run.stages(),
        **extras(run),
    }


def write(run: RunFolder) -> Path:
    """submission.json, whole or not at all -> its path; RunError"""
    path = run.path / "submission.json"
    with blame(run.path):
        text = json.dumps(submission(run), indent=2, ensure_ascii=False, allow_nan=False)
        data = (text + "\n").encode()
    with placing(path, path.with_name(f".{path.name}.partial")) as partial:
        partial.write_bytes(data)
    return path


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR")
    status = 0
    for folder in parser.parse_args(arguments).runs:
        try:
            print("wrote", write(RunFolder(folder)))
        except RunError as error:
            print(f"error: {error}", file=sys.stderr)
            status = 2
    return status


if __name__ == "__main__":
    sys.exit(main())
