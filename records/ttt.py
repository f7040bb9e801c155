"""Test-time training, score first: the model learns from a chunk of the text once it is scored.

Behind TTT_ENABLED and the line final_ttt_exact. A decoder would have to train in step with the
encoder, so SCORER=documents, whose score is proved, refuses it.
"""

import copy
import math
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TestTimeTraining:
    """Learns from scored chunks only: SGD on all weights (PR #549), or Adam on low-rank additions
    to the query and value matrices (PR #808). Every rank takes the same steps."""

    def __init__(self, model: Any, rt: Any, cfg: Any, script: ModuleType):
        self.script, self.chunk = script, cfg.ttt_chunk_tokens
        self.model, self.rt, self.cfg = copy.deepcopy(model), rt, cfg
        if cfg.ttt_use_lora:
            self.weights = [*self.factors("qo_bank"), *self.factors("kv_bank")]
            self.optimizer = torch.optim.Adam(self.weights, cfg.ttt_lora_lr)
        else:
            self.weights = [*self.model.requires_grad_().parameters()]
            self.optimizer = torch.optim.SGD(self.weights, cfg.ttt_lr, cfg.ttt_momentum)
        self.loss = rt.compile(self.model)

    def factors(self, bank: str) -> tuple[Tensor, Tensor]:
        """W becomes W + A B, A random and B zero, for the queries or values of a bank -> A, B"""
        L, rank = self.cfg.num_layers, self.cfg.ttt_lora_rank
        _, rows, columns = getattr(self.model, bank).shape
        a = torch.randn(L, rows, rank, generator=torch.Generator().manual_seed(0)) / 100
        a, b = (t.to(self.rt.device).requires_grad_() for t in (a, torch.zeros(L, rank, columns)))
        plain, others = self.model.bank, (0, L) if bank == "qo_bank" else (L, 0)

        def adapted(name: str) -> Tensor:
            added = F.pad(a @ b, (0, 0, 0, 0, *others)) if name == bank else 0
            return plain(name) + added

        self.model.bank = adapted
        return a, b

    def score(self, stream: np.ndarray) -> Any:
        """stream: N + 1 tokens -> Scores of the last N, each chunk by what the ones before it
        taught"""
        scorer = self.script.WindowScorer(self.model, self.rt, self.cfg)
        stride, total, parts = self.cfg.eval_stride, len(stream) - 1, []
        for a in range(0, total, self.chunk):
            b = min(a + self.chunk, total)
            parts.append(scorer.score_windows(stream, np.arange(a, b, stride) + stride, stride))
            if b < total:
                self.learn(stream[a : b + 1], a / self.chunk / ((total - 1) // self.chunk))
        return self.script.Scores(*np.concatenate(parts, 1).reshape(2, -1)[:, :total])

    def learn(self, chunk: np.ndarray, progress: float) -> None:
        """chunk: scored targets and the token before them; progress 0..1 lowers the rate"""
        cfg, rt, length = self.cfg, self.rt, self.cfg.window
        tokens = torch.from_numpy(chunk.astype(np.int64)).to(rt.device)
        for group in self.optimizer.param_groups:
            group["lr"] = self.optimizer.defaults["lr"] * (1 + math.cos(math.pi * progress)) / 2
        for batch in (
            tokens.unfold(0, length + 1, length).split(cfg.ttt_batch_seqs) * cfg.ttt_epochs
        ):
            for weight in self.weights:
                weight.grad = torch.zeros_like(weight)
            if len(mine := batch[rt.rank :: rt.world_size]):  # (rows, window + 1)
                with rt.autocast():
                    loss = self.loss(mine[:, :-1], mine[:, 1:])
                (loss * len(mine) * rt.world_size / len(batch)).backward()
            self.script.average_gradients(self.weights, rt)
            nn.utils.clip_grad_norm_(self.weights, cfg.ttt_grad_clip)
            self.optimizer.step()
