"""GGUF's blocks of low-bit weights, expanded: the bits that the `gguf` package gives, several times faster.

Q8_0 and Q4_0 are whole numbers with a float16 scale, as int8 and int4 of `puna.quantize.codes` are; they are
taken apart into these, and put together again, without going through floating point.

A block is a run of bytes with 32 weights (256 in the K schemes) and their scales; `n` counts blocks. Products
are formed in float32, in the order of the package, so that results are equal to the bit.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from puna.model.weights import Packed
from puna.quantize.codes import row_parts

SIZE = 32  # weights of a block of q8_0 and q4_0
APART = {"q8_0": "int8", "q4_0": "int4"}
TOGETHER = {scheme: name for name, scheme in APART.items()}
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


def apart(packed: Packed) -> Packed:
    """Blocks of q8_0 or q4_0 as int8 or int4 in groups of 32, float16 scales; a copy."""
    blocks = packed.data.unflatten(1, (packed.shape[1] // SIZE, -1))  # (rows, groups, 34 or 18)
    scales = blocks[..., :2].contiguous().view(torch.float16)[..., 0]
    bytes_ = torch.empty(*blocks.shape[:2], blocks.shape[2] - 2, dtype=torch.uint8)
    for part in row_parts(packed.shape):
        found = blocks[part, :, 2:]
        bytes_[part] = found if packed.scheme == "q8_0" else _neighbours(_aligned(found))
    data = bytes_.flatten(1)
    data = data.view(torch.int8) if packed.scheme == "q8_0" else data
    return Packed(APART[packed.scheme], data, scales, packed.shape)


def together(packed: Packed) -> Packed | None:
    """The inverse, of scales in any type; None where one is no float16 number."""
    assert packed.scales is not None
    half = packed.scales.to(torch.float16)
    if not torch.equal(half.double(), packed.scales.double()):
        return None
    codes = packed.data.view(torch.uint8).unflatten(1, (packed.shape[1] // SIZE, -1))
    blocks = torch.empty(*codes.shape[:2], codes.shape[2] + 2, dtype=torch.uint8)
    blocks[..., :2] = half[..., None].view(torch.uint8)
    for part in row_parts(packed.shape):
        found = codes[part]
        blocks[part, :, 2:] = found if packed.scheme == "int8" else _halves(_aligned(found))
    return Packed(TOGETHER[packed.scheme], blocks.flatten(1), None, packed.shape)


def _aligned(bytes_: Tensor) -> Tensor:
    """A copy that can be viewed as whole words, wherever in a file the bytes began."""
    return bytes_.clone(memory_format=torch.contiguous_format)


def _neighbours(bytes_: Tensor) -> Tensor:
    """Bytes (…, 16) of weights j and j + 16 as bytes (…, 16) of weights 2j and 2j + 1.

    Eight bytes at once: of each two neighbours the low halves become one byte, the high halves another.
    """
    words = bytes_.view(torch.int64)  # (…, 2)
    first = _gathered((words & _LOW) | (words >> 4 & _HIGH))
    second = _gathered((words >> 4 & _LOW) | (words >> 8 & _HIGH))
    halves = [half[..., 0] | half[..., 1] << 32 for half in (first, second)]
    return torch.stack(halves, dim=-1).view(torch.uint8)


def _halves(bytes_: Tensor) -> Tensor:
    """Undo `_neighbours`."""
    words = bytes_.view(torch.int64)  # (…, 2): the first and the second half of the weights
    first, second = (_scattered(torch.stack([x, x >> 32], dim=-1)) for x in words.unbind(-1))
    low = (first & _LOW) | (first & _HIGH) << 4
    return (low | (second & _LOW) << 4 | (second & _HIGH) << 8).view(torch.uint8)


_LOW, _HIGH, _BYTES, _PAIRS, _WORD = (  # of every 16 bits: 4, 4 and 8 of them; of every 32: 16; of 64: 32
    *(0x000F000F000F000F, 0x00F000F000F000F0, 0x00FF00FF00FF00FF),
    *(0x0000FFFF0000FFFF, 0x00000000FFFFFFFF),
)


def _gathered(words: Tensor) -> Tensor:
    """The low byte of every 16 bits, next to each other in the low half of 64."""
    words = (words | words >> 8) & _PAIRS
    return (words | words >> 16) & _WORD


def _scattered(words: Tensor) -> Tensor:
    """Undo `_gathered`; the high half does not count."""
    words = words & _WORD
    words = (words | words << 16) & _PAIRS
    return (words | words << 8) & _BYTES


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
