"""Agents: what to do about what will happen. Tensors in, tensors out."""

from agents.dreamer import Dreamer
from agents.heads import ContinuousActor, Critic, DiscreteActor, make_actor

__all__ = ["ContinuousActor", "Critic", "DiscreteActor", "Dreamer", "make_actor"]
