"""Settings of optimizers and schedules. No torch here."""

from __future__ import annotations

from dataclasses import dataclass

from trivium.errors import ConfigError


@dataclass(frozen=True)
class AdamWConfig:
    """AdamW (Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101)."""

    lr: float = 1e-3  # peak learning rate; the schedule multiplies it
    weight_decay: float = 0.1  # on matrices only, never on norms, biases or scalars
    beta1: float = 0.9
    beta2: float = 0.95  # smaller forgets faster: steadier on small batches of text
    eps: float = 1e-8

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ConfigError(f"optim.lr={self.lr} must be greater than 0")
        if self.weight_decay < 0:
            raise ConfigError(f"optim.weight_decay={self.weight_decay} must not be negative")
        if self.eps <= 0:
            raise ConfigError(f"optim.eps={self.eps} must be greater than 0")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"optim.{name}={getattr(self, name)} must be at least 0 and less than 1")


@dataclass(frozen=True)
class ScheduleConfig:
    """What every schedule has: a linear warmup, then a shape that ends at `final` of the peak."""

    warmup: float = 0.05  # share of the steps spent rising from 0 to the peak
    final: float = 0.1  # share of the peak left at the last step

    def __post_init__(self) -> None:
        if not 0 <= self.warmup < 1:
            raise ConfigError(f"schedule.warmup={self.warmup} is a share of the steps: at least 0 and less than 1")
        if not 0 <= self.final <= 1:
            raise ConfigError(f"schedule.final={self.final} is a share of the peak: between 0 and 1")


@dataclass(frozen=True)
class ConstantConfig(ScheduleConfig):
    """Warmup, then the peak to the end."""

    final: float = 1.0


@dataclass(frozen=True)
class WSDConfig(ScheduleConfig):
    """Warmup, stable, decay (MiniCPM, https://arxiv.org/abs/2404.06395)."""

    decay: float = 0.2  # share of the steps, at the end, over which the rate falls linearly

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.decay <= 1 - self.warmup:
            raise ConfigError(f"schedule.decay={self.decay} must be more than 0 and fit beside warmup={self.warmup}")
