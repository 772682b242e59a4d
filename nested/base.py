"""What memories share that learn pair by pair: what they see, what they answer, and the loop.

From x come a query, a key, a value and gates for each head; `learn` and `recall` are the rule's.
The projections do not depend on the state, so a sequence makes them for all steps at once; what is
recurrent runs step by step, in the same operations, so a sequence is its steps.

Shapes: B users, T time, H heads, D width of a head, P = parts * D + gates.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nested import linear


class Associative(nn.Module):
    """Abstract: a rule gives `initial`, `learn` and `recall`.

    x gives each head `parts` rows of width D, the query first, and gates, raw; `gates` are the
    values in (0, 1) that their sigmoids begin with, whatever x is.
    """

    def __init__(
        self,
        dim_in: int,
        dim_out: int,
        dim: int,
        heads: int,
        gates: Sequence[float],
        parts: int = 3,
    ):
        super().__init__()
        if min(dim_in, dim_out, dim, heads) < 1:
            raise ValueError(f"sizes must be positive: {dim_in=}, {dim_out=}, {dim=}, {heads=}")
        self.dim, self.heads = dim, heads
        self.into = nn.Linear(dim_in, heads * (parts * dim + len(gates)))
        self.out = nn.Linear(heads * dim, dim_out, bias=False)
        with torch.no_grad():
            bias = self.into.bias.view(heads, -1)
            for i, gate in enumerate(gates):
                bias[:, parts * dim + i] = math.log(gate / (1 - gate))

    def initial(self, batch: int) -> Any:
        """The state of `batch` users that have written nothing."""
        raise NotImplementedError

    def learn(self, z: Tensor, state: Any, reset: Tensor | None) -> tuple[Tensor, Any]:
        """Reset, write, read: z (B, H, P) raw -> what the query brings back (B, H, D), state."""
        raise NotImplementedError

    def recall(self, q: Tensor, state: Any) -> Tensor:
        """What unit queries (B, H, D) bring back: (B, H, D)."""
        raise NotImplementedError

    def project(self, x: Tensor) -> Tensor:
        """Queries, keys, values and gates, raw: (..., dim_in) -> (..., H, P)."""
        return self.into(x).unflatten(-1, (self.heads, -1))

    def forward(self, x: Tensor, state: Any, reset: Tensor | None = None) -> tuple[Tensor, Any]:
        """One step: x (B, dim_in), reset (B,) bool -> y (B, dim_out), state."""
        return self.step(self.project(x), state, reset)

    def step(self, z: Tensor, state: Any, reset: Tensor | None = None) -> tuple[Tensor, Any]:
        """`forward` from z = project(x), which is cheaper computed for all steps at once."""
        z = z.to(self.into.weight.dtype)
        with linear.exact(z):
            read, state = self.learn(z, state, reset)
        return self.out(read.flatten(1)), state

    def read(self, x: Tensor, state: Any) -> Tensor:
        """What the memory answers to x (B, dim_in), nothing written: (B, dim_out)."""
        weight = self.into.weight.view(self.heads, -1, x.shape[-1])[:, : self.dim].flatten(0, 1)
        bias = self.into.bias.view(self.heads, -1)[:, : self.dim].flatten()
        z = F.linear(x, weight, bias).to(weight.dtype)
        with linear.exact(z):
            q, _ = linear.unit(z.view(-1, self.heads, self.dim))
            answer = self.recall(q, state)
        return self.out(answer.flatten(1))

    def scan(self, xs: Tensor, state: Any, resets: Tensor) -> tuple[Tensor, Any]:
        """All steps of xs (B, T, dim_in), resets (B, T): ys (B, T, dim_out), state."""
        reads: list[Tensor] = []
        zs = self.project(xs).to(self.into.weight.dtype)
        with linear.exact(zs):
            for z, reset in zip(zs.unbind(1), resets.unbind(1), strict=True):
                read, state = self.learn(z, state, reset)
                reads.append(read)
        return self.out(torch.stack(reads, 1).flatten(2)), state
