"""SwiGLU's gate in a layer that learns, with its backward pass by hand, in C++ and in plain torch.

R rows   F feed-forward width
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from functools import cache

import torch
from torch import Tensor

from puna.kernels.library import NAMES, load
from puna.kernels.rowwise import gated

DTYPES = (torch.float32, torch.bfloat16)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) · up (R, F), of both side by side, (R, 2F); the SiLU is rounded before the product."""
    return gated(gate_up)


def swiglu_backward(grad: Tensor, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient (R, 2F) of what `swiglu` was given, by that of its result, and the result again (R, F)."""
    call = _calls().get(grad.dtype) if grad.device.type == "cpu" and grad.dtype == gate_up.dtype else None
    if call is None:
        return plain_swiglu_backward(grad, gate_up)
    R, F = grad.shape
    assert gate_up.shape == (R, 2 * F)  # else C++ would read beyond what there is
    grad, gate_up = grad.contiguous(), gate_up.contiguous()
    grad_gate_up, h = torch.empty_like(gate_up), torch.empty_like(grad)
    places = [each.data_ptr() for each in (grad, gate_up, grad_gate_up, h)]
    call(*places, R, F, torch.get_num_threads())
    return grad_gate_up, h


def plain_swiglu_backward(grad: Tensor, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """The same in plain torch."""
    wide = torch.promote_types(grad.dtype, torch.float32)
    given, (gate, up) = grad.to(wide), gate_up.to(wide).chunk(2, dim=-1)
    part = torch.sigmoid(gate)
    silu = (gate * part).to(grad.dtype)
    grad_gate = given * up * (part * (1 + gate * (1 - part)))
    return torch.cat((grad_gate, given * silu), dim=-1).to(grad.dtype), silu * up.to(grad.dtype)


@cache
def _calls() -> Mapping[torch.dtype, Callable[..., None]]:
    functions = load("gates").functions
    if functions is None:
        return {}
    calls = {}
    for dtype in DTYPES:
        calls[dtype] = call = functions[f"gate_backward_{NAMES[dtype]}"]
        call.argtypes, call.restype = [ctypes.c_void_p] * 4 + [ctypes.c_int64] * 2 + [ctypes.c_int32], None
    return calls
