"""CrafterShift: every rule of every context acts, and no environment sees another's rules."""

import copy
import importlib
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env as check

from experiments.config import ConfigError, load_config
from experiments.config.models import EnvConfig
from experiments.envs import Envs, Row, known, make_envs
from experiments.envs.crafter import CrafterEnv
from experiments.envs.craftershift import CONTEXTS, ID, TABLES, CrafterShiftEnv, tables
from experiments.envs.known import check_env

pytest.importorskip("crafter")

SMALL: dict[str, Any] = {"area": (14, 14)}  # a world of 64 x 64 takes 0.8 s to make
STORE = 9  # what a pocket holds of each item


def actions() -> list[str]:
    return vars(importlib.import_module("crafter.constants"))["actions"]


@pytest.fixture(scope="module")
def envs() -> Mapping[str, CrafterShiftEnv]:
    """One environment for each context, in one process, all with the same world."""
    made = {context: CrafterShiftEnv(**SMALL) for context in CONTEXTS}
    for context, env in made.items():
        env.reset(seed=1, options={"context": context})
    return made


def inside(env: CrafterShiftEnv) -> Any:
    """Crafter's own environment, as it is in this context."""
    return env._world._crafter


def act(env: CrafterShiftEnv, name: str) -> dict[str, Any]:
    """One action of the name that it has in the normal context; what was gained and lost by it."""
    player = inside(env)._player
    before = dict(player.inventory)
    env.step(actions().index(name))
    needs = ("health", "food", "drink", "energy")
    return {
        item: amount - before[item]
        for item, amount in player.inventory.items()
        if amount != before[item] and item not in needs
    }


def stand(env: CrafterShiftEnv, block: str, inventory: Mapping[str, int], near: str = "") -> None:
    """The player, well, on grass before a block, with these things and perhaps a block beside."""
    player, world = inside(env)._player, inside(env)._world
    for member in list(world.objects):
        if member is not player:
            world.remove(member)
    player.inventory |= {item: inventory.get(item, 0) for item in player.inventory}
    player.inventory |= dict.fromkeys(("health", "food", "drink", "energy"), STORE)
    player.facing, player.sleeping = (0, 1), False
    x, y = player.pos
    world[x - 1 : x + 2, y - 1 : y + 2] = "grass"
    world[x, y + 1] = block
    for column, name in enumerate(filter(None, near.split("+")), start=x - 1):
        world[column, y - 1] = name


def walk(env: CrafterShiftEnv, steps: int = 40, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [env.step(int(rng.integers(17)))[0] for _ in range(steps)]


# ---- one process, one look -----------------------------------------------------------------------
def test_normal_is_crafter_bit_for_bit():
    ours, theirs = CrafterShiftEnv(**SMALL), CrafterEnv(**SMALL)
    assert ours.observation_space == theirs.observation_space
    assert ours.action_space == theirs.action_space
    np.testing.assert_array_equal(ours.reset(seed=5)[0], theirs.reset(seed=5)[0])
    rng = np.random.default_rng(0)
    for action in rng.integers(17, size=150):
        obs, reward, dead, _, info = ours.step(int(action))
        expected = theirs.step(int(action))
        np.testing.assert_array_equal(obs, expected[0])
        assert (reward, dead) == expected[1:3]
        assert info["inventory"] == expected[4]["inventory"]
        if dead:
            break


def test_contexts_look_alike_and_part_ways(envs: Mapping[str, CrafterShiftEnv]):
    starts = [env.reset(seed=8, options={"context": c})[0] for c, env in envs.items()]
    for start in starts[1:]:
        np.testing.assert_array_equal(start, starts[0])


def test_environments_do_not_disturb_each_other():
    own = vars(importlib.import_module("crafter.constants"))
    before = copy.deepcopy({name: own[name] for name in TABLES})
    pair = [CrafterShiftEnv(**SMALL), CrafterShiftEnv(**SMALL)]
    names = ("inverted", "hungry")
    alone = []
    for env, name in zip(pair, names, strict=True):
        env.reset(seed=2, options={"context": name})
        alone.append(walk(env))
    for env, name in zip(pair, names, strict=True):
        env.reset(seed=2, options={"context": name})
    rng = np.random.default_rng(0)
    for step, action in enumerate(rng.integers(17, size=40)):
        for env, expected in zip(pair, alone, strict=True):
            np.testing.assert_array_equal(env.step(int(action))[0], expected[step])
    assert {name: own[name] for name in TABLES} == before
    assert any((a != b).any() for a, b in zip(*alone, strict=True))


def test_a_context_stays_until_another_is_named():
    env = CrafterShiftEnv(oracle=True, **SMALL)
    assert env.observation_space["context"].shape == (len(CONTEXTS),)  # type: ignore[index]
    told = [env.reset(seed=3, options=options)[0]["context"] for options in (
        None, {"context": "tools"}, {}, None, {"context": "normal"},
    )]  # fmt: skip
    assert [list(CONTEXTS)[hot.argmax()] for hot in told] == [
        "normal", "tools", "tools", "tools", "normal",
    ]  # fmt: skip
    assert all(hot.sum() == 1 and hot.dtype == np.float32 for hot in told)
    assert env.observation_space.contains(env.step(0)[0])
    with pytest.raises(
        ValueError, match=r"'tool' of CrafterShift-v0 is unknown; choose from \['nor"
    ):
        env.reset(seed=3, options={"context": "tool"})


def test_gymnasium_finds_no_fault():
    check(CrafterShiftEnv(oracle=True, **SMALL), skip_render_check=True)


def test_worlds_without_a_seed_follow_from_the_last_one():
    env = CrafterShiftEnv(**SMALL)
    runs = []
    for _ in range(2):
        env.reset(seed=4)
        runs.append([env.reset(options={"context": c})[0] for c in ("normal", "costs")])
    np.testing.assert_array_equal(runs[0], runs[1])
    assert (runs[0][0] != runs[0][1]).any()


# ---- every rule acts -----------------------------------------------------------------------------
NEAR = "table+furnace"


@pytest.mark.parametrize("made", CONTEXTS["costs"].uses)
def test_costs(made: str, envs: Mapping[str, CrafterShiftEnv]):
    price = {c: {**tables(CONTEXTS[c])["place"], **tables(CONTEXTS[c])["make"]} for c in envs}
    normal, other = price["normal"][made]["uses"], price["costs"][made]["uses"]
    kind = "place" if made in ("table", "furnace") else "make"
    for context, paid, refused in (("costs", other, normal), ("normal", normal, other)):
        env = envs[context]
        stand(env, "grass", refused, NEAR)
        enough = all(refused.get(item, 0) >= amount for item, amount in paid.items())
        assert enough or not act(env, f"{kind}_{made}")
        stand(env, "grass", paid, NEAR)
        gained = {made: 1} if kind == "make" else {}
        assert act(env, f"{kind}_{made}") == {**gained, **{i: -n for i, n in paid.items()}}
    assert normal != other and any(normal.get(item, 0) < amount for item, amount in other.items())


@pytest.mark.parametrize("block", CONTEXTS["tools"].tools)
def test_tools(block: str, envs: Mapping[str, CrafterShiftEnv]):
    needed = {c: tables(CONTEXTS[c])["collect"][block]["require"] for c in ("normal", "tools")}
    for context, other in (("normal", "tools"), ("tools", "normal")):
        stand(envs[context], block, needed[other])
        assert not act(envs[context], "do")
        stand(envs[context], block, needed[context])
        assert act(envs[context], "do") == {block: 1}


@pytest.mark.parametrize(("block", "role"), CONTEXTS["swapped"].roles.items())
def test_swapped(block: str, role: str, envs: Mapping[str, CrafterShiftEnv]):
    collect = tables(CONTEXTS["normal"])["collect"]
    env, other = envs["swapped"], envs["normal"]
    stand(env, block, collect[role]["require"])
    assert act(env, "do") == collect[role]["receive"]
    stand(other, block, collect[block]["require"])
    assert act(other, "do") == collect[block]["receive"]
    grounds = [inside(e)._world[tuple(np.add(inside(e)._player.pos, (0, 1)))] for e in (env, other)]
    assert grounds[0] == grounds[1] == (collect[block]["leaves"], None)


@pytest.mark.parametrize(("act_of", "does"), CONTEXTS["inverted"].acts.items())
def test_inverted(act_of: str, does: str, envs: Mapping[str, CrafterShiftEnv]):
    went = {}
    for context in ("normal", "inverted"):
        for name in (act_of, does):
            env = envs[context]
            stand(env, "grass", {})
            start = inside(env)._player.pos.copy()
            act(env, name)
            went[context, name] = tuple(inside(env)._player.pos - start)
            inside(env)._world.move(inside(env)._player, start)
    assert went["inverted", act_of] == went["normal", does] != went["normal", act_of]
    assert went["inverted", does] == went["normal", act_of]


def test_hungry_needs_and_plants(envs: Mapping[str, CrafterShiftEnv]):
    fell, found = {}, {}
    for context in ("normal", "hungry"):
        env = envs[context]
        env.reset(seed=6, options={"context": context})
        player = inside(env)._player
        for _ in range(4 * 26):
            stand(env, "grass", {})
            before = dict(player.inventory)
            act(env, "do")
            for need in ("food", "drink", "energy"):
                fell[context, need] = (
                    fell.get((context, need), 0) + before[need] - player.inventory[need]
                )
        found[context] = player.achievements["collect_sapling"]
    assert [fell["normal", need] for need in ("food", "drink", "energy")] == [4, 4, 3]
    assert [fell["hungry", need] for need in ("food", "drink", "energy")] == [11, 14, 9]
    assert 0 < found["hungry"] * 2 < found["normal"]


def test_sleep_is_as_restful_when_hungry(envs: Mapping[str, CrafterShiftEnv]):
    rested = []
    for context in ("normal", "hungry"):
        env = envs[context]
        stand(env, "grass", {})
        player = inside(env)._player
        player.inventory["energy"], player._fatigue = 3, 0
        act(env, "sleep")
        player._fatigue = 0
        for _ in range(22):
            act(env, "noop")
        rested.append(player.inventory["energy"])
    assert rested[0] == rested[1] == 5


@pytest.mark.parametrize("context", CONTEXTS)
def test_all_achievements_can_be_unlocked(context: str):
    rules = tables(CONTEXTS[context])
    have: set[str] = set()
    done: set[str] = {"eat_cow", "defeat_zombie", "defeat_skeleton", "wake_up"}
    for _ in range(20):
        for info in rules["collect"].values():
            if set(info["require"]) <= have and info.get("probability", 1) > 0:
                have |= set(info["receive"])
                done |= {f"collect_{item}" for item in info["receive"]}
        for kind in ("place", "make"):
            for name, info in rules[kind].items():
                assert max(info["uses"].values()) <= STORE
                if set(info["uses"]) | set(info.get("nearby", ())) <= have:
                    have.add(name)
                    done.add(f"{kind}_{name}")
    if "place_plant" in done:
        done.add("eat_plant")
    assert done == set(rules["achievements"])
    assert sorted(rules["actions"]) == sorted(actions())


# ---- like any other environment ------------------------------------------------------------------
def config(**changes: Any) -> EnvConfig:
    small = {"length": 12, "area": [14, 14]}
    given = {"id": ID, "num": 2, "workers": "inprocess", "image_size": 32, "kwargs": small}
    return EnvConfig.model_validate({**given, **changes})


def played(envs: Envs, steps: int, seed: int) -> list[Row]:
    rng = np.random.default_rng(seed)
    return [envs.step(envs.random_action(rng)) for _ in range(steps)]


def test_slots_are_restored_in_their_contexts():
    envs, again = make_envs(config(), seed=3), make_envs(config(), seed=3)
    assert envs.cap == 22 and envs.action_spec.sizes == (17,)
    envs.reset(["swapped", "hungry"])
    row = played(envs, 20, seed=0)[-1]
    state = envs.state_dict()
    assert [state[f"slot{slot}"]["context"] for slot in range(2)] == ["swapped", "hungry"]
    restored = again.load_state_dict(state)
    pairs = [(restored, row), *zip(played(again, 8, 1), played(envs, 8, 1), strict=True)]
    for ours, theirs in pairs:
        np.testing.assert_array_equal(ours.obs["image"], theirs.obs["image"])
        np.testing.assert_array_equal(ours.reward, theirs.reward)
        np.testing.assert_array_equal(ours.first, theirs.first)


def test_it_is_known():
    assert known.OWN[ID] == tuple(CONTEXTS)
    check_env(load_config(None, [f"env.id={ID}", "env.contexts=[normal, tools]"]))
    for change, told in {
        "env.contexts=[tool]": "did you mean tools",
        "env.kwargs.oracel=true": "it takes oracle: bool, length: int",
        "env.kwargs.length=0": "it takes length: 1 to 1000000",
    }.items():
        with pytest.raises(ConfigError, match=told):
            check_env(load_config(None, [f"env.id={ID}", "env.contexts=[]", change]))


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(known, "find_spec", lambda package: None)
    with pytest.raises(ConfigError, match=r"crafter.*\n?.*pip install 'nested-timescales\[crafter"):
        check_env(load_config(None, [f"env.id={ID}", "env.contexts=[]"]))
    monkeypatch.setitem(sys.modules, "crafter", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'nested-timescales\[crafter\]'"):
        make_envs(config())
