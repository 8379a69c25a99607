"""The source `legal`: licence texts, questions about their category, questions about their clauses."""

from __future__ import annotations

from typing import Any, ClassVar

from trivium import DataError, Example, Score, Source
from trivium_plugins.legal.config import LegalConfig
from trivium_plugins.legal.questions import category, clauses, is_right
from trivium_plugins.legal.texts import Licence, licences, of_split


class Legal(Source):
    """The parts of the config, one after the other; the archive is fetched when this is built."""

    phases: ClassVar[frozenset[str]] = frozenset({"tokenizer", "pretrain", "sft", "rlhf", "evaluate"})

    def __init__(self, config: LegalConfig) -> None:
        super().__init__(config)
        texts = of_split(licences(config.sample), config.split)
        self._examples = [example for part in config.parts for example in _part(part, texts, config.excerpt)]
        if not self._examples:
            raise DataError(f"data.parts={list(config.parts)} has no examples of split {config.split}; name more parts")

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(f"legal has examples 0 to {len(self) - 1}, not {index}")
        return self._examples[index]

    def origin(self, example: Example) -> str:
        """Its task, else texts."""
        return example.get("task", "texts")

    def score(self, example: Example, completion: str) -> Score:
        """1.0 for the example's answer and nothing else."""
        if not example.get("answer"):
            raise DataError(f"example {example.get('id')!r} has no answer to score against; only questions have one")
        correct = is_right(example["answer"], completion)
        return Score(float(correct), correct)


def _part(name: str, texts: list[Licence], excerpt: int) -> list[dict[str, Any]]:
    if name == "texts":
        return [{"id": f"text/{one.key}", "text": one.text} for one in texts]
    if name == "categories":
        return [category(one, excerpt) for one in texts]
    return [example for one in texts for example in clauses(one)]
