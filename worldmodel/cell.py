"""The recurrent step of the RSSM: its mathematics, and the same as nodes with a backward by hand.

On a CPU a time loop costs as many small operations as it makes. `enter`, `recur` and `infer` are
the step as the paper (arXiv 2301.04104) writes it. `Tape` runs the same as two autograd nodes a
step that leave out every gradient of a weight: what those need is kept on the tape, and turned
into one product over all of time when the backward pass comes out at the weights. The two agree
to rounding, and second derivatives and torch.func use the readable one.

Shapes: B batch, D deterministic state in G blocks, h hidden, S x C stochastic state.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from worldmodel.heads import sample, softmax, softmax_back, unimix
from worldmodel.nets import (
    EPSILON,
    addmm,
    block_matmul,
    matmul,
    outer,
    plus,
    rms,
    sum_rows,
    times,
)

aten: Any = torch.ops.aten


class Weights(NamedTuple):
    """All that is recurrent, as a loop needs it; `mix_memory` has no rows without a memory."""

    deter_in: Tensor  # (D, h)
    deter_bias: Tensor  # (h,)
    stoch_in: Tensor  # (S * C, h)
    stoch_bias: Tensor  # (h,)
    scale_in: Tensor  # (2, h)
    mix_state: Tensor  # (2 h, D)
    mix_deter: Tensor  # (G, D / G, D / G)
    mix_memory: Tensor  # (h, D) or (0, D)
    mix_scale: Tensor  # (D,)
    gates: Tensor  # (G, D / G, 3 D / G)
    gates_bias: Tensor  # (3 D,)
    post_deter: Tensor  # (D, h)
    post_scale: Tensor  # (h,)
    post_out: Tensor  # (h, S * C)
    post_bias: Tensor  # (S * C,)

    @property
    def groups(self) -> int:
        """Groups of rows with weights of their own; 0 when all rows share these."""
        return len(self.gates) if self.gates.ndim > 3 else 0

    @property
    def blocks(self) -> int:
        """Blocks of the deterministic state."""
        return self.gates.shape[-3]


class Draw(NamedTuple):
    """How the stochastic state is drawn."""

    stoch: int
    classes: int
    mix: float


def enter(w: Weights, deter: Tensor, stoch: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """What is left of deter (B, D) where keep (B, 1) is one, and both states embedded (B, 2 h)."""
    deter = deter * keep
    a = rms(addmm(w.deter_bias, deter, w.deter_in), w.scale_in[..., 0, :])
    b = rms(addmm(w.stoch_bias, stoch * keep, w.stoch_in), w.scale_in[..., 1, :])
    return deter, F.silu(torch.cat([a, b], -1))


def recur(w: Weights, deter: Tensor, x: Tensor, recalled: Tensor | None, bias: Tensor) -> Tensor:
    """The block GRU: deter (B, D), x (B, 2 h), recalled (B, h), bias (B, D) -> deter (B, D)."""
    mixed = addmm(bias, x, w.mix_state) + block_matmul(deter, w.mix_deter)
    if recalled is not None:
        mixed = addmm(mixed, recalled, w.mix_memory)
    gates = plus(block_matmul(F.silu(rms(mixed, w.mix_scale)), w.gates), w.gates_bias)
    reset, candidate, update = gates.view(len(deter), w.blocks, 3, -1).unbind(2)
    candidate = torch.tanh(reset.sigmoid() * candidate)
    update = (update - 1).sigmoid()
    return torch.lerp(deter.view_as(update), candidate, update).flatten(1)


def advance(w: Weights, deter: Tensor, x: Tensor, recalled: Tensor | None, bias: Tensor) -> Tensor:
    """`recur` where no gradient is wanted: in place, and the blocks stay apart until the end."""
    mixed = addmm(bias, x, w.mix_state).add_(block_matmul(deter, w.mix_deter))
    if recalled is not None:
        mixed = addmm(mixed, recalled, w.mix_memory)
    return gated(w.gates, w.gates_bias, deter, F.silu(rms(mixed, w.mix_scale), inplace=True))


def gated(weight: Tensor, bias: Tensor, deter: Tensor, hidden: Tensor) -> Tensor:
    """The state (B, D) that the gates (G, n, 3 n) of hidden (B, D) make of deter (B, D)."""
    gates = torch.matmul(apart(weight, hidden), weight)
    gates = gates.add_(bias.view(*weight.shape[:-2], 1, -1).to(gates.dtype))
    reset, candidate, update = gates.unflatten(-1, (3, -1)).unbind(-2)
    # tanh(x) = 2 sigmoid(2 x) - 1, which takes half as long on a CPU
    candidate = candidate.mul_(reset.sigmoid_()).mul_(2).sigmoid_().mul_(2).sub_(1)
    new = torch.empty_like(deter)
    torch.lerp(
        apart(weight, deter),
        candidate.to(deter.dtype),
        update.sub_(1).sigmoid_().to(deter.dtype),
        out=apart(weight, new),
    )
    return new


def apart(weight: Tensor, x: Tensor) -> Tensor:
    """x (B, G * n) by blocks, as the weight (G, n, out) has them in front: a view (G, B, n)."""
    *groups, blocks, _, _ = weight.shape
    return x.view(*groups, -1, blocks, x.shape[-1] // blocks).transpose(-2, -3)


def infer(
    w: Weights, draw: Draw, deter: Tensor, seen: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor]:
    """Draw from the posterior: one-hot (B, S, C) with straight-through gradients, and its probs."""
    hidden = F.silu(rms(addmm(seen, deter, w.post_deter), w.post_scale))
    logits = addmm(w.post_bias, hidden, w.post_out)
    probs = unimix(logits.view(-1, draw.stoch, draw.classes), draw.mix)
    return sample(probs, noise) + (probs - probs.detach()), probs  # exactly one-hot


class Plain:
    """The step as written above."""

    def __init__(self, weights: Weights, draw: Draw):
        self.weights, self.draw = weights, draw

    def enter(self, deter: Tensor, stoch: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        """See `enter`."""
        return enter(self.weights, deter, stoch, keep)

    def leave(
        self,
        deter: Tensor,
        x: Tensor,
        recalled: Tensor | None,
        bias: Tensor,
        seen: Tensor,
        noise: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """New deter (B, D), stoch (B, S, C) and its probabilities."""
        deter = recur(self.weights, deter, x, recalled, bias)
        return deter, *infer(self.weights, self.draw, deter, seen, noise)


class Records:
    """What one loop's nodes share: the weights, and what their gradients are made of.

    Records are tagged with the backward pass that left them, so that a pass which ended before it
    reached the weights leaves nothing to the next one.
    """

    def __init__(self, weights: Weights, draw: Draw):
        self.weights = Weights(*(w.detach() for w in weights))
        self.draw = draw
        self._steps: dict[str, list[tuple[int, tuple[Tensor, ...]]]] = {"enter": [], "leave": []}

    def add(self, kind: str, *tensors: Tensor) -> None:
        """Keep one step's share of the weights' gradients."""
        self._steps[kind].append((graph_task(), tensors))

    def take(self, kind: str) -> list[Tensor]:
        """This pass's records of all steps, joined along the batch; forgets them."""
        steps = [tensors for task, tensors in self._steps[kind] if task == graph_task()]
        self._steps[kind] = []
        parts = max(self.weights.groups, 1)  # the rows of a group stay together
        columns = zip(*steps, strict=True)
        grouped = ([x.view(parts, -1, *x.shape[1:]) for x in column] for column in columns)
        return [torch.cat(column, 1).flatten(0, 1) for column in grouped]


class Tape:
    """The step in two nodes, for one loop."""

    def __init__(self, weights: Weights, draw: Draw):
        # the nodes know the records and not the token: a graph that holds itself is never freed
        self.records = Records(weights, draw)
        self.token: Tensor = Collect.apply(self.records, *weights)

    def enter(self, deter: Tensor, stoch: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        """As `Plain.enter`."""
        return Enter.apply(self.token, deter, stoch, keep, self.records)

    def leave(
        self,
        deter: Tensor,
        x: Tensor,
        recalled: Tensor | None,
        bias: Tensor,
        seen: Tensor,
        noise: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `Plain.leave`."""
        return Leave.apply(self.token, deter, x, recalled, bias, seen, noise, self.records)


def graph_task() -> int:
    """Number of the backward pass that is running."""
    return torch._C._current_graph_task_id()  # pyright: ignore


def normalise(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (..., n) over its root mean square, and what it was multiplied by (..., 1)."""
    factor = torch.linalg.vecdot(x, x).div_(x.shape[-1]).add_(EPSILON).rsqrt_().unsqueeze(-1)
    return x * factor, factor


def normalise_back(grad: Tensor, normal: Tensor, factor: Tensor) -> Tensor:
    """Gradient of `normalise`, from that of its result."""
    share = torch.linalg.vecdot(grad, normal).div_(-grad.shape[-1]).unsqueeze(-1)
    return torch.addcmul(grad, normal, share).mul_(factor)


class Enter(torch.autograd.Function):
    """`enter` as one node."""

    @staticmethod
    def forward(
        ctx: Any, token: Tensor, deter: Tensor, stoch: Tensor, keep: Tensor, records: Records
    ) -> tuple[Tensor, Tensor]:
        w = records.weights
        deter, stoch = deter * keep, stoch * keep
        linear = torch.stack(
            [
                addmm(w.deter_bias, deter, w.deter_in),
                addmm(w.stoch_bias, stoch, w.stoch_in),
            ],
            1,
        )
        normal, factor = normalise(linear)
        scaled = times(normal, w.scale_in, 2)
        ctx.records = records
        ctx.save_for_backward(deter, stoch, keep, normal, factor, scaled)
        return deter, F.silu(scaled).flatten(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        g_deter, g_x = grads
        w: Weights = ctx.records.weights
        deter, stoch, keep, normal, factor, scaled = ctx.saved_tensors
        g_scaled = aten.silu_backward(g_x.view_as(scaled), scaled)
        g_linear = normalise_back(times(g_scaled, w.scale_in, 2), normal, factor)
        a, b = g_linear.unbind(1)
        ctx.records.add("enter", deter, stoch, g_linear, g_scaled, normal)
        g_deter = addmm(g_deter, a, w.deter_in.mT).mul_(keep)
        return None, g_deter, matmul(b, w.stoch_in.mT).mul_(keep), None, None


class Leave(torch.autograd.Function):
    """`recur`, then `infer`, as one node."""

    @staticmethod
    def forward(
        ctx: Any,
        token: Tensor,
        deter: Tensor,
        x: Tensor,
        recalled: Tensor | None,
        bias: Tensor,
        seen: Tensor,
        noise: Tensor,
        records: Records,
    ) -> tuple[Tensor, Tensor, Tensor]:
        w, draw = records.weights, records.draw
        mixed = addmm(bias, x, w.mix_state).add_(block_matmul(deter, w.mix_deter))
        if recalled is not None:
            mixed = addmm(mixed, recalled, w.mix_memory)
        normal, factor = normalise(mixed)
        scaled = times(normal, w.mix_scale)
        hidden = F.silu(scaled)
        gates = plus(block_matmul(hidden, w.gates), w.gates_bias)
        r, c, u = gates.view(len(deter), w.blocks, 3, -1).unbind(2)
        reset, update = r.sigmoid(), (u - 1).sigmoid_()
        candidate = torch.tanh(reset * c)
        old = deter.view_as(update)
        new = torch.lerp(old, candidate, update).flatten(1)
        post, post_factor = normalise(addmm(seen, new, w.post_deter))
        post_scaled = times(post, w.post_scale)
        post_hidden = F.silu(post_scaled)
        logits = addmm(w.post_bias, post_hidden, w.post_out)
        soft = softmax(logits.view(-1, draw.stoch, draw.classes))
        probs = soft * (1 - draw.mix) + draw.mix / draw.classes if draw.mix else soft
        ctx.records = records
        recurrent = (deter, x, recalled, normal, factor, scaled, hidden)
        gating = (reset, c, candidate, update, old)
        posterior = (new, post, post_factor, post_scaled, post_hidden, soft)
        ctx.save_for_backward(*recurrent, *gating, *posterior)
        return new, sample(probs, noise), probs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        g_new, g_stoch, g_probs = grads
        w, draw = ctx.records.weights, ctx.records.draw
        saved = ctx.saved_tensors
        deter, x, recalled, normal, factor, scaled, hidden = saved[:7]
        g_soft = (g_stoch + g_probs) * (1 - draw.mix)
        g_seen, g_new, posterior = _posterior_back(saved[12:], w, g_new, g_soft)
        g_old, g_gates = _gates_back(saved[7:12], g_new)
        g_hidden = block_matmul(g_gates, w.gates.mT)
        g_scaled = aten.silu_backward(g_hidden, scaled)
        g_mixed = normalise_back(times(g_scaled, w.mix_scale), normal, factor)
        g_deter = g_old.add_(block_matmul(g_mixed, w.mix_deter.mT))
        memory = () if recalled is None else (recalled,)
        recurrent = (deter, x, g_mixed, g_scaled, normal, hidden, g_gates)
        ctx.records.add("leave", *recurrent, *posterior, *memory)
        g_recalled = None if recalled is None else matmul(g_mixed, w.mix_memory.mT)
        g_x = matmul(g_mixed, w.mix_state.mT)
        return None, g_deter, g_x, g_recalled, g_mixed, g_seen, None, None


def _posterior_back(
    saved: tuple[Tensor, ...], w: Weights, g_new: Tensor, g_soft: Tensor
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Gradients of `seen` and of the new deter, and what the weights need."""
    new, post, factor, scaled, hidden, soft = saved
    g_logits = softmax_back(g_soft, soft).flatten(1)
    g_scaled = aten.silu_backward(matmul(g_logits, w.post_out.mT), scaled)
    g_seen = normalise_back(times(g_scaled, w.post_scale), post, factor)
    g_new = addmm(g_new, g_seen, w.post_deter.mT)
    return g_seen, g_new, (new, g_seen, g_scaled, post, hidden, g_logits)


def _gates_back(saved: tuple[Tensor, ...], g_new: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the old deter (B, D) and of the gates before their non-linearities (B, 3 D)."""
    reset, c, candidate, update, old = saved
    g_new = g_new.view_as(update)
    g_candidate = g_new * update
    g_update = aten.sigmoid_backward(g_new * (candidate - old), update)
    g_inner = aten.tanh_backward(g_candidate, candidate)
    g_reset = aten.sigmoid_backward(g_inner * c, reset)
    gates = torch.stack([g_reset, g_inner * reset, g_update], 2)
    return (g_new - g_candidate).flatten(1), gates.flatten(1)


class Collect(torch.autograd.Function):
    """Gives the token every step takes; its backward, the last, makes the weights' gradients."""

    @staticmethod
    def forward(ctx: Any, records: Records, *weights: Tensor) -> Tensor:
        ctx.records = records
        return weights[0].new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        w, take = ctx.records.weights, ctx.records.take
        n = w.groups
        deter, stoch, g_linear, g_scaled, normal = take("enter")
        a, b = g_linear.unbind(1)
        entering = (outer(deter, a, n), sum_rows(a, n), outer(stoch, b, n), sum_rows(b, n))
        scaling = sum_rows(g_scaled * normal, n)
        old, x, g_mixed, g_scaled, normal, hidden, g_gates, *rest = take("leave")
        new, g_seen, g_post, post, g_in, g_logits, *memory = rest
        recalled = outer(memory[0], g_mixed, n) if memory else None
        mixing = (outer(x, g_mixed, n), block_outer(old, g_mixed, w), recalled)
        gating = (block_outer(hidden, g_gates, w), sum_rows(g_gates, n))
        posterior = (
            outer(new, g_seen, n),
            sum_rows(g_post * post, n),
            outer(g_in, g_logits, n),
            sum_rows(g_logits, n),
        )
        mix_scale = sum_rows(g_scaled * normal, n)
        return None, *entering, scaling, *mixing, mix_scale, *gating, *posterior


def block_outer(x: Tensor, grad: Tensor, weights: Weights) -> Tensor:
    """Gradient (K, in, out) of the weight of `block_matmul`, from x (N, K in), grad (N, K out)."""
    groups, blocks = weights.groups, weights.blocks
    if blocks == 1 and not groups:
        return (x.t() @ grad)[None]
    rows = x.view(max(groups, 1), -1, blocks, x.shape[1] // blocks).permute(0, 2, 3, 1)
    grads = grad.view(max(groups, 1), -1, blocks, grad.shape[1] // blocks).transpose(1, 2)
    product = torch.matmul(rows, grads)
    return product if groups else product[0]
