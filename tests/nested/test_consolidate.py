"""Consolidation: visits add up to one source, and what was consolidated counts once."""

import pytest
import torch
from torch import Tensor, nn

from nested import Adapter, fast
from nested.adapt import AdapterState
from nested.consolidate import Moves, Visits
from nested.users import Users
from timescales import Every, Timescales, presets


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def module() -> nn.Linear:
    made = nn.Linear(3, 2, dtype=torch.float64)
    with torch.no_grad():
        made.weight.copy_(noise(2, 3, seed=1))
        made.bias.copy_(noise(2, seed=2))
    return made


def learned(num: int, seed: int) -> dict[str, Tensor]:
    return {"weight": noise(num, 2, 3, seed=seed), "bias": noise(num, 2, seed=seed + 50)}


def test_visits_in_batches_are_one_mean_of_all_of_them():
    slow = dict(module().named_parameters())
    one, two = learned(4, 3), learned(9, 4)
    visits = Visits.none(slow).add(one).add(two)
    source, weights = visits.source(slow)
    assert weights is None
    for name, p in slow.items():
        mean = torch.cat([one[name], two[name]]).mean(0)
        torch.testing.assert_close(source[name], (p + mean).detach().unsqueeze(0))
        assert not source[name].requires_grad


def test_visits_count_by_weight():
    slow, delta, weight = dict(module().named_parameters()), learned(3, 5), noise(3).abs()
    source, _ = Visits.none(slow).add(delta, weight).add(learned(2, 6), torch.zeros(2)).source(slow)
    mean = (weight[:, None] * delta["bias"]).sum(0) / weight.sum()
    torch.testing.assert_close(source["bias"][0], (slow["bias"] + mean).detach())


def test_nobody_is_no_source():
    slow = dict(module().named_parameters())
    with pytest.raises(ValueError, match="nobody has visited"):
        Visits.none(slow).source(slow)


def test_a_slow_level_moves_once_in_many_visits_to_the_mean_of_its_users():
    made = module()
    timescales = Timescales(made.named_parameters(), presets.fedavg(every=Every(10, "session")))
    slow = timescales.weights("params")
    before = {name: p.detach().clone() for name, p in slow.items()}
    visits, moved = Visits.none(slow), []
    batches = [learned(4, seed) for seed in (7, 8, 9)]
    for delta in batches:
        visits = visits.add(delta)
        source = visits.source(slow)
        moved.append(bool(timescales.tick("session", 4, sources={"user": source})))
    assert moved == [False, False, True]
    for name, p in slow.items():
        mean = torch.cat([delta[name] for delta in batches]).mean(0)
        torch.testing.assert_close(p.detach(), before[name] + mean)


def test_rebased_users_keep_their_weights():
    slow = dict(module().named_parameters())
    moves = Moves(slow)
    state = AdapterState(learned(3, 10), {})
    generation, weights = [], []
    for seed in range(3):  # a user of each generation
        generation.append(moves.generation)
        weights.append(slow["weight"].detach() + state.delta["weight"][seed])
        slow = {name: p.detach() + noise(*p.shape, seed=20 + seed) for name, p in slow.items()}
        assert moves.advance(slow) == seed + 1
    adapter = Adapter(module(), ".", lambda params, row: row, lr=1.0)
    rebased = adapter.rebase(state, moves.since(torch.tensor(generation)))
    torch.testing.assert_close(slow["weight"] + rebased.delta["weight"], torch.stack(weights))
    now = moves.since(torch.full((3,), moves.generation))
    assert torch.equal(adapter.rebase(rebased, now).delta["bias"], rebased.delta["bias"])


def test_who_stayed_away_too_long_is_rebased_from_the_oldest_that_is_known():
    slow = {"w": torch.zeros(2)}
    moves = Moves(slow, keep=3)
    for step in range(1, 6):
        moves.advance({"w": torch.full((2,), float(step))})
    since = moves.since(torch.tensor([0, 3, 4, 5]))["w"]
    assert since[:, 0].tolist() == [2.0, 2.0, 1.0, 0.0]
    state = moves.state_dict()
    other = Moves(slow, keep=3)
    other.load_state_dict(state)
    assert torch.equal(other.since(torch.tensor([4]))["w"], since[2:3])
    with pytest.raises(ValueError, match=r"moves of \['w'\], but given \['v'\]"):
        other.load_state_dict({"generation": 0, "stood": {"v": torch.zeros(1, 2)}})
    with pytest.raises(ValueError, match="keep=0"):
        Moves(slow, keep=0)


def test_a_pool_of_users_rebases_through_moves():
    made = module()

    def loss(params: dict[str, Tensor], row: tuple[Tensor, Tensor]) -> Tensor:
        return (fast.bind(made, params)(row[0]) - row[1]).square().sum()

    adapter = Adapter(made, ".", loss, lr=0.1)
    moves = Moves(adapter.slow)

    def rebase(state: fast.Tree, generation: Tensor) -> fast.Tree:
        assert isinstance(state, AdapterState)
        return adapter.rebase(state, moves.since(generation))

    pool = Users(adapter.initial(1), 4, rebase=rebase)
    slots = pool.enter([11, 12], adapter.initial(1))
    state, _ = adapter(pool.gather(slots), (noise(2, 3), noise(2, 2, seed=1)))
    pool.scatter(slots, state)
    before = adapter.weights(state)["weight"].detach()
    with torch.no_grad():
        made.weight += 1.0
    assert moves.advance(adapter.slow) == pool.advance()
    after = adapter.weights(pool.gather(slots))["weight"].detach()
    torch.testing.assert_close(after, before)
    fresh = pool.gather(pool.enter([13], adapter.initial(1)))
    torch.testing.assert_close(adapter.weights(fresh)["weight"][0], made.weight)
