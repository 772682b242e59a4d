"""CrafterShift-v0: Crafter whose rules are hidden; every context looks the same.

A seed gives the same world, creatures and first image in each context; what differs is what actions
do, by the table below. All 22 achievements can be unlocked in each, and the reward is Crafter's.
Crafter reads its rules from a module of its own package, so a context with other rules is a second
import of that package, under a name of ours, in which that one module is another.
"""

import copy
import importlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from experiments.envs.crafter import CrafterEnv
from experiments.envs.hidden import Hidden, view

ID = "CrafterShift-v0"
Amounts = Mapping[str, int]


@dataclass(frozen=True)
class Rules:
    """What a context changes; what is not named stays as it is."""

    uses: Mapping[str, Amounts] = field(default_factory=dict)  # placed or made -> what it costs
    tools: Mapping[str, Amounts] = field(default_factory=dict)  # block -> what collecting it needs
    roles: Mapping[str, str] = field(default_factory=dict)  # block -> collected as if it were that
    acts: Mapping[str, str] = field(default_factory=dict)  # action -> what it does
    chance: Mapping[str, float] = field(default_factory=dict)  # block -> of giving something
    needs: float = 1.0  # times as fast that food, drink and energy fall while awake


CONTEXTS = {
    "normal": Rules(),
    "costs": Rules(
        uses={
            "table": {"wood": 4},
            "furnace": {"stone": 2, "coal": 1},
            "wood_pickaxe": {"wood": 2, "sapling": 1},
            "stone_pickaxe": {"stone": 3},
            "iron_pickaxe": {"stone": 2, "coal": 1, "iron": 1},
            "wood_sword": {"sapling": 1},
            "stone_sword": {"stone": 1, "coal": 1},
            "iron_sword": {"iron": 2},
        }
    ),
    "tools": Rules(  # swords mine, pickaxes do not
        tools={
            "stone": {"wood_sword": 1},
            "coal": {"wood_sword": 1},
            "iron": {"stone_sword": 1},
            "diamond": {"iron_sword": 1},
        }
    ),
    "swapped": Rules(roles={"tree": "stone", "stone": "tree", "coal": "iron", "iron": "coal"}),
    "inverted": Rules(
        acts={
            "move_left": "move_right",
            "move_right": "move_left",
            "move_up": "move_down",
            "move_down": "move_up",
        }
    ),
    "hungry": Rules(needs=3.0, chance={"grass": 0.02}),
}
TABLES = (
    *("root", "actions", "materials", "walkable", "items"),
    *("collect", "place", "make", "achievements"),
)


def tables(rules: Rules) -> dict[str, Any]:
    """Crafter's tables under these rules, a copy of their own."""
    own = vars(importlib.import_module("crafter.constants"))
    changed = {name: copy.deepcopy(own[name]) for name in TABLES}
    changed["actions"] = [rules.acts.get(action, action) for action in own["actions"]]
    for block, role in rules.roles.items():
        left = {"leaves": own["collect"][block]["leaves"]}
        changed["collect"][block] = {**copy.deepcopy(own["collect"][role]), **left}
    for block, needed in rules.tools.items():
        changed["collect"][block]["require"] = dict(needed)
    for block, probability in rules.chance.items():
        changed["collect"][block]["probability"] = probability
    for made, cost in rules.uses.items():
        table = "place" if made in own["place"] else "make"
        changed[table][made]["uses"] = dict(cost)
    return changed


def package(context: str) -> str:
    """The name of Crafter's package as this context has it, imported on first use."""
    name = f"{__name__}.{context}"
    if name not in sys.modules:
        own = importlib.import_module("crafter")
        other = ModuleType(name, own.__doc__)
        constants = SimpleNamespace(**tables(CONTEXTS[context]))
        engine = importlib.import_module("crafter.engine")  # has no rules in it
        vars(other).update(__path__=own.__path__, constants=constants, engine=engine)
        sys.modules[name] = other
    return name


class CrafterShiftEnv(gymnasium.Env):
    """Crafter's images and 17 actions, in one of `CONTEXTS`; `oracle` observes it as `context`."""

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012  gymnasium's own convention

    def __init__(self, oracle: bool = False, render_mode: str = "rgb_array", **kwargs: Any):
        self._hidden = Hidden(ID, tuple(CONTEXTS))
        self._kwargs = {"render_mode": render_mode, **kwargs}
        self._worlds: dict[str, CrafterEnv] = {}
        self._world = self._enter("normal")
        self._rules = CONTEXTS["normal"]
        self.render_mode = render_mode
        image = spaces.Box(0, 255, self._world.observation_space.shape, np.uint8)
        self._view = view(image, len(CONTEXTS), oracle)
        self.observation_space = self._view.space
        self.action_space = self._world.action_space

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        """The image of a new world; without a seed one that follows from the last seed."""
        super().reset(seed=seed)
        context = self._hidden.enter(options)
        self._world, self._rules = self._enter(context), CONTEXTS[context]
        obs, info = self._world.reset(
            seed=int(self.np_random.integers(2**31)) if seed is None else seed
        )
        return self._seen(obs), info

    def step(self, action: int):
        """One step by the rules of the context."""
        self._world.hasten(self._rules.needs)
        obs, reward, terminated, truncated, info = self._world.step(action)
        return self._seen(obs), reward, terminated, truncated, info

    def render(self) -> np.ndarray:
        """The image (H, W, 3) uint8 as observed."""
        return self._world.render()

    def _enter(self, context: str) -> CrafterEnv:
        if context not in self._worlds:
            self._worlds[context] = CrafterEnv(package=package(context), seed=0, **self._kwargs)
        return self._worlds[context]

    def _seen(self, obs: np.ndarray) -> Any:
        return self._view(obs, self._hidden.told())
