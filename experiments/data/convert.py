"""Data sets from a policy or from elsewhere: what the command `nested data` does.

`record_policy` acts; `convert` reads a folder of videos (`video.py`), a folder of .npz files
(`npz.py`) or a Minari data set by its id (`minari.py`).
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from experiments.config import Config, ConfigError
from experiments.config.models import EnvConfig
from experiments.data.clips import Writer, check_free, record
from experiments.data.expert import expert_envs
from experiments.data.minari import read_minari
from experiments.data.npz import read_npz
from experiments.data.source import Options, Source
from experiments.data.video import KINDS, read_video, videos_in
from experiments.envs import make_envs
from experiments.envs.known import check_env
from experiments.envs.rows import Envs
from experiments.policies import Policy, of_dreamer, of_offline, uniform


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


def _silent(what: object) -> None:
    del what


def convert(
    source: str,
    path: Path,
    options: Options | None = None,
    left_out: Callable[[str], None] = _silent,
    done: Callable[[int], None] = _silent,
) -> Path:
    """Episodes of another format as clips in a new folder. Raises ConfigError.

    left_out: takes why an episode is not among them; done: the rows of each that is.
    """
    check_free(path)
    options = options or Options()
    found = opened(source, options)
    for line in found.left_out:
        left_out(line)
    with Writer(path, found.spec) as writer:
        for episode in found.episodes:
            try:
                done(writer.extend(episode.parts, episode.labelled))
            except ConfigError as error:
                if not options.skip_broken:
                    raise
                left_out(error.problem)
    return path


def opened(source: str, options: Options) -> Source:
    """The episodes of a folder of videos or of .npz files, or of a Minari data set by its id."""
    folder = Path(source)
    if folder.is_file():
        problem = "is a file: a source is a folder"
        raise ConfigError("source", source, problem, f"name its folder, {folder.parent}")
    if not folder.is_dir():
        check_options(source, options)
        return read_minari(source, options)
    if (folder / "index.json").exists():
        raise ConfigError("source", source, "is a data set already", "train on it as it is")
    videos, arrays = bool(videos_in(folder)), any(folder.glob("*.npz"))
    if videos == arrays:
        problem = (
            "holds both videos and .npz files" if videos else "holds no video and no .npz file"
        )
        kinds = f"one episode is a video ({', '.join(KINDS)}) or an .npz file"
        way_out = "put them into folders of their own" if videos else kinds
        raise ConfigError("source", source, problem, way_out)
    if videos:
        return read_video(folder, options)
    check_options(source, options)
    return read_npz(folder, options)


def check_options(source: str, options: Options) -> None:
    """Raises ConfigError for what only videos have."""
    plain = Options()._asdict()
    for name in ("every", "fps", "truncate", "drop_null"):
        if options._asdict()[name] != plain[name]:
            option = f"--{name.replace('_', '-')}"
            raise ConfigError(option, source, "only videos have frames to leave out", "drop it")
