"""Scripted experts, as noisy as asked for: the teachers of offline data.

In rooms of MiniGrid: the shortest way over positions and directions to the goal; where a door is in
the way, it opens that one first, and fetches its key before. In Recipes: a recipe's things, then
the bench; noise is in its steps alone, so it never crafts what is no recipe. Experts read the
simulator, not the observation.
"""

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from experiments.config import ConfigError
from experiments.config.models import EnvConfig
from experiments.envs import recipes
from experiments.envs.adapter import GymEnvs
from experiments.envs.build import cap_of, open_env
from experiments.envs.rows import Row, encode_choices
from experiments.envs.slot import Slot
from experiments.policies import Policy

LEFT, RIGHT, FORWARD, PICKUP, TOGGLE = 0, 1, 2, 3, 5
AHEAD = ((1, 0), (0, 1), (-1, 0), (0, -1))  # of each direction

Place = tuple[int, int]
Pose = tuple[int, int, int]  # x, y, direction


class Script(NamedTuple):
    """What an expert does next in a room, and which of its actions noise may take the place of."""

    act: Callable[[Any], int]
    noisy: tuple[int, ...]  # replaced by one another


def script_of(name: str) -> Script:
    """The expert of an environment. Raises ConfigError where there is none."""
    if name == recipes.ID:
        return Script(next_errand, (recipes.LEFT, recipes.RIGHT, recipes.UP, recipes.DOWN))
    if name.startswith("MiniGrid-"):
        return Script(next_action, tuple(range(7)))
    way_out = "use --policy random, or a run's folder"
    known = f"the expert knows rooms of MiniGrid and {recipes.ID}"
    raise ConfigError("env.id", name, known, way_out)


def expert_envs(config: EnvConfig, num: int, noise: float, seed: int = 0) -> tuple[GymEnvs, Policy]:
    """Slots of a room in this process, and the expert that plays in them.

    noise: share of the actions that may be noisy which are uniform among those instead.
    """
    rooms: list[Any] = []
    script = script_of(config.id)

    def make(slot: int) -> Slot:
        env = open_env(config.id, config.pixels, dict(config.kwargs), config.time_limit)
        rooms.append(env.unwrapped)
        return Slot(env, seed, slot, config.image_size, config.action_repeat)

    envs = GymEnvs(make, num, "inprocess", cap_of(config.id, config.time_limit))
    slots, rng = rooms[-num:], np.random.default_rng([seed, 1])  # a first one was a probe

    def act(row: Row) -> np.ndarray:
        del row  # an ended episode's room still stands, and its action is ignored
        wanted = np.array([[script.act(room)] for room in slots])
        drawn = rng.choice(script.noisy, wanted.shape)
        noisy = (rng.random(wanted.shape) < noise) & np.isin(wanted, script.noisy)
        return encode_choices(np.where(noisy, drawn, wanted), envs.action_spec)

    return envs, act


# ---- Recipes -----------------------------------------------------------------------------------
def next_errand(room: Any) -> int:
    """The next action towards the nearest recipe that can still be made; a step where none can."""
    able = [recipe for recipe in recipes.RECIPES if makes(room, recipe)]
    if not able:
        return recipes.LEFT
    return errand(room, min(able, key=lambda recipe: min(distances(room, recipe), default=0)))


def makes(room: Any, bundle: recipes.Bundle) -> bool:
    """Whether what is held is of the bundle, and the rest of it lies on the floor."""
    return room.held <= bundle and bundle - room.held <= room.lying.keys()


def distances(room: Any, bundle: recipes.Bundle) -> list[int]:
    """Steps to each thing of the bundle that is not held yet."""
    (x, y), missing = room.agent, bundle - room.held
    return [abs(room.lying[k][0] - x) + abs(room.lying[k][1] - y) for k in sorted(missing)]


def errand(room: Any, bundle: recipes.Bundle) -> int:
    """The next action of one who fetches a bundle, nearest things first, and crafts it."""
    missing = sorted(bundle - room.held)
    if not missing:
        return recipes.CRAFT if room.agent == room.bench else step_to(room, room.bench)
    nearest = missing[int(np.argmin(distances(room, bundle)))]
    place = room.lying[nearest]
    return recipes.PICK if room.agent == place else step_to(room, place)


def step_to(room: Any, place: Place) -> int:
    """A step on the longer axis."""
    dx, dy = (b - a for a, b in zip(room.agent, place, strict=True))
    if abs(dx) >= abs(dy):
        return recipes.RIGHT if dx > 0 else recipes.LEFT
    return recipes.DOWN if dy > 0 else recipes.UP


# ---- MiniGrid ----------------------------------------------------------------------------------
def next_action(room: Any) -> int:
    """The first action of a shortest way on, in a MiniGridEnv; a turn where there is none."""
    goals = list(find(room, "goal"))
    way = shortest(room, lambda pose: pose[:2] in goals)
    if way is not None:
        return way[0] if way else LEFT
    doors = [(x, y) for x, y in find(room, "door") if not room.grid.get(x, y).is_open]
    colours = {room.grid.get(x, y).color for x, y in doors if room.grid.get(x, y).is_locked}
    keys = [(x, y) for x, y in find(room, "key") if room.grid.get(x, y).color in colours]
    targets, act = (keys, PICKUP) if keys and room.carrying is None else (doors, TOGGLE)
    way = shortest(room, lambda pose: front(pose) in targets)
    if way is None:
        return LEFT
    return way[0] if way else act


def find(room: Any, kind: str) -> Iterator[Place]:
    """Where things of a kind lie."""
    for y in range(room.grid.height):
        for x in range(room.grid.width):
            cell = room.grid.get(x, y)
            if cell is not None and cell.type == kind:
                yield x, y


def shortest(room: Any, done: Any) -> list[int] | None:
    """Turns and steps to the nearest pose that is `done`; None where there is no way."""
    x, y = (int(v) for v in room.agent_pos)
    start: Pose = (x, y, int(room.agent_dir))
    ways: dict[Pose, list[int]] = {start: []}
    waiting = deque([start])
    while waiting:
        pose = waiting.popleft()
        if done(pose):
            return ways[pose]
        for action, after in moves(room, pose):
            if after not in ways:
                ways[after] = [*ways[pose], action]
                waiting.append(after)
    return None


def moves(room: Any, pose: Pose) -> Iterator[tuple[int, Pose]]:
    """Actions from a pose, and where they lead."""
    x, y, direction = pose
    yield LEFT, (x, y, (direction - 1) % 4)
    yield RIGHT, (x, y, (direction + 1) % 4)
    ahead = front(pose)
    cell = room.grid.get(*ahead)
    if cell is None or (cell.can_overlap() and cell.type != "lava"):
        yield FORWARD, (*ahead, direction)


def front(pose: Pose) -> Place:
    """The cell that a pose faces."""
    x, y, direction = pose
    return x + AHEAD[direction][0], y + AHEAD[direction][1]
