"""Rows of any gymnasium environment: alignment, ends, restarts, worker processes, continuation."""

import sys
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import gymnasium
import numpy as np
import pytest

from experiments.config import ConfigError
from experiments.config.models import EnvConfig
from experiments.envs import Envs, Row, make_envs, open_env
from experiments.envs.adapter import GymEnvs
from experiments.envs.slot import episode_seed
from tests.fakes import length, telltale_slot, terminates, told_seed

SEED, NUM = 3, 4


def config(name: str, **changes: Any) -> EnvConfig:
    return EnvConfig.model_validate({"id": name, "num": 2, "workers": "inprocess", **changes})


def rollout(envs: Envs, steps: int, seed: int = 0) -> list[Row]:
    rng = np.random.default_rng(seed)
    return [envs.step(envs.random_action(rng)) for _ in range(steps)]


def assert_rows_equal(ours: Row, theirs: Row) -> None:
    for name in ("action", "reward", "first", "terminal", "last", "user"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name), name)
        assert getattr(ours, name).dtype == getattr(theirs, name).dtype, name
    assert ours.obs.keys() == theirs.obs.keys()
    for name, value in ours.obs.items():
        np.testing.assert_array_equal(value, theirs.obs[name], name)


@pytest.fixture(params=["inprocess", "process"])
def told(request: pytest.FixtureRequest) -> Iterator[list[Row]]:
    envs = GymEnvs(partial(telltale_slot, SEED), NUM, request.param)
    yield [envs.reset(), *rollout(envs, 60)]
    envs.close()


def test_rows_hold_the_action_that_led_into_them(told: list[Row]):
    for row in told:
        given = np.where(row.first, 0, row.action.argmax(1) + 1)
        np.testing.assert_array_equal(row.obs["action"][:, 0], given)
        np.testing.assert_array_equal(row.reward, row.obs["time"][:, 0])
        np.testing.assert_array_equal(row.action.sum(1), ~row.first)


def test_flags_stand_at_both_ends_of_an_episode(told: list[Row]):
    for row in told:
        time, seed = row.obs["time"][:, 0], told_seed(row.obs)
        np.testing.assert_array_equal(row.first, time == 0)
        np.testing.assert_array_equal(row.last, time == [length(int(s)) for s in seed])
        np.testing.assert_array_equal(row.terminal, row.last & [terminates(int(s)) for s in seed])
    ends = [(bool(t), bool(e)) for row in told for t, e in zip(row.terminal, row.last, strict=True)]
    assert {(True, True), (False, True)} <= set(ends), "both kinds of end must have been seen"


def test_a_first_row_follows_a_last_row_and_only_that(told: list[Row]):
    assert told[0].first.all()
    for before, after in pairwise(told):
        np.testing.assert_array_equal(after.first, before.last)


def test_every_episode_has_a_seed_of_slot_and_number(told: list[Row]):
    episode = np.cumsum([row.first for row in told], axis=0) - 1
    for row, numbers in zip(told, episode, strict=True):
        expected = [episode_seed(SEED, slot, int(n)) for slot, n in enumerate(numbers)]
        np.testing.assert_array_equal(told_seed(row.obs), expected)


def test_reset_starts_the_next_episode_of_every_slot():
    envs = GymEnvs(partial(telltale_slot, SEED), NUM, "inprocess")
    envs.reset()
    envs.step(np.eye(5, dtype=np.float32)[:NUM])
    row = envs.reset()
    assert row.first.all() and not row.action.any()
    np.testing.assert_array_equal(told_seed(row.obs), [episode_seed(SEED, i, 1) for i in range(4)])
    with pytest.raises(ValueError, match="no hidden contexts"):
        envs.reset("flipped")


@pytest.mark.parametrize("past", range(12))
def test_continues_from_any_step(past: int):
    envs = GymEnvs(partial(telltale_slot, SEED), NUM, "inprocess")
    now = [envs.reset(), *rollout(envs, past)][-1]
    state = envs.state_dict()
    expected = rollout(envs, 20, seed=1)
    fresh = GymEnvs(partial(telltale_slot, 99), NUM, "inprocess")
    assert_rows_equal(fresh.load_state_dict(state), now)
    for ours, theirs in zip(rollout(fresh, 20, seed=1), expected, strict=True):
        assert_rows_equal(ours, theirs)


@pytest.mark.parametrize(
    "chosen",
    [
        config("CartPole-v1"),
        config("Pendulum-v1", action_repeat=2, time_limit=10),
        config("MiniGrid-DoorKey-5x5-v0", pixels=True),
        config("MiniGrid-Empty-5x5-v0", time_limit=8),
        config("CartPoleShift-v0"),
        pytest.param(config("ALE/Pong-v5"), marks=pytest.mark.slow),
        pytest.param(config("crafter", workers="process"), marks=pytest.mark.slow),
    ],
    ids=lambda chosen: chosen.id,
)
def test_real_environments_match_their_specs_and_continue(chosen: EnvConfig):
    pytest.importorskip({"crafter": "crafter", "ALE/Pong-v5": "ale_py"}.get(chosen.id, "numpy"))
    envs = make_envs(chosen, seed=5)
    envs.reset()
    row = rollout(envs, 30)[-1]
    for name, spec in envs.obs_spec.items():
        assert row.obs[name].shape == (2, *spec.shape)
        assert row.obs[name].dtype == {"image": np.uint8, "discrete": np.int64}.get(
            spec.kind, np.float32
        )
    state = envs.state_dict()
    expected = rollout(envs, 50, seed=1)
    envs.close()
    again = make_envs(chosen, seed=5)
    assert_rows_equal(again.load_state_dict(state), row)
    for ours, theirs in zip(rollout(again, 50, seed=1), expected, strict=True):
        assert_rows_equal(ours, theirs)
    again.close()


def test_time_limit_and_action_repeat():
    envs = make_envs(config("Pendulum-v1", time_limit=12, action_repeat=3))
    plain = open_env("Pendulum-v1")
    plain.reset(seed=episode_seed(0, 0, 0))
    rows = [envs.reset(), *rollout(envs, 5)]
    assert [bool(row.last[0]) for row in rows] == [False] * 4 + [True, False]
    assert not any(row.terminal.any() for row in rows)
    torque = 2 * rows[1].action[0]
    repeated = sum(float(plain.step(torque)[1]) for _ in range(3))
    assert rows[1].reward[0] == pytest.approx(repeated, rel=1e-6)


def test_caps_where_known():
    assert make_envs(config("CartPole-v1")).cap == 500
    assert make_envs(config("CartPole-v1", time_limit=50)).cap == 50
    assert make_envs(config("CartPoleShift-v0")).cap == 200
    assert make_envs(config("Pendulum-v1")).cap is None


def test_mistakes_name_the_thing(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(gymnasium.error.Error, match="`v7` for environment `CartPoleShift`"):
        make_envs(config("CartPoleShift-v7"))
    monkeypatch.setitem(sys.modules, "crafter", None)
    with pytest.raises(ModuleNotFoundError, match=r"nested-timescales\[crafter\]"):
        make_envs(config("crafter"))
    envs = GymEnvs(partial(telltale_slot, SEED), NUM, "inprocess")
    envs.reset()
    with pytest.raises(ValueError, match=r"\(4, 3\), expected \(4, 5\)"):
        envs.step(np.zeros((4, 3), np.float32))
    with pytest.raises(ValueError, match="3 slots loaded into 4"):
        envs.load_state_dict({f"slot{i}": {} for i in range(3)})


def test_units_divide_vector_observations_and_nothing_else():
    units = (0.5, 2.0, 0.1, 1.0)
    plain = make_envs(config("CartPole-v1"), seed=3)
    scaled = make_envs(config("CartPole-v1", units={"state": units}), seed=3)
    for a, b in zip(
        [plain.reset(), *rollout(plain, 40)], [scaled.reset(), *rollout(scaled, 40)], strict=True
    ):
        np.testing.assert_array_equal(
            b.obs["state"], a.obs["state"] / np.asarray(units, np.float32)
        )
        assert_rows_equal(b._replace(obs=a.obs), a)
    again = make_envs(config("CartPole-v1", units={"state": units}), seed=3)
    row = again.load_state_dict(scaled.state_dict())
    np.testing.assert_array_equal(row.obs["state"], b.obs["state"])


@pytest.mark.parametrize("units", [{"stat": (1.0,) * 4}, {"state": (1.0,) * 3}])
def test_units_that_do_not_fit_are_named(units: dict[str, Any]):
    with pytest.raises(ConfigError, match=r"there are \{'state': \(4,\)\}"):
        make_envs(config("CartPole-v1", units=units))
