"""A small regression in float64 that every schedule is tried on, and plain ways to run it."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from timescales import Timescales


def model(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Three linear layers; the same weights at each call."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        layers = (nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2))
        return nn.Sequential(*layers).to(dtype)


def loss(module: nn.Module, step: int) -> Tensor:
    """Loss on the batch of a step; the target drifts, so that no schedule comes to rest."""
    generator = torch.Generator().manual_seed(1000 + step)
    dtype = next(module.parameters()).dtype
    x = torch.randn(8, 4, generator=generator, dtype=dtype)
    target = torch.stack([x.sum(1).sin(), (x[:, 0] * (1 + step / 20)).cos()], 1)
    return (module(x) - target).square().mean()


def run(
    module: nn.Module,
    timescales: Timescales,
    steps: range,
    after: Callable[[int], object] = lambda step: None,
) -> None:
    """Backward and tick; `after` comes after each."""
    for step in steps:
        loss(module, step).backward()
        timescales.tick("update")
        after(step)


def gradients(module: nn.Module, step: int) -> list[Tensor]:
    """Gradients of the loss of a step, as new tensors."""
    return list(torch.autograd.grad(loss(module, step), list(module.parameters())))


def values(module: nn.Module) -> list[Tensor]:
    """Copies of the parameters."""
    return [p.detach().clone() for p in module.parameters()]


def distance(found: Mapping[str, Tensor] | nn.Module, expected: list[Tensor]) -> float:
    """Largest difference of any entry."""
    tensors = found.parameters() if isinstance(found, nn.Module) else found.values()
    pairs = zip(tensors, expected, strict=True)
    return max(float((a.detach() - b).abs().max()) for a, b in pairs)


def same(left: nn.Module, right: nn.Module) -> bool:
    """Bit for bit."""
    pairs = zip(left.parameters(), right.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)
