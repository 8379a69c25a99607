"""Learning-rate schedules: pure functions of the step, so a resume has nothing to restore.

Each returns the factor on the peak rate for optimizer step `step` (0-based) of `max_steps`.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable

from trivium.errors import ConfigError
from trivium.training.config import (
    ConstantConfig,
    CyclicConfig,
    InverseSqrtConfig,
    ScheduleConfig,
    WSDConfig,
)

Schedule = Callable[[int], float]


def warmup_of(config: ScheduleConfig, max_steps: int) -> int:
    """Steps of warmup. Raises ConfigError if nothing would be left after them."""
    if config.warmup_steps >= max_steps:
        raise ConfigError(
            f"schedule.warmup_steps={config.warmup_steps} leaves nothing of trainer.max_steps={max_steps}"
        )
    return config.warmup_steps or round(config.warmup * max_steps)


def after_warmup(warmup: int, shape: Callable[[int], float]) -> Schedule:
    """Linear warmup joined to `shape`, a function from steps since the warmup to a factor.

    >>> [after_warmup(2, lambda since: 1 / (1 + since))(step) for step in range(4)]
    [0.5, 1.0, 1.0, 0.5]
    """
    return lambda step: (step + 1) / warmup if step < warmup else shape(step - warmup)


def composite(config: ScheduleConfig, max_steps: int, shape: Callable[[float], float]) -> Schedule:
    """Linear warmup joined to `shape`, a function from progress after the warmup (0..1) to a factor."""
    warmup = warmup_of(config, max_steps)
    last = max(1, max_steps - 1 - warmup)
    return after_warmup(warmup, lambda since: shape(min(1.0, since / last)))


def half_cosine(final: float, progress: float) -> float:
    """From 1 to `final` along half a cosine."""
    return final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2


def cosine(config: ScheduleConfig, max_steps: int) -> Schedule:
    """Half a cosine from the peak to `final` (Loshchilov and Hutter 2017, https://arxiv.org/abs/1608.03983)."""
    return composite(config, max_steps, lambda p: half_cosine(config.final, p))


def linear(config: ScheduleConfig, max_steps: int) -> Schedule:
    """A straight line from the peak to `final`."""
    return composite(config, max_steps, lambda p: 1 - (1 - config.final) * p)


def constant(config: ConstantConfig, max_steps: int) -> Schedule:
    """The peak to the end."""
    return composite(config, max_steps, lambda p: 1.0)


def wsd(config: WSDConfig, max_steps: int) -> Schedule:
    """The peak until the last `decay` of all steps, then a straight line to `final` (https://arxiv.org/abs/2404.06395)."""
    warmup = config.warmup_steps / max_steps if config.warmup_steps else config.warmup
    if config.decay > 1 - warmup:
        raise ConfigError(
            f"schedule.decay={config.decay} does not fit beside warmup_steps={config.warmup_steps} of {max_steps}"
        )
    stable = 1 - config.decay / (1 - warmup)
    return composite(config, max_steps, lambda p: 1 - (1 - config.final) * max(0.0, (p - stable) / (1 - stable)))


def inverse_sqrt(config: InverseSqrtConfig, max_steps: int) -> Schedule:
    """sqrt(timescale / (timescale + steps since the warmup)), but not below `final`.

    With the warmup's length as timescale that is Vaswani et al. 2017, eq. 3 (https://arxiv.org/abs/1706.03762).
    """
    warmup = warmup_of(config, max_steps)
    timescale = config.timescale or warmup
    if not timescale:
        raise ConfigError("schedule=inverse_sqrt without a warmup needs schedule.timescale, such as 1000")
    return after_warmup(warmup, lambda since: max(config.final, math.sqrt(timescale / (timescale + since))))


def cyclic(config: CyclicConfig, max_steps: int) -> Schedule:
    """`num_cycles` half cosines from the peak to `final`, each `t_mult` times as long as the one before (SGDR)."""
    warmup = warmup_of(config, max_steps)
    lengths = [config.t_mult**i for i in range(config.num_cycles)]
    ends = [round((max_steps - warmup) * sum(lengths[: i + 1]) / sum(lengths)) for i in range(config.num_cycles)]
    starts = [0, *ends[:-1]]
    if any(end - start < 2 for start, end in zip(starts, ends, strict=True)):
        raise ConfigError(
            f"schedule.num_cycles={config.num_cycles} are too many for {max_steps - warmup} steps after the warmup: a "
            "cycle has 2 at least"
        )

    def shape(since: int) -> float:
        cycle = min(bisect_right(starts, since) - 1, config.num_cycles - 1)
        start, end = starts[cycle], ends[cycle]
        return half_cosine(config.final, min(1.0, (since - start) / (end - start - 1)))

    return after_warmup(warmup, shape)
