"""What torch.save wrote, tensors as views of the mapped file; nothing in it is run.

An archive is an uncompressed zip file: `data.pkl` describes the tensors, and every `data/<key>` holds the
bytes of one storage. torch's own reader is not used: the file that it reads must be the one that was checked.
"""

from __future__ import annotations

import mmap
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from puna.errors import ModelError
from puna.formats.archives.torch_pickle import read_pickle
from puna.formats.archives.zip_directory import Member, members
from puna.formats.tensor_files import Kind

_PICKLE = 16 << 20  # bytes; the largest Llama's takes a fifth of a megabyte
_OLD = (
    b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.",
    b"\x80\x02}",
    b"\x80\x02c",
)  # before 1.6, or plain pickle
_TAR = (257, b"ustar")


def read_archive(path: Path) -> Any:
    """The value that was saved: dictionaries, lists, tuples, plain values, tensors over the mapped file.

    Raises:
        ModelError: no such archive, damaged, or it holds more than that.
    """
    try:
        with path.open("rb") as file:
            return _Archive(file).value()
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from None
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror or error}") from None


def recognises(path: Path) -> bool:
    """Whether a file begins as torch's archives do, those of today or of before 1.6."""
    try:
        with path.open("rb") as file:
            return file.read(20).startswith((b"PK\3\4", *_OLD))
    except OSError:
        return False


@dataclass(frozen=True)
class TensorDictionary:
    """The tensors of an archive by name, as `puna.formats.tensor_files` asks for them."""

    tensors: dict[str, Tensor]

    def entries(self) -> Iterator[tuple[str, str, tuple[int, ...]]]:
        """Name, type and shape of every tensor."""
        for name, tensor in self.tensors.items():
            yield name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)

    def tensor(self, name: str) -> Tensor:
        """A view of the mapped file."""
        return self.tensors[name]


def read_tensors(path: Path) -> TensorDictionary:
    """The content of an archive that holds tensors and nothing else.

    Raises:
        ModelError: as `read_archive`, or it holds something else.
    """
    value = read_archive(path)
    if not isinstance(value, dict) or not all(isinstance(item, Tensor) for item in value.values()):
        raise ModelError(
            f"{path}: expected a dictionary of tensors and nothing else; save model.state_dict() alone"
        )
    return TensorDictionary({str(name): tensor for name, tensor in value.items()})


@contextmanager
def opened(path: Path) -> Iterator[TensorDictionary]:
    """A file of tensors and nothing else."""
    yield read_tensors(path)


PYTORCH_BIN = Kind("pytorch_model.bin", "pytorch_model.bin.index.json", opened)


class _Archive:
    """An open file, mapped, and where its members lie."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._map = file, _mapped(file)
        self._root, self._members = self._list()
        self._storages: dict[str, Tensor] = {}

    def value(self) -> Any:
        """What data.pkl describes."""
        if self._small("byteorder", b"little") != b"little":
            raise ModelError("written on a big-endian machine; save it again on another")
        pickle = self._member("data.pkl")
        if pickle.size > _PICKLE:
            raise ModelError(f"data.pkl takes {pickle.size} bytes; no model needs more than {_PICKLE}")
        data = self._bytes(pickle)
        if zlib.crc32(data) != pickle.crc:
            raise ModelError("damaged: data.pkl is not what was written; copy or download it again")
        return read_pickle(data, self._storage)

    def _list(self) -> tuple[str, dict[str, Member]]:
        start = self._map[:512]
        if start.startswith(_OLD) or start[_TAR[0] :].startswith(_TAR[1]):
            raise ModelError("written by torch before 1.6; load it with torch and save it again")
        with memoryview(self._map) as view:
            found = members(view)
        roots = {name.partition("/")[0] for name in found}
        if len(roots) != 1:
            raise ModelError("a zip file, but not an archive of torch: expected one directory in it")
        return roots.pop(), found

    def _storage(self, key: str, dtype: torch.dtype, numel: int) -> Tensor:
        if key not in self._storages:
            member = self._member(f"data/{key}")
            if member.size != numel * dtype.itemsize:
                raise ModelError(
                    f"damaged: a storage of {numel} values of {dtype.itemsize} bytes in {member.size} bytes"
                )
            self._storages[key] = self._bytes_of(member).view(dtype)
        found = self._storages[key]
        if found.dtype != dtype or found.numel() != numel:
            raise ModelError("damaged: one storage is said to have two types or sizes")
        return found

    def _bytes_of(self, member: Member) -> Tensor:
        """A member's bytes, copied where they are written to: torch warns of memory it cannot write to."""
        if not member.size:
            return torch.empty(0, dtype=torch.uint8)
        # Each for itself: one private mapping of a file larger than memory may be refused.
        return torch.from_numpy(
            np.memmap(self._file, np.uint8, mode="c", offset=member.begin, shape=(member.size,))
        )

    def _member(self, name: str) -> Member:
        found = self._members.get(f"{self._root}/{name}")
        if found is None:
            raise ModelError(f"a zip file, but not an archive of torch: it has no {name[:80]!r}")
        return found

    def _small(self, name: str, default: bytes) -> bytes:
        found = self._members.get(f"{self._root}/{name}")
        return default if found is None or found.size > 100 else self._bytes(found)

    def _bytes(self, member: Member) -> bytes:
        return self._map[member.begin : member.begin + member.size]


def _mapped(file: BinaryIO) -> mmap.mmap:
    if not file.seek(0, os.SEEK_END):
        raise ModelError("an empty file")
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
