"""A suite in MLflow: a parent run with the page and the tables, one child for each cell.

A process of its own (`python -m experiments.benchmarks.tasks.tracked OUT URI`), so that mlflow is
never imported where something learns. Children are found again by their cell, which never changes:
a suite that went on adds what is new. Charts are grouped by the part of a name before the slash:
`final/` with `low/` and `high/` the ends of its interval, `score/` on each task after so many
tasks, `course/` in each context by frames, `lived/` of a stream without tasks, `cost/`.
"""

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np

from experiments.benchmarks.cells import Result, load
from experiments.record.mirror import BATCH, CHARTS, QUIET, Value, clean, flatten, metric_name

if TYPE_CHECKING:
    from mlflow import MlflowClient

EXPERIMENT = "continual"
SUITE, CELL = "nested.suite", "nested.cell"  # tags that runs are found by
PARENT = "mlflow.parentRunId"
FILES = ("*.png", "results.csv", "R.npz", "summary.json")


def send(out: Path, uri: str) -> str:
    """Send what suite.json lists; returns the address of the charts."""
    os.environ.update({k: v for k, v in QUIET.items() if k not in os.environ})
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    suite = json.loads((out / "suite.json").read_text("utf-8"))
    summary = json.loads((out / "summary.json").read_text("utf-8"))
    found = client.get_experiment_by_name(EXPERIMENT)
    tags = {"mlflow.experimentKind": "custom_model_development"}  # not GenAI
    number = found.experiment_id if found else client.create_experiment(EXPERIMENT, tags=tags)
    parent = _run(client, number, SUITE, str(out.resolve()), suite["tier"], {})
    for key in suite["cells"]:
        _child(client, number, parent, out / "cells" / key, summary)
    for path in sorted(path for pattern in FILES for path in out.glob(pattern)):
        client.log_artifact(parent, str(path))
    client.log_metric(parent, "cells/done", len(suite["cells"]))
    client.log_metric(parent, "cells/missing", len(suite["missing"]))
    client.set_tag(parent, "mlflow.note.content", _note(suite))
    client.set_terminated(parent)
    site = uri if uri.startswith("http") else "http://127.0.0.1:5000"
    # Charts leave out children that are folded: filtered, and in no order of time, none is.
    asked = {
        "searchFilter": f"tags.`{PARENT}` = '{parent}'",
        "orderByKey": "metrics.`final/AP_final`",
        "orderByAsc": "false",
    }
    query = "&".join(f"{key}={quote(value)}" for key, value in asked.items())
    return f"{site.rstrip('/')}/#/experiments/{number}/runs?{CHARTS}&{query}"


def _child(
    client: "MlflowClient", number: str, parent: str, path: Path, summary: Mapping[str, Any]
) -> None:
    """One cell, unless it is there."""
    from mlflow.entities import Metric, Param

    cell = json.loads((path / "cell.json").read_text("utf-8"))
    tags = {PARENT: parent, "stream": cell["stream"], "method": cell["method"]}
    before = client.search_runs([number], f"tags.`{CELL}` = '{path.name}'")
    if any(run.info.status == "FINISHED" and run.data.tags.get(PARENT) == parent for run in before):
        return
    name = f"{cell['method']} on {cell['stream'].rpartition('/')[2]}"
    run = _run(client, number, CELL, path.name, name, tags)
    given = {"stream": cell["stream"], "method": cell["method"], "seeds": len(cell["seeds"])}
    params = [Param(key, value) for key, value in flatten({**given, **cell["options"]})]
    client.log_batch(run, params=params)
    row = summary[cell["stream"]]["methods"][cell["method"]]
    values = list(points(load(path), row))
    for start in range(0, len(values), BATCH):
        batch = values[start : start + BATCH]
        client.log_batch(run, metrics=[Metric(*value) for value in batch])
    for file in sorted(path.iterdir()):
        client.log_artifact(run, str(file))
    client.set_terminated(run)


def _run(
    client: "MlflowClient", number: str, tag: str, value: str, name: str, tags: Mapping[str, str]
) -> str:
    """The run with this tag, begun if it is not there."""
    own = f"tags.`{tag}` = '{value}'"
    same = f" and tags.`{PARENT}` = '{tags[PARENT]}'" if PARENT in tags else ""
    found = client.search_runs([number], own + same)
    if found:
        return found[0].info.run_id
    made = client.create_run(number, tags={tag: value, **tags}, run_name=name)
    return made.info.run_id


def points(result: Result, row: Mapping[str, Any]) -> Iterator[Value]:
    """What a cell says as points of metrics: means over seeds, and their intervals' ends."""
    now = int(time.time() * 1000)
    for name, found in row["metrics"].items():
        for part, key in (("final", "value"), ("low", "low"), ("high", "high")):
            yield Value(metric_name(f"{part}/{name}"), found[key], now, 0)
    for name, value in row["cost"].items():
        if isinstance(value, int | float):
            yield Value(clean(f"cost/{name}"), float(value), now, 0)
    tasks = result.info.get("contexts") or [f"task{j + 1}" for j in range(result.scores.shape[2])]
    if result.scores.size:
        yield from series("score", tasks, result.scores.mean(0), range(len(tasks) + 1), now)
    if "curve" in result.arrays:
        lived, edges = result.arrays["curve"].mean(0), result.arrays["frames"]
        yield from series("lived", ["online"], lived[:, None], edges[1:].tolist(), now)
    if "course" in result.arrays:
        course, frames = result.arrays["course"].mean(0), result.arrays["frames"]
        for phase, scores in enumerate(course):
            times = phase * int(frames[-1]) + frames
            first = int(phase > 0)  # a phase begins where the one before ended
            yield from series("course", tasks, scores[first:], times[first:].tolist(), now)


def series(
    head: str, names: Sequence[str], scores: np.ndarray, steps: Sequence[int], now: int
) -> Iterator[Value]:
    """Scores (T, N) at T steps."""
    for step, row in zip(steps, scores, strict=True):
        for name, score in zip(names, row, strict=True):
            yield Value(clean(f"{head}/{name}"), float(score), now, int(step))


def _note(suite: Mapping[str, Any]) -> str:
    """The parent's description."""
    missing = ", ".join(islice(suite["missing"], 40)) or "none"
    return f"Tier **{suite['tier']}**, {len(suite['cells'])} cells. Not run yet: {missing}."


if __name__ == "__main__":
    print(send(Path(sys.argv[1]), sys.argv[2]))
