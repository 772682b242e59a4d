"""Floating-point operations of one update, forward and backward.

Counted by torch as they are dispatched: matrix products and convolutions, two operations for each
multiply-add, nothing else. The dynamics run as written, without nodes by hand; those make the same
products, joined over time. An update is linear in its sequences, so one of them is counted.
"""

from torch.utils.flop_counter import FlopCounterMode

from experiments.build import slow_critic
from experiments.driver import replayed_batch, unpack
from experiments.loop import Loop


def update_flops(loop: Loop, counted: int = 1, readable: bool = True) -> int:
    """Operations of the configured batch's losses and their backward pass; gradients are dropped.

    counted: sequences that are run. readable: False counts the dynamics as they are trained.
    """
    dynamics = loop.agent.world.dynamics
    before, dynamics.readable = dynamics.readable, readable
    arrays, carry = loop.replay.sample(counted)
    batch = replayed_batch(arrays, loop.device)
    with FlopCounterMode(display=False) as counter:
        start = unpack(carry, loop.agent.initial(counted))
        weights = slow_critic(loop.timescales)
        outcome = loop.agent.losses(batch, start, weights, loop.generator)
        loop.agent.total(outcome.losses).backward()
    dynamics.readable = before
    for parameter in loop.agent.parameters():
        parameter.grad = None
    return counter.get_total_flops() * loop.config.replay.batch // counted
