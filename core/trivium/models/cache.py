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
        index = positions[:, None, :, None].expand(keys.shape)
        self.keys[layer].scatter_(2, index, keys.to(self.keys.dtype))
        self.values[layer].scatter_(2, index, values.to(self.values.dtype))
        return self.keys[layer], self.values[layer]

    def select(self, rows: Tensor) -> None:
        """Keep only `rows`, in that order (finished neighbours leave)."""
        self.keys = self.keys.index_select(1, rows)
        self.values = self.values.index_select(1, rows)

    def grow(self, length: int) -> None:
        """Make room for `length` slots a row."""
        extra = length - self.length
        if extra > 0:
            self.keys = torch.nn.functional.pad(self.keys, (0, 0, 0, extra))
            self.values = torch.nn.functional.pad(self.values, (0, 0, 0, extra))
