"""The bytes of a safetensors file: the header's length (8, little-endian), the header in JSON, the tensors.

The library writes to memory or to a path at once: then a file can be neither hashed on its way nor streamed,
and it hides why a write failed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

# How the format names the number types; widest first, so that every tensor lies at a multiple of its width.
CODES = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int16: "I16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_RANK = {dtype: rank for rank, dtype in enumerate(CODES)}
CHUNK = 1 << 20  # bytes at a time: what is hashed on its way is still in the processor's cache
_ALIGNMENT = 8  # of the first tensor, where nothing else is asked


def payload(tensor: Tensor) -> memoryview:
    """The bytes of a tensor as files hold them: row by row, little-endian as every machine torch runs on."""
    flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return memoryview(flat)  # type: ignore[arg-type]  # an array is a buffer from Python 3.12's types on


def entry(code: str, shape: tuple[int, ...], begin: int, end: int) -> dict[str, Any]:
    """What the header says of a tensor whose bytes lie between two places behind the header."""
    return {"dtype": code, "shape": list(shape), "data_offsets": [begin, end]}


def header(entries: Mapping[str, Any], room: int | None = None) -> bytes:
    """The header with its length before it, padded with spaces to `room` bytes, or to a multiple of eight."""
    text = json.dumps(entries, separators=(",", ":")).encode()
    room = len(text) + -len(text) % _ALIGNMENT if room is None else room
    assert len(text) <= room
    return room.to_bytes(8, "little") + text.ljust(room)


def chunks(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Iterator[memoryview | bytes]:
    """A whole file, piece by piece, the widest tensors first; one at a time leaves its device."""
    in_order = dict(sorted(tensors.items(), key=lambda item: _RANK[item[1].dtype]))
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, tensor in in_order.items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        entries[name] = entry(CODES[tensor.dtype], tensor.shape, begin, end)
    yield header(entries)
    for tensor in in_order.values():
        data = payload(tensor)
        yield from (data[at : at + CHUNK] for at in range(0, len(data), CHUNK))
