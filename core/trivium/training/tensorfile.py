"""Tensors to a safetensors file, piece by piece: no second copy of them, hashed and looked at while they are written.

The format is a length, a JSON header and the tensors' bytes (https://github.com/huggingface/safetensors#format). The
library's own `save` makes one bytes object of everything first: twice the memory, and another reading for a hash.

Of tensors that are shared out among processes each writes its own blocks, to their places in the same file: nothing is
gathered, and the file is the one that a single process would have written, whatever the number of processes.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trivium.disk import check_at, digest_file, reserve_file, write_at, write_pieces
from trivium.errors import CheckpointError, TrainingError
from trivium.models.weights import Share
from trivium.training.parallel import ALONE, World

NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Types by the names that the format has for them."""
EXPONENTS = {
    torch.float64: (np.dtype("<u8"), 0x7FF0000000000000),
    torch.float32: (np.dtype("<u4"), 0x7F800000),
    torch.float16: (np.dtype("<u2"), 0x7C00),
    torch.bfloat16: (np.dtype("<u2"), 0x7F80),
}
"""The bits that are all set in a value, read as an integer, that is infinite or not a number (IEEE 754)."""
PIECE = 1 << 20
"""Bytes: small enough to be in the cache for the check, the hash and the write."""


def write_tensors(path: Path, tensors: Mapping[str, Tensor | Share], world: World = ALONE) -> tuple[int, str]:
    """Write and sync a safetensors file; returns its bytes and SHA-256, that of what was meant to be written.

    Tensors may be on any device; one at a time is brought to the host. No torch function computes here, so it may run
    beside training in another thread. Raises TrainingError naming the first tensor that holds a value that is not
    finite, CheckpointError when the disk refuses.

    world: the processes that all call this, each with its own blocks; the first alone writes what is not shared out.
    Once all have, each reads its own blocks back and compares them; then the first alone returns figures, of the file.
    """
    order = sorted(tensors, key=lambda name: (-_data(tensors[name]).element_size(), name))  # every tensor stays aligned
    header, starts, end = {}, {}, 0
    for name in order:
        data, shape = _data(tensors[name]), tensors[name].shape
        if data.dtype not in NAMES:
            raise CheckpointError(f"{path}: {name} is of the type {data.dtype}, which safetensors files cannot hold")
        starts[name], end = end, end + math.prod(shape) * data.element_size()
        header[name] = {"dtype": NAMES[data.dtype], "shape": list(shape), "data_offsets": [starts[name], end]}
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    head = len(head).to_bytes(8, "little") + head
    size = len(head) + end

    def pieces() -> Iterator[tuple[int, bytes | memoryview]]:
        """Each with its place, in the order of their places."""
        if world.is_first:
            yield 0, head
        for name in order:
            tensor = tensors[name]
            shared = isinstance(tensor, Share)
            if not shared and not world.is_first:
                continue
            for place, run in _runs(tensor) if shared else [(0, tensor)]:
                place += len(head) + starts[name]
                for piece in _pieces(run):
                    if not _finite(piece, run.dtype):
                        raise TrainingError(f"{name} in {path.name} is no longer finite")
                    yield place, piece
                    place += len(piece)

    if world.size == 1:
        digest = hashlib.sha256()
        write_pieces(path, _hashed(pieces(), digest), size)
        return size, digest.hexdigest()
    what = f"write {path}"
    with world.together(what):
        if world.is_first:
            reserve_file(path, size)
    with world.together(what):
        write_at(path, pieces())
    with world.together(what):  # each looks after its own once all have written
        check_at(path, pieces())
    with world.together(what):
        return digest_file(path) if world.is_first else (0, "")


def _data(tensor: Tensor | Share) -> Tensor:
    return tensor.block if isinstance(tensor, Share) else tensor


def _hashed(pieces: Iterator[tuple[int, bytes | memoryview]], digest: Any) -> Iterator[bytes | memoryview]:
    for _, piece in pieces:
        digest.update(piece)
        yield piece


def _runs(share: Share) -> Iterator[tuple[int, Tensor]]:
    """The parts of a block that are in one piece in the whole, each with its place there in bytes.

    >>> block = torch.tensor([[1, 2], [3, 4]], dtype=torch.int8)  # the right half of 2 x 4, then rows 2 and 3 of 5 x 2
    >>> [(place, run.tolist()) for place, run in _runs(Share(block, (2, 4), (0, 2)))]
    [(2, [1, 2]), (6, [3, 4])]
    >>> [(place, run.tolist()) for place, run in _runs(Share(block, (5, 2), (2, 0)))]
    [(4, [[1, 2], [3, 4]])]
    """
    block, shape = share.block.detach().cpu(), share.shape
    if not block.numel():
        return
    whole = len(shape)  # the dimensions from here on are not cut
    while whole and block.shape[whole - 1] == shape[whole - 1]:
        whole -= 1
    strides = [math.prod(shape[d + 1 :]) * block.element_size() for d in range(len(shape))]
    first = sum(o * s for o, s in zip(share.offset, strides, strict=True))
    outer = max(0, whole - 1)  # the dimensions before the last one that is cut
    for index in product(*(range(n) for n in block.shape[:outer])):
        yield first + sum(i * s for i, s in zip(index, strides, strict=False)), block[index]


def _pieces(tensor: Tensor) -> Iterator[memoryview]:
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    for start in range(0, len(data), PIECE):
        yield data[start : start + PIECE]


def _finite(piece: memoryview, dtype: torch.dtype) -> bool:
    if dtype not in EXPONENTS:
        return True
    bits, exponent = EXPONENTS[dtype]
    values = np.frombuffer(piece, bits)
    return not bool(((values & bits.type(exponent)) == exponent).any())
