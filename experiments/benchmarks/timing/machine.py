"""What the machine can do: the two speeds that no update can beat.

Both are the best of many repetitions, since what disturbs a measurement only ever slows it down.
"""

import time
from collections.abc import Callable

import torch

SIZES = (512, 1024, 2048)
COPIED = 256 << 20  # bytes: larger than any cache


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_mb(device: torch.device) -> int:
    """Peak memory that torch has taken on a GPU so far; 0 on a CPU."""
    return torch.cuda.max_memory_allocated(device) >> 20 if device.type == "cuda" else 0


def best(run: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Shortest time of one run, in repetitions that take about `seconds` together."""
    found, end = float("inf"), time.perf_counter() + seconds
    while True:
        start = time.perf_counter()
        run()
        synchronize(device)
        now = time.perf_counter()
        found = min(found, now - start)
        if now >= end:
            return found


def matmul_gflops(
    dtype: torch.dtype, device: torch.device, sizes: tuple[int, ...] = SIZES, seconds: float = 0.5
) -> float:
    """Peak GFLOP/s of square matrix products in this dtype, over these sizes."""
    peak = 0.0
    for n in sizes:
        a, b = torch.ones(n, n, dtype=dtype, device=device), torch.eye(n, dtype=dtype).to(device)
        out = torch.empty_like(a)
        took = best(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), device, seconds)
        peak = max(peak, 2 * n**3 / took / 1e9)
    return peak


def memcpy_gb_s(device: torch.device, size: int = COPIED, seconds: float = 0.5) -> float:
    """GB/s copied from one place in the device's memory to another (read and written once)."""
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return size / best(lambda: target.copy_(source), device, seconds) / 1e9
