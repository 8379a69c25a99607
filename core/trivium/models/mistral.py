"""Mistral: a Llama with a sliding window (Jiang et al. 2023, https://arxiv.org/abs/2310.06825, section 2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from trivium.models.config import MistralConfig
from trivium.models.huggingface import Reader
from trivium.models.llama import Llama


class Mistral(Llama):
    """Every layer sees `window` tokens; what lies before reaches a token through the layers below."""

    hf_class: ClassVar[str] = "MistralForCausalLM"
    hf_fixed: ClassVar[Mapping[str, Any]] = {"hidden_act": "silu"}
    config: MistralConfig

    @property
    def windows(self) -> Sequence[int]:
        return [self.config.window] * self.config.layers

    @classmethod
    def settings_from_hf(cls, config: Reader) -> dict[str, Any]:
        return {**super().settings_from_hf(config), "window": config.switch("sliding_window", 4096)}

    def hf_config(self) -> dict[str, Any]:
        return {**super().hf_config(), "sliding_window": self.config.window or None}
