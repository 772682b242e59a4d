"""Kill a run anywhere, resume it, and compare: `python -m experiments.benchmarks.kill --kills 20`.

The same configuration is trained twice through the command line: once in one piece, once killed
with SIGKILL at seeded moments over the whole run (while starting, learning and writing a
checkpoint), resumed after each. Final checkpoints, replay and metrics must be equal bit for bit;
only wall clocks (`wall`, `time/*`) may differ. Prints a line for each kill, and a verdict.
"""

import argparse
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from experiments.record import Checkpoints
from experiments.record.metrics import read, tail

ROOT = Path(__file__).resolve().parents[2]
SAVED = re.compile(r"\d+-(\d+)\.json")  # a checkpoint's manifest names its frame
MOMENTS = ("starting", "learning", "writing", "learning", "writing")  # in turn
LONGEST = {"starting": 4.0, "learning": 0.5, "writing": 0.005}  # seconds until the kill

# Three levels of periods 1, 4 and 16 and a fast memory; an update for each step of the
# environment, and checkpoints that fall on ever different phases of the slow level's window.
FIELDS = (
    "env.num=8",
    "model.memory.kind=gated_delta",
    "model.memory.dim=32",
    "timescales.kind=geometric",
    "timescales.k=3",
    "timescales.base=4",
    "agent.horizon=5",
    "replay.capacity=2048",
    "replay.batch=8",
    "replay.length=16",
    "train.ratio=16",
    "train.prefill=400",
    "log.every=40",
    "evaluate.every=1000",
    "evaluate.episodes=4",
    "checkpoint.every=200",
    "threads=1",
    "device=cpu",
    "tracking.mlflow=false",
)


# ---- what a run left behind --------------------------------------------------------------------
def differences(one: Path, two: Path) -> list[str]:
    """Names of everything in which the ends of two runs differ, bit for bit; [] if in nothing.

    Names begin with `state.`, `replay.` (its stored chunks) or `metrics.` (a line each).
    """
    left, right = remains(one), remains(two)
    return sorted(name for name in left.keys() | right.keys() if left.get(name) != right.get(name))


def remains(run: Path) -> dict[str, Any]:
    """All of a run's last checkpoint and metrics by name, in a form that `==` compares by bits."""
    loaded = Checkpoints(run / "checkpoints").load()
    if loaded is None:
        raise FileNotFoundError(f"{run} holds no checkpoint")
    found = dict(leaves(loaded.state, "state"))
    found |= leaves(stored(loaded.segments.get("replay", [])), "replay")
    for number, row in enumerate(read(run / "metrics.jsonl")):
        values = {key: value for key, value in row.metrics.items() if not key.startswith("time/")}
        found |= leaves({"step": row.step, **values}, f"metrics.{number}")
    return found


def leaves(tree: Any, name: str) -> Iterator[tuple[str, Any]]:
    """(name, value) of every leaf; arrays as (dtype, shape, bytes), scalars as (type, text)."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from leaves(value, f"{name}.{key}")
    elif isinstance(tree, list | tuple):
        for number, value in enumerate(tree):
            yield from leaves(value, f"{name}.{number}")
    elif isinstance(tree, Tensor | np.ndarray | np.generic):
        array = tree.numpy() if isinstance(tree, Tensor) else np.asarray(tree)
        yield name, (str(array.dtype), array.shape, array.tobytes())
    else:
        yield name, (type(tree).__name__, repr(tree))


def stored(segments: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The chunks that a replay's journal leaves in place, whatever it was cut into."""
    chunks = 1 + max((int(segment["place"].max()) for segment in segments), default=-1)
    found: dict[str, np.ndarray] = {}
    for segment in segments:
        for key, value in segment.items():
            if key not in found:
                found[key] = np.zeros((chunks, *value.shape[1:]), value.dtype)
            found[key][segment["place"]] = value
    return found


# ---- a run in a process of its own -------------------------------------------------------------
class Trainee:
    """The configuration in training through the command line, below `root`; started and killed."""

    def __init__(self, root: Path, fields: Sequence[str]):
        self.root = root
        self._command = ["train", *fields, f"tracking.root={root}"]
        self._process: subprocess.Popen[bytes] | None = None
        self._left: set[str] = set()  # half written before this start
        root.mkdir(parents=True)

    @property
    def path(self) -> Path | None:
        """The run's folder, once there is one that can be resumed."""
        return next((file.parent for file in sorted(self.root.glob("*/run.json"))), None)

    @property
    def frame(self) -> int:
        """Environment steps up to the last line of its metrics."""
        rows = tail(self.path / "metrics.jsonl") if self.path else []
        return rows[-1].step if rows else 0

    @property
    def saved(self) -> int | None:
        """Environment steps at its last checkpoint; None before any."""
        names = [f.name for f in self.path.glob("checkpoints/*.json")] if self.path else []
        steps = [int(match[1]) for match in map(SAVED.fullmatch, names) if match]
        return max(steps, default=None)

    @property
    def writing(self) -> str | None:
        """The file of a checkpoint that this process is writing, or was when it was killed."""
        return next(iter(self._half_written() - self._left), None)

    def _half_written(self) -> set[str]:
        found = self.path.glob("checkpoints/*.tmp") if self.path else iter(())
        return {file.name for file in found}

    @property
    def alive(self) -> bool:
        """Whether its process is still at work."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Begin, or go on with what a kill left."""
        # a resumed run has its own configuration: given again, `kind=` would drop its siblings
        words = ["train", "--resume", str(self.path)] if self.path else self._command
        self._left = self._half_written()
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        with (self.root / "output.txt").open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "experiments", *words],
                cwd=self.root,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def kill(self) -> bool:
        """SIGKILL; False if it had ended by itself."""
        assert self._process is not None
        self._process.kill()
        return self._process.wait() < 0

    def finish(self) -> None:
        """Train to the end without a kill. Raises RuntimeError with the output if that fails."""
        self.start()
        assert self._process is not None
        if self._process.wait() != 0:
            lines = (self.root / "output.txt").read_text(errors="replace").splitlines()
            raise RuntimeError("\n".join(["training failed:", *lines[-20:]]))


# ---- when to kill ------------------------------------------------------------------------------
class Kill(NamedTuple):
    """One kill: not before this many environment steps, then at a moment of this kind."""

    frame: int
    moment: str
    delay: float  # seconds, from the moment on


def plan(kills: int, frames: int, seed: int) -> list[Kill]:
    """Kills spread evenly over the frames of a run, each somewhere in its share."""
    rng = random.Random(seed)
    share = 0.96 * frames / kills
    made: list[Kill] = []
    for number in range(kills):
        moment = MOMENTS[number % len(MOMENTS)]
        frame = int((number + rng.random()) * share)
        made.append(Kill(frame, moment, rng.uniform(0.0, LONGEST[moment])))
    return made


def strike(trainee: Trainee, kill: Kill) -> str | None:
    """Start the trainee and kill it as planned; what it was at, None if it ended before that."""
    trainee.start()
    if kill.moment != "starting":
        wait(trainee, lambda: trainee.frame >= kill.frame, pause=0.05)
    if kill.moment == "writing":
        wait(trainee, lambda: trainee.writing is not None, pause=5e-4)
    time.sleep(kill.delay)
    if not trainee.kill():
        return None
    if trainee.writing:
        return f"writing {trainee.writing}"
    return f"{kill.delay:.1f} s after its start" if kill.moment == "starting" else kill.moment


def wait(trainee: Trainee, until: Callable[[], bool], pause: float) -> None:
    """Look every `pause` seconds until it is so, or the process has ended."""
    while trainee.alive and not until():
        time.sleep(pause)


# ---- the benchmark -----------------------------------------------------------------------------
def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 if the run that was killed equals the one that was not."""
    args = _arguments(argv)
    folder = Path(args.folder or tempfile.mkdtemp(prefix="nested-kill-")).resolve()
    fields = [*FIELDS, f"frames={args.frames}", f"seed={args.seed}", *args.fields]
    start = time.perf_counter()
    whole, killed = Trainee(folder / "whole", fields), Trainee(folder / "killed", fields)
    whole.finish()
    print(f"uninterrupted: {args.frames} frames in {time.perf_counter() - start:.0f} s", flush=True)
    struck = 0
    for number, kill in enumerate(plan(args.kills, args.frames, args.seed), 1):
        was = strike(killed, kill)
        struck += was is not None
        at = f"kill {number:>3}/{args.kills}  after frame {killed.frame:>6}"
        saved = "nothing saved yet" if killed.saved is None else f"saved at {killed.saved}"
        print(f"{at}  {saved:<18}  {was or 'had ended'}", flush=True)
    killed.finish()
    assert whole.path and killed.path
    found = differences(killed.path, whole.path)
    return _verdict(found, struck, args.kills, folder, keep=args.folder is not None)


def _verdict(found: list[str], struck: int, kills: int, folder: Path, keep: bool) -> int:
    if found:
        shown = ", ".join(found[:8])
        print(f"DIFFERENT after {struck} kills in {len(found)} places: {shown}; see {folder}")
        return 1
    if struck < kills:
        print(f"equal, but only {struck} of {kills} kills came before the end; see {folder}")
        return 1
    print(f"equal: state, replay and metrics after {struck} kills are those of the whole run")
    if not keep:
        shutil.rmtree(folder)
    return 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="nested bench kill",
        description="Kill a run again and again, resume it, and compare with one that was not.",
        epilog="example: nested bench kill --kills 20",
    )
    parser.add_argument("fields", nargs="*", metavar="field=value", help="changes of the run")
    parser.add_argument("--kills", type=int, default=20, help="how often (default 20)")
    parser.add_argument("--frames", type=int, default=4800, help="length of the run (default 4800)")
    parser.add_argument("--seed", type=int, default=0, help="of the run and of the moments")
    parser.add_argument("--folder", help="keep both runs there (default: a temporary folder)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
