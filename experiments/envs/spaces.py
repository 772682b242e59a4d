"""Gymnasium spaces to our specifications: observations as a flat dict, actions as one vector.

Images are uint8 boxes of at least 16 x 16 with no, one or three channels last; other boxes become
float32 vectors, discrete spaces int64 entries; spaces without numbers, such as text, are dropped.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from gymnasium import spaces

from experiments.envs.resize import area_resize
from worldmodel.types import ActionSpec, ObsSpec

Encode = Callable[[Any], np.ndarray]


class Observations:
    """Flattens observations of a space to `spec`: names to images, vectors and discrete entries."""

    def __init__(self, space: spaces.Space, image_size: int):
        self.spec: dict[str, ObsSpec] = {}
        self._encoders: dict[str, tuple[tuple[Any, ...], Encode]] = {}
        for path, leaf in _leaves(space):
            found = _leaf(leaf, image_size)
            if found is not None:
                spec, encode = found
                name = "_".join(map(str, path)) or ("image" if spec.kind == "image" else "state")
                self.spec[name] = spec
                self._encoders[name] = (path, encode)
        if not self.spec:
            raise ValueError(f"observation space {space} has nothing that can be observed")

    def __call__(self, obs: Any) -> dict[str, np.ndarray]:
        """One observation, without a batch axis."""
        return {name: encode(_at(obs, path)) for name, (path, encode) in self._encoders.items()}

    def space(self) -> spaces.Dict:
        """The space of the flattened observations."""
        return spaces.Dict({name: _space(spec) for name, spec in self.spec.items()})


class Actions:
    """Decodes one encoded action (A,) to an action of a gymnasium space."""

    def __init__(self, space: spaces.Space):
        self.spec, self.decode = _action(space)


def _leaves(space: spaces.Space, path: tuple[Any, ...] = ()):
    if isinstance(space, spaces.Dict):
        children = space.spaces.items()
    elif isinstance(space, spaces.Tuple):
        children = enumerate(space.spaces)
    else:
        yield path, space
        return
    for key, child in children:
        yield from _leaves(child, (*path, key))


def _at(obs: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        obs = obs[key]
    return obs


def _is_image(space: spaces.Box) -> bool:
    rank, shape = len(space.shape), space.shape
    return (
        space.dtype == np.uint8
        and (rank == 2 or (rank == 3 and shape[2] in (1, 3)))
        and min(shape[:2]) >= 16
    )


def _leaf(space: spaces.Space, image_size: int) -> tuple[ObsSpec, Encode] | None:
    if isinstance(space, spaces.Box) and _is_image(space):
        channels = (*space.shape, 1)[2]

        def image(value: np.ndarray) -> np.ndarray:
            return area_resize(value.reshape(*value.shape[:2], channels), image_size)

        return ObsSpec("image", (image_size, image_size, channels)), image
    if isinstance(space, spaces.Box):
        size = int(np.prod(space.shape))
        return ObsSpec("vector", (size,)), lambda value: np.asarray(value, np.float32).reshape(size)
    if isinstance(space, spaces.Discrete):
        start = int(space.start)
        spec = ObsSpec("discrete", (1,), int(space.n))
        return spec, lambda value: np.array([int(value) - start], np.int64)
    if isinstance(space, spaces.MultiDiscrete):
        lowest, size = np.asarray(space.start).reshape(-1), int(np.prod(space.shape))
        spec = ObsSpec("discrete", (size,), int(np.max(space.nvec)))
        return spec, lambda value: np.asarray(value, np.int64).reshape(size) - lowest
    if isinstance(space, spaces.MultiBinary):
        size = int(np.prod(space.shape))
        spec = ObsSpec("discrete", (size,), 2)
        return spec, lambda value: np.asarray(value, np.int64).reshape(size)
    return None


def _space(spec: ObsSpec) -> spaces.Space:
    if spec.kind == "image":
        return spaces.Box(0, 255, spec.shape, np.uint8)
    if spec.kind == "vector":
        return spaces.Box(-np.inf, np.inf, spec.shape, np.float32)
    return spaces.Box(0, spec.classes - 1, spec.shape, np.int64)


def _action(space: spaces.Space) -> tuple[ActionSpec, Callable[[np.ndarray], Any]]:
    if isinstance(space, spaces.Discrete):
        start = int(space.start)
        return ActionSpec("discrete", (int(space.n),)), lambda code: int(np.argmax(code)) + start
    if isinstance(space, spaces.MultiDiscrete):
        start = np.asarray(space.start)
        return _choices(tuple(int(n) for n in np.reshape(space.nvec, -1)), start, space.dtype)
    if isinstance(space, spaces.MultiBinary):
        shape = space.shape
        return _choices((2,) * int(np.prod(shape)), np.zeros(shape, np.int64), space.dtype)
    if isinstance(space, spaces.Box):
        return _continuous(space)
    raise ValueError(
        f"action space {space} is not supported: use Discrete, MultiDiscrete, MultiBinary or Box"
    )


def _choices(sizes: tuple[int, ...], start: np.ndarray, dtype: Any):
    ends = np.cumsum(sizes)[:-1]

    def decode(code: np.ndarray) -> np.ndarray:
        picks = [int(np.argmax(block)) for block in np.split(code, ends)]
        return (np.reshape(picks, start.shape) + start).astype(dtype)

    return ActionSpec("discrete", sizes), decode


def _continuous(space: spaces.Box):
    """[-1, 1] to the bounds; an entry without two finite bounds is passed on as it is."""
    finite = np.isfinite(space.low) & np.isfinite(space.high)
    low = np.where(finite, space.low, -1.0).astype(np.float64)
    high = np.where(finite, space.high, 1.0).astype(np.float64)

    def decode(code: np.ndarray) -> np.ndarray:
        unit = (np.clip(np.reshape(code, space.shape).astype(np.float64), -1, 1) + 1) / 2
        return (low + unit * (high - low)).astype(space.dtype)

    return ActionSpec("continuous", (int(np.prod(space.shape)),)), decode
