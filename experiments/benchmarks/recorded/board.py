"""How far each seed of `nested bench offline` is, read from the folders that others write.

In a terminal a table that moves; elsewhere a line whenever a seed enters a phase or is done.
"""

import sys
from pathlib import Path
from typing import NamedTuple

from rich import box
from rich.table import Table

from experiments.benchmarks.recorded.play import FILE, LEARNED
from experiments.config.dreamer4 import PHASES
from experiments.progress import Screen, brief
from experiments.record.metrics import tail


class State(NamedTuple):
    """Where a seed stands."""

    seed: int
    doing: str
    update: str
    returns: tuple[str, ...]  # of LEARNED, last evaluated


class Board(Screen):
    """A line for each seed."""

    def __init__(self, root: Path, seeds: int) -> None:
        self._root, self._seeds = root, seeds
        self._told: dict[int, str] = {}
        super().__init__()

    def show(self) -> None:
        """Look again."""
        states = [state_of(self._root / f"seed-{seed}", seed) for seed in range(self._seeds)]
        if not self.plain:
            self.draw(table(states))
            return
        for state in states:
            if self._told.get(state.seed, "waits") != state.doing:
                self._told[state.seed] = state.doing
                scores = zip(LEARNED, state.returns, strict=True)
                text = "  ".join(f"{name} {score}" for name, score in scores if score)
                print(f"seed {state.seed}: {state.doing}  {text}", file=sys.stderr, flush=True)


def state_of(folder: Path, seed: int) -> State:
    """What the newest run of a seed says of itself."""
    spools = sorted(folder.glob("*/metrics.jsonl"), key=lambda path: path.stat().st_mtime)
    rows = tail(spools[-1]) if spools else []
    newest = {name: value for row in rows for name, value in row.metrics.items()}
    returns = tuple(
        brief(newest[key]) if (key := f"eval/{name}/return") in newest else "" for name in LEARNED
    )
    phase = newest.get("train/phase")
    doing = "waits" if not spools else "starts" if phase is None else PHASES[int(phase)]
    if "round/number" in newest:
        doing = "done" if (spools[-1].parent / FILE).exists() else "plays"
    update = f"{newest['train/update']:,.0f}" if "train/update" in newest else ""
    return State(seed, doing, update, returns)


def table(states: list[State]) -> Table:
    """All seeds."""
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    made.add_column("seed", justify="right")
    made.add_column("")
    for name in ("update", *LEARNED):
        made.add_column(name, justify="right")
    for state in states:
        made.add_row(str(state.seed), state.doing, state.update, *state.returns)
    return made
