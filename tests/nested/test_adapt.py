"""Inner steps: each user is its own textbook loop, and none touches another."""

import pytest
import torch
from torch import Tensor, nn

from nested import Adapter, GatedDeltaMemory, fast

USERS = 4


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).double()


def adapter(module: nn.Module, match: str = "2", **options: float) -> Adapter:
    def loss(params, row) -> Tensor:
        x, y = row
        return (fast.bind(module, params)(x) - y).square().mean()

    return Adapter(module, match, loss, **{"lr": 0.1, **options})


def data() -> tuple[Tensor, Tensor]:
    return torch.randn(USERS, 5, 3).double(), torch.randn(USERS, 5, 2).double()


@pytest.mark.parametrize(
    "options", [{}, {"momentum": 0.9}, {"decay": 0.1, "clip": 0.5}, {"momentum": 0.5, "clip": 0.1}]
)
def test_each_user_is_a_loop_of_its_own(options: dict[str, float]):
    module, inputs = net(), data()
    adapt = adapter(module, "0|2.weight", **options)
    state = adapt.initial(USERS)
    for _ in range(3):
        state, losses = adapt(state, inputs)
    names = ["0.weight", "0.bias", "2.weight"]
    for user in range(USERS):
        slow = {n: p.detach() for n, p in module.named_parameters()}
        delta = {n: torch.zeros_like(slow[n]) for n in names}
        velocity = {n: torch.zeros_like(slow[n]) for n in names}
        for _ in range(3):
            fast_weights = {n: (slow[n] + delta[n]).requires_grad_() for n in names}
            y = torch.func.functional_call(module, {**slow, **fast_weights}, inputs[0][user])
            loss = (y - inputs[1][user]).square().mean()
            gradients = torch.autograd.grad(loss, [fast_weights[n] for n in names])
            norm = torch.cat([g.flatten() for g in gradients]).norm().item()
            scale = min(1.0, options.get("clip", torch.inf) / norm)
            for n, g in zip(names, gradients, strict=True):
                velocity[n] = options.get("momentum", 0.0) * velocity[n] + scale * g
                delta[n] = (1 - options.get("decay", 0.0)) * delta[n] - 0.1 * velocity[n]
        torch.testing.assert_close(losses[user], loss.detach(), atol=1e-12, rtol=0)
        for n in names:
            torch.testing.assert_close(state.delta[n][user], delta[n], atol=1e-12, rtol=0)


def test_lowers_the_loss_of_every_user_and_leaves_the_module():
    module, inputs = net(), data()
    before = {n: p.clone() for n, p in module.state_dict().items()}
    adapt = adapter(module, ".")
    state, first = adapt(adapt.initial(USERS), inputs)
    for _ in range(50):
        state, last = adapt(state, inputs)
    assert (last < 0.7 * first).all()
    assert all(torch.equal(p, before[n]) for n, p in module.state_dict().items())
    torch.testing.assert_close(
        (adapt.bind(state)(inputs[0]) - inputs[1]).square().mean((1, 2)),
        adapt(state, inputs)[1],
    )


def test_users_are_apart_bitwise():
    adapt, (x, y) = adapter(net(), momentum=0.9, clip=1.0), data()
    changed = y.clone()
    changed[1] = torch.nan
    clean = dirty = adapt.initial(USERS)
    for _ in range(3):
        (clean, _), (dirty, _) = adapt(clean, (x, y)), adapt(dirty, (x, changed))
    others = torch.tensor([0, 2, 3])
    pairs = zip(*(fast.leaves(fast.gather(s, others)) for s in (clean, dirty)), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    healed, count = fast.heal(dirty, adapt.initial(USERS))
    assert count.item() == 1 and not healed.delta["2.bias"][1].any()


def test_reset_comes_before_the_step():
    adapt, inputs = adapter(net(), momentum=0.9), data()
    old, _ = adapt(adapt.initial(USERS), inputs)
    mask = torch.tensor([True, False, False, True])
    new, _ = adapt(old, inputs, mask)
    fresh, kept = adapt(adapt.initial(USERS), inputs)[0], adapt(old, inputs)[0]
    expected = fast.where(mask, fresh, kept)
    pairs = zip(fast.leaves(new), fast.leaves(expected), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_slow_weights_get_the_first_order_gradient():
    module, inputs = net(), data()
    adapt = adapter(module)
    state, _ = adapt(adapt.initial(USERS), inputs)
    assert not any(x.requires_grad for x in fast.leaves(state))
    adapt.bind(state)(inputs[0]).square().sum().backward()
    moved = {n: w.requires_grad_() for n, w in fast.detach(adapt.weights(state)).items()}
    y = torch.func.vmap(lambda p, x: fast.bind(module, p)(x))(moved, inputs[0])
    expected = torch.autograd.grad(y.square().sum(), [moved["2.weight"]])[0].sum(0)
    torch.testing.assert_close(module[2].weight.grad, expected)


def test_adapts_a_module_with_a_memory_inside():
    memory = GatedDeltaMemory(3, 2, dim=4)

    def loss(params, row) -> Tensor:
        x, y = row
        answer, state = memory_step(params, x)
        return (answer - y).square().mean() + state.weights.square().mean()

    def memory_step(params, x: Tensor):
        return fast.bind(memory, params)(x, memory.initial(len(x)))

    adapt = Adapter(memory, "into", loss, lr=0.1)
    inputs = torch.randn(USERS, 5, 3), torch.randn(USERS, 5, 2)
    state, _ = adapt(adapt.initial(USERS), inputs)
    params = {n: p for n, p in memory.named_parameters() if "into" in n}
    expected = torch.autograd.grad(
        loss(params, (inputs[0][0], inputs[1][0])), list(params.values())
    )
    for name, gradient in zip(params, expected, strict=True):
        torch.testing.assert_close(state.delta[name][0], -0.1 * gradient)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"match": "nothing"}, "'nothing' matches no parameter of 0.weight, 0.bias"),
        ({"momentum": 1.5}, "momentum is 1.5"),
        ({"decay": -0.1}, "decay is -0.1"),
        ({"lr": 0.0}, "lr=0.0"),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        adapter(net(), **options)
