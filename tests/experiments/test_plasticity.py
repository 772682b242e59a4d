"""Signs of lost plasticity: on activations and features whose answer is known, and of agents."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from agents import Dreamer
from experiments import load_config, plasticity, train
from experiments.build import build_agent
from experiments.record.metrics import read
from experiments.together import train_together
from worldmodel import ActionSpec, Batch, ObsSpec

SMALL = (
    "device=cpu", "model.deter=32", "model.hidden=16", "model.classes=4", "model.stoch=4",
    "model.units=12", "model.blocks=2", "model.layers=2", "agent.horizon=2", "agent.layers=3",
    "agent.bins=15",
)  # fmt: skip
RUN = (
    "frames=96", "env.num=4", "env.time_limit=5", "threads=1", "train.ratio=2",
    "train.prefill=32", "replay.capacity=96", "replay.batch=2", "replay.length=4",
    "agent.starts=0", "log.every=48", "checkpoint.every=0", "evaluate.every=48",
    "evaluate.episodes=1", "tracking.mlflow=false", "tracking.pictures=false",
)  # fmt: skip
SPEC = {
    "view": ObsSpec("image", (16, 16, 3)),
    "state": ObsSpec("vector", (5,)),
    "kind": ObsSpec("discrete", (2,), 3),
}
SHAPE = (3, 6)  # sequences and rows


def test_dormant_units_are_measured_by_their_layer():
    # means of |h|: 0, 0.02, 1, 3; of the layer 1.005; scores 0, 0.0199, 0.995, 2.985
    activations = torch.tensor([[0.0, 0.04, -1.0, 2.0], [0.0, 0.0, 1.0, -4.0]])
    expected = torch.tensor([0.0, 0.02, 1.0, 3.0]) / 1.005
    torch.testing.assert_close(plasticity.unit_scores(activations), expected)
    assert plasticity.dormant(activations) == 0.5
    assert plasticity.dormant(activations, tau=0.01) == 0.25
    assert plasticity.dormant(activations, tau=1.0) == 0.75
    assert plasticity.dormant(activations * 1e3) == 0.5  # a scale changes nothing
    assert plasticity.dormant(torch.zeros(2, 4)) == 1.0


def test_effective_rank():
    assert plasticity.erank(torch.eye(6)[:, :4]) == pytest.approx(4.0, abs=1e-5)
    one = torch.randn(6, 1) @ torch.randn(1, 5)
    assert plasticity.erank(one) == pytest.approx(1.0, abs=1e-4)
    # singular values 3 and 1: exp of the entropy of (3/4, 1/4)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    features = torch.diag(torch.tensor([3.0, 1.0]))
    assert plasticity.erank(features) == pytest.approx(math.exp(entropy), abs=1e-5)
    assert plasticity.erank(torch.zeros(3, 2)) == 0.0


def test_srank_counts_what_holds_the_share():
    spread = torch.diag(torch.tensor([50.0, 30, 19, 0.6, 0.4]))  # 0.5, 0.8, 0.99, 0.996, 1
    assert plasticity.srank(spread) == 3
    assert plasticity.srank(spread, share=0.8) == 2
    assert plasticity.srank(spread, share=0.995) == 4
    assert plasticity.srank(torch.eye(5)) == 5
    assert plasticity.srank(torch.zeros(3, 2)) == 0


def test_weight_norm_keeps_seeds_apart():
    weights = {"a": torch.tensor([[3.0, 0], [0, 0]]), "b": torch.tensor([[[4.0]], [[2.0]]])}
    assert plasticity.weight_norm(weights).tolist() == [5.0, 2.0]
    assert plasticity.weight_norm(weights, leading=0) == pytest.approx(29**0.5)


def test_seeds_are_a_leading_axis():
    batch = torch.randn(3, 8, 5)
    for measure in (plasticity.dormant, plasticity.erank, plasticity.srank):
        torch.testing.assert_close(measure(batch), torch.stack([measure(x) for x in batch]))


def test_fresh_gap_is_positive_where_plasticity_was_lost():
    gap = plasticity.fresh_gap(np.array([0.9, 0.9]), np.array([[0.9, 0.5], [1.0, 0.8]]))
    assert np.allclose(gap, [[0.0, 0.4], [-0.1, 0.1]])


# ---- an agent ------------------------------------------------------------------------------------
def agent_of(*fields: str) -> Dreamer:
    config = load_config("plain", [*SMALL, *fields])
    return build_agent(config, SPEC, ActionSpec("discrete", (2, 3)))


def batch() -> Batch:
    rng = np.random.default_rng(0)
    obs = {
        "view": rng.integers(256, size=(*SHAPE, 16, 16, 3)).astype(np.uint8),
        "state": rng.normal(size=(*SHAPE, 5)).astype(np.float32),
        "kind": rng.integers(3, size=(*SHAPE, 2)),
    }
    action = np.concatenate(
        [np.eye(n, dtype=np.float32)[rng.integers(n, size=SHAPE)] for n in (2, 3)], -1
    )
    flags = np.zeros(SHAPE, bool)
    rows = (action, rng.random(SHAPE, np.float32), flags, flags, np.zeros(SHAPE, np.int64))
    return Batch(
        {k: torch.from_numpy(v) for k, v in obs.items()}, *(torch.from_numpy(v) for v in rows)
    )


def symptoms(agent: Dreamer) -> dict[str, float]:
    generator = torch.Generator().manual_seed(0)
    return plasticity.symptoms(agent, batch(), agent.initial(SHAPE[0]), generator)


@pytest.mark.parametrize("encoder", ["faithful", "strided"])
def test_every_hidden_layer_is_looked_at(encoder: str):
    agent = agent_of(
        f"model.encoder={encoder}", "model.memory.kind=gated_delta", "model.memory.dim=8"
    )
    nets = plasticity.hidden(agent, batch(), agent.initial(SHAPE[0]), torch.Generator())
    widths = {part: [[x.shape[-1] for x in net] for net in found] for part, found in nets.items()}
    vectors, images = [12, 12], [8, 12, 16, 16]
    assert widths == {
        "world": [[12], [12], [16], [16], [16, 16], [16], vectors, images, vectors, images[::-1]],
        "actor": [[12, 12, 12]],
        "critic": [[12, 12, 12]],
    }
    for x in (x for found in nets.values() for net in found for x in net):
        assert x.shape[0] <= plasticity.ROWS and x.shape[0] % math.prod(SHAPE) == 0
        assert not x.requires_grad


def test_an_agents_dormant_units_rank_and_norm():
    agent = agent_of()
    before = symptoms(agent)
    assert before["plasticity/actor/dormant"] == 0.0
    assert 1.0 < before["plasticity/actor/erank"] <= 12.0
    squares = sum(float(p.detach().square().sum()) for p in agent.parameters())
    assert before["plasticity/weight_norm"] == pytest.approx(squares**0.5, rel=1e-5)
    with torch.no_grad():
        for layer in agent.actor.net.layers:
            layer.get_parameter("norm.weight")[:6] = 0.0  # half of the units give nothing
    after = symptoms(agent)
    assert after["plasticity/actor/dormant"] == 0.5
    assert after["plasticity/actor/erank"] < min(6.01, before["plasticity/actor/erank"])
    assert after["plasticity/critic/dormant"] == before["plasticity/critic/dormant"]
    whole = after["plasticity/dormant"] - before["plasticity/dormant"]
    units = sum(
        x.shape[-1]
        for found in plasticity.hidden(agent, batch(), agent.initial(SHAPE[0])).values()
        for net in found
        for x in net
    )
    assert whole == pytest.approx(18 / units)


def told(path: Path, prefix: str) -> list[tuple[int, dict[str, float]]]:
    rows = [(row.step, row.metrics) for row in read(path / "metrics.jsonl")]
    kept = [(at, {k: v for k, v in found.items() if k.startswith(prefix)}) for at, found in rows]
    return [(at, found) for at, found in kept if found]


@pytest.mark.parametrize("together", [False, True])
def test_a_look_changes_nothing_in_training(tmp_path: Path, together: bool):
    paths = []
    for plain in (True, False):
        root = [
            f"tracking.root={tmp_path / str(plain)}",
            f"evaluate.plasticity={not plain}".lower(),
        ]
        configs = [load_config("cartpole", [*SMALL, *RUN, *root, f"seed={n}"]) for n in range(2)]
        paths += [train_together(configs)[1] if together else train(configs[1])]
    for prefix in ("loss/", "agent/", "levels/", "eval/", "train/"):
        assert told(paths[0], prefix) == told(paths[1], prefix) != []
    assert told(paths[0], "plasticity/") == []
    found = told(paths[1], "plasticity/")
    assert [at for at, _ in found] == [48, 96], "nothing is stored at the start"
    names = {f"plasticity/{part}{name}" for part in ("", "world/", "actor/", "critic/")
             for name in ("dormant", "erank", "weight_norm")}  # fmt: skip
    assert all(
        values.keys() == names and all(map(math.isfinite, values.values())) for _, values in found
    )
