"""What was done in a video, from the lines of its .jsonl: one JSON object for each tick.

Line t says what was done at frame t. A plain line is {"action": 3} or {"action": [0.5, -1]}, with
the "reward" and "terminal" that came of it where there are any. A line of VPT's contractors
(arXiv 2206.11795) is the state of keyboard and mouse in Minecraft: it becomes 23 keys and one
direction of the camera out of 11 x 11, as in Dreamer 4 (arXiv 2509.24527).

The recorder of those had faults, which are mended here: attack that sticks from the first line
on, hotbar slots that the scroll wheel chose, mice that some versions scaled in menus.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.config import ConfigError
from experiments.envs.rows import encode_choices
from worldmodel.types import ActionSpec

KEYS = {
    "key.keyboard.escape": "ESC", "key.keyboard.s": "back", "key.keyboard.q": "drop",
    "key.keyboard.w": "forward", **{f"key.keyboard.{n}": f"hotbar.{n}" for n in range(1, 10)},
    "key.keyboard.e": "inventory", "key.keyboard.space": "jump", "key.keyboard.a": "left",
    "key.keyboard.d": "right", "key.keyboard.left.shift": "sneak",
    "key.keyboard.left.control": "sprint", "key.keyboard.f": "swapHands",
}  # fmt: skip
BUTTONS = ("attack", "use", "pickItem")  # of the mouse
NAMES = (*KEYS.values(), *BUTTONS)  # 23 keys, in the order of the encoded action
DEGREES = 360 / 2400  # that the camera turns for one count of the mouse
MENU_SCALE = {"5.7": 0.5, "5.8": 0.5, "6.7": 2.0, "6.8": 2.0, "6.9": 2.0}  # of versions, in a GUI
TURN, CELL, MU = 10.0, 2.0, 10.0  # most degrees a tick, width of a cell, and how it is bent
CELLS = int(2 * TURN / CELL) + 1  # 11 of each axis; the middle is no turn
CURSOR = 720  # the height of the screen in whose pixels the recorder counts


FIELDS = ("action", "reward", "terminal", "mouse", "keyboard", "hotbar", "isGuiOpen")


class Ticks(NamedTuple):
    """T ticks as numbers of their layout, and where a cursor is to be drawn."""

    layout: "Layout"
    values: np.ndarray  # (T, V)
    reward: np.ndarray  # (T,) float32
    terminal: np.ndarray  # (T,) bool
    cursor: np.ndarray  # (T, 2) x and y as shares of the screen's height; nan where there is none


class Layout(NamedTuple):
    """How lines of one kind become actions."""

    name: str
    read: Callable[[Sequence[dict], Path], np.ndarray]  # T lines to (T, V)
    merge: Callable[[np.ndarray, np.ndarray], np.ndarray]  # and where groups start: (groups, V)
    encode: Callable[[np.ndarray, ActionSpec], np.ndarray]  # (T, A)
    spec: Callable[[np.ndarray], ActionSpec]
    idle: Callable[[np.ndarray], np.ndarray]  # (T,) bool: nothing was done


def read_ticks(file: Path) -> Ticks:
    """The lines of a .jsonl. Raises ConfigError, which names the file and the line."""
    lines = [_object(text, file, n) for n, text in _texts(file)]
    if not lines:
        raise ConfigError("source", str(file), f"{file.name} is empty", "one line is one tick")
    layout = _layout(lines[0], file)
    values = layout.read(lines, file)
    reward = [_number(line.get("reward", 0), file, n) for n, line in enumerate(lines, 1)]
    terminal = [line.get("terminal") in (True, 1) for line in lines]
    cursor = cursors(lines) if layout is CONTRACTOR else np.full((len(lines), 2), np.nan)
    flags = np.array(reward, np.float32), np.array(terminal, bool)
    return Ticks(layout, values, *flags, cursor)


def _texts(file: Path) -> Iterator[tuple[int, str]]:
    """Numbers from 1 and texts of the lines, but for blank ones at the end."""
    blank: list[int] = []
    try:
        with file.open(encoding="utf-8") as found:
            for number, text in enumerate(found, 1):
                if not text.strip():
                    blank.append(number)
                elif blank:
                    raise _bad(file, blank[0], "is blank")
                else:
                    yield number, text
    except (OSError, UnicodeDecodeError) as error:
        problem = f"{file.name} cannot be read: {error}"
        raise ConfigError("source", str(file), problem, "write it as UTF-8 text") from error


def _object(text: str, file: Path, number: int) -> dict[str, Any]:
    """What is needed of a line; recorders write far more."""
    try:
        found = json.loads(text)
    except ValueError as error:
        raise _bad(file, number, f"is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise _bad(file, number, f"is {text.strip()[:40]}, and no object")
    return {name: found[name] for name in FIELDS if name in found}


def _bad(file: Path, number: int, problem: str) -> ConfigError:
    way_out = "mend it, or leave the pair out with --skip-broken"
    return ConfigError("source", str(file), f"{file.name}, line {number}: {problem}", way_out)


def _number(value: Any, file: Path, number: int) -> float:
    if isinstance(value, int | float) and np.isfinite(value):
        return float(value)
    raise _bad(file, number, f"{json.dumps(value)[:40]} is no number")


def _layout(line: dict[str, Any], file: Path) -> Layout:
    if {"mouse", "keyboard"} <= line.keys():
        return CONTRACTOR
    action = line.get("action")
    if isinstance(action, list):
        return VECTORS
    if action is not None:
        return CHOICES
    raise _bad(file, 1, "has neither an action, nor mouse and keyboard")


# ---- plain lines -------------------------------------------------------------------------------
def _choices(lines: Sequence[dict], file: Path) -> np.ndarray:
    for number, line in enumerate(lines, 1):
        action = line.get("action")
        if not isinstance(action, int) or action < 0:
            raise _bad(file, number, f"action {json.dumps(action)} is no choice from 0 up")
    return np.array([[line["action"]] for line in lines])


def _vectors(lines: Sequence[dict], file: Path) -> np.ndarray:
    size = len(lines[0]["action"])
    rows = np.zeros((len(lines), size), np.float32)
    for number, line in enumerate(lines, 1):
        action = line.get("action")
        if not isinstance(action, list) or len(action) != size:
            raise _bad(file, number, f"action {json.dumps(action)[:40]} is no list of {size}")
        rows[number - 1] = [_number(value, file, number) for value in action]
        if (abs(rows[number - 1]) > 1).any():
            problem = f"action {json.dumps(action)[:40]} is outside [-1, 1]: divide by its range"
            raise _bad(file, number, problem)
    return rows


def _mean(values: np.ndarray, starts: np.ndarray) -> np.ndarray:
    counts = np.diff(np.append(starts, len(values)))
    return np.add.reduceat(values, starts) / counts[:, None].astype(np.float32)


def _never(values: np.ndarray) -> np.ndarray:
    return np.zeros(len(values), bool)


CHOICES = Layout(
    "choices",
    _choices,
    lambda values, starts: values[starts],  # what was chosen at the frame that is kept
    encode_choices,
    lambda values: ActionSpec("discrete", (1 + int(values.max()),)),
    _never,
)
VECTORS = Layout(
    "vectors",
    _vectors,
    _mean,
    lambda values, _: values.astype(np.float32),
    lambda values: ActionSpec("continuous", (values.shape[1],)),
    _never,
)


# ---- VPT's contractors -------------------------------------------------------------------------
def _pressed(lines: Sequence[dict], file: Path) -> np.ndarray:
    """23 keys, then the camera's pitch and yaw in degrees."""
    stuck, hotbar = False, None
    scale = next((MENU_SCALE[part] for part in file.parts if part in MENU_SCALE), 1.0)
    rows = np.zeros((len(lines), len(NAMES) + 2), np.float32)
    for number, line in enumerate(lines, 1):
        row = rows[number - 1]
        try:
            new = line["mouse"]["newButtons"]
            stuck = new == [0] if number == 1 else stuck and 0 not in new
            names = [KEYS[key] for key in line["keyboard"]["keys"] if key in KEYS]
            names += [BUTTONS[b] for b in line["mouse"]["buttons"] if b in range(len(BUTTONS))]
            names = [name for name in names if not (stuck and name == "attack")]
            if hotbar is not None and line["hotbar"] != hotbar:
                names.append(f"hotbar.{line['hotbar'] + 1}")
            hotbar = line["hotbar"]
            row[[NAMES.index(name) for name in names]] = 1
            turn = np.array([line["mouse"]["dy"], line["mouse"]["dx"]], np.float32) * DEGREES
            turn = turn * scale if line["isGuiOpen"] else turn
        except (KeyError, TypeError, ValueError) as error:
            problem = f"is no tick of a contractor: {type(error).__name__} {error}"
            raise _bad(file, number, problem) from error
        row[-2:] = np.where(abs(turn) > 180, 0, turn)  # a jump of the cursor is no turn
    return rows


def _keys_and_turns(values: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Of a group: keys that were pressed at any tick of it, and the sum of its turns."""
    keys = np.maximum.reduceat(values[:, :-2], starts)
    return np.concatenate([keys, np.add.reduceat(values[:, -2:], starts)], 1)


def cells(degrees: np.ndarray) -> np.ndarray:
    """Degrees (T, 2) to cells of the 11 x 11 grid (T, 2), fine around no turn (mu-law)."""
    unit = np.clip(degrees / TURN, -1, 1)
    bent = np.sign(unit) * np.log1p(MU * np.abs(unit)) / np.log1p(MU)
    return np.rint((bent + 1) * (TURN / CELL)).astype(np.int64)


def _contractor(values: np.ndarray, spec: ActionSpec) -> np.ndarray:
    grid = cells(values[:, -2:])
    camera = grid[:, :1] * CELLS + grid[:, 1:]  # pitch first; 60 is no turn
    return encode_choices(np.concatenate([values[:, :-2].astype(np.int64), camera], 1), spec)


def _still(values: np.ndarray) -> np.ndarray:
    return ~values[:, :-2].any(1) & (cells(values[:, -2:]) == CELLS // 2).all(1)


CONTRACTOR = Layout(
    "contractor",
    _pressed,
    _keys_and_turns,
    _contractor,
    lambda values: ActionSpec("discrete", (2,) * len(NAMES) + (CELLS * CELLS,)),
    _still,
)


def cursors(lines: Sequence[dict[str, Any]]) -> np.ndarray:
    """Where the cursor is in a menu (T, 2), which the recorder left out of the picture."""
    found = np.full((len(lines), 2), np.nan)
    for t, line in enumerate(lines):
        if line["isGuiOpen"]:
            found[t] = line["mouse"].get("x", np.nan), line["mouse"].get("y", np.nan)
    return found / CURSOR
