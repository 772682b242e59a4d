import platform
import subprocess
import sys
from pathlib import Path

import pytest

THP = "/sys/kernel/mm/transparent_hugepage/enabled"

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


LARGE = """
import torch
from experiments.process import settle

settle(1)
rows = [torch.ones(1_000_000) for _ in range(8)]
print(sum("hg" in line.split() for line in open("/proc/self/smaps") if line[:8] == "VmFlags:"))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc" or not Path(THP).exists(), reason="none here")
def test_the_heap_is_asked_for_in_large_pages():
    done = subprocess.run([sys.executable, "-c", LARGE], capture_output=True, text=True, check=True)
    assert int(done.stdout) >= 1
