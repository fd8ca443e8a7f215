"""Progress of long work on standard error: how much is done, how fast, how long to go.

Rooms take a `track: Track = silent` argument and never print; the command line passes `on_stderr`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.progress import Progress

LINE_SECONDS = 10.0  # between two lines where standard error is not a terminal


class Tracker(Protocol):
    """What long work reports to while it runs."""

    def start_at(self, amount: float) -> None:
        """Count `amount` units as done earlier: they are part of the whole, and not of the rate."""

    def advance(self, amount: float, note: str = "") -> None:
        """Add `amount` units; `note` replaces the text at the end of the line."""

    def say(self, text: str) -> None:
        """Print a whole line above the progress."""


Track = Callable[[str, float, str], AbstractContextManager[Tracker]]
"""`track(label, total, unit)` → a context manager that gives a Tracker; a total of 0 is an unknown one."""


class _Silent:
    def start_at(self, amount: float) -> None:
        pass

    def advance(self, amount: float, note: str = "") -> None:
        pass

    def say(self, text: str) -> None:
        pass


@contextmanager
def silent(label: str, total: float, unit: str) -> Iterator[Tracker]:
    """A Track that shows nothing."""
    yield _Silent()


@contextmanager
def on_stderr(label: str, total: float, unit: str) -> Iterator[Tracker]:
    """A Track that draws a bar on a terminal, and prints a line now and then elsewhere."""
    if not sys.stderr.isatty():
        lines = _Lines(label, total, unit)
        try:
            yield lines
        finally:
            lines.finish()
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), TextColumn("{task.fields[text]}"))
    with Progress(*columns, console=Console(stderr=True), refresh_per_second=4) as bars:
        yield _Bar(bars, label, total, unit)


class _Meter:
    """Counts, and says rate and time left in words."""

    def __init__(self, total: float, unit: str) -> None:
        self.total, self.unit, self.done, self.earlier = total, unit, 0.0, 0.0
        self.began = time.monotonic()

    def add(self, amount: float) -> None:
        self.done += amount

    def start_at(self, amount: float) -> None:
        self.done = self.earlier = amount

    def describe(self, note: str) -> str:
        elapsed = time.monotonic() - self.began
        rate = (self.done - self.earlier) / elapsed if elapsed > 0 else 0.0
        parts = [f"{100 * self.done / self.total:3.0f}%"] if self.total else []
        if rate > 0:  # before anything is done nobody knows
            parts.append(f"{quantity(rate)} {self.unit}/s")
        if rate > 0 and self.total:
            parts.append(f"{duration(max((self.total - self.done) / rate, 0.0))} left")
        return "  ".join([*parts, *([note] if note else [])])


class _Bar:
    def __init__(self, bars: Progress, label: str, total: float, unit: str) -> None:
        self._bars, self._meter = bars, _Meter(total, unit)
        self._task = bars.add_task(label, total=total or None, text="")

    def start_at(self, amount: float) -> None:
        self._meter.start_at(amount)
        self._bars.update(self._task, completed=amount)

    def advance(self, amount: float, note: str = "") -> None:
        self._meter.add(amount)
        self._bars.update(self._task, advance=amount, text=self._meter.describe(note))

    def say(self, text: str) -> None:
        self._bars.console.print(text, highlight=False, markup=False)


class _Lines:
    def __init__(self, label: str, total: float, unit: str) -> None:
        self._label, self._meter, self._note = label, _Meter(total, unit), ""
        self._shown = time.monotonic()
        print(f"{label} …", file=sys.stderr, flush=True)

    def start_at(self, amount: float) -> None:
        self._meter.start_at(amount)

    def advance(self, amount: float, note: str = "") -> None:
        self._meter.add(amount)
        self._note = note
        if time.monotonic() - self._shown >= LINE_SECONDS:
            self._shown = time.monotonic()
            self._print()

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def finish(self) -> None:
        meter = self._meter
        elapsed, done = time.monotonic() - meter.began, meter.done - meter.earlier
        print(f"{self._label}: {quantity(done)} {meter.unit} in {duration(elapsed)}", file=sys.stderr)

    def _print(self) -> None:
        print(f"{self._label}: {self._meter.describe(self._note)}", file=sys.stderr, flush=True)


def quantity(value: float) -> str:
    """A number with a metric prefix.

    >>> [quantity(x) for x in (0.5, 999, 12_345, 6_738_415_616)]
    ['0.5', '999', '12.3k', '6.74G']
    """
    for prefix, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g}{prefix}"
    return f"{value:.3g}"


def counted(count: float, noun: str) -> str:
    """So many of something.

    >>> counted(1, "request"), counted(1200, "request"), counted(0.5, "second")
    ('1 request', '1,200 requests', '0.5 seconds')
    """
    amount = f"{count:,}" if isinstance(count, int) else f"{count:,g}"
    return f"{amount} {noun}{'' if count == 1 else 's'}"


def duration(seconds: float) -> str:
    """Seconds as a person says them.

    >>> [duration(x) for x in (4.2, 75, 3 * 3600 + 120, 200_000)]
    ['4.2s', '1m15s', '3h02m', '2d07h']
    """
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f}s" if seconds < 10 else f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"
