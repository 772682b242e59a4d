"""Deep, chained, self-modifying and Bayesian memories against their definitions.

Each is written out here as its paper says, one user at a time by `vmap(grad)` of the inner loss,
or, for least squares, as the posterior of all pairs at once.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, vmap

from nested import (
    TTTMLP,
    ContinuumMemory,
    NeuralMemory,
    RLSMemory,
    SelfModifyingMemory,
    TTTLinear,
    fast,
)
from nested.deep import DeepMemory
from nested.inner import NormedResidual, Residual

USERS, STEPS = 3, 7
DEEP = {
    "titans": lambda: NeuralMemory(5, 4, 6, 8, heads=2, momentum=0.6),
    "titans, chunks": lambda: NeuralMemory(5, 4, 6, 8, momentum=0.6, chunk=3, residual=True),
    "titans, bare": lambda: NeuralMemory(5, 4, 6, 8, forget=None, chunk=2),
    "ttt linear": lambda: TTTLinear(5, 4, 6, heads=2, chunk=3),
    "ttt mlp": lambda: TTTMLP(5, 4, 6, 8, heads=2, chunk=3),
}


def random(module: nn.Module) -> Any:
    """The module in float64, its parameters moved off any special values."""
    module = module.double()
    with torch.no_grad():
        for p in module.parameters():
            p += 0.3 * torch.randn_like(p)
    return module


def sequence() -> tuple[Tensor, Tensor]:
    """Inputs (T, B, 5) and resets (T, B), one in the middle of a chunk."""
    resets = torch.zeros(STEPS, USERS, dtype=torch.bool)
    resets[0] = resets[4, 1] = True
    return torch.randn(STEPS, USERS, 5, dtype=torch.float64), resets


def unit(x: Tensor) -> Tensor:
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def heads_of(memory: Any, x: Tensor) -> tuple[Tensor, ...]:
    """Query, key, value and gates of each user and head as one row."""
    d = memory.dim
    z = memory.project(x).flatten(0, 1)
    return unit(z[:, :d]), unit(z[:, d : 2 * d]), z[:, 2 * d : 3 * d], z[:, 3 * d :].sigmoid()


def net(weights: tuple[Tensor, ...], x: Tensor) -> Tensor:
    for w in weights[:-1]:
        x = torch.tanh(x @ w)
    return x @ weights[-1]


def ended(memory: DeepMemory, weights: tuple[Tensor, ...], x: Tensor, norm: Tensor) -> Tensor:
    """M(x) of one user's head; norm (2, D) holds its scale and shift."""
    f = net(weights, x)
    if isinstance(memory.end, NormedResidual):
        f = (f - f.mean()) / (f.var(correction=0) + 1e-5).sqrt()
        return x + norm[0] * f + norm[1]
    return x + f if isinstance(memory.end, Residual) else f


def norms(memory: DeepMemory) -> Tensor:
    """Scale and shift of each user's head (N, 2, D), of no use where there is no norm."""
    if not isinstance(memory.end, NormedResidual):
        return torch.zeros(USERS * memory.heads, 2, memory.dim, dtype=torch.float64)
    return torch.cat([memory.end.scale, memory.end.shift], 1).repeat(USERS, 1, 1)


@pytest.mark.parametrize("name", DEEP)
def test_deep_memories_descend_their_inner_loss(name: str):
    memory = random(DEEP[name]())
    state, norm = memory.initial(USERS), norms(memory)

    def loss(weights: tuple[Tensor, ...], k: Tensor, v: Tensor, norm: Tensor) -> Tensor:
        return 0.5 * (ended(memory, weights, k, norm) - v).square().sum()

    start = tuple(w.repeat(USERS, 1, 1) for w in memory.start)
    now = anchor = start
    velocity = tuple(torch.zeros_like(w) for w in start)
    count = torch.zeros(USERS * memory.heads, dtype=torch.int64)
    for x, reset in zip(*sequence(), strict=True):
        y, state = memory(x, state, reset)
        rows = reset.repeat_interleave(memory.heads)
        now, anchor = (fast.where(rows, start, w) for w in (now, anchor))
        velocity = fast.where(rows, tuple(torch.zeros_like(w) for w in start), velocity)
        count = torch.where(rows, 0, count)
        q, k, v, gates = heads_of(memory, x)
        gradients = vmap(grad(loss))(anchor, k, v, norm)
        theta, *rest = (g[:, None, None] for g in gates.unbind(1))
        eta = rest.pop(0) if memory.momentum is not None else torch.zeros_like(theta)
        alpha = rest.pop(0) if memory.forget is not None else torch.ones_like(theta)
        steps = zip(velocity, gradients, strict=True)
        velocity = tuple(eta * s - memory.rate * theta * g for s, g in steps)
        moved = zip(start, now, velocity, strict=True)
        now = tuple(w0 + alpha * (w - w0) + s for w0, w, s in moved)
        count = (count + 1) % memory.chunk
        anchor = fast.where(count == 0, now, anchor)
        read = vmap(lambda w, q, n: ended(memory, w, q, n))(now, q, norm)
        torch.testing.assert_close(y, memory.out(read.view(USERS, -1)), atol=1e-10, rtol=0)
        for mine, defined in zip(state.weights, now, strict=True):
            torch.testing.assert_close(mine.flatten(0, 1), defined, atol=1e-10, rtol=0)


def test_continuum_moves_each_block_when_its_chunk_is_full():
    memory = random(ContinuumMemory(5, 4, 6, 8, heads=2, chunks=(1, 2, 3)))
    state = memory.initial(USERS)
    start = [tuple(w.repeat(USERS, 1, 1) for w in block) for block in memory.start]
    now, pairs = list(start), [[[] for _ in start] for _ in range(USERS * 2)]
    for x, reset in zip(*sequence(), strict=True):
        y, state = memory(x, state, reset)
        rows = reset.repeat_interleave(2)
        now = [fast.where(rows, w0, w) for w0, w in zip(start, now, strict=True)]
        q, k, v, gates = heads_of(memory, x)
        for user in range(USERS * 2):
            h = k[user]
            for i, chunk in enumerate(memory.chunks):
                mine = tuple(w[user] for w in now[i])
                if rows[user]:
                    pairs[user][i] = []
                pairs[user][i].append((h.detach(), gates[user, i]))
                rest = pairs[user][i]

                def loss(w, h, v=v[user]):
                    return 0.5 * (h + net(w, h) - v).square().sum()

                gradient = grad(loss)(mine, h.detach())
                rest[-1] = tuple(memory.rates[i] * gates[user, i] * g for g in gradient)
                h = h + net(mine, h)
                if len(rest) == chunk:
                    for w, *gs in zip(now[i], *rest, strict=True):
                        w.data[user] -= torch.stack(gs).sum(0).detach()
                    pairs[user][i] = []
        read = q
        for w in now:
            read = read + vmap(net)(w, read)
        torch.testing.assert_close(y, memory.out(read.view(USERS, -1)), atol=1e-10, rtol=0)


@pytest.mark.parametrize("chunk", [1, 3])
def test_self_modifying_memory_follows_its_own_targets(chunk: int):
    memory = random(SelfModifyingMemory(5, 4, 6, 8, chunk=chunk))
    state = memory.initial(USERS)
    start = tuple(w[0].repeat(USERS, 1, 1, 1) for w in memory.start)
    now = anchor = start
    count = torch.zeros(USERS, dtype=torch.int64)

    def answer(w, x):
        return x + net(w, x)

    def loss(w, k, target):
        """The regression, and delta gradient descent's own term: |k_l W_l|^2 with k_l given."""
        first = k @ w[0]
        second = torch.tanh(first).detach() @ w[1]
        error = 0.5 * (answer(w, k) - target).square().sum()
        return error + 0.5 * first.square().sum() + 0.5 * second.square().sum()

    def learned(w, at, x):
        made = vmap(answer, (0, None))(at, x)
        k, v = unit(made[1]), unit(made[2])
        raw = made[3:].sum(1) * memory.dim**-0.5 + memory.gate[0]
        eta, alpha = raw.sigmoid()
        target = vmap(answer, (0, None))(at, v)
        gradients = vmap(grad(loss), (0, None, 0))(at, k, target)
        sizes = k.square().sum() + torch.tanh(k @ at[0]).square().sum(-1)
        rate = (eta / (chunk * (1 + eta * sizes)))[:, None, None]
        rows = zip(memory.start, w, gradients, strict=True)
        return tuple(w0[0] + alpha * (w - w0[0]) - rate * g for w0, w, g in rows)

    for x, reset in zip(*sequence(), strict=True):
        y, state = memory(x, state, reset)
        now, anchor = fast.where(reset, start, now), fast.where(reset, start, anchor)
        z = memory.project(x)[:, 0]
        q, row = unit(z[:, :6]), unit(z[:, 6:])
        now = vmap(learned)(now, anchor, row)
        count = (torch.where(reset, 0, count) + 1) % chunk
        anchor = fast.where(count == 0, now, anchor)
        read = vmap(answer)(tuple(w[:, 0] for w in now), q)
        torch.testing.assert_close(y, memory.out(read), atol=1e-10, rtol=0)


@pytest.mark.parametrize("keep", [1.0, 0.9])
def test_least_squares_is_the_posterior_of_all_pairs(keep: float):
    """Gaussian conditioning on every pair at once, the matrix a drifting process of known prior."""
    memory = random(RLSMemory(5, 4, dim=4))
    with torch.no_grad():
        memory.into.bias[-1] = torch.tensor(keep, dtype=torch.float64).logit().clamp(max=60)
        memory.into.weight[-1] = 0
    xs = torch.randn(1, 12, 5, dtype=torch.float64)
    none = torch.zeros(1, 12, dtype=torch.bool)
    _, state = memory.scan(xs, memory.initial(1), none)
    _, k, v, gates = heads_of(memory, xs[0])
    prior, start = memory.prior()[0], memory.start[0]
    time = torch.arange(12.0, dtype=torch.float64)
    drift = keep ** (time[:, None] - time).abs()
    noise = torch.diag(1 / gates[:, 0] - 1 + 1e-6 / gates[:, 0])
    gain = (prior @ k.T * keep ** (11 - time)) @ torch.linalg.inv(drift * (k @ prior @ k.T) + noise)
    mean = start + gain @ (v - k @ start)
    covariance = prior - gain @ (k * keep ** (11 - time)[:, None] @ prior)
    torch.testing.assert_close(state.weights[0, 0], mean, atol=1e-9, rtol=0)
    torch.testing.assert_close(state.covariance[0, 0], covariance, atol=1e-9, rtol=0)


def test_least_squares_beats_the_delta_rule_where_keys_overlap():
    memory = RLSMemory(8, 4, dim=8)
    with torch.no_grad():
        memory.into.bias[-2:] = 12.0
        memory.into.weight[-2:] = 0
        memory.into.weight[8:16] = torch.eye(8)
        memory.into.bias[8:16] = 0
    truth, keys = torch.randn(8, 8), unit(torch.randn(1, 40, 8) + 1)
    state = memory.initial(1)
    z = memory.project(keys)
    z[..., 16:24] = (keys @ truth).unsqueeze(2)
    for t in range(40):
        _, state = memory.step(z[:, t], state)
    assert (state.weights[0, 0] - truth).norm() < 0.05 * truth.norm()
    assert state.surprise < 1e-3


def test_covariance_stays_symmetric_and_positive():
    memory = RLSMemory(5, 4, dim=6, heads=2)
    with torch.no_grad():
        memory.into.bias.view(2, -1)[:, -2:] = 12.0  # hardly any noise or drift
        torch.nn.init.normal_(memory.spread)
    state = memory.initial(2)
    with torch.no_grad():
        for x in torch.randn(300, 2, 5):
            _, state = memory(x, state)
    assert torch.equal(state.covariance, state.covariance.mT)
    assert torch.linalg.eigvalsh(state.covariance.double()).min() > -1e-6
    assert state.weights.isfinite().all()


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: NeuralMemory(5, 4, hidden=0), "hidden=0"),
        (lambda: NeuralMemory(5, 4, momentum=1.0), "momentum is 1.0"),
        (lambda: NeuralMemory(5, 4, forget=0.0), "forget is 0.0"),
        (lambda: NeuralMemory(5, 4, chunk=0), "chunk=0"),
        (lambda: TTTLinear(5, 4, dim=0), "dim=0"),
        (lambda: ContinuumMemory(5, 4, chunks=()), "each block needs"),
        (lambda: ContinuumMemory(5, 4, chunks=(1, 2), rates=(1.0,)), "needs 2 positive"),
        (lambda: SelfModifyingMemory(5, 4, chunk=0), "chunk=0"),
        (lambda: RLSMemory(5, 4, heads=0), "heads=0"),
    ],
)
def test_mistakes_are_named(make, message: str):
    with pytest.raises(ValueError, match=message):
        make()
