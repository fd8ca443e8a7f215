"""The names that the first Yi models gave to the two norms of a layer, read as Llama's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from puna.formats.tensor_files import Opened, TensorFile
from puna.model.weights import Packed

_NORMS = {".ln1.weight": ".input_layernorm.weight", ".ln2.weight": ".post_attention_layernorm.weight"}


def as_llama(opened: Opened) -> Opened:
    """The same files, with Llama's names; those that have them already are left as they are."""

    @contextmanager
    def renamed(file: Path) -> Iterator[TensorFile]:
        with opened(file) as inner:
            yield _Renamed(inner)

    return renamed


class _Renamed:
    def __init__(self, file: TensorFile) -> None:
        self._file = file
        self._stored = {_llamas(name): name for name, _, _ in file.entries()}

    def entries(self) -> Iterator[tuple[str, str, tuple[int, ...]]]:
        """Name, type and shape of every tensor."""
        for name, kind, shape in self._file.entries():
            yield _llamas(name), kind, shape

    def tensor(self, name: str) -> Tensor | Packed:
        """The tensor that the file holds under this name or Yi's."""
        return self._file.tensor(self._stored[name])


def _llamas(name: str) -> str:
    for theirs, ours in _NORMS.items():
        if name.endswith(theirs):
            return name.removesuffix(theirs) + ours
    return name
