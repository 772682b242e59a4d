"""Users on disk: bit for bit after anything, and damage costs those it hits, counted."""

import os
import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from experiments.benchmarks import users_disk
from experiments.data import users as on_disk
from experiments.data.users import UserShards, UserShardsError
from experiments.record import tree
from nested.users import Records, Users, named

KINDS = {
    "float": torch.randn(1, 3, 2),
    "half": torch.randn(1, 5).bfloat16(),
    "count": torch.zeros(1).long(),
    "on": torch.zeros(1, 7).bool(),
}


def records(n: int, generation: int = 0) -> Records:
    """States of n users, all different."""
    fields = {
        "float": torch.randn(n, 3, 2),
        "half": torch.randn(n, 5).bfloat16(),
        "count": torch.randint(-(1 << 62), 1 << 62, (n,)),
        "on": torch.rand(n, 7) < 0.5,
    }
    return Records(fields, torch.arange(n) + generation)


def opened(shard: int = 4, **options) -> UserShards:
    return UserShards(Path("store"), KINDS, shard=shard, **options)


def reopened(store: UserShards, **options) -> UserShards:
    store.close()
    return opened(**options)


def assert_holds(store: UserShards, ids: list, expected: Records, rows: list[int]) -> None:
    """These ids have these rows, and nobody else of the ids has anything."""
    which, found = store.get(ids)
    assert which.tolist() == [i for i, _ in enumerate(ids) if i in rows]
    assert found.generation.tolist() == expected.generation[rows].tolist()
    for name, value in found.fields.items():
        assert value.dtype == expected.fields[name].dtype
        assert torch.equal(value, expected.fields[name][rows])


def flip(store: UserShards, user, offset: int = 0) -> None:
    path, at = store.where(user)
    with path.open("r+b") as file:
        file.seek(at + offset)
        byte = file.read(1)[0]
        file.seek(at + offset)
        file.write(bytes([byte ^ 4]))


def flip_header(store: UserShards, user) -> None:
    path, at = store.where(user)
    shard = next(shard for shard in store._shards if shard.path == path)
    row = (at - int(shard.end(torch.tensor(0).numpy())) + shard.length) // shard.length
    with path.open("r+b") as file:
        file.seek(row * 48 + 11)
        byte = file.read(1)[0]
        file.seek(row * 48 + 11)
        file.write(bytes([byte ^ 4]))


IDS = [1, "1", b"1", -5, 1 << 80, "ünï", 6, 7, 8, 9]


def test_every_dtype_and_id_comes_back_from_memory_and_from_disk():
    store, saved = opened(), records(10, generation=3)
    store.put(IDS, saved)
    assert_holds(store, [*IDS, "unknown"], saved, list(range(10)))
    store = reopened(store)
    assert_holds(store, [*IDS, "unknown"], saved, list(range(10)))
    assert len(store) == 10 and store.lost == 0 and store.bytes == 24 + 10 + 8 + 7 + 48
    assert sorted(p.name for p in Path("store").glob("*.users")) == [
        f"0000{i}.users" for i in range(3)
    ]
    which, nobody = store.get(["unknown"])
    assert len(which) == 0 and nobody.fields["half"].shape == (0, 5)


def test_updates_replace_and_places_are_used_again_after_a_flush():
    store, first, second = opened(shard=8), records(5), records(5)
    store.put(IDS[:5], first)
    store.put(IDS[:3], records(3))
    store.put(IDS[2:7], second)
    new = Records({k: v[:2] for k, v in second.fields.items()}, second.generation[:2])
    for _ in range(10):
        store.flush()
        store.put(IDS[:2], new)
    assert len(store._shards) == 2  # 8 + 8 places for 7 users and what is being replaced
    for again in range(2):
        assert_holds(store, IDS[:2], new, [0, 1])
        assert_holds(store, IDS[2:7], second, [0, 1, 2, 3, 4])
        assert len(store) == 7, f"{again=}"
        store = reopened(store, shard=8)


def test_ids_stand_in_no_name_and_no_file():
    store = opened()
    store.put(["somebody@example.org"], records(1))
    store.close()
    for path in Path("store").iterdir():
        assert b"somebody" not in path.read_bytes() and "somebody" not in path.name


def test_a_flipped_byte_costs_one_user_and_is_counted():
    store, saved = opened(), records(10)
    store.put(IDS, saved)
    flip(store, "1", 20)
    flip_header(store, 8)
    with pytest.warns(RuntimeWarning, match="1 records lost at opening"):
        store = reopened(store)
    assert store.lost == 1 and len(store) == 9
    with pytest.warns(RuntimeWarning, match="1 records lost by a broken record"):
        assert_holds(store, IDS, saved, [0, 2, 3, 4, 5, 6, 7, 9])
    assert store.lost == 2 and store.verify() == 0
    store.put(["1"], Records({k: v[1:2] for k, v in saved.fields.items()}, saved.generation[1:2]))
    assert_holds(store, IDS, saved, [0, 1, 2, 3, 4, 5, 6, 7, 9])


def test_verify_reads_everyone():
    store, saved = opened(), records(10)
    store.put(IDS, saved)
    flip(store, 6)
    flip(store, 9)
    with pytest.warns(RuntimeWarning, match="lost"):
        assert store.verify() == 2
    assert_holds(store, IDS, saved, [0, 1, 2, 3, 4, 5, 7, 8])


def test_a_broken_update_falls_back_to_what_was_flushed():
    store, first, second = opened(shard=32), records(10), records(10)
    store.put(IDS, first)
    store.flush()
    store.put(IDS, second)
    flip(store, 7)
    which, found = store.get([6, 7, 8])
    expected = torch.stack(
        [second.fields["count"][6], first.fields["count"][7], second.fields["count"][8]]
    )
    assert which.tolist() == [0, 1, 2] and torch.equal(found.fields["count"], expected)
    assert (store.older, store.lost) == (1, 0)
    store.put([7], Records({k: v[7:8] for k, v in second.fields.items()}, second.generation[7:8]))
    for _ in range(4):  # the place it fell back to is not given away while it is in use
        store.flush()
        store.put(
            [6, 8],
            Records({k: v[[6, 8]] for k, v in second.fields.items()}, second.generation[[6, 8]]),
        )
    assert_holds(store, IDS, second, list(range(10)))


def test_a_file_that_is_cut_costs_those_beyond_the_cut():
    store, saved = opened(), records(10)
    store.put(IDS, saved)
    path, at = store.where(-5)
    assert path.name == "00000.users"
    store.close()
    os.truncate(path, at + 5)
    with pytest.warns(RuntimeWarning) as warned:
        store = opened()
    assert [f"cut to {at + 5} of {at + 49}" in str(w.message) for w in warned] == [True, False]
    assert store.lost == 1
    assert_holds(store, IDS, saved, [0, 1, 2, 4, 5, 6, 7, 8, 9])
    store.close()
    os.truncate(path, 0)
    with pytest.warns(RuntimeWarning, match="cut to 0"):
        store = opened()
    assert_holds(store, IDS, saved, [4, 5, 6, 7, 8, 9])


def test_rewinds_to_a_mark_and_not_further():
    store, first, second = opened(shard=64, keep=2), records(10), records(10)
    marks = [store.mark()]
    store.put(IDS[:8], Records({k: v[:8] for k, v in first.fields.items()}, first.generation[:8]))
    marks.append(store.mark())
    store.put(IDS, second)
    marks.append(store.mark())
    store.put(IDS, records(10))
    store.put([-1], records(1))
    store = reopened(store, shard=64, keep=2)
    store.rewind(marks[2])
    assert_holds(store, [*IDS, -1], second, list(range(10)))
    store.rewind(marks[1])
    assert_holds(store, IDS, first, list(range(8)))
    store.put(IDS, second)
    store = reopened(store, shard=64, keep=2)
    assert_holds(store, IDS, second, list(range(10)))
    with pytest.raises(UserShardsError, match=f"cannot go back to mark {marks[0]}, only to"):
        store.rewind(marks[0])


def test_the_forgotten_are_wiped_and_stay_away():
    store, saved = opened(shard=32), records(10)
    mark = store.mark()
    for _ in range(2):
        store.put(IDS, saved)
        mark = store.mark()
    store.forget(["1", 9, "unknown"])
    store.rewind(mark)
    assert_holds(store, IDS, saved, [0, 2, 3, 4, 5, 6, 7, 8])
    raw = saved.fields["float"][1].numpy().tobytes()
    assert all(raw not in path.read_bytes() for path in Path("store").glob("*.users"))
    store.put(IDS, saved)
    assert_holds(reopened(store, shard=32), IDS, saved, list(range(10)))


@pytest.mark.parametrize(
    "template, message",
    [
        (
            KINDS | {"half": torch.zeros(1, 6).bfloat16()},
            r"half is .*\[5\]\] on disk and .*\[6\]\]",
        ),
        (KINDS | {"half": torch.zeros(1, 5)}, "half is .*bfloat16.* and .*float32.* now; open it"),
        (KINDS | {"more": torch.zeros(1)}, "more is absent on disk"),
        (dict(reversed(KINDS.items())), "another order"),
    ],
)
def test_other_states_are_refused_with_the_field_and_the_way_out(template, message: str):
    opened().close()
    with pytest.raises(UserShardsError, match=message):
        UserShards(Path("store"), template)
    opened().close()  # and it is not left locked


def test_a_store_is_open_once_and_its_files_are_its_own():
    store = opened()
    with pytest.raises(UserShardsError, match="open elsewhere"):
        opened()
    with pytest.raises(ValueError, match=r"half is torch\.float32"):
        store.put(
            [1], Records(records(1).fields | {"half": torch.zeros(1, 5)}, torch.zeros(1).long())
        )
    with pytest.raises(ValueError, match="2 states of 1 users"):
        store.put([1, 1], records(2))
    store.put([1], records(1))
    store.close()
    Path("store/layout.json").unlink()
    with pytest.raises(UserShardsError, match=r"layout\.json is missing"):
        opened()
    Path("store/layout.json").write_text("{")
    with pytest.raises(UserShardsError, match="is not a layout"):
        opened()


def test_a_full_disk_is_an_error_and_former_states_are_whole(monkeypatch):
    store, first, second = opened(shard=32), records(10), records(10)
    store.put(IDS, first)

    def full(file: int, data: memoryview, offset: int) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(UserShardsError, match=r"cannot write 10 users: .*No space left"):
            store.put(IDS, second)
    assert_holds(store, IDS, first, list(range(10)))
    store.put(IDS, second)
    assert_holds(reopened(store, shard=32), IDS, second, list(range(10)))


def test_a_pool_spills_to_disk_and_its_checkpoint_rewinds_it():
    def visit(users: Users, ids: range) -> list[float]:
        slots = users.enter(list(ids), {"x": torch.zeros(1, 3)})
        state: dict[str, Tensor] = users.gather(slots)
        users.scatter(slots, {"x": state["x"] + torch.tensor(list(ids))[:, None]})
        users.leave(list(ids))
        return state["x"][:, 1].tolist()

    template = {"x": torch.zeros(1, 3)}
    store = UserShards(Path("store"), template, shard=16)
    users = Users(template, 8, store)
    for start in (0, 8, 16, 0):
        visit(users, range(start, start + 8))
    saved = tree.decode(*tree.encode(users.state_dict()))  # as a checkpoint keeps it
    first = [visit(users, range(a, a + 5)) for a in (0, 5, 10, 0)]
    store.close()
    store = UserShards(Path("store"), template, shard=16)
    users = Users(template, 8, store)
    users.load_state_dict(saved)
    assert [visit(users, range(a, a + 5)) for a in (0, 5, 10, 0)] == first
    assert first[0] == [0.0, 2.0, 4.0, 6.0, 8.0] and named(template).keys() == {"x"}


@pytest.mark.parametrize("seed", range(3))
def test_whatever_is_done_it_holds_what_a_dict_would(seed: int, monkeypatch):
    """Puts, flushes, marks, rewinds, forgets, reopenings and crashes in any order."""
    monkeypatch.setattr(os, "fsync", lambda file: None)  # as slow as the disk, and not asked here
    rng, options = random.Random(seed), {"shard": (1, 8, 50)[seed], "keep": (1, 2, 4)[seed]}
    store, model = opened(**options), {}
    marks: dict[int, dict[int, int]] = {}
    for number in range(100):
        ids = rng.sample(range(20), rng.randint(1, 6))
        does = rng.choice(["put"] * 5 + ["flush", "mark", "rewind", "forget", "close", "crash"])
        if does == "put":
            saved = records(len(ids), generation=number)
            saved.fields["count"].copy_(torch.tensor(ids) * 1000 + number)
            store.put(ids, saved)
            model |= {user: user * 1000 + number for user in ids}
        elif does == "flush":
            store.flush()
        elif does == "mark":
            marks[store.mark()] = dict(model)
            marks = dict(sorted(marks.items())[-options["keep"] :])
        elif does == "rewind" and marks:
            mark = rng.choice(list(marks))
            store.rewind(mark)
            model, marks = dict(marks[mark]), {m: users for m, users in marks.items() if m <= mark}
        elif does == "forget":
            store.forget(ids[:2])
            for users in (model, *marks.values()):
                for user in ids[:2]:
                    users.pop(user, None)
        elif does == "close":
            store = reopened(store, **options)
        elif does == "crash":
            os.close(store._lock)
            store = opened(**options)
        which, found = store.get(range(20))
        assert dict(zip(which.tolist(), found.fields["count"].tolist(), strict=True)) == model
        places = [*store._index.values(), *store._free, *(place for _, place in store._replaced)]
        assert sorted(places) == list(range(len(store._shards) * options["shard"]))
    assert (store.lost, store.older, len(store)) == (0, 0, len(model))


def test_killed_in_the_middle_nobody_loses_what_was_acknowledged(tmp_path: Path):
    size = users_disk.Size(users=2000, slots=128, floats=30, shard=512)
    result = users_disk.run(tmp_path / "store", size, spoiled=3, seed=1)
    assert users_disk.passed(result), users_disk.table(result)
    assert result["written"]["done"] > size.users and len(result["spoiled"]) == 6
    assert users_disk.acknowledged(users_disk.Size(users=4), 6).tolist() == [1, 1, 0, 0]
    assert not users_disk.passed(result | {"spoiled": result["spoiled"][1:]})
    kill = result["after the kill"] | {"wrong": [5]}
    assert not users_disk.passed(result | {"after the kill": kill})
    assert "0 users differ" in users_disk.table(result)


def test_keys_differ_by_the_type_of_the_id():
    assert len({on_disk.key_of(user) for user in (1, "1", b"1")}) == 3
