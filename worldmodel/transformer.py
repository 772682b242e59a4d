"""Block-causal transformer over frames of tokens, as one pass or frame by frame.

Follows the efficient transformer of Dreamer 4 (arXiv 2509.24527): space layers attend within a
frame; every n-th layer attends over time instead, causally and for each token position by itself;
grouped queries, normalised queries and keys, rotary positions, SwiGLU, soft-capped logits. A frame
sees the last C frames, itself included, and none before a `first` one. `forward` runs a whole
sequence, `extend` continues from a Context and gives the next one, `peek` continues and writes
nothing: all three compute the same function.

B batch, T frames, N tokens of each, D width, H query and G key-value heads, d = D / H, C context.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from worldmodel.nets import EPSILON, Linear, RMSNorm

PERIOD = 1 << 16  # positions after which rotary angles repeat

Attend = Callable[[Tensor, Sequence[Tensor], Sequence[Tensor], Tensor], Tensor]


class KeyValues(NamedTuple):
    """What later frames read of earlier ones; in a Context, frame p stands in slot p % C."""

    keys: Tensor  # (B, N, G, C, d)
    values: Tensor  # (B, N, G, C, d)


class Trunk(NamedTuple):
    """Sizes of a transformer.

    heads, groups: query and key-value heads; every: each so-many-th layer is over time; context:
    frames that a frame sees, itself included; cap: bound of the attention logits, 0 for none;
    base: of the rotary frequencies.
    """

    width: int = 128
    layers: int = 5
    heads: int = 4
    groups: int = 4
    every: int = 2
    context: int = 32
    cap: float = 50.0
    base: float = 10_000.0


class Context(NamedTuple):
    """What a transformer keeps between frames; every operation of nested/fast.py applies."""

    seen: Tensor  # (B,) int64: frames so far
    start: Tensor  # (B,) int64: the earliest frame that may be read
    layers: tuple[tuple[KeyValues, ...], ...]  # () for a space layer


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

    def forward(
        self, x: Tensor, span: Span, past: tuple[KeyValues, ...]
    ) -> tuple[Tensor, tuple[KeyValues, ...]]:
        """x (B, T, N, D) -> the same shape; nothing to remember."""
        query, (key, value) = self.heads.read(x, (0, 1, 3, 2, 4), span.place)
        out = self.attend(query, [key], [value], span.among)
        return self.heads.out(out.transpose(2, 3).flatten(3)), ()


class TimeAttention(nn.Module):
    """Each token position reads its own past."""

    def __init__(self, heads: Heads, attend: Attend):
        super().__init__()
        self.heads, self.attend = heads, attend

    def forward(
        self, x: Tensor, span: Span, past: tuple[KeyValues, ...]
    ) -> tuple[Tensor, tuple[KeyValues, ...]]:
        """x (B, T, N, D) -> the same shape, and this pass's keys and values (B, N, G, T, d)."""
        query, fresh = self.heads.read(x, (0, 2, 3, 1, 4), span.time)
        count = x.shape[2]  # a pass may leave out the last tokens of a frame
        keys = [*(part.keys[:, :count] for part in past), fresh.keys]
        values = [*(part.values[:, :count] for part in past), fresh.values]
        out = self.attend(query, keys, values, span.past)
        return self.heads.out(out.permute(0, 3, 1, 2, 4).flatten(3)), (fresh,)


class Layer(nn.Module):
    """Attention, then SwiGLU (arXiv 2002.05202), each added to what it read normalised.

    The last `drop` tokens are read, but not passed on.
    """

    def __init__(
        self, attention: SpaceAttention | TimeAttention, width: int, scale: float, drop: int = 0
    ):
        super().__init__()
        units = (8 * width // 3 + 7) // 8 * 8
        self.attention, self.drop = attention, drop
        self.norm, self.mlp_norm = RMSNorm(width), RMSNorm(width)
        self.mlp, self.out = Linear(width, 2 * units), Linear(units, width, scale)

    def forward(
        self, x: Tensor, span: Span, past: tuple[KeyValues, ...]
    ) -> tuple[Tensor, tuple[KeyValues, ...]]:
        """x (B, T, N, D) -> (B, T, N - drop, D), and what a time layer remembers."""
        mixed, fresh = self.attention(self.norm(x), span, past)
        x = (x + mixed)[:, :, : x.shape[2] - self.drop]
        gate, value = self.mlp(self.mlp_norm(x)).chunk(2, -1)
        return x + self.out(F.silu(gate) * value), fresh


class Transformer(nn.Module):
    """Frames of at most `tokens` tokens.

    mask (N, N) bool: token i of a frame may read token j; drop: so many of the last tokens have
    no output. A pass may leave out the last tokens of its frames where no other reads them.
    """

    among: Tensor

    def __init__(self, trunk: Trunk, tokens: int, mask: Tensor | None = None, drop: int = 0):
        super().__init__()
        width, count = trunk.width, trunk.layers
        self.tokens, self.context = tokens, trunk.context
        self.rotary = Rotary(width // trunk.heads, trunk.base)
        attend: Attend = Capped(trunk.cap) if trunk.cap else fused
        scale = (2 * count) ** -0.5  # the stream's variance does not grow with depth
        self.timed = tuple(i % trunk.every == 0 for i in range(1, count + 1))
        self.layers = nn.ModuleList()
        for i, timed in enumerate(self.timed):
            heads = Heads(width, trunk.heads, trunk.groups, scale)
            attention = (TimeAttention if timed else SpaceAttention)(heads, attend)
            self.layers.append(Layer(attention, width, scale, drop if i == count - 1 else 0))
        self.norm = RMSNorm(width)
        everyone = torch.ones(tokens, tokens, dtype=torch.bool)
        self.register_buffer("among", everyone if mask is None else mask, persistent=False)
        self.cached = (trunk.groups, trunk.context, width // trunk.heads)

    def initial(self, batch: int) -> Context:
        """The context of `batch` rows before their first frame."""
        like = self.norm.weight
        zeros = like.new_zeros(batch, dtype=torch.int64)
        shape = (batch, self.tokens, *self.cached)
        layers = tuple(
            (KeyValues(like.new_zeros(shape), like.new_zeros(shape)),) if timed else ()
            for timed in self.timed
        )
        return Context(zeros, zeros, layers)

    def forward(self, x: Tensor, first: Tensor | None = None) -> Tensor:
        """Whole sequences x (B, T, N, D) from nothing; first (B, T) bool -> (B, T, N - drop, D)."""
        frame = torch.arange(x.shape[1], device=x.device)
        seen, start = frame[None], torch.zeros_like(frame)[None]
        if first is not None:
            start = latest(first, seen, start[:, :1])
        mask = self._visible(seen, seen, start)
        return self._run(x, self._span(x, seen, mask), ((),) * len(self.timed))[0]

    def peek(self, x: Tensor, context: Context, first: Tensor | None = None) -> Tensor:
        """x (B, T, N, D) after `context`, which stays as it is -> (B, T, N, D)."""
        return self._run(x, self._continued(x, context, first)[0], context.layers)[0]

    def extend(
        self, x: Tensor, context: Context, first: Tensor | None = None
    ) -> tuple[Tensor, Context]:
        """x (B, T, N, D), all tokens of it, after `context` -> (B, T, N, D) and what follows."""
        if x.shape[2] != self.tokens:
            raise ValueError(f"a context keeps {self.tokens} tokens a frame, not {x.shape[2]}")
        span, frame, start = self._continued(x, context, first)
        y, fresh = self._run(x, span, context.layers)
        slots = frame[:, -self.context :] % self.context
        layers = tuple(
            tuple(written(old, new, slots) for old, new in zip(*pair, strict=True))
            for pair in zip(context.layers, fresh, strict=True)
        )
        return y, Context(frame[:, -1] + 1, start[:, -1], layers)

    def _run(
        self, x: Tensor, span: Span, past: tuple[tuple[KeyValues, ...], ...]
    ) -> tuple[Tensor, list[tuple[KeyValues, ...]]]:
        fresh: list[tuple[KeyValues, ...]] = []
        for layer, part in zip(self.layers, past, strict=True):
            x, new = layer(x, span, part)
            fresh.append(new)
        return self.norm(x), fresh

    def _continued(
        self, x: Tensor, context: Context, first: Tensor | None
    ) -> tuple[Span, Tensor, Tensor]:
        """The span of x after `context`; its frames' numbers and earliest readable ones (B, T)."""
        frame = context.seen[:, None] + torch.arange(x.shape[1], device=x.device)
        start = context.start[:, None].expand_as(frame)
        if first is not None:
            start = latest(first, frame, context.start[:, None])
        newest = context.seen[:, None] - 1
        slot = torch.arange(self.context, device=x.device)
        stored = newest - (newest - slot) % self.context  # below zero: not written yet
        mask = self._visible(torch.cat([stored, frame], 1), frame, start)
        return self._span(x, frame, mask), frame, start

    def _visible(self, key: Tensor, frame: Tensor, start: Tensor) -> Tensor:
        """Whether frames (B, T) read keys (B, S) of the frames of these numbers: (B, T, S)."""
        key, frame = key[:, None], frame[:, :, None]
        return (key <= frame) & (key > frame - self.context) & (key >= start[:, :, None])

    def _span(self, x: Tensor, frame: Tensor, mask: Tensor) -> Span:
        count = x.shape[2]
        place = self.rotary(torch.arange(count, device=x.device), x)
        time = Rotation(*(part[:, None, None] for part in self.rotary(frame, x)))
        among = barrier(self.among[:count, :count], x)[None, None, None]
        return Span(place, among, time, barrier(mask, x)[:, None, None])


def barrier(mask: Tensor, like: Tensor) -> Tensor:
    """What a mask adds to logits: zero where it is set, minus infinity elsewhere."""
    return like.new_zeros(()).where(mask, -math.inf)


def latest(first: Tensor, frame: Tensor, start: Tensor) -> Tensor:
    """The earliest frame that each may read, (B, T): `start` (B, 1), or its row's last first."""
    return torch.where(first, frame, start).cummax(1).values


def written(past: KeyValues, fresh: KeyValues, slots: Tensor) -> KeyValues:
    """The ring with the last frames of `fresh` in their `slots` (B, K)."""
    row = torch.arange(len(slots), device=slots.device)[:, None]

    def write(ring: Tensor, new: Tensor) -> Tensor:
        ring = ring.clone()
        ring[row, :, :, slots] = new[..., -slots.shape[1] :, :].permute(0, 3, 1, 2, 4)
        return ring

    return KeyValues(*map(write, past, fresh))
