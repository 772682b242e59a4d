"""Convolutions against their textbook forms, in float64."""

import pytest
import torch
from torch.nn import functional as F

from worldmodel.conv import (
    Down,
    Up,
    halved_bytes,
    image_error,
    interleave,
    max_pool,
    plain_image_error,
)
from worldmodel.nets import init_weight


def nchw(x: torch.Tensor) -> torch.Tensor:
    return x.permute(0, 3, 1, 2)


def doubled(layer: Up, x: torch.Tensor) -> torch.Tensor:
    """What `Up` stands for, as the paper writes it."""
    if layer.kind == "strided":
        y = F.conv_transpose2d(nchw(x), layer.weight, layer.bias, stride=2, padding=1)
    else:
        large = F.interpolate(nchw(x), scale_factor=2, mode="nearest")
        y = F.conv2d(large, layer.weight, layer.bias, padding=2)
    return y.permute(0, 2, 3, 1)


@pytest.mark.parametrize("kind", ["faithful", "strided"])
def test_up_is_doubling_then_convolving(kind: str) -> None:
    torch.manual_seed(0)
    layer = Up(3, 5, kind).double()  # pyright: ignore
    torch.nn.init.normal_(layer.bias)
    x = torch.randn(2, 6, 4, 3, dtype=torch.float64, requires_grad=True)
    inputs = (x, layer.weight, layer.bias)
    ours, theirs = layer(x), doubled(layer, x)
    assert ours.shape == (2, 12, 8, 5)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    push = torch.randn_like(ours)
    a, b = (torch.autograd.grad(y, inputs, push) for y in (ours, theirs))
    for one, other in zip(a, b, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11)


@pytest.mark.parametrize("size", [(1, 64, 64), (3, 8, 6), (5, 2, 2)])
def test_patches_that_are_gathered_are_a_strided_convolution(size: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    layer = Down(3, 5, "strided").double()
    torch.nn.init.normal_(layer.bias)
    x = torch.randn(*size, 3, dtype=torch.float64)
    textbook = F.conv2d(nchw(x), layer.weight, layer.bias, stride=2, padding=1)
    with torch.no_grad():
        ours = layer(x)
    torch.testing.assert_close(ours, textbook.permute(0, 2, 3, 1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [(1, 64, 64), (3, 8, 4), (2, 2, 12)])
def test_bytes_are_convolved_as_what_they_stand_for(size: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    layer = Down(3, 5, "strided").double()
    torch.nn.init.normal_(layer.bias)
    x = torch.randint(256, (*size, 3), dtype=torch.uint8)
    stood = F.pad(nchw(x.double() / 255 - 0.5), (1, 1, 1, 1))
    textbook = F.conv2d(stood, layer.weight, layer.bias, stride=2).permute(0, 2, 3, 1)
    with torch.no_grad():
        ours = halved_bytes(x, layer.weight, layer.bias)
    torch.testing.assert_close(ours, textbook, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["faithful", "strided"])
def test_down_halves(kind: str) -> None:
    layer = Down(3, 5, kind)  # pyright: ignore
    x = torch.randn(2, 6, 4, 3)
    assert layer(x).shape == (2, 3, 2, 5)
    # a pixel far away changes nothing here
    y = layer(F.pad(x, (0, 0, 0, 0, 0, 12)))
    torch.testing.assert_close(y[:, :2], layer(x)[:, :2])


def test_interleave_puts_the_four_pixels_of_a_square_together() -> None:
    x = torch.arange(1 * 1 * 2 * 4).view(1, 1, 2, 4)
    assert interleave(x)[0, :, :, 0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7]]


def test_image_error_is_its_readable_twin() -> None:
    logits = torch.randn(3, 4, 4, 2, dtype=torch.float64, requires_grad=True)
    target = torch.randint(0, 256, (3, 4, 4, 2), dtype=torch.uint8)
    ours, theirs = image_error(logits, target), plain_image_error(logits, target)
    torch.testing.assert_close(ours.double(), theirs.double(), rtol=1e-6, atol=0)
    push = torch.rand(3)
    a, b = (torch.autograd.grad(y, logits, push.to(y.dtype))[0] for y in (ours, theirs))
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    with torch.no_grad():
        torch.testing.assert_close(image_error(logits, target), theirs.detach())


def test_image_error_under_vmap() -> None:
    logits = torch.randn(2, 3, 4, 4, 2)
    target = torch.randint(0, 256, (2, 3, 4, 4, 2), dtype=torch.uint8)
    mapped = torch.func.vmap(image_error)(logits, target)
    torch.testing.assert_close(mapped[1], image_error(logits[1], target[1]))


def test_kernels_are_drawn_by_their_fan_in() -> None:
    torch.manual_seed(0)
    weight = torch.empty(64, 32, 5, 5)
    init_weight(weight, 32 * 25)
    layer = Up(32, 64, "faithful")
    assert abs(layer.weight.std() / weight.std() - 1) < 0.05


def test_max_pool_is_torch_s() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 8, 6, 5, dtype=torch.float64).requires_grad_()
    ours, theirs = max_pool(x), nchw_pool(x)
    assert torch.equal(ours, theirs)
    push = torch.randn_like(ours)
    a, b = (torch.autograd.grad(y, x, push)[0] for y in (ours, theirs))
    assert torch.equal(a, b)
    with torch.no_grad():
        assert torch.equal(max_pool(x), theirs)


def test_of_equal_values_in_a_square_one_is_taken() -> None:
    x = torch.zeros(1, 2, 2, 1, requires_grad=True)
    max_pool(x).sum().backward()
    assert x.grad is not None and x.grad.flatten().tolist() == [1, 0, 0, 0]


def nchw_pool(x: torch.Tensor) -> torch.Tensor:
    return F.max_pool2d(nchw(x), 2).permute(0, 2, 3, 1)
