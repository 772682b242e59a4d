"""What every reader of another format gives: what the rows hold, and episodes that come in blocks.

A reader checks all that it can before its first row, so that a mistake in the last of a thousand
files is told before hours of work and not after.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.config import ConfigError
from experiments.data.clips import Arrays, Clips, Spec
from experiments.envs.resize import area_resize
from worldmodel.types import ActionSpec

KEEP = (0, 0)  # as a size: images stay as they are


class Options(NamedTuple):
    """What may change on the way. `every` and all that follows it is for videos alone."""

    size: tuple[int, int] | None = None  # of images; None: as the reader has it
    choices: int = 0  # how many actions there are, where recordings may not show all of them
    like: Path | None = None  # a data set whose actions these are
    skip_broken: bool = False  # leave out what cannot be read
    every: int = 1  # one frame of so many
    fps: float = 0.0  # or so many of each second; 0: all
    truncate: bool = False  # go on where a video and its lines are of two lengths
    drop_null: bool = False  # without the frames in which nothing was done


class Recorded(NamedTuple):
    """One episode: rows in blocks, in order."""

    name: str
    parts: Iterable[Arrays]
    labelled: bool = True


class Source(NamedTuple):
    """What a reader found; `left_out` says why of each episode that will not come."""

    spec: Spec
    episodes: Iterable[Recorded]
    left_out: Sequence[str] = ()


def wanted_actions(found: ActionSpec | None, options: Options) -> ActionSpec:
    """The actions that were found, or the wider ones that the options name. Raises ConfigError.

    Where nothing is known, there is one action, and it means nothing.
    """
    wanted = found or ActionSpec("discrete", (1,))
    field, given = "", ""
    if options.like is not None:
        field, given = "--like", str(options.like)
        wanted = Clips.open(options.like).spec.action
    elif options.choices:
        field, given = "--choices", str(options.choices)
        wanted = ActionSpec("discrete", (options.choices,))
    if found is not None and not _holds(wanted, found):
        problem = f"the recordings have {found.kind} actions of sizes {list(found.sizes)}"
        way_out = f"they do not fit into {wanted.kind} {list(wanted.sizes)}"
        raise ConfigError(field, given, problem, way_out)
    return wanted


def _holds(wide: ActionSpec, found: ActionSpec) -> bool:
    if (wide.kind, len(wide.sizes)) != (found.kind, len(found.sizes)):
        return False
    if wide.kind == "continuous":
        return wide == found
    return all(a >= b for a, b in zip(wide.sizes, found.sizes, strict=True))


def check_choices(choices: np.ndarray, name: str) -> None:
    """Raises ConfigError unless all of these are 0 or more."""
    if (choices < 0).any():
        problem = f"{name}: action {int(choices.min())} is below 0"
        raise ConfigError("source", name, problem, "choices count from 0")


def check_unit(actions: np.ndarray, name: str) -> None:
    """Raises ConfigError unless all entries (T, A) lie in [-1, 1]."""
    if not np.isfinite(actions).all() or (np.abs(actions) > 1).any():
        worst = actions.flat[np.argmax(np.nan_to_num(np.abs(actions), nan=np.inf))]
        problem = f"{name}: action entry {worst:g} is outside [-1, 1]"
        raise ConfigError("source", name, problem, "divide actions by their range")


def resized(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """An image (H, W, C) uint8 of this size, by area; KEEP leaves it."""
    return image if size == KEEP else area_resize(image, size)
