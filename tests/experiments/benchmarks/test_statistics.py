"""Statistics over seeds and tasks: against scipy, cases worked out by hand, and plain loops."""

from itertools import product

import numpy as np
import pytest

from experiments.benchmarks import statistics
from experiments.benchmarks.statistics import Interval, iqm, mean


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("count", [4, 8, 20, 40])
def test_iqm_is_the_trimmed_mean_of_scipy(count: int):
    trim_mean = pytest.importorskip("scipy.stats").trim_mean
    values = rng(count).normal(size=(3, count))
    assert iqm(values) == pytest.approx(trim_mean(values, 0.25, axis=1))


def test_one_task_is_the_plain_bootstrap():
    values = rng(1).normal(size=(200, 1))
    stratified = statistics.stratified_bootstrap(values, rng(2), mean)
    assert np.allclose(stratified, statistics.bootstrap(values[:, 0], rng(3)), atol=0.02)
    error = values.std() / 200**0.5
    assert stratified.high - stratified.low == pytest.approx(2 * 1.96 * error, rel=0.1)


def test_seeds_are_drawn_within_a_task():
    values = np.array([[0.0, 100.0], [1.0, 101.0]])  # tasks far apart, seeds near
    found = statistics.stratified_bootstrap(values, rng(), mean)
    assert found == (50.5, 50.0, 51.0)  # every draw holds each task as often
    # its spread is that of independent tasks: of the four draws of two seeds each, means of
    # 0, .5, .5, 1 a task, so the variance over the mean of two tasks is 1/8 / 2
    draws = [statistics.stratified_bootstrap(values, rng(i), mean, 0.5, 1).low for i in range(400)]
    assert np.var(draws) == pytest.approx(1 / 16, rel=0.2)


def test_the_iqm_is_over_seeds_and_tasks_together():
    values = np.array([[1.0, 2], [3, 4], [-100, 100], [5, 6]])
    found = statistics.stratified_bootstrap(values, rng())
    assert found.value == pytest.approx((2 + 3 + 4 + 5) / 4)


def test_the_stratified_interval_covers():
    generator = rng(5)
    tasks = np.array([0.0, 10.0, -5.0])
    covered = []
    for _ in range(200):
        values = tasks + generator.normal(size=(20, 3))
        found = statistics.stratified_bootstrap(values, generator, mean, resamples=300)
        covered.append(found.low <= tasks.mean() <= found.high)
    assert 0.88 < np.mean(covered) < 0.98


def test_pairs_share_their_luck():
    generator = rng(6)
    shared = generator.normal(0, 50, (12, 3))
    better = shared + 1 + generator.normal(0, 0.1, (12, 3))
    found = statistics.paired_stratified(better, shared, rng(), mean)
    assert 0.9 < found.low < 1.0 < found.high < 1.1
    assert found.value == pytest.approx((better - shared).mean())
    broken = statistics.paired_stratified(better, shared[::-1], rng(), mean)
    assert broken.high - broken.low > 10
    exact = statistics.paired_stratified(shared + 2, shared, rng())  # of interquartile means
    assert exact == pytest.approx((2.0, 2.0, 2.0))


def test_probability_of_improvement():
    low, high = np.array([[1.0], [2]]), np.array([[3.0], [4]])
    assert statistics.improvement(high, low) == 1.0
    assert statistics.improvement(low, high) == 0.0
    assert statistics.improvement(low, low) == 0.5
    # 2 beats 1 and ties with 2: (1 + 0.5) / 2 for 2, 1 loses to 2 and ties: 0.25; other task: 1
    a, b = np.array([[1.0, 9.0], [2.0, 9.0]]), np.array([[1.0, 0.0], [2.0, 0.0]])
    assert statistics.improvement(a, b) == pytest.approx((0.5 + 1.0) / 2)
    found = statistics.probability_of_improvement(high, low, rng(), resamples=50)
    assert found == Interval(1.0, 1.0, 1.0)


def test_probability_of_improvement_counts_all_pairs():
    generator = rng(7)
    a, b = generator.normal(0.3, 1, (7, 2)), generator.normal(0, 1, (9, 2))
    wins = [x > y for task in range(2) for x, y in product(a[:, task], b[:, task])]
    found = statistics.probability_of_improvement(a, b, rng(), resamples=500)
    assert found.value == pytest.approx(np.mean(wins))
    assert found.low < found.value < found.high
    mannwhitneyu = pytest.importorskip("scipy.stats").mannwhitneyu
    shares = [mannwhitneyu(a[:, task], b[:, task]).statistic / 63 for task in range(2)]
    assert found.value == pytest.approx(np.mean(shares))


def test_to_rliable_is_a_dict_of_runs_by_tasks():
    found = statistics.to_rliable({"a": np.ones((3, 2), np.float32), "b": np.zeros((5, 2))})
    assert {name: values.shape for name, values in found.items()} == {"a": (3, 2), "b": (5, 2)}
    assert all(values.dtype == np.float64 for values in found.values())
    with pytest.raises(ValueError, match="differ in their tasks"):
        statistics.to_rliable({"a": np.ones((3, 2)), "b": np.ones((3, 4))})


def test_values_of_the_wrong_shape_are_refused():
    with pytest.raises(ValueError, match=r"\(seeds, tasks\) values are needed"):
        statistics.stratified_bootstrap(np.zeros(3), rng())
    with pytest.raises(ValueError, match="not pairs"):
        statistics.paired_stratified(np.zeros((3, 2)), np.zeros((2, 2)), rng())
    with pytest.raises(ValueError, match="2 tasks of one and 3"):
        statistics.improvement(np.zeros((3, 2)), np.zeros((3, 3)))
