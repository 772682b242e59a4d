"""report.png: what a run learned, what it forgot, and when each of its levels moved.

Drawn from the run's own files alone, so it can be redrawn at any time, for a run that was killed
too. Lines carry their names at their right end: no legend covers data. Colours are safe for
colour-blind readers; those of levels run from light (fast) to dark (slow).
"""

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any, NamedTuple

from experiments.record.curves import (
    FAINT,
    INK,
    PALETTE,
    SHADE,
    STYLE,
    Line,
    duration,
    label_ends,
    merge_equal,
    phase_means,
    positive,
    series,
    smooth,
)
from experiments.record.levels import LevelRow, level_rows, schedule_text
from experiments.record.metrics import Row, read
from experiments.record.run import Run, read_config

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

AGENT_LOSSES = ("policy", "value", "repvalue")
NAMES = {"default": "evaluation"}  # the context of an environment that has none
LAST = 3  # evaluations behind a score in the title
ZOOM = 256  # updates in the raster, at most
WIDTH = 215  # letters of the title's last line, which then goes on below in smaller ones


class Phase(NamedTuple):
    """A stretch of frames spent in one context."""

    context: str
    start: float
    end: float


class Facts(NamedTuple):
    """Everything that the panels draw."""

    run: Run
    config: dict[str, Any]
    rows: list[Row]
    levels: list[LevelRow]
    phases: list[Phase]


def report(path: Path) -> Path:
    """Write report.png into the run's folder and return its path. Raises RunError."""
    from matplotlib import rc_context

    from experiments.record import phases

    offline = read_config(Path(path)).get("method") == "dreamer4"
    target = Path(path) / "report.png"
    with rc_context(STYLE):
        figure = phases.draw(phases.gather(Path(path))) if offline else draw(gather(Path(path)))
        figure.savefig(target, dpi=120, facecolor="white")
    return target


def gather(path: Path) -> Facts:
    """Read the run's files."""
    run, config = Run.open(path), read_config(path)
    rows = read(path / "metrics.jsonl")
    names = [str(name) for name in (config.get("env") or {}).get("contexts") or []]
    whole = float(config.get("frames") or (rows[-1].step if rows else 1))
    lengths = (config.get("env") or {}).get("lengths") or []
    ends = [*accumulate(lengths)] or [(i + 1) * whole / len(names) for i in range(len(names))]
    phases = [Phase(*of) for of in zip(names, [0.0, *ends], ends, strict=False)]
    return Facts(run, config, rows, level_rows(path, config), phases)


def draw(facts: Facts) -> "Figure":
    """All panels: returns on top, losses, then the levels."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 12.4))
    grid = figure.add_gridspec(3, 1, height_ratios=(1.3, 1, 1))
    grid.update(left=0.055, right=0.925, top=0.865, bottom=0.05, hspace=0.38)
    symptoms = any("plasticity/dormant" in row.metrics for row in facts.rows)
    losses = grid[1].subgridspec(1, 3 if symptoms else 2, wspace=0.52 if symptoms else 0.3)
    levels = grid[2].subgridspec(1, 3, wspace=0.52, width_ratios=(1.1, 1, 1))
    draw_title(figure, facts)
    draw_returns(figure.add_subplot(grid[0]), facts)
    draw_losses(figure.add_subplot(losses[0]), facts, "world model")
    draw_losses(figure.add_subplot(losses[1]), facts, "agent")
    if symptoms:
        draw_plasticity(figure.add_subplot(losses[2]), facts)
    draw_raster(figure.add_subplot(levels[0]), facts)
    draw_updates(figure.add_subplot(levels[1]), facts)
    draw_displacement(figure.add_subplot(levels[2]), facts)
    return figure


def draw_title(figure: "Figure", facts: Facts) -> None:
    """Three lines: which run; what it ran; how it came out."""
    rows, config = facts.rows, facts.config
    took = rows[-1].wall - facts.run.info["created"] if rows else 0.0
    environment = str((config.get("env") or {}).get("id", ""))
    step, state = rows[-1].step if rows else 0, facts.run.state
    planned = config.get("frames") or step
    frames = f"{step:,}" if step >= planned else f"{step:,} of {planned:,}"
    ending = state if state in ("failed", "stopped") else ""
    schedule, spent = schedule_text(facts.levels), f"{frames} frames in {duration(took)}"
    parts = [environment, schedule, spent, ending]
    figure.text(0.055, 0.972, facts.run.id, fontsize=18, fontweight="bold", color=INK)
    figure.text(0.055, 0.948, "   ·   ".join(filter(None, parts)), fontsize=11.5, color="#555555")
    lines = wrap(outcome(facts), WIDTH, break_long_words=False)
    size = 11.5 if len(lines) == 1 else 8.5
    text = "\n".join(lines)
    figure.text(0.055, 0.937, text, va="top", linespacing=1.1, fontsize=size, color=INK)


def outcome(facts: Facts) -> str:
    """The score, or return, that each context had at the end of each phase."""
    ends = facts.phases or [Phase("", 0, float("inf"))]
    parts: list[str] = []
    for name in contexts(facts):
        scores = series(facts.rows, f"eval/{name}/score")
        curve = scores if scores[0] else series(facts.rows, f"eval/{name}/return")
        kind, form = ("score", ".2f") if scores[0] else ("return", ",.1f")
        means = [phase_means(curve, phase.end, LAST) for phase in ends]
        text = " → ".join(f"{mean:{form}}" for mean in means if mean is not None)
        parts.append(f"{kind} {text}" if name == "default" else f"{kind} in {name} {text}")
    if not parts:
        return "no evaluation yet"
    when = "at the end of each phase" if len(ends) > 1 else "at the end"
    parts = [part.replace(" ", "\N{NO-BREAK SPACE}") for part in parts]  # a line ends between them
    return f"{';   '.join(parts)}     ({when}, mean of the last {LAST} evaluations)"


def draw_returns(axes: "Axes", facts: Facts) -> None:
    """Evaluation return of each context, the cap where there is one, training return behind."""
    train = Line("training", *series(facts.rows, "train/return"), FAINT)
    lines = [
        Line(name, *series(facts.rows, f"eval/{name}/return"), PALETTE[i % len(PALETTE)])
        for i, name in enumerate(contexts(facts))
    ]
    axes.plot(train.x, train.y, color=FAINT, linewidth=0.9, alpha=0.75)
    for line in lines:
        axes.plot(line.x, line.y, color=line.colour, linewidth=2.1, marker="o", markersize=3.6)
    cap = find_cap(facts)
    if cap is not None:
        axes.axhline(cap, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
        lines.append(Line(f"cap {cap:g}", [0.0], [cap], INK))
    axes.margins(y=0.07)
    named = [line._replace(name=NAMES.get(line.name, line.name)) for line in lines]
    label_ends(axes, [*named, train._replace(y=smooth(train.y))])
    episodes = (facts.config.get("evaluate") or {}).get("episodes")
    each = f", mean of {episodes} episodes a point" if episodes else ""
    finish_panel(axes, facts, f"Evaluation return{each}; training return in grey", "return")
    for phase in facts.phases:
        middle = (phase.start + phase.end) / 2
        name = f"learns in {phase.context}"
        place = {"transform": axes.get_xaxis_transform(), "ha": "center", "va": "bottom"}
        axes.text(middle, 1.0, name, color="#555555", fontsize=10, **place)


def draw_losses(axes: "Axes", facts: Facts, whose: str) -> None:
    """Losses of the agent or of the world model; linear about 0 where some are negative."""
    names = sorted({name for row in facts.rows for name in row.metrics if name[:5] == "loss/"})
    chosen = [name for name in names if (name[5:] in AGENT_LOSSES) == (whose == "agent")]
    found = [Line(name[5:], *series(facts.rows, name), INK) for name in chosen]
    surprise = Line("memory", *series(facts.rows, "agent/surprise"), INK)
    if whose == "world model" and surprise.x:
        found.append(surprise)  # of the fast weights, beside what surprises the slow ones
    lines = merge_equal(found)
    lines = [line._replace(colour=PALETTE[i % len(PALETTE)]) for i, line in enumerate(lines)]
    values = [y for line in lines for y in line.y]
    signed = min(values, default=1.0) < 0
    if signed:
        strip = sorted(abs(y) for y in values)[len(values) // 10] or 1e-3
        axes.set_yscale("symlog", linthresh=strip, linscale=0.5)
    else:
        axes.set_yscale("log")
        lines = [positive(line) for line in lines]
    draw_smoothed(axes, lines)
    scale = "log scale, linear about 0" if signed else "log scale"
    finish_panel(axes, facts, f"Losses of the {whose}", f"loss ({scale})")


def draw_plasticity(axes: "Axes", facts: Facts) -> None:
    """Signs of lost plasticity: shares of dormant units; rank and norm as parts of their first."""
    ranks, norms = (series(facts.rows, f"plasticity/{name}") for name in ("erank", "weight_norm"))
    lines = [
        Line(f"{part} dormant", *series(facts.rows, f"plasticity/{part}/dormant"), PALETTE[i])
        for i, part in enumerate(("world", "actor", "critic"))
    ]
    for name, (x, y), colour in (("rank", ranks, PALETTE[3]), ("norm", norms, PALETTE[4])):
        first = next((value for value in y if value > 0), 1.0)
        lines.append(Line(f"{name} / first", x, [value / first for value in y], colour))
    for line in lines:
        axes.plot(line.x, line.y, color=line.colour, linewidth=1.9)
    axes.set_ylim(bottom=0)
    label_ends(axes, lines)
    finish_panel(axes, facts, "Plasticity: dormant units, rank, norm", "share, and ratio")


def draw_raster(axes: "Axes", facts: Facts) -> None:
    """When each level moved in the first updates: a row a level, fastest on top."""
    levels = [level for level in facts.levels if level.moves]
    colours = level_colours(facts.levels)
    longest = max((level.period for level in levels if level.unit == "update"), default=1.0)
    last = max((level.moves[-1] for level in levels), default=1)
    window = int(min(last, ZOOM, max(32, 4 * longest)))
    for i, level in enumerate(levels):
        moves = [count for count in level.moves if count <= window]
        width = 140 / max(70, window)
        axes.vlines(moves, -i - 0.26, -i + 0.26, colors=[colours[level.name]], linewidths=width)
        text = f"{level.name}, {level.every}"
        axes.text(0, -i + 0.36, text, color=colours[level.name], va="bottom", fontsize=9)
    axes.set_yticks([])
    axes.set_ylim(-len(levels) + 0.55, 0.75)
    axes.set_xlim(0, window + 1)
    axes.spines["left"].set_visible(False)
    axes.set_title("When each level moves")
    axes.set_xlabel(f"update (the first {window})")
    say_if_empty(axes)


def draw_updates(axes: "Axes", facts: Facts) -> None:
    """Updates of each level so far."""
    lines = level_lines(facts, "updates")
    axes.set_yscale("log")
    for line in reversed(lines):  # a copy that keeps step with a level lies below it
        axes.plot(line.x, line.y, color=line.colour, linewidth=1.9)
    label_ends(axes, lines, ",.0f")
    finish_panel(axes, facts, "Updates of each level", "updates so far (log scale)")


def draw_displacement(axes: "Axes", facts: Facts) -> None:
    """How far one sample moves each level."""
    axes.set_yscale("log")
    draw_smoothed(axes, level_lines(facts, "displacement_per_sample"))
    label = "L2 norm of the change (log scale)"
    finish_panel(axes, facts, "How far one update's data moves each level", label)


def draw_smoothed(axes: "Axes", lines: Sequence[Line]) -> None:
    """Curves as they are, faintly, and their running medians."""
    for line in lines:
        axes.plot(line.x, line.y, color=line.colour, linewidth=0.8, alpha=0.28)
        axes.plot(line.x, smooth(line.y), color=line.colour, linewidth=1.8)
    label_ends(axes, [line._replace(y=smooth(line.y)) for line in lines])


def finish_panel(axes: "Axes", facts: Facts, title: str, label: str) -> None:
    """Title, units, frames on the x-axis, phases shaded in turn."""
    end = max([phase.end for phase in facts.phases], default=0.0)
    end = max(end, float(facts.rows[-1].step) if facts.rows else 1.0)
    axes.set_xlim(0, end)
    axes.set_title(title, pad=24 if axes.get_position().y0 > 0.6 and facts.phases else None)
    axes.set_xlabel("environment frames")
    axes.set_ylabel(label)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.grid(axis="y")
    for i, phase in enumerate(facts.phases):
        if i % 2:
            axes.axvspan(phase.start, phase.end, color=SHADE, linewidth=0, zorder=-2)
    say_if_empty(axes)


def say_if_empty(axes: "Axes") -> None:
    """A panel without data says so."""
    if not axes.collections and not any(len(line.get_path()) for line in axes.lines):
        place = {"transform": axes.transAxes, "ha": "center", "va": "center"}
        axes.text(0.5, 0.5, "nothing recorded yet", color=FAINT, **place)


def contexts(facts: Facts) -> list[str]:
    """Evaluated contexts: in the order of the phases, then others."""
    names = {name for row in facts.rows for name in row.metrics if name.startswith("eval/")}
    found = {name.split("/")[1] for name in names if name.endswith("/return")}
    phases = [phase.context for phase in facts.phases if phase.context in found]
    return list(dict.fromkeys([*phases, *sorted(found)]))


def find_cap(facts: Facts) -> float | None:
    """The greatest possible return, where the environment has one: return / score."""
    for row in facts.rows:
        for name in contexts(facts):
            score = row.metrics.get(f"eval/{name}/score", 0.0)
            if score > 0:
                return round(row.metrics[f"eval/{name}/return"] / score, 3)
    return None


def level_lines(facts: Facts, metric: str) -> list[Line]:
    """One metric of each level, where an axis of logarithms shows it."""
    colours = level_colours(facts.levels)
    curves = [(n, series(facts.rows, f"levels/{n}/{metric}"), colours[n]) for n in colours]
    return [positive(Line(name, *curve, colour)) for name, curve, colour in curves if curve[0]]


def level_colours(levels: Sequence[LevelRow]) -> dict[str, Any]:
    """Light to dark from the fastest to the slowest level; grey for copies."""
    from matplotlib import colormaps

    learning = [level.name for level in levels if not level.copy]
    places = [0.72 - 0.72 * i / max(1, len(learning) - 1) for i in range(len(learning))]
    shades = {name: colormaps["viridis"](at) for name, at in zip(learning, places, strict=True)}
    return {level.name: shades.get(level.name, FAINT) for level in levels}
