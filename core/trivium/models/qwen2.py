"""Qwen2 and Qwen2.5: a Llama with biases on queries, keys and values (https://arxiv.org/abs/2407.10671)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from trivium.models.llama import Block, Llama


class Qwen2(Llama):
    """Checkpoints with a sliding window (use_sliding_window) are refused: none of the published ones uses it."""

    tensor_plan: ClassVar[Mapping[str, str]] = {}  # biases are not shared out yet
    hf_block: ClassVar[Mapping[str, str]] = {
        **Llama.hf_block,
        **{f"attn.{x}.bias": f"self_attn.{x}_proj.bias" for x in "qkv"},
    }
    hf_class: ClassVar[str] = "Qwen2ForCausalLM"
    hf_fixed: ClassVar[Mapping[str, Any]] = {"hidden_act": "silu", "use_sliding_window": False}

    def make_block(self) -> nn.Module:
        return Block(self.config, {"bias": True})
