"""Streams without tasks: phases that are drawn, what is lived in them, regret, the tables."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.benchmarks import cells, continual, results
from experiments.benchmarks.cells import Cell, Result
from experiments.benchmarks.tasks import agent_free, board, page
from experiments.benchmarks.tasks.agent_streams import STREAMS
from experiments.benchmarks.tasks.summary import summarise
from experiments.config import Config, ConfigError
from experiments.record.metrics import Row

FREE = continual.FREE
STREAM = STREAMS[FREE]
TINY = {"tasks": 2, "frames": 320, "every": 16, "phases": 4, "prefill": 128}


def cell(method: str = "plain", *seeds: int, stream: str = FREE, **options: Any) -> Cell:
    return Cell(stream, method, seeds or (0,), {**STREAMS[stream].fields, **options})


def run_of(seed: int = 0, **options: Any) -> Config:
    return agent_free.runs_of(cell("plain", seed, **options), "runs")[0][0]


# ---- what is drawn -----------------------------------------------------------------------------
def test_phases_are_drawn_for_each_seed_and_never_repeat_a_context():
    drawn = [agent_free.drawn(STREAM, cell(), seed) for seed in range(40)]
    for phases in drawn:
        names, lengths = zip(*phases, strict=True)
        assert len(phases) == 16 and sum(lengths) == 40_000
        assert all(length > 0 and length % 200 == 0 for length in lengths)
        assert all(a != b for a, b in pairwise(names))
    assert drawn[3] == agent_free.drawn(STREAM, cell(), 3)
    assert len({tuple(phases) for phases in drawn}) == 40
    first = [phases[0][0] for phases in drawn]
    assert set(first) == set(STREAM.contexts)
    assert np.mean([length for phases in drawn for _, length in phases[:1]]) < 5000


def test_a_run_changes_at_times_that_nothing_is_told_of():
    config, other = run_of(1), run_of(2)
    assert config.env.lengths != other.env.lengths and config.frames == other.frames == 40_000
    assert config.evaluate.every == 0 and config.log.every == 200
    assert config.env.kwargs == {}
    fresh = agent_free.runs_of(cell("fresh", 1, 2, tasks=3), "runs")
    assert [config.env.contexts for config, _ in fresh] == [(c,) for c in STREAM.contexts[:3]]
    assert {config.frames for configs in fresh for config in configs} == {13_200}  # 66 lines


def test_an_environment_that_changes_by_itself():
    ant = cell("plain", 7, stream="cl/SlipperyAntFree-v0")
    ((config,),) = agent_free.runs_of(ant, "runs")
    assert config.env.contexts == config.env.lengths == ()
    assert config.env.kwargs == {"every": 250_000, "schedule": 7}  # of each of eight slots
    assert "fresh" not in continual.FAMILIES[ant.stream].methods
    assert "tasks" not in ant.options


@pytest.mark.parametrize(
    ("field", "value", "way_out"),
    [("every", 300, "divisor of 2000"), ("phases", 1, "2 to 200"), ("phases", 201, "2 to 200"),
     ("tasks", 5, "2 to 4"), ("every", 4, "multiple of 8"), ("prefill", 10, "at least 128")],
)  # fmt: skip
def test_cells_that_cannot_run(field: str, value: int, way_out: str):
    options: Any = {field: value}
    with pytest.raises(ConfigError, match=way_out):
        agent_free.check(cell("plain", 0, **options))


# ---- what is lived -----------------------------------------------------------------------------
def reported(config: Config, returns: float) -> list[Row]:
    """A line every log.every frames: one episode of `returns` more each time."""
    every = config.log.every
    return [
        Row(i * every, 0.0, {"train/return": i * returns, "train/episodes": 1.0})
        for i in range(1, config.frames // every + 1)
    ]


def test_scores_by_part_and_by_phase():
    config = run_of(**TINY)
    rows = reported(config, 2.0)  # 20 lines: scores 0.01, 0.02 ...
    found = agent_free.curve([config], [rows], STREAM)
    assert found[0] == pytest.approx(np.arange(1, 21) / 100)
    assert agent_free.parts_of(320).tolist() == list(range(0, 321, 16))
    phases = agent_free.phases_of([config], [rows], STREAM)
    assert phases["lengths"].tolist() == [list(config.env.lengths)]
    assert [STREAM.contexts[i] for i in phases["visited"][0]] == list(config.env.contexts)
    ends = np.cumsum(phases["lengths"][0]) // 16
    starts = np.concatenate([[0], ends[:-1]])
    means = [(a + 1 + b) / 2 / 100 for a, b in zip(starts, ends, strict=True)]
    assert phases["lived"][0] == pytest.approx(means)


def lived(scores: list[float], online: float) -> Result:
    arrays = {
        "lived": np.array([scores]), "lengths": np.array([[100, 300]]),
        "visited": np.array([[0, 1]]), "curve": np.full((1, 20), online),
        "frames": np.arange(21) * 20,
    }  # fmt: skip
    info = {"core_us_per_interaction": 1.0, "flops_per_interaction": 1.0, "core_seconds": 1.0,
            "bytes_per_interaction": 1.0, "levels": {}}  # fmt: skip
    return Result(np.zeros((1, 1, 0)), {}, arrays, info, {"online": np.array([online])})


def test_the_summary_and_the_tables_of_a_life(tmp_path: Path):
    fresh = lived([0.0, 0.0], 0.7)._replace(by_task={"online": np.array([[0.9, 0.5]])}, arrays={})
    plan = [cell(name) for name in ("plain", "k3", "k3_rates", "accumulate", "fresh")]
    lives = [lived([0.5, 0.2], 0.3), lived([0.9, 0.5], 0.6), *[lived([0.5, 0.3], 0.4)] * 2, fresh]
    found = dict(zip([each.key for each in plan], lives, strict=True))
    summary = summarise(plan, found)
    methods = summary[FREE]["methods"]
    # phases of 0.5 and 1.5 mean lengths: 0.5 (0.9 - 0.5) + 1.5 (0.5 - 0.2)
    assert methods["plain"]["metrics"]["dynamic_regret"]["value"] == pytest.approx(0.65)
    assert methods["k3"]["metrics"]["dynamic_regret"]["value"] == pytest.approx(0.0)
    assert "ALA" not in methods["plain"]["metrics"]
    assert summary[FREE]["pairs"]["k3 - plain"]["online"]["value"] == pytest.approx(0.3)
    text = board.table(summary)
    assert "regret" in text and "AP_final" not in text
    block = results.page_of("command", plan, found, summary)
    assert "4 contexts in 16 phases that are drawn" in block
    assert "live better than both controls (online)" in block and "`k3`." in block
    by_name = {(each.stream, each.method): found[each.key] for each in plan}
    (path,) = page.draw(summary, by_name, tmp_path)
    assert path.stat().st_size > 10_000
    cells.save(tmp_path / "one", plan[0], lives[0])
    assert cells.load(tmp_path / "one").scores.shape == (1, 1, 0)
    assert {row[5] for row in cells.rows(plan[0], lives[0])} == {"online"}


def test_a_life_from_end_to_end(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    words = [*(f"{k}={v}" for k, v in TINY.items()), "--seeds", "2", "--methods", "plain"]
    assert continual.main(["--tier", "free", *words, "--out", str(tmp_path), "--json"]) == 0
    (summary,) = json.loads(capsys.readouterr().out).values()
    measured = summary["methods"]["plain"]["metrics"]
    assert 0 < measured["online"]["value"] < 1
    assert 0 <= measured["plasticity/dormant"]["value"] <= 1
    (path,) = (tmp_path / "cells").glob("CartPoleFree*")
    found = cells.load(path)
    assert found.arrays["lived"].shape == (2, 4) and found.arrays["curve"].shape == (2, 20)
    assert found.arrays["lengths"].sum(1).tolist() == [320, 320]
