"""Fast learners of a linear user: from the slow weights, one estimate after each interaction.

Each is a function (session, prior) -> estimates (B, T, D). The prior is what consolidation knows of
the population: its mean is the slow weights that all start from, and some use the rest of it.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from experiments.benchmarks.population.linear import Prior, Session, posterior
from nested import RLSMemory
from nested import linear as memory
from nested.adapt import Adapter

Learner = Callable[[Session, Prior], Tensor]


def frozen(session: Session, prior: Prior) -> Tensor:
    """The slow weights."""
    return prior.centre.expand_as(session.xs)


def delta(session: Session, prior: Prior, rate: float) -> Tensor:
    """The rule of `nested.DeltaMemory`: what the key recalls is replaced, at a rate."""
    rates = torch.full_like(session.ys, rate).logit()
    zs = pairs(session, rates)
    weights = _columns(frozen(session, prior)[:, :1])
    found: list[Tensor] = []
    for z in zs.unbind(1):
        _, weights, _ = memory.step(z, weights, weights[0], None, 1)
        found.append(weights[:, 0, :, 0])
    return torch.stack(found, 1)


def pairs(session: Session, *gates: Tensor) -> Tensor:
    """Interactions as a memory of nested/ takes them (B, T, 1, P): query, key, value, raw gates.

    Memories scale keys to unit length, so the value is y / |x|, in the first of D columns.
    """
    xs, ys = session.xs, session.ys
    values = torch.zeros_like(xs)
    values[..., 0] = ys / torch.linalg.vector_norm(xs, dim=2)
    return torch.cat([xs, xs, values, torch.stack(gates, 2)], 2).unsqueeze(2)


def _columns(theta: Tensor) -> Tensor:
    """Weights (..., D, D) of a memory whose first column is theta (..., D)."""
    return torch.cat([theta.unsqueeze(-1), theta.new_zeros(*theta.shape, theta.shape[-1] - 1)], -1)


def sgd(session: Session, prior: Prior, rate: float, momentum: float = 0.0) -> Tensor:
    """Gradient steps on each interaction's squared error, with heavy-ball momentum."""
    theta = frozen(session, prior)[:, 0]
    velocity = torch.zeros_like(theta)
    found: list[Tensor] = []
    for x, y in zip(session.xs.unbind(1), session.ys.unbind(1), strict=True):
        velocity = momentum * velocity + error(theta, x, y) * x
        theta = theta + rate * velocity
        found.append(theta)
    return torch.stack(found, 1)


def window(session: Session, prior: Prior, rate: float, last: int = 32, steps: int = 6) -> Tensor:
    """`nested.Adapter`: after each interaction, some steps on the window of the `last` ones."""

    def loss(params: dict[str, Tensor], rows: Any) -> Tensor:
        xs, ys = rows
        return 0.5 * (xs @ params["weight"][0] - ys).square().mean()

    adapter = Adapter(linear(prior.centre), ".", loss, lr=rate, steps=steps)
    state, found = adapter.initial(len(session.xs)), list[Tensor]()
    for t in range(1, session.ys.shape[1] + 1):
        seen = slice(max(0, t - last), t)
        state, _ = adapter(state, (session.xs[:, seen], session.ys[:, seen]))
        found.append(adapter.weights(state)["weight"].detach().squeeze(1))
    return torch.stack(found, 1)


def recursive(session: Session, prior: Prior, shape: str = "full") -> Tensor:
    """`nested.RLSMemory`: recursive least squares, started from the pooled prior.

    `shape`: "full" covariance, or "scalar" for a multiple of the identity of the same trace.
    """
    pooled = prior.pooled()
    cov = pooled.cov
    if shape == "scalar":
        cov = torch.eye(len(cov), dtype=cov.dtype) * cov.diagonal().mean()
    rls = RLSMemory(1, 1, dim=len(cov)).to(cov.dtype)
    # of a pair with a unit key the noise is 1 / b - 1; nothing is forgotten
    trust = session.xs.square().sum(2).log() - 2.0 * pooled.noise.log()
    zs = pairs(session, trust, torch.full_like(trust, torch.inf))
    found: list[Tensor] = []
    with torch.no_grad():
        rls.start.copy_(_columns(pooled.mean))
        rls.spread.copy_(torch.linalg.cholesky(cov)[None])
        state = rls.initial(len(zs))
        for z in zs.unbind(1):
            _, state = rls.learn(z, state, None)
            found.append(state.weights[:, 0, :, 0])
    return torch.stack(found, 1)


def bayes(session: Session, prior: Prior) -> Tensor:
    """The posterior mean: optimal under a true prior, empirical Bayes under an estimated one."""
    steps = range(1, session.ys.shape[1] + 1)
    return torch.stack([posterior(prior, session.stats(t)).mean for t in steps], 1)


def error(theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """What is wrong with the answers to x (B, D), (B, 1)."""
    return (y - (theta * x).sum(1)).unsqueeze(1)


def linear(weights: Tensor) -> nn.Linear:
    """A linear map of these weights (D,), without a bias."""
    module = nn.Linear(len(weights), 1, bias=False, dtype=weights.dtype)
    with torch.no_grad():
        module.weight.copy_(weights[None])
    return module


# What is tuned, over which grid, on users that are not reported.
GRIDS: dict[str, list[Learner]] = {
    "delta": [partial(delta, rate=r) for r in (0.2, 0.3, 0.5, 0.7, 0.85, 1.0)],
    "SGD": [partial(sgd, rate=r) for r in (0.01, 0.02, 0.04, 0.06, 0.08, 0.11)],
    "momentum": [
        partial(sgd, rate=r, momentum=m) for m in (0.5, 0.8) for r in (0.005, 0.01, 0.02, 0.04)
    ],
    "adapter, window": [partial(window, rate=r) for r in (0.03, 0.05, 0.07, 0.1)],
}
FIXED: dict[str, Learner] = {
    "frozen": frozen,
    "RLS, scalar prior": partial(recursive, shape="scalar"),
    "RLS": recursive,
    "empirical Bayes": bayes,
}
