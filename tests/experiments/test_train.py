"""The loop as a whole, on runs so small that each takes a second.

What a run leaves behind, that its seed decides it, that evaluating and saving leave no mark on it,
and that the hidden context changes with the phase.
"""

import json
from pathlib import Path

import pytest
import torch

from experiments import load_config, train
from experiments.benchmarks.kill import differences, remains
from experiments.config import Config, ConfigError
from experiments.loop import Loop
from experiments.record import Checkpoints, Run
from experiments.record.metrics import read

FIELDS = (
    "frames=120 env.num=4 env.time_limit=9 threads=1 device=cpu env.contexts=[normal,flipped,long] "
    "model.deter=8 model.hidden=8 model.classes=4 model.stoch=2 model.units=8 model.blocks=2 "
    "model.memory.dim=8 timescales.levels.slow.every.n=8 "
    "agent.horizon=2 agent.layers=1 agent.bins=15 train.ratio=2 train.prefill=32 "
    "replay.capacity=48 replay.batch=2 replay.length=4 log.every=20 checkpoint.every=0 "
    "evaluate.every=0 evaluate.episodes=1 tracking.mlflow=false"
)
PREFIXES = {"train", "eval", "loss", "agent", "levels", "time"}


def configure(fields: str = "", root: str = "runs") -> Config:
    return load_config("default", [*f"{FIELDS} {fields}".split(), f"tracking.root={root}"])


@pytest.fixture
def lean(monkeypatch: pytest.MonkeyPatch):
    """Runs draw no pictures and do not ask git for the revision."""
    monkeypatch.setattr(Loop, "draw", lambda loop, finished: None)
    monkeypatch.setattr("experiments.record.run.revision", lambda: None)


def test_a_run_and_what_it_leaves():
    before = torch.get_rng_state()
    path = train(configure())
    assert Run.open(path).state == "finished"
    files = {file.name for file in path.iterdir()}
    assert {"config.yaml", "run.json", "metrics.jsonl", "levels.json", "report.png"} <= files
    assert load_config(path) == configure()
    rows = read(path / "metrics.jsonl")
    assert rows[0].step == 0 and rows[-1].step == 120
    assert {name.split("/")[0] for row in rows for name in row.metrics} <= PREFIXES
    logs = [row for row in rows if "train/updates" in row.metrics]
    assert [row.step for row in logs] == [20, 40, 60, 80, 100, 120]
    # 32 frames of prefill; then 2 replayed frames a frame in batches of 8: one update a step of 4
    assert [row.metrics["train/updates"] for row in logs] == [0, 3, 8, 13, 18, 23]
    assert logs[-1].metrics["levels/fast/updates"] == 23
    assert logs[-1].metrics["levels/mid/updates"] == 23 // 2
    assert logs[-1].metrics["levels/slow/updates"] == 23 // 8
    names = [level["name"] for level in json.loads((path / "levels.json").read_text())["levels"]]
    assert names == ["fast", "mid", "slow", "slow_critic"]
    assert torch.equal(torch.get_rng_state(), before), "drawn from a generator that is not saved"


@pytest.mark.usefixtures("lean")
def test_the_seed_decides_everything():
    one, two, other = (train(configure(f"seed={seed}")) for seed in (3, 3, 4))
    assert differences(one, two) == []
    found = differences(one, other)
    assert "state.agent.world.encoder.dense.0.linear.weight" in found
    assert "replay.obs.state" in found


@pytest.mark.usefixtures("lean")
def test_evaluating_and_saving_leave_no_mark():
    """Weights, clocks, generators, environments and metrics of training are bit-equal."""
    plain = train(configure())
    often = train(configure("evaluate.every=8 evaluate.episodes=6 checkpoint.every=16", "often"))
    one, two = training_of(plain), training_of(often)
    assert one.keys() == two.keys()
    assert [name for name in one if one[name] != two[name]] == []
    evaluations = [row.step for row in read(often / "metrics.jsonl") if is_evaluation(row.metrics)]
    assert evaluations == list(range(0, 121, 8))


def is_evaluation(metrics: dict[str, float]) -> bool:
    return all(name.startswith("eval/") for name in metrics)


def training_of(path: Path) -> dict[str, object]:
    """The state at the end of a run and its lines about training."""
    found = {name: value for name, value in remains(path).items() if name.startswith("state.")}
    del found["state.lines"]  # evaluations are lines too
    for row in read(path / "metrics.jsonl"):
        if not is_evaluation(row.metrics):
            metrics = {k: v for k, v in row.metrics.items() if not k.startswith("time/")}
            found[f"frame {row.step}"] = metrics
    return found


@pytest.mark.usefixtures("lean")
def test_phases_change_the_context_and_count_as_tasks():
    path = train(
        configure("timescales.levels.slow.every.unit=task timescales.levels.slow.every.n=1")
    )
    loaded = Checkpoints(path / "checkpoints").load()
    assert loaded is not None
    assert loaded.state["timescales"]["counters"]["task"] == 2
    assert loaded.state["driver"]["envs"]["context"].tolist() == [2] * 4  # "long"
    rows = [row for row in read(path / "metrics.jsonl") if "train/phase" in row.metrics]
    assert [row.metrics["train/phase"] for row in rows] == [0, 0, 1, 1, 2, 2]
    # moved at frame 40 on 2 updates' gradients and at frame 80 on 10: never by updates alone
    assert [row.metrics["levels/slow/updates"] for row in rows] == [0, 0, 1, 1, 2, 2]
    evaluated = {name for row in read(path / "metrics.jsonl") for name in row.metrics}
    assert {f"eval/{name}/score" for name in ("normal", "flipped", "long")} <= evaluated


@pytest.mark.usefixtures("lean")
def test_phases_of_their_own_length_and_what_a_frame_earned():
    path = train(configure("env.lengths=[20,60,40] train.prefill=116"))
    rows = [row.metrics for row in read(path / "metrics.jsonl") if "train/phase" in row.metrics]
    assert [row["train/phase"] for row in rows] == [0, 1, 1, 1, 2, 2]
    # a frame earns 1 unless an episode begins: in each slot once, then after 9 steps at most
    assert rows[0]["train/reward"] == 16 / 20
    assert all(0.6 <= row["train/reward"] <= 1 for row in rows[1:])


@pytest.mark.usefixtures("lean")
def test_a_loss_that_is_not_finite_stops_the_run(monkeypatch):
    updates_due = Loop.updates_due

    def poison(loop: Loop) -> int:
        with torch.no_grad():
            next(loop.agent.world.reward.parameters()).fill_(torch.nan)
        return updates_due(loop)

    monkeypatch.setattr(Loop, "updates_due", poison)
    with pytest.raises(FloatingPointError, match=r"loss/reward.* at frame 40"):
        train(configure())
    (path,) = Path("runs").iterdir()
    assert Run.open(path).state == "failed"


@pytest.mark.parametrize(
    "field", ["timescales.levels.slow.match=nothing", "timescales.levels.slow.match=actor"]
)
def test_what_cannot_be_built_leaves_no_folder(field):
    with pytest.raises(ConfigError):
        train(configure(field))
    assert not Path("runs").exists()
