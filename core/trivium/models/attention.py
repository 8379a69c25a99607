"""Attention: rotary positions, who may see whom, grouped queries.

RoPE: Su et al. 2021, https://arxiv.org/abs/2104.09864, in the half-split layout that Hugging Face checkpoints use.
Grouped queries: Ainslie et al. 2023, https://arxiv.org/abs/2305.13245.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trivium.models.cache import KVCache


def rope_angles(positions: Tensor, width: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin of (B, T) positions, each (B, 1, T, D) in fp32; pair i turns by position * theta^(-2i/D)."""
    pairs = torch.arange(0, width, 2, device=positions.device, dtype=torch.float32)
    angles = positions[:, None, :, None].float() * theta ** (-pairs / width)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn (B, H, T, D) by its positions' angles, in fp32."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def training_precision(v: Tensor) -> torch.dtype:
    """What attention over whole rows is computed in: the precision of its values, fp32 for narrow heads on a CPU.

    There, without matrix tiles (AMX), the backward pass of heads of width 32 takes 25 ms in fp32 and 32 in bf16; at a
    width of 64 it is 200 against 148 (LOG.md).
    """
    narrow = v.device.type == "cpu" and v.shape[-1] < 64 and v.dtype in (torch.bfloat16, torch.float16)
    return torch.float32 if narrow and not torch.cpu._is_amx_tile_supported() else v.dtype


def visible(positions: Tensor, segments: Tensor | None, slots: int | None) -> Tensor | None:
    """(B, 1, T, S) bool, True where a query may see a key; None means plain causal.

    With `slots` (a cache): slot j is position j, so j <= position. With `segments`: the same document, not later in
    the row; padding (segment 0) sees padding, so that no row is empty and no softmax is NaN.
    """
    if slots is not None:
        return torch.arange(slots, device=positions.device) <= positions[:, None, :, None]
    if segments is None:
        return None
    same = segments[:, None, :, None] == segments[:, None, None, :]
    return same.tril()


class Attention(nn.Module):
    """Causal self-attention with H query heads over K shared key/value heads."""

    def __init__(self, dim: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.width = heads, kv_heads, dim // heads
        self.q = nn.Linear(dim, heads * self.width, bias=False)
        self.k = nn.Linear(dim, kv_heads * self.width, bias=False)
        self.v = nn.Linear(dim, kv_heads * self.width, bias=False)
        self.out = nn.Linear(heads * self.width, dim, bias=False)

    def forward(
        self,
        x: Tensor,
        angles: tuple[Tensor, Tensor],
        mask: Tensor | None,
        positions: Tensor,
        layer: int = 0,
        cache: KVCache | None = None,
    ) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        rows, length, _ = x.shape
        heads = (rows, length, -1, self.width)  # as many as are here: several processes may share them out
        q = rotate(self.q(x).view(heads).transpose(1, 2), *angles)
        k = rotate(self.k(x).view(heads).transpose(1, 2), *angles)
        v = self.v(x).view(heads).transpose(1, 2)
        dtype, given = v.dtype if cache is not None else training_precision(v), v.dtype
        if cache is not None:
            k, v = cache.update(layer, k, v, positions)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        with torch.autocast(x.device.type, enabled=False):  # it would cast them again
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=self.heads != self.kv_heads
            )
        return self.out(out.to(given).transpose(1, 2).reshape(rows, length, -1))
