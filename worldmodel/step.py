"""One row filtered where nobody learns: what acting costs at every frame.

The same as `RSSM.observe` on a sequence of one row (arXiv 2301.04104), in half as many operations,
and on a CPU a step of one row costs as many as it makes. Nothing is taken out of a loop that turns
once; latent and action are embedded side by side, and each block of the recurrent state reads all
that it mixes in one product with the weights as they are stored.
"""

import torch
from torch import Tensor

from worldmodel.cell import apart, block_product, gated
from worldmodel.heads import Draws, chosen, race
from worldmodel.nets import addmm, silu_of_rms_
from worldmodel.rssm import RSSM, MemoryUse
from worldmodel.types import Carry, Latent


def step(
    dynamics: RSSM,
    carry: Carry,
    tokens: Tensor,
    action: Tensor,
    first: Tensor,
    forget: Tensor,
    use: MemoryUse = "write",
    generator: Draws = None,
) -> Carry:
    """The carry after one row: tokens (B, E), action (B, A), first and forget (B,) bool.

    As `RSSM.observe`, without gradients; it draws the same numbers from the generator.
    """
    keep = (~first).to(tokens.dtype)[:, None]
    deter, stoch = carry.latent.deter * keep, carry.latent.stoch.flatten(1) * keep
    x, fast = embedded(dynamics, deter, stoch, action * keep), carry.fast
    if dynamics.memory is not None:
        state, embed = x.split([2 * dynamics.hidden, dynamics.hidden], -1)
        recalled, fast = dynamics.recall(use, forget)(state, embed, fast)
        x = x if recalled is None else torch.cat([x, recalled], -1)
    deter = recurred(dynamics, deter, x)
    logits = dynamics.posterior_net(torch.cat([deter, tokens], -1))
    noise = race((len(deter), dynamics.stoch, dynamics.classes), generator)
    return Carry(Latent(deter, chosen(logits.view(noise.shape), noise, dynamics.mix)), fast)


def embedded(dynamics: RSSM, deter: Tensor, stoch: Tensor, action: Tensor) -> Tensor:
    """What the recurrent state mixes in: deter (B, D), stoch (B, S * C), action -> (B, 3 h)."""
    layers = dynamics.from_deter, dynamics.from_stoch, dynamics.from_action
    inputs = deter, stoch, action.clamp(-1, 1)
    both = zip(layers, inputs, strict=True)
    linear = [addmm(to.linear.bias, x, to.linear.weight) for to, x in both]
    scale = torch.stack([to.norm.weight for to in layers], -2)
    return silu_of_rms_(torch.stack(linear, 1), scale, 2).flatten(1)


def recurred(dynamics: RSSM, deter: Tensor, x: Tensor) -> Tensor:
    """deter (B, D) after it has mixed in x (B, n), of which every block reads all."""
    weight, n = dynamics.mixed.weight, deter.shape[-1] // dynamics.blocks
    *groups, blocks, _, out = weight.shape
    old = apart(weight, deter)
    read = x.view(*groups, 1, -1, x.shape[-1]).expand(*old.shape[:-1], -1)
    bias = dynamics.mixed.bias.view(*groups, blocks, 1, out)
    rows = torch.cat([old, read], -1)
    mixed = block_product(rows, weight[..., : n + x.shape[-1], :], bias).transpose(-2, -3)
    hidden = silu_of_rms_(mixed.reshape(deter.shape), dynamics.mixed_norm.weight)
    return gated(dynamics.gates.weight, dynamics.gates.bias, deter, hidden)
