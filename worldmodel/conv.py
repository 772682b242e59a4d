"""Convolutions that halve or double an image, and what compares images.

Images are (N, H, W, C), channels last in memory. `faithful` layers are DreamerV3's 5x5
convolutions with 2x2 max pooling or nearest-neighbour doubling (arXiv 2301.04104); `strided` ones
are 4x4. Doubling and then convolving is the same as convolving first with four smaller kernels,
one for each of the four pixels that a pixel becomes (sub-pixel convolution, 1609.05158): a third
of the multiplications, and four times the channels, which is what small images lack on a CPU.
"""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from worldmodel.nets import exact_on_cpu, init_weight, on_cpu, readable

Kind = Literal["faithful", "strided"]
SIDE = {"faithful": 5, "strided": 4}
SMALL = 1 << 14  # numbers of images whose patches are gathered sooner than a library begins
GREY = 127.5  # the byte that would stand for zero

# Which taps of a kernel (last axis) meet which low-resolution neighbour (middle axis: before, at,
# after), for the first and the second of the two pixels that one becomes (first axis). A faithful
# tap reads a doubled pixel; a strided kernel is that of a transposed convolution.
TAPS = {
    "faithful": (
        ((1, 1, 0, 0, 0), (0, 0, 1, 1, 0), (0, 0, 0, 0, 1)),
        ((1, 0, 0, 0, 0), (0, 1, 1, 0, 0), (0, 0, 0, 1, 1)),
    ),
    "strided": (
        ((0, 0, 0, 1), (0, 1, 0, 0), (0, 0, 0, 0)),
        ((0, 0, 0, 0), (0, 0, 1, 0), (1, 0, 0, 0)),
    ),
}


class Doubling(NamedTuple):
    """The four kernels of a sub-pixel convolution side by side."""

    weight: Tensor  # (4 * out, in, 3, 3)
    bias: Tensor  # (4 * out,)


class Down(nn.Module):
    """(N, H, W, in) -> (N, H / 2, W / 2, out), with `same` padding."""

    def __init__(self, n_in: int, n_out: int, kind: Kind):
        super().__init__()
        self.kind, side = kind, SIDE[kind]
        self.weight = nn.Parameter(channels_last(n_out, n_in, side))
        self.bias = nn.Parameter(torch.zeros(n_out))
        init_weight(self.weight, n_in * side * side)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "strided":
            return halved(x, self.weight, self.bias)
        return max_pool(F.conv2d(nchw(x), self.weight, self.bias, padding=2).permute(0, 2, 3, 1))


class Up(nn.Module):
    """(N, H, W, in) -> (N, 2 H, 2 W, out), with `same` padding, in one sub-pixel convolution."""

    taps: Tensor

    def __init__(self, n_in: int, n_out: int, kind: Kind):
        super().__init__()
        self.kind, side = kind, SIDE[kind]
        transposed = kind == "strided"
        shape = (n_in, n_out) if transposed else (n_out, n_in)
        self.weight = nn.Parameter(channels_last(*shape, side))
        self.bias = nn.Parameter(torch.zeros(n_out))
        init_weight(self.weight, n_in * side * side // (4 if transposed else 1))
        one = torch.tensor(TAPS[kind], dtype=torch.float32)  # (2, 3, side)
        both = torch.einsum("pyi,qxj->pqyxij", one, one)
        self.register_buffer("taps", both.reshape(36, side * side), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return doubled(x, self.kernel())

    def kernel(self) -> Doubling:
        """What `doubled` takes; never in low precision, as it sums weights."""
        weight = self.weight if self.kind == "faithful" else self.weight.transpose(0, 1)
        n_out, n_in = weight.shape[:2]
        with exact_on_cpu(weight):
            kernels = (weight.flatten(2) @ self.taps.t()).view(n_out, n_in, 4, 3, 3)
        kernels = kernels.permute(2, 0, 3, 4, 1).reshape(4 * n_out, 3, 3, n_in)
        return Doubling(nchw(kernels), self.bias.repeat(4))


def halved(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A strided convolution: (N, H, W, in) -> (N, H / 2, W / 2, out).

    oneDNN takes longer to begin than a few small images take: on a CPU their patches are gathered
    and multiplied where no gradient is wanted.
    """
    n, height, width, _ = x.shape
    if x.numel() > SMALL or torch.is_grad_enabled() or not on_cpu(x):
        return F.conv2d(nchw(x), weight, bias, stride=2, padding=1).permute(0, 2, 3, 1)
    padded = F.pad(x, (0, 0, 1, 1, 1, 1))
    image, row, pixel, _ = padded.stride()
    shape = (n, height // 2, width // 2, 4, 4 * weight.shape[1])  # a patch is four runs of memory
    patches = padded.as_strided(shape, (image, 2 * row, 2 * pixel, row, 1)).flatten(3).flatten(0, 2)
    rows = weight.permute(0, 2, 3, 1).flatten(1)
    return torch.addmm(bias, patches, rows.t()).view(n, height // 2, width // 2, -1)


def halved_bytes(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`halved` of x / 255 - 0.5 for bytes x (N, H, W, in), where no gradient is wanted.

    What a byte stands for is left to the kernel, and a frame of grey to what zeros stand for. Few
    channels leave vector registers half empty: two pixels side by side are one of twice as many.
    """
    n, height, width, channels = x.shape
    frame = weight.new_full((n, height + 2, width + 2, channels), GREY)
    frame[:, 1:-1, 1:-1] = x
    taps, run = weight.permute(0, 2, 3, 1).flatten(2) / 255, 4 * channels
    both = weight.new_zeros(2, len(weight), 4, run + 2 * channels)
    both[0, ..., :run] = both[1, ..., -run:] = taps
    kernel = both.view(-1, 4, 3, 2 * channels)
    zero = torch.sub(bias, weight.sum((1, 2, 3)), alpha=0.5)
    rows = frame.view(n, height + 2, -1, 2 * channels)
    y = F.conv2d(nchw(rows), nchw(kernel), torch.cat([zero, zero]), stride=2)
    return y.permute(0, 2, 3, 1).reshape(n, height // 2, width // 2, -1)


def doubled(x: Tensor, kernel: Doubling) -> Tensor:
    """(N, H, W, in) -> (N, 2 H, 2 W, out)."""
    return interleave(F.conv2d(nchw(x), *kernel, padding=1).permute(0, 2, 3, 1))


def max_pool(x: Tensor) -> Tensor:
    """The largest of each 2x2 square: (N, 2 H, 2 W, C) -> (N, H, W, C)."""
    if not on_cpu(x) or not torch.is_grad_enabled() or readable(x):
        return F.max_pool2d(x.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)
    return MaxPool.apply(x)


class MaxPool(torch.autograd.Function):
    """`max_pool` that keeps a byte for each comparison, where torch keeps its input and indices.

    Of equal values the upper wins, then the left one; in torch the left, then the upper one.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        n, height, width, channels = x.shape
        upper, lower = x.view(n, height // 2, 2, width * channels).unbind(2)
        column = torch.maximum(upper, lower).view(n, height // 2, width // 2, 2, channels)
        left, right = column.unbind(3)
        ctx.save_for_backward(upper < lower, left < right)
        return torch.maximum(left, right)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:  # pyright: ignore
        lower, right = ctx.saved_tensors
        n, height, width, channels = right.shape
        columns = _parted(grads[0], right, 3).view(lower.shape)
        return _parted(columns, lower, 2).view(n, 2 * height, 2 * width, channels)


def _parted(grad: Tensor, second: Tensor, axis: int) -> Tensor:
    """grad in two places along a new axis: the second where `second` is set, else the first."""
    out = grad.new_empty(*grad.shape[:axis], 2, *grad.shape[axis:])
    torch.mul(grad, second, out=out.select(axis, 1))
    torch.sub(grad, out.select(axis, 1), out=out.select(axis, 0))
    return out


def channels_last(n_out: int, n_in: int, side: int) -> Tensor:
    """An empty kernel (n_out, n_in, side, side)."""
    return torch.empty(n_out, n_in, side, side).to(memory_format=torch.channels_last)


def nchw(x: Tensor) -> Tensor:
    """(N, H, W, C) -> (N, C, H, W), a view."""
    return x.permute(0, 3, 1, 2)


def interleave(x: Tensor) -> Tensor:
    """(N, H, W, 4 C), the pixels of each 2x2 square side by side -> (N, 2 H, 2 W, C)."""
    n, height, width, channels = x.shape
    rows = x.reshape(n, height, width, 2, channels // 2).unbind(3)
    return torch.stack(rows, 2).view(n, 2 * height, 2 * width, channels // 4)


def squares(x: Tensor) -> Tensor:
    """Inverse of `interleave`: (N, 2 H, 2 W, C) -> (N, H, W, 4 C)."""
    n, height, width, channels = x.shape
    rows = x.reshape(n, height // 2, 2, width // 2, 2 * channels).unbind(2)
    return torch.stack(rows, 3).view(n, height // 2, width // 2, 4 * channels)


def image_error(logits: Tensor, target: Tensor) -> Tensor:
    """Squared error (N,) of sigmoid(logits) (N, ...) to target (N, ...) uint8, in [0, 1]."""
    if not torch.is_grad_enabled() or readable(logits):
        return plain_image_error(logits, target)
    return ImageError.apply(logits, target)


def plain_image_error(logits: Tensor, target: Tensor) -> Tensor:
    """`image_error` as it is written."""
    return (logits.float().sigmoid() - target.float() / 255).square().flatten(1).sum(-1)


class ImageError(torch.autograd.Function):
    """`image_error`, which keeps nothing but the gradient."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor) -> Tensor:
        predicted = logits.float().sigmoid()
        error = torch.sub(predicted, target, alpha=1 / 255)
        loss = torch.linalg.vector_norm(error.flatten(1), dim=1).square()  # never in bfloat16
        ctx.save_for_backward(torch.ops.aten.sigmoid_backward(error, predicted).to(logits.dtype))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # pyright: ignore
        (gradient,) = ctx.saved_tensors
        scale = 2 * grads[0].to(gradient.dtype)
        return gradient * scale.view(-1, *(1,) * (gradient.ndim - 1)), None
