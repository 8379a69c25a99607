"""The source `chat`: 7,168 human conversations (Chit Chat Challenge)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar

from trivium import Example, fetch, split_of
from trivium.data.source import Source
from trivium.errors import DataError
from trivium_plugins.chat.catalogue import CATALOGUE
from trivium_plugins.chat.config import ChatConfig

SAMPLE = Path(__file__).parent / "sample.jsonl"

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


class Chat(Source):
    """The parts of the config, in its order; a tenth of the records is held out for tests, a twentieth to validate."""

    phases: ClassVar[frozenset[str]] = frozenset({"tokenizer", "sft", "preference", "reward", "distill", "evaluate"})
    config: ChatConfig

    def __init__(self, config: ChatConfig) -> None:
        super().__init__(config)
        self.examples = [e for part in config.parts for record in self.records(part) for e in examples(part, record)]
        if not self.examples:
            raise DataError(
                f"data.parts={list(config.parts)} has nothing in data.split={config.split} of "
                f"{'the sample; set data.sample=false' if config.sample else 'what was fetched'}"
            )

    def records(self, part: str) -> Iterator[dict[str, Any]]:
        """Those of the split."""
        lines = SAMPLE.read_text("utf-8").split("\n") if self.config.sample else []
        told = map(json.loads, filter(None, lines)) if self.config.sample else read(part)
        return (record for record in told if split_of(content(record), 0.05, 0.1) == self.config.split)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]
