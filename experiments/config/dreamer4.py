"""The configuration of an offline run: Dreamer 4's phases on recorded episodes.

Told from an online one by `method: dreamer4`. What the paper (arXiv 2509.24527) leaves open is a
field here. `load_dreamer4` reads a file, a run's folder or a preset, with `a.b.c=v` on top.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field, ValidationError

from .errors import ConfigError
from .expand import expand
from .explain import explain
from .levels import Frozen, LaProp, LevelConfig, Levels, Plain, Rate, TimescalesConfig
from .load import read_tree
from .models import (
    CheckpointConfig,
    Count,
    EnvConfig,
    MemoryConfig,
    NoMemory,
    Scale,
    TrackingConfig,
    Whole,
)
from .text import parse_override
from .tree import put

METHOD = "dreamer4"
PHASES = ("tokenizer", "dynamics", "finetune", "imagine")
ROUND = ("act", "finetune", "imagine")  # what each round online goes through again
BETWEEN = "updates between evaluations in the environment within the phase; 0 only at its end"


class TrunkConfig(Frozen):
    width: Count = Field(default=64, description="width of the transformer")
    layers: Count = Field(default=4, description="layers, over space or over time")
    heads: Count = Field(default=4, description="query heads")
    groups: Count = Field(default=2, description="key and value heads")
    every: Count = Field(default=2, description="each so-many-th layer is over time")
    context: Count = Field(default=16, description="frames that a frame sees, itself included")
    cap: float = Field(default=50.0, ge=0, description="bound of attention logits; 0 is none")
    memory: MemoryConfig = Field(
        default=NoMemory(),
        description="fast weights of each token position in layers over time, written by every "
        "frame and forgotten where an episode starts, whatever its `forget` and `imagine`",
    )
    place: Literal["beside", "instead"] = Field(
        default="beside", description="where the memory stands: beside attention or instead of it"
    )
    chain: int = Field(
        default=0, ge=0, description="further feed-forward networks of each layer, silent at first"
    )
    feed: MemoryConfig = Field(
        default=NoMemory(),
        description="a memory in place of every feed-forward network, such as continuum",
    )


class DataConfig(Frozen):
    path: str = Field(default="data/minigrid-empty", description="folder of recorded episodes")
    image: str = Field(default="image", description="the observation that is seen")
    held: int = Field(default=10, ge=2, description="each so-many-th episode is for gates only")
    best: float = Field(default=1.0, gt=0, le=1, description="share of episodes to imitate")
    labelled: Rate = Field(
        default=1.0,
        description="share of episodes whose actions are known; the others are seen as video, "
        "without their rewards and terminals too; those held out stay as they are",
    )
    favour: Rate = Field(
        default=0.0,
        description="share of the rows of a batch that come from episodes with actions alone",
    )


class TokenizerConfig(Frozen):
    trunk: TrunkConfig = TrunkConfig()
    patch: Count = Field(default=8, description="side of a patch in pixels")
    latents: Count = Field(default=16, description="latent tokens of a frame")
    channels: Count = Field(default=8, description="entries of each")
    hide: float = Field(default=0.9, ge=0, lt=1, description="greatest share of hidden patches")


class DynamicsConfig(Frozen):
    trunk: TrunkConfig = TrunkConfig()
    spatial: Count = Field(default=8, description="tokens that a frame's latents become")
    registers: Count = Field(default=4, description="register tokens")
    agents: Count = Field(default=1, description="agent tokens")
    k_max: int = Field(default=8, ge=2, description="finest sampling steps, a power of two")
    bootstrap: Rate = Field(default=0.25, description="share of rows that draw a step size")
    apart: Rate = Field(default=0.3, description="share of rows seen as separate images")
    settled: Rate = Field(
        default=0.0,
        description="share of frames that training shows as clear as a context, so that what "
        "follows them can be told; 0 noises each frame to a level of its own, as the paper does",
    )
    context_noise: Rate = Field(default=0.1, description="noise of frames in a context")


class AgentConfig(Frozen):
    units: Count = Field(default=128, description="width of the heads")
    layers: Count = Field(default=1, description="layers of the heads")
    ahead: Count = Field(default=8, description="steps predicted ahead")
    bins: int = Field(default=41, ge=2, description="bins of each continuous action")
    horizon: Count = Field(default=15, description="imagined frames")
    steps: Count = Field(default=4, description="sampling steps of a frame, a power of two")
    discount: float = Field(default=0.997, gt=0, lt=1, description="of rewards to come")
    lam: Rate = Field(default=0.95, description="lambda of the returns")
    alpha: Rate = Field(default=0.5, description="share of good actions in PMPO")
    beta: float = Field(default=0.3, ge=0, description="weight of staying near the prior")
    members: int = Field(default=0, ge=0, description="networks that may disagree; 0 is none")
    doubt: float = Field(
        default=0.0,
        description="what unusual disagreement costs in imagination; below zero it is a reward",
    )


class PhaseConfig(Frozen):
    updates: int = Field(default=2000, ge=0, description="updates of the phase")
    batch: Count = Field(default=16, description="rows of a batch")
    length: Count = Field(default=16, description="frames of a row")
    gate: float | None = Field(default=None, description="what the phase must reach; null: nothing")
    timescales: TimescalesConfig = Plain(rule=LaProp(lr=3e-4, warmup=200))


class TokenizerPhase(PhaseConfig):
    """Gate: PSNR of frames held out, in dB, at least."""


class DynamicsPhase(PhaseConfig):
    """Gate: error of the next frame over that of repeating the last one, at most."""

    long: Count = Field(default=32, description="frames of a long row")
    every: Count = Field(default=4, description="each so-many-th batch has long rows")


class ScalesConfig(Frozen):
    """Weights of losses that are each normalised by their running RMS; 0 switches one off."""

    dynamics: Scale = Field(default=1.0, description="weight of the next latents")
    policy: Scale = Field(default=1.0, description="weight of imitation")
    reward: Scale = Field(default=1.0, description="weight of rewards")
    terminal: Scale = Field(default=1.0, description="weight of ends")
    ensemble: Scale = Field(default=1.0, description="weight of the ensemble, if there is one")


class FinetunePhase(PhaseConfig):
    """Gate: surprise about actions held out over that of uniform ones, at most."""

    imitate: float = Field(
        default=0.5, gt=0, lt=1, description="share of rows for imitation; others teach dynamics"
    )
    noise: Literal["acting", "drawn"] = Field(
        default="acting",
        description="of the frames that imitation reads: as in acting, or drawn anew for each "
        "frame as the dynamics learn them (the paper)",
    )
    evaluate: int = Field(default=0, ge=0, description=BETWEEN)
    scales: ScalesConfig = ScalesConfig()


class ImaginePhase(PhaseConfig):
    """Gate: mean return of the policy in the environment, at least."""

    critic: int = Field(
        default=0, ge=0, description="first updates, in which only the value learns"
    )
    evaluate: int = Field(default=0, ge=0, description=BETWEEN)


class PhasesConfig(Frozen):
    tokenizer: TokenizerPhase = TokenizerPhase()
    dynamics: DynamicsPhase = DynamicsPhase()
    finetune: FinetunePhase = FinetunePhase()
    imagine: ImaginePhase = ImaginePhase()


class OnlineConfig(Frozen):
    """Offline, then online: what each round adds. A round without episodes only learns on."""

    rounds: int = Field(default=0, ge=0, description="rounds after the phases; 0 stays offline")
    episodes: int = Field(default=32, ge=0, description="real episodes that a round adds")
    noise: Rate = Field(default=0.0, description="share of random actions in them; 1 is random")
    share: float = Field(
        default=0.5,
        gt=0,
        lt=1,
        description="share of rows drawn from real episodes, recordings aside",
    )
    finetune: int = Field(default=500, ge=0, description="updates of finetuning in a round")
    imagine: int = Field(default=300, ge=0, description="updates in imagination in a round")


class CounterfactualConfig(Frozen):
    """How imagination is held against reality at the end of each round."""

    contexts: Count = Field(default=32, description="real moments of each kind to decide in")
    episodes: Count = Field(default=32, description="episodes, really played and imagined")
    frames: Count = Field(default=40, description="longest imagined episode")


class Stage(NamedTuple):
    """A phase of a round; round 0 is offline."""

    round: int
    name: str


class Dreamer4Config(Whole):
    """Everything that an offline run depends on, its data aside."""

    method: Literal["dreamer4"] = METHOD
    name: str = Field(
        default="dreamer4",
        pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$",
        description="start of the run's id and MLflow experiment: a-z, 0-9, - and _",
    )
    seed: int = Field(default=0, ge=0, lt=2**32, description="seed of every random generator")
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="where to compute")
    threads: int = Field(default=0, ge=0, description="torch threads; 0 is all cores")
    start: str | None = Field(
        default=None,
        description="folder of a run whose tokenizer and dynamics this one begins with; the "
        "phases that taught them are passed over",
    )
    data: DataConfig = DataConfig()
    env: EnvConfig = EnvConfig(id="MiniGrid-Empty-5x5-v0", pixels=True)
    tokenizer: TokenizerConfig = TokenizerConfig()
    dynamics: DynamicsConfig = DynamicsConfig()
    agent: AgentConfig = AgentConfig()
    phases: PhasesConfig = PhasesConfig()
    online: OnlineConfig = OnlineConfig()
    counterfactual: CounterfactualConfig = CounterfactualConfig()
    episodes: Count = Field(default=32, description="episodes of an evaluation")
    log_every: Count = Field(default=100, description="updates between lines of metrics")
    checkpoint: CheckpointConfig = CheckpointConfig(every=500)
    tracking: TrackingConfig = TrackingConfig()

    @property
    def frames(self) -> int:
        """Updates of all stages: the length of the run."""
        owed = self.stages[self.passed :]
        return sum(self.settings(stage).updates for stage in owed if stage.name in PHASES)

    @property
    def passed(self) -> int:
        """Stages that are passed over: those of the world model that the run begins with."""
        return PHASES.index("finetune") if self.start else 0

    @property
    def imitates(self) -> bool:
        """Whether any stage learns from what was done in the recordings."""
        stages = [stage for stage in self.stages if stage.name == "finetune"]
        return any(self.settings(stage).updates for stage in stages)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The four phases, then those of each round online."""
        rounds = range(1, self.online.rounds + 1)
        offline = [Stage(0, name) for name in PHASES]
        return (*offline, *(Stage(i, name) for i in rounds for name in ROUND))

    @property
    def scales(self) -> dict[str, float]:
        """The weight of each loss of finetuning: of the ensemble's only where there is one."""
        found = self.phases.finetune.scales.model_dump()
        return found if self.agent.members else {k: found[k] for k in found if k != "ensemble"}

    def settings(self, stage: Stage) -> PhaseConfig:
        """The phase as this stage runs it: in rounds with their updates, and without a gate."""
        phase: PhaseConfig = getattr(self.phases, stage.name)
        if not stage.round:
            return phase
        return phase.model_copy(update={"updates": vars(self.online)[stage.name], "gate": None})


def is_dreamer4(source: str | Path | None) -> bool:
    """Whether a file, a run's folder or a preset configures an offline run."""
    try:
        return source is not None and read_tree(str(source)).get("method") == METHOD
    except ConfigError:
        return False  # whoever loads it says what is wrong


def load_dreamer4(
    source: str | Path | None = None, overrides: Sequence[str] = ()
) -> Dreamer4Config:
    """The configuration of a file, a run's folder or a preset. Raises ConfigError."""
    config = _validated(read_tree(str(source or METHOD)), [])
    changes = sorted((parse_override(text) for text in overrides), key=lambda c: len(c[0]))
    tree = config.tree()
    for path, value in changes:
        put(tree, path, value)
    config = _validated(tree, changes)
    _check(config)
    return config


def levels_of_phase(timescales: TimescalesConfig) -> dict[str, LevelConfig]:
    """The levels of a phase by name, from fastest to slowest."""
    return Levels.model_validate(expand(timescales)).levels


def _validated(tree: dict[str, Any], changes: list) -> Dreamer4Config:
    try:
        return Dreamer4Config.model_validate(tree)
    except ValidationError as error:
        raise explain(error, changes, Dreamer4Config) from None


def _check(config: Dreamer4Config) -> None:
    """What ties fields together."""
    for name in ("tokenizer", "dynamics"):
        trunk: TrunkConfig = getattr(config, name).trunk
        if trunk.width % (2 * trunk.heads) or trunk.heads % trunk.groups:
            raise ConfigError(
                f"{name}.trunk.heads", trunk.heads,
                f"width={trunk.width} / heads must be even, heads / groups={trunk.groups} whole",
                "use powers of two",
            )  # fmt: skip
    if config.imitates and not config.data.labelled:
        way_out = "use more than 0, or phases.finetune.updates=0 and no rounds that finetune"
        raise ConfigError("data.labelled", 0.0, "leaves no action to imitate", way_out)
    members, doubt = config.agent.members, config.agent.doubt
    if members == 1 or (doubt and not members):
        problem = f"cannot disagree, with doubt={doubt:g}"
        raise ConfigError("agent.members", members, problem, "use 0 and no doubt, or 2 and more")
    entries = config.tokenizer.latents * config.tokenizer.channels
    if entries % config.dynamics.spatial:
        raise ConfigError(
            "dynamics.spatial", config.dynamics.spatial,
            f"does not divide tokenizer.latents * tokenizer.channels = {entries}", "use a divisor",
        )  # fmt: skip
    for field, value in (
        ("dynamics.k_max", config.dynamics.k_max),
        ("agent.steps", config.agent.steps),
    ):
        if value & (value - 1) or value > config.dynamics.k_max:
            way_out = f"use a power of two up to {config.dynamics.k_max}"
            raise ConfigError(field, value, "cannot be halved down to one", way_out)
