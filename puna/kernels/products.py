"""How every product's C++ entry is told of its matrix: the structure of matrix.hpp, and the call's types."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor

SCALE_KINDS = {torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}
"""How an entry is told the type of scales; 0 is none."""

Call = Callable[[int, int, int, int, int, int], None]
"""Addresses of a `Described`, of rows and results; R; numbers from a row of results to the next; threads."""


class Described(ctypes.Structure):
    """A matrix in panels, by addresses: the tensors must outlive it."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("panels", "scales", "bias")),
        *((name, ctypes.c_int64) for name in ("inputs", "outputs", "group")),
        ("scale_kind", ctypes.c_int32),
    ]


def described(
    panels: Tensor, scales: Tensor | None, bias: Tensor | None, inputs: int, outputs: int, group: int
) -> Described:
    """What an entry reads of a matrix (`outputs`, `inputs`), `group` of whose inputs share a scale."""
    kind = 0 if scales is None else SCALE_KINDS[scales.dtype]
    addresses = (None if x is None else x.data_ptr() for x in (panels, scales, bias))
    return Described(*addresses, inputs, outputs, group, kind)


def entry(functions: ctypes.CDLL, name: str) -> Call:
    """A library's product of this name."""
    call = functions[name]
    call.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_int64] * 2 + [ctypes.c_int32]
    call.restype = None
    return call
