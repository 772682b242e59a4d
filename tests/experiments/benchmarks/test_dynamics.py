"""The dynamics benchmark: what is measured by hand, what nobody may see, and cells kept."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from experiments.benchmarks import dynamics
from experiments.benchmarks.recorded import dynamics_cells, dynamics_measures, dynamics_page
from experiments.benchmarks.recorded.dynamics_cells import (
    FULL,
    SETTLED,
    SIZES,
    VARIANTS,
    Cell,
    World,
)
from experiments.config import ConfigError
from worldmodel.shortcut import Clip

SMALL = SIZES["smoke"]


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("dynamics"), SMALL)


# ---- measures ----------------------------------------------------------------------------------
def test_the_distance_of_normal_distributions_is_the_known_one():
    rng = np.random.default_rng(0)
    scales = np.array([1.0, 2.0, 0.5])
    a = rng.normal(size=(40_000, 3))
    b = rng.normal(size=(40_000, 3)) * scales + [3.0, 0.0, 0.0]
    # (mean - mean)^2 + sum (deviation - deviation)^2
    assert dynamics_measures.frechet(a, b) == pytest.approx(9 + 1 + 0.25, rel=0.02)
    assert dynamics_measures.frechet(b, b) == pytest.approx(0, abs=1e-6)
    turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    turned = dynamics_measures.frechet(a @ turn, b @ turn)
    assert turned == pytest.approx(dynamics_measures.frechet(a, b), rel=1e-6)


def test_a_blur_has_the_better_psnr_and_the_worse_distance():
    """Why both are measured: what is drawn is one of two pictures, and nothing says which."""
    rng = np.random.default_rng(0)
    true, guess = (rng.choice([0.0, 255.0], (500, 1, 1, 1, 1)) for _ in range(2))
    blur = np.full_like(true, 127.5)
    assert dynamics_measures.psnr(blur, true)[0] > dynamics_measures.psnr(guess, true)[0] + 2.5
    flat = [x.reshape(-1, 1) for x in (true, guess, blur)]
    distances = [dynamics_measures.frechet(x, flat[0]) for x in flat[1:]]
    assert distances[0] < 0.01 * distances[1]


def test_psnr_is_of_the_mean_error_of_a_frame():
    true = np.zeros((2, 3, 4, 4, 3))
    made = true.copy()
    made[0, 0], made[1, 1] = 255.0, 25.5  # errors of 1 and 0.01, each in one of two clips
    found = dynamics_measures.psnr(made, true)
    assert found == pytest.approx([-10 * np.log10(0.5), -10 * np.log10(0.005), 100.0])


def test_chunks_are_frames_that_follow_each_other():
    latents = np.arange(2 * 7 * 2, dtype=np.float32).reshape(2, 7, 2, 1)
    found = dynamics_measures.chunks(latents, 3)
    assert found.shape == (4, 3, 2)
    assert found[0].ravel().tolist() == [0, 1, 2, 3, 4, 5]
    assert found[1].ravel().tolist() == [6, 7, 8, 9, 10, 11]
    assert found[2].ravel().tolist() == [14, 15, 16, 17, 18, 19]


def real_chunks(count: int, rng: np.random.Generator) -> np.ndarray:
    """Chunks of five frames: a place that is far from others', and small steps from it."""
    places = 50 * rng.normal(size=(count, 1, 3))
    return places + rng.choice([-1.0, 1.0], (count, 5, 3)).cumsum(1)


def test_features_tell_what_is_shown_from_how_it_moves():
    rng = np.random.default_rng(0)
    real = real_chunks(2000, rng)
    features = dynamics_measures.Features(real, 3)
    found = features(real)
    assert found.shape == (2000, 6) and found.mean(0) == pytest.approx(np.zeros(6), abs=1e-9)
    # all components of what is shown have one deviation in all; of how it moves, a part of one
    assert np.square(found[:, :3]).sum(1).mean() == pytest.approx(1.0)
    assert 0.2 < np.square(found[:, 3:]).sum(1).mean() < 0.4  # 3 of 12 that differ alike
    others = real_chunks(2000, rng)
    still = np.repeat(others[:, :1], 5, 1)
    near, far = (dynamics_measures.frechet(features(x), found) for x in (others, still))
    assert near < 0.01 < 0.15 < far
    assert dynamics_measures.frechet(features(others + np.array([150.0, 0, 0])), found) > 1


# ---- what models share, and what they may not see ----------------------------------------------
def test_actions_that_are_not_known_are_not_there(world: World):
    episodes = len(world.train.episodes)
    some = dynamics_cells.partly(world.train, 0.3, np.random.default_rng(0))
    known = [episode.labelled for episode in some.episodes]
    assert sum(known) == round(0.3 * episodes)
    for episode, keep in zip(some.episodes, known, strict=True):
        rows = some.read(episode, 0, episode.length)
        assert np.isnan(rows["action"]).all() != keep and (rows["labelled"] == keep).all()
    assert np.isfinite(world.train.columns[0]["action"]).all()  # the others' stay as they are
    rows = some.packed(8, 6, np.random.default_rng(1))
    assert np.isnan(rows["action"]).any()
    model = dynamics_cells.make(world, VARIANTS[FULL], 0)
    losses, _ = model.losses(dynamics_cells.clip_of(rows), torch.Generator().manual_seed(0))
    losses["dynamics"].mean().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_who_learns_whose_actions_are_known_differs_by_seed(world: World):
    drawn = [
        [e.labelled for e in dynamics_cells.partly(world.train, 0.5, rng).episodes]
        for rng in (np.random.default_rng(seed) for seed in (0, 0, 1))
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_models_of_a_seed_begin_alike(world: World):
    models = [dynamics_cells.make(world, variant, 3) for variant in VARIANTS.values()]
    first = models[0].state_dict()
    for model in models[1:]:
        assert all(torch.equal(x, first[name]) for name, x in model.state_dict().items())
    other = dynamics_cells.make(world, VARIANTS[FULL], 4).state_dict()
    assert not torch.equal(other["from_latent.weight"], first["from_latent.weight"])


def loud(world: World) -> torch.nn.Module:
    """A model whose output depends on everything it reads."""
    model: Any = dynamics_cells.make(world, VARIANTS[FULL], 0)
    model.to_latent.weight.data.normal_(generator=torch.Generator().manual_seed(0))
    return model.requires_grad_(False)


@pytest.mark.parametrize("watched", [0, 2])
def test_what_is_imagined_reads_actions_and_no_frame_that_was_not_watched(
    world: World, watched: int
):
    model: Any = loud(world)
    clip = dynamics_cells.clip_of(world.clips(3, 5))
    clip.first[:, 0] |= not watched

    def made(clip: Clip) -> np.ndarray:
        generator = torch.Generator().manual_seed(1)
        return dynamics_measures.imagined(model, clip, watched, 4, generator)[0]

    before = made(clip)
    assert before.shape == (3, 5 - watched, *SMALL.latents) and np.isfinite(before).all()
    hidden = clip.latents.clone()
    hidden[:, watched:] = 7.0
    assert np.array_equal(made(clip._replace(latents=hidden)), before)
    action = clip.action.clone()
    action[:, 3] = action[:, 3].roll(1, -1)
    changed = np.abs(made(clip._replace(action=action)) - before).max((0, 2, 3)) > 0
    assert changed.tolist() == [t >= 3 for t in range(watched, 5)]
    nothing = clip._replace(labelled=torch.zeros_like(clip.labelled))
    assert np.array_equal(
        made(nothing._replace(action=action)), made(nothing)
    )  # told that they are not known, it does not look


def test_without_shortcuts_all_step_sizes_are_the_finest(world: World):
    bare = dynamics_cells.trained(world, dynamics.BARE, 0).step.weight
    assert (bare == bare[-1]).all()
    full = dynamics_cells.trained(world, FULL, 0).step.weight
    assert not (full == full[-1]).all()


def test_a_tokenizer_below_its_gate_is_refused(world: World, tmp_path: Path):
    clips = dynamics_cells.recorded(world.root / "data", SMALL)
    with pytest.raises(ConfigError, match=r"the gate is 90\.0"):
        dynamics_cells.tokenizer_of(tmp_path / "tokenizer", clips, SMALL._replace(gate=90.0))
    assert not list(tmp_path.iterdir())


def test_a_folder_keeps_one_size(world: World):
    World(world.root, SMALL)
    with pytest.raises(ConfigError, match="name another folder"):
        World(world.root, SMALL._replace(updates=4))


def test_a_cell_is_measured_once(world: World, monkeypatch: pytest.MonkeyPatch):
    cell = Cell(FULL, 0, 4)
    found = dynamics_cells.measured(world, cell)
    assert len(found["psnr"]) == SMALL.horizon and found["frechet"] >= 0
    monkeypatch.setattr(dynamics_cells, "trained", None)
    assert dynamics_cells.measured(world, cell) == found


# ---- what is told ------------------------------------------------------------------------------
def values(psnr: Sequence[float], frechet: Sequence[float]) -> dict[str, np.ndarray]:
    """One key's measures of so many seeds; PSNR over two frames around the given means."""
    spread = np.array([[-1.0, 1.0]])
    rows = np.array(psnr)[:, None] + spread
    return {"psnr": rows, "mse": rows / 100, "frechet": np.array(frechet), "ms": rows[:, 0]}


def test_the_share_of_the_gain_is_by_hand():
    found = {
        ("no-actions", 4): values([10, 20], [9, 9]),
        ("some-actions", 4): values([14, 23], [5, 6]),
        (SETTLED, 4): values([18, 24], [4, 4]),
    }
    row = dynamics.summary("labels", found, SMALL)
    assert row["share"]["by seed"] == pytest.approx([0.5, 0.75])
    assert row["share"]["of the means"] == pytest.approx(7 / 12)
    assert row["share"]["interval"]["value"] == pytest.approx(0.625)
    gains = [one["psnr"]["value"] for one in row["differences"]]
    assert gains == pytest.approx([3.5, 6.0])


def test_a_step_of_the_cascade_is_a_gain_where_its_interval_leaves_out_zero():
    keys = dynamics.keys_of("ablation", SMALL)
    assert keys == [("v", 4), ("shortcut", 4), ("x", 4), ("x-loss", 4), (FULL, 4), ("v", 8)]
    once = [("v", 1), ("shortcut", 1), ("x", 1), ("x-loss", 1), (FULL, 1), ("v", 8)]
    assert dynamics.keys_of("single", SMALL) == once
    assert ((FULL, 1), ("v", 8)) in dynamics.pairs_of("single", SMALL)
    distances = [[90, 95, 93], [40, 47, 42], [44, 43, 43], [20, 21, 23], [21, 20, 26], [39, 40, 41]]
    found = {key: values([20, 21, 22], x) for key, x in zip(keys, distances, strict=True)}
    row = dynamics.summary("ablation", found, SMALL)
    result = {"variants": {name: one.about for name, one in VARIANTS.items()}, "seeds": 3}
    text = dynamics_page.verdict("ablation", row, result)
    better = text.partition("better distance: ")[2].partition(" Clearly")[0]
    assert "`+ shortcut, 4 steps than v, flat, no shortcut, 4 steps`" in better
    assert "`+ x-loss, 4 steps than + x-prediction, 4 steps`" in better
    assert "+ x-prediction, 4 steps than" not in better
    assert "than + x-loss" not in better
    assert "better PSNR: none. Clearly worse PSNR: none." in text
    # 92.7 43 43.3 21.3 22.3 40 beside the paper's 875 329 326 151 102 306: x and ramp stand amiss
    assert dynamics_page.order(row) == (
        "Of 15 pairs of rows, 13 have distances in the order of the paper's FVD."
    )
    assert sum("**" in line for line in dynamics_page.pairs_of(row, result)) == 4
    assert "**" not in "".join(dynamics_page.pairs_of(row, {**result, "seeds": 2}))
    few = dynamics_page.verdict("ablation", row, {**result, "seeds": 2})
    assert "too few" in few and "Clearly" not in few


def test_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    page, root = tmp_path / "RESULTS.md", tmp_path / "runs"
    page.write_text("# Results\n\nMine.\n")
    words = ["--tier", "smoke", "--seeds", "1", "--root", str(root), "--results", str(page)]
    assert dynamics.main([*words, "--part", "labels"]) == 0
    assert "of the gain in PSNR" in capsys.readouterr().out
    before = {path: path.stat().st_mtime_ns for path in root.glob("*/*-s0*.json")}
    assert len(before) == 6  # three models, three cells
    assert dynamics.main([*words, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert list(result["parts"]) == list(dynamics.PARTS)
    assert json.loads((root / "dynamics.json").read_text()) == result
    assert {path: path.stat().st_mtime_ns for path in before} == before
    for name in (*dynamics.PARTS, "video"):
        assert (root / f"dynamics_{name}.png").stat().st_size > 10_000
    text = page.read_text()
    assert text.startswith("# Results\n\nMine.\n") and text.count("<!-- dynamics smoke -->") == 1
    assert text.count("### ") == 4
    assert "`nested bench dynamics --tier smoke --seeds 1`: means" in text
    with pytest.raises(ConfigError, match="another size"):
        dynamics.main([*words, "--updates", "4"])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--seeds", "-1"], "(?s)--seeds.*give 1 or more"),
        (["--updates", "-5"], "(?s)--updates.*give 1 or more"),
        (["--part", "step"], "ablation,single,steps,labels,all"),
    ],
)
def test_a_mistake_is_told_before_anything_is_trained(words: list[str], told: str, tmp_path: Path):
    with pytest.raises(ConfigError, match=told):
        dynamics.main([*words, "--root", str(tmp_path / "runs")])
    assert not (tmp_path / "runs").exists()
