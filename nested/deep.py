"""Deep memories: a small network for each user and head that learns while it runs.

    S' = eta S - theta grad 0.5 |M(k; W_c) - v|^2;   W' = W0 + alpha (W - W0) + S';   y = M(q; W')

theta, eta and alpha are gates that x sets anew at each step; W_c are the weights at the start of
the chunk, W itself if chunk = 1. The chunk begins anew after a reset, so users need not be in step.
What a user starts from, W0 = `start`, is slow, and what is forgotten falls back to it: Titans
forget to zero, a saddle where a network of two layers stops learning for good. Titans (2501.00663)
have all of this; TTT (2407.04620) neither momentum nor forgetting, but a norm and a residual.

Shapes: B users, T time, H heads, D width of a head, E hidden width; N = B * H.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nested import held, inner, linear, network
from nested.base import Associative
from nested.held import Held
from nested.inner import Bare, End, NormedResidual, Residual, Weights, flat, unflat


class DeepState(NamedTuple):
    """Fast weights of a deep memory; a tuple of tensors has one for each layer."""

    weights: Weights  # (B, H, D, E), (B, H, E, D)
    anchor: Weights  # the weights at the start of the chunk; () if a chunk is one step
    velocity: Weights  # S; () without momentum
    phase: Tensor  # (B,) int64, steps since the chunk began
    error: Tensor  # (B, H, D), recalled minus value, before the write; no gradient

    @property
    def surprise(self) -> Tensor:
        """Squared error before the last write, mean over heads and values: (B,)."""
        return self.error.square().flatten(1).mean(1)


class DeepMemory(Associative):
    """What deep memories share: they differ in layers, gates and the end of the network."""

    def __init__(
        self,
        dim_in: int,
        dim_out: int,
        start: Sequence[Tensor],
        rate: float,
        momentum: float | None,
        forget: float | None,
        chunk: int,
        end: End,
    ):
        heads, dim = start[0].shape[:2]
        for name, gate in (("momentum", momentum), ("forget", forget)):
            if gate is not None and not 0 < gate < 1:
                raise ValueError(f"{name} is {gate}, outside (0, 1); None leaves it out")
        if chunk < 1 or rate <= 0:
            raise ValueError(f"{chunk=} and {rate=} must be positive")
        kept = None if forget is None else 1 - forget
        gates = [0.5, *(gate for gate in (momentum, kept) if gate is not None)]
        super().__init__(dim_in, dim_out, dim, heads, gates)
        self.rate, self.chunk = rate, chunk
        self.momentum, self.forget = momentum, forget
        self.start = nn.ParameterList(start)
        self.end = end
        # what nested/network.py knows as one node
        plain = chunk == 1 and momentum is None and not isinstance(end, NormedResidual)
        self.lean = plain and len(start) == 2

    def initial(self, batch: int) -> DeepState:
        """The state of `batch` users that have written nothing."""
        weights = tuple(w.expand(batch, -1, -1, -1) for w in self.start)
        zeros = () if self.momentum is None else tuple(torch.zeros_like(w) for w in weights)
        phase = torch.zeros(batch, dtype=torch.int64, device=weights[0].device)
        error = weights[0].new_zeros(batch, self.heads, self.dim)
        return DeepState(weights, weights if self.chunk > 1 else (), zeros, phase, error)

    def learn(self, z: Tensor, state: DeepState, reset: Tensor | None) -> tuple[Tensor, DeepState]:
        """Reset, write, read: z (B, H, P) raw -> what the query brings back (B, H, D), state."""
        # a compiler fuses by itself; vmap and grad of torch.func take no node written by hand
        by_hand = self.lean and not torch.compiler.is_compiling()
        if not by_hand or any(linear.transformed(x) for x in (z, *state.weights)):
            return self.plain(z, state, reset)
        residual = int(isinstance(self.end, Residual))
        given = state.weights, tuple(self.start), reset, self.rate, residual
        read, first, second, error = network.step(z, *given)
        phase = state.phase if reset is None else state.phase.masked_fill(reset, 0)
        return read, DeepState((first, second), (), (), phase, error)

    def plain(self, z: Tensor, state: DeepState, reset: Tensor | None) -> tuple[Tensor, DeepState]:
        """`learn` as the papers write it."""
        if reset is not None:
            state = self._reset(state, reset)
        shape = (*z.shape[:2], self.dim)
        p = linear.parts(z.flatten(0, 1), self.dim)
        q, k = p.qk[:, :1], p.qk[:, 1:]
        weights, velocity = flat(state.weights), flat(state.velocity)
        at = flat(state.anchor) or weights
        gates = p.gates.unsqueeze(2).unsqueeze(3).unbind(1)  # (N, 1, 1) each
        error, seen, deltas = inner.surprise(self.end, at, k, p.value.unsqueeze(1))
        rate = -self.rate * gates[0]
        if self.momentum is not None:
            velocity = tuple(gates[1] * s for s in velocity)
        if self.forget is not None:
            alpha = gates[-1].view(-1, self.heads, 1, 1)
            pairs = zip(self.start, state.weights, strict=True)
            weights = flat(tuple(torch.lerp(w0, w, alpha) for w0, w in pairs))
        into = velocity or weights
        steps = tuple(
            inner.outer(w, x, rate * d) for w, x, d in zip(into, seen.inputs, deltas, strict=True)
        )
        if velocity:
            velocity, weights = steps, tuple(w + s for w, s in zip(weights, steps, strict=True))
        else:
            weights = steps
        read = inner.recall(self.end, weights, q)
        weights, velocity = unflat(weights, shape), unflat(velocity, shape)
        state = self._advance(state, weights, velocity, error.detach().view(shape))
        return read.view(shape), state

    def recall(self, q: Tensor, state: DeepState) -> Tensor:
        """What unit queries (B, H, D) bring back: (B, H, D)."""
        weights = flat(state.weights)
        return inner.recall(self.end, weights, q.flatten(0, 1).unsqueeze(1)).view_as(q)

    def hold(self, state: DeepState, storage: torch.dtype = torch.float32) -> Held:
        """A copy of the state that `step_` writes in place, as displacements from `start`."""
        if self.chunk > 1 or self.momentum is not None or len(self.start) != 2:
            raise ValueError(
                f"in place learn two-layer memories with chunk=1 and momentum=None, not "
                f"{len(self.start)} layers, chunk={self.chunk}, momentum={self.momentum}"
            )
        moved = tuple(w - w0 for w, w0 in zip(state.weights, self.start, strict=True))
        return held.hold(moved, state.error, storage)

    @torch.no_grad()
    def step_(
        self,
        x: Tensor,
        users: Held,
        reset: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """`forward` in place and without gradients: x (B, dim_in) -> y (B, dim_out).

        bfloat16 needs a generator.
        """
        return self.out(self.write_(self.project(x), users, reset, generator).flatten(1))

    @torch.no_grad()
    def write_(
        self,
        z: Tensor,
        users: Held,
        reset: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """`step_` between the projections: z (B, H, P) raw -> what the query brings (B, H, D)."""
        start = tuple(self.start)
        if reset is not None:
            held.forget_(users, tuple(torch.zeros_like(w) for w in start), reset)
        step = partial(held.network_, start=start, end=self.end, rate=self.rate)
        return held.step_(users, z, generator, step)

    def settle(self, users: Held) -> DeepState:
        """The state that `users` has come to."""
        scale = users.scale.unsqueeze(3)
        pairs = zip(self.start, users.layers, strict=True)
        weights = tuple(torch.addcmul(w0, scale, w.to(scale.dtype)) for w0, w in pairs)
        phase = torch.zeros(len(scale), dtype=torch.int64, device=scale.device)
        return DeepState(weights, (), (), phase, users.error.clone())

    def _reset(self, state: DeepState, reset: Tensor) -> DeepState:
        mask = reset[:, None, None, None]
        begun = [
            tuple(torch.where(mask, w0, w) for w0, w in zip(self.start, ws, strict=True))
            for ws in (state.weights, state.anchor)
            if ws
        ]
        velocity = tuple(torch.where(mask, 0.0, s) for s in state.velocity)
        phase = state.phase * ~reset
        return DeepState(begun[0], begun[1] if len(begun) > 1 else (), velocity, phase, state.error)

    def _advance(
        self, state: DeepState, weights: Weights, velocity: Weights, error: Tensor
    ) -> DeepState:
        """The chunk's next step; where it was the last one, the next chunk begins from here."""
        if self.chunk == 1:
            return DeepState(weights, (), velocity, state.phase, error)
        phase = (state.phase + 1) % self.chunk
        due = (phase == 0)[:, None, None, None]
        pairs = zip(weights, state.anchor, strict=True)
        anchor = tuple(torch.where(due, w, old) for w, old in pairs)
        return DeepState(weights, anchor, velocity, phase, error)


class NeuralMemory(DeepMemory):
    """A two-layer network with momentum and forgetting (Titans, 2501.00663).

    `momentum` and `forget` are what the gates eta and 1 - alpha begin with; None leaves either
    out (without momentum a user costs half as much). `rate` bounds theta; by default no chunk of
    writes can overshoot in the last layer.
    """

    def __init__(
        self,
        dim_in: int,
        dim_out: int,
        dim: int = 32,
        hidden: int = 64,
        heads: int = 1,
        momentum: float | None = None,
        forget: float | None = 0.02,
        chunk: int = 1,
        residual: bool = False,
        rate: float | None = None,
    ):
        start = inner.features(dim, hidden, heads)
        rate = 2.0 / (hidden * max(chunk, 1)) if rate is None else rate
        end = Residual() if residual else Bare()
        super().__init__(dim_in, dim_out, start, rate, momentum, forget, chunk, end)


class TTTLinear(DeepMemory):
    """A linear inner model, by default with norm and residual, over mini-batches (2407.04620)."""

    def __init__(
        self,
        dim_in: int,
        dim_out: int,
        dim: int = 32,
        heads: int = 1,
        chunk: int = 16,
        rate: float = 1.0,
        normed: bool = True,
    ):
        if min(dim, heads) < 1:
            raise ValueError(f"sizes must be positive: {dim=}, {heads=}")
        start = [nn.init.normal_(torch.empty(heads, dim, dim), std=0.02)]
        end = NormedResidual(dim, heads) if normed else Bare()
        super().__init__(dim_in, dim_out, start, rate, None, None, chunk, end)


class TTTMLP(DeepMemory):
    """A two-layer inner model, by default with norm and residual (2407.04620)."""

    def __init__(
        self,
        dim_in: int,
        dim_out: int,
        dim: int = 32,
        hidden: int = 128,
        heads: int = 1,
        chunk: int = 16,
        rate: float = 0.1,
        normed: bool = True,
    ):
        start = inner.features(dim, hidden, heads)
        end = NormedResidual(dim, heads) if normed else Bare()
        super().__init__(dim_in, dim_out, start, rate, None, None, chunk, end)
