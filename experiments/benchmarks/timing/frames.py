"""RandomFrames-v0: 64x64x3 images of noise and six actions, the shapes of the reference workload.

What it shows costs nothing to draw and can not be learned; only its shapes and dtypes count.
Importing this registers it with gymnasium.
"""

from typing import Any

import gymnasium
import numpy as np


class RandomFrames(gymnasium.Env[Any, np.int64]):
    """An image of noise a step; rewards are normal, episodes do not end."""

    def __init__(self) -> None:
        image = gymnasium.spaces.Box(0, 255, (64, 64, 3), np.uint8)
        self.observation_space = gymnasium.spaces.Dict({"image": image})
        self.action_space = gymnasium.spaces.Discrete(6)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """A first image."""
        super().reset(seed=seed)
        return self._observe(), {}

    def step(
        self, action: np.int64
    ) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Another image, whatever the action."""
        return self._observe(), float(self.np_random.normal()), False, False, {}

    def _observe(self) -> dict[str, np.ndarray]:
        return {"image": self.np_random.integers(0, 256, (64, 64, 3), np.uint8)}


if "RandomFrames-v0" not in gymnasium.registry:
    gymnasium.register("RandomFrames-v0", f"{__name__}:RandomFrames")
