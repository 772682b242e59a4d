import platform
import subprocess
import sys

import pytest

CODE = """
import resource, torch
from experiments.process import settle

settle(1)
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.zeros(4_000_000).add_(1)
before = faults()
for _ in range(20):
    torch.zeros(4_000_000).add_(1)
print(torch.get_num_threads(), faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")
def test_freed_memory_is_used_again_without_a_fault_for_each_page():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    threads, faults = map(int, done.stdout.split())
    assert threads == 1
    assert faults < 4000  # one page in twenty; 78,000 where every tensor is mapped anew
