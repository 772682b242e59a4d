"""Spaces to specifications, encoded actions back to native ones, and the exact area resize."""

import numpy as np
import pytest
from gymnasium import spaces

from experiments.envs.minigrid import one_hot
from experiments.envs.resize import area_resize
from experiments.envs.rows import encode_choices, random_action
from experiments.envs.spaces import Actions, Observations
from worldmodel.types import ActionSpec, ObsSpec

IMAGE = spaces.Box(0, 255, (32, 48, 3), np.uint8)


@pytest.mark.parametrize(
    ("space", "name", "spec"),
    [
        (IMAGE, "image", ObsSpec("image", (16, 16, 3))),
        (spaces.Box(0, 255, (84, 84), np.uint8), "image", ObsSpec("image", (16, 16, 1))),
        (spaces.Box(0, 255, (7, 7, 3), np.uint8), "state", ObsSpec("vector", (147,))),
        (spaces.Box(-1, 1, (2, 3)), "state", ObsSpec("vector", (6,))),
        (spaces.Discrete(4, start=-2), "state", ObsSpec("discrete", (1,), 4)),
        (spaces.MultiDiscrete([2, 5]), "state", ObsSpec("discrete", (2,), 5)),
        (spaces.MultiBinary(3), "state", ObsSpec("discrete", (3,), 2)),
    ],
)
def test_single_spaces(space: spaces.Space, name: str, spec: ObsSpec):
    observations = Observations(space, 16)
    assert observations.spec == {name: spec}
    space.seed(0)
    for _ in range(5):
        observed = observations(space.sample())
        assert observations.space().contains(observed)
        if spec.kind == "discrete":
            assert 0 <= observed[name].min() <= observed[name].max() < spec.classes


def test_nested_spaces_are_flattened_and_text_is_dropped():
    space = spaces.Dict(
        {
            "camera": IMAGE,
            "body": spaces.Dict({"arm": spaces.Box(-1, 1, (2,)), "name": spaces.Text(5)}),
            "pair": spaces.Tuple((spaces.Discrete(2), spaces.Discrete(3))),
        }
    )
    observations = Observations(space, 16)
    assert set(observations.spec) == {"camera", "body_arm", "pair_0", "pair_1"}
    space.seed(0)
    sample = space.sample()
    observed = observations(sample)
    np.testing.assert_array_equal(observed["body_arm"], sample["body"]["arm"])
    assert observed["pair_1"].tolist() == [sample["pair"][1]]
    with pytest.raises(ValueError, match="nothing that can be observed"):
        Observations(spaces.Text(5), 16)


@pytest.mark.parametrize(
    "space",
    [
        spaces.Discrete(3, start=2),
        spaces.MultiDiscrete([2, 3, 4]),
        spaces.MultiBinary(3),
        spaces.Box(np.array([-2, 0], np.float32), np.array([2, 1], np.float32)),
        spaces.Box(-np.inf, np.inf, (2, 2)),
    ],
    ids=str,
)
def test_actions_stay_in_their_space_and_reach_all_of_it(space: spaces.Space):
    actions = Actions(space)
    codes = random_action(actions.spec, 200, np.random.default_rng(0))
    assert codes.shape == (200, actions.spec.dim) and codes.dtype == np.float32
    decoded = [actions.decode(code) for code in codes]
    assert all(space.contains(action) for action in decoded)
    if actions.spec.kind == "discrete":
        reached = {tuple(np.reshape(action, -1).tolist()) for action in decoded}
        assert len(reached) == np.prod(actions.spec.sizes)


def test_continuous_bounds_and_encoded_choices():
    decode = Actions(spaces.Box(np.array([-2, 0], np.float32), np.array([2, 1], np.float32))).decode
    np.testing.assert_allclose(decode(np.array([-1, -1], np.float32)), [-2, 0])
    np.testing.assert_allclose(decode(np.array([9, 0], np.float32)), [2, 0.5])  # clipped
    spec = ActionSpec("discrete", (2, 3))
    np.testing.assert_array_equal(encode_choices(np.array([[1, 2]]), spec), [[0, 1, 0, 0, 1]])
    with pytest.raises(ValueError, match="Text"):
        Actions(spaces.Text(3))


def slow_resize(image: np.ndarray, size: int) -> np.ndarray:
    """The mean over each target cell, pixel by pixel of a copy that both grids divide."""
    height, width, _ = image.shape
    fine = image.repeat(size, 0).repeat(size, 1).astype(np.int64)
    cells = fine.reshape(size, height, size, width, -1).sum((1, 3))
    return ((2 * cells + height * width) // (2 * height * width)).astype(np.uint8)


@pytest.mark.parametrize("shape", [(16, 16, 3), (32, 16, 1), (21, 17, 3), (7, 9, 3), (300, 290, 1)])
def test_area_resize_equals_the_mean_of_the_covered_area(shape: tuple[int, int, int]):
    image = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    np.testing.assert_array_equal(area_resize(image, 16), slow_resize(image, 16))
    assert area_resize(np.full(shape, 255, np.uint8), 16).min() == 255


def test_one_hot_cells():
    cells = np.array([[[2, 5, 0], [10, 0, 3]]])
    assert np.flatnonzero(one_hot(cells)).tolist() == [2, 16, 17, 31, 32, 41]
