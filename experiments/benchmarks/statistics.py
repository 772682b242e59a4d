"""Intervals for small numbers of seeds: the bootstrap, and the interquartile mean.

Over several tasks the bootstrap is stratified: seeds are drawn anew within each task. Comparisons
are paired by seed: both methods are resampled alike, so what they share (initialisation, stream,
luck) cancels. Percentile intervals; ten seeds is the least that supports a sentence of the form
"A beats B" (Agarwal et al. 2021, arXiv 2108.13264).
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

RESAMPLES = 2000
Statistic = Callable[[np.ndarray], np.ndarray]  # over the last axis


class Interval(NamedTuple):
    """An estimate and the ends of its interval."""

    value: float
    low: float
    high: float


def shown(row: Mapping[str, float], spec: str = "+.3f") -> str:
    """The fields of an Interval as text, each number by a format; by default a difference's."""
    found = Interval(**row)
    return f"{found.value:{spec}} [{found.low:{spec}}, {found.high:{spec}}]"


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
    return _interval(float(statistic(values)), draws, level)


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


# ---- several tasks -----------------------------------------------------------------------------
def stratified_bootstrap(
    values: np.ndarray,
    rng: np.random.Generator,
    statistic: Statistic = iqm,
    level: float = 0.95,
    resamples: int = RESAMPLES,
) -> Interval:
    """Percentile interval of a statistic over all of (seeds, tasks); seeds drawn within a task."""
    values = _table("stratified_bootstrap", values)
    draws = statistic(_pooled(values, _places(values, rng, resamples)))
    return _interval(float(statistic(values.ravel())), draws, level)


def paired_stratified(
    a: np.ndarray,
    b: np.ndarray,
    rng: np.random.Generator,
    statistic: Statistic = iqm,
    level: float = 0.95,
    resamples: int = RESAMPLES,
) -> Interval:
    """Interval of `statistic(a) - statistic(b)` over (seeds, tasks), drawn alike for both.

    a[i, j] and b[i, j] are of one seed on one task.
    """
    a, b = _table("paired_stratified", a), _table("paired_stratified", b)
    if a.shape != b.shape:
        raise ValueError(f"paired_stratified: {a.shape} and {b.shape} values are not pairs")
    places = _places(a, rng, resamples)
    draws = statistic(_pooled(a, places)) - statistic(_pooled(b, places))
    return _interval(float(statistic(a.ravel()) - statistic(b.ravel())), draws, level)


def improvement(a: np.ndarray, b: np.ndarray) -> float:
    """Probability that a seed of `a` beats a seed of `b`: (seeds, tasks) each, mean over tasks.

    All pairs of seeds are compared and a tie counts half: the Mann-Whitney statistic.
    """
    a, b = _table("improvement", a), _table("improvement", b)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"improvement: {a.shape[1]} tasks of one and {b.shape[1]} of the other")
    return float(_wins(a, b).mean())


def probability_of_improvement(
    a: np.ndarray,
    b: np.ndarray,
    rng: np.random.Generator,
    level: float = 0.95,
    resamples: int = RESAMPLES,
) -> Interval:
    """`improvement` with its interval; the seeds of `a` and `b` are drawn apart (no pairs)."""
    value = improvement(a, b)
    a, b = _table("improvement", a), _table("improvement", b)
    wins = _wins(a, b)
    tasks, draws = np.arange(a.shape[1]), np.empty(resamples)
    for i in range(resamples):
        ours = rng.integers(0, len(a), a.shape)
        theirs = rng.integers(0, len(b), b.shape)
        draws[i] = wins[ours[:, None], theirs[None], tasks].mean()
    return _interval(value, draws, level)


def to_rliable(scores: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Scores by method, (seeds, tasks), as `rliable` takes them: float64 and one set of tasks."""
    found = {name: _table(f"to_rliable: {name!r}", values) for name, values in scores.items()}
    if len({values.shape[1] for values in found.values()}) > 1:
        shapes = {name: values.shape for name, values in found.items()}
        raise ValueError(f"to_rliable: methods differ in their tasks, (seeds, tasks): {shapes}")
    return found


def _table(name: str, values: np.ndarray) -> np.ndarray:
    """Values as (seeds, tasks), refused where they are not."""
    values = np.asarray(values, np.float64)
    if values.ndim != 2 or not values.size:
        raise ValueError(f"{name}: (seeds, tasks) values are needed, got shape {values.shape}")
    return values


def _places(values: np.ndarray, rng: np.random.Generator, resamples: int) -> np.ndarray:
    """Seeds drawn anew for each task (resamples, seeds, tasks)."""
    return rng.integers(0, len(values), (resamples, *values.shape))


def _pooled(values: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Drawn values, seeds and tasks in one axis (resamples, seeds * tasks)."""
    return np.take_along_axis(values[None], places, 1).reshape(len(places), -1)


def _wins(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """1, 0.5 or 0 by pair of seeds and task (seeds of a, seeds of b, tasks)."""
    return (1.0 + np.sign(a[:, None] - b[None])) / 2


def _interval(value: float, draws: np.ndarray, level: float) -> Interval:
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high))
