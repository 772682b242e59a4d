"""A run that begins with another's world model: `start=RUN`.

Tokenizer and dynamics are those of RUN's last checkpoint, bit for bit. Heads are new, from the new
run's own seed: several seeds of imitation and imagination over one world model tell what is luck.
Memories and networks that RUN's dynamics lack join them, silent at first. RUN is read once, before
a folder is made, and may be gone afterwards.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

from torch import Tensor

from agents.offline import OfflineDreamer
from experiments.config import ConfigError
from experiments.config.dreamer4 import PHASES, Dreamer4Config, is_dreamer4, load_dreamer4
from experiments.config.text import flat
from experiments.data.clips import Clips
from experiments.data.lessons import LABELS, labels_of, spec_of
from experiments.record import CheckpointError, Checkpoints
from experiments.record.run import write_json
from worldmodel.transformer import stack

# What a run may set anew: training's own, and what has no parameters.
FREE = {
    *("tokenizer.hide", "dynamics.bootstrap", "dynamics.apart", "dynamics.settled"),
    *("dynamics.context_noise", "dynamics.trunk.context"),
}


class Origin(NamedTuple):
    """The run that another one begins with."""

    path: Path
    config: Dreamer4Config
    weights: Mapping[str, Tensor]  # of its agent

    @classmethod
    def of(cls, config: Dreamer4Config) -> Self | None:
        """What `config.start` names; None for nothing. Raises ConfigError where it cannot be."""
        if config.start is None:
            return None
        path = Path(config.start)
        if not path.is_dir():
            raise wrong(config, "no such folder", "`nested runs` lists the runs")
        if not is_dreamer4(path):
            raise wrong(config, "is no offline run", "name the folder of a run of method dreamer4")
        try:
            old, loaded = load_dreamer4(path), Checkpoints(path / "checkpoints").load()
        except (CheckpointError, ConfigError) as error:
            problem = f"cannot be read: {error}".replace("\n", "; ")
            raise wrong(config, problem, "name another run") from error
        go_on = f"go on with: nested train --resume {path}"
        if loaded is None:
            raise wrong(config, "holds no checkpoint", go_on)
        phase = loaded.state["counts"][0]
        if phase < config.passed:
            problem = f"is still in phase {PHASES[phase]} and has not passed dynamics"
            raise wrong(config, problem, go_on)
        compare(path, old, config)
        return cls(path, old, loaded.state["agent"])

    def teach(self, agent: OfflineDreamer) -> tuple[str, ...]:
        """Give tokenizer and dynamics to an agent; the names of its dynamics' new parameters."""
        agent.tokenizer.load_state_dict(below(self.weights, "tokenizer."))
        new = stack(agent.dynamics, below(self.weights, "dynamics."))
        return tuple(f"dynamics.{name}" for name in new)

    def lend(self, config: Dreamer4Config, folder: Path) -> None:
        """Of the same data: which episodes are labelled, and latents as hard links.

        The world model has seen those actions, and no others may be known now. Where links cannot
        be, latents are encoded anew.
        """
        mine, its = config.data, self.config.data
        data = Path(mine.path)
        if (data.resolve(), mine.image) != (Path(its.path).resolve(), its.image):
            return
        write_json(folder / LABELS, {"seed": labels_of(self.path, self.config)})
        recorded = (data / "index.json").stat().st_mtime
        for file in sorted(self.path.glob("latents/*/latents.npy")):
            if file.stat().st_mtime < recorded:
                continue  # of other recordings, which were in the same folder
            target = folder / "latents" / file.parent.name / file.name
            target.parent.mkdir(parents=True)
            try:
                os.link(file, target)
            except OSError:  # another file system
                return


def compare(path: Path, old: Dreamer4Config, new: Dreamer4Config) -> None:
    """Raise ConfigError where the world model of `old` is not one that `new` describes."""
    before, after = (sizes(config) for config in (old, new))
    for name in dict.fromkeys([*before, *after]):
        was, now = (fields.get(name, "nothing") for fields in (before, after))
        if was != now and not joins(name, old, new):
            raise wrong(
                new, f"has {name}={was}, not {now}",
                f"set {name}={was}, or take all from it: nested train {path} start={path}",
            )  # fmt: skip
    was, now = spec_of(path, old), Clips.open(new.data.path).spec
    frames = [spec.obs.get(c.data.image) for spec, c in ((was, old), (now, new))]
    if frames[0] != frames[1] or was.action != now.action:
        problem = f"learned {frames[0]} and {was.action}, data.path holds {frames[1]}, {now.action}"
        raise wrong(new, problem, "name data of the same images and actions")


def sizes(config: Dreamer4Config) -> dict[str, Any]:
    """The fields that decide what tokenizer and dynamics compute."""
    tree = {name: config.tree()[name] for name in ("tokenizer", "dynamics")}
    found = {name: value for name, value in flat(tree).items() if name not in FREE}
    return found | {"agent.bins": config.agent.bins}  # of continuous actions, which dynamics read


def joins(name: str, old: Dreamer4Config, new: Dreamer4Config) -> bool:
    """Whether a field that differs only adds parts which are silent at first."""
    was, now = old.dynamics.trunk, new.dynamics.trunk
    if name == "dynamics.trunk.chain":
        return now.chain > was.chain
    if not name.startswith(("dynamics.trunk.memory", "dynamics.trunk.place")):
        return False
    return was.memory.kind == "none" and (now.memory.kind == "none" or now.place == "beside")


def below(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The weights of a part, by their names in it."""
    return {k.removeprefix(prefix): w for k, w in weights.items() if k.startswith(prefix)}


def wrong(config: Dreamer4Config, problem: str, way_out: str) -> ConfigError:
    """The error of a run that cannot be begun with."""
    return ConfigError("start", config.start, problem, way_out)
