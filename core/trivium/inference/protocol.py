"""What an inference backend is: token ids in, token events out; text never makes a round trip."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from trivium.types import Request, TokenEvent


@dataclass(frozen=True)
class Capabilities:
    """What a backend can do; a request beyond it is an error, never a silent change."""

    context: int  # tokens of prompt and answer together
    sampling: frozenset[str] = frozenset({"temperature", "top_k", "top_p", "seed", "stop_ids", "max_tokens"})
    shares_weights: bool = False  # samples from the very weights that are being trained


@dataclass(frozen=True)
class Stats:
    """Counters since the backend was made."""

    requests: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    seconds: float = 0.0
    weight_version: int = 0


class Backend(ABC):
    """Built as `cls(config, model, pad_id=...)`."""

    @abstractmethod
    def generate(self, requests: Sequence[Request]) -> Iterator[TokenEvent]:
        """Events of all requests as they are made, interleaved; each request's last event has a finish_reason.

        Raises BackendError before the first event for a request that can never be served, naming it.
        """

    @abstractmethod
    def score(self, token_ids: Sequence[int]) -> list[float]:
        """log p(token t | tokens before t) for t = 1.. of one sequence (the first token has no probability)."""

    @abstractmethod
    def abort(self, request_id: str) -> None:
        """Stop making tokens for a request; it gets no further events."""

    @abstractmethod
    def update_weights(self, version: int) -> None:
        """The weights changed: nothing computed from the old ones is used again."""

    @abstractmethod
    def capabilities(self) -> Capabilities:
        """What this backend can do."""

    @abstractmethod
    def stats(self) -> Stats:
        """Counters so far."""

    def health(self) -> bool:
        """Whether it can serve."""
        return True
