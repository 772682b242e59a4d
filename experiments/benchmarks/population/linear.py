"""Users whose best answer is known: a linear-Gaussian population, adapted to and consolidated.

A user is theta ~ N(mean of its cluster, cov), and answers y = theta . x + noise for x ~ N(0, I).
What can be learned about one user from n interactions (the posterior mean) and about all of them
from many users (the prior) is closed form, or EM where clusters are unknown; a learner is measured
against these. Everything about a user goes through sufficient statistics.

Shapes: B users, T interactions, C clusters, D numbers of a user; float64.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from experiments.envs.population import SIZE, Population


class Prior(NamedTuple):
    """A mixture of Gaussians of one shape, and the noise of answers."""

    weight: Tensor  # (C,) shares of the clusters
    mean: Tensor  # (C, D)
    cov: Tensor  # (D, D) within a cluster
    noise: Tensor  # () standard deviation

    @property
    def centre(self) -> Tensor:
        """The mean (D,) over all users."""
        return self.weight @ self.mean

    def pooled(self) -> "Prior":
        """The one Gaussian with the mean and covariance of the mixture."""
        apart = self.mean - self.centre
        between = apart.T @ (self.weight[:, None] * apart)
        one = torch.ones(1, dtype=self.mean.dtype)
        return Prior(one, self.centre[None], self.cov + between, self.noise)


class Stats(NamedTuple):
    """All that the interactions of B users say about them."""

    gram: Tensor  # (B, D, D) sum of x x'
    moment: Tensor  # (B, D) sum of x y
    square: Tensor  # (B,) sum of y^2
    count: Tensor  # (B,)


class Posterior(NamedTuple):
    """What is known of B users."""

    mean: Tensor  # (B, D) over all clusters: the Bayes-optimal estimate under squared error
    share: Tensor  # (B, C) probabilities of the clusters
    within: Tensor  # (B, C, D) means, given the cluster
    cov: Tensor  # (B, D, D), given the cluster
    evidence: Tensor  # (B,) log probability of the answers


class Session(NamedTuple):
    """Interactions of B users."""

    theta: Tensor  # (B, D) hidden
    xs: Tensor  # (B, T, D)
    ys: Tensor  # (B, T)

    def stats(self, count: int | None = None) -> Stats:
        """Of the first `count` interactions."""
        return statistics(self.xs[:, :count], self.ys[:, :count])


@dataclass(frozen=True)
class LinearUsers:
    """The users of a population as weights of a linear map."""

    users: Population
    noise: float = 0.5

    def prior(self, epoch: int = 0) -> Prior:
        """The true prior of the splits that hold the seen clusters."""
        seen = self.users.clusters - self.users.held
        within = np.broadcast_to(np.asarray(self.users.within, float), SIZE)
        return Prior(
            torch.full((seen,), 1.0 / seen, dtype=torch.float64),
            torch.from_numpy(self.users.means(epoch)[:seen]),
            torch.from_numpy(np.diag(np.square(within))),
            torch.tensor(self.noise, dtype=torch.float64),
        )

    def session(self, ids: np.ndarray, steps: int, draw: torch.Generator) -> Session:
        """`steps` interactions of users (B,)."""
        theta = torch.from_numpy(self.users.contexts(ids))
        xs = torch.randn(len(theta), steps, SIZE, generator=draw, dtype=torch.float64)
        noise = torch.randn(len(theta), steps, generator=draw, dtype=torch.float64)
        return Session(theta, xs, (xs @ theta[:, :, None]).squeeze(2) + self.noise * noise)


def statistics(xs: Tensor, ys: Tensor) -> Stats:
    """Sufficient statistics of xs (B, T, D) and ys (B, T)."""
    count = torch.full((len(xs),), float(xs.shape[1]), dtype=xs.dtype)
    moment = (xs * ys[:, :, None]).sum(1)
    return Stats(xs.mT @ xs, moment, ys.square().sum(1), count)


def excess(estimate: Tensor, theta: Tensor) -> Tensor:
    """Expected squared error of answers beyond the noise: estimates (..., D) -> (...)."""
    return (estimate - theta).square().sum(-1)


def posterior(prior: Prior, stats: Stats) -> Posterior:
    """What B users are, given their interactions, by Bayes' rule."""
    variance = prior.noise.square()
    precision = torch.linalg.inv(prior.cov)
    factor = torch.linalg.cholesky(precision + stats.gram / variance)
    start = prior.mean @ precision  # (C, D)
    pull = start + (stats.moment / variance)[:, None]  # (B, C, D)
    within = torch.cholesky_solve(pull.mT, factor).mT
    determinant = 2.0 * factor.diagonal(dim1=1, dim2=2).log().sum(1) + torch.logdet(prior.cov)
    squares = (prior.mean * start).sum(1) - (pull * within).sum(2)  # (B, C)
    likelihood = -0.5 * (
        stats.count * torch.log(2 * math.pi * variance) + determinant + stats.square / variance
    )
    joint = likelihood[:, None] - 0.5 * squares + prior.weight.log()
    evidence = joint.logsumexp(1)
    share = (joint - evidence[:, None]).exp()
    mean = (share[:, :, None] * within).sum(1)
    return Posterior(mean, share, within, torch.cholesky_inverse(factor), evidence)


class Response(NamedTuple):
    """How the estimates of B users depend on the prior's mean m: m + offset - pull m."""

    offset: Tensor  # (B, D)
    pull: Tensor  # (B, D, D)

    def moved(self, start: Tensor) -> Tensor:
        """Displacements (B, D) of the posterior means from a prior mean (D,)."""
        return self.offset - self.pull @ start

    def equations(self, cov: Tensor) -> tuple[Tensor, Tensor]:
        """What these users add to the normal equations of the population's mean: (D,), (D, D)."""
        inverse = torch.linalg.inv(cov)
        return inverse @ self.offset.sum(0), inverse @ self.pull.sum(0)


def response(stats: Stats, cov: Tensor, noise: Tensor) -> Response:
    """Of users N(m, cov) with noise of that standard deviation, for every m at once."""
    variance = noise.square()
    factor = torch.linalg.cholesky(torch.linalg.inv(cov) + stats.gram / variance)
    right = torch.cat([stats.moment[:, :, None], stats.gram], 2) / variance
    solved = torch.cholesky_solve(right, factor)
    return Response(solved[:, :, 0], solved[:, :, 1:])


def population_mean(stats: Stats, cov: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """The best unbiased estimate (D,) of the mean over users, and its covariance (D, D).

    Hierarchical ridge: generalised least squares on all interactions at once, where those of one
    user share theta. `cov` and `noise` of the users are known.
    """
    weighted, precision = response(stats, cov, noise).equations(cov)
    error = torch.linalg.inv(precision)
    return error @ weighted, error


def em_step(prior: Prior, stats: Stats) -> Prior:
    """A prior that explains all users' interactions at least as well, from what it says of them."""
    found = posterior(prior, stats)
    mass = found.share.sum(0)  # (C,)
    mean = torch.einsum("bc,bcd->cd", found.share, found.within) / mass[:, None].clamp_min(1e-9)
    apart = found.within - mean
    spread = torch.einsum("bc,bcd,bce->de", found.share, apart, apart)
    cov = (spread + found.cov.sum(0)) / len(stats.count)
    return Prior(mass / mass.sum(), mean, cov, _noise(found, stats))


def _noise(found: Posterior, stats: Stats) -> Tensor:
    """The standard deviation of what the posterior leaves unexplained."""
    fitted = torch.einsum("bcd,bde->bce", found.within, stats.gram)
    left = ((fitted - 2.0 * stats.moment[:, None]) * found.within).sum(2)  # (B, C)
    unsure = (stats.gram * found.cov).sum((1, 2))
    total = (stats.square + (found.share * left).sum(1) + unsure).sum()
    return (total / stats.count.sum()).sqrt()


def em(stats: Stats, clusters: int, steps: int, draw: torch.Generator, starts: int = 4) -> Prior:
    """The prior of many users, estimated by EM.

    With clusters: from `starts` draws of far-apart users (k-means++), each followed for a quarter
    of the steps; the one that explains the interactions best goes on.
    """
    eye = torch.eye(stats.moment.shape[1], dtype=stats.moment.dtype)
    noise = (0.5 * stats.square.sum() / stats.count.sum()).sqrt()
    one = _climb(Prior(eye.new_ones(1), eye.new_zeros(1, len(eye)), eye, noise), stats, steps)
    if clusters == 1:
        return one
    points, shares = posterior(one, stats).mean, eye.new_full((clusters,), 1.0 / clusters)
    cov = one.cov / clusters ** (2 / len(eye))
    found = [Prior(shares, _spread_out(points, clusters, draw), cov, one.noise)
             for _ in range(starts)]  # fmt: skip
    found = [_climb(prior, stats, steps // 4) for prior in found]
    best = max(found, key=lambda prior: float(posterior(prior, stats).evidence.sum()))
    return _climb(best, stats, steps)


def _climb(prior: Prior, stats: Stats, steps: int) -> Prior:
    for _ in range(steps):
        prior = em_step(prior, stats)
    return prior


def _spread_out(points: Tensor, count: int, draw: torch.Generator) -> Tensor:
    """`count` of the points (B, D), each drawn by its squared distance to those before it."""
    chosen = points[torch.randint(len(points), (1,), generator=draw)]
    for _ in range(count - 1):
        nearest = torch.cdist(points, chosen).square().amin(1)
        chosen = torch.cat([chosen, points[torch.multinomial(nearest, 1, generator=draw)]])
    return chosen
