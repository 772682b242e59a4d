"""Imagination's benchmark: areas by hand, pairs by seed, arms that are not trained twice."""

import json
from pathlib import Path

import numpy as np
import pytest

from experiments.benchmarks import imagination
from experiments.benchmarks.learning import Curve
from experiments.config import ConfigError, load_config

PHASES = ("normal", "flipped")
TINY = [
    *("model.deter=16", "model.hidden=8", "model.units=8", "model.stoch=4", "model.classes=4"),
    *("model.memory.dim=4", "env.num=4", "replay.batch=2", "replay.length=8", "agent.horizon=3"),
    *("train.prefill=40", "train.ratio=1", "evaluate.every=32", "evaluate.episodes=2"),
]


def curve(returns: list[float], seed: int = 0) -> Curve:
    return Curve(seed, np.arange(len(returns)) * 100.0, np.array(returns), 1.0)


def test_a_phase_is_measured_in_its_own_context():
    found = {
        "normal": [curve([0, 10, 20, 99, 99])],
        "flipped": [curve([99, 99, 4, 8, 20])],
    }
    values = imagination.measures(found, PHASES, 400)
    assert values["area/1 normal"] == pytest.approx([10.0])
    assert values["area/2 flipped"] == pytest.approx([(6 + 14) / 2])
    assert values["last/1 normal"] == pytest.approx([10.0])
    assert values["area"] == pytest.approx([10.0])
    assert values["last"] == pytest.approx([(10 + 32 / 3) / 2])


def test_a_context_that_comes_back_is_measured_again():
    found = {"normal": [curve([0, 2, 4, 6])], "flipped": [curve([0, 1, 1, 0])]}
    values = imagination.measures(found, ("normal", "flipped", "normal"), 300)
    assert values["area/1 normal"] == pytest.approx([1.0])
    assert values["area/3 normal"] == pytest.approx([5.0])


def test_a_phase_with_one_evaluation_is_refused():
    found = {"normal": [curve([0, 1, 2])], "flipped": [curve([0, 1, 2])]}
    with pytest.raises(ConfigError, match="twice in a phase"):
        imagination.measures(found, ("normal", "flipped", "normal", "flipped", "normal"), 200)


def made(read: np.ndarray, off: np.ndarray) -> dict:
    found = {arm: {"area": x} for arm, x in (("read", read), ("off", off))}
    measures = imagination.summary(found, np.random.default_rng(0))
    return {"arms": ["read", "off"], "measures": measures}


def test_the_verdict_follows_differences_paired_by_seed():
    rng = np.random.default_rng(1)
    luck = rng.normal(100, 50, 10)
    better = made(luck + 5 + rng.normal(0, 1, 10), luck)
    row = better["measures"]["area"]
    assert 4 < row["read - off"]["low"] < row["read - off"]["high"] < 6
    assert "no arm is better" in imagination.verdict(better, "read")
    assert imagination.verdict(better, "off") == "read is better than the default, off"
    worse = made(luck, luck + 5 + rng.normal(0, 1, 10))
    assert imagination.verdict(worse, "read") == "off is better than the default, read"
    alike = made(luck, luck + rng.normal(0, 20, 10))
    assert all("no arm" in imagination.verdict(alike, default) for default in ("read", "off"))


def test_imagination_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    root = tmp_path / "runs"
    words = ["--seeds", "2", "--frames", "64", "--root", str(root), *TINY]
    assert imagination.main([*words, "--arms", "read,off"]) == 0
    told = capsys.readouterr().out
    assert "read - off" in told and "area/2 flipped" in told
    assert (root / "imagination.png").stat().st_size > 10_000
    before = {path: path.stat().st_mtime_ns for path in root.glob("*/metrics.jsonl")}
    assert len(before) == 4
    used = [load_config(path.parent).model.memory.model_dump()["imagine"] for path in before]
    assert sorted(used) == ["off", "off", "read", "read"]
    # an arm more: the others are taken as they are
    assert imagination.main([*words, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["arms"] == ["read", "off", "write"]
    assert "off - write" in result["measures"]["area"]
    assert len(result["measures"]["last"]["by seed"]["write"]) == 2
    after = {path: path.stat().st_mtime_ns for path in root.glob("*/metrics.jsonl")}
    assert len(after) == 6 and {path: after[path] for path in before} == before


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--seeds", "0"], "give 1 or more"),
        (["--arms", "read,of"], "choose from read,off,write"),
        (["model.memory.kind=none"], "no fast weights"),
        (["model.memory.kind=rls"], "one by one"),
    ],
)
def test_a_mistake_is_told_before_anything_is_trained(words: list[str], told: str, tmp_path: Path):
    with pytest.raises(ConfigError) as caught:
        imagination.main([*words, "--root", str(tmp_path / "runs")])
    assert told in str(caught.value)
    assert not (tmp_path / "runs").exists()
