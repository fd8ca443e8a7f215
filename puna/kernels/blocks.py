"""GGUF's blocks of q8_0 and q4_0 straight into the panels of `integers.py`, in C++ and in plain torch.

A block is a float16 scale and 32 weights of a row: in q8_0 a byte each, in q4_0 16 bytes, of which byte j has
weight j in its low half and j + 16 in its high half. They may be taken in place, from the mapped file.

    O outputs   I inputs   P = O/WIDTH, rounded up
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from functools import cache

import torch
from torch import Tensor

from puna.kernels import integers, panels
from puna.kernels.integers import Stored
from puna.kernels.library import load

SIZE = 32  # weights of a block
BYTES = {"q8_0": 34, "q4_0": 18}
KINDS = {"q8_0": torch.int8, "q4_0": torch.uint8}
"""What panels of them hold."""

Fill = Callable[[int, int, int, int, int, int], None]


def suits(packed: Stored) -> bool:
    """Whether there is compiled code here that lays a matrix of such blocks out, and for products with it."""
    known = packed.scheme in _fillers() and integers.compiled()
    return known and packed.data.device.type == "cpu" and packed.data.is_contiguous()


def into_panels(
    scheme: str, blocks: Tensor, out: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Blocks (O, I/32 · bytes), uint8, in panels: data (P, I/4 or I/8, WIDTH, 4), scales (P, I/32, WIDTH).

    What fills up the last panel is zero. `out` is where they are laid, if that is chosen.
    """
    rows, count = len(blocks), blocks.shape[1] // BYTES[scheme]
    data, scales = out or integers.empty(KINDS[scheme], rows, count * SIZE, count, torch.float16)
    assert blocks.is_contiguous() and data.is_contiguous() and scales.is_contiguous()
    assert scales.shape == (panels.count_of(rows), count, panels.WIDTH) and scales.dtype == torch.float16
    assert data.shape[:2] == (len(scales), count * SIZE // integers.STEPS[KINDS[scheme]])
    call = _fillers()[scheme]
    addresses = blocks.data_ptr(), data.data_ptr(), scales.data_ptr()
    call(*addresses, rows, count, torch.get_num_threads())
    return data, scales


def plain_into_panels(scheme: str, blocks: Tensor) -> tuple[Tensor, Tensor]:
    """The same in plain torch."""
    each = blocks.unflatten(1, (-1, BYTES[scheme]))  # (O, I/32, bytes)
    scales = each[..., :2].clone(memory_format=torch.contiguous_format).view(torch.float16)[..., 0]
    data = each[..., 2:]
    if scheme == "q4_0":
        halves = torch.cat((data & 15, data >> 4), dim=-1)  # (O, I/32, 32), in the order of the inputs
        data = halves[..., ::2] | halves[..., 1::2] << 4
    return integers.into_panels((data.flatten(1).contiguous().view(KINDS[scheme]), scales))


@cache
def _fillers() -> Mapping[str, Fill]:
    """The compiled `plain_into_panels` of each scheme; empty where nothing can be compiled."""
    functions = load("laying").functions
    if functions is None:
        return {}
    calls = {}
    for scheme in BYTES:
        calls[scheme] = call = functions[f"fill_{scheme}"]
        call.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_int64] * 2 + [ctypes.c_int32]
        call.restype = None
    return calls
