"""Recorded episodes on disk: decoded once, read in place, sampled as clips.

A data set is a folder: `index.json` (what a row holds, and the lengths of the episodes of every
shard) and a folder for each shard with one .npy file a column, which are mapped and not loaded.
Images stay uint8. An index is written last, so a recording that was cut short is no data set.
Latents of a tokenizer are a folder of the same shards beside it (`Clips.beside`).

Columns are those of a row: `obs.<name>`, action, reward, first, terminal. An episode starts with
a `first` row, and a row's action led into it. Of an episode that is not `labelled` only the
observations are known: its actions, rewards and terminals are zeros that mean nothing.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from experiments.config import ConfigError
from experiments.data.column import Column
from experiments.envs.rows import Envs, Row
from experiments.policies import Policy
from experiments.record.run import write_json
from worldmodel.types import ActionSpec, ObsSpec

Arrays = dict[str, np.ndarray]

FORMAT = 1
SHARD = 1 << 15  # rows after which a shard is closed, at the end of an episode
FLAGS = ("action", "reward", "first", "terminal")


class Spec(NamedTuple):
    """What the rows of a data set hold."""

    obs: dict[str, ObsSpec]
    action: ActionSpec

    def tree(self) -> dict[str, Any]:
        """As JSON."""
        obs = {name: list(entry) for name, entry in self.obs.items()}
        return {"obs": obs, "action": list(self.action)}

    @classmethod
    def of(cls, tree: Mapping[str, Any]) -> Self:
        """What `tree` gave."""
        entries = tree["obs"].items()
        obs = {name: ObsSpec(kind, tuple(shape), n) for name, (kind, shape, n) in entries}
        kind, sizes = tree["action"]
        return cls(obs, ActionSpec(kind, tuple(sizes)))


class Episode(NamedTuple):
    """Where an episode stands, and whether what was done in it is known."""

    shard: int
    start: int
    length: int
    labelled: bool = True


def check_free(path: Path) -> None:
    """Raises ConfigError where a data set is."""
    if (path / "index.json").exists():
        raise ConfigError("path", str(path), "holds a data set", "name a new folder")


class Writer:
    """Writes episodes of columns (T, ...) to a new data set; `close`, or leave `with`, to end."""

    def __init__(self, path: Path, spec: Spec, shard: int = SHARD):
        self.path, self.spec, self.shard = Path(path), spec, shard
        check_free(self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        self.shards: list[list[int]] = []  # lengths of the episodes of each
        self.unlabelled: list[int] = []  # numbers of episodes, over all shards
        self._lengths: list[int] = []  # and columns of the shard that is open
        self._columns: dict[str, Column] = {}

    def add(self, episode: Arrays) -> None:
        """Add one episode, from its `first` row to its last."""
        self.extend([episode])

    def extend(self, parts: Iterable[Arrays], labelled: bool = True) -> int:
        """Add one episode as its rows come, in blocks; its length, 0 where none came.

        Nothing stays of an episode whose parts end in an error.
        """
        count = 0
        try:
            for part in parts:
                self._check(part, count == 0)
                for name, rows in part.items():
                    self._column(name, rows).append(rows)
                count += len(part["first"])
        except BaseException:
            self._back()
            raise
        if count:
            self._end(count, labelled)
        return count

    def close(self) -> None:
        """Write what is open, then the index."""
        self._flush()
        if not self.shards:
            raise ConfigError("data", str(self.path), "not one episode was written", "record more")
        index = {"format": FORMAT, **self.spec.tree(), "shards": self.shards}
        if self.unlabelled:
            index["unlabelled"] = self.unlabelled
        write_json(self.path / "index.json", index)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        for column in self._columns.values():
            column.drop()

    def _check(self, part: Arrays, begins: bool) -> None:
        wanted = {*(f"obs.{name}" for name in self.spec.obs), *FLAGS}
        if part.keys() != wanted:
            raise ValueError(f"an episode has {sorted(wanted)}, not {sorted(part)}")
        lengths = {name: len(rows) for name, rows in part.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"columns of an episode are of one length, not {lengths}")
        first = part["first"]
        if not len(first) or first[0] != begins or first[1:].any():
            raise ValueError("an episode is `first` in its first row and in no other")

    def _column(self, name: str, rows: np.ndarray) -> Column:
        if name not in self._columns:
            path = folder_of(self.path, len(self.shards)) / f"{name}.npy"
            self._columns[name] = Column(path, rows)
        return self._columns[name]

    def _end(self, length: int, labelled: bool) -> None:
        if not labelled:
            self.unlabelled.append(sum(map(len, self.shards)) + len(self._lengths))
        self._lengths.append(length)
        for column in self._columns.values():
            column.keep()
        if sum(self._lengths) >= self.shard:
            self._flush()

    def _back(self) -> None:
        for column in self._columns.values():
            column.back() if self._lengths else column.drop()
        self._columns = self._columns if self._lengths else {}

    def _flush(self) -> None:
        if self._lengths:
            for column in self._columns.values():
                column.save()
            self.shards.append(self._lengths)
            self._lengths, self._columns = [], {}


class Clips:
    """Reads a data set. `sample` gives whole-episode clips, `packed` rows without a gap."""

    def __init__(self, spec: Spec, episodes: Sequence[Episode], columns: Sequence[Arrays]):
        if not episodes:
            raise ConfigError("data", len(columns), "holds no episode", "record more")
        self.spec, self.episodes, self.columns = spec, list(episodes), list(columns)
        self.lengths = np.array([episode.length for episode in self.episodes])
        self._ends = self.lengths.cumsum()
        self.frames = int(self._ends[-1])
        self._favoured, self._share = self, 0.0

    @classmethod
    def open(cls, path: Path | str) -> Self:
        """The data set in a folder. Raises ConfigError where there is none."""
        path = Path(path)
        try:
            index = json.loads((path / "index.json").read_text())
        except (OSError, ValueError) as error:
            way_out = "record one with `nested data record`"
            raise ConfigError("data", str(path), f"no data set: {error}", way_out) from error
        if index.get("format") != FORMAT:
            raise ConfigError("data", str(path), f"not of format {FORMAT}", "record it again")
        spec = Spec.of(index)
        names = [*(f"obs.{name}" for name in spec.obs), *FLAGS]
        columns = [load_shard(path, i, names) for i in range(len(index["shards"]))]
        unlabelled = set(index.get("unlabelled", ()))
        found = enumerate(places(index["shards"]))
        episodes = [place._replace(labelled=i not in unlabelled) for i, place in found]
        return cls(spec, episodes, columns)

    def beside(self, path: Path, name: str = "latents") -> Self:
        """The same episodes with one more column, from the shards that `translate` wrote."""
        more = [load_shard(path, i, [name]) for i in range(len(self.columns))]
        columns = [one | other for one, other in zip(self.columns, more, strict=True)]
        return type(self)(self.spec, self.episodes, columns)

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        """The episodes of several data sets of the same columns, one set after another."""
        specs = [part.spec for part in parts]
        if any(spec != specs[0] for spec in specs):
            raise ConfigError(
                "data", len(parts), "data sets of different rows", "record them again"
            )
        columns, episodes = [], []
        for part in parts:
            shift = len(columns)
            episodes += [e._replace(shard=e.shard + shift) for e in part.episodes]
            columns += part.columns
        return cls(specs[0], episodes, columns)

    def split(self, every: int = 10) -> tuple[Self, Self]:
        """All episodes but each so-many-th, and those; where there are few, the last is in both."""
        held = self.episodes[every - 1 :: every] or self.episodes[-1:]
        kept = [e for i, e in enumerate(self.episodes) if (i + 1) % every] or held
        made = [type(self)(self.spec, part, self.columns) for part in (kept, held)]
        return made[0], made[1]

    def best(self, share: float) -> Self:
        """The labelled episodes of the highest returns, at least one; where none is, of all."""
        known = [e for e in self.episodes if e.labelled] or self.episodes
        returns = np.array([self.read(e, 0, e.length)["reward"].sum() for e in known])
        count = max(1, round(share * len(returns)))
        order = np.sort(np.argsort(-returns, kind="stable")[:count])
        return type(self)(self.spec, [known[i] for i in order], self.columns)

    def favour(self, share: float) -> Self:
        """The same episodes; `packed` draws so many of its rows from labelled ones alone.

        The others are drawn as ever, so labelled ones come in them too. Nothing changes for a share
        of zero, or where no episode is labelled.
        """
        made = type(self)(self.spec, self.episodes, self.columns)
        known = [e for e in self.episodes if e.labelled]
        if known:
            made._favoured, made._share = type(self)(self.spec, known, self.columns), share
        return made

    def read(self, episode: Episode, start: int, length: int) -> Arrays:
        """Rows of an episode, as views of the mapped files; fewer where it ends before.

        One column more than there are files: `labelled` (T,) bool, the episode's.
        """
        count = min(length, episode.length - start)
        rows = slice(episode.start + start, episode.start + start + count)
        columns = self.columns[episode.shard].items()
        labelled = np.broadcast_to(np.bool_(episode.labelled), (count,))
        return {name: column[rows] for name, column in columns} | {"labelled": labelled}

    def sample(self, batch: int, length: int, rng: np.random.Generator) -> Arrays:
        """Clips (B, T, ...) of one episode each, uniform over all that there are.

        Raises ValueError where every episode is shorter.
        """
        starts = np.maximum(self.lengths - length + 1, 0).cumsum()
        if not starts[-1]:
            longest = self.lengths.max()
            raise ValueError(f"no episode has {length} rows, the longest has {longest}: use packed")
        draws = rng.integers(starts[-1], size=batch)
        found = np.searchsorted(starts, draws, side="right")
        before = np.concatenate([[0], starts])[found]
        pairs = zip(found, draws - before, strict=True)
        return stack([[self.read(self.episodes[i], int(at), length)] for i, at in pairs])

    def packed(self, batch: int, length: int, rng: np.random.Generator) -> Arrays:
        """Rows (B, T, ...) that begin at any frame; where an episode ends, another one starts.

        Only `first` rows follow the end of an episode, so whoever heeds them never looks across.
        """
        favoured = round(self._share * batch)
        drawn = [*[self] * (batch - favoured), *[self._favoured] * favoured]
        return stack([clips._row(length, rng) for clips in drawn])

    def _row(self, length: int, rng: np.random.Generator) -> list[Arrays]:
        frame = int(rng.integers(self.frames))
        found = int(np.searchsorted(self._ends, frame, side="right"))
        start = frame - int(self._ends[found] - self.lengths[found])
        parts = [self.read(self.episodes[found], start, length)]
        missing = length - len(parts[0]["first"])
        while missing:
            episode = self.episodes[int(rng.integers(len(self.episodes)))]
            parts.append(self.read(episode, 0, missing))
            missing -= len(parts[-1]["first"])
        return parts

    def translate(
        self, path: Path, name: str, blocks: int, change: Callable[[Arrays, bool], np.ndarray]
    ) -> Self:
        """Write one more column: every shard in blocks of rows through `change`, in order.

        change: columns of the block and whether the shard begins, to the new column's rows.
        Shards that are there already stay; the folder is that of one tokenizer.
        """
        for i, columns in enumerate(self.columns):
            if not (folder_of(path, i) / f"{name}.npy").exists():
                count = len(columns["first"])
                parts = [
                    change({k: v[at : at + blocks] for k, v in columns.items()}, at == 0)
                    for at in range(0, count, blocks)
                ]
                save_shard(path, i, {name: np.concatenate(parts)})
        return self.beside(path, name)


def stack(rows: Iterable[Sequence[Arrays]]) -> Arrays:
    """Rows of parts in time to columns (B, T, ...)."""
    whole = [{k: np.concatenate([p[k] for p in parts]) for k in parts[0]} for parts in rows]
    return {name: np.stack([row[name] for row in whole]) for name in whole[0]}


def places(shards: Sequence[Sequence[int]]) -> Iterator[Episode]:
    """Where the episodes of these lengths stand."""
    for shard, lengths in enumerate(shards):
        start = 0
        for length in lengths:
            yield Episode(shard, start, length)
            start += length


def folder_of(path: Path, number: int) -> Path:
    """Where the columns of a shard are."""
    return path / f"{number:05d}"


def save_shard(path: Path, number: int, columns: Arrays) -> None:
    """One .npy file a column, each whole or not there."""
    folder = folder_of(path, number)
    folder.mkdir(parents=True, exist_ok=True)
    for name, column in columns.items():
        temporary = folder / f"{name}.tmp.npy"
        np.save(temporary, column, allow_pickle=False)
        temporary.replace(folder / f"{name}.npy")


def load_shard(path: Path, number: int, names: Iterable[str]) -> Arrays:
    """Columns of a shard, mapped. Raises ConfigError where one is not there, or is damaged."""
    folder = folder_of(path, number)
    try:
        return {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in names}
    except (OSError, ValueError) as error:
        problem, way_out = f"shard {number:05d} is damaged: {error}", "write the data set again"
        raise ConfigError("data", str(path), problem, way_out) from error


def record(envs: Envs, policy: Policy, frames: int, path: Path | str) -> Path:
    """Act with `policy` until whole episodes of at least `frames` rows are written."""
    done = 0
    with Writer(Path(path), Spec(envs.obs_spec, envs.action_spec)) as writer:
        for ended in acted(envs, policy):
            for _, episode in ended:
                writer.add(episode)
                done += len(episode["first"])
            if done >= frames:
                break
    return Path(path)


def record_episodes(envs: Envs, policy: Policy, episodes: int, path: Path | str) -> Path:
    """Write the first episodes of every slot, of each the same number: short ones weigh no more."""
    left = np.full(envs.num, -(-episodes // envs.num))
    with Writer(Path(path), Spec(envs.obs_spec, envs.action_spec)) as writer:
        for ended in acted(envs, policy):
            for slot, episode in ended:
                if left[slot]:
                    writer.add(episode)
                    left[slot] -= 1
            if not left.any():
                break
    return Path(path)


def acted(envs: Envs, policy: Policy) -> Iterator[list[tuple[int, Arrays]]]:
    """Act for ever; after each step the slots whose episodes ended, with their columns."""
    open_rows: list[list[Arrays]] = [[] for _ in range(envs.num)]
    row = envs.reset()
    while True:
        ended: list[tuple[int, Arrays]] = []
        for slot, rows in enumerate(open_rows):
            rows.append(columns_of(row, slot))
            if row.last[slot]:
                ended.append((slot, {k: np.stack([r[k] for r in rows]) for k in rows[0]}))
                rows.clear()
        yield ended
        row = envs.step(policy(row))


def columns_of(row: Row, slot: int) -> Arrays:
    """One slot's row as columns."""
    obs = {f"obs.{name}": value[slot].copy() for name, value in row.obs.items()}
    return obs | {name: np.array(getattr(row, name)[slot]) for name in FLAGS}
