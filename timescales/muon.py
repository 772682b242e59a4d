"""Muon and M3: momentum that is made orthogonal before it moves a matrix.

Muon is Jordan et al. 2024, with the update scaled as in Moonlight (arXiv 2502.16982) so that one
learning rate serves matrices and the AdamW that moves everything else. M3 is the multi-timescale
momentum of Nested Learning (arXiv 2512.24695) in a form that keeps its step size.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from timescales.foreach import (
    add_,
    addcmul_,
    by_step,
    fused_adamw_,
    gradients,
    lerp_,
    mul_,
    normalised,
    product,
    slots,
    zero_,
)

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


class Muon(Optimizer):
    """Nesterov momentum, orthogonalised, for 2-D weights; AdamW for all others.

    `w' = w (1 - lr weight_decay) - lr 0.2 sqrt(max(rows, columns)) orthogonal(m')`.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 1e-3,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "betas": tuple(betas), "eps": eps}
        super().__init__(params, {**defaults, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step on the gradients in `.grad`."""
        for group in self.param_groups:
            for step, params in by_step(self.state, group["params"]).items():
                self._matrices(group, [p for p in params if p.ndim == 2])
                self._others(group, step, [p for p in params if p.ndim != 2])

    def _matrices(self, group: dict[str, Any], params: list[Tensor]) -> None:
        if not params:
            return
        momentum, grads = slots(self.state, params, "momentum"), gradients(params)
        lerp_(momentum, grads, 1.0 - group["momentum"])
        ahead = [g.lerp(m, group["momentum"]) for g, m in zip(grads, momentum, strict=True)]
        mul_(params, 1.0 - group["lr"] * group["weight_decay"])
        add_(params, orthogonal(ahead), alpha=-group["lr"])

    def _others(self, group: dict[str, Any], step: int, params: list[Tensor]) -> None:
        if not params:
            return
        fused_adamw_(
            params,
            gradients(params),
            slots(self.state, params, "momentum"),
            slots(self.state, params, "square"),
            [],
            [torch.full((), float(step), device=params[0].device)] * len(params),
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )


class M3(Optimizer):
    """Two momenta on two timescales: `w' = w - lr (fast + mix * slow)`, matrices orthogonalised.

    The fast momentum averages each normalised gradient, the slow one the mean of every `period` of
    them. As printed nothing decays, so the step shrinks as 1/sqrt(t); here all three memories are
    moving averages. The gradient is normalised before the momenta rather than after, so that the
    step does not depend on its scale.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 1e-3,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9),
        period: int = 8,
        mix: float = 0.5,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        if period < 1:
            raise ValueError(f"M3: period {period} is not 1 or more")
        defaults = {"lr": lr, "betas": tuple(betas), "period": period, "mix": mix, "eps": eps}
        super().__init__(params, {**defaults, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step on the gradients in `.grad`."""
        for group in self.param_groups:
            for step, params in by_step(self.state, group["params"]).items():
                self._update(group, step, params)

    def _update(self, group: dict[str, Any], step: int, params: list[Tensor]) -> None:
        beta1, beta2, _ = group["betas"]
        grads, square = gradients(params), slots(self.state, params, "square")
        mul_(square, beta2)
        addcmul_(square, grads, grads, 1.0 - beta2)
        surprise = normalised(grads, square, 1.0 - beta2**step, group["eps"])
        fast = slots(self.state, params, "fast")
        lerp_(fast, surprise, 1.0 - beta1)
        add_(slots(self.state, params, "window"), surprise)
        if step % group["period"] == 0:
            self._turn(group, step, params)
        mul_(params, 1.0 - group["lr"] * group["weight_decay"])
        add_(params, orthogonal(product(fast, 1.0 / (1.0 - beta1**step))), alpha=-group["lr"])
        add_(params, slots(self.state, params, "direction"), alpha=-group["lr"] * group["mix"])

    def _turn(self, group: dict[str, Any], step: int, params: list[Tensor]) -> None:
        """Take the window into the slow momentum and keep the direction it gives."""
        beta3, turns = group["betas"][2], step // group["period"]
        slow, window = slots(self.state, params, "slow"), slots(self.state, params, "window")
        mul_(window, 1.0 / group["period"])
        lerp_(slow, window, 1.0 - beta3)
        zero_(window)
        corrected = product(slow, 1.0 / (1.0 - beta3**turns))
        for p, direction in zip(params, orthogonal(corrected), strict=True):
            self.state[p]["direction"] = direction


def orthogonal(tensors: Sequence[Tensor], steps: int = 5) -> list[Tensor]:
    """The nearest orthogonal matrix of each 2-D tensor, scaled to a root mean square near 0.2.

    Newton-Schulz on all matrices of one shape together; other tensors come back as they are.
    """
    found = list(tensors)
    shapes: dict[torch.Size, list[int]] = {}
    for index, tensor in enumerate(tensors):
        if tensor.ndim == 2:
            shapes.setdefault(tensor.shape, []).append(index)
    for shape, indices in shapes.items():
        together = newton_schulz(torch.stack([tensors[i] for i in indices]), steps)
        together = together * (0.2 * max(shape) ** 0.5)
        for index, matrix in zip(indices, together.unbind(), strict=True):
            found[index] = matrix.clone()
    return found


def newton_schulz(matrices: Tensor, steps: int) -> Tensor:
    """Singular values of (N, rows, columns) brought near 1, by an odd quintic polynomial."""
    a, b, c = NEWTON_SCHULZ
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.square().sum((-2, -1), keepdim=True).sqrt() + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x
