"""What a server keeps of its answers: so that a request can go on from one, and so that one can be learnt from."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
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
