"""A suite in MLflow: what its points are, and that what is there is not sent again."""

import json
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from experiments.benchmarks import cells
from experiments.benchmarks.cells import Cell, Result
from experiments.benchmarks.tasks import tracked
from experiments.benchmarks.tasks.summary import summarise

CELL = Cell("cl/A-v0", "k3", (0, 1), {"tasks": 2, "lr": 0.1})


def result() -> Result:
    course = np.arange(24.0).reshape(1, 2, 3, 4) / 24 * np.ones((2, 1, 1, 1))
    info = {
        "core_seconds": 2.0, "core_us_per_interaction": 3.0, "flops_per_interaction": 4.0,
        "levels": {}, "contexts": ["normal", "flipped"],
    }  # fmt: skip
    arrays = {"course": course[..., :2], "frames": np.array([0, 40, 80])}
    scores = np.array([[[0.1, 0.1], [0.8, 0.2], [0.5, 0.9]]] * 2)
    return Result(scores, {"online": np.full((2, 2), 0.5)}, arrays, info)


def test_points_are_means_over_seeds_at_their_moments():
    row = summarise([CELL], {CELL.key: result()})["cl/A-v0"]["methods"]["k3"]
    found = list(tracked.points(result(), row))
    assert all(n == 1 for n in Counter((v.name, v.step) for v in found).values())
    values = {(v.name, v.step): v.value for v in found}
    assert values["final/F", 0] == pytest.approx(0.3) == values["low/F", 0]
    assert [values["score/normal", i] for i in range(3)] == pytest.approx([0.1, 0.8, 0.5])
    assert values["cost/core_us_per_interaction", 0] == 3.0
    assert ("cost/levels", 0) not in values
    course = result().arrays["course"][0]
    # the second phase begins where the first one ended, at 80 frames
    steps = sorted(step for name, step in values if name == "course/flipped")
    assert steps == [0, 40, 80, 120, 160]
    assert values["course/flipped", 120] == course[1, 1, 1]


class Client:
    """Of an MLflow that remembers what it was told."""

    runs: dict[str, Any] = {}  # noqa: RUF012  all clients see one server
    sent: list[str] = []  # noqa: RUF012

    def __init__(self, uri: str) -> None:
        assert uri == "sqlite:///x.db"

    def get_experiment_by_name(self, name: str) -> None:
        return None

    def create_experiment(self, name: str, tags: dict[str, str]) -> str:
        return "1"

    def search_runs(self, experiments: list[str], text: str) -> list[Any]:
        wanted = [part.split(" = ") for part in text.split(" and ")]
        tags = {key.removeprefix("tags.").strip("`"): value.strip("'") for key, value in wanted}
        return [run for run in self.runs.values() if tags.items() <= run.data.tags.items()]

    def create_run(self, number: str, tags: dict[str, str], run_name: str) -> Any:
        info = SimpleNamespace(run_id=f"r{len(self.runs)}", run_name=run_name, status="RUNNING")
        run = SimpleNamespace(info=info, data=SimpleNamespace(tags=dict(tags)))
        self.runs[info.run_id] = run
        return run

    def set_terminated(self, run: str) -> None:
        self.runs[run].info.status = "FINISHED"

    def log_batch(self, run: str, params: Any = (), metrics: Any = ()) -> None:
        self.sent += [f"{run} {given[0]}" for given in (*params, *metrics)]

    def log_artifact(self, run: str, path: str) -> None:
        self.sent.append(f"{run} {Path(path).name}")

    def log_metric(self, run: str, name: str, value: float) -> None:
        self.sent.append(f"{run} {name}={value}")

    def set_tag(self, run: str, name: str, value: str) -> None:
        self.runs[run].data.tags[name] = value


def test_a_parent_has_a_child_for_each_cell_and_each_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    mlflow, entities = ModuleType("mlflow"), ModuleType("mlflow.entities")
    vars(mlflow).update(MlflowClient=Client)
    vars(entities).update(Metric=lambda *given: given, Param=lambda *given: given)
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    monkeypatch.setitem(sys.modules, "mlflow.entities", entities)
    cells.save(tmp_path / "cells" / CELL.key, CELL, result())
    summary = summarise([CELL], {CELL.key: result()})
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    suite = {"tier": "smoke", "cells": [CELL.key], "missing": ["cl/A-v0 k5"]}
    (tmp_path / "suite.json").write_text(json.dumps(suite))
    address = tracked.send(tmp_path, "sqlite:///x.db")
    assert address.startswith("http://127.0.0.1:5000/#/experiments/1/runs?")
    parent, child = Client.runs.values()
    assert child.data.tags[tracked.PARENT] == parent.info.run_id
    assert (parent.info.run_name, child.info.run_name) == ("smoke", "k3 on A-v0")
    assert "cl/A-v0 k5" in parent.data.tags["mlflow.note.content"]
    for sent in ("r1 lr", "r1 final/F", "r1 R.npz", "r0 summary.json", "r0 cells/missing=1"):
        assert sent in Client.sent
    before = len(Client.runs), sum(name.startswith("r1") for name in Client.sent)
    tracked.send(tmp_path, "sqlite:///x.db")
    assert before == (len(Client.runs), sum(name.startswith("r1") for name in Client.sent))
