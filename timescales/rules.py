"""Rules: optimizers by name, as factories of `params -> torch.optim.Optimizer`.

Steps are counted in a rule's own updates, so a slow level warms up on its own clock, and no rule
waits for the device. AdamW runs fused, which sits at the floor that memory bandwidth sets; any
other optimizer fits too: `functools.partial(torch.optim.NAdam, lr=1e-3)`.
"""

from functools import partial

from torch.optim import SGD, AdamW

from timescales.laprop import LaProp
from timescales.level import Rule
from timescales.muon import M3, Muon


def adamw(
    lr: float = 3e-4,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> Rule:
    """torch's AdamW as one fused kernel (Loshchilov & Hutter 2019)."""
    return partial(AdamW, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)


def laprop(
    lr: float = 4e-5,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-20,
    agc: float = 0.3,
    pmin: float = 1e-3,
    warmup: int = 1000,
    weight_decay: float = 0.0,
) -> Rule:
    """LaProp with adaptive gradient clipping, DreamerV3's rule; `warmup` counts own updates."""
    return partial(
        LaProp,
        lr=lr,
        betas=betas,
        eps=eps,
        agc=agc,
        pmin=pmin,
        warmup=warmup,
        weight_decay=weight_decay,
    )


def sgd(
    lr: float = 1e-2, momentum: float = 0.0, nesterov: bool = False, weight_decay: float = 0.0
) -> Rule:
    """torch's SGD. Foreach: the fused one fails where gradients come and go under momentum."""
    return partial(
        SGD, lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay, foreach=True
    )


def muon(
    lr: float = 1e-3,
    momentum: float = 0.95,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> Rule:
    """Orthogonalised momentum for matrices, AdamW for the rest, at one learning rate."""
    return partial(Muon, lr=lr, momentum=momentum, betas=betas, eps=eps, weight_decay=weight_decay)


def m3(
    lr: float = 1e-3,
    betas: tuple[float, float, float] = (0.9, 0.999, 0.9),
    period: int = 8,
    mix: float = 0.5,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> Rule:
    """Fast and slow momentum (Nested Learning's M3) as moving averages."""
    return partial(
        M3,
        lr=lr,
        betas=betas,
        period=period,
        mix=mix,
        eps=eps,
        weight_decay=weight_decay,
    )
