"""What the continual-learning benchmark says: a live table while it runs, the result as text.

The live table is rich's in a terminal; elsewhere each finished cell is a plain line. Figures are
means over seeds; the text adds 95 % intervals.
"""

import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from experiments.benchmarks import metrics
from experiments.benchmarks.cells import Cell, Result
from experiments.progress import Screen

SHOWN = ("AP_final", "AP_any", "ALA", "F", "online")


class Board(Screen):
    """A line for each cell: how far it is, then its scores."""

    def __init__(self, cells: Sequence[Cell]) -> None:
        self._cells = list(cells)
        self._state: dict[str, list[str]] = {cell.key: ["waits"] for cell in cells}
        self._started: dict[str, float] = {}
        super().__init__()

    def show(self, cell: Cell, share: float, result: Result | None) -> None:
        """A cell has come this far, or is done."""
        if result is None:
            self._started.setdefault(cell.key, time.monotonic())
            self._state[cell.key] = [f"{share:.0%}"]
        else:
            started = self._started.get(cell.key)
            spent = "found" if started is None else f"{time.monotonic() - started:.1f} s"
            self._state[cell.key] = [spent, *figures(result)]
        if not self.plain:
            self.draw(self._table())
        elif result is not None:
            text = "  ".join(
                f"{name} {figure}" for name, figure in zip(SHOWN, figures(result), strict=True)
            )
            spent = self._state[cell.key][0]
            print(
                f"{cell.stream} {cell.method:<15} {spent:>8}  {text}", file=sys.stderr, flush=True
            )

    def _table(self) -> Table:
        made = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        made.add_column("stream")
        made.add_column("method")
        for name in ("", *SHOWN):
            made.add_column(name, justify="right")
        for cell in self._cells:
            state = self._state[cell.key]
            made.add_row(
                cell.stream.removeprefix("cl/"),
                cell.method,
                *state,
                *[""] * (1 + len(SHOWN) - len(state)),
            )
        return made


def figures(result: Result) -> list[str]:
    """The means over seeds that are shown."""
    found = metrics.of_scores(result.scores) | dict(result.by_seed)
    if result.scores.shape[2]:
        found["online"] = result.by_task["online"].mean(1)
    return [f"{found[name].mean():.3f}" if name in found else "-" for name in SHOWN]


# ---- the result as text ------------------------------------------------------------------------
def table(summary: Mapping[str, Any]) -> str:
    """Metrics and differences of every stream."""
    parts = [
        part
        for stream, found in summary.items()
        for part in (f"\n{stream}, {_described(found)}", _metrics(found), _pairs(found))
    ]
    return "\n".join(parts).strip()


def _described(found: Mapping[str, Any]) -> str:
    """How many seeds, and the unit of scores that are no share of a cap."""
    seeds = f"{len(found['seeds'])} seeds"
    return f"{seeds}; scores: {found['unit']}" if "unit" in found else seeds


def _metrics(found: Mapping[str, Any]) -> str:
    methods = found["methods"].values()
    others = (
        "forward_transfer/ref",
        "fresh_gap",
        "dynamic_regret",
        "dormant",
        "plasticity/dormant",
        "erank",
        "again/kept",
        "again/savings",
    )
    shown = [name for name in SHOWN if any(name in row["metrics"] for row in methods)]
    names = (*shown, *(name for name in others if any(name in row["metrics"] for row in methods)))
    short = {
        "forward_transfer/ref": "FT/ref",
        "dynamic_regret": "regret",
        "plasticity/dormant": "dormant",
    }
    lines = [
        f"{'method':16}" + "".join(f"{short.get(name, name):>24}" for name in names)
        + f"{'core us/row':>13}{'FLOPs/row':>11}"
    ]  # fmt: skip
    for method, row in found["methods"].items():
        cells = "".join(f"{interval(row['metrics'].get(name)):>24}" for name in names)
        cost = row["cost"]
        lines.append(
            f"{method:16}{cells}{cost['core_us_per_interaction']:13.1f}"
            f"{cost['flops_per_interaction']:11,.0f}"
        )
    return "\n".join(lines)


def _pairs(found: Mapping[str, Any]) -> str:
    if not found["pairs"]:
        return ""
    names = [name for name in next(iter(found["pairs"].values())) if "frames" not in name]
    lines = [f"{'paired by seed':28}" + "".join(f"{name:>24}" for name in names)]
    for pair, row in found["pairs"].items():
        cells = "".join(f"{interval(row.get(name), name[0] != 'P'):>24}" for name in names)
        lines.append(f"{pair:28}{cells}")
    return "\n".join(lines)


def interval(row: Mapping[str, float] | None, sign: bool = False) -> str:
    """`0.553 [0.501, 0.604]`; with a sign for differences. Raw returns have fewer decimals."""
    if row is None:
        return "-"
    largest = max(abs(row[end]) for end in ("value", "low", "high"))
    digits = 3 if largest < 10 else 1 if largest < 1000 else 0
    form = f"+.{digits}f" if sign else f".{digits}f"
    return f"{row['value']:{form}} [{row['low']:{form}},{row['high']:{form}}]"
