"""Files cut into passages for search, at blank lines where that can be: each with its place, none too long."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from trivium.data.config import FilesConfig
from trivium.data.converted import PACKED, unpacked
from trivium.data.files import Files
from trivium.data.find import find_files
from trivium.data.packing import said_in
from trivium.data.readers import Sources, kind_of
from trivium.data.rows import RowError, UnreadableError
from trivium.disk import digest_file
from trivium.errors import DataError

VERSION = 2
"""Of how files are cut; raise it when others come of the same bytes."""

MAYBE_TEXT = ("json", "jsonl", "csv", "tsv")
"""Kinds of rows whose names settings, manifests and lists have, too."""
EMPTY, UNKNOWN = "empty files", "tables of unknown columns"

Count = Callable[[Sequence[str]], list[int]]
"""Tokens of each text."""


@dataclass(frozen=True)
class Passage:
    """A stretch of a file. first, last: numbers of its lines, from 1; of a row, its number twice. unit: line or row."""

    first: int
    last: int
    text: str
    unit: str = "line"


class FoundFile(NamedTuple):
    """A file to read. name: its path from the folder that was asked for. sha256: of its bytes."""

    path: Path
    name: str
    sha256: str


def files_to_search(config: FilesConfig) -> tuple[list[FoundFile], Counter[str]]:
    """Text, source code and files of rows under data.path, in order, and how many others, by reason.

    Raises DataError if there is nothing to read.
    """
    if not config.path:
        raise DataError("phase=search needs data.path=, a folder, a file or a glob")
    found = find_files(config.path, every=True)
    if not found.files:
        raise DataError(f"{config.path} has nothing to read")
    place = Path(config.path).expanduser()
    base = place if place.is_dir() else place.parent if place.is_file() else None
    names = [(p.relative_to(base) if base else p).as_posix() for p in found.files]
    files = [FoundFile(p, name, digest_file(p)[1]) for p, name in zip(found.files, names, strict=True)]
    return files, found.left_out


def passages_of(file: FoundFile, config: FilesConfig, most: int, count: Count) -> tuple[list[Passage], dict[str, int]]:
    """The passages of one file, none longer than `most` tokens, and how many of its rows were left out, by reason.

    A file of rows is read as it is for training, each row for itself. Where no setting says how to read its columns,
    JSON and CSV without a row of a known schema are text; what is empty, damaged, or a table of other columns is left
    out. Raises DataError naming file and row, or line.
    """
    kind, chosen = kind_of(file.path), config.schema != "auto" or config.columns or config.text_column
    try:
        packed = file.path.suffix in PACKED
        held = unpacked(file.path, int(config.max_unpacked_gb * 1e9)) if packed else file.path
        if kind not in ("", "text"):
            if not held.stat().st_size and not chosen:
                return [], {EMPTY: 1}
            source = _rows(file, config)
            if isinstance(source, str):
                return [], {source: 1}
            if source is not None:
                return _passages_of_rows(source, most, count), dict(source.notes.get("skipped", {}))
        text = Sources(file.path, config.max_chars, [held])[0] or ""
        if not any(map(str.isalnum, text)) if kind in MAYBE_TEXT else not text:
            return [], {EMPTY: 1}
        return cut(text, most, count), {}
    except UnreadableError:
        if chosen:
            raise
        return [], {"damaged files": 1}
    except RowError as error:
        if config.bad_rows == "skip":
            return [], {error.reason: 1}
        raise DataError(f"{error}; data.bad_rows=skip leaves such files and rows out and counts them") from error


def _passages_of_rows(source: Files, most: int, count: Count) -> list[Passage]:
    found = []
    for i in range(len(source)):
        example = source[i]
        number = int(example["id"].rpartition(":")[2])
        found += [replace(p, first=number, last=number, unit="row") for p in cut(said_in(example), most, count)]
    return found


def _rows(file: FoundFile, config: FilesConfig) -> Files | str | None:
    """A file's rows as examples; None of one to read as text; of one to leave out, why."""
    mine = replace(config, path=str(file.path), validation_path="", validation_share=0.0)
    try:
        return Files(mine)
    except UnreadableError:
        raise
    except DataError as error:
        if config.schema != "auto" or config.columns or config.text_column:
            raise
        if kind_of(file.path) in MAYBE_TEXT:
            if isinstance(error, RowError) and _has_rows(mine):
                raise  # rows, and a bad one among them
            return None
        said = str(error)
        reason = UNKNOWN if "has the columns" in said else EMPTY if said.endswith("has no rows") else ""
        if not reason:
            raise
        return reason


def _has_rows(config: FilesConfig) -> bool:
    """Whether one row at least can be read."""
    try:
        return bool(len(Files(replace(config, bad_rows="skip"))))
    except DataError:
        return False


def cut(text: str, most: int, count: Count) -> list[Passage]:
    """Passages of a text: whole paragraphs, as many as fit into `most` tokens; of one that is longer its lines, of a
    longer line its words. Blank lines between passages are in none.

    >>> words = lambda texts: [len(t.split()) for t in texts]
    >>> [(p.first, p.last, p.text) for p in cut("a b\\nc\\n\\nd\\n\\ne f g h i", 4, words)]
    [(1, 4, 'a b\\nc\\n\\nd'), (6, 6, 'e f g h'), (6, 6, 'i')]
    """
    found: list[Passage] = []
    held: list[Passage] = []  # neighbours that fit together

    def close() -> None:
        if held:
            found.append(_joined(held))
            held.clear()

    paragraphs = list(_paragraphs(text))
    for paragraph, size in zip(paragraphs, count([p.text for p in paragraphs]), strict=True):
        if held and count([_joined([*held, paragraph]).text])[0] > most:
            close()
        if size > most:
            close()
            found += _halved(paragraph, most, count)
        else:
            held.append(paragraph)
    close()
    return found


def _paragraphs(text: str) -> Iterator[Passage]:
    lines = text.split("\n")
    start = None
    for number, line in enumerate([*lines, ""]):
        if line.strip() and start is None:
            start = number
        elif not line.strip() and start is not None:
            yield Passage(start + 1, number, "\n".join(lines[start:number]))
            start = None


def _joined(neighbours: Sequence[Passage]) -> Passage:
    text = neighbours[0].text
    for before, after in zip(neighbours, neighbours[1:], strict=False):
        text += "\n" * max(1, after.first - before.last) + after.text
    return Passage(neighbours[0].first, neighbours[-1].last, text)


def _halved(passage: Passage, most: int, count: Count) -> list[Passage]:
    """Pieces of a paragraph that is too long: as many lines as fit, then as many words, then as many characters."""
    lines = passage.text.split("\n")
    if len(lines) == 1:
        passage = replace(passage, text=passage.text.strip(" "))
        words = passage.text.split(" ")
        pieces = [w + " " for w in words[:-1]] + words[-1:] if len(words) > 1 else passage.text
    else:
        pieces = lines

    def joined(start: int, end: int) -> Passage:
        if pieces is lines:
            return Passage(passage.first + start, passage.first + end - 1, "\n".join(lines[start:end]))
        return replace(passage, text="".join(pieces[start:end]).strip(" "))

    found, start = [], 0
    while start < len(pieces):
        taken = _most_that_fit(joined, start, len(pieces), most, count)
        if taken:
            found.append(joined(start, start + taken))
        elif pieces is lines or len(pieces[start]) > 1:
            found += _halved(joined(start, start + 1), most, count)
        start += max(taken, 1)
    return [p for p in found if p.text.strip()]


def _most_that_fit(joined: Callable[[int, int], Passage], start: int, end: int, most: int, count: Count) -> int:
    """How many pieces from `start` on together have `most` tokens at most: doubled until too many, then halved."""
    low, high, left = 0, 1, end - start
    while high <= left and count([joined(start, start + high).text])[0] <= most:
        low, high = high, 2 * high
    high = min(high, left + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count([joined(start, start + middle).text])[0] <= most else (low, middle)
    return low
