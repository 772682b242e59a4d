"""In which weights should an agent dream? `nested bench imagination`: same seeds, three arms.

CartPole with a hidden context that changes once: the world model's fast memory learns each episode
as it is played, and the agent practises in imagination that starts from there. The arms differ in
`model.memory.imagine` alone: `read` dreams in the adapted weights, `off` without the memory, in
`write` the dream goes on writing. Acting and evaluation write in all three. Measured is the mean
evaluation return in a phase's own context, over the phase (the area under the curve) and in its
last evaluations; differences are paired by seed. An arm's seeds train side by side as ordinary
runs; what is finished is not trained again, so a command that was cut can be repeated.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from experiments.benchmarks.learning import LAST, Curve, curves_of, is_of
from experiments.benchmarks.names import names_in
from experiments.benchmarks.statistics import Interval, bootstrap, paired_bootstrap, shown
from experiments.config import Config, ConfigError, load_config
from experiments.record import runs
from experiments.together import check, train_together

ARMS = {
    "read": "in the adapted weights",
    "off": "without the memory",
    "write": "in weights that the dream goes on writing",
}
FIXED = (
    *("tracking.mlflow=false", "tracking.pictures=false", "threads=1"),
    *("checkpoint.every=0", "evaluate.every=500", "evaluate.episodes=16"),
)
MAIN = "area"  # the measure that the verdict is about
Curves = dict[str, list[Curve]]  # by context, in the order of seeds


# ---- runs --------------------------------------------------------------------------------------
def configs_of(arm: str, asked: argparse.Namespace) -> list[Config]:
    """One configuration a seed."""
    words = [
        f"env.contexts=[{asked.contexts}]",
        f"frames={asked.frames}",
        f"tracking.root={asked.root}",
    ]
    words += [*FIXED, *asked.overrides, f"model.memory.imagine={arm}"]
    return [load_config(asked.preset, [f"seed={seed}", *words]) for seed in range(asked.seeds)]


def default_of(asked: argparse.Namespace) -> str:
    """What the preset itself does. Raises ConfigError where there is no memory to dream in."""
    memory = load_config(asked.preset, asked.overrides).model.memory
    if memory.kind == "none":
        raise ConfigError(
            "model.memory.kind", "none", "there are no fast weights to imagine in",
            "choose one, as in model.memory.kind=gated_delta",
        )  # fmt: skip
    return memory.imagine


def finished(config: Config) -> Path | None:
    """The folder of a finished run of just this configuration."""
    for status in runs(Path(config.tracking.root)):
        if status.state == "finished" and is_of(status.path, config):
            return status.path
    return None


def curves(configs: Sequence[Config]) -> Curves:
    """Train an arm's missing seeds side by side; evaluation returns by context."""
    missing = [config for config in configs if finished(config) is None]
    if missing:
        train_together(missing)
    found: Curves = {}
    for config in configs:
        path = finished(config)
        assert path is not None
        for context, curve in curves_of(path).items():
            found.setdefault(context, []).append(curve)
    return found


# ---- measures ----------------------------------------------------------------------------------
def measures(found: Curves, contexts: Sequence[str], frames: int) -> dict[str, np.ndarray]:
    """By name, a value a seed (n,): `area` and `last` are means over phases, MEASURE/PHASE one's.

    An evaluation at the border of two phases ends the earlier one and begins the later one.
    """
    values: dict[str, list[np.ndarray]] = {"area": [], "last": []}
    for i, (begin, end) in enumerate(pairwise(borders(contexts, frames))):
        parts = [within(curve, begin, end) for curve in found[contexts[i]]]
        values["area"].append(np.array([area(*part) for part in parts]))
        values["last"].append(np.array([part[1][-LAST:].mean() for part in parts]))
    result = {name: np.mean(rows, axis=0) for name, rows in values.items()}
    for name, rows in values.items():
        result |= {f"{name}/{i + 1} {contexts[i]}": row for i, row in enumerate(rows)}
    return result


def borders(contexts: Sequence[str], frames: int) -> list[float]:
    """Frames at which phases begin and end."""
    return [frames * i / len(contexts) for i in range(len(contexts) + 1)]


def within(curve: Curve, begin: float, end: float) -> tuple[np.ndarray, np.ndarray]:
    """Frames and returns of the evaluations of a phase, its borders included."""
    inside = (curve.frames >= begin) & (curve.frames <= end)
    if inside.sum() < 2:
        raise ConfigError(
            "evaluate.every", inside.sum(), f"evaluations between frames {begin:g} and {end:g}",
            "evaluate at least twice in a phase",
        )  # fmt: skip
    return curve.frames[inside], curve.returns[inside]


def area(frames: np.ndarray, returns: np.ndarray) -> float:
    """Mean return over the frames, by trapezoids."""
    return float(np.trapezoid(returns, frames) / (frames[-1] - frames[0]))


def summary(
    found: Mapping[str, Mapping[str, np.ndarray]], rng: np.random.Generator
) -> dict[str, Any]:
    """By measure: each arm with its interval, and differences of arms paired by seed."""
    names, result = list(found), {}
    for name in found[names[0]]:
        by_arm = {arm: values[name] for arm, values in found.items()}
        row: dict[str, Any] = {arm: bootstrap(x, rng)._asdict() for arm, x in by_arm.items()}
        for i, one in enumerate(names):
            for other in names[i + 1 :]:
                gain = paired_bootstrap(by_arm[one], by_arm[other], rng)
                row[f"{one} - {other}"] = gain._asdict()
        row["by seed"] = {arm: x.tolist() for arm, x in by_arm.items()}
        result[name] = row
    return result


def verdict(result: Mapping[str, Any], default: str) -> str:
    """What the main measure says about the default."""
    row = result["measures"][MAIN]
    for arm in result["arms"]:
        pair, sign = f"{arm} - {default}", 1.0
        if pair not in row:
            pair, sign = f"{default} - {arm}", -1.0
        if pair in row and min(sign * row[pair]["low"], sign * row[pair]["high"]) > 0:
            return f"{arm} is better than the default, {default}"
    return f"no arm is better than the default, {default}, at 95 %"


# ---- telling -----------------------------------------------------------------------------------
def table(result: Mapping[str, Any]) -> str:
    """The result as text."""
    arms = result["arms"]
    lines = [
        f"{result['seeds']} seeds, {' -> '.join(result['contexts'])}, {result['frames']:,} frames; "
        f"returns in the phase's own context, differences paired by seed (95 %)",
        f"{'measure':18}" + "".join(f"{arm:>9}" for arm in arms),
    ]
    for name, row in result["measures"].items():
        means = "".join(f"{row[arm]['value']:9.1f}" for arm in arms)
        pairs = [key for key in row if " - " in key]
        gains = "".join(f"   {pair} {shown(row[pair], '+.1f')}" for pair in pairs)
        lines.append(f"{name:18}{means}{gains}")
    return "\n".join([*lines, verdict(result, result["default"])])


def draw(found: Mapping[str, Curves], result: Mapping[str, Any], path: Path) -> None:
    """Returns against frames, a panel a context; beside them, the differences."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from experiments.record.curves import STYLE

    contexts = list(dict.fromkeys(result["contexts"]))
    with rc_context(STYLE):
        figure = Figure(figsize=(5.2 * len(contexts) + 4.6, 4.6), layout="constrained")
        widths = [1.2] * len(contexts) + [1.0]
        *panels, right = figure.subplots(1, len(contexts) + 1, width_ratios=widths)
        for context, axes in zip(contexts, panels, strict=True):
            draw_curves(axes, {arm: x[context] for arm, x in found.items()}, context, result)
        draw_gains(right, result)
        lines = panels[0].get_legend_handles_labels()
        figure.legend(*lines, loc="outside lower center", ncols=len(found), frameon=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110, facecolor="white")


def draw_curves(
    axes: Any, found: Mapping[str, Sequence[Curve]], context: str, result: Mapping[str, Any]
) -> None:
    """Mean over seeds and its interval, a line an arm; shaded where the agent is elsewhere."""
    from experiments.record.curves import PALETTE, SHADE

    rng = np.random.default_rng(0)
    spans = pairwise(borders(result["contexts"], result["frames"]))
    for (begin, end), name in zip(spans, result["contexts"], strict=True):
        if name != context:
            axes.axvspan(begin, end, color=SHADE, linewidth=0)
    for (arm, curves), colour in zip(found.items(), PALETTE, strict=False):
        values = np.stack([curve.returns for curve in curves])
        draws = values[rng.integers(0, len(values), (500, len(values)))].mean(1)
        low, high = np.quantile(draws, [0.025, 0.975], axis=0)
        frames = curves[0].frames
        axes.plot(frames, values.mean(0), color=colour, linewidth=1.9, label=f"{arm}: {ARMS[arm]}")
        axes.fill_between(frames, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.set_title(f"{context}, {result['seeds']} seeds; shaded: the agent acts elsewhere")
    axes.set_xlabel("environment frames")
    axes.set_ylabel("evaluation return")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.grid(axis="y")


def draw_gains(axes: Any, result: Mapping[str, Any]) -> None:
    """Paired differences with intervals, a row a measure and pair."""
    from experiments.record.curves import FAINT, INK

    rows = [
        (f"{name}: {pair.replace(' - ', ' − ')}", Interval(**row[pair]))  # noqa: RUF001
        for name, row in result["measures"].items()
        for pair in row
        if " - " in pair
    ]
    for place, (_, found) in enumerate(rows):
        reach = [[found.value - found.low], [found.high - found.value]]
        clear = found.low > 0 or found.high < 0
        axes.errorbar(
            found.value, place, xerr=reach, fmt="o", color=INK if clear else FAINT, capsize=3
        )
    axes.set_yticks(range(len(rows)), [text for text, _ in rows], fontsize=8)
    axes.invert_yaxis()
    axes.axvline(0, color=FAINT, linewidth=1)
    axes.set_title("Differences, paired by seed")
    axes.set_xlabel("return; bars 95 %")
    axes.grid(axis="x")


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, train what is missing, draw, print."""
    parser = argparse.ArgumentParser(
        prog="nested bench imagination",
        description=__doc__,
        epilog="example:\n  nested bench imagination --seeds 10 --root runs/imagination",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--preset", default="default", help="preset or YAML file")
    parser.add_argument("--arms", default=",".join(ARMS), help="with commas (default all)")
    parser.add_argument("--seeds", type=int, default=10, help="how many (default 10)")
    parser.add_argument("--contexts", default="normal,flipped", help="the phases, with commas")
    parser.add_argument("--frames", type=int, default=10_000, help="in all (default 10000)")
    parser.add_argument("--root", default="runs/imagination", help="folder of the runs")
    parser.add_argument("--out", type=Path, help="the picture (default ROOT/imagination.png)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.add_argument("overrides", nargs="*", metavar="field=value", help="of the preset")
    asked = parser.parse_intermixed_args(argv)
    if asked.seeds < 1:
        raise ConfigError("--seeds", asked.seeds, "nothing to train", "give 1 or more")
    default = default_of(asked)
    contexts = asked.contexts.split(",")
    configs = {arm: configs_of(arm, asked) for arm in names_in(asked.arms, ARMS, "--arms", "arm")}
    for arm in configs.values():
        check(arm)
    found: dict[str, Curves] = {}
    for arm, one in configs.items():
        print(f"{arm}: {ARMS[arm]}", file=sys.stderr, flush=True)
        found[arm] = curves(one)
    values = {arm: measures(x, contexts, asked.frames) for arm, x in found.items()}
    result = {
        "arms": list(found),
        "seeds": asked.seeds,
        "contexts": contexts,
        "frames": asked.frames,
        "default": default,
        "measures": summary(values, np.random.default_rng(0)),
    }
    draw(found, result, asked.out or Path(asked.root) / "imagination.png")
    print(json.dumps(result) if asked.json else table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
