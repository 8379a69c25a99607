"""The source `books`: Sherlock Holmes, a History of the United States, War and Peace, Jane Austen."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from trivium import ConfigError, fetch
from trivium_plugins.books.catalogue import CATALOGUE
from trivium_plugins.books.config import BooksConfig
from trivium_plugins.records import Records

MARKS = {
    "holmes": ("BOOK, THE ADVENTURES OF SHERLOCK HOLMES ***", "*** END OF THE PROJECT GUTENBERG EBOOK, THE ADVENTURES"),
    "history": ("EBOOK HISTORY OF THE UNITED STATES ***", "End of the Project Gutenberg EBook of History"),
    "war_and_peace": ("EBOOK, WAR AND PEACE ***", "*** END OF THE PROJECT GUTENBERG EBOOK, WAR AND PEACE"),
}
"""Between which lines each book stands in one file of several."""
NOVELS = ("sensesensibility", "prideprejudice", "mansfieldpark", "emma", "northangerabbey", "persuasion")
DOCUMENT = 2_700  # characters after which a document ends, with its paragraph


def read(part: str) -> Iterator[dict[str, Any]]:
    """The documents of one part, out of its package."""
    if part == "austen":
        books = dict(zip(NOVELS, austen(), strict=True))
    else:
        text = fetch("big_text", catalogue=CATALOGUE).read_text("utf-8", errors="replace")
        start, end = MARKS[part]
        books = {part: text.partition(start)[2].partition(end)[0]}
    for book, text in books.items():
        for number, document in enumerate(documents(text)):
            yield {"part": part, "id": f"{book}/{number}", "text": document}


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


def austen() -> Iterator[str]:
    """Jane Austen's novels, out of R's lazy-load data base."""
    try:
        import rdata  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ConfigError("data.parts=[austen] is in a file of R; pip install rdata to read it") from error
    warnings.filterwarnings("ignore", module="rdata")

    def unpickle(data: bytes) -> Any:
        return rdata.conversion.convert(rdata.parser.parse_data(data))

    index, base = (fetch(name, catalogue=CATALOGUE).read_bytes() for name in ("austen_index", "austen"))
    places = unpickle(zlib.decompress(index, wbits=47))["variables"]
    for name in NOVELS:
        start, length = (int(n) for n in places[name])
        yield "\n".join(str(line) for line in unpickle(zlib.decompress(base[start + 4 : start + length])))


def examples(part: str, record: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What one record is for training: its text."""
    if record["part"] == part:
        yield {"id": record["id"], "text": record["text"], "source": record["id"].partition("/")[0]}


def content(record: dict[str, Any]) -> str:
    """What decides the split."""
    return record["text"]


class Books(Records):
    """What the functions above say of a record."""

    phases: ClassVar[frozenset[str]] = frozenset({"tokenizer", "pretrain", "distill", "evaluate"})
    config: BooksConfig
    sample = Path(__file__).parent / "sample.jsonl"

    def read(self, part: str) -> Iterator[dict[str, Any]]:
        return read(part)

    def made_of(self, part: str, record: dict[str, Any]) -> Iterator[dict[str, Any]]:
        return examples(part, record)

    def content(self, record: dict[str, Any]) -> str:
        return content(record)
