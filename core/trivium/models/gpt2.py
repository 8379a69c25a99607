"""GPT-2: learned positions, LayerNorm, one matrix for queries, keys and values, GELU (Radford et al. 2019)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trivium.models.attention import mean_seen, training_precision, visible
from trivium.models.cache import KVCache
from trivium.models.config import GPT2Config
from trivium.models.huggingface import Reader
from trivium.models.layers import Head, Linear, draw_weights
from trivium.models.protocol import CausalLM

PARTS = {
    "attn_norm": "ln_1",
    "qkv": "attn.c_attn",
    "out": "attn.c_proj",
    "ffn_norm": "ln_2",
    "up": "mlp.c_fc",
    "down": "mlp.c_proj",
}


class Block(nn.Module):
    """x + attention(norm x), then x + ffn(norm x)."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        dim = config.dim
        self.heads, self.dropout = config.heads, config.dropout
        self.attn_norm = nn.LayerNorm(dim, eps=config.norm_eps)
        self.qkv, self.out = Linear(dim, 3 * dim), Linear(dim, dim)
        self.ffn_norm = nn.LayerNorm(dim, eps=config.norm_eps)
        self.up, self.down = Linear(dim, 4 * dim), Linear(4 * dim, dim)

    def forward(
        self, x: Tensor, mask: Tensor | None, positions: Tensor, layer: int = 0, cache: KVCache | None = None
    ) -> Tensor:
        """(B, T, C) -> (B, T, C). layer: its number, under which the cache knows it."""
        rows, length, dim = x.shape
        parts = self.qkv(self.attn_norm(x)).view(rows, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = parts.unbind()
        dtype, given = v.dtype if cache is not None else training_precision(v), v.dtype
        if cache is not None:
            k, v = cache.update(layer, k, v, positions)
        with torch.autocast(x.device.type, enabled=False):  # it would cast them again
            out = F.scaled_dot_product_attention(
                q.to(dtype), k.to(dtype), v.to(dtype), attn_mask=mask, is_causal=mask is None
            )
        out = self.out(out.to(given).transpose(1, 2).reshape(rows, length, dim))
        x = x + F.dropout(out, self.dropout, self.training)
        out = self.down(F.gelu(self.up(self.ffn_norm(x)), approximate="tanh"))
        return x + F.dropout(out, self.dropout, self.training)


class GPT2(CausalLM):
    """Positions beyond the context have no embedding."""

    supports_packing: ClassVar[bool] = True
    mixes: ClassVar[bool] = True
    hf_class: ClassVar[str] = "GPT2LMHeadModel"
    hf_prefix: ClassVar[str] = "transformer."  # the published files have none
    hf_buffers: ClassVar[tuple[str, ...]] = ("attn.bias", "attn.masked_bias")
    hf_transposed: ClassVar[tuple[str, ...]] = ("qkv.weight", "out.weight", "up.weight", "down.weight")
    hf_fixed: ClassVar[Mapping[str, Any]] = {
        "activation_function": "gelu_new",
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    }
    config: GPT2Config

    def __init__(self, config: GPT2Config, vocab_size: int) -> None:
        super().__init__(config, vocab_size)
        self.embed = nn.Embedding(vocab_size, config.dim)
        self.places = nn.Embedding(config.context, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.head = Head(config.dim, vocab_size)
        self.tie()

    def forward(
        self, tokens: Tensor, positions: Tensor, segments: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        mask = visible(positions, segments, cache.length if cache is not None else None)
        x = self.embed(tokens) + self.places(positions)
        for layer in range(len(self.blocks)):
            x = self.block(layer, x, mask, positions, cache=cache)
        return self.norm(x)

    def init_weights(self, seed: int) -> None:
        self.tie()
        draw_weights(self, seed, self.config.init_std, self.config.layers, ("out.weight", "down.weight"))

    def flops_per_token(self, context: int) -> float:
        matrices = sum(p.numel() for p in self.blocks.parameters() if p.dim() > 1) + self.head.weight.numel()
        return 6 * matrices + 12 * self.config.layers * self.config.dim * mean_seen(context, 0)

    def new_cache(self, rows: int, length: int) -> KVCache:
        c, weight = self.config, self.embed.weight
        return KVCache(c.layers, rows, c.heads, length, c.dim // c.heads, device=weight.device, dtype=weight.dtype)

    def hf_names(self) -> dict[str, str]:
        names = {"embed.weight": "wte.weight", "places.weight": "wpe.weight"}
        names |= {f"norm.{kind}": f"ln_f.{kind}" for kind in ("weight", "bias")}
        for i in range(self.config.layers):
            for ours, theirs in PARTS.items():
                names |= {f"blocks.{i}.{ours}.{kind}": f"h.{i}.{theirs}.{kind}" for kind in ("weight", "bias")}
        names = {ours: f"{self.hf_prefix}{theirs}" for ours, theirs in names.items()}
        return names if self.config.tied else names | {"head.weight": "lm_head.weight"}

    @classmethod
    def settings_from_hf(cls, config: Reader) -> dict[str, Any]:
        config.require(**cls.hf_fixed)
        dim = config.count("n_embd")
        config.require(n_inner=4 * dim)
        return {
            "dim": dim,
            "layers": config.count("n_layer"),
            "heads": config.count("n_head"),
            "context": config.count("n_positions"),
            "norm_eps": config.get("layer_norm_epsilon", 1e-5),
            "tied": config.get("tie_word_embeddings", True),
        }

    def hf_config(self) -> dict[str, Any]:
        c = self.config
        return {
            "architectures": [self.hf_class],
            "n_embd": c.dim,
            "n_layer": c.layers,
            "n_head": c.heads,
            "n_positions": c.context,
            "layer_norm_epsilon": c.norm_eps,
            "tie_word_embeddings": c.tied,
            "initializer_range": c.init_std,
            "vocab_size": self.vocab_size,
            **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0),
            **self.hf_fixed,
        }
