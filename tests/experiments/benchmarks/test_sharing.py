"""Tasks that processes share: none twice at once, those of others waited for, workers ended."""

import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from experiments.benchmarks import sharing

SUITE = """
import sys, time
from pathlib import Path
from experiments.benchmarks.sharing import claim
print(sys.argv[1:], flush=True)
with claim(Path("tasks/a")) as ours:
    Path("held").write_text(str(ours))
    time.sleep(60)
"""


def wait_for(path: Path, process: subprocess.Popen) -> None:
    """Until another process has written a file."""
    while not (path.exists() and path.read_text()):
        assert process.poll() is None
        time.sleep(0.02)


def test_a_task_of_another_process_is_left_to_it_until_it_ends(monkeypatch: pytest.MonkeyPatch):
    Path("suite.py").write_text(SUITE)
    monkeypatch.setenv("PYTHONPATH", ":".join(["", *sys.path]))
    tasks, ran = {name: Path("tasks") / name for name in "ab"}, []
    with sharing.workers("suite", ["--tier", "smoke"], 1, Path()) as started:
        wait_for(Path("held"), started[0])

        def paused(seconds: float) -> None:
            assert ran == ["b"]
            started[0].kill()
            started[0].wait()

        monkeypatch.setattr(sharing, "time", SimpleNamespace(sleep=paused))
        assert sharing.shared(tasks, lambda name: ran.append(name) or name) == {"a": "a", "b": "b"}
    assert ran == ["b", "a"]
    assert Path("worker-0.log").read_text() == "['--tier', 'smoke', '--worker']\n"


def test_workers_end_with_what_they_work_for(monkeypatch: pytest.MonkeyPatch):
    Path("suite.py").write_text(SUITE)
    monkeypatch.setenv("PYTHONPATH", ":".join(["", *sys.path]))
    with pytest.raises(KeyError), sharing.workers("suite", [], 2, Path()) as started:
        raise KeyError
    assert len(started) == 2
    assert all(process.poll() is not None for process in started)
