"""Products with a matrix of whole numbers that lies in panels, in C++ and in plain torch, bit for bit.

A row is made whole numbers as well, so that the terms of a group, which share a scale, are added exactly;
what groups come to is scaled and added one by one in float32. Panels are those of `panels.py` with a word of
four bytes in the place of a number: four weights of int8, or eight of int4 as matrices have them, the even
ones in the low halves. Only bfloat16 below its normal numbers is 0 where a processor rounds it so.

    R rows   I inputs   O outputs   G inputs of a group   groups = I/G   P = O/WIDTH, rounded up
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from puna.kernels import panels as words
from puna.kernels.library import NAMES, load
from puna.kernels.products import SCALE_KINDS, Call, described, entry

WIDTH = words.WIDTH
KINDS = {torch.int8: "int8", torch.uint8: "int4"}
STEPS = {torch.int8: 4, torch.uint8: 8}
"""Inputs of a word."""
LARGEST = 127
"""A row's largest number is made this."""
LONGEST = (2**31 - 1) // (128 * LARGEST)
"""Inputs of a group whose sum int32 certainly holds."""


class Stored(Protocol):
    """A matrix of whole numbers as weights carry it: `puna.model.weights.Packed`."""

    @property
    def scheme(self) -> str:
        """Its kind; "int8" and "int4" are known here."""
        ...

    @property
    def data(self) -> Tensor:
        """(O, I) int8, or (O, I/2) uint8."""
        ...

    @property
    def scales(self) -> Tensor | None:
        """(O, groups)."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """(O, I)."""
        ...


def suits(packed: Stored) -> bool:
    """Whether there is compiled code for products with a matrix: int8 or int4, by columns of whole words."""
    data, scales = packed.data, packed.scales
    if KINDS.get(data.dtype) != packed.scheme or scales is None or scales.dtype not in SCALE_KINDS:
        return False
    step, inputs, groups = STEPS[data.dtype], packed.shape[-1], scales.shape[-1]
    if data.device.type != "cpu" or not groups or inputs % groups:
        return False
    group = inputs // groups
    return group % step == 0 and 0 < group <= LONGEST and compiled()


def compiled() -> bool:
    """Whether there is compiled code for products."""
    return bool(_calls())


def _per_byte(data: Tensor) -> int:
    return 2 if data.dtype == torch.uint8 else 1


def into_panels(
    *pairs: tuple[Tensor, Tensor], out: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Data (O, I) int8 or (O, I/2) uint8 and scales (O, groups) of matrices, one below the other, in panels.

    Data (P, I/4 or I/8, WIDTH, 4), scales (P, groups, WIDTH); what fills up the last panel is zero. `out` is
    where they are laid, if that is chosen.
    """
    first, factors = pairs[0]
    chosen = (None, None) if out is None else (out[0].view(torch.float32), _as_single(out[1])[..., None])
    data = words.into_panels(*(_as_words(data) for data, _ in pairs), out=chosen[0])
    scales = words.into_panels(*(_as_single(scales) for _, scales in pairs), out=chosen[1])
    return data.view(first.dtype), scales[..., 0].view(factors.dtype)


def empty(
    like: torch.dtype, rows: int, inputs: int, groups: int, scales: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Panels for data of a type and scales, of so many outputs; nothing is laid in them yet."""
    count, step, cpu = words.count_of(rows), STEPS[like], torch.device("cpu")
    data = words.empty((count, inputs // step, WIDTH, 4), like, cpu)
    return data, words.empty((count, groups, WIDTH), scales, cpu)


def out_of_panels(panels: Tensor, scales: Tensor, outputs: int) -> tuple[Tensor, Tensor]:
    """Data and scales of the matrix, bit for bit."""
    data = words.out_of_panels(panels.view(torch.float32), outputs).view(panels.dtype)
    return data, words.out_of_panels(_as_single(scales)[..., None], outputs).view(scales.dtype)


def _as_words(data: Tensor) -> Tensor:
    """(O, bytes) → (O, bytes/4), moved and never computed with."""
    data = data.contiguous()
    if data.storage_offset() % 4 or data.data_ptr() % 4:
        data = data.clone()
    return data.view(torch.float32)


def _as_single(scales: Tensor) -> Tensor:
    """A number type whose panels have one input of a step."""
    return scales.view(torch.float16) if scales.dtype == torch.bfloat16 else scales


def outputs_of(panels: Tensor, scales: Tensor, which: Tensor, dtype: torch.dtype) -> Tensor:
    """Some rows (…, I) of the matrix in floating point, by their numbers (…)."""
    data = words.outputs_of(panels.view(torch.float32), which).view(panels.dtype)
    return _expanded(data, scales[which // WIDTH, :, which % WIDTH]).to(dtype)


def _expanded(data: Tensor, scales: Tensor) -> Tensor:
    """Scale times whole number, float32: (…, I or I/2), (…, groups) → (…, I)."""
    numbers = _numbers(data).unflatten(-1, (scales.shape[-1], -1))
    return (numbers * scales.float()[..., None]).flatten(-2)


def _numbers(data: Tensor) -> Tensor:
    """(…, I or I/2) → (…, I): whole numbers in float32."""
    if data.dtype == torch.uint8:
        return (torch.stack((data & 15, data >> 4), -1).flatten(-2).to(torch.int8) - 8).float()
    return data.float()


def multiply(x: Tensor, panels: Tensor, scales: Tensor, bias: Tensor | None, outputs: int) -> Tensor:
    """x (…, I), made whole numbers, times the matrix, and the bias (O,): (…, O)."""
    if torch.is_grad_enabled() and x.requires_grad:
        found: Tensor = _Product.apply(x, panels, scales, bias, outputs)
        return found
    return _product(x, panels, scales, bias, outputs)


def plain(x: Tensor, panels: Tensor, scales: Tensor, bias: Tensor | None, outputs: int) -> Tensor:
    """The same in plain torch."""
    data, factors = out_of_panels(panels, scales, outputs)
    groups = factors.shape[1]
    weights = _numbers(data).unflatten(1, (groups, -1))  # (O, groups, G)
    numbers, steps = whole(x.float().unflatten(-1, (groups, -1)))  # (…, groups, G), (…, groups)
    exact = torch.float32 if weights.shape[2] * 128 * LARGEST < 2**24 else torch.float64
    out = x.new_zeros(*x.shape[:-1], outputs, dtype=torch.float32)
    for group in range(groups):
        sums = numbers[..., group, :].to(exact) @ weights[:, group].to(exact).t()
        out += sums.float() * (steps[..., group, None] * factors[:, group].float())
    return (out if bias is None else out + bias.float()).to(x.dtype)


def whole(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (…, G) float32 as whole numbers q (…, G), in float32 too, and scales (…): x ≈ scale · q, to nearest.

    Where x is not finite the scale is not, and q is 0.
    """
    scale = x.abs().amax(-1) / LARGEST
    usable = (scale > 0) & scale.isfinite()
    q = (x / torch.where(usable, scale, 1)[..., None]).round().clamp(-LARGEST, LARGEST)
    return torch.where(usable[..., None], q, 0), scale


class _Product(torch.autograd.Function):
    """Gradients reach the input as if it had not been rounded, and not the matrix."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, panels: Tensor, scales: Tensor, bias: Tensor | None, outputs: int
    ) -> Tensor:
        ctx.save_for_backward(panels, scales)
        ctx.outputs = outputs
        return _product(x, panels, scales, bias, outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        panels, scales = ctx.saved_tensors
        matrix = _expanded(*out_of_panels(panels, scales, ctx.outputs))
        return gradients[0] @ matrix.to(gradients[0].dtype), None, None, None, None


def _product(x: Tensor, panels: Tensor, scales: Tensor, bias: Tensor | None, outputs: int) -> Tensor:
    call = _calls().get((panels.dtype, x.dtype)) if x.device.type == "cpu" else None
    if call is None or scales.dtype not in SCALE_KINDS:
        return plain(x, panels, scales, bias, outputs)  # the model was moved to another type or device
    x = x.contiguous()
    *some, inputs = x.shape
    assert inputs == panels.shape[1] * 4 * _per_byte(panels)
    assert panels.is_contiguous() and scales.is_contiguous() and (bias is None or bias.dtype == x.dtype)
    out = x.new_empty(*some, outputs)
    matrix = described(panels, scales, bias, inputs, outputs, inputs // scales.shape[1])
    rows, threads = x.numel() // inputs, torch.get_num_threads()
    call(ctypes.addressof(matrix), x.data_ptr(), out.data_ptr(), rows, outputs, threads)
    return out


@cache
def _calls() -> Mapping[tuple[torch.dtype, torch.dtype], Call]:
    """The compiled product by the types of matrix and rows; empty where nothing can be compiled."""
    functions = load("integers").functions
    if functions is None:
        return {}
    types = (torch.float32, torch.bfloat16, torch.float16)
    return {(a, b): entry(functions, f"multiply_{KINDS[a]}_{NAMES[b]}") for a in KINDS for b in types}
