"""The source `finance`: economies as text, then questions about their figures."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from trivium import DataError, Example, Score, Source, copied
from trivium_plugins.finance.config import FinanceConfig
from trivium_plugins.finance.economies import Economy, Line, economies, lines, of_split, text_of
from trivium_plugins.finance.figures import is_right


class Finance(Source):
    """The parts of the config, in its order; the package is fetched when this is built."""

    phases: ClassVar[frozenset[str]] = frozenset({"tokenizer", "pretrain", "sft", "rlhf", "evaluate"})

    def __init__(self, config: FinanceConfig) -> None:
        super().__init__(config)
        read = economies(config.sample)
        chosen = of_split(read, config.split)
        self._examples: list[dict[str, Any]] = []
        for part in config.parts:
            if part == "economies":
                self._examples += _texts(chosen)
                if config.split != "train":  # small islands are told of in the same words
                    twins = copied(_texts(of_split(read, "train")), self._examples)
                    self._examples = [e for e in self._examples if e["id"] not in twins]
            else:
                self._examples += [question for one in chosen for question in _questions(one, config)]
        if not self._examples:
            raise DataError(f"data.parts={list(config.parts)} has no examples of split {config.split}; name more parts")

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(f"finance has examples 0 to {len(self) - 1}, not {index}")
        return self._examples[index]

    def origin(self, example: Example) -> str:
        """Its task, else economies."""
        return example.get("task", "economies")

    def score(self, example: Example, completion: str) -> Score:
        """1.0 for one figure that equals the answer in value, sign and unit."""
        if not example.get("answer"):
            raise DataError(f"example {example.get('id')!r} has no answer to score against; only figures have one")
        correct = is_right(example["answer"], completion, example["year"])
        return Score(float(correct), correct)


def _texts(chosen: Sequence[Economy]) -> list[dict[str, Any]]:
    return [{"id": f"economy/{one.code}", "text": text_of(one)} for one in chosen]


def _questions(economy: Economy, config: FinanceConfig) -> Iterator[dict[str, Any]]:
    found = lines(economy)
    for line in found:
        asked = f"What was the {line.measure} of {economy.country} in {line.year}?"
        if config.shown:
            asked = "\n".join([*_shown(economy, line, found, config), "", asked])
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": line.figure}]
        name = f"figure/{economy.code}/{line.measure}/{line.year}"
        yield {"id": name, "task": "figure", "messages": turns, "answer": line.figure, "year": line.year}


def _shown(economy: Economy, right: Line, found: list[Line], config: FinanceConfig) -> list[str]:
    """The right line and the first others in an order drawn from the seed, then mixed."""

    def drawn(use: str, line: Line) -> int:
        key = f"{config.seed}/{economy.code}/{right}/{use}/{line}"
        return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8])

    others = sorted((line for line in found if line != right), key=lambda line: drawn("which", line))
    shown = sorted([right, *others[: config.shown - 1]], key=lambda line: drawn("order", line))
    return [f"{economy.country}, {line.measure}, {line.year}: {line.figure}" for line in shown]
