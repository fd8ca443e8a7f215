from __future__ import annotations

import itertools
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from puna.plan import measure

CPU = torch.device("cpu")


def test_the_reading_rate_is_bytes_by_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count()
    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: next(clock) * 0.25))
    monkeypatch.setattr(measure, "BUFFER", {"cpu": 1 << 20})
    reading = measure.measure_reading(CPU, seconds=2.0)
    assert (reading.rate, reading.size) == (2**20 / 0.25, 2**20)
    assert "4.19MB/s (reading memory: the sum of 1 MiB" in str(reading)


def test_no_other_program_reads_much_faster() -> None:
    """NumPy's sum on one core reads no more than all cores do; the two are measured in turns."""
    numbers = np.ones(64 << 17, dtype=np.int64)
    ours, theirs = 0.0, 0.0
    for _ in range(3):
        ours = max(ours, measure.measure_reading(CPU, seconds=0.02).rate)
        began = time.perf_counter()
        numbers.sum()
        theirs = max(theirs, numbers.nbytes / (time.perf_counter() - began))
    assert 0.5 * theirs < ours < 1e13


def test_the_buffer_is_larger_than_any_cache() -> None:
    assert measure.measure_reading(CPU, seconds=0.0).size >= 256 << 20
