"""Intervals for small numbers of seeds: the bootstrap, and the interquartile mean.

Comparisons are paired by seed: what is resampled is the difference, so what two methods share
(initialisation, stream, luck) cancels. Percentile intervals; ten seeds is the least that supports a
sentence of the form "A beats B" (Agarwal et al. 2021, arXiv 2108.13264).
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

RESAMPLES = 2000
Statistic = Callable[[np.ndarray], np.ndarray]  # over the last axis


class Interval(NamedTuple):
    """An estimate and the ends of its interval."""

    value: float
    low: float
    high: float


def mean(values: np.ndarray) -> np.ndarray:
    """Mean over the last axis."""
    return values.mean(-1)


def iqm(values: np.ndarray) -> np.ndarray:
    """Interquartile mean over the last axis: the mean of the middle half.

    A quarter of the total weight is cut at each end; where that cuts through a value, the value
    counts in part, so the result changes smoothly with the number of values.
    """
    count = values.shape[-1]
    places = np.arange(count)
    kept = np.minimum(places + 1, 0.75 * count) - np.maximum(places, 0.25 * count)
    return np.sort(values, -1) @ kept.clip(0.0) / (0.5 * count)


def bootstrap(
    values: np.ndarray,
    rng: np.random.Generator,
    statistic: Statistic = mean,
    level: float = 0.95,
    resamples: int = RESAMPLES,
) -> Interval:
    """Percentile interval of a statistic of one value a seed, (n,)."""
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"bootstrap: one value a seed is needed, got shape {values.shape}")
    draws = statistic(rng.choice(values, (resamples, len(values))))
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(statistic(values)), float(low), float(high))


def paired_bootstrap(
    a: np.ndarray,
    b: np.ndarray,
    rng: np.random.Generator,
    statistic: Statistic = mean,
    level: float = 0.95,
    resamples: int = RESAMPLES,
) -> Interval:
    """Interval of a statistic of `a - b`, (n,) each, where a[i] and b[i] are of one seed."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape:
        raise ValueError(f"paired_bootstrap: {len(a)} and {len(b)} values are not pairs")
    return bootstrap(a - b, rng, statistic, level, resamples)
