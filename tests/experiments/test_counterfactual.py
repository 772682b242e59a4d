"""Imagination held against reality: moments, rates of hand-made models, returns, the suite."""

import json
import math
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch

from agents.offline import OfflineDreamer, twohot
from experiments.benchmarks import counterfactual as suite
from experiments.benchmarks.recorded import rounds_page
from experiments.config import ConfigError
from experiments.config.dreamer4 import load_dreamer4
from experiments.config.models import EnvConfig
from experiments.counterfactual import (
    AWAY,
    KINDS,
    RIGHT,
    Moments,
    counterfactual,
    expected_return,
    moments,
    promised_by,
    rates,
    starts,
)
from experiments.data.clips import Spec
from experiments.data.expert import expert_envs
from experiments.envs.recipes import AGENT, COLOURS, CRAFT, POCKET
from experiments.offline_loop import build_offline
from experiments.record.metrics import read
from worldmodel.types import ActionSpec, ObsSpec

CONFIG = EnvConfig(id="Recipes-v0")
COUNT = 6


@pytest.fixture(scope="module")
def found() -> Moments:
    return moments(CONFIG, COUNT, 8, seed=1)


def held(found: Moments) -> np.ndarray:
    """What the last frame of each moment (N, 3) shows to be held."""
    return (found.image[:, -1, -1, [8 * column for column in POCKET]] == COLOURS).all(-1)


def test_moments_are_real_and_stand_before_their_decisions(found: Moments):
    assert found.kind.tolist() == [kind for kind in KINDS for _ in range(COUNT)]
    bundles = [bundles[i % len(bundles)] for bundles in KINDS.values() for i in range(COUNT)]
    shown = [frozenset(np.flatnonzero(row).tolist()) for row in held(found)]
    assert shown == bundles
    assert (found.reward == (found.kind == RIGHT)).all()
    assert (found.decision.argmax(1) == CRAFT).all()
    crafted = found.action[..., CRAFT].any(1)
    assert not crafted.any()  # before the decision nobody crafts


def test_the_past_is_whole_and_what_is_before_it_is_first(found: Moments):
    starts = found.first.sum(1)
    for n, count in enumerate(starts):
        assert found.first[n, :count].all()
        assert (found.image[n, :count] == found.image[n, 0]).all()
    moved = found.action[:, 1:].any(-1)
    assert np.array_equal(moved, ~found.first[:, 1:])
    agents = (found.image == AGENT).all(-1).sum((-2, -1))
    assert (agents == 36).all()
    again = moments(CONFIG, COUNT, 8, seed=1)
    assert all(np.array_equal(a, b) for a, b in zip(found, again, strict=True))


def test_rates_of_models_with_known_answers(found: Moments):
    def optimist(seen: Moments) -> np.ndarray:
        return np.ones(len(seen.kind))

    def true(seen: Moments) -> np.ndarray:
        return seen.reward * 0.9

    def counts(seen: Moments) -> np.ndarray:
        """Believes in any two things, wherever it stands."""
        return (held(seen).sum(1) == 2) * 0.6

    expected = {"hallucination": 1.0, "recognised": 1.0, f"hallucination_{AWAY}": 1.0}
    assert rates(found, optimist).items() >= expected.items()
    assert rates(found, true).items() >= {"hallucination": 0.0, "recognised": 1.0}.items()
    parts = {"hallucination_single": 0.0, "hallucination_pair": 1.0, f"hallucination_{AWAY}": 1.0}
    assert rates(found, counts).items() >= {**parts, "hallucination": 0.5}.items()
    assert rates(found, lambda seen: 0.49 * np.ones(len(seen.kind)))["recognised"] == 0.0


def test_an_imagined_return_ends_where_the_episode_may_end():
    reward = torch.tensor([[1.0, 2.0, 4.0], [1.0, 2.0, 4.0], [1.0, 2.0, 4.0]])
    live = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0], [0.5, 0.5, 1.0]])
    assert expected_return(reward, live).tolist() == [7.0, 1.0, 1 + 1 + 1]


@pytest.fixture
def agent() -> OfflineDreamer:
    """A tiny agent for pictures of 16 x 16."""
    words = ["env.image_size=16", "tokenizer.latents=2", "tokenizer.channels=4"]
    words += ["dynamics.spatial=2", "agent.units=8", "tokenizer.trunk.width=8"]
    spec = Spec({"image": ObsSpec("image", (16, 16, 3))}, ActionSpec("discrete", (6,)))
    return build_offline(load_dreamer4("recipes", words), spec)


def always(agent: OfflineDreamer, reward: float, terminal: float) -> float:
    """A hand-made imagination: the same reward and chance of an end everywhere; the reward."""
    head = twohot(agent.reward)
    found = int((head.bins - reward).abs().argmin())
    with torch.no_grad():
        head.net.out.bias[found] = 60.0
        agent.terminal.net.out.weight.zero_()
        agent.terminal.net.out.bias.fill_(math.log(terminal / (1 - terminal)))
    return float(head.bins[found])


@pytest.mark.parametrize("reward", [0.0, 1.0])
def test_a_model_that_always_promises_or_never_does(agent: OfflineDreamer, reward: float):
    expected = always(agent, reward, 0.5)
    small = CONFIG.model_copy(update={"image_size": 16})
    seen = moments(small, 2, 8, seed=1)
    promise = promised_by(agent, torch.Generator().manual_seed(0))
    assert promise(seen) == pytest.approx([expected] * 8, rel=1e-4)
    found = rates(seen, promise)
    assert found["hallucination"] == found["recognised"] == reward


def test_the_gap_of_a_known_imagination(agent: OfflineDreamer, monkeypatch: pytest.MonkeyPatch):
    """Reward r at every step, an end with probability p: r (1 - (1 - p)^H) / p in H steps."""
    words = ["env.image_size=16", "counterfactual.frames=5", "counterfactual.episodes=3"]
    config = load_dreamer4("recipes", [*words, "counterfactual.contexts=1"])
    reward = always(agent, 1.0, 0.2)
    envs, teacher = expert_envs(config.env, 3, noise=0.0, seed=3)  # always makes a tool, worth 1
    monkeypatch.setattr("experiments.counterfactual.starts", lambda *_: nullcontext(envs))
    monkeypatch.setattr("experiments.counterfactual.of_offline", lambda *_: teacher)
    found = counterfactual(config, agent, 3, torch.Generator().manual_seed(0))
    imagined = reward * (1 - 0.8**5) / 0.2
    assert found["real_return"] == 1.0
    assert found["imagined_return"] == pytest.approx(imagined, rel=1e-4)
    assert found["gap"] == pytest.approx(imagined - 1.0, rel=1e-4)
    assert found["hallucination"] == 1.0


def test_real_and_imagined_episodes_begin_in_the_same_frames():
    config = load_dreamer4("recipes", ["counterfactual.episodes=3"])
    rows = []
    for _ in range(2):
        with starts(config, 3) as envs:
            rows.append(envs.reset().obs["image"])
    assert len(rows[0]) == 3
    assert np.array_equal(*rows)
    assert not np.array_equal(rows[0][0], rows[0][1])


# ---- the suite ---------------------------------------------------------------------------------
def test_the_suite_runs_and_goes_on(capsys: pytest.CaptureFixture[str], monkeypatch):
    words = ["--tier", "smoke", "--seeds", "1", "--arms", "own,none", "--root", "cf"]
    assert suite.main(words) == 0
    assert "hallucination: wrong recipes" in capsys.readouterr().out
    assert Path("cf/counterfactual.png").read_bytes().startswith(b"\x89PNG")
    spools = [Path(f"cf/{arm}/s0/metrics.jsonl") for arm in ("own", "none")]
    own, none = ([row.metrics for row in read(path)] for path in spools)
    offline = next(i for i, row in enumerate(own) if row.get("round/number") == 0)
    assert own[: offline + 1] == none[: offline + 1]  # arms are copies of one offline run
    assert Path("cf/own/s0/acted/001/index.json").exists()
    assert not Path("cf/none/s0/acted").exists()

    monkeypatch.setattr("experiments.offline.learn", lambda *_: pytest.fail("it is finished"))
    assert suite.main([*words, "--json", "--results", "results.md"]) == 0
    assert "<!-- end counterfactual smoke -->" in Path("results.md").read_text()
    result = json.loads(capsys.readouterr().out)
    assert len(result["measures"]["gap"]["rounds"]["own"]) == 2
    with pytest.raises(ConfigError, match="another configuration"):
        suite.main([*words, "online.share=0.4"])
    with pytest.raises(ConfigError, match=r"--jobs = 0\nnothing to run"):
        suite.main([*words, "--jobs", "0"])


def test_a_summary_pairs_seeds_and_names_what_changed():
    own = {name: np.array([[0.9, 0.1], [0.8, 0.2]]) for name in suite.MEASURES}
    none = {name: np.array([[0.9, 0.9], [0.8, 0.8]]) for name in suite.MEASURES}
    rng = np.random.default_rng(0)
    row = suite.summary({"own": own, "none": none}, rng)["hallucination"]
    assert row["change"]["own"]["value"] == pytest.approx(-0.7)
    assert row["change"]["none"]["value"] == 0.0
    gain = row["differences"]["own - none"]
    assert (gain["low"], gain["value"], gain["high"]) == pytest.approx((-0.8, -0.7, -0.6))


def test_the_page_tells_each_round_and_whether_the_gap_closed():
    gap = np.array([[0.9, 0.05], [0.8, -0.25]])
    found = {"own": {name: np.full((2, 2), 0.9) for name in suite.MEASURES} | {"gap": gap}}
    online = {"episodes": 64, "finetune": 1000, "imagine": 300, "rounds": 1}
    result = {
        "command": "nested bench counterfactual", "commit": "0123456789abcdef", "seeds": 2,
        "config": {"online": online}, "arms": ["own"],
        "measures": suite.summary(found, np.random.default_rng(0)),
    }  # fmt: skip
    lines = rounds_page.block(result).splitlines()
    row = next(line for line in lines if line.startswith("| imagined minus real return"))
    assert row.split(" | ")[2:] == [
        "0.85 [0.80, 0.90]", "-0.10 [-0.25, 0.05]", "-0.95 [-1.05, -0.85] |"
    ]  # fmt: skip
    assert lines[-1].startswith("The gap, +0.850 before, is -0.100 after the last round: 11% of")
    assert "under 10 % of it in 1 of 2 seeds" in lines[-1]
