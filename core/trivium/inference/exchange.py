"""One question and its answer in a stored conversation: what the model reads for it, and what is kept of it.

What was read and drawn is never tokenised again: the next prompt is the ids of every turn so far, and the new question.
When that no longer fits, the oldest questions leave with their answers, or a summary takes their place. Where the
template writes earlier turns otherwise than they were drawn, the history is what it writes. A turn of role "context"
then keeps the ids that the model reads instead, and everything that was said stays in the store.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from trivium.data.chat import Chat, Message
from trivium.errors import DataError, SessionError
from trivium.inference.sessions import Appended, NewTurn, Session, SessionStore, Turn, clean, new_session

CONTEXT = "context"
"""The role of a turn that says what the model reads in place of what was said before. text: the summary, if any; data:
`first`, the first turn that it still reads, None for none; `left`, how many turns it no longer reads."""
SUMMARY = 8
"""A summary has at most an eighth of the context."""
Summarise = Callable[[Sequence[Turn], str], str]
"""The turns that leave, and the summary of those that left before -> a summary of both."""


@dataclass(frozen=True)
class Context:
    """What the model has read of a conversation. turns: those it still reads. ids: exactly what it read."""

    turns: list[Turn]
    ids: list[int]
    summary: str = ""


@dataclass(frozen=True)
class Answer:
    """What was drawn. reason: why it ended. data: what else is known of it, kept with the turn. id: of the turn."""

    drawn: Sequence[int]
    reason: str | None = "stop"
    data: Mapping[str, Any] = field(default_factory=dict)
    id: str = ""


def context_of(path: Sequence[Turn]) -> Context:
    """What is read before the next question."""
    at = max((i for i, turn in enumerate(path) if turn.role == CONTEXT), default=None)
    if at is None:
        return Context(list(path), [i for turn in path for i in turn.ids])
    first = path[at].data["first"]
    before = [turn for turn in path[:at] if turn.role != CONTEXT]
    kept = before[next(i for i, turn in enumerate(before) if turn.id == first) :] if first else []
    return Context([*kept, *path[at + 1 :]], [i for turn in path[at:] for i in turn.ids], path[at].text)


def message_of(turn: Turn) -> dict[str, Any]:
    """A turn as the template reads it."""
    return {"role": turn.role, "content": turn.text, **turn.data.get("message", {})}


def system_of(session: Session, summary: str = "") -> list[dict[str, Any]]:
    """The system message, with what has left the context, if anything."""
    told = f"Earlier in this conversation: {summary}" if summary else ""
    text = "\n\n".join(filter(None, (session.system, told)))
    return [{"role": "system", "content": text}] if text else []


@dataclass(frozen=True)
class Exchange:
    """A question on its way to its answer. Nothing of it is in the store before `commit`."""

    store: SessionStore
    session: Session
    chat: Chat
    parent: str | None
    asked: list[NewTurn]
    prompt_ids: list[int]
    room: int  # tokens left for the answer
    attempt: int  # answers that the store has to this very question
    dropped: int  # turns that have left the context for it

    def commit(self, answers: Sequence[Answer]) -> Appended:
        """Keep the question and its answers, side by side. Raises SessionError for one that was aborted."""
        tokenizer = self.chat.tokenizer
        turns = []
        for answer in answers:
            if answer.reason is None or not answer.drawn:
                raise SessionError("the answer was aborted; the turn is not kept", "missing")
            ids = list(answer.drawn)
            if ids[-1] != tokenizer.eot_id:  # cut short: close the turn, as every turn in training is closed
                ids = [*ids[: -1 if ids[-1] in tokenizer.stop_ids else None], tokenizer.eot_id]
            data = {"tokens": len(answer.drawn), **answer.data, "finish_reason": answer.reason}
            turns.append(NewTurn("assistant", tokenizer.decode(ids), ids, data, answer.id))
        return self.store.append(self.session.id, self.parent, self.asked, turns, begin=self.session)


def begin(
    store: SessionStore,
    session: Session,
    chat: Chat,
    new: Sequence[Message],
    *,
    parent: str | None,
    context: int,
    wanted: int,
    full: str = "error",
    summarise: Summarise | None = None,
) -> Exchange:
    """Ask `new` behind the turn `parent`.

    context: tokens that prompt and answer may have together; wanted: tokens that an answer may have. full: what is done
    when the conversation fills the context: error | drop_oldest | summarise. Raises SessionError.
    """
    new = [{**message, "content": clean(str(message["content"]))} for message in new]
    path = store.path(parent)
    now = context_of(path)
    known, dropped = now, 0
    prompt, now = _prompt(session, chat, now, new)
    need = 1 if full == "error" else max(1, min(wanted, context // 4))
    if full != "error" and now.turns and len(prompt) + need > context:
        for first in [i for i, turn in enumerate(now.turns) if turn.role == "user" and i] + [len(now.turns)]:
            prompt, shorter = _prompt(session, chat, _from(session, chat, now, first, ""), new)
            room = context - len(prompt) - need
            if room < (context // SUMMARY if full == "summarise" else 0):
                continue
            if full == "summarise" and summarise is not None:
                summary = clean(summarise(now.turns[:first], now.summary)).strip()
                prompt, shorter = _prompt(session, chat, _from(session, chat, now, first, summary), new)
                if len(prompt) + need > context:
                    continue
            break
        else:
            raise SessionError(
                f"the question needs {len(prompt)} tokens, and with room for an answer that is more than the model's "
                f"context of {context}; ask a shorter one",
                "full",
            )
        dropped, now = first, shorter
    if len(prompt) >= context:
        raise SessionError(f"the conversation fills the model's context ({len(prompt)} tokens)", "full")
    asked = []
    if now is not known:
        kept = now.turns[0].id if now.turns else None
        asked.append(NewTurn(CONTEXT, now.summary, now.ids, {"first": kept, "left": dropped}))
    for message in new[:-1]:  # what the template writes for several is one stretch of ids, kept with the last
        asked.append(_asked(message, ()))
    asked.append(_asked(new[-1], prompt[len(now.ids) :]))
    attempt = _attempt(store.turns(session.id), parent, asked)
    return Exchange(store, session, chat, parent, asked, prompt, context - len(prompt), attempt, dropped)


def _prompt(session: Session, chat: Chat, context: Context, new: Sequence[Message]) -> tuple[list[int], Context]:
    """Ids to answer `new` from, and the context that they begin with: without ids where all is rendered anew."""
    messages = [*system_of(session, context.summary), *map(message_of, context.turns), *new]
    try:
        return chat.prompt_ids(messages, context.ids), context
    except DataError as error:
        if error.rule != "rewrites_history":
            raise
    return chat.prompt_ids(messages), replace(context, ids=[])  # as it was trained


def _from(session: Session, chat: Chat, now: Context, first: int, summary: str) -> Context:
    """The context from its turn `first` on. Its first question is written anew, as the beginning of a conversation; all
    ids after that stay."""
    turns = now.turns[first:]
    answer = next((i for i, turn in enumerate(turns) if turn.role == "assistant"), 0)
    asked = [*system_of(session, summary), *map(message_of, turns[:answer])]
    ids = chat.prompt_ids(asked) if answer else []
    return Context(turns, [*ids, *(i for turn in turns[answer:] for i in turn.ids)], summary)


def _asked(message: Message, ids: Sequence[int]) -> NewTurn:
    more = {key: value for key, value in message.items() if key not in ("role", "content") and value is not None}
    return NewTurn(message["role"], message["content"], ids, {"message": more} if more else {})


def _attempt(turns: Sequence[Turn], parent: str | None, asked: Sequence[NewTurn]) -> int:
    for new in asked:
        same = (new.role, clean(new.text), tuple(new.ids))
        there = [t.id for t in turns if t.parent == parent and (t.role, t.text, t.ids) == same]
        if not there:
            return 0
        parent = there[0]
    return sum(turn.parent == parent for turn in turns)


def copy_for(store: SessionStore, session: Session, chat: Chat, model: str, template: str) -> Session:
    """A copy of a conversation, on the branch of its head, for another model or template. Where the template is the
    same every id is the same; else questions are rendered and answers tokenised anew, from their text."""
    path = [turn for turn in store.path(session.head) if turn.role != CONTEXT]
    made = new_session(model, template, system=session.system, sampling=session.sampling, title=session.title)
    messages, ids, new = system_of(made), [], []
    for number, turn in enumerate(path):
        messages.append(message_of(turn))
        if turn.role == "assistant":
            same = template == session.template
            own = turn.ids if same else [*chat.tokenizer.encode(turn.text), chat.tokenizer.eot_id]
        else:
            own = ()
            if number + 1 == len(path) or path[number + 1].role == "assistant":
                try:
                    own = chat.prompt_ids(messages, ids)[len(ids) :]
                except DataError as error:
                    if error.rule != "rewrites_history":
                        raise
                    own, ids = chat.prompt_ids(messages), []
                    new.append(NewTurn(CONTEXT, "", (), {"first": new[0].id, "left": 0}))
        new.append(NewTurn(turn.role, turn.text, own, turn.data, secrets.token_hex(8)))
        ids = [*ids, *own]
    store.append(made.id, None, new, begin=made)
    return store.get(made.id)
