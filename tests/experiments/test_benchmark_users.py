"""The users benchmark: learners against their formulas, consolidation against the optimum."""

import csv
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from experiments.benchmarks import users
from experiments.benchmarks.population import learners
from experiments.benchmarks.population.consolidation import (
    MEASURES,
    OPTIMUM,
    Learned,
    Returning,
    Server,
    Size,
    consolidate,
    methods,
    returning,
)
from experiments.benchmarks.population.linear import LinearUsers, Prior, Session, excess, posterior
from experiments.config import ConfigError
from experiments.envs.population import SIZE, SPLITS, Population
from timescales import Every

ONE = partial(Population, clusters=1, held=0, within=tuple(np.linspace(1, 0.2, 8)))


def case(num: int = 6, steps: int = 8, seed: int = 0) -> tuple[LinearUsers, Prior, Session]:
    linear = LinearUsers(ONE(seed=seed))
    draw = torch.Generator().manual_seed(seed)
    return linear, linear.prior().pooled(), linear.session(np.arange(num), steps, draw)


def loop(session: Session, start: Tensor, rate: float, momentum: float, unit: bool) -> Tensor:
    """One user after another, one interaction after another."""
    found = torch.zeros_like(session.xs)
    for user in range(len(session.xs)):
        theta, velocity = start.clone(), torch.zeros_like(start)
        for t, (x, y) in enumerate(zip(session.xs[user], session.ys[user], strict=True)):
            gradient = -(y - theta @ x) * x / (x @ x if unit else 1.0)
            velocity = momentum * velocity - gradient
            theta = theta + rate * velocity
            found[user, t] = theta
    return found


def test_delta_and_gradient_steps_are_their_formulas():
    _, prior, session = case()
    expected = loop(session, prior.centre, 0.6, 0.0, unit=True)
    found = learners.delta(session, prior, 0.6)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)  # keys of zero are no error
    for momentum in (0.0, 0.7):
        expected = loop(session, prior.centre, 0.05, momentum, unit=False)
        torch.testing.assert_close(learners.sgd(session, prior, 0.05, momentum), expected)


def test_recursive_least_squares_is_the_posterior_of_the_pooled_prior():
    _, prior, session = case()
    expected = learners.bayes(session, prior)
    torch.testing.assert_close(expected[:, -1], posterior(prior, session.stats()).mean)
    found = learners.recursive(session, prior)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    eye = torch.eye(SIZE, dtype=torch.float64)
    scalar = prior._replace(cov=eye * prior.cov.diagonal().mean())
    found = learners.recursive(session, prior, "scalar")
    torch.testing.assert_close(found, learners.bayes(session, scalar), rtol=1e-4, atol=1e-4)


def test_the_adapter_descends_on_its_window():
    _, prior, session = case(num=3, steps=5)
    found = learners.window(session, prior, 0.05, last=2, steps=3)
    for user in range(3):
        theta = prior.centre.clone()
        for t in range(5):
            xs, ys = (x[user, max(0, t - 1) : t + 1] for x in session[1:])
            for _ in range(3):
                theta = theta - 0.05 * xs.T @ (xs @ theta - ys) / len(ys)
            torch.testing.assert_close(found[user, t], theta)


@pytest.fixture(scope="module")
def slow() -> dict[str, np.ndarray]:
    """Squared errors (seeds, 2) of consolidation and of the optimum: 40 rounds of 100 users."""
    found: dict[str, list[list[float]]] = {"one": [], "clusters": []}
    for name, make in (("one", ONE), ("clusters", Population)):
        for seed in range(4):
            linear = LinearUsers(make(seed=seed))
            draw = torch.Generator().manual_seed(seed)
            held_out = linear.session(np.arange(900_000, 900_020), 10, draw)
            prior = linear.prior().pooled()
            size, method = Size(40, 100, 100, 10), "mean, by certainty"
            scores = consolidate(linear, prior, size, held_out, draw, [method])
            found[name].append([scores[m][-1, 0] for m in (method, OPTIMUM)])
    return {name: np.array(values) for name, values in found.items()}


@pytest.mark.parametrize("name", ["one", "clusters"])
def test_consolidation_finds_the_mean_of_the_population_as_well_as_the_optimum(
    name: str, slow: dict[str, np.ndarray]
):
    ours, best = np.sqrt(slow[name].mean(0))
    assert ours <= 1.05 * best
    assert best < 0.07  # the spread of 4,000 users alone leaves 0.03 and 0.045 unknown


def test_every_method_ends_near_the_mean_and_in_rounds():
    linear, prior, _ = case()
    draw = torch.Generator().manual_seed(3)
    held_out = linear.session(np.arange(900_000, 900_300), 10, draw)
    found = consolidate(linear, prior, Size(24, 200, 100, 10), held_out, draw)
    assert list(found) == [*methods(Every(1)), OPTIMUM]
    floor = float(excess(linear.prior().centre, held_out.theta).mean())
    for name, scores in found.items():
        assert scores.shape == (25, len(MEASURES)), name
        error, zero, one, ten, worst = scores[-1]
        limit = {"adam": 0.5, "reptile": 0.05}.get(name, 0.03)
        assert error < limit * scores[0, 0], name
        assert ten < one < zero < worst, name
        assert zero == pytest.approx(floor, rel=0.2 if name == "adam" else 0.05), name


def test_batches_of_a_window_are_one_update():
    _, _, session = case(num=40)
    parts = [Session(*(x[i : i + 10] for x in session)) for i in range(0, 40, 10)]
    for name, method in methods(Every(40, "session")).items():
        one, four = Server(name, method, SIZE), Server(name, method, SIZE)
        delta = session.theta - 0.1
        certainty = session.theta.abs()
        assert one.take(Learned(session, delta, certainty))
        moved = [
            four.take(Learned(part, delta[i : i + 10], certainty[i : i + 10]))
            for i, part in zip(range(0, 40, 10), parts, strict=True)
        ]
        assert moved == [False, False, False, True], name
        assert one.live.abs().max() > 0.01, name
        torch.testing.assert_close(four.live, one.live, msg=name)


def test_what_is_taken_out_leaves_users_where_they_were():
    linear, prior, session = case(num=30)
    for keep, shift in (("taken out", 0.0), ("kept", 1.0)):
        group = Returning(prior, 30, keep)
        group.visit(session)
        moved = group.server.live
        expected = posterior(prior._replace(mean=torch.zeros_like(prior.mean)), session.stats())
        torch.testing.assert_close(group.weights, expected.mean + shift * moved)
        assert moved.norm() > 0.1
    losses = returning(linear, prior, Size(4, 0, 100, 10), torch.Generator().manual_seed(1))
    assert (np.diff(losses["taken out"]) < 0).all()
    assert losses["taken out"][-1] < 0.2 * min(losses["kept"][-1], losses["cleared"][-1])


TINY = users.Tier(2, 120, 60, 10, 4, Size(6, 40, 20), Size(3, 20, 20))


def test_shares_are_of_the_gain_of_bayes_and_vanish_for_swapped_users():
    found = users.case_of("one cluster", 5, TINY, 200, "users")
    optimal = partial(lambda session, _, prior: learners.bayes(session, prior),
                      prior=found.users.prior())  # fmt: skip
    own, swapped = users.shares(found, {"frozen": learners.frozen, "optimal": optimal})
    assert own["optimal"] == pytest.approx(np.ones(100))
    assert not own["frozen"].any()
    assert swapped["optimal"].max() < 0
    ids = np.arange(200) + SPLITS["users"].start
    np.testing.assert_array_equal(found.held_out.theta.numpy(), found.users.users.contexts(ids))


def test_users_from_end_to_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(users.TIERS, "smoke", TINY)
    monkeypatch.setattr(users, "MARKS", (1, 3, 6))
    monkeypatch.setattr(users, "WORLDS", {"clusters": users.WORLDS["clusters"]})
    assert (
        users.main(["--tier", "smoke", "--part", "linear", "--out", str(tmp_path), "--json"]) == 0
    )
    lines = capsys.readouterr().out.splitlines()
    result = json.loads(lines[-1])
    saved = json.loads((tmp_path / "users.json").read_text())
    assert saved == result
    assert (tmp_path / "users.png").stat().st_size > 30_000
    with (tmp_path / "users.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == users.COLUMNS
    for world, parts in result["populations"].items():
        values = [
            float(row["value"])
            for row in rows
            if (row["population"], row["part"], row["name"], row["n"])
            == (world, "adaptation", "RLS", "3")
        ]
        assert len(values) == 2
        shown = parts["adaptation"]["RLS"]["3"]
        assert shown["value"] == pytest.approx(np.mean(values), rel=1e-4)
        assert shown["low"] <= shown["value"] <= shown["high"]
        assert parts["consolidation"][OPTIMUM]["error"]["value"] == pytest.approx(1.0)
        assert parts["gates"]["taking out what was consolidated is best"]
    text = users.table(result)
    assert "clusters: taking out what was consolidated is best: yes" in text
    parts["adaptation"] = {"frozen": parts["adaptation"]["frozen"]}
    parts["swapped"]["delta"]["6"]["high"] = 0.1
    failing = "some learner reaches 95 % of the Bayes-optimal gain at each mark"
    assert [name for name, holds in users.gates(parts).items() if not holds][:2] == [
        failing,
        "another user's fast weights do not help",
    ]


def test_all_parts_run_one_after_another(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    asked: list[tuple[str, str, int | None]] = []

    def part(name: str, tier: str, seeds: int | None, out: Path) -> users.Part:
        asked.append((name, tier, seeds))
        return {"is": name}, f"table of {name}", out / f"{name}.png"

    for name in users.RUNS:
        monkeypatch.setitem(users.RUNS, name, partial(part, name))
    assert users.main(["--out", str(tmp_path), "--seeds", "3"]) == 0
    assert asked == [("linear", "laptop", 3), ("cartpole", "laptop", 3)]
    assert "table of linear" in capsys.readouterr().out
    assert users.main(["--tier", "smoke", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == {name: {"is": name} for name in ("linear", "cartpole")}
    assert users.main(["--part", "cartpole", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"is": "cartpole"}


def test_nothing_to_measure_is_a_mistake():
    with pytest.raises(ConfigError, match="nothing to measure"):
        users.main(["--seeds", "0"])
