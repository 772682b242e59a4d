"""Ways for an agent to learn a stream, by name: each is a configuration and nothing else.

Schedules of levels, kinds of replay, fast memories, published methods and the two controls that a
claim about k timescales must beat. CLS-ER is left out: its averages matter only to one who acts
with them or learns from them, and in a configuration nobody does.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from experiments.envs.cartpole import NAMES

POWER = 0.5  # a level of period n learns with lr * n**POWER
LEVELS = {3: ("fast", "mid", "slow"), 5: ("fast", "mid1", "mid2", "mid3", "slow")}

# What a cell may change, and what all methods share.
FIELDS: dict[str, Any] = {
    "tasks": len(NAMES),
    "again": "",  # the context of one more phase at the end, "" for none
    "frames": 10_000,  # of each phase
    "every": 1000,  # frames between evaluations
    "episodes": 16,  # of an evaluation, in each context
    "prefill": 1000,  # frames of random actions
    "ratio": 40.0,  # replayed frames for each frame
    "replay": "fifo",  # of the methods that do not name one
    "capacity": 4096,  # frames that a replay keeps, of whatever kind
    "lr": 2.5e-4,
    "base": 2,  # ratio of the periods of neighbouring levels
    "l2_init": 1.0,  # the rate of decay toward the initial weights, in units of lr
    "average": 0.005,  # rate of the tortoise
    "return_every": 200,  # updates from one return of the hare to the next
    "ewc": 3000.0,  # strength of the pull of a weight of mean importance, in units of lr
    "anchor_every": 250,  # updates from one anchor of ewc to the next
    "gamma": 0.95,  # what is left of its Fisher information at the next
    "rollout": 64,  # frames that `matching` keeps or drops together
}

# Fields of single methods: options of their cells alone, so that cells of others stay the same.
ONLY: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("ewc", "anchor_every", "gamma"), ("ewc",)),
    "rollout": ("matching",),
}

Options = Mapping[str, Any]
Change = Callable[[Options], Sequence[str]]  # the options of a cell as `field=value` of a run


class AgentMethod(NamedTuple):
    """A configuration: `changes` gives `field=value` for the options of a cell."""

    line: str
    changes: Change = lambda options: ()
    fresh: bool = False  # a new agent for each task


def clocked(k: int) -> Change:
    """k levels by part of the agent, with periods 1, base, base**2 ..."""
    return lambda options: [
        "timescales.kind=geometric", f"timescales.k={k}", f"timescales.base={options['base']}",
        f"timescales.lr_power={POWER}",
    ]  # fmt: skip


def scaled(k: int) -> Change:
    """The groups of k levels at every update, each at the rate that makes up for its period.

    Its rate over its period: a window of n steps with `lr n**POWER` on the mean gradient moves as
    far as n steps at `lr n**(POWER - 1)`.
    """

    def changes(options: Options) -> list[str]:
        found = [*clocked(k)(options)]
        for i, name in enumerate(LEVELS[k]):
            rate = options["lr"] * options["base"] ** (i * (POWER - 1))
            level = f"timescales.levels.{name}"
            found += [f"{level}.every.n=1", f"{level}.flow.rule.lr={rate!r}"]
        return found

    return changes


def accumulated(options: Options) -> list[str]:
    """Every parameter on the mean gradient of `base` batches: the middle period of k = 3."""
    n, level = options["base"], "timescales.levels.all"
    return [f"{level}.every.n={n}", f"{level}.flow.rule.lr={options['lr'] * n**POWER!r}"]


def l2_init(options: Options) -> list[str]:
    """Decay toward the initial weights."""
    return ["timescales.kind=l2_init", f"timescales.rate={options['lr'] * options['l2_init']!r}"]


def hare_tortoise(options: Options) -> list[str]:
    """Return to an average of the own path."""
    return [
        "timescales.kind=hare_tortoise", f"timescales.n={options['return_every']}",
        f"timescales.rate={options['average']}",
    ]  # fmt: skip


def hare_rates(options: Options) -> list[str]:
    """The rate with which the tortoise travels: see `schedules.hare_rates`."""
    n, rate = options["return_every"], options["average"]
    steps = n - (1 - rate) * (1 - (1 - rate) ** n) / rate
    return [f"timescales.rule.lr={options['lr'] * steps / n!r}"]


def ewc(options: Options) -> list[str]:
    """World model and actor stay near where they were, by importance; nobody tells of tasks."""
    return [
        "timescales.kind=ewc", f"timescales.weight={options['ewc']}",
        f"timescales.n={options['anchor_every']}", f"timescales.decay={options['gamma']}",
    ]  # fmt: skip


def with_memory(options: Options) -> list[str]:
    """Fast weights in the dynamics that learn while the agent acts."""
    return ["model.memory.kind=gated_delta", "model.memory.dim=32", "model.memory.heads=1"]


def replay(kind: str) -> Change:
    """This replay, of the same capacity."""
    return lambda options: [f"replay.kind={kind}"]


def matching(options: Options) -> list[str]:
    """The two buffers of WMAR and ARROW."""
    return ["replay.kind=matching", f"replay.rollout={options['rollout']}"]


def told(options: Options) -> list[str]:
    """The context is part of the observation."""
    return ["env.kwargs.oracle=true"]


def both(*changes: Change) -> Change:
    """One change after another."""
    return lambda options: [word for change in changes for word in change(options)]


METHODS = {
    "plain": AgentMethod("k=1: every parameter at every update"),
    "fifo": AgentMethod("k=1, replay keeps the newest", replay("fifo")),
    "reservoir": AgentMethod("k=1, replay is a uniform sample of the past", replay("reservoir")),
    "mixed": AgentMethod("k=1, replay is half the newest, half a sample", replay("mixed")),
    "k3": AgentMethod("k=3 by part of the agent, periods 1, base, base**2", clocked(3)),
    "k5": AgentMethod("k=5 by part of the agent, periods 1 to base**4", clocked(5)),
    "k3_rates": AgentMethod(
        "control of k3: the same groups at every update, rates scaled to the same travel", scaled(3)
    ),
    "k5_rates": AgentMethod("control of k5, alike", scaled(5)),
    "accumulate": AgentMethod(
        "control: all parameters on the mean gradient of `base` batches", accumulated
    ),
}
FAST = ("plain", "reservoir", "k3", "k5", "k3_rates", "accumulate")  # also with a fast memory
AGENT_METHODS = {
    **METHODS,
    **{
        f"{name}_fast": AgentMethod(
            f"{name} with a fast memory in the dynamics", both(METHODS[name].changes, with_memory)
        )
        for name in FAST
    },
    "l2_init": AgentMethod("decay toward the initial weights", l2_init),
    "hare_tortoise": AgentMethod("returns to an average of its own path", hare_tortoise),
    "hare_rates": AgentMethod("control of hare_tortoise: the rate it travels with", hare_rates),
    "ewc": AgentMethod("online EWC on world model and actor, without task boundaries", ewc),
    "matching": AgentMethod(
        "k=1, replay is WMAR's pair of buffers: rollouts of the newest, and of all", matching
    ),
    "oracle": AgentMethod("k=1 that sees the context", told),
    "fresh": AgentMethod("a new agent for each task: the reference of plasticity", fresh=True),
}
