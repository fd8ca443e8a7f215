"""The rates this machine really reaches, in matrix products and in reading memory: limits of any figure.

A data sheet's peak belongs to another clock, another number of cores, another library. The rate of one large
product, in the run's own number type and threads, is a limit the run could come close to; so is the rate at
which a buffer passes that no cache holds.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from puna.kernels import float8
from puna.progress import counted, quantity

SMALLEST, LARGEST = 256, 16_384
BUFFER = {"cpu": 512 << 20, "cuda": 4 << 30}  # bytes; several times the largest caches


@dataclass(frozen=True)
class Peak:
    """The best rate of a product of two square matrices, in operations per second.

    They are those of floating point, or for torch.int8 of whole numbers whose sums are exact; those of
    torch.float8_e4m3fn are as kernels/float8.py has them, of numbers that are rounded already.
    """

    flops: float
    dtype: torch.dtype
    device: torch.device
    threads: int

    def __str__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        where = counted(self.threads, "thread") if self.device.type == "cpu" else str(self.device)
        unit = "FLOP/s" if self.dtype.is_floating_point else "OP/s"
        return f"{quantity(self.flops)}{unit} ({kind} matrix products, {where}, measured)"


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
        where = counted(self.threads, "thread") if self.device.type == "cpu" else str(self.device)
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
    left, right = (torch.rand(size, size, generator=source, device=device) for _ in range(2))
    if dtype == torch.int8:
        left, right = ((side * 254 - 127).to(dtype) for side in (left, right))
        return min(_seconds(product, device) for product in _whole_products(left, right))
    if dtype == torch.float8_e4m3fn:
        factors = float8.rounded(left), float8.rounded(right)
        return _seconds(lambda: float8.multiplied(*factors), device)
    left, right = left.to(dtype), right.to(dtype)
    return _seconds(lambda: F.linear(left, right), device)  # the layout of a layer's weight


def _seconds(product: Callable[[], Tensor], device: torch.device) -> float:
    _wait(device)
    began = time.perf_counter()
    product()
    _wait(device)
    return time.perf_counter() - began


def _whole_products(left: Tensor, right: Tensor) -> list[Callable[[], Tensor]]:
    """int8 × int8 → int32 by every way that may be the fastest on a device."""
    ways = [lambda: torch._int_mm(left, right.t())]
    if left.device.type == "cpu" and torch.backends.mkldnn.is_available():
        ways.append(_packed_product(left, right))
    return ways


def _packed_product(left: Tensor, right: Tensor) -> Callable[[], Tensor]:
    """oneDNN's, with its right side packed beforehand; its left side is unsigned, as processors multiply."""
    size = len(left)
    packed = torch.ops.onednn.qlinear_prepack(right, [size, size])
    ones, zeros = torch.ones(size), torch.zeros(size, dtype=torch.int64)
    above = (left.short() + 128).to(torch.uint8)

    def product() -> Tensor:
        found: Tensor = torch.ops.onednn.qlinear_pointwise(
            above, 1.0, 128, packed, ones, zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return found

    return product


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
