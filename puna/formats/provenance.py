"""puna.json: where a model came from, and hashes by which two copies of it are told apart or equal.

The hash of the weights is taken over tensors, not files: it survives another number of shards, another order,
and a copy in another format.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from puna import __version__
from puna.errors import ModelError
from puna.formats.huggingface.safetensors_layout import payload
from puna.formats.json_files import read_object, write_object
from puna.formats.packed import canonical
from puna.model.config import ModelConfig
from puna.model.weights import Packed, Weights
from puna.tokenizer.tokenizer import Tokenizer

NAME = "puna.json"
FORMAT_VERSION = 1
_OBJECTS = ("model", "training", "quantization")


@dataclass
class PayloadHash:
    """SHA-256 over every tensor's name, type, shape and bytes (little-endian, by rows), in order of name.

    Q8_0 and Q4_0 count as the int8 and int4 that they are: a matrix has one hash in whatever file it lies.
    """

    lines: dict[str, str] = field(default_factory=dict)
    stored: Counter[str] = field(default_factory=Counter)

    def add(self, name: str, value: Tensor | Packed) -> None:
        """Take in one tensor; of other blocks than those, the bytes as they are."""
        digest = hashlib.sha256()
        self.stored[kind_of(value)] += 1
        if isinstance(value, Packed):
            value = canonical(value) or value
            digest.update(payload(value.data))
            digest.update(b"" if value.scales is None else payload(value.scales))
        else:
            digest.update(payload(value))
        kind = _kind_in_hash(value)
        self.lines[name] = f"{name} {kind} {list(value.shape)} {digest.hexdigest()}\n"

    def hexdigest(self) -> str:
        """The hash of what was taken in so far."""
        return hashlib.sha256("".join(self.lines[name] for name in sorted(self.lines)).encode()).hexdigest()


def kind_of(value: Tensor | Packed) -> str:
    """The type of a tensor, or its scheme."""
    return value.scheme if isinstance(value, Packed) else str(value.dtype).removeprefix("torch.")


def _kind_in_hash(value: Tensor | Packed) -> str:
    """The same with the type of the scales, since different ones may have equal bytes."""
    if isinstance(value, Packed) and value.scales is not None and value.scales.dtype != torch.float32:
        return f"{value.scheme} {str(value.scales.dtype).removeprefix('torch.')}"
    return kind_of(value)


def payload_hash(weights: Weights) -> str:
    """The hash of weights at hand, to be compared with the one in puna.json."""
    found = PayloadHash()
    for name, value in weights:
        found.add(name, value)
    return found.hexdigest()


def record(
    hashes: PayloadHash,
    config: ModelConfig,
    tokenizer: Tokenizer | None,
    *,
    source: Any = None,
    training: dict[str, Any] | None = None,
    quantization: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """What puna.json says of a model; `quantization` is what the command that quantized it measured."""
    about = None if tokenizer is None else {"fingerprint": tokenizer.fingerprint, "kind": tokenizer.kind}
    return {
        "format_version": FORMAT_VERSION,
        "puna": __version__,
        "source": source,
        "model": config.model_dump(mode="json"),
        "weights": {
            "sha256": hashes.hexdigest(),
            "tensors": len(hashes.lines),
            "dtype": max(hashes.stored, key=hashes.stored.__getitem__),
        },
        "tokenizer": about,
        "training": training,
        "quantization": quantization,
    }


def place(model: Path) -> Path:
    """Where the provenance of a model lies: in its directory, or beside its file."""
    return model / NAME if model.is_dir() else model.with_name(f"{model.name}.{NAME}")


def write(model: Path, record: dict[str, Any]) -> None:
    """Write the provenance of a model that is there.

    Raises:
        OSError: as it comes.
    """
    write_object(place(model), record)


def read(model: Path) -> dict[str, Any] | None:
    """The provenance of a model, None where there is none; `weights`, `model`, `training` and `quantization`
    are sure to be objects, or None.

    Raises:
        ModelError: it is damaged, or written by a later version.
    """
    path = place(model)
    if not path.is_file():
        return None
    found = read_object(path)
    version = found.get("format_version")
    if version != FORMAT_VERSION:
        raise ModelError(
            f"{path}: format_version {version!r}, this version of Puna knows {FORMAT_VERSION}; update Puna"
        )
    weights = found.get("weights")
    whole = isinstance(weights, dict) and isinstance(weights.get("sha256"), str)
    if not whole or not all(isinstance(found.get(part), dict | None) for part in _OBJECTS):
        raise ModelError(f"{path}: not a record that Puna wrote; remove it, the model does without")
    return found
