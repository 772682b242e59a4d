"""The copy of a run in MLflow; the only file that imports mlflow, never in a training process.

Every (metric, step) arrives exactly once: `upload.json` keeps the last step that the server
acknowledged for each metric, and is marked before a batch leaves, so that after a crash in between
the server's own history decides. A resumed run that reports the same steps again is no trouble.
The x-axis, MLflow's `step`, is environment frames.
"""

import getpass
import json
import math
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from experiments.record.levels import LevelRow, level_rows, schedule_tag
from experiments.record.metrics import Row, parse, read
from experiments.record.run import ENDS, Run, read_config, read_json, write_json

if TYPE_CHECKING:
    from mlflow import MlflowClient

BATCH = 1000  # metrics in one log_batch call, MLflow's limit
PARAMS, KEY, VALUE, TAG = 100, 250, 6000, 5000  # its other limits: a batch, and characters
CHUNK = 4 << 20
STATUS = {"finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED", "running": "RUNNING"}
PICTURES = ("*.png", "*.jpg", "*.gif", "*.mp4")
CHARTS = "workflowType=machine_learning&compareRunsMode=CHART"  # else it opens on GenAI traces
TAG_RUN = "nested.run"
QUIET = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # patience is the uploader's, not each request's
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "GIT_PYTHON_REFRESH": "quiet",
}


class Value(NamedTuple):
    """One point of one metric, as MLflow's Metric takes it."""

    name: str
    value: float
    milliseconds: int
    step: int


class Mirror:
    """One run's copy. `connect`, then `push` as the spool grows, and `close`; all may raise."""

    def __init__(self, path: Path, uri: str | None = None) -> None:
        self.path = path
        self.state = _read_state(path)
        self.config = read_config(path)
        tracking = self.config.get("tracking") or {}
        asked = uri or self.state.get("uri") or tracking.get("uri") or "sqlite:///mlflow.db"
        if _absolute(asked) != self.state.get("uri"):
            self.state = {"uri": _absolute(asked), "run": None, "sent": {}, "doubt": []}
        self.experiment = str(tracking.get("experiment") or self.config.get("name") or "nested")
        self._client: MlflowClient | None = None
        self._offset = 0

    def connect(self) -> None:
        """Find or make the experiment and the run; log its parameters, tags and configuration."""
        os.environ.update({k: v for k, v in QUIET.items() if k not in os.environ})
        from mlflow import MlflowClient

        client = MlflowClient(self.state["uri"])
        experiment = client.get_experiment_by_name(self.experiment)
        number = experiment.experiment_id if experiment else self._new_experiment(client)
        if not self._is_there(client):
            rows = read(self.path / "metrics.jsonl")
            names = {metric_name(name) for row in rows for name in row.metrics}
            run = self._find_or_make(client, number)
            self._keep(experiment=number, run=run, sent={}, doubt=sorted(names))
        self._describe(client)
        client.log_artifact(self.state["run"], str(self.path / "config.yaml"))
        self._client = client

    def push(self) -> int:
        """Send what the spool holds beyond what was acknowledged; how many metrics were sent."""
        client, count = self._connected(), 0
        self._reconcile(client)
        while data := _read_from(self.path / "metrics.jsonl", self._offset):
            new = iter(list(unsent(parse(data), self.state["sent"])))
            while batch := list(islice(new, BATCH)):
                self._send(client, batch)
                count += len(batch)
            self._offset += len(data)
        return count

    def close(self) -> None:
        """Upload the report, the level table and the pictures, and end the run as it ended."""
        client, run = self._connected(), self.state["run"]
        files = [self.path / "levels.json", *(f for p in PICTURES for f in self.path.glob(p))]
        for file in sorted(file for file in files if file.is_file()):
            client.log_artifact(run, str(file))
        self._describe(client)
        ended = Run.open(self.path).info.get("ended") or time.time()
        if _state(self.path) in ENDS:
            client.set_terminated(run, STATUS[_state(self.path)], int(ended * 1000))

    def _send(self, client: "MlflowClient", batch: list[Value]) -> None:
        from mlflow.entities import Metric

        self._keep(doubt=sorted({value.name for value in batch}))
        client.log_batch(self.state["run"], metrics=[Metric(*value) for value in batch])
        marks = {value.name: value.step for value in batch}
        self._keep(sent=self.state["sent"] | marks, doubt=[])

    def _connected(self) -> "MlflowClient":
        if self._client is None:
            raise RuntimeError("connect() first")
        return self._client

    def _keep(self, **fields: Any) -> None:
        self.state |= fields
        write_json(self.path / "upload.json", self.state)

    def _new_experiment(self, client: "MlflowClient") -> str:
        tags = {"mlflow.experimentKind": "custom_model_development"}  # not GenAI
        return client.create_experiment(self.experiment, tags=tags)

    def _is_there(self, client: "MlflowClient") -> bool:
        """Whether the run that upload.json names exists; a deleted database means a new one."""
        from mlflow.exceptions import MlflowException

        if not self.state["run"]:
            return False
        try:
            client.get_run(self.state["run"])
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return False
            raise
        return True

    def _find_or_make(self, client: "MlflowClient", experiment: str) -> str:
        """The run tagged as ours, should an uploader have died before it noted it, or a new one."""
        info = Run.open(self.path).info
        found = client.search_runs([experiment], f"tags.`{TAG_RUN}` = '{info['id']}'")
        if found:
            return found[0].info.run_id
        tags = {TAG_RUN: info["id"], "mlflow.user": _user()}
        start = int(info["created"] * 1000)
        name = info["id"].removeprefix(f"{self.experiment}-")  # the experiment's name is beside it
        run = client.create_run(experiment, start_time=start, tags=tags, run_name=name)
        return run.info.run_id

    def _reconcile(self, client: "MlflowClient") -> None:
        """After a batch of unknown fate, take the server's word for what it has."""
        if not self.state["doubt"]:
            return
        marks = dict(self.state["sent"])
        for name in self.state["doubt"]:
            history = client.get_metric_history(self.state["run"], name)
            if history:
                marks[name] = max(metric.step for metric in history)
        self._keep(sent=marks, doubt=[])

    def _describe(self, client: "MlflowClient") -> None:
        from mlflow.entities import Param, RunTag

        run = self.state["run"]
        params = dict(islice(flatten(self.config), 10 * PARAMS))
        old = client.get_run(run).data.params
        new = [Param(key, value) for key, value in params.items() if key not in old]
        for start in range(0, len(new), PARAMS):
            client.log_batch(run, params=new[start : start + PARAMS])
        tags = describe(self.path, self.config)
        changed = {k: f"{old[k]} -> {v}" for k, v in params.items() if old.get(k, v) != v}
        if changed:  # parameters cannot change in MLflow
            tags[f"config_change_{tags['resumes']}"] = json.dumps(changed)
        entries = [RunTag(key, value[:TAG]) for key, value in tags.items()]
        client.log_batch(run, tags=entries)
        client.update_run(run, status=STATUS.get(_state(self.path), "RUNNING"))


def pending(path: Path) -> int:
    """How many of a run's metrics MLflow has not acknowledged; needs no mlflow."""
    marks = _read_state(path).get("sent", {})
    return sum(1 for _ in unsent(read(path / "metrics.jsonl"), marks))


def opening(path: Path) -> list[str]:
    """How to look at a run in MLflow: a command and an address, or [] before it arrived there."""
    state = _read_state(path)
    if not state.get("run"):
        return []
    uri, remote = state["uri"], state["uri"].startswith("http")
    site = uri.rstrip("/") if remote else "http://127.0.0.1:5000"
    charts = f"{site}/#/experiments/{state['experiment']}/runs?{CHARTS}"
    return [charts] if remote else [f"mlflow ui --backend-store-uri {uri}", charts]


def unsent(rows: Iterable[Row], marks: Mapping[str, int]) -> Iterator[Value]:
    """The values beyond the marks, each (name, step) once."""
    marks = dict(marks)
    for row in rows:
        for key, value in row.metrics.items():
            name = metric_name(key)
            if row.step > marks.get(name, -1):
                marks[name] = row.step
                # MLflow turns an infinity into 1.8e308, which flattens every chart.
                finite = value if math.isfinite(value) else math.nan
                yield Value(name, finite, int(row.wall * 1000), row.step)


def flatten(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted keys and text within MLflow's limits; what is empty is left out, lists stay whole."""
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            yield from flatten(value, name + ".")
        elif value not in (None, []) and len(name) <= KEY:
            text = json.dumps(value) if isinstance(value, list | bool) else str(value)
            yield clean(name), text[:VALUE]


def describe(path: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """A run's tags: where it comes from, and the table of its levels as its description."""
    info, rows = Run.open(path).info, level_rows(path, config)
    tags = {
        "mlflow.source.name": "nested train",
        "mlflow.source.type": "LOCAL",
        "mlflow.source.git.commit": info.get("revision"),
        "mlflow.note.content": _markdown(rows),
        "env": (config.get("env") or {}).get("id"),
        "schedule": schedule_tag(rows),
        "levels": ", ".join(row.name for row in rows),
        "seed": info.get("seed"),
        "resumes": info.get("resumes", 0),
        "folder": path.resolve(),
    }
    return {key: str(value) for key, value in tags.items() if value not in (None, "")}


def metric_name(name: str) -> str:
    """`levels/fast/updates` as `levels/fast.updates`: MLflow shows a section for each folder."""
    head, slash, rest = name.partition("/")
    return clean(head + slash + rest.replace("/", "."))


def clean(name: str) -> str:
    """A name that MLflow takes."""
    return re.sub(r"[^\w\-. :/]", "_", name, flags=re.ASCII)[:KEY]


def _markdown(rows: list[LevelRow]) -> str:
    """The levels as a list, for the run's page; its tables run together."""
    shares = ["" if row.share is None else f", {row.share:.1%} of the parameters" for row in rows]
    copies = [" (a copy)" * row.copy for row in rows]
    parts = zip(rows, shares, copies, strict=True)
    return "\n".join(f"- **{row.name}** {row.every}{share}{copy}" for row, share, copy in parts)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container whose user has no name
        return str(os.getuid())


def _state(path: Path) -> str:
    return Run.open(path).state


def _read_state(path: Path) -> dict[str, Any]:
    return read_json(path / "upload.json") if (path / "upload.json").exists() else {}


def _absolute(uri: str) -> str:
    """A local database named from the folder where training began, found from any other."""
    local = re.fullmatch(r"sqlite:///(?!/)(.+)", uri)
    return f"sqlite:///{Path(local[1]).resolve()}" if local else uri


def _read_from(path: Path, offset: int) -> bytes:
    if not path.exists():
        return b""
    with path.open("rb") as file:
        file.seek(offset)
        data = file.read(CHUNK)
    return data[: data.rfind(b"\n") + 1]
