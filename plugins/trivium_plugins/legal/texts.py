"""Licence texts out of the archive of scancode-toolkit-mini, and the split of each.

Licences copy one another, so a hash of the whole text would put near twins on both sides. Texts that share a paragraph
of more than 200 characters (letters and digits, in lower case) are one family, and a family has one split.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from trivium import DataError, FetchEntry, copied, fetch, files_of, split_of

CATALOGUE = {
    "licences": FetchEntry(
        kind="sdist",
        package="scancode-toolkit-mini",
        version="32.5.0",
        file="",
        sha256="4325f6a4772bf2fb0ab764e8d421274fe07be6d2a1b4fc8be64daf7d9d651814",
        size=22_276_051,
        licence="CC-BY-4.0 (database; each text is its author's)",
    )
}
IN_FOLDER = re.compile(r"src/licensedcode/data/licenses/.*\.LICENSE")
SAMPLE = Path(__file__).with_name("data") / "licences"
HEAD = re.compile(r"---\n(.*?)\n---\n?(.*)", re.S)
SHARED = 200
"""Characters of a paragraph beyond which two texts that have it are one family."""
SPLITS = ("train", "validation", "test")
SHORTEST = 100
"""Characters of a text that says something; the database also holds names without a text."""


class Licence(NamedTuple):
    """One licence; its category is one of the database's eleven."""

    key: str
    category: str
    owner: str
    text: str


@cache  # a run reads its training and its held-out part, and reading takes seconds
def licences(sample: bool) -> tuple[Licence, ...]:
    """Every English text that is not deprecated, by key. Raises DataError if the archive cannot be had."""
    read = [parse(raw, name) for name, raw in (_bundled() if sample else _archived())]
    return tuple(sorted((one for one in read if one is not None), key=lambda one: one.key))


def parse(raw: str, name: str) -> Licence | None:
    """A file of the database: a YAML head and a text. None where there is no text, or it is deprecated or not English.

    >>> parse("---\\nkey: x\\ncategory: CLA\\nowner: Me\\n---\\n\\n" + "You agree. " * 10, "x.LICENSE").category
    'CLA'
    """
    found = HEAD.match(raw)
    head = dict(re.findall(r"^(\w+): *(.*)$", found[1], re.M)) if found else {}
    if found is None or not {"key", "category"} <= head.keys():
        raise DataError(f"{name} has no head with key and category between two lines ---; fetch the archive again")
    text = found[2].strip()
    if "is_deprecated" in head or head.get("language", "en") != "en" or len(text) < SHORTEST:
        return None
    return Licence(head["key"], head["category"], head.get("owner", "Unspecified"), text)


def _archived() -> Iterator[tuple[str, str]]:
    for name, content in files_of(fetch("licences", catalogue=CATALOGUE), IN_FOLDER.fullmatch):
        yield name, content.decode("utf8")


def _bundled() -> Iterator[tuple[str, str]]:
    for path in sorted(SAMPLE.glob("*.LICENSE")):
        yield path.name, path.read_text("utf8")


def paragraphs(text: str) -> list[str]:
    """Pieces between empty lines, each on one line.

    >>> paragraphs("One\\n  two.\\n\\nThree.")
    ['One two.', 'Three.']
    """
    return [" ".join(piece.split()) for piece in re.split(r"\n\s*\n", text) if piece.strip()]


def families(texts: Sequence[Licence]) -> dict[str, str]:
    """Key -> the first key of its family: texts joined by shared paragraphs, directly or through others."""
    parent = {one.key: one.key for one in texts}

    def root(key: str) -> str:
        while parent[key] != key:
            parent[key] = key = parent[parent[key]]
        return key

    first: dict[str, str] = {}
    for one in texts:
        for paragraph in paragraphs(one.text):
            letters = re.sub(r"\W+", " ", paragraph).lower().strip()
            if len(letters) > SHARED:
                a, b = root(one.key), root(first.setdefault(letters, one.key))
                parent[max(a, b)] = min(a, b)
    return {one.key: root(one.key) for one in texts}


def sides(texts: Sequence[Licence]) -> dict[str, list[Licence]]:
    """The texts by split, a tenth of the families in each held-out one."""
    family, found = families(texts), {split: [] for split in SPLITS}
    for one in texts:
        found[split_of(family[one.key], 0.1, 0.1)].append(one)
    return found


@cache
def apart(sample: bool) -> dict[str, list[Licence]]:
    """`sides`, without held-out texts of which those trained on have a fifth: families share no long paragraph, but
    short ones and parts of long ones."""
    found = sides(licences(sample))
    said = {split: [{"id": one.key, "text": one.text} for one in texts] for split, texts in found.items()}
    for split in SPLITS[1:]:
        twins = copied(said["train"], said[split])
        found[split] = [one for one in found[split] if one.key not in twins]
    return found
