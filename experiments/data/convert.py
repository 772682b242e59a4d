"""Data sets from elsewhere, and the command `nested data`: record, convert.

`convert` reads a folder of .npz files, one episode each, or a Minari data set by its id. An .npz
has the columns of a row: `obs.<name>` (uint8 images, float32 vectors), `action` (T, A) that led
into each row, or (T,) int choices; `reward`, `terminal` (T,). Minari is an optional package.
"""

import importlib
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from experiments.config import Config, ConfigError
from experiments.config.models import EnvConfig
from experiments.data.clips import Arrays, Spec, Writer, record
from experiments.data.expert import expert_envs
from experiments.envs import make_envs
from experiments.envs.known import check_env
from experiments.envs.rows import Envs, encode_choices
from experiments.envs.spaces import Actions, Observations
from experiments.policies import Policy, of_dreamer, of_offline, uniform
from worldmodel.types import ActionSpec, ObsSpec


def record_policy(
    path: Path, policy: str, env: EnvConfig, frames: int, noise: float = 0.3, seed: int = 0
) -> Path:
    """Episodes of `random`, of the scripted `expert`, or of a trained run's folder."""
    check_env(Config(env=env))
    envs, act = _players(policy, env, noise, seed)
    try:
        return record(envs, act, frames, path)
    finally:
        envs.close()


def _players(policy: str, env: EnvConfig, noise: float, seed: int) -> tuple[Envs, Policy]:
    if policy == "expert":
        return expert_envs(env, env.num, noise, seed)
    if policy == "random":
        envs = make_envs(env, seed=seed)
        return envs, uniform(envs, np.random.default_rng([seed, 1]))
    return _of_run(Path(policy), seed)


def _of_run(path: Path, seed: int) -> tuple[Envs, Policy]:
    """A run's environment and its policy, as it acted while it learned."""
    from experiments.config.dreamer4 import is_dreamer4
    from experiments.evaluate import load_run
    from experiments.evaluate_offline import load_offline

    if is_dreamer4(path):
        offline, actor, device = load_offline(path)
        envs = make_envs(offline.env, seed=seed)
        generator = torch.Generator(device).manual_seed(seed)
        return envs, of_offline(actor, envs.num, offline.data.image, generator)
    config, agent = load_run(path)
    envs = make_envs(config.env, seed=seed)
    device = next(agent.parameters()).device
    return envs, of_dreamer(agent, envs.num, torch.Generator(device).manual_seed(seed))


def convert(source: str, path: Path) -> Path:
    """A folder of .npz episodes, or a Minari data set, as clips. Raises ConfigError."""
    if Path(source).is_dir():
        spec, episodes = _npz(Path(source))
    else:
        spec, episodes = _minari(source)
    with Writer(path, spec) as writer:
        for episode in episodes:
            writer.add(episode)
    return path


def _npz(folder: Path) -> tuple[Spec, Iterable[Arrays]]:
    files = sorted(folder.glob("*.npz"))
    if not files:
        raise ConfigError("source", str(folder), "holds no .npz file", "one file is one episode")
    loaded = [_load(file) for file in files]
    choices = all(one["action"].ndim == 1 for one in loaded)
    if choices:
        action = ActionSpec("discrete", (int(max(one["action"].max() for one in loaded)) + 1,))
    else:
        action = ActionSpec("continuous", (loaded[0]["action"].shape[1],))
    obs = {k.removeprefix("obs."): v for k, v in loaded[0].items() if k.startswith("obs.")}
    spec = Spec({name: _spec(value) for name, value in obs.items()}, action)
    return spec, (_columns(one, spec) for one in loaded)


def _load(file: Path) -> Arrays:
    with np.load(file, allow_pickle=False) as found:
        arrays = dict(found)
    missing = {"action", "reward", "terminal"} - arrays.keys()
    if missing or not any(name.startswith("obs.") for name in arrays):
        lacks = ", ".join(sorted(missing)) or "obs.<name>"
        raise ConfigError("source", str(file), f"lacks {lacks}", f"it has {', '.join(arrays)}")
    return arrays


def _spec(value: np.ndarray) -> ObsSpec:
    if value.dtype == np.uint8 and value.ndim == 4:
        return ObsSpec("image", value.shape[1:])
    return ObsSpec("vector", (int(np.prod(value.shape[1:])),))


def _columns(arrays: Arrays, spec: Spec) -> Arrays:
    """One episode as rows: where actions are choices, one-hot; the first row has none."""
    action = arrays["action"]
    if action.ndim == 1:
        action = encode_choices(action[:, None].astype(np.int64), spec.action)
    first = np.zeros(len(action), bool)
    first[0] = True
    flags = {
        "action": np.where(first[:, None], 0, action).astype(np.float32),
        "reward": np.where(first, 0, arrays["reward"]).astype(np.float32),
        "first": first,
        "terminal": arrays["terminal"].astype(bool),
    }
    obs = {f"obs.{name}": arrays[f"obs.{name}"] for name in spec.obs}
    kinds = {f"obs.{name}": entry.kind for name, entry in spec.obs.items()}
    flat = {k: v if kinds[k] == "image" else v.reshape(len(v), -1) for k, v in obs.items()}
    return {k: v if kinds[k] == "image" else v.astype(np.float32) for k, v in flat.items()} | flags


def _minari(name: str) -> tuple[Spec, Iterable[Arrays]]:
    if find_spec("minari") is None:
        way_out = "name a folder of .npz files, or for a Minari id: pip install minari"
        raise ConfigError("source", name, "no such folder, and minari is not installed", way_out)
    data: Any = importlib.import_module("minari").load_dataset(name, download=True)
    observe = Observations(data.observation_space, 64)
    actions = Actions(data.action_space)
    spec = Spec(observe.spec, actions.spec)
    return spec, _minari_episodes(data, observe, spec, data.action_space)


def _minari_episodes(data: Any, observe: Observations, spec: Spec, space: Any) -> Iterator[Arrays]:
    """Minari keeps T + 1 observations and the T actions, rewards and flags between them."""
    for episode in data.iterate_episodes():
        count = len(episode.rewards)
        rows = [observe(_row(episode.observations, t)) for t in range(count + 1)]
        obs = {f"obs.{name}": np.stack([row[name] for row in rows]) for name in spec.obs}
        action = np.zeros((count + 1, spec.action.dim), np.float32)
        action[1:] = encoded(np.asarray(episode.actions), spec.action, space)
        reward, first, terminal = (
            np.zeros(count + 1),
            np.arange(count + 1) == 0,
            np.zeros(count + 1),
        )
        reward[1:], terminal[1:] = episode.rewards, episode.terminations
        flags = {"reward": reward.astype(np.float32), "first": first}
        yield obs | {"action": action, **flags, "terminal": terminal.astype(bool)}


def _row(observations: Any, t: int) -> Any:
    if isinstance(observations, dict):
        return {name: _row(value, t) for name, value in observations.items()}
    return observations[t]


def encoded(actions: np.ndarray, spec: ActionSpec, space: Any) -> np.ndarray:
    """Actions of a gymnasium space as our vectors (T, A)."""
    if spec.kind == "discrete":
        start = np.asarray(getattr(space, "start", 0))
        choices = (actions - start).reshape(len(actions), -1).astype(np.int64)
        return encode_choices(choices, spec)
    low, high = np.asarray(space.low, np.float64), np.asarray(space.high, np.float64)
    bounded = np.isfinite(low) & np.isfinite(high)
    wide = np.where(bounded, high - low, 2.0)
    unit = np.where(bounded, 2 * (actions - np.where(bounded, low, -1.0)) / wide - 1, actions)
    return unit.reshape(len(actions), -1).astype(np.float32)
