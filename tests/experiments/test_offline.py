"""The offline pipeline: data, phases, gates, resume, the command line."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from agents.offline import Experience
from experiments import cli
from experiments.config import ConfigError
from experiments.config.dreamer4 import is_dreamer4, load_dreamer4
from experiments.data.clips import Clips
from experiments.data.expert import expert_envs
from experiments.data.lessons import Lessons, Parts
from experiments.offline import learn
from experiments.offline_loop import Work
from experiments.policies import play
from experiments.predict_offline import FILE, load
from experiments.record import Run, RunError, phases
from experiments.record.metrics import read

from .tiny_offline import TINY, configure, recorded, reported

LATER = ("dynamics", "finetune", "imagine")


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return recorded(tmp_path_factory.mktemp("room"))


ROUNDS = [
    "data.labelled=0.7",
    "phases.finetune.evaluate=1",  # resumed in between: what was reported is reported once
    *("online.rounds=2", "online.episodes=2", "online.finetune=3", "online.imagine=2"),
    *("phases.finetune.batch=4", "phases.imagine.batch=4"),
]


@pytest.fixture(scope="module")
def whole(room: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two rounds that nothing interrupted."""
    return learn(configure(room, *ROUNDS, f"tracking.root={tmp_path_factory.mktemp('whole')}"))


def test_all_phases_end_to_end(whole: Path):
    rows = read(whole / "metrics.jsonl")
    names = {name for row in rows for name in row.metrics}
    assert {"gate/tokenizer_psnr", "gate/dynamics_next_frame", "gate/finetune_surprise"} <= names
    assert {f"eval/{x}/return" for x in ("random", "imitation", "imagination")} <= names
    assert {"loss/tokenizer_mse", "loss/finetune_policy", "loss/imagine_value"} <= names
    assert {"rms/tokenizer_mse", "rms/dynamics_dynamics", "rms/finetune_reward"} <= names
    assert "rms/imagine_policy" not in names  # losses in imagination are not scaled
    assert "round/gap" in names and "round/hallucination" not in names  # a room without recipes
    assert len({name.split("/")[0] for name in names}) <= 8
    assert json.loads((whole / "run.json").read_text())["state"] == "finished"
    assert is_dreamer4(whole)


@pytest.mark.parametrize("at", [(2, 2), (5, 2)], ids=["in a phase", "in a round"])
def test_a_run_killed_anywhere_goes_on_bit_for_bit(
    room: Path, monkeypatch: pytest.MonkeyPatch, whole: Path, at: tuple[int, int]
):
    def die(work: Work, *rest: object) -> None:
        if (work.phase, work.update) == at:
            raise KeyboardInterrupt
        learned(work, *rest)  # type: ignore[arg-type]

    learned = Work.learn
    with monkeypatch.context() as patch:
        patch.setattr(Work, "learn", die)
        with pytest.raises(KeyboardInterrupt):
            learn(configure(room, *ROUNDS, "tracking.root=cut"))
    (cut,) = Path("cut").iterdir()
    learn(load_dreamer4(cut), cut)
    assert reported(whole) == reported(cut)


def test_evaluations_within_a_phase_make_curves_and_change_nothing(room: Path):
    often = [f"phases.{phase}.evaluate=2" for phase in ("finetune", "imagine")]
    updates = [f"phases.{phase}.updates=5" for phase in ("finetune", "imagine")]
    plain, seen = (learn(configure(room, *updates, *more)) for more in ([], often))
    found = {
        name: [step for step, metrics in reported(seen) if f"eval/{name}/return" in metrics]
        for name in ("imitation", "imagination")
    }
    assert found == {"imitation": [8, 10, 11], "imagination": [13, 15, 16]}
    between = [8, 10, 13, 15]
    judged = [r for r in reported(seen) if r[0] in between and "train/update" not in r[1]]
    assert len(judged) == 4
    assert reported(plain) == [row for row in reported(seen) if row not in judged]
    figure = phases.draw(phases.gather(seen))
    drawn = {line.get_color(): np.size(line.get_xdata()) for line in figure.axes[4].lines}
    assert drawn[phases.RETURNS["imitation"]] == drawn[phases.RETURNS["imagination"]] == 3


# ---- offline, then online ------------------------------------------------------------------------
def test_rounds_act_and_are_measured(whole: Path):
    rows = [metrics for _, metrics in reported(whole)]
    assert [row["round/number"] for row in rows if "round/gap" in row] == [0, 1, 2]
    for row in rows:
        if "round/gap" in row:
            assert row["round/gap"] == row["round/imagined_return"] - row["round/real_return"]
    acted = [Clips.open(whole / "acted" / f"{i:03d}") for i in (1, 2)]
    found = [row["round/acted_frames"] for row in rows if "round/acted_frames" in row]
    assert found == [clips.frames for clips in acted]
    assert [len(clips.episodes) for clips in acted] == [2, 2]
    assert [row["eval/imitation/return"] for row in rows if "eval/imitation/return" in row]
    assert read(whole / "metrics.jsonl")[-1].step == load_dreamer4(whole).frames == 12 + 2 * 5


def test_what_was_acted_is_learned_from(room: Path, whole: Path, monkeypatch: pytest.MonkeyPatch):
    """Its rows teach the dynamics and never the policy; imagination starts from them too."""
    drawn: list[tuple[str, list[int], list[bool], list[bool]]] = []
    settled: list[list[bool]] = []
    draw = Lessons.experience

    def experience(lessons: Lessons, parts: Parts, length: int) -> Experience:
        found = draw(lessons, parts, length)
        sizes = [count for _, count in parts]
        kind = "acted" if parts[-1][0] is lessons.acted else "recorded"
        drawn.append((kind, sizes, found.imitate.tolist(), found.predict.tolist()))
        settled.append(found.settled.tolist())
        return found

    monkeypatch.setattr(Lessons, "experience", experience)
    more = load_dreamer4(whole, ["online.rounds=3"])
    shutil.copytree(whole, "more")
    Path("more/acted/003/00000").mkdir(parents=True)  # begun, and killed before its index
    learn(more, Path("more"))
    assert load_dreamer4(Path("more")).online.rounds == 3  # the next to go on finds it
    no, yes = False, True
    batch = ("acted", [2, 1, 1], [yes, yes, no, no], [no, no, yes, yes])
    assert drawn[:3] == [batch] * 3
    assert settled[:3] == [batch[2]] * 3  # what is imitated is seen as in acting
    assert [row[:2] for row in drawn[-2:]] == [("acted", [2, 2])] * 2
    gates = [row for row in drawn if row[0] == "recorded"]
    assert [row[1] for row in gates] == [[64]]


# ---- a run is a product --------------------------------------------------------------------------
def test_a_run_is_evaluated_without_its_data(
    room: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    shutil.copytree(whole, "runs/moved")
    text = Path("runs/moved/config.yaml").read_text()
    Path("runs/moved/config.yaml").write_text(text.replace(str(room), "gone"))
    assert cli.main(["eval", "moved", "--episodes", "3"]) == 0
    found = dict(line.split() for line in capsys.readouterr().out.splitlines())
    for name in ("random", "imitation", "imagination"):
        assert {f"eval/{name}/{key}" for key in ("return", "error", "score")} <= found.keys()
    assert cli.main(["eval", "moved", "--fast", "off"]) == 2
    assert "no fast memory" in capsys.readouterr().err
    assert cli.main(["train", "--resume", "moved"]) == 2
    assert "nested data record" in capsys.readouterr().err


def test_environments_are_checked_before_a_run(room: Path, capsys: pytest.CaptureFixture[str]):
    start = ["train", "dreamer4", f"data.path={room}"]
    assert cli.main([*start, "env.id=MiniGrid-Emty-5x5-v0"]) == 2
    assert "did you mean MiniGrid-Empty-5x5-v0?" in capsys.readouterr().err
    assert cli.main([*start, "env.id=Recipes-v0", "env.image_size=16"]) == 2
    assert "does not fit the data" in capsys.readouterr().err
    assert cli.main(["data", "record", "new", "env.id=Recipes-v0", "env.kwargs.size=9"]) == 2
    assert "it takes size: 3 to 6" in capsys.readouterr().err
    assert cli.main(["data", "record", "new", "env.id=CartPole-v1", "env.pixels=false"]) == 2
    assert "MiniGrid and Recipes-v0" in capsys.readouterr().err
    assert not Path("new").exists()


def test_a_run_without_a_policy_says_so(room: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(RunError):
        learn(configure(room, "phases.tokenizer.gate=90"))
    (path,) = Path("runs").iterdir()
    assert cli.main(["eval", str(path)]) == 2
    error = capsys.readouterr().err
    assert "phase tokenizer" in error and f"nested train --resume {path}" in error


def test_the_report_shows_phases_rounds_and_what_is_imagined(whole: Path):
    shutil.copytree(whole, "run")
    work = Work.resume(load_dreamer4(whole), Path("run"))
    work.lessons.begin(2, None)
    work.draw()
    work.run.finish()
    assert Path("run/report.png").read_bytes().startswith(b"\x89PNG")
    found = load(Path("run") / FILE)
    assert found.truth["image"].shape == found.model["image"].shape == (3, 16, 16, 16, 3)
    figure = phases.draw(phases.gather(Path("run")))
    titles = [axes.get_title(loc="left") or axes.get_title() for axes in figure.axes]
    assert titles[0].startswith("tokenizer\npsnr") and "offline, then 2 rounds" in words(figure)
    gap = figure.axes[6]
    assert [np.size(line.get_xdata()) for line in gap.lines] == [3, 3]
    empty = phases.draw(phases.Facts(Run.open(whole), {}, [], None))
    assert words(empty).count("nothing recorded yet") == 9
    begun = words(phases.draw(phases.Facts(Run.open(whole), {"start": "runs/one"}, [], None)))
    assert begun.count("nothing recorded yet") == 7 and "begun with one" in begun


def words(figure: Figure) -> str:
    texts = [*figure.texts, *(text for axes in figure.axes for text in axes.texts)]
    return "\n".join(text.get_text() for text in texts)


def test_a_gate_stops_the_run_and_more_updates_go_on_and_are_told(
    room: Path, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(RunError, match=r"phase tokenizer ends with psnr=.*updates=6"):
        learn(configure(room, "phases.tokenizer.gate=90"))
    (path,) = Path("runs").iterdir()
    assert json.loads((path / "run.json").read_text())["state"] == "stopped"
    more = ["phases.tokenizer.updates=4", "phases.tokenizer.gate=0"]
    more += [f"phases.{phase}.updates=0" for phase in LATER]
    assert cli.main(["train", "--resume", str(path), *more]) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("changed")]
    assert told == [
        *(f"changed phases.{phase}.updates: 3 -> 0" for phase in LATER),
        "changed phases.tokenizer.gate: 90.0 -> 0.0",
        "changed phases.tokenizer.updates: 3 -> 4",
    ]
    assert read(path / "metrics.jsonl")[-1].step == 4


def test_the_expert_solves_rooms_with_doors(room: Path):
    env = configure(room, "env.id=MiniGrid-DoorKey-5x5-v0", "env.time_limit=0").env
    envs, policy = expert_envs(env, 2, noise=0.0)
    assert min(play(envs, policy, 4)) > 0.9
    envs.close()


@pytest.mark.parametrize(
    ("change", "way_out"),
    [
        ("phases.tokenizer.updat=3", "did you mean phases.tokenizer.updates"),
        ("dynamics.k_max=6", "power of two"),
        ("dynamics.spatial=3", "divisor"),
        ("tokenizer.trunk.heads=3", "powers of two"),
    ],
)
def test_mistakes_name_the_way_out(change: str, way_out: str):
    with pytest.raises(ConfigError, match=way_out):
        load_dreamer4(None, [*TINY, change])
