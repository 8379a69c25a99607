"""The doctor's rules about turns, and about a template as such: who speaks after whom, what a result of a tool answers,
and what is written unasked.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from trivium.data.chat import Chat, _checked, _names
from trivium.data.lint import Finding, found
from trivium.data.source import Example
from trivium.errors import DataError

RESULTS = ("tool", "function", "ipython")
"""Roles of what a call gives back. An `environment` may speak of its own accord."""
CALL = re.compile(r"[{<(\[]")
"""What no call that is written as text (JSON, tags, Python) is without."""
SYSTEM, USER = "SYSTEMPROBE", "USERPROBE"

Turns = Sequence[Mapping[str, Any]]


def check_order(id_: str, messages: Turns) -> Iterator[Finding]:
    """Assistants that answer themselves: when the model is used, the user speaks after an answer.

    A turn and a call behind it (or what came of one) are one answer in two parts, as ShareGPT has it.
    """
    for before, turn in zip(messages, messages[1:], strict=False):
        both = before["role"] == turn["role"] == "assistant"
        if both and not before.get("tool_calls") and not turn.get("tool_calls"):
            message = "an assistant turn follows another, and nobody asks for the second; make them one turn"
            yield found("assistant_twice", id_, message)
            return


def check_results(id_: str, messages: Turns) -> Iterator[Finding]:
    """Results of tools that answer no call: the model would learn to be told what it never asked for."""
    ids: set[str] = set()
    unnamed = waiting = 0
    for number, turn in enumerate(messages):
        calls = turn.get("tool_calls") or ()
        named = {str(c["id"]) for c in calls if isinstance(c, Mapping) and c.get("id")}
        ids, unnamed, waiting = ids | named, unnamed + len(calls) - len(named), waiting + len(calls)
        if turn["role"] not in RESULTS:
            continue
        answers = turn.get("tool_call_id")
        if answers and ids and not unnamed and answers not in ids:
            message = f"a tool's result is of the call {str(answers)[:40]!r}, which no earlier turn makes"
            yield found("tool_orphan", id_, message)
            return
        if waiting:
            waiting -= 1
        elif not _may_call(messages[:number]):
            message = "a tool's result answers no call; give the assistant's turn before it the tool_calls it made"
            yield found("tool_orphan", id_, message)
            return


def _may_call(before: Turns) -> bool:
    """Whether the call may stand in the text of the turn before: then no turn has any as data."""
    last = next((turn for turn in reversed(before) if turn["role"] not in RESULTS), None)
    written = last is not None and last["role"] == "assistant" and bool(CALL.search(last["content"]))
    return written and not any(turn.get("tool_calls") for turn in before)


def check_tools(id_: str, messages: Turns, tools: Sequence[Any]) -> Iterator[Finding]:
    """Calls of tools that nobody gave: the model would learn to make them up."""
    given = _names([t for t in tools if isinstance(t, Mapping)])
    if not given or len(given) < len(tools):
        return  # none are given, or some by no name
    called = [c for turn in messages for c in turn.get("tool_calls") or () if isinstance(c, Mapping)]
    for name in dict.fromkeys(_names(called)):
        if name not in given:
            message = f"the assistant calls {name}, and the tools are {', '.join(given[:5])}; add it, or leave this out"
            yield found("unknown_tool", id_, message)


def check_template(examples: Sequence[Example], chat: Chat) -> Iterator[Finding]:
    """What a template does whatever is said: asked once, of the first example that shows it.

    What it refuses is told of each example by other rules.
    """
    talks = [(_checked(e[key]), e.get("tools") or ()) for e in examples for key in ("messages", "chosen")
             if isinstance(e.get(key), (list, tuple))]  # fmt: skip
    asked = next((talk for talk in talks if _first_answer(talk[0])), None)
    bare = next((tools for messages, tools in talks if messages[0]["role"] not in ("system", "developer")), None)
    try:
        if asked is not None:
            yield from _check_asking(*asked, chat)
        if bare is not None:
            yield from _check_system(bare, chat)
    except DataError:
        return


def _first_answer(messages: Turns) -> int:
    """Where the first answer in words is; 0 if there is none, or nothing before it."""
    return next((i for i, m in enumerate(messages) if m["role"] == "assistant" and m["content"].strip()), 0)


def _check_asking(messages: Turns, tools: Sequence[Any], chat: Chat) -> Iterator[Finding]:
    """Whether add_generation_prompt writes what answers begin with. Some templates need none: nothing stands there."""
    at, shown, tools = _first_answer(messages), chat._protected(messages), chat._protected(tools)
    asks, without = (chat.render(shown[:at], prompt=prompt, tools=tools) for prompt in (True, False))
    after = chat.render(shown[: at + 1], prompt=False, tools=tools)
    head, said, _ = after[len(asks) :].partition(shown[at]["content"].strip())
    if asks == without and after.startswith(asks) and said and head.strip():
        message = (
            f"the template asks for no answer: add_generation_prompt writes nothing, and answers begin with {head!r}, "
            "which no other program asks with; write it there"
        )
        yield found("generation_prompt", "", message)


def _check_system(tools: Sequence[Any], chat: Chat) -> Iterator[Finding]:
    """Whether a conversation without a system message gets one: what stands where a given one would."""
    tools, user = chat._protected(tools), {"role": "user", "content": USER}
    given, bare = (
        chat.render(messages, prompt=False, tools=tools).partition(USER)[0]
        for messages in ([{"role": "system", "content": SYSTEM}, user], [user])
    )
    before, written, after = given.partition(SYSTEM)
    if not written or not bare.startswith(before) or not bare.endswith(after):
        return
    added = bare[len(before) : len(bare) - len(after)]
    if any(map(str.isalnum, added)):
        shown = added.strip() if len(added) < 100 else f"{added.strip()[:97]}..."
        message = (
            f"the template adds a system message that the data does not have: {shown!r}; it is trained with that, and "
            "must be used with it"
        )
        yield found("system_added", "", message)
