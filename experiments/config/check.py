"""What ties fields of a configuration together: checks that no single field can make.

Each check takes the resolved configuration and raises ConfigError; none needs torch or an
environment.
"""

import difflib

from .errors import ConfigError, nearest
from .levels import DescendConfig, LevelConfig, Levels, PullConfig, WeightedConfig
from .models import SCALES, WITH_USERS, Config

RESERVED = ("slow_critic", "params", "init", "zero", "squares", "user")  # taken by the assembly


def check(config: Config) -> None:
    """Raise ConfigError for the first combination of fields that cannot run."""
    _frames(config)
    _lengths(config)
    _replay(config)
    _starts(config)
    _model(config)
    _scales(config)
    _users(config)
    assert isinstance(config.timescales, Levels)
    levels = config.timescales.levels
    for name, level in levels.items():
        _level(name, level, levels)
    _taught(config, levels)


def _frames(config: Config) -> None:
    phases = 1 if config.env.lengths else max(1, len(config.env.contexts))
    unit = config.env.num * phases
    if config.frames % unit:
        near = max(unit, round(config.frames / unit) * unit)
        parts = f"env.num={config.env.num}" + (f" times {phases} contexts" if phases > 1 else "")
        raise ConfigError(
            "frames", config.frames, f"is no multiple of {parts} = {unit}", f"use {near}"
        )
    if config.train.prefill >= config.frames:
        raise ConfigError(
            "train.prefill", config.train.prefill, f"leaves nothing of frames={config.frames}",
            f"use at most {config.frames - config.env.num}",
        )  # fmt: skip


def _lengths(config: Config) -> None:
    env, lengths = config.env, config.env.lengths
    if not lengths:
        return
    if len(lengths) != len(env.contexts):
        raise ConfigError(
            "env.lengths", list(lengths), f"env.contexts has {len(env.contexts)} phases",
            "give as many, or [] for phases of equal length",
        )  # fmt: skip
    for i, length in enumerate(lengths):
        if length % env.num:
            raise ConfigError(
                f"env.lengths.{i}", length, f"is no multiple of env.num={env.num}",
                f"use {max(env.num, round(length / env.num) * env.num)}",
            )  # fmt: skip
    if sum(lengths) != config.frames:
        raise ConfigError(
            "env.lengths", list(lengths), f"is {sum(lengths)} together, frames={config.frames}",
            f"use frames={sum(lengths)}",
        )  # fmt: skip


def _replay(config: Config) -> None:
    replay, num = config.replay, config.env.num
    needed = replay.batch * replay.length
    if needed > replay.capacity:
        raise ConfigError(
            "replay.capacity", replay.capacity,
            f"a batch of {replay.batch} x {replay.length} frames does not fit",
            f"use at least {needed}",
        )  # fmt: skip
    unit = replay.rollout if replay.kind == "matching" else replay.length
    what, field = ("rollout", "rollout") if unit != replay.length else ("sequence", "length")
    if unit % replay.length:
        raise ConfigError(
            "replay.rollout", unit, f"is no multiple of replay.length={replay.length}",
            f"use {max(1, round(unit / replay.length)) * replay.length}",
        )  # fmt: skip
    if config.train.prefill < num * unit:
        raise ConfigError(
            "train.prefill", config.train.prefill,
            f"gives each of {num} slots {config.train.prefill // num} frames, a {what} has {unit}",
            f"use at least {num * unit}, or a smaller replay.{field}",
        )  # fmt: skip
    parts = 2 if replay.kind in ("mixed", "matching") else 1
    if parts * num * unit > replay.capacity:
        where = " in each of its halves" if parts > 1 else ""
        raise ConfigError(
            "replay.capacity", replay.capacity,
            f"holds no {what} of {unit} for each of {num} slots{where}",
            f"use at least {parts * num * unit}",
        )  # fmt: skip


def _starts(config: Config) -> None:
    length = config.replay.length
    if config.agent.starts == 1 or length == 1:
        field, value = ("agent.starts", 1) if length > 1 else ("replay.length", 1)
        raise ConfigError(
            field, value, "leaves the critic no replayed step between two starts", "use at least 2"
        )
    if config.agent.starts > length:
        raise ConfigError(
            "agent.starts", config.agent.starts, f"a sequence has {length} rows",
            f"use at most {length}, or 0 for all",
        )  # fmt: skip


def _model(config: Config) -> None:
    model = config.model
    if model.deter % model.blocks:
        raise ConfigError(
            "model.blocks", model.blocks, f"does not divide model.deter={model.deter}",
            "use a divisor, or another deter",
        )  # fmt: skip
    if model.memory.kind != "none" and model.memory.dim % model.memory.heads:
        raise ConfigError(
            "model.memory.heads", model.memory.heads,
            f"does not divide model.memory.dim={model.memory.dim}", "use a divisor",
        )  # fmt: skip


def _users(config: Config) -> None:
    users, memory = config.users, config.model.memory
    if users is None:
        return
    if not config.env.has_users:
        raise ConfigError(
            "users", ..., f"the slots of {config.env.id} do not change hands",
            f"leave it out, or use env.id={' or '.join(sorted(WITH_USERS))}",
        )  # fmt: skip
    if memory.kind == "none":
        raise ConfigError(
            "users", ..., "there are no fast weights to keep",
            "leave it out, or use model.memory.kind=gated_delta",
        )  # fmt: skip
    if memory.forget != "session":
        raise ConfigError(
            "model.memory.forget", memory.forget,
            "does not go with users:, where each has fast weights of their own",
            "use session, and users.keep says whether they find them again",
        )  # fmt: skip
    if users.slots < config.env.num:
        raise ConfigError(
            "users.slots", users.slots, f"is fewer than env.num={config.env.num} sit at once",
            f"use at least {config.env.num}",
        )  # fmt: skip


def _scales(config: Config) -> None:
    # Other keys may be names of observations; a near miss of a known loss is a slip.
    for key, value in config.agent.scales.items():
        near = difflib.get_close_matches(key, SCALES, n=1, cutoff=0.75)
        if key not in SCALES and near:
            raise ConfigError(
                f"agent.scales.{key}",
                value,
                "no such loss",
                f"did you mean agent.scales.{near[0]}?",
            )


def _level(name: str, level: LevelConfig, levels: dict[str, LevelConfig]) -> None:
    field = f"timescales.levels.{name}"
    if name in RESERVED or not name.isidentifier():
        raise ConfigError(
            field, name, "is no name for a level", f"use letters, digits and _; not {RESERVED}"
        )
    if (level.match is None) == (level.copy_of is None):
        given = "both are given" if level.match is not None else "neither is given"
        raise ConfigError(
            field, ..., f"a level either owns (match) or shadows (copy) parameters; {given}",
            f"write {field}.match=REST to own what no other level claims",
        )  # fmt: skip
    if level.copy_of is not None and isinstance(level.flow, DescendConfig):
        raise ConfigError(
            f"{field}.flow.kind", "descend", "a copy has no gradients to descend",
            "use kind: pull, with a source",
        )  # fmt: skip
    if level.copy_of is None and level.start == "zero":
        raise ConfigError(
            f"{field}.start", "zero", "parameters begin as they were initialised",
            "write copy: instead of match:, or leave start out",
        )  # fmt: skip
    _sources(field, name, level, levels)


def _taught(config: Config, levels: dict[str, LevelConfig]) -> None:
    """Levels that pull toward what users learned: one at most, where there is such a thing."""
    flows = {name: level.flow for name, level in levels.items()}
    names = [n for n, x in flows.items() if isinstance(x, PullConfig) and x.source == "user"]
    for name in names:
        field, unit = f"timescales.levels.{name}", levels[name].every.unit
        if not config.env.has_users or config.model.memory.kind == "none":
            raise ConfigError(
                f"{field}.flow.source", "user",
                f"{config.env.id} has no users who learn with this model",
                f"use env.id={' or '.join(sorted(WITH_USERS))} and a model.memory",
            )  # fmt: skip
        if unit != "session":
            raise ConfigError(
                f"{field}.every.unit", unit, "users teach where their visit ends", "use session"
            )
        if name != names[0]:
            raise ConfigError(
                f"{field}.flow.source", "user", f"{names[0]} takes in the same visits",
                "let one level learn from users, and others from that level",
            )  # fmt: skip


def _sources(field: str, name: str, level: LevelConfig, levels: dict[str, LevelConfig]) -> None:
    """Every name that a level reads from exists, and is not the level itself."""
    live = [] if level.copy_of is None else ["params"]
    known = [*live, *(other for other in levels if other != name)]
    wanted = [(f"relax.{i}.to", x.to, ["init", "zero"]) for i, x in enumerate(level.relax)]
    wanted += [(f"reset.{i}.to", x.to, ["init"]) for i, x in enumerate(level.reset)]
    if isinstance(level.flow, PullConfig):
        wanted.append(("flow.source", level.flow.source, ["user", "squares"]))
        if level.flow.outer is not None and level.flow.rate != 1:
            raise ConfigError(
                f"{field}.flow.rate", level.flow.rate, "has no effect beside flow.outer",
                f"leave it at 1 and set {field}.flow.outer.lr",
            )  # fmt: skip
    rates = [(f"relax.{i}.rate.by", x.rate) for i, x in enumerate(level.relax)]
    wanted += [(w, rate.by, []) for w, rate in rates if isinstance(rate, WeightedConfig)]
    for where, given, words in wanted:
        choices = [*known, *words]
        if given not in choices:
            near = nearest(given, choices)
            listed = f"one of {', '.join(choices)}" if choices else "add another level first"
            raise ConfigError(
                f"{field}.{where}", given, "no such level",
                f"did you mean {near}?" if near else listed,
            )  # fmt: skip
