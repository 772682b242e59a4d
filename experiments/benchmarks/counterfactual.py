"""Does a world model believe in what it was never shown? `nested bench counterfactual`.

Recordings of Recipes hold no wrong recipe. Round 0 learns from them alone; then rounds of acting
follow, in arms that differ in the episodes that a round adds: the policy's own, random ones, or
none with as many updates. Measured after each round: how often imagination promises a wrong recipe
a tool that reality refuses (hallucination), whether it knows the right ones, and what imagined
episodes return beyond real ones (exploitation gap). Arms of a seed go on from copies of one offline
run, so they are pairs. What is finished is not run again: a command that was cut can be repeated.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.benchmarks.names import names_in
from experiments.benchmarks.recorded import rounds_page
from experiments.benchmarks.recorded.rounds_page import MEASURES
from experiments.benchmarks.sharing import shared, workers
from experiments.benchmarks.statistics import bootstrap, paired_bootstrap
from experiments.config import ConfigError
from experiments.config.dreamer4 import Dreamer4Config, OnlineConfig, load_dreamer4
from experiments.data.convert import record_policy
from experiments.record import RunError, runs
from experiments.record.metrics import read
from experiments.record.run import read_json, revision, write_json

ARMS: dict[str, tuple[str, dict[str, Any]]] = {  # and what each changes in `online`
    "own": ("the policy's own episodes", {}),
    "random": ("random episodes", {"noise": 1.0}),
    "none": ("no new episodes, as many updates", {"episodes": 0}),
}
PHASES = ("tokenizer", "dynamics", "finetune", "imagine")
FIXED = ("tracking.mlflow=false", "tracking.pictures=false")
TIERS: dict[str, tuple[int, int, tuple[str, ...]]] = {  # seeds, recorded frames, fields
    "smoke": (
        2,
        100,
        (
            *("env.image_size=16", "env.num=2", "env.time_limit=20", "env.kwargs.size=3"),
            *("tokenizer.trunk.width=8", "tokenizer.latents=2", "tokenizer.channels=4"),
            *("dynamics.trunk.width=8", "dynamics.trunk.layers=2", "dynamics.spatial=2"),
            *("dynamics.k_max=2", "agent.steps=1", "agent.units=8", "agent.horizon=2"),
            *(f"phases.{name}.{field}" for name in PHASES for field in ("updates=1", "batch=4")),
            *(f"phases.{name}.{field}" for name in PHASES for field in ("length=4", "gate=null")),
            *("phases.dynamics.long=5", "online.rounds=1", "online.episodes=2"),
            *("online.finetune=1", "online.imagine=1", "episodes=2"),
            *("counterfactual.contexts=2", "counterfactual.frames=3", "checkpoint.every=0"),
            "counterfactual.episodes=2",
        ),
    ),
    "laptop": (
        3,
        20_000,
        (
            "env.kwargs.size=3",
            "env.time_limit=24",
            "counterfactual.frames=24",
            "dynamics.apart=0.1",
        ),
    ),
    "overnight": (10, 60_000, ("online.rounds=5",)),
}
Rounds = dict[str, np.ndarray]  # measure -> (rounds + 1,)
Found = dict[str, dict[str, np.ndarray]]  # arm -> measure -> (seeds, rounds + 1)


# ---- runs --------------------------------------------------------------------------------------
def configs_of(asked: argparse.Namespace, seed: int) -> tuple[Dreamer4Config, Dreamer4Config]:
    """The offline run of a seed, and the same with its rounds."""
    _, _, fields = TIERS[asked.tier]
    words = [f"data.path={asked.root / 'data'}", *FIXED, *fields, *asked.overrides, f"seed={seed}"]
    online = load_dreamer4("recipes", [*words, f"tracking.root={asked.root / 'offline'}"])
    return online.model_copy(update={"online": OnlineConfig()}), online


def offline_run(config: Dreamer4Config) -> Path:
    """The finished offline run of this configuration: found, gone on with, or trained."""
    found = {s.state: s.path for s in runs(Path(config.tracking.root)) if is_of(s.path, config)}
    unfinished = found.get("stopped") or found.get("failed")
    return found.get("finished") or finished(config, unfinished)


def arm_run(base: Path, config: Dreamer4Config, path: Path) -> Path:
    """The finished run of an arm in `path`, which starts as a copy of the offline run."""
    if not (path / "run.json").exists():
        half = path.with_name(f".{path.name}.half")
        shutil.rmtree(half, ignore_errors=True)
        shutil.copytree(base, half, ignore=shutil.ignore_patterns("lock", "*.tmp"))
        (half / "config.yaml").write_text(config.dump())
        info = read_json(half / "run.json")
        write_json(
            half / "run.json", info | {"id": f"{path.parent.name}-{path.name}", "state": "stopped"}
        )
        half.rename(path)
    if not is_of(path, config):
        raise ConfigError(
            "--root", str(path), "holds an arm of another configuration", "name another folder"
        )
    if read_json(path / "run.json")["state"] == "finished":
        return path
    return finished(config, path)


def finished(config: Dreamer4Config, path: Path | None) -> Path:
    """Run, or go on with, a configuration. Raises ConfigError for a gate that is not passed."""
    from experiments.offline import learn

    try:
        return learn(config, path)
    except RunError as error:
        problem, _, way_out = str(error).partition("; ")
        raise ConfigError("seed", config.seed, problem, way_out) from error


def is_of(path: Path, config: Dreamer4Config) -> bool:
    """Whether a run's folder holds a run of just this configuration."""
    try:
        return load_dreamer4(path) == config
    except ConfigError:
        return False


def rounds_of(path: Path) -> Rounds:
    """What a run measured at the end of each round; `imitation` before it dreamt in it."""
    found: dict[str, list[float]] = {name: [] for name in MEASURES}
    imitation = np.nan
    for row in read(path / "metrics.jsonl"):
        imitation = row.metrics.get("eval/imitation/return", imitation)
        if "round/number" in row.metrics:
            measured = {"round/imitation": imitation} | row.metrics
            for name, values in found.items():
                values.append(measured[f"round/{name}"])
    return {name: np.array(values) for name, values in found.items()}


def collect(asked: argparse.Namespace, arms: Sequence[str]) -> Found:
    """Run what is missing; measures by arm."""
    tasks = {seed: asked.root / f"s{seed}" for seed in range(asked.seeds)}
    found = shared(tasks, lambda seed: arms_of(asked, arms, seed)).values()
    return {
        arm: {name: np.stack([one[arm][name] for one in found]) for name in MEASURES}
        for arm in arms
    }


def arms_of(asked: argparse.Namespace, arms: Sequence[str], seed: int) -> dict[str, Rounds]:
    """What every arm of a seed measured."""
    offline, online = configs_of(asked, seed)
    print(f"seed {seed}: offline", file=sys.stderr, flush=True)
    base = offline_run(offline)
    found = {}
    for arm in arms:
        about, changes = ARMS[arm]
        print(f"seed {seed}: {arm}, {about}", file=sys.stderr, flush=True)
        rounds = online.online.model_copy(update=changes)
        config = online.model_copy(update={"online": rounds})
        path = asked.root / arm / f"s{seed}"
        path.parent.mkdir(parents=True, exist_ok=True)
        found[arm] = rounds_of(arm_run(base, config, path))
    return found


def record(asked: argparse.Namespace) -> None:
    """The recordings that all seeds learn from, if they are not there yet."""
    if not (asked.root / "data" / "index.json").exists():
        env = configs_of(asked, 0)[0].env
        record_policy(asked.root / "data", "expert", env, TIERS[asked.tier][1])


# ---- summary -----------------------------------------------------------------------------------
def summary(found: Found, rng: np.random.Generator) -> dict[str, Any]:
    """By measure: each arm by round, what the rounds changed, and arms against the first one."""
    arms, result = list(found), {}
    for name in MEASURES:
        values = {arm: rows[name] for arm, rows in found.items()}
        row: dict[str, Any] = {
            "rounds": {
                arm: [bootstrap(x[:, i], rng)._asdict() for i in range(x.shape[1])]
                for arm, x in values.items()
            },
            "change": {
                arm: paired_bootstrap(x[:, -1], x[:, 0], rng)._asdict() for arm, x in values.items()
            },
            "by seed": {arm: x.tolist() for arm, x in values.items()},
        }
        row["differences"] = {
            f"{arms[0]} - {other}": paired_bootstrap(
                values[arms[0]][:, -1], values[other][:, -1], rng
            )._asdict()
            for other in arms[1:]
        }
        result[name] = row
    return result


def command_of(asked: argparse.Namespace, arms: Sequence[str]) -> str:
    """The command that gives this result again."""
    words = [f"nested bench counterfactual --tier {asked.tier} --seeds {asked.seeds}"]
    return " ".join([*words, f"--arms {','.join(arms)}", *asked.overrides])


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, run what is missing, draw, print."""
    parser = argparse.ArgumentParser(
        prog="nested bench counterfactual",
        description=__doc__,
        epilog="example:\n  nested bench counterfactual --tier laptop --seeds 5",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--tier", choices=TIERS, default="laptop", help="how much (default laptop)")
    parser.add_argument("--arms", default=",".join(ARMS), help="with commas (default all)")
    parser.add_argument("--seeds", type=int, help="how many (default: the tier's)")
    parser.add_argument("--jobs", type=int, default=1, help="processes that share the seeds")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--root", type=Path, help="folder (default runs/counterfactual/TIER)")
    parser.add_argument("--out", type=Path, help="the picture (default ROOT/counterfactual.png)")
    parser.add_argument(
        "--results", type=Path, metavar="FILE.md", help="write the table there, between marks"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.add_argument("overrides", nargs="*", metavar="field=value", help="of the preset recipes")
    asked = parser.parse_intermixed_args(argv)
    for name in ("seeds", "jobs"):
        value = vars(asked)[name]
        if value is not None and value < 1:
            raise ConfigError(f"--{name}", value, "nothing to run", "give 1 or more")
    asked.root = asked.root or Path("runs/counterfactual") / asked.tier
    asked.seeds = asked.seeds or TIERS[asked.tier][0]
    arms = names_in(asked.arms, ARMS, "--arms", "arm")
    if asked.worker:
        collect(asked, arms)
        return 0
    record(asked)
    words = sys.argv[1:] if argv is None else argv
    module, beside = "experiments.benchmarks.counterfactual", min(asked.jobs, asked.seeds) - 1
    with workers(module, words, beside, asked.root):
        found = collect(asked, arms)
    measures = summary(found, np.random.default_rng(0))
    result = {
        "command": command_of(asked, arms),
        "commit": revision(),
        "config": configs_of(asked, 0)[1].model_dump(),
        "tier": asked.tier,
        "seeds": asked.seeds,
        "arms": arms,
        "about": {arm: ARMS[arm][0] for arm in arms},
        "measures": measures,
    }
    out = asked.out or asked.root / "counterfactual.png"
    rounds_page.draw(result, out)
    write_json(asked.root / "counterfactual.json", result)
    if asked.results:
        rounds_page.put(asked.results, result)
    print(json.dumps(result) if asked.json else f"{rounds_page.table(result)}\npicture {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
