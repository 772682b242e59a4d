"""The prior rolled out where no gradient is wanted: a step of the RSSM that imagines.

The same as `cell.recur` and a draw from `RSSM.prior` (arXiv 2301.04104), in place and in half as
many operations: a dream makes as many steps as its horizon, and on a CPU a step of small dynamics
costs as many operations as it makes.

Shapes: those of cell.py; N rows.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from worldmodel.cell import Draw, Weights, apart, block_product, both
from worldmodel.heads import chosen
from worldmodel.mlp import Net, Recording, run, through
from worldmodel.nets import addmm, epsilon_of, less_one, matmul, silu_of_rms_
from worldmodel.script import scripted


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


def embedded(w: Weights, deter: Tensor, stoch: Tensor, epsilon: Tensor | None = None) -> Tensor:
    """Both states, (N, D) and (N, S * C), as the next one mixes them in: (N, 2 h)."""
    return silu_of_rms_(both(w, deter, stoch), w.scale_in, 2, epsilon).flatten(1)


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
    epsilon: Tensor | None = None,
) -> None:
    """The next deter (N, D) and stoch (N, S * C), side by side into out (N, D + S * C).

    w as `folded`, net for the logits of the stochastic state, deter (N, D), x (N, 2 h) as
    `embedded`, recalled (N, h), bias (N, D), noise (N, S, C).
    """
    n = deter.shape[-1]
    new, stoch = out[:, :n], out[:, n:]
    advance(w, deter, x, recalled, bias, new, epsilon)
    logits = through(net, new, epsilon).view(noise.shape)
    chosen(logits, noise, draw.mix, stoch.view(noise.shape))


def advance(
    w: Weights,
    deter: Tensor,
    x: Tensor,
    recalled: Tensor | None,
    bias: Tensor,
    out: Tensor,
    epsilon: Tensor | None = None,
) -> Tensor:
    """`cell.recur` with `folded` weights, into out (N, D)."""
    old = apart(w.gates, deter)
    mixed = addmm(bias, x, w.mix_state)
    apart(w.gates, mixed).add_(block_product(old, w.mix_deter))
    if recalled is not None:
        mixed = addmm(mixed, recalled, w.mix_memory)
    hidden = apart(w.gates, silu_of_rms_(mixed, w.mix_scale, 1, epsilon))
    gates = block_product(hidden, w.gates, w.gates_bias)
    n = old.shape[-1]
    gate = gates[..., : 2 * n].sigmoid_()
    candidate = less_one(gates[..., 2 * n :].mul_(gate[..., :n])).to(deter.dtype)
    torch.lerp(old, candidate, gate[..., n:].to(deter.dtype), out=apart(w.gates, out))
    return out


# ---- a whole dream ----------------------------------------------------------------------------


class Chooser:
    """A policy that draws one of a few actions by an MLP's logits: a dream can make its steps.

    noise: what is drawn with for so many rows, (steps, rows, A); asked for once, at the first step.
    recording: where what the layers keep goes, or None.
    """

    def __init__(
        self,
        net: Net,
        mix: float,
        noise: Callable[[int], Tensor],
        recording: Recording | None = None,
    ):
        self.net, self.mix, self.noise, self.recording = net, mix, noise, recording
        self._left: list[Tensor] = []

    def __call__(self, feature: Tensor) -> Tensor:
        """Actions (N, A) of the next step's features (N, F)."""
        if not self._left:
            self._left = [*self.noise(len(feature)).unbind(0)][::-1]
        net = self.net if self.recording is None else self.recording.add
        return chosen(net(feature), self._left.pop(), self.mix)


@scripted
def dreamed(
    w: Weights,
    net: Net,
    draw: Draw,
    actor: Net,
    mix: float,
    biases: Tensor,
    deter: Tensor,
    stoch: Tensor,
    noises: Tensor,
    races: Tensor,
    rows: list[Tensor],
) -> tuple[list[Tensor], list[list[Tensor]]]:
    """All steps of a dream without a memory whose actor is a `Chooser`; see `step`.

    biases (A, D): each action's part of the mixing; noises (H, N, S, C); races (H, N, A). The first
    of H + 1 rows (N, F) holds the first state, and the others are filled. By step: actions (N, A),
    and what a `Recording` keeps.
    """
    actions: list[Tensor] = []
    kept: list[list[Tensor]] = []
    epsilon = epsilon_of(deter)
    for h in range(noises.shape[0]):
        seen, layers = run(actor, rows[h], epsilon)
        logits = addmm(actor.bias, seen, actor.weight)
        action = chosen(logits, races[h], mix)
        x = embedded(w, deter, stoch, epsilon)
        step(w, net, draw, deter, x, None, matmul(action, biases), noises[h], rows[h + 1], epsilon)
        deter, stoch = rows[h + 1].tensor_split([deter.shape[-1]], -1)
        layers.append(logits)
        kept.append(layers)
        actions.append(action)
    return actions, kept
