"""Lambda-returns against their recursion written out, and the running scale."""

import torch

from agents.returns import ReturnScale, lambda_return, standardized


def test_lambda_return_is_its_recursion():
    generator = torch.Generator().manual_seed(0)
    reward, boot = torch.randn(2, 3, 6, generator=generator).unbind(0)
    live, cont = (torch.rand(2, 3, 6, generator=generator) < 0.7).float().unbind(0)
    live = live * 0.99
    found = lambda_return(reward, live, cont, boot, 0.9)
    for row in range(3):
        ahead = boot[row, 5]
        for t in reversed(range(5)):
            weight = 0.9 * cont[row, t + 1]
            mixed = (1 - weight) * boot[row, t + 1] + weight * ahead
            ahead = reward[row, t + 1] + live[row, t + 1] * mixed
            assert torch.allclose(found[row, t], ahead)


def test_nothing_beyond_a_terminal_state_counts_and_a_cut_bootstraps():
    reward = torch.tensor([[0.0, 1.0, 100.0]])
    boot = torch.tensor([[0.0, 7.0, 9.0]])
    ones = torch.ones(1, 3)
    terminal = lambda_return(reward, torch.tensor([[1.0, 0.0, 1.0]]), ones, boot, 0.95)
    assert terminal[0, 0] == 1.0
    cut = lambda_return(reward, ones, torch.tensor([[1.0, 0.0, 1.0]]), boot, 0.95)
    assert cut[0, 0] == 8.0


def test_return_scale_follows_the_range_but_never_falls_below_its_limit():
    scale = ReturnScale(rate=0.5)
    assert scale(torch.zeros(100)) == 1.0
    returns = torch.linspace(0, 100, 1001)
    for _ in range(20):
        value = scale(returns)
    assert torch.allclose(value, torch.tensor(90.0), rtol=1e-3)


def test_standardized_has_weighted_mean_zero_and_deviation_one():
    x, weight = 5 + 3 * torch.randn(4, 50), torch.rand(4, 50)
    found, share = standardized(x, weight), weight / weight.sum(-1, keepdim=True)
    assert (share * found).sum(-1).abs().max() < 1e-5
    assert ((share * found.square()).sum(-1) - 1).abs().max() < 1e-5
    assert torch.equal(found.argsort(-1), x.argsort(-1))
    assert torch.isfinite(standardized(torch.ones(2, 3), torch.ones(2, 3))).all()
