"""Floating-point operations of one update, forward and backward, and the bytes that levels move.

Counted by torch as they are dispatched: matrix products and convolutions, two operations for each
multiply-add, nothing else. The dynamics run as written, without nodes by hand; those make the same
products, joined over time. What is done to the weights alone costs the same for any batch, and the
rest is linear in its sequences: one and two of them are counted, and give the whole batch.
"""

from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode

from experiments.build import slow_critic
from experiments.driver import replayed_batch, unpack
from experiments.loop import Loop
from timescales import Timescales


def update_flops(loop: Loop) -> int:
    """Operations of the losses of the configured batch and of their backward pass."""
    one, two = flops_of(loop, 1), flops_of(loop, 2)
    return one + (two - one) * (loop.config.replay.batch - 1)


def flops_of(loop: Loop, counted: int, readable: bool = True) -> int:
    """As `update_flops`, of this many sequences; gradients are dropped.

    readable: False counts the dynamics as they are trained.
    """
    arrays, carry = loop.replay.sample(counted)
    batch, agent = replayed_batch(arrays, loop.device), loop.agent

    def update() -> None:
        start, weights = unpack(carry, agent.initial(counted)), slow_critic(loop.timescales)
        outcome = agent.losses(batch, start, weights, loop.generator)
        agent.total(outcome.losses).backward()

    dynamics = agent.world.dynamics
    before, dynamics.readable = dynamics.readable, readable
    found = operations(update)
    dynamics.readable = before
    for parameter in agent.parameters():
        parameter.grad = None
    return found


def operations(run: Callable[[], object]) -> int:
    """Operations of matrix products and convolutions while `run` runs."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def moved_bytes(timescales: Timescales, name: str) -> float:
    """Bytes that an update moves for a level's own tensors, on average; after its first move.

    Every backward writes a gradient and, within a window, reads what is gathered; the move reads
    it, and reads and writes the weights and the rule's moments.
    """
    level = next(level for level in timescales.levels if level.name == name)
    size = sum(w.numel() * w.element_size() for w in timescales.weights(name).values())
    state = timescales.state_dict()["levels"][name]["rule"].get("state", {})
    kept = [t for moments in state.values() for t in moments.values() if torch.is_tensor(t)]
    moments = sum(t.numel() * t.element_size() for t in kept)
    return size * (2 - 1 / level.every.n) + (3 * size + 2 * moments) / level.every.n
