"""Conversations as people write them, into messages as a chat template reads them.

Known are role and content (OpenAI's, with tool_calls and results of tools), and ShareGPT's from and value. What is
None, as Arrow gives every message the keys of all, is left out wherever it stands: "None" is in no prompt.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from trivium.data.rows import RowError

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
    "function_response": "tool",
}
"""ShareGPT's roles, and whose they are."""
SEEN = ("images", "image", "videos", "video", "audios", "audio")


def misfit(said: str) -> RowError:
    """A row that does not fit its schema."""
    return RowError("does not fit the schema", said)


def short(value: Any) -> str:
    """A value, in a few words of an error."""
    said = repr(value)
    return said if len(said) <= 80 else f"{said[:77]}..."


def text_of(values: Mapping[str, Any], column: str, at: str) -> str:
    """The text of a column, which must be there."""
    value = values.get(column)
    if not isinstance(value, str) or not value:
        raise misfit(f"{at}: {column} is {short(value)}, not text")
    return value


def messages_of(values: Mapping[str, Any], column: str, at: str) -> list[dict[str, Any]]:
    """The messages of a column, in either way of writing them, after the column `system` if it says something."""
    value: Any = values[column]
    if not isinstance(value, list) or not value or not all(isinstance(m, dict) for m in value):
        raise misfit(f"{at}: {column} must be a list of {{role, content}}, not {short(value)}")
    return [_message(m, f"{at}: {column}") for m in value]


def with_system(values: Mapping[str, Any], messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages behind the column `system`, where that says something and they begin otherwise."""
    said = values.get("system")
    if not isinstance(said, str) or not said.strip() or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": said}, *messages]


def refuse_media(values: Mapping[str, Any], at: str) -> None:
    """Refuse what is not text: without its picture a question means nothing."""
    for column in SEEN:
        if values.get(column):
            raise misfit(f"{at}: {column} holds what is not text, and models here read text only")


def _message(m: Mapping[str, Any], at: str) -> dict[str, Any]:
    if "from" in m and m.get("role") is None:
        return _sharegpt(m, at)
    role, content = m.get("role"), m.get("content")
    role = "tool" if role == "function" else role
    calls = _calls(m, at) if role == "assistant" else []
    if isinstance(content, list):
        content = _parts(content, at)
    elif isinstance(content, dict) and role == "tool":
        content = json.dumps(without_none(content), ensure_ascii=False)
    if content is None and calls:
        content = ""
    if not isinstance(role, str) or not isinstance(content, str):
        raise misfit(f"{at} has a message with role {short(role)} and content {short(content)}; both must be text")
    found: dict[str, Any] = {"role": role, "content": content}
    kept = {"assistant": ("reasoning_content",), "tool": ("name", "tool_call_id")}.get(role, ())
    found |= {key: m[key] for key in kept if isinstance(m.get(key), str) and m[key]}
    return {**found, "tool_calls": calls} if calls else found


def _sharegpt(m: Mapping[str, Any], at: str) -> dict[str, Any]:
    who, value = m.get("from"), m.get("value")
    if not isinstance(who, str) or who.lower() not in ROLES or not isinstance(value, str):
        raise misfit(
            f"{at} has a message from {short(who)} with value {short(value)}; it must be text from one of "
            f"{', '.join(ROLES)}"
        )
    role = ROLES[who.lower()]
    if who.lower() != "function_call":
        return {"role": role, "content": value}
    called = from_json(value, f"{at} has a function_call")
    called = called if isinstance(called, list) else [called]
    return {"role": role, "content": "", "tool_calls": [_call(c, f"{at} has a function_call") for c in called]}


def _parts(parts: list[Any], at: str) -> str:
    """The text of a content in parts."""
    said = []
    for part in parts:
        text = part.get("text", part.get("value")) if isinstance(part, dict) and part.get("type") == "text" else None
        if not isinstance(text, str):
            raise misfit(f"{at} has a message with the part {short(part)}; models here read text only")
        said.append(text)
    return "".join(said)


def _calls(m: Mapping[str, Any], at: str) -> list[dict[str, Any]]:
    said = m.get("tool_calls") or ([m["function_call"]] if m.get("function_call") else [])
    if isinstance(said, str):
        said = from_json(said, f"{at} has tool_calls") or []
    if not isinstance(said, list):
        raise misfit(f"{at} has tool_calls {short(said)}, not a list")
    return [_call(call, f"{at} has tool_calls") for call in said]


def _call(call: Any, at: str) -> dict[str, Any]:
    """One call as templates read it: its arguments an object, not the text of one."""
    inner = call.get("function") if isinstance(call, dict) and call.get("function") else call
    name = inner.get("name") if isinstance(inner, dict) else None
    arguments = inner.get("arguments", inner.get("parameters")) if isinstance(inner, dict) else None
    if isinstance(arguments, str):
        arguments = from_json(arguments or "{}", at)
    arguments = {} if arguments is None else arguments
    if not isinstance(name, str) or not name or not isinstance(arguments, dict):
        raise misfit(f"{at} with {short(call)}; a call needs a name and arguments, an object")
    found = {"type": "function", "function": {"name": name, "arguments": without_none(arguments)}}
    return {"id": call["id"], **found} if isinstance(call.get("id"), str) and call["id"] else found


def tools_of(values: Mapping[str, Any], at: str) -> dict[str, Any]:
    """{"tools": JSON schemas of functions} of the column `tools`, a list or its JSON text; {} where it has none."""
    said = values.get("tools")
    if isinstance(said, str):
        said = from_json(said, f"{at}: tools") if said.strip() else None
    if not said:
        return {}
    said = [from_json(t, f"{at}: tools") if isinstance(t, str) else t for t in said] if isinstance(said, list) else said
    if not isinstance(said, list) or not all(isinstance(t, dict) for t in said):
        raise misfit(f"{at}: tools is {short(said)}, not a list of functions")
    found = []
    for tool in map(without_none, said):
        tool = tool if isinstance(tool.get("function"), dict) else {"type": "function", "function": tool}
        if not isinstance(tool["function"].get("name"), str):
            raise misfit(f"{at}: tools has {short(tool['function'])}, a function without a name")
        found.append({"type": "function", **tool})
    return {"tools": found}


def from_json(text: str, at: str) -> Any:
    """The value of JSON text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise misfit(f"{at} is not JSON: {error}") from error


def without_none(value: Any) -> Any:
    """A value without the entries that are None.

    >>> without_none({"unit": None, "of": [{"a": 1, "b": None}]})
    {'of': [{'a': 1}]}
    """
    if isinstance(value, Mapping):
        return {key: without_none(inner) for key, inner in value.items() if inner is not None}
    return [without_none(inner) for inner in value] if isinstance(value, list) else value
