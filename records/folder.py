"""Book-keeping of a run folder: what a run clears before it begins and makes at its end."""

import contextlib
import io
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

BLOCK = 1024  # targets
LOGS = ("log.txt", "metrics.jsonl")
OUTPUTS = """submission.json log.txt metrics.jsonl artifact.bin train_gpt.py tokenizer.model
 config.env blocks.npz scores.npz scores_ema.npz stream.bin report.png""".split()  # its mark first


def open_run(rt: Any, script: ModuleType) -> None:
    """runs/<RUN_ID>/ with its logs open on rank 0: as the last checkpoint saw it, where the run
    goes on, else cleared. What a finished run or a checkpoint holds is not lost unasked
    (ConfigError)."""
    saved = sorted(rt.folder.glob("checkpoint/step_*.json"))
    trains_on = rt.cfg.resume == "auto" and not rt.cfg.eval_only
    goes_on = saved and trains_on and not rt.cfg.overwrite
    if (rt.finished or saved) and not goes_on and not rt.cfg.overwrite:
        state = "finished" if rt.finished else f"unfinished, with {saved[-1].stem}"
        fix = "OVERWRITE=1" + " or RESUME=auto" * (not rt.finished and not rt.cfg.eval_only)
        message = f"{rt.folder} is {state}; fix: {fix}, or another RUN_ID"
        raise script.ConfigError(f"RUN_ID={rt.cfg.run_id!r}: {message}")
    if rt.cfg.checkpoint_every != "0":
        script.backend("safetensors")  # rather missed now than when it is needed
    if script.__name__ == "__main__":  # while training, Trainer.run has its own
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the run without a traceback
    script.beside("progress.attach", rt)
    if rt.rank == 0:
        try:
            rt.folder.mkdir(parents=True, exist_ok=True)
            if goes_on:
                cut_logs(rt.folder, saved, script)
            else:
                if rt.cfg.overwrite:  # what the new run lacks is missed before the old one is gone
                    script.beside("variables.prepare_sample", rt.cfg.data_path)
                    for split in ("val",) if rt.cfg.eval_only else ("val", "train"):
                        script.find_shards(rt.cfg.data_path, split)
                    script.token_bytes(rt.cfg.tokenizer_path, rt.cfg.vocab_size)
                clear(rt.folder)
            rt.files += [Log(rt.folder / name) for name in LOGS]
        except OSError as error:
            fix = "a run must be able to write and clear that; move it away or give another RUN_ID"
            raise script.ConfigError(f"{error.filename}: {error.strerror}; fix: {fix}") from error


class Log:
    """A text file that lines are added to. Where that fails, a full disk, the run goes on without:
    each line is on standard output as well."""

    def __init__(self, path: Path):
        self.path, self.file = path, open(path, "a", encoding="utf-8")

    def write(self, text: str) -> None:
        self.attempt(self.file.write, text)

    def flush(self) -> None:
        self.attempt(self.file.flush)

    def tell(self) -> int:
        """Bytes on the disk, for a checkpoint"""
        return self.path.stat().st_size if self.path.exists() else 0

    def attempt(self, action: Callable, *arguments: Any) -> None:
        try:
            action(*arguments)
        except OSError as error:
            print(
                f"note: {self.path}: {error}; the log ends here; fix: make room there",
                file=sys.stderr,
            )
            with contextlib.suppress(OSError):
                self.file.close()  # tries once more
            self.file = io.StringIO()


def clear(folder: Path) -> None:
    """Remove what an earlier run wrote; checkpoints first, or a run that died meanwhile could go on
    from them."""
    shutil.rmtree(folder / "checkpoint", ignore_errors=True)
    for name in OUTPUTS:
        (folder / name).unlink(missing_ok=True)


def cut_logs(folder: Path, saved: list[Path], script: ModuleType) -> None:
    """Without the lines after the newest whole checkpoint, which the run will write again. Where
    none is whole, another function refuses the run."""
    sizes = []
    for checkpoint in reversed(saved):
        with contextlib.suppress(Exception):  # as resume passes it over
            sizes = [*map(int, script.beside("checkpoint.read", checkpoint)[0]["logs"])]
            break
    for name, size in zip(LOGS, sizes, strict=False):
        path = folder / name
        if path.exists() and 0 <= size < path.stat().st_size:
            os.truncate(path, size)


def close_run(rt: Any, script: ModuleType) -> None:
    """Peak memory; submission.json, the mark of a finished run, and report.png"""
    rt.log("peak_memory_mb", script.beside("progress.peak_memory", rt))
    for name in ("records/submission.py", "records/plot.py"):
        if subprocess.run([sys.executable, script.ROOT / name, rt.folder]).returncode:
            rt.log("note", f"{name} failed; run it again on {rt.folder}")
