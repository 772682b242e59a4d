"""A run that is interrupted and resumed equals one that was not, bit for bit.

All of the final checkpoints is compared: weights, optimizers, clocks, partial windows, carries,
environments, generators, the replay, and the lines of the metrics. The runs are tiny: three levels
of periods 1, 2 and 4, one update for each step of two slots from frame 16 on, a replay that wraps.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from experiments import load_config, train
from experiments.benchmarks import kill
from experiments.benchmarks.kill import differences, remains
from experiments.loop import Loop
from experiments.record import CheckpointError, Checkpoints, Run, RunError
from experiments.record.metrics import read

FIELDS = (
    "frames=48 env.num=2 env.time_limit=7 env.workers=inprocess threads=1 device=cpu "
    "model.deter=8 model.hidden=8 model.classes=4 model.stoch=2 model.units=8 model.blocks=2 "
    "agent.horizon=2 agent.layers=1 agent.bins=15 train.ratio=4 train.prefill=16 "
    "replay.capacity=12 replay.batch=2 replay.length=4 log.every=10 checkpoint.every=0 "
    "evaluate.every=0 evaluate.episodes=1 tracking.mlflow=false"
)
FIRST = 16  # the frame of the first update; one more every two frames
LEVELS = "timescales.kind=geometric timescales.base=2 timescales.k=3 timescales.rule.kind=adamw"
MEMORY = "model.memory.kind=gated_delta model.memory.dim=8"
SHIFT = "env.contexts=[normal,flipped,long]"
CARTPOLE = "env.id=CartPole-v1 env.contexts=[]"
TASKS = "env.id=MiniGrid3-v0 env.contexts=[simple,lava,doorkey] env.image_size=16"
MAIN = f"{SHIFT} {LEVELS} {MEMORY}"
OTHERS = {
    "laprop": f"{SHIFT} {LEVELS} {MEMORY} timescales.rule.kind=laprop replay.kind=reservoir",
    "chance": f"{SHIFT} timescales.kind=cls_er timescales.plastic_p=0.5 model.memory.kind=none",
    "ewc": f"{SHIFT} timescales.kind=ewc timescales.n=5 timescales.weight=100 replay.kind=matching "
    "replay.rollout=8 replay.capacity=32 evaluate.plasticity=true model.memory.kind=none",
    "muon": f"{CARTPOLE} {LEVELS} timescales.rule.kind=muon model.memory.kind=delta",
    "m3": f"{CARTPOLE} {LEVELS} {MEMORY} timescales.rule.kind=m3 model.memory.forget=never",
    "tasks": f"{TASKS} {LEVELS} {MEMORY}",
}


class Interrupted(Exception):
    """Stands in for a kill."""


@pytest.fixture(autouse=True)
def lean(monkeypatch: pytest.MonkeyPatch):
    """Runs draw no pictures and do not ask git for the revision."""
    monkeypatch.setattr(Loop, "draw", lambda loop, finished: None)
    monkeypatch.setattr("experiments.record.run.revision", lambda: None)


def configure(root: Path, fields: str):
    return load_config("default", [*f"{FIELDS} {fields}".split(), f"tracking.root={root}"])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Trains a configuration in one piece, once for all tests."""
    done: dict[str, Path] = {}

    def run(fields: str) -> Path:
        if fields not in done:
            done[fields] = train(configure(tmp_path_factory.mktemp("whole"), fields))
        return done[fields]

    return run


def interrupt(monkeypatch: pytest.MonkeyPatch, start: Callable[[], Path], update: int) -> None:
    """Run until the backward pass of one update, which never comes."""
    module = sys.modules["experiments.train"]
    learn = vars(module)["learn"]

    def learn_until(loop: Loop, measure: bool = False):
        if loop.updates + 1 == update:
            raise Interrupted
        return learn(loop, measure)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(module, "learn", learn_until)
        start()


def run_in_pieces(
    monkeypatch: pytest.MonkeyPatch, fields: str, save_after: int, interrupt_at: int
) -> Path:
    """Interrupted at an update, with a checkpoint after an earlier one; resumed to the end."""
    frame = FIRST + 2 * (save_after - 1)
    config = configure(Path("pieces"), f"{fields} checkpoint.every={frame}")
    interrupt(monkeypatch, lambda: train(config), interrupt_at)
    (path,) = Path("pieces").iterdir()
    loaded = Checkpoints(path / "checkpoints").load()
    assert loaded is not None and loaded.step == frame
    levels = loaded.state["timescales"]["levels"]
    assert levels["slow"]["gathered"] == save_after % 4
    assert bool(levels["slow"]["window"]) == (save_after % 4 > 0)
    return train(config, resume=path)


@pytest.mark.parametrize("phase", [1, 2, 3, 4])
def test_every_phase_of_a_window(monkeypatch, whole, phase):
    path = run_in_pieces(monkeypatch, MAIN, save_after=4 + phase, interrupt_at=6 + phase)
    assert differences(path, whole(MAIN)) == []
    assert Run.open(path).state == "finished"


@pytest.mark.parametrize("phase", [1, 3])
def test_any_environment_in_the_middle_of_its_episodes(monkeypatch, whole, phase):
    fields = f"{CARTPOLE} {LEVELS} {MEMORY} replay.kind=reservoir"
    path = run_in_pieces(monkeypatch, fields, save_after=4 + phase, interrupt_at=6 + phase)
    assert differences(path, whole(fields)) == []


@pytest.mark.parametrize("fields", OTHERS.values(), ids=OTHERS)
def test_other_rules_clocks_and_memories(monkeypatch, whole, fields):
    config = configure(Path("pieces"), f"{fields} checkpoint.every=26")
    interrupt(monkeypatch, lambda: train(config), 9)
    (path,) = Path("pieces").iterdir()
    assert differences(train(config, resume=path), whole(fields)) == []


def test_interrupted_again_and_again(monkeypatch, whole):
    """Before the first update, twice from the same checkpoint, and while one is written."""
    config = configure(Path("pieces"), f"{MAIN} checkpoint.every=10")
    interrupt(monkeypatch, lambda: train(config), 1)
    (path,) = Path("pieces").iterdir()
    for update in (4, 4, 15):
        interrupt(monkeypatch, lambda: train(config, resume=path), update)
    with monkeypatch.context() as patch, pytest.raises(CheckpointError):
        patch.setattr("experiments.record.checkpoint._manifest", torn)
        train(config, resume=path)
    assert differences(train(config, resume=path), whole(MAIN)) == []


def torn(body: dict):
    def write(path: Path) -> None:
        path.write_text("{")
        raise OSError("the disk is gone")

    return write


def test_killed_before_the_first_checkpoint(monkeypatch, whole):
    config = configure(Path("pieces"), MAIN)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(Loop, "save", fail)
        train(config)
    (path,) = Path("pieces").iterdir()
    assert len(read(path / "metrics.jsonl")) == 1
    assert differences(train(config, resume=path), whole(MAIN)) == []


def fail(loop: Loop) -> None:
    raise Interrupted


def test_a_finished_run_stays_as_it_is(whole):
    path = whole(MAIN)
    before = remains(path)
    train(load_config(str(path), []), resume=path)
    assert remains(path) == before


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("model.units=16", "state_dict"),
        ("env.num=1", "slots"),
        ("replay.length=6", "replay"),
        ("timescales.k=2", "the saved levels are"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(whole, change, told):
    path = whole(MAIN)
    with pytest.raises(RunError, match=rf"does not fit the configuration: .*{told}.*; resume"):
        train(configure(path.parent, f"{MAIN} {change}"), resume=path)
    assert Run.open(path).state == "finished"


def test_differences_are_found(whole):
    path, other = whole(MAIN), train(configure(Path("other"), f"{MAIN} seed=1"))
    found = differences(path, other)
    for name in ("state.agent.critic", "state.timescales.levels.slow.window", "state.driver.carry"):
        assert any(key.startswith(name) for key in found), name
    assert {"state.generator", "replay.obs.state", "metrics.3.loss/state"} <= set(found)
    assert not any("time/" in key or "wall" in key for key in found)


def test_kills_are_spread_over_the_run_and_follow_from_the_seed():
    kills = kill.plan(20, 4800, seed=0)
    assert kills == kill.plan(20, 4800, seed=0) != kill.plan(20, 4800, seed=1)
    for number, one in enumerate(kills):
        assert number * 4800 * 0.96 / 20 - 1 <= one.frame <= (number + 1) * 4800 * 0.96 / 20
    assert {one.moment for one in kills} == {"starting", "learning", "writing"}


@pytest.mark.slow
def test_a_killed_process_goes_on(capsys):
    """SIGKILL while it starts, while it learns and while it writes a checkpoint."""
    assert kill.main(["--kills", "3", "--frames", "1200", "--folder", "both"]) == 0
    assert "equal: state, replay and metrics after 3 kills" in capsys.readouterr().out
