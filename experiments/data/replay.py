"""Replay: chunks of rows in numpy arrays, the newest, a reservoir over all ever seen, or both.

A chunk holds `length` consecutive rows of one slot, across episodes where they end, with the carry
that the agent had before its first row. All slots fill their chunk together, so a row costs one
copy and sampling is one slice copy a chunk. What is stored is logged append-only: a checkpoint
writes only the chunks that are new.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from experiments.envs.rows import Row

Arrays = dict[str, np.ndarray]
Kind = Literal["fifo", "reservoir", "mixed"]
SHARES: dict[str, tuple[str, ...]] = {"mixed": ("fifo", "reservoir")}  # parts of equal size


class Part(NamedTuple):
    """A stretch of the stored chunks that is filled by one rule and sampled evenly."""

    rule: str  # fifo or reservoir
    start: int
    size: int


class Replay:
    """Stores `capacity` frames as chunks of `length` rows; samples uniformly over chunks.

    `reservoir` keeps a uniform sample of all chunks ever seen (algorithm R, Vitter 1985). `mixed`
    halves the capacity and every batch between the newest chunks and a reservoir; a chunk may be in
    both (WMAR, arXiv 2401.16650).
    """

    def __init__(
        self,
        kind: Kind,
        capacity: int,
        length: int,
        seed: int = 0,
    ):
        if kind not in get_args(Kind):
            raise ValueError(
                f"replay kind {kind!r} is unknown; choose {' or '.join(get_args(Kind))}"
            )
        rules = SHARES.get(kind, (kind,))
        if length < 1 or capacity < length * len(rules):
            each = f" for each of its {len(rules)} parts" if len(rules) > 1 else ""
            raise ValueError(
                f"replay of {capacity} frames can not hold a chunk of {length} rows{each}"
            )
        self.kind, self.length = kind, length
        self.chunks = capacity // length
        self.parts = parts(rules, self.chunks)
        self.seen = 0  # chunks completed so far, kept or not
        self._rng = np.random.default_rng(seed)
        self._cursor = 0  # row of the next add inside the chunks that are being filled
        self._partial: Arrays = {}  # (N, length, ...); carries (N, ...)
        self._store: Arrays = {}  # (chunks, length, ...); carries (chunks, ...)
        self._changed: set[int] = set()  # places written since the last journal
        self._logged = 0  # chunks in the log since it was last compacted
        self._buffers: list[Arrays] = [{}, {}]

    def __len__(self) -> int:
        return sum(self._known(part) for part in self.parts)

    @property
    def frames(self) -> int:
        """Rows that can be sampled."""
        return len(self) * self.length

    def ready(self, batch: int) -> bool:
        """Whether `batch` chunks have been seen, or as many as fit."""
        return self.seen >= min(batch, self.chunks)

    def add(self, row: Row, carry: Callable[[], Arrays] | Arrays) -> None:
        """Adds one row of N slots; `carry` (N, ...) is what the agent had before the row.

        The carry is read, or called, only where a chunk starts.
        """
        if self._cursor == 0:
            self._open(row, carry() if callable(carry) else carry)
        for name, value in _columns(row).items():
            self._partial[name][:, self._cursor] = value
        self._cursor += 1
        if self._cursor == self.length:
            self._flush()

    def sample(self, batch: int) -> tuple[Arrays, Arrays]:
        """`batch` chunks, with replacement: columns (B, T, ...) and carries (B, ...).

        The chunks of one part follow those of another. The arrays are reused two calls later.
        """
        if not len(self):
            raise RuntimeError("replay is empty: add at least one whole chunk before sampling")
        places = np.concatenate(
            [
                part.start + self._rng.integers(self._known(part), size=size)
                for part, size in zip(self.parts, split(batch, len(self.parts)), strict=True)
            ]
        )
        self._buffers.reverse()
        buffers = self._buffers[0]
        for name, stored in self._store.items():
            if name not in buffers or len(buffers[name]) != batch:
                buffers[name] = np.empty((batch, *stored.shape[1:]), stored.dtype)
            np.take(stored, places, axis=0, out=buffers[name], mode="clip")  # raise would buffer
        return _split(buffers)

    def state_dict(self) -> dict[str, Any]:
        """Cursors, generator and the unfinished chunks; the stored ones are in the journal."""
        return {
            "shape": self._shape(),
            "seen": self.seen,
            "cursor": self._cursor,
            "rng": self._rng.bit_generator.state,
            "partial": {name: value.copy() for name, value in self._partial.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from a `state_dict`; the stored chunks come through `restore`."""
        if state["shape"] != self._shape():
            raise ValueError(f"state of a replay with {state['shape']} loaded into {self._shape()}")
        self.seen, self._cursor = int(state["seen"]), int(state["cursor"])
        self._rng.bit_generator.state = state["rng"]
        self._partial = {name: value.copy() for name, value in state["partial"].items()}

    def journal(self) -> tuple[Arrays | None, bool]:
        """The chunks placed since the last call with their `place` (n,), None without any.

        The flag says that this is the whole content and replaces all earlier journals: given when
        these would together exceed twice the capacity.
        """
        if not self._changed:
            return None, False
        compact = self._logged + len(self._changed) > 2 * self.chunks
        places = self.places() if compact else np.array(sorted(self._changed))
        self._logged = len(places) if compact else self._logged + len(places)
        self._changed.clear()
        return {"place": places, **{k: v[places] for k, v in self._store.items()}}, compact

    def restore(self, journals: Sequence[Arrays]) -> None:
        """Puts back the chunks of all journals since the last compact one, oldest first."""
        for journal in journals:
            columns = {name: value for name, value in journal.items() if name != "place"}
            self._allocate(columns)
            for name, value in columns.items():
                self._store[name][journal["place"]] = value
        self._changed.clear()
        self._logged = sum(len(journal["place"]) for journal in journals)

    def places(self) -> np.ndarray:
        """Where in the store there are chunks, (len(self),) int64."""
        found = [part.start + np.arange(self._known(part)) for part in self.parts]
        return np.concatenate(found)

    def _known(self, part: Part) -> int:
        return min(self.seen, part.size)

    def _shape(self) -> dict[str, Any]:
        return {"kind": self.kind, "chunks": self.chunks, "length": self.length}

    def _open(self, row: Row, carry: Arrays) -> None:
        columns = _columns(row)
        if not self._partial:
            slots = len(row.reward)
            for name, value in columns.items():
                shape = (slots, self.length, *value.shape[1:])
                self._partial[name] = np.zeros(shape, value.dtype)
            for name, value in carry.items():
                self._partial[f"carry.{name}"] = np.zeros_like(value)
        for name, value in carry.items():
            self._partial[f"carry.{name}"][...] = value

    def _flush(self) -> None:
        self._allocate(self._partial)
        placed = [(slot, p) for slot in range(len(self._partial["reward"])) for p in self._next()]
        for slot, place in placed:
            for name, value in self._partial.items():
                self._store[name][place] = value[slot]
            self._changed.add(place)
        self._cursor = 0

    def _next(self) -> list[int]:
        """Where the next chunk goes: a place for each part that takes it."""
        self.seen += 1
        drawn = [self._place(part) for part in self.parts]
        return [place for place in drawn if place is not None]

    def _place(self, part: Part) -> int | None:
        """Where in a part the newest chunk goes; None if the reservoir lets it pass."""
        if self.seen <= part.size or part.rule == "fifo":
            return part.start + (self.seen - 1) % part.size
        place = int(self._rng.integers(self.seen))
        return part.start + place if place < part.size else None

    def _allocate(self, like: Arrays) -> None:
        if not self._store:
            self._store = {
                name: np.empty((self.chunks, *value.shape[1:]), value.dtype)
                for name, value in like.items()
            }


def split(total: int, count: int) -> list[int]:
    """`total` in `count` shares that differ by one at most, the larger first."""
    return [(total + count - 1 - i) // count for i in range(count)]


def parts(rules: Sequence[str], chunks: int) -> tuple[Part, ...]:
    """One part for each rule, side by side, of equal sizes."""
    sizes = split(chunks, len(rules))
    return tuple(Part(rule, sum(sizes[:i]), sizes[i]) for i, rule in enumerate(rules))


def _columns(row: Row) -> Arrays:
    columns = {f"obs.{name}": value for name, value in row.obs.items()}
    return columns | {
        "action": row.action,
        "reward": row.reward,
        "first": row.first,
        "terminal": row.terminal,
        "user": row.user,
    }


def _split(arrays: Arrays) -> tuple[Arrays, Arrays]:
    rows = {name: value for name, value in arrays.items() if not name.startswith("carry.")}
    carry = {n.removeprefix("carry."): v for n, v in arrays.items() if n.startswith("carry.")}
    return rows, carry
