"""Who sits in the slots: users come, learn while they are there, and go.

A visit ends where another user sits down. What it taught the fast weights, as a displacement from
the memory's start, is then taken into the mean that a level with `source: user` pulls the start
toward (FedAvg, 1602.05629; Reptile, 1803.02999), and the state goes to a pool, where the user finds
it again. Kept are the weights themselves and not displacements: they stay what they are when the
start moves, so nothing counts twice and there is nothing to rebase. Replay keeps fast weights at
the start of a sequence only: who comes in the middle of one begins there as a new user would.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from agents import Dreamer
from experiments.config import Config, ConfigError
from experiments.data.users import UserShards, UserShardsError
from experiments.driver import Driver
from experiments.record import RunError
from nested import Users, Visits
from nested import fast as fast_state
from nested.users import named
from timescales import Pull, Timescales
from worldmodel.types import NOBODY

SOURCE = "user"  # what levels call the mean of visits
SHARD = 4096  # users in a file
MEMORY = "world.dynamics.memory."


class Sessions(Protocol):
    """What the loop asks of those who sit in its slots."""

    def open(self, folder: Path) -> None:
        """Open what is kept on disk, in `folder`. Raises RunError where that cannot be."""
        ...

    def close(self) -> None:
        """Let go of the files."""
        ...

    def follow(self, driver: Driver, episodes: int = 0) -> None:
        """After a step or a reset of the driver that ended episodes: move the levels on sessions.

        Who has come with the driver's new row gets their fast weights in its carry.
        """
        ...

    def metrics(self) -> dict[str, float]:
        """What is reported beside the rest."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Everything that continues, what is on disk by a mark in it."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was taken."""
        ...


def make_sessions(config: Config, agent: Dreamer, timescales: Timescales, slots: int) -> Sessions:
    """For the configured environment: its users, or one user a slot."""
    if not config.env.has_users:
        return Alone(timescales)
    return Seats(config, agent, timescales, slots)


class Alone:
    """Every slot is one user, and each of its episodes a session."""

    def __init__(self, timescales: Timescales):
        self.timescales = timescales

    def open(self, folder: Path) -> None:
        """Nothing is on disk."""

    def close(self) -> None:
        """Nothing is open."""

    def follow(self, driver: Driver, episodes: int = 0) -> None:
        """A tick for the episodes that ended."""
        if episodes:
            self.timescales.tick("session", episodes)

    def metrics(self) -> dict[str, float]:
        """Nothing more than the episodes."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Nothing continues."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing continues."""


class Seats:
    """Users in N slots, a pool of those who are away, and the mean of what they learned.

    A user may sit in several slots at once: all begin with the state that the pool has, and the
    one who leaves last is remembered.
    """

    def __init__(self, config: Config, agent: Dreamer, timescales: Timescales, slots: int):
        self.agent, self.timescales = agent, timescales
        self.config, self.checkpoints = config.users, config.checkpoint.keep
        self.users = np.full(slots, NOBODY)  # who sits where
        self.places = torch.zeros(slots, dtype=torch.int64)  # of the pool, where they sit
        self.ended = 0  # visits
        self.pool: Users | None = None
        self._store: UserShards | None = None
        live, learned = timescales.weights("params"), starts(agent.initial(1).fast)
        self.slow = {name: live[name] for name in learned}
        self.visits = Visits.none(self.slow)
        self.taught = {
            level.name
            for level in timescales.levels
            if isinstance(level.flow, Pull) and level.flow.source == SOURCE
        }
        for name in self.taught:
            check_taught(name, timescales.weights(name), self.slow)

    def open(self, folder: Path) -> None:
        """Make the pool, and its store in `folder`. Raises RunError where that cannot be read."""
        if self.config is None or not self.config.keep:
            return
        new = self.agent.initial(1).fast
        if self.config.store == "disk":
            try:  # one mark more: the newest may belong to a checkpoint that was never finished
                self._store = UserShards(folder, new, SHARD, self.checkpoints + 1)
            except UserShardsError as error:
                raise RunError(str(error)) from error
        self.pool = Users(new, self.config.slots, self._store)

    def close(self) -> None:
        """Let go of the store's files."""
        if self._store is not None:
            self._store.close()

    @torch.no_grad()
    def follow(self, driver: Driver, episodes: int = 0) -> None:
        """Seat who has come with the driver's row, and tick once for all who have gone."""
        row = driver.row
        assert row is not None, "reset the driver first"
        came = np.flatnonzero(row.first & (row.user != self.users))
        went = came[self.users[came] != NOBODY]
        former, self.users = self.users, np.where(row.first, row.user, self.users)
        if len(went):
            self._leave(driver, went, former[went])
        if len(came) and self.pool is not None:
            self._enter(driver, came, self.pool)
        if len(went):
            self._tick(len(went))

    def _leave(self, driver: Driver, slots: np.ndarray, users: np.ndarray) -> None:
        """What users (n,) learned in these slots joins the mean; their states go to the pool."""
        rows = torch.from_numpy(slots).to(driver.generator.device)
        state = fast_state.gather(driver.carry.fast, rows)
        self.ended += len(slots)
        if self.taught:
            sound, _ = fast_state.heal(state, self.agent.initial(len(slots)).fast)
            self.visits = self.visits.add({n: w - self.slow[n] for n, w in starts(sound).items()})
        if self.pool is None:
            return
        # of one user in several slots the last one stays
        ids, reverse = np.unique(users[::-1], return_index=True)
        last = torch.from_numpy(len(users) - 1 - reverse)
        places = self.places[torch.from_numpy(slots)[last]].to(rows.device)
        self.pool.scatter(places, fast_state.gather(state, last.to(rows.device)))
        self.pool.leave(ids[~np.isin(ids, self.users)])

    def _enter(self, driver: Driver, slots: np.ndarray, pool: Users) -> None:
        """The states of who sits in these slots now, into the driver's carry."""
        ids, which = np.unique(self.users[slots], return_inverse=True)
        places = pool.enter(ids, self.agent.initial(1).fast)[torch.from_numpy(which)]
        self.places[slots] = places.cpu()
        rows = torch.from_numpy(slots).to(places.device)
        carry, state = driver.carry, pool.gather(places)
        fast = fast_state.tree_map(lambda x, new: x.index_copy(0, rows, new), carry.fast, state)
        user = carry.user.index_copy(0, rows, torch.from_numpy(self.users[slots]).to(rows.device))
        driver.carry = carry._replace(fast=fast, user=user)

    def _tick(self, visits: int) -> None:
        """The levels on sessions move; where one took in the visits, a new mean begins."""
        sources = {SOURCE: self.visits.source(self.slow)} if self.taught else {}
        moved = self.timescales.tick("session", visits, sources)
        if self.taught & set(moved):
            self.visits = Visits.none(self.slow)
            if self.pool is not None:
                self.pool.advance()

    def metrics(self) -> dict[str, float]:
        """Visits that ended, and how many users the pool holds."""
        found = {"train/visits": float(self.ended)}
        return found if self.pool is None else found | {"train/users": float(len(self.pool))}

    def state_dict(self) -> dict[str, Any]:
        """Who sits where, the visits since the last consolidation, and the pool."""
        return {
            "users": self.users.copy(),
            "places": self.places,
            "ended": self.ended,
            "visits": self.visits,
            "pool": None if self.pool is None else self.pool.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was taken; what was stored on disk since is forgotten."""
        if (self.pool is None) != (state["pool"] is None):
            raise ValueError("users were kept in one and are not in the other")
        self.users, self.places = state["users"].copy(), state["places"].clone()
        self.ended = state["ended"]
        total, weight = state["visits"]
        where = {name: p.device for name, p in self.slow.items()}
        self.visits = Visits({n: x.to(where[n]) for n, x in total.items()}, weight)
        if self.pool is not None:
            self.pool.load_state_dict(state["pool"])


def starts(state: fast_state.Tree) -> dict[str, Tensor]:
    """Fast weights (B, ...) by the name of the parameter that they start from."""
    fields = {name: x for name, x in named(state).items() if "weights" in name.split(".")}
    return {MEMORY + name.replace("weights", "start"): x for name, x in fields.items()}


def check_taught(name: str, weights: Mapping[str, Tensor], slow: Mapping[str, Tensor]) -> None:
    """Raise ConfigError unless what a level owns is what users learn."""
    others = [parameter for parameter in weights if parameter not in slow]
    if others:
        raise ConfigError(
            f"timescales.levels.{name}", ...,
            f"users teach {', '.join(slow) or 'nothing'}, not {others[0]}",
            r"let it match '^world\.dynamics\.memory\..*start'",
        )  # fmt: skip
