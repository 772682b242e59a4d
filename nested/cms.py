"""A continuum of memories: a chain of residual networks, each with a clock of its own (CMS).

    h_0 = k;   h_l = h_(l-1) + f_l(h_(l-1));   y = h_L(q)

After Nested Learning (2512.24695): the weights of block l move only when its chunk of C_l steps is
full, by the sum of the gradients taken at the weights that the chunk began with. Each block has an
objective of its own, 0.5 |h_l - v|^2 with h_(l-1) given, so no gradient crosses blocks: a level
learns what the levels before it left, at the price of a forward pass, and a slow one is not moved
by the wobble of those behind it. Chunks begin anew after a reset.

Shapes: B users, H heads, D width of a head, E hidden width; N = B * H.
"""

from collections.abc import Sequence
from math import lcm
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nested import inner, linear
from nested.base import Associative
from nested.inner import Weights, flat, unflat


class ChainState(NamedTuple):
    """Fast weights of a chain: two tensors a block, (B, H, D, E) and (B, H, E, D)."""

    weights: tuple[Weights, ...]
    gathered: tuple[Weights, ...]  # minus the gradients of the open chunk; () where C_l = 1
    phase: Tensor  # (B,) int64, steps since the reset, modulo the least common multiple of C_l
    error: Tensor  # (B, H, D), recalled minus value, before the write; no gradient

    @property
    def surprise(self) -> Tensor:
        """Squared error before the last write, mean over heads and values: (B,)."""
        return self.error.square().flatten(1).mean(1)


class ContinuumMemory(Associative):
    """A chain of two-layer blocks that learn every `chunks[l]` steps (CMS, 2512.24695).

    `rates` bound the step of one pair, a gate of x for each block; by default 2 / (hidden * C_l),
    so that no chunk overshoots in its last layer. Blocks share the work best from fast to slow.
    """

    def __init__(
        self,
        dim_in: int,
        dim_out: int,
        dim: int = 32,
        hidden: int = 64,
        heads: int = 1,
        chunks: Sequence[int] = (1, 4, 16),
        rates: Sequence[float] | None = None,
    ):
        if not chunks or min(chunks) < 1:
            raise ValueError(f"chunks={tuple(chunks)}: each block needs a length of 1 or more")
        rates = [2.0 / (hidden * c) for c in chunks] if rates is None else rates
        if len(rates) != len(chunks) or min(rates) <= 0:
            raise ValueError(f"rates={tuple(rates)}: needs {len(chunks)} positive numbers")
        super().__init__(dim_in, dim_out, dim, heads, gates=[0.5] * len(chunks))
        self.chunks, self.rates = tuple(chunks), tuple(rates)
        self.cycle = lcm(*chunks)
        blocks = [nn.ParameterList(inner.features(dim, hidden, heads)) for _ in chunks]
        self.start = nn.ModuleList(blocks)

    def initial(self, batch: int) -> ChainState:
        """The state of `batch` users that have written nothing."""
        weights = tuple(
            tuple(w.expand(batch, -1, -1, -1) for w in self._block(i))
            for i in range(len(self.chunks))
        )
        gathered = tuple(
            tuple(torch.zeros_like(w) for w in ws) if chunk > 1 else ()
            for ws, chunk in zip(weights, self.chunks, strict=True)
        )
        like = weights[0][0]
        phase = torch.zeros(batch, dtype=torch.int64, device=like.device)
        return ChainState(weights, gathered, phase, like.new_zeros(batch, self.heads, self.dim))

    def learn(
        self, z: Tensor, state: ChainState, reset: Tensor | None
    ) -> tuple[Tensor, ChainState]:
        """Reset, write, read: z (B, H, P) raw -> what the query brings back (B, H, D), state."""
        if reset is not None:
            state = self._reset(state, reset)
        p = linear.parts(z.flatten(0, 1), self.dim)
        q, h, v = p.qk[:, :1], p.qk[:, 1:], p.value.unsqueeze(1)
        phase = state.phase + 1
        weights: list[Weights] = []
        gathered: list[Weights] = []
        error = h
        for i, chunk in enumerate(self.chunks):
            ws, sums = flat(state.weights[i]), flat(state.gathered[i])
            seen = inner.through(ws, h)
            h = h + seen.outputs[-1]
            error = h - v
            step = (-self.rates[i] * p.gates[:, i]).view(-1, 1, 1)
            sides = zip(seen.inputs, inner.back(ws, seen, error * step), strict=True)
            into = [inner.outer(w, x, d) for w, (x, d) in zip(sums or ws, sides, strict=True)]
            new = unflat(tuple(into), z.shape)
            if chunk == 1:
                moved, left = new, ()
            else:
                due = (phase % chunk == 0).to(error.dtype)[:, None, None, None]
                pairs = zip(state.weights[i], new, strict=True)
                moved = tuple(torch.addcmul(w, due, g) for w, g in pairs)
                left = tuple(g * (1 - due) for g in new)
            weights.append(moved)
            gathered.append(left)
            q = q + inner.through(flat(moved), q).outputs[-1]
        shape = (*z.shape[:2], self.dim)
        error = error.detach().view(shape)
        state = ChainState(tuple(weights), tuple(gathered), phase % self.cycle, error)
        return q.view(shape), state

    def recall(self, q: Tensor, state: ChainState) -> Tensor:
        """What unit queries (B, H, D) bring back: (B, H, D)."""
        h = q.flatten(0, 1).unsqueeze(1)
        for ws in state.weights:
            h = h + inner.through(flat(ws), h).outputs[-1]
        return h.view(q.shape)

    def _block(self, i: int) -> Weights:
        return tuple(self.start[i].parameters())

    def _reset(self, state: ChainState, reset: Tensor) -> ChainState:
        mask = reset[:, None, None, None]
        weights = tuple(
            tuple(torch.where(mask, w0, w) for w0, w in zip(self._block(i), ws, strict=True))
            for i, ws in enumerate(state.weights)
        )
        gathered = tuple(tuple(torch.where(mask, 0.0, g) for g in gs) for gs in state.gathered)
        return ChainState(weights, gathered, state.phase * ~reset, state.error)
