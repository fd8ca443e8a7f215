"""Products with a matrix that lies in panels, in C++ and in plain torch: a row's bits are its own affair.

A panel is WIDTH outputs, turned so that what a step of their sums reads lies together; a step takes as many
inputs as the processor adds at once. Terms are added in order, input by input, for any number of rows.

    R rows   I inputs   O outputs   n inputs of a step   P = O/WIDTH, rounded up
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import sys
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from puna.kernels.library import NAMES, load
from puna.kernels.products import Call, described, entry

WIDTH = 32
HUGE = 1 << 21  # bytes of a large page
INPUTS = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 1}
"""n, by the number type."""

_PAIR = {
    torch.float16: torch.int32,
    torch.bfloat16: torch.int32,
    torch.float32: torch.int64,
    torch.float64: torch.complex128,
}
"""A type as wide as two numbers."""


def suits(weight: Tensor) -> bool:
    """Whether a matrix (O, I) can be multiplied by in panels here: on a CPU, by compiled code."""
    n = INPUTS.get(weight.dtype)
    return weight.device.type == "cpu" and n is not None and weight.shape[1] % n == 0 and bool(_calls())


def into_panels(*weights: Tensor, out: Tensor | None = None) -> Tensor:
    """Matrices (O, I) one below the other in panels, (P, I/n, WIDTH, n); what fills up the last is zero.

    `out` is where they are laid, if that is chosen.
    """
    if any(len(weight) % WIDTH for weight in weights[:-1]):
        weights = (torch.cat(weights),)
    first = weights[0]
    n, inputs = INPUTS[first.dtype], first.shape[1]
    count, steps = sum(map(count_of, map(len, weights))), inputs // n
    shape = (count, steps, WIDTH, n)
    panels = empty(shape, first.dtype, first.device) if out is None else out
    assert panels.shape == shape and panels.dtype == first.dtype and panels.is_contiguous()
    places = _words(panels)
    for weight in weights:
        words = _words(weight.unflatten(1, (-1, n))).contiguous()  # (O, I/n)
        _fill(words, places)
        places = places[count_of(len(words)) :]
    return panels


def count_of(outputs: int) -> int:
    """How many panels so many outputs fill."""
    return -(-outputs // WIDTH)


def _fill(words: Tensor, panels: Tensor) -> None:
    call = _filler(words)
    if call is None:
        plain_fill(words, panels)
    else:
        rows, steps = words.shape
        call(words.data_ptr(), panels.data_ptr(), rows, steps, torch.get_num_threads())


def plain_fill(words: Tensor, panels: Tensor) -> None:
    """Rows of words (O, I/n) into panels (P, I/n, WIDTH), in plain torch."""
    for panel, rows in zip(panels, words.split(WIDTH), strict=True):
        panel[:, : len(rows)] = rows.t()
        panel[:, len(rows) :] = 0


def out_of_panels(panels: Tensor, outputs: int) -> Tensor:
    """The matrix (O, I), bit for bit."""
    words = _words(panels)  # (P, I/n, WIDTH)
    matrix = words.new_empty(outputs, words.shape[1])
    for panel, rows in zip(words, matrix.split(WIDTH), strict=True):
        rows.copy_(panel.t()[: len(rows)])
    return matrix.view(panels.dtype)


def outputs_of(panels: Tensor, which: Tensor) -> Tensor:
    """Some rows (…, I) of the matrix, by their numbers (…)."""
    call = _gatherers().get(panels.itemsize * panels.shape[3]) if panels.device.type == "cpu" else None
    if call is not None and which.dtype == torch.int64 and panels.is_contiguous() and which.is_contiguous():
        count, steps = panels.shape[:2]
        found = panels.new_empty(*which.shape, steps * panels.shape[3])
        addresses = panels.data_ptr(), which.data_ptr(), found.data_ptr()
        if call(*addresses, which.numel(), count * WIDTH, steps):
            return found
    return plain_outputs_of(panels, which)


def plain_outputs_of(panels: Tensor, which: Tensor) -> Tensor:
    """The same in plain torch."""
    return _words(panels)[which // WIDTH, :, which % WIDTH].contiguous().view(panels.dtype)


def _words(x: Tensor) -> Tensor:
    """(…, n) → (…): what a step takes as one number, which is moved at once."""
    if x.shape[-1] == 1:
        return x[..., 0]
    x = x.contiguous()
    if x.storage_offset() % x.shape[-1]:
        x = x.clone()
    return x.view(_PAIR[x.dtype])[..., 0]


def multiply(x: Tensor, panels: Tensor, bias: Tensor | None, outputs: int) -> Tensor:
    """x (…, I) times the matrix, and the bias (O,): (…, O)."""
    if torch.is_grad_enabled() and x.requires_grad:
        found: Tensor = _Product.apply(x, panels, bias, outputs)
        return found
    return _product(x, panels, bias, outputs)


def plain(x: Tensor, panels: Tensor, bias: Tensor | None, outputs: int) -> Tensor:
    """The same in plain torch, which adds in orders of its own."""
    return F.linear(x, out_of_panels(panels, outputs), bias)


class _Product(torch.autograd.Function):
    """Gradients reach the input, so that what lies before can be trained, and not the matrix."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, panels: Tensor, bias: Tensor | None, outputs: int) -> Tensor:
        ctx.save_for_backward(panels)
        ctx.outputs = outputs
        return _product(x, panels, bias, outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (panels,) = ctx.saved_tensors
        return gradients[0] @ out_of_panels(panels, ctx.outputs), None, None, None


def _product(x: Tensor, panels: Tensor, bias: Tensor | None, outputs: int) -> Tensor:
    call = _calls().get(x.dtype) if x.device.type == "cpu" else None
    if call is None or panels.dtype != x.dtype or panels.shape[3] != INPUTS[x.dtype]:
        return plain(x, panels, bias, outputs)  # the model was moved to another type or device
    x = x.contiguous()
    *some, inputs = x.shape
    assert inputs == panels.shape[1] * panels.shape[3] and panels.is_contiguous()
    out = x.new_empty(*some, outputs)
    matrix = described(panels, None, bias, inputs, outputs, inputs)
    rows, threads = x.numel() // inputs, torch.get_num_threads()
    call(ctypes.addressof(matrix), x.data_ptr(), out.data_ptr(), rows, outputs, threads)
    return out


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory; on Linux in pages of 2 MiB as far as they go: a thread alone reads them a third faster."""
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or sys.platform != "linux" or size < HUGE:
        return torch.empty(shape, dtype=dtype, device=device)
    # Private: what could be shared with another process is never given large pages by most systems.
    memory = mmap.mmap(-1, size + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    begin = -whole.data_ptr() % HUGE
    with contextlib.suppress(OSError):  # a system that is built without them
        memory.madvise(mmap.MADV_HUGEPAGE, begin, size // HUGE * HUGE)
    return whole[begin : begin + size].view(dtype).view(shape)


def _filler(words: Tensor) -> Callable[[int, int, int, int, int], None] | None:
    """The compiled `plain_fill` for words of this size."""
    functions = load("laying").functions if words.device.type == "cpu" else None
    if functions is None or words.itemsize not in (2, 4):
        return None
    fill = functions[f"fill_{8 * words.itemsize}"]
    fill.argtypes = [ctypes.c_void_p] * 2 + [ctypes.c_int64] * 2 + [ctypes.c_int32]
    fill.restype = None
    return fill


@cache
def _gatherers() -> Mapping[int, Callable[[int, int, int, int, int, int], bool]]:
    """The compiled `plain_outputs_of`, by the bytes of a word."""
    functions = load("laying").functions
    if functions is None:
        return {}
    calls = {}
    for size in (2, 4):
        calls[size] = call = functions[f"gather_{8 * size}"]
        call.argtypes, call.restype = [ctypes.c_void_p] * 3 + [ctypes.c_int64] * 3, ctypes.c_bool
    return calls


@cache
def _calls() -> Mapping[torch.dtype, Call]:
    """The compiled product of each number type; empty where nothing can be compiled."""
    functions = load("panels").functions
    if functions is None:
        return {}
    return {dtype: entry(functions, f"multiply_{NAMES[dtype]}") for dtype in INPUTS}
