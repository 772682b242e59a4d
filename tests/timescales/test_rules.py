"""Rules: the fast form equals torch's own or a twin that follows the equations line by line."""

import pytest
import torch
from torch import Tensor

from timescales import Rule, rules
from timescales.muon import newton_schulz, orthogonal

SHAPES = [(6, 4), (6, 4), (3, 9), (5,), (), (2, 3, 2, 2)]
TIGHT = 1e-12


def start() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    draws = [torch.randn(s, generator=generator, dtype=torch.float64) for s in SHAPES]
    return [torch.nn.Parameter(draw * 0.3) for draw in draws]


def grads(step: int) -> list[Tensor]:
    """Gradients of very different sizes, so that some are clipped and some are not."""
    generator = torch.Generator().manual_seed(step)
    scale = [1e-3, 1.0, 10.0, 1e-2, 0.0 if step < 3 else 1.0, 0.1]
    draws = [torch.randn(s, generator=generator, dtype=torch.float64) for s in SHAPES]
    return [draw * factor for draw, factor in zip(draws, scale, strict=True)]


def follow(rule: Rule, steps: int = 40) -> list[torch.nn.Parameter]:
    params = start()
    optimizer = rule(params)
    for step in range(steps):
        for p, g in zip(params, grads(step), strict=True):
            p.grad = g
        optimizer.step()
    return params


def check(rule: Rule, twin: list[Tensor], tolerance: float = TIGHT) -> None:
    for found, expected in zip(follow(rule), twin, strict=True):
        assert float((found.detach() - expected).abs().max()) <= tolerance
        assert found.detach().isfinite().all()


def rotate(matrix: Tensor) -> Tensor:
    """Newton-Schulz on one matrix, as Muon's author writes it, scaled as Moonlight does."""
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    x = x.T if matrix.shape[0] > matrix.shape[1] else x
    return x * 0.2 * max(matrix.shape) ** 0.5


def laprop_twin(warmup: int, decay: float, agc: float, steps: int = 40) -> list[Tensor]:
    lr, b1, b2, eps, pmin = 0.01, 0.9, 0.999, 1e-20, 1e-3
    w = [p.detach().clone() for p in start()]
    nu, mu = [torch.zeros_like(x) for x in w], [torch.zeros_like(x) for x in w]
    for t in range(1, steps + 1):
        rate = lr * (min(1.0, t / warmup) if warmup else 1.0)
        for i, g in enumerate(grads(t - 1)):
            if agc:
                upper = agc * max(pmin, float(w[i].norm()))
                g = g / max(1.0, float(g.norm()) / upper)
            nu[i] = b2 * nu[i] + (1 - b2) * g * g
            u = g / ((nu[i] / (1 - b2**t)).sqrt() + eps)
            mu[i] = b1 * mu[i] + (1 - b1) * u
            w[i] = w[i] - rate * (mu[i] / (1 - b1**t) + decay * w[i])
    return w


@pytest.mark.parametrize("warmup, decay, agc", [(0, 0.0, 0.3), (20, 0.1, 0.3), (5, 0.0, 0.0)])
def test_laprop(warmup: int, decay: float, agc: float):
    rule = rules.laprop(lr=0.01, warmup=warmup, weight_decay=decay, agc=agc)
    check(rule, laprop_twin(warmup, decay, agc))


def test_laprop_leaves_gradients_alone_without_clipping():
    params = start()
    optimizer = rules.laprop(agc=0.0)(params)
    for p, g in zip(params, grads(5), strict=True):
        p.grad = g
    optimizer.step()
    assert all(
        torch.equal(p.grad, g) for p, g in zip(params, grads(5), strict=True) if p.grad is not None
    )


def test_laprop_is_the_same_in_one_run_and_in_many():
    """Large levels are walked in runs that stay in the cache."""
    made = [torch.nn.Parameter(torch.ones(1 << 17, dtype=torch.float64) * i) for i in range(1, 6)]
    alone = [torch.nn.Parameter(p.detach().clone()) for p in made]
    together = rules.laprop(lr=0.1)(made)
    apart = [rules.laprop(lr=0.1)([p]) for p in alone]
    for step in range(3):
        for p in (*made, *alone):
            p.grad = torch.full_like(p, 0.5 + step)
        together.step()
        for optimizer in apart:
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(made, alone, strict=True))


def test_laprop_refuses_what_makes_no_sense():
    with pytest.raises(ValueError, match=r"\{'lr': -1\}"):
        rules.laprop(lr=-1)(start())
    with pytest.raises(ValueError, match="betas"):
        rules.laprop(betas=(0.9, 1.0))(start())


def test_adamw_is_the_printed_equation():
    lr, b1, b2, eps, decay = 0.01, 0.8, 0.99, 1e-6, 0.1
    w = [p.detach().clone() for p in start()]
    m, v = [torch.zeros_like(x) for x in w], [torch.zeros_like(x) for x in w]
    for t in range(1, 41):
        for i, g in enumerate(grads(t - 1)):
            m[i] = b1 * m[i] + (1 - b1) * g
            v[i] = b2 * v[i] + (1 - b2) * g * g
            step = (m[i] / (1 - b1**t)) / ((v[i] / (1 - b2**t)).sqrt() + eps)
            w[i] = w[i] * (1 - lr * decay) - lr * step
    check(rules.adamw(lr, (b1, b2), eps, decay), w)


@pytest.mark.parametrize("momentum, nesterov", [(0.0, False), (0.9, False), (0.9, True)])
def test_sgd(momentum: float, nesterov: bool):
    w = [p.detach().clone() for p in start()]
    m = [torch.zeros_like(x) for x in w]
    for step in range(40):
        for i, g in enumerate(grads(step)):
            g = g + 0.1 * w[i]
            m[i] = momentum * m[i] + g
            w[i] = w[i] - 0.01 * (g + momentum * m[i] if nesterov else m[i])
    check(rules.sgd(0.01, momentum, nesterov, weight_decay=0.1), w)


def test_muon_is_orthogonal_momentum_for_matrices_and_adamw_for_the_rest():
    lr, beta, decay = 0.01, 0.9, 0.1
    params = start()
    others = [p for p in params if p.ndim != 2]
    adamw = rules.adamw(lr, weight_decay=decay)(others)
    m = [torch.zeros_like(p) for p in params]
    for step in range(40):
        for i, (p, g) in enumerate(zip(params, grads(step), strict=True)):
            p.grad = g
            if p.ndim == 2:
                m[i] = beta * m[i] + (1 - beta) * g
                ahead = (1 - beta) * g + beta * m[i]
                p.data = p.data * (1 - lr * decay) - lr * rotate(ahead)
        adamw.step()
    check(rules.muon(lr, beta, weight_decay=decay), [p.detach() for p in params])


def test_m3_in_moving_averages():
    lr, b1, b2, b3, period, mix, eps = 0.01, 0.9, 0.99, 0.8, 4, 0.5, 1e-8
    w = [p.detach().clone() for p in start()]
    zeros = [torch.zeros_like(x) for x in w]
    fast, slow, square = zeros[:], zeros[:], zeros[:]
    window: list[list[Tensor]] = [[] for _ in w]
    for t in range(1, 41):
        for i, g in enumerate(grads(t - 1)):
            square[i] = b2 * square[i] + (1 - b2) * g * g
            u = g / ((square[i] / (1 - b2**t)).sqrt() + eps)
            fast[i] = b1 * fast[i] + (1 - b1) * u
            window[i].append(u)
            if t % period == 0:
                slow[i] = b3 * slow[i] + (1 - b3) * sum(window[i]) / period
                window[i] = []
            quick = fast[i] / (1 - b1**t)
            long = slow[i] / (1 - b3 ** (t // period)) if t >= period else slow[i]
            if g.ndim == 2:
                quick, long = rotate(quick), rotate(long)
            w[i] = w[i] - lr * (quick + mix * long)
    check(rules.m3(lr, (b1, b2, b3), period, mix, eps), w, 1e-9)


@pytest.mark.parametrize("name", ["laprop", "m3"])
def test_steps_do_not_shrink_and_do_not_depend_on_the_gradient_scale(name: str):
    """M3 as printed shrinks as 1/sqrt(t); neither rule may."""
    lengths: dict[float, list[float]] = {}
    for scale in (1e-4, 1.0):
        rule: Rule = {"laprop": rules.laprop(warmup=0, agc=0.0), "m3": rules.m3()}[name]
        generator = torch.Generator().manual_seed(0)
        p = torch.nn.Parameter(torch.zeros(8, 8, dtype=torch.float64))
        optimizer = rule([p])
        moved = []
        for _ in range(400):
            before = p.detach().clone()
            p.grad = scale * torch.randn(8, 8, generator=generator, dtype=torch.float64)
            optimizer.step()
            moved.append(float((p.detach() - before).norm()))
        lengths[scale] = [sum(moved[50:100]), sum(moved[-50:])]
    early, late = lengths[1.0]
    assert late > 0.8 * early
    assert lengths[1e-4] == pytest.approx(lengths[1.0], rel=1e-2)


def test_orthogonal_brings_singular_values_near_one_and_keeps_the_rest():
    generator = torch.Generator().manual_seed(0)
    wide, tall = (torch.randn(s, generator=generator) for s in [(8, 32), (32, 8)])
    vector = torch.ones(4)
    found = orthogonal([wide, vector, tall])
    assert found[1] is vector
    for matrix in newton_schulz(wide[None], 5), newton_schulz(tall[None], 5):
        values = torch.linalg.svdvals(matrix[0])
        assert values.min() > 0.6 and values.max() < 1.25
    assert float(found[0].square().mean().sqrt()) == pytest.approx(0.2, rel=0.2)


@pytest.mark.parametrize("name", ["adamw", "laprop", "sgd", "muon", "m3"])
def test_a_state_dict_round_trip_is_exact(name: str):
    rule: Rule = {
        "adamw": rules.adamw(),
        "laprop": rules.laprop(),
        "sgd": rules.sgd(momentum=0.9),
        "muon": rules.muon(),
        "m3": rules.m3(period=3),
    }[name]
    whole = follow(rule, 11)
    params = start()
    optimizer = rule(params)
    for step in range(11):
        if step == 5:
            state = optimizer.state_dict()
            optimizer = rule(params)
            optimizer.load_state_dict(state)
        for p, g in zip(params, grads(step), strict=True):
            p.grad = g
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(params, whole, strict=True))
