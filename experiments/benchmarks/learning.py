"""Does an agent learn? `nested bench learning`: one preset, several seeds, curves and a table.

Seeds are trained one after another as ordinary runs. A seed whose finished run, of the very same
configuration, is already there is taken as it is, and one that was stopped goes on; so the command
can be repeated, or split over processes with --first, and draws in the end what all of them gave.
With --together small agents are trained side by side in one program, which takes less time.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.benchmarks.statistics import bootstrap
from experiments.config import Config, ConfigError, load_config
from experiments.progress import brief
from experiments.record import Run, RunError, runs
from experiments.record.curves import INK, PALETTE, series
from experiments.record.metrics import read

LAST = 3  # evaluations in a run's final score


class Curve(NamedTuple):
    """Evaluation returns of one seed in one context."""

    seed: int
    frames: np.ndarray  # (n,) environment frames
    returns: np.ndarray  # (n,)
    seconds: float  # wall clock of the run

    @property
    def final(self) -> float:
        """Mean of the last three evaluations."""
        return float(self.returns[-LAST:].mean())


def train_seed(config: Config) -> Path:
    """The folder of this configuration's finished run: found, gone on with, or trained."""
    from experiments.train import train

    found = {status.state: status.path for status in runs(Path(config.tracking.root))
             if is_of(status.path, config)}  # fmt: skip
    if "finished" in found:
        return found["finished"]
    if "running" in found:
        raise ConfigError(
            "seed", config.seed, f"{found['running']} is training in another process",
            "wait for it, or start at another seed with --first",
        )  # fmt: skip
    unfinished = found.get("stopped") or found.get("failed")
    if unfinished is not None and any((unfinished / "checkpoints").glob("*")):
        return train(config, unfinished)
    return train(config)


def is_of(path: Path, config: Config) -> bool:
    """Whether a run's folder holds a run of just this configuration."""
    try:
        return load_config(path) == config
    except ConfigError:
        return False


def curves_of(path: Path) -> dict[str, Curve]:
    """The evaluation returns of a run, by context."""
    rows, run = read(path / "metrics.jsonl"), Run.open(path)
    names = sorted({name for row in rows for name in row.metrics if name.startswith("eval/")})
    seconds = rows[-1].wall - rows[0].wall if rows else 0.0
    curves: dict[str, Curve] = {}
    for name in names:
        if name.endswith("/return"):
            frames, returns = map(np.array, series(rows, name))
            curves[name.split("/")[1]] = Curve(run.info["seed"], frames, returns, seconds)
    return curves


def reached(curve: Curve, threshold: float) -> float | None:
    """Frames at the first evaluation that is at or above the threshold."""
    above = np.flatnonzero(curve.returns >= threshold)
    return float(curve.frames[above[0]]) if len(above) else None


def mean_curve(curves: Sequence[Curve]) -> tuple[np.ndarray, np.ndarray]:
    """Mean over seeds at the frames that all of them were evaluated at."""
    common = sorted(set.intersection(*(set(curve.frames.tolist()) for curve in curves)))
    values = [c.returns[np.isin(c.frames, common)] for c in curves]
    return np.array(common), np.mean(values, axis=0)


def table(curves: Mapping[str, Sequence[Curve]], threshold: float | None) -> str:
    """One line a seed, and the mean over seeds with its interval."""
    goal = "" if threshold is None else f"{f'frames to {threshold:g}':>18}"
    head = f"{'seed':>6}{'last':>10}{f'last {LAST}':>10}{'best':>10}{goal}{'seconds':>10}"
    lines: list[str] = []
    for context, found in curves.items():
        lines += [context, head] if len(curves) > 1 else [head]
        lines += [line(curve, threshold) for curve in found]
        finals = np.array([curve.final for curve in found])
        mean = bootstrap(finals, np.random.default_rng(0))
        lines.append(
            f"mean of the last {LAST} evaluations over {plural(len(found))}: {brief(mean.value)} "
            f"[{brief(mean.low)}, {brief(mean.high)}]"
        )
        frames, values = mean_curve(found)
        if threshold is not None:
            above = np.flatnonzero(values >= threshold)
            when = f"at {frames[above[0]]:,.0f} frames" if len(above) else "never"
            lines.append(f"the mean over seeds reaches {threshold:g} {when}")
    return "\n".join(lines)


def line(curve: Curve, threshold: float | None) -> str:
    """A seed's row of the table."""
    scores = (curve.returns[-1], curve.final, curve.returns.max())
    text = f"{curve.seed:6}" + "".join(f"{brief(score):>10}" for score in scores)
    if threshold is not None:
        frames = reached(curve, threshold)
        text += f"{'-' if frames is None else f'{frames:,.0f}':>18}"
    return text + f"{curve.seconds:10,.0f}"


def plural(seeds: int) -> str:
    """`1 seed`, `5 seeds`."""
    return f"{seeds} seed" + "s" * (seeds != 1)


def draw(
    curves: Mapping[str, Sequence[Curve]], title: str, threshold: float | None, path: Path
) -> None:
    """Returns against frames: seeds thin, their mean bold; a panel a context."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from experiments.record.curves import STYLE

    with rc_context(STYLE):
        figure = Figure(figsize=(1.5 + 6.5 * len(curves), 4.4), layout="constrained")
        panels = figure.subplots(1, len(curves), squeeze=False)[0]
        for axes, (context, found) in zip(panels, curves.items(), strict=True):
            for curve in found:
                axes.plot(curve.frames, curve.returns, color=PALETTE[0], alpha=0.35, linewidth=0.9)
            axes.plot(*mean_curve(found), color=PALETTE[0], linewidth=2.6, label="mean of seeds")
            if threshold is not None:
                dashes = {"linestyle": (0, (4, 3)), "linewidth": 1.1, "color": INK}
                axes.axhline(threshold, label=f"threshold {threshold:g}", **dashes)
            axes.set_title(f"{title}, {plural(len(found))}" if len(curves) == 1 else context)
            axes.set_xlabel("environment frames")
            axes.set_ylabel("evaluation return")
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
            axes.grid(axis="y")
            axes.legend(frameon=False, fontsize=9)
        if len(curves) > 1:
            figure.suptitle(title, fontweight="bold")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110, facecolor="white")


def train_missing(configs: Sequence[Config], processes: int = 1) -> None:
    """Train the seeds that have no run yet side by side, divided between so many processes."""
    from experiments.together import train_together

    missing = [c for c in configs if not any(is_of(s.path, c) for s in runs(Path(c.tracking.root)))]
    if len(missing) > 1:
        train_together(missing, processes=processes)


def collect(configs: Sequence[Config]) -> dict[str, list[Curve]]:
    """Train what is missing, one seed after another; curves by context, in the order of seeds."""
    by_context: dict[str, list[Curve]] = {}
    for config in configs:
        try:
            path = train_seed(config)
        except RunError as error:
            problem, _, way_out = str(error).partition("; ")
            raise ConfigError("seed", config.seed, problem, way_out) from error
        for context, curve in curves_of(path).items():
            by_context.setdefault(context, []).append(curve)
    return by_context


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, train, draw, print."""
    from experiments.envs.known import check_env

    parser = argparse.ArgumentParser(
        prog="nested bench learning",
        description=__doc__,
        epilog="example:\n  nested bench learning --preset cartpole --threshold 450",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--preset", default="cartpole", help="preset or YAML file")
    parser.add_argument("--seeds", type=int, default=5, help="how many (default 5)")
    parser.add_argument("--first", type=int, default=0, help="the first seed (default 0)")
    parser.add_argument("--threshold", type=float, help="a return to reach, drawn as a line")
    parser.add_argument(
        "--together", action="store_true", help="train the seeds side by side, in one program"
    )
    parser.add_argument(
        "--processes", type=int, default=1, help="that divide seeds which train --together"
    )
    parser.add_argument("--root", default="runs/learning", help="folder of the runs")
    parser.add_argument("--out", type=Path, help="the picture (default ROOT/PRESET.png)")
    parser.add_argument("overrides", nargs="*", metavar="field=value", help="fields to change")
    asked = parser.parse_intermixed_args(argv)
    if asked.seeds < 1:
        raise ConfigError("--seeds", asked.seeds, "nothing to train", "give 1 or more")
    if asked.processes < 1:
        raise ConfigError("--processes", asked.processes, "nothing to train in", "give 1 or more")
    common = [f"tracking.root={asked.root}", *asked.overrides]
    seeds = range(asked.first, asked.first + asked.seeds)
    configs = [load_config(asked.preset, [f"seed={seed}", *common]) for seed in seeds]
    check_env(configs[0])
    if asked.together:
        train_missing(configs, asked.processes)
    curves = collect(configs)
    out = asked.out or Path(asked.root) / f"{Path(asked.preset).stem}.png"
    draw(curves, configs[0].env.id, asked.threshold, out)
    print(table(curves, asked.threshold))
    print(f"curves  {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
