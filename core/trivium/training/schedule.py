"""Learning-rate schedules: pure functions of the step, so a resume has nothing to restore.

Each returns the factor on the peak rate for optimizer step `step` (0-based) of `max_steps`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from trivium.training.config import ConstantConfig, ScheduleConfig, WSDConfig

Schedule = Callable[[int], float]


def composite(config: ScheduleConfig, max_steps: int, shape: Callable[[float], float]) -> Schedule:
    """Linear warmup joined to `shape`, a function from progress after the warmup (0..1) to a factor."""
    warmup = round(config.warmup * max_steps)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return shape(min(1.0, (step - warmup) / max(1, max_steps - 1 - warmup)))

    return factor


def cosine(config: ScheduleConfig, max_steps: int) -> Schedule:
    """Half a cosine from the peak to `final` (Loshchilov and Hutter 2017, https://arxiv.org/abs/1608.03983)."""
    return composite(config, max_steps, lambda p: config.final + (1 - config.final) * (1 + math.cos(math.pi * p)) / 2)


def linear(config: ScheduleConfig, max_steps: int) -> Schedule:
    """A straight line from the peak to `final`."""
    return composite(config, max_steps, lambda p: 1 - (1 - config.final) * p)


def constant(config: ConstantConfig, max_steps: int) -> Schedule:
    """The peak to the end."""
    return composite(config, max_steps, lambda p: config.final)


def wsd(config: WSDConfig, max_steps: int) -> Schedule:
    """The peak until the last `decay` of all steps, then a straight line to `final` (https://arxiv.org/abs/2404.06395)."""
    stable = 1 - config.decay / (1 - config.warmup)
    return composite(config, max_steps, lambda p: 1 - (1 - config.final) * max(0.0, (p - stable) / (1 - stable)))
