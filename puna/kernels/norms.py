"""RMSNorm of a layer that learns, with its backward pass by hand, in C++ and in plain torch.

x is the residual stream, in a type of its own beside that of products: float32 beside bfloat16 in mixed runs.
What is rounded, and where, is as in the model's `RMSNorm`; the gradients are those of float32 (float64 of
float64), rounded once.

R rows   D width
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from puna.kernels.library import NAMES, load

TYPES = (
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.bfloat16),
)
"""(the residual stream's, products') that are compiled for."""

_POINTER, _COUNT = ctypes.c_void_p, ctypes.c_int64
_ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "norm": (*[_POINTER] * 6, *[_COUNT] * 2, ctypes.c_double, ctypes.c_int32),
    "norm_backward": (*[_POINTER] * 9, *[_COUNT] * 2, ctypes.c_int32),
}


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x (R, D) / √(mean(x²) + ε) · weight (D,), in `dtype`, and 1 / √(mean(x²) + ε) (R,)."""
    call = _call("norm", x, dtype, weight)
    if call is None:
        return plain_rms_norm(x, weight, eps, dtype)
    x = x.contiguous()
    y, rstd = torch.empty_like(x, dtype=dtype), x.new_empty(len(x), dtype=torch.float32)
    places = x.data_ptr(), None, weight.data_ptr(), None, y.data_ptr(), rstd.data_ptr()
    call(*places, *x.shape, eps, torch.get_num_threads())
    return y, rstd


def plain_rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The same in plain torch."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    rstd = torch.rsqrt(wide.square().mean(dim=-1) + eps)  # (R,)
    return ((wide * rstd[:, None]).to(x.dtype) * weight).to(dtype), rstd


def add_rms_norm(
    x: Tensor, delta: Tensor, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """x + delta (R, D), in x's type, and what `rms_norm` gives of it."""
    call = _call("norm", x, dtype, weight, delta)
    if call is None or delta.dtype != dtype:
        return plain_add_rms_norm(x, delta, weight, eps, dtype)
    x, delta = x.contiguous(), delta.contiguous()
    total, y = torch.empty_like(x), torch.empty_like(delta)
    rstd = x.new_empty(len(x), dtype=torch.float32)
    places = [each.data_ptr() for each in (x, delta, weight, total, y, rstd)]
    call(*places, *x.shape, eps, torch.get_num_threads())
    return total, y, rstd


def plain_add_rms_norm(
    x: Tensor, delta: Tensor, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The same in plain torch."""
    total = (x + delta).to(x.dtype)
    return total, *plain_rms_norm(total, weight, eps, dtype)


def rms_norm_backward(
    grad_y: Tensor, x: Tensor, rstd: Tensor, weight: Tensor, grad_total: Tensor | None, *, again: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Gradients of what `rms_norm` was given.

    Args:
        grad_y: (R, D), in the type of products.
        x: (R, D).
        rstd: (R,), as `rms_norm` gave it.
        weight: (D,).
        grad_total: (R, D), the gradient that reaches x past the norm; it is added.
        again: whether y is wanted once more, so that it need not be kept.

    Returns:
        x's gradient (R, D), the same rounded to grad_y's type (one tensor where that is x's too), y (R, D)
        with the bits that it had, or None, and the weight's gradient (D,).
    """
    call = _call("norm_backward", x, grad_y.dtype, weight, grad_y, grad_total)
    if call is None or (grad_total is not None and grad_total.dtype != x.dtype):
        return plain_rms_norm_backward(grad_y, x, rstd, weight, grad_total, again=again)
    assert rstd.shape == x.shape[:1] and rstd.dtype == torch.float32
    grad_y, x, rstd = grad_y.contiguous(), x.contiguous(), rstd.contiguous()
    past = None if grad_total is None else grad_total.contiguous()
    grad_x, grad_weight = torch.empty_like(x), torch.empty_like(weight)
    rounded = None if grad_y.dtype == x.dtype else torch.empty_like(grad_y)
    y = torch.empty_like(grad_y) if again else None
    tensors = (grad_y, x, rstd, weight, past, grad_x, rounded, y, grad_weight)
    places = [None if each is None else each.data_ptr() for each in tensors]
    call(*places, *x.shape, torch.get_num_threads())
    return grad_x, grad_x if rounded is None else rounded, y, grad_weight


def plain_rms_norm_backward(
    grad_y: Tensor, x: Tensor, rstd: Tensor, weight: Tensor, grad_total: Tensor | None, *, again: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """The same in plain torch."""
    normal = x.to(rstd.dtype) * rstd[:, None]  # (R, D)
    given = grad_y.to(rstd.dtype)
    slope = given * weight
    grad_x = (slope - normal * (slope * normal).mean(dim=-1, keepdim=True)) * rstd[:, None]
    if grad_total is not None:
        grad_x = grad_x + grad_total
    rounded = normal.to(x.dtype)
    y = (rounded * weight).to(grad_y.dtype) if again else None
    grad_weight = (given * rounded).sum(dim=0).to(weight.dtype)
    return grad_x.to(x.dtype), grad_x.to(grad_y.dtype), y, grad_weight


def _call(
    name: str, x: Tensor, dtype: torch.dtype, weight: Tensor, *others: Tensor | None
) -> Callable[..., None] | None:
    """The compiled function; None where there is none. The others are to be of x's shape."""
    if x.device.type != "cpu" or weight.dtype != x.dtype or not weight.is_contiguous():
        return None
    # Else C++ would read or write beyond what there is.
    assert weight.shape == x.shape[1:] and all(each is None or each.shape == x.shape for each in others)
    return _calls().get((name, x.dtype, dtype))


@cache
def _calls() -> Mapping[tuple[str, torch.dtype, torch.dtype], Callable[..., None]]:
    functions = load("norms").functions
    if functions is None:
        return {}
    calls = {}
    for name, arguments in _ARGUMENTS.items():
        for stream, dtype in TYPES:
            call = functions[f"{name}_{NAMES[stream]}_{NAMES[dtype]}"]
            call.argtypes, call.restype = list(arguments), None
            calls[name, stream, dtype] = call
    return calls
