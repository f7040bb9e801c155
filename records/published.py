"""What only the published systems add: their variables, a start, two stages of an evaluation.

Test-time training (ttt.py), their backoff over exact counts (cascade.py) and their scorers as
written (as_written.py) lie beside train_gpt.py: no proof needs them.
"""

from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

PIECE = 1 << 14  # tokens embedded at once


def variables(script: ModuleType) -> type:
    """The base of train_gpt.py's Config that declares them."""
    Count, Fraction, Positive = script.Count, script.Fraction, script.Positive

    @dataclass(frozen=True)
    class Published:
        # Test-time training, score first
        ttt_enabled: bool = False  # on each scored chunk
        ttt_use_lora: bool = False  # Adam on low rank; 0: SGD on all
        ttt_lora_rank: Count = 8  # of queries, values
        ttt_lora_lr: float = 0.01  # falls as a cosine
        ttt_lr: float = 0.002  # SGD, the same
        ttt_momentum: Fraction = 0.9  # SGD
        ttt_epochs: Count = 3  # over each chunk
        ttt_chunk_tokens: Count = 32_768  # scored, then learned
        ttt_batch_seqs: Count = 32  # sequences in a step
        ttt_grad_clip: Positive = 1.0  # largest gradient norm

        # Published n-gram mixture, on exact counts
        ngram_min_count: int = 2  # least count of a context
        ngram_alpha_min: Fraction = 0.05  # least weight of counts
        ngram_alpha_max: Fraction = 0.60  # largest weight of counts
        ngram_entropy_center: tuple[float, ...] = (3.0,)  # of the sigmoid, orders 2, 3, ..., nats
        ngram_center_slope: float = 0.25  # its fall per order
        ngram_entropy_scale: float = 2.0  # its steepness
        ngram_multipliers: tuple[float, ...] = (
            0.3,
            0.3,
            0.97,
            2.0,
        )  # of the weight, orders 2, 3, ...
        ngram_alpha: Fraction = 0.0  # linear, at NGRAM_NLL_THRESHOLD; 0: sigmoid
        ngram_nll_threshold: Positive = 2.5  # entropy, nats

        # Published n-gram scorers as written
        ngram_scheme: Literal["", "pr864", "pr810", "pr1026", "pr993", "pr808"] = ""  # also print
        ngram_buckets: Count = 4_194_304  # counters in a table
        ngram_chunk_tokens: Count = 65_536  # targets between updates
        ngram_caches: Count = 1  # as of so many ranks
        pseudo_weights: Literal["artifact", "ema"] = "artifact"  # they run on

        def problems(self):
            """(variable, is it wrong, what it must be), for Config.check"""
            rest = self.ttt_chunk_tokens % self.window
            proof, cascade = self.scorer == "documents", self.mixer == "cascade"
            return (
                ("TTT_CHUNK_TOKENS", self.ttt_enabled and rest, "times EVAL_SEQ_LEN"),
                ("SCORER", self.ttt_enabled and proof, "sliding with TTT_ENABLED=1"),
                (
                    "NGRAM_MIXER",
                    cascade and proof and self.codec_tokens,
                    "blend, or CODEC_TOKENS=0",
                ),
            )

    return Published


def pseudo_score(report: Any, script: ModuleType) -> None:
    """NGRAM_SCHEME's line: a published scorer as written, no code length, as its mass shows."""
    cfg, rt = report.cfg, report.rt
    if cfg.ngram_scheme:
        weights = "ema" if (rt.folder / "scores_ema.npz").exists() else "artifact"
        script.beside("as_written.print_pseudo", report, weights)
