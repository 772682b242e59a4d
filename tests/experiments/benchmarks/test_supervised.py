"""The learner of many seeds at once: each is alone; methods against loops written out by hand."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.benchmarks.tasks import baselines, supervised
from experiments.benchmarks.tasks.baselines import METHODS
from experiments.benchmarks.tasks.streams import Rows, Stream, make_stream
from experiments.benchmarks.tasks.supervised import Learner, Settings

DIGITS, SLOW = "cl/PermutedDigits-v0", "cl/SlowRegression-v0"
SMALL = Settings(
    hidden=(6, 6, 6, 6), batch=8, ewc_rows=16, redo_every=3, replacement=0.05, maturity=2,
    return_every=3, memory=20, tau=0.3, evaluations=2,
)  # fmt: skip


def stream_of(
    name: str = DIGITS, seeds: tuple[int, ...] = (0, 1, 2), method: str = "plain", samples: int = 64
) -> Stream:
    return make_stream(name, seeds, 2, samples, METHODS[method].oracle, torch.float64)


def learner_of(method: str, **changes: Any) -> Learner:
    name = changes.pop("stream", DIGITS)
    return Learner(stream_of(name, method=method), METHODS[method], SMALL._replace(**changes))


def steps(learner: Learner, count: int, task: int = 0) -> None:
    size = learner.settings.batch
    learner.begin(task)
    for i in range(count):
        learner.step(learner.stream.rows(task, i * size, (i + 1) * size))


def seed_module(learner: Learner, seed: int) -> nn.Sequential:
    """A plain torch module with the weights of one seed."""
    parts: list[nn.Module] = []
    for weight, bias in supervised.layers(learner.params):
        linear = nn.Linear(weight.shape[1], weight.shape[2], dtype=torch.float64)
        linear.weight.data = weight.detach()[seed].T.clone()
        linear.bias.data = bias.detach()[seed].clone()
        parts += [linear, nn.ReLU()]
    return nn.Sequential(*parts[:-1])


def assert_seed_is(learner: Learner, seed: int, module: nn.Sequential) -> None:
    expected = seed_module(learner, seed)
    for found, wanted in zip(module.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


# ---- seeds -------------------------------------------------------------------------------------
@pytest.mark.parametrize("rule", ["sgd", "adamw"])
@pytest.mark.parametrize("method", [name for name in METHODS if name != "k2"])
def test_a_seed_of_many_is_the_seed_alone(method: str, rule: str):
    settings = SMALL._replace(rule=rule, lr={"sgd": 0.1, "adamw": 0.01}[rule])
    together = supervised.learn(stream_of(method=method), METHODS[method], settings)
    alone = supervised.learn(stream_of(seeds=(1,), method=method), METHODS[method], settings)
    for name in ("scores", "curves", "online"):
        assert np.abs(getattr(together, name)[1:2] - getattr(alone, name)).max() <= 1e-10, name
    for name, values in alone.symptoms.items():
        assert np.abs(together.symptoms[name][1:2] - values).max() <= 1e-10, name
    assert not np.array_equal(
        together.symptoms["weight_norm"][0], together.symptoms["weight_norm"][1]
    )


@pytest.mark.parametrize("method", ["k2", "l2_init", "ewc", "cbp", "reservoir"])
def test_values_are_learned_alone_too(method: str):
    settings = SMALL._replace(hidden=(5,), lr=0.01)
    together = supervised.learn(stream_of(SLOW), METHODS[method], settings)
    alone = supervised.learn(stream_of(SLOW, (2,)), METHODS[method], settings)
    assert np.abs(together.scores[2:] - alone.scores).max() <= 1e-10
    assert np.abs(together.curves[2:] - alone.curves).max() <= 1e-10


# ---- networks ----------------------------------------------------------------------------------
def test_stacked_layers_are_the_modules():
    learner = learner_of("plain")
    rows = learner.stream.rows(0, 0, 8)
    outputs, hidden = supervised.forward(learner.params, rows.x)
    loss = supervised.losses(outputs, rows)
    assert [h.shape for h in hidden] == [(3, 8, 6)] * 4
    for seed in range(3):
        expected = seed_module(learner, seed)(rows.x[seed])
        torch.testing.assert_close(outputs[seed], expected)
        wanted = F.cross_entropy(expected, rows.y[seed], reduction="none")
        torch.testing.assert_close(loss[seed], wanted)


def test_fresh_weights_have_their_variance_and_their_number():
    one = supervised.initial((64, 100, 10), (0, 1), 0)
    assert one["layers.0.weight"].std() == pytest.approx((2 / 64) ** 0.5, rel=0.05)
    assert one["layers.1.weight"].std() == pytest.approx((1 / 100) ** 0.5, rel=0.05)
    assert torch.equal(
        one["layers.0.weight"], supervised.initial((64, 100, 10), (0, 1), 0)["layers.0.weight"]
    )
    assert not torch.equal(
        one["layers.0.weight"], supervised.initial((64, 100, 10), (0, 1), 1)["layers.0.weight"]
    )


def test_scores():
    right = Rows(torch.zeros(1, 4, 1), torch.tensor([[0, 1, 1, 1]]))
    outputs = torch.tensor([[[2.0, 1], [0, 1], [3, 1], [0, 9]]])
    assert supervised.score(outputs, right, torch.ones(1)).tolist() == [0.75]
    values = Rows(torch.zeros(1, 2, 1), torch.tensor([[1.0, 3.0]]))
    found = supervised.score(torch.tensor([[[1.0], [1.0]]]), values, torch.tensor([4.0]))
    assert found.tolist() == [0.5]  # 1 - ((0 + 4) / 2) / 4


def test_evaluation_does_not_touch_training():
    stream, method = stream_of(), METHODS["cls_er"]
    often, seldom = (
        supervised.learn(stream, method, SMALL._replace(evaluations=n)) for n in (8, 1)
    )
    assert np.array_equal(often.scores, seldom.scores)
    assert np.array_equal(often.online, seldom.online)
    assert often.curves.shape == (3, 2, 9)
    assert np.array_equal(often.curves[..., [0, -1]], seldom.curves)


def test_what_a_run_gives_hangs_together():
    learned = supervised.learn(stream_of(), METHODS["plain"], SMALL)
    assert learned.scores.shape == (3, 3, 2)
    ends = np.diagonal(learned.scores[:, 1:], axis1=1, axis2=2)
    assert np.array_equal(ends, learned.curves[..., -1])
    assert np.array_equal(learned.scores[:, 0, 0], learned.curves[:, 0, 0])
    assert np.array_equal(learned.scores[:, 1, 1], learned.curves[:, 1, 0])
    assert learned.online.shape == (3, 2, 8)
    assert learned.times.tolist() == [0, 4, 8]
    assert learned.seconds > 0


# ---- methods -----------------------------------------------------------------------------------
def descended(learner: Learner, count: int, seed: int, every: int = 1, extra=None) -> nn.Sequential:
    """The textbook loop of one seed: SGD on the mean of `every` batches."""
    module = seed_module(learner, seed)
    optimizer = torch.optim.SGD(module.parameters(), lr=SMALL.lr * every**0.5)
    for i in range(count):
        rows = learner.stream.rows(0, 8 * i, 8 * i + 8)
        loss = F.cross_entropy(module(rows.x[seed]), rows.y[seed]) / every
        (loss if extra is None else loss + extra(module)).backward()
        if (i + 1) % every == 0:
            optimizer.step()
            optimizer.zero_grad()
    return module


@pytest.mark.parametrize(("method", "every"), [("plain", 1), ("accumulate", 4), ("k3_rates", None)])
def test_controls_are_their_textbook_loops(method: str, every: int | None):
    learner = learner_of(method)
    if every is not None:
        module = descended(learner, 8, seed=1, every=every)
    else:
        module, rates = seed_module(learner, 1), {}
        for level, n in (("fast", 1), ("mid", 4), ("slow", 16)):
            rates |= dict.fromkeys(learner.timescales.weights(level), 0.1 * n**-0.5)
        groups = [
            {"params": [p], "lr": rates[name]}
            for name, p in zip(learner.params, module.parameters(), strict=True)
        ]
        optimizer = torch.optim.SGD(groups)
        for i in range(8):
            rows = learner.stream.rows(0, 8 * i, 8 * i + 8)
            optimizer.zero_grad()
            F.cross_entropy(module(rows.x[1]), rows.y[1]).backward()
            optimizer.step()
    steps(learner, 8)
    assert_seed_is(learner, 1, module)


@pytest.mark.parametrize(("method", "periods"), [("k3", [1, 4, 16]), ("k5", [1, 2, 4, 8, 16])])
def test_levels_by_depth_own_whole_layers_the_last_the_fastest(method: str, periods: list[int]):
    learner = learner_of(method)
    assert [level.every.n for level in learner.timescales.levels] == periods
    owned = [learner.timescales.weights(level.name) for level in learner.timescales.levels]
    assert "layers.4.weight" in owned[0]
    assert "layers.0.bias" in owned[-1]
    assert sum(len(names) for names in owned) == 10


def test_l2_init_is_the_penalty():
    learner = learner_of("l2_init", l2_init=2.0)
    start = [p.detach().clone() for p in seed_module(learner, 0).parameters()]

    def penalty(module: nn.Sequential) -> Tensor:
        pairs = zip(module.parameters(), start, strict=True)
        return torch.stack([(p - q).square().sum() for p, q in pairs]).sum()

    module = descended(learner, 6, seed=0, extra=penalty)
    steps(learner, 6)
    assert_seed_is(learner, 0, module)


@pytest.mark.parametrize("name", [DIGITS, SLOW])
def test_fisher_is_the_mean_square_of_single_gradients(name: str):
    learner = learner_of("ewc", stream=name)
    rows = learner.stream.rows(0, 0, 5)
    found = baselines.fisher(learner.params, rows)
    module = seed_module(learner, 1)
    expected = [torch.zeros_like(p) for p in module.parameters()]
    for x in rows.x[1]:
        outputs = module(x)
        logs = outputs.log_softmax(-1) if name == DIGITS else outputs
        shares = logs.exp().detach() if name == DIGITS else torch.ones(1)
        for log, share in zip(logs, shares, strict=True):
            grads = torch.autograd.grad(log, list(module.parameters()), retain_graph=True)
            for total, grad in zip(expected, grads, strict=True):
                total += share * grad.square() / 5
    for (parameter, values), wanted in zip(found.items(), expected, strict=True):
        one = values[1].T if parameter.endswith("weight") else values[1]
        torch.testing.assert_close(one, wanted, rtol=1e-9, atol=1e-12)


def test_online_ewc_decays_toward_the_last_task_by_importance():
    learner = learner_of("ewc", ewc=50.0)
    online = baselines.OnlineEwc(learner)
    learner.hooks = supervised.Hooks(rates=online.rates, ended=online.ended)
    steps(learner, 4)
    learner.end(0)
    rows = learner.stream.rows(0, 48, 64)  # the last 16
    first = baselines.fisher(learner.params, rows)
    anchor = {name: w.detach().clone() for name, w in learner.params.items()}
    torch.testing.assert_close(online.fisher, first)
    steps(learner, 1, task=1)
    before = {name: w.detach().clone() for name, w in learner.params.items()}
    batch = learner.stream.rows(1, 8, 16)
    outputs, _ = supervised.forward(learner.params, batch.x)
    loss = supervised.losses(outputs, batch).mean(-1).sum()
    grads = dict(zip(before, torch.autograd.grad(loss, list(learner.params.values())), strict=True))
    learner.step(batch)
    for name, w in learner.params.items():
        z = 0.1 * 50.0 * first[name]
        expected = before[name] + z / (1 + z) * (anchor[name] - before[name]) - 0.1 * grads[name]
        torch.testing.assert_close(w.detach(), expected)
    learner.end(1)
    second = baselines.fisher(learner.params, learner.stream.rows(1, 48, 64))
    torch.testing.assert_close(online.fisher, {n: 0.95 * first[n] + second[n] for n in first})


def test_a_reservoir_is_a_uniform_sample_of_the_past():
    stream = stream_of(SLOW, tuple(range(40)), samples=200)
    learner = Learner(stream, METHODS["reservoir"], SMALL._replace(hidden=(5,)))
    memory = baselines.Reservoir(learner)
    memory.begun(0)
    whole = torch.ones(40, 8, 20, dtype=torch.float64)
    for i in range(1, 26):
        rows = Rows(whole * i, whole[..., 0] * i)
        seen = memory.extend(rows)
        assert seen.y.shape == (40, 8 if i == 1 else 16)  # nothing to remember at first
        assert torch.equal(seen.y[:, :8], rows.y)
        assert (seen.y[:, 8:] < i).all()  # what comes out was there before
        assert torch.equal(seen.x[..., 0], seen.y)  # rows keep their labels
    kept = memory._y
    assert kept.shape == (40, 20)
    counts = np.bincount(kept.astype(int).ravel(), minlength=26)[1:]
    assert counts.sum() == 800  # 32 of each batch, were they all alike
    assert ((counts - 32) ** 2 / 32).sum() < 43  # chi-squared of 24 degrees, 99 %


def test_cls_er_stays_near_the_average_that_knows_better():
    learner = learner_of("cls_er", consistency=1.0)
    steps(learner, 5)
    memory = baselines.Consistency(learner)
    rows = learner.stream.rows(0, 40, 56)  # 8 new and 8 old
    outputs = supervised.forward(learner.params, rows.x)[0].detach()
    assert memory.penalty(rows, outputs[:, :8]) is None
    found = memory.penalty(rows, outputs)
    assert found is not None
    old = Rows(rows.x[:, 8:], rows.y[:, 8:])
    averages = [
        supervised.forward(learner.timescales.weights(n), old.x)[0].detach()
        for n in ("plastic", "stable")
    ]
    errors = [supervised.losses(o, old) for o in averages]
    for seed in range(3):
        total = 0.0
        for row in range(8):
            best = averages[0] if errors[0][seed, row] < errors[1][seed, row] else averages[1]
            total += float((outputs[seed, 8 + row] - best[seed, row]).square().mean()) / 8
        assert float(found[seed]) == pytest.approx(total)


def test_a_fresh_agent_for_each_task():
    learner = learner_of("fresh", rule="adamw", lr=0.01)
    steps(learner, 4)
    learner.end(0)
    learner.begin(1)
    torch.testing.assert_close({n: w.detach() for n, w in learner.params.items()}, learner.fresh(1))
    assert learner.timescales.state_dict()["levels"]["all"]["rule"]["state"] == {}


def test_shrink_and_perturb_at_a_new_task():
    learner = learner_of("shrink_perturb")
    steps(learner, 3)
    before = {name: w.detach().clone() for name, w in learner.params.items()}
    learner.begin(1)
    for name, w in learner.params.items():
        torch.testing.assert_close(w.detach(), 0.8 * before[name] + 0.2 * learner.fresh(1)[name])


def test_renewed_units_start_anew_and_others_are_left():
    learner = learner_of("redo", rule="adamw", lr=0.01)
    steps(learner, 2)
    moments = learner.timescales.state_dict()["levels"]["all"]["rule"]["state"]
    before, old = (
        {n: w.detach().clone() for n, w in learner.params.items()},
        copy.deepcopy(moments),
    )
    chosen = [torch.zeros(3, 6, dtype=torch.bool) for _ in range(4)]
    chosen[1][2, 4] = True  # of seed 2, unit 4 of the second hidden layer
    renewal = baselines.Renewal(learner)
    renewal.updates = 2
    renewal.renew(chosen)
    changed = {
        "layers.1.weight": (2, slice(None), 4), "layers.1.bias": (2, 4), "layers.2.weight": (2, 4)
    }  # fmt: skip
    wanted = {n: w.clone() for n, w in before.items()}
    for name, place in changed.items():
        wanted[name][place] = learner.fresh(2)[name][place] if name == "layers.1.weight" else 0.0
        for kind in ("exp_avg", "exp_avg_sq"):
            old[name][kind][place] = 0.0
    torch.testing.assert_close(
        {n: w.detach() for n, w in learner.params.items()}, wanted, rtol=0, atol=0
    )
    for name, entry in learner.timescales.state_dict()["levels"]["all"]["rule"]["state"].items():
        for kind in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(entry[kind], old[name][kind])


def test_redo_renews_what_is_dormant():
    learner = learner_of("redo", tau=0.0, redo_every=1)
    with torch.no_grad():
        learner.params["layers.0.bias"][1, 3] = -100.0  # never on again
    steps(learner, 1)
    assert learner.params["layers.0.bias"][1, 3] == 0.0
    assert (learner.params["layers.1.weight"][1, 3] == 0.0).all()
    assert torch.equal(
        learner.params["layers.0.weight"][1, :, 3], learner.fresh(1)["layers.0.weight"][1, :, 3]
    )


def test_continual_backprop_renews_the_least_used_of_the_mature():
    learner = learner_of("cbp", replacement=0.05, maturity=3)
    cbp = baselines.ContinualBackprop(learner)
    hidden = [torch.arange(1.0, 7).expand(3, 8, 6).double() for _ in range(4)]
    with torch.no_grad():
        for i in range(1, 5):
            learner.params[f"layers.{i}.weight"].fill_(1.0)
            learner.params[f"layers.{i}.weight"][1, 5] = 1e-3  # of no use to what follows
            learner.params[f"layers.{i}.bias"].zero_()
    for _ in range(6):  # mature after 3; then 6 units gather 0.3 a step: the fourth renews
        cbp.updated(hidden)
        assert all(age.min() > 0 for age in cbp.age)
    cbp.updated(hidden)
    for i in range(4):
        assert cbp.age[i][0].tolist() == [0, 7, 7, 7, 7, 7]
        assert cbp.age[i][1].tolist() == [7, 7, 7, 7, 7, 0]
        assert (learner.params[f"layers.{i + 1}.weight"][0, 0] == 0).all()
    # its mean of 1, times what left, goes to the next bias; times 6 and 1e-3 in seed 1
    torch.testing.assert_close(learner.params["layers.4.bias"][0].detach(), torch.ones(10).double())
    torch.testing.assert_close(
        learner.params["layers.4.bias"][1].detach(), torch.full((10,), 6e-3).double()
    )


# ---- cost --------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", ["plain", "k3", "k5"])
def test_products_of_levels_are_those_that_torch_counts(method: str):
    learner = learner_of(method)
    costs = supervised.level_costs(learner)
    counted = supervised.flops(stream_of(), METHODS[method], SMALL)
    assert sum(cost["flops"] for cost in costs.values()) == pytest.approx(counted)
    expected = 64 * 6 + 3 * 36 + 60 + 4 * 6 + 10
    assert sum(cost["parameters"] for cost in costs.values()) == expected
    for cost in costs.values():  # gradients 2 - 1/n, then 3/n in the move; SGD has no moments
        moved = learner.dtype.itemsize * cost["parameters"] * (2 + 2 / cost["n"])
        assert cost["bytes"] == pytest.approx(moved / learner.settings.batch)


def test_rehearsal_costs_twice_and_fisher_is_shared_by_the_rows():
    plain, reservoir, ewc = (
        supervised.flops(stream_of(), METHODS[name], SMALL)
        for name in ("plain", "reservoir", "ewc")
    )
    assert reservoir == pytest.approx(2 * plain)
    assert ewc > plain
