"""Memories in place: the functional step's results, and small writes that bfloat16 keeps."""

import shutil

import pytest
import torch
from torch import Tensor

from nested import TTTMLP, DeltaMemory, GatedDeltaMemory, HebbMemory, NeuralMemory, fast, held
from tests.nested.test_memory import assert_close

USERS = 6
MEMBERS = {
    "hebb": lambda: HebbMemory(5, 4, 8, heads=2),
    "delta": lambda: DeltaMemory(5, 4, 8, heads=2),
    "gated delta": lambda: GatedDeltaMemory(5, 4, 8),
    "neural": lambda: NeuralMemory(5, 4, 8, 16, heads=2),
    "neural, residual": lambda: NeuralMemory(5, 4, 8, 16, forget=None, residual=True),
    "ttt mlp": lambda: TTTMLP(5, 4, 8, 16, heads=2, chunk=1),
}


def member(name: str, dtype: torch.dtype = torch.float64):
    memory = MEMBERS[name]().to(dtype)
    with torch.no_grad():
        for p in memory.parameters():
            p += 0.2 * torch.randn_like(p)
    return memory


def compare(memory, steps: int, atol: float, **options) -> None:
    """Steps in place beside functional ones, with resets."""
    dtype = memory.out.weight.dtype
    state = memory.initial(USERS)
    users = memory.hold(state, dtype)
    for _ in range(steps):
        x, reset = torch.randn(USERS, 5, dtype=dtype), torch.rand(USERS) < 0.1
        y, state = memory(x, state, reset)
        assert_close(memory.step_(x, users, reset, **options), y, atol)
        torch.testing.assert_close(users.surprise, state.surprise, atol=atol, rtol=0)
    assert_close(memory.settle(users), state, atol)


@pytest.mark.parametrize("name", MEMBERS)
@torch.no_grad()
def test_in_place_is_the_functional_step(name: str):
    compare(member(name), 20, 1e-12)


@pytest.mark.parametrize("name", ["hebb", "gated delta", "neural"])
@pytest.mark.parametrize("gate", [-2.0, -40.0, -800.0])
@torch.no_grad()
def test_a_scale_is_multiplied_out_before_it_is_too_small(name: str, gate: float):
    memory = member(name)
    gates = memory.into.bias.view(memory.heads, -1)
    gates[:, -1] = gate  # forgets nearly all at each step; at -800 the gate is zero
    compare(memory, 50, 1e-12)
    users = memory.hold(memory.initial(USERS), torch.float64)
    for _ in range(50):
        memory.step_(torch.randn(USERS, 5, dtype=torch.float64), users)
    assert users.scale.min() >= held.SMALL


@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["gated delta", "neural"])
def test_users_are_apart_in_place(name: str, storage: torch.dtype):
    memory = member(name, torch.float32)
    clean, dirty = (memory.hold(memory.initial(USERS), storage) for _ in range(2))
    for t in range(4):
        x = torch.randn(USERS, 5)
        memory.step_(x, clean, generator=torch.Generator().manual_seed(t))
        x[2] = torch.nan
        memory.step_(x, dirty, generator=torch.Generator().manual_seed(t))
    others = torch.tensor([0, 1, 3, 4, 5])
    for a, b in zip(fast.leaves(clean), fast.leaves(dirty), strict=True):
        assert torch.equal(a[others], b[others])
    assert dirty.surprise[2].isnan()


def test_rounding_is_fair():
    x = torch.tensor([1.0, 1 + 2**-10, -(1 + 3 * 2**-9), 1e-30, torch.inf]).repeat(20000, 1)
    stored = torch.empty(x.shape, dtype=torch.bfloat16)
    noise = torch.randint(held.NOISE, x.shape, dtype=torch.int32)
    held.round_(stored, x.clone(), noise)
    mean, exact = stored.double().mean(0), x[0].double()
    assert torch.equal(mean[[0, 4]], exact[[0, 4]])  # what a bfloat16 can hold stays as it is
    assert ((mean - exact) / exact)[1:4].abs().max() < 2e-4


@pytest.mark.parametrize("name", ["delta", "gated delta", "neural"])
def test_a_thousand_small_writes_survive_in_bfloat16(name: str):
    """Each write is below half a unit in the last place: to nearest, all would be lost."""
    memory = MEMBERS[name]().float()
    users = 2
    with torch.no_grad():
        if name != "neural":  # whose displacements begin at zero and grow until writes are small
            memory.start += 1
        bias = memory.into.bias.view(memory.heads, -1)
        bias[:, 24:25], bias[:, 25:] = -9.0, 14.0
    exact = memory.hold(memory.initial(users))
    rounded = memory.hold(memory.initial(users), torch.bfloat16)
    nearest = memory.hold(memory.initial(users))
    generator, first = torch.Generator().manual_seed(0), memory.settle(exact)
    target = torch.randn(users, 5)
    for _ in range(1000):
        x = target + 0.3 * torch.randn(users, 5)
        memory.step_(x, exact)
        memory.step_(x, rounded, generator=generator)
        memory.step_(x, nearest)
        for w in nearest.layers:
            w.copy_(w.bfloat16())

    def learned(users: held.Held) -> Tensor:
        now, begun = memory.settle(users).weights, first.weights
        pairs = zip(now, begun, strict=True) if isinstance(now, tuple) else [(now, begun)]
        return torch.cat([(a - b).flatten() for a, b in pairs])

    change = learned(exact).norm()
    assert change > 0
    lost = (learned(nearest) - learned(exact)).norm() / change
    missed = (learned(rounded) - learned(exact)).norm() / change
    assert missed < 0.5 * lost
    along = learned(rounded) @ learned(exact) / change**2
    assert abs(along - 1) < 0.1


def test_what_cannot_be_held_is_named():
    memory = GatedDeltaMemory(5, 4)
    with pytest.raises(ValueError, match="float16"):
        memory.hold(memory.initial(1), torch.float16)
    with pytest.raises(ValueError, match="generator"):
        memory.step_(torch.zeros(1, 5), memory.hold(memory.initial(1), torch.bfloat16))
    deep = NeuralMemory(5, 4, chunk=2)
    with pytest.raises(ValueError, match="chunk=2, momentum=None"):
        deep.hold(deep.initial(1))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("name", ["hebb", "delta", "gated delta"])
@torch.no_grad()
def test_the_kernel_is_its_twin(name: str):
    from experiments.kernel import build

    compare(member(name, torch.float32), 50, 1e-5, kernel=build())
