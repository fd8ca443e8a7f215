"""Memory that a tensor takes in pages of a mapped file, given back before the tensor ends."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import sys
from pathlib import Path

import numpy as np
from torch import Tensor

PAGEMAP = Path("/proc/self/pagemap")  # a 64-bit word for each page, as Linux describes it in pagemap.rst
HELD, FROM_FILE = np.uint64(0b11 << 62), np.uint64(1 << 61)  # present or swapped; of a file, or shared
DONT_NEED = 4  # MADV_DONTNEED


def trim() -> None:
    """Give the system back what was freed: the C library keeps what lies between blocks in use."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)


def release(tensor: Tensor) -> None:
    """Let go of the pages that only repeat a file; they are read again if anybody looks at them.

    Does nothing to memory of any other kind, and nothing where the system does not tell which kind it is: a
    page that was written to is lost when it is let go.
    """
    if tensor.device.type != "cpu" or sys.platform != "linux":
        return
    page = mmap.PAGESIZE
    first, end = -(-tensor.data_ptr() // page), (tensor.data_ptr() + tensor.nbytes) // page
    with contextlib.suppress(OSError):
        if first < end and _from_file(first, end - first):
            call = ctypes.CDLL(None).madvise
            call(ctypes.c_void_p(first * page), ctypes.c_size_t((end - first) * page), DONT_NEED)


def _from_file(first: int, count: int) -> bool:
    """Whether all of these pages that are in memory are as a file has them."""
    with PAGEMAP.open("rb") as file:
        file.seek(8 * first)
        words = np.frombuffer(file.read(8 * count), np.uint64)
    return len(words) == count and bool(np.all((words & HELD == 0) | (words & FROM_FILE != 0)))
