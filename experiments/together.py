"""Several small runs in one program: each is a run of its own; all learn in the same operations.

The loop is that of train.py with a plural. Runs may differ in seed, schedule and whatever else does
not change the shape of an agent or the number of updates; each has its own folder, metrics and
checkpoints, and learns what it would have learned alone, to rounding. Products are the larger part
of an update then, and one core makes them all: `processes` put the other cores to work.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import reduce
from multiprocessing import get_context
from operator import getitem
from pathlib import Path

import numpy as np

from agents.group import Group, join_rows, split_rows
from experiments.build import slow_critic
from experiments.config import Config, ConfigError
from experiments.config.errors import shown
from experiments.config.models import EnvConfig
from experiments.driver import Driver, Step, pack, replayed_batch, unpack
from experiments.envs import make_envs
from experiments.evaluate import evaluations
from experiments.loop import Loop
from experiments.progress import Progress, Watch

SAME = (
    "frames", "device", "precision", "threads", "env.id", "env.num", "model", "agent",
    "replay.batch", "replay.length", "train", "evaluate", "log",
)  # fmt: skip
GROUPED = ("none", "hebb", "delta", "gated_delta")  # memories whose weights may have groups


def train_together(
    configs: Sequence[Config],
    watch: Callable[[Path, Config], AbstractContextManager[Watch]] = Progress,
    processes: int = 1,
) -> list[Path]:
    """Train runs of one shape side by side; returns their folders.

    `watch` sees the first of them; `processes` divide them. Raises ConfigError where they cannot
    run in step.
    """
    check(configs)
    size = -(-len(configs) // processes)
    first, *others = [configs[i : i + size] for i in range(0, len(configs), size)]
    if not others:
        return train_group(first, watch)
    # a pool ends its processes with its block, also where the runs of this one fail
    with get_context("spawn").Pool(len(others)) as pool:
        elsewhere = pool.starmap_async(train_group, [(part, Unwatched) for part in others], 1)
        here = train_group(first, watch)
        return here + [path for paths in elsewhere.get() for path in paths]


class Unwatched(AbstractContextManager["Unwatched"]):
    """Shows nothing: the watch of runs in another process."""

    def __init__(self, path: Path, config: Config):
        pass

    def __exit__(self, *args: object) -> None:
        pass

    def show(self, frame: int, metrics: Mapping[str, float]) -> None:
        """Nothing."""


def train_group(
    configs: Sequence[Config], watch: Callable[[Path, Config], AbstractContextManager[Watch]]
) -> list[Path]:
    """`train_together` in this process."""
    loops = [Loop.start(config) for config in configs]
    lead, group = loops[0], Group([loop.agent for loop in loops])
    with watch(lead.run.path, lead.config) as progress, ExitStack() as stack:
        for loop in loops:
            stack.enter_context(loop)
        while not lead.done:
            for loop in loops:
                loop.enter_phase()
            for loop, step in zip(loops, act(group, loops), strict=True):
                loop.replay.add(step.row, lambda carry=step.carry: pack(carry))
                loop.count(step)
            measure = lead.due(lead.config.log.every)
            for _ in range(max([loop.updates_due() for loop in loops])):
                learn(group, loops, measure)
            if measure:
                logged = [loop.log() for loop in loops]
                progress.show(lead.frame, logged[0])
            if lead.due(lead.config.evaluate.every) or lead.done:
                progress.show(lead.frame, evaluate(group, loops)[0])
            for loop in loops:
                if loop.due(loop.config.checkpoint.every) or loop.done:
                    loop.save()
    return [loop.run.path for loop in loops]


def act(group: Group, loops: Sequence[Loop]) -> list[Step]:
    """One step in the environments of every run."""
    randoms = [loop.random if loop.prefilling else None for loop in loops]
    return step_together(group, [loop.driver for loop in loops], randoms)


def step_together(
    group: Group,
    drivers: Sequence[Driver],
    randoms: Sequence[np.random.Generator | None] = (),
) -> list[Step]:
    """`Driver.step` of every agent's driver, with one forward pass."""
    rows, carry = join_rows([d.batch() for d in drivers]), join_rows([d.carry for d in drivers])
    generators = tuple(driver.generator for driver in drivers)
    action, after = group.act(carry, rows, generators, drivers[0].use)
    parts = zip(action.chunk(len(group)), split_rows(after, len(group)), strict=True)
    each = zip(drivers, parts, randoms or [None] * len(drivers), strict=True)
    return [driver.take(*part, random) for driver, part, random in each]


def learn(group: Group, loops: Sequence[Loop], measure: bool = False) -> None:
    """One update of every run: one backward pass, and a tick of each run's own levels."""
    device = loops[0].device
    samples = [loop.replay.sample(loop.config.replay.batch) for loop in loops]
    batch = join_rows([replayed_batch(arrays, device) for arrays, _ in samples])
    initial = loops[0].agent.initial(loops[0].config.replay.batch)
    carry = join_rows([unpack(packed, initial) for _, packed in samples])
    slow = [slow_critic(loop.timescales) for loop in loops]
    total, outcome = group.losses(batch, carry, slow, tuple(loop.generator for loop in loops))
    total.backward()
    for loop, part in zip(loops, group.split(outcome), strict=True):
        loop.timescales.tick("update", measure=measure)
        loop.gather(part)


def evaluate(group: Group, loops: Sequence[Loop]) -> list[dict[str, float]]:
    """Report the returns of every run in every context."""
    configs, lead = [loop.config for loop in loops], loops[0]
    metrics = evaluations(
        configs, group.agents, lead.frame, lambda drivers: step_together(group, drivers)
    )
    return [loop.evaluated(found) for loop, found in zip(loops, metrics, strict=True)]


def check(configs: Sequence[Config]) -> None:
    """Raises ConfigError unless all that shapes an agent or counts its updates is the same."""
    alone = "train them one by one"
    for config in configs:
        if config.env.pixels:
            raise ConfigError("env.pixels", True, "runs side by side see vectors", alone)
        if config.model.memory.kind not in GROUPED:
            problem = f"runs side by side have one of {', '.join(GROUPED)}"
            raise ConfigError("model.memory.kind", config.model.memory.kind, problem, alone)
    trees = [config.tree() for config in configs]
    for tree in trees[1:]:
        for path in SAME:
            one, other = (reduce(getitem, path.split("."), t) for t in (trees[0], tree))
            if one != other:
                problem = f"runs side by side need one value, and another has {shown(one)}"
                raise ConfigError(path, other, problem, alone)
    if sees_images(configs[0].env):
        problem = "observes images, and runs side by side see vectors"
        raise ConfigError("env.id", configs[0].env.id, problem, alone)


def sees_images(config: EnvConfig) -> bool:
    """Whether an observation is an image; opens a slot to know."""
    envs = make_envs(config, 1)
    envs.close()
    return any(spec.kind == "image" for spec in envs.obs_spec.values())
