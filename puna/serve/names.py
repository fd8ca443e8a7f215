"""What clients call the model: an id from its path or hub id, and all that means the same."""

from __future__ import annotations

import os
from pathlib import Path, PurePath

SUFFIXES = (".gguf", ".bin", ".pt")
EXPORT = "model"  # what a run directory calls its export, which names no model


def model_names(model: str, chosen: str | None = None) -> tuple[str, frozenset[str]]:
    """The id of a model, `chosen` where given, and every name by which clients may ask for it.

    >>> model_names("runs/demo/model/")[0], model_names("weights/tiny.gguf")[0], model_names("org/some-7B")[0]
    ('demo', 'tiny', 'some-7B')
    """
    # Symbolic links keep the names they were given: what they lead to may be called by a hash.
    path = PurePath(os.path.normpath(Path.cwd() / model)) if Path(model).exists() else PurePath(model)
    name = _bare(path.name)
    if name == EXPORT and path.parent.name:
        name = _bare(path.parent.name)
    identity = chosen or name or model
    bare = model.rstrip("/")
    names = {identity, model, bare, f"{bare}/"} - {"", "/"}
    return identity, frozenset(names | ({path.name} if path.suffix in SUFFIXES else set()))


def _bare(name: str) -> str:
    suffix = PurePath(name).suffix
    return name.removesuffix(suffix) if suffix in SUFFIXES else name
