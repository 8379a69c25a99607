"""Qwen3's mixtures: a Qwen3 with many narrow experts (https://arxiv.org/abs/2505.09388, section 2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from trivium.models.config import Qwen3MoeConfig
from trivium.models.experts import Sparse, SparseFFN
from trivium.models.huggingface import Reader
from trivium.models.llama import Block
from trivium.models.qwen3 import Qwen3


class Qwen3Moe(Sparse, Qwen3):
    """Every layer has experts: checkpoints with dense layers among them are refused; none that is published has any."""

    hf_block: ClassVar[Mapping[str, str]] = {
        **{ours: theirs for ours, theirs in Qwen3.hf_block.items() if not ours.startswith("ffn.")},
        "ffn.router.weight": "mlp.gate.weight",
    }
    hf_expert: ClassVar[Mapping[str, str]] = {
        part: f"mlp.experts.{{}}.{part}_proj.weight" for part in ("gate", "up", "down")
    }
    hf_class: ClassVar[str] = "Qwen3MoeForCausalLM"
    hf_fixed: ClassVar[Mapping[str, Any]] = {**Qwen3.hf_fixed, "decoder_sparse_step": 1, "mlp_only_layers": []}
    config: Qwen3MoeConfig

    def make_block(self) -> nn.Module:
        c = self.config
        ffn = SparseFFN(c.dim, c.ffn_dim, c.experts, c.active, c.renormalise)
        return Block(c, {"norm_eps": c.norm_eps}, ffn)

    @classmethod
    def settings_from_hf(cls, config: Reader) -> dict[str, Any]:
        return {
            **super().settings_from_hf(config),
            "ffn_dim": config.count("moe_intermediate_size"),
            "renormalise": config.get("norm_topk_prob", False),
        }

    def hf_config(self) -> dict[str, Any]:
        width = {"moe_intermediate_size": self.config.ffn_dim}
        return {**super().hf_config(), **width, "norm_topk_prob": self.config.renormalise}
