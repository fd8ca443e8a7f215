"""Which format a path holds, told by content."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from puna.errors import ModelError
from puna.files import aside
from puna.formats.content import Content, Obstacle, Record
from puna.formats.gguf import file as gguf
from puna.formats.huggingface import directory as huggingface
from puna.formats.llama2c import file as llama2c
from puna.formats.meta import directory as meta
from puna.formats.source import Source
from puna.settings import Settings

_RUN_MARK = "run.toml"  # what every run directory holds
_LATER = re.compile(r"-(?!00001)\d{5}-of-\d{5}\.gguf$")  # a part of a split file but the first
_PARTS = (  # files that are a model only together with others in their directory
    *("config.json", "*.index.json", "*.safetensors", "pytorch_model*.bin"),
    *("params.json", "consolidated.*.pth"),
)


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


FORMATS = {
    "hf": Format(
        description="a directory with config.json and *.safetensors or pytorch_model*.bin",
        recognises=huggingface.recognises,
        read=huggingface.read,
        settings=huggingface.HuggingFaceSettings,
        obstacles=huggingface.obstacles,
        write=huggingface.write,
        is_directory=True,
        takes_packed=True,
    ),
    "meta": Format(
        description="a directory with params.json and consolidated.*.pth",
        recognises=meta.recognises,
        read=meta.read,
        settings=meta.MetaSettings,
        obstacles=meta.obstacles,
        write=meta.write,
        is_directory=True,
        takes_packed=False,
    ),
    "llama2c": Format(
        description="a .bin or ckpt.pt of llama2.c",
        recognises=llama2c.recognises,
        read=llama2c.read,
        settings=llama2c.Llama2cSettings,
        obstacles=llama2c.obstacles,
        write=llama2c.write,
        is_directory=False,
        takes_packed=True,
    ),
    "gguf": Format(
        description="a .gguf file",
        recognises=gguf.recognises,
        read=gguf.read,
        settings=gguf.GgufSettings,
        obstacles=gguf.obstacles,
        write=gguf.write,
        is_directory=False,
        takes_packed=True,
    ),
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
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from None
    if format is not None:
        return format.read(path)
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
