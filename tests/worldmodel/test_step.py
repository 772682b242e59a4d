"""A row filtered where nobody learns is `observe` on a sequence of one row, in float64."""

import pytest
import torch

from agents import Dreamer
from nested import fast as fast_state
from tests.worldmodel.small import CONTINUOUS, MIXED, VECTOR, make_agent, make_batch, split
from tests.zoo import MEMORIES
from worldmodel import Batch, Carry
from worldmodel.rssm import MemoryUse

SEEDS = 3


def moved(agent: Dreamer) -> Dreamer:
    """In float64, off the zeros that some layers start with."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in agent.double().parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return agent


def double(batch: Batch) -> Batch:
    obs = {k: v.double() if v.is_floating_point() else v for k, v in batch.obs.items()}
    return batch._replace(obs=obs, action=batch.action.double(), reward=batch.reward.double())


def row_of(batch: Batch, t: int) -> Batch:
    return Batch({k: v[:, t] for k, v in batch.obs.items()}, *(x[:, t] for x in batch[1:]))


def both(agent: Dreamer, batch: Batch, use: MemoryUse = "write") -> tuple[Carry, Carry]:
    """The carries after all rows, by `step` and by `observe`; the generators end as one."""
    ours = theirs = agent.initial(len(batch.first))
    one, other = (torch.Generator().manual_seed(2) for _ in range(2))
    with torch.no_grad():
        for t in range(batch.first.shape[1]):
            ours = agent.world.step(row_of(batch, t), ours, one, use)
            _, theirs = agent.world.observe(split(batch, t, t + 1), theirs, other, use)
    assert torch.equal(one.get_state(), other.get_state())
    return ours, theirs


def assert_same(ours: Carry, theirs: Carry) -> None:
    pairs = zip(fast_state.leaves(ours), fast_state.leaves(theirs), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    assert torch.equal(ours.latent.stoch.sum(-1), torch.ones_like(ours.latent.stoch[..., 0]))


@pytest.mark.parametrize("blocks", [1, 2])
def test_vectors_and_choices(blocks: int) -> None:
    spec = {key: entry for key, entry in MIXED.items() if entry.kind != "image"}
    batch = double(make_batch(spec, CONTINUOUS))
    batch = batch._replace(action=3 * batch.action)  # beyond what an actor may ask
    assert_same(*both(moved(make_agent(spec, CONTINUOUS, blocks=blocks)), batch))


@pytest.mark.parametrize("use", ["write", "read", "off"])
@pytest.mark.parametrize("name", MEMORIES)
def test_every_memory_and_what_is_done_with_it(name: str, use: MemoryUse) -> None:
    agent, batch = make_agent(), double(make_batch())
    hidden = agent.world.dynamics.hidden
    sizes = (agent.world.encoder.dim, 3, 16, hidden, 3, 4, 2)
    agent.world.dynamics = type(agent.world.dynamics)(
        *sizes, memory=MEMORIES[name](3 * hidden, hidden)
    )
    assert_same(*both(moved(agent), batch, use))


@pytest.mark.parametrize("forget", ["episode", "session", "never"])
def test_fast_weights_are_forgotten_where_observe_forgets(forget: str) -> None:
    agent, batch = moved(make_agent(VECTOR, memory=True)), double(make_batch())
    agent.world.forget, agent.world.users = forget, True
    user = torch.randint(2, batch.user.shape, generator=torch.Generator().manual_seed(4))
    ours, theirs = both(agent, batch._replace(user=user))
    assert_same(ours, theirs)
    assert torch.equal(ours.user, user[:, -1])
