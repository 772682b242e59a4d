"""Supervised streams as cells of the continual-learning benchmark."""

import time
from typing import Any

import numpy as np

from experiments.benchmarks import metrics
from experiments.benchmarks.cells import Cell, Family, Result, Tell
from experiments.benchmarks.tasks.baselines import METHODS
from experiments.benchmarks.tasks.schedules import RULES
from experiments.benchmarks.tasks.streams import check_stream, make_stream
from experiments.benchmarks.tasks.supervised import Settings, flops, learn
from experiments.config import ConfigError

LAYERS = {"k2": 2, "k3": 3, "k3_rates": 3, "k5": 5}  # that a schedule by depth needs


def settings_of(cell: Cell) -> tuple[int, int, Settings]:
    """Tasks, rows of a task, and how they are learned."""
    options = dict(cell.options)
    tasks, samples = options.pop("tasks"), options.pop("samples")
    return tasks, samples, Settings(**{**options, "hidden": tuple(options["hidden"])})


def check(cell: Cell) -> None:
    """Raise ConfigError for a cell that cannot run."""
    check_stream(cell.stream)
    tasks, samples, settings = settings_of(cell)
    least, layers = settings.batch * settings.evaluations, len(settings.hidden) + 1
    if settings.rule not in RULES:
        raise ConfigError("rule", settings.rule, "no such rule", f"one of: {', '.join(RULES)}")
    if LAYERS.get(cell.method, 0) > layers:
        raise ConfigError(
            "--methods", cell.method, f"{cell.stream} is learned by {layers} layers",
            "name other --streams, or a k that the layers fill",
        )  # fmt: skip
    if tasks < 2:
        raise ConfigError("tasks", tasks, "one task alone has no forgetting", "at least 2 tasks")
    if samples < least:
        raise ConfigError(
            "samples", samples, "too few to evaluate while a task is learned", f"at least {least}"
        )


def run(cell: Cell, tell: Tell) -> Result:
    """Learn a supervised stream with all seeds of the cell in one program."""
    started = time.process_time()
    tasks, samples, settings = settings_of(cell)
    method = METHODS[cell.method]
    stream = make_stream(cell.stream, cell.seeds, tasks, samples, method.oracle)
    learned = learn(stream, method, settings, tell)
    by_task = {
        "online": learned.online.mean(-1),
        "auc": metrics.auc(learned.times, learned.curves),
        **{name: values.astype(np.float64) for name, values in learned.symptoms.items()},
    }
    info = {
        "core_seconds": learned.seconds,
        "core_seconds_with_evaluation": time.process_time() - started,
        "core_us_per_interaction": 1e6 * learned.seconds / (len(cell.seeds) * tasks * samples),
        "flops_per_interaction": flops(stream, method, settings),
        "bytes_per_interaction": sum(level["bytes"] for level in learned.levels.values()),
        "levels": learned.levels,
    }
    arrays = {"curves": learned.curves, "times": learned.times, "online": learned.online}
    return Result(learned.scores, by_task, arrays, info)


FIELDS: dict[str, Any] = {"tasks": 10, "samples": 1500, **Settings()._asdict()}
FIELDS["hidden"] = list(FIELDS["hidden"])
SUPERVISED = Family({name: method.line for name, method in METHODS.items()}, FIELDS, check, run)
