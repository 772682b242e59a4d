"""Recorded episodes: written, mapped, sampled without crossing, translated, converted."""

from pathlib import Path

import numpy as np
import pytest

from experiments.config import ConfigError
from experiments.config.models import EnvConfig
from experiments.data.clips import Arrays, Clips, Spec, Writer, record_episodes
from experiments.envs import Row, make_envs
from experiments.policies import noisy
from worldmodel.types import ActionSpec, ObsSpec

SPEC = Spec({"image": ObsSpec("image", (16, 16, 1))}, ActionSpec("discrete", (3,)))
LENGTHS = (5, 2, 7, 3)


def episode(number: int, length: int) -> Arrays:
    """Images and rewards that tell episode and row."""
    row = np.arange(length)
    image = np.broadcast_to((10 * number + row)[:, None, None, None], (length, 16, 16, 1))
    action = np.eye(3, dtype=np.float32)[row % 3] * (row > 0)[:, None]
    reward = (100.0 * number + row).astype(np.float32)
    flags = {"reward": reward, "first": row == 0, "terminal": row == length - 1}
    return {"obs.image": image.astype(np.uint8), "action": action.astype(np.float32), **flags}


@pytest.fixture
def clips() -> Clips:
    with Writer(Path("data"), SPEC, shard=6) as writer:  # three shards
        for number, length in enumerate(LENGTHS):
            writer.add(episode(number, length))
    return Clips.open(Path("data"))


def test_what_was_written_is_read(clips: Clips):
    assert len(clips.columns) == 3 and clips.frames == sum(LENGTHS) and clips.spec == SPEC
    for number, place in enumerate(clips.episodes):
        found, true = clips.read(place, 0, 99), episode(number, LENGTHS[number])
        assert found.pop("labelled").tolist() == [True] * LENGTHS[number]
        assert found.keys() == true.keys()
        for name, column in found.items():
            assert column.dtype == true[name].dtype and np.array_equal(column, true[name])


def test_clips_never_cross_episodes_and_all_are_drawn(clips: Clips):
    found = clips.sample(200, 3, np.random.default_rng(0))
    number, row = np.divmod(found["reward"], 100)
    assert (number == number[:, :1]).all() and (np.diff(row) == 1).all()
    starts = {(int(n), int(r)) for n, r in zip(number[:, 0], row[:, 0], strict=True)}
    assert starts == {(n, r) for n, size in enumerate(LENGTHS) for r in range(size - 2)}
    with pytest.raises(ValueError, match="no episode has 8 rows, the longest has 7"):
        clips.sample(1, 8, np.random.default_rng(0))


def test_packed_rows_cross_only_into_first_rows(clips: Clips):
    found = clips.packed(200, 9, np.random.default_rng(0))
    number, row = np.divmod(found["reward"], 100)
    goes_on = (np.diff(number) == 0) & (np.diff(row) == 1)
    assert np.array_equal(goes_on, ~found["first"][:, 1:])
    ended = np.array(LENGTHS)[number.astype(int)] - 1 == row
    assert np.array_equal(ended[:, :-1], found["first"][:, 1:])
    assert {*zip(number[:, 0], row[:, 0], strict=True)} == {
        (n, r) for n, size in enumerate(LENGTHS) for r in range(size)
    }


def test_rows_may_favour_labelled_episodes(clips: Clips):
    marked = [e._replace(labelled=i == 1) for i, e in enumerate(clips.episodes)]
    half = Clips(clips.spec, marked, clips.columns)

    def drawn(which: Clips) -> dict[str, np.ndarray]:
        return which.packed(8, 4, np.random.default_rng(0))

    found = drawn(half.favour(0.5))["labelled"]
    assert found[4:].all() and not found[:4].all()
    everywhere = half.packed(4, 4, np.random.default_rng(0))["labelled"]
    assert np.array_equal(found[:4], everywhere)  # the others are drawn as ever
    unknown = Clips(clips.spec, [e._replace(labelled=False) for e in marked], clips.columns)
    for same, plain in ((half.favour(0.0), half), (unknown.favour(1.0), unknown)):
        pairs = zip(drawn(same).items(), drawn(plain).items(), strict=True)
        assert all(a == c and np.array_equal(b, d) for (a, b), (c, d) in pairs)


def test_held_out_and_best_episodes(clips: Clips):
    kept, held = clips.split(2)
    assert [e.length for e in kept.episodes] == [5, 7] and held.frames == 5
    assert [e.length for e in clips.best(0.5).episodes] == [7, 3]  # of the highest returns


def test_data_sets_are_joined_and_keep_their_episodes(clips: Clips):
    with Writer(Path("more"), SPEC) as writer:
        writer.add(episode(9, 4))
    both = Clips.join([clips, Clips.open(Path("more"))])
    assert both.frames == clips.frames + 4 and len(both.episodes) == 5
    assert both.read(both.episodes[-1], 0, 9)["reward"].tolist() == [900, 901, 902, 903]
    assert both.read(both.episodes[2], 0, 9)["reward"][0] == 200
    other = Spec(SPEC.obs, ActionSpec("discrete", (4,)))
    with pytest.raises(ConfigError, match="different rows"):
        Clips.join([clips, Clips(other, clips.episodes, clips.columns)])


def test_every_slot_gives_as_many_episodes_however_long_they_are():
    config = EnvConfig(id="Recipes-v0", num=2, workers="inprocess", image_size=16, time_limit=4)
    envs = make_envs(config, seed=0)
    seen: list[np.ndarray] = []

    def still(row: Row) -> np.ndarray:
        seen.append(row.first)
        return np.eye(6, dtype=np.float32)[[0, 0]]

    policy = noisy(still, envs, 0.5, np.random.default_rng(0))
    found = Clips.open(record_episodes(envs, policy, 3, "acted"))
    assert found.lengths.tolist() == [5] * 4  # two each, not three of the faster
    moves = np.concatenate([found.read(e, 1, 9)["action"] for e in found.episodes]).argmax(1)
    assert (moves == 0).any() and (moves > 0).any() and len(seen) == 9


def test_a_translated_column_stands_beside_the_others(clips: Clips):
    def change(columns: Arrays, begins: bool) -> np.ndarray:
        begun.append(begins)
        return columns["reward"] * 2

    begun: list[bool] = []
    found = clips.translate(Path("more"), "double", 4, change)
    assert begun == [True, False, True, False, True]  # shards of 7, 7 and 3 rows
    rows = found.packed(3, 4, np.random.default_rng(0))
    assert np.array_equal(rows["double"], rows["reward"] * 2)
    clips.translate(Path("more"), "double", 4, lambda *_: pytest.fail("it is there already"))


def test_an_episode_comes_in_parts_and_one_that_breaks_off_leaves_nothing():
    def parts(number: int, length: int, breaks: bool = False):
        whole = episode(number, length)
        for at in range(0, length, 2):
            yield {k: v[at : at + 2] for k, v in whole.items()}
        if breaks:
            raise OSError("gone")

    with Writer(Path("parts"), SPEC, shard=6) as writer:
        assert writer.extend(parts(0, 3)) == 3 and writer.extend(iter([])) == 0
        with pytest.raises(OSError, match="gone"):
            writer.extend(parts(7, 9, breaks=True))
        assert [writer.extend(parts(number, 3)) for number in (1, 2)] == [3, 3]
    clips = Clips.open(Path("parts"))
    assert [len(one["first"]) for one in clips.columns] == [6, 3] and len(clips.episodes) == 3
    for number, place in enumerate(clips.episodes):
        found, true = clips.read(place, 0, 9), episode(number, 3)
        assert all(np.array_equal(found[name], true[name]) for name in true)
    whole = np.load("parts/00000/obs.image.npy")  # as any other reader finds it
    assert whole.shape == (6, 16, 16, 1) and whole.dtype == np.uint8
    with pytest.raises(OSError), Writer(Path("gone"), SPEC) as writer:
        writer.extend(parts(0, 4, breaks=True))
    assert not [path for path in Path("gone").rglob("*") if path.is_file()]


def test_episodes_of_unknown_actions_say_so_in_every_row():
    with Writer(Path("seen"), SPEC, shard=4) as writer:
        writer.add(episode(0, 4))
        writer.extend([episode(1, 3)], labelled=False)
        writer.add(episode(2, 2))
    clips = Clips.open(Path("seen"))
    assert [place.labelled for place in clips.episodes] == [True, False, True]
    rows = clips.packed(100, 5, np.random.default_rng(0))
    assert rows["labelled"].dtype == bool and rows["labelled"].shape == (100, 5)
    assert np.array_equal(rows["labelled"], rows["reward"] // 100 != 1)
    rows = clips.sample(100, 2, np.random.default_rng(0))
    assert np.array_equal(rows["labelled"], rows["reward"] // 100 != 1)
    assert not rows["labelled"].all() and rows["labelled"].any()
    assert [place.length for place in clips.best(1.0).episodes] == [4, 2]  # their rewards are known
    only = Clips(clips.spec, clips.episodes[1:2], clips.columns)
    assert only.best(1.0).episodes == only.episodes  # there are no better ones
    both = Clips.join([only, clips])
    assert [place.labelled for place in both.episodes] == [False, True, False, True]


def test_damage_is_told_and_other_files_are_not_read(clips: Clips):
    np.save("data/00000/obs.old.npy", np.zeros(3))
    assert Clips.open(Path("data")).columns[0].keys() == clips.columns[0].keys()
    Path("data/00001/reward.npy").write_bytes(b"no array")
    with pytest.raises(ConfigError, match="shard 00001 is damaged"):
        Clips.open(Path("data"))


def test_half_an_episode_and_half_a_data_set_are_refused():
    writer = Writer(Path("broken"), SPEC)
    with pytest.raises(ValueError, match="`first` in its first row"):
        writer.add({k: v[1:] for k, v in episode(0, 4).items()})
    with pytest.raises(ValueError, match="an episode has"):
        writer.add({"reward": np.zeros(3)})
    with pytest.raises(ValueError, match="of one length"):
        writer.add(episode(0, 4) | {"reward": np.zeros(3, np.float32)})
    writer.add(episode(0, 4))
    with pytest.raises(
        ValueError, match=r"rows of reward are float64 \(\), those before are float32"
    ):
        writer.add(episode(0, 4) | {"reward": np.zeros(4)})
    with pytest.raises(ConfigError, match="no data set"):
        Clips.open(Path("broken"))
    writer.close()
    assert Clips.open(Path("broken")).frames == 4
    with pytest.raises(ConfigError, match="holds a data set"):
        Writer(Path("broken"), SPEC)
