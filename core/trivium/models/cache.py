"""Keys and values of the tokens already read: preallocated tensors, an argument of the model, never its state.

Slot j of a row holds position j. Queries at position p see slots 0..p, so what lies in later slots (padding of a
shorter neighbour, say) is never read and is overwritten when its position comes: no lengths, no Python integers.
"""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """keys, values: (L, B, K, S, D)."""

    def __init__(
        self, layers: int, rows: int, heads: int, length: int, width: int, *, device: object, dtype: torch.dtype
    ):
        shape = (layers, rows, heads, length, width)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)  # type: ignore[arg-type]
        self.values = torch.zeros(shape, device=device, dtype=dtype)  # type: ignore[arg-type]

    @property
    def length(self) -> int:
        """Slots S a row."""
        return self.keys.shape[3]

    def update(self, layer: int, keys: Tensor, values: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Write (B, K, T, D) keys and values at (B, T) positions; return all slots of the layer, (B, K, S, D)."""
        held = self.keys[layer], self.values[layer]
        for slots, new in zip(held, (keys, values), strict=True):
            new = new.to(slots.dtype)
            if len(new) == 1:
                slots.index_copy_(2, positions[0], new)
            else:
                rows = torch.arange(len(new), device=new.device)[:, None]
                slots[rows, :, positions] = new.transpose(1, 2)
        return held

    def part(self, rows: slice, length: int) -> KVCache:
        """The first `length` slots of some rows, as a cache that writes into this one."""
        part = object.__new__(type(self))
        part.keys, part.values = self.keys[:, rows, :, :length], self.values[:, rows, :, :length]
        return part

    def copy_from(self, other: KVCache) -> None:
        """Take over what another cache, of no more rows and slots, holds."""
        rows, length = other.keys.shape[1], other.length
        self.keys[:, :rows, :, :length] = other.keys
        self.values[:, :rows, :, :length] = other.values
