"""The workloads that `speed` times, as configurations: nothing here imports torch.

The reference is DreamerV3 on 64x64x3 images with six actions, 16 sequences of 64 rows, imagination
of 15 steps from every row. `small` is the scale of CartPole: four numbers, two actions, 16 x 16
rows, 10 steps from 128 of them.
"""

import json
from typing import NamedTuple, Self

from experiments.config import Config, load_config

# gymnasium imports what stands before the colon
FRAMES = "experiments.benchmarks.timing.frames:RandomFrames-v0"
REFERENCE = (
    f"env.id={FRAMES}", "env.units={}", "env.num=16", "env.workers=inprocess",
    "agent.starts=0", "agent.horizon=15", "replay.batch=16", "replay.length=64",
)  # fmt: skip
SMALL = (
    "env.id=CartPoleShift-v0", "env.num=16", "model.size=tiny", "agent.starts=8",
    "agent.horizon=10", "replay.batch=16", "replay.length=16",
)  # fmt: skip
SHARED = (
    "env.contexts=[]", "replay.capacity=4096", "train.prefill=1024", "frames=2048",
    "tracking.mlflow=false", "timescales.rule.kind=laprop", "timescales.rule.lr=4e-5",
    "timescales.rule.warmup=100",
)  # fmt: skip


class Spec(NamedTuple):
    """What one process measures."""

    kind: str = "update"  # update, small, seeds, policy, levels, machine
    size: str = "1m"
    dtype: str = "float32"
    encoder: str = "faithful"
    schedule: str = "plain"  # or k1, k3, k5
    threads: int = 1
    device: str = "cpu"
    batch: int = 16  # environment slots of a policy, seeds side by side
    overrides: tuple[str, ...] = ()  # field=value, last word on the configuration

    def dump(self) -> str:
        """JSON that `parse` takes."""
        return json.dumps(self._asdict())

    @classmethod
    def parse(cls, text: str) -> Self:
        """From the JSON of `dump`."""
        fields = json.loads(text)
        return cls(**{**fields, "overrides": tuple(fields["overrides"])})


def configured(spec: Spec) -> Config:
    """The configuration of what is measured: one rule on every schedule, no memory.

    Raises ConfigError for overrides that cannot run.
    """
    small = spec.kind in ("small", "seeds") or spec.size == "small"
    fields = [
        *(SMALL if small else (*REFERENCE, f"model.size={spec.size}")),
        f"model.encoder={spec.encoder}",
        f"precision={spec.dtype}",
        f"threads={spec.threads}",
        f"device={spec.device}",
        *levels(spec.schedule),
        *SHARED,
    ]
    return load_config("plain", [*fields, *spec.overrides])


def levels(schedule: str) -> tuple[str, ...]:
    """k levels of one rule; their periods are those of the presets k3 and k5."""
    if schedule == "plain":
        return ()
    k = schedule.removeprefix("k")
    return ("timescales.kind=geometric", f"timescales.k={k}", "timescales.base=4")
