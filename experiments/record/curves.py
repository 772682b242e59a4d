"""Reading curves off a spool and writing them legibly: series, smoothing, names at line ends.

No matplotlib import: axes are handed in. Values that are not finite are left out of curves.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from experiments.record.metrics import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette, safe for colour-blind readers; its yellow is too faint on white.
PALETTE = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#6B5B00", "#333333"]
INK, FAINT, SHADE = "#222222", "#8C8C8C", "#EDF1F6"
GAP = 0.055  # least distance of two names, in heights of the axes
STYLE: dict[Any, Any] = {
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#777777",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.axisbelow": True,
    "axes.labelcolor": "#444444",
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "grid.color": "#D5DAE0",
    "grid.linewidth": 0.6,
}


class Line(NamedTuple):
    """One curve: x in frames."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: Any


def series(rows: list[Row], name: str) -> tuple[list[float], list[float]]:
    """Steps and finite values of one metric."""
    found = [(row.step, row.metrics[name]) for row in rows if name in row.metrics]
    kept = [(float(step), value) for step, value in found if math.isfinite(value)]
    return [step for step, _ in kept], [value for _, value in kept]


def positive(line: Line) -> Line:
    """The part of a curve that a logarithmic axis can show."""
    kept = [(x, y) for x, y in zip(line.x, line.y, strict=True) if y > 0]
    return line._replace(x=[x for x, _ in kept], y=[y for _, y in kept])


def merge_equal(lines: Sequence[Line]) -> list[Line]:
    """One curve for those that coincide, such as the two halves of a KL, under both names."""
    merged: dict[tuple[tuple[float, ...], tuple[float, ...]], Line] = {}
    for line in lines:
        key = (tuple(line.x), tuple(line.y))
        other = merged.get(key)
        merged[key] = line._replace(name=f"{other.name} = {line.name}") if other else line
    return list(merged.values())


def smooth(values: Sequence[float], reach: int | None = None) -> list[float]:
    """Medians over a window that ends at each point and grows with the curve's length."""
    reach = reach or max(1, len(values) // 25)
    windows = (sorted(values[max(0, i - reach) : i + 1]) for i in range(len(values)))
    return [window[len(window) // 2] for window in windows]


def last_mean(values: Sequence[float], count: int) -> float:
    """Mean of the last `count` values."""
    kept = values[-count:]
    return sum(kept) / len(kept)


def phase_means(
    line: tuple[Sequence[float], Sequence[float]], end: float, count: int
) -> float | None:
    """Mean of the last `count` values up to frame `end`; None before the first."""
    values = [y for x, y in zip(*line, strict=True) if x <= end]
    return last_mean(values, count) if values else None


def label_ends(axes: "Axes", lines: Sequence[Line], numbers: str = "") -> None:
    """Write each line's name beside its last point, right of the axes, none over another.

    `numbers` is a format for the last value, shown after the name.
    """
    lines = [line for line in lines if line.y]
    axes.autoscale_view()
    heights = {i: _height(axes, line.y[-1]) for i, line in enumerate(lines)}
    for i, place in spread(heights, GAP * max(1.0, 2.6 / _inches(axes))).items():
        line = lines[i]
        text = f"{line.name} {line.y[-1]:{numbers}}" if numbers else line.name
        axes.annotate(
            text,
            xy=(1.0, heights[i]),
            xytext=(1.018, place),
            xycoords="axes fraction",
            color=line.colour,
            va="center",
            fontsize=9,
            annotation_clip=False,
        )


def spread(heights: Mapping[int, float], gap: float) -> dict[int, float]:
    """Places near `heights`, in their order, at least `gap` apart and within [0, 1] if they fit."""
    order = sorted(heights, key=lambda i: heights[i])
    places: dict[int, float] = {}
    floor = 0.0
    for i in order:
        places[i] = max(heights[i], floor)
        floor = places[i] + gap
    ceiling = max(1.0, (len(order) - 1) * gap)
    for i in reversed(order):
        places[i] = min(places[i], ceiling)
        ceiling = places[i] - gap
    return places


def duration(seconds: float) -> str:
    """A time span as a reader says it: `4 min 52 s`."""
    minutes, rest = divmod(round(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _height(axes: "Axes", value: float) -> float:
    x = axes.get_xlim()[0]
    pixels = axes.transData.transform((x, value))
    return float(axes.transAxes.inverted().transform(pixels)[1])


def _inches(axes: "Axes") -> float:
    figure = axes.get_figure()
    assert figure is not None
    return axes.get_position().height * figure.get_figheight()  # pyright: ignore
