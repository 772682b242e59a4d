"""Attention over tokens of frames: within a frame, or over time for each token position by itself.

Grouped, normalised queries and keys, rotary positions, logits bounded by a soft cap. Over time it
reads keys and values of earlier frames from a ring in which frame p stands in slot p % C.

B batch, T frames, N tokens of each, D width, H query and G key-value heads, d = D / H, C context;
X, Y, L: what attention runs over is L long, for X x Y rows: (B, T, N) in space, (B, N, T) in time.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from worldmodel.nets import EPSILON, Linear

PERIOD = 1 << 16  # positions after which rotary angles repeat

Attend = Callable[[Tensor, Sequence[Tensor], Sequence[Tensor], Tensor], Tensor]


class KeyValues(NamedTuple):
    """What later frames read of earlier ones; in a Context, frame p stands in slot p % C."""

    keys: Tensor  # (B, N, G, C, d)
    values: Tensor  # (B, N, G, C, d)


class Rotation(NamedTuple):
    """Cosines and signed sines of rotary angles, (..., d) each."""

    cos: Tensor
    sin: Tensor


class Span(NamedTuple):
    """What the layers of one pass share: where its tokens and frames stand, who reads whom."""

    place: Rotation  # (N, d)
    among: Tensor  # (1, 1, 1, N, N): added to logits, zero or minus infinity
    time: Rotation  # (B or 1, 1, 1, T, d)
    past: Tensor  # (B or 1, 1, 1, T, C + T or T), as `among`
    first: Tensor  # (B, T) bool: nothing before these frames matters


class Capped:
    """Attention written out, its logits bounded: cap * tanh(logits / cap)."""

    def __init__(self, cap: float):
        self.cap = cap

    def __call__(
        self, q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], mask: Tensor
    ) -> Tensor:
        """q (X, Y, H, L, d); parts (X, Y, G, S_i, d); mask (X or 1, 1, 1, L, S) -> as q."""
        groups, length = keys[0].shape[2], q.shape[3]
        shared = (q / self.cap).unflatten(2, (groups, -1)).flatten(3, 4)
        parts = [shared @ key.mT for key in keys]
        bounded = (parts[0] if len(parts) == 1 else torch.cat(parts, -1)).tanh_()
        rows = bounded.unflatten(3, (-1, length))
        scores = torch.add(mask.unsqueeze(3), rows, alpha=self.cap).flatten(3, 4)
        weights = scores.softmax(-1).split([key.shape[3] for key in keys], -1)
        parts = [w @ value for w, value in zip(weights, values, strict=True)]
        out = parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)
        return out.unflatten(3, (-1, length)).flatten(2, 3)


def fused(q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], mask: Tensor) -> Tensor:
    """Attention without a cap, by torch's fused kernels; shapes as in `Capped`."""
    lead = q.shape[:2]
    parts = (q, torch.cat(list(keys), 3), torch.cat(list(values), 3))
    mask = mask.expand(*lead, *mask.shape[2:])
    q, key, value, mask = (x.flatten(0, 1) for x in (*parts, mask))
    grouped = q.shape[1] != key.shape[1]
    out = F.scaled_dot_product_attention(q, key, value, mask, scale=1.0, enable_gqa=grouped)
    return out.unflatten(0, lead)


class Rotary(nn.Module):
    """Rotary positions (arXiv 2104.09864), as precise after a billion frames as at the first.

    Frequencies are rounded to whole turns in PERIOD positions, so that angles are reduced in
    integers, exactly.
    """

    turns: Tensor

    def __init__(self, width: int, base: float):
        super().__init__()
        if width % 2:
            raise ValueError(f"rotary positions need an even width of a head, not {width}")
        frequency = base ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
        turns = (frequency * PERIOD / math.tau).round().clamp(min=1).long()
        self.register_buffer("turns", turns, persistent=False)

    def forward(self, position: Tensor, like: Tensor) -> Rotation:
        """position (...) int64 -> a rotation (..., d) of `like`'s type."""
        exact = torch.promote_types(like.dtype, torch.float32)  # half precision counts to 256
        angle = (position.unsqueeze(-1) * self.turns % PERIOD).to(exact) * (math.tau / PERIOD)
        cos, sin = angle.cos().to(like.dtype), angle.sin().to(like.dtype)
        return Rotation(torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1))


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """x (..., d) with its two halves turned against each other."""
    return torch.addcmul(x * rotation.cos, x.roll(x.shape[-1] // 2, -1), rotation.sin)


class Heads(nn.Module):
    """x to normalised, rotated queries and keys, and to values; and back to x's width."""

    def __init__(self, width: int, heads: int, groups: int, scale: float):
        super().__init__()
        if width % heads or heads % groups:
            raise ValueError(f"width={width} / heads={heads} / groups={groups} must divide evenly")
        self.heads, self.groups, self.width = heads, groups, width // heads
        self.project = Linear(width, (heads + 2 * groups) * self.width)
        self.scale = nn.Parameter(torch.ones(heads + groups, 1, self.width))
        self.out = Linear(width, width, scale)

    def read(self, x: Tensor, order: tuple[int, ...], turn: Rotation) -> tuple[Tensor, KeyValues]:
        """x (B, T, N, D) -> (X, Y, H, L, d) and (X, Y, G, L, d); `order` makes (X, Y, h, L, d)."""
        x = self.project(x).unflatten(-1, (-1, self.width)).permute(order)
        both, value = x.split([self.heads + self.groups, self.groups], 2)
        both = F.rms_norm(both, (self.width,), eps=EPSILON) * self.scale
        query, key = rotate(both, turn).split([self.heads, self.groups], 2)
        return query * self.width**-0.5, KeyValues(key, value)


class SpaceAttention(nn.Module):
    """The tokens of a frame read each other, as far as the span lets them."""

    def __init__(self, heads: Heads, attend: Attend):
        super().__init__()
        self.heads, self.attend = heads, attend

    def initial(self, batch: int, count: int) -> tuple[()]:
        """Nothing is kept."""
        return ()

    def forward(self, x: Tensor, span: Span, past: Any) -> tuple[Tensor, tuple[()]]:
        """x (B, T, N, D) -> the same shape; nothing to remember."""
        query, (key, value) = self.heads.read(x, (0, 1, 3, 2, 4), span.place)
        out = self.attend(query, [key], [value], span.among)
        return self.heads.out(out.transpose(2, 3).flatten(3)), ()

    def keep(self, past: Any, fresh: Any, slots: Tensor) -> tuple[()]:
        """Nothing is kept."""
        return ()


class TimeAttention(nn.Module):
    """Each token position reads its own last `context` frames."""

    def __init__(self, heads: Heads, attend: Attend, context: int):
        super().__init__()
        self.heads, self.attend, self.context = heads, attend, context

    def initial(self, batch: int, count: int) -> KeyValues:
        """An empty ring of `count` tokens a frame."""
        shape = (batch, count, self.heads.groups, self.context, self.heads.width)
        ring = self.heads.scale.new_zeros(shape)
        return KeyValues(ring, ring.clone())

    def forward(self, x: Tensor, span: Span, past: Any) -> tuple[Tensor, KeyValues]:
        """x (B, T, N, D) -> the same shape, and this pass's keys and values (B, N, G, T, d).

        past: a ring, or () for none.
        """
        query, fresh = self.heads.read(x, (0, 2, 3, 1, 4), span.time)
        count = x.shape[2]  # a pass may leave out the last tokens of a frame
        parts = (past, fresh) if past else (fresh,)
        keys = [part.keys[:, :count] for part in parts]
        values = [part.values[:, :count] for part in parts]
        out = self.attend(query, keys, values, span.past)
        return self.heads.out(out.permute(0, 3, 1, 2, 4).flatten(3)), fresh

    def keep(self, past: KeyValues, fresh: KeyValues, slots: Tensor) -> KeyValues:
        """The ring with the last frames of `fresh` in their `slots` (B, K)."""
        row = torch.arange(len(slots), device=slots.device)[:, None]

        def write(ring: Tensor, new: Tensor) -> Tensor:
            ring = ring.clone()
            ring[row, :, :, slots] = new[..., -slots.shape[1] :, :].permute(0, 3, 1, 2, 4)
            return ring

        return KeyValues(*map(write, past, fresh))
