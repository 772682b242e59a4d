"""The mathematics of linear memories: one fused step, and a chunk of steps in parallel.

`step` is one autograd node with a backward written by hand: in a recurrent loop on a CPU the
count of small operations is the cost. The gate rides on the copy of the weights that an update
without side effects makes anyway, so the state is the weights themselves.
`chunk` is the WY form of the delta rule (2406.06484; gated: 2412.06464): inside a chunk the pairs
that are written solve one triangular system. A reset is a decay to zero.

Shapes: B users, H heads, N = B * H, C steps of a chunk, D width of a head. z holds for each head
[query D, key D, value D, beta, alpha], raw; alpha only where the memory fades.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# torch.linalg and autograd.Function carry no types
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

vecdot: Callable[[Tensor, Tensor], Tensor] = torch.linalg.vecdot

EPSILON = 1e-6  # added to squared norms: a zero key has a bounded gradient


Result: TypeAlias = tuple[Tensor, Tensor, Tensor]  # read, weights, error


class Parts(NamedTuple):
    """What a step reads off z; leading axes as those of z."""

    qk: Tensor  # (..., 2, D) unit query and key
    scale: Tensor  # (..., 2, 1) what made them so
    value: Tensor  # (..., D)
    gates: Tensor  # (..., 1 or 2) beta, alpha in (0, 1)


def parts(z: Tensor, dim: int) -> Parts:
    """The parts of z (..., 3 D + gates)."""
    qk, scale = unit(z[..., : 2 * dim].view(*z.shape[:-1], 2, dim))
    value, gates = z[..., 2 * dim : 3 * dim], z[..., 3 * dim :]
    return Parts(qk, scale, value, gates.sigmoid())


def unit(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of x (..., D) with length one, and what they were multiplied by, (..., 1)."""
    scale = vecdot(x, x).add_(EPSILON).rsqrt_().unsqueeze(-1)
    return x * scale, scale


def exact(z: Tensor) -> AbstractContextManager[object]:
    """Where autocast does not reach: what is written must not be rounded."""
    kind = z.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def step(z: Tensor, weights: Tensor, start: Tensor, reset: Tensor | None, erase: int) -> Result:
    """Reset, write, read: z (B, H, P), weights (B, H, D, D), start (H, D, D), reset (B,) bool.

    start may be (G, H, D, D), one for each of G equal parts of the users.

    `erase` is 1 where what the key recalled is taken out of the value that is written, 0 where it
    stays. Gives read (B, H, D), weights, and error (B, H, D): value minus recalled, no gradient.
    """
    # a compiler fuses by itself; vmap and grad of torch.func take no node written by hand
    if torch.compiler.is_compiling() or transformed(z) or transformed(weights):
        return plain(z, weights, start, reset, erase)
    result: Result = Fused.apply(z, weights, start, reset, erase)
    return result


def rows(start: Tensor, users: int) -> Tensor:
    """start (H, D, D), or (G, H, D, D) for G equal parts of the users, for each user."""
    if start.ndim == 3:
        return start.expand(users, -1, -1, -1)
    return start.repeat_interleave(users // len(start), 0)


def transformed(x: Tensor) -> bool:
    """Whether vmap or grad of torch.func is at work on x."""
    return torch.func.debug_unwrap(x, recurse=False) is not x


def plain(z: Tensor, weights: Tensor, start: Tensor, reset: Tensor | None, erase: int) -> Result:
    """`step` as the papers write it."""
    if reset is not None:
        weights = torch.where(reset[:, None, None, None], rows(start, len(weights)), weights)
    p = parts(z, weights.shape[-1])
    beta, alpha = p.gates[..., :1], p.gates[..., 1:].prod(-1, keepdim=True)
    q, k = p.qk[..., :1, :], p.qk[..., 1:, :]  # (B, H, 1, D)
    weights = alpha.unsqueeze(-1) * weights
    error = p.value - (k @ weights).squeeze(-2)
    write = beta * (error if erase else p.value)
    weights = weights + k.mT * write.unsqueeze(-2)
    return (q @ weights).squeeze(-2), weights, error.detach()


class Fused(torch.autograd.Function):
    """`step` as one node of the graph."""

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, weights: Tensor, start: Tensor, reset: Tensor | None, erase: int
    ) -> Result:
        dim = weights.shape[-1]
        begun = weights
        if reset is not None:
            begun = torch.where(reset[:, None, None, None], rows(start, len(weights)), weights)
        begun = begun.reshape(-1, dim, dim)
        p = parts(z.reshape(len(begun), -1), dim)
        q, k = p.qk.unbind(1)
        reads, s = torch.bmm(p.qk, begun), begun
        if p.gates.shape[1] == 2:
            alpha = p.gates[:, 1:].unsqueeze(2)
            reads, s = reads * alpha, begun * alpha
        read, recalled = reads.unbind(1)
        error = p.value - recalled
        write = p.gates[:, :1] * (error if erase else p.value)
        overlap = vecdot(q, k).unsqueeze(1)
        # what is read after the write, from what was read before it
        read = torch.addcmul(read, overlap, write).view(*z.shape[:2], dim)
        new = torch.addcmul(s, k.unsqueeze(2), write.unsqueeze(1)).view(weights.shape)
        error = error.view(read.shape)
        ctx.erase, ctx.groups = erase, len(start) if start.ndim == 4 else 0
        ctx.mark_non_differentiable(error)
        ctx.save_for_backward(reset, begun, p.qk, p.scale, p.gates, write, overlap)
        return read, new, error

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        g_read, g_new, _ = grad_outputs
        reset, *saved = ctx.saved_tensors
        g_z, g_begun = _pull_back(saved, g_read, g_new, ctx.erase)
        g_z, g_begun = g_z.view(*g_read.shape[:2], -1), g_begun.view(g_new.shape)
        if reset is None:
            return g_z, g_begun, None, None, None
        mask = reset.to(g_z.dtype)
        if ctx.groups:
            parted = g_begun.view(ctx.groups, -1, g_begun[0].numel())
            g_start = torch.bmm(mask.view(ctx.groups, 1, -1), parted)
            g_start = g_start.view(ctx.groups, *g_new.shape[1:])
        else:
            g_start = torch.mv(g_begun.flatten(1).t(), mask).view(g_new.shape[1:])
        return g_z, g_begun * (1 - mask)[:, None, None, None], g_start, None, None


def _pull_back(
    saved: list[Tensor], g_read: Tensor, g_new: Tensor, erase: int
) -> tuple[Tensor, Tensor]:
    """Gradients of z (N, P) and of the weights (N, D, D) that the step began from."""
    begun, qk, scale, gates, write, overlap = saved
    g_read, g_new = g_read.reshape(write.shape), g_new.reshape(begun.shape)
    k, beta = qk[:, 1:], gates[:, :1]
    g_write = torch.addcmul(torch.bmm(k, g_new).squeeze(1), overlap, g_read)
    g_value = beta * g_write
    g_reads = torch.stack([g_read, g_value * -erase], 1)
    g_begun = g_new
    if gates.shape[1] == 2:
        alpha = gates[:, 1:].unsqueeze(2)
        g_reads, g_begun = g_reads * alpha, g_new * alpha
    g_begun = torch.baddbmm(g_begun, qk.mT, g_reads)
    # query and key: through the reads and through q . k; the key through what it wrote, too
    g_qk = torch.baddbmm(vecdot(g_read, write)[:, None, None] * qk.flip(1), g_reads, begun.mT)
    g_qk[:, 1:].add_(torch.bmm(write.unsqueeze(1), g_new.mT))
    g_raw = torch.addcmul(g_qk, qk, vecdot(qk, g_qk).unsqueeze(2), value=-1) * scale
    # both gates are sigmoids: beta scales the write, alpha the weights that the step began from
    g_gates = vecdot(g_write, write).unsqueeze(1)
    if gates.shape[1] == 2:
        g_alpha = (begun * g_begun).sum((1, 2)).unsqueeze(1)
        g_gates = torch.cat([g_gates, g_alpha], 1)
    return torch.cat([g_raw.flatten(1), g_value, g_gates * (1 - gates)], 1), g_begun


def chunk(
    p: Parts, weights: Tensor, start: Tensor, resets: Tensor, erase: int
) -> tuple[Tensor, Tensor, Tensor]:
    """C steps of `step` at once: p (B, H, C, ...), resets (B, C) -> reads, weights, errors."""
    q, k = p.qk.unbind(-2)
    beta = p.gates[..., :1]
    decay, kept, fresh = _decays(p.gates[..., 1:], resets)
    earlier = (k @ k.mT * decay).tril(-1)  # (B, H, C, C): what the pair of s left for the key of t
    wanted = p.value - erase * _recall(k, weights, start, kept, fresh)
    system = torch.eye(k.shape[-2], dtype=k.dtype, device=k.device) + erase * beta * earlier
    writes: Tensor = torch.linalg.solve_triangular(
        system, beta * wanted, upper=False, unitriangular=True
    )
    reads = _recall(q, weights, start, kept, fresh) + (q @ k.mT * decay) @ writes
    errors = p.value - _recall(k, weights, start, kept, fresh) - earlier @ writes
    left = decay[..., -1, :].unsqueeze(-1) * k
    new = _fade(kept[..., -1:, :], weights) + fresh[..., -1:, :] * start + left.mT @ writes
    return reads, new, errors


def _recall(x: Tensor, weights: Tensor, start: Tensor, kept: Tensor, fresh: Tensor) -> Tensor:
    """What the weights before the chunk, or `start` after a reset, answer to x (B, H, C, D)."""
    return _fade(kept, x @ weights) + fresh * (x @ start)


def _fade(kept: Tensor, x: Tensor) -> Tensor:
    """kept * x; what a reset has cut off is zero even where x is not finite."""
    return torch.where(kept > 0, kept * x, 0.0)


def _decays(alpha: Tensor, resets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What is left at t of the pair of s (B, H, C, C), of the weights before the chunk, of `start`.

    Sums of log alpha over s < j <= t, each summed on its own: differences of one running sum
    would lose the small ones behind a large one.
    """
    steps = resets.shape[1]
    log = alpha.clamp_min(torch.finfo(alpha.dtype).tiny).log().sum(-1)  # (B, H, C)
    cut = log.masked_fill(resets.unsqueeze(1), -torch.inf)
    below = torch.ones(steps, steps, dtype=torch.bool, device=log.device).tril(-1)
    between = torch.where(below, cut.unsqueeze(-1), 0.0).cumsum(-2)
    decay = between.exp().tril()
    kept = cut.cumsum(-1).exp().unsqueeze(-1)
    fresh = decay @ (log.exp() * resets.unsqueeze(1)).unsqueeze(-1)
    return decay, kept, fresh
