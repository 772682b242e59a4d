"""Environments: any gymnasium id as N slots of rows, and ids of our own in gymnasium's registry.

The public names are loaded when they are first used: `known`, which checks a configuration, is
imported without torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

from experiments.envs.specs import register

if TYPE_CHECKING:
    from .build import make_envs, open_env
    from .rows import Envs, Row, random_action

_HOMES = {
    "make_envs": "build",
    "open_env": "build",
    "Envs": "rows",
    "Row": "rows",
    "random_action": "rows",
}

register()

__all__ = ["Envs", "Row", "make_envs", "open_env", "random_action"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'experiments.envs' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
