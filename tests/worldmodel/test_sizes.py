"""The networks are DreamerV3's: they have its published numbers of parameters."""

import pytest

from tests.worldmodel.small import make_agent
from worldmodel import ActionSpec, ObsSpec


@pytest.mark.parametrize(
    ("sizes", "count"),
    [((512, 64, 4, 4, 64), 686_456), ((2048, 256, 16, 16, 256), 10_492_616)],
    ids=["1m", "12m"],
)
def test_parameter_counts_are_the_published_ones(sizes: tuple, count: int):
    obs = {"image": ObsSpec("image", (64, 64, 3))}
    action = ActionSpec("discrete", (6,))
    agent = make_agent(obs, action, sizes=sizes, stoch=32, blocks=8, layers=3)
    assert sum(p.numel() for p in agent.parameters()) == count
