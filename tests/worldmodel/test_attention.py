"""Attention: rotary positions that stay exact. What masks and rings do is tested with the whole."""

import torch

from worldmodel.attention import PERIOD, Rotary, rotate


def test_rotations_know_only_the_distance_however_far_the_stream_has_run():
    rotary = Rotary(8, 100.0)
    q, k = torch.randn(2, 8, dtype=torch.float64)
    here = rotate(q, rotary(torch.tensor(9), q)) @ rotate(k, rotary(torch.tensor(4), k))
    far = 10**12
    there = rotate(q, rotary(torch.tensor(far + 9), q)) @ rotate(
        k, rotary(torch.tensor(far + 4), k)
    )
    assert torch.allclose(here, there, rtol=1e-12, atol=1e-12)
    assert rotary.turns[0] == round(PERIOD / (2 * torch.pi))
    turned = rotate(q, rotary(torch.tensor(1), q))
    assert torch.allclose(
        turned[0], q[0] * torch.tensor(1.0).cos() - q[4] * torch.tensor(1.0).sin(), atol=1e-4
    )
    assert torch.allclose(turned.norm(), q.norm())
    half = rotary(torch.tensor(40_001), q.bfloat16()).cos
    assert torch.allclose(half.double(), rotary(torch.tensor(40_001), q).cos, atol=4e-3)
