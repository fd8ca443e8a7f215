"""The rates this machine really reaches, in matrix products and in reading memory: limits of any figure.

A data sheet's peak belongs to another clock, another number of cores, another library. The rate of one large
product, in the run's own number type and threads, is a limit the run could come close to; so is the rate at
which a buffer passes that no cache holds.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from puna.progress import quantity

SMALLEST, LARGEST = 256, 16_384
BUFFER = {"cpu": 512 << 20, "cuda": 4 << 30}  # bytes; several times the largest caches


@dataclass(frozen=True)
class Peak:
    """The best rate of a product of two square matrices, in floating-point operations per second."""

    flops: float
    dtype: torch.dtype
    device: torch.device
    threads: int

    def __str__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        where = f"{self.threads} threads" if self.device.type == "cpu" else str(self.device)
        return f"{quantity(self.flops)}FLOP/s ({kind} matrix products, {where}, measured)"


def measure_peak(device: torch.device, dtype: torch.dtype, seconds: float = 1.0) -> Peak:
    """Time products of growing matrices for about `seconds`; the best rate of any of them.

    The size doubles until one product takes a twentieth of the time: large enough to hide every overhead,
    small enough to be repeated.
    """
    size, best = SMALLEST, 0.0
    ends = time.perf_counter() + seconds
    took = _product_seconds(size, device, dtype)  # not counted: libraries start up
    while True:
        took = _product_seconds(size, device, dtype)
        best = max(best, 2.0 * size**3 / took)
        if time.perf_counter() > ends:
            return Peak(best, dtype, device, torch.get_num_threads())
        if took < seconds / 20 and size < LARGEST:
            size *= 2


@dataclass(frozen=True)
class Reading:
    """The best rate of reading memory once, from end to end, in bytes per second."""

    rate: float
    size: int
    device: torch.device
    threads: int

    def __str__(self) -> str:
        where = f"{self.threads} threads" if self.device.type == "cpu" else str(self.device)
        what = f"reading memory: the sum of {self.size >> 20:,} MiB"
        return f"{quantity(self.rate)}B/s ({what}, {where}, measured)"


def measure_reading(device: torch.device, seconds: float = 0.5) -> Reading:
    """Sum a buffer larger than the caches for about `seconds`, at least three times; the best rate.

    Integers of eight bytes: their sum is a load and an addition, so that the processor waits for nothing but
    memory. Of torch's reductions none was found to be faster, nor a loop written for the purpose.
    """
    size = BUFFER.get(device.type, BUFFER["cpu"])
    # Written once: pages never written are all one page of zeros, which a cache holds.
    buffer = torch.ones(size // 8, dtype=torch.int64, device=device)
    buffer.sum()  # not counted: libraries start up
    best, times = math.inf, 0
    ends = time.perf_counter() + seconds
    while times < 3 or time.perf_counter() < ends:
        _wait(device)
        began = time.perf_counter()
        buffer.sum()
        _wait(device)
        best, times = min(best, time.perf_counter() - began), times + 1
    return Reading(size / best, size, device, torch.get_num_threads())


def _product_seconds(size: int, device: torch.device, dtype: torch.dtype) -> float:
    # Random numbers, since zeros would draw less power and clock higher; from a generator of their own, since
    # the run's random state must not move.
    source = torch.Generator(device).manual_seed(0)
    left, right = (torch.rand(size, size, generator=source, device=device).to(dtype) for _ in range(2))
    _wait(device)
    began = time.perf_counter()
    F.linear(left, right)  # the layout of a layer's weight
    _wait(device)
    return time.perf_counter() - began


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
