"""Recipes: what the bench does, what the picture shows, and an expert that never crafts wrongly."""

import numpy as np
import pytest

from experiments.config import ConfigError, load_config
from experiments.config.models import EnvConfig
from experiments.data.clips import Clips, record
from experiments.data.expert import errand, expert_envs, script_of
from experiments.envs import make_envs
from experiments.envs.known import check_env
from experiments.envs.recipes import (
    COLOURS,
    CRAFT,
    FIBRE,
    PICK,
    POCKET,
    RECIPES,
    RIGHT,
    SHELF,
    SIDE,
    STONE,
    TOOL,
    WOOD,
    RecipesEnv,
)

CONFIG = EnvConfig(id="Recipes-v0", num=4, workers="inprocess", image_size=32)


def ready(bundle: frozenset[int], seed: int = 0) -> RecipesEnv:
    """A room in which a bundle is held and the agent stands at the bench."""
    env = RecipesEnv()
    env.reset(seed=seed)
    while (action := errand(env, bundle)) != CRAFT:
        env.step(action)
    return env


def cell(image: np.ndarray, x: int, y: int) -> list[int]:
    return image[y * SIDE, x * SIDE].tolist()


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_makes_a_tool_and_ends_the_episode(recipe: frozenset[int]):
    env = ready(recipe)
    assert env.held == recipe
    image, reward, terminated, truncated, _ = env.step(CRAFT)
    assert (reward, terminated, truncated) == (1.0, True, False)
    assert cell(image, SHELF, 7) == [*TOOL] and not env.held


@pytest.mark.parametrize("bundle", [{WOOD}, {STONE}, {FIBRE}, {STONE, FIBRE}], ids=str)
def test_anything_else_is_lost_for_good(bundle: set[int]):
    env = ready(frozenset(bundle))
    before = env.render()
    assert all(cell(before, POCKET[k], 7) == COLOURS[k].tolist() for k in bundle)
    image, reward, terminated, _, _ = env.step(CRAFT)
    assert (reward, terminated) == (0.0, False)
    assert not env.held and not bundle & env.lying.keys()
    assert all(cell(image, POCKET[k], 7) != COLOURS[k].tolist() for k in bundle)


def test_away_from_the_bench_nothing_happens_and_hands_are_two():
    env = ready(RECIPES[0])
    env.bench = env.beyond(RIGHT) if env.beyond(RIGHT) != env.agent else env.beyond(0)
    before = env.render()
    assert env.step(CRAFT)[1] == 0.0 and env.held == RECIPES[0]
    assert np.array_equal(env.render(), before)
    env.agent = env.lying[FIBRE]
    env.step(PICK)
    assert env.held == RECIPES[0] and FIBRE in env.lying


def test_rooms_differ_by_seed_and_nothing_shares_a_cell():
    rooms = []
    for seed in range(20):
        env = RecipesEnv(size=3)
        env.reset(seed=seed)
        places = [env.agent, env.bench, *env.lying.values()]
        assert len(set(places)) == 5 and max(max(p) for p in places) < 3
        rooms.append(tuple(places))
    assert len(set(rooms)) > 15
    with pytest.raises(ValueError, match="3 to 6"):
        RecipesEnv(size=7)


def test_the_expert_never_crafts_what_is_no_recipe():
    envs, policy = expert_envs(CONFIG, 4, noise=0.6)
    clips = Clips.open(record(envs, policy, 600, "data"))
    bundles: set[frozenset[int]] = set()
    for episode in clips.episodes:
        rows = clips.read(episode, 0, episode.length)
        crafts = rows["action"][:, CRAFT] > 0
        assert np.array_equal(crafts, rows["reward"] > 0)
        held = rows["obs.image"][:, -1, [p * 4 for p in POCKET]]  # 32 pixels: cells of four
        bundles |= {frozenset(np.flatnonzero(h).tolist()) for h in (held == COLOURS).all(-1)}
    assert bundles == {frozenset(x) for x in ((), {0}, {1}, {2}, *RECIPES)}  # and never {1, 2}


def test_it_is_an_environment_like_the_others():
    check_env(load_config(None, ["env.id=Recipes-v0", "env.contexts=[]"]))
    with pytest.raises(ConfigError, match="Recipes-v0"):
        check_env(load_config(None, ["env.id=Recipe-v0", "env.contexts=[]"]))
    with pytest.raises(ConfigError, match="MiniGrid and Recipes-v0"):
        script_of("CartPole-v1")
    envs = make_envs(CONFIG.model_copy(update={"time_limit": 6}), seed=3)
    assert envs.cap == 1.0 and envs.action_spec.sizes == (6,)
    rows = [envs.reset()]
    still = np.eye(6, dtype=np.float32)[[CRAFT] * 4]
    for _ in range(6):
        rows.append(envs.step(still))
    assert rows[-1].last.all() and not rows[-1].terminal.any()
    envs.close()
