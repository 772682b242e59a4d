"""The spool: exact round trips, torn lines, and truncation on resume."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.record.metrics import Metrics, read, tail


@pytest.fixture
def spool(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


def test_rows_come_back_in_order_and_exactly(spool: Path):
    metrics = Metrics(spool)
    metrics.write(10, {"loss/a": 0.1, "agent/b": np.float32(0.5)})
    metrics.write(20, {"loss/a": torch.tensor(2.5)})
    rows = read(spool)
    assert [(row.step, row.metrics) for row in rows] == [
        (10, {"loss/a": 0.1, "agent/b": 0.5}),
        (20, {"loss/a": 2.5}),
    ]
    assert rows[0].wall <= rows[1].wall


def test_values_that_json_lacks_are_strings_in_the_file(spool: Path):
    Metrics(spool).write(1, {"a": math.nan, "b": math.inf, "c": -math.inf})
    stored = json.loads(spool.read_text(), parse_constant=pytest.fail)
    assert stored["metrics"] == {"a": "nan", "b": "inf", "c": "-inf"}
    values = read(spool)[0].metrics
    assert math.isnan(values["a"]) and values["b"] == math.inf and values["c"] == -math.inf


def test_a_line_is_in_the_file_before_the_next_one(spool: Path):
    metrics = Metrics(spool)
    for count in range(1, 4):
        metrics.write(count, {"a": count})
        assert len(spool.read_bytes().splitlines()) == metrics.lines == count


def test_a_torn_last_line_is_skipped_by_readers_and_dropped_by_the_writer(spool: Path):
    Metrics(spool).write(1, {"a": 1})
    whole = spool.read_bytes()
    spool.write_bytes(whole + b'{"step": 2, "wa')
    assert [row.step for row in read(spool)] == [1]
    metrics = Metrics(spool)
    assert spool.read_bytes() == whole and metrics.lines == 1
    metrics.write(2, {"a": 2})
    assert [row.step for row in read(spool)] == [1, 2]


@pytest.mark.parametrize("damage", [b"[]\n", b"\xff\xfe\n", b'{"step": 1}\n', b'{"metrics": 3}\n'])
def test_a_damaged_line_costs_that_line_only(spool: Path, damage: bytes):
    metrics = Metrics(spool)
    metrics.write(1, {"a": 1})
    spool.write_bytes(spool.read_bytes() + damage)
    Metrics(spool).write(2, {"a": 2})
    assert [row.step for row in read(spool)] == [1, 2]


def without_wall(path: Path) -> list[tuple[int, dict[str, float]]]:
    return [(row.step, row.metrics) for row in read(path)]


@pytest.mark.parametrize("saved", range(6))
def test_a_resumed_spool_equals_an_uninterrupted_one(tmp_path: Path, saved: int):
    straight, resumed = tmp_path / "straight.jsonl", tmp_path / "resumed.jsonl"
    metrics = Metrics(straight)
    for step in range(8):
        metrics.write(step, {"a": step / 3})
    first = Metrics(resumed)
    for step in range(6):  # a checkpoint after `saved` lines, a kill after 6
        first.write(step, {"a": step / 3})
    second = Metrics(resumed)
    second.truncate(saved)
    for step in range(saved, 8):
        second.write(step, {"a": step / 3})
    assert without_wall(resumed) == without_wall(straight)
    assert second.lines == metrics.lines


def test_truncating_to_more_lines_than_there_are_keeps_all(spool: Path):
    metrics = Metrics(spool)
    metrics.write(1, {"a": 1})
    metrics.truncate(5)
    assert metrics.lines == 1 and len(read(spool)) == 1


def test_tail_reads_the_end_only(spool: Path):
    metrics = Metrics(spool)
    for step in range(100):
        metrics.write(step, {"a": step})
    assert tail(spool) == read(spool)
    assert tail(spool, 300) == read(spool)[-len(tail(spool, 300)) :]
    assert 0 < len(tail(spool, 300)) < 10


def test_no_file_is_no_rows(tmp_path: Path):
    assert read(tmp_path / "none") == tail(tmp_path / "none") == []
