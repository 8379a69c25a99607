"""Tensors to a safetensors file, piece by piece: no second copy of them, hashed and looked at while they are written.

The format is a length, a JSON header and the tensors' bytes (https://github.com/huggingface/safetensors#format). The
library's own `save` makes one bytes object of everything first: twice the memory, and another reading for a hash.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from trivium.disk import write_pieces
from trivium.errors import CheckpointError, TrainingError

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


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> tuple[int, str]:
    """Write and sync a safetensors file; returns its bytes and SHA-256, that of what was meant to be written.

    Tensors may be on any device; one at a time is brought to the host. No torch function computes here, so it may run
    beside training in another thread. Raises TrainingError naming the first tensor that holds a value that is not
    finite, CheckpointError when the disk refuses.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # every tensor stays aligned
    header, end = {}, 0
    for name in order:
        tensor = tensors[name]
        if tensor.dtype not in NAMES:
            raise CheckpointError(f"{path}: {name} is of the type {tensor.dtype}, which safetensors files cannot hold")
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    head = len(head).to_bytes(8, "little") + head
    digest = hashlib.sha256()

    def pieces() -> Iterator[bytes | memoryview]:
        digest.update(head)
        yield head
        for name in order:
            for piece in _pieces(tensors[name]):
                if not _finite(piece, tensors[name].dtype):
                    raise TrainingError(f"{name} in {path.name} is no longer finite")
                digest.update(piece)
                yield piece

    size = len(head) + end
    write_pieces(path, pieces(), size)
    return size, digest.hexdigest()


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
