"""The C++ attention over blocks: its call from Python and for other kernels, and which a device gets."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from puna.kernels.attention import plain
from puna.kernels.library import NAMES, Library, load
from puna.kernels.pages import Attend, Pages, Step

NO_WINDOW = 2**31 - 1


class DescribedPages(ctypes.Structure):
    """A layer's pages as C++ reads them, by addresses: the tensors must outlive it."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("keys", "values", "key_scales", "value_scales")),
        *((name, ctypes.c_int32) for name in ("kv_heads", "width", "padded")),
    ]


class _Step(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("tables", "offsets", "starts", "counts")),
        *((name, ctypes.c_int32) for name in ("sequences", "rows", "window", "threads")),
    ]


@dataclass(frozen=True)
class Kernel:
    """How a layer's pages are attended to on some device."""

    bind: Callable[[Pages, torch.dtype], Attend]
    """Of a layer's pages, for a model of some type."""
    fault: str = ""
    """Why it is plain torch on a CPU, in one line."""


def attention_on(device: torch.device) -> Kernel:
    """The C++ kernel on a CPU that has a compiler, else plain torch."""
    if device.type != "cpu":
        return Kernel(lambda pages, dtype: plain(pages))
    library = load("paged_attention")
    if library.functions is None:
        return Kernel(lambda pages, dtype: plain(pages), library.fault)
    return Kernel(lambda pages, dtype: native(pages, dtype, library))


def attend_entry(functions: ctypes.CDLL, pages: Pages, dtype: torch.dtype) -> Callable[..., None]:
    """The library's attention over such pages; `dtype` is that of q, k, v and the result."""
    suffix = "_int8" if pages.keys.dtype == torch.int8 else ""
    call = functions[f"attend_{NAMES[dtype]}{suffix}"]
    call.argtypes = [ctypes.c_void_p] * 6 + [ctypes.c_int32]
    call.restype = None
    return call


def described(pages: Pages) -> DescribedPages:
    """What attention reads of a layer's pages."""
    tensors = pages.keys, pages.values, pages.key_scales, pages.value_scales
    addresses = (None if x is None else x.data_ptr() for x in tensors)
    return DescribedPages(*addresses, *pages.heads)


def native(pages: Pages, dtype: torch.dtype, library: Library | None = None) -> Attend:
    """Attention in C++, on as many threads as torch has; `dtype` is that of q, k, v and the result."""
    functions = (library or load("paged_attention")).functions
    assert functions is not None
    call, held = attend_entry(functions, pages, dtype), described(pages)
    where = ctypes.addressof(held)

    def attend(step: Step, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        assert q.dtype == k.dtype == v.dtype == dtype and q.shape[:2] == (1, step.rows)
        out = torch.empty_like(q)
        prepared = prepare(step)  # held until the call returns: another thread may have the next one made
        call(where, prepared.address, q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), q.shape[2])
        return out

    # The library is given addresses only: what they lead to lives as long as the call can be made.
    attend.__dict__["held"] = (held, pages)
    return attend


@dataclass(frozen=True)
class Prepared:
    """A step as the library reads it, and the arrays that it leads to."""

    address: int
    held: tuple[object, ...]


@lru_cache(maxsize=1)
def prepare(step: Step) -> Prepared:
    """Made once for all layers."""
    offsets = [0, *accumulate(len(table) for table in step.tables)]
    flat = [block for table in step.tables for block in table]
    arrays = [array("i", numbers or [0]) for numbers in (flat, offsets, step.starts, step.counts)]
    pointers = [x.buffer_info()[0] for x in arrays]
    window = NO_WINDOW if step.window is None else min(step.window, NO_WINDOW)
    held = _Step(*pointers, len(step.counts), step.rows, window, torch.get_num_threads())
    return Prepared(ctypes.addressof(held), (held, *arrays))
