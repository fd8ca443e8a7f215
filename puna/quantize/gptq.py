"""GPTQ (arXiv 2210.17323): int4 rounding in which later weights make good the errors of earlier ones.

A layer's inputs x over calibration text give H = Σ xᵀx, and with E = W - Ŵ the error Σ ‖x (W - Ŵ)ᵀ‖² is
tr(E H Eᵀ). With H = L Lᵀ, L lower triangular, that is ‖E L‖², whose column k is L_kk times what is left of
weight k after the errors of the columns behind it:

    left_k = w_k + Σ_{j>k} E_j L_jk / L_kk - ŵ_k

So from the last column to the first each takes the ŵ nearest to w_k plus the feedback of the errors so far.
This is the paper's algorithm, its columns counted backwards, without the inverse of H (that they agree is
theorem 6 of QuIP, arXiv 2307.13304). Two things follow that the paper has not: sweeps over the groups, which
move each scale, then each code, to where the error is least while all others stay; and, where the inputs s of
the same layer in the source are known too, an aim that makes good what the layers before lost. The products
should come to s Wᵀ, and where they are added to a stream that lacks m of the source's by then, to m + s Wᵀ;
x W*ᵀ comes nearest to that with

    W* = W + (W Σ (s - x)ᵀx + Σ mᵀx) H⁻¹

O outputs   I inputs   G weights of a group   n rows of calibration
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from puna.errors import DataError, ModelError
from puna.model.weights import Packed
from puna.quantize.codes import from_whole_numbers, rounded, row_parts, whole_numbers
from puna.quantize.schemes import Format, finite, quantized
from puna.settings import Settings

_BLOCK = 128  # columns whose feedback upon each other is done one by one; what they feed on is one product
_HELD = 1 << 26  # weights compensated at once, each of some twenty bytes
_STRIP = 1024  # columns of H summed at once: of the symmetric matrix only what is not below the diagonal
_MOST_DAMPING = 1e3


class GptqSettings(Settings):
    """`damping`: share of the mean of H's diagonal added to it. `order`: which columns come first.

    `sweeps`: how often scales and codes are moved to where the error is least, after the paper's pass.
    """

    damping: float = Field(default=0.01, gt=0, le=1)
    order: Literal["activation", "none"] = "activation"
    sweeps: int = Field(default=2, ge=0)


@dataclass(frozen=True)
class Outcome:
    """A quantized matrix; its error Σ ‖x (W* - Ŵ)ᵀ‖² and that of rounding to nearest, damping included.

    `fallbacks`: rows that rounding to nearest served better, and that were left so.
    """

    packed: Packed
    error: float
    nearest_error: float
    fallbacks: int


@dataclass(frozen=True)
class _Factor:
    """H with its diagonal raised: `order` the columns from the last to be rounded to the first."""

    order: Tensor  # (I,)
    triangle: Tensor  # (I, I): L, of H in this order
    hessian: Tensor  # (I, I), as it was summed
    added: Tensor  # (I,) to its diagonal
    damping: float

    @property
    def importance(self) -> Tensor:
        """What the squared error of a column counts by itself."""
        return self.hessian.diagonal() + self.added


@dataclass
class Gptq:
    """What the inputs of one layer, or of several that share them, say about rounding it."""

    inputs: int
    settings: GptqSettings = field(default_factory=GptqSettings)
    device: str | torch.device = "cpu"
    dtype: torch.dtype = torch.float32
    rows: int = 0
    _hessian: Tensor = field(init=False, repr=False)
    _shift: Tensor | None = field(default=None, init=False, repr=False)
    _missing: Tensor | None = field(default=None, init=False, repr=False)
    _factor: _Factor | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        self._hessian = torch.zeros(self.inputs, self.inputs, dtype=self.dtype, device=self.device)

    @torch.no_grad()
    def add(self, x: Tensor, source: Tensor | None = None, missing: Tensor | None = None) -> None:
        """Count calibration inputs (…, I).

        Args:
            x: what the quantized model gives the layer.
            source: (…, I) what the source gives it, of the same text.
            missing: (…, O) what the products are to make good beside: the source's stream that they are added
                to less the quantized model's. All matrices fitted are then of one layer with O outputs.

        Raises:
            DataError: they are not finite.
        """
        rows = self._finite(x)
        for at in range(0, self.inputs, _STRIP):
            strip = self._hessian[at : at + _STRIP, at:]
            strip.addmm_(rows[:, at : at + _STRIP].T, rows[:, at:])
        if source is not None:
            lost = self._finite(source) - rows
            self._shift = torch.zeros_like(self._hessian) if self._shift is None else self._shift
            self._shift.addmm_(lost.T, rows)
        if missing is not None:
            self._add_missing(self._finite(missing, missing.shape[-1]), rows)
        self.rows += len(rows)
        self._factor = None

    @torch.no_grad()
    def aim(self, weight: Tensor) -> Tensor:
        """W* (O, I): the matrix whose products with x are nearest to what those of W should come to.

        Raises:
            DataError: as `compensated`.
        """
        factor = self._factored()
        parts = [self._aim(weight[rows], rows, factor) for rows in row_parts(tuple(weight.shape), _HELD)]
        return torch.cat(parts)

    def quantized(self, weight: Tensor, format: Format, name: str = "the matrix") -> Packed:
        """A matrix (O, I) in int4; see `compensated`."""
        return self.compensated(weight, format, name).packed

    @torch.no_grad()
    def compensated(self, weight: Tensor, format: Format, name: str = "the matrix") -> Outcome:
        """A matrix (O, I) in int4, each row compensated unless rounding to nearest serves it better.

        Raises:
            DataError: there was no calibration, or its activations are too large for H.
            ModelError: the format is not int4 in groups, the shape does not allow it, or a number is not
                finite.
        """
        if format.scheme != "int4" or format.group is None:
            raise ModelError(f"{name}: gptq makes int4 in groups, got {format}")
        factor = self._factored()
        parts = [
            self._part(finite(weight[rows], name), rows, format, name, factor)
            for rows in row_parts(tuple(weight.shape), _HELD)
        ]
        numbers, scales = (torch.cat([part[at] for part in parts]) for at in (0, 1))
        errors, nearest_errors, worse = (torch.cat([part[at] for part in parts]) for at in (2, 3, 4))
        packed = from_whole_numbers("int4", numbers, scales)
        return Outcome(packed, float(errors.sum()), float(nearest_errors.sum()), int(worse.sum()))

    def _part(
        self, weight: Tensor, rows: slice, format: Format, name: str, factor: _Factor
    ) -> tuple[Tensor, ...]:
        """Of some rows: whole numbers, scales, errors, those of rounding to nearest, which were left so."""
        nearest = quantized(weight, format, name)
        aim = self._aim(weight, rows, factor)
        start = quantized(aim, format, name, factor.importance)
        assert start.scales is not None and nearest.scales is not None
        across = aim.T.contiguous()  # (I, O): what is done column by column then lies together
        scales = start.scales.T.to(across)  # (groups, O)
        numbers = _compensated(across, scales, factor)  # (I, O)
        for _ in range(self.settings.sweeps):
            _sweep(across, numbers, scales, factor, format.scales)
        found = numbers.T, scales.T
        plain = whole_numbers(nearest).to(across), nearest.scales.to(across)
        errors, nearest_errors = (_errors(aim, *pair, factor) for pair in (found, plain))
        worse = errors > nearest_errors
        chosen = [torch.where(worse[:, None], *pair) for pair in zip(plain, found, strict=True)]
        least = torch.minimum(errors, nearest_errors)
        return chosen[0].to(torch.int8), chosen[1].to(format.scales), least, nearest_errors, worse

    def _aim(self, weight: Tensor, rows: slice, factor: _Factor) -> Tensor:
        """W* of some rows of a matrix, which these are."""
        aim = weight.to(factor.triangle)
        if self._shift is None and self._missing is None:
            return aim
        lost = torch.zeros_like(aim) if self._shift is None else aim @ self._shift  # (O, I)
        if self._missing is not None:
            lost += self._missing[rows]
        lost[:, factor.order] = torch.cholesky_solve(lost[:, factor.order].T, factor.triangle).T
        return lost.add_(aim)

    def _add_missing(self, missing: Tensor, rows: Tensor) -> None:
        if self._missing is None:
            self._missing = self._hessian.new_zeros(missing.shape[1], self.inputs)
        self._missing.addmm_(missing.T, rows)

    def _finite(self, x: Tensor, width: int | None = None) -> Tensor:
        rows = x.reshape(-1, width or self.inputs).to(self._hessian)
        if not bool(torch.isfinite(rows).all()):
            raise DataError(
                "calibration gave NaN or infinite activations: load the model in a wider number type"
            )
        return rows

    def _factored(self) -> _Factor:
        if not self.rows:
            raise DataError("gptq needs calibration text: none has passed through this layer")
        if self._factor is None:
            self._factor = _factored(self._hessian, self.settings)
        return self._factor


def _factored(hessian: Tensor, settings: GptqSettings) -> _Factor:
    """Raise the damping tenfold until H, so damped, is positive definite in this number type."""
    _mirror(hessian)
    active = hessian.diagonal()
    mean = float(active.mean()) or 1.0
    # A column that was never active is rounded to nearest: nothing tells what else would serve it.
    dead = (active == 0) * mean
    order = active.argsort(stable=True) if settings.order == "activation" else _backwards(active)
    damping = settings.damping
    while damping < _MOST_DAMPING:
        added = dead + damping * mean
        triangle = _triangle(hessian, order, added)
        if triangle is not None:
            return _Factor(order, triangle, hessian, added, damping)
        damping *= 10
    raise DataError(
        "calibration gave activations too large to sum their squares: look for a fault in the model"
    )


def _backwards(active: Tensor) -> Tensor:
    return torch.arange(len(active) - 1, -1, -1, device=active.device)


def _mirror(hessian: Tensor) -> None:
    """Fill what lies below the strips that were summed."""
    for at in range(_STRIP, len(hessian), _STRIP):
        strip = slice(at - _STRIP, at)
        hessian[at:, strip] = hessian[strip, at:].T


def _triangle(hessian: Tensor, order: Tensor, added: Tensor) -> Tensor | None:
    """L of L Lᵀ = H in this order, with its diagonal raised; None where there is none."""
    ordered = hessian[order[:, None], order]
    ordered.diagonal().add_(added[order])
    triangle, failed = torch.linalg.cholesky_ex(ordered)
    return None if int(failed) else triangle


def _compensated(across: Tensor, scales: Tensor, factor: _Factor) -> Tensor:
    """Whole numbers (I, O) for weights (I, O) and scales (groups, O)."""
    errors, numbers = torch.empty_like(across), torch.empty_like(across)
    order = factor.order.tolist()
    group = len(across) // len(scales)
    for end in range(len(across), 0, -_BLOCK):
        start = max(0, end - _BLOCK)
        feedback = factor.triangle[end:, start:end].T @ errors[end:]  # (columns, O)
        columns = factor.triangle[start:end, start:end].T.contiguous()
        for k in range(end - start - 1, -1, -1):
            at, column = start + k, order[start + k]
            feedback[k] += columns[k, k + 1 :] @ errors[at + 1 : end]
            aim = feedback[k].div_(columns[k, k]).add_(across[column])
            whole = rounded("int4", aim, scales[column // group])
            numbers[column] = whole
            torch.sub(across[column], whole.mul_(scales[column // group]), out=errors[at])
    return numbers


def _sweep(across: Tensor, numbers: Tensor, scales: Tensor, factor: _Factor, dtype: torch.dtype) -> None:
    """Move each group's scale, then each of its codes, to where tr(E H Eᵀ) is least; in place."""
    group = len(across) // len(scales)
    errors = across - (numbers.unflatten(0, (-1, group)) * scales[:, None]).flatten(0, 1)
    for at, scale in enumerate(scales):
        rows = slice(at * group, (at + 1) * group)
        square = factor.hessian[rows, rows] + factor.added[rows].diag()
        # (G, O): half of how fast the error grows with that of each weight
        slope = factor.hessian[rows] @ errors + factor.added[rows, None] * errors[rows]
        _move_scale(numbers[rows], scale, errors[rows], slope, square, dtype)
        _move_codes(numbers[rows], scale, errors[rows], slope, square)


def _move_scale(
    numbers: Tensor, scale: Tensor, errors: Tensor, slope: Tensor, square: Tensor, dtype: torch.dtype
) -> None:
    curved = square @ numbers  # (G, O)
    slopes, curvature = (numbers * slope).sum(0), (numbers * curved).sum(0)  # (O,)
    moved = (scale + torch.where(curvature > 0, slopes / curvature, 0)).to(dtype).to(scale)
    step = moved - scale
    better = step * (step * curvature - 2 * slopes) < 0  # false too where the scale left its type
    step = torch.where(better, step, 0)
    scale += step
    errors -= numbers * step
    slope -= curved * step


def _move_codes(numbers: Tensor, scale: Tensor, errors: Tensor, slope: Tensor, square: Tensor) -> None:
    for k in range(len(numbers)):
        value = numbers[k] * scale
        numbers[k] = rounded("int4", value + slope[k] / square[k, k], scale)
        step = numbers[k] * scale - value
        errors[k] -= step
        slope.addr_(square[k], step, alpha=-1)


def _errors(weight: Tensor, numbers: Tensor, scales: Tensor, factor: _Factor) -> Tensor:
    """tr(E H Eᵀ) row by row, for weights and numbers (O, I) and scales (O, groups): (O,)."""
    values = (numbers.unflatten(-1, (scales.shape[1], -1)) * scales[..., None]).flatten(-2)
    ordered, total = (weight - values)[:, factor.order], weight.new_zeros(len(weight))
    for at in range(0, ordered.shape[1], _STRIP):
        total += (ordered[:, at:] @ factor.triangle[at:, at : at + _STRIP]).square_().sum(1)
    return total
