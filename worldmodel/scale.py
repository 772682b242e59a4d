"""Losses of different units made comparable, and summed.

Dreamer 4 (arXiv 2509.24527) divides every loss by a running estimate of its root mean square; the
rate of that estimate is not in the paper.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class RunningRMS(nn.Module):
    """A loss over its running root mean square, which starts at one and is read before it moves.

    rate: share of each batch in the running mean of squares; floor: least divisor.
    """

    square: Tensor

    def __init__(self, rate: float = 0.05, floor: float = 1e-6):
        super().__init__()
        self.rate, self.floor = rate, floor
        self.register_buffer("square", torch.ones(()))

    def forward(self, loss: Tensor, weight: Tensor | None = None) -> Tensor:
        """loss (...), unreduced -> the same, scaled; weight (...): what counts in the mean."""
        scaled = loss / self.square.sqrt().clamp(min=self.floor)
        with torch.no_grad():
            square = loss.detach().square()
            if weight is None:
                self.square.lerp_(square.mean(), self.rate)
            else:
                total = weight.sum()
                mean = (square * weight).sum() / total.clamp(min=1e-12)
                self.square.lerp_(torch.where(total > 0, mean, self.square), self.rate)
        return scaled


def weighted(losses: Mapping[str, Tensor], scales: Mapping[str, float]) -> Tensor:
    """The weighted sum of mean losses; the names must be those of the scales."""
    if losses.keys() != scales.keys():
        raise ValueError(f"losses and scales differ in {sorted(losses.keys() ^ scales.keys())}")
    return torch.stack([losses[name].mean() * scale for name, scale in scales.items()]).sum()
