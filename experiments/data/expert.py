"""A scripted expert for rooms of MiniGrid, as noisy as asked for: the teacher of offline data.

It searches the shortest way over positions and directions to the goal; where a door is in the way,
it opens that one first, and fetches its key before. It reads the simulator, not the observation.
"""

from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np

from experiments.config.models import EnvConfig
from experiments.envs.adapter import GymEnvs
from experiments.envs.build import cap_of, open_env
from experiments.envs.rows import Row, encode_choices
from experiments.envs.slot import Slot
from experiments.policies import Policy

LEFT, RIGHT, FORWARD, PICKUP, TOGGLE = 0, 1, 2, 3, 5
AHEAD = ((1, 0), (0, 1), (-1, 0), (0, -1))  # of each direction

Place = tuple[int, int]
Pose = tuple[int, int, int]  # x, y, direction


def expert_envs(config: EnvConfig, num: int, noise: float, seed: int = 0) -> tuple[GymEnvs, Policy]:
    """Slots of a MiniGrid room in this process, and the expert that plays in them.

    noise: share of actions that are uniform instead.
    """
    rooms: list[Any] = []

    def make(slot: int) -> Slot:
        env = open_env(config.id, config.pixels, dict(config.kwargs), config.time_limit)
        rooms.append(env.unwrapped)
        return Slot(env, seed, slot, config.image_size, config.action_repeat)

    envs = GymEnvs(make, num, "inprocess", cap_of(config.id, config.time_limit))
    slots, rng = rooms[-num:], np.random.default_rng([seed, 1])  # a first one was a probe

    def act(row: Row) -> np.ndarray:
        del row  # an ended episode's room still stands, and its action is ignored
        wanted = np.array([[next_action(room)] for room in slots])
        drawn = rng.integers(0, envs.action_spec.sizes, wanted.shape)
        noisy = rng.random(wanted.shape) < noise
        return encode_choices(np.where(noisy, drawn, wanted), envs.action_spec)

    return envs, act


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
