"""What the dynamics benchmark found, as text, as a block of the page of results, and drawn.

Whether the paper's ordering shows is read from the intervals, not said by people: a step of the
cascade counts as a gain where the interval of its difference leaves out zero.
"""

from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from experiments.benchmarks.results import listed, section, tabled
from experiments.benchmarks.statistics import Interval, shown

Row = Mapping[str, Any]
ENOUGH = 3  # seeds for a verdict
CLIPS = 3  # shown as pictures
PAPER = {  # FVD of its Table 2, by variant and whether the steps are more than four
    ("v", False): 875,
    ("shortcut", False): 329,
    ("x", False): 326,
    ("x-loss", False): 151,
    ("ramp", False): 102,
    ("v", True): 306,
}
CASCADES = {"ablation": 4, "single": 1}  # parts whose rows are the paper's: sampling steps
GOOD = {"psnr": 1, "frechet": -1}  # which sign of a difference is better
TITLES = {
    "ablation": "Shortcut forcing, piece by piece",
    "single": "Shortcut forcing, piece by piece, one sampling step",
    "steps": "Sampling steps, with shortcuts and without",
    "labels": "Actions for some episodes only",
}


# ---- text --------------------------------------------------------------------------------------
def name_of(key: Sequence[Any], result: Row) -> str:
    """A variant and its sampling steps, in words."""
    variant, steps = key
    return f"{result['variants'][variant]}, {steps} step{'s' * (steps > 1)}"


def told(result: Row) -> str:
    """The result as text."""
    size, seen = result["size"], result["reference"]
    lines = [
        f"{result['seeds']} seeds, {size['updates']:,} updates each; means, 95 %, paired by seed; "
        f"tokenizer {seen['gate']:.1f} dB",
        f"last frame repeated {np.mean(seen['repeat']):.2f} dB; real chunks, held out: distance "
        f"{seen['real']:.3f}, decoded {seen['decoded']:.3f}, still {seen['still']:.3f}",
    ]
    for part, row in result["parts"].items():
        lines += ["", f"{part}: {TITLES[part]}"]
        lines.append(f"{'':44}{'PSNR, dB':>24}{'distance':>28}{'ms a frame':>12}")
        for one in row["rows"]:
            numbers = f"{shown(one['psnr'], '.2f'):>24}{shown(one['frechet'], '.3f'):>28}"
            name = name_of((one["variant"], one["steps"]), result)
            lines.append(f"{name:44}{numbers}{one['ms']['value']:12.1f}")
        for one in row["differences"]:
            pair = f"{name_of(one['first'], result)} - {name_of(one['second'], result)}"
            lines.append(f"  {pair}: {shown(one['psnr'], '+.2f')} dB, distance "
                         f"{shown(one['frechet'], '+.3f')}")  # fmt: skip
        lines.append(verdict(part, row, result))
    return "\n".join(lines)


def verdict(part: str, row: Row, result: Row) -> str:
    """What the intervals of a part say."""
    if part == "labels":
        found = row["share"]["interval"]
        name = name_of((row["rows"][1]["variant"], row["rows"][1]["steps"]), result)
        return f"{name}: {shown(found, '.2f')} of the gain in PSNR that all actions give."
    said = [order(row)] if part in CASCADES else []
    if result["seeds"] < ENOUGH:
        return " ".join([*said, f"Seeds: {result['seeds']}, too few to call a difference clear."])
    for measure, title in (("frechet", "distance"), ("psnr", "PSNR")):
        for word, sign in (("better", GOOD[measure]), ("worse", -GOOD[measure])):
            pairs = [
                f"{name_of(one['first'], result)} than {name_of(one['second'], result)}"
                for one in row["differences"]
                if clear(one[measure], sign)
            ]
            said.append(f"Clearly {word} {title}: {listed(pairs)}.")
    return " ".join(said)


def order(row: Row) -> str:
    """How many pairs of rows stand in the paper's order."""
    found = [(PAPER[one["variant"], one["steps"] > 4], one["frechet"]["value"])
             for one in row["rows"]]  # fmt: skip
    pairs = list(combinations(found, 2))
    same = sum((a[0] < b[0]) == (a[1] < b[1]) for a, b in pairs)
    return f"Of {len(pairs)} pairs of rows, {same} have distances in the order of the paper's FVD."


def clear(row: Row, sign: int) -> bool:
    """Whether a difference is on the side of `sign` with its whole interval."""
    return row["low"] > 0 if sign > 0 else row["high"] < 0


def block(result: Row) -> str:
    """The section of a tier, in Markdown."""
    seen, size = result["reference"], result["size"]
    train, held = seen["episodes"]
    lines = [
        f"`{result['command']}`: means over seeds, 95 % bootstrap intervals, differences "
        f"paired by seed. Recipes in a room of {size['room']} x {size['room']} cells at 32 x 32 "
        f"pixels; an expert, {size['noise']:.0%} of whose steps are random; {train} episodes "
        f"({seen['frames'][0]:,} frames), {held} more held out. One tokenizer ({seen['gate']:.1f} "
        f"dB). Each model: {size['updates']:,} updates of {size['batch']} rows, LaProp at "
        f"{size['rate']:g}, averaged weights, k_max {size['k_max']}; "
        f"{np.mean(list(result['training'].values())):.0f} CPU seconds of training on one thread.",
        "",
        f"PSNR: {size['horizon']} frames after {size['watched']} of {size['sequences']} held-out "
        f"clips, with their actions, in dB of the mean error, averaged over the frames. The last "
        f"frame repeated has {np.mean(seen['repeat']):.2f}, what the tokenizer makes of the truth "
        f"{np.mean(seen['tokenizer']):.2f}. Distance: squared Fréchet distance of chunks of "
        f"{size['chunk']} frames, from {size['rollouts']} rollouts of {size['drift']} frames "
        f"made from nothing, with the actions of held-out clips, to chunks of the recordings. "
        f"Images are encoded by the tokenizer; the mean of a chunk's latents and the differences "
        f"of neighbouring frames, each over its deviation in recordings, are projected to "
        f"{size['components']} principal components each. Held-out recordings have "
        f"{seen['real']:.3f} (decoded from their latents {seen['decoded']:.3f}), still pictures "
        f"{seen['still']:.3f}.",
    ]
    for part, row in result["parts"].items():
        papers = PAPER if part in CASCADES else {}
        lines += ["", f"### {TITLES[part]}", "", *rows_of(row, result, papers), ""]
        lines += pairs_of(row, result)
        lines += ["", verdict(part, row, result)]
    return "\n".join(lines)


def rows_of(row: Row, result: Row, papers: Mapping[tuple[str, bool], int]) -> list[str]:
    """A table of rows; `papers`: what a paper says of them."""
    head = ["model", "PSNR, dB", "first frame", "last frame", "latent error", "distance"]
    head += ["CPU ms a frame", *(["FVD in the paper"] if papers else [])]
    cells = [
        [
            name_of((one["variant"], one["steps"]), result),
            shown(one["psnr"], ".2f"),
            f"{one['by horizon'][0]:.1f}",
            f"{one['by horizon'][-1]:.1f}",
            shown(one["mse"], ".3f"),
            shown(one["frechet"], ".3f"),
            f"{one['ms']['value']:.1f}",
            *([str(papers[one["variant"], one["steps"] > 4])] if papers else []),
        ]
        for one in row["rows"]
    ]
    return tabled(head, cells)


def pairs_of(row: Row, result: Row) -> list[str]:
    """A table of differences; bold where enough seeds give an interval that leaves out zero."""
    cells, enough = [], result["seeds"] >= ENOUGH
    for one in row["differences"]:
        found = [shown(one[name], form) for name, form in (("psnr", "+.2f"), ("frechet", "+.3f"))]
        bold = [enough and (clear(one[name], 1) or clear(one[name], -1)) for name in GOOD]
        pair = f"{name_of(one['first'], result)} − {name_of(one['second'], result)}"  # noqa: RUF001
        cells.append([pair, *(f"**{x}**" if b else x for x, b in zip(found, bold, strict=True))])
    return tabled(["difference", "PSNR, dB", "distance"], cells)


def put(path: Path, result: Row) -> None:
    """Write the block between the tier's marks; at the end of the page where it has none."""
    heading = f"World models from recordings, tier {result['tier']}"
    section(path, f"dynamics {result['tier']}", heading, block(result))


# ---- pictures ----------------------------------------------------------------------------------
def draw(result: Row, cells: Path, folder: Path) -> list[Path]:
    """A picture of each part, and of what was imagined beside the truth; their paths."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from experiments.record.curves import STYLE

    folder.mkdir(parents=True, exist_ok=True)
    made = []
    with rc_context(STYLE):
        for part, row in result["parts"].items():
            figure = Figure(figsize=(12.5, 4.6), layout="constrained")
            DRAW[part](figure, row, result)
            figure.suptitle(f"{TITLES[part]}: {result['seeds']} seeds, 95 %")
            made.append(folder / f"dynamics_{part}.png")
            figure.savefig(made[-1], dpi=110, facecolor="white")
        if "steps" in result["parts"]:
            made.append(folder / "dynamics_video.png")
            draw_video(result, cells, made[-1])
    return made


def draw_ablation(figure: Any, row: Row, result: Row) -> None:
    """PSNR by horizon, a line a row; their distances beside it."""
    left, right = figure.subplots(1, 2, width_ratios=(1.2, 1))
    draw_horizon(left, row["rows"], result)
    draw_bars(right, row["rows"], result)


def draw_steps(figure: Any, row: Row, result: Row) -> None:
    """PSNR by horizon of the full model; PSNR and distance against steps of both."""
    from experiments.record.curves import FAINT, PALETTE

    left, *panels = figure.subplots(1, 3, width_ratios=(1.2, 1, 1))
    variants = list(dict.fromkeys(one["variant"] for one in row["rows"]))
    draw_horizon(left, [one for one in row["rows"] if one["variant"] == variants[0]], result)
    for axes, name in zip(panels, GOOD, strict=True):
        for variant, colour in zip(variants, PALETTE, strict=False):
            rows = [one for one in row["rows"] if one["variant"] == variant]
            steps, found = [one["steps"] for one in rows], [Interval(**one[name]) for one in rows]
            value, low, high = zip(*found, strict=True)
            label = result["variants"][variant]
            axes.plot(steps, value, color=colour, marker="o", label=label)
            axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.set_xscale("log", base=2)
        axes.set_xticks(steps, [str(k) for k in steps])
        axes.set_xlabel("sampling steps a frame")
        axes.grid(axis="y")
    panels[0].set_title("PSNR, dB")
    panels[1].set_title("Distance of dreams (dashes: real)")
    panels[1].axhline(result["reference"]["real"], color=FAINT, linestyle=(0, (4, 3)))
    panels[1].set_ylim(bottom=0)
    panels[1].legend(frameon=False, fontsize=8.5)


def draw_labels(figure: Any, row: Row, result: Row) -> None:
    """PSNR by horizon, a line for each share of labels; what each seed keeps of the gain."""
    from experiments.record.curves import FAINT, PALETTE

    left, right = figure.subplots(1, 2, width_ratios=(1.4, 1))
    draw_horizon(left, row["rows"], result)
    found = row["share"]
    each, found = row["share"]["by seed"], Interval(**row["share"]["interval"])
    reach = [[found.value - found.low], [found.high - found.value]]
    right.scatter(each, np.zeros(len(each)), color=FAINT, s=28, label="a seed")
    right.errorbar(
        found.value, 0.3, xerr=reach, fmt="o", color=PALETTE[0], capsize=4, label="mean, 95 %"
    )
    for place, text in ((0, "no actions"), (0.85, "85 %"), (1, "all actions")):
        right.axvline(place, color=FAINT, linewidth=1, linestyle=(0, (4, 3)))
        right.text(place, 0.97, f" {text}", rotation=90, va="top", ha="right", fontsize=8.5)
    right.set_ylim(-0.6, 1.4)
    right.set_yticks([])
    right.set_xlabel("share of the gain in PSNR")
    right.set_title("Actions of 10 % of the episodes")
    right.legend(frameon=False, loc="lower left")


DRAW = {**dict.fromkeys(CASCADES, draw_ablation), "steps": draw_steps, "labels": draw_labels}


def draw_horizon(axes: Any, rows: Sequence[Row], result: Row) -> None:
    """PSNR of each imagined frame, named at the right end; dashes: the last frame repeated."""
    from experiments.record.curves import FAINT, PALETTE, Line, label_ends

    lines = []
    for one, colour in zip(rows, [*PALETTE, "#A0522D"], strict=False):
        x, y = range(1, len(one["by horizon"]) + 1), one["by horizon"]
        axes.plot(x, y, color=colour, linewidth=1.8)
        lines.append(Line(name_of((one["variant"], one["steps"]), result), x, y, colour))
    repeat = result["reference"]["repeat"]
    axes.plot(range(1, len(repeat) + 1), repeat, color=FAINT, linestyle=(0, (4, 3)))
    lines.append(Line("last frame repeated", range(1, len(repeat) + 1), repeat, FAINT))
    label_ends(axes, lines)
    axes.set_xticks([1, *range(4, len(repeat) + 1, 4)])
    axes.set_xlabel("frames after what was seen")
    axes.set_title("PSNR, dB")
    axes.grid(axis="y")


def draw_bars(axes: Any, rows: Sequence[Row], result: Row) -> None:
    """Distances with intervals, a bar a row; dashes: real recordings that were held out."""
    from experiments.record.curves import FAINT, INK, PALETTE

    found = [Interval(**one["frechet"]) for one in rows]
    for place, (one, colour) in enumerate(zip(found, PALETTE, strict=False)):
        axes.barh(place, one.value, color=colour, alpha=0.85, height=0.62)
        reach = [[one.value - one.low], [one.high - one.value]]
        axes.errorbar(one.value, place, xerr=reach, color=INK, capsize=3)
    names = [name_of((one["variant"], one["steps"]), result) for one in rows]
    axes.set_yticks(range(len(rows)), names)
    axes.invert_yaxis()
    axes.axvline(result["reference"]["real"], color=FAINT, linestyle=(0, (4, 3)))
    axes.locator_params(axis="x", nbins=5)
    axes.set_xlabel("Fréchet distance; dashes: recordings held out")
    axes.set_title("Dreams from nothing")
    axes.grid(axis="x")


def draw_video(result: Row, cells: Path, path: Path) -> None:
    """Frames of the first held-out clips: the truth, and what the first seed imagines of it."""
    from matplotlib.figure import Figure

    from experiments.record.curves import PALETTE

    rows, size = result["parts"]["steps"]["rows"], result["size"]
    full = [one for one in rows if one["variant"] == rows[0]["variant"]]
    few = min(full, key=lambda one: abs(one["steps"] - 4))
    found = []
    for one in (few, full[-1]):
        with np.load(cells / f"{one['variant']}-s0-k{one['steps']}.npz") as stored:
            found.append((one["steps"], stored["truth"], stored["made"]))
    truth, seen = found[0][1], size["watched"]
    strips = [
        (label, frames)
        for i in range(min(len(truth), CLIPS))
        for label, frames in [
            ("truth", truth[i]),
            *((f"{k} steps", np.concatenate([truth[i, :seen], x[i]])) for k, _, x in found),
        ]
    ]
    figure = Figure(figsize=(12.5, 0.62 * len(strips) + 0.9), layout="constrained")
    panels = figure.subplots(len(strips), 1)
    for axes, (label, frames) in zip(panels, strips, strict=True):
        framed = np.pad(frames, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=255)
        axes.imshow(np.concatenate(list(framed), 1), interpolation="nearest")
        axes.axvline(seen * framed.shape[2] - 0.5, color=PALETTE[1], linewidth=2)
        axes.set_yticks([framed.shape[1] / 2], [label])
        axes.set_xticks([])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    figure.suptitle("Held-out clips; right of the line everything is imagined, with the actions")
    figure.savefig(path, dpi=100, facecolor="white", bbox_inches="tight")
