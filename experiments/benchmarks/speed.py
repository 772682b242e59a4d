"""How fast is it? `nested bench speed`: whole updates, against the machine's limit and its peers.

The reference workload is DreamerV3 on 64x64x3 images with six actions, 16 sequences of 64 rows, 15
steps imagined from every row. Every row of the table is a process of its own that makes whole
updates as training does: replay, transfer, losses, backward, tick. A peer that is installed in
another python makes its updates in turn with ours, so that the machine's mood falls on both alike.
FLOPs are counted; `limit` is how many times longer an update takes than its matrix products and
convolutions would at the peak that the same machine reaches in the same run.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.benchmarks.statistics import bootstrap
from experiments.benchmarks.timing.reference import Spec, configured
from experiments.benchmarks.timing.worker import Worker, WorkerError
from experiments.config import ConfigError

PEERS = Path(__file__).parent / "timing" / "peers"
SECTIONS = ("update", "policy", "small", "seeds", "levels")
CYCLE = 16  # updates in a round of `levels`: the longest period
SCHEDULES = ("plain", "k1", "k3", "k5")
DTYPES = ("float32", "bfloat16")
ENCODERS = ("faithful", "strided")


class Asked(NamedTuple):
    """How it is measured, and on what."""

    threads: int
    rounds: int
    steps: int
    warmup: int
    device: str
    profile: bool
    peers: tuple[str, ...]  # pythons
    overrides: tuple[str, ...]

    def spec(self, **fields: Any) -> Spec:
        """A specification with what all rows share."""
        shared = {"threads": self.threads, "device": self.device, "overrides": self.overrides}
        return Spec(**{**shared, **fields})


Row = dict[str, Any]


# ---- measuring ---------------------------------------------------------------------------------
def open_worker(spec: Spec) -> Worker:
    """A process of ours that measures what `spec` says. Raises ConfigError for what can not run."""
    configured(spec)
    module = "experiments.benchmarks.timing.workload"
    command = [sys.executable, "-m", module, spec.dump()]
    return Worker(f"{spec.kind} {spec.size} {spec.dtype}", command, spec.threads)


def open_peer(python: str, spec: Spec) -> Worker:
    """A peer's process; -I keeps our packages, and the script's own name, out of its way."""
    command = [python, "-I", str(PEERS / "sheeprl.py"), spec.dump()]
    return Worker(f"peer {python}", command, spec.threads)


def rounds_of(workers: Sequence[Worker], asked: Asked) -> tuple[np.ndarray, list[Row]]:
    """Seconds (workers, clocks, rounds, steps) of steps made in turn, and each one's peak memory.

    Two clocks: the wall's, and the processors' time that the process used.
    """
    for worker in workers:
        worker.ask("time", asked.warmup)
    answers = [[worker.ask("time", asked.steps) for worker in workers] for _ in range(asked.rounds)]
    clocks = ("seconds", "cpu_seconds")
    seconds = np.array([[[row[w][c] for row in answers] for c in clocks]
                        for w in range(len(workers))])  # fmt: skip
    return seconds, [{k: v for k, v in row.items() if k not in clocks} for row in answers[-1]]


def median(values: np.ndarray) -> np.ndarray:
    """Median over the last axis."""
    return np.median(values, -1)


def timing(seconds: np.ndarray) -> Row:
    """Median seconds (clocks, rounds, steps) with a 95 % interval over rounds.

    Also of the fastest round: what others do to the machine's time shows between the two.
    """
    wall, cpu = seconds
    found = bootstrap(median(wall), np.random.default_rng(0), median)
    row: Row = {"step_s": float(np.median(wall)), "step_s_95": [found.low, found.high]}
    return row | {"fastest_s": float(median(wall).min()), "cpu_s": float(np.median(cpu))}


def update_row(
    who: str, spec: Spec, worker: Worker, seconds: np.ndarray, peak: Row, machine: Mapping[str, Any]
) -> Row:
    """A row of whole updates: times, work, and the distance to the limit."""
    hello, gflop = worker.hello(), worker.ask("flops")["gflop"]
    row: Row = {"what": spec.kind, "who": who, "size": spec.size, "dtype": spec.dtype}
    row |= {"encoder": spec.encoder, "schedule": spec.schedule, "threads": spec.threads}
    row |= {"device": spec.device, "params": hello["params"]}
    row |= {"batch": hello["batch"], "length": hello["length"], **timing(seconds)}
    row["frames_per_s"] = hello["batch"] * hello["length"] / row["step_s"]
    row |= {"gflop": gflop, **machine}
    row["limit_ratio"] = row["step_s"] * machine["matmul_gflops"] / gflop
    return row | peak | {"rounds": seconds.shape[1], "overrides": list(spec.overrides)}


def ratio_row(ours: Row, peer: Row, seconds: np.ndarray) -> Row:
    """How many times longer the peer takes: the median over paired rounds with its interval."""
    (ours_s, ours_cpu), (peer_s, peer_cpu) = median(seconds)
    found = bootstrap(peer_s / ours_s, np.random.default_rng(0), median)
    shared = {key: ours[key] for key in ("size", "dtype", "threads", "device", "overrides")}
    return {
        "what": "ratio", "who": ours["who"], "peer": peer["who"], **shared,
        "ratio": found.value, "ratio_95": [found.low, found.high],
        "cpu_ratio": float(np.median(peer_cpu / ours_cpu)), "rounds": len(ours_s),
    }  # fmt: skip


def updates(spec: Spec, asked: Asked, machine: Mapping[str, Any]) -> Iterator[Row]:
    """Our row; where there are peers, theirs and the ratios; the profile if it is asked for."""
    with ExitStack() as stack:
        ours = stack.enter_context(open_worker(spec))
        peers = [stack.enter_context(open_peer(python, spec)) for python in asked.peers]
        peers = [peer for peer in peers if runs(peer)]
        seconds, peaks = rounds_of([ours, *peers], asked)
        row = update_row("nested", spec, ours, seconds[0], peaks[0], machine)
        yield row
        for i, peer in enumerate(peers, 1):
            who = peer.hello()["who"]
            theirs = update_row(who, spec, peer, seconds[i], peaks[i], machine)
            yield theirs
            yield ratio_row(row, theirs, seconds[[0, i]])
        if asked.profile:
            parts = ours.ask("parts", asked.steps * asked.rounds)
            named = {key: row[key] for key in ("who", "size", "dtype", "encoder", "threads")}
            operators = ours.ask("operators", 12)["operators"]
            yield {"what": "profile", **named, **parts, "operators": operators}


def runs(peer: Worker) -> bool:
    """Whether a peer is ready; one that is not is told and left out."""
    try:
        peer.hello()
    except WorkerError as error:
        tell(f"left out: {error}")
        return False
    return True


def policies(asked: Asked) -> Iterator[Row]:
    """Environment steps per second of acting alone: both encoders, 1 and 16 slots."""
    calls = asked._replace(steps=20 * asked.steps, warmup=5 * asked.warmup)
    for threads in sorted({1, asked.threads}):
        for encoder in ENCODERS:
            for batch in (1, 16):
                spec = asked.spec(kind="policy", encoder=encoder, batch=batch)
                spec = spec._replace(threads=threads)
                with open_worker(spec) as worker:
                    seconds, peaks = rounds_of([worker], calls)
                row: Row = {"what": "policy", "who": "nested", "size": spec.size}
                row |= {"encoder": encoder, "batch": batch, "threads": threads}
                row |= {"device": spec.device, **timing(seconds[0])}
                yield row | {"steps_per_s": batch / row["step_s"], **peaks[0]}


def side_by_side(count: int, asked: Asked) -> Iterator[Row]:
    """So many small agents learning together, divided over processes of one thread each.

    What each of them costs: an update of the slowest process over the number of agents.
    """
    sizes = [len(part) for part in np.array_split(range(count), min(asked.threads, count))]
    specs = [asked.spec(kind="seeds", size="tiny", batch=n)._replace(threads=1) for n in sizes]
    with ExitStack() as stack:
        workers = [stack.enter_context(open_worker(spec)) for spec in specs]
        pool = stack.enter_context(ThreadPoolExecutor(len(workers)))

        def all_at_once(steps: int) -> list[Row]:
            return list(pool.map(lambda worker: worker.ask("time", steps), workers))

        params = workers[0].hello()["params"]
        all_at_once(asked.warmup)
        rounds = [all_at_once(asked.steps) for _ in range(asked.rounds)]
    seconds = [max(np.median(row["seconds"]) for row in round_) / count for round_ in rounds]
    found = bootstrap(np.array(seconds), np.random.default_rng(0), median)
    yield {
        "what": "seeds", "who": "nested", "seeds": count, "processes": len(sizes),
        "params": params, "device": asked.device, "step_s": found.value,
        "step_s_95": [found.low, found.high], "fastest_s": min(seconds),
        "rss_mb": sum(row["rss_mb"] for row in rounds[-1]), "rounds": asked.rounds,
    }  # fmt: skip


def ladder(size: str, asked: Asked) -> Iterator[Row]:
    """The whole step on k levels beside one optimizer on everything, in one process."""
    spec = asked.spec(kind="levels", size=size)
    if size == "small":
        spec = spec._replace(threads=1)
    with open_worker(spec) as worker:
        worker.ask("round", CYCLE)
        found = [worker.ask("round", CYCLE)["seconds"] for _ in range(asked.rounds)]
    for name in found[0]:
        seconds = np.array([row[name] for row in found]) / CYCLE
        ratios = np.array([row[name] / row["plain"] for row in found])
        interval = bootstrap(ratios, np.random.default_rng(0), median)
        yield {
            "what": "levels", "who": "nested", "size": size, "schedule": name,
            "threads": spec.threads, "device": spec.device, "step_s": float(np.median(seconds)),
            "ratio": interval.value, "ratio_95": [interval.low, interval.high],
            "rounds": asked.rounds,
        }  # fmt: skip


class Machine:
    """The machine's peaks, measured once for each dtype and number of threads."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, int], Row] = {}

    def of(self, spec: Spec) -> Row:
        """matmul_gflops and memcpy_gb_s."""
        key = (spec.dtype, spec.threads)
        if key not in self._known:
            with open_worker(spec._replace(kind="machine")) as worker:
                self._known[key] = worker.hello()
        return self._known[key]


def measure(asked: Asked, words: argparse.Namespace) -> Iterator[Row]:
    """Every row that the command line asks for, as soon as it is known."""
    chosen = [name for name in SECTIONS if getattr(words, name)] or ["update"]
    machine = Machine()
    for size in words.sizes if "update" in chosen else ():
        for dtype in words.dtypes:
            for encoder in words.encoders:
                for schedule in words.schedules:
                    fields = {"size": size, "dtype": dtype, "encoder": encoder}
                    spec = asked.spec(**fields, schedule=schedule)
                    tell(f"{size} {dtype} {encoder} {schedule} ...")
                    same = encoder == "faithful" and schedule == words.schedules[0]
                    peers = asked.peers if same else ()  # they know neither of the others
                    yield from updates(spec, asked._replace(peers=peers), machine.of(spec))
    if "policy" in chosen:
        tell("policy ...")
        yield from policies(asked)
    if "small" in chosen:
        tell("small ...")
        spec = asked.spec(kind="small", size="tiny")._replace(threads=1)
        yield from updates(spec, asked._replace(peers=()), machine.of(spec))
    if "seeds" in chosen:
        tell(f"{words.seeds} seeds ...")
        yield from side_by_side(words.seeds, asked)
    if "levels" in chosen:
        tell(f"levels of {words.levels} ...")
        yield from ladder(words.levels, asked)


# ---- showing -----------------------------------------------------------------------------------
def tell(text: str) -> None:
    """Progress, on standard error: standard output holds results alone."""
    print(text, file=sys.stderr, flush=True)


TABLES = {
    "update": ("whole updates", "who size dtype encoder schedule threads step_s step_s_95 cpu_s "
               "frames_per_s gflop matmul_gflops limit_ratio rss_mb"),
    "ratio": ("paired with peers: their time / ours",
              "peer size dtype threads ratio ratio_95 cpu_ratio"),
    "small": ("the scale of CartPole",
              "who params threads step_s step_s_95 fastest_s gflop limit_ratio"),
    "seeds": ("as many of them side by side; the time of each",
              "who params seeds processes step_s step_s_95 fastest_s rss_mb"),
    "policy": ("acting", "who size encoder batch threads step_s fastest_s steps_per_s"),
    "levels": ("whole step on k levels / one optimizer on everything",
               "size schedule threads step_s ratio ratio_95"),
}  # fmt: skip


def show(rows: Sequence[Row]) -> None:
    """A table for each kind of row."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    tables = [(title, columns.split(), [row for row in rows if row["what"] == what])
              for what, (title, columns) in TABLES.items()]  # fmt: skip
    tables += [part for row in rows if row["what"] == "profile" for part in profile_tables(row)]
    for title, columns, found in tables:
        if not found:
            continue
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for column in columns:
            words = isinstance(found[0][column], str)
            table.add_column(column, justify="left" if words else "right")
        for row in found:
            table.add_row(*(cell(row[column]) for column in columns))
        console.print(table)


def profile_tables(row: Row) -> list[tuple[str, list[str], list[Row]]]:
    """A profile's parts and operators, as tables."""
    name = " ".join(str(row[key]) for key in ("size", "dtype", "encoder"))
    total = sum(row["parts_s"].values())
    parts = [
        {"part": part, "seconds": seconds, "share": f"{seconds / total:.1%}", "cpu": cpu}
        for (part, seconds), cpu in zip(
            row["parts_s"].items(), row["parts_cpu_s"].values(), strict=True
        )
    ]
    operators = [
        {"operator": operator, "calls": calls, "seconds": seconds}
        for operator, calls, seconds in row["operators"]
    ]
    return [
        (f"where the time goes: {name}", ["part", "seconds", "share", "cpu"], parts),
        (f"operators: {name}", ["operator", "calls", "seconds"], operators),
    ]


def cell(value: Any) -> str:
    """A value of a table: three significant digits, and intervals as `low .. high`."""
    if isinstance(value, list):
        return " .. ".join(cell(end) for end in value)
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


# ---- command line ------------------------------------------------------------------------------
def listed(known: Sequence[str] = ()):
    """A comma-separated list, of known words if any are given."""

    def parse(text: str) -> list[str]:
        words = [word for word in text.split(",") if word]
        for word in words:
            if known and word not in known:
                raise argparse.ArgumentTypeError(f"{word!r} is none of {', '.join(known)}")
        return words

    return parse


def arguments() -> argparse.ArgumentParser:
    """The parser; without a section it measures updates."""
    parser = argparse.ArgumentParser(
        prog="nested bench speed",
        description=__doc__,
        epilog="example:\n  nested bench speed --sizes 1m --profile --peer-python venv/bin/python",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--update", action="store_true", help="reference updates (without a section: these)")
    add("--policy", action="store_true", help="environment steps per second of acting alone")
    add("--small", action="store_true", help="an update at the scale of CartPole, one thread")
    add(
        "--seeds",
        nargs="?",
        const=8,
        type=int,
        metavar="N",
        help="N agents of that scale together (default 8), divided over --threads processes",
    )
    add(
        "--levels",
        nargs="?",
        const="small",
        metavar="SIZE",
        help="whole steps on k levels, at `small` or a size",
    )
    add("--sizes", type=listed(), default="1m,12m", help="rows of the table of sizes")
    add("--dtypes", type=listed(DTYPES), default="float32,bfloat16")
    add("--encoders", type=listed(ENCODERS), default="faithful,strided")
    add("--schedules", type=listed(SCHEDULES), default="plain", help="plain,k1,k3,k5")
    threads = len(os.sched_getaffinity(0))
    add("--threads", type=int, default=threads, help=f"torch threads (default {threads})")
    add("--device", default="cpu", choices=("cpu", "cuda"))
    add("--rounds", type=int, default=5, help="rounds in which rows take turns (default 5)")
    add("--steps", type=int, default=1, help="updates in a round (default 1)")
    add("--warmup", type=int, default=2, help="updates before the first round (default 2)")
    add("--profile", action="store_true", help="also the time of each part of an update")
    add(
        "--peer-python",
        action="append",
        default=[],
        metavar="PYTHON",
        help="a python that has sheeprl; may be repeated",
    )
    add("--json", action="store_true", help="one JSON object a line instead of tables")
    add("overrides", nargs="*", metavar="field=value", help="changes of the configuration")
    return parser


def checked(words: argparse.Namespace) -> Asked:
    """What was asked. Raises ConfigError."""
    for name in ("threads", "rounds", "steps", "warmup", "seeds"):
        count = getattr(words, name)
        if count is not None and count < 1:
            raise ConfigError(f"--{name}", count, "is too few", "give 1 or more")
    for python in words.peer_python:
        if not os.access(python, os.X_OK):
            raise ConfigError("--peer-python", python, "is no program", "give a venv's bin/python")
    counts = (words.threads, words.rounds, words.steps, words.warmup)
    peers, overrides = tuple(words.peer_python), tuple(words.overrides)
    return Asked(*counts, words.device, words.profile, peers, overrides)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, measure, print."""
    words = arguments().parse_intermixed_args(argv)
    asked, rows, code = checked(words), list[Row](), 0
    try:
        for row in measure(asked, words):
            rows.append(row)
            if words.json:
                print(json.dumps(row), flush=True)
    except WorkerError as error:
        tell(f"error: {error}")
        code = 1
    if not words.json:
        show(rows)
    return code


if __name__ == "__main__":
    sys.exit(main())
