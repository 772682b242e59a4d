"""What a run leaves behind: its folder, metrics spool, checkpoints, report and MLflow copy.

Importing this package loads neither torch, nor matplotlib, nor mlflow: listing runs is instant,
and a training process never pays for the tracking library.
"""

from experiments.record.checkpoint import CheckpointError, Checkpoints, Loaded
from experiments.record.mirror import opening, pending
from experiments.record.report import report
from experiments.record.run import Run, RunError, RunStatus, runs
from experiments.record.tracking import Uploader, start_uploader, sync

__all__ = [
    "CheckpointError",
    "Checkpoints",
    "Loaded",
    "Run",
    "RunError",
    "RunStatus",
    "Uploader",
    "opening",
    "pending",
    "report",
    "runs",
    "start_uploader",
    "sync",
]
