"""The uploader process: `python -m experiments.record.uploader RUN`, started by record/tracking.py.

It runs at the lowest priority and puts off importing mlflow until there is something to send. It
ends when its standard input says so or closes, or when the process that started it is gone. A dead
server makes it wait longer and longer, forever while training lasts; nothing it does can fail a
run. Its words go to uploader.log.
"""

import os
import select
import sys
import time
from pathlib import Path

from experiments.record.mirror import Mirror
from experiments.record.run import RunError
from experiments.record.tracking import uploading

INTERVAL = 4.0  # seconds between batches
LONGEST = 60.0  # between attempts at a dead server
DRAIN = 30.0  # seconds to finish in when training died without a word
ATTEMPTS = 3  # at a dead server, once training is over
HANDOVER = 60.0  # seconds to wait for an uploader of the same run that is still draining


class Follower:
    """Follows one run; `turn` sends what there is, and counts failures in a row."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.mirror: Mirror | None = None
        self.failures = 0

    def turn(self, last: bool = False) -> bool:
        """Whether everything that was in the spool, and at the last turn the rest, is sent."""
        try:
            if self.mirror is None:
                mirror = Mirror(self.path)
                mirror.connect()
                say(f"uploading to {mirror.state['uri']}, run {mirror.state['run']}")
                self.mirror = mirror
            self.mirror.push()
            if last:
                self.mirror.close()
        except Exception as error:  # whatever MLflow raises, training goes on
            self.failures += 1
            say(f"failure {self.failures}: {type(error).__name__}: {error}")
            return False
        self.failures = 0
        return True

    def pause(self) -> float:
        """Seconds until the next turn."""
        return min(INTERVAL * 2 ** min(self.failures, 10), LONGEST)


def follow(path: Path) -> bool:
    """Upload a run until its training ends; whether everything arrived."""
    follower = Follower(path)
    seconds = ended(follower.pause())
    while seconds is None:
        if has_metrics(path):
            follower.turn()
        seconds = ended(follower.pause())
    return drain(follower, seconds)


def drain(follower: Follower, seconds: float) -> bool:
    """The last turns, until all is sent, the time is over or the server is plainly dead."""
    until = time.monotonic() + seconds
    follower.failures = 0
    while not follower.turn(last=True):
        if follower.failures >= ATTEMPTS or time.monotonic() + 1 > until:
            return False
        time.sleep(1)
    return True


def ended(seconds: float) -> float | None:
    """Wait up to `seconds` for training to end: the time left to drain, or None while it runs."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if os.getppid() != PARENT:
            return DRAIN
        readable, _, _ = select.select([sys.stdin], [], [], min(1.0, seconds))
        if readable:
            words = sys.stdin.readline().split()
            return float(words[1]) if words[:1] == ["finish"] else DRAIN
    return None


def has_metrics(path: Path) -> bool:
    """Whether there is anything to send yet."""
    spool = path / "metrics.jsonl"
    return spool.exists() and spool.stat().st_size > 0


def say(text: str) -> None:
    """One line in uploader.log."""
    print(time.strftime("%H:%M:%S"), text, flush=True)


def main(path: Path) -> int:
    """Follow the run in `path`; exit status 0 where MLflow has all of it."""
    os.nice(19)
    try:
        with uploading(path, HANDOVER):
            return 0 if follow(path) else 1
    except RunError as error:
        say(str(error))
        return 1


PARENT = os.getppid()

if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
