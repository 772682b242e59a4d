"""Splits cover every name once, in order and in balance."""

import re
from itertools import combinations, pairwise

import pytest

from timescales.presets import part
from timescales.split import balanced

SIZES = {
    "world.encoder.conv.0.weight": 90,
    "world.encoder.conv.0.bias": 10,
    "world.encoder.conv.1.weight": 100,
    "world.dynamics.gru.weight": 300,
    "world.dynamics.out.weight": 100,
    "world.dynamics.start": 5,
    "world.decoder.conv.0.weight": 100,
    "world.reward.mlp.0.weight": 50,
    "world.reward.mlp.1.weight": 50,
    "world.continues.mlp.0.weight": 50,
    "actor.mlp.0.weight": 50,
    "actor.mlp.1.weight": 50,
    "actor.mlp.1.bias": 1,
    "critic.mlp.0.weight": 50,
    "critic.mlp.1.weight": 50,
}


def parts(by: str, of: int) -> list[list[str]]:
    regexes = [part(SIZES, by, i, of) for i in range(of)]
    return [[name for name in SIZES if re.search(regex, name)] for regex in regexes]


@pytest.mark.parametrize("by, of", [("depth", 1), ("depth", 3), ("depth", 7), ("block", 2)])
def test_every_name_has_one_part(by: str, of: int):
    found = parts(by, of)
    assert sorted(name for names in found for name in names) == sorted(SIZES)
    assert all(found)


def test_depth_runs_from_the_actor_to_the_encoder():
    fast, mid, slow = parts("depth", 3)
    assert {"actor.mlp.1.weight", "critic.mlp.0.weight", "world.reward.mlp.0.weight"} <= set(fast)
    assert {"world.decoder.conv.0.weight", "world.dynamics.out.weight"} <= set(mid)
    assert {"world.encoder.conv.0.weight", "world.encoder.conv.0.bias"} <= set(slow)
    shares = [sum(SIZES[name] for name in names) for names in (fast, mid, slow)]
    assert max(shares) < 2 * min(shares)


def test_block_takes_turns_inside_every_module():
    fast, slow = parts("block", 2)
    assert {"actor.mlp.1.weight", "actor.mlp.1.bias", "critic.mlp.1.weight"} <= set(fast)
    assert {"actor.mlp.0.weight", "critic.mlp.0.weight", "world.reward.mlp.0.weight"} <= set(slow)


def test_balanced_is_the_best_of_all_cuts():
    weights = [5, 1, 9, 2, 2, 7, 3]

    def cost(cuts: tuple[int, ...]) -> int:
        bounds = [0, *cuts, len(weights)]
        return sum(sum(weights[a:b]) ** 2 for a, b in pairwise(bounds))

    for of in (1, 2, 3, 4, 7):
        found = balanced(weights, of)
        assert cost(tuple(found)) == min(map(cost, combinations(range(1, len(weights)), of - 1)))


def test_names_alone_count_alike():
    assert re.search(part(["a.weight", "b.weight"], "depth", 0, 2), "b.weight")


@pytest.mark.parametrize(
    "by, i, of, text",
    [("depth", 0, 40, "lower k"), ("block", 7, 8, "lower k"), ("depth", 3, 3, "part 3 of 3"),
     ("width", 0, 2, "width")],
)  # fmt: skip
def test_a_split_that_cannot_be_says_why(by: str, i: int, of: int, text: str):
    with pytest.raises(ValueError, match=text):
        part(SIZES, by, i, of)
