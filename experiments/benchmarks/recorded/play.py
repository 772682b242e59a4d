"""Who acts in the real environment for `nested bench offline`: everyone on the same episodes.

Their seeds depend on how many are asked for and on nothing else, and each slot plays as many of
them: a policy that ends its episodes early gets no others. Actions are sampled. What was played is
kept as JSON, in a run's folder or in the suite's, and is not played again.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from experiments.config import ConfigError
from experiments.config.dreamer4 import Dreamer4Config
from experiments.data.clips import Clips
from experiments.data.expert import expert_envs, script_of
from experiments.envs import make_envs, recipes
from experiments.envs.rows import Envs
from experiments.evaluate_offline import Trained
from experiments.policies import Policy, of_offline, play, uniform
from experiments.record.curves import series
from experiments.record.metrics import read
from experiments.record.run import read_json, write_json

SEED = 250_924_527  # of the episodes: no run learns from them
SLOTS = 25  # played at once
LEARNED = ("imitation", "imagination")
FILE = "played.json"

Returns = dict[str, np.ndarray]  # policy -> return of each episode (E,)
Curve = tuple[np.ndarray, np.ndarray]  # updates of both phases (n,), returns (n,)


class Outcome(NamedTuple):
    """What one phase-2 seed gave."""

    seed: int
    returns: Returns  # of LEARNED, in the end
    curves: dict[str, Curve]  # of LEARNED, evaluated while they learned
    imagined: float  # mean return of whole imagined episodes, in the end
    dreamed: tuple[float, float]  # lambda-returns in imagination, first and last reported


def succeeds(env: str) -> bool:
    """Whether an episode in this environment returns more than zero just where it succeeds."""
    return env.startswith(("MiniGrid-", "BabyAI-")) or env == recipes.ID


def whole(episodes: int) -> int:
    """So many episodes, or the few more that give each slot as many."""
    slots = min(episodes, SLOTS)
    return -(-episodes // slots) * slots


def outcome(path: Path, config: Dreamer4Config, episodes: int) -> Outcome:
    """All that is compared of a finished run; its policies play where they have not yet."""
    rows = read(path / "metrics.jsonl")
    phases = config.phases
    before = rows[-1].step - phases.finetune.updates - phases.imagine.updates
    curves: dict[str, Curve] = {}
    for name in LEARNED:
        steps, values = series(rows, f"eval/{name}/return")
        curves[name] = (np.array(steps) - before, np.array(values))
    (imagined,) = series(rows, "round/imagined_return")[1][-1:]
    dreamed = series(rows, "imagine/imagined_return")[1] or [float("nan")]
    returns = kept(path / FILE, {"episodes": episodes}, lambda: learned(path, episodes))
    return Outcome(config.seed, returns, curves, imagined, (dreamed[0], dreamed[-1]))


def references(folder: Path, config: Dreamer4Config, episodes: int) -> Returns:
    """Returns of random actions, of the demonstrations, and of the expert where there is one.

    The expert plays without noise, on the episodes that everyone plays.
    """
    key = {"episodes": episodes, "env": config.env.model_dump(mode="json")}
    found = kept(folder / FILE, key, lambda: scripted(config, episodes))
    clips = Clips.open(config.data.path)
    shown = [float(clips.read(e, 0, e.length)["reward"].sum()) for e in clips.episodes]
    return {"demonstrations": np.array(shown), **found}


def kept(file: Path, key: Mapping[str, Any], make: Callable[[], Returns]) -> Returns:
    """The returns in a file, where they are those of the key; otherwise made, and put there."""
    if not file.exists() or read_json(file)["key"] != key:
        returns = {name: values.tolist() for name, values in make().items()}
        write_json(file, {"key": dict(key), "returns": returns})
    return {name: np.array(values) for name, values in read_json(file)["returns"].items()}


# ---- episodes ----------------------------------------------------------------------------------
def learned(path: Path, episodes: int) -> Returns:
    """Both policies of a run."""
    trained = Trained(path)
    image, found = trained.config.data.image, {}
    for name in LEARNED:
        envs = here(trained.config, episodes)
        generator = torch.Generator(trained.device).manual_seed(SEED + trained.config.seed)
        policy = of_offline(trained.policies[name], envs.num, image, generator)
        found[name] = acted(envs, policy, episodes)
    return found


def scripted(config: Dreamer4Config, episodes: int) -> Returns:
    """Random actions, and the expert."""
    envs = here(config, episodes)
    found = {"random": acted(envs, uniform(envs, np.random.default_rng(SEED)), episodes)}
    try:
        script_of(config.env.id)
    except ConfigError:
        return found
    expert = expert_envs(config.env, envs.num, 0.0, SEED)
    return found | {"expert": acted(*expert, episodes)}


def here(config: Dreamer4Config, episodes: int) -> Envs:
    """The environments that everyone plays in, in this process."""
    env = config.env.model_copy(update={"workers": "inprocess"})
    return make_envs(env, min(episodes, SLOTS), SEED)


def acted(envs: Envs, policy: Policy, episodes: int) -> np.ndarray:
    """Returns of a policy; the environments are closed."""
    try:
        return np.array(play(envs, policy, episodes))
    finally:
        envs.close()
