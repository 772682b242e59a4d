# pyright: reportMissingImports=false
"""titans-pytorch's NeuralMemory, one step of N users, timed in a python of its own (see `memory`).

Called with width, threads, and numbers of users; the last line printed is JSON. Chunks of one step
and weights that follow each step (`batch_size=1`), as ours. It also makes its norms, projections
and gates, which the rows of `memory` do not, so read the ratio with that in mind.
"""

import json
import sys
import time
from typing import Any

import torch
from tensordict import TensorDict
from titans_pytorch import NeuralMemory
from titans_pytorch.memory_models import MemoryMLP


def bytes_of(state: Any) -> int:
    """The tensors of a state, each storage once."""
    if isinstance(state, torch.Tensor):
        return state.numel() * state.element_size()
    if isinstance(state, dict | TensorDict):
        return sum(bytes_of(x) for x in state.values())
    if isinstance(state, tuple):
        return sum(bytes_of(x) for x in state)
    return 0


def timed(width: int, users: int, depth: int, momentum: bool) -> dict[str, float]:
    """Median of five steps, after two to warm up."""
    model = MemoryMLP(width, depth, expansion_factor=2.0)
    memory = NeuralMemory(width, chunk_size=1, batch_size=1, model=model, momentum=momentum).eval()
    seconds: list[float] = []
    with torch.no_grad():
        x = torch.randn(users, 1, width)
        _, state = memory(x)
        for _ in range(6):
            start = time.perf_counter()
            _, state = memory(x, state=state, detach_mem_state=True)
            seconds.append(time.perf_counter() - start)
    middle = sorted(seconds[1:])[2]
    held = {k: bytes_of(v) for k, v in zip(state._fields, state, strict=True) if k != "updates"}
    return {"us_per_user": middle / users * 1e6, "bytes_per_user": sum(held.values()) // users}


def main() -> None:
    """Every number of users, linear and two layers, with and without momentum."""
    width, threads, *counts = (int(word) for word in sys.argv[1:])
    torch.set_num_threads(threads)
    found = {
        str(n): {
            "titans linear": timed(width, n, 1, False),
            "titans network": timed(width, n, 2, False),
            "titans network, momentum": timed(width, n, 2, True),
        }
        for n in counts
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
