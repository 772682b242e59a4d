"""Environments: any gymnasium id as N slots of rows, and our own CartPoleShift."""

from experiments.envs.build import make_envs, open_env
from experiments.envs.cartpole import CONTEXTS, register
from experiments.envs.rows import Envs, Row, random_action

register()

__all__ = ["CONTEXTS", "Envs", "Row", "make_envs", "open_env", "random_action"]
