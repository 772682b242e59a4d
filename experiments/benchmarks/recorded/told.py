"""`nested bench offline` in numbers: who returns what, what imagination adds, what it promises.

Of learned policies an interval is over phase-2 seeds, whose values are means over their episodes;
of demonstrations, expert and random actions it is over episodes. Differences are paired by seed.
The verdict is read from the interval of imagination minus imitation and from nothing else.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.benchmarks.recorded.play import LEARNED, Outcome, Returns
from experiments.benchmarks.results import section, tabled
from experiments.benchmarks.statistics import (
    RESAMPLES,
    Interval,
    bootstrap,
    paired_bootstrap,
    shown,
)

FEW, ENOUGH = 3, 10  # seeds: fewer give no verdict; fewer give one that is only a hint
ABOUT = {
    "demonstrations": "demonstrations",
    "expert": "expert without noise",
    "random": "random actions",
    "imitation": "imitation",
    "imagination": "imagination",
}
DIFFERENCE = "imagination - imitation"
MEASURES: dict[str, Callable[[np.ndarray], np.ndarray]] = {  # of the returns of episodes
    "return": lambda returns: returns,
    "success": lambda returns: (returns > 0).astype(float),
}


def summary(
    facts: Mapping[str, Any], others: Returns, outcomes: Sequence[Outcome], rng: np.random.Generator
) -> dict[str, Any]:
    """Everything that is told, as JSON values; `facts` says what was run and is part of it.

    facts["measures"] are "return" and, where it tells that, "success".
    """
    result: dict[str, Any] = {**facts, "seeds": [one.seed for one in outcomes]}
    for name in facts["measures"]:
        measure = MEASURES[name]
        values = {p: np.array([measure(o.returns[p]).mean() for o in outcomes]) for p in LEARNED}
        rows = {p: of_episodes(measure(x), rng) for p, x in others.items()}
        rows |= {p: told(bootstrap(x, rng), x) for p, x in values.items()}
        gain = values["imagination"] - values["imitation"]
        signs = {"up": gain > 0, "down": gain < 0, "same": gain == 0}
        counts = {word: int(found.sum()) for word, found in signs.items()}
        interval = paired_bootstrap(values["imagination"], values["imitation"], rng)
        result[name] = {
            "policies": {p: rows[p] for p in ABOUT if p in rows},
            "difference": told(interval, gain) | counts,
        }
    result["gap"] = promises(outcomes, result["return"]["policies"]["imagination"], rng)
    result["verdict"] = verdict(result)
    return result


def promises(
    outcomes: Sequence[Outcome], real: Mapping[str, Any], rng: np.random.Generator
) -> dict[str, Any]:
    """What imagined episodes return beyond real ones, and what imagination says of its own gain."""
    imagined = np.array([one.imagined for one in outcomes])
    played = np.array(real["by seed"])
    first, last = np.array([one.dreamed for one in outcomes]).T
    return {
        "imagined": told(bootstrap(imagined, rng), imagined),
        "real": dict(real),
        "difference": told(paired_bootstrap(imagined, played, rng), imagined - played),
        "dreamed": {"first": first.tolist(), "last": last.tolist()},
    }


def told(interval: Interval, values: np.ndarray) -> dict[str, Any]:
    """An interval over seeds, and each seed's value."""
    return {**interval._asdict(), "by seed": [float(x) for x in values]}


def of_episodes(values: np.ndarray, rng: np.random.Generator) -> dict[str, Any]:
    """Mean over episodes; of very many fewer resamples are enough."""
    resamples = max(200, min(RESAMPLES, 2_000_000 // len(values)))
    found = bootstrap(values, rng, resamples=resamples)
    return {**found._asdict(), "episodes": len(values)}


# ---- words -------------------------------------------------------------------------------------
def verdict(result: Mapping[str, Any]) -> str:
    """What the interval of the difference in return says; a hint where seeds are few."""
    row, seeds = result["return"]["difference"], len(result["seeds"])
    if seeds < FEW:
        return f"{seeds} seed{'s' * (seeds > 1)}: too few for a verdict, {FEW} are the least."
    if row["low"] > 0:
        text = "improves on imitation in the real environment"
    elif row["high"] < 0:
        text = "is worse than imitation in the real environment"
    else:
        text = "shows no difference to imitation in the real environment"
    hint = f" With fewer than {ENOUGH} seeds this is a hint." if seeds < ENOUGH else ""
    return f"Imagination {text}: {shown(short(row))}, {counted(row)}.{hint}"


def counted(row: Mapping[str, Any]) -> str:
    """In how many seeds the difference is above zero, and below."""
    same = f", alike in {row['same']}" if row["same"] else ""
    return f"up in {row['up']} seeds, down in {row['down']}{same}"


def described(result: Mapping[str, Any]) -> str:
    """What was learned from, and how often."""
    noise = "" if result["noise"] is None else f", noise {result['noise']:g}"
    seeds = len(result["seeds"])
    return (
        f"{result['env']}: {result['frames']:,} frames of {result['episodes']:,} demonstrations"
        f"{noise}; one world model, {seeds} seed{'s' * (seeds != 1)} of imitation and imagination"
    )


def known(result: Mapping[str, Any]) -> str:
    """How good the world model is on recordings held out."""
    world = result["world"]
    return (
        f"The world model, on episodes held out: frames at {world['psnr']:.1f} dB, the next one at "
        f"{world['next_frame']:.2f} of the error of standing still."
    )


def short(row: Mapping[str, Any]) -> dict[str, float]:
    """The fields of an Interval alone."""
    return {name: row[name] for name in Interval._fields}


def lines(result: Mapping[str, Any], bold: str = "") -> list[list[str]]:
    """Rows of the table: a policy each, then the difference; `bold` marks what leaves out zero."""
    names, played = (
        result["measures"],
        f"{len(result['seeds'])} seeds x {result['played']} episodes",
    )
    found = []
    for policy, first in result["return"]["policies"].items():
        over = played if policy in LEARNED else f"{first['episodes']:,} episodes"
        rows = (result[name]["policies"][policy] for name in names)
        found.append([ABOUT[policy], *(shown(short(row), ".3f") for row in rows), over])
    rows = [result[name]["difference"] for name in names]
    cells = [
        f"{bold}{shown(short(row))}{bold}" if row["low"] > 0 or row["high"] < 0 else
        shown(short(row)) for row in rows
    ]  # fmt: skip
    return [*found, [DIFFERENCE, *cells, counted(rows[0])]]


def by_seed(result: Mapping[str, Any]) -> list[list[str]]:
    """A row a seed: both policies and their difference, then what imagination promised."""
    gap, names = result["gap"], result["measures"]
    found = []
    for i, seed in enumerate(result["seeds"]):
        pairs = {name: both(result[name]["policies"], i) for name in names}
        gain = result["return"]["difference"]["by seed"][i]
        dreamed = (gap["dreamed"][key][i] for key in ("first", "last"))
        row = [str(seed), *(f"{x:.3f}" for x in pairs["return"]), f"{gain:+.3f}"]
        row += [arrow(pairs[name]) for name in names[1:]]
        found.append([*row, f"{gap['imagined']['by seed'][i]:.3f}", arrow(dreamed)])
    return found


def both(policies: Mapping[str, Any], i: int) -> list[float]:
    """What each learned policy gave in a seed."""
    return [policies[policy]["by seed"][i] for policy in LEARNED]


def arrow(values: Iterable[float]) -> str:
    """From one to the other."""
    return " -> ".join(f"{value:.3f}" for value in values)


def heads(result: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """The heads of both tables."""
    names = result["measures"]
    seeds = ["seed", *LEARNED, "gain", *names[1:], "imagined episodes", "returns while dreaming"]
    return ["", *names, "over"], seeds


def promised(result: Mapping[str, Any]) -> str:
    """The exploitation gap in words."""
    gap = {name: result["gap"][name] for name in ("imagined", "real", "difference")}
    said = {name: shown(short(row), "+.3f" if name == "difference" else ".3f")
            for name, row in gap.items()}  # fmt: skip
    return (
        f"Imagined episodes of the trained policy return {said['imagined']}, real ones "
        f"{said['real']}: exploitation gap {said['difference']}."
    )


def table(result: Mapping[str, Any]) -> str:
    """The result as text."""
    policies, seeds = heads(result)
    return "\n".join(
        [
            f"{described(result)}; intervals 95 %",
            *aligned([policies, *lines(result)]),
            "",
            *aligned([seeds, *by_seed(result)]),
            "",
            known(result),
            promised(result),
            result["verdict"],
        ]
    )


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns of equal width, two spaces apart."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    pairs = (zip(row, widths, strict=True) for row in rows)
    return ["  ".join(f"{text:<{width}}" for text, width in row).rstrip() for row in pairs]


# ---- the page of results -----------------------------------------------------------------------
def put(path: Path, command: str, result: Mapping[str, Any]) -> None:
    """Write this environment's section of a page, between its marks."""
    policies, seeds = heads(result)
    block = "\n".join(
        [
            f"`{command}`; commit {str(result['commit'])[:12]}.",
            "",
            f"{described(result)}. Intervals of 95 %; learned policies over seeds, others over "
            "episodes.",
            "",
            *tabled(policies, lines(result, "**")),
            "",
            *tabled(seeds, by_seed(result)),
            "",
            f"{known(result)} {promised(result)} **{result['verdict']}**",
        ]
    )
    mark = f"offline {result['env']}"
    heading = f"Learning from recordings alone, {result['env']}"
    section(path, mark, heading, block)
