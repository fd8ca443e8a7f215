"""A matrix that lies in panels, of whatever kind of numbers, and the product with it.

I inputs   O outputs   P = O/WIDTH, rounded up
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from puna.kernels import integers, panels, products
from puna.kernels.library import NAMES, load

KINDS = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.int8: "int8",
    torch.uint8: "int4",
}
STEP = {KINDS[data]: inputs for data, inputs in integers.STEPS.items()}
"""Inputs of a step of panels of whole numbers; those of floating point say it in their shape."""


@dataclass(frozen=True, eq=False)
class Matrix:
    """A matrix (O, I) in panels, and what belongs to it."""

    panels: Tensor
    """As `puna.kernels.panels` lays floating point out, or `puna.kernels.integers` whole numbers."""
    scales: Tensor | None
    """(P, groups, WIDTH) for whole numbers."""
    bias: Tensor | None
    """(O,), in the type of the rows it multiplies."""
    outputs: int

    @property
    def kind(self) -> str:
        """One of `KINDS`' values."""
        return KINDS[self.panels.dtype]

    @property
    def inputs(self) -> int:
        """I."""
        return self.panels.shape[1] * STEP.get(self.kind, self.panels.shape[3])

    @property
    def group(self) -> int:
        """How many inputs share a scale; I where there is one for each output, or none."""
        return self.inputs if self.scales is None else self.inputs // self.scales.shape[1]


def multiply(x: Tensor, matrix: Matrix) -> Tensor:
    """x (…, I) times the matrix, and the bias: (…, O)."""
    if matrix.scales is None:
        return panels.multiply(x, matrix.panels, matrix.bias, matrix.outputs)
    return integers.multiply(x, matrix.panels, matrix.scales, matrix.bias, matrix.outputs)


def described(matrix: Matrix) -> products.Described:
    """The matrix as C++ reads it; its tensors must live as long."""
    return products.described(
        matrix.panels, matrix.scales, matrix.bias, matrix.inputs, matrix.outputs, matrix.group
    )


def compiled(kind: str, dtype: torch.dtype) -> products.Call | None:
    """The compiled product of rows of a number type with a matrix of a kind; None where there is none."""
    if kind not in STEP:
        functions = load("panels").functions if kind == NAMES.get(dtype) else None
        return None if functions is None else products.entry(functions, f"multiply_{kind}")
    functions = load("integers").functions
    return None if functions is None else products.entry(functions, f"multiply_{kind}_{NAMES[dtype]}")
