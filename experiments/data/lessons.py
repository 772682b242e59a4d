"""What an offline run learns from: recordings, episodes held out of them, and episodes acted since.

Frames are images until the tokenizer is frozen, then latents: those are files in the run's folder,
written once. Each round's episodes are a data set of their own there, so nothing recorded changes.
Of episodes that are not labelled nothing but frames is known: their actions and rewards are NaN.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from agents.offline import Experience
from experiments.config import ConfigError
from experiments.config.dreamer4 import Dreamer4Config
from experiments.data.clips import Arrays, Clips, Spec
from experiments.record.run import read_json, write_json
from worldmodel import Tokenizer
from worldmodel.shortcut import Clip

BLOCK = 64  # frames that are encoded at once
SPEC = "data.json"  # in a run's folder: what its data are, so that it can act without them
LABELS = "labels.json"  # there: the seed that drew which episodes are labelled
DRAWN = 6  # its stream of random numbers
Parts = Sequence[tuple[Clips, int]]  # rows from each


class Lessons:
    """The data of a run in `path`, as tensors on the device; draws rows from `rng`."""

    def __init__(
        self, config: Dreamer4Config, path: Path, rng: np.random.Generator, device: torch.device
    ):
        self.config, self.path, self.rng, self.device = config, path, rng, device
        self.labels = labels_of(path, config)
        write_json(path / LABELS, {"seed": self.labels})
        self.recorded = Clips.open(config.data.path)
        self._share(self.recorded)
        self.acted: Clips | None = None

    def begin(self, round: int, tokenizer: Tokenizer | None) -> None:
        """Share out the recordings and the rounds up to this one; frozen, frames are latents."""
        if tokenizer is None:
            return
        self._share(self._encoded(self.recorded, self.path / "latents", tokenizer))
        folders = map(self.folder, range(1, round + 1))
        paths = [path for path in folders if (path / "index.json").exists()]
        found = [self._encoded(Clips.open(p), p / "latents", tokenizer) for p in paths]
        self.acted = Clips.join(found) if found else None

    def folder(self, round: int) -> Path:
        """Where the episodes of a round are."""
        return self.path / "acted" / f"{round:03d}"

    def images(self, clips: Clips, batch: int, length: int) -> tuple[Tensor, Tensor]:
        """uint8 images (B, T, H, W, C) and where episodes start (B, T)."""
        arrays = clips.packed(batch, length, self.rng)
        return self.tensor(arrays[f"obs.{self.config.data.image}"]), self.tensor(arrays["first"])

    def experience(self, parts: Parts, length: int) -> Experience:
        """Rows of each part; of several the first is for imitation, the others for the dynamics.

        What is not known of a row is NaN, and no terminal.
        """
        parts = [(clips, count) for clips, count in parts if count]
        found = [clips.packed(count, length, self.rng) for clips, count in parts]
        columns: Arrays = {k: np.concatenate([x[k] for x in found]) for k in found[0]}
        keys = ("latents", "action", "reward", "first", "terminal", "labelled")
        latents, action, reward, first, terminal, known = (self.tensor(columns[k]) for k in keys)
        row = torch.arange(len(first), device=self.device)
        imitate = row < parts[0][1]
        predict = ~imitate if len(parts) > 1 else imitate
        acting = self.config.phases.finetune.noise == "acting"
        settled = ~predict & acting
        task, nothing = torch.zeros_like(first, dtype=torch.int64), torch.nan
        action = torch.where(known[..., None], action.float(), nothing)
        clip = Clip(latents.float(), action, first, known, task)
        reward = torch.where(known, reward.float(), nothing)
        return Experience(clip, reward, terminal & known, imitate, predict, settled)

    def mixed(self, batch: int) -> Parts:
        """Rows of the recordings and, once there are rounds, of the episodes acted in them."""
        if self.acted is None:
            return [(self.data, batch)]
        rows = min(max(1, round(self.config.online.share * batch)), batch - 1)
        return [(self.data, batch - rows), (self.acted, rows)]

    def tensor(self, array: np.ndarray) -> Tensor:
        """A copy on the device."""
        return torch.from_numpy(np.array(array)).to(self.device)

    def _share(self, clips: Clips) -> None:
        """What is learned from, what is held out, and what is worth imitating."""
        data, self.held = clips.split(self.config.data.held)
        known = labelled(data, self.config.data.labelled, self.labels)
        self.data = known.favour(self.config.data.favour)
        self.best = self.data.best(self.config.data.best)

    def _encoded(self, clips: Clips, path: Path, tokenizer: Tokenizer) -> Clips:
        """The episodes with a column of latents, encoded where that was not done before."""
        context, image = tokenizer.encoder.initial(1), f"obs.{self.config.data.image}"

        @torch.no_grad()
        def encode(columns: Arrays, begins: bool) -> np.ndarray:
            nonlocal context
            context = tokenizer.encoder.initial(1) if begins else context
            images, first = (self.tensor(columns[k])[None] for k in (image, "first"))
            z, context = tokenizer.encode_next(images, context, first)
            return z[0].half().cpu().numpy()

        return clips.translate(path, "latents", BLOCK, encode)


def labelled(clips: Clips, share: float, seed: int) -> Clips:
    """The same episodes, of which a share keep what is known of them, at least one.

    Which ones depends on the seed alone; those of a smaller share are among those of a larger one.
    """
    known = np.array([i for i, episode in enumerate(clips.episodes) if episode.labelled])
    count = max(round(share * len(known)), bool(share))
    order = np.random.default_rng([seed, DRAWN]).permutation(len(known))
    chosen = set(known[order[:count]].tolist())
    episodes = [e._replace(labelled=i in chosen) for i, e in enumerate(clips.episodes)]
    return Clips(clips.spec, episodes, clips.columns)


def labels_of(path: Path, config: Dreamer4Config) -> int:
    """The seed that draws which episodes are labelled in the run in `path`."""
    known = path / LABELS
    return int(read_json(known)["seed"]) if known.exists() else config.seed


def check_lessons(config: Dreamer4Config, recorded: Clips) -> None:
    """Raise ConfigError where there is nothing to imitate in what shall be imitated."""
    if config.imitates and not any(episode.labelled for episode in recorded.episodes):
        problem, way_out = "holds no known action to imitate", "phases.finetune.updates=0"
        raise ConfigError("data.path", config.data.path, problem, f"use other data, or {way_out}")


def spec_of(path: Path, config: Dreamer4Config) -> Spec:
    """What the data of the run in `path` are, which may be gone."""
    known = path / SPEC
    return Spec.of(read_json(known)) if known.exists() else Clips.open(config.data.path).spec
