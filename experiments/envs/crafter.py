"""Crafter (Hafner 2021) as a gymnasium environment, deterministic for each episode's seed.

The package speaks the old gym interface and keeps creatures in sets, whose order follows memory
addresses: with them two runs of one seed part ways. Here they keep the order of insertion.
"""

import importlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

CAP = 22.0  # achievements; health moves the return by less than one


class OrderedSet:
    """The part of a set that Crafter uses, iterated in order of insertion."""

    def __init__(self, members: Iterable[Any] = ()):
        self._members = dict.fromkeys(members)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._members)

    def add(self, member: Any) -> None:
        """Adds at the end, unless it is there."""
        self._members[member] = None

    def remove(self, member: Any) -> None:
        """Removes; KeyError if it is not there."""
        del self._members[member]


class CrafterEnv(gymnasium.Env):
    """64 x 64 x 3 images, 17 actions; dying terminates, `length` steps truncate."""

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012  gymnasium's own convention

    def __init__(
        self,
        length: int = 10000,
        render_mode: str = "rgb_array",
        package: str = "crafter",
        **kwargs: Any,
    ):
        env = importlib.import_module(f"{package}.env")
        self._crafter: Any = env.Env(length=length, **kwargs)
        self.render_mode = render_mode
        shape = self._crafter.observation_space.shape
        self.observation_space = spaces.Box(0, 255, shape, np.uint8)
        self.action_space = spaces.Discrete(len(self._crafter.action_names))

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        """The image of a new world; without a seed the next world of the last one."""
        super().reset(seed=seed)
        if seed is not None:
            self._crafter._seed, self._crafter._episode = seed, 0
        obs = self._crafter.reset()
        world = self._crafter._world
        ordered = {key: OrderedSet() for key in world._chunks}
        for member in world.objects:
            ordered[world.chunk_key(member.pos)].add(member)
        world._chunks = defaultdict(OrderedSet, ordered)
        return obs, {}

    def step(self, action: int):
        """One step; the info holds inventory and achievements."""
        obs, reward, done, info = self._crafter.step(int(action))
        info["player_pos"] = info["player_pos"].copy()  # the player's own, until it moves
        dead = info["discount"] == 0.0
        return obs, float(reward), dead, bool(done) and not dead, info

    def hasten(self, times: float) -> None:
        """Lets the next step of someone awake count `times` for food, drink and energy."""
        player = self._crafter._player
        if times != 1 and not player.sleeping:
            player._hunger += times - 1
            player._thirst += times - 1
            player._fatigue += times - 1

    def render(self) -> np.ndarray:
        """The image (H, W, 3) uint8 as observed."""
        return self._crafter.render()
