"""Data sets of Minari, by their id, as episodes of clips; minari is an optional package.

Minari keeps T + 1 observations and the T actions, rewards and flags between them. A termination
is a terminal row; a truncation is an end like any other. Observations and actions of any
gymnasium space become what an environment's would (`experiments/envs/spaces.py`).
"""

import importlib
import re
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import numpy as np
from gymnasium import spaces

from experiments.config import ConfigError
from experiments.data.clips import Arrays, Spec
from experiments.data.source import Options, Recorded, Source, wanted_actions
from experiments.envs.rows import encode_choices
from experiments.envs.spaces import Actions, Observations
from worldmodel.types import ActionSpec

ID = r"[-\w./]+-v\d+"
SIZE = 64  # of images, unless another is asked for


def read_minari(name: str, options: Options) -> Source:
    """All episodes of a data set that is here, or can be fetched. Raises ConfigError."""
    height, width = options.size or (SIZE, SIZE)
    if height != width or not height:
        problem = "images of Minari become squares"
        raise ConfigError("--size", f"{height}x{width}", problem, f"give one number, as {SIZE}")
    data = _opened(name)
    try:
        observe, actions = Observations(data.observation_space, height), Actions(data.action_space)
    except ValueError as error:
        raise ConfigError("source", name, str(error), "choose another data set") from error
    spec = Spec(observe.spec, wanted_actions(actions.spec, options))
    episodes = (
        Recorded(f"episode {episode.id}", _rows(episode, observe, spec, data.action_space))
        for episode in data.iterate_episodes()
    )
    return Source(spec, episodes)


def _opened(name: str) -> Any:
    if not re.fullmatch(ID, name):
        way_out = "name a folder, or an id as D4RL/pen/human-v2"
        raise ConfigError("source", name, "no such folder, and no id of a Minari data set", way_out)
    if find_spec("minari") is None:
        way_out = "name a folder, or for a data set of Minari: pip install 'minari[hdf5,hf]'"
        raise ConfigError("source", name, "no such folder, and minari is not installed", way_out)
    minari = importlib.import_module("minari")
    try:
        return minari.load_dataset(name, download=True)
    except Exception as error:  # of its own, of the network, of a package that it lacks
        line = str(error).strip().partition("\n")[0] or type(error).__name__
        problem = f"no such folder, and Minari has no data set of this id: {line}"
        way_out = "`minari list local` shows those that are here, `minari list remote` the others"
        raise ConfigError("source", name, problem, way_out) from error


def _rows(episode: Any, observe: Observations, spec: Spec, space: spaces.Space) -> Iterator[Arrays]:
    count = len(episode.rewards)
    rows = [observe(_row(episode.observations, t)) for t in range(count + 1)]
    obs = {f"obs.{name}": np.stack([row[name] for row in rows]) for name in spec.obs}
    action = np.zeros((count + 1, spec.action.dim), np.float32)
    action[1:] = encoded(np.asarray(episode.actions), spec.action, space)
    reward, terminal = np.zeros(count + 1, np.float32), np.zeros(count + 1, bool)
    reward[1:], terminal[1:] = episode.rewards, episode.terminations
    first = np.arange(count + 1) == 0
    yield obs | {"action": action, "reward": reward, "first": first, "terminal": terminal}


def _row(observations: Any, t: int) -> Any:
    """The observation at t of a tree of observations (T + 1, ...)."""
    if isinstance(observations, dict):
        return {name: _row(value, t) for name, value in observations.items()}
    if isinstance(observations, tuple):
        return tuple(_row(value, t) for value in observations)
    return observations[t]


def encoded(actions: np.ndarray, spec: ActionSpec, space: spaces.Space) -> np.ndarray:
    """Actions (T, ...) of a gymnasium space as our vectors (T, A).

    An entry of a box with two finite bounds is scaled to [-1, 1], and stays within; another one
    is as it was.
    """
    if isinstance(space, spaces.Box):
        return _scaled(actions, space).reshape(len(actions), -1).astype(np.float32)
    start = space.start if isinstance(space, spaces.Discrete | spaces.MultiDiscrete) else 0
    choices = (actions - np.asarray(start)).reshape(len(actions), -1).astype(np.int64)
    return encode_choices(choices, spec)


def _scaled(actions: np.ndarray, space: spaces.Box) -> np.ndarray:
    low, high = space.low.astype(np.float64), space.high.astype(np.float64)
    bounded = np.isfinite(low) & np.isfinite(high)
    low, high = np.where(bounded, low, -1.0), np.where(bounded, high, 1.0)
    wide = np.where(high > low, high - low, 1.0)
    unit = np.clip(2 * (actions - low) / wide - 1, -1, 1)
    return np.where(bounded, unit, actions)
