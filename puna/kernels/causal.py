"""Causal attention with rotary positions, and its gradients: in C++, or by torch's flash, or plain.

Nothing is of size T×T. Queries and keys come as they are projected and are turned while they are read, unless
`cos` and `sin` are None. A query t sees the keys starts[t]..t: `starts` rises within a row and says where a
document or a window begins. What is kept for the gradients is the logarithm of each query's sum; weights are
computed again.

    B batch   T positions   N query heads   K key/value heads, of N/K query heads each   H head width
    S positions attended to
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from puna.kernels import causal_cuda, causal_plain
from puna.kernels.causal_plain import turn, turn_back
from puna.kernels.library import NAMES, load

DTYPES = (torch.float32, torch.bfloat16)
"""What C++ takes; all else is plain torch's, or on CUDA torch's flash attention's."""


class Heads(NamedTuple):
    """N, K and H of a joint projection (B, T, (N + 2K)·H)."""

    queries: int
    keys: int
    width: int

    def split(self, joint: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Its queries (B, T, N, H), keys and values (B, T, K, H), as views."""
        N, K, H = self
        q, k, v = joint.unflatten(-1, (N + 2 * K, H)).split((N, K, K), dim=2)
        return q, k, v


def attend(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor | None, sin: Tensor | None, starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    """softmax(q·kᵀ/√H)·v over the keys that each query sees.

    Args:
        q: (B, T, N, H), which may be a view of a joint projection, as may k and v.
        k: (B, T, K, H).
        v: (B, T, K, H).
        cos: (B or 1, T, H), as `puna.model.rope.Rope` gives them; float32, or float64 for float64.
        sin: the same; of the first half its negative.
        starts: (B or 1, T), int32; None: every query sees all before it.

    Returns:
        out (B, T, N, H), contiguous, and the logarithms of the sums (B, N, T), float32 or float64.
    """
    call = _calls().get(("attend", q.dtype)) if q.device.type == "cpu" else None
    if call is None:
        some = causal_cuda if causal_cuda.suits(q, starts) else causal_plain
        return some.attend(turn(q, cos, sin), turn(k, cos, sin), v, starts)
    (B, T, N, _), kind = q.shape, q.dtype
    out, lse = q.new_empty(q.shape), q.new_empty(B, N, T, dtype=torch.float32)
    heads = {"q": _rows(q, kind), "k": _rows(k, kind), "v": _rows(v, kind), "out": out}
    _run(call, heads, lse, cos, sin, starts)
    return out, lse


def attend_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    starts: Tensor | None,
    into: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v as they came, before they were turned, from that of `out` (B, T, N, H).

    Args:
        into: (B, T, (N + 2K)·H), which then holds all three side by side; None: each is a tensor for itself.
    """
    heads = Heads(q.shape[2], *k.shape[2:])
    dq, dk, dv = heads.split(into) if into is not None else (x.new_empty(x.shape) for x in (q, k, v))
    call = _calls().get(("attend_backward", q.dtype)) if q.device.type == "cpu" else None
    if call is None:
        some = causal_cuda if causal_cuda.suits(q, starts) else causal_plain
        turned = turn(q, cos, sin), turn(k, cos, sin)
        of_queries, of_keys, of_values = some.attend_backward(grad, *turned, v, out, lse, starts)
        dq.copy_(turn_back(of_queries, cos, sin))
        dk.copy_(turn_back(of_keys, cos, sin))
        dv.copy_(of_values)
    else:
        given = {"q": q, "k": k, "v": v, "out": out, "grad": grad}
        given = {name: _rows(x, q.dtype) for name, x in given.items()}
        _run(call, given | {"dq": dq, "dk": dk, "dv": dv}, lse, cos, sin, starts)
    return dq, dk, dv


class _View(ctypes.Structure):
    """(B, T, heads, H) by its address, and how far apart its rows, tokens and heads are."""

    _fields_ = [("at", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("row", "token", "head"))]


class _Call(ctypes.Structure):
    _fields_ = [
        *((name, _View) for name in ("q", "k", "v", "out", "grad", "dq", "dk", "dv")),
        *((name, ctypes.c_void_p) for name in ("lse", "cos", "sin", "starts")),
        *((name, ctypes.c_int64) for name in ("angle_row", "start_row", "B", "T", "N", "K", "H")),
        ("threads", ctypes.c_int32),
    ]


def _run(
    call: Callable[..., None],
    heads: Mapping[str, Tensor],
    lse: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    starts: Tensor | None,
) -> None:
    q = heads["q"]
    (B, T, N, H), K = q.shape, heads["k"].shape[2]
    assert N % K == 0 and heads["k"].shape == heads["v"].shape == (B, T, K, H)
    angles, begins = (
        (_numbers(x, (B, T, H), torch.float32) for x in (cos, sin)),
        _numbers(starts, (B, T), torch.int32),
    )
    cos, sin = angles
    described = _Call(
        lse=lse.data_ptr(),
        cos=_address(cos),
        sin=_address(sin),
        starts=_address(begins),
        angle_row=T * H if cos is not None and len(cos) > 1 else 0,
        start_row=T if begins is not None and len(begins) > 1 else 0,
        B=B,
        T=T,
        N=N,
        K=K,
        H=H,
        threads=torch.get_num_threads(),
        **{name: _View(x.data_ptr(), *x.stride()[:3]) for name, x in heads.items()},
    )
    call(ctypes.byref(described))


def _rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """With the numbers of a head side by side."""
    assert x.dtype == dtype
    return x if x.stride(-1) == 1 else x.contiguous()


def _numbers(x: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
    """Contiguous and of a type, its rows as many as B or one for all."""
    if x is None:
        return None
    assert x.shape[1:] == shape[1:] and len(x) in (1, shape[0])
    return x.to(dtype).contiguous()


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


@cache
def _calls() -> Mapping[tuple[str, torch.dtype], Callable[..., None]]:
    calls = {}
    for name, source in (("attend", "causal"), ("attend_backward", "causal_backward")):
        functions = load(source).functions
        if functions is None:
            return {}
        for dtype in DTYPES:
            calls[name, dtype] = call = functions[f"{name}_{NAMES[dtype]}"]
            call.argtypes, call.restype = [ctypes.c_void_p], None
    return calls
