"""The suite `dreamer4`: rows of the real thing at a tiny size, beside scripted peers; mistakes."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from experiments.benchmarks import dreamer4
from experiments.benchmarks.dreamer4 import SIZES, Subject
from experiments.config import ConfigError

PEER = """
import json, sys
print(json.dumps({"who": "peer-1", "params": {"tokenizer": 5, "dynamics": 6}}), flush=True)
for line in sys.stdin:
    name, count = line.split()
    found = [] if name == "decode" else [1000.0] * int(count)
    print(json.dumps({"seconds": found}), flush=True)
"""


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def rows_of(capsys: pytest.CaptureFixture[str], *words: str) -> list[dict[str, Any]]:
    assert dreamer4.main(["--size", "tiny", "--rounds", "2", "--json", *words]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_every_part_is_timed_counted_and_paired_with_a_peer(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "peer.py").write_text(PEER)
    monkeypatch.setattr(dreamer4, "PEER", tmp_path / "peer.py")
    missing = tmp_path / "python"
    missing.write_text("#!/bin/sh\necho no such module >&2\nexit 1\n")
    missing.chmod(0o755)
    words = ["--peer-python", sys.executable, "--peer-python", str(missing)]
    rows = rows_of(capsys, *words)
    ours = {row["what"]: row for row in rows if row["who"] == "nested"}
    assert list(ours) == ["tokenizer", "dynamics", "frame after 2", "frame after 5", "decode"]
    for row in ours.values():
        low, high = row["seconds_95"]
        assert 0 < low <= row["seconds"] <= high and row["gflop"] > 0
        limit = row["seconds"] * row["matmul_gflops"] / row["gflop"]
        assert row["limit"] == pytest.approx(limit) and row["target"] is None
    assert ours["frame after 2"]["gflop"] == ours["frame after 5"]["gflop"]
    ratios = {row["what"]: row["ratio"] for row in rows if row["what"].startswith("ratio")}
    assert ratios.keys() == {f"ratio {name}" for name in ours} - {"ratio decode"}
    assert ratios["ratio dynamics"] == pytest.approx(1000 / ours["dynamics"]["seconds"], rel=0.5)


def test_operations_are_those_of_the_shapes():
    """Products with weights alone, by hand: a frame passes the dynamics `steps` + 1 times."""
    size = SIZES["tiny"]._replace(dynamics=SIZES["tiny"].dynamics._replace(layers=1, every=2))
    subject = Subject(size, torch.device("cpu"))
    width = 16
    units = (8 * width // 3 + 7) // 8 * 8
    token = width * 2 * width + width * width + 3 * width * units
    core = subject.dynamics.core
    attention = 2 * (size.steps * core**2 + (core + 1) ** 2) * width
    tokens = size.steps * core + core + 1
    ends = (size.steps + 1) * (size.spatial * 2 * width * 8 + size.actions * width)
    ends -= 4 * 0 + size.actions * width * (size.steps - 1)  # actions are embedded once a call
    found = dreamer4.operations(subject.runs["frame after 2"])
    assert found == 2 * (tokens * token + attention + ends)


def test_updates_change_weights_and_frames_do_not():
    subject = Subject(SIZES["tiny"], torch.device("cpu"))
    for name, model in (("tokenizer", subject.tokenizer), ("dynamics", subject.dynamics)):
        before = [p.detach().clone() for p in model.parameters()]
        for other in ("frame after 2", "decode"):
            subject.runs[other]()
        assert all(map(torch.equal, before, model.parameters()))
        subject.runs[name]()
        after = [(n, p) for n, p in model.named_parameters() if not n.startswith(("agent", "task"))]
        names = [n for n, _ in model.named_parameters()]
        still = [n for n, p in after if torch.equal(p, before[names.index(n)])]
        assert not still  # only agent tokens wait for their own losses


def test_a_row_says_how_far_the_limit_is():
    row = dreamer4.row_of("dynamics", "x", np.array([[2.0], [4.0], [2.0]]), {"gflop": 50.0}, 100.0)
    assert row["seconds"] == 2 and row["limit"] == 4 and row["seconds_95"] == [2, 4]
    assert dreamer4.row_of("dynamics", "x", np.ones((2, 1)), {}, 1.0)["limit"] is None


def test_the_table_and_mistakes(capsys: pytest.CaptureFixture[str]):
    assert dreamer4.main(["--size", "tiny", "--rounds", "1"]) == 0
    assert "frame after 5" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="--rounds"):
        dreamer4.main(["--rounds", "0"])
