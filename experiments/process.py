"""What a process asks of the machine before it learns: so many threads, and memory that it keeps.

An update frees the tensors that the next one needs again. glibc gives large ones back to the system
each time, and every page then costs a fault on its next use: a tenth of an image update. What has
been imported stays, so the garbage collector need not walk it again: 3 % of a small update.
"""

import ctypes
import gc
import platform

import torch

TRIM, MAPPED = -1, -3  # of mallopt(3)
LARGEST = 32 << 20  # bytes; the most that glibc takes for MAPPED


def settle(threads: int) -> None:
    """Use so many processor threads (0: as torch finds it) and keep freed memory, to the peak."""
    gc.collect()  # what an earlier run left behind must not stay for good
    gc.freeze()
    if threads:
        torch.set_num_threads(threads)
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(MAPPED, LARGEST)
        libc.mallopt(TRIM, (1 << 31) - 1)
