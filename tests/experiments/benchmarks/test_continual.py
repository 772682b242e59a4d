"""The continual-learning suite: cells that survive a kill, its tables, the command end to end."""

import csv
import hashlib
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from experiments.benchmarks import cells, continual, sharing
from experiments.benchmarks.cells import Cell, Result
from experiments.benchmarks.tasks import (
    agent_cells,
    agent_free,
    board,
    page,
    supervised,
    supervised_cells,
)
from experiments.benchmarks.tasks.summary import failures, normalised, summarise
from experiments.config import ConfigError

WORDS = ["--seeds", "2", "tasks=2", "samples=40", "hidden=6,6,6,6", "batch=8", "ewc_rows=16"]


def cell(method: str, stream: str = "cl/A-v0", **options: object) -> Cell:
    return Cell(stream, method, (4, 7), {"tasks": 2, **options})


def result(shift: float = 0.0, core: float = 1.0) -> Result:
    scores = np.array([[[0.1, 0.1], [0.8, 0.2], [0.5, 0.9]], [[0.1, 0.1], [0.6, 0.1], [0.4, 0.7]]])
    by_task = {
        "online": np.array([[0.5, 0.6], [0.4, 0.5]]) + shift,
        "auc": np.full((2, 2), 0.5) + shift,
    }
    levels = {"all": {"parameters": 3, "n": 1, "every": "every update", "flops": 12}}
    info = {"core_us_per_interaction": core, "flops_per_interaction": 12.0, "levels": levels}
    return Result(scores + shift, by_task, {"times": np.arange(3)}, info)


# ---- cells -------------------------------------------------------------------------------------
def test_a_cell_goes_to_disk_and_back(tmp_path: Path):
    cells.save(tmp_path / "one", cell("a"), result())
    found = cells.load(tmp_path / "one")
    assert np.array_equal(found.scores, result().scores)
    assert found.by_task.keys() == {"online", "auc"}
    assert np.array_equal(found.by_task["online"], result().by_task["online"])
    assert found.arrays["times"].tolist() == [0, 1, 2]
    assert found.info == result().info
    assert json.loads((tmp_path / "one/cell.json").read_text())["seeds"] == [4, 7]


def test_rows_are_long_and_count_tasks_from_one():
    rows = list(cells.rows(cell("a"), result()))
    assert all(len(row) == len(cells.COLUMNS) for row in rows)
    assert ("cl/A-v0", "a", 7, 2, 1, "score", 0.4) in rows
    assert ("cl/A-v0", "a", 4, 0, 2, "score", 0.1) in rows
    assert ("cl/A-v0", "a", 4, 2, 2, "online", 0.6) in rows
    (forgotten,) = [row for row in rows if row[2] == 4 and row[5] == "F"]
    assert forgotten[3:5] == ("", "")
    assert forgotten[6] == pytest.approx(0.3)
    assert sum(row[5] == "score" for row in rows) == 2 * 3 * 2


def test_a_killed_suite_goes_on_and_repeats_nothing(tmp_path: Path):
    plan, ran, heard = [cell(name) for name in "abc"], [], []

    def run(each: Cell, tell: cells.Tell) -> Result:
        ran.append(each.method)
        tell(0.5)
        if each.method == "b" and ran.count("b") == 1:
            raise KeyboardInterrupt
        return result()

    families = {"cl/A-v0": cells.Family({}, {}, lambda cell: None, run)}
    with pytest.raises(KeyboardInterrupt):
        cells.run_cells(plan, families, tmp_path)
    # a process that was killed while it wrote leaves half a folder, which counts for nothing
    (tmp_path / f".{plan[1].key}.99").mkdir()
    found = cells.run_cells(plan, families, tmp_path, lambda *told: heard.append(told))
    assert ran == ["a", "b", "b", "c"]
    assert list(found) == [each.key for each in plan]
    assert [told[1] for told in heard if told[0].method == "a"] == [1.0]  # only found
    assert [told[1] for told in heard if told[0].method == "b"] == [0.0, 0.5, 1.0]
    cells.run_cells([*plan, cell("a", lr=0.2)], families, tmp_path)
    assert ran == ["a", "b", "b", "c", "a"]  # another option is another cell


def test_processes_share_the_cells_and_wait_for_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    plan, ran = [cell(name) for name in "abc"], []

    def run(each: Cell, tell: cells.Tell) -> Result:
        ran.append(each.method)
        return result()._replace(by_seed={"again/savings": np.array([0.1, 0.2])})

    families = {"cl/A-v0": cells.Family({}, {}, lambda cell: None, run)}
    with sharing.claim(tmp_path / plan[0].key) as ours:  # as another process would
        assert ours
        with sharing.claim(tmp_path / plan[0].key) as theirs:
            assert not theirs

        def paused(seconds: float) -> None:
            assert ran == ["b", "c"]
            cells.save(tmp_path / plan[0].key, plan[0], result(0.1))

        monkeypatch.setattr(cells, "time", SimpleNamespace(sleep=paused))
        found = cells.run_cells(plan, families, tmp_path)
    assert list(found) == [each.key for each in plan]
    assert np.array_equal(found[plan[0].key].scores, result(0.1).scores)
    assert found[plan[1].key].by_seed["again/savings"].tolist() == [0.1, 0.2]
    assert found[plan[1].key].info["commit"] == cells.revision()
    assert cells.there([*plan, cell("d")], tmp_path).keys() == found.keys()
    assert any(row[5:] == ("again/savings", 0.2) for row in cells.rows(plan[1], found[plan[1].key]))


def test_a_result_that_cannot_be_written_leaves_nothing(tmp_path: Path):
    with pytest.raises(TypeError):
        cells.save(tmp_path / "one", cell("a"), result()._replace(info={"x": object()}))
    assert list(tmp_path.iterdir()) == []


def test_all_cells_in_one_table(tmp_path: Path):
    plan = [cell("a"), cell("b", "cl/B-v1")]
    cells.collect(plan, {each.key: result() for each in plan}, tmp_path)
    with (tmp_path / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {(row["stream"], row["method"]) for row in rows} == {("cl/A-v0", "a"), ("cl/B-v1", "b")}
    assert tuple(rows[0]) == cells.COLUMNS
    with np.load(tmp_path / "R.npz") as stored:
        assert np.array_equal(stored["cl/B-v1/b"], result().scores)


# ---- what came out -----------------------------------------------------------------------------
def test_the_summary_is_paired_and_has_its_reference():
    plan = [cell(name) for name in ("plain", "k3", "k3_rates", "fresh")]
    shifts = dict(zip((each.key for each in plan), (0.0, 0.1, 0.05, -0.1), strict=True))
    summary = summarise(plan, {key: result(s) for key, s in shifts.items()})["cl/A-v0"]
    assert summary["seeds"] == [4, 7]
    pairs = summary["pairs"]
    assert list(pairs) == ["k3 - plain", "k3_rates - plain", "fresh - plain", "k3 - k3_rates"]
    gain = pairs["k3 - plain"]["AP_final"]
    assert gain == pytest.approx({"value": 0.1, "low": 0.1, "high": 0.1})
    plain = summary["methods"]["plain"]["metrics"]
    assert plain["AP_final"]["value"] == pytest.approx(0.625)
    assert plain["IQM_final"]["value"] == pytest.approx((0.5 + 0.7) / 2)
    # fresh agents have an area of 0.4, plain 0.5
    assert plain["forward_transfer/ref"]["value"] == pytest.approx(0.1 / 0.6)
    assert plain["forward_transfer/kessler"]["value"] == pytest.approx(0.1 / 0.5)
    assert plain["fresh_gap"]["value"] == pytest.approx(-0.1)
    # online means of fresh agents by task 0.35 and 0.45, of plain's seeds 0.5 0.6 and 0.4 0.5
    assert plain["dynamic_regret"]["value"] == pytest.approx(-0.2)
    assert plain["ALA/normalised"]["value"] == pytest.approx((0.7 / 0.6 + 0.8 / 0.7) / 2)
    alone = summarise(plan[:1], {plan[0].key: result()})["cl/A-v0"]
    assert "fresh_gap" not in alone["methods"]["plain"]["metrics"]


def test_text_and_page_say_what_the_summary_holds(tmp_path: Path):
    plan = [cell(name) for name in ("plain", "k3")]
    results = {each.key: result(0.01 * i) for i, each in enumerate(plan)}
    summary = summarise(plan, results)
    text = board.table(summary)
    assert "cl/A-v0, 2 seeds" in text
    (line,) = [line for line in text.splitlines() if line.startswith("k3 - plain")]
    assert "+0.010 [+0.010,+0.010]" in line
    assert board.interval({"value": 0.5, "low": 0.25, "high": 0.75}) == "0.500 [0.250,0.750]"
    assert board.interval({"value": -5.0, "low": -12.5, "high": 9.0}, True) == "-5.0 [-12.5,+9.0]"
    assert board.interval({"value": 1087.4, "low": 900.0, "high": 1200.0}) == "1087 [900,1200]"
    by_name = {(each.stream, each.method): results[each.key] for each in plan}
    (path,) = page.draw(summary, by_name, tmp_path)
    assert path.name == "continual-A-v0.png"
    assert path.read_bytes().startswith(b"\x89PNG")


def test_gates():
    stream = "cl/PermutedDigits-v0"
    plan = [cell("plain", stream), cell("ewc", stream)]  # plain's ALA is 0.75, its F 0.25
    better = result()._replace(scores=result().scores + np.array([[0, 0], [0, 0], [0.2, 0]]))
    summary = summarise(plan, {plan[0].key: result(), plan[1].key: better})
    gates = [
        (stream, "plain", "ALA", 0.6), (stream, "ewc - plain", "-F", 0.0),
        (stream, "ewc - plain", "AP_final", 0.0), (stream, "unknown", "ALA", 2.0),
        ("cl/Nothing-v0", "plain", "ALA", 2.0),
    ]  # fmt: skip
    assert failures(gates, summary) == []
    (text,) = failures([(stream, "plain", "ALA", 0.8)], summary)
    assert text == f"{stream} plain: ALA 0.750 is not above 0.8"
    (text,) = failures([(stream, "ewc - plain", "F", 0.0)], summary)
    assert text == f"{stream} ewc - plain: F -0.200 is not above 0.0"


def test_normalised_scores_are_in_units_of_a_fresh_agent():
    # untrained 0.1 and 0.1; fresh agents learn 0.7 of task 1 and 0.8 of task 2
    found = normalised(result(0.3), result())
    assert found is not None
    assert found[0, 2] == pytest.approx([(0.8 - 0.1) / 0.6, (1.2 - 0.1) / 0.7])
    lazy = result()._replace(scores=np.full((2, 3, 2), 0.1))
    assert normalised(result(), lazy) is None


# ---- the command -------------------------------------------------------------------------------
def test_the_command_from_end_to_end(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    words = ["--streams", "cl/PermutedDigits-v0", "--methods", "plain,k3,fresh", *WORDS]
    assert continual.main([*words, "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr()
    assert "k3 - plain" in shown.out
    assert shown.err.count("AP_final") == 3  # a plain line for each cell
    first = json.loads((tmp_path / "summary.json").read_text())
    methods = first["cl/PermutedDigits-v0"]["methods"]
    assert list(methods["k3"]["cost"]["levels"]) == ["fast", "mid", "slow"]
    assert methods["fresh"]["metrics"]["fresh_gap"]["value"] == 0.0
    assert (tmp_path / "continual-PermutedDigits-v0.png").stat().st_size > 10_000
    # the curves of a cell are its scores
    (path,) = (tmp_path / "cells").glob("PermutedDigits-v0--plain--*")
    found = cells.load(path)
    assert found.scores.shape == (2, 3, 2)
    learned = np.diagonal(found.scores[:, 1:], axis1=1, axis2=2)
    assert np.array_equal(learned, found.arrays["curves"][..., -1])
    # again: everything is found
    assert continual.main([*words, "--json", "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr()
    assert shown.err.count("found") == 3
    assert json.loads(shown.out) == first


def test_a_slow_stream_from_end_to_end(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    words = ["--streams", "cl/SlowRegression-v0", "--seeds", "2", "tasks=2", "samples=20"]
    assert continual.main([*words, "--json", "--out", str(tmp_path)]) == 0
    (found,) = json.loads(capsys.readouterr().out).values()
    assert set(found["methods"]) == {"plain", "k2", "fresh"}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--methods", "plain,k33"], "did you mean k3"),
        (["--streams", "cl/Nothing-v0"], "choose from cl/PermutedDigits-v0"),
        (["--seeds", "0"], "give 1 or more"),
        (["lrr=1"], "did you mean lr"),
        (["tasks=many"], "is no int"),
        (["rule=muon"], "one of: sgd, adamw"),
        (["samples=10"], "at least 80"),
        (["tasks=1"], "at least 2 tasks"),
        (["--streams", "cl/SlowRegression-v0", "--methods", "k3"], "learned by 2 layers"),
    ],
)
def test_mistakes_name_the_way_out(words: list[str], expected: str):
    with pytest.raises(ConfigError) as found:
        continual.main(words)
    assert expected in str(found.value)


def test_every_field_of_the_settings_can_be_changed():
    words = ["hidden=4,4,4,4", "lr=1e-3", "tasks=3", "batch=4", "--seeds", "3"]
    deep, *_, shallow = continual.cells_of(continual.parser().parse_intermixed_args(words))
    assert (deep.seeds, shallow.seeds) == ((0, 1, 2), (0, 1, 2))
    found = [deep.options[name] for name in ("hidden", "lr", "tasks", "batch", "samples")]
    assert found == [[4, 4, 4, 4], 1e-3, 3, 4, 1500]
    assert set(deep.options) == {"tasks", "samples", *supervised.Settings._fields}
    assert shallow.options["redo_every"] == 500  # the tier's own, where nothing was changed


@pytest.mark.parametrize("tier", continual.TIERS)
def test_every_cell_of_a_tier_can_run(tier: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(supervised_cells, "check_stream", lambda name: None)  # data apart
    for module in (agent_cells, agent_free):  # packages apart
        monkeypatch.setattr(module, "check_env", lambda config: None)
    plan = continual.cells_of(continual.parser().parse_args(["--tier", tier]))
    assert len({each.key for each in plan}) == len(plan) > 5
    there = {(each.stream, each.method) for each in plan}
    for stream, name, metric, _ in continual.TIERS[tier].gates:
        assert {(stream, method) for method in name.split(" - ")} <= there
        assert metric.removeprefix("-") in ("ALA", "F", "online")


PUBLISHED = {  # digests of the keys of cells in docs/RESULTS.md: they must be found again
    "smoke": "ff47023149e55126", "laptop": "3c8649e035d3f3ab", "table": "9a46a82459150806",
}  # fmt: skip


@pytest.mark.parametrize("tier", PUBLISHED)
def test_published_cells_keep_their_keys(tier: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(supervised_cells, "check_stream", lambda name: None)
    plan = continual.cells_of(continual.parser().parse_args(["--tier", tier]))
    keys = "\n".join(each.key for each in plan)
    assert hashlib.sha256(keys.encode()).hexdigest()[:16] == PUBLISHED[tier]


def test_fields_of_single_methods_are_options_of_their_cells_alone():
    words = ["--tier", "overnight", "--streams", continual.STREAM, "--methods", "plain,ewc"]
    plain, ewc = continual.cells_of(continual.parser().parse_args([*words, "gamma=0.5"]))
    assert "gamma" not in plain.options and ewc.options["gamma"] == 0.5
    assert set(ewc.options) - set(plain.options) == {"ewc", "anchor_every", "gamma"}


def test_two_processes_and_a_page_of_what_is_there(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    streams = ["--streams", "cl/SlowRegression-v0", "tasks=2", "samples=20"]
    words = [*streams, "--seeds", "2", "--out", str(tmp_path / "out")]
    page = tmp_path / "RESULTS.md"
    assert continual.main([*words, "--found"]) == 1
    assert "none of 3 cells" in capsys.readouterr().err
    assert continual.main([*words, "--methods", "plain", "--jobs", "2"]) == 0
    assert continual.main([*words, "--found", "--results", str(page)]) == 0
    shown = capsys.readouterr()
    assert "missing  cl/SlowRegression-v0 k2" in shown.err
    text = page.read_text()
    assert "**Not run yet:** k2, fresh." in text and "1 of 3 cells" in text
    command = f"`nested bench continual --tier smoke {streams[0]} {streams[1]} --seeds 2 tasks=2"
    assert f"{command} samples=20 --jobs 2 --results {page}`" in text


def test_a_cell_that_two_processes_ran_is_kept_once(tmp_path: Path):
    cells.save(tmp_path / "one", cell("a"), result())
    cells.save(tmp_path / "one", cell("a"), result(0.5))
    assert np.array_equal(cells.load(tmp_path / "one").scores, result().scores)
    assert len(list(tmp_path.iterdir())) == 1
