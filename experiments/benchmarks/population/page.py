"""The picture of CartPole users: adaptation, rounds, consolidation, and the surprise of each level.

Means over seeds with bands of 95 % (bootstrap over seeds). Solid lines are what an agent has of its
own users; dashed ones are controls.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from experiments.benchmarks.population.rounds import Arrays, Size
from experiments.record.curves import FAINT, PALETTE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Found = Mapping[str, Mapping[int, Arrays]]  # arm -> seed -> arrays
Place = Literal["best", "upper left", "lower left", "lower right"]
BLUE, ORANGE, GREEN, PINK, YELLOW, *_ = PALETTE


def draw(found: Found, size: Size, frames: int, path: Path) -> None:
    """Write the picture of what there is; needs a seed of `fast`."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from experiments.record.curves import STYLE

    fast, plain = list(found["fast"].values()), list(found["memoryless"].values())
    with rc_context(STYLE):
        figure = Figure(figsize=(15, 8.2), layout="constrained")
        panels = figure.subplots(2, 3)
        adaptation(panels[0, 0], fast, plain, size)
        rounds(panels[0, 1], fast, plain, frames / size.rounds)
        consolidation(panels[0, 2], fast)
        surprise(panels[1], fast, plain, frames / size.rounds)
        figure.suptitle(
            f"CartPole users, {len(fast)} seeds with fast weights and {len(plain)} memoryless, "
            f"{size.users} users each: scores are returns over the cap; bands 95 % over seeds"
        )
        figure.savefig(path, dpi=110, facecolor="white")


def adaptation(axes: "Axes", fast: Sequence[Arrays], plain: Sequence[Arrays], size: Size) -> None:
    """Score of an episode after so many interactions."""
    x = np.array(size.marks, float)
    own, other = (mean([one[name][-1] for one in fast]) for name in ("own", "other"))
    band(axes, x, own, "own fast weights", BLUE)
    band(axes, x, other, "shuffled ids: another user's", ORANGE, "--")
    level(axes, own[:, 0].mean(), "frozen: nothing written", FAINT)
    if plain:
        level(axes, float(np.mean([one["zero"][-1].mean() for one in plain])), "memoryless", GREEN)
    axes.set_xscale("symlog", linthresh=1)
    axes.set_xticks(x, [str(n) for n in size.marks])
    axes.set_xlim(0, x[-1])
    axes.set_xlabel("interactions of a held-out user; nothing is written after them")
    finish(axes, "adaptation", "score of an episode", "lower right")


def rounds(axes: "Axes", fast: Sequence[Arrays], plain: Sequence[Arrays], length: float) -> None:
    """Held-out users round by round of learning."""
    x = length * np.arange(len(fast[0]["zero"]))
    shown = (
        ("zero", "new, nothing written (Z)", FAINT, "-"),
        ("fresh", "new users", BLUE, "-"),
        ("back/own", "known users", PINK, "-"),
        ("back/other", "shuffled ids", ORANGE, "--"),
        ("old/with", "of round 1, weights since", YELLOW, "-"),
    )
    for name, label, colour, dashes in shown:
        first = 1 if name == "old/with" else 0
        values = mean([one[name] for one in fast])
        band(axes, x[first:], values[:, first:], label, colour, dashes)
    if plain:
        band(axes, x, mean([one["zero"] for one in plain]), "new users, memoryless", GREEN, "--")
    axes.set_xlabel("frames of training")
    finish(axes, "rounds of learning", "score of an episode", "upper left", 2)
    axes.set_ylim(0, 1.3)  # room for the names


def consolidation(axes: "Axes", fast: Sequence[Arrays]) -> None:
    """Slow updates of the start alone."""
    shown = (
        ("own/zero", "new users, nothing written (Z)", BLUE, "-"),
        ("own/fresh", "new users, writing", PINK, "-"),
        ("stray/zero", "Z, taught by other clusters", ORANGE, "--"),
        ("own/old/with", "old users, own weights", YELLOW, "-"),
        ("own/old/without", "old users, as new ones", FAINT, "-"),
    )
    updates = np.arange(fast[0]["cohort/own/zero"].shape[1])
    for name, label, colour, dashes in shown:
        values = mean([one[f"cohort/{name}"].mean(0) for one in fast])
        band(axes, updates, values, label, colour, dashes)
    axes.set_xticks(updates)
    axes.set_xlabel("slow updates by visitors of an unknown cluster")
    finish(axes, "consolidation, nothing else learns", "score of an episode", "lower left", 2)


def surprise(panels: Any, fast: Sequence[Arrays], plain: Sequence[Arrays], length: float) -> None:
    """A panel a level, from the fastest to the slowest."""
    memory, world, start = panels
    curves = np.stack([one["surprise/memory"] for one in fast])  # (seeds, rounds + 1, T)
    x = np.arange(1, curves.shape[-1] + 1)
    for i, colour in ((1, FAINT), (curves.shape[1] - 1, BLUE)):
        band(memory, x, curves[:, i], f"after round {i}", colour)
    memory.set_xscale("log")
    memory.set_xlabel("steps of a new user's visit")
    finish(memory, "surprise of the memory (each step)", "squared error before a write")
    at = length * (np.arange(curves.shape[1] - 1) + 0.5)
    for arm, part, colour in (("fast", fast, BLUE), ("memoryless", plain, GREEN)):
        if part:
            band(world, at, np.stack([one["surprise/dyn"] for one in part]), arm, colour)
    world.set_xlabel("frames of training")
    finish(world, "surprise of the world model (each update)", "KL from posterior to prior (nats)")
    updates = np.arange(1, fast[0]["cohort/own/moved"].shape[1] + 1)
    for name, label, colour, dashes in (
        ("own", "visitors of the unknown cluster", BLUE, "-"),
        ("stray", "visitors of other clusters", ORANGE, "--"),
    ):
        moved = np.stack([one[f"cohort/{name}/moved"].mean(0) for one in fast])
        band(start, updates, moved, label, colour, dashes)
    start.set_xticks(updates)
    start.set_xlabel("slow updates")
    finish(start, "surprise of the start (64 visits)", "length of the visitors' mean displacement")


def mean(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Means over users (seeds, ...)."""
    return np.stack(parts).mean(-1)


def band(
    axes: "Axes", x: np.ndarray, y: np.ndarray, name: str, colour: str, dashes: str = "-"
) -> None:
    """The mean over seeds of y (seeds, n), and its interval."""
    places = np.random.default_rng(0).integers(0, len(y), (500, len(y)))
    low, high = np.quantile(y[places].mean(1), (0.025, 0.975), axis=0)
    axes.plot(x, y.mean(0), dashes, color=colour, linewidth=1.8, label=name)
    axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)


def level(axes: "Axes", y: float, name: str, colour: str) -> None:
    """A line across."""
    axes.axhline(y, color=colour, linewidth=1.2, linestyle=(0, (4, 3)), label=name)


def finish(axes: "Axes", title: str, label: str, place: Place = "best", columns: int = 1) -> None:
    """What all panels have."""
    axes.set(title=title, ylabel=label)
    axes.set_ylim(bottom=0)
    axes.grid(axis="y")
    axes.legend(frameon=False, fontsize=7.5, loc=place, ncols=columns)
