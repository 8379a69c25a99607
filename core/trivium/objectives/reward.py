"""Reward models: a scalar for an answer, learnt from pairs (Bradley and Terry 1952; Ouyang et al. 2022, 2203.02155).

The score is read at a document's last token, its end-of-turn, so what follows it (padding, a neighbour) never matters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from trivium.objectives.config import RewardConfig
from trivium.objectives.logprobs import at_least_fp32, num_segments
from trivium.objectives.preference import num_pairs, split_pairs
from trivium.objectives.protocol import Forward, Objective
from trivium.types import LossOutput, Metric, PreferenceBatch, TokenBatch


def bradley_terry(chosen: Tensor, rejected: Tensor, margin: float = 0.0, centering: float = 0.0) -> Tensor:
    """-log sigmoid(r_c - r_r - margin) + centering * (r_c + r_r)^2 of each pair, (P,).

    >>> bradley_terry(torch.tensor([1.0]), torch.tensor([0.0]))  # ln(1 + e^-1)
    tensor([0.3133])
    """
    return -F.logsigmoid(chosen - rejected - margin) + centering * (chosen + rejected) ** 2


def segment_scores(forward: Forward, batch: TokenBatch) -> Tensor:
    """(B, S) fp32 score of each document, read at its last token; 0 where a row has fewer documents."""
    assert forward.score is not None, "the model has no score head"
    hidden = forward(batch.tokens, batch.positions, batch.segments)
    if batch.segments is None:
        return at_least_fp32(forward.score(hidden[:, -1]))
    last = batch.segments != F.pad(batch.segments[:, 1:], (0, 1))  # the next token is another document's, or none
    last &= batch.segments > 0
    rows = torch.arange(len(last), device=last.device)[:, None].expand_as(last)
    columns = num_segments(batch)
    scores = at_least_fp32(forward.score(hidden[last]))[:, 0]
    index = (rows * columns + batch.segments - 1)[last]
    return scores.new_zeros(len(last) * columns).index_add(0, index, scores).view(len(last), columns)


class Reward(Objective):
    """Bradley-Terry on a score head of the model's own."""

    unit: ClassVar[str] = "pair"
    reads: ClassVar[str] = "pairs"
    batch: ClassVar[type[TokenBatch]] = PreferenceBatch
    scores: ClassVar[bool] = True
    phases: ClassVar[frozenset[str]] = frozenset({"reward"})
    config: RewardConfig

    @property
    def at_start(self) -> Mapping[str, float]:
        """A new head is zero: every score is 0."""
        return {"loss": math.log(1 + math.exp(self.config.margin))}

    def count(self, batch: PreferenceBatch) -> Tensor:
        return num_pairs(batch).sum()

    def __call__(self, forward: Forward, batch: PreferenceBatch) -> LossOutput:
        chosen, rejected = split_pairs(segment_scores(forward, batch), batch)
        loss = bradley_terry(chosen, rejected, self.config.margin, self.config.centering)
        pairs = torch.as_tensor(len(chosen), device=chosen.device)
        figures = {
            "accuracy": (chosen > rejected).float(),
            "reward/chosen": chosen,
            "reward/rejected": rejected,
            "reward/margin": chosen - rejected,
        }
        return LossOutput(loss.sum(), {k: Metric(v.detach().sum(), pairs) for k, v in figures.items()})
