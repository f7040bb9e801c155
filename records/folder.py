"""Book-keeping of a run folder: what a run clears before it begins and makes at its end."""

import subprocess
import sys
from types import ModuleType
from typing import Any

OUTPUTS = """submission.json log.txt metrics.jsonl artifact.bin train_gpt.py tokenizer.model
 config.env blocks.npz scores.npz scores_ema.npz stream.bin report.png""".split()  # its mark first


def open_run(rt: Any, script: ModuleType) -> None:
  """runs/<RUN_ID>/, cleared of an unfinished run, with its logs open on rank 0; a finished one is
  not touched unasked, and what stands in its way is named (ConfigError)."""
  if rt.finished and not rt.cfg.overwrite:
    fix = "OVERWRITE=1 or another RUN_ID"
    raise script.ConfigError(f"RUN_ID={rt.cfg.run_id!r}: {rt.folder} is finished; fix: {fix}")
  if rt.rank == 0:
    try:
      rt.folder.mkdir(parents=True, exist_ok=True)
      for name in OUTPUTS:
        (rt.folder / name).unlink(missing_ok=True)
      logs = ("log.txt", "metrics.jsonl")
      rt.files += [open(rt.folder / name, "w", encoding="utf-8") for name in logs]
    except OSError as error:
      fix = "a run must be able to write and clear that; move it away or give another RUN_ID"
      raise script.ConfigError(f"{error.filename}: {error.strerror}; fix: {fix}") from error


def close_run(rt: Any, script: ModuleType) -> None:
  """submission.json, the mark of a finished run, and report.png"""
  for name in ("records/submission.py", "records/plot.py"):
    if subprocess.run([sys.executable, script.ROOT / name, rt.folder]).returncode:
      rt.log("note", f"{name} failed; run it again on {rt.folder}")
