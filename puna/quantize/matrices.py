"""A matrix between the two forms it has: the value that weights carry, and the panels that products read.

I inputs   O outputs
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor

from puna.kernels import blocks, integers, panels
from puna.kernels.matrix import Matrix
from puna.model.weights import Packed, spread

Room = tuple[Tensor, Tensor]
"""Panels for data and scales."""
Value = Tensor | Packed
"""A matrix (O, I) in floating point, or in whole numbers as `puna.quantize` has them."""


def suits(value: Value) -> bool:
    """Whether there is compiled code here for products with it in panels."""
    if isinstance(value, Tensor):
        return panels.suits(value)
    if value.scheme in blocks.KINDS:
        return blocks.suits(value)
    return value.scheme in ("int8", "int4") and integers.suits(value)


def in_panels(*values: Value, bias: Tensor | None = None) -> Matrix:
    """Matrices of one kind, one below the other; `bias` is of all their outputs."""
    outputs = sum(value.shape[0] for value in values)
    plain = [value for value in values if isinstance(value, Tensor)]
    if plain:
        return Matrix(panels.into_panels(*plain), None, bias, outputs)
    data, scales = integers.into_panels(*map(_pair, values))
    return Matrix(data, scales, bias, outputs)


def laid(value: Packed, room: Room | None = None) -> Matrix:
    """A matrix of whole numbers, or of GGUF's blocks of them, in panels of its own or in those given."""
    if value.scheme in blocks.KINDS:
        data, scales = blocks.into_panels(value.scheme, value.data, out=room)
    else:
        data, scales = integers.into_panels(_pair(value), out=room)
    return Matrix(data, scales, None, value.shape[0])


def room_for(value: Packed, outputs: int) -> Room:
    """Panels of this kind for so many outputs, to be laid one after another; memory that is not used yet."""
    inputs = value.shape[1]
    if value.scheme in blocks.KINDS:
        kind = blocks.KINDS[value.scheme]
        return integers.empty(kind, outputs, inputs, inputs // blocks.SIZE, torch.float16)
    data, scales = _pair(value)
    return integers.empty(data.dtype, outputs, inputs, scales.shape[1], scales.dtype)


def _pair(value: Value) -> tuple[Tensor, Tensor]:
    assert isinstance(value, Packed) and value.scales is not None
    return value.data, value.scales


def value_of(matrix: Matrix) -> Value:
    """The matrix as weights carry it, bit for bit."""
    if matrix.scales is None:
        return panels.out_of_panels(matrix.panels, matrix.outputs)
    data, scales = integers.out_of_panels(matrix.panels, matrix.scales, matrix.outputs)
    return Packed(matrix.kind, data, scales, (matrix.outputs, matrix.inputs))


def rows_of(value: Value, rows: slice) -> Value:
    """Some outputs of a matrix, in memory of their own, so that each part can end by itself."""
    if isinstance(value, Tensor):
        return value[rows].clone()
    scales = None if value.scales is None else value.scales[rows].clone()
    data = value.data[rows].clone()
    return Packed(value.scheme, data, scales, (len(data), *value.shape[1:]))


def below(matrices: Sequence[Matrix]) -> list[Matrix]:
    """The matrices one below the other, neighbours of one kind as one matrix."""
    return [_one_of(list(some)) for _, some in groupby(matrices, _kind)]


def _kind(matrix: Matrix) -> tuple[object, ...]:
    """What must agree for one product with two matrices."""
    scales = None if matrix.scales is None else matrix.scales.dtype
    return matrix.kind, matrix.group, scales, None if matrix.bias is None else matrix.bias.dtype


def _one_of(matrices: list[Matrix]) -> Matrix:
    if len(matrices) == 1:
        return matrices[0]
    biases = [matrix.bias for matrix in matrices if matrix.bias is not None]
    bias = torch.cat(biases) if biases else None
    if any(matrix.outputs % panels.WIDTH for matrix in matrices[:-1]):
        return in_panels(*(value_of(matrix) for matrix in matrices), bias=bias)
    scales = [matrix.scales for matrix in matrices if matrix.scales is not None]
    data = _stacked([matrix.panels for matrix in matrices])
    outputs = sum(matrix.outputs for matrix in matrices)
    return Matrix(data, _stacked(scales) if scales else None, bias, outputs)


def _stacked(tensors: list[Tensor]) -> Tensor:
    """Panels one below the other, as whole ones need no other order; what lies so already is not moved."""
    first = tensors[0]
    if all(map(_follows, tensors, tensors[1:])):
        return first.detach().as_strided((sum(map(len, tensors)), *first.shape[1:]), first.stride())
    out = panels.empty((sum(map(len, tensors)), *first.shape[1:]), first.dtype, first.device)
    torch.cat(tensors, out=out)
    return out


def _follows(first: Tensor, second: Tensor) -> bool:
    """Whether one tensor begins in the same memory where another ends."""
    same = first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
    whole = first.is_contiguous() and second.is_contiguous()
    return same and whole and first.data_ptr() + first.nbytes == second.data_ptr()


def apart(
    matrices: Sequence[Matrix], outputs: Iterable[int], rows: int | None
) -> Iterator[tuple[Value, Tensor | None]]:
    """What was put one below the other: the value and bias of each, by their numbers of outputs.

    Of each matrix only `rows` rows, as `puna.model.weights.spread` has them, where that is given.
    """
    counts = iter(outputs)
    for matrix in matrices:
        value, first = value_of(matrix) if rows is None else None, 0
        while first < matrix.outputs:
            count = next(counts)
            if value is None:
                yield some_of(matrix, first, count, rows or 0)
            else:
                part = slice(first, first + count)
                bias = None if matrix.bias is None else matrix.bias[part].clone()
                yield value if count == matrix.outputs else rows_of(value, part), bias
            first += count


def some_of(matrix: Matrix, first: int, count: int, rows: int) -> tuple[Value, Tensor | None]:
    """`rows` of the `count` outputs from the first on, spread over them, and the biases of all."""
    which = (first + spread(count, rows)).to(matrix.panels.device)
    bias = None if matrix.bias is None else matrix.bias[first : first + count]
    if matrix.scales is None:
        return panels.outputs_of(matrix.panels, which), bias
    data = panels.outputs_of(matrix.panels.view(torch.float32), which).view(matrix.panels.dtype)
    scales = matrix.scales[which // panels.WIDTH, :, which % panels.WIDTH]
    return Packed(matrix.kind, data, scales, (len(which), matrix.inputs)), bias
