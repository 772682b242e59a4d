"""Fast states of users who are away, on disk: a `nested.Store` in numbered shards.

A record never replaces another in place: an update goes to a free place, and the old one is free
again only after a `flush`. So whatever `put` has returned for survives a kill -9 of the process,
whatever was flushed survives a power failure, and a write that was cut short costs nothing but
itself. Marks name moments that `rewind` goes back to: a checkpoint holds one, so a resumed run
finds the states of that moment. A user's id is hashed to 128 bits and stands in no name and no
file; records are not encrypted. Linux and macOS.
"""

import fcntl
import json
import math
import os
import sys
import warnings
from collections import deque
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.data.shard import HEADER, Shard, checks, crcs
from nested.fast import Tree
from nested.users import Id, Records, named

FORMAT = 1
BLOCK = 4096  # records that `verify` reads at once


class UserShardsError(Exception):
    """A store cannot be opened or written; says which file and what to do."""


class UserShards:
    """States like `template` (any number of users) in `folder`; one process at a time.

    `shard` places a file; `keep` marks stay good for `rewind`, as many as there are checkpoints.
    `lost` counts users whose only record was broken, `older` those who fell back to a former one;
    a broken record that was replaced before costs nobody, unless a `rewind` goes back to it. A
    broken header hides its user, and counts as one lost.
    """

    def __init__(self, folder: Path, template: Tree, shard: int = 65_536, keep: int = 4):
        if shard < 1 or keep < 1:
            raise ValueError(f"users on disk: {shard=} and {keep=} must be positive")
        self.folder, self.keep = Path(folder), keep
        self._fields = {name: (x.dtype, x.shape[1:]) for name, x in named(template).items()}
        sizes = [x[0].nbytes for x in named(template).values()]
        self._ends = np.cumsum([0, *sizes]).tolist()
        self.bytes = self._ends[-1] + HEADER.itemsize  # of a record
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lost = self.older = 0
        self._lock = self._locked()
        try:
            self._records = self._layout(shard)
            self._marks = self._read_marks()
            self._shards = [self._shard(i) for i in range(len(list(self.folder.glob("*.users"))))]
            self._scan()
        except BaseException:
            os.close(self._lock)
            raise

    def __len__(self) -> int:
        return len(self._index)

    # ---- the protocol of nested.Store ---------------------------------------------------------
    def put(self, ids: Sequence[Id], records: Records) -> None:
        """Write these states; when it returns they survive the end of this process.

        Raises UserShardsError where the disk refuses; former states are whole then.
        """
        keys, payloads = [key_of(user) for user in ids], self._packed(records)
        if len(set(keys)) < len(keys) or len(keys) != len(payloads):
            raise ValueError(f"users on disk: {len(payloads)} states of {len(set(keys))} users")
        headers = np.zeros(len(keys), HEADER)
        headers["crc"] = crcs(payloads)
        headers["key"] = np.frombuffer(b"".join(keys), "<u8").reshape(-1, 2)
        self._sequence += 1  # also if it fails: no two records of a user have the same
        headers["sequence"] = self._sequence
        headers["generation"] = records.generation.numpy()
        headers["length"] = self._ends[-1]
        headers["check"] = checks(headers)
        places = self._claim(len(keys))
        try:
            for shard, rows, at in self._by_shard(places):
                shard.write(at, headers[rows], payloads[rows])
        except OSError as error:
            self._free += places.tolist()
            raise UserShardsError(f"cannot write {len(keys)} users: {error}") from error
        for key, place in zip(keys, places.tolist(), strict=True):
            if key in self._index:
                self._replaced.append((self._sequence, self._index[key]))
            self._index[key] = place

    def get(self, ids: Sequence[Id]) -> tuple[Tensor, Records]:
        """Which of the ids are known, as positions (m,), and the records of these."""
        keys = [key_of(user) for user in ids]
        which = [i for i, key in enumerate(keys) if key in self._index]
        headers, payloads, whole = self._read([self._index[keys[i]] for i in which])
        if not whole.all():
            self._fall_back([keys[which[row]] for row in np.flatnonzero(~whole).tolist()])
            return self.get(ids)
        return torch.tensor(which, dtype=torch.int64), self._unpacked(headers, payloads)

    def forget(self, ids: Iterable[Id]) -> None:
        """Wipe every record of these users, former ones too; a rewind does not bring them back."""
        keys = [key_of(user) for user in ids]
        gone = self._places_of(keys)
        for shard, _, at in self._by_shard(gone):
            shard.clear(at, payloads=True)
        freed = set(gone.tolist()) - set(self._free)
        self._replaced = deque(pair for pair in self._replaced if pair[1] not in freed)
        self._free += sorted(freed)
        for key in keys:
            self._index.pop(key, None)

    def mark(self) -> int:
        """Flush, and name this moment for `rewind`; the newest `keep` marks stay good."""
        self._sync()
        self._marks = [*(m for m in self._marks if m < self._sequence), self._sequence]
        self._marks = self._marks[-self.keep :]
        _replace(self.folder / "marks.json", json.dumps(self._marks))
        self._release()
        return self._sequence

    def rewind(self, mark: int) -> None:
        """Forget what was put after a mark. UserShardsError where the mark is not kept."""
        if mark not in self._marks:
            raise UserShardsError(
                f"{self.folder} cannot go back to mark {mark}, only to {self._marks}; "
                "keep as many marks as checkpoints"
            )
        for shard in self._shards:
            shard.clear(np.flatnonzero(shard.headers["sequence"] > mark))
        self._sync()
        self._marks = [m for m in self._marks if m <= mark]
        _replace(self.folder / "marks.json", json.dumps(self._marks))
        self._scan()

    # ---- besides ------------------------------------------------------------------------------
    def flush(self) -> None:
        """What was put survives a power failure; places of replaced records become free."""
        self._sync()
        self._release()

    def close(self) -> None:
        """Flush and let go of the files."""
        self.flush()
        for shard in self._shards:
            shard.close()
        os.close(self._lock)

    def where(self, user: Id) -> tuple[Path, int]:
        """The file and the offset of a user's payload. KeyError for an unknown one."""
        place = self._index[key_of(user)]
        shard = self._shards[place // self._records]
        return shard.path, int(shard.end(np.array(place % self._records))) - shard.length

    def verify(self) -> int:
        """Read every record; how many users were lost by it."""
        before = self.lost
        self._check(list(self._index))
        return self.lost - before

    # ---- files --------------------------------------------------------------------------------
    def _locked(self) -> int:
        file = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(file)
            text = f"{self.folder} is open elsewhere; close that store first"
            raise UserShardsError(text) from error
        return file

    def _layout(self, records: int) -> int:
        """Places of a shard: as the folder has it, whose states must be like ours."""
        path = self.folder / "layout.json"
        own = {k: [str(dtype), list(shape)] for k, (dtype, shape) in self._fields.items()}
        if not path.exists():
            if any(self.folder.glob("*.users")):
                raise UserShardsError(f"{path} is missing, so its shards cannot be read")
            body = {"format": FORMAT, "order": sys.byteorder, "records": records, "fields": own}
            _replace(path, json.dumps(body, indent=1))
            return records
        try:
            body = json.loads(path.read_bytes())
            _compare(path, body, own)
        except (ValueError, KeyError, TypeError) as error:
            raise UserShardsError(f"{path} is not a layout: {error!r}") from error
        return body["records"]

    def _shard(self, number: int) -> Shard:
        path = self.folder / f"{number:05d}.users"
        try:
            return Shard(path, self._records, self._ends[-1])
        except OSError as error:
            raise UserShardsError(f"cannot open {path}: {error}") from error

    def _sync(self) -> None:
        for shard in self._shards:
            shard.sync()

    def _read_marks(self) -> list[int]:
        try:
            return list(json.loads((self.folder / "marks.json").read_bytes()))
        except (OSError, ValueError):
            return []

    # ---- places: shard * records + row --------------------------------------------------------
    def _scan(self) -> None:
        """Read all headers: the newest record of each user, what it replaced, and free places."""
        tables = [shard.headers for shard in self._shards]
        headers = np.concatenate([np.zeros(0, HEADER), *tables])
        used = np.flatnonzero(headers.view(np.uint8).reshape(-1, HEADER.itemsize).any(1))
        good = checks(headers[used]) == headers["check"][used]
        good &= headers["length"][used] == self._ends[-1]
        broken, used = used[~good], used[good]
        self._drop(broken)
        found = headers[used]
        order = np.lexsort((found["sequence"], found["key"][:, 1], found["key"][:, 0]))
        same = (found["key"][order[1:]] == found["key"][order[:-1]]).all(1)
        newest = np.sort(order[np.append(~same, True)] if len(order) else order)
        self._index = dict(zip(_keys(found[newest]), used[newest].tolist(), strict=True))
        replacing = found["sequence"][order[1:][same]].tolist()
        pairs = zip(replacing, used[order[:-1][same]].tolist(), strict=True)
        self._replaced = deque(sorted(pairs))  # (sequence of what replaced it, place)
        self._free = np.setdiff1d(np.arange(len(headers)), used)[::-1].tolist()
        self._sequence = max(int(found["sequence"].max(initial=0)), *self._marks, 0)
        self._lose(len(broken), "at opening")
        cut = set(self._cut(used[newest]).tolist())
        self._check([key for key, place in self._index.items() if place in cut])

    def _cut(self, places: np.ndarray) -> np.ndarray:
        """Those of these places whose payload lay beyond the end of a file that is too short."""
        cut = [np.zeros(0, np.int64)]
        for shard, rows, at in self._by_shard(places):
            cut.append(places[rows][shard.end(at) > shard.found])
        for shard in self._shards:
            if shard.found < shard.size:
                text = f"{shard.path} is cut to {shard.found} of {shard.size} bytes"
                warnings.warn(text, RuntimeWarning, stacklevel=4)
                shard.found = shard.size
        return np.concatenate(cut)

    def _claim(self, n: int) -> np.ndarray:
        while len(self._free) < n:
            places = np.arange(self._records) + len(self._shards) * self._records
            self._shards.append(self._shard(len(self._shards)))
            self._free = [*places[::-1].tolist(), *self._free]
        taken = self._free[len(self._free) - n :]
        del self._free[len(self._free) - n :]
        return np.sort(np.array(taken, np.int64))

    def _release(self) -> None:
        """Free what was replaced before the oldest mark, or without marks before this flush."""
        oldest = self._marks[0] if self._marks else self._sequence
        while self._replaced and self._replaced[0][0] <= oldest:
            self._free.append(self._replaced.popleft()[1])

    def _by_shard(self, places: np.ndarray) -> list[tuple[Shard, np.ndarray, np.ndarray]]:
        """(shard, positions in `places`, places within the shard) for each shard there."""
        numbers = places // self._records
        found = [(int(number), np.flatnonzero(numbers == number)) for number in np.unique(numbers)]
        return [(self._shards[n], rows, places[rows] % self._records) for n, rows in found]

    def _places_of(self, keys: Sequence[bytes]) -> np.ndarray:
        """All places that hold a record of these users, former ones too."""
        wanted, known = np.frombuffer(b"".join(keys), "<u8").reshape(-1, 2), set(keys)
        found = [np.zeros(0, np.int64)]
        for number, shard in enumerate(self._shards):
            table = np.ascontiguousarray(shard.headers["key"])
            rows = np.flatnonzero(np.isin(table[:, 0], wanted[:, 0]))
            rows = [r for r in rows.tolist() if table[r].tobytes() in known]
            found.append(np.array(rows, np.int64) + number * self._records)
        return np.concatenate(found)

    # ---- records ------------------------------------------------------------------------------
    def _read(
        self, places: Sequence[int] | np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Headers, payloads (n, length) and whether the payload is what was written."""
        at = np.array(places, np.int64)
        headers, payloads = np.zeros(len(at), HEADER), np.empty((len(at), self._ends[-1]), np.uint8)
        for shard, rows, inside in self._by_shard(at):
            headers[rows], payloads[rows] = shard.headers[inside], shard.payloads[inside]
        return headers, payloads, crcs(payloads) == headers["crc"]

    def _check(self, keys: Sequence[bytes]) -> None:
        """Read the records of these users; where one is broken, fall back."""
        for at in range(0, len(keys), BLOCK):
            block = keys[at : at + BLOCK]
            _, _, whole = self._read([self._index[key] for key in block])
            if not whole.all():
                self._fall_back([block[row] for row in np.flatnonzero(~whole).tolist()])

    def _fall_back(self, keys: Sequence[bytes]) -> None:
        """Records of these users are broken: drop them, and go back to the newest whole ones."""
        broken = {key: self._index.pop(key) for key in dict.fromkeys(keys)}
        self._drop(np.array(list(broken.values()), np.int64))
        self._free += broken.values()
        places = self._places_of(list(broken))
        headers, _, whole = self._read(places)
        owners = _keys(headers)
        rows = np.argsort(headers["sequence"], kind="stable").tolist()  # the newest one stays
        back = {owners[row]: int(places[row]) for row in rows if whole[row]}
        self._drop(places[[key not in back for key in owners]])  # lost once, not at each opening
        kept = set(back.values())
        self._replaced = deque(pair for pair in self._replaced if pair[1] not in kept)
        self._free = [free for free in self._free if free not in kept]
        self._index |= back
        self.older += len(back)
        self._lose(len(broken) - len(back), "by a broken record")

    def _drop(self, places: np.ndarray) -> None:
        for shard, _, at in self._by_shard(places):
            shard.clear(at)

    def _lose(self, users: int, how: str) -> None:
        if users:
            self.lost += users
            text = f"{self.folder}: {users} records lost {how}"
            warnings.warn(text, RuntimeWarning, stacklevel=4)

    def _packed(self, records: Records) -> np.ndarray:
        """States as bytes (n, length), one field after the other."""
        rows = np.empty((len(records.generation), self._ends[-1]), np.uint8)
        for (name, (dtype, shape)), first, last in self._layout_of_fields():
            field = records.fields[name]
            if (field.dtype, field.shape[1:]) != (dtype, shape):
                given = f"{field.dtype} {tuple(field.shape[1:])}"
                raise ValueError(f"users on disk: {name} is {given}, not {dtype} {tuple(shape)}")
            flat = field.detach().contiguous().reshape(len(rows), math.prod(shape))
            rows[:, first:last] = flat.view(torch.uint8).numpy()
        return rows

    def _unpacked(self, headers: np.ndarray, rows: np.ndarray) -> Records:
        fields: dict[str, Tensor] = {}
        for (name, (dtype, shape)), first, last in self._layout_of_fields():
            flat = torch.empty(len(rows), math.prod(shape), dtype=dtype)
            flat.view(torch.uint8).copy_(torch.from_numpy(rows[:, first:last]))
            fields[name] = flat.view(len(rows), *shape)
        return Records(fields, torch.from_numpy(headers["generation"].astype(np.int64)))

    def _layout_of_fields(self) -> list[tuple[Any, int, int]]:
        return list(zip(self._fields.items(), self._ends[:-1], self._ends[1:], strict=True))


def key_of(user: Id) -> bytes:
    """128 bits for an id; the int 1, "1" and b"1" are three users."""
    raw = user if isinstance(user, bytes) else str(user).encode()
    return blake2b(raw, digest_size=16, person=type(user).__name__.encode()).digest()


def _keys(headers: np.ndarray) -> list[bytes]:
    raw = headers["key"].tobytes()
    return [raw[at : at + 16] for at in range(0, len(raw), 16)]


def _compare(path: Path, body: dict[str, Any], own: dict[str, Any]) -> None:
    if body["format"] != FORMAT or body["order"] != sys.byteorder:
        found = f"format {body['format']}, {body['order']} endian"
        raise UserShardsError(f"{path}: {found}; this reads {FORMAT}, {sys.byteorder} endian")
    for name in [*own, *body["fields"]]:
        there, here = body["fields"].get(name, "absent"), own.get(name, "absent")
        if there != here:
            raise UserShardsError(
                f"{path}: field {name} is {there} on disk and {here} now; "
                "open it with the configuration it was made with, or choose another folder"
            )
    if list(own) != list(body["fields"]):
        raise UserShardsError(f"{path}: fields stand in another order: {list(body['fields'])}")


def _replace(path: Path, text: str) -> None:
    """A small file, whole or not at all, durable."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
