"""Gemma 2: norms after each branch too, capped scores and logits, every second layer with a window, scaled embeddings
(Gemma Team 2024, https://arxiv.org/abs/2408.00118, section 2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trivium.errors import CheckpointError
from trivium.models.attention import Attention
from trivium.models.cache import KVCache
from trivium.models.config import Gemma2Config
from trivium.models.huggingface import Reader
from trivium.models.layers import GatedFFN, Head
from trivium.models.llama import Llama


class OffsetNorm(nn.Module):
    """RMSNorm whose weight is kept as its difference from one, computed in fp32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.zeros(dim)), eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        wide = torch.promote_types(x.dtype, torch.float32)
        return F.rms_norm(x.to(wide), self.weight.shape, 1 + self.weight.to(wide), self.eps).to(x.dtype)


class Block(nn.Module):
    """x + norm(attention(norm x)), then x + norm(ffn(norm x))."""

    flat: ClassVar[bool] = True

    def __init__(self, config: Gemma2Config) -> None:
        super().__init__()
        self.attn_norm, self.attn_post_norm = (OffsetNorm(config.dim, config.norm_eps) for _ in range(2))
        self.ffn_norm, self.ffn_post_norm = (OffsetNorm(config.dim, config.norm_eps) for _ in range(2))
        self.attn = Attention(
            config.dim,
            config.heads,
            config.kv_heads,
            config.head_width,
            scale=config.query_scale**-0.5,
            cap=config.attention_cap,
        )
        self.ffn = GatedFFN(config.dim, config.ffn_dim, "gelu_tanh")
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
        attended = self.attn_post_norm(self.attn(self.attn_norm(x), angles, mask, positions, layer, cache))
        x = x + F.dropout(attended, self.dropout, self.training)
        return x + F.dropout(self.ffn_post_norm(self.ffn(self.ffn_norm(x))), self.dropout, self.training)


class Gemma2(Llama):
    """The head shares the embedding's weight in every published size."""

    tensor_plan: ClassVar[Mapping[str, str]] = {}  # norms after a branch need its sum; not shared out yet
    hf_block: ClassVar[Mapping[str, str]] = {
        **Llama.hf_block,
        "attn_post_norm.weight": "post_attention_layernorm.weight",
        "ffn_norm.weight": "pre_feedforward_layernorm.weight",
        "ffn_post_norm.weight": "post_feedforward_layernorm.weight",
    }
    hf_class: ClassVar[str] = "Gemma2ForCausalLM"
    hf_fixed: ClassVar[Mapping[str, Any]] = {
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "use_bidirectional_attention": False,
    }
    config: Gemma2Config

    def make_head(self) -> Head:
        return Head(self.config.dim, self.vocab_size, self.config.logit_cap)

    def make_block(self) -> nn.Module:
        return Block(self.config)

    def make_norm(self) -> nn.Module:
        return OffsetNorm(self.config.dim, self.config.norm_eps)

    @property
    def windows(self) -> Sequence[int]:
        return [0 if layer % 2 else self.config.window for layer in range(self.config.layers)]

    def embedded(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        return x * torch.tensor(self.config.dim**0.5, dtype=x.dtype)  # rounded as the embedding is

    def init_weights(self, seed: int) -> None:
        super().init_weights(seed)
        for module in self.modules():
            if isinstance(module, OffsetNorm):
                nn.init.zeros_(module.weight)

    @classmethod
    def settings_from_hf(cls, config: Reader) -> dict[str, Any]:
        found = {
            **super().settings_from_hf(config),
            "tied": config.get("tie_word_embeddings", True),
            "window": config.get("sliding_window", 4096),
            "query_scale": int(config.get("query_pre_attn_scalar", 256)),
            "attention_cap": config.switch("attn_logit_softcapping", 50.0),
            "logit_cap": config.switch("final_logit_softcapping", 30.0),
        }
        pattern = ["full_attention" if i % 2 else "sliding_attention" for i in range(found["layers"])]
        if (given := config.get("layer_types", None)) not in (None, pattern):
            raise CheckpointError(f"{config.origin}: layer_types={given} is not every second layer from the first")
        return found

    def hf_config(self) -> dict[str, Any]:
        c = self.config
        return {
            **super().hf_config(),
            "sliding_window": c.window,
            "query_pre_attn_scalar": c.query_scale,
            "attn_logit_softcapping": c.attention_cap or None,
            "final_logit_softcapping": c.logit_cap or None,
        }
