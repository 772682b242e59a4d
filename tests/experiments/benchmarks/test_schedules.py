"""Controls travel as far as the schedules that they control, on one and the same slope."""

import pytest
import torch

from experiments.benchmarks.cells import Cell
from experiments.benchmarks.tasks import agent_cells, schedules
from experiments.benchmarks.tasks.agent_methods import FIELDS
from experiments.benchmarks.tasks.supervised import Settings
from experiments.config import levels_of
from timescales import Level, Timescales

SIZES = {f"layers.{i}.weight": 4 for i in range(3)}
SETTINGS = Settings(lr=0.1, average=0.05, return_every=8)


def travelled(levels: list[Level], updates: int) -> dict[str, float]:
    """How far weights get on a gradient of one; nothing but the levels moves them."""
    weights = {name: torch.zeros(4, dtype=torch.float64).requires_grad_() for name in SIZES}
    timescales = Timescales(weights.items(), levels)
    for _ in range(updates):
        torch.stack([*weights.values()]).sum().backward()
        timescales.tick("update")
    return {name: -w.mean().item() for name, w in weights.items()}


def test_a_rate_for_the_hare_that_returns():
    hare = travelled(schedules.hare_tortoise(SIZES, SETTINGS), 24)
    rates = travelled(schedules.hare_rates(SIZES, SETTINGS), 24)
    assert rates == pytest.approx(hare)
    assert 0 < rates["layers.0.weight"] < 0.5 * 24 * SETTINGS.lr


def test_rates_for_levels_by_depth():
    clocked = travelled(schedules.clocked(SIZES, SETTINGS, k=3, base=4), 32)
    scaled = travelled(schedules.scaled(SIZES, SETTINGS, k=3, base=4), 32)
    assert scaled == pytest.approx(clocked)
    assert clocked["layers.2.weight"] == pytest.approx(4 * clocked["layers.0.weight"])


def test_an_agents_hare_has_the_same_control():
    options = {**FIELDS, "lr": 0.1, "average": 0.05, "return_every": 8}
    run = agent_cells.one_run(Cell("cl/CartPoleShift-v0", "hare_rates", (0,), options))
    rule = levels_of(run)["all"].model_dump()["flow"]["rule"]
    far = travelled(schedules.hare_rates(SIZES, SETTINGS), 1)
    assert rule["lr"] == pytest.approx(far["layers.0.weight"])
