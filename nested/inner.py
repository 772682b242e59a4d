"""Inner models of deep memories: networks whose weights are state, and one step of their learning.

M(x) = end(x, f(x)), f a stack of matrices with tanh between: features are bounded, so a step of
less than 2 / width never overshoots in the last layer. The loss of a pair is 0.5 |M(k) - v|^2; its
gradient for a layer is the outer product of the layer's input and of what comes back to its
output. The two meet the weights in the write only. All of it is plain differentiable tensors:
slow parameters learn through the inner step.

Shapes: N = users * heads, C rows of each, D and E widths of a layer.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

aten: Any = torch.ops.aten

Weights: TypeAlias = tuple[Tensor, ...]  # a layer each, (N, D, E)

EPSILON = 1e-5  # added to the variance of a norm


class Pass(NamedTuple):
    """One way through the stack, as its way back needs it."""

    inputs: tuple[Tensor, ...]  # of each layer, (N, C, D)
    outputs: tuple[Tensor, ...]  # of each layer before its activation, (N, C, E)


def through(weights: Weights, x: Tensor) -> Pass:
    """x (N, C, D) through the layers."""
    inputs, outputs = [x], [torch.bmm(x, weights[0])]
    for w in weights[1:]:
        inputs.append(torch.tanh(outputs[-1]))
        outputs.append(torch.bmm(inputs[-1], w))
    return Pass(tuple(inputs), tuple(outputs))


def back(weights: Weights, seen: Pass, delta: Tensor) -> tuple[Tensor, ...]:
    """What reaches each layer's output if `delta` (N, C, D) is the gradient of the last one's."""
    deltas = [delta]
    for w, h in zip(weights[:0:-1], seen.inputs[:0:-1], strict=True):
        deltas.append(aten.tanh_backward(torch.bmm(deltas[-1], w.mT), h))
    return tuple(reversed(deltas))


class Bare(nn.Module):
    """M(x) = f(x)."""

    def forward(self, x: Tensor, f: Tensor) -> Tensor:
        """M(x) of x and f(x), both (N, C, D)."""
        del x
        return f

    def back(self, f: Tensor, error: Tensor) -> Tensor:
        """The gradient at f(x) of a loss whose gradient at M(x) is `error`."""
        del f
        return error


class Residual(nn.Module):
    """M(x) = x + f(x)."""

    def forward(self, x: Tensor, f: Tensor) -> Tensor:
        """M(x) of x and f(x), both (N, C, D)."""
        return x + f

    def back(self, f: Tensor, error: Tensor) -> Tensor:
        """The gradient at f(x) of a loss whose gradient at M(x) is `error`."""
        del f
        return error


class NormedResidual(nn.Module):
    """M(x) = x + norm(f(x)): a layer norm, scale and shift of each head are slow (2407.04620)."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(heads, 1, dim))
        self.shift = nn.Parameter(torch.zeros(heads, 1, dim))

    def forward(self, x: Tensor, f: Tensor) -> Tensor:
        """M(x) of x and f(x), both (N, C, D)."""
        normed = F.layer_norm(f, f.shape[-1:], eps=EPSILON)
        return x + torch.addcmul(self.shift, self.scale, self._heads(normed)).view_as(f)

    def back(self, f: Tensor, error: Tensor) -> Tensor:
        """The gradient at f(x) of a loss whose gradient at M(x) is `error`."""
        variance, mean = torch.var_mean(f, -1, correction=0, keepdim=True)
        spread = (variance + EPSILON).rsqrt()
        normed = (f - mean) * spread
        g = (self._heads(error) * self.scale).view_as(f)
        g = g - g.mean(-1, keepdim=True) - normed * (g * normed).mean(-1, keepdim=True)
        return g * spread

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(-1, len(self.scale), *x.shape[1:])


End: TypeAlias = Bare | Residual | NormedResidual


def recall(end: End, weights: Weights, x: Tensor) -> Tensor:
    """M(x) for x (N, C, D)."""
    return end(x, through(weights, x).outputs[-1])


def surprise(
    end: End, weights: Weights, k: Tensor, v: Tensor
) -> tuple[Tensor, Pass, tuple[Tensor, ...]]:
    """M(k) - v (N, C, D), and the two sides of every layer's gradient."""
    seen = through(weights, k)
    error = end(k, seen.outputs[-1]) - v
    return error, seen, back(weights, seen, end.back(seen.outputs[-1], error))


def outer(w: Tensor, x: Tensor, delta: Tensor) -> Tensor:
    """w + x^T delta for one row of each: w (N, D, E), x (N, 1, D), delta (N, 1, E)."""
    return torch.addcmul(w, x.mT, delta)


def flat(weights: Weights) -> Weights:
    """(B, H, D, E) -> (N, D, E)."""
    return tuple(w.flatten(0, 1) for w in weights)


def unflat(weights: Weights, shape: Sequence[int]) -> Weights:
    """(N, D, E) -> (B, H, D, E), shape (B, H, ...)."""
    return tuple(w.view(shape[0], shape[1], *w.shape[1:]) for w in weights)


def features(dim: int, hidden: int, heads: int) -> list[Tensor]:
    """Start weights of a two-layer network: random features of a unit key, and zeros behind."""
    if min(dim, hidden, heads) < 1:
        raise ValueError(f"sizes must be positive: {dim=}, {hidden=}, {heads=}")
    first = nn.init.normal_(torch.empty(heads, dim, hidden))
    return [first, torch.zeros(heads, hidden, dim)]
