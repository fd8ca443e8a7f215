"""Low-bit matrices as files hold them, packed and expanded.

GGUF's schemes keep blocks of 32 or 256 weights of a row with their scales in one run of bytes; the `gguf`
package makes them, and blocks.py expands them. "int8", "int4" and "nf4" have codes and scales apart, as
`puna.quantize.codes` tells; Q8_0 and Q4_0 are the same numbers in another order, and go there and back.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from puna.formats import blocks
from puna.model.weights import Packed, Weights
from puna.quantize import codes

# As `gguf.constants` has them: the package takes long to import, and a file is read without it.
BLOCKS = {"q8_0": 8, "q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q4_k": 12, "q5_k": 13, "q6_k": 14}
"""The numbers that GGUF's schemes have in files."""
_SIZES = {
    "q8_0": (32, 34),
    "q4_0": (32, 18),
    "q4_1": (32, 20),
    "q5_0": (32, 22),
    "q5_1": (32, 24),
    "q4_k": (256, 144),
    "q5_k": (256, 176),
    "q6_k": (256, 210),
}
WRITABLE = ("q8_0", "q4_0", "q4_1", "q5_0", "q5_1")  # the package expands the others, and does not make them
CODED = ("int8", "int4", "nf4")
"""Schemes with codes and scales apart."""
_MAGNITUDE, _INFINITE = 0x7FFF, 0x7C00  # of float16: all bits but the sign, and the least that is not finite
_CHUNK = 1 << 22  # weights packed at once, so that a large matrix needs no more than itself
_EXPANDED = 1 << 19  # weights expanded at once: what lies between stays in the caches


def block_sizes(scheme: str) -> tuple[int, int]:
    """Weights and bytes of one block of a GGUF scheme."""
    return _SIZES[scheme]


def unpack(packed: Packed) -> Tensor:
    """The matrix in float32."""
    if packed.scheme not in BLOCKS:
        return codes.expand(packed)
    numbers, size = block_sizes(packed.scheme)
    data = packed.data.reshape(-1, size)
    out = torch.empty(len(data), numbers)
    for at in range(0, len(data), _EXPANDED // numbers):
        part = slice(at, at + _EXPANDED // numbers)
        out[part] = blocks.expand(packed.scheme, data[part])
    return out.view(packed.shape)


def canonical(packed: Packed) -> Packed | None:
    """The same numbers with codes and scales apart: Q8_0 as int8, Q4_0 as int4; None of other blocks.

    Nothing is rounded, and what has that form already is given back.
    """
    if packed.scheme not in BLOCKS:
        return packed
    return blocks.apart(packed) if packed.scheme in blocks.APART else None


def in_blocks(packed: Packed) -> Packed | None:
    """The inverse: int8 as Q8_0, int4 as Q4_0, bit for bit; None where no such blocks hold these numbers.

    They hold float16 scales of 32 weights each; a scale of more weights is repeated.
    """
    form = canonical(packed)
    if form is None or form.scheme not in blocks.TOGETHER or form.shape[1] % blocks.SIZE:
        return None
    finer = in_groups_of(form, blocks.SIZE)
    return None if finer is None else blocks.together(finer)


def in_groups_of(packed: Packed, group: int) -> Packed | None:
    """Codes with each scale repeated, so that it is of `group` weights; None where it is of fewer."""
    assert packed.scales is not None
    size = packed.shape[1] // packed.scales.shape[1]
    if size % group:
        return None
    return replace(packed, scales=packed.scales.repeat_interleave(size // group, dim=1))


def half_steps(packed: Packed) -> Tensor:
    """Of each row of codes the root of the sum over its weights of half a step, squared: (rows,) in float64.

    No weight is rounded to nearest by more; the levels of nf4 are 0.3 of a scale apart at most.
    """
    assert packed.scales is not None
    widest = (codes.NF4[1:] - codes.NF4[:-1]).max().item() if packed.scheme == "nf4" else 1.0
    size = packed.shape[1] // packed.scales.shape[1]
    return torch.linalg.vector_norm(packed.scales.double(), dim=1) * (math.sqrt(size) * widest / 2)


def described(packed: Packed) -> str:
    """In words: "int8 per channel with float32 scales"."""
    if packed.scales is None:
        return packed.scheme
    kind = str(packed.scales.dtype).removeprefix("torch.")
    return in_words(packed.scheme, packed.shape[1], packed.scales.shape[1], kind)


def in_words(scheme: str, columns: int, groups: int, scales: str) -> str:
    """The same of a matrix that is not at hand."""
    parts = "blocks" if scheme == "nf4" else "groups"
    where = "per channel" if groups == 1 and scheme != "nf4" else f"in {parts} of {columns // groups}"
    return f"{scheme} {where} with {scales} scales"


def pack(tensor: Tensor, scheme: str) -> Packed:
    """A matrix (rows, columns) in one of the WRITABLE schemes; columns must be a multiple of its block."""
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    rows, columns = tensor.shape
    weights, size = block_sizes(scheme)
    data = torch.empty(rows, columns // weights * size, dtype=torch.uint8)
    step = max(1, _CHUNK // columns)
    for at in range(0, rows, step):
        part = quantize(tensor[at : at + step].float().numpy(), GGMLQuantizationType(BLOCKS[scheme]))
        data[at : at + step] = torch.from_numpy(np.ascontiguousarray(part))
    return Packed(scheme, data, None, (rows, columns))


def scales_are_finite(packed: Packed) -> bool:
    """Whether no block expands to NaN or infinite numbers; without expanding it."""
    if packed.scales is not None:
        return bool(torch.isfinite(packed.scales).all())
    _, size = block_sizes(packed.scheme)
    halves = packed.data.view(torch.int16).view(-1, size // 2)  # blocks are of even sizes
    largest = (_largest(halves[:, at // 2] & _MAGNITUDE) for at in blocks.SCALES[packed.scheme])
    return all(each < _INFINITE for each in largest)


def _largest(numbers: Tensor) -> int:
    return int(numbers.max()) if numbers.numel() else 0


def same_numbers(first: Tensor | Packed, second: Tensor | Packed) -> bool:
    """Whether two matrices of one shape are equal; in codes and scales, where both are packed."""
    if not isinstance(first, Packed) or not isinstance(second, Packed):
        return torch.equal(plain(first), plain(second))
    if first.scheme != second.scheme or first.scales is None or second.scales is None:
        return first.scheme == second.scheme and torch.equal(first.data, second.data)
    return torch.equal(first.data, second.data) and torch.equal(first.scales, second.scales)


def plain(value: Tensor | Packed) -> Tensor:
    """The numbers themselves."""
    return unpack(value) if isinstance(value, Packed) else value


def expanded(weights: Weights) -> Weights:
    """The same weights with no tensor packed; each is expanded when it is read."""
    return Weights(weights.config, _Expanded(weights))


class _Expanded:
    """Iterable as often as the weights are."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, value in self._weights:
            yield name, plain(value)
