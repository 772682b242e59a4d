"""Stages as single nodes against their readable twins, in float64 and in bfloat16."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from worldmodel import Decoder, Encoder, ObsSpec, stages
from worldmodel.conv import GREY, Down, Kind, Up, doubled, image_error, nchw
from worldmodel.nets import RMSNorm, norm_silu
from worldmodel.stages import (
    doubled_error,
    down,
    first_down,
    norm_silu_,
    normed,
    pair,
    pairs,
    unpooled,
    up,
)

WIDTHS = [(3, 8), (8, 12), (4, 5), (16, 9)]


@pytest.fixture(autouse=True)
def few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks, the last one shorter."""
    torch.manual_seed(0)
    monkeypatch.setattr(stages, "at_once", lambda pixels: stages.images_in(2 * 8 * 12 * 12, pixels))


def agree(
    ours: Callable[..., Tensor], theirs: Callable[..., Tensor], inputs: Sequence[Tensor]
) -> None:
    """Equal values and gradients, from different nodes."""
    a, b = ours(), theirs()
    assert a.grad_fn is not None and "Stage" in a.grad_fn.name()
    torch.testing.assert_close(a, b, rtol=0, atol=1e-11)
    push = torch.randn_like(a)
    for one, other in zip(*(torch.autograd.grad(y, inputs, push) for y in (a, b)), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


def norm_of(width: int) -> RMSNorm:
    norm = RMSNorm(width).double()
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    return norm


def down_of(n_in: int, n_out: int) -> tuple[Down, RMSNorm, Tensor]:
    conv = Down(n_in, n_out, "faithful").double()
    nn.init.normal_(conv.bias)
    x = torch.randn(5, 8, 12, n_in, dtype=torch.float64, requires_grad=True)
    return conv, norm_of(n_out), x


@pytest.mark.parametrize("widths", WIDTHS)
def test_down_is_its_readable_twin(widths: tuple[int, int]) -> None:
    conv, norm, x = down_of(*widths)
    inputs = [x, conv.weight, conv.bias, norm.weight]
    agree(lambda: down(conv, norm, x), lambda: norm_silu(norm, conv(x)), inputs)
    pixels = x.detach()  # the first stage: nothing before it learns
    agree(lambda: down(conv, norm, pixels), lambda: norm_silu(norm, conv(pixels)), inputs[1:])


def test_the_first_stage_reads_bytes() -> None:
    conv, norm, _ = down_of(3, 8)
    image = torch.randint(256, (5, 8, 12, 3), dtype=torch.uint8)
    stood, inputs = image.double() / 255 - 0.5, [conv.weight, conv.bias, norm.weight]
    agree(lambda: first_down(conv, norm, image), lambda: norm_silu(norm, conv(stood)), inputs)


def test_low_precision_does_not_round_bytes_around_grey() -> None:
    values = torch.arange(256, dtype=torch.uint8)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(values.to(dtype).sub_(GREY).double(), values.double() - GREY)


@pytest.mark.parametrize("kind", ["faithful", "strided"])
@pytest.mark.parametrize("widths", WIDTHS)
def test_up_is_its_readable_twin(widths: tuple[int, int], kind: str) -> None:
    conv, norm = Up(*widths, kind).double(), norm_of(widths[1])  # pyright: ignore
    nn.init.normal_(conv.bias)
    x = torch.randn(7, 4, 6, widths[0], dtype=torch.float64, requires_grad=True)
    inputs = [x, conv.weight, conv.bias, norm.weight]
    agree(lambda: up(conv.kernel(), norm, x), lambda: norm_silu(norm, conv(x)), inputs)


def test_the_error_of_doubled_images_is_its_readable_twin() -> None:
    conv = Up(8, 3, "faithful").double()
    x = torch.randn(7, 4, 6, 8, dtype=torch.float64, requires_grad=True)
    target = torch.randint(0, 256, (7, 8, 12, 3), dtype=torch.uint8)
    ours, theirs = (
        doubled_error(conv.kernel(), x, target),
        image_error(doubled(x, conv.kernel()), target),
    )
    torch.testing.assert_close(ours, theirs.double(), rtol=1e-6, atol=0)  # theirs is in float32
    push = torch.rand(7, dtype=torch.float64)
    inputs = [x, conv.weight, conv.bias]
    a, b = (torch.autograd.grad(y, inputs, push.to(y.dtype)) for y in (ours, theirs))
    for one, other in zip(a, b, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_under_autocast_a_stage_stays_in_low_precision() -> None:
    conv, norm, x = down_of(8, 12)
    conv, norm, x = conv.float(), norm.float(), x.detach().float().requires_grad_()
    inputs = [x, conv.weight, conv.bias, norm.weight]
    exact = down(conv, norm, x)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = down(conv, norm, x)
    assert rounded.dtype == torch.bfloat16
    push = torch.randn_like(exact)
    grads = torch.autograd.grad(exact, inputs, push)
    low = torch.autograd.grad(rounded, inputs, push.bfloat16())
    both = [(exact, rounded.float()), *zip(grads, low, strict=True)]
    for one, other in both:
        assert other.dtype == torch.float32
        assert (one - other).norm() < 0.1 * one.norm()  # other pixels win where two are close


def test_compilers_and_transforms_see_the_readable_path() -> None:
    conv, norm, x = down_of(3, 8)
    expected = norm_silu(norm, conv(x))
    mapped = torch.func.vmap(lambda row: down(conv, norm, row[None])[0])(x)
    torch.testing.assert_close(mapped, expected)
    with torch.no_grad():
        torch.testing.assert_close(down(conv, norm, x), expected)


def test_a_block_grows_with_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(stages, "BLOCK", 30)
    assert [stages.at_once(pixels) for pixels in (10, 60, 61)] == [6, 1, 1]


def test_of_equal_pixels_the_first_gets_the_gradient() -> None:
    equal = torch.zeros(1, 1, 2, 1)
    grad = unpooled(torch.ones(1, 1, 1, 1), equal.view(1, 1, 2), equal[:, :, :1])
    assert grad.flatten().tolist() == [1, 0, 0, 0]


def test_two_pixels_side_by_side_are_one_of_twice_the_channels() -> None:
    x, kernel = torch.randn(2, 6, 8, 3), torch.randn(5, 3, 5, 5)
    two = F.conv2d(nchw(pairs(x)), pair(kernel), padding=(2, 1)).permute(0, 2, 3, 1)
    one = F.conv2d(nchw(x), kernel, padding=2).permute(0, 2, 3, 1)
    torch.testing.assert_close(two.reshape(one.shape), one, rtol=1e-4, atol=1e-4)


IMAGES = {"near": ObsSpec("image", (16, 32, 3)), "far": ObsSpec("image", (16, 32, 1))}


@pytest.mark.parametrize("keys", [["near"], ["near", "far"]])
def test_parts_of_a_batch_are_the_whole(keys: list[str]) -> None:
    spec = {"place": ObsSpec("vector", (3,))} | {key: IMAGES[key] for key in keys}
    obs = {k: torch.randint(0, 256, (5, 2, *spec[k].shape), dtype=torch.uint8) for k in keys}
    obs["place"] = torch.randn(5, 2, 3)
    encoder = Encoder(spec, depth=2, units=8, layers=1, kind="faithful")
    decoder = Decoder(spec, 16, 12, 2, 8, 1, 4, "faithful")
    deter, stoch = torch.randn(10, 16, requires_grad=True), torch.randn(10, 3, 4)
    found: list[list[Tensor]] = []
    for part in (10, 3):
        encoder.part = decoder.part = part
        tokens = encoder(obs)
        errors = decoder.errors(deter, stoch, {k: v.flatten(0, 1) for k, v in obs.items()})
        assert list(errors) == list(spec)
        total = tokens.square().sum() + torch.stack([*errors.values()]).sum()
        parameters = [*encoder.parameters(), *decoder.parameters(), deter]
        found.append([tokens, *errors.values(), *torch.autograd.grad(total, parameters)])
    for whole, parts in zip(*found, strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-4)
    logits = decoder(deter, stoch)
    for i, key in enumerate(keys):
        expected = image_error(logits[key], obs[key].flatten(0, 1))
        torch.testing.assert_close(found[0][2 + i], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("width", [1, 8, 12])
def test_the_norm_of_few_channels_without_gradients(width: int) -> None:
    norm, x = norm_of(width), torch.randn(2, 4, 6, width, dtype=torch.float64)
    expected = norm_silu(norm, x)
    with torch.no_grad():
        ours = norm_silu_(x, norm.weight)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("count", [1, 6, 16])
@pytest.mark.parametrize("kind", ["faithful", "strided"])
@pytest.mark.parametrize("keys", [["near"], ["near", "far"]])
def test_an_encoder_gives_the_same_tokens_without_gradients(
    kind: Kind, keys: list[str], count: int
) -> None:
    spec = {key: ObsSpec("image", (64, 64, IMAGES[key].shape[2])) for key in keys}
    encoder = drifted(Encoder(spec, 4, 8, 1, kind))
    images = {k: torch.randint(256, (count, *spec[k].shape), dtype=torch.uint8) for k in keys}
    expected = encoder({key: image[:, None] for key, image in images.items()})[:, 0]
    with torch.no_grad():
        ours = encoder(images)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


def drifted(encoder: Encoder) -> Encoder:
    """Off the zeros and ones that biases and scales start with."""
    with torch.no_grad():
        for parameter in encoder.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return encoder


def test_odd_counts_of_rows_and_low_precision_have_a_plain_norm() -> None:
    norm = norm_of(16).float()
    for count, dtype, error in ((2049, torch.float32, 1e-5), (2048, torch.bfloat16, 0.03)):
        y = torch.randn(count, 1, 1, 16, dtype=dtype)
        expected = norm_silu(norm, y.float())
        with torch.no_grad():
            assert y.numel() >= stages.LARGE
            ours = normed(norm, y)
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.float(), expected, rtol=error, atol=error)


def test_bytes_under_transforms_and_autocast_take_the_readable_path() -> None:
    conv, norm = Down(3, 8, "strided"), RMSNorm(8)
    image = torch.randint(256, (2, 16, 16, 3), dtype=torch.uint8)
    with torch.no_grad():
        expected = first_down(conv, norm, image)
        mapped = torch.func.vmap(lambda row: first_down(conv, norm, row[None])[0])(image)
        torch.testing.assert_close(mapped, expected, rtol=0, atol=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = first_down(conv, norm, image)
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), expected, rtol=0.03, atol=0.03)
