"""Hidden contexts behind gymnasium's interface: named for all slots or each, kept, replayed."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from experiments.config import ConfigError, load_config
from experiments.config.models import EnvConfig
from experiments.envs import Envs, Row, make_envs
from experiments.envs.adapter import GymEnvs
from experiments.envs.known import OWN, TAKES, check_env
from experiments.envs.switch import SwitchEnv
from tests.experiments.test_envs_rows import assert_rows_equal, rollout
from tests.fakes import CONTEXTS, SHIFT, Telltale, shifting_slot, telltale_slot

SEED, NUM = 3, 4
Workers = Literal["inprocess", "process"]


def shifting(workers: Workers = "inprocess", seed: int = SEED) -> GymEnvs:
    return GymEnvs(partial(shifting_slot, seed), NUM, workers)


def shifts(row: Row) -> list[int]:
    """Which context each slot is in: its reward is the time and `SHIFT` for each before it."""
    return ((row.reward - row.obs["time"][:, 0]) / SHIFT).astype(int).tolist()


def advance(envs: Envs) -> Row:
    return rollout(envs, 1)[-1]


def test_a_context_is_named_for_all_slots_or_for_each_and_stays():
    envs = shifting()
    envs.reset()
    assert shifts(advance(envs)) == [0] * NUM
    envs.reset("more")
    for row in rollout(envs, 30):
        assert shifts(row._replace(reward=np.where(row.first, SHIFT, row.reward))) == [1] * NUM
    envs.reset()
    assert shifts(advance(envs)) == [1] * NUM
    envs.reset(("most", "plain", "more", "plain"))
    assert shifts(advance(envs)) == [2, 0, 1, 0]


@pytest.mark.parametrize(
    ("context", "told"),
    [
        ("mor", "context 'mor' is unknown; choose from plain, more, most"),
        (("more", "less", "plain", "plain"), "context 'less' is unknown"),
        (("more", "plain"), "2 contexts for 4 slots"),
    ],
)
def test_contexts_that_do_not_fit_are_named(context: Any, told: str):
    envs = shifting()
    before = envs.reset("most")
    with pytest.raises(ValueError, match=told):
        envs.reset(context)
    assert shifts(advance(envs)) == [2] * NUM and before.first.all()


@pytest.mark.parametrize("workers", ["inprocess", "process"])
def test_continues_in_the_context_of_each_slot(workers: Workers):
    envs = shifting(workers)
    envs.reset(("most", "plain", "more", "plain"))
    now = rollout(envs, 9)[-1]
    state = envs.state_dict()
    expected = rollout(envs, 20, seed=1)
    envs.close()
    fresh = shifting(workers, seed=99)
    fresh.reset("more")
    assert_rows_equal(fresh.load_state_dict(state), now)
    for ours, theirs in zip(rollout(fresh, 20, seed=1), expected, strict=True):
        assert_rows_equal(ours, theirs)
    fresh.close()


def test_without_contexts_a_state_tells_none():
    envs = GymEnvs(partial(telltale_slot, SEED), NUM, "inprocess")
    envs.reset()
    assert all(set(slot) == {"seed", "episode", "actions"} for slot in envs.state_dict().values())
    assert shifting().state_dict()["slot0"]["context"] == CONTEXTS[0]


# ---- an environment over several -----------------------------------------------------------------
class Counted:
    """Opens Telltale and counts how often, and how often it was closed."""

    def __init__(self, make: Callable[[], gymnasium.Env] = Telltale):
        self.opened, self.closed, self.make = 0, 0, make

    def __call__(self) -> gymnasium.Env:
        self.opened += 1
        env = self.make()
        env.close = self._close
        return env

    def _close(self) -> None:
        self.closed += 1


class Wider(Telltale):
    """One action more."""

    def __init__(self):
        super().__init__()
        self.action_space = spaces.Discrete(99)


def test_tasks_are_opened_when_needed_and_closed_together():
    tasks = {name: Counted() for name in "abc"}
    env = SwitchEnv("Tests-v0", tasks)
    env.reset(seed=0, options={"context": "c"})
    env.reset(options={"context": "a"})
    env.reset(options={"context": "c"})
    assert [task.opened for task in tasks.values()] == [1, 0, 1]
    env.close()
    assert [task.closed for task in tasks.values()] == [1, 0, 1]


def test_what_was_not_given_a_seed_follows_from_the_last_one():
    told = []
    for _ in range(2):
        env = SwitchEnv("Tests-v0", {name: Counted() for name in "ab"})
        env.reset(seed=7)
        told.append([env.reset(options={"context": "b"})[0]["seed"].tolist() for _ in range(3)])
    assert told[0] == told[1] and told[0][0] != told[0][1]


def test_tasks_need_the_same_spaces_and_a_name_that_exists():
    env = SwitchEnv("Tests-v0", {"a": Counted(), "wide": (wide := Counted(Wider))})
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"task 'wide' of Tests-v0 has the space Discrete\(99\)"):
        env.reset(options={"context": "wide"})
    assert wide.closed == 1
    with pytest.raises(ValueError, match="context 'b' of Tests-v0 is unknown"):
        env.reset(options={"context": "b"})


def test_an_oracle_tells_the_context_and_nothing_else_changes():
    plain, told = (
        SwitchEnv("Tests-v0", {name: Counted() for name in "ab"}, oracle=o) for o in (False, True)
    )
    for context, one_hot in (("a", [1, 0]), ("b", [0, 1])):
        seen = told.reset(seed=1, options={"context": context})[0]
        assert told.observation_space.contains(seen)
        assert seen.pop("context").tolist() == one_hot
        assert_same(seen, plain.reset(seed=1, options={"context": context})[0])
        seen = told.step(2)[0]
        assert seen.pop("context").tolist() == one_hot
        assert_same(seen, plain.step(2)[0])


def assert_same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        np.testing.assert_array_equal(value, theirs[name], name)


# ---- as configured -------------------------------------------------------------------------------
def check(*changes: str) -> None:
    check_env(load_config(None, ["env.id=MiniGrid3-v0", *changes]))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("env.contexts=[lava,simpel]", r"(?s)env.contexts.1 = simpel.*did you mean simple\?"),
        ("evaluate.contexts=[normal]", "one of doorkey, lava, simple"),
        ("env.kwargs={oracel: true}", r"(?s)env.kwargs.oracel.*it takes oracle: bool"),
        ("env.kwargs={oracle: 1}", r"(?s)env.kwargs.oracle = 1.*it takes oracle: bool"),
    ],
)
def test_what_does_not_fit_is_told_before_anything_is_opened(change: str, told: str):
    with pytest.raises(ConfigError, match=told):
        check(change)


def test_what_fits_passes():
    check("env.contexts=[lava,doorkey,lava]", "env.kwargs={oracle: true}", "env.pixels=true")
    assert TAKES.keys() <= OWN.keys()


@pytest.mark.parametrize("workers", ["inprocess", "process"])
def test_minigrid3_continues_bit_for_bit(workers: Workers):
    chosen = EnvConfig(id="MiniGrid3-v0", num=2, workers=workers, image_size=32)
    envs = make_envs(chosen, seed=5)
    envs.reset("lava")
    envs.reset(("simple", "doorkey"))
    now = rollout(envs, 30)[-1]
    state = envs.state_dict()
    expected = rollout(envs, 30, seed=1)
    envs.close()
    again = make_envs(chosen, seed=5)
    assert_rows_equal(again.load_state_dict(state), now)
    for ours, theirs in zip(rollout(again, 30, seed=1), expected, strict=True):
        assert_rows_equal(ours, theirs)
    again.close()
