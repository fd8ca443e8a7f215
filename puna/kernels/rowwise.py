"""What a layer does to each row beside its products, in C++ and in plain torch; a row's bits are its own.

R rows   D width   F feed-forward width   N query heads   K key/value heads   H head width
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from puna.kernels.library import NAMES, load

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_POINTER, _COUNT, _REAL, _THREADS = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double, ctypes.c_int32
_ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "norm": (*[_POINTER] * 3, *[_COUNT] * 2, _REAL, _THREADS),
    "gated": (*[_POINTER] * 2, *[_COUNT] * 2, _THREADS),
    "turned": (*[_POINTER] * 6, *[_COUNT] * 4, _THREADS),
}


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (…, D) / √(mean(x²) + ε) · weight (D,)."""
    call = _call("norm", x, weight)
    if call is None:
        return plain_norm(x, weight, eps)
    x, D = x.contiguous(), x.shape[-1]
    out = torch.empty_like(x)
    rows, threads = x.numel() // D, torch.get_num_threads()
    call(x.data_ptr(), weight.data_ptr(), out.data_ptr(), rows, D, eps, threads)
    return out


def plain_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The same in plain torch."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return (wide * scale).to(x.dtype) * weight


def gated(x: Tensor) -> Tensor:
    """silu(gate) · up (…, F), of both side by side, (…, 2F)."""
    call = _call("gated", x)
    if call is None:
        return plain_gated(x)
    x, width = x.contiguous(), x.shape[-1] // 2
    out = x.new_empty(*x.shape[:-1], width)
    call(x.data_ptr(), out.data_ptr(), out.numel() // width, width, torch.get_num_threads())
    return out


def plain_gated(x: Tensor) -> Tensor:
    """The same in plain torch."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def turned(x: Tensor, cos: Tensor, sin: Tensor, heads: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (B, T, N, H) and keys (B, T, K, H) turned by the angles of cos and sin (B, T, H), and values.

    x (B, T, (N + 2K)·H) holds all three side by side; `heads` are N and K.
    """
    call = _call("turned", x)
    if call is None or cos.dtype != torch.float32:
        return plain_turned(x, cos, sin, heads)
    (B, T, _), (N, K), H = x.shape, heads, cos.shape[-1]
    cos, sin = (each.expand(B, T, H).contiguous() for each in (cos, sin))
    x, q = x.contiguous(), x.new_empty(B, T, N, H)
    k, v = x.new_empty(B, T, K, H), x.new_empty(B, T, K, H)
    pointers = [each.data_ptr() for each in (x, cos, sin, q, k, v)]
    call(*pointers, B * T, N, K, H, torch.get_num_threads())
    return q, k, v


def plain_turned(
    x: Tensor, cos: Tensor, sin: Tensor, heads: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """The same in plain torch."""
    N, K = heads
    q, k, v = x.unflatten(-1, (N + 2 * K, -1)).split((N, K, K), dim=2)
    cos, sin = cos[:, :, None], sin[:, :, None]  # (B, T, 1, H)
    q, k = ((each * cos + each.roll(each.shape[-1] // 2, dims=-1) * sin).to(each.dtype) for each in (q, k))
    return q, k, v


def _call(name: str, x: Tensor, weight: Tensor | None = None) -> Callable[..., None] | None:
    """The compiled function; None where there is none, or where gradients are wanted."""
    if x.device.type != "cpu" or (weight is not None and weight.dtype != x.dtype):
        return None
    learns = x.requires_grad or (weight is not None and weight.requires_grad)
    return None if learns and torch.is_grad_enabled() else _calls().get((name, x.dtype))


@cache
def _calls() -> Mapping[tuple[str, torch.dtype], Callable[..., None]]:
    functions = load("rowwise").functions
    if functions is None:
        return {}
    calls = {}
    for name, arguments in _ARGUMENTS.items():
        for dtype in DTYPES:
            calls[name, dtype] = call = functions[f"{name}_{NAMES[dtype]}"]
            call.argtypes, call.restype = list(arguments), None
    return calls
