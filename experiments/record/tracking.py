"""Keeping MLflow out of the loop's way: the training process only starts and stops an uploader.

The uploader is a process of lowest priority that follows the spool (record/uploader.py). It dies,
or its server does, and training never notices: what did not arrive stays in the spool, and `sync`
sends it later. The pipe to it is how it learns that training ended, however that came about.
"""

import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from experiments.record.mirror import Mirror, pending
from experiments.record.run import Run, RunError

ROOT = Path(__file__).resolve().parents[2]
MODULE = "experiments.record.uploader"
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


class Uploader:
    """A run's uploader process; `finish` when the run's last file is written."""

    def __init__(self, path: Path, process: "subprocess.Popen[bytes] | None") -> None:
        self.path = path
        self.process = process

    def finish(self, deadline: float = 30.0) -> int:
        """Wait up to `deadline` seconds for what is left; says, and returns, what did not go."""
        if self.process is not None:
            self._drain(self.process, deadline)
        left = pending(self.path)
        if left:
            spool = self.path / "metrics.jsonl"
            print(f"{left} metrics still in {spool}; `nested sync {self.path}` uploads them")
        return left

    def _drain(self, process: "subprocess.Popen[bytes]", deadline: float) -> None:
        with suppress(OSError):  # it may be gone
            assert process.stdin is not None
            process.stdin.write(f"finish {deadline}\n".encode())
            process.stdin.close()
        try:
            process.wait(deadline)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def start_uploader(run: Run) -> Uploader:
    """Start copying a run to MLflow beside the training process; never raises."""
    path = run.path.resolve()
    environment = os.environ | ONE_THREAD | {"PYTHONPATH": _python_path()}
    try:
        with (path / "uploader.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", MODULE, str(path)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # Ctrl-C ends training, and the uploader drains
            )
    except OSError as error:
        print(f"no MLflow uploader ({error}); `nested sync {run.path}` uploads the run later")
        return Uploader(run.path, None)
    return Uploader(run.path, process)


def sync(path: Path, uri: str | None = None) -> int:
    """Send a run to MLflow now, from the start if need be; how many metrics were sent.

    Raises RunError where the folder is no run, an uploader is at work, or MLflow cannot be reached.
    """
    run = Run.open(path)
    with uploading(run.path):
        mirror = Mirror(run.path, uri)
        try:
            mirror.connect()
            count = mirror.push()
            if run.state != "running":
                mirror.close()
        except Exception as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            text = f"MLflow at {mirror.state['uri']} did not take {path}: {reason[0]}"
            raise RunError(f"{text}; nothing is lost, try again later") from error
    return count


@contextmanager
def uploading(path: Path, patience: float = 0.0) -> Iterator[None]:
    """Hold the run's upload lock, waiting `patience` seconds for it; RunError where it is held."""
    until = time.monotonic() + patience
    with (path / "upload.lock").open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if time.monotonic() >= until:
                    raise RunError(f"an uploader is at work on {path}; wait for it") from error
                time.sleep(0.2)
        yield


def _python_path() -> str:
    """The uploader finds this package from any folder, installed or not."""
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
