"""The command `nested`: train, eval, schedule, runs, data, sync, bench, schema.

Each command imports what it needs when it runs, so that help and a mistake in a configuration are
told at once. Exit codes: 0 done, 2 a mistake of the user's (never a traceback), 130 interrupted.
"""

import argparse
import importlib
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from experiments.data import command as data

Parser = argparse.ArgumentParser


class Command(NamedTuple):
    """A subcommand: one line for the list, its help, its arguments, and what it does."""

    line: str
    about: str
    example: str
    arguments: Callable[[Parser], None]
    run: Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if words[0] == "--version":
        return _version()
    return _guarded(words[0], words[1:])


def _guarded(name: str, words: list[str]) -> int:
    """Run a command, with a user's mistake told in a few lines."""
    from experiments import show
    from experiments.config import ConfigError

    try:
        return _dispatch(name, words)
    except ConfigError as found:
        show.error(found)
    except BrokenPipeError:  # the reader of a pipe left, such as `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 2


def _dispatch(name: str, words: list[str]) -> int:
    from experiments.config import ConfigError, nearest

    if name not in COMMANDS:
        near = nearest(name, COMMANDS)
        listed = f"commands: {', '.join(COMMANDS)}"
        raise ConfigError(
            "command", name, "no such command", f"did you mean {near}?" if near else listed
        )
    command = COMMANDS[name]
    if name == "bench" and words and not words[0].startswith("-"):
        return _bench(words[0], words[1:])
    parser = Parser(
        prog=f"nested {name}",
        description=command.about,
        epilog=f"example:\n  {command.example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.arguments(parser)
    return _recorded(command.run, parser.parse_intermixed_args(words))


def _recorded(run: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    """Run, with a damaged or missing run told as the mistake that it is."""
    from experiments.config import ConfigError
    from experiments.record import CheckpointError, RunError

    try:
        return run(args)
    except (RunError, CheckpointError) as error:
        problem, _, way_out = str(error).partition("; ")
        raise ConfigError("run", vars(args).get("run") or ..., problem, way_out) from error


def _overview() -> str:
    lines = ["usage: nested COMMAND ...", "", "World models that learn on k timescales.", ""]
    lines += [f"  {name:<10}{command.line}" for name, command in COMMANDS.items()]
    lines += [
        "",
        "Each command explains itself: nested COMMAND --help",
        "example:",
        "  nested train",
    ]
    return "\n".join(lines)


def _version() -> int:
    from importlib.metadata import version

    print(f"nested-timescales {version('nested-timescales')}")
    return 0


# ---- arguments ---------------------------------------------------------------------------------
def _configuration(parser: Parser) -> None:
    from experiments.config import presets

    parser.add_argument(
        "words", nargs="*", metavar="CONFIG | field=value",
        help="a YAML file or a preset, and fields to change; no file or preset: `default`",
    )  # fmt: skip
    listed = "\n".join(f"  {name:<10}{line}" for name, line in presets().items())
    parser.epilog = f"presets:\n{listed}\n\n{parser.epilog}"


def _split(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """The file or preset, if any, and the overrides."""
    from experiments.config import ConfigError

    overrides = [word for word in words if "=" in word and not Path(word).is_file()]
    sources = [word for word in words if word not in overrides]
    if len(sources) > 1:
        raise ConfigError(
            "config", " ".join(sources), "one file or preset at a time",
            "changes are written as field=value",
        )  # fmt: skip
    return (sources[0] if sources else None), overrides


def _run_argument(parser: Parser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run's folder, or its name below runs/")


def _find_run(text: str, field: str = "run") -> Path:
    """The folder of a run given by path or name. Raises ConfigError."""
    from experiments.config import ConfigError, nearest

    for path in (Path(text), Path("runs") / text):
        if (path / "run.json").is_file():
            return path
    if Path(text).is_dir():
        raise ConfigError(field, text, "holds no run.json: not a run's folder", "see `nested runs`")
    near = nearest(
        Path(text).name, [found.parent.name for found in Path("runs").glob("*/run.json")]
    )
    way_out = f"did you mean runs/{near}?" if near else "`nested runs` lists the runs"
    raise ConfigError(field, text, "no such run", way_out)


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of 1 or more")
    return int(text)


# ---- train -------------------------------------------------------------------------------------
def _train_arguments(parser: Parser) -> None:
    _configuration(parser)
    parser.add_argument("--resume", metavar="RUN", help="go on with a run from its last checkpoint")
    parser.add_argument(
        "--print-config", action="store_true", help="print the resolved configuration and stop"
    )


def _train(args: argparse.Namespace) -> int:
    from experiments.config import ConfigError, load_config
    from experiments.config.dreamer4 import is_dreamer4
    from experiments.envs.known import check_env

    source, overrides = _split(args.words)
    resume = _find_run(args.resume, "--resume") if args.resume else None
    if resume and source:
        raise ConfigError(
            "config", source, "a resumed run has its own configuration",
            "leave it out; fields may follow as field=value",
        )  # fmt: skip
    if is_dreamer4(resume or source):
        return _train_offline(resume, source, overrides, args.print_config)
    config = load_config(resume or source, overrides)
    if args.print_config:
        print(config.dump(), end="")
        return 0
    check_env(config)
    if resume:
        _say_changes(load_config(resume).flatten(), config.flatten())
    from experiments.train import train

    _say_done(train(config, resume), config.tracking.uri if config.tracking.mlflow else None)
    return 0


def _train_offline(
    resume: Path | None, source: str | None, overrides: list[str], show: bool
) -> int:
    """From recorded episodes, by the phases of Dreamer 4."""
    from experiments.config.dreamer4 import load_dreamer4

    config = load_dreamer4(resume or source, overrides)
    if show:
        print(config.dump(), end="")
        return 0
    if resume:
        _say_changes(load_dreamer4(resume).flatten(), config.flatten())
    from experiments.offline import learn

    _say_done(learn(config, resume), config.tracking.uri if config.tracking.mlflow else None)
    return 0


def _say_changes(before: Mapping[str, object], after: Mapping[str, object]) -> None:
    """What a run goes on with that it did not have: never in silence."""
    for name in sorted(before.keys() | after.keys()):
        old, new = (str(fields.get(name, "nothing")) for fields in (before, after))
        if old != new:
            print(f"changed {name}: {old} -> {new}", file=sys.stderr)


def _say_done(path: Path, uri: str | None) -> None:
    from experiments.record.metrics import tail
    from experiments.record.run import last_score

    score = last_score(tail(path / "metrics.jsonl"))
    print(f"run     {path}")
    if score is not None:
        print(f"score   {score:.3g}")
    if (path / "report.png").exists():
        print(f"report  {path / 'report.png'}")
    print(f"act     nested eval {path}")
    if uri:
        from experiments.record import opening

        for line in opening(path) or [f"mlflow ui --backend-store-uri {uri}"]:
            print(f"mlflow  {line}")


# ---- eval, schedule ----------------------------------------------------------------------------
def _eval_arguments(parser: Parser) -> None:
    _run_argument(parser)
    parser.add_argument(
        "--fast", choices=("on", "off"), default="on",
        help="off: act without the fast memory (default on)",
    )  # fmt: skip
    parser.add_argument("--episodes", type=_count, default=32, help="in each context (default 32)")


def _eval(args: argparse.Namespace) -> int:
    path = _find_run(args.run)
    from experiments import show
    from experiments.evaluate import evaluate_run

    show.metrics(evaluate_run(path, fast=args.fast == "on", episodes=args.episodes))
    return 0


def _schedule_arguments(parser: Parser) -> None:
    _configuration(parser)
    parser.add_argument(
        "--updates", type=_count, default=64, help="length of the timeline (default 64)"
    )


def _schedule(args: argparse.Namespace) -> int:
    from experiments.config import load_config
    from experiments.envs.known import check_env

    config = load_config(*_split(args.words))
    check_env(config)
    from experiments import show
    from experiments.build import level_table

    rows, moves = level_table(config, args.updates)
    show.levels(config, rows, moves, args.updates)
    return 0


# ---- runs, sync, bench, schema -----------------------------------------------------------------
def _runs_arguments(parser: Parser) -> None:
    parser.add_argument("--root", default="runs", help="folder of the runs (default runs)")


def _runs(args: argparse.Namespace) -> int:
    from experiments import show
    from experiments.record import runs

    found = runs(Path(args.root))
    if found:
        show.runs(found)
    else:
        print(f"no runs in {args.root}; `nested train` makes one")
    return 0


def _sync_arguments(parser: Parser) -> None:
    _run_argument(parser)
    parser.add_argument("--uri", help="MLflow's tracking store, instead of the configured one")


def _sync(args: argparse.Namespace) -> int:
    path = _find_run(args.run)
    from experiments.record.tracking import sync

    print(f"{sync(path, args.uri)} metrics sent")
    return 0


def _suites() -> list[str]:
    folder = Path(__file__).parent / "benchmarks"
    return sorted(p.stem for p in folder.glob("*.py") if "\ndef main(" in p.read_text("utf-8"))


def _bench_arguments(parser: Parser) -> None:
    suites = ", ".join(_suites()) or "none yet"
    parser.add_argument("suite", metavar="SUITE", help=f"one of: {suites}; its options follow it")


def _bench(suite: str, words: list[str]) -> int:
    from experiments.config import ConfigError, nearest

    if suite not in _suites():
        near = nearest(suite, _suites())
        listed = f"suites: {', '.join(_suites()) or 'none yet'}"
        raise ConfigError(
            "suite", suite, "no such suite", f"did you mean {near}?" if near else listed
        )
    return importlib.import_module(f"experiments.benchmarks.{suite}").main(words)


def _schema_arguments(parser: Parser) -> None:
    del parser


def _schema(args: argparse.Namespace) -> int:
    from experiments.config import Config

    del args
    schema = Config.model_json_schema()
    extends = {"type": "string", "description": "a preset or file that this one changes"}
    print(
        json.dumps({**schema, "properties": {"extends": extends, **schema["properties"]}}, indent=2)
    )
    return 0


COMMANDS = {
    "train": Command(
        "learn in an environment, as the configuration says",
        "Train a world model and an agent. Without a file or preset: the default one.",
        "nested train cartpole seed=1 timescales.kind=geometric timescales.k=5",
        _train_arguments,
        _train,
    ),
    "eval": Command(
        "load a run and act",
        "Load a run's last checkpoint and act, on the CPU: mean return in each context.",
        "nested eval runs/cartpole-shift-0 --fast off --episodes 16",
        _eval_arguments,
        _eval,
    ),
    "schedule": Command(
        "show the levels and when each moves, without training",
        "Print which parameters each level owns, its clock, and a timeline of its moves.",
        "nested schedule k5 timescales.levels.slow.every.n=64",
        _schedule_arguments,
        _schedule,
    ),
    "runs": Command(
        "list the runs with their state",
        "List the runs in a folder: state, frames done, last score.",
        "nested runs --root runs",
        _runs_arguments,
        _runs,
    ),
    "data": Command(
        "record episodes, or convert recorded ones",
        "Record episodes of a policy as clips to learn from offline, or convert other formats.",
        data.EXAMPLES,
        data.arguments,
        lambda args: data.run(args, _find_run),
    ),
    "sync": Command(
        "send a run's metrics to MLflow",
        "Send what a run has written but MLflow has not; nothing is sent twice.",
        "nested sync runs/cartpole-shift-0 --uri sqlite:///mlflow.db",
        _sync_arguments,
        _sync,
    ),
    "bench": Command(
        "run a suite of benchmarks",
        "Run a suite of benchmarks; `nested bench SUITE --help` shows its own options.",
        "nested bench speed",
        _bench_arguments,
        lambda args: _bench(args.suite, []),
    ),
    "schema": Command(
        "print the JSON schema of configurations, for editors",
        "Print the JSON schema of configuration files, for completion in an editor.",
        "nested schema > nested.schema.json",
        _schema_arguments,
        _schema,
    ),
}


if __name__ == "__main__":
    sys.exit(main())
