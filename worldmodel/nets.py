"""Layers that every network here is made of: linear, block-linear, RMS norm, MLP.

Follows DreamerV3 (Hafner et al. 2023, arXiv 2301.04104): truncated-normal fan-in initialisation,
zero biases, RMS normalisation, SiLU. Weights are stored (in, out), so that a slice of the rows is
the part of the layer that one input sees: what is not recurrent is then hoisted out of time loops.
"""

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

EPSILON = 1e-4
MANY = 1 << 15  # elements from which a node by hand pays for its overhead


def init_weight(weight: Tensor, fan_in: int, scale: float = 1.0) -> None:
    """Truncated normal at two deviations with variance scale² / fan_in; zero when scale is 0."""
    deviation = 1.1368 * scale / math.sqrt(fan_in)
    if deviation == 0.0:
        nn.init.zeros_(weight)
    else:
        nn.init.trunc_normal_(weight, std=deviation, a=-2 * deviation, b=2 * deviation)


class Linear(nn.Module):
    """x (..., in) -> (..., out); the weight is (in, out)."""

    def __init__(self, n_in: int, n_out: int, scale: float = 1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_in, n_out))
        self.bias = nn.Parameter(torch.zeros(n_out))
        init_weight(self.weight, n_in, scale)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.t(), self.bias)


class BlockLinear(nn.Module):
    """x (B, G * in) -> (B, G * out) by G independent matrices; the weight is (G, in, out)."""

    def __init__(self, n_in: int, n_out: int, blocks: int):
        super().__init__()
        if n_in % blocks or n_out % blocks:
            raise ValueError(f"{n_in} inputs and {n_out} outputs must divide by blocks={blocks}")
        self.blocks = blocks
        self.weight = nn.Parameter(torch.empty(blocks, n_in // blocks, n_out // blocks))
        self.bias = nn.Parameter(torch.zeros(n_out))
        init_weight(self.weight, n_in // blocks)

    def forward(self, x: Tensor) -> Tensor:
        return block_matmul(x, self.weight) + self.bias


def block_matmul(x: Tensor, weight: Tensor) -> Tensor:
    """x (B, G * in) times weight (G, in, out) -> (B, G * out)."""
    blocks, n_in, _ = weight.shape
    if blocks == 1:
        return x @ weight[0]
    y = torch.bmm(x.view(-1, blocks, n_in).transpose(0, 1), weight)
    return y.transpose(0, 1).flatten(1)


class RMSNorm(nn.Module):
    """x (..., n) divided by its root mean square over the last axis, times a learned scale."""

    def __init__(self, n: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), EPSILON)


def norm_silu(norm: nn.Module, x: Tensor) -> Tensor:
    """silu(norm(x)): for many rows as one node with a backward by hand, else as written."""
    assert isinstance(norm, RMSNorm)  # a ModuleList gives modules of any kind
    transformed = torch.func.debug_unwrap(x, recurse=False) is not x
    mixed = x.dtype != norm.weight.dtype
    if x.numel() < MANY or mixed or transformed or not torch.is_grad_enabled():
        return F.silu(norm(x))
    return NormSiLU.apply(x, norm.weight)


class NormSiLU(torch.autograd.Function):
    """RMS norm over the last axis, then SiLU; differentiated by parts, it takes three times longer.

    With n = x / rms(x): dx = (dn - n mean(dn n)) / rms(x).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        factor = torch.linalg.vecdot(x, x).div_(x.shape[-1]).add_(EPSILON).rsqrt_().unsqueeze(-1)
        normal = x * factor
        ctx.save_for_backward(normal, factor, weight)
        return F.silu(normal * weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore
        normal, factor, weight = ctx.saved_tensors
        grad = torch.ops.aten.silu_backward(grads[0], normal * weight)
        g_weight = (grad * normal).flatten(0, -2).sum(0)
        grad.mul_(weight)
        share = torch.linalg.vecdot(grad, normal).div_(-weight.numel()).unsqueeze(-1)
        return grad.addcmul_(normal, share).mul_(factor), g_weight


class Dense(nn.Module):
    """Linear, RMS norm, SiLU: x (..., in) -> (..., out)."""

    def __init__(self, n_in: int, n_out: int):
        super().__init__()
        self.linear = Linear(n_in, n_out)
        self.norm = RMSNorm(n_out)

    def forward(self, x: Tensor) -> Tensor:
        return norm_silu(self.norm, self.linear(x))


class MLP(nn.Module):
    """`layers` Dense layers of `units`, then a linear output scaled by `scale` at the start."""

    def __init__(self, n_in: int, n_out: int, units: int, layers: int, scale: float = 1.0):
        super().__init__()
        sizes = [n_in] + [units] * layers
        pairs = pairwise(sizes)
        self.layers = nn.ModuleList(Dense(a, b) for a, b in pairs)
        self.out = Linear(sizes[-1], n_out, scale)

    @property
    def first(self) -> Dense:
        """The layer that sees the inputs."""
        layer = self.layers[0]
        assert isinstance(layer, Dense)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.out(x)


def symlog(x: Tensor) -> Tensor:
    """sign(x) log(1 + |x|)."""
    return x.sign() * x.abs().log1p()


def symexp(x: Tensor) -> Tensor:
    """Inverse of symlog."""
    return x.sign() * x.abs().expm1()
