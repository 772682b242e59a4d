"""The linear-Gaussian population against direct computation: grids, joint Gaussians, gradients."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from experiments.benchmarks.population.linear import (
    LinearUsers,
    Prior,
    Session,
    em,
    em_step,
    excess,
    population_mean,
    posterior,
    response,
    statistics,
)
from experiments.envs.population import SIZE, Population


def mixture(clusters: int = 3, dim: int = 2) -> Prior:
    draw = torch.Generator().manual_seed(1)
    root = torch.randn(dim, dim, generator=draw, dtype=torch.float64)
    mean = 1.5 * torch.randn(clusters, dim, generator=draw, dtype=torch.float64)
    weight = torch.rand(clusters, generator=draw, dtype=torch.float64)
    eye = torch.eye(dim, dtype=torch.float64)
    noise = torch.tensor(0.7, dtype=torch.float64)
    return Prior(weight / weight.sum(), mean, 0.3 * root @ root.T + 0.1 * eye, noise)


def sampled(prior: Prior, users: int, steps: int, seed: int = 0) -> Session:
    draw = torch.Generator().manual_seed(seed)
    dim = len(prior.cov)
    cluster = torch.multinomial(prior.weight, users, replacement=True, generator=draw)
    theta = torch.randn(users, dim, generator=draw, dtype=torch.float64)
    theta = prior.mean[cluster] + theta @ torch.linalg.cholesky(prior.cov).T
    xs = torch.randn(users, steps, dim, generator=draw, dtype=torch.float64)
    noise = torch.randn(users, steps, generator=draw, dtype=torch.float64)
    return Session(theta, xs, (xs @ theta[:, :, None]).squeeze(2) + prior.noise * noise)


def integrated(prior: Prior, xs: Tensor, ys: Tensor) -> tuple[Tensor, Tensor]:
    """Posterior mean (2,) and log evidence of one user, summed over a grid of theta."""
    axis = torch.linspace(-9, 9, 241, dtype=torch.float64)
    theta = torch.cartesian_prod(axis, axis)
    parts = [
        MultivariateNormal(mean, prior.cov).log_prob(theta) + weight.log()
        for weight, mean in zip(prior.weight, prior.mean, strict=True)
    ]
    errors = (ys - theta @ xs.T) / prior.noise
    log = torch.stack(parts).logsumexp(0) - 0.5 * errors.square().sum(1)
    log = log - len(ys) * torch.log(prior.noise * math.sqrt(2 * math.pi))
    evidence = log.logsumexp(0) + 2 * torch.log(axis[1] - axis[0])
    return log.softmax(0) @ theta, evidence


@pytest.mark.parametrize("steps", [1, 4])
def test_the_posterior_is_bayes_rule_summed_over_a_grid(steps: int):
    prior = mixture()
    session = sampled(prior, 3, steps)
    found = posterior(prior, session.stats())
    for user in range(3):
        mean, evidence = integrated(prior, session.xs[user], session.ys[user])
        torch.testing.assert_close(found.mean[user], mean, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.evidence[user], evidence, rtol=1e-5, atol=1e-5)


def test_the_evidence_is_that_of_the_joint_gaussian_of_the_answers():
    prior = mixture(clusters=2, dim=4)
    session = sampled(prior, 5, 3)
    found = posterior(prior, session.stats())
    for user in range(5):
        xs, ys = session.xs[user], session.ys[user]
        cov = xs @ prior.cov @ xs.T + prior.noise.square() * torch.eye(3, dtype=xs.dtype)
        parts = torch.stack([MultivariateNormal(xs @ m, cov).log_prob(ys) for m in prior.mean])
        torch.testing.assert_close(found.evidence[user], (parts + prior.weight.log()).logsumexp(0))
        torch.testing.assert_close(found.share[user], (parts + prior.weight.log()).softmax(0))


def test_one_gaussian_is_ridge_regression():
    prior = mixture(clusters=1, dim=4)
    session = sampled(prior, 6, 5)
    found = posterior(prior, session.stats())
    whiten = torch.linalg.inv(torch.linalg.cholesky(prior.cov)) * prior.noise
    rows = torch.cat([session.xs, whiten.expand(6, -1, -1)], 1)
    goals = torch.cat([session.ys, (whiten @ prior.mean[0]).expand(6, -1)], 1)
    expected = torch.linalg.lstsq(rows, goals.unsqueeze(2)).solution.squeeze(2)
    torch.testing.assert_close(found.mean, expected)
    fast = response(session.stats(), prior.cov, prior.noise)
    torch.testing.assert_close(prior.centre + fast.moved(prior.centre), expected)


def test_no_other_estimate_of_a_user_has_less_loss():
    prior = mixture(clusters=3, dim=3)
    session = sampled(prior, 4000, 4)
    loss = excess(posterior(prior, session.stats()).mean, session.theta)
    for other in (
        prior.pooled(),
        prior._replace(noise=prior.noise * 1.5),
        prior._replace(mean=prior.mean + 0.2),
    ):
        worse = excess(posterior(other, session.stats()).mean, session.theta) - loss
        assert worse.mean() > 2 * worse.std() / 4000**0.5


def test_the_pooled_prior_has_the_moments_of_the_mixture():
    prior = mixture(clusters=3, dim=3)
    theta = sampled(prior, 200_000, 1).theta
    pooled = prior.pooled()
    torch.testing.assert_close(pooled.centre, theta.mean(0), atol=0.02, rtol=0)
    torch.testing.assert_close(pooled.cov, torch.cov(theta.T), atol=0.03, rtol=0.02)


def test_the_population_mean_is_the_top_of_the_likelihood_of_everything():
    prior = mixture(clusters=1, dim=3)
    session = sampled(prior, 40, 2)  # fewer interactions than numbers of a user
    stats = session.stats()
    mean, error = population_mean(stats, prior.cov, prior.noise)

    def likelihood(m: Tensor) -> Tensor:
        return posterior(prior._replace(mean=m[None]), stats).evidence.sum()

    slope = torch.autograd.functional.jacobian(likelihood, mean)
    assert isinstance(slope, Tensor)
    torch.testing.assert_close(slope, torch.zeros(3, dtype=torch.float64), atol=1e-9, rtol=0)
    curvature = torch.autograd.functional.hessian(likelihood, mean)
    assert isinstance(curvature, Tensor)
    torch.testing.assert_close(-torch.linalg.inv(curvature), error)


def test_the_population_mean_errs_as_its_covariance_says():
    prior = mixture(clusters=1, dim=3)
    found = [population_mean(sampled(prior, 30, 4, seed).stats(), prior.cov, prior.noise)
             for seed in range(300)]  # fmt: skip
    errors = torch.stack([mean - prior.centre for mean, _ in found])
    expected = torch.stack([cov for _, cov in found]).mean(0)
    torch.testing.assert_close(errors.T @ errors / 300, expected, rtol=0.25, atol=0.002)


def test_em_climbs_and_finds_the_prior():
    prior = mixture(clusters=2, dim=3)
    prior = prior._replace(mean=3.0 * prior.mean)
    stats = sampled(prior, 3000, 8).stats()
    guess = prior._replace(mean=prior.mean + 0.5, noise=prior.noise * 2, cov=prior.cov * 3)
    climbed = [guess]
    for _ in range(6):
        climbed.append(em_step(climbed[-1], stats))
    heights = [float(posterior(p, stats).evidence.sum()) for p in climbed]
    assert heights == sorted(heights)
    found = em(stats, 2, 20, torch.Generator().manual_seed(0))
    best = float(posterior(prior, stats).evidence.mean())
    assert float(posterior(found, stats).evidence.mean()) > best - 0.002
    torch.testing.assert_close(found.noise, prior.noise, rtol=0.02, atol=0)
    torch.testing.assert_close(found.cov, prior.cov, rtol=0.1, atol=0.05)
    order = torch.cdist(prior.mean, found.mean).argmin(1)
    torch.testing.assert_close(found.mean[order], prior.mean, rtol=0, atol=0.15)


def test_users_answer_with_their_hidden_numbers():
    population = Population(seed=2, within=tuple(0.1 * (i + 1) for i in range(SIZE)))
    users = LinearUsers(population, noise=0.3)
    ids = np.arange(2000)
    session = users.session(ids, 6, torch.Generator().manual_seed(0))
    np.testing.assert_array_equal(session.theta.numpy(), population.contexts(ids))
    left = session.ys - (session.xs @ session.theta[:, :, None]).squeeze(2)
    assert float(left.std()) == pytest.approx(0.3, rel=0.03)
    prior = users.prior()
    assert prior.mean.shape == (12, SIZE)
    assert prior.cov.diagonal().sqrt().tolist() == pytest.approx([0.1 * i for i in range(1, 9)])
    torch.testing.assert_close(session.theta.mean(0), prior.centre, rtol=0, atol=0.08)
    few = session.stats(2)
    torch.testing.assert_close(few.gram, statistics(session.xs[:, :2], session.ys[:, :2]).gram)
    assert few.count.tolist() == [2.0] * 2000
