"""Which environments exist: the check of `env:` before anything heavy is imported.

Needs gymnasium's registry (0.2 s) and never torch. Packages that come as extras are looked up
without being imported, unless a name has to be found among theirs.
"""

import warnings
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from typing import Any

from experiments.config import Config, ConfigError, nearest
from experiments.envs.packages import load
from experiments.envs.tasks import NAMES

# Ids of our own, with the hidden contexts that each can be in, the first one first.
OWN: dict[str, tuple[str, ...]] = {
    "CartPoleShift-v0": ("normal", "flipped", "long", "heavy"),
    "UserPop-v0": ("train", "users", "clusters"),
    **NAMES,
    "CrafterShift-v0": ("normal", "costs", "tools", "swapped", "inverted", "hungry"),
    "SlipperyAnt-v0": ("normal", "ice", "wet", "rubber"),
    "CoinRun-v0": (),
    "Recipes-v0": (),
    "crafter": (),
}

# Environments that step all slots at once: they know no pixels and no action_repeat.
NATIVE = frozenset({"CartPoleShift-v0", "UserPop-v0"})
# The env.kwargs that ids of our own take.
TAKES: dict[str, dict[str, type]] = {
    "CartPoleShift-v0": {"oracle": bool},
    "UserPop-v0": {"oracle": bool, "epoch": int, "population": int, "differ": list},
    **{name: {"oracle": bool} for name in NAMES},
    "CrafterShift-v0": {"oracle": bool, "length": int},
    "SlipperyAnt-v0": {
        **{"oracle": bool, "every": int, "schedule": int},
        **{"include_cfrc_ext_in_observation": bool, "terminate_when_unhealthy": bool},
    },
    "CoinRun-v0": {
        **{"use_backgrounds": bool, "restrict_themes": bool, "use_generated_assets": bool},
        **{"use_monochrome_assets": bool, "center_agent": bool, "distribution_mode": str},
    },
    "Recipes-v0": {"size": int},
}
# The range of each of them that has one.
RANGES: dict[str, dict[str, tuple[int, int]]] = {
    "Recipes-v0": {"size": (3, 6)},
    "CrafterShift-v0": {"length": (1, 10**6)},
    "SlipperyAnt-v0": {"every": (0, 10**9), "schedule": (0, 10**9)},
}
DIFFER = ("sign", "gravity", "length", "delay", "rotation", "wishes")  # traits of UserPop's users

# What an id starts with: the package that is needed, and the words after `pip install`.
EXTRAS = {
    "MiniGrid-": ("minigrid", "'nested-timescales[minigrid]'"),
    "BabyAI-": ("minigrid", "'nested-timescales[minigrid]'"),
    "MiniGrid3-": ("minigrid", "'nested-timescales[minigrid]'"),
    "MiniHack": ("minihack", "'nested-timescales[minihack]'"),
    "ALE/": ("ale_py", "'nested-timescales[atari]'"),
    "Atari6-": ("ale_py", "'nested-timescales[atari]'"),
    "CoinRun": ("procgen", "--no-deps procgen-mirror gym3 imageio"),
    "crafter": ("crafter", "'nested-timescales[crafter]'"),
    "CrafterShift-": ("crafter", "'nested-timescales[crafter]'"),
    "SlipperyAnt-": ("mujoco", "'nested-timescales[mujoco]'"),
}
# Families that gymnasium itself registers whether or not they can run.
_GYMNASIUM = {
    "gymnasium.envs.box2d": ("Box2D", "'gymnasium[box2d]'"),
    "gymnasium.envs.mujoco": ("mujoco", "'gymnasium[mujoco]'"),
    "gymnasium.envs.phys2d": ("jax", "'gymnasium[jax]'"),
    "gymnasium.envs.tabular": ("jax", "'gymnasium[jax]'"),
}


def check_env(config: Config) -> None:
    """Raise ConfigError for an environment that is unknown, lacks its package or its contexts."""
    name = config.env.id
    for prefix, (package, install) in EXTRAS.items():
        if name.startswith(prefix):
            _need(name, package, install)
    if name not in OWN and ":" not in name:
        _registered(name)
    _contexts(config, "env.contexts", config.env.contexts)
    _contexts(config, "evaluate.contexts", config.evaluate.contexts)
    if name in NATIVE:
        _native(config)
    if name in TAKES:
        _takes(config)
    if name in RANGES:
        _within(config, RANGES[name])


def _need(name: str, package: str, install: str) -> None:
    if find_spec(package) is None:
        problem = f"needs the package {package}, which is not installed"
        raise ConfigError("env.id", name, problem, f"pip install {install}")


def _registered(name: str) -> None:
    family = [package for prefix, (package, _) in EXTRAS.items() if name.startswith(prefix)]
    known = registry(family)
    if name not in known:
        near = nearest(name, [*OWN, *known]) or nearest(name, registry(["minigrid", "ale_py"]))
        raise ConfigError(
            "env.id", name, "no such environment is registered",
            f"did you mean {near}?" if near else "use a gymnasium id such as CartPole-v1",
        )  # fmt: skip
    for module, (package, install) in _GYMNASIUM.items():
        if known[name].startswith(module):
            _need(name, package, install)


def registry(extras: Iterable[str] = ()) -> dict[str, str]:
    """Every registered id -> its entry point, with those of these packages if installed."""
    from gymnasium.envs.registration import registry as registered

    with warnings.catch_warnings(action="ignore"):
        for package in extras:
            if find_spec(package) is not None:
                load(package)
    return {name: str(spec.entry_point) for name, spec in registered.items()}


def hidden_contexts(name: str, kwargs: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of an id's contexts; none where what is hidden changes without a signal."""
    return () if kwargs.get("every") else OWN.get(name, ())


def _contexts(config: Config, field: str, contexts: tuple[str, ...]) -> None:
    name, kwargs = config.env.id, config.env.kwargs
    known = hidden_contexts(name, kwargs)
    if contexts and not known:
        having = ", ".join(own for own, names in OWN.items() if names)
        when = f" with env.kwargs.every={kwargs['every']}" if OWN.get(name) else ""
        raise ConfigError(
            field, list(contexts), f"{name} has no hidden contexts{when}",
            f"use {field}=[], or one of {having}",
        )  # fmt: skip
    for i, context in enumerate(contexts):
        if context not in known:
            near = nearest(context, known)
            listed = f"one of {', '.join(known)}"
            raise ConfigError(
                f"{field}.{i}", context, f"no such context of {name}",
                f"did you mean {near}? ({listed})" if near else listed,
            )  # fmt: skip


def _native(config: Config) -> None:
    """What is stepped for all slots at once takes fewer options."""
    env = config.env
    for field, used in {"pixels": env.pixels, "action_repeat": env.action_repeat != 1}.items():
        if used:
            raise ConfigError(
                f"env.{field}", vars(env)[field], f"{env.id} does not take it",
                "leave it out, or use CartPole-v1",
            )  # fmt: skip


def _takes(config: Config) -> None:
    """Options of an environment of our own: known ones, of the right kind."""
    env, takes = config.env, TAKES[config.env.id]
    for key, value in env.kwargs.items():
        if key not in takes or type(value) is not takes[key]:
            listed = ", ".join(f"{name}: {kind.__name__}" for name, kind in takes.items())
            raise ConfigError(
                f"env.kwargs.{key}", value, f"{env.id} does not take it", f"it takes {listed}"
            )
    for i, trait in enumerate(env.kwargs.get("differ", ())):
        if trait not in DIFFER:
            raise ConfigError(
                f"env.kwargs.differ.{i}", trait, f"users of {env.id} have no such trait",
                f"one of {', '.join(DIFFER)}",
            )  # fmt: skip


def _within(config: Config, ranges: dict[str, tuple[int, int]]) -> None:
    """Whole numbers within their ranges."""
    for key, (low, high) in ranges.items():
        value = config.env.kwargs.get(key, low)
        if not low <= value <= high:
            raise ConfigError(
                f"env.kwargs.{key}", value, f"{config.env.id} does not take it",
                f"it takes {key}: {low} to {high}",
            )  # fmt: skip
