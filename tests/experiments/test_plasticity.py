"""Signs of lost plasticity, on activations and features whose answer is known."""

import math

import numpy as np
import pytest
import torch

from experiments import plasticity


def test_dormant_units_are_measured_by_their_layer():
    # means of |h|: 0, 0.02, 1, 3; of the layer 1.005; scores 0, 0.0199, 0.995, 2.985
    activations = torch.tensor([[0.0, 0.04, -1.0, 2.0], [0.0, 0.0, 1.0, -4.0]])
    expected = torch.tensor([0.0, 0.02, 1.0, 3.0]) / 1.005
    torch.testing.assert_close(plasticity.unit_scores(activations), expected)
    assert plasticity.dormant(activations) == 0.5
    assert plasticity.dormant(activations, tau=0.01) == 0.25
    assert plasticity.dormant(activations, tau=1.0) == 0.75
    assert plasticity.dormant(activations * 1e3) == 0.5  # a scale changes nothing
    assert plasticity.dormant(torch.zeros(2, 4)) == 1.0


def test_effective_rank():
    assert plasticity.erank(torch.eye(6)[:, :4]) == pytest.approx(4.0, abs=1e-5)
    one = torch.randn(6, 1) @ torch.randn(1, 5)
    assert plasticity.erank(one) == pytest.approx(1.0, abs=1e-4)
    # singular values 3 and 1: exp of the entropy of (3/4, 1/4)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    features = torch.diag(torch.tensor([3.0, 1.0]))
    assert plasticity.erank(features) == pytest.approx(math.exp(entropy), abs=1e-5)
    assert plasticity.erank(torch.zeros(3, 2)) == 0.0


def test_srank_counts_what_holds_the_share():
    spread = torch.diag(torch.tensor([50.0, 30, 19, 0.6, 0.4]))  # 0.5, 0.8, 0.99, 0.996, 1
    assert plasticity.srank(spread) == 3
    assert plasticity.srank(spread, share=0.8) == 2
    assert plasticity.srank(spread, share=0.995) == 4
    assert plasticity.srank(torch.eye(5)) == 5
    assert plasticity.srank(torch.zeros(3, 2)) == 0


def test_weight_norm_keeps_seeds_apart():
    weights = {"a": torch.tensor([[3.0, 0], [0, 0]]), "b": torch.tensor([[[4.0]], [[2.0]]])}
    assert plasticity.weight_norm(weights).tolist() == [5.0, 2.0]
    assert plasticity.weight_norm(weights, leading=0) == pytest.approx(29**0.5)


def test_seeds_are_a_leading_axis():
    batch = torch.randn(3, 8, 5)
    for measure in (plasticity.dormant, plasticity.erank, plasticity.srank):
        torch.testing.assert_close(measure(batch), torch.stack([measure(x) for x in batch]))


def test_fresh_gap_is_positive_where_plasticity_was_lost():
    gap = plasticity.fresh_gap(np.array([0.9, 0.9]), np.array([[0.9, 0.5], [1.0, 0.8]]))
    assert np.allclose(gap, [[0.0, 0.4], [-0.1, 0.1]])
