"""The configuration tree. Every field has a default and a description; both reach the JSON schema
and the error messages.

Only shapes and ranges of single fields live here; what ties fields together is in `check.py`.
Importing this costs pydantic and nothing else: no torch, no gymnasium.
"""

from bisect import bisect_right
from itertools import accumulate
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from .levels import Frozen, LevelConfig, Levels, Plain, Rate, TimescalesConfig, default_kind

# DreamerV3's table of sizes; `tiny` is ours, for two CPU cores. Each gives defaults of ModelConfig.
_WIDE = {"stoch": 32, "blocks": 8, "layers": 3}
SIZES: dict[str, dict[str, int]] = {
    "tiny": dict(
        deter=128, hidden=64, classes=8, stoch=8, depth=4, units=64, blocks=4, layers=1
    ),
    "1m": dict(deter=512, hidden=64, classes=4, depth=4, units=64, **_WIDE),
    "12m": dict(deter=2048, hidden=256, classes=16, depth=16, units=256, **_WIDE),
    "25m": dict(deter=3072, hidden=384, classes=24, depth=24, units=384, **_WIDE),
    "50m": dict(deter=4096, hidden=512, classes=32, depth=32, units=512, **_WIDE),
    "100m": dict(deter=6144, hidden=768, classes=48, depth=48, units=768, **_WIDE),
    "200m": dict(deter=8192, hidden=1024, classes=64, depth=64, units=1024, **_WIDE),
    "400m": dict(deter=12288, hidden=1536, classes=96, depth=96, units=1536, **_WIDE),
}  # fmt: skip
SIZED = frozenset(SIZES["tiny"])

# Weight of each loss; an observation's key takes `reconstruction` unless it is named here itself.
SCALES = {
    "reconstruction": 1.0, "reward": 1.0, "continue": 1.0, "dyn": 1.0, "rep": 0.1,
    "policy": 1.0, "value": 1.0, "repvalue": 0.3,
}  # fmt: skip

WITH_USERS = frozenset({"UserPop-v0"})  # environments whose slots change hands

Count = Annotated[int, Field(ge=1)]
Scale = Annotated[float, Field(ge=0)]


class EnvConfig(Frozen):
    id: str = Field(default="CartPoleShift-v0", description="a gymnasium id, or crafter")
    num: Count = Field(default=8, description="parallel environment slots")
    workers: Literal["auto", "inprocess", "process"] = Field(
        default="auto", description="step in this process, or in one process for each slot"
    )
    image_size: int = Field(
        default=64, ge=16, multiple_of=16, description="side of images in pixels"
    )
    pixels: bool = Field(
        default=False, description="observe rendered images instead of the native ones"
    )
    kwargs: dict[str, Any] = Field(default_factory=dict, description="given to gymnasium.make")
    contexts: tuple[str, ...] = Field(
        default=(),
        description="hidden contexts in order, a phase each; [] is stationary",
    )
    lengths: tuple[Count, ...] = Field(
        default=(), description="frames of each phase; [] is phases of equal length"
    )
    action_repeat: Count = Field(default=1, description="steps for which each action is repeated")
    time_limit: int = Field(
        default=0, ge=0, description="steps of an episode; 0 is the environment's own"
    )
    units: dict[str, tuple[Annotated[float, Field(gt=0)], ...]] = Field(
        default_factory=dict,
        description="vector observation -> what each of its dimensions is divided by",
    )

    @property
    def has_users(self) -> bool:
        """Whether rows tell who sits in a slot; elsewhere each slot is one user."""
        return self.id in WITH_USERS


class NoMemory(Frozen):
    kind: Literal["none"] = "none"


class _Memory(Frozen):
    dim: Count = Field(default=64, description="width of keys and values")
    heads: Count = Field(default=1, description="independent memories that share the width")
    forget: Literal["episode", "session", "never"] = Field(
        default="session",
        description="when a memory returns to its initial state; a session is a user's visit, or "
        "an episode where every slot is one user",
    )
    imagine: Literal["write", "read", "off"] = Field(
        default="read", description="what imagination does with the memory"
    )


class HebbMemory(_Memory):
    """Hebb's rule: pairs add up and fade."""

    kind: Literal["hebb"] = "hebb"


class DeltaMemory(_Memory):
    """Delta rule: overwrite what a key recalls (DeltaNet)."""

    kind: Literal["delta"] = "delta"


class GatedDeltaMemory(_Memory):
    """Delta rule with a learned forgetting gate (Gated DeltaNet)."""

    kind: Literal["gated_delta"] = "gated_delta"


class NeuralMemory(_Memory):
    """A two-layer network that learns by momentum and forgets (Titans)."""

    kind: Literal["neural"] = "neural"
    hidden: Count = Field(default=64, description="width of the network's inner layer")
    momentum: Rate | None = Field(default=None, description="share of past surprise; null: none")
    forget_rate: Rate | None = Field(default=0.02, description="share forgotten a step at first")
    chunk: Count = Field(default=1, description="steps that share the weights of their gradients")
    residual: bool = Field(default=False, description="the network adds to its input")


class TTTLinearMemory(_Memory):
    """A linear model trained at test time (TTT-Linear)."""

    kind: Literal["ttt_linear"] = "ttt_linear"
    chunk: Count = Field(default=16, description="steps that share the weights of their gradients")
    rate: float = Field(default=1.0, gt=0, description="inner learning rate")


class TTTMLPMemory(_Memory):
    """A two-layer network trained at test time (TTT-MLP)."""

    kind: Literal["ttt_mlp"] = "ttt_mlp"
    hidden: Count = Field(default=128, description="width of the network's inner layer")
    chunk: Count = Field(default=16, description="steps that share the weights of their gradients")
    rate: float = Field(default=0.1, gt=0, description="inner learning rate")


class ContinuumMemory(_Memory):
    """A chain of networks, each slower than the last (CMS)."""

    kind: Literal["continuum"] = "continuum"
    hidden: Count = Field(default=64, description="width of each network's inner layer")
    chunks: tuple[Count, ...] = Field(default=(1, 4, 16), description="steps between updates")


class HopeMemory(_Memory):
    """A memory that makes its own keys, values and rates, then a chain of slower ones (Hope)."""

    kind: Literal["hope"] = "hope"
    hidden: Count = Field(default=64, description="width of each network's inner layer")
    chunk: Count = Field(default=1, description="steps that share the weights of their gradients")
    chunks: tuple[Count, ...] = Field(default=(1, 4, 16), description="steps between updates")
    forget_rate: Rate = Field(default=0.02, description="share forgotten a step at first")


class RLSMemory(_Memory):
    """Recursive least squares: the exact learner of a linear answer."""

    kind: Literal["rls"] = "rls"


MemoryConfig = Annotated[
    NoMemory
    | HebbMemory
    | DeltaMemory
    | GatedDeltaMemory
    | NeuralMemory
    | TTTLinearMemory
    | TTTMLPMemory
    | ContinuumMemory
    | HopeMemory
    | RLSMemory,
    Field(discriminator="kind"),
]


class ModelConfig(Frozen):
    """World model; `size` gives the defaults of the eight widths below it."""

    size: Literal["tiny", "1m", "12m", "25m", "50m", "100m", "200m", "400m"] = Field(
        default="tiny", description="row of the table of sizes"
    )
    deter: Count = Field(default=128, description="width of the deterministic state")
    hidden: Count = Field(default=64, description="width of the dynamics' layers")
    classes: int = Field(default=8, ge=2, description="classes of each latent variable")
    stoch: Count = Field(default=8, description="number of latent variables")
    depth: Count = Field(default=4, description="channels of the first convolution")
    units: Count = Field(default=64, description="width of the multilayer perceptrons")
    blocks: Count = Field(default=4, description="blocks of the block-diagonal GRU")
    layers: Count = Field(default=1, description="layers of the vector encoder, decoder and heads")
    encoder: Literal["faithful", "strided"] = Field(
        default="faithful", description="5x5 convolutions with pooling, or faster strided 4x4 ones"
    )
    memory: MemoryConfig = Field(default=NoMemory(), description="fast weights in the dynamics")

    @model_validator(mode="before")
    @classmethod
    def _sized(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        size = data.get("size", "tiny")
        return {**SIZES.get(size, {}), **data} if isinstance(size, str) else data


def _scales(value: Any) -> Any:
    return {**SCALES, **value} if isinstance(value, dict) else value


class AgentConfig(Frozen):
    horizon: Count = Field(default=15, description="imagined steps")
    starts: int = Field(
        default=0,
        ge=0,
        description="last rows of each sequence that imagination starts from; 0 is all",
    )
    discount: float = Field(default=333, gt=1, description="horizon h of the discount 1 - 1/h")
    lam: Rate = Field(default=0.95, description="lambda of the returns")
    entropy: float = Field(default=3e-4, ge=0, description="weight of the policy's entropy")
    unimix: Rate = Field(default=0.01, description="uniform share of categorical distributions")
    free_nats: float = Field(default=1.0, ge=0, description="information that costs nothing")
    standardize: bool = Field(
        default=False, description="advantages of mean 0 and deviation 1 in each batch"
    )
    slow_rate: Rate = Field(default=0.02, description="rate of the slow critic's pull")
    slow_regularizer: float = Field(
        default=1.0, ge=0, description="weight of staying near the slow critic"
    )
    layers: Count = Field(default=3, description="layers of actor and critic")
    bins: int = Field(default=255, ge=3, description="bins of the two-hot reward and value")
    scales: Annotated[dict[str, Scale], BeforeValidator(_scales)] = Field(
        default=SCALES, description="weight of each loss"
    )


class _Replay(Frozen):
    capacity: Count = Field(default=100_000, description="frames kept")
    batch: Count = Field(default=16, description="sequences in a batch")
    length: int = Field(default=64, ge=2, description="frames in a sequence")


class Fifo(_Replay):
    """The newest frames."""

    kind: Literal["fifo"] = "fifo"


class Reservoir(_Replay):
    """A uniform sample of everything seen."""

    kind: Literal["reservoir"] = "reservoir"


class Mixed(_Replay):
    """Half the newest frames, half a uniform sample of everything seen; so is every batch.

    The two buffers of WMAR (2401.16650), but kept sequence by sequence, and a batch has both.
    """

    kind: Literal["mixed"] = "mixed"


class Matching(_Replay):
    """WMAR's and ARROW's two buffers: the newest, and all alike (2401.16650, 2603.11395).

    Rollouts spliced across episodes are kept or dropped whole; a batch is of one buffer.
    """

    kind: Literal["matching"] = "matching"
    rollout: Count = Field(
        default=512, description="frames that are kept or dropped together, multiples of length"
    )


ReplayConfig = Annotated[
    Fifo | Reservoir | Mixed | Matching, Field(discriminator="kind"), default_kind("fifo")
]


class TrainConfig(Frozen):
    ratio: float = Field(default=32, gt=0, description="replayed frames for each environment frame")
    prefill: int = Field(default=1000, ge=0, description="frames of random actions before learning")


class EvaluateConfig(Frozen):
    every: int = Field(
        default=1000, ge=0, description="frames between evaluations; 0 is only at the end"
    )
    episodes: Count = Field(default=32, description="episodes of an evaluation, in each context")
    contexts: tuple[str, ...] = Field(
        default=(), description="hidden contexts to evaluate in; [] is those of env.contexts"
    )
    off: bool = Field(
        default=False, description="evaluate without the fast memory too, as CONTEXT_off"
    )
    plasticity: bool = Field(
        default=False,
        description="report dormant units, effective rank and weight norm on a replayed batch",
    )


class UsersConfig(Frozen):
    """Whose fast weights are kept between visits, where the environment has users."""

    slots: Count = Field(
        default=4096, description="users in memory; the least recently seen goes first"
    )
    store: Literal["disk"] | None = Field(
        default=None,
        description="where users go who leave memory: disk is the run's folder, null nowhere",
    )
    keep: bool = Field(
        default=True,
        description="a user who comes back finds what they learned; false: every visit starts anew",
    )


class LogConfig(Frozen):
    every: Count = Field(default=250, description="frames between lines of metrics")


class CheckpointConfig(Frozen):
    every: int = Field(
        default=5000, ge=0, description="frames between checkpoints; 0 is only at the end"
    )
    keep: Count = Field(default=2, description="checkpoints kept")


class TrackingConfig(Frozen):
    mlflow: bool = Field(default=True, description="send metrics to MLflow")
    uri: str = Field(default="sqlite:///mlflow.db", description="MLflow's tracking store")
    experiment: str | None = Field(default=None, description="MLflow experiment; null is `name`")
    root: str = Field(default="runs", description="folder of the runs' folders")
    pictures: bool = Field(default=True, description="draw the report and a prediction at the end")


class Whole(Frozen):
    """A whole configuration, as others read it."""

    def tree(self) -> dict[str, Any]:
        """Nested dictionaries of plain values, under the names used in YAML."""
        return self.model_dump(mode="json", by_alias=True)

    def dump(self) -> str:
        """YAML text that loads to this very configuration."""
        from .text import to_yaml

        return to_yaml(self.tree())

    def flatten(self) -> dict[str, str | int | float | bool | None]:
        """Dotted path -> scalar; a list becomes its YAML text in one line."""
        from .text import flat

        return flat(self.tree())


class Config(Whole):
    """Everything that a run depends on."""

    name: str = Field(
        default="run",
        pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$",
        description="start of the run's id and MLflow experiment: a-z, 0-9, - and _",
    )
    seed: int = Field(default=0, ge=0, lt=2**32, description="seed of every random generator")
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="where to compute")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto",
        description="auto: bfloat16 on CUDA, and for images on a CPU with instructions for it",
    )
    threads: int = Field(default=0, ge=0, description="torch threads; 0 chooses")
    frames: Count = Field(default=24_000, description="environment steps of the whole run")
    env: EnvConfig = EnvConfig()
    model: ModelConfig = ModelConfig()
    agent: AgentConfig = AgentConfig()
    replay: ReplayConfig = Fifo()
    train: TrainConfig = TrainConfig()
    timescales: TimescalesConfig = Plain()
    users: UsersConfig | None = Field(
        default=None, description="the pool of users' fast weights; null: every visit starts anew"
    )
    evaluate: EvaluateConfig = EvaluateConfig()
    log: LogConfig = LogConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()

    def phase_at(self, frame: int) -> int:
        """The phase that a frame lies in, from 0."""
        if self.env.lengths:
            return bisect_right(list(accumulate(self.env.lengths)), frame)
        return frame * len(self.env.contexts) // self.frames


__all__ = ["SCALES", "SIZED", "SIZES", "Config", "LevelConfig", "Levels"]
