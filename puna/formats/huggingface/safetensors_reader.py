"""Tensors out of safetensors files, mapped into memory: what is not asked for is never read.

The library checks every header against the size of its file before anything is allocated. A tensor read is a
view of the mapped file: it costs memory only where it is converted or written to.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from puna.errors import ModelError
from puna.formats.tensor_files import Kind

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class SafetensorsFile:
    """An open file of tensors by name."""

    def __init__(self, library: Any) -> None:
        self._library = library

    def entries(self) -> Iterator[tuple[str, str, tuple[int, ...]]]:
        """Name, stored type and shape of every tensor, from the header."""
        for name in self._library.keys():  # noqa: SIM118  # not a dict
            view = self._library.get_slice(name)
            code = view.get_dtype()
            kind = str(DTYPES[code]).removeprefix("torch.") if code in DTYPES else code
            yield name, kind, tuple(view.get_shape())

    def tensor(self, name: str) -> Tensor:
        """A view of the mapped file."""
        return self._library.get_tensor(name)


@contextmanager
def opened(file: Path) -> Iterator[SafetensorsFile]:
    """A file, open.

    Raises:
        ModelError: it is damaged, or cannot be read.
    """
    with _open(file) as library:
        yield SafetensorsFile(library)


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise ModelError(
            f"{file}: damaged or cut short ({file.stat().st_size} bytes: {error}); copy or download it again"
        ) from None
    except OSError as error:
        raise ModelError(f"{file}: cannot be read: {error.strerror or error}") from None


SAFETENSORS = Kind(SINGLE, INDEX, opened)
