"""What a server keeps of its answers: so that a request can go on from one, and so that one can be learnt from."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class Kept:
    """A response that `previous_response_id` can name.

    system: the instructions it was made under. messages: the conversation after them, the answer last. ids: exactly
    what the model read and drew for it, the end of the last turn included. body: the response as it was sent.
    """

    id: str
    system: str
    messages: list[dict[str, Any]]
    ids: list[int]
    body: dict[str, Any]


class ResponseStore(Protocol):
    """Where responses are kept. Called from several threads, one call at a time for each response."""

    def get(self, id: str) -> Kept | None:
        """A response; None where there is none of that id."""
        ...

    def put(self, kept: Kept) -> None:
        """Keep a response."""
        ...

    def delete(self, id: str) -> bool:
        """Forget a response; whether there was one."""
        ...


class InMemory:
    """The newest `most` responses, until the process ends."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._kept: OrderedDict[str, Kept] = OrderedDict()

    def get(self, id: str) -> Kept | None:
        return self._kept.get(id)

    def put(self, kept: Kept) -> None:
        self._kept[kept.id] = kept
        while len(self._kept) > self._most:
            self._kept.popitem(last=False)

    def delete(self, id: str) -> bool:
        return self._kept.pop(id, None) is not None


@dataclass(frozen=True)
class Answered:
    """One answer of a conversation, with all that it takes to learn from it exactly.

    messages: what was asked. prompt_ids: what the model read; completion_ids: what it drew, and the end of the turn;
    sampled: for each of these whether it was drawn (an end that closes a turn which was too long was not); logprobs:
    natural, under the unmodified distribution, 0 where not sampled. model: SHA-256 of the weights. template: of all
    that turns a conversation into ids. latency: seconds.
    """

    id: str
    messages: list[dict[str, Any]]
    answer: str
    prompt_ids: list[int]
    completion_ids: list[int]
    sampled: list[bool]
    logprobs: list[float]
    model: str
    template: str
    sampling: dict[str, Any] = field(default_factory=dict)
    weight_version: int = 0
    latency: float = 0.0
    finish_reason: str = "stop"
    tools: list[dict[str, Any]] = field(default_factory=list)
    user: str = ""


class Feedback(Protocol):
    """What `server.feedback=true` needs: answers in, and verdicts on them. Called outside the event loop."""

    def record(self, answered: Answered) -> None:
        """Keep an answer; a TriviumError is told in the log and changes nothing for who asked."""
        ...

    def feedback(self, body: dict[str, Any]) -> dict[str, Any]:
        """What a client says of an answer, as it was sent -> what it is told. Raises TriviumError for what is not
        taken; its `status`, if it has one, is the HTTP status."""
        ...
