"""The agent: heads, losses, credit assignment, and acting as one law with training."""

import pytest
import torch

from agents import make_actor
from nested import fast as fast_state
from tests.worldmodel.small import (
    CONTINUOUS,
    DISCRETE,
    MIXED,
    SEVERAL,
    VECTOR,
    make_agent,
    make_batch,
    split,
)
from worldmodel import features

SPACES = pytest.mark.parametrize("action", [DISCRETE, SEVERAL, CONTINUOUS], ids=str)


def slow_of(agent):
    return {name: p.detach().clone() for name, p in agent.critic.named_parameters()}


@SPACES
def test_losses_match_the_scales_and_train_every_part(action):
    agent, batch = make_agent(MIXED, action), make_batch(MIXED, action)
    generator = torch.Generator().manual_seed(0)
    outcome = agent.losses(batch, agent.initial(4), slow_of(agent), generator)
    agent.total(outcome.losses).backward()
    silent = [name for name, p in agent.named_parameters() if p.grad is None]
    assert silent == []
    assert all(torch.isfinite(loss).all() for loss in outcome.losses.values())


def test_a_forgotten_or_misspelt_loss_is_an_error():
    agent, batch = make_agent(), make_batch()
    losses = agent.losses(batch, agent.initial(4), slow_of(agent)).losses
    losses["dynn"] = losses.pop("dyn")
    with pytest.raises(ValueError, match="dyn"):
        agent.total(losses)


def test_behaviour_losses_leave_the_world_model_alone():
    agent, batch = make_agent(), make_batch()
    torch.nn.init.normal_(agent.critic.net.out.weight)  # at zero it would pass no gradient on
    losses = agent.losses(batch, agent.initial(4), slow_of(agent)).losses
    world = list(agent.world.parameters())
    for key in ("policy", "value"):
        grads = torch.autograd.grad(losses[key].sum(), world, retain_graph=True, allow_unused=True)
        assert all(g is None for g in grads)
    grads = torch.autograd.grad(losses["repvalue"].sum(), world, allow_unused=True)
    assert any(g is not None and g.abs().sum() > 0 for g in grads)


@SPACES
def test_the_density_of_an_actor_is_torch_s(action):
    torch.manual_seed(0)
    actor = make_actor(6, action, 8, 1)
    x = torch.randn(50, 6)
    params = actor(x)
    drawn = actor.sample(actor.net(x), actor.noise(1, 50, torch.Generator().manual_seed(1))[0])
    if action.kind == "continuous":
        mean, deviation = params.chunk(2, -1)
        expected = torch.distributions.Normal(mean, deviation)
        log_prob, entropy = expected.log_prob(drawn).sum(-1), expected.entropy().sum(-1)
    else:
        blocks = zip(params.split(action.sizes, -1), drawn.split(action.sizes, -1), strict=True)
        pairs = [(torch.distributions.OneHotCategorical(p), a) for p, a in blocks]
        log_prob = torch.stack([d.log_prob(a) for d, a in pairs]).sum(0)
        entropy = torch.stack([d.entropy() for d, _ in pairs]).sum(0)
    assert torch.allclose(actor.log_prob(params, drawn), log_prob, atol=1e-5)
    assert torch.allclose(actor.entropy(params), entropy, atol=1e-5)


def test_the_surprise_of_the_memory_is_told():
    agent, batch = make_agent(memory=True), make_batch()
    start, seed = agent.initial(len(batch.first)), torch.Generator().manual_seed(3)
    posterior, _ = agent.world.observe(batch, start, torch.Generator().manual_seed(3))
    slow = {name: p.detach() for name, p in agent.critic.named_parameters()}
    metrics = agent.losses(batch, start, slow, seed).metrics
    assert torch.allclose(metrics["surprise"], posterior.fast.error.square().mean())
    assert metrics["surprise"] > 0
    without = make_agent()
    slow = {name: p.detach() for name, p in without.critic.named_parameters()}
    outcome = without.losses(batch, without.initial(len(batch.first)), slow)
    assert "surprise" not in outcome.metrics


def rows_of(batch):
    for t in range(batch.first.shape[1]):
        yield type(batch)({k: v[:, t] for k, v in batch.obs.items()}, *(x[:, t] for x in batch[1:]))


@SPACES
@pytest.mark.parametrize("memory", [False, True])
def test_acting_filters_as_training_does_and_draws_the_same_actions(memory, action):
    """float32, as it is used: actions to the bit where they are choices, states to rounding."""
    agent, batch = make_agent(VECTOR, action, memory=memory), make_batch(VECTOR, action)
    carry = again = agent.initial(4)
    one, other = (torch.Generator().manual_seed(3) for _ in range(2))
    for t, row in enumerate(rows_of(batch)):
        chosen, carry = agent.act(carry, row, one)
        with torch.no_grad():
            posterior, again = agent.world.observe(split(batch, t, t + 1), again, other)
            raw = agent.actor.net(features(posterior.deter, posterior.stoch)[:, 0])
        expected = agent.actor.sample(raw, agent.actor.noise(1, 4, other)[0])
        exact = 0.0 if action.kind == "discrete" else 1e-5
        torch.testing.assert_close(chosen, expected, rtol=0, atol=exact)
        for a, b in zip(fast_state.leaves(carry), fast_state.leaves(again), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_carries_of_acting_can_be_learned_from():
    agent, batch = make_agent(memory=True), make_batch()
    first = torch.zeros_like(batch.first)
    carry = agent.initial(4)
    for row in rows_of(batch):
        _, carry = agent.act(carry, row)
    outcome = agent.losses(batch._replace(first=first), carry, slow_of(agent))
    agent.total(outcome.losses).backward()
    grad = agent.world.dynamics.from_deter.linear.weight.grad
    assert grad is not None and grad.abs().sum() > 0


def test_the_actor_learns_which_imagined_action_is_rewarded(monkeypatch: pytest.MonkeyPatch):
    """Credit goes to the action that leads into the rewarded state, not to a neighbour's."""
    agent, batch = make_agent(), make_batch(shape=(8, 4))

    class Rewarded(torch.nn.Module):
        def value(self, feature):
            return feature[..., -1]

    class Continues(torch.nn.Module):
        def probability(self, feature):
            return torch.full(feature.shape[:-1], 9.0).sigmoid()

    posterior, _ = agent.world.observe(batch, agent.initial(8))
    parts = {"reward": Rewarded(), "continues": Continues()}
    agent.world._modules.update(parts)
    core = agent.world.dynamics.imagine

    def marked(*args):
        """A dream whose reward at h + 1 says whether action h was number 2."""
        dream = core(*args)
        feature, last = dream.feature.clone(), dream.last.clone()
        feature[:, 0, -1] = 0.0
        feature[:, 1:, -1] = dream.action[:, :-1, 2]
        last[:, -1] = dream.action[:, -1, 2]
        return dream._replace(feature=feature, last=last, rows=None)

    monkeypatch.setattr(agent.world.dynamics, "imagine", marked)
    optimizer = torch.optim.Adam([*agent.actor.parameters(), *agent.critic.parameters()], 3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(120):
        losses, *_ = agent._behaviour(posterior, slow_of(agent), generator)
        optimizer.zero_grad()
        (losses["policy"].mean() + losses["value"].mean()).backward()
        optimizer.step()
    probs = agent.actor(features(posterior.deter, posterior.stoch))
    assert probs[..., 2].mean() > 0.8
