"""From a configuration to an agent and its timescales: the one place that assembles.

The order in which modules are made fixes the random initialisation, so it is part of what makes
two runs with one seed equal.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from agents import Dreamer, make_actor
from experiments.config import Config, ConfigError, LevelConfig, Part, levels_of
from experiments.config.levels import DescendConfig, PullConfig, WeightedConfig
from experiments.config.models import MemoryConfig
from nested import (
    TTTMLP,
    ContinuumMemory,
    DeltaMemory,
    GatedDeltaMemory,
    HebbMemory,
    HopeBlock,
    NeuralMemory,
    RLSMemory,
    TTTLinear,
)
from timescales import (
    REST,
    Descend,
    Every,
    Level,
    Pull,
    Relax,
    Reset,
    Timescales,
    Weighted,
    presets,
    rules,
)
from worldmodel import (
    RSSM,
    ActionSpec,
    Binary,
    Decoder,
    Encoder,
    ObsSpec,
    TwoHot,
    WorldModel,
)

SLOW_CRITIC = "slow_critic"
MEMORIES = {
    "hebb": HebbMemory,
    "delta": DeltaMemory,
    "gated_delta": GatedDeltaMemory,
    "neural": NeuralMemory,
    "ttt_linear": TTTLinear,
    "ttt_mlp": TTTMLP,
    "continuum": ContinuumMemory,
    "hope": HopeBlock,
    "rls": RLSMemory,
}


def device_of(config: Config) -> torch.device:
    """The device that the configuration names, or the best there is."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device", "cuda", "no CUDA device is available", "use device=cpu")
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def build_agent(
    config: Config, obs_spec: Mapping[str, ObsSpec], action_spec: ActionSpec
) -> Dreamer:
    """A Dreamer for these spaces, initialised from config.seed and from nothing else."""
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        return _dreamer(config, dict(obs_spec), action_spec).to(device_of(config))


def _dreamer(config: Config, obs_spec: dict[str, ObsSpec], action_spec: ActionSpec) -> Dreamer:
    model, agent = config.model, config.agent
    encoder = Encoder(obs_spec, model.depth, model.units, model.layers, model.encoder)
    latent = model.stoch * model.classes
    dynamics = RSSM(
        encoder.dim,
        action_spec.dim,
        model.deter,
        model.hidden,
        model.stoch,
        model.classes,
        model.blocks,
        agent.unimix,
        make_memory(model.memory, 3 * model.hidden, model.hidden),
    )
    decoder = Decoder(
        obs_spec,
        model.deter,
        latent,
        model.depth,
        model.units,
        model.layers,
        model.blocks,
        model.encoder,
    )
    world = WorldModel(
        encoder,
        dynamics,
        decoder,
        TwoHot(dynamics.feature, model.units, 1, agent.bins),
        Binary(dynamics.feature, model.units, 1),
        forget="session" if model.memory.kind == "none" else model.memory.forget,
        discount=1 - 1 / agent.discount,
        free_nats=agent.free_nats,
        users=config.env.has_users,
    )
    return Dreamer(
        world,
        make_actor(dynamics.feature, action_spec, model.units, agent.layers, agent.unimix),
        TwoHot(dynamics.feature, model.units, agent.layers, agent.bins),
        loss_scales(config, obs_spec),
        agent.horizon,
        agent.starts,
        agent.lam,
        agent.entropy,
        agent.slow_regularizer,
        "off" if model.memory.kind == "none" else model.memory.imagine,
        agent.standardize,
    )


def make_memory(memory: MemoryConfig, dim_in: int, dim_out: int) -> nn.Module | None:
    """A memory from its configuration; its initialisation is torch's global generator's."""
    if memory.kind == "none":
        return None
    settings = memory.model_dump(exclude={"kind", "forget", "imagine"})
    if "forget_rate" in settings:
        settings["forget"] = settings.pop("forget_rate")
    return MEMORIES[memory.kind](dim_in, dim_out, **settings)


def loss_scales(config: Config, obs_spec: Mapping[str, ObsSpec]) -> dict[str, float]:
    """The weight of every loss: an observation's key takes `reconstruction` unless named."""
    scales = dict(config.agent.scales)
    reconstruction = scales.pop("reconstruction")
    clash = sorted(obs_spec.keys() & {"dyn", "rep", "reward", "continue", "value", "policy"})
    if clash:
        problem = "is the name of a loss as well as of an observation"
        raise ConfigError("env.id", config.env.id, f"{clash[0]!r} {problem}", "rename the entry")
    return {key: scales.get(key, reconstruction) for key in obs_spec} | scales


def build_timescales(config: Config, agent: Dreamer, seed: int = 0) -> Timescales:
    """The levels of the configuration, and the slow critic as a copy level behind them."""
    named = dict(agent.named_parameters())
    levels = [make_level(name, level, list(named)) for name, level in levels_of(config).items()]
    levels.append(
        Level(SLOW_CRITIC, copy=r"^critic\.", flow=Pull("params", config.agent.slow_rate))
    )
    generator = torch.Generator().manual_seed(seed)
    try:
        return Timescales(named.items(), levels, generator=generator)
    except ValueError as error:
        lines = str(error).splitlines()
        text = "; ".join(line.strip() for line in lines[1:] or lines)
        hint = "see the parameter names with `nested schedule`"
        raise ConfigError("timescales.levels", ", ".join(levels_of(config)), text, hint) from error


def make_level(name: str, level: LevelConfig, names: list[str]) -> Level:
    """A level as timescales/ knows it; `names` resolve a match by depth or by block."""
    if level.match is None and level.copy_of is None:
        raise ConfigError(f"timescales.levels.{name}", None, "needs match: or copy:", "add one")
    match = level.match
    if isinstance(match, Part):
        match = presets.part(names, match.by, match.part, match.of)
    return Level(
        name,
        match=REST if match == "REST" else match,
        copy=level.copy_of,
        every=Every(**level.every.model_dump()),
        flow=make_flow(level.flow),
        relax=tuple(Relax(r.to, make_rate(r.rate), r.noise) for r in level.relax),
        reset=tuple(Reset(r.to, Every(**r.every.model_dump()), r.clear_rule) for r in level.reset),
        start=level.start,
    )


def make_rate(rate: float | WeightedConfig) -> float | Weighted:
    """A rate as timescales/ knows it."""
    return Weighted(rate.by, rate.times) if isinstance(rate, WeightedConfig) else rate


def make_flow(flow: DescendConfig | PullConfig | None) -> Descend | Pull | None:
    """A flow as timescales/ knows it."""
    match flow:
        case DescendConfig():
            return Descend(make_rule(flow.rule), flow.reduce)
        case PullConfig():
            outer = None if flow.outer is None else make_rule(flow.outer)
            return Pull(flow.source, flow.rate, outer)
        case None:
            return None


def make_rule(rule: Any) -> Any:
    """An optimizer factory from its configuration."""
    settings = rule.model_dump()
    return getattr(rules, settings.pop("kind"))(**settings)


def slow_critic(timescales: Timescales) -> dict[str, Tensor]:
    """The slow critic's weights under the names that the critic itself uses."""
    weights = timescales.weights(SLOW_CRITIC)
    return {name.removeprefix("critic."): value for name, value in weights.items()}


def level_table(config: Config, window: int = 64) -> tuple[list[dict[str, Any]], dict]:
    """Rows of the level table and the updates at which each level moves in a window."""
    from experiments.envs import make_envs

    envs = make_envs(config.env.model_copy(update={"workers": "inprocess"}), 1, config.seed)
    try:
        agent = build_agent(config, envs.obs_spec, envs.action_spec)
    finally:
        envs.close()
    timescales = build_timescales(config, agent)
    return timescales.table(), timescales.timeline(window)
