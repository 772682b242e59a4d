"""Acting: an agent in the slots of an environment, one vector step at a time.

The driver holds what continues between steps: the agent's carry, the current row and the returns
so far. Row and carry go to the replay together, so a chunk starts with the state it was acted in.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from agents import Dreamer
from experiments.envs import Envs, Row
from nested import fast as fast_state
from worldmodel import Batch, Carry
from worldmodel.rssm import MemoryUse

Arrays = dict[str, np.ndarray]


class Step(NamedTuple):
    """What one vector step saw, before its action was taken."""

    row: Row
    carry: Carry  # the agent's carry before the row
    returns: list[float]  # of the episodes that ended in this row
    lengths: list[int]


class Driver:
    """Acts with `agent` in `envs`; draws from `generator`, on the agent's device."""

    def __init__(
        self, agent: Dreamer, envs: Envs, generator: torch.Generator, use: MemoryUse = "write"
    ):
        self.agent, self.envs, self.generator = agent, envs, generator
        self.use: MemoryUse = use
        self.carry = agent.initial(envs.num)
        self.row: Row | None = None
        self._return = np.zeros(envs.num, np.float64)
        self._length = np.zeros(envs.num, np.int64)

    def reset(self, context: str | Sequence[str] | None = None) -> None:
        """Start new episodes in every slot, in a hidden context, or one a slot, if named."""
        self._begin(self.envs.reset(context))

    def _begin(self, row: Row) -> None:
        self.row = row
        self._return[:] = 0.0
        self._length[:] = 0

    def step(self, random: np.random.Generator | None = None) -> Step:
        """Filter the current row, act on it, and step; with `random` the action is uniform."""
        action, carry = self.agent.act(self.carry, self.batch(), self.generator, self.use)
        return self.take(action, carry, random)

    def batch(self) -> Batch:
        """The current row as tensors (N, ...) on the device."""
        assert self.row is not None, "reset the driver first"
        return to_batch(self.row, self.generator.device)

    def take(self, action: Tensor, after: Carry, random: np.random.Generator | None = None) -> Step:
        """Step with an encoded action (N, A), or a uniform one; `after` is the new carry."""
        assert self.row is not None, "reset the driver first"
        row, carry = self.row, self.carry
        self._return = np.where(row.first, 0.0, self._return + row.reward)
        self._length = np.where(row.first, 1, self._length + 1)
        ended = np.flatnonzero(row.last)
        self.carry = after
        taken = action.cpu().numpy() if random is None else self.envs.random_action(random)
        self.row = self.envs.step(taken)
        returns = [float(self._return[slot]) for slot in ended]
        return Step(row, carry, returns, [int(self._length[slot]) - 1 for slot in ended])

    def state_dict(self) -> dict[str, Any]:
        """Everything that continues: arrays and tensors only."""
        return {
            "envs": self.envs.state_dict(),
            "carry": pack(self.carry),
            "return": self._return.copy(),
            "length": self._length.copy(),
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was taken; episodes are replayed from their seeds and actions."""
        self.row = self.envs.load_state_dict(state["envs"])
        self.carry = unpack(state["carry"], self.carry)
        self._return = np.asarray(state["return"]).copy()
        self._length = np.asarray(state["length"]).copy()
        self.generator.set_state(state["generator"])


def to_batch(row: Row, device: torch.device) -> Batch:
    """A row of numpy arrays as tensors (N, ...) on the device."""
    columns = (row.action, row.reward, row.first, row.terminal, row.user)
    obs = {key: torch.from_numpy(value).to(device) for key, value in row.obs.items()}
    return Batch(obs, *(torch.from_numpy(np.asarray(x)).to(device) for x in columns))


def replayed_batch(arrays: Arrays, device: torch.device) -> Batch:
    """Replayed columns (B, T, ...) as tensors on the device; uint8 until they get there."""
    tensors = {name: torch.from_numpy(x).to(device) for name, x in arrays.items()}
    obs = {k.removeprefix("obs."): v for k, v in tensors.items() if k.startswith("obs.")}
    return Batch(obs, *(tensors[name] for name in Batch._fields[1:]))


def pack(carry: Carry) -> Arrays:
    """A carry as flat numpy arrays, in the order of its leaves."""
    leaves: list[Tensor] = fast_state.leaves(carry)
    return {f"{i:02d}": leaf.detach().cpu().numpy() for i, leaf in enumerate(leaves)}


def unpack(arrays: Mapping[str, Any], like: Carry) -> Carry:
    """The carry that `pack` was given, with the structure and the device of `like`."""
    values = iter(arrays[name] for name in sorted(arrays))
    return fast_state.tree_map(
        lambda leaf: torch.from_numpy(np.asarray(next(values)).copy()).to(leaf.device), like
    )
