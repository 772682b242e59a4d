"""What every memory keeps: one law for a step and a sequence, users apart, resets exact."""

from typing import Any

import pytest
import torch
from torch import Tensor

from nested import fast
from tests import zoo
from worldmodel import RSSM

USERS, STEPS = 4, 34  # more steps than one chunk
every_memory = pytest.mark.parametrize("name", zoo.MEMORIES)


def sequence(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Inputs (B, T, 5) and resets (B, T), one of them at the first step and one at the last."""
    resets = torch.rand(USERS, STEPS) < 0.1
    resets[0, 0] = resets[1, -1] = True
    return torch.randn(USERS, STEPS, 5, dtype=dtype), resets


def stepped(memory: Any, xs: Tensor, state: fast.Tree, resets: Tensor):
    ys = []
    for t in range(xs.shape[1]):
        y, state = memory(xs[:, t], state, resets[:, t])
        ys.append(y)
    return torch.stack(ys, 1), state


def moving(state: fast.Tree) -> list[Tensor]:
    """The leaves that carry gradients."""
    return [x for x in fast.leaves(state) if x.requires_grad]


def broken(x: Tensor) -> Tensor:
    """The same tensor full of what is not a number, where it holds numbers at all."""
    return x / 0 * 0 if x.is_floating_point() else x + 1


def assert_close(one: fast.Tree, other: fast.Tree, atol: float) -> None:
    for x, y in zip(fast.leaves(one), fast.leaves(other), strict=True):
        torch.testing.assert_close(x, y, atol=atol, rtol=0)


def assert_equal(one: fast.Tree, other: fast.Tree) -> None:
    assert_close(one, other, 0.0)


@every_memory
@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_sequence_is_steps_is_any_split(name: str, dtype: torch.dtype, atol: float):
    memory = zoo.memory(name, dtype=dtype)
    xs, resets = sequence(dtype)
    expected = stepped(memory, xs, memory.initial(USERS), resets)
    assert_close(memory.scan(xs, memory.initial(USERS), resets), expected, atol)
    for cuts in ([1, 2, 32], [33], torch.randperm(STEPS - 1)[:6].add(1).sort().values.tolist()):
        ys, state = [], memory.initial(USERS)
        for a, b in zip([0, *cuts], [*cuts, STEPS], strict=True):
            y, state = memory.scan(xs[:, a:b], state, resets[:, a:b])
            ys.append(y)
        assert_close((torch.cat(ys, 1), state), expected, atol)


@every_memory
def test_sequence_has_the_gradient_of_steps(name: str):
    memory = zoo.memory(name, dtype=torch.float64)
    xs, resets = sequence(torch.float64)
    xs.requires_grad_()

    def gradients(run) -> tuple[Tensor, ...]:
        ys, state = run(xs, memory.initial(USERS), resets)
        outcome = ys.sin().sum() + sum(x.cos().sum() for x in moving(state))
        return torch.autograd.grad(outcome, [xs, *memory.parameters()])

    steps = gradients(lambda *args: stepped(memory, *args))
    assert_close(gradients(memory.scan), steps, 1e-11)
    assert all(g.abs().max() > 1e-3 for g in steps), "a parameter is out of reach of the loss"


@every_memory
def test_gradients_are_those_of_differences(name: str):
    memory = zoo.memory(name, 3, 2, torch.float64)
    names = [f"memory.{n}" for n, _ in memory.named_parameters()]
    xs, resets = torch.randn(2, 3, 3, dtype=torch.float64), torch.zeros(2, 3, dtype=torch.bool)
    resets[1, 2] = True

    def run(xs: Tensor, *params: Tensor) -> Tensor:
        return fast.bind(Scan(memory), dict(zip(names, params, strict=True)))(xs, resets)

    inputs = (xs, *(p.detach().clone() for p in memory.parameters()))
    assert torch.autograd.gradcheck(run, [x.requires_grad_() for x in inputs], fast_mode=True)


class Scan(torch.nn.Module):
    """A memory that reads a whole sequence from the start, all of its results as one tensor."""

    def __init__(self, memory: Any):
        super().__init__()
        self.memory = memory

    def forward(self, xs: Tensor, resets: Tensor) -> Tensor:
        ys, state = self.memory.scan(xs, self.memory.initial(len(xs)), resets)
        return torch.cat([x.flatten() for x in (ys, *moving(state))])


@every_memory
def test_works_inside_a_world_model(name: str):
    memory = zoo.MEMORIES[name](3 * 6, 6)
    model = RSSM(5, 2, deter=8, hidden=6, stoch=2, classes=3, blocks=2, memory=memory)
    first = torch.zeros(3, 4, dtype=torch.bool)
    first[1, 2] = True
    inputs = torch.randn(3, 4, 5), torch.randn(3, 4, 2), first, first
    seen, carry = model.observe(model.initial(3), *inputs)
    (seen.deter.sum() + seen.probs.square().sum()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in memory.parameters())
    dream = model.imagine(carry, lambda feature: feature[:, :2], 2)
    assert dream.action.isfinite().all()


@every_memory
def test_users_are_apart(name: str):
    memory = zoo.memory(name)
    xs, resets = sequence()
    _, state = memory.scan(xs, memory.initial(USERS), resets)
    others, bad = torch.arange(USERS) != 2, xs.clone()
    bad[2, 20:] = torch.nan
    for run in (
        lambda x: memory.scan(x, state, resets),
        lambda x: stepped(memory, x, state, resets),
        lambda x: (memory.read(x[:, 30], state),),
    ):
        clean, dirty = run(xs), run(bad)
        index = others.nonzero()[:, 0]
        assert_equal(fast.gather(clean, index), fast.gather(dirty, index))
        assert not fast.leaves(dirty)[0][2].isfinite().all()


@every_memory
def test_reset_is_exact_and_only_where_asked(name: str):
    memory = zoo.memory(name)
    xs, _ = sequence()
    none, mask = torch.zeros(USERS, STEPS, dtype=torch.bool), torch.tensor([1, 0, 1, 0]).bool()
    _, old = memory.scan(xs, memory.initial(USERS), none)
    old = fast.where(torch.tensor([1, 0, 0, 0]).bool(), fast.tree_map(broken, old), old)
    after = memory(xs[:, 0], old, mask)
    fresh, kept = memory(xs[:, 0], memory.initial(USERS)), memory(xs[:, 0], old)
    assert_equal(after, fast.where(mask, fresh, kept))
    resets = none.clone()
    resets[:, 0] = mask
    healed, _ = memory.scan(xs, old, resets)
    assert_close(healed[mask], memory.scan(xs, memory.initial(USERS), none)[0][mask], 1e-5)


@every_memory
def test_read_writes_nothing_and_sees_what_was_written(name: str):
    memory = zoo.memory(name)
    xs, _ = sequence()
    state = memory.initial(USERS)
    before = fast.tree_map(torch.clone, state)
    blank = memory.read(xs[:, 0], state)
    assert_equal(state, before)
    y, written = memory(xs[:, 0], state)
    torch.testing.assert_close(memory.read(xs[:, 0], written), y)  # write, then read
    assert (y - blank).abs().max() > 1e-2


@every_memory
def test_state_dict_round_trip(name: str):
    memory, other = zoo.memory(name), zoo.MEMORIES[name](5, 4)
    other.load_state_dict(memory.state_dict())
    xs, resets = sequence()
    run = [m.scan(xs, m.initial(USERS), resets) for m in (memory, other)]
    assert_equal(*run)


@every_memory
def test_vmap_over_users_is_the_batch(name: str):
    memory = zoo.memory(name)
    xs, resets = sequence()
    _, state = memory.scan(xs, memory.initial(USERS), resets)

    def alone(x: Tensor, one: fast.Tree, reset: Tensor) -> fast.Tree:
        one = fast.tree_map(lambda leaf: leaf[None], one)
        return fast.tree_map(lambda leaf: leaf[0], memory(x[None], one, reset[None]))

    mapped = torch.func.vmap(alone)(xs[:, 3], state, resets[:, 0])
    assert_close(mapped, memory(xs[:, 3], state, resets[:, 0]), 1e-6)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] if n in zoo.SLOW else []) for n in zoo.MEMORIES],
)
def test_learns_to_recall(name: str):
    """Three pairs, then their keys alone: what was stored is the only way to a low loss."""
    memory = zoo.MEMORIES[name](8 + 4, 4)
    optimizer = torch.optim.Adam(memory.parameters(), 2e-2)
    for _ in range(100):
        loss = recall_loss(memory, torch.zeros(64, 6, dtype=torch.bool))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    forgets = torch.tensor([0, 0, 0, 1, 1, 1]).bool().expand(64, 6)
    kept = recall_loss(memory, torch.zeros_like(forgets))
    assert kept < 0.5 * recall_loss(memory, forgets)


def recall_loss(memory: Any, resets: Tensor) -> Tensor:
    """Three of eight one-hot keys with random values, then the keys alone: error of the answers."""
    users = len(resets)
    keys = torch.eye(8)[torch.rand(users, 8).argsort(1)[:, :3]]
    values = torch.randn(users, 3, 4)
    pairs = torch.cat([keys, values], 2)
    asks = torch.cat([keys, torch.zeros_like(values)], 2)
    ys, _ = memory.scan(torch.cat([pairs, asks], 1), memory.initial(users), resets)
    return (ys[:, 3:] - values).square().mean()
