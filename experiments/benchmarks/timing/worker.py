"""A process of its own for each measured thing, so that peak memory is that thing's alone.

The child builds its subject, says hello with one JSON line, and then answers each line
`QUESTION COUNT` on its standard input with one JSON line. Between questions it sleeps, so several
children can be asked in turn: paired rounds. Neither side imports torch here.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

TAIL = 8  # lines of a dead child's errors that are shown


class WorkerError(Exception):
    """A child that ended before it answered, with the end of what it said."""


class Worker:
    """The parent's side. `with Worker(...) as worker: worker.ask("time", 5)`."""

    def __init__(self, name: str, command: Sequence[str], threads: int) -> None:
        self.name = name
        self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        counts = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
        self._process = subprocess.Popen(
            [*command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={**os.environ, **counts},
        )
        self._hello: dict[str, Any] | None = None

    @property
    def ended(self) -> bool:
        """Whether the process is gone."""
        return self._process.poll() is not None

    def hello(self) -> dict[str, Any]:
        """What the child says of itself; waits until it is ready. Raises WorkerError."""
        if self._hello is None:
            self._hello = self._answer()
        return self._hello

    def ask(self, question: str, count: int = 1) -> dict[str, Any]:
        """The child's answer. Raises WorkerError."""
        self.hello()
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{question} {count}\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise self._dead() from error
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._dead()
        return json.loads(line)

    def _dead(self) -> WorkerError:
        code = self._process.wait()
        self._errors.seek(0)
        said = "\n".join(self._errors.read().splitlines()[-TAIL:])
        return WorkerError(f"{self.name} ended with exit code {code}; it said:\n{said}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._process.kill()
        self._process.communicate()  # closes the pipes: the child ends
        self._errors.close()


def serve(hello: Mapping[str, Any], answers: Mapping[str, Callable[[int], Any]]) -> None:
    """The child's side: hello, then answers until the parent closes the pipe."""
    _say(hello)
    for line in sys.stdin:
        question, count = line.split()
        _say(answers[question](int(count)))


def _say(answer: Mapping[str, Any]) -> None:
    print(json.dumps(answer), flush=True)


def peak_mb() -> int:
    """Peak resident memory of this process so far; its parent's is not part of it on Linux."""
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss starts at what the parent held when it made this process
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) // 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak >> 20 if sys.platform == "darwin" else peak // 1024
