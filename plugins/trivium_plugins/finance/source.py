"""The source `finance`: economies of the world in text and figures (World Factbook)."""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from trivium import Example, Score, fetch, split_of
from trivium.data.source import Source
from trivium.errors import DataError
from trivium_plugins.finance.catalogue import CATALOGUE
from trivium_plugins.finance.config import FinanceConfig

SAMPLE = Path(__file__).parent / "sample.jsonl"

SHOWN = 4  # figures that a question shows, of which it asks for one
FIGURE = re.compile(r"-?\$?[\d.,]+%?( (million|billion|trillion))?")


def read(part: str) -> Iterator[dict[str, Any]]:
    """Countries with the fields of their economy; the same for every part."""
    with tarfile.open(fetch("factbook", catalogue=CATALOGUE)) as archive:
        for member in archive:
            if member.name.count("/") == 2 and member.name.endswith(".json") and (file := archive.extractfile(member)):
                country = json.load(file)
                told = {name: said for name, said in country.get("Economy", {}).items() if isinstance(said, dict)}
                fields = {name: said["text"] for name, said in told.items() if isinstance(said.get("text"), str)}
                government = country.get("Government", {}).get("Country name", {})
                name = government.get("conventional short form", government.get("conventional long form", {}))
                if fields and name.get("text"):
                    yield {
                        "id": member.name.removesuffix(".json").partition("/")[2],
                        "name": name["text"],
                        "fields": fields,
                    }


def figures(record: dict[str, Any]) -> dict[str, str]:
    """The newest value of each field that is one figure."""
    newest = {name: re.split(r" \(| \+\+", text)[0].strip() for name, text in record["fields"].items()}
    newest = {name: value.removesuffix(" of GDP") for name, value in newest.items()}
    return {name: value for name, value in newest.items() if FIGURE.fullmatch(value)}


def asked(id: str, task: str, question: str, answer: str) -> dict[str, Any]:
    """A verifiable example."""
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"id": id, "task": task, "messages": turns, "answer": answer}


def examples(part: str, record: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The section as text, or questions about figures that the question shows among others."""
    if part == "economies":
        told = [f"{name}: {text}" for name, text in record["fields"].items()]
        yield {"id": f"economies/{record['id']}", "text": "\n".join([record["name"], *told]), "source": part}
        return
    known = list(figures(record).items())
    for number in range(0, len(known) - SHOWN + 1, SHOWN):
        shown = known[number : number + SHOWN]
        table = "\n".join(f"{name}: {value}" for name, value in shown)
        for name, value in shown:
            question = f"{record['name']}\n{table}\n\nWhat is this: {name}? Answer with the figure only."
            yield asked(f"figures/{record['id']}/{name}", part, question, value)


def content(record: dict[str, Any]) -> str:
    """What decides the split: the country."""
    return record["name"]


class Finance(Source):
    """The parts of the config, in its order; a tenth of the records is held out for tests, a twentieth to validate."""

    phases: ClassVar[frozenset[str]] = frozenset({"tokenizer", "pretrain", "sft", "rlhf", "distill", "evaluate"})
    config: FinanceConfig

    def __init__(self, config: FinanceConfig) -> None:
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

    def score(self, example: Example, completion: str) -> Score:
        """1.0 for the answer and nothing else, but for case, space around it and a full stop at its end."""
        answer = example.get("answer")
        if not isinstance(answer, str) or not answer:
            raise DataError(f"example {example.get('id')!r} has no answer to score against")
        given = completion.strip().removesuffix(".").strip()
        correct = given.lower() == answer.lower()
        return Score(float(correct), correct)
