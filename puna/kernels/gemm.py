"""The three products of a linear layer in training, of bfloat16 and summed in float32: C++, or plain torch.

Which it is depends on the processor alone: compiled code where there is an instruction for products of
bfloat16, and no unit for whole matrices of them, which torch's library uses well. An output's bits depend
neither on what is computed beside it nor on the number of threads.

    R rows   I inputs   O outputs, of all weights together
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from puna.kernels.library import load

WEIGHTS = {torch.bfloat16: 0, torch.float32: 1}
"""Types of weights and of results, as the C++ is told of them; weights of float32 are rounded to bfloat16."""

PIECE = 4096  # outputs whose gradients are formed in memory of their own, where they cannot be added at once


def available() -> bool:
    """Whether products of bfloat16 are compiled here, so that weights of float32 need no copy in it."""
    return _product() is not None


def linear(
    x: Tensor,
    weights: Sequence[Tensor],
    bias: Sequence[Tensor | None] | None = None,
    dtype: torch.dtype | None = None,
    into: Tensor | None = None,
) -> Tensor:
    """x (R, I) times weights (Oᵢ, I) one below the other, and their bias (Oᵢ,): (R, O) in `dtype`.

    `into` is memory of that shape and type for it, where it should not be fresh.
    """
    dtype = dtype or x.dtype
    if not _suit(dtype, (x,), weights if into is None else (*weights, into)):
        return plain_linear(x, weights, bias, dtype, into)
    added = None if bias is None else _joint(bias, weights)
    heights = [len(weight) for weight in weights]
    out = x.new_empty(len(x), sum(heights), dtype=dtype) if into is None else into
    _multiply(x, False, weights, False, out, bias=added)
    return out


def plain_linear(
    x: Tensor,
    weights: Sequence[Tensor],
    bias: Sequence[Tensor | None] | None,
    dtype: torch.dtype,
    into: Tensor | None = None,
) -> Tensor:
    """The same in plain torch, rounded to the type of x first."""
    if into is not None and into.dtype == x.dtype and len(weights) == 1 and bias is None:
        return torch.mm(x, weights[0].to(x.dtype).t(), out=into)
    added = [None] * len(weights) if bias is None else bias
    parts = [
        F.linear(x, weight.to(x.dtype), each if each is None else each.to(x.dtype))
        for weight, each in zip(weights, added, strict=True)
    ]
    joint = (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)).to(dtype)
    return joint if into is None else into.copy_(joint)


def input_gradient(grad: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Gradients (R, O) of a layer's outputs times its weights (Oᵢ, I): those of its input, (R, I)."""
    if not _suit(grad.dtype, (grad,), weights):
        return plain_input_gradient(grad, weights)
    out = grad.new_empty(len(grad), weights[0].shape[1])
    _multiply(grad, False, weights, True, out)
    return out


def plain_input_gradient(grad: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """The same in plain torch."""
    joint = weights[0] if len(weights) == 1 else torch.cat(tuple(weights))
    return grad @ joint.to(grad.dtype)


def weight_gradient(
    grad: Tensor, x: Tensor, out: Tensor | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Of a layer's outputs' gradients (R, O) and its input (R, I) its weight's, (O, I) in `dtype`.

    It is added to `out` where that is given, in place.
    """
    kind = dtype if out is None else out.dtype
    if not _suit(kind, (grad, x), () if out is None else (out,)):
        return plain_weight_gradient(grad, x, out, dtype)
    to = x.new_empty(grad.shape[1], x.shape[1], dtype=kind) if out is None else out
    _multiply(grad, True, (x,), True, to, add=out is not None)
    return to


def plain_weight_gradient(
    grad: Tensor, x: Tensor, out: Tensor | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The same in plain torch, rounded to the type of x first where that is not the sum's."""
    if out is None:
        return (grad.t() @ x).to(dtype)
    if out.dtype == x.dtype:
        return out.addmm_(grad.t(), x)
    for rows, some in zip(out.split(PIECE), grad.split(PIECE, dim=1), strict=True):
        rows.add_(some.t() @ x)  # piece by piece: a second tensor of the whole size may not fit
    return out


class _Part(ctypes.Structure):
    """Rows of the second factor, as the C++ is told of them."""

    _fields_ = [
        ("address", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("rows", "stride", "wide")),
    ]


class _Call(ctypes.Structure):
    """A product, as the C++ is told of it."""

    _fields_ = [
        ("first", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("stride", "upright", "parts_upright")),
        ("parts", ctypes.POINTER(_Part)),
        *((name, ctypes.c_int64) for name in ("count", "M", "N", "K")),
        ("out", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("out_stride", "out_wide", "add")),
        ("bias", ctypes.c_void_p),
        ("threads", ctypes.c_int64),
    ]


def _multiply(
    first: Tensor,
    upright: bool,
    parts: Sequence[Tensor],
    parts_upright: bool,
    out: Tensor,
    *,
    add: bool = False,
    bias: Tensor | None = None,
) -> None:
    """`out` becomes, or gains, the product of `first` and `parts`, which lie one below the other.

    Rows of an upright factor are terms of the sums, those of another are rows or columns of `out`.
    """
    height, widths = sum(len(part) for part in parts), {part.shape[1] for part in parts}
    K, M = first.shape if upright else first.shape[::-1]
    N = out.shape[1]
    # Else C++ would read or write beyond what there is.
    assert out.shape[0] == M and (height, *widths) == ((K, N) if parts_upright else (N, K))
    assert bias is None or len(bias) == N
    listed = (_Part * len(parts))(
        *[_Part(part.data_ptr(), len(part), part.stride(0), WEIGHTS[part.dtype]) for part in parts]
    )
    call, threads = _product(), torch.get_num_threads()
    assert call is not None
    address = None if bias is None else bias.data_ptr()
    described = _Call(first.data_ptr(), first.stride(0), upright, parts_upright, listed, len(parts), M, N, K,
                      out.data_ptr(), out.stride(0), WEIGHTS[out.dtype], add, address, threads)  # fmt: skip
    call(ctypes.addressof(described))


def _joint(bias: Sequence[Tensor | None], weights: Sequence[Tensor]) -> Tensor:
    """One bias (O,) for all outputs, rounded as weights are; where there is none it is zero."""
    parts = [
        weight.new_zeros(len(weight)) if each is None else each
        for each, weight in zip(bias, weights, strict=True)
    ]
    return torch.cat(parts).bfloat16().float()


def _suit(dtype: torch.dtype, factors: Sequence[Tensor], weights: Sequence[Tensor]) -> bool:
    """Whether compiled code takes these, and is there."""
    return (
        dtype in WEIGHTS
        and all(x.dtype == torch.bfloat16 for x in factors)
        and all(x.dtype in WEIGHTS for x in weights)
        and all(x.device.type == "cpu" and x.stride(1) == 1 and x.numel() for x in (*factors, *weights))
        and available()
    )


@cache
def _product() -> Callable[[int], None] | None:
    """The compiled product; None where plain torch is to be used."""
    functions = load("gemm").functions
    if functions is None:
        return None
    functions.available.restype = ctypes.c_bool
    if not functions.available():
        return None
    call = functions.product
    call.argtypes, call.restype = [ctypes.c_void_p], None
    return call
