"""Linear associative memories: a matrix for each user and head that learns while it runs.

One step goes back to the initial weights where `reset` is set, writes a key-value pair by one
rule, then reads with a query: one law for a step and a sequence. The weights a user starts from
are a slow parameter, `start`. Under autocast the projections run in the low precision; the
weights and what is written to them keep the precision of `start`.

Shapes: B users, T time, H heads, D width of a head (keys and values alike).
"""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nested import fast, held, linear
from nested.held import Held


class LinearState(NamedTuple):
    """Fast weights of a linear memory, and how wrong they were about the last pair written."""

    weights: Tensor  # (B, H, D, D), keys by values
    error: Tensor  # (B, H, D), value minus recalled, before the write; no gradient

    @property
    def surprise(self) -> Tensor:
        """Squared error before the last write, mean over heads and values: (B,)."""
        return self.error.square().flatten(1).mean(1)


class LinearMemory(nn.Module):
    """What the linear memories share: the rules differ in `gates` and `erase`."""

    def __init__(self, dim_in: int, dim_out: int, dim: int, heads: int, gates: int, erase: int):
        super().__init__()
        if min(dim_in, dim_out, dim, heads) < 1:
            raise ValueError(f"sizes must be positive: {dim_in=}, {dim_out=}, {dim=}, {heads=}")
        self.dim, self.heads, self.erase = dim, heads, erase
        self.into = nn.Linear(dim_in, heads * (3 * dim + gates))
        self.out = nn.Linear(heads * dim, dim_out, bias=False)
        self.start = nn.Parameter(torch.zeros(heads, dim, dim))
        with torch.no_grad():  # what fades begins with a horizon of about 50 steps
            self.into.bias.view(heads, -1)[:, 3 * dim + 1 :] = 4.0

    def initial(self, batch: int) -> LinearState:
        """The state of `batch` users that have written nothing."""
        weights = linear.rows(self.start, batch)
        return LinearState(weights, self.start.new_zeros(batch, self.heads, self.dim))

    def project(self, x: Tensor) -> Tensor:
        """Queries, keys, values and gates, raw: (..., dim_in) -> (..., H, P)."""
        z = fast.affine(x, self.into.weight, self.into.bias)
        return z.view(*z.shape[:-1], self.heads, -1)

    def forward(
        self, x: Tensor, state: LinearState, reset: Tensor | None = None
    ) -> tuple[Tensor, LinearState]:
        """One step: x (B, dim_in), reset (B,) bool -> y (B, dim_out), state."""
        return self.step(self.project(x), state, reset)

    def step(
        self, z: Tensor, state: LinearState, reset: Tensor | None = None
    ) -> tuple[Tensor, LinearState]:
        """`forward` from z = project(x), which is cheaper computed for all steps at once."""
        z = z.to(self.start.dtype)
        with linear.exact(z):
            read, weights, error = linear.step(z, state.weights, self.start, reset, self.erase)
        return fast.affine(read.flatten(1), self.out.weight), LinearState(weights, error)

    def read(self, x: Tensor, state: LinearState) -> Tensor:
        """What the memory answers to x (B, dim_in), nothing written: (B, dim_out)."""
        weight, bias = self.into.weight, self.into.bias
        groups = weight.shape[:-2]
        weight = weight.view(*groups, self.heads, -1, x.shape[-1])[..., : self.dim, :]
        bias = bias.view(*groups, self.heads, -1)[..., : self.dim]
        z = fast.affine(x, weight.flatten(-3, -2), bias.flatten(-2)).to(self.start.dtype)
        with linear.exact(z):
            q, _ = linear.unit(z.view(len(x) * self.heads, 1, self.dim))
            answer = torch.bmm(q, state.weights.reshape(-1, self.dim, self.dim))
        return fast.affine(answer.view(len(x), -1), self.out.weight)

    def scan(
        self, xs: Tensor, state: LinearState, resets: Tensor, chunk: int = 32
    ) -> tuple[Tensor, LinearState]:
        """All steps of xs (B, T, dim_in), resets (B, T): ys (B, T, dim_out), state."""
        weights, error = state
        reads: list[Tensor] = []
        z = self.project(xs).to(self.start.dtype).transpose(1, 2)  # (B, H, T, P)
        with linear.exact(z):
            p = linear.parts(z, self.dim)
            for t in range(0, xs.shape[1], chunk):
                rows = linear.Parts(*(x[:, :, t : t + chunk] for x in p))
                read, weights, errors = linear.chunk(
                    rows, weights, self.start, resets[:, t : t + chunk], self.erase
                )
                reads.append(read)
                error = errors[:, :, -1].detach()
        ys = self.out(torch.cat(reads, 2).transpose(1, 2).flatten(2))
        return ys, LinearState(weights, error)

    def hold(self, state: LinearState, storage: torch.dtype = torch.float32) -> Held:
        """A copy of the state that `step_` writes in place, its weights kept as `storage`."""
        return held.hold((state.weights,), state.error, storage)

    @torch.no_grad()
    def step_(
        self,
        x: Tensor,
        users: Held,
        reset: Tensor | None = None,
        generator: torch.Generator | None = None,
        kernel: held.Linear = held.linear_,
    ) -> Tensor:
        """`forward` in place and without gradients: x (B, dim_in) -> y (B, dim_out).

        bfloat16 needs a generator; `kernel` may be another that does what `held.linear_` does.
        """
        return self.out(self.write_(self.project(x), users, reset, generator, kernel).flatten(1))

    @torch.no_grad()
    def write_(
        self,
        z: Tensor,
        users: Held,
        reset: Tensor | None = None,
        generator: torch.Generator | None = None,
        kernel: held.Linear = held.linear_,
    ) -> Tensor:
        """`step_` between the projections: z (B, H, P) raw -> what the query brings (B, H, D)."""
        if reset is not None:
            held.forget_(users, (self.start,), reset)
        return held.step_(users, z, generator, partial(kernel, erase=self.erase))

    def settle(self, users: Held) -> LinearState:
        """The state that `users` has come to."""
        weights = users.layers[0].to(users.scale.dtype) * users.scale.unsqueeze(3)
        return LinearState(weights, users.error.clone())


class HebbMemory(LinearMemory):
    """S' = a S + b k v: pairs add up and fade (Schmidhuber 1992, with learned gates)."""

    def __init__(self, dim_in: int, dim_out: int, dim: int = 32, heads: int = 1):
        super().__init__(dim_in, dim_out, dim, heads, gates=2, erase=0)


class DeltaMemory(LinearMemory):
    """S' = S + b k (v - k S): what the key recalled is replaced (2102.11174, 2406.06484)."""

    def __init__(self, dim_in: int, dim_out: int, dim: int = 32, heads: int = 1):
        super().__init__(dim_in, dim_out, dim, heads, gates=1, erase=1)


class GatedDeltaMemory(LinearMemory):
    """S' = a S + b k (v - a k S): the delta rule on a memory that fades (2412.06464)."""

    def __init__(self, dim_in: int, dim_out: int, dim: int = 32, heads: int = 1):
        super().__init__(dim_in, dim_out, dim, heads, gates=2, erase=1)
