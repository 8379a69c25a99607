"""The source `translate`: paragraphs of manual pages with their translations."""

from __future__ import annotations

from typing import Any, ClassVar

from trivium import MEASURES, DataError, Example, Score, Source, split_of
from trivium_plugins.translate.config import LANGUAGES, TranslateConfig
from trivium_plugins.translate.manual import pairs
from trivium_plugins.translate.pages import pages, sentences

SHARES = (0.05, 0.1)
"""Of paragraphs, for validation and test."""


class Translate(Source):
    """English asked, the other language answered. The English text decides the split."""

    phases: ClassVar[frozenset[str]] = frozenset({"tokenizer", "sft", "rlhf", "distill", "evaluate"})

    def __init__(self, config: TranslateConfig) -> None:
        super().__init__(config)
        self.config: TranslateConfig = config
        found = sentences(config.language) if config.sample else pairs(pages("en"), pages(config.language))
        self._examples = [
            self._example(i, page, english, other)
            for i, (page, english, other) in enumerate(found)
            if config.min_words <= len(english.split()) <= config.max_words
            and split_of(english, *SHARES) == config.split
        ]
        if not self._examples:
            raise DataError(
                f"no paragraph of the {config.split} split has {config.min_words} to {config.max_words} words; widen "
                "data.min_words and data.max_words"
            )

    def _example(self, number: int, page: str, english: str, other: str) -> dict[str, Any]:
        asked = f"Translate into {LANGUAGES[self.config.language]}: {english}"
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": other}]
        task = f"translate/{self.config.language}"
        return {"id": f"{page}/{number}", "task": task, "messages": turns, "answer": other}

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Example:
        return self._examples[index]

    def score(self, example: Example, completion: str) -> Score:
        """How near it comes to the translation that is there; correct only if it is that very text."""
        given = completion.strip()
        value = MEASURES[self.config.measure](example["answer"], given) if given else 0.0
        return Score(value, given == example["answer"], self.config.measure)
