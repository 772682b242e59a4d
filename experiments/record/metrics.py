"""The spool: one JSON line for each report of a run, and the truth about its metrics.

A line is `{"step": env frames, "wall": unix seconds, "metrics": {name: value}}`, handed to the
operating system before `write` returns, so a killed process loses nothing that it reported. NaN
and infinities, which JSON lacks, are kept as strings. A checkpoint stores `lines`; a resumed run
calls `truncate` with it, writes the same lines again, and its file equals an uninterrupted one.
"""

import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, SupportsFloat

TAIL_BYTES = 1 << 18


class Row(NamedTuple):
    """One line of the spool; `step` counts environment frames, `wall` is unix seconds."""

    step: int
    wall: float
    metrics: dict[str, float]


class Metrics:
    """The writing end of a spool; a torn last line, left by a crash, is dropped first."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.touch()
        end, self._lines = _measure(path)
        os.truncate(path, end)

    @property
    def lines(self) -> int:
        """Lines in the file: what a checkpoint stores for `truncate`."""
        return self._lines

    def write(self, step: int, metrics: Mapping[str, SupportsFloat]) -> None:
        """Append one line and hand it to the operating system."""
        values = {name: _to_json(float(value)) for name, value in metrics.items()}
        row = {"step": int(step), "wall": round(time.time(), 3), "metrics": values}
        line = json.dumps(row, allow_nan=False).encode() + b"\n"
        with self.path.open("ab") as file:
            file.write(line)
        self._lines += 1

    def truncate(self, lines: int) -> None:
        """Keep the first `lines` lines: what was reported when a checkpoint was taken."""
        end, self._lines = _measure(self.path, lines)
        os.truncate(self.path, end)


def read(path: Path) -> list[Row]:
    """All whole lines of a spool, oldest first; [] where there is no file yet."""
    return list(parse(path.read_bytes())) if path.exists() else []


def tail(path: Path, size: int = TAIL_BYTES) -> list[Row]:
    """The rows in the last `size` bytes: enough to show where a run stands."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        start = max(0, file.seek(0, os.SEEK_END) - size)
        file.seek(start)
        data = file.read()
    return list(parse(data if start == 0 else data.partition(b"\n")[2]))


def parse(data: bytes) -> Iterator[Row]:
    """Rows of the newline-terminated lines in `data`; lines that are not rows are skipped."""
    for line in data.split(b"\n")[:-1]:
        try:
            row = json.loads(line)
            values = {name: float(value) for name, value in row["metrics"].items()}
            yield Row(int(row["step"]), float(row["wall"]), values)
        except (ValueError, KeyError, TypeError, AttributeError):
            continue  # a damaged line costs that line, not the run's history


def _to_json(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def _measure(path: Path, lines: int | None = None) -> tuple[int, int]:
    """Bytes and number of the whole lines of a file, of the first `lines` at most."""
    end = count = 0
    with path.open("rb") as file:
        for line in file:
            if count == lines or not line.endswith(b"\n"):
                break
            end, count = end + len(line), count + 1
    return end, count
