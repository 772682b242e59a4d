"""A pool of users' fast states: one tensor a leaf, a slot a user, and a store for who is away.

A user enters, sits in a slot, and leaves. Who has left is in the store before `leave` returns, and
keeps the slot until it is needed: the least recently used goes first. States carry the number of
the slow weights' generation that they are displacements from, and are rebased on their next use
after the slow weights took something in, so that nothing counts twice. The store is handed in:
`experiments/data/users.py` keeps one on disk. Shapes: N slots, n users of one call.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any, NamedTuple, Protocol, TypeAlias, cast

import numpy as np
import torch
from torch import Tensor

from nested import fast

Id: TypeAlias = int | str | bytes
Ids: TypeAlias = Sequence[Id] | Tensor | np.ndarray
Rebase: TypeAlias = Callable[[fast.Tree, Tensor], fast.Tree]


class Records(NamedTuple):
    """States of n users as a store holds them, on the CPU."""

    fields: dict[str, Tensor]  # dotted name of a leaf -> (n, *shape)
    generation: Tensor  # (n,) int64, of the slow weights


class Store(Protocol):
    """Keeps the states of users who are away. Ids of one call differ from each other."""

    def put(self, ids: Sequence[Id], records: Records) -> None:
        """Keep these states, in place of older ones of the same users."""
        ...

    def get(self, ids: Sequence[Id]) -> tuple[Tensor, Records]:
        """Which of the ids are known, as positions (m,) int64, and the records of these."""
        ...

    def forget(self, ids: Sequence[Id]) -> None:
        """Keep nothing of these users; unknown ones are no error."""
        ...

    def mark(self) -> int:
        """Make all that was put durable, and name this moment for `rewind`."""
        ...

    def rewind(self, mark: int) -> None:
        """Forget everything that was put after a mark, and remember what it replaced."""
        ...


class Users:
    """The fast states of up to `slots` users at once, like `template` (any number of users).

    `rebase(state, generation)` gives the states of n users, displacements from the slow weights of
    generation (n,), as displacements from those of now; None leaves them as they are.
    """

    def __init__(
        self,
        template: fast.Tree,
        slots: int,
        store: Store | None = None,
        rebase: Rebase | None = None,
    ):
        shapes = named(template)
        if slots < 1 or not shapes or not all(len(x) for x in shapes.values()):
            raise ValueError(f"users: {slots} slots for states of {', '.join(shapes) or 'nothing'}")
        self.size, self.store, self.rebase = slots, store, rebase
        self.generation = 0  # of the slow weights; see `advance`
        self.forgotten = 0  # users whose slot was needed, without a store to put them in
        self._template = fast.tree_map(_first, template)
        self._start = named(self._template)
        self._pool = {name: _times(x, slots).clone() for name, x in self._start.items()}
        self.device = next(iter(shapes.values())).device
        self._generations = torch.zeros(slots, dtype=torch.int64, device=self.device)
        self._stale = False  # whether a slot may be of an older generation
        self._healed = torch.zeros((), dtype=torch.int64, device=self.device)
        self._slot: dict[Id, int] = {}
        self._left: OrderedDict[Id, None] = OrderedDict()  # oldest first
        self._free = list(range(slots))[::-1]

    def __len__(self) -> int:
        """Users in the pool, seated or not."""
        return len(self._slot)

    def __contains__(self, user: Id) -> bool:
        return user in self._slot

    @property
    def bytes(self) -> int:
        """Bytes of one user's state."""
        return sum(x[0].nbytes for x in self._pool.values())

    @property
    def healed(self) -> int:
        """How often a state was not finite and its user had to start again."""
        return int(self._healed)

    def enter(self, ids: Ids, initial: fast.Tree) -> Tensor:
        """Seat these users: their slots (n,) int64, each with the user's state.

        Who was never seen starts from `initial`, a state of one user. Raises ValueError where an
        id comes twice or the seated users leave too few slots; then nothing has changed.
        """
        users = plain(ids)
        start = self._fitting(initial, rows=1)
        absent = [user for user in users if user not in self._slot]
        self._check_room(users, absent)
        which, records = self._fetch(absent)
        self._start = {name: x.clone() for name, x in start.items()}
        for user in users:
            self._left.pop(user, None)
        for user in absent:
            self._slot[user] = self._vacant()
        slots = self._index(absent)
        self._put(slots, {name: _times(x, len(slots)) for name, x in start.items()})
        self._generations[slots] = self.generation
        if records is not None:
            found = slots[which.to(self.device)]
            self._put(found, records.fields)
            self._generations[found] = records.generation.to(self.device)
            self._stale |= bool((records.generation != self.generation).any())
        return self._index(users)

    def gather(self, slots: Tensor) -> fast.Tree:
        """The states (n, ...) of these slots, rebased where the slow weights have moved on."""
        if self._stale and self.rebase is not None:
            self._refresh(slots, self.rebase)
        return self._tree(self._rows(slots))

    def scatter(self, slots: Tensor, state: fast.Tree) -> None:
        """Keep the states (n, ...) of seated users; each slot once.

        They stay of the generation that `gather` gave them. A user with a value that is not finite
        goes back to the initial state, alone, and is counted in `healed`.
        """
        fields = self._fitting(state, rows=len(slots))
        sound = [x.isfinite().reshape(len(slots), -1).all(1) for x in fields.values()]
        broken = ~torch.stack(sound).all(0)
        self._put(slots, fast.reset(fields, self._start, broken))
        generations = self._generations[slots]
        self._generations[slots] = generations.where(~broken, self.generation)
        self._healed += broken.sum()

    def leave(self, ids: Ids) -> None:
        """These users stand up: their states are in the store when this returns."""
        users = plain(ids)
        for user in users:
            if user not in self._slot or user in self._left:
                raise ValueError(f"users: {user!r} leaves without having entered")
        slots = self._index(users)
        if self.store is not None and users:
            fields = {name: x.cpu() for name, x in self._rows(slots).items()}
            self.store.put(users, Records(fields, self._generations[slots].cpu()))
        self._left.update(dict.fromkeys(users))

    def forget(self, ids: Ids) -> None:
        """Keep nothing of these users, here and in the store; seated ones lose their slots."""
        users = plain(ids)
        for user in users:
            self._left.pop(user, None)
            if user in self._slot:
                self._free.append(self._slot.pop(user))
        if self.store is not None:
            self.store.forget(users)

    def advance(self) -> int:
        """The slow weights took in what users learned: the number of their new generation."""
        self.generation += 1
        self._stale = True
        return self.generation

    def state_dict(self) -> dict[str, Any]:
        """Everything, with a mark in the store: it is rewound to it when this is loaded."""
        users = list(self._slot)
        slots = self._index(users)
        return {
            "size": self.size,
            "generation": self.generation,
            "forgotten": self.forgotten,
            "healed": self.healed,
            "users": [_text(user) for user in users],
            "left": [_text(user) for user in self._left],
            "slots": slots,
            "free": torch.tensor(self._free, dtype=torch.int64),
            "generations": self._generations[slots],
            "start": dict(self._start),
            "fields": self._rows(slots),
            "mark": None if self.store is None else self.store.mark(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`. ValueError where it is of other states or another size."""
        if state["size"] != self.size:
            raise ValueError(f"a pool of {state['size']} slots loaded into one of {self.size}")
        slots = state["slots"].to(self.device)
        self._check(state["fields"], rows=len(slots))
        self._check(state["start"], rows=1)
        self._start = {name: x.to(self.device) for name, x in state["start"].items()}
        self._put(slots, state["fields"])
        self._generations[slots] = state["generations"].to(self.device)
        self._slot = dict(zip(map(_id, state["users"]), slots.tolist(), strict=True))
        self._left = OrderedDict.fromkeys(map(_id, state["left"]))
        self._free = state["free"].tolist()
        self.generation, self.forgotten = state["generation"], state["forgotten"]
        self._healed.fill_(state["healed"])
        self._stale = True
        if self.store is not None and state["mark"] is not None:
            self.store.rewind(state["mark"])

    # ---- slots --------------------------------------------------------------------------------
    def _check_room(self, users: Sequence[Id], absent: Sequence[Id]) -> None:
        staying = sum(user in self._left for user in users)
        room = len(self._free) + len(self._left) - staying
        if len(absent) > room:
            raise ValueError(
                f"users: {len(absent)} more need a slot and {room} of {self.size} are left; "
                "let others leave first, or make the pool larger"
            )

    def _vacant(self) -> int:
        if self._free:
            return self._free.pop()
        user, _ = self._left.popitem(last=False)  # the least recently used; it is in the store
        self.forgotten += self.store is None
        return self._slot.pop(user)

    def _index(self, users: Iterable[Id]) -> Tensor:
        slots = [self._slot[user] for user in users]
        return torch.tensor(slots, dtype=torch.int64, device=self.device)

    # ---- states -------------------------------------------------------------------------------
    def _fetch(self, users: Sequence[Id]) -> tuple[Tensor, Records | None]:
        """Of the users in the store: their positions and records."""
        if self.store is None or not users:
            return torch.zeros(0, dtype=torch.int64), None
        which, records = self.store.get(users)
        self._check(records.fields, rows=len(which))
        newest = int(records.generation.max()) if len(which) else 0
        if newest > self.generation:
            raise ValueError(
                f"users: a stored state is of generation {newest}, the slow weights of "
                f"{self.generation}; load the checkpoint that the store belongs to, or start anew"
            )
        return which, records if len(which) else None

    def _put(self, slots: Tensor, fields: Mapping[str, Tensor]) -> None:
        for name, pool in self._pool.items():
            pool.index_copy_(0, slots, fields[name].to(self.device))

    def _rows(self, slots: Tensor) -> dict[str, Tensor]:
        return {name: x.index_select(0, slots) for name, x in self._pool.items()}

    def _tree(self, fields: Mapping[str, Tensor]) -> fast.Tree:
        """A tree like the template."""
        order = iter(fields.values())

        def following(_: Tensor) -> Tensor:
            return next(order)

        return fast.tree_map(following, self._template)

    def _refresh(self, slots: Tensor, rebase: Rebase) -> None:
        """Rebase those of these slots that are displacements from older slow weights."""
        old = slots[self._generations[slots] != self.generation]
        if len(old):
            state = rebase(self._tree(self._rows(old)), self._generations[old])
            self._generations[old] = self.generation
            self.scatter(old, state)
        self._stale = bool((self._generations[self._index(self._slot)] != self.generation).any())

    def _fitting(self, state: fast.Tree, rows: int) -> dict[str, Tensor]:
        """The tensors of a state that is like the template, of this many users."""

        def same(own: Tensor, given: Tensor) -> Tensor:
            return given.detach()

        fields = named(fast.tree_map(same, self._template, state))
        self._check(fields, rows)
        return fields

    def _check(self, fields: Mapping[str, Tensor], rows: int) -> None:
        if sorted(fields) != sorted(self._pool):
            raise ValueError(f"users: states of {sorted(self._pool)}, but given {sorted(fields)}")
        for name, own in self._pool.items():
            given, shape = fields[name], (rows, *own.shape[1:])
            if (given.dtype, given.shape) != (own.dtype, shape):
                raise ValueError(
                    f"users: {name or 'the state'} is {given.dtype} {tuple(given.shape)}, "
                    f"the pool holds {own.dtype} {shape}"
                )


def named(tree: fast.Tree, name: str = "") -> dict[str, Tensor]:
    """The tensors of a tree by dotted names, in order; a tensor alone is named ""."""
    if isinstance(tree, Tensor):
        return {name: tree}
    if isinstance(tree, tuple):
        parts = cast("tuple[fast.Tree, ...]", tree)
        kind: Any = type(parts)
        keys = map(str, range(len(parts))) if kind is tuple else kind._fields
        items = dict(zip(keys, parts, strict=True))
    else:
        items = dict(cast("Mapping[str, fast.Tree]", tree))
    found: dict[str, Tensor] = {}
    for key, value in items.items():
        found |= named(value, f"{name}.{key}" if name else key)
    return found


def plain(ids: Ids) -> list[Id]:
    """Ids as int, str or bytes. TypeError for others, ValueError where one comes twice."""
    listed = cast("Any", ids).tolist() if isinstance(ids, Tensor | np.ndarray) else ids
    users: list[Id] = []
    for user in listed:
        if isinstance(user, int | str | bytes):
            users.append(user)
        elif isinstance(user, Integral):  # numpy's
            users.append(int(user))
        else:
            raise TypeError(f"users: an id is an int, str or bytes, not {user!r}")
    if len(set(users)) < len(users):
        twice = next(user for i, user in enumerate(users) if user in users[:i])
        raise ValueError(f"users: {twice!r} comes twice in one call")
    return users


def _first(rows: Tensor) -> Tensor:
    return rows[:1].detach().clone()


def _times(row: Tensor, n: int) -> Tensor:
    return row.expand(n, *row.shape[1:])


def _text(user: Id) -> str:
    """An id as text that JSON holds."""
    if isinstance(user, bytes):
        return f"b{user.hex()}"
    return f"s{user}" if isinstance(user, str) else f"i{user}"


def _id(text: str) -> Id:
    kind, value = text[0], text[1:]
    return {"b": bytes.fromhex, "s": str, "i": int}[kind](value)
