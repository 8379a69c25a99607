"""Mixtral: a Mistral whose feed-forward layers are experts (Jiang et al. 2024, https://arxiv.org/abs/2401.04088)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from trivium.models.config import MixtralConfig
from trivium.models.experts import Sparse, SparseFFN
from trivium.models.huggingface import Reader
from trivium.models.llama import Block, Llama
from trivium.models.mistral import Mistral


class Mixtral(Sparse, Mistral):
    """The weights of a token's experts are the softmax over these experts (section 2.1)."""

    hf_block: ClassVar[Mapping[str, str]] = {
        **{ours: theirs for ours, theirs in Llama.hf_block.items() if not ours.startswith("ffn.")},
        "ffn.router.weight": "block_sparse_moe.gate.weight",
    }
    hf_expert: ClassVar[Mapping[str, str]] = {
        "gate": "block_sparse_moe.experts.{}.w1.weight",
        "up": "block_sparse_moe.experts.{}.w3.weight",
        "down": "block_sparse_moe.experts.{}.w2.weight",
    }
    hf_experts: ClassVar[str] = "num_local_experts"
    hf_class: ClassVar[str] = "MixtralForCausalLM"
    hf_fixed: ClassVar[Mapping[str, Any]] = {"hidden_act": "silu", "router_jitter_noise": 0.0}
    config: MixtralConfig

    def make_block(self) -> nn.Module:
        c = self.config
        return Block(c, {}, SparseFFN(c.dim, c.ffn_dim, c.experts, c.active))

    @classmethod
    def settings_from_hf(cls, config: Reader) -> dict[str, Any]:
        return {**super().settings_from_hf(config), "window": config.switch("sliding_window", 0)}
