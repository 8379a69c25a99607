"""Preference pairs: raise the likelihood of the chosen answer against the rejected one, measured from a reference.

With D = (log pi_c - log ref_c) - (log pi_r - log ref_r) per pair, each loss is a function of D and beta alone. DPO:
Rafailov et al. 2023, https://arxiv.org/abs/2305.18290, equation 7, and its relatives. A log-probability is the sum over
the answer's tokens, its end-of-turn included; prompts never enter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from trivium.objectives.config import PreferenceConfig
from trivium.objectives.logprobs import segment_sums, sequence_logprobs, target_logprobs
from trivium.objectives.protocol import Forward, Objective
from trivium.types import LossOutput, Metric, PreferenceBatch, TokenBatch

PairLoss = Callable[[Tensor, float, float], Tensor]
"""(P,) margins D, beta, label smoothing e -> (P,) losses."""


def sigmoid(margin: Tensor, beta: float, smoothing: float) -> Tensor:
    """-(1-e) log sigmoid(bD) - e log sigmoid(-bD); e = 0 is DPO, e > 0 conservative DPO.

    >>> sigmoid(torch.tensor([0.0]), 0.1, 0.0)  # ln 2 at the start, where policy and reference agree
    tensor([0.6931])
    """
    return -(1 - smoothing) * F.logsigmoid(beta * margin) - smoothing * F.logsigmoid(-beta * margin)


def robust(margin: Tensor, beta: float, smoothing: float) -> Tensor:
    """Unbiased under labels flipped with probability e (2403.00409, equation 13); may be negative, rightly."""
    flipped = (1 - smoothing) * F.logsigmoid(beta * margin) - smoothing * F.logsigmoid(-beta * margin)
    return -flipped / (1 - 2 * smoothing)


def hinge(margin: Tensor, beta: float, smoothing: float) -> Tensor:
    """max(0, 1 - bD) (SLiC, 2305.10425, on the reference's margin)."""
    return F.relu(1 - beta * margin)


def ipo(margin: Tensor, beta: float, smoothing: float) -> Tensor:
    """(D - 1/(2b))^2 (2310.12036, equation 17), D of log-probabilities per token."""
    return (margin - 1 / (2 * beta)) ** 2


LOSSES: dict[str, PairLoss] = {"sigmoid": sigmoid, "robust": robust, "hinge": hinge, "ipo": ipo}


def num_pairs(batch: TokenBatch) -> Tensor:
    """Pairs of every row, (B,)."""
    assert batch.segments is not None
    return batch.segments.amax(1) // 2


def split_pairs(values: Tensor, batch: TokenBatch) -> tuple[Tensor, Tensor]:
    """(B, S) of each document -> (P,) of the chosen and (P,) of the rejected ones."""
    first, second = values[:, 0::2], values[:, 1::2]
    there = torch.arange(second.shape[1], device=values.device) < num_pairs(batch)[:, None]
    return first[:, : second.shape[1]][there], second[there]


class Preference(Objective):
    """DPO and its relatives, by `loss`; `sft_weight` adds the chosen answer's own cross-entropy per token."""

    unit: ClassVar[str] = "pair"
    reads: ClassVar[str] = "pairs"
    batch: ClassVar[type[TokenBatch]] = PreferenceBatch
    phases: ClassVar[frozenset[str]] = frozenset({"preference"})
    config: PreferenceConfig

    @property
    def companions(self) -> tuple[str, ...]:
        return ("reference",)

    @property
    def at_start(self) -> Mapping[str, float]:
        """The chosen answer's reward too: a wrong mask or scale of both answers alike cancels in their margin."""
        c = self.config
        start = {"reward/margin": 0.0, "reward/chosen": 0.0}
        if c.sft_weight:
            return start
        loss = {"sigmoid": math.log(2), "robust": math.log(2), "hinge": 1.0, "ipo": 0.25 / c.beta**2}[c.loss]
        return {"loss": loss, **start}

    def count(self, batch: PreferenceBatch) -> Tensor:
        return num_pairs(batch).sum()

    def consult(self, batch: PreferenceBatch, models: Mapping[str, Forward]) -> None:
        if batch.reference is None:
            batch.reference = sequence_logprobs(models["reference"], batch)

    def __call__(self, forward: Forward, batch: PreferenceBatch) -> LossOutput:
        assert batch.reference is not None, "consult() comes first"
        logps = target_logprobs(forward, batch)
        sums, lengths = segment_sums(logps, batch), segment_sums(torch.ones_like(logps), batch)
        ratios = sums - batch.reference[:, : sums.shape[1]]
        if self.config.loss == "ipo":
            ratios = ratios / lengths.clamp(min=1)
        chosen, rejected = split_pairs(ratios, batch)
        margin = chosen - rejected
        loss = LOSSES[self.config.loss](margin, self.config.beta, self.config.label_smoothing)
        written = -split_pairs(sums / lengths.clamp(min=1), batch)[0]
        if self.config.sft_weight:
            loss = loss + self.config.sft_weight * written
        pairs = torch.as_tensor(len(margin), device=margin.device)
        figures = {
            "accuracy": (margin > 0).float(),
            "reward/chosen": self.config.beta * chosen,
            "reward/rejected": self.config.beta * rejected,
            "reward/margin": self.config.beta * margin,
            "nll": written,
        }
        return LossOutput(loss.sum(), {k: Metric(v.detach().sum(), pairs) for k, v in figures.items()})
