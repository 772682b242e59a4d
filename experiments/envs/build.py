"""`make_envs`: from the configuration of an environment to its slots.

Families that need a wrapper or an optional package are opened here by their id; every other id is
handed to gymnasium as it is.
"""

import importlib
import warnings
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import gymnasium
import numpy as np
from gymnasium.envs.registration import EnvSpec
from gymnasium.wrappers import AddRenderObservation

from experiments.config.models import EnvConfig
from experiments.envs import (
    cartpole,
    coinrun,
    crafter,
    craftershift,
    minigrid,
    minihack,
    recipes,
    userpop,
)
from experiments.envs.adapter import GymEnvs
from experiments.envs.known import EXTRAS, hidden_contexts
from experiments.envs.packages import load
from experiments.envs.population import Population
from experiments.envs.rows import Envs
from experiments.envs.scale import Scaled
from experiments.envs.slot import Slot
from experiments.envs.spaces import Observations
from experiments.envs.switch import SwitchEnv
from experiments.envs.tasks import STREAMS

# The highest return of an episode, where it is known.
CAPS = {
    "crafter": crafter.CAP,
    craftershift.ID: crafter.CAP,
    recipes.ID: recipes.CAP,
    coinrun.ID: coinrun.CAP,
    "MiniGrid3-v0": 1.0,
    "MiniHack4-v0": 1.0,
    "CoinRun6-v0": coinrun.CAP,
}


def make_envs(config: EnvConfig, num: int | None = None, seed: int = 0) -> Envs:
    """N slots of the configured environment; `num` replaces the configured number of slots."""
    envs = _make_envs(config, config.num if num is None else num, seed)
    return Scaled(envs, config.units) if config.units else envs


def _make_envs(config: EnvConfig, num: int, seed: int) -> Envs:
    if config.id == cartpole.ID:
        return _cartpole(config, num, seed)
    if config.id == userpop.ID:
        return _userpop(config, num, seed)
    opening = Opening(find(config.id), config.pixels, dict(config.kwargs), config.time_limit)
    contexts = hidden_contexts(config.id, config.kwargs)
    view = config.image_size, config.action_repeat, contexts
    make_slot = partial(_make_slot, opening, seed, view)
    return GymEnvs(make_slot, num, config.workers, cap_of(config.id, config.time_limit))


def open_env(
    name: str, pixels: bool = False, kwargs: dict[str, Any] | None = None, time_limit: int = 0
) -> gymnasium.Env:
    """A single environment by id, as the slots see it."""
    return Opening(find(name), pixels, kwargs or {}, time_limit)()


def open_stream(name: str, oracle: bool = False, render_mode: str = "rgb_array") -> SwitchEnv:
    """An environment that switches between gymnasium tasks; its entry point for gymnasium."""
    tasks = STREAMS[name].tasks
    opened = {key: Opening(find(task.id), True, task.kwargs) for key, task in tasks.items()}
    return SwitchEnv(name, opened, oracle, render_mode)


def find(name: str) -> EnvSpec:
    """The registered specification of an id, after importing the package that registers it.

    Raises ModuleNotFoundError for a missing extra and gymnasium.error.Error for an unknown id.
    """
    for prefix, (package, install) in EXTRAS.items():
        if name.startswith(prefix):
            try:
                with quiet():
                    load(package)
            except ModuleNotFoundError as missing:
                raise ModuleNotFoundError(
                    f"environment {name!r} needs the package {missing.name!r}: "
                    f"pip install {install}"
                ) from missing
    module, _, rest = name.rpartition(":")  # gymnasium's "module:id" imports the module first
    if module:
        importlib.import_module(module)
    return gymnasium.spec(rest)


@dataclass(frozen=True)
class Opening:
    """Opens one environment, here or in a worker process, which knows no registered ids."""

    spec: EnvSpec
    pixels: bool = False
    kwargs: dict[str, Any] = field(default_factory=dict)
    time_limit: int = 0  # in the environment's own steps; 0 keeps the registered one

    def __call__(self) -> gymnasium.Env:
        """The environment with its family's view."""
        options = dict(self.kwargs)
        if self.time_limit:
            options["max_episode_steps"] = self.time_limit
        if self.spec.id.startswith("ALE/"):
            _hush_atari()
        with quiet():
            if self.spec.id.startswith(("MiniGrid-", "BabyAI-")):
                return minigrid.view(self._make(options), self.pixels)
            if self.spec.id.startswith("MiniHack-"):
                return minihack.view(self._make({**minihack.TILES, **options}))
            if self.pixels:
                return _rendered(self._make({"render_mode": "rgb_array", **options}))
            return self._make(options)

    def _make(self, options: dict[str, Any]) -> gymnasium.Env:
        return gymnasium.make(self.spec, disable_env_checker=True, **options)


def quiet() -> warnings.catch_warnings:
    """Silences other people's deprecations while their packages are imported and built."""
    return warnings.catch_warnings(action="ignore")


def cap_of(name: str, time_limit: int = 0) -> float | None:
    """The highest return of an episode, where it is known from the id."""
    if name.startswith("CartPole-v"):
        return float(time_limit or gymnasium.spec(name).max_episode_steps or np.inf)
    if name.startswith(("MiniGrid-", "BabyAI-")):
        return 1.0
    return CAPS.get(name)


def _cartpole(config: EnvConfig, num: int, seed: int) -> Envs:
    limit = config.time_limit or cartpole.CAP
    if config.pixels or config.action_repeat != 1:
        raise ValueError(f"{cartpole.ID} takes no pixels and no action_repeat")
    return cartpole.CartPoleShiftEnvs(num, seed, limit, **config.kwargs)


def _userpop(config: EnvConfig, num: int, seed: int) -> Envs:
    options = dict(config.kwargs)
    population = Population(seed=options.pop("population", 0))
    limit = config.time_limit or userpop.CAP
    return userpop.UserPopEnvs(num, seed, limit, population=population, **options)


def _make_slot(opening: Opening, seed: int, view: tuple, slot: int) -> Slot:
    return Slot(opening(), seed, slot, *view)


def _rendered(env: gymnasium.Env) -> gymnasium.Env:
    """The rendered image in place of observations that hold none."""
    specs = Observations(env.observation_space, 1).spec.values()
    if any(spec.kind == "image" for spec in specs):
        return env
    env.reset(seed=0)  # the wrapper asks for a rendering at once
    return AddRenderObservation(env, render_only=True)


def _hush_atari() -> None:
    """The emulator greets on standard error, in every process."""
    ale = importlib.import_module("ale_py")
    ale.ALEInterface.setLoggerMode(ale.LoggerMode.Error)
