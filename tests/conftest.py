"""What every test starts from: a fixed seed, one thread, a folder of its own.

No test depends on the order of the others, and none leaves a file in the source tree.
"""

from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent

# One thread: the suite runs on shared cores, and small products are faster without a pool.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def clean_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Seeds torch, moves to an empty folder, and checks that the test left no global change."""
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
    # A child process started from there finds the packages, installed or not.
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    yield
    assert torch.get_default_dtype() == torch.float32, "the test changed torch's default dtype"
    assert torch.is_grad_enabled(), "the test left gradients switched off"
