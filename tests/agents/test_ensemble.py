"""Disagreement: low on the data, high off it; learned without touching what it reads."""

import pytest
import torch

from agents.ensemble import Ensemble, deviation


def learned() -> tuple[Ensemble, torch.Tensor, torch.Tensor]:
    """Four heads that learned a map of features near one corner; those features, and actions."""
    torch.manual_seed(0)
    ensemble = Ensemble(4, 2, 3, members=4, units=16, layers=1)
    g = torch.Generator().manual_seed(1)
    feature, action = torch.rand(64, 4, generator=g) + 1, torch.eye(2)[torch.arange(64) % 2]
    target = torch.cat([feature[:, :2].sin(), action[:, :1]], -1)
    rule = torch.optim.Adam(ensemble.parameters(), 0.02, foreach=True)
    for _ in range(120):
        ensemble.losses(feature, action, target, torch.ones(64)).mean().backward()
        rule.step()
        rule.zero_grad()
    assert (ensemble(feature, action) - target).square().mean() < 0.01
    return ensemble, feature, action


def test_doubt_is_nothing_on_the_data_and_large_off_it():
    ensemble, feature, action = learned()
    known = ensemble.doubt(feature, action)
    assert known.max() < 0.5
    assert ensemble.doubt(-feature, action).min() > known.max()
    assert ensemble.doubt(-feature, action).mean() > 3
    assert ensemble.doubt(feature, 1 - 2 * action).mean() > 1  # actions that nobody took


def test_what_is_read_gets_no_gradient_and_rows_of_no_weight_do_not_count():
    torch.manual_seed(0)
    ensemble = Ensemble(4, 2, 3, members=2, units=8, layers=0)
    feature = torch.randn(6, 4, requires_grad=True)
    weight = torch.tensor([1.0, 1, 1, 0, 0, 0])
    ensemble.losses(feature, torch.ones(6, 2), torch.zeros(6, 3), weight).sum().backward()
    assert feature.grad is None
    assert all(p.grad is not None for p in ensemble.parameters())
    made = deviation(ensemble(feature, torch.ones(6, 2)))[:3]
    assert torch.allclose(ensemble.usual.square, made.square().mean())


def test_deviation_is_that_over_members():
    made = torch.tensor([[[0.0, 1.0]], [[2.0, 1.0]]])
    assert torch.allclose(deviation(made), torch.tensor([0.5**0.5]))
    with pytest.raises(ValueError, match="members=1"):
        Ensemble(4, 2, 3, members=1, units=8, layers=1)
