"""Selective pruning (PR #993) of an artifact that is over TARGET_MB."""

import bisect
import functools
import time
from types import ModuleType
from typing import Any

import numpy as np


def prune(payload: np.ndarray, most: int, cfg: Any, log: Any, script: ModuleType) -> bytes:
    """Selective pruning (PR #993): zero the fewest 256ths of the +-1 weights, smallest steps first,
    with which the payload fits into `most` bytes, or all -> it, compressed"""
    began, places, steps = time.perf_counter(), [], []
    for name, spec in script.parameter_specs(cfg).items():
        if spec.coding == "int6":
            kind, start = payload.dtype.fields[name]
            ones = np.flatnonzero(abs(payload[name]["integers"]) == 1)
            places.append(start + kind.fields["integers"][1] + ones)
            steps.append(payload[name]["scale"].ravel()[ones // spec.shape[-1]])
    order = np.concatenate(places)[np.concatenate(steps).argsort(kind="stable")]

    @functools.cache
    def pruned(part):
        trial = payload.reshape(1).view("u1").copy()
        trial[order[: len(order) * part // 256]] = 0
        return script.compress(trial, cfg.compressor)

    part = 0
    if len(pruned(0)) > most:
        part = bisect.bisect_left(range(256), True, key=lambda part: len(pruned(part)) <= most)
    count, seconds = len(order) * part // 256, time.perf_counter() - began
    log("prune", candidates=len(order), pruned=count, bytes=len(pruned(part)), seconds=seconds)
    return pruned(part)
