"""The page of results: blocks between marks, and a verdict that is read from intervals."""

from pathlib import Path

import numpy as np
import pytest

from experiments.benchmarks import results
from experiments.benchmarks.cells import Cell, Result
from experiments.benchmarks.tasks.summary import summarise

PLAN = [
    Cell("cl/A-v0", name, (0, 1, 2), {"tasks": 2, "again": "flipped", "frames": 80})
    for name in ("plain", "k3", "k3_rates", "accumulate", "k5")
]


def result(forgotten: float, learned: float = 0.0, core: float = 60.0) -> Result:
    noise = np.array([0.0, 0.01, 0.02])[:, None, None]
    scores = np.array([[0.1, 0.1], [0.8, 0.2], [0.8 - forgotten, 0.9]]) + noise
    scores[:, 1:] += learned
    info = {
        "core_seconds": core, "core_us_per_interaction": 1234.0, "flops_per_interaction": 2.5e6,
        "bytes_per_interaction": 1500.0, "commit": "0123456789abcdef+",
    }  # fmt: skip
    by_seed = {
        "again/auc": np.full(3, 0.5 - forgotten),
        "again/frames_to_learn": np.array([1000.0, 2000.0, 3000.0]),
    }
    return Result(scores, {"online": np.full((3, 2), 0.5)}, {}, info, by_seed)


def block(**given: Result) -> str:
    found = {cell.key: given[cell.method] for cell in PLAN if cell.method in given}
    done = [cell for cell in PLAN if cell.key in found]
    return results.page_of("nested bench x", PLAN, found, summarise(done, found))


def test_a_partial_page_says_what_is_missing():
    text = block(plain=result(0.5), k3=result(0.25))
    assert "2 of 5 cells, 2 core-minutes, commit 0123456789ab+." in text
    assert "**Not run yet:** k3_rates, accumulate, k5." in text
    assert "3 seeds, 2 tasks, then `flipped` again." in text and "`frames=80`" in text
    (row,) = [line for line in text.splitlines() if line.startswith("| `k3` ")]
    assert "| 0.250 [0.250, 0.250] |" in row and "| 20.0 | 1,234 | 2.50 | 1.5 |" in row
    assert "2,000 [1,000, 3,000]" in row
    (row,) = [line for line in text.splitlines() if line.startswith("| `k3 - plain`")]
    assert "**-0.250 [-0.250, -0.250]**" in row, "certain differences are bold"
    assert "+0.000 [+0.000, +0.000]" in row
    assert text.startswith("`nested bench x`; 2 of 5")
    assert text.endswith("No schedule stands beside both its controls yet.")


@pytest.mark.parametrize(
    ("k3", "expected"),
    [
        (result(0.1), "zero: `k3`; of these with no loss of learning accuracy: `k3`. Higher "
                      "in the end (AP_final): `k3`. More area when the context comes back: `k3`."),
        (result(0.1, -0.1), "zero: `k3`; of these with no loss of learning accuracy: none. Higher"),
        (result(0.3), "zero: none; of these with no loss of learning accuracy: none. Higher "
                      "in the end (AP_final): none. More area when the context comes back: none."),
    ],
)  # fmt: skip
def test_the_verdict_needs_both_controls(k3: Result, expected: str):
    rest = {"plain": result(0.5), "k3_rates": result(0.2), "accumulate": result(0.4)}
    text = block(k3=k3, k5=result(0.0), **rest)  # k5 without its own control is not judged
    assert "Of `k3`, forget less" in text and expected in text
    del rest["accumulate"]
    assert "No schedule stands" in block(k3=k3, **rest)


def test_a_block_is_written_anew_and_words_around_it_stay(tmp_path: Path):
    page = tmp_path / "RESULTS.md"
    results.put(page, "laptop", "one")
    results.put(page, "table", "two")
    page.write_text(page.read_text() + "\nWhat was tried.\n")
    results.put(page, "laptop", "three")
    text = page.read_text()
    assert text.startswith("# Results\n") and text.endswith("What was tried.\n")
    assert "one" not in text and text.index("three") < text.index("two")
    page.write_text("<!-- continual table -->")
    with pytest.raises(ValueError, match="has no <!-- end table -->"):
        results.put(page, "table", "four")
