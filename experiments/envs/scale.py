"""Vector observations in units of their own: each dimension divided by a configured number.

A world model weighs errors as they come. Where one dimension lives in hundredths and another in
ones, as angles beside positions do, it resolves the second and never sees the first.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.config.errors import ConfigError
from experiments.envs.rows import Envs, Row


class Scaled(Envs):
    """`envs` with the vector observations of `units` {key: one divisor a dimension} divided."""

    def __init__(self, envs: Envs, units: Mapping[str, Sequence[float]]):
        self.obs_spec, self.action_spec = envs.obs_spec, envs.action_spec
        self.num, self.cap = envs.num, envs.cap
        self._envs = envs
        self._units = {key: np.asarray(value, np.float32) for key, value in units.items()}
        for key, value in self._units.items():
            spec = self.obs_spec.get(key)
            if spec is None or spec.kind != "vector" or spec.shape != value.shape:
                known = {name: entry.shape for name, entry in self.obs_spec.items()}
                problem = f"does not fit the vector observations; there are {known}"
                raise ConfigError(f"env.units.{key}", value.tolist(), problem, "see --print-config")

    def reset(self, context: str | Sequence[str] | None = None) -> Row:
        """As the environment's, in units."""
        return self._divide(self._envs.reset(context))

    def step(self, action: np.ndarray) -> Row:
        """As the environment's, in units."""
        return self._divide(self._envs.step(action))

    def state_dict(self) -> dict[str, Any]:
        """The environment's own state."""
        return self._envs.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> Row:
        """Continue the environment; its current row, in units."""
        return self._divide(self._envs.load_state_dict(state))

    def close(self) -> None:
        """Close the environment."""
        self._envs.close()

    def _divide(self, row: Row) -> Row:
        scaled = {key: row.obs[key] / value for key, value in self._units.items()}
        return row._replace(obs=row.obs | scaled)
