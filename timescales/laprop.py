"""LaProp with adaptive gradient clipping, the optimizer of DreamerV3.

The gradient is clipped, then normalised, then averaged (Ziyin et al. 2020, arXiv 2002.04839;
clipping after Brock et al. 2021, arXiv 2102.06171, with norms of whole tensors). Normalising and
averaging run as one pass of torch's fused AdamW kernel on the momentum.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from timescales.foreach import add_, by_step, fused_adamw_, gradients, mul_, norms, runs, slots


class LaProp(Optimizer):
    """`m' = b1 m + (1 - b1) g / rms(g)`, `w' = w (1 - lr weight_decay) - lr m' / (1 - b1^t)`.

    A gradient's norm is first limited to `agc * max(pmin, norm of the parameter)`; agc 0 turns that
    off. `lr` rises linearly over the first `warmup` steps.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 4e-5,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-20,
        agc: float = 0.3,
        pmin: float = 1e-3,
        warmup: int = 1000,
        weight_decay: float = 0.0,
    ) -> None:
        numbers = {"lr": lr, "eps": eps, "agc": agc, "pmin": pmin, "warmup": warmup}
        numbers["weight_decay"] = weight_decay
        if wrong := {key: value for key, value in numbers.items() if value < 0}:
            raise ValueError(f"LaProp: {wrong} must be 0 or more")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"LaProp: betas {betas} are not in [0, 1)")
        super().__init__(params, {**numbers, "betas": tuple(betas)})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step on the gradients in `.grad`, which are clipped where they are."""
        for group in self.param_groups:
            for step, params in by_step(self.state, group["params"]).items():
                for some in runs(params):
                    self._update(group, step, some)

    def _update(self, group: dict[str, Any], step: int, params: list[Tensor]) -> None:
        beta1, beta2 = group["betas"]
        velocity = slots(self.state, params, "velocity")  # points against the gradient
        grads = gradients(params)
        if group["agc"]:
            clip_(grads, params, group["agc"], group["pmin"])
        # AdamW on the velocity itself. beta1 = 0 leaves normalisation alone, and lr * weight_decay
        # = 1 - beta1 makes the moving average. The gradients stand in for AdamW's first moment:
        # beta1 = 0 writes back what it has just read.
        fused_adamw_(
            velocity,
            grads,
            grads,
            slots(self.state, params, "square"),
            [],
            [torch.full((), float(step), device=params[0].device)] * len(params),
            lr=1.0 - beta1,
            beta1=0.0,
            beta2=beta2,
            weight_decay=1.0,
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )
        lr = group["lr"] * min(1.0, step / max(1, group["warmup"]))
        if group["weight_decay"]:
            mul_(params, 1.0 - lr * group["weight_decay"])
        add_(params, velocity, alpha=lr / (1.0 - beta1**step))


def clip_(grads: list[Tensor], params: list[Tensor], agc: float, pmin: float) -> None:
    """Scale each gradient, in place, to a norm of at most `agc * max(pmin, parameter's norm)`."""
    limits = norms(params).clamp_(min=pmin).mul_(agc)
    scales = limits.div_(norms(grads)).clamp_(max=1.0)  # a zero gradient: infinity, then 1
    mul_(grads, scales.unbind())
