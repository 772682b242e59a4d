"""Runs side by side are the runs that they would have been alone, to rounding."""

from pathlib import Path

import numpy as np
import pytest

from experiments.config import Config, ConfigError, load_config
from experiments.evaluate import load_run
from experiments.record.metrics import read
from experiments.together import sees_images, train_together
from experiments.train import train

SMALL = (
    "frames=384", "train.prefill=256", "train.ratio=4", "replay.batch=4", "replay.length=8",
    "agent.horizon=3", "model.deter=32", "model.hidden=16", "model.units=16", "log.every=64",
    "evaluate.every=0", "evaluate.episodes=8", "env.time_limit=30", "tracking.mlflow=false",
    "tracking.pictures=false",
)  # fmt: skip


def config(tmp_path: Path, *overrides: str) -> Config:
    return load_config("cartpole", [*SMALL, f"tracking.root={tmp_path}", *overrides])


def losses(path: Path) -> np.ndarray:
    rows = [row.metrics for row in read(path / "metrics.jsonl")]
    found = [[v for k, v in row.items() if k.startswith(("loss/", "agent/"))] for row in rows]
    return np.array([values for values in found if values])


def test_two_seeds_side_by_side_learn_what_each_learns_alone(tmp_path: Path):
    seeds = ("seed=3", "seed=4")
    paths = train_together([config(tmp_path / "both", seed) for seed in seeds])
    for path, seed in zip(paths, seeds, strict=True):
        alone = train(config(tmp_path / "alone", seed))
        assert len(losses(path)) == 3
        # values are sums over bins of up to e^20, which makes 0.02 of the last bit of a weight
        np.testing.assert_allclose(losses(path), losses(alone), rtol=2e-3, atol=0.05)
        ours, theirs = (load_run(p)[1].state_dict() for p in (path, alone))
        for name, value in theirs.items():
            np.testing.assert_allclose(ours[name], value, rtol=0, atol=5e-3, err_msg=name)
        last = [read(p / "metrics.jsonl")[-1].metrics for p in (path, alone)]
        assert last[0].keys() == last[1].keys() and "eval/default/return" in last[0]
        assert not list(path.glob("*.png")), "without pictures"
    assert not np.allclose(losses(paths[0]), losses(paths[1]))


def test_processes_divide_the_runs_and_change_none(tmp_path: Path):
    configs = [config(tmp_path / "both", f"seed={seed}", "frames=320") for seed in (5, 6)]
    paths = train_together(configs, processes=2)
    assert [path.name[-2:] for path in paths] == ["s5", "s6"]
    (alone,) = train_together([config(tmp_path / "alone", "seed=6", "frames=320")])
    np.testing.assert_array_equal(losses(paths[1]), losses(alone))


def test_schedules_and_replays_may_differ(tmp_path: Path):
    plain = config(tmp_path)
    slow = config(
        tmp_path, "timescales.kind=geometric", "timescales.k=3", "timescales.base=2",
        "replay.kind=reservoir", "name=slow",
    )  # fmt: skip
    for path, levels in zip(train_together([plain, slow]), (1, 3), strict=True):
        metrics = read(path / "metrics.jsonl")[-2].metrics
        moved = [v for k, v in metrics.items() if k.startswith("levels/") and "updates" in k]
        assert len(moved) == levels + 1  # and the slow critic
        assert path.name.startswith("slow" if levels == 3 else "cartpole")


@pytest.mark.parametrize(
    ("override", "field"),
    [("model.memory.kind=neural", "model.memory.kind"), ("env.pixels=true", "env.pixels")],
)
def test_agents_that_cannot_be_grouped_are_refused_before_a_folder(
    tmp_path: Path, override: str, field: str
):
    with pytest.raises(ConfigError) as caught:
        train_together([config(tmp_path, override), config(tmp_path, "seed=1", override)])
    assert caught.value.field == field
    assert not any(tmp_path.iterdir())


def test_images_are_refused_before_a_folder(tmp_path: Path):
    pytest.importorskip("minigrid")
    words = ("env.id=MiniGrid-Empty-5x5-v0", "env.pixels=false", "model.size=tiny")
    assert not sees_images(config(tmp_path, *words).env)
    assert sees_images(load_config("minigrid").env)


@pytest.mark.parametrize(
    ("override", "field"),
    [("agent.horizon=4", "agent"), ("replay.batch=8", "replay.batch"), ("frames=512", "frames")],
)
def test_runs_that_cannot_be_in_step_are_refused_before_a_folder(
    tmp_path: Path, override: str, field: str
):
    with pytest.raises(ConfigError) as caught:
        train_together([config(tmp_path), config(tmp_path, "seed=1", override)])
    assert caught.value.field == field
    assert not any(tmp_path.iterdir())
