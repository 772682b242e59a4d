"""Operations on state trees: bit for bit, users apart, whatever the tree is made of."""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from nested import fast


class Inner(NamedTuple):
    weights: Tensor
    count: Tensor


class Outer(NamedTuple):
    inner: Any
    table: dict[str, Tensor]
    nothing: tuple[()] = ()


def tree(users: int = 3) -> Outer:
    inner = Inner(torch.randn(users, 2, 2), torch.arange(users))
    return Outer((inner, torch.randn(users)), {"a.b": torch.randn(users, 4)})


def assert_same(one: fast.Tree, other: fast.Tree) -> None:
    pairs = zip(fast.leaves(one), fast.leaves(other), strict=True)
    assert all(x.dtype == y.dtype and torch.equal(x, y) for x, y in pairs)


def test_where_takes_whole_rows_and_nothing_else():
    a, b, mask = tree(), tree(), torch.tensor([True, False, True])
    broken = fast.tree_map(lambda x: torch.where(x == x, x / 0, x).to(x.dtype), b)
    for x, y, z in zip(*map(fast.leaves, (fast.where(mask, a, broken), a, broken)), strict=True):
        assert torch.equal(x[mask], y[mask])
        assert torch.equal(x[~mask], z[~mask]) or x[~mask].isnan().any()
    assert isinstance(fast.where(mask, a, b).inner[0], Inner)


def test_reset_keeps_broken_rows_out_of_value_and_gradient():
    start = torch.zeros(2, 3, requires_grad=True)
    state = torch.tensor([[torch.nan] * 3, [1.0] * 3], requires_grad=True)
    new = fast.reset((state,), (start,), torch.tensor([True, False]))[0]
    gradients = torch.autograd.grad(new.square().sum() + new.sum(), [start, state])
    assert_same(gradients, (torch.tensor([[1.0] * 3, [0.0] * 3]),
                            torch.tensor([[0.0] * 3, [3.0] * 3])))  # fmt: skip


def test_stack_is_the_inverse_of_split():
    state = tree()
    users = fast.split(state)
    assert len(users) == 3 and users[1].inner[0].weights.shape == (2, 2)
    assert_same(fast.stack(users), state)
    assert fast.stack([(), ()]) == ()


def test_gather_picks_users_in_order():
    state, index = tree(), torch.tensor([2, 0, 2])
    assert_same(fast.gather(state, index), fast.tree_map(lambda x: x[index], state))
    assert fast.gather((), index) == ()


def test_detach_cuts_the_graph():
    x = torch.ones(2, requires_grad=True)
    assert not fast.detach(((x * 2,),))[0][0].requires_grad


def test_heal_resets_broken_users_only():
    state, initial = tree(), tree()
    state.table["a.b"][1, 2] = torch.inf
    state.inner[0].weights[2, 0, 0] = torch.nan
    healed, count = fast.heal(state, initial)
    assert count.item() == 2
    assert_same(healed, fast.where(torch.tensor([False, True, True]), initial, state))
    untouched, none = fast.heal(initial, initial)
    assert none.item() == 0
    assert_same(untouched, initial)
    assert fast.heal((), ())[1].item() == 0


def test_bind_runs_with_other_weights_and_leaves_the_module():
    module = nn.Linear(2, 1)
    own, x = module.weight.clone(), torch.ones(1, 2)
    y = fast.bind(module, {"weight": torch.full((1, 2), 3.0)})(x)
    torch.testing.assert_close(y, 6 + module.bias[None])
    assert torch.equal(module.weight, own)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: fast.where(torch.ones(1).bool(), (torch.ones(1),), ()), ValueError, "1 and 0"),
        (lambda: fast.reset(tree(), tree().inner, torch.ones(3).bool()), ValueError, "Outer"),
        (lambda: fast.stack([{"a": torch.ones(1)}, {"b": torch.ones(1)}]), ValueError, "'b'"),
        (lambda: fast.leaves((torch.ones(1), 3)), TypeError, "int"),
        (lambda: fast.split(()), ValueError, "without tensors"),
        (lambda: fast.stack([]), ValueError, "no states"),
        (
            lambda: fast.where(torch.ones(1).bool(), torch.ones(1), torch.ones(1).double()),
            TypeError,
            "float32.*float64",
        ),
    ],
)
def test_trees_that_do_not_fit_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
