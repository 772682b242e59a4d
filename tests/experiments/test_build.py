"""Assembly: plain Dreamer is a torch loop bit for bit; mistakes are told with a way out.

Free nats are off: below them the prior has no gradient, and nothing would tell whether it learns.
"""

import copy
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from agents import Dreamer
from experiments import load_config, make_envs
from experiments.build import (
    MEMORIES,
    SLOW_CRITIC,
    build_agent,
    build_timescales,
    level_table,
    loss_scales,
    slow_critic,
)
from experiments.config import Config, ConfigError
from worldmodel import Batch, ObsSpec

FIELDS = (
    "env.num=4 device=cpu model.deter=8 model.hidden=8 model.classes=4 model.stoch=2 "
    "model.units=8 model.blocks=2 agent.horizon=2 agent.layers=1 agent.bins=15 agent.free_nats=0"
)
UPDATES = 50
SHAPE = (2, 5)  # sequences and rows of a batch


def configure(preset: str, *fields: str) -> Config:
    return load_config(preset, [*FIELDS.split(), *fields])


def agent_of(config: Config) -> Dreamer:
    envs = make_envs(config.env)
    envs.close()
    return build_agent(config, envs.obs_spec, envs.action_spec)


def batches(seed: int = 0) -> Iterator[Batch]:
    """Random rows of CartPole, with episodes that begin and end inside."""
    rng = np.random.default_rng(seed)
    while True:
        obs = {"state": torch.from_numpy(rng.normal(size=(*SHAPE, 4)).astype(np.float32))}
        action = torch.from_numpy(np.eye(2, dtype=np.float32)[rng.integers(2, size=SHAPE)])
        reward = torch.from_numpy(rng.random(SHAPE, np.float32))
        first, terminal = (torch.from_numpy(rng.random(SHAPE) < 0.2) for _ in range(2))
        user = torch.zeros(SHAPE, dtype=torch.int64)
        yield Batch(obs, action, reward, first, terminal, user)


def backward(agent: Dreamer, batch: Batch, slow: dict[str, Tensor], generator: torch.Generator):
    outcome = agent.losses(batch, agent.initial(SHAPE[0]), slow, generator)
    agent.total(outcome.losses).backward()


@pytest.mark.parametrize("memory", ["none", "gated_delta"])
def test_plain_is_a_torch_loop_bit_for_bit(memory):
    """One fused AdamW on everything, and the slow critic as a moving average by hand."""
    rule = "timescales={kind: plain, rule: {kind: adamw, lr: 3e-4}}"
    config = configure("plain", rule, f"model.memory.kind={memory}")
    ours = agent_of(config)
    textbook = copy.deepcopy(ours)

    timescales = build_timescales(config, ours)
    generator = torch.Generator().manual_seed(1)
    for _, batch in zip(range(UPDATES), batches(), strict=False):
        backward(ours, batch, slow_critic(timescales), generator)
        timescales.tick("update")

    optimizer = torch.optim.AdamW(textbook.parameters(), lr=3e-4, weight_decay=0, fused=True)
    slow = {name: p.detach().clone() for name, p in textbook.critic.named_parameters()}
    generator = torch.Generator().manual_seed(1)
    for _, batch in zip(range(UPDATES), batches(), strict=False):
        optimizer.zero_grad()
        backward(textbook, batch, slow, generator)
        optimizer.step()
        for name, p in textbook.critic.named_parameters():
            slow[name].lerp_(p.detach(), 0.02)

    before = agent_of(config).state_dict()
    expected = textbook.state_dict()
    for name, value in ours.state_dict().items():
        assert torch.equal(value, expected[name]), name
        assert not torch.equal(value, before[name]), f"{name} never moved"
    for name, value in slow_critic(timescales).items():
        assert torch.equal(value, slow[name]), name


def test_ewc_of_no_weight_is_plain_bit_for_bit_and_holds_with_one():
    """And what it holds is the world model and the actor, near where a window ended."""
    agents = {}
    for name, kind in (
        ("plain", "plain"),
        ("free", "{kind: ewc, weight: 0, n: 6}"),
        ("held", "{kind: ewc, weight: 1e9, n: 6}"),
    ):
        given = f"timescales={kind}" if kind.startswith("{") else f"timescales.kind={kind}"
        config = configure("plain", given, "timescales.rule={kind: laprop, lr: 1e-3, warmup: 0}")
        agent = agents[name] = agent_of(config)
        timescales = build_timescales(config, agent)
        generator = torch.Generator().manual_seed(1)
        for _, batch in zip(range(11), batches(), strict=False):
            backward(agent, batch, slow_critic(timescales), generator)
            timescales.tick("update")
        if name == "held":
            anchor, fisher = (timescales.weights(n) for n in ("anchor", "fisher"))
    plain, held = (agents[name].state_dict() for name in ("plain", "held"))
    for name, value in agents["free"].state_dict().items():
        assert torch.equal(value, plain[name]), name
    heavy = {name: importance > 0.01 for name, importance in fisher.items()}  # a rate of 1, nearly
    drifts = [
        sum(float((w[n] - a)[heavy[n]].norm()) for n, a in anchor.items()) for w in (held, plain)
    ]
    assert drifts[0] < 0.6 * drifts[1], drifts
    assert not any(name.startswith("critic") for name in anchor)


def test_the_agent_depends_on_the_seed_alone():
    one, two, other = (agent_of(configure("plain", f"seed={seed}")) for seed in (0, 0, 1))
    name = "actor.net.layers.0.linear.weight"
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one.state_dict()[name], other.state_dict()[name])


@pytest.mark.parametrize("kind", ["adamw", "laprop", "sgd", "muon", "m3"])
def test_every_configured_rule_moves_every_parameter(kind):
    config = configure("k3", f"timescales.rule={{kind: {kind}, lr: 0.1}}", "timescales.base=2")
    agent = agent_of(config)
    before = copy.deepcopy(agent.state_dict())
    timescales = build_timescales(config, agent)
    generator = torch.Generator().manual_seed(0)
    for _, batch in zip(range(4), batches(), strict=False):
        backward(agent, batch, slow_critic(timescales), generator)
        moved = timescales.tick("update")
    assert moved == ["fast", "mid", "slow", SLOW_CRITIC]
    for name, _ in agent.named_parameters():
        assert not torch.equal(agent.state_dict()[name], before[name]), name


@pytest.mark.parametrize(
    "kind",
    ["cms", "lookahead", "diloco", "cls_er", "hare_tortoise", "benna_fusi", "l2_init", "ewc"],
)
def test_every_kind_can_be_built(kind):
    config = configure("plain", f"timescales.kind={kind}")
    table = build_timescales(config, agent_of(config)).table()
    assert table[-1]["name"] == SLOW_CRITIC
    owned = [row["parameters"] for row in table if row["kind"] == "match"]
    assert sum(owned) == sum(p.numel() for p in agent_of(config).parameters())


@pytest.mark.parametrize("by", ["module", "depth", "block"])
def test_a_split_gives_every_parameter_one_owner(by):
    config = configure(
        "plain", "timescales.kind=geometric", "timescales.k=5", f"timescales.by={by}"
    )
    rows, moves = level_table(config, window=16)
    assert [row["name"] for row in rows] == ["fast", "mid1", "mid2", "mid3", "slow", SLOW_CRITIC]
    assert [row["n"] for row in rows] == [1, 4, 16, 64, 256, 1]
    assert sum(row["share"] for row in rows[:-1]) == pytest.approx(1.0)
    assert moves["mid1"] == [4, 8, 12, 16] and moves["mid2"] == [16] and moves["slow"] == []


def test_an_observation_weighs_as_reconstruction_unless_it_is_named():
    specs = {"image": ObsSpec("image", (64, 64, 3)), "state": ObsSpec("vector", (4,))}
    config = configure("plain", "agent.scales.reconstruction=0.5", "agent.scales.state=2")
    scales = loss_scales(config, specs)
    assert scales["image"] == 0.5 and scales["state"] == 2.0
    assert scales["rep"] == 0.1 and scales["repvalue"] == 0.3
    assert "reconstruction" not in scales


def test_an_observation_called_like_a_loss_is_refused():
    with pytest.raises(ConfigError, match="'reward' is the name of a loss") as found:
        loss_scales(configure("plain"), {"reward": ObsSpec("vector", (1,))})
    assert found.value.field == "env.id"


@pytest.mark.parametrize(
    ("pattern", "told"),
    [
        ("encodr", r"level 'slow' \('encodr'\) matches no parameter; did you mean world.encoder"),
        ("encodr", r"no level owns \d+: world.encoder"),
        (r"^(actor|world\.encoder)\.", r"claimed twice: \d+: actor\.\S+ \(by fast, slow\)"),
        ("(", r"level 'slow' \('\('\)"),
    ],
)
def test_levels_that_do_not_fit_are_told_by_name(pattern, told):
    config = configure("k3", f"timescales.levels.slow.match={pattern}")
    with pytest.raises(ConfigError, match=told) as found:
        build_timescales(config, agent_of(config))
    assert found.value.field.startswith("timescales.levels")
    assert found.value.suggestion


@pytest.mark.parametrize("kind", [kind for kind in MEMORIES if kind != "gated_delta"])
def test_every_memory_learns_inside_the_agent(kind: str):
    config = configure("plain", f"model.memory.kind={kind}", "model.memory.dim=8")
    agent, batch = agent_of(config), next(batches())
    slow = {name: p.detach().clone() for name, p in agent.critic.named_parameters()}
    backward(agent, batch, slow, torch.Generator().manual_seed(0))
    memory = agent.world.dynamics.memory
    grads = [p.grad for p in memory.parameters() if p.grad is not None]
    assert grads and all(g.isfinite().all() for g in grads) and any(g.any() for g in grads)
