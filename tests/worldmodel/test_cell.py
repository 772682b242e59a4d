"""The step with a backward by hand agrees with the one that autograd differentiates."""

import gc
import weakref

import pytest
import torch

from tests.worldmodel.small import DISCRETE, make_agent, make_batch
from worldmodel import RSSM, Carry
from worldmodel.cell import Plain, Tape, advance, enter, recur


def rssm(memory: bool, blocks: int, readable: bool) -> RSSM:
    """Dynamics in float64, with weights off their special initial values."""
    torch.manual_seed(0)
    dynamics = make_agent(memory=memory, blocks=blocks).world.dynamics.double()
    with torch.no_grad():
        for parameter in dynamics.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    dynamics.readable = readable
    return dynamics


def gradients(dynamics: RSSM, passes: int = 1) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A scalar that reads every output, and its gradients, tokens and carry included."""
    g = torch.Generator().manual_seed(1)
    batch = make_batch(action=DISCRETE)
    tokens = torch.randn(4, 7, 8, generator=g, dtype=torch.float64).requires_grad_()
    start = dynamics.initial(4)
    deter = torch.randn(4, 16, generator=g, dtype=torch.float64).requires_grad_()
    carry = Carry(start.latent._replace(deter=deter), start.fast)
    weights = torch.randn(4, 7, 40, generator=g, dtype=torch.float64)
    for _ in range(passes):
        dynamics.zero_grad()
        tokens.grad = deter.grad = None
        out, last = dynamics.observe(
            carry, tokens, batch.action.double(), batch.first, batch.first,
            generator=torch.Generator().manual_seed(2),
        )  # fmt: skip
        read = torch.cat([out.deter, out.stoch.flatten(2), out.probs.flatten(2)], -1)
        value = (read * weights).sum() + last.latent.deter.square().sum()
        if passes > 1:  # a pass that ends before the weights of the loop
            torch.autograd.grad(value, [tokens], retain_graph=True)
        value.backward(retain_graph=True)
    named = dict(dynamics.named_parameters()) | {"tokens": tokens, "deter": deter}
    found = {name: p.grad for name, p in named.items() if not name.startswith("prior_net")}
    return value, {name: grad for name, grad in found.items() if grad is not None}


@pytest.mark.parametrize("memory", [False, True], ids=["plain", "memory"])
@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("passes", [1, 2])
def test_nodes_by_hand_give_autograd_s_gradients(memory: bool, blocks: int, passes: int):
    expected, slow = gradients(rssm(memory, blocks, readable=True))
    value, fast = gradients(rssm(memory, blocks, readable=False), passes)
    assert torch.allclose(value, expected, rtol=1e-12, atol=0)
    assert fast.keys() == slow.keys()
    for name, grad in slow.items():
        assert torch.allclose(fast[name], grad, rtol=1e-9, atol=1e-11), name


def test_the_readable_step_serves_where_nodes_by_hand_cannot():
    dynamics = rssm(memory=False, blocks=2, readable=False)
    tokens = torch.zeros(4, 7, 8)
    weights, _ = dynamics._hoist()
    assert isinstance(dynamics._cell(weights, tokens), Tape)
    with torch.no_grad():
        assert isinstance(dynamics._cell(weights, tokens), Plain)
    with torch.autocast("cpu", torch.bfloat16):
        assert isinstance(dynamics._cell(weights, tokens), Plain)
    torch.func.vmap(lambda x: _check_plain(dynamics, x))(tokens)


def _check_plain(dynamics: RSSM, tokens: torch.Tensor) -> torch.Tensor:
    assert isinstance(dynamics._cell(dynamics._hoist()[0], tokens), Plain)
    return tokens


@pytest.mark.parametrize("backward", [True, False])
def test_a_graph_is_freed_with_its_last_reference(backward: bool):
    dynamics = rssm(memory=True, blocks=2, readable=False)
    gc.disable()
    try:
        tokens = torch.randn(4, 7, 8, dtype=torch.float64)
        batch = make_batch(action=DISCRETE)
        rows = (tokens, batch.action.double(), batch.first, batch.first)
        out, last = dynamics.observe(dynamics.initial(4), *rows)
        held = weakref.ref(tokens)  # by the graph, for the gradient of a weight
        if backward:
            out.stoch.square().sum().backward()
        del tokens, rows
        assert backward or held() is not None
        del out, last
        assert held() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("memory", [False, True], ids=["plain", "memory"])
@pytest.mark.parametrize("blocks", [1, 2])
def test_advancing_in_place_is_the_readable_step(memory: bool, blocks: int):
    dynamics = rssm(memory, blocks, readable=True)
    weights, _ = dynamics._hoist()
    g = torch.Generator().manual_seed(5)
    deter = torch.randn(6, 16, generator=g, dtype=torch.float64)
    stoch = torch.randn(6, 12, generator=g, dtype=torch.float64)
    bias = torch.randn(6, 16, generator=g, dtype=torch.float64)
    recalled = torch.randn(6, 8, generator=g, dtype=torch.float64) if memory else None
    with torch.no_grad():
        _, x = enter(weights, deter, stoch, deter.new_ones(()))
        before = [t.clone() for t in (deter, x, bias)]
        expected = recur(weights, deter, x, recalled, bias)
        torch.testing.assert_close(advance(weights, deter, x, recalled, bias), expected)
        assert all(torch.equal(a, b) for a, b in zip((deter, x, bias), before, strict=True))
