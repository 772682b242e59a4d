"""What is learned, kept and lost: `nested bench continual --tier smoke|laptop|overnight`.

Streams of tasks, methods and controls, several seeds: R after every task, forgetting, transfer,
plasticity and cost, with intervals; comparisons are paired by seed. A suite that is killed goes on
where it was, and a repeated command only draws anew. In OUT: results.csv in long format, R.npz,
summary.json, and a page for each stream.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from experiments.benchmarks import metrics, plasticity, statistics
from experiments.benchmarks.agent_cells import AGENT, STREAM
from experiments.benchmarks.agent_methods import AGENT_METHODS
from experiments.benchmarks.baselines import METHODS
from experiments.benchmarks.board import Board, table
from experiments.benchmarks.cells import Cell, Family, Result, collect, run_cells
from experiments.benchmarks.streams import NAMES
from experiments.benchmarks.supervised_cells import SUPERVISED
from experiments.config import ConfigError, nearest

REFERENCE = "fresh"  # the method that is the reference of transfer and of fresh_gap
# What a method must beat besides plain.
CONTROLS = {
    "k3": ("k3_rates", "accumulate"),
    "k3_fast": ("plain_fast", "k3"),
    "mixed": ("reservoir",),
}
SYMPTOMS = ("dormant", "erank", "srank", "weight_norm")
NORMALISED = ("AP_final", "AP_any", "ALA", "F")
PAIRED = ("AP_final", "ALA", "F", "online", "auc")
BY_TASK = ("online", "auc", "adapt")  # means over tasks, where a family gives them


class Plan(NamedTuple):
    """Methods on one stream, for so many seeds; `changes` to its family's fields."""

    stream: str
    methods: tuple[str, ...]
    seeds: int
    changes: Mapping[str, Any]


# Who runs the cells of a stream. Other kinds of streams add themselves here and to TIERS.
FAMILIES: dict[str, Family] = {**dict.fromkeys(NAMES, SUPERVISED), STREAM: AGENT}

DEEP = tuple(name for name in METHODS if name != "k2")
SHALLOW = ("plain", "k2", "l2_init", "shrink_perturb", "redo", "cbp", "hare_tortoise", "fresh")
ONE_LAYER = {"hidden": [5], "batch": 1, "lr": 0.01, "redo_every": 500}
AGENTS = (
    "plain", "reservoir", "mixed", "k3", "k3_rates", "accumulate", "plain_fast", "k3_fast", "fresh",
)  # fmt: skip
SHORT = (
    Plan("cl/PermutedDigits-v0", DEEP, 20, {"samples": 3000}),
    Plan("cl/MNIST5k-v0", DEEP, 20, {"samples": 4000, "lr": 0.05}),
    Plan("cl/SlowRegression-v0", SHALLOW, 30, {"tasks": 20, "samples": 2000, **ONE_LAYER}),
)
TIERS = {
    "smoke": (
        Plan("cl/PermutedDigits-v0", DEEP, 5, {"tasks": 4}),
        Plan(  # that it runs from end to end: no claim
            STREAM, ("plain", "k3"), 2,
            {"tasks": 2, "frames": 160, "every": 160, "episodes": 4, "prefill": 128},
        ),
        Plan(
            "cl/SlowRegression-v0", ("plain", "k2", "fresh"), 8,
            {"tasks": 4, "samples": 1000, **ONE_LAYER},
        ),
    ),
    "laptop": (*SHORT, Plan(STREAM, AGENTS, 10, {"frames": 6000})),
    "overnight": (*SHORT, Plan(STREAM, tuple(AGENT_METHODS), 10, {})),
}  # fmt: skip
# What a tier must show, or the command fails: stream, method, metric, more than.
GATES = {
    "smoke": (
        ("cl/PermutedDigits-v0", "plain", "ALA", 0.6),
        ("cl/SlowRegression-v0", "plain", "online", 0.0),  # 0 knows only the mean
    ),
    "laptop": (("cl/PermutedDigits-v0", "plain", "ALA", 0.6), (STREAM, "plain", "ALA", 0.3)),
    "overnight": (("cl/PermutedDigits-v0", "plain", "ALA", 0.6), (STREAM, "plain", "ALA", 0.3)),
}


# ---- what came out -----------------------------------------------------------------------------
def numbers(result: Result, fresh: Result | None) -> dict[str, np.ndarray]:
    """Every metric of a cell by seed (S,); those that need a reference where it was run.

    Signs of plasticity are those after the last task; regret is in tasks' worth of score.
    """
    found = dict(metrics.of_scores(result.scores))
    found |= {name: result.by_task[name].mean(1) for name in BY_TASK if name in result.by_task}
    found |= {name: values[:, -1] for name, values in result.by_task.items() if name in SYMPTOMS}
    if fresh is not None:
        own, ref = result.by_task["auc"], fresh.by_task["auc"]
        for norm in ("ref", "kessler", "none"):
            found[f"forward_transfer/{norm}"] = metrics.forward_transfer(own, ref, norm).value
        found["fresh_gap"] = plasticity.fresh_gap(ref, own).mean(-1)
        best = fresh.by_task["online"].mean(0)
        found["dynamic_regret"] = metrics.dynamic_regret(result.by_task["online"], best)[..., -1]
        if (scores := normalised(result, fresh)) is not None:
            found |= {f"{name}/normalised": metrics.of_scores(scores)[name] for name in NORMALISED}
    return found


def normalised(result: Result, fresh: Result) -> np.ndarray | None:
    """R in units of what a fresh agent learns of each task, or None where it learned nothing."""
    rand = fresh.scores[:, 0].mean(0)
    ref = np.diagonal(fresh.scores[:, 1:].mean(0))
    if (np.abs(ref - rand) < metrics.LEAST).any():
        return None
    return metrics.normalise(result.scores, rand, ref)


def summarise(cells: Sequence[Cell], results: Mapping[str, Result]) -> dict[str, Any]:
    """By stream: each method's metrics and costs, and paired differences, all with intervals."""
    rng = np.random.default_rng(0)
    summary: dict[str, Any] = {}
    for stream in dict.fromkeys(cell.stream for cell in cells):
        found = {cell.method: results[cell.key] for cell in cells if cell.stream == stream}
        seeds = next(cell.seeds for cell in cells if cell.stream == stream)
        by_seed = {name: numbers(result, found.get(REFERENCE)) for name, result in found.items()}
        methods = {}
        for name, result in found.items():
            row = {metric: statistics.bootstrap(values, rng)._asdict()
                   for metric, values in by_seed[name].items()}  # fmt: skip
            final = result.scores[:, -1]
            row["IQM_final"] = statistics.stratified_bootstrap(final, rng)._asdict()
            methods[name] = {"metrics": row, "cost": result.info}
        pairs = {
            f"{one} - {other}": compared(one, other, found, by_seed, rng)
            for one, other in to_compare(list(found))
        }
        summary[stream] = {"seeds": list(seeds), "methods": methods, "pairs": pairs}
    return summary


def to_compare(methods: Sequence[str]) -> list[tuple[str, str]]:
    """Every method with plain, and those that make a claim with their controls."""
    pairs = [(name, "plain") for name in methods if name != "plain" and "plain" in methods]
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
    for metric in PAIRED:
        if metric in by_seed[one] and metric in by_seed[other]:
            difference = statistics.paired_bootstrap(
                by_seed[one][metric], by_seed[other][metric], rng
            )
            row[metric] = difference._asdict()
    final = found[one].scores[:, -1], found[other].scores[:, -1]
    row["P(improvement)"] = statistics.probability_of_improvement(*final, rng)._asdict()
    return row


def failures(tier: str, cells: Iterable[Cell], results: Mapping[str, Result]) -> list[str]:
    """The gates of a tier that its cells do not pass; of those that were run."""
    by_name = {(cell.stream, cell.method): results[cell.key] for cell in cells}
    failed = []
    for stream, method, name, least in GATES.get(tier, ()):
        result = by_name.get((stream, method))
        if result is not None and not (value := numbers(result, None)[name].mean()) > least:
            failed.append(f"{stream} {method}: {name} {value:.3f} is not above {least}")
    return failed


# ---- the command -------------------------------------------------------------------------------
def cells_of(asked: argparse.Namespace) -> list[Cell]:
    """The tier's cells with what the command line changes, all of them able to run."""
    plans = TIERS[asked.tier]
    listed = [plan.stream for plan in plans]
    streams = named(asked.streams, listed, "--streams") or listed
    plans = [plan for plan in plans if plan.stream in streams]
    families = [FAMILIES[plan.stream] for plan in plans]
    methods = named(asked.methods, {name: "" for f in families for name in f.methods}, "--methods")
    fields = {name: default for family in families for name, default in family.fields.items()}
    changes = dict(change(word, fields) for word in asked.changes)
    if asked.seeds is not None and asked.seeds < 1:
        raise ConfigError("--seeds", asked.seeds, "nothing to run", "give 1 or more")
    cells = []
    for plan, family in zip(plans, families, strict=True):
        own = {name: value for name, value in changes.items() if name in family.fields}
        options = {**family.fields, **plan.changes, **own}
        seeds = tuple(range(plan.seeds if asked.seeds is None else asked.seeds))
        kept = [name for name in methods if name in family.methods] if methods else plan.methods
        cells += [Cell(plan.stream, name, seeds, options) for name in kept]
    for cell in cells:
        FAMILIES[cell.stream].check(cell)
    return cells


def change(word: str, fields: Mapping[str, Any]) -> tuple[str, Any]:
    """`field=value` as the field's own type; `a,b` for a list. Raises ConfigError."""
    field, _, text = word.partition("=")
    if field not in fields:
        near = nearest(field, fields)
        way_out = f"did you mean {near}?" if near else f"one of: {', '.join(fields)}"
        raise ConfigError(field, text, "no such field", way_out)
    default = fields[field]
    try:
        if isinstance(default, list):
            return field, [type(default[0])(part) for part in text.split(",")]
        return field, type(default)(text)
    except ValueError:
        kind, example = type(default).__name__, f"for example {field}={default}"
        raise ConfigError(field, text, f"is no {kind}", example) from None


def named(text: str | None, known: Iterable[str], option: str) -> tuple[str, ...]:
    """The names in `a,b`, all of them known; none for none. Raises ConfigError."""
    words = tuple(text.split(",")) if text else ()
    for word in words:
        if word not in (known := list(known)):
            near = nearest(word, known)
            way_out = f"did you mean {near}?" if near else f"one of: {', '.join(known)}"
            raise ConfigError(option, word, "no such name", way_out)
    return words


def parser() -> argparse.ArgumentParser:
    """The command line."""
    lists = [
        f"{what}:\n" + "\n".join(f"  {name:<16}{line}" for name, line in family.methods.items())
        for what, family in (("methods", SUPERVISED), (f"methods on {STREAM}", AGENT))
    ]
    listed = "\n\n".join(lists)
    made = argparse.ArgumentParser(
        prog="nested bench continual",
        description=__doc__,
        epilog=f"{listed}\n\nexample:\n  nested bench continual --tier smoke "
        "--methods plain,k3,k3_rates lr=0.05",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--tier", choices=TIERS, default="smoke", help="how much (default smoke)")
    made.add_argument("--streams", metavar="A,B", help="some of the tier's")
    made.add_argument("--methods", metavar="A,B", help="instead of the tier's")
    made.add_argument("--seeds", type=int, help="instead of the tier's")
    made.add_argument("--out", type=Path, help="folder (default runs/continual/TIER)")
    made.add_argument("--threads", type=int, default=1, help="torch threads (default 1)")
    made.add_argument("--json", action="store_true", help="print the summary as JSON")
    made.add_argument("changes", nargs="*", metavar="field=value", help="tasks, samples, lr, ...")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing, draw, print; 1 where a gate of the tier fails."""
    from experiments.benchmarks.page import draw

    asked = parser().parse_intermixed_args(argv)
    torch.set_num_threads(asked.threads)
    cells = cells_of(asked)
    out = asked.out or Path("runs") / "continual" / asked.tier
    with Board(cells) as board:
        results = run_cells(cells, FAMILIES, out / "cells", board.show)
    summary = summarise(cells, results)
    collect(cells, results, out)
    (out / "summary.json").write_text(json.dumps(summary, indent=2), encoding="utf-8")
    draw(summary, {(cell.stream, cell.method): results[cell.key] for cell in cells}, out)
    print(json.dumps(summary) if asked.json else table(summary))
    print(f"results  {out}", file=sys.stderr)
    failed = failures(asked.tier, cells, results) if not (asked.methods or asked.changes) else []
    for line in failed:
        print(f"gate failed: {line}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
