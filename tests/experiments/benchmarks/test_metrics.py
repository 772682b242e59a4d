"""Metrics against matrices and results written by hand in metrics.yaml, and laws between them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ruamel.yaml import YAML

from experiments.benchmarks import metrics

GOLDEN = YAML(typ="safe").load((Path(__file__).parent / "metrics.yaml").read_text("utf-8"))
SCORES, TRANSFERS = GOLDEN["scores"], GOLDEN["transfers"]


def names(rows: list[dict[str, Any]]) -> list[str]:
    return [row["name"] for row in rows]


def random_scores(tasks: int = 5, seeds: int = 3) -> np.ndarray:
    return np.random.default_rng(0).normal(0.5, 0.3, (seeds, tasks + 1, tasks))


@pytest.mark.parametrize("row", SCORES, ids=names(SCORES))
def test_every_metric_of_scores_written_by_hand(row: dict[str, Any]):
    assert metrics.of_scores(np.array(row["R"])) == pytest.approx(row["metrics"], abs=1e-12)


@pytest.mark.parametrize("row", SCORES[:3], ids=names(SCORES[:3]))
def test_what_each_task_takes_and_gives(row: dict[str, Any]):
    scores = np.array(row["R"])
    taken, given = metrics.forgetting_isolated(scores), metrics.transfer_isolated(scores)
    assert np.allclose(taken, row["F_iso"], atol=1e-12, equal_nan=True)
    assert np.allclose(given, row["Z_iso"], atol=1e-12, equal_nan=True)


def test_the_file_names_every_metric_and_the_metrics_have_names():
    assert set(SCORES[0]["metrics"]) == set(metrics.OF_SCORES)
    assert set(SCORES[-1]["metrics"]) == set(metrics.OF_ONE)


@pytest.mark.parametrize("norm", ["ref", "kessler", "none"])
@pytest.mark.parametrize("row", TRANSFERS, ids=names(TRANSFERS))
def test_forward_transfer_in_every_convention(row: dict[str, Any], norm: metrics.Norm):
    found = metrics.forward_transfer(np.array(row["own"]), np.array(row["ref"]), norm)
    assert found.value == pytest.approx(row["value"][norm], abs=1e-12)
    assert found.clipped.tolist() == row["clipped"][norm]
    assert found.by_task.mean() == pytest.approx(found.value)


def test_seeds_are_a_leading_axis():
    scores = random_scores()
    together = metrics.of_scores(scores)
    for seed, alone in enumerate(scores):
        found = {name: values[seed] for name, values in together.items()}
        assert metrics.of_scores(alone) == pytest.approx(found, abs=1e-12)


def test_laws_that_hold_for_any_scores():
    scores = random_scores()
    found, tasks = metrics.of_scores(scores), scores.shape[-1]
    assert found["BWT"] == pytest.approx(-found["F"])
    assert found["F_over_N"] == pytest.approx(found["F"] * (tasks - 1) / tasks)
    assert (found["F_max"] >= found["F"] - 1e-12).all()
    assert found["AP_final"] == pytest.approx(found["ALA"] - found["F_over_N"])
    # what later tasks took from a task, summed, is its forgetting; what earlier ones gave, transfer
    taken = np.nansum(metrics.forgetting_isolated(scores), -2)[..., :-1]
    assert taken.mean(-1) == pytest.approx(found["F"])
    given = np.nansum(metrics.transfer_isolated(scores), -2)[..., 1:]
    assert given.mean(-1) == pytest.approx(found["FWT_zs"])


def test_normalised_scores_are_not_clipped():
    raw = np.array([-5.0, 10.0, 30.0, 50.0])
    assert metrics.normalise(raw, np.array(10.0), np.array(30.0)).tolist() == [-0.75, 0, 1, 2]
    with pytest.raises(ValueError, match="differ by less than"):
        metrics.normalise(raw, np.array(10.0), np.array(10.0))


def test_curves():
    # trapezoids: (0.0 + 0.4) / 2 * 1 + (0.4 + 0.8) / 2 * 2 = 1.4, over 3
    assert metrics.auc(np.array([0, 1, 3]), np.array([0, 0.4, 0.8])) == pytest.approx(1.4 / 3)
    assert metrics.auc(np.array([5, 6, 9]), np.full((2, 3), 0.3)).tolist() == [0.3, 0.3]
    assert metrics.end_value(np.array([9.0, 1, 2, 3])) == pytest.approx(2.0)
    assert metrics.end_value(np.array([9.0, 1, 2, 3]), last=1) == pytest.approx(3.0)
    for times in ([0, 1, 1], [0], [2, 1, 0]):
        with pytest.raises(ValueError, match="rising grid"):
            metrics.auc(np.array(times), np.zeros(len(times)))
    with pytest.raises(ValueError, match="4 of 3 evaluations"):
        metrics.end_value(np.zeros(3), last=4)


def test_streams_without_tasks():
    rewards = np.array([1.0, 0.0, 0.5, 1.0])
    assert metrics.online_return(rewards) == pytest.approx(0.625)
    regret = metrics.dynamic_regret(rewards, np.array([1.0, 1.0, 0.5, 0.5]))
    assert regret.tolist() == [0.0, 1.0, 1.0, 0.5]  # better than the reference: it falls
    assert metrics.dynamic_regret(rewards, np.array(1.0)).tolist() == [0.0, 1.0, 1.5, 1.5]
    stretches = metrics.dynamic_regret(rewards[:2], np.array([1.0, 0.5]), np.array([3.0, 2.0]))
    assert stretches.tolist() == [0.0, 1.0]  # 3 (1 - 1), and 2 (0.5 - 0)
    assert metrics.of_scores(np.zeros((5, 1, 0))) == {}


def test_adaptation_and_consolidation():
    frozen, fast, full = np.full(4, 0.2), np.array([0.2, 0.4, 0.6, 0.6]), np.full(4, 0.9)
    found = metrics.adaptation(frozen, fast, full, n=3)
    expected = {"frozen": 0.2, "fast": 0.4, "full": 0.9, "fast - frozen": 0.2, "full - fast": 0.5}
    assert found == pytest.approx(expected)
    with pytest.raises(ValueError, match="n=5 of 4"):
        metrics.adapt_area(frozen, 5)
    before, after = np.array([0.1, 0.3]), np.array([0.5, 0.2])
    assert metrics.consolidation_gain(before, after) == pytest.approx(0.15)
    assert metrics.retention(after, before) == pytest.approx(-0.15)
    assert metrics.amortised(before, after + 1) == pytest.approx(1.15)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((3, 3), "row 0 is the untrained agent"), ((3,), "N\\+1, N"), ((2, 1), "needs 2 or more")],
)
def test_scores_that_cannot_be_meant_are_refused(shape: tuple[int, ...], expected: str):
    with pytest.raises(ValueError, match=expected):
        metrics.fwt_zs(np.zeros(shape))


def test_a_missing_evaluation_is_not_dropped():
    scores = random_scores()
    scores[0, 2, 1] = np.nan
    with pytest.raises(ValueError, match="every task is evaluated every time"):
        metrics.ap_any(scores)
    with pytest.raises(ValueError, match="one task alone"):
        metrics.forgetting(np.zeros((2, 1)))
    with pytest.raises(ValueError, match="over='M'"):
        metrics.forgetting(random_scores(), "M")  # pyright: ignore
    with pytest.raises(ValueError, match="norm='cw'"):
        metrics.forward_transfer(np.zeros(2), np.zeros(2), "cw")  # pyright: ignore


def test_savings_and_the_time_to_learn_again():
    times = np.array([100, 200, 300, 400])
    scores = np.array([[0.1, 0.7, 0.8, 0.2], [0.9, 0.1, 0.1, 0.1], [0.1, 0.2, 0.3, 0.79]])
    # reached at 300; at once; never, which counts as the whole length
    assert metrics.time_to(times, scores, 0.8).tolist() == [200.0, 0.0, 300.0]
    assert metrics.savings(np.array([0.5, 0.25]), np.array([0.75, 0.0])).tolist() == [0.25, -0.25]
