"""YAML 1.2 in and out, and dotted paths.

`1e-3` is a number, `no` is a word, and a key given twice is refused.
"""

import io
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import YAMLError

from .errors import ConfigError


def parse_yaml(text: str, name: str) -> Any:
    """Plain values from YAML text; `name` is the file or field that an error names."""
    try:
        return YAML(typ="safe", pure=True).load(text)
    except DuplicateKeyError as error:
        key = str(error.problem).partition('"')[2].partition('"')[0]
        where, _ = _place(error, text, name)
        raise ConfigError(where, key, "this key is given twice", "keep one of the two") from None
    except YAMLError as error:
        where, line = _place(error, text, name)
        problem = str(getattr(error, "problem", None) or error).partition("\n")[0]
        way_out = "close what is open, or quote the value"
        raise ConfigError(where, line, f"not YAML: {problem}", way_out) from None


def _place(error: YAMLError, text: str, name: str) -> tuple[str, str]:
    """Where in a file an error is, as name:line, and that line; a single line is its own place."""
    mark = getattr(error, "problem_mark", None)
    lines = text.splitlines()
    if mark is None or len(lines) < 2:
        return name, text.strip()
    number = min(mark.line, len(lines) - 1)
    return f"{name}:{number + 1}", lines[number].strip()


def to_yaml(tree: dict[str, Any]) -> str:
    """YAML text of nested dictionaries, in their order."""
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.width = 100
    out = io.StringIO()
    yaml.dump(tree, out)
    return out.getvalue()


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted path -> scalar; lists and empty mappings become text."""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            out |= flat(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = str(value) if isinstance(value, list | dict) else value
    return out


def parse_override(text: str) -> tuple[tuple[str, ...], Any]:
    """`a.b.c=v` -> (("a", "b", "c"), v), where v is read as YAML."""
    path, equals, value = text.partition("=")
    if not equals or not all(path.split(".")):
        raise ConfigError(
            "override", text, "not of the form field=value", "write for example seed=1"
        )
    return tuple(path.split(".")), parse_yaml(value, path)
