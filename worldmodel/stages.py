"""Stages of the image encoder and decoder on a CPU, each as one autograd node.

A stage is a faithful convolution, max pooling or doubling, RMS norm and SiLU; the last one of the
decoder ends in the squared error. As one node it stays in the low precision of autocast between
its convolutions, keeps what a backward by hand needs and no more, and goes through a BLOCK of
elements at a time, which a cache holds. Few channels leave vector registers half empty: two
pixels side by side then are one of twice the channels, a view of the same memory (`pair`).
Readable twins: `norm_silu` of `Down` or `doubled`, and `image_error`.
"""

from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from worldmodel.conv import (
    GREY,
    Doubling,
    Down,
    doubled,
    halved_bytes,
    image_error,
    nchw,
    squares,
)
from worldmodel.nets import (
    EPSILON,
    RMSNorm,
    at_least_float32,
    half,
    norm_silu,
    number,
    on_cpu,
    read_dtype,
    readable,
)

BLOCK = 1 << 21  # elements of a convolution's output that a thread works on before the next
PART = 1 << 25  # and of those that go into one node: an image batch of 16 x 64 at depth 4
NARROW = 8  # channels that fill half a vector register, or less
LARGE = 1 << 15  # elements from which `norm_silu_` pays
FOUR = torch.eye(4)[..., None]  # times a scale (C,): what four rows are multiplied by at once

aten = torch.ops.aten


def images_in(elements: int, pixels: int) -> int:
    """How many images of so many numbers go into `elements`."""
    return max(elements // pixels, 1)


def at_once(pixels: int) -> int:
    """How many images of so many numbers make a block; every thread has a cache of its own."""
    return images_in(BLOCK * torch.get_num_threads(), pixels)


def down(conv: nn.Module, norm: nn.Module, x: Tensor) -> Tensor:
    """silu(norm(conv(x))) of an encoder's stage: (N, H, W, in) -> (N, H / 2, W / 2, out)."""
    assert isinstance(conv, Down) and isinstance(norm, RMSNorm)
    if conv.kind == "faithful" and by_hand(x, conv.weight):
        return DownStage.apply(low(x), conv.weight, conv.bias, norm.weight)
    return normed(norm, conv.forward(x))


def first_down(conv: nn.Module, norm: nn.Module, images: Tensor) -> Tensor:
    """`down` of the bytes of images (N, H, W, in), each of which stands for x / 255 - 0.5."""
    assert isinstance(conv, Down) and isinstance(norm, RMSNorm)
    if conv.kind == "faithful" and by_hand(images, conv.weight):
        x = images.to(read_dtype(conv.weight)).sub_(GREY)  # which bfloat16 does not round
        return DownStage.apply(x, conv.weight / 255, conv.bias, norm.weight)
    few = conv.kind == "strided" and len(conv.weight) <= NARROW
    exact = not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
    if few and exact and eager(images, conv.weight):
        return normed(norm, halved_bytes(images, conv.weight, conv.bias))
    return down(conv, norm, images.float().div_(255).sub_(0.5))


def normed(norm: RMSNorm, y: Tensor) -> Tensor:
    """silu(norm(y)) of a convolution's output (N, H, W, C), in place where nobody learns."""
    if y.numel() < LARGE or torch.is_grad_enabled() or not on_cpu(y):
        return norm_silu(norm, y)
    if half(y) or y.numel() % (len(FOUR) * y.shape[-1]):
        return norm_silu(norm, y)
    return norm_silu_(y, norm.weight)


def norm_silu_(x: Tensor, scale: Tensor) -> Tensor:
    """silu(norm(x)) in place of x (..., C): products are what few channels do not slow down."""
    rows, share = x.reshape(-1, x.shape[-1]), torch.full_like(scale, 1 / len(scale))
    factor = torch.addmv(number(EPSILON, x.dtype), rows * rows, share).rsqrt_()
    factor = torch.mm(factor.view(-1, len(FOUR)), (FOUR * scale).flatten(1))
    return F.silu(x.mul_(factor.view(x.shape)), inplace=True)


def up(kernel: Doubling, norm: nn.Module, x: Tensor) -> Tensor:
    """silu(norm(doubled(x))) of a decoder's stage: (N, H, W, in) -> (N, 2 H, 2 W, out)."""
    assert isinstance(norm, RMSNorm)
    if not by_hand(x, kernel.weight):
        return norm_silu(norm, doubled(x, kernel))
    return UpStage.apply(low(x), *kernel, norm.weight)


def doubled_error(kernel: Doubling, x: Tensor, target: Tensor) -> Tensor:
    """Image error (N,) of the logits doubled(x) to target (N, 2 H, 2 W, out) uint8."""
    if not by_hand(x, kernel.weight):
        return image_error(doubled(x, kernel), target)
    return ErrorStage.apply(low(x), *kernel, target)


def by_hand(x: Tensor, weight: Tensor) -> bool:
    """Whether the nodes of this file are wanted for x."""
    return torch.is_grad_enabled() and eager(x, weight)


def eager(x: Tensor, weight: Tensor) -> bool:
    """Whether operations run one by one, on a CPU."""
    return on_cpu(x) and not readable(x) and not readable(weight)


def low(x: Tensor) -> Tensor:
    """x in the precision that autocast asks of convolutions."""
    return x.to(torch.get_autocast_dtype("cpu")) if torch.is_autocast_enabled("cpu") else x


class Kept(NamedTuple):
    """What the backward of a norm and SiLU needs, for N images (N, H, W, C)."""

    normal: Tensor  # (N, H, W, C) in the precision of the convolution
    factor: Tensor  # (N, H, W, 1) that made it so, at least float32

    @classmethod
    def empty(cls, like: Tensor, shape: tuple[int, int, int, int]) -> Self:
        """Room for it."""
        factor = like.new_empty(*shape[:3], 1, dtype=at_least_float32(like[:0]).dtype)
        return cls(like.new_empty(shape), factor)


class Scale(NamedTuple):
    """The scale (C,) of a norm in the forms that its blocks need, made once."""

    mean: Tensor  # (C,) 1 / C each
    share: Tensor  # (C,) minus the scale over C
    rows: Tensor  # (W * C,) the scale of a row of pixels: loops over few channels crawl

    @classmethod
    def of(cls, scale: Tensor, like: Tensor, width: int) -> Self:
        """For rows of `width` pixels, in the precision of `like`."""
        scale = scale.to(like.dtype)
        rows = scale.expand(width, -1).reshape(-1)
        return cls(torch.full_like(scale, 1 / len(scale)), scale / -len(scale), rows)


def norm_silu_block(x: Tensor, scale: Scale, kept: Kept, out: Tensor) -> None:
    """silu(scale * x / rms(x)) into out, both (N, H, W, C) at least float32; x is overwritten."""
    torch.mv(torch.mul(x, x).view(-1, x.shape[-1]), scale.mean, out=kept.factor.view(-1))
    kept.factor.add_(EPSILON).rsqrt_()
    kept.normal.copy_(x.mul_(kept.factor))
    out.copy_(F.silu(x.flatten(2).mul_(scale.rows), inplace=True).view(x.shape))


def norm_silu_back(grad: Tensor, scale: Scale, kept: Kept) -> tuple[Tensor, Tensor]:
    """Gradients of x (N, H, W, C) at least float32 and of the scale (C,)."""
    normal = at_least_float32(kept.normal)
    product = torch.mul(normal.flatten(2), scale.rows).view(normal.shape)
    grad = aten.silu_backward(grad.to(normal.dtype), product)
    product = torch.mul(grad, normal, out=product)
    share = torch.mv(product.view(-1, normal.shape[-1]), scale.share).view(kept.factor.shape)
    grad.flatten(2).mul_(scale.rows)
    return grad.addcmul_(normal, share).mul_(kept.factor), over_pixels(product)


def over_pixels(grad: Tensor) -> Tensor:
    """Sum (C,) of grad (N, H, W, C), at least float32; first the columns, which are long rows."""
    columns = at_least_float32(grad.flatten(2).flatten(0, 1).sum(0))
    return columns.view(grad.shape[2:]).sum(0)


class DownStage(torch.autograd.Function):
    """`down`. Which pixel of a square won is kept as second minus first: ties go to the first."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor) -> Tensor:
        (n, height, width, _), n_out = x.shape, len(bias)
        shape = (n, height // 2, width // 2, n_out)
        out, kept, right = x.new_empty(shape), Kept.empty(x, shape), x.new_empty(shape)
        lower = x.new_empty(n, height // 2, width * n_out)
        kernel, add = weight.to(x.dtype), bias.to(x.dtype)
        if n_out <= NARROW:
            kernel, add = pair(kernel), add.repeat(2)
        of_norm = Scale.of(scale, kept.factor, shape[2])
        size = at_once(height * width * n_out)
        blocks = zip(*(y.split(size) for y in (x, out, lower, right, *kept)), strict=True)
        for x_, out_, lower_, right_, *kept_ in blocks:
            rows = pairs(x_) if n_out <= NARROW else x_
            y = F.conv2d(nchw(rows), kernel, add, padding=(2, kernel.shape[3] // 2))
            first, second = nhwc(y).reshape(-1, height // 2, 2, width * n_out).unbind(2)
            torch.sub(second, first, out=lower_)
            column = at_least_float32(torch.maximum(first, second))
            first, second = column.view(-1, *shape[1:3], 2, n_out).unbind(3)
            right_.copy_(second - first)
            norm_silu_block(torch.maximum(first, second), of_norm, Kept(*kept_), out_)
        ctx.save_for_backward(x, weight, scale, lower, right, *kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        x, weight, scale, *kept = ctx.saved_tensors
        sums = [torch.zeros_like(y) for y in (weight, scale, scale)]
        wanted = ctx.needs_input_grad[0]
        g_x = torch.empty_like(x) if wanted else None
        size = at_once(x[0].numel() // weight.shape[1] * len(weight))
        places = x.split(size) if g_x is None else g_x.split(size)
        blocks = zip(*(y.split(size) for y in (grads[0], x, *kept)), places, strict=True)
        kernel, of_norm = weight.to(x.dtype), Scale.of(scale, kept[-1], x.shape[2] // 2)
        for grad_, x_, lower_, right_, normal_, factor_, place in blocks:
            grad, g_scale = norm_silu_back(grad_, of_norm, Kept(normal_, factor_))
            g_bias = over_pixels(grad)
            grad = unpooled(grad.to(x.dtype), lower_, right_)
            if wanted:
                place.copy_(grad_input(grad, x_, kernel))
            for total, part in zip(
                sums, (grad_weight(grad, x_, kernel), g_bias, g_scale), strict=True
            ):
                total += part
        return g_x, *sums


def unpooled(grad: Tensor, lower: Tensor, right: Tensor) -> Tensor:
    """The gradient (N, H, W, C), given to the pixel of each square that won: (N, 2 H, 2 W, C)."""
    n, height, width, channels = grad.shape
    second = aten.threshold_backward(grad, right, 0)
    columns = torch.stack([grad.sub_(second), second], 3).view(lower.shape)
    out = grad.new_empty(n, height, 2, 2 * width * channels)
    aten.threshold_backward.grad_input(columns, lower, 0, grad_input=out[:, :, 1])
    torch.sub(columns, out[:, :, 1], out=out[:, :, 0])
    return out.view(n, 2 * height, 2 * width, channels)


class UpStage(torch.autograd.Function):
    """`up`. The norm comes before the pixels of a square take their places: it is of each pixel."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor) -> Tensor:
        (n, height, width, _), n_out = x.shape, len(scale)
        kept = Kept.empty(x, (n, height, width * 4, n_out))
        out = x.new_empty(n, height, 2, width, 2 * n_out)
        kernel, add = weight.to(x.dtype), bias.to(x.dtype)
        of_norm = Scale.of(scale, kept.factor, width * 4)
        size = at_once(4 * height * width * len(bias))
        for x_, out_, *kept_ in zip(*(y.split(size) for y in (x, out, *kept)), strict=True):
            y = nhwc(F.conv2d(nchw(x_), kernel, add, padding=1)).reshape(kept_[0].shape)
            flat = torch.empty_like(y)
            norm_silu_block(at_least_float32(y), of_norm, Kept(*kept_), flat)
            rows = flat.view(-1, height, width, 2, 2 * n_out).unbind(3)
            torch.stack(rows, 2, out=out_)
        ctx.save_for_backward(x, weight, scale, *kept)
        return out.view(n, 2 * height, 2 * width, n_out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore
        x, weight, scale, *kept = ctx.saved_tensors
        g_x, channels = torch.empty_like(x), len(weight)
        sums = [torch.zeros_like(weight), weight.new_zeros(channels), torch.zeros_like(scale)]
        size = at_once(4 * x[0].numel() // weight.shape[1] * channels)
        blocks = zip(*(y.split(size) for y in (grads[0], x, g_x, *kept)), strict=True)
        kernel, of_norm = weight.to(x.dtype), Scale.of(scale, kept[-1], x.shape[2] * 4)
        for grad_, x_, place, *kept_ in blocks:
            grad = squares(grad_).view(kept_[0].shape)
            grad, g_scale = norm_silu_back(grad, of_norm, Kept(*kept_))
            grad = grad.view(*x_.shape[:3], channels)
            g_bias, grad = over_pixels(grad), grad.to(x.dtype)
            place.copy_(grad_input(grad, x_, kernel))
            for total, part in zip(
                sums, (grad_weight(grad, x_, kernel), g_bias, g_scale), strict=True
            ):
                total += part
        return g_x, *sums


class ErrorStage(torch.autograd.Function):
    """`doubled_error`. The targets' bytes take the places of the logits, not these of those."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Tensor:
        (n, height, width, _), channels = x.shape, len(bias)
        gradient = x.new_empty(n, height, width, channels)
        loss = Kept.empty(x, (n, 1, 1, 1)).factor.view(n)
        kernel, add = weight.to(x.dtype), bias.to(x.dtype)
        size = at_once(4 * height * width * channels)
        blocks = zip(*(y.split(size) for y in (x, target, gradient, loss)), strict=True)
        for x_, target_, gradient_, loss_ in blocks:
            y = nhwc(F.conv2d(nchw(x_), kernel, add, padding=1))
            predicted = at_least_float32(y).sigmoid_()
            error = torch.sub(predicted, squares(target_).to(predicted.dtype), alpha=1 / 255)
            torch.linalg.vector_norm(error.flatten(1), dim=1, out=loss_)
            gradient_.copy_(aten.sigmoid_backward(error, predicted))
        ctx.save_for_backward(x, weight, gradient)
        return loss.square_()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        x, weight, gradient = ctx.saved_tensors
        g_x, channels = torch.empty_like(x), len(weight)
        sums = [torch.zeros_like(weight), weight.new_zeros(channels)]
        size = at_once(gradient[0].numel())
        scale = (2 * grads[0]).to(x.dtype).view(-1, 1, 1, 1)
        kernel = weight.to(x.dtype)
        for scale_, gradient_, x_, place in zip(
            *(y.split(size) for y in (scale, gradient, x, g_x)), strict=True
        ):
            grad = gradient_ * scale_
            place.copy_(grad_input(grad, x_, kernel))
            found = (grad_weight(grad, x_, kernel), over_pixels(grad))
            for total, part in zip(sums, found, strict=True):
                total += part
        return g_x, *sums, None


def grad_input(grad: Tensor, x: Tensor, kernel: Tensor) -> Tensor:
    """Gradient of x (N, H, W, in) from that of its convolution."""
    if kernel.shape[1] > NARROW or kernel.shape[3] == 3:
        return _backward(grad, x, kernel, (True, False))
    return _backward(pairs(grad), pairs(x), pair(kernel), (True, False)).reshape(x.shape)


def grad_weight(grad: Tensor, x: Tensor, kernel: Tensor) -> Tensor:
    """Gradient of a kernel from that of the convolution with x (N, H, W, in)."""
    n_out, n_in, side, _ = kernel.shape
    if n_out > NARROW or side == 3:
        return _backward(grad, x, kernel, (False, True))
    found = _backward(pairs(grad), pairs(x), pair(kernel), (False, True))
    taps = found.view(2, n_out, 2, n_in, side, 3).permute(0, 1, 3, 4, 5, 2).reshape(2, -1, 6)
    return (taps[0, :, :-1] + taps[1, :, 1:]).view(kernel.shape)


def _backward(grad: Tensor, x: Tensor, kernel: Tensor, which: tuple[bool, bool]) -> Tensor:
    sides = [side // 2 for side in kernel.shape[2:]]
    rest = ([1, 1], sides, [1, 1], False, [0, 0], 1, [*which, False])
    found = aten.convolution_backward(nchw(grad), nchw(x), kernel, None, *rest)
    return nhwc(found[0]) if which[0] else found[1]


def pairs(x: Tensor) -> Tensor:
    """(N, H, W, C) -> (N, H, W / 2, 2 C), the same memory."""
    return x.view(*x.shape[:2], x.shape[2] // 2, 2 * x.shape[3])


def pair(kernel: Tensor) -> Tensor:
    """The kernel (2 out, 2 in, 5, 3) that does to `pairs` what (out, in, 5, 5) does to pixels."""
    n_out, n_in, side, _ = kernel.shape
    both = torch.cat([F.pad(kernel, (0, 1)), F.pad(kernel, (1, 0))])
    both = both.view(2 * n_out, n_in, side, 3, 2).permute(0, 2, 3, 4, 1)
    return nchw(both.reshape(2 * n_out, side, 3, 2 * n_in))


def nhwc(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, H, W, C), a view."""
    return x.permute(0, 2, 3, 1)
