"""What a world model gains from shortcut forcing, and from actions. `nested bench dynamics`.

Questions of Dreamer 4 (arXiv 2509.24527) at a small budget, each a part. `ablation`: the paper's
cascade from diffusion forcing to the full objective, at four sampling steps a frame; `single`: at
one, since a small world needs fewer. `steps`: one to 64 sampling steps, with shortcuts and without.
`labels`: how much of what actions are worth is kept when only some episodes have them. Models
predict held-out recordings with their actions (PSNR of decoded frames by horizon) and dream from
nothing (Fréchet distance of chunks of frames from real ones: a blurred mean frame has a good PSNR
and a bad distance). Seeds are pairs. What is finished is kept, cell by cell: a command that was cut
can be repeated.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from experiments.benchmarks.recorded import dynamics_page
from experiments.benchmarks.recorded.dynamics_cells import (
    FULL,
    SETTLED,
    SIZES,
    VARIANTS,
    Cell,
    Size,
    World,
    measured,
)
from experiments.benchmarks.recorded.dynamics_page import CASCADES
from experiments.benchmarks.statistics import bootstrap, paired_bootstrap
from experiments.config import ConfigError
from experiments.record.run import write_json

SEEDS = {"smoke": 2, "laptop": 3, "large": 3}
STEPS = (1, 2, 4, 8, 16, 64)
FEW = 4  # sampling steps of a frame that is imagined in use
CASCADE = ("v", "shortcut", "x", "x-loss", FULL)
BARE = "no-shortcut"
LABELS = ("no-actions", "some-actions", SETTLED)
MEASURES = ("psnr", "mse", "frechet", "ms")
Key = tuple[str, int]  # a variant, in so many steps
Found = dict[Key, dict[str, np.ndarray]]  # measure -> (seeds, horizon) or (seeds,)
Pair = tuple[Key, Key]


# ---- what a part runs and compares -------------------------------------------------------------
def keys_of(part: str, size: Size) -> list[Key]:
    """What is measured for a part."""
    steps = [k for k in STEPS if k <= size.k_max]
    return {
        **{
            part: [*((name, k) for name in CASCADE), ("v", size.k_max)]
            for part, k in CASCADES.items()
        },
        "steps": [(name, k) for name in (FULL, BARE) for k in steps],
        "labels": [(name, FEW) for name in LABELS],
    }[part]


def pairs_of(part: str, size: Size) -> list[Pair]:
    """Which differences a part tells: the first of a pair less the second."""
    few, whole = (FULL, FEW), (FULL, size.k_max)
    steps = [*zip(CASCADE[1:], CASCADE, strict=False), (FULL, CASCADE[0])]
    return {
        **{
            part: [
                *(((one, k), (before, k)) for one, before in steps),
                ((FULL, k), (CASCADE[0], size.k_max)),
            ]
            for part, k in CASCADES.items()
        },
        "steps": [
            (few, whole),
            ((BARE, FEW), (BARE, size.k_max)),
            *(((FULL, k), (BARE, k)) for k in (1, FEW)),
        ],
        "labels": [((name, FEW), (LABELS[0], FEW)) for name in LABELS[1:]],
    }[part]


PARTS = (*CASCADES, "steps", "labels")


def collect(world: World, parts: Sequence[str], seeds: int) -> Found:
    """Train and measure what is missing, seed by seed."""
    keys = dict.fromkeys(key for part in parts for key in keys_of(part, world.size))
    found: dict[Key, list[dict[str, Any]]] = {key: [] for key in keys}
    for seed in range(seeds):
        for (variant, steps), rows in found.items():
            rows.append(measured(world, Cell(variant, seed, steps)))
            told = f"seed {seed}: {VARIANTS[variant].about}, {steps} steps"
            psnr, distance = np.mean(rows[-1]["psnr"]), rows[-1]["frechet"]
            print(f"{told}: {psnr:.2f} dB, distance {distance:.3f}", file=sys.stderr, flush=True)
    return {
        key: {name: np.array([row[name] for row in rows]) for name in MEASURES}
        for key, rows in found.items()
    }


# ---- summary -----------------------------------------------------------------------------------
def summary(part: str, found: Found, size: Size) -> dict[str, Any]:
    """Every row of a part with intervals, and differences paired by seed."""
    rng, rows = np.random.default_rng(0), []
    for key in keys_of(part, size):
        values = found[key]
        row: dict[str, Any] = {"variant": key[0], "steps": key[1]}
        row |= {name: bootstrap(over(values[name]), rng)._asdict() for name in MEASURES}
        row["by horizon"] = values["psnr"].mean(0).tolist()
        row["by seed"] = {name: over(values[name]).tolist() for name in MEASURES}
        rows.append(row)
    differences = []
    for one, other in pairs_of(part, size):
        row = {"first": list(one), "second": list(other)}
        for name in ("psnr", "mse", "frechet"):
            a, b = (over(found[key][name]) for key in (one, other))
            row[name] = paired_bootstrap(a, b, rng)._asdict()
        differences.append(row)
    result = {"rows": rows, "differences": differences}
    return result | ({"share": share(found)} if part == "labels" else {})


def share(found: Found) -> dict[str, Any]:
    """What some labels give of the gain that all of them give, in PSNR: 0 none of it, 1 all."""
    none, some, every = (over(found[name, FEW]["psnr"]) for name in LABELS)
    each = (some - none) / (every - none)
    interval = bootstrap(each, np.random.default_rng(0))._asdict()
    whole = float((some - none).sum() / (every - none).sum())
    return {"interval": interval, "of the means": whole, "by seed": each.tolist()}


def over(values: np.ndarray) -> np.ndarray:
    """One number a seed: the mean over the horizon, where there is one."""
    return values.reshape(len(values), -1).mean(1)


def whole(world: World, tier: str, parts: Sequence[str], seeds: int) -> dict[str, Any]:
    """Run what is missing; all that is told of it."""
    found = collect(world, parts, seeds)
    told: Mapping[str, Any] = {part: summary(part, found, world.size) for part in parts}
    words = f" --part {','.join(parts)}" if len(parts) < len(PARTS) else ""
    updates = world.size.updates
    words += f" --updates {updates}" if updates != SIZES[tier].updates else ""
    return {
        "command": f"nested bench dynamics --tier {tier} --seeds {seeds}{words}",
        "tier": tier,
        "seeds": seeds,
        "size": world.size._asdict(),
        "variants": {name: one.about for name, one in VARIANTS.items()},
        "reference": world.reference(),
        "training": world.costs(),
        "parts": told,
    }


# ---- the command -------------------------------------------------------------------------------
def parts_of(text: str) -> list[str]:
    """The parts named in `text`, each once. Raises ConfigError."""
    names = list(dict.fromkeys(PARTS if text == "all" else text.split(",")))
    for name in names:
        if name not in PARTS:
            raise ConfigError("--part", name, "no such part", f"choose from {','.join(PARTS)},all")
    return names


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, run what is missing, draw, print."""
    parser = argparse.ArgumentParser(
        prog="nested bench dynamics",
        description=__doc__,
        epilog="example:\n  nested bench dynamics --part ablation --seeds 5",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--part", default="all", help=f"with commas: {','.join(PARTS)} (default all)")
    add("--tier", choices=SIZES, default="laptop", help="how much (default laptop)")
    add("--seeds", type=int, default=0, help="how many (default: the tier's)")
    add("--updates", type=int, default=0, help="of each model (default: the tier's)")
    add("--root", type=Path, help="folder of the cells (default runs/dynamics/TIER)")
    add("--out", type=Path, help="folder of the pictures (default ROOT)")
    add("--results", type=Path, metavar="FILE.md", help="write the tables there, between marks")
    add("--json", action="store_true", help="print JSON instead of the tables")
    asked = parser.parse_args(argv)
    parts = parts_of(asked.part)
    for name in ("seeds", "updates"):
        if getattr(asked, name) < 0:
            raise ConfigError(f"--{name}", getattr(asked, name), "is too few", "give 1 or more")
    size = SIZES[asked.tier]
    size = size._replace(updates=asked.updates or size.updates)
    torch.set_num_threads(1)
    root = asked.root or Path("runs/dynamics") / asked.tier
    world = World(root, size)
    result = whole(world, asked.tier, parts, asked.seeds or SEEDS[asked.tier])
    write_json(root / "dynamics.json", result)
    pictures = dynamics_page.draw(result, root / "cells", asked.out or root)
    if asked.results:
        dynamics_page.put(asked.results, result)
    if asked.json:
        print(json.dumps(result))
    else:
        print(dynamics_page.told(result), *(f"picture {path}" for path in pictures), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
