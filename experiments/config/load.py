"""From a file or preset and `a.b.c=v` overrides to one checked, resolved `Config`.

In order: read the YAML (with what it `extends`), apply overrides, expand `timescales:` to named
levels, apply overrides on those, check what ties fields together.
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
from .models import Config
from .text import parse_override, parse_yaml
from .tree import LEVELS, merge, put

PRESETS = Path(__file__).parent.parent / "presets"

Override = tuple[tuple[str, ...], Any]


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
    early = [c for c in changes if c[0][:2] != LEVELS]
    config = resolve(_changed(config, early))
    config = _changed(config, [c for c in changes if c[0][:2] == LEVELS])
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
def read_tree(source: str) -> dict[str, Any]:
    """The mapping in a file, a run's folder or a preset, with what it extends; nothing checked."""
    return _read(source, ())


def _find(source: str, field: str) -> Path:
    path = Path(source)
    if path.is_dir():
        path /= "config.yaml"
    if path.is_file():
        return path
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        raise ConfigError(field, str(path), "no such file", "give a YAML file or a preset's name")
    for preset in (PRESETS / f"{source}.yaml", PRESETS / "offline" / f"{source}.yaml"):
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
def _changed(config: Config, changes: Iterable[Override]) -> Config:
    # Kinds first, outermost before innermost: each drops its siblings, whatever the order given.
    ordered = sorted(changes, key=lambda c: (c[0][-1] not in ("kind", "size", "id"), len(c[0])))
    tree = config.tree()
    for path, value in ordered:
        put(tree, path, value)
    return _validate(tree, ordered) if ordered else config


def _validate(tree: dict[str, Any], changes: Iterable[Override]) -> Config:
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise explain(error, list(changes)) from None
