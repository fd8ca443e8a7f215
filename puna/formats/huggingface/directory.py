"""A Hugging Face model directory: config.json, generation_config.json, tokenizer files, and the tensors.

Those are in *.safetensors, or in the pytorch_model*.bin of before them, which are read and not written.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

from pydantic import Field
from torch import Tensor

import puna.tokenizer
from puna.formats.archives.torch_archive import PYTORCH_BIN
from puna.formats.content import Content, Obstacle, Record
from puna.formats.huggingface import quantized, yi_names
from puna.formats.huggingface.config_json import (
    is_yi,
    read_bos_id,
    read_config,
    read_end_ids,
    read_generation,
    token_ids,
    write_config,
)
from puna.formats.huggingface.safetensors_reader import SAFETENSORS
from puna.formats.huggingface.safetensors_writer import write_tensors
from puna.formats.json_files import read_object, write_object
from puna.formats.source import Source
from puna.formats.tensor_files import TensorFiles, find
from puna.model.weights import Packed, Weights
from puna.settings import Settings

CONFIG, GENERATION = "config.json", "generation_config.json"
_TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json")


class HuggingFaceSettings(Settings):
    """`dtype` None keeps every tensor's own type; files hold at most `shard_bytes`."""

    dtype: Literal["float32", "bfloat16", "float16", "float64"] | None = None
    shard_bytes: int = Field(default=5_000_000_000, gt=0)


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
    files, kind = find(directory, (SAFETENSORS, PYTORCH_BIN))
    opening = quantized.Opening(yi_names.as_llama(kind.opened) if is_yi(values) else kind.opened)
    if (layout := values.get("quantization_config")) is not None:
        opening = quantized.opening(opening.opened, files, layout, directory / CONFIG)
        files = [directory]
    tensors = TensorFiles(files, config, directory, opening.opened)
    has_tokenizer = any((directory / name).is_file() for name in _TOKENIZER_FILES)
    return Source(
        path=directory,
        format="hf",
        weights=Weights(tensors.config, tensors),
        dtype=tensors.dtype,
        stored=tensors.stored,
        end_ids=read_end_ids(generation) or read_end_ids(values),
        bos_id=read_bos_id(values),
        generation=read_generation(generation),
        open_tokenizer=partial(puna.tokenizer.load, directory) if has_tokenizer else None,
        notes=opening.notes,
        packing=opening.packing,
    )


def obstacles(content: Content, settings: HuggingFaceSettings) -> Iterator[Obstacle]:
    """What of a model such a directory cannot hold."""
    config = content.config
    if config.sliding_window is not None and (config.attention_bias or config.mlp_bias):
        # Windows make it a Mistral to transformers, which has no biases.
        unlimited = config.model_copy(update={"sliding_window": None})
        without = replace(content, weights=replace(content.weights, config=unlimited))
        yield Obstacle(f"biases beside a sliding window of {config.sliding_window} positions", without)


def write(target: Path, content: Content, settings: HuggingFaceSettings, record: Record) -> list[str]:
    """Write a directory that transformers opens; it must not exist.

    Returns what the user should know of it, a sentence each.

    Raises:
        ModelError: the weights cannot be stored.
        TokenizerError: tokenizer.json cannot express the tokenizer.
        OSError: as it comes; the directory is then incomplete.
    """
    target.mkdir(parents=True)
    layout, weights = quantized.Layout(content.config.tie_word_embeddings), content.weights
    if settings.dtype is None:
        weights = Weights(content.config, layout.storable(weights))

    def told(name: str, value: Tensor | Packed) -> None:
        layout.add(name, value)
        record(name, value)

    write_tensors(target, weights, settings.dtype, settings.shard_bytes, told, layout.parts)
    ends, bos = content.end_ids, content.bos_id
    config = write_config(content.config, layout.dtype, bos, ends)
    write_object(target / CONFIG, config | layout.quantization_config())
    write_object(target / GENERATION, {**content.generation, **token_ids(bos, ends)})
    if content.tokenizer is not None:
        content.tokenizer.save(target)
    return list(layout.notes())
