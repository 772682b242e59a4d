"""CartPole users: a Dreamer whose fast weights learn each user. Part of `nested bench users`.

Users differ in the sign and strength of their actions, gravity and length of the pole, and none of
it is observed. Arms are trained on equal steps: with a fast memory for each user whose start
visits teach, and without any. Each seed has a population of its own. A seed of an arm is a cell:
what was measured of it is on disk once it is done, so a run that is cut goes on where it was, and
tells what there is.
"""

import csv
import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from experiments.benchmarks.population.page import draw
from experiments.benchmarks.population.rounds import Arrays, Size, measure
from experiments.benchmarks.population.told import Found, summary
from experiments.config import Config, load_config
from experiments.together import train_together

FRAMES = 20_480
MARKS = (0, 1, 3, 10, 30, 100, 300)  # interactions of a user
RULE = ("timescales.kind=plain", "timescales.rule.kind=laprop", "timescales.rule.lr=2.5e-4",
        "timescales.rule.warmup=100")  # fmt: skip
ARMS: dict[str, tuple[str, ...]] = {
    "fast": (),
    "memoryless": ("model.memory.kind=none", "users=null", *RULE),
}

COLUMNS = ("arm", "seed", "name", "at", "value")
PLAIN = ("surprise/memory", "surprise/dyn", "surprise/state", "moved")  # not by user


class Tier(NamedTuple):
    """How much of everything."""

    seeds: int
    together: int  # seeds that learn side by side
    size: Size
    fields: tuple[str, ...]  # of the preset


SMALL = (
    "frames=192 env.num=4 env.time_limit=12 model.deter=8 model.hidden=8 model.classes=4 "
    "model.stoch=2 model.units=8 model.blocks=2 model.memory.dim=4 agent.horizon=2 agent.layers=1 "
    "agent.bins=15 train.ratio=2 train.prefill=64 replay.capacity=192 replay.batch=2 "
    "replay.length=4 evaluate.episodes=4 timescales.levels.start.every.n=4"
)
TIERS = {
    "smoke": Tier(2, 2, Size(2, 4, (0, 1, 3), 1, 1, 4, 3), tuple(SMALL.split())),
    "laptop": Tier(
        5, 5, Size(4, 96, MARKS, 2, 4, 64, 160), (f"frames={FRAMES}", "users.store=null")
    ),
}


class Cell(NamedTuple):
    """A seed of an arm."""

    arm: str
    config: Config
    size: Size

    @property
    def key(self) -> str:
        """A name with a digest of all that the result depends on."""
        tree = self.config.tree()
        del tree["tracking"]
        whole = json.dumps([tree, self.size], sort_keys=True)
        return f"{self.arm}-s{self.config.seed}-{hashlib.sha256(whole.encode()).hexdigest()[:10]}"


def cell_of(arm: str, seed: int, tier: Tier, out: Path) -> Cell:
    """What is trained, and how it is measured."""
    # without a memory there are no levels and no users that need fields
    gone = () if arm == "fast" else ("timescales.levels.", "model.memory.", "users.")
    own = [*(field for field in tier.fields if not field.startswith(gone)), *ARMS[arm]]
    config = load_config("users", [
        *own, f"seed={seed}", f"env.kwargs.population={seed}", "threads=1", "device=cpu",
        "evaluate.every=0", "evaluate.off=false", "tracking.mlflow=false",
        "tracking.pictures=false", f"tracking.root={out / 'runs'}",
    ])  # fmt: skip
    every = config.frames // tier.size.rounds
    changes = {
        "checkpoint": config.checkpoint.model_copy(
            update={"every": every, "keep": tier.size.rounds + 1}
        ),
        "log": config.log.model_copy(update={"every": every}),
    }
    cell = Cell(arm, config.model_copy(update=changes), tier.size)
    root = config.tracking.model_copy(update={"root": str(out / "runs" / cell.key)})
    return cell._replace(config=cell.config.model_copy(update={"tracking": root}))


class Quiet:
    """Tells how far training is, a line a round."""

    def __init__(self, path: Path, config: Config) -> None:
        self.name, self.frames = path.name, config.frames
        self.begun = time.process_time()

    def show(self, frame: int, metrics: Any) -> None:
        """Reports of the first of the runs."""
        if "train/return" in metrics:
            spent = time.process_time() - self.begun
            text = f"  {frame:,} of {self.frames:,} frames, {spent:.0f} CPU s"
            print(f"{text}, return {metrics['train/return']:.0f}", flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def cells(tier: Tier, seeds: Sequence[int], out: Path) -> Iterator[tuple[Cell, Arrays]]:
    """Every cell with its result: found on disk, or trained, measured and put there."""
    (out / "cells").mkdir(parents=True, exist_ok=True)
    for first in range(0, len(seeds), tier.together):
        for arm in ARMS:
            some = [cell_of(arm, s, tier, out) for s in seeds[first : first + tier.together]]
            paths = trained([cell for cell in some if not place(cell, out).exists()], out)
            for cell in some:
                if not place(cell, out).exists():
                    begun = time.process_time()
                    found = measure(paths[cell.key], cell.size, cell.config.seed)
                    save(place(cell, out), found)
                    print(f"{cell.key}: {time.process_time() - begun:.0f} CPU s", flush=True)
                with np.load(place(cell, out)) as stored:
                    yield cell, {name: stored[name] for name in stored.files}


def place(cell: Cell, out: Path) -> Path:
    """Where a cell's result is."""
    return out / "cells" / f"{cell.key}.npz"


def save(path: Path, found: Arrays) -> None:
    """Whole or not at all."""
    half = path.with_suffix(f".{os.getpid()}.npz")
    with half.open("wb") as file:
        np.savez_compressed(file, **found)  # pyright: ignore[reportArgumentType]
    half.replace(path)


def trained(some: Sequence[Cell], out: Path) -> dict[str, Path]:
    """The runs of cells: those that are finished, the others trained side by side."""
    runs = {cell.key: finished(out / "runs" / cell.key) for cell in some}
    missing = [cell for cell in some if runs[cell.key] is None]
    if missing:
        print(f"training {', '.join(cell.key for cell in missing)}", flush=True)
        paths = train_together([cell.config for cell in missing], Quiet)
        runs |= {cell.key: path for cell, path in zip(missing, paths, strict=True)}
    return {key: path for key, path in runs.items() if path is not None}


def finished(root: Path) -> Path | None:
    """The run in a folder that came to its end."""
    from experiments.record import Run

    for path in sorted(root.iterdir()) if root.is_dir() else []:
        if Run.open(path).state == "finished":
            return path
    return None


def run(tier: Tier, seeds: Sequence[int], out: Path) -> dict[str, Any]:
    """Every cell; after each one, cartpole.json, .csv and .png in `out` tell what there is."""
    found: dict[str, dict[int, Arrays]] = {arm: {} for arm in ARMS}
    result: dict[str, Any] = {}
    for cell, arrays in cells(tier, seeds, out):
        found[cell.arm][cell.config.seed] = arrays
        result = summary(found, tier.size)
        (out / "cartpole.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        with (out / "cartpole.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([COLUMNS, *rows(found)])
        if found["fast"]:
            draw(found, tier.size, cell.config.frames, out / "cartpole.png")
    return result


def rows(found: Found) -> Iterator[tuple[Any, ...]]:
    """Every array, users averaged, in long format: where else it varies is `at`."""
    for arm, seeds in found.items():
        for seed, arrays in seeds.items():
            for name, values in arrays.items():
                kept = values if name.endswith(PLAIN) else values.mean(-1)
                for at, value in np.ndenumerate(kept):
                    yield arm, seed, name, " ".join(map(str, at)), f"{value:.6g}"
