"""What the training loop holds between steps, and how it is counted, reported and saved.

Everything that decides how a run goes on is in `state_dict`: weights, levels, clocks, the replay
with its cursor, environments, carries, generators, and the sums of metrics not yet reported.
"""

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from agents import Dreamer
from agents.dreamer import Outcome
from experiments.build import build_agent, build_timescales, device_of
from experiments.config import Config
from experiments.data.replay import Replay
from experiments.driver import Driver, Step
from experiments.envs import make_envs
from experiments.evaluate import evaluations
from experiments.plasticity import look
from experiments.process import settle
from experiments.record import CheckpointError, Checkpoints, Loaded, Run, RunError
from experiments.record.run import ENDS, State
from experiments.visits import make_sessions
from timescales import Ratio

LIVED = {"return": 0.0, "length": 0.0, "episodes": 0, "reward": 0.0, "frames": 0}
SEEDS = ("envs", "act", "learn", "replay", "prefill", "levels")  # one stream each


class Loop:
    """A run in progress. `with loop:` marks the run as running, then as how it ended.

    `open_run` is called last, so a configuration that cannot be built leaves no folder behind.
    """

    def __init__(self, config: Config, open_run: Callable[[], Run]):
        self.config = config
        self.device = device_of(config)
        settle(threads(config))
        seeds = np.random.SeedSequence(config.seed).generate_state(len(SEEDS))
        seed = {name: int(value) for name, value in zip(SEEDS, seeds, strict=True)}
        self.envs = make_envs(config.env, seed=seed["envs"])
        images = any(entry.kind == "image" for entry in self.envs.obs_spec.values())
        self.low_precision = precision(config, self.device, images) == "bfloat16"
        self.agent: Dreamer = build_agent(config, self.envs.obs_spec, self.envs.action_spec)
        self.timescales = build_timescales(config, self.agent, seed["levels"])
        self.driver = Driver(self.agent, self.envs, generator(self.device, seed["act"]))
        self.sessions = make_sessions(config, self.agent, self.timescales, self.envs.num)
        self.generator = generator(self.device, seed["learn"])
        self.random = np.random.default_rng(seed["prefill"])
        replay = config.replay
        rollout = replay.rollout if replay.kind == "matching" else replay.length
        self.replay = Replay(replay.kind, replay.capacity, replay.length, seed["replay"], rollout)
        self.ratio = Ratio(config.train.ratio, replay.batch * replay.length)
        self.frame, self.before, self.updates, self.phase = 0, 0, 0, -1
        self.lived = dict(LIVED)
        self.sums: dict[str, Tensor] = {}
        self.gathered = 0
        self._clock, self._clocked = time.perf_counter(), (0, 0)
        self.run = open_run()
        self.checkpoints = Checkpoints(self.run.checkpoints, config.checkpoint.keep)

    @classmethod
    def start(cls, config: Config) -> Self:
        """A new run: its folder, level table, first evaluation and first checkpoint."""
        loop = cls(config, lambda: Run.create(config, Path(config.tracking.root)))
        loop.run.start()
        loop.sessions.open(loop.run.path / "users")
        loop._begin()
        return loop

    @classmethod
    def resume(cls, config: Config, path: Path) -> Self:
        """An existing run, as its last whole checkpoint left it; from the start before any.

        Raises RunError for a checkpoint that does not fit the configuration.
        """
        loop = cls(config, lambda: Run.open(path))
        before = loop.run.state
        loop.run.start()
        try:
            loop.sessions.open(loop.run.path / "users")
            loaded = loop.checkpoints.load()
            if loaded is not None:
                loop._restore(loaded)
        except (CheckpointError, RunError):
            loop.sessions.close()
            loop.run.finish(before if before in ENDS else "stopped")
            raise
        if loaded is None:
            loop._begin()
        return loop

    def _restore(self, loaded: Loaded) -> None:
        try:
            self.load_state_dict(loaded.state)
            self.replay.restore(loaded.segments.get("replay", []))
        except (KeyError, RuntimeError, ValueError) as error:
            reason = str(error).partition("\n")[0].replace("; ", ", ")
            raise RunError(
                f"its checkpoint does not fit the configuration: {reason}; "
                "resume without changes of env, model, replay or levels"
            ) from error

    def _begin(self) -> None:
        """The level table, first evaluation and first checkpoint; what was there goes."""
        self.run.metrics.truncate(0)
        levels = {"levels": self.timescales.table(), "timeline": self.timescales.timeline(256)}
        self.run.write("levels.json", levels)
        self.evaluate()
        self.save()

    @property
    def done(self) -> bool:
        """Whether the run has had all its frames."""
        return self.frame >= self.config.frames

    @property
    def prefilling(self) -> bool:
        """Whether actions are still random."""
        return self.frame < self.config.train.prefill

    def due(self, every: int) -> bool:
        """Whether the last step passed a multiple of `every` frames; never for 0."""
        return every > 0 and self.frame // every > self.before // every

    def enter_phase(self) -> None:
        """Move the environment into the hidden context of this frame, if it is a new one."""
        contexts = self.config.env.contexts
        phase = self.config.phase_at(self.frame)
        if phase != self.phase:
            self.driver.reset(contexts[phase] if contexts else None)
            self.sessions.follow(self.driver)
            if self.phase >= 0:
                self.timescales.tick("task")
            self.phase = phase

    def count(self, step: Step) -> None:
        """Count the frames and episodes of a step, and move the levels on those clocks."""
        self.before, self.frame = self.frame, self.frame + self.envs.num
        self.timescales.tick("frame", self.envs.num)
        self.lived["reward"] += float(step.row.reward.sum())
        self.lived["frames"] += self.envs.num
        episodes = len(step.returns)
        if episodes:
            self.timescales.tick("episode", episodes)
            self.lived["return"] += sum(step.returns)
            self.lived["length"] += sum(step.lengths)
            self.lived["episodes"] += episodes
        self.sessions.follow(self.driver, episodes)

    def updates_due(self) -> int:
        """Updates owed for the last step; none while the replay is filling."""
        if self.prefilling or not self.replay.ready(self.config.replay.batch):
            return 0
        return self.ratio.owed(self.envs.num)

    def gather(self, outcome: Outcome) -> None:
        """Add up what is reported, on the device: no waiting here."""
        self.updates += 1
        self.gathered += 1
        found = {f"loss/{key}": value.detach().mean() for key, value in outcome.losses.items()}
        found |= {f"agent/{key}": value for key, value in outcome.metrics.items()}
        names = list(found)
        values = torch.stack([found[name] for name in names]).double()
        self.sums = {",".join(names): values + self.sums.get(",".join(names), 0.0)}

    def log(self) -> dict[str, float]:
        """Report means since the last report; raises FloatingPointError on a loss that is not."""
        metrics: dict[str, float] = {"train/phase": self.phase, "train/updates": self.updates}
        for names, values in self.sums.items():
            means = (values / self.gathered).tolist()
            metrics |= dict(zip(names.split(","), means, strict=True))
        lived = self.lived
        metrics["train/reward"] = lived["reward"] / max(1, lived["frames"])  # mean of a frame
        if lived["episodes"]:
            for key in ("return", "length"):
                metrics[f"train/{key}"] = lived[key] / lived["episodes"]
            metrics["train/episodes"] = lived["episodes"]
        metrics |= self.sessions.metrics() | self.timescales.metrics() | self._speed()
        self.run.log(self.frame, metrics)
        self.lived = dict(LIVED)
        self.sums, self.gathered = {}, 0
        bad = [k for k, v in metrics.items() if k.startswith("loss/") and not np.isfinite(v)]
        if bad:
            raise FloatingPointError(f"{', '.join(bad)} is not finite at frame {self.frame}")
        return metrics

    def _speed(self) -> dict[str, float]:
        now, (frames, updates) = time.perf_counter(), self._clocked
        spent = max(now - self._clock, 1e-9)
        self._clock, self._clocked = now, (self.frame, self.updates)
        rates = {"fps": (self.frame - frames) / spent, "updates": (self.updates - updates) / spent}
        return {"time/fps": rates["fps"], "time/updates_per_s": rates["updates"]}

    def evaluate(self) -> dict[str, float]:
        """Report the returns in every context."""
        return self.evaluated(evaluations([self.config], [self.agent], self.frame)[0])

    def evaluated(self, returns: Mapping[str, float]) -> dict[str, float]:
        """Report what an evaluation gave, with signs of lost plasticity where asked for."""
        metrics = {**returns, **look(self.config, self.agent, self.replay, self.frame)}
        self.run.log(self.frame, metrics)
        return metrics

    def save(self) -> None:
        """Write a checkpoint: the state, and what the replay took in since the last one."""
        journal, compact = self.replay.journal()
        append = {} if journal is None else {"replay": journal}
        self.checkpoints.save(self.frame, self.state_dict(), append, ("replay",) if compact else ())

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides how the run goes on, but for the replay's journal."""
        return {
            "agent": self.agent.state_dict(),
            "timescales": self.timescales.state_dict(),
            "driver": self.driver.state_dict() if self.phase >= 0 else None,
            "sessions": self.sessions.state_dict(),
            "replay": self.replay.state_dict(),
            "ratio": self.ratio.state_dict(),
            "generator": self.generator.get_state(),
            "random": self.random.bit_generator.state,
            "counts": [self.frame, self.before, self.updates, self.phase, self.gathered],
            "ended": dict(self.lived),
            "sums": dict(self.sums),
            "lines": self.run.metrics.lines,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken; later lines of the metrics are dropped."""
        self.agent.load_state_dict(state["agent"])
        self.timescales.load_state_dict(state["timescales"])
        if state["driver"] is not None:
            self.driver.load_state_dict(state["driver"])
        self.sessions.load_state_dict(state.get("sessions", {}))
        self.replay.load_state_dict(state["replay"])
        self.ratio.load_state_dict(state["ratio"])
        self.generator.set_state(state["generator"])
        self.random.bit_generator.state = state["random"]
        self.frame, self.before, self.updates, self.phase, self.gathered = state["counts"]
        self.lived = LIVED | state["ended"]
        self.sums = {names: values.to(self.device) for names, values in state["sums"].items()}
        self.run.metrics.truncate(state["lines"])
        self._clocked = (self.frame, self.updates)

    def __enter__(self) -> Self:
        from experiments.record.tracking import start_uploader

        self._uploader = start_uploader(self.run) if self.config.tracking.mlflow else None
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        ends: dict[type[BaseException] | None, State]
        ends = {None: "finished", KeyboardInterrupt: "stopped"}
        self.envs.close()
        self.sessions.close()
        self.run.finish(ends.get(kind, "failed"))
        try:
            if self.config.tracking.pictures:
                self.draw(finished=kind is None)
        finally:
            if self._uploader is not None:
                self._uploader.finish()

    def draw(self, finished: bool) -> None:
        """The report; of a finished run also an open-loop prediction."""
        from experiments.predict import save_prediction  # pictures need matplotlib
        from experiments.record.report import report

        if finished:
            save_prediction(self.config, self.agent, self.run.path / "prediction.png")
        report(self.run.path)


def generator(device: torch.device, seed: int) -> torch.Generator:
    """A seeded generator on the device."""
    return torch.Generator(device).manual_seed(seed)


def precision(config: Config, device: torch.device, images: bool) -> str:
    """float32 or bfloat16; `auto` takes bfloat16 where the device multiplies it faster.

    On a CPU that is for convolutions, on processors that have instructions for it.
    """
    if config.precision != "auto":
        return config.precision
    able = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bfloat16" if device.type == "cuda" or (images and able) else "float32"


def threads(config: Config) -> int:
    """Torch threads: one for small networks, whose operations are too short to share."""
    small = config.model.deter <= 256 and not config.env.pixels
    return config.threads or (1 if small else len(os.sched_getaffinity(0)))
