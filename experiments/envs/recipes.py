"""Recipes: fetch two things, take them to the bench, craft. A wrong combination is lost for good.

A room seen whole, from above: wood, stone and fibre lie on the floor, and a bench stands in it. Two
recipes make a tool, wood with stone and wood with fibre; whatever else is crafted at the bench is
gone, and nothing is made. A teacher that knows the recipes never shows that, so whoever learns
from its recordings has to guess: here it is known what a world model imagines without evidence.
"""

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

ID = "Recipes-v0"
CAP = 1.0  # a tool, which ends the episode
STEPS = 40  # of an episode
LEFT, RIGHT, UP, DOWN, PICK, CRAFT = range(6)
MOVES = ((-1, 0), (1, 0), (0, -1), (0, 1))
THINGS = ("wood", "stone", "fibre")
WOOD, STONE, FIBRE = 0, 1, 2
Bundle = frozenset[int]
RECIPES: tuple[Bundle, ...] = (frozenset({WOOD, STONE}), frozenset({WOOD, FIBRE}))
MOST = 2  # things carried at once

CELLS, SIDE = 8, 8  # the picture is 8 x 8 cells of 8 x 8 pixels; the lowest row shows what is held
FLOOR, WALL, BENCH, TOOL = (24, 24, 32), (96, 96, 104), (176, 112, 40), (240, 208, 48)
COLOURS = np.array([(120, 72, 200), (56, 168, 208), (80, 192, 80)], np.uint8)
AGENT = (255, 255, 255)
POCKET = (1, 3, 5)  # columns of the lowest row, one for each thing
SHELF = 7  # the column in which a tool is shown

Place = tuple[int, int]


class RecipesEnv(gymnasium.Env):
    """Images (64, 64, 3) uint8; actions left, right, up, down, pick, craft; reward 1 for a tool.

    size: cells of a side of the room, 3 to 6.
    """

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012  gymnasium's own convention

    def __init__(self, size: int = 5, render_mode: str = "rgb_array"):
        if not 3 <= size <= CELLS - 2:
            raise ValueError(f"size={size}: a room of {ID} has 3 to {CELLS - 2} cells a side")
        self.size, self.render_mode = size, render_mode
        shape = (CELLS * SIDE, CELLS * SIDE, 3)
        self.observation_space = spaces.Box(0, 255, shape, np.uint8)
        self.action_space = spaces.Discrete(6)
        self.agent: Place = (0, 0)
        self.bench: Place = (0, 0)
        self.lying: dict[int, Place] = {}  # things on the floor
        self.held: Bundle = frozenset()
        self.crafted = False

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        """A new room: bench, things and agent on cells of their own."""
        super().reset(seed=seed)
        drawn = self.np_random.choice(self.size**2, 2 + len(THINGS), replace=False)
        places: list[Place] = [(int(p) % self.size, int(p) // self.size) for p in drawn]
        self.agent, self.bench = places[:2]
        self.lying = dict(enumerate(places[2:]))
        self.held, self.crafted = frozenset(), False
        return self.render(), {}

    def step(self, action: int):
        """One step; walls stop, and what cannot be done changes nothing."""
        if action < PICK:
            self.agent = self.beyond(int(action))
        elif action == PICK:
            self._pick()
        else:
            self._craft()
        return self.render(), float(self.crafted), self.crafted, False, {}

    def beyond(self, move: int) -> Place:
        """Where a move leads."""
        (x, y), (dx, dy) = self.agent, MOVES[move]
        return min(max(x + dx, 0), self.size - 1), min(max(y + dy, 0), self.size - 1)

    def render(self) -> np.ndarray:
        """The room from above, and below it what is held."""
        cells = np.empty((CELLS, CELLS, 3), np.uint8)
        cells[:] = WALL
        cells[1 : self.size + 1, 1 : self.size + 1] = FLOOR
        cells[-1] = FLOOR
        cells[self.bench[1] + 1, self.bench[0] + 1] = BENCH
        for thing, (x, y) in self.lying.items():
            cells[y + 1, x + 1] = COLOURS[thing]
        for thing in self.held:
            cells[-1, POCKET[thing]] = COLOURS[thing]
        if self.crafted:
            cells[-1, SHELF] = TOOL
        image = cells.repeat(SIDE, 0).repeat(SIDE, 1)
        x, y = ((v + 1) * SIDE for v in self.agent)
        image[y + 1 : y + SIDE - 1, x + 1 : x + SIDE - 1] = AGENT  # what lies there shows around
        return image

    def _pick(self) -> None:
        here = [thing for thing, place in self.lying.items() if place == self.agent]
        if here and len(self.held) < MOST:
            del self.lying[here[0]]
            self.held |= {here[0]}

    def _craft(self) -> None:
        if self.agent == self.bench:
            self.crafted = self.held in RECIPES
            self.held = frozenset()
