"""Settings of the inference backends. No torch here."""

from __future__ import annotations

from dataclasses import dataclass, field

from trivium.errors import ConfigError


@dataclass(frozen=True)
class SamplingConfig:
    """How tokens are drawn unless a request says otherwise."""

    temperature: float = 0.0  # 0 is greedy; 1 samples the model's own distribution
    top_k: int = 0  # keep the k likeliest tokens; 0 keeps all
    top_p: float = 1.0  # keep the likeliest tokens that together reach this probability
    max_tokens: int = 64  # longest answer
    seed: int = 0  # equal seeds give equal answers, whatever else is in the batch

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ConfigError(f"inference.sampling.temperature={self.temperature} must not be negative")
        if self.top_k < 0:
            raise ConfigError(f"inference.sampling.top_k={self.top_k} must not be negative")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"inference.sampling.top_p={self.top_p} must be more than 0 and at most 1")
        if self.max_tokens <= 0:
            raise ConfigError(f"inference.sampling.max_tokens={self.max_tokens} must be greater than 0")


@dataclass(frozen=True)
class BackendConfig:
    """What every backend can be told."""

    sampling: SamplingConfig = field(default_factory=SamplingConfig)


@dataclass(frozen=True)
class NativeConfig(BackendConfig):
    """Our own engine: batched, ragged, cached, on the weights that are being trained."""

    max_batch: int = 64  # rows decoded together; more is faster a token and takes more cache memory

    def __post_init__(self) -> None:
        if self.max_batch <= 0:
            raise ConfigError(f"inference.max_batch={self.max_batch} must be greater than 0")
