"""MiniHack (Samvelyan et al. 2021) in pixels around the agent, deterministic for each seed.

As Continual-Dreamer sees it: 5 x 5 tiles of 16 pixels, and a border that makes 84 x 84. NetHack has
random numbers of its own, which gymnasium's seed does not reach by itself.
"""

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.wrappers import TransformObservation

TILES = {"observation_keys": ("pixel_crop",), "obs_crop_h": 5, "obs_crop_w": 5}
BORDER = 2


class Seeded(gymnasium.Wrapper):
    """Hands the seed of a reset to NetHack's random numbers."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        """A new level; with a seed, and under the same actions, the same one every time."""
        if seed is not None:
            nethack: Any = self.env.unwrapped
            nethack.seed(core=seed, disp=seed, reseed=False)
        return self.env.reset(seed=seed, options=options)


def view(env: gymnasium.Env) -> gymnasium.Env:
    """`image` (84, 84, 3) uint8 of an environment that was made with `TILES`."""
    assert isinstance(env.observation_space, spaces.Dict)
    tiles = env.observation_space["pixel_crop"].shape
    assert tiles is not None
    shape = (tiles[0] + 2 * BORDER, tiles[1] + 2 * BORDER, tiles[2])
    return TransformObservation(
        Seeded(env),
        lambda obs: {"image": _bordered(obs["pixel_crop"])},
        spaces.Dict({"image": spaces.Box(0, 255, shape, np.uint8)}),
    )


def _bordered(tiles: np.ndarray) -> np.ndarray:
    return np.pad(tiles, [(BORDER, BORDER), (BORDER, BORDER), (0, 0)])
