"""The source `summarise`: parts of the config one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from trivium import MEASURES, DataError, Example, Score, Source, copied, split_of
from trivium_plugins.summarise.config import SummariseConfig
from trivium_plugins.summarise.functions import said
from trivium_plugins.summarise.sections import few, manual, titled, topics

SHARES = (0.05, 0.1)
"""Of sections, for validation and test."""


class Summarise(Source):
    """Code or a section is asked, a sentence or a title answered."""

    phases: ClassVar[frozenset[str]] = frozenset({"tokenizer", "sft", "rlhf", "distill", "evaluate"})

    def __init__(self, config: SummariseConfig) -> None:
        super().__init__(config)
        self.config: SummariseConfig = config
        found: dict[str, list[dict[str, Any]]] = {config.split: [], "train": []}
        seen: set[tuple[str, str]] = set()
        for part in config.parts:
            for side, place, asked, answer in self._functions() if part == "functions" else self._titles(part):
                once = side, letters(asked)  # a help topic is a section of the manual, marked up another way
                if side in found and once not in seen:
                    seen.add(once)
                    found[side].append(_example(f"{part}/{place}/{len(seen)}", part, asked, answer))
        twins = copied(found["train"], found[config.split]) if config.split != "train" else ()
        self._examples = [one for one in found[config.split] if one["id"] not in twins]
        if not self._examples:
            raise DataError(f"data.parts={list(config.parts)} has nothing of the split {config.split}; name more parts")

    def _functions(self) -> Iterator[tuple[str, str, str, str]]:
        for name, code, sentence in said(self.config.max_characters, self.config.split):
            asked = f"Say in one sentence what this Python function does.\n\n```python\n{code}\n```"
            yield self.config.split, name, asked, sentence

    def _titles(self, part: str) -> Iterator[tuple[str, str, str, str]]:
        documents = topics() if part == "topics" else few() if self.config.sample else manual()
        for name, title, text in titled(documents, self.config.max_words):
            yield split_of(text, *SHARES), name, f"Write the title of this section.\n\n{text}", title

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Example:
        return self._examples[index]

    def score(self, example: Example, completion: str) -> Score:
        """How near it comes to the text that is there; correct only if it is that very text."""
        given = completion.strip()
        value = MEASURES[self.config.measure](example["answer"], given) if given else 0.0
        return Score(value, given == example["answer"], self.config.measure)


def letters(text: str) -> str:
    """A text's letters and digits alone.

    >>> letters("The ``raise`` statement") == letters("The “raise” statement")
    True
    """
    return "".join(filter(str.isalnum, text)).lower()


def _example(id: str, part: str, asked: str, answer: str) -> dict[str, Any]:
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    task = "summarise/function" if part == "functions" else "summarise/title"
    return {"id": id, "task": task, "messages": turns, "answer": answer}
