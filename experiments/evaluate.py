"""Evaluation: acts with a trained agent and changes nothing in it.

Environments, carries and generators of an evaluation are its own and depend only on the seed and
the moment, so a run with evaluations trains exactly as one without.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch

from agents import Dreamer
from experiments.build import build_agent, device_of
from experiments.config import Config, ConfigError, load_config
from experiments.config.dreamer4 import is_dreamer4
from experiments.driver import Driver, Step
from experiments.envs import cartpole, make_envs
from worldmodel.rssm import MemoryUse

SLOTS = 4  # evaluation slots for each training slot, so that slow environments stay few
DEFAULT = "default"  # the context of an environment that has none
MIXES = (cartpole.ID,)  # whose slots may be in different contexts: all are played at once

Act = Callable[[Sequence[Driver]], list[Step]]


def step_each(drivers: Sequence[Driver]) -> list[Step]:
    """One step of every driver."""
    return [driver.step() for driver in drivers]


def contexts_of(config: Config) -> list[str]:
    """The distinct contexts to evaluate in, in the order in which they come up."""
    return list(dict.fromkeys(config.evaluate.contexts or config.env.contexts)) or [DEFAULT]


def evaluate(
    config: Config,
    agent: Dreamer,
    contexts: Sequence[str],
    moment: int = 0,
    episodes: int = 32,
    use: MemoryUse = "write",
) -> dict[str, float]:
    """Mean return of `episodes` episodes in each context, and its share of the cap as `score`.

    `moment` (environment frames) picks the seed. Every slot plays the same number of episodes, so
    that short ones are not counted more often than long ones.
    """
    return evaluate_all([config], [agent], contexts, moment, episodes, use)[0]


def evaluate_all(
    configs: Sequence[Config],
    agents: Sequence[Dreamer],
    contexts: Sequence[str],
    moment: int = 0,
    episodes: int = 32,
    use: MemoryUse = "write",
    act: Act = step_each,
) -> list[dict[str, float]]:
    """`evaluate` of several agents, each in environments of its own; `act` steps all of them."""
    num = min(episodes, SLOTS * configs[0].env.num)
    seeds = [np.random.SeedSequence([c.seed, 1, moment]).generate_state(1)[0] for c in configs]
    metrics: list[dict[str, float]] = [{} for _ in configs]
    mixes = configs[0].env.id in MIXES
    batches = [contexts] if mixes else [[context] for context in contexts]
    with ExitStack() as stack:
        slots = num * len(batches[0])
        envs = [make_envs(c.env, slots, int(s)) for c, s in zip(configs, seeds, strict=True)]
        for one in envs:
            stack.callback(one.close)
        generators = [
            torch.Generator(device_of(c)).manual_seed(int(s))
            for c, s in zip(configs, seeds, strict=True)
        ]
        for names in batches:
            parts = zip(agents, envs, generators, strict=True)
            drivers = [Driver(*part, use) for part in parts]
            for driver in drivers:
                driver.reset(_each_slot(names, num))
            played = _play(drivers, -(-episodes // num), act)
            means = played.reshape(len(drivers), len(names), -1).mean(-1)
            for found, one, row in zip(metrics, envs, means.tolist(), strict=True):
                for context, mean in zip(names, row, strict=True):
                    found[f"eval/{context}/return"] = mean
                    if one.cap:
                        found[f"eval/{context}/score"] = mean / one.cap
    return metrics


def _each_slot(contexts: Sequence[str], num: int) -> str | list[str] | None:
    """The context of every slot, `num` slots each; one name where there is one, None for none."""
    if len(contexts) == 1:
        return None if contexts[0] == DEFAULT else contexts[0]
    return [context for context in contexts for _ in range(num)]


def evaluations(
    configs: Sequence[Config],
    agents: Sequence[Dreamer],
    moment: int,
    act: Act = step_each,
) -> list[dict[str, float]]:
    """What runs report: every context, and where configured without fast weights, as CONTEXT_off.

    Both see the same episodes.
    """
    lead = configs[0]
    given = (configs, agents, contexts_of(lead), moment, lead.evaluate.episodes)
    found = evaluate_all(*given, "write", act)
    without = evaluate_all(*given, "off", act) if lead.evaluate.off else [{} for _ in configs]
    return [one | renamed(other) for one, other in zip(found, without, strict=True)]


def renamed(metrics: Mapping[str, float]) -> dict[str, float]:
    """eval/CONTEXT/NAME as eval/CONTEXT_off/NAME."""
    parts = {name: name.rsplit("/", 1) for name in metrics}
    return {f"{head}_off/{tail}": metrics[name] for name, (head, tail) in parts.items()}


def _play(drivers: Sequence[Driver], each: int, act: Act) -> np.ndarray:
    """Returns (drivers, slots, each) of the first `each` episodes of every slot."""
    count = np.zeros((len(drivers), drivers[0].envs.num), np.int64)
    returns = np.zeros((*count.shape, each))
    while (count < each).any():
        for i, step in enumerate(act(drivers)):
            ended = np.flatnonzero(step.row.last)
            for slot, value in zip(ended, step.returns, strict=True):
                if count[i, slot] < each:
                    returns[i, slot, count[i, slot]] = value
                    count[i, slot] += 1
    return returns


def load_run(path: Path | str, step: int | None = None) -> tuple[Config, Dreamer]:
    """The configuration and the agent of a run, on the configured device.

    As it was at its end, or at the checkpoint of `step`.
    """
    from experiments.record import Checkpoints, Run, RunError

    run = Run.open(Path(path))
    config = load_config(str(run.path / "config.yaml"), [])
    loaded = Checkpoints(run.checkpoints).load(step)
    if loaded is None:
        when = "yet; train it first" if step is None else f"of step {step}"
        raise RunError(f"{run.path} holds no checkpoint {when}")
    envs = make_envs(config.env.model_copy(update={"workers": "inprocess"}), 1, 0)
    envs.close()
    agent = build_agent(config, envs.obs_spec, envs.action_spec)
    agent.load_state_dict(loaded.state["agent"])
    return config, agent


def evaluate_run(path: Path | str, fast: bool = True, episodes: int = 32) -> dict[str, float]:
    """Load a run and act: mean returns by context; without `fast`, memories are left out.

    Of an offline run: by policy; it has no memories to leave out.
    """
    if is_dreamer4(path):
        from experiments.evaluate_offline import evaluate_offline

        if not fast:
            problem = "an offline agent has no fast memory"
            raise ConfigError("--fast", "off", problem, "leave it out")
        return evaluate_offline(Path(path), episodes)
    config, agent = load_run(path)
    use: MemoryUse = "write" if fast else "off"
    return evaluate(config, agent, contexts_of(config), 0, episodes, use)
