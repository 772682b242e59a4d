"""What the command line prints: errors, the level table, the timeline, the list of runs.

Tables are rich's; where there is no terminal they take the width they need, in plain characters.
"""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.config import Config, ConfigError, LevelConfig, Part, levels_of, shown

WIDTH = 160  # columns where there is no terminal to fit


def error(found: ConfigError) -> None:
    """An error of a configuration on standard error: the field, what is wrong, the way out."""
    given = found.field if found.value is ... else f"{found.field} = {shown(found.value)}"
    lines = (f"error: {given}", found.problem, found.suggestion)
    print("\n  ".join(line for line in lines if line), file=sys.stderr)


def _console():
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH)


def _table(title: str, columns: Sequence[str], right: Sequence[str] = ()):
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return table


def levels(
    config: Config,
    rows: Sequence[Mapping[str, Any]],
    moves: Mapping[str, Sequence[int]],
    window: int,
) -> None:
    """The level table, and a mark for each of the first `window` updates at which a level moves."""
    console = _console()
    console.print(_level_table(levels_of(config), rows))
    console.print(_memory(config), markup=False)
    console.print(_timeline(rows, moves, window, console.options.ascii_only))


def _level_table(configured: Mapping[str, LevelConfig], rows: Sequence[Mapping[str, Any]]):
    columns = ("level", "owns", "parameters", "share", "moves", "how")
    table = _table("levels, fastest first", columns, right=("parameters", "share"))
    for row in rows:
        level = configured.get(row["name"])
        how = [_how(level, row), *row["relax"], *row["reset"]]
        table.add_row(
            row["name"], _text(_owns(level, row)), f"{row['parameters']:,}",
            f"{row['share']:.0%}", row["every"], _text(", ".join(how)),
        )  # fmt: skip
    return table


def _memory(config: Config) -> str:
    memory = config.model.memory
    if memory.kind == "none":
        return "no fast memory\n"
    until = "never" if memory.forget == "never" else f"at the start of each {memory.forget}"
    what = f"{memory.kind}, width {memory.dim}, {memory.heads} head(s)"
    return f"fast memory: {what}; writes at every step, one for each slot, forgotten {until}\n"


def _text(value: str):
    from rich.text import Text

    return Text(value)  # a regular expression's brackets are no markup


def _owns(level: LevelConfig | None, row: Mapping[str, Any]) -> str:
    if level is not None and isinstance(level.match, Part):
        return f"part {level.match.part + 1} of {level.match.of} by {level.match.by}"
    return f"a copy of {row['pattern']}" if row["kind"] == "copy" else row["pattern"]


def _how(level: LevelConfig | None, row: Mapping[str, Any]) -> str:
    """The flow in a few words: the rule with its learning rate where the level descends."""
    if level is None or level.flow is None or level.flow.kind != "descend" or not level.flow.rule:
        return str(row["flow"] or "no flow")
    total = " on the sum" if level.flow.reduce == "sum" else ""
    return f"{level.flow.rule.kind} lr {level.flow.rule.lr:g}{total}"


def _timeline(
    rows: Sequence[Mapping[str, Any]],
    moves: Mapping[str, Sequence[int]],
    window: int,
    plain: bool,
):
    table = _table(f"timeline: the first {window} updates, left to right", ("level", "", "moves"))
    mark, rest = ("#", ".") if plain else ("█", "·")
    for row in rows:
        hits = set(moves.get(row["name"], ()))
        line = "".join(mark if i in hits else rest for i in range(1, window + 1))
        table.add_row(row["name"], line if row["unit"] == "update" else "", _when(row, window))
    return table


def _when(row: Mapping[str, Any], window: int) -> str:
    if row["unit"] != "update":
        return f"{row['every']}, not by updates"
    first = (row["phase"] % row["n"]) or row["n"]
    return f"{row['every']}; first at {first}" if first > window else row["every"]


def runs(rows: Sequence[Any]) -> None:
    """One line for each run, oldest first."""
    columns = ("run", "state", "frames", "score", "started")
    table = _table(f"{len(rows)} runs", columns, right=("frames", "score"))
    for row in rows:
        score = "" if row.score is None else f"{row.score:.3g}"
        table.add_row(_text(str(row.path)), row.state, f"{row.step:,}", score, _ago(row.age))
    _console().print(table)


def _ago(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} seconds ago"


def metrics(values: Mapping[str, float]) -> None:
    """Name and value, one a line."""
    width = max(map(len, values), default=0)
    for name, value in values.items():
        print(f"{name:<{width}}  {value:.4g}")
