"""Hope: a memory that writes its own keys, values and learning rates, and a continuum behind it.

Five two-layer residual networks a head (2512.24695): `memory`, and those that make k, v, eta and
alpha of x; all five learn at each step, every one toward a target of its own making:

    k, v, eta, alpha = M_k(x), M_v(x), M_eta(x), M_alpha(x);   target_m = M_m(v)
    M_m' = alpha M_m - eta (k k^T M_m + grad 0.5 |M_m(k) - target_m|^2);   y = M_memory(q)

Only the query, and the row x that enters, come from static projections. The paper's rule is for
a matrix; in a network it is applied to each layer with the layer's own input as k, which adds
the layer's own output to what comes back to it (delta gradient descent). eta is divided by
1 + eta sum |k_l|^2 over the layers: the proximal step, so that no write overshoots; a chunk shares
it among its steps. v has unit length as k has, or targets would feed on themselves. alpha forgets
toward the slow start weights, as in nested/deep.py. All that a chunk uses is taken at the
weights it began with. The paper's short convolution is left out: x comes from a recurrence.

Shapes: B users, H heads, D width of a head, E hidden width; N = B * H, M = 5 networks.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nested import inner, linear
from nested.base import Associative
from nested.cms import ChainState, ContinuumMemory
from nested.inner import Weights

NETWORKS = 5  # memory, k, v, eta, alpha


class SelfState(NamedTuple):
    """Fast weights of a self-modifying memory."""

    weights: Weights  # (B, H, M, D, E), (B, H, M, E, D)
    anchor: Weights  # the weights at the start of the chunk; () if a chunk is one step
    phase: Tensor  # (B,) int64, steps since the chunk began
    error: Tensor  # (B, H, D), recalled minus target, before the write; no gradient

    @property
    def surprise(self) -> Tensor:
        """Squared error before the last write, mean over heads and values: (B,)."""
        return self.error.square().flatten(1).mean(1)


class SelfModifyingMemory(Associative):
    """The first half of Hope: five networks that learn from what they make of x."""

    def __init__(
        self,
        dim_in: int,
        dim_out: int,
        dim: int = 32,
        hidden: int = 64,
        heads: int = 1,
        chunk: int = 1,
        forget: float = 0.02,
    ):
        if chunk < 1 or not 0 < forget < 1:
            raise ValueError(f"{chunk=} must be positive and {forget=} in (0, 1)")
        super().__init__(dim_in, dim_out, dim, heads, gates=(), parts=2)
        if hidden < 1:
            raise ValueError(f"{hidden=} must be positive")
        self.chunk = chunk
        first = nn.init.normal_(torch.empty(heads, NETWORKS, dim, hidden))
        second = nn.init.normal_(torch.empty(heads, NETWORKS, hidden, dim), std=hidden**-0.5)
        self.start = nn.ParameterList([first, second])
        self.gate = nn.Parameter(torch.tensor([0.5, 1 - forget]).logit().repeat(heads, 1))

    def initial(self, batch: int) -> SelfState:
        """The state of `batch` users that have written nothing."""
        weights = tuple(w.expand(batch, *w.shape) for w in self.start)
        phase = torch.zeros(batch, dtype=torch.int64, device=weights[0].device)
        error = weights[0].new_zeros(batch, self.heads, self.dim)
        return SelfState(weights, weights if self.chunk > 1 else (), phase, error)

    def learn(self, z: Tensor, state: SelfState, reset: Tensor | None) -> tuple[Tensor, SelfState]:
        """Reset, write, read: z (B, H, 2 D) raw -> what the query brings back (B, H, D), state."""
        if reset is not None:
            state = self._reset(state, reset)
        q, x = linear.unit(z.view(*z.shape[:2], 2, self.dim))[0].unbind(2)
        at = state.anchor or state.weights
        first, second = (w.flatten(0, 2) for w in at)  # (N M, D, E), (N M, E, D)
        k, v, eta, alpha = self._made(x, (first, second))
        rows = torch.stack([v, k], 2).unsqueeze(2).expand(-1, -1, NETWORKS, -1, -1)
        rows = rows.reshape(-1, 2, self.dim)  # (N M, 2, D)
        seen = inner.through((first, second), rows)
        made = rows + seen.outputs[-1]
        error = made[:, 1:] - made[:, :1]
        mine = inner.Pass(*(tuple(side[:, 1:] for side in sides) for sides in seen))
        deltas = inner.back((first, second), mine, error)
        shape = (*z.shape[:2], NETWORKS, 1)
        sizes = [linear.vecdot(side, side).view(shape).unsqueeze(4) for side in mine.inputs]
        rate = -eta / (self.chunk * (1 + eta * (sizes[0] + sizes[1])))
        new: list[Tensor] = []
        kept = [torch.lerp(w0, w, alpha) for w0, w in zip(self.start, state.weights, strict=True)]
        for w, side, y, delta in zip(kept, mine.inputs, mine.outputs, deltas, strict=True):
            side, delta = (t.view(*shape, -1) for t in (side, delta + y))
            new.append(torch.addcmul(w, side.mT, rate * delta))
        state = self._advance(state, tuple(new), error.view(*z.shape[:2], NETWORKS, -1)[:, :, 0])
        return self.recall(q, state), state

    def recall(self, q: Tensor, state: SelfState) -> Tensor:
        """What unit queries (B, H, D) bring back: (B, H, D)."""
        weights = tuple(w[:, :, 0].flatten(0, 1) for w in state.weights)
        return q + inner.through(weights, q.flatten(0, 1).unsqueeze(1)).outputs[-1].view(q.shape)

    def _made(self, x: Tensor, weights: Weights) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Unit key and unit value (B, H, D), eta and alpha (B, H, 1, 1, 1), of x (B, H, D)."""
        rows = x.unsqueeze(2).expand(-1, -1, NETWORKS, -1)
        seen = inner.through(weights, rows.reshape(-1, 1, self.dim))
        made = rows + seen.outputs[-1].view(rows.shape)
        kv, _ = linear.unit(made[:, :, 1:3])
        # D components as one number of the same spread
        raw = made[:, :, 3:].sum(3) * self.dim**-0.5 + self.gate
        eta, alpha = raw.sigmoid()[..., None, None, None].unbind(2)
        return kv[:, :, 0], kv[:, :, 1], eta, alpha

    def _reset(self, state: SelfState, reset: Tensor) -> SelfState:
        mask = reset[:, None, None, None, None]
        weights, anchor = (
            tuple(torch.where(mask, w0, w) for w0, w in zip(self.start, ws, strict=False))
            for ws in (state.weights, state.anchor)
        )
        return SelfState(weights, anchor, state.phase * ~reset, state.error)

    def _advance(self, state: SelfState, weights: Weights, error: Tensor) -> SelfState:
        """The chunk's next step; where it was the last one, the next chunk begins from here."""
        if self.chunk == 1:
            return SelfState(weights, (), state.phase, error.detach())
        phase = (state.phase + 1) % self.chunk
        due = (phase == 0)[:, None, None, None, None]
        pairs = zip(weights, state.anchor, strict=True)
        anchor = tuple(torch.where(due, w, old) for w, old in pairs)
        return SelfState(weights, anchor, phase, error.detach())


class HopeState(NamedTuple):
    """States of the two halves."""

    memory: SelfState
    chain: ChainState

    @property
    def surprise(self) -> Tensor:
        """That of the self-modifying memory: (B,)."""
        return self.memory.surprise


class HopeBlock(nn.Module):
    """Self-modifying memory, then a continuum memory on what it answers (2512.24695)."""

    def __init__(
        self,
        dim_in: int,
        dim_out: int,
        dim: int = 32,
        hidden: int = 64,
        heads: int = 1,
        chunk: int = 1,
        chunks: Sequence[int] = (1, 4, 16),
        forget: float = 0.02,
    ):
        super().__init__()
        width = heads * dim
        self.memory = SelfModifyingMemory(dim_in, width, dim, hidden, heads, chunk, forget)
        self.chain = ContinuumMemory(width, dim_out, dim, hidden, heads, chunks)

    def initial(self, batch: int) -> HopeState:
        """The state of `batch` users that have written nothing."""
        return HopeState(self.memory.initial(batch), self.chain.initial(batch))

    def forward(
        self, x: Tensor, state: HopeState, reset: Tensor | None = None
    ) -> tuple[Tensor, HopeState]:
        """One step: x (B, dim_in), reset (B,) bool -> y (B, dim_out), state."""
        y, memory = self.memory(x, state.memory, reset)
        y, chain = self.chain(y, state.chain, reset)
        return y, HopeState(memory, chain)

    def read(self, x: Tensor, state: HopeState) -> Tensor:
        """What the block answers to x (B, dim_in), nothing written: (B, dim_out)."""
        return self.chain.read(self.memory.read(x, state.memory), state.chain)

    def scan(self, xs: Tensor, state: HopeState, resets: Tensor) -> tuple[Tensor, HopeState]:
        """All steps of xs (B, T, dim_in), resets (B, T): ys (B, T, dim_out), state."""
        ys, memory = self.memory.scan(xs, state.memory, resets)
        ys, chain = self.chain.scan(ys, state.chain, resets)
        return ys, HopeState(memory, chain)
