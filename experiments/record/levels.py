"""A run's schedule as others show it: levels.json, and config.yaml before that is written.

levels.json is `{"levels": rows of Timescales.table(), "timeline": {name: [update counts]}}`. Its
readers are pictures and tags, so a missing field costs a detail, never a report.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from experiments.record.run import RunError, read_json

UNTITLED = "?"


class LevelRow(NamedTuple):
    """One level: `every` in words, `period` in `unit`s, `moves` the first counts at which it moves.

    `copy` levels shadow parameters that other levels own; `share` is of all trainable parameters.
    """

    name: str
    period: float
    unit: str
    every: str
    copy: bool
    share: float | None
    moves: list[int]


def level_rows(path: Path, config: Mapping[str, Any]) -> list[LevelRow]:
    """The levels of the run in `path`, fastest first; [] where nothing tells."""
    try:
        value = read_json(path / "levels.json")
    except RunError:
        value = {}
    timeline = value.get("timeline") or {}
    rows = value.get("levels") or _from_config(config)
    return [_row(row, timeline) for row in rows if isinstance(row, dict)]


def schedule_text(rows: list[LevelRow]) -> str:
    """One line, such as `fast every update, slow every 16 updates`, of the levels that learn."""
    return ", ".join(f"{row.name} {row.every}" for row in rows if not row.copy)


def schedule_tag(rows: list[LevelRow]) -> str:
    """The same in a table's cell: `fast 1, slow 16`, with the unit where it is not updates."""
    units = {row.name: "" if row.unit == "update" else f" {row.unit}s" for row in rows}
    return ", ".join(f"{row.name} {row.period:g}{units[row.name]}" for row in rows if not row.copy)


def _from_config(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    levels = (config.get("timescales") or {}).get("levels") or {}
    return [
        {"name": name, "kind": "copy" if level.get("copy") else "match", **level.get("every", {})}
        for name, level in levels.items()
        if isinstance(level, dict)
    ]


def _row(row: dict[str, Any], timeline: Mapping[str, list[int]]) -> LevelRow:
    name = str(row.get("name", UNTITLED))
    period, unit = float(row.get("n") or 1), str(row.get("unit") or "update")
    every = f"every {unit}" if period == 1 else f"every {period:g} {unit}s"
    chance = float(row.get("p") or 1)
    words = every if chance == 1 else f"{every}, p {chance:g}"
    copy = row.get("kind") == "copy"
    return LevelRow(name, period, unit, words, copy, row.get("share"), timeline.get(name) or [])
