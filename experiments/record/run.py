"""A run is a folder: runs/<id>/ with its configuration, metrics, checkpoints and report.

`run.json` says what the folder is: id, state, process, versions, revision. It has one writer, the
training process, which also holds a lock on the folder; everyone else reads. A run that claims
to be running while its process is gone is reported as stopped: a kill leaves no lie behind.
"""

import fcntl
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, SupportsFloat

from experiments.record.metrics import Metrics, Row, tail

State = Literal["created", "running", "finished", "failed", "stopped"]
ENDS = ("finished", "failed", "stopped")
PACKAGES = ("nested-timescales", "torch", "numpy", "gymnasium")


class RunError(Exception):
    """A run's folder is missing, damaged, or in use by another process."""


class RunConfig(Protocol):
    """What a run needs of a configuration."""

    @property
    def name(self) -> str: ...
    @property
    def seed(self) -> int: ...
    def dump(self) -> str:
        """The resolved configuration as YAML."""
        ...


class Run:
    """One run's folder. `create` or `open` it, `start`, `log` while training, `finish`."""

    def __init__(self, path: Path, info: dict[str, Any]) -> None:
        self.path = path
        self.info = info
        self._metrics: Metrics | None = None
        self._lock: int | None = None

    @classmethod
    def create(cls, config: RunConfig, root: Path) -> "Run":
        """Make runs/<id>/ with config.yaml and run.json; the id is new even within a second."""
        path = _new_folder(root, config)
        (path / "config.yaml").write_text(config.dump())
        run = cls(path, {"id": path.name, "name": config.name, "seed": config.seed})
        run._update(state="created", created=time.time(), resumes=0, pid=None)
        return run

    @classmethod
    def open(cls, path: Path) -> "Run":
        """An existing run, to resume, evaluate or report. Raises RunError."""
        path = Path(path)
        if not path.is_dir():
            raise RunError(f"no run at {path}; `nested runs` lists the runs")
        info = read_json(path / "run.json")
        missing = {"id", "state", "created"} - info.keys()
        if missing:
            raise RunError(f"{path / 'run.json'} lacks {sorted(missing)}; restore or remove {path}")
        return cls(path, info)

    @property
    def id(self) -> str:
        """The folder's name when it was created."""
        return self.info["id"]

    @property
    def state(self) -> State:
        """Where the run stands; a running run whose process is gone is `stopped`."""
        state = self.info["state"]
        return "stopped" if state == "running" and not _is_alive(self.info) else state

    @property
    def metrics(self) -> Metrics:
        """The spool; `metrics.lines` belongs in checkpoints."""
        if self._metrics is None:
            self._metrics = Metrics(self.path / "metrics.jsonl")
        return self._metrics

    @property
    def checkpoints(self) -> Path:
        """The folder of the run's checkpoints."""
        return self.path / "checkpoints"

    def start(self) -> None:
        """Take the folder for this process; RunError if another one is training in it."""
        lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT)
        try:
            # POSIX locks end with their process and are not inherited by environment workers.
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(lock)
            raise RunError(f"{self.path} is being trained by process {self._owner()}") from error
        self._lock = lock
        resumes = self.info.get("resumes", 0) + (self.info["state"] != "created")
        me = {"pid": os.getpid(), "born": _birth(os.getpid()), "resumes": resumes}
        self._update(state="running", versions=_versions(), revision=revision(), **me)

    def log(self, step: int, metrics: Mapping[str, SupportsFloat]) -> None:
        """Report `metrics` at `step` environment frames."""
        self.metrics.write(step, metrics)

    def write(self, name: str, value: Any) -> Path:
        """Write a JSON file into the folder in one move, such as levels.json."""
        return write_json(self.path / name, value)

    def finish(self, state: State = "finished") -> None:
        """Record how the run ended and release the folder."""
        if state not in ENDS:
            raise ValueError(f"a run ends as one of {ENDS}, not {state!r}")
        self._update(state=state, ended=time.time(), pid=None)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _update(self, **fields: Any) -> None:
        self.info |= fields
        self.write("run.json", self.info)

    def _owner(self) -> Any:
        return read_json(self.path / "run.json").get("pid")


class RunStatus(NamedTuple):
    """One line of `nested runs`: `step` in environment frames, `age` in seconds since creation.

    `score` is the mean over contexts of the last evaluation's `score`, or of its `return` where
    the environment has no cap; None before the first evaluation. `state` may be "corrupt".
    """

    id: str
    path: Path
    state: str
    step: int
    score: float | None
    age: float


def runs(root: Path) -> list[RunStatus]:
    """The runs below `root`, oldest first; a folder whose run.json is damaged is `corrupt`."""
    found = sorted(Path(root).glob("*/run.json"))
    return sorted((_status(file.parent) for file in found), key=lambda status: -status.age)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a run's folder. Raises RunError naming the file."""
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise RunError(f"{path} is missing; is {path.parent} a run's folder?") from error
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read ({error}); restore or remove it") from error
    if not isinstance(value, dict):
        raise RunError(f"{path} holds a {type(value).__name__}, not an object; remove it")
    return value


def write_json(path: Path, value: Any) -> Path:
    """Write JSON so that a reader sees the old file or the new one, never half of it."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(temporary, path)
    return path


def read_config(path: Path) -> dict[str, Any]:
    """A run's config.yaml as plain values. Raises RunError naming the file."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        value = YAML(typ="safe", pure=True).load((path / "config.yaml").read_text())
    except (OSError, YAMLError) as error:
        raise RunError(f"{path / 'config.yaml'} cannot be read: {error}") from error
    return value if isinstance(value, dict) else {}


def last_score(rows: list[Row]) -> float | None:
    """Mean over contexts of the newest evaluation's score, or return where there is no score.

    Evaluations without fast weights are left out.
    """
    for row in reversed(rows):
        for kind in ("/score", "/return"):
            names = [n for n in row.metrics if n.startswith("eval/") and "_off/" not in n]
            values = [row.metrics[name] for name in names if name.endswith(kind)]
            if values:
                return sum(values) / len(values)
    return None


def _status(path: Path) -> RunStatus:
    rows = tail(path / "metrics.jsonl")
    step = rows[-1].step if rows else 0
    try:
        run = Run.open(path)
    except RunError:
        age = time.time() - path.stat().st_mtime
        return RunStatus(path.name, path, "corrupt", step, last_score(rows), age)
    age = time.time() - run.info["created"]
    return RunStatus(run.id, path, run.state, step, last_score(rows), age)


def _new_folder(root: Path, config: RunConfig) -> Path:
    name = re.sub(r"[^a-z0-9]+", "-", config.name.lower()).strip("-")[:60] or "run"
    stem = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}-s{config.seed}"
    root.mkdir(parents=True, exist_ok=True)
    for attempt in range(1, 1000):
        path = root / (stem if attempt == 1 else f"{stem}-{attempt}")
        try:
            path.mkdir()
        except FileExistsError:
            continue
        return path
    raise RunError(f"{root} holds 999 runs called {stem}; remove some")


def _is_alive(info: Mapping[str, Any]) -> bool:
    pid = info.get("pid")
    if not isinstance(pid, int):
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    # A reused process number is another process, born at another time.
    return _birth(pid) == info.get("born")


def _birth(pid: int) -> int | None:
    """When a process began, in clock ticks since boot; None where /proc does not tell."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return int(stat.rpartition(")")[2].split()[19])


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "platform": sys.platform}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def revision() -> str | None:
    """The source's git commit, `+` appended where files differ from it; None without git."""
    git = ["git", "-C", str(Path(__file__).parent)]
    options: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 5}
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], **options)
        dirty = subprocess.run([*git, "status", "--porcelain", "-uno"], **options)
    except (OSError, subprocess.SubprocessError):
        return None
    return head.stdout.strip() + "+" * bool(dirty.stdout) if head.returncode == 0 else None
