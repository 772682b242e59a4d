"""`make_envs`: from the configuration of an environment to its slots.

Families that need a wrapper or an optional package are opened here by their id; every other id is
handed to gymnasium as it is.
"""

import warnings
from functools import partial
from typing import Any, Literal, Protocol

import gymnasium

from experiments.envs import cartpole
from experiments.envs.adapter import GymEnvs
from experiments.envs.rows import Envs
from experiments.envs.slot import Slot


class EnvConfig(Protocol):
    """What `make_envs` reads; the `env` part of the configuration has these fields."""

    @property
    def id(self) -> str: ...
    @property
    def num(self) -> int: ...
    @property
    def workers(self) -> Literal["auto", "inprocess", "process"]: ...
    @property
    def image_size(self) -> int: ...
    @property
    def pixels(self) -> bool: ...
    @property
    def kwargs(self) -> Any: ...
    @property
    def action_repeat(self) -> int: ...
    @property
    def time_limit(self) -> int: ...


def make_envs(config: EnvConfig, num: int | None = None, seed: int = 0) -> Envs:
    """N slots of the configured environment; `num` replaces the configured number of slots."""
    num = config.num if num is None else num
    if config.id == cartpole.ID:
        return cartpole.CartPoleShiftEnvs(num, seed, config.time_limit or cartpole.CAP)
    make_slot = partial(
        _make_slot,
        seed,
        config.image_size,
        config.action_repeat,
        (config.id, config.pixels, dict(config.kwargs), config.time_limit),
    )
    return GymEnvs(make_slot, num, config.workers, cap_of(config.id, config.time_limit))


def _make_slot(seed: int, image_size: int, repeat: int, opening: tuple, slot: int) -> Slot:
    return Slot(open_env(*opening), seed, slot, image_size, repeat)


def open_env(
    name: str, pixels: bool = False, kwargs: dict[str, Any] | None = None, time_limit: int = 0
) -> gymnasium.Env:
    """A single environment by id; `time_limit` counts its own steps, 0 keeps the registered one."""
    options = dict(kwargs or {})
    if time_limit:
        options["max_episode_steps"] = time_limit
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other people's deprecations, while they import and build
        return gymnasium.make(name, **options)


def cap_of(name: str, time_limit: int = 0) -> float | None:
    """The highest return of an episode, where it is known from the id."""
    if name.startswith("CartPole-v"):
        return float(time_limit or gymnasium.spec(name).max_episode_steps or 0)
    if name.startswith(("MiniGrid-", "BabyAI-")):
        return 1.0
    return None
