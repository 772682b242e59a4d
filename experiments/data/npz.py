"""Folders of .npz files, one episode each, as episodes of clips.

A file has the columns of a row: `obs.<name>` (uint8 images, or vectors), `action` that led into
each row, as vectors (T, A) in [-1, 1] or as choices (T,) int; `reward`, `terminal` (T,). What the
first row's action and reward are does not matter.
"""

import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from experiments.config import ConfigError
from experiments.data.clips import Arrays, Spec
from experiments.data.source import (
    KEEP,
    Options,
    Recorded,
    Source,
    check_choices,
    check_unit,
    resized,
    wanted_actions,
)
from experiments.envs.rows import encode_choices
from worldmodel.types import ActionSpec, ObsSpec


def read_npz(folder: Path, options: Options) -> Source:
    """All episodes of a folder. Raises ConfigError, which names the file."""
    kept, left_out, found = [], [], None
    obs: dict[str, ObsSpec] = {}
    for file in sorted(folder.glob("*.npz")):
        try:
            arrays = _load(file)
            action, columns = _action(arrays, file), _observed(arrays, options.size or KEEP)
            obs = obs or columns
            found = _joined(found, action, file)
            if columns != obs:
                raise ConfigError("source", str(file), f"{file.name}: {columns}, not {obs}")
            kept.append(file)
        except ConfigError as error:
            if not options.skip_broken:
                raise
            left_out.append(error.problem)
    if not kept:
        raise ConfigError("source", str(folder), "no file of it can be read", left_out[0])
    spec = Spec(obs, wanted_actions(found, options))
    return Source(spec, (Recorded(file.name, _rows(file, spec)) for file in kept), left_out)


def _load(file: Path) -> Arrays:
    try:
        with np.load(file, allow_pickle=False) as found:
            arrays = dict(found)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        way_out = "write it again with np.savez, or leave it out with --skip-broken"
        raise ConfigError(
            "source", str(file), f"{file.name} is broken: {error}", way_out
        ) from error
    missing = {"action", "reward", "terminal"} - arrays.keys()
    if missing or not any(name.startswith("obs.") for name in arrays):
        lacks = ", ".join(sorted(missing)) or "obs.<name>"
        has = f"it has {', '.join(arrays)}"
        raise ConfigError("source", str(file), f"{file.name} lacks {lacks}", has)
    lengths = {name: len(np.atleast_1d(x)) for name, x in arrays.items()}
    if len(set(lengths.values())) > 1 or not lengths["action"]:
        problem = f"{file.name}: columns of {lengths} rows"
        raise ConfigError("source", str(file), problem, "all have one row for each observation")
    return arrays


def _action(arrays: Arrays, file: Path) -> ActionSpec:
    action = arrays["action"]
    if action.ndim == 1 and np.issubdtype(action.dtype, np.integer):
        check_choices(action[1:], file.name)
        return ActionSpec("discrete", (1 + int(action[1:].max(initial=0)),))
    if action.ndim != 2:
        problem = f"{file.name}: action is {action.dtype} {action.shape}"
        raise ConfigError("source", str(file), problem, "give choices (T,) int or vectors (T, A)")
    check_unit(action[1:], file.name)
    return ActionSpec("continuous", (action.shape[1],))


def _joined(known: ActionSpec | None, found: ActionSpec, file: Path) -> ActionSpec:
    """The actions of two files as one."""
    if known is None:
        return found
    if found.kind != known.kind or (found.kind == "continuous" and found != known):
        problem = f"{file.name} has {found.kind} actions {found.sizes}, others {known}"
        raise ConfigError("source", str(file), problem, "give all files the same actions")
    return max(known, found)


def _observed(arrays: Arrays, size: tuple[int, int]) -> dict[str, ObsSpec]:
    obs = {k.removeprefix("obs."): v for k, v in arrays.items() if k.startswith("obs.")}
    return {name: _spec(value, size) for name, value in obs.items()}


def _spec(value: np.ndarray, size: tuple[int, int]) -> ObsSpec:
    if value.dtype == np.uint8 and value.ndim == 4:
        height, width = value.shape[1:3] if size == KEEP else size
        return ObsSpec("image", (height, width, value.shape[3]))
    return ObsSpec("vector", (int(np.prod(value.shape[1:])),))


def _rows(file: Path, spec: Spec) -> Iterator[Arrays]:
    """One episode in one block: where actions are choices, one-hot; the first row has none."""
    arrays = _load(file)
    action, first = arrays["action"], np.arange(len(arrays["action"])) == 0
    if spec.action.kind == "discrete":
        action = encode_choices(np.where(first, 0, action)[:, None].astype(np.int64), spec.action)
    flags = {
        "action": np.where(first[:, None], 0, action).astype(np.float32),
        "reward": np.where(first, 0, arrays["reward"]).astype(np.float32),
        "first": first,
        "terminal": arrays["terminal"].astype(bool),
    }
    obs = {f"obs.{name}": _column(arrays[f"obs.{name}"], spec.obs[name]) for name in spec.obs}
    yield obs | flags


def _column(value: np.ndarray, spec: ObsSpec) -> np.ndarray:
    if spec.kind == "image":
        size = (spec.shape[0], spec.shape[1])
        return np.stack([resized(image, size) for image in value])
    return value.reshape(len(value), -1).astype(np.float32)
