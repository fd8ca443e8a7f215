"""A Hugging Face model directory: config.json, generation_config.json, *.safetensors, tokenizer files."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from puna.errors import ModelError
from puna.files import disk_errors, replace_directory, sync_tree, temporary_beside
from puna.formats import provenance
from puna.formats.config_json import read_bos_id, read_config, read_end_ids, token_ids, write_config
from puna.formats.json_files import read_object, write_object
from puna.formats.safetensors_reader import SafetensorsFiles, files_of
from puna.formats.safetensors_writer import write_tensors
from puna.formats.source import Source
from puna.model.weights import Weights
from puna.tokenizer.tokenizer import Tokenizer

CONFIG, GENERATION = "config.json", "generation_config.json"
SHARD_BYTES = 5_000_000_000
_TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json")


def recognises(path: Path) -> bool:
    """Whether a path is such a directory."""
    return (path / CONFIG).is_file()


def read(directory: Path) -> Source:
    """Open a model directory; every name, type and shape in it is checked, no tensor read.

    Raises:
        ModelError: another architecture, or a file that is missing, damaged, or does not fit the others.
    """
    values = read_object(directory / CONFIG)
    generation = read_object(directory / GENERATION) if (directory / GENERATION).is_file() else {}
    config = read_config(values, str(directory / CONFIG))
    tensors = SafetensorsFiles(files_of(directory), config, directory)
    return Source(
        path=directory,
        format="hf",
        weights=Weights(tensors.config, tensors),
        dtype=tensors.dtype,
        tokenizer_path=directory if any((directory / name).is_file() for name in _TOKENIZER_FILES) else None,
        end_ids=read_end_ids(generation) or read_end_ids(values),
        bos_id=read_bos_id(values),
    )


def save(
    directory: str | Path,
    weights: Weights,
    tokenizer: Tokenizer | None = None,
    *,
    end_ids: Sequence[int] | None = None,
    bos_id: int | None = None,
    source: str | None = None,
    training: dict[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
) -> None:
    """Write a model directory that transformers opens, aside first: the whole of it is there, or nothing.

    Args:
        directory: may exist where it is empty, or where `overwrite` is given.
        weights: read once, one tensor in memory at a time.
        tokenizer: its files are written too; it gives begin and end tokens where they are not given here.
        end_ids: the tokens that end an answer.
        bos_id: the token that begins a text.
        source: what the model was made from, for puna.json.
        training: what the training run says of itself, for puna.json; JSON.
        dtype: the type to store; None keeps each tensor's own.
        shard_bytes: files are no larger than this, unless one tensor is.
        overwrite: replace the model that is there.

    Raises:
        ModelError: the destination exists, or the weights cannot be stored.
        TokenizerError: tokenizer.json cannot express the tokenizer.
        ResourceError: the disk is full.
    """
    target = Path(directory).resolve()
    _check_destination(target, overwrite)
    if tokenizer is not None:
        end_ids = tokenizer.end_ids if end_ids is None else end_ids
        bos_id = tokenizer.bos_id if bos_id is None else bos_id
    temporary = temporary_beside(target)
    with disk_errors(f"writing the model {target}", target, ModelError, "free some space and save it again"):
        try:
            shutil.rmtree(temporary, ignore_errors=True)  # of a killed process that had our number
            temporary.mkdir(parents=True)
            hashes = provenance.PayloadHash()
            stored = write_tensors(temporary, weights, dtype, shard_bytes, hashes.add)
            write_object(temporary / CONFIG, write_config(weights.config, stored, bos_id, end_ids or ()))
            write_object(temporary / GENERATION, token_ids(bos_id, end_ids or ()))
            if tokenizer is not None:
                tokenizer.save(temporary)
            provenance.write(temporary, hashes, stored, tokenizer, source=source, training=training)
            sync_tree(temporary)
            replace_directory(temporary, target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def _check_destination(target: Path, overwrite: bool) -> None:
    """Nothing is written over but an empty directory or, where that is asked for, a model."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not overwrite:
        raise ModelError(f"{target} exists already; choose another name, remove it, or ask to overwrite it")
    if not recognises(target):
        raise ModelError(f"{target} exists and is not a model, so it is not overwritten; choose another name")
