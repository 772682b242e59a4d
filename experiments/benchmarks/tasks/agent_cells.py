"""Streams of hidden contexts that an agent acts in, as cells of the continual-learning benchmark.

`cl/CartPoleShift-v0`: CartPole in phases of equal length, normal, flipped, long, heavy, and where
asked for one of them again; the agent is not told. A cell's seeds are runs that train side by side;
R comes from their own evaluations.
A score is a return's share of the cap. Every step of CartPole earns one, so the mean reward of a
step says nothing: `online` is the mean score of the episodes that ended while the task was learned.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, Self

import numpy as np
import torch

from agents import Dreamer
from experiments.benchmarks import metrics
from experiments.benchmarks.cells import Cell, Family, Result, Tell
from experiments.benchmarks.tasks.agent_methods import AGENT_METHODS, FIELDS, configured
from experiments.benchmarks.timing.flops import moved_bytes, operations
from experiments.build import build_agent, build_timescales, slow_critic
from experiments.config import Config, ConfigError
from experiments.driver import to_batch
from experiments.envs import make_envs
from experiments.envs.cartpole import CAP, NAMES
from experiments.record.metrics import Row, read
from experiments.together import train_together
from timescales import Timescales
from worldmodel import Batch

STREAM = "cl/CartPoleShift-v0"
LAST = 3  # evaluations at the end of a phase that its score is the mean of
LEARNED = 0.8  # a score that counts as learned


def check(cell: Cell) -> None:
    """Raise ConfigError for a cell that cannot run."""
    options = cell.options
    tasks, frames, every = options["tasks"], options["frames"], options["every"]
    if not 2 <= tasks <= len(NAMES):
        raise ConfigError("tasks", tasks, f"{STREAM} has {len(NAMES)}", "2 to 4 of them")
    if options["again"] not in ("", *NAMES[:tasks]):
        raise ConfigError(
            "again", options["again"], "is none of the contexts that were learned",
            f"one of {', '.join(NAMES[:tasks])}",
        )  # fmt: skip
    if every < 1 or frames % every:
        raise ConfigError(
            "every", every, f"does not divide frames={frames}: no evaluation would end a phase",
            "give a divisor",
        )  # fmt: skip
    num = one_run(cell).env.num
    if every % num:
        raise ConfigError("every", every, f"{num} slots step at once", f"a multiple of {num}")


def runs_of(cell: Cell, root: str) -> list[list[Config]]:
    """The runs of a cell, those in one list side by side: all seeds; `fresh` has a list a task."""
    method, options = AGENT_METHODS[cell.method], cell.options
    contexts = NAMES[: options["tasks"]]
    again = [options["again"]] if options["again"] else []
    phases = [[context] for context in contexts] if method.fresh else [[*contexts, *again]]
    return [
        [configured(method, options, names, seed, root) for seed in cell.seeds] for names in phases
    ]


def run(cell: Cell, tell: Tell) -> Result:
    """Train the runs of a cell and read their metrics; the runs themselves are not kept."""
    options, started = cell.options, time.process_time()
    parts: list[Part] = []
    with TemporaryDirectory(prefix="nested-continual-") as root:
        lists = runs_of(cell, root)
        interactions = sum(configs[0].frames for configs in lists)
        clock = Clock(tell, interactions)
        for configs in lists:
            paths = train_together(configs, clock.watch)
            spools = [read(path / "metrics.jsonl") for path in paths]
            parts.append(join([part_of(rows, configs[0]) for rows in spools]))
    updates = sum(part.updates for part in parts) / interactions
    info = {
        "core_seconds": clock.seconds,
        "core_seconds_with_evaluation": time.process_time() - started,
        "core_us_per_interaction": 1e6 * clock.seconds / (len(cell.seeds) * interactions),
        "updates_per_interaction": updates,
        **costs(one_run(cell), updates),
        "contexts": list(NAMES[: options["tasks"]]),
        "phases": [name for configs in lists for name in configs[0].env.contexts],
    }
    course, online = (np.concatenate([part[i] for part in parts], 1) for i in range(2))
    return result_of(course, online, options["every"], info)


def result_of(course: np.ndarray, online: np.ndarray, every: int, info: dict[str, Any]) -> Result:
    """The result of a course (S, P, T+1, N) and of the scores (S, P) of what was lived.

    N phases are tasks, each in the context of its number; one more is a context that comes back.
    """
    tasks, frames = course.shape[3], every * np.arange(course.shape[2])
    learned = course[:, :tasks]
    areas = metrics.auc(frames, own(learned))
    by_task = {
        "online": online[:, :tasks],
        "auc": areas,
        "adapt": metrics.adapt_area(own(learned)[..., 1:], min(LAST, len(frames) - 1)),
        "frames_to_learn": metrics.time_to(frames, own(learned), LEARNED),
    }
    by_seed: dict[str, np.ndarray] = {}
    for back in info["phases"][tasks:]:
        place = info["contexts"].index(back)
        scores = course[:, -1, :, place]
        area = metrics.auc(frames, scores)
        by_seed = {
            "again/kept": scores[:, 0],
            "again/auc": area,
            "again/savings": metrics.savings(areas[:, place], area),
            "again/frames_to_learn": metrics.time_to(frames, scores, LEARNED),
        }
    arrays = {"course": course, "frames": frames}
    return Result(scores_of(learned), by_task, arrays, info, by_seed)


def one_run(cell: Cell) -> Config:
    """The configuration of a cell's first run, where the others differ by seed and context."""
    return runs_of(cell._replace(seeds=cell.seeds[:1]), "runs")[0][0]


# ---- what the runs reported --------------------------------------------------------------------
class Part(NamedTuple):
    """What runs side by side gave in the P phases that they went through."""

    course: np.ndarray  # (S, P, T+1, N): scores in N contexts, before and during each phase
    online: np.ndarray  # (S, P)
    updates: float  # of one run


def part_of(rows: Sequence[Row], config: Config) -> Part:
    """What a run's metrics say, with S = 1."""
    phases, contexts = len(config.env.contexts), config.evaluate.contexts
    names = [f"eval/{context}/score" for context in contexts]
    scores = np.array([[r.metrics[n] for n in names] for r in rows if names[0] in r.metrics])
    steps, left = divmod(len(scores) - 1, phases)
    assert not left, "every phase has as many evaluations"
    course = np.stack([scores[i * steps : (i + 1) * steps + 1] for i in range(phases)])
    length = config.frames // phases
    online = [
        online_of([r for r in rows if i * length < r.step <= (i + 1) * length], config)
        for i in range(phases)
    ]
    updates = max(r.metrics.get("train/updates", 0.0) for r in rows)
    return Part(course[None], np.array([online]), updates)


def online_of(rows: Sequence[Row], config: Config) -> float:
    """Mean score of the episodes that ended in a phase; where none did, what all slots lived."""
    ended = [r.metrics for r in rows if r.metrics.get("train/episodes")]
    episodes = sum(found["train/episodes"] for found in ended)
    if not episodes:
        return min(1.0, config.frames / len(config.env.contexts) / config.env.num / CAP)
    return sum(found["train/episodes"] * found["train/return"] for found in ended) / episodes / CAP


def join(parts: Sequence[Part]) -> Part:
    """Seeds side by side."""
    course, online = (np.concatenate([part[i] for part in parts]) for i in range(2))
    return Part(course, online, parts[0].updates)


def own(course: np.ndarray) -> np.ndarray:
    """The scores (S, N, T+1) in the context of each phase."""
    return np.stack([course[:, i, :, i] for i in range(course.shape[1])], 1)


def scores_of(course: np.ndarray) -> np.ndarray:
    """R (S, N+1, N): untrained, then the mean of the last evaluations of each phase."""
    last = min(LAST, course.shape[2] - 1)
    ends = metrics.end_value(np.swapaxes(course, 2, 3), last)
    return np.concatenate([course[:, :1, 0], ends], 1)


# ---- costs -------------------------------------------------------------------------------------
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


AGENT = Family({name: method.line for name, method in AGENT_METHODS.items()}, FIELDS, check, run)
