"""Low-bit matrices as canonical, row-major codes and scales: packed, and expanded to float32.

    int8   int8 (O, I), -127 to 127
    int4   uint8 (O, I / 2): byte j holds weight 2j in its low half, 2j + 1 in its high half, each as q + 8
    nf4    uint8 (O, I / 2): halves as in int4, each the number of a level

Scales are (O, groups); a weight is its group's scale times its whole number or level, in float32.

O outputs (rows)   I inputs (columns)   groups I / weights of a group
"""

from __future__ import annotations

import torch
from torch import Tensor

from puna.model.weights import Packed

LOWEST, HIGHEST = {"int8": -127, "int4": -8}, {"int8": 127, "int4": 7}
_CHUNK = 1 << 17  # weights handled at once: what lies between stays in the caches


def _nf4_levels() -> Tensor:
    """QLoRA's levels (arXiv 2305.14314, appendix E): quantiles of a normal distribution, the last set to 1.

    Seven lie below zero and eight above. Of either tail the mean of 1/32 and 1/30 is left out, rounded as the
    authors' program has it; its single-precision steps matter for the last bits of the table it is known by.
    """
    negative, positive = (_quantiles(0.9677083, count) for count in (7, 8))
    levels = torch.cat([-negative, torch.zeros(1), positive.flip(0)]).float()
    return levels / levels.max()


def _quantiles(tail: float, count: int) -> Tensor:
    """`count` quantiles at even steps from the tail towards the median."""
    return torch.special.ndtri(torch.linspace(tail, 0.5, count + 1)[:-1].double())


NF4 = _nf4_levels()
"""The levels of nf4, rising from -1 to 1, float32 (16,)."""


def expand(packed: Packed) -> Tensor:
    """The matrix (O, I) in float32, for schemes int8, int4 and nf4."""
    assert packed.scales is not None
    out = torch.empty(packed.shape, device=packed.data.device)
    for part in row_parts(packed.shape):
        values = _values(packed.scheme, packed.data[part])
        groups = values.unflatten(-1, (packed.scales.shape[1], -1))  # (rows, groups, size)
        groups *= packed.scales[part].float()[..., None]
        out[part] = groups.flatten(-2)
    return out


def whole_numbers(packed: Packed) -> Tensor:
    """The codes of int8 or int4 one by one, int8 (O, I)."""
    if packed.scheme == "int8":
        return packed.data
    return apart(packed.data).view(torch.int8).sub_(8)


def together(codes: Tensor) -> Tensor:
    """Codes 0 to 15, uint8 (…, I), two in a byte: (…, I / 2)."""
    return codes[..., 0::2] | codes[..., 1::2] << 4


def apart(data: Tensor) -> Tensor:
    """Undo `together`: (…, I / 2) → (…, I)."""
    return torch.stack([data & 15, data >> 4], dim=-1).flatten(-2)


def from_whole_numbers(scheme: str, numbers: Tensor, scales: Tensor) -> Packed:
    """Codes of int8 or int4 given one by one, whole numbers of any type (O, I), with their scales."""
    numbers = numbers.to(torch.int8)
    data = numbers if scheme == "int8" else together((numbers + 8).view(torch.uint8))
    return Packed(scheme, data, scales, tuple(numbers.shape))


def rounded(scheme: str, groups: Tensor, scales: Tensor) -> Tensor:
    """The nearest whole number for each weight: groups (…, size) of float32 and scales (…, 1), float32 too.

    A scale of zero stands for weights that are zero, or too small to be told from it.
    """
    whole = groups / torch.where(scales == 0, 1, scales)
    return whole.round_().clamp_(LOWEST[scheme], HIGHEST[scheme])


def row_parts(shape: tuple[int, ...], numbers: int = _CHUNK) -> list[slice]:
    """Slices of rows that hold about so many numbers each."""
    step = max(1, numbers // max(1, shape[1]))
    return [slice(at, min(at + step, shape[0])) for at in range(0, shape[0], step)]


def _values(scheme: str, data: Tensor) -> Tensor:
    """Codes as the float32 numbers that scales multiply."""
    if scheme == "int8":
        return data.float()
    if scheme == "int4":
        return apart(data).float().sub_(8)
    return NF4.to(data.device)[apart(data).int()]
