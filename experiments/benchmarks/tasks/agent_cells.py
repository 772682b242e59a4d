"""An agent on streams of tasks, as cells of the continual-learning benchmark.

Phases of equal length in published order, and where asked for one of them again, or all in further
cycles; the agent is not told. A cell's seeds are runs, side by side where agents see vectors, one
after another where they see images; R comes from their own evaluations.
A score is a return's share of the cap, or the return itself where there is none (agent_units.py).
Every step of CartPole earns one, so the mean reward of a step says nothing there: `online` is the
mean score of the episodes that ended while the task was learned.
"""

import time
from collections.abc import Mapping, Sequence
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np

from experiments.benchmarks.cells import Cell, Family, Result, Tell
from experiments.benchmarks.tasks.agent_costs import Clock, costs
from experiments.benchmarks.tasks.agent_methods import AGENT_METHODS, ONLY
from experiments.benchmarks.tasks.agent_scores import RAW, result_of
from experiments.benchmarks.tasks.agent_streams import STREAMS, AgentStream, configured
from experiments.benchmarks.tasks.agent_units import RANDOM, played
from experiments.config import Config, ConfigError
from experiments.envs.known import check_env
from experiments.record.metrics import Row, read
from experiments.together import sees_images, train_together
from experiments.train import train

SYMPTOM = "plasticity/"  # metrics of a run that say what its network has become


def check(cell: Cell) -> None:
    """Raise ConfigError for a cell that cannot run."""
    options, known = cell.options, STREAMS[cell.stream].contexts
    tasks, frames, every = options["tasks"], options["frames"], options["every"]
    if not 2 <= tasks <= len(known):
        problem = f"{cell.stream} has {len(known)}"
        raise ConfigError("tasks", tasks, problem, f"2 to {len(known)} of them")
    if options["again"] not in ("", *known[:tasks]):
        raise ConfigError(
            "again", options["again"], "is none of the contexts that were learned",
            f"one of {', '.join(known[:tasks])}",
        )  # fmt: skip
    if options.get("cycles", 1) < 1:
        raise ConfigError("cycles", options["cycles"], "nothing to run", "give 1 or more")
    if every < 1 or frames % every:
        raise ConfigError(
            "every", every, f"does not divide frames={frames}: no evaluation would end a phase",
            "give a divisor",
        )  # fmt: skip
    config = one_run(cell)
    if every % config.env.num:
        problem = f"{config.env.num} slots step at once"
        raise ConfigError("every", every, problem, f"a multiple of {config.env.num}")
    check_env(config)


def runs_of(cell: Cell, root: str) -> list[list[Config]]:
    """The runs of a cell, each list of all seeds through the same phases; `fresh`: a list a task.

    Of random actions, the runs that they stand beside.
    """
    stream, options = STREAMS[cell.stream], cell.options
    method = AGENT_METHODS["plain" if cell.method == RANDOM else cell.method]
    contexts = stream.contexts[: options["tasks"]]
    again = [options["again"]] if options["again"] else []
    through = [*contexts * options.get("cycles", 1), *again]
    phases = [[context] for context in contexts] if method.fresh else [through]
    return [
        [configured(stream, method, options, seed, root, phased(options, names, contexts))
         for seed in cell.seeds]
        for names in phases
    ]  # fmt: skip


def phased(options: Mapping[str, Any], names: Sequence[str], contexts: Sequence[str]) -> list[str]:
    """Fields of a run through phases of these names, evaluated in all contexts."""
    return [
        f"frames={options['frames'] * len(names)}", f"env.contexts=[{','.join(names)}]",
        f"evaluate.contexts=[{','.join(contexts)}]",
        f"evaluate.every={options['every']}", f"evaluate.episodes={options['episodes']}",
        f"log.every={options['every']}",
    ]  # fmt: skip


def run(cell: Cell, tell: Tell) -> Result:
    """Train the runs of a cell and read their metrics; the runs themselves are not kept."""
    stream, options = STREAMS[cell.stream], cell.options
    if cell.method == RANDOM:
        (configs,) = runs_of(cell, "runs")
        return played(configs, stream.contexts[: options["tasks"]], stream.unit, tell)
    with TemporaryDirectory(prefix="nested-continual-") as root:
        lists = runs_of(cell, root)
        training = Training(lists, tell)
        parts = [
            join([part_of(rows, configs[0], stream) for rows in training(configs)], 0)
            for configs in lists
        ]
    whole = join(parts, 1)
    info = training.costs(whole.updates)
    info["contexts"] = list(stream.contexts[: options["tasks"]])
    info["phases"] = [name for configs in lists for name in configs[0].env.contexts]
    if stream.cap is None:
        info["unit"] = RAW
    return result_of(whole.course, whole.online, options["every"], info, whole.symptoms)


def one_run(cell: Cell) -> Config:
    """The configuration of a cell's first run, where the others differ by seed and context."""
    return runs_of(cell._replace(seeds=cell.seeds[:1]), "runs")[0][0]


class Training:
    """Trains lists of runs, seeds side by side where they can be, and counts what that costs."""

    def __init__(self, lists: Sequence[Sequence[Config]], tell: Tell) -> None:
        self._lead, self._seeds = lists[0][0], len(lists[0])
        self._abreast = not sees_images(self._lead.env)
        self._frames = sum(configs[0].frames for configs in lists)
        self._clock = Clock(tell, self._frames * (1 if self._abreast else self._seeds))
        self._started = time.process_time()

    def __call__(self, configs: Sequence[Config]) -> list[list[Row]]:
        """The metrics of each run."""
        watch = self._clock.watch
        if self._abreast:
            paths = train_together(configs, watch)
        else:
            paths = [train(config, watch=watch) for config in configs]
        return [read(path / "metrics.jsonl") for path in paths]

    def costs(self, updates: float) -> dict[str, Any]:
        """What the runs cost, of which one seed's had so many updates."""
        share, seconds = updates / self._frames, self._clock.seconds
        return {
            "core_seconds": seconds,
            "core_seconds_with_evaluation": time.process_time() - self._started,
            "core_us_per_interaction": 1e6 * seconds / (self._seeds * self._frames),
            "updates_per_interaction": share,
            **costs(self._lead, share),
        }


# ---- what the runs reported --------------------------------------------------------------------
class Part(NamedTuple):
    """What runs side by side gave in the P phases that they went through."""

    course: np.ndarray  # (S, P, T+1, N): scores in N contexts, before and during each phase
    online: np.ndarray  # (S, P)
    updates: float  # of one run
    symptoms: dict[str, np.ndarray]  # (S, P) at the end of each phase


def part_of(rows: Sequence[Row], config: Config, stream: AgentStream) -> Part:
    """What a run's metrics say, with S = 1."""
    phases, contexts = len(config.env.contexts), config.evaluate.contexts
    names = [f"eval/{context}/return" for context in contexts]
    found = np.array([[r.metrics[n] for n in names] for r in rows if names[0] in r.metrics])
    scores = found / stream.unit
    steps, left = divmod(len(scores) - 1, phases)
    assert not left, "every phase has as many evaluations"
    course = np.stack([scores[i * steps : (i + 1) * steps + 1] for i in range(phases)])
    length = config.frames // phases
    parts = [[r for r in rows if i * length < r.step <= (i + 1) * length] for i in range(phases)]
    online = np.array([[online_of(part, length, config, stream) for part in parts]])
    last = [
        {k: v for r in part for k, v in r.metrics.items() if k.startswith(SYMPTOM)}
        for part in parts
    ]
    symptoms = {name: np.array([[found[name] for found in last]]) for name in last[0]}
    return Part(course[None], online, updates_of(rows), symptoms)


def online_of(rows: Sequence[Row], frames: int, config: Config, stream: AgentStream) -> float:
    """Mean score of the episodes that ended in these frames; if none, what all slots lived."""
    ended = [r.metrics for r in rows if r.metrics.get("train/episodes")]
    episodes = sum(found["train/episodes"] for found in ended)
    if episodes:
        total = sum(found["train/episodes"] * found["train/return"] for found in ended)
        return total / episodes / stream.unit
    if stream.paid:
        return min(1.0, frames / config.env.num / stream.unit)
    earned = config.log.every * sum(r.metrics.get("train/reward", 0.0) for r in rows)
    return earned / config.env.num / stream.unit


def updates_of(rows: Sequence[Row]) -> float:
    """Updates of a run."""
    return max(r.metrics.get("train/updates", 0.0) for r in rows)


def join(parts: Sequence[Part], axis: int) -> Part:
    """Parts as one: of several seeds (axis 0), or of phases that followed each other (axis 1)."""
    symptoms = {
        name: np.concatenate([part.symptoms[name] for part in parts], axis)
        for name in parts[0].symptoms
    }
    return Part(
        np.concatenate([part.course for part in parts], axis),
        np.concatenate([part.online for part in parts], axis),
        parts[0].updates if axis == 0 else sum(part.updates for part in parts),
        symptoms,
    )


def family(stream: AgentStream) -> Family:
    """Who runs the cells of a stream of tasks."""
    methods = {name: method.line for name, method in AGENT_METHODS.items()}
    if stream.cap is None:
        methods[RANDOM] = "uniform actions, which never learn: the zero of scores"
    return Family(methods, stream.fields, check, run, ONLY)
