"""Linear memories against their definitions: a gradient step on an inner loss, and recall."""

from typing import Any

import pytest
import torch
from torch import Tensor

from nested import DeltaMemory, GatedDeltaMemory, HebbMemory, linear
from nested.memory import LinearState
from tests import zoo

RULES: dict[str, Any] = {"hebb": HebbMemory, "delta": DeltaMemory, "gated delta": GatedDeltaMemory}
every_rule = pytest.mark.parametrize("name", RULES)


def descend(z: Tensor, weights: Tensor, start: Tensor, reset: Tensor, erase: int):
    """The step by its definition: fade, then one gradient step of each user's inner loss."""
    dim = weights.shape[-1]
    q, k, v, gates = z.split([dim, dim, dim, z.shape[-1] - 3 * dim], -1)
    q, k = (x / (x.square().sum(-1, keepdim=True) + linear.EPSILON).sqrt() for x in (q, k))
    beta = gates[..., 0].sigmoid()
    alpha = gates[..., 1].sigmoid() if gates.shape[-1] == 2 else torch.ones_like(beta)
    weights = torch.where(reset[:, None, None, None], start, weights)
    faded = alpha[..., None, None] * weights

    def inner(w: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return 0.5 * (k @ w - v).square().sum() if erase else -(k @ w) @ v

    gradient = torch.func.vmap(torch.func.vmap(torch.func.grad(inner)))(faded, k, v)
    new = faded - beta[..., None, None] * gradient
    read = torch.einsum("bhk,bhkv->bhv", q, new)
    return read, new, v - torch.einsum("bhk,bhkv->bhv", k, faded)


@every_rule
@pytest.mark.parametrize("step", [linear.step, linear.plain])
def test_step_is_one_descent_of_the_inner_loss(name: str, step):
    memory = RULES[name](5, 4, dim=6, heads=3).double()
    torch.nn.init.normal_(memory.start)
    xs = torch.randn(7, 4, 5, dtype=torch.float64, requires_grad=True)
    resets = torch.rand(7, 4) < 0.2

    def run(step) -> tuple[Tensor, ...]:
        weights, outcome, errors = memory.initial(4).weights, torch.zeros(()), []
        for x, reset in zip(xs, resets, strict=True):
            z = memory.project(x)
            read, weights, error = step(z, weights, memory.start, reset, memory.erase)
            outcome = outcome + memory.out(read.flatten(1)).sin().sum()
            errors.append(error.detach())
        outcome = outcome + weights.cos().sum()
        return outcome, *errors, *torch.autograd.grad(outcome, [xs, *memory.parameters()])

    for mine, defined in zip(run(step), run(descend), strict=True):
        torch.testing.assert_close(mine, defined, atol=1e-12, rtol=1e-12)


@every_rule
def test_backward_by_hand_without_reset_and_with_part_of_the_results(name: str):
    memory = zoo.memory(name, dtype=torch.float64)
    z = memory.project(torch.randn(2, 5, dtype=torch.float64)).detach().requires_grad_()
    weights = torch.randn(2, *memory.start.shape, dtype=torch.float64, requires_grad=True)
    for part in (0, 1):
        assert torch.autograd.gradcheck(
            lambda z, w, part=part: linear.step(z, w, memory.start, None, memory.erase)[part],
            (z, weights),
        )


def recaller(name: str, width: int):
    """A memory told by hand what is key and what is value in x = [key, value]."""
    memory = RULES[name](2 * width, width, dim=width)
    eye, zero = torch.eye(width), torch.zeros(width, width)
    with torch.no_grad():
        gates = memory.into.weight.shape[0] - 3 * width
        memory.into.weight.copy_(
            torch.cat(
                [
                    torch.cat([eye, zero], 1),
                    torch.cat([eye, zero], 1),
                    torch.cat([zero, eye], 1),
                    torch.zeros(gates, 2 * width),
                ]
            )
        )
        memory.into.bias.zero_()[3 * width :] = 12.0  # write all, forget nothing
        memory.out.weight.copy_(eye)
    return memory


def missed(memory, keys: Tensor, values: Tensor, state: LinearState) -> float:
    """Relative squared error of what the keys (K, D) alone bring back, for the one user."""
    asks = torch.cat([keys, torch.zeros_like(values)], 1)
    answers = torch.stack([memory.read(x[None], state)[0] for x in asks])
    return ((answers - values).square().sum() / values.square().sum()).item()


def written(memory, keys: Tensor, values: Tensor, passes: int) -> LinearState:
    xs = torch.cat([keys, values], 1).repeat(passes, 1)[None]
    return memory.scan(xs, memory.initial(1), torch.zeros(1, xs.shape[1], dtype=torch.bool))[1]


@every_rule
def test_recalls_pairs_with_orthogonal_keys_and_nothing_after_a_reset(name: str):
    memory = recaller(name, 16)
    keys, values = torch.linalg.qr(torch.randn(16, 16))[0], torch.randn(16, 16)
    state = written(memory, keys, values, passes=1)
    assert missed(memory, keys, values, state) < 1e-3
    assert missed(memory, keys, values, memory.initial(1)) > 0.99


@pytest.mark.parametrize("name", ["delta", "gated delta"])
def test_delta_rules_tell_apart_keys_that_overlap(name: str):
    keys, values = torch.randn(12, 32), torch.randn(12, 32)
    memory, sums = recaller(name, 32), recaller("hebb", 32)
    assert missed(memory, keys, values, written(memory, keys, values, passes=8)) < 1e-2
    assert missed(sums, keys, values, written(sums, keys, values, passes=1)) > 0.1
    # a new value for an old key replaces the old one
    state = written(memory, keys[:1].repeat(2, 1), values[:2], passes=1)
    assert missed(memory, keys[:1], values[1:2], state) < 1e-3


def test_surprise_is_the_error_before_the_write():
    memory = recaller("delta", 8)
    x = torch.randn(1, 16)
    _, first = memory(x, memory.initial(1))
    _, again = memory(x, first)
    torch.testing.assert_close(first.surprise, x[:, 8:].square().mean(1))
    assert again.surprise < 1e-6


def test_a_strong_gate_does_not_blur_what_comes_after_it():
    memory = zoo.memory("gated delta")
    with torch.no_grad():
        memory.into.weight.view(1, -1, 5)[:, -1, 0] = 40  # the first input opens or shuts it
    xs = torch.randn(3, 64, 5)
    none = torch.zeros(3, 64, dtype=torch.bool)
    ys, state = memory.scan(xs, memory.initial(3), none)
    walk, expected = memory.initial(3), []
    for t in range(64):
        y, walk = memory(xs[:, t], walk)
        expected.append(y)
    torch.testing.assert_close(ys, torch.stack(expected, 1), atol=1e-5, rtol=0)
    gradients = torch.autograd.grad(ys.sum() + state.weights.sum(), list(memory.parameters()))
    assert all(g.isfinite().all() for g in gradients)


@every_rule
def test_low_precision_does_not_round_small_writes_away(name: str):
    memory = RULES[name](5, 4, dim=8, heads=2)
    with torch.no_grad():
        memory.start += 1
        memory.into.bias.view(memory.heads, -1)[:, 3 * memory.dim :] = torch.tensor(
            [-8.0, 12.0][: 1 + (name != "delta")]  # write by 3e-4, fade by 6e-6
        )
        memory.into.weight.view(memory.heads, -1, 5)[:, 3 * memory.dim :] = 0
    xs = torch.randn(70, 4, 5)

    def learned() -> tuple[Tensor, ...]:
        state, none = memory.initial(4), torch.zeros(4, 70, dtype=torch.bool)
        ys, scanned = memory.scan(xs.transpose(0, 1), state, none)
        for x in xs:
            y, state = memory(x, state)
        gradients = torch.autograd.grad(y.sum() + ys.sum(), list(memory.parameters()))
        weights = torch.stack([state.weights, scanned.weights])
        assert weights.dtype == torch.float32
        return weights - memory.start, *gradients

    exact = learned()
    with torch.autocast("cpu", torch.bfloat16):
        rounded = learned()
    assert 0 < exact[0].abs().max() < 0.1
    assert all((r - e).norm() < 0.02 * e.norm() for r, e in zip(rounded, exact, strict=True))


def test_a_zero_input_has_a_finite_gradient():
    memory = DeltaMemory(4, 4)
    torch.nn.init.zeros_(memory.into.bias)
    y, _ = memory(torch.zeros(2, 4), memory.initial(2))
    y.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in memory.parameters())


def test_sizes_are_checked():
    with pytest.raises(ValueError, match="heads=0"):
        DeltaMemory(4, 4, heads=0)
