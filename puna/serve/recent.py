"""What happened lately, in bounded memory: rates over seconds, percentiles over the last answers."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Sequence

SHARES = (50, 95, 99)  # percentiles that are shown
KEPT = 1024  # values that percentiles are taken over


class Rate:
    """A count by seconds, for the last `seconds` of them."""

    def __init__(self, seconds: int) -> None:
        self._began = time.monotonic()
        self._counts: deque[tuple[int, int]] = deque(maxlen=seconds + 1)  # a second, and what came in it

    def add(self, count: int, now: float) -> None:
        """Count something that came now; times are of `time.monotonic` and do not run back."""
        second = int(now)
        if self._counts and self._counts[-1][0] == second:
            count += self._counts.pop()[1]
        self._counts.append((second, count))

    def over(self, seconds: int, now: float) -> float:
        """What came in a second, on average over the last whole ones, or over all since the start."""
        last = int(now)
        came = sum(count for second, count in tuple(self._counts) if last - seconds <= second < last)
        return came / min(seconds, max(1.0, now - self._began))


class Window:
    """The last values of something."""

    def __init__(self) -> None:
        self._values: deque[float] = deque(maxlen=KEPT)

    def add(self, value: float) -> None:
        """Keep it; the oldest goes."""
        self._values.append(value)

    def percentiles(self) -> dict[str, float | None]:
        """{"p50": …, "p95": …, "p99": …}; None where nothing was added."""
        ordered = sorted(self._values)
        return {f"p{share}": percentile(ordered, share) for share in SHARES}


def percentile(ordered: Sequence[float], share: float) -> float | None:
    """The least of ascending values that at least `share` percent do not exceed: one of them, none between.

    >>> percentile([1.0, 2.0, 3.0, 4.0], 50), percentile([1.0, 2.0, 3.0, 4.0], 95)
    (2.0, 4.0)
    """
    if not ordered:
        return None
    return ordered[max(0, math.ceil(share / 100 * len(ordered)) - 1)]
