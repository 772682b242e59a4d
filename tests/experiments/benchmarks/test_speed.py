"""The suite `speed`: rows and ratios from scripted processes, mistakes, and the real thing."""

import json
import sys
from typing import Any, Self

import numpy as np
import pytest

from experiments.benchmarks import speed
from experiments.benchmarks.timing.reference import Spec
from experiments.benchmarks.timing.worker import WorkerError
from experiments.cli import main as nested
from experiments.config import ConfigError

Answers = dict[str, Any]
HELLO = {"params": 7, "batch": 16, "length": 64}


class Scripted:
    """A process that answers from a script and notes the order of questions."""

    asked: list[str] = []  # noqa: RUF012 (every process notes into one list)

    def __init__(self, name: str, hello: Answers, seconds: float):
        self.name, self._hello, self._seconds = name, hello, seconds

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def hello(self) -> Answers:
        if "error" in self._hello:
            raise WorkerError(self._hello["error"])
        return self._hello

    def ask(self, question: str, count: int = 1) -> Answers:
        self.asked.append(f"{self.name} {question} {count}")
        wall = [self._seconds / 2, *[self._seconds] * count][:count]
        cpu = [2 * second for second in wall]
        levels = {"plain": 16.0, "k=3": 12.0}
        return {
            "time": {"seconds": wall, "cpu_seconds": cpu, "rss_mb": 9},
            "flops": {"gflop": 100.0},
            "parts": {
                "parts_s": {"encoder": 3.0, "rest": 1.0},
                "parts_cpu_s": {"encoder": 5.0, "rest": 2.0},
            },
            "operators": {"operators": [["aten::mm", 4, 0.5]]},
            "round": {"seconds": levels},
        }[question]


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    def ours(spec: Spec) -> Scripted:
        speeds = {"matmul_gflops": 200.0, "memcpy_gb_s": 5.0}
        hello = speeds if spec.kind == "machine" else HELLO
        return Scripted("ours", hello, 2.0 if spec.dtype == "float32" else 1.0)

    def theirs(python: str, spec: Spec) -> Scripted:
        fails = {"error": "no module"} if "broken" in python else {}
        return Scripted("peer", {**HELLO, "who": "peer-1.0", **fails}, 8.0)

    monkeypatch.setattr(speed, "open_worker", ours)
    monkeypatch.setattr(speed, "open_peer", theirs)
    monkeypatch.setattr(speed.os, "access", lambda *_: True)
    Scripted.asked.clear()
    return Scripted.asked


def rows_of(capsys: pytest.CaptureFixture[str], *words: str) -> list[dict[str, Any]]:
    assert speed.main([*words, "--json"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_updates_are_paired_with_peers(scripted: list[str], capsys: pytest.CaptureFixture[str]):
    words = ["--sizes", "1m", "--dtypes", "float32", "--encoders", "faithful", "--steps", "3"]
    words += ["--rounds", "2", "--warmup", "4", "--threads", "2", "--peer-python", "a"]
    ours, peer, ratio = rows_of(capsys, *words, "--peer-python", "broken", "agent.lam=0.9")
    turns = ["ours time 3", "peer time 3"]
    assert scripted == [
        "ours time 4",
        "peer time 4",
        *turns,
        *turns,
        "ours flops 1",
        "peer flops 1",
    ]
    assert (ours["who"], peer["who"], ratio["peer"]) == ("nested", "peer-1.0", "peer-1.0")
    assert (ours["step_s"], ours["cpu_s"], ours["rounds"]) == (2, 4, 2)
    assert ours["frames_per_s"] == 512
    assert ours["limit_ratio"] == pytest.approx(2.0 * 200 / 100)
    assert peer["limit_ratio"] == pytest.approx(16)
    assert (ratio["ratio"], ratio["ratio_95"], ratio["cpu_ratio"]) == (4, [4, 4], 4)
    needed = "what who size dtype threads step_s frames_per_s gflop matmul_gflops memcpy_gb_s"
    for row in (ours, peer):
        assert {*needed.split(), "limit_ratio", "rss_mb"} <= row.keys()
        assert row["overrides"] == ["agent.lam=0.9"]


def test_a_time_is_the_median_beside_that_of_the_fastest_round():
    wall = np.array([[1.0, 2.0, 9.0], [4.0, 5.0, 5.0], [7.0, 7.0, 8.0]])
    row = speed.timing(np.stack([wall, 2 * wall]))
    assert (row["step_s"], row["fastest_s"], row["cpu_s"]) == (5, 2, 10)
    assert 2 <= row["step_s_95"][0] <= row["step_s_95"][1] <= 7


def test_every_combination_has_a_row_and_peers_meet_the_faithful_ones(
    scripted: list[str], capsys: pytest.CaptureFixture[str]
):
    words = ["--sizes", "1m,12m", "--schedules", "plain,k3", "--peer-python", "a"]
    rows = rows_of(capsys, *words)
    ours = [row for row in rows if row["who"] == "nested" and row["what"] == "update"]
    keys = {(row["size"], row["dtype"], row["encoder"], row["schedule"]) for row in ours}
    assert len(ours) == len(keys) == 16
    ratios = [(row["size"], row["dtype"], row["ratio"]) for row in rows if row["what"] == "ratio"]
    single, half = ("float32", 4), ("bfloat16", 8)
    assert ratios == [("1m", *single), ("1m", *half), ("12m", *single), ("12m", *half)]


def test_other_sections(scripted: list[str], capsys: pytest.CaptureFixture[str]):
    words = ["--policy", "--small", "--seeds", "5", "--levels", "--threads", "2", "--rounds", "2"]
    rows = rows_of(capsys, *words)
    policies = [row for row in rows if row["what"] == "policy"]
    cases = {(row["threads"], row["encoder"], row["batch"]) for row in policies}
    assert len(policies) == len(cases) == 8
    assert {row["steps_per_s"] for row in policies} == {0.5, 8.0}
    (small,) = (row for row in rows if row["what"] == "small")
    assert (small["threads"], small["params"]) == (1, 7)
    (seeds,) = (row for row in rows if row["what"] == "seeds")
    assert (seeds["seeds"], seeds["processes"], seeds["rss_mb"]) == (5, 2, 18)
    assert seeds["step_s"] == pytest.approx(small["step_s"] / 5)
    levels = {row["schedule"]: row for row in rows if row["what"] == "levels"}
    assert levels["k=3"]["ratio"] == 0.75
    assert levels["plain"]["step_s"] == 1.0
    assert not any(row["what"] == "update" for row in rows)


def test_tables_show_every_kind(scripted: list[str], capsys: pytest.CaptureFixture[str]):
    words = ["--update", "--policy", "--small", "--seeds", "--levels", "--profile"]
    words += ["--peer-python", "a"]
    assert speed.main([*words, "--sizes", "1m", "--threads", "1"]) == 0
    out = capsys.readouterr().out
    assert "peer-1.0" in out and "1,024" in out and "75.0%" in out and "aten::mm" in out
    titles = [title for title, _ in speed.TABLES.values()]
    assert all(title in out for title in titles)


def test_what_is_measured_before_a_death_is_shown(
    scripted: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def dies(asked: speed.Asked):
        raise WorkerError("policy ended with exit code 9")
        yield

    monkeypatch.setattr(speed, "policies", dies)
    assert speed.main(["--update", "--policy", "--sizes", "1m"]) == 1
    shown = capsys.readouterr()
    assert "exit code 9" in shown.err
    assert "faithful" in shown.out


def test_mistakes_are_told_before_anything_is_measured(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(ConfigError, match=r"--rounds"):
        speed.main(["--rounds", "0"])
    with pytest.raises(ConfigError, match=r"no program"):
        speed.main(["--peer-python", "nowhere/python"])
    with pytest.raises(ConfigError, match=r"model\.size"):
        speed.open_worker(Spec(size="3m"))
    with pytest.raises(SystemExit):
        speed.main(["--dtypes", "float8"])
    assert "'float8' is none of float32, bfloat16" in capsys.readouterr().err
    assert nested(["bench", "speed", "--steps", "0"]) == 2


@pytest.mark.slow
def test_the_real_thing(capsys: pytest.CaptureFixture[str]):
    tiny = [
        "model.depth=1",
        "model.deter=32",
        "model.blocks=4",
        "model.hidden=8",
        "agent.horizon=2",
    ]
    tiny += ["model.units=8", "model.stoch=4", "replay.batch=2", "replay.length=4"]
    sections = ["--update", "--small", "--policy", "--levels", "--profile", "--peer-python"]
    words = [*sections, sys.executable, "--sizes", "1m", "--rounds", "2", "--threads", "1", *tiny]
    rows = rows_of(capsys, *words)
    assert {row["what"] for row in rows} == {"update", "small", "policy", "levels", "profile"}
    assert all(row["step_s"] > 0 for row in rows if row["what"] != "profile")
    assert sum(row["parts_s"]["backward"] > 0 for row in rows if row["what"] == "profile") == 5
