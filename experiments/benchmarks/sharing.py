"""Processes that share what a suite has to run: a lock on each task, workers, and who waits."""

import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TypeVar

PAUSE = 2.0  # seconds between looks at tasks that other processes run
K = TypeVar("K")
T = TypeVar("T")


@contextmanager
def claim(path: Path) -> Iterator[bool]:
    """Whether this process may run a task: a lock that ends with its process, however it ends."""
    file = path.parent / ".locks" / path.name
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = os.open(file, os.O_RDWR | os.O_CREAT)
    try:
        yield _taken(lock)
    finally:
        os.close(lock)


def _taken(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def shared(tasks: Mapping[K, Path], run: Callable[[K], T]) -> dict[K, T]:
    """What `run` gives for every task; two processes never run the same one, by its path, at once.

    A task that another process runs is waited for and then run here too, so `run` should find what
    is finished; should that process die, it goes on with it.
    """
    found: dict[K, T] = {}
    while len(found) < len(tasks):
        before = len(found)
        for task, path in tasks.items():
            if task not in found:
                with claim(path) as ours:
                    if ours:
                        found[task] = run(task)
        if len(found) == before:
            time.sleep(PAUSE)
    return {task: found[task] for task in tasks}


@contextmanager
def workers(
    module: str, argv: Sequence[str], count: int, logs: Path | None = None
) -> Iterator[list[subprocess.Popen]]:
    """So many processes of a suite, one thread each, that share what it runs and end with it.

    What they say is in `logs`, a file for each.
    """
    command = [sys.executable, "-m", module, *argv, "--worker"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    started: list[subprocess.Popen] = []
    try:
        for i in range(count):
            with (logs / f"worker-{i}.log").open("w") if logs else nullcontext() as log:
                started.append(subprocess.Popen(command, stdout=log, stderr=log, env=env))
        yield started
    finally:
        for process in started:
            process.terminate()
            process.wait()
