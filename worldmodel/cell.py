"""The recurrent step of the RSSM as the paper (arXiv 2301.04104) writes it.

`enter`, `recur` and `infer` are the step; `Plain` runs it, and autograd differentiates it: so do
second derivatives and torch.func. tape.py has the same step with a backward by hand, prior.py and
step.py where no gradient is wanted; they agree to rounding.

Shapes: B batch, D deterministic state in K blocks of n, h hidden, S x C stochastic state.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from worldmodel.heads import sample, unimix
from worldmodel.nets import addmm, block_matmul, plus, rms, tanh_


class Weights(NamedTuple):
    """All that is recurrent, as a loop needs it; `mix_memory` has no rows without a memory."""

    deter_in: Tensor  # (D, h)
    deter_bias: Tensor  # (h,)
    stoch_in: Tensor  # (S * C, h)
    stoch_bias: Tensor  # (h,)
    scale_in: Tensor  # (2, h)
    mix_state: Tensor  # (2 h, D)
    mix_deter: Tensor  # (K, n, n)
    mix_memory: Tensor  # (h, D) or (0, D)
    mix_scale: Tensor  # (D,)
    gates: Tensor  # (K, n, 3 n)
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
    return deter, embedded(w, deter, stoch * keep)


def embedded(w: Weights, deter: Tensor, stoch: Tensor) -> Tensor:
    """Both states, deter (B, D) and stoch (B, S * C), as what recurs mixes them in: (B, 2 h)."""
    return F.silu(rms(both(w, deter, stoch), w.scale_in, 2)).flatten(1)


def both(w: Weights, deter: Tensor, stoch: Tensor) -> Tensor:
    """The products (B, 2, h) of both states that `embedded` norms."""
    linear = addmm(w.deter_bias, deter, w.deter_in), addmm(w.stoch_bias, stoch, w.stoch_in)
    return torch.stack(linear, 1)


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


def gated(weight: Tensor, bias: Tensor, deter: Tensor, hidden: Tensor) -> Tensor:
    """The state (B, D) that the gates (K, n, 3 n) of hidden (B, D) make of deter (B, D)."""
    bias = bias.view(*weight.shape[:-2], 1, -1)
    gates = block_product(apart(weight, hidden), weight, bias)
    reset, candidate, update = gates.unflatten(-1, (3, -1)).unbind(-2)
    candidate = tanh_(candidate.mul_(reset.sigmoid_()))
    new = torch.empty_like(deter)
    torch.lerp(
        apart(weight, deter),
        candidate.to(deter.dtype),
        update.sub_(1).sigmoid_().to(deter.dtype),
        out=apart(weight, new),
    )
    return new


def block_product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (K, B, in) as of `apart` times weight (K, in, out), plus bias (K, 1, out)."""
    grouped = weight.ndim > 3
    rows, blocks = (x.flatten(0, 1), weight.flatten(0, 1)) if grouped else (x, weight)
    if bias is None:
        product = torch.bmm(rows, blocks)
    else:
        product = torch.baddbmm(bias.flatten(0, 1) if grouped else bias, rows, blocks)
    return product.unflatten(0, (x.shape[0], x.shape[1])) if grouped else product


def apart(weight: Tensor, x: Tensor) -> Tensor:
    """x (B, K * n) by blocks, as the weight (K, n, out) has them in front: a view (K, B, n)."""
    shape = list(weight.shape[:-2])  # groups, if there are any, and blocks
    shape.insert(len(shape) - 1, -1)
    shape.append(x.shape[-1] // shape[-1])
    return x.view(shape).transpose(-2, -3)


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
