"""The source `preferences`: the true gloss of a word against another one (WordNet 3.0)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

from trivium import fetch
from trivium_plugins.preferences.catalogue import CATALOGUE
from trivium_plugins.preferences.config import PreferencesConfig
from trivium_plugins.records import Records, crossed

NAMES = {"noun": "noun", "verb": "verb", "adj": "adjective", "adv": "adverb"}


def read(part: str) -> Iterator[dict[str, Any]]:
    """Words used in an example of a gloss, with that gloss and another sense of the same word and class."""
    for kind, name in NAMES.items():
        glosses: dict[str, list[tuple[str, str]]] = {}
        for line in fetch(kind, catalogue=CATALOGUE).read_text("ascii").splitlines():
            if line.startswith("  "):  # the licence
                continue
            head, _, gloss = line.partition(" | ")
            fields = head.split()
            meaning, *rest = re.split(r';\s*"', gloss.strip(), maxsplit=1)
            used = rest[0].split('"')[0] if rest else ""
            for i in range(int(fields[3], 16)):
                word = re.sub(r"\(.*\)", "", fields[4 + 2 * i]).replace("_", " ").lower()
                glosses.setdefault(word, []).append((meaning.strip(), used))
        for word, senses in glosses.items():
            for number, (meaning, used) in enumerate(senses):
                others = [other for other, _ in senses if other != meaning]
                if others and re.search(rf"\b{re.escape(word)}\b", used.lower()):
                    wrong = others[number % len(others)]
                    record = {"word": word, "kind": name, "used": used, "true": meaning, "wrong": wrong}
                    yield {"id": f"{kind}/{word}/{number}", **record}


def examples(part: str, record: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What does the word mean here? The true gloss is chosen; another sense, or another word's gloss, rejected."""
    asked = {"role": "user", "content": f'What does the {record["kind"]} "{record["word"]}" mean in: {record["used"]}'}
    chosen, rejected = ([asked, {"role": "assistant", "content": record[side]}] for side in ("true", "wrong"))
    task = record["kind"] if part == "senses" else part
    yield {"id": f"{part}/{record['id']}", "task": task, "chosen": chosen, "rejected": rejected}


def paired(records: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Words of one class two by two, with each other's gloss; never one that is a sense of the word as well."""
    classes: dict[str, list[dict[str, Any]]] = {}
    senses: dict[str, set[str]] = {}
    for record in records:
        classes.setdefault(record["kind"], []).append(record)
        senses.setdefault(record["word"], set()).update((record["true"], record["wrong"]))
    pairs = chain.from_iterable(crossed(found, lambda record: record["true"]) for found in classes.values())
    for one, other in zip(pairs, pairs, strict=True):
        if one["wrong"] not in senses[one["word"]] and other["wrong"] not in senses[other["word"]]:
            yield from (one, other)


def content(record: dict[str, Any]) -> str:
    """What decides the split: the word, so that no gloss of it is on two sides as another's opposite."""
    return record["word"]


class Preferences(Records):
    """What the functions above say of a record."""

    phases: ClassVar[frozenset[str]] = frozenset({"preference", "reward", "evaluate"})
    config: PreferencesConfig
    sample = Path(__file__).parent / "sample.jsonl"

    def read(self, part: str) -> Iterator[dict[str, Any]]:
        return read(part)

    def records(self, part: str) -> Iterator[dict[str, Any]]:
        found = super().records(part)  # of one split, so that both of a pair are
        return paired(found) if part == "words" else found

    def made_of(self, part: str, record: dict[str, Any]) -> Iterator[dict[str, Any]]:
        return examples(part, record)

    def content(self, record: dict[str, Any]) -> str:
        return content(record)
