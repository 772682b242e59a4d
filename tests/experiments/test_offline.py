"""The offline pipeline: data, phases, gates, resume, the command line."""

import json
from pathlib import Path

import pytest

from experiments.config import ConfigError
from experiments.config.dreamer4 import Dreamer4Config, is_dreamer4, load_dreamer4
from experiments.data.clips import record
from experiments.data.expert import expert_envs
from experiments.offline import learn
from experiments.offline_loop import Work
from experiments.policies import play
from experiments.record import RunError
from experiments.record.metrics import read

LATER = ("dynamics", "finetune", "imagine")
TINY = [
    *("name=tiny", "env.num=2", "env.image_size=16", "env.workers=inprocess", "threads=1"),
    "env.time_limit=12",
    *("data.path=data", "data.held=3", "data.best=0.5", "episodes=2", "log_every=2"),
    *("checkpoint.every=2", "tracking.mlflow=false"),
    *("tokenizer.latents=2", "tokenizer.channels=4", "tokenizer.trunk.width=16"),
    *("dynamics.spatial=2", "dynamics.registers=1", "dynamics.trunk.width=16"),
    *("dynamics.trunk.layers=2", "tokenizer.trunk.layers=2", "dynamics.k_max=4", "agent.steps=2"),
    *("agent.units=8", "agent.ahead=2", "agent.horizon=2"),
    *(
        f"phases.{phase}.{field}"
        for phase in ("tokenizer", "dynamics", "finetune", "imagine")
        for field in ("updates=3", "batch=2", "length=4", "gate=null")
    ),
    *("phases.dynamics.long=6", "phases.imagine.critic=1", "counterfactual.frames=3"),
    "counterfactual.contexts=2",
]


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Half-noisy expert episodes of a room."""
    config = load_dreamer4(None, TINY)
    envs, policy = expert_envs(config.env, 2, noise=0.5)
    return record(envs, policy, 60, tmp_path_factory.mktemp("room") / "data")


def configure(room: Path, *changes: str) -> Dreamer4Config:
    return load_dreamer4(None, [*TINY, f"data.path={room}", *changes])


def test_all_phases_end_to_end(room: Path):
    path = learn(configure(room))
    rows = read(path / "metrics.jsonl")
    names = {name for row in rows for name in row.metrics}
    assert {"gate/tokenizer_psnr", "gate/dynamics_next_frame", "gate/finetune_surprise"} <= names
    assert {f"eval/{x}/return" for x in ("random", "imitation", "imagination")} <= names
    assert {"loss/tokenizer_mse", "loss/finetune_policy", "loss/imagine_value"} <= names
    assert "round/gap" in names and "round/hallucination" not in names  # a room without recipes
    assert len({name.split("/")[0] for name in names}) <= 8
    assert rows[-1].step == 12
    assert json.loads((path / "run.json").read_text())["state"] == "finished"
    assert is_dreamer4(path)


def test_a_run_killed_in_a_phase_goes_on_bit_for_bit(room: Path, monkeypatch: pytest.MonkeyPatch):
    whole = learn(configure(room, "tracking.root=whole"))

    def die(work: Work, *rest: object) -> None:
        if (work.phase, work.update) == (2, 2):
            raise KeyboardInterrupt
        learned(work, *rest)  # type: ignore[arg-type]

    learned = Work.learn
    with monkeypatch.context() as patch:
        patch.setattr(Work, "learn", die)
        with pytest.raises(KeyboardInterrupt):
            learn(configure(room, "tracking.root=cut"))
    (cut,) = Path("cut").iterdir()
    learn(load_dreamer4(cut), cut)
    a, b = ([(r.step, r.metrics) for r in read(p / "metrics.jsonl")] for p in (whole, cut))
    for rows in (a, b):
        for _, metrics in rows:
            metrics.pop("time/updates_per_s", None)
    assert a == b


def test_a_gate_stops_the_run_and_more_updates_go_on(room: Path):
    with pytest.raises(RunError, match=r"phase tokenizer ends with psnr=.*updates=6"):
        learn(configure(room, "phases.tokenizer.gate=90"))
    (path,) = Path("runs").iterdir()
    assert json.loads((path / "run.json").read_text())["state"] == "stopped"
    more = ["phases.tokenizer.updates=4", "phases.tokenizer.gate=0"]
    learn(load_dreamer4(path, [*more, *(f"phases.{p}.updates=0" for p in LATER)]), path)
    assert read(path / "metrics.jsonl")[-1].step == 4


def test_the_expert_solves_rooms_with_doors(room: Path):
    env = configure(room, "env.id=MiniGrid-DoorKey-5x5-v0", "env.time_limit=0").env
    envs, policy = expert_envs(env, 2, noise=0.0)
    assert min(play(envs, policy, 4)) > 0.9
    envs.close()


@pytest.mark.parametrize(
    ("change", "way_out"),
    [
        ("phases.tokenizer.updat=3", "did you mean phases.tokenizer.updates"),
        ("dynamics.k_max=6", "power of two"),
        ("dynamics.spatial=3", "divisor"),
        ("tokenizer.trunk.heads=3", "powers of two"),
    ],
)
def test_mistakes_name_the_way_out(change: str, way_out: str):
    with pytest.raises(ConfigError, match=way_out):
        load_dreamer4(None, [*TINY, change])
