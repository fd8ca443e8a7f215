"""What rounding to each stored type may change, and whether that explains how far two models' rows are apart.

R rows
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from puna.formats.proof.sketches import BLOCK, Sketch, Sketches

_HALF = 5e-4  # relative rounding of a scale in float16
_SMALLEST = 2.0**-25  # and its absolute rounding, where it is subnormal
_TINIEST = 1e-300


@dataclass(frozen=True)
class Limit:
    """The largest differences of logits that rounding explains.

    `logits` is their relative error, `kl` the mean KL divergence in nats per token.
    """

    logits: float
    kl: float


# Every row of every tensor is compared besides, and the config: logits show what is grossly wrong.
# Measured, relative error and KL divergence:
#                         float16         bfloat16        q8_0            q5_0            q4_0
#   stories260K, trained  0.0003 0.0000   0.003 0.0001    0.006 0.0008    0.05 0.06       0.10 0.19
#   random, 8 layers      0.0009 0.0000   0.008 0.0000    0.019 0.0000    0.15 0.001      0.32 0.006
#   random, 12 layers,    0.005  0.0000   0.042 0.002     0.10  0.013     0.63 0.46       0.90 0.95
#     gain 1.5
#   random, Student (2)   0.005  0.0002   0.044 0.023     0.20  0.44      0.74 6.0        1.0  11
# Two unrelated models are at 1.4.
LIMITS: dict[str, Limit] = {  # from the finest to the coarsest
    "float64": Limit(1e-5, 1e-8),  # logits are computed in float32
    "float32": Limit(1e-5, 1e-8),
    "float16": Limit(5e-2, 1e-2),
    "bfloat16": Limit(3e-1, 2e-1),
    "q8_0": Limit(8e-1, 3.0),
    "int8": Limit(8e-1, 3.0),
    "q6_k": Limit(1.2, 10.0),
    "q5_k": Limit(1.4, 30.0),
    "q5_1": Limit(1.4, 30.0),
    "q5_0": Limit(1.4, 30.0),
    "nf4": Limit(1.5, 50.0),
    "int4": Limit(1.5, 50.0),
    "q4_k": Limit(1.5, 50.0),
    "q4_1": Limit(1.5, 50.0),
    "q4_0": Limit(1.5, 50.0),
}
RELATIVE = {"float64": 1e-12, "float32": 1e-7, "float16": 5e-4, "bfloat16": 4e-3}
"""Of plain types: distance / size of a tensor, or of a row."""

# Of schemes in blocks: half a step as a share of a block's largest magnitude, and the largest whole number
# that a scale is multiplied by. Rounding to nearest moves no number by more, however a block is filled, but
# for the upper end of q4_0 and q5_0 (Sketch.ends). A block with a minimum spans twice the largest magnitude
# at most. The K schemes round their scales too, and choose them by other measures than the nearest number.
# llama.cpp's own quantisers, weighted and not, on normal, Student (2 degrees), one-signed
# and one-channel values come to 0.2 to 0.7 of these limits.
STEPS: dict[str, tuple[float, int]] = {
    "q8_0": (1 / 254, 127),
    "q6_k": (1.2 / 64, 32),
    "q5_k": (1.2 / 31, 31),
    "q5_1": (1 / 31, 31),
    "q5_0": (1 / 32, 16),
    "q4_k": (1.2 / 15, 15),
    "q4_1": (1 / 15, 15),
    "q4_0": (1 / 16, 8),
}
# Of codes whose scales are known: how many half steps a matrix may be off, as a root mean square, and the
# largest code. Measured: rounding to nearest is off by 0.55 to 0.68; GPTQ, where a weight also takes over
# what others lost, by 0.57 to 0.87 (1.57 in the furthest row). That was on normal and Student (4) matrices in
# groups of 32 and 128, with inputs that are independent, correlated by 0.5 to 0.99, of rank 32 of 512, or of
# very unequal size. Unrelated matrices are 6 to 10 half steps apart.
HALF_STEPS = {"int8": (1.0, 127), "int4": (2.0, 8), "nf4": (1.0, 1)}
_CUT = {"q4_0": 0, "q5_0": 1}  # columns of Sketch.ends


def coarsest(kinds: Iterable[str]) -> str:
    """The type among these whose rounding changes most."""
    return max(kinds, key=list(LIMITS).index)


@dataclass(frozen=True)
class Furthest:
    """The tensor, or the row of one, that is furthest beyond, or nearest to, its limit.

    `kind` is the coarser type of the two, `error` the distance as a share of the size, `limit` the largest
    that rounding explains. Where both are in one `scheme`, with as many scales, what one holds the other can
    hold: `kind` is then the coarser type of their scales.
    """

    name: str
    kind: str
    error: float
    limit: float
    row: int | None
    ratio: float
    scheme: str | None = None

    @property
    def exceeds(self) -> bool:
        """Whether rounding does not explain it."""
        return not self.ratio <= 1

    @property
    def allows(self) -> str:
        """What the limit follows from, in words."""
        return self.kind if self.scheme is None else f"rounding {self.scheme}'s scales to {self.kind}"

    @property
    def where(self) -> str:
        """In words."""
        return self.name if self.row is None else f"row {self.row} of {self.name}"


@dataclass(frozen=True)
class Distances:
    """Of all tensors in equal shapes that both models have.

    `furthest` is None without any; `alike` counts tensors without a number that differs, `wider` and
    `narrower` those of them that the second model stores in another type. `kind` is the type whose rounding
    explains most, None without any.
    """

    furthest: Furthest | None
    kind: str | None
    tensors: int
    alike: int
    wider: int
    narrower: int

    def as_dict(self) -> dict[str, Any]:
        """Everything by name."""
        return asdict(self)


def distances(a: Sketches, b: Sketches) -> Distances:
    """Compare every row of every tensor; an output projection may be tied in one of the two."""
    pairs = [
        (name, first, second)
        for name in {**a.found, **b.found}
        if (first := a.of(name)) and (second := b.of(name)) and _same_shape(first, second)
    ]
    found = [_furthest(*each) for each in pairs]
    alike = [each[1:] for each, far in zip(pairs, found, strict=True) if far.error == 0]
    order = list(LIMITS).index
    return Distances(
        max(found, key=lambda each: each.ratio, default=None),
        coarsest(each.kind for each in found) if found else None,
        len(pairs),
        len(alike),
        sum(order(second.kind) < order(first.kind) for first, second in alike),
        sum(order(second.kind) > order(first.kind) for first, second in alike),
    )


def _same_shape(a: Sketch, b: Sketch) -> bool:
    return (a.columns, len(a.rows)) == (b.columns, len(b.rows))


def _furthest(name: str, a: Sketch, b: Sketch) -> Furthest:
    """The row, or the tensor as a whole, that is furthest for its types."""
    kind = coarsest((a.kind, b.kind))
    wide = b if kind == a.kind != b.kind else a
    shared = _scales_of_both(a, b)
    apart = _finite((a.rows - b.rows).double().norm(dim=1))  # (R,)
    shrunk = _finite((a.norms.double() - b.norms.double()).abs())
    sizes = wide.norms.double()
    limits = _limits(wide, a, b, tiny=True)
    # More projections say more: 8 of them overestimate three times, 16 of them 2.4 times, once in 10^12 rows.
    margin = 1.0 if wide.is_exact else 1 + math.sqrt(32 / wide.rows.shape[1])
    found = [
        _whole(name, kind, apart, sizes, _limits(wide, a, b, tiny=False), wide.is_exact),
        _row(name, kind, apart, sizes, limits * margin),
        _row(name, kind, shrunk, sizes, limits),  # norms are known, not estimated
    ]
    furthest = max(found, key=lambda each: each.ratio)
    return furthest if shared is None else replace(furthest, kind=shared, scheme=kind)


def _scales_of_both(a: Sketch, b: Sketch) -> str | None:
    """The coarser type of their scales where nothing else can be rounded between two matrices."""
    if a.scales is None or b.scales is None or (a.kind, a.scales[0]) != (b.kind, b.scales[0]):
        return None
    return coarsest((a.scales[1], b.scales[1]))


def _whole(name: str, kind: str, apart: Tensor, sizes: Tensor, limits: Tensor, is_exact: bool) -> Furthest:
    """Of a tensor; an estimate over many rows is the nearer, the more of them weigh alike."""
    size, distance, limit = (x.norm().item() for x in (sizes, apart, limits))
    margin = 1 + (0 if is_exact else 2 * limits.square().norm().item() / max(limit * limit, _TINIEST))
    below = size or 1.0
    return Furthest(
        name, kind, distance / below, margin * limit / below, None, _ratio(distance, margin * limit)
    )


def _row(name: str, kind: str, apart: Tensor, sizes: Tensor, limits: Tensor) -> Furthest:
    ratios = torch.where(apart > 0, apart / limits.clamp_min(_TINIEST), 0.0)
    at = int(ratios.argmax())
    distance, limit, below = apart[at].item(), limits[at].item(), sizes[at].item() or 1.0
    return Furthest(name, kind, distance / below, limit / below, at, _ratio(distance, limit))


def _ratio(distance: float, limit: float) -> float:
    return distance / max(limit, _TINIEST) if distance else 0.0


def _limits(wide: Sketch, a: Sketch, b: Sketch, tiny: bool) -> Tensor:
    """How far rounding to both types may move each row; `tiny` allows for what is too small for float16."""
    shared = _scales_of_both(a, b)
    if shared is not None:
        least = HALF_STEPS[a.kind][1] * _floor(wide, tiny) if shared == "float16" else 0.0
        return RELATIVE[shared] * wide.norms.double() + least
    # What both are rounded to counts once; but each by its own scales.
    parts = [a] if a.kind == b.kind and a.steps is None and b.steps is None else [a, b]
    return torch.stack([_limit(wide, each, tiny) for each in parts]).norm(dim=0)


def _limit(wide: Sketch, stored: Sketch, tiny: bool) -> Tensor:
    kind, sizes = stored.kind, wide.norms.double()
    floor = _floor(wide, tiny)
    if kind in RELATIVE:
        return RELATIVE[kind] * sizes + (floor if kind == "float16" else 0.0)
    if stored.steps is not None:
        share, whole = HALF_STEPS[kind]
        return share * stored.steps + whole * floor + RELATIVE["float32"] * sizes
    share, whole = STEPS[kind]
    assert wide.largest is not None and wide.ends is not None
    column = _CUT.get(kind)
    steps = share * wide.largest.double() if column is None else wide.ends[:, column].double()
    return math.sqrt(BLOCK) * steps + _HALF * sizes + whole * floor


def _floor(wide: Sketch, tiny: bool) -> float:
    return _SMALLEST * math.sqrt(wide.columns) if tiny else 0.0


def _finite(values: Tensor) -> Tensor:
    """What overflowed counts as far."""
    return values.nan_to_num(nan=1e30, posinf=1e30)
