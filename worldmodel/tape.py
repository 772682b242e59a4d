"""The recurrent step by hand as autograd's nodes: a sequence in one, or two a step.

`Filter` is a whole sequence, for dynamics without a memory. `Tape` is one loop's worth of nodes
that leave out every gradient of a weight, and between two of which a memory may stand; what the
weights' gradients need is kept, and becomes one product each when the backward pass comes out at
the weights. Neither knows second derivatives, autocast or torch.func: cell.py does.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from worldmodel.cell import Draw, Weights
from worldmodel.hand import (
    Entered,
    EnterGrads,
    LeaveGrads,
    Left,
    enter,
    enter_back,
    filtered,
    filtered_back,
    leave,
    leave_back,
    slope,
    slopes,
    spread,
    turned,
    weight_grads,
)
from worldmodel.nets import joined, matmul


class Filter(torch.autograd.Function):
    """A sequence without a memory, in one node.

    deter (B, D), stoch (B, S * C), bias (B, T, D), tokens (B, T, h), keep (B, T, 1) and noise
    (T, B, S, C) -> deter (B, T, D), stoch (B, T, S, C) and its probabilities.
    """

    @staticmethod
    def forward(
        ctx: Any,
        deter: Tensor,
        stoch: Tensor,
        bias: Tensor,
        tokens: Tensor,
        keep: Tensor,
        noise: Tensor,
        draw: Draw,
        *weights: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        w = spread(Weights(*weights), len(deter))
        with torch.inference_mode():  # what leaves the loop is made after it
            rows = (deter, stoch, bias, tokens, keep, noise)
            states, entering, leaving = filtered(w, draw, *rows)
        ctx.draw, ctx.kept = draw, (joined(entering), joined(leaving))
        ctx.save_for_backward(keep, *weights)
        deters, stochs, probs = (torch.stack(x, 1) for x in zip(*states, strict=True))
        return deters, stochs, probs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        keep, *weights = ctx.saved_tensors
        w, share = Weights(*weights), 1 - ctx.draw.mix
        entered, left = Entered.of(ctx.kept[0]), Left.of(ctx.kept[1])
        with torch.inference_mode():
            wide = spread(w, len(left.new))
            of_enter, of_leave = slope(entered.embedded, wide.scale_in), slopes(wide, left)
            flat = [*of_leave.mixed, of_leave.gates, of_leave.kept, *of_leave.seen, of_leave.soft]
            g_soft = (grads[1] + grads[2]).mul_(share)
            found = filtered_back(turned(w), [*of_enter], flat, keep, grads[0], g_soft, share)
        g_deter, g_stoch, entering, leaving = found
        e, g = EnterGrads(*joined(entering[::-1])), LeaveGrads(*joined(leaving[::-1]))
        g_bias, g_tokens = (x.unflatten(0, (-1, keep.shape[1])) for x in (g.mixed, g.seen))
        of_weights = weight_grads(w, entered, left, e, g)
        rows = (g_deter.clone(), g_stoch.clone(), g_bias, g_tokens)
        return *rows, None, None, None, *of_weights


class Records:
    """What the nodes of one `Tape` share: the weights, and what their gradients are made of.

    Records are tagged with the backward pass that left them, so that a pass which ended before it
    reached the weights leaves nothing to the next one.
    """

    def __init__(self, weights: Weights, draw: Draw, rows: int):
        self.weights = spread(Weights(*(w.detach() for w in weights)), rows)
        self.turned = turned(self.weights)
        self.draw = draw
        self._steps: dict[str, list[tuple[int, Any]]] = {"enter": [], "leave": []}

    def add(self, kind: str, *kept: Any) -> None:
        """Keep one step's share of the weights' gradients."""
        self._steps[kind].append((graph_task(), kept))

    def take(self, kind: str) -> list[Any]:
        """This pass's records of all steps, joined each; forgets them."""
        steps = [kept for task, kept in self._steps[kind] if task == graph_task()]
        self._steps[kind] = []
        return [joined(kept) for kept in zip(*steps, strict=True)]


def graph_task() -> int:
    """Number of the backward pass that is running."""
    return torch._C._current_graph_task_id()  # pyright: ignore


class Tape:
    """The step in two nodes, for one loop over so many rows."""

    def __init__(self, weights: Weights, draw: Draw, rows: int):
        # the nodes know the records and not the token: a graph that holds itself is never freed
        self.records = Records(weights, draw, rows)
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
        tokens: Tensor,
        noise: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `Plain.leave`."""
        return Leave.apply(self.token, deter, x, recalled, bias, tokens, noise, self.records)


class Enter(torch.autograd.Function):
    """`enter` as one node."""

    @staticmethod
    def forward(
        ctx: Any, token: Tensor, deter: Tensor, stoch: Tensor, keep: Tensor, records: Records
    ) -> tuple[Tensor, Tensor]:
        deter, x, entered = enter(records.weights, deter, stoch, keep)
        # what a node returns it must not hold: the alias knows no node
        ctx.records, ctx.kept = records, [deter.detach(), *entered[1:]]
        ctx.save_for_backward(keep)
        return deter, x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        records, (keep,) = ctx.records, ctx.saved_tensors
        back = slope(Entered.of(ctx.kept).embedded, records.weights.scale_in)
        g_deter, g_stoch, e = enter_back(records.turned, back, keep, *grads)
        records.add("enter", ctx.kept, e)
        return None, g_deter, g_stoch, None, None


class Leave(torch.autograd.Function):
    """`leave` as one node."""

    @staticmethod
    def forward(
        ctx: Any,
        token: Tensor,
        deter: Tensor,
        x: Tensor,
        recalled: Tensor | None,
        bias: Tensor,
        tokens: Tensor,
        noise: Tensor,
        records: Records,
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows = (deter.detach(), x.detach(), None if recalled is None else recalled.detach())
        w, draw = records.weights, records.draw
        new, stoch, probs, left = leave(w, draw, *rows, bias, tokens, noise)
        ctx.records = records
        ctx.kept = [x.detach() if x is new else x for x in left]
        return new, stoch, probs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        records, left, share = ctx.records, Left.of(ctx.kept), 1 - ctx.records.draw.mix
        g_soft = (grads[1] + grads[2]).mul_(share)
        back = slopes(records.weights, left)
        g_deter, g_x, g = leave_back(records.turned, back, grads[0], g_soft)
        records.add("leave", ctx.kept, g)
        g_mixed, g_seen = g[0], g[3]
        g_recalled = None if left.recalled is None else matmul(g_mixed, records.turned.mix_memory)
        return None, g_deter, g_x, g_recalled, g_mixed, g_seen, None, None


class Collect(torch.autograd.Function):
    """Gives the token every step takes; its backward, the last, makes the weights' gradients."""

    @staticmethod
    def forward(ctx: Any, records: Records, *weights: Tensor) -> Tensor:
        ctx.records = records
        return weights[0].new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        (entered, e), (left, g) = ctx.records.take("enter"), ctx.records.take("leave")
        kept, of_leave = (Entered.of(entered), Left.of(left)), LeaveGrads(*g)
        return None, *weight_grads(ctx.records.weights, *kept, EnterGrads(*e), of_leave)
