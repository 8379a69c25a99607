"""Keys and values of the tokens already read: preallocated tensors, an argument of the model, never its state.

Slot j of a row holds position j. Queries at position p see slots 0..p, so what lies in later slots (padding of a
shorter neighbour, say) is never read and is overwritten when its position comes: no lengths, no Python integers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class KVCache:
    """keys, values: (L, B, K, S, D). dtype: of what `update` gives."""

    def __init__(
        self, layers: int, rows: int, heads: int, length: int, width: int, *, device: object, dtype: torch.dtype
    ):
        shape = (layers, rows, heads, length, width)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)  # type: ignore[arg-type]
        self.values = torch.zeros(shape, device=device, dtype=dtype)  # type: ignore[arg-type]
        self.dtype = dtype
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

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return self.keys.nbytes + self.values.nbytes

    def update(self, layer: int, keys: Tensor, values: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Write (B, K, T, D) keys and values at (B, T) positions; return all slots of the layer, (B, K, S, D)."""
        held = self.layer(layer)
        if self._positions is not positions:
            rows = torch.arange(len(positions), device=positions.device)[:, None]
            self._positions, self._places = positions, positions[0] if len(positions) == 1 else (rows, positions)
        places = self._places
        for slots, new in zip(held, (keys, values), strict=True):
            if isinstance(places, Tensor):
                slots.index_copy_(2, places, self.encoded(new))
            else:
                slots[places[0], :, places[1]] = self.encoded(new).transpose(1, 2)
        return self.decoded(held[0]), self.decoded(held[1])

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """Its keys and values, (B, K, S, D), to be written to as well."""
        if torch.is_grad_enabled():  # such a view can be written to once
            self._layers = None
            return self.keys[layer], self.values[layer]
        if self._layers is None:  # taken apart once, not in each layer; as no views: compiled code would check bases
            self._layers = [(k.data, v.data) for k, v in zip(self.keys.unbind(), self.values.unbind(), strict=True)]
        return self._layers[layer]

    def encoded(self, new: Tensor) -> Tensor:
        """(..., D) keys or values as slots hold them."""
        return new.to(self.keys.dtype)

    def decoded(self, slots: Tensor) -> Tensor:
        """The inverse."""
        return slots

    def part(self, rows: slice, length: int) -> KVCache:
        """The first `length` slots of some rows, as a cache that writes into this one."""
        part = object.__new__(type(self))
        part.keys, part.values = self.keys[:, rows, :, :length], self.values[:, rows, :, :length]
        part.dtype = self.dtype
        part._prepare()
        return part

    def copy_from(self, other: KVCache) -> None:
        """Take over what another cache, of no more rows and slots, holds."""
        rows, length = other.keys.shape[1], other.length
        self.keys[:, :rows, :, :length] = other.keys
        self.values[:, :rows, :, :length] = other.values


class Int8Cache(KVCache):
    """Each head's key and value of a token in 8 bits a number: -127..127 times a scale of its own, which lies behind it
    in the same slot, as four more bytes. Holds 1.9 times as many tokens as bf16, 3.8 times as many as fp32 (heads of
    64), and takes longer to read."""

    def __init__(self, like: KVCache, rows: int, length: int) -> None:
        """like: the model's own cache of any size."""
        layers, _, heads, _, width = like.keys.shape
        super().__init__(layers, rows, heads, length, width + 4, device=like.keys.device, dtype=torch.int8)
        self.dtype = like.dtype

    def encoded(self, new: Tensor) -> Tensor:
        wide = new.float()
        scales = wide.abs().amax(-1, keepdim=True) / 127
        codes = (wide / scales.clamp(min=torch.finfo(torch.float32).tiny)).round().to(torch.int8)
        return torch.cat((codes, scales.view(torch.int8)), -1)

    def decoded(self, slots: Tensor) -> Tensor:
        return (slots[..., :-4] * slots[..., -4:].contiguous().view(torch.float32)).to(self.dtype)
