"""Runs made of formulas: what the training loop leaves behind, without training."""

import math
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from experiments.record.run import Run

PERIODS = {"fast": 1, "mid": 4, "slow": 16}
CAP = 200.0
YAML = """\
name: {name}
seed: {seed}
frames: {frames}
env: {{id: CartPoleShift-v0, num: 8, kwargs: {{}}, contexts: [normal, flipped, normal]}}
timescales:
  kind: levels
  levels:
    fast: {{match: actor, copy: null, every: {{n: 1, unit: update}}}}
    mid: {{match: dynamics, copy: null, every: {{n: 4, unit: update}}}}
    slow: {{match: encoder, copy: null, every: {{n: 16, unit: update}}}}
evaluate: {{every: 1000, episodes: 32}}
tracking: {{mlflow: true, uri: "sqlite:///mlflow.db", experiment: null, root: runs}}
"""


class Config(NamedTuple):
    """Just enough of a configuration for a run."""

    name: str = "cartpole-shift"
    seed: int = 0
    frames: int = 24000

    def dump(self) -> str:
        return YAML.format(**self._asdict())


def make_run(root: Path, frames: int = 24000, every: int = 250, state: str = "finished") -> Run:
    """A run that learned, forgot and learned again; `state` "running" leaves it open."""
    run = Run.create(Config(frames=frames), root)
    run.start()
    run.write("levels.json", {"levels": table(), "timeline": timeline(512)})
    random = Random(0)
    for step in range(every, frames + 1, every):
        run.log(step, train_metrics(step, frames, random))
        if step % (4 * every) == 0:
            run.log(step, eval_metrics(step, frames, random))
    if state != "running":
        run.finish(state)  # pyright: ignore[reportArgumentType]
    return run


def skill(step: int, frames: int) -> dict[str, float]:
    """Score in each context: learning, forgetting, savings."""
    phase, within = divmod(3 * (step - 1) / frames, 1.0)
    rise, fall = 1 / (1 + math.exp(-14 * (within - 0.4))), math.exp(-5 * within)
    again = 1 / (1 + math.exp(-18 * (within - 0.15)))
    normal = [0.1 + 0.85 * rise, 0.15 + 0.8 * fall, 0.15 + 0.8 * again]
    flipped = [0.08, 0.1 + 0.83 * rise, 0.15 + 0.78 * fall]
    i = min(2, int(phase))
    return {"normal": normal[i], "flipped": flipped[i]}


def eval_metrics(step: int, frames: int, random: Random) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for name, value in skill(step, frames).items():
        score = min(1.0, max(0.04, value + random.gauss(0, 0.03)))
        metrics |= {f"eval/{name}/score": score, f"eval/{name}/return": CAP * score}
    return metrics


def train_metrics(step: int, frames: int, random: Random) -> dict[str, float]:
    phase = min(2, 3 * (step - 1) // frames)
    now = skill(step, frames)[["normal", "flipped", "normal"][phase]]
    age = step / frames
    noise = {key: math.exp(random.gauss(0, 0.12)) for key in ("a", "b", "c", "d", "e", "f")}
    updates = step // 8
    metrics: dict[str, float] = {
        "train/return": CAP * min(1, max(0.05, now + random.gauss(0, 0.15))),
        "train/phase": phase,
        "train/updates": updates,
        "loss/state": (0.02 + 0.6 * math.exp(-9 * age)) * noise["a"],
        "loss/reward": (0.03 + 0.3 * math.exp(-9 * age)) * noise["b"],
        "loss/continue": (0.01 + 0.08 * math.exp(-4 * age)) * noise["c"],
        "loss/dyn": (1.0 + 3 * math.exp(-6 * age)) * noise["d"],
        "loss/rep": (1.0 + 3 * math.exp(-6 * age)) * noise["d"],
        "loss/policy": 0.05 * random.gauss(0.2, 1),
        "loss/value": (0.9 + 2 * math.exp(-7 * age)) * noise["e"],
        "loss/repvalue": (1.1 + 2 * math.exp(-7 * age)) * noise["f"],
        "agent/entropy": 0.69 * (1 - age) + 0.05,
        "time/fps": 140 + random.gauss(0, 4),
    }
    for name, period in PERIODS.items():
        metrics[f"levels/{name}/updates"] = updates // period
        metrics[f"levels/{name}/grad_norm"] = noise["a"]
        moved = 3e-3 * period**-0.4 * noise["f"] * math.exp(-age)
        metrics[f"levels/{name}/displacement_per_sample"] = moved
    return metrics


def table() -> list[dict[str, Any]]:
    shares = {"fast": 0.42, "mid": 0.5, "slow": 0.08}
    rows: list[dict[str, Any]] = [
        {"name": name, "kind": "match", "n": n, "unit": "update", "p": 1.0, "share": shares[name]}
        for name, n in PERIODS.items()
    ]
    copy = {"name": "slow_critic", "kind": "copy", "n": 1, "unit": "update", "p": 1.0, "share": 0.1}
    return [*rows, copy]


def timeline(length: int) -> dict[str, list[int]]:
    periods = PERIODS | {"slow_critic": 1}
    return {name: list(range(n, length + 1, n)) for name, n in periods.items()}
