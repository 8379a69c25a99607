"""Llama: RMSNorm, rotary positions, grouped queries, SwiGLU (Touvron et al. 2023, https://arxiv.org/abs/2302.13971)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trivium.models.attention import Attention, rope_angles, visible
from trivium.models.cache import KVCache
from trivium.models.config import LlamaConfig
from trivium.models.layers import SwiGLU
from trivium.models.protocol import CausalLM


class Block(nn.Module):
    """x + attention(norm x), then x + ffn(norm x)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.attn_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.attn = Attention(config.dim, config.heads, config.kv_heads)
        self.ffn_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.ffn = SwiGLU(config.dim, config.ffn_dim)
        self.dropout = config.dropout

    def forward(
        self,
        x: Tensor,
        angles: tuple[Tensor, Tensor],
        mask: Tensor | None,
        positions: Tensor,
        layer: int = 0,
        cache: KVCache | None = None,
    ) -> Tensor:
        """(B, T, C) -> (B, T, C). layer: its number, under which the cache knows it."""
        attended = self.attn(self.attn_norm(x), angles, mask, positions, layer, cache)
        x = x + F.dropout(attended, self.dropout, self.training)
        return x + F.dropout(self.ffn(self.ffn_norm(x)), self.dropout, self.training)


class Llama(CausalLM):
    """The Llama family; weights and logits equal Hugging Face's to rounding (tests/equivalence)."""

    supports_packing: ClassVar[bool] = True
    tensor_plan: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("attn.q", "attn.k", "attn.v", "ffn.gate", "ffn.up"), "columns"),
        **dict.fromkeys(("attn.out", "ffn.down"), "rows"),
    }
    """Whole heads to each process (Shoeybi et al. 2019, https://arxiv.org/abs/1909.08053, section 3)."""

    def __init__(self, config: LlamaConfig, vocab_size: int) -> None:
        super().__init__(config, vocab_size)
        self.embed = nn.Embedding(vocab_size, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.head = nn.Linear(config.dim, vocab_size, bias=False)
        if config.tied:
            self.head.weight = self.embed.weight

    def forward(
        self, tokens: Tensor, positions: Tensor, segments: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        angles = rope_angles(positions, self.config.dim // self.config.heads, self.config.rope_theta)
        mask = visible(positions, segments, cache.length if cache is not None else None)
        x = self.embed(tokens)
        for layer in range(len(self.blocks)):
            x = self.block(layer, x, angles, mask, positions, cache=cache)
        return self.norm(x)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        if self.config.tied:
            self.head.weight = self.embed.weight  # again: `to_empty` after construction on meta gives each its own
        generator = torch.Generator().manual_seed(seed)
        residual = self.config.init_std / (2 * self.config.layers) ** 0.5  # GPT-2's scaling of the residual branches
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                std = residual if name.endswith(("attn.out.weight", "ffn.down.weight")) else self.config.init_std
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)

    def flops_per_token(self, context: int) -> float:
        matrices = sum(p.numel() for p in self.blocks.parameters() if p.dim() > 1) + self.head.weight.numel()
        return 6 * matrices + 12 * self.config.layers * self.config.dim * context / 2

    def new_cache(self, rows: int, length: int) -> KVCache:
        c, weight = self.config, self.embed.weight
        return KVCache(c.layers, rows, c.kv_heads, length, c.dim // c.heads, device=weight.device, dtype=weight.dtype)

    def hf_names(self) -> dict[str, str]:
        parts = {
            "attn_norm": "input_layernorm",
            "attn.q": "self_attn.q_proj",
            "attn.k": "self_attn.k_proj",
            "attn.v": "self_attn.v_proj",
            "attn.out": "self_attn.o_proj",
            "ffn_norm": "post_attention_layernorm",
            "ffn.gate": "mlp.gate_proj",
            "ffn.up": "mlp.up_proj",
            "ffn.down": "mlp.down_proj",
        }
        names = {"embed.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight"}
        for i in range(self.config.layers):
            names |= {f"blocks.{i}.{ours}.weight": f"model.layers.{i}.{hf}.weight" for ours, hf in parts.items()}
        return names if self.config.tied else names | {"head.weight": "lm_head.weight"}
