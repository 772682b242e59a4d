"""The world outside, and the one place that assembles: environments, replay, the loop, records.

The public names are loaded when they are first used, so that `import experiments` costs nothing
and a mistake in a configuration is told before torch is imported.
"""

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import Config, load_config
    from .envs import make_envs
    from .evaluate import evaluate, load_run
    from .train import train

_HOMES = {
    "Config": "config",
    "load_config": "config",
    "make_envs": "envs",
    "evaluate": "evaluate",
    "load_run": "evaluate",
    "train": "train",
}

__all__ = ["Config", "evaluate", "load_config", "load_run", "make_envs", "train"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'experiments' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


class _Package(types.ModuleType):
    """Keeps `experiments.train` the function: importing the file of that name binds it nowhere."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
