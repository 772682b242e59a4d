"""Runs that begin with another's world model: whose weights, what is skipped, what is refused."""

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from experiments import cli
from experiments.config import ConfigError
from experiments.config.dreamer4 import load_dreamer4
from experiments.offline import learn
from experiments.offline_loop import Work
from experiments.record import Checkpoints
from experiments.record.metrics import read
from worldmodel.shortcut import Clip

from .tiny_offline import configure, recorded, reported

Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return recorded(tmp_path_factory.mktemp("room"))


@pytest.fixture(scope="module")
def taught(room: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose world model others begin with; it went on to imitate."""
    root = tmp_path_factory.mktemp("taught")
    return learn(configure(room, "phases.imagine.updates=0", f"tracking.root={root}"))


def weights_of(path: Path) -> Weights:
    loaded = Checkpoints(path / "checkpoints").load()
    assert loaded is not None
    return loaded.state["agent"]


def world_of(weights: Weights) -> Weights:
    return {k: w for k, w in weights.items() if k.startswith(("tokenizer.", "dynamics."))}


def begin(room: Path, taught: Path, *changes: str) -> Work:
    """A run that has begun and learned nothing yet."""
    return Work.start(configure(room, f"start={taught}", *changes))


def test_a_run_begins_with_the_world_model_and_heads_of_its_own(room: Path, taught: Path):
    old = weights_of(taught)
    first, second = (begin(room, taught, f"seed={seed}") for seed in (1, 2))
    assert first.stage.name == second.stage.name == "finetune" and first.total == 0
    found = [dict(work.agent.state_dict()) for work in (first, second)]
    world = world_of(old)
    assert world.keys() == world_of(found[0]).keys()
    assert float(old["dynamics.norm.square"]) > 0  # running norms too
    for name, weight in world.items():
        assert torch.equal(found[0][name], weight) and torch.equal(found[1][name], weight), name
    for head in ("policy.trunk.", "reward.trunk.", "terminal.", "value."):
        name = next(k for k, w in old.items() if k.startswith(head) and w.dim() == 2)
        three = [weights[name] for weights in (old, *found)]
        assert not any(torch.equal(three[i], three[i - 1]) for i in range(3)), name
    assert float(found[0]["norms.policy.count"]) == 0


def test_its_first_update_sees_that_world_model_and_encodes_nothing_again(
    room: Path, taught: Path, monkeypatch: pytest.MonkeyPatch
):
    seen: list[Weights] = []
    learned = Work.learn

    def look(work: Work, *rest: object) -> None:
        seen.append({k: w.clone() for k, w in work.agent.named_parameters()})
        learned(work, *rest)  # type: ignore[arg-type]

    def encode(*_: object) -> None:
        raise AssertionError("latents of the same data and tokenizer are there")

    monkeypatch.setattr(Work, "learn", look)
    monkeypatch.setattr(Work, "evaluate", lambda work, name: 0.0)  # acting encodes what it sees
    monkeypatch.setattr(Work, "measure", lambda work: None)
    monkeypatch.setattr("worldmodel.Tokenizer.encode_next", encode)
    copy = shutil.copytree(taught, Path("copy"))
    path = learn(configure(room, f"start={copy}", "phases.imagine.updates=0"))
    old = weights_of(taught)
    assert len(seen) == 3 and all(torch.equal(w, old[k]) for k, w in world_of(seen[0]).items())
    assert not all(torch.equal(w, old[k]) for k, w in world_of(seen[1]).items())
    assert read(path / "metrics.jsonl")[-1].step == load_dreamer4(path).frames == 3
    latents = path / "latents" / "00000" / "latents.npy"
    assert latents.stat().st_nlink == 2


def test_seeds_over_one_world_model_know_the_same_actions(room: Path, taught: Path):
    """Else what imitation may not know would have been known to the world model."""
    half = [begin(room, taught, "data.labelled=0.5", f"seed={seed}") for seed in (1, 2)]
    found = [[e.labelled for e in work.lessons.data.episodes] for work in half]
    assert found[0] == found[1] and 0 < sum(found[0]) < len(found[0])


def test_of_other_recordings_no_latents_are_taken(room: Path, taught: Path):
    again = shutil.copytree(room, Path("data"))  # copied now: younger than the latents
    (again / "index.json").touch()
    config = configure(again, f"start={taught}")
    assert not (Work.start(config).run.path / "latents").exists()


def test_killed_and_resumed_without_its_origin_it_is_bit_equal(
    room: Path, taught: Path, monkeypatch: pytest.MonkeyPatch
):
    def die(work: Work, *rest: object) -> None:
        if (work.phase, work.update) == (2, 2):
            raise KeyboardInterrupt
        learned(work, *rest)  # type: ignore[arg-type]

    copy, learned = shutil.copytree(taught, Path("copy")), Work.learn
    config = configure(room, f"start={copy}", "seed=5")
    whole = learn(config)
    with monkeypatch.context() as patch:
        patch.setattr(Work, "learn", die)
        with pytest.raises(KeyboardInterrupt):
            learn(config.model_copy(update={"name": "cut"}))
    (cut,) = Path("runs").glob("cut-*")
    shutil.rmtree(copy)
    with pytest.raises(ConfigError, match=r"(?s)start.*begun otherwise"):
        learn(load_dreamer4(cut, ["start=null"]), cut)
    learn(load_dreamer4(cut), cut)
    assert reported(whole) == reported(cut)
    ends = [weights_of(path) for path in (whole, cut)]
    assert all(torch.equal(w, ends[1][k]) for k, w in ends[0].items())


# ---- what finetuning weighs ---------------------------------------------------------------------
def test_a_loss_of_weight_zero_moves_nothing_of_its_own(room: Path, taught: Path):
    off = [f"phases.finetune.scales.{name}=0" for name in ("policy", "terminal")]
    few = ["phases.finetune.updates=1", "phases.imagine.updates=0", "agent.members=2"]
    heads = ("policy.", "terminal.", "reward.", "ensemble.")
    for changes, still in ((off, {"policy.", "terminal."}), ([], set())):
        config = configure(room, f"start={taught}", *few, *changes)
        fresh = Work.start(config).agent.state_dict()
        found = weights_of(learn(config))
        names = [name for name in fresh if name.startswith(heads)]
        moved = {name for name in names if not torch.equal(fresh[name], found[name])}
        assert {head for head in heads if not any(n.startswith(head) for n in moved)} == still


def test_scales_name_the_losses_there_are(room: Path):
    names = {"dynamics", "policy", "reward", "terminal"}
    half = configure(room, "phases.finetune.scales.reward=0.5", "agent.members=2")
    assert half.scales == dict.fromkeys([*names, "ensemble"], 1.0) | {"reward": 0.5}
    assert configure(room).scales.keys() == names
    with pytest.raises(ConfigError, match=r"phases\.finetune\.scales\.ensemble"):
        configure(room, "phases.finetune.scales.ensembel=1")


# ---- more than it had ----------------------------------------------------------------------------
MORE = ("dynamics.trunk.memory={kind: gated_delta, dim: 4}", "dynamics.trunk.chain=1")


def test_what_joins_is_silent_and_can_have_a_level_of_its_own(
    room: Path, taught: Path, capsys: pytest.CaptureFixture[str]
):
    rule = "flow: {kind: descend, rule: {kind: adamw, lr: 1e-3}}"
    levels = (
        "phases.finetune.timescales={kind: levels, levels: {"
        f"joined: {{match: '\\.(beside|chain)\\.', {rule}}}, "
        f"all: {{match: REST, every: {{n: 100}}, {rule}}}}}}}"
    )
    plain, grown = begin(room, taught), begin(room, taught, *MORE)
    assert plain.new == () and len(grown.new) > 4
    assert {name.split(".")[4] for name in grown.new} == {"beside", "chain"}
    latents = torch.rand(2, 6, 2, 4, generator=torch.Generator().manual_seed(1)) * 2 - 1
    first = torch.zeros(2, 6, dtype=torch.bool)
    action = torch.zeros(2, 6, plain.agent.actions.dim)
    clip = Clip(latents, action, first, ~first, torch.zeros_like(first, dtype=torch.int64))
    pair = []
    for work in (plain, grown):
        dynamics, generator = work.agent.dynamics, torch.Generator().manual_seed(2)
        losses, feature = dynamics.losses(clip, generator)
        seen, context = dynamics.observe(clip, dynamics.initial(2), generator)
        made = dynamics.generate(Clip(*(x[:, :1] for x in clip)), context, 2, generator)
        pair.append((losses["dynamics"], feature, seen, made))
    assert all(torch.equal(a, b) for a, b in zip(*pair, strict=True))
    path = learn(configure(room, f"start={taught}", *MORE, levels, "phases.imagine.updates=0"))
    assert "new dynamics.transformer.layers.0.chain.0." in capsys.readouterr().err
    old, new = weights_of(taught), weights_of(path)
    named = dict(grown.agent.dynamics.named_parameters(prefix="dynamics"))
    moved = {name for name in named if name not in old or not torch.equal(new[name], old[name])}
    assert moved == set(grown.new)


# ---- what cannot be begun with -------------------------------------------------------------------
@pytest.mark.parametrize(
    ("change", "problem", "way_out"),
    [
        ("dynamics.trunk.width=32", "has dynamics.trunk.width=16, not 32", "start={run}"),
        ("tokenizer.trunk.cap=0", "has tokenizer.trunk.cap=50.0, not 0.0", "start={run}"),
        ("dynamics.k_max=8", "has dynamics.k_max=4, not 8", "set dynamics.k_max=4"),
        (
            "dynamics.trunk.memory.kind=delta dynamics.trunk.place=instead",
            "has dynamics.trunk.memory.kind=none, not delta",
            "set dynamics.trunk.memory.kind=none",
        ),
        ("start=gone", "no such folder", "nested runs"),
        ("start={data}", "is no offline run", "method dreamer4"),
    ],
)
def test_mistakes_are_told_before_there_is_a_folder(
    room: Path,
    taught: Path,
    capsys: pytest.CaptureFixture[str],
    change: str,
    problem: str,
    way_out: str,
):
    places = {"{run}": str(taught), "{data}": str(room)}
    for place, path in places.items():
        change, way_out = change.replace(place, path), way_out.replace(place, path)
    words = ["train", str(taught), f"data.path={room}", f"start={taught}", *change.split()]
    assert cli.main([*words, "tracking.root=new"]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "start" in error and problem in error and way_out in error
    assert not Path("new").exists()


def test_a_run_that_is_not_there_yet_is_refused(room: Path, taught: Path):
    young = shutil.copytree(taught, Path("young"))
    for file in (young / "checkpoints").iterdir():
        file.unlink()
    with pytest.raises(ConfigError, match=r"holds no checkpoint\n.*--resume young"):
        begin(room, young)
    work = Work.start(configure(room, "tracking.root=untaught"))
    with pytest.raises(ConfigError, match=r"in phase tokenizer.*\n.*--resume untaught"):
        begin(room, work.run.path)


def test_data_of_other_images_are_refused(room: Path, taught: Path):
    other = shutil.copytree(room, Path("other"))
    index = (other / "index.json").read_text()
    (other / "index.json").write_text(index.replace('"discrete"', '"continuous"'))
    with pytest.raises(ConfigError, match=r"start.*\nlearned .*discrete"):
        begin(other, taught)
