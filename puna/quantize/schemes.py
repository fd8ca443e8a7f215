"""The schemes that a matrix can be stored in, and rounding to nearest in one of them.

O outputs (rows)   I inputs (columns)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from puna.errors import ModelError
from puna.model.weights import Packed
from puna.quantize import scales
from puna.quantize.codes import NF4, from_whole_numbers, rounded, row_parts, together

_BITS = {"int8": 8, "int4": 4, "nf4": 4}


@dataclass(frozen=True)
class Format:
    """How the numbers of a matrix are stored; `group` None is one scale for a row (an output channel)."""

    scheme: Literal["int8", "int4", "nf4"]
    group: int | None
    scales: torch.dtype

    def groups(self, inputs: int) -> int:
        """Scales of a row of so many weights."""
        return 1 if self.group is None else inputs // self.group

    def bits_per_weight(self, inputs: int) -> float:
        """Bits of code and share of the scales, for rows of so many weights.

        >>> Format("int4", 32, torch.float16).bits_per_weight(4096)
        4.5
        """
        return _BITS[self.scheme] + self.groups(inputs) * self.scales.itemsize * 8 / inputs

    def __str__(self) -> str:
        where = "per channel" if self.group is None else f"in groups of {self.group}"
        return f"{self.scheme} {where} with {str(self.scales).removeprefix('torch.')} scales"


@dataclass(frozen=True)
class Scheme:
    """A row of the table: what it is, the format it has unless asked otherwise, whether it needs text."""

    summary: str
    format: Format
    calibrated: bool = False


SCHEMES = {
    "int8": Scheme(
        "8-bit whole numbers, a scale per output channel (or per group)",
        Format("int8", None, torch.float32),
    ),
    "int4": Scheme(
        "4-bit whole numbers in groups of 32 or 128, scales by least squares",
        Format("int4", 32, torch.float16),
    ),
    "gptq": Scheme(
        "int4 whose rounding errors later weights make good, as calibration text asks (arXiv 2210.17323)",
        Format("int4", 32, torch.float16),
        calibrated=True,
    ),
    "nf4": Scheme(
        "4-bit quantiles of a normal distribution in blocks of 64, for fine-tuning (arXiv 2305.14314)",
        Format("nf4", 64, torch.float32),
    ),
}


def quantized(
    matrix: Tensor, format: Format, name: str = "the matrix", importance: Tensor | None = None
) -> Packed:
    """A matrix (O, I) rounded to nearest.

    Args:
        matrix: of any floating-point type.
        format: see `allowed`.
        name: what messages call it.
        importance: (I,) what the squared error of a column counts in the choice of scales; None: all alike.

    Raises:
        ModelError: the shape does not allow the format, a number is not finite, or too large for the scales.
    """
    allowed(name, tuple(matrix.shape), format)
    if format.scheme == "nf4":
        return _nf4(matrix, format, name)
    parts = []
    for rows in row_parts(tuple(matrix.shape)):
        groups = finite(matrix[rows], name).unflatten(-1, (format.groups(matrix.shape[1]), -1))
        weights = None if importance is None else importance.float().view(groups.shape[1:])
        chosen = in_type(scales.chosen(format.scheme, groups, format.scales, weights), format, name)
        whole = rounded(format.scheme, groups, chosen.float()[..., None]).flatten(-2)
        parts.append(from_whole_numbers(format.scheme, whole, chosen))
    return _below_each_other(format.scheme, parts, matrix)


def allowed(name: str, shape: tuple[int, ...], format: Format) -> None:
    """Refuse a format that a matrix of this shape cannot have.

    Raises:
        ModelError: it is no matrix, or its inputs are no multiple of the group.
    """
    if len(shape) != 2 or 0 in shape:
        raise ModelError(f"{name} has shape {shape}, expected a matrix (outputs, inputs) to make {format}")
    if format.group is not None and shape[1] % format.group:
        raise ModelError(
            f"{name} {shape} has {shape[1]} inputs, and {format.scheme} in groups of {format.group} needs a "
            f"multiple of {format.group}; {mended(name, shape[1], format)}"
        )


def mended(name: str, inputs: int, format: Format) -> str:
    """What to ask for instead of a group that does not divide the inputs of a tensor."""
    pattern = f"*.{name.removesuffix('.weight').rpartition('.')[2]}"
    smaller = "set group=32, or " if format.group == 128 and inputs % 32 == 0 else ""
    if format.scheme == "nf4":
        return f"puna quantize with --except '{pattern}=keep' leaves such matrices as they are"
    fits = f"--except '{pattern}=int8' (one scale per channel fits any shape), or =keep"
    return f"{smaller}puna quantize with {fits}"


def finite(matrix: Tensor, name: str) -> Tensor:
    """The numbers in float32.

    Raises:
        ModelError: one of them is NaN or infinite.
    """
    wide = matrix.float()
    if not bool(torch.isfinite(wide).all()):
        raise ModelError(f"{name} holds NaN or infinite numbers, which no scheme can store; mend the weights")
    return wide


def in_type(chosen: Tensor, format: Format, name: str) -> Tensor:
    """Scales in the type of the format, which they are rounded to already.

    Raises:
        ModelError: a scale is too large for its type.
    """
    if not bool(torch.isfinite(chosen).all()):
        most = torch.finfo(format.scales).max
        raise ModelError(
            f"{name} needs scales above {most:.5g}, the largest {str(format.scales).removeprefix('torch.')}; "
            "set scales=float32"
        )
    return chosen.to(format.scales)


def _nf4(matrix: Tensor, format: Format, name: str) -> Packed:
    between = ((NF4[1:] + NF4[:-1]) / 2).to(matrix.device)
    parts = []
    for rows in row_parts(tuple(matrix.shape)):
        groups = finite(matrix[rows], name).unflatten(-1, (format.groups(matrix.shape[1]), -1))
        largest = in_type(groups.abs().amax(-1).to(format.scales).float(), format, name)
        shares = groups / largest.float().clamp_min(torch.finfo(torch.float32).tiny)[..., None]
        codes = torch.bucketize(shares.flatten(-2), between, out_int32=True).to(torch.uint8)
        parts.append(Packed("nf4", together(codes), largest, tuple(matrix[rows].shape)))
    return _below_each_other("nf4", parts, matrix)


def _below_each_other(scheme: str, parts: list[Packed], matrix: Tensor) -> Packed:
    data = torch.cat([part.data for part in parts])
    found = torch.cat([part.scales for part in parts if part.scales is not None])
    return Packed(scheme, data, found, tuple(matrix.shape))
