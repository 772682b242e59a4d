"""Checkpoints: bit-exact round trips, every fault at every step of a save, fallback, kills."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from experiments.record import CheckpointError, Checkpoints
from experiments.record import checkpoint as module

DTYPES = [
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64),
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint16, torch.uint32, torch.uint64),
]


def same(a: Any, b: Any) -> bool:
    """Equal in type, structure and every bit."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        bits = (a.contiguous().view(-1), b.contiguous().view(-1))
        alike = a.dtype == b.dtype and a.shape == b.shape
        return alike and bits[0].numpy(force=True).tobytes() == bits[1].numpy().tobytes()
    if isinstance(a, np.ndarray | np.generic):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or (a != a and b != b)


def round_trip(folder: Path, state: Any) -> Any:
    Checkpoints(folder).save(1, state)
    loaded = Checkpoints(folder).load()
    assert loaded is not None
    return loaded.state


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0, 3), (3, 2)], ids=str)
def test_tensors_come_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]):
    tensor = (torch.randn(shape, dtype=torch.float64) * 100).abs().to(dtype)
    back = round_trip(tmp_path, {"x": tensor})["x"]
    assert back.dtype == dtype and back.shape == shape
    assert torch.equal(
        back.view(torch.uint8) if shape else back, tensor.view(torch.uint8) if shape else tensor
    )


STATE = {
    "scalars": [1, -0.0, 0.1, 1e-310, math.inf, -math.inf, math.nan, True, None, "ü$", 2**127 + 1],
    "empty": [{}, [], (), ""],
    "optimizer": {
        "state": {0: {"step": torch.tensor(3.0)}, 1: {}},
        "groups": [{"betas": (0.9, 1)}],
    },
    "numpy": [np.arange(6, dtype=np.uint8).reshape(2, 3), np.float32(0.1), np.array(True)],
    "generators": np.random.default_rng(1).bit_generator.state,
    "twister": np.random.MT19937(3).state,
    "torch": torch.Generator().manual_seed(4).get_state(),
    "$": {"a.b": torch.zeros(1), "a": {"b": torch.ones(1)}},
}


def test_a_whole_state_comes_back_exactly(tmp_path: Path):
    assert same(round_trip(tmp_path, STATE), STATE)


def test_shared_views_and_strided_tensors_come_back(tmp_path: Path):
    base = torch.arange(12.0).view(3, 4)
    parameter = torch.nn.Parameter(base)
    array = np.arange(12).reshape(3, 4)
    state = [base, base[1], base.T, base[:, 1], parameter, parameter.data, array.T, array[::2]]
    back = round_trip(tmp_path, state)
    for given, found in zip(state, back, strict=True):
        values = given.detach() if isinstance(given, Tensor) else given
        assert (found == values).all() and found.shape == values.shape
    back[0].zero_()  # what was loaded shares nothing with its neighbours or the file
    assert back[1].sum() == 22 and same(Checkpoints(tmp_path).load().state[0], base)  # pyright: ignore


def test_a_tensor_stored_twice_stays_one(tmp_path: Path):
    weight = torch.ones(3)
    back = round_trip(tmp_path, {"a": weight, "b": weight})
    assert back["a"] is back["b"]


class Pair(NamedTuple):
    a: int
    b: int


def test_named_tuples_come_back_as_tuples(tmp_path: Path):
    assert round_trip(tmp_path, Pair(1, 2)) == (1, 2)


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"a": {"b": object()}}, r"state\.a\.b: a object"),
        ({"a": [np.array(["x"])]}, r"state\.a\.0: numpy dtype"),
        ({"a": {1, 2}}, r"state\.a: a set"),
        ({"a": torch.eye(2).to_sparse()}, r"state\.a: a torch.sparse_coo"),
    ],
)
def test_what_cannot_be_exact_is_refused_by_name(tmp_path: Path, state: Any, words: str):
    with pytest.raises(TypeError, match=words):
        Checkpoints(tmp_path).save(1, state)
    assert Checkpoints(tmp_path).load() is None


# ------------------------------------------------------------------ segments and retention


def rows(start: int, stop: int) -> dict[str, np.ndarray]:
    return {"frame": np.arange(start, stop), "done": np.zeros(stop - start, bool)}


def frames(folder: Path, name: str = "journal") -> list[int]:
    loaded = Checkpoints(folder).load()
    assert loaded is not None
    return [int(i) for segment in loaded.segments.get(name, []) for i in segment["frame"]]


def test_segments_are_written_once_and_replaced_on_request(tmp_path: Path):
    store = Checkpoints(tmp_path, keep=1)
    store.save(10, {}, append={"journal": rows(0, 4)})
    first = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*journal*")}
    store.save(20, {}, append={"journal": rows(4, 6), "other": rows(0, 1)})
    assert {
        p.name: p.stat().st_mtime_ns for p in tmp_path.glob("*journal*")
    }.items() >= first.items()
    store.save(30, {})
    assert frames(tmp_path) == [0, 1, 2, 3, 4, 5] and frames(tmp_path, "other") == [0]
    store.save(40, {}, append={"journal": rows(2, 6)}, replace={"journal"})
    assert frames(tmp_path) == [2, 3, 4, 5] and frames(tmp_path, "other") == [0]
    assert len([*tmp_path.glob("*journal*")]) == 1
    store.save(50, {}, replace={"other"})
    assert frames(tmp_path, "other") == []


def test_resumed_segments_go_on_where_the_loaded_checkpoint_ends(tmp_path: Path):
    Checkpoints(tmp_path).save(1, {}, append={"journal": rows(0, 2)})
    store = Checkpoints(tmp_path)
    store.load()
    store.save(2, {}, append={"journal": rows(2, 3)})
    assert frames(tmp_path) == [0, 1, 2]


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_stay_and_nothing_else(tmp_path: Path, keep: int):
    store = Checkpoints(tmp_path, keep)
    for step in range(5):
        store.save(step, {"a": torch.tensor(step)})
    assert len([*tmp_path.glob("*.json")]) == len([*tmp_path.glob("*.safetensors")]) == keep
    (tmp_path / "notes.txt").write_text("mine")
    store.save(4, {})  # the same step again
    assert len([*tmp_path.glob("*.json")]) == keep and (tmp_path / "notes.txt").exists()


def test_saving_over_checkpoints_that_were_not_loaded_is_refused(tmp_path: Path):
    Checkpoints(tmp_path).save(1, {})
    with pytest.raises(CheckpointError, match=r"load\(\) before"):
        Checkpoints(tmp_path).save(2, {})


def test_no_folder_is_no_checkpoint(tmp_path: Path):
    assert Checkpoints(tmp_path / "none").load() is None
    with pytest.raises(ValueError, match="keep is 0"):
        Checkpoints(tmp_path, keep=0)


# ------------------------------------------------------------------ damage


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "flip": flip,
    "cut": cut,
    "empty": lambda path: path.write_bytes(b""),
    "gone": Path.unlink,
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("kind", [".json", "-2.safetensors", "-2.journal.safetensors"])
def test_a_damaged_file_is_named_and_the_previous_checkpoint_loads(
    tmp_path: Path, damage: str, kind: str
):
    store = Checkpoints(tmp_path)
    for step in (1, 2):
        state = {"a": torch.full((9,), step), "n": step * 1000}
        store.save(step, state, append={"journal": rows(step, step + 1)})
    if damage == "gone" and kind == ".json":
        pytest.skip("without its manifest a checkpoint never was")
    [target] = tmp_path.glob(f"000002*{kind}")
    DAMAGE[damage](target)
    again = Checkpoints(tmp_path)
    with pytest.warns(RuntimeWarning, match=f"step 1: .*{target.name}"):
        loaded = again.load()
    assert loaded is not None and loaded.step == 1 and loaded.state["n"] == 1000
    again.save(2, {"n": 7}, append={"journal": rows(2, 3)})  # the bad one goes, the good one stays
    assert frames(tmp_path) == [1, 2]
    assert sorted(
        json.loads(p.read_text())["manifest"]["step"] for p in tmp_path.glob("*.json")
    ) == [
        1,
        2,
    ]


def test_all_bad_is_an_error_that_names_the_files(tmp_path: Path):
    store = Checkpoints(tmp_path)
    store.save(1, {})
    store.save(2, {})
    for path in tmp_path.glob("*.json"):
        flip(path)
    with pytest.raises(CheckpointError, match=r"000002-2\.json.*000001-1\.json"):
        Checkpoints(tmp_path).load()


# ------------------------------------------------------------------ faults and kills


class Faulty:
    """Makes the nth operation on files fail, half done where it can be half done."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, nth: int) -> None:
        self.left = nth
        import safetensors.torch as library

        monkeypatch.setattr(library, "save_file", self.wrap(library.save_file, self.half_file))
        monkeypatch.setattr(module, "_write", self.wrap(module._write, self.half_text))
        monkeypatch.setattr(os, "fsync", self.wrap(os.fsync))
        monkeypatch.setattr(os, "replace", self.wrap(os.replace))

    def wrap(self, call: Callable[..., Any], half: Callable[..., None] | None = None) -> Any:
        def operation(*args: Any) -> Any:
            self.left -= 1
            if self.left == 0:
                if half is not None:
                    half(*args)
                raise OSError(28, "No space left on device")
            return call(*args)

        return operation

    @staticmethod
    def half_file(tensors: Any, path: Path) -> None:
        path.write_bytes(b"\x08\x00\x00")

    @staticmethod
    def half_text(path: Path, text: str) -> None:
        path.write_text(text[: len(text) // 2])


def test_a_fault_at_any_operation_leaves_a_whole_checkpoint(tmp_path: Path):
    faults = 0
    for nth in range(1, 100):
        folder = tmp_path / str(nth)
        store = Checkpoints(folder)
        store.save(1, {"a": torch.ones(3)}, append={"journal": rows(0, 2)})
        with pytest.MonkeyPatch.context() as patch:
            fault = Faulty(patch, nth)
            try:
                store.save(2, {"a": torch.zeros(3)}, append={"journal": rows(2, 4)})
            except CheckpointError as error:
                faults += 1
                assert "No space left" in str(error)
        loaded = Checkpoints(folder).load()
        assert loaded is not None and loaded.step in (1, 2)
        assert frames(folder) == [0, 1, 2, 3][: 2 * loaded.step]
        assert loaded.state["a"].sum() == (3 if loaded.step == 1 else 0)
        if fault.left > 0:
            break
        store.save(3, {"a": torch.zeros(3)}, append={"journal": rows(2, 4)})  # the same rows again
        assert frames(folder) == [0, 1, 2, 3]
        mentioned = [p for p in folder.iterdir() if p.suffix == ".tmp"]
        assert not mentioned
    assert faults == 12  # three files: write, fsync, rename, fsync of the folder


KILLS = """
import os, random, signal, sys, time, warnings
from pathlib import Path
import torch
from experiments.record import Checkpoints

def save_for_ever(folder):
    store = Checkpoints(folder)
    loaded = store.load()
    step = loaded.step if loaded else 0
    while True:
        step += 1
        rows = {"frame": torch.tensor([step]).numpy()}
        store.save(step, {"a": torch.full((60_000,), step)}, append={"journal": rows})

torch.set_num_threads(1)
warnings.simplefilter("error", RuntimeWarning)
folder, kills, last = Path(sys.argv[1]), int(sys.argv[2]), 0
draw = random.Random(kills)
for _ in range(kills):
    child = os.fork()
    if child == 0:
        save_for_ever(folder)
    time.sleep(draw.uniform(0.01, 0.15))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    loaded = Checkpoints(folder).load()
    if loaded is not None:
        frames = [int(i) for segment in loaded.segments["journal"] for i in segment["frame"]]
        assert frames == list(range(1, loaded.step + 1)), (frames, loaded.step)
        assert loaded.step >= last and (loaded.state["a"] == loaded.step).all()
        last = loaded.step
print(last)
"""


@pytest.mark.parametrize("kills", [5, pytest.param(100, marks=pytest.mark.slow)])
def test_killed_at_any_moment_it_loads_whole(tmp_path: Path, kills: int):
    command = [sys.executable, "-c", KILLS, str(tmp_path), str(kills)]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert int(found.stdout) > 0
