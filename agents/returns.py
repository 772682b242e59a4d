"""Lambda-returns and the running scale of returns.

Follows DreamerV3 (arXiv 2301.04104): bootstrapped lambda-returns, and advantages divided by an
exponential average of the 5th to 95th percentile range of returns, never below one.
"""

import torch
from torch import Tensor, nn


def lambda_return(reward: Tensor, live: Tensor, cont: Tensor, boot: Tensor, lam: float) -> Tensor:
    """Returns (B, T - 1) of the states 0 .. T - 2, from rows of length T.

    Row t holds the reward that came with state t; `live` (B, T) multiplies what lies beyond
    state t (discount times not terminal), `cont` (B, T) is zero where the trajectory is cut at t
    without being terminal, so that the return bootstraps there; `boot` (B, T) are values.
    R[t] = r[t+1] + live[t+1] ((1 - lam cont[t+1]) boot[t+1] + lam cont[t+1] R[t+1]).
    """
    weight = lam * cont[:, 1:]
    interim = reward[:, 1:] + (1 - weight) * live[:, 1:] * boot[:, 1:]
    decay = live[:, 1:] * weight
    value = boot[:, -1]
    out: list[Tensor] = []
    for now, left in zip(interim.unbind(1)[::-1], decay.unbind(1)[::-1], strict=True):
        value = torch.addcmul(now, left, value)
        out.append(value)
    return torch.stack(out[::-1], 1)


def standardized(x: Tensor, weight: Tensor) -> Tensor:
    """x with weighted mean 0 and deviation 1 over its last axis.

    A critic that lags behind rising returns makes every advantage positive; what was sampled is
    then reinforced whatever it was.
    """
    share = weight / weight.sum(-1, keepdim=True)
    centred = x - (share * x).sum(-1, keepdim=True)
    return centred / (share * centred.square()).sum(-1, keepdim=True).sqrt().clamp(min=1e-3)


def by_group(x: Tensor, like: Tensor) -> Tensor:
    """All of x as one row, or as a row for each group where `like` is (G,): (..., n)."""
    return x.reshape(*like.shape, -1)


class ReturnScale(nn.Module):
    """Running percentile range of returns; `forward` updates it and gives max(limit, range)."""

    low: Tensor
    high: Tensor
    share: Tensor

    def __init__(
        self, rate: float = 0.01, limit: float = 1.0, percentiles: tuple[float, float] = (5, 95)
    ):
        super().__init__()
        self.rate, self.limit = rate, limit
        self.register_buffer("low", torch.zeros(()))
        self.register_buffer("high", torch.zeros(()))
        share = torch.tensor(percentiles) / 100
        self.register_buffer("share", share, persistent=False)

    @torch.no_grad()
    def forward(self, returns: Tensor) -> Tensor:
        low, high = torch.quantile(by_group(returns, self.low), self.share, dim=-1)
        self.low.lerp_(low, self.rate)
        self.high.lerp_(high, self.rate)
        return (self.high - self.low).clamp(min=self.limit)
