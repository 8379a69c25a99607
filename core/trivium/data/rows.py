"""The rows of a file: their places are found once, their content is read when it is asked for.

So memory holds a few numbers a row and never the text, however large a file is.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from trivium.errors import DataError

BLOCK = 1 << 22
"""Bytes read at once while looking for the places of rows."""
WAY_OUT = "data.bad_rows=skip leaves such rows out and counts them"


class RowError(DataError):
    """A row that cannot be used. reason: in a few words, under which data.bad_rows=skip counts it."""

    count = 1
    """How many rows, from that on, are lost with it."""

    def __init__(self, reason: str, said: str) -> None:
        super().__init__(said)
        self.reason = reason

    def with_way_out(self) -> RowError:
        """The same, with what to set."""
        return RowError(self.reason, f"{self}; {WAY_OUT}")


class UnreadableError(DataError):
    """A file that is not what its name says, or is damaged as a whole."""


class LostError(RowError, UnreadableError):
    """Rows in a damaged part of a file that says elsewhere how many they are.

    where: the part, with its file and rows. count: of its rows from the one that was asked for on.
    """

    def __init__(self, reason: str, said: str, where: str, count: int) -> None:
        super().__init__(reason, said)
        self.where, self.count = where, count

    def with_way_out(self) -> LostError:
        return LostError(self.reason, f"{self}; {WAY_OUT}", self.where, self.count)


class Rows(ABC):
    """Rows by number, from 0. path: where the user has them; data.max_chars bounds each."""

    def __init__(self, path: Path, max_chars: int) -> None:
        self.path, self.max_chars = path, max_chars
        self.max_bytes = 6 * max_chars + 65_536  # of the file: \\u00e9 is one character in six bytes

    @abstractmethod
    def __len__(self) -> int:
        """Numbers of rows run up to here; some may hold nothing."""

    @abstractmethod
    def __getitem__(self, row: int) -> str | Mapping[str, Any] | None:
        """A text, or columns and their values; None where there is nothing. Raises RowError."""

    @property
    def title(self) -> str:
        """A short name of the whole, for tasks that have none of their own."""
        return self.path.name.split(".")[0]

    def name(self, row: int) -> str:
        """The id of its example."""
        return f"{self.path.as_posix()}:{row + 1}"

    def at(self, row: int) -> str:
        """How an error names it."""
        return f"{self.path} row {row + 1}"

    def too_long(self, row: int, size: int, unit: str = "characters") -> RowError:
        """The refusal of a row over the limit."""
        return RowError(
            "too long",
            f"{self.name(row)} has {size:,} {unit}, more than data.max_chars={self.max_chars} allows",
        )


class Slices(Rows):
    """Rows that are stretches of a file's bytes. held: the file itself, or what was made of it in the cache."""

    def __init__(self, path: Path, max_chars: int, held: Path | None = None) -> None:
        super().__init__(path, max_chars)
        self.held = held or path
        self._identity = _identity(os.stat(self.held))

    def bytes_at(self, row: int, start: int, end: int) -> bytes:
        """A stretch that is a row's; refused by its size before it is read."""
        if end - start > self.max_bytes:
            raise self.too_long(row, end - start, "bytes")
        return self._read(start, end)

    def _read(self, start: int, end: int) -> bytes:
        descriptor, pieces = _opened(self.held, self._identity).descriptor, []
        while start < end and (piece := os.pread(descriptor, end - start, start)):  # 2 GB at most in one call
            pieces.append(piece)
            start += len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def text_at(self, row: int, start: int, end: int) -> str:
        """The same as text."""
        raw = self.bytes_at(row, start, end)
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            place = start + error.start
            raise RowError(
                "not UTF-8",
                f"{self.path} line {self.line_of(place)} is not UTF-8: byte {place} is {raw[error.start]:#04x}",
            ) from error

    def line_of(self, place: int) -> int:
        """The number of the line, from 1, that a byte is in."""
        pieces = range(0, place, BLOCK)
        return 1 + sum(self._read(at, min(at + BLOCK, place)).count(b"\n") for at in pieces)


class _Opened:
    """A file that is closed when it is forgotten."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


def _identity(found: os.stat_result) -> tuple[int, int, int]:
    return found.st_ino, found.st_size, found.st_mtime_ns


@lru_cache(maxsize=32)  # not all of a folder's thousands at once
def _opened(path: Path, identity: tuple[int, int, int]) -> _Opened:
    try:
        found = _Opened(path)
        changed = _identity(os.fstat(found.descriptor)) != identity
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    if changed:
        raise DataError(f"{path} has changed since its rows were found; start again")
    return found


def blocks(path: Path, start: int = 0) -> Iterator[bytes]:
    """A file's bytes from `start` on, piece by piece."""
    with open(path, "rb") as file:
        file.seek(start)
        while block := file.read(BLOCK):
            yield block


def after_mark(path: Path) -> int:
    """Where text begins: behind the byte order mark that some programs put before UTF-8."""
    with open(path, "rb") as file:
        return 3 if file.read(3) == b"\xef\xbb\xbf" else 0
