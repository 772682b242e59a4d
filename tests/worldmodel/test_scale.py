"""Running scales of losses, and their sum."""

import pytest
import torch

from worldmodel.scale import RunningRMS, weighted


def test_a_loss_is_divided_by_its_running_root_mean_square():
    norm = RunningRMS(rate=0.4)
    squares = []
    for value in (3.0, 1.0, 5.0, 2.0):
        loss = torch.tensor([[value, 2 * value]], requires_grad=True)
        squares.append(2.5 * value**2)
        scaled = norm(loss)
        assert torch.allclose(scaled, loss / norm.square.sqrt())
        assert torch.allclose(torch.autograd.grad(scaled.sum(), loss)[0], 1 / norm.square.sqrt())
    first = sum(squares[:2]) / 2  # a plain mean, until its share falls to the rate
    third = first + 0.4 * (squares[2] - first)
    assert norm.square == pytest.approx(third + 0.4 * (squares[3] - third))


def test_only_what_has_weight_counts():
    norm = RunningRMS(rate=0.5)
    loss = torch.tensor([[2.0, 100.0]])
    assert torch.equal(norm(loss, torch.tensor([[1.0, 0.0]])), loss / 2)
    before = norm.square.clone()
    norm(loss, torch.zeros(1, 2))
    assert torch.equal(norm.square, before) and norm.count == 1


def test_a_loss_of_zeros_stays_zero():
    assert torch.equal(RunningRMS()(torch.zeros(2, 3)), torch.zeros(2, 3))


def test_a_loss_without_a_scale_is_named():
    losses = {"a": torch.tensor([1.0, 3.0]), "b": torch.tensor([5.0])}
    assert weighted(losses, {"a": 2.0, "b": 0.1}) == 4.5
    with pytest.raises(ValueError, match=r"losses and scales differ in \['b', 'c'\]"):
        weighted(losses, {"a": 1.0, "c": 1.0})
