"""Tensors into an archive that torch.load opens, one tensor in memory at a time.

torch.save wants everything at once. An archive is an uncompressed zip file with a record for the bytes of
every tensor, and a pickle that names them; the pickle is written last, when all types are known. The same
tensors give the same bytes.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from puna.formats.archives.torch_pickle import STORAGES
from puna.formats.huggingface.safetensors_layout import payload

_ALIGNMENT = 64  # of every record, as torch has it, so that mapped tensors are read in whole cache lines
_LOCAL_HEADER, _WIDE_FIELD = 30, 20  # bytes of a zip file: before a record's name, and for sizes beyond 4 GiB
_WIDE = 1 << 31
_ROOT = "archive"
_MOMENT = (1980, 1, 1, 0, 0, 0)  # zip's earliest
_KINDS = {dtype: getattr(torch, name.removeprefix("torch.")) for name, dtype in STORAGES.items()}


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: torch.dtype
    numel: int


@dataclass(frozen=True)
class Stored:
    """Stands for a tensor that is written already; one that is given under two names is stored once."""

    storage: _Storage
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class TorchWriter:
    """A new archive; what `add` returns stands for the tensors in the value given to `finish`.

    Raises:
        OSError: as it comes; the file is then incomplete.
    """

    def __init__(self, path: Path) -> None:
        self._zip = zipfile.ZipFile(path, "w", zipfile.ZIP_STORED)
        self._count = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._zip.close()

    def add(self, tensor: Tensor) -> Stored:
        """Write a tensor's bytes, row by row."""
        key = str(self._count)
        self._count += 1
        self._record(f"data/{key}", payload(tensor))
        storage = _Storage(key, tensor.dtype, tensor.numel())
        return Stored(storage, tuple(tensor.shape), _strides(tensor.shape))

    def finish(self, value: Any) -> None:
        """Write what the archive holds: dictionaries, lists, plain values, and what `add` returned."""
        self._record("data.pkl", memoryview(_pickled(value)))
        self._record("byteorder", memoryview(b"little"))
        self._record("version", memoryview(b"3\n"))

    def _record(self, name: str, data: memoryview) -> None:
        entry = zipfile.ZipInfo(f"{_ROOT}/{name}", _MOMENT)
        entry.file_size = data.nbytes
        wide = data.nbytes >= _WIDE
        begin = self._zip.start_dir + _LOCAL_HEADER + len(entry.filename) + wide * _WIDE_FIELD
        entry.extra = _padding(begin)
        with self._zip.open(entry, "w", force_zip64=wide) as record:
            record.write(data)


def _padding(begin: int) -> bytes:
    """A zip field, named as torch does, after which the record begins aligned."""
    size = -(begin + 4) % _ALIGNMENT
    return b"FB" + size.to_bytes(2, "little") + b"Z" * size


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return torch.empty(shape, device="meta").stride()


def _pickled(value: Any) -> bytes:
    buffer = io.BytesIO()
    pickler = pickle.Pickler(buffer, protocol=2)
    pickler.persistent_id = _identity  # type: ignore[method-assign]
    pickler.dispatch_table = {Stored: _tensor}
    pickler.dump(value)
    return buffer.getvalue()


def _identity(value: Any) -> tuple[Any, ...] | None:
    if not isinstance(value, _Storage):
        return None
    return "storage", _KINDS[value.dtype], value.key, "cpu", value.numel


def _tensor(stored: Stored) -> tuple[Callable[..., Tensor], tuple[Any, ...]]:
    arguments: tuple[Any, ...] = (stored.storage, 0, stored.shape, stored.strides, False, OrderedDict())
    return torch._utils._rebuild_tensor_v2, arguments
