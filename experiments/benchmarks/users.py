"""Does a population teach its users? `nested bench users`: exactly, then with an agent.

In the part `linear`, users are weights of a linear map drawn from a Gaussian, or from a mixture
whose clusters are not told. Slow weights and prior are estimated from training users; the gain of
each fast learner on held-out users is given as a share of what Bayes' rule under the true prior
gains, with rates chosen on seeds that are not reported; consolidation is measured against
hierarchical ridge regression. In the part `cartpole`, a Dreamer's users have CartPoles with hidden
signs, gravities and lengths. The control of both: another user's fast weights must not help.
"""

import argparse
import csv
import json
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from experiments.benchmarks.population import cartpole as cartpole_users
from experiments.benchmarks.population import learners
from experiments.benchmarks.population import told as users_told
from experiments.benchmarks.population.consolidation import (
    KEEPS,
    MEASURES,
    OPTIMUM,
    Size,
    consolidate,
    returning,
)
from experiments.benchmarks.population.learners import Learner, bayes, frozen
from experiments.benchmarks.population.linear import LinearUsers, Prior, Session, em, excess
from experiments.benchmarks.statistics import Interval, bootstrap, shown
from experiments.config import ConfigError
from experiments.envs.population import SPLITS, Population

MARKS = (1, 10, 100)  # interactions
TUNING = 1000  # the first seed of those that choose rates
# Scales of a user's numbers around its cluster: one Gaussian of many shapes, a mixture of one.
WORLDS = {
    "one cluster": partial(Population, clusters=1, held=0, within=tuple(np.linspace(1, 0.2, 8))),
    "clusters": partial(Population, within=0.4),
}


Part = tuple[dict[str, Any], str, Path]  # a result, its table, its picture


class Tier(NamedTuple):
    """How much of everything."""

    seeds: int
    prior: int  # training users that the prior is estimated from
    held_out: int  # users that are adapted to
    tuning: int  # users that choose rates, on each of two seeds
    em: int  # steps of EM
    consolidation: Size
    returning: Size


TIERS = {
    "smoke": Tier(2, 800, 200, 40, 12, Size(15, 400, 200), Size(5, 200, 200)),
    "laptop": Tier(10, 5000, 2000, 300, 40, Size(90), Size(10, 2000, 2000)),
}


class Case(NamedTuple):
    """A population of one seed: what is known of it, and users to adapt to."""

    users: LinearUsers
    prior: Prior  # estimated from training users
    held_out: Session
    draw: torch.Generator


class Found(NamedTuple):
    """Results of one seed."""

    share: dict[str, np.ndarray]  # learner -> (T,) share of the optimum's gain
    swapped: dict[str, np.ndarray]  # the same, with another user's fast weights
    slow: dict[str, np.ndarray]  # method -> (rounds + 1, MEASURES)
    returning: dict[str, np.ndarray]  # what happens to displacements -> (rounds,)
    visits: float  # a second, in consolidation


def case_of(world: str, seed: int, tier: Tier, num: int, split: str) -> Case:
    """A population, its prior as estimated, and `num` users of a split with their interactions."""
    users = LinearUsers(WORLDS[world](seed=seed))
    draw = torch.Generator().manual_seed(seed)
    taught = users.session(np.arange(tier.prior), 20, draw)
    prior = em(taught.stats(), len(users.prior().weight), tier.em, draw)
    ids = np.arange(num) + SPLITS[split].start + (tier.prior if split == "train" else 0)
    return Case(users, prior, users.session(ids, max(MARKS), draw), draw)


def shares(
    case: Case, named: Mapping[str, Learner]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Shares (T,) of the Bayes-optimal gain by learner, with a user's own fast weights and others'.

    The losses are expectations over new interactions, not samples.
    """
    session, theta = case.held_out, case.held_out.theta[:, None]
    start = excess(frozen(session, case.prior), theta).mean(0)
    best = start - excess(bayes(session, case.users.prior()), theta).mean(0)

    def share(estimates: Tensor) -> np.ndarray:
        return ((start - excess(estimates, theta).mean(0)) / best).numpy()

    found = {name: learner(session, case.prior) for name, learner in named.items()}
    swapped = {name: share(x.roll(1, 0)) for name, x in found.items()}
    return {name: share(x) for name, x in found.items()}, swapped


def choose(world: str, tier: Tier) -> dict[str, Learner]:
    """Of every grid the learner with the highest mean share at MARKS, on seeds of their own."""
    cases = [case_of(world, TUNING + i, tier, tier.tuning, "train") for i in range(2)]
    marks, chosen = np.array(MARKS) - 1, dict[str, Learner]()
    for name, grid in learners.GRIDS.items():
        tried = {str(i): learner for i, learner in enumerate(grid)}
        found = [shares(case, tried)[0] for case in cases]
        score = {i: np.mean([x[i][marks] for x in found]) for i in tried}
        chosen[name] = tried[max(score, key=lambda i: score[i])]
    return chosen


def measure(world: str, seed: int, tier: Tier, named: Mapping[str, Learner]) -> Found:
    """One seed of one population."""
    case = case_of(world, seed, tier, tier.held_out, "users")
    own, swapped = shares(case, named)
    size, pooled = tier.consolidation, case.prior.pooled()
    begun = time.perf_counter()
    slow = consolidate(case.users, pooled, size, case.held_out, case.draw)
    seconds = time.perf_counter() - begun
    back = returning(case.users, pooled, tier.returning, case.draw)
    return Found(own, swapped, slow, back, size.rounds * size.users / seconds)


# ---- telling -----------------------------------------------------------------------------------
ROUNDS = (1, 2, 5, 10)  # that the table shows, besides the last


def summary(found: Sequence[Found]) -> dict[str, Any]:
    """What the table shows of one population, with intervals over seeds."""
    rng = np.random.default_rng(0)
    return {
        "adaptation": at_marks([x.share for x in found], rng),
        "swapped": at_marks([x.swapped for x in found], rng),
        "consolidation": consolidated([x.slow for x in found], rng),
        "returning": {k: np.mean([x.returning[k] for x in found], 0).tolist() for k in KEEPS},
        "visits a second": float(np.mean([x.visits for x in found])),
    }


def at_marks(found: Sequence[Mapping[str, np.ndarray]], rng: np.random.Generator) -> dict[str, Any]:
    """Intervals over seeds, by learner and number of interactions."""
    rows = {name: np.stack([x[name] for x in found]) for name in found[0]}
    return {
        name: {str(n): bootstrap(values[:, n - 1], rng)._asdict() for n in MARKS}
        for name, values in rows.items()
    }


def consolidated(
    found: Sequence[Mapping[str, np.ndarray]], rng: np.random.Generator
) -> dict[str, Any]:
    """By method: how far from the population's mean, in errors of the optimum; and gains by round.

    Errors are root mean squares over seeds at the last round; a gain is the share of the zero-shot
    gain of the optimum's last round.
    """
    error, zero = MEASURES.index("error"), MEASURES.index("zero-shot")
    best = np.stack([x[OPTIMUM] for x in found])  # (seeds, rounds + 1, MEASURES)
    drawn = rng.integers(0, len(found), (2000, len(found)))
    rows: dict[str, Any] = {}
    for name in found[0]:
        own = np.stack([x[name] for x in found])
        ours, theirs = own[:, -1, error], best[:, -1, error]
        draws = np.sqrt(ours[drawn].mean(1) / theirs[drawn].mean(1))
        ratio = Interval(float(np.sqrt(ours.mean() / theirs.mean())), *np.quantile(draws, ENDS))
        gains = (own[:, :1, zero] - own[..., zero]) / (own[:, :1, zero] - best[:, -1:, zero])
        at = [*(n for n in ROUNDS if n < own.shape[1] - 1), own.shape[1] - 1]
        by_round = {str(n): bootstrap(gains[:, n], rng)._asdict() for n in at}
        rows[name] = {"error": ratio._asdict(), "gain": by_round}
    return rows


def gates(parts: Mapping[str, Any]) -> dict[str, bool]:
    """What should hold of one population."""
    best = [max(row[str(n)]["value"] for row in parts["adaptation"].values()) for n in MARKS]
    swapped = [row[str(n)]["high"] for row in parts["swapped"].values() for n in MARKS]
    errors = [row["error"]["value"] for k, row in parts["consolidation"].items() if k != OPTIMUM]
    loss = parts["returning"]
    return {
        "some learner reaches 95 % of the Bayes-optimal gain at each mark": min(best) >= 0.95,
        "another user's fast weights do not help": max(swapped) <= 0.0,
        "some consolidation errs at most 5 % more than the optimum": min(errors) <= 1.05,
        "taking out what was consolidated is best": loss["taken out"][-1]
        < min(loss["kept"][-1], loss["cleared"][-1]),
    }


def table(result: Mapping[str, Any]) -> str:
    """All populations as text."""
    lines: list[str] = []
    for world, parts in result["populations"].items():
        heads = "".join(f"{f'{n} interactions':>24}" for n in MARKS)
        lines += ["", f"{world}: share of the Bayes-optimal gain, {len(result['seeds'])} seeds"]
        lines += [f"{'':20}{heads}   of another user at {MARKS[-1]}"]
        for name, row in parts["adaptation"].items():
            cells = "".join(f"{shown(row[str(n)], '.3f'):>24}" for n in MARKS)
            lines.append(
                f"{name:20}{cells}   {parts['swapped'][name][str(MARKS[-1])]['value']:.2f}"
            )
        rounds = list(next(iter(parts["consolidation"].values()))["gain"])
        heads = "".join(f"{f'round {n}':>10}" for n in rounds)
        lines += ["", f"{world}: consolidation, {result['size']}"]
        lines += [f"{'':20}{heads}   error / that of the optimum, at the end"]
        for name, row in parts["consolidation"].items():
            cells = "".join(f"{row['gain'][n]['value']:10.4f}" for n in rounds)
            lines.append(f"{name:20}{cells}   {shown(row['error'], '.3f')}")
        lines += ["", f"{world}: loss of returning users, what was consolidated is"]
        for keep, values in parts["returning"].items():
            lines.append(f"{keep:20}" + "".join(f"{value:10.3f}" for value in values))
        lines.append("")
        for gate, holds in parts["gates"].items():
            lines.append(f"{world}: {gate}: {'yes' if holds else 'NO'}")
    return "\n".join(lines[1:])


def long_rows(world: str, seed: int, found: Found) -> list[tuple[Any, ...]]:
    """One seed as rows of COLUMNS."""
    rows: list[tuple[Any, ...]] = []
    for part, curves in (("adaptation", found.share), ("swapped", found.swapped)):
        for name, values in curves.items():
            rows += [(world, seed, part, name, "share", n + 1, v) for n, v in enumerate(values)]
    for name, scores in found.slow.items():
        for n, values in enumerate(scores):
            rows += [
                (world, seed, "consolidation", name, kind, n, v)
                for kind, v in zip(MEASURES, values, strict=True)
            ]
    for keep, values in found.returning.items():
        rows += [(world, seed, "returning", keep, "loss", n + 1, v) for n, v in enumerate(values)]
    return rows


COLUMNS = ("population", "seed", "part", "name", "measure", "n", "value")
ENDS = (0.025, 0.975)


def draw(found: Mapping[str, Sequence[Found]], path: Path, users: int) -> None:
    """Adaptation, consolidation and returning users: a row of panels a population."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from experiments.record.curves import STYLE

    with rc_context(STYLE):
        figure = Figure(figsize=(15, 4.2 * len(found)), layout="constrained")
        panels = figure.subplots(len(found), 3, squeeze=False)
        for (world, seeds), (left, middle, right) in zip(found.items(), panels, strict=True):
            own = {name: np.stack([x.share[name] for x in seeds]) for name in seeds[0].share}
            curves(left, own, 1, f"{world}: adaptation to held-out users")
            left.axhline(1.0, color="#222222", linewidth=1.0, linestyle=(0, (4, 3)))
            left.set(xscale="log", xlabel="interactions of a user", ylim=(-0.02, 1.04))
            left.set_ylabel("share of the Bayes-optimal gain")
            errors = {
                name: np.sqrt(np.stack([x.slow[name][:, 0] for x in seeds]))
                for name in seeds[0].slow
            }
            curves(middle, errors, 0, f"{world}: consolidation")
            middle.set(yscale="log", xlabel=f"slow updates, each after {users:,} users' visits")
            middle.set_ylabel("distance from the population's mean")
            back = {
                f"consolidated part {keep}": np.stack([x.returning[keep] for x in seeds])
                for keep in KEEPS
            }
            curves(right, back, 1, f"{world}: returning users")
            right.set(yscale="log", xlabel="visits of each user")
            right.set_ylabel("excess loss at the start of the next visit")
        figure.savefig(path, dpi=110, facecolor="white")


def curves(axes: Any, found: Mapping[str, np.ndarray], first: int, title: str) -> None:
    """Means over seeds (seeds, n) with bands of 95 %, by name."""
    from experiments.record.curves import INK, PALETTE

    rng = np.random.default_rng(0)
    for i, (name, values) in enumerate(found.items()):
        x = np.arange(first, first + values.shape[1])
        draws = values[rng.integers(0, len(values), (300, len(values)))].mean(1)
        colour = INK if name == OPTIMUM else PALETTE[i % len(PALETTE)]
        dashes = "--" if name == OPTIMUM or i >= len(PALETTE) else "-"
        axes.plot(x, values.mean(0), dashes, color=colour, linewidth=1.7, label=name)
        axes.fill_between(
            x, *np.quantile(draws, ENDS, axis=0), color=colour, alpha=0.2, linewidth=0
        )
    axes.set_title(title)
    axes.grid(axis="y")
    axes.legend(frameon=False, fontsize=8)


def run(tier: Tier, seeds: Sequence[int], out: Path) -> dict[str, Any]:
    """Everything, with users.json, users.csv and users.png in `out`; the result."""
    found: dict[str, list[Found]] = {}
    result: dict[str, Any] = {"seeds": list(seeds), "tier": tier._asdict(), "populations": {}}
    result["size"] = f"{tier.consolidation.users:,} users a round, one visit each"
    rows: list[tuple[Any, ...]] = []
    for world in WORLDS:
        chosen = choose(world, tier)
        named = {**learners.FIXED, **chosen}
        rates = {name: settings(learner) for name, learner in chosen.items()}
        print(f"{world}: tuned {rates}", flush=True)
        found[world] = []
        for seed in seeds:
            begun = time.perf_counter()
            found[world].append(measure(world, seed, tier, named))
            rows += long_rows(world, seed, found[world][-1])
            print(f"{world}, seed {seed}: {time.perf_counter() - begun:.0f} s", flush=True)
        parts = summary(found[world])
        result["populations"][world] = {"tuned": rates, **parts, "gates": gates(parts)}
    out.mkdir(parents=True, exist_ok=True)
    (out / "users.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    with (out / "users.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([COLUMNS, *((*row[:-1], f"{row[-1]:.6g}") for row in rows)])
    draw(found, out / "users.png", tier.consolidation.users)
    return result


def settings(learner: Learner) -> dict[str, float]:
    """The settings of a learner of a grid."""
    return dict(learner.keywords) if isinstance(learner, partial) else {}


def linear(tier: str, seeds: int | None, out: Path) -> Part:
    """The part of linear users."""
    size = TIERS[tier]
    result = run(size, range(size.seeds if seeds is None else seeds), out)
    return result, table(result), out / "users.png"


def cartpole(tier: str, seeds: int | None, out: Path) -> Part:
    """The part of an agent whose users each have a CartPole."""
    size = cartpole_users.TIERS[tier]
    result = cartpole_users.run(size, range(size.seeds if seeds is None else seeds), out)
    return result, users_told.table(result), out / "cartpole.png"


RUNS = {"linear": linear, "cartpole": cartpole}
PARTS = ("all", *RUNS)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, run, print."""
    parser = argparse.ArgumentParser(
        prog="nested bench users",
        description=__doc__,
        epilog="example:\n  nested bench users --tier smoke --out runs/users",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--tier", choices=TIERS, default="laptop", help="(default laptop)")
    parser.add_argument(
        "--part", choices=PARTS, default="all", help="one after the other (default all)"
    )
    parser.add_argument("--seeds", type=int, help="how many, instead of the tier's")
    parser.add_argument("--out", type=Path, default=Path("runs/users"), help="folder")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    asked = parser.parse_args(argv)
    if asked.seeds is not None and asked.seeds < 1:
        raise ConfigError("--seeds", asked.seeds, "nothing to measure", "give 1 or more")
    torch.set_num_threads(1)
    told: dict[str, Any] = {}
    for part in PARTS[1:] if asked.part == "all" else (asked.part,):
        told[part], text, picture = RUNS[part](asked.tier, asked.seeds, asked.out)
        if not asked.json:
            print(text, flush=True)
        print(f"curves  {picture}", file=sys.stderr if asked.json else sys.stdout, flush=True)
    if asked.json:
        print(json.dumps(told if asked.part == "all" else told[asked.part]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
