"""Videos become clips: frames and what led into them, labelled or not, in flat memory."""

import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from experiments.config import ConfigError
from experiments.data import video
from experiments.data.clips import Arrays, Clips
from experiments.data.convert import convert
from experiments.data.source import KEEP, Options
from experiments.data.video import point
from tests.experiments.test_ticks import tick, written
from worldmodel.types import ActionSpec, ObsSpec

av = pytest.importorskip("av")
CODECS = {".mp4": "libx264", ".mkv": "libx264", ".avi": "mpeg4", ".webm": "libvpx"}
SMALL = Options(size=(16, 16))


def film(name: str, frames: int, shape: tuple[int, int] = (32, 48), rate: int = 20) -> Path:
    """A video whose frames get brighter: frame t is of 4 t, up to 252."""
    path = Path("films") / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(CODECS[path.suffix], rate=rate)
        stream.height, stream.width = shape
        stream.pix_fmt, stream.bit_rate = "yuv420p", 4_000_000
        stream.codec_context.thread_count = 1
        for t in range(frames):
            grey = np.full((*shape, 3), 4 * (t % 64), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        container.mux(stream.encode())
    return path


def lines(name: str, count: int, **more: Sequence) -> None:
    """Plain lines: action t % 3, and the other fields as given."""
    rows = [{"action": t % 3} | {k: v[t] for k, v in more.items()} for t in range(count)]
    written(rows, f"films/{name}.jsonl")


def converted(options: Options = SMALL) -> tuple[Clips, list[Arrays]]:
    """The data set of films/, and the rows of its episodes."""
    clips = Clips.open(convert("films", Path("out"), options))
    return clips, [clips.read(e, 0, e.length) for e in clips.episodes]


def numbers(rows: Arrays) -> list[int]:
    """Which frames these rows show."""
    assert rows["obs.image"].dtype == np.uint8
    return np.rint(rows["obs.image"].mean((1, 2, 3)) / 4).astype(int).tolist()


def chosen(rows: Arrays) -> list[int]:
    """The action of each row but the first, which has none."""
    assert not rows["action"][0].any() and (rows["action"][1:].sum(1) == 1).all()
    return rows["action"][1:].argmax(1).tolist()


@pytest.mark.parametrize("kind", CODECS)
def test_a_row_has_its_frame_and_what_was_done_at_the_one_before(kind: str):
    film(f"a{kind}", 8)
    lines("a", 8, reward=range(8))
    clips, (rows,) = converted()
    assert clips.spec.obs == {"image": ObsSpec("image", (16, 16, 3))}
    assert clips.spec.action == ActionSpec("discrete", (3,)) and clips.episodes[0].labelled
    # The last line has a reward, so a row of its own; there is no frame that shows where it led.
    assert numbers(rows) == [*range(8), 7] and chosen(rows) == [0, 1, 2, 0, 1, 2, 0, 1]
    assert rows["reward"].tolist() == [0, 0, 1, 2, 3, 4, 5, 6, 7] and not rows["terminal"].any()
    assert rows["first"].tolist() == [True] + [False] * 8


def test_a_frame_more_than_lines_shows_where_the_last_led():
    film("a.mp4", 6)
    lines("a", 5, terminal=[False] * 4 + [True])
    _, (rows,) = converted()
    assert numbers(rows) == [*range(6)] and rows["terminal"].tolist() == [False] * 5 + [True]


def test_a_last_line_that_gave_nothing_is_no_row():
    film("a.mp4", 6)
    lines("a", 6)
    _, (rows,) = converted()
    assert numbers(rows) == [*range(6)] and chosen(rows) == [0, 1, 2, 0, 1]


def test_a_video_alone_is_an_episode_of_unknown_actions():
    film("a.mp4", 5)
    film("deep/b.mp4", 7)
    lines("a", 5)
    clips, (known, unknown) = converted()
    assert [place.labelled for place in clips.episodes] == [True, False]
    assert numbers(unknown) == [*range(7)] and not unknown["action"].any()
    assert known["labelled"].all() and not unknown["labelled"].any()
    Path("films/a.mp4").unlink()
    told: list[str] = []
    wide = SMALL._replace(like=Path("out"), every=3)
    alone = Clips.open(convert("films", Path("alone"), wide, told.append))
    assert alone.spec == clips.spec  # so both can be joined
    assert numbers(alone.read(alone.episodes[0], 0, 9)) == [0, 3, 6]
    assert told == ["a.jsonl has no video beside it"]


@pytest.mark.parametrize("options", [SMALL._replace(every=3), SMALL._replace(fps=10.0)])
def test_frames_are_left_out_and_what_was_done_there_is_not(options: Options):
    film("a.mp4", 8, rate=30)
    lines("a", 8, reward=[1] * 8, terminal=[False] * 7 + [True])
    _, (rows,) = converted(options)
    assert numbers(rows) == [0, 3, 6, 7]  # the end is never left out
    assert chosen(rows) == [0, 0, 0] and rows["reward"].tolist() == [0, 3, 3, 2]
    assert rows["terminal"].tolist() == [False, False, False, True]


def test_a_rate_that_does_not_divide_keeps_as_many_frames_as_it_says():
    film("a.mp4", 41, rate=20)
    _, (rows,) = converted(SMALL._replace(fps=8.0))
    assert numbers(rows) == [0, 3, 5, 8, 10, 13, 15, 18, 20, 23, 25, 28, 30, 33, 35, 38, 40]
    with pytest.raises(ConfigError, match=r"--fps = 25.0\na.mp4 has 20 frames a second"):
        convert("films", Path("other"), Options(fps=25.0))


def test_images_are_resized_by_area_or_kept():
    film("a.mp4", 2, (32, 48))
    film("b.mp4", 2, (32, 48))
    assert converted(Options(size=KEEP))[0].spec.obs["image"].shape == (32, 48, 3)
    found = Clips.open(convert("films", Path("wide"), Options(size=(8, 12))))
    assert found.columns[0]["obs.image"].shape == (4, 8, 12, 3)
    film("b.mp4", 2, (48, 32))
    with pytest.raises(ConfigError, match=r"a.mp4 is \(32, 48\), b.mp4 \(48, 32\)\ngive a size"):
        convert("films", Path("other"), Options(size=KEEP))


def test_contractors_recordings_lose_their_idle_frames_if_asked():
    film("6.9/a.mp4", 6)
    ticks = [tick(), tick("w"), tick(), tick(), tick(dx=4.0), tick("w")]
    written(ticks, "films/6.9/a.jsonl")
    clips, (rows,) = converted()
    assert clips.spec.action == ActionSpec("discrete", (2,) * 23 + (121,))
    forward = rows["action"][:, 7]  # pressed, of the fourth key
    assert numbers(rows) == [*range(6)] and forward.tolist() == [0, 0, 1, 0, 0, 0]
    assert rows["action"][5, 46:].argmax() == 60 + 1
    fewer = Clips.open(convert("films", Path("busy"), SMALL._replace(drop_null=True)))
    rows = fewer.read(fewer.episodes[0], 0, 9)
    assert numbers(rows) == [1, 4, 5] and rows["action"][:, 7].tolist() == [0, 1, 0]


def test_the_cursor_of_a_menu_is_drawn():
    film("a.mp4", 2, (96, 128))
    written([tick(), tick(isGuiOpen=True, x=360.0, y=360.0)], "films/a.jsonl")
    _, (rows,) = converted(Options(size=KEEP))
    assert rows["obs.image"][0].max() < 20 and (rows["obs.image"][1] == 255).any()
    found = np.argwhere(rows["obs.image"][1][..., 0] == 255)
    assert found.min(0).tolist() == [48, 48]
    picture = np.zeros((20, 20, 3), np.uint8)
    point(picture, np.array([2.0, 2.0]))  # outside
    assert not picture.any()


def test_memory_does_not_grow_with_the_video(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(video, "BLOCK", 8)

    def peak(name: str, frames: int) -> int:
        film(f"{name}.mp4", frames, (96, 96))
        tracemalloc.start()
        convert("films", Path(name), Options(size=KEEP))
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        Path(f"films/{name}.mp4").unlink()
        return found

    first, frame = peak("warm", 2), 96 * 96 * 3
    short, long = peak("short", 32), peak("long", 128)
    assert first < short < 32 * frame  # a few blocks
    assert long < 1.2 * short < 128 * frame / 2


def spoiled(path: Path, share: float) -> None:
    """The file with its end cut off."""
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])


def test_mistakes_name_the_file_and_the_way_out():
    for name, frames, count in (("a", 4, 4), ("b", 9, 6), ("c", 5, None), ("d", 3, 3)):
        film(f"{name}.mp4", frames)
        if count:
            lines(name, count)
    with pytest.raises(ConfigError, match=r"b\.mp4 has 9 frames, b\.jsonl has 6 lines\n--truncate"):
        convert("films", Path("out"))
    clips, rows = converted(SMALL._replace(truncate=True))
    assert clips.lengths.tolist() == [4, 7, 5, 3] and numbers(rows[1]) == [*range(7)]
    spoiled(Path("films/c.mp4"), 0.5)
    written([{"action": 1}, {"action": [1.0]}, {"action": 0}], "films/d.jsonl")
    told: list[str] = []
    options = SMALL._replace(skip_broken=True)
    some = Clips.open(convert("films", Path("some"), options, told.append))
    assert some.lengths.tolist() == [4] and [line.split()[0] for line in told] == [
        "b.mp4", "c.mp4", "d.jsonl,",
    ]  # fmt: skip
    Path("films/a.mp4").unlink()
    with pytest.raises(ConfigError, match="no video of it can be read"):
        convert("films", Path("none"), options)


def test_a_video_that_breaks_off_in_the_middle_leaves_nothing_of_itself():
    film("a.mkv", 40)  # a format without a count of frames before them
    film("b.mkv", 4)
    lines("a", 40)
    lines("b", 4)
    spoiled(Path("films/a.mkv"), 0.6)
    with pytest.raises(ConfigError, match=r"a\.mkv has \d+ frames, a\.jsonl has 40 lines"):
        convert("films", Path("out"), SMALL)
    assert not list(Path("out").rglob("*.npy"))
    told: list[str] = []
    found = Clips.open(convert("films", Path("out"), SMALL._replace(skip_broken=True), told.append))
    assert found.lengths.tolist() == [4] and len(told) == 1
    rows = found.read(found.episodes[0], 0, 9)
    assert numbers(rows) == [*range(4)]


def test_actions_of_two_kinds_are_told_apart():
    film("a.mp4", 2)
    film("b.mp4", 2)
    lines("a", 2)
    written([{"action": [0.5]}] * 2, "films/b.jsonl")
    with pytest.raises(ConfigError, match=r"b\.jsonl has continuous actions of sizes \[1\]"):
        convert("films", Path("out"))
    lines("b", 2)
    assert converted(SMALL._replace(choices=6))[0].spec.action == ActionSpec("discrete", (6,))
    with pytest.raises(ConfigError, match=r"--choices = 1\n.*sizes \[2\]"):
        convert("films", Path("other"), SMALL._replace(choices=1))
