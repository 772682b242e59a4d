"""MiniGrid and BabyAI (Chevalier-Boisvert et al. 2023): pixels, or one-hot vectors of the view.

The native symbolic view is three small integers a cell, which is neither an image nor a quantity;
one-hot blocks say what it means. The mission text is dropped.
"""

import importlib
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.wrappers import TransformObservation

CODES = (11, 6, 4)  # objects, colours, states (of a door; the direction of an agent)


def view(env: gymnasium.Env, pixels: bool) -> gymnasium.Env:
    """The agent's partial view: `image` in pixels, or `grid` one-hot with `direction`."""
    return _pixels(env) if pixels else _symbols(env)


def one_hot(cells: np.ndarray) -> np.ndarray:
    """Cells (..., 3) of small integers to a flat float32 vector of one-hot blocks."""
    blocks = [np.eye(n, dtype=np.float32)[cells[..., i]] for i, n in enumerate(CODES)]
    return np.concatenate(blocks, axis=-1).reshape(-1)


def _pixels(env: gymnasium.Env) -> gymnasium.Env:
    env = importlib.import_module("minigrid.wrappers").RGBImgPartialObsWrapper(env)
    assert isinstance(env.observation_space, spaces.Dict)
    space = spaces.Dict({"image": env.observation_space["image"]})
    return TransformObservation(env, lambda obs: {"image": obs["image"]}, space)


def _symbols(env: gymnasium.Env) -> gymnasium.Env:
    assert isinstance(env.observation_space, spaces.Dict)
    shape = env.observation_space["image"].shape
    assert shape is not None
    size = shape[0] * shape[1] * sum(CODES)
    space = spaces.Dict(
        {
            "grid": spaces.Box(0.0, 1.0, (size,), np.float32),
            "direction": env.observation_space["direction"],
        }
    )

    def observe(obs: dict[str, Any]) -> dict[str, Any]:
        return {"grid": one_hot(obs["image"]), "direction": obs["direction"]}

    return TransformObservation(env, observe, space)
