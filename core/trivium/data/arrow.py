"""Rows of an Arrow file, memory-mapped; a Parquet file becomes one in the cache, some rows at a time.

A part that is damaged (a row group, a compressed record batch) has its number of rows written elsewhere in the file:
they keep their numbers, and each says that it is lost.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from trivium.data.converted import SMALL, check_room, check_size, converted
from trivium.data.rows import LostError, RowError, Rows, UnreadableError

TOGETHER = 64
"""Rows that become Python objects at once: a row alone takes nearly as long."""
RESIDENT = 8_000_000
"""Bytes that are read before the mapping lets go of its pages; the system keeps them as long as it has room."""
BROKEN = (pa.ArrowException, OSError, ValueError, TypeError, MemoryError, OverflowError)
"""What the library raises for a file that is no Arrow or Parquet."""


LOST = b"trivium.lost"
"""Under which the Arrow file that was made of a Parquet file lists what the latter has lost."""
MADE = "checked.arrow"
"""That file's name; another than before pages were compared with their checksums."""
MOST_ROWS = 1 << 60
"""More than any file has; their sum fits into 64 bits."""


class Lost(NamedTuple):
    """Rows that cannot be read. kind, part: of what, and which, such as row group and 3 of 5. why: of the library."""

    num_rows: int
    schema: pa.Schema
    kind: str
    part: str
    why: str


class ArrowRows(Rows):
    """Record batches, whose columns may differ. mapping: what they lie in, whose pages are let go of now and then."""

    def __init__(
        self, path: Path, max_chars: int, batches: Sequence[pa.RecordBatch | Lost], mapping: mmap.mmap | None = None
    ) -> None:
        super().__init__(path, max_chars)
        self.batches, self._map = batches, mapping
        self._ends = np.cumsum([0, *(batch.num_rows for batch in self.batches)])
        self.columns = list(dict.fromkeys(name for batch in self.batches for name in batch.schema.names))
        self._block: tuple[int, int, list[Any]] = (0, 0, [])
        self._read = 0

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, row: int) -> Mapping[str, Any]:
        start, end, block = self._block
        if not start <= row < end:
            start, end, block = self._block = self._load(row)
        found = block[row - start]
        if isinstance(found, RowError):
            raise found
        return found

    def _load(self, row: int) -> tuple[int, int, list[Any]]:
        """The rows around one: first, last + 1, and each as columns and values, or the RowError that it is."""
        number = int(np.searchsorted(self._ends, row, side="right")) - 1
        first = int(self._ends[number])
        batch = self.batches[number]
        if isinstance(batch, Lost):
            raise self._lost(batch, first, row)
        start = (row - first) // TOGETHER * TOGETHER
        block = batch.slice(start, TOGETHER)
        found: list[Any] = []
        try:
            block.validate(full=True)  # first of all: the sizes of a broken one are read out of anywhere
            self._count(block.nbytes)
            if block.nbytes <= 2 * SMALL:
                found = block.to_pylist()
        except (*BROKEN, UnicodeDecodeError):  # each by itself, below
            found = []
        if found or not block.num_rows:
            return first + start, first + start + block.num_rows, found
        return row, row + 1, [self._single(block.slice(row - first - start, 1), row)]

    def _single(self, one: pa.RecordBatch, row: int) -> Any:
        try:
            one.validate(full=True)
            if one.nbytes > self.max_bytes:
                return self.too_long(row, one.nbytes, "bytes")
            return one.to_pylist()[0]
        except (*BROKEN, UnicodeDecodeError) as error:
            return RowError("broken", f"{self.at(row)} is broken: {_first_line(error)}")

    def _lost(self, lost: Lost, first: int, row: int) -> LostError:
        end = first + lost.num_rows
        rows = f"rows {first + 1} to {end}"
        return LostError(
            f"in a damaged {lost.kind}",
            f"{self.at(row)} cannot be read: {lost.kind} {lost.part} ({rows}) is damaged: {lost.why}",
            f"in {lost.kind} {lost.part} of {self.path} ({rows})",
            end - row,
        )

    def _count(self, size: int) -> None:
        self._read += size
        if self._map is not None and self._read > RESIDENT and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)
            self._read = 0


def open_arrow(path: Path, max_chars: int, held: Path | None = None) -> ArrowRows:
    """The rows of an Arrow file, or of a stream in one (as `datasets` writes). held: it, or a copy in the cache."""
    try:
        mapping = _mapped(held or path)
        return ArrowRows(path, max_chars, _batches(pa.py_buffer(mapping)), mapping)
    except BROKEN as error:
        raise UnreadableError(f"{path} cannot be read as arrow: {_first_line(error)}") from error


def _mapped(path: Path) -> mmap.mmap:
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _batches(buffer: pa.Buffer) -> list[pa.RecordBatch | Lost]:
    try:
        reader = pa.ipc.open_file(buffer)
    except pa.ArrowInvalid:
        stream = pa.ipc.open_stream(buffer)
        return _each(stream.schema, stream.read_next_batch, buffer, is_stream=True)
    numbers = iter(range(reader.num_record_batches))
    # behind its mark of 8 bytes a file is a stream, too
    return _each(reader.schema, lambda: reader.get_batch(next(numbers)), buffer.slice(8), is_stream=False)


def _each(
    schema: pa.Schema, read: Callable[[], pa.RecordBatch], stream: pa.Buffer, is_stream: bool
) -> list[pa.RecordBatch | Lost]:
    """All batches that `read` gives until it stops; in place of one that it cannot, how many rows `stream` says it has.

    Raises one of BROKEN where that is not known.
    """
    found: list[pa.RecordBatch | Lost] = []
    lengths: list[int] = []
    while True:
        try:
            found.append(read())
        except StopIteration:
            break
        except BROKEN as error:
            if _is_no_damage(error):
                raise
            lengths = lengths or _lengths(stream, is_stream)
            if len(found) >= len(lengths):
                raise
            part = f"{len(found) + 1} of {len(lengths)}"
            found.append(Lost(lengths[len(found)], schema, "record batch", part, _first_line(error)))
    if lengths and [batch.num_rows for batch in found] != lengths:
        raise ValueError("it is damaged, and its record batches are not those that it lists")
    return found


def _lengths(stream: pa.Buffer, is_stream: bool) -> list[int]:
    """Rows of each record batch, by the messages that stand before their content.

    A batch says it twice, of itself and of a column. Raises one of BROKEN where it does not say the same.
    """
    found = []
    messages = pa.ipc.MessageReader.open_stream(stream)
    column = pa.schema([("first", pa.null())])  # of no type: nothing of the content is read
    for message in iter(lambda: _following(messages), None):
        if message.type == "dictionary" and is_stream:  # batches behind it may use one that it replaces
            raise ValueError("it is damaged, and what its dictionaries say of the rows behind that is not known")
        if message.type == "record batch":
            found.append(pa.ipc.read_record_batch(message, column).num_rows)
            if found[-1] < 0 or sum(found) > MOST_ROWS:
                raise ValueError("it is damaged, and how many rows it has lost is not known")
    return found


def _following(messages: pa.ipc.MessageReader) -> pa.ipc.Message | None:
    try:
        return messages.read_next_message()
    except StopIteration:
        return None


def _is_no_damage(error: BaseException) -> bool:
    """Whether memory or disk is at fault, or the library, which does not know the kind of content."""
    return isinstance(error, (MemoryError, NotImplementedError)) or bool(getattr(error, "errno", None))


def open_parquet(path: Path, max_chars: int, held: Path, most: int) -> ArrowRows:
    """The rows of a Parquet file. held: it, or a copy in the cache. most: bytes that may be made of it."""
    try:
        mapping = _mapped(arrow_of_parquet(path, held, most))
        reader = pa.ipc.open_file(pa.py_buffer(mapping))
        sound = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        lost = json.loads((reader.schema.metadata or {}).get(LOST, b"[]"))
        batches = _with_lost(sound, [(first, Lost(rows, reader.schema, *said)) for first, rows, *said in lost])
        return ArrowRows(path, max_chars, batches, mapping)
    except BROKEN as error:
        raise UnreadableError(f"{path} cannot be read as parquet: {_first_line(error)}") from error


def _with_lost(sound: Sequence[pa.RecordBatch], lost: Sequence[tuple[int, Lost]]) -> list[pa.RecordBatch | Lost]:
    """All in the order of their rows. lost: each with the number of its first row."""
    found: list[pa.RecordBatch | Lost] = []
    left, at = list(sound[::-1]), 0
    for first, part in lost:
        while at < first:
            batch = left.pop()
            if batch.num_rows > first - at:
                left.append(batch.slice(first - at))
                batch = batch.slice(0, first - at)
            found.append(batch)
            at += batch.num_rows
        found.append(part)
        at += part.num_rows
    return found + left[::-1]


def arrow_of_parquet(path: Path, held: Path, most: int) -> Path:
    """The Arrow file of a Parquet file's sound row groups, which lists the others. most: its bytes."""

    def write(temporary: Path) -> None:
        try:
            _write_groups(path, held, temporary, most, {})
        except BROKEN:
            lost = _lost_groups(held)
            if not lost:
                raise
            _write_groups(path, held, temporary, most, lost)

    return converted(held, MADE, write)


def _write_groups(path: Path, held: Path, temporary: Path, most: int, lost: Mapping[int, Sequence[Any]]) -> None:
    """lost: what is listed of each group, by its number, that is left out."""
    made = checked = 0
    with pq.ParquetFile(held, page_checksum_verification=True) as file:
        _check_counts(file.metadata)
        schema = file.schema_arrow
        schema = schema.with_metadata({**(schema.metadata or {}), LOST: json.dumps(list(lost.values()))})
        with pa.ipc.new_file(str(temporary), schema) as writer:
            waiting: list[pa.RecordBatch] = []
            for group in range(file.num_row_groups):
                for batch in () if group in lost else _of_group(file, group):
                    made += batch.nbytes
                    check_size(path, made, most)
                    waiting.append(batch)
                    if made - checked >= RESIDENT // 2:
                        check_room(path, temporary.parent)
                        writer.write_table(pa.Table.from_batches(waiting).combine_chunks())
                        waiting, checked = [], made
            if waiting:
                writer.write_table(pa.Table.from_batches(waiting).combine_chunks())


def _of_group(file: pq.ParquetFile, group: int) -> Iterator[pa.RecordBatch]:
    """A row group, in this thread: read as a whole the library runs ahead of whoever is slower, by any amount."""
    found, wanted = 0, file.metadata.row_group(group).num_rows
    for batch in file.iter_batches(batch_size=128, row_groups=[group], use_threads=False):
        found += batch.num_rows
        yield batch
    if found != wanted:
        raise ValueError(f"its pages hold {found:,} rows, the footer says {wanted:,}")


def _lost_groups(held: Path) -> dict[int, tuple[int, int, str, str, str]]:
    """Of each row group that cannot be read: its first row, its rows by the footer, and what `Lost` has besides."""
    found, first = {}, 0
    with pq.ParquetFile(held, page_checksum_verification=True) as file:
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            try:
                for _ in _of_group(file, group):
                    pass
            except BROKEN as error:
                if _is_no_damage(error):
                    raise
                part = f"{group + 1} of {file.num_row_groups}"
                found[group] = (first, rows, "row group", part, _first_line(error))
            first += rows
    return found


def _check_counts(footer: pq.FileMetaData) -> None:
    """A footer has no checksum, but says how many rows there are of each group and of all. Raises ValueError."""
    rows = [footer.row_group(group).num_rows for group in range(footer.num_row_groups)]
    if min(rows, default=0) < 0 or sum(rows) != footer.num_rows or sum(rows) > MOST_ROWS:
        raise ValueError(f"its footer is damaged: row groups of {sum(rows):,} rows are said to be {footer.num_rows:,}")


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
