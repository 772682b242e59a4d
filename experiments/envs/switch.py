"""A gymnasium environment over several others: which of them is played is its hidden context.

`reset(options={"context": name})` goes into that task until another is named; before any is named
it is in the first. A task is opened when it is first needed and kept open. All have the same
spaces, and nothing in an observation tells the task, unless `oracle` adds `context`, a one-hot.
"""

from collections.abc import Callable, Mapping
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

Open = Callable[[], gymnasium.Env]


class SwitchEnv(gymnasium.Env):
    """Plays one of `tasks`: what opens each, by the names of their contexts."""

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012  gymnasium's own convention

    def __init__(
        self, tasks: Mapping[str, Open], oracle: bool = False, render_mode: str = "rgb_array"
    ):
        self.render_mode = render_mode
        self.contexts = tuple(tasks)
        self.context = self.contexts[0]
        self._tasks, self._oracle = tasks, oracle
        self._opened = {self.context: tasks[self.context]()}
        self._seen, self.action_space = self.task.observation_space, self.task.action_space
        self.observation_space = self._told() if oracle else self._seen

    @property
    def task(self) -> gymnasium.Env:
        """The environment that is played, opened if it was not."""
        if self.context not in self._opened:
            self._opened[self.context] = self._open(self.context)
        return self._opened[self.context]

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        """A new episode, of the task that `options["context"]` names from here on."""
        super().reset(seed=seed)
        context = (options or {}).get("context", self.context)
        if context not in self._tasks:
            names = ", ".join(self.contexts)
            raise ValueError(f"context {context!r} is unknown; choose from {names}")
        self.context = context
        if seed is None:  # of this environment's own, so that a task opened late follows from it
            seed = int(self.np_random.integers(2**31))
        obs, info = self.task.reset(seed=seed)
        return self._observe(obs), info

    def step(self, action: Any):
        """One step of the task."""
        obs, reward, terminated, truncated, info = self.task.step(action)
        return self._observe(obs), float(reward), terminated, truncated, info

    def render(self) -> Any:
        """The picture of the task."""
        return self.task.render()

    def close(self) -> None:
        """Closes every task that was opened."""
        for env in self._opened.values():
            env.close()
        self._opened = {}

    def _open(self, context: str) -> gymnasium.Env:
        env = self._tasks[context]()
        pairs = (self._seen, env.observation_space), (self.action_space, env.action_space)
        for ours, theirs in pairs:
            if ours != theirs:
                env.close()
                raise ValueError(
                    f"task {context!r} has the space {theirs} where {self.contexts[0]!r} has "
                    f"{ours}: tasks of one environment need the same spaces"
                )
        return env

    def _told(self) -> spaces.Dict:
        """The space of observations that tell the context."""
        seen = self._seen.spaces if isinstance(self._seen, spaces.Dict) else {"image": self._seen}
        told = spaces.Box(0.0, 1.0, (len(self.contexts),), np.float32)
        return spaces.Dict({**seen, "context": told})

    def _observe(self, obs: Any) -> Any:
        if not self._oracle:
            return obs
        told = np.zeros(len(self.contexts), np.float32)
        told[self.contexts.index(self.context)] = 1
        return {**(obs if isinstance(obs, dict) else {"image": obs}), "context": told}
