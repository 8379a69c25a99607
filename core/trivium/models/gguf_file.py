"""The GGUF container: keys, and where each tensor lies (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).

The header is not read by the `gguf` library: that believes every length it meets, and makes several arrays of each
string (2.8 s for a vocabulary of 49,152; 0.13 s here). Here a length is held against what is left of the file before
anything is made of it. The library's arithmetic turns blocks into numbers.
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from trivium.errors import CheckpointError

MOST_ENTRIES = 1 << 16
"""Keys, and tensors; real files have tens and thousands."""
MOST_ITEMS = 3 << 19
"""Of all arrays together: the largest vocabularies have 2**18 tokens, types and scores, and twice as many merges."""
MOST_TEXT = 1 << 24
"""Bytes of one string; chat templates are the longest."""
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
TYPES = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    30: ("BF16", 1, 2),
}
"""Number in the file -> name, values a block, bytes a block."""
AT_ONCE = 1 << 16
"""Values dequantised at a time: what lies between stays in the processor's cache."""


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies. shape: rows first, as torch has it (the file has it the other way round)."""

    shape: tuple[int, ...]
    type: int
    offset: int
    size: int


@dataclass(frozen=True)
class Header:
    """What a GGUF file says before its numbers begin."""

    path: Path
    values: dict[str, Any]
    tensors: dict[str, Stored]

    def text(self, key: str) -> str:
        """A key's text. Raises CheckpointError unless it is there and is text."""
        if not isinstance(found := self.values.get(key), str):
            raise CheckpointError(f"{self.path}: {key} is {_short(found)}; text is needed")
        return found

    def whole(self, key: str, default: int | None = None) -> int:
        """A key's whole number above 0; the default where there is no such key."""
        found = self.values.get(key, default)
        if not isinstance(found, int) or isinstance(found, bool) or not 0 < found < 1 << 31:
            raise CheckpointError(f"{self.path}: {key} is {_short(found)}; a whole number above 0 is needed")
        return found

    def real(self, key: str, default: float | None = None) -> float:
        """A key's finite number above 0; the default where there is no such key."""
        found = self.values.get(key, default)
        if not isinstance(found, int | float) or isinstance(found, bool) or not 0 < found < math.inf:
            raise CheckpointError(f"{self.path}: {key} is {_short(found)}; a finite number above 0 is needed")
        return float(found)

    def read(self, name: str) -> Tensor:
        """A tensor's values in fp32. Raises CheckpointError naming it if one is not finite."""
        from gguf.constants import GGMLQuantizationType  # here: importing it takes 0.4 s
        from gguf.quants import dequantize

        stored = self.tensors[name]
        _, block, width = TYPES[stored.type]
        values = np.empty(math.prod(stored.shape), np.float32)
        step = max(AT_ONCE // block, 1) * block
        try:
            with open(self.path, "rb") as file, np.errstate(all="ignore"):
                file.seek(stored.offset)
                for start in range(0, len(values), step):
                    part = values[start : start + step]
                    raw = np.frombuffer(_exactly(file, len(part) // block * width), np.uint8)
                    part[:] = dequantize(raw[None], GGMLQuantizationType(stored.type))[0]
                    if not np.isfinite(part).all():
                        raise CheckpointError(f"{self.path}: {name} holds values that are not finite")
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read: {error.strerror or error}") from error
        return torch.from_numpy(values).view(stored.shape)


def read_header(path: Path) -> Header:
    """Read and check all that comes before the numbers. Raises CheckpointError naming the file and what is wrong."""
    if not path.is_file():
        raise CheckpointError(f"{path} is not a file")
    try:
        with open(path, "rb") as file:
            return _parse(_Cursor(file, path, os.fstat(file.fileno()).st_size), path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is damaged: a text in its header is not UTF-8") from error


class _Cursor:
    """Reads a header from front to back and never past the end."""

    def __init__(self, file: IO[bytes], path: Path, size: int) -> None:
        self.file, self.path, self.size = file, path, size
        self.left = size
        self.items = 0

    def bad(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path} is damaged or no GGUF file: {what}")

    def take(self, count: int) -> bytes:
        if count > self.left:
            at = self.size - self.left
            raise self.bad(f"{count:,} bytes should follow at byte {at:,} and the file ends after {self.left:,}")
        self.left -= count
        return _exactly(self.file, count)

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def count(self, most: int, what: str) -> int:
        if (found := self.number("Q")) > most:
            raise self.bad(f"it claims {found:,} {what}; {most:,} are the most that are read")
        return found

    def text(self) -> str:
        return self.take(self.count(MOST_TEXT, "bytes of text")).decode()

    def value(self, type: int) -> Any:
        if type == STRING:
            return self.text()
        if type == ARRAY:
            return self.array()
        if type not in SCALARS:
            raise self.bad(f"a key's value is of the unknown type {type}")
        found = self.number(SCALARS[type])
        # the decimal that was written, not the double nearest to its fp32: 1e-05, not 9.999999747378752e-06
        return float(str(np.float32(found))) if SCALARS[type] == "f" else found

    def array(self) -> list[Any]:
        type = self.number("I")
        count = self.count(MOST_ITEMS - self.items, "items in arrays")
        self.items += count
        if type == STRING:
            return self.texts(count)
        if type not in SCALARS:
            raise self.bad(f"an array's items are of the unknown type {type}")
        form = f"<{count}{SCALARS[type]}"
        return list(struct.unpack(form, self.take(struct.calcsize(form))))

    def texts(self, count: int) -> list[str]:
        """`text` again and again, without a call for each: a header has 100,000 of them."""
        found, left, read = [], self.left, self.file.read
        for _ in range(count):
            size = int.from_bytes(read(8), "little")
            left -= 8 + size
            if left < 0 or size > MOST_TEXT:
                raise self.bad(f"the {len(found) + 1:,}th of {count:,} texts in an array would be {size:,} bytes long")
            found.append(read(size).decode())
        self.left = left
        return found


def _parse(cursor: _Cursor, path: Path) -> Header:
    if (magic := cursor.take(min(4, cursor.left))) != b"GGUF":
        raise CheckpointError(f"{path} is no GGUF file: it begins with {magic!r}")
    if (version := cursor.number("I")) not in (2, 3):
        raise CheckpointError(f"{path} is of GGUF version {version}; versions 2 and 3 are read, little-endian")
    num_tensors, num_keys = cursor.count(MOST_ENTRIES, "tensors"), cursor.count(MOST_ENTRIES, "keys")
    values: dict[str, Any] = {}
    for _ in range(num_keys):
        key = cursor.text()
        if key in values:
            raise cursor.bad(f"it has the key {_short(key)} twice")
        values[key] = cursor.value(cursor.number("I"))
    if values.get("split.count", 1) not in (0, 1):
        raise CheckpointError(f"{path} is one part of several; join them first (llama.cpp's gguf-split --merge)")
    tensors: dict[str, Stored] = {}
    for _ in range(num_tensors):
        name = cursor.text()
        if name in tensors:
            raise cursor.bad(f"it has the tensor {_short(name)} twice")
        tensors[name] = _stored(cursor, name)
    return Header(path, values, _placed(cursor, tensors, values.get("general.alignment", 32)))


def _stored(cursor: _Cursor, name: str) -> Stored:
    if not 1 <= (num_dims := cursor.number("I")) <= 4:
        raise cursor.bad(f"the tensor {_short(name)} has {num_dims:,} dimensions")
    shape = tuple(cursor.number("Q") for _ in range(num_dims))[::-1]
    type, offset = cursor.number("I"), cursor.number("Q")
    if type not in TYPES:
        raise CheckpointError(
            f"{cursor.path}: {_short(name)} is of type {type}, which is not read; read are "
            f"{', '.join(known for known, _, _ in TYPES.values())}"
        )
    kind, block, width = TYPES[type]
    if shape[-1] % block:
        raise cursor.bad(f"a row of {_short(name)} has {shape[-1]:,} values, no multiple of {kind}'s {block}")
    return Stored(shape, type, offset, math.prod(shape) // block * width)


def _placed(cursor: _Cursor, tensors: dict[str, Stored], alignment: Any) -> dict[str, Stored]:
    """The tensors with offsets from the file's beginning: all inside it, none over another."""
    if isinstance(alignment, bool) or not isinstance(alignment, int) or alignment not in {1 << i for i in range(3, 21)}:
        raise cursor.bad(f"general.alignment is {_short(alignment)}")
    start = -(-(cursor.size - cursor.left) // alignment) * alignment
    placed = {name: Stored(t.shape, t.type, start + t.offset, t.size) for name, t in tensors.items()}
    for name, t in placed.items():
        if t.offset + t.size > cursor.size:
            raise CheckpointError(
                f"{cursor.path} is cut off: {_short(name)} would end at byte {t.offset + t.size:,} "
                f"and the file ends at {cursor.size:,}"
            )
    for (one, a), (other, b) in pairwise(sorted(placed.items(), key=lambda item: item[1].offset)):
        if a.offset + a.size > b.offset:  # a small file must not unfold into many large tensors
            raise cursor.bad(f"the tensors {_short(one)} and {_short(other)} share bytes")
    return placed


def _exactly(file: IO[bytes], count: int) -> bytes:
    if len(data := file.read(count)) != count:
        raise OSError(f"it ended {count - len(data):,} bytes early while it was read")
    return data


def _short(value: Any) -> str:
    if value is None:
        return "not there"
    return f"a list of {len(value):,}" if isinstance(value, list) else repr(value)[:80]
