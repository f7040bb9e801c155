"""The five pull requests' own mixture, on exact counts: a backoff with a weight from the entropy.

Behind NGRAM_MIXER=cascade and the line final_ngram_backoff_exact of every run. It has the methods
of train_gpt.py's Blend, so whatever mixes, adds up masses or codes with one does so with the other.
"""

from types import ModuleType
from typing import Any

import numpy as np


class Cascade:
    """The counts of the longest context seen NGRAM_MIN_COUNT times, of NGRAM_MIN_ORDER to
    NGRAM_MAX_ORDER, with a weight from its order and the model's entropy (PR #864)."""

    def __init__(self, orders: tuple[int, ...], cfg: Any, script: ModuleType | None = None):
        self.orders, self.cfg, self.chunk, self.largest = orders, cfg, 1 << 16, 1e-8

    def rows(self, stats: np.ndarray, entropy: np.ndarray, change: np.ndarray | None = None):
        """Matched order, 0: none, and the weight of its counts, (rows,) each. stats: (K, rows, 4)
        context, target, types, singletons; entropy: (rows,), nats; change: by pre-enrichment."""
        cfg, orders = self.cfg, np.array(self.orders)[:, None]
        known = stats[..., 0] >= cfg.ngram_min_count
        known &= (cfg.ngram_min_order <= orders) & (orders <= cfg.ngram_max_order)
        order = (orders * known).max(0)
        return order, backoff_alpha(order, entropy, cfg, self.boost(change))

    def boost(self, change: np.ndarray | None) -> Any:
        """0.5 to 1.5 (rows,): PR #810's confidence, over the largest change so far instead of a
        chunk's, which later tokens enter."""
        if change is None:
            return 1.0
        largest = np.maximum.accumulate(np.append(self.largest, change))
        self.largest = largest[-1]
        return 0.5 + change / largest[1:]

    def weights(self, order: np.ndarray, alpha: np.ndarray) -> np.ndarray:
        """Of the model and of each order's counts: float64 (rows, K + 1)"""
        return np.vstack([1 - alpha, alpha * (np.array(self.orders)[:, None] == order)]).T

    def learn(self, *rows: Any) -> None:
        """Nothing: the weights are fixed by configuration."""


def backoff_alpha(order: np.ndarray, entropy: np.ndarray, cfg: Any, boost: Any = 1.0) -> np.ndarray:
    """Weight (N,) of the counts, from matched order (0: none) and the model's entropy in nats.
    Multipliers and boost act on it: on the probability they would create mass."""
    low, high, scale = cfg.ngram_alpha_min, cfg.ngram_alpha_max, cfg.ngram_entropy_scale
    place = np.maximum(order - 2, 0)
    centre = np.take(cfg.ngram_entropy_center, place, mode="clip") - cfg.ngram_center_slope * place
    alpha = low + (high - low) / (1 + np.exp(-scale * (entropy - centre)))
    if cfg.ngram_alpha:  # PR #1026, entropy in the place of the target's own loss
        alpha = cfg.ngram_alpha * (entropy / cfg.ngram_nll_threshold).clip(0.1, 2.0)
    alpha = alpha * boost * np.take(cfg.ngram_multipliers, place, mode="clip")
    return np.where(order > 0, alpha.clip(0, 0.95), 0.0)
