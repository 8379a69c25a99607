"""Calls of functions in an answer's text, as Hermes and Qwen write them: JSON between <tool_call> and </tool_call>."""

from __future__ import annotations

import json
import uuid
from collections.abc import Collection
from typing import Any

from trivium.data.chat import Chat
from trivium.errors import DataError
from trivium.inference.text import StopStrings

OPEN, CLOSE = "<tool_call>", "</tool_call>"


def writes_calls(chat: Chat) -> bool:
    """Whether the chat template writes tools at all, and calls in the form that is read here."""
    call = {"type": "function", "function": {"name": "probe_call", "arguments": {"a": "b"}}}
    asked = [{"role": "user", "content": "?"}]
    tools = [{"type": "function", "function": {"name": "probe_call", "parameters": {"type": "object"}}}]
    try:
        prompt = chat.render(asked, prompt=True, tools=tools)
        said = chat.render(
            [*asked, {"role": "assistant", "content": "", "tool_calls": [call]}], prompt=False, tools=tools
        )
    except DataError:
        return False
    written = said[len(prompt) :]
    if "probe_call" not in prompt or not said.startswith(prompt):
        return False
    tokenizer = chat.tokenizer
    shown = tokenizer.decode(tokenizer.encode_batch([written], special=True)[0])  # tags may be special tokens
    return _call(shown.partition(OPEN)[2].partition(CLOSE)[0], ["probe_call"]) is not None


class CallReader:
    """Text in pieces, into what is said and what is called. What is no call of one of `names` stays text.

    bare: the whole text is one call, without tags.
    """

    def __init__(self, names: Collection[str], *, bare: bool = False) -> None:
        self.names, self.bare = names, bare
        self.calls: list[dict[str, Any]] = []
        self._outside: StopStrings | None = StopStrings([OPEN])
        self._inside = ""

    def push(self, piece: str) -> tuple[str, list[dict[str, Any]]]:
        """Text that can be shown, and calls that are complete."""
        said, called = "", []
        if self.bare:
            self._inside += piece
            return "", []
        while piece:
            if self._outside is not None:
                said += self._outside.push(piece)
                if self._outside.met is None:
                    break
                piece, self._outside, self._inside = self._outside.rest, None, ""
            self._inside += piece
            inner, closed, piece = self._inside.partition(CLOSE)
            if not closed:
                break
            call = _call(inner, self.names)
            if call is None:
                said += OPEN + inner + CLOSE
            else:
                called.append(call)
            self._outside = StopStrings([OPEN])
        self.calls += called
        return said, called

    def finish(self) -> tuple[str, list[dict[str, Any]]]:
        """What was held back, when no more comes."""
        if self.bare:
            call = _call(self._inside, self.names)
            self.calls += [call] if call else []
            return ("", [call]) if call else (self._inside, [])
        return (OPEN + self._inside if self._outside is None else self._outside.finish()), []


def _call(text: str, names: Collection[str]) -> dict[str, Any] | None:
    try:
        found = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or found.get("name") not in names:
        return None
    arguments = found.get("arguments", found.get("parameters", {}))
    if not isinstance(arguments, dict):
        return None
    function = {"name": found["name"], "arguments": json.dumps(arguments)}  # ASCII: "\ud800" alone is no text
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")
