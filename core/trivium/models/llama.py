"""Llama: RMSNorm, rotary positions, grouped queries, SwiGLU (Touvron et al. 2023, https://arxiv.org/abs/2302.13971).

Mistral, Mixtral, Qwen2, Qwen3 and Gemma 2 are this model with other parts, each in a file of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from trivium.models.attention import Attention, additive, mean_seen, visible
from trivium.models.cache import KVCache
from trivium.models.config import LlamaConfig
from trivium.models.huggingface import Reader, rope_scaling_of, rope_settings
from trivium.models.layers import GatedFFN, Head, RMSNorm, direct, draw_weights
from trivium.models.protocol import CausalLM
from trivium.models.rope import rope_angles


class Block(nn.Module):
    """x + attention(norm x), then x + ffn(norm x). flat: takes (B, C) of one token a row as well."""

    flat: ClassVar[bool] = True

    def __init__(self, config: LlamaConfig, attention: Mapping[str, Any], ffn: nn.Module | None = None) -> None:
        """attention: options of Attention that the family has. ffn: in place of a gated feed-forward layer."""
        super().__init__()
        self.attn_norm = RMSNorm(config.dim, eps=config.norm_eps)
        self.attn = Attention(config.dim, config.heads, config.kv_heads, config.head_width, **attention)
        self.ffn_norm = RMSNorm(config.dim, eps=config.norm_eps)
        self.ffn = GatedFFN(config.dim, config.ffn_dim) if ffn is None else ffn
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
        """(B, T, C) -> (B, T, C), or (B, C) of one token a row. layer: its number, under which the cache knows it."""
        attended = self.attn(self.attn_norm(x), angles, mask, positions, layer, cache)
        x = x + (F.dropout(attended, self.dropout) if self.training else attended)
        said = self.ffn(self.ffn_norm(x))
        return x + (F.dropout(said, self.dropout) if self.training else said)


class Llama(CausalLM):
    """The Llama family; weights and logits equal Hugging Face's to rounding (tests/equivalence)."""

    supports_packing: ClassVar[bool] = True
    mixes: ClassVar[bool] = True
    tensor_plan: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("attn.q", "attn.k", "attn.v", "ffn.gate", "ffn.up"), "columns"),
        **dict.fromkeys(("attn.out", "ffn.down"), "rows"),
    }
    """Whole heads to each process (Shoeybi et al. 2019, https://arxiv.org/abs/1909.08053, section 3)."""

    hf_block: ClassVar[Mapping[str, str]] = {
        "attn_norm.weight": "input_layernorm.weight",
        "attn.q.weight": "self_attn.q_proj.weight",
        "attn.k.weight": "self_attn.k_proj.weight",
        "attn.v.weight": "self_attn.v_proj.weight",
        "attn.out.weight": "self_attn.o_proj.weight",
        "ffn_norm.weight": "post_attention_layernorm.weight",
        "ffn.gate.weight": "mlp.gate_proj.weight",
        "ffn.up.weight": "mlp.up_proj.weight",
        "ffn.down.weight": "mlp.down_proj.weight",
    }
    """Names within a block: ours -> Hugging Face's."""
    hf_class: ClassVar[str] = "LlamaForCausalLM"
    hf_fixed: ClassVar[Mapping[str, Any]] = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
    config: LlamaConfig

    def __init__(self, config: LlamaConfig, vocab_size: int) -> None:
        super().__init__(config, vocab_size)
        self.embed = nn.Embedding(vocab_size, config.dim)
        self.blocks = nn.ModuleList(self.make_block() for _ in range(config.layers))
        self.norm = self.make_norm()
        self.head = self.make_head()
        self.tie()

    def make_block(self) -> nn.Module:
        """One block of the family."""
        return Block(self.config, {})

    def make_norm(self) -> nn.Module:
        """The last norm."""
        return RMSNorm(self.config.dim, eps=self.config.norm_eps)

    def make_head(self) -> Head:
        """Hidden states to logits."""
        return Head(self.config.dim, self.vocab_size)

    @property
    def windows(self) -> Sequence[int]:
        """How many tokens a token of each layer sees; 0 is all before it."""
        return [0] * self.config.layers

    def embedded(self, tokens: Tensor) -> Tensor:
        """(B, T) -> (B, T, C), what the first block gets."""
        return self.embed(tokens)

    def forward(
        self, tokens: Tensor, positions: Tensor, segments: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        c, slots = self.config, cache.length if cache is not None else None
        angles = rope_angles(positions, c.head_width, c.rope_theta, c.rope_scaling, c.context)
        x = self.embedded(tokens)
        masks = {window: visible(positions, segments, slots, window) for window in set(self.windows)}
        single = False
        if cache is not None and direct(x):
            masks = {window: additive(mask, cache.dtype) for window, mask in masks.items() if mask is not None}
            ours = type(self).block is CausalLM.block and getattr(self.blocks[0], "flat", False)
            single = ours and x.shape[1] == 1  # others' code may count on three dimensions
            x = x[:, 0] if single else x
        for layer, window in zip(range(len(self.blocks)), self.windows, strict=False):
            x = self.block(layer, x, angles, masks[window], positions, cache=cache)
        return self.norm(x[:, None] if single else x)

    def init_weights(self, seed: int) -> None:
        self.tie()
        draw_weights(self, seed, self.config.init_std, self.config.layers, (".out.weight", ".down.weight"))

    def flops_per_token(self, context: int) -> float:
        c = self.config
        matrices = sum(p.numel() for p in self.blocks.parameters() if p.dim() > 1) + self.head.weight.numel()
        return 6 * matrices + 12 * c.heads * c.head_width * sum(mean_seen(context, w) for w in self.windows)

    def new_cache(self, rows: int, length: int) -> KVCache:
        c, weight = self.config, self.embed.weight
        return KVCache(c.layers, rows, c.kv_heads, length, c.head_width, device=weight.device, dtype=weight.dtype)

    def hf_names(self) -> dict[str, str]:
        names = {"embed.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight"}
        for i in range(self.config.layers):
            names |= {f"blocks.{i}.{ours}": f"model.layers.{i}.{theirs}" for ours, theirs in self.hf_block.items()}
        return names if self.config.tied else names | {"head.weight": "lm_head.weight"}

    @classmethod
    def settings_from_hf(cls, config: Reader) -> dict[str, Any]:
        config.require(**cls.hf_fixed)
        heads = config.count("num_attention_heads")
        context = config.count("max_position_embeddings")
        found = {
            "dim": config.count("hidden_size"),
            "layers": config.count("num_hidden_layers"),
            "heads": heads,
            "head_dim": config.get("head_dim", 0) or 0,
            "kv_heads": config.get("num_key_value_heads", heads),
            "ffn_dim": config.count("intermediate_size"),
            "context": context,
            "norm_eps": config.get("rms_norm_eps"),
            "tied": config.get("tie_word_embeddings", False),
            **rope_settings(config, context),
        }
        if found["head_dim"] * heads == found["dim"]:
            found["head_dim"] = 0
        return found

    def hf_config(self) -> dict[str, Any]:
        c = self.config
        return {
            "architectures": [self.hf_class],
            "hidden_size": c.dim,
            "num_hidden_layers": c.layers,
            "num_attention_heads": c.heads,
            "head_dim": c.head_width,
            "num_key_value_heads": c.kv_heads,
            "intermediate_size": c.ffn_dim,
            "max_position_embeddings": c.context,
            "rms_norm_eps": c.norm_eps,
            "tie_word_embeddings": c.tied,
            "rope_theta": c.rope_theta,
            "rope_scaling": rope_scaling_of(c.rope_scaling, c.context),
            "initializer_range": c.init_std,
            "vocab_size": self.vocab_size,
            "attention_dropout": 0.0,
            **self.hf_fixed,
        }
