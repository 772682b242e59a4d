"""The step in place, for where no gradient is wanted, is the readable one."""

import pytest
import torch

from tests.worldmodel.small import off_start
from worldmodel.cell import enter, recur
from worldmodel.prior import advance, folded


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
