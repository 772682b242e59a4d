"""An offline run so small that a test takes no second: its recordings and its configuration."""

from pathlib import Path

from experiments.config.dreamer4 import Dreamer4Config, load_dreamer4
from experiments.data.clips import record
from experiments.data.expert import expert_envs
from experiments.record.metrics import read

TINY = [
    *("name=tiny", "env.num=2", "env.image_size=16", "env.workers=inprocess", "threads=1"),
    "env.time_limit=6",
    *("data.path=data", "data.held=3", "data.best=0.5", "episodes=2", "log_every=2"),
    *("checkpoint.every=2", "tracking.mlflow=false", "tracking.pictures=false"),
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
    *("counterfactual.contexts=2", "counterfactual.episodes=2"),
]


def recorded(folder: Path, frames: int = 60) -> Path:
    """Half-noisy expert episodes of a room."""
    envs, policy = expert_envs(load_dreamer4(None, TINY).env, 2, noise=0.5)
    return record(envs, policy, frames, folder / "data")


def reported(path: Path) -> list[tuple[int, dict[str, float]]]:
    """Everything that a run measured, its speed aside."""
    rows = [(row.step, dict(row.metrics)) for row in read(path / "metrics.jsonl")]
    for _, metrics in rows:
        metrics.pop("time/updates_per_s", None)
    return rows


def configure(room: Path, *changes: str) -> Dreamer4Config:
    return load_dreamer4(None, [*TINY, f"data.path={room}", *changes])
