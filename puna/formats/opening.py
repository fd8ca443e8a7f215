"""Which format a path holds, told by content."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from puna.errors import ModelError
from puna.files import aside
from puna.formats import huggingface
from puna.formats.source import Source

_RUN_MARK = "run.toml"  # what every run directory holds


@dataclass(frozen=True)
class Format:
    """One way to keep a model on disk."""

    description: str
    recognises: Callable[[Path], bool]
    open: Callable[[Path], Source]


FORMATS = {
    "hf": Format("a directory with config.json and *.safetensors", huggingface.recognises, huggingface.read)
}


def open_model(path: str | Path) -> Source:
    """Open the model at a path without reading its tensors; a run directory stands for its best export.

    Raises:
        ModelError: nothing is there, it is not a model, or a damaged or unsupported one.
    """
    path = model_path(Path(path))
    for format in FORMATS.values():
        if format.recognises(path):
            return format.open(path)
    expected = "; ".join(format.description for format in FORMATS.values())
    raise ModelError(f"{path} is not a model: found {_what_is_at(path)}, expected {expected}")


def model_path(path: Path) -> Path:
    """Where the model lies that a path stands for: a run directory stands for its best export.

    Raises:
        ModelError: the run has exported no model yet.
    """
    if not (path / _RUN_MARK).is_file():
        return path
    model = path / "model"
    for place in (model, aside(model)):
        if place.is_dir():
            return place
    raise ModelError(f"{path} is a run without a model so far; one is exported at its first validation")


def _what_is_at(path: Path) -> str:
    if path.is_dir():
        names = sorted(entry.name for entry in path.iterdir())
        shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        return f"a directory with {shown}" if names else "an empty directory"
    if path.is_file():
        return f"a file of {path.stat().st_size} bytes"
    return "nothing there"
