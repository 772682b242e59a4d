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
    enter,
    enter_back,
    joined,
    leave,
    leave_back,
    parted,
    slope,
    slopes,
    spread,
    weight_grads,
)
from worldmodel.nets import matmul


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
        entering, leaving, states = [], [], []
        rows = zip(*(x.unbind(1) for x in (bias, tokens, keep)), noise, strict=True)
        for bias_t, tokens_t, keep_t, noise_t in rows:
            deter, x, entered = enter(w, deter, stoch, keep_t)
            *state, left = leave(w, draw, deter, x, None, bias_t, tokens_t, noise_t)
            deter, stoch = state[0], state[1].flatten(1)
            entering.append(entered)
            leaving.append(left)
            states.append(tuple(state))
        ctx.draw, ctx.kept = draw, (joined(entering), joined(leaving))
        ctx.save_for_backward(keep, *weights)
        deters, stochs, probs = (torch.stack(x, 1) for x in zip(*states, strict=True))
        return deters, stochs, probs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        keep, *weights = ctx.saved_tensors
        w, (entered, left), share = Weights(*weights), ctx.kept, 1 - ctx.draw.mix
        steps = keep.shape[1]
        wide = spread(w, len(left.new))
        leave_slopes = parted(slopes(wide, left), steps)
        enter_slopes = parted(slope(entered.embedded, wide.scale_in), steps)
        g_deters, g_softs = grads[0].unbind(1), (grads[1] + grads[2]).mul_(share).unbind(1)
        g_deter, g_stoch = torch.zeros_like(g_deters[0]), torch.zeros_like(g_softs[0])
        entering, leaving = [], []
        for t in reversed(range(steps)):
            g_soft = torch.add(g_softs[t], g_stoch.view_as(g_softs[t]), alpha=share)
            g_deter, g_x, g = leave_back(w, leave_slopes[t], g_deters[t] + g_deter, g_soft)
            g_deter, g_stoch, e = enter_back(w, enter_slopes[t], keep[:, t], g_deter, g_x)
            entering.append(e)
            leaving.append(g)
        e, g = joined(entering[::-1]), joined(leaving[::-1])
        g_bias, g_tokens = (x.unflatten(0, (-1, steps)) for x in (g.mixed, g.seen))
        found = weight_grads(w, entered, left, e, g)
        return g_deter, g_stoch, g_bias, g_tokens, None, None, None, *found


class Records:
    """What the nodes of one `Tape` share: the weights, and what their gradients are made of.

    Records are tagged with the backward pass that left them, so that a pass which ended before it
    reached the weights leaves nothing to the next one.
    """

    def __init__(self, weights: Weights, draw: Draw, rows: int):
        self.weights = spread(Weights(*(w.detach() for w in weights)), rows)
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
        ctx.records, ctx.kept = records, entered._replace(deter=deter.detach())
        ctx.save_for_backward(keep)
        return deter, x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        w, entered, (keep,) = ctx.records.weights, ctx.kept, ctx.saved_tensors
        back = slope(entered.embedded, w.scale_in)
        g_deter, g_stoch, e = enter_back(w, back, keep, *grads)
        ctx.records.add("enter", entered, e)
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
        ctx.kept = left._replace(new=new.detach(), soft=left.soft.detach())
        return new, stoch, probs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        w, left, share = ctx.records.weights, ctx.kept, 1 - ctx.records.draw.mix
        g_soft = (grads[1] + grads[2]).mul_(share)
        g_deter, g_x, g = leave_back(w, slopes(w, left), grads[0], g_soft)
        ctx.records.add("leave", left, g)
        forgotten = isinstance(left.recalled, tuple)
        g_recalled = None if forgotten else matmul(g.mixed, w.mix_memory.mT)
        return None, g_deter, g_x, g_recalled, g.mixed, g.seen, None, None


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
        return None, *weight_grads(ctx.records.weights, entered, left, e, g)
