"""Out of memory, told as what to lower."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from puna.errors import ResourceError

CPU_WORDS = ("can't allocate memory", "not enough memory")  # the words of torch's CPU allocators


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


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it is Python's, a device's, or the CPU allocator's complaint, which is a plain RuntimeError."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in CPU_WORDS)
