"""The step with a backward by hand agrees with the one that autograd differentiates."""

import gc
import weakref

import pytest
import torch

from tests.worldmodel.small import DISCRETE, make_batch, off_start
from worldmodel import RSSM, Carry
from worldmodel.cell import Plain
from worldmodel.tape import Filter, Tape


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
    expected, slow = gradients(off_start(memory, blocks, readable=True))
    value, fast = gradients(off_start(memory, blocks), passes)
    assert torch.allclose(value, expected, rtol=1e-12, atol=0)
    assert fast.keys() == slow.keys()
    for name, grad in slow.items():
        assert torch.allclose(fast[name], grad, rtol=1e-9, atol=1e-11), name


def test_the_readable_step_serves_where_nodes_by_hand_cannot():
    dynamics = off_start(memory=False, blocks=2)
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


def test_two_nodes_a_step_are_one_node_for_all():
    dynamics = off_start(memory=False, blocks=2)
    g = torch.Generator().manual_seed(3)

    def rows(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    bias, seen, noise = rows(4, 5, 16), rows(4, 5, 8), rows(5, 4, 3, 4).exp()
    keep = (rows(4, 5, 1) > -1).double()
    start, w = dynamics.initial(4), dynamics._hoist()[0]
    each = (bias, bias, seen, keep, keep, noise.transpose(0, 1))  # no memory: no embed, no forget
    steps = [x.unbind(1) for x in each]
    latent = start.latent.deter, start.latent.stoch.flatten(1)
    whole = Filter.apply(*latent, bias, seen, keep, noise, dynamics._draw, *w)
    apart, _, _ = dynamics._by_steps(dynamics._cell(w, bias), start, steps, "write")
    elsewhere = ("prior", "from_action", "mixed.bias", "posterior_net.layers.0.linear.bias")
    named = {n: p for n, p in dynamics.named_parameters() if not n.startswith(elsewhere)}
    found = []
    for states in (whole, apart):
        value = torch.stack([(x * torch.arange(x.numel()).view_as(x).cos()).sum() for x in states])
        found.append(torch.autograd.grad(value.sum(), [*named.values()], retain_graph=True))
    for name, a, b in zip(named, *found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11, msg=name)
    for a, b in zip(whole, apart, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("memory", [False, True], ids=["plain", "memory"])
@pytest.mark.parametrize("backward", [True, False])
def test_a_graph_is_freed_with_its_last_reference(backward: bool, memory: bool):
    dynamics = off_start(memory, blocks=2)
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
