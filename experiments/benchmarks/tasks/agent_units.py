"""From returns to scores where no cap is known: 0 is a random agent, 1 a fresh one.

Random actions are played once a suite, in a cell of their own beside the others; the reference is
the end of each task of `fresh`. Cells keep raw returns: what they are divided by is found when a
suite is told, so a cell never depends on another. Where either is missing, returns stay raw and
every table says so. Nothing is clipped.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.benchmarks import metrics
from experiments.benchmarks.cells import Cell, Result, Tell
from experiments.benchmarks.tasks.agent_scores import RAW, result_of
from experiments.config import Config
from experiments.envs import Envs, make_envs
from experiments.policies import play, uniform

RANDOM, FRESH = "random", "fresh"  # methods whose returns are a score of 0, and of 1
EPISODES = 64  # of random actions in each context, over all seeds
IN_UNITS = ("online", "auc", "adapt")  # what of a task is in the unit of a return
SHARE = "0 is a random agent, 1 a fresh one at the end of the task"


def played(configs: Sequence[Config], contexts: Sequence[str], unit: float, tell: Tell) -> Result:
    """The result of random actions, a configuration a seed: every row of R is the same."""
    started = time.process_time()
    each, rows = -(-EPISODES // len(configs)), []
    for i, config in enumerate(configs):
        envs = make_envs(config.env, min(each, config.env.num), config.seed)
        rows.append(returns_in(envs, contexts, each, np.random.default_rng(config.seed)))
        envs.close()
        tell((i + 1) / len(configs))
    means = np.array(rows) / unit
    seconds = time.process_time() - started
    info = {
        "core_seconds": seconds, "core_us_per_interaction": 0.0, "flops_per_interaction": 0.0,
        "bytes_per_interaction": 0.0, "levels": {}, "contexts": list(contexts), "unit": RAW,
    }  # fmt: skip
    by_task = {name: means for name in ("online", "auc", "adapt")}
    scores = np.repeat(means[:, None], len(contexts) + 1, 1)
    return Result(scores, by_task, {}, info)


def returns_in(
    envs: Envs, contexts: Sequence[str], episodes: int, rng: np.random.Generator
) -> list[float]:
    """Mean returns of random actions in each context."""
    means = []
    for context in contexts:
        envs.reset(context)
        means.append(float(np.mean(play(envs, uniform(envs, rng), episodes))))
    return means


# ---- a suite in units --------------------------------------------------------------------------
def in_units(cells: Sequence[Cell], results: Mapping[str, Result]) -> dict[str, Result]:
    """The results by key, those in raw returns as scores where their stream has what it takes."""
    found = dict(results)
    for stream in dict.fromkeys(cell.stream for cell in cells):
        own = {cell.method: cell.key for cell in cells if cell.stream == stream}
        if not {RANDOM, FRESH} <= set(own) or results[own[RANDOM]].info["unit"] != RAW:
            continue
        rand = results[own[RANDOM]].scores[:, 0].mean(0)
        ref = np.diagonal(results[own[FRESH]].scores[:, 1:].mean(0))
        if (np.abs(ref - rand) >= metrics.LEAST).all():
            found |= {key: scored(results[key], rand, ref) for key in own.values()}
    return found


def scored(result: Result, rand: np.ndarray, ref: np.ndarray) -> Result:
    """Raw returns as scores; `rand` and `ref` (N,) are the returns of 0 and 1."""
    info: dict[str, Any] = {**result.info, "unit": SHARE}
    rest = {name: values for name, values in result.by_task.items() if name not in IN_UNITS}
    scaled = {name: metrics.normalise(values, rand, ref)
              for name, values in result.by_task.items() if name in IN_UNITS}  # fmt: skip
    if "course" not in result.arrays:
        scores = metrics.normalise(result.scores, rand, ref)
        return Result(scores, scaled | rest, result.arrays, info, result.by_seed)
    course = metrics.normalise(result.arrays["course"], rand, ref)
    every = int(result.arrays["frames"][1])
    return result_of(course, scaled["online"], every, info, rest)
