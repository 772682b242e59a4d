"""Checkpoints that survive being killed at any instant, and say so when a disk lies.

A checkpoint is a safetensors file, a JSON manifest that is written last, and segments: append-only
files, such as the replay's journal, that are written once and listed by every later manifest.
Every file goes through tmp, fsync, rename, directory fsync; every file's crc32 is in the manifest,
the manifest's own in itself, because safetensors loads a flipped bit in silence. `load` falls back
to the newest checkpoint whose files are whole. Nothing is pickled. Files are never overwritten.
"""

import json
import os
import re
import warnings
import zlib
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:  # `nested runs` and `--help` start without torch
    import numpy as np
    from torch import Tensor

FORMAT = 1
MANIFEST = re.compile(r"(\d{6,})-\d+\.json")
OURS = re.compile(r"\d{6,}-\d+(\.[a-z0-9_-]+)?\.(json|safetensors)(\.tmp)?")
CHUNK = 1 << 20

Segment = dict[str, "np.ndarray"]
Entry = dict[str, Any]  # {"file", "crc32", "bytes"}


class CheckpointError(Exception):
    """A checkpoint cannot be written, or none of those there can be read."""


class Loaded(NamedTuple):
    """A checkpoint: `segments` holds each name's segments, oldest first; `step` in frames."""

    step: int
    state: Any
    segments: dict[str, list[Segment]]


class Checkpoints:
    """The checkpoints in a folder; the newest `keep` stay. One process writes, any may read."""

    def __init__(self, folder: Path, keep: int = 2) -> None:
        if keep < 1:
            raise ValueError(f"keep is {keep}; at least one checkpoint must stay")
        self.folder = Path(folder)
        self.keep = keep
        self._segments: dict[str, list[Entry]] | None = None
        self._bad: set[Path] = set()

    def save(
        self,
        step: int,
        state: Any,
        append: Mapping[str, Segment] | None = None,
        replace: Collection[str] = (),
    ) -> Path:
        """Write a checkpoint and return its manifest; raise CheckpointError and change nothing.

        `state`: see record/tree.py. `append` adds one segment to each named list; the lists named
        in `replace` start anew with it. After an error, hand in the same rows again.
        """
        from experiments.record import tree

        if self._segments is None and self._manifests():
            raise CheckpointError(f"{self.folder} holds checkpoints; load() before saving there")
        self.folder.mkdir(parents=True, exist_ok=True)
        stem = f"{self._next():06d}-{step}"
        old = self._segments or {}
        segments = {name: [*files] for name, files in old.items() if name not in replace}
        for name, arrays in (append or {}).items():
            tensors = {key: tree.to_tensor(a, f"{name}.{key}") for key, a in arrays.items()}
            entry = self._put(f"{stem}.{name}.safetensors", _tensors(tensors))
            segments[name] = [*segments.get(name, []), entry]
        value, tensors = tree.encode(state)
        arrays = self._put(f"{stem}.safetensors", _tensors(tensors))
        body = {"format": FORMAT, "step": step, "arrays": arrays, "segments": segments}
        self._put(f"{stem}.json", _manifest(body | {"state": value}))
        self._segments = segments
        self._prune()
        return self.folder / f"{stem}.json"

    def load(self, step: int | None = None) -> Loaded | None:
        """The newest whole checkpoint, with a warning for each newer one; None where none is.

        `step`: of those that were saved then. Raises CheckpointError where there are checkpoints
        but none is whole.
        """
        problems: list[str] = []
        for path in reversed(self._manifests()):
            if step is not None and int(path.stem.split("-")[1]) != step:
                continue
            try:
                body, loaded = self._load(path)
            except CheckpointError as error:
                self._bad.add(path)
                problems.append(str(error))
                continue
            for problem in problems:
                text = f"bad checkpoint, falling back to step {loaded.step}: {problem}"
                warnings.warn(text, RuntimeWarning, stacklevel=2)
            self._segments = body["segments"]
            return loaded
        if problems:
            found = "; ".join(problems)
            raise CheckpointError(f"no checkpoint in {self.folder} is whole: {found}")
        return None

    def _load(self, path: Path) -> tuple[Entry, Loaded]:
        from experiments.record import tree

        body = _read_manifest(path)
        tensors = self._get(body["arrays"])
        segments = {
            name: [{key: t.numpy() for key, t in self._get(entry).items()} for entry in entries]
            for name, entries in body["segments"].items()
        }
        return body, Loaded(body["step"], tree.decode(body["state"], tensors), segments)

    def _get(self, entry: Entry) -> "dict[str, Tensor]":
        """The tensors of one file, in memory of their own, once its checksum holds."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = self.folder / entry["file"]
        try:
            if _crc32(path) != entry["crc32"]:
                raise CheckpointError(f"{path}: its checksum differs from the manifest's")
            return {name: tensor.clone() for name, tensor in load_file(path).items()}
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: {error}") from error

    def _put(self, name: str, write: Callable[[Path], None]) -> Entry:
        """Make one file appear whole or not at all."""
        path, temporary = self.folder / name, self.folder / f"{name}.tmp"
        if not OURS.fullmatch(name):
            raise ValueError(f"segment name in {name!r} must be of a-z, 0-9, - and _")
        try:
            write(temporary)
            entry = {"file": name, "crc32": _crc32(temporary), "bytes": temporary.stat().st_size}
            _fsync(temporary)
            os.replace(temporary, path)
            _fsync(self.folder)
        except Exception as error:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)  # on a full disk it is in the way
            raise CheckpointError(f"cannot write {path}: {error}") from error
        return entry

    def _manifests(self) -> list[Path]:
        """Oldest first: by the count of saves, since a step may be saved twice."""
        found = [path for path in self.folder.glob("*.json") if MANIFEST.fullmatch(path.name)]
        return sorted(found, key=lambda path: int(path.name.split("-")[0]))

    def _next(self) -> int:
        counts = [int(p.name.split("-")[0]) for p in self.folder.iterdir() if OURS.match(p.name)]
        return max(counts, default=0) + 1

    def _prune(self) -> None:
        """Delete bad and old checkpoints, what failed saves left, and unmentioned segments."""
        wanted: set[str] = set()
        for path in [p for p in self._manifests() if p not in self._bad][-self.keep :]:
            with suppress(CheckpointError):
                body = _read_manifest(path)
                entries = [body["arrays"], *(e for each in body["segments"].values() for e in each)]
                wanted |= {path.name, *(entry["file"] for entry in entries)}
        for path in self.folder.iterdir():
            if OURS.fullmatch(path.name) and path.name not in wanted:
                with suppress(OSError):
                    path.unlink()


def _tensors(tensors: "dict[str, Tensor]") -> Callable[[Path], None]:
    from safetensors.torch import save_file

    return lambda path: save_file(tensors, path)


def _manifest(body: Entry) -> Callable[[Path], None]:
    text = json.dumps(body, allow_nan=False)
    crc = zlib.crc32(text.encode())
    return lambda path: _write(path, f'{{"crc32": {crc}, "manifest": {text}}}\n')


def _read_manifest(path: Path) -> Entry:
    try:
        value = json.loads(path.read_bytes())
        body, crc = value["manifest"], value["crc32"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: not a manifest ({error})") from error
    if zlib.crc32(json.dumps(body, allow_nan=False).encode()) != crc:
        raise CheckpointError(f"{path}: its checksum differs from its contents'")
    if body["format"] != FORMAT:
        raise CheckpointError(f"{path}: format {body['format']}, this version reads {FORMAT}")
    return body


def _write(path: Path, text: str) -> None:
    path.write_text(text)


def _crc32(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            crc = zlib.crc32(chunk, crc)
    return crc


def _fsync(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
