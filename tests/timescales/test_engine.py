"""What the engine promises beyond the published methods: order, skipping, measuring, resuming."""

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from timescales import (
    REST,
    Descend,
    Every,
    Level,
    Pull,
    Relax,
    Reset,
    Rule,
    Timescales,
    presets,
    rules,
    timeline,
)

from .problem import distance, gradients, loss, model, run, same, values

RULES: dict[str, Rule] = {
    "adamw": rules.adamw(lr=0.01),
    "laprop": rules.laprop(lr=0.01, warmup=5),
    "sgd": rules.sgd(0.05, momentum=0.9),
    "muon": rules.muon(lr=0.01),
    "m3": rules.m3(lr=0.01, period=3),
}


def everything(rule: Rule) -> list[Level]:
    """A schedule that uses every part of the engine at once."""
    return [
        Level("fast", match=r"^4", flow=Descend(rule), relax=(Relax("mean", 0.01),)),
        Level(
            "mid",
            match=r"^2",
            every=Every(3, phase=1),
            flow=Descend(rule, "sum"),
            relax=(Relax("init", 0.02), Relax("zero", 0.001, noise=1e-3)),
            reset=(Reset("mean", Every(10), clear_rule=True),),
        ),
        Level("slow", match=REST, every=Every(2, unit="episode"), flow=Descend(rule)),
        Level("mean", copy=".", every=Every(p=0.5), flow=Pull("params", lambda n: 1 / (n + 2))),
        Level("outer", copy=".", every=Every(4), flow=Pull("mean", outer=RULES["sgd"])),
    ]


def engine(levels: list[Level], module: nn.Module | None = None) -> tuple[nn.Module, Timescales]:
    module = module if module is not None else model()
    generator = torch.Generator().manual_seed(5)
    return module, Timescales(module.named_parameters(), levels, generator)


def events(timescales: Timescales) -> Callable[[int], object]:
    """An episode ends at every fifth step."""
    return lambda step: timescales.tick("episode") if step % 5 == 4 else None


@pytest.mark.parametrize("name", RULES)
def test_a_kill_in_the_middle_of_any_window_changes_nothing(name: str):
    whole, timescales = engine(everything(RULES[name]))
    run(whole, timescales, range(30), events(timescales))
    for stop in (1, 2, 3, 7, 11, 18, 29):
        before, first = engine(everything(RULES[name]))
        run(before, first, range(stop), events(first))
        weights, state = copy.deepcopy((before.state_dict(), first.state_dict()))
        after, second = engine(everything(RULES[name]))
        after.load_state_dict(weights)
        second.load_state_dict(state)
        run(after, second, range(stop, 30), events(second))
        assert same(after, whole), stop
        for level in ("mean", "outer"):
            assert distance(second.weights(level), [*timescales.weights(level).values()]) == 0.0
        assert second.metrics() == timescales.metrics()


def leaves(tree: Any) -> list[Any]:
    if isinstance(tree, dict):
        assert all(type(key) is str for key in tree)
        return [leaf for value in tree.values() for leaf in leaves(value)]
    return [tree]


@pytest.mark.parametrize("name", RULES)
def test_state_is_dicts_of_tensors_and_json_scalars(name: str):
    module, timescales = engine(everything(RULES[name]))
    run(module, timescales, range(5), events(timescales))
    kinds = {type(leaf) for leaf in leaves(timescales.state_dict())}
    assert kinds <= {torch.Tensor, int, float, str, bool, type(None)}


def test_loaded_tensors_are_copies_laid_out_as_the_weights():
    """Fused kernels walk memory: moments of a channels-last weight must lie as the weight does."""

    def conv() -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            module = nn.Conv2d(3, 4, 3, bias=False)
        module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)
        return module

    def steps(module: nn.Module, timescales: Timescales, which: range) -> None:
        for step in which:
            generator = torch.Generator().manual_seed(step)
            module(torch.randn(2, 3, 5, 5, generator=generator)).square().sum().backward()
            timescales.tick("update")

    levels = [Level("all", match=".", every=Every(3), flow=Descend(rules.adamw(0.01)))]
    whole, timescales = engine(levels, conv())
    steps(whole, timescales, range(9))
    half, first = engine(levels, conv())
    steps(half, first, range(4))
    packed = {k: v for k, v in first.state_dict()["levels"]["all"].items()}
    packed["window"] = {k: v.contiguous() for k, v in packed["window"].items()}
    packed["rule"]["state"] = {
        name: {key: value.contiguous() for key, value in entry.items()}
        for name, entry in packed["rule"]["state"].items()
    }
    state = {**first.state_dict(), "levels": {"all": packed}}
    after, second = engine(levels, conv())
    after.load_state_dict(half.state_dict())
    second.load_state_dict(state)
    steps(half, first, range(4, 9))  # goes on with tensors of its own
    steps(after, second, range(4, 9))
    assert same(half, whole) and same(after, whole)


def test_state_of_another_schedule_is_refused():
    _, timescales = engine(presets.plain(RULES["adamw"]))
    _, other = engine(presets.lookahead(RULES["adamw"]))
    with pytest.raises(ValueError, match=r"\['all'\].*\['fast', 'slow'\]"):
        other.load_state_dict(timescales.state_dict())


@pytest.mark.parametrize("n", [1, 2, 3, 5, 7])
def test_the_mean_is_folded_into_a_fused_step_bit_for_bit(n: int):
    module = model(torch.float32)
    rule = rules.adamw(lr=0.01, weight_decay=0.1)
    timescales = Timescales(
        module.named_parameters(), [Level("all", match=".", every=Every(n), flow=Descend(rule))]
    )
    run(module, timescales, range(4 * n))
    twin = model(torch.float32)
    optimizer = rule(twin.parameters())
    for window in range(4):
        for step in range(window * n, (window + 1) * n):
            loss(twin, step).backward()
        for p in twin.parameters():
            p.grad = None if p.grad is None else p.grad / n
        optimizer.step()
        optimizer.zero_grad()
    assert same(module, twin)


def test_a_window_lives_in_grad_and_is_used_up():
    module, timescales = engine(
        [Level("all", match=".", every=Every(3), flow=Descend(rules.sgd()))]
    )
    grads = [gradients(module, step) for step in range(2)]
    run(module, timescales, range(2))
    found = [p.grad for p in module.parameters()]
    for grad, a, b in zip(found, *grads, strict=True):
        assert grad is not None
        assert torch.equal(grad, a + b)
    run(module, timescales, range(2, 3))
    assert all(p.grad is None for p in module.parameters())


def numbers(timescales: Timescales) -> list[float]:
    return [float(timescales.weights(level.name)["w"].detach()) for level in timescales.levels]


def test_levels_flow_from_fastest_to_slowest_and_resets_come_last():
    start = {"w": nn.Parameter(torch.ones(1, dtype=torch.float64))}
    levels = [
        Level("live", match="w", flow=Descend(rules.sgd(1.0)), reset=(Reset("b", Every(2)),)),
        Level("a", copy="w", flow=Pull("params", 0.5), relax=(Relax("b", 0.25),)),
        Level("b", copy="w", flow=Pull("a", 1.0)),
    ]
    timescales = Timescales(start.items(), levels)
    start["w"].grad = torch.tensor([1.0], dtype=torch.float64)
    assert timescales.tick("update") == ["live", "a", "b"]
    # live: 1 - 1 = 0; a: 1 + .5 (0 - 1) + .25 (1 - 1), b not having moved; b: to the new a
    assert numbers(timescales) == [0.0, 0.5, 0.5]
    start["w"].grad = torch.tensor([2.0], dtype=torch.float64)
    timescales.tick("update")
    # live: -2; a: .5 + .5 (-2.5) + .25 (0) = -.75; b: -.75; then live returns to b
    assert numbers(timescales) == [-0.75] * 3


def test_relaxing_comes_before_the_rule_and_reads_the_old_value():
    w = nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
    relax = (Relax("zero", 0.25), Relax("init", 0.5))
    level = Level("all", match="w", flow=Descend(rules.sgd(1.0)), relax=relax)
    timescales = Timescales([("w", w)], [level])
    for _ in range(2):
        w.grad = torch.tensor([1.0], dtype=torch.float64)
        timescales.tick("update")
    # 2 - .5 + 0 - 1 = .5, then .5 - .125 + .5 * 1.5 - 1
    assert float(w.detach()) == 0.125


def test_an_outer_step_starts_from_the_relaxed_value():
    w = nn.Parameter(torch.tensor([4.0], dtype=torch.float64))
    pull = Pull("params", outer=rules.sgd(0.5))
    levels = [
        Level("all", match="w", flow=Descend(rules.sgd(1.0))),
        Level("outer", copy="w", flow=pull, relax=(Relax("zero", 0.25),)),
    ]
    timescales = Timescales([("w", w)], levels)
    w.grad = torch.tensor([2.0], dtype=torch.float64)
    timescales.tick("update")
    # 4 relaxes to 3; the pseudo-gradient is 4 - 2, taken before
    assert float(timescales.weights("outer")["w"]) == 2.0
    assert timescales.weights("outer")["w"].grad is None


def test_a_level_without_a_backward_is_skipped_and_counted():
    module, timescales = engine(
        [Level("all", match=".", every=Every(unit="episode"), flow=Descend(rules.sgd()))]
    )
    before = values(module)
    assert timescales.tick("episode") == []
    assert timescales.metrics() == {"levels/all/updates": 0.0, "levels/all/skipped": 1.0}
    assert distance(module, before) == 0.0
    loss(module, 0).backward()
    assert timescales.tick("update") == []
    assert timescales.tick("episode") == ["all"]
    assert timescales.tick("episode") == []


def test_the_divisor_is_the_number_of_backwards():
    """An episode's level divides by what was gathered, also when ticks came in one piece."""
    module, timescales = engine(
        [Level("all", match=".", every=Every(unit="episode"), flow=Descend(rules.sgd(0.1)))]
    )
    twin = values(module)
    grads = [gradients(module, step) for step in range(3)]
    for step in range(3):
        loss(module, step).backward()
    timescales.tick("update", 3)
    timescales.tick("episode")
    expected = [w - 0.1 * sum(g) / 3 for w, g in zip(twin, zip(*grads, strict=True), strict=True)]
    assert distance(module, expected) < 1e-15


@pytest.mark.parametrize("name", RULES)
def test_parameters_without_a_gradient_stay(name: str):
    """At first, and when they join later; a level that none reaches is skipped."""
    module, timescales = engine(presets.plain(RULES[name]))
    before = values(module)
    for step in range(4):
        head = module[4] if step < 2 else module  # pyright: ignore[reportIndexIssue]
        x = torch.ones(3, 5 if step < 2 else 4, dtype=torch.float64)
        head(x).square().sum().backward()
        timescales.tick("update")
        moved = [not torch.equal(a, b) for a, b in zip(values(module), before, strict=True)]
        assert moved == [step >= 2] * 4 + [True] * 2
    timescales.tick("update")
    assert timescales.metrics()["levels/all/skipped"] == 1.0


def test_measuring_changes_nothing_and_waits_for_the_next_update():
    results = []
    for measured in (False, True):
        module, timescales = engine(everything(RULES["laprop"]))
        for step in range(30):
            loss(module, step).backward()
            timescales.tick("update", measure=measured and step % 7 == 0)
            events(timescales)(step)
        results.append((module, timescales.metrics()))
    assert same(results[0][0], results[1][0])
    assert not any("norm" in key for key in results[0][1])
    keys = {key.split("/")[2] for key in results[1][1] if key.startswith("levels/slow/")}
    norms = {"grad_norm", "update_norm", "displacement_per_sample"}
    assert keys == {"updates", "skipped", *norms}


def test_norms_are_of_the_mean_gradient_and_of_the_way_for_each_sample():
    module, timescales = engine(
        [Level("all", match=".", every=Every(4), flow=Descend(rules.sgd(0.5)))]
    )
    grads = [gradients(module, step) for step in range(4)]
    for step in range(4):
        loss(module, step).backward()
        timescales.tick("update", measure=step == 0)
    mean = [torch.stack(each).mean(0) for each in zip(*grads, strict=True)]
    norm = math.sqrt(sum(float(g.square().sum()) for g in mean))
    found = timescales.metrics()
    assert found["levels/all/grad_norm"] == pytest.approx(norm)
    assert found["levels/all/update_norm"] == pytest.approx(0.5 * norm)
    assert found["levels/all/displacement_per_sample"] == pytest.approx(0.125 * norm)


def test_a_pulled_level_drops_the_gradients_it_has_no_use_for():
    module, timescales = engine(presets.fedavg())
    loss(module, 0).backward()
    assert timescales.tick("update") == []
    assert all(p.grad is None for p in module.parameters())


def test_a_frozen_level_never_moves():
    module, timescales = engine(
        [Level("head", match=r"^4", flow=Descend(rules.sgd())), Level("body", match=REST)]
    )
    before = values(module)
    run(module, timescales, range(3))
    moved = [not torch.equal(a, b) for a, b in zip(values(module), before, strict=True)]
    assert moved == [False] * 4 + [True] * 2


def test_sources_and_rates_that_were_not_handed_in_are_named():
    _, timescales = engine(presets.fedavg(source="users"))
    with pytest.raises(ValueError, match="'users', which is neither a level nor handed in"):
        timescales.tick("session")
    module, timescales = engine(presets.ewc(rules.sgd()))
    loss(module, 0).backward()
    with pytest.raises(ValueError, match="rate from 'fisher'"):
        timescales.tick("update")
    partly: dict[str, Tensor] = {"0.weight": torch.ones(6, 4)}
    with pytest.raises(ValueError, match="rate 'fisher' lacks 5 parameters"):
        timescales.tick("update", rates={"fisher": partly})


def test_a_source_close_to_a_level_is_suggested():
    levels = [Level("fast", match="."), Level("slow", copy=".", flow=Pull("fsat"))]
    _, timescales = engine(levels)
    with pytest.raises(ValueError, match="did you mean 'fast'"):
        timescales.tick("update")


def test_weights_are_for_functional_calls():
    module, timescales = engine(presets.hare_tortoise(RULES["adamw"]))
    run(module, timescales, range(5))
    x = torch.ones(1, 4, dtype=torch.float64)
    slow = torch.func.functional_call(module, timescales.weights("tortoise"), (x,))
    live = torch.func.functional_call(module, timescales.weights("params"), (x,))
    assert torch.equal(live, module(x)) and not torch.equal(slow, live)
    assert not any(w.requires_grad for w in timescales.weights("tortoise").values())
    with pytest.raises(ValueError, match="no level 'turtle'"):
        timescales.weights("turtle")


def test_a_reset_can_forget_the_moments_too():
    for clear in (False, True):
        reset = Reset("init", Every(3), clear_rule=clear)
        module, timescales = engine(
            [Level("all", match=".", flow=Descend(RULES["adamw"]), reset=(reset,))]
        )
        start = values(module)
        run(module, timescales, range(3))
        assert distance(module, start) == 0.0
        fresh, other = engine(presets.plain(RULES["adamw"]))
        run(module, timescales, range(3, 5))
        run(fresh, other, range(3, 5))
        assert same(module, fresh) == clear


def test_the_timeline_tells_what_ticks_will_do():
    levels = everything(RULES["sgd"])
    levels[1] = replace(levels[1], relax=())  # noise would draw from the same generator
    module, timescales = engine(levels)
    planned = timescales.timeline(12)
    updates = {level.name: 0 for level in levels}
    for step in range(12):
        loss(module, step).backward()
        timescales.tick("update")
        for name in updates:
            updates[name] += step + 1 in planned[name]
            assert timescales.metrics()[f"levels/{name}/updates"] == updates[name]
    assert planned["mid"] == [1, 4, 7, 10]
    assert planned["slow"] == []
    assert 0 < len(planned["mean"]) < 12
    assert timeline(levels[:3], 6, "episode")["slow"] == [2, 4, 6]


def test_a_bernoulli_clock_draws_once_a_tick_and_fires_as_often_as_it_says():
    level = Level("a", copy=".", every=Every(2, p=0.3), flow=Pull("params"))
    found = timeline([level], 4000, generator=torch.Generator().manual_seed(0))["a"]
    assert all(count % 2 == 0 for count in found)
    assert abs(len(found) - 600) < 80
    draws = torch.Generator().manual_seed(0)
    by_hand = [bool(torch.rand((), generator=draws) < 0.3) for _ in range(20)]
    assert [c for c in found if c <= 20] == [i + 1 for i in range(1, 20, 2) if by_hand[i]]
