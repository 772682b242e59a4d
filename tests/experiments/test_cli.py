"""The command line: help, exit codes, errors without tracebacks, and what each command calls."""

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from experiments import cli
from experiments.config import Config, ConfigError, load_config
from experiments.envs import known


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def calls(monkeypatch, tmp_path):
    """Stands in for training and evaluation; the list of what was asked of them."""
    asked: list[tuple] = []
    train, evaluate = ModuleType("train"), ModuleType("evaluate")

    def record_train(config: Config, resume: Path | None = None) -> Path:
        asked.append((config, resume))
        return tmp_path / "runs" / "one"

    def record_eval(path: Path, fast: bool, episodes: int) -> dict[str, float]:
        asked.append((path, fast, episodes))
        return {"eval/normal/return": 12.5}

    train.train = record_train  # type: ignore[attr-defined]
    evaluate.evaluate_run = record_eval  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "experiments.train", train)
    monkeypatch.setitem(sys.modules, "experiments.evaluate", evaluate)
    return asked


def make_run(name: str = "one") -> Path:
    from experiments.record import Run

    run = Run.create(load_config("plain", ["seed=5"]), Path("runs"))
    return run.path.rename(Path("runs") / name)


def refused(capsys, *words: str) -> str:
    """The error of a command that must exit with 2 and leave no run behind."""
    before = sorted(Path("runs").glob("*"))
    assert cli.main(words) == 2
    found = capsys.readouterr()
    assert found.err.startswith("error: ")
    assert "Traceback" not in found.err
    assert 2 <= len(found.err.strip().splitlines()) <= 4
    assert sorted(Path("runs").glob("*")) == before
    return found.err


# ---- help ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_says_what_it_does_and_shows_an_example(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([name, "--help"])
    text = capsys.readouterr().out
    assert stopped.value.code == 0
    assert f"example:\n  nested {name}" in text
    assert cli.COMMANDS[name].about.split(".")[0] in text


def test_examples_are_commands_that_parse(capsys):
    for name, command in cli.COMMANDS.items():
        words = command.example.partition(">")[0].split()
        assert words[:2] == ["nested", name]
    assert cli.main(["train", "--print-config", *cli.COMMANDS["train"].example.split()[2:]]) == 0
    assert "mid3:" in capsys.readouterr().out


def test_overview_lists_commands_and_train_lists_presets(capsys):
    assert cli.main([]) == 0
    overview = capsys.readouterr().out
    assert all(f"  {name} " in overview for name in cli.COMMANDS)
    with pytest.raises(SystemExit):
        cli.main(["train", "-h"])
    assert "CartPole-v1 with plain Dreamer" in capsys.readouterr().out


def test_unknown_command_suggests_one(capsys):
    assert "did you mean train?" in refused(capsys, "trian")


def test_help_and_mistakes_cost_no_torch():
    code = (
        "import sys; from experiments.cli import main;"
        "rc = main(['train', 'env.id=CartPole-v2', 'env.contexts=[]']);"
        "print(rc, 'torch' in sys.modules, 'mlflow' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2", "False", "False"]
    assert "did you mean CartPole-v1?" in done.stderr


def test_module_is_the_command():
    words = [sys.executable, "-m", "experiments", "train", "sed=1"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 2
    assert "did you mean seed?" in done.stderr


# ---- train ---------------------------------------------------------------------------------------
def test_train_with_changes_only_uses_the_default_preset(calls, capsys):
    assert cli.main(["train", "timescales.kind=geometric", "timescales.k=5"]) == 0
    config, resume = calls[0]
    assert config == load_config("k5", ["name=cartpole-shift", "timescales.base=2"])
    assert resume is None
    out = capsys.readouterr().out
    assert "nested eval" in out and "mlflow ui" in out


def test_train_takes_a_file_and_flags_in_any_order(calls):
    Path("mine.yaml").write_text("extends: cartpole\nseed: 3\n")
    assert cli.main(["train", "frames=16000", "mine.yaml", "tracking.mlflow=false"]) == 0
    assert (calls[0][0].seed, calls[0][0].frames) == (3, 16000)


def test_resume_takes_the_configuration_of_the_run(calls, capsys):
    path = make_run()
    assert cli.main(["train", "--resume", "one", "frames=48000"]) == 0
    config, resume = calls[0]
    assert (resume, config.seed, config.frames) == (path, 5, 48000)
    told = capsys.readouterr().err
    assert "changed frames: " in told and told.endswith("-> 48000\n") and "seed" not in told


def test_print_config_loads_again(calls, capsys):
    assert cli.main(["train", "k3", "seed=2", "--print-config"]) == 0
    Path("again.yaml").write_text(capsys.readouterr().out)
    assert load_config("again.yaml") == load_config("k3", ["seed=2"])
    assert calls == []


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["timescales.levels.slow.evry.n=4"], "timescales.levels.slow.every.n"),
        (["timescales.levels.slow.every.n=-3"], "timescales.levels.slow.every.n = -3"),
        (["nosuch"], "presets: default"),
        (["nosuch.yaml"], "no such file"),
        (["cartpole", "pendulum"], "one file or preset"),
        (["--resume", "nope"], "nested runs"),
        (["env.id=MountainCar-v9", "env.contexts=[]"], "MountainCar-v0"),
        (["env.id=CartPoleShift-v1"], "CartPoleShift-v0"),
        (["env.contexts=[normal,fliped,normal]"], "flipped"),
        (["env.id=CartPole-v1", "env.contexts=[normal,flipped,normal]"], "env.contexts"),
        (["env.pixels=true"], "env.pixels = true"),
    ],
)
def test_mistakes_before_training(words, expected, calls, capsys):
    assert expected in refused(capsys, "train", *words)
    assert calls == []


def test_resume_with_another_configuration_is_refused(calls, capsys):
    make_run()
    assert "has its own configuration" in refused(capsys, "train", "k3", "--resume", "one")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("timescales.levels.slow.match=nosuch", "nosuch"),
        ("timescales.levels.fast.match=^actor", "critic."),
        ("timescales.levels.mid.match=world", "world.encoder"),
    ],
)
@pytest.mark.parametrize("command", ["train", "schedule"])
def test_parameters_owned_by_nobody_or_twice(command, override, expected, capsys):
    assert expected in refused(capsys, command, override)


@pytest.mark.parametrize(
    ("name", "install"),
    [
        ("MiniGrid-Empty-5x5-v0", "nested-timescales[minigrid]"),
        ("ALE/Pong-v5", "nested-timescales[atari]"),
        ("crafter", "nested-timescales[crafter]"),
        ("SlipperyAnt-v0", "nested-timescales[mujoco]"),
        ("MiniGrid3-v0", "nested-timescales[minigrid]"),
        ("MiniHack4-v0", "nested-timescales[minihack]"),
        ("Atari6-v0", "nested-timescales[atari]"),
        ("HalfCheetah-v5", "gymnasium[mujoco]"),
    ],
)
def test_missing_extra_says_what_to_install(name, install, monkeypatch, capsys):
    monkeypatch.setattr(known, "find_spec", lambda package: None)
    error = refused(capsys, "train", f"env.id={name}", "env.contexts=[]")
    assert f"pip install '{install}'" in error


def test_known_environments_pass():
    for name in ("CartPole-v1", "Pendulum-v1", "MiniGrid-Empty-5x5-v0"):
        known.check_env(load_config(None, [f"env.id={name}", "env.contexts=[]"]))
    with pytest.raises(ConfigError, match="MiniGrid-Empty-5x5-v0"):
        known.check_env(load_config("minigrid", ["env.id=MiniGrid-Emty-5x5-v0"]))


# ---- the others ----------------------------------------------------------------------------------
def test_eval_prints_the_metrics(calls, capsys):
    path = make_run()
    assert cli.main(["eval", str(path), "--fast", "off", "--episodes", "3"]) == 0
    assert calls == [(path, False, 3)]
    assert "eval/normal/return  12.5" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["eval", "sync"])
def test_missing_or_damaged_runs(command, calls, capsys):
    path = make_run()
    assert "did you mean runs/one?" in refused(capsys, command, "runs/onne")
    Path("empty").mkdir()
    assert "no run.json" in refused(capsys, command, "empty")
    if command == "sync":
        (path / "run.json").write_text("{")
        assert "run.json" in refused(capsys, command, str(path))


def test_resume_of_a_run_without_its_configuration(calls, capsys):
    path = make_run()
    (path / "config.yaml").unlink()
    assert "config.yaml" in refused(capsys, "train", "--resume", str(path))


def test_runs_lists_what_is_there(capsys):
    assert cli.main(["runs"]) == 0
    assert "no runs in runs" in capsys.readouterr().out
    make_run()
    (make_run("two") / "run.json").write_text("{")
    assert cli.main(["runs"]) == 0
    out = capsys.readouterr().out
    assert "runs/one" in out and "created" in out
    assert "runs/two" in out and "corrupt" in out


def test_schedule_prints_table_and_timeline(capsys):
    assert cli.main(["schedule", "k5", "--updates", "32"]) == 0
    out = capsys.readouterr().out
    assert "fast memory: gated_delta" in out
    assert "a copy of ^critic" in out
    line = next(
        line for line in out.splitlines() if line.strip().startswith("mid1 ") and "·" in line
    )
    assert "···█" * 8 in line
    assert "every 256 updates; first at 256" in out


def test_bench_hands_the_rest_to_the_suite(monkeypatch, capsys):
    suite = ModuleType("suite")
    suite.main = lambda argv: len(argv)  # type: ignore[attr-defined]
    monkeypatch.setattr(cli, "_suites", lambda: ["speed"])
    monkeypatch.setitem(sys.modules, "experiments.benchmarks.speed", suite)
    assert cli.main(["bench", "speed", "--size", "1m"]) == 2
    assert cli.main(["bench", "speed"]) == 0
    assert "did you mean speed?" in refused(capsys, "bench", "sped")


def test_schema_is_json_with_extends(capsys):
    assert cli.main(["schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert {"extends", "timescales", "seed"} <= schema["properties"].keys()


def test_interrupt_is_130(monkeypatch, capsys):
    def interrupt(args):
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, "runs", cli.COMMANDS["runs"]._replace(run=interrupt))
    assert cli.main(["runs"]) == 130
    assert capsys.readouterr().err == "interrupted\n"
