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
    """NumPy's sum on one core reads no more than all cores do; in turns, until the machine lets both work."""
    numbers = np.ones(64 << 17, dtype=np.int64)
    ours, theirs = 0.0, 0.0
    for _ in range(30):
        ours = max(ours, measure.measure_reading(CPU, seconds=0.02).rate)
        began = time.perf_counter()
        numbers.sum()
        theirs = max(theirs, numbers.nbytes / (time.perf_counter() - began))
        if 0.5 * theirs < ours:
            break
    assert 0.5 * theirs < ours < 1e13


def test_the_buffer_is_larger_than_any_cache() -> None:
    assert measure.measure_reading(CPU, seconds=0.0).size >= 256 << 20


def test_the_peak_of_float8_is_of_the_products_that_layers_form() -> None:
    peak = measure.measure_peak(CPU, torch.float8_e4m3fn, seconds=0.001)
    assert peak.flops > 0
    assert "FLOP/s (float8_e4m3fn matrix products, " in str(peak)


@pytest.mark.parametrize(("threads", "said"), [(1, "1 thread, measured"), (8, "8 threads, measured")])
def test_limits_say_on_how_many_threads(threads: int, said: str) -> None:
    assert said in str(measure.Peak(1e9, torch.float32, CPU, threads))
    assert said in str(measure.Reading(1e9, 1 << 20, CPU, threads))
