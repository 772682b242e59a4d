"""The pool of users: everyone gets back what was left, whoever sat in between."""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from nested import Adapter, fast
from nested.users import Records, Users, named


class State(NamedTuple):
    weights: Tensor
    inner: dict[str, Any]


def states(*values: float) -> State:
    """One user a value, which stands in every leaf."""
    x = torch.tensor(values)
    return State(
        x.view(-1, 1, 1).expand(-1, 2, 3).clone(),
        {"half": x.view(-1, 1).expand(-1, 4).bfloat16(), "count": x.long(), "on": (x > 0,)},
    )


def values(state: State) -> list[float]:
    for leaf in fast.leaves(state)[:3]:
        assert torch.equal(
            leaf.flatten(1)[:, 0] if leaf.dim() > 1 else leaf, state.weights[:, 0, 0]
        )
    return state.weights[:, 0, 0].tolist()


class InMemory:
    """A store in a dict, which remembers what it was asked."""

    def __init__(self) -> None:
        self.users: dict[Any, tuple[dict[str, Tensor], int]] = {}
        self.marks: list[dict] = []
        self.calls: list[tuple[str, list]] = []

    def put(self, ids, records: Records) -> None:
        self.calls.append(("put", list(ids)))
        for i, user in enumerate(ids):
            row = {name: x[i].clone() for name, x in records.fields.items()}
            self.users[user] = row, int(records.generation[i])

    def get(self, ids) -> tuple[Tensor, Records]:
        self.calls.append(("get", list(ids)))
        which = [i for i, user in enumerate(ids) if user in self.users]
        rows = [self.users[ids[i]] for i in which]
        fields = {
            name: torch.stack([row[name] for row, _ in rows]) if rows else x
            for name, x in named(states()).items()
        }
        return torch.tensor(which, dtype=torch.int64), Records(
            fields, torch.tensor([g for _, g in rows], dtype=torch.int64)
        )

    def forget(self, ids) -> None:
        for user in ids:
            self.users.pop(user, None)

    def mark(self) -> int:
        self.marks.append(dict(self.users))
        return len(self.marks) - 1

    def rewind(self, mark: int) -> None:
        self.users = dict(self.marks[mark])


def visit(users: Users, ids: list, new: float = 0.0, add: float = 1.0) -> list[float]:
    """Enter, add to every state, leave: what the users had when they came."""
    slots = users.enter(ids, states(new))
    found = values(users.gather(slots))
    users.scatter(slots, states(*(x + add for x in found)))
    users.leave(ids)
    return found


def test_users_find_what_they_left_and_new_ones_start():
    users = Users(states(0.0, 0.0), 3, InMemory())
    assert visit(users, [7, "ada", b"\x00"], new=5.0) == [5.0] * 3
    assert visit(users, [b"\x00", 7]) == [6.0, 6.0]
    assert visit(users, [1, 2, 3], new=8.0, add=2.0) == [8.0] * 3  # all three are evicted
    assert visit(users, ["ada", b"\x00", 7]) == [6.0, 7.0, 7.0]
    assert visit(users, [2]) == [10.0]
    assert users.bytes == 24 + 8 + 8 + 1 and len(users) == 3


def test_who_left_first_makes_room_and_who_is_seated_stays():
    store = InMemory()
    users = Users(states(0.0), 3, store)
    seated = users.enter(["seated"], states(9.0))
    visit(users, ["first"])
    visit(users, ["second"])
    visit(users, ["first"])  # used again: now "second" is the older one
    visit(users, ["third"])
    assert "second" not in users and {"seated", "first", "third"} <= set(users._slot)
    visit(users, ["second", "fourth"])
    assert values(users.gather(seated)) == [9.0] and "seated" not in store.users
    asked = [call for call in store.calls if call[0] == "get" and "first" in call[1]]
    assert len(asked) == 1  # the second time it was still in the pool


def test_a_full_pool_says_so_and_changes_nothing():
    users = Users(states(0.0), 2, InMemory())
    visit(users, [1])
    users.enter([2], states(0.0))
    before = users.state_dict()["fields"]
    with pytest.raises(ValueError, match="2 more need a slot and 1 of 2 are left"):
        users.enter([3, 4], states(1.0))
    with pytest.raises(ValueError, match="1 more need a slot and 0 of 2 are left"):
        users.enter([1, 3], states(1.0))  # 1 sits down and cannot make room for 3
    assert 1 in users and all(
        map(torch.equal, before.values(), users._rows(users._index([1, 2])).values())
    )


def test_without_a_store_the_evicted_are_forgotten_and_counted():
    users = Users(states(0.0), 1)
    visit(users, [1])
    assert visit(users, [2]) == [0.0] and users.forgotten == 1
    assert visit(users, [1]) == [0.0] and users.forgotten == 2


def test_a_broken_state_resets_its_user_alone():
    users = Users(states(0.0), 3)
    slots = users.enter([1, 2, 3], states(4.0))
    state = states(1.0, 2.0, 3.0)
    state.inner["half"][1, 2] = torch.nan
    users.scatter(slots, state)
    assert values(users.gather(slots)) == [1.0, 4.0, 3.0] and users.healed == 1


def test_rebased_once_on_the_next_use():
    calls: list[tuple[list[float], list[int]]] = []

    def rebase(state: State, generation: Tensor) -> State:
        calls.append((values(state), generation.tolist()))
        return states(*(x - 10.0 for x in calls[-1][0]))

    users = Users(states(0.0), 3, InMemory(), rebase)
    visit(users, ["stored"], new=30.0)
    slots = users.enter(["a", "b"], states(20.0))
    assert users.advance() == 1
    state = users.gather(slots[:1])
    assert values(state) == [10.0] and calls == [([20.0], [0])]
    users.advance()
    users.scatter(slots[:1], state)  # still of generation 1
    assert values(users.gather(slots)) == [0.0, 10.0]
    assert calls[1] == ([10.0, 20.0], [1, 0])
    assert values(users.gather(slots)) == [0.0, 10.0] and len(calls) == 2
    users.leave(["a", "b"])
    visit(users, [4, 5, 6])
    assert visit(users, ["stored"]) == [21.0] and calls[2] == ([31.0], [0])
    assert visit(users, ["a", "stored"]) == [0.0, 22.0] and len(calls) == 3


def test_adapted_users_keep_their_weights_when_the_slow_ones_move():
    module = nn.Linear(6, 5)

    def loss(params: dict[str, Tensor], row: Tensor) -> Tensor:
        return (fast.bind(module, params)(row) - 1).square().mean()

    adapter = Adapter(module, "", loss, lr=0.1, rank=2)
    first = adapter.initial(1, torch.Generator().manual_seed(0))
    moved = {"weight": first.delta["weight/left"][0] @ torch.randn(2, 6), "bias": torch.randn(5)}
    users = Users(first, 2, rebase=lambda state, _: adapter.rebase(state, moved))
    slots = users.enter(["a", "b"], first)
    state, _ = adapter(users.gather(slots), torch.randn(2, 3, 6))
    users.scatter(slots, state)
    users.leave(["a", "b"])
    before = adapter.weights(state)
    with torch.no_grad():
        for name, p in module.named_parameters():
            p += moved[name]
    users.advance()
    after = adapter.weights(users.gather(users.enter(["a"], first)))
    for name, weights in after.items():
        torch.testing.assert_close(weights[0], before[name][0])


def test_a_store_from_later_is_refused():
    store = InMemory()
    users = Users(states(0.0), 1, store)
    users.advance()
    visit(users, [1])
    with pytest.raises(ValueError, match="is of generation 1, the slow weights of 0; load"):
        Users(states(0.0), 1, store).enter([1], states(0.0))


def test_who_starts_again_is_of_this_generation():
    users = Users(states(0.0), 1, rebase=lambda state, _: states(-1.0))
    slots = users.enter([1], states(3.0))
    users.advance()
    users.scatter(slots, states(torch.nan))
    assert values(users.gather(slots)) == [3.0]


def test_a_loaded_pool_goes_on_as_the_saved_one_and_rewinds_its_store():
    store = InMemory()
    users = Users(states(0.0), 3, store)
    for ids in ([1, "b"], [b"c"], [4]):
        visit(users, ids)
    users.advance()
    users.enter([b"\xff"], states(2.0))
    saved = users.state_dict()
    script = [[1], ["b", b"c"], [4], [5]]
    first = [visit(users, ids) for ids in script]
    other = Users(states(0.0), 3, store)
    other.load_state_dict(saved)
    assert [visit(other, ids) for ids in script] == first
    assert other.generation == 1 and b"\xff" in other and other._slot == users._slot
    with pytest.raises(ValueError, match="3 slots loaded into one of 2"):
        Users(states(0.0), 2).load_state_dict(saved)
    wrong = saved | {"fields": {"weights": torch.zeros(3, 2, 3)}}
    with pytest.raises(ValueError, match="given \\['weights'\\]"):
        Users(states(0.0), 3).load_state_dict(wrong)


def test_the_forgotten_are_new_again():
    store = InMemory()
    users = Users(states(0.0), 2, store)
    visit(users, [1, 2])
    users.forget([1, "nobody"])
    assert len(users) == 1 and list(store.users) == [2]
    assert visit(users, [1], new=3.0) == [3.0]


def test_a_state_may_be_one_tensor_and_ids_a_tensor():
    users = Users(torch.zeros(1, 2), 2)
    slots = users.enter(torch.tensor([5, 6]), torch.ones(1, 2))
    users.scatter(slots, torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    assert users.gather(users.enter([6], torch.ones(1, 2))).tolist() == [[3.0, 4.0]]
    assert not users.gather(slots).requires_grad and 5 in users


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda users: users.enter([1, 1], states(0.0)), ValueError, "1 comes twice"),
        (lambda users: users.enter([1.5], states(0.0)), TypeError, "not 1.5"),
        (lambda users: users.enter([1], states(0.0, 0.0)), ValueError, "weights is .*(2, 2, 3)"),
        (lambda users: users.leave([1]), ValueError, "1 leaves without having entered"),
        (lambda users: users.scatter(torch.tensor([0]), states()), ValueError, "(0, 2, 3)"),
        (lambda users: users.enter([1], torch.zeros(1)), ValueError, "structure|State"),
        (lambda _: Users(states(0.0), 0), ValueError, "0 slots"),
        (lambda _: Users((), 1), ValueError, "states of nothing"),
    ],
)
def test_mistakes_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call(Users(states(0.0), 2))
