"""Open-loop prediction: the right rows, the right actions, an honest picture, nothing touched."""

from pathlib import Path

import numpy as np
import pytest
import torch

from agents import Dreamer
from experiments.build import build_agent
from experiments.config import Config, load_config
from experiments.driver import replayed_batch
from experiments.envs import Row, make_envs
from experiments.predict import (
    IMAGINED,
    MARGIN,
    SEEN,
    Prediction,
    images_of,
    longest_episodes,
    open_loop,
    predict,
    prediction_grid,
    psnr,
    rmse,
    save_prediction,
)


def small(*words: str) -> tuple[Config, Dreamer]:
    config = load_config("default", ["env.num=2", "device=cpu", *words])
    envs = make_envs(config.env, 1, 0)
    envs.close()
    return config, build_agent(config, envs.obs_spec, envs.action_spec)


def row(time: int, first: list[bool]) -> Row:
    slots = len(first)
    off, reward = np.zeros(slots, bool), np.full(slots, time, np.float32)
    obs = {"state": time + 100.0 * np.arange(slots, dtype=np.float32)[:, None]}
    action = np.zeros((slots, 2), np.float32)
    return Row(obs, action, reward, np.array(first), off, off, np.arange(slots))


def test_the_longest_episode_of_each_slot_is_taken_whole():
    firsts = [[True, True], [False, False], [True, False], [False, True], [False, False]]
    columns, live = longest_episodes([row(t, first) for t, first in enumerate(firsts)], 4)
    assert columns["obs.state"][..., 0].tolist() == [[2, 3, 4, 4], [100, 101, 102, 102]]
    assert columns["first"].tolist() == [[True, False, False, False]] * 2
    assert live.tolist() == [[True, True, True, False]] * 2


def test_imagination_sees_the_recorded_actions_and_not_the_observations_behind_the_context():
    _, agent = small()
    length, context = 7, 3
    rng = np.random.default_rng(0)
    columns = {
        "obs.state": rng.normal(size=(2, length, 4)).astype(np.float32),
        "action": np.eye(2, dtype=np.float32)[rng.integers(0, 2, (2, length))],
        "reward": np.zeros((2, length), np.float32),
        "first": np.arange(length) == np.zeros((2, 1)),
        "terminal": np.zeros((2, length), bool),
        "user": np.zeros((2, length), np.int64),
    }

    def run(changed: str = "", at: int = 0) -> np.ndarray:
        given = {name: value.copy() for name, value in columns.items()}
        if changed:
            given[changed][:, at] = given[changed][:, at, ::-1] + (changed == "obs.state")
        batch = replayed_batch(given, torch.device("cpu"))
        return open_loop(agent, batch, context, torch.Generator().manual_seed(1))["state"]

    def changes(changed: str, at: int) -> list[bool]:
        different = run() != run(changed, at)
        return different.any((0, 2)).tolist()

    assert changes("obs.state", 1)[1]
    assert not any(changes("obs.state", 5))
    assert changes("action", 5)[:5] == [False] * 5
    assert changes("action", 5)[5]
    assert run().shape == (2, length, 4)


def test_nothing_of_the_training_is_touched():
    config, agent = small()
    before = {name: value.clone() for name, value in agent.state_dict().items()}
    state = torch.get_rng_state()
    first, second = predict(config, agent), predict(config, agent)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in agent.state_dict().items())
    assert np.array_equal(first.model["state"], second.model["state"])


def test_psnr_and_rmse_by_step_leave_out_what_follows_the_end():
    truth = np.zeros((2, 4, 1, 1, 3), np.uint8)
    model = truth.copy()
    model[0, 2], model[1, 2], model[1, 3] = 51, 0, 255
    live = np.array([[True] * 4, [True, True, True, False]])
    found = psnr(Prediction({"image": truth}, {"image": model}, live, 2), "image")
    assert list(found) == [1, 2]
    assert found[1] == pytest.approx(-10 * np.log10(0.2**2 / 2))
    assert found[2] == 100.0
    line = Prediction(
        {"state": np.zeros((1, 3, 2))}, {"state": np.full((1, 3, 2), 3.0)}, live[1:, :3], 1
    )
    assert rmse(line, "state") == {1: 3.0, 2: 3.0}


def test_the_grid_shows_truth_model_and_error_and_where_imagination_begins():
    truth = np.full((2, 3, 8, 8, 3), 200, np.uint8)
    model = np.full((2, 3, 8, 8, 3), 150, np.uint8)
    live = np.array([[True, True, True], [True, True, False]])
    picture = prediction_grid(Prediction({"image": truth}, {"image": model}, live, 1), "image")
    side = 8 + 2 * MARGIN
    assert picture.shape == (6 * side + 2 * MARGIN, 3 * side, 3)
    middle = picture[side // 2 : 3 * side : side, side // 2]
    assert middle.tolist() == [[200] * 3, [150] * 3, [50] * 3]
    assert picture[0, 0].tolist() == list(SEEN)
    assert picture[0, side].tolist() == list(IMAGINED)
    assert (picture[-side:, 2 * side :] == picture[-1, -1]).all()  # behind the end: nothing


def test_save_prediction_of_vectors(tmp_path: Path):
    config, agent = small("model.deter=16", "model.hidden=8", "model.units=8")
    quality = save_prediction(config, agent, tmp_path / "prediction.png")
    assert (tmp_path / "prediction.png").stat().st_size > 10_000
    assert all(np.isfinite(value) for value in quality.values())


def test_save_prediction_of_images(tmp_path: Path):
    pytest.importorskip("minigrid")
    words = ["env.id=MiniGrid-Empty-5x5-v0", "env.pixels=true", "env.image_size=16"]
    config, agent = small(
        *words, "env.contexts=[]", "env.workers=inprocess", "model.encoder=strided"
    )
    prediction = predict(config, agent, context=3, horizon=4, sequences=2)
    (key,) = images_of(prediction)
    assert prediction.model[key].shape == prediction.truth[key].shape == (2, 7, 16, 16, 3)
    assert prediction.model[key].dtype == np.uint8
    quality = save_prediction(config, agent, tmp_path / "prediction.png")
    assert list(quality) == list(range(1, 21))
    assert (tmp_path / "prediction.png").stat().st_size > 10_000


def test_the_context_shrinks_when_every_episode_is_short():
    config, agent = small("env.time_limit=5")
    prediction = predict(config, agent, context=5, horizon=20)
    assert prediction.context == 3  # half of six rows
    assert prediction.live.sum(1).tolist() == [6, 6, 6]
    assert predict(config, agent, context=4, horizon=2).context == 4
