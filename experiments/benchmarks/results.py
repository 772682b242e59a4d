"""The page of results: tables of a tier of the continual benchmark as Markdown, between marks.

What stands between `<!-- continual TIER -->` and `<!-- end TIER -->` is written anew from the cells
that are there, and says which are missing; what people wrote around it stays. Whether a schedule
beats both its controls is not for them to say: it is read from the intervals.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.benchmarks.cells import Cell, Result
from experiments.benchmarks.tasks.board import interval
from experiments.benchmarks.tasks.summary import CONTROLS, SCHEDULES

# Columns, as metric: head. Those that no method of a stream has are left out.
SHOWN = {
    "ALA": "ALA",
    "AP_final": "AP_final",
    "F": "F",
    "online": "online",
    "frames_to_learn": "frames to learn",
    "again/kept": "kept",
    "again/auc": "area, again",
    "again/savings": "savings",
    "again/frames_to_learn": "frames, again",
    "dormant": "dormant",
    "plasticity/dormant": "dormant",
    "again/AP_final": "AP_final, again",
}
FREE = {**SHOWN, "dynamic_regret": "regret"}  # of a stream without tasks
LEFT_OUT = ("tasks", "phases", "again", "hidden")  # of the options that are listed


def page_of(
    command: str, plan: Sequence[Cell], results: Mapping[str, Result], summary: Mapping[str, Any]
) -> str:
    """The block of a tier, and the command that gives it."""
    commits = sorted({str(result.info.get("commit") or "unknown") for result in results.values()})
    seconds = sum(costed(result) for result in results.values())
    lines = [
        f"`{command}`; {len(results)} of {len(plan)} cells, {seconds / 60:.0f} core-minutes, "
        f"commit {', '.join(c[:12] + '+' * c.endswith('+') for c in commits)}.",
    ]
    for stream in dict.fromkeys(cell.stream for cell in plan):
        cells = [cell for cell in plan if cell.stream == stream]
        lines += ["", f"### {stream}", "", described(cells[0])]
        missing = [cell.method for cell in cells if cell.key not in results]
        if missing:
            lines += ["", f"**Not run yet:** {', '.join(missing)}."]
        if "unit" in summary.get(stream, {}):
            lines += ["", f"Scores: {summary[stream]['unit']}."]
        if stream in summary:
            lines += ["", *measured(summary[stream]), *differences(summary[stream])]
            if set(SCHEDULES) & {cell.method for cell in cells}:
                lines += ["", verdict(summary[stream])]
    return "\n".join(lines)


def described(cell: Cell) -> str:
    """What the cells of a stream share."""
    shown = (f"{k}={v}" for k, v in cell.options.items() if k not in LEFT_OUT and v != "")
    again = cell.options.get("again")
    back = f", then `{again}` again" if again else ""
    tasks, phases = cell.options.get("tasks", "no"), cell.options.get("phases")
    what = f"{tasks} contexts in {phases} phases that are drawn" if phases else f"{tasks} tasks"
    head = f"{len(cell.seeds)} seeds, {what}{back}."
    return f"{head} Means over seeds with 95 % bootstrap intervals. `{' '.join(shown)}`"


def measured(found: Mapping[str, Any]) -> list[str]:
    """A row for each method: metrics and costs."""
    methods = found["methods"]
    heads = heads_of(row["metrics"] for row in methods.values())
    costs = ("core-s a seed", "core us a row", "MFLOP a row", "KB a row")
    rows = [
        [f"`{method}`", *(cell_of(name, row["metrics"].get(name)) for name in heads),
         *costs_of(row["cost"], len(found["seeds"]))]
        for method, row in methods.items()
    ]  # fmt: skip
    return tabled(["method", *heads.values(), *costs], rows)


def heads_of(rows: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """The columns of metrics that are there, as metric: head."""
    there = {name for row in rows for name in row}
    shown = SHOWN if "ALA" in there else FREE
    return {name: head for name, head in shown.items() if name in there}


def costs_of(cost: Mapping[str, Any], seeds: int) -> list[str]:
    """Processor time, operations and bytes of levels; a row is an agent's frame, or an example."""
    return [
        f"{cost['core_seconds'] / seeds:.1f}",
        f"{cost['core_us_per_interaction']:,.0f}",
        f"{cost['flops_per_interaction'] / 1e6:,.2f}",
        f"{cost['bytes_per_interaction'] / 1e3:,.1f}",
    ]


def differences(found: Mapping[str, Any]) -> list[str]:
    """Differences paired by seed; bold where the interval leaves out zero."""
    pairs = found["pairs"]
    if not pairs:
        return []
    heads = heads_of(pairs.values())
    rows = [
        [f"`{pair}`", *(cell_of(name, row.get(name), True) for name in heads)]
        for pair, row in pairs.items()
    ]
    return ["", "Differences, paired by seed:", "",
            *tabled(["difference", *heads.values()], rows)]  # fmt: skip


def verdict(found: Mapping[str, Any]) -> str:
    """Which schedules forget less, or learn again faster, than both controls."""
    pairs = found["pairs"]
    whole = {name: [f"{name} - {other}" for other in CONTROLS[name][:2]] for name in SCHEDULES}
    judged = {name: own for name, own in whole.items() if set(own) <= set(pairs)}
    if not judged:
        return "No schedule stands beside both its controls yet."
    if not any("F" in row for row in pairs.values()):
        lives = [name for name, own in judged.items() if beats(pairs, own, "online", 1)]
        return (
            f"Of {listed(list(judged))}, live better than both controls (online) with an interval "
            f"that leaves out zero: {listed(lives)}."
        )
    forgets = [name for name, own in judged.items() if beats(pairs, own, "F", -1)]
    keeps = [name for name in forgets if not beats(pairs, judged[name], "ALA", -1, any)]
    learns = [name for name, own in judged.items() if beats(pairs, own, "again/auc", 1)]
    ends = [name for name, own in judged.items() if beats(pairs, own, "AP_final", 1)]
    back = f" More area when the context comes back: {listed(learns)}."
    return (
        f"Of {listed(list(judged))}, forget less than both controls (rates of the same groups, "
        f"accumulation) with an interval that leaves out zero: {listed(forgets)}; of these with "
        f"no loss of learning accuracy: {listed(keeps)}. Higher in the end (AP_final): "
        f"{listed(ends)}.{back if has_back(pairs) else ''}"
    )


def has_back(pairs: Mapping[str, Any]) -> bool:
    """Whether a context came back."""
    return any("again/auc" in row for row in pairs.values())


def beats(
    pairs: Mapping[str, Any],
    names: Sequence[str],
    metric: str,
    sign: int,
    over: Any = all,
) -> bool:
    """Whether these differences are on the side of `sign` with their whole interval."""
    rows = [pairs[name].get(metric) for name in names]
    return over(row and (row["low"] > 0 if sign > 0 else row["high"] < 0) for row in rows)


# ---- text --------------------------------------------------------------------------------------
def cell_of(name: str, row: Mapping[str, float] | None, sign: bool = False) -> str:
    """An interval; frames without decimals, a difference bold where zero is outside."""
    if row is None:
        return ""
    if "frames" in name:
        form = "+,.0f" if sign else ",.0f"
        text = f"{row['value']:{form}} [{row['low']:{form}}, {row['high']:{form}}]"
    else:
        text = interval(row, sign).replace(",", ", ")
    return f"**{text}**" if sign and (row["low"] > 0 or row["high"] < 0) else text


def tabled(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a table."""
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def listed(names: Sequence[str]) -> str:
    """Names, or none."""
    return ", ".join(f"`{name}`" for name in names) or "none"


def costed(result: Result) -> float:
    """Core seconds of a cell, evaluations included where they were counted."""
    info = result.info
    return info.get("core_seconds_with_evaluation", info["core_seconds"])


def put(path: Path, tier: str, block: str) -> None:
    """Write the block between the tier's marks; at the end of the page where it has none."""
    begin, end = f"<!-- continual {tier} -->", f"<!-- end {tier} -->"
    between(path, begin, end, f"Continual learning, tier {tier}", block)


def section(path: Path, mark: str, heading: str, block: str) -> None:
    """Write a block between `<!-- MARK -->` and `<!-- end MARK -->`, as `between` does."""
    between(path, f"<!-- {mark} -->", f"<!-- end {mark} -->", heading, block)


def between(path: Path, begin: str, end: str, heading: str, block: str) -> None:
    """Write a block between two marks; under a heading at the page's end where it has none."""
    text = path.read_text("utf-8") if path.exists() else "# Results\n"
    if begin not in text:
        text = f"{text.rstrip()}\n\n## {heading}\n\n{begin}\n{end}\n"
    before, _, rest = text.partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise ValueError(f"{path}: {begin} has no {end} after it; put it where the tables end")
    path.write_text(f"{before}{begin}\n{block}\n{end}{after}", encoding="utf-8")
