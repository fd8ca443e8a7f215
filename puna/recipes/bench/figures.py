"""What a benchmark reports: a figure beside the machine's limit, measured at the same moment, and memory."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from puna.plan.measure import Peak, Reading, measure_peak, measure_reading

Say = Callable[[str], None]
SECONDS = 0.4  # for each limit, before and after every repeat


@dataclass(frozen=True)
class Limits:
    """What the machine can do at most; `narrow` is the peak of numbers of eight bits, where they are
    multiplied: whole ones, or those of float8.
    """

    peak: Peak
    reading: Reading
    narrow: Peak | None = None

    def seconds(self, read: float, flops: float, narrow: float = 0.0) -> dict[str, float]:
        """The least that reading so many bytes takes, and computing so much; the larger is the floor.

        That is the roofline (doi 10.1145/1498765.1498785): a perfect program does the one during the other.
        The operations on numbers of eight bits are counted at their own rate, since that of others is lower.
        """
        matrix = flops / self.peak.flops
        if self.narrow is not None:
            matrix += narrow / self.narrow.flops
        return {"memory": read / self.reading.rate, "matrix": matrix}

    def better(self, other: Limits) -> Limits:
        """The higher of each."""
        return Limits(
            max(self.peak, other.peak, key=lambda peak: peak.flops),
            max(self.reading, other.reading, key=lambda reading: reading.rate),
            max(filter(None, (self.narrow, other.narrow)), key=lambda peak: peak.flops, default=None),
        )


def measure_limits(device: torch.device, dtype: torch.dtype, whole: bool = False) -> Limits:
    """All of them, in less than three seconds; `whole`: that of whole numbers too."""
    return Limits(
        measure_peak(device, dtype, SECONDS),
        measure_reading(device, SECONDS),
        measure_peak(device, torch.int8, SECONDS) if whole else None,
    )


@dataclass(frozen=True)
class Repeat:
    """A timed piece of work: what it did, had to read and compute, and what the machine could do.

    `flops` are operations on floating-point numbers, `narrow` those on numbers of eight bits.
    """

    seconds: float
    units: int
    read: float
    flops: float
    limits: Limits
    narrow: float = 0.0

    @property
    def floor(self) -> dict[str, float]:
        """Seconds by what takes them."""
        return self.limits.seconds(self.read, self.flops, self.narrow)

    @property
    def ratio(self) -> float:
        """Which share of the limit was reached."""
        return max(self.floor.values()) / self.seconds


@dataclass(frozen=True)
class Figure:
    """One row of a benchmark. `details` are JSON, and particular to what was measured."""

    what: str
    settings: dict[str, Any]
    unit: str
    repeats: Sequence[Repeat]
    environment: dict[str, Any]
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def typical(self) -> Repeat:
        """The repeat whose share of its limit is the median: its figures belong together.

        Other programs, and other machines of the same host, take memory bandwidth away for seconds at a time;
        limits are therefore measured around each repeat, and never set against another one's seconds.
        """
        return sorted(self.repeats, key=lambda repeat: repeat.ratio)[(len(self.repeats) - 1) // 2]

    @property
    def rate(self) -> float:
        """Units per second."""
        return self.typical.units / self.typical.seconds

    @property
    def spread(self) -> float:
        """Of the repeats' rates: from the lowest to the highest, as a share of the median."""
        rates = [repeat.units / repeat.seconds for repeat in self.repeats]
        return (max(rates) - min(rates)) / statistics.median(rates)

    @property
    def limit(self) -> tuple[float, str]:
        """Units per second at most, and by what: memory or matrix."""
        by, seconds = max(self.typical.floor.items(), key=lambda item: item[1])
        return self.typical.units / seconds, by

    def as_dict(self) -> dict[str, Any]:
        """{what, settings, value, unit, limit, ratio, environment} and details; JSON."""
        limit, by = self.limit
        limits = self.typical.limits
        return {
            "what": self.what,
            "settings": self.settings,
            "value": self.rate,
            "unit": self.unit,
            "limit": limit,
            "ratio": self.typical.ratio,
            "environment": self.environment,
            "details": {
                "limited_by": by,
                "read_bytes_per_s": limits.reading.rate,
                "matrix_flops": limits.peak.flops,
                "matrix_eight_bit_ops": None if limits.narrow is None else limits.narrow.flops,
                "repeats": [repeat.units / repeat.seconds for repeat in self.repeats],
                "repeat_ratios": [repeat.ratio for repeat in self.repeats],
                "spread": self.spread,
                **self.details,
            },
        }


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which a share of the values lies, between the two nearest ones in proportion.

    >>> percentile([1.0, 2.0, 4.0], 0.5), percentile([1.0, 2.0, 4.0], 0.75)
    (2.0, 3.0)
    """
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = ordered[math.floor(place)]
    return below + (ordered[math.ceil(place)] - below) * (place - math.floor(place))


class PeakMemory:
    """The most memory that something held beyond what was held before it: a process's, or a GPU's.

    A process's is resident memory, mapped files included, where Linux tells it; elsewhere it is None.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        _trim()
        self._before = self._held() or 0

    def restart(self) -> None:
        """Forget the most so far: it counts anew from what is held now."""
        _trim()
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")

    def most(self) -> int | None:
        """Bytes, since the last restart."""
        held = self._status("VmHWM") if self._device.type != "cuda" else self._cuda()
        return None if held is None else held - self._before

    def _held(self) -> int | None:
        return (
            torch.cuda.memory_allocated(self._device)
            if self._device.type == "cuda"
            else self._status("VmRSS")
        )

    def _cuda(self) -> int:
        return torch.cuda.max_memory_allocated(self._device)

    @staticmethod
    def _status(name: str) -> int | None:
        try:
            lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        except OSError:  # not Linux
            return None
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)


def _trim() -> None:
    """Give the system back what nothing uses; the C library keeps some of what was freed."""
    gc.collect()
    with contextlib.suppress(AttributeError, OSError, TypeError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)
