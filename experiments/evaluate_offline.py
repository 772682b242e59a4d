"""What an offline run learned, acting: the cloned policy beside the one that imagination trained.

Loads a run's last checkpoint and needs its folder alone, not its data. Actions are sampled: the
most probable ones of a cloned policy can circle for ever where its draws do not.
"""

import copy
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from agents.offline import OfflineDreamer
from experiments.config.dreamer4 import PHASES, Dreamer4Config, load_dreamer4
from experiments.data.lessons import spec_of
from experiments.envs import make_envs
from experiments.offline_loop import EVALUATE, build_offline
from experiments.policies import of_offline, play, uniform
from experiments.record import Checkpoints, Run, RunError


class Trained:
    """A run as its last checkpoint left it, to act with: `policies` by what they learned from."""

    def __init__(self, path: Path):
        run = Run.open(path)
        self.config = load_dreamer4(path)
        loaded = Checkpoints(run.checkpoints).load()
        if loaded is None:
            raise RunError(f"{path} holds no checkpoint yet; train it first")
        self.spec = spec_of(path, self.config)
        self.agent = build_offline(self.config, self.spec)
        self.agent.load_state_dict(loaded.state["agent"])
        self.device = next(self.agent.parameters()).device
        self.stage = loaded.state["counts"][0]
        self.prior: dict[str, Tensor] = loaded.state["prior"]

    @property
    def policies(self) -> dict[str, OfflineDreamer]:
        """The cloned policy and the one that imagination trained; those that there are."""
        found = {}
        if self.prior:
            found["imitation"] = copy.deepcopy(self.agent)
            found["imitation"].policy.load_state_dict(self.prior)
        if self.stage > PHASES.index("imagine"):
            found["imagination"] = self.agent
        return found


def load_offline(path: Path) -> tuple[Dreamer4Config, OfflineDreamer, torch.device]:
    """The configuration and the agent of a run, as its last checkpoint left it."""
    trained = Trained(path)
    return trained.config, trained.agent, trained.device


def evaluate_offline(path: Path, episodes: int = 32) -> dict[str, float]:
    """Load a run and act, actions sampled: returns of random actions and of each of its policies.

    `error` is the standard error of the mean. All see the same episodes. Raises RunError for a
    run that has not learned to act.
    """
    trained = Trained(path)
    policies = trained.policies
    if not policies:
        name = trained.config.stages[trained.stage].name
        raise RunError(
            f"{path} is in phase {name} and has no policy yet; "
            f"go on with: nested train --resume {path}"
        )
    seed = int(np.random.SeedSequence([trained.config.seed, EVALUATE]).generate_state(1)[0])
    metrics: dict[str, float] = {}
    for name in ("random", *policies):
        envs = make_envs(trained.config.env, min(episodes, trained.config.env.num), seed)
        try:
            policy = uniform(envs, np.random.default_rng(seed))
            if name in policies:
                generator = torch.Generator(trained.device).manual_seed(seed)
                image = trained.config.data.image
                policy = of_offline(policies[name], envs.num, image, generator)
            returns = np.array(play(envs, policy, episodes))
        finally:
            envs.close()
        found = {"return": returns.mean(), "error": returns.std() / max(1, len(returns) - 1) ** 0.5}
        found |= {"score": returns.mean() / envs.cap} if envs.cap else {}
        metrics |= {f"eval/{name}/{key}": float(value) for key, value in found.items()}
    return metrics
