"""Agent streams as data: protocols, runs, scores between random and fresh, one from end to end."""

import json
from pathlib import Path

import numpy as np
import pytest

from experiments.benchmarks import cells, continual, results
from experiments.benchmarks.cells import Cell, Result
from experiments.benchmarks.tasks import agent_cells, agent_units, board, page
from experiments.benchmarks.tasks.agent_scores import RAW, result_of
from experiments.benchmarks.tasks.agent_streams import STREAMS
from experiments.benchmarks.tasks.summary import summarise
from experiments.config import Config
from experiments.envs import make_envs
from experiments.envs.build import cap_of
from experiments.envs.known import OWN
from experiments.record.metrics import Row

ATARI, GRID = "cl/Atari6-v0", "cl/MiniGrid3-v0"
TASKS = [name for name, stream in STREAMS.items() if stream.change == "tasks"]


def cell(stream: str, method: str, *seeds: int, **options: object) -> Cell:
    return Cell(stream, method, seeds or (0,), {**STREAMS[stream].fields, **options})


# ---- protocols ---------------------------------------------------------------------------------
@pytest.mark.parametrize("name", TASKS)
def test_a_stream_is_a_run_through_all_contexts_in_order(name: str):
    stream = STREAMS[name]
    assert stream.contexts == OWN[stream.env] and len(stream.contexts) == stream.fields["tasks"]
    config = agent_cells.one_run(cell(name, "plain"))
    assert config.env.id == stream.env
    assert config.env.contexts == stream.contexts * stream.fields.get("cycles", 1)
    assert config.evaluate.contexts == stream.contexts and config.evaluate.plasticity
    told = agent_cells.one_run(cell(name, "oracle"))
    assert told.env.kwargs == {**config.env.kwargs, "oracle": True}
    if stream.cap is not None and stream.env != "CartPoleShift-v0":
        assert cap_of(stream.env) == stream.cap


def test_the_protocol_of_continual_dreamer():
    config = agent_cells.one_run(cell(GRID, "plain"))
    assert config.frames == 3 * 750_000 and config.evaluate.every == 10_000
    assert (config.replay.kind, config.replay.capacity) == ("reservoir", 2_000_000)
    frames = config.replay.batch * config.replay.length
    assert frames == 16 * 50 and frames / config.train.ratio == 10  # an update every ten frames
    assert (1 - 1 / config.agent.discount, config.agent.entropy) == (0.99, 3e-3)
    hack = agent_cells.one_run(cell("cl/MiniHack4-v0", "plain"))
    assert hack.frames == 4_000_000 and hack.evaluate.every == 50_000
    assert (hack.replay.capacity, hack.agent.entropy) == (1_000_000, 2e-3)


def test_options_size_a_stream_down():
    config = agent_cells.one_run(
        cell(GRID, "k3", tasks=2, frames=800, every=400, prefill=64, slots=4, size="tiny", batch=2,
             length=8)
    )  # fmt: skip
    assert (config.frames, config.env.num, config.model.size) == (1600, 4, "tiny")
    assert (config.replay.batch, config.replay.length) == (2, 8)


def test_random_actions_are_played_where_fresh_is_a_reference(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(agent_cells, "check_env", lambda config: None)

    def methods(stream: str, names: str) -> list[str]:
        words = ["--tier", "published", "--streams", stream, "--methods", names]
        return [c.method for c in continual.cells_of(continual.parser().parse_args(words))]

    assert methods(ATARI, "plain,fresh") == ["random", "plain", "fresh"]
    assert methods(ATARI, "plain") == ["plain"]
    assert methods(GRID, "plain,fresh") == ["plain", "fresh"]  # its cap is known


def test_random_actions_in_every_context():
    config = agent_cells.one_run(cell("cl/CartPoleShift-v0", "plain"))
    names = ("normal", "flipped")
    found = agent_units.played([config, config], names, 200.0, lambda share: None)
    assert found.scores.shape == (2, 3, 2) and found.info["unit"] == RAW
    assert (found.scores == found.scores[:, :1]).all() and 0.05 < found.scores.mean() < 0.2
    envs = make_envs(config.env, 8, 0)
    means = agent_units.returns_in(envs, names, 16, np.random.default_rng(0))
    assert len(means) == 2 and means[0] != means[1]


# ---- what runs report --------------------------------------------------------------------------
def reported(config: Config, every: int) -> list[Row]:
    """Returns of 2, 3, 4 ... in all contexts; no episode ends while learning."""
    rows = []
    for i in range(config.frames // every + 1):
        if i:
            rows.append(Row(i * every, 0.0, {"train/reward": 0.5, "train/updates": float(i)}))
        found = {f"eval/{name}/return": 2.0 + i for name in config.evaluate.contexts}
        rows.append(Row(i * every, 0.0, found | {"plasticity/dormant": i / 100} if i else found))
    return rows


def test_returns_without_a_cap_stay_raw_and_symptoms_are_those_of_a_phase():
    config = agent_cells.one_run(cell(ATARI, "plain", tasks=2, frames=16_000, every=8000))
    part = agent_cells.part_of(reported(config, 8000), config, STREAMS[ATARI])
    assert part.course.shape == (1, 4, 3, 2), "two cycles through two games"
    assert part.course[0, 1, :, 0].tolist() == [4, 5, 6]
    assert part.online.tolist() == [[0.5 * 16_000 / 8] * 4], "what a slot has lived"
    assert part.symptoms["plasticity/dormant"].tolist() == [[0.02, 0.04, 0.06, 0.08]]


def test_a_second_cycle_is_what_comes_back():
    names = ["a", "b"]
    course = np.zeros((1, 4, 3, 2))
    course[0, 2:, :, :] = [[[0.1, 0.5]] * 3, [[0.3, 0.7]] * 3]
    info = {"contexts": names, "phases": names * 2}
    found = result_of(course, np.ones((1, 4)), 10, info)
    assert found.by_seed["again/kept"] == pytest.approx((0.1 + 0.7) / 2)
    assert found.by_seed["again/AP_final"] == pytest.approx((0.3 + 0.7) / 2)
    raw = result_of(course, np.ones((1, 4)), 10, {**info, "unit": RAW})
    assert "frames_to_learn" not in raw.by_task and "again/frames_to_learn" not in raw.by_seed


# ---- units -------------------------------------------------------------------------------------
COSTS = {"core_us_per_interaction": 1.0, "flops_per_interaction": 1.0, "core_seconds": 1.0,
         "bytes_per_interaction": 1.0, "levels": {}}  # fmt: skip


def learned(first: float, second: float) -> Result:
    """Two tasks: untrained 0 and 10, then these; the first is forgotten by half."""
    course = np.tile([0.0, 10.0], (1, 2, 2, 1))
    course[:, 0, 1] = [first, 10.0]
    course[:, 1] = [[first, 10.0], [first / 2, second]]
    info = {**COSTS, "contexts": ["a", "b"], "phases": ["a", "b"], "unit": RAW}
    symptoms = {"plasticity/dormant": np.array([[0.1, 0.2]])}
    return result_of(course, np.array([[first, second]]), 10, info, symptoms)


def suite(**found: Result) -> tuple[list[Cell], dict[str, Result]]:
    plan = [cell(ATARI, name, tasks=2) for name in found]
    return plan, dict(zip([each.key for each in plan], found.values(), strict=True))


def random() -> Result:
    means = np.array([[4.0, 8.0]])
    by_task = {name: means for name in ("online", "auc", "adapt")}
    info = {**COSTS, "contexts": ["a", "b"], "unit": RAW}
    return Result(np.repeat(means[:, None], 3, 1), by_task, {}, info)


def test_scores_lie_between_random_and_fresh_and_are_not_clipped():
    plan, found = suite(random=random(), plain=learned(54.0, 38.0), fresh=learned(104.0, 28.0))
    zero, plain, fresh = (agent_units.in_units(plan, found)[each.key] for each in plan)
    # a: 0 is 4, 1 is 104; b: 0 is 8, 1 is 28
    assert plain.scores[0] == pytest.approx(np.array([[-0.04, 0.1], [0.5, 0.1], [0.23, 1.5]]))
    assert np.diagonal(fresh.scores[0, 1:]).tolist() == [1.0, 1.0]
    assert (zero.scores == 0).all() and (zero.by_task["online"] == 0).all()
    assert plain.by_task["online"][0] == pytest.approx([0.5, 1.5])
    assert plain.by_task["auc"][0] == pytest.approx([(0.5 - 0.04) / 2, (0.1 + 1.5) / 2])
    assert plain.by_task["frames_to_learn"].tolist() == [[10, 10]]
    assert plain.by_task["plasticity/dormant"].tolist() == [[0.1, 0.2]]
    assert found[plan[1].key].info["unit"] == RAW, "cells stay as they are"


def test_without_a_reference_returns_are_raw_and_every_table_says_so(tmp_path: Path):
    plan, found = suite(random=random(), plain=learned(54.0, 38.0))
    assert agent_units.in_units(plan, found) == found
    lazy = suite(random=random(), plain=learned(54.0, 38.0), fresh=learned(4.0, 28.0))
    assert agent_units.in_units(*lazy) == lazy[1], "a fresh agent that learned nothing"
    summary = summarise(*lazy)
    assert f"scores: {RAW}" in board.table(summary)
    assert f"Scores: {RAW}." in results.page_of("command", *lazy, summary)
    measured = summary[ATARI]["methods"]["plain"]["metrics"]
    assert measured["plasticity/dormant"]["value"] == 0.2
    assert "forward_transfer/none" in measured and "forward_transfer/ref" not in measured
    by_name = {(each.stream, each.method): lazy[1][each.key] for each in lazy[0]}
    (path,) = page.draw(summary, by_name, tmp_path)
    assert path.stat().st_size > 10_000


# ---- from end to end ---------------------------------------------------------------------------
def test_images_from_end_to_end(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("minigrid")
    together = "agents that see images are trained one after another"
    monkeypatch.setattr(agent_cells, "train_together", lambda *_: pytest.fail(together))
    small = {"tasks": 2, "frames": 32, "every": 32, "episodes": 1, "prefill": 24, "slots": 2,
             "size": "tiny", "batch": 2, "length": 4, "ratio": 1}  # fmt: skip
    words = ["--streams", GRID, "--methods", "plain", *(f"{k}={v}" for k, v in small.items())]
    asked = ["--tier", "published", "--seeds", "1", *words, "--json", "--out", str(tmp_path)]
    assert continual.main(asked) == 0
    (summary,) = json.loads(capsys.readouterr().out).values()
    assert "unit" not in summary, "a share of the cap"
    (path,) = (tmp_path / "cells").glob("MiniGrid3*")
    found = cells.load(path)
    assert found.scores.shape == (1, 3, 2) and found.info["phases"] == ["doorkey", "lava"]
    assert found.by_task["plasticity/dormant"].shape == (1, 2)
    assert found.info["core_seconds"] > 0 and found.info["flops_per_interaction"] > 0
