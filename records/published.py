"""What only the published systems add: their variables, a start, two stages of an evaluation.

Test-time training (ttt.py), their backoff over exact counts (cascade.py) and their scorers as
written (as_written.py) lie beside train_gpt.py: no proof needs them.
"""

import copy
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

import numpy as np
import torch

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


def overtone(std: float, weight: torch.Tensor, _: ModuleType) -> None:
    """OVERTONE_INIT: normal, then singular values proportional to 1 / sqrt(k) (PR #810)."""
    u, values, v = torch.linalg.svd(weight.normal_(std=std), full_matrices=False)
    falling = torch.arange(1, len(values) + 1) ** -0.5
    weight.copy_(u * (values[0] * falling) @ v)


def evaluate(model: Any, weights: dict, scores: Any, report: Any, script: ModuleType) -> Any:
    """Test-time training where it is on; scores of the unquantised weights where NGRAM_SCHEME was
    measured on these (PR #864) -> Scores that feed the mixture"""
    cfg, rt, stream = report.cfg, report.rt, report.text.stream
    if cfg.ttt_enabled:
        student = script.beside("ttt.TestTimeTraining", model, rt, cfg)
        scores = student.score(stream)
        report.score("ttt", scores.log_prob)
    scores = with_change(scores, model, stream, script)
    if weights and cfg.ngram_scheme and cfg.pseudo_weights == "ema":
        model = copy.deepcopy(model)
        model.load_state_dict(weights)
        raw = script.WindowScorer(model, rt, cfg).score(stream, cfg.eval_stride)
        raw = with_change(raw, model, stream, script)
        script.beside("folder.save_scores", report, "scores_ema.npz", raw, raw.log_prob)
    return scores


def with_change(scores: Any, model: Any, stream: np.ndarray, script: ModuleType) -> Any:
    """Scores with their column pe_delta, where the model has pre-enrichment"""
    if not model.cfg.pre_enrich_dim:
        return scores
    return scores._replace(pe_delta=enrichment_change(model, stream, PIECE, script))


@torch.no_grad()
def enrichment_change(model: Any, stream: np.ndarray, piece: int, script: ModuleType) -> np.ndarray:
    """Norm of the change by pre-enrichment (PR #810's confidence) at each input of a stream of N +
    1 tokens, float64 (N,): of the token and the two before (smear over bigrams), so in pieces
    that overlap by two."""
    parts, device = [], model.tok_emb.device
    for a in range(0, len(stream) - 1, piece):
        first = max(a - 2, 0)
        ids = stream[first : min(a + piece, len(stream) - 1)].astype(np.int64)
        shared = script.Pass(model, ids := torch.from_numpy(ids)[None].to(device))
        model.embed(ids, shared)
        change = (shared.enriched - shared.plain).double().norm(dim=-1)
        parts.append(change[0, a - first :].cpu().numpy())
    return np.concatenate(parts)


def pseudo_score(report: Any, script: ModuleType) -> None:
    """NGRAM_SCHEME's line: a published scorer as written, no code length, as its mass shows."""
    cfg, rt = report.cfg, report.rt
    if cfg.ngram_scheme:
        weights = "ema" if (rt.folder / "scores_ema.npz").exists() else "artifact"
        script.beside("as_written.print_pseudo", report, weights)


def window_mass(model: Any, rt: Any, cfg: Any, stream: np.ndarray, script: ModuleType) -> float:
    """Largest error of the mixture's mass among the first targets that windows score; documents are
    added up by the codec. stream: N + 1 tokens"""
    scorer, mixture = (
        script.WindowScorer(model, rt, cfg),
        script.Mixture(rt, cfg, 1, isolated=False),
    )
    ends = np.arange(1, scorer.batch + 1) * cfg.eval_stride
    outputs = scorer.predict(*scorer.windows(stream, ends, cfg.eval_stride)[:2])
    columns = [column.flatten(0, 1)[: script.WITNESSES].split(1) for column in outputs]
    for row, token in zip(zip(*columns, strict=True), stream[1:, None], strict=False):
        mixture.distributions(row, np.array([0]))
        mixture.learn(token)
    return mixture.mass_error
