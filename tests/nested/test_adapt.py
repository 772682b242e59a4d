"""Inner steps: each user is its own textbook loop, and none touches another."""

import pytest
import torch
from torch import Tensor, nn

from nested import Adapter, GatedDeltaMemory, adapt, fast
from nested.adapt import Window, WindowState

USERS = 4


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).double()


def loss_of(module: nn.Module):
    def loss(params, row) -> Tensor:
        x, y = row
        return (fast.bind(module, params)(x) - y).square().mean()

    return loss


def adapter(module: nn.Module, match: str = "2", **options) -> Adapter:
    return Adapter(module, match, loss_of(module), **{"lr": 0.1, **options})


def data() -> tuple[Tensor, Tensor]:
    return torch.randn(USERS, 5, 3).double(), torch.randn(USERS, 5, 2).double()


@pytest.mark.parametrize(
    "options", [{}, {"momentum": 0.9}, {"decay": 0.1, "clip": 0.5}, {"momentum": 0.5, "clip": 0.1}]
)
def test_each_user_is_a_loop_of_its_own(options: dict[str, float]):
    module, inputs = net(), data()
    adapting = adapter(module, "0|2.weight", **options)
    state = adapting.initial(USERS)
    for _ in range(3):
        state, losses = adapting(state, inputs)
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
    adapting = adapter(module, ".")
    state, first = adapting(adapting.initial(USERS), inputs)
    for _ in range(50):
        state, last = adapting(state, inputs)
    assert (last < 0.7 * first).all()
    assert all(torch.equal(p, before[n]) for n, p in module.state_dict().items())
    torch.testing.assert_close(
        (adapting.bind(state)(inputs[0]) - inputs[1]).square().mean((1, 2)),
        adapting(state, inputs)[1],
    )


def test_users_are_apart_bitwise():
    adapting, (x, y) = adapter(net(), momentum=0.9, clip=1.0), data()
    changed = y.clone()
    changed[1] = torch.nan
    clean = dirty = adapting.initial(USERS)
    for _ in range(3):
        (clean, _), (dirty, _) = adapting(clean, (x, y)), adapting(dirty, (x, changed))
    others = torch.tensor([0, 2, 3])
    pairs = zip(*(fast.leaves(fast.gather(s, others)) for s in (clean, dirty)), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    healed, count = fast.heal(dirty, adapting.initial(USERS))
    assert count.item() == 1 and not healed.delta["2.bias"][1].any()


def test_reset_comes_before_the_step():
    adapting, inputs = adapter(net(), momentum=0.9), data()
    old, _ = adapting(adapting.initial(USERS), inputs)
    mask = torch.tensor([True, False, False, True])
    new, _ = adapting(old, inputs, mask)
    fresh, kept = adapting(adapting.initial(USERS), inputs)[0], adapting(old, inputs)[0]
    expected = fast.where(mask, fresh, kept)
    pairs = zip(fast.leaves(new), fast.leaves(expected), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_slow_weights_get_the_first_order_gradient():
    module, inputs = net(), data()
    adapting = adapter(module)
    state, _ = adapting(adapting.initial(USERS), inputs)
    assert not any(x.requires_grad for x in fast.leaves(state))
    adapting.bind(state)(inputs[0]).square().sum().backward()
    moved = {n: w.requires_grad_() for n, w in fast.detach(adapting.weights(state)).items()}
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

    adapting = Adapter(memory, "into", loss, lr=0.1)
    inputs = torch.randn(USERS, 5, 3), torch.randn(USERS, 5, 2)
    state, _ = adapting(adapting.initial(USERS), inputs)
    params = {n: p for n, p in memory.named_parameters() if "into" in n}
    expected = torch.autograd.grad(
        loss(params, (inputs[0][0], inputs[1][0])), list(params.values())
    )
    for name, gradient in zip(params, expected, strict=True):
        torch.testing.assert_close(state.delta[name][0], -0.1 * gradient)


# ---- low rank, steps, rates --------------------------------------------------------------------
def test_low_rank_is_the_loop_over_its_factors():
    module, inputs = net(), data()
    adapting = adapter(module, "", rank=1, steps=2, lr={"2": 0.2, "": 0.1}, momentum=0.5, decay=0.1)
    state = adapting.initial(USERS, torch.Generator().manual_seed(0))
    assert sorted(state.delta) == ["0.bias", "0.weight/left", "0.weight/right", "2.bias",
                                   "2.weight/left", "2.weight/right"]  # fmt: skip
    assert not any(x.any() for x in adapting.displacements(state).values())
    new, losses = adapting(state, inputs)
    for user in range(USERS):
        slow = {n: p.detach() for n, p in module.named_parameters()}
        delta = {n: x[user] for n, x in state.delta.items()}
        velocity = {n: torch.zeros_like(x) for n, x in delta.items()}
        for step in range(2):
            delta = {n: x.clone().requires_grad_() for n, x in delta.items()}
            params = {
                n: p + (delta[n] if n in delta else delta[n + "/left"] @ delta[n + "/right"])
                for n, p in slow.items()
            }
            loss = loss_of(module)(params, (inputs[0][user], inputs[1][user]))
            if step == 0:
                torch.testing.assert_close(losses[user], loss.detach(), atol=1e-12, rtol=0)
            gradients = torch.autograd.grad(loss, list(delta.values()))
            for n, g in zip(delta, gradients, strict=True):
                velocity[n] = 0.5 * velocity[n] + g
                decayed = delta[n] if "left" in n else 0.9 * delta[n]
                delta[n] = decayed - (0.2 if n[0] == "2" else 0.1) * velocity[n]
        for n, x in delta.items():
            torch.testing.assert_close(new.delta[n][user], x, atol=1e-12, rtol=0)


def test_only_what_gets_smaller_is_factored_and_kernels_are_matrices():
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(2, 2))
    adapting = Adapter(module, "weight", lambda p, _: p["0.weight"].sum(), lr=0.1, rank=2)
    state = adapting.initial(5, torch.Generator().manual_seed(0))
    shapes = {n: tuple(x.shape) for n, x in state.delta.items()}
    assert shapes == {
        "0.weight/left": (5, 8, 2),
        "0.weight/right": (5, 2, 27),
        "1.weight": (5, 2, 2),
    }
    state, _ = adapting(state, torch.zeros(5))
    assert adapting.weights(state)["0.weight"].shape == (5, 8, 3, 3, 3)
    with pytest.raises(ValueError, match="rank=2 draws factors; pass a generator"):
        adapting.initial(5)


def test_the_first_step_of_low_rank_is_in_expectation_the_whole_one():
    module = nn.Linear(12, 10, bias=False)
    x, y = torch.randn(1, 4, 12).expand(20_000, 4, 12), torch.randn(1, 4, 10).expand(20_000, 4, 10)
    low, whole = adapter(module, "weight", rank=3), adapter(module, "weight")
    start = low.initial(len(x), torch.Generator().manual_seed(0))
    found = low.displacements(low(start, (x, y))[0])["weight"].mean(0)
    expected = whole(whole.initial(1), (x[:1], y[:1]))[0].delta["weight"][0]
    torch.testing.assert_close(found, expected, atol=0.02 * expected.abs().max().item(), rtol=0)


# ---- through the inner loop --------------------------------------------------------------------
@pytest.mark.parametrize("options", [{}, {"momentum": 0.9, "decay": 0.1}, {"clip": 0.5}])
def test_the_gradient_through_inner_steps_is_that_of_the_unrolled_loop(options):
    module, support, query = net(), data(), data()
    adapted = adapt(
        module, loss_of(module), support, lr=0.3, match="0.weight|2", steps=3,
        differentiable=True, **options,
    )  # fmt: skip
    (adapted(query[0]) - query[1]).square().mean().backward()
    found = {n: p.grad for n, p in module.named_parameters()}

    slow = dict(module.named_parameters())
    names = ["0.weight", "2.weight", "2.bias"]
    total = torch.zeros(())
    for user in range(USERS):
        delta = {n: torch.zeros_like(slow[n]) for n in names}
        velocity = {n: torch.zeros_like(slow[n]) for n in names}
        for _ in range(3):
            params = {n: p + delta.get(n, 0.0) for n, p in slow.items()}
            loss = loss_of(module)(params, (support[0][user], support[1][user]))
            gradients = torch.autograd.grad(loss, [params[n] for n in names], create_graph=True)
            norm = torch.cat([g.flatten() for g in gradients]).norm()
            scale = torch.clamp(options.get("clip", 1e9) / norm, max=1.0)
            for n, g in zip(names, gradients, strict=True):
                velocity[n] = options.get("momentum", 0.0) * velocity[n] + scale * g
                delta[n] = (1 - options.get("decay", 0.0)) * delta[n] - 0.3 * velocity[n]
        y = torch.func.functional_call(
            module, {n: p + delta.get(n, 0.0) for n, p in slow.items()}, query[0][user]
        )
        total = total + (y - query[1][user]).square().mean() / USERS
    expected = torch.autograd.grad(total, list(slow.values()))
    for (name, gradient), other in zip(found.items(), expected, strict=True):
        torch.testing.assert_close(gradient, other, atol=1e-12, rtol=0, msg=name)


def test_the_gradient_through_inner_steps_and_rates_is_that_of_finite_differences():
    module, support, query = net(), data(), data()
    start = {n: p.detach().clone() for n, p in module.named_parameters()}

    def outer(weight: Tensor, rate: Tensor, left: Tensor) -> Tensor:
        adapting = adapter(module, "2", lr={"weight": rate, "bias": 0.1}, rank=1, steps=2,
                           momentum=0.5, differentiable=True)  # fmt: skip
        adapting.slow["2.weight"] = weight
        state = adapting.initial(USERS, torch.Generator().manual_seed(0))
        state.delta["2.weight/left"] = left
        state, _ = adapting(state, support)
        return (adapting.bind(state)(query[0]) - query[1]).square().mean()

    arguments = (start["2.weight"], torch.tensor(0.3).double(), torch.randn(USERS, 2, 1).double())
    assert torch.autograd.gradcheck(outer, [x.clone().requires_grad_() for x in arguments])


def test_first_order_is_the_default():
    for options in ({}, {"clip": 0.5, "steps": 2, "momentum": 0.5}):
        adapting = adapter(net(), "2", **options)
        state, losses = adapting(adapting.initial(USERS), data())
        assert not any(x.requires_grad for x in [*fast.leaves(state), losses])


def test_an_inner_gradient_of_zero_makes_no_nan_of_the_outer_one():
    module = nn.Linear(2, 2)

    def loss(params, row) -> Tensor:
        return (params["weight"] * row).square().sum()

    adapting = Adapter(module, "weight", loss, lr=0.1, clip=0.5, differentiable=True)
    state, losses = adapting(adapting.initial(USERS), torch.zeros(USERS))
    outer = adapting.weights(state)["weight"].sum()
    (gradient,) = torch.autograd.grad(outer, [module.weight])
    assert not losses.any() and torch.equal(gradient, torch.full((2, 2), float(USERS)))


def test_an_initialisation_learned_through_the_loop_adapts_better():
    module, generator = net(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.05)

    def gain(steps: int) -> Tensor:
        slopes = torch.randn(16, 1, 3, generator=generator).double()
        x = torch.randn(16, 10, 3, generator=generator).double()
        y = (x * slopes).sum(-1, keepdim=True).expand(-1, -1, 2)
        adapted = adapt(module, loss_of(module), (x[:, :5], y[:, :5]), lr=0.1, steps=steps,
                        differentiable=True)  # fmt: skip
        return (adapted(x[:, 5:]) - y[:, 5:]).square().mean()

    before = torch.stack([gain(2).detach() for _ in range(10)]).mean()
    for _ in range(40):
        optimizer.zero_grad()
        gain(2).backward()
        optimizer.step()
    after = torch.stack([gain(2).detach() for _ in range(10)]).mean()
    assert after < 0.7 * before


# ---- rebase ------------------------------------------------------------------------------------
def test_rebased_users_keep_their_weights_or_what_is_to_be_kept():
    module, inputs = net(), data()
    for keep in (0.0, 1.0, 0.25):
        adapting = adapter(module, "", keep=keep, momentum=0.5)
        state, _ = adapting(adapting.initial(USERS), inputs)
        before = adapting.weights(state)
        moved = {n: torch.randn_like(p) for n, p in adapting.slow.items()}
        moved["0.bias"] = torch.randn(USERS, 8).double()  # some by user
        rebased = adapting.rebase(state, moved)
        for name, way in moved.items():
            now = adapting.slow[name] + way + rebased.delta[name]
            torch.testing.assert_close(now, before[name] + keep * way, atol=1e-12, rtol=0)
        assert rebased.velocity is state.velocity
    with pytest.raises(KeyError, match=r"2\.weight moved, but adapted are 0\.weight, 0\.bias"):
        adapter(module, "0").rebase(state, moved)


def test_low_rank_is_rebased_as_far_as_its_first_factor_reaches():
    adapting = Adapter(nn.Linear(6, 5), "weight", lambda p, _: p["weight"].sum(), lr=0.1, rank=2)
    state = adapting.initial(3, torch.Generator().manual_seed(0))
    state.delta["weight/right"].normal_(generator=torch.Generator().manual_seed(1))
    left = state.delta["weight/left"]
    inside = {"weight": left @ torch.randn(3, 2, 6)}
    before = adapting.displacements(state)["weight"]
    after = adapting.displacements(adapting.rebase(state, inside))["weight"]
    torch.testing.assert_close(after, before - inside["weight"], atol=1e-5, rtol=0)
    moved = torch.randn(5, 6)
    rest = adapting.displacements(adapting.rebase(state, {"weight": moved}))["weight"]
    error = rest - (before - moved)
    torch.testing.assert_close(left.mT @ error, torch.zeros(3, 2, 6), atol=1e-5, rtol=0)


# ---- windows -----------------------------------------------------------------------------------
def frames(steps: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    resets = torch.zeros(USERS, steps, dtype=torch.bool)
    resets[1, 4] = resets[2, 1] = resets[2, 7] = True
    return torch.randn(USERS, steps, 3).double(), torch.randn(USERS, steps, 2).double(), resets


@pytest.mark.parametrize("every", [1, 2, 3])
def test_a_window_learns_from_the_newest_rows_of_its_user(every: int):
    module, (x, y, resets) = net(), frames()
    adapting = adapter(module, "2", momentum=0.5)
    window = Window(adapting, length=3, every=every)
    _, losses, due = window.scan(window.initial((x[:, 0], y[:, 0])), (x, y), resets)
    for user in range(USERS):
        state, seen = adapting.initial(1), 0
        for t in range(x.shape[1]):
            if resets[user, t]:
                state, seen = adapting.initial(1), 0
            seen += 1
            learns = seen >= 3 and (seen - 3) % every == 0
            assert due[user, t] == learns
            if learns:
                rows = slice(t - 2, t + 1)
                state, loss = adapting(state, (x[user : user + 1, rows], y[user : user + 1, rows]))
                torch.testing.assert_close(losses[user, t], loss[0], atol=1e-12, rtol=0)
            else:
                assert losses[user, t] == 0


def test_a_window_is_one_law_for_a_sequence_a_step_and_any_split():
    module, (x, y, resets) = net(), frames()
    window = Window(adapter(module, "", rank=1), length=3, every=2)

    def run(cuts: list[int]) -> tuple[WindowState, Tensor]:
        generator = torch.Generator().manual_seed(0)
        state, found = window.initial((x[:, 0], y[:, 0]), generator), []
        for a, b in zip([0, *cuts], [*cuts, 9], strict=True):
            state, losses, _ = window.scan(state, (x[:, a:b], y[:, a:b]), resets[:, a:b], generator)
            found.append(losses)
        return state, torch.cat(found, 1)

    whole, losses = run([])
    for cuts in ([4], [1, 2, 7], list(range(1, 9))):
        state, found = run(cuts)
        assert torch.equal(found, losses)
        assert all(map(torch.equal, fast.leaves(state), fast.leaves(whole)))
    with pytest.raises(ValueError, match="every=0"):
        Window(window.adapter, 3, 0)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"match": "nothing"}, "'nothing' matches no parameter of 0.weight, 0.bias"),
        ({"momentum": 1.5}, "momentum is 1.5"),
        ({"decay": -0.1}, "decay is -0.1"),
        ({"lr": 0.0}, r"lr=0\.0"),
        ({"lr": {"bias": 0.1}}, r"2\.weight has no rate; none of bias"),
        ({"lr": {"bias": 0.1, "": -1.0}}, "must be positive"),
        ({"keep": 2.0}, r"keep is 2\.0"),
        ({"steps": 0}, "steps=0"),
        ({"rank": -1}, "rank=-1"),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        adapter(net(), **options)
