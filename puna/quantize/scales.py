"""The scale of each group of weights: the largest magnitude for int8, a search by least squares for int4.

n rows   G weights of a group
"""

from __future__ import annotations

import torch
from torch import Tensor

from puna.quantize.codes import HIGHEST, rounded

# Shares of the scale that puts the weight of largest magnitude at -8, the end that reaches farthest; negative
# ones put it on the other side, the first of them at 7. Smaller ones clip it and serve the others better.
SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, -8 / 7, -1.05, -1.0, -0.95, -0.9, -0.85)
REFITS = 3


def chosen(scheme: str, groups: Tensor, dtype: torch.dtype, importance: Tensor | None = None) -> Tensor:
    """A scale for each of groups (n, groups, G) of finite float32, rounded to `dtype`, as float32.

    `importance` (groups, G) weighs the squared errors that a scale of int4 makes small. A scale that `dtype`
    cannot hold is infinite.
    """
    if scheme == "int8":
        return _largest_fits(groups, dtype)
    return _least_squares(groups, dtype, importance)


def _largest_fits(groups: Tensor, dtype: torch.dtype) -> Tensor:
    """The largest magnitude at 127; where rounding the scale would clip it by half a step, one scale up."""
    largest = groups.abs().amax(-1)
    scale = (largest / HIGHEST["int8"]).to(dtype)
    bits = scale.view(torch.int32 if dtype == torch.float32 else torch.int16)
    above = (bits + 1).view(dtype)
    return torch.where(largest > (HIGHEST["int8"] + 0.5) * scale.float(), above, scale).float()


def _least_squares(groups: Tensor, dtype: torch.dtype, importance: Tensor | None) -> Tensor:
    """Of several candidates, then of refits to the codes of the best, the one of least squared error."""
    across = groups.movedim(-1, 0).contiguous()  # (G, n, groups): sums then run along whole vectors
    weights = None if importance is None else importance.T.contiguous()[:, None]  # (G, 1, groups)
    at = across.abs().argmax(0, keepdim=True)
    end = across.gather(0, at)[0] / -8
    scale, error = torch.full_like(end, torch.inf), torch.full_like(end, torch.inf)
    for share in SHARES:
        scale, error = _better(across, weights, (end * share).to(dtype).float(), scale, error)
    for _ in range(REFITS):
        scale, error = _better(
            across, weights, _refit(across, weights, scale).to(dtype).float(), scale, error
        )
    return scale


def _better(
    across: Tensor, weights: Tensor | None, candidate: Tensor, scale: Tensor, error: Tensor
) -> tuple[Tensor, Tensor]:
    """The better of two scales for each group, with its error."""
    found = rounded("int4", across, candidate).mul_(candidate).sub_(across).square_()
    if weights is not None:
        found *= weights
    sums = found.sum(0)
    return torch.where(sums < error, candidate, scale), torch.minimum(sums, error)


def _refit(across: Tensor, weights: Tensor | None, scale: Tensor) -> Tensor:
    """The scale that is best for the codes that this one gives: Σ w q / Σ q²."""
    whole = rounded("int4", across, scale)
    weighed = whole if weights is None else whole * weights
    products, squares = (weighed * across).sum(0), (weighed * whole).sum(0)
    return torch.where(squares > 0, products / squares, scale)
