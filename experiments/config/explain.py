"""From pydantic's error to ours: the field as the user wrote it, the value, the way out.

Pydantic puts tags of unions into the path of an error; the JSON schema tells which parts those are,
which fields exist there, and what they mean.
"""

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from .errors import ConfigError, nearest
from .models import Config

Path = tuple[str, ...]


def explain(
    error: ValidationError,
    overrides: Sequence[tuple[Path, Any]],
    model: type[BaseModel] = Config,
) -> ConfigError:
    """The most telling complaint of pydantic as a ConfigError: a misspelt name before the rest."""
    errors = error.errors(include_url=False)
    first = min(errors, key=lambda found: found["type"] != "extra_forbidden")
    path, node, parent = _locate([str(part) for part in first["loc"]], model)
    context = first.get("ctx", {})
    match first["type"]:
        case "extra_forbidden":
            return _unknown(path, first["input"], parent, overrides)
        case "union_tag_invalid" | "union_tag_not_found":
            return _wrong_kind(path, first["input"], context, node)
        case "missing":
            field = ".".join(path)
            return ConfigError(field, ..., "is missing", _meaning(node) or f"give {field}")
    field, value = _as_given(path, first["input"], overrides)
    problem = _plain_words(first["msg"])
    return ConfigError(field, value, problem, _way_out(first["type"], value, context, node))


# ---- walking the schema ------------------------------------------------------------------------
def _locate(loc: list[str], model: type[BaseModel]) -> tuple[Path, dict, dict]:
    """Path without union tags, schema of the field, schema of what holds it."""
    schema = model.model_json_schema()
    definitions = schema["$defs"]
    path: list[str] = []
    node = parent = schema
    for part in loc:
        node = _resolve(node, definitions)
        choice = _chosen(node, part, definitions)
        if choice is not None:
            node = _described(node) | choice
            continue
        path.append(part)
        parent = node
        node = node.get("properties", {}).get(part) or _inner(node)
    return tuple(path), _resolve(node, definitions), parent


def _resolve(node: dict, definitions: dict) -> dict:
    """Follow references, and through `| None`; keep the field's own description and default."""
    options = [o for o in node.get("anyOf", ()) if o.get("type") != "null"]
    target = options[0] if len(options) == 1 else None
    if "$ref" in node:
        target = definitions[node["$ref"].rsplit("/", 1)[1]]
    if target is None:
        return node
    return _resolve(target, definitions) | _described(node)


def _described(node: dict) -> dict:
    """What a field says of itself, whatever its type."""
    return {key: node[key] for key in ("description", "default") if key in node}


def _chosen(node: dict, part: str, definitions: dict) -> dict | None:
    """The member of a union that a part of an error's path stands for, if it is such a part."""
    mapping = node.get("discriminator", {}).get("mapping")
    if mapping and part in mapping:
        return definitions[mapping[part].rsplit("/", 1)[1]]
    for option in (*node.get("anyOf", ()), *node.get("oneOf", ())):
        name = option.get("$ref", "").rsplit("/", 1)[-1]
        if part in (name, {"string": "str", "number": "float"}.get(option.get("type", ""), "")):
            return definitions.get(name, option)
    return None


def _inner(node: dict) -> dict:
    inner = node.get("additionalProperties", node.get("items", {}))
    return inner if isinstance(inner, dict) else {}


# ---- words -------------------------------------------------------------------------------------
def _as_given(path: Path, value: Any, overrides: Sequence[tuple[Path, Any]]) -> tuple[str, Any]:
    """The override that reaches into a path, else the path itself."""
    for given, new in overrides:
        if given[: len(path)] == path:
            return ".".join(given), new
    return ".".join(path), value


def _unknown(path: Path, value: Any, parent: dict, overrides: Sequence) -> ConfigError:
    known = [name for name in parent.get("properties", {}) if name != "kind"]
    field, value = _as_given(path, value, overrides)
    near = nearest(path[-1], known)
    rest = field.split(".")[len(path) :]
    instead = ".".join((*path[:-1], near or "", *rest))
    where = ".".join(path[:-1])
    kind = parent.get("properties", {}).get("kind", {}).get("const")
    owner = f"{where} of kind {kind}" if kind else where or "the configuration"
    listed = f"its fields are {', '.join(known)}" if known else "it has no fields"
    if near is None and field.startswith("timescales.") and kind is not None:
        listed += f"; for another kind give {where}.kind=... too"
    return ConfigError(
        field, value, f"{owner} has no field {path[-1]}",
        f"did you mean {instead}?" if near else listed,
    )  # fmt: skip


def _wrong_kind(path: Path, value: Any, context: dict, node: dict) -> ConfigError:
    kinds = list(node.get("discriminator", {}).get("mapping", {}))
    tag = context.get("tag")
    field = ".".join((*path, "kind"))
    near = nearest(str(tag), kinds) if tag else None
    listed = f"one of {', '.join(kinds)}"
    problem = "no such kind" if tag else "a kind is missing"
    return ConfigError(
        field, tag or ..., problem, f"did you mean {near}? ({listed})" if near else listed
    )


def _meaning(node: dict) -> str:
    text = node.get("description", "").partition("\n")[0]
    default = node.get("default")
    if default is not None and not isinstance(default, dict | list):
        text += f" (default {default})"
    return text


def _plain_words(message: str) -> str:
    for theirs, ours in (
        (
            "Input should be a valid dictionary or object to extract fields from",
            "must be a mapping",
        ),
        ("Input should be a valid dictionary", "must be a mapping"),
        (" or instance of", ":"),
        ("Input should be", "must be"),
        ("String should", "must"),
        ("greater than or equal to", "at least"),
        ("less than or equal to", "at most"),
        (", unable to parse string as an integer", ""),
        (", unable to parse string as a number", ""),
    ):
        message = message.replace(theirs, ours)
    return message


def _way_out(kind: str, value: Any, context: dict, node: dict) -> str:
    if kind == "literal_error":
        near = nearest(str(value), [str(choice) for choice in node.get("enum", ())], cutoff=0.7)
        if near:
            return f"did you mean {near}?"
    if kind == "greater_than_equal":
        return f"use {context['ge']} or more; {_meaning(node)}"
    return _meaning(node)
