"""Do users keep what they learned? `nested bench users_disk`: kill the process, spoil the files.

A process seats users in batches, changes their states and lets them leave, which puts them on
disk; it prints a line for each batch that is done, round after round, until it is killed with
SIGKILL in the middle of a later round. Everyone is then read back: a state must be the one that
was acknowledged last, or the one in flight, bit for bit. Then bytes of some records are flipped
and the end of a file is cut off: this must cost those users and no other, and be counted. Prints
users a second, of the clock and of the processor, and bytes a user.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from experiments.data.users import UserShards
from nested.users import Users

ROOT = Path(__file__).resolve().parents[2]


class State(NamedTuple):
    """What a user has learned, made up from its id and the round, so that it can be checked."""

    weights: Tensor  # (n, floats) float32
    round: Tensor  # (n,) int64


class Size(NamedTuple):
    """How many users, how many at once, and values in a state; records in a shard."""

    users: int = 100_000
    slots: int = 2048
    floats: int = 1022  # with the round 4096 bytes
    shard: int = 65_536


class Done(NamedTuple):
    """A batch of visits that the writer acknowledged; its clocks in seconds."""

    round: int
    users: int
    wall: float
    processor: float


def state_of(ids: Tensor, rounds: Tensor, floats: int) -> State:
    """Different for every id, round and place."""
    whole = (ids * 7919 + rounds * 104_729)[:, None] + torch.arange(floats) * 31
    return State((whole % (1 << 24)).float(), rounds)


def batches(size: Size) -> Iterator[Tensor]:
    """All ids in turn, `slots` at once."""
    yield from torch.arange(size.users).split(size.slots)


def opened(folder: Path, size: Size) -> tuple[Users, UserShards]:
    """A pool of users and its store."""
    template = state_of(torch.zeros(1).long(), torch.full((1,), -1), size.floats)
    store = UserShards(folder, template, shard=size.shard)
    return Users(template, size.slots, store), store


# ---- the process that is killed ----------------------------------------------------------------
def write(folder: Path, size: Size) -> None:
    """Visits of all users, round after round, for ever; a line on stdout for each batch done."""
    torch.set_num_threads(1)
    users, store = opened(folder, size)
    new = state_of(torch.zeros(1).long(), torch.full((1,), -1), size.floats)
    for number in range(1 << 30):
        for ids in batches(size):
            slots = users.enter(ids, new)
            state = users.gather(slots)
            users.scatter(slots, state_of(ids, state.round + 1, size.floats))
            users.leave(ids)
            print(number, len(ids), time.perf_counter(), time.process_time(), flush=True)
        store.flush()


def killed(folder: Path, size: Size, batch: int, delay: float) -> dict[str, Any]:
    """Run `write` and kill it `delay` seconds after `batch` batches: users done, and a second."""
    words = [sys.executable, "-m", "experiments.benchmarks.users_disk", "--write", str(folder)]
    words += [f"--{name}={value}" for name, value in size._asdict().items()]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    rows: list[Done] = []
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        for line in process.stdout:
            number, users, wall, processor = line.split()
            rows.append(Done(int(number), int(users), float(wall), float(processor)))
            if len(rows) == batch:
                time.sleep(delay)
                process.kill()  # lines that it managed to print after this one are read too
    if process.returncode >= 0:
        raise RuntimeError(f"the writer ended by itself, with code {process.returncode}")
    speed = {
        name: _speed([row for row in rows if (row.round == 0) == first])
        for name, first in (("new", True), ("returning", False))
    }
    return {"done": sum(row.users for row in rows), "users/s": speed}


def _speed(rows: Sequence[Done]) -> dict[str, float]:
    """Users a second, by clock and by processor, between the first and last of these batches."""
    users = sum(row.users for row in rows[1:])
    if not users:
        return {"wall": float("nan"), "processor": float("nan")}
    wall, processor = rows[-1].wall - rows[0].wall, rows[-1].processor - rows[0].processor
    return {"wall": users / wall, "processor": users / processor}


# ---- who is still there ------------------------------------------------------------------------
def acknowledged(size: Size, done: int) -> Tensor:
    """The last round (users,) of each user's visits that was acknowledged, after `done` of all."""
    return (done - 1 - torch.arange(size.users)).div(size.users, rounding_mode="floor")


def differing(
    folder: Path, size: Size, oldest: Tensor, newest: Tensor
) -> tuple[dict[str, Any], Tensor]:
    """Read everyone back: who has not the whole state of one of these rounds (users,).

    Gives what was found, and the round of each user's state.
    """
    rounds = torch.full_like(oldest, -1)
    start = time.perf_counter()
    users, store = opened(folder, size)
    opening = time.perf_counter() - start
    wrong: list[int] = []
    new = state_of(torch.zeros(1).long(), torch.full((1,), -1), size.floats)
    clocks = time.perf_counter(), time.process_time()
    for ids in batches(size):
        state = users.gather(users.enter(ids, new))
        rounds[ids] = state.round
        current = (state.round >= oldest[ids]) & (state.round <= newest[ids])
        expected = state_of(ids, state.round, size.floats).weights
        same = current & (state.weights == expected).all(1)
        wrong += ids[~same].tolist()
        users = Users(new, size.slots, store)  # nobody is put back
    wall, processor = time.perf_counter() - clocks[0], time.process_time() - clocks[1]
    found = {
        "wrong": wrong,
        "lost": store.lost,
        "older": store.older,
        "opening s": opening,
        "read users/s": {"wall": size.users / wall, "processor": size.users / processor},
        "bytes a user": store.bytes,
        "disk bytes a user": disk_bytes(folder) / size.users,
    }
    store.close()
    return found, rounds


def disk_bytes(folder: Path) -> int:
    """What the files take, holes not counted."""
    return sum(path.stat().st_blocks * 512 for path in folder.iterdir())


def spoil(folder: Path, size: Size, flips: int, cut: int, seed: int) -> set[int]:
    """Flip one byte in the records of some users and cut the last ones off; who is hit.

    Who has a former record in a place that was not needed since falls back to it.
    """
    rng = np.random.default_rng(seed)
    _, store = opened(folder, size)
    where = {int(user): store.where(int(user)) for user in range(size.users)}
    store.close()
    last = max(path for path, _ in where.values())
    tail = sorted((at, user) for user, (path, at) in where.items() if path == last)[-cut:]
    hit = {user for _, user in tail} if cut else set()
    others = sorted(set(where) - hit)
    for user in rng.choice(others, flips, replace=False).tolist():
        path, at = where[user]
        at += int(rng.integers(size.floats * 4))
        with path.open("r+b") as file:
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ (1 << int(rng.integers(8)))]))
        hit.add(user)
    if cut:
        os.truncate(last, tail[0][0])
    return hit


# ---- the benchmark -----------------------------------------------------------------------------
def run(folder: Path, size: Size, spoiled: int = 10, seed: int = 0) -> dict[str, Any]:
    """All of it in `folder`; see `passed` for the verdict."""
    a_round = -(-size.users // size.slots)
    rng = np.random.default_rng(seed)
    batch = a_round + int(rng.integers(1, a_round + 1))
    written = killed(folder, size, batch, delay=rng.uniform(0, 0.05))
    oldest = acknowledged(size, written["done"])
    after_kill, rounds = differing(folder, size, oldest, oldest + 1)  # one may be in flight
    hit = spoil(folder, size, spoiled, spoiled, seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they say what is counted here
        after_damage, _ = differing(folder, size, rounds, rounds)
    return {
        "size": size._asdict(),
        "written": written,
        "after the kill": after_kill,
        "spoiled": sorted(hit),
        "after the damage": after_damage,
    }


def passed(result: dict[str, Any]) -> bool:
    """Nobody lost by the kill; of the damage, exactly those who were hit, each counted once."""
    kill, damage = result["after the kill"], result["after the damage"]
    counted = damage["lost"] + damage["older"] == len(result["spoiled"])
    whole = not kill["wrong"] and kill["older"] == 0
    return whole and counted and damage["wrong"] == result["spoiled"]


def table(result: dict[str, Any]) -> str:
    """The result as text."""
    size, written = result["size"], result["written"]
    kill, damage = result["after the kill"], result["after the damage"]
    speed = written["users/s"]
    return "\n".join(
        [
            f"{size['users']:,} users of {kill['bytes a user']} bytes a record, "
            f"{size['slots']} at once; {kill['disk bytes a user']:.0f} bytes a user on disk",
            f"users/s (and by the processor's time): {_shown(speed['new'])} new visits, "
            f"{_shown(speed['returning'])} returning, {_shown(kill['read users/s'])} read back",
            f"killed after {written['done']:,} visits; opened again in {kill['opening s']:.2f} s: "
            f"{len(kill['wrong'])} users differ, {kill['lost']} records lost",
            f"{len(result['spoiled'])} users spoiled (flipped bytes, a cut file): "
            f"{len(damage['wrong'])} differ, {damage['lost']} counted as lost, "
            f"{damage['older']} as fallen back to their former state",
            "passed" if passed(result) else "FAILED",
        ]
    )


def _shown(speed: dict[str, float]) -> str:
    return f"{speed['wall']:,.0f} ({speed['processor']:,.0f})"


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 if nobody lost anything that the damage did not take."""
    args = _arguments(argv)
    size = Size(args.users, args.slots, args.floats, args.shard)
    if args.write:
        write(args.write, size)
    folder = Path(args.folder or tempfile.mkdtemp(prefix="nested-users-"))
    torch.set_num_threads(1)
    result = run(folder / "store", size, args.spoiled, args.seed)
    print(json.dumps(result) if args.json else table(result))
    if args.folder is None:
        shutil.rmtree(folder)
    return 0 if passed(result) else 1


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="nested bench users_disk",
        description="Users' states on disk: a process killed in the middle, files spoiled.",
        epilog="example: nested bench users_disk --users 100000",
    )
    for name, value in Size()._asdict().items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"default {value}")
    parser.add_argument("--spoiled", type=int, default=10, help="users by flips, and as many cut")
    parser.add_argument("--seed", type=int, default=0, help="of the kill and the damage")
    parser.add_argument("--folder", help="keep the store there (default: a temporary folder)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
