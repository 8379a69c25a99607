"""Settings of the model families. No torch here: `explain`, `--help` and validation read these."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from trivium.errors import ConfigError


@dataclass(frozen=True)
class LlamaConfig:
    """Llama 1-3 shape (Touvron et al. 2023, https://arxiv.org/abs/2302.13971)."""

    runtime_fields: ClassVar[tuple[str, ...]] = ("dropout", "init_std")
    """Settings that a checkpoint's weights do not depend on: they may differ when it is loaded."""

    dim: int = 512  # width C; parameters grow with its square
    layers: int = 8  # depth L; time grows with it, width sets memory
    heads: int = 8  # query heads H; dim / heads is the head width D
    kv_heads: int = 4  # key/value heads K (Ainslie et al. 2023); fewer make the cache smaller
    ffn_dim: int = 1408  # hidden width of SwiGLU; about 8/3 of dim
    context: int = 1024  # longest sequence; a longer one is refused, never cut
    rope_theta: float = 10000.0  # base of the rotary frequencies; grow it with the context
    norm_eps: float = 1e-5
    tied: bool = True  # the head shares the embedding's weight: fewer parameters, better for small models
    dropout: float = 0.0  # on the residual branches; 0 where data is seen about once
    init_std: float = 0.02  # of every matrix; branches that end in the residual get init_std / sqrt(2 L)

    def __post_init__(self) -> None:
        for name in ("dim", "layers", "heads", "kv_heads", "ffn_dim", "context"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"model.{name}={getattr(self, name)} must be greater than 0")
        if self.dim % self.heads or (self.dim // self.heads) % 2:
            raise ConfigError(
                f"model.dim={self.dim} / model.heads={self.heads} must be an even whole number (RoPE pairs)"
            )
        if self.heads % self.kv_heads:
            raise ConfigError(f"model.heads={self.heads} must be a multiple of model.kv_heads={self.kv_heads}")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"model.dropout={self.dropout} must be at least 0 and less than 1")
