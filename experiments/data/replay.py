"""Replay: chunks of rows in numpy arrays, first-in-first-out or a reservoir over all ever seen.

A chunk holds `length` consecutive rows of one slot, across episodes where they end, with the carry
that the agent had before its first row. All slots fill their chunk together, so a row costs one
copy and sampling is one slice copy a chunk. What is stored is logged append-only: a checkpoint
writes only the chunks that are new.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from experiments.envs.rows import Row

Arrays = dict[str, np.ndarray]


class Replay:
    """Stores `capacity` frames as chunks of `length` rows; samples uniformly over chunks.

    `reservoir` keeps a uniform sample of all chunks ever seen (algorithm R, Vitter 1985).
    """

    def __init__(
        self,
        kind: Literal["fifo", "reservoir"],
        capacity: int,
        length: int,
        seed: int = 0,
    ):
        if kind not in ("fifo", "reservoir"):
            raise ValueError(f"replay kind {kind!r} is unknown; choose fifo or reservoir")
        if length < 1 or capacity < length:
            raise ValueError(f"replay of {capacity} frames can not hold a chunk of {length} rows")
        self.kind, self.length = kind, length
        self.chunks = capacity // length
        self.seen = 0  # chunks completed so far, kept or not
        self._rng = np.random.default_rng(seed)
        self._cursor = 0  # row of the next add inside the chunks that are being filled
        self._partial: Arrays = {}  # (N, length, ...); carries (N, ...)
        self._store: Arrays = {}  # (chunks, length, ...); carries (chunks, ...)
        self._changed: set[int] = set()  # places written since the last journal
        self._logged = 0  # chunks in the log since it was last compacted
        self._buffers: list[Arrays] = [{}, {}]

    def __len__(self) -> int:
        return min(self.seen, self.chunks)

    @property
    def frames(self) -> int:
        """Rows that can be sampled."""
        return len(self) * self.length

    def ready(self, batch: int) -> bool:
        """Whether there are `batch` different chunks, or as many as fit."""
        return len(self) >= min(batch, self.chunks)

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

        The arrays are reused two calls later.
        """
        if not len(self):
            raise RuntimeError("replay is empty: add at least one whole chunk before sampling")
        places = self._rng.integers(len(self), size=batch)
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
        places = np.arange(len(self)) if compact else np.array(sorted(self._changed))
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
        slots = len(self._partial["reward"])
        places = [self._place() for _ in range(slots)]
        for slot, place in enumerate(places):
            if place is not None:
                for name, value in self._partial.items():
                    self._store[name][place] = value[slot]
                self._changed.add(place)
        self._cursor = 0

    def _place(self) -> int | None:
        """Where the next chunk goes; None if the reservoir lets it pass."""
        self.seen += 1
        if self.seen <= self.chunks:
            return self.seen - 1
        if self.kind == "fifo":
            return (self.seen - 1) % self.chunks
        place = int(self._rng.integers(self.seen))
        return place if place < self.chunks else None

    def _allocate(self, like: Arrays) -> None:
        if not self._store:
            self._store = {
                name: np.empty((self.chunks, *value.shape[1:]), value.dtype)
                for name, value in like.items()
            }


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
