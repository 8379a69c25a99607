"""The parts that are read from the package: books, definitions, and the word list of the spelling tasks."""

from __future__ import annotations

import hashlib
import lzma
from functools import lru_cache
from pathlib import Path
from typing import Any

from trivium.data.source import split_of
from trivium.errors import DataError
from trivium_plugins.primer.config import PrimerConfig

DATA = Path(__file__).parent / "data"
BOOKS, DEFINITIONS, WORDS = "books.txt.xz", "definitions.tsv.xz", "words.txt.xz"

PAGE = "\f"
"""Stands between two documents: form feed is what a page break is, and no book contains one."""

QUESTIONS = ("What does the word {} mean?", "What is the meaning of {}?", "Define the word {}.")


def read(name: str) -> str:
    """The text of one bundled file, unpacked once per process."""
    return _unpack(DATA / name)


def digest(name: str) -> str:
    """SHA-256 of a bundled file's text, for fingerprints."""
    return hashlib.sha256(read(name).encode()).hexdigest()


def words() -> tuple[str, ...]:
    """Common English words of 3 to 8 letters, a to z only."""
    return _words(DATA)  # a path whose hash is known: tasks ask for words some 100,000 times


@lru_cache(maxsize=8)
def _words(folder: Path) -> tuple[str, ...]:
    return tuple(row[0] for row in _table(folder / WORDS, 1))


@lru_cache(maxsize=8)
def _unpack(path: Path) -> str:
    try:
        text = lzma.decompress(path.read_bytes()).decode()
    except (OSError, EOFError, lzma.LZMAError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: bundled data is missing or damaged ({error}); install the package again") from error
    if not text.strip():
        raise DataError(f"{path}: bundled data is empty; install the package again")
    return text


@lru_cache(maxsize=8)
def _table(path: Path, width: int) -> tuple[tuple[str, ...], ...]:
    """Tab-separated rows of `width` values, none of them empty."""
    rows = tuple(tuple(line.split("\t")) for line in _unpack(path).splitlines())
    for number, row in enumerate(rows, 1):
        if len(row) != width or not all(row):
            raise DataError(f"{path}: line {number} does not have {width} values; install the package again")
    return rows


class Books:
    """Documents of novels in the public domain: runs of paragraphs of one chapter."""

    def __init__(self, config: PrimerConfig) -> None:
        documents = enumerate(read(BOOKS).split(PAGE))
        self.documents = [(i, text) for i, text in documents if split_of(text, 0.02, 0.03) == config.split]

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, index: int) -> dict[str, Any]:
        number, text = self.documents[index]
        return {"id": f"books/{number}", "text": text}

    def identity(self) -> list[Any]:
        """What the content follows from, beyond the split."""
        return [digest(BOOKS)]


class Definitions:
    """What common English words mean, asked and answered; the commonest words come first."""

    def __init__(self, config: PrimerConfig) -> None:
        rows = _table(DATA / DEFINITIONS, 2)
        rows = tuple(row for row in rows if split_of(f"definitions/{row[0]}", 0.05, 0.05) == config.split)
        self.rows = rows[: config.num_definitions]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        word, meaning = self.rows[index]
        asked = QUESTIONS[hashlib.sha256(word.encode()).digest()[0] % len(QUESTIONS)].format(word)
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": meaning}]
        return {"id": f"definitions/{word}", "messages": turns}

    def identity(self) -> list[Any]:
        """What the content follows from, beyond the split."""
        return [digest(DEFINITIONS), len(self)]
