"""The memory benchmark: honest byte counts, a floor of its own bytes, a peer that is missing."""

import json

import pytest
import torch

from experiments.benchmarks import memory
from experiments.config import ConfigError
from nested import fast


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_reports_every_method_beside_its_floor(capsys: pytest.CaptureFixture[str]):
    assert memory.main(["--users", "8", "--rounds", "2", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    rows = result["users"]["8"]
    assert rows.keys() == memory.METHODS.keys() - {"gated kernel"}
    for row in rows.values():
        assert row["us_per_user"] > 0 and row["floor_us_per_user"] > 0
        assert row["interval"][0] <= row["ratio"] <= row["interval"][1]
    table = memory.text(result)
    assert all(name in table for name in rows)


@pytest.mark.parametrize("name", memory.METHODS)
def test_a_user_takes_little_more_than_its_weights(name: str):
    method = memory.METHODS[name]
    timed = memory.Timed(method._replace(kernel=False), 3, None)
    half = method.storage == torch.bfloat16
    assert timed.bytes() <= (0.55 if half else 1.05) * memory.weight_bytes(name)
    before = fast.tree_map(torch.clone, timed.users)
    timed.run()
    pairs = zip(fast.leaves(before), fast.leaves(timed.users), strict=True)
    assert not all(torch.equal(a, b) for a, b in pairs), "nothing was written"


def test_a_peer_that_does_not_run_is_named():
    with pytest.raises(ConfigError, match="titans-pytorch"):
        memory.peer("/no/such/python", [8], 1)
