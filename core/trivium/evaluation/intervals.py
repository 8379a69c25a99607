"""A figure with its uncertainty: percentile bootstrap (Efron 1979, https://doi.org/10.1214/aos/1176344552)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Estimate:
    """value with the bounds of its interval; count: how many things were resampled."""

    value: float
    low: float
    high: float
    count: int


def ratio_interval(
    numerators: Sequence[float], denominators: Sequence[float], *, resamples: int, confidence: float, seed: int = 0
) -> Estimate:
    """sum(numerators) / sum(denominators), resampled in pairs. A mean is the case of denominators 1.

    >>> ratio_interval([1.0, 3.0], [1, 1], resamples=100, confidence=0.95).value
    2.0
    """
    top, bottom = np.asarray(numerators, float), np.asarray(denominators, float)
    chosen = np.random.default_rng(seed).integers(0, len(top), (resamples, len(top)))
    ratios = top[chosen].sum(1) / bottom[chosen].sum(1)
    tail = (1 - confidence) / 2
    low, high = np.quantile(ratios, [tail, 1 - tail])
    return Estimate(float(top.sum() / bottom.sum()), float(low), float(high), len(top))
