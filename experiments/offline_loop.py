"""What an offline run holds between updates, all of it in every checkpoint.

Weights, the levels of the phase, generators, the phase and its update, the prior, and the sums of
metrics not yet reported: a run that is killed goes on from its last checkpoint bit for bit. A
frozen tokenizer's latents are files of the run, written once.
"""

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from agents.actions import actions_of
from agents.offline import Experience, OfflineDreamer
from experiments.build import device_of, make_level
from experiments.config import Config, ConfigError
from experiments.config.dreamer4 import (
    PHASES,
    Dreamer4Config,
    TrunkConfig,
    levels_of_phase,
    load_dreamer4,
)
from experiments.data.clips import Arrays, Clips, Spec
from experiments.envs import make_envs
from experiments.policies import of_offline, play, uniform
from experiments.record import CheckpointError, Checkpoints, Run, RunError
from experiments.record.run import ENDS, State
from timescales import Timescales
from worldmodel import ShortcutDynamics, Tokenizer, Trunk
from worldmodel.scale import weighted
from worldmodel.shortcut import Clip

BLOCK = 64  # frames that are encoded at once
Parts = Sequence[tuple[Clips, int]]  # rows from each


def build_offline(config: Dreamer4Config, spec: Spec) -> OfflineDreamer:
    """The agent for a data set, initialised from config.seed and from nothing else."""
    if config.data.image not in spec.obs or spec.obs[config.data.image].kind != "image":
        images = ", ".join(k for k, entry in spec.obs.items() if entry.kind == "image")
        problem = "is no image of the data set"
        raise ConfigError("data.image", config.data.image, problem, f"its images: {images}")
    height, width, channels = spec.obs[config.data.image].shape
    tokens, options = config.tokenizer, config.dynamics.model_dump(exclude={"trunk"})
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        trunk = trunk_of(tokens.trunk)
        tokenizer = Tokenizer(
            (height, width, channels), tokens.patch, tokens.latents, tokens.channels, trunk, trunk,
            tokens.hide,
        )  # fmt: skip
        actions = actions_of(spec.action, config.agent.bins)
        shape = (tokens.latents, tokens.channels)
        trunk = trunk_of(config.dynamics.trunk)
        dynamics = ShortcutDynamics(actions.dim, shape, trunk, **options)
        agent = config.agent.model_dump(exclude={"bins"})
        made = OfflineDreamer(tokenizer, dynamics, actions, **agent)
    return made.to(device_of(Config(device=config.device)))


def trunk_of(config: TrunkConfig) -> Trunk:
    """Sizes as worldmodel/ knows them."""
    return Trunk(**config.model_dump())


class Work:
    """An offline run in progress. `with work:` marks it as running, then as how it ended."""

    def __init__(self, config: Dreamer4Config, open_run: Callable[[], Run]):
        self.config = config
        self.device = device_of(Config(device=config.device))
        if config.threads:
            torch.set_num_threads(config.threads)
        clips = Clips.open(config.data.path)
        self.agent = build_offline(config, clips.spec)
        self.clips = clips
        self._share(clips)
        self.generator = torch.Generator(self.device).manual_seed(config.seed)
        self.rng = np.random.default_rng([config.seed, 2])
        self.phase, self.update, self.total = 0, 0, 0
        self.timescales: Timescales | None = None
        self.held_levels: dict[str, Any] | None = None  # their state, until the phase goes on
        self.prior: dict[str, Tensor] = {}
        self.sums: dict[str, Tensor] = {}
        self.gathered = 0
        self._clock, self._clocked = time.perf_counter(), 0
        self.run = open_run()
        self.checkpoints = Checkpoints(self.run.checkpoints, config.checkpoint.keep)

    @classmethod
    def start(cls, config: Dreamer4Config) -> Self:
        """A new run, with the return of random actions as its first line."""
        work = cls(config, lambda: Run.create(config, Path(config.tracking.root)))
        work.run.start()
        try:
            work.evaluate("random")
            work.save()
        except BaseException:
            work.run.finish("failed")
            raise
        return work

    @classmethod
    def resume(cls, config: Dreamer4Config, path: Path) -> Self:
        """A run as its last whole checkpoint left it."""
        work = cls(config, lambda: Run.open(path))
        before = work.run.state
        work.run.start()
        try:
            loaded = work.checkpoints.load()
            if loaded is None:
                raise RunError(f"{path} holds no checkpoint; start a new run")
            work.load_state_dict(loaded.state)
        except (CheckpointError, RunError, KeyError, RuntimeError, ValueError) as error:
            work.run.finish(before if before in ENDS else "stopped")
            raise RunError(f"{path} cannot go on: {error}".replace("\n", " ")) from error
        return work

    # ---- phases --------------------------------------------------------------------------------
    def enter(self, name: str) -> bool:
        """Whether this phase is to be run; from the second on, frames are latents."""
        if PHASES.index(name) < self.phase:
            return False
        if name != PHASES[0]:
            self._share(self.latents())
        return True

    def leave(self) -> None:
        """The phase passed its gate."""
        self.phase, self.update, self.timescales = self.phase + 1, 0, None
        self.save()

    def updates(self, phase: Any, match: str) -> Iterator[Any]:
        """The phase, once for each update that it still owes to the parameters that match."""
        named = [(n, p) for n, p in self.agent.named_parameters() if re.search(match, n)]
        names = [name for name, _ in named]
        levels = levels_of_phase(phase.timescales)
        made = [make_level(name, level, names) for name, level in levels.items()]
        field = f"phases.{PHASES[self.phase]}.timescales"
        try:
            self.timescales = Timescales(named, made, generator=self._levels_generator())
        except ValueError as error:
            problem = str(error).replace("\n", "; ")
            raise ConfigError(field, list(levels), problem, "see `nested schedule`") from error
        if self.held_levels is not None:
            self.timescales.load_state_dict(self.held_levels)
            self.held_levels = None
        while self.update < phase.updates:
            yield phase
            self.update, self.total = self.update + 1, self.total + 1
            if self.update % self.config.log_every == 0 or self.update == phase.updates:
                self.log()
            every = self.config.checkpoint.every
            if every and self.update % every == 0:
                self.save()

    def learn(
        self,
        losses: Mapping[str, Tensor],
        scales: Mapping[str, float],
        metrics: Mapping[str, Tensor] | None = None,
    ) -> None:
        """One backward pass and a tick; the sums of what is reported stay on the device."""
        assert self.timescales is not None, "learn within the loop over `updates`"
        weighted(losses, scales).backward()
        self.timescales.tick("update")
        name = PHASES[self.phase]
        found = {f"loss/{name}_{key}": loss.detach().mean() for key, loss in losses.items()}
        found |= {f"imagine/{key}": value for key, value in (metrics or {}).items()}
        self.sums = {key: self.sums.get(key, 0.0) + value for key, value in found.items()}
        self.gathered += 1

    def gate(self, measure: str, found: float, passed: Callable[[float], bool]) -> None:
        """Report a measure; raises RunError where the phase's gate is not passed."""
        name = PHASES[self.phase]
        phase = getattr(self.config.phases, name)
        self.run.log(self.total, {f"gate/{name}_{measure}": found})
        self.save()
        if phase.gate is not None and not passed(phase.gate):
            more = f"phases.{name}.updates={2 * max(1, phase.updates)}"
            raise RunError(
                f"phase {name} ends with {measure}={found:.3g}, its gate is {phase.gate:g}; "
                f"go on with: nested train --resume {self.run.path} {more}"
            )

    def evaluate(self, name: str) -> float:
        """Report the mean return in the environment, actions sampled; "random" is uniform."""
        config = self.config
        seed = int(np.random.SeedSequence([config.seed, 1]).generate_state(1)[0])
        envs = make_envs(config.env, seed=seed)
        try:
            self._fits(envs.obs_spec, envs.action_spec)
            if name == "random":
                policy = uniform(envs, np.random.default_rng(seed))
            else:
                generator = torch.Generator(self.device).manual_seed(seed)
                policy = of_offline(self.agent, envs.num, config.data.image, generator)
            found = float(np.mean(play(envs, policy, config.episodes)))
        finally:
            envs.close()
        self.run.log(self.total, {f"eval/{name}/return": found})
        return found

    # ---- batches -------------------------------------------------------------------------------
    def images(self, clips: Clips, batch: int, length: int) -> tuple[Tensor, Tensor]:
        """uint8 images (B, T, H, W, C) and where episodes start (B, T)."""
        arrays = clips.packed(batch, length, self.rng)
        return self._tensor(arrays[f"obs.{self.config.data.image}"]), self._tensor(arrays["first"])

    def experience(self, parts: Parts, length: int) -> Experience:
        """Rows of each part; the first part is for imitation, the last for the dynamics' loss."""
        found = [clips.packed(count, length, self.rng) for clips, count in parts]
        columns: Arrays = {k: np.concatenate([x[k] for x in found]) for k in found[0]}
        keys = ("latents", "action", "reward", "first", "terminal")
        latents, action, reward, first, terminal = (self._tensor(columns[key]) for key in keys)
        row = torch.arange(len(first), device=self.device)
        imitate, predict = row < parts[0][1], row >= len(first) - parts[-1][1]
        known, task = torch.ones_like(first), torch.zeros_like(first, dtype=torch.int64)
        clip = Clip(latents.float(), action.float(), first, known, task)
        return Experience(clip, reward.float(), terminal, imitate, predict)

    def latents(self) -> Clips:
        """The data with a column of latents, encoded once and kept in the run's folder."""
        model, context = self.agent.tokenizer, self.agent.tokenizer.encoder.initial(1)
        image = f"obs.{self.config.data.image}"

        @torch.no_grad()
        def encode(columns: Arrays, begins: bool) -> np.ndarray:
            nonlocal context
            context = model.encoder.initial(1) if begins else context
            images, first = (self._tensor(columns[k])[None] for k in (image, "first"))
            z, context = model.encode_next(images, context, first)
            return z[0].half().cpu().numpy()

        return self.clips.translate(self.run.path / "latents", "latents", BLOCK, encode)

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.array(array)).to(self.device)

    def _share(self, clips: Clips) -> None:
        """What is learned from, what is held out, and what is worth imitating."""
        self.data, self.held = clips.split(self.config.data.held)
        self.best = self.data.best(self.config.data.best)

    def _fits(self, obs: Mapping[str, Any], action: Any) -> None:
        name, spec = self.config.data.image, self.clips.spec
        if obs.get(name) != spec.obs[name] or action != spec.action:
            way_out = f"set env so that it has {name}: {spec.obs[name]} and {spec.action}"
            raise ConfigError("env.id", self.config.env.id, "does not fit the data", way_out)

    def _levels_generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.config.seed + self.phase)

    # ---- record --------------------------------------------------------------------------------
    def log(self) -> None:
        """Report means since the last line; raises FloatingPointError on a loss that is not."""
        metrics: dict[str, float] = {"train/phase": self.phase, "train/update": self.update}
        metrics |= {key: float(value) / self.gathered for key, value in self.sums.items()}
        now = time.perf_counter()
        speed = (self.total - self._clocked) / max(now - self._clock, 1e-9)
        self._clock, self._clocked = now, self.total
        self.run.log(self.total, metrics | {"time/updates_per_s": speed})
        self.sums, self.gathered = {}, 0
        bad = [k for k, v in metrics.items() if k.startswith("loss/") and not np.isfinite(v)]
        if bad:
            raise FloatingPointError(f"{', '.join(bad)} is not finite at update {self.total}")

    def save(self) -> None:
        """Write a checkpoint."""
        self.checkpoints.save(self.total, self.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides how the run goes on."""
        return {
            "agent": self.agent.state_dict(),
            "timescales": self.timescales.state_dict() if self.timescales else self.held_levels,
            "prior": dict(self.prior),
            "generator": self.generator.get_state(),
            "rng": self.rng.bit_generator.state,
            "counts": [self.phase, self.update, self.total, self.gathered],
            "sums": dict(self.sums),
            "lines": self.run.metrics.lines,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken; later lines of the metrics are dropped."""
        self.agent.load_state_dict(state["agent"])
        self.held_levels = state["timescales"]
        self.prior = {k: v.to(self.device) for k, v in state["prior"].items()}
        self.generator.set_state(state["generator"])
        self.rng.bit_generator.state = state["rng"]
        self.phase, self.update, self.total, self.gathered = state["counts"]
        self.sums = {k: v.to(self.device) for k, v in state["sums"].items()}
        self.run.metrics.truncate(state["lines"])
        self._clocked = self.total

    def __enter__(self) -> Self:
        from experiments.record.tracking import start_uploader

        self._uploader = start_uploader(self.run) if self.config.tracking.mlflow else None
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        ends: dict[type[BaseException] | None, State]
        ends = {None: "finished", KeyboardInterrupt: "stopped", RunError: "stopped"}
        self.run.finish(ends.get(kind, "failed"))
        if self._uploader is not None:
            self._uploader.finish()


def load_offline(path: Path) -> tuple[Dreamer4Config, OfflineDreamer, torch.device]:
    """The configuration and the agent of a run, as its last checkpoint left it."""
    config = load_dreamer4(path)
    loaded = Checkpoints(Run.open(path).checkpoints).load()
    if loaded is None:
        raise RunError(f"{path} holds no checkpoint yet; train it first")
    agent = build_offline(config, Clips.open(config.data.path).spec)
    agent.load_state_dict(loaded.state["agent"])
    return config, agent, next(agent.parameters()).device
