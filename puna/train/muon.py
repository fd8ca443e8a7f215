"""Muon (https://kellerjordan.github.io/posts/muon/): momentum, made orthogonal, moves a matrix.

torch.optim.Muon is not used: it forms its products in bfloat16 whatever the run's type is, knows no master
copy and no stochastic rounding, and would read gradients once more to scale them.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from puna.kernels.rounding import Key, random_halves, rounded
from puna.settings import Settings

QUINTIC = (3.4445, -4.7750, 2.0315)
"""Raises small singular values fastest: in five steps all from 0.002 on, of 1, come between 0.68 and 1.21."""
ADAMW_SIZE = 0.2
"""The root mean square of AdamW's updates, as measured in section 2.2 of arXiv 2502.16982."""


class MuonSettings(Settings):
    """What Muon has beside the learning rate and decay, which it shares with AdamW."""

    momentum: float = Field(default=0.95, ge=0.0, lt=1.0)
    iterations: int = Field(default=5, ge=1, le=100)


def orthogonal(matrix: Tensor, iterations: int = 5, dtype: torch.dtype | None = None) -> Tensor:
    """About U·Vᵀ of a matrix U·S·Vᵀ: all singular values become about 1 (Newton–Schulz, a quintic).

    It needs the whole matrix: shards are to be gathered first.

    Args:
        matrix: (O, I).
        dtype: what products are formed in, and the type of the result; the matrix's own unless given.
    """
    x = matrix.to(dtype or matrix.dtype)
    x = x.t() if len(x) > x.shape[1] else x  # the square product is then the smaller one
    x = x / x.norm().clamp(min=1e-7)  # no singular value above 1: from there on it converges
    a, b, c = QUINTIC
    for _ in range(iterations):
        squared = x @ x.t()
        x = torch.addmm(x, torch.addmm(squared, squared, squared, beta=b, alpha=c), x, beta=a)
    return x if x.shape == matrix.shape else x.t()


class Matrix(NamedTuple):
    """A matrix (O, I), and all that its update reads; tensors are changed in place.

    Momentum in bfloat16 means that it and the weight are rounded stochastically, by `key`; else a weight in
    bfloat16 is the rounding of `master`.
    """

    weight: Tensor
    gradient: Tensor
    momentum: Tensor
    master: Tensor | None
    decay: float
    key: Key


def update(one: Matrix, settings: MuonSettings, rate: float, factor: float, dtype: torch.dtype) -> None:
    """Move a matrix, by its gradient times `factor`; `dtype` is that of products."""
    wide = torch.promote_types(one.momentum.dtype, torch.float32)
    gradient = one.gradient.to(wide) * factor
    direction, momentum = movement(gradient, one.momentum.to(wide), settings, dtype)
    weight = (one.weight if one.master is None else one.master).to(wide) * (1 - rate * one.decay)
    weight -= rate * direction
    if one.momentum.dtype == torch.bfloat16:
        halves = random_halves(weight.numel(), one.key, weight.device)
        weight, momentum = rounded(weight, halves[0]), rounded(momentum, halves[1])
    if one.master is not None:
        one.master.copy_(weight)
    one.weight.copy_(weight)
    one.momentum.copy_(momentum)


def movement(
    gradient: Tensor, momentum: Tensor, settings: MuonSettings, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """What a matrix (O, I) moves by at a rate of 1, and the new momentum: Nesterov's.

    Of AdamW's size, 0.2·√(max(O, I)) times the orthogonal matrix, so that rate and decay are the same numbers
    for both (arXiv 2502.16982, equation 4).

    Args:
        gradient, momentum: in the type to add up in.
        dtype: that of products.
    """
    beta = settings.momentum
    momentum = momentum.lerp(gradient, 1 - beta)
    direction = orthogonal(gradient.lerp(momentum, beta), settings.iterations, dtype)
    return direction.to(momentum.dtype) * (ADAMW_SIZE * math.sqrt(max(gradient.shape))), momentum
