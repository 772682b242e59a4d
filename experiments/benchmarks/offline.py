"""From recordings alone: does imagination improve on imitation? `nested bench offline`.

One world model learns the demonstrations; then each seed imitates them in it, and goes on in
imagination. Both policies act in the real environment, actions sampled, on the same episodes that
random actions and the expert play: differences are paired by seed. One seed tells nothing: three
that others published moved the return by -33, +24 and -8 points. A seed that fails is a result, so
the last two phases have no gates; the world model keeps its own.

What is finished is not run again and what was killed goes on, so a command can be repeated, with
more seeds too, and several processes (--jobs) share the seeds.
"""

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.benchmarks.recorded.play import Outcome, outcome, references, succeeds, whole
from experiments.benchmarks.sharing import shared, workers
from experiments.config import Config, ConfigError
from experiments.config.dreamer4 import METHOD, Dreamer4Config, load_dreamer4
from experiments.config.load import read_tree
from experiments.data.clips import Clips
from experiments.data.convert import record_policy
from experiments.envs.known import check_env
from experiments.process import settle
from experiments.record import RunError, runs
from experiments.record.curves import series
from experiments.record.metrics import read
from experiments.record.run import read_json, revision, write_json

PHASES = ("tokenizer", "dynamics", "finetune", "imagine")
LATER = PHASES[2:]
POINTS = 8  # evaluations of each phase that is drawn
GATES = {"psnr": "tokenizer_psnr", "next_frame": "dynamics_next_frame"}
NOTE = "recorded.json"  # in the folder of the data: how they were recorded
OWN = {  # fields that are the suite's
    "seed": "say how many with --seeds",
    "start": "each seed starts from the suite's own world model",
    "tracking.root": "name the folder with --root",
    "online.rounds": "this suite learns from recordings alone: leave it out",
}
FIXED = ("tracking.mlflow=false", "tracking.pictures=false", "online.rounds=0")
# Fields that do not change the world model: seeds of other values share it.
BEHAVIOUR = (*(f"phases.{name}." for name in LATER), "agent.", "episodes=", "counterfactual.")


class Tier(NamedTuple):
    """How much, unless the command line says otherwise."""

    line: str
    seeds: int
    frames: int
    episodes: int
    fields: tuple[str, ...]


TIERS = {
    "smoke": Tier(
        "seconds: that it runs from end to end",
        2,
        100,
        4,
        (
            *("env.image_size=16", "env.num=2", "env.time_limit=20", "threads=1"),
            *("tokenizer.trunk.width=8", "tokenizer.latents=2", "tokenizer.channels=4"),
            *("dynamics.trunk.width=8", "dynamics.trunk.layers=2", "dynamics.spatial=2"),
            *("dynamics.k_max=2", "agent.steps=1", "agent.units=8", "agent.horizon=2"),
            *(f"phases.{name}.{field}" for name in PHASES for field in ("updates=2", "batch=4")),
            *(f"phases.{name}.{field}" for name in PHASES for field in ("length=4", "gate=null")),
            *("phases.dynamics.long=5", "phases.imagine.critic=0", "episodes=2", "log_every=1"),
            *("counterfactual.contexts=1", "counterfactual.frames=3", "checkpoint.every=0"),
            "counterfactual.episodes=2",
        ),
    ),
    "laptop": Tier("the preset as it is: minutes of one core for each seed", 5, 20_000, 100, ()),
}


# ---- configurations ----------------------------------------------------------------------------
def base_config(asked: argparse.Namespace) -> Dreamer4Config:
    """The run that learns the world model; what only behaviour depends on is the preset's."""
    overrides = [word for word in asked.overrides if not is_behaviour(word)]
    none = [f"phases.{name}.{field}" for name in LATER for field in ("updates=0", "gate=null")]
    words = [f"threads={asked.jobs}", *words_of(asked, overrides), *none]
    return load_dreamer4(asked.preset, [*words, f"tracking.root={asked.root / 'base'}", "seed=0"])


def seed_config(asked: argparse.Namespace, base: Path, seed: int) -> Dreamer4Config:
    """The run of a phase-2 seed, which starts from the world model in `base`."""
    words = words_of(asked, asked.overrides)
    phases = load_dreamer4(asked.preset, words).phases
    points = [
        f"phases.{name}.evaluate={max(1, vars(phases)[name].updates // POINTS)}" for name in LATER
    ]
    own = [f"start={base}", f"seed={seed}", f"tracking.root={asked.root / f'seed-{seed}'}"]
    free = [f"phases.{name}.gate=null" for name in LATER]
    return load_dreamer4(asked.preset, [*points, "threads=1", *words, *free, *own])


def words_of(asked: argparse.Namespace, overrides: Sequence[str]) -> list[str]:
    """What every run of the suite has."""
    return [f"data.path={asked.root / 'data'}", *FIXED, *TIERS[asked.tier].fields, *overrides]


def is_behaviour(word: str) -> bool:
    """Whether a change leaves the world model as it is."""
    return word.startswith(BEHAVIOUR) and not word.startswith("agent.bins")


def is_of(path: Path, config: Dreamer4Config) -> bool:
    """Whether a run's folder holds a run of this configuration, on however many threads."""
    try:
        found = load_dreamer4(path)
    except ConfigError:
        return False
    return found.model_copy(update={"threads": config.threads}) == config


# ---- runs --------------------------------------------------------------------------------------
def finished(config: Dreamer4Config) -> Path:
    """The finished run of a configuration: found, gone on with, or run from the start."""
    from experiments.offline import learn

    root = Path(config.tracking.root)
    found = {s.state: s.path for s in runs(root) if is_of(s.path, config)}
    if "finished" in found:
        return found["finished"]
    if "running" in found:
        problem = f"{found['running']} is training in another process"
        raise ConfigError("run", str(root), problem, "wait for it, then repeat this command")
    half = found.get("stopped") or found.get("failed")
    try:
        return learn(config, half if half and any((half / "checkpoints").glob("*")) else None)
    except RunError as error:
        problem, _, way_out = str(error).partition("; ")
        again = f"{way_out}, then repeat this command with the same fields" if way_out else ""
        raise ConfigError("run", str(root), problem, again) from error


def world_model(asked: argparse.Namespace) -> Path:
    """The finished base run, with its data; another process that is at it is waited for."""
    config = base_config(asked)
    check_env(Config(env=config.env))

    def run(name: str) -> Path:
        demonstrate(config, asked)
        return finished(config)

    return shared({"base": asked.root / "base"}, run)["base"]


def demonstrate(config: Dreamer4Config, asked: argparse.Namespace) -> None:
    """Record the expert where there are no data yet. Raises ConfigError for data of another kind.

    Data that were recorded elsewhere have no note, and are taken as they are.
    """
    path, note = Path(config.data.path), Path(config.data.path) / NOTE
    tier = TIERS[asked.tier]
    if not (path / "index.json").exists():
        noise = 0.3 if asked.noise is None else asked.noise
        frames = asked.frames or tier.frames
        print(f"data: {frames:,} frames of the expert, noise {noise:g}", file=sys.stderr)
        path.mkdir(parents=True, exist_ok=True)
        write_json(note, {"env": scene(config), "noise": noise, "frames": frames})
        record_policy(path, "expert", config.env, frames, noise)
    elif note.exists():
        known = read_json(note)
        wanted = {"env": scene(config), "noise": asked.noise, "frames": asked.frames}
        for name, value in wanted.items():
            if value is not None and value != known[name]:
                field = name if name == "env" else f"--{name}"
                problem = f"the data in {path} were recorded with {known[name]}"
                raise ConfigError(field, value, problem, "name another --root")


def scene(config: Dreamer4Config) -> dict[str, Any]:
    """What the look of recordings depends on."""
    env = config.env.model_dump(mode="json")
    return {name: value for name, value in env.items() if name not in ("num", "workers")}


def collect(asked: argparse.Namespace, base: Path) -> list[Outcome]:
    """Outcomes in the order of seeds; what is missing is run."""

    def run(seed: int) -> Outcome:
        config = seed_config(asked, base, seed)
        settle(config.threads)
        return outcome(finished(config), config, asked.episodes)

    tasks = {seed: asked.root / f"seed-{seed}" for seed in range(asked.seeds)}
    return [*shared(tasks, run).values()]


def share(asked: argparse.Namespace, argv: Sequence[str]) -> None:
    """Let other processes run the seeds, and show how far each is."""
    from experiments.benchmarks.recorded.board import Board

    jobs = min(asked.jobs, asked.seeds)
    sharing = workers("experiments.benchmarks.offline", argv, jobs, asked.root)
    with sharing as started, Board(asked.root, asked.seeds) as board:
        while any(process.poll() is None for process in started):
            board.show()
            time.sleep(1.0)
        board.show()


# ---- the command -------------------------------------------------------------------------------
def parser() -> argparse.ArgumentParser:
    """The command line."""
    listed = "\n".join(f"  {name:<8}{tier.line}" for name, tier in TIERS.items())
    made = argparse.ArgumentParser(
        prog="nested bench offline",
        description=__doc__,
        epilog=f"tiers:\n{listed}\n\nexample:\n  nested bench offline --preset dreamer4 --seeds 10 "
        "--jobs 2 --noise 0.6",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--preset", default="dreamer4", help="dreamer4, recipes, or a YAML file")
    made.add_argument("--tier", choices=TIERS, default="laptop", help="how much (default laptop)")
    made.add_argument("--seeds", type=int, help="of imitation and imagination (laptop: 5)")
    made.add_argument("--episodes", type=int, help="that every policy plays (laptop: 100)")
    made.add_argument("--frames", type=int, help="of demonstrations (laptop: 20000)")
    made.add_argument("--noise", type=float, help="random share of their actions (default 0.3)")
    made.add_argument("--jobs", type=int, default=1, help="processes that share the seeds")
    made.add_argument("--root", type=Path, help="folder (default runs/offline/PRESET-TIER)")
    made.add_argument("--out", type=Path, help="the picture (default ROOT/offline.png)")
    made.add_argument("--results", type=Path, metavar="FILE.md", help="put the tables in this page")
    made.add_argument("--json", action="store_true", help="print JSON instead of the tables")
    made.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    made.add_argument("overrides", nargs="*", metavar="field=value", help="fields of the preset")
    return made


def checked(asked: argparse.Namespace) -> argparse.Namespace:
    """The same with the tier's numbers filled in. Raises ConfigError."""
    tier = TIERS[asked.tier]
    for name in ("seeds", "episodes", "frames", "jobs"):
        value = vars(asked)[name]
        if value is not None and value < 1:
            raise ConfigError(f"--{name}", value, "nothing to do", "give 1 or more")
    if asked.noise is not None and not 0 <= asked.noise <= 1:
        raise ConfigError("--noise", asked.noise, "is no share of actions", "give 0 to 1")
    if read_tree(asked.preset).get("method") != METHOD:
        way_out = f"use dreamer4, recipes, or a file with method: {METHOD}"
        raise ConfigError("--preset", asked.preset, "does not learn from recordings", way_out)
    for word in asked.overrides:
        field, _, value = word.partition("=")
        if field in OWN:
            raise ConfigError(field, value, "is set by this suite", OWN[field])
    asked.root = asked.root or Path("runs/offline") / f"{Path(asked.preset).stem}-{asked.tier}"
    seed_config(asked, asked.root, 0)  # what is wrong with it is told before hours of learning
    if asked.results and not asked.results.parent.is_dir():
        raise ConfigError("--results", str(asked.results), "is in no folder", "make the folder")
    asked.seeds, asked.episodes = asked.seeds or tier.seeds, whole(asked.episodes or tier.episodes)
    return asked


def facts(asked: argparse.Namespace, config: Dreamer4Config, base: Path) -> dict[str, Any]:
    """What was run, and how well the world model knows what it has not seen."""
    rows = read(base / "metrics.jsonl")
    clips, note = Clips.open(config.data.path), Path(config.data.path) / NOTE
    return {
        "env": config.env.id,
        "preset": asked.preset,
        "tier": asked.tier,
        "frames": clips.frames,
        "episodes": len(clips.episodes),
        "noise": read_json(note)["noise"] if note.exists() else None,
        "played": asked.episodes,
        "evaluation": config.episodes,
        "measures": ["return", *["success"] * succeeds(config.env.id)],
        "fields": asked.overrides,
        "commit": revision(),
        "world": {name: series(rows, f"gate/{key}")[1][-1] for name, key in GATES.items()},
    }


def command_of(asked: argparse.Namespace, result: Mapping[str, Any]) -> str:
    """The command that gives these results again."""
    words = [f"nested bench offline --preset {asked.preset} --tier {asked.tier}"]
    words += [f"--seeds {asked.seeds}", f"--episodes {asked.episodes}"]
    words += [f"--frames {asked.frames}"] if asked.frames else []
    words += [f"--noise {result['noise']:g}"] if result["noise"] is not None else []
    return " ".join([*words, *asked.overrides])


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing, let everyone play, draw, print."""
    asked = checked(parser().parse_intermixed_args(argv))
    base = world_model(asked)
    if asked.worker:
        collect(asked, base)
        return 0
    if asked.jobs > 1:
        share(asked, sys.argv[1:] if argv is None else argv)
    outcomes = collect(asked, base)
    report(asked, base, outcomes)
    return 0


def report(asked: argparse.Namespace, base: Path, outcomes: Sequence[Outcome]) -> None:
    """Write, draw and print what the seeds gave."""
    from experiments.benchmarks.recorded import told as offline_told
    from experiments.benchmarks.recorded.page import draw

    config = seed_config(asked, base, 0)
    others = references(asked.root, config, asked.episodes)
    rng = np.random.default_rng(0)
    result = offline_told.summary(facts(asked, config, base), others, outcomes, rng)
    write_json(asked.root / "offline.json", result)
    out = asked.out or asked.root / "offline.png"
    draw(result, outcomes, (config.phases.finetune.updates, config.phases.imagine.updates), out)
    print(json.dumps(result) if asked.json else f"{offline_told.table(result)}\npicture {out}")
    if asked.results:
        offline_told.put(asked.results, command_of(asked, result), result)


if __name__ == "__main__":
    sys.exit(main())
