"""One question and its answer in a stored conversation: what the model reads for it, and what is kept of it.

What was read and drawn is never tokenised again: the next prompt is the ids of every turn so far, and the new question.
When that no longer fits, the oldest questions leave with their answers, or a summary takes their place. Where the
template writes earlier turns otherwise than they were drawn, the history is what it writes. Where a question brings
other tools or another system message, the first question is written anew, and every id from the first answer on stays.
A turn of role "context" then keeps the ids that the model reads instead, and all that was said stays in the store.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from trivium.data.chat import Chat, Message
from trivium.errors import DataError, SessionError
from trivium.inference.sessions import Appended, NewTurn, Session, SessionStore, Turn, clean, new_session

CONTEXT = "context"
"""The role of a turn that says what the model reads in place of what was said before. text: the summary, if any; data:
`first`, the first turn that it still reads, None for none; `left`, how many turns it no longer reads; `system`, where
it is not the conversation's; `tools`, if any."""
SUMMARY = 8
"""A summary has at most an eighth of the context."""
Summarise = Callable[[Sequence[Turn], str], str]
"""The turns that leave, and the summary of those that left before -> a summary of both."""


@dataclass(frozen=True)
class Context:
    """What the model has read of a conversation. turns: those it still reads. ids: exactly what it read. system: None
    is the conversation's."""

    turns: list[Turn]
    ids: list[int]
    summary: str = ""
    system: str | None = None
    tools: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Answer:
    """What was drawn. reason: why it ended. data: what else is known of it, kept with the turn. id: of the turn. said,
    calls: the same as a template reads it, where functions were called. body: of a response, as in `NewTurn`."""

    drawn: Sequence[int]
    reason: str | None = "stop"
    data: Mapping[str, Any] = field(default_factory=dict)
    id: str = ""
    said: str = ""
    calls: Sequence[Mapping[str, Any]] = ()
    body: Mapping[str, Any] | None = None


def context_of(path: Sequence[Turn]) -> Context:
    """What is read before the next question."""
    at = max((i for i, turn in enumerate(path) if turn.role == CONTEXT), default=None)
    if at is None:
        return Context(list(path), [i for turn in path for i in turn.ids])
    first = path[at].data["first"]
    before = [turn for turn in path[:at] if turn.role != CONTEXT]
    kept = before[next(i for i, turn in enumerate(before) if turn.id == first) :] if first else []
    ids, data = [i for turn in path[at:] for i in turn.ids], path[at].data
    return Context([*kept, *path[at + 1 :]], ids, path[at].text, data.get("system"), data.get("tools", []))


def message_of(turn: Turn) -> dict[str, Any]:
    """A turn as the template reads it."""
    return {"role": turn.role, "content": turn.text, **turn.data.get("message", {})}


def system_of(session: Session, context: Context | None = None) -> list[dict[str, Any]]:
    """The system message, with what has left the context, if anything."""
    told = f"Earlier in this conversation: {context.summary}" if context and context.summary else ""
    own = session.system if context is None or context.system is None else context.system
    text = "\n\n".join(filter(None, (own, told)))
    return [{"role": "system", "content": text}] if text else []


@dataclass(frozen=True)
class Exchange:
    """A question on its way to its answer. Nothing of it is in the store before `commit`. messages, tools: what the
    prompt says."""

    store: SessionStore
    session: Session
    chat: Chat
    parent: str | None
    asked: list[NewTurn]
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]
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
            if answer.calls:
                data["message"] = {"content": answer.said, "tool_calls": [_read(call) for call in answer.calls]}
            turns.append(NewTurn("assistant", tokenizer.decode(ids), ids, data, answer.id, answer.body))
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
    tools: Sequence[Mapping[str, Any]] = (),
    system: str | None = None,
) -> Exchange:
    """Ask `new` behind the turn `parent`.

    context: tokens that prompt and answer may have together; wanted: tokens that an answer may have. full: what is done
    when the conversation fills the context: error | drop_oldest | summarise. tools: functions that the prompt shows.
    system: a message in place of the conversation's own. Raises SessionError, DataError for what a template refuses.
    """
    new = [{**message, "content": clean(str(message["content"]))} for message in new]
    path = store.path(parent)
    _check_order(path, new)
    known = now = context_of(path)
    system = None if system is None or clean(system) == session.system else clean(system)
    if (system, list(tools)) != (now.system, now.tools):
        now = _from(session, chat, replace(now, system=system, tools=[dict(tool) for tool in tools]), 0, now.summary)
    dropped = 0
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
        data: dict[str, Any] = {"first": now.turns[0].id if now.turns else None, "left": dropped}
        data |= {} if now.system is None else {"system": now.system}
        data |= {"tools": now.tools} if now.tools else {}
        asked.append(NewTurn(CONTEXT, now.summary, now.ids, data))
    for message in new[:-1]:  # what the template writes for several is one stretch of ids, kept with the last
        asked.append(_asked(message, ()))
    asked.append(_asked(new[-1], prompt[len(now.ids) :]))
    attempt = _attempt(store.turns(session.id), parent, asked)
    messages, room = _messages(session, now, new), context - len(prompt)
    return Exchange(store, session, chat, parent, asked, messages, now.tools, prompt, room, attempt, dropped)


def _check_order(path: Sequence[Turn], new: Sequence[Message]) -> None:
    """Refuse a question behind a question, and a result of what was not called."""
    last = next((turn for turn in reversed(path) if turn.role != CONTEXT), None)
    if last is not None and last.role != "assistant":
        raise SessionError(f"turn {last.id!r} is no answer; name an answer to go on from", "order")
    said = last.data.get("message", {}) if last else {}
    for message in new:
        if message["role"] == "assistant":
            said = message
        calls = [call.get("id") for call in said.get("tool_calls") or ()]
        if message["role"] == "tool" and (not calls or message.get("tool_call_id", calls[0]) not in calls):
            raise SessionError(
                f"there is no call {message.get('tool_call_id', '')!r} before its result; the last answer called "
                f"{', '.join(map(str, calls)) or 'nothing'}",
                "order",
            )
    if new[-1]["role"] == "assistant":
        raise SessionError("the last message is the assistant's; end with what is to be answered", "order")


def _messages(session: Session, context: Context, new: Sequence[Message]) -> list[dict[str, Any]]:
    return [*system_of(session, context), *map(message_of, context.turns), *map(dict, new)]


def _prompt(session: Session, chat: Chat, context: Context, new: Sequence[Message]) -> tuple[list[int], Context]:
    """Ids to answer `new` from, and the context that they begin with: without ids where all is rendered anew."""
    messages = _messages(session, context, new)
    try:
        return chat.prompt_ids(messages, context.ids, context.tools), context
    except DataError as error:
        if error.rule != "rewrites_history":
            raise
    return chat.prompt_ids(messages, tools=context.tools), replace(context, ids=[])  # as it was trained


def _from(session: Session, chat: Chat, now: Context, first: int, summary: str) -> Context:
    """The context from its turn `first` on. Its first question is written anew, as the beginning of a conversation; all
    ids after that stay."""
    turns = now.turns[first:]
    answer = next((i for i, turn in enumerate(turns) if turn.role == "assistant" and turn.ids), 0)
    asked = _messages(session, replace(now, turns=turns[:answer], summary=summary), ())
    ids = chat.prompt_ids(asked, tools=now.tools) if answer else []
    return replace(now, turns=turns, ids=[*ids, *(i for turn in turns[answer:] for i in turn.ids)], summary=summary)


def summary_prompt(chat: Chat, leaving: Sequence[Turn], earlier: str, context: int) -> tuple[list[int], int]:
    """Ids to have the model itself summarise from, and tokens that the summary may have. context: the model's. Raises
    SessionError where it has no room for that."""
    tokenizer = chat.tokenizer
    told = [f"{turn.role}: {turn.text}" for turn in leaving]
    most = max(1, context // SUMMARY)
    ids, prompt, over = tokenizer.encode("\n".join([f"Earlier: {earlier}"] * bool(earlier) + told)), [], 0
    while not prompt or over > 0:
        ids = ids[max(0, over) :]  # the newest of it, if it does not fit by itself
        asked = f"Summarise this conversation in a few sentences:\n\n{tokenizer.decode(ids)}"
        prompt = chat.prompt_ids([{"role": "user", "content": asked}])
        over = len(prompt) + most - context
        if over > len(ids):
            raise SessionError(f"the model's context of {context} tokens has no room for a summary", "full")
    return prompt, most


def _read(call: Mapping[str, Any]) -> dict[str, Any]:
    """A call as templates read it: the arguments are an object, not its text."""
    function = call["function"]
    return {**call, "function": {**function, "arguments": json.loads(function["arguments"])}}


def _asked(message: Message, ids: Sequence[int]) -> NewTurn:
    more = {key: value for key, value in message.items() if key not in ("role", "content") and value is not None}
    return NewTurn(message["role"], message["content"], ids, {"message": more} if more else {})


def _attempt(turns: Sequence[Turn], parent: str | None, asked: Sequence[NewTurn]) -> int:
    for new in asked:
        same = (new.role, clean(new.text), tuple(new.ids), dict(new.data))
        there = [t.id for t in turns if t.parent == parent and (t.role, t.text, t.ids, t.data) == same]
        if not there:
            return 0
        parent = there[0]
    return sum(turn.parent == parent for turn in turns)


def copy_for(store: SessionStore, session: Session, chat: Chat, model: str, template: str) -> Session:
    """A copy of a conversation, on the branch of its head, for another model or template. Where the template is the
    same every id is the same; else questions are rendered and answers tokenised anew, from their text."""
    path = store.path(session.head)
    read, path = context_of(path), [turn for turn in path if turn.role != CONTEXT]
    made = new_session(
        model, template, system=session.system if read.system is None else read.system, sampling=session.sampling,
        title=session.title, owner=session.owner,
    )  # fmt: skip
    messages, ids, new = system_of(made), [], []
    tools: dict[str, Any] = {"tools": read.tools} if read.tools else {}
    if tools:
        new.append(NewTurn(CONTEXT, "", (), {"first": None, "left": 0, **tools}))
    for number, turn in enumerate(path):
        messages.append(message_of(turn))
        if turn.role == "assistant":
            same = template == session.template
            own = turn.ids if same else [*chat.tokenizer.encode(turn.text), chat.tokenizer.eot_id]
        else:
            own = ()
            if number + 1 == len(path) or path[number + 1].role == "assistant":
                try:
                    own = chat.prompt_ids(messages, ids, read.tools)[len(ids) :]
                except DataError as error:
                    if error.rule != "rewrites_history":
                        raise
                    own, ids = chat.prompt_ids(messages, tools=read.tools), []
                    first = next(turn.id for turn in new if turn.role != CONTEXT)
                    new.append(NewTurn(CONTEXT, "", (), {"first": first, "left": 0, **tools}))
        new.append(NewTurn(turn.role, turn.text, own, turn.data, secrets.token_hex(8)))
        ids = [*ids, *own]
    store.append(made.id, None, new, begin=made)
    return store.get(made.id)
