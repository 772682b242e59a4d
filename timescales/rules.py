"""Rules: optimizers by name, as factories of `params -> torch.optim.Optimizer`.

AdamW and plain SGD run as one fused kernel, which sits at the memory-bandwidth floor; the others
are foreach. Steps are counted in the rule's own updates, so a slow level warms up on its own clock,
and no rule waits for the device.
"""

from collections import defaultdict
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer

from timescales.level import Rule


def adamw(
    lr: float = 3e-4,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> Rule:
    """torch's AdamW as one fused kernel (Loshchilov & Hutter 2019)."""
    return partial(AdamW, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)


def sgd(
    lr: float = 1e-2, momentum: float = 0.0, nesterov: bool = False, weight_decay: float = 0.0
) -> Rule:
    """torch's SGD; fused without momentum (the fused one fails where gradients come and go)."""
    kernel: dict[str, Any] = {"foreach": True} if momentum else {"fused": True}
    return partial(
        SGD, lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay, **kernel
    )


def laprop(
    lr: float = 4e-5,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-20,
    clip: float = 0.3,
    pmin: float = 1e-3,
    warmup: int = 1000,
    weight_decay: float = 0.0,
) -> Rule:
    """LaProp with adaptive gradient clipping, as DreamerV3 trains; clip 0 turns that off."""
    return partial(
        LaProp,
        lr=lr,
        betas=betas,
        eps=eps,
        clip=clip,
        pmin=pmin,
        warmup=warmup,
        weight_decay=weight_decay,
    )


class LaProp(Optimizer):
    """Normalise, then momentum (Ziyin et al. 2020), after adaptive clipping (Brock et al. 2021).

    A gradient is scaled down to `clip` times the norm of its tensor, at least `clip * pmin`;
    divided by its root mean square over 1/(1 - beta2) steps; averaged over 1/(1 - beta1) steps.
    `lr` rises linearly over `warmup` steps.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        clip: float,
        pmin: float,
        warmup: int,
        weight_decay: float,
    ) -> None:
        if lr < 0 or eps < 0 or clip < 0 or pmin < 0 or warmup < 0 or weight_decay < 0:
            raise ValueError("LaProp: lr, eps, clip, pmin, warmup and weight_decay are 0 or more")
        if not (0 <= betas[0] < 1 and 0 <= betas[1] < 1):
            raise ValueError(f"LaProp: betas {betas} are not in [0, 1)")
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "clip": clip,
            "pmin": pmin,
            "warmup": warmup,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step on the gradients in `.grad`."""
        for group in self.param_groups:
            for step, params in by_step(self.state, group["params"]).items():
                self._update(group, step, params)

    def _update(self, group: dict[str, Any], step: int, params: list[Tensor]) -> None:
        beta1, beta2 = group["betas"]
        grads = [p.grad for p in params if p.grad is not None]
        if group["clip"] > 0:
            grads = clipped(params, grads, group["clip"], group["pmin"])
        # AdamW's kernel on the momentum itself: beta1 = 0 normalises the gradient, the decay of
        # lr * weight_decay = 1 - beta1 makes the moving average. One pass over the memory; the
        # gradients stand in for the first moment, which beta1 = 0 writes back as it reads it.
        torch._fused_adamw_(
            slots(self.state, params, "velocity"),
            grads,
            grads,
            slots(self.state, params, "square"),
            [],
            [torch.full((), float(step), device=params[0].device)] * len(params),
            lr=1 - beta1,
            beta1=0.0,
            beta2=beta2,
            weight_decay=1.0,
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )
        lr = group["lr"] * min(1.0, step / max(1, group["warmup"]))
        if group["weight_decay"]:
            torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
        # velocity points against the gradient
        torch._foreach_add_(
            params, slots(self.state, params, "velocity"), alpha=lr / (1 - beta1**step)
        )


def clipped(params: list[Tensor], grads: list[Tensor], clip: float, pmin: float) -> list[Tensor]:
    """New gradients of norm at most `clip * max(pmin, norm of the parameter)`, tensor by tensor."""
    limit = torch.stack(torch._foreach_norm(params)).clamp_(min=pmin).mul_(clip)
    scale = limit.div_(torch.stack(torch._foreach_norm(grads))).clamp_(max=1.0)
    return list(torch._foreach_mul(grads, list(scale.unbind())))


def by_step(state: dict[Tensor, Any], params: Iterable[Tensor]) -> dict[int, list[Tensor]]:
    """Parameters that have a gradient, by the number of this step of theirs."""
    found: dict[int, list[Tensor]] = defaultdict(list)
    for p in params:
        if p.grad is not None:
            state[p]["step"] = state[p].get("step", 0) + 1
            found[state[p]["step"]].append(p)
    return found


def slots(state: dict[Tensor, Any], params: list[Tensor], key: str) -> list[Tensor]:
    """The state tensors called `key`, zeros at first."""
    for p in params:
        if key not in state[p]:
            state[p][key] = torch.zeros_like(p, memory_format=torch.preserve_format)
    return [state[p][key] for p in params]
