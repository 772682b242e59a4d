"""Layers that every network here is made of: linear, block-linear, RMS norm.

Follows DreamerV3 (Hafner et al. 2023, arXiv 2301.04104): truncated-normal fan-in initialisation,
zero biases, RMS normalisation, SiLU. Weights are stored (in, out), so that a slice of the rows is
the part of the layer that one input sees: what is not recurrent is then hoisted out of time loops.

Weights may have one axis more in front, groups G: then the rows of the input are G equal parts in
order, and each part meets weights of its own. So many small agents run as one (`stack_weights`).
"""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from nested import fast, linear

EPSILON = 1e-4
ALIGNED = 16  # a row of so many float32 is a whole number of vector registers
MANY = 1 << 12  # elements from which a node by hand pays for its overhead


def number(value: float, kind: torch.dtype) -> Tensor:
    """A number as a tensor, made once: torch turns a Python number into one at every use."""
    if torch.jit.is_scripting():
        return torch.full((), value, dtype=kind)
    return _number(value, kind)


def epsilon_of(x: Tensor, value: float = EPSILON) -> Tensor:
    """EPSILON for `inverse_rms` of rows such as x, where it is wanted often."""
    return number(value, at_least_float32(x).dtype)


@cache
def _number(value: float, kind: torch.dtype) -> Tensor:
    with torch.inference_mode(False):  # who asks first does not matter
        return torch.tensor(value, dtype=kind)


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
        return affine(x, self.weight, self.bias)


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
        return plus(block_matmul(x, self.weight), self.bias)


def affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x (..., in) times weight (in, out), plus bias (out,)."""
    if x.ndim == weight.ndim == 2:
        return torch.addmm(bias, x, weight)  # the same without two views: most of the calls
    return fast.affine(x, weight.mT, bias)


def addmm(add: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """add (out,) or (B, out), plus x (B, in) times weight (in, out)."""
    if weight.ndim == 2:
        if torch.jit.is_scripting():  # it makes two operations of this, unless a factor is unknown
            return torch.addmm(add, x, weight, alpha=weight.ndim - 1)
        return torch.addmm(add, x, weight)
    groups, _, n_out = weight.shape
    rows = x.view(groups, -1, x.shape[-1])
    return torch.baddbmm(add.view(groups, -1, n_out), rows, weight).view(-1, n_out)


def matmul(x: Tensor, weight: Tensor) -> Tensor:
    """x (B, in) times weight (in, out)."""
    if weight.ndim == 2:
        return torch.mm(x, weight)
    return torch.bmm(x.view(len(weight), -1, x.shape[-1]), weight).view(len(x), -1)


def block_matmul(x: Tensor, weight: Tensor) -> Tensor:
    """x (B, K * in) times K blocks, weight (K, in, out) -> (B, K * out)."""
    *groups, blocks, n_in, _ = weight.shape
    if groups:
        rows = x.view(*groups, -1, blocks, n_in).transpose(1, 2)
        return torch.matmul(rows, weight).transpose(1, 2).reshape(len(x), -1)
    if blocks == 1:
        return x @ weight[0]
    y = torch.bmm(x.view(-1, blocks, n_in).transpose(0, 1), weight)
    return y.transpose(0, 1).flatten(1)


def times(x: Tensor, scale: Tensor, ndim: int = 1) -> Tensor:
    """x (..., *S) times scale, whose shape S without groups has `ndim` axes."""
    if scale.ndim == ndim:
        return x * scale
    return (x.reshape(by_group(scale)) * scale.unsqueeze(1)).view(x.shape)


def times_(x: Tensor, scale: Tensor, ndim: int = 1) -> Tensor:
    """`times` in place of x, without gradients."""
    if scale.ndim == ndim:
        return x.mul_(scale)
    x.view(by_group(scale)).mul_(scale.unsqueeze(1))
    return x


def by_group(scale: Tensor) -> list[int]:
    """Shape (G, -1, *S) of rows that meet a scale (G, *S)."""
    shape = list(scale.shape)
    shape.insert(1, -1)
    return shape


def plus(x: Tensor, bias: Tensor) -> Tensor:
    """x (..., n) plus bias (n,)."""
    if bias.ndim == 1:
        return x + bias
    return (x.reshape(len(bias), -1, x.shape[-1]) + bias.unsqueeze(1)).view(x.shape)


def sum_rows(x: Tensor, groups: int) -> Tensor:
    """Sum of x (B, ...) over its rows, of each of `groups` parts; 0 groups: over all."""
    return x.view(groups, -1, *x.shape[1:]).sum(1) if groups else x.sum(0)


def joined(steps: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """What T steps kept, (B, ...) each, as one: (B * T, ...), the rows of a group together."""
    return [torch.stack(x, 1).flatten(0, 1) for x in zip(*steps, strict=True)]


def outer(x: Tensor, grad: Tensor, groups: int = 0) -> Tensor:
    """Gradient (in, out) of the weight of `matmul`, from x (B, in) and grad (B, out)."""
    if not groups:
        narrow = 1 < grad.shape[1] < ALIGNED  # such a product crawls on a CPU
        return (grad.t() @ x).t() if narrow else x.t() @ grad
    return torch.bmm(x.view(groups, -1, x.shape[1]).mT, grad.view(groups, -1, grad.shape[1]))


def rms(x: Tensor, scale: Tensor, ndim: int = 1, epsilon: float = EPSILON) -> Tensor:
    """x (..., *S) over its root mean square along the last axis, times scale, as in `times`."""
    if scale.dtype != x.dtype:
        scale = scale.to(x.dtype)
    if scale.ndim == 1:
        return F.rms_norm(x, scale.shape, scale, epsilon)
    return times(F.rms_norm(x, scale.shape[-1:], None, epsilon), scale, ndim)


class RMSNorm(nn.Module):
    """x (..., n) divided by its root mean square over the last axis, times a learned scale."""

    def __init__(self, n: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n))

    def forward(self, x: Tensor) -> Tensor:
        return rms(x, self.weight)


def norm_silu(norm: nn.Module, x: Tensor) -> Tensor:
    """silu(norm(x)): for many rows as one node with a backward by hand, else as written."""
    assert isinstance(norm, RMSNorm)  # a ModuleList gives modules of any kind
    if not torch.is_grad_enabled():
        return silu_of_rms(x, norm.weight)
    if x.numel() < MANY or readable(x):
        return F.silu(rms(x, norm.weight))
    return NormSiLU.apply(x, norm.weight)


def silu_of_rms(x: Tensor, scale: Tensor, ndim: int = 1) -> Tensor:
    """silu(rms(x, scale, ndim)) where no gradient is wanted."""
    if half(x):
        return F.silu(rms(x, scale, ndim), inplace=True)
    return silu_(x * inverse_rms(x), scale, ndim)


def silu_of_rms_(x: Tensor, scale: Tensor, ndim: int = 1, epsilon: Tensor | None = None) -> Tensor:
    """`silu_of_rms` that may overwrite x."""
    if half(x):
        return silu_of_rms(x, scale, ndim)
    return silu_(x.mul_(inverse_rms(x, epsilon)), scale, ndim)


def silu_(normal: Tensor, scale: Tensor, ndim: int = 1) -> Tensor:
    """silu(normal * scale) in place of normal."""
    return F.silu(times_(normal, scale, ndim), inplace=True)


def inverse_rms(x: Tensor, epsilon: Tensor | None = None, otherwise: float = EPSILON) -> Tensor:
    """What rms(x) multiplies the rows of x (..., n) by: (..., 1), without gradients."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    if not on_cpu(x):
        return norm.square_().div_(x.shape[-1]).add_(otherwise).rsqrt_()
    # the same in half as many operations, which is what a few rows cost
    least = number(otherwise, x.dtype) if epsilon is None else epsilon
    return torch.addcmul(least, norm, norm, value=1 / x.shape[-1]).rsqrt_()


def tanh_(x: Tensor) -> Tensor:
    """Hyperbolic tangent, in place: as 2 sigmoid(2 x) - 1 it takes half as long on a CPU."""
    return less_one(x.add_(x))


def less_one(double: Tensor) -> Tensor:
    """tanh(x) of 2 x (...), which is overwritten."""
    return torch.add(number(-1.0, double.dtype), double.sigmoid_(), alpha=2)


def readable(x: Tensor) -> bool:
    """Whether a compiler or torch.func is at work on x: they take no node written by hand."""
    return torch.compiler.is_compiling() or linear.transformed(x)


class NormSiLU(torch.autograd.Function):
    """RMS norm over the last axis, then SiLU; differentiated by parts, it takes three times longer.

    Half precision is left at the door.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.dtype, x = x.dtype, at_least_float32(x)
        factor = inverse_rms(x)
        normal = x * factor
        ctx.save_for_backward(normal, factor, weight)
        return F.silu(times(normal, weight), inplace=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore
        g_x, g_weight = norm_silu_grads(grads[0], *ctx.saved_tensors)
        return g_x.to(ctx.dtype), g_weight


def norm_silu_grads(
    grad: Tensor, normal: Tensor, factor: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of x (..., n) and of the scale from that of silu(normal scale), normal = factor x.

    With d the gradient before the SiLU: dx = factor (scale d - normal mean(normal scale d)).
    """
    grad = torch.ops.aten.silu_backward(grad, times(normal, scale))
    product = (grad * normal).flatten(0, -2)
    if scale.ndim == 1:
        g_scale, share = product.sum(0), torch.mv(product, scale)
    else:
        parts = product.view(len(scale), -1, product.shape[-1])
        g_scale, share = parts.sum(1), torch.bmm(parts, scale.unsqueeze(-1))
    share = share.view(factor.shape)
    g_x = times_(grad, scale).addcmul_(normal, share, value=-1 / grad.shape[-1])
    return g_x.mul_(factor), g_scale


def on_cpu(x: Tensor) -> bool:
    """Whether x is on a CPU, as all is that TorchScript meets (script.py)."""
    return torch.jit.is_scripting() or x.device.type == "cpu"


def half(x: Tensor) -> bool:
    """Whether x is in half precision, as nothing is that TorchScript meets (script.py)."""
    if torch.jit.is_scripting():
        return False
    return x.dtype == torch.bfloat16 or x.dtype == torch.float16


def at_least_float32(x: Tensor) -> Tensor:
    """x, promoted from half precision: probabilities and losses are not rounded to it."""
    return x.float() if half(x) else x


def read_dtype(x: Tensor) -> torch.dtype:
    """What the layers that read x convert it to, each anew: that of autocast where it is on."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def exact_on_cpu(x: Tensor) -> AbstractContextManager[object]:
    """No autocast where x is on a CPU: casts cost more there than small products gain."""
    return linear.exact(x) if on_cpu(x) else nullcontext()


def symlog(x: Tensor) -> Tensor:
    """sign(x) log(1 + |x|)."""
    return x.sign() * x.abs().log1p()


def symexp(x: Tensor) -> Tensor:
    """Inverse of symlog."""
    return x.sign() * x.abs().expm1()
