"""One environment slot: a gymnasium environment in our row format that can be replayed.

Each episode is reset with a seed derived from (seed, slot, episode) and its actions are recorded,
so the slot's whole state is those three numbers, its hidden context and the actions so far. Where
more is needed than a seed, an environment's reset gives info["resume"], options for the next time.
The flags of a row travel inside the observation: a slot restarts itself, and the vector
environments around it, which can not be put back into the middle of an episode, never see an end.
"""

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from experiments.envs.spaces import Actions, Observations

REWARD, FIRST, TERMINAL, LAST = range(4)


def episode_seed(seed: int, slot: int, episode: int) -> int:
    """The reset seed of an episode, below 2**31."""
    return int(np.random.SeedSequence((seed, slot, episode)).generate_state(1)[0] >> 1)


class Slot(gymnasium.Env):
    """Observes {"obs": flat dict, "flags": (reward, first, terminal, last)}; acts encoded (A,)."""

    def __init__(
        self,
        env: gymnasium.Env,
        seed: int,
        slot: int,
        image_size: int,
        repeat: int = 1,
        contexts: tuple[str, ...] = (),
    ):
        self.env = env
        self.contexts = contexts
        self.context = contexts[0] if contexts else None
        self.observations = Observations(env.observation_space, image_size)
        self.actions = Actions(env.action_space)
        flags = spaces.Box(-np.inf, np.inf, (4,), np.float64)
        self.observation_space = spaces.Dict({"obs": self.observations.space(), "flags": flags})
        self.action_space = spaces.Box(-1.0, 1.0, (self.actions.spec.dim,), np.float32)
        self.render_mode = env.render_mode
        self.seed, self.slot, self.repeat = seed, slot, repeat
        self.episode = -1
        self.taken: list[np.ndarray] = []
        self.resume: dict[str, Any] = {}
        self.last = False

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        """Starts the next episode, or returns to `options["restore"][slot]`, a state.

        `options["context"]`, one name or one a slot, is the hidden context until it is set again.
        """
        options = options or {}
        if "restore" in options:
            return self._restore(options["restore"][self.slot]), {}
        if "context" in options:
            named = options["context"]
            self.context = named if isinstance(named, str) else named[self.slot]
        return self._start(), {}

    def step(self, action: np.ndarray):
        """One step, or the start of the next episode if this one is over."""
        row = self._start() if self.last else self._advance(np.array(action, np.float32))
        return row, 0.0, False, False, {}

    def state(self) -> dict[str, Any]:
        """What brings the slot back: seed, episode, context, encoded actions (t, A) so far."""
        taken = np.array(self.taken, np.float32).reshape(-1, self.actions.spec.dim)
        told: dict[str, Any] = {"context": self.context} if self.contexts else {}
        told |= {"resume": self.resume} if self.resume else {}
        return {"seed": self.seed, "episode": self.episode, "actions": taken, **told}

    def close(self) -> None:
        """Closes the environment."""
        self.env.close()

    def _start(self, **resume: Any) -> dict[str, Any]:
        self.episode += 1
        self.taken = []
        self.last = False
        seed = episode_seed(self.seed, self.slot, self.episode)
        options = {"context": self.context, **resume} if self.contexts else resume
        obs, info = self.env.reset(seed=seed, options=options or None)
        self.resume = info.get("resume", {})
        return self._row(obs, 0.0, True, False)

    def _advance(self, action: np.ndarray) -> dict[str, Any]:
        self.taken.append(action)
        decoded = self.actions.decode(action)
        total = 0.0
        for _ in range(self.repeat):
            obs, reward, terminated, truncated, _ = self.env.step(decoded)
            total += float(reward)
            if terminated or truncated:
                break
        self.last = terminated or truncated
        return self._row(obs, total, False, terminated)

    def _restore(self, state: dict[str, Any]) -> dict[str, Any]:
        self.seed, self.episode = int(state["seed"]), int(state["episode"]) - 1
        self.context = state.get("context", self.context)
        row = self._start(**state.get("resume", {}))
        for action in state["actions"]:
            row = self._advance(action)
        return row

    def _row(self, obs: Any, reward: float, first: bool, terminal: bool) -> dict[str, Any]:
        flags = np.array([reward, first, terminal, self.last], np.float64)
        return {"obs": self.observations(obs), "flags": flags}
