"""CartPoleShift: gymnasium's physics, hidden contexts, independent slots, exact continuation."""

import warnings

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from experiments.envs.cartpole import (
    CONTEXTS,
    ID,
    START,
    CartPoleShiftEnvs,
    slot_keys,
    start_states,
)
from experiments.envs.cartpole import CartPoleShiftVectorEnv as VectorEnv
from experiments.envs.known import OWN

NAMES = list(CONTEXTS)


def steered(vector: VectorEnv) -> np.ndarray:
    """Actions that balance an unflipped pole."""
    _, velocity, angle, spin = vector.state
    return (angle + 0.3 * spin + 0.05 * velocity > 0).astype(int)


def reference(name: str, state: np.ndarray) -> gymnasium.Env:
    """Gymnasium's CartPole with the physics of a context, started at a state."""
    env = gymnasium.make("CartPole-v1").unwrapped
    env.reset(seed=0)
    context = CONTEXTS[name]
    for field, value in {
        "gravity": context.gravity,
        "length": context.half_length,
        "polemass_length": 0.1 * context.half_length,
        "force_mag": 10.0 * context.sign,
        "state": state.copy(),
    }.items():
        setattr(env, field, value)
    return env


@pytest.mark.parametrize("name", NAMES)
def test_physics_equals_gymnasium_step_by_step(name: str):
    vector = VectorEnv(3)
    vector.reset(seed=1, options={"context": name})
    rng = np.random.default_rng(0)
    env, steps = reference(name, vector.state[:, 1]), 0
    for _ in range(150):
        actions = rng.integers(0, 2, 3)
        obs, reward, terminated, _, _ = vector.step(actions)
        theirs, their_reward, their_end, _, _ = env.step(int(actions[1]))
        np.testing.assert_allclose(obs[1], theirs, rtol=1e-6, atol=1e-9)
        assert (reward[1], terminated[1]) == (their_reward, their_end)
        steps += 1
        if their_end:
            vector.step(actions)
            env = reference(name, vector.state[:, 1])
    assert steps == 150


def test_cap_is_truncation_and_contexts_matter():
    vector = VectorEnv(4)
    vector.reset(seed=0, options={"context": NAMES})
    lengths = np.zeros(4)
    alive = np.ones(4, bool)
    for _ in range(200):
        _, reward, terminated, truncated, _ = vector.step(steered(vector))
        lengths += alive * reward
        ended = terminated | truncated
        if truncated[0]:
            assert not terminated[0]
        alive &= ~ended
    assert lengths[NAMES.index("normal")] == 200 and truncated[0]
    assert lengths[NAMES.index("flipped")] < 20


def test_slots_may_have_different_contexts_and_observe_none():
    envs = CartPoleShiftEnvs(4)
    mixed = envs.reset(NAMES)
    alone = CartPoleShiftEnvs(4).reset("normal")
    assert set(mixed.obs) == {"state"}
    np.testing.assert_array_equal(mixed.obs["state"], alone.obs["state"])
    with pytest.raises(ValueError, match="'fliped' of CartPoleShift-v0 is unknown"):
        envs.reset("fliped")
    with pytest.raises(ValueError, match="3 contexts for 4 slots"):
        envs.reset(NAMES[:3])


def test_a_slot_does_not_depend_on_the_others():
    def play(num: int) -> list[np.ndarray]:
        envs, rng = CartPoleShiftEnvs(num, seed=7), np.random.default_rng(0)
        rows = [envs.reset()]
        for _ in range(100):
            choice = rng.integers(0, 2, 9)[:num]
            rows.append(envs.step(np.eye(2, dtype=np.float32)[choice]))
        return [np.append(row.obs["state"][1], row.first[1]) for row in rows]

    np.testing.assert_array_equal(play(2), play(9))


def test_start_states_are_uniform_and_differ_in_seed_slot_and_episode():
    episodes = np.repeat(np.arange(100, dtype=np.uint64), 100)
    states = start_states(np.tile(slot_keys(3, 100), 100), episodes)
    assert len(np.unique(states)) == states.size
    assert np.abs(states).max() < START
    np.testing.assert_allclose(states.mean(1), 0, atol=1.5e-3)
    np.testing.assert_allclose(states.std(1), START / np.sqrt(3), rtol=0.02)
    assert np.abs(np.corrcoef(states) - np.eye(4)).max() < 0.04
    assert not np.isin(states, start_states(np.tile(slot_keys(4, 100), 100), episodes)).any()


def test_rows_of_ends_and_restarts():
    envs = CartPoleShiftEnvs(8, limit=15)
    before, rng, kinds = envs.reset("heavy"), np.random.default_rng(0), set()
    assert before.first.all() and not before.reward.any()
    for _ in range(100):
        row = envs.step(envs.random_action(rng))
        np.testing.assert_array_equal(row.first, before.last)
        np.testing.assert_array_equal(row.reward, ~row.first)
        np.testing.assert_array_equal(row.action.sum(1), ~row.first)
        assert not (row.terminal & ~row.last).any()
        kinds |= set(zip(row.terminal.tolist(), row.last.tolist(), strict=True))
        before = row
    assert kinds == {(False, False), (True, True), (False, True)}


@pytest.mark.parametrize("past", [0, 1, 9, 14, 15, 16, 40])
def test_continues_bit_for_bit(past: int):
    envs, rng = CartPoleShiftEnvs(5, seed=2, limit=15), np.random.default_rng(0)
    row = envs.reset(["flipped", *NAMES])
    for _ in range(past):
        row = envs.step(envs.random_action(rng))
    state = envs.state_dict()
    actions = [envs.random_action(rng) for _ in range(40)]
    expected = [envs.step(action) for action in actions]
    fresh = CartPoleShiftEnvs(5, limit=15)
    np.testing.assert_array_equal(fresh.load_state_dict(state).last, row.last)
    for action, theirs in zip(actions, expected, strict=True):
        ours = fresh.step(action)
        np.testing.assert_array_equal(ours.obs["state"], theirs.obs["state"])
        for name in ("action", "reward", "first", "terminal", "last"):
            np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
    with pytest.raises(ValueError, match="5 slots loaded into 6"):
        CartPoleShiftEnvs(6).load_state_dict(state)


def test_the_configuration_knows_the_contexts():
    assert OWN[ID] == tuple(CONTEXTS)


def test_registered_with_gymnasium():
    single = gymnasium.make(ID)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*infinity")
        check_env(single.unwrapped, skip_render_check=True)
    first, _ = single.reset(seed=4)
    single.reset(seed=9)
    np.testing.assert_array_equal(single.reset(seed=4)[0], first)
    vector = gymnasium.make_vec(ID, 3, vectorization_mode="vector_entry_point")
    obs, _ = vector.reset(seed=4)
    np.testing.assert_array_equal(obs[0], first)
    ends = [bool(single.step(int(i % 2))[3]) for i in range(1, 10)]
    assert not any(ends)


def test_an_oracle_sees_the_context_of_every_slot():
    envs = CartPoleShiftEnvs(3, oracle=True)
    row = envs.reset(["heavy", "normal", "flipped"])
    assert envs.obs_spec["context"].shape == (4,)
    assert row.obs["context"].argmax(1).tolist() == [3, 0, 1]
    row = envs.step(np.eye(2, dtype=np.float32)[[0, 1, 0]])
    assert row.obs["context"].sum(1).tolist() == [1.0] * 3
    envs.reset("long")
    again = CartPoleShiftEnvs(3, oracle=True)
    assert again.load_state_dict(envs.state_dict()).obs["context"].argmax(1).tolist() == [2] * 3
    assert set(CartPoleShiftEnvs(3).reset().obs) == {"state"}
