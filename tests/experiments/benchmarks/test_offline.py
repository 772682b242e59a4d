"""Imagination against imitation from recordings alone: one world model, pairs, a verdict."""

import json
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.benchmarks import offline, sharing
from experiments.benchmarks.recorded import board as offline_board
from experiments.benchmarks.recorded import page as offline_page
from experiments.benchmarks.recorded import play as offline_play
from experiments.benchmarks.recorded import told as offline_told
from experiments.benchmarks.recorded.play import Outcome
from experiments.config import ConfigError
from experiments.config.dreamer4 import Dreamer4Config, load_dreamer4
from experiments.data.clips import Clips
from experiments.record import Run, RunError
from experiments.record.metrics import Metrics

SMOKE = ["--preset", "recipes", "--tier", "smoke", "--episodes", "3"]


def asked(*words: str) -> Namespace:
    return offline.checked(offline.parser().parse_intermixed_args([*SMOKE, *words]))


# ---- the whole suite ---------------------------------------------------------------------------
@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished smoke run with one seed."""
    root = tmp_path_factory.mktemp("offline")
    words = [*SMOKE, "--root", str(root), "--seeds", "1", "--results", str(root / "page.md")]
    assert offline.main(words) == 0
    return root


def folder(root: Path, name: str) -> Path:
    (path,) = (root / name).iterdir()
    return path


def test_a_seed_starts_from_the_world_model(done: Path):
    base, seed = (load_dreamer4(folder(done, name)) for name in ("base", "seed-0"))
    assert seed.start == str(folder(done, "base"))
    assert [base.phases.finetune.updates, base.phases.imagine.updates] == [0, 0]
    assert base.data == seed.data and seed.online.rounds == 0
    (one,) = offline.collect(asked("--root", str(done), "--seeds", "1"), folder(done, "base"))
    assert one.curves["imitation"][0].tolist() == [1, 2]
    assert one.curves["imagination"][0].tolist() == [3, 4]
    assert {name: len(values) for name, values in one.returns.items()} == {
        "imitation": 3, "imagination": 3,
    }  # fmt: skip
    assert (done / "offline.png").read_bytes().startswith(b"\x89PNG")
    page = (done / "page.md").read_text()
    assert "<!-- offline Recipes-v0 -->" in page and "| imagination - imitation | +" in page


def test_a_repeated_command_runs_nothing_and_more_seeds_are_added(
    done: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    before = (done / "offline.json").read_text()
    monkeypatch.setattr(offline_page, "draw", lambda *_: None)
    words = [*SMOKE, "--root", str(done), "--json", "--seeds"]
    with monkeypatch.context() as patch:
        patch.setattr("experiments.offline.learn", lambda *_: pytest.fail("it is finished"))
        patch.setattr(offline_play, "play", lambda *_: pytest.fail("they have played"))
        assert offline.main([*words, "1"]) == 0
    assert (done / "offline.json").read_text() == before
    capsys.readouterr()
    assert offline.main([*words, "2"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["seeds"] == [0, 1] and len(list((done / "seed-0").iterdir())) == 1
    demonstrations = result["return"]["policies"]["demonstrations"]
    assert demonstrations["episodes"] == len(Clips.open(done / "data").episodes)
    assert result["success"]["policies"]["expert"]["value"] == 1.0
    states = [offline_board.state_of(done / f"seed-{seed}", seed) for seed in range(3)]
    assert [state.doing for state in states] == ["done", "done", "waits"]


def test_everyone_plays_the_same_episodes(done: Path, monkeypatch: pytest.MonkeyPatch):
    made: list[tuple[Any, ...]] = []
    real = offline_play.make_envs

    def make_envs(env: Any, num: int, seed: int):
        made.append((env.id, env.time_limit, num, seed))
        return real(env, num, seed)

    monkeypatch.setattr(offline_play, "make_envs", make_envs)
    config = load_dreamer4(folder(done, "seed-0"))
    scripted = offline_play.scripted(config, 3)
    learned = offline_play.learned(folder(done, "seed-0"), 3)
    assert made == 3 * [("Recipes-v0", 20, 3, offline_play.SEED)]
    kept = json.loads((folder(done, "seed-0") / offline_play.FILE).read_text())["returns"]
    assert {name: values.tolist() for name, values in learned.items()} == kept
    assert scripted["expert"].tolist() == [1.0, 1.0, 1.0]


def test_what_was_played_is_played_again_for_other_episodes(tmp_path: Path):
    file, made = tmp_path / "played.json", []

    def make() -> offline_play.Returns:
        made.append(1)
        return {"random": np.array([0.25, 1.0])}

    for episodes, times in ((2, 1), (2, 1), (3, 2)):
        found = offline_play.kept(file, {"episodes": episodes}, make)
        assert found["random"].tolist() == [0.25, 1.0] and len(made) == times


def test_each_slot_plays_as_many():
    assert [offline_play.whole(n) for n in (3, 25, 26, 100, 110)] == [3, 25, 50, 100, 125]


def test_processes_share_the_seeds_and_one_that_dies_is_replaced(
    done: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    started: list[list[str]] = []

    class Dead:
        def __init__(self, command: list[str], **_: Any):
            started.append(command)

        def poll(self) -> int:
            return 1

        wait = terminate = poll

    monkeypatch.setattr(sharing, "subprocess", Namespace(Popen=Dead))
    monkeypatch.setattr(offline_page, "draw", lambda *_: None)
    assert offline.main([*SMOKE, "--root", str(done), "--seeds", "1", "--jobs", "2"]) == 0
    assert [command[-1] for command in started] == ["--worker"]  # no more than there are seeds
    told = capsys.readouterr()
    assert "seed 0: done" in told.err and "1 seed: too few for a verdict" in told.out


def test_a_seed_that_is_taken_is_waited_for(done: Path, monkeypatch: pytest.MonkeyPatch):
    pauses: list[float] = []
    words = asked("--root", str(done), "--seeds", "1")
    taken = sharing.claim(done / "seed-0")
    assert taken.__enter__()

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        taken.__exit__(None, None, None)

    monkeypatch.setattr(sharing.time, "sleep", pause)
    assert [one.seed for one in offline.collect(words, folder(done, "base"))] == [0]
    assert pauses == [sharing.PAUSE]


# ---- configurations ----------------------------------------------------------------------------
def test_the_world_model_keeps_its_gates_and_seeds_have_none():
    words = asked("--tier", "laptop", "--root", "r", "phases.imagine.gate=0.5")
    base, seed = offline.base_config(words), offline.seed_config(words, Path("r/base/x"), 3)
    assert (base.phases.tokenizer.gate, base.phases.dynamics.gate) == (26.0, 1.0)
    assert base.phases.finetune.gate is base.phases.imagine.gate is None
    assert seed.phases.finetune.gate is seed.phases.imagine.gate is None
    assert (seed.seed, seed.start, seed.threads) == (3, "r/base/x", 1)
    assert (seed.phases.finetune.evaluate, seed.phases.imagine.evaluate) == (187, 62)
    assert seed.phases.finetune.updates == 1500


def test_what_changes_behaviour_alone_shares_the_world_model():
    base = offline.base_config(asked())
    alone = ["phases.finetune.updates=9", "phases.imagine.critic=1", "agent.beta=0.1", "episodes=9"]
    assert offline.base_config(asked(*alone)) == base
    for other in ("dynamics.apart=0.5", "agent.bins=11", "phases.dynamics.updates=9"):
        assert offline.base_config(asked(other)) != base
    assert offline.seed_config(asked(*alone), Path("b"), 0).agent.beta == 0.1
    threads = base.model_copy(update={"threads": 7})
    path = Path("run")
    path.mkdir()
    (path / "config.yaml").write_text(threads.dump())
    assert offline.is_of(path, base)
    assert not offline.is_of(path, base.model_copy(update={"seed": 1}))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--seeds", "0"], "give 1 or more"),
        (["--noise", "1.5"], "give 0 to 1"),
        (["--results", "nowhere/page.md"], "make the folder"),
        (["seed=3"], "--seeds"),
        (["start=runs/x"], "own world model"),
        (["online.rounds=1"], "from recordings alone"),
        (["--preset", "cartpole"], "does not learn from recordings"),
        (["--preset", "nowhere"], "no such preset or file"),
        (["agent.bet=1"], "agent.bet"),
        (["env.id=CartPole-v1"], "the expert knows"),
    ],
)
def test_a_mistake_is_told_before_anything_is_run(words: list[str], told: str):
    with pytest.raises(ConfigError) as caught:
        offline.main([*SMOKE, "--root", "r", *words])
    assert told in str(caught.value)
    assert not list(Path().glob("r/*/*/run.json"))


# ---- runs --------------------------------------------------------------------------------------
def unfinished(config: Dreamer4Config, checkpoint: bool) -> Path:
    run = Run.create(config, Path(config.tracking.root))
    run.start()
    run.finish("stopped")
    run.checkpoints.mkdir()
    if checkpoint:
        (run.checkpoints / "1").mkdir()
    return run.path


@pytest.mark.parametrize("checkpoint", [True, False])
def test_a_run_that_was_killed_goes_on(checkpoint: bool, monkeypatch: pytest.MonkeyPatch):
    config, given = offline.base_config(asked("--root", "r")), []
    half = unfinished(config, checkpoint)
    monkeypatch.setattr("experiments.offline.learn", lambda c, path: given.append(path) or half)
    assert offline.finished(config) == half
    assert given == [half if checkpoint else None]
    other = config.model_copy(update={"seed": 5})
    offline.finished(other)
    assert given[-1] is None
    Run.open(half).start()
    with pytest.raises(ConfigError, match="in another process"):
        offline.finished(config)


def test_a_gate_that_is_missed_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch):
    def learn(*_: object) -> Path:
        raise RunError("phase tokenizer ends with psnr=9; go on with: nested train --resume X a=2")

    monkeypatch.setattr("experiments.offline.learn", learn)
    with pytest.raises(ConfigError) as caught:
        offline.finished(offline.base_config(asked("--root", "r")))
    assert caught.value.problem == "phase tokenizer ends with psnr=9"
    assert caught.value.suggestion.endswith("a=2, then repeat this command with the same fields")


def test_data_of_another_kind_are_refused(done: Path):
    same = asked("--root", str(done), "--noise", "0.3", "--frames", "100")
    offline.demonstrate(offline.base_config(same), same)
    for words, told in (
        (["--noise", "0.5"], "recorded with 0.3"),
        (["--frames", "200"], "recorded with 100"),
        (["env.time_limit=30"], "'time_limit': 20"),
    ):
        other = asked("--root", str(done), *words)
        with pytest.raises(ConfigError, match="name another --root") as caught:
            offline.demonstrate(offline.base_config(other), other)
        assert told in str(caught.value)
    shutil.copytree(done / "data", "elsewhere")
    Path("elsewhere", offline.NOTE).unlink()
    own = asked("--root", str(done), "--noise", "0.5", "data.path=elsewhere")
    offline.demonstrate(offline.base_config(own), own)  # nobody knows how they were recorded
    assert offline.facts(own, offline.base_config(own), folder(done, "base"))["noise"] is None


def test_a_board_reads_what_a_run_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "seed-0" / "run"
    path.mkdir(parents=True)
    metrics, seen = Metrics(path / "metrics.jsonl"), []
    board = offline_board.Board(tmp_path, 1)
    for found in (
        {"eval/random/return": 0.1},
        {"train/phase": 2, "train/update": 1200},
        {"eval/imitation/return": 0.5, "train/update": 1300},
        {"train/phase": 3, "train/update": 1},
        {"round/number": 0},
    ):
        metrics.write(1, found)
        seen.append(offline_board.state_of(tmp_path / "seed-0", 0))
        board.show()
    assert [s.doing for s in seen] == ["starts", "finetune", "finetune", "imagine", "plays"]
    assert [s.update for s in seen[:3]] == ["", "1,200", "1,300"]
    assert seen[-1].returns == ("0.500", "")
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "seed 0: starts  ", "seed 0: finetune  ", "seed 0: imagine  imitation 0.500",
        "seed 0: plays  imitation 0.500",
    ]  # fmt: skip
    assert offline_board.table(seen).row_count == 5


# ---- numbers -----------------------------------------------------------------------------------
FACTS = {
    "env": "MiniGrid-Empty-5x5-v0", "frames": 20_031, "episodes": 2_000, "noise": 0.6,
    "played": 4, "evaluation": 32, "measures": ["return", "success"], "commit": "0123456789abcdef",
    "world": {"psnr": 27.1, "next_frame": 0.31},
}  # fmt: skip
OTHERS = {"demonstrations": np.array([0.8, 0.6]), "random": np.array([0.0, 0.4])}


def outcomes(gains: list[float], start: float = 0.5) -> list[Outcome]:
    """Seeds of four episodes, one of which fails before imagination and none after it."""
    found = []
    for seed, gain in enumerate(gains):
        before = start + 0.1 * seed
        returns = {
            "imitation": before * np.array([0.0, 4 / 3, 4 / 3, 4 / 3]),
            "imagination": np.full(4, before + gain),
        }
        curves = {
            "imitation": (np.array([5.0, 10.0]), np.array([0.1, before])),
            "imagination": (np.array([14.0, 18.0]), np.array([before, before + gain])),
        }
        found.append(Outcome(seed, returns, curves, before + gain + 0.25, (0.2, 0.4)))
    return found


def told(gains: list[float]) -> dict[str, Any]:
    return offline_told.summary(FACTS, OTHERS, outcomes(gains), np.random.default_rng(0))


def test_a_summary_pairs_seeds():
    result = told([0.2, 0.3, -0.05, 0.0])
    row = result["return"]["difference"]
    assert row["by seed"] == pytest.approx([0.2, 0.3, -0.05, 0.0])
    assert row["value"] == pytest.approx(0.1125) and row["low"] < 0 < row["high"]
    assert (row["up"], row["down"]) == (2, 1)
    policies = result["success"]["policies"]
    assert policies["imitation"]["by seed"] == [0.75] * 4
    assert policies["imagination"]["value"] == 1.0 and policies["random"]["value"] == 0.5
    assert policies["demonstrations"]["episodes"] == 2
    gap = result["gap"]["difference"]
    assert (gap["low"], gap["value"], gap["high"]) == pytest.approx((0.25, 0.25, 0.25))
    random = result["return"]["policies"]["random"]  # an interval over its two episodes
    assert (random["low"], random["value"], random["high"]) == pytest.approx((0.0, 0.2, 0.4))
    json.dumps(result)


@pytest.mark.parametrize(
    ("gains", "said"),
    [
        ([0.1, 0.2, 0.15], "Imagination improves on imitation"),
        ([-0.1, -0.2, -0.15], "Imagination is worse than imitation"),
        ([0.1, -0.2, 0.15], "Imagination shows no difference to imitation"),
        ([0.1, 0.2], "2 seeds: too few for a verdict"),
        ([0.1], "1 seed: too few"),
    ],
)
def test_the_verdict_is_read_from_the_interval(gains: list[float], said: str):
    assert told(gains)["verdict"].startswith(said)
    hint = "this is a hint" in told(gains)["verdict"]
    assert hint == (len(gains) >= offline_told.FEW)
    assert "hint" not in told(gains * 10)["verdict"]


def test_text_and_page_say_the_same(tmp_path: Path):
    result = told([0.1, 0.2, 0.15])
    text, page = offline_told.table(result), tmp_path / "page.md"
    for expected in (
        "20,031 frames of 2,000 demonstrations, noise 0.6; one world model, 3 seeds",
        "+0.150 [+0.100, +0.200]",
        "0     0.500      0.600        +0.100  0.750 -> 1.000  0.850",
        "exploitation gap +0.250",
        "frames at 27.1 dB, the next one at 0.31 of",
    ):
        assert expected in text
    offline_told.put(page, "nested bench offline", result)
    offline_told.put(page, "another", {**result, "env": "Recipes-v0"})
    offline_told.put(page, "again", result)
    written = page.read_text()
    assert written.count("<!-- offline MiniGrid-Empty-5x5-v0 -->") == 1
    assert "`again`; commit 0123456789ab." in written and "`nested bench offline`" not in written
    assert "| **+0.150 [+0.100, +0.200]** |" in written and "`another`" in written
    assert "expert" not in text  # there is none here


# ---- the picture -------------------------------------------------------------------------------
def test_imagination_goes_on_where_imitation_ended():
    one, two = outcomes([0.1, 0.2])
    x, y = offline_page.joined(one, "imagination", 10)
    assert x.tolist() == [10, 14, 18] and y.tolist() == pytest.approx([0.5, 0.5, 0.6])
    x, values = offline_page.common([one.curves["imitation"], (np.array([10.0]), np.array([7.0]))])
    assert x.tolist() == [10] and values.tolist() == [[0.5], [7.0]]
    x, _ = offline_page.joined(two, "imitation", 5)
    assert x.tolist() == [5]


@pytest.mark.parametrize("measures", [["return"], ["return", "success"]])
def test_a_picture_has_a_panel_for_each_measure(measures: list[str], monkeypatch, tmp_path: Path):
    from matplotlib.figure import Figure

    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    facts, found = {**FACTS, "measures": measures}, outcomes([0.1, -0.2, 0.15])
    result = offline_told.summary(facts, OTHERS, found, np.random.default_rng(0))
    offline_page.draw(result, found, (10, 8), tmp_path / "offline.png")
    learning, *pairs = drawn[0].axes
    assert [axes.get_title(loc="left").strip() for axes in pairs] == [
        f"{name.title()} in the end" for name in measures
    ]
    assert learning.get_xlim() == (0, 18)
    assert pairs[0].get_xlabel() == "up in 2 of 3 seeds"
    slopes = [line for line in pairs[0].lines if np.array_equal(line.get_xdata(), [0, 1])]
    lost = [line for line in slopes if line.get_color() == offline_page.WORSE]
    assert len(lost) == 1 and lost[0].get_ydata() == pytest.approx([0.6, 0.4])
