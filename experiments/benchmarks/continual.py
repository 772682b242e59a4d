"""What is learned, kept and lost: `nested bench continual --tier smoke|laptop`.

Streams of tasks, methods and controls, several seeds: R after every task, forgetting, transfer,
plasticity and cost, with intervals; comparisons are paired by seed. A suite that is killed goes on
where it was, and a repeated command only draws anew. Results: OUT/results.csv in long format,
R.npz, summary.json and the page continual.png.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from experiments.benchmarks import metrics, plasticity, statistics, supervised
from experiments.benchmarks.baselines import METHODS, RULES
from experiments.benchmarks.board import Board, table
from experiments.benchmarks.cells import Cell, Result, Run, Tell, collect, run_cells
from experiments.benchmarks.streams import NAMES, check_stream, make_stream
from experiments.config import ConfigError, nearest

REFERENCE = "fresh"  # the method that is the reference of transfer and of fresh_gap
CONTROLS = {"k3": ("k3_rates", "accumulate")}  # what it must beat besides plain
SYMPTOMS = ("dormant", "erank", "srank", "weight_norm")
NORMALISED = ("AP_final", "AP_any", "ALA", "F")
PAIRED = ("AP_final", "ALA", "F", "online", "auc")


class Plan(NamedTuple):
    """Methods on one stream: how many tasks, rows a task and seeds, and the settings changed."""

    stream: str
    methods: tuple[str, ...]
    tasks: int
    samples: int
    seeds: int
    settings: Mapping[str, Any]


DEEP = tuple(name for name in METHODS if name != "k2")
SHALLOW = ("plain", "k2", "l2_init", "shrink_perturb", "redo", "cbp", "hare_tortoise", "fresh")
ONE_LAYER = {"hidden": (5,), "batch": 1, "lr": 0.01, "redo_every": 500}
TIERS = {
    "smoke": (
        Plan("cl/PermutedDigits-v0", DEEP, 4, 1500, 5, {}),
        Plan("cl/SlowRegression-v0", ("plain", "k2", "fresh"), 4, 1000, 8, ONE_LAYER),
    ),
    "laptop": (
        Plan("cl/PermutedDigits-v0", DEEP, 10, 3000, 20, {}),
        Plan("cl/MNIST5k-v0", DEEP, 10, 4000, 20, {"lr": 0.05}),
        Plan("cl/SlowRegression-v0", SHALLOW, 20, 2000, 30, ONE_LAYER),
    ),
}
# What a tier must show, or the command fails: stream, method, metric, more than.
GATES = {
    "smoke": (
        ("cl/PermutedDigits-v0", "plain", "ALA", 0.6),
        ("cl/SlowRegression-v0", "plain", "online", 0.0),  # 0 knows only the mean
    ),
    "laptop": (("cl/PermutedDigits-v0", "plain", "ALA", 0.6),),
}


# ---- cells of supervised streams ---------------------------------------------------------------
def cell_of(plan: Plan, method: str) -> Cell:
    """The cell of one method of a plan."""
    settings = supervised.Settings()._replace(**plan.settings)._asdict()
    options = {"tasks": plan.tasks, "samples": plan.samples, **settings}
    options["hidden"] = list(options["hidden"])
    return Cell(plan.stream, method, tuple(range(plan.seeds)), options)


def run_supervised(cell: Cell, tell: Tell) -> Result:
    """Learn a supervised stream with all seeds of the cell in one program."""
    options = dict(cell.options)
    tasks, samples = options.pop("tasks"), options.pop("samples")
    settings = supervised.Settings(**{**options, "hidden": tuple(options["hidden"])})
    method = METHODS[cell.method]
    stream = make_stream(cell.stream, cell.seeds, tasks, samples, method.oracle)
    learned = supervised.learn(stream, method, settings, tell)
    by_task = {
        "online": learned.online.mean(-1),
        "auc": metrics.auc(learned.times, learned.curves),
        **{name: values.astype(np.float64) for name, values in learned.symptoms.items()},
    }
    interactions = len(cell.seeds) * tasks * samples
    info = {
        "core_seconds": learned.seconds,
        "core_us_per_interaction": 1e6 * learned.seconds / interactions,
        "flops_per_interaction": supervised.flops(stream, method, settings),
        "levels": learned.levels,
    }
    arrays = {"curves": learned.curves, "times": learned.times, "online": learned.online}
    return Result(learned.scores, by_task, arrays, info)


FAMILIES: dict[str, Run] = dict.fromkeys(NAMES, run_supervised)  # who runs the cells of a stream


def run_cell(cell: Cell, tell: Tell) -> Result:
    """Run a cell of any stream."""
    return FAMILIES[cell.stream](cell, tell)


# ---- what came out -----------------------------------------------------------------------------
def numbers(result: Result, fresh: Result | None) -> dict[str, np.ndarray]:
    """Every metric of a cell by seed (S,); those that need a reference where it was run.

    Signs of plasticity are those after the last task; regret is in tasks' worth of score.
    """
    found = dict(metrics.of_scores(result.scores))
    found |= {name: result.by_task[name].mean(1) for name in ("online", "auc")}
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
def plans_of(asked: argparse.Namespace) -> list[Plan]:
    """The tier's plans with what the command line changes. Raises ConfigError."""
    changes = dict(_change(word) for word in asked.changes)
    listed = [plan.stream for plan in TIERS[asked.tier]]
    streams = named(asked.streams, listed, "--streams") or listed
    methods = named(asked.methods, METHODS, "--methods")
    if asked.seeds is not None and asked.seeds < 1:
        raise ConfigError("--seeds", asked.seeds, "nothing to run", "give 1 or more")
    plans = []
    for plan in TIERS[asked.tier]:
        if plan.stream not in streams:
            continue
        if methods:
            plan = plan._replace(methods=methods)
        if asked.seeds is not None:
            plan = plan._replace(seeds=asked.seeds)
        own = {name: changes[name] for name in ("tasks", "samples") if name in changes}
        rest = {name: value for name, value in changes.items() if name not in own}
        plan = plan._replace(settings={**plan.settings, **rest}, **own)
        _check(plan)
        plans.append(plan)
    return plans


def _check(plan: Plan) -> None:
    check_stream(plan.stream)
    settings = supervised.Settings()._replace(**plan.settings)
    if settings.rule not in RULES:
        raise ConfigError("rule", settings.rule, "no such rule", f"one of: {', '.join(RULES)}")
    for name in plan.methods:
        if name in ("k2", "k3", "k3_rates", "k5") and len(settings.hidden) + 1 < int(name[1]):
            raise ConfigError(
                "--methods", name, f"{plan.stream} is learned by {len(settings.hidden) + 1} layers",
                "name other --streams, or a k that the layers fill",
            )  # fmt: skip
    if plan.samples < settings.batch * settings.evaluations or plan.tasks < 2:
        raise ConfigError(
            "samples", plan.samples, "too few to evaluate as a task is learned, or one task only",
            f"at least 2 tasks, and {settings.batch * settings.evaluations} samples of each",
        )  # fmt: skip


def _change(word: str) -> tuple[str, Any]:
    """`field=value` as the field's own type."""
    field, _, text = word.partition("=")
    fields: dict[str, Any] = {"tasks": 1, "samples": 1, **supervised.Settings()._asdict()}
    if field not in fields:
        near = nearest(field, fields)
        raise ConfigError(
            field,
            text,
            "no such field",
            f"did you mean {near}?" if near else f"one of: {', '.join(fields)}",
        )
    try:
        if field == "hidden":
            return field, tuple(int(part) for part in text.split(","))
        return field, type(fields[field])(text)
    except ValueError:
        kind = type(fields[field]).__name__
        raise ConfigError(
            field, text, f"is no {kind}", f"for example {field}={fields[field]}"
        ) from None


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
    listed = "\n".join(f"  {name:<16}{method.line}" for name, method in METHODS.items())
    made = argparse.ArgumentParser(
        prog="nested bench continual",
        description=__doc__,
        epilog=f"methods:\n{listed}\n\nexample:\n  nested bench continual --tier smoke "
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
    cells = [cell_of(plan, method) for plan in plans_of(asked) for method in plan.methods]
    out = asked.out or Path("runs") / "continual" / asked.tier
    with Board(cells) as board:
        results = run_cells(cells, run_cell, out / "cells", board.show)
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
