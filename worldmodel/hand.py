"""The recurrent step by hand: what it keeps for the way back, and the way back.

On a CPU a time loop costs as many small operations as it makes. `enter` and `leave` are the step of
cell.py. Whatever of their way back holds no gradient is worked out first, as slopes, for one step
or for all at once; then a step back costs its products and a few multiplications, and the gradients
of the weights are one product each over all of time. tape.py makes autograd's nodes of this.

Shapes: those of cell.py. R rows are those of one step, B, or of all of them, B * T.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from worldmodel.cell import Draw, Weights, block_product
from worldmodel.heads import evened, sample, softmax
from worldmodel.nets import addmm, epsilon_of, inverse_rms, matmul, outer, sum_rows, tanh_
from worldmodel.script import scripted

aten: Any = torch.ops.aten


class Normed(NamedTuple):
    """RMS norm and scale of rows, before a SiLU: (R, ..., n), but the factor (R, ..., 1)."""

    normal: Tensor
    factor: Tensor  # what the rows were multiplied by
    scaled: Tensor


class Slope(NamedTuple):
    """The way back through norm, scale and SiLU: dx = along dy + across (beside . dy)."""

    along: Tensor
    beside: Tensor
    across: Tensor


class Entered(NamedTuple):
    """What `enter` keeps."""

    deter: Tensor  # (R, D), zero where an episode starts
    stoch: Tensor  # (R, S * C)
    embedded: Normed  # (R, 2, h)

    @classmethod
    def of(cls, kept: Sequence[Tensor]) -> Self:
        """From the list that `enter` makes."""
        deter, stoch, *embedded = kept
        return cls(deter, stoch, Normed(*embedded))


class Left(NamedTuple):
    """What `leave` keeps."""

    deter: Tensor  # (R, D)
    x: Tensor  # (R, 2 h)
    mixed: Normed  # (R, D)
    hidden: Tensor  # (R, D)
    reset: Tensor  # (R, K, n), and the next three
    inner: Tensor
    candidate: Tensor
    update: Tensor
    new: Tensor  # (R, D)
    seen: Normed  # (R, h)
    read: Tensor  # (R, h)
    soft: Tensor  # (R, S, C)
    recalled: Tensor | None  # (R, h)

    @classmethod
    def of(cls, kept: Sequence[Tensor]) -> Self:
        """From the list that `leave` makes."""
        mixed, seen = Normed(*kept[2:5]), Normed(*kept[11:14])
        recalled = kept[16] if len(kept) > 16 else None
        hidden, reset, inner, candidate, update, new = kept[5:11]
        gating = (reset, inner, candidate, update)
        return cls(
            kept[0], kept[1], mixed, hidden, *gating, new, seen, kept[14], kept[15], recalled
        )


class Slopes(NamedTuple):
    """The way back through `leave`, as far as it holds no gradient."""

    mixed: Slope
    gates: Tensor  # (R, K, 3, n)
    kept: Tensor  # (R, K, n)
    seen: Slope
    soft: Tensor  # (R, S, C)


class EnterGrads(NamedTuple):
    """Gradients that the weights of `enter` are made of."""

    linear: Tensor  # (R, 2, h)
    x: Tensor  # (R, 2, h)


class LeaveGrads(NamedTuple):
    """Gradients that the weights of `leave` are made of."""

    mixed: Tensor  # (R, D)
    hidden: Tensor  # (R, D)
    gates: Tensor  # (R, K, 3 n)
    seen: Tensor  # (R, h)
    read: Tensor  # (R, h)
    logits: Tensor  # (R, S * C)


# ---- one step, forward ----------------------------------------------------------------------


def spread(w: Weights, rows: int) -> Weights:
    """w as it broadcasts over so many rows; the bias (K, 1, 3 n) holds the update gates' -1."""
    n = w.groups
    bias = w.gates_bias.unflatten(-1, (w.blocks, 1, 3, -1)).clone()
    bias[..., 2, :] -= 1
    wide = (w.scale_in, w.mix_scale, w.post_scale)
    if n:
        wide = tuple(x.repeat_interleave(rows // n, 0) for x in wide)
    scale_in, mix_scale, post_scale = wide
    return w._replace(
        scale_in=scale_in, mix_scale=mix_scale, post_scale=post_scale, gates_bias=bias.flatten(-2)
    )


def normed(x: Tensor, scale: Tensor, epsilon: Tensor | None = None) -> list[Tensor]:
    """x over its root mean square, what made it so, and the first times its scale: a `Normed`."""
    factor = inverse_rms(x, epsilon)
    normal = x * factor
    return [normal, factor, normal * scale]


def blocks(w: Weights, x: Tensor) -> Tensor:
    """x (R, K * n) as (R, K, n)."""
    return x.view(x.shape[0], w.gates.shape[-3], -1)


def by_rows(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`block_product` of x (R, K, in) -> (R, K, out), whose rows may lie apart."""
    if weight.ndim == 3:
        return block_product(x.transpose(0, 1), weight, bias).transpose(0, 1)
    rows = x.reshape(weight.shape[0], -1, x.shape[1], x.shape[2]).transpose(1, 2)
    return block_product(rows, weight, bias).transpose(1, 2).flatten(0, 1)


def enter(
    w: Weights, deter: Tensor, stoch: Tensor, keep: Tensor, epsilon: Tensor | None = None
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """As cell.enter; and what is kept, for `Entered.of`."""
    deter, stoch = deter * keep, stoch * keep
    a, b = addmm(w.deter_bias, deter, w.deter_in), addmm(w.stoch_bias, stoch, w.stoch_in)
    embedded = normed(torch.stack([a, b], 1), w.scale_in, epsilon)
    kept = [deter, stoch]
    kept += embedded
    return deter, F.silu(embedded[2]).flatten(1), kept


def leave(
    w: Weights,
    draw: Draw,
    deter: Tensor,
    x: Tensor,
    recalled: Tensor | None,
    bias: Tensor,
    tokens: Tensor,
    noise: Tensor,
    epsilon: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """As cell.recur, then cell.infer but for the gradient of the draw; and, for `Left.of`, kept."""
    mixed = addmm(bias, x, w.mix_state)
    blocks(w, mixed).add_(by_rows(blocks(w, deter), w.mix_deter))
    if recalled is not None:
        mixed = addmm(mixed, recalled, w.mix_memory)
    mix = normed(mixed, w.mix_scale, epsilon)
    hidden = F.silu(mix[2])
    gates = by_rows(blocks(w, hidden), w.gates, w.gates_bias)
    reset, inner, update = gates.unflatten(-1, (3, -1)).unbind(-2)
    reset, update = reset.sigmoid_(), update.sigmoid_()
    candidate = tanh_(reset * inner)
    new = torch.empty_like(deter)
    torch.lerp(blocks(w, deter), candidate, update, out=blocks(w, new))
    seen = normed(addmm(tokens, new, w.post_deter), w.post_scale, epsilon)
    read = F.silu(seen[2])
    logits = addmm(w.post_bias, read, w.post_out)
    soft = softmax(logits.view(-1, draw.stoch, draw.classes))
    probs = evened(soft, draw.mix)
    kept = [deter, x]
    kept += mix
    kept += [hidden, reset, inner, candidate, update, new]
    kept += seen
    kept += [read, soft]
    if recalled is not None:
        kept.append(recalled)
    return new, sample(probs, noise), probs, kept


# ---- one step, backward ---------------------------------------------------------------------


def turned(w: Weights) -> Weights:
    """w as the way back multiplies by it: what went into a product comes out of it."""
    return w._replace(
        deter_in=w.deter_in.mT,
        stoch_in=w.stoch_in.mT,
        mix_state=w.mix_state.mT,
        mix_deter=w.mix_deter.mT,
        mix_memory=w.mix_memory.mT,
        gates=w.gates.mT,
        post_deter=w.post_deter.mT,
        post_out=w.post_out.mT,
    )


def slope(x: Normed, scale: Tensor) -> Slope:
    """With n = normal, f = factor, s = silu' scale: dx = f (s dy - n mean(n s dy))."""
    silu = aten.silu_backward(torch.ones_like(x.scaled), x.scaled).mul_(scale)
    across = x.normal * (x.factor / -x.normal.shape[-1])
    return Slope(silu * x.factor, silu.mul_(x.normal), across)


def slopes(w: Weights, left: Left) -> Slopes:
    """Those of a step, or of all steps at once; w as `spread` over the same rows."""
    reset, inner, candidate, update = left.reset, left.inner, left.candidate, left.update
    through = update * (1 - candidate.square())  # into the candidate's tanh
    gates = [
        aten.sigmoid_backward(through * inner, reset),
        through * reset,
        aten.sigmoid_backward(candidate - blocks(w, left.deter), update),
    ]
    return Slopes(
        slope(left.mixed, w.mix_scale),
        torch.stack(gates, 2),
        1 - update,
        slope(left.seen, w.post_scale),
        left.soft,
    )


def down(s: Slope, grad: Tensor) -> Tensor:
    """Gradient of what was normed from that of what came out of the SiLU."""
    share = (grad * s.beside).sum(-1, keepdim=True)
    return torch.addcmul(grad * s.along, s.across, share)


def leave_back(
    w: Weights, s: Slopes, g_new: Tensor, g_soft: Tensor
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Gradients of the old deter and of x, from those of the new deter and of the softmax.

    And those that the weights' are made of: `LeaveGrads`; w as `turned`.
    """
    g_soft = g_soft * s.soft
    g_logits = torch.addcmul(g_soft, s.soft, g_soft.sum(-1, keepdim=True), value=-1).flatten(1)
    g_read = matmul(g_logits, w.post_out)
    g_seen = down(s.seen, g_read)
    g_new = blocks(w, addmm(g_new, g_seen, w.post_deter))
    g_gates = (g_new.unsqueeze(2) * s.gates).flatten(2)
    g_hidden = by_rows(g_gates, w.gates).flatten(1)
    g_mixed = down(s.mixed, g_hidden)
    g_deter = by_rows(blocks(w, g_mixed), w.mix_deter)
    g_deter = torch.addcmul(g_deter, g_new, s.kept).flatten(1)
    grads = [g_mixed, g_hidden, g_gates, g_seen, g_read, g_logits]
    return g_deter, matmul(g_mixed, w.mix_state), grads


def enter_back(
    w: Weights, s: Slope, keep: Tensor, g_deter: Tensor, g_x: Tensor
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Gradients of deter and stoch as they came in; and `EnterGrads`; w as `turned`."""
    g_x = g_x.view(g_x.shape[0], 2, -1)
    g_linear = down(s, g_x)
    a, b = g_linear.unbind(1)
    g_deter = addmm(g_deter, a, w.deter_in).mul_(keep)
    return g_deter, matmul(b, w.stoch_in).mul_(keep), [g_linear, g_x]


# ---- all steps ------------------------------------------------------------------------------
#
# A step is taken out by `select`: to TorchScript x[:, t] is two operations.


@scripted
def filtered(
    w: Weights,
    draw: Draw,
    deter: Tensor,
    stoch: Tensor,
    bias: Tensor,
    tokens: Tensor,
    keep: Tensor,
    noise: Tensor,
) -> tuple[list[list[Tensor]], list[list[Tensor]], list[list[Tensor]]]:
    """All steps without a memory, arguments as those of tape.Filter.

    By step: the state (deter, stoch, probabilities), and what `enter` and `leave` keep.
    """
    states: list[list[Tensor]] = []
    entering: list[list[Tensor]] = []
    leaving: list[list[Tensor]] = []
    epsilon = epsilon_of(deter)
    for t in range(noise.shape[0]):
        deter, x, entered = enter(w, deter, stoch, keep.select(1, t), epsilon)
        rows = (bias.select(1, t), tokens.select(1, t), noise[t])
        deter, drawn, probs, left = leave(w, draw, deter, x, None, *rows, epsilon)
        stoch = drawn.flatten(1)
        states.append([deter, drawn, probs])
        entering.append(entered)
        leaving.append(left)
    return states, entering, leaving


@scripted
def filtered_back(
    w: Weights,
    entered: list[Tensor],
    left: list[Tensor],
    keep: Tensor,
    g_deters: Tensor,
    g_softs: Tensor,
    share: float,
) -> tuple[Tensor, Tensor, list[list[Tensor]], list[list[Tensor]]]:
    """The way back through all steps, from gradients (B, T, ...) of deter and of the softmax.

    w as `turned`; entered and left: all steps joined, as the slopes of `enter` and `leave`.
    Gradients of the first deter and stoch; and by step those that the weights' are made of.
    """
    steps = keep.shape[1]
    entering: list[list[Tensor]] = []
    leaving: list[list[Tensor]] = []
    e = [x.unflatten(0, (-1, steps)).unbind(1) for x in entered]
    f = [x.unflatten(0, (-1, steps)).unbind(1) for x in left]
    g_deter, g_stoch = torch.zeros_like(g_deters[:, 0]), torch.zeros_like(g_softs[:, 0])
    for back in range(1, steps + 1):
        t = steps - back
        g_soft, g_new = g_softs.select(1, t), g_deters.select(1, t) + g_deter
        g_soft = torch.add(g_soft, g_stoch.view_as(g_soft), alpha=share)
        mixed, seen = Slope(f[0][t], f[1][t], f[2][t]), Slope(f[5][t], f[6][t], f[7][t])
        slopes = Slopes(mixed, f[3][t], f[4][t], seen, f[8][t])
        g_deter, g_x, of_leave = leave_back(w, slopes, g_new, g_soft)
        embedded = Slope(e[0][t], e[1][t], e[2][t])
        g_deter, g_stoch, of_enter = enter_back(w, embedded, keep.select(1, t), g_deter, g_x)
        entering.append(of_enter)
        leaving.append(of_leave)
    return g_deter, g_stoch, entering, leaving


def weight_grads(
    w: Weights, entered: Entered, left: Left, e: EnterGrads, g: LeaveGrads
) -> tuple[Tensor | None, ...]:
    """Gradients of the weights, in their order, from all steps joined."""
    n, (a, b) = w.groups, e.linear.unbind(1)
    bias = sum_rows(g.gates.flatten(1), n)
    return (
        outer(entered.deter, a, n),
        sum_rows(a, n),
        outer(entered.stoch, b, n),
        sum_rows(b, n),
        scale_grad(entered.embedded, e.x, n),
        outer(left.x, g.mixed, n),
        block_outer(blocks(w, left.deter), blocks(w, g.mixed), n),
        None if left.recalled is None else outer(left.recalled, g.mixed, n),
        scale_grad(left.mixed, g.hidden, n),
        block_outer(blocks(w, left.hidden), g.gates, n),
        bias,
        outer(left.new, g.seen, n),
        scale_grad(left.seen, g.read, n),
        outer(left.read, g.logits, n),
        sum_rows(g.logits, n),
    )


def scale_grad(x: Normed, grad: Tensor, groups: int) -> Tensor:
    """Gradient of a norm's scale from that of what came out of the SiLU."""
    return sum_rows(aten.silu_backward(grad, x.scaled).mul_(x.normal), groups)


def block_outer(x: Tensor, grad: Tensor, groups: int) -> Tensor:
    """Gradient (K, in, out) of the weight of `block_product`, from x and grad (R, K, .)."""
    parts = max(groups, 1)
    rows = x.view(parts, -1, *x.shape[1:]).permute(0, 2, 3, 1)
    product = torch.matmul(rows, grad.view(parts, -1, *grad.shape[1:]).transpose(1, 2))
    return product if groups else product[0]
