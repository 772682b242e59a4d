"""From a file or preset and `a.b.c=v` overrides to one checked, resolved `Config`.

In order: read the YAML (with what it `extends`), apply overrides, expand `timescales:` to named
levels, apply overrides on those, check what ties fields together. Giving another `kind` drops the
fields that belonged to the former one, wherever it is given; another `model.size` drops its widths.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from .check import check
from .errors import ConfigError, nearest
from .expand import expand
from .explain import explain
from .levels import LevelConfig, Levels
from .models import SIZED, Config
from .text import parse_override, parse_yaml

PRESETS = Path(__file__).parent.parent / "presets"

Override = tuple[tuple[str, ...], Any]
_LEVELS = ("timescales", "levels")


def presets() -> dict[str, str]:
    """Name -> first comment line of every preset that ships."""
    found = {p.stem: p.read_text("utf-8").partition("\n")[0] for p in PRESETS.glob("*.yaml")}
    return {
        name: found[name].lstrip("# ") for name in sorted(found, key=lambda n: (n != "default", n))
    }


def load_config(source: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a YAML file, a run's folder or a preset (None: the default one).

    Raises ConfigError for anything that cannot run.
    """
    changes = [parse_override(text) for text in overrides]
    config = _validate(_read(str(source or "default"), ()), ())
    early = [c for c in changes if c[0][:2] != _LEVELS]
    config = resolve(_changed(config, early))
    config = _changed(config, [c for c in changes if c[0][:2] == _LEVELS])
    check(config)
    return config


def resolve(config: Config) -> Config:
    """The same configuration with `timescales` written out as levels."""
    return _validate({**config.tree(), "timescales": expand(config.timescales)}, ())


def levels_of(config: Config) -> dict[str, LevelConfig]:
    """The levels by name, from fastest to slowest."""
    timescales = resolve(config).timescales
    assert isinstance(timescales, Levels)
    return timescales.levels


# ---- reading -----------------------------------------------------------------------------------
def _find(source: str, field: str) -> Path:
    path = Path(source)
    if path.is_dir() and (path / "config.yaml").is_file():
        return path / "config.yaml"
    if path.is_file():
        return path
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        raise ConfigError(field, source, "no such file", "give a YAML file or a preset's name")
    preset = PRESETS / f"{source}.yaml"
    if preset.is_file():
        return preset
    near = nearest(source, presets())
    listed = f"presets: {', '.join(presets())}"
    raise ConfigError(
        field,
        source,
        "no such preset or file",
        f"did you mean {near}? ({listed})" if near else listed,
    )


def _read(source: str, seen: tuple[Path, ...]) -> dict[str, Any]:
    """The mapping in a file, merged over what it extends."""
    path = _find(source, "extends" if seen else "config").resolve()
    if path in seen:
        raise ConfigError("extends", source, "a file extends itself", "break the circle")
    try:
        tree = parse_yaml(path.read_text("utf-8"), path.name) or {}
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("config", source, f"cannot be read: {error}", "") from None
    if not isinstance(tree, dict):
        raise ConfigError("config", source, "not a mapping of fields", "write for example seed: 1")
    base = tree.pop("extends", None)
    if base is None:
        return tree
    beside = path.parent / str(base)
    return merge(_read(str(beside if beside.is_file() else base), (*seen, path)), tree)


# ---- changing ----------------------------------------------------------------------------------
def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` on top of `base`; a mapping of another kind replaces, others join."""
    out = dict(base)
    if "size" in over:
        out = {k: v for k, v in out.items() if k not in SIZED}
    for key, value in over.items():
        old = out.get(key)
        joins = isinstance(value, dict) and isinstance(old, dict)
        if joins and value.get("kind", old.get("kind")) == old.get("kind"):
            out[key] = merge(old, value)
        else:
            out[key] = value
    return out


def _changed(config: Config, changes: Iterable[Override]) -> Config:
    # Kinds first, outermost before innermost: each drops its siblings, whatever the order given.
    ordered = sorted(changes, key=lambda c: (c[0][-1] not in ("kind", "size"), len(c[0])))
    tree = config.tree()
    for path, value in ordered:
        _put(tree, path, value)
    return _validate(tree, ordered) if ordered else config


def _put(tree: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    node: Any = tree
    for depth, part in enumerate(path[:-1]):
        if isinstance(node, dict) and path[:depth] == _LEVELS and part not in node:
            _unknown_level(path, value, node)
        node = _child(node, part, path, value)
    last = path[-1]
    if isinstance(node, list):
        node[_index(node, last, path, value)] = value
        return
    if last == "kind" and node.get("kind") != value:
        node.clear()
    if path == ("model", "size"):
        for name in SIZED:
            node.pop(name, None)
    node[last] = value


def _child(node: Any, part: str, path: tuple[str, ...], value: Any) -> Any:
    """The mapping or list under `part`, made if there is none yet."""
    if isinstance(node, list):
        child = node[_index(node, part, path, value)]
    else:
        child = node[part] if node.get(part) is not None else node.setdefault(part, {}) or {}
        node[part] = child
    if isinstance(child, dict | list):
        return child
    field = ".".join(path)
    raise ConfigError(field, value, f"{part} is a value, it has no fields", f"set {part} itself")


def _index(node: list, part: str, path: tuple[str, ...], value: Any) -> int:
    if part.isdigit() and int(part) < len(node):
        return int(part)
    raise ConfigError(
        ".".join(path), value, f"{part} is not a place in a list of {len(node)}",
        f"use 0 to {len(node) - 1}" if node else "set the whole list, for example [...]",
    )  # fmt: skip


def _unknown_level(path: tuple[str, ...], value: Any, known: dict[str, Any]) -> None:
    near = nearest(path[2], known)
    instead = ".".join((*_LEVELS, near, *path[3:])) if near else ""
    raise ConfigError(
        ".".join(path), value, f"no level is named {path[2]} (levels: {', '.join(known)})",
        f"did you mean {instead}?" if near else f"add one with timescales.levels.{path[2]}={{...}}",
    )  # fmt: skip


def _validate(tree: dict[str, Any], changes: Iterable[Override]) -> Config:
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise explain(error, list(changes)) from None
