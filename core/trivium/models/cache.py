"""Keys and values of the tokens already read: preallocated tensors, an argument of the model, never its state.

Slot j of a row holds position j. Queries at position p see slots 0..p, so what lies in later slots (padding of a
shorter neighbour, say) is never read and is overwritten when its position comes: no lengths, no Python integers.
"""

from __future__ import annotations

from typing import Any

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
        self._prepare()

    def _prepare(self) -> None:
        """What layers share, made by the first."""
        self._layers: list[tuple[Tensor, Tensor]] | None = None
        self._positions: Tensor | None = None
        self._places: Any = None

    @property
    def length(self) -> int:
        """Slots S a row."""
        return self.keys.shape[3]

    def update(self, layer: int, keys: Tensor, values: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Write (B, K, T, D) keys and values at (B, T) positions; return all slots of the layer, (B, K, S, D)."""
        if self._layers is None:  # taken apart once, not in each layer
            self._layers = list(zip(self.keys.unbind(), self.values.unbind(), strict=True))
        if self._positions is not positions:
            rows = torch.arange(len(positions), device=positions.device)[:, None]
            self._positions, self._places = positions, positions[0] if len(positions) == 1 else (rows, positions)
        held, places = self._layers[layer], self._places
        for slots, new in zip(held, (keys, values), strict=True):
            if isinstance(places, Tensor):
                slots.index_copy_(2, places, new.to(slots.dtype))
            else:
                slots[places[0], :, places[1]] = new.to(slots.dtype).transpose(1, 2)
        return held

    def part(self, rows: slice, length: int) -> KVCache:
        """The first `length` slots of some rows, as a cache that writes into this one."""
        part = object.__new__(type(self))
        part.keys, part.values = self.keys[:, rows, :, :length], self.values[:, rows, :, :length]
        part._prepare()
        return part

    def copy_from(self, other: KVCache) -> None:
        """Take over what another cache, of no more rows and slots, holds."""
        rows, length = other.keys.shape[1], other.length
        self.keys[:, :rows, :, :length] = other.keys
        self.values[:, :rows, :, :length] = other.values
