"""Attention: who may see whom, and grouped queries (Ainslie et al. 2023, https://arxiv.org/abs/2305.13245)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trivium.models.cache import KVCache
from trivium.models.layers import Linear, RMSNorm
from trivium.models.rope import rotate, turned


def training_precision(v: Tensor) -> torch.dtype:
    """What attention over whole rows is computed in: the precision of its values, fp32 for narrow heads on a CPU.

    There, without matrix tiles (AMX), the backward pass of heads of width 32 takes 25 ms in fp32 and 32 in bf16; at a
    width of 64 it is 200 against 148 (LOG.md).
    """
    narrow = v.device.type == "cpu" and v.shape[-1] < 64 and v.dtype in (torch.bfloat16, torch.float16)
    return torch.float32 if narrow and not torch.cpu._is_amx_tile_supported() else v.dtype


def visible(positions: Tensor, segments: Tensor | None, slots: int | None, window: int = 0) -> Tensor | None:
    """(B, 1, T, S) bool, True where a query may see a key; None means plain causal.

    With `slots` (a cache): slot j is position j, so j <= position. With `segments`: the same document, not later in
    the row; padding (segment 0) sees padding, so that no row is empty and no softmax is NaN. With `window` besides:
    only the last so many tokens, the query's own among them (Beltagy et al. 2020, https://arxiv.org/abs/2004.05150).
    """
    if slots is not None:
        keys, queries = torch.arange(slots, device=positions.device), positions[:, None, :, None]
        seen = keys <= queries
        return seen & (keys > queries - window) if window else seen
    length = positions.shape[1]
    cut = window and window < length
    if segments is None:
        if not cut:
            return None
        return torch.ones(1, 1, length, length, dtype=torch.bool, device=positions.device).tril().triu(1 - window)
    same = (segments[:, None, :, None] == segments[:, None, None, :]).tril()
    return same.triu(1 - window) if cut else same


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask as what is added to scores, made once where every layer would make it: 0 or -inf."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)


def mean_seen(context: int, window: int) -> float:
    """How many tokens a token of a row sees on average, for counts of operations; window 0 is all before it.

    >>> mean_seen(8, 0), mean_seen(8, 4)  # 4 - 4^2 / 16
    (4.0, 3.0)
    """
    return context / 2 if not window or context <= window else window - window**2 / (2 * context)


FEW = 16
"""Queries of a head up to which heads that share keys are better taken as queries of one head: a step of decoding."""


def grouped_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None) -> Tensor:
    """(B, H, T, D) queries over (B, K, S, D) keys and values with a (B, 1, T, S) mask -> (B, H, T, D).

    The same as `enable_gqa`, whose CPU kernel in bf16 takes four to six times as long for a single query (LOG.md).
    """
    rows, heads, length, width = q.shape
    groups = heads // k.shape[1]
    q = q.reshape(rows, -1, groups * length, width)
    if length > 1:
        mask = mask.repeat(1, 1, groups, 1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).view(rows, heads, length, width)


def attend_one(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None, cap: float) -> Tensor:
    """(B, K, G, D) queries of one token over (B, K, S, D) with an additive (B, 1, 1, S) mask, as sums in fp32 of which
    torch.compile makes loops. Divided last: a loop over slots would divide in each."""
    scores = (q[..., None, :].float() * k[:, :, None].float()).sum(-1) * (scale or q.shape[-1] ** -0.5)
    scores = (cap * torch.tanh(scores / cap) if cap else scores) + mask
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return (weights[..., None] * v[:, :, None].float()).sum(-2) / weights.sum(-1, keepdim=True)


class Attention(nn.Module):
    """Causal self-attention with H query heads over K shared key/value heads.

    bias: of queries, keys and values. norm_eps: each head's queries and keys are normed before they are turned
    (Henry et al. 2020, https://arxiv.org/abs/2010.04245). scale: of the scores; None is 1 / sqrt(D). cap: scores become
    cap * tanh(score / cap); 0 is off (Gemma Team 2024, https://arxiv.org/abs/2408.00118, section 2).
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        kv_heads: int,
        width: int,
        *,
        bias: bool = False,
        norm_eps: float | None = None,
        scale: float | None = None,
        cap: float = 0.0,
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.width, self.scale, self.cap = heads, kv_heads, width, scale, cap
        self.q = Linear(dim, heads * width, bias=bias)
        self.k = Linear(dim, kv_heads * width, bias=bias)
        self.v = Linear(dim, kv_heads * width, bias=bias)
        self.out = Linear(heads * width, dim, bias=False)
        self.normed = norm_eps is not None
        self.q_norm = nn.Identity() if norm_eps is None else RMSNorm(width, eps=norm_eps)
        self.k_norm = nn.Identity() if norm_eps is None else RMSNorm(width, eps=norm_eps)
        self.joined: nn.Module | None = None  # (B, T, C) -> queries, keys, values side by side, in place of the three

    def forward(
        self,
        x: Tensor,
        angles: tuple[Tensor, Tensor],
        mask: Tensor | None,
        positions: Tensor,
        layer: int = 0,
        cache: KVCache | None = None,
    ) -> Tensor:
        """(B, T, C) -> (B, T, C); (B, C) of one token a row, with a cache, where nothing is trained."""
        if x.dim() == 2:
            assert cache is not None and mask is not None
            return self._one_token(x, angles, mask, positions, layer, cache)
        rows, length, _ = x.shape
        q, k, v = self._project(x)
        q = rotate(self.q_norm(q).transpose(1, 2), *angles)
        k = rotate(self.k_norm(k).transpose(1, 2), *angles)
        v = v.transpose(1, 2)
        dtype, given = v.dtype if cache is not None else training_precision(v), v.dtype
        if cache is not None:
            k, v = cache.update(layer, k, v, positions)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        with torch.autocast(x.device.type, enabled=False):  # it would cast them again
            out = self._capped(q, k, v, mask) if self.cap else self._attend(q, k, v, mask)
        return self.out(out.to(given).transpose(1, 2).reshape(rows, length, -1))

    def _project(self, x: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values, (B, T, heads, D) each, or (B, heads, D)."""
        heads = (*x.shape[:-1], -1, self.width)  # as many as are here: several processes may share them out
        if self.joined is not None:
            return self.joined(x).view(heads).split((self.heads, self.kv_heads, self.kv_heads), -2)
        return self.q(x).view(heads), self.k(x).view(heads), self.v(x).view(heads)

    def _one_token(
        self, x: Tensor, angles: tuple[Tensor, Tensor], mask: Tensor, positions: Tensor, layer: int, cache: KVCache
    ) -> Tensor:
        """(B, C) -> (B, C) in as few operations as can be: on a CPU ten of them cost as much as a layer's product."""
        rows, (cos, sin), dtype = x.shape[0], angles, cache.dtype
        if self.joined is not None and not self.normed:
            heads = self.joined(x).view(rows, -1, 1, self.width)
            qk = turned(heads.narrow(1, 0, self.heads + self.kv_heads), cos, sin).to(dtype)
            q, k = qk.narrow(1, 0, self.heads), qk.narrow(1, self.heads, self.kv_heads)
            v = heads.narrow(1, self.heads + self.kv_heads, self.kv_heads)
        else:
            q, k, v = (part[:, :, None] for part in self._project(x))
            if self.normed:
                q, k = self.q_norm(q), self.k_norm(k)
            q, k = turned(q, cos, sin).to(dtype), turned(k, cos, sin)
        k, v = cache.update(layer, k, v, positions)
        if torch.compiler.is_compiling():
            out = attend_one(q.view(rows, k.shape[1], -1, self.width), k, v, mask, self.scale, self.cap)
        elif self.cap:
            out = self._capped(q, k, v, mask)
        else:  # heads that share keys are queries of one head: see grouped_attention
            q = q.view(rows, k.shape[1], -1, self.width)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale)
        return self.out(out.view(rows, -1))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.to(q.dtype)
        if mask is not None and q.shape[2] <= FEW and q.device.type == "cpu" and q.shape[1] != k.shape[1]:
            return grouped_attention(q, k, v, mask, self.scale)
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.scale, enable_gqa=self.heads != self.kv_heads
        )

    def _capped(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Written out: no fused kernel caps its scores. Softmax in fp32."""
        rows, heads, length, width = q.shape
        groups = q.view(rows, k.shape[1], -1, length, width)  # query heads beside the key head that they share
        scores = groups @ k[:, :, None].transpose(-1, -2) * (self.scale or width**-0.5)
        scores = self.cap * torch.tanh(scores / self.cap)
        if mask is None:
            mask = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()[None, None]
        if mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask[:, :, None], torch.finfo(scores.dtype).min)
        else:
            scores = scores + mask[:, :, None]
        weights = torch.softmax(scores, -1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(v.dtype)
        return (weights @ v[:, :, None]).view(rows, heads, length, width)
