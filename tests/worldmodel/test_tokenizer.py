"""The tokenizer: patches, who reads whom, causality, frame by frame, masking, losses, learning."""

import pytest
import torch
from torch import Tensor

from nested import fast
from worldmodel.scale import weighted
from worldmodel.tokenizer import Patches, Tokenizer, hidden_patches
from worldmodel.transformer import Trunk

SIZE = (10, 8, 3)  # ten rows do not divide into patches of four


def make(perceptual=None, seed: int = 0) -> Tokenizer:
    """Six patches, three latents of two channels."""
    torch.manual_seed(seed)
    trunk = Trunk(16, 3, 2, 2, 2, context=4)
    return Tokenizer(SIZE, 4, 3, 2, trunk, trunk, perceptual=perceptual)


def video(batch: int = 2, length: int = 7) -> tuple[Tensor, Tensor]:
    """Random images (B, T, 10, 8, 3), with an episode's start in the middle of row 1."""
    g = torch.Generator().manual_seed(1)
    first = torch.zeros(batch, length, dtype=torch.bool)
    first[:, 0] = first[1, 4] = True
    return torch.randint(256, (batch, length, *SIZE), generator=g, dtype=torch.uint8), first


@pytest.mark.parametrize("image, patch", [((64, 64, 3), 8), (SIZE, 4), ((5, 7, 1), 3)])
def test_patches_are_cut_and_joined_again(image: tuple[int, int, int], patch: int):
    patches = Patches(image, patch)
    images = torch.randint(256, (2, 3, *image), dtype=torch.uint8)
    cut = patches.cut(images)
    assert cut.shape == (2, 3, patches.count, patches.dim)
    assert torch.allclose(patches.join(cut), images / 255, atol=1e-6)
    corner = images[1, 2, :patch, :patch].flatten() / 255 - 0.5
    assert torch.equal(cut[1, 2, 0], corner)
    with pytest.raises(ValueError, match=r"must be uint8 .* not torch.float32"):
        patches.cut(images.float())


def test_images_and_latents_pass_frame_by_frame_as_in_one():
    model, (images, first) = make(), video()
    latents = model.encode(images, first)
    painted = model.decode(latents, first)
    assert latents.shape == (2, 7, 3, 2) and painted.shape == (2, 7, *SIZE)
    assert latents.abs().max() < 1
    encoder, decoder = model.encoder.initial(2), model.decoder.initial(2)
    for t in range(7):
        now = slice(t, t + 1)
        z, encoder = model.encode_next(images[:, now], encoder, first[:, now])
        x, decoder = model.decode_next(z, decoder, first[:, now])
        assert torch.allclose(z, latents[:, now], atol=1e-5)
        assert torch.allclose(x, painted[:, now], atol=1e-5)


def test_no_future_frame_and_no_other_row_changes_anything():
    model, (images, first) = make(), video()
    other = images.clone()
    other[0, 5:] = 255 - other[0, 5:]
    a, b = model.encode(images, first), model.encode(other, first)
    assert torch.equal(a[0, :5], b[0, :5]) and not torch.equal(a[0, 5], b[0, 5])
    assert torch.equal(a[1], b[1])
    x, y = model.decode(a, first), model.decode(b, first)
    assert torch.equal(x[0, :5], y[0, :5]) and not torch.equal(x[0, 5], y[0, 5])


def test_a_start_forgets_what_was_before():
    model, (images, first) = make(), video()
    assert torch.allclose(
        model.encode(images, first)[1, 4:], model.encode(images[:, 4:])[1], atol=1e-6
    )


def test_each_frame_hides_its_own_share_of_patches_up_to_the_most():
    patches = torch.zeros(200, 10, 50, 2)
    hidden = hidden_patches(patches, 0.9, torch.Generator().manual_seed(0)).float()
    share = hidden.mean((2, 3))
    assert hidden.shape == (200, 10, 50, 1)
    assert abs(share.mean() - 0.45) < 0.01
    assert abs((share < 0.225).float().mean() - 0.25) < 0.03
    assert not hidden_patches(patches, 0.0, torch.Generator().manual_seed(0)).any()


def test_latents_see_only_patches_that_are_not_hidden():
    model, (images, first) = make(), video()
    cut = model.patches.cut(images)
    hidden = torch.zeros(2, 7, 6, 1, dtype=torch.bool)
    hidden[:, :, 2] = True
    changed = cut.clone()
    changed[:, :, 2] += 1
    a, b = (model.encoder(model._seen(x, hidden), first) for x in (cut, changed))
    assert torch.equal(a, b)
    assert not torch.equal(model.encoder(model._seen(changed), first), a)


def test_patches_do_not_read_the_encoder_s_latents_nor_latents_the_decoder_s_patches():
    model = make()
    reads = model.encoder.among
    assert reads[:3].all() and reads[3:, 3:].all() and not reads[3:, :3].any()
    reads = model.decoder.among  # patches stand first
    assert reads[:6].all() and reads[6:, 6:].all() and not reads[6:, :6].any()


def test_losses_have_a_row_each_and_reach_every_parameter():
    def perceptual(painted: Tensor, true: Tensor) -> Tensor:
        assert painted.shape == true.shape == (14, *SIZE)
        return (painted.mean((1, 2, 3)) - true.mean((1, 2, 3))).abs()

    model, (images, first) = make(perceptual), video()
    losses = model.losses(images, first, torch.Generator().manual_seed(0))
    assert {name: loss.shape for name, loss in losses.items()} == dict.fromkeys(
        model.scales, (2, 7)
    )
    assert model.scales == {"mse": 1.0, "perceptual": 0.2}
    weighted(losses, model.scales).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_the_loss_is_the_mean_squared_error_of_all_patches_over_its_running_rms():
    model, (images, first) = make(), video()
    model.hide = 0.0
    loss = model.losses(images, first)["mse"]
    painted = model.paint(model.decoder(model._drawn(model.encode(images, first)), first))
    mse = (painted - model.patches.cut(images)).square().mean((-2, -1))
    assert torch.allclose(loss, mse / mse.square().mean().sqrt())


def test_it_learns_a_few_frames_by_heart():
    model, (images, first) = make(), video()
    images = images[:, :, :1, :1].expand(-1, -1, *SIZE[:2], -1).contiguous()  # a colour a frame
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(120):
        optimizer.zero_grad()
        weighted(model.losses(images, first, generator), model.scales).backward()
        optimizer.step()
    with torch.no_grad():
        error = model.decode(model.encode(images, first), first) - images / 255
    assert error.square().mean() < 0.3 * (images / 255).var()  # of the best guess without latents


def test_a_context_is_a_tree_of_rows():
    model, (images, first) = make(), video()
    _, context = model.encode_next(images, model.encoder.initial(2), first)
    swapped = fast.gather(context, torch.tensor([1, 0]))
    z, _ = model.encode_next(images[:, :1], context)
    w, _ = model.encode_next(images[[1, 0], :1], swapped)
    assert torch.allclose(z, w[[1, 0]], atol=1e-6)


def squares(batch: int = 16, length: int = 6) -> Tensor:
    """A white square of four pixels that moves over black images of sixteen."""
    images = torch.zeros(batch, length, 16, 16, 3, dtype=torch.uint8)
    for row in range(batch):
        for t in range(length):
            y, x = (5 * row + t) % 13, (3 * row + 2 * t) % 13
            images[row, t, y : y + 4, x : x + 4] = 255
    return images


def test_what_tells_frames_apart_fills_the_latents_from_the_start():
    torch.manual_seed(0)
    trunk = Trunk(32, 3, 2, 2, 2, context=8)
    model = Tokenizer((16, 16, 3), 4, 4, 8, trunk, trunk)
    images = squares()
    model.losses(images, None, torch.Generator().manual_seed(0))
    with torch.no_grad():
        latents = model.encode(images).flatten(0, 1)
    apart = latents.std(0).mean() / latents.square().mean().sqrt()
    assert apart > 0.3  # without running means it was 0.1: all frames looked alike


def test_running_estimates_move_only_where_losses_are_taken():
    model, (images, first) = make(), video()
    before = model.encode(images, first)
    assert torch.equal(model.encode(images, first), before)
    model.losses(images, first, torch.Generator().manual_seed(0))
    patches = model.patches.cut(images)
    seen = model.input(patches)
    assert torch.allclose(seen.mean((0, 1, 2)), torch.zeros(model.patches.dim), atol=1e-5)
    assert torch.allclose(seen.square().mean(), torch.ones(()), atol=1e-4)
    assert not torch.equal(model.encode(images, first), before)
