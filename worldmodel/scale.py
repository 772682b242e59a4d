"""Losses of different units made comparable, and summed.

Dreamer 4 (arXiv 2509.24527) divides every loss by a running estimate of its root mean square. The
rate of that estimate is not in the paper.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class RunningRMS(nn.Module):
    """A loss over its running root mean square, which takes this batch in first.

    rate: share of a batch in the running mean of squares, once 1 / rate batches were seen; the
    first ones are averaged, so that no initial value lingers. floor: least divisor.
    """

    square: Tensor
    count: Tensor

    def __init__(self, rate: float = 0.05, floor: float = 1e-6):
        super().__init__()
        self.rate, self.floor = rate, floor
        self.register_buffer("square", torch.zeros(()))
        self.register_buffer("count", torch.zeros(()))

    def forward(self, loss: Tensor, weight: Tensor | None = None) -> Tensor:
        """loss (...), unreduced -> the same, scaled; weight (...): what counts in the mean."""
        with torch.no_grad():
            square = loss.detach().square().to(self.square.dtype)
            weight = torch.ones_like(square) if weight is None else weight.to(square.dtype)
            total = weight.sum()
            self.count.add_(total > 0)  # a batch in which nothing counts changes nothing
            rate = (1 / self.count.clamp(min=1)).clamp(min=self.rate) * (total > 0)
            mean = (square * weight).sum() / total.clamp(min=1e-12)
            self.square.copy_(torch.lerp(self.square, mean, rate))
        return loss / self.square.sqrt().clamp(min=self.floor)


def weighted(losses: Mapping[str, Tensor], scales: Mapping[str, float]) -> Tensor:
    """The weighted sum of mean losses; the names must be those of the scales."""
    if losses.keys() != scales.keys():
        raise ValueError(f"losses and scales differ in {sorted(losses.keys() ^ scales.keys())}")
    return torch.stack([losses[name].mean() * scale for name, scale in scales.items()]).sum()
