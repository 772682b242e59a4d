"""The world model: one law for sequence and step, resets, isolation, losses, imagination."""

from itertools import pairwise

import pytest
import torch

from nested import fast as fast_state
from tests.worldmodel.small import (
    CONTINUOUS,
    MIXED,
    SEVERAL,
    VECTOR,
    make_agent,
    make_batch,
    split,
)
from worldmodel import Batch, Carry, features
from worldmodel.rssm import MemoryUse

BOTH = pytest.mark.parametrize("memory", [False, True], ids=["plain", "memory"])


def filtered(agent, batch: Batch, cuts: list[int]):
    """Features and the last carry, filtering the pieces between the cuts one after another."""
    generator, carry = torch.Generator().manual_seed(5), agent.initial(len(batch.first))
    parts = []
    for a, b in pairwise(cuts):
        posterior, carry = agent.world.observe(split(batch, a, b), carry, generator)
        parts.append(features(posterior.deter, posterior.stoch))
    return torch.cat(parts, 1), carry


@BOTH
@pytest.mark.parametrize("cuts", [[0, 1, 2, 3, 4, 5, 6, 7], [0, 3, 7], [0, 1, 6, 7]])
def test_any_split_of_time_gives_the_same_result(memory: bool, cuts: list[int]):
    agent, batch = make_agent(memory=memory), make_batch()
    whole, carry = filtered(agent, batch, [0, 7])
    parts, last = filtered(agent, batch, cuts)
    assert torch.allclose(whole, parts, atol=1e-5)
    for a, b in zip(fast_state.leaves(carry), fast_state.leaves(last), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


@BOTH
def test_nothing_before_a_first_row_matters(memory: bool):
    agent, batch = make_agent(memory=memory), make_batch()
    first = torch.zeros_like(batch.first)
    first[:, 3] = True
    batch = batch._replace(first=first)
    other = batch._replace(
        obs={"state": torch.cat([batch.obs["state"][:, :3] + 5, batch.obs["state"][:, 3:]], 1)},
        action=batch.action.roll(1, -1),
    )
    other = other._replace(action=torch.cat([other.action[:, :4], batch.action[:, 4:]], 1))
    (a, _), (b, _) = filtered(agent, batch, [0, 7]), filtered(agent, other, [0, 7])
    assert torch.equal(a[:, 3:], b[:, 3:])
    assert not torch.equal(a[:, :3], b[:, :3])


@BOTH
def test_one_user_never_touches_another(memory: bool):
    agent, batch = make_agent(memory=memory), make_batch()
    state = batch.obs["state"].clone()
    state[1] += 3.0
    changed = batch._replace(obs={"state": state})
    (a, _), (b, _) = filtered(agent, batch, [0, 7]), filtered(agent, changed, [0, 7])
    others = [0, 2, 3]
    assert torch.equal(a[others], b[others])
    assert not torch.equal(a[1], b[1])


def test_fast_weights_are_forgotten_at_first_unless_configured_never():
    agent, batch = make_agent(memory=True), make_batch()
    first = torch.zeros_like(batch.first)
    first[:, -1] = True
    batch = batch._replace(first=first)
    once, _ = agent.world.observe(split(batch, 6, 7), agent.initial(4))
    for forget, equal in (("session", True), ("never", False)):
        agent.world.forget = forget
        posterior, _ = agent.world.observe(batch, agent.initial(4))
        same = torch.allclose(posterior.fast.weights[:, -1], once.fast.weights[:, 0], atol=1e-6)
        assert same == equal


@pytest.mark.parametrize("cuts", [[0, 7], [0, 1, 2, 3, 4, 5, 6, 7], [0, 2, 5, 7]])
def test_fast_weights_are_forgotten_where_another_user_sits_down(cuts: list[int]):
    """A new episode of the same user keeps them; any split of time gives the same."""
    agent, batch = make_agent(memory=True), make_batch()
    agent.world.users = True
    first, user = torch.zeros_like(batch.first), torch.zeros_like(batch.user)
    first[:, [0, 2, 5]], user[:, 5:] = True, 1
    user[3, 2:5] = 2  # this slot changes hands earlier, too
    batch = batch._replace(first=first, user=user)
    carry, weights = agent.initial(4), []
    for a, b in pairwise(cuts):
        posterior, carry = agent.world.observe(split(batch, a, b), carry)
        weights.append(posterior.fast.weights)
    found = torch.cat(weights, 1)
    for t, forgotten in ((2, [3]), (5, [0, 1, 2, 3])):
        once, _ = agent.world.observe(split(batch, t, t + 1), agent.initial(4))
        same = torch.isclose(found[:, t], once.fast.weights[:, 0], atol=1e-6).flatten(1).all(1)
        assert same.nonzero().flatten().tolist() == forgotten
    assert carry.user.tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("use", ["read", "off"])
def test_fast_weights_are_only_written_when_asked(use: MemoryUse):
    agent, batch = make_agent(memory=True), make_batch()
    _, carry = agent.world.observe(batch, agent.initial(4), use=use)
    start = fast_state.leaves(agent.initial(4).fast)
    assert all(map(torch.equal, fast_state.leaves(carry.fast), start))


@pytest.mark.parametrize("action", [SEVERAL, CONTINUOUS])
def test_losses_have_a_row_each_and_reach_every_parameter_of_the_world(action):
    agent = make_agent(MIXED, action, memory=True)
    batch = make_batch(MIXED, action)
    posterior, _ = agent.world.observe(batch, agent.initial(4))
    losses = agent.world.losses(batch, posterior)
    assert losses.keys() == {*MIXED, "dyn", "rep", "reward", "continue"}
    assert all(loss.shape == batch.first.shape for loss in losses.values())
    torch.stack([loss.mean() for loss in losses.values()]).sum().backward()
    silent = [n for n, p in agent.world.named_parameters() if p.grad is None]
    assert silent == []


def test_kl_losses_train_one_side_each():
    agent, batch = make_agent(), make_batch()
    posterior, _ = agent.world.observe(batch, agent.initial(4))
    agent.world.free_nats = 0.0
    losses = agent.world.losses(batch, posterior)
    prior = agent.world.dynamics.prior_net.out.weight
    post = agent.world.dynamics.posterior_net.out.weight
    only = torch.autograd.grad(losses["rep"].sum(), prior, retain_graph=True, allow_unused=True)
    assert only == (None,)
    assert torch.autograd.grad(losses["rep"].sum(), post, retain_graph=True)[0].abs().sum() > 0
    assert torch.autograd.grad(losses["dyn"].sum(), prior)[0].abs().sum() > 0


def test_a_world_model_overfits_one_batch():
    agent, batch = make_agent(VECTOR, sizes=(32, 16, 8, 2, 32)), make_batch(shape=(2, 6))
    optimizer = torch.optim.Adam(agent.world.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    history = []
    for _ in range(150):
        posterior, _ = agent.world.observe(batch, agent.initial(2), generator)
        losses = agent.world.losses(batch, posterior)
        total = torch.stack([loss.mean() for loss in losses.values()]).sum()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        history.append(losses["state"].mean().item())
    assert history[-1] < 0.2 * history[0]


@pytest.mark.parametrize("use", ["write", "read", "off"])
def test_imagination_follows_the_policy_from_its_carry(use: MemoryUse):
    agent, batch = make_agent(memory=True), make_batch()
    posterior, _ = agent.world.observe(batch, agent.initial(4))
    starts: Carry = agent.world.starts(posterior, 3)
    actions = torch.eye(3)[torch.arange(5) % 3]
    queue = iter(actions.unsqueeze(1).expand(5, 12, 3))
    dream = agent.world.dynamics.imagine(starts, lambda _: next(queue), 4, use)
    deter, stoch = agent.world.dynamics.states(dream.feature)
    assert deter.shape == (12, 4, 16)
    assert torch.equal(deter[:, 0], starts.latent.deter)
    assert torch.equal(dream.action, actions[:4].expand(12, 4, 3))
    assert torch.equal(stoch.sum(-1), torch.ones(12, 4, 3))
    assert dream.last.shape == dream.feature[:, 0].shape
    assert not torch.equal(dream.last, dream.feature[:, -1])


@pytest.mark.parametrize("memory", [False, True])
def test_few_actions_are_embedded_once(memory: bool):
    agent = make_agent(memory=memory).double()
    carry = agent.initial(5)
    queue = torch.eye(3, dtype=torch.float64)[torch.randint(3, (4, 5))]

    def dream(choices: torch.Tensor | None):
        rows, generator = iter(queue), torch.Generator().manual_seed(1)
        return agent.world.dynamics.imagine(
            carry, lambda _: next(rows), 4, "read", generator, choices
        )

    written_out = dream(None)
    torch.testing.assert_close(dream(agent.actor.choices), written_out, rtol=0, atol=1e-13)
    assert make_agent(action=SEVERAL).actor.choices is None


def test_starts_are_the_last_steps_in_batch_order():
    agent, batch = make_agent(), make_batch()
    posterior, _ = agent.world.observe(batch, agent.initial(4))
    starts = agent.world.starts(posterior, 2)
    assert torch.equal(starts.latent.deter, posterior.deter[:, -2:].reshape(8, 16))
    assert len(agent.world.starts(posterior).latent.deter) == 28
