"""Memories written in place: many users at once, no gradients, few passes over their weights.

A linear memory reads once for query and key and writes once; what the query brings back after
the write follows from what it brought before. A gate costs no pass: the weights are kept as
`scale * held`, in a network as W0 + scale * held, one scale a user and head, and a user is
multiplied out only when its scale is small.

Storage in bfloat16 halves the bytes. Arithmetic stays in float32, a block of users at a time, and
what is stored is rounded up or down at random, by how near it is: small writes survive on
average, where rounding to nearest would lose each of them. (A compensation term would cost the
bytes that were saved.) All users share a step's noise, so none depends on who else is there.

Shapes: N = users * heads, D and E widths of a layer; parts as in nested/linear.py.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from nested import inner, linear
from nested.inner import End, Weights
from nested.linear import Parts

SMALL = 2.0**-40  # a scale below this is multiplied out
BLOCK = 64  # users whose float32 copies are worked on at a time, in the cache
NOISE = 1 << 16  # the bits of a float32 that a bfloat16 has not


class Held(NamedTuple):
    """Weights that are changed where they stand; users first."""

    layers: Weights  # (B, H, D, E), in the storage's type
    scale: Tensor  # (B, H, 1): the weights are scale * layers, plus the start in a network
    error: Tensor  # (B, H, D), as in the state

    @property
    def surprise(self) -> Tensor:
        """Squared error before the last write, mean over heads and values: (B,)."""
        return self.error.square().flatten(1).mean(1)


class Linear(Protocol):
    """What writes and reads one pair of linear memories: see `linear_`."""

    def __call__(
        self, layers: Weights, scale: Tensor, p: Parts, *, erase: int
    ) -> tuple[Tensor, Tensor]: ...


Step: TypeAlias = Callable[[Weights, Tensor, Parts], tuple[Tensor, Tensor]]


def hold(layers: Weights, error: Tensor, storage: torch.dtype) -> Held:
    """Copies of a state's layers (B, H, D, E), to be changed in place."""
    if storage not in (torch.float32, torch.float64, torch.bfloat16):
        raise ValueError(f"storage is {storage}: float32, float64 or bfloat16")
    copies = tuple(w.detach().to(storage, copy=True).contiguous() for w in layers)
    scale = torch.ones(*error.shape[:2], 1, dtype=error.dtype, device=error.device)
    return Held(copies, scale, error.detach().clone())


def forget_(held: Held, start: Weights, reset: Tensor) -> None:
    """Rows of `reset` (B,) go back to start (H, D, E); no other row is touched."""
    rows = reset.nonzero().squeeze(1)
    if len(rows):
        for w, w0 in zip(held.layers, start, strict=True):
            w[rows] = w0.detach().to(w.dtype)
        held.scale[rows] = 1.0
        held.error[rows] = 0.0


def linear_(layers: Weights, scale: Tensor, p: Parts, *, erase: int) -> tuple[Tensor, Tensor]:
    """Write and read one pair: layers ((N, D, D),), scale (N, 1) -> read (N, D), error (N, D)."""
    (w,) = layers
    faded = scale * p.gates[:, 1:].prod(1, keepdim=True)
    read, recalled = (torch.bmm(p.qk, w) * faded.unsqueeze(2)).unbind(1)
    _fade_(layers, scale, p.gates[:, 1:])
    error = p.value - recalled
    write = p.gates[:, :1] * (error if erase else p.value)
    overlap = linear.vecdot(p.qk[:, 0], p.qk[:, 1]).unsqueeze(1)
    w.baddbmm_(p.qk[:, 1:].mT, (write / scale).unsqueeze(1))
    return torch.addcmul(read, overlap, write), error


def network_(
    layers: Weights, scale: Tensor, p: Parts, start: Weights, end: End, rate: float
) -> tuple[Tensor, Tensor]:
    """`linear_` for two layers (N, D, E), (N, E, D) that are displacements from start (H, ...)."""
    (w1, w2), q, k = layers, p.qk[:, :1], p.qk[:, 1:]
    c = scale.unsqueeze(2).clone()
    slow, fast = _shared(p.qk, start[0]), torch.bmm(p.qk, w1)
    h = torch.addcmul(slow[:, 1:], c, fast[:, 1:]).tanh_()
    f = torch.addcmul(_shared(h, start[1]), c, torch.bmm(h, w2))
    error = end(k, f) - p.value.unsqueeze(1)
    back = end.back(f, error) * (p.gates[:, :1].unsqueeze(2) * -rate)
    deep = torch.addcmul(_shared(back, start[1].mT), c, torch.bmm(back, w2.mT))
    deep = inner.aten.tanh_backward(deep, h)
    _fade_(layers, scale, p.gates[:, 1:])
    w1.baddbmm_(k.mT, deep / scale.unsqueeze(2))
    w2.baddbmm_(h.mT, back / scale.unsqueeze(2))
    faded = c * p.gates[:, 1:].prod(1, keepdim=True).unsqueeze(2)
    asked = torch.addcmul(slow[:, :1], faded, fast[:, :1])
    asked = torch.addcmul(asked, linear.vecdot(q, k).unsqueeze(2), deep).tanh_()
    f = torch.addcmul(_shared(asked, start[1]), scale.unsqueeze(2), torch.bmm(asked, w2))
    return end(q, f).squeeze(1), error.squeeze(1)


def _shared(x: Tensor, w: Tensor) -> Tensor:
    """x (N, C, D) times w (H, D, E), each row with its head's: (N, C, E)."""
    heads, rows = len(w), x.shape[1]
    if heads == 1:
        return torch.matmul(x, w[0])
    x = x.reshape(-1, heads, rows, x.shape[2]).transpose(0, 1).flatten(1, 2)
    y = torch.bmm(x, w).view(heads, -1, rows, w.shape[2])
    return y.transpose(0, 1).reshape(-1, rows, w.shape[2])


def _fade_(layers: Weights, scale: Tensor, alpha: Tensor) -> None:
    """Weights times alpha (N, 0 or 1), by way of their scale (N, 1)."""
    if not alpha.shape[1]:
        return
    scale.mul_(alpha)
    rows = (scale < SMALL).squeeze(1).nonzero().squeeze(1)
    if len(rows):
        for w in layers:
            w[rows] = w[rows] * scale[rows].unsqueeze(2).to(w.dtype)
        scale[rows] = 1.0


def blocks(held: Held, generator: torch.Generator | None) -> Iterator[tuple[slice, Weights]]:
    """Slices of the N axis with float32 layers to change; what is changed is stored behind them."""
    layers = tuple(w.flatten(0, 1) for w in held.layers)
    if layers[0].dtype != torch.bfloat16:
        yield slice(None), layers
        return
    if generator is None:
        raise ValueError("storage in bfloat16 rounds at random: pass a generator")
    noise = [torch.randint(NOISE, w.shape[1:], generator=generator, dtype=torch.int32,
                           device=w.device) for w in layers]  # fmt: skip
    block = -(-BLOCK // held.layers[0].shape[1]) * held.layers[0].shape[1]  # whole users
    for i in range(0, len(layers[0]), block):
        rows = slice(i, i + block)
        copies = tuple(w[rows].float() for w in layers)
        yield rows, copies
        for w, copy, bits in zip(layers, copies, noise, strict=True):
            round_(w[rows], copy, bits)


def round_(stored: Tensor, x: Tensor, noise: Tensor) -> None:
    """`stored`, a bfloat16, becomes x rounded up or down by noise in [0, 2^16); x is used up."""
    bits = x.view(torch.int32).add_(noise).bitwise_and_(-NOISE)
    stored.copy_(bits.view(torch.float32))


def step_(held: Held, z: Tensor, generator: torch.Generator | None, step: Step) -> Tensor:
    """One pair of every user: z (B, H, P) raw -> what the query brings back (B, H, D)."""
    shape = held.error.shape
    p = linear.parts(z.flatten(0, 1), shape[2])
    scale, error = held.scale.flatten(0, 1), held.error.flatten(0, 1)
    read = torch.empty_like(error)
    for rows, layers in blocks(held, generator):
        mine = Parts(*(x[rows] for x in p))
        read[rows], error[rows] = step(layers, scale[rows], mine)
    return read.view(shape)
