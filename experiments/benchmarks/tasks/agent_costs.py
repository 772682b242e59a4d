"""What an agent's frame costs: core seconds while it trains, operations and bytes by level."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch

from agents import Dreamer
from experiments.benchmarks.cells import Tell
from experiments.benchmarks.timing.flops import moved_bytes, operations
from experiments.build import build_agent, build_timescales, slow_critic
from experiments.config import Config
from experiments.driver import to_batch
from experiments.envs import make_envs
from timescales import Timescales
from worldmodel import Batch


class Clock:
    """Core seconds of acting and learning, evaluations left out; tells the share that is done."""

    def __init__(self, tell: Tell, frames: int) -> None:
        self.seconds = 0.0
        self._tell, self._frames = tell, frames
        self._before, self._since = 0, 0.0

    @contextmanager
    def watch(self, path: Path, config: Config) -> Iterator[Self]:
        """For one list of runs."""
        self._since = time.process_time()
        yield self
        self._before += config.frames

    def show(self, frame: int, metrics: Mapping[str, float]) -> None:
        """A report ends a stretch of learning, an evaluation one of evaluating."""
        now = time.process_time()
        if not any(name.startswith("eval/") for name in metrics):
            self.seconds += now - self._since
        self._since = now
        self._tell((self._before + frame) / self._frames)


def costs(config: Config, updates: float) -> dict[str, Any]:
    """Operations and bytes of an interaction with so many updates, and by level what it costs.

    A level that gathers gradients pays its backward at every update, however seldom it moves: its
    operations are those that would be saved if its parameters took no gradients.
    """
    envs = make_envs(config.env, 1, 0)
    row = to_batch(envs.reset(), torch.device("cpu"))
    agent = build_agent(
        config.model_copy(update={"device": "cpu"}), envs.obs_spec, envs.action_spec
    )
    envs.close()
    agent.world.dynamics.readable = True  # nodes by hand make the same products, uncounted
    timescales = build_timescales(config, agent)
    one, two = (update_operations(agent, timescales, row, config, n) for n in (1, 2))
    batch, generator = config.replay.batch, torch.Generator()
    acting = operations(lambda: agent.act(agent.initial(1), row, generator))
    levels: dict[str, Any] = {}
    timescales.tick("update", max(level.every.n for level in timescales.levels))  # all have moved
    for level in timescales.levels:
        if level.copy is None:
            owned = timescales.weights(level.name)
            with frozen(agent, owned):
                rest = update_operations(agent, timescales, row, config, 1)
            levels[level.name] = {
                "parameters": sum(w.numel() for w in owned.values()),
                "n": level.every.n,
                "every": str(level.every),
                "flops": round((one - rest) * batch * updates),
                "bytes": moved_bytes(timescales, level.name) * updates,
            }
    whole = one + (two - one) * (batch - 1)
    return {
        "flops_per_interaction": acting + whole * updates,
        "bytes_per_interaction": sum(level["bytes"] for level in levels.values()),
        "levels": levels,
    }


def update_operations(
    agent: Dreamer, timescales: Timescales, row: Batch, config: Config, sequences: int
) -> int:
    """Operations of losses and backward on so many sequences, whatever is in them."""
    shape = (sequences, config.replay.length)
    obs = {name: value[:, None].expand(*shape, *value.shape[1:]) for name, value in row.obs.items()}
    rest = (value[:, None].expand(*shape, *value.shape[1:]) for value in row[1:])
    batch, generator = Batch(obs, *rest), torch.Generator()

    def update() -> None:
        start = agent.initial(sequences)
        total = agent.total(agent.losses(batch, start, slow_critic(timescales), generator).losses)
        if total.requires_grad:
            total.backward()

    return operations(update)


@contextmanager
def frozen(agent: Dreamer, names: Sequence[str] | Mapping[str, Any]) -> Iterator[None]:
    """These parameters take no gradients."""
    parameters = [agent.get_parameter(name) for name in names]
    for parameter in parameters:
        parameter.requires_grad_(False)
    yield
    for parameter in parameters:
        parameter.requires_grad_(True)
