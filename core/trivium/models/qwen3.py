"""Qwen3: a Llama whose heads norm their queries and keys (https://arxiv.org/abs/2505.09388, section 2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from trivium.models.llama import Block, Llama


class Qwen3(Llama):
    """Head width is a setting of its own, 128 in all published sizes."""

    tensor_plan: ClassVar[Mapping[str, str]] = {}  # the norms of heads are not shared out yet
    hf_block: ClassVar[Mapping[str, str]] = {
        **Llama.hf_block,
        "attn.q_norm.weight": "self_attn.q_norm.weight",
        "attn.k_norm.weight": "self_attn.k_norm.weight",
    }
    hf_class: ClassVar[str] = "Qwen3ForCausalLM"
    hf_fixed: ClassVar[Mapping[str, Any]] = {
        "hidden_act": "silu",
        "attention_bias": False,
        "use_sliding_window": False,
    }

    def make_block(self) -> nn.Module:
        return Block(self.config, {"norm_eps": self.config.norm_eps})
