"""An agent on task-free streams, as cells: contexts change unannounced, and only living counts.

No evaluation knows when a context changes, so there is no R: `online` is the mean score of the
episodes that ended, over the whole stream and in each twentieth of it. Where contexts are drawn, so
are the lengths of their phases, for each seed anew; `fresh` then is an agent for each context that
lives in nothing else for as long as the stream is in it on average, and the reference of
`dynamic_regret`.
"""

from collections.abc import Sequence
from itertools import pairwise
from tempfile import TemporaryDirectory

import numpy as np

from experiments.benchmarks.cells import Cell, Family, Result, Tell
from experiments.benchmarks.tasks.agent_cells import SYMPTOM, Training, online_of, updates_of
from experiments.benchmarks.tasks.agent_methods import AGENT_METHODS, ONLY, Options
from experiments.benchmarks.tasks.agent_scores import RAW
from experiments.benchmarks.tasks.agent_streams import STREAMS, AgentStream, configured
from experiments.config import Config, ConfigError, load_config
from experiments.envs.known import check_env
from experiments.record.metrics import Row

PARTS = 20  # of a stream, for its curve


def check(cell: Cell) -> None:
    """Raise ConfigError for a cell that cannot run."""
    options, stream = cell.options, STREAMS[cell.stream]
    frames, every = options["frames"], options["every"]
    if every < 1 or frames % (PARTS * every):
        raise ConfigError(
            "every", every, f"does not divide each of {PARTS} parts of frames={frames}",
            f"give a divisor of {frames // PARTS}",
        )  # fmt: skip
    if stream.change == "drawn":
        known = len(stream.contexts)
        if not 2 <= options["tasks"] <= known:
            problem = f"{cell.stream} has {known} contexts"
            raise ConfigError("tasks", options["tasks"], problem, f"2 to {known} of them")
        if not 2 <= options["phases"] <= frames // every:
            problem = f"phases end at multiples of every={every}"
            raise ConfigError("phases", options["phases"], problem, f"2 to {frames // every}")
    num = options.get("slots") or load_config(stream.preset).env.num
    if every % num:
        raise ConfigError("every", every, f"{num} slots step at once", f"a multiple of {num}")
    check_env(runs_of(cell._replace(seeds=cell.seeds[:1]), "runs")[0][0])


def drawn(stream: AgentStream, cell: Cell, seed: int) -> list[tuple[str, int]]:
    """Contexts and frames of the phases of a seed: no context follows itself.

    All ways to cut the stream at multiples of `every` are equally likely.
    """
    options, rng = cell.options, np.random.default_rng((seed, len(cell.stream)))
    every, phases = options["every"], options["phases"]
    steps = options["frames"] // every
    cuts = np.sort(rng.choice(steps - 1, phases - 1, replace=False) + 1)
    lengths = np.diff([0, *cuts, steps]) * every
    place, names = int(rng.integers(options["tasks"])), []
    for _ in range(phases):
        names.append(stream.contexts[place])
        place = (place + int(rng.integers(1, options["tasks"]))) % options["tasks"]
    return list(zip(names, lengths.tolist(), strict=True))


def runs_of(cell: Cell, root: str) -> list[list[Config]]:
    """The runs of a cell, a configuration a seed; of `fresh` a list for each context."""
    stream, options, method = STREAMS[cell.stream], cell.options, AGENT_METHODS[cell.method]

    def runs(phases: Sequence[Sequence[tuple[str, int]]]) -> list[Config]:
        return [
            configured(stream, method, options, seed, root, lived_in(stream, options, own, seed))
            for seed, own in zip(cell.seeds, phases, strict=True)
        ]

    if stream.change == "own":
        return [runs([[]] * len(cell.seeds))]
    if not method.fresh:
        return [runs([drawn(stream, cell, seed) for seed in cell.seeds])]
    every, tasks = options["every"], options["tasks"]
    length = options["frames"] // tasks // every * every
    return [runs([[(name, length)]] * len(cell.seeds)) for name in stream.contexts[:tasks]]


def lived_in(
    stream: AgentStream, options: Options, phases: Sequence[tuple[str, int]], seed: int
) -> list[str]:
    """Fields of a run through these phases, or of one whose environment changes by itself.

    The one evaluation at either end is not looked at.
    """
    words = [f"log.every={options['every']}", "evaluate.every=0", "evaluate.episodes=1"]
    if not phases:
        num = options["slots"]
        return [
            *words, f"frames={options['frames']}", f"env.kwargs.schedule={seed}",
            f"env.kwargs.every={options['switch'] // num}",  # a slot counts its own steps
        ]  # fmt: skip
    names, lengths = zip(*phases, strict=True)
    return [
        *words, f"frames={sum(lengths)}", f"env.contexts=[{','.join(names)}]",
        f"env.lengths=[{','.join(map(str, lengths))}]", f"evaluate.contexts=[{stream.contexts[0]}]",
    ]  # fmt: skip


def run(cell: Cell, tell: Tell) -> Result:
    """Train the runs of a cell; R is of no tasks, (S, 1, 0)."""
    stream = STREAMS[cell.stream]
    with TemporaryDirectory(prefix="nested-continual-") as root:
        lists = runs_of(cell, root)
        training = Training(lists, tell)
        told = [(configs, training(configs)) for configs in lists]
    info = training.costs(sum(updates_of(spools[0]) for _, spools in told))
    info["contexts"] = list(stream.contexts[: cell.options.get("tasks", 0)])
    if stream.cap is None:
        info["unit"] = RAW
    whole = [
        [online_of(rows, config.frames, config, stream) for config, rows in zip(*of, strict=True)]
        for of in told
    ]
    online = np.array(whole).T  # (S, runs)
    none, by_seed = np.zeros((len(cell.seeds), 1, 0)), {"online": online.mean(1)}
    by_seed |= symptoms_of([spools for _, spools in told])
    if AGENT_METHODS[cell.method].fresh:
        return Result(none, {"online": online}, {}, info, by_seed)
    arrays = {"curve": curve(*told[0], stream), "frames": parts_of(told[0][0][0].frames)}
    if stream.change == "drawn":
        arrays |= phases_of(*told[0], stream)
    return Result(none, {}, arrays, info, by_seed)


def symptoms_of(spools: Sequence[Sequence[Sequence[Row]]]) -> dict[str, np.ndarray]:
    """Signs of lost plasticity at the end (S,), means over the lists of runs."""
    last = [[rows[-1].metrics for rows in of] for of in spools]
    names = [name for name in last[0][0] if name.startswith(SYMPTOM)]
    return {name: np.mean([[found[name] for found in of] for of in last], 0) for name in names}


def parts_of(frames: int) -> np.ndarray:
    """Where the parts of a stream begin and end (PARTS + 1,)."""
    return np.linspace(0, frames, PARTS + 1).round().astype(int)


def curve(
    configs: Sequence[Config], spools: Sequence[Sequence[Row]], stream: AgentStream
) -> np.ndarray:
    """Mean scores (S, PARTS) of what was lived in each part."""
    return np.array(
        [
            between(rows, parts_of(config.frames), config, stream)
            for config, rows in zip(configs, spools, strict=True)
        ]
    )


def phases_of(
    configs: Sequence[Config], spools: Sequence[Sequence[Row]], stream: AgentStream
) -> dict[str, np.ndarray]:
    """Of each phase (S, P): the mean score, its frames, and its context by number."""
    found: dict[str, list] = {"lived": [], "lengths": [], "visited": []}
    for config, rows in zip(configs, spools, strict=True):
        lengths = config.env.lengths
        found["lived"].append(between(rows, np.cumsum([0, *lengths]), config, stream))
        found["lengths"].append(lengths)
        found["visited"].append([stream.contexts.index(name) for name in config.env.contexts])
    return {name: np.array(values) for name, values in found.items()}


def between(
    rows: Sequence[Row], edges: np.ndarray, config: Config, stream: AgentStream
) -> list[float]:
    """Mean scores of what was lived from each edge to the next."""
    return [
        online_of([r for r in rows if start < r.step <= end], end - start, config, stream)
        for start, end in pairwise(edges.tolist())
    ]


def family(stream: AgentStream) -> Family:
    """Who runs the cells of a stream without tasks."""
    methods = {
        name: method.line
        for name, method in AGENT_METHODS.items()
        if stream.contexts or not method.fresh
    }
    return Family(methods, stream.fields, check, run, ONLY)
