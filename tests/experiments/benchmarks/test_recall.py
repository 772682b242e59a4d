"""The recall benchmark: pairs that cannot be known, arms that differ in fast weights alone."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.benchmarks import recall
from experiments.benchmarks.recall import ARMS, MEMORIES, Arms, Seeds, Size, Stream
from experiments.config import ConfigError

SMALL = Size(8, 4, 8, 8, pairs=4, batch=4, updates=3, episodes=6, curve=(2, 4))


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def drawn(batch: int = 400, pairs: int = 6, seed: int = 0) -> recall.Episodes:
    return recall.episodes(SMALL, batch, pairs, torch.Generator().manual_seed(seed))


# ---- the task ----------------------------------------------------------------------------------
def test_a_row_asks_for_a_key_of_an_earlier_row():
    rows, answer = drawn()
    keys, values, asked = rows.split([8, 4, 8], -1)
    same = (keys[:, None] == asked[:, :, None]).all(-1)  # (B, rows that ask, rows that brought)
    assert (same.sum(-1) == 1).all()
    brought = same.float().argmax(-1)
    assert (brought[:, 1:] < torch.arange(1, 7)).all()
    assert torch.equal(values.argmax(-1).gather(1, brought), answer)
    # every earlier row is asked for, the oldest as often as the newest
    counts = torch.bincount(brought[:, 6], minlength=6)
    assert counts.min() > 30 and len(counts) == 6


def test_what_is_brought_says_nothing_about_what_is_asked():
    rows, answer = drawn(4000, 3)
    values = rows[..., 8:12].argmax(-1)
    assert abs((values == answer)[:, 1:].float().mean() - 0.25) < 0.02
    assert abs((answer == 0).float().mean() - 0.25) < 0.02


def test_held_out_episodes_are_not_those_of_training():
    names = [0, 1]
    seeds = Seeds([recall.make("delta", SMALL, seed) for seed in names])
    train = recall.drawn(SMALL, 4, 4, [torch.Generator().manual_seed(seed) for seed in names])
    later = [torch.Generator().manual_seed(recall.HELD_OUT + seed) for seed in names]
    held = recall.drawn(SMALL, 4, 4, later)
    assert not torch.isclose(train.rows[..., :8], held.rows[..., :8]).any()
    assert not torch.equal(train.rows[0], train.rows[1])
    first, again = (recall.measure(seeds, SMALL, names)["nats"] for _ in range(2))
    np.testing.assert_array_equal(first, again)


# ---- the arms ----------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", MEMORIES)
def test_adapted_is_the_stream_and_the_others_lack_what_it_wrote(kind: str):
    memory = recall.make(kind, SMALL, 0)
    with torch.no_grad():
        for name, p in memory.named_parameters():  # what begins at zero would hide a difference
            if "start" in name:
                p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
        rows = drawn(3, 5).rows
        frozen, adapted, swapped = Arms(memory)(rows)
        assert torch.allclose(adapted, Stream(memory)(rows), atol=1e-5)
        assert not torch.allclose(frozen, adapted, atol=1e-3)
        assert not torch.allclose(swapped, adapted, atol=1e-3)
        # frozen answers depend on nothing but the row
        order = torch.tensor([0, 4, 2, 1, 3, 5])
        assert torch.allclose(Arms(memory)(rows[:, order])[0], frozen[:, order], atol=1e-5)
        # the control of an episode hears the question of its own and the pairs of the one before
        changed = rows.clone()
        changed[0, :, :12] = drawn(3, 5, seed=9).rows[0, :, :12]
        after = Arms(memory)(changed)
        assert torch.allclose(after[0][1:], frozen[1:], atol=1e-5)
        assert torch.equal(after[1][1:], adapted[1:])
        assert not torch.allclose(after[2][1], swapped[1], atol=1e-4)


@pytest.mark.parametrize("kind", ["delta", "neural", "hope"])
def test_seeds_side_by_side_are_seeds_alone(kind: str):
    names = [3, 4]
    both = Seeds([recall.make(kind, SMALL, seed) for seed in names])
    history = recall.train(both, SMALL, names)
    found = recall.measure(both, SMALL, names)
    for i, seed in enumerate(names):
        alone = Seeds([recall.make(kind, SMALL, seed)])
        np.testing.assert_allclose(recall.train(alone, SMALL, [seed])[0], history[i], rtol=1e-4)
        single = recall.measure(alone, SMALL, [seed])["nats"]
        np.testing.assert_allclose(single[:, 0], found["nats"][:, i], rtol=1e-3)
    assert not np.allclose(history[0], history[1])


# ---- what is told ------------------------------------------------------------------------------
def test_a_window_is_the_rows_that_could_ask_for_about_so_many_pairs():
    values = np.arange(65.0)
    assert recall.window(values, 4) == 4
    assert recall.window(values, 8) == 7.5
    assert recall.window(values, 64) == np.arange(49, 65).mean()


def test_gains_are_paired_by_seed():
    rng = np.random.default_rng(0)
    luck = rng.normal(0, 10, (3, 1))  # what a seed's episodes do to every arm
    arms = np.stack([luck + shift + np.zeros((3, 5)) for shift in (0.0, 1.0, 0.0)])
    row = recall.summary({"accuracy": arms}, SMALL, rng)["accuracy"]["4"]
    assert row["adapted - frozen"] == pytest.approx({"value": 1.0, "low": 1.0, "high": 1.0})
    assert row["swapped - frozen"] == pytest.approx({"value": 0.0, "low": 0.0, "high": 0.0})
    assert row["adapted"]["high"] - row["adapted"]["low"] > 1


@pytest.mark.usefixtures("threads")
def test_a_memory_learns_to_recall():
    size = Size(8, 4, 16, pairs=4, batch=16, updates=120, rate=2e-2, episodes=32, curve=(4,))
    result, _ = recall.run(["delta"], [0, 1], size)
    row = result["kinds"]["delta"]["accuracy"]["4"]
    assert row["adapted - frozen"]["low"] > 0.3
    assert row["frozen"]["value"] < 0.45 and row["swapped"]["value"] < 0.45


@pytest.mark.usefixtures("threads")
def test_recall_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "docs" / "recall.png"
    words = ["--tier", "smoke", "--seeds", "2", "--kinds", "delta,rls"]
    assert recall.main([*words, "--out", str(out)]) == 0
    table = capsys.readouterr().out
    assert "delta" in table and "rls" in table and "chance 0.250" in table
    assert out.stat().st_size > 10_000
    assert recall.main([*words, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["kinds"].keys() == {"delta", "rls"}
    for row in result["kinds"]["rls"]["nats"].values():
        assert row["adapted"]["low"] <= row["adapted"]["value"] <= row["adapted"]["high"]
        assert len(row["by seed"][ARMS[2]]) == 2


@pytest.mark.parametrize("words", [["--kinds", "gated_detla"], ["--seeds", "0"]])
def test_a_mistake_is_told(words: list[str]):
    with pytest.raises(ConfigError, match=r"gated_delta|give 1 or more"):
        recall.main(words)
