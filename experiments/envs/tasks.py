"""Environments that switch between gymnasium tasks, as data: their hidden contexts, in order.

MiniGrid3-v0 and MiniHack4-v0 are the small streams of Continual-Dreamer (Kessler et al. 2023, arXiv
2211.15944), with its episodes of 100 steps; Atari6-v0 is CORA's (Powers et al. 2021, arXiv
2110.10067), CoinRun6-v0 that of ARROW (arXiv 2603.11395) in its original order. Nothing is imported
here.
"""

from typing import Any, NamedTuple


class Task(NamedTuple):
    """One context: a gymnasium id, and what it is made with."""

    id: str
    kwargs: dict[str, Any]


class Stream(NamedTuple):
    """Tasks by the names of their contexts; `steps` cuts an episode off, None leaves it to them."""

    tasks: dict[str, Task]
    steps: int | None = None


# A neutral human male monk that only walks; waiting costs a little.
_MINIHACK: dict[str, Any] = {
    "character": "mon-hum-neu-mal",
    "reward_win": 1,
    "reward_lose": 0,
    "penalty_step": -0.001,
    "penalty_time": 0.0,
    "penalty_mode": "constant",
}


def _minihack(name: str) -> Task:
    return Task(f"MiniHack-{name}-v0", _MINIHACK)


def _atari(name: str) -> Task:
    """As the v5 ids are: four frames a step, actions that stick; all 18 actions in every game."""
    return Task(f"ALE/{name}-v5", {"full_action_space": True})


def _coinrun(*parts: str) -> Task:
    """CoinRun with these parts changed, in ARROW's letters."""
    changes = {
        "NB": {"use_backgrounds": False},
        "RT": {"restrict_themes": True},
        "GA": {"use_generated_assets": True},
        "MA": {"use_monochrome_assets": True},
        "CA": {"center_agent": False},
    }
    return Task("CoinRun-v0", {key: v for part in parts for key, v in changes[part].items()})


STREAMS = {
    "MiniGrid3-v0": Stream(
        {
            "doorkey": Task("MiniGrid-DoorKey-8x8-v0", {"size": 9}),  # no id of 9 x 9 is registered
            "lava": Task("MiniGrid-LavaCrossingS9N1-v0", {}),
            "simple": Task("MiniGrid-SimpleCrossingS9N1-v0", {}),
        },
        steps=100,
    ),
    "MiniHack4-v0": Stream(
        {
            "room": _minihack("Room-Random-15x15"),
            "trap": _minihack("Room-Trap-15x15"),
            "narrow": _minihack("River-Narrow"),
            "monster": _minihack("River-Monster"),
        },
        steps=100,
    ),
    "Atari6-v0": Stream(
        {
            "invaders": _atari("SpaceInvaders"),
            "krull": _atari("Krull"),
            "beamrider": _atari("BeamRider"),
            "hero": _atari("Hero"),
            "stargunner": _atari("StarGunner"),
            "pacman": _atari("MsPacman"),
        }
    ),
    "CoinRun6-v0": Stream(  # each changes one thing more
        {
            "coinrun": _coinrun(),
            "nb": _coinrun("NB"),
            "rt": _coinrun("NB", "RT"),
            "ga": _coinrun("NB", "RT", "GA"),
            "ma": _coinrun("NB", "RT", "GA", "MA"),
            "ca": _coinrun("NB", "RT", "GA", "MA", "CA"),
        }
    ),
}
NAMES: dict[str, tuple[str, ...]] = {name: tuple(stream.tasks) for name, stream in STREAMS.items()}
