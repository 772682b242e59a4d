"""What an offline run learns from: which episodes are labelled; nobody reads the others."""

from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.config import ConfigError
from experiments.config.dreamer4 import Dreamer4Config
from experiments.data.clips import Clips
from experiments.data.lessons import Lessons, labelled
from experiments.offline import learn
from experiments.offline_loop import Work

from .tiny_offline import configure, recorded, reported


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return recorded(tmp_path_factory.mktemp("room"), frames=120)


def lessons_of(config: Dreamer4Config, folder: str) -> Lessons:
    Path(folder).mkdir(exist_ok=True)
    generator = np.random.default_rng(0)
    return Lessons(config, Path(folder), generator, torch.device("cpu"))


def known(lessons: Lessons) -> list[bool]:
    return [episode.labelled for episode in lessons.data.episodes]


def test_which_episodes_are_labelled_is_drawn_once(room: Path):
    half = configure(room, "data.labelled=0.5", "seed=1")
    found = known(lessons_of(half, "run"))
    assert sum(found) == round(0.5 * len(found)) and not all(found)
    later = configure(room, "data.labelled=0.5", "seed=2")
    assert known(lessons_of(later, "run")) == found  # of the run, whatever it goes on with
    assert known(lessons_of(later, "other")) != found
    more = known(lessons_of(configure(room, "data.labelled=0.8", "seed=1"), "more"))
    assert sum(more) > sum(found) and all(b for a, b in zip(found, more, strict=True) if a)
    lessons = lessons_of(half, "run")
    assert all(episode.labelled for episode in (*lessons.held.episodes, *lessons.best.episodes))
    assert all(known(lessons_of(configure(room), "all")))
    few = labelled(lessons.recorded, 0.001, 0).episodes
    assert sum(episode.labelled for episode in few) == 1


def test_rows_of_labelled_episodes_can_be_favoured(room: Path):
    fields = ("data.labelled=0.2", "seed=1")
    lessons = [lessons_of(configure(room, *fields, f"data.favour={x}"), f"{x}") for x in (0, 0.75)]
    shares = [one.data.packed(64, 6, np.random.default_rng(0))["labelled"] for one in lessons]
    assert shares[0].mean() < 0.5 and shares[1][16:].all()


def test_episodes_that_were_never_labelled_stay_so(room: Path):
    clips = Clips.open(room)
    clips.episodes[1:] = [episode._replace(labelled=False) for episode in clips.episodes[1:]]
    assert [episode.labelled for episode in labelled(clips, 1.0, 0).episodes].count(True) == 1


def test_of_the_others_nothing_but_frames_is_seen(room: Path):
    work = Work.start(configure(room, "data.labelled=0.3", "seed=1"))
    lessons = work.lessons
    lessons.begin(0, work.agent.tokenizer)
    found = lessons.experience([(lessons.best, 8), (lessons.data, 24)], 6)
    unknown = ~found.clip.labelled
    assert unknown[8:].any() and found.clip.labelled[:8].all() and not unknown.all()
    assert torch.equal(found.clip.action.isnan().all(-1), unknown)
    assert torch.equal(found.clip.action.isnan().any(-1), unknown)
    assert torch.equal(found.reward.isnan(), unknown)
    assert not found.clip.latents.isnan().any() and not found.terminal[unknown].any()


def test_a_run_learns_from_few_labels_and_meets_no_unknown_number(room: Path):
    few = ["data.labelled=0.2", "agent.members=2", "agent.doubt=0.1", "phases.tokenizer.updates=0"]
    path = learn(configure(room, *few, "phases.dynamics.batch=4"))
    lines = [metrics for _, metrics in reported(path)]
    assert all(np.isfinite(list(metrics.values())).all() for metrics in lines)
    names = {name for metrics in lines for name in metrics}
    assert {"loss/finetune_ensemble", "loss/finetune_reward", "imagine/doubt"} <= names


def test_without_labels_there_is_nothing_to_imitate(room: Path):
    with pytest.raises(ConfigError, match=r"(?s)data\.labelled.*phases\.finetune\.updates=0"):
        configure(room, "data.labelled=0")
    with pytest.raises(ConfigError, match=r"data\.labelled"):
        configure(room, "data.labelled=0", "phases.finetune.updates=0", "online.rounds=1")
    video = configure(room, "data.labelled=0", "phases.finetune.updates=0")
    assert not any(known(lessons_of(video, "video")))
    assert reported(learn(video))[-1][0] == video.frames == 9


def test_recordings_without_actions_are_refused_before_there_is_a_folder(room: Path):
    index = (room / "index.json").read_text()
    count = len(Clips.open(room).episodes)
    Path("data").mkdir()
    (Path("data") / "00000").symlink_to(room / "00000")
    text = index.replace('"format"', f'"unlabelled": {list(range(count))}, "format"', 1)
    Path("data/index.json").write_text(text)
    with pytest.raises(ConfigError, match=r"(?s)data\.path.*no known action"):
        learn(configure(Path("data")))
    assert not Path("runs").exists()
    learn(configure(Path("data"), "phases.finetune.updates=0"))
