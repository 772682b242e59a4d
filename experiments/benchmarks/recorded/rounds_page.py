"""What rounds of real interaction change, told as text, as a block of the page of results, drawn.

Whether imagination was corrected is read from the intervals: the exploitation gap after the last
round beside the real return, and how many wrong recipes are still promised a tool.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from experiments.benchmarks.results import section, tabled
from experiments.benchmarks.statistics import Interval, shown

MEASURES = {
    "hallucination": "wrong recipes promised a tool",
    "recognised": "right recipes promised a tool",
    "gap": "imagined minus real return",
    "real_return": "real return",
    "imitation": "real return of imitation, before the round's dreams",
}
PANELS = ("hallucination", "recognised", "gap", "real_return")
SHARES = PANELS[:2]  # the others are returns
TITLE = "What recordings never show: Recipes"
Result = Mapping[str, Any]


def table(result: Result) -> str:
    """The result as text: a block a measure, a line an arm, a column a round."""
    lines = [f"{result['seeds']} seeds; means by round, intervals 95 %, paired by seed"]
    for name, row in result["measures"].items():
        lines.append(f"{name}: {MEASURES[name]}")
        for arm, by_round in row["rounds"].items():
            means = "".join(f"{one['value']:8.3f}" for one in by_round)
            lines.append(f"  {arm:8}{means}   rounds change it by {shown(row['change'][arm])}")
        for pair, one in row["differences"].items():
            lines.append(f"  at the end, {pair}: {shown(one)}")
    return "\n".join(lines)


def put(path: Path, result: Result) -> None:
    """Write the block between the tier's marks; at the end of the page where it has none."""
    section(path, f"counterfactual {result['tier']}", TITLE, block(result))


def block(result: Result) -> str:
    """The command, a table with a column a round, what the rounds changed, and a verdict."""
    config, measures = result["config"], result["measures"]
    online = config["online"]
    lines = [
        f"`{result['command']}`; commit {result['commit'][:12]}.",
        "",
        f"{result['seeds']} seeds, each with a tokenizer, a world model and a policy of its own. "
        f"Round 0 learns from recordings alone, which hold no wrong recipe; each round then adds "
        f"{online['episodes']} episodes, {online['finetune']:,} updates of finetuning and "
        f"{online['imagine']:,} in imagination. Means with 95 % intervals over seeds.",
        "",
    ]
    rounds = range(online["rounds"] + 1)
    rows = [
        [MEASURES[name], arm, *(shown(one, ".2f") for one in by_round),
         shown(row["change"][arm], "+.2f")]
        for name, row in measures.items() for arm, by_round in row["rounds"].items()
    ]  # fmt: skip
    heads = ["", "episodes", *(f"round {i}" for i in rounds), "last - first"]
    lines += [*tabled(heads, rows), ""]
    for name, row in measures.items():
        for pair, one in row["differences"].items():
            lines.append(f"- {MEASURES[name]}, after the last round, {pair}: {shown(one)}")
    return "\n".join([*lines, verdict(result)])


def verdict(result: Result) -> str:
    """What the first arm's last round says of the gap, in words."""
    measures, arm = result["measures"], result["arms"][0]
    gaps, returns = (np.array(measures[name]["by seed"][arm]) for name in ("gap", "real_return"))
    first, last = gaps.mean(0)[[0, -1]]
    share = abs(last) / max(returns.mean(0)[-1], 1e-9)
    within = int((np.abs(gaps[:, -1]) < 0.1 * returns[:, -1]).sum())
    return (
        f"The gap, {first:+.3f} before, is {last:+.3f} after the last round: {share:.0%} of the "
        f"real return, and under 10 % of it in {within} of {len(gaps)} seeds."
    )


def draw(result: Result, path: Path) -> None:
    """A panel a measure: means by round and their intervals, a line an arm."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from experiments.record.curves import FAINT, PALETTE, STYLE

    lead = result["arms"][0]
    with rc_context(STYLE):
        figure = Figure(figsize=(4.4 * len(PANELS), 4.2), layout="constrained")
        panels = figure.subplots(1, len(PANELS))
        for axes, name in zip(panels, PANELS, strict=True):
            row = result["measures"][name]
            for (arm, by_round), colour in zip(row["rounds"].items(), PALETTE, strict=False):
                x = np.arange(len(by_round))
                value, low, high = (np.array([r[k] for r in by_round]) for k in Interval._fields)
                label = f"{arm}: {result['about'][arm]}"
                axes.plot(x, value, color=colour, marker="o", linewidth=1.9, label=label)
                axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
                axes.set_xticks(x)
            if name in SHARES:
                axes.set_ylim(-0.03, 1.03)
            if name == "gap":
                axes.axhline(0, color=FAINT, linestyle=(0, (4, 3)))
            if name == "real_return":
                before = [one["value"] for one in result["measures"]["imitation"]["rounds"][lead]]
                axes.plot(before, color=FAINT, marker="o", linestyle=(0, (4, 3)), label="imitation")
                axes.legend(frameon=False, fontsize=8)
            axes.set_title(f"{name}\n{MEASURES[name]}")
            axes.set_xlabel("round (0: recordings alone)")
            axes.grid(axis="y")
        panels[0].legend(frameon=False, fontsize=8)
        seeds = result["seeds"]
        figure.suptitle(f"Recipes: what recordings never show, {seeds} seeds, bands 95 %")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110, facecolor="white")
