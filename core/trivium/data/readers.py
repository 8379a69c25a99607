"""Kinds of files, each as rows: documents of plain text, lines of JSON, records of CSV, source files of a tree."""

from __future__ import annotations

import csv
import io
import json
from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy as np

from trivium.data.arrow import open_arrow, open_parquet
from trivium.data.converted import PACKED, listed_as_lines, unpacked
from trivium.data.rows import BLOCK, RowError, Rows, Slices, after_mark, blocks
from trivium.errors import DataError

KINDS = {
    ".txt": "text",
    ".md": "text",
    ".rst": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
"""Each may also end in one of PACKED."""
DOCUMENT = 4000
"""Characters after which a plain text file is cut, at the next blank line."""
PATIENCE = 25
"""Where no blank line comes within so many times as many, the end of a line will do."""

SEPARATORS = {";": "semicolons", "\t": "tabs", ",": "commas", "|": "bars"}

csv.field_size_limit(2**31 - 1)  # data.max_chars is the limit


def kind_of(path: Path) -> str:
    """The kind of a file by its name, without what says how it is compressed; "" if it is none."""
    name = path.with_suffix("") if path.suffix in PACKED else path
    return KINDS.get(name.suffix.lower(), "")


def open_rows(path: Path, max_chars: int, max_unpacked: int) -> Rows:
    """The rows of a file. Raises DataError naming it."""
    try:
        if not path.stat().st_size:
            raise DataError(f"{path} is empty")
        held = unpacked(path, max_unpacked) if path.suffix in PACKED else path
        if not held.stat().st_size:
            raise DataError(f"{path} is empty")
        kind = kind_of(path)
        if kind == "parquet":
            return open_parquet(path, max_chars, held, max_unpacked)
        if kind == "arrow":
            return open_arrow(path, max_chars, held)
        if kind == "json" and _is_list(held):
            held = listed_as_lines(path, held, max_chars)
        kinds = {"text": Documents, "csv": CsvRecords, "tsv": TsvRecords, "json": JsonLines, "jsonl": JsonLines}
        return kinds[kind](path, max_chars, held)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


def _is_list(path: Path) -> bool:
    for block in blocks(path, after_mark(path)):
        if block := block.lstrip():
            return block.startswith(b"[")
    return False


class JsonLines(Slices):
    """An object a line; a row is a line, and a blank one holds nothing."""

    def __init__(self, path: Path, max_chars: int, held: Path | None = None) -> None:
        super().__init__(path, max_chars, held)
        at = after_mark(self.held)
        found = [np.array([at])]
        for block in blocks(self.held, at):
            found.append(np.flatnonzero(np.frombuffer(block, np.uint8) == 10) + at + 1)
            at += len(block)
        places = np.concatenate(found)
        self._places = places if places[-1] == at else np.append(places, at)

    def __len__(self) -> int:
        return len(self._places) - 1

    def __getitem__(self, row: int) -> Mapping[str, Any] | None:
        text = self.text_at(row, *self._places[row : row + 2].tolist())
        if text.isspace():
            return None
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise RowError("not JSON", f"{self.path} line {row + 1} is not JSON: {error}") from error
        if not isinstance(value, dict):
            raise RowError("not JSON", f"{self.path} line {row + 1} is not a JSON object")
        return value


class CsvRecords(Slices):
    """A record a row, the first one names the columns. Cells are text as they stand: "5", "NA" and "null" too."""

    separator: ClassVar[str] = ","

    def __init__(self, path: Path, max_chars: int, held: Path | None = None) -> None:
        super().__init__(path, max_chars, held)
        self._places = array("q")
        self._size = self.held.stat().st_size
        at = after_mark(self.held)
        while at < self._size:
            at = self._find(at)
        if not self._places:
            raise DataError(f"{self.path} has no rows")
        self.columns = self._record(-1)
        if len(set(self.columns)) < len(self.columns):
            raise DataError(f"{self.path} names a column twice: {', '.join(self.columns)}")

    def _find(self, start: int) -> int:
        """Note where records begin from `start` on; returns where to go on: past a quote that is never closed, at the
        next line."""
        begins = at = start

        def lines() -> Iterator[str]:
            nonlocal at
            with open(self.held, "rb") as file:
                file.seek(start)
                while line := file.readline(self.max_bytes):
                    at += len(line)
                    if at - begins > self.max_bytes:
                        return
                    yield line.decode("latin-1")  # a letter a byte: only quotes and commas matter here

        reader = csv.reader(lines(), strict=True, delimiter=self.separator)
        while True:
            try:
                record = next(reader, None)
            except csv.Error:
                self._places.append(begins)
                return self._line_end(begins)
            if record is None:
                if at > begins:  # a line over the limit: its row says so
                    self._places.append(begins)
                    return self._line_end(begins)
                return self._size
            if record:
                self._places.append(begins)
            begins = at

    def _line_end(self, start: int) -> int:
        at = start
        for block in blocks(self.held, start):
            if (found := block.find(b"\n")) >= 0:
                return at + found + 1
            at += len(block)
        return at

    def _record(self, row: int) -> list[str]:
        start = self._places[row + 1]
        end = self._places[row + 2] if row + 2 < len(self._places) else self._size
        text = self.text_at(row, start, end)
        try:
            return next(csv.reader(io.StringIO(text, newline="\n"), strict=True, delimiter=self.separator))
        except csv.Error as error:
            raise RowError("not CSV", f"{self.at(row)} is not CSV: {error}") from error

    def __len__(self) -> int:
        return len(self._places) - 1

    def __getitem__(self, row: int) -> Mapping[str, Any]:
        cells = self._record(row)
        if len(cells) != len(self.columns):
            raise RowError(
                "not CSV",
                f"{self.at(row)} has {len(cells)} cells, the header {len(self.columns)} ({', '.join(self.columns)})",
            )
        return dict(zip(self.columns, cells, strict=True))

    @property
    def misread(self) -> str:
        """What to do where the one column found is a row of names with something else between them; else empty."""
        (name,) = self.columns if len(self.columns) == 1 else ("",)
        other = next((mark for mark in SEPARATORS if mark in name and mark != self.separator), "")
        if not other:
            return ""
        named = {".csv": ",", ".tsv": "\t"}
        kind = next((suffix for suffix, mark in named.items() if mark == other), "")
        copy = f"csv.writer(sys.stdout).writerows(csv.reader(sys.stdin, delimiter='{other}'))"
        way = f"name it {kind}" if kind else f'write it anew: python -c "import csv, sys; {copy}" < OLD.csv > NEW.csv'
        return (
            f"{self.path} has one column, {name!r}: it is separated by {SEPARATORS[other]}, and read as separated by "
            f"{SEPARATORS[self.separator]}; {way}"
        )


class TsvRecords(CsvRecords):
    """The same with tabs."""

    separator = "\t"


class Documents(Slices):
    """Plain text, cut at blank lines into pieces of about DOCUMENT characters; only the blank lines there are lost."""

    def __init__(self, path: Path, max_chars: int, held: Path | None = None) -> None:
        super().__init__(path, max_chars, held)
        self._starts, self._ends = array("q"), array("q")
        start = at = after_mark(self.held)
        size, said, ending = 0, False, 0
        with open(self.held, "rb", buffering=BLOCK) as file:
            file.seek(at)
            while line := (at == start and _first_lines(file)) or file.readline(BLOCK):
                at += len(line)
                before, ending = ending, line.endswith(b"\n") + line.endswith(b"\r\n")
                size, said = size + _characters(line), said or not line.isspace()
                blank = len(line) == ending > 0 and size >= DOCUMENT
                if said and (blank or (ending and size >= PATIENCE * DOCUMENT)):
                    self._starts.append(start)
                    self._ends.append(at - ending - before * blank)
                    start, size, said = at, 0, False
        if said:
            self._starts.append(start)
            self._ends.append(at)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, row: int) -> str:
        text = self.text_at(row, self._starts[row], self._ends[row])
        return text.replace("\r\n", "\n").replace("\r", "\n")


def _first_lines(file: BinaryIO) -> bytes:
    """The whole lines in the next bytes that no document is cut in, since they are fewer than DOCUMENT."""
    start, head = file.tell(), file.read(DOCUMENT - 1)
    lines = head[: head.rfind(b"\n") + 1]
    file.seek(start + len(lines))
    return lines


def _characters(lines: bytes) -> int:
    """How many there are; a line's end is one."""
    return (len(lines) if lines.isascii() else len(lines.decode(errors="replace"))) - lines.count(b"\r\n")


class Sources(Rows):
    """Source files, each a document whose id is its path."""

    def __init__(self, path: Path, max_chars: int, files: Sequence[Path]) -> None:
        super().__init__(path, max_chars)
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, row: int) -> str | None:
        try:
            size = self.files[row].stat().st_size
            if size > self.max_bytes:
                raise self.too_long(row, size, "bytes")
            raw = self.files[row].read_bytes()
        except OSError as error:
            raise DataError(f"{self.files[row]} cannot be read: {error.strerror or error}") from error
        try:
            text = raw.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            number = 1 + raw[: error.start].count(b"\n")
            raise RowError(
                "not UTF-8",
                f"{self.files[row]} line {number} is not UTF-8: byte {error.start} is {raw[error.start]:#04x}",
            ) from error
        return None if not text or text.isspace() else text.replace("\r\n", "\n")

    def name(self, row: int) -> str:
        return self.files[row].as_posix()

    def at(self, row: int) -> str:
        return str(self.files[row])
