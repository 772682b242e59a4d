"""Images to a few continuous latents and back, by a causal masked autoencoder.

Follows the tokenizer of Dreamer 4 (arXiv 2509.24527). The encoder's latents read the patches of
their frame and their own past; patches read patches only. A projection through tanh is the
bottleneck. The decoder's patches read patches and latents; latents read latents only. Both are
causal in time, so that a stream is encoded and decoded frame by frame. In training each patch is
hidden with a probability p, drawn uniformly up to `hide` for each frame: p near zero, as in use,
is trained too.

What all frames share says nothing, yet most of an image is just that: at the start it fills the
latents, which patches are hidden shakes it, and the little that tells frames apart drowns. So
patches go in, and latents come out, as displacements from their running means, in units of their
running deviation; the paper does not say whether its own are.

B batch, T frames, H x W x C image, P patches, L latents of Z channels, D width.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from worldmodel.nets import Linear, at_least_float32
from worldmodel.scale import RunningRMS
from worldmodel.transformer import Context, Transformer, Trunk

Perceptual = Callable[[Tensor, Tensor], Tensor]
SMALL = Trunk(width=64, layers=3, heads=2, groups=2, every=2)


class Patches(nn.Module):
    """Images in [0, 255] <-> patches around zero; sizes that do not divide are padded."""

    def __init__(self, image: tuple[int, int, int], patch: int):
        super().__init__()
        self.image, self.patch = image, patch
        self.grid = (-(-image[0] // patch), -(-image[1] // patch))
        self.count = self.grid[0] * self.grid[1]
        self.dim = patch * patch * image[2]

    def cut(self, images: Tensor) -> Tensor:
        """uint8 (..., H, W, C) -> float (..., P, dim), in [-0.5, 0.5]."""
        if images.dtype != torch.uint8 or tuple(images.shape[-3:]) != self.image:
            size = tuple(images.shape[-3:])
            raise ValueError(f"images must be uint8 {self.image}, not {images.dtype} {size}")
        height, width, _ = self.image
        rows, columns = self.grid
        spare = (0, 0, 0, columns * self.patch - width, 0, rows * self.patch - height)
        images = F.pad(images, spare) if any(spare) else images
        x = images.unflatten(-3, (rows, self.patch)).unflatten(-2, (columns, self.patch))
        x = x.movedim(-3, -4).flatten(-3).flatten(-3, -2)
        return x / 255 - 0.5

    def join(self, patches: Tensor) -> Tensor:
        """(..., P, dim) -> images (..., H, W, C), in [0, 1] but for what a network overshoots."""
        height, width, channels = self.image
        x = patches.unflatten(-2, self.grid).unflatten(-1, (self.patch, self.patch, channels))
        x = x.movedim(-4, -3).flatten(-5, -4).flatten(-3, -2)
        return x[..., :height, :width, :] + 0.5


class Standard(nn.Module):
    """x (..., *shape) less its running mean, over its running deviation, one for all entries.

    The first batches are averaged, later ones count `rate`. `forward` is a fixed map: only `take`
    moves the estimates, and nothing flows back through them. floor: least divisor.
    """

    mean: Tensor
    square: Tensor
    count: Tensor

    def __init__(self, shape: tuple[int, ...], rate: float = 0.02, floor: float = 1e-3):
        super().__init__()
        self.rate, self.floor = rate, floor
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("square", torch.ones(()))
        self.register_buffer("count", torch.zeros(()))

    @torch.no_grad()
    def take(self, x: Tensor) -> None:
        """Take a batch into the estimates."""
        x = x.detach().to(self.mean.dtype).reshape(-1, *self.mean.shape)
        rate = (1 / self.count.add_(1)).clamp(min=self.rate)
        self.mean.lerp_(x.mean(0), rate)
        self.square.lerp_((x - self.mean).square().mean(), rate)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.square.sqrt().clamp(min=self.floor)
        return (x - self.mean.to(x.dtype)) / scale.to(x.dtype)


class Tokenizer(nn.Module):
    """uint8 images (B, T, H, W, C) <-> latents (B, T, L, Z) in (-1, 1).

    hide: greatest share of hidden patches; perceptual: from predicted and true images
    (M, H, W, C) in [0, 1] to a loss (M,), or None.
    """

    def __init__(
        self,
        image: tuple[int, int, int] = (64, 64, 3),
        patch: int = 8,
        latents: int = 16,
        channels: int = 16,
        encoder: Trunk | None = None,
        decoder: Trunk | None = None,
        hide: float = 0.9,
        perceptual: Perceptual | None = None,
    ):
        super().__init__()
        encoder, decoder = encoder or SMALL, decoder or SMALL
        self.patches = Patches(image, patch)
        self.latents, self.channels, self.hide = latents, channels, hide
        self.perceptual = perceptual
        count, dim = self.patches.count, self.patches.dim
        self.input = Standard((dim,))
        self.embed = Linear(dim, encoder.width)
        self.places = learned(count, encoder.width)
        self.hidden = learned(encoder.width)
        self.reader = learned(latents, encoder.width)
        tokens = latents + count
        reads = torch.ones(tokens, tokens, dtype=torch.bool)
        reads[latents:, :latents] = False  # patches read patches only
        self.encoder = Transformer(encoder, tokens, reads, drop=count)
        self.squeeze = Linear(encoder.width, channels)
        self.output = Standard((latents, channels))
        self.expand = Linear(channels, decoder.width)
        self.slots = learned(latents, decoder.width)
        self.queries = learned(count, decoder.width)
        reads = torch.ones(tokens, tokens, dtype=torch.bool)
        reads[count:, :count] = False  # latents read latents only
        self.decoder = Transformer(decoder, tokens, reads, drop=latents)
        self.paint = Linear(decoder.width, dim, 0.1)
        self.scales = {"mse": 1.0} | ({"perceptual": 0.2} if perceptual else {})
        self.norms = nn.ModuleDict({name: RunningRMS() for name in self.scales})

    def encode(self, images: Tensor, first: Tensor | None = None) -> Tensor:
        """Whole sequences of images; first (B, T) bool -> latents."""
        return self._bottleneck(self.encoder(self._seen(self._cut(images)), first))

    def encode_next(
        self, images: Tensor, context: Context, first: Tensor | None = None
    ) -> tuple[Tensor, Context]:
        """Frames that follow what made `context` (at first `encoder.initial(B)`)."""
        tokens = self._seen(self._cut(images))
        x, context = self.encoder.extend(tokens, context, first)
        return self._bottleneck(x), context

    def decode(self, latents: Tensor, first: Tensor | None = None) -> Tensor:
        """Whole sequences of latents -> images (B, T, H, W, C), about [0, 1]."""
        return self.patches.join(self._painted(latents, first))

    def decode_next(
        self, latents: Tensor, context: Context, first: Tensor | None = None
    ) -> tuple[Tensor, Context]:
        """Frames that follow what made `context` (at first `decoder.initial(B)`)."""
        x, context = self.decoder.extend(self._drawn(latents), context, first)
        return self.patches.join(self.paint(x)), context

    def losses(
        self,
        images: Tensor,
        first: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """Every loss (B, T), over its running RMS: {"mse"} and, where one is set, "perceptual"."""
        patches = self._cut(images)
        self.input.take(patches)
        tokens = self._seen(patches, hidden_patches(patches, self.hide, generator))
        x = self.squeeze(self.encoder(tokens, first))
        self.output.take(x)
        latents = self.output(x).tanh()
        painted = at_least_float32(self._painted(latents, first))
        losses = {"mse": (painted - patches).square().mean((-2, -1))}
        if self.perceptual is not None:
            pair = (self.patches.join(x).flatten(0, 1) for x in (painted, patches))
            losses["perceptual"] = self.perceptual(*pair).view(images.shape[:2])
        return {name: self.norms[name](loss) for name, loss in losses.items()}

    def _cut(self, images: Tensor) -> Tensor:
        return self.patches.cut(images).to(self.places.dtype)

    def _seen(self, patches: Tensor, hidden: Tensor | None = None) -> Tensor:
        """Patches (B, T, P, dim), hidden (B, T, P, 1) bool -> the encoder's tokens."""
        x = self.embed(self.input(patches))
        if hidden is not None:
            x = torch.where(hidden, self.hidden, x)
        x = x + self.places
        return torch.cat([self.reader.expand(*x.shape[:2], -1, -1), x], 2)

    def _bottleneck(self, x: Tensor) -> Tensor:
        return self.output(self.squeeze(x)).tanh()

    def _drawn(self, latents: Tensor) -> Tensor:
        """Latents -> the decoder's tokens."""
        x = self.expand(latents) + self.slots
        return torch.cat([self.queries.expand(*x.shape[:2], -1, -1), x], 2)

    def _painted(self, latents: Tensor, first: Tensor | None) -> Tensor:
        return self.paint(self.decoder(self._drawn(latents), first))


def learned(*shape: int) -> nn.Parameter:
    """Learned tokens or places, large enough at the start to tell their frame's tokens apart."""
    return nn.Parameter(0.5 * nn.init.normal_(torch.empty(shape)))


def hidden_patches(patches: Tensor, most: float, generator: torch.Generator | None) -> Tensor:
    """Which patches (B, T, P, 1) are hidden: each frame draws its own share up to `most`."""
    *lead, count, _ = patches.shape
    device = generator.device if generator is not None else None
    draw = torch.rand((*lead, count + 1, 1), generator=generator, device=device)
    return draw[..., 1:, :] < draw[..., :1, :] * most
