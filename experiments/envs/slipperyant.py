"""SlipperyAnt-v0: gymnasium's Ant-v5 on ground whose friction is hidden.

After the non-stationary ant of Dohare et al. (Loss of plasticity in deep continual learning, Nature
632, 2024): there the friction changes abruptly every 2 million steps (its figure 3), and the code
has the range [0.02, 2], sets the sliding friction of every geom, and waits for an episode's end.
Ours: Ant-v5 in place of gym's Ant-v3, the names of contexts, the law of the draws (log-uniform:
theirs come from a file of numbers), and phases that start at multiples of `every`.
"""

import importlib
import math
from typing import Any

import gymnasium
import numpy as np

from experiments.envs.hidden import Hidden, view

ID = "SlipperyAnt-v0"
STEPS = 1000  # of an episode
LOWEST, HIGHEST = 0.02, 2.0  # sliding friction, as in the source's code

CONTEXTS = {
    "normal": 1.0,  # Ant-v5 as it is
    "ice": LOWEST,
    "wet": 0.2,
    "rubber": HIGHEST,
}


def friction_of(schedule: int, phase: int) -> float:
    """The friction of a phase, log-uniform in [LOWEST, HIGHEST]: a function of two numbers only."""
    unit = np.random.default_rng((schedule, phase)).uniform()
    return LOWEST * (HIGHEST / LOWEST) ** float(unit)


class Named:
    """Friction by hidden contexts."""

    size = len(CONTEXTS)

    def __init__(self):
        self._hidden = Hidden(ID, tuple(CONTEXTS))

    def start(self, options: dict[str, Any]) -> dict[str, Any]:
        """A new episode, in the context that is named; what else would start it again: nothing."""
        self._hidden.enter(options)
        return {}

    def step(self) -> None:
        """Time changes nothing."""

    @property
    def friction(self) -> float:
        """The sliding friction now."""
        return CONTEXTS[self._hidden.context]

    def told(self) -> np.ndarray:
        """One-hot (contexts,) float32."""
        return self._hidden.told()


class Redrawn:
    """Friction that is drawn anew every so many steps lived, at the start of an episode."""

    size = 1

    def __init__(self, every: int, schedule: int):
        for name, value in {"every": every, "schedule": schedule}.items():
            if value < 0:
                raise ValueError(f"{name}={value}: {ID} takes 0 or more")
        self._every, self._schedule = every, schedule
        self._lived = 0
        self.friction = friction_of(schedule, 0)

    def start(self, options: dict[str, Any]) -> dict[str, Any]:
        """A new episode, after options["lived"] steps if given; the options that start it again."""
        if "context" in options:
            raise ValueError(
                f"context {options['context']!r}: with every={self._every} {ID} redraws its "
                "friction without a signal; leave out contexts, or every"
            )
        self._lived = int(options.get("lived", self._lived))
        self.friction = friction_of(self._schedule, self._lived // self._every)
        return {"lived": self._lived}

    def step(self) -> None:
        """One step lived."""
        self._lived += 1

    def told(self) -> np.ndarray:
        """Where the friction is in its range, (1,) float32 from 0 to 1, by its logarithm."""
        place = math.log(self.friction / LOWEST) / math.log(HIGHEST / LOWEST)
        return np.array([place], np.float32)


class SlipperyAntEnv(gymnasium.Env):
    """105 numbers, 8 torques; reward and ends are Ant-v5's, whose options it takes.

    every: environment steps after which friction is redrawn; 0 leaves it to the named contexts.
    schedule: the seed of those draws, the same for all slots of a run, which count their own steps;
    an evaluation lives anew, on the first draw's ground. oracle: observe what is hidden, as
    `context`: one-hot, or with `every` one number.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}  # noqa: RUF012  gymnasium's own

    def __init__(
        self,
        every: int = 0,
        schedule: int = 0,
        oracle: bool = False,
        render_mode: str | None = None,
        **kwargs: Any,
    ):
        ant = importlib.import_module("gymnasium.envs.mujoco.ant_v5")
        self._ant: Any = ant.AntEnv(render_mode=render_mode, **kwargs)
        self._ground = Redrawn(every, schedule) if every else Named()
        self._view = view(self._ant.observation_space, self._ground.size, oracle)
        self.render_mode = render_mode
        self.observation_space = self._view.space
        self.action_space = self._ant.action_space

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        """The start of an episode; its info has the friction, and what resumes it with its seed."""
        super().reset(seed=seed)
        resume = self._ground.start(options or {})
        # Of two geoms in contact the larger friction counts: ground and legs have the same.
        self._ant.model.geom_friction[:, 0] = self._ground.friction
        obs, info = self._ant.reset(seed=seed)
        return self._seen(obs), {**info, "friction": self._ground.friction, "resume": resume}

    def step(self, action: np.ndarray):
        """One step of Ant-v5."""
        self._ground.step()
        obs, reward, terminated, truncated, info = self._ant.step(action)
        return self._seen(obs), float(reward), terminated, truncated, info

    def render(self) -> Any:
        """The image (H, W, 3) uint8."""
        return self._ant.render()

    def close(self) -> None:
        """Frees the renderer."""
        self._ant.close()

    def _seen(self, obs: np.ndarray) -> Any:
        return self._view(obs, self._ground.told())
