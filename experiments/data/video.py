"""Folders of videos, with a .jsonl of actions beside each that has one, as episodes of clips.

`<name>.mp4` and `<name>.jsonl` are an episode, in the folder or below it (`ticks.py` says what a
line is). There are as many frames as lines, or one more: where the last line led. A video alone is
an episode that is not labelled. Frames are decoded once, one at a time (PyAV, an optional package).

Where frames are left out, an action is what was done from a kept frame to the next: of choices the
first, of vectors the mean, of keys all that were pressed, of a camera the whole turn.
"""

import importlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from importlib.util import find_spec
from itertools import count, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.config import ConfigError
from experiments.data.clips import Arrays, Spec
from experiments.data.source import (
    KEEP,
    Options,
    Recorded,
    Source,
    resized,
    wanted_actions,
)
from experiments.data.ticks import Ticks, read_ticks
from worldmodel.types import ActionSpec, ObsSpec

KINDS = (".mp4", ".mkv", ".avi", ".webm")
SIZE = (64, 64)  # of images, unless another is asked for
BLOCK = 64  # rows that are written at once


class Pair(NamedTuple):
    """A video, its lines where it has some, and what its header says."""

    video: Path
    lines: Path | None
    shape: tuple[int, int]  # height, width
    rate: Fraction  # frames a second; 0 where it does not say
    frames: int  # 0 where it does not say


class Kept(NamedTuple):
    """The frames that become rows, and what was done from each to the next."""

    frames: np.ndarray  # (K,) or (K + 1,) numbers, ascending; the last may be one after all lines
    values: np.ndarray  # (K, V)
    reward: np.ndarray  # (K,)
    terminal: np.ndarray  # (K,)


def videos_in(folder: Path) -> list[Path]:
    """The videos of a folder and those below it."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in KINDS)


def read_video(folder: Path, options: Options) -> Source:
    """All videos of a folder. Raises ConfigError, which names the file."""
    av, found = _av(folder), None
    left_out = [f"{file.name} has no video beside it" for file in _alone(folder)]
    pairs: list[Pair] = []
    for video in videos_in(folder):
        try:
            pair = _pair(av, video)
            found = _checked(pair, found, options)
            pairs.append(pair)
        except ConfigError as error:
            if not options.skip_broken:
                raise
            left_out.append(error.problem)
    if not pairs:
        raise ConfigError("source", str(folder), "no video of it can be read", left_out[0])
    spec = Spec(
        {"image": ObsSpec("image", (*_size(pairs, options), 3))}, wanted_actions(found, options)
    )
    episodes = (_recorded(av, pair, spec, options) for pair in pairs)
    return Source(spec, episodes, left_out)


def _av(folder: Path) -> Any:
    if find_spec("av") is None:
        problem = "videos are decoded by PyAV, which is not installed"
        raise ConfigError("source", str(folder), problem, "pip install av")
    return importlib.import_module("av")


# ---- before the first frame --------------------------------------------------------------------
def _alone(folder: Path) -> list[Path]:
    named = {video.with_suffix("") for video in videos_in(folder)}
    return [file for file in sorted(folder.rglob("*.jsonl")) if file.with_suffix("") not in named]


def _pair(av: Any, video: Path) -> Pair:
    try:
        with av.open(str(video)) as container:
            stream = container.streams.video[0]
            shape = (stream.codec_context.height, stream.codec_context.width)
            rate, frames = Fraction(stream.average_rate or 0), stream.frames
    except (av.error.FFmpegError, OSError) as error:
        raise _broken(video, error.strerror or str(error)) from error
    except IndexError:
        raise _broken(video, "it has no pictures") from None
    lines = video.with_suffix(".jsonl")
    return Pair(video, lines if lines.exists() else None, shape, rate, frames)


def _broken(video: Path, problem: str) -> ConfigError:
    way_out = "mend it, or leave it out with --skip-broken"
    return ConfigError("source", str(video), f"{video.name} cannot be decoded: {problem}", way_out)


def _checked(pair: Pair, known: ActionSpec | None, options: Options) -> ActionSpec | None:
    """The actions of all pairs up to this one. Raises ConfigError where it does not fit."""
    _step(pair, options)
    if pair.lines is None:
        return known
    ticks = read_ticks(pair.lines)
    if pair.frames and not options.truncate:
        _count(pair, pair.frames, len(ticks.values))
    found = ticks.layout.spec(ticks.values)
    if known is None or found == known:
        return found
    if found.kind == known.kind == "discrete" and len(found.sizes) == len(known.sizes) == 1:
        return max(known, found)
    problem = f"{pair.lines.name} has {found.kind} actions of sizes {list(found.sizes)}"
    way_out = f"those before have {known.kind} {list(known.sizes)}: convert them apart"
    raise ConfigError("source", str(pair.lines), problem, way_out)


def _count(pair: Pair, frames: int, lines: int) -> None:
    """There is a frame for each line, and there may be one more."""
    if frames - lines not in (0, 1) and pair.lines is not None:
        problem = f"{pair.video.name} has {frames} frames, {pair.lines.name} has {lines} lines"
        way_out = "--truncate goes on with as many as both have, --skip-broken leaves both out"
        raise ConfigError("source", str(pair.video), problem, way_out)


def _step(pair: Pair, options: Options) -> Fraction:
    """How many frames of the video one row is for."""
    if not options.fps:
        return Fraction(options.every)
    wanted = Fraction(options.fps).limit_denominator(1000)
    if wanted > pair.rate:
        problem = f"{pair.video.name} has {float(pair.rate):g} frames a second"
        raise ConfigError("--fps", options.fps, problem, "ask for no more")
    return pair.rate / wanted


def _size(pairs: Sequence[Pair], options: Options) -> tuple[int, int]:
    size = options.size or SIZE
    if size != KEEP:
        return size
    lead, others = pairs[0], [pair for pair in pairs if pair.shape != pairs[0].shape]
    if others:
        other = others[0]
        problem = f"{lead.video.name} is {lead.shape}, {other.video.name} {other.shape}"
        raise ConfigError("--size", "keep", problem, "give a size, as --size 64")
    return lead.shape


# ---- frame by frame ----------------------------------------------------------------------------
def _recorded(av: Any, pair: Pair, spec: Spec, options: Options) -> Recorded:
    rows = _seen(av, pair, spec, options) if pair.lines is None else _acted(av, pair, spec, options)
    return Recorded(pair.video.name, rows, pair.lines is not None)


def _seen(av: Any, pair: Pair, spec: Spec, options: Options) -> Iterator[Arrays]:
    """Rows of a video of which nothing but the frames is known."""
    step, dim = _step(pair, options), spec.action.dim

    def fill(start: int, stop: int) -> Arrays:
        none = np.zeros(stop - start, np.float32)
        flags = {"reward": none, "first": np.arange(start, stop) == 0, "terminal": none > 0}
        return {"action": np.zeros((stop - start, dim), np.float32), **flags}

    numbers = (math.ceil(k * step) for k in count())
    frames = among(_decoded(av, pair.video), numbers)
    return blocks((_image(frame, spec) for _, frame in frames), fill)


def _acted(av: Any, pair: Pair, spec: Spec, options: Options) -> Iterator[Arrays]:
    """Rows of a video and its lines."""
    assert pair.lines is not None
    ticks = read_ticks(pair.lines)
    kept, lines = keep(ticks, _step(pair, options), options.drop_null), len(ticks.values)

    def images() -> Iterator[np.ndarray]:
        reel, rows = Reel(_decoded(av, pair.video)), 0
        frames = islice(reel, lines + 1) if options.truncate else reel
        for t, frame in among(frames, iter(kept.frames.tolist())):
            yield _image(frame, spec, ticks.cursor[t] if t < lines else None)
            rows += 1
        if not options.truncate:
            _count(pair, reel.count, lines)
        if reel.count >= lines and ends(kept, rows):
            yield _image(reel.last, spec)

    def fill(start: int, stop: int) -> Arrays:
        before, first = np.arange(start, stop) - 1, np.arange(start, stop) == 0
        action = ticks.layout.encode(kept.values[before], spec.action)
        return {
            "action": np.where(first[:, None], 0, action).astype(np.float32),
            "reward": np.where(first, 0, kept.reward[before]).astype(np.float32),
            "first": first,
            "terminal": kept.terminal[before] & ~first,
        }

    return blocks(images(), fill)


def keep(ticks: Ticks, step: Fraction, drop_null: bool = False) -> Kept:
    """Each step-th frame, and what was done in between; without those from which nothing was."""
    count = len(ticks.values)
    numbers = [math.ceil(k * step) for k in range(1 + int(count / step))]
    frames = np.array([number for number in numbers if number <= count])
    starts, end = frames[frames < count], frames[frames == count]
    values = ticks.layout.merge(ticks.values, starts)
    if drop_null:
        busy = ~ticks.layout.idle(values)
        starts, values = starts[busy], values[busy]
    if not len(starts):
        return Kept(starts, values, np.zeros(0), np.zeros(0, bool))
    reward = np.add.reduceat(ticks.reward, starts)
    terminal = np.logical_or.reduceat(ticks.terminal, starts)
    return Kept(np.concatenate([starts, end]), values, reward, terminal)


def ends(kept: Kept, rows: int) -> bool:
    """Whether the last lines gave what no row says: the last frame then stands for what came."""
    return 0 < rows == len(kept.values) and bool(kept.reward[-1] or kept.terminal[-1])


class Reel:
    """Frames as they come, counted; the last one stays."""

    def __init__(self, frames: Iterable[Any]):
        self._frames, self.count, self.last = frames, 0, None

    def __iter__(self) -> Iterator[Any]:
        for frame in self._frames:
            self.count, self.last = self.count + 1, frame
            yield frame


def among(frames: Iterable[Any], numbers: Iterator[int]) -> Iterator[tuple[int, Any]]:
    """The frames of these ascending numbers, with their numbers; all frames are taken."""
    wanted = next(numbers, None)
    for number, frame in enumerate(frames):
        if number == wanted:
            yield number, frame
            wanted = next(numbers, None)


def blocks(images: Iterator[np.ndarray], fill: Callable[[int, int], Arrays]) -> Iterator[Arrays]:
    """Images with the other columns of their rows, so many at a time."""
    start = 0
    while batch := list(islice(images, BLOCK)):
        yield {"obs.image": np.stack(batch)} | fill(start, start + len(batch))
        start += len(batch)


def _decoded(av: Any, video: Path) -> Iterator[Any]:
    """The frames of a video, as PyAV has them."""
    number = 0
    try:
        with av.open(str(video)) as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            for number, frame in enumerate(container.decode(stream), 1):  # noqa: B007
                yield frame
    except av.error.FFmpegError as error:
        raise _broken(video, f"{error.strerror}, after frame {number}") from error


def _image(frame: Any, spec: Spec, cursor: np.ndarray | None = None) -> np.ndarray:
    image = frame.to_ndarray(format="rgb24")
    if cursor is not None and np.isfinite(cursor).all():
        point(image, cursor)
    height, width, _ = spec.obs["image"].shape
    return resized(image, (height, width))


def point(image: np.ndarray, at: np.ndarray) -> None:
    """Draw a white arrow's head into an image (H, W, 3), its tip at x, y in image heights."""
    size = max(1, round(len(image) * 16 / 360))
    x, y = (int(value * len(image)) for value in at)
    for row in range(size):
        if 0 <= y + row < len(image):
            image[y + row, max(x, 0) : max(x + row * 2 // 3 + 1, 0)] = 255
