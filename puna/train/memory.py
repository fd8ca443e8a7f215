"""Out of memory, told as what to lower."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from puna.devices import is_out_of_memory
from puna.errors import ResourceError


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
