"""A step that imagines is the readable one in place; a dream that makes all steps, the loop."""

import pytest
import torch

from agents.heads import policy_of
from tests.worldmodel.small import DISCRETE, VECTOR, make_agent, make_batch, off_start
from worldmodel.cell import enter, recur
from worldmodel.prior import Chooser, advance, folded


@pytest.mark.parametrize("memory", [False, True], ids=["plain", "memory"])
@pytest.mark.parametrize("blocks", [1, 2])
def test_advancing_in_place_is_the_readable_step(memory: bool, blocks: int):
    dynamics = off_start(memory, blocks)
    weights, _ = dynamics._hoist()
    g = torch.Generator().manual_seed(5)
    deter = torch.randn(6, 16, generator=g, dtype=torch.float64)
    stoch = torch.randn(6, 12, generator=g, dtype=torch.float64)
    bias = torch.randn(6, 16, generator=g, dtype=torch.float64)
    recalled = torch.randn(6, 8, generator=g, dtype=torch.float64) if memory else None
    with torch.no_grad():
        _, x = enter(weights, deter, stoch, deter.new_ones(()))
        before = [t.clone() for t in (deter, x, bias)]
        expected = recur(weights, deter, x, recalled, bias)
        found = advance(folded(weights), deter, x, recalled, bias, torch.empty_like(deter))
        torch.testing.assert_close(found, expected)
        assert all(torch.equal(a, b) for a, b in zip((deter, x, bias), before, strict=True))


def test_a_dream_of_choices_is_the_dream_step_by_step():
    agent, batch = make_agent(VECTOR, DISCRETE), make_batch(VECTOR, DISCRETE)
    posterior, _ = agent.world.observe(batch, agent.initial(4), torch.Generator().manual_seed(1))
    starts = agent.world.starts(posterior)
    found = []
    for alone in (True, False):
        generator = torch.Generator().manual_seed(2)
        recording = agent.actor.net.recording(starts.latent.deter, 5)
        assert recording is not None
        policy = policy_of(agent.actor, 5, generator, recording)
        assert isinstance(policy, Chooser)
        dream = agent.world.dynamics.imagine(
            starts,
            policy if alone else lambda feature, policy=policy: policy(feature),
            5,
            generator=generator,
            choices=agent.actor.choices,
        )
        judged = dream.judged(lambda x: x @ torch.arange(float(x.shape[-1])))
        apart = dream._replace(rows=None).judged(lambda x: x @ torch.arange(float(x.shape[-1])))
        assert dream.rows is not None and judged.shape == (len(starts.latent.deter), 6)
        torch.testing.assert_close(judged, apart)
        kept, logits = recording.joined(1)
        found.append([*dream, *kept, logits])
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected)
    whole, by_steps = (x[0] for x in found)
    assert not whole.is_inference() and not by_steps.is_inference()
