"""CoinRun of Procgen (Cobbe et al. 2020): run and jump to a coin, in a new level every episode.

Procgen starts the next level by itself, with numbers that nobody hands over. Here every episode is
an engine of its own (2 ms) that knows one level, that of the seed: any episode can be replayed.
"""

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from experiments.envs.packages import load

ID = "CoinRun-v0"
CAP = 10.0  # for the coin, which ends the episode
STEPS = 1000  # after which Procgen ends an episode
LEVELS = 2**31 - 1  # of which the engine takes the seed
ACTIONS = 15
MODES = ("easy", "hard")  # how hard levels are


class CoinRunEnv(gymnasium.Env):
    """Images (64, 64, 3) uint8, 15 actions; the coin or a fall terminates, 1000 steps truncate.

    Options are Procgen's. The last frame of an episode is lost there: here it is that before it.
    """

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012  gymnasium's own convention

    def __init__(
        self,
        use_backgrounds: bool = True,
        restrict_themes: bool = False,
        use_generated_assets: bool = False,
        use_monochrome_assets: bool = False,
        center_agent: bool = True,
        distribution_mode: str = "hard",
        render_mode: str = "rgb_array",
    ):
        if distribution_mode not in MODES:
            told = f"distribution_mode={distribution_mode!r} of {ID}"
            raise ValueError(f"{told} is unknown; choose from {', '.join(MODES)}")
        self.render_mode = render_mode
        self.options = {
            "use_backgrounds": use_backgrounds,
            "restrict_themes": restrict_themes,
            "use_generated_assets": use_generated_assets,
            "use_monochrome_assets": use_monochrome_assets,
            "center_agent": center_agent,
            "distribution_mode": distribution_mode,
        }
        self.observation_space = spaces.Box(0, 255, (64, 64, 3), np.uint8)
        self.action_space = spaces.Discrete(ACTIONS)
        self.steps = 0
        self._make = load("procgen").ProcgenGym3Env
        self._engine: Any = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        """The start of the level of this seed, or of one that is drawn."""
        super().reset(seed=seed)
        level = int(self.np_random.integers(LEVELS)) if seed is None else seed % LEVELS
        self.close()
        only = {"num_levels": 1, "start_level": level, "rand_seed": level}
        self._engine = self._make(1, "coinrun", num_threads=0, **only, **self.options)
        self.steps = 0
        self.image = self._observe()[1]
        return self.image, {"level": level}

    def step(self, action: int):
        """One step; the reward is 10 for the coin."""
        self._engine.act(np.array([action]))
        self.steps += 1
        reward, image, over = self._observe()
        if over:
            return self.image, reward, self.steps < STEPS or reward > 0, self.steps >= STEPS, {}
        self.image = image
        return image, reward, False, False, {}

    def render(self) -> np.ndarray:
        """The image (64, 64, 3) uint8 as observed."""
        return self.image

    def close(self) -> None:
        """Frees the engine."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    def _observe(self) -> tuple[float, np.ndarray, bool]:
        reward, obs, first = self._engine.observe()
        return float(reward[0]), obs["rgb"][0].copy(), bool(first[0])
