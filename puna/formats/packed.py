"""Low-bit matrices as files hold them, packed and expanded.

GGUF's schemes keep blocks of 32 or 256 weights of a row with their scales in one run of bytes; the `gguf`
package makes them, and blocks.py expands them. "int8" is llama2.c's: whole numbers, a float32 scale for each
group of a row.
"""

from __future__ import annotations

from collections.abc import Iterator

import gguf
import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import quantize
from torch import Tensor

from puna.formats.blocks import SCALES, expand
from puna.model.weights import Packed, Weights

BLOCKS = {
    name: gguf.GGMLQuantizationType[name.upper()]
    for name in ("q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "q4_k", "q5_k", "q6_k")
}
WRITABLE = ("q8_0", "q4_0", "q4_1", "q5_0", "q5_1")  # the package expands the others, and does not make them
INT8 = "int8"
_CHUNK = 1 << 22  # weights packed at once, so that a large matrix needs no more than itself
_EXPANDED = 1 << 19  # weights expanded at once: what lies between stays in the caches


def block_sizes(scheme: str) -> tuple[int, int]:
    """Weights and bytes of one block of a GGUF scheme."""
    return GGML_QUANT_SIZES[BLOCKS[scheme]]


def unpack(packed: Packed) -> Tensor:
    """The matrix in float32."""
    if packed.scheme == INT8:
        assert packed.scales is not None
        groups = packed.data.unflatten(-1, (packed.scales.shape[-1], -1))  # (rows, groups, size)
        return (groups * packed.scales[..., None]).flatten(-2).view(packed.shape)
    numbers, size = block_sizes(packed.scheme)
    blocks = packed.data.reshape(-1, size)
    out = torch.empty(blocks.shape[0], numbers)
    for at in range(0, len(blocks), _EXPANDED // numbers):
        part = slice(at, at + _EXPANDED // numbers)
        out[part] = expand(packed.scheme, blocks[part])
    return out.view(packed.shape)


def pack(tensor: Tensor, scheme: str) -> Packed:
    """A matrix (rows, columns) in one of the WRITABLE schemes; columns must be a multiple of its block."""
    rows, columns = tensor.shape
    weights, size = block_sizes(scheme)
    data = torch.empty(rows, columns // weights * size, dtype=torch.uint8)
    step = max(1, _CHUNK // columns)
    for at in range(0, rows, step):
        part = quantize(tensor[at : at + step].float().numpy(), BLOCKS[scheme])
        data[at : at + step] = torch.from_numpy(np.ascontiguousarray(part))
    return Packed(scheme, data, None, (rows, columns))


def pack_int8(tensor: Tensor, group: int) -> Packed:
    """A matrix (rows, columns) as llama2.c's version 2 has it; columns must be a multiple of `group`.

    Symmetric: a group's scale is its largest magnitude / 127.
    """
    rows, columns = tensor.shape
    data, scales = torch.empty(rows, columns, dtype=torch.int8), torch.empty(rows, columns // group)
    step = max(1, _CHUNK // columns)
    for at in range(0, rows, step):
        groups = tensor[at : at + step].float().unflatten(-1, (-1, group))  # (step, groups, group)
        scales[at : at + step] = part = groups.abs().amax(dim=-1) / 127
        whole = groups / part.clamp_min(torch.finfo(torch.float32).tiny)[..., None]
        data[at : at + step] = whole.round().flatten(-2)
    return Packed(INT8, data, scales, (rows, columns))


def scales_are_finite(packed: Packed) -> bool:
    """Whether no block expands to NaN or infinite numbers; without expanding it."""
    if packed.scales is not None:
        return bool(torch.isfinite(packed.scales).all())
    _, size = block_sizes(packed.scheme)
    blocks = packed.data.view(-1, size)
    return all(
        bool(torch.isfinite(blocks[:, at : at + 2].contiguous().view(torch.float16)).all())
        for at in SCALES[packed.scheme]
    )


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
