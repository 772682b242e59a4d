"""The training loop: read this first.

`train` is the whole life of a run in the order of events: act, remember, learn on every timescale
that is due, report, save. What it holds between steps is in loop.py, and all of that is in every
checkpoint, so a run that is killed anywhere goes on bit for bit from its last one.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import torch

from agents.dreamer import Outcome
from experiments.build import slow_critic
from experiments.config import Config
from experiments.driver import pack, replayed_batch, unpack
from experiments.loop import Loop
from experiments.progress import Progress, Watch


def train(
    config: Config,
    resume: Path | None = None,
    watch: Callable[[Path, Config], AbstractContextManager[Watch]] = Progress,
) -> Path:
    """Train as configured, or go on with a run; returns the run's folder."""
    loop = Loop.resume(config, resume) if resume else Loop.start(config)
    with watch(loop.run.path, config) as progress, loop:
        while not loop.done:
            loop.enter_phase()
            step = loop.driver.step(loop.random if loop.prefilling else None)
            loop.replay.add(step.row, lambda carry=step.carry: pack(carry))
            loop.count(step)
            measure = loop.due(config.log.every)
            for _ in range(loop.updates_due()):
                loop.gather(learn(loop, measure))
            if measure:
                progress.show(loop.frame, loop.log())
            if loop.due(config.evaluate.every) or loop.done:
                progress.show(loop.frame, loop.evaluate())
            if loop.due(config.checkpoint.every) or loop.done:
                loop.save()
    return loop.run.path


def learn(loop: Loop, measure: bool = False) -> Outcome:
    """One backward pass on replayed sequences, and a tick: the levels that are due move."""
    arrays, carry = loop.replay.sample(loop.config.replay.batch)
    batch = replayed_batch(arrays, loop.device)
    with torch.autocast(loop.device.type, torch.bfloat16, enabled=loop.low_precision):
        start = unpack(carry, loop.agent.initial(len(batch.first)))
        outcome = loop.agent.losses(batch, start, slow_critic(loop.timescales), loop.generator)
        total = loop.agent.total(outcome.losses)
    total.backward()
    loop.timescales.tick("update", measure=measure)
    return outcome
