"""Dense layers, and MLPs as one node of autograd.

A dense layer is linear, RMS norm and SiLU (DreamerV3, arXiv 2301.04104). On a CPU a small layer
costs as many operations as it takes, and a node by hand takes the fewest; its readable twin is the
layers one by one, which also serve few rows, autocast, compilers and torch.func. Where an MLP has
met its rows one step after another, as an actor does in a dream, a `Recording` holds what the node
would work out again.

Shapes: R rows, n units. Weights with one axis more in front have groups, as in nets.py; the node
takes one group after another, whose rows fit a cache.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from worldmodel.nets import (
    ALIGNED,
    MANY,
    Linear,
    RMSNorm,
    addmm,
    affine,
    inverse_rms,
    joined,
    norm_silu,
    norm_silu_grads,
    outer,
    readable,
    silu_of_rms_,
    times,
)

BLOCK = 1280  # rows whose outputs fit a cache
RECORDED = 3 << 12  # rows, at most


class Dense(nn.Module):
    """Linear, RMS norm, SiLU: x (..., in) -> (..., out)."""

    def __init__(self, n_in: int, n_out: int):
        super().__init__()
        self.linear = Linear(n_in, n_out)
        self.norm = RMSNorm(n_out)

    def forward(self, x: Tensor) -> Tensor:
        # called a hundred times an update: without the detour over two modules' hooks
        return norm_silu(self.norm, affine(x, self.linear.weight, self.linear.bias))


class MLP(nn.Module):
    """`layers` Dense layers of `units`, then a linear output scaled by `scale` at the start.

    fill: the output gets columns of this value more, up to a multiple of 16, because products of
    odd width take up to twice as long.
    """

    def __init__(
        self,
        n_in: int,
        n_out: int,
        units: int,
        layers: int,
        scale: float = 1.0,
        fill: float | None = None,
    ):
        super().__init__()
        sizes = [n_in] + [units] * layers
        self.layers = nn.ModuleList(Dense(a, b) for a, b in pairwise(sizes))
        self.out = Linear(sizes[-1], n_out, scale)
        self.fill = fill

    @property
    def first(self) -> Dense:
        """The layer that sees the inputs."""
        layer = self.layers[0]
        assert isinstance(layer, Dense)
        return layer

    def forward(self, x: Tensor, recording: "Recording | None" = None) -> Tensor:
        """The output (..., n_out and more) of x (..., in).

        A recording takes in the rows (N, in) of a step where no gradients are wanted; where they
        are, it holds what comes out of all of its rows, and x (N, steps, in) must be those.
        """
        if recording is not None and not torch.is_grad_enabled():
            return recording.add(x)
        if x.numel() < MANY or not by_hand(x):
            return affine(self.hidden(x), *filled(self.out.weight, self.out.bias, self.fill))
        rows = Through.apply(x.flatten(0, -2), recording, self.fill, *self.net().flat)
        return rows.view(*x.shape[:-1], -1)

    def hidden(self, x: Tensor) -> Tensor:
        """What the output layer sees (..., units)."""
        for layer in self.layers:
            x = layer.forward(x)
        return x

    @torch.no_grad()
    def blocks(self, x: Tensor) -> list[Tensor]:
        """The output of rows (..., in) without gradients, as blocks (R, out) of those of a group.

        What is worked out of thousands of rows at once would leave the cache in between.
        """
        nets = self.net().filled(self.fill).groups()
        parts = x.reshape(len(nets), -1, x.shape[-1])
        few = max(1, round(parts.shape[1] / BLOCK))
        return [
            net(rows) for net, part in zip(nets, parts, strict=True) for rows in part.chunk(few)
        ]

    def net(self) -> "Net":
        """The weights, found once for many calls."""
        layers = [
            Weights(layer.linear.weight, layer.linear.bias, layer.norm.weight)
            for layer in self.layers
            if isinstance(layer, Dense)
        ]
        return Net(layers, self.out.weight, self.out.bias)

    def recording(self, like: Tensor, steps: int) -> "Recording | None":
        """An empty one for so many steps of rows such as `like` (N, ...), where a node can read it.

        None for many thousands of rows: to keep them costs memory, to work them out again little.
        """
        few = len(like) * steps <= RECORDED
        return Recording(self.net()) if few and by_hand(like) else None


def by_hand(x: Tensor) -> bool:
    """Whether gradients are wanted, in one precision, and nobody looks inside."""
    mixed = torch.is_autocast_enabled(x.device.type)
    return torch.is_grad_enabled() and not mixed and not readable(x)


# ---- by hand ----------------------------------------------------------------------------------


class Weights(NamedTuple):
    """Of a dense layer."""

    weight: Tensor  # (in, n)
    bias: Tensor  # (n,)
    scale: Tensor  # (n,)


class Kept(NamedTuple):
    """What the way back through a dense layer reads of its rows."""

    normal: Tensor  # (R, n) over their root mean square
    factor: Tensor  # (R, 1) what made them so
    out: Tensor  # (R, n)


class Net(NamedTuple):
    """The weights of an MLP."""

    layers: list[Weights]
    weight: Tensor  # (n, out)
    bias: Tensor  # (out,)

    @property
    def flat(self) -> list[Tensor]:
        """Its tensors, layer by layer."""
        return [*(w for layer in self.layers for w in layer), self.weight, self.bias]

    @classmethod
    def of(cls, flat: Sequence[Tensor]) -> Self:
        """The inverse of `flat`."""
        *layers, weight, bias = flat
        return cls([Weights(*row) for row in triples(layers)], weight, bias)

    def filled(self, fill: float | None) -> "Net":
        """With an output layer as of `filled`."""
        return Net(self.layers, *filled(self.weight, self.bias, fill))

    def groups(self) -> "list[Net]":
        """The net of each group; itself, if it has none."""
        if self.weight.ndim == 2:
            return [self]
        return [Net.of(flat) for flat in zip(*(w.unbind() for w in self.flat), strict=True)]

    def __call__(self, x: Tensor) -> Tensor:
        """The output (R, out) of rows (R, in), without gradients."""
        return through(self, x)


def filled(weight: Tensor, bias: Tensor, fill: float | None) -> tuple[Tensor, Tensor]:
    """An output layer with more outputs of the value `fill`, to whole vector registers."""
    if fill is None:
        return weight, bias
    more = (0, -weight.shape[-1] % ALIGNED)
    return F.pad(weight, more), F.pad(bias, more, value=fill)


def triples(tensors: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Three after three."""
    return zip(tensors[::3], tensors[1::3], tensors[2::3], strict=True)


def through(net: Net, x: Tensor, epsilon: Tensor | None = None) -> Tensor:
    """The output (R, out) of rows (R, in), without gradients."""
    for layer in net.layers:
        x = silu_of_rms_(addmm(layer.bias, x, layer.weight), layer.scale, 1, epsilon)
    return addmm(net.bias, x, net.weight)


def run(net: Net, x: Tensor, epsilon: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
    """What the output layer sees (R, n) of rows (R, in), and of each layer a `Kept`, in a row."""
    found: list[Tensor] = []
    for layer in net.layers:
        linear = addmm(layer.bias, x, layer.weight)
        factor = inverse_rms(linear, epsilon)
        normal = linear.mul_(factor)
        x = F.silu(times(normal, layer.scale), inplace=True)
        found += [normal, factor, x]
    return x, found


class Recording:
    """What an MLP keeps of N rows that it meets at one step after another."""

    def __init__(self, net: Net):
        self.net = net
        self.steps: list[list[Tensor]] = []  # what is kept of each layer, and the output

    @torch.no_grad()
    def add(self, x: Tensor) -> Tensor:
        """The output (N, out) of the rows (N, in) of the next step."""
        seen, kept = run(self.net, x)
        out = addmm(self.net.bias, seen, self.net.weight)
        self.steps.append([*kept, out])
        return out

    def joined(self, groups: int) -> tuple[list[Tensor], Tensor]:
        """What the layers kept, group after group, and the output; forgets them.

        (N * steps / groups, ...) and (N * steps, out), the steps of a row together.
        """
        steps, self.steps = self.steps, []
        *kept, out = joined(steps)
        by_group = zip(*(part.chunk(groups) for part in kept), strict=True)
        return [part for group in by_group for part in group], out


class Through(torch.autograd.Function):
    """Rows (R, in) through an MLP in one node: (R, out), or wider where it is `filled`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, recording: Recording | None, fill: float | None, *flat: Tensor
    ) -> Tensor:
        nets = Net.of(flat).groups()
        if recording is not None:
            kept, out = recording.joined(len(nets))
        else:
            wide = [net.filled(fill) for net in nets]
            out = x.new_empty(len(x), wide[0].weight.shape[-1])
            parts = (part.view(len(nets), -1, part.shape[-1]) for part in (x, out))
            kept = []
            for net, rows, of_rows in zip(wide, *parts, strict=True):
                seen, layers = run(net, rows)
                torch.addmm(net.bias, seen, net.weight, out=of_rows)
                kept += layers
        ctx.fill, ctx.depth = fill, len(nets[0].layers)
        ctx.save_for_backward(x, *flat, *kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        x, *saved = ctx.saved_tensors
        n = 3 * ctx.depth
        whole, kept = Net.of(saved[: n + 2]), saved[n + 2 :]
        nets = whole.groups()
        of_x, of_weights = [], []
        rows = (part.view(len(nets), -1, part.shape[-1]) for part in (x, grads[0]))
        for g, (net, read, grad) in enumerate(zip(nets, *rows, strict=True)):
            layers = [Kept(*row) for row in triples(kept[g * n : (g + 1) * n])]
            g_x, found = back(net, ctx.fill, layers, read, grad, ctx.needs_input_grad[0])
            of_x.append(g_x)
            of_weights.append(found)
        if whole.weight.ndim == 2:
            return of_x[0], None, None, *of_weights[0]
        g_x = torch.cat(of_x) if ctx.needs_input_grad[0] else None
        return g_x, None, None, *(torch.stack(w) for w in zip(*of_weights, strict=True))


def back(
    net: Net, fill: float | None, layers: Sequence[Kept], x: Tensor, grad: Tensor, wanted: bool
) -> tuple[Tensor | None, list[Tensor]]:
    """Gradients of rows x (R, in), if `wanted`, and of the weights in the order of `flat`."""
    n_out, read = net.weight.shape[-1], [x, *(kept.out for kept in layers)]
    found = [outer(read[-1], grad)[:, :n_out], grad.sum(0)[:n_out]]
    if layers or wanted:
        grad = grad @ net.filled(fill).weight.t()
    for i in reversed(range(len(layers))):
        (weight, _, scale), (normal, factor, _) = net.layers[i], layers[i]
        grad, g_scale = norm_silu_grads(grad, normal, factor, scale)
        found = [outer(read[i], grad), grad.sum(0), g_scale, *found]
        if i or wanted:
            grad = grad @ weight.t()
    return grad if wanted else None, found
