"""report.png: drawn for whole, young, killed, plain and damaged runs; what its words say."""

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from experiments.record import Run, report
from experiments.record.curves import (
    INK,
    Line,
    duration,
    merge_equal,
    phase_means,
    series,
    smooth,
    spread,
)
from experiments.record.levels import level_rows, schedule_tag, schedule_text
from experiments.record.metrics import Row
from experiments.record.report import contexts, draw, find_cap, gather, outcome
from experiments.record.run import read_config
from tests.experiments.record.synthetic import Config, make_run


def words(figure: Figure) -> str:
    found = [text.get_text() for text in figure.texts]
    for axes in figure.axes:
        found += [axes.get_title(loc="left"), axes.get_title(), axes.get_xlabel()]
        found += [axes.get_ylabel(), *(text.get_text() for text in axes.texts)]
    return "\n".join(found)


def test_the_report_is_a_picture_in_the_run(tmp_path: Path):
    path = report(make_run(tmp_path).path)
    assert path.name == "report.png" and path.read_bytes()[:4] == b"\x89PNG"


def test_it_shows_the_run_its_phases_levels_and_units(tmp_path: Path):
    run = make_run(tmp_path)
    text = words(draw(gather(run.path)))
    for word in [run.id, "CartPoleShift-v0", "fast every update", "slow every 16 updates"]:
        assert word in text
    for word in ["learns in normal", "learns in flipped", "cap 200", "environment frames"]:
        assert word in text
    for word in ["dyn = rep", "repvalue", "fast 3,000", "slow 187", "slow_critic", "log scale"]:
        assert word in text


def test_a_run_that_was_cut_short_says_so(tmp_path: Path):
    run = make_run(tmp_path, frames=500, state="stopped")
    config = run.path / "config.yaml"
    config.write_text(config.read_text().replace("frames: 500", "frames: 24000"))
    text = words(draw(gather(run.path)))
    assert "500 of 24,000 frames in" in text and "stopped" in text


def test_phases_shade_every_panel_that_counts_frames(tmp_path: Path):
    figure = draw(gather(make_run(tmp_path).path))
    shaded = [axes for axes in figure.axes if axes.patches]
    assert len(shaded) == 5
    boxes = [
        axes.patches[0].get_extents().transformed(axes.transData.inverted()) for axes in shaded
    ]
    assert all((box.x0, box.x1) == pytest.approx((8000, 16000)) for box in boxes)


def test_signs_of_plasticity_have_a_panel_where_a_run_reports_them(tmp_path: Path):
    run = make_run(tmp_path)
    for step, share in ((24_000, 0.25), (24_001, 0.5)):
        found = {"dormant": share, "erank": 8 * share, "weight_norm": 100 * share}
        named = [
            found,
            *({f"{part}/{k}": v for k, v in found.items()} for part in ("world", "actor")),
        ]
        run.log(step, {f"plasticity/{k}": v for part in named for k, v in part.items()})
    figure = draw(gather(run.path))
    text = words(figure)
    for word in ("Plasticity", "world dormant", "actor dormant", "rank / first", "norm / first"):
        assert word in text
    axes = next(axes for axes in figure.axes if "Plasticity" in axes.get_title())
    last = [float(line.get_ydata()[-1]) for line in axes.lines if len(line.get_ydata())]  # pyright: ignore
    assert last == [0.5, 0.5, 2.0, 2.0]


def test_the_outcome_is_the_mean_of_three_evaluations_at_the_end_of_each_phase(tmp_path: Path):
    run = Run.create(Config(frames=3000), tmp_path)
    for step in range(100, 3001, 100):
        run.log(step, {"eval/normal/score": step / 3000, "eval/normal/return": step / 15})
    facts = gather(run.path)
    told = outcome(facts).replace("\N{NO-BREAK SPACE}", " ")
    assert told.startswith("score in normal 0.30 → 0.63 → 0.97 ")
    assert find_cap(facts) == pytest.approx(200) and contexts(facts) == ["normal"]


def test_a_plain_environment_has_one_context_no_phases_and_no_cap(tmp_path: Path):
    run = Run.create(Config(frames=300), tmp_path)
    config = run.path / "config.yaml"
    config.write_text(config.read_text().replace("[normal, flipped, normal]", "[]"))
    for step in (100, 200, 300):
        run.log(step, {"eval/default/return": -float(step)})
    facts = gather(run.path)
    assert outcome(facts).startswith("return\N{NO-BREAK SPACE}-200.0 ")
    assert find_cap(facts) is None
    assert "learns in" not in words(draw(facts))


@pytest.mark.parametrize("levels", [None, "{", '{"levels": [{}]}', '{"levels": [{"name": "a"}]}'])
def test_a_run_with_little_or_damaged_data_is_drawn(tmp_path: Path, levels: str | None):
    run = Run.create(Config(), tmp_path)
    if levels is not None:
        (run.path / "levels.json").write_text(levels)
    assert words(draw(gather(run.path))).count("nothing recorded yet") == 6
    run.log(10, {"loss/a": math.nan, "loss/b": -1.0, "loss/policy": 0.0, "levels/a/updates": 0})
    report(run.path)


def test_levels_come_from_the_table_or_else_the_configuration(tmp_path: Path):
    run = make_run(tmp_path, frames=500)
    config = read_config(run.path)
    table = level_rows(run.path, config)
    assert [row.name for row in table] == ["fast", "mid", "slow", "slow_critic"]
    assert table[2].moves[:2] == [16, 32] and table[3].copy
    assert schedule_tag(table) == "fast 1, mid 4, slow 16"
    (run.path / "levels.json").unlink()
    bare = level_rows(run.path, config)
    assert schedule_text(bare) == schedule_text(table) and bare[0].moves == []
    rows = [{"name": "a", "n": 2, "unit": "episode", "p": 0.5}]
    (run.path / "levels.json").write_text(json.dumps({"levels": rows}))
    [row] = level_rows(run.path, config)
    assert row.every == "every 2 episodes, p 0.5" and schedule_tag([row]) == "a 2 episodes"


def test_series_leave_out_what_is_not_finite():
    rows = [Row(1, 0, {"a": 1.0}), Row(2, 0, {"a": math.nan}), Row(3, 0, {"b": 1.0})]
    assert series(rows, "a") == ([1.0], [1.0])


def test_smoothing_is_a_running_median_of_the_past():
    assert smooth([1, 9, 2, 8, 3], reach=2) == [1, 9, 2, 8, 3]
    assert smooth([5, 5, 100, 5, 5], reach=2) == [5, 5, 5, 5, 5]


def test_equal_curves_are_one_under_both_names():
    lines = [Line("a", [1], [2.0], INK), Line("b", [1], [3.0], INK), Line("c", [1], [2.0], INK)]
    assert [line.name for line in merge_equal(lines)] == ["a = c", "b"]


def test_names_at_line_ends_keep_their_order_and_distance():
    heights = {0: 0.5, 1: 0.51, 2: 0.5, 3: 1.4, 4: -0.3}
    places = spread(heights, 0.1)
    ordered = sorted(places.values())
    assert all(b - a >= 0.1 - 1e-9 for a, b in pairwise(ordered))
    assert places[4] == ordered[0] >= 0 and places[3] == ordered[-1] <= 1
    assert sorted(places, key=lambda i: places[i]) == [4, 0, 2, 1, 3]


def test_means_and_durations_read_well():
    assert phase_means(([1, 2, 3], [1.0, 2.0, 3.0]), 2, 2) == 1.5
    assert phase_means(([5], [1.0]), 2, 2) is None
    assert [duration(s) for s in (5, 292, 7500)] == ["5 s", "4 min 52 s", "2 h 5 min"]
