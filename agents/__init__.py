"""Agents: what to do about what will happen. Tensors in, tensors out."""

from agents.actions import Actions, Axes, Choice, Keys, actions_of
from agents.dreamer import Dreamer
from agents.heads import ContinuousActor, Critic, DiscreteActor, make_actor
from agents.offline import Experience, OfflineDreamer, Scene

__all__ = [
    "Actions",
    "Axes",
    "Choice",
    "ContinuousActor",
    "Critic",
    "DiscreteActor",
    "Dreamer",
    "Experience",
    "Keys",
    "OfflineDreamer",
    "Scene",
    "actions_of",
    "make_actor",
]
