"""What environments with hidden contexts share: which one they are in, and what an oracle sees.

`reset(options={"context": NAME})` enters a context until another is named; before that it is the
first. Only an oracle's observation tells it, beside the environment's own.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from gymnasium import spaces


class Hidden:
    """The context that an environment is in, one of `names`."""

    def __init__(self, env: str, names: Sequence[str]):
        self.env, self.names = env, tuple(names)
        self.context = self.names[0]

    def enter(self, options: dict[str, Any] | None) -> str:
        """The context after a reset with these options; ValueError for one that is unknown."""
        context = (options or {}).get("context", self.context)
        if context not in self.names:
            raise ValueError(
                f"context {context!r} of {self.env} is unknown; choose from {list(self.names)}"
            )
        self.context = context
        return context

    def told(self) -> np.ndarray:
        """One-hot (names,) float32 of the context."""
        return np.array([name == self.context for name in self.names], np.float32)


class Open:
    """The plain view: observations as they are."""

    def __init__(self, space: spaces.Space):
        self.space = space

    def __call__(self, obs: Any, told: np.ndarray) -> Any:
        """The observation."""
        return obs


class Oracle:
    """An oracle's view: {"image" or "state": the observation, "context": what is hidden}."""

    def __init__(self, space: spaces.Box, size: int):
        self._key = "image" if space.dtype == np.uint8 else "state"
        told = spaces.Box(0.0, 1.0, (size,), np.float32)
        self.space: spaces.Space = spaces.Dict({self._key: space, "context": told})

    def __call__(self, obs: np.ndarray, told: np.ndarray) -> Any:
        """Both."""
        return {self._key: obs, "context": told}


class OracleOf:
    """The same where observations are dicts already."""

    def __init__(self, space: spaces.Dict, size: int):
        told = spaces.Box(0.0, 1.0, (size,), np.float32)
        self.space: spaces.Space = spaces.Dict({**space.spaces, "context": told})

    def __call__(self, obs: Any, told: np.ndarray) -> Any:
        """Both."""
        return {**obs, "context": told}


def view(space: spaces.Space, size: int, oracle: bool) -> Open | Oracle | OracleOf:
    """How observations of `space` are seen where `size` numbers tell what is hidden."""
    if not oracle:
        return Open(space)
    if isinstance(space, spaces.Dict):
        return OracleOf(space, size)
    assert isinstance(space, spaces.Box), space
    return Oracle(space, size)
