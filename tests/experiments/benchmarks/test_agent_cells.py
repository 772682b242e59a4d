"""An agent's cells: methods as configurations, R from a run's own evaluations, costs by level."""

import json
from pathlib import Path

import numpy as np
import pytest

from experiments.benchmarks import cells, continual
from experiments.benchmarks.cells import Cell, Result
from experiments.benchmarks.continual import STREAM
from experiments.benchmarks.tasks import agent_cells, agent_scores, page
from experiments.benchmarks.tasks.agent_costs import Clock
from experiments.benchmarks.tasks.agent_methods import AGENT_METHODS, FAST, FIELDS
from experiments.benchmarks.tasks.agent_streams import STREAMS
from experiments.config import Config, ConfigError, levels_of, load_config
from experiments.envs.known import check_env
from experiments.evaluate import contexts_of
from experiments.record.metrics import Metrics, Row

NAMES = ("normal", "flipped", "long", "heavy")
TINY = {"tasks": 2, "frames": 160, "every": 160, "episodes": 1, "prefill": 128}


def cell(method: str, *seeds: int, **options: object) -> Cell:
    return Cell(STREAM, method, seeds or (0,), {**FIELDS, **options})


def run_of(method: str, **options: object) -> Config:
    return agent_cells.one_run(cell(method, **options))


# ---- methods -----------------------------------------------------------------------------------
@pytest.mark.parametrize("method", AGENT_METHODS)
def test_every_method_is_a_run_that_can_start(method: str):
    agent_cells.check(cell(method))
    config = run_of(method)
    assert config.evaluate.contexts == NAMES
    assert config.env.contexts == (NAMES[:1] if method == "fresh" else NAMES)
    assert config.frames == 10_000 * len(config.env.contexts)
    assert (config.replay.capacity, config.replay.length, config.train.ratio) == (4096, 16, 40)


def rates(config: Config) -> dict[str, tuple[int, float]]:
    """Period and learning rate of each level that descends."""
    levels = {name: level.model_dump() for name, level in levels_of(config).items()}
    return {
        name: (level["every"]["n"], level["flow"]["rule"]["lr"])
        for name, level in levels.items()
        if level["flow"]["kind"] == "descend"
    }


def test_controls_travel_as_far_as_what_they_control():
    k3, scaled = (rates(run_of(name, base=4, lr=1e-3)) for name in ("k3", "k3_rates"))
    assert [n for n, _ in k3.values()] == [1, 4, 16]
    assert scaled == {name: (1, pytest.approx(lr / n)) for name, (n, lr) in k3.items()}
    k5, scaled = (rates(run_of(name, base=2, lr=1e-3)) for name in ("k5", "k3_rates"))
    assert [n for n, _ in k5.values()] == [1, 2, 4, 8, 16] and len(scaled) == 3
    assert rates(run_of("accumulate", base=4, lr=1e-3)) == {"all": (4, 2e-3)}
    assert rates(run_of("plain", lr=1e-3)) == {"all": (1, 1e-3)}


def test_other_methods_change_what_their_name_says():
    kinds = {name: run_of(name).replay.kind for name in ("plain", "reservoir", "mixed", "k3")}
    assert kinds == {"plain": "fifo", "reservoir": "reservoir", "mixed": "mixed", "k3": "fifo"}
    kinds = {name: run_of(name, replay="mixed").replay.kind for name in ("plain", "fifo", "k3")}
    assert kinds == {"plain": "mixed", "fifo": "fifo", "k3": "mixed"}
    assert run_of("oracle").env.kwargs == {"oracle": True}
    memories = {name: run_of(name).model.memory.kind for name in ("plain_fast", "k3_fast", "k3")}
    assert memories == {"plain_fast": "gated_delta", "k3_fast": "gated_delta", "k3": "none"}
    for name in FAST:
        assert rates(run_of(f"{name}_fast")) == rates(run_of(name))
    (level,) = levels_of(run_of("l2_init", lr=1e-3, l2_init=0.5)).values()
    assert (level.relax[0].to, level.relax[0].rate) == ("init", 5e-4)
    held = levels_of(run_of("ewc", ewc=8.0, gamma=0.75, anchor_every=9, lr=1e-3))
    assert held["anchored"].model_dump()["relax"][0]["rate"] == {"by": "fisher", "times": 0.032}
    assert [held[name].every.n for name in held] == [1, 1, 9, 9]
    pair = run_of("matching", rollout=48, replay="fifo").replay
    assert (pair.kind, pair.model_dump()["rollout"]) == ("matching", 48)
    hare, tortoise = levels_of(run_of("hare_tortoise", average=0.1, return_every=7)).values()
    assert hare.reset[0].every.n == 7
    assert tortoise.model_dump()["flow"]["rate"] == 0.1


def test_fresh_is_a_new_agent_for_each_context():
    lists = agent_cells.runs_of(cell("fresh", 3, 5, tasks=3), "runs")
    assert [config.env.contexts for config, _ in lists] == [(name,) for name in NAMES[:3]]
    assert [config.seed for config in lists[1]] == [3, 5]
    assert {config.evaluate.contexts for configs in lists for config in configs} == {NAMES[:3]}


def test_evaluation_may_leave_the_phases():
    assert contexts_of(run_of("fresh")) == list(NAMES)
    assert contexts_of(load_config("default")) == ["normal", "flipped"]
    with pytest.raises(ConfigError, match="did you mean heavy") as caught:
        check_env(load_config("plain", ["evaluate.contexts=[normal,heavi]"]))
    assert caught.value.field == "evaluate.contexts.1"


def test_each_half_of_a_mixed_replay_holds_every_slot():
    words = ["replay.kind=mixed", "replay.batch=8", "replay.length=16", "replay.capacity=255"]
    with pytest.raises(ConfigError, match="in each of its halves\nuse at least 256"):
        load_config("plain", words)
    load_config("plain", [*words[:-1], "replay.capacity=256"])


@pytest.mark.parametrize(
    ("field", "value", "way_out"),
    [("tasks", 5, "2 to 4"), ("again", "mars", "one of normal"), ("every", 999, "a divisor"),
     ("every", 4, "multiple of 8"),
     ("prefill", 10, "at least 128"), ("capacity", 100, "at least")],
)  # fmt: skip
def test_cells_that_cannot_run(field: str, value: int, way_out: str):
    with pytest.raises(ConfigError, match=way_out):
        agent_cells.check(cell("plain", **{field: value}))


# ---- what the runs reported --------------------------------------------------------------------
def reported(config: Config, scores: np.ndarray) -> list[Row]:
    """A run's metrics: scores (T+1, N) in turn, and two episodes for each evaluation."""
    rows = []
    for i, row in enumerate(scores):
        step = i * config.evaluate.every
        if i:
            ended = {"train/return": 20.0 * i, "train/episodes": float(i), "train/updates": 3.0 * i}
            rows.append(Row(step, 0.0, ended))
        found = {f"eval/{name}/return": 200 * v for name, v in zip(NAMES, row, strict=False)}
        rows.append(Row(step, 0.0, found))
    return rows


def test_scores_come_from_the_last_three_evaluations_of_a_phase():
    config = run_of("plain", tasks=2, frames=4000)
    scores = np.arange(18.0).reshape(9, 2)  # row t holds 2t and 2t + 1
    part = agent_cells.part_of(reported(config, scores), config, STREAMS[STREAM])
    assert part.course.shape == (1, 2, 5, 2)
    assert np.array_equal(part.course[0, 1], scores[4:]), "a phase starts where the last one ended"
    assert part.updates == 24
    expected = [[0, 1], [6, 7], [14, 15]]  # untrained; mean of rows 2, 3, 4; of rows 6, 7, 8
    assert agent_scores.scores_of(part.course)[0].tolist() == expected
    assert agent_scores.own(part.course)[0].tolist() == [[0, 2, 4, 6, 8], [9, 11, 13, 15, 17]]
    # episodes 1, 2, 3, 4 of returns 20, 40, 60, 80, and so on
    means = [sum(20 * i * i for i in phase) / sum(phase) for phase in ((1, 2, 3, 4), (5, 6, 7, 8))]
    assert part.online[0] == pytest.approx(np.array(means) / 200)


def test_a_context_that_comes_back_is_no_task_but_is_measured():
    course = np.zeros((2, 3, 4, 2))  # normal, flipped, normal again; three evaluations each
    course[:, 0, 1:, 0] = [0.4, 0.6, 0.8]
    course[:, 2, :, 0] = [[0.2, 0.9, 0.9, 0.9], [0.0, 0.0, 0.4, 0.4]]
    info = {"contexts": ["normal", "flipped"], "phases": ["normal", "flipped", "normal"]}
    found = agent_scores.result_of(course, np.ones((2, 3)), 100, info)
    assert found.scores.shape == (2, 3, 2) and found.by_task["online"].shape == (2, 2)
    assert found.by_task["frames_to_learn"].tolist() == [[300, 300]] * 2
    first = (0.2 + 0.5 + 0.7) / 3
    again = np.array([(0.55 + 0.9 + 0.9) / 3, (0.0 + 0.2 + 0.4) / 3])
    assert found.by_seed["again/auc"] == pytest.approx(again)
    assert found.by_seed["again/savings"] == pytest.approx(again - first)
    assert found.by_seed["again/kept"].tolist() == [0.2, 0.0]
    assert found.by_seed["again/frames_to_learn"].tolist() == [100, 300]
    runs = agent_cells.runs_of(cell("plain", tasks=3, again="flipped"), "runs")
    assert runs[0][0].env.contexts == ("normal", "flipped", "long", "flipped")
    assert runs[0][0].evaluate.contexts == NAMES[:3]
    fresh = agent_cells.runs_of(cell("fresh", tasks=2, again="flipped"), "runs")
    assert [configs[0].env.contexts for configs in fresh] == [("normal",), ("flipped",)]


def test_where_no_episode_ends_all_slots_lived():
    config = run_of("plain", tasks=2, frames=160, every=160, prefill=128)
    assert agent_cells.online_of([], 80, config, STREAMS[STREAM]) == 80 / 8 / 200
    assert agent_cells.online_of([], 10_000, config, STREAMS[STREAM]) == 1.0


def test_the_clock_tells_shares_over_lists_of_runs():
    told: list[float] = []
    clock, config = Clock(told.append, 320), run_of("fresh", **TINY)
    for _ in range(2):
        with clock.watch(Path(), config) as watch:
            watch.show(80, {"loss/dyn": 1.0})
            seconds = clock.seconds
            sum(range(100_000))
            watch.show(80, {"eval/normal/score": 1.0})
            assert clock.seconds == seconds, "evaluation is not learning"
            watch.show(160, {"loss/dyn": 1.0})
            assert clock.seconds > seconds
    assert told == [0.25, 0.25, 0.5, 0.75, 0.75, 1.0]


def test_fresh_agents_stand_one_after_another(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def trained(configs: list[Config], watch: object) -> list[Path]:
        paths = [tmp_path / f"{config.env.contexts[0]}-{config.seed}" for config in configs]
        for path, config in zip(paths, configs, strict=True):
            path.mkdir()
            base = 0.1 * NAMES.index(config.env.contexts[0]) + 0.01 * config.seed
            for row in reported(config, base + np.array([[0.0, 0.001], [0.5, 0.501]])):
                Metrics(path / "metrics.jsonl").write(row.step, row.metrics)
        return paths

    monkeypatch.setattr(agent_cells, "train_together", trained)
    monkeypatch.setattr(agent_cells, "costs", lambda config, updates: {"given": updates})
    found = agent_cells.run(cell("fresh", 3, 4, **TINY), lambda share: None)
    assert found.scores[0] == pytest.approx(np.array([[0.03, 0.031], [0.53, 0.531], [0.63, 0.631]]))
    assert found.scores[1] == pytest.approx(found.scores[0] + 0.01)
    assert found.by_task["auc"][0] == pytest.approx([0.28, 0.381])
    assert found.by_task["adapt"][0] == pytest.approx([0.53, 0.631])
    assert found.info["given"] == found.info["updates_per_interaction"] == 3 * 2 / 320
    assert found.info["contexts"] == ["normal", "flipped"]


# ---- from end to end ---------------------------------------------------------------------------
def test_two_seeds_from_end_to_end(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    words = ["--streams", STREAM, "--methods", "k3", *(f"{k}={v}" for k, v in TINY.items())]
    assert continual.main([*words, "--out", str(tmp_path), "--json"]) == 0
    (summary,) = json.loads(capsys.readouterr().out).values()
    assert summary["seeds"] == [0, 1]
    cost = summary["methods"]["k3"]["cost"]
    assert 0 < cost["core_seconds"] < cost["core_seconds_with_evaluation"]
    levels = cost["levels"]
    # LaProp keeps two moments; 4 bytes each: gradients 2 - 1/n, then (3 + 2 * 2) / n
    travel = [level["bytes"] / level["parameters"] / 4 for level in levels.values()]
    updates = cost["updates_per_interaction"]
    expected = [updates * (2 - 1 / n + 7 / n) for n in (1, 2, 4)]
    assert travel == pytest.approx(expected, rel=2e-3)  # and counts of steps
    assert sum(level["bytes"] for level in levels.values()) == cost["bytes_per_interaction"]
    assert [level["n"] for level in levels.values()] == [1, 2, 4]
    assert sum(level["parameters"] for level in levels.values()) == 200_645
    # who moves seldom pays its gradients all the same, and no two pay for one product
    backward = [level["flops"] for level in levels.values()]
    assert min(backward) > 0
    assert sum(backward) < cost["flops_per_interaction"]
    (path,) = (tmp_path / "cells").glob("CartPole*")
    found = cells.load(path)
    assert found.scores.shape == (2, 3, 2)
    assert found.arrays["course"].shape == (2, 2, 2, 2)
    assert np.array_equal(found.scores[:, 1:], found.arrays["course"][:, :, -1])
    assert (tmp_path / "continual-CartPoleShift-v0.png").stat().st_size > 10_000


def test_a_panel_shows_every_context_in_every_phase():
    from matplotlib.figure import Figure

    course = np.random.default_rng(0).random((3, 2, 4, 2))
    result = Result(
        agent_scores.scores_of(course), {}, {"course": course, "frames": np.arange(4) * 80},
        {"contexts": ["normal", "flipped"], "phases": ["normal", "flipped"]},
    )  # fmt: skip
    axes = Figure().subplots()
    page._course(axes, result)
    assert [text.get_text() for text in axes.texts] == ["normal", "flipped"]
    lines = [np.asarray(line.get_ydata()) for line in axes.lines]
    expected = [course[:, phase, :, i].mean(0) for i in range(2) for phase in range(2)]
    assert all(np.array_equal(*pair) for pair in zip(lines, expected, strict=True))
    assert axes.get_xlim() == (0, 480)
