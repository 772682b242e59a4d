"""Streams of hidden contexts that an agent acts in, as data: what is played, and the protocol.

An agent is never told its context. A stream of tasks goes through phases in published order, and
is evaluated in every context; a task-free one changes when nobody expects it, and only what was
lived counts. Protocols are those of their papers where known (arXiv numbers in the lines); agents
are DreamerV3 of a size that may be changed, not those of the papers.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from experiments.benchmarks.tasks.agent_methods import FIELDS, AgentMethod, Options
from experiments.config import Config, load_config
from experiments.envs.known import OWN

# Options of a cell that are fields of a run under another name, where a stream has them.
KNOBS = {
    "slots": "env.num", "size": "model.size", "batch": "replay.batch", "length": "replay.length",
}  # fmt: skip


class AgentStream(NamedTuple):
    """One stream: an environment, how it is seen, and how a return becomes a score."""

    id: str
    line: str
    env: str  # whose hidden contexts come in the order of known.OWN
    fields: Mapping[str, Any]  # the options of a cell, with the protocol's numbers
    words: tuple[str, ...]  # fields of a run: what is observed, model, agent
    cap: float | None  # the return of a score of 1; None: scores lie between random and fresh
    preset: str = "plain"  # that `words` change
    paid: bool = False  # every step earns one, so that a mean reward says nothing
    change: Literal["tasks", "drawn", "own"] = "tasks"  # own: the environment's, at no known time

    @property
    def contexts(self) -> tuple[str, ...]:
        """All hidden contexts, in order; none where the environment changes by itself."""
        return () if self.change == "own" else OWN[self.env]

    @property
    def unit(self) -> float:
        """What returns are divided by."""
        return self.cap or 1.0


def configured(
    stream: AgentStream,
    method: AgentMethod,
    options: Options,
    seed: int,
    root: str,
    words: Sequence[str],
) -> Config:
    """A run of this method on this stream; `words` are its phases and evaluations.

    Raises ConfigError for options that cannot run.
    """
    shared = [
        f"seed={seed}", f"env.id={stream.env}", "checkpoint.every=0",
        "evaluate.plasticity=true",
        f"replay.kind={options['replay']}", f"replay.capacity={options['capacity']}",
        f"train.ratio={options['ratio']}", f"train.prefill={options['prefill']}",
        "timescales.rule.kind=laprop", f"timescales.rule.lr={options['lr']}",
        f"tracking.root={root}", "tracking.mlflow=false", "tracking.pictures=false",
    ]  # fmt: skip
    knobs = [f"{path}={options[name]}" for name, path in KNOBS.items() if name in options]
    changes = [*stream.words, *knobs, *words, *method.changes(options)]
    return load_config(stream.preset, [*shared, *changes])


# ---- protocols ---------------------------------------------------------------------------------
SMALL = ("replay.batch=16", "replay.length=16")  # a vector of four numbers, two cores
DREAMER = (  # DreamerV3's own numbers in place of those that suit CartPole
    "agent.horizon=15", "agent.starts=0", "agent.free_nats=1", "agent.standardize=false",
    "agent.entropy=3e-4", "model.encoder=strided",
)  # fmt: skip
PUBLISHED = {
    **FIELDS, "replay": "reservoir", "lr": 1e-4, "ratio": 80.0, "prefill": 10_000,
    "slots": 8, "size": "12m", "batch": 16, "length": 50,
}  # fmt: skip


def protocol(tasks: int, frames: int, every: int, capacity: int, **more: Any) -> dict[str, Any]:
    """The options of a cell of published size."""
    own = {"tasks": tasks, "frames": frames, "every": every, "capacity": capacity}
    return {**PUBLISHED, **own, **more}


def free(frames: int, every: int, fields: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """The options of a cell without tasks: frames of the whole stream, of a line of metrics."""
    kept = {k: v for k, v in fields.items() if k not in ("again", "episodes", "cycles")}
    return {**kept, "frames": frames, "every": every, **more}


def alone(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Those of an environment that changes by itself: nobody counts its contexts."""
    return {name: value for name, value in fields.items() if name != "tasks"}


ALL = (
    AgentStream(
        "cl/CartPoleShift-v0", "CartPole: normal, flipped, long, heavy; fits two cores",
        "CartPoleShift-v0", FIELDS, SMALL, cap=200.0, paid=True,
    ),
    AgentStream(
        "cl/MiniGrid3-v0", "Continual-Dreamer (2211.15944): 0.75 M frames a task",
        "MiniGrid3-v0", protocol(3, 750_000, 10_000, 2_000_000), (), cap=1.0, preset="minigrid3",
    ),
    AgentStream(
        "cl/MiniHack4-v0", "Continual-Dreamer (2211.15944): 1 M frames a task",
        "MiniHack4-v0", protocol(4, 1_000_000, 50_000, 1_000_000), (), cap=1.0, preset="minihack4",
    ),
    AgentStream(
        "cl/Atari6-v0", "CORA (2110.10067): 50 M emulated frames a game, twice through all",
        "Atari6-v0", protocol(6, 12_500_000, 250_000, 2_000_000, cycles=2, ratio=32.0, length=64),
        DREAMER, cap=None,
    ),
    AgentStream(
        "cl/CoinRun6-v0", "CoinRun under six looks, in the order of ARROW (2603.11395)",
        "CoinRun6-v0", protocol(6, 5_000_000, 250_000, 2_000_000, ratio=32.0, length=64),
        DREAMER, cap=10.0,
    ),
    AgentStream(
        "cl/CrafterShift-v0", "Crafter under other rules: 1 M frames a task, as Crafter has",
        "CrafterShift-v0", protocol(6, 1_000_000, 50_000, 1_000_000, ratio=32.0, length=64),
        DREAMER, cap=22.0,
    ),
    AgentStream(
        "cl/SlipperyAnt-v0", "an ant on four grounds, 2 M frames each as Dohare et al. (2024)",
        "SlipperyAnt-v0", protocol(4, 2_000_000, 50_000, 1_000_000, ratio=32.0, length=64),
        DREAMER, cap=None,
    ),
    AgentStream(
        "cl/CartPoleFree-v0", "task-free CartPole: contexts and lengths of phases are drawn",
        "CartPoleShift-v0", free(40_000, 200, FIELDS, phases=16), SMALL, cap=200.0, paid=True,
        change="drawn",
    ),
    AgentStream(
        "cl/SlipperyAntFree-v0", "task-free ant: friction is redrawn every 2 M frames (2024)",
        "SlipperyAnt-v0",
        free(20_000_000, 10_000, alone(protocol(0, 0, 0, 1_000_000, ratio=32.0, length=64)),
             switch=2_000_000),
        DREAMER, cap=None, change="own",
    ),
)  # fmt: skip
STREAMS = {stream.id: stream for stream in ALL}
