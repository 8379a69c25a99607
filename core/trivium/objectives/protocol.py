"""What an objective is: tensors in, a sum out. The division by the global count happens once, elsewhere."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from trivium.types import LossOutput


class Forward(Protocol):
    """The part of a model that objectives see (objectives never import models)."""

    embed: nn.Embedding
    head: nn.Linear
    training: bool

    def __call__(self, tokens: Tensor, positions: Tensor, segments: Tensor | None = None) -> Tensor:
        """(B, T) tokens -> (B, T, C) hidden states."""
        ...


class Objective(ABC):
    """Built as `cls(config)`. `unit` names what is counted; `companions` the frozen models it needs."""

    unit: ClassVar[str] = "token"
    companions: ClassVar[tuple[str, ...]] = ()
    phases: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, config: Any) -> None:
        self.config = config

    @abstractmethod
    def count(self, batch: Any) -> Tensor:
        """How many units of `batch` the loss is averaged over: a scalar int64 tensor, known before any forward."""

    @abstractmethod
    def __call__(self, forward: Forward, batch: Any) -> LossOutput:
        """The loss of `batch`, **summed** over its counted units, and figures with counts of their own."""
