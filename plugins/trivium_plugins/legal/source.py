"""The source `legal`: licence texts, questions about their category, questions about their clauses."""

from __future__ import annotations

from typing import Any, ClassVar

from trivium import DataError, Example, Score, Source
from trivium_plugins.legal.config import LegalConfig
from trivium_plugins.legal.questions import asked, category, clause, is_right, runs
from trivium_plugins.legal.texts import SPLITS, Licence, apart, licences, sides


class Legal(Source):
    """The parts of the config, one after the other; the archive is fetched when this is built."""

    phases: ClassVar[frozenset[str]] = frozenset({"tokenizer", "pretrain", "sft", "rlhf", "evaluate"})

    def __init__(self, config: LegalConfig) -> None:
        super().__init__(config)
        self._examples = [e for part in config.parts for e in _part(part, config)]
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


def _part(name: str, config: LegalConfig) -> list[dict[str, Any]]:
    if name != "clauses":
        texts = apart(config.sample)[config.split]
        shown = config.excerpt
        return [_text(one) if name == "texts" else category(one, shown) for one in texts]
    texts = sides(licences(config.sample))
    found: list[dict[str, Any]] = []
    seen: set[str] = set()  # families share no long paragraph, but short ones and parts of long ones
    for side in SPLITS[: SPLITS.index(config.split) + 1]:
        chosen = [asked(one, frozenset(seen)) for one in texts[side]]
        seen |= {run for kinds in chosen for shown in kinds.values() for run in runs(shown)}
        asking = zip(texts[side], chosen, strict=True)
        found = [clause(one, kind, shown) for one, kinds in asking for kind, shown in kinds.items()]
    return found


def _text(one: Licence) -> dict[str, Any]:
    return {"id": f"text/{one.key}", "text": one.text}
