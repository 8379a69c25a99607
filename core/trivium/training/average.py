"""A running average of the weights: steadier than the last ones, and what others get where it is kept."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trivium.models.weights import local


class WeightAverage:
    """Exponential moving average, in fp32 (Polyak and Juditsky 1992, https://doi.org/10.1137/0330046).

    The decay grows from 0.18 to `decay` as (1 + step) / (10 + step), so that the first, random weights are forgotten.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self._of = {p: p.detach().float().clone() for p in model.parameters() if p.requires_grad}

    @torch.no_grad()
    def update(self, step: int, bad: Tensor) -> None:
        """Take in the weights after optimizer step `step` (from 1), unless it was not taken (`bad` is 1.0)."""
        weight = (1 - min(self.decay, (1 + step) / (10 + step))) * (1 - bad)
        now = [local(p).detach().float() for p in self._of]
        torch._foreach_lerp_([local(a) for a in self._of.values()], now, [weight] * len(now))  # type: ignore[reportPrivateImportUsage]

    def weights(self) -> dict[nn.Parameter, Tensor]:
        """The average of each trained parameter."""
        return self._of

    @torch.no_grad()
    def restore(self, weights: dict[nn.Parameter, Tensor]) -> None:
        """Take up a checkpoint's average."""
        for parameter, average in self._of.items():
            average.copy_(weights[parameter])
