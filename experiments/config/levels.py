"""Configuration of levels: rules, clocks, flows, and the kinds of `timescales:`.

Field names are those of the classes in `timescales/`. Every kind but `levels` is a short way to
write levels; `experiments.config.expand` turns it into them.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag

REST = "REST"  # as a `match`: every parameter that no other level claims


class Frozen(BaseModel):
    """Immutable, and strict about unknown fields."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", populate_by_name=True, allow_inf_nan=False
    )


def default_kind(kind: str) -> BeforeValidator:
    """A mapping without `kind:` is taken to be of this kind."""

    def fill(value: Any) -> Any:
        return {"kind": kind, **value} if isinstance(value, dict) and "kind" not in value else value

    return BeforeValidator(fill)


# ---- rules -------------------------------------------------------------------------------------
Rate = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]


class AdamW(Frozen):
    kind: Literal["adamw"] = "adamw"
    lr: float = Field(default=3e-4, gt=0, description="learning rate")
    betas: tuple[Decay, Decay] = Field(
        default=(0.9, 0.999), description="decays of the two moments"
    )
    eps: float = Field(default=1e-8, gt=0, description="added to the root of the second moment")
    weight_decay: float = Field(default=0.0, ge=0, description="decoupled decay, times lr")


class LaProp(Frozen):
    kind: Literal["laprop"] = "laprop"
    lr: float = Field(default=4e-5, gt=0, description="learning rate")
    betas: tuple[Decay, Decay] = Field(
        default=(0.9, 0.999), description="decays of the two moments"
    )
    eps: float = Field(default=1e-20, gt=0, description="added to the root of the second moment")
    agc: float = Field(default=0.3, ge=0, description="adaptive gradient clipping; 0 is off")
    pmin: float = Field(
        default=1e-3, gt=0, description="smallest parameter norm that clipping assumes"
    )
    warmup: int = Field(default=1000, ge=0, description="updates of linear learning-rate warm-up")
    weight_decay: float = Field(default=0.0, ge=0, description="decoupled decay, times lr")


class SGD(Frozen):
    kind: Literal["sgd"] = "sgd"
    lr: float = Field(default=1e-2, gt=0, description="learning rate")
    momentum: float = Field(default=0.0, ge=0, lt=1, description="decay of the momentum")
    nesterov: bool = Field(default=False, description="look-ahead momentum")
    weight_decay: float = Field(
        default=0.0, ge=0, description="added to the gradient, times the weight"
    )


class Muon(Frozen):
    kind: Literal["muon"] = "muon"
    lr: float = Field(default=1e-3, gt=0, description="learning rate")
    momentum: float = Field(default=0.95, ge=0, lt=1, description="decay of a matrix's momentum")
    betas: tuple[Decay, Decay] = Field(
        default=(0.9, 0.999), description="decays of the two moments of what is no matrix"
    )
    eps: float = Field(default=1e-8, gt=0, description="added to the root of the second moment")
    weight_decay: float = Field(default=0.0, ge=0, description="decoupled decay, times lr")


class M3(Frozen):
    kind: Literal["m3"] = "m3"
    lr: float = Field(default=1e-3, gt=0, description="learning rate")
    betas: tuple[Decay, Decay, Decay] = Field(
        default=(0.9, 0.999, 0.9), description="decays: fast moment, second moment, slow moment"
    )
    period: int = Field(default=8, ge=1, description="updates between two of the slow moment")
    mix: float = Field(default=0.5, ge=0, description="weight of the slow moment")
    eps: float = Field(default=1e-8, gt=0, description="added to the root of the second moment")
    weight_decay: float = Field(default=0.0, ge=0, description="decoupled decay, times lr")


Rule = Annotated[
    AdamW | LaProp | SGD | Muon | M3, Field(discriminator="kind"), default_kind("adamw")
]


# ---- a level -----------------------------------------------------------------------------------
class EveryConfig(Frozen):
    """When: every n ticks of a unit, with an offset; p < 1 draws instead of counting."""

    n: int = Field(default=1, ge=1, description="period: ticks of the unit between two updates")
    unit: str = Field(
        default="update",
        pattern=r"^[a-z][a-z0-9_]*$",
        description="update, frame, episode, session, task, or the name of an event",
    )
    phase: int = Field(default=0, ge=0, description="ticks by which the period is shifted")
    p: float = Field(default=1.0, gt=0, le=1, description="chance to move when due")


class DescendConfig(Frozen):
    kind: Literal["descend"] = "descend"
    rule: Rule | None = Field(default=None, description="optimizer; null takes timescales.rule")
    reduce: Literal["mean", "sum"] = Field(
        default="mean", description="how a window's gradients add up"
    )


class PullConfig(Frozen):
    kind: Literal["pull"] = "pull"
    source: str = Field(
        default="params",
        description="params (the live parameters), a level's name, user: what users learned, or "
        "squares: the mean square of the gradients since the level last moved, over its own mean",
    )
    rate: Rate = Field(default=1.0, description="share of the way toward the source")
    outer: Rule | None = Field(
        default=None, description="optimizer on `self - source` instead of a rate"
    )


Flow = Annotated[DescendConfig | PullConfig, Field(discriminator="kind"), default_kind("descend")]


class WeightedConfig(Frozen):
    """For each weight a rate of its own: z / (1 + z), z = times * what `by` holds for it."""

    by: str = Field(description="the level whose weights say how important each weight is")
    times: float = Field(ge=0, description="strength of the pull at an importance of 1")


def _rate_tag(value: Any) -> str:
    return "WeightedConfig" if isinstance(value, dict | WeightedConfig) else "float"


AnyRate = Annotated[
    Annotated[Rate, Tag("float")] | Annotated[WeightedConfig, Tag("WeightedConfig")],
    Discriminator(_rate_tag),
]


class RelaxConfig(Frozen):
    to: str = Field(default="init", description="a level's name, init or zero")
    rate: AnyRate = Field(
        description="share of the way, each time the level moves, or {by, times}: a rate for each "
        "weight, by importance"
    )
    noise: float = Field(default=0.0, ge=0, description="standard deviation of the noise added")


class ResetConfig(Frozen):
    to: str = Field(description="the level that is copied, init, or params")
    every: EveryConfig = Field(default=EveryConfig(), description="clock of the reset")
    clear_rule: bool = Field(default=False, description="forget the optimizer's moments too")


class Part(Frozen):
    """Part number `part` (from 0, fastest) of `of`, of the parameters in order."""

    by: Literal["depth", "block"]
    part: int = Field(ge=0)
    of: int = Field(ge=1)


def _match_tag(value: Any) -> str:
    return "Part" if isinstance(value, dict | Part) else "str"


Match = Annotated[
    Annotated[str, Tag("str")] | Annotated[Part, Tag("Part")], Discriminator(_match_tag)
]


class LevelConfig(Frozen):
    """One row: which parameters, on which clock, by which flow."""

    match: Match | None = Field(
        default=None, description="regular expression on parameter names, REST, or {by, part, of}"
    )
    copy_of: str | None = Field(
        default=None, alias="copy", description="regular expression: shadow these parameters"
    )
    every: EveryConfig = Field(default=EveryConfig(), description="clock of the level")
    flow: Flow | None = Field(
        default=DescendConfig(),
        description="descend (optimizer), pull (from a source), or null to relax and reset only",
    )
    relax: tuple[RelaxConfig, ...] = Field(default=(), description="pulls toward slower values")
    reset: tuple[ResetConfig, ...] = Field(default=(), description="copies from another level")
    start: Literal["params", "zero"] = Field(
        default="params", description="what a copy begins as: the parameters, or zero"
    )


# ---- kinds of `timescales:` --------------------------------------------------------------------
By = Annotated[
    Literal["module", "depth", "block"],
    Field(description="split by part of the agent, by depth of the networks, or by block"),
]


class Kind(Frozen):
    rule: Rule = Field(default=AdamW(), description="optimizer of every level that descends")
    levels: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="changes to the levels that this kind expands to"
    )


class Plain(Kind):
    """One level: every parameter, every update. Dreamer as published."""

    kind: Literal["plain"] = "plain"


class Geometric(Kind):
    """k levels with periods base**0 ... base**(k-1)."""

    kind: Literal["geometric"] = "geometric"
    k: int = Field(default=3, ge=1, le=16, description="number of levels")
    base: int = Field(default=4, ge=2, description="ratio of neighbouring periods")
    by: By = "module"
    lr_power: float = Field(
        default=0.5, ge=0, le=2, description="a level of period n learns with lr * n**lr_power"
    )


class Cms(Kind):
    """Continuum memory system: given periods, gradients summed over each window."""

    kind: Literal["cms"] = "cms"
    periods: tuple[Annotated[int, Field(ge=1)], ...] = Field(default=(1, 4, 16), min_length=1)
    by: By = "module"
    reduce: Literal["mean", "sum"] = Field(
        default="sum", description="how a window's gradients add up"
    )


class Lookahead(Kind):
    """Slow copy that takes a step toward the fast weights every n updates (1907.08610)."""

    kind: Literal["lookahead"] = "lookahead"
    n: int = Field(default=5, ge=1, description="fast updates between slow steps")
    rate: Rate = Field(default=0.5, description="share of the way of a slow step")


class DiLoCo(Kind):
    """Outer Nesterov step on the pseudo-gradient every n updates (2311.08105)."""

    kind: Literal["diloco"] = "diloco"
    n: int = Field(default=50, ge=1, description="inner updates between outer steps")
    outer: Rule = Field(
        default=SGD(lr=0.7, momentum=0.9, nesterov=True), description="outer optimizer"
    )


class ClsEr(Kind):
    """Two weight averages on Bernoulli clocks (CLS-ER, 2201.12604)."""

    kind: Literal["cls_er"] = "cls_er"
    plastic_p: float = Field(default=0.9, gt=0, le=1, description="chance of a plastic update")
    stable_p: float = Field(default=0.7, gt=0, le=1, description="chance of a stable update")
    rate: Rate = Field(default=1e-3, description="share of the way of an update: 1 - decay")


class HareTortoise(Kind):
    """Slow average; the fast weights return to it every n updates (2406.02596)."""

    kind: Literal["hare_tortoise"] = "hare_tortoise"
    n: int = Field(default=1000, ge=1, description="updates between two returns of the hare")
    rate: Rate = Field(default=1e-3, description="share of the way of the tortoise at each update")


class BennaFusi(Kind):
    """A chain of ever slower copies that leak into each other (Benna & Fusi 2016)."""

    kind: Literal["benna_fusi"] = "benna_fusi"
    depth: int = Field(
        default=3, ge=2, le=16, description="beakers in the chain, the weights included"
    )
    rate: Rate = Field(default=0.1, description="rate between the first two beakers")


class L2Init(Kind):
    """Decoupled decay toward the initial weights (2308.11958)."""

    kind: Literal["l2_init"] = "l2_init"
    rate: Rate = Field(default=1e-4, description="share of the way toward the initial weights")


class Ewc(Kind):
    """Online EWC: world model and actor stay near where they were, by importance (1805.06370).

    Nobody tells where a task ends, so every n updates count as one. Importance is what squared
    gradients of whole batches along these say, not of single examples at their end; the critic is
    free.
    """

    kind: Literal["ewc"] = "ewc"
    weight: float = Field(
        default=1.0,
        ge=0,
        description="strength of the pull of a weight of mean importance, in units of rule.lr, "
        "after one window; grows to 1/(1 - decay) of it",
    )
    decay: Decay = Field(
        default=0.95, description="share of the Fisher information that is left a window later"
    )
    n: int = Field(default=500, ge=1, description="updates between anchors")


class Levels(Frozen):
    """The levels themselves, by name, from fastest to slowest."""

    kind: Literal["levels"] = "levels"
    rule: Rule | None = Field(default=None, description="optimizer of levels that name none")
    levels: dict[str, LevelConfig] = Field(min_length=1, description="one level at least, by name")


TimescalesConfig = Annotated[
    Plain
    | Geometric
    | Levels
    | Cms
    | Lookahead
    | DiLoCo
    | ClsEr
    | HareTortoise
    | BennaFusi
    | L2Init
    | Ewc,
    Field(discriminator="kind"),
]
