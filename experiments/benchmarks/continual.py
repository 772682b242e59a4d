"""What is learned, kept and lost: `nested bench continual --tier smoke|laptop|table|...`.

Streams of tasks, methods and controls, several seeds: R after every task, forgetting, transfer,
plasticity and cost, with intervals; comparisons are paired by seed. A suite that is killed goes on
where it was, a repeated command only draws anew, and several processes (--jobs) share its cells. In
OUT: results.csv in long format, R.npz, summary.json, and a page for each stream.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from experiments.benchmarks.cells import Cell, Family, Result, collect, run_cells, there
from experiments.benchmarks.names import names_in
from experiments.benchmarks.results import page_of, put
from experiments.benchmarks.sharing import workers
from experiments.benchmarks.tasks import agent_cells, agent_free
from experiments.benchmarks.tasks.agent_methods import AGENT_METHODS
from experiments.benchmarks.tasks.agent_streams import STREAMS
from experiments.benchmarks.tasks.agent_units import FRESH, RANDOM, in_units
from experiments.benchmarks.tasks.baselines import METHODS
from experiments.benchmarks.tasks.board import Board, table
from experiments.benchmarks.tasks.streams import NAMES
from experiments.benchmarks.tasks.summary import Gate, failures, summarise
from experiments.benchmarks.tasks.supervised_cells import SUPERVISED
from experiments.config import ConfigError, nearest


class Plan(NamedTuple):
    """Methods on one stream, for so many seeds; `changes` to its family's fields."""

    stream: str
    methods: tuple[str, ...]
    seeds: int
    changes: Mapping[str, Any]


class Tier(NamedTuple):
    """What is run, what it must show or the command fails, and what it is for."""

    line: str
    plans: tuple[Plan, ...]
    gates: tuple[Gate, ...] = ()


# Who runs the cells of a stream. Other kinds of streams add themselves here and to TIERS.
FAMILIES: dict[str, Family] = {
    **dict.fromkeys(NAMES, SUPERVISED),
    **{
        name: (agent_cells if stream.change == "tasks" else agent_free).family(stream)
        for name, stream in STREAMS.items()
    },
}

DIGITS, SLOW = "cl/PermutedDigits-v0", "cl/SlowRegression-v0"
STREAM, FREE = "cl/CartPoleShift-v0", "cl/CartPoleFree-v0"
DEEP = tuple(name for name in METHODS if name != "k2")
SHALLOW = ("plain", "k2", "l2_init", "shrink_perturb", "redo", "cbp", "hare_tortoise", "fresh")
ONE_LAYER = {"hidden": [5], "batch": 1, "lr": 0.01, "redo_every": 500}
SHORT = {
    "frames": 4000, "every": 400, "prefill": 512, "ratio": 32.0, "replay": "mixed",
}  # fmt: skip
SUPERVISED_PLANS = (
    Plan(DIGITS, DEEP, 20, {"samples": 3000}),
    Plan("cl/MNIST5k-v0", DEEP, 20, {"samples": 4000, "lr": 0.05}),
    Plan(SLOW, SHALLOW, 30, {"tasks": 20, "samples": 2000, **ONE_LAYER}),
)
SCHEDULED = ("plain", "k3", "k3_rates", "k5", "k5_rates", "accumulate")
TABLE = (
    "fifo", "reservoir", "plain", "k3", "k3_rates", "accumulate", "k5", "k5_rates", "plain_fast",
    "k3_fast", "k5_fast",
)  # fmt: skip
LEARNS = (DIGITS, "plain", "ALA", 0.6)
KNOWN = (LEARNS, (DIGITS, "ewc - plain", "-F", 0.0), (DIGITS, "reservoir - plain", "-F", 0.0))
TIERS = {
    "smoke": Tier(
        "seconds: what CI runs",
        (
            Plan(DIGITS, DEEP, 5, {"tasks": 4}),
            Plan(  # that it runs from end to end: no claim
                STREAM, ("plain", "k3"), 2,
                {"tasks": 2, "frames": 160, "every": 160, "episodes": 4, "prefill": 128},
            ),
            Plan(SLOW, ("plain", "k2", "fresh"), 8, {"tasks": 4, "samples": 1000, **ONE_LAYER}),
        ),
        (LEARNS, (SLOW, "plain", "online", 0.0)),  # 0 knows only the mean
    ),
    "plasticity": Tier(
        "minutes: long streams of digits under AdamW, where plain learners go stale",
        (
            Plan(
                DIGITS,
                ("plain", "l2_init", "redo", "cbp", "hare_tortoise", "hare_rates", "accumulate",
                 "fresh"), 20,
                {"tasks": 20, "rule": "adamw", "lr": 3e-3, "l2_init": 1.0, "evaluations": 2},
            ),
        ),
        ((DIGITS, "l2_init - plain", "online", 0.0),),
    ),
    "laptop": Tier(
        "twenty minutes on two cores: every supervised baseline, and kinds of replay",
        (
            *SUPERVISED_PLANS,
            Plan(STREAM, ("plain", "fifo", "reservoir"), 10, {"tasks": 2, **SHORT}),
        ),
        (*KNOWN, (STREAM, "fifo", "ALA", 0.3), (STREAM, "reservoir - fifo", "-F", 0.0)),
    ),
    "table": Tier(
        "the table of k = 1, 3, 5 with and without fast memories, with both controls",
        (Plan(STREAM, TABLE, 10, {**SHORT, "again": "flipped"}),),
        ((STREAM, "fifo", "ALA", 0.3), (STREAM, "reservoir - fifo", "-F", 0.0)),
    ),
    "overnight": Tier(
        "everything, with phases of 10,000 frames",
        (*SUPERVISED_PLANS, Plan(STREAM, tuple(AGENT_METHODS), 10, {"again": "flipped"})),
        (*KNOWN, (STREAM, "fifo", "ALA", 0.3)),
    ),
    "free": Tier(
        "contexts that change unannounced: CartPole on two cores, only what is lived counts",
        (Plan(FREE, ("fifo", "reservoir", *SCHEDULED, "fresh"), 10, {"replay": "mixed"}),),
    ),
    "published": Tier(
        "protocols of the literature at full size, plain with their reservoir: a GPU, for days",
        tuple(
            Plan(name, ("fifo", "mixed", *SCHEDULED, *(["fresh"] * bool(stream.contexts))), 10, {})
            for name, stream in STREAMS.items()
            if "size" in stream.fields
        ),
    ),
}  # fmt: skip


# ---- the command -------------------------------------------------------------------------------
def cells_of(asked: argparse.Namespace) -> list[Cell]:
    """The tier's cells with what the command line changes, all of them able to run."""
    plans = TIERS[asked.tier].plans
    listed = [plan.stream for plan in plans]
    streams = names_in(asked.streams, listed, "--streams", "stream") or listed
    plans = [plan for plan in plans if plan.stream in streams]
    families = [FAMILIES[plan.stream] for plan in plans]
    known = dict.fromkeys(name for family in families for name in family.methods)
    methods = names_in(asked.methods, known, "--methods", "method")
    fields = {name: default for family in families for name, default in family.fields.items()}
    changes = dict(change(word, fields) for word in asked.changes)
    if asked.seeds is not None and asked.seeds < 1:
        raise ConfigError("--seeds", asked.seeds, "nothing to run", "give 1 or more")
    cells = []
    for plan, family in zip(plans, families, strict=True):
        own = {name: value for name, value in changes.items() if name in family.fields}
        seeds = tuple(range(plan.seeds if asked.seeds is None else asked.seeds))
        kept = [name for name in methods if name in family.methods] if methods else plan.methods
        if FRESH in kept and RANDOM in family.methods:  # scores lie between the two
            kept = dict.fromkeys([RANDOM, *kept])
        changed = {**plan.changes, **own}
        cells += [Cell(plan.stream, k, seeds, family.options(k, changed)) for k in kept]
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


def parser() -> argparse.ArgumentParser:
    """The command line."""
    lists = [
        f"{what}:\n" + "\n".join(f"  {name:<22}{line}" for name, line in lines.items())
        for what, lines in (
            ("tiers", {name: tier.line for name, tier in TIERS.items()}),
            ("methods", SUPERVISED.methods),
            ("methods of agents", {name: method.line for name, method in AGENT_METHODS.items()}),
            ("streams of agents", {name: stream.line for name, stream in STREAMS.items()}),
        )
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
    made.add_argument("--jobs", type=int, default=1, help="processes that share the cells")
    made.add_argument("--threads", type=int, default=1, help="torch threads of each (default 1)")
    made.add_argument("--found", action="store_true", help="run nothing: what is there so far")
    made.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    made.add_argument("--json", action="store_true", help="print the summary as JSON")
    made.add_argument("--results", type=Path, metavar="FILE.md", help="put the tables in this page")
    made.add_argument(
        "--mlflow", metavar="URI", help="send it there, for example sqlite:///mlflow.db"
    )
    made.add_argument("changes", nargs="*", metavar="field=value", help="tasks, samples, lr, ...")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing, draw, print; 1 where a gate of the tier fails."""
    asked = parser().parse_intermixed_args(argv)
    torch.set_num_threads(asked.threads)
    plan = cells_of(asked)
    out = asked.out or Path("runs") / "continual" / asked.tier
    if asked.worker:
        run_cells(plan, FAMILIES, out / "cells")
        return 0
    if asked.found:
        results = there(plan, out / "cells")
    else:
        words = sys.argv[1:] if argv is None else argv
        beside = workers("experiments.benchmarks.continual", words, asked.jobs - 1)
        with beside, Board(plan) as board:
            results = run_cells(plan, FAMILIES, out / "cells", board.show)
    cells = [cell for cell in plan if cell.key in results]
    results = in_units(cells, results)
    if not cells:
        print(f"none of {len(plan)} cells is in {out / 'cells'}", file=sys.stderr)
        return 1
    return report(asked, plan, cells, results, out)


def report(
    asked: argparse.Namespace,
    plan: Sequence[Cell],
    cells: Sequence[Cell],
    results: Mapping[str, Result],
    out: Path,
) -> int:
    """Write, draw and print what the cells say; the exit status."""
    from experiments.benchmarks.tasks.page import draw

    summary = summarise(cells, results)
    collect(cells, results, out)
    (out / "summary.json").write_text(json.dumps(summary, indent=2), encoding="utf-8")
    draw(summary, {(cell.stream, cell.method): results[cell.key] for cell in cells}, out)
    print(json.dumps(summary) if asked.json else table(summary))
    print(f"results  {out}", file=sys.stderr)
    missing = [cell for cell in plan if cell.key not in results]
    for cell in missing:
        print(f"missing  {cell.stream} {cell.method}", file=sys.stderr)
    if asked.results:
        put(asked.results, asked.tier, page_of(command_of(asked), plan, results, summary))
    if asked.mlflow:
        suite = {"tier": asked.tier, "cells": [cell.key for cell in cells],
                 "missing": [f"{cell.stream} {cell.method}" for cell in missing]}  # fmt: skip
        (out / "suite.json").write_text(json.dumps(suite, indent=2), encoding="utf-8")
        module = "experiments.benchmarks.tasks.tracked"
        command = [sys.executable, "-m", module, str(out), asked.mlflow]
        print(f"mlflow   {subprocess.check_output(command, text=True).strip()}", file=sys.stderr)
    own = asked.methods or asked.changes or asked.seeds
    failed = [] if own else failures(TIERS[asked.tier].gates, summary)
    for line in failed:
        print(f"gate failed: {line}", file=sys.stderr)
    return 1 if failed else 0


def command_of(asked: argparse.Namespace) -> str:
    """The command that gives these results again."""
    words = [f"nested bench continual --tier {asked.tier}"]
    for option in ("streams", "methods", "seeds"):
        if (value := getattr(asked, option)) is not None:
            words.append(f"--{option} {value}")
    return " ".join([*words, *asked.changes, f"--jobs 2 --results {asked.results}"])


if __name__ == "__main__":
    sys.exit(main())
