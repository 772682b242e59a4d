"""Online EWC without task boundaries: against closed forms, the plain loop, and what is refused."""

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
    Timescales,
    Weighted,
    presets,
    rules,
)

from .problem import distance, loss, model, run, same, values

LR, LAM, DECAY, N = 0.1, 2.0, 0.6, 5
CURVES = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)
GOALS = [torch.tensor(goal, dtype=torch.float64) for goal in ([1, -2, 0.5], [0, 1, 2], [3, 3, -1])]
START = torch.tensor([2.0, 0.3, -1.0], dtype=torch.float64)


def bowls() -> list[Tensor]:
    """Gradient descent through three quadratic tasks of N updates, each task one window."""
    weight = nn.Parameter(START.clone())
    levels = presets.online_ewc(rules.sgd(LR), LR * LAM, N, DECAY)
    timescales = Timescales([("w", weight)], levels)
    found = []
    for goal in GOALS:
        for _ in range(N):
            (CURVES * (weight - goal).square()).sum().div(2).backward()
            timescales.tick("update")
        found.append(weight.detach().clone())
    return found


def course(start: Tensor, goal: Tensor, anchor: Tensor, fisher: Tensor) -> list[Tensor]:
    """Closed form: the weights after 0..N updates, all on their way to one rest."""
    pull = LR * LAM * fisher / (1 + LR * LAM * fisher)
    step = LR * CURVES
    rest = (pull * anchor + step * goal) / (pull + step)
    return [rest + (1 - pull - step) ** t * (start - rest) for t in range(N + 1)]


def test_three_windows_of_a_quadratic_have_a_closed_form():
    fisher, anchor, weight = torch.zeros_like(START), START, START
    for goal, found in zip(GOALS, bowls(), strict=True):
        path = course(weight, goal, anchor, fisher)
        squares = torch.stack([(CURVES * (w - goal)).square() for w in path[:-1]]).mean(0)
        weight = anchor = path[-1]
        fisher = DECAY * fisher + squares / squares.mean()
        assert (found - weight).abs().max() < 1e-12


def test_a_long_window_rests_where_the_penalty_and_the_task_balance():
    """For small steps: the minimum of `curve (w - goal)^2 + lam fisher (w - anchor)^2`."""
    lr, n = 0.01, 2000
    weight = nn.Parameter(START.clone())
    timescales = Timescales([("w", weight)], presets.online_ewc(rules.sgd(lr), lr * LAM, n))
    anchor, fisher = GOALS[2], torch.tensor([3.0, 0.5, 0.0]).double()
    with torch.no_grad():
        timescales.weights("anchor")["w"].copy_(anchor)
        timescales.weights("fisher")["w"].copy_(0.05 * fisher)
    for _ in range(n - 1):
        (CURVES * (weight - GOALS[1]).square()).sum().div(2).backward()
        timescales.tick("update")
    rest = (CURVES * GOALS[1] + LAM * fisher * anchor) / (CURVES + LAM * fisher)
    assert (weight.detach() - rest).abs().max() < 0.02  # implicit: off by the step's size
    assert weight[2].item() == pytest.approx(GOALS[1][2].item())  # of no importance: free


@pytest.mark.parametrize("rule", [rules.adamw(0.01), rules.laprop(0.01, warmup=3)])
def test_no_weight_is_a_plain_loop_bit_for_bit(rule):
    one, other = model(), model()
    plain = Timescales(one.named_parameters(), presets.plain(rule))
    levels = presets.online_ewc(rule, strength=0.0, n=4, anchored=r"^[02]\.")
    run(one, plain, range(20))
    run(other, Timescales(other.named_parameters(), levels), range(20))
    assert same(one, other)


def test_importance_holds_weights_where_they_were():
    def drift(strength: float) -> float:
        module = model()
        levels = presets.online_ewc(rules.adamw(0.01), strength, n=10)
        timescales = Timescales(module.named_parameters(), levels)
        run(module, timescales, range(10))
        anchor = values(module)
        run(module, timescales, range(10, 19))
        return distance(module, anchor)

    assert drift(1e6) < 0.02 < drift(0.0) / 2


def test_a_window_and_its_squares_survive_a_restart():
    def begin() -> tuple[nn.Module, Timescales]:
        module = model()
        levels = presets.online_ewc(rules.adamw(0.01), 1.0, n=6, decay=0.5)
        return module, Timescales(module.named_parameters(), levels)

    whole, all_along = begin()
    run(whole, all_along, range(16))
    first, before = begin()
    run(first, before, range(9))
    second, after = begin()
    second.load_state_dict(first.state_dict())
    after.load_state_dict(before.state_dict())
    run(second, after, range(9, 16))
    assert same(whole, second)
    assert distance(after.weights("fisher"), list(all_along.weights("fisher").values())) == 0.0


def test_squares_are_of_mean_one_and_begin_anew_with_each_window():
    module = model()
    flow = Pull("squares")
    levels = [
        Level("all", match=REST, flow=Descend(rules.sgd(0.0))),
        Level("seen", copy=r"^0\.", every=Every(2), flow=flow, start="zero"),
    ]
    timescales = Timescales(module.named_parameters(), levels)
    assert not any(w.any() for w in timescales.weights("seen").values())
    for steps in ((0, 1), (2, 3)):
        total = {name: torch.zeros_like(p) for name, p in module[0].named_parameters("0")}
        for step in steps:
            loss(module, step).backward()
            for name, p in module[0].named_parameters("0"):
                assert p.grad is not None
                total[name] += p.grad.square()
            timescales.tick("update")
        mean = torch.cat([t.flatten() for t in total.values()]).mean()
        expected = [t / mean for t in total.values()]
        assert distance(timescales.weights("seen"), expected) < 1e-12


def test_a_schedule_says_what_it_does():
    levels = presets.online_ewc(rules.sgd(LR), 0.25, n=200, decay=0.5)
    rows = {row["name"]: row for row in Timescales(model().named_parameters(), levels).table()}
    assert rows["anchored"]["relax"] == ["relax to anchor at z/(1+z), z = 0.5 fisher"]
    assert rows["fisher"]["flow"] == "pull to squared gradients at 0.5"
    assert rows["fisher"]["every"] == rows["anchor"]["every"] == "every 200 updates"
    assert not any(row["handed_in"] for row in rows.values())


FISHER = Level("fisher", copy=".", flow=Pull("squares"), start="zero")
REFUSED = [
    (
        [Level("all", match=REST, every=Every(4), flow=Descend(rules.sgd())), FISHER],
        "'fisher' follows squared gradients of 'all', .* moves every 4 updates",
    ),
    ([Level("all", match=REST, flow=Pull("squares"))], "only a copy can"),
    (
        [
            Level("all", match=REST, flow=Descend(rules.sgd())),
            Level("fisher", copy=".", every=Every(unit="task"), flow=Pull("squares")),
        ],
        "only a copy can, by updates",
    ),
    (
        [Level("all", match=REST, relax=(Relax("zero", Weighted("fisher", 1.0)),))],
        "no level 'fisher'",
    ),
    (
        [
            Level("all", match=REST, relax=(Relax("zero", Weighted("part", 1.0)),)),
            Level("part", copy=r"^0\.", flow=Pull("params")),
        ],
        "level 'part' lacks 4 parameters of level 'all'",
    ),
]


@pytest.mark.parametrize(("levels", "text"), REFUSED)
def test_what_cannot_be_followed_is_refused(levels: list[Level], text: str):
    with pytest.raises(ValueError, match=text):
        Timescales(model().named_parameters(), levels)


def test_wrong_values_are_refused():
    with pytest.raises(ValueError, match=r"Weighted.times = -1"):
        Weighted("fisher", -1)
    with pytest.raises(ValueError, match="start='zero'"):
        Level("all", match=REST, start="zero")
