"""Block-causal transformer over frames of tokens, as one pass or frame by frame.

Follows the efficient transformer of Dreamer 4 (arXiv 2509.24527): space layers attend within a
frame; every n-th layer attends over time instead, causally and for each token position by itself.
There a memory from nested/, one for each position, may stand beside attention or in its place, and
in every layer one may stand in place of the feed-forward network, or more such networks follow it
in a chain (arXiv 2512.24695): what attention forgets after C frames, a memory may keep.

`forward` runs a whole sequence, `extend` continues from a Context and gives the next one, `peek`
continues and writes nothing: all three compute the same function.

B batch, T frames, N tokens of each, D width, C context.
"""

import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nested.fast import Tree, tree_map
from worldmodel.attention import (
    Attend,
    Capped,
    Heads,
    Rotary,
    Rotation,
    SpaceAttention,
    Span,
    TimeAttention,
    fused,
)
from worldmodel.nets import Linear, RMSNorm

MakeMemory = Callable[[int, int], Any]  # widths in and out -> a memory of nested/


class Trunk(NamedTuple):
    """Sizes of a transformer, and what its layers are made of.

    heads, groups: query and key-value heads; every: each so-many-th layer is over time; context:
    frames that attention sees, the present included; cap: bound of its logits, 0 for none; base:
    of the rotary frequencies; memory: makes that of the time layers, `beside` attention or
    `instead` of it; chain: further feed-forward networks of each layer; feed: makes the memory
    that stands in place of a layer's feed-forward network.
    """

    width: int = 128
    layers: int = 5
    heads: int = 4
    groups: int = 4
    every: int = 2
    context: int = 32
    cap: float = 50.0
    base: float = 10_000.0
    memory: MakeMemory | None = None
    place: Literal["beside", "instead"] = "beside"
    chain: int = 0
    feed: MakeMemory | None = None


class Kept(NamedTuple):
    """What a layer keeps of earlier frames: trees of nested/fast.py, () for nothing."""

    attention: Tree = ()
    beside: Tree = ()
    feed: Tree = ()


class Context(NamedTuple):
    """What a transformer keeps between frames; every operation of nested/fast.py applies."""

    seen: Tensor  # (B,) int64: frames so far
    start: Tensor  # (B,) int64: the earliest frame that may be read
    layers: tuple[Kept, ...]


class Recall(nn.Module):
    """Each token position of each row has a memory of its own, which learns from frame to frame.

    Its answers are scaled channel by channel, as in LayerScale (arXiv 2103.17239): where the
    scales begin at zero, a trained network may be given memories without changing what it does.
    """

    def __init__(self, memory: Any, width: int, scale: float):
        super().__init__()
        self.memory = memory
        self.scale = nn.Parameter(torch.full((width,), scale))

    def initial(self, batch: int, count: int) -> Tree:
        """The state of `count` tokens a frame, (B, N, ...)."""
        return self._apart(self.memory.initial(batch * count), batch)

    def forward(self, x: Tensor, span: Span, past: Tree) -> tuple[Tensor, Tree]:
        """x (B, T, N, D) -> the same shape, and the state after it; past: a state, or ()."""
        batch, length, count, _ = x.shape
        rows = x.transpose(1, 2).flatten(0, 1)
        state = self._joined(past, count) if past else self.memory.initial(batch * count)
        reset = span.first.repeat_interleave(count, 0)
        if length == 1:
            y, state = self.memory(rows[:, 0], state, reset[:, 0])
        else:
            y, state = self.memory.scan(rows, state, reset)
        y = y.reshape(batch, count, length, -1).transpose(1, 2)
        return y * self.scale, self._apart(state, batch)

    def keep(self, past: Tree, fresh: Tree, slots: Tensor) -> Tree:
        """The newest state."""
        return fresh

    def _apart(self, state: Tree, batch: int) -> Tree:
        return tree_map(lambda x: x.unflatten(0, (batch, -1)), state)

    def _joined(self, state: Tree, count: int) -> Tree:
        return tree_map(lambda x: x[:, :count].flatten(0, 1), state)


class SwiGLU(nn.Module):
    """One more feed-forward network (arXiv 2002.05202) in a layer's chain, silent at first."""

    def __init__(self, width: int):
        super().__init__()
        units = hidden_units(width)
        self.norm = RMSNorm(width)
        self.mlp, self.out = Linear(width, 2 * units), Linear(units, width, 0.0)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D), with what the network makes of it added."""
        return x + self.out(gated(self.mlp(self.norm(x))))


class Layer(nn.Module):
    """Attention or memory, then a feed-forward network, each added to what it read normalised.

    The last `drop` tokens are read, but not passed on.
    """

    def __init__(self, trunk: Trunk, timed: bool, attend: Attend, drop: int):
        super().__init__()
        width, units = trunk.width, hidden_units(trunk.width)
        scale = (2 * trunk.layers) ** -0.5  # the stream's variance does not grow with depth
        self.drop, memory = drop, trunk.memory if timed else None
        self.attention: SpaceAttention | TimeAttention | Recall
        self.beside: Recall | None = None
        self.feed: Recall | None = None
        if memory is not None and trunk.place == "instead":
            self.attention = Recall(memory(width, width), width, scale)
        else:
            heads = Heads(width, trunk.heads, trunk.groups, scale)
            over_time = partial(TimeAttention, context=trunk.context)
            self.attention = (over_time if timed else SpaceAttention)(heads, attend)
        self.norm, self.mlp_norm = RMSNorm(width), RMSNorm(width)
        if trunk.feed is None:
            self.mlp, self.out = Linear(width, 2 * units), Linear(units, width, scale)
        else:
            self.feed = Recall(trunk.feed(width, width), width, scale)
        if memory is not None and trunk.place == "beside":
            self.beside = Recall(memory(width, width), width, 0.0)
        self.chain = nn.ModuleList(SwiGLU(width) for _ in range(trunk.chain))

    def initial(self, batch: int, count: int) -> Kept:
        """Before the first frame of `count` tokens."""
        parts = ((self.attention, count), (self.beside, count), (self.feed, count - self.drop))
        return Kept(*(() if part is None else part.initial(batch, n) for part, n in parts))

    def forward(self, x: Tensor, span: Span, past: Kept) -> tuple[Tensor, Kept]:
        """x (B, T, N, D) -> (B, T, N - drop, D), and what is new to remember."""
        seen, beside, feed = self.norm(x), (), ()
        mixed, fresh = self.attention(seen, span, past.attention)
        if self.beside is not None:
            recalled, beside = self.beside(seen, span, past.beside)
            mixed = mixed + recalled
        x = (x + mixed)[:, :, : x.shape[2] - self.drop]
        seen = self.mlp_norm(x)
        if self.feed is None:
            x = x + self.out(gated(self.mlp(seen)))
        else:
            recalled, feed = self.feed(seen, span, past.feed)
            x = x + recalled
        for part in self.chain:
            x = part(x)
        return x, Kept(fresh, beside, feed)

    def keep(self, past: Kept, fresh: Kept, slots: Tensor) -> Kept:
        """What is kept after a pass that gave `fresh`, its last frames in `slots` (B, K)."""
        parts = zip((self.attention, self.beside, self.feed), past, fresh, strict=True)
        return Kept(*(() if p is None else p.keep(old, new, slots) for p, old, new in parts))


class Transformer(nn.Module):
    """Frames of at most `tokens` tokens.

    mask (N, N) bool: token i of a frame may read token j; drop: so many of the last tokens have
    no output. A pass may leave out the last tokens of its frames where no other reads them.
    """

    among: Tensor

    def __init__(self, trunk: Trunk, tokens: int, mask: Tensor | None = None, drop: int = 0):
        super().__init__()
        self.tokens, self.context = tokens, trunk.context
        self.rotary = Rotary(trunk.width // trunk.heads, trunk.base)
        attend: Attend = Capped(trunk.cap) if trunk.cap else fused
        last = trunk.layers
        self.layers = nn.ModuleList(
            Layer(trunk, i % trunk.every == 0, attend, drop if i == last else 0)
            for i in range(1, last + 1)
        )
        self.norm = RMSNorm(trunk.width)
        everyone = torch.ones(tokens, tokens, dtype=torch.bool)
        self.register_buffer("among", everyone if mask is None else mask, persistent=False)

    def initial(self, batch: int) -> Context:
        """The context of `batch` rows before their first frame."""
        zeros = self.norm.weight.new_zeros(batch, dtype=torch.int64)
        layers = tuple(layer.initial(batch, self.tokens) for layer in self._layers())
        return Context(zeros, zeros, layers)

    def forward(self, x: Tensor, first: Tensor | None = None) -> Tensor:
        """Whole sequences x (B, T, N, D) from nothing; first (B, T) bool -> (B, T, N - drop, D)."""
        frame = torch.arange(x.shape[1], device=x.device)
        seen, start = frame[None], torch.zeros_like(frame)[None]
        if first is None:
            first = start.bool().expand(len(x), -1)
        else:
            start = latest(first, seen, start[:, :1])
        span = self._span(x, seen, self._visible(seen, seen, start), first)
        return self._run(x, span, (Kept(),) * len(self.layers))[0]

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
        parts = zip(self._layers(), context.layers, fresh, strict=True)
        layers = tuple(layer.keep(past, new, slots) for layer, past, new in parts)
        return y, Context(frame[:, -1] + 1, start[:, -1], layers)

    def _layers(self) -> list[Layer]:
        return cast("list[Layer]", list(self.layers))

    def _run(self, x: Tensor, span: Span, past: tuple[Kept, ...]) -> tuple[Tensor, list[Kept]]:
        fresh: list[Kept] = []
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
        if first is None:
            first = torch.zeros_like(frame, dtype=torch.bool)
        else:
            start = latest(first, frame, context.start[:, None])
        newest = context.seen[:, None] - 1
        slot = torch.arange(self.context, device=x.device)
        stored = newest - (newest - slot) % self.context  # below zero: not written yet
        mask = self._visible(torch.cat([stored, frame], 1), frame, start)
        return self._span(x, frame, mask, first), frame, start

    def _visible(self, key: Tensor, frame: Tensor, start: Tensor) -> Tensor:
        """Whether frames (B, T) read keys (B, S) of the frames of these numbers: (B, T, S)."""
        key, frame = key[:, None], frame[:, :, None]
        return (key <= frame) & (key > frame - self.context) & (key >= start[:, :, None])

    def _span(self, x: Tensor, frame: Tensor, mask: Tensor, first: Tensor) -> Span:
        count = x.shape[2]
        place = self.rotary(torch.arange(count, device=x.device), x)
        time = Rotation(*(part[:, None, None] for part in self.rotary(frame, x)))
        among = barrier(self.among[:count, :count], x)[None, None, None]
        return Span(place, among, time, barrier(mask, x)[:, None, None], first)


def stack(model: nn.Module, trained: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Take a trained model's weights into one that has more parts, which are silent at first.

    What may be new are memories beside attention, and networks in chains: the function stays what
    it was, bit for bit, and the names returned, those of the new parameters, are for levels of
    their own. Raises ValueError for anything else that one of the two lacks.
    """
    new = tuple(model.state_dict().keys() - trained.keys())
    loud = [name for name in new if not re.search(r"layers\.\d+\.(beside|chain)\.", name)]
    lost = trained.keys() - model.state_dict().keys()
    if loud or lost:
        raise ValueError(f"no room for {sorted(lost)}" if lost else f"not silent: {sorted(loud)}")
    model.load_state_dict(trained, strict=False)
    return tuple(name for name, _ in model.named_parameters() if name in new)


def gated(x: Tensor) -> Tensor:
    """x (..., 2 n) -> silu of its first half times the second."""
    gate, value = x.chunk(2, -1)
    return F.silu(gate) * value


def hidden_units(width: int) -> int:
    """Of a feed-forward network with a gate, as many as make it as large as one of 4 widths."""
    return (8 * width // 3 + 7) // 8 * 8


def barrier(mask: Tensor, like: Tensor) -> Tensor:
    """What a mask adds to logits: zero where it is set, minus infinity elsewhere."""
    return like.new_zeros(()).where(mask, -math.inf)


def latest(first: Tensor, frame: Tensor, start: Tensor) -> Tensor:
    """The earliest frame that each may read, (B, T): `start` (B, 1), or its row's last first."""
    return torch.where(first, frame, start).cummax(1).values
