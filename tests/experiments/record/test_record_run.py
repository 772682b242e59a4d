"""A run's folder: ids, states that survive kills, clear errors, the list of runs."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.record import Run, RunError, runs
from experiments.record.metrics import read
from experiments.record.run import last_score, read_config, write_json
from tests.experiments.record.synthetic import Config, make_run


def test_create_makes_a_folder_that_open_finds(tmp_path: Path):
    run = Run.create(Config(seed=3), tmp_path / "deep" / "runs")
    assert run.id.startswith("cartpole-shift-2") and run.id.endswith("-s3")
    assert run.path.parent == tmp_path / "deep" / "runs"
    again = Run.open(run.path)
    assert again.id == run.id and again.state == "created"
    assert read_config(run.path)["env"]["contexts"] == ["normal", "flipped", "normal"]


def test_ids_are_unique_within_a_second(tmp_path: Path):
    assert len({Run.create(Config(), tmp_path).id for _ in range(5)}) == 5


@pytest.mark.parametrize("name", ["../../x", "é/ü", "A b", "x" * 300, ""])
def test_a_name_never_leaves_the_root(tmp_path: Path, name: str):
    path = Run.create(Config(name=name), tmp_path).path
    assert path.resolve().parent == tmp_path.resolve()
    assert path.name.isascii() and len(path.name) < 100


def test_start_and_finish_record_state_process_and_versions(tmp_path: Path):
    run = Run.create(Config(), tmp_path)
    run.start()
    info = json.loads((run.path / "run.json").read_text())
    assert info["state"] == "running" and info["pid"] == os.getpid() and info["resumes"] == 0
    assert {"python", "torch", "numpy"} <= info["versions"].keys()
    run.log(5, {"loss/a": 1.0})
    run.finish("failed")
    assert Run.open(run.path).state == "failed"


def test_resuming_counts_and_goes_on_in_the_same_spool(tmp_path: Path):
    run = make_run(tmp_path, frames=1000)
    before = run.metrics.lines
    again = Run.open(run.path)
    again.start()
    again.log(1250, {"loss/a": 1.0})
    assert again.info["resumes"] == 1 and again.metrics.lines == before + 1
    again.finish()


def test_finish_refuses_a_state_that_is_no_end(tmp_path: Path):
    with pytest.raises(ValueError, match="'running'"):
        Run.create(Config(), tmp_path).finish("running")


CHILD = """
import sys, time
from pathlib import Path
from experiments.record import Run
run = Run.open(Path(sys.argv[1]))
run.start()
run.log(7, {"eval/default/return": 3.0})
print("up", flush=True)
time.sleep(60)
"""


def test_a_live_process_keeps_others_out_and_a_killed_one_leaves_the_run_stopped(tmp_path: Path):
    path = Run.create(Config(), tmp_path).path
    command = [sys.executable, "-c", CHILD, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None and child.stdout.readline() == "up\n"
        assert Run.open(path).state == "running"
        with pytest.raises(RunError, match=f"process {child.pid}"):
            Run.open(path).start()
        assert Run.open(path).info["resumes"] == 0
        child.send_signal(signal.SIGKILL)
    run = Run.open(path)
    assert run.state == "stopped"
    assert [(status.state, status.step, status.score) for status in runs(tmp_path)] == [
        ("stopped", 7, 3.0)
    ]
    run.start()
    assert run.state == "running" and run.info["resumes"] == 1
    run.finish()


def test_a_reused_process_number_is_not_the_run(tmp_path: Path):
    run = Run.create(Config(), tmp_path)
    run.start()
    write_json(run.path / "run.json", run.info | {"born": 1})
    assert Run.open(run.path).state == "stopped"
    run.finish()


def test_open_says_what_is_wrong(tmp_path: Path):
    with pytest.raises(RunError, match=r"no run at .*none"):
        Run.open(tmp_path / "none")
    with pytest.raises(RunError, match=r"run\.json is missing"):
        Run.open(tmp_path)
    for text, words in [("{", "cannot be read"), ("[]", "holds a list"), ("{}", "lacks")]:
        (tmp_path / "run.json").write_text(text)
        with pytest.raises(RunError, match=words):
            Run.open(tmp_path)


def test_runs_lists_oldest_first_and_shows_damage(tmp_path: Path):
    assert runs(tmp_path / "none") == []
    first = make_run(tmp_path, frames=2000)
    second = Run.create(Config(seed=1), tmp_path)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "run.json").write_text("{")
    listed = {status.id: status for status in runs(tmp_path)}
    assert [s.id for s in runs(tmp_path) if s.state != "corrupt"] == [first.id, second.id]
    assert listed["broken"].state == "corrupt"
    assert listed[first.id].state == "finished" and listed[first.id].step == 2000
    score = listed[first.id].score
    assert score is not None and 0 < score < 1
    assert listed[second.id].score is None and listed[second.id].age >= 0


def test_the_score_is_the_newest_evaluations_mean_over_contexts(tmp_path: Path):
    run = Run.create(Config(), tmp_path)
    run.log(1, {"eval/a/score": 0.0, "eval/a/return": 7.0})
    run.log(2, {"eval/a/score": 0.2, "eval/b/score": 0.4, "eval/a/return": 9.0})
    run.log(3, {"train/return": 100.0})
    assert last_score(read(run.metrics.path)) == pytest.approx(0.3)


def test_importing_the_package_loads_no_heavy_library():
    heavy = "{'torch', 'mlflow', 'matplotlib', 'numpy'}"
    code = f"import sys, experiments.record; print(sorted({heavy} & sys.modules.keys()))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"
