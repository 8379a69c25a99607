"""What travels between training and its data workers: the data set once, batches all the time.

Arrays stay outside the pickles (PEP 574). Those of the data set lie in one file without a name, which all workers map:
it costs its size once, not once a worker. What is mapped from the cache they map from there, unless that was emptied
meanwhile: this process still has it then, and shares it like the rest. Batches go through a socket, so a small /dev/shm
is no limit.
"""

from __future__ import annotations

import io
import mmap
import os
import pickle
import socket
import struct
import sys
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np

from trivium.errors import DataError
from trivium.registry import load

LEAST = 1 << 14
"""Bytes from which an array of the data set is shared; smaller ones are copied."""
ALIGNED = 64


class _Packer(pickle.Pickler):
    def reducer_override(self, value: Any) -> Any:
        torch = sys.modules.get("torch")  # where nothing has loaded it, there are no tensors
        if torch is None or type(value) is not torch.Tensor:
            return NotImplemented
        if value.device.type != "cpu" or value.dtype is torch.bfloat16:
            return NotImplemented
        return _tensor, (value.detach().numpy(),)


def _tensor(array: np.ndarray) -> Any:
    return load("torch:from_numpy")(array)


def pack(value: Any) -> list[memoryview]:
    """Anything that can be pickled, as parts to send: the pickle, then the bytes of each array or tensor."""
    head, arrays = io.BytesIO(), []
    _Packer(head, protocol=5, buffer_callback=arrays.append).dump(value)
    return [head.getbuffer(), *(a.raw() for a in arrays)]


def send(to: socket.socket, parts: list[memoryview]) -> None:
    """Send what `pack` made: how many parts, their sizes, the parts."""
    sizes = [part.nbytes for part in parts]
    to.sendall(struct.pack(f"<{1 + len(sizes)}Q", len(sizes), *sizes))
    for part in parts:
        to.sendall(part)


def receive(source: socket.socket, idle: Callable[[], None]) -> Any:
    """What was sent. `idle` is called each time the socket's timeout passes; what it raises ends the wait.

    Raises EOFError when the other side is gone.
    """
    (number,) = struct.unpack("<Q", _read(source, 8, idle))
    sizes = struct.unpack(f"<{number}Q", _read(source, 8 * number, idle))
    head, *arrays = [_read(source, size, idle) for size in sizes]
    return pickle.loads(head, buffers=arrays)


def _read(source: socket.socket, size: int, idle: Callable[[], None]) -> bytearray:
    data = bytearray(size)
    left = memoryview(data)
    while left:
        try:
            count = source.recv_into(left)
        except TimeoutError:
            idle()
            continue
        except ConnectionError as error:
            raise EOFError from error
        if not count:
            raise EOFError
        left = left[count:]
    return data


class _Sharer(pickle.Pickler):
    def __init__(self, to: BinaryIO, shared: BinaryIO) -> None:
        super().__init__(to, protocol=5)
        self.shared = shared

    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, np.ndarray) or value.nbytes < LEAST or value.dtype.hasobject:
            return None
        if isinstance(value, np.memmap) and isinstance(value.base, mmap.mmap) and os.path.exists(str(value.filename)):
            return str(value.filename), value.dtype.str, value.shape  # a whole file: they map it themselves
        self.shared.write(bytes(-self.shared.tell() % ALIGNED))
        start = self.shared.tell()
        self.shared.write(np.ascontiguousarray(value).data.cast("B"))
        return start, value.dtype.str, value.shape


class _Mapper(pickle.Unpickler):
    def __init__(self, source: BinaryIO, shared: mmap.mmap) -> None:
        super().__init__(source)
        self.shared = shared

    def persistent_load(self, pid: Any) -> np.ndarray:
        start, kind, shape = pid
        if isinstance(start, str):
            try:
                return np.memmap(start, kind, "r", shape=shape)
            except (OSError, ValueError) as error:  # ValueError: it is empty, or shorter than it was
                raise DataError(
                    f"{start} is gone or cut short: the cache was emptied while data workers were starting; the same "
                    "command makes it anew and continues"
                ) from error
        count = int(np.prod(shape))
        return np.frombuffer(self.shared, np.dtype(kind), count, start).reshape(shape)


def share(value: Any, shared: BinaryIO) -> bytes:
    """A pickle of `value` whose large arrays are appended to the file `shared`."""
    small = io.BytesIO()
    _Sharer(small, shared).dump(value)
    shared.flush()
    return small.getvalue()


def shared_value(data: bytes, descriptor: int) -> Any:
    """What `share` pickled, with its large arrays mapped read-only from the file."""
    return _Mapper(io.BytesIO(data), mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)).load()
