"""How many updates a run makes: from epochs, tokens, or minutes on this machine."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from puna.progress import Track
from puna.recipes.training.settings import LengthSettings

MEASURED_SECONDS = 12.0  # of real updates
FORWARD_SHARE = 0.4  # of an update's time is what scoring as many tokens takes
OVERHEAD = 0.04  # of the time goes to samples, checkpoints and the report


@dataclass(frozen=True)
class Pace:
    """What one update takes in, and what time a run has.

    `rows` and `tokens` are those of one update; `scored` is how many tokens validation will read in all;
    `began` is when the run began, on `time.monotonic`; `seconds_per_step` measures, for minutes only.
    """

    rows: int
    tokens: int
    rows_per_epoch: int
    scored: int
    began: float
    seconds_per_step: Callable[[], float]


def steps_for(length: LengthSettings, pace: Pace) -> int:
    """The number of updates that a length comes to, rounded up.

    >>> steps_for(LengthSettings(tokens=5000), Pace(8, 2048, 100, 0, 0.0, lambda: 0.0))
    3
    >>> steps_for(LengthSettings(epochs=2), Pace(8, 2048, 100, 0, 0.0, lambda: 0.0))
    25
    """
    if length.steps is not None:
        return length.steps
    if length.epochs is not None:
        return math.ceil(length.epochs * pace.rows_per_epoch / pace.rows)
    if length.tokens is not None:
        return math.ceil(length.tokens / pace.tokens)
    assert length.minutes is not None
    return math.ceil(_steps_in_time(60 * length.minutes, pace))


def seconds_per_update(updates: Callable[[int], None], mean: Callable[[float], float], track: Track) -> float:
    """Seconds that one of `updates(count)` takes; the first few touch memory anew and are not counted.

    `mean` is that of a number over all ranks. An update waits for all of them: were each to count by its own
    clock, one would make more updates than another, and wait for ever.
    """
    with track("Measuring speed", 2, "rounds") as bar:
        per_step = mean(_timed(updates, 3) / 3)
        bar.advance(1)
        count = max(3, round(0.75 * MEASURED_SECONDS / per_step))
        seconds = _timed(updates, count) / count
        bar.advance(1)
    return seconds


def _steps_in_time(seconds: float, pace: Pace) -> float:
    """What fits, less what is spent already and what scoring will take."""
    per_step = pace.seconds_per_step()
    scoring = FORWARD_SHARE * pace.scored / pace.tokens * per_step
    left = seconds - (time.monotonic() - pace.began) - scoring
    return max(0.0, (1 - OVERHEAD) * left / per_step)


def _timed(updates: Callable[[int], None], count: int) -> float:
    began = time.perf_counter()
    updates(count)
    return time.perf_counter() - began
