"""Users on disk, killed and then spoiled: who is hit is counted once, and nobody else."""

import os
from pathlib import Path

import pytest
import torch

from experiments.benchmarks import users_disk
from experiments.data.users import UserShards
from nested.users import Records, named
from tests.experiments.test_users_disk import assert_holds, opened, records, reopened


def cut_short(monkeypatch, store: UserShards, ids: list, saved: Records, writes: int) -> None:
    """A put that the process does not survive: after so many writes to disk, half of one more."""
    real, left = os.pwrite, iter(range(writes))

    def pwrite(file: int, data: memoryview, offset: int) -> int:
        if next(left, None) is not None:
            return real(file, data, offset)
        real(file, data[: len(data) // 2], offset)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", pwrite)
        with pytest.raises(KeyboardInterrupt):
            store.put(ids, saved)
    os.close(store._lock)


def some(saved: Records, rows: list[int]) -> Records:
    return Records({k: v[rows] for k, v in saved.fields.items()}, saved.generation[rows])


def test_a_cut_costs_nobody_whose_state_lay_elsewhere(monkeypatch):
    first, second, third = records(8), records(8), records(8)
    store, ids = opened(shard=8), list(range(8))
    store.put(ids, first)  # file 0
    store.put(ids, second)  # file 1
    store.flush()
    store.put([0, 1], some(third, [0, 1]))  # in place of the first states of 6 and 7
    cut_short(monkeypatch, store, [0, 1], some(first, [0, 1]), writes=0)  # and over that of 4
    os.truncate("store/00001.users", 4096)  # no payload is left
    with pytest.warns(RuntimeWarning) as warned:
        store = opened(shard=8)
    assert ["3 records lost" in str(w.message) for w in warned] == [False, True]
    assert (store.lost, store.older, len(store)) == (3, 3, 5)
    for _ in range(2):
        assert_holds(store, [0, 1, 4, 6, 7], some(third, [0, 1]), [0, 1])
        assert_holds(store, [2, 3, 5], some(first, [2, 3, 5]), [0, 1, 2])
        store = reopened(store, shard=8)
        assert store.verify() == 0 and (store.lost, store.older, len(store)) == (0, 0, 5)


def test_a_cut_is_counted_where_a_rewind_goes_back_to_it():
    store, first = opened(shard=8), records(8)
    store.put(list(range(8)), first)
    mark = store.mark()
    store.put(list(range(8)), records(8))
    store.close()
    os.truncate("store/00000.users", 4096 + 5 * (store.bytes - 48))  # five whole payloads
    with pytest.warns(RuntimeWarning, match="is cut to"):
        store = opened(shard=8)
    assert (store.lost, store.older, store.verify()) == (0, 0, 0)
    store.rewind(mark)
    with pytest.warns(RuntimeWarning, match="1 records lost by a broken record"):
        assert store.get([7, 0, 7])[0].tolist() == [1]  # asked for twice, lost once
    with pytest.warns(RuntimeWarning, match="2 records lost by a broken record"):
        assert_holds(store, list(range(8)), first, list(range(5)))
    assert (store.lost, store.older, len(store)) == (3, 0, 5)


@pytest.mark.parametrize("done, writes", [(26, 3), (38, 1), (39, 0), (39, 1)])
def test_a_kill_at_the_end_of_a_round_changes_no_count(
    done: int, writes: int, monkeypatch, tmp_path: Path
):
    """Batches of 13 a round: the last one of a round, or the first of the next, is cut short."""

    def stopped(folder: Path, size: users_disk.Size, batch: int, delay: float) -> dict:
        store = users_disk.opened(folder, size)[1]
        for number in range(done + 1):
            if number and number % 13 == 0:
                store.flush()
            ids = list(users_disk.batches(size))[number % 13]
            rounds = torch.full_like(ids, number // 13)
            state = users_disk.state_of(ids, rounds, size.floats)
            saved = Records(named(state), torch.zeros(len(ids)).long())
            if number < done:
                store.put(ids.tolist(), saved)
            else:
                cut_short(monkeypatch, store, ids.tolist(), saved, writes)
        speed = {"wall": 1.0, "processor": 1.0}
        visits = done // 13 * size.users + done % 13 * size.slots
        return {"done": visits, "users/s": {"new": speed, "returning": speed}}

    monkeypatch.setattr(users_disk, "killed", stopped)
    size = users_disk.Size(users=200, slots=16, floats=6, shard=64)
    result = users_disk.run(tmp_path / "store", size, spoiled=3, seed=done)
    assert users_disk.passed(result), users_disk.table(result)
