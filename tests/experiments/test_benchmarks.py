"""Statistics against values worked out by hand and against coverage that must come out."""

import numpy as np
import pytest

from experiments.benchmarks.statistics import bootstrap, iqm, mean, paired_bootstrap


def test_iqm_is_the_mean_of_the_middle_half():
    assert iqm(np.array([100.0, 1, 2, -50])) == pytest.approx(1.5)
    assert iqm(np.array([7.0])) == pytest.approx(7.0)
    # six values: one and a half are cut at each end, so the second counts by half
    assert iqm(np.array([0.0, 1, 2, 3, 4, 99])) == pytest.approx((0.5 * 1 + 2 + 3 + 0.5 * 4) / 3)
    assert iqm(np.array([[4.0, 3, 2, 1], [8, 8, 8, 8]])).tolist() == [2.5, 8.0]


def test_the_interval_covers_the_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    samples = rng.normal(3.0, 2.0, (300, 20))
    intervals = [bootstrap(values, rng, resamples=400) for values in samples]
    covered = np.mean([found.low <= 3.0 <= found.high for found in intervals])
    assert 0.88 < covered < 0.97  # percentile intervals of 20 values are a little too narrow


def test_pairing_takes_out_what_the_seeds_share():
    rng = np.random.default_rng(1)
    shared = rng.normal(0, 100, 10)
    better = shared + 1 + rng.normal(0, 0.1, 10)
    paired = paired_bootstrap(better, shared, rng)
    assert 0.8 < paired.low < paired.value < paired.high < 1.2
    shuffled = paired_bootstrap(better, shared[::-1], rng)
    assert shuffled.high - shuffled.low > 20


def test_one_seed_and_one_generator_give_one_interval():
    values = np.array([1.0, 2, 3, 10])
    first = bootstrap(values, np.random.default_rng(3), iqm)
    assert first == bootstrap(values, np.random.default_rng(3), iqm)
    assert first.value == pytest.approx(2.5)
    assert bootstrap(values, np.random.default_rng(3), mean).value == pytest.approx(4.0)
    assert bootstrap(np.array([5.0]), np.random.default_rng(0)) == (5.0, 5.0, 5.0)


def test_values_that_are_no_pairs_are_refused():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="3 and 2 values are not pairs"):
        paired_bootstrap(np.zeros(3), np.zeros(2), rng)
    with pytest.raises(ValueError, match="one value a seed"):
        bootstrap(np.zeros((2, 2)), rng)
