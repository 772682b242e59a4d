"""Ownership is total, and each mistake says what is wrong."""

import pytest
import torch

from timescales import REST, Descend, Every, Level, Pull, Relax, Reset, Timescales, rules
from timescales.level import assign

from .problem import model

SGD = Descend(rules.sgd(0.1))
NAMED = dict(model().named_parameters())


def test_rest_takes_what_no_other_level_claims():
    owned = assign([Level("head", match=r"^4\.", flow=SGD), Level("body", match=REST)], NAMED)
    assert owned == {
        "head": ["4.weight", "4.bias"],
        "body": ["0.weight", "0.bias", "2.weight", "2.bias"],
    }


def test_a_copy_shadows_whoever_owns():
    levels = [Level("all", match=REST), Level("slow", copy=r"weight$")]
    assert assign(levels, NAMED)["slow"] == ["0.weight", "2.weight", "4.weight"]


def test_frozen_parameters_need_no_owner():
    module = model()
    module[0].requires_grad_(False)
    owned = assign(
        [Level("all", match="."), Level("slow", copy=".")], dict(module.named_parameters())
    )
    assert owned["all"] == ["2.weight", "2.bias", "4.weight", "4.bias"]
    assert len(owned["slow"]) == 6


@pytest.mark.parametrize(
    "levels, texts",
    [
        ([Level("a", match=r"^0")], ["no level owns 4: 2.weight", "match=REST"]),
        (
            [Level("a", match=r"^0"), Level("b", match="weight"), Level("c", match=REST)],
            ["claimed twice: 1: 0.weight (by a, b)"],
        ),
        ([Level("a", match=REST), Level("b", match="^layer")], ["'b' ('^layer') matches no"]),
        ([Level("a", match=REST), Level("b", match="^4.wieght")], ["did you mean 4.weight"]),
        ([Level("a", match="."), Level("b", match=REST)], ["'b' ('the rest') matches no"]),
        ([Level("a", match=REST), Level("b", match=REST)], ["['a', 'b'] all match REST"]),
        ([Level("a", match=REST), Level("a", copy=".")], ["same name: ['a']"]),
        ([Level("a", match="(")], ["level 'a' ('(')"]),
    ],
)
def test_a_schedule_that_does_not_fit_says_why(levels: list[Level], texts: list[str]):
    with pytest.raises(ValueError) as caught:
        assign(levels, NAMED)
    assert all(text in str(caught.value) for text in texts), caught.value


def test_all_problems_are_told_at_once():
    levels = [Level("a", match=r"^0"), Level("b", match=r"^0\.w"), Level("c", match="nothing")]
    with pytest.raises(ValueError) as caught:
        assign(levels, NAMED)
    assert all(text in str(caught.value) for text in ("no level owns", "twice", "matches no"))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Level("params", match="."),
        lambda: Level("a/b", match="."),
        lambda: Level("a"),
        lambda: Level("a", match=".", copy="."),
        lambda: Level("a", copy=".", flow=SGD),
        lambda: Pull("params", 0.1, outer=rules.sgd()),
        lambda: Descend(rules.sgd(), reduce="max"),  # pyright: ignore[reportArgumentType]
    ],
)
def test_a_level_that_cannot_be_is_refused(make):
    with pytest.raises(ValueError):
        make()


@pytest.mark.parametrize(
    "level, text",
    [
        (Level("a", match=".", flow=Pull("params")), "itself"),
        (Level("a", match=".", relax=(Relax("a", 0.1),)), "itself"),
        (Level("a", match=".", reset=(Reset("head", Every(2)),)), "level 'head' lacks 4"),
        (Level("a", match=".", every=Every(p=0.5), flow=SGD), "generator"),
        (Level("a", match=".", relax=(Relax("zero", 0.1, noise=1.0),)), "generator"),
    ],
)
def test_the_engine_refuses_what_must_fail(level: Level, text: str):
    head = Level("head", copy=r"^4", flow=Pull("params"))
    with pytest.raises(ValueError, match=text):
        Timescales(NAMED.items(), [level, head])


def test_the_table_tells_the_schedule():
    levels = [
        Level("head", match=r"^4", flow=Descend(rules.adamw(lr=0.5))),
        Level("body", match=REST, every=Every(4, phase=1), flow=SGD, relax=(Relax("init", 0.1),)),
        Level("slow", copy=".", every=Every(p=0.5), flow=Pull("params", 0.02)),
    ]
    rows = Timescales(NAMED.items(), levels, torch.Generator()).table()
    assert [row["parameters"] for row in rows] == [12, 65, 77]
    assert [row["kind"] for row in rows] == ["match", "match", "copy"]
    assert sum(row["share"] for row in rows[:2]) == pytest.approx(1.0)
    assert rows[0]["flow"].startswith("descend AdamW(lr=0.5")
    assert rows[1]["every"] == "every 4 updates phase 1"
    assert rows[1]["relax"] == ["relax to init at 0.1"]
    assert rows[2]["flow"] == "pull to params at 0.02"
    assert not any(row["handed_in"] for row in rows)


def test_the_table_tells_what_ticks_must_hand_in():
    levels = [
        Level("all", match=".", flow=SGD, relax=(Relax("anchor", "fisher"), Relax("init", 0.1))),
        Level("anchor", copy=".", flow=Pull("users", lambda updates: 0.5)),
    ]
    rows = Timescales(NAMED.items(), levels).table()
    assert [row["handed_in"] for row in rows] == [["fisher"], ["users"]]
