"""Recursive least squares as a memory: the linear-Gaussian learner that nothing linear can beat.

Each user holds a mean and a covariance of the matrix that maps keys to values. Between two pairs
the matrix drifts back to its prior, then the pair is taken in by Bayes' rule:

    W- = W0 + g (W - W0),  P- = P0 + g^2 (P - P0);   u = k P-,  s = 1 / (noise + u k)
    W' = W- + s u^T (v - k W-),  P' = P- - s u^T u

g = 1 is recursive least squares. Textbook forgetting, P / g, grows without bound in directions
that no key visits; the drift to the prior (an Ornstein-Uhlenbeck process) forgets as fast, never
leaves the prior's covariance, and keeps P positive where rounding would not. noise = 1 / b - 1;
b and g are gates of x. The prior, `start` and `spread`, is slow: it is what other users taught.

Shapes: B users, H heads, D width of a head; N = B * H.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from nested import linear
from nested.base import Associative

EPSILON = 1e-6  # the least noise: two equal keys without any would divide by zero


class RLSState(NamedTuple):
    """What a user knows of its matrix, and how wrong it was about the last pair."""

    weights: Tensor  # (B, H, D, D), keys by values: the mean
    covariance: Tensor  # (B, H, D, D), of any column of the matrix; symmetric bit for bit
    error: Tensor  # (B, H, D), value minus recalled, before the write; no gradient

    @property
    def surprise(self) -> Tensor:
        """Squared error before the last write, mean over heads and values: (B,)."""
        return self.error.square().flatten(1).mean(1)


class RLSMemory(Associative):
    """Linear regression by Bayes' rule, on a matrix that drifts back to its prior."""

    def __init__(self, dim_in: int, dim_out: int, dim: int = 32, heads: int = 1):
        super().__init__(dim_in, dim_out, dim, heads, gates=(0.9, 0.99))
        self.start = nn.Parameter(torch.zeros(heads, dim, dim))
        self.spread = nn.Parameter(torch.eye(dim).repeat(heads, 1, 1))

    def prior(self) -> Tensor:
        """The covariance (H, D, D) that a user starts from, symmetric bit for bit."""
        product = torch.bmm(self.spread, self.spread.mT)
        return (product + product.mT) / 2

    def initial(self, batch: int) -> RLSState:
        """The state of `batch` users that have written nothing."""
        weights, covariance = (x.expand(batch, -1, -1, -1) for x in (self.start, self.prior()))
        return RLSState(weights, covariance, weights.new_zeros(batch, self.heads, self.dim))

    def learn(self, z: Tensor, state: RLSState, reset: Tensor | None) -> tuple[Tensor, RLSState]:
        """Reset, write, read: z (B, H, P) raw -> what the query brings back (B, H, D), state."""
        weights, covariance, _ = state
        prior = self.prior()
        if reset is not None:
            mask = reset[:, None, None, None]
            weights = torch.where(mask, self.start, weights)
            covariance = torch.where(mask, prior, covariance)
        p = linear.parts(z, self.dim)
        keep = p.gates[..., 1:].unsqueeze(3)  # (B, H, 1, 1)
        weights = torch.lerp(self.start, weights, keep)
        covariance = torch.lerp(prior, covariance, keep * keep)
        k = p.qk[:, :, 1:].flatten(0, 1)  # (N, 1, D)
        u = torch.bmm(k, covariance.flatten(0, 1)).view(p.value.shape)
        trust = p.gates[..., :1]
        seen = linear.vecdot(p.qk[:, :, 1], u).unsqueeze(2).clamp_min(0)
        scale = trust / torch.addcmul(1 - trust + EPSILON, trust, seen)
        error = p.value - torch.bmm(k, weights.flatten(0, 1)).view(p.value.shape)
        weights = torch.addcmul(weights, (scale * u).unsqueeze(3), error.unsqueeze(2))
        half = scale.sqrt() * u  # of one vector with itself: what is symmetric stays so
        covariance = torch.addcmul(covariance, half.unsqueeze(3), half.unsqueeze(2), value=-1)
        state = RLSState(weights, covariance, error.detach())
        return self.recall(p.qk[:, :, 0], state), state

    def recall(self, q: Tensor, state: RLSState) -> Tensor:
        """What unit queries (B, H, D) bring back: (B, H, D)."""
        weights = state.weights.flatten(0, 1)
        return torch.bmm(q.flatten(0, 1).unsqueeze(1), weights).view(q.shape)
