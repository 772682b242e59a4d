"""The two-layer step as one node: the results and the gradients of its readable twin."""

from typing import Any

import pytest
import torch
from torch import Tensor

from nested import NeuralMemory

OPTIONS = [{"heads": 2}, {"heads": 2, "forget": None}, {"residual": True}]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("resetting", [True, False])
def test_the_node_is_its_twin(options: dict[str, Any], resetting: bool):
    memory = NeuralMemory(5, 4, 6, 8, **options).double()
    with torch.no_grad():
        for p in memory.parameters():
            p += 0.3 * torch.randn_like(p)
    assert memory.lean
    xs = torch.randn(6, 3, 5, dtype=torch.float64, requires_grad=True)
    resets = torch.rand(6, 3) < 0.3

    def run(learn: Any) -> tuple[Tensor, ...]:
        state, outcome, errors = memory.initial(3), torch.zeros(()), []
        for x, reset in zip(xs, resets, strict=True):
            y, state = learn(memory.project(x), state, reset if resetting else None)
            outcome = outcome + y.sin().sum()
            errors.append(state.error)
        outcome = outcome + sum(w.cos().sum() for w in state.weights)
        reached = [p for name, p in memory.named_parameters() if "out" not in name]
        return outcome, *errors, *torch.autograd.grad(outcome, [xs, *reached])

    for mine, twin in zip(run(memory.learn), run(memory.plain), strict=True):
        torch.testing.assert_close(mine, twin, atol=1e-12, rtol=1e-12)


def test_what_the_node_does_not_know_takes_the_readable_way():
    assert not NeuralMemory(5, 4, momentum=0.5).lean
    assert not NeuralMemory(5, 4, chunk=2).lean
