"""Talking in a terminal: lines in, answers out as they are made, and commands that begin with a slash."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Protocol

from trivium.errors import BackendError, SessionError, TriviumError
from trivium.inference.conversation import SETTINGS, Answered, Conversation

HELP = "/help shows what else there is, a \\ at the end of a line goes on in the next, Ctrl-C stops an answer"
COMMANDS = """\
/reset           begin another conversation; the system message stays
/save [name]     tell what this conversation is kept as, or give it a name
/load name       go on in another; "/load name copy" makes a copy for this model of one held with another
/sessions        list what is kept
/system [text]   begin anew with this system message; without text, show it
/regen           answer the last question once more; the earlier answer is kept beside
/edit text       ask this in place of the last question
/good, /bad      say what the last answer was worth; words after it are kept with it
/set [name n]    change how answers are drawn, such as /set temperature 0.7; without a name, show it
/stats           tokens a second, tokens cached, how full the context is
/exit            leave, as Ctrl-D does"""
NO_FEEDBACK = "feedback is not kept; start with server.feedback=true to keep it"
LISTED = 20


class Feedback(Protocol):
    """What keeps answers and what people say of them."""

    def record(self, conversation: Conversation, answered: Answered) -> str:
        """Keep an answer; its id."""
        ...

    def give(self, id: str, kind: str, value: object, comment: str = "") -> object:
        """Keep what a person says of it."""
        ...


class Talk:
    """One person at a terminal."""

    def __init__(
        self,
        conversation: Conversation,
        write: Callable[[str], None],
        stopped: Callable[[], bool] = lambda: False,
        feedback: Feedback | None = None,
    ) -> None:
        """stopped: whether the answer that is being written is no longer wanted."""
        self.conversation, self.write, self.stopped, self.feedback = conversation, write, stopped, feedback
        self._recorded = ""

    def line(self, line: str) -> bool:
        """One line of a person; False to leave. What cannot be done says why, and the talk goes on."""
        line = line.strip()
        if line in ("/exit", "/quit"):
            return False
        if not line:
            return True
        try:
            if line.startswith("/"):
                name, _, rest = line[1:].partition(" ")
                does = getattr(self, f"_{name}", None) if name in NAMES else None
                if does is None:
                    self._say(f"(there is no /{name}; there are {', '.join('/' + name for name in sorted(NAMES))})")
                else:
                    does(rest.strip())
            else:
                self._answer(self.conversation.ask(line))
        except TriviumError as error:
            self.write(f"({error})\n")
        except KeyboardInterrupt:
            self._say(" (stopped; the turn is not kept)")
        return True

    def _say(self, text: str) -> None:
        self.write(text + "\n")

    def _answer(self, pieces: Iterator[str]) -> None:
        for piece in pieces:
            self.write(piece)
            if self.stopped():
                pieces.close()  # type: ignore[attr-defined] - a generator, which lets go of the engine's row
                raise KeyboardInterrupt
        self.write("\n")
        answered = self.conversation.last
        if self.feedback is not None and answered is not None:
            self._recorded = self.feedback.record(self.conversation, answered)
        if answered is not None and answered.events[-1].finish_reason == "length":
            self._say(f"(cut at {len(answered.events)} tokens; /set max_tokens {2 * len(answered.events)} allows more)")

    def _help(self, rest: str) -> None:
        self._say(COMMANDS)

    def _reset(self, rest: str) -> None:
        self.conversation.reset()
        self._say("(forgotten)" if self.conversation.store.file is None else "(a new conversation)")

    def _save(self, rest: str) -> None:
        here = self.conversation
        if rest:
            here.name(rest)
        where = here.store.file
        name = here.session.title or here.session.id
        if where is None:
            self._say("(kept in memory only; sessions.path= says where to keep conversations)")
        elif not here.path and not rest:
            self._say("(nothing was said yet; a conversation is kept from its first answer on)")
        else:
            self._say(f"(kept as {name!r} in {where}, each turn as it is complete)")

    def _load(self, rest: str) -> None:
        if not rest:
            raise SessionError("say which: /load name; /sessions lists them", "missing")
        copy = rest.endswith(" copy")
        here = self.conversation
        try:
            here.open(rest.removesuffix(" copy").strip() if copy else rest, copy=copy)
        except SessionError as error:
            if error.reason != "foreign":
                raise
            raise SessionError(f"{error}: /load {rest} copy", "foreign") from None
        for message in here.messages[-2:]:
            self._say(f"  {message['role']}: {message['content']}")
        self._say(f"(going on in {here.session.title or here.session.id!r}, {len(here.ids)} tokens)")

    def _sessions(self, rest: str) -> None:
        found = self.conversation.store.sessions(LISTED)
        for session in found:
            mark = "*" if session.id == self.conversation.session.id else " "
            when = time.strftime("%Y-%m-%d %H:%M", time.localtime(session.updated))
            self._say(f"{mark} {session.id}  {when}  {session.title}")
        if not found:
            self._say("(none yet)")

    def _system(self, rest: str) -> None:
        here = self.conversation
        if not rest:
            return self._say(f"({here.system or 'no system message'})")
        here.system = rest
        here.reset()
        return self._say("(a new conversation, with this system message)")

    def _regen(self, rest: str) -> None:
        if self.conversation.sampling.temperature == 0:
            self._say("(temperature is 0, so the same answer comes again; /set temperature 0.7)")
        self._answer(self.conversation.regenerate())

    def _edit(self, rest: str) -> None:
        if not rest:
            raise BackendError("say what to ask instead: /edit text")
        self._answer(self.conversation.edit(rest))

    def _good(self, rest: str) -> None:
        self._give("up", rest)

    def _bad(self, rest: str) -> None:
        self._give("down", rest)

    def _give(self, value: str, comment: str) -> None:
        if self.feedback is None:
            raise BackendError(NO_FEEDBACK)
        if not self._recorded or self.conversation.last is None:
            raise BackendError("nothing was answered yet")
        self.feedback.give(self._recorded, "thumb", value, comment)
        self._say("(kept)")

    def _set(self, rest: str) -> None:
        name, _, value = rest.replace("=", " ").partition(" ")
        if value.strip():
            self.conversation.set(name, value.strip())
        shown = [name] if name in SETTINGS else SETTINGS
        self._say(", ".join(f"{n} {getattr(self.conversation.sampling, n):g}" for n in shown))

    def _stats(self, rest: str) -> None:
        here, last = self.conversation, self.conversation.last
        if last is not None and last.events:
            rate = f", {last.rate:.1f} tokens/s" if last.rate else ""
            self._say(f"last answer: {len(last.events)} tokens{rate}, the first after {last.first:.2f} s; of "
                      f"{len(last.request.prompt_ids)} prompt tokens {last.events[0].cached} were cached")  # fmt: skip
        stats, size = here.backend.stats(), here.backend.capabilities().context
        self._say(f"context: {len(here.ids)} of {size} tokens; in all {stats.requests} answers of "
                  f"{stats.generated_tokens} tokens, {stats.cached_tokens} prompt tokens cached")  # fmt: skip


NAMES = [line[1:].split()[0].strip(",") for line in COMMANDS.splitlines()] + ["bad", "help"]


def talk(
    conversation: Conversation,
    read: Callable[[], str | None],
    write: Callable[[str], None],
    stopped: Callable[[], bool] = lambda: False,
    feedback: Feedback | None = None,
) -> None:
    """Read turns until the end of input or /exit."""
    person = Talk(conversation, write, stopped, feedback)
    while (line := read()) is not None and person.line(line):
        pass
