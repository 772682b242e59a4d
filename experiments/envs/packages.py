"""Optional packages of environments: how each is imported where `import` alone would fail.

MiniHack 1.0 asks setuptools' `pkg_resources`, which newer ones no longer have, where its files are.
Procgen registers its environments with the old gym when it is imported; its engine needs none.
"""

import importlib
import sys
import types
from collections.abc import Callable
from importlib.util import find_spec, module_from_spec
from pathlib import Path


def load(package: str) -> types.ModuleType:
    """The package, imported; ModuleNotFoundError where it is not installed."""
    return _LOADERS.get(package, importlib.import_module)(package)


def _minihack(package: str) -> types.ModuleType:
    if package in sys.modules or find_spec("pkg_resources") is not None:
        return importlib.import_module(package)
    told = types.ModuleType("pkg_resources")
    told.__dict__["resource_filename"] = _beside
    sys.modules["pkg_resources"] = told
    try:
        return importlib.import_module(package)
    finally:
        del sys.modules["pkg_resources"]


def _beside(package: str, path: str) -> str:
    """Where a file of a package is."""
    spec = find_spec(package)
    assert spec is not None and spec.origin is not None, package
    return str(Path(spec.origin).parent / path)


def _procgen(package: str) -> types.ModuleType:
    """`procgen.env` inside a package whose own first lines do not run."""
    importlib.import_module("gym3")
    if package not in sys.modules:
        spec = find_spec(package)
        if spec is None:
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)
        sys.modules[package] = module_from_spec(spec)
    return importlib.import_module(f"{package}.env")


_LOADERS: dict[str, Callable[[str], types.ModuleType]] = {
    "minihack": _minihack,
    "procgen": _procgen,
}
