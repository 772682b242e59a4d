"""Clocks: exact over any cut of time into ticks."""

import random

import pytest

from timescales import Counters, Every, Ratio


def fired(every: Every, ticks: list[int]) -> list[int]:
    """Counts after which the clock was due."""
    counters, found = Counters(), []
    for n in ticks:
        if every.due(*counters.advance(every.unit, n)):
            found.append(counters[every.unit])
    return found


def test_every_fires_at_multiples_and_not_at_zero():
    assert fired(Every(4), [1] * 12) == [4, 8, 12]
    assert fired(Every(4), [0, 0, 1]) == []
    assert fired(Every(), [1, 1]) == [1, 2]


@pytest.mark.parametrize("phase", range(-3, 9))
def test_a_phase_shifts_every_firing(phase: int):
    counts = fired(Every(4, phase=phase), [1] * 20)
    assert counts == [c for c in range(1, 21) if c % 4 == phase % 4]


def test_a_long_tick_fires_once_and_the_remainder_carries():
    assert fired(Every(4), [3, 3, 10, 1, 3]) == [6, 16, 20]


@pytest.mark.parametrize("seed", range(5))
def test_no_cut_of_time_loses_a_firing(seed: int):
    draw = random.Random(seed)
    every = Every(draw.randint(2, 9), phase=draw.randint(0, 9))
    ticks = [draw.randint(0, every.n) for _ in range(200)]  # never past two due points at once
    single = fired(every, [1] * sum(ticks))
    assert len(fired(every, ticks)) == len(single) > 0


@pytest.mark.parametrize(
    "wrong", [{"n": 0}, {"n": 2.5}, {"unit": ""}, {"p": 0.0}, {"p": 1.5}, {"phase": 0.5}]
)
def test_every_names_a_wrong_value(wrong: dict):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Every(**wrong)


def test_counters_count_units_apart_and_come_back():
    counters = Counters()
    assert counters.advance("frame", 8) == (0, 8)
    assert counters.advance("frame", 8) == (8, 16)
    assert counters["update"] == 0
    other = Counters()
    other.load_state_dict(counters.state_dict())
    assert other["frame"] == 16
    assert other.advance("frame") == (16, 17)
    with pytest.raises(ValueError, match="frame"):
        counters.advance("frame", -1)


@pytest.mark.parametrize("updates, frames", [(0.3, 1), (32, 1024), (1, 7), (2.5, 1), (0, 1)])
def test_ratio_is_exact_after_any_frames(updates: float, frames: float):
    draw, ratio, count, total = random.Random(0), Ratio(updates, frames), 0, 0
    for _ in range(300):
        n = draw.randint(0, 9)
        count, total = count + n, total + ratio.owed(n)
        assert total == round(updates * 10) * count // round(frames * 10)


def test_ratio_resumes():
    whole, half = Ratio(0.3), Ratio(0.3)
    first = [whole.owed() for _ in range(7)]
    assert [half.owed() for _ in range(7)] == first
    resumed = Ratio(0.3)
    resumed.load_state_dict(half.state_dict())
    assert [resumed.owed() for _ in range(13)] == [whole.owed() for _ in range(13)]


def test_ratio_refuses_what_makes_no_sense():
    with pytest.raises(ValueError, match="Ratio"):
        Ratio(-1)
