"""report.png of an offline run: its phases' losses, what it returns, what it imagines.

Drawn from the run's own files alone, like the report of an online run. Losses are shown in their
own size, before they are divided by their running root mean square. Gates stand in the titles.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from experiments.record.curves import (
    FAINT,
    INK,
    PALETTE,
    Line,
    duration,
    label_ends,
    positive,
    series,
    smooth,
)
from experiments.record.metrics import Row, read
from experiments.record.run import Run, read_config

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from experiments.predict import Prediction

PHASES = {
    "tokenizer": ("psnr", "dB"),
    "dynamics": ("next_frame", "of standing still"),
    "finetune": ("surprise", "of uniform actions"),
    "imagine": ("return", ""),
}
RETURNS = {"random": FAINT, "imitation": PALETTE[0], "imagination": PALETTE[1]}
PROMISES = {
    "hallucination": ("wrong recipes", PALETTE[1]),
    "recognised": ("right recipes", PALETTE[2]),
    "hallucination_away": ("not at the bench", PALETTE[5]),
}

NOTHING = "nothing recorded yet"
TAUGHT = ("tokenizer", "dynamics")  # what a run may begin with


class Facts(NamedTuple):
    """Everything that the panels draw."""

    run: Run
    config: dict[str, Any]
    rows: list[Row]
    prediction: "Prediction | None"


def gather(path: Path) -> Facts:
    """Read the run's files."""
    from experiments.predict_offline import FILE, load

    stored = path / FILE
    prediction = load(stored) if stored.exists() else None
    return Facts(Run.open(path), read_config(path), read(path / "metrics.jsonl"), prediction)


def draw(facts: Facts) -> "Figure":
    """Losses by phase; returns, promises and imagined returns; the open-loop film."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16, 14.5))
    grid = figure.add_gridspec(3, 1, height_ratios=(1, 1, 2.1))
    grid.update(left=0.05, right=0.93, top=0.89, bottom=0.04, hspace=0.3)
    losses = grid[0].subgridspec(1, len(PHASES), wspace=0.5)
    results = grid[1].subgridspec(1, 3, wspace=0.42)
    draw_title(figure, facts)
    for i, name in enumerate(PHASES):
        draw_losses(figure.add_subplot(losses[i]), facts, name)
    draw_returns(figure.add_subplot(results[0]), facts)
    draw_promises(figure.add_subplot(results[1]), facts)
    draw_gap(figure.add_subplot(results[2]), facts)
    film = grid[2].subgridspec(1, 2, width_ratios=(3.2, 1), wspace=0.16)
    draw_film(figure.add_subplot(film[0]), facts)
    draw_psnr(figure.add_subplot(film[1]), facts)
    return figure


def draw_title(figure: "Figure", facts: Facts) -> None:
    """Three lines: which run; what it ran; how it came out."""
    rows, run = facts.rows, facts.run
    took = rows[-1].wall - run.info["created"] if rows else 0.0
    step = rows[-1].step if rows else 0
    rounds = (facts.config.get("online") or {}).get("rounds", 0)
    environment = str((facts.config.get("env") or {}).get("id", ""))
    origin = f"begun with {begun(facts)}" if begun(facts) else ""
    what = f"offline, then {rounds} round{'s' * (rounds > 1)} online" if rounds else "offline"
    ending = run.state if run.state in ("failed", "stopped") else ""
    parts = [environment, what, origin, f"{step:,} updates in {duration(took)}", ending]
    figure.text(0.05, 0.972, run.id, fontsize=18, fontweight="bold", color=INK)
    figure.text(0.05, 0.953, "   ·   ".join(filter(None, parts)), fontsize=11.5, color="#555555")
    figure.text(0.05, 0.933, outcome(facts), fontsize=11.5, color=INK)


def begun(facts: Facts) -> str:
    """The name of the run whose world model this one begins with, if there is one."""
    return Path(str(facts.config.get("start") or "")).name


def outcome(facts: Facts) -> str:
    """The returns of each policy, first and last."""
    parts = []
    for name in RETURNS:
        _, values = series(facts.rows, f"eval/{name}/return")
        if values:
            shown = [f"{values[0]:.2f}"] + [f"{values[-1]:.2f}"] * (len(values) > 1)
            parts.append(f"{name} {' → '.join(shown)}")
    return f"return of {', '.join(parts)}" if parts else "no evaluation yet"


def draw_losses(axes: "Axes", facts: Facts, phase: str) -> None:
    """The losses of a phase, by update of the run; rounds go on in the same panel."""
    found = {name for row in facts.rows for name in row.metrics}
    names = sorted(n.partition("_")[2] for n in found if n.startswith(f"loss/{phase}_"))
    kinds = ["rms" if f"rms/{phase}_{name}" in found else "loss" for name in names]
    lines = [
        Line(name, *series(facts.rows, f"{kind}/{phase}_{name}"), PALETTE[i % len(PALETTE)])
        for i, (kind, name) in enumerate(zip(kinds, names, strict=True))
    ]
    signed = any(y <= 0 for line in lines for y in line.y)
    axes.set_yscale("symlog" if signed else "log", **({"linthresh": 1e-2} if signed else {}))
    lines = lines if signed else [positive(line) for line in lines]
    for line in lines:
        axes.plot(line.x, line.y, color=line.colour, linewidth=0.8, alpha=0.28)
        axes.plot(line.x, smooth(line.y), color=line.colour, linewidth=1.8, marker=".", ms=2.5)
    label_ends(axes, [line._replace(y=smooth(line.y)) for line in lines])
    axes.set_title(f"{phase}\n{gate(facts, phase)}", fontsize=9.5)
    axes.set_xlabel("update")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.grid(axis="y")
    taught = begun(facts) and phase in TAUGHT
    say_if_empty(axes, "that of the run begun with" if taught else NOTHING)


def gate(facts: Facts, phase: str) -> str:
    """A phase's measure beside its gate, in words."""
    measure, unit = PHASES[phase]
    _, values = series(facts.rows, f"gate/{phase}_{measure}")
    if not values:
        return ""
    asked = ((facts.config.get("phases") or {}).get(phase) or {}).get("gate")
    text = " ".join(filter(None, (measure.replace("_", " "), f"{values[-1]:.3g}", unit)))
    return text if asked is None else f"{text} (gate {asked:g})"


def draw_returns(axes: "Axes", facts: Facts) -> None:
    """Mean return in the environment of random actions, of the clone, and of what was trained."""
    lines = [
        Line(name, *series(facts.rows, f"eval/{name}/return"), colour)
        for name, colour in RETURNS.items()
    ]
    for line in lines:
        axes.plot(line.x, line.y, color=line.colour, linewidth=1.8, marker="o", markersize=5)
        if len(line.y) == 1:
            axes.axhline(line.y[0], color=line.colour, linewidth=0.8, linestyle=(0, (4, 3)))
    found = [value for line in lines for value in line.y]
    if found and max(found) == min(found):
        axes.set_ylim(found[0] - 0.5, found[0] + 0.5)
    label_ends(axes, lines)
    episodes = facts.config.get("episodes")
    axes.set_title(f"Return in the environment, {episodes} episodes a point", fontsize=10)
    axes.set_xlabel("update")
    axes.grid(axis="y")
    say_if_empty(axes)


def draw_promises(axes: "Axes", facts: Facts) -> None:
    """How often imagination promises success, by round: where reality refuses, and where not."""
    lines = [
        Line(text, *by_round(facts.rows, name), colour) for name, (text, colour) in PROMISES.items()
    ]
    draw_rounds(axes, lines)
    axes.set_ylim(-0.04, 1.04)
    axes.set_title("Decisions that imagination promises success", fontsize=10)
    axes.set_ylabel("share of real moments")


def draw_gap(axes: "Axes", facts: Facts) -> None:
    """What imagined episodes return and what real ones do, by round; between them is the gap."""
    imagined = Line("imagined", *by_round(facts.rows, "imagined_return"), PALETTE[1])
    real = Line("real", *by_round(facts.rows, "real_return"), PALETTE[0])
    if real.x:
        axes.fill_between(real.x, real.y, imagined.y, color=FAINT, alpha=0.2, linewidth=0)
    draw_rounds(axes, [imagined, real])
    axes.set_title("Exploitation gap: imagined and real return", fontsize=10)
    axes.set_ylabel("return")


def draw_rounds(axes: "Axes", lines: Sequence[Line]) -> None:
    """Lines over rounds."""
    for line in lines:
        axes.plot(line.x, line.y, color=line.colour, linewidth=1.8, marker="o", markersize=5)
    last = max((line.x[-1] for line in lines if line.x), default=0)
    axes.set_xticks(range(int(last) + 1))
    axes.set_xlim(-0.2, last + 0.2)
    label_ends(axes, lines)
    axes.set_xlabel("round (0: recordings alone)")
    axes.grid(axis="y")
    say_if_empty(axes)


def by_round(rows: Sequence[Row], name: str) -> tuple[list[float], list[float]]:
    """Rounds and values of a measure."""
    key = f"round/{name}"
    found = [row.metrics for row in rows if "round/number" in row.metrics and key in row.metrics]
    return [one["round/number"] for one in found], [one[key] for one in found]


def draw_film(axes: "Axes", facts: Facts) -> None:
    """Held-out recordings, imagined open loop: truth, model and error."""
    from experiments.predict import name_rows, prediction_grid

    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title("Held-out recordings: blue was seen, orange is imagined", fontsize=10)
    if facts.prediction is None:
        say_if_empty(axes)
        return
    picture = prediction_grid(facts.prediction, "image")
    axes.imshow(picture, aspect="equal", interpolation="nearest", zorder=1)
    name_rows(axes, facts.prediction, picture.shape)


def draw_psnr(axes: "Axes", facts: Facts) -> None:
    """PSNR by imagined step, and what the tokenizer alone can reach."""
    from experiments.predict import psnr

    quality = psnr(facts.prediction, "image") if facts.prediction else {}
    axes.plot([*quality], [*quality.values()], color=PALETTE[1], marker="o", markersize=4)
    _, reached = series(facts.rows, "gate/tokenizer_psnr")
    if reached and quality:
        axes.axhline(reached[-1], color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
        place = {"ha": "right", "va": "bottom", "fontsize": 9, "color": INK}
        axes.text(max(quality), reached[-1], "tokenizer alone", **place)
    axes.set_title("Quality of imagined frames", fontsize=10)
    axes.set_xlabel("imagined step")
    axes.set_ylabel("PSNR (dB)")
    axes.grid(axis="y")
    say_if_empty(axes)


def say_if_empty(axes: "Axes", text: str = NOTHING) -> None:
    """A panel without data says so, and has no scale."""
    if not axes.collections and not any(len(line.get_path()) for line in axes.lines):
        axes.set(xticks=[], yticks=[])
        axes.minorticks_off()
        place = {"transform": axes.transAxes, "ha": "center", "va": "center"}
        axes.text(0.5, 0.5, text, color=FAINT, **place)
