"""The members that share a contract: one row gives a new member every test of its kind.

A memory is built from (dim_in, dim_out) and has initial, forward, read and scan.
"""

from collections.abc import Callable
from typing import Any

import torch

from nested import (
    TTTMLP,
    ContinuumMemory,
    DeltaMemory,
    GatedDeltaMemory,
    HebbMemory,
    HopeBlock,
    NeuralMemory,
    RLSMemory,
    TTTLinear,
)

MEMORIES: dict[str, Callable[[int, int], Any]] = {
    "hebb": lambda dim_in, dim_out: HebbMemory(dim_in, dim_out, dim=8, heads=2),
    "delta": lambda dim_in, dim_out: DeltaMemory(dim_in, dim_out, dim=8, heads=2),
    "gated delta": lambda dim_in, dim_out: GatedDeltaMemory(dim_in, dim_out, dim=16),
    "neural": lambda dim_in, dim_out: NeuralMemory(dim_in, dim_out, dim=8, hidden=16),
    "neural, chunks": lambda dim_in, dim_out: NeuralMemory(
        dim_in, dim_out, 4, 8, heads=2, momentum=0.5, chunk=3, residual=True
    ),
    "ttt linear": lambda dim_in, dim_out: TTTLinear(dim_in, dim_out, 8, heads=2, chunk=4),
    "ttt mlp": lambda dim_in, dim_out: TTTMLP(dim_in, dim_out, dim=8, hidden=16, chunk=4),
    "rls": lambda dim_in, dim_out: RLSMemory(dim_in, dim_out, dim=8, heads=2),
    "continuum": lambda dim_in, dim_out: ContinuumMemory(
        dim_in, dim_out, dim=8, hidden=12, chunks=(1, 2, 6)
    ),
    "hope": lambda dim_in, dim_out: HopeBlock(
        dim_in, dim_out, dim=6, hidden=8, chunk=2, chunks=(1, 3)
    ),
}

# those whose hundred updates take more than a second or two
SLOW = {"neural, chunks", "ttt linear", "ttt mlp", "rls", "continuum", "hope"}


def memory(name: str, dim_in: int = 5, dim_out: int = 4, dtype: torch.dtype = torch.float32) -> Any:
    """The member of that name, its slow parameters moved off any special values."""
    module = MEMORIES[name](dim_in, dim_out).to(dtype)
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in module.parameters():
            p += 0.3 * torch.randn(p.shape, generator=noise, dtype=p.dtype)
    return module
