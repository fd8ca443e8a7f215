"""Tensors into safetensors files of a chosen size, one tensor in memory at a time.

The library's writer wants all tensors of a file at once. The header comes first and is known last, so its
room is reserved, from the names and shapes of the config.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from puna.formats.casting import stored
from puna.formats.content import Record
from puna.formats.huggingface.safetensors_layout import CODES, entry, header, payload
from puna.formats.huggingface.safetensors_reader import INDEX, SINGLE
from puna.formats.json_files import write_object
from puna.model.weights import Packed, Weights, shapes

_ALIGNMENT = 64  # of the first tensor's place in a file, so that mapped tensors are read in whole cache lines
_LARGEST = 10**15  # bytes; no offset has more digits
_ROOM_OF_PARTS = ("_packed", "_scale", "_shape", ".quant_state.bitsandbytes__nf4")  # at most so long, so many

Parts = Callable[[str, Packed], Iterator[tuple[str, Tensor]]]
"""The tensors that a packed one is stored as, by name."""


def write_tensors(
    directory: Path, weights: Weights, dtype: str | None, shard_bytes: int, record: Record, parts: Parts
) -> None:
    """Write model.safetensors, or shards of at most `shard_bytes` and their index.

    A tensor larger than `shard_bytes` gets a shard of its own. `dtype` None keeps every tensor's type.

    Raises:
        ModelError: a tensor is missing, does not fit into `dtype`, or cannot be stored.
        OSError: as it comes; the directory is then incomplete.
    """
    place: dict[str, int] = {}
    with closing(_Shards(directory, _header_room(weights), shard_bytes)) as shards:
        for name, value in stored(weights, lambda name, shape: dtype):
            record(name, value)
            for part, tensor in parts(name, value) if isinstance(value, Packed) else [(name, value)]:
                place[part] = shards.add(part, tensor)
    _name_shards(directory, place, shards.total_bytes)


class _Shards:
    """Files shard-0, shard-1, …, the next begun where a tensor would make the last one too large."""

    def __init__(self, directory: Path, header_room: int, limit: int) -> None:
        self._directory, self._room, self._limit = directory, header_room, limit
        self._file: BinaryIO | None = None
        self._header: dict[str, Any] = {}
        self._number, self._filled, self.total_bytes = -1, 0, 0

    def add(self, name: str, tensor: Tensor) -> int:
        """Append a tensor; the number of the file it went to."""
        data = payload(tensor)
        if self._file is None or (self._filled and self._filled + len(data) > self._limit):
            self.close()
            self._begin()
        assert self._file is not None
        self._file.write(data)
        begin, self._filled = self._filled, self._filled + len(data)
        self.total_bytes += len(data)
        self._header[name] = entry(CODES[tensor.dtype], tensor.shape, begin, self._filled)
        return self._number

    def close(self) -> None:
        """Write the header of the file at hand."""
        if self._file is None:
            return
        with self._file as file:
            self._file = None
            file.seek(0)
            file.write(header(self._header, self._room))

    def _begin(self) -> None:
        self._number += 1
        self._filled, self._header = 0, {"__metadata__": {"format": "pt"}}  # transformers asks for this
        self._file = (self._directory / f"shard-{self._number}").open("wb")
        self._file.seek(8 + self._room)


def _header_room(weights: Weights) -> int:
    """Bytes that the header of any one file needs at most, such that tensors begin aligned."""
    entries = {
        f"{name}{part}": entry("BF16", shape, _LARGEST, _LARGEST)
        for name, shape in shapes(weights.config).items()
        for part in ([""] if len(shape) == 1 else _ROOM_OF_PARTS)
    }
    entries["__metadata__"] = {"format": "pt"}
    needed = len(header(entries))
    return -(-needed // _ALIGNMENT) * _ALIGNMENT - 8


def _name_shards(directory: Path, place: dict[str, int], total_bytes: int) -> None:
    """Give the files their names, which hold how many there are."""
    count = max(place.values()) + 1
    if count == 1:
        (directory / "shard-0").rename(directory / SINGLE)
        return
    names = [f"model-{number + 1:05d}-of-{count:05d}.safetensors" for number in range(count)]
    for number, name in enumerate(names):
        (directory / f"shard-{number}").rename(directory / name)
    table = {name: names[number] for name, number in place.items()}
    write_object(directory / INDEX, {"metadata": {"total_size": total_bytes}, "weight_map": table})
