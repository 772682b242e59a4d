"""One step of a two-layer memory as one node of the graph, with a backward by hand.

The step of nested/deep.py without chunks, momentum and norm, which is the one that recurrent loops
make most: there the count of small operations is the cost. `NeuralMemory.learn` is its readable
twin. `u` are the steps of the two layers' outputs, minus rate times what comes back to them.

Shapes: B users, H heads, N = B * H, D width of a head, E hidden width.
"""

from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nested import linear
from nested.inner import Weights

# autograd.Function carries no types
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

Result: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor]  # read, first, second, error
Saved: TypeAlias = tuple[Tensor, ...]


class Step(torch.autograd.Function):
    """z (B, H, P), first (B, H, D, E), second (B, H, E, D), their starts, reset (B,) or None.

    `rate` bounds the step, `residual` is 1 where the network answers x + f(x) and 0 where f(x).
    """

    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        first: Tensor,
        second: Tensor,
        start_first: Tensor,
        start_second: Tensor,
        reset: Tensor | None,
        rate: float,
        residual: int,
    ) -> Result:
        starts = (start_first, start_second)
        begun: list[Tensor] = [first, second]
        if reset is not None:
            mask = reset[:, None, None, None]
            begun = [torch.where(mask, w0, w) for w0, w in zip(starts, begun, strict=True)]
        a1, a2 = (w.reshape(-1, *w.shape[2:]) for w in begun)
        p = linear.parts(z.reshape(len(a1), -1), first.shape[2])
        q, k = p.qk[:, :1], p.qk[:, 1:]
        h = torch.bmm(k, a1).tanh_()
        error = torch.bmm(h, a2).sub_(p.value.unsqueeze(1))
        if residual:
            error.add_(k)
        u2 = error * (p.gates[:, :1].unsqueeze(2) * -rate)
        dh = torch.bmm(u2, a2.mT)
        u1 = dh * torch.addcmul(torch.ones_like(h), h, h, value=-1)
        if p.gates.shape[1] == 2:
            alpha = p.gates[:, 1].view(*z.shape[:2], 1, 1)
            begun = [torch.lerp(w0, w, alpha) for w0, w in zip(starts, begun, strict=True)]
        n1, n2 = (w.reshape(-1, *w.shape[2:]) for w in begun)
        n1 = torch.addcmul(n1, k.mT, u1)
        n2 = torch.addcmul(n2, h.mT, u2)
        hq = torch.bmm(q, n1).tanh_()
        read = torch.bmm(hq, n2)
        if residual:
            read.add_(q)
        shape = (*z.shape[:2], first.shape[2])
        new = n1.view(first.shape), n2.view(second.shape)
        ctx.rate, ctx.residual, ctx.heads = rate, residual, z.shape[1]
        held = (p.qk, p.scale, p.gates, h, error, u1, u2, dh, hq)
        ctx.save_for_backward(reset, *starts, a1, a2, *new, *held)
        error = error.view(shape).clone()
        ctx.mark_non_differentiable(error)
        return read.view(shape), *new, error

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        g_read, g1, g2, _ = grad_outputs
        reset, s1, s2, a1, a2, *saved = ctx.saved_tensors
        g_read = g_read.reshape(len(a1), 1, -1)
        grown = (g1.reshape(a1.shape), g2.reshape(a2.shape))
        g_z, g_a1, g_a2, *news = _back((a1, a2, *saved), g_read, grown, ctx.rate, ctx.residual)
        gates = saved[4]
        g_s1, g_s2 = torch.zeros_like(s1), torch.zeros_like(s2)
        if gates.shape[1] == 2:
            alpha = gates[:, 1:]
            g_alpha = torch.zeros_like(alpha)
            lent = (1 - alpha).view(-1, ctx.heads)
            for g, a, s, g_s in zip(news, (a1, a2), (s1, s2), (g_s1, g_s2), strict=True):
                g_alpha += linear.vecdot(g.flatten(1), a.flatten(1)).unsqueeze(1)
                g_alpha -= _per_head(g, s, ctx.heads)
                g_s += _over_users(lent, g, s)
            g_z = torch.cat([g_z, g_alpha * alpha * (1 - alpha)], 1)
        shapes = g1.shape, g2.shape
        g_z = g_z.view(len(g1), ctx.heads, -1)
        if reset is not None:
            mask = reset.to(g_z.dtype)
            gone = mask[:, None].expand(-1, ctx.heads)
            g_s1, g_s2 = g_s1 + _over_users(gone, g_a1, s1), g_s2 + _over_users(gone, g_a2, s2)
            left = (1 - mask)[:, None, None, None]
            g_w1, g_w2 = (g.view(s) * left for g, s in zip((g_a1, g_a2), shapes, strict=True))
        else:
            g_w1, g_w2 = (g.view(s) for g, s in zip((g_a1, g_a2), shapes, strict=True))
        return g_z, g_w1, g_w2, g_s1, g_s2, None, None, None


def step(
    z: Tensor, weights: Weights, start: Weights, reset: Tensor | None, rate: float, residual: int
) -> Result:
    """`Step` of weights and start, two layers each: read (B, H, D), the layers, error (B, H, D)."""
    result: Result = Step.apply(z, *weights, *start, reset, rate, residual)
    return result


def _back(
    saved: Saved, g_read: Tensor, grown: tuple[Tensor, Tensor], rate: float, residual: int
) -> Saved:
    """Gradients of z but for alpha, of the weights before, and of those after with the read."""
    a1, a2, n1, n2, qk, scale, gates, h, error, u1, u2, dh, hq = saved
    n1, n2, alpha = n1.reshape(a1.shape), n2.reshape(a2.shape), gates[:, 1:].unsqueeze(2)
    q, k, theta = qk[:, :1], qk[:, 1:], gates[:, :1].unsqueeze(2) * -rate
    slope = torch.addcmul(torch.ones_like(h), h, h, value=-1)
    g_zq = torch.bmm(g_read, n2.mT) * torch.addcmul(torch.ones_like(hq), hq, hq, value=-1)
    g2 = torch.addcmul(grown[1], hq.mT, g_read)
    g1 = torch.addcmul(grown[0], q.mT, g_zq)
    g_u1 = torch.bmm(k, g1)
    g_dh = g_u1 * slope
    g_u2 = torch.baddbmm(torch.bmm(h, g2), g_dh, a2)
    g_error = theta * g_u2
    g_h = torch.baddbmm(torch.bmm(u2, g2.mT), g_error, a2.mT)
    g_zk = torch.addcmul(g_h, g_u1 * dh, h, value=-2) * slope
    g_q = torch.bmm(g_zq, n1.mT)
    g_k = torch.baddbmm(torch.bmm(u1, g1.mT), g_zk, a1.mT)
    if residual:
        g_q, g_k = g_q + g_read, g_k + g_error
    g_theta = linear.vecdot(g_u2, error) * (-rate * gates[:, :1] * (1 - gates[:, :1]))
    kept1, kept2 = (g1 * alpha, g2 * alpha) if alpha.shape[1] else (g1, g2)
    g_a1 = torch.addcmul(kept1, k.mT, g_zk)
    g_a2 = torch.baddbmm(kept2, torch.cat([g_dh, h], 1).mT, torch.cat([u2, g_error], 1))
    g_qk = torch.cat([g_q, g_k], 1)
    g_raw = torch.addcmul(g_qk, qk, linear.vecdot(qk, g_qk).unsqueeze(2), value=-1) * scale
    g_z = torch.cat([g_raw.flatten(1), -g_error.squeeze(1), g_theta], 1)
    return g_z, g_a1, g_a2, g1, g2


def _over_users(weight: Tensor, g: Tensor, like: Tensor) -> Tensor:
    """Sum over users of weight (B, H) times g (N, ...): the shape of `like`, (H, ...)."""
    heads = len(like)
    rows = g.view(-1, heads, like[0].numel()).transpose(0, 1)  # (H, B, ...)
    return torch.bmm(weight.t().unsqueeze(1), rows).view(like.shape)


def _per_head(g: Tensor, s: Tensor, heads: int) -> Tensor:
    """Inner product of each row of g (N, ...) with its head's s (H, ...): (N, 1)."""
    rows = g.view(-1, heads, s[0].numel()).transpose(0, 1)
    return torch.bmm(rows, s.flatten(1).unsqueeze(2)).squeeze(2).t().reshape(-1, 1)
