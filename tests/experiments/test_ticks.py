"""Lines of actions: plain ones and VPT's, their faults mended, mistakes named by their line."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.config import ConfigError
from experiments.data.ticks import CONTRACTOR, NAMES, cells, read_ticks
from worldmodel.types import ActionSpec


def written(lines: list[Any], name: str = "a.jsonl") -> Path:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def tick(keys: str = "", buttons: tuple[int, ...] = (), **other: Any) -> dict[str, Any]:
    """A contractor's line; `mouse` entries and others as given."""
    mouse = {"x": 0.0, "y": 0.0, "dx": 0.0, "dy": 0.0, "newButtons": [], "buttons": [*buttons]}
    mouse |= {name: other.pop(name) for name in [*other] if name in mouse}
    pressed = {"keys": [f"key.keyboard.{key}" for key in keys.split()], "chars": ""}
    return {"mouse": mouse, "keyboard": pressed, "hotbar": 0, "isGuiOpen": False, "tick": 7} | other


def pressed(lines: list[dict], name: str = "a.jsonl") -> list[set[str]]:
    """The keys of each line."""
    values = read_ticks(written(lines, name)).values[:, :-2]
    return [{NAMES[i] for i in np.flatnonzero(row)} for row in values]


def test_plain_choices_and_what_came_of_them():
    lines = [{"action": 2}, {"action": 0, "reward": 1.5}, {"action": 1, "terminal": True, "x": 1}]
    ticks = read_ticks(written(lines))
    assert ticks.layout.spec(ticks.values) == ActionSpec("discrete", (3,))
    assert ticks.reward.tolist() == [0, 1.5, 0] and ticks.terminal.tolist() == [False, False, True]
    merged = ticks.layout.merge(ticks.values, np.array([0, 2]))
    found = ticks.layout.encode(merged, ActionSpec("discrete", (4,)))
    assert found.tolist() == [[0, 0, 1, 0], [0, 1, 0, 0]]  # the first of each group


def test_plain_vectors_are_averaged():
    ticks = read_ticks(written([{"action": [1, -0.5]}, {"action": [0, 0.5]}, {"action": [1, 1]}]))
    spec = ticks.layout.spec(ticks.values)
    assert spec == ActionSpec("continuous", (2,))
    merged = ticks.layout.merge(ticks.values, np.array([0, 2]))
    assert ticks.layout.encode(merged, spec).tolist() == [[0.5, 0], [1, 1]]


def test_keys_and_buttons_have_minerls_names():
    assert len(set(NAMES)) == 23
    found = pressed([tick("w space left.control", (0, 1)), tick("e 3 f12"), tick("escape", (2, 5))])
    assert found == [{"forward", "jump", "sprint", "attack", "use"}, {"inventory", "hotbar.3"},
                     {"ESC", "pickItem"}]  # fmt: skip


def test_attack_that_sticks_from_the_first_line_is_none_until_it_is_pressed():
    first = tick(buttons=(0, 1), newButtons=[0])
    rest = [tick(buttons=(0,)), tick(buttons=(0,), newButtons=[0]), tick(buttons=(0,))]
    assert pressed([first, *rest]) == [{"use"}, set(), {"attack"}, {"attack"}]
    assert pressed([tick(buttons=(0,)), *rest])[0] == {"attack"}  # held before: it was meant


def test_the_scroll_wheel_shows_in_the_hotbar():
    assert pressed([tick(hotbar=n) for n in (4, 4, 6, 6, 0)]) == [
        set(), set(), {"hotbar.7"}, set(), {"hotbar.1"},
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("folder", "gui", "degrees"),
    [("6.13", True, 0.3), ("6.9", True, 0.6), ("5.7", True, 0.15), ("6.9", False, 0.3)],
)
def test_small_turns_are_not_lost_and_menus_have_their_scale(
    folder: str, gui: bool, degrees: float
):
    line = tick(dx=2.0, dy=-2.0, isGuiOpen=gui)
    jump = tick(dx=5000.0, dy=1.0)
    ticks = read_ticks(written([line, jump], f"data/{folder}/a.jsonl"))
    np.testing.assert_allclose(ticks.values[:, -2:], [[-degrees, degrees], [0.15, 0]], rtol=1e-6)


def test_the_camera_is_one_of_121_and_fine_around_no_turn():
    centres = [-10, -5.809, -3.215, -1.609, -0.615, 0, 0.615, 1.609, 3.215, 5.809, 10]
    assert cells(np.array([centres, centres]).T).tolist() == [[i, i] for i in range(11)]
    assert cells(np.array([[-50.0, 50.0]])).tolist() == [[0, 10]]
    ticks = read_ticks(written([tick(), tick("w", dy=100.0), tick(dx=-1000.0)]))
    spec = CONTRACTOR.spec(ticks.values)
    assert spec == ActionSpec("discrete", (2,) * 23 + (121,))
    found = CONTRACTOR.encode(ticks.values, spec)
    assert found.shape == (3, 167) and (found.sum(1) == 24).all()
    assert found[:, 46:].argmax(1).tolist() == [60, 115, 55]  # pitch 10 first, then yaw 0
    assert CONTRACTOR.idle(ticks.values).tolist() == [True, False, False]


def test_merged_ticks_press_every_key_and_turn_the_whole_way():
    ticks = read_ticks(written([tick("w", dx=10.0), tick("a", dx=20.0), tick(dx=-1.0)]))
    merged = CONTRACTOR.merge(ticks.values, np.array([0, 2]))
    keys = [{NAMES[i] for i in np.flatnonzero(row)} for row in merged[:, :-2]]
    assert keys == [{"forward", "left"}, set()]
    np.testing.assert_allclose(merged[:, -1], [4.5, -0.15], rtol=1e-6)


def test_the_cursor_is_known_where_a_menu_is_open():
    ticks = read_ticks(written([tick(x=360.0, y=72.0), tick(x=360.0, y=72.0, isGuiOpen=True)]))
    assert np.isnan(ticks.cursor[0]).all() and ticks.cursor[1].tolist() == [0.5, 0.1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"action": 1}\n{"action": 2,,}\n', r"a\.jsonl, line 2: is not JSON"),
        ('{"action": 1}\n\n{"action": 2}\n', "line 2: is blank"),
        ('{"action": 1}\n[1]\n', r"line 2: is \[1\], and no object"),
        ('{"action": 1}\n{"action": 2.5}\n', "line 2: action 2.5 is no choice"),
        ('{"action": 1}\n{"action": -1}\n', "line 2: action -1 is no choice"),
        ('{"action": 1}\n{"reward": 1}\n', "line 2: action null is no choice"),
        ('{"action": 1}\n{"action": 1, "reward": "x"}\n', 'line 2: "x" is no number'),
        ('{"action": 1, "reward": NaN}\n', "line 1: NaN is no number"),
        ('{"action": [1]}\n{"action": [0, 1]}\n', r"line 2: action \[0, 1\] is no list of 1"),
        ('{"action": [1]}\n{"action": [3]}\n', r"line 2: action \[3\] is outside \[-1, 1\]"),
        ('{"action": ["a"]}\n', 'line 1: "a" is no number'),
        ('{"act": 1}\n', "line 1: has neither an action, nor mouse and keyboard"),
        ("\n\n", r"a\.jsonl is empty"),
        ('{"mouse": 3, "keyboard": {"keys": []}}', "line 1: is no tick of a contractor"),
        (json.dumps(tick()) + "\n" + json.dumps(tick(hotbar=12)), "line 2: is no tick"),
    ],
)
def test_a_bad_line_is_named(text: str, message: str):
    Path("a.jsonl").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_ticks(Path("a.jsonl"))
