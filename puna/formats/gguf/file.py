"""GGUF, llama.cpp's files: metadata, tokenizer and weights in one, read whatever their mix of types.

Query and key rows are interleaved there and half-split in `Weights`; the rows of packed matrices are moved
as they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from puna.errors import ModelError, TokenizerError
from puna.formats.casting import Choice
from puna.formats.content import Content, Obstacle, Record
from puna.formats.gguf import header as gguf_header
from puna.formats.gguf import tokenizer as gguf_tokenizer
from puna.formats.gguf.config import check_architecture, config_metadata
from puna.formats.gguf.header import Entry, Header, brief, read_header
from puna.formats.gguf.tensors import GgufTensors
from puna.formats.gguf.vocabulary import check_tokenizer, tokenizer_metadata
from puna.formats.packed import BLOCKS, block_sizes, described, in_blocks
from puna.formats.source import Source
from puna.formats.tensor_files import listed, shown
from puna.model.config import ModelConfig
from puna.model.rope import DynamicScaling
from puna.model.weights import Packed, Weights, shapes
from puna.settings import Settings

recognises = gguf_header.recognises

_SHARD = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_COUNT, _NUMBER = "split.count", "split.no"
_LARGEST = 2**32 - 1  # whole numbers of the metadata are uint32, as llama.cpp reads them


class GgufSettings(Settings):
    """`dtype` None keeps every tensor's own type; float64, which GGUF does not have, becomes float32, and
    whole numbers that its blocks cannot hold exactly are refused.

    Vectors are float32 in every file, as llama.cpp demands. A low-bit `dtype` is that of every matrix, the
    embedding and the output projection too (llama.cpp's own mixes give some of them more bits), so that
    figures of files compare; where a row does not divide into blocks the matrix is float16.
    """

    dtype: Literal["float32", "float16", "bfloat16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1"] | None = None


def read(path: Path) -> Source:
    """Open a file, or the shards beside it; names, shapes, types and sizes are checked, no tensor read.

    Raises:
        ModelError: another architecture, or files that are missing, damaged, or not of one model.
    """
    header = _whole(path)
    metadata = header.metadata
    check_architecture(metadata, path)
    tensors = GgufTensors(metadata, header.tensors, path)
    config = tensors.config
    opener = partial(gguf_tokenizer.read_tokenizer, metadata, config.vocab_size, path)
    return Source(
        path=path,
        format="gguf",
        weights=Weights(config, tensors),
        dtype=tensors.dtype,
        stored=tensors.stored,
        end_ids=tuple(index for index in gguf_tokenizer.end_ids(metadata) if index < config.vocab_size),
        bos_id=gguf_tokenizer.bos_id(metadata),
        open_tokenizer=opener if gguf_tokenizer.has_tokenizer(metadata) else None,
    )


def obstacles(content: Content, settings: GgufSettings) -> Iterator[Obstacle]:
    """What of a model GGUF cannot hold."""
    if isinstance(content.config.rope_scaling, DynamicScaling):
        yield Obstacle("dynamic rotary scaling, whose frequencies depend on the length", None)
    if content.config.max_position_embeddings > _LARGEST:
        yield Obstacle(f"a context of {content.config.max_position_embeddings} positions", None)
    try:
        check_tokenizer(content)
    except TokenizerError as error:
        yield Obstacle(str(error), replace(content, tokenizer=None))


def write(target: Path, content: Content, settings: GgufSettings, record: Record) -> list[str]:
    """Write a file that llama.cpp opens; it must not exist.

    Returns what the user should know of it, a sentence each.

    Raises:
        ModelError: the weights cannot be stored.
        TokenizerError: GGUF has no words for the tokenizer.
        OSError: as it comes; the file is then incomplete.
    """
    from puna.formats.gguf.writer import write_file  # with a package that takes long, and nothing reads by

    config = content.config
    metadata: dict[str, Any] = {
        "general.type": "model",
        "general.name": target.stem,
        **config_metadata(config),
        **tokenizer_metadata(content),
    }
    weights = content.weights if settings.dtype else _storable(content.weights)
    write_file(target, metadata, weights, _choice(settings.dtype), record)
    return [*_notes(content), *_fallen_back(config, settings.dtype)]


def _choice(dtype: str | None) -> Choice:
    def choose(name: str, shape: tuple[int, ...]) -> str | None:
        if len(shape) == 1:
            return "float32"
        return "float16" if _falls_back(shape, dtype) else dtype

    return choose


def _storable(weights: Weights) -> Weights:
    """The same weights where whole numbers are in blocks, and other types that GGUF lacks are float32."""
    return Weights(weights.config, ((name, _known(name, value)) for name, value in weights))


def _known(name: str, value: Tensor | Packed) -> Tensor | Packed:
    if isinstance(value, Packed):
        return value if value.scheme in BLOCKS else _exactly(name, value)
    return value.float() if value.dtype == torch.float64 else value


def _exactly(name: str, value: Packed) -> Packed:
    """The blocks that hold these very numbers.

    Raises:
        ModelError: there are none.
    """
    found = in_blocks(value)
    if found is None:
        near = "q8_0" if value.scheme == "int8" else "q4_0"
        raise ModelError(
            f"{name} is {described(value)}, which GGUF cannot hold exactly: its blocks are int8 or int4 with "
            f"a float16 scale for 32 weights; --dtype {near} rounds to these, --dtype float16 expands"
        )
    return found


def _falls_back(shape: tuple[int, ...], dtype: str | None) -> bool:
    return dtype in BLOCKS and len(shape) == 2 and shape[1] % block_sizes(dtype)[0] != 0


def _fallen_back(config: ModelConfig, dtype: str | None) -> Iterator[str]:
    names = [name for name, shape in shapes(config).items() if _falls_back(shape, dtype)]
    if names and dtype is not None:
        yield (
            f"{listed(names)} stored as float16: their rows do not divide into {dtype}'s blocks of "
            f"{block_sizes(dtype)[0]}"
        )


def _notes(content: Content) -> Iterator[str]:
    if content.config.sliding_window is not None:
        yield "llama.cpp's Llama ignores the sliding window and attends to everything; Puna honours it"
    if content.tokenizer is None:
        yield "the file holds no tokenizer: llama.cpp takes and gives token ids only"


def _whole(path: Path) -> Header:
    """The header of a model: that of its file, or the metadata of its first shard and the tensors of all."""
    first = read_header(path)
    count = first.metadata.get(_COUNT, 1)
    if count in (0, 1):
        return first
    files = _shards(path, count)
    if files[0] != path:
        first = read_header(files[0])
    tensors: dict[str, Entry] = {}
    for number, file in enumerate(files):
        header = first if number == 0 else read_header(file)
        if header.metadata.get(_COUNT) != count or header.metadata.get(_NUMBER) != number:
            raise ModelError(f"{file}: not shard {number + 1} of {count} by its metadata; download it again")
        for name, entry in header.tensors.items():
            if name in tensors:
                raise ModelError(
                    f"{path}: {shown(name)} is both in {tensors[name].file.name} and {file.name}"
                )
            tensors[name] = entry
    return Header(first.metadata, tensors)


def _shards(path: Path, count: Any) -> list[Path]:
    match = _SHARD.fullmatch(path.name)
    if match is None or type(count) is not int or int(match["count"]) != count:
        raise ModelError(
            f"{path}: one of {brief(count)} shards by its metadata; expected a name such as "
            f"model-00001-of-{count if type(count) is int and 0 < count < 100_000 else 3:05d}.gguf"
        )
    files = [
        path.with_name(f"{match['stem']}-{number + 1:05d}-of-{count:05d}.gguf") for number in range(count)
    ]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ModelError(f"{path.parent}: {listed(missing)} missing of {count} shards; copy the rest too")
    return files
