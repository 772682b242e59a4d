"""A gymnasium environment over several others: which of them is played is its hidden context.

`reset(options={"context": name})` goes into that task until another is named; before any is named
it is in the first. A task is opened when it is first needed and kept open. All have the same
spaces, and nothing in an observation tells the task, unless `oracle` adds `context`, a one-hot.
"""

from collections.abc import Callable, Mapping
from typing import Any

import gymnasium

from experiments.envs.hidden import Hidden, view

Open = Callable[[], gymnasium.Env]


class SwitchEnv(gymnasium.Env):
    """Plays one of `tasks`: what opens each, by the names of their contexts."""

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012  gymnasium's own convention

    def __init__(
        self,
        name: str,
        tasks: Mapping[str, Open],
        oracle: bool = False,
        render_mode: str = "rgb_array",
    ):
        self.render_mode = render_mode
        self._tasks, self._hidden = tasks, Hidden(name, tuple(tasks))
        first = self._hidden.context
        self._opened = {first: tasks[first]()}
        self._seen, self.action_space = self.task.observation_space, self.task.action_space
        self._view = view(self._seen, len(tasks), oracle)
        self.observation_space = self._view.space

    @property
    def task(self) -> gymnasium.Env:
        """The environment that is played, opened if it was not."""
        context = self._hidden.context
        if context not in self._opened:
            self._opened[context] = self._open(context)
        return self._opened[context]

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        """A new episode, of the task that `options["context"]` names from here on."""
        super().reset(seed=seed)
        self._hidden.enter(options)
        if seed is None:  # of this environment's own, so that a task opened late follows from it
            seed = int(self.np_random.integers(2**31))
        obs, info = self.task.reset(seed=seed)
        return self._view(obs, self._hidden.told()), info

    def step(self, action: Any):
        """One step of the task."""
        obs, reward, terminated, truncated, info = self.task.step(action)
        seen = self._view(obs, self._hidden.told())
        return seen, float(reward), terminated, truncated, info

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
                    f"task {context!r} of {self._hidden.env} has the space {theirs}, the first "
                    f"one has {ours}: tasks of one environment need the same spaces"
                )
        return env
