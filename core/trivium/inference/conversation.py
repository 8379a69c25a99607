"""A conversation: turns in, streamed answers out, history kept as the ids that were really read and drawn."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from trivium.data.chat import Chat
from trivium.data.tokenizer import Tokenizer
from trivium.errors import ConfigError, SessionError
from trivium.inference.config import SamplingConfig
from trivium.inference.exchange import (
    CONTEXT,
    Answer,
    Exchange,
    Summarise,
    begin,
    context_of,
    copy_for,
    message_of,
    summary_prompt,
    system_of,
)  # fmt: skip
from trivium.inference.protocol import Backend
from trivium.inference.sessions import Session, SessionStore, Turn, clean, new_session
from trivium.inference.text import TextStream
from trivium.types import Request, SamplingParams, TokenEvent


def sampling_params(config: SamplingConfig, stop_ids: tuple[int, ...]) -> SamplingParams:
    """Settings of a run -> parameters of a request."""
    return SamplingParams(
        max_tokens=config.max_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        seed=config.seed,
        stop_ids=stop_ids,
    )


@dataclass(frozen=True)
class Answered:
    """The last answer: what was asked for and what came. seconds: from the question to the last token; first: to the
    first one."""

    messages: list[dict[str, Any]]
    request: Request
    events: list[TokenEvent]
    seconds: float
    first: float
    turn: Turn

    @property
    def rate(self) -> float | None:
        """Tokens a second after the first, which waits for the prompt; None of a single one."""
        if len(self.events) < 2 or self.seconds <= self.first:
            return None
        return (len(self.events) - 1) / (self.seconds - self.first)


class Conversation:
    """Messages and their exact ids, in a store. A turn that fails leaves both as they were.

    store: where conversations are kept; None keeps this one in memory. model: what answers, by its hash; a conversation
    that was held with another is not continued. full, summarise: what is done when the context is full.
    """

    def __init__(
        self,
        backend: Backend,
        tokenizer: Tokenizer,
        sampling: SamplingConfig,
        system: str = "",
        *,
        store: SessionStore | None = None,
        model: str = "",
        full: str = "error",
        summarise: Summarise | None = None,
    ) -> None:
        self.backend, self.tokenizer, self.sampling = backend, tokenizer, sampling
        self.chat = Chat(tokenizer)
        self.system, self.model, self.full = system, model, full
        self.summarise = summarise or self._summary
        self.store = store or SessionStore(None)
        self.last: Answered | None = None
        self._writing = ExitStack()
        self.reset()

    def reset(self) -> None:
        """Begin another conversation; the system message stays, and what was said stays in the store."""
        self._use(new_session(self.model, self.template, system=self.system, sampling=asdict(self.sampling)))

    @property
    def template(self) -> str:
        """Of the tokenizer and its chat template, by their hash."""
        return self.tokenizer.fingerprint

    def _use(self, session: Session) -> None:
        """Go on in `session`, as its only writer."""
        taken = ExitStack()
        taken.enter_context(self.store.writing(session.id))
        try:
            path = self.store.path(session.head)
        except BaseException:
            taken.close()
            raise
        self._writing.close()
        self._writing, self.session, self.path, self.last = taken, session, path, None

    def close(self) -> None:
        """Let others write this conversation."""
        self._writing.close()

    def open(self, name: str, *, copy: bool = False) -> None:
        """Go on in a stored conversation, found by its id or title. Raises SessionError for one that was held with
        another model or template; copy: make a copy for this one, and go on in that."""
        if name in (self.session.id, self.session.title):
            return
        found = self.store.find(name)
        if copy and (found.model, found.template) != (self.model, self.template):
            found = copy_for(self.store, found, self.chat, self.model, self.template)
        self.store.check(found, self.model, self.template)
        sampling = replace(self.sampling, **{k: v for k, v in found.sampling.items() if k in SETTINGS})
        self._use(found)
        self.sampling, self.system = sampling, found.system

    def name(self, title: str) -> None:
        """Give this conversation a title to find it by."""
        if self.path:
            self.session = self.store.update(self.session.id, title=title)
        else:
            self.session = self.store.create(replace(self.session, title=clean(title)))

    def set(self, name: str, text: str) -> None:
        """Another value of a sampling setting, from its text. Raises ConfigError."""
        if name not in SETTINGS:
            raise ConfigError(f"{name} is no setting; there are {', '.join(SETTINGS)}")
        kind = type(getattr(self.sampling, name))
        try:
            value = kind(text)
            if not math.isfinite(value):
                raise ValueError(text)
        except (ValueError, OverflowError):
            whole = "a whole number" if kind is int else "a number"
            raise ConfigError(f"{name}={text} must be {whole}") from None
        self.sampling = replace(self.sampling, **{name: value})
        self.session = replace(self.session, sampling=asdict(self.sampling))
        if self.path:
            self.store.update(self.session.id, sampling=self.session.sampling)

    @property
    def messages(self) -> list[dict[str, Any]]:
        """What was said, from the system message on."""
        return [*system_of(self.session), *(message_of(turn) for turn in self.path if turn.role != CONTEXT)]

    @property
    def ids(self) -> list[int]:
        """What the model has read and drawn; the next prompt begins with it."""
        return context_of(self.path).ids

    @property
    def question(self) -> Turn | None:
        """The last one."""
        return next((turn for turn in reversed(self.path) if turn.role == "user"), None)

    def ask(self, content: str) -> Iterator[str]:
        """Answer one user turn, as text pieces. The turn is kept when the answer is complete."""
        return self._ask(content, self.session.head)

    def edit(self, content: str) -> Iterator[str]:
        """Answer another question in place of the last; that one and its answer stay in the store as a branch."""
        return self._ask(content, self._asked().parent)

    def regenerate(self) -> Iterator[str]:
        """Answer the last question once more, with other random numbers; the earlier answer stays beside it."""
        asked = self._asked()
        return self._ask(asked.text, asked.parent)

    def _asked(self) -> Turn:
        if self.question is None:
            raise SessionError("nothing was asked yet", "missing")
        return self.question

    def _ask(self, content: str, parent: str | None) -> Iterator[str]:
        started = time.perf_counter()
        new = [{"role": "user", "content": content}]
        has, wanted = self.backend.capabilities(), self.sampling.max_tokens
        try:
            exchange = begin(
                self.store, self.session, self.chat, new, parent=parent, context=has.context, wanted=wanted,
                full=self.full, summarise=self.summarise,
            )  # fmt: skip
        except SessionError as error:
            if error.reason == "full" and self.full == "error":
                raise SessionError(f"{error}; /reset starts anew", "full") from None
            raise
        request = self._request(exchange)
        stream, events, first = TextStream(self.tokenizer), [], 0.0
        for event in self.backend.generate([request]):
            events.append(event)
            first = first or time.perf_counter() - started
            if event.finish_reason != "stop":
                yield stream.push(event.token_id)
        yield stream.finish()
        seconds = time.perf_counter() - started
        drawn, reason = [e.token_id for e in events], events[-1].finish_reason if events else None
        kept = exchange.commit([Answer(drawn, reason, {"seconds": seconds})])
        self.session = self.store.get(self.session.id)
        self.path = self.store.path(self.session.head)
        self.last = Answered(self.messages[:-1], request, events, seconds, first, kept.answers[0])

    def _request(self, exchange: Exchange) -> Request:
        params = sampling_params(self.sampling, self.tokenizer.stop_ids)
        if params.max_tokens > exchange.room:
            params = replace(params, max_tokens=exchange.room)
        turn = sum(t.role == "user" for t in self.store.path(exchange.parent)) + 1
        again = f"-{exchange.attempt}" if exchange.attempt else ""
        return Request(f"turn-{turn}{again}", tuple(exchange.prompt_ids), params)

    def _summary(self, leaving: Sequence[Turn], earlier: str) -> str:
        """The model's own words for what it will no longer read."""
        prompt, most = summary_prompt(self.chat, leaving, earlier, self.backend.capabilities().context)
        params = replace(sampling_params(self.sampling, self.tokenizer.stop_ids), max_tokens=most, temperature=0.0)
        events = self.backend.generate([Request("summary", tuple(prompt), params)])
        return self.tokenizer.decode([event.token_id for event in events])


SETTINGS = tuple(f.name for f in fields(SamplingConfig))
