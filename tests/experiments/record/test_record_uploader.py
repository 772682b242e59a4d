"""The uploader beside training: it never raises, gives up in time, and survives its server."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from experiments.record import Run, Uploader, pending, start_uploader, sync, tracking, uploader
from experiments.record.run import read_json
from tests.experiments.record.synthetic import Config, make_run


class FakeMirror:
    """Fails a number of times, then takes everything."""

    failing = 0
    log: list[str]  # set by each test

    def __init__(self, path: Path) -> None:
        self.state = {"uri": "fake", "run": "0"}

    def connect(self) -> None:
        self.log.append("connect")
        if FakeMirror.failing:
            FakeMirror.failing -= 1
            raise ConnectionError("nobody there")

    def push(self) -> int:
        self.log.append("push")
        return 0

    def close(self) -> None:
        self.log.append("close")


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    FakeMirror.log, FakeMirror.failing = [], 0
    monkeypatch.setattr(uploader, "Mirror", FakeMirror)
    monkeypatch.setattr(uploader.time, "sleep", lambda _: None)
    return FakeMirror.log


def endings(monkeypatch: pytest.MonkeyPatch, *answers: float | None) -> None:
    left = iter(answers)
    monkeypatch.setattr(uploader, "ended", lambda _: next(left))


def test_it_sends_while_training_lasts_and_closes_when_it_ends(
    log: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    endings(monkeypatch, None, None, 30.0)
    assert uploader.follow(make_run(tmp_path, frames=500).path)
    assert log == ["connect", "push", "push", "push", "close"]


def test_it_touches_no_server_before_there_is_something_to_send(
    log: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    endings(monkeypatch, None, None, 30.0)
    uploader.follow(Run.create(Config(), tmp_path).path)
    assert log == ["connect", "push", "close"]


def test_a_dead_server_is_tried_again_ever_less_often(log: list[str], tmp_path: Path):
    FakeMirror.failing = 3
    follower = uploader.Follower(tmp_path)
    pauses = [follower.pause()]
    for _ in range(4):
        follower.turn()
        pauses.append(follower.pause())
    assert pauses[:4] == sorted(pauses[:4]) and pauses[0] < pauses[3] <= uploader.LONGEST
    assert pauses[4] == pauses[0]


def test_it_gives_up_on_a_dead_server_once_training_is_over(
    log: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    FakeMirror.failing = 1000
    endings(monkeypatch, None, 30.0)
    assert not uploader.follow(make_run(tmp_path, frames=500).path)
    assert log.count("connect") == 1 + uploader.ATTEMPTS and "close" not in log


def test_an_uploader_that_cannot_start_costs_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    run = make_run(tmp_path, frames=500)
    monkeypatch.setattr(tracking.sys, "executable", "/nowhere/python")
    handle = start_uploader(run)
    left = handle.finish(1)
    assert left == pending(run.path) > 0
    words = capsys.readouterr().out.splitlines()
    assert "no MLflow uploader" in words[0]
    assert words[1] == f"{left} metrics still in {run.path / 'metrics.jsonl'}; " + (
        f"`nested sync {run.path}` uploads them"
    )


def test_finish_ends_an_uploader_that_does_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = make_run(tmp_path, frames=500)
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE)
    assert Uploader(run.path, process).finish(0.1) > 0
    assert process.returncode == -signal.SIGKILL
    assert "metrics still in" in capsys.readouterr().out


# ------------------------------------------------------------------ with real processes


def counted(run: Run) -> tuple[Counter[tuple[str, int]], str]:
    """(metric, step) counts and the status in the run's database."""
    from mlflow import MlflowClient

    state = read_json(run.path / "upload.json")
    client = MlflowClient(state["uri"])
    found = client.get_run(state["run"])
    histories = {key: client.get_metric_history(state["run"], key) for key in found.data.metrics}
    return Counter((k, m.step) for k, h in histories.items() for m in h), found.info.status


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_run_is_uploaded_beside_training(capsys: pytest.CaptureFixture[str]):
    run = Run.create(Config(), Path("runs"))
    run.start()
    handle = start_uploader(run)
    for step in range(100):
        run.log(step, {"loss/a": step, "loss/b": step})
        time.sleep(0.08)
    run.finish()
    assert handle.finish(60) == 0 and capsys.readouterr().out == ""
    counts, status = counted(run)
    assert len(counts) == sum(counts.values()) == 200 and status == "FINISHED"
    assert "mlflow" not in run.info


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_killed_uploader_is_made_good_by_sync(capsys: pytest.CaptureFixture[str]):
    run = Run.create(Config(), Path("runs"))
    run.start()
    handle = start_uploader(run)
    assert handle.process is not None
    for step in range(60):
        run.log(step, {"loss/a": step})
        time.sleep(0.1)
    handle.process.kill()
    for step in range(60, 80):
        run.log(step, {"loss/a": step})
    run.finish()
    assert handle.finish(5) >= 20
    sync(run.path)
    counts, status = counted(run)
    assert len(counts) == sum(counts.values()) == 80 and status == "FINISHED"


TRAINER = """
import os, sys, time
from pathlib import Path
from experiments.record import Run, start_uploader
run = Run.open(Path(sys.argv[1]))
run.start()
handle = start_uploader(run)
for step in range(40):
    run.log(step, {"loss/a": step})
print(handle.process.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_killed_trainer_leaves_a_complete_and_killed_run(tmp_path: Path):
    run = Run.create(Config(), Path("runs"))
    command = [sys.executable, "-c", TRAINER, str(run.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as trainer:
        assert trainer.stdout is not None
        pid = int(trainer.stdout.readline())
        trainer.kill()
    until = time.monotonic() + 90
    while Path(f"/proc/{pid}").exists() and time.monotonic() < until:
        time.sleep(0.2)
    counts, status = counted(run)
    assert len(counts) == sum(counts.values()) == 40 and status == "KILLED"


def serve(port: int) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--port", str(port)]
    settings = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    return subprocess.Popen(
        [*command, "--backend-store-uri", "sqlite:///server.db"],
        env=os.environ | settings,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def stop(server: "subprocess.Popen[bytes]") -> None:
    os.killpg(server.pid, signal.SIGKILL)
    server.wait()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_server_killed_and_restarted_gets_every_point_once(tmp_path: Path):
    port = 20_000 + os.getpid() % 20_000
    run = Run.create(Config(), Path("runs"))
    config = run.path / "config.yaml"
    config.write_text(config.read_text().replace("sqlite:///mlflow.db", f"http://127.0.0.1:{port}"))
    run.start()
    server = serve(port)
    handle = start_uploader(run)
    try:
        until = time.monotonic() + 120
        for step in range(10_000):  # until some have arrived
            run.log(step, {"loss/a": step})
            time.sleep(0.1)
            if pending(run.path) <= step or time.monotonic() > until:
                break
        stop(server)
        for more in range(step + 1, step + 100):
            run.log(more, {"loss/a": more})
            time.sleep(0.05)
        run.finish()
        assert handle.finish(20) > 0  # the server is dead: the rest stays in the spool
        server = serve(port)
        until = time.monotonic() + 120
        while pending(run.path) and time.monotonic() < until:
            try:
                sync(run.path)
            except tracking.RunError:
                time.sleep(1)
        counts, status = counted(run)
    finally:
        stop(server)
    assert len(counts) == sum(counts.values()) == step + 100 and status == "FINISHED"
