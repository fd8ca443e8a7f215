"""An update by AdamW (arXiv 1711.05101) of all parameters at once, and the norm that clipping asks for.

Two passes over memory: gradients are read for their norm; then everything is read and written once, gradients
scaled on the way. In C++, by torch's fused code on CUDA, and in plain torch.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim.adamw import adamw as torch_adamw

from puna.kernels.library import NAMES, load
from puna.kernels.rounding import LONGEST, Key, random_halves, rounded

GRADIENTS = (torch.float32, torch.bfloat16)
KINDS = (
    (torch.float32, torch.float32, torch.float32),
    (torch.bfloat16, torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.bfloat16, torch.bfloat16),
)
"""Types of weights, gradients and moments that are compiled for."""
PART = 1 << 24
"""Numbers that plain torch updates at a time."""


class Update(NamedTuple):
    """A parameter, and all that its update reads. Tensors are of one shape, and changed in place.

    Moments in bfloat16 mean that they and the weight are rounded stochastically, by `key`; else a weight in
    bfloat16 is the rounding of `master`.
    """

    weight: Tensor
    gradient: Tensor
    first: Tensor
    second: Tensor
    master: Tensor | None
    step: int
    """How many updates this one makes it."""
    decay: float
    key: Key


class Rates(NamedTuple):
    """What is the same for all parameters; gradients are multiplied by `factor` first."""

    rate: float
    betas: tuple[float, float]
    eps: float
    factor: float = 1.0

    def corrections(self, step: int) -> tuple[float, float]:
        """The rate over 1 - β₁ᵗ, and 1 / √(1 - β₂ᵗ): moments begin at zero."""
        return self.rate / (1 - self.betas[0] ** step), (1 - self.betas[1] ** step) ** -0.5


class _Numbers(ctypes.Structure):
    _fields_ = [("from", ctypes.c_void_p), ("count", ctypes.c_int64)]


class _Piece(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weight", "gradient", "first", "second", "master")),
        ("count", ctypes.c_int64),
        *((name, ctypes.c_float) for name in ("keep", "size", "root")),
        *((name, ctypes.c_uint32) for name in ("key", "other")),
    ]


class _Rates(ctypes.Structure):
    _fields_ = [(name, ctypes.c_float) for name in ("beta1", "beta2", "rest1", "rest2", "eps", "factor")]


def norm(gradients: Sequence[Tensor]) -> float:
    """The Euclidean norm of all gradients together; not finite where one of their numbers is not.

    In C++ squares are summed in float64, by blocks in their order: the same bits on any number of threads.
    """
    kinds = {(gradient.device.type, gradient.dtype) for gradient in gradients}
    if not all(device == "cpu" and dtype in _norms() for device, dtype in kinds):
        return plain_norm(gradients)
    squares = 0.0
    for _, dtype in sorted(kinds, key=str):
        group = [gradient.contiguous() for gradient in gradients if gradient.dtype == dtype]
        pieces = (_Numbers * len(group))(*(_Numbers(x.data_ptr(), x.numel()) for x in group))
        squares += _norms()[dtype](ctypes.addressof(pieces), len(group), torch.get_num_threads())
    return math.sqrt(squares)


def plain_norm(gradients: Sequence[Tensor]) -> float:
    """The same in plain torch."""
    norms = [torch.linalg.vector_norm(x, dtype=_wide(x.dtype)) for x in gradients]
    # Put together on the device: reading each by itself would wait for it as often.
    return float(torch.linalg.vector_norm(torch.stack(norms))) if norms else 0.0


def update(updates: Sequence[Update], rates: Rates) -> None:
    """Update every parameter."""
    groups: dict[_Way, list[Update]] = {}
    for one in updates:
        groups.setdefault(_way(one), []).append(one)
    for way, group in groups.items():
        way(group, rates)


def plain_update(updates: Sequence[Update], rates: Rates) -> None:
    """The same in plain torch."""
    for one in updates:
        for part, first in _parts(one):
            _plain(part, first, rates)


def _plain(one: Update, at: int, rates: Rates) -> None:
    """One parameter, or numbers of one from `at` on."""
    wide, (beta1, beta2), (size, root) = _wide(one.first.dtype), rates.betas, rates.corrections(one.step)
    g = one.gradient.to(wide) * rates.factor
    m = one.first.to(wide).lerp(g, 1 - beta1)
    v = one.second.to(wide) * beta2 + g.square() * (1 - beta2)
    w = (one.weight if one.master is None else one.master).to(wide) * (1 - rates.rate * one.decay)
    w -= size * m / (v.sqrt() * root + rates.eps)
    if one.first.dtype == torch.bfloat16:
        halves = random_halves(w.numel(), one.key, w.device, at)
        w, m, v = (rounded(x, half) for x, half in zip((w, m, v), halves, strict=True))
    if one.master is not None:
        one.master.copy_(w)
    for kept, value in ((one.weight, w), (one.first, m), (one.second, v)):
        kept.copy_(value)


def _parts(one: Update) -> Iterator[tuple[Update, int]]:
    """A parameter in parts, and where each begins: what a large one needs in between must find room."""
    if one.weight.numel() <= PART or not _in_order(one):
        yield one, 0
        return
    for at in range(0, one.weight.numel(), PART):
        weight, gradient, first, second, master = (
            None if x is None else x.view(-1)[at : at + PART] for x in _tensors(one)
        )
        assert weight is not None and gradient is not None and first is not None and second is not None
        yield Update(weight, gradient, first, second, master, *one[5:]), at


def fused_update(updates: Sequence[Update], rates: Rates) -> None:
    """The same by torch's fused code, of contiguous tensors and float32 moments."""
    for decay in sorted({one.decay for one in updates}):
        group = [one for one in updates if one.decay == decay]
        wide = [one for one in group if one.gradient.dtype == torch.float32]
        # The others one by one: their gradients in float32 must find room.
        others = [[one] for one in group if one.gradient.dtype != torch.float32]
        for portion in [wide, *others] if wide else others:
            _fused(portion, decay, rates)


def _fused(updates: Sequence[Update], decay: float, rates: Rates) -> None:
    device = updates[0].weight.device

    def number(value: float) -> Tensor:
        return torch.full((), value, device=device)  # filled there: to copy it the device would be waited for

    torch_adamw(
        [one.weight if one.master is None else one.master for one in updates],
        [one.gradient.float() for one in updates],
        [one.first for one in updates],
        [one.second for one in updates],
        [],
        [number(one.step - 1.0) for one in updates],
        fused=True,
        grad_scale=number(1 / rates.factor),
        amsgrad=False,
        beta1=rates.betas[0],
        beta2=rates.betas[1],
        lr=rates.rate,
        weight_decay=decay,
        eps=rates.eps,
        maximize=False,
    )
    for one in updates:
        if one.master is not None:
            one.weight.copy_(one.master)


_Way = Callable[[Sequence[Update], Rates], None]


def _way(one: Update) -> _Way:
    if not _in_order(one):
        return plain_update  # the others would take the numbers in the order in which they lie
    kind, device = (one.weight.dtype, one.gradient.dtype, one.first.dtype), one.weight.device.type
    if device == "cpu" and kind in _updates() and one.weight.numel() < LONGEST:
        return _updates()[kind]
    return fused_update if device in ("cpu", "cuda") and one.first.dtype == torch.float32 else plain_update


def _tensors(one: Update) -> tuple[Tensor | None, ...]:
    return one.weight, one.gradient, one.first, one.second, one.master


def _in_order(one: Update) -> bool:
    return all(x is None or x.is_contiguous() for x in _tensors(one))


def _compiled_update(call: Callable[..., None], updates: Sequence[Update], rates: Rates) -> None:
    pieces = (_Piece * len(updates))(*(_piece(one, rates) for one in updates))
    shared = _Rates(*rates.betas, *(1 - beta for beta in rates.betas), rates.eps, rates.factor)
    addresses = ctypes.addressof(pieces), len(updates), ctypes.addressof(shared)
    call(*addresses, torch.get_num_threads())


def _piece(one: Update, rates: Rates) -> _Piece:
    tensors = _tensors(one)
    # Else C++ would read or write beyond what there is.
    assert all(x is None or x.shape == one.weight.shape for x in tensors)
    assert one.second.dtype == one.first.dtype and (one.master is None) == (
        one.weight.dtype == one.first.dtype
    )
    assert one.master is None or one.master.dtype == torch.float32
    places = [None if x is None else x.data_ptr() for x in tensors]
    keep = 1 - rates.rate * one.decay
    return _Piece(*places, one.weight.numel(), keep, *rates.corrections(one.step), *one.key)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


@cache
def _norms() -> Mapping[torch.dtype, Callable[..., float]]:
    """The compiled sums of squares; empty where nothing can be compiled."""
    functions = load("adamw").functions
    if functions is None:
        return {}
    calls = {}
    for dtype in GRADIENTS:
        calls[dtype] = call = functions[f"squares_{NAMES[dtype]}"]
        call.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32]
        call.restype = ctypes.c_double
    return calls


@cache
def _updates() -> Mapping[tuple[torch.dtype, ...], _Way]:
    """The compiled updates by the types of weight, gradient and moments; empty likewise."""
    functions = load("adamw").functions
    if functions is None:
        return {}
    ways: dict[tuple[torch.dtype, ...], _Way] = {}
    for kind in KINDS:
        call = functions["_".join(("update", *(NAMES[dtype] for dtype in kind)))]
        call.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int32]
        call.restype = None
        ways[kind] = partial(_compiled_update, call)
    return ways
