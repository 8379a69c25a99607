"""One answer on its way to whoever asked: events in; text, its log-probabilities and its count out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from trivium.data.tokenizer import Tokenizer
from trivium.inference.text import StopStrings, TextStream
from trivium.types import TokenEvent


@dataclass(frozen=True)
class Piece:
    """Text that can be shown, maybe none, and the tokens that it is known with: each with the character of the answer
    at which its own text begins."""

    text: str
    tokens: list[tuple[int, TokenEvent]]


@dataclass
class Choice:
    """tokenizer: of the model. stop_ids: tokens that end the answer and are no text. stops: strings that do.

    drawn: every token of the answer, with the one that ended it. text: what was shown so far. finish_reason: "stop" or
    "length" once it has ended.
    """

    tokenizer: Tokenizer
    stop_ids: Sequence[int]
    stops: Sequence[str] = ()
    drawn: list[TokenEvent] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None

    def __post_init__(self) -> None:
        self._stream, self._stop = TextStream(self.tokenizer), StopStrings(self.stops)
        self._made = 0  # characters that were decoded
        self._waiting: list[tuple[int, TokenEvent]] = []

    @property
    def cached(self) -> int:
        """Tokens of the prompt that were not computed again."""
        return self.drawn[0].cached if self.drawn else 0

    @property
    def met(self) -> str | None:
        """The stop string that ended it."""
        return self._stop.met

    def turn_ids(self) -> list[int]:
        """What was drawn, closed as every turn in training is: what the next turn of a conversation stands on."""
        ids, end = [event.token_id for event in self.drawn], self.tokenizer.eot_id
        if ids and ids[-1] == end:
            return ids
        return [*ids[: -1 if ids and ids[-1] in self.stop_ids else None], end]

    def push(self, event: TokenEvent) -> Piece:
        """What this token completes. Nothing may be pushed once `finish_reason` is set."""
        assert self.finish_reason is None, self.finish_reason
        self.drawn.append(event)
        shown = ""
        if event.token_id not in self.stop_ids:  # a constraint may end an answer with a token that is text
            self._waiting.append((self._made, event))
            new = self._stream.push(event.token_id)
            self._made += len(new)
            shown = self._stop.push(new)
        if event.finish_reason is not None and self.met is None:
            rest = self._stream.finish()
            self._made += len(rest)
            shown += self._stop.push(rest)
        if self.met is not None:
            self.finish_reason = "stop"
        elif event.finish_reason is not None:
            self.finish_reason = event.finish_reason
            shown += self._stop.finish()
        self.text += shown
        end = len(self.text) if self.finish_reason is None or self.met is not None else self._made + 1
        known = [one for one in self._waiting if one[0] < end]
        self._waiting = self._waiting[len(known) :]
        return Piece(shown, known)
