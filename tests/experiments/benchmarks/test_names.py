"""Names in an option: known ones, each once, and what is said of another."""

import pytest

from experiments.benchmarks import counterfactual, imagination, recall
from experiments.benchmarks.names import names_in
from experiments.config import ConfigError

KNOWN = {"plain": 1, "k3": 2, "k5": 3}


def test_names_come_in_order_and_once():
    assert names_in("k5,plain,k5", KNOWN, "--methods", "method") == ("k5", "plain")
    assert names_in(None, KNOWN, "--methods", "method") == ()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            "k3,plian",
            "--methods = plian\nno such method\ndid you mean plain? choose from plain,k3,k5",
        ),
        ("zzz", "--methods = zzz\nno such method\nchoose from plain,k3,k5"),
        ("", "--methods = \nno such method\nchoose from plain,k3,k5"),
    ],
)
def test_an_unknown_name_is_told_with_the_choices(text: str, told: str):
    with pytest.raises(ConfigError) as caught:
        names_in(text, iter(KNOWN), "--methods", "method")
    assert str(caught.value) == told


@pytest.mark.parametrize(
    ("suite", "words", "told"),
    [
        (counterfactual, ["--arms", "own,all"], r"--arms = all\nno such arm"),
        (imagination, ["--arms", "reed"], r"--arms = reed\nno such arm\ndid you mean read"),
        (recall, ["--kinds", "gated_detla"], r"no such memory\ndid you mean gated_delta\?"),
    ],
)
def test_suites_check_their_names(suite, words: list[str], told: str):
    with pytest.raises(ConfigError, match=told):
        suite.main(words)
