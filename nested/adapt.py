"""Inner gradient steps on chosen parameters of any module, for many users at once.

Each user holds displacements from the slow weights, so a slow weight that moves moves every user
with it. First order: no gradient goes through an inner step, yet the slow weights get that of
whatever is computed at `weights(state)` (Reptile and first-order MAML, 1803.02999).
Users are rows of one vmap; none reads another.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from nested import fast

Params: TypeAlias = dict[str, Tensor]


class AdapterState(NamedTuple):
    """What each user has learned; every tensor is (B, *shape of the parameter)."""

    delta: Params  # displacement from the slow weights
    velocity: Params  # gradients gathered by momentum; empty without


class Adapter:
    """v' = momentum v + g;  delta' = (1 - decay) delta - lr v', for the parameters that match.

    `match` is searched in the dotted names of the module's parameters. `loss(params, row)` gives
    one user's scalar from the adapted parameters, by name (`fast.bind(module, params)` runs the
    module with them), and one row of the inputs. `clip` bounds the norm of a user's gradient over
    all adapted parameters.
    """

    def __init__(
        self,
        module: nn.Module,
        match: str,
        loss: Callable[[Params, Any], Tensor],
        lr: float,
        momentum: float = 0.0,
        decay: float = 0.0,
        clip: float = torch.inf,
    ):
        named = dict(module.named_parameters())
        self.slow = {name: p for name, p in named.items() if re.search(match, name)}
        if not self.slow:
            raise ValueError(f"adapter: {match!r} matches no parameter of {', '.join(named)}")
        for key, value, top in (("momentum", momentum, 1.0), ("decay", decay, 1.0)):
            if not 0 <= value <= top:
                raise ValueError(f"adapter: {key} is {value}, outside [0, {top:g}]")
        if lr <= 0 or clip <= 0:
            raise ValueError(f"adapter: {lr=} and {clip=} must be positive")
        self.module, self.lr, self.clip = module, lr, clip
        self.momentum, self.decay = momentum, decay
        self._gradients = torch.func.vmap(torch.func.grad_and_value(loss))

    def initial(self, batch: int) -> AdapterState:
        """The state of `batch` users that have learned nothing."""
        zeros = {name: p.new_zeros(batch, *p.shape) for name, p in self.slow.items()}
        return AdapterState(zeros, {k: x.clone() for k, x in zeros.items() if self.momentum})

    def weights(self, state: AdapterState) -> Params:
        """Each user's weights (B, *shape); the slow ones receive gradient through them."""
        return {name: p + state.delta[name] for name, p in self.slow.items()}

    def bind(self, state: AdapterState) -> Callable[..., Any]:
        """The module with every user's own weights: arguments and results have users first."""
        weights = self.weights(state)

        def one(params: Params, *args: Any) -> Any:
            return fast.bind(self.module, params)(*args)

        return lambda *args: torch.func.vmap(one)(weights, *args)

    def __call__(
        self, state: AdapterState, inputs: fast.Tree, reset: Tensor | None = None
    ) -> tuple[AdapterState, Tensor]:
        """One inner step, after going back to the slow weights where `reset` (B,) is set.

        `inputs` is a tree with users first. Gives the state and the losses (B,) before the step.
        """
        with torch.no_grad():
            if reset is not None:
                state = fast.reset(state, self.initial(len(reset)), reset)
            gradients, losses = self._gradients(self.weights(state), inputs)
            return self._moved(state, clipped(gradients, self.clip)), losses

    def _moved(self, state: AdapterState, gradients: Params) -> AdapterState:
        velocity = {name: self.momentum * v + gradients[name] for name, v in state.velocity.items()}
        ways = velocity or gradients
        delta = {
            name: (1 - self.decay) * d - self.lr * ways[name] for name, d in state.delta.items()
        }
        return AdapterState(delta, velocity)


def clipped(gradients: Params, norm: float) -> Params:
    """Gradients (B, ...), each user's scaled down to `norm` over all of them together."""
    squares = [g.flatten(1).square().sum(1) for g in gradients.values()]
    scale = (norm / torch.stack(squares).sum(0).sqrt()).clamp(max=1.0)  # (B,)
    return {name: g * scale.view(-1, *(1,) * (g.dim() - 1)) for name, g in gradients.items()}
