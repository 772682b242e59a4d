"""Environments whose observations tell where they come from, so that slips in time or slot show.

`Telltale` observes its time within the episode, the seed it was reset with and the action that it
was last given; rewards are the time, and `SHIFT` more for each hidden context before its own. An
episode's length and its kind of end follow from its seed.
"""

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from experiments.envs.slot import Slot

ACTIONS = 5
CONTEXTS = ("plain", "more", "most")
SHIFT = 100.0


def length(seed: int) -> int:
    """Steps of the episode that starts with this seed, 3 to 9."""
    return 3 + seed % 7


def terminates(seed: int) -> bool:
    """Whether the episode ends by itself; otherwise it is cut off."""
    return seed // 7 % 2 == 0


class Telltale(gymnasium.Env):
    """Observes `time` (1,), `seed` (high and low bits), `action` (the last one + 1, at first 0)."""

    def __init__(self):
        self.action_space = spaces.Discrete(ACTIONS)
        self.observation_space = spaces.Dict(
            {
                "time": spaces.Box(0.0, np.inf, (1,), np.float32),
                "seed": spaces.MultiDiscrete([2**16, 2**16]),
                "action": spaces.Discrete(ACTIONS + 1),
            }
        )
        self.time, self.seed, self.over, self.shift = 0, 0, True, 0.0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        """Time 0 of the episode named by `seed`, in the last context that was named."""
        assert seed is not None, "an episode was started without a seed of its own"
        if options is not None:
            self.shift = SHIFT * CONTEXTS.index(options["context"])
        self.time, self.seed, self.over = 0, seed, False
        return self._observe(0), {}

    def step(self, action: int):
        """The next time; the reward is the time, and the context's shift."""
        assert not self.over, "stepped after the end of the episode"
        self.time += 1
        self.over = self.time == length(self.seed)
        ended = self.over and terminates(self.seed)
        return self._observe(action + 1), self.time + self.shift, ended, self.over and not ended, {}

    def _observe(self, action: int) -> dict[str, Any]:
        return {
            "time": np.array([self.time], np.float32),
            "seed": np.array([self.seed // 2**16, self.seed % 2**16]),
            "action": action,
        }


def telltale_slot(seed: int, slot: int) -> Slot:
    """A slot of Telltale; with `functools.partial(telltale_slot, seed)` a maker for GymEnvs."""
    return Slot(Telltale(), seed, slot, image_size=16)


def shifting_slot(seed: int, slot: int) -> Slot:
    """The same with hidden contexts."""
    return Slot(Telltale(), seed, slot, image_size=16, contexts=CONTEXTS)


def told_seed(obs: dict[str, np.ndarray]) -> np.ndarray:
    """The seeds (...,) that observations of Telltale tell."""
    return obs["seed"][..., 0] * 2**16 + obs["seed"][..., 1]
