"""Users at play with a trained agent: what a visit teaches, and what an episode is worth after it.

`visit` lets users' fast weights write while the agent acts, and keeps them as they were after
given numbers of interactions. `returns` plays one episode a user from such weights: its own, those
of somebody else, or none. All episodes of one call begin in the same states and are acted in one
program with the same dice, so they differ by what the fast weights know and by nothing else.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from agents import Dreamer
from agents.group import join_rows, split_rows
from experiments.config import Config
from experiments.driver import Driver
from experiments.envs import make_envs
from experiments.envs.scale import Scaled
from experiments.envs.userpop import UserPopEnvs
from experiments.visits import starts
from nested import fast as fast_state
from worldmodel.rssm import MemoryUse


class Play(NamedTuple):
    """One episode for each of U users: from what fast weights (U, ...), and what is done to them.

    `fast` None: those of a new user.
    """

    users: np.ndarray  # (U,) ids
    fast: Any
    use: MemoryUse


class Visit(NamedTuple):
    """What U users brought home."""

    states: dict[int, Any]  # interactions -> fast weights (U, ...)
    surprise: np.ndarray  # (T,) mean squared error of the memory before each write


def seat(config: Config, agent: Dreamer, play: Play, seed: int) -> Driver:
    """A driver with these users in its slots, each with their fast weights."""
    inner = make_envs(config.env.model_copy(update={"units": {}}), len(play.users), seed)
    assert isinstance(inner, UserPopEnvs)
    inner.seat(play.users)
    envs = Scaled(inner, config.env.units)
    driver = Driver(agent, envs, torch.Generator().manual_seed(seed), play.use)
    driver.row = envs.load_state_dict(inner.state_dict())
    carry = driver.carry._replace(user=torch.from_numpy(play.users))
    driver.carry = carry if play.fast is None else carry._replace(fast=play.fast)
    return driver


@torch.no_grad()
def returns(config: Config, agent: Dreamer, plays: Sequence[Play], seed: int) -> np.ndarray:
    """Returns (plays, U) of one episode each."""
    drivers = [seat(config, agent, play, seed) for play in plays]
    total = np.zeros((len(plays), len(plays[0].users)))
    alive = np.ones_like(total, bool)
    for use in sorted({play.use for play in plays}):
        some = [i for i, play in enumerate(plays) if play.use == use]
        while alive[some].any():
            for i, row in zip(some, step([drivers[i] for i in some]), strict=True):
                total[i] += alive[i] * row.reward
                alive[i] &= ~row.last
    return total


def step(drivers: Sequence[Driver]) -> list[Any]:
    """The rows that were current; one forward pass for all drivers, which have one agent."""
    lead = drivers[0]
    rows, carry = join_rows([d.batch() for d in drivers]), join_rows([d.carry for d in drivers])
    dice = tuple(driver.generator for driver in drivers)  # all throw the same
    action, after = lead.agent.act(carry, rows, dice, lead.use)
    parts = zip(action.chunk(len(drivers)), split_rows(after, len(drivers)), strict=True)
    return [d.take(*part).row for d, part in zip(drivers, parts, strict=True)]


@torch.no_grad()
def visit(
    config: Config, agent: Dreamer, users: np.ndarray, marks: Sequence[int], seed: int
) -> Visit:
    """Let new users learn for as many interactions as the last mark; the marks ascend from 0."""
    driver = seat(config, agent, Play(users, None, "write"), seed)
    states: dict[int, Any] = {n: driver.carry.fast for n in marks}
    count, surprise = np.zeros(len(users), np.int64), list[float]()
    while count.min() < marks[-1]:
        new = ~driver.step().row.first  # a row that begins an episode is no interaction
        count += new
        surprise.append(float(driver.carry.fast.surprise.mean()))
        for n in set(marks) & set(count[new].tolist()):
            here = torch.from_numpy(new & (count == n))
            states[n] = fast_state.where(here, driver.carry.fast, states[n])
    return Visit(states, np.array(surprise))


def somebody_else(state: Any) -> Any:
    """Everybody's fast weights with the next user."""
    return fast_state.tree_map(lambda x: x.roll(1, 0), state)


def displaced(agent: Dreamer, state: Any, slow: dict[str, Tensor]) -> dict[str, Tensor]:
    """What users' fast weights (U, ...) are, seen from the slow weights that they start from."""
    sound, _ = fast_state.heal(state, agent.initial(len(fast_state.leaves(state)[0])).fast)
    return {name: w - slow[name] for name, w in starts(sound).items()}
