"""Floating-point operations of one update, forward and backward.

Counted by torch as they are dispatched: matrix products and convolutions, two operations for each
multiply-add, nothing else. The dynamics run as written, without nodes by hand; those make the same
products, joined over time. What is done to the weights alone costs the same for any batch, and the
rest is linear in its sequences: one and two of them are counted, and give the whole batch.
"""

from torch.utils.flop_counter import FlopCounterMode

from experiments.build import slow_critic
from experiments.driver import replayed_batch, unpack
from experiments.loop import Loop


def update_flops(loop: Loop) -> int:
    """Operations of the losses of the configured batch and of their backward pass."""
    one, two = flops_of(loop, 1), flops_of(loop, 2)
    return one + (two - one) * (loop.config.replay.batch - 1)


def flops_of(loop: Loop, counted: int, readable: bool = True) -> int:
    """As `update_flops`, of this many sequences; gradients are dropped.

    readable: False counts the dynamics as they are trained.
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
    return counter.get_total_flops()
