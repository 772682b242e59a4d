"""Linear associative memories: a matrix for each user and head that learns while it runs.

One step goes back to the initial weights where `reset` is set, writes a key-value pair by one
rule, then reads with a query: three rules, one law for a step and a sequence. The weights a user
starts from are a slow parameter (`start`), learned through the steps that follow it.

Shapes: B users, T time, H heads, D width of a head (keys and values alike), N = B * H.
"""

from abc import abstractmethod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LinearState(NamedTuple):
    """Fast weights of a linear memory, and how wrong it was about the last pair it wrote."""

    weights: Tensor  # (B, H, D, D), keys by values
    surprise: Tensor  # (B,) squared error before the write, mean over heads and values; detached


class LinearMemory(nn.Module):
    """What the linear memories share; the rule is what each of them adds."""

    gates: int  # scalars that the rule takes for each head

    def __init__(self, dim_in: int, dim_out: int, dim: int = 32, heads: int = 1):
        super().__init__()
        self.dim, self.heads = dim, heads
        self.project = nn.Linear(dim_in, heads * (3 * dim + self.gates))
        self.out = nn.Linear(heads * dim, dim_out, bias=False)
        self.start = nn.Parameter(torch.zeros(heads, dim, dim))

    @abstractmethod
    def rule(self, z: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z (N, 3 D + gates), weights (N, D, D) -> read (N, D), weights, error (N, D)."""

    def initial(self, batch: int) -> LinearState:
        """The state of `batch` users that have written nothing."""
        weights = self.start.expand(batch, -1, -1, -1)
        return LinearState(weights, self.start.new_zeros(batch))

    def forward(
        self, x: Tensor, state: LinearState, reset: Tensor | None = None
    ) -> tuple[Tensor, LinearState]:
        """One step: x (B, dim_in), reset (B,) bool -> y (B, dim_out), state."""
        return self.step(self.project(x), state, reset)

    def step(
        self, z: Tensor, state: LinearState, reset: Tensor | None = None
    ) -> tuple[Tensor, LinearState]:
        """`forward` from `z = project(x)`, which a caller that knows x early computes at once."""
        weights = state.weights
        if reset is not None:
            weights = torch.where(reset[:, None, None, None], self.start, weights)
        batch = len(z)
        read, new, error = self.rule(
            z.reshape(batch * self.heads, -1), weights.reshape(-1, self.dim, self.dim)
        )
        surprise = error.detach().square().view(batch, -1).mean(1)
        return self.out(read.reshape(batch, -1)), LinearState(new.view_as(weights), surprise)

    def read(self, x: Tensor, state: LinearState) -> Tensor:
        """What the memory answers to x (B, dim_in) as it is, nothing written: (B, dim_out)."""
        q = F.normalize(self.project(x).view(len(x), self.heads, 1, -1)[..., : self.dim], dim=-1)
        return self.out((q @ state.weights).flatten(1))


def _parts(z: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Unit query and key as one (N, 2, D), value (N, D), gates in (0, 1) (N, gates)."""
    qk = F.normalize(z[:, : 2 * dim].unflatten(1, (2, dim)), dim=-1)
    return qk, z[:, 2 * dim : 3 * dim], z[:, 3 * dim :].sigmoid()


class DeltaMemory(LinearMemory):
    """S' = S + b k (v - k S): what the key recalled is replaced (DeltaNet, 2102.11174)."""

    gates = 1

    def rule(self, z: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        qk, v, beta = _parts(z, self.dim)
        q_read, k_read = torch.bmm(qk, weights).unbind(1)
        q, k = qk.unbind(1)
        error = v - k_read
        write = beta * error
        read = q_read + (q * k).sum(-1, keepdim=True) * write
        return read, torch.baddbmm(weights, k.unsqueeze(2), write.unsqueeze(1)), error


class GatedDeltaMemory(LinearMemory):
    """S' = a S + b k (v - a k S): the delta rule on a memory that fades (2412.06464)."""

    gates = 2

    def rule(self, z: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        qk, v, gates = _parts(z, self.dim)
        beta, alpha = gates[:, :1], gates[:, 1:]
        q_read, k_read = (alpha.unsqueeze(2) * torch.bmm(qk, weights)).unbind(1)
        q, k = qk.unbind(1)
        error = v - k_read
        write = beta * error
        read = q_read + (q * k).sum(-1, keepdim=True) * write
        faded = alpha.unsqueeze(2) * weights
        return read, torch.baddbmm(faded, k.unsqueeze(2), write.unsqueeze(1)), error
