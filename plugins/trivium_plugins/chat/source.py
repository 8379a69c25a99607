"""The source `chat`: 7,168 human conversations (Chit Chat Challenge)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar

from trivium import fetch
from trivium_plugins.chat.catalogue import CATALOGUE
from trivium_plugins.chat.config import ChatConfig
from trivium_plugins.records import Records

EMAIL = re.compile(r"[\w.+-]+@[\w-]+(\.[\w-]+)+")
TURNS = 4  # a conversation has at least so many, once messages of one speaker in a row are one


def read(part: str) -> Iterator[dict[str, Any]]:
    """Conversations as turns, e-mail addresses masked; the same for every part."""
    for key, talk in json.loads(fetch("conversations", catalogue=CATALOGUE).read_text("utf-8")).items():
        said = [m for turn in talk["messages"] for m in turn if m["text"].strip()]
        turns = [" ".join(m["text"].strip() for m in run) for _, run in groupby(said, lambda m: m["sender"])]
        if len(turns) >= TURNS:
            yield {"id": key, "turns": [EMAIL.sub("me@example.org", turn) for turn in turns]}


def messages(turns: Sequence[str]) -> list[dict[str, str]]:
    """The first speaker is the user; a last turn of theirs is left out."""
    whole = turns[: len(turns) // 2 * 2]
    return [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(whole)]


def examples(part: str, record: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The conversation; or its fourth turn against the same turn told backwards, word by word."""
    said = messages(record["turns"])
    if part == "conversations":
        yield {"id": record["id"], "messages": said, "source": "conversations"}
        return
    words = said[3]["content"].split()
    if len(set(words)) > 3 and words != words[::-1]:
        wrong = {"role": "assistant", "content": " ".join(reversed(words))}
        yield {"id": f"{record['id']}/reply", "task": "replies", "chosen": said[:4], "rejected": [*said[:3], wrong]}


def content(record: dict[str, Any]) -> str:
    """What decides the split."""
    return "\n".join(record["turns"])


class Chat(Records):
    """What the functions above say of a record."""

    phases: ClassVar[frozenset[str]] = frozenset({"tokenizer", "sft", "preference", "reward", "distill", "evaluate"})
    config: ChatConfig
    sample = Path(__file__).parent / "sample.jsonl"

    def read(self, part: str) -> Iterator[dict[str, Any]]:
        return read(part)

    def made_of(self, part: str, record: dict[str, Any]) -> Iterator[dict[str, Any]]:
        return examples(part, record)

    def content(self, record: dict[str, Any]) -> str:
        return content(record)
