"""puna.json: where a model came from, and hashes by which two copies of it are told apart or equal.

The hash of the weights is taken over tensors, not files: it survives another number of shards, another order,
and a copy in another format.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from puna import __version__
from puna.errors import ModelError
from puna.formats.json_files import read_object, write_object
from puna.formats.safetensors_writer import payload
from puna.model.weights import Packed, Weights
from puna.tokenizer.tokenizer import Tokenizer

NAME = "puna.json"
FORMAT_VERSION = 1


@dataclass
class PayloadHash:
    """SHA-256 over every tensor's name, type, shape and bytes (little-endian, by rows), in order of name."""

    lines: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, tensor: Tensor, data: memoryview) -> None:
        """Take in one tensor and its bytes."""
        dtype = str(tensor.dtype).removeprefix("torch.")
        self.lines[name] = f"{name} {dtype} {list(tensor.shape)} {hashlib.sha256(data).hexdigest()}\n"

    def hexdigest(self) -> str:
        """The hash of what was taken in so far."""
        return hashlib.sha256("".join(self.lines[name] for name in sorted(self.lines)).encode()).hexdigest()


def payload_hash(weights: Weights) -> str:
    """The hash of weights at hand, to be compared with the one in puna.json.

    Raises:
        ModelError: a tensor is packed.
    """
    found = PayloadHash()
    for name, tensor in weights:
        if isinstance(tensor, Packed):
            raise ModelError(f"{name} is packed as {tensor.scheme}; unpack it, plain numbers are hashed")
        found.add(name, tensor, payload(tensor))
    return found.hexdigest()


def write(
    directory: Path,
    hashes: PayloadHash,
    dtype: torch.dtype,
    tokenizer: Tokenizer | None,
    *,
    source: str | None,
    training: dict[str, Any] | None,
) -> None:
    """Write puna.json.

    Raises:
        OSError: as it comes.
    """
    write_object(
        directory / NAME,
        {
            "format_version": FORMAT_VERSION,
            "puna": __version__,
            "source": source,
            "weights": {
                "sha256": hashes.hexdigest(),
                "tensors": len(hashes.lines),
                "dtype": str(dtype).removeprefix("torch."),
            },
            "tokenizer": None
            if tokenizer is None
            else {"fingerprint": tokenizer.fingerprint, "kind": tokenizer.kind},
            "training": training,
        },
    )


def read(directory: Path) -> dict[str, Any] | None:
    """The content of puna.json, None where there is none.

    Raises:
        ModelError: it is damaged, or written by a later version.
    """
    path = directory / NAME
    if not path.is_file():
        return None
    found = read_object(path)
    version = found.get("format_version")
    if version != FORMAT_VERSION:
        raise ModelError(
            f"{path}: format_version {version!r}, this version of Puna knows {FORMAT_VERSION}; update Puna"
        )
    return found
