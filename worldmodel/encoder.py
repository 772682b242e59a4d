"""Dictionary observations <-> vectors: the encoder gives tokens, the decoder reconstructs.

Follows DreamerV3: images through 5x5 convolutions with max pooling (`faithful`) or 4x4 strided
ones (`strided`, about six times cheaper on a CPU); vectors through symlog and an MLP; discrete
entries as one-hots beside the vectors. The first spatial layer of the decoder is block-linear.
Convolutions run channels-last: an (N, H, W, C) batch is viewed, never copied.
"""

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from worldmodel.conv import Doubling, Down, Kind, Up, doubled, image_error
from worldmodel.mlp import Dense
from worldmodel.nets import (
    BlockLinear,
    Linear,
    RMSNorm,
    at_least_float32,
    norm_silu,
    symlog,
)
from worldmodel.stages import PART, doubled_error, down, first_down, images_in, up
from worldmodel.types import ObsSpec

MULTIPLES = (2, 3, 4, 4)


def image_keys(spec: dict[str, ObsSpec]) -> list[str]:
    """Names of the image entries, in the order of the channels that they share."""
    return [key for key, entry in spec.items() if entry.kind == "image"]


def vector_width(entry: ObsSpec) -> int:
    """Width of a vector or one-hot encoded discrete entry."""
    return math.prod(entry.shape) * (entry.classes if entry.kind == "discrete" else 1)


class Encoder(nn.Module):
    """obs {key: (B, T, ...)} -> tokens (B, T, E); `self.dim` is E."""

    def __init__(self, spec: dict[str, ObsSpec], depth: int, units: int, layers: int, kind: Kind):
        super().__init__()
        self.spec = spec
        self.images = image_keys(spec)
        self.vectors = [key for key in spec if key not in self.images]
        self.dim = 0
        self.convs, self.norms, self.dense = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        if self.images:
            sizes = image_sizes(spec)
            channels = [sum(spec[k].shape[2] for k in self.images)]
            channels += [depth * multiple for multiple in MULTIPLES]
            pairs = pairwise(channels)
            self.convs.extend(Down(a, b, kind) for a, b in pairs)
            self.norms.extend(RMSNorm(c) for c in channels[1:])
            self.dim += math.prod(sizes) * channels[-1]
            self.part = part_of(sizes, depth)
        if self.vectors:
            widths = [sum(vector_width(spec[k]) for k in self.vectors)] + [units] * layers
            pairs = pairwise(widths)
            self.dense.extend(Dense(a, b) for a, b in pairs)
            self.dim += units

    def forward(self, obs: dict[str, Tensor]) -> Tensor:
        parts: list[Tensor] = []
        if self.vectors:
            parts.append(self._vectors(obs))
        if self.images:
            parts.append(self._images(obs))
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def _vectors(self, obs: dict[str, Tensor]) -> Tensor:
        columns = [flat_entry(obs[key], self.spec[key]) for key in self.vectors]
        x = columns[0] if len(columns) == 1 else torch.cat(columns, -1)
        for layer in self.dense:
            x = layer(x)
        return x

    def _images(self, obs: dict[str, Tensor]) -> Tensor:
        images = [obs[key] for key in self.images]
        x = images[0] if len(images) == 1 else torch.cat(images, -1)
        lead = x.shape[:-3]
        if len(lead) == 1 and len(x) <= self.part:
            return self._convolve(x)
        parts = x.reshape(-1, *x.shape[-3:]).split(self.part)
        tokens = [self._convolve(part) for part in parts]
        return (tokens[0] if len(tokens) == 1 else torch.cat(tokens)).view(*lead, -1)

    def _convolve(self, images: Tensor) -> Tensor:
        stages = zip(self.convs, self.norms, strict=True)
        x = first_down(*next(stages), images)
        for conv, norm in stages:
            x = down(conv, norm, x)
        return x.flatten(1)


def flat_entry(value: Tensor, entry: ObsSpec) -> Tensor:
    """(B, T, *shape) -> (B, T, width): symlog of a vector, one-hots of a discrete entry."""
    if entry.kind == "discrete":
        return F.one_hot(value.long(), entry.classes).float().flatten(value.ndim - len(entry.shape))
    return symlog(at_least_float32(value)).flatten(value.ndim - len(entry.shape))


def image_sizes(spec: dict[str, ObsSpec]) -> tuple[int, int]:
    """Height and width after the encoder's halvings, equal for all images of the spec."""
    sizes = {spec[key].shape[:2] for key in image_keys(spec)}
    if len(sizes) != 1:
        raise ValueError(f"all images must have one size, got {sorted(sizes)}")
    height, width = sizes.pop()
    factor = 2 ** len(MULTIPLES)
    if height % factor or width % factor:
        raise ValueError(f"image size {height}x{width} must divide by {factor}")
    return height // factor, width // factor


def part_of(sizes: tuple[int, int], depth: int) -> int:
    """Images that go through all stages together, from their size after the halvings."""
    return images_in(PART, math.prod(sizes) * 4 ** len(MULTIPLES) * depth * MULTIPLES[0])


class Decoder(nn.Module):
    """deter (N, D), stoch (N, S, C) -> {key: prediction}; `errors` compares with observations.

    Images are predicted as logits of [0, 1], vectors in symlog space, discrete entries as logits.
    """

    def __init__(
        self,
        spec: dict[str, ObsSpec],
        deter: int,
        stoch: int,
        depth: int,
        units: int,
        layers: int,
        blocks: int,
        kind: Kind,
    ):
        super().__init__()
        self.spec = spec
        self.images = image_keys(spec)
        self.vectors = [key for key in spec if key not in self.images]
        self.outputs = nn.ModuleDict()
        self.dense, self.convs, self.norms = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        if self.vectors:
            widths = [deter + stoch] + [units] * layers
            pairs = pairwise(widths)
            self.dense.extend(Dense(a, b) for a, b in pairs)
            for key in self.vectors:
                self.outputs[key] = Linear(widths[-1], vector_width(spec[key]))
        if self.images:
            self.grid = (*image_sizes(spec), depth * MULTIPLES[-1])
            self.part = part_of(image_sizes(spec), depth)
            self.space = SpatialInput(self.grid, deter, stoch, units, blocks)
            channels = [depth * m for m in reversed(MULTIPLES)]
            channels += [sum(spec[k].shape[2] for k in self.images)]
            pairs = pairwise(channels)
            self.convs.extend(Up(a, b, kind) for a, b in pairs)
            self.norms.extend(RMSNorm(c) for c in channels[1:-1])

    def forward(self, deter: Tensor, stoch: Tensor) -> dict[str, Tensor]:
        stoch = stoch.flatten(-2)
        out = self._vectors(deter, stoch)
        if self.images:
            kernels = self._kernels()
            logits = doubled(self._grid(kernels, deter, stoch), kernels[-1])
            out |= zip(self.images, logits.split(self._channels(), -1), strict=True)
        return out

    def _vectors(self, deter: Tensor, stoch: Tensor) -> dict[str, Tensor]:
        """Predictions of the vectors and discrete entries."""
        if not self.vectors:
            return {}
        x = torch.cat([deter, stoch], -1)
        for layer in self.dense:
            x = layer(x)
        return {key: self.outputs[key](x) for key in self.vectors}

    def _kernels(self) -> list[Doubling]:
        return [conv.kernel() for conv in self.convs if isinstance(conv, Up)]

    def _channels(self) -> list[int]:
        return [self.spec[key].shape[2] for key in self.images]

    def _grid(self, kernels: list[Doubling], deter: Tensor, stoch: Tensor) -> Tensor:
        """What the last convolution sees: (N, H / 2, W / 2, C)."""
        x = self.space(deter, stoch)
        for kernel, norm in zip(kernels[:-1], self.norms, strict=True):
            x = up(kernel, norm, x)
        return x

    def errors(self, deter: Tensor, stoch: Tensor, obs: dict[str, Tensor]) -> dict[str, Tensor]:
        """The losses {key: (N,)} of decoding; images go through a part at a time."""
        stoch = stoch.flatten(-2)
        out = self._vectors(deter, stoch)
        errors = {key: self._loss(out[key], obs[key], self.spec[key]) for key in self.vectors}
        if self.images:
            kernels = self._kernels()
            rows = (x.split(self.part) for x in (deter, stoch, *(obs[k] for k in self.images)))
            parts = [self._image_errors(kernels, *row) for row in zip(*rows, strict=True)]
            columns = (torch.cat(column) for column in zip(*parts, strict=True))
            errors |= zip(self.images, columns, strict=True)
        return {key: errors[key] for key in self.spec}

    def _image_errors(
        self, kernels: list[Doubling], deter: Tensor, stoch: Tensor, *targets: Tensor
    ) -> list[Tensor]:
        """The error (N,) of each image."""
        x = self._grid(kernels, deter, stoch)
        if len(targets) == 1:
            return [doubled_error(kernels[-1], x, targets[0])]
        logits = doubled(x, kernels[-1]).split(self._channels(), -1)
        return [image_error(*both) for both in zip(logits, targets, strict=True)]

    def _loss(self, out: Tensor, obs: Tensor, entry: ObsSpec) -> Tensor:
        """Squared error or cross-entropy (N,) of a vector or discrete entry."""
        if entry.kind == "vector":
            return (
                (at_least_float32(out) - symlog(at_least_float32(obs)).flatten(1)).square().sum(-1)
            )
        logits = out.float().view(-1, entry.classes)
        losses = F.cross_entropy(logits, obs.reshape(-1).long(), reduction="none")
        return losses.view(len(out), -1).sum(-1)


class SpatialInput(nn.Module):
    """The first grid (N, H, W, C) of the image decoder; block-linear in the deterministic state."""

    def __init__(self, grid: tuple[int, int, int], deter: int, stoch: int, units: int, blocks: int):
        super().__init__()
        self.grid, self.blocks = grid, blocks
        self.deter = BlockLinear(deter, math.prod(grid), blocks)
        self.stoch = Dense(stoch, 2 * units)
        self.mix = Linear(2 * units, math.prod(grid))
        self.norm = RMSNorm(grid[2])

    def forward(self, deter: Tensor, stoch: Tensor) -> Tensor:
        height, width, channels = self.grid
        x = self.deter(deter).view(-1, self.blocks, height, width, channels // self.blocks)
        x = x.permute(0, 2, 3, 1, 4).reshape(-1, height, width, channels)
        y = self.mix(self.stoch(stoch)).view(-1, height, width, channels)
        return norm_silu(self.norm, x + y)
