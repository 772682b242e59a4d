"""Actors and critics: features to actions and to values.

The actor's actions are encoded vectors (worldmodel/types.py). Discrete actions, one or several,
are categoricals with 1 % uniform mixing; continuous ones a normal with bounded mean and deviation
(DreamerV3, arXiv 2301.04104). Both learn by the score function, so samples carry no gradients.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from worldmodel.heads import Draws, TwoHot, chosen, drawn, race, unimix
from worldmodel.mlp import MLP, Recording
from worldmodel.nets import at_least_float32
from worldmodel.prior import Chooser
from worldmodel.types import ActionSpec

Critic = TwoHot


class DiscreteActor(nn.Module):
    """Features (..., F) to one-hot blocks (..., A), one for each component of the action."""

    choices: Tensor | None  # (A, A) all actions there are, where there is one component

    def __init__(self, n_in: int, spec: ActionSpec, units: int, layers: int, mix: float = 0.01):
        super().__init__()
        self.sizes, self.mix = spec.sizes, mix
        self.net = MLP(n_in, spec.dim, units, layers, scale=0.01)
        one_hot = torch.eye(spec.dim) if len(spec.sizes) == 1 else None
        self.register_buffer("choices", one_hot, persistent=False)  # all actions, or None

    def forward(self, x: Tensor, recording: Recording | None = None) -> Tensor:
        """Probabilities (..., A): each block sums to one."""
        raw = self.net(x, recording)
        if len(self.sizes) == 1:
            return unimix(raw, self.mix)
        return torch.cat([unimix(block, self.mix) for block in raw.split(self.sizes, -1)], -1)

    def noise(self, steps: int, rows: int, generator: Draws) -> Tensor:
        """What `sample` draws with at each step: (steps, rows, A)."""
        return race((steps, rows, sum(self.sizes)), generator, 1)

    def sample(self, raw: Tensor, noise: Tensor) -> Tensor:
        """A draw (rows, A), from what the network gives."""
        if len(self.sizes) == 1:
            return chosen(raw, noise, self.mix)
        blocks = zip(raw.split(self.sizes, -1), noise.split(self.sizes, -1), strict=True)
        return torch.cat([chosen(p, n, self.mix) for p, n in blocks], -1)

    def log_prob(self, probs: Tensor, action: Tensor) -> Tensor:
        """log pi(action) (...), summed over components."""
        return (probs.log() * action).sum(-1)

    def entropy(self, probs: Tensor) -> Tensor:
        """Entropy (...) in nats, summed over components."""
        return -(probs * probs.log()).sum(-1)


class ContinuousActor(nn.Module):
    """Features (..., F) to a normal over (..., A): mean in (-1, 1), deviation in (low, high)."""

    def __init__(
        self,
        n_in: int,
        spec: ActionSpec,
        units: int,
        layers: int,
        deviation: tuple[float, float] = (0.1, 1.0),
    ):
        super().__init__()
        self.low, self.high = deviation
        self.choices = None
        self.net = MLP(n_in, 2 * spec.dim, units, layers, scale=0.01)

    def forward(self, x: Tensor, recording: Recording | None = None) -> Tensor:
        """Mean and deviation, (..., 2 * A)."""
        return self.params(self.net(x, recording))

    def params(self, raw: Tensor) -> Tensor:
        """`forward`, of what the network gives."""
        mean, deviation = at_least_float32(raw).chunk(2, -1)
        spread = (self.high - self.low) * (deviation + 2.0).sigmoid() + self.low
        return torch.cat([mean.tanh(), spread], -1)

    def noise(self, steps: int, rows: int, generator: Draws) -> Tensor:
        """What `sample` draws with at each step: (steps, rows, A)."""
        shape = rows, self.net.out.weight.shape[-1] // 2
        return torch.stack([drawn(torch.randn, shape, generator, 0) for _ in range(steps)])

    def sample(self, raw: Tensor, noise: Tensor) -> Tensor:
        """A draw (rows, A), from what the network gives.

        It may leave [-1, 1], where the environment's border clips it.
        """
        mean, deviation = self.params(raw.detach()).chunk(2, -1)
        return mean + deviation * noise

    def log_prob(self, params: Tensor, action: Tensor) -> Tensor:
        """log pi(action) (...), summed over dimensions."""
        mean, deviation = params.chunk(2, -1)
        error = ((action - mean) / deviation).square()
        return -(0.5 * error + deviation.log() + 0.5 * math.log(2 * math.pi)).sum(-1)

    def entropy(self, params: Tensor) -> Tensor:
        """Differential entropy (...), summed over dimensions."""
        _, deviation = params.chunk(2, -1)
        return (deviation.log() + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)


Actor = DiscreteActor | ContinuousActor


def policy_of(
    actor: Actor, steps: int, generator: Draws, recording: Recording | None = None
) -> Callable[[Tensor], Tensor]:
    """Features (N, F) to actions (N, A), for so many steps; nothing is drawn before the first."""

    def noise(rows: int) -> Tensor:
        return actor.noise(steps, rows, generator)

    if isinstance(actor, DiscreteActor) and len(actor.sizes) == 1:
        return Chooser(actor.net.net(), actor.mix, noise, recording)

    left: list[Tensor] = []

    def act(feature: Tensor) -> Tensor:
        if not left:
            left.extend(noise(len(feature)).unbind(0)[::-1])
        return actor.sample(actor.net(feature, recording), left.pop())

    return act


def make_actor(n_in: int, spec: ActionSpec, units: int, layers: int, mix: float = 0.01) -> Actor:
    """The actor that fits an action space."""
    if spec.kind == "discrete":
        return DiscreteActor(n_in, spec, units, layers, mix)
    return ContinuousActor(n_in, spec, units, layers)
