"""The prior rolled out where no gradient is wanted: a step of the RSSM that imagines.

The same as `cell.recur` and a draw from `RSSM.prior` (arXiv 2301.04104), in place and in half as
many operations: a dream makes as many steps as its horizon, and on a CPU a step of small dynamics
costs as many operations as it makes.

Shapes: those of cell.py; N rows.
"""

import torch
from torch import Tensor

from worldmodel.cell import Draw, Weights, apart, block_product, both
from worldmodel.heads import chosen
from worldmodel.mlp import Net
from worldmodel.nets import addmm, less_one, silu_of_rms_


def folded(w: Weights) -> Weights:
    """w as `advance` reads it: gates in the order reset, update, candidate.

    The update's bias holds its -1, and the candidate is twice as large, as `less_one` takes it.
    """
    bias = w.gates_bias.view(*w.gates.shape[:-2], 1, -1)
    gates: list[Tensor] = []
    for x, less in ((w.gates, 0), (bias, 1)):
        reset, candidate, update = x.chunk(3, -1)
        gates.append(torch.cat([reset, update - less, 2 * candidate], -1))
    return w._replace(gates=gates[0], gates_bias=gates[1])


def embedded(w: Weights, deter: Tensor, stoch: Tensor) -> Tensor:
    """Both states, (N, D) and (N, S * C), as the next one mixes them in: (N, 2 h)."""
    return silu_of_rms_(both(w, deter, stoch), w.scale_in, 2).flatten(1)


def step(
    w: Weights,
    net: Net,
    draw: Draw,
    deter: Tensor,
    x: Tensor,
    recalled: Tensor | None,
    bias: Tensor,
    noise: Tensor,
    out: Tensor,
) -> None:
    """The next deter (N, D) and stoch (N, S * C), side by side into out (N, D + S * C).

    w as `folded`, net for the logits of the stochastic state, deter (N, D), x (N, 2 h) as
    `embedded`, recalled (N, h), bias (N, D), noise (N, S, C).
    """
    n = deter.shape[-1]
    new, stoch = out[:, :n], out[:, n:]
    advance(w, deter, x, recalled, bias, new)
    chosen(net(new).view(noise.shape), noise, draw.mix, stoch.view(noise.shape))


def advance(
    w: Weights, deter: Tensor, x: Tensor, recalled: Tensor | None, bias: Tensor, out: Tensor
) -> Tensor:
    """`cell.recur` with `folded` weights, into out (N, D)."""
    old = apart(w.gates, deter)
    mixed = addmm(bias, x, w.mix_state)
    apart(w.gates, mixed).add_(block_product(old, w.mix_deter))
    if recalled is not None:
        mixed = addmm(mixed, recalled, w.mix_memory)
    hidden = apart(w.gates, silu_of_rms_(mixed, w.mix_scale))
    gates = block_product(hidden, w.gates, w.gates_bias)
    n = old.shape[-1]
    gate = gates[..., : 2 * n].sigmoid_()
    candidate = less_one(gates[..., 2 * n :].mul_(gate[..., :n])).to(deter.dtype)
    torch.lerp(old, candidate, gate[..., n:].to(deter.dtype), out=apart(w.gates, out))
    return out
