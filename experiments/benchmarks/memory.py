"""What a user's memory costs: `nested bench memory [--json]`.

One step, read and write, of N users in place and without gradients, from raw queries, keys, values
and gates. The floor is one read and one write of all their weights at the speed at which the same
bytes are copied; it is measured in every round beside the methods, so that the machine's mood
falls on all alike. A result is the median over rounds of time / floor, with an interval by
resampling the rounds. `--peer-python` runs titans-pytorch in a python of its own.
"""

import argparse
import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from experiments.benchmarks.statistics import bootstrap
from experiments.config import ConfigError
from nested import DeltaMemory, GatedDeltaMemory, NeuralMemory, fast, held

WIDTH, HIDDEN = 64, 128
PEER_USERS = 1024  # the peer needs seconds a step there, and more users more than the memory
PEER = Path(__file__).parent / "timing" / "peers" / "titans_memory.py"


class Method(NamedTuple):
    """A memory, how its users are stored, and what it may cost."""

    make: Callable[[], Any]
    storage: torch.dtype = torch.float32
    target: float | None = None
    kernel: bool = False


def linear() -> Any:
    """Delta rule, 64 x 64."""
    return DeltaMemory(WIDTH, WIDTH, WIDTH)


def gated() -> Any:
    """Gated delta rule, 64 x 64."""
    return GatedDeltaMemory(WIDTH, WIDTH, WIDTH)


def network() -> Any:
    """Two layers, 64 - 128 - 64, with forgetting."""
    return NeuralMemory(WIDTH, WIDTH, WIDTH, HIDDEN)


METHODS = {
    "linear": Method(linear, target=2.0),
    "gated": Method(gated, target=2.0),
    "network": Method(network, target=3.5),
    "linear bf16": Method(linear, torch.bfloat16),
    "gated bf16": Method(gated, torch.bfloat16),
    "network bf16": Method(network, torch.bfloat16),
    "gated kernel": Method(gated, target=1.5, kernel=True),
}


class Timed:
    """Users of one method in place; `run` makes one step and gives its seconds."""

    def __init__(self, method: Method, users: int, kernel: held.Linear | None):
        memory = method.make()
        self.users = memory.hold(memory.initial(users), method.storage)
        options = {"kernel": kernel} if method.kernel else {}
        generator = torch.Generator().manual_seed(0)
        self.update = partial(memory.write_, generator=generator, **options)
        with torch.no_grad():
            self.z = memory.project(torch.randn(users, WIDTH))

    def run(self) -> float:
        """Seconds of one step of all users."""
        start = time.perf_counter()
        self.update(self.z, self.users)
        return time.perf_counter() - start

    def bytes(self) -> int:
        """All that a user's state takes."""
        leaves = fast.leaves(self.users)
        return sum(x.numel() * x.element_size() for x in leaves) // len(self.z)


def weight_bytes(name: str) -> int:
    """The bytes of a user's weights alone, in float32."""
    return 4 * WIDTH * (2 * HIDDEN if name.startswith("network") else WIDTH)


def copier(size: int) -> Callable[[], float]:
    """Seconds to copy `size` bytes: to read and to write them once."""
    source = torch.ones(size, dtype=torch.uint8)
    target = torch.zeros_like(source)

    def copy() -> float:
        start = time.perf_counter()
        target.copy_(source)
        return time.perf_counter() - start

    return copy


def measure(users: int, rounds: int, kernel: held.Linear | None) -> dict[str, Any]:
    """Every method in turn, each beside a copy of its own bytes; one by one, to spare memory."""
    rows: dict[str, Any] = {}
    rng = np.random.default_rng(0)
    for name, method in METHODS.items():
        if method.kernel and kernel is None:
            continue
        timed, copy = Timed(method, users, kernel), copier(users * weight_bytes(name))
        pairs = np.array([(timed.run(), copy()) for _ in range(rounds + 2)])[2:]
        ratios = pairs[:, 0] / np.median(pairs[:, 1])
        middle, low, high = bootstrap(ratios, rng, partial(np.median, axis=-1))
        rows[name] = {
            "us_per_user": float(np.median(pairs[:, 0])) / users * 1e6,
            "floor_us_per_user": float(np.median(pairs[:, 1])) / users * 1e6,
            "ratio": middle,
            "interval": (low, high),
            "target": method.target,
            "bytes_per_user": timed.bytes(),
            "bytes_ratio": timed.bytes() / weight_bytes(name),
        }
        del timed, copy
        gc.collect()
    return rows


def peer(python: str, users: Sequence[int], threads: int, seconds: float = 300) -> dict[str, Any]:
    """What the peer's own process reports, by number of users. Raises ConfigError."""
    words = [python, str(PEER), str(WIDTH), str(threads), *(str(n) for n in users)]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=seconds, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        hint = "a python with titans-pytorch 0.5.5"
        raise ConfigError("--peer-python", python, f"did not run: {error}", hint) from error
    return json.loads(done.stdout.splitlines()[-1])


def text(result: Mapping[str, Any]) -> str:
    """The result as a table."""
    lines: list[str] = []
    for users, rows in result["users"].items():
        lines.append(f"{users} users, {result['rounds']} rounds, {result['threads']} thread(s)")
        lines.append(
            f"{'':24}{'us/user':>9}{'floor':>8}{'ratio':>8}   95 % interval    target  bytes"
        )
        for name, row in rows.items():
            low, high = row["interval"]
            target = "" if row["target"] is None else f"<= {row['target']:.1f}"
            lines.append(
                f"{name:24}{row['us_per_user']:9.2f}{row['floor_us_per_user']:8.2f}"
                f"{row['ratio']:8.2f}   {low:6.2f} .. {high:6.2f} {target:>8}"
                f"  {row['bytes_per_user']} ({row['bytes_ratio']:.3f} x weights)"
            )
        for name, row in result.get("peer", {}).get(users, {}).items():
            lines.append(f"{name:24}{row['us_per_user']:9.2f}  {row['bytes_per_user']} bytes")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(prog="nested bench memory", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--users", type=int, nargs="+", default=[1024, 10000])
    parser.add_argument("--rounds", type=int, default=15, help="rounds (default 15)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default 1)")
    parser.add_argument("--kernel", action="store_true", help="compile the C++ kernel, time it too")
    parser.add_argument("--peer-python", help="a python with titans-pytorch, to time beside")
    asked = parser.parse_args(argv)
    torch.set_num_threads(asked.threads)
    torch.manual_seed(0)
    kernel = None
    if asked.kernel:
        from experiments.kernel import build

        kernel = build()
    found = {str(n): measure(n, asked.rounds, kernel) for n in asked.users}
    result: dict[str, Any] = {"rounds": asked.rounds, "threads": asked.threads, "users": found}
    if asked.peer_python:
        counts = [n for n in asked.users if n <= PEER_USERS]
        result["peer"] = peer(asked.peer_python, counts, asked.threads)
    print(json.dumps(result, indent=2) if asked.json else text(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
