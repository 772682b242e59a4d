"""Changing a tree of plain values: merging files, setting dotted paths.

Giving another `kind` drops the fields that belonged to the former one, but for the optimizer that
every kind of `timescales` has; another `model.size` drops the widths that came with the former,
another `env.id` what only its environment knew.
"""

from collections.abc import Iterable
from typing import Any

from .errors import ConfigError, nearest
from .models import SIZED

Tree = dict[str, Any]
Path = tuple[str, ...]
LEVELS = ("timescales", "levels")
OWN = frozenset({"contexts", "lengths", "units", "kwargs"})  # of env: what one environment knows
DROPPED: dict[Path, frozenset[str]] = {("model", "size"): SIZED, ("env", "id"): OWN}
KEPT: dict[str, tuple[str, ...]] = {"timescales": ("rule",)}  # under another `kind` too


def merge(base: Tree, over: Tree) -> Tree:
    """`over` on top of `base`: mappings join, but one of another kind replaces."""
    out = {k: v for k, v in base.items() if k not in SIZED or "size" not in over}
    if "id" in over and over["id"] != base.get("id"):
        out = {k: v for k, v in out.items() if k not in OWN}
    for key, value in over.items():
        old = out.get(key)
        if not (isinstance(value, dict) and isinstance(old, dict)):
            out[key] = value
        elif value.get("kind", old.get("kind")) == old.get("kind"):
            out[key] = merge(old, value)
        else:
            out[key] = kept(key, old) | value
    return out


def kept(name: str, node: Tree) -> Tree:
    """What the mapping of this name keeps when it gets another kind."""
    return {key: node[key] for key in KEPT.get(name, ()) if node.get(key) is not None}


def put(tree: Tree, path: Path, value: Any) -> None:
    """Set the value at a dotted path, making mappings on the way. Raises ConfigError."""
    node: Any = tree
    for depth, part in enumerate(path[:-1]):
        if path[:depth] == LEVELS and part not in node:
            raise unknown_level(path, value, node)
        node = _child(node, part, path, value)
    last = path[-1]
    if isinstance(node, list):
        node[_index(node, last, path, value)] = value
        return
    if last == "kind" and node.get("kind") != value:
        same = kept(path[-2], node) if len(path) > 1 else {}
        node.clear()
        node.update(same)
    for name in DROPPED.get(path, frozenset()) if node.get(last) != value else ():
        node.pop(name, None)
    node[last] = value


def unknown_level(path: Path, value: Any, known: Iterable[str]) -> ConfigError:
    """The error of a path into a level that does not exist."""
    near = nearest(path[2], known)
    instead = ".".join((*LEVELS, near or "", *path[3:]))
    return ConfigError(
        ".".join(path),
        value,
        f"no level is named {path[2]} (levels: {', '.join(known)})",
        f"did you mean {instead}?"
        if near
        else f"add it whole: timescales.levels.{path[2]}={{...}}",
    )


def _child(node: Any, part: str, path: Path, value: Any) -> Any:
    """The mapping or list under `part`, made if there is none yet."""
    if isinstance(node, list):
        child = node[_index(node, part, path, value)]
    else:
        if node.get(part) is None:
            node[part] = {}
        child = node[part]
    if isinstance(child, dict | list):
        return child
    problem = f"{part} is a value, it has no fields"
    raise ConfigError(".".join(path), value, problem, f"set {part} itself")


def _index(node: list, part: str, path: Path, value: Any) -> int:
    if part.isdigit() and int(part) < len(node):
        return int(part)
    problem = f"{part} is not a place in a list of {len(node)}"
    way_out = f"use 0 to {len(node) - 1}" if node else "set the whole list, for example [...]"
    raise ConfigError(".".join(path), value, problem, way_out)
