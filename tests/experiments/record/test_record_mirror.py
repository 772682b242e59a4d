"""The copy in MLflow: each (metric, step) exactly once, whatever dies, and what a reader sees."""

import math
import shutil
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from experiments.record import Run, RunError, opening, pending, sync
from experiments.record.metrics import Row, read
from experiments.record.mirror import clean, flatten, metric_name, unsent
from experiments.record.run import read_config, read_json
from experiments.record.tracking import uploading
from tests.experiments.record.synthetic import Config, make_run

if TYPE_CHECKING:  # its import costs more than most tests
    from mlflow import MlflowClient

pytestmark = pytest.mark.filterwarnings("ignore")  # mlflow's own


def connect(path: Path) -> "MlflowClient":
    from mlflow import MlflowClient

    return MlflowClient(f"sqlite:///{path.resolve()}")


@pytest.fixture(scope="session")
def migrated(request: pytest.FixtureRequest) -> Path:
    """An empty database; a new one takes mlflow seconds of migrations, so it is kept."""
    cache: Any = request.config.cache  # pyright: ignore[reportAttributeAccessIssue]
    path = cache.mkdir(f"mlflow-{version('mlflow')}") / "mlflow.db"
    if not path.exists():
        connect(path.with_name("new.db")).search_experiments()
        path.with_name("new.db").rename(path)
    return path


@pytest.fixture
def client(migrated: Path, tmp_path: Path) -> "MlflowClient":
    """Of the database that a run in this folder uses by default."""
    shutil.copy(migrated, tmp_path / "mlflow.db")
    return connect(tmp_path / "mlflow.db")


def points(client: "MlflowClient", run: Run) -> Counter[tuple[str, int]]:
    number = read_json(run.path / "upload.json")["run"]
    keys = client.get_run(number).data.metrics
    return Counter((key, m.step) for key in keys for m in client.get_metric_history(number, key))


def expected(run: Run) -> Counter[tuple[str, int]]:
    rows = read(run.path / "metrics.jsonl")
    return Counter((metric_name(key), row.step) for row in rows for key in row.metrics)


def test_a_run_arrives_whole(client: "MlflowClient", tmp_path: Path):
    run = make_run(Path("runs"), frames=3000)
    assert opening(run.path) == []
    (run.path / "report.png").write_bytes(b"png")
    assert pending(run.path) == sync(run.path) > 0
    assert points(client, run) == expected(run) and pending(run.path) == 0
    found = client.get_run(read_json(run.path / "upload.json")["run"])
    assert client.get_experiment(found.info.experiment_id).name == "cartpole-shift"
    assert found.info.status == "FINISHED"
    assert found.info.end_time == int(run.info["ended"] * 1000)
    assert found.data.params["env.id"] == "CartPoleShift-v0"
    assert found.data.params["timescales.levels.slow.every.n"] == "16"
    tags = found.data.tags
    assert tags["schedule"] == "fast 1, mid 4, slow 16" and tags["resumes"] == "0"
    assert "**slow** every 16 updates, 8.0% of the parameters" in tags["mlflow.note.content"]
    files = {file.path for file in client.list_artifacts(found.info.run_id)}
    assert files == {"config.yaml", "levels.json", "report.png"}
    assert opening(run.path)[0].endswith(f"sqlite:///{tmp_path / 'mlflow.db'}")
    assert len({key.split("/")[0] for key, _ in points(client, run)}) <= 8
    assert sync(run.path) == 0 and points(client, run) == expected(run)


def test_a_resumed_run_uploads_no_point_twice(client: "MlflowClient"):
    run = make_run(Path("runs"), frames=2000, state="stopped")
    sync(run.path)
    again = Run.open(run.path)
    again.start()
    again.metrics.truncate(3)
    for step in range(1000, 3001, 250):
        again.log(step, {"loss/state": float(step), "loss/new": 1.0})
    again.finish()
    sync(run.path)
    counts = points(client, run)
    assert max(counts.values()) == 1 and counts >= expected(run)
    found = client.get_run(read_json(run.path / "upload.json")["run"])
    assert found.data.tags["resumes"] == "1" and found.info.status == "FINISHED"


@pytest.mark.parametrize("applied", [False, True], ids=["lost request", "lost answer"])
@pytest.mark.parametrize("nth", [2, *(pytest.param(i, marks=pytest.mark.slow) for i in (1, 3))])
def test_a_batch_of_unknown_fate_is_settled(
    client: "MlflowClient", monkeypatch: pytest.MonkeyPatch, applied: bool, nth: int
):
    monkeypatch.setattr("experiments.record.mirror.BATCH", 60)
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    run, real, calls = make_run(Path("runs"), frames=2000), MlflowClient.log_batch, [0]

    def faulty(self: Any, run_id: str, **entries: Any) -> None:
        calls[0] += "metrics" in entries
        fails = calls[0] == nth and "metrics" in entries
        if applied or not fails:
            real(self, run_id, **entries)
        if fails:
            raise MlflowException("the server is gone")

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_batch", faulty)
        with pytest.raises(RunError, match="the server is gone; nothing is lost"):
            sync(run.path)
    assert pending(run.path) > 0
    # The same steps again, at another time of day: MLflow would keep both.
    spool = run.path / "metrics.jsonl"
    spool.write_text(spool.read_text().replace('"wall": 1', '"wall": 2'))
    sync(run.path)
    assert points(client, run) == expected(run)


@pytest.mark.slow
def test_an_uploader_that_died_before_its_first_note_leaves_one_run(client: "MlflowClient"):
    run = make_run(Path("runs"), frames=500)
    sync(run.path)
    (run.path / "upload.json").unlink()
    assert sync(run.path) == 0
    assert points(client, run) == expected(run)
    assert len(client.search_runs(["1"])) == 1


@pytest.mark.slow
def test_a_deleted_database_gets_everything_again(migrated: Path, client: "MlflowClient"):
    run = make_run(Path("runs"), frames=500)
    sync(run.path)
    fresh = Path("other.db").resolve()
    shutil.copy(migrated, fresh)
    assert sync(run.path, f"sqlite:///{fresh}") == sum(expected(run).values())
    assert points(connect(fresh), run) == expected(run)


def test_states_become_statuses_and_a_changed_config_a_tag(client: "MlflowClient"):
    run = make_run(Path("runs"), frames=500, state="running")

    def found() -> Any:
        sync(run.path)
        return client.get_run(read_json(run.path / "upload.json")["run"])

    assert found().info.status == "RUNNING"
    run.finish("stopped")
    assert found().info.status == "KILLED"
    config = run.path / "config.yaml"
    config.write_text(config.read_text().replace("num: 8", "num: 4"))
    run.start()
    assert found().info.status == "RUNNING"
    run.finish("failed")
    last = found()
    assert last.info.status == "FAILED" and last.data.params["env.num"] == "8"
    assert last.data.tags["config_change_1"] == '{"env.num": "8 -> 4"}'


@pytest.mark.slow
def test_values_that_charts_cannot_show_are_nan(client: "MlflowClient"):
    run = Run.create(Config(), Path("runs"))
    run.log(1, {"a/b": math.inf, "a/c": math.nan, "a/d[0]": 1.0})
    sync(run.path)
    number = read_json(run.path / "upload.json")["run"]
    values = {k: client.get_metric_history(number, k) for k in ("a/b", "a/c", "a/d_0_")}
    firsts = [history[0].value for history in values.values()]
    assert [math.isnan(value) for value in firsts] == [True, True, False]


def test_sync_names_the_trouble(client: "MlflowClient", tmp_path: Path):
    with pytest.raises(RunError, match="no run at"):
        sync(tmp_path / "none")
    run = make_run(Path("runs"), frames=500)
    with pytest.raises(RunError, match=r"MLflow at http://127.0.0.1:9 did not take"):
        sync(run.path, "http://127.0.0.1:9")
    with uploading(run.path), pytest.raises(RunError, match="an uploader is at work"):
        sync(run.path)


def test_unsent_takes_each_step_of_a_metric_once_and_in_order():
    rows = [Row(1, 0.5, {"a": 1.0}), Row(1, 0.6, {"a": 2.0, "b": 3.0}), Row(0, 0.7, {"a": 4.0})]
    assert [tuple(v) for v in unsent(rows, {})] == [("a", 1.0, 500, 1), ("b", 3.0, 600, 1)]
    assert [tuple(v) for v in unsent(rows, {"a": 0, "b": 1})] == [("a", 1.0, 500, 1)]


def test_parameters_are_dotted_and_bounded(tmp_path: Path):
    config = read_config(Run.create(Config(), tmp_path).path)
    params = dict(flatten(config))
    assert params["env.contexts"] == '["normal", "flipped", "normal"]'
    assert params["tracking.mlflow"] == "true" and "tracking.experiment" not in params
    assert dict(flatten({"a": "x" * 9000, "b" * 300: 1})) == {"a": "x" * 6000}


def test_names_are_ones_that_mlflow_takes():
    assert metric_name("levels/fast/updates") == "levels/fast.updates"
    assert clean("loss[0]/ü?") == "loss_0_/__" and len(clean("a" * 400)) == 250
