"""Streams of gymnasium tasks: one set of spaces, contexts that differ, episodes that come again."""

import inspect
import re
import subprocess
import sys
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from experiments.config import ConfigError, load_config
from experiments.config.models import EnvConfig
from experiments.envs import cartpole, known, make_envs, open_env, recipes, slipperyant
from experiments.envs.build import CAPS
from experiments.envs.coinrun import MODES, STEPS, CoinRunEnv
from experiments.envs.known import EXTRAS, OWN, TAKES
from experiments.envs.packages import _beside, load
from experiments.envs.specs import SPECS
from experiments.envs.tasks import NAMES, STREAMS
from tests.experiments.test_envs_rows import assert_rows_equal, rollout

ACTIONS = {"MiniGrid3-v0": 7, "MiniHack4-v0": 8, "Atari6-v0": 18, "CoinRun6-v0": 15}
SIZES = {"MiniGrid3-v0": 56, "MiniHack4-v0": 84, "Atari6-v0": 210, "CoinRun6-v0": 64}
each_stream = pytest.mark.parametrize(
    "name", [n if n != "Atari6-v0" else pytest.param(n, marks=pytest.mark.slow) for n in STREAMS]
)


@cache
def there(name: str) -> bool:
    """Whether the package of a stream is installed."""
    package = next(package for prefix, (package, _) in EXTRAS.items() if name.startswith(prefix))
    try:
        return bool(load(package))
    except ModuleNotFoundError:
        return False


def opened(name: str) -> Any:
    """The stream, opened once for all tests; they are skipped where its package is missing."""
    if not there(name):
        pytest.skip(f"the package of {name} is not installed")
    return _opened(name)


@cache
def _opened(name: str) -> gymnasium.Env:
    return open_env(name)


def episode(env: Any, seed: int, context: str, steps: int = 25) -> list[np.ndarray]:
    """Every image of an episode of random actions, and its rewards."""
    rng = np.random.default_rng(0)
    seen, rewards = [env.reset(seed=seed, options={"context": context})[0]], []
    for _ in range(steps):
        obs, reward, terminated, truncated, _ = env.step(int(rng.integers(env.action_space.n)))
        seen.append(obs)
        rewards.append(reward)
        if terminated or truncated:
            break
    return [*(obs["image"] if isinstance(obs, dict) else obs for obs in seen), np.array(rewards)]


def same(ours: list[np.ndarray], theirs: list[np.ndarray]) -> bool:
    return len(ours) == len(theirs) and all(map(np.array_equal, ours, theirs))


@each_stream
def test_contexts_share_their_spaces_and_differ_in_what_is_seen(name: str):
    env = opened(name)
    assert env.action_space == gymnasium.spaces.Discrete(ACTIONS[name])
    seen = {c: [episode(env, seed, c) for seed in (1, 2, 3)] for c in OWN[name]}
    for episodes in seen.values():
        image = episodes[0][0]
        assert image.shape[0] == SIZES[name] and image.shape[2] == 3 and image.dtype == np.uint8
        assert image.std() > 0
    for a, b in combinations(seen.values(), 2):
        assert not all(map(same, a, b))


@each_stream
def test_an_episode_follows_from_its_seed_and_its_context(name: str):
    env, steps = opened(name), 100 if name == "Atari6-v0" else 25
    first = {context: episode(env, 5, context, steps) for context in OWN[name]}
    for context, images in first.items():
        assert same(images, episode(env, 5, context, steps))
        assert not same(images, episode(env, 6, context, steps))
    again = open_env(name)
    assert same(first[OWN[name][1]], episode(again, 5, OWN[name][1], steps))
    again.close()


@each_stream
def test_a_restored_slot_goes_on_in_its_context(name: str):
    opened(name)
    chosen = EnvConfig(id=name, num=1, workers="inprocess", image_size=32)
    envs = make_envs(chosen, seed=5)
    envs.reset(OWN[name][-1])
    now = rollout(envs, 40)[-1]
    state = envs.state_dict()
    expected = rollout(envs, 40, seed=1)
    envs.close()
    again = make_envs(chosen, seed=6)
    assert_rows_equal(again.load_state_dict(state), now)
    for ours, theirs in zip(rollout(again, 40, seed=1), expected, strict=True):
        assert_rows_equal(ours, theirs)
    again.close()


@each_stream
def test_gymnasium_makes_it_and_an_oracle_tells_the_context(name: str):
    opened(name)
    env = gymnasium.make(name, oracle=True)
    check_env(env.unwrapped, skip_render_check=True)
    for i, context in enumerate(OWN[name][:2]):
        obs, _ = env.reset(seed=0, options={"context": context})
        assert env.observation_space.contains(obs)
        assert obs["context"].tolist() == np.eye(len(OWN[name]))[i].tolist()
    env.close()


def test_names_are_those_of_the_tasks():
    assert {name: OWN[name] for name in STREAMS} == NAMES
    assert CAPS.keys() >= STREAMS.keys() - {"Atari6-v0"}


def test_minigrid3_is_cut_off_after_its_hundred_steps():
    env = opened("MiniGrid3-v0")
    env.reset(seed=0, options={"context": "doorkey"})
    ends = [env.step(0)[2:4] for _ in range(100)]
    assert ends == [(False, False)] * 99 + [(False, True)]
    assert env.unwrapped.task.unwrapped.grid.width == 9
    short = open_env("MiniGrid3-v0", time_limit=2)
    short.reset(seed=0)
    assert [short.step(0)[3] for _ in range(2)] == [False, True]


def test_a_wall_costs_a_little_in_minihack4():
    env = opened("MiniHack4-v0")
    env.reset(seed=0, options={"context": "room"})
    rewards = {round(env.step(0)[1], 6) for _ in range(40)}  # north until a wall, and into it
    assert rewards == {0.0, -0.001}


def test_atari6_has_every_action_sticky_ones_and_four_frames_a_step():
    env = opened("Atari6-v0")
    for context in OWN["Atari6-v0"]:
        env.reset(seed=0, options={"context": context})
        game = env.unwrapped.task
        assert game.spec.kwargs["repeat_action_probability"] == 0.25
        assert game.spec.kwargs["frameskip"] == 4


def test_coinrun_ends_with_the_frame_before_and_says_how():
    opened("CoinRun6-v0")
    ends = set()
    env = CoinRunEnv()
    for seed in (1, 6):  # waits to the end; runs into something
        env.reset(seed=seed)
        rng = np.random.default_rng(0)
        image, over, steps = None, False, 0
        while not over:
            before = image
            image, _, terminated, truncated, _ = env.step(int(rng.integers(15)) if seed == 6 else 4)
            over, steps = terminated or truncated, steps + 1
        assert (steps == STEPS) == truncated and image is before
        ends.add((terminated, truncated))
    assert ends == {(True, False), (False, True)}
    env.close()


def test_coinrun_takes_procgens_options_and_no_others():
    opened("CoinRun6-v0")
    takes = set(inspect.signature(CoinRunEnv).parameters) - {"render_mode"}
    assert takes == TAKES["CoinRun-v0"].keys() == CoinRunEnv().options.keys()
    with pytest.raises(ValueError, match="'medium' of CoinRun-v0 is unknown; choose from easy"):
        CoinRunEnv(distribution_mode="medium")
    easy, hard = (CoinRunEnv(distribution_mode=mode).reset(seed=1)[0] for mode in MODES)
    assert not np.array_equal(easy, hard)


def test_other_tasks_of_minihack_are_pixels_too():
    opened("MiniHack4-v0")
    known.check_env(load_config(None, ["env.id=MiniHack-Corridor-R2-v0"]))
    env = open_env("MiniHack-Corridor-R2-v0")
    assert env.reset(seed=0)[0]["image"].shape == (84, 84, 3)
    env.close()


def test_what_a_package_asks_for_in_vain_is_given_and_taken_back():
    opened("MiniHack4-v0")
    told = sys.modules.get("pkg_resources")
    assert told is None or told.__spec__ is not None, "the stand-in was left behind"
    assert Path(_beside("minihack", "tiles")) == Path(load("minihack").__path__[0]) / "tiles"


def test_what_cannot_be_an_extra_says_what_installs_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(known, "find_spec", lambda package: None)
    with pytest.raises(ConfigError, match="pip install --no-deps procgen-mirror gym3 imageio"):
        known.check_env(load_config(None, ["env.id=CoinRun6-v0"]))


def test_importing_environments_registers_them_and_opens_nothing():
    code = f"""
import sys, gymnasium, experiments.envs
assert not {{"torch", "minigrid", "experiments.envs.build"}} & set(sys.modules)
for name in {sorted(OWN.keys() - {"UserPop-v0"})}:
    gymnasium.spec(name)
print(gymnasium.make("CartPoleShift-v0").spec.max_episode_steps)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == [str(cartpole.CAP)], done.stderr


def test_registered_steps_are_those_of_the_environments():
    told = {name: spec.max_episode_steps for name, spec in SPECS.items()}
    assert told[cartpole.ID] == cartpole.CAP and told[recipes.ID] == recipes.STEPS
    assert told[slipperyant.ID] == slipperyant.STEPS
    assert told["MiniGrid3-v0"] == told["MiniHack4-v0"] == 100 and told["Atari6-v0"] is None


def test_readme_lists_every_context():
    readme = (Path(__file__).parents[2] / "README.md").read_text("utf-8")
    for name in OWN.keys() - {"UserPop-v0"}:
        named = re.findall(rf"^\| `{name}` \| (.*?) \|", readme, re.MULTILINE)
        assert (tuple(re.findall(r"`(\w+)`", named[0])) if named else ()) == OWN[name], name
