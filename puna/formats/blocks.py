"""GGUF's blocks of low-bit weights, expanded: the bits that the `gguf` package gives, several times faster.

A block is a run of bytes with 32 weights (256 in the K schemes) and their scales; `n` counts blocks. Products
are formed in float32, in the order of the package, so that results are equal to the bit.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

SCALES = {  # where the bytes of a block hold float16 numbers
    "q8_0": (0,),
    "q4_0": (0,),
    "q4_1": (0, 2),
    "q5_0": (0,),
    "q5_1": (0, 2),
    "q4_k": (0, 2),
    "q5_k": (0, 2),
    "q6_k": (208,),
}
_SUBBLOCKS = 8  # of 32 weights each in a block of 256


def expand(scheme: str, blocks: Tensor) -> Tensor:
    """Blocks (n, bytes), uint8, as weights (n, 32) or (n, 256) in float32."""
    return _EXPAND[scheme](blocks)


def _q8_0(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * blocks[:, 2:].view(torch.int8)


def _q4_0(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * (_nibbles(blocks[:, 2:]).view(torch.int8) - 8)


def _q4_1(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * _nibbles(blocks[:, 4:]) + _half(blocks, 2)


def _q5_0(blocks: Tensor) -> Tensor:
    fifth = _bits(blocks[:, 2:6]) << 4
    return _half(blocks, 0) * ((_nibbles(blocks[:, 6:]) | fifth).view(torch.int8) - 16)


def _q5_1(blocks: Tensor) -> Tensor:
    fifth = _bits(blocks[:, 4:8]) << 4
    return _half(blocks, 0) * (_nibbles(blocks[:, 8:]) | fifth) + _half(blocks, 2)


def _q4_k(blocks: Tensor) -> Tensor:
    return _scaled(blocks, _nibbles(blocks[:, 16:].unflatten(1, (4, 32))))


def _q5_k(blocks: Tensor) -> Tensor:
    low = _nibbles(blocks[:, 48:].unflatten(1, (4, 32)))  # (n, 4, 64)
    fifth = _shifted(blocks[:, 16:48], 1, _SUBBLOCKS) & 1  # (n, 8, 32)
    return _scaled(blocks, low.view(-1, _SUBBLOCKS, 32) | fifth << 4)


def _q6_k(blocks: Tensor) -> Tensor:
    low = _nibbles(blocks[:, :128].unflatten(1, (2, 64)))  # (n, 2, 128)
    high = _shifted(blocks[:, 128:192].unflatten(1, (2, 32)), 2, 4) & 3  # (n, 2, 4, 32)
    whole = (low.view(-1, 16, 16) | high.reshape(-1, 16, 16) << 4).view(torch.int8) - 32
    scales = _half(blocks, 208) * blocks[:, 192:208].view(torch.int8)  # (n, 16)
    return (scales[..., None] * whole).flatten(1)


def _scaled(blocks: Tensor, whole: Tensor) -> Tensor:
    """Each of eight sub-blocks has a scale and a minimum of six bits, packed into twelve bytes."""
    low, middle, rest = blocks[:, 4:16].split(4, dim=1)  # (n, 4) each
    scales = torch.cat((low & 63, (rest & 15) | (low >> 2) & 48), dim=1)  # (n, 8)
    minima = torch.cat((middle & 63, (rest >> 4) | (middle >> 2) & 48), dim=1)
    scales, minima = _half(blocks, 0) * scales, _half(blocks, 2) * minima
    out = scales[..., None] * whole.view(-1, _SUBBLOCKS, 32)
    return out.sub_(minima[..., None]).flatten(1)


def _half(blocks: Tensor, at: int) -> Tensor:
    """The float16 at a place of every block: (n, 1) in float32."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def _nibbles(packed: Tensor) -> Tensor:
    """The low halves of bytes (…, k), then the high ones: (…, 2k)."""
    return torch.cat((packed & 15, packed >> 4), dim=-1)


def _bits(packed: Tensor) -> Tensor:
    """Every bit of bytes (n, k), lowest first: (n, 8k)."""
    places = torch.arange(8, dtype=torch.uint8)
    return (packed[..., None] >> places & 1).flatten(1)


def _shifted(packed: Tensor, step: int, count: int) -> Tensor:
    """Bytes (…, k), moved down by 0, 1, … steps of bits: (…, count, k)."""
    places = torch.arange(0, step * count, step, dtype=torch.uint8)
    return packed[..., None, :] >> places[:, None]


_EXPAND: dict[str, Callable[[Tensor], Tensor]] = {
    "q8_0": _q8_0,
    "q4_0": _q4_0,
    "q4_1": _q4_1,
    "q5_0": _q5_0,
    "q5_1": _q5_1,
    "q4_k": _q4_k,
    "q5_k": _q5_k,
    "q6_k": _q6_k,
}
