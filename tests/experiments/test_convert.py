"""Other formats become clips: folders of .npz files and data sets of Minari, and their mistakes."""

import warnings
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from experiments import cli
from experiments.config import ConfigError
from experiments.data import convert as module
from experiments.data.clips import Arrays, Clips
from experiments.data.convert import convert
from experiments.data.minari import encoded
from experiments.data.source import Options
from experiments.envs.spaces import Actions
from worldmodel.types import ActionSpec, ObsSpec


def write(number: int, **changes: Any) -> Path:
    """An episode of four rows as an .npz file; None leaves a column out."""
    arrays = {
        "obs.image": np.full((4, 16, 16, 1), number, np.uint8),
        "action": np.array([0, 2, 1, 2]),
        "reward": np.array([9.0, 1.0, 2.0, 3.0]),
        "terminal": np.array([False, False, False, True]),
    }
    arrays |= {name.replace("obs_", "obs."): value for name, value in changes.items()}
    path = Path("episodes") / f"{number}.npz"
    path.parent.mkdir(exist_ok=True)
    np.savez(path, **{k: v for k, v in arrays.items() if v is not None})
    return path


def rows_of(clips: Clips, number: int) -> Arrays:
    return clips.read(clips.episodes[number], 0, 99)


def test_npz_episodes_are_converted():
    write(0, obs_state=np.zeros((4, 2, 3)))
    write(1, obs_state=np.ones((4, 2, 3)))
    clips = Clips.open(convert("episodes", Path("out")))
    state = ObsSpec("vector", (6,))
    assert clips.spec.obs == {"image": ObsSpec("image", (16, 16, 1)), "state": state}
    assert clips.spec.action == ActionSpec("discrete", (3,)) and len(clips.episodes) == 2
    rows = rows_of(clips, 1)
    assert np.array_equal(rows["action"], [[0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 0, 1]])
    assert rows["reward"].tolist() == [0, 1, 2, 3] and rows["terminal"].tolist()[-1]
    assert rows["obs.state"].dtype == np.float32 and rows["obs.image"].max() == 1
    options = Options(size=(8, 4), choices=5)
    other = Clips.open(convert("episodes", Path("wide"), options))
    assert other.spec.obs["image"].shape == (8, 4, 1) and other.spec.action.sizes == (5,)


def test_npz_vectors_stay_as_they_are():
    action = np.array([[np.nan, 7], [0.5, -1], [1, 0], [0, 0]], np.float32)
    write(0, action=action)
    clips = Clips.open(convert("episodes", Path("out")))
    assert clips.spec.action == ActionSpec("continuous", (2,))
    assert np.array_equal(rows_of(clips, 0)["action"], [[0, 0], *action[1:].tolist()])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward": None}, r"1\.npz lacks reward"),
        ({"obs_image": None}, r"1\.npz lacks obs\.<name>"),
        ({"reward": np.zeros(3)}, r"1\.npz: columns of .*'reward': 3"),
        ({"action": np.array([0, -1, 0, 0])}, r"1\.npz: action -1 is below 0"),
        ({"action": np.zeros(4)}, r"1\.npz: action is float64 \(4,\)\ngive choices"),
        ({"action": np.full((4, 1), 2.5)}, r"1\.npz: action entry 2\.5 is outside \[-1, 1\]"),
        ({"action": np.full((4, 1), np.nan)}, r"1\.npz: action entry nan is outside"),
        ({"action": np.zeros((4, 1))}, r"1\.npz has continuous actions"),
        ({"obs_image": np.zeros((4, 16, 8, 1), np.uint8)}, r"1\.npz: .*16, 8, 1"),
        ({"obs_image": np.array([{}] * 4)}, r"1\.npz is broken: Object arrays"),
    ],
)
def test_a_bad_npz_is_named_and_can_be_left_out(changes: dict[str, Any], message: str):
    write(0)
    write(1, **changes)
    with pytest.raises(ConfigError, match=message):
        convert("episodes", Path("out"))
    told: list[str] = []
    found = convert("episodes", Path("out"), Options(skip_broken=True), told.append)
    assert len(Clips.open(found).episodes) == 1 and "1.npz" in told[0]


def test_mistakes_of_the_command_are_told_at_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def refused(*words: str) -> str:
        assert cli.main(["data", "convert", *words]) == 2
        found = capsys.readouterr()
        assert "Traceback" not in found.err and not found.out
        return found.err

    Path("empty").mkdir()
    file = write(0)
    assert "holds no video and no .npz file" in refused("empty", "out")
    assert "name its folder, episodes" in refused(str(file), "out")
    assert "no id of a Minari data set" in refused("nosuch", "out")
    assert "only videos have frames" in refused("episodes", "out", "--every", "2")
    assert "say the same thing" in refused("episodes", "out", "--every", "2", "--fps", "3")
    assert "convert takes other paths" in refused("episodes")
    assert "no data set" in refused("episodes", "out", "--like", "empty")
    assert cli.main(["data", "convert", "episodes", "out", "--skip-broken"]) == 0
    assert "episodes 1; rows 4" in capsys.readouterr().out
    with monkeypatch.context() as before:
        before.setattr(module, "opened", lambda *_: pytest.fail("nothing is read before"))
        assert "holds a data set" in refused("episodes", "out")
    assert "is a data set already" in refused("out", "other")
    Path("episodes/a.mp4").write_bytes(b"")
    assert "both videos and .npz files" in refused("episodes", "other")


@pytest.mark.parametrize(
    "words", [("--size", "0"), ("--size", "8x"), ("--every", "0"), ("--fps", "no")]
)
def test_options_that_are_no_numbers_are_refused(
    words: tuple[str, str], capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["data", "convert", "a", "b", *words])
    assert stopped.value.code == 2 and f"{words[1]} is no" in capsys.readouterr().err


def test_help_has_an_example_of_every_source(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        cli.main(["data", "convert", "--help"])
    found = capsys.readouterr().out
    assert found.count("nested data convert ") == 5 and ".npz" in found and "Minari" in found


# ---- Minari ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "space",
    [
        spaces.Discrete(3, start=-1),
        spaces.MultiDiscrete([2, 3], start=np.array([5, 0])),
        spaces.MultiBinary(3),
        spaces.Box(np.array([[-2.0], [0.0]]), np.array([[2.0], [10.0]]), dtype=np.float64),
    ],
)
def test_actions_are_encoded_as_our_environments_decode_them(space: Any):
    space.seed(0)
    actions, ours = [space.sample() for _ in range(8)], Actions(space)
    found = encoded(np.stack([np.asarray(action) for action in actions]), ours.spec, space)
    assert found.shape == (8, ours.spec.dim) and found.dtype == np.float32
    for action, code in zip(actions, found, strict=True):
        np.testing.assert_allclose(ours.decode(code), action, atol=1e-5)


def test_boxes_without_bounds_pass_and_others_stay_within():
    space = spaces.Box(np.array([-np.inf, 1], np.float32), np.array([np.inf, 3], np.float32))
    found = encoded(np.array([[7.0, 3.001], [-7.0, 2.0]]), ActionSpec("continuous", (2,)), space)
    assert found.tolist() == [[7, 1], [-7, 0]]


class Odd(gymnasium.Env):
    """Nested observations; ends after three steps, unless it is cut off after two."""

    def __init__(self) -> None:
        body = spaces.Dict({"at": spaces.Box(-9, 9, (2,)), "mode": spaces.Discrete(4, start=1)})
        image = spaces.Box(0, 255, (20, 24, 3), np.uint8)
        parts = {"image": image, "body": body, "mission": spaces.Text(8)}
        self.observation_space = spaces.Dict(parts)
        self.action_space = spaces.Box(-2.0, 2.0, (1,))


def minari_set(name: str, env: gymnasium.Env, episodes: list[dict[str, Any]]) -> None:
    minari = pytest.importorskip("minari")
    collector = pytest.importorskip("minari.data_collector")
    buffer = [collector.EpisodeBuffer(id=i, **one) for i, one in enumerate(episodes)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it wants an environment to evaluate in
        minari.create_dataset_from_buffers(
            name, buffer, observation_space=env.observation_space, action_space=env.action_space,
            algorithm_name="a", code_permalink="b", author="c", author_email="d", description="e",
        )  # fmt: skip


def flags(count: int, terminal: bool) -> dict[str, Any]:
    """Rewards 1, 2, ... and an end that is a termination or a truncation."""
    last = [False] * (count - 1) + [True]
    none = [False] * count
    ends = (last, none) if terminal else (none, last)
    rewards = [float(i + 1) for i in range(count)]
    return {"rewards": rewards, "terminations": ends[0], "truncations": ends[1]}


@pytest.fixture
def minari_home(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("minari")
    pytest.importorskip("h5py")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(Path("minari").absolute()))


@pytest.mark.usefixtures("minari_home")
def test_a_minari_set_of_a_discrete_environment():
    env = gymnasium.make("CartPole-v1")
    env.reset(seed=0)
    states = [np.asarray(env.observation_space.sample()) for _ in range(7)]
    minari_set("cart/pole-v0", env, [
        {"observations": states[:4], "actions": [0, 1, 1], **flags(3, True)},
        {"observations": states[4:], "actions": [1, 0], **flags(2, False)},
    ])  # fmt: skip
    clips = Clips.open(convert("cart/pole-v0", Path("out")))
    assert clips.spec.obs == {"state": ObsSpec("vector", (4,))}
    assert clips.lengths.tolist() == [4, 3]
    rows = rows_of(clips, 0)
    assert np.array_equal(rows["obs.state"], np.stack(states[:4]))
    assert rows["action"].tolist() == [[0, 0], [1, 0], [0, 1], [0, 1]]
    assert rows["reward"].tolist() == [0, 1, 2, 3]
    assert rows["terminal"].tolist() == [False, False, False, True]
    assert not rows_of(clips, 1)["terminal"].any()  # it was cut off, and did not end


@pytest.mark.usefixtures("minari_home")
def test_a_minari_set_of_nested_observations_and_bounded_actions():
    seen = {
        "image": [np.full((20, 24, 3), t, np.uint8) for t in range(4)],
        "body": {"at": [np.full(2, t, np.float32) for t in range(4)], "mode": [1, 2, 3, 4]},
        "mission": ["go"] * 4,
    }
    actions = [np.array([a], np.float32) for a in (-2, 0, 1)]
    minari_set("odd-v0", Odd(), [{"observations": seen, "actions": actions, **flags(3, True)}])
    clips = Clips.open(convert("odd-v0", Path("out"), Options(size=(16, 16))))
    assert clips.spec.obs == {
        "image": ObsSpec("image", (16, 16, 3)),
        "body_at": ObsSpec("vector", (2,)),
        "body_mode": ObsSpec("discrete", (1,), 4),
    }
    rows = rows_of(clips, 0)
    assert rows["obs.image"][:, 5, 5, 0].tolist() == [0, 1, 2, 3]
    assert rows["obs.body_mode"].tolist() == [[0], [1], [2], [3]]
    assert rows["action"].tolist() == [[0], [-1], [0], [0.5]]
    with pytest.raises(ConfigError, match="become squares"):
        convert("odd-v0", Path("other"), Options(size=(16, 8)))


@pytest.mark.usefixtures("minari_home")
def test_a_minari_set_that_is_not_there_and_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch):
    minari = pytest.importorskip("minari")

    def offline(name: str, download: bool) -> None:
        raise ConnectionError(f"cannot reach the host of {name}\nand more lines")

    monkeypatch.setattr(minari, "load_dataset", offline)
    with pytest.raises(
        ConfigError, match=r"of this id: cannot reach the host of a-v0\n`minari list"
    ):
        convert("a-v0", Path("out"))
