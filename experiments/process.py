"""What a process asks of the machine before it learns: so many threads, and memory that it keeps.

An update frees the tensors that the next one needs again. glibc gives large ones back to the system
each time, and every page then costs a fault on its next use: a tenth of an image update. On Linux
the first of that memory is asked for in large pages, of which a processor's table holds more: 1 to
2 % of a small update. Scraps are joined with their neighbours at once, so that a tensor's place
fits the next of its size: 2 %. What has been imported stays, so the garbage collector need not walk
it again: 3 %.
"""

import ctypes
import gc
import platform

import torch

FAST, TRIM, MAPPED = 1, -1, -3  # of mallopt(3)
LARGEST = 32 << 20  # bytes; the most that glibc takes for MAPPED
HUGE = 14  # of madvise(2)
PAGE = 2 << 20  # bytes of a large page
RESERVED = 256 << 20  # bytes of the heap that large pages are asked for


def settle(threads: int) -> None:
    """Use so many processor threads (0: as torch finds it) and keep freed memory, to the peak."""
    gc.collect()  # what an earlier run left behind must not stay for good
    gc.freeze()
    if threads:
        torch.set_num_threads(threads)
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(FAST, 0)
        libc.mallopt(MAPPED, LARGEST)
        libc.mallopt(TRIM, (1 << 31) - 1)
        if platform.system() == "Linux":
            use_large_pages(libc)


def use_large_pages(libc: ctypes.CDLL) -> None:
    """Ask for large pages where the heap will grow next; they are taken when they are used."""
    libc.malloc.restype = ctypes.c_void_p
    size = LARGEST // 2  # less than what glibc would map apart from the heap
    blocks = [block for _ in range(RESERVED // size) if (block := libc.malloc(size))]
    if blocks:
        start = -(-min(blocks) // PAGE) * PAGE
        length = (max(blocks) + size) // PAGE * PAGE - start
        if 0 < length <= 2 * RESERVED:  # else they do not stand together
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), HUGE)
    for block in blocks:
        libc.free(ctypes.c_void_p(block))
