"""Rows of an Arrow file, memory-mapped; a Parquet file becomes one in the cache, some rows at a time."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from trivium.data.converted import SMALL, check_room, check_size, converted
from trivium.data.rows import RowError, Rows, UnreadableError

TOGETHER = 64
"""Rows that become Python objects at once: a row alone takes nearly as long."""
RESIDENT = 8_000_000
"""Bytes that are read before the mapping lets go of its pages; the system keeps them as long as it has room."""
BROKEN = (pa.ArrowException, OSError, ValueError, TypeError, MemoryError, OverflowError)
"""What the library raises for a file that is no Arrow or Parquet."""


class ArrowRows(Rows):
    """Record batches, whose columns may differ. mapping: what they lie in, whose pages are let go of now and then."""

    def __init__(
        self, path: Path, max_chars: int, batches: Sequence[pa.RecordBatch], mapping: mmap.mmap | None = None
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
        start = (row - first) // TOGETHER * TOGETHER
        block = self.batches[number].slice(start, TOGETHER)
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

    def _count(self, size: int) -> None:
        self._read += size
        if self._map is not None and self._read > RESIDENT and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)
            self._read = 0


def open_arrow(path: Path, max_chars: int, held: Path | None = None) -> ArrowRows:
    """The rows of an Arrow file, or of a stream in one (as `datasets` writes). held: it, or a copy in the cache."""
    try:
        with open(held or path, "rb") as file:
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return ArrowRows(path, max_chars, _batches(pa.py_buffer(mapping)), mapping)
    except BROKEN as error:
        raise UnreadableError(f"{path} cannot be read as arrow: {_first_line(error)}") from error


def _batches(buffer: pa.Buffer) -> list[pa.RecordBatch]:
    try:
        reader = pa.ipc.open_file(buffer)
    except pa.ArrowInvalid:
        return list(pa.ipc.open_stream(buffer))
    return [reader.get_batch(i) for i in range(reader.num_record_batches)]


def arrow_of_parquet(path: Path, held: Path, most: int) -> Path:
    """The Arrow file of a Parquet file. most: its bytes."""

    def write(temporary: Path) -> None:
        made = checked = 0
        with (
            pq.ParquetFile(held, page_checksum_verification=True) as file,
            pa.ipc.new_file(str(temporary), file.schema_arrow) as writer,
        ):
            waiting: list[pa.RecordBatch] = []
            for batch in _in_groups(file):
                made += batch.nbytes
                check_size(path, made, most)
                waiting.append(batch)
                if made - checked >= RESIDENT // 2:
                    check_room(path, temporary.parent)
                    writer.write_table(pa.Table.from_batches(waiting).combine_chunks())
                    waiting, checked = [], made
            if waiting:
                writer.write_table(pa.Table.from_batches(waiting).combine_chunks())

    try:
        return converted(held, "rows.arrow", write)
    except BROKEN as error:
        raise UnreadableError(f"{path} cannot be read as parquet: {_first_line(error)}") from error


def _in_groups(file: pq.ParquetFile) -> Iterator[pa.RecordBatch]:
    """Group by group, in this thread: read as a whole the library runs ahead of whoever is slower, by any amount."""
    for group in range(file.num_row_groups):
        yield from file.iter_batches(batch_size=128, row_groups=[group], use_threads=False)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
