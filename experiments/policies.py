"""Policies for environments, from rows to encoded actions: to evaluate them, or to record them.

Each keeps what its agent carries from step to step, so one policy belongs to the slots that it
was made for.
"""

from collections.abc import Callable

import numpy as np
import torch

from agents import Dreamer
from agents.offline import OfflineDreamer
from experiments.driver import to_batch
from experiments.envs.rows import Envs, Row

Policy = Callable[[Row], np.ndarray]  # a row of N slots -> encoded actions (N, A)


def uniform(envs: Envs, rng: np.random.Generator) -> Policy:
    """Actions drawn uniformly."""
    return lambda row: envs.random_action(rng)


def noisy(policy: Policy, envs: Envs, share: float, rng: np.random.Generator) -> Policy:
    """The policy, with this share of its actions drawn uniformly instead."""

    def act(row: Row) -> np.ndarray:
        drawn = rng.random((envs.num, 1)) < share
        return np.where(drawn, envs.random_action(rng), policy(row))

    return act


def of_offline(agent: OfflineDreamer, num: int, image: str, generator: torch.Generator) -> Policy:
    """An offline agent that sees `image`, with its actions sampled."""
    scene = agent.initial(num)

    def act(row: Row) -> np.ndarray:
        nonlocal scene
        batch = to_batch(row, generator.device)
        batch = batch._replace(obs={image: batch.obs[image]})
        action, scene = agent.act(scene, batch, generator)
        return action.cpu().numpy()

    return act


def of_dreamer(agent: Dreamer, num: int, generator: torch.Generator) -> Policy:
    """An online agent, as it acts while it learns."""
    carry = agent.initial(num)

    def act(row: Row) -> np.ndarray:
        nonlocal carry
        action, carry = agent.act(carry, to_batch(row, generator.device), generator, "write")
        return action.cpu().numpy()

    return act


def play(envs: Envs, policy: Policy, episodes: int) -> list[float]:
    """Returns of the first episodes of every slot, of each the same number."""
    left = np.full(envs.num, -(-episodes // envs.num))
    sums, returns = np.zeros(envs.num), []
    row = envs.reset()
    while left.any():
        sums = np.where(row.first, 0.0, sums + row.reward)
        for slot in np.flatnonzero(row.last & (left > 0)):
            left[slot] -= 1
            returns.append(float(sums[slot]))
        row = envs.step(policy(row))
    return returns
