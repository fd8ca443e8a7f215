"""Which format a path holds, told by content."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from puna.errors import ModelError
from puna.files import aside
from puna.formats.content import Content, Obstacle, Record
from puna.formats.gguf import file as gguf
from puna.formats.huggingface import directory as huggingface
from puna.formats.llama2c import file as llama2c
from puna.formats.meta import directory as meta
from puna.formats.source import Source
from puna.formats.watching import Watched, look_at
from puna.model.weights import Weights
from puna.settings import Settings

_RUN_MARK = "run.toml"  # what every run directory holds
_LATER = re.compile(r"-(?!00001)\d{5}-of-\d{5}\.gguf$")  # a part of a split file but the first
_PARTS = (  # files that are a model only together with others in their directory
    *("config.json", "*.index.json", "*.safetensors", "pytorch_model*.bin"),
    *("params.json", "consolidated.*.pth"),
)


class _Functions(Protocol):
    """What the module of a format has; `Format` tells what each does."""

    def recognises(self, path: Path, /) -> bool: ...
    def read(self, path: Path, /) -> Source: ...
    def obstacles(self, content: Content, settings: Any, /) -> Iterable[Obstacle]: ...
    def write(self, target: Path, content: Content, settings: Any, record: Record, /) -> list[str]: ...


@dataclass(frozen=True)
class Format:
    """One way to keep a model on disk.

    Attributes:
        description: what is expected at a path, in words.
        recognises: whether a path holds this format; by content, quickly, and never raising.
        read: opens it. Everything is checked but the tensors' values, and nothing is taken into memory but
            what the files really hold.
        settings: the class of the settings for writing.
        obstacles: what of a model the format cannot hold, asked before anything is written.
        write: writes to a path that does not exist, in a directory that holds nothing else; returns what the
            user should know of the result, a sentence each.
        is_directory: whether a model is a directory; otherwise it is a file, with others beside it.
        takes_packed: whether it writes packed tensors without being told a type.
    """

    description: str
    recognises: Callable[[Path], bool]
    read: Callable[[Path], Source]
    settings: type[Settings]
    obstacles: Callable[[Content, Any], Iterable[Obstacle]]
    write: Callable[[Path, Content, Any, Record], list[str]]
    is_directory: bool
    takes_packed: bool


def _format(
    module: _Functions,
    settings: type[Settings],
    description: str,
    *,
    is_directory: bool = False,
    takes_packed: bool = True,
) -> Format:
    return Format(
        description,
        module.recognises,
        module.read,
        settings,
        module.obstacles,
        module.write,
        is_directory,
        takes_packed,
    )


FORMATS = {
    "hf": _format(
        huggingface,
        huggingface.HuggingFaceSettings,
        "a directory with config.json and *.safetensors or pytorch_model*.bin",
        is_directory=True,
    ),
    "meta": _format(
        meta,
        meta.MetaSettings,
        "a directory with params.json and consolidated.*.pth",
        is_directory=True,
        takes_packed=False,
    ),
    "llama2c": _format(llama2c, llama2c.Llama2cSettings, "a .bin or ckpt.pt of llama2.c"),
    "gguf": _format(gguf, gguf.GgufSettings, "a .gguf file"),
}


def open_model(path: str | Path) -> Source:
    """Open the model at a path without reading its tensors; a run directory stands for its best export.

    Raises:
        ModelError: nothing is there, it is not a model, or a damaged or unsupported one.
    """
    path = Path(path)
    try:
        path = model_path(path)
        # A pipe or a device would be waited for, or never end.
        readable = path.is_file() or path.is_dir()
        format = next((f for f in FORMATS.values() if readable and f.recognises(path)), None)
        found = None if format or not path.is_dir() else _single_files(path)
        what = _what_is_at(path)
        files = look_at(path) if format else ()
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from None
    if format is not None:
        source = format.read(path)
        return replace(source, weights=Weights(source.config, Watched(source.weights, files)))
    if found and len(found) == 1:
        return open_model(found[0])
    if found:
        names = ", ".join(file.name for file in found[:8])
        raise ModelError(f"{path} holds several models; name one of {names}")
    expected = "; ".join(format.description for format in FORMATS.values())
    raise ModelError(f"{path} is not a model: found {what}, expected {expected}")


def _single_files(directory: Path) -> list[Path]:
    """The models in a directory that are a file each; of a split one, its first part."""
    files = (file for file in sorted(directory.iterdir()) if file.is_file() and not _LATER.search(file.name))
    single = [format for format in FORMATS.values() if not format.is_directory]
    return [file for file in files if any(format.recognises(file) for format in single)]


def model_path(path: Path) -> Path:
    """Where the model lies that a path stands for.

    A run directory stands for its best export, and a file that is one part of a directory for that directory.

    Raises:
        ModelError: the run has exported no model yet.
    """
    if path.is_file() and is_part(path):
        return path.parent
    if not (path / _RUN_MARK).is_file():
        return path
    model = path / "model"
    for place in (model, aside(model)):
        if place.is_dir():
            return place
    raise ModelError(f"{path} is a run without a model so far; one is exported at its first validation")


def is_part(path: Path) -> bool:
    """Whether a file of this name is a model only together with others in its directory."""
    return any(path.match(part) for part in _PARTS)


def _what_is_at(path: Path) -> str:
    if path.is_dir():
        names = sorted(entry.name for entry in path.iterdir())
        shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        return f"a directory with {shown}" if names else "an empty directory"
    if path.is_file():
        return f"a file of {path.stat().st_size} bytes"
    return "something that is neither file nor directory" if path.exists() else "nothing there"
