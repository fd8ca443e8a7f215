"""Main memory kept between updates, and running out of memory told as what to lower."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from puna.devices import is_out_of_memory
from puna.errors import ResourceError

# malloc.h of glibc
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4


def keep_freed_memory(device: torch.device) -> bool:
    """Let this process keep what it frees, for the next update; whether that could be arranged.

    Every update asks for the same sizes again. Left to itself glibc gives large ones back to the system,
    which has to clear each page before it hands it out anew: up to a fifth of an update on a CPU.
    """
    if device.type != "cpu" or sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # another C library
        return False
    return bool(mallopt(_MMAP_MAX, 0) and mallopt(_TRIM_THRESHOLD, 2**31 - 1))


@contextmanager
def memory_errors(doing: str) -> Iterator[None]:
    """Turn every kind of running out of memory into a ResourceError; `doing` says what asked for it."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise ResourceError(
            f"out of memory while {doing}; lower micro_rows (the result stays the same up to rounding), "
            "row_length, or the size of the model"
        ) from None
