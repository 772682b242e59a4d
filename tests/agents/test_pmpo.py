"""PMPO against its equation, written out for each state."""

import torch

from agents.pmpo import pmpo


def test_the_loss_is_the_paper_s():
    g = torch.Generator().manual_seed(0)
    logp, advantage, kl = torch.randn(3, 4, 5, generator=g, dtype=torch.float64)
    advantage[0, 0] = 0.0  # counts as good
    loss = pmpo(logp, advantage, kl, torch.ones_like(logp), alpha=0.3, beta=0.2)
    good = [x for x, a in zip(logp.flatten(), advantage.flatten(), strict=True) if a >= 0]
    bad = [x for x, a in zip(logp.flatten(), advantage.flatten(), strict=True) if a < 0]
    expected = 0.7 * sum(bad) / len(bad) - 0.3 * sum(good) / len(good) + 0.2 * kl.sum() / 20
    assert loss.shape == (4, 5)
    assert torch.allclose(loss.mean(), expected, rtol=1e-12)


def test_only_the_sign_of_an_advantage_matters():
    logp, advantage, kl = torch.randn(3, 4, 5)
    weight = torch.ones_like(logp)
    assert torch.equal(pmpo(logp, advantage, kl, weight), pmpo(logp, 100 * advantage, kl, weight))


def test_states_without_weight_count_nowhere():
    logp, advantage, kl = torch.randn(3, 4, 5)
    weight = torch.ones_like(logp)
    weight[:, 3:] = 0.0
    loss = pmpo(logp, advantage, kl, weight)
    alone = pmpo(logp[:, :3], advantage[:, :3], kl[:, :3], weight[:, :3])
    assert torch.equal(loss[:, 3:], torch.zeros(4, 2))
    assert torch.allclose(loss.mean(), alone.mean(), rtol=1e-5)


def test_an_empty_set_adds_nothing():
    logp, kl = torch.randn(2, 4, 5)
    ones = torch.ones_like(logp)
    loss = pmpo(logp, ones, kl, ones, alpha=0.5, beta=0.0)
    assert torch.allclose(loss, -0.5 * logp)
    assert pmpo(logp, ones, kl, 0 * ones).isfinite().all()


def test_gradients_raise_good_actions_and_lower_bad_ones():
    logp = torch.zeros(1, 3, requires_grad=True)
    advantage = torch.tensor([[1.0, -2.0, -0.1]])
    ones = torch.ones(1, 3)
    (gradient,) = torch.autograd.grad(pmpo(logp, advantage, 0 * ones, ones).mean(), logp)
    assert torch.allclose(gradient, torch.tensor([[-0.5, 0.25, 0.25]]))
