"""Functions in TorchScript are the functions they were read from."""

import pytest
import torch

from tests.worldmodel.small import off_start
from worldmodel import hand, prior, script
from worldmodel.nets import addmm
from worldmodel.script import read, scripted


def double(x: torch.Tensor, times: int) -> torch.Tensor:
    """x, doubled so many times."""
    for _ in range(times):
        x = x + x
    return x


def test_what_torchscript_reads_is_interpreted_by_it():
    found = read(double)
    assert isinstance(found, torch.jit.ScriptFunction)
    assert torch.equal(found(torch.ones(2), 3), torch.full((2,), 8.0))


def test_the_loops_by_hand_are_read():
    """Where one were not, it would run as slowly as before and nobody would notice."""
    for function in (hand.filtered, hand.filtered_back, prior.dreamed):
        assert isinstance(read(function.__wrapped__), torch.jit.ScriptFunction)  # pyright: ignore


def test_without_torchscript_the_function_serves(monkeypatch: pytest.MonkeyPatch):
    def refuse(function):
        raise RuntimeError(f"no TorchScript for {function.__name__}")

    monkeypatch.setattr(torch.jit, "script", refuse)
    assert read(double) is double
    assert torch.equal(scripted(double)(torch.ones(2), 2), torch.full((2,), 4.0))


def test_for_half_precision_and_large_tensors_the_function_itself_runs():
    seen = []

    def once(x: torch.Tensor) -> torch.Tensor:
        seen.append(len(x))  # a list from outside: TorchScript could not read it
        return x

    with torch.autocast("cpu", torch.bfloat16):
        scripted(once)(torch.ones(2))
    scripted(once)(torch.ones(3, dtype=torch.bfloat16))
    scripted(once)(torch.ones(script.LARGE))
    assert seen == [2, 3, script.LARGE]


def test_a_product_with_its_sum_stays_one_operation():
    """TorchScript's optimizer parts it after some calls; each part is then paid for."""

    def product(add: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return addmm(add, x, weight)

    found, args = read(product), (torch.ones(4), torch.ones(3, 2), torch.ones(2, 4))
    for _ in range(4):
        found(*args)
    with torch.profiler.profile() as profile, torch.inference_mode():
        assert torch.equal(found(*args), torch.full((3, 4), 3.0))
    names = [event.name for event in profile.events() or ()]
    assert names.count("aten::addmm") == 1 and "aten::add" not in names


@pytest.mark.parametrize("blocks", [1, 2])
def test_a_sequence_in_torchscript_is_the_one_in_python(blocks: int):
    dynamics = off_start(False, blocks)
    g = torch.Generator().manual_seed(5)
    batch, steps = 3, 4
    rows = {
        "deter": (batch, 16),
        "stoch": (batch, 12),
        "bias": (batch, steps, 16),
        "tokens": (batch, steps, 8),
        "keep": (batch, steps, 1),
        "noise": (steps, batch, *dynamics.initial(1).latent.stoch.shape[1:]),
    }
    drawn = [torch.rand(shape, generator=g, dtype=torch.float64) for shape in rows.values()]
    with torch.no_grad():
        weights = hand.spread(dynamics._hoist()[0], batch)
        found = hand.filtered(weights, dynamics._draw, *drawn)
        expected = hand.filtered.__wrapped__(weights, dynamics._draw, *drawn)  # pyright: ignore
    for one, other in zip(found, expected, strict=True):
        for step, again in zip(one, other, strict=True):
            for a, b in zip(step, again, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-13)
