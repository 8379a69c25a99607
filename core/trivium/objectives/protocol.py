"""What an objective is: tensors in, a sum out. The division by the global count happens once, elsewhere."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from trivium.types import LossOutput, TokenBatch


class Forward(Protocol):
    """The part of a model that objectives see (objectives never import models)."""

    embed: nn.Embedding
    head: nn.Linear
    score: nn.Linear | None
    training: bool

    def __call__(self, tokens: Tensor, positions: Tensor, segments: Tensor | None = None) -> Tensor:
        """(B, T) tokens -> (B, T, C) hidden states."""
        ...


class Objective(ABC):
    """Built as `cls(config)`.

    unit: what is counted. reads: the form of its examples ("text", "chat", "pairs", "labels", "answers", or "any" of
    text and chat). batch: the type of its batches. scores: whether it trains a score head, not the language head.
    """

    unit: ClassVar[str] = "token"
    reads: ClassVar[str] = "text"
    batch: ClassVar[type[TokenBatch]] = TokenBatch
    scores: ClassVar[bool] = False
    phases: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, config: Any) -> None:
        self.config = config

    @property
    def companions(self) -> tuple[str, ...]:
        """The frozen models it needs: "reference", "teacher"."""
        return ()

    @property
    def at_start(self) -> Mapping[str, float]:
        """What holds exactly while the model still equals its companions: "loss" (a mean) or a figure's name -> value.

        Checked at the first step, so that a wrong reference, mask or sign is found before it has cost anything.
        """
        return {}

    @abstractmethod
    def count(self, batch: Any) -> Tensor:
        """How many units of `batch` the loss is averaged over: a scalar tensor, known before any forward."""

    def consult(self, batch: Any, models: Mapping[str, Forward]) -> None:  # noqa: B027
        """Note in `batch` what the frozen companions (and "policy", the model as it now is) say of it.

        Called without gradient, in eval mode, before the loss; what is known already is not asked again.
        """

    def prepare(  # noqa: B027
        self, forward: Forward, batches: Sequence[Any], total: Callable[[Tensor], Tensor]
    ) -> None:
        """Statistics of the whole step, noted in each of its micro-batches. total: sums a tensor over all ranks."""

    @abstractmethod
    def __call__(self, forward: Forward, batch: Any) -> LossOutput:
        """The loss of `batch`, **summed** over its counted units, and figures with counts of their own."""
