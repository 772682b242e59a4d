"""Dynamics of many makes over the latents of one tokenizer, and what is measured of each.

Noisy demonstrations of Recipes: where things lie is drawn anew in each episode, and without its
actions nobody knows where the agent goes. One tokenizer is learned, once, and must pass a gate;
frames stand alone in it. Every model of a seed begins with the same weights and learns from the
same batches. Those without shortcuts know one step size, the finest, and take it at any number of
sampling steps. Actions that a model shall not know are taken out of its recordings, as NaN.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from experiments.benchmarks.recorded.dynamics_measures import (
    Features,
    chunks,
    frechet,
    imagined,
    psnr,
)
from experiments.config import ConfigError
from experiments.config.models import EnvConfig
from experiments.data.clips import Clips
from experiments.data.convert import record_policy
from experiments.envs.recipes import ID
from experiments.record.run import read_json, revision, write_json
from timescales import REST, Descend, Level, Pull, Timescales, rules
from worldmodel import ShortcutDynamics, Tokenizer, Trunk
from worldmodel.scale import weighted
from worldmodel.shortcut import Clip, Lengths

TIMED = 4  # frames whose cost is taken
MEASURED, REAL = 11, 12  # streams of random numbers: clips held out, real chunks
Losses = Callable[[int], dict[str, Tensor]]  # of the update of this number, from one


class Size(NamedTuple):
    """How much of everything.

    room: cells of its side; held: each so-many-th episode is held out; gate: least PSNR of the
    tokenizer, in dB; rate, warmup: of LaProp; average: share of the live weights that those in use
    take in at an update; apart: share of rows seen as separate images.
    """

    room: int = 3
    noise: float = 0.9
    frames: int = 30_000
    held: int = 5
    latents: tuple[int, int] = (8, 8)
    look: Trunk = Trunk(64, 2, 2, 2, every=3, context=1)
    looks: int = 500
    gate: float = 25.0
    trunk: Trunk = Trunk(64, 3, 2, 1, every=2, context=16)
    spatial: int = 2
    k_max: int = 64
    apart: float = 0.1
    updates: int = 3000
    batch: int = 32
    lengths: Lengths = Lengths(8, 16, 8)
    rate: float = 3e-3
    warmup: int = 50
    average: float = 0.02
    sequences: int = 96  # open loop: held-out clips,
    watched: int = 4  # frames of each that are seen
    horizon: int = 16  # and frames after them
    rollouts: int = 192  # from nothing, with the actions of held-out clips,
    drift: int = 24  # of so many frames,
    chunk: int = 4  # which are cut into chunks,
    components: int = 64  # of which so many principal components are compared, twice
    shown: int = 4  # sequences kept as pictures


# fmt: off
SIZES = {
    "smoke": Size(
        frames=300, held=3, latents=(2, 4), look=Trunk(8, 1, 1, 1, every=2, context=1), looks=2,
        gate=0.0, trunk=Trunk(8, 2, 1, 1, every=2, context=4), spatial=2, k_max=8,
        updates=3, batch=4, lengths=Lengths(4, 6, 2), warmup=1, sequences=3, watched=2, horizon=3,
        rollouts=4, drift=8, chunk=4, components=3, shown=2,
    ),
    "laptop": Size(),
    "large": Size(frames=200_000),  # of which a tenth is enough to learn from
}
# fmt: on


class Variant(NamedTuple):
    """A make of dynamics. labels, favour: share of episodes with actions, of rows from those."""

    about: str
    prediction: Literal["x", "v"] = "x"
    loss: Literal["x", "v"] = "x"
    weight: Literal["ramp", "flat"] = "ramp"
    bootstrap: float = 0.25
    settled: float = 0.0
    labels: float = 1.0
    favour: float = 0.0


FULL, SETTLED = "ramp", "settled"
VARIANTS = {
    "v": Variant("v, flat, no shortcut", "v", "v", "flat", 0.0),
    "shortcut": Variant("+ shortcut", "v", "v", "flat"),
    "x": Variant("+ x-prediction", "x", "v", "flat"),
    "x-loss": Variant("+ x-loss", "x", "x", "flat"),
    FULL: Variant("full (+ ramp)"),
    "no-shortcut": Variant("full, no shortcuts", bootstrap=0.0),
    SETTLED: Variant("half of the frames clear", settled=0.5),
    "no-actions": Variant("half clear, no actions", settled=0.5, labels=0.0),
    "some-actions": Variant("half clear, 10 % of actions", settled=0.5, labels=0.1, favour=1.0),
}


class Cell(NamedTuple):
    """One model, sampled in so many steps."""

    variant: str
    seed: int
    steps: int

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.variant}-s{self.seed}-k{self.steps}"


# ---- what all share ----------------------------------------------------------------------------
class World:
    """Recordings as latents of one tokenizer: what is learned from, and what is held out."""

    def __init__(self, root: Path, size: Size):
        self.root, self.size = root, size
        (root / "cells").mkdir(parents=True, exist_ok=True)
        agree(root / "size.json", size)
        clips = recorded(root / "data", size)
        self.tokenizer, self.psnr = tokenizer_of(root / "tokenizer", clips, size)
        columns = [
            {"image": x["obs.image"], "action": np.array(x["action"]), "first": x["first"]}
            for x in clips.columns
        ]
        for i, column in enumerate(columns):
            column["latents"] = self._latents(i, column["image"])
        self.train, self.held = Clips(clips.spec, clips.episodes, columns).split(size.held)
        long = self.train.sample(10 * size.rollouts, size.drift, stream(REAL))
        real = chunks(long["latents"], size.chunk)
        self.features = Features(real, size.components)
        self.real = self.features(real)

    def _latents(self, shard: int, images: np.ndarray) -> np.ndarray:
        """Of all frames of a shard, kept in a file."""
        path = self.root / f"latents-{shard}.npy"
        if not path.exists():
            temporary = path.with_name(f"tmp.{path.name}")
            np.save(temporary, self.encode(images[None])[0])
            temporary.replace(path)
        return np.load(path)

    @torch.no_grad()
    def encode(self, images: np.ndarray) -> np.ndarray:
        """uint8 images (B, T, H, W, C) -> latents (B, T, L, Z); frames stand alone."""
        return np.concatenate(
            [self.tokenizer.encode(torch.from_numpy(np.array(images[:, at : at + 256]))).numpy()
             for at in range(0, images.shape[1], 256)], 1
        )  # fmt: skip

    @torch.no_grad()
    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Latents (B, T, L, Z) -> uint8 images (B, T, H, W, C)."""
        painted = self.tokenizer.decode(torch.from_numpy(latents)).clamp(0, 1)
        return (painted * 255).round().to(torch.uint8).numpy()

    def frechet(self, images: np.ndarray) -> float:
        """Distance of the chunks of images (B, T, ...) from those of recordings."""
        return frechet(self.features(chunks(self.encode(images), self.size.chunk)), self.real)

    def clips(self, rows: int, length: int) -> dict[str, np.ndarray]:
        """Clips held out, the same for all that is measured."""
        return self.held.sample(rows, length, stream(MEASURED))

    def costs(self) -> dict[str, float]:
        """CPU seconds of training by model: mean over the seeds that are there."""
        found: dict[str, list[float]] = {}
        for path in sorted((self.root / "models").glob("*.json")):
            found.setdefault(path.stem.rpartition("-s")[0], []).append(read_json(path)["seconds"])
        return {name: float(np.mean(seconds)) for name, seconds in found.items()}

    def reference(self) -> dict[str, Any]:
        """What needs no model: the tokenizer's own errors, the last frame repeated, real chunks."""
        size = self.size
        clips = self.clips(size.sequences, size.watched + size.horizon)
        true, last = clips["image"][:, size.watched :], clips["image"][:, [size.watched - 1]]
        long = self.clips(size.rollouts, size.drift)
        return {
            "gate": self.psnr,
            "tokenizer": psnr(self.decode(clips["latents"])[:, size.watched :], true).tolist(),
            "repeat": psnr(np.broadcast_to(last, true.shape), true).tolist(),
            "real": self.frechet(long["image"]),
            "decoded": self.frechet(self.decode(long["latents"])),
            "still": self.frechet(np.broadcast_to(long["image"][:, :1], long["image"].shape)),
            "episodes": [len(self.train.episodes), len(self.held.episodes)],
            "frames": [self.train.frames, self.held.frames],
        }


def agree(path: Path, size: Size) -> None:
    """Note the size of a folder. Raises ConfigError where another one stands there."""
    wanted = {k: list(v) if isinstance(v, tuple) else v for k, v in size._asdict().items()}
    if not path.exists():
        write_json(path, wanted)
    elif read_json(path) != wanted:
        way_out = "name another folder"
        raise ConfigError("--root", str(path.parent), "holds cells of another size", way_out)


def recorded(path: Path, size: Size) -> Clips:
    """The recordings, made where they are not there."""
    if not (path / "index.json").exists():
        kwargs = {"size": size.room}
        env = EnvConfig(id=ID, num=8, image_size=32, workers="inprocess", kwargs=kwargs)
        record_policy(path, "expert", env, size.frames, size.noise)
    return Clips.open(path)


def tokenizer_of(path: Path, clips: Clips, size: Size) -> tuple[Tokenizer, float]:
    """The tokenizer, learned where it is not there, and its PSNR on frames held out."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        shape = clips.spec.obs["image"].shape
        image = (shape[0], shape[1], shape[2])
        model = Tokenizer(image, 8, *size.latents, size.look, size.look, hide=0.1)
    if not path.with_suffix(".json").exists():
        train, held = clips.split(size.held)
        rng, generator = np.random.default_rng([0, 1]), torch.Generator().manual_seed(0)

        def losses(update: int) -> dict[str, Tensor]:
            del update
            images = torch.from_numpy(train.packed(64, 1, rng)["obs.image"])
            return model.losses(images, None, generator)

        seconds = learn(model, losses, size.looks, 2e-3, 50, 1.0)
        images = held.packed(512, 1, rng)["obs.image"]
        with torch.no_grad():
            painted = model.decode(model.encode(torch.from_numpy(images))).clamp(0, 1)
        found = float(psnr((painted * 255).round().numpy(), images)[0])
        if found < size.gate:
            problem = f"dB on frames held out, the gate is {size.gate}"
            raise ConfigError("tokenizer", round(found, 2), problem, "give it more updates")
        save(path.with_suffix(".safetensors"), model)
        write_json(path.with_suffix(".json"), {"psnr": found, "seconds": seconds})
    load(path.with_suffix(".safetensors"), model)
    return model.requires_grad_(False), float(read_json(path.with_suffix(".json"))["psnr"])


# ---- a model -----------------------------------------------------------------------------------
def make(world: World, variant: Variant, seed: int) -> ShortcutDynamics:
    """Untrained dynamics; those of a seed begin alike."""
    size = world.size
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return ShortcutDynamics(
            world.train.spec.action.dim,
            size.latents,
            size.trunk,
            spatial=size.spatial,
            registers=0,
            agents=0,  # nobody acts
            k_max=size.k_max,
            bootstrap=variant.bootstrap,
            apart=size.apart,
            settled=variant.settled,
            prediction=variant.prediction,
            loss=variant.loss,
            weight=variant.weight,
        )


def trained(world: World, name: str, seed: int) -> ShortcutDynamics:
    """The dynamics of a variant and seed: found, or learned and kept."""
    variant, size = VARIANTS[name], world.size
    model, path = make(world, variant, seed), world.root / "models" / f"{name}-s{seed}"
    if not path.with_suffix(".json").exists():
        path.parent.mkdir(exist_ok=True)
        known = partly(world.train, variant.labels, np.random.default_rng([seed, 3]))
        data = known.favour(variant.favour)
        rng, generator = np.random.default_rng([seed, 2]), torch.Generator().manual_seed(seed)

        def losses(update: int) -> dict[str, Tensor]:
            rows = data.packed(size.batch, size.lengths.at(update), rng)
            return model.losses(clip_of(rows), generator)[0]

        seconds = learn(model, losses, size.updates, size.rate, size.warmup, size.average)
        save(path.with_suffix(".safetensors"), model)
        write_json(path.with_suffix(".json"), {"seconds": seconds, "commit": revision()})
    load(path.with_suffix(".safetensors"), model)
    if not variant.bootstrap:  # it has learned the finest steps alone: others are the same to it
        with torch.no_grad():
            model.step.weight.copy_(model.step.weight[-1:].expand_as(model.step.weight))
    return model.requires_grad_(False)


def learn(
    model: nn.Module, losses: Losses, updates: int, rate: float, warmup: int, average: float
) -> float:
    """LaProp; the model is left with the running average of its weights. Returns CPU seconds."""
    rule = rules.laprop(lr=rate, warmup=warmup)
    levels = [
        Level("all", match=REST, flow=Descend(rule)),
        Level("average", copy=".", flow=Pull("params", average)),
    ]
    timescales, begun = Timescales(model.named_parameters(), levels), time.process_time()
    for update in range(1, updates + 1):
        found = losses(update)
        weighted(found, dict.fromkeys(found, 1.0)).backward()
        timescales.tick("update")
    model.load_state_dict(timescales.weights("average"), strict=False)
    return time.process_time() - begun


def partly(clips: Clips, share: float, rng: np.random.Generator) -> Clips:
    """The recordings without images, and with the actions of so many of the episodes, drawn.

    Where they are not known they are NaN: a model that read them could not hide it.
    """
    known = rng.permutation(len(clips.episodes)) < round(share * len(clips.episodes))
    pairs = zip(clips.episodes, known, strict=True)
    episodes = [episode._replace(labelled=bool(keep)) for episode, keep in pairs]
    kept = [{k: v for k, v in x.items() if k != "image"} for x in clips.columns]
    columns = [x | {"action": x["action"].copy()} for x in kept]
    for episode in episodes:
        if not episode.labelled:
            rows = slice(episode.start, episode.start + episode.length)
            columns[episode.shard]["action"][rows] = np.nan
    return Clips(clips.spec, episodes, columns)


def clip_of(rows: dict[str, np.ndarray]) -> Clip:
    """Columns (B, T, ...) as the dynamics read them."""
    names = ("latents", "action", "first", "labelled")
    latents, action, first, labelled = (torch.from_numpy(rows[name]) for name in names)
    return Clip(latents, action, first, labelled, first.long() * 0)


# ---- measures ----------------------------------------------------------------------------------
def measured(world: World, cell: Cell) -> dict[str, Any]:
    """Numbers of a cell: found, or measured and kept, with pictures of the first sequences."""
    path = world.root / "cells" / f"{cell.name}.json"
    if not path.exists():
        size, model = world.size, trained(world, cell.variant, cell.seed)
        told = VARIANTS[cell.variant].labels > 0
        generator = torch.Generator().manual_seed(cell.seed)

        def roll(rows: dict[str, np.ndarray], watched: int) -> tuple[np.ndarray, float]:
            clip = clip_of(rows)
            clip.first[:, 0] |= not watched
            clip = clip._replace(labelled=torch.full_like(clip.labelled, told))
            return imagined(model, clip, watched, cell.steps, generator)

        rows = world.clips(size.sequences, size.watched + size.horizon)
        made, _ = roll(rows, size.watched)
        images, true = world.decode(made), rows["image"][:, size.watched :]
        found: dict[str, Any] = {**cell._asdict(), "psnr": psnr(images, true).tolist()}
        error = np.square(made - rows["latents"][:, size.watched :])
        found["mse"] = error.mean((0, 2, 3)).tolist()
        drifted = world.decode(roll(world.clips(size.rollouts, size.drift), 0)[0])
        found["frechet"] = world.frechet(drifted)
        _, seconds = roll(world.clips(1, size.watched + TIMED), size.watched)
        found["ms"] = 1000 * seconds
        found["commit"] = revision()
        truth, made, drifted = (x[: size.shown] for x in (rows["image"], images, drifted))
        np.savez_compressed(path.with_suffix(".npz"), truth=truth, made=made, drifted=drifted)
        write_json(path, found)
    return read_json(path)


def stream(number: int) -> np.random.Generator:
    """Random numbers of one purpose, the same in every run."""
    return np.random.default_rng(number)


def save(path: Path, model: nn.Module) -> None:
    """Weights, whole or not there."""
    from safetensors.torch import save_file

    temporary = path.with_name(f"tmp.{path.name}")
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, temporary)
    temporary.replace(path)


def load(path: Path, model: nn.Module) -> None:
    """What `save` wrote."""
    from safetensors.torch import load_file

    model.load_state_dict(load_file(path))
