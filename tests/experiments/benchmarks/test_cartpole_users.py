"""CartPole users: who plays with whose fast weights, what is told of it, and a run that was cut."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.benchmarks import users
from experiments.benchmarks.population import cartpole as cartpole_users
from experiments.benchmarks.population.cartpole import TIERS, cell_of, cells, place
from experiments.benchmarks.population.play import Play, returns, seat, somebody_else, visit
from experiments.benchmarks.population.rounds import (
    Arrays,
    Size,
    alike,
    cohort,
    consolidated,
    new,
    old,
)
from experiments.benchmarks.population.told import area, gates, summary, swapped, told, worst
from experiments.build import build_agent
from experiments.config import Config
from experiments.envs import make_envs
from experiments.envs.population import SPLITS, Population
from experiments.envs.userpop import UserPopVectorEnv
from nested import fast as fast_state

SMOKE = TIERS["smoke"]


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return cell_of("fast", 3, SMOKE, tmp_path).config


def agent_of(config: Config):
    """Untrained, with a start that is not zero."""
    envs = make_envs(config.env, 1)
    agent = build_agent(config, envs.obs_spec, envs.action_spec)
    with torch.no_grad():
        for parameter in agent.world.dynamics.memory.parameters():
            parameter.add_(0.3)
    return agent


def test_users_sit_where_they_are_told_with_their_own_weights(config: Config):
    agent, ids = agent_of(config), np.array([5, 900_001, 7])
    learned = visit(config, agent, ids, (0, 2, 5), 1)
    driver = seat(config, agent, Play(ids, learned.states[5], "read"), 2)
    for _ in range(4):
        row = driver.step().row
        assert row.user.tolist() == ids.tolist()
    kept = driver.carry.fast.weights
    assert torch.equal(kept, learned.states[5].weights), "reading writes nothing"
    assert not torch.equal(learned.states[2].weights, learned.states[5].weights)
    assert torch.equal(learned.states[0].weights[0], agent.world.dynamics.memory.start)
    assert torch.equal(somebody_else(learned.states[5]).weights[1], learned.states[5].weights[0])
    assert len(learned.surprise) >= 5 and (learned.surprise > 0).all()


def test_a_visit_counts_interactions_and_not_the_rows_that_begin_episodes(config: Config):
    agent, ids = agent_of(config), np.arange(4)
    driver = seat(config, agent, Play(ids, None, "write"), 6)
    counts, states = np.zeros(4, int), []
    while counts.min() < 15:  # episodes end after 12 steps
        counts += ~driver.step().row.first
        states.append((counts.copy(), driver.carry.fast.weights))
    found = visit(config, agent, ids, (0, 13), 6).states[13].weights
    for user in range(4):
        first = next(weights for count, weights in states if count[user] == 13)
        assert torch.equal(found[user], first[user])


def test_episodes_of_one_call_differ_by_the_fast_weights_only(config: Config):
    agent, ids = agent_of(config), np.arange(6)
    state = visit(config, agent, ids, (0, 8), 1).states[8]
    loud = fast_state.tree_map(lambda x: x + 5.0, state)
    plays = [Play(ids, None, "read"), Play(ids, loud, "read"), Play(ids, None, "read")]
    found = returns(config, agent, [*plays, Play(ids, None, "write")], 4)
    assert found.shape == (4, 6) and (found > 0).all() and (found <= 12).all()
    np.testing.assert_array_equal(found[0], found[2])
    alone = returns(config, agent, plays[1:2], 4)
    np.testing.assert_array_equal(found[1], alone[0])


def test_cohorts_are_of_one_cluster_that_training_never_saw(config: Config):
    population = Population(seed=3)
    met = [set(population.cluster(cohort(config, i, 50)).tolist()) for i in range(4)]
    assert met == [{15}, {14}, {13}, {12}]
    size = SMOKE.size._replace(users=9)
    assert np.isin(new(size), SPLITS["users"]).all() and np.isin(old(size), SPLITS["train"]).all()


def test_consolidation_moves_nothing_but_the_start_and_puts_it_back(config: Config):
    agent = agent_of(config)
    before = {name: p.clone() for name, p in agent.named_parameters()}
    size = Size(1, 3, (0, 4), 1, 2, 4, 4)
    found = consolidated(config, agent, size, 0, 0)
    assert found["own/zero"].shape == (3, 3) and found["own/curve"].shape == (2, 2, 3)
    assert (found["own/moved"] > 0).all()
    np.testing.assert_array_equal(found["own/zero"][0], found["stray/zero"][0])
    for name, p in agent.named_parameters():
        assert torch.equal(p, before[name]), name


# ---- what is told ------------------------------------------------------------------------------
def arrays(size: Size, own: float, other: float, gain: float) -> Arrays:
    """A seed whose scores are known."""
    shape, m = (size.rounds + 1, size.users), len(size.marks)
    rise = np.linspace(0, 1, m)[None, :, None] * np.ones((size.rounds + 1, 1, size.users))
    half, updates = np.full(shape, 0.5), size.updates + 1
    found = {
        "zero": half - 0.2, "fresh": half, "own": 0.3 + own * rise, "other": 0.3 + other * rise,
        "back/own": half + own, "back/other": half + other, "old/without": half,
        "old/with": half + 0.1,
    }  # fmt: skip
    for name, by in (("own", gain), ("stray", 0.0)):
        up = np.linspace(0, by, updates)[None, :, None] * np.ones((1, 1, size.users))
        for key in ("zero", "fresh", "old/without", "old/with"):
            found[f"cohort/{name}/{key}"] = 0.4 + up
        found[f"cohort/{name}/curve"] = np.full((1, 2, m, size.users), 0.4)
    return found


def test_what_is_told_are_the_differences_that_were_put_in():
    size = Size(2, 20, (0, 1, 10, 100), 1, 3, 4, 5)
    rows = told(arrays(size, own=0.3, other=-0.1, gain=0.25), size, 0)
    assert rows["fast - frozen"] == pytest.approx(0.2)
    assert rows["a known user's gain"] == pytest.approx(0.3)
    assert rows["shuffled ids' gain"] == pytest.approx(-0.1)
    assert rows["consolidation: gain of new users"] == pytest.approx(0.25)
    assert rows["consolidation of other clusters: gain of new users"] == pytest.approx(0.0)
    assert rows["consolidation, gain over that of other clusters"] == pytest.approx(0.25)
    assert rows["shuffled - none, the same sign"] == pytest.approx(-0.1)
    assert rows["old users, own weights - none"] == pytest.approx(0.1)
    assert rows["area at 1, own - none"] == pytest.approx(0.1)
    # straight from 0.1 after one interaction to 0.2 after ten
    assert rows["area at 10, own - none"] == pytest.approx(0.15)
    assert rows["area at 10, shuffled - none"] == pytest.approx(-0.05)


def test_swapped_users_are_told_by_the_sign_of_their_actions():
    same = alike(3, SMOKE.size._replace(users=40))
    vector = UserPopVectorEnv(40, user_ids=range(900_000, 900_040), population=Population(seed=3))
    signs = np.sign(vector.traits.force)
    assert same.tolist() == [signs[i] == signs[i - 1] for i in range(40)] and 5 < same.sum() < 35
    found = swapped(np.where(same, 0.5, -0.25), same)
    assert list(found.values()) == [0.5, -0.25]
    assert swapped(np.ones(3), np.ones(3, bool))["shuffled - none, the other sign"] == 0.0


def test_areas_and_the_worst_tenth():
    assert area(np.array([0.0, 1.0, 1.0]), (0, 1, 4), 4) == 1.0
    assert area(np.array([0.0, 0.0, 3.0]), (0, 1, 4), 4) == pytest.approx(1.5)
    assert worst(np.array([0.9, 0.1, *[0.5] * 18])) == pytest.approx(0.3)
    assert worst(np.array([0.9, 0.1])) == pytest.approx(0.1)


@pytest.mark.parametrize(("own", "other", "gain"), [(0.3, -0.1, 0.2), (-0.1, 0.2, -0.1)])
def test_gates_tell_what_holds(own: float, other: float, gain: float):
    size = Size(2, 20, (0, 1, 10, 100), 1, 3, 4, 5)
    seeds = {seed: arrays(size, own + 0.01 * seed, other, gain) for seed in range(3)}
    plain = {seed: {"zero": np.full((3, 20), 0.4)} for seed in range(2)}
    result = summary({"fast": seeds, "memoryless": plain}, size)
    _, *others = gates(result).values()
    assert others == [own > 0] * 4
    assert result["pairs"]["new users, fast - memoryless"]["value"] == pytest.approx(0.1)
    assert result["pairs"]["new users, fast - memoryless"]["seeds"] == [0, 1]
    rounds = result["arms"]["fast"]["rounds"]
    assert [row["value"] for row in rounds["area at 10"]] == pytest.approx(
        [0.3 + 0.5 * (own + 0.01)] * 3
    )
    assert [row["value"] for row in rounds["G: Z minus that of the round before"]] == [0.0] * 3
    assert summary({"fast": {}, "memoryless": plain}, size)["gates"] == {}


# ---- the whole -----------------------------------------------------------------------------------
def test_the_smoke_tier_tells_and_a_run_that_was_cut_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    asked = ["--tier", "smoke", "--part", "cartpole", "--seeds", "1", "--out", str(tmp_path)]
    assert users.main(asked) == 0
    text = capsys.readouterr().out
    assert "fast - frozen" in text and "shuffled ids gain nothing" in text
    first = json.loads((tmp_path / "cartpole.json").read_text())
    assert (tmp_path / "cartpole.png").stat().st_size > 30_000
    with (tmp_path / "cartpole.csv").open() as file:
        found = {(row["arm"], row["name"], row["at"]): row for row in csv.DictReader(file)}
    shown = first["arms"]["fast"]["rows"]["new users"]["value"]
    assert float(found["fast", "fresh", "2"]["value"]) == pytest.approx(shown, rel=1e-5)
    cut = place(cell_of("fast", 0, SMOKE, tmp_path), tmp_path)
    with np.load(cut) as stored:
        before = dict(stored)
    cut.unlink()
    # trained already: only measured again, and alike
    monkeypatch.setattr(cartpole_users, "train_together", None)
    again = {cell.arm: arrays for cell, arrays in cells(SMOKE, [0], tmp_path)}
    assert list(again) == ["fast", "memoryless"] and again["fast"].keys() == before.keys()
    for name, values in before.items():
        np.testing.assert_array_equal(again["fast"][name], values, err_msg=name)
