"""A group of agents is each of its agents alone, in float64."""

import pytest
import torch

from agents.group import Group, join_rows, split_rows
from tests.worldmodel.small import CONTINUOUS, DISCRETE, MIXED, SEVERAL, make_agent, make_batch
from worldmodel import Batch

COUNT, ROWS = 3, 4


def make_agents(action, blocks=2, standardize=False, memory=False):
    args = {"action": action, "blocks": blocks, "memory": memory}
    agents = [make_agent(**args, seed=s).double() for s in range(COUNT)]
    for agent in agents:
        agent.standardize = standardize
        with torch.no_grad():  # off the zeros that some layers start with
            for parameter in agent.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return agents


def double(batch: Batch) -> Batch:
    obs = {key: value.double() for key, value in batch.obs.items()}
    return batch._replace(obs=obs, action=batch.action.double(), reward=batch.reward.double())


def generators(seed: int):
    return tuple(torch.Generator().manual_seed(seed + g) for g in range(COUNT))


def slow_of(agent):
    return {name: 0.9 * p.detach() for name, p in agent.critic.named_parameters()}


@pytest.mark.parametrize(
    ("action", "blocks", "standardize", "memory"),
    [
        (DISCRETE, 2, False, False),
        (DISCRETE, 1, True, False),
        (SEVERAL, 2, True, True),
        (CONTINUOUS, 2, False, True),
    ],
    ids=str,
)
def test_losses_and_gradients_are_those_of_each_agent_alone(action, blocks, standardize, memory):
    agents = make_agents(action, blocks, standardize, memory)
    twins = make_agents(action, blocks, standardize, memory)
    for agent, twin in zip(agents, twins, strict=True):
        twin.load_state_dict(agent.state_dict())
    batches = [double(make_batch(action=action, shape=(ROWS, 6), seed=g)) for g in range(COUNT)]
    group, slow = Group(agents), [slow_of(agent) for agent in agents]
    carry = join_rows([agent.initial(ROWS) for agent in agents])
    for _ in range(2):  # twice: the scale of returns must come back to its agent
        total, outcome = group.losses(join_rows(batches), carry, slow, generators(7))
    total.backward()
    parts = group.split(outcome)
    for g, twin in enumerate(twins):
        for _ in range(2):
            generator = torch.Generator().manual_seed(7 + g)
            alone = twin.losses(batches[g], twin.initial(ROWS), slow[g], generator)
        twin.total(alone.losses).backward()
        for key, value in alone.losses.items():
            torch.testing.assert_close(parts[g].losses[key], value.detach(), rtol=1e-11, atol=1e-11)
        for key, value in alone.metrics.items():
            torch.testing.assert_close(parts[g].metrics[key], value, rtol=1e-11, atol=1e-11)
        ours = dict(agents[g].named_parameters())
        for name, parameter in twin.named_parameters():
            torch.testing.assert_close(ours[name].grad, parameter.grad, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(agents[g].return_scale.high, twin.return_scale.high)


def test_acting_together_is_acting_alone():
    agents = make_agents(DISCRETE)
    rows = [double(make_batch(shape=(ROWS, 1), seed=g)) for g in range(COUNT)]
    rows = [Batch({k: v[:, 0] for k, v in r.obs.items()}, *(x[:, 0] for x in r[1:])) for r in rows]
    carries = [agent.initial(ROWS) for agent in agents]
    action, carry = Group(agents).act(join_rows(carries), join_rows(rows), generators(3))
    for g, agent in enumerate(agents):
        generator = torch.Generator().manual_seed(3 + g)
        expected, after = agent.act(carries[g], rows[g], generator)
        torch.testing.assert_close(action.chunk(COUNT)[g], expected)
        deter = split_rows(carry, COUNT)[g].latent.deter
        torch.testing.assert_close(deter, after.latent.deter, rtol=0, atol=1e-12)


def test_one_agent_s_nan_stays_with_it():
    agents = make_agents(DISCRETE)
    with torch.no_grad():
        next(agents[1].world.decoder.parameters()).fill_(torch.nan)
    batch = join_rows([double(make_batch(shape=(ROWS, 6), seed=g)) for g in range(COUNT)])
    carry = join_rows([agent.initial(ROWS) for agent in agents])
    slow = [slow_of(agent) for agent in agents]
    total, outcome = Group(agents).losses(batch, carry, slow, generators(0))
    total.backward()
    state = outcome.losses["state"].chunk(COUNT)
    assert state[0].isfinite().all() and state[2].isfinite().all() and state[1].isnan().any()


def test_agents_of_two_shapes_or_with_images_are_refused():
    with pytest.raises(ValueError, match="one shape"):
        Group([make_agent(), make_agent(layers=2)])
    with pytest.raises(ValueError, match="vectors"):
        Group([make_agent(MIXED)])


def test_a_second_backward_adds_to_the_agents_gradients_and_a_dropped_one_starts_anew():
    agents = make_agents(DISCRETE)
    batch = join_rows([double(make_batch(shape=(ROWS, 6), seed=g)) for g in range(COUNT)])
    carry = join_rows([agent.initial(ROWS) for agent in agents])
    group, slow = Group(agents), [slow_of(agent) for agent in agents]

    def backward():
        group.losses(batch, carry, slow, generators(0))[0].backward()

    backward()
    once = [[p.grad + 0 for p in agent.parameters() if p.grad is not None] for agent in agents]
    agents[1].zero_grad()
    for agent in agents:
        torch.nn.init.zeros_(agent.return_scale.low)
        torch.nn.init.zeros_(agent.return_scale.high)
    backward()
    for g, times in enumerate((2, 1, 2)):
        for p, grad in zip(agents[g].parameters(), once[g], strict=True):
            torch.testing.assert_close(p.grad, times * grad, rtol=1e-11, atol=1e-11)


def test_an_agent_that_was_loaded_stays_in_its_group_and_one_that_was_moved_is_told():
    agents = make_agents(DISCRETE)
    group = Group(agents)
    agents[1].load_state_dict(agents[0].state_dict())
    assert all(torch.equal(w[0], w[1]) for w in group.weights().values())
    Group(agents[1:])
    with pytest.raises(RuntimeError, match="another group"):
        group.weights()
