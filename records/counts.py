"""The n-gram counts of train_gpt.py's ngram_counts by torch: on CUDA, or on a CPU without numba.

The decoder counts with a dictionary and train_gpt.py on a CPU with numba, so that no proof and no
score there needs this file.
"""

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np
import torch


def torch_orders(
    text: tuple, vocab_size: int, device: Any, script: ModuleType
) -> Iterator[np.ndarray]:
    """Statistics int32 (N, 4) of each order, from 1 on, by stable sorts, cumsum and scatter. text:
    tokens, times, place of the lane's next token, int32 (N,) each; the last two empty: one text."""
    tokens, times, following = (torch.from_numpy(a).to(device) for a in text)
    index, lanes = torch.arange(len(tokens), device=device), len(times) > 0
    if not lanes:
        times, following = index, index + 1
        following = following.masked_fill(following == len(tokens), -1)

    def by(keys, t):  # -> t in groups of equal keys, does one begin, where, and where its step
        keys, place = keys.sort(stable=True)
        t, new = t[place], torch.ones_like(t, dtype=torch.bool)
        new[1:] = keys[1:] != keys[:-1]
        step = new.clone()
        step[1:] |= times[t[1:]] != times[t[:-1]]
        first, step = (
            torch.where(flag, index[: len(t)], 0).cummax(0).values for flag in (new, step)
        )
        return t, new, first, step

    context = torch.zeros_like(index)  # its number; -1: never seen before
    while True:
        stats = torch.zeros((len(tokens), 4), dtype=torch.int32, device=device)
        live, rank = index[context >= 0], torch.zeros_like(index)
        ngrams, new, first, step = by(context[live] * vocab_size + tokens[live], live)
        stats[ngrams, 1], rank[ngrams] = (step - first).int(), index[: len(live)] - first
        t, _, first, step = by(context[live], live)
        stats[t, 0], fresh, again = (step - first).int(), 1 * (rank[t] == 0), 1 * (rank[t] == 1)
        for column, change in ((2, fresh), (3, fresh - again)):
            before = change.cumsum(0) - change
            stats[t, column] = (before[step] - before[first]).int()
        yield stats.cpu().numpy()
        twice = ~new
        twice[:-1] |= twice[1:].clone()
        keep, context = twice & (following[ngrams] >= 0), torch.full_like(index, -1)
        context[following[ngrams[keep]].long()] = new.cumsum(0)[keep]
        if lanes:
            following[tokens == script.BOS] = -1
