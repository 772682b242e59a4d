"""From what an agent scored in every context, through all phases, to the result of a cell."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments.benchmarks import metrics
from experiments.benchmarks.cells import Result

LAST = 3  # evaluations at the end of a phase that its score is the mean of
LEARNED = 0.8  # a score that counts as learned
RAW = "raw returns"  # the unit of scores that are none yet


def result_of(
    course: np.ndarray,
    online: np.ndarray,
    every: int,
    info: dict[str, Any],
    symptoms: Mapping[str, np.ndarray] | None = None,
) -> Result:
    """The result of a course (S, P, T+1, N), and of scores and symptoms (S, P) of what was lived.

    N phases are tasks, each in the context of its number; the others are contexts that come back.
    """
    tasks, frames = course.shape[3], every * np.arange(course.shape[2])
    learned = course[:, :tasks]
    areas = metrics.auc(frames, own(learned))
    by_task = {
        "online": online[:, :tasks],
        "auc": areas,
        "adapt": metrics.adapt_area(own(learned)[..., 1:], min(LAST, len(frames) - 1)),
        "frames_to_learn": metrics.time_to(frames, own(learned), LEARNED),
        **{name: values[:, :tasks] for name, values in (symptoms or {}).items()},
    }
    backs = []
    for scores, back in zip(np.swapaxes(course, 0, 1)[tasks:], info["phases"][tasks:], strict=True):
        place = info["contexts"].index(back)
        backs.append(returned(frames, scores[..., place], areas[:, place]))
    by_seed = (
        {name: np.mean([back[name] for back in backs], 0) for name in backs[0]} if backs else {}
    )
    if len(backs) > 1:
        by_seed["again/AP_final"] = ends(course)[:, -1].mean(-1)
    if info.get("unit") == RAW:  # nothing says when a raw return is good
        by_task.pop("frames_to_learn")
        by_seed.pop("again/frames_to_learn", None)
    arrays = {"course": course, "frames": frames}
    return Result(scores_of(learned), by_task, arrays, info, by_seed)


def returned(frames: np.ndarray, scores: np.ndarray, area: np.ndarray) -> dict[str, np.ndarray]:
    """Of a context that comes back: scores (S, T+1) while it does, `area` when it was new (S,)."""
    again = metrics.auc(frames, scores)
    return {
        "again/kept": scores[:, 0],
        "again/auc": again,
        "again/savings": metrics.savings(area, again),
        "again/frames_to_learn": metrics.time_to(frames, scores, LEARNED),
    }


def own(course: np.ndarray) -> np.ndarray:
    """The scores (S, N, T+1) in the context of each phase."""
    return np.stack([course[:, i, :, i] for i in range(course.shape[1])], 1)


def ends(course: np.ndarray) -> np.ndarray:
    """Scores (S, P, N) at the end of each phase: the mean of its last evaluations."""
    return metrics.end_value(np.swapaxes(course, 2, 3), min(LAST, course.shape[2] - 1))


def scores_of(course: np.ndarray) -> np.ndarray:
    """R (S, N+1, N): untrained, then the end of each phase."""
    return np.concatenate([course[:, :1, 0], ends(course)], 1)
