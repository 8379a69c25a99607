"""Next token, but in some batches the loss or a gradient is NaN, infinite or 1e30: a pure function of the data.

So the same data is bad again after a kill, and a run that is continued can be compared with one that was not.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from trivium.objectives.next_token import NextToken
from trivium.objectives.protocol import Forward
from trivium.selftest.plugin import PoisonedConfig
from trivium.types import LossOutput, TokenBatch


class _Plant(torch.autograd.Function):
    """Zero, whose gradient is `value`."""

    @staticmethod
    def forward(ctx: Any, at: Tensor, value: float) -> Tensor:
        ctx.value = value
        return torch.zeros_like(at)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return torch.full_like(gradient, ctx.value), None


class Poisoned(NextToken):
    """Built as every objective; plants only while training."""

    config: PoisonedConfig

    def __init__(self, config: PoisonedConfig) -> None:
        super().__init__(config)
        self._first: TokenBatch | None = None  # of a step that is hit

    def prepare(self, forward: Forward, batches: Sequence[TokenBatch], total: Callable[[Tensor], Tensor]) -> None:
        drawn = zlib.crc32(batches[0].tokens.cpu().numpy().tobytes())
        self._first = batches[0] if drawn % self.config.share == self.config.salt else None

    def __call__(self, forward: Forward, batch: TokenBatch) -> LossOutput:
        output = super().__call__(forward, batch)
        hit = self._first is not None and (self.config.place == "loss" or batch is self._first)
        if not forward.training or not hit:
            return output
        value = float(self.config.value)
        if self.config.place == "gradient":
            return LossOutput(output.loss_sum + _Plant.apply(forward.head.weight[3, 5], value), output.metrics)
        return LossOutput(output.loss_sum * value, output.metrics)
