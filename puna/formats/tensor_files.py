"""A model's tensors over one file or several of any kind, checked against the config before any is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from puna.devices import DTYPES
from puna.errors import ModelError, nearest
from puna.formats.casting import all_finite
from puna.formats.json_files import read_object
from puna.formats.packed import CODED, same_numbers
from puna.model.config import ModelConfig
from puna.model.weights import Packed, shapes

_DERIVED = ".rotary_emb.inv_freq"  # a buffer that old files carry: the config determines it
_LAYER = "model.layers."


class TensorFile(Protocol):
    """An open file of tensors by name."""

    def entries(self) -> Iterable[tuple[str, str, tuple[int, ...]]]:
        """Name, type and shape of every tensor; a type of DTYPES or CODED, or what the file calls it."""

    def tensor(self, name: str) -> Tensor | Packed:
        """One tensor, a view of the mapped file where that is possible."""


Opened = Callable[[Path], AbstractContextManager[TensorFile]]
"""Opens a file of tensors; raises ModelError where it is damaged."""


class TensorFiles:
    """The tensors of a model by name; iteration reads them in the model's order.

    Args:
        files: all of them.
        config: what they must fit.
        origin: what is named where no single file is at fault.
        opened: how to open one.
        by: the file that the config was read from.

    Raises:
        ModelError: a file is missing or damaged; or a name, shape or type is not what the config asks for.
    """

    def __init__(
        self,
        files: Sequence[Path],
        config: ModelConfig,
        origin: Path,
        opened: Opened,
        by: str = "config.json",
    ) -> None:
        self._origin, self._opened, self._by = origin, opened, by
        self._place: dict[str, Path] = {}
        self._kinds: dict[str, str] = {}
        found: dict[str, tuple[int, ...]] = {}
        for file in files:
            with opened(file) as reader:
                for name, kind, shape in reader.entries():
                    self._note(file, name, kind)
                    found[name] = shape
        self.config = self._untied_if_so(config, found)
        self._expected = self._check(found)

    @property
    def dtype(self) -> torch.dtype:
        """The type that most tensors of plain numbers are stored in."""
        plain = {kind: count for kind, count in self.stored.items() if kind in DTYPES}
        return DTYPES[max(plain, key=plain.__getitem__)] if plain else torch.float32

    @property
    def stored(self) -> dict[str, int]:
        """How many tensors are stored in each type, by name."""
        return dict(Counter(self._kinds[name] for name in self._expected))

    def __iter__(self) -> Iterator[tuple[str, Tensor | Packed]]:
        """Every tensor of the model.

        Raises:
            ModelError: a tensor holds NaN or infinite values.
        """
        with ExitStack() as stack:
            readers: dict[Path, TensorFile] = {}
            for name in self._expected:
                file = self._place[name]
                if file not in readers:
                    readers[file] = stack.enter_context(self._opened(file))
                tensor = readers[file].tensor(name)
                if not all_finite(tensor):
                    raise ModelError(
                        f"{file}: {name} holds NaN or infinite values: a damaged file, or training diverged"
                    )
                yield name, tensor

    def _note(self, file: Path, name: str, kind: str) -> None:
        if name in self._place:
            raise ModelError(
                f"{self._origin}: {shown(name)} is both in {self._place[name].name} and {file.name}"
            )
        self._place[name] = file
        if name.endswith(_DERIVED):
            return
        if kind not in DTYPES and kind not in CODED:
            raise ModelError(
                f"{file}: {shown(name)} is stored as {kind}; expected one of {', '.join(DTYPES)}"
            )
        self._kinds[name] = kind

    def _check(self, found: dict[str, tuple[int, ...]]) -> list[str]:
        """The names to read, in the model's order, once it is sure that all fit."""
        layers = {name.removeprefix(_LAYER).split(".")[0] for name in found if name.startswith(_LAYER)}
        if len(layers) != self.config.num_hidden_layers:  # asked first: it bounds what `shapes` has to list
            raise ModelError(
                f"{self._origin}: expected {self.config.num_hidden_layers} layers by {self._by}, found "
                f"tensors of {len(layers)}"
            )
        expected = shapes(self.config)
        unknown = [name for name in found if name not in expected and not self._ignorable(name)]
        if unknown:
            raise ModelError(
                f"{self._origin}: {listed(unknown)} not part of a model of this config."
                + nearest(unknown[0], expected)
            )
        missing = [name for name in expected if name not in found]
        if missing:
            raise ModelError(f"{self._origin}: {listed(missing)} missing from the weights")
        for name, shape in expected.items():
            if found[name] != shape:
                raise ModelError(
                    f"{self._place[name]}: {name} has shape {list(found[name])}, "
                    f"expected {list(shape)} by {self._by}"
                )
        return list(expected)

    def _ignorable(self, name: str) -> bool:
        return name.endswith(_DERIVED) or (name == "lm_head.weight" and self.config.tie_word_embeddings)

    def _untied_if_so(self, config: ModelConfig, found: dict[str, tuple[int, ...]]) -> ModelConfig:
        """The config, untied where the files hold an output projection that differs from the embedding.

        Some published configs say tied of weights that are not; transformers believes the weights as well.
        """
        pair = ("lm_head.weight", "model.embed_tokens.weight")
        if not config.tie_word_embeddings or not all(name in found for name in pair):
            return config
        with self._opened(self._place[pair[0]]) as one, self._opened(self._place[pair[1]]) as other:
            head, embedding = one.tensor(pair[0]), other.tensor(pair[1])
            if head.shape == embedding.shape and same_numbers(head, embedding):
                return config
        return config.model_copy(update={"tie_word_embeddings": False})


@dataclass(frozen=True)
class Kind:
    """One way to keep a model's tensors in a directory: a single file, or shards and their index."""

    single: str
    index: str
    opened: Opened

    @property
    def pattern(self) -> str:
        """Matches every such file."""
        return "*" + Path(self.single).suffix


def find(directory: Path, kinds: Sequence[Kind]) -> tuple[list[Path], Kind]:
    """The files of a model directory, those its index names or the single one, of the first kind there.

    Raises:
        ModelError: there are none, shards are missing, or the index is damaged.
    """
    for kind in kinds:
        single, index = directory / kind.single, directory / kind.index
        if index.is_file():
            return _shards(directory, read_object(index).get("weight_map"), index), kind
        if single.is_file():
            return [single], kind
    for kind in kinds:
        stem = Path(kind.single).stem
        found = sorted(path.name for path in directory.glob(kind.pattern) if path.name.startswith(stem))
        if found:
            raise ModelError(
                f"{directory}: {found[0]} needs {kind.index} beside it, which is missing; copy it too"
            )
    expected = ", ".join(f"{kind.single} or {kind.index}" for kind in kinds)
    raise ModelError(f"{directory}: holds config.json but no weights; expected {expected}")


def shown(name: str) -> str:
    """A name from a file, in one line and not without end."""
    return name if name.isprintable() and len(name) <= 200 else repr(name[:200])


def listed(names: Sequence[str]) -> str:
    """The first of several names, for a sentence: "a, b are"."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"{', '.join(map(shown, names[:5]))}{more} {'is' if len(names) == 1 else 'are'}"


def _shards(directory: Path, table: Any, index: Path) -> list[Path]:
    if not isinstance(table, dict) or not table or not all(isinstance(name, str) for name in table.values()):
        raise ModelError(f"{index}: expected a weight_map of tensor names to file names")
    names = sorted(set(table.values()))
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise ModelError(f"{index}: {outside[0][:200]!r} is not the name of a file beside it")
    missing = [name for name in names if not _is_file(directory / name)]
    if missing:
        raise ModelError(
            f"{directory}: {listed(missing)} missing of {len(names)} weight files; copy the rest too"
        )
    return [directory / name for name in names]


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that is too long, or holds a zero byte
        return False
