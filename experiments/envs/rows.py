"""The contract between environments and the loop: rows of N slots, and what every `Envs` can do.

Row t holds the observation at t, the encoded action that led into it, and the reward and flags
that came with it. An ended episode is followed by a `first` row of the next one: that step's
action is ignored and stored as zero, so no transition crosses an episode.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple, final

import numpy as np

from worldmodel.types import ActionSpec, ObsSpec


class Row(NamedTuple):
    """One step of N slots."""

    obs: dict[str, np.ndarray]  # (N, ...), dtypes as ObsSpec says
    action: np.ndarray  # (N, A) float32, the encoded action that led here
    reward: np.ndarray  # (N,) float32
    first: np.ndarray  # (N,) bool, the episode starts here
    terminal: np.ndarray  # (N,) bool, the environment ended it: no value follows
    last: np.ndarray  # (N,) bool, terminal or cut off by a time limit
    user: np.ndarray  # (N,) int64


class Envs(ABC):
    """N environment slots behind one step. Deterministic environments continue bit for bit."""

    obs_spec: dict[str, ObsSpec]
    action_spec: ActionSpec
    num: int
    cap: float | None  # the highest return of an episode, where known

    @abstractmethod
    def reset(self, context: str | Sequence[str] | None = None) -> Row:
        """Starts a new episode in every slot; `context` names the hidden context from here on."""

    @abstractmethod
    def step(self, action: np.ndarray) -> Row:
        """Takes encoded actions (N, A); slots whose last row was `last` start anew instead."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Everything needed to continue, as numpy arrays and JSON scalars."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> Row:
        """Continues from a `state_dict`; returns the row that was current then."""

    @abstractmethod
    def close(self) -> None:
        """Frees windows, processes and engines."""

    @final
    def random_action(self, rng: np.random.Generator) -> np.ndarray:
        """Uniform encoded actions (N, A) float32."""
        return random_action(self.action_spec, self.num, rng)


def random_action(spec: ActionSpec, num: int, rng: np.random.Generator) -> np.ndarray:
    """Uniform encoded actions (num, A) float32 for any action specification."""
    if spec.kind == "continuous":
        return rng.uniform(-1.0, 1.0, (num, spec.dim)).astype(np.float32)
    return encode_choices(rng.integers(0, spec.sizes, (num, len(spec.sizes))), spec)


def encode_choices(choices: np.ndarray, spec: ActionSpec) -> np.ndarray:
    """One-hot blocks (N, A) float32 of the chosen entries (N, blocks) int."""
    encoded = np.zeros((len(choices), spec.dim), np.float32)
    starts = np.cumsum((0, *spec.sizes[:-1]))
    np.put_along_axis(encoded, choices + starts, 1.0, axis=1)
    return encoded


def check_action(action: np.ndarray, num: int, spec: ActionSpec) -> None:
    """Raises ValueError unless `action` is (N, A)."""
    if action.shape != (num, spec.dim):
        raise ValueError(f"action has shape {action.shape}, expected {(num, spec.dim)} for {spec}")
