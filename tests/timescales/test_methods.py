"""Published methods are configurations: each equals its textbook loop to 1e-12 in float64.

The loops are written out by hand, on plain tensors; only the model and the loss are shared.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from timescales import Descend, Every, Timescales, presets, rules
from timescales.level import Level

from .problem import distance, gradients, loss, model, run, values

STEPS = 48
TIGHT = 1e-12
LR = 0.05
GROUPS = [r"^4\.", r"^2\.", r"^0\."]  # output to input


class Adam:
    """Adam as its paper prints it, on a list of tensors."""

    def __init__(self, lr: float = 0.01) -> None:
        self.lr, self.t = lr, 0
        self.m: list[Tensor] = []
        self.v: list[Tensor] = []

    def step(self, weights: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
        self.t += 1
        self.m = self.m or [torch.zeros_like(w) for w in weights]
        self.v = self.v or [torch.zeros_like(w) for w in weights]
        for i, (w, g) in enumerate(zip(weights, grads, strict=True)):
            self.m[i] = 0.9 * self.m[i] + 0.1 * g
            self.v[i] = 0.999 * self.v[i] + 0.001 * g * g
            mean, square = self.m[i] / (1 - 0.9**self.t), self.v[i] / (1 - 0.999**self.t)
            w.data -= self.lr * mean / (square.sqrt() + 1e-8)


def descend(module: torch.nn.Module, step: int, lr: float = LR) -> None:
    """One step of plain gradient descent."""
    for p, g in zip(module.parameters(), gradients(module, step), strict=True):
        p.data -= lr * g


def engine(levels: list[Level], seed: int | None = None) -> tuple[torch.nn.Module, Timescales]:
    module = model()
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return module, Timescales(module.named_parameters(), levels, generator)


def test_plain_is_a_torch_loop_bit_for_bit():
    module, timescales = engine(presets.plain(rules.adamw(lr=0.01, weight_decay=0.1)))
    run(module, timescales, range(STEPS))
    twin = model()
    optimizer = torch.optim.AdamW(twin.parameters(), lr=0.01, weight_decay=0.1, fused=True)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss(twin, step).backward()
        optimizer.step()
    assert distance(module, values(twin)) == 0.0


def test_cms_sums_gradients_over_each_window():
    for reduce in ("sum", "mean"):
        module, timescales = engine(presets.cms(GROUPS, rules.adamw(lr=0.01), (1, 4, 16), reduce))
        run(module, timescales, range(STEPS))
        twin = model()
        blocks = [list(twin[i].parameters()) for i in (4, 2, 0)]
        adams = [Adam(), Adam(), Adam()]
        sums = [[torch.zeros_like(p) for p in block] for block in blocks]
        for step in range(STEPS):
            grads = dict(zip(twin.parameters(), gradients(twin, step), strict=True))
            for block, adam, total, period in zip(blocks, adams, sums, (1, 4, 16), strict=True):
                for i, p in enumerate(block):
                    total[i] += grads[p]
                if (step + 1) % period == 0:
                    adam.step(block, [g / (period if reduce == "mean" else 1) for g in total])
                    total[:] = [torch.zeros_like(p) for p in block]
        assert distance(module, values(twin)) < TIGHT, reduce


def test_lookahead():
    module, timescales = engine(presets.lookahead(rules.adamw(lr=0.01), n=5, rate=0.5))
    run(module, timescales, range(STEPS))
    twin, adam = model(), Adam()
    fast, slow = list(twin.parameters()), values(twin)
    for step in range(STEPS):
        adam.step(fast, gradients(twin, step))
        if (step + 1) % 5 == 0:
            slow = [s + 0.5 * (f.detach() - s) for s, f in zip(slow, fast, strict=True)]
            for f, s in zip(fast, slow, strict=True):
                f.data.copy_(s)
    assert distance(module, values(twin)) < TIGHT
    assert distance(timescales.weights("slow"), slow) < TIGHT


def test_diloco():
    module, timescales = engine(presets.diloco(rules.adamw(lr=0.01), n=8))
    run(module, timescales, range(STEPS))
    twin, adam = model(), Adam()
    inner, outer = list(twin.parameters()), values(twin)
    momentum = [torch.zeros_like(p) for p in outer]
    for step in range(STEPS):
        adam.step(inner, gradients(twin, step))
        if (step + 1) % 8 == 0:
            for i, p in enumerate(inner):
                delta = outer[i] - p.detach()
                momentum[i] = 0.9 * momentum[i] + delta
                outer[i] = outer[i] - 0.7 * (delta + 0.9 * momentum[i])
                p.data.copy_(outer[i])
    assert distance(module, values(twin)) < TIGHT
    assert distance(timescales.weights("outer"), outer) < TIGHT


def test_cls_er():
    levels = presets.cls_er(rules.sgd(LR), plastic_p=0.9, stable_p=0.3, rate=0.05)
    module, timescales = engine(levels, seed=3)
    run(module, timescales, range(STEPS))
    twin, draw = model(), torch.Generator().manual_seed(3)
    averages = {"plastic": values(twin), "stable": values(twin)}
    counts = {"plastic": 0, "stable": 0}
    for step in range(STEPS):
        descend(twin, step)
        for name, p in (("plastic", 0.9), ("stable", 0.3)):
            if torch.rand((), generator=draw) < p:
                counts[name] += 1
                alpha = min(1 - 1 / (counts[name] + 1), 0.95)
                averages[name] = [
                    alpha * a + (1 - alpha) * w.detach()
                    for a, w in zip(averages[name], twin.parameters(), strict=True)
                ]
    assert 0 < counts["stable"] < counts["plastic"] < STEPS
    for name, average in averages.items():
        assert distance(timescales.weights(name), average) < TIGHT, name


def test_hare_and_tortoise():
    module, timescales = engine(presets.hare_tortoise(rules.adamw(lr=0.01), n=7, rate=0.1))
    run(module, timescales, range(STEPS))
    twin, adam = model(), Adam()
    hare, tortoise = list(twin.parameters()), values(twin)
    for step in range(STEPS):
        adam.step(hare, gradients(twin, step))
        tortoise = [0.9 * t + 0.1 * h.detach() for t, h in zip(tortoise, hare, strict=True)]
        if (step + 1) % 7 == 0:
            for h, t in zip(hare, tortoise, strict=True):
                h.data.copy_(t)
    assert distance(module, values(twin)) < TIGHT
    assert distance(timescales.weights("tortoise"), tortoise) < TIGHT


def test_benna_fusi():
    depth, rate = 4, 0.25
    module, timescales = engine(presets.benna_fusi(rules.sgd(LR), depth, rate))
    run(module, timescales, range(STEPS))
    twin = model()
    u = [values(twin) for _ in range(depth)]
    capacity = [2.0**k for k in range(depth)]
    pipe = [rate * 2.0**-k for k in range(depth - 1)]  # between beaker k and k + 1
    for step in range(STEPS):
        for i, g in enumerate(gradients(twin, step)):
            for k in range(depth):
                flow = torch.zeros_like(g) if k else -LR * g * capacity[0]
                if k > 0:
                    flow = flow + pipe[k - 1] * (u[k - 1][i] - u[k][i])
                if k + 1 < depth:
                    flow = flow + pipe[k] * (u[k + 1][i] - u[k][i])
                u[k][i] = u[k][i] + flow / capacity[k]
        for p, first in zip(twin.parameters(), u[0], strict=True):
            p.data.copy_(first)
    assert distance(module, u[0]) < TIGHT
    for k in range(1, depth):
        assert distance(timescales.weights(f"u{k + 1}"), u[k]) < TIGHT, k


def test_l2_init_is_its_penalty_under_sgd():
    strength = 0.3
    module, timescales = engine(presets.l2_init(rules.sgd(LR), LR * strength))
    run(module, timescales, range(STEPS))
    twin = model()
    start = values(twin)
    for step in range(STEPS):
        pairs = zip(twin.parameters(), start, strict=True)
        penalty = sum((p - s).square().sum() for p, s in pairs)
        total = loss(twin, step) + strength / 2 * penalty
        for p, g in zip(
            twin.parameters(), torch.autograd.grad(total, list(twin.parameters())), strict=True
        ):
            p.data -= LR * g
    assert distance(module, values(twin)) < TIGHT


def test_ewc_is_its_penalty_under_sgd():
    """Two tasks; the Fisher of the first is the mean square of its gradients."""
    strength, half = 3.0, STEPS // 2
    module, timescales = engine(presets.ewc(rules.sgd(LR)))
    twin = model()
    names = [name for name, _ in twin.named_parameters()]
    anchor = values(twin)
    fisher = [torch.zeros_like(p) for p in anchor]
    for step in range(STEPS):
        if step == half:
            timescales.tick("task")
            anchor = values(twin)
            squares = [[g.square() for g in gradients(twin, s)] for s in range(half)]
            fisher = [torch.stack(each).mean(0) for each in zip(*squares, strict=True)]
        terms = zip(fisher, twin.parameters(), anchor, strict=True)
        penalty = sum((f * (p - a).square()).sum() for f, p, a in terms)
        total = loss(twin, step) + strength / 2 * penalty
        for p, g in zip(
            twin.parameters(), torch.autograd.grad(total, list(twin.parameters())), strict=True
        ):
            p.data -= LR * g
        loss(module, step).backward()
        rates = {name: LR * strength * f for name, f in zip(names, fisher, strict=True)}
        timescales.tick("update", rates={"fisher": rates})
    assert distance(module, values(twin)) < TIGHT
    assert max(float(f.max()) for f in fisher) > 0


def users(weights: list[Tensor], round_: int) -> tuple[list[Tensor], Tensor]:
    """What three users make of the weights in two steps of their own, stacked; their samples."""
    local = []
    for user in range(3):
        twin = model()
        for p, w in zip(twin.parameters(), weights, strict=True):
            p.data.copy_(w)
        for step in range(2):
            descend(twin, 100 * round_ + 10 * user + step)
        local.append(values(twin))
    return [torch.stack(each) for each in zip(*local, strict=True)], torch.tensor([1.0, 2.0, 5.0])


def rounds(levels: list[Level], unit: str) -> tuple[torch.nn.Module, Timescales]:
    module, timescales = engine(levels)
    names = [name for name, _ in module.named_parameters()]
    for round_ in range(6):
        stacked, samples = users(values(module), round_)
        handed = (dict(zip(names, stacked, strict=True)), samples)
        assert timescales.tick(unit, sources={"user": handed})
    return module, timescales


def textbook_mean(weights: list[Tensor], round_: int) -> list[Tensor]:
    stacked, samples = users(weights, round_)
    return [sum(float(n) * t for n, t in zip(samples, s, strict=True)) / 8.0 for s in stacked]  # pyright: ignore[reportReturnType]


def test_fedavg():
    module, _ = rounds(presets.fedavg(), "session")
    server = values(model())
    for round_ in range(6):
        server = textbook_mean(server, round_)
    assert distance(module, server) < TIGHT


def test_fedopt_steps_on_the_pseudo_gradient():
    module, _ = rounds(presets.fedavg(outer=rules.sgd(0.5, momentum=0.9)), "session")
    server = values(model())
    momentum = [torch.zeros_like(w) for w in server]
    for round_ in range(6):
        mean = textbook_mean(server, round_)
        for i, m in enumerate(mean):
            momentum[i] = 0.9 * momentum[i] + (server[i] - m)
            server[i] = server[i] - 0.5 * momentum[i]
    assert distance(module, server) < TIGHT


def test_reptile():
    module, _ = rounds(presets.reptile(rate=0.3), "task")
    meta = values(model())
    for round_ in range(6):
        pairs = zip(meta, textbook_mean(meta, round_), strict=True)
        meta = [w + 0.3 * (m - w) for w, m in pairs]
    assert distance(module, meta) < TIGHT


def test_geometric_levels_are_windows_with_learning_rates_of_their_own():
    levels = presets.geometric(GROUPS, rules.sgd, lr=0.01, base=2, lr_power=1.0)
    assert [(level.name, level.every.n) for level in levels] == [
        ("fast", 1),
        ("mid", 2),
        ("slow", 4),
    ]
    module, timescales = engine(levels)
    run(module, timescales, range(8))
    by_hand = [
        Level(name, match=group, every=Every(n), flow=Descend(rules.sgd(0.01 * n)))
        for name, group, n in zip(("a", "b", "c"), GROUPS, (1, 2, 4), strict=True)
    ]
    twin, other = engine(by_hand)
    run(twin, other, range(8))
    assert distance(module, values(twin)) == 0.0


def test_geometric_splits_parameters_itself():
    sizes = {name: p.numel() for name, p in model().named_parameters()}
    levels = presets.geometric(2, lr=1e-3, parameters=sizes)
    _, timescales = engine(levels)
    assert list(timescales.weights("fast")) == ["2.weight", "2.bias", "4.weight", "4.bias"]
    assert list(timescales.weights("slow")) == ["0.weight", "0.bias"]
