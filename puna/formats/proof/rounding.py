"""What rounding to each stored type may change, and how far samples of two models' tensors are apart."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from puna.formats.packed import plain
from puna.model.weights import Packed


@dataclass(frozen=True)
class Limit:
    """The largest differences that rounding explains.

    `tensor` is rms(difference) / rms(values) of one tensor, `logits` the relative error of the logits, `kl`
    the mean KL divergence in nats per token.
    """

    tensor: float
    logits: float
    kl: float


# Tensors: a float's limit is its half unit in the last place. Low-bit schemes were measured on normal,
# Laplace and Student (4 degrees) values; limits are about twice the largest. Rounding moved
#            q8_0   int8   q5_1   q5_0   q4_1   q4_0
#   by up to 0.007  0.009  0.045  0.058  0.094  0.116
# and a tensor of other numbers, or of the same in another order, is at 1.4. The schemes with two levels of
# scales (k) round no worse than the plain ones of as many bits.
#
# Logits depend on the model besides. Measured, relative error and KL divergence:
#                         float16         bfloat16        q8_0            q5_0            q4_0
#   stories260K, trained  0.0003 0.0000   0.003 0.0001    0.006 0.0008    0.05 0.06       0.10 0.19
#   random, 8 layers      0.0009 0.0000   0.008 0.0000    0.019 0.0000    0.15 0.001      0.32 0.006
#   random, 12 layers,    0.005  0.0000   0.042 0.002     0.10  0.013     0.63 0.46       0.90 0.95
#     gain 1.5
# Two unrelated models are at 1.4: for the coarsest schemes it is the tensors that decide.
LIMITS: dict[str, Limit] = {
    "float64": Limit(1e-12, 1e-5, 1e-8),  # logits are computed in float32
    "float32": Limit(1e-7, 1e-5, 1e-8),
    "float16": Limit(5e-4, 2e-2, 1e-3),
    "bfloat16": Limit(4e-3, 1e-1, 1e-2),
    "q8_0": Limit(2e-2, 3e-1, 1e-1),
    "int8": Limit(2e-2, 3e-1, 1e-1),
    "q6_k": Limit(5e-2, 8e-1, 5e-1),
    "q5_k": Limit(1.2e-1, 1.2, 2.0),
    "q5_1": Limit(1.2e-1, 1.2, 2.0),
    "q5_0": Limit(1.2e-1, 1.2, 2.0),
    "q4_k": Limit(2.4e-1, 1.3, 4.0),
    "q4_1": Limit(2.4e-1, 1.3, 4.0),
    "q4_0": Limit(2.4e-1, 1.3, 4.0),
}


def coarsest(kinds: Iterable[str]) -> str:
    """The type among these whose rounding changes most."""
    return max(kinds, key=lambda kind: LIMITS[kind].tensor)


@dataclass
class Samples:
    """Some numbers of every tensor that passes, at the same places in any model of one shape.

    At most 64 rows of 256 numbers each: what is wrong with a whole tensor shows in them, and those of two
    large models need not be in memory together. All numbers enter the hash.
    """

    vocabulary: int
    values: dict[str, Tensor] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, value: Tensor | Packed) -> None:
        """Take some numbers of a tensor."""
        rows = value.shape[0]
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            rows = min(rows, self.vocabulary)  # the rest is padding that one of the models may lack
        found = plain(take_rows(value, _places(rows, 64 if len(value.shape) > 1 else 4096)))
        if found.dim() > 1:
            found = found[:, _places(found.shape[1], 256)]
        self.values[name] = found.to(torch.float64, copy=True)
        self.kinds[name] = (
            value.scheme if isinstance(value, Packed) else str(value.dtype).removeprefix("torch.")
        )


@dataclass(frozen=True)
class Furthest:
    """The tensor that is furthest beyond, or nearest to, its limit; `kind` is the coarser type of the two."""

    name: str
    kind: str
    error: float

    @property
    def exceeds(self) -> bool:
        """Whether rounding does not explain it."""
        return self.error > LIMITS[self.kind].tensor


def furthest(a: Samples, b: Samples) -> Furthest | None:
    """Of the tensors that both have, in equal shapes, the one that differs most for its types."""
    found = [
        Furthest(name, coarsest((a.kinds[name], b.kinds[name])), _error(a.values, b.values, name))
        for name in a.values
        if name in b.values and a.values[name].shape == b.values[name].shape
    ]
    return max(found, key=lambda each: each.error / LIMITS[each.kind].tensor, default=None)


def take_rows(matrix: Tensor | Packed, index: Tensor | slice) -> Tensor | Packed:
    """Rows of a tensor, packed where it is packed."""
    if not isinstance(matrix, Packed):
        return matrix[index]
    data = matrix.data[index]
    scales = None if matrix.scales is None else matrix.scales[index]
    return replace(matrix, data=data, scales=scales, shape=(len(data), *matrix.shape[1:]))


def _places(size: int, most: int) -> Tensor:
    return torch.linspace(0, size - 1, min(size, most), dtype=torch.float64).long()


def _error(a: Mapping[str, Tensor], b: Mapping[str, Tensor], name: str) -> float:
    below = a[name].norm().item() or 1.0
    return (a[name] - b[name]).norm().item() / below
