"""The page of the continual-learning benchmark, a picture for each stream.

Scores R as heatmaps, learning against forgetting in one plane, differences to plain paired by seed,
and what each method costs: AP_final alone hides everything, so it never stands alone here. Of an
agent also its score in every context through all phases.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.benchmarks.cells import Result
from experiments.benchmarks.tasks.agent_scores import RAW
from experiments.record.curves import FAINT, INK, PALETTE, SHADE, spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ACROSS = 8  # heatmaps in a row
COURSES = 4  # panels of curves in a row
DIFFERENCES = ("AP_final", "ALA", "F")
LIVED = ("online",)  # the same of streams without tasks


def draw(
    summary: Mapping[str, Any], results: Mapping[tuple[str, str], Result], folder: Path
) -> list[Path]:
    """Draw `continual-STREAM.png` for each stream of the summary; returns the paths."""
    from matplotlib import rc_context

    from experiments.record.curves import STYLE

    paths = []
    for stream, found in summary.items():
        own = {method: results[stream, method] for method in found["methods"]}
        path = folder / f"continual-{stream.rpartition('/')[2]}.png"
        free = not any(result.scores.size for result in own.values())
        with rc_context(STYLE):
            figure = (_page_of_a_life if free else _page)(stream, found, own)
            figure.savefig(path, dpi=100, facecolor="white")
        paths.append(path)
    return paths


def _page(stream: str, found: Mapping[str, Any], results: Mapping[str, Result]) -> "Figure":
    from matplotlib.figure import Figure

    heights = -(-len(results) // ACROSS)
    rows = len(results)
    courses = {name: result for name, result in results.items() if "course" in result.arrays}
    ratios = [1.9 * heights + 0.5, max(4.7, 0.2 * len(found["pairs"])), 0.26 * rows + 0.6]
    if courses:
        ratios.append(2.1 * -(-len(courses) // COURSES) + 0.5)
    figure = Figure(figsize=(15, sum(ratios) - 0.6), layout="constrained")
    parts = figure.subfigures(len(ratios), 1, squeeze=False, height_ratios=ratios)[:, 0]
    maps, plots, costs = parts[:3]
    maps.suptitle(
        f"{stream}, {len(found['seeds'])} seeds: score on each task (across) after training on "
        f"each task (down), mean over seeds; the first row is untrained{_unit(found)}",
        fontweight="bold", x=0.01, ha="left",
    )  # fmt: skip
    raw = found.get("unit") == RAW
    _heatmaps(maps, {name: result.scores for name, result in results.items()}, raw)
    left, right = plots.subplots(1, 2, width_ratios=[1, 1.25])
    _plane(left, found["methods"])
    _differences(right, found["pairs"], DIFFERENCES)
    _costs(costs.subplots(), found["methods"])
    if courses:
        _courses(parts[3], courses)
    return figure


def _page_of_a_life(
    stream: str, found: Mapping[str, Any], results: Mapping[str, Result]
) -> "Figure":
    """Of a stream without tasks: what was lived, part by part; differences; costs."""
    from matplotlib.figure import Figure

    ratios = [max(4.7, 0.2 * len(found["pairs"])), 0.26 * len(results) + 0.6]
    figure = Figure(figsize=(15, sum(ratios)), layout="constrained")
    plots, costs = figure.subfigures(2, 1, squeeze=False, height_ratios=ratios)[:, 0]
    plots.suptitle(
        f"{stream}, {len(found['seeds'])} seeds: mean score of the episodes that ended in each "
        f"part of the stream, whose contexts change unannounced{_unit(found)}",
        fontweight="bold", x=0.01, ha="left",
    )  # fmt: skip
    left, right = plots.subplots(1, 2, width_ratios=[1.25, 1])
    lives = {name: result for name, result in results.items() if "curve" in result.arrays}
    for i, (name, result) in enumerate(lives.items()):
        middles = (result.arrays["frames"][1:] + result.arrays["frames"][:-1]) / 2
        colour = PALETTE[i % len(PALETTE)]
        left.plot(middles, result.arrays["curve"].mean(0), color=colour, label=name)
    left.set_xlabel("frames")
    left.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    left.grid(axis="y")
    left.legend(frameon=False, fontsize=8.5)
    _differences(right, found["pairs"], LIVED)
    _costs(costs.subplots(), found["methods"])
    return figure


def _unit(found: Mapping[str, Any]) -> str:
    return f". Scores: {found['unit']}" if "unit" in found else ""


def _heatmaps(figure: Any, scores: Mapping[str, np.ndarray], raw: bool) -> None:
    panels = figure.subplots(-(-len(scores) // ACROSS), ACROSS, squeeze=False).ravel()
    image = None
    means = {method: values.mean(0) for method, values in scores.items()}
    low, high = _ends(means) if raw else (0.0, 1.0)
    for axes, (method, values) in zip(panels, means.items(), strict=False):
        image = axes.imshow(values, vmin=low, vmax=high, cmap="viridis", aspect="auto")
        axes.set_title(method, fontsize=9.5)
        axes.set_xticks([])
        axes.set_yticks([])
    for axes in panels[len(scores) :]:
        axes.axis("off")
    if image is not None:
        figure.colorbar(image, ax=list(panels), shrink=0.8, pad=0.01)


def _ends(means: Mapping[str, np.ndarray]) -> tuple[float, float]:
    """The least and the greatest of all."""
    return min(x.min() for x in means.values()), max(x.max() for x in means.values())


def _courses(figure: Any, results: Mapping[str, Result]) -> None:
    """Scores in every context through the phases, a panel a method, all on one scale."""
    figure.suptitle(
        "score in each context while the phases go by: mean over seeds, and the middle half of "
        "them; thicker in the phase that is of this context",
        fontweight="bold", x=0.01, ha="left",
    )  # fmt: skip
    shape = (-(-len(results) // COURSES), COURSES)
    panels = figure.subplots(*shape, squeeze=False, sharex=True, sharey=True).ravel()
    for axes, (method, result) in zip(panels, results.items(), strict=False):
        _course(axes, result)
        axes.set_title(method, fontsize=9.5, pad=15)
    for axes in panels[len(results) :]:
        axes.axis("off")


def _course(axes: "Axes", result: Result) -> None:
    """Bands are the phases, named by their context in its colour."""
    course, frames = result.arrays["course"], result.arrays["frames"]
    contexts, phases = result.info["contexts"], result.info["phases"]
    for i, context in enumerate(phases):
        start, end = i * frames[-1], (i + 1) * frames[-1]
        axes.axvspan(start, end, color=SHADE if i % 2 == 0 else "white", linewidth=0)
        axes.text(
            (start + end) / 2, 1.02, context, ha="center", va="bottom", fontsize=7.5,
            color=PALETTE[contexts.index(context)], transform=axes.get_xaxis_transform(),
        )  # fmt: skip
    for i, context in enumerate(contexts):
        for phase, of_phase in enumerate(phases):
            x, y = phase * frames[-1] + frames, course[:, phase, :, i]
            low, high = np.quantile(y, (0.25, 0.75), axis=0)
            axes.fill_between(x, low, high, color=PALETTE[i], alpha=0.15, linewidth=0)
            width = 2.2 if of_phase == context else 1.0
            axes.plot(x, y.mean(0), color=PALETTE[i], linewidth=width)
    axes.set_xlim(0, course.shape[1] * frames[-1])
    axes.locator_params(axis="x", nbins=4)  # thousands side by side are wide
    if "unit" not in result.info:
        axes.set_ylim(0.0, 1.0)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.grid(axis="y")


def _plane(axes: "Axes", methods: Mapping[str, Any]) -> None:
    """Up is learned well, right is forgotten; names stand beside, none over another."""
    points = {name: (row["metrics"]["F"], row["metrics"]["ALA"]) for name, row in methods.items()}
    for i, (x, y) in enumerate(points.values()):
        bars = {"xerr": _bars(x), "yerr": _bars(y), "ecolor": FAINT, "elinewidth": 0.8}
        axes.errorbar(x["value"], y["value"], fmt="o", color=PALETTE[i % len(PALETTE)], **bars)
    low, high = axes.get_ylim()
    heights = {i: (y["value"] - low) / (high - low) for i, (_, y) in enumerate(points.values())}
    for i, place in spread(heights, 0.062).items():
        name, (x, y) = list(points.items())[i]
        axes.annotate(
            name, (x["value"], y["value"]), xytext=(1.03, place), textcoords="axes fraction",
            fontsize=8.5, color=PALETTE[i % len(PALETTE)], va="center", annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": FAINT, "linewidth": 0.4, "alpha": 0.6},
        )  # fmt: skip
    axes.set_title("learned, and forgotten")
    axes.set_xlabel("F: fall of a task's score to the end")
    axes.set_ylabel("ALA: score just after a task was learned")
    axes.grid()


def _differences(axes: "Axes", pairs: Mapping[str, Any], metrics: Sequence[str]) -> None:
    for k, metric in enumerate(metrics):
        rows = [row[metric] for row in pairs.values()]
        height = np.arange(len(rows)) + 0.22 * (k - 1)
        bars = np.concatenate([_bars(row) for row in rows], 1) if rows else None
        axes.errorbar(
            [row["value"] for row in rows], height, xerr=bars, fmt="o", markersize=4,
            color=PALETTE[k], label=metric,
        )  # fmt: skip
    axes.axvline(0.0, color=INK, linewidth=0.8)
    axes.set_yticks(range(len(pairs)), list(pairs), fontsize=8.5)
    axes.invert_yaxis()
    axes.set_title("differences, paired by seed, 95 %")
    axes.grid(axis="x")
    if pairs:
        below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.05), "ncols": len(metrics)}
        axes.legend(frameon=False, fontsize=8.5, **below)


def _costs(axes: "Axes", methods: Mapping[str, Any]) -> None:
    axes.axis("off")
    head = ["method", "core us a row", "FLOPs a row", "levels: period, parameters, FLOPs a row"]
    cells = [
        [
            method,
            f"{row['cost']['core_us_per_interaction']:.1f}",
            f"{row['cost']['flops_per_interaction']:,.0f}",
            ";  ".join(
                f"{name} n={level['n']}, {level['parameters']:,}, {level['flops']:,}"
                for name, level in row["cost"]["levels"].items()
            ),
        ]
        for method, row in methods.items()
    ]
    widths = [0.11, 0.08, 0.09, 0.72]
    made = axes.table(cells, colLabels=head, colWidths=widths, loc="center", edges="horizontal")
    made.auto_set_font_size(False)
    made.set_fontsize(8.5)
    for cell in made.get_celld().values():
        cell.set_text_props(ha="left")
        cell.PAD = 0.01
        cell.set_linewidth(0.4)


def _bars(row: Mapping[str, float]) -> np.ndarray:
    """Distances of an interval's ends from its value (2, 1); a bootstrap's may lie outside."""
    ends = [[row["value"] - row["low"]], [row["high"] - row["value"]]]
    return np.maximum(ends, 0.0)
