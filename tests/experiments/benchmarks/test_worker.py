"""Processes that answer: in turn, until they are closed, and what is said when one dies."""

import sys
from pathlib import Path

import pytest

from experiments.benchmarks.timing.worker import Worker, WorkerError

CHILD = """
from experiments.benchmarks.timing.worker import peak_mb, serve
import os
def grow(n):
    before, block = peak_mb(), bytearray(n << 20)
    for i in range(0, n << 20, 4096):
        block[i] = 1
    return {"before": before, "after": peak_mb()}
serve({"threads": os.environ["OMP_NUM_THREADS"]},
      {"double": lambda n: {"n": 2 * n}, "die": lambda n: os._exit(n), "fail": lambda n: n["x"],
       "grow": grow})
open("closed", "w").close()
"""


def child(code: str = CHILD) -> Worker:
    return Worker("a child", [sys.executable, "-c", code], 3)


def test_children_are_asked_in_turn_and_end_when_they_are_let_go():
    with child() as first, child() as second:
        assert first.hello() == {"threads": "3"}
        answers = [worker.ask("double", n) for n in (1, 2) for worker in (first, second)]
        assert [answer["n"] for answer in answers] == [2, 2, 4, 4]
    assert Path("closed").exists()


def test_a_dead_child_is_told_with_its_last_words():
    with child() as worker, pytest.raises(WorkerError, match="exit code 7"):
        worker.ask("die", 7)
    with child() as worker, pytest.raises(WorkerError, match=r"(?s)a child ended.*not subscriptab"):
        worker.ask("fail", 1)
    broken = child("import sys; sys.exit('no such module')")
    with broken, pytest.raises(WorkerError, match="no such module"):
        broken.hello()


def test_a_child_does_not_outlive_a_mistake_of_ours():
    with pytest.raises(KeyError), child("import time; time.sleep(60)") as worker:
        raise KeyError
    assert worker.ended


def test_peak_memory_is_that_of_the_child_alone():
    with child() as worker:
        found = worker.ask("grow", 32)
        assert found["before"] < 100  # this very process, with torch, has several hundred
        assert found["before"] + 30 <= found["after"] == worker.ask("grow", 1)["before"]
