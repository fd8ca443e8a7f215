"""Files that are mapped and must not become shorter: who touches a page beyond their end is killed (SIGBUS).

They are looked at before each tensor, so that a copy begun over them, or a download begun anew, ends in one
line. What was handed out already is out of reach, as a whole layer is while it is quantized: there only a
copy of every tensor would help. Files that are replaced by a rename, as careful programs do, stay whole.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from puna.errors import ModelError
from puna.model.weights import Packed, Weights

_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".gguf")


@dataclass(frozen=True)
class Watched:
    """A model's tensors, as often as they are asked for, while its files are as long as they were."""

    weights: Weights
    found: tuple[tuple[Path, os.stat_result], ...]

    def __iter__(self) -> Iterator[tuple[str, Tensor | Packed]]:
        """Every tensor.

        Raises:
            ModelError: a file became shorter since the model was opened, or as the weights' own iteration.
        """
        coming = iter(self.weights)
        while True:
            self._check()
            try:
                yield next(coming)
            except StopIteration:
                return

    def _check(self) -> None:
        for file, before in self.found:
            with contextlib.suppress(FileNotFoundError):  # what is mapped stays until it is let go
                now = file.stat()
                if os.path.samestat(before, now) and now.st_size < before.st_size:
                    raise ModelError(
                        f"{file}: became shorter while it was read ({now.st_size:,} of its "
                        f"{before.st_size:,} bytes are left); copy or download it again"
                    )


def look_at(path: Path) -> tuple[tuple[Path, os.stat_result], ...]:
    """The files of a model that hold tensors, as they are now; to be asked before any is opened."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return tuple((file, file.stat()) for file in files if file.suffix in _SUFFIXES and file.is_file())
