"""Evaluation: every context's own episodes, also where all contexts are played at once."""

from collections.abc import Sequence
from importlib import import_module

import numpy as np
import pytest
import torch

from experiments.build import build_agent
from experiments.config import load_config
from experiments.driver import Driver, Step
from experiments.envs import make_envs

evaluate = import_module("experiments.evaluate")  # the package exports its function
WORDS = ["model.deter=32", "model.hidden=16", "model.units=16", "env.num=2", "env.time_limit=40"]


def played(monkeypatch: pytest.MonkeyPatch, contexts: list[str], episodes: int) -> list[Driver]:
    """Evaluates an agent that pushes to the right; the drivers that did it."""
    config = load_config("plain", WORDS)
    seen: list[Driver] = []
    envs = make_envs(config.env, 1, 0)
    agent = build_agent(config, envs.obs_spec, envs.action_spec)

    def act(drivers: Sequence[Driver]) -> list[Step]:
        for driver in drivers:
            if driver not in seen:
                seen.append(driver)
        return [
            driver.take(torch.tensor([[0.0, 1.0]]).expand(driver.envs.num, -1), driver.carry)
            for driver in drivers
        ]

    found = evaluate.evaluate_all([config], [agent], contexts, 0, episodes, act=act)
    monkeypatch.setattr(evaluate, "MIXES", ())
    apart = evaluate.evaluate_all([config], [agent], contexts, 0, episodes, act=act)
    for key, value in found[0].items():
        assert value == pytest.approx(apart[0][key], abs=2.0), (
            "start states differ, and little else"
        )
    return seen


def test_contexts_are_played_at_once_and_told_apart(monkeypatch: pytest.MonkeyPatch):
    both, *apart = played(monkeypatch, ["normal", "heavy"], episodes=3)
    assert (both.envs.num, [driver.envs.num for driver in apart]) == (6, [3, 3])
    context = both.envs.state_dict()["context"]
    assert context.tolist() == [0, 0, 0, 3, 3, 3]


def test_returns_go_to_the_context_of_their_slot(monkeypatch: pytest.MonkeyPatch):
    returns = np.arange(12.0).reshape(1, 6, 2)
    monkeypatch.setattr(evaluate, "_play", lambda drivers, each, act: returns)
    config = load_config("plain", WORDS)
    envs = make_envs(config.env, 1, 0)
    agent = build_agent(config, envs.obs_spec, envs.action_spec)
    (found,) = evaluate.evaluate_all([config], [agent], ["long", "flipped"], episodes=6)
    assert found["eval/long/return"] == returns[0, :3].mean()
    assert found["eval/flipped/return"] == returns[0, 3:].mean()
    assert found["eval/flipped/score"] == pytest.approx(returns[0, 3:].mean() / 40)
