"""What is kept of every row of every tensor that passes: enough to compare it later with another model's.

A row's norm and its products with a few fixed random vectors, scaled so that the squared distance of two
rows' products is an unbiased estimate of the squared distance of the rows. So each row enters the comparison
of models that are never in memory together, at less than the cost of hashing them.

R rows   C columns   K projections
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from puna.formats.packed import CODED, half_steps, plain
from puna.formats.provenance import kind_of
from puna.model.weights import Packed

BLOCK = 32  # weights of a row that share a step, in most schemes
EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")  # padded, in some models, by more rows
_CHUNK = 1 << 20  # numbers at once: few enough to stay in the caches between passes


@dataclass(frozen=True)
class Sketch:
    """One tensor.

    Attributes:
        kind: the type it is stored in, or its scheme.
        columns: numbers of a row.
        rows: (R, K); of a vector its own numbers (R, 1), each a row.
        norms: (R,).
        largest: (R,), root of the sum over blocks of the largest magnitude, squared; None where no scheme
            needs it.
        ends: (R, 2), the same of how far a number may be off where four or five bits cut a block's upper end.
        steps: (R,), root of the sum over a row's numbers of half the step of each, squared, where scales are
            known; None of other numbers.
        scales: how many of them a row has, and their type, where they are known.
    """

    kind: str
    columns: int
    rows: Tensor
    norms: Tensor
    largest: Tensor | None
    ends: Tensor | None
    steps: Tensor | None = None
    scales: tuple[int, str] | None = None

    @property
    def is_exact(self) -> bool:
        """Whether distances are known, not estimated."""
        return self.columns == 1


@dataclass
class Sketches:
    """Of all tensors of a model.

    `vocabulary` rows of the embeddings are taken. `wide` computes in float64, where a rounding of float32
    shows; `by_block` are the types of which to note what low-bit schemes round by.
    """

    vocabulary: int
    wide: bool
    by_block: frozenset[str]
    projections: int
    found: dict[str, Sketch] = field(default_factory=dict)
    _vectors: dict[int, Tensor] = field(default_factory=dict)
    _held: Tensor = field(default_factory=lambda: torch.empty(0))

    def add(self, name: str, value: Tensor | Packed, numbers: Tensor | Packed) -> None:
        """Take in one tensor; `numbers` is the same, or it expanded, where that is at hand."""
        kind = kind_of(value)
        if name in EMBEDDINGS and numbers.shape[0] > self.vocabulary:
            numbers = take_rows(numbers, slice(self.vocabulary))
        if len(numbers.shape) == 1:
            vector = plain(numbers).to(torch.float64, copy=True)
            self.found[name] = Sketch(kind, 1, vector[:, None], vector.abs(), None, None)
        else:
            passed = self._passed(numbers, kind in self.by_block)
            of_scales = _half_steps(value, len(passed[0])), _scales(value)
            self.found[name] = Sketch(kind, numbers.shape[1], *passed, *of_scales)

    def of(self, name: str) -> Sketch | None:
        """One tensor's; an output projection that is tied is the embedding."""
        return self.found.get(name) or (self.found.get(EMBEDDINGS[0]) if name == EMBEDDINGS[1] else None)

    def _passed(
        self, matrix: Tensor | Packed, by_block: bool
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """In chunks of rows, always copied, so that equal rows give equal bits wherever they lie."""
        rows, columns = matrix.shape
        dtype = torch.float64 if self.wide else torch.float32
        padded = -(-columns // BLOCK) * BLOCK
        step = min(max(1, _CHUNK // padded), rows)
        held = self._buffer(step, padded, dtype)
        held[:, columns:] = 0
        vectors = self._projections(padded, dtype)
        out, norms = torch.empty(rows, self.projections, dtype=dtype), torch.empty(rows, dtype=dtype)
        blocks = torch.empty(rows, 3, dtype=dtype) if by_block else None
        for at in range(0, rows, step):
            count = min(step, rows - at)
            part = held[:count]
            part[:, :columns] = plain(take_rows(matrix, slice(at, at + count)))
            out[at : at + count] = (vectors @ part.t()).t()
            norms[at : at + count] = torch.linalg.vector_norm(part, dim=1)
            if blocks is not None:
                blocks[at : at + count] = _by_block(part)
        if blocks is None:
            return out, norms, None, None
        return out, norms, blocks[:, 0], blocks[:, 1:]

    def _buffer(self, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """The same memory for every tensor: freed and taken again between what is kept, it would grow."""
        if self._held.numel() < rows * columns:
            self._held = torch.empty(max(_CHUNK, columns), dtype=dtype)
        return self._held[: rows * columns].view(rows, columns)

    def _projections(self, columns: int, dtype: torch.dtype) -> Tensor:
        """(K, C): normal, since vectors of signs miss an exchange of two columns that share their signs."""
        if columns not in self._vectors:
            generator = torch.Generator().manual_seed(0)
            drawn = torch.randn(columns, self.projections, generator=generator, dtype=torch.float64)
            self._vectors[columns] = (drawn.t() / math.sqrt(self.projections)).to(dtype).contiguous()
        return self._vectors[columns]


def take_rows(matrix: Tensor | Packed, index: Tensor | slice) -> Tensor | Packed:
    """Rows of a tensor, packed where it is packed."""
    if not isinstance(matrix, Packed):
        return matrix[index]
    data = matrix.data[index]
    scales = None if matrix.scales is None else matrix.scales[index]
    return replace(matrix, data=data, scales=scales, shape=(len(data), *matrix.shape[1:]))


def _half_steps(value: Tensor | Packed, rows: int) -> Tensor | None:
    """See `Sketch.steps`, of the first rows."""
    return half_steps(value)[:rows] if isinstance(value, Packed) and value.scheme in CODED else None


def _scales(value: Tensor | Packed) -> tuple[int, str] | None:
    """See `Sketch.scales`."""
    if not isinstance(value, Packed) or value.scales is None:
        return None
    return value.scales.shape[1], str(value.scales.dtype).removeprefix("torch.")


def _by_block(held: Tensor) -> Tensor:
    """Of rows (R, C) the sums of `Sketch.largest` and `Sketch.ends`: (R, 3).

    With b bits and a step of the largest magnitude / 2^(b-1), the other end has room for one step less: what
    lies beyond is cut to it.
    """
    blocks = held.view(len(held), -1, BLOCK)
    high, low = blocks.amax(-1), blocks.amin(-1)
    largest = torch.maximum(high, -low)
    other = torch.minimum(high, -low)  # below zero where all have one sign
    cut = [torch.maximum(largest / (2 * n), other - largest * (n - 1) / n) for n in (8, 16)]
    return torch.stack([torch.linalg.vector_norm(each, dim=1) for each in (largest, *cut)], dim=1)
