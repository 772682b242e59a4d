"""What an offline run holds between updates, all of it in every checkpoint.

Weights, the levels of the stage, generators, the stage and its update, the prior, and the sums of
metrics not yet reported: a run that is killed goes on from its last checkpoint bit for bit. What a
round acts depends on the seed, the round and the agent alone, so it is acted again or found whole.
"""

import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from agents.actions import actions_of
from agents.offline import OfflineDreamer
from experiments.build import device_of, make_level, make_memory
from experiments.config import Config, ConfigError
from experiments.config.dreamer4 import (
    PHASES,
    Dreamer4Config,
    PhaseConfig,
    Stage,
    TrunkConfig,
    levels_of_phase,
    load_dreamer4,
)
from experiments.config.models import MemoryConfig
from experiments.counterfactual import counterfactual
from experiments.data.clips import Clips, Spec, record_episodes
from experiments.data.lessons import SPEC, Lessons, check_lessons
from experiments.envs import make_envs
from experiments.envs.known import check_env
from experiments.envs.rows import Envs
from experiments.policies import Policy, noisy, of_offline, play, uniform
from experiments.process import settle
from experiments.record import CheckpointError, Checkpoints, Run, RunError
from experiments.record.run import ENDS, State
from experiments.start import Origin, wrong
from timescales import Timescales
from worldmodel import ShortcutDynamics, Tokenizer, Trunk
from worldmodel.scale import RunningRMS, weighted
from worldmodel.transformer import MakeMemory

EVALUATE, ACT, MEASURE, DRAW = 1, 3, 4, 5  # whose random numbers: a stream for each
Show = Callable[[int, Mapping[str, float]], None]  # hears of every line that is reported


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
    """Sizes and parts as worldmodel/ knows them."""
    sizes = config.model_dump(exclude={"memory", "feed"})
    return Trunk(**sizes, memory=maker(config.memory), feed=maker(config.feed))


def maker(memory: MemoryConfig) -> MakeMemory | None:
    """What makes such a memory, from widths in and out; None for none."""
    return None if memory.kind == "none" else partial(make_memory, memory)


class Work:
    """An offline run in progress. `with work:` marks it as running, then as how it ended."""

    def __init__(self, config: Dreamer4Config, open_run: Callable[[], Run]):
        self.config = config
        check_env(Config(env=config.env))
        self.device = device_of(Config(device=config.device))
        settle(config.threads)
        recorded = Clips.open(config.data.path)
        check_lessons(config, recorded)
        self.spec = recorded.spec
        self.agent = build_offline(config, self.spec)
        self.generator = torch.Generator(self.device).manual_seed(config.seed)
        self.rng = np.random.default_rng([config.seed, 2])
        self.phase, self.update, self.total = config.passed, 0, 0
        self.new: tuple[str, ...] = ()  # parameters that joined the world model begun with
        self.timescales: Timescales | None = None
        self.held_levels: dict[str, Any] | None = None  # their state, until the stage goes on
        self.prior: dict[str, Tensor] = {}
        self.sums: dict[str, Tensor] = {}
        self.gathered = 0
        self._clock, self._clocked = time.perf_counter(), 0
        self.show: Show = lambda update, metrics: None
        self.run = open_run()
        self.lessons = Lessons(config, self.run.path, self.rng, self.device)
        self.checkpoints = Checkpoints(self.run.checkpoints, config.checkpoint.keep)

    @classmethod
    def start(cls, config: Dreamer4Config) -> Self:
        """A new run, with the return of random actions as its first line.

        Raises ConfigError, before there is a folder, where it cannot begin with `config.start`.
        """
        origin = Origin.of(config)

        def create() -> Run:
            run = Run.create(config, Path(config.tracking.root))
            if origin is not None:
                origin.lend(config, run.path)
            return run

        work = cls(config, create)
        work.run.start()
        try:
            work.run.write(SPEC, work.spec.tree())
            if origin is not None:
                work.new = origin.teach(work.agent)
            work.evaluate("random")
            work.save()
        except BaseException:
            work.run.finish("failed")
            raise
        return work

    @classmethod
    def resume(cls, config: Dreamer4Config, path: Path) -> Self:
        """A run as its last whole checkpoint left it; from here on it is of this configuration."""
        if config.start != load_dreamer4(path).start:
            raise wrong(config, f"{path} has begun otherwise", "leave it out, or start a new run")
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
        write_text(path / "config.yaml", config.dump())
        work.run.write(SPEC, work.spec.tree())
        return work

    # ---- stages --------------------------------------------------------------------------------
    @property
    def stage(self) -> Stage:
        """What is being run."""
        return self.config.stages[self.phase]

    @property
    def settings(self) -> PhaseConfig:
        """How it is configured."""
        return self.config.settings(self.stage)

    def stages(self) -> Iterator[Stage]:
        """Every stage that is still to be run; asking for the next one is passing its gate."""
        while self.phase < len(self.config.stages):
            frozen = None if self.stage.name == PHASES[0] else self.agent.tokenizer
            self.lessons.begin(self.stage.round, frozen)
            yield self.stage
            self.phase, self.update, self.timescales = self.phase + 1, 0, None
            self.save()

    def updates(
        self, phase: PhaseConfig, match: str, policy: str = "", every: int = 0
    ) -> Iterator[None]:
        """Once for each update that the stage still owes to the parameters that match.

        After each so-many-th the policy is evaluated under this name; never after the last one.
        """
        named = [(n, p) for n, p in self.agent.named_parameters() if re.search(match, n)]
        names = [name for name, _ in named]
        levels = levels_of_phase(phase.timescales)
        made = [make_level(name, level, names) for name, level in levels.items()]
        field = f"phases.{self.stage.name}.timescales"
        try:
            self.timescales = Timescales(named, made, generator=self._levels_generator())
        except ValueError as error:
            problem = str(error).replace("\n", "; ")
            raise ConfigError(field, list(levels), problem, "see `nested schedule`") from error
        if self.held_levels is not None:
            self.timescales.load_state_dict(self.held_levels)
            self.held_levels = None
        while self.update < phase.updates:
            yield
            self.update, self.total = self.update + 1, self.total + 1
            if self.update % self.config.log_every == 0 or self.update == phase.updates:
                self.log()
            if every and self.update % every == 0 and self.update < phase.updates:
                self.evaluate(policy)
            saved = self.config.checkpoint.every
            if saved and self.update % saved == 0:
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
        name = self.stage.name
        found = {f"loss/{name}_{key}": loss.detach().mean() for key, loss in losses.items()}
        found |= {f"imagine/{key}": value for key, value in (metrics or {}).items()}
        self.sums = {key: self.sums.get(key, 0.0) + value for key, value in found.items()}
        self.gathered += 1

    def gate(self, measure: str, found: float, passed: Callable[[float], bool]) -> None:
        """Report a measure; raises RunError where the phase's gate is not passed."""
        name, phase = self.stage.name, self.settings
        self._report({f"gate/{name}_{measure}": found})
        self.save()
        if phase.gate is not None and not passed(phase.gate):
            more = f"phases.{name}.updates={2 * max(1, phase.updates)}"
            raise RunError(
                f"phase {name} ends with {measure}={found:.3g}, its gate is {phase.gate:g}; "
                f"go on with: nested train --resume {self.run.path} {more}"
            )

    # ---- in the environment --------------------------------------------------------------------
    def evaluate(self, name: str) -> float:
        """Report the mean return in the environment, actions sampled; "random" is uniform."""
        envs, seed = self._envs(EVALUATE)
        try:
            random = np.random.default_rng(seed)
            policy = uniform(envs, random) if name == "random" else self._policy(envs, seed)
            found = float(np.mean(play(envs, policy, self.config.episodes)))
        finally:
            envs.close()
        score = {f"eval/{name}/score": found / envs.cap} if envs.cap else {}
        self._report({f"eval/{name}/return": found} | score)
        return found

    def act(self) -> None:
        """Episodes of the policy as it is, written beside the recordings; a whole round is kept."""
        online, folder = self.config.online, self.lessons.folder(self.stage.round)
        if not online.episodes:
            return
        if not (folder / "index.json").exists():
            envs, seed = self._envs(ACT, self.stage.round)
            try:
                rng = np.random.default_rng([seed, 1])
                policy = noisy(self._policy(envs, seed), envs, online.noise, rng)
                record_episodes(envs, policy, online.episodes, folder)
            finally:
                envs.close()
        clips = Clips.open(folder)
        returns = [float(clips.read(e, 0, e.length)["reward"].sum()) for e in clips.episodes]
        found = {"frames": clips.frames, "episodes": len(returns), "return": np.mean(returns)}
        self._report({f"round/acted_{key}": float(value) for key, value in found.items()})

    def measure(self) -> None:
        """Report what imagination promised beside what reality gave, at the end of a round."""
        seed = self._seed(MEASURE)
        generator = torch.Generator(self.device).manual_seed(seed)
        found = counterfactual(self.config, self.agent, seed, generator)
        named = {f"round/{key}": value for key, value in found.items()}
        self._report({"round/number": float(self.stage.round)} | named)

    def _envs(self, *stream: int) -> tuple[Envs, int]:
        """Environments of their own, and their seed."""
        seed = self._seed(*stream)
        envs = make_envs(self.config.env, seed=seed)
        name = self.config.data.image
        if envs.obs_spec.get(name) != self.spec.obs[name] or envs.action_spec != self.spec.action:
            envs.close()
            way_out = f"set env so that it has {name}: {self.spec.obs[name]} and {self.spec.action}"
            raise ConfigError("env.id", self.config.env.id, "does not fit the data", way_out)
        return envs, seed

    def _policy(self, envs: Envs, seed: int) -> Policy:
        generator = torch.Generator(self.device).manual_seed(seed)
        return of_offline(self.agent, envs.num, self.config.data.image, generator)

    def _seed(self, *stream: int) -> int:
        return int(np.random.SeedSequence([self.config.seed, *stream]).generate_state(1)[0])

    def _levels_generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.config.seed + self.phase)

    # ---- record --------------------------------------------------------------------------------
    def log(self) -> None:
        """Report means since the last line; raises FloatingPointError on a loss that is not."""
        metrics: dict[str, float] = {"train/phase": self.phase, "train/update": self.update}
        metrics |= {key: float(value) / self.gathered for key, value in self.sums.items()}
        now = time.perf_counter()
        metrics |= self._sizes()
        speed = (self.total - self._clocked) / max(now - self._clock, 1e-9)
        self._clock, self._clocked = now, self.total
        self._report(metrics | {"time/updates_per_s": speed})
        self.sums, self.gathered = {}, 0
        bad = [k for k, v in metrics.items() if k.startswith("loss/") and not np.isfinite(v)]
        if bad:
            raise FloatingPointError(f"{', '.join(bad)} is not finite at update {self.total}")

    def _report(self, metrics: Mapping[str, float]) -> None:
        self.run.log(self.total, metrics)
        self.show(self.total, metrics)

    def _sizes(self) -> dict[str, float]:
        """What losses are divided by: scaled ones stay about one, these tell how large they are.

        Those of imagination are not scaled.
        """
        if self.stage.name == "imagine":
            return {}
        norms = {**self.agent.tokenizer.norms, "dynamics": self.agent.dynamics.norm}
        norms |= self.agent.norms
        name, found = self.stage.name, {}
        for key, norm in norms.items():
            if isinstance(norm, RunningRMS) and f"loss/{name}_{key}" in self.sums:
                found[f"rms/{name}_{key}"] = float(norm.square.sqrt())
        return found

    def draw(self) -> None:
        """The report, with an open-loop prediction once there are dynamics to imagine with."""
        from experiments.predict_offline import FILE, predict_offline, save
        from experiments.record.report import report  # pictures need matplotlib

        image = self.config.data.image
        if self.phase > PHASES.index("dynamics"):
            generator = torch.Generator(self.device).manual_seed(self._seed(DRAW))
            found = predict_offline(self.agent, self.lessons.held, image, generator)
            save(found, image, self.run.path / FILE)
        report(self.run.path)

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
        try:
            if self.config.tracking.pictures:
                self.draw()
        finally:
            if self._uploader is not None:
                self._uploader.finish()


def write_text(path: Path, text: str) -> None:
    """A file as it was or as it shall be, never half of it."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)
