"""Benchmarks: statistics against values worked out by hand, suites from end to end when tiny."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.benchmarks import inference, learning
from experiments.benchmarks.inference import configured
from experiments.benchmarks.statistics import bootstrap, iqm, mean, paired_bootstrap
from experiments.build import build_agent
from experiments.config import ConfigError, load_config
from experiments.loop import Loop
from experiments.record import runs
from nested import fast
from worldmodel import ActionSpec, ObsSpec, WorldModel
from worldmodel.heads import kl, sample

ACTIONS = ActionSpec("discrete", (2,))
WIDTHS = ["model.deter=16", "model.hidden=8", "model.units=8", "model.stoch=4", "model.classes=4"]


def test_iqm_is_the_mean_of_the_middle_half():
    assert iqm(np.array([100.0, 1, 2, -50])) == pytest.approx(1.5)
    assert iqm(np.array([7.0])) == pytest.approx(7.0)
    # six values: one and a half are cut at each end, so the second counts by half
    assert iqm(np.array([0.0, 1, 2, 3, 4, 99])) == pytest.approx((0.5 * 1 + 2 + 3 + 0.5 * 4) / 3)
    assert iqm(np.array([[4.0, 3, 2, 1], [8, 8, 8, 8]])).tolist() == [2.5, 8.0]


def test_the_interval_covers_the_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    samples = rng.normal(3.0, 2.0, (300, 20))
    intervals = [bootstrap(values, rng, resamples=400) for values in samples]
    covered = np.mean([found.low <= 3.0 <= found.high for found in intervals])
    assert 0.88 < covered < 0.97  # percentile intervals of 20 values are a little too narrow


def test_pairing_takes_out_what_the_seeds_share():
    rng = np.random.default_rng(1)
    shared = rng.normal(0, 100, 10)
    better = shared + 1 + rng.normal(0, 0.1, 10)
    paired = paired_bootstrap(better, shared, rng)
    assert 0.8 < paired.low < paired.value < paired.high < 1.2
    shuffled = paired_bootstrap(better, shared[::-1], rng)
    assert shuffled.high - shuffled.low > 20


def test_one_seed_and_one_generator_give_one_interval():
    values = np.array([1.0, 2, 3, 10])
    first = bootstrap(values, np.random.default_rng(3), iqm)
    assert first == bootstrap(values, np.random.default_rng(3), iqm)
    assert first.value == pytest.approx(2.5)
    assert bootstrap(values, np.random.default_rng(3), mean).value == pytest.approx(4.0)
    assert bootstrap(np.array([5.0]), np.random.default_rng(0)) == (5.0, 5.0, 5.0)


def test_values_that_are_no_pairs_are_refused():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="3 and 2 values are not pairs"):
        paired_bootstrap(np.zeros(3), np.zeros(2), rng)
    with pytest.raises(ValueError, match="one value a seed"):
        bootstrap(np.zeros((2, 2)), rng)


# ---- inference ---------------------------------------------------------------------------------
CONTEXTS = ("normal", "flipped", "long", "heavy")


def small_world() -> WorldModel:
    return build_agent(configured(0, WIDTHS), {"state": ObsSpec("vector", (4,))}, ACTIONS).world


def filtered_rows(slots: int = 3, steps: int = 6) -> tuple[WorldModel, inference.Rows]:
    world = small_world()
    columns = inference.record(["normal"] * slots, steps, 0.5, seed=3)
    return world, inference.filtered(world, columns, seed=0)


def test_the_balancer_keeps_the_pole_up_in_every_context():
    columns = inference.record([name for name in CONTEXTS for _ in range(16)], 200, 0.25, seed=1)
    assert columns["first"].reshape(4, -1).sum(1).max() <= 20  # 16 episodes begin at the start
    assert columns["obs.state"].shape == (64, 200, 4)
    assert 0.3 < columns["action"][..., 1].mean() < 0.7


def test_prediction_is_the_loss_of_the_world_model_at_the_prior():
    world, rows = filtered_rows()
    first = torch.zeros(3, 6, dtype=torch.bool)
    found = inference.play(inference.adapter_of(world, 0.1), rows, first, 1)["frozen"]
    prior = world.dynamics.prior(rows.deter[:, 2])
    latent = (rows.deter[:, 2], sample(prior, rows.noise[:, 2]))
    errors = world.decoder.errors(*latent, {"state": rows.obs["state"][:, 2]})["state"]
    parts = torch.stack([errors, kl(rows.posterior[:, 2], prior)], 1).detach().numpy()
    assert found[:, 2, 1:] == pytest.approx(parts, abs=1e-5)
    assert found[..., 0] == pytest.approx(found[..., 1:].sum(-1), abs=1e-5)


def test_inner_steps_start_from_frozen_weights_lower_the_loss_and_end_with_the_episode():
    world, rows = filtered_rows(steps=1)
    rows = inference.Rows(
        *(fast.tree_map(lambda x: x.expand(-1, 8, *x.shape[2:]), r) for r in rows)
    )
    first = torch.zeros(3, 8, dtype=torch.bool)
    first[1, 4] = True
    found = inference.play(inference.adapter_of(world, 0.03), rows, first, 1)
    frozen, adapted = found["frozen"][..., 0], found["adapted"][..., 0]
    assert adapted[:, 0] == pytest.approx(frozen[:, 0], rel=1e-6)
    assert (adapted[::2, 7] < 0.9 * frozen[::2, 7]).all()  # one and the same row, seen seven times
    assert adapted[1, 4] == pytest.approx(frozen[1, 4], rel=1e-6)
    assert found["swapped"][:, 0, 0] == pytest.approx(frozen[:, 0], rel=1e-6)
    assert not np.allclose(found["swapped"][:, 7, 0], adapted[:, 7])


def test_a_slot_learns_from_its_own_rows_only():
    world, rows = filtered_rows()
    first = torch.zeros(3, 6, dtype=torch.bool)
    adapter = inference.adapter_of(world, 0.1)
    one = inference.play(adapter, rows, first, 1)["adapted"]
    rows.obs["state"][2] += 1.0
    other = inference.play(adapter, rows, first, 1)["adapted"]
    assert np.array_equal(one[:2], other[:2])
    assert not np.allclose(one[2], other[2])


def test_inference_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = ["--seeds", "2", "--updates", "2", "--steps", "8", "--slots", "2", "--rate", "0.1"]
    assert inference.main([*words, "--out", str(tmp_path), *WIDTHS]) == 0
    assert "as given" in capsys.readouterr().out
    result = json.loads((tmp_path / "inference.json").read_text())
    row = result["contexts"]["flipped"]["prediction"]
    gains = row["frozen - adapted"]
    assert len(row["frozen"]) == 4
    assert gains["episode"]["value"] == pytest.approx(
        np.mean(row["frozen"]) - np.mean(row["adapted"]), abs=1e-6
    )
    assert len(gains["by seed"]) == 2
    assert len(list(tmp_path.glob("world-*.safetensors"))) == 2
    assert (tmp_path / "inference.png").stat().st_size > 10_000
    # a second run finds the worlds and says the same
    inference.main([*words, "--json", "--out", str(tmp_path), *WIDTHS])
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert again["contexts"] == result["contexts"]


# ---- learning ----------------------------------------------------------------------------------
SHORT = [
    *WIDTHS, "frames=60", "train.prefill=20", "train.ratio=2", "replay.length=4", "replay.batch=2",
    "env.num=4", "env.contexts=[]", "evaluate.every=20", "evaluate.episodes=2", "env.time_limit=9",
    "model.memory.kind=none", "tracking.mlflow=false", "checkpoint.every=20",
]  # fmt: skip


def curve(seed: int, frames: list[int], returns: list[float]) -> learning.Curve:
    return learning.Curve(seed, np.array(frames, float), np.array(returns, float), 7.0)


def test_the_table_says_what_the_curves_hold():
    curves = [curve(0, [0, 10, 20, 30], [1, 5, 9, 7]), curve(1, [0, 10, 30], [3, 3, 3])]
    text = learning.table({"default": curves}, 8.0)
    _, first, second, mean, reaches = text.splitlines()
    assert first.split() == ["0", "7.000", "7.000", "9.000", "20", "7"]
    assert second.split() == ["1", "3.000", "3.000", "3.000", "-", "7"]
    assert mean.startswith("mean of the last 3 evaluations over 2 seeds: 5.000 [3.000, 7.000]")
    assert reaches.endswith("reaches 8 never")
    frames, values = learning.mean_curve(curves)
    assert frames.tolist() == [0, 10, 30]
    assert values.tolist() == [2, 4, 5]
    assert learning.reached(curves[0], 5.0) == 10


def test_a_seed_is_trained_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def stop(loop: Loop) -> int:
        if loop.frame > 40:
            raise KeyboardInterrupt
        return 0

    words = ["--preset", "default", "--root", "found", "--out", "docs/curve.png", "--seeds", "1"]
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Loop, "updates_due", stop)
        learning.main([*words, *SHORT])
    assert [status.state for status in runs(Path("found"))] == ["stopped"]
    assert learning.main([*words, "--threshold", "9", *SHORT]) == 0  # it goes on
    assert "over 1 seed" in capsys.readouterr().out
    config = load_config("default", ["seed=0", "tracking.root=found", *SHORT])
    path = learning.train_seed(config)  # it is taken as it is
    assert [(status.state, status.path) for status in runs(Path("found"))] == [("finished", path)]
    assert learning.curves_of(path)["default"].frames.tolist() == [0, 20, 40, 60]
    assert Path("docs/curve.png").stat().st_size > 5_000
    other = load_config("default", ["seed=0", "tracking.root=found", *SHORT, "agent.horizon=3"])
    assert learning.is_of(path, config)
    assert not learning.is_of(path, other)


def test_nothing_to_train_is_a_mistake():
    with pytest.raises(ConfigError, match="nothing to train"):
        learning.main(["--seeds", "0"])
