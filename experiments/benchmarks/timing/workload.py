"""What `nested bench speed` measures, each in a process of its own that answers questions.

`update` and `small` time whole updates as training makes them: `learn` on a Loop whose replay holds
random rows. `policy` times acting on such rows. `levels` takes turns between loops that differ in
their levels alone. `machine` is what the machine itself can do.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from agents.group import Group
from experiments import show
from experiments.benchmarks.timing import parts
from experiments.benchmarks.timing.flops import update_flops
from experiments.benchmarks.timing.machine import device_mb, matmul_gflops, memcpy_gb_s, synchronize
from experiments.benchmarks.timing.reference import Spec, configured
from experiments.benchmarks.timing.worker import peak_mb, serve
from experiments.build import make_rule
from experiments.config import ConfigError, levels_of
from experiments.config.levels import DescendConfig
from experiments.driver import pack, to_batch
from experiments.envs import Row
from experiments.envs.rows import random_action
from experiments.loop import Loop
from experiments.record import Run
from experiments.together import learn as learn_together
from experiments.train import learn
from timescales import Timescales
from worldmodel import ObsSpec

CHUNKS = 64  # sequences in the replay
LADDER = {1: 2, 3: 4, 5: 2}  # levels -> ratio of their periods; the longest is 16


def loop_of(spec: Spec) -> Loop:
    """A training loop with random rows in its replay; nothing of it stays on the disk."""
    config = configured(spec)
    with tempfile.TemporaryDirectory() as folder:
        loop = Loop(config, lambda: Run.create(config, Path(folder)))
    rng = np.random.default_rng(0)
    num, length = loop.envs.num, config.replay.length
    carry = pack(loop.agent.initial(num))
    for i in range(max(CHUNKS // num, 1) * length):
        loop.replay.add(random_row(loop, num, rng, first=i == 0), carry)
    return loop


def random_row(loop: Loop, num: int, rng: np.random.Generator, first: bool = False) -> Row:
    """A row of `num` slots in the loop's spaces, all noise."""
    flags = np.zeros(num, np.bool_)
    return Row(
        {key: random_entry(entry, num, rng) for key, entry in loop.envs.obs_spec.items()},
        random_action(loop.envs.action_spec, num, rng) * (not first),
        rng.standard_normal(num, np.float32) * (not first),
        np.full(num, first),
        flags,
        flags,
        np.arange(num),
    )


def random_entry(entry: ObsSpec, num: int, rng: np.random.Generator) -> np.ndarray:
    """Observations (num, ...) of noise: bytes, normal numbers or classes."""
    shape = (num, *entry.shape)
    match entry.kind:
        case "image":
            return rng.integers(0, 256, shape, np.uint8)
        case "vector":
            return rng.standard_normal(shape, np.float32)
        case "discrete":
            return rng.integers(0, entry.classes, shape)


def policy(loop: Loop, batch: int) -> Callable[[], np.ndarray]:
    """Acts once in `batch` slots: from a row of numpy arrays to actions as numpy arrays."""
    rng, generator = np.random.default_rng(0), loop.generator
    rows = [random_row(loop, batch, rng) for _ in range(4)]
    carry = loop.agent.initial(batch)

    def act() -> np.ndarray:
        nonlocal carry
        rows.append(rows.pop(0))
        action, carry = loop.agent.act(carry, to_batch(rows[0], loop.device), generator)
        return action.cpu().numpy()

    return act


def seconds(
    step: Callable[[], object], count: int, device: torch.device
) -> tuple[list[float], list[float]]:
    """How long each of `count` steps took, and how long the processor's threads worked on it."""
    wall, cpu = list[float](), list[float]()
    for _ in range(count):
        synchronize(device)
        start = time.perf_counter(), time.process_time()
        step()
        synchronize(device)
        wall.append(time.perf_counter() - start[0])
        cpu.append(time.process_time() - start[1])
    return wall, cpu


def subject(spec: Spec) -> tuple[dict[str, Any], dict[str, Callable[[int], Any]]]:
    """What a child says of itself, and how it answers each question."""
    if spec.kind == "machine":
        return machine(spec)
    if spec.kind == "levels":
        return ladder(spec)
    if spec.kind == "seeds":
        return side_by_side(spec)
    loop = loop_of(spec)
    step = policy(loop, spec.batch) if spec.kind == "policy" else lambda: learn(loop)
    replay = loop.config.replay
    hello = {
        "params": sum(p.numel() for p in loop.agent.parameters()),
        "batch": replay.batch,
        "length": replay.length,
    }
    return hello, {
        "time": timer(step, loop.device),
        "flops": lambda _: {"gflop": update_flops(loop) / 1e9},
        "parts": lambda count: parts.profile(loop, count),
        "operators": lambda count: {"operators": parts.operators(loop, count)},
    }


def timer(step: Callable[[], object], device: torch.device) -> Callable[[int], dict[str, Any]]:
    """Answers how long so many steps took, and the peak of the memory."""

    def timed(count: int) -> dict[str, Any]:
        wall, cpu = seconds(step, count, device)
        peaks = {"rss_mb": peak_mb(), "device_mb": device_mb(device)}
        return {"seconds": wall, "cpu_seconds": cpu, **peaks}

    return timed


def side_by_side(spec: Spec) -> tuple[dict[str, Any], dict[str, Callable[[int], Any]]]:
    """So many agents of one shape that learn together, as `train_together` has them."""
    seeds = [(*spec.overrides, f"seed={seed}") for seed in range(spec.batch)]
    loops = [loop_of(spec._replace(overrides=fields)) for fields in seeds]
    group = Group([loop.agent for loop in loops])
    step = timer(lambda: learn_together(group, loops), loops[0].device)
    return {"params": sum(p.numel() for p in loops[0].agent.parameters())}, {"time": step}


class Textbook:
    """One optimizer on all parameters and an averaged critic: what stands in for the engine."""

    def __init__(self, loop: Loop) -> None:
        flow = levels_of(loop.config)["all"].flow
        assert isinstance(flow, DescendConfig)
        self._optimizer = make_rule(flow.rule)([*loop.agent.parameters()])
        self._live = {f"critic.{name}": p for name, p in loop.agent.critic.named_parameters()}
        self._slow = {name: p.detach().clone() for name, p in self._live.items()}
        self._rate = loop.config.agent.slow_rate

    def tick(self, unit: str, measure: bool = False) -> None:
        """Step on the gradients, drop them, and move the slow critic."""
        self._optimizer.step()
        self._optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_([*self._slow.values()], [*self._live.values()], self._rate)

    def weights(self, name: str) -> dict[str, Tensor]:
        """The slow critic's."""
        return self._slow


def textbook(loop: Loop) -> Timescales:
    """A Textbook where the loop expects its engine: it answers all that `learn` asks."""
    return cast(Timescales, Textbook(loop))


def ladder(spec: Spec) -> tuple[dict[str, Any], dict[str, Callable[[int], Any]]]:
    """Loops that differ in their levels alone, each asked for the same updates in every round."""
    plain = loop_of(spec)
    plain.timescales = textbook(plain)
    loops = {"plain": plain}
    for k, base in LADDER.items():
        fields = (*spec.overrides, f"timescales.base={base}")
        loops[f"k={k}"] = loop_of(spec._replace(schedule=f"k{k}", overrides=fields))

    def round_(count: int) -> dict[str, Any]:
        found, names = dict.fromkeys(loops, 0.0), list(loops)
        for i in range(count):  # in turn, and each as often first as last
            for name in names[i % len(names) :] + names[: i % len(names)]:
                loop = loops[name]
                found[name] += sum(seconds(lambda loop=loop: learn(loop), 1, loop.device)[0])
        return {"seconds": found}

    return {"params": sum(p.numel() for p in plain.agent.parameters())}, {"round": round_}


def machine(spec: Spec) -> tuple[dict[str, Any], dict[str, Callable[[int], Any]]]:
    """The machine's own speed in a dtype, with as many threads as the row beside it."""
    torch.set_num_threads(spec.threads)
    device, dtype = torch.device(spec.device), getattr(torch, spec.dtype)
    peaks = {"matmul_gflops": matmul_gflops(dtype, device), "memcpy_gb_s": memcpy_gb_s(device)}
    return peaks, {}


if __name__ == "__main__":
    try:
        serve(*subject(Spec.parse(sys.argv[1])))
    except ConfigError as found:
        show.error(found)
        sys.exit(2)
