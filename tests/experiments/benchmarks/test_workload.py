"""What speed measures: shapes of the reference, FLOPs by hand, parts, and the textbook's step."""

import json

import numpy as np
import pytest
import torch

from experiments.benchmarks.timing import machine, parts, workload
from experiments.benchmarks.timing.flops import flops_of, operations, update_flops
from experiments.benchmarks.timing.reference import Spec, configured
from experiments.build import build_agent
from experiments.config import ConfigError, levels_of
from experiments.driver import replayed_batch
from experiments.loop import Loop
from experiments.train import learn
from worldmodel import ActionSpec, ObsSpec

CPU = torch.device("cpu")
TINY = (
    "model.deter=8", "model.blocks=2", "model.hidden=4", "model.stoch=2", "model.classes=2",
    "model.units=4", "model.depth=2", "model.layers=1", "agent.layers=1", "agent.bins=3",
    "agent.starts=0", "agent.horizon=2", "replay.batch=2", "replay.length=3",
)  # fmt: skip


def loop_of(kind: str = "update", schedule: str = "plain", *more: str) -> Loop:
    return workload.loop_of(Spec(kind, schedule=schedule, overrides=(*TINY, *more)))


def test_the_reference_is_the_published_workload():
    spec = Spec(dtype="bfloat16", schedule="k3", encoder="strided", threads=3)
    config = configured(Spec.parse(spec.dump()))
    assert (config.replay.batch, config.replay.length) == (16, 64)
    assert (config.agent.starts, config.agent.horizon, config.model.deter) == (0, 15, 512)
    assert (config.precision, config.model.encoder, config.threads) == ("bfloat16", "strided", 3)
    assert config.model.memory.kind == "none"
    levels = levels_of(config)
    assert [level.every.n for level in levels.values()] == [1, 4, 16]
    rules = [level.flow for level in (*levels.values(), *levels_of(configured(Spec())).values())]
    assert {flow.rule.kind for flow in rules if flow} == {"laprop"}  # pyright: ignore
    image = {"image": ObsSpec("image", (64, 64, 3))}
    agent = build_agent(configured(Spec()), image, ActionSpec("discrete", (6,)))
    assert sum(p.numel() for p in agent.parameters()) == 686_456


def test_the_small_workload_imagines_from_128_rows():
    config = configured(Spec("small"))
    assert (config.replay.batch * config.agent.starts, config.agent.horizon) == (128, 10)
    with pytest.raises(ConfigError, match=r"model\.size"):
        configured(Spec(size="3m"))


def test_the_replay_holds_random_frames():
    loop = loop_of()
    arrays, carry = loop.replay.sample(2)
    assert arrays["obs.image"].shape == (2, 3, 64, 64, 3)
    assert arrays["obs.image"].dtype == np.uint8
    assert 100 < arrays["obs.image"].mean() < 155
    assert arrays["action"].shape == (2, 3, 6)
    assert set(arrays["action"].sum(-1).ravel()) <= {0.0, 1.0}
    assert len(loop.replay) >= workload.CHUNKS
    assert all(len(leaf) == 2 for leaf in carry.values())
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(loop.replay, "sample", lambda batch: (arrays, carry))
        assert learn(loop).losses["image"].shape == (2, 3)


def test_a_child_answers_what_it_is_asked():
    hello, answers = workload.subject(Spec("small", overrides=TINY))
    assert (hello["batch"], hello["length"]) == (2, 3)
    found = answers["time"](3)
    assert len(found["seconds"]) == len(found["cpu_seconds"]) == 3
    assert found["rss_mb"] > 50 > found["device_mb"] == 0
    assert answers["flops"](1)["gflop"] > by_hand() / 1e9  # which only filters
    json.dumps(answers["operators"](2))


def test_a_policy_acts_in_every_slot():
    act = workload.policy(loop_of(), 5)
    first, second = act(), act()
    assert first.shape == second.shape == (5, 6)
    assert (first.sum(1) == 1).all()


# ---- operations --------------------------------------------------------------------------------
def by_hand() -> int:
    """Operations of filtering 2 x 3 rows of four numbers and two actions with TINY.

    D = 8 in 2 blocks, h = u = 4, S C = 4. A product costs its forward pass, as much again for its
    weight's gradient, and again for its input's where one is wanted.
    """
    rows = 6
    hoisted = 2 * 4 * 4 + 2 * 2 * 4 + 3 * 4 * 8 + 3 * 4 * 4  # encoder, action, its share, tokens
    enter, leave = 8 * 4 + 4 * 4, 8 * 4 + 4 * 4
    recur = 2 * 4 * 8 + 8 * 4 + 8 * 12
    unwanted = 2 * (enter + 8 * 4)  # no gradient into the states before step 0
    return 2 * (rows * hoisted + rows * 3 * (enter + recur + leave) - unwanted)


def test_operations_are_those_counted_by_hand():
    loop = loop_of("small")
    world = loop.agent.world
    world.dynamics.readable = True
    batch = replayed_batch(loop.replay.sample(2)[0], loop.device)

    def filtered() -> None:
        posterior, _ = world.observe(batch, world.initial(2), loop.generator)
        (posterior.deter.sum() + posterior.probs.square().sum()).backward()

    assert operations(filtered) == by_hand()
    image, kernel = torch.ones(2, 3, 8, 8), torch.ones(5, 3, 3, 3)
    assert operations(lambda: torch.conv2d(image, kernel, padding=1)) == 2 * 2 * 64 * 27 * 5


def test_two_sequences_stand_for_all_and_no_node_hides_any():
    loop = loop_of("update", "plain", "replay.batch=3")
    assert update_flops(loop) == flops_of(loop, 3)
    assert all(p.grad is None for p in loop.agent.parameters())
    assert not loop.agent.world.dynamics.readable
    trained = flops_of(loop, 3, readable=False)
    assert trained == pytest.approx(flops_of(loop, 3), rel=1e-3)  # it wants gradients of step 0


# ---- parts -------------------------------------------------------------------------------------
def test_a_part_is_counted_without_those_inside_it(monkeypatch: pytest.MonkeyPatch):
    ticks = iter([0.0, 1.0, 3.0, 7.0, 15.0, 31.0])
    monkeypatch.setattr(parts.time, "perf_counter", lambda: next(ticks))
    watch = parts.Stopwatch(CPU)
    with watch.part("backward"), watch.part("encoder"):
        pass
    watch.stop()
    assert watch.seconds["rest"] == 1 + 16
    assert (watch.seconds["backward"], watch.seconds["encoder"]) == (2 + 8, 4)


def test_every_part_of_an_update_is_met_and_left_as_it_was():
    loop = loop_of()
    before = torch.Tensor.backward
    for found in parts.profile(loop, 1).values():
        assert list(found) == list(parts.PARTS)
        assert all(seconds > 0 for seconds in found.values())
    assert torch.Tensor.backward is before
    assert not {"sample", "tick", "losses"} & {*vars(loop.replay), *vars(loop.agent)}
    names = [name for name, _, _ in parts.operators(loop, 400)]
    assert "aten::mkldnn_convolution" in names or "aten::convolution" in names


# ---- levels ------------------------------------------------------------------------------------
def test_the_textbook_makes_the_steps_of_one_level():
    plain, levels = loop_of("small"), loop_of("small", "k1", "timescales.base=2")
    plain.timescales = workload.textbook(plain)
    for _ in range(3):
        learn(plain)
        learn(levels)
    ours = dict(levels.agent.named_parameters())
    assert all(torch.equal(p, ours[name]) for name, p in plain.agent.named_parameters())
    slow = levels.timescales.weights("slow_critic")
    assert all(torch.equal(p, slow[n]) for n, p in plain.timescales.weights("slow_critic").items())


def test_a_round_asks_every_schedule():
    _, answers = workload.ladder(Spec("levels", size="small", overrides=TINY))
    seconds = answers["round"](1)["seconds"]
    assert list(seconds) == ["plain", "k=1", "k=3", "k=5"]
    assert min(seconds.values()) > 0


# ---- the machine -------------------------------------------------------------------------------
def test_the_best_repetition_counts(monkeypatch: pytest.MonkeyPatch):
    ticks = iter([0.0, 0.0, 5.0, 5.0, 7.0, 7.0, 11.0])  # repetitions of 5, 2 and 4 seconds
    monkeypatch.setattr(machine.time, "perf_counter", lambda: next(ticks))
    assert machine.best(lambda: None, CPU, 10.0) == 2.0


def test_speeds_of_the_machine(monkeypatch: pytest.MonkeyPatch):
    products: list[object] = []

    def took(run, device: torch.device, seconds: float) -> float:
        products.append(run())
        return len(products) * 1e-9

    monkeypatch.setattr(machine, "best", took)
    assert machine.matmul_gflops(torch.bfloat16, CPU, (4, 8)) == pytest.approx(2 * 8**3 / 2)
    assert torch.equal(products[0], torch.ones(4, 4, dtype=torch.bfloat16))  # pyright: ignore
    assert machine.memcpy_gb_s(CPU, 300) == pytest.approx(100)
