"""Cells: a stream, a method and seeds give one result, in a folder of its own.

A folder appears whole or not at all, so a suite that is killed goes on with the cell it was in and
repeats none that is done; processes that run one suite share its cells, for each takes a lock on
the cell that it runs. A folder's name holds a digest of all that the result depends on: other
options are other cells. Any kind of stream fits whose result has scores R: a `Family` says who runs
its cells.
"""

import csv
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from experiments.benchmarks import metrics
from experiments.benchmarks.sharing import PAUSE, claim
from experiments.record.run import revision

COLUMNS = ("stream", "method", "seed", "after", "task", "metric", "value")


class Cell(NamedTuple):
    """What is run in one piece; `options` are JSON values, everything else that counts."""

    stream: str
    method: str
    seeds: tuple[int, ...]
    options: Mapping[str, Any]

    @property
    def key(self) -> str:
        """The folder's name."""
        whole = json.dumps(described(self), sort_keys=True)
        digest = hashlib.sha256(whole.encode()).hexdigest()[:10]
        return f"{self.stream.rpartition('/')[2]}--{self.method}--{digest}"


class Result(NamedTuple):
    """What a cell gave, for S seeds and N tasks."""

    scores: np.ndarray  # R (S, N+1, N)
    by_task: dict[str, np.ndarray]  # (S, N) each: "auc", "online", "dormant" ...
    arrays: dict[str, np.ndarray]  # anything else that is worth keeping
    info: dict[str, Any]  # JSON values: costs
    by_seed: Mapping[str, np.ndarray] = MappingProxyType({})  # (S,) each: "again/savings" ...


Tell = Callable[[float], None]  # hears the share of a cell that is done
Run = Callable[[Cell, Tell], Result]


class Family(NamedTuple):
    """Streams of one kind: what can be run on them, and by whom."""

    methods: Mapping[str, str]  # a line about each
    fields: Mapping[str, Any]  # the options of a cell, with their defaults; JSON values
    check: Callable[[Cell], None]  # raises ConfigError for a cell that cannot run
    run: Run
    only: Mapping[str, Sequence[str]] = MappingProxyType({})  # fields that few methods have

    def options(self, method: str, changes: Mapping[str, Any]) -> dict[str, Any]:
        """The options of a method's cell: the defaults with changes, of the fields that it has."""
        whole = {**self.fields, **changes}
        return {name: v for name, v in whole.items() if method in self.only.get(name, (method,))}


def described(cell: Cell) -> dict[str, Any]:
    """A cell as JSON values."""
    return {**cell._asdict(), "seeds": list(cell.seeds), "options": dict(cell.options)}


def run_cells(
    cells: Sequence[Cell],
    families: Mapping[str, Family],
    folder: Path,
    show: Callable[[Cell, float, Result | None], None] = lambda cell, share, result: None,
) -> dict[str, Result]:
    """Results by key: found in `folder`, or run and put there. `show` hears of every step.

    A cell that another process runs is waited for; should that process die, it is run here.
    """
    found: dict[str, Result] = {}
    waiting, commit = list(cells), revision()
    while waiting:
        before, waiting = waiting, []
        for cell in before:
            path = folder / cell.key
            with claim(path) as ours:
                if ours and not path.exists():
                    show(cell, 0.0, None)
                    run = families[cell.stream].run
                    result = run(cell, lambda share, cell=cell: show(cell, share, None))
                    save(path, cell, result._replace(info={**result.info, "commit": commit}))
            if path.exists():
                found[cell.key] = load(path)
                show(cell, 1.0, found[cell.key])
            else:
                waiting.append(cell)
        if len(waiting) == len(before):
            time.sleep(PAUSE)
    return {cell.key: found[cell.key] for cell in cells}


def there(cells: Iterable[Cell], folder: Path) -> dict[str, Result]:
    """Results by key of the cells that are done; nothing is run."""
    return {cell.key: load(folder / cell.key) for cell in cells if (folder / cell.key).is_dir()}


def save(path: Path, cell: Cell, result: Result) -> None:
    """Write a cell's folder: cell.json, R.npz and rows.csv; whole or not at all."""
    half = path.with_name(f".{path.name}.{os.getpid()}")
    half.mkdir(parents=True)
    try:
        stored = {f"by_task/{name}": values for name, values in result.by_task.items()}
        stored |= {f"by_seed/{name}": values for name, values in result.by_seed.items()}
        _store(half / "R.npz", {"R": result.scores, **stored, **result.arrays})
        with (half / "rows.csv").open("w", newline="", encoding="utf-8") as file:
            write_rows(file, rows(cell, result))
        text = json.dumps({**described(cell), "info": result.info}, indent=2)
        (half / "cell.json").write_text(text, encoding="utf-8")
        try:
            half.rename(path)
        except OSError:
            if not path.is_dir():  # else another process ran the same cell and was faster
                raise
    finally:
        shutil.rmtree(half, ignore_errors=True)


def load(path: Path) -> Result:
    """The result in a cell's folder."""
    with np.load(path / "R.npz") as stored:
        arrays = {name: stored[name] for name in stored.files}
    info = json.loads((path / "cell.json").read_text("utf-8"))["info"]
    by_task, by_seed = (
        {name[8:]: arrays.pop(name) for name in list(arrays) if name.startswith(f"{kind}/")}
        for kind in ("by_task", "by_seed")
    )
    return Result(arrays.pop("R"), by_task, arrays, info, by_seed)


def _store(path: Path, arrays: Mapping[str, Any]) -> None:
    np.savez_compressed(path, **arrays)


# ---- long format -------------------------------------------------------------------------------
def rows(cell: Cell, result: Result) -> Iterator[tuple]:
    """Rows of COLUMNS: every score, every number by task, every metric by seed.

    `after` counts the tasks trained on and `task` the tasks, both from 1; empty where a number is
    not of a task or of a moment.
    """
    names = (cell.stream, cell.method)
    for s, seed in enumerate(cell.seeds):
        for (after, task), value in np.ndenumerate(result.scores[s]):
            yield *names, seed, after, task + 1, "score", float(value)
        for name, values in result.by_task.items():
            for task, value in enumerate(values[s]):
                yield *names, seed, task + 1, task + 1, name, float(value)
    for name, values in (metrics.of_scores(result.scores) | dict(result.by_seed)).items():
        for seed, value in zip(cell.seeds, values, strict=True):
            yield *names, seed, "", "", name, float(value)


def write_rows(file: Any, found: Iterable[tuple]) -> None:
    """A table in long format, with its head."""
    writer = csv.writer(file)
    writer.writerow(COLUMNS)
    writer.writerows(found)


def collect(cells: Iterable[Cell], results: Mapping[str, Result], folder: Path) -> None:
    """All cells in one: results.csv in long format, and R.npz with `stream/method` for each R."""
    cells = list(cells)
    with (folder / "results.csv").open("w", newline="", encoding="utf-8") as file:
        write_rows(file, (row for cell in cells for row in rows(cell, results[cell.key])))
    scores = {f"{cell.stream}/{cell.method}": results[cell.key].scores for cell in cells}
    _store(folder / "R.npz", scores)
