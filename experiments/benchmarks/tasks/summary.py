"""What the cells of the continual benchmark say: metrics by seed, intervals, paired differences.

Differences are taken seed by seed: the same stream, the same initial weights where the network is
the same. A schedule that claims something stands beside its controls: the same groups at scaled
rates and no clocks, plain accumulation of gradients, and what it is made of.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from experiments import plasticity
from experiments.benchmarks import metrics, statistics
from experiments.benchmarks.cells import Cell, Result
from experiments.benchmarks.tasks.agent_scores import RAW

REFERENCE = "fresh"  # the method that is the reference of transfer and of fresh_gap
# What a method must beat besides plain and the newest replay; the two controls come first.
CONTROLS = {
    "k3": ("k3_rates", "accumulate"),
    "k5": ("k5_rates", "accumulate"),
    "plain_fast": ("k3_rates", "accumulate"),
    "k3_fast": ("k3_rates", "accumulate", "plain_fast", "k3", "k3_rates_fast", "accumulate_fast"),
    "k5_fast": ("k5_rates", "accumulate", "plain_fast", "k5"),
    "hare_tortoise": ("hare_rates", "accumulate"),
    "mixed": ("reservoir",),
}
SCHEDULES = (
    "k3",
    "k5",
    "plain_fast",
    "k3_fast",
    "k5_fast",
    "hare_tortoise",
)  # that claim something
BASES = ("plain", "fifo")  # what every method is compared with
OF_AGENTS = tuple(f"plasticity/{name}" for name in ("dormant", "erank", "weight_norm"))
SYMPTOMS = ("dormant", "erank", "srank", "weight_norm", *OF_AGENTS)
NORMALISED = ("AP_final", "AP_any", "ALA", "F")
PAIRED = (
    "AP_final", "ALA", "F", "online", "auc", "frames_to_learn",
    "again/kept", "again/auc", "again/savings", "again/frames_to_learn", "again/AP_final",
)  # fmt: skip
PAIRED_FREE = ("online", "dynamic_regret")  # of streams without tasks
BY_TASK = ("online", "auc", "adapt", "frames_to_learn")  # means over tasks, where a family has them
Gate = tuple[str, str, str, float]  # stream, method or `a - b`, metric, more than


# ---- by seed -----------------------------------------------------------------------------------
def numbers(result: Result, fresh: Result | None) -> dict[str, np.ndarray]:
    """Every metric of a cell by seed (S,); those that need a reference where it was run.

    Signs of plasticity are those after the last task; regret is in tasks' worth of score.
    """
    found = metrics.of_scores(result.scores) | dict(result.by_seed)
    found |= {name: result.by_task[name].mean(1) for name in BY_TASK if name in result.by_task}
    found |= {name: values[:, -1] for name, values in result.by_task.items() if name in SYMPTOMS}
    if fresh is not None:
        found |= against(result, fresh) if tasks_of(result) else lost(result, fresh)
    return found


def tasks_of(result: Result) -> int:
    """How many tasks R is of; none where contexts change at no known time."""
    return result.scores.shape[2]


def against(result: Result, fresh: Result) -> dict[str, np.ndarray]:
    """What a reference adds. A best score of 1, and a normalised one, raw returns do not have."""
    own, ref = result.by_task["auc"], fresh.by_task["auc"]
    norms = ("none",) if result.info.get("unit") == RAW else metrics.NORMS
    found = {
        f"forward_transfer/{norm}": metrics.forward_transfer(own, ref, norm).value for norm in norms
    }
    found["fresh_gap"] = plasticity.fresh_gap(ref, own).mean(-1)
    best = fresh.by_task["online"].mean(0)
    found["dynamic_regret"] = metrics.dynamic_regret(result.by_task["online"], best)[..., -1]
    scores = None if "unit" in result.info else normalised(result, fresh)
    if scores is not None:
        found |= {f"{name}/normalised": metrics.of_scores(scores)[name] for name in NORMALISED}
    return found


def lost(result: Result, fresh: Result) -> dict[str, np.ndarray]:
    """Regret of a life in drawn contexts beside agents that each live in one: in mean phases."""
    if "visited" not in result.arrays:
        return {}
    lengths, best = result.arrays["lengths"], fresh.by_task["online"].mean(0)
    shares = lengths / lengths.mean(-1, keepdims=True)
    of_each = best[result.arrays["visited"]]
    regret = metrics.dynamic_regret(result.arrays["lived"], of_each, shares)
    return {"dynamic_regret": regret[..., -1]}


def normalised(result: Result, fresh: Result) -> np.ndarray | None:
    """R in units of what a fresh agent learns of each task, or None where it learned nothing."""
    rand = fresh.scores[:, 0].mean(0)
    ref = np.diagonal(fresh.scores[:, 1:].mean(0))
    if (np.abs(ref - rand) < metrics.LEAST).any():
        return None
    return metrics.normalise(result.scores, rand, ref)


def summarise(cells: Sequence[Cell], results: Mapping[str, Result]) -> dict[str, Any]:
    """By stream: each method's metrics and costs, and paired differences, all with intervals."""
    rng, later = np.random.default_rng(0), np.random.default_rng(1)
    summary: dict[str, Any] = {}
    for stream in dict.fromkeys(cell.stream for cell in cells):
        found = {cell.method: results[cell.key] for cell in cells if cell.stream == stream}
        seeds = next(cell.seeds for cell in cells if cell.stream == stream)
        by_seed = {name: numbers(result, found.get(REFERENCE)) for name, result in found.items()}
        methods = {}
        for name, result in found.items():
            row = {  # what cells came to know later leaves the draws of published intervals
                metric: statistics.bootstrap(
                    values, later if metric in OF_AGENTS else rng
                )._asdict()
                for metric, values in by_seed[name].items()
            }
            row["IQM_final"] = statistics.stratified_bootstrap(final(result), rng)._asdict()
            methods[name] = {"metrics": row, "cost": result.info}
        pairs = {
            f"{one} - {other}": compared(one, other, found, by_seed, rng)
            for one, other in to_compare(list(found))
        }
        units = {result.info["unit"] for result in found.values() if "unit" in result.info}
        said = {"unit": " or ".join(sorted(units))} if units else {}
        summary[stream] = {"seeds": list(seeds), **said, "methods": methods, "pairs": pairs}
    return summary


def to_compare(methods: Sequence[str]) -> list[tuple[str, str]]:
    """Every method with plain and the newest replay; those that claim something, with controls."""
    pairs = [(name, base) for base in BASES if base in methods for name in methods if name != base]
    for name, controls in CONTROLS.items():
        pairs += [(name, other) for other in controls if {name, other} <= set(methods)]
    return pairs


def compared(
    one: str,
    other: str,
    found: Mapping[str, Result],
    by_seed: Mapping[str, Mapping[str, np.ndarray]],
    rng: np.random.Generator,
) -> dict[str, Any]:
    """Differences by seed, mean and interval, and how often `one` ends above `other`."""
    row: dict[str, Any] = {}
    for metric in PAIRED if tasks_of(found[one]) else PAIRED_FREE:
        if metric in by_seed[one] and metric in by_seed[other]:
            difference = statistics.paired_bootstrap(
                by_seed[one][metric], by_seed[other][metric], rng
            )
            row[metric] = difference._asdict()
    last = final(found[one]), final(found[other])
    row["P(improvement)"] = statistics.probability_of_improvement(*last, rng)._asdict()
    return row


def final(result: Result) -> np.ndarray:
    """The last scores (S, N); without tasks what was lived, (S, 1)."""
    return result.scores[:, -1] if tasks_of(result) else result.by_seed["online"][:, None]


def failures(gates: Iterable[Gate], summary: Mapping[str, Any]) -> list[str]:
    """The gates that a summary does not pass; of those that were run.

    A difference must be there with certainty: its interval is above the bound. A minus before a
    difference's metric turns its sign.
    """
    failed = []
    for stream, name, metric, least in gates:
        found = summary.get(stream, {"methods": {}, "pairs": {}})
        if name in found["methods"]:
            value = found["methods"][name]["metrics"][metric]["value"]
        elif name in found["pairs"]:
            row = found["pairs"][name][metric.removeprefix("-")]
            value = -row["high"] if metric.startswith("-") else row["low"]
        else:
            continue
        if not value > least:
            failed.append(f"{stream} {name}: {metric} {value:.3f} is not above {least}")
    return failed
