"""The source `legal`: licence texts, their categories and SPDX names."""

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
from trivium_plugins.legal.catalogue import CATALOGUE
from trivium_plugins.legal.config import LegalConfig

SAMPLE = Path(__file__).parent / "sample.jsonl"

FOLDER = "src/licensedcode/data/licenses/"
OPENING = 500  # characters of a licence that a question about its category shows


def read(part: str) -> Iterator[dict[str, Any]]:
    """Licences with a category and a text, out of one archive; the same for every part."""
    with tarfile.open(fetch("licences", catalogue=CATALOGUE)) as archive:
        for member in archive:
            if FOLDER in member.name and member.name.endswith(".LICENSE") and (file := archive.extractfile(member)):
                _, head, text = [*file.read().decode("utf-8").split("---\n", 2), "", ""][:3]  # some have a head only
                fields = dict(re.findall(r"^(\w+): (.+)$", head, re.M))
                if text.strip() and "category" in fields:
                    names = {name: fields.get(field, "") for name, field in NAMES.items()}
                    yield {"id": fields["key"], "category": fields["category"], "text": text.strip(), **names}


NAMES = {"name": "name", "spdx": "spdx_license_key"}


def asked(id: str, task: str, question: str, answer: str) -> dict[str, Any]:
    """A verifiable example."""
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"id": id, "task": task, "messages": turns, "answer": answer}


def examples(part: str, record: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What one licence is in one part; those without an SPDX name of their own have no question about it."""
    key = record["id"]
    if part == "texts":
        yield {"id": f"texts/{key}", "text": record["text"], "source": record["category"]}
    elif part == "category":
        opening = " ".join(record["text"].split())[:OPENING]
        yield asked(f"category/{key}", part, f"Of which category is this licence?\n\n{opening}", record["category"])
    elif record["spdx"] and not record["spdx"].startswith("LicenseRef"):
        yield asked(f"spdx/{key}", part, f"What is the SPDX identifier of {record['name']}?", record["spdx"])


def content(record: dict[str, Any]) -> str:
    """What decides the split: how a text begins, without space and case, so that versions of one stay together."""
    return "".join(record["text"].lower().split())[:200]


class Legal(Source):
    """The parts of the config, in its order; a tenth of the records is held out for tests, a twentieth to validate."""

    phases: ClassVar[frozenset[str]] = frozenset({"tokenizer", "pretrain", "sft", "rlhf", "distill", "evaluate"})
    config: LegalConfig

    def __init__(self, config: LegalConfig) -> None:
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
