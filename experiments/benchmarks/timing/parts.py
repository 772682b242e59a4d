"""Where the time of an update goes: a stopwatch around its parts, as they are called in training.

A part's time excludes that of the parts it calls. The stopwatch waits for the device at each
border, so on a GPU the parts add up to more than an update that is left alone.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch

from experiments.benchmarks.timing.machine import synchronize
from experiments.loop import Loop
from experiments.train import learn

PARTS = (
    "replay + transfer",
    "encoder",
    "RSSM observe",
    "decoder + heads",
    "imagination + behaviour",
    "backward",
    "optimizer",
    "rest",
)


class Stopwatch:
    """Seconds of each part, of the wall's clock and of the processors; parts may nest."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        self.cpu_seconds: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        self._device = device
        self._running = ["rest"]
        self._since = time.perf_counter(), time.process_time()

    def _switch(self) -> None:
        synchronize(self._device)
        now = time.perf_counter(), time.process_time()
        self.seconds[self._running[-1]] += now[0] - self._since[0]
        self.cpu_seconds[self._running[-1]] += now[1] - self._since[1]
        self._since = now

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count what happens inside as `name`."""
        self._switch()
        self._running.append(name)
        try:
            yield
        finally:
            self._switch()
            self._running.pop()

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, counted as `name`."""

        def run(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return function(*args, **kwargs)

        return run

    def stop(self) -> None:
        """Count the time up to now."""
        self._switch()


@contextmanager
def watched(loop: Loop) -> Iterator[Stopwatch]:
    """A stopwatch on the parts of the updates made inside."""
    watch, agent, world = Stopwatch(loop.device), loop.agent, loop.agent.world
    places = (
        ("replay + transfer", loop.replay, "sample"),
        ("replay + transfer", sys.modules[learn.__module__], "replayed_batch"),
        ("encoder", world.encoder, "forward"),
        ("RSSM observe", world.dynamics, "observe"),
        ("decoder + heads", world, "losses"),
        ("imagination + behaviour", agent, "losses"),
        ("backward", torch.Tensor, "backward"),
        ("optimizer", loop.timescales, "tick"),
    )
    with ExitStack() as stack:
        for name, owner, attribute in places:
            timed = watch.timed(name, getattr(owner, attribute))
            stack.enter_context(patch.object(owner, attribute, timed))
        yield watch
        watch.stop()


def profile(loop: Loop, updates: int) -> dict[str, dict[str, float]]:
    """Mean seconds an update of each part, on both clocks."""
    with watched(loop) as watch:
        for _ in range(updates):
            learn(loop)
    clocks = {"parts_s": watch.seconds, "parts_cpu_s": watch.cpu_seconds}
    return {
        clock: {name: total / updates for name, total in found.items()}
        for clock, found in clocks.items()
    }


def operators(loop: Loop, rows: int) -> list[tuple[str, int, float]]:
    """The operators that take most of one update's time on the CPU: name, calls, seconds."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        learn(loop)
    events = sorted(found.key_averages(), key=lambda event: -event.self_cpu_time_total)
    return [(event.key, event.count, event.self_cpu_time_total / 1e6) for event in events[:rows]]
