"""The source `medical`: pages on surgery, definitions of findings, questions about codes, one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from trivium import DataError, Example, Score, Source, split_of
from trivium_plugins.medical.codes import Codes, is_right
from trivium_plugins.medical.config import MedicalConfig
from trivium_plugins.medical.texts import Finding, codes, definitions, pages, runs, split_of_code


class Medical(Source):
    """The parts of the config, in its order; what a part needs is fetched when this is built."""

    phases: ClassVar[frozenset[str]] = frozenset({"tokenizer", "pretrain", "sft", "rlhf", "evaluate"})

    def __init__(self, config: MedicalConfig) -> None:
        super().__init__(config)
        self._examples = [example for part in config.parts for example in _part(part, config)]
        if not self._examples:
            raise DataError(f"data.parts={list(config.parts)} has no examples of split {config.split}; name more parts")

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(f"medical has examples 0 to {len(self) - 1}, not {index}")
        return self._examples[index]

    def origin(self, example: Example) -> str:
        """Its task, else its part."""
        return example.get("task") or example["id"].partition("/")[0]

    def score(self, example: Example, completion: str) -> Score:
        """1.0 for the example's answer and nothing else."""
        if not example.get("answer"):
            raise DataError(f"example {example.get('id')!r} has no answer to score against; only codes have one")
        correct = is_right(example["task"], example["answer"], completion)
        return Score(float(correct), correct)


def _part(name: str, config: MedicalConfig) -> Sequence[dict[str, Any]]:
    if name == "surgery":
        held_out = [(i, page) for i, page in enumerate(pages(config.sample))]
        return [
            {"id": f"surgery/{i}", "text": page} for i, page in held_out if split_of(page, 0.05, 0.1) == config.split
        ]
    if name == "definitions":
        return [_defined(*one) for one in _findings(config.split)]
    of_split = [one for one in codes(config.sample) if split_of_code(one.code) == config.split]
    questions = Codes(of_split, config.num_codes, config.options, config.seed)
    return [questions[i] for i in range(len(questions))]


def _findings(split: str) -> list[Finding]:
    """The definitions of a split; a held-out one shares no WORDS words in a row with those that are trained on."""
    sides: dict[str, list[Finding]] = {"train": [], "validation": [], "test": []}
    for one in definitions():
        sides[split_of(f"hpo/{one.definition.lower()}", 0.02, 0.05)].append(one)
    trained = {run for one in sides["train"] for run in runs(one.definition)} if split != "train" else set()
    return [one for one in sides[split] if trained.isdisjoint(runs(one.definition))]


def _defined(number: str, name: str, definition: str) -> dict[str, Any]:
    ask = f"Define the medical finding: {name}."
    turns = [{"role": "user", "content": ask}, {"role": "assistant", "content": definition}]
    return {"id": f"definitions/{number}", "messages": turns}
