"""Tensors out of safetensors files, mapped into memory: what is not asked for is never read.

The library checks every header against the size of its file before anything is allocated; what remains to be
checked here is that the tensors are those of the config.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from puna.devices import DTYPES as DTYPES_BY_NAME
from puna.errors import ModelError, nearest
from puna.formats.casting import is_finite
from puna.formats.json_files import read_object
from puna.model.config import ModelConfig
from puna.model.weights import shapes

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}

_DERIVED = ".rotary_emb.inv_freq"  # a buffer that old files carry: the config determines it
_LAYER = "model.layers."


class SafetensorsFiles:
    """The tensors of a model by name, over one file or several; iteration reads them in the model's order.

    A tensor read is a view of the mapped file: it costs memory only where it is converted or written to.

    Raises:
        ModelError: a file is missing or damaged; or a name, shape or type is not what the config asks for.
    """

    def __init__(self, files: Sequence[Path], config: ModelConfig, origin: Path) -> None:
        self._origin = origin
        self._place: dict[str, Path] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        found: dict[str, tuple[int, ...]] = {}
        for file in files:
            for name, kind, shape in _entries(file):
                if name in found:
                    raise ModelError(f"{origin}: {name} is both in {self._place[name].name} and {file.name}")
                self._place[name], found[name] = file, shape
                if not name.endswith(_DERIVED):
                    self._dtypes[name] = _dtype(kind, name, file)
        self.config = self._untied_if_so(config, found)
        self._expected = self._check(found)

    @property
    def dtype(self) -> torch.dtype:
        """The type that most tensors are stored in."""
        return DTYPES_BY_NAME[max(self.stored, key=self.stored.__getitem__)]

    @property
    def stored(self) -> dict[str, int]:
        """How many tensors are stored in each type, by name."""
        return dict(Counter(str(self._dtypes[name]).removeprefix("torch.") for name in self._expected))

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the model.

        Raises:
            ModelError: a tensor holds NaN or infinite values.
        """
        with ExitStack() as stack:
            readers: dict[Path, Any] = {}
            for name in self._expected:
                file = self._place[name]
                if file not in readers:
                    readers[file] = stack.enter_context(_open(file))
                tensor = readers[file].get_tensor(name)
                if not is_finite(tensor):
                    raise ModelError(
                        f"{file}: {name} holds NaN or infinite values: a damaged file, or training diverged"
                    )
                yield name, tensor

    def _check(self, found: dict[str, tuple[int, ...]]) -> list[str]:
        """The names to read, in the model's order, once it is sure that all fit."""
        layers = {name.removeprefix(_LAYER).split(".")[0] for name in found if name.startswith(_LAYER)}
        if len(layers) != self.config.num_hidden_layers:  # asked first: it bounds what `shapes` has to list
            raise ModelError(
                f"{self._origin}: expected {self.config.num_hidden_layers} layers by config.json, found "
                f"tensors of {len(layers)}"
            )
        expected = shapes(self.config)
        unknown = [name for name in found if name not in expected and not self._ignorable(name)]
        if unknown:
            raise ModelError(
                f"{self._origin}: {_list(unknown)} not part of a model of this config."
                + nearest(unknown[0], expected)
            )
        missing = [name for name in expected if name not in found]
        if missing:
            raise ModelError(f"{self._origin}: {_list(missing)} missing from the weights")
        for name, shape in expected.items():
            if found[name] != shape:
                raise ModelError(
                    f"{self._place[name]}: {name} has shape {list(found[name])}, "
                    f"expected {list(shape)} by config.json"
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
        head, embedding = (_read(self._place[name], name) for name in pair)
        if head.shape == embedding.shape and torch.equal(head, embedding):
            return config
        return config.model_copy(update={"tie_word_embeddings": False})


def files_of(directory: Path) -> list[Path]:
    """The safetensors files of a model directory: those its index names, or the single one.

    Raises:
        ModelError: there are none, shards are missing, or the index is damaged.
    """
    single, index = directory / SINGLE, directory / INDEX
    if index.is_file():
        return _shards(directory, read_object(index).get("weight_map"), index)
    if single.is_file():
        return [single]
    found = sorted(path.name for path in directory.glob("*.safetensors"))
    if found:
        raise ModelError(f"{directory}: {found[0]} needs {INDEX} beside it, which is missing; copy it too")
    raise ModelError(f"{directory}: holds config.json but no weights; expected {SINGLE} or {INDEX}")


def _shards(directory: Path, table: Any, index: Path) -> list[Path]:
    if not isinstance(table, dict) or not table or not all(isinstance(name, str) for name in table.values()):
        raise ModelError(f"{index}: expected a weight_map of tensor names to file names")
    names = sorted(set(table.values()))
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise ModelError(f"{index}: {outside[0]!r} is not the name of a file beside it")
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise ModelError(
            f"{directory}: {_list(missing)} missing of {len(names)} weight files; copy the rest too"
        )
    return [directory / name for name in names]


def _entries(file: Path) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Name, stored type and shape of every tensor in a file, from its header."""
    with _open(file) as reader:
        for name in reader.keys():  # noqa: SIM118  # not a dict
            view = reader.get_slice(name)
            yield name, view.get_dtype(), tuple(view.get_shape())


def _read(file: Path, name: str) -> Tensor:
    with _open(file) as reader:
        return reader.get_tensor(name)


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise ModelError(
            f"{file}: damaged or cut short ({file.stat().st_size} bytes: {error}); copy or download it again"
        ) from None
    except OSError as error:
        raise ModelError(f"{file}: cannot be read: {error.strerror or error}") from None


def _dtype(kind: str, name: str, file: Path) -> torch.dtype:
    if kind not in DTYPES:
        raise ModelError(f"{file}: {name} is stored as {kind}; expected one of {', '.join(DTYPES)}")
    return DTYPES[kind]


def _list(names: Sequence[str]) -> str:
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return f"{shown} {'is' if len(names) == 1 else 'are'}"
