"""Verdicts without pairs: answers marked desirable or not (KTO: Ethayarajh et al. 2024, 2402.01306, equation 8).

With u = log pi(y|x) - log ref(y|x) and the policy's distance z0 from the reference, a desirable answer costs
w_d (1 - sigmoid(b (u - z0))) and an undesirable one w_u (1 - sigmoid(b (z0 - u))). z0 = max(0, mean over the whole step
of u on mismatched pairs: a prompt with the completion of another example); it carries no gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from trivium.objectives.config import UnpairedConfig
from trivium.objectives.logprobs import sequence_logprobs
from trivium.objectives.preference import num_pairs, split_pairs
from trivium.objectives.protocol import Forward, Objective
from trivium.types import LossOutput, Metric, TokenBatch, UnpairedBatch


def kto(
    ratio: Tensor, desirable: Tensor, baseline: Tensor, beta: float, weights: tuple[float, float] = (1.0, 1.0)
) -> Tensor:
    """(D,) u, (D,) 1 or 0, scalar z0, (w_d, w_u) -> (D,) losses.

    >>> kto(torch.tensor([0.0, 0.0]), torch.tensor([1.0, 0.0]), torch.tensor(0.0), 0.1)
    tensor([0.5000, 0.5000])
    """
    good = weights[0] * (1 - torch.sigmoid(beta * (ratio - baseline)))
    bad = weights[1] * (1 - torch.sigmoid(beta * (baseline - ratio)))
    return torch.where(desirable > 0.5, good, bad)


class KTO(Objective):
    """Kahneman-Tversky optimisation on packed verdicts; the mismatched half of each unit serves z0 alone."""

    unit: ClassVar[str] = "verdict"
    reads: ClassVar[str] = "labels"
    batch: ClassVar[type[TokenBatch]] = UnpairedBatch
    phases: ClassVar[frozenset[str]] = frozenset({"preference"})
    config: UnpairedConfig

    @property
    def companions(self) -> tuple[str, ...]:
        return ("reference",)

    @property
    def at_start(self) -> Mapping[str, float]:
        """The mean reward too: as many desirable as undesirable answers have loss 0.5 whatever the reference, and kl is
        never below 0."""
        c = self.config
        start = {"kl": 0.0, "reward/mean": 0.0}
        return {"loss": 0.5 * c.desirable_weight, **start} if c.desirable_weight == c.undesirable_weight else start

    def count(self, batch: UnpairedBatch) -> Tensor:
        return num_pairs(batch).sum()

    def consult(self, batch: UnpairedBatch, models: Mapping[str, Forward]) -> None:
        if batch.reference is None:
            batch.reference = sequence_logprobs(models["reference"], batch)

    def prepare(self, forward: Forward, batches: Sequence[UnpairedBatch], total: Callable[[Tensor], Tensor]) -> None:
        distance = torch.stack([self._ratios(forward, b)[1].sum() for b in batches]).sum()
        count = torch.stack([self.count(b) for b in batches]).sum()
        baseline = (total(distance) / total(count)).clamp(min=0)
        for batch in batches:
            batch.baseline = baseline

    def _ratios(self, forward: Forward, batch: UnpairedBatch) -> tuple[Tensor, Tensor]:
        assert batch.reference is not None, "consult() comes first"
        return split_pairs(sequence_logprobs(forward, batch) - batch.reference, batch)

    def __call__(self, forward: Forward, batch: UnpairedBatch) -> LossOutput:
        assert batch.baseline is not None and batch.desirable is not None, "prepare() comes first"
        ratio, _ = self._ratios(forward, batch)
        desirable, _ = split_pairs(batch.desirable, batch)
        weights = (self.config.desirable_weight, self.config.undesirable_weight)
        loss = kto(ratio, desirable, batch.baseline, self.config.beta, weights)
        good = desirable.sum()
        units = torch.as_tensor(len(ratio), device=ratio.device)
        figures = {
            "accuracy": Metric(((ratio > batch.baseline) == (desirable > 0.5)).float().sum(), units),
            "kl": Metric(batch.baseline * units, units),
            "reward/mean": Metric((self.config.beta * ratio).detach().sum(), units),
            # a step may hold verdicts of one kind only
            "reward/chosen": Metric((self.config.beta * ratio * desirable).detach().sum(), good),
            "reward/rejected": Metric((self.config.beta * ratio * (1 - desirable)).detach().sum(), units - good),
        }
        return LossOutput(loss.sum(), figures)
