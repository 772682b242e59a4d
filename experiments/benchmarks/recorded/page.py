"""The picture of `nested bench offline`: both phases by update, and pairs of seeds in the end.

Curves are evaluations while learning, of few episodes each; the pairs are the final policies on the
episodes that everyone plays. Bands and bars are 95 % over seeds.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.benchmarks.recorded.play import LEARNED, Curve, Outcome
from experiments.benchmarks.recorded.told import described
from experiments.benchmarks.statistics import bootstrap, shown
from experiments.record.curves import FAINT, INK, PALETTE, Line, label_ends

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {
    "imitation": PALETTE[0], "imagination": PALETTE[1], "demonstrations": PALETTE[2],
    "expert": INK, "random": FAINT,
}  # fmt: skip
LEVELS = ("expert", "demonstrations", "random")  # drawn as lines across
NAMES = {"return": "return in the environment", "success": "share of episodes above zero"}
WORSE = "#B3B3B3"  # pairs in which imagination lost


def draw(
    result: Mapping[str, Any], outcomes: Sequence[Outcome], phases: tuple[int, int], path: Path
) -> None:
    """Write the picture; `phases` are the updates of imitation and of imagination."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from experiments.record.curves import STYLE

    names = result["measures"]
    with rc_context(STYLE):
        figure = Figure(figsize=(8.2 + 3.4 * len(names), 4.9), layout="constrained")
        figure.get_layout_engine().set(wspace=0.05)  # pyright: ignore
        ratios = [2.3, *[1.0] * len(names)]
        panels = figure.subplots(1, len(ratios), width_ratios=ratios)
        learning(panels[0], result, outcomes, phases)
        for axes, name in zip(panels[1:], names, strict=True):
            pairs(axes, result, name)
        figure.suptitle(described(result), fontweight="bold", x=0.01, ha="left")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120, facecolor="white")


# ---- left --------------------------------------------------------------------------------------
def learning(
    axes: "Axes", result: Mapping[str, Any], outcomes: Sequence[Outcome], phases: tuple[int, int]
) -> None:
    """Returns by update of both phases: a thin line a seed, their mean, and its band."""
    finetune, whole = phases[0], sum(phases)
    ends = []
    for name in LEARNED:
        curves = [joined(one, name, finetune) for one in outcomes]
        for x, y in curves:
            axes.plot(x, y, color=COLOURS[name], linewidth=0.8, alpha=0.35)
        x, values = common(curves)
        band(axes, x, values, COLOURS[name])
        if len(x):
            axes.plot(x, values.mean(0), color=COLOURS[name], linewidth=2.6, marker="o", ms=4)
            ends.append(Line(name, x.tolist(), values.mean(0).tolist(), COLOURS[name]))
    ends = ends[-1:]  # imitation ends where imagination begins
    values = across(axes, result["return"]["policies"])
    ends += [Line(name, [whole], [value], COLOURS[name]) for name, value in values.items()]
    axes.axvline(finetune, color=INK, linewidth=0.8, alpha=0.5)
    axes.set_xlim(0, whole)
    axes.margins(y=0.08)
    label_ends(axes, ends, ".2f")
    for name, middle in zip(LEARNED, (finetune / 2, finetune + phases[1] / 2), strict=True):
        place = {"transform": axes.get_xaxis_transform(), "ha": "center", "va": "bottom"}
        axes.text(middle, 1.01, name, color=COLOURS[name], fontweight="bold", **place)
    axes.set_title("While learning\n", fontsize=10)
    axes.set_xlabel("updates after those of the world model")
    axes.set_ylabel(f"{NAMES['return']}, {result['evaluation']} episodes a point")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.grid(axis="y")


def across(axes: "Axes", policies: Mapping[str, Any]) -> dict[str, float]:
    """Lines of those who do not learn here, and their values."""
    found = {name: policies[name]["value"] for name in LEVELS if name in policies}
    for name, value in found.items():
        style = {"color": COLOURS[name], "linewidth": 1.2, "linestyle": (0, (4, 3))}
        axes.axhline(value, zorder=1, **style)
    return found


def joined(one: Outcome, name: str, finetune: int) -> Curve:
    """A policy's curve; imagination goes on where imitation ended."""
    x, y = one.curves[name]
    if name == "imitation":
        keep = x <= finetune
        return x[keep], y[keep]
    _, before = one.curves["imitation"]
    return np.array([finetune, *x]), np.array([*before[-1:], *y])


def common(curves: Sequence[Curve]) -> tuple[np.ndarray, np.ndarray]:
    """The updates that all curves were evaluated at, and values (seeds, n) there."""
    shared = sorted(set.intersection(*(set(x.tolist()) for x, _ in curves)))
    values = [dict(zip(x.tolist(), y.tolist(), strict=True)) for x, y in curves]
    return np.array(shared), np.array([[one[x] for x in shared] for one in values])


def band(axes: "Axes", x: np.ndarray, values: np.ndarray, colour: str) -> None:
    """95 % of the mean over seeds."""
    if len(values) > 1 and len(x):
        found = [bootstrap(column, np.random.default_rng(0)) for column in values.T]
        low, high = np.array([[one.low, one.high] for one in found]).T
        axes.fill_between(x, low, high, color=colour, alpha=0.16, linewidth=0)


# ---- right -------------------------------------------------------------------------------------
def pairs(axes: "Axes", result: Mapping[str, Any], name: str) -> None:
    """The final policies of each seed, joined; beside them their means with intervals."""
    found = result[name]
    rows = [found["policies"][policy] for policy in LEARNED]
    for before, after in zip(*(row["by seed"] for row in rows), strict=True):
        colour = COLOURS["imagination"] if after > before else WORSE
        axes.plot([0, 1], [before, after], color=colour, linewidth=1.3, alpha=0.8, zorder=2)
        for x, (y, policy) in enumerate(zip((before, after), LEARNED, strict=True)):
            axes.plot(x, y, "o", color=COLOURS[policy], ms=6, mec="white", mew=0.8, zorder=3)
    for x, row, policy in zip((-0.22, 1.22), rows, LEARNED, strict=True):
        reach = [[row["value"] - row["low"]], [row["high"] - row["value"]]]
        style = {"color": COLOURS[policy], "capsize": 4, "linewidth": 2, "ms": 8, "fmt": "D"}
        axes.errorbar([x], [row["value"]], yerr=reach, zorder=4, **style)
    across(axes, found["policies"])
    axes.set_xticks([0, 1], LEARNED)
    axes.set_xlim(-0.5, 1.5)
    axes.margins(y=0.08)
    gain = found["difference"]
    interval = shown({key: gain[key] for key in ("value", "low", "high")})
    place = {"transform": axes.transAxes, "ha": "center", "va": "bottom", "color": INK}
    axes.text(0.5, 1.01, f"gain {interval}", **place)
    axes.set_title(f"{name.title()} in the end\n", fontsize=10)
    axes.set_xlabel(f"up in {gain['up']} of {len(result['seeds'])} seeds")
    axes.set_ylabel(f"{NAMES[name]}, {result['played']} a dot")
    axes.grid(axis="y")
