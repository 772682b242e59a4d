"""Dreamer 4's blocks as configuration: levels chosen block by block, memories, more on top."""

import pytest
import torch

from experiments.build import make_level
from experiments.config import ConfigError
from experiments.config.dreamer4 import Dreamer4Config, levels_of_phase, load_dreamer4
from experiments.data.clips import Spec
from experiments.offline_loop import build_offline
from timescales import Timescales
from worldmodel import ActionSpec, ObsSpec
from worldmodel.transformer import stack

SMALL = (
    *("tokenizer.trunk.width=16", "tokenizer.trunk.layers=2", "tokenizer.latents=2"),
    *("dynamics.trunk.width=16", "dynamics.trunk.layers=4", "dynamics.spatial=2"),
    *("dynamics.registers=1", "agent.units=8", "agent.ahead=2"),
)
LAYER = "dynamics.transformer.layers"
SPEC = Spec({"image": ObsSpec("image", (16, 16, 3))}, ActionSpec("discrete", (3,)))


def configured(*changes: str) -> Dreamer4Config:
    return load_dreamer4(None, [*SMALL, *changes])


def levels_of(config: Dreamer4Config) -> tuple[dict[str, torch.nn.Parameter], Timescales]:
    """Parameters of the dynamics by name, and the levels of their phase."""
    agent = build_offline(config, SPEC)
    named = {n: p for n, p in agent.named_parameters() if n.startswith("dynamics.")}
    levels = levels_of_phase(config.phases.dynamics.timescales)
    made = [make_level(name, level, list(named)) for name, level in levels.items()]
    return named, Timescales(named.items(), made)


def owners(timescales: Timescales) -> dict[str, str]:
    """The level of each parameter."""
    return {n: level.name for level in timescales.levels for n in timescales.weights(level.name)}


def test_levels_are_chosen_block_by_block():
    """Early blocks, late blocks and the rest, each on a clock of its own."""
    fields = {"early": "[01]", "late": "[23]"}
    prefix = "phases.dynamics.timescales"
    rule = "{kind: descend, rule: {kind: adamw, lr: 1e-3}}"
    config = configured(
        f"{prefix}={{kind: levels, levels: {{"
        + ", ".join(
            f"{name}: {{match: 'layers\\.{which}\\.', every: {{n: {n}}}, flow: {rule}}}"
            for n, (name, which) in enumerate(fields.items(), 2)
        )
        + f", rest: {{match: REST, every: {{n: 1}}, flow: {rule}}}}}}}"
    )
    named, timescales = levels_of(config)
    found = owners(timescales)
    assert found.keys() == named.keys()
    for name, level in found.items():
        block = name.removeprefix(f"{LAYER}.")[:1] if name.startswith(LAYER) else ""
        assert level == {"0": "early", "1": "early", "2": "late", "3": "late"}.get(block, "rest")


@pytest.mark.parametrize("by", ["depth", "block"])
def test_one_line_puts_k_levels_over_the_blocks(by: str):
    prefix = "phases.dynamics.timescales"
    config = configured(f"{prefix}={{kind: geometric, k: 3, by: {by}}}")
    named, timescales = levels_of(config)
    found = owners(timescales)
    assert found.keys() == named.keys() and len(set(found.values())) == 3
    blocks: dict[str, set[str]] = {}
    for name, level in found.items():
        if name.startswith(LAYER):
            blocks.setdefault(name.removeprefix(f"{LAYER}.")[0], set()).add(level)
    if by == "depth":  # the nearer to the output, the faster
        assert "slow" in blocks["0"] and "slow" not in blocks["3"] and "fast" in blocks["3"]
    else:  # the layers of a block take turns
        assert all(len(levels) == 3 for levels in blocks.values())
    assert [level.every.n for level in timescales.levels] == [1, 4, 16]


def test_memories_and_chains_stand_where_the_configuration_says():
    trunk = "dynamics.trunk"
    memory = "{kind: gated_delta, dim: 4}"
    feed = "{kind: continuum, dim: 4, hidden: 8}"
    plain = build_offline(configured(), SPEC)
    agent = build_offline(configured(f"{trunk}.memory={memory}", f"{trunk}.chain=1"), SPEC)
    new = stack(agent, plain.state_dict())
    assert {name.removeprefix(f"{LAYER}.").split(".")[1] for name in new} == {"beside", "chain"}
    instead = configured(
        f"{trunk}.memory={memory}", f"{trunk}.place=instead", f"{trunk}.feed={feed}"
    )
    names = [n for n, _ in build_offline(instead, SPEC).named_parameters() if n.startswith(LAYER)]
    assert any(n.startswith(f"{LAYER}.1.attention.memory") for n in names)
    assert any(n.startswith(f"{LAYER}.0.feed.memory") for n in names)
    assert not any(".mlp." in n for n in names)


@pytest.mark.parametrize("change", ["agent.members=1", "agent.doubt=0.5"])
def test_one_cannot_disagree(change: str):
    with pytest.raises(ConfigError, match=r"agent\.members"):
        configured(change)
    agent = build_offline(configured("agent.members=2", "agent.doubt=0.5"), SPEC)
    assert agent.ensemble is not None and agent.doubt == 0.5
