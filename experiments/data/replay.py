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
Kind = Literal["fifo", "reservoir", "mixed", "matching"]
BOTH = ("fifo", "reservoir")
SHARES: dict[str, tuple[str, ...]] = {"mixed": BOTH, "matching": BOTH}  # parts of equal size
WHOLE = ("matching",)  # kinds whose batches come from one part each


class Part(NamedTuple):
    """A stretch of the stored rollouts that is filled by one rule and sampled evenly."""

    rule: str  # fifo or reservoir
    start: int
    size: int


class Replay:
    """Stores `capacity` frames as chunks of `length` rows; samples uniformly over chunks.

    `reservoir` keeps a uniform sample of all chunks ever seen (algorithm R, Vitter 1985). `mixed`
    halves the capacity and every batch between the newest chunks and a reservoir; a chunk may be in
    both. `matching` is the pair of buffers of WMAR (arXiv 2401.16650) and ARROW (2603.11395), which
    differs from `mixed` in two ways, as their released code has it: what is kept or dropped is a
    `rollout` of several chunks, in the papers 512 rows spliced across episodes, and a whole batch
    comes from one of the two buffers, by a fair coin.

    Their long-term buffer keeps the rollouts with the largest of random keys (Isele & Cosgun 2018,
    arXiv 1802.10269): what it holds follows the very law of algorithm R. They begin sequences
    anywhere in a rollout with an empty state; here they begin where a carry was stored.
    """

    def __init__(
        self,
        kind: Kind,
        capacity: int,
        length: int,
        seed: int = 0,
        rollout: int = 0,
    ):
        """rollout: rows that are kept or dropped together; 0 is `length`, the rest multiples."""
        if kind not in get_args(Kind):
            raise ValueError(
                f"replay kind {kind!r} is unknown; choose {' or '.join(get_args(Kind))}"
            )
        rules, rollout = SHARES.get(kind, (kind,)), rollout or length
        if length < 1 or rollout % length:
            raise ValueError(f"replay: a rollout of {rollout} rows is no number of {length}")
        if capacity < rollout * len(rules):
            each = f" for each of its {len(rules)} parts" if len(rules) > 1 else ""
            raise ValueError(
                f"replay of {capacity} frames can not hold a chunk of {rollout} rows{each}"
            )
        self.kind, self.length = kind, length
        self.each = rollout // length  # chunks of a rollout, side by side in the store
        self.chunks = capacity // rollout * self.each
        self.parts = parts(rules, capacity // rollout)
        self.seen = 0  # rollouts completed so far, kept or not
        self._rng = np.random.default_rng(seed)
        self._cursor = 0  # row of the next add inside the rollouts that are being filled
        self._partial: Arrays = {}  # (N * each, length, ...); carries (N * each, ...)
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
        return self.seen * self.each >= min(batch, self.chunks)

    def add(self, row: Row, carry: Callable[[], Arrays] | Arrays) -> None:
        """Adds one row of N slots; `carry` (N, ...) is what the agent had before the row.

        The carry is read, or called, only where a chunk starts.
        """
        chunk, place = divmod(self._cursor, self.length)
        if place == 0:
            self._open(row, carry() if callable(carry) else carry, chunk)
        for name, value in _columns(row).items():
            self._partial[name][chunk :: self.each, place] = value
        self._cursor += 1
        if self._cursor == self.length * self.each:
            self._flush()

    def sample(self, batch: int, rng: np.random.Generator | None = None) -> tuple[Arrays, Arrays]:
        """`batch` chunks, with replacement: columns (B, T, ...) and carries (B, ...).

        The chunks of one part follow those of another. The arrays are reused two calls later. With
        an `rng` that is not the replay's own, what is sampled later stays as it would have been.
        """
        if not len(self):
            raise RuntimeError("replay is empty: add at least one whole chunk before sampling")
        rng = rng if rng is not None else self._rng
        places = np.concatenate(
            [
                part.start * self.each + rng.integers(self._known(part), size=size)
                for part, size in self._shares(batch, rng)
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
        found = [part.start * self.each + np.arange(self._known(part)) for part in self.parts]
        return np.concatenate(found)

    def _shares(self, batch: int, rng: np.random.Generator) -> list[tuple[Part, int]]:
        """How many chunks of a batch come from which part."""
        if self.kind in WHOLE:
            return [(self.parts[rng.integers(len(self.parts))], batch)]
        return list(zip(self.parts, split(batch, len(self.parts)), strict=True))

    def _known(self, part: Part) -> int:
        """Chunks in a part."""
        return min(self.seen, part.size) * self.each

    def _shape(self) -> dict[str, Any]:
        shape = {"kind": self.kind, "chunks": self.chunks, "length": self.length}
        return shape | ({"each": self.each} if self.each > 1 else {})

    def _open(self, row: Row, carry: Arrays, chunk: int) -> None:
        """Begin a chunk of every slot's rollout."""
        if not self._partial:
            rows = len(row.reward) * self.each
            for name, value in _columns(row).items():
                shape = (rows, self.length, *value.shape[1:])
                self._partial[name] = np.zeros(shape, value.dtype)
            for name, value in carry.items():
                self._partial[f"carry.{name}"] = np.zeros((rows, *value.shape[1:]), value.dtype)
        for name, value in carry.items():
            self._partial[f"carry.{name}"][chunk :: self.each] = value

    def _flush(self) -> None:
        self._allocate(self._partial)
        slots = len(self._partial["reward"]) // self.each
        for slot, place in [(slot, place) for slot in range(slots) for place in self._next()]:
            ours, theirs = (slice(i * self.each, (i + 1) * self.each) for i in (place, slot))
            for name, value in self._partial.items():
                self._store[name][ours] = value[theirs]
            self._changed.update(range(ours.start, ours.stop))
        self._cursor = 0

    def _next(self) -> list[int]:
        """Where the next rollout goes: a place for each part that takes it."""
        self.seen += 1
        drawn = [self._place(part) for part in self.parts]
        return [place for place in drawn if place is not None]

    def _place(self, part: Part) -> int | None:
        """Where in a part the newest rollout goes; None if the reservoir lets it pass."""
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


def parts(rules: Sequence[str], rollouts: int) -> tuple[Part, ...]:
    """One part for each rule, side by side, of equal sizes."""
    sizes = split(rollouts, len(rules))
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
