"""Replay: what is kept, where carries come from, uniform draws, no aliases, exact continuation."""

import json
from functools import cache, partial
from typing import Any

import numpy as np
import pytest

from experiments.data.replay import Arrays, Replay
from experiments.envs.adapter import GymEnvs
from experiments.envs.rows import Row
from tests.fakes import telltale_slot, told_seed

SLOTS, LENGTH = 3, 4
KINDS = ("fifo", "reservoir", "mixed", "matching")


def build(kind: Any, capacity: int, seed: int = 0) -> Replay:
    """A replay of chunks of 4 rows; `matching` keeps rollouts of two."""
    return Replay(kind, capacity, LENGTH, seed, rollout=2 * LENGTH if kind == "matching" else 0)


@cache
def row(time: int) -> Row:
    """A row that tells its time and slot in every column."""
    told = time * 10 + np.arange(SLOTS)
    image = (
        np.zeros((SLOTS, 2, 2, 1), np.uint8) + (told % 256).astype(np.uint8)[:, None, None, None]
    )
    flag = np.full(SLOTS, time % 7 == 0)
    return Row(
        obs={"image": image, "told": told[:, None].astype(np.float32)},
        action=np.stack([told, -told], 1).astype(np.float32),
        reward=told.astype(np.float32),
        first=flag,
        terminal=~flag,
        last=~flag,
        user=np.arange(SLOTS) + 100,
    )


@cache
def carry(time: int) -> Arrays:
    return {"latent.deter": (time * 10 + np.arange(SLOTS, dtype=np.float64))[:, None] + 0.5}


def fill(replay: Replay, start: int, stop: int) -> Replay:
    for time in range(start, stop):
        replay.add(row(time), partial(carry, time))
    return replay


def contents(replay: Replay) -> np.ndarray:
    """What the first row of each stored chunk tells, by place."""
    return replay._store["reward"][replay.places(), 0]


def through_json(state: Any) -> Any:
    """What a checkpoint does: arrays stay, everything else passes through JSON."""
    if isinstance(state, dict):
        return {key: through_json(value) for key, value in state.items()}
    return state if isinstance(state, np.ndarray) else json.loads(json.dumps(state))


@pytest.mark.parametrize("kind", KINDS)
def test_a_chunk_is_one_slot_in_order_with_the_carry_before_it(kind: Any):
    replay = fill(build(kind, 40), 0, 90)
    rows, carries = replay.sample(200)
    told = rows["reward"]
    np.testing.assert_array_equal(np.diff(told, axis=1), np.full((200, LENGTH - 1), 10))
    np.testing.assert_array_equal(told[:, 0] // 10 % LENGTH, 0)
    np.testing.assert_array_equal(carries["latent.deter"][:, 0], told[:, 0] + 0.5)
    np.testing.assert_array_equal(rows["obs.told"][..., 0], told)
    np.testing.assert_array_equal(rows["obs.image"][..., 0, 0, 0], told % 256)
    np.testing.assert_array_equal(rows["action"], np.stack([told, -told], -1))
    np.testing.assert_array_equal(rows["user"], told % 10 + 100)
    np.testing.assert_array_equal(rows["first"], told // 10 % 7 == 0)
    np.testing.assert_array_equal(rows["terminal"], told // 10 % 7 != 0)
    assert rows["obs.image"].dtype == np.uint8 and carries["latent.deter"].dtype == np.float64


def test_the_carry_is_read_at_chunk_starts_only():
    asked: list[int] = []
    replay = Replay("fifo", 100, LENGTH)
    for time in range(10):
        replay.add(row(time), lambda time=time: asked.append(time) or carry(time))
    assert asked == [0, 4, 8]


def test_counts_and_readiness():
    replay = Replay("fifo", 50, LENGTH)  # 12 chunks of 4 rows
    assert (len(fill(replay, 0, 3)), replay.frames, replay.ready(1)) == (0, 0, False)
    assert (len(fill(replay, 3, 4)), replay.frames) == (3, 12)
    assert replay.ready(3) and not replay.ready(4)
    assert len(fill(replay, 4, 40)) == 12
    assert replay.ready(1000), "a full replay is ready for any batch"


def test_fifo_keeps_the_newest():
    replay = fill(Replay("fifo", 50, LENGTH), 0, 41)
    assert set(contents(replay) // 10) == {24, 28, 32, 36}


def test_reservoir_keeps_every_chunk_with_equal_probability():
    kept = np.zeros(30)
    for seed in range(150):
        replay = fill(Replay("reservoir", 40, LENGTH, seed), 0, 40)  # 10 of 30 chunks
        index = contents(replay) // 40 * SLOTS + contents(replay) % 10
        assert len(set(index)) == 10
        kept[index.astype(int)] += 1
    expected = 150 * 10 / 30
    assert np.abs(kept - expected).max() < 4.5 * np.sqrt(expected * (2 / 3))
    assert abs(kept[:10].mean() - expected) < 5, "the first chunks fare no better than others"


def test_mixed_is_the_newest_and_a_reservoir_of_everything():
    kept = np.zeros(30)
    for seed in range(100):
        replay = fill(Replay("mixed", 48, LENGTH, seed), 0, 40)  # 6 and 6 of 30 chunks
        index = (contents(replay) // 40 * SLOTS + contents(replay) % 10).astype(int)
        assert sorted(index[:6]) == [24, 25, 26, 27, 28, 29]
        assert len(set(index[6:])) == 6
        kept[index[6:]] += 1
    expected = 100 * 6 / 30
    assert np.abs(kept - expected).max() < 4.5 * np.sqrt(expected * (4 / 5))
    assert abs(kept[:10].mean() - expected) < 5, "old or new makes no difference"


def test_half_of_a_mixed_batch_is_new_and_each_half_is_drawn_evenly():
    replay = fill(Replay("mixed", 44, LENGTH), 0, 90)  # 6 of the newest, 5 of 66
    told = replay.sample(21)[0]["reward"][:, 0]
    assert np.isin(told[:11], contents(replay)[:6]).all()
    assert np.isin(told[11:], contents(replay)[6:]).all()
    told = replay.sample(20_000)[0]["reward"][:, 0]
    for drawn, part in ((told[:10_000], slice(6)), (told[10_000:], slice(6, 11))):
        counts = np.array([np.sum(drawn == one) for one in contents(replay)[part]])
        share = 1 / len(counts)
        assert counts.sum() == 10_000
        assert np.abs(counts - 10_000 * share).max() < 4.5 * np.sqrt(10_000 * share * (1 - share))


def test_a_mixed_replay_fills_both_halves_from_the_first_chunk_on():
    replay = fill(Replay("mixed", 50, LENGTH), 0, LENGTH)
    assert (len(replay), replay.seen, list(replay.places())) == (6, 3, [0, 1, 2, 6, 7, 8])
    assert replay.ready(3) and not replay.ready(4), "a chunk in both halves is one"
    assert len(fill(replay, LENGTH, 40)) == replay.chunks == 12


def rollouts(replay: Replay) -> np.ndarray:
    """Which rollouts of two chunks are kept, in order of their numbers, by place; both chunks."""
    chunk = contents(replay).astype(int)
    time, slot = chunk // 10, chunk % 10
    first, second = time[::2], time[1::2]
    np.testing.assert_array_equal(second, first + LENGTH)
    np.testing.assert_array_equal(slot[1::2], slot[::2])
    return first // (2 * LENGTH) * SLOTS + slot[::2]


def test_matching_keeps_or_drops_whole_rollouts_of_the_newest_and_of_everything():
    kept = np.zeros(30)
    for seed in range(100):
        replay = fill(build("matching", 96, seed), 0, 80)  # 6 and 6 of 30 rollouts
        index = rollouts(replay)
        assert sorted(index[:6]) == [24, 25, 26, 27, 28, 29]
        assert len(set(index[6:])) == 6
        kept[index[6:]] += 1
    expected = 100 * 6 / 30
    assert np.abs(kept - expected).max() < 4.5 * np.sqrt(expected * (4 / 5))
    assert abs(kept[:10].mean() - expected) < 5, "old or new makes no difference"


def test_the_largest_random_keys_are_a_reservoir_in_law():
    """How long a rollout stays: the same for Isele & Cosgun's buffer as for ours."""
    rng, runs, size, seen = np.random.default_rng(0), 400, 4, 12
    stays = np.zeros((2, seen))
    for seed in range(runs):
        keys = rng.random(seen)
        replay = Replay("reservoir", size * LENGTH, LENGTH, seed)
        replay._partial = {"reward": np.zeros((1, LENGTH))}
        for now in range(seen):
            replay._partial["reward"][:] = now
            replay._flush()
            stays[0, contents(replay).astype(int)] += 1
            stays[1, np.argsort(keys[: now + 1])[-size:]] += 1
    np.testing.assert_allclose(stays[0] / runs, stays[1] / runs, atol=0.45)
    assert stays[0, 0] / runs == pytest.approx(size + size * (1 / np.arange(5, 13)).sum(), abs=0.4)


def test_a_matching_batch_comes_from_one_buffer_by_a_fair_coin():
    replay = fill(build("matching", 96), 0, 160)
    new, old = (contents(replay)[part] for part in (slice(0, 12), slice(12, 24)))
    assert not np.isin(new, old).all()
    counts = {"new": 0, "old": 0}
    for _ in range(200):
        told = replay.sample(16)[0]["reward"][:, 0]
        names = [n for n, part in (("new", new), ("old", old)) if np.isin(told, part).all()]
        assert names, "a batch from both"
        counts[names[0]] += 1
    assert abs(counts["new"] - 100) < 4.5 * np.sqrt(50)


def test_a_look_with_another_generator_changes_no_later_sample():
    one, other = (fill(Replay("mixed", 48, LENGTH, seed=3), 0, 40) for _ in range(2))
    looked = other.sample(9, np.random.default_rng(7))[0]["reward"].copy()
    np.testing.assert_array_equal(looked, other.sample(9, np.random.default_rng(7))[0]["reward"])
    np.testing.assert_array_equal(one.sample(9)[0]["reward"], other.sample(9)[0]["reward"])


@pytest.mark.parametrize("kind", KINDS[:2])
def test_draws_are_uniform_over_chunks(kind: Any):
    replay = fill(Replay(kind, 40, LENGTH), 0, 60)
    drawn = replay.sample(20_000)[0]["reward"][:, 0]
    counts = np.array([np.sum(drawn == told) for told in contents(replay)])
    assert counts.sum() == 20_000 and np.abs(counts - 2000).max() < 4.5 * np.sqrt(1800)


def test_batches_alternate_between_two_sets_of_buffers_and_never_alias_the_store():
    replay = fill(Replay("fifo", 40, LENGTH), 0, 40)
    first = replay.sample(5)[0]["reward"]
    kept = first.copy()
    second = replay.sample(5)[0]["reward"]
    np.testing.assert_array_equal(first, kept)
    assert not np.shares_memory(first, second)
    assert replay.sample(5)[0]["reward"] is first
    stored = {name: value.copy() for name, value in replay._store.items()}
    for arrays in replay.sample(5):
        for value in arrays.values():
            value[...] = 0
    for name, value in replay._store.items():
        np.testing.assert_array_equal(value, stored[name])
    assert len(replay.sample(7)[0]["reward"]) == 7


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stop", [2, 4, 19, 30, 41, 66])
def test_restart_is_exact_in_the_middle_of_a_chunk(kind: Any, stop: int):
    replay, log = build(kind, 50, seed=5), []
    for time in range(stop):
        fill(replay, time, time + 1)
        if time % 9 == 8 or time == stop - 1:
            arrays, compact = replay.journal()
            log = ([] if compact else log) + ([] if arrays is None else [arrays])
    state = through_json(replay.state_dict())
    again = build(kind, 50, seed=99)
    again.restore(log)
    again.load_state_dict(state)
    for time in range(stop, stop + 30):
        for one in (replay, again):
            fill(one, time, time + 1)
        if replay.ready(1):
            for ours, theirs in zip(again.sample(6), replay.sample(6), strict=True):
                assert ours.keys() == theirs.keys()
                for name, value in ours.items():
                    np.testing.assert_array_equal(value, theirs[name], name)
        if time % 5 == 0:
            ours, theirs = again.journal(), replay.journal()
            assert ours[1] == theirs[1] and (ours[0] is None) == (theirs[0] is None)


@pytest.mark.parametrize("kind", KINDS)
def test_the_log_is_compacted_beyond_twice_the_capacity(kind: Any):
    replay, log, compactions = build(kind, 50), [], 0
    assert replay.journal() == (None, False)
    for time in range(0, 600, 2 * LENGTH):
        fill(replay, time, time + 2 * LENGTH)
        arrays, compact = replay.journal()
        log = ([] if compact else log) + ([] if arrays is None else [arrays])
        compactions += compact
        assert sum(len(part["place"]) for part in log) <= 2 * 12
        again = build(kind, 50)
        again.restore(log)
        again.seen = replay.seen
        np.testing.assert_array_equal(contents(again), contents(replay))
    assert compactions >= 2
    assert replay.journal() == (None, False)


def test_real_rows_stay_aligned_across_episodes():
    envs, rng = GymEnvs(partial(telltale_slot, 0), SLOTS, "inprocess"), np.random.default_rng(0)
    replay, now = Replay("fifo", 200, 16), envs.reset()
    for _ in range(100):
        replay.add(now, {})
        now = envs.step(envs.random_action(rng))
    rows, carries = replay.sample(50)
    assert carries == {} and rows["first"][:, 1:].any()
    time, first = rows["obs.time"][..., 0], rows["first"]
    np.testing.assert_array_equal(time[:, 1:], np.where(first[:, 1:], 0, time[:, :-1] + 1))
    given = np.where(first, 0, rows["action"].argmax(-1) + 1)
    np.testing.assert_array_equal(rows["obs.action"][..., 0], given)
    seeds = told_seed({"seed": rows["obs.seed"]})
    np.testing.assert_array_equal(seeds[:, 1:] != seeds[:, :-1], first[:, 1:])
    np.testing.assert_array_equal(rows["user"], rows["user"][:, :1].repeat(16, 1))


def test_mistakes_name_the_thing():
    with pytest.raises(ValueError, match="'lifo' is unknown"):
        Replay("lifo", 10, 2)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="3 frames can not hold a chunk of 4"):
        Replay("fifo", 3, 4)
    with pytest.raises(ValueError, match="chunk of 4 rows for each of its 2 parts"):
        Replay("mixed", 7, 4)
    with pytest.raises(ValueError, match="rollout of 6 rows is no number of 4"):
        Replay("matching", 100, 4, rollout=6)
    with pytest.raises(ValueError, match="'each': 2"):
        build("matching", 96).load_state_dict(Replay("matching", 96, LENGTH).state_dict())
    with pytest.raises(RuntimeError, match="replay is empty"):
        Replay("fifo", 10, 2).sample(1)
    state = Replay("fifo", 10, 2).state_dict()
    with pytest.raises(ValueError, match="'length': 2"):
        Replay("fifo", 10, 5).load_state_dict(state)
