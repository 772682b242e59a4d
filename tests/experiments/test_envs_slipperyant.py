"""SlipperyAnt: friction acts, by name or redrawn by steps lived, and an episode can be replayed."""

import sys
from typing import Any

import gymnasium
import numpy as np
import pytest

from experiments.config import ConfigError, load_config
from experiments.config.models import EnvConfig
from experiments.envs import Envs, Row, known, make_envs
from experiments.envs.known import check_env
from experiments.envs.slipperyant import (
    CONTEXTS,
    HIGHEST,
    ID,
    LOWEST,
    SlipperyAntEnv,
    friction_of,
)

pytest.importorskip("mujoco")


def push(env: gymnasium.Env, steps: int = 60, seed: int = 0) -> np.ndarray:
    """Observations and rewards (steps, 106) under random torques."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(steps):
        obs, reward, *_ = env.step(rng.uniform(-1, 1, 8).astype(np.float32))
        rows.append([*obs, reward])
    return np.array(rows)


def slide(env: SlipperyAntEnv) -> float:
    """How far the ant slides (m) after a shove of 3 m/s along the ground, its joints at rest."""
    env.reset(seed=0)
    ant = env._ant
    for _ in range(40):
        env.step(np.zeros(8, np.float32))
    start, speed = ant.data.qpos[0], ant.data.qvel.copy()
    speed[0] = 3.0
    ant.set_state(ant.data.qpos.copy(), speed)
    for _ in range(40):
        env.step(np.zeros(8, np.float32))
    return float(ant.data.qpos[0] - start)


def in_context(name: str, **kwargs: Any) -> SlipperyAntEnv:
    env = SlipperyAntEnv(**kwargs)
    env.reset(seed=0, options={"context": name})
    return env


def test_normal_is_ant_v5_bit_for_bit():
    ours, theirs = SlipperyAntEnv(), gymnasium.make("Ant-v5", disable_env_checker=True)
    assert ours.observation_space == theirs.observation_space
    assert ours.action_space == theirs.action_space
    for seed in (3, 4):
        start = ours.reset(seed=seed, options={"context": "normal"})[0]
        np.testing.assert_array_equal(start, theirs.reset(seed=seed)[0])
        np.testing.assert_array_equal(push(ours), push(theirs))


def test_the_less_friction_the_farther_it_slides():
    names = sorted(CONTEXTS, key=lambda name: CONTEXTS[name])
    assert names == ["ice", "wet", "normal", "rubber"]
    far = [slide(in_context(name)) for name in names]
    assert far == sorted(far, reverse=True) and far[0] > 2 * far[2]


def test_every_contact_has_the_context_s_friction():
    seen = []
    for name, friction in CONTEXTS.items():
        env = in_context(name)
        for _ in range(40):
            env.step(np.zeros(8, np.float32))
            seen += [(row[0], friction) for row in env._ant.data.contact.friction]
    assert {friction for _, friction in seen} == set(CONTEXTS.values())
    assert all(ours == theirs for ours, theirs in seen)


def test_episodes_are_replayed_in_any_order():
    env = SlipperyAntEnv()
    played = {}
    for name in [*CONTEXTS, *reversed(CONTEXTS)]:
        start = env.reset(seed=9, options={"context": name})[0]
        run = np.concatenate([start, push(env, 30).ravel()])
        np.testing.assert_array_equal(run, played.setdefault(name, run))
    assert len({run.tobytes() for run in played.values()}) == len(CONTEXTS)


def test_a_context_stays_and_an_oracle_sees_it():
    env = SlipperyAntEnv(oracle=True)
    told = [env.reset(seed=0, options=options)[0]["context"] for options in (
        None, {"context": "wet"}, None, {},
    )]  # fmt: skip
    assert [list(CONTEXTS)[hot.argmax()] for hot in told] == ["normal", "wet", "wet", "wet"]
    obs = env.step(np.zeros(8, np.float32))[0]
    assert env.observation_space.contains(obs) and obs["context"].tolist() == [0, 0, 1, 0]
    with pytest.raises(ValueError, match="'mud' of SlipperyAnt-v0 is unknown; choose from"):
        env.reset(seed=0, options={"context": "mud"})


# ---- without a signal ----------------------------------------------------------------------------
def test_the_law_of_frictions():
    drawn = np.array([friction_of(7, phase) for phase in range(2000)])
    assert drawn.min() >= LOWEST and drawn.max() <= HIGHEST
    decades = np.log(drawn / LOWEST) / np.log(
        HIGHEST / LOWEST
    )  # uniform where the law is log-uniform
    assert np.abs(np.quantile(decades, [0.1, 0.5, 0.9]) - [0.1, 0.5, 0.9]).max() < 0.03
    assert friction_of(7, 3) == drawn[3] != friction_of(8, 3)


def lived(env: gymnasium.Env, episodes: int, steps: int) -> list[float]:
    """The friction of each of so many episodes."""
    frictions = []
    for episode in range(episodes):
        frictions.append(env.reset(seed=episode)[1]["friction"])
        push(env, steps)
    return frictions


def test_friction_is_redrawn_by_steps_lived_between_episodes():
    phases = [0, 0, 0, 1, 1, 2, 2, 2]  # 20 steps each, redrawn every 50
    assert lived(SlipperyAntEnv(every=50, schedule=1), 8, 20) == [friction_of(1, p) for p in phases]
    assert len({friction_of(1, p) for p in phases}) == 3


def test_what_was_lived_brings_an_episode_back():
    env = SlipperyAntEnv(every=50)
    lived(env, 6, 20)
    start, info = env.reset(seed=11)
    expected = push(env, 30)
    following = env.reset(seed=12)[1]
    fresh = SlipperyAntEnv(every=50)
    again, resumed = fresh.reset(seed=11, options=info["resume"])
    np.testing.assert_array_equal(again, start)
    np.testing.assert_array_equal(push(fresh, 30), expected)
    assert resumed["friction"] == info["friction"] != friction_of(0, 0)
    assert fresh.reset(seed=12)[1]["friction"] == following["friction"] != info["friction"]


def test_its_oracle_sees_one_number():
    env = SlipperyAntEnv(every=20, oracle=True)
    for episode in range(4):
        obs, info = env.reset(seed=episode)
        told = float(obs["context"][0])
        assert LOWEST * (HIGHEST / LOWEST) ** told == pytest.approx(info["friction"], rel=1e-5)
        for _ in range(20):
            env.step(np.zeros(8, np.float32))
    assert env.observation_space.contains(obs)


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match="'ice': with every=5 SlipperyAnt-v0 redraws its friction"):
        SlipperyAntEnv(every=5).reset(seed=0, options={"context": "ice"})
    with pytest.raises(ValueError, match="every=-1: SlipperyAnt-v0 takes 0 or more"):
        SlipperyAntEnv(every=-1)


# ---- like any other environment ------------------------------------------------------------------
def config(**changes: Any) -> EnvConfig:
    return EnvConfig.model_validate(
        {"id": ID, "num": 2, "workers": "inprocess", "time_limit": 15, **changes}
    )


def played(envs: Envs, steps: int, seed: int) -> list[Row]:
    rng = np.random.default_rng(seed)
    return [envs.step(envs.random_action(rng)) for _ in range(steps)]


def assert_goes_on(chosen: EnvConfig, contexts: list[str] | None) -> None:
    """A state taken in the middle of an episode goes on, in fresh slots, bit for bit."""
    envs, again = make_envs(chosen, seed=5), make_envs(chosen, seed=5)
    envs.reset(contexts)
    row = played(envs, 40, seed=0)[-1]
    restored = again.load_state_dict(envs.state_dict())
    pairs = [(restored, row), *zip(played(again, 50, 1), played(envs, 50, 1), strict=True)]
    for ours, theirs in pairs:
        np.testing.assert_array_equal(ours.obs["state"], theirs.obs["state"])
        np.testing.assert_array_equal(ours.reward, theirs.reward)
        np.testing.assert_array_equal(ours.first, theirs.first)
    envs.close()
    again.close()


@pytest.mark.parametrize("workers", ["inprocess", pytest.param("process", marks=pytest.mark.slow)])
def test_slots_are_restored_in_their_contexts(workers: str):
    assert_goes_on(config(workers=workers), ["ice", "rubber"])


def test_slots_are_restored_where_friction_is_redrawn():
    chosen = config(kwargs={"every": 25, "schedule": 2})
    assert_goes_on(chosen, None)
    envs = make_envs(chosen, seed=5)
    envs.reset()
    played(envs, 40, seed=0)
    state = envs.state_dict()
    assert state["slot0"]["resume"] == {"lived": 30} and "context" not in state["slot0"]
    with pytest.raises(ValueError, match="no hidden contexts"):
        envs.reset("ice")


def test_it_is_known():
    assert known.OWN[ID] == tuple(CONTEXTS)
    check_env(load_config(None, [f"env.id={ID}", "env.contexts=[ice, rubber]"]))
    check_env(load_config(None, [f"env.id={ID}", "env.contexts=[]", "env.kwargs.every=1000"]))
    for changes, told in {
        ("env.contexts=[icy]",): "did you mean ice",
        ("env.contexts=[]", "env.kwargs.every=-1"): "it takes every: 0 to",
        ("env.contexts=[]", "env.kwargs.friction=1"): "it takes oracle: bool, every: int",
        ("env.contexts=[ice]", "env.kwargs.every=9"): "no hidden contexts with env.kwargs.every=9",
    }.items():
        with pytest.raises(ConfigError, match=told):
            check_env(load_config(None, [f"env.id={ID}", *changes]))


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(known, "find_spec", lambda package: None)
    with pytest.raises(ConfigError, match=r"mujoco.*\n?.*pip install 'nested-timescales\[mujoco"):
        check_env(load_config(None, [f"env.id={ID}", "env.contexts=[]"]))
    monkeypatch.setitem(sys.modules, "mujoco", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'nested-timescales\[mujoco\]'"):
        make_envs(config())
