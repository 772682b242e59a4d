"""README is true: its commands exist, its schedules load, its Python runs, its links are whole.

The training command is run with a small budget here, and with a larger one under `slow`.
"""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from experiments import load_config
from experiments.cli import COMMANDS, main
from experiments.config.load import presets

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
TRAIN = "pip install -e . && nested train"
TEST = "pip install -e '.[test]' && pytest"
DEVELOP = "pip install -c constraints.txt -e '.[dev]' && make check"

SMALL = [
    *("env.num=4", "frames=96", "train.prefill=64", "evaluate.episodes=2", "evaluate.every=0"),
    *("replay.batch=2", "replay.length=8", "log.every=32", "tracking.mlflow=false"),
]


def blocks(language: str = "") -> list[str]:
    """Fenced blocks of README in one language, in order."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    return [text for name, text in fenced if name == language]


def trained(*overrides: str) -> list[dict[str, Any]]:
    """The metrics of `nested train`, a process of its own, with overrides."""
    command = [sys.executable, "-m", "experiments", "train", *overrides]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    (run,) = Path("runs").iterdir()
    assert (run / "report.png").read_bytes().startswith(b"\x89PNG")
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]


def test_the_commands_stand_in_blocks_of_their_own():
    commands = [block.strip() for block in blocks()]
    assert commands[:2] == [TRAIN, TEST]
    assert DEVELOP in commands


def test_ci_and_make_do_what_readme_says():
    ci = (ROOT / ".ci" / "run").read_text("utf-8")
    assert "pip install" in ci and "-c constraints.txt -e '.[dev]'" in ci
    assert "make check" in ci
    done = subprocess.run(
        ["make", "--no-print-directory", "-n", "-C", str(ROOT), "check", "PYTHON=python"],
        capture_output=True,
        text=True,
    )
    tools = [line.split()[2] for line in done.stdout.splitlines() if line.startswith("python -m")]
    assert tools == ["ruff", "ruff", "pyright", "experiments", "pytest"], done.stderr


@pytest.mark.parametrize("text", blocks("yaml"))
def test_schedules_load(text: str):
    Path("schedule.yaml").write_text(text, encoding="utf-8")
    levels = load_config("schedule.yaml").tree()["timescales"]["levels"]
    assert len(levels) == (5 if "k: 5" in text else 3)


@pytest.mark.parametrize("text", blocks("python"))
def test_python_runs(text: str):
    small = json.dumps(SMALL)
    text = re.sub(r'\["seed=1", "frames=24000"\]', small, text)
    done: dict[str, object] = {}
    exec(compile(text, "README.md", "exec"), done)
    if "timescales" in done:
        assert done["moved"] == ["fast", "slow", "average"]
    else:
        assert (Path(str(done["run"])) / "metrics.jsonl").is_file()


def test_documented_commands_exist(capsys: pytest.CaptureFixture[str]):
    usage = next(block for block in blocks() if "nested schedule [" in block)
    lines = {shlex.split(line)[1]: line for line in usage.splitlines()}
    assert list(lines) == list(COMMANDS)
    for name, line in lines.items():
        with pytest.raises(SystemExit) as stop:
            main([name, "--help"])
        shown = capsys.readouterr().out
        assert stop.value.code == 0
        for flag in re.findall(r"--[a-z-]+", line):
            assert flag in shown, f"`nested {name} --help` does not show {flag}"


def test_documented_presets_and_extras_exist():
    named = re.search(r"Presets:\s(.*?);", README, re.DOTALL)
    assert named is not None
    assert set(re.findall(r"`(\w+)`", named[1])) == set(presets())
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    for extra in re.findall(r"\.\[(\w+)\]'", README):
        assert re.search(rf"^{extra} = ", project, re.MULTILINE), f"no extra {extra}"


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert "://" in target or (ROOT / target).exists(), target
    for name in re.findall(r"`((?:docs|tests|experiments)/[\w./]+)`", README):
        assert (ROOT / name).exists(), name


def test_the_first_command_trains():
    metrics = trained(*SMALL)
    assert metrics[-1]["step"] == 96
    names = {name for line in metrics for name in line["metrics"]}
    assert {"eval/normal/return", "loss/policy", "levels/slow/updates"} <= names


@pytest.mark.slow
def test_the_first_command_trains_through_its_phases():
    metrics = trained("frames=2400", "train.prefill=200", "evaluate.every=800")
    phases = {line["metrics"].get("train/phase") for line in metrics}
    assert {0.0, 1.0, 2.0} <= phases
