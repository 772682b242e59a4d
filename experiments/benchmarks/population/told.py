"""CartPole users in numbers: one row a claim, an interval over seeds, and what should hold.

Every difference is paired by seed: both sides have the same weights and users, or the same seed.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.benchmarks import metrics
from experiments.benchmarks.population.rounds import Arrays, Size, alike
from experiments.benchmarks.statistics import Interval, bootstrap

AREAS = (1, 10, 100)  # interactions
Found = Mapping[str, Mapping[int, Arrays]]  # arm -> seed -> arrays
Values = dict[str, np.ndarray]  # what is told -> one value a seed


def summary(found: Found, size: Size) -> dict[str, Any]:
    """Intervals by arm, and of the arms' differences on the seeds that they share."""
    rng = np.random.default_rng(0)
    result: dict[str, Any] = {"arms": {}, "size": size._asdict()}
    for arm, seeds in found.items():
        if seeds:
            values = joined([told(one, size, seed) for seed, one in seeds.items()])
            rows = {name: row(bootstrap(x, rng), x) for name, x in values.items()}
            result["arms"][arm] = {"seeds": list(seeds), "rows": rows}
            result["arms"][arm]["rounds"] = by_round(list(seeds.values()), size, rng)
    both = sorted(set(found.get("fast", {})) & set(found.get("memoryless", {})))
    if both:
        ours, theirs = (joined([told(found[a][s], size, s) for s in both]) for a in found)
        result["pairs"] = {
            name: row(bootstrap(x, rng), x) | {"seeds": both}
            for name, x in {
                "new users, fast - memoryless": ours["new users"] - theirs["new users"],
                "known users, fast - memoryless": ours["a known user, own weights"]
                - theirs["new users"],
            }.items()
        }
    result["gates"] = gates(result)
    return result


def by_round(
    seeds: Sequence[Arrays], size: Size, rng: np.random.Generator
) -> dict[str, list[dict[str, float]]]:
    """Held-out users after each round, 0 is untrained: an interval each."""
    zero = np.stack([one["zero"].mean(-1) for one in seeds])  # (seeds, rounds + 1)
    if "fresh" not in seeds[0]:
        found = {"new users": zero}
    else:
        curves = np.stack([one["own"].mean(-1) for one in seeds])  # (seeds, rounds + 1, marks)
        found = {
            "Z: new users, nothing written": zero,
            "G: Z minus that of the round before": np.diff(zero, prepend=zero[:, :1]),
            "new users": np.stack([one["fresh"].mean(-1) for one in seeds]),
            "known users": np.stack([one["back/own"].mean(-1) for one in seeds]),
        } | {
            f"area at {n}": np.apply_along_axis(area, -1, curves, size.marks, n)
            for n in AREAS
            if n <= size.marks[-1]
        }
    return {name: [bootstrap(x, rng)._asdict() for x in values.T] for name, values in found.items()}


def joined(parts: Sequence[Mapping[str, float]]) -> Values:
    """One value a seed, by name."""
    return {name: np.array([part[name] for part in parts]) for name in parts[0]}


def row(interval: Interval, values: np.ndarray) -> dict[str, Any]:
    """An interval and what it is of."""
    return {**interval._asdict(), "by seed": [float(x) for x in values]}


def told(one: Arrays, size: Size, seed: int) -> dict[str, float]:
    """The numbers of one seed: scores, means over users unless the name says otherwise."""
    if "fresh" not in one:
        zero = one["zero"]
        return {"new users": float(zero[-1].mean()), "worst tenth": worst(zero[-1])}
    zero, fresh = one["zero"].mean(-1), one["fresh"].mean(-1)
    own, other = one["own"].mean(-1), one["other"].mean(-1)  # (rounds + 1, marks)
    back = {name: one[f"back/{name}"][-1] for name in ("own", "other")}
    found = {
        "Z: new users, nothing written": zero[-1],
        "new users": fresh[-1],
        "fast - frozen": fresh[-1] - zero[-1],
        "Z, last round - first": zero[-1] - zero[1],
        "new users, last round - first": fresh[-1] - fresh[1],
        "a known user, own weights": back["own"].mean(),
        "a known user's gain": back["own"].mean() - fresh[-1],
        "shuffled ids' gain": back["other"].mean() - fresh[-1],
        "worst tenth, nothing written": worst(one["zero"][-1]),
        "worst tenth": worst(one["fresh"][-1]),
        "worst tenth, known users": worst(back["own"]),
        "old users, own weights - none": float(
            (one["old/with"][-1] - one["old/without"][-1]).mean()
        ),
        "old users, last round - first": float((one["old/with"][-1] - one["old/with"][1]).mean()),
    }
    for n in (*(a for a in AREAS if a <= size.marks[-1]), size.marks[-1]):
        found[f"area at {n}, own - none"] = area(own[-1], size.marks, n) - own[-1, 0]
        found[f"area at {n}, shuffled - none"] = area(other[-1], size.marks, n) - own[-1, 0]
    found |= swapped(one["other"][-1, -1] - one["zero"][-1], alike(seed, size))
    return {name: float(x) for name, x in (found | cohorts(one, size)).items()}


def swapped(gain: np.ndarray, same: np.ndarray) -> dict[str, float]:
    """Gains (U,) of users who read another's fast weights, by whether their actions' signs agree.

    A frozen agent hesitates; one that takes a user for another acts, and is right where they agree.
    """
    parts = {"the same": same, "the other": ~same}
    return {
        f"shuffled - none, {name} sign": float(gain[which].mean()) if which.any() else 0.0
        for name, which in parts.items()
    }


def cohorts(one: Arrays, size: Size) -> dict[str, float]:
    """Consolidation of users of unknown clusters, means over clusters."""
    found: dict[str, float] = {}
    for name, label in (("own", "consolidation"), ("stray", "consolidation of other clusters")):
        part = {
            key.rpartition(f"cohort/{name}/")[2]: x
            for key, x in one.items()
            if key.startswith(f"cohort/{name}/")
        }
        zero = part["zero"].mean(0)  # (updates + 1, U)
        found[f"{label}: gain of new users"] = zero[-1].mean() - zero[0].mean()
        found[f"{label}: gain of the first update"] = zero[1].mean() - zero[0].mean()
        found[f"{label}: gain of the worst tenth"] = float(
            np.mean([worst(x[-1]) - worst(x[0]) for x in part["zero"]])
        )
        found[f"{label}: gain while writing"] = float(
            (part["fresh"][:, -1] - part["fresh"][:, 0]).mean()
        )
        areas = np.array([area(x, size.marks, size.marks[-1]) for x in part["curve"].mean((0, 3))])
        found[f"{label}: gain in area"] = areas[1] - areas[0]
        for key in ("without", "with"):
            old = part[f"old/{key}"].mean((0, 2))
            found[f"{label}: old users {key} their weights"] = old[-1] - old[0]
    ours, theirs = (
        found[f"consolidation{of}: gain of new users"] for of in ("", " of other clusters")
    )
    return found | {"consolidation, gain over that of other clusters": ours - theirs}


def area(scores: np.ndarray, marks: Sequence[int], n: int) -> float:
    """Mean score after 1 to n interactions, straight between the marks where it was measured."""
    at = np.interp(np.arange(1, n + 1), marks, scores)
    return float(metrics.adapt_area(at, n))


def worst(scores: np.ndarray) -> float:
    """Mean of the lowest tenth of users (U,)."""
    return float(np.sort(scores)[: max(1, len(scores) // 10)].mean())


def gates(result: Mapping[str, Any]) -> dict[str, bool]:
    """What should hold."""
    if "fast" not in result["arms"]:
        return {}
    rows, last = result["arms"]["fast"]["rows"], result["size"]["marks"][-1]
    read = rows[f"area at {last}, shuffled - none"]
    return {
        "fast weights help: fast - frozen > 0": rows["fast - frozen"]["low"] > 0,
        "a known user gains: > 0": rows["a known user's gain"]["low"] > 0,
        "shuffled ids gain nothing, writing goes on: <= 0": rows["shuffled ids' gain"]["high"] <= 0,
        "shuffled ids gain nothing, nothing written: <= 0": read["high"] <= 0,
        "consolidation helps users to come: > 0": rows["consolidation: gain of new users"]["low"]
        > 0,
    }


def table(result: Mapping[str, Any]) -> str:
    """As text."""
    lines: list[str] = []
    for arm, part in result["arms"].items():
        seeds = ", ".join(str(seed) for seed in part["seeds"])
        lines += ["", f"CartPole users, {arm}, seeds {seeds}: score, 95 % over seeds"]
        lines += [f"{name:64}{shown(row)}" for name, row in part["rows"].items()]
        for name, rounds in part["rounds"].items():
            means = "".join(f"{interval['value']:8.3f}" for interval in rounds)
            lines.append(f"{name + ', by round':64}{means}")
    for name, row in result.get("pairs", {}).items():
        lines += ["", f"{name:64}{shown(row)}"]
    lines.append("")
    lines += [f"{name}: {'yes' if holds else 'NO'}" for name, holds in result["gates"].items()]
    return "\n".join(lines[1:])


def shown(row: Mapping[str, float]) -> str:
    """An interval."""
    return f"{row['value']:7.3f} [{row['low']:6.3f}, {row['high']:6.3f}]"
