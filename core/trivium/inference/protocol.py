"""What an inference backend is: token ids in, token events out; text never makes a round trip."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from trivium.errors import BackendError
from trivium.inference.constrain import CONSTRAINTS, how_to_hold
from trivium.types import Request, SamplingParams, TokenEvent

BASIC = frozenset({"temperature", "top_k", "top_p", "seed", "stop_ids", "max_tokens"})


@dataclass(frozen=True)
class Capabilities:
    """What a backend can do; a request beyond it is an error, never a silent change."""

    context: int  # tokens of prompt and answer together
    vocab_size: int = 0  # token ids are below it; 0 is not known
    sampling: frozenset[str] = BASIC  # fields of SamplingParams that it honours
    shares_weights: bool = False  # samples from the very weights that are being trained
    generates: bool = True  # answers requests; one that does not refuses each of them
    embeds: bool = False  # has vectors of texts, from `embed`
    similarity: str = "cosine"  # how those are compared: cosine | dot
    unit: bool = True  # they have length 1
    rewards: bool = False  # judges answers, with `reward`


@dataclass(frozen=True)
class Stats:
    """Counters since the backend was made, and what it holds now (running, waiting, and so on)."""

    requests: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    seconds: float = 0.0
    weight_version: int = 0
    cached_tokens: int = 0  # of prompts, found in the prefix cache
    drafted_tokens: int = 0  # proposed by speculation
    accepted_tokens: int = 0  # of those, kept
    preempted: int = 0  # times a running request made room and began again
    running: int = 0
    waiting: int = 0
    slots: int = 0  # tokens whose keys and values fit in memory
    used_slots: int = 0  # of those, held by running requests
    cut_texts: int = 0  # embedded in part, since they were longer than the context
    cached_slots: int = 0  # held for later prompts, given up when room is needed


class Backend(ABC):
    """Built as `cls(config, model, tokenizer)`. Not safe for several threads at once."""

    _aborted: set[str] | None = None  # while `generate` runs: whose events it no longer tells
    reads: Any = None
    """A temporary folder with what it reads, if that was written for it."""

    @abstractmethod
    def add(self, request: Request) -> None:
        """Take a request, to be served by `step`. Raises BackendError, naming it, for one that can never be served."""

    @abstractmethod
    def step(self) -> list[TokenEvent]:
        """Serve what was added a little further; the events that this made, maybe none. A request that fails gets an
        event with finish_reason "error", and the others go on."""

    @property
    @abstractmethod
    def busy(self) -> bool:
        """Whether `step` has anything to do."""

    @abstractmethod
    def drop(self, request_id: str) -> None:
        """Forget a request and free what it held. One that is not known is no error."""

    def abort(self, request_id: str) -> None:
        """End a request from outside: it gets no further events, not even those of the step that is being read."""
        if self._aborted is not None:
            self._aborted.add(request_id)
        self.drop(request_id)

    @abstractmethod
    def score(self, token_ids: Sequence[int]) -> list[float]:
        """log p(token t | tokens before t) for t = 1.. of one sequence (the first token has no probability)."""

    @abstractmethod
    def update_weights(self, version: int) -> None:
        """The weights changed: nothing computed from the old ones is used again. Refused while requests run."""

    @abstractmethod
    def capabilities(self) -> Capabilities:
        """What this backend can do."""

    @abstractmethod
    def stats(self) -> Stats:
        """Counters so far."""

    def embed(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """(N, C) fp32: a vector of each sequence, at length 1 where `capabilities().unit`. Of a language model the mean
        of the last hidden states; of an encoder what it was trained to give."""
        raise BackendError(f"{type(self).__name__} has no embeddings")

    def reward(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """(N,) fp32: a reward model's score of each document, read at its last token."""
        raise BackendError(f"{type(self).__name__} has no rewards")

    def health(self) -> bool:
        """Whether it can serve."""
        return True

    def check(self, request: Request) -> None:
        """Refuse what this backend cannot honour. Raises BackendError."""
        has = self.capabilities()
        if not has.generates:
            raise BackendError(f"request {request.id}: {type(self).__name__} writes no text")
        for f in fields(SamplingParams):
            if f.name not in has.sampling and getattr(request.params, f.name) != f.default:
                raise BackendError(
                    f"request {request.id}: {type(self).__name__} cannot honour "
                    f"{f.name}={getattr(request.params, f.name)!r}{how_to_hold() if f.name in CONSTRAINTS else ''}"
                )
        ids, wanted = request.prompt_ids, len(request.prompt_ids) + request.params.max_tokens
        if not ids:
            raise BackendError(f"request {request.id}: the prompt is empty")
        if wanted > has.context:
            raise BackendError(
                f"request {request.id}: {len(ids)} prompt tokens and max_tokens={request.params.max_tokens} need "
                f"{wanted}, the model's context is {has.context}; shorten the prompt or lower "
                "inference.sampling.max_tokens"
            )
        told = (*ids, *request.params.stop_ids, *(token for token, _ in request.params.logit_bias))
        if has.vocab_size and not 0 <= min(told) <= max(told) < has.vocab_size:
            raise BackendError(f"request {request.id}: token ids must be below {has.vocab_size}")

    def generate(self, requests: Sequence[Request]) -> Iterator[TokenEvent]:
        """Events of all requests as they are made, interleaved; each request's last event has a finish_reason.

        Raises BackendError before the first event for a request that can never be served, naming it, and when one
        fails. A reader that leaves early aborts what is left. A request that is aborted meanwhile ends without a word.
        """
        ids = {request.id for request in requests}
        if self.busy:
            raise BackendError("generate was called while other requests are served; use add and step")
        if len(ids) < len(requests):
            names = [request.id for request in requests]
            raise BackendError(f"two requests have the id {next(n for n in names if names.count(n) > 1)!r}")
        for request in requests:
            self.check(request)
        gone = self._aborted = set[str]()
        try:
            for request in requests:
                self.add(request)
            while self.busy:
                for event in self.step():
                    if event.request_id in gone:
                        continue
                    if event.finish_reason == "error":
                        raise BackendError(f"request {event.request_id}: {event.error}")
                    yield event
        finally:
            self._aborted = None
            for name in ids:
                self.drop(name)


def similarities(query: Tensor, others: Tensor, how: str) -> Tensor:
    """(N,) similarity of `query` (C,) and each of `others` (N, C). how: `Capabilities.similarity`.

    >>> import torch
    >>> similarities(torch.tensor([0.0, 2.0]), torch.tensor([[0.0, 3.0], [4.0, 0.0]]), "cosine")
    tensor([1., 0.])
    >>> similarities(torch.tensor([0.0, 2.0]), torch.tensor([[0.0, 3.0], [4.0, 0.0]]), "dot")
    tensor([6., 0.])
    """
    if how == "cosine":
        query, others = F.normalize(query, dim=-1), F.normalize(others, dim=-1)
    return others @ query


def collect(backend: Backend, requests: Sequence[Request]) -> dict[str, list[TokenEvent]]:
    """Run requests to their end: request id -> its events."""
    events: dict[str, list[TokenEvent]] = {r.id: [] for r in requests}
    for event in backend.generate(requests):
        events[event.request_id].append(event)
    return events
