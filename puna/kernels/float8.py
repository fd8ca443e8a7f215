"""The three products of a linear layer in training, of numbers of 8 bits: for devices that multiply in them.

Both factors are rounded to e4m3 (arXiv 2209.05433): a sign, four bits of exponent, three of fraction. Every
line along which a product sums has a scale of its own, which brings the largest number of the line to the
largest there is; so each factor is rounded anew for each of the three products. Sums are of float32, and the
results in bfloat16.

    R rows   I inputs   O outputs, of all weights together
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

MULTIPLE = 16  # of I and O: what the products take; R is made one
LARGEST = torch.finfo(torch.float8_e4m3fn).max
SMALLEST = 1e-12  # of a line's largest number: a line of zeros has a scale too
Rounded = tuple[Tensor, Tensor]  # numbers and their scales


def multiplies_float8(device: torch.device) -> bool:
    """Whether a device has units for such products (from Ada and Hopper on)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def linear(
    x: Tensor,
    weights: Sequence[Tensor],
    bias: Sequence[Tensor | None] | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """x (R, I) times weights (Oᵢ, I), one below the other, and their bias (Oᵢ,): (R, O) in `dtype`."""
    out = _product(x, _joint(weights))
    parts = out.split([len(weight) for weight in weights], dim=1)
    for part, each in zip(parts, bias or [None] * len(parts), strict=True):
        if each is not None:
            part.add_(each)
    return out.to(dtype or x.dtype)


def input_gradient(grad: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Gradients (R, O) of a layer's outputs times its weights (Oᵢ, I): those of its input, (R, I)."""
    return _product(grad, _joint(weights).t()).to(grad.dtype)


def weight_gradient(
    grad: Tensor, x: Tensor, out: Tensor | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Of a layer's outputs' gradients (R, O) and its input (R, I) its weight's, (O, I) in `dtype`.

    It is added to `out` where that is given, in place.
    """
    if odd := -len(x) % MULTIPLE:  # rows of zeros add nothing
        grad, x = (F.pad(each, (0, 0, 0, odd)) for each in (grad, x))
    found = _product(grad.t(), x.t())
    return found.to(dtype) if out is None else out.add_(found)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left (M, S) times right (N, S), summed over S: (M, N) in bfloat16."""
    return multiplied(rounded(left), rounded(right))


def multiplied(left: Rounded, right: Rounded) -> Tensor:
    """The product of what `rounded` gave: of (M, S) and (N, S), summed over S: (M, N) in bfloat16."""
    (a, a_scale), (b, b_scale) = left, right
    return torch._scaled_mm(
        a, b.t(), scale_a=a_scale, scale_b=b_scale.t(), out_dtype=torch.bfloat16
    )  # torch.nn.functional.scaled_mm is younger than torch 2.11


def rounded(x: Tensor) -> Rounded:
    """x (M, S) in e4m3, and the scales (M, 1) in float32 that bring it back."""
    wide = x.float()
    scale = wide.abs().amax(dim=1, keepdim=True).clamp(min=SMALLEST) / LARGEST
    return (wide / scale).to(torch.float8_e4m3fn).contiguous(), scale


def _joint(weights: Sequence[Tensor]) -> Tensor:
    return weights[0] if len(weights) == 1 else torch.cat(tuple(weights))
